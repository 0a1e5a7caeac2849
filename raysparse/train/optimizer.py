"""AdamW, its learning-rate schedule, and the order of one masked step."""

import importlib.util
import math
import os
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import AdamW, Optimizer

from raysparse.config import Config, ConfigError
from raysparse.kernels import adamw
from raysparse.length import Length
from raysparse.sparsity.agenda import Agenda
from raysparse.sparsity.topology import Topology
from raysparse.train.kernels import why_not
from raysparse.train.shard import Sharded

Moment = Literal["exp_avg", "exp_avg_sq"]
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
    implementation: Literal["auto", "native", "fused", "foreach", "triton"] = "auto"
    """native: raysparse's one-pass kernel for CPUs, element by element: bit-equal however the weights are sharded. fused: torch's
    one-pass kernel; on CPUs its last bit depends on where a shard begins. foreach: torch's, element by element, several times slower
    on CPUs. triton: raysparse's one-pass kernel for GPUs where there are masks, else torch's fused one; it has been tested without a GPU
    only, so auto does not take it. auto: native where it runs, else foreach with run.parity, else fused."""
    state: Literal["auto", "live", "dense"] = "auto"
    """live: moments of live weights alone, of a 75 % sparse weight a quarter, with the same numbers. dense: of all weights. auto: live in
    runs with masks, unless a phase keeps the moments of dead weights (reset_grown_state: false)."""

    def keeps_live(self, agenda: Agenda) -> bool:
        """Whether a run with masks keeps moments of its live weights alone.

        Raises:
            ConfigError: it is to, and has a rule that keeps moments of dead ones.
        """
        if self.state == "live" and agenda.keeps_moments:
            names = ", ".join(span.phase.name for span in agenda.spans if not span.rule.resets_state)
            raise ConfigError(
                "Expected rules that reset the moments of grown weights with optimizer.state=live. Got reset_grown_state: false in "
                f"{names}. Use optimizer.state=auto, or reset_grown_state: true."
            )
        return self.state != "dense" and not agenda.keeps_moments


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


def build_optimizer(sharded: Sharded, config: OptimizerConfig, parity: bool, topology: Topology | None = None) -> Optimizer:
    """AdamW over this rank's rows of what is not frozen, with its state made at once so that a checkpoint can be loaded into it.

    Args:
        topology: to keep moments of live weights alone by.

    Raises:
        ConfigError: the native one is asked for and does not run here.
    """
    parts = [part for part in sharded.parts.values() if part.trained]
    implementation = _implementation(config, parity, [part.local for part in parts])
    common: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if implementation != "native":
        common |= {"fused": implementation in ("fused", "triton"), "foreach": implementation == "foreach"}
    decayed = [part.local for part in parts if len(part.shape) > 1]
    plain = [part.local for part in parts if len(part.shape) <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    ours = {"native": adamw.AdamW, "triton": adamw.TritonAdamW}
    kind = ours.get(implementation, AdamW if topology is None else adamw.TorchAdamW)
    optimizer = sharded.make_optimizer([group | common for group in groups if group["params"]], kind)
    state = state_of(optimizer)
    for name, part in sharded.parts.items():
        if part.mine:
            shape = part.local.shape if topology is None or name not in topology.masks else (topology.live(name).nnz,)
            state[part.local] = {
                "step": torch.zeros((), dtype=torch.float32, device=part.local.device if common.get("fused") else "cpu"),
                **{which: part.local.new_zeros(shape, requires_grad=False) for which in adamw.MOMENTS},
            }
    if topology is not None:
        set_masks(sharded, optimizer, topology)
    return optimizer


def state_of(optimizer: Optimizer) -> dict[Tensor, dict[str, Tensor]]:
    """Parameter -> step, exp_avg, exp_avg_sq; fairscale's OSS keeps them in the optimizer it wraps."""
    return getattr(optimizer, "optim", optimizer).state


def moments(sharded: Sharded, optimizer: Optimizer, which: Moment) -> dict[str, Tensor]:
    """Name -> this rank's rows of a moment, or of its live weights alone [nnz], for the tensors that this rank updates."""
    state = state_of(optimizer)
    return {name: state[part.local][which] for name, part in sharded.parts.items() if part.mine}


def dense_moments(sharded: Sharded, optimizer: Optimizer, which: Moment, topology: Topology) -> dict[str, Tensor]:
    """The same of the sparse weights alone, where moments of all their entries are kept: [rows, cols]."""
    return {name: found for name, found in moments(sharded, optimizer, which).items() if name in topology.masks and found.ndim == 2}


def set_masks(sharded: Sharded, optimizer: Optimizer, topology: Topology) -> bool:
    """Tell the optimizer which weights live: what is dead is 0 after every step to come, and live moments follow. Every change needs
    another call.

    Returns:
        Whether the optimizer was told; torch's with moments of all weights cannot be.
    """
    inner = getattr(optimizer, "optim", optimizer)
    if not isinstance(inner, adamw.Masked):
        return False
    inner.set_masks({sharded.parts[name].local: topology.live(name) for name in topology.masks if sharded.parts[name].mine})
    return True


def _implementation(config: OptimizerConfig, parity: bool, parameters: list[Tensor]) -> str:
    if config.implementation in ("fused", "foreach"):
        return config.implementation
    if config.implementation == "triton":
        if (reason := _why_no_triton(parameters)) is not None:
            raise ConfigError(f"Expected GPUs and Triton for optimizer.implementation=triton. Got {reason}. Use implementation=auto.")
        return "triton"
    shared = why_not()  # first, for all ranks call it
    reason = adamw.why_not(parameters) or shared
    if reason is None:
        return "native"
    if config.implementation == "native":
        raise ConfigError(
            f"Expected an optimizer that runs here. Got optimizer.implementation=native, but {reason}. Use optimizer.implementation=auto."
        )
    return "foreach" if parity else "fused"


def _why_no_triton(parameters: list[Tensor]) -> str | None:
    devices = {parameter.device.type for parameter in parameters}
    if devices != {"cuda"} and os.environ.get("TRITON_INTERPRET") != "1":
        return f"parameters on {', '.join(sorted(devices))}"
    return None if importlib.util.find_spec("triton") else "no package triton"
