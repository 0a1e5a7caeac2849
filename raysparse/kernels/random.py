"""splitmix64 as `raysparse.sparsity.counter` has it, native."""

import ctypes

import torch
from torch import Tensor

from raysparse.kernels import library
from raysparse.kernels.library import check, function, pointer

_pointer, _long, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


def mix(index: Tensor, key: int) -> Tensor:
    """Of [n] int64 and a signed 64-bit key: [n] int64, every bit random."""
    check(index.dtype == torch.int64, index.dtype)
    out = torch.empty_like(index)
    function("rs_mix", None, _pointer, _long, _long, _pointer, _int)(pointer(index), index.numel(), key, pointer(out), library.threads())
    return out


def random_keys(first: int, count: int, key: int) -> Tensor:
    """[count] int32: the upper 31 bits of the numbers of elements first, first + 1, ..."""
    check(count >= 0, count)
    out = torch.empty(count, dtype=torch.int32)
    function("rs_random_keys", None, _long, _long, _long, _pointer, _int)(first, count, key, pointer(out), library.threads())
    return out
