"""The passes over keys that an exact selection makes (`raysparse.sparsity.select`), native.

A key is the lower 31 bits of an int32; the sign bit is not looked at. Keys lie on the CPU, flat and contiguous.
"""

import ctypes

import torch
from torch import Tensor

from raysparse.kernels import library
from raysparse.kernels.library import check, function, pointer

MAX_BITS = 11
"""Of a digit."""

_pointer, _long, _int, _digit = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_uint32


def count_digits(keys: Tensor, eligible: Tensor | None, shift: int, bits: int) -> Tensor:
    """[2^bits] int64: how many eligible keys have which digit, the `bits` above `shift`.

    Args:
        keys: [n] int32.
        eligible: [n] bool; None: all.
    """
    _check(keys, eligible)
    check(0 < bits <= MAX_BITS, bits)
    check(0 <= shift <= 31 - bits, shift)
    counts = torch.empty(1 << bits, dtype=torch.int64)
    run = function("rs_count_digits", None, _pointer, _pointer, _long, _int, _int, _pointer, _int)
    run(pointer(keys), pointer(eligible), keys.numel(), shift, bits, pointer(counts), library.threads())
    return counts


def choose(
    keys: Tensor, eligible: Tensor, shift: int, low: int, high: int, room: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Chooses the eligible keys with ``key >> shift > high`` and lists those in [low, high].

    Args:
        keys: [n] int32.
        eligible: [n] bool.
        room: how many are likely to be listed; one too many costs a second pass.
        mask: [n] bool, overwritten and returned; None: a new one.

    Returns:
        [n] bool; [listed] int64 indices, rising, and [listed] int32 keys; how many were chosen.
    """
    _check(keys, eligible)
    check(0 <= shift < 31, shift)
    check(0 <= low <= high <= 1 << 31, (low, high))
    mask = torch.empty_like(eligible) if mask is None else mask
    _check(keys, mask)
    chosen = torch.empty(1, dtype=torch.int64)
    run = function("rs_choose", _long, *[_pointer] * 2, _long, _int, _digit, _digit, *[_pointer] * 4, _long, _int)
    index, listed = torch.empty(room, dtype=torch.int64), torch.empty(room, dtype=torch.int32)
    where = pointer(keys), pointer(eligible), keys.numel(), shift, low, high, pointer(mask), pointer(chosen)
    length = run(*where, pointer(index), pointer(listed), room, library.threads())
    if length > room:
        index, listed = torch.empty(length, dtype=torch.int64), torch.empty(length, dtype=torch.int32)
        again = run(*where, pointer(index), pointer(listed), length, library.threads())
        assert again == length
    return mask, index[:length], listed[:length], int(chosen)


def refine(mask: Tensor, index: Tensor, listed: Tensor, shift: int, bits: int, digit: int) -> tuple[Tensor, Tensor]:
    """Chooses the listed elements whose digit is above `digit`, in the mask, in place; returns the list of those on it.

    Args:
        mask: [n] bool.
        index, listed: [m], as `choose` made them; overwritten.
    """
    _check(listed, None)
    check(mask.dtype == torch.bool, mask.dtype)
    check(index.dtype == torch.int64, index.dtype)
    check(index.shape == listed.shape, f"{index.shape} {listed.shape}")
    check(0 < bits <= MAX_BITS, bits)
    check(0 <= shift <= 31 - bits, shift)
    run = function("rs_refine", _long, _pointer, _pointer, _long, _int, _int, _digit, _pointer, _long)
    kept = run(pointer(index), pointer(listed), index.numel(), shift, bits, digit, pointer(mask), mask.numel())
    return index[:kept], listed[:kept]


def _check(keys: Tensor, eligible: Tensor | None) -> None:
    check(keys.dtype == torch.int32, keys.dtype)
    check(keys.ndim == 1, keys.shape)
    if eligible is not None:
        check(eligible.dtype == torch.bool, eligible.dtype)
        check(eligible.shape == keys.shape, f"{eligible.shape} {keys.shape}")
