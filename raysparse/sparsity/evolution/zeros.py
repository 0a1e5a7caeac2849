"""The zeros of a given checkpoint stay zero: for models that another tool has pruned."""

from typing import ClassVar, Literal

from raysparse.length import Scale
from raysparse.sparsity.evolution.base import Evolution


class Zeros(Evolution):
    """The weights that live are the nonzeros of `model.path`, and the plan is their number in each layer; leave sparsity.target at 0."""

    draws_first: ClassVar[bool] = False

    type: Literal["zeros"] = "zeros"

    def offsets(self, scale: Scale) -> range:
        return range(0)
