"""Gradual magnitude pruning: the smallest weights go as the curve rises. Zhu & Gupta 2017, arXiv:1710.01878."""

from typing import TYPE_CHECKING, Literal

from raysparse.sparsity.evolution.base import Updating

if TYPE_CHECKING:
    from torch import Tensor

    from raysparse.sparsity.view import WeightView


class Gradual(Updating):
    """With the curve ``{type: polynomial}``, the paper's cubic."""

    type: Literal["gradual"] = "gradual"

    def first_score(self, w: "WeightView") -> "Tensor":
        return w.value.abs()

    def keep_score(self, w: "WeightView") -> "Tensor":
        return w.value.abs()
