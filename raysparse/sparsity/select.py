"""Exact top-k of tensors whose rows are spread over ranks, by radix selection on 31-bit keys.

Three histograms (11 + 10 + 10 bits, most significant first), one small sum over ranks each for all tensors together, find the
k-th largest key exactly; ties go to the lowest global index. No weight leaves its rank, and the result does not depend on how many
there are. Only the first histogram reads all keys: then those with a larger first digit are chosen, those with the same one are listed,
and the list is all that the other two look at. Keys are made anew for each pass, a piece at a time, and not kept: they never leave the
cache.

Where keys are random numbers, the first digit of the k-th largest is as good as known, and the first histogram counts the list alone.

On CPUs the passes over all keys are native where the library is there, with the same result.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import floor, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from raysparse.kernels import library
from raysparse.kernels import select as native
from raysparse.sparsity.ranks import Ranks

BITS = (11, 10, 10)
FIRST = sum(BITS[1:])
"""Bits below the first digit."""
NONE = 1 << BITS[0]
"""Above every digit: nothing is to be chosen."""
LUCK = 20
"""A guess is wrong with a probability of about e^-20, which costs another pass."""

Keys = Callable[[int], Iterable[Tensor]]
"""Makes the keys of tensor i, in pieces one after the other: [n] int32, of which the lower 31 bits count."""
Listed = tuple[Tensor, Tensor]
"""[m] int64 indices, rising, and [m] int32 keys of the elements of a tensor between which the digits so far do not decide."""
Start = tuple[list[Tensor], list[Listed], Tensor]
"""For each tensor the mask of what is chosen, what is listed, and how many of the latter over all ranks are still to be chosen."""


def top_masks(
    keys: Keys, eligible: Sequence[Tensor], counts: Sequence[int], ranks: Ranks, among: Sequence[int] | None = None
) -> list[Tensor]:
    """For each tensor, True at its ``counts[i]`` largest eligible keys over all ranks.

    Args:
        keys: makes those of this rank's consecutive elements, the same every time; rank order is index order.
        eligible: for each tensor [n] bool: which may be chosen.
        counts: how many to choose of each whole tensor (not per rank), in [0, eligible elements over all ranks].
        ranks: every rank calls with the same counts, in the same order.
        among: how many are eligible over all ranks, where keys are uniformly random and that is known. Nothing but time depends on it.

    Returns:
        For each tensor a [n] bool mask of this rank's elements; over all ranks exactly ``counts[i]`` are True.
    """
    if not counts:
        return []
    left = torch.tensor(counts, dtype=torch.int64)
    found = None if among is None else _by_guess(keys, eligible, counts, among, ranks)
    masks, lists, left = found or _by_count(keys, eligible, left, ranks)
    shift = FIRST
    for bits in BITS[1:]:
        shift -= bits
        above = _suffix_sums([_count_digits(listed, None, shift, bits) for _, listed in lists], ranks)
        digits, left = _last_digits(above, left)
        lists = [
            _refine(mask, index, listed, shift, bits, digit) for mask, (index, listed), digit in zip(masks, lists, digits, strict=True)
        ]
    lower = ranks.sum_lower(torch.tensor([index.numel() for index, _ in lists], dtype=torch.int64))
    for mask, (index, _), room in zip(masks, lists, (left - lower).tolist(), strict=True):
        mask[index[: max(0, room)]] = True  # all that are still listed have the key of the last one chosen
    return masks


def _by_count(keys: Keys, eligible: Sequence[Tensor], left: Tensor, ranks: Ranks) -> Start:
    """By the first digit of all keys."""
    histograms = [_count_first_digits(keys(i), mask) for i, mask in enumerate(eligible)]
    above = _suffix_sums(histograms, ranks)
    for i, (wanted, there) in enumerate(zip(left.tolist(), above[:, 0].tolist(), strict=True)):
        assert 0 <= wanted <= there, f"{wanted} of {there} elements of tensor {i}"
    digits, rest = _last_digits(above, left)
    found = [_choose(keys(i), mask, digits[i], digits[i]) for i, mask in enumerate(eligible)]
    return [mask for mask, _, _ in found], [listed for _, listed, _ in found], rest


def _by_guess(keys: Keys, eligible: Sequence[Tensor], counts: Sequence[int], among: Sequence[int], ranks: Ranks) -> Start | None:
    """The same for random keys: a few first digits are guessed, of which the last chosen key has one; None if one guess was wrong."""
    guesses = [guess(*each) for each in zip(counts, among, strict=True)]
    found, histograms = [], []
    for i, (low, high) in enumerate(guesses):
        mask, (index, listed), num_above = _choose(keys(i), eligible[i], low, high)
        histogram = _count_digits(listed, None, FIRST, BITS[0])
        if high + 1 < NONE:
            histogram[high + 1] = num_above  # above the guess: where, does not matter
        found.append((mask, index, listed))
        histograms.append(histogram)
    digits, left = _last_digits(_suffix_sums(histograms, ranks), torch.tensor(counts, dtype=torch.int64))
    if not all(low <= digit <= high for (low, high), digit in zip(guesses, digits, strict=True)):
        return None
    lists = [_refine(mask, index, listed, FIRST, BITS[0], digit) for (mask, index, listed), digit in zip(found, digits, strict=True)]
    return [mask for mask, _, _ in found], lists, left


def guess(count: int, among: int) -> tuple[int, int]:
    """Between which first digits the `count`-th largest of so many uniformly random keys lies, nearly always."""
    assert 0 <= count <= among, f"{count} of {among}"
    if count == 0:
        return NONE, NONE
    share = 1 - count / among
    error = sqrt(2 * LUCK * share * (1 - share) / among) + LUCK / among
    low, high = (min(NONE - 1, max(0, floor(NONE * at))) for at in (share - error, share + error))
    return low, high


def _suffix_sums(histograms: Sequence[Tensor], ranks: Ranks) -> Tensor:
    """[tensors, size + 2] int64: how many digits over all ranks are >= d; the last two columns are 0."""
    return F.pad(ranks.sum(torch.stack(list(histograms))).flip(1).cumsum(1).flip(1), (0, 2))


def _last_digits(above: Tensor, left: Tensor) -> tuple[list[int], Tensor]:
    """For each tensor the digit of the left-th largest key, and how many of those on it are to be chosen; above all digits for 0 keys."""
    digits = ((above >= left.unsqueeze(1)).sum(1) - 1).clamp(max=above.shape[1] - 2)
    return digits.tolist(), left - above.gather(1, digits.unsqueeze(1) + 1).squeeze(1)


def _is_native(keys: Tensor) -> bool:
    return keys.device.type == "cpu" and library.available()


def _pieces(keys: Iterable[Tensor], eligible: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """Pieces of keys, and where they are."""
    start = 0
    for piece in keys:
        yield piece, slice(start, start + len(piece))
        start += len(piece)
    assert start == len(eligible), f"{start} keys, {len(eligible)} elements"


def _count_first_digits(keys: Iterable[Tensor], eligible: Tensor) -> Tensor:
    total = torch.zeros(NONE, dtype=torch.int64)
    for piece, where in _pieces(keys, eligible):
        total += _count_digits(piece, eligible[where], FIRST, BITS[0])
    return total


def _count_digits(keys: Tensor, eligible: Tensor | None, shift: int, bits: int) -> Tensor:
    """[2^bits] int64 on the CPU: eligible keys by their digit, the `bits` above `shift`."""
    if _is_native(keys):
        return native.count_digits(keys, eligible, shift, bits)
    digits = _digits(keys, shift, bits) + 1
    if eligible is not None:
        digits *= eligible
    return torch.bincount(digits, minlength=(1 << bits) + 1)[1:].cpu()


def _choose(keys: Iterable[Tensor], eligible: Tensor, low: int, high: int) -> tuple[Tensor, Listed, int]:
    """True at eligible keys with a first digit above `high`; those from `low` to `high`; how many are above."""
    mask, num_above = torch.empty_like(eligible), 0
    indices, lists = [torch.empty(0, dtype=torch.int64, device=mask.device)], [torch.empty(0, dtype=torch.int32, device=mask.device)]
    for piece, where in _pieces(keys, eligible):
        if _is_native(piece):
            _, index, listed, above = native.choose(piece, eligible[where], FIRST, low, high, len(piece) // 8, mask[where])
        else:
            digits, here = _digits(piece, FIRST, BITS[0]), eligible[where]
            torch.logical_and(here, digits > high, out=mask[where])
            index = (here & (digits >= low) & (digits <= high)).nonzero().flatten()
            listed, above = piece[index], int(mask[where].sum())
        indices.append(index.add_(where.start))
        lists.append(listed)
        num_above += above
    return mask, (torch.cat(indices), torch.cat(lists)), num_above


def _refine(mask: Tensor, index: Tensor, listed: Tensor, shift: int, bits: int, digit: int) -> Listed:
    """Chooses, in the mask, what is listed with a larger digit; returns what is listed with this one."""
    if _is_native(listed):
        return native.refine(mask, index, listed, shift, bits, digit)
    digits = _digits(listed, shift, bits)
    mask[index[digits > digit]] = True
    return index[digits == digit], listed[digits == digit]


def _digits(keys: Tensor, shift: int, bits: int) -> Tensor:
    return (keys >> shift) & ((1 << bits) - 1)
