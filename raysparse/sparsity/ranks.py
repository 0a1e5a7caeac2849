"""The collectives the pure core needs, handed in as functions: the core runs at world size 1 without a process group."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """Reductions over the ranks that hold different rows of the same weights.

    Attributes:
        sum: int64 tensor -> its sum over all ranks.
        sum_lower: int64 tensor -> its sum over the ranks that hold lower rows than this one.
        max: float64 tensor -> its maximum over all ranks.
    """

    sum: Callable[[Tensor], Tensor]
    sum_lower: Callable[[Tensor], Tensor]
    max: Callable[[Tensor], Tensor]


ALONE = Ranks(sum=lambda x: x, sum_lower=lambda x: x - x, max=lambda x: x)
"""This process holds every row."""
