"""What happens to the topology, and when: a pure function of the config, the shapes and the length of the run.

Updates are numbered: version v is the topology after v of them. A step's update, if it has one, comes after its backward pass and
before its optimizer step; a checkpoint of step s holds the topology after all updates in steps below s.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, pairwise
from math import floor

from pydantic import Field

from raysparse import length
from raysparse.config import Config, ConfigError
from raysparse.sparsity.attention import AnyAttention
from raysparse.sparsity.evolution import Evolution, Updating
from raysparse.sparsity.plan import SparsityConfig, SparsityPlan
from raysparse.sparsity.timeline import Phase


@dataclass(frozen=True)
class TopologyUpdate:
    """One decision.

    Attributes:
        step: 0-based optimizer step that it belongs to.
        version: of the topology after it.
        phase: name of the phase.
        nnz: live weights of each layer after it, over all ranks.
        drop_fraction: share of the live weights of each layer that is dropped, at least, before growing.
        seed: of what is random in it.
    """

    step: int
    version: int
    phase: str
    nnz: Mapping[str, int]
    drop_fraction: float
    seed: int


@dataclass(frozen=True)
class Span:
    """A phase in steps: first, first + 1, ..., end - 1, with the steps of its updates."""

    phase: Phase
    rule: Evolution
    first: int
    end: int
    updates: range


_PLANS_KEPT = 16
"""Plans of the newest updates that are remembered: a phase that changes the density has another one in every update."""


class Agenda(Config):
    """Everything that a topology's history follows from; data, so that whoever has it decides alike.

    Attributes:
        shapes: [rows, cols] of each sparse weight, in model order.
        steps, tokens_per_step: length of the run.
        nnz: the plan, where the first masks are given; empty: it follows from the target.
    """

    sparsity: SparsityConfig
    shapes: dict[str, tuple[int, int]]
    steps: int
    tokens_per_step: int
    seed: int
    nnz: dict[str, int] = Field(default_factory=dict)

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """The phases in steps.

        Raises:
            ConfigError: phases that do not add up to the run, or that ask of their rule what it cannot do.
        """
        phases = self.sparsity.timeline
        amounts = [length.exact(phase.length, self._scale(self.steps)) for phase in phases]
        ends = [floor(end + Fraction(1, 2)) for end in accumulate(amounts)]
        if ends[-1] != self.steps or any(a >= b for a, b in pairwise([0, *ends])):
            raise ConfigError(
                f"Expected the phases of sparsity.timeline to last at least a step each and {self.steps:,} steps together. Got ends at "
                f"{', '.join(f'{phase.name} {end:,}' for phase, end in zip(phases, ends, strict=True))}. Change their length."
            )
        spans = [self._span(phase, first, end) for phase, (first, end) in zip(phases, pairwise([0, *ends]), strict=True)]
        self._check(spans)
        return tuple(spans)

    @property
    def keeps_moments(self) -> bool:
        """Whether dead weights may have moments in some phase (`Rewiring.reset_grown_state`)."""
        return not all(span.rule.resets_state for span in self.spans)

    @cached_property
    def update_steps(self) -> list[int]:
        """The steps with an update, rising."""
        return [step for span in self.spans for step in span.updates]

    def version(self, step: int) -> int:
        """How many updates lie before `step`: the version of the topology that it begins with."""
        return bisect_left(self.update_steps, step)

    def is_update(self, step: int) -> bool:
        """Whether the topology changes in `step`."""
        return step in self.span(step).updates

    def span(self, step: int) -> Span:
        """The phase that `step` (0-based) lies in; the last one also at the end of the run."""
        assert 0 <= step <= self.steps, (step, self.steps)
        return self.spans[min(bisect_right([span.first for span in self.spans], step) - 1, len(self.spans) - 1)]

    def attention(self, step: int) -> AnyAttention:
        """The attention pattern of `step`."""
        return self.span(step).phase.attention

    def factor(self, version: int) -> Fraction:
        """Share of the target that a version holds."""
        if version == 0:
            return self.spans[0].phase.sparsity.at(Fraction(0))
        step = self.update_steps[version - 1]
        span = self.span(step)
        return span.phase.sparsity.at(Fraction(span.updates.index(step) + 1, len(span.updates)))

    def plan(self, version: int) -> dict[str, int]:
        """Live weights of each layer in a version."""
        return self._plans(self.factor(version))

    def decide(self, step: int) -> TopologyUpdate:
        """The update of a step that has one; the same answer for the same step, whoever asks."""
        assert self.is_update(step), f"step {step} has no update"
        span, version = self.span(step), self.version(step) + 1
        return TopologyUpdate(step, version, span.phase.name, self.plan(version), float(self._drop_fraction(span, step)), self.seed)

    def _drop_fraction(self, span: Span, step: int) -> Fraction:
        first, end = self._window(span)
        if not span.rule.restarts:
            windows = [self._window(other) for other in self.spans if other.rule.can_grow]
            first, end = min([w[0] for w in windows], default=first), max([w[1] for w in windows], default=end)
        return span.rule.drop_at(Fraction(step - first, end - first))

    def _window(self, span: Span) -> tuple[int, int]:
        first, end = span.rule.window(self._scale(span.end - span.first))
        return span.first + first, span.first + end

    def _span(self, phase: Phase, first: int, end: int) -> Span:
        rule = phase.evolution or self.sparsity.evolution
        offsets = rule.offsets(self._scale(end - first))
        updates = range(first + offsets.start, first + offsets.stop, offsets.step)
        return Span(phase, rule, first, end, updates[1:] if updates and updates[0] == 0 else updates)  # step 0: the first topology

    def _scale(self, steps: int) -> length.Scale:
        return length.Scale(self.tokens_per_step, None, steps)

    def _plans(self, factor: Fraction) -> dict[str, int]:
        if self.nnz:
            return self.nnz
        if factor not in self._cache:
            if len(self._cache) >= _PLANS_KEPT:
                del self._cache[next(iter(self._cache))]
            self._cache[factor] = dict(SparsityPlan.build(self.shapes, self.sparsity, factor).nnz)
        return self._cache[factor]

    @cached_property
    def _cache(self) -> dict[Fraction, dict[str, int]]:
        return {}

    def _check(self, spans: list[Span]) -> None:
        level = spans[0].phase.sparsity.at(Fraction(0))
        for span in spans:
            phase, curve = span.phase, span.phase.sparsity
            goes = [curve.at(Fraction(k, len(span.updates))) for k in range(1, len(span.updates) + 1)]
            if self.nnz and {level, *goes} != {Fraction(1)}:
                raise ConfigError(
                    f"Expected a constant sparsity where the masks are given. Got the curve {curve.model_dump()} in phase {phase.name}. "
                    "Drop sparsity.masks (and evolution zeros), or the curve."
                )
            if not goes and not (curve.is_constant and curve.at(Fraction(0)) == level):
                raise ConfigError(
                    f"Expected updates in phase {phase.name}, whose sparsity moves. Got none from {span.rule.type} in "
                    f"{span.end - span.first:,} steps. Choose another evolution, a smaller update_interval or another curve."
                )
            if isinstance(span.rule, Updating) and not goes:
                raise ConfigError(
                    f"Expected at least one update in phase {phase.name} of {span.end - span.first:,} steps. Got none from "
                    f"{span.rule.type}, whose first comes one update_interval after start. Shorten the interval, or use evolution static."
                )
            if not span.rule.can_grow and any(b < a for a, b in pairwise([level, *goes])):
                raise ConfigError(
                    f"Expected a rule that grows weights in phase {phase.name}, whose sparsity falls. "
                    f"Got {span.rule.type}, which only drops. Use set, rigl, mest or mixed."
                )
            level = goes[-1] if goes else level
