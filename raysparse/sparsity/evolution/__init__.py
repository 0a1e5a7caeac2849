"""Topology evolution: one rule a file; the union is the registry."""

from typing import Annotated

from pydantic import Field

from raysparse.sparsity.evolution.base import Evolution, Rewiring, Updating
from raysparse.sparsity.evolution.gradual import Gradual
from raysparse.sparsity.evolution.mest import Mest
from raysparse.sparsity.evolution.mixed import Mixed
from raysparse.sparsity.evolution.one_shot import OneShot
from raysparse.sparsity.evolution.rigl import RigL
from raysparse.sparsity.evolution.set import Set
from raysparse.sparsity.evolution.static import Static
from raysparse.sparsity.evolution.zeros import Zeros

AnyEvolution = Annotated[Static | Set | RigL | Mest | Mixed | Gradual | OneShot | Zeros, Field(discriminator="type")]

__all__ = ["AnyEvolution", "Evolution", "Gradual", "Mest", "Mixed", "OneShot", "Rewiring", "RigL", "Set", "Static", "Updating", "Zeros"]
