"""Wanda: weights go by their size times that of the feature they read, row by row; the others stay. Sun et al., arXiv:2306.11695."""

from typing import Literal

from torch import Tensor

from raysparse.sparsity.pruning.base import Layer, Pruner, choose


class Wanda(Pruner):
    """The largest |weight| * norm of its input feature of each row (output) live."""

    type: Literal["wanda"] = "wanda"

    def statistic(self, inputs: Tensor) -> Tensor:
        """[cols]: the squared norm of each feature."""
        return inputs.square().sum(0)

    def prune(self, layer: Layer, statistic: Tensor | None) -> tuple[Tensor, Tensor]:
        assert statistic is not None
        mask = choose(layer, layer.weight.abs() * statistic.sqrt(), rivals=layer.weight.shape[1])
        return layer.weight.where(mask, 0), mask
