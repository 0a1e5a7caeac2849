"""Global-norm clipping whose value does not depend on how the weights are sharded."""

from collections.abc import Sequence

import torch
from torch import Tensor

from raysparse.sparsity.ranks import Ranks


def global_norm(gradients: Sequence[Tensor], num_rows: int, ranks: Ranks) -> float:
    """Euclidean norm over all gradients of all ranks, bit-equal however their rows are spread.

    Floating-point sums depend on their order, so only rows (never split) are summed in floating point. Their squares are
    scaled by a power of two that fits the largest of them and added as integers, which is associative. The error is below
    2^-30 of the norm for up to 2^30 rows; a NaN or infinity anywhere gives NaN or infinity.

    Args:
        gradients: this rank's rows, [rows, ...] each; an empty tensor where a rank has none.
        num_rows: upper bound on the rows of all gradients over all ranks, the same on every rank.
        ranks: every rank calls this.
    """
    norms = [torch.linalg.vector_norm(g.detach().reshape(g.shape[0], -1), dim=1) for g in gradients if g.numel()]
    squares = torch.cat(norms).double().square() if norms else torch.zeros(0, dtype=torch.float64)
    bad = torch.zeros((), dtype=torch.float64) if bool(torch.isfinite(squares).all()) else squares.new_ones(())
    peak = squares.nan_to_num(0.0, 0.0, 0.0).max() if squares.numel() else squares.new_zeros(())
    bad, peak = ranks.max(torch.stack([bad.to(peak.device), peak])).tolist()
    if bad:
        return float("nan")
    if peak == 0.0:
        return 0.0
    exponent = 62 - num_rows.bit_length() - torch.frexp(torch.tensor(peak, dtype=torch.float64)).exponent.item()
    integers = torch.ldexp(squares, torch.tensor(exponent)).round().long().sum()
    total = int(ranks.sum(integers.reshape(1)))
    return float(torch.ldexp(torch.tensor(float(total), dtype=torch.float64), torch.tensor(-exponent)).sqrt())


def clip_(gradients: Sequence[Tensor], norm: float, limit: float) -> None:
    """Scale gradients in place to a global norm of at most `limit`; element by element, so sharding changes nothing."""
    if norm > limit:
        torch._foreach_mul_([g for g in gradients if g.numel()], limit / (norm + 1e-6))
