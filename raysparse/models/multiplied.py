"""What a model multiplies, read off the model itself: the `Architecture` that FLOPs are counted by."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from raysparse.config import ConfigError
from raysparse.models.build import block_linears, blocks
from raysparse.models.hub_config import kind_of
from raysparse.sparsity.flops import Architecture, Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CROSS = {"EncDecAttention": ("k", "v"), "encoder_attn": ("k_proj", "v_proj")}
"""T5's and Whisper's attention to the encoder, and what of it multiplies what the encoder gave."""


def flops_architecture(model: "PreTrainedModel") -> Architecture:
    """Every matrix inside the blocks, and the head.

    Args:
        model: as `skeleton` or `build` give it, not sharded.

    Raises:
        ConfigError: blocks with weights that are neither `nn.Linear` nor `nn.Embedding` (mixtures of experts, convolutions): their count
            would be a guess.
    """
    config, kind = model.config, type(model).__name__
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    linears = block_linears(model)
    tables = {f"{name}.weight" for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, nn.Embedding)}
    inside = tuple(f"{name}." for name in blocks(model))
    for name, shape in shapes.items():
        beside = f"{name.rpartition('.')[0]}.weight" in linears  # an adapter's factors
        if name.startswith(inside) and len(shape) > 1 and not beside and name not in tables:
            raise ConfigError(
                f"Expected blocks of linear layers in {kind} to count FLOPs of. Got {name} of shape {shape}. "
                "Use a model of the GPT-2, Llama, MPT, T5 or Whisper type."
            )
    output: Any = model.get_output_embeddings()
    assert isinstance(output, nn.Linear), f"{kind} has no linear head"
    head = next(name for name, parameter in model.named_parameters() if parameter is output.weight)
    vocab, width = output.weight.shape
    encoder = _encoder(model, linears) if config.is_encoder_decoder else None
    heads = getattr(config, "decoder_attention_heads", config.num_attention_heads)
    return Architecture(
        layers=config.num_hidden_layers if encoder is None else len(blocks(model)) - encoder.layers,
        width=width,
        heads=heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab=vocab,
        linears={name: shapes[name] for name in linears},
        head=head,
        lookups=frozenset(tables & shapes.keys() - {head}),
        encoder=encoder,
    )


def sees_source(model: nn.Module, names: Sequence[str]) -> frozenset[str]:
    """The weights among `names` that see positions of the source: an encoder's own, and keys and values of the attention to it."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return frozenset()
    own = {id(parameter) for parameter in cast("PreTrainedModel", model).get_encoder().parameters()}
    return frozenset(name for name in names if id(model.get_parameter(name)) in own or _is_of_source(name))


def _encoder(model: "PreTrainedModel", linears: list[str]) -> Encoder:
    config = model.config
    inside = {id(module) for module in model.get_encoder().modules()}
    return Encoder(
        layers=sum(id(block) in inside for block in blocks(model).values()),
        heads=config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        sees=sees_source(model, linears),
        stride=2 if kind_of(config) == "audio" else 1,  # of Whisper's second convolution
    )


def _is_of_source(name: str) -> bool:
    attention, matrix = name.split(".")[-3:-1]
    return matrix in _CROSS.get(attention, ())
