"""A trained model as a plain Hugging Face folder: transformers and its users need nothing of ours to read it.

Values are stored bit for bit, zeros as zeros. ``build`` of the folder gives the logits of the model in training bit for bit. So
does transformers' ``from_pretrained(folder)`` but for the last bit of some row counts, where transformers' memory layout
makes a matrix product round otherwise (see `layout`).
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import torch
from torch import Tensor

from raysparse.config import ConfigError
from raysparse.data.audio import extractor
from raysparse.models.build import block_linears
from raysparse.models.hub_config import Kind, auto_class, kind_of
from raysparse.models.layout import to_hub, to_linear

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_MAX_SHARD = "10GB"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
)


def write_folder(
    folder: str | Path,
    state: Mapping[str, Tensor],
    hf_config: "PretrainedConfig",
    tokenizer_folder: str | Path,
    card: Mapping[str, Any],
) -> None:
    """Write config, weights, tokenizer, generation config, model card and ``sparsity.json`` to `folder`, all or nothing.

    Args:
        folder: must not exist, or be empty. It appears by a rename, complete.
        state: full tensors on one process, under the names and in the [out, in] layout of the model in training.
        hf_config: the model's config; it is not changed.
        tokenizer_folder: its tokenizer files are copied as they are, its special tokens go into the generation config; that of an
            encoder-decoder is its own where it has one (Whisper's names languages and tasks).
        card: facts about the run for the model card (steps, tokens, loss, FLOPs ...); mappings inside become dotted keys.

    Raises:
        ConfigError: a `folder` with something in it, or a tokenizer that cannot be read or does not fit the model.
    """
    folder = Path(folder)
    check_target(folder)
    tokenizer = _read_tokenizer(Path(tokenizer_folder), hf_config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}")
    try:
        counts = _write_model(partial, state, hf_config, tokenizer, Path(tokenizer_folder))
        if kind_of(hf_config) == "audio":
            extractor(hf_config).save_pretrained(partial)
        for name in _TOKENIZER_FILES:
            if (source := Path(tokenizer_folder) / name).is_file():
                shutil.copyfile(source, partial / name)
        (partial / "sparsity.json").write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(_card(folder.name, counts, card, kind_of(hf_config)), encoding="utf-8")
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_target(folder: str | Path) -> None:
    """A `ConfigError` unless `write_folder` may write there; to be asked before the work that leads to it."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"Expected a new or empty folder to export to. Got {folder}, which holds something already. "
            "Remove it or name another; an export never overwrites."
        )


def count_zeros(stored: Mapping[str, Tensor], linears: set[str]) -> dict[str, Any]:
    """Shape, live weights (nnz) and sparsity of every tensor, of the block linears together, and of the whole model."""
    sizes = {name: value.numel() for name, value in stored.items()}
    nnz = {name: int(torch.count_nonzero(value)) for name, value in stored.items()}

    def total(names: list[str]) -> dict[str, Any]:
        size, live = sum(sizes[name] for name in names), sum(nnz[name] for name in names)
        return {"weights": size, "nnz": live, "sparsity": 1 - live / size if size else 0.0}

    return {
        "block_linears": total([name for name in stored if name in linears]),
        "model": total(list(stored)),
        "tensors": {
            name: {"shape": list(value.shape), "nnz": nnz[name], "sparsity": 1 - nnz[name] / sizes[name]} for name, value in stored.items()
        },
    }


def _write_model(
    folder: Path, state: Mapping[str, Tensor], hf_config: "PretrainedConfig", tokenizer: "PreTrainedTokenizerBase", tokenizer_folder: Path
) -> dict[str, Any]:
    """Config, generation config and weights, by transformers itself. Returns `count_zeros` of what is stored."""
    from transformers import GenerationConfig

    config = deepcopy(hf_config)
    config.use_cache = True
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if (token := getattr(tokenizer, key)) is not None:
            setattr(config, key, token)
    with torch.device("meta"):
        model = auto_class(config).from_config(config, dtype=next(iter(state.values())).dtype)
    stored = to_hub(state, model)
    if config.is_encoder_decoder and (tokenizer_folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(tokenizer_folder)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = model.generation_config.eos_token_id
    counts = count_zeros(stored, set(block_linears(to_linear(deepcopy(model)))))
    model.save_pretrained(folder, state_dict=stored, max_shard_size=_MAX_SHARD)  # empties `stored` as it writes
    return counts


def _read_tokenizer(folder: Path, hf_config: "PretrainedConfig") -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ConfigError(
            f"Expected tokenizer files in {folder}. Got none of {', '.join(_TOKENIZER_FILES)}. "
            "Give the folder of the tokenizer that the data was encoded with."
        )
    try:
        tokenizer = cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    except (OSError, ValueError) as error:
        raise ConfigError(f"Expected a tokenizer that transformers reads in {folder}. Got: {error}. Mend it.") from None
    if len(tokenizer) > hf_config.vocab_size:
        raise ConfigError(
            f"Expected a tokenizer of at most the model's {hf_config.vocab_size} tokens. Got {len(tokenizer)} in {folder}. "
            "Give the folder of the tokenizer that the data was encoded with."
        )
    return tokenizer


_USES: dict[Kind, tuple[str, str]] = {
    "causal": ("text-generation", "AutoModelForCausalLM"),
    "text": ("text2text-generation", "AutoModelForSeq2SeqLM"),
    "audio": ("automatic-speech-recognition", "AutoModelForSpeechSeq2Seq"),
}


def _card(name: str, counts: Mapping[str, Any], card: Mapping[str, Any], kind: Kind) -> str:
    block, model = counts["block_linears"], counts["model"]
    pipeline, auto = _USES[kind]
    rows = "\n".join(f"| {key} | {value} |" for key, value in _flat(card))
    return f"""---
library_name: transformers
pipeline_tag: {pipeline}
tags: [sparse, raysparse]
# license: choose one before you publish this model
---

# {name}

Trained with raysparse. {block["sparsity"]:.4%} of the {block["weights"]:,} weights of its blocks' linear layers are zero
({block["nnz"]:,} live), {model["sparsity"]:.4%} of all {model["weights"]:,} parameters. `sparsity.json` has the counts of every
tensor. The zeros are stored as zeros: any program that reads the folder sees a dense model with the same outputs.

```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

## Run

| | |
|---|---|
{rows}

## License

To be stated by whoever publishes this model.
"""


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value).replace("|", "\\|").replace("\n", " ")
