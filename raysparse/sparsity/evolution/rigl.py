"""RigL: the smallest weights go, those of the largest gradients come. Evci et al. 2020, arXiv:1911.11134."""

from typing import TYPE_CHECKING, ClassVar, Literal

from raysparse.length import Length
from raysparse.sparsity.evolution.base import Rewiring

if TYPE_CHECKING:
    from torch import Tensor

    from raysparse.sparsity.view import WeightView


class RigL(Rewiring):
    """The gradient is the mean over the global batch; its absolute value is taken after the mean."""

    reads_gradient: ClassVar[bool] = True
    grows_by_gradient: ClassVar[bool] = True

    type: Literal["rigl"] = "rigl"
    stop: Length = "75 %"
    optimizer_steps: bool = False

    def grow_scores(self, w: "WeightView") -> "list[tuple[float, Tensor]]":
        return [(1.0, w.grad)]
