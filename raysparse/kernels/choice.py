"""Sparse or dense, product by product: measured on this machine, at the size and sparsity of the layer."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from raysparse.kernels import library
from raysparse.kernels.bits import kill, unpack
from raysparse.kernels.linear import Products, skipping
from raysparse.kernels.stream import DTYPES, Use

ROUNDS = 5
"""Times that each candidate runs; the fastest counts, for what disturbs a measurement only ever makes it slower."""
LONGEST = {"cpu": 1024, "cuda": 65536}
"""Tokens to measure with at most."""
MARGIN = 1.05
"""A sparse product is chosen where it is this many times faster than the dense one."""


@dataclass(frozen=True)
class Gains:
    """Dense time over sparse time of each product of a layer; above 1 the zeros pay."""

    forward: float
    backward: float
    gradient: float

    @property
    def products(self) -> Products:
        return Products(self.forward >= MARGIN, self.backward >= MARGIN, self.gradient >= MARGIN)


def case(bits: Tensor, cols: int, nnz: int, dtype: torch.dtype, tokens: int, block: int | None = None) -> str:
    """Names what a measurement depends on; layers of one name are measured once. Sparsity counts in steps of 5 %."""
    rows, percent = bits.shape[0], 5 * round(20 * (1 - nnz / max(1, bits.shape[0] * cols)))
    cuda = bits.is_cuda
    machine = torch.cuda.get_device_name(bits.device) if cuda else f"{library.variant()}, threads {torch.get_num_threads()}"
    grain = "" if block is None else f" in blocks of {block}"
    return f"{rows}x{cols} at {percent} %{grain}, {tokens} tokens, {DTYPES[dtype]}, {machine}"


def measure(bits: Tensor, cols: int, dtype: torch.dtype, tokens: int, block: int | None = None) -> Gains:
    """Time the three products of one layer, dense and sparse in turn.

    Sparse times include reading the live values out of the dense weight, and the sparse gradient is written as a dense tensor; dense
    times include zeroing the dead gradients.

    Args:
        bits: [out, ceil(cols / 8)] uint8, the mask, on the device to measure.
        tokens: rows of the activations.
        block: see `raysparse.kernels.linear.skipping`.
    """
    device = bits.device
    rows, tokens = bits.shape[0], max(1, min(tokens, LONGEST[device.type]))
    generator, shapes = torch.Generator(device).manual_seed(0), ((rows, cols), (tokens, cols), (tokens, rows))
    weight, x, dy = (torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes)
    streams, mask = {use: skipping(bits, cols, dtype, use, block) for use in Use}, unpack(bits, cols)

    def multiply(use: Use, activations: Tensor) -> Tensor:
        streams[use].load(weight)
        return streams[use].multiply(activations)

    return Gains(
        forward=_gain(lambda: F.linear(x, weight), lambda: multiply(Use.FORWARD, x)),
        backward=_gain(lambda: dy @ weight, lambda: multiply(Use.BACKWARD, dy)),
        gradient=_gain(lambda: kill(dy.t() @ x, mask), lambda: streams[Use.GRADIENT].gradient(x, dy)),
    )


def _gain(dense: Callable[[], Tensor], sparse: Callable[[], Tensor]) -> float:
    best = {dense: float("inf"), sparse: float("inf")}
    for _ in range(1 + ROUNDS):  # one to warm up counts too: it is never the fastest
        for run in best:
            began = time.perf_counter()
            run()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            best[run] = min(best[run], time.perf_counter() - began)
    return best[dense] / best[sparse]
