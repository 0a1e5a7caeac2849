"""AdamW, its learning-rate schedule, and the order of one masked step."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import AdamW, Optimizer

from raysparse.config import Config, ConfigError
from raysparse.kernels import adamw
from raysparse.kernels.bits import pack
from raysparse.length import Length
from raysparse.train.kernels import why_not
from raysparse.train.shard import Sharded

Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Config):
    """AdamW (Loshchilov & Hutter 2019). Matrices and embeddings decay; norms and biases do not."""

    lr: float = Field(6e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay rates of the two moments."""
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled decay of matrices and embeddings; a dead weight is 0 and stays 0."""
    clip_norm: float = Field(1.0, gt=0)
    """Limit of the global gradient norm, counted over live gradients only."""
    implementation: Literal["auto", "native", "fused", "foreach"] = "auto"
    """native: raysparse's one-pass kernel for CPUs, element by element: bit-equal however the weights are sharded. fused: torch's
    one-pass kernel; on CPUs its last bit depends on where a shard begins. foreach: torch's, element by element, several times slower
    on CPUs. auto: native where it runs, else foreach with run.parity, else fused."""


class ScheduleConfig(Config):
    """Learning rate over the run: linear warm-up to the peak, then cosine or linear decay to `final` x peak."""

    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: Length = "0 steps"
    """Linear from 0: '375M tokens', '500 steps', '10 %' of the run."""
    final: float = Field(0.1, ge=0, le=1)
    """Learning rate at the end, as a share of the peak."""

    def factor(self, step: int, warmup: int, steps: int) -> float:
        """Share of the peak in optimizer step `step` (0-based) of `steps`."""
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        if self.decay == "constant":
            return 1.0
        fall = (1 + math.cos(math.pi * progress)) / 2 if self.decay == "cosine" else 1 - progress
        return self.final + (1 - self.final) * fall


def build_optimizer(sharded: Sharded, config: OptimizerConfig, parity: bool) -> Optimizer:
    """AdamW over this rank's rows, with its state made at once so that a checkpoint can be loaded into it.

    Raises:
        ConfigError: the native one is asked for and does not run here.
    """
    parts = sharded.parts.values()
    implementation = _implementation(config, parity, [part.local for part in parts])
    common: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if implementation != "native":
        common |= {"fused": implementation == "fused", "foreach": implementation == "foreach"}
    decayed = [part.local for part in parts if len(part.shape) > 1]
    plain = [part.local for part in parts if len(part.shape) <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    kind = adamw.AdamW if implementation == "native" else AdamW
    optimizer = sharded.make_optimizer([group | common for group in groups if group["params"]], kind)
    state = state_of(optimizer)
    for part in parts:
        if part.mine:
            state[part.local] = {
                "step": torch.zeros((), dtype=torch.float32, device=part.local.device if implementation == "fused" else "cpu"),
                "exp_avg": torch.zeros_like(part.local, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(part.local, requires_grad=False),
            }
    return optimizer


def state_of(optimizer: Optimizer) -> dict[Tensor, dict[str, Tensor]]:
    """Parameter -> step, exp_avg, exp_avg_sq; fairscale's OSS keeps them in the optimizer it wraps."""
    return getattr(optimizer, "optim", optimizer).state


def moments(sharded: Sharded, optimizer: Optimizer, which: Literal["exp_avg", "exp_avg_sq"]) -> dict[str, Tensor]:
    """Name -> this rank's rows of a moment, for the tensors that this rank updates."""
    state = state_of(optimizer)
    return {name: state[part.local][which] for name, part in sharded.parts.items() if part.mine}


def set_masks(sharded: Sharded, optimizer: Optimizer, masks: Mapping[str, Tensor]) -> bool:
    """Tell the native AdamW which weights live: what is dead is 0 after every step to come, whatever its moments. Torch's cannot be told.

    Args:
        masks: name -> [rows, cols] bool, this rank's rows; weights without one are all live. Every change needs another call.

    Returns:
        Whether the optimizer was told.
    """
    inner = getattr(optimizer, "optim", optimizer)
    if not isinstance(inner, adamw.AdamW):
        return False
    inner.set_masks({sharded.parts[name].local: pack(mask) for name, mask in masks.items() if sharded.parts[name].mine})
    return True


def _implementation(config: OptimizerConfig, parity: bool, parameters: list[Tensor]) -> str:
    if config.implementation in ("fused", "foreach"):
        return config.implementation
    shared = why_not()  # first, for all ranks call it
    reason = adamw.why_not(parameters) or shared
    if reason is None:
        return "native"
    if config.implementation == "native":
        raise ConfigError(
            f"Expected an optimizer that runs here. Got optimizer.implementation=native, but {reason}. Use optimizer.implementation=auto."
        )
    return "foreach" if parity else "fused"
