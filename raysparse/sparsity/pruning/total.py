"""A sum of numbered tensors with the same bits however they are spread over ranks."""

from functools import reduce

from torch import Tensor


class Total:
    """Adds the terms 0, 1, 2 ... by a fixed binary tree: floating-point sums depend on their order, so this order is one of the numbers.

    Node (0, k) is term k, node (l + 1, k) the sum of the nodes (l, 2 k) and (l, 2 k + 1). Who has a range of the terms adds what of the
    tree lies in it, and hands over the few nodes that are left: at most two of a level, one in all where ranges are aligned powers of 2.

    Attributes:
        nodes: (level, number) -> the nodes that wait for their other half, in the order of the terms.
    """

    def __init__(self) -> None:
        self.nodes: dict[tuple[int, int], Tensor] = {}

    def add(self, number: int, value: Tensor, level: int = 0) -> None:
        """Node (level, number), which this may overwrite later; nodes come in the order of the terms."""
        while number % 2 and (level, number - 1) in self.nodes:
            value = self.nodes.pop((level, number - 1)).add_(value)
            level, number = level + 1, number // 2
        self.nodes[level, number] = value

    def value(self) -> Tensor:
        """Of all terms; every one of them must be here."""
        return reduce(lambda right, left: left + right, reversed(list(self.nodes.values())))
