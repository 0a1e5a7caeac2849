"""What a topology-evolution rule is: when masks change, which weights stay, and which come back.

Every rule goes through the same drop and grow (`sparsity.evolve`); a rule says only how weights are scored. Abstract classes
here, one final class a file beside it.
"""

import math
from abc import ABC, abstractmethod
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar, Literal

from raysparse import length
from raysparse.config import Config, ConfigError
from raysparse.length import Length
from raysparse.sparsity.curve import Share, decimal

if TYPE_CHECKING:
    from torch import Tensor

    from raysparse.sparsity.view import WeightView


class Evolution(Config, ABC):
    """Scores are tensors of the weight's shape, or `WeightView.random`; the largest magnitudes win, ties go to the lowest index."""

    grows_by_gradient: ClassVar[bool] = False
    """Whether it needs the gradient of dead weights too; a rule that reads a gradient but not this one sees 0 there."""
    reads_gradient: ClassVar[bool] = False
    """Whether the scores need the dense gradient."""
    draws_first: ClassVar[bool] = True
    """Whether the first topology is drawn at random; else it is what the rule would keep."""
    can_grow: ClassVar[bool] = False
    """Whether dead weights may come to life: without it the sparsity cannot fall."""

    type: str

    def first_score(self, w: "WeightView") -> "Tensor":
        """Who lives in the first topology."""
        return w.random() if self.draws_first else self.keep_score(w)

    def keep_score(self, w: "WeightView") -> "Tensor":
        """Which live weights stay: those of the largest magnitude, unless the rule says otherwise."""
        return w.value

    def grow_scores(self, w: "WeightView") -> "list[tuple[float, Tensor]]":
        """(share of the grown weights, score) in the order of choosing; the shares add up to 1.

        At random unless the rule says otherwise: where nothing is meant to grow, a layer may yet get a weight more than it had
        when the plan is rounded anew.
        """
        return [(1.0, w.random())]

    @abstractmethod
    def offsets(self, scale: length.Scale) -> range:
        """Steps of the updates from the phase's first step; `scale.steps` is the phase's length.

        Raises:
            ConfigError: settings that make no sense in a phase of this length.
        """

    def drop_at(self, progress: Fraction) -> Fraction:
        """Share of the live weights that is dropped, at least, after `progress` in [0, 1] of the decay."""
        return Fraction(0)

    @property
    def restarts(self) -> bool:
        """Whether the decay of the drop fraction begins anew in each phase."""
        return False

    def window(self, scale: length.Scale) -> tuple[int, int]:
        """Steps of the phase between which the drop fraction decays, the last one excluded."""
        return 0, scale.steps or 0

    @property
    def steps_on_update(self) -> bool:
        """Whether the optimizer steps in the step of an update too."""
        return True

    @property
    def resets_state(self) -> bool:
        """Whether grown weights start with moments of 0."""
        return True


class Updating(Evolution, ABC):
    """A rule that changes the masks again and again, at ``start + k * update_interval`` < stop of its phase, k = 1, 2, ..."""

    update_interval: Length = "100 steps"
    """Between two updates."""
    start: Length = "0 steps"
    """Of the phase; the first update comes one interval later. A share is of the phase."""
    stop: Length = "100 %"
    """Of the phase; no update at or after it."""
    optimizer_steps: bool = True
    """Whether the optimizer also steps on an update, with the gradients of the weights that then live."""

    def offsets(self, scale: length.Scale) -> range:
        interval = length.steps(self.update_interval, scale)
        begin, end = self.window(scale)
        if interval == 0 or begin >= end:
            raise ConfigError(
                f"Expected evolution {self.type} to start before it stops, with an update_interval of a step or more. Got start "
                f"{self.start!r}, stop {self.stop!r}, update_interval {self.update_interval!r} in a phase of {scale.steps:,} steps. "
                "Change them."
            )
        return range(begin + interval, end, interval)

    def window(self, scale: length.Scale) -> tuple[int, int]:
        assert scale.steps is not None
        return length.steps(self.start, scale), min(scale.steps, length.steps(self.stop, scale))

    @property
    def steps_on_update(self) -> bool:
        return self.optimizer_steps


class Rewiring(Updating, ABC):
    """A rule that drops live weights and grows as many others."""

    can_grow: ClassVar[bool] = True

    drop_fraction: Share = 0.3
    """Share of the live weights of each layer that an update drops (more where the sparsity rises)."""
    drop_decay: Literal["cosine", "constant"] = "cosine"
    """cosine: ``drop_fraction / 2 (1 + cos(pi p))`` with p from the first start to the last stop of the run."""
    drop_restart: bool = False
    """Whether p runs from start to stop of each phase anew."""
    reset_grown_state: bool = True
    """Whether a weight's moments are set to 0 when it dies, so that it starts with none when it is grown. false keeps them, as
    MST's code does."""

    def drop_at(self, progress: Fraction) -> Fraction:
        if self.drop_decay == "constant":
            return decimal(self.drop_fraction)
        return decimal(round(self.drop_fraction / 2 * (1 + math.cos(math.pi * progress)), 12))

    @property
    def restarts(self) -> bool:
        return self.drop_restart

    @property
    def resets_state(self) -> bool:
        return self.reset_grown_state
