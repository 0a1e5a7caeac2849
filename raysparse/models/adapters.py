"""Retraining few parameters of a sparse model: PERP (Zimmer et al., arXiv:2312.15230). Everything that is not named is frozen.

Of a layer W [out, in], with factors B [out, rank] and A [rank, in], s = alpha / rank (LoRA: Hu et al., arXiv:2106.09685), M = (W != 0)::

    mask_lora   W' = W + M * (s B A)        MaskLoRA of the paper: the product is masked in training too, not only when it is merged
    scale_lora  W' = W * (1 + s B A)        after ScaleLoRA of the paper, W' = W * (B A)

Where W is 0, W' is +0, so the factors merge into W and leave no zero touched. A is drawn from U(-1, 1) / sqrt(in), B is 0: both start as
the model that was pruned. The paper's code (github.com/ZIB-IOL/PERP, customLayers.py) starts ScaleLoRA with all entries of B and A at
1 / sqrt(rank). That is the same model, but all columns of B, and rows of A, have equal gradients and stay equal: the product keeps rank
one. Hence the other form. M is that of the values, as in the paper's code: a live weight that is exactly 0 stays 0 too.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from raysparse.config import Config, ConfigError
from raysparse.models.build import block_linears
from raysparse.sparsity import counter

Kind = Literal["mask_lora", "scale_lora"]
Named = Literal["bias", "norm", "head"]
FACTORS = ("lora_a", "lora_b")


class AllWeights(Config):
    """Ordinary fine-tuning."""

    type: Literal["none"] = "none"
    """none: every weight trains. selective, mask_lora, scale_lora: few parameters do, all others are frozen (docs/finetuning.md)."""


class Selective(Config):
    """PERP without adapters."""

    type: Literal["selective"] = "selective"
    train: tuple[Named, ...] = Field(("bias", "norm"), min_length=1)
    """What trains. bias: all biases. norm: gains and biases of the norms. head: the output matrix, and where it is tied the embedding."""


class LowRank(Config):
    """What the two kinds of adapters share: one on every linear layer of the blocks."""

    type: Kind
    rank: int = Field(16, ge=1)
    """Of the product B A that changes a layer; at most its smaller side."""
    alpha: float = Field(32.0, gt=0)
    """The product counts alpha / rank times."""
    train: tuple[Named, ...] = ("bias", "norm")
    """What trains beside the adapters; as for selective, and it may be empty."""


class MaskLora(LowRank):
    """PERP with W + M * (alpha / rank) B A for W in every linear layer of the blocks, M its live weights."""

    type: Literal["mask_lora"] = "mask_lora"


class ScaleLora(LowRank):
    """PERP with W * (1 + (alpha / rank) B A) for W in every linear layer of the blocks."""

    type: Literal["scale_lora"] = "scale_lora"


Adapters = AllWeights | Selective | MaskLora | ScaleLora
AnyAdapters = Annotated[Adapters, Field(discriminator="type")]


class AdaptedLinear(nn.Linear):
    """An `nn.Linear` with a frozen weight and the factors of its change, in the same FSDP unit. Made by `adapt`."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    kind: Kind
    scale: float

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        factors = self.lora_a, self.lora_b, self.kind, self.scale
        return cast(Tensor, _Product.apply(input.to(dtype), self.weight, self.bias, *factors))


class _Product(torch.autograd.Function):
    """``x W'^T + bias``. W' is formed anew in the backward pass: nothing of the size of a weight is kept between the two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, kind: Kind, scale: float) -> Tensor:  # pyrefly: ignore[bad-override]
        ctx.save_for_backward(x, weight, a, b)
        ctx.kind, ctx.scale = kind, scale
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, changed(weight, a, b, kind, scale).to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyrefly: ignore[bad-override]
        x, weight, a, b = ctx.saved_tensors
        of_x, _, of_bias, *_ = ctx.needs_input_grad
        with torch.autocast(x.device.type, enabled=False):
            dx = dy @ changed(weight, a, b, ctx.kind, ctx.scale).to(dy.dtype) if of_x else None
            rows = dy.flatten(0, -2)
            dw = (rows.t() @ x.flatten(0, -2)).to(weight.dtype)
            dw = dw.masked_fill_(weight == 0, 0.0) if ctx.kind == "mask_lora" else dw.mul_(weight)
            da, db = (b.t() @ dw).mul_(ctx.scale), (dw @ a.t()).mul_(ctx.scale)
        return dx, None, rows.sum(0) if of_bias else None, da, db, None, None


def changed(weight: Tensor, a: Tensor, b: Tensor, kind: Kind, scale: float) -> Tensor:
    """The weight W' that a layer computes with, [out, in]; see the top of this file.

    Args:
        weight: [out, in]
        a: [rank, in]
        b: [out, rank]
    """
    product = b @ a
    if kind == "mask_lora":
        return torch.add(weight, product.masked_fill(weight == 0, 0.0), alpha=scale)
    return torch.addcmul(weight, weight, product, value=scale)  # as a sum: 0 * -1 is -0, and 0 + -0 is +0


def adapt(model: nn.Module, config: Adapters, seed: int) -> None:
    """Freeze what is not to train and give the blocks' linear layers their factors, in place, before the model is compiled or sharded.

    The same on every rank: factors are drawn by `seed` and name. Works on the meta device, for checks.

    Raises:
        ConfigError: a rank above a layer's smaller side, blocks with linear layers of a class of their own, or nothing to train.
    """
    if isinstance(config, AllWeights):
        return
    chosen = {id(parameter) for parameter in _named(model, config.train)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    if isinstance(config, LowRank):
        for name in block_linears(model):
            _attach(model.get_submodule(name.removesuffix(".weight")), name, config, seed)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"Expected parameters to train. Got adapters.train={list(config.train)}, of which {type(model).__name__} has none. "
            "Name others, or use adapters.type=mask_lora."
        )


def is_factor(name: str) -> bool:
    """Whether a parameter is a factor of `adapt`'s, which no exported model has."""
    return name.rpartition(".")[2] in FACTORS


def merge(weights: Mapping[str, Tensor], config: Adapters) -> dict[str, Tensor]:
    """Whole weights by name, factors put into the weights that they change: those of a model without adapters."""
    plain = {name: weight for name, weight in weights.items() if not is_factor(name)}
    if isinstance(config, LowRank):
        for layer in [name.removesuffix(".lora_a") for name in weights if name.endswith(".lora_a")]:
            a, b = (weights[f"{layer}.{factor}"] for factor in FACTORS)
            plain[f"{layer}.weight"] = changed(weights[f"{layer}.weight"], a, b, config.type, config.alpha / config.rank)
    return plain


def needs_no_gradient(names: Sequence[str], trained: Mapping[str, bool]) -> frozenset[str]:
    """Those of the named matrices whose weight-gradient product is left out: frozen ones without factors, which get theirs through it.

    Args:
        trained: of every parameter of the model, by name.
    """
    return frozenset(name for name in names if not trained[name] and f"{name.removesuffix('weight')}lora_a" not in trained)


def _named(model: nn.Module, train: Sequence[Named]) -> list[nn.Parameter]:
    found: list[nn.Parameter] = []
    if "bias" in train:
        found += [parameter for name, parameter in model.named_parameters() if name.rpartition(".")[2] == "bias"]
    if "norm" in train:
        found += [parameter for module in model.modules() if "Norm" in type(module).__name__ for parameter in module.parameters()]
    if "head" in train:
        found += [model.get_output_embeddings().weight]  # pyrefly: ignore[not-callable]
    return found


def _attach(module: nn.Module, name: str, config: LowRank, seed: int) -> None:
    """Turn a layer into an `AdaptedLinear`, in place: its parameters and their names stay as they are."""
    if type(module) is not nn.Linear:
        raise ConfigError(
            f"Expected linear layers of torch's own class for adapters.type={config.type}. Got {name} in a {type(module).__name__}. "
            "Use adapters.type=selective."
        )
    rows, cols = module.weight.shape
    if config.rank > min(rows, cols):
        raise ConfigError(
            f"Expected adapters.rank of at most {min(rows, cols)}, the smaller side of {name} [{rows}, {cols}]. "
            f"Got {config.rank}. Lower it."
        )
    generator = torch.Generator().manual_seed(counter.key(seed, "adapter", name))
    drawn = (2 * torch.rand(config.rank, cols, generator=generator) - 1) / math.sqrt(cols)
    module.__class__ = AdaptedLinear
    layer = cast(AdaptedLinear, module)
    layer.kind, layer.scale = config.type, config.alpha / config.rank
    layer.lora_a = nn.Parameter(drawn.to(layer.weight))
    layer.lora_b = nn.Parameter(layer.weight.new_zeros(rows, config.rank))
