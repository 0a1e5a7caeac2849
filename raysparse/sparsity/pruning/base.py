"""What a one-shot pruning rule is: which weights of a trained layer go at once, and what the others become.

Every rule gives a layer exactly the live weights that the plan has for it, keeps dead weights dead, and asks of the data only sums
over tokens, so that calibration may be spread over any number of ranks. One final class a file beside this one.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from raysparse.config import Config
from raysparse.sparsity.pattern import Pattern


@dataclass(frozen=True)
class Layer:
    """A linear layer that is to be pruned.

    Attributes:
        weight: [rows, cols] float32.
        live: [rows, cols] bool, False where the weight is dead already and stays so.
        nnz: how many weights are to live, at most those that do.
        pattern: of single weights; with groups, every group of the layer has at least its share of ``nnz`` alive.
    """

    weight: Tensor
    live: Tensor
    nnz: int
    pattern: Pattern

    @property
    def group(self) -> int:
        """Columns of a group of the pattern; 0 where it has none."""
        return self.pattern.group(self.weight.shape[1])

    def of_group(self, groups: int) -> Tensor:
        """[groups] int64: live weights of each of so many of the pattern's groups."""
        each = self.nnz // self.pattern.num_groups(tuple(self.weight.shape))
        return torch.full((groups,), each, device=self.live.device)


class Pruner(Config, ABC):
    """A one-shot pruning rule."""

    reads_inputs: ClassVar[bool] = True
    """Whether it needs to know what the layer reads."""

    type: str

    def statistic(self, inputs: Tensor) -> Tensor:
        """What it needs to know of ``inputs``, [tokens, cols] float32; those of several parts of the tokens add up."""
        raise NotImplementedError

    @abstractmethod
    def prune(self, layer: Layer, statistic: Tensor | None) -> tuple[Tensor, Tensor]:
        """(weight, mask) after pruning: new tensors, the mask with exactly ``layer.nnz`` live weights, the weight +0 elsewhere."""


def choose(layer: Layer, score: Tensor, rivals: int) -> Tensor:
    """[rows, cols] bool: which weights live.

    Args:
        score: [rows, cols], >= 0; the largest live, ties go to the lowest index.
        rivals: so many consecutive weights compete; each lot of them keeps the same share of what lives in it, up to rounding (`shares`).
            Where the pattern has groups, the weights of a group do instead.
    """
    live = layer.live.view(-1, layer.group or rivals)
    counts = layer.of_group(len(live)) if layer.group else shares(layer.nnz, live.sum(1))
    return best(score.view_as(live), live, counts).view_as(layer.live)


def shares(nnz: int, live: Tensor) -> Tensor:
    """[n] int64: `nnz` weights over parts that have ``live`` ([n] int64) of them, in proportion.

    Each gets the floor of its exact share and the missing ones go, one each, to the largest remainders (ties: the first).
    """
    total = max(1, int(live.sum()))
    assert 0 <= nnz <= total, f"{nnz} of {total}"
    exact = nnz * live
    counts, remainders = exact // total, exact % total
    order = remainders.argsort(descending=True, stable=True)
    counts[order[: nnz - int(counts.sum())]] += 1
    return counts


def best(score: Tensor, live: Tensor, counts: Tensor) -> Tensor:
    """[lots, size] bool: in each lot (row) the ``counts`` ([lots]) largest scores among the live; ties go to the lowest index."""
    order = torch.where(live, score, -1.0).sort(dim=1, descending=True, stable=True).indices
    chosen = torch.arange(score.shape[1], device=score.device) < counts.unsqueeze(1)
    return torch.zeros_like(live).scatter_(1, order, chosen)
