"""Models: transformers' own classes with one weight layout, and the names of what may be sparse."""

import logging

from raysparse.models.attention import HybridAttention, check_attention
from raysparse.models.build import (
    ModelConfig,
    architecture,
    block_linears,
    blocks,
    build,
    select,
    skeleton,
)
from raysparse.models.layout import to_hub, to_linear
from raysparse.models.multiplied import flops_architecture

for _chatty in ("torchao", "torch.utils._pytree"):
    # transformers imports torchao where it is installed; on CPUs that warns of libraries for GPUs, and of how it registers its own enums
    logging.getLogger(_chatty).setLevel(logging.ERROR)

__all__ = [
    "HybridAttention",
    "ModelConfig",
    "architecture",
    "block_linears",
    "blocks",
    "build",
    "check_attention",
    "flops_architecture",
    "select",
    "skeleton",
    "to_hub",
    "to_linear",
]
