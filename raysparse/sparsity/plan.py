"""How many weights live in each layer: whole numbers, decided before anything is drawn."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from math import floor, prod
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from raysparse.config import Config, ConfigError
from raysparse.sparsity.curve import decimal
from raysparse.sparsity.distribution import AnyDistribution, Distribution, Shape, Uniform
from raysparse.sparsity.evolution import AnyEvolution, Static
from raysparse.sparsity.pattern import NM, AnyPattern, Pattern, Unstructured
from raysparse.sparsity.timeline import Phase

Sparsity = Annotated[float, Field(ge=0, lt=1)]


class LevelsConfig(Config):
    """How many weights of which layers are absent."""

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
    pattern: AnyPattern = Unstructured()
    """The grain: {type: unstructured}, {type: "n:m", n: 2, m: 4} or {type: block, size: 32}."""

    @property
    def given(self) -> bool:
        """Whether the first masks, and with them the plan, come from outside."""
        return False

    @property
    def wants_masks(self) -> bool:
        """False trains dense, without masks."""
        return self.target > 0 or self.given or any(level > 0 for level in self.layers.values())

    @model_validator(mode="after")
    def _realizable(self) -> Self:
        if self.given and (self.layers or self.distribution.type != "uniform"):
            raise ValueError("Expected neither layers nor a distribution where the masks are given: they say how many live. Drop them")
        if isinstance(self.pattern, NM) and self.wants_masks:
            n, m = self.pattern.n, self.pattern.m
            fits = self.given or abs(self.target - (1 - n / m)) < 1e-6  # 2/3 has no end as a decimal
            if self.distribution.type != "uniform" or self.layers or not fits:
                raise ValueError(f"Expected target {1 - n / m:g}, distribution uniform and no layers for pattern {n}:{m}. Set them")
        return self


class SparsityConfig(LevelsConfig):
    """Which weights are absent. SPDF's default: the linears of every block, uniformly; embeddings, norms, biases, head dense."""

    evolution: AnyEvolution = Static()
    """Which weights go and come: {type: static}, set, rigl, mest, mixed, gradual, one_shot or zeros."""
    timeline: tuple[Phase, ...] = Field((Phase(),), min_length=1)
    """The phases of the run: length, sparsity over it, rule and attention of each."""
    masks: str | None = Field(None, min_length=1)
    """Masks to start from instead of drawing them: a run's name or folder, a checkpoint, an exported model, a masks.safetensors. The
    plan is then what they hold; leave target at 0 or at their sparsity."""

    @property
    def given(self) -> bool:
        return self.masks is not None or (self.timeline[0].evolution or self.evolution).type == "zeros"


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
    def build(cls, shapes: Mapping[str, Shape], config: LevelsConfig, factor: Fraction = Fraction(1)) -> "SparsityPlan":
        """Decide every layer's count, in units of the pattern (single weights, or blocks).

        The rule: the total is ``floor((1 - factor * target) * N + 1/2)`` for the N units without a level of their own; each layer
        gets the floor of its exact share and the missing ones go, one each, to the largest fractions (ties: model order). Targets
        are read as the decimals they are written as (0.9 is 9/10). No layer is left empty unless its own level is 1: one that
        would be takes a unit from the layer that then has most. Where the pattern has groups, each layer's share is rounded to
        equally many units in each of them, at least 1, and the total is what they add up to.

        Args:
            factor: share of the target (`Curve.at`), in [0, 1]; own levels move with it.

        Raises:
            ConfigError: a pattern in `layers` that matches nothing, or fewer live units than layers.
        """
        pattern, own = config.pattern, _own_levels(shapes, config.layers)
        units = {name: pattern.units(shape) for name, shape in shapes.items()}
        exact = {name: (1 - factor * level) * prod(units[name]) for name, level in own.items()}
        rest = {name: size for name, size in units.items() if name not in own}
        total = floor((1 - factor * decimal(config.target)) * sum(map(prod, rest.values())) + Fraction(1, 2))
        if any(pattern.num_groups(shape) for shape in shapes.values()):
            shares, whole = _water_fill(rest, total, config.distribution)
            exact |= {name: Fraction(share, whole) for name, share in shares.items()}
            nnz = {name: _in_groups(share, pattern, shapes[name], own.get(name)) for name, share in exact.items()}
        else:
            nnz = {name: max(floor(share + Fraction(1, 2)), 1 if own[name] < 1 else 0) for name, share in exact.items()}
            nnz |= share_out(rest, total, config.distribution)
        return cls(dict(shapes), {name: nnz[name] * pattern.size_of_unit for name in shapes})


def _in_groups(share: Fraction, pattern: Pattern, shape: Shape, level: Fraction | None) -> int:
    """Units of a layer: the nearest whole number in each group, at least 1 unless the layer's own level is 1."""
    groups = pattern.num_groups(shape)
    return groups * max(floor(share / groups + Fraction(1, 2)), 0 if level == 1 else 1)


def share_out(shapes: Mapping[str, Shape], total: int, distribution: Distribution) -> dict[str, int]:
    """`total` live units over the layers, in exact arithmetic; a layer that would be empty takes 1 from the fullest."""
    if total < len(shapes):
        raise ConfigError(
            f"Expected at least one live weight (or block) in each of {len(shapes)} layers. Got {total} for all of them. "
            "Lower sparsity.target, or empty a layer explicitly with sparsity.layers."
        )
    shares, whole = _water_fill(shapes, total, distribution)
    nnz = {name: share // whole for name, share in shares.items()}
    order = sorted(shares, key=lambda name: -(shares[name] % whole))  # largest fraction first; sorted is stable
    for name in order[: total - sum(nnz.values())]:
        nnz[name] += 1
    for name in [name for name, count in nnz.items() if count == 0]:
        nnz[name] += 1
        nnz[max(nnz, key=lambda other: nnz[other])] -= 1
    assert sum(nnz.values()) == total, (nnz, total)
    assert all(1 <= count <= prod(shapes[name]) for name, count in nnz.items()), nnz
    return nnz


def _water_fill(shapes: Mapping[str, Shape], total: int, distribution: Distribution) -> tuple[dict[str, int], int]:
    """min(n, eps * share) for each layer, with eps such that the sum is `total`: whole numerators and their common denominator."""
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    shares = {name: distribution.share(shape) for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        budget = total - sum(sizes[name] for name in dense)
        whole = sum(share for name, share in shares.items() if name not in dense) or 1
        full = {name for name in shapes if name not in dense and budget * shares[name] > sizes[name] * whole}
        if not full:
            return {name: sizes[name] * whole if name in dense else budget * shares[name] for name in shapes}, whole
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
        own |= dict.fromkeys(matches, decimal(level))
    return own
