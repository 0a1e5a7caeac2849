"""How live weights are shared out among layers: each distribution says which share of the total a layer gets.

A layer of n weights gets ``min(n, eps * share)`` live weights with one eps for all layers, solved so that the total is exact;
layers that would need more than they have are dense and the others take up the rest.
"""

from abc import ABC, abstractmethod
from typing import Annotated, Literal

from pydantic import Field

from raysparse.config import Config

Shape = tuple[int, ...]


class Distribution(Config, ABC):
    @abstractmethod
    def share(self, shape: Shape) -> int:
        """What the layer's number of live weights is proportional to; a positive whole number."""


class Uniform(Distribution):
    """The same sparsity in every layer (SPDF, arXiv:2303.10464)."""

    type: Literal["uniform"] = "uniform"

    def share(self, shape: Shape) -> int:
        rows, cols = shape
        return rows * cols


class ER(Distribution):
    """Erdos-Renyi: density of a layer proportional to (rows + cols) / (rows * cols) (SET, Mocanu et al. 2018; MST)."""

    type: Literal["er"] = "er"

    def share(self, shape: Shape) -> int:
        return shape[0] + shape[1]


class ERK(Distribution):
    """Erdos-Renyi-kernel: the sum of all dimensions instead of two (RigL, Evci et al. 2020); on matrices it equals `ER`."""

    type: Literal["erk"] = "erk"

    def share(self, shape: Shape) -> int:
        return sum(shape)


AnyDistribution = Annotated[Uniform | ER | ERK, Field(discriminator="type")]
