"""Which model: GPT, T5 and Whisper sizes from scratch, or in Hugging Face format any causal language model, a T5 or a Whisper.

transformers' own classes are the models. A built model differs from transformers' in one thing: its matrices are all
`nn.Linear`, [out, in] (see `layout`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from raysparse.config import Config, ConfigError, merge
from raysparse.models.hub_config import CAUSAL, Kind, auto_class, check_kind, check_overrides, kind_of, position_key, read_config
from raysparse.models.layout import to_linear
from raysparse.models.presets import PRESETS, Preset, preset_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


BLOCK_LINEARS = "block_linears"


class ModelConfig(Config):
    """Exactly one of `preset` (weights drawn from the seed) and `path` (weights read)."""

    preset: Preset | None = None
    """A model from scratch: dropout 0 unless told otherwise; the data sets vocabulary and context."""
    path: str | None = Field(None, min_length=1)
    """A local folder in Hugging Face format, or a model name on the hub: a causal language model, a T5 or a Whisper."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Fields of the Hugging Face config to change, for example ``{resid_pdrop: 0.1}`` or ``{n_layer: 6}``."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """sdpa: PyTorch's fused scaled dot-product attention; eager: plain matrix products; auto: sdpa where transformers has it, not for
    MPT."""

    @property
    def attn_implementation(self) -> str | None:
        """transformers' name for it."""
        return None if self.attention == "auto" else self.attention

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.preset is None) == (self.path is None):
            got = "neither" if self.preset is None else f"preset {self.preset} and path {self.path}"
            raise ValueError(f"Expected exactly one of preset and path. Got {got}. Presets: {', '.join(PRESETS)}")
        return self


def architecture(
    config: ModelConfig, vocab_size: int | None = None, context: int | None = None, kinds: Sequence[Kind] = CAUSAL
) -> "PretrainedConfig":
    """The Hugging Face config of the model, overrides applied.

    Args:
        vocab_size: tokens that the data uses. A preset takes it as its own; a pretrained or overridden vocabulary must hold it.
        context: tokens of the longest sequence (where there is an encoder, of what the decoder reads); likewise.
        kinds: what the caller can work with.

    Raises:
        ConfigError: an unreadable `path` (its weight files included), a model of another kind, an unknown or ill-typed
            override, a vocabulary or context that does not fit.
    """
    from huggingface_hub.errors import StrictDataclassError

    base = read_config(config.path, kinds) if config.path is not None else preset_config(config.preset or "")
    check_kind(base, kinds, f"model.preset {config.preset}")
    changes = check_overrides(config.overrides, base, "model.overrides")
    fitted: dict[str, Any] = {}
    for key, needed, what in (("vocab_size", vocab_size, "tokens"), (position_key(base), context, "positions")):
        if key is None or needed is None:
            continue
        if config.preset is not None and key not in changes:
            fitted[key] = needed
        elif (has := changes.get(key, getattr(base, key))) < needed:
            raise ConfigError(
                f"Expected a model with {key} of at least {needed}, which the data needs. Got {has} {what} in "
                f"{config.path or f'model.overrides of {config.preset}'}. Use other data, or a model that fits."
            )
    values = merge(base.to_dict(), {**changes, **fitted})
    if config.preset is not None and kind_of(base) == "causal":  # GPT-2's end of text, 50256, need not be in this vocabulary
        values |= {key: None for key in ("bos_token_id", "eos_token_id") if key not in changes and values["vocab_size"] <= 50256}
    if config.preset is not None and "num_decoder_layers" in values.keys() - changes.keys():
        values["num_decoder_layers"] = None  # of a T5 then as many as num_layers
    try:
        result = type(base).from_dict(values)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ConfigError(f"Expected model.overrides that {type(base).__name__} accepts. Got: {error}. Correct them.") from None
    result.use_cache = False
    result.dtype = torch.float32
    return result


def skeleton(
    config: ModelConfig, vocab_size: int | None = None, context: int | None = None, kinds: Sequence[Kind] = CAUSAL
) -> "PreTrainedModel":
    """The model without storage, on the meta device: names, shapes and ties, in a second for billions of weights."""
    hf_config = architecture(config, vocab_size, context, kinds)
    with torch.device("meta"), _as_config_error(config):
        model = auto_class(hf_config).from_config(hf_config, attn_implementation=config.attn_implementation)
    return _finished(model)


def build(
    config: ModelConfig, seed: int, vocab_size: int | None = None, context: int | None = None, kinds: Sequence[Kind] = CAUSAL
) -> "PreTrainedModel":
    """The model on the CPU in float32, in training mode, ``use_cache`` off, ties kept.

    A preset is initialised by transformers itself from `seed`: the same weights in any process; the global random state is left
    as it was. A `path` is read. Arguments and errors otherwise as for `architecture`.
    """
    hf_config = architecture(config, vocab_size, context, kinds)
    hears = _hears_less(config, hf_config)
    with torch.random.fork_rng(devices=[]), _as_config_error(config):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators too
        if config.path is None:
            return _finished(auto_class(hf_config).from_config(hf_config, attn_implementation=config.attn_implementation))
        model, report = auto_class(hf_config).from_pretrained(
            config.path,
            config=hf_config,
            attn_implementation=config.attn_implementation,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(
            f"Expected every weight of {type(model).__name__} in {config.path}. Got none for {len(missing)} of them: "
            f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}. Use a complete checkpoint, or drop the overrides."
        )
    if hears is not None:
        _hear_less(model, hears)
    trained = {name: parameter.requires_grad for name, parameter in skeleton(config, vocab_size, context, kinds).named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.clone()  # not a view of the file: aligned (see layout), and safe if the file changes
        parameter.requires_grad_(trained.get(name, True))  # reading forgets what a model does not train, such as Whisper's positions
    return _finished(model)


def hollow(
    config: ModelConfig, vocab_size: int | None = None, context: int | None = None, kinds: Sequence[Kind] = CAUSAL
) -> "PreTrainedModel":
    """What `build` makes, in memory that nobody has written to and that costs none until then: of ranks that are sent their rows of the
    weights (`raysparse.train.shard.shard`). Arguments and errors as for `architecture`."""
    model = skeleton(config, vocab_size, context, kinds)
    made: dict[int, nn.Parameter] = {}  # ties stay ties, which ``to_empty`` would cut
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            empty = torch.empty_like(weight, device="cpu", requires_grad=False)
            setattr(module, name, made.setdefault(id(weight), nn.Parameter(empty, weight.requires_grad)))
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            setattr(module, name, torch.empty_like(buffer, device="cpu"))
    return model


def _hears_less(config: ModelConfig, hf_config: "PretrainedConfig") -> int | None:
    """The positions of a Whisper that is to hear less than what is stored at its path, which `hf_config` then has as they are stored."""
    wanted = getattr(hf_config, "max_source_positions", None)
    if config.path is None or wanted is None or (stored := read_config(config.path).max_source_positions) <= wanted:
        return None
    hf_config.max_source_positions = stored
    return wanted


def _hear_less(model: Any, positions: int) -> None:
    """Only the first positions of a Whisper's encoder: for short recordings at a fraction of the cost."""
    encoder = model.get_encoder()
    encoder.embed_positions.weight.data = encoder.embed_positions.weight.data[:positions]
    encoder.embed_positions.num_embeddings = encoder.max_source_positions = positions
    model.config.max_source_positions = encoder.config.max_source_positions = positions


@contextmanager
def _as_config_error(config: ModelConfig) -> Iterator[None]:
    """What transformers refuses (sizes, attention kinds, damaged files, pickles of more than tensors) is the user's to mend."""
    from pickle import UnpicklingError

    from safetensors import SafetensorError

    try:
        yield
    except ConfigError:
        raise
    except (ValueError, OSError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise ConfigError(
            f"Expected a model that transformers can build from {config.path or config.preset} with overrides "
            f"{config.overrides} and {config.attention} attention. Got: {error} Change the model section."
        ) from None


def _finished(model: "PreTrainedModel") -> "PreTrainedModel":
    if model.generation_config is not None:
        model.generation_config.use_cache = True  # off in training; decoding without a cache would be quadratic
    if model.config.is_encoder_decoder:
        for block in blocks(model).values():
            block.register_forward_pre_hook(_aliased, with_kwargs=True)
    return to_linear(model).train()


def _aliased(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Every block of a decoder reads what the encoder gave. Each through an alias of its own: a block's gradients of it are added up before
    those of the others, which FSDP2 does too, so that sharded or not the sum is the same, bit by bit."""

    def alias(value: Any) -> Any:
        return value.view_as(value) if isinstance(value, torch.Tensor) and value.requires_grad else value

    return tuple(map(alias, args)), {name: alias(value) for name, value in kwargs.items()}


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks by module name, in order: entries of the outermost `nn.ModuleList`s whose entries are of one class.

    They are what FSDP shards as a unit. GPT-2: ``transformer.h.0`` ...; T5 and Whisper: the encoder's, then the decoder's, all of them.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block}.") for block in found)
        if isinstance(module, nn.ModuleList) and not inside and len({type(child) for child in module}) == 1:
            found |= {f"{name}.{index}": child for index, child in enumerate(module)}
    return found


def block_linears(model: nn.Module) -> list[str]:
    """Names, as in ``named_parameters``, of the weights of every `nn.Linear` inside the blocks: the default sparse set.

    For GPT this is SPDF's set, the dense matrices of every block (arXiv:2303.10464 section 2.1), query, key and value in one.
    """
    linears = {id(linear.weight) for block in blocks(model).values() for linear in block.modules() if isinstance(linear, nn.Linear)}
    return [name for name, parameter in model.named_parameters() if id(parameter) in linears]


def select(model: nn.Module, include: str | Sequence[str] = BLOCK_LINEARS, exclude: Sequence[str] = ()) -> list[str]:
    """Names of the weights that are to be sparse, in the order of ``named_parameters``, each once.

    Args:
        include: `BLOCK_LINEARS` or glob patterns over parameter names, or both (``["block_linears", "lm_head.weight"]``);
            ``*`` crosses dots. Among what a pattern matches only 2-D weights are taken. A tied weight answers to each of its
            names and is listed under the one that ``named_parameters`` gives it.
        exclude: patterns of weights to leave dense.

    Raises:
        ConfigError: a pattern that matches no 2-D weight, or nothing left.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    aliases = [(alias, names[id(p)], p.ndim) for alias, p in model.named_parameters(remove_duplicate=False)]
    chosen = _matched(model, [include] if isinstance(include, str) else include, aliases)
    dropped = _matched(model, exclude, aliases)
    selected = [name for name in names.values() if name in chosen and name not in dropped]
    if not selected:
        raise ConfigError(
            f"Expected at least one weight to be sparse. Got none from include {include!r} without exclude {exclude!r}. "
            "Widen include or narrow exclude; for a dense run set the sparsity to 0."
        )
    return selected


def _matched(model: nn.Module, patterns: Sequence[str], aliases: Sequence[tuple[str, str, int]]) -> set[str]:
    matched: set[str] = set()
    for pattern in patterns:
        if pattern == BLOCK_LINEARS:
            matched |= set(block_linears(model))
            continue
        hits = [(name, ndim) for alias, name, ndim in aliases if fnmatchcase(alias, pattern)]
        if not any(ndim == 2 for _, ndim in hits):
            got = f"only parameters of other shapes, such as {hits[0][0]} with {hits[0][1]} axes" if hits else "no match"
            near = get_close_matches(pattern, [alias for alias, _, ndim in aliases if ndim == 2], n=3, cutoff=0.0)
            raise ConfigError(
                f"Expected the pattern {pattern!r} to match 2-D weights of {type(model).__name__}. Got {got}. "
                f"Near names: {', '.join(near)}."
            )
        matched |= {name for name, ndim in hits if ndim == 2}
    return matched
