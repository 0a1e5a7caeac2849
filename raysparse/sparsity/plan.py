"""How many weights live in each layer: whole numbers, decided before anything is drawn."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from math import floor, prod
from typing import Annotated, Literal

from pydantic import Field

from raysparse.config import Config, ConfigError
from raysparse.sparsity.distribution import AnyDistribution, Distribution, Shape, Uniform

Sparsity = Annotated[float, Field(ge=0, lt=1)]


class SparsityConfig(Config):
    """Which weights are absent. SPDF's default: the linears of every block, uniformly; embeddings, norms, biases, head dense."""

    target: Sparsity = 0.0
    """Fraction of zeros in the sparse weights, in [0, 1). 0 trains dense."""
    distribution: AnyDistribution = Uniform()
    """How the zeros are shared out among layers: {type: uniform}, {type: er} or {type: erk}."""
    include: Literal["block_linears"] | tuple[str, ...] = "block_linears"
    """The sparse weights: `block_linears` (every linear inside the repeated blocks) or a list of name patterns."""
    exclude: tuple[str, ...] = ()
    """Name patterns that stay dense although included."""
    layers: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict)
    """Name pattern -> sparsity of each layer it matches; the target then holds for the others. 1 empties a layer."""


@dataclass(frozen=True)
class SparsityPlan:
    """Exact numbers of live weights.

    Attributes:
        shapes: whole shape of each sparse weight, in model order.
        nnz: live weights of each, over all ranks.
    """

    shapes: Mapping[str, Shape]
    nnz: Mapping[str, int]

    @property
    def total(self) -> int:
        """Live weights over all layers."""
        return sum(self.nnz.values())

    @property
    def size(self) -> int:
        """Live and dead weights over all layers."""
        return sum(map(prod, self.shapes.values()))

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the sparse weights; 0.0 where there are none."""
        return 1 - self.total / self.size if self.size else 0.0

    @classmethod
    def build(cls, shapes: Mapping[str, Shape], config: SparsityConfig) -> "SparsityPlan":
        """Decide every layer's count.

        The rule: the total is ``floor((1 - target) * N + 1/2)`` for the N weights without a level of their own; each layer gets
        the floor of its exact share and the missing ones go, one each, to the largest fractions (ties: model order). Targets
        are read as the decimals they are written as (0.9 is 9/10). No layer is left empty unless its own level is 1: one that
        would be takes a weight from the layer that then has most.

        Raises:
            ConfigError: a pattern in `layers` that matches nothing, or fewer live weights than layers.
        """
        own = _own_levels(shapes, config.layers)
        nnz = {name: floor((1 - level) * prod(shapes[name]) + Fraction(1, 2)) for name, level in own.items()}
        nnz = {name: max(count, 1 if own[name] < 1 else 0) for name, count in nnz.items()}
        rest = {name: shape for name, shape in shapes.items() if name not in own}
        total = floor((1 - Fraction(str(config.target))) * sum(map(prod, rest.values())) + Fraction(1, 2))
        nnz |= share_out(rest, total, config.distribution)
        return cls(dict(shapes), {name: nnz[name] for name in shapes})


def share_out(shapes: Mapping[str, Shape], total: int, distribution: Distribution) -> dict[str, int]:
    """`total` live weights over the layers, in exact arithmetic; a layer that would be empty takes 1 from the fullest."""
    if total < len(shapes):
        raise ConfigError(
            f"Expected at least one live weight in each of {len(shapes)} layers. Got {total} for all of them. "
            "Lower sparsity.target, or empty a layer explicitly with sparsity.layers."
        )
    exact = _water_fill(shapes, total, distribution)
    nnz = {name: floor(share) for name, share in exact.items()}
    order = sorted(exact, key=lambda name: nnz[name] - exact[name])  # largest fraction first; sorted is stable
    for name in order[: total - sum(nnz.values())]:
        nnz[name] += 1
    for name in [name for name, count in nnz.items() if count == 0]:
        nnz[name] += 1
        nnz[max(nnz, key=lambda other: nnz[other])] -= 1
    assert sum(nnz.values()) == total, (nnz, total)
    assert all(1 <= count <= prod(shapes[name]) for name, count in nnz.items()), nnz
    return nnz


def _water_fill(shapes: Mapping[str, Shape], total: int, distribution: Distribution) -> dict[str, Fraction]:
    """min(n, eps * share) for each layer, with eps such that the sum is `total`."""
    shares = {name: distribution.share(shape) for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        budget = total - sum(prod(shapes[name]) for name in dense)
        open_ = [name for name in shapes if name not in dense]
        eps = Fraction(budget, sum(shares[name] for name in open_)) if open_ else Fraction(0)
        full = {name for name in open_ if eps * shares[name] > prod(shapes[name])}
        if not full:
            return {name: Fraction(prod(shapes[name])) if name in dense else eps * shares[name] for name in shapes}
        dense |= full


def _own_levels(shapes: Mapping[str, Shape], layers: Mapping[str, float]) -> dict[str, Fraction]:
    """The last matching pattern wins."""
    own: dict[str, Fraction] = {}
    for pattern, level in layers.items():
        matches = [name for name in shapes if fnmatchcase(name, pattern)]
        if not matches:
            raise ConfigError(
                f"Expected sparsity.layers pattern {pattern!r} to match a sparse weight. Got no match among: "
                f"{', '.join(list(shapes)[:6])} ... Correct the pattern; `raysparse plan` lists every name."
            )
        own |= dict.fromkeys(matches, Fraction(str(level)))
    return own
