"""Gradual magnitude pruning: the smallest weights go as the curve rises. Zhu & Gupta 2017, arXiv:1710.01878."""

from typing import ClassVar, Literal

from raysparse.sparsity.evolution.base import Updating


class Gradual(Updating):
    """With the curve ``{type: polynomial}``, the paper's cubic."""

    draws_first: ClassVar[bool] = False

    type: Literal["gradual"] = "gradual"
