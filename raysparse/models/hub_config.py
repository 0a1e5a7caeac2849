"""Hugging Face configs: read from a model that somebody else wrote, and changed by a user, with every refusal explained."""

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from raysparse.config import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


Kind = Literal["causal", "text", "audio"]
"""What a model reads before it answers: nothing but the beginning of the text; by an encoder a text, or audio."""
CAUSAL: tuple[Kind, ...] = ("causal",)
ANY_KIND: tuple[Kind, ...] = ("causal", "text", "audio")

_ENCODERS: dict[str, Kind] = {"t5": "text", "mt5": "text", "whisper": "audio"}
_POSITIONS = {
    "causal": ("max_position_embeddings", "max_seq_len", "n_positions"),
    "text": (),  # T5's are relative
    "audio": ("max_target_positions",),
}
_CALLED = {
    "causal": "a causal language model (a decoder-only model with a language-model head)",
    "text": "an encoder-decoder of the T5 type",
    "audio": "a Whisper model",
}


def kind_of(hf_config: "PretrainedConfig") -> Kind:
    """Of a config that `read_config` lets pass."""
    return _ENCODERS.get(hf_config.model_type, "causal")


def check_kind(hf_config: "PretrainedConfig", kinds: Sequence[Kind], where: str) -> None:
    """A `ConfigError` for a model that a verb or a task cannot work with."""
    if kind_of(hf_config) not in kinds:
        wanted = " or ".join(_CALLED[kind] for kind in kinds)
        raise ConfigError(f"Expected {wanted}. Got {_CALLED[kind_of(hf_config)]} at {where}. Use another model, or another verb or task.")


def auto_class(hf_config: "PretrainedConfig") -> Any:
    """transformers' class that makes the model of a config."""
    import transformers

    names = {"causal": "AutoModelForCausalLM", "text": "AutoModelForSeq2SeqLM", "audio": "AutoModelForSpeechSeq2Seq"}
    return getattr(transformers, names[kind_of(hf_config)])


def position_key(hf_config: "PretrainedConfig") -> str | None:
    """The field that bounds the tokens of a sequence, of an encoder-decoder what the decoder reads; None where nothing does."""
    return next((hf_config.attribute_map.get(key, key) for key in _POSITIONS[kind_of(hf_config)] if hasattr(hf_config, key)), None)


def read_config(path: str, kinds: Sequence[Kind] = ANY_KIND) -> "PretrainedConfig":
    """The config of a causal language model, a T5 or a Whisper, from a local folder (whose weight files are checked too) or the hub.

    Raises:
        ConfigError: no such model, a damaged one, or one of another kind.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

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
    mappings = {
        "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "text": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "audio": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    }
    kind = kind_of(hf_config)
    name = mappings[kind].get(hf_config.model_type)
    claimed = hf_config.architectures or [name]
    other = name is None or name.lower() not in [each.lower() for each in claimed if each]  # MPT's own says MPTForCausalLM
    if other or hf_config.is_encoder_decoder != (kind != "causal"):
        raise ConfigError(
            f"Expected a causal language model, a T5 or a Whisper at model.path {path}. Got {', '.join(map(str, claimed))} "
            f"(model_type {hf_config.model_type}). Use a decoder-only model with a language-model head, or one of these."
        )
    check_kind(hf_config, kinds, f"model.path {path}")
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
