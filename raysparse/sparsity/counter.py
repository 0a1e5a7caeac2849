"""Counter-based randomness: a number is a function of (seed, update, tensor name, element), never of a rank or a generator.

The mixer is splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) in wrapping int64; on CPUs
it is native where the library is there, with the same bits.
"""

import hashlib

import torch
from torch import Tensor

from raysparse.kernels import library
from raysparse.kernels import random as native

CHUNK = 1 << 20
"""Elements mixed at a time: the int64 temporaries stay in cache."""


def key(*parts: object) -> int:
    """A signed 64-bit key from anything printable; the same in every process and on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def mix(index: Tensor, key: int) -> Tensor:
    """[n] int64 element indices -> [n] int64, every bit random."""
    if _is_native(index.device):
        return native.mix(index.contiguous(), key)
    z = (index + key) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def random_keys(first: int, count: int, key: int, device: torch.device | str = "cpu") -> Tensor:
    """[count] int32 in [0, 2^31) for the elements first, first + 1, ... of a tensor; order-comparable, rarely tied."""
    if _is_native(torch.device(device)):
        return native.random_keys(first, count, key)
    out = torch.empty(count, dtype=torch.int32, device=device)
    for start in range(0, count, CHUNK):
        stop = min(start + CHUNK, count)
        index = torch.arange(first + start, first + stop, dtype=torch.int64, device=device)
        out[start:stop] = _shift(mix(index, key), 33).to(torch.int32)
    return out


def _is_native(device: torch.device) -> bool:
    return device.type == "cpu" and library.available()


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant
