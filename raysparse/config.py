"""Configs are frozen pydantic models, read from YAML files and ``dotted.key=value`` overrides.

One merge rule, for files and overrides alike: mappings merge deeply, but a mapping that names a ``type`` replaces what was
there, so that ``sparsity.distribution.type=er`` cannot inherit stray keys of another distribution. There are no environment
variables and no interpolation: what ``raysparse plan`` prints is all there is.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class ConfigError(ValueError):
    """What a user wrote cannot be run. The message says what was expected, what was found and what to do."""


class Config(BaseModel):
    """Base of every config: immutable, complete, and an unknown key is an error.

    The docstring under a field is its help text; ``raysparse VERB --keys`` prints it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of the config's canonical JSON: equal configs, equal digests, on any machine."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The complete config, defaults included; ``load`` reads it back to an equal object."""
        return yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=120)

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> Self:
        """Validate plain data; on failure raise one `ConfigError` that lists every problem."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = [_describe(problem, values) for problem in error.errors()]
            raise ConfigError(
                f"Expected a valid {cls.__name__}. Got {len(problems)} problem{'s' * (len(problems) > 1)}:\n"
                + "\n".join(f"  {problem}" for problem in problems)
                + "\nCorrect these keys; `raysparse VERB --keys` explains every key."
            ) from None


C = TypeVar("C", bound=Config)


def load(cls: type[C], files: Iterable[str | Path] = (), overrides: Iterable[str] = ()) -> C:
    """Defaults < files, left to right < overrides, left to right.

    Args:
        files: YAML files, each holding one mapping.
        overrides: ``dotted.key=value``; the value is read as YAML (``0.75``, ``true``, ``[1, 2]``, ``{type: er}``).

    Raises:
        ConfigError: a missing or malformed file, a malformed override, or invalid keys and values, all of them at once.
    """
    values: dict[str, Any] = {}
    for file in files:
        values = merge(values, read_yaml(file))
    for override in overrides:
        values = merge(values, parse_override(override))
    return cls.check(values)


def read_yaml(file: str | Path) -> dict[str, Any]:
    """One YAML mapping from a file, or a `ConfigError`."""
    path = Path(file)
    if not path.is_file():
        near = ", ".join(sorted(str(other) for other in path.parent.glob("*.yaml"))) if path.parent.is_dir() else ""
        raise ConfigError(
            f"Expected a config file at {path}. Got none there. "
            + (f"Beside it lie: {near}." if near else "Check the path; settings are written key=value.")
        )
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"Expected YAML in {path}. Got: {error}. Mend the file.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"Expected a mapping in {path}. Got a {type(values).__name__}. Write `key: value` lines.")
    return values


def parse_override(text: str) -> dict[str, Any]:
    """``a.b=1`` -> ``{"a": {"b": 1}}``."""
    key, equals, value = text.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f"Expected an override of the form dotted.key=value. Got {text!r}. Example: sparsity.target=0.75")
    try:
        result: Any = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"Expected YAML after the = of {text!r}. Got: {error}. Quote the value.") from None
    for part in reversed(key.strip().split(".")):
        result = {part: result}
    return result


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` over `base`: mappings merge deeply; a mapping that names a ``type`` replaces. Neither argument is changed."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and "type" not in value:
            merged[key] = merge(old, value)
        else:
            merged[key] = merge({}, value) if isinstance(value, Mapping) else value
    return merged


def together(*checks: Callable[[], Any]) -> None:
    """Call independent checks; raise one `ConfigError` that says what all of them found."""
    problems = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))


@contextmanager
def within(where: str) -> Iterator[None]:
    """A `ConfigError` in here says which part of a config it is of."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _describe(problem: Any, values: Any) -> str:
    path = []
    for part in problem["loc"]:
        if isinstance(values, Mapping) and part not in values and part == values.get("type"):
            continue  # pydantic names the member of a union; that is no key
        path.append(str(part))
        values = values.get(part) if isinstance(values, Mapping) else None
    where = ".".join(path) or "(the whole config)"
    silent = not path or problem["type"] in ("missing", "extra_forbidden")  # what checks several keys says itself what it got
    got = "" if silent else f" (got {problem['input']!r})"
    text = "no such key" if problem["type"] == "extra_forbidden" else problem["msg"].removeprefix("Value error, ")
    return f"{where}: {text}{got}"


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 3e-4 and 1_000.5 as numbers: YAML 1.1 wants 3.0e-4, which nobody writes. As in YAML 1.2 only true and false are
    booleans; on, off, yes and no are words, which a key of two values takes all the same."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes the strings `_Loader` would read as numbers."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)$"),
        list("-+0123456789"),
    )
