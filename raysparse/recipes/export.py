"""Turn a run into a plain Hugging Face folder, zeros kept, with the masks beside it; or into one packed for decoding."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, TypeAdapter, model_validator
from torch import Tensor

from raysparse.config import Config, ConfigError
from raysparse.models import packed
from raysparse.models.adapters import AnyAdapters, merge
from raysparse.models.export import check_target, write_folder
from raysparse.recipes.job import runs_in
from raysparse.train import checkpoint

MASKS = "masks.safetensors"
"""Bit-packed masks ([rows, ceil(cols / 8)] uint8) under the names and in the [out, in] layout of the training model."""


class ExportConfig(Config):
    """`raysparse export`: a checkpoint of a run as a plain Hugging Face folder, or packed for decoding."""

    run: str
    """Folder of the run. With format=packed also a model in Hugging Face format, such as an earlier export."""
    to: str
    """Folder to write; must not exist, or be empty."""
    step: int = Field(0, ge=0)
    """Step of the checkpoint; 0 takes the newest."""
    format: Literal["huggingface", "packed"] = "huggingface"
    """packed: live weights alone, for `raysparse generate` and weights=packed (docs/packed.md)."""
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Of packed matrices; int8 has one scale for each output."""

    @model_validator(mode="after")
    def _floats_unless_packed(self) -> Self:
        if self.format == "huggingface" and self.dtype != "float32":
            raise ValueError(f"Expected dtype float32 with format huggingface. Got {self.dtype}. Add format=packed, or drop dtype")
        return self


def check(config: ExportConfig) -> tuple[Path, dict[str, Any]]:
    """The checkpoint and the run's job as written in its folder; raises a `ConfigError` where either is missing or damaged.

    Of a model folder that is to be packed: the folder, and no job.
    """
    folder = Path(config.run).expanduser().absolute()
    identity = folder / "identity.json"
    if config.format == "packed" and not identity.exists() and (folder / "config.json").exists():
        if packed.is_packed(folder):
            raise ConfigError(f"Expected a run or a model in Hugging Face format at {folder}. Got a packed one. Pack what it was made of.")
        check_target(Path(config.to).expanduser())
        return folder, {}
    if not identity.exists():
        raise ConfigError(f"Expected a raysparse run at {folder}. Got no identity.json there. {runs_in(folder) or 'Check run=FOLDER.'}")
    if config.step:
        path = folder / "checkpoints" / f"step_{config.step:08d}"
        if (problem := checkpoint.damage(path)) is not None:
            have = ", ".join(str(int(found.name[5:])) for found in checkpoint.committed(folder / "checkpoints")) or "none"
            raise ConfigError(f"Expected checkpoint {path.name} in {folder}. Got: {problem}. Steps there: {have}.")
    elif (path := checkpoint.newest(folder / "checkpoints")) is None:
        raise ConfigError(f"Expected a checkpoint in {folder}. Got none. Train first, or lower checkpoint.every.")
    check_target(Path(config.to).expanduser())
    return path, json.loads((folder / "job.json").read_text())


def dry_run(config: ExportConfig) -> dict[str, Any]:
    path, _ = check(config)
    return {"checkpoint": str(path), "to": config.to}


def export(config: ExportConfig) -> dict[str, Any]:
    """Read a checkpoint of any number of ranks in this process and write it as a model; returns what was written."""
    path, facts = check(config)
    target = Path(config.to).expanduser().absolute()
    if config.format == "huggingface":
        return _export(config, path, facts, target)
    if not facts:
        return {"model": str(path), "to": config.to} | packed.write(path, target, config.dtype)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        written = _export(config, path, facts, Path(folder) / "model")
        return written | packed.write(Path(folder) / "model", target, config.dtype)


def _export(config: ExportConfig, path: Path, facts: Mapping[str, Any], target: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    if config.step == 0 and facts["patience"] and (best := path.with_name(f"step_{_best_step(path):08d}")).exists():
        path = best  # what an early-stopped run went back to
    weights, masks = checkpoint.read_weights(path), checkpoint.read_masks(path)
    hf_config = AutoConfig.for_model(**facts["hf_config"])
    step = int(path.name.removeprefix("step_"))
    weights = merge(weights, TypeAdapter(AnyAdapters).validate_python(facts.get("adapters", {"type": "none"})))
    write_model(target, weights, masks, hf_config, facts["tokenizer"], {"run": Path(config.run).name, "step": step})
    return {"checkpoint": str(path), "to": config.to, "parameters": sum(w.numel() for w in weights.values()), "step": step}


def _best_step(path: Path) -> int:
    """The step that had validated best when a checkpoint was written."""
    return checkpoint.extra_of(path)["state"]["best_step"]


def write_model(
    folder: Path,
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    hf_config: Any,
    tokenizer: str,
    facts: Mapping[str, Any],
) -> None:
    """Write what transformers' ``from_pretrained`` loads, and ``masks.safetensors`` where the model is sparse.

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
