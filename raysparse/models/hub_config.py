"""Hugging Face configs: read from a model that somebody else wrote, and changed by a user, with every refusal explained."""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raysparse.config import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def read_config(path: str) -> "PretrainedConfig":
    """The config of a causal language model, from a local folder (whose weight files are checked too) or the hub.

    Raises:
        ConfigError: no such model, a damaged one, or one that is not a causal language model.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    folder = Path(path)
    if not folder.is_dir() and (folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise ConfigError(f"Expected a model folder at model.path {path}. Got none there. Check the path.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"Expected a config.json in model.path {path}. Got none. Point to a folder in Hugging Face format.")
    try:
        hf_config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ConfigError(
            f"Expected a model in Hugging Face format at model.path {path}. Got: {error} Give a local folder or a hub name."
        ) from None
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(hf_config.model_type)
    claimed = hf_config.architectures or [name]
    if name is None or hf_config.is_encoder_decoder or name not in claimed:
        raise ConfigError(
            f"Expected a causal language model at model.path {path}. Got {', '.join(map(str, claimed))} "
            f"(model_type {hf_config.model_type}). Use a decoder-only model with a language-model head."
        )
    if folder.is_dir():
        _check_weight_files(folder)
    return hf_config


def check_overrides(overrides: Mapping[str, Any], base: "PretrainedConfig", where: str) -> dict[str, Any]:
    """The overrides under the config's own field names, or a `ConfigError` for a field that it does not have."""
    from transformers import PretrainedConfig

    fields = base.to_dict().keys() - PretrainedConfig().to_dict().keys() - {"use_cache"}
    known = sorted(fields | base.attribute_map.keys())
    changes: dict[str, Any] = {}
    for key, value in overrides.items():
        if key not in known:
            near = get_close_matches(key, known, n=4, cutoff=0.4) or known
            raise ConfigError(f"Expected a field of {type(base).__name__} in {where}. Got {key!r}. Nearest fields: {', '.join(near)}.")
        inner = getattr(base, key)
        if isinstance(inner, PretrainedConfig) and isinstance(value, Mapping):
            value = check_overrides(value, inner, f"{where}.{key}")
        changes[base.attribute_map.get(key, key)] = value
    return changes


def _check_weight_files(folder: Path) -> None:
    """Every weight file that the folder names is there and whole (safetensors headers are read; the tensors are not)."""
    from safetensors import SafetensorError, safe_open

    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    pickled = any((folder / name).is_file() for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"))
    if pickled and not whole.is_file() and not index.is_file():
        return  # cannot be checked without reading all of it
    try:
        files = {whole.name}
        if index.is_file() and not whole.is_file():
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        for name in sorted(files):
            with safe_open(folder / name, framework="pt"):
                pass
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(f"Expected whole weight files in model.path {folder}. Got: {error}. Copy the model again.") from None
