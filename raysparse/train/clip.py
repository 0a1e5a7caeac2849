"""Global-norm clipping whose value does not depend on how the weights are sharded."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from raysparse.sparsity.ranks import Ranks


def global_norm(gradients: Sequence[Tensor], num_rows: int, ranks: Ranks) -> float:
    """Euclidean norm over all gradients of all ranks, bit-equal however their rows are spread.

    Floating-point sums depend on their order, so only rows (never split) are summed in floating point. Their squares are
    scaled by a power of two that fits the largest of them and added as integers, which is associative. For R rows this adds
    an error of at most R^2 / 2^62 of the norm. Where float32 squares overflow or vanish, the rows are summed in float64.

    Args:
        gradients: this rank's rows, [rows, ...] each; an empty tensor where a rank has none.
        num_rows: upper bound on the rows of all gradients over all ranks, the same on every rank.
        ranks: every rank calls this.

    Returns:
        The norm; NaN where any gradient holds a NaN or infinity.
    """
    squares, peak = _row_squares(gradients, torch.float32, ranks)
    if not 2.0**-60 < peak < 2.0**120:
        squares, peak = _row_squares(gradients, torch.float64, ranks)
    if math.isinf(peak):
        return math.nan
    if peak == 0.0:
        return 0.0
    exponent = 62 - num_rows.bit_length() - math.frexp(peak)[1]
    total = int(ranks.sum((squares * 2.0**exponent).round().long().sum().reshape(1)))
    return math.sqrt(math.ldexp(total, -exponent))


def _row_squares(gradients: Sequence[Tensor], dtype: torch.dtype, ranks: Ranks) -> tuple[Tensor, float]:
    """[rows] float64 squared norms of this rank's rows, computed in `dtype`, and the largest over all ranks (NaN: infinity)."""
    rows = [g.detach().reshape(g.shape[0], -1) for g in gradients if g.numel()]
    norms = [torch.linalg.vector_norm(row, dim=1, dtype=dtype) for row in rows]
    squares = torch.cat(norms).double().square() if norms else torch.zeros(1, dtype=torch.float64)
    return squares, float(ranks.max(squares.nan_to_num(math.inf, math.inf).max().reshape(1)))


def clip_(gradients: Sequence[Tensor], norm: float, limit: float) -> None:
    """Scale gradients in place to a global norm of at most `limit`; element by element, so sharding changes nothing."""
    here = [g for g in gradients if g.numel()]
    if norm > limit and here:
        torch._foreach_mul_(here, limit / (norm + 1e-6))
