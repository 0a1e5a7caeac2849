"""One-shot pruning of trained layers: one rule a file; the union is the registry."""

from typing import Annotated

from pydantic import Field

from raysparse.sparsity.pruning.base import Layer, Pruner
from raysparse.sparsity.pruning.magnitude import Magnitude
from raysparse.sparsity.pruning.sparsegpt import SparseGPT
from raysparse.sparsity.pruning.total import Total
from raysparse.sparsity.pruning.wanda import Wanda

AnyPruner = Annotated[SparseGPT | Wanda | Magnitude, Field(discriminator="type")]

__all__ = ["AnyPruner", "Layer", "Magnitude", "Pruner", "SparseGPT", "Total", "Wanda"]
