"""Retraining a few parameters of a sparse model: biases, norms, and low-rank adapters that keep its mask (PERP, arXiv:2312.15230).

An adapter changes the weight W of a linear layer by two small matrices, A [rank, in] and B [out, rank]; W itself is frozen:

    mask_lora:   W + (alpha / rank) (B A) * (W != 0)        MaskLoRA: masked in training too, not only when it is merged
    scale_lora:  W + (alpha / rank) (B A) * W               after ScaleLoRA, W * (B A)

Both leave every zero a zero, in training and merged, and both begin as W: A is drawn, B is 0. The paper's code begins ScaleLoRA with all
elements of A and B at 1 / sqrt(rank); then all columns of B, and rows of A, have equal gradients and stay equal: the product keeps rank 1.
"""

import math
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from raysparse.config import Config, ConfigError
from raysparse.sparsity import counter

A, B = "adapter_a", "adapter_b"


class AdaptersConfig(Config):
    """Which parameters train, and whether low-rank adapters do."""

    type: Literal["none", "selective", "mask_lora", "scale_lora"] = "none"
    """none: every weight trains. selective: those of `train` alone. mask_lora, scale_lora: these and low-rank adapters of the sparse
    weights (PERP), which keep the mask and are merged into the exported model."""
    rank: int = Field(16, ge=1)
    """Of the adapters."""
    alpha: float = Field(32.0, gt=0)
    """The product counts alpha / rank times."""
    train: tuple[str, ...] = ("*.bias", "*.ln_*", "*norm*")
    """Glob patterns of parameters that train besides the adapters; all others are frozen."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def is_low_rank(self) -> bool:
        return self.type in ("mask_lora", "scale_lora")


class AdaptedLinear(nn.Linear):
    """An `nn.Linear` with a frozen weight and an adapter. Made by `install`."""

    adapter_a: nn.Parameter
    adapter_b: nn.Parameter
    adapters: AdaptersConfig

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        return cast(Tensor, _Product.apply(input.to(dtype), self.weight, self.bias, self.adapter_a, self.adapter_b, self.adapters))


class _Product(torch.autograd.Function):
    """``x W'^T + bias``, W' being the merged weight. The backward pass forms it anew, so nothing of a weight's size is kept till then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, config: AdaptersConfig) -> Tensor:  # pyrefly: ignore[bad-override]
        ctx.save_for_backward(x, weight, a, b)
        ctx.config = config
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, merged(weight, a, b, config).to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyrefly: ignore[bad-override]
        x, weight, a, b = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            dx = dy @ merged(weight, a, b, ctx.config).to(dy.dtype) if ctx.needs_input_grad[0] else None
            rows = dy.flatten(0, -2)
            product = (rows.t() @ x.flatten(0, -2)).to(weight.dtype).mul_(_pattern(weight, ctx.config)).mul_(ctx.config.scale)
            return dx, None, rows.sum(0) if ctx.needs_input_grad[2] else None, b.t() @ product, product @ a.t(), None


def merged(weight: Tensor, a: Tensor, b: Tensor, config: AdaptersConfig) -> Tensor:
    """The weight [out, in] that an adapted layer multiplies by."""
    return weight + config.scale * (b @ a) * _pattern(weight, config)


def _pattern(weight: Tensor, config: AdaptersConfig) -> Tensor:
    """What the product of the adapter is multiplied by, element by element."""
    return weight if config.type == "scale_lora" else weight != 0


def install(model: nn.Module, config: AdaptersConfig, sparse: Collection[str], seed: int) -> None:
    """Freeze what does not train, and give the layers of the sparse weights their adapters.

    A is drawn as LoRA draws it, uniform within 1 / sqrt(in), keyed by (seed, weight); B is 0.

    Args:
        sparse: names of the sparse weights.

    Raises:
        ConfigError: a rank that is no less than the smaller side of a weight, or nothing that trains.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in config.train))
    if config.is_low_rank:
        for name in sparse:
            module = model.get_submodule(name.removesuffix(".weight"))
            assert type(module) is nn.Linear, f"{name} is of a {type(module).__name__}"
            rows, cols = module.weight.shape
            if config.rank >= min(rows, cols):
                raise ConfigError(
                    f"Expected adapters.rank below {min(rows, cols)}: {name} is {rows} x {cols}. Got {config.rank}. Lower it."
                )
            module.__class__ = AdaptedLinear
            adapted = cast(AdaptedLinear, module)
            adapted.weight.requires_grad_(False)
            generator = torch.Generator().manual_seed(counter.key(seed, "adapter", name))
            a, b = (2 * torch.rand(config.rank, cols, generator=generator) - 1) / math.sqrt(cols), torch.zeros(rows, config.rank)
            adapted.adapter_a, adapted.adapter_b, adapted.adapters = nn.Parameter(a), nn.Parameter(b), config
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"Expected parameters that train. Got none that match {', '.join(config.train)}. Widen adapters.train.")


def merge(weights: Mapping[str, Tensor], config: AdaptersConfig) -> dict[str, Tensor]:
    """Whole weights by name, the adapters multiplied into those that they belong to."""
    found = {name: weight for name, weight in weights.items() if not is_adapter(name)}
    for name in [name for name in weights if name.endswith(f".{A}")]:
        layer = name.removesuffix(f".{A}")
        weight = f"{layer}.weight"
        found[weight] = merged(found[weight], weights[name], weights[f"{layer}.{B}"], config) + 0.0  # no -0
    return found


def is_adapter(name: str) -> bool:
    """Whether a parameter is part of an adapter."""
    return name.endswith((f".{A}", f".{B}"))
