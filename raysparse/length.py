"""Lengths as people write them: ``2.5e9 tokens``, ``375M tokens``, ``4768 steps``, ``10 %``; a bare number is steps."""

import re
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import Annotated, Any

from pydantic import BeforeValidator

from raysparse.config import ConfigError

_FORM = re.compile(r"^\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:e\+?[0-9]+)?)\s*([kMGB]?)\s*(steps?|tokens?|epochs?|%)\s*$")
_SCALE = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}


@dataclass(frozen=True)
class Scale:
    """What a length is measured against: 1 step = this many tokens; 1 epoch = this many steps; the whole run in steps."""

    tokens_per_step: int
    steps_per_epoch: int | None = None
    steps: int | None = None


def _read(value: Any) -> str:
    text = f"{value} steps" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    if not _FORM.match(text):
        raise ValueError("Expected a length such as '100 steps', '2.5e9 tokens', '375M tokens', '5 epochs' or '10 %'")
    return text


Length = Annotated[str, BeforeValidator(_read)]


def steps(length: str, scale: Scale) -> int:
    """A length in whole optimizer steps, rounded to the nearest, halves up (at least 1 where it is not 0).

    Raises:
        ConfigError: as `exact`.
    """
    amount = exact(length, scale)
    return max(floor(amount + Fraction(1, 2)), int(amount > 0))


def exact(length: str, scale: Scale) -> Fraction:
    """A length in optimizer steps, not rounded.

    Raises:
        ConfigError: epochs of a stream without end, or a share of a run whose length is being defined.
    """
    match = _FORM.match(length)
    assert match, length
    amount, unit = Fraction(match[1].replace("_", "")) * _SCALE[match[2]], match[3]
    if unit.startswith("token"):
        return amount / scale.tokens_per_step
    if unit.startswith("epoch"):
        if scale.steps_per_epoch is None:
            raise ConfigError(f"Expected steps or tokens. Got {length!r}, but pre-training text has no epochs. Write it in tokens.")
        return amount * scale.steps_per_epoch
    if unit == "%":
        if scale.steps is None:
            raise ConfigError(f"Expected steps, tokens or epochs. Got {length!r} of the run whose length this is. Write it in tokens.")
        return amount / 100 * scale.steps
    return amount
