"""Attention to some of the earlier keys on CPUs, exact, in time that follows the keys that are seen: one operator for all heads of a layer.

What each head's queries see is data of the operator, not part of a graph: under torch.compile another pattern compiles nothing anew.
float32 and bfloat16 run in the native library (`native/attention.cpp`), other dtypes and machines without it in torch (`blocks.py`).
"""

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from raysparse.kernels import blocks, library
from raysparse.kernels.library import address, check, pointer
from raysparse.kernels.spans import Rule, pieces

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
SHORTEST = 128
"""Positions in a row from which on the native kernel is faster than one dense mask, whatever the rule."""


@torch.library.custom_op("raysparse::attention", mutates_args=(), device_types="cpu")
def attention(query: Tensor, key: Tensor, value: Tensor, rules: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax over the keys that a query sees of ``scale * query . key``, and the mean of their values by it.

    Args:
        query: [batch, heads, length, width].
        key, value: [batch, key heads, length, width]; consecutive query heads share a key head.
        rules: [heads, 4] int64, on the CPU: `spans.Rule` of each head.

    Returns:
        [batch, heads, length, width], and for the backward pass [batch, heads, length] logarithms of the sums of exponentials, in float32
        or, for float64, in float64.
    """
    by_head = _check(query, key, value, rules)
    query, key, value = map(_readable, (query, key, value))
    out, log_sum = _empty(query), _empty_logs(query)
    if _native(query):
        _call("forward", by_head, scale, log_sum, query=query, key=key, value=value, out=out)
        return out, log_sum
    for rule, heads, key_heads in _groups(by_head, key.shape[1]):
        out[:, heads], log_sum[:, heads] = blocks.attend(query[:, heads], key[:, key_heads], value[:, key_heads], rule, scale)
    return out, log_sum


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, rules: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _empty(query), _empty_logs(query)


@torch.library.custom_op("raysparse::attention_backward", mutates_args=(), device_types="cpu")
def attention_backward(
    out_grad: Tensor, query: Tensor, key: Tensor, value: Tensor, rules: Tensor, out: Tensor, log_sum: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    by_head = _check(query, key, value, rules)
    for tensor, like in ((out_grad, query), (out, query), (log_sum, _empty_logs(query))):
        check((tensor.shape, tensor.dtype) == (like.shape, like.dtype), tensor.shape, tensor.dtype, "not", like.shape, like.dtype)
    out_grad, query, key, value, out = map(_readable, (out_grad, query, key, value, out))
    found = _empty(query), _empty(key), _empty(value)
    if _native(query):
        given = {"query": query, "key": key, "value": value, "out": out, "out_grad": out_grad}
        made = dict(zip(("query_grad", "key_grad", "value_grad"), found, strict=True))
        _call("backward", by_head, scale, log_sum, **given, **made)
        return found
    totals = [torch.zeros_like(tensor, dtype=log_sum.dtype) for tensor in found]
    for rule, heads, key_heads in _groups(by_head, key.shape[1]):
        tensors = query[:, heads], key[:, key_heads], value[:, key_heads]
        parts = blocks.gradients(out_grad[:, heads], tensors, out[:, heads], log_sum[:, heads], rule, scale)
        for total, part, where in zip(totals, parts, (heads, key_heads, key_heads), strict=True):
            if isinstance(where, slice):
                total.copy_(part)
            else:
                total.index_add_(1, where, part.to(total.dtype))  # query heads that share a key head add up
    for tensor, total in zip(found, totals, strict=True):
        tensor.copy_(total)
    return found


@attention_backward.register_fake
def _(
    out_grad: Tensor, query: Tensor, key: Tensor, value: Tensor, rules: Tensor, out: Tensor, log_sum: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(query), _empty(key), _empty(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, out_grad: Tensor, _log_sum_grad: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*torch.ops.raysparse.attention_backward(out_grad, *ctx.saved_tensors, ctx.scale), None, None)


attention.register_autograd(_differentiate, setup_context=_save)
torch.library.register_autocast("raysparse::attention", "cpu", torch.bfloat16)


class _Tensor(ctypes.Structure):
    """`Tensor` of native/attention.h."""

    _fields_ = (("start", ctypes.c_void_p), ("batch", ctypes.c_int64), ("head", ctypes.c_int64), ("row", ctypes.c_int64))


class _Piece(ctypes.Structure):
    """`Piece` of native/attention.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("step", "first", "stride")),
        *((name, ctypes.c_void_p) for name in ("low", "high")),
    )


class _Problem(ctypes.Structure):
    """`Problem` of native/attention.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "shared", "length", "width")),
        ("scale", ctypes.c_float),
        *((name, _Tensor) for name in ("query", "key", "value", "out", "out_grad", "query_grad", "key_grad", "value_grad")),
        *((name, ctypes.c_void_p) for name in ("log_sum", "pieces", "ranges")),
    )


def _native(query: Tensor) -> bool:
    return query.dtype in DTYPES and query.shape[2] >= SHORTEST and library.available()


def _call(direction: str, by_head: tuple[Rule, ...], scale: float, log_sum: Tensor, **tensors: Tensor) -> None:
    """The native kernel, on tensors by the names that they have in `_Problem`."""
    query = tensors["query"]
    batch, heads, length, width = query.shape
    table, ranges, _kept = _table(by_head, length)
    problem = _Problem(batch, heads, heads // tensors["key"].shape[1], length, width, scale)
    problem.log_sum, problem.pieces, problem.ranges = pointer(log_sum), ctypes.addressof(table), ranges.data_ptr()
    for name, tensor in tensors.items():
        setattr(problem, name, _Tensor(address(tensor), *tensor.stride()[:3]))
    run = library.function(f"rs_attention_{direction}_{DTYPES[query.dtype]}", None, ctypes.POINTER(_Problem), ctypes.c_int)
    run(ctypes.byref(problem), library.threads())


@lru_cache(maxsize=64)
def _table(by_head: tuple[Rule, ...], length: int) -> tuple[Any, Tensor, list[Tensor]]:
    """The pieces of all rules, [heads, 2] int32 which of them are a head's, and the tensors that the pieces point to."""
    found, first = [], {}
    for rule in dict.fromkeys(by_head):
        first[rule] = len(found), len(found) + len(pieces(rule, length))
        found += pieces(rule, length)
    table = (_Piece * len(found))()
    for entry, piece in zip(table, found, strict=True):
        entry.step, entry.first, entry.stride = piece.step, piece.first, piece.stride
        entry.low, entry.high = piece.low.data_ptr(), piece.high.data_ptr()
    kept = [tensor for piece in found for tensor in (piece.low, piece.high)]
    return table, torch.tensor([first[rule] for rule in by_head], dtype=torch.int32), kept


def _groups(by_head: tuple[Rule, ...], num_key_heads: int) -> list[tuple[Rule, Tensor | slice, Tensor | slice]]:
    """(rule, heads that have it, their key heads); slices, which copy nothing, where that is all and each has its own key head."""
    shared = len(by_head) // num_key_heads
    if shared == 1 and len(set(by_head)) == 1:
        return [(by_head[0], slice(None), slice(None))]
    heads = {rule: torch.tensor([head for head, own in enumerate(by_head) if own == rule]) for rule in dict.fromkeys(by_head)}
    return [(rule, of_rule, of_rule // shared) for rule, of_rule in heads.items()]


def _check(query: Tensor, key: Tensor, value: Tensor, rules: Tensor) -> tuple[Rule, ...]:
    """The rules by head."""
    batch, heads, length, width = query.shape
    check(key.shape == value.shape == (batch, key.shape[1], length, width), f"{query.shape} {key.shape} {value.shape}")
    check(min(heads, key.shape[1], length, width) > 0, query.shape, key.shape)
    check(heads % key.shape[1] == 0, f"{query.shape} {key.shape}")
    check(query.dtype == key.dtype == value.dtype, f"{query.dtype} {key.dtype} {value.dtype}")
    check((rules.shape, rules.dtype) == ((heads, 4), torch.int64), f"{rules.shape} {rules.dtype}")
    return tuple((a, b, c, d) for a, b, c, d in rules.tolist())


def _readable(tensor: Tensor) -> Tensor:
    """Kernels go through batch, heads and positions by their strides, but want the numbers of a position side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _empty(tensor: Tensor) -> Tensor:
    """Of its shape; the heads of a position lie together, as the next layer wants them."""
    batch, heads, length, width = tensor.shape
    return tensor.new_empty(batch, length, heads, width).transpose(1, 2)


def _empty_logs(query: Tensor) -> Tensor:
    return query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
