"""How the sparsity moves within a phase: progress -> share of ``sparsity.target``, in exact fractions."""

import itertools
import math
from abc import ABC, abstractmethod
from fractions import Fraction
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from raysparse.config import Config

Share = Annotated[float, Field(ge=0, le=1)]


class Curve(Config, ABC):
    @abstractmethod
    def at(self, progress: Fraction) -> Fraction:
        """The share of the target, in [0, 1], after `progress` in [0, 1] of the phase's updates; 0 is where the phase begins."""

    @property
    def is_constant(self) -> bool:
        """Whether it is the same all along."""
        return False


class Constant(Curve):
    """The same sparsity all along."""

    type: Literal["constant"] = "constant"
    value: Share = 1.0
    """Share of sparsity.target: 1 holds it, 0 is dense."""

    def at(self, progress: Fraction) -> Fraction:
        return decimal(self.value)

    @property
    def is_constant(self) -> bool:
        return True


class Polynomial(Curve):
    """``start + (end - start) (1 - (1 - p)^power)``: fast, then slow; cubic as in Zhu & Gupta 2017 (arXiv:1710.01878).

    Mirrored, ``start + (end - start) p^power``: slow, then fast. MST's restoration is its warm-up mirrored in time.
    """

    type: Literal["polynomial"] = "polynomial"
    start: Share = 0.0
    """Share of sparsity.target where the phase begins."""
    end: Share = 1.0
    """Share of sparsity.target from the phase's last update on."""
    power: int = Field(3, ge=1)
    mirrored: bool = False
    """Slow first instead of fast first."""

    def at(self, progress: Fraction) -> Fraction:
        moved = progress**self.power if self.mirrored else 1 - (1 - progress) ** self.power
        return decimal(self.start) + (decimal(self.end) - decimal(self.start)) * moved


class Cosine(Curve):
    """``start + (end - start) (1 - cos(pi p)) / 2``: slow, fast, slow."""

    type: Literal["cosine"] = "cosine"
    start: Share = 0.0
    """Share of sparsity.target where the phase begins."""
    end: Share = 1.0
    """Share of sparsity.target from the phase's last update on."""

    def at(self, progress: Fraction) -> Fraction:
        moved = decimal(round((1 - math.cos(math.pi * progress)) / 2, 12))  # libraries differ in the last bits of a cosine
        return decimal(self.start) + (decimal(self.end) - decimal(self.start)) * moved


class Table(Curve):
    """Steps: from each listed progress on, the listed share holds (MST's code has such a table)."""

    type: Literal["table"] = "table"
    points: tuple[tuple[Share, Share], ...] = Field(min_length=1)
    """[[progress, share of sparsity.target], ...], from progress 0, rising: [[0, 0], [0.25, 0.5], [0.5, 1]]."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        places = [place for place, _ in self.points]
        if places[0] != 0 or any(a >= b for a, b in itertools.pairwise(places)):
            raise ValueError(f"Expected points from progress 0 on, each later than the one before. Got progress {places}")
        return self

    def at(self, progress: Fraction) -> Fraction:
        return decimal([share for place, share in self.points if decimal(place) <= progress][-1])


AnyCurve = Annotated[Constant | Polynomial | Cosine | Table, Field(discriminator="type")]


def decimal(value: float) -> Fraction:
    """A float as the decimal it is written as: 0.9 is 9/10."""
    return Fraction(str(value))
