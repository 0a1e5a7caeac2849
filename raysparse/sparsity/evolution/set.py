"""Sparse evolutionary training: the smallest weights go, random ones come. Mocanu et al. 2018, arXiv:1707.04780."""

from typing import TYPE_CHECKING, Literal

from raysparse.sparsity.evolution.base import Rewiring

if TYPE_CHECKING:
    from torch import Tensor

    from raysparse.sparsity.view import WeightView


class Set(Rewiring):
    """Growth that looks at nothing: the cheapest way to explore."""

    type: Literal["set"] = "set"
    drop_decay: Literal["cosine", "constant"] = "constant"

    def grow_scores(self, w: "WeightView") -> "list[tuple[float, Tensor]]":
        return [(1.0, w.random())]
