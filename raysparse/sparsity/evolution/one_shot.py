"""One-shot magnitude pruning: the smallest weights go at once, where the phase begins. Han et al. 2015, arXiv:1506.02626."""

from typing import TYPE_CHECKING, Literal

from raysparse.length import Scale
from raysparse.sparsity.evolution.base import Evolution

if TYPE_CHECKING:
    from torch import Tensor

    from raysparse.sparsity.view import WeightView


class OneShot(Evolution):
    """In the first phase it makes the first topology: prune the model at `model.path`, then train it on."""

    type: Literal["one_shot"] = "one_shot"

    def first_score(self, w: "WeightView") -> "Tensor":
        return w.value.abs()

    def keep_score(self, w: "WeightView") -> "Tensor":
        return w.value.abs()

    def offsets(self, scale: Scale) -> range:
        return range(1)
