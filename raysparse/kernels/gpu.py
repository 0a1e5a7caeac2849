"""Live elements and AdamW on GPUs, in Triton: what `native/live.cpp` and `native/adamw.cpp` do, from the same bits.

A program takes `BLOCK` consecutive elements of a matrix; its live ones lie together in the packed vector, from a place that is known once
the mask is. Nothing is compiled before the first call on a GPU, and Triton is not imported before it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from raysparse.kernels.adamw import Rates
from raysparse.kernels.library import check
from raysparse.kernels.live import BLOCK, Live


def take(dense: Tensor, live: Live, out: Tensor) -> None:
    """`Live.take`, which has checked its arguments."""
    if live.nnz:
        _launch(_take, dense, (dense, live.bits, live.starts, out), live)


def put(values: Tensor, live: Live, out: Tensor) -> None:
    """`Live.put`, which has checked its arguments."""
    if out.numel():
        _launch(_put, out, (values, live.bits, live.starts, out), live)


def advance(weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, rates: Rates, live: Live) -> None:
    """A step of AdamW in place; dead gradients count as 0, whatever they are, and dead weights become 0 (`native/adamw.cpp`).

    Args:
        weight, gradient: [rows, cols], float32, contiguous.
        exp_avg, exp_avg_sq: of the same shape, or [nnz], of the live weights alone.
    """
    packed = exp_avg.ndim == 1
    for tensor in (weight, gradient, exp_avg, exp_avg_sq):
        check(tensor.dtype == torch.float32 and tensor.is_contiguous(), tensor.dtype, tensor.stride())
    check(gradient.shape == weight.shape == live.shape, tuple(gradient.shape), tuple(weight.shape), live.shape)
    shape = (live.nnz,) if packed else live.shape
    check(exp_avg.shape == exp_avg_sq.shape == shape, tuple(exp_avg.shape), tuple(exp_avg_sq.shape), "for", shape)
    if weight.numel():
        numbers = [getattr(rates, field[0]) for field in Rates._fields_]
        _launch(_adamw, weight, (weight, gradient, exp_avg, exp_avg_sq, live.bits, live.starts, *numbers), live, PACKED=packed)


def _launch(kernel: Any, dense: Tensor, arguments: tuple[Any, ...], live: Live, **constants: bool) -> None:
    """A program for every `BLOCK` elements of `dense`."""
    sizes = dense.numel(), live.shape[1], live.bits.shape[1]
    kernel[(triton.cdiv(dense.numel(), BLOCK),)](*arguments, *sizes, **constants, BLOCK=BLOCK)


@triton.jit
def _places(bits, starts, numel, cols, width, BLOCK: tl.constexpr):
    """Of a program's elements: their indices, whether there are so many, whether they live, and their places among the live ones."""
    number = tl.program_id(0)
    index = number.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < numel
    col = index % cols
    byte = tl.load(bits + (index // cols) * width + col // 8, mask=inside, other=0).to(tl.int32)
    live = inside & (((byte >> (col % 8).to(tl.int32)) & 1) != 0)
    place = tl.load(starts + number) + tl.cumsum(live.to(tl.int32), 0) - 1
    return index, inside, live, place


@triton.jit
def _take(dense, bits, starts, out, numel, cols, width, BLOCK: tl.constexpr):
    index, _, live, place = _places(bits, starts, numel, cols, width, BLOCK)
    tl.store(out + place, tl.load(dense + index, mask=live), mask=live)


@triton.jit
def _put(values, bits, starts, out, numel, cols, width, BLOCK: tl.constexpr):
    index, inside, live, place = _places(bits, starts, numel, cols, width, BLOCK)
    tl.store(out + index, tl.load(values + place, mask=live, other=0.0), mask=inside)


@triton.jit
def _adamw(
    weights, gradients, firsts, seconds, bits, starts, keep, beta1, rest1, beta2, rest2, root_scale, eps, step, numel, cols, width,
    PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index, inside, live, place = _places(bits, starts, numel, cols, width, BLOCK)
    at = place if PACKED else index
    has = live if PACKED else inside
    gradient = tl.load(gradients + index, mask=live, other=0.0)
    weight = tl.load(weights + index, mask=live, other=0.0)
    first = beta1 * tl.load(firsts + at, mask=has, other=0.0) + rest1 * gradient
    second = beta2 * tl.load(seconds + at, mask=has, other=0.0) + rest2 * (gradient * gradient)
    weight = keep * weight - step * (first / (tl.sqrt(second) * root_scale + eps))
    tl.store(firsts + at, first, mask=has)
    tl.store(seconds + at, second, mask=has)
    tl.store(weights + index, tl.where(live, weight, 0.0), mask=inside)
