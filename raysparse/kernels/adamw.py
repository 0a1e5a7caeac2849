"""AdamW in one native pass over each parameter, with a mask of one bit a weight in it if there is one (`native/adamw.cpp`); and with
moments of the live weights alone, natively or by torch.

The native numbers are those of `torch.optim.AdamW` within rounding. They are the same wherever a shard begins and for any number of
threads, and on all instruction sets that multiply and add in one operation.
"""

import ctypes
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw as torch_adamw

from raysparse.kernels import library
from raysparse.kernels.library import check, function, pointer
from raysparse.kernels.live import Live

MOMENTS = ("exp_avg", "exp_avg_sq")

_pointer, _long, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class Rates(ctypes.Structure):
    """What the arithmetic of a step needs: see `Rates.at`."""

    _fields_ = tuple((name, ctypes.c_float) for name in ("keep", "beta1", "rest1", "beta2", "rest2", "root_scale", "eps", "step"))

    @classmethod
    def at(cls, step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> "Rates":
        """Of step number `step`, from 1."""
        check(step >= 1, step)
        size = lr / (1 - betas[0] ** step)
        root_scale = 1 / math.sqrt(1 - betas[1] ** step)
        return cls(1 - lr * weight_decay, betas[0], 1 - betas[0], betas[1], 1 - betas[1], root_scale, eps, size)


def advance(weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, rates: Rates, bits: Tensor | None = None) -> None:
    """A step in place. Dead gradients count as 0, whatever they are, and dead weights become 0; moments of 0 there stay 0.

    Args:
        weight, gradient, exp_avg, exp_avg_sq: of one shape, float32, contiguous.
        bits: [rows, ceil(cols / 8)] uint8 for a weight of [rows, cols]: lowest bit first, every row padded to whole bytes. None: all live.
    """
    _check(weight.shape, weight, gradient, exp_avg, exp_avg_sq)
    tensors = pointer(weight), pointer(gradient), pointer(exp_avg), pointer(exp_avg_sq)
    if bits is None:
        run = function("rs_adamw", None, *[_pointer] * 4, _long, _pointer, _int)
        run(*tensors, weight.numel(), ctypes.addressof(rates), library.threads())
    else:
        _check_bits(bits, weight)
        run = function("rs_adamw_masked", None, *[_pointer] * 5, _long, _long, _pointer, _int)
        run(*tensors, pointer(bits), *weight.shape, ctypes.addressof(rates), library.threads())


def advance_live(weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, rates: Rates, bits: Tensor) -> None:
    """The same step, bit for bit, with moments of the live weights alone.

    Args:
        weight, gradient: [rows, cols], float32, contiguous.
        exp_avg, exp_avg_sq: [nnz], float32, in the order of the live weights, row by row.
        bits: [rows, ceil(cols / 8)] uint8, as above; exactly nnz live.
    """
    _check(weight.shape, weight, gradient)
    _check((exp_avg.numel(),), exp_avg, exp_avg_sq)
    _check_bits(bits, weight)
    run = function("rs_adamw_live", _long, *[_pointer] * 5, *[_long] * 3, _pointer, _int)
    tensors = pointer(weight), pointer(gradient), pointer(exp_avg), pointer(exp_avg_sq), pointer(bits)
    num_live = run(*tensors, *weight.shape, exp_avg.numel(), ctypes.addressof(rates), library.threads())
    check(num_live == exp_avg.numel(), f"{num_live} live weights, {exp_avg.numel()} moments")


def why_not(parameters: Iterable[Tensor]) -> str | None:
    """Why these cannot be stepped natively; None where they can."""
    parameters = list(parameters)
    if (reason := library.why_not()) is not None:
        return f"there is no native library: {reason}"
    kinds = {(p.device.type, str(p.dtype).removeprefix("torch.")) for p in parameters} - {("cpu", "float32")}
    if any(not p.is_contiguous() for p in parameters):
        return "it steps contiguous parameters"
    return f"it steps float32 on CPUs, not {' or '.join(f'{dtype} on {device}' for device, dtype in sorted(kinds))}" if kinds else None


class Masked(Optimizer):
    """An AdamW that can be told which weights live.

    A parameter of [rows, cols] whose moments are [nnz] has them for its live weights alone, row by row. They follow the masks: what dies
    loses its moments, what grows has moments of 0.
    """

    def __init__(self, *args: Any, **settings: Any):
        self._live: dict[Tensor, Live] = {}
        super().__init__(*args, **settings)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, which has no masks until it is told; and of ``load_state_dict``, which leaves them."""
        super().__setstate__(state)
        self.__dict__.setdefault("_live", {})

    def set_masks(self, masks: Mapping[Tensor, Live]) -> None:
        """From now on only these weights of these parameters live; the others' are all live. They are not part of the state."""
        for parameter, live in masks.items():
            check(live.shape == tuple(parameter.shape), live.shape, "for", tuple(parameter.shape))
            before = self._live.get(parameter)
            if before is not None and before is not live and self._packed(parameter):
                for which in MOMENTS:
                    self.state[parameter][which] = live.take(before.put(self.state[parameter][which]))
        self._live = dict(masks)

    def _packed(self, parameter: Tensor) -> bool:
        """Whether its moments are those of its live weights alone."""
        moments = self.state[parameter].get(MOMENTS[0])
        return parameter in self._live and moments is not None and moments.ndim == 1


class AdamW(Masked):
    """`torch.optim.AdamW`, with the same parameter groups and state, for contiguous float32 parameters on CPUs."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyrefly: ignore[bad-override]
        """Steps every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                rates = Rates.at(int(state["step"]) + 1, group["lr"], group["betas"], group["eps"], group["weight_decay"])
                tensors = parameter, parameter.grad.contiguous(), state["exp_avg"], state["exp_avg_sq"]
                bits = self._live[parameter].bits if parameter in self._live else None
                if bits is not None and self._packed(parameter):
                    advance_live(*tensors, rates, bits)
                else:
                    advance(*tensors, rates, bits)
                state["step"] += 1
        return loss


class TorchAdamW(Masked, torch.optim.AdamW):
    """torch's AdamW on every device, of its live weights alone for a parameter that has masks: they are taken out, stepped, put back."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        masked = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and self._is_own(parameter):
                    self._step_live(parameter, group)
                    masked.append((parameter, parameter.grad))
                    parameter.grad = None  # the others are torch's business
        super().step()
        for parameter, gradient in masked:
            parameter.grad = gradient
        return loss

    def _is_own(self, parameter: Tensor) -> bool:
        """Whether `_step_live` steps it, not torch."""
        return self._packed(parameter)

    def _step_live(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        live, state = self._live[parameter], self.state[parameter]
        weights, gradients = live.take(parameter), live.take(parameter.grad.contiguous())  # pyrefly: ignore[missing-attribute]
        beta1, beta2 = group["betas"]
        settings = {name: group[name] for name in ("lr", "eps", "weight_decay", "foreach", "fused", "amsgrad", "maximize")}
        first, second = [state["exp_avg"]], [state["exp_avg_sq"]]
        torch_adamw([weights], [gradients], first, second, [], [state["step"]], beta1=beta1, beta2=beta2, **settings)
        live.put(weights, parameter)


class TritonAdamW(TorchAdamW):
    """torch's AdamW on GPUs, and one Triton pass over each parameter that has a mask, whether or not its moments are of live weights
    alone (`kernels.gpu`). The ``step`` of those lies on the CPU."""

    def set_masks(self, masks: Mapping[Tensor, Live]) -> None:
        super().set_masks(masks)
        for parameter in masks:
            if state := self.state[parameter]:
                state["step"] = state["step"].cpu()  # read in every step

    def _is_own(self, parameter: Tensor) -> bool:
        return parameter in self._live

    def _step_live(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        from raysparse.kernels.gpu import advance

        state = self.state[parameter]
        rates = Rates.at(int(state["step"]) + 1, group["lr"], group["betas"], group["eps"], group["weight_decay"])
        gradient = parameter.grad.contiguous()  # pyrefly: ignore[missing-attribute]
        advance(parameter, gradient, state["exp_avg"], state["exp_avg_sq"], rates, self._live[parameter])
        state["step"] += 1


def _check(shape: tuple[int, ...], *tensors: Tensor) -> None:
    for tensor in tensors:
        check(tensor.dtype == torch.float32, tensor.dtype)
        check(tensor.shape == shape, f"{tuple(tensor.shape)}, not {tuple(shape)}")
        check(tensor.layout == torch.strided, tensor.layout)


def _check_bits(bits: Tensor, weight: Tensor) -> None:
    check(bits.dtype == torch.uint8, bits.dtype)
    check(weight.ndim == 2, weight.shape)
    check(bits.shape == (weight.shape[0], -(-weight.shape[1] // 8)), f"{tuple(bits.shape)} for {tuple(weight.shape)}")
