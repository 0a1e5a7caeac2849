"""MST's mixed growing: part by gradient, part at random. arXiv:2408.11746."""

from typing import TYPE_CHECKING, ClassVar, Literal

from raysparse.sparsity.curve import Share
from raysparse.sparsity.evolution.base import Rewiring

if TYPE_CHECKING:
    from torch import Tensor

    from raysparse.sparsity.view import WeightView


class Mixed(Rewiring):
    """The random part is drawn among those that the gradients did not choose."""

    reads_gradient: ClassVar[bool] = True
    grows_by_gradient: ClassVar[bool] = True

    type: Literal["mixed"] = "mixed"
    gradient_share: Share = 0.75
    """Share of the grown weights chosen by gradient (rounded down); the rest is random."""
    optimizer_steps: bool = False

    def grow_scores(self, w: "WeightView") -> "list[tuple[float, Tensor]]":
        return [(self.gradient_share, w.grad), (1 - self.gradient_share, w.random())]
