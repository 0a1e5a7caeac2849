"""The three products of a block-sparse linear layer in Triton: y = x W^T + b, dx = dy W and dW = dy^T x at the live blocks.

W lies dense, [out, in], its dead blocks zero; a program computes one tile of the result and walks the live blocks of its row (of its
column, for dx) by a table. So a new mask is another table: nothing is repacked and nothing compiled anew. Sums are float32.

The interpreter multiplies the bits of bfloat16 instead of its values, and rounds to it by cutting: with SOFT it is told how.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from raysparse.kernels.tiles import is_exact


def _configs(*choices: tuple[int, int, int]) -> list[triton.Config]:
    """(rows or tokens of a tile, warps, stages) each. A load of an index within a loop costs the pipeline a stage, hence many."""
    return [triton.Config({"BM": tall}, num_warps=warps, num_stages=stages) for tall, warps, stages in choices]


ALONG = {
    torch.bfloat16: _configs((64, 4, 4), (128, 4, 5), (128, 8, 4), (128, 8, 7), (256, 8, 5)),
    torch.float32: _configs((32, 8, 3), (64, 8, 3), (128, 8, 3)),
}
"""Of y and dx; BM: tokens of a tile."""
STEP = {torch.bfloat16: 64, torch.float32: 32}
"""Columns of a block that a step of theirs takes."""
ACROSS = {
    torch.bfloat16: _configs((32, 4, 4), (64, 4, 4), (64, 8, 4), (128, 8, 3)),
    torch.float32: _configs((32, 8, 2), (16, 16, 3)),
}
"""Of dW; BM: tokens of a step. Tiles that were tried and spill registers are not here (`tests/kernels/triton_cases.py`)."""


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor, cols: Tensor, size: int) -> Tensor:
    """``x W^T + bias``.

    Args:
        x: [tokens, in], contiguous, float32 or bfloat16.
        weight: [out, in], contiguous, of the same.
        bias: [out].
        first: [out / size + 1] int32: row of blocks r has the live ones ``cols[first[r] : first[r + 1]]``.
        cols: [live blocks] int32, columns of blocks, rising in a row.

    Returns:
        [tokens, out].
    """
    return _multiplied(x, weight, weight.shape, (weight.shape[1], 1), bias, first, cols, size)


def backward(dy: Tensor, weight: Tensor, first: Tensor, rows: Tensor, size: int) -> Tensor:
    """``dy W``.

    Args:
        dy: [tokens, out].
        first, rows: as for `forward`, of the transposed weight: column of blocks c has the live ones ``rows[first[c] : first[c + 1]]``.

    Returns:
        [tokens, in].
    """
    return _multiplied(dy, weight, weight.shape[::-1], (1, weight.shape[1]), None, first, rows, size)


def gradient(dy: Tensor, x: Tensor, rows: Tensor, cols: Tensor, size: int) -> Tensor:
    """``dy^T x`` at the live blocks, 0 elsewhere.

    Args:
        rows, cols: [live blocks] int32, of each block.

    Returns:
        [out, in].
    """
    tokens, out, into = dy.shape[0], dy.shape[1], x.shape[1]
    dw = x.new_zeros(out, into)
    if rows.numel():
        arguments = dy, x, rows, cols, dw, tokens, out, into, *_near(tokens, len(rows))
        _run(_across, (len(rows),), arguments, B=size, **_how(x))
    return dw


def _multiplied(
    x: Tensor, weight: Tensor, shape: Sequence[int], strides: tuple[int, int], bias: Tensor | None, first: Tensor, others: Tensor, size: int
) -> Tensor:
    """x times the transpose of the weight, seen with this shape and these strides."""
    tokens, width = x.shape
    y = x.new_empty(tokens, shape[0])

    def grid(meta: Any) -> tuple[int]:
        return (triton.cdiv(tokens, meta["BM"]) * (shape[0] // size),)

    if y.numel():
        pointers = x, weight, y if bias is None else bias, first, others, y  # without a bias any pointer: it is not read
        sizes = tokens, width, shape[0], shape[0] // size, *strides, *_near(tokens, len(others))
        constants = {"B": size, "STEP": min(STEP[x.dtype], size), "GROUP": 8, "BIAS": bias is not None}
        _run(_along, grid, (*pointers, *sizes), **constants, **_how(x))
    return y


def _near(tokens: int, live: int) -> tuple[int, int]:
    """What a choice of tile is looked up by: numbers of tokens and of live blocks, to a power of 2."""
    return 1 << max(0, tokens - 1).bit_length(), 1 << max(0, live - 1).bit_length()


def _how(like: Tensor) -> dict[str, Any]:
    return {"PRECISION": "ieee" if is_exact(like.dtype) else "tf32", "SOFT": like.device.type == "cpu"}


@triton.jit
def _product(a, b, total, PRECISION: tl.constexpr, SOFT: tl.constexpr):
    if SOFT:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _rounded(total, like, SOFT: tl.constexpr):
    """float32 to the type of what `like` points to, the nearest, of two the even one."""
    if SOFT and like.dtype.element_ty == tl.bfloat16:
        bits = total.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return total.to(like.dtype.element_ty)


@triton.jit(do_not_specialize=["tokens", "strips", "near_tokens", "near_live"])
def _along(
    x, weight, bias, first, others, y, tokens, width, result_width, strips, by_strip, by_other, near_tokens, near_live,
    BM: tl.constexpr, B: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """A tile [BM, B] of y, of one strip of blocks: the sum over its live blocks of x's columns of it times the block.

    by_strip, by_other: strides of the weight along y's columns and along x's. Programs that share x's rows run together, GROUP of them.
    """
    number = tl.program_id(0)
    high = tl.cdiv(tokens, BM)
    span = GROUP * strips
    top = (number // span) * GROUP
    tall = min(high - top, GROUP)
    row = ((top + (number % span) % tall) * BM + tl.arange(0, BM)).to(tl.int64)
    strip = (number % span) // tall
    col = strip * B + tl.arange(0, B)
    step = tl.arange(0, STEP)
    inside = row[:, None] < tokens
    total = tl.zeros((BM, B), dtype=tl.float32)
    start = tl.load(first + strip)
    stop = tl.load(first + strip + 1)
    parts: tl.constexpr = B // STEP
    for part in range((stop - start) * parts):
        other = tl.load(others + start + part // parts) * B + (part % parts) * STEP + step  # pyrefly: ignore[unsupported-operation]
        a = tl.load(x + row[:, None] * width + other[None, :], mask=inside, other=0.0)
        b = tl.load(weight + col[None, :].to(tl.int64) * by_strip + other[:, None].to(tl.int64) * by_other)
        total = _product(a, b, total, PRECISION, SOFT)
    if BIAS:
        total += tl.load(bias + col).to(tl.float32)[None, :]
    tl.store(y + row[:, None] * result_width + col[None, :], _rounded(total, y, SOFT), mask=inside)


@triton.jit(do_not_specialize=["tokens", "near_tokens", "near_live"])
def _across(
    dy, x, rows, cols, dw, tokens, out, into, near_tokens, near_live,
    BM: tl.constexpr, B: tl.constexpr, PRECISION: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """One live block [B, B] of dW: the sum over tokens."""
    number = tl.program_id(0)
    row = tl.load(rows + number) * B + tl.arange(0, B)
    col = tl.load(cols + number) * B + tl.arange(0, B)
    total = tl.zeros((B, B), dtype=tl.float32)
    for begin in range(0, tokens, BM):
        token = (begin + tl.arange(0, BM)).to(tl.int64)
        a = tl.load(dy + token[None, :] * out + row[:, None], mask=token[None, :] < tokens, other=0.0)
        b = tl.load(x + token[:, None] * into + col[None, :], mask=token[:, None] < tokens, other=0.0)
        total = _product(a, b, total, PRECISION, SOFT)
    tl.store(dw + row[:, None].to(tl.int64) * into + col[None, :], _rounded(total, dw, SOFT))


KEY = {
    _along: ["width", "result_width", "by_other", "near_tokens", "near_live", "B"],
    _across: ["out", "into", "near_tokens", "near_live", "B"],
}
"""What the fastest tile depends on, beside the types. It is measured once for each and kept in Triton's cache on disk."""


CONFIGS = {_along: ALONG, _across: ACROSS}


@cache
def _tuned(kernel: Any, dtype: torch.dtype) -> Any:
    return triton.autotune(CONFIGS[kernel][dtype], KEY[kernel], cache_results=True)(kernel)


def _run(kernel: Any, grid: Any, arguments: tuple[Any, ...], **constants: Any) -> None:
    dtype = arguments[0].dtype
    if arguments[0].is_cuda:
        _tuned(kernel, dtype)[grid](*arguments, **constants)
    else:  # interpreted
        kernel[grid](*arguments, **constants, **CONFIGS[kernel][dtype][0].kwargs)
