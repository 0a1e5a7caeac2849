"""The zeros of a given checkpoint stay zero: for models that another tool has pruned."""

from typing import TYPE_CHECKING, Literal

from raysparse.length import Scale
from raysparse.sparsity.evolution.base import Evolution

if TYPE_CHECKING:
    from torch import Tensor

    from raysparse.sparsity.view import WeightView


class Zeros(Evolution):
    """The weights that live are the nonzeros of `model.path`, and the plan is their number in each layer; leave sparsity.target at 0."""

    type: Literal["zeros"] = "zeros"

    def first_score(self, w: "WeightView") -> "Tensor":
        return w.value.abs()

    def keep_score(self, w: "WeightView") -> "Tensor":
        return w.value.abs()

    def offsets(self, scale: Scale) -> range:
        return range(0)
