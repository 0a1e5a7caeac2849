"""The values of a key in a search, and the points that such keys span."""

import json
import math
from collections.abc import Iterator
from itertools import product
from typing import Any, Self

from pydantic import SerializerFunctionWrapHandler, model_serializer, model_validator

from raysparse.config import Config, ConfigError
from raysparse.sparsity import counter

Number = int | float


class Domain(Config):
    """The values of one key; exactly one of these."""

    choice: tuple[Any, ...] | None = None
    """Any of these, which may be whole sections: ``{choice: [0, 0.5, 0.75]}``."""
    uniform: tuple[float, float] | None = None
    """A float of [low, high)."""
    loguniform: tuple[float, float] | None = None
    """A float whose logarithm is uniform: learning rates."""
    randint: tuple[int, int] | None = None
    """An integer of [low, high)."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if len(given := [name for name, value in self if value is not None]) != 1:
            raise ValueError(f"Expected one of choice, uniform, loguniform, randint. Got {', '.join(given) or 'none'}")
        if self.choice is not None:
            if not self.choice:
                raise ValueError("Expected at least one value in choice. Got none")
            if len(set(map(json.dumps, self.choice))) < len(self.choice):
                raise ValueError(f"Expected different values in choice. Got one twice in {list(self.choice)}")
        else:
            low, high = self.bounds
            if not low < high or (self.loguniform and low <= 0):
                raise ValueError(f"Expected [low, high] with low < high{', both above 0' * bool(self.loguniform)}. Got {[low, high]}")
        return self

    @model_serializer(mode="wrap")
    def _given(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in serialize(self).items() if value is not None}

    @property
    def bounds(self) -> tuple[Number, Number]:
        """Of a domain that is no choice."""
        found = self.uniform or self.loguniform or self.randint
        assert found is not None
        return found

    def ends(self) -> tuple[Any, ...]:
        """Values that stand for all: every one of a choice, both ends of a range."""
        return self.choice if self.choice is not None else (self.bounds[0], self.bounds[1] - 1 if self.randint else self.bounds[1])

    def at(self, share: float) -> Any:
        """The value at `share` of [0, 1) of the domain."""
        if self.choice is not None:
            return self.choice[int(share * len(self.choice))]
        low, high = self.bounds
        if self.loguniform:
            return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
        return math.floor(low + share * (high - low)) if self.randint else low + share * (high - low)

    def to_tune(self) -> Any:
        """As Ray Tune has it; a choice by its index, for its values may be anything."""
        from ray import tune

        if self.choice is not None:
            return tune.choice(list(range(len(self.choice))))
        kinds = {"uniform": tune.uniform, "loguniform": tune.loguniform, "randint": tune.randint}
        return next(kinds[name](*bounds) for name, bounds in self if bounds is not None)

    def to_mutate(self) -> Any:
        """As Ray Tune's PBT has it."""
        return list(self.choice) if self.choice is not None else self.to_tune()

    def of_tune(self, value: Any) -> Any:
        """The value that `to_tune`'s stands for."""
        return value if self.choice is None else self.choice[value]


Space = dict[str, Domain]
"""Dotted key -> its values."""


def combinations(space: Space, where: str) -> Iterator[dict[str, Any]]:
    """Key -> value of every combination.

    Raises:
        ConfigError: a range, of which there is no every.
    """
    ranges = [key for key, domain in space.items() if domain.choice is None]
    if ranges:
        raise ConfigError(
            f"Expected choices for every combination of {where}. Got a range for {', '.join(ranges)}. "
            f"List values ({ranges[0]}: {{choice: [...]}}), or use algorithm.type=random or optuna where it is a task's."
        )
    for values in product(*(domain.choice or () for domain in space.values())):
        yield dict(zip(space, values, strict=True))


def draw(space: Space, seed: int, index: int) -> dict[str, Any]:
    """The index-th random point: a function of the seed, the index and each key."""
    return {key: domain.at(counter.key(seed, "tune", index, key) % 2**53 / 2**53) for key, domain in space.items()}


def representatives(space: Space) -> Iterator[dict[str, Any]]:
    """Settings in which every end of every domain occurs."""
    ends = {key: domain.ends() for key, domain in space.items()}
    for i in range(max(map(len, ends.values()), default=1)):
        yield {key: values[min(i, len(values) - 1)] for key, values in ends.items()}


def is_plain(domain: Domain) -> bool:
    return all(isinstance(value, int | float | str) for value in domain.ends())
