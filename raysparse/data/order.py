"""Which sample is row r of step s: a keyed permutation per epoch, computed, never stored.

The n-th sample since the start of a run is place ``n mod size`` of epoch ``n div size``, and each epoch has a permutation of its
own. Nothing is drawn from a generator: resuming needs the step alone, and any number of ranks sees the same order.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_NUM_ROUNDS = 6


def shuffled(step: int, rows: Sequence[int], sequences: int, size: int, seed: int) -> Ints:
    """Sample indices in [0, size) of `rows` of the global batch of `step`, `sequences` rows long; every epoch sees each once."""
    assert size > 0
    number = step * sequences + np.asarray(rows, dtype=np.int64)
    return permute(number % size, number // size, size, seed)


def spread(rows: Sequence[int], sequences: int, size: int) -> Ints:
    """`sequences` of the [0, size) sample indices, evenly spread over them, those of `rows`: what validation reads every time."""
    assert 0 < sequences <= size
    return np.asarray(rows, dtype=np.int64) * size // sequences


def permute(place: Ints, epoch: Ints, size: int, seed: int) -> Ints:
    """Where the permutation of [0, size) keyed by (seed, epoch) sends each place; `place` and `epoch` are [n].

    A Feistel network is a bijection of [0, 4^h) for any round function (Luby and Rackoff 1988); values that fall outside
    [0, size) are sent through it again until they fall inside (cycle walking, Black and Rogaway 2002), which keeps it a
    bijection of [0, size).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    key = _mix(_mix(epoch.astype(np.uint64)) + np.full(len(epoch), seed % 2**64, dtype=np.uint64))
    value = _feistel(place.astype(np.uint64), key, half)
    while (outside := value >= size).any():
        value[outside] = _feistel(value[outside], key[outside], half)
    return value.astype(np.int64)


def _feistel(value: NDArray[np.uint64], key: NDArray[np.uint64], half: np.uint64) -> NDArray[np.uint64]:
    low_bits = np.uint64((1 << int(half)) - 1)
    left, right = value >> half, value & low_bits
    for number in range(_NUM_ROUNDS):
        left, right = right, left ^ (_mix(right + key + np.uint64(number << 56)) & low_bits)
    return (left << half) | right


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014): a good hash of 64 bits; arithmetic is modulo 2^64."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
