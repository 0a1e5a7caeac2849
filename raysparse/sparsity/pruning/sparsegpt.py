"""SparseGPT: weights go where the layer's outputs suffer least, and those that come after make up for them. arXiv:2301.00774.

With H = the sum of x x^T over all inputs x of the layer, taking out weight j of a row costs w_j^2 / [H^-1]_jj and changes the others by
-w_j / [H^-1]_jj times row j of H^-1 (Optimal Brain Surgeon, Hassibi and Stork 1993), where H is of the features that may still change. The
columns are frozen from left to right, so these are, for all rows alike, the features not yet passed: what is needed of every H^-1 on the
way lies in the rows of one upper Cholesky factor U, U^T U = H^-1.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raysparse.sparsity.pruning.base import Layer, Pruner, best, shares


class SparseGPT(Pruner):
    """Optimal Brain Surgeon by column blocks."""

    type: Literal["sparsegpt"] = "sparsegpt"
    damping: float = Field(0.01, ge=0)
    """Times the mean of H's diagonal is added to the diagonal. More keeps the weights nearer to what they were."""
    block_size: int = Field(128, ge=1)
    """Columns whose weights compete with each other, in all rows together; with n:m the groups do, and m must divide it."""

    def statistic(self, inputs: Tensor) -> Tensor:
        """[cols, cols]: H."""
        return inputs.T @ inputs

    def prune(self, layer: Layer, statistic: Tensor | None) -> tuple[Tensor, Tensor]:
        assert statistic is not None
        weight = layer.weight.clone()
        weight[:, statistic.diagonal() == 0] = 0  # what they read was always 0
        factor = factor_of_inverse(statistic, self.damping)
        mask = torch.zeros_like(layer.live)
        starts = range(0, weight.shape[1], self.block_size)
        counts = shares(layer.nnz, torch.stack([layer.live[:, s : s + self.block_size].sum() for s in starts]))
        for start, count in zip(starts, counts.unsqueeze(1), strict=True):
            here, behind = slice(start, start + self.block_size), slice(start + self.block_size, None)
            mask[:, here], errors = self._prune_block(layer, weight[:, here], layer.live[:, here], factor[here, here], count)
            weight[:, behind] -= errors @ factor[here, behind]
        return weight.where(mask, 0), mask

    def _prune_block(self, layer: Layer, weight: Tensor, live: Tensor, factor: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Freeze the columns of a block one after the other; `weight` is changed in place, as far as the block's own columns go.

        Returns:
            Which weights live, and of each that was taken out its value / its entry of U's diagonal: rows of U times it is what the
            columns behind the block have to change by.
        """
        rows, cols = weight.shape
        mask, errors = torch.zeros_like(live), torch.zeros_like(weight)
        width = layer.group or cols
        for column in range(cols):
            if column % width == 0:  # whose weights compete are judged by what those before them have made of them
                rivals = slice(column, column + width)
                score, among = weight[:, rivals].abs() / factor.diagonal()[rivals], live[:, rivals]
                lots = (rows, -1) if layer.group else (1, -1)
                each = layer.of_group(rows) if layer.group else count
                mask[:, rivals] = best(score.reshape(lots), among.reshape(lots), each).view(rows, -1)
            errors[:, column] = weight[:, column].masked_fill(mask[:, column], 0) / factor[column, column]
            weight[:, column:] -= torch.outer(errors[:, column], factor[column, column:])
        return mask, errors


def factor_of_inverse(hessian: Tensor, damping: float) -> Tensor:
    """Upper U with U^T U = (H + damping * mean(diagonal) * I)^-1, float32.

    Features that were always 0 have 1 on the diagonal, and no part in its mean.
    Computed in float64: inverting doubles the digits that a Cholesky factor loses, and the features of language models differ in size
    by orders of magnitude, so that float32 would need the damping to be positive definite at all.

    Raises:
        torch.linalg.LinAlgError: not positive definite: too little damping, or inputs that are not finite.
    """
    matrix, diagonal = hessian.double(), hessian.diagonal().double()
    seen = diagonal > 0
    mean = diagonal.sum() / seen.sum().clamp(min=1)
    matrix = matrix + torch.diag(torch.where(seen, damping * mean, 1.0))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    return torch.linalg.cholesky(inverse, upper=True).float()
