"""Exact top-k of tensors whose rows are spread over ranks, by radix selection on 31-bit keys.

Three histogram passes (11 + 10 + 10 bits, most significant first), one small sum over ranks each for all tensors together,
find the k-th largest key exactly; ties go to the lowest global index. No weight leaves its rank, and the result does not
depend on how many ranks there are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from raysparse.sparsity.ranks import Ranks

BITS = (11, 10, 10)


def top_masks(keys: Sequence[Tensor], counts: Sequence[int], ranks: Ranks) -> list[Tensor]:
    """For each tensor, True at its ``counts[i]`` largest keys over all ranks.

    Args:
        keys: for each tensor, this rank's consecutive elements, flat int32 in [0, 2^31), or -1: not to be chosen. Rank order is
            index order.
        counts: how many to choose of each whole tensor (not per rank), in [0, eligible elements over all ranks].
        ranks: every rank calls with the same counts, in the same order.

    Returns:
        For each tensor a flat bool mask of this rank's elements; over all ranks exactly ``counts[i]`` are True.
    """
    left = list(counts)  # how many are still to be found among the candidates
    threshold = [0] * len(keys)
    candidates = list(keys)
    shift = sum(BITS)
    for bits in BITS:
        shift -= bits
        digits = [candidate >> shift for candidate in candidates]
        above = _suffix_sums(digits, 1 << bits, ranks)
        for i, digit in enumerate(digits):
            assert 0 <= left[i] <= above[i, 0], f"{left[i]} of {int(above[i, 0])} elements of tensor {i}"
            if left[i] == 0:
                threshold[i] = (threshold[i] << bits) | ((1 << bits) - 1)
                candidates[i] = candidates[i][:0]
                continue
            # The largest digit d with count(digit >= d) >= left: the k-th largest key starts with it.
            d = int((above[i] >= left[i]).sum()) - 1
            left[i] -= int(above[i, d + 1])
            threshold[i] = (threshold[i] << bits) | d
            candidates[i] = candidates[i][digit == d] & ((1 << shift) - 1)  # their lower digits
    ties = torch.tensor([candidate.numel() for candidate in candidates], dtype=torch.int64)
    lower = ranks.sum_lower(ties).tolist()
    return [_choose(keys[i], counts[i], threshold[i], left[i] - lower[i]) for i in range(len(keys))]


def _suffix_sums(digits: Sequence[Tensor], size: int, ranks: Ranks) -> Tensor:
    """[tensors, size + 1] int64: how many digits over all ranks are >= d; the last column is 0. A digit of -1 is not counted."""
    histogram = torch.zeros(len(digits), size + 1, dtype=torch.int64)
    for i, digit in enumerate(digits):
        histogram[i, :size] = torch.bincount(digit + 1, minlength=size + 1)[1:].cpu()
    return ranks.sum(histogram).flip(1).cumsum(1).flip(1)


def _choose(keys: Tensor, count: int, threshold: int, room: int) -> Tensor:
    """Everything above the threshold, and the first `room` of what lies on it."""
    if count == 0:
        return torch.zeros_like(keys, dtype=torch.bool)
    chosen = keys > threshold
    if room > 0:
        chosen[(keys == threshold).nonzero().flatten()[:room]] = True
    return chosen
