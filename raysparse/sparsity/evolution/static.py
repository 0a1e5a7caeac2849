"""Masks that never change: SPDF's. arXiv:2303.10464."""

from typing import Literal

from raysparse.length import Scale
from raysparse.sparsity.evolution.base import Evolution


class Static(Evolution):
    """The first masks for good."""

    type: Literal["static"] = "static"

    def offsets(self, scale: Scale) -> range:
        return range(0)
