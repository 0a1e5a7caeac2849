"""Sizes of models from scratch: GPT-2 and GPT-3, T5, Whisper."""

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from transformers import GPT2Config, PretrainedConfig, T5Config, WhisperConfig


class _Gpt(NamedTuple):
    layers: int
    width: int
    heads: int
    context: int


# GPT-2: Radford et al. 2019, table 2. GPT-3: Brown et al. 2020 (arXiv:2005.14165), table 2.1, all layers with full attention;
# XL with 16 heads of 128 as SPDF (arXiv:2303.10464) has it, 13B with 40 heads of 128 (the table's 5140 is not divisible).
_GPT = {
    "debug": _Gpt(2, 64, 2, 1024),
    "tiny": _Gpt(4, 128, 4, 1024),
    "gpt2-small": _Gpt(12, 768, 12, 1024),
    "gpt2-medium": _Gpt(24, 1024, 16, 1024),
    "gpt2-large": _Gpt(36, 1280, 20, 1024),
    "gpt2-xl": _Gpt(48, 1600, 25, 1024),
    "gpt3-small": _Gpt(12, 768, 12, 2048),
    "gpt3-medium": _Gpt(24, 1024, 16, 2048),
    "gpt3-large": _Gpt(24, 1536, 16, 2048),
    "gpt3-xl": _Gpt(24, 2048, 16, 2048),
    "gpt3-2.7b": _Gpt(32, 2560, 32, 2048),
    "gpt3-6.7b": _Gpt(32, 4096, 32, 2048),
    "gpt3-13b": _Gpt(40, 5120, 40, 2048),
}


class _Pair(NamedTuple):
    """An encoder and a decoder of one size."""

    layers: int
    width: int
    heads: int


# T5: Raffel et al. 2020 (arXiv:1910.10683), section 3.7, heads of 64. Whisper: Radford et al. 2022 (arXiv:2212.04356), table 1.
_T5 = {"t5-small": _Pair(6, 512, 8), "t5-base": _Pair(12, 768, 12), "t5-large": _Pair(24, 1024, 16)}
_WHISPER = {
    "whisper-tiny": _Pair(4, 384, 6),
    "whisper-base": _Pair(6, 512, 8),
    "whisper-small": _Pair(12, 768, 12),
    "whisper-medium": _Pair(24, 1024, 16),
    "whisper-large": _Pair(32, 1280, 20),
}

_Gpt2Name = Literal["gpt2-small", "gpt2-medium", "gpt2-large", "gpt2-xl"]
_Gpt3Name = Literal["gpt3-small", "gpt3-medium", "gpt3-large", "gpt3-xl", "gpt3-2.7b", "gpt3-6.7b", "gpt3-13b"]
_T5Name = Literal["t5-small", "t5-base", "t5-large"]
_WhisperName = Literal["whisper-tiny", "whisper-base", "whisper-small", "whisper-medium", "whisper-large"]
Preset = Literal["debug", "tiny", _Gpt2Name, _Gpt3Name, _T5Name, _WhisperName]

PRESETS = (*_GPT, *_T5, *_WHISPER)


def preset_config(preset: str) -> "PretrainedConfig":
    """Without dropout; vocabulary and special tokens are transformers' defaults."""
    if preset in _T5:
        return _t5(_T5[preset])
    if preset in _WHISPER:
        return _whisper(_WHISPER[preset])
    return _gpt(_GPT[preset])


def _gpt(size: _Gpt) -> "GPT2Config":
    from transformers import GPT2Config

    return GPT2Config(
        n_layer=size.layers,
        n_embd=size.width,
        n_head=size.heads,
        n_positions=size.context,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",  # GPT-2's gelu_new in one pass instead of eight
    )


def _t5(size: _Pair) -> "T5Config":
    from transformers import T5Config

    return T5Config(
        d_model=size.width,
        d_kv=64,
        d_ff=4 * size.width,
        num_layers=size.layers,
        num_heads=size.heads,
        dropout_rate=0.0,
        decoder_start_token_id=0,  # pyrefly: ignore[unexpected-keyword]
    )


def _whisper(size: _Pair) -> "WhisperConfig":
    from transformers import WhisperConfig

    return WhisperConfig(
        d_model=size.width,
        encoder_layers=size.layers,
        decoder_layers=size.layers,
        encoder_attention_heads=size.heads,
        decoder_attention_heads=size.heads,
        encoder_ffn_dim=4 * size.width,
        decoder_ffn_dim=4 * size.width,
        begin_suppress_tokens=None,
    )
