"""One-shot magnitude pruning: the smallest weights go at once, where the phase begins. Han et al. 2015, arXiv:1506.02626."""

from typing import ClassVar, Literal

from raysparse.length import Scale
from raysparse.sparsity.evolution.base import Evolution


class OneShot(Evolution):
    """In the first phase it makes the first topology: prune the model at `model.path`, then train it on."""

    draws_first: ClassVar[bool] = False

    type: Literal["one_shot"] = "one_shot"

    def offsets(self, scale: Scale) -> range:
        return range(1)
