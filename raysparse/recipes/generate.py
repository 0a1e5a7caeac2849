"""Let a model go on from a prompt, and say how fast it is and what it reads."""

import logging
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from raysparse.config import Config, ConfigError
from raysparse.kernels import library
from raysparse.models import packed
from raysparse.models.build import ModelConfig, architecture, build
from raysparse.recipes.evaluate import load_tokenizer, model_folder
from raysparse.tasks.generate import complete

_log = logging.getLogger(__name__)


class GenerateConfig(Config):
    """`raysparse generate`: text from a model, on the CPU."""

    model: str
    """A folder in Hugging Face format, a packed one (`raysparse export ... format=packed`), a finished run, or a hub name."""
    prompt: str = Field(min_length=1)
    """The text to go on from, taken literally."""
    weights: Literal["auto", "dense", "packed"] = "auto"
    """packed: live weights alone are read, which bounds the speed; dense: by PyTorch. auto: packed where there are native kernels."""
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Of the weights; int8 only packed. auto: as the model was packed, else float32."""
    max_new_tokens: int = Field(64, ge=1)
    """Longest answer in tokens."""
    temperature: float = Field(0, ge=0)
    """0 takes the likeliest token each time; 1 draws tokens as likely as the model says, lower values keep to likely ones."""
    top_p: float = Field(1, gt=0, le=1)
    """Draw from the likeliest tokens that have this probability together."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of the drawing."""
    threads: int | Literal["auto"] = Field("auto")
    """CPU threads; auto: PyTorch's choice."""

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if self.weights == "dense" and self.dtype == "int8":
            raise ValueError("Expected weights packed with dtype int8. Got dense. Drop weights=dense, or use bfloat16")
        if self.threads != "auto" and self.threads < 1:
            raise ValueError(f"Expected threads auto or 1 and more. Got {self.threads}. Correct it")
        return self


def check(config: GenerateConfig) -> str:
    """The model's folder, or a `ConfigError` for what can be wrong before it is loaded."""
    folder = model_folder(config.model)
    tokenizer = load_tokenizer(folder)
    if not tokenizer(config.prompt)["input_ids"]:
        raise ConfigError(f"Expected a prompt of at least one token. Got none in {config.prompt!r}. Write more.")
    if packed.is_packed(folder):
        if config.weights == "dense" or config.dtype != "auto":
            got = "weights=dense" if config.weights == "dense" else f"dtype={config.dtype}"
            raise ConfigError(
                f"Expected the weights of {folder} as they were packed. Got {got}. Drop it, or name the model that was packed."
            )
    else:
        architecture(ModelConfig(path=folder), len(tokenizer))
    return folder


def dry_run(config: GenerateConfig) -> dict[str, Any]:
    folder = check(config)
    return {"model": folder, "packed": packed.is_packed(folder)}


def generate(config: GenerateConfig) -> dict[str, Any]:
    """The text, without the prompt, and its facts."""
    from transformers import GenerationConfig

    folder = check(config)
    if config.threads != "auto":
        torch.set_num_threads(config.threads)
    tokenizer = load_tokenizer(folder)
    model, prompt = _load(config, folder, len(tokenizer)), tokenizer(config.prompt)["input_ids"]
    drawn = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0} if config.temperature else {}
    settings = GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **({"do_sample": False} | drawn),
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        done = complete(model, prompt, settings)
    return {
        "text": tokenizer.decode(done.ids, skip_special_tokens=True),
        "tokens": len(done.ids),
        "tokens_per_s": (len(done.ids) - 1) / done.decode_s if done.decode_s else None,
        "prompt_tokens": len(prompt),
        "prefill_s": done.prefill_s,
        "weight_bytes_per_token": (facts := packed.reading(model))["bytes"],
        "kinds": facts["kinds"],
        "threads": torch.get_num_threads(),
    }


def show(facts: dict[str, Any]) -> str:
    """The text, and a line about how it came to be."""
    speed = "" if facts["tokens_per_s"] is None else f"{facts['tokens_per_s']:.1f} tokens/s | "
    kinds = ", ".join(f"{count} {kind}" for kind, count in facts["kinds"].items())
    prefill = f"prefill {1000 * facts['prefill_s']:.1f} ms, {facts['prompt_tokens']} tokens"
    return (
        f"{facts['text']}\n\n{facts['tokens']} tokens | {speed}{prefill} | "
        f"{facts['weight_bytes_per_token'] / 1e6:.1f} MB of weights a token | matrices: {kinds} | {facts['threads']} threads"
    )


def _load(config: GenerateConfig, folder: str, vocabulary: int) -> Any:
    if packed.is_packed(folder):
        return packed.load(folder)
    model = build(ModelConfig(path=folder), 0, vocabulary).eval()
    dtype = "float32" if config.dtype == "auto" else config.dtype
    if config.weights == "packed" or dtype == "int8" or (config.weights == "auto" and library.available()):
        return packed.pack(model, dtype)
    if config.weights == "auto":
        _log.warning("weights=dense, for there are no native kernels: %s", library.why_not())
    model.config.use_cache = True
    return model.to(packed.DTYPES[dtype])  # pyrefly: ignore
