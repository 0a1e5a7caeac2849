"""Settings by dotted keys, and the config that they stand for."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from raysparse.config import merge, parse_override


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` -> ``{"a": {"b": 1}}``."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        found = merge(found, value)
    return found


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The inverse; a mapping that names a type stays whole, for as such it is merged."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value and "type" not in value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def override(key: str, value: Any) -> str:
    """The override that reads back as this value."""
    if isinstance(value, str) and parse_override(f"{key}={value}") == nested({key: value}):
        return f"{key}={value}"
    return f"{key}={json.dumps(value)}"


def words(settings: Mapping[str, Any]) -> list[str]:
    """For a line on the console."""
    return [f"{key.removeprefix('sparsity.')}={short(value)}" for key, value in settings.items()]


def short(value: Any) -> str:
    """At most 40 characters."""
    text = f"{value:.3g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
