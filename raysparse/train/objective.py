"""What the loop minimises: a sum over the tokens of a global batch, whatever micro-batches and ranks it is split into."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from raysparse.data.batch import Batch
from raysparse.losses import cross_entropy_sum

Forward = Callable[[Batch], Tensor]
"""A batch on the device -> its logits, [rows, length, vocabulary]."""


class Objective(Protocol):
    """`begin` a step, then `loss` of each micro-batch in order. Every rank makes the same calls."""

    passes: int
    """Forward passes through a teacher's blocks in a step."""
    logits: int
    """Tokens of the global batch whose logits it computes."""

    def begin(self, batches: Sequence[Batch], targets: int, beat: Callable[[], None] = lambda: None) -> None:
        """A step with these micro-batches on this rank, on the device, and `targets` predicted tokens on all.

        Args:
            beat: called now and then by what takes long.
        """

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(what to run backward, whose sum over micro-batches and ranks is the objective; the detached sum of cross-entropies in nats)."""
        ...

    def parts(self) -> dict[str, Tensor]:
        """Name -> this rank's sum of what the objective of the step that began last is made of besides."""
        ...


class CrossEntropy:
    """The mean over predicted tokens, in nats."""

    passes, logits = 0, 0

    def __init__(self, forward: Forward, smoothing: float):
        self._forward, self._smoothing = forward, smoothing
        self._targets = 1

    def begin(self, batches: Sequence[Batch], targets: int, beat: Callable[[], None] = lambda: None) -> None:
        self._targets = max(1, targets)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        total = cross_entropy_sum(self._forward(batch), batch.labels, self._smoothing)
        return total / self._targets, total.detach()

    def parts(self) -> dict[str, Tensor]:
        return {}
