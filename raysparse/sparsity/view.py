"""What a topology-evolution rule sees of a weight on one rank."""

from dataclasses import dataclass

from torch import Tensor

from raysparse.sparsity import counter


@dataclass(frozen=True)
class WeightView:
    """This rank's rows of one weight.

    Attributes:
        value: [rows, cols].
        grad: [rows, cols] dense gradient, the mean over the global batch, before clipping. Empty where the rule reads none.
        first, count: index of the first unit of the pattern here, and how many.
        key: names (seed, update, weight), for `random`.
    """

    value: Tensor
    grad: Tensor
    first: int
    count: int
    key: int

    def random(self) -> Tensor:
        """[units] int32 in [0, 2^31): a function of (seed, update, weight, unit), never of a rank."""
        return counter.random_keys(self.first, self.count, self.key, self.value.device)
