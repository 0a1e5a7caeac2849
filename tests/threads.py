"""Ranks without processes: one thread each, with collectives that meet in memory. For the pure core, which needs no more."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import torch
from torch import Tensor

from raysparse.sparsity.ranks import Ranks


def together(function: Callable[..., Any], parts: Sequence[Any], timeout_s: float = 60.0) -> list[Any]:
    """``function(part, ranks)`` for every part at once, in rank order; a rank that misses a collective fails the call."""
    barrier = Barrier(len(parts), timeout=timeout_s)
    table: list[Any] = [None] * len(parts)

    def run(rank: int) -> Any:
        def everyone(x: Tensor) -> Tensor:
            table[rank] = x
            barrier.wait()
            found = torch.stack(list(table))
            barrier.wait()
            return found

        ranks = Ranks(
            sum=lambda x: everyone(x).sum(0),
            sum_lower=lambda x: everyone(x)[:rank].sum(0),
            max=lambda x: everyone(x).amax(0),
        )
        try:
            return function(parts[rank], ranks)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(run, range(len(parts))))
