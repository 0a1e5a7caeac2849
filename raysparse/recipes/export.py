"""Turn a run into a plain Hugging Face folder, zeros kept, with the masks beside it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from pydantic import Field
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from raysparse.config import Config, ConfigError
from raysparse.models.export import check_target, write_folder
from raysparse.train import checkpoint
from raysparse.train.process import process_group

MASKS = "masks.safetensors"
"""Bit-packed masks ([rows, ceil(cols / 8)] uint8) under the names and in the [out, in] layout of the training model."""


class ExportConfig(Config):
    """`raysparse export`: a checkpoint of a run as a plain Hugging Face folder."""

    run: str
    """Folder of the run."""
    to: str
    """Folder to write; must not exist, or be empty."""
    step: int = Field(0, ge=0)
    """Step of the checkpoint; 0 takes the newest."""


def check(config: ExportConfig) -> tuple[Path, dict[str, Any]]:
    """The checkpoint and the run's job as written in its folder; raises a `ConfigError` where either is missing or damaged."""
    folder = Path(config.run).expanduser().absolute()
    identity = folder / "identity.json"
    if not identity.exists():
        raise ConfigError(f"Expected a raysparse run at {folder}. Got no identity.json there. Check run=FOLDER.")
    if config.step:
        path = folder / "checkpoints" / f"step_{config.step:08d}"
        if (problem := checkpoint.damage(path)) is not None:
            have = ", ".join(str(int(found.name[5:])) for found in checkpoint.committed(folder / "checkpoints")) or "none"
            raise ConfigError(f"Expected checkpoint {path.name} in {folder}. Got: {problem}. Steps there: {have}.")
    elif (path := checkpoint.newest(folder / "checkpoints")) is None:
        raise ConfigError(f"Expected a checkpoint in {folder}. Got none. Train first, or lower checkpoint.every.")
    check_target(config.to)
    return path, json.loads((folder / "job.json").read_text())


def dry_run(config: ExportConfig) -> dict[str, Any]:
    path, _ = check(config)
    return {"checkpoint": str(path), "to": config.to}


def export(config: ExportConfig) -> dict[str, Any]:
    """Read a checkpoint of any number of ranks in this process and write it as a model; returns what was written."""
    from transformers import AutoConfig

    path, facts = check(config)
    if config.step == 0 and facts["patience"] and (best := path.with_name(f"step_{_best_step(path):08d}")).exists():
        path = best  # what an early-stopped run went back to
    stored = dcp.FileSystemReader(str(path)).read_metadata().state_dict_metadata
    wanted = ("model/", "mask/")
    state = {
        key: torch.empty(meta.size, dtype=meta.properties.dtype)
        for key, meta in stored.items()
        if key.startswith(wanted) and isinstance(meta, TensorStorageMetadata)
    }
    with process_group("cpu"):
        dcp.load(state, checkpoint_id=str(path))
    weights, masks = ({key[len(kind) :]: value for key, value in state.items() if key.startswith(kind)} for kind in wanted)
    hf_config = AutoConfig.for_model(**facts["hf_config"])
    step = int(path.name.removeprefix("step_"))
    write_model(Path(config.to), weights, masks, hf_config, facts["tokenizer"], {"run": Path(config.run).name, "step": step})
    return {"checkpoint": str(path), "to": config.to, "parameters": sum(w.numel() for w in weights.values()), "step": step}


def _best_step(path: Path) -> int:
    """The step that had validated best when a checkpoint was written."""
    state = {"extra": ""}
    with process_group("cpu"):
        dcp.load(state, checkpoint_id=str(path))
    return json.loads(state["extra"])["state"]["best_step"]


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

    transformers_logging.disable_progress_bar()
    write_folder(folder, weights, hf_config, tokenizer, facts)
    if masks:
        save_file(dict(masks), str(folder / MASKS))
