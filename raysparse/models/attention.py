"""Sparse attention in transformers' own models, switched between steps.

The model calls one registered attention function in every layer; what a layer's queries may see lies beside its attention
module, so models do not disturb each other. Full attention is transformers' own fused path, bit for bit. A pattern runs

- on the CPU in `raysparse.kernels.attention`, which computes no score that is not seen, but for a tile's ragged edges;
- on the CPU with dropout of attention weights in the fused attention with a boolean mask, in evaluation too: every score is computed,
  and it takes longer than full attention;
- on CUDA in compiled FlexAttention, which skips blocks of 128 x 128 scores that are empty: `Local` leaves most blocks empty; a stride or
  a summary column every 128 positions or fewer leaves none below the diagonal.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysparse.config import ConfigError
from raysparse.kernels import library
from raysparse.kernels.attention import attention as attend_to_spans
from raysparse.models.build import blocks
from raysparse.sparsity.attention import AnyAttention, Full, Pattern, Rule

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_NAME = "raysparse"
_OWN = "raysparse_attention"


def check_attention(model: "PreTrainedModel") -> None:
    """Whether `HybridAttention` can take over the attention of `model`, which may lie on the meta device.

    Raises:
        ConfigError: a model without transformers' attention interface, with other attention than one causal module a block, with
            eager attention, or with a sliding window of its own.
    """
    config, kind = model.config, type(model).__name__
    if not model.is_backend_compatible():
        raise ConfigError(
            f"Expected a model with transformers' attention interface for sparse attention. Got {kind}, which has its own attention. "
            "Use full attention, or a model such as GPT-2 or Llama."
        )
    for name, block in blocks(model).items():
        if (found := len(_causal(block))) != 1:
            raise ConfigError(
                f"Expected one causal attention in each block of {kind} for sparse attention. Got {found} in {name}. "
                "Use full attention, or a decoder-only model such as GPT-2 or Llama."
            )
    if config._attn_implementation not in ("sdpa", _NAME):
        raise ConfigError(
            f"Expected model.attention=sdpa with sparse attention. Got {config._attn_implementation}. Leave model.attention out."
        )
    if getattr(config, "sliding_window", None) is not None:
        raise ConfigError(
            f"Expected full attention in {kind}, to make sparse. Got sliding_window={config.sliding_window}. "
            "Set model.overrides={sliding_window: null}, or leave its attention as it is."
        )


class _LayerAttention:
    """What one layer's queries see; an attribute of its attention module, none of its parameters, buffers or state dict.

    Attributes:
        seen: what `Way.make` made for the length of this forward; None is full attention.
        kernel: an attention function of transformers' signature that takes `seen` for its attention mask.
    """

    def __init__(self, kernel: Callable[..., Any]) -> None:
        self.seen: Tensor | BlockMask | None = None
        self.kernel = kernel


class Way(NamedTuple):
    """How patterns are computed: `kernel` as above, and what it needs to know, from the patterns by head, the length and the device."""

    make: "Callable[[Sequence[Pattern], int, torch.device], Tensor | BlockMask]"
    kernel: Callable[..., Any]


class HybridAttention:
    """The attention of one model, full until `set` says otherwise."""

    def __init__(self, layers: Sequence[_LayerAttention], num_heads: int, way: Way) -> None:
        self._layers, self._num_heads, self._way = layers, num_heads, way
        self._attention: AnyAttention = Full()
        self._fitted: tuple[AnyAttention, int, torch.device] | None = None

    @classmethod
    def install(cls, model: "PreTrainedModel", device: str) -> Self:
        """Take over the attention of `model`, once, before it is compiled or sharded.

        Args:
            device: type of the device that the model will run on, "cpu" or "cuda"; with the model's dropout it decides the way.

        Raises:
            ConfigError: see `check_attention`; on CUDA also dropout of attention weights, which FlexAttention does not have.
        """
        check_attention(model)
        way = _way(model, device)
        _register()
        layers = []
        for block in blocks(model).values():
            (attention,) = _causal(block)
            assert not hasattr(attention, _OWN), "installed twice"
            layers.append(_LayerAttention(way.kernel))
            setattr(attention, _OWN, layers[-1])
        model.set_attn_implementation(_NAME)
        hybrid = cls(layers, model.config.num_attention_heads, way)
        model.base_model.register_forward_pre_hook(hybrid._fit, with_kwargs=True)
        return hybrid

    @property
    def skips(self) -> bool:
        """Whether scores that are not seen are not computed: on CPUs without dropout. On GPUs only blocks without any are left out."""
        return self._way.kernel is _span_kernel

    def set(self, attention: AnyAttention) -> None:
        """Attend so from the next forward on. Between steps: not between a forward and its backward, which may recompute it."""
        self._attention = attention

    def _fit(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before each forward, outside of what is compiled: what is seen at its length, made anew where attention or length changed."""
        inputs = kwargs.get("input_ids", args[0] if args else None)
        if inputs is None:
            inputs = kwargs["inputs_embeds"]
        length, device = inputs.shape[1], inputs.device
        if self._fitted == (self._attention, length, device):
            return
        made = {}
        for layer, own in enumerate(self._layers):
            patterns = tuple(self._attention.of(layer, head) for head in range(self._num_heads))
            if patterns not in made:
                full = all(isinstance(pattern, Full) for pattern in patterns)
                made[patterns] = None if full else self._way.make(patterns, length, device)
            own.seen = made[patterns]
        self._fitted = self._attention, length, device


def _way(model: "PreTrainedModel", device: str) -> Way:
    dropout = {key: value for key in ("attn_pdrop", "attention_dropout") if (value := getattr(model.config, key, 0)) > 0}
    if device != "cuda" and dropout:
        return Way(dense_mask, _masked_kernel)
    if device != "cuda":
        if (reason := library.why_not()) is not None:
            logger.warning("Sparse attention runs in plain torch, which takes longer. There is no native library: %s", reason)
        return Way(head_rules, _span_kernel)
    for key, value in dropout.items():
        raise ConfigError(
            f"Expected no dropout of attention weights with sparse attention on CUDA. Got {key}={value}. "
            f"Set model.overrides={{{key}: 0}}, or use full attention."
        )
    return Way(block_mask, _flex_kernel())


def head_rules(patterns: Sequence[Pattern], length: int, device: torch.device) -> Tensor:
    """[heads, 4] int64: the pattern of each head in numbers, the same at any length.

    Args:
        patterns: one a head.
    """
    return torch.tensor([pattern.rule for pattern in patterns], device=device)


def dense_mask(patterns: Sequence[Pattern], length: int, device: torch.device) -> Tensor:
    """[1, heads, length (queries), length (keys)] bool, True where attended; [1, 1, length, length] if all heads have one pattern.

    Args:
        patterns: one a head.
    """
    key = torch.arange(length, device=device)
    made = {pattern: pattern.allows(key[:, None], key) for pattern in dict.fromkeys(patterns)}
    return torch.stack([made[pattern] for pattern in (patterns if len(made) > 1 else patterns[:1])])[None]


def block_mask(patterns: Sequence[Pattern], length: int, device: torch.device) -> "BlockMask":
    """What FlexAttention needs to skip empty blocks; its shape, [1, heads, length, length], does not depend on the patterns.

    ``mask_mod`` holds the whole pattern, causality too, and not just what the blocks leave open: only compiled kernels look at
    the blocks. It reads the patterns from a tensor, so that another phase is other data and compiles nothing.

    Args:
        patterns: one a head.
    """
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask

    def blocks_of(pattern: Pattern) -> BlockMask:
        return create_block_mask(lambda b, h, q, k: pattern.allows(q, k), None, None, length, length, device)

    made = {pattern: blocks_of(pattern) for pattern in dict.fromkeys(patterns)}
    rules = torch.tensor([pattern.rule for pattern in patterns], dtype=torch.int32, device=device)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return Rule(rules[h, 0], rules[h, 1], rules[h, 2], rules[h, 3]).allows(q, k)

    def by_head(part: str) -> Tensor:
        return torch.cat([getattr(made[pattern], part) for pattern in patterns], 1)

    return BlockMask.from_kv_blocks(
        by_head("kv_num_blocks"),
        by_head("kv_indices"),
        by_head("full_kv_num_blocks"),
        by_head("full_kv_indices"),
        mask_mod=mask_mod,
        seq_lengths=(length, length),
    )


@cache  # once, for compiled models hold on to the function
def _register() -> None:
    """Make transformers know `_NAME`: its own fused attention, masks included, unless the layer's queries see less."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
        """query: [batch, heads, length, head_dim]; key, value may have fewer heads. Returns [batch, length, heads, head_dim]."""
        own: _LayerAttention | None = getattr(module, _OWN, None)  # another model may have the same config object
        if own is None or own.seen is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        if attention_mask is not None or query.shape[2] != key.shape[2]:
            raise ConfigError(
                "Expected whole rows, packed or padded on the right, for sparse attention. "
                f"Got {'an attention mask' if attention_mask is not None else 'a key-value cache'}. "
                "Pass input_ids alone with use_cache=False; to generate, load the exported model, or set full attention."
            )
        return own.kernel(module, query, key, value, own.seen, **options)

    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)


def _span_kernel(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, rules: Tensor, scaling: float | None = None, **options: Any
) -> Any:
    assert not options.get("dropout"), "the operator has no dropout"
    for change in ("position_bias", "softcap"):
        assert options.get(change) is None, f"scores would be changed by {change}"
    width, of_value = query.shape[-1], value.shape[-1]
    if width != of_value:  # zeros change no score and are cut off the output
        query, key, value = (F.pad(tensor, (0, max(width, of_value) - tensor.shape[-1])) for tensor in (query, key, value))
    found, _ = attend_to_spans(query, key, value, rules, width**-0.5 if scaling is None else scaling)
    return found[..., :of_value].transpose(1, 2).contiguous(), None


def _masked_kernel(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    assert mask.shape[-1] == query.shape[2], "the model's inner forward was not called"
    return sdpa_attention_forward(module, query, key, value, mask, **options)


@cache
def _flex_kernel() -> Callable[..., Any]:
    """FlexAttention, compiled or not at all: its eager form would compute every score and ignore the blocks."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, fullgraph=True)

    def kernel(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: "BlockMask", **options: Any) -> Any:
        assert mask.shape[-1] == query.shape[2], "the model's inner forward was not called"
        assert not options.get("dropout"), "FlexAttention has no dropout"
        assert options.get("position_bias") is None, "a bias would be a score_mod"
        grouped = query.shape[1] != key.shape[1]
        seen = compiled(query, key, value, block_mask=mask, scale=options.get("scaling"), enable_gqa=grouped)
        return seen.transpose(1, 2).contiguous(), None

    return kernel


def _causal(block: nn.Module) -> list[nn.Module]:
    """Its causal attention modules, as transformers marks them; cross-attention and encoders are not causal."""
    return [module for module in block.modules() if hasattr(module, "layer_idx") and getattr(module, "is_causal", False)]
