"""Retraining a few parameters of a sparse model: biases, norms, and low-rank adapters that keep its mask (PERP, arXiv:2312.15230).

An adapter changes the weight W of a linear layer by two small matrices, A [rank, in] and B [out, rank]; W itself is frozen:

    mask_lora:   W + (alpha / rank) (B A) * (W != 0)
    scale_lora:  W * (B A)

Both leave every zero a zero, in training and merged, and both begin as W.
"""

import math
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Literal, cast

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
    """mask_lora adds alpha / rank times the product."""
    train: tuple[str, ...] = ("*.bias", "*.ln_*", "*norm*")
    """Glob patterns of parameters that train besides the adapters; all others are frozen."""

    @property
    def is_low_rank(self) -> bool:
        return self.type in ("mask_lora", "scale_lora")


class AdaptedLinear(nn.Linear):
    """An `nn.Linear` with a frozen weight and an adapter. Made by `install`."""

    adapter_a: nn.Parameter
    adapter_b: nn.Parameter
    adapters: AdaptersConfig

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, merged(self.weight, self.adapter_a, self.adapter_b, self.adapters), self.bias)


def merged(weight: Tensor, a: Tensor, b: Tensor, config: AdaptersConfig) -> Tensor:
    """The weight [out, in] that an adapted layer multiplies by."""
    product = b @ a
    if config.type == "scale_lora":
        return weight * product
    return weight + (config.alpha / config.rank) * (product * (weight != 0))


def install(model: nn.Module, config: AdaptersConfig, sparse: Collection[str], seed: int) -> None:
    """Freeze what does not train, and give the layers of the sparse weights their adapters.

    A of mask_lora is drawn as LoRA draws it, uniform within 1 / sqrt(in), keyed by (seed, weight), and B is 0; the elements of both of
    scale_lora are 1 / sqrt(rank).

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
            if config.type == "mask_lora":
                generator = torch.Generator().manual_seed(counter.key(seed, "adapter", name))
                a, b = (2 * torch.rand(config.rank, cols, generator=generator) - 1) / math.sqrt(cols), torch.zeros(rows, config.rank)
            else:
                a, b = (torch.full(shape, 1 / math.sqrt(config.rank)) for shape in ((config.rank, cols), (rows, config.rank)))
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
