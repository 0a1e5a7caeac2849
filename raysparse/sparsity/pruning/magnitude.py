"""Magnitude pruning: the smallest weights of each layer go, the others stay as they are. Han et al. 2015, arXiv:1506.02626."""

from typing import ClassVar, Literal

from torch import Tensor

from raysparse.sparsity.pruning.base import Layer, Pruner, choose


class Magnitude(Pruner):
    """The largest weights of a layer live; needs no data."""

    reads_inputs: ClassVar[bool] = False

    type: Literal["magnitude"] = "magnitude"

    def prune(self, layer: Layer, statistic: Tensor | None) -> tuple[Tensor, Tensor]:
        mask = choose(layer, layer.weight.abs(), rivals=layer.weight.numel())
        return layer.weight.where(mask, 0), mask
