"""Masks that never change: SPDF's. arXiv:2303.10464."""

from typing import TYPE_CHECKING, Literal

from raysparse.length import Scale
from raysparse.sparsity.evolution.base import Evolution

if TYPE_CHECKING:
    from torch import Tensor

    from raysparse.sparsity.view import WeightView


class Static(Evolution):
    """The first masks for good."""

    type: Literal["static"] = "static"

    def keep_score(self, w: "WeightView") -> "Tensor":
        return w.value.abs()

    def offsets(self, scale: Scale) -> range:
        return range(0)
