"""The grain at which weights live or die: single weights, n of every m, or blocks.

A pattern has two parts, and every rule works with both alike: a *unit*, the block of weights that live and die together, and a
*group*, consecutive units of a row of units of which equally many live. Masks, plans and selections count in units.
"""

from abc import ABC, abstractmethod
from math import prod
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from raysparse.config import Config, ConfigError
from raysparse.sparsity.distribution import Shape


class Pattern(Config, ABC):
    @property
    @abstractmethod
    def unit(self) -> tuple[int, int]:
        """Rows and columns of a unit."""

    @property
    def size_of_unit(self) -> int:
        """Weights of a unit."""
        return prod(self.unit)

    @abstractmethod
    def group(self, cols: int) -> int:
        """Units of a group in a weight of `cols` columns; 0 where there are no groups: any unit of the weight may live."""

    def units(self, shape: Shape) -> tuple[int, int]:
        """[rows, cols] of a weight in units."""
        return shape[0] // self.unit[0], shape[1] // self.unit[1]

    def num_groups(self, shape: Shape) -> int:
        """Groups of a weight; 0 where there are none."""
        size = self.group(shape[1])
        return prod(self.units(shape)) // size if size else 0

    def check_shape(self, name: str, shape: Shape, shards: int) -> None:
        """Raise a `ConfigError` if the weight, or its rows on one of `shards` ranks, cannot be cut into units and groups."""
        rows, cols = shape
        here = -(-rows // shards)  # rows of every rank but the last ones
        height, width = self.unit[0], self.unit[1] * (self.group(cols) or 1)
        if cols % width or rows % height or (shards > 1 and here % height):
            got = f"{rows} x {cols}" + (f", {here} rows on each of {shards} ranks" if shards > 1 else "")
            raise ConfigError(
                f"Expected {name} to have rows (on every rank) that {height} divides and columns that {width} divides, for pattern "
                f"{self.model_dump()}. Got {got}. Leave it out with sparsity.exclude, or choose another pattern or number of workers."
            )


class Unstructured(Pattern):
    """Single weights."""

    type: Literal["unstructured"] = "unstructured"

    @property
    def unit(self) -> tuple[int, int]:
        return 1, 1

    def group(self, cols: int) -> int:
        return 0


class NM(Pattern):
    """Of every m consecutive weights along the reduction dimension (the columns), n live (2:4: arXiv:2104.08378)."""

    type: Literal["n:m"] = "n:m"
    n: int = Field(2, ge=1)
    """Live weights of a group at sparsity.target, which must be 1 - n/m."""
    m: int = Field(4, ge=2, le=64)
    """Weights of a group."""

    @model_validator(mode="after")
    def _sparse(self) -> Self:
        if self.n >= self.m:
            raise ValueError(f"Expected n < m. Got {self.n}:{self.m}, which leaves nothing out")
        return self

    @property
    def unit(self) -> tuple[int, int]:
        return 1, 1

    def group(self, cols: int) -> int:
        return self.m


class Block(Pattern):
    """Blocks of weights."""

    type: Literal["block"] = "block"
    size: Literal["4x2", 4, 8, 16, 32, 64, 128] = 32
    """Rows and columns of a block: a square, or 4 rows and 2 columns. On CPUs 4 rows are enough for all that blocks gain."""
    fan_in: Literal["free", "constant"] = "free"
    """constant: equally many live blocks in every row of blocks."""

    @property
    def unit(self) -> tuple[int, int]:
        return (4, 2) if self.size == "4x2" else (self.size, self.size)

    def group(self, cols: int) -> int:
        return cols // self.unit[1] if self.fan_in == "constant" else 0


AnyPattern = Annotated[Unstructured | NM | Block, Field(discriminator="type")]
