"""Turn a run into a plain Hugging Face folder, zeros kept, with the masks beside it."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from raysparse.models.export import write_folder

MASKS = "masks.safetensors"
"""Bit-packed masks ([rows, ceil(cols / 8)] uint8) under the names and in the [out, in] layout of the training model."""


def write_model(
    folder: Path,
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    hf_config: Any,
    tokenizer: str,
    facts: Mapping[str, Any],
) -> None:
    """Write what ``AutoModelForCausalLM.from_pretrained`` loads, and ``masks.safetensors`` where the model is sparse.

    Args:
        weights: name -> whole float32 tensor, [out, in].
        masks: name -> bit-packed mask.
        hf_config: of the model in training.
        facts: the run's summary, for the model card.
    """
    from safetensors.torch import save_file
    from transformers.utils import logging as transformers_logging

    if folder.exists():
        shutil.rmtree(folder)  # half-written by an attempt that died before its summary
    transformers_logging.disable_progress_bar()
    write_folder(folder, weights, hf_config, tokenizer, facts)
    if masks:
        save_file(dict(masks), str(folder / MASKS))
