"""MEST: weights that are small and change little go, random ones come. Yuan et al. 2021, arXiv:2110.14032."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from raysparse.sparsity.evolution.base import Rewiring

if TYPE_CHECKING:
    from torch import Tensor

    from raysparse.sparsity.view import WeightView


class Mest(Rewiring):
    """Importance ``|w| + lambda |g|``, g the mean gradient over the global batch; no dead weight's gradient is looked at."""

    reads_gradient: ClassVar[bool] = True

    type: Literal["mest"] = "mest"
    gradient_weight: float = Field(1.0, ge=0)
    """lambda: how much a gradient counts beside a weight; what is right depends on the scale of the loss."""

    def keep_score(self, w: "WeightView") -> "Tensor":
        return w.value.abs() + self.gradient_weight * w.grad.abs()

    def grow_scores(self, w: "WeightView") -> "list[tuple[float, Tensor]]":
        return [(1.0, w.random())]
