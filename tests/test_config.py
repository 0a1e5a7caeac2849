"""One merge rule, every error at once, and a config that survives YAML."""

from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

from raysparse.config import Config, ConfigError, load, merge, parse_override, read_yaml


class Even(Config):
    type: Literal["even"] = "even"
    weight: float = Field(1.0, gt=0)


class Odd(Config):
    type: Literal["odd"] = "odd"
    power: int = 2


class Packing(Config):
    packed: Literal["auto", "on", "off"] = "auto"


class Inner(Config):
    target: float = Field(0.0, ge=0, lt=1)
    shape: Annotated[Even | Odd, Field(discriminator="type")] = Even()
    names: tuple[str, ...] = ()
    levels: dict[str, float] = Field(default_factory=dict)


class Outer(Config):
    name: str = "run"
    seed: int = Field(0, ge=0)
    sparsity: Inner = Inner()


@pytest.mark.parametrize(
    ("base", "top", "merged"),
    [
        ({}, {"a": 1}, {"a": 1}),
        ({"a": 1}, {}, {"a": 1}),
        ({"a": 1}, {"a": 2}, {"a": 2}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}}, {"a": {"b": 1, "c": 3}}),
        ({"a": {"b": {"c": 1}}}, {"a": {"b": {"d": 2}}}, {"a": {"b": {"c": 1, "d": 2}}}),
        ({"a": {"type": "x", "b": 1}}, {"a": {"type": "y"}}, {"a": {"type": "y"}}),  # a type replaces
        ({"a": {"type": "x", "b": 1}}, {"a": {"type": "x"}}, {"a": {"type": "x"}}),  # even the same type
        ({"a": {"type": "x", "b": 1}}, {"a": {"b": 2}}, {"a": {"type": "x", "b": 2}}),  # no type merges
        ({"a": {"b": {"type": "x", "c": 1}, "d": 4}}, {"a": {"b": {"type": "y"}}}, {"a": {"b": {"type": "y"}, "d": 4}}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),  # lists replace
        ({"a": {"b": 1}}, {"a": 5}, {"a": 5}),
        ({"a": 5}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({"a": {"b": 1}}, {"a": None}, {"a": None}),
    ],
)
def test_merge(base, top, merged):
    before = repr((base, top))
    assert merge(base, top) == merged
    assert repr((base, top)) == before


def test_merge_shares_no_mapping_with_its_arguments():
    base, top = {"a": {"b": 1}}, {"a": {"c": {"d": 2}}}
    merge(base, top)["a"]["c"]["d"] = 9
    assert (base, top) == ({"a": {"b": 1}}, {"a": {"c": {"d": 2}}})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4), ("3.0e-4", 3e-4), ("1e9", 1e9), ("-2E+2", -200.0), ("1_000.5e1", 10005.0), ("1_000.5", 1000.5),
        ("1_000", 1000), ("0.75", 0.75), ("7", 7), ("true", True), ("", None), ("[1, 2]", [1, 2]), ("{type: er}", {"type": "er"}),
        ("a=b", "a=b"), ("3e", "3e"), ("e5", "e5"), ("1e5x", "1e5x"), ("'1e5'", "1e5"), ("2.5e9 tokens", "2.5e9 tokens"),
    ],
)  # fmt: skip
def test_override_values_are_yaml(text, value):
    found = parse_override(f"a.b={text}")["a"]["b"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["", "sparsity.target", "=1", "a..b=1", ".a=1", "a.=1", " =1", "a. .b=1"])
def test_malformed_override(text):
    with pytest.raises(ConfigError) as error:
        parse_override(text)
    assert str(error.value) == f"Expected an override of the form dotted.key=value. Got {text!r}. Example: sparsity.target=0.75"


@pytest.mark.parametrize("word", ["on", "off", "yes", "no", "On", "OFF"])
def test_words_are_no_booleans(word, tmp_path):
    """As YAML 1.2 has it: sharding.packed=on is the word; what wants a truth value takes both."""
    assert parse_override(f"key={word}") == {"key": word}
    file = tmp_path / "config.yaml"
    file.write_text(f"key: {word}\ntruth: true\nno_truth: False\n")
    assert read_yaml(file) == {"key": word, "truth": True, "no_truth": False}


@pytest.mark.parametrize("mode", ["auto", "on", "off"])
def test_a_mode_named_as_a_truth_value_goes_through_a_file(mode, tmp_path):
    config = Packing.check(parse_override(f"packed={mode}"))
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert Packing.check(read_yaml(tmp_path / "config.yaml")) == config
    assert config.packed == mode


def test_override_whose_value_is_no_yaml():
    with pytest.raises(ConfigError, match=r"^Expected YAML after the = of 'a=\[1, 2'\. Got: (?s:.*)\. Quote the value\.$"):
        parse_override("a=[1, 2")


def test_defaults_then_files_then_overrides(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("seed: 1\nname: first\nsparsity: {target: 0.5, shape: {type: odd, power: 3}}\n")
    second.write_text("name: second\nsparsity: {shape: {power: 4}}\n")
    assert load(Outer) == Outer()
    assert load(Outer, [first]) == Outer(seed=1, name="first", sparsity=Inner(target=0.5, shape=Odd(power=3)))
    assert load(Outer, [first, second]) == Outer(seed=1, name="second", sparsity=Inner(target=0.5, shape=Odd(power=4)))
    assert load(Outer, [second, first]).name == "first"
    assert load(Outer, [first, second], ["name=third", "seed=1_0", "name=fourth"]) == Outer(
        seed=10, name="fourth", sparsity=Inner(target=0.5, shape=Odd(power=4))
    )
    # The other type inherits nothing; naming the same one starts from its defaults.
    assert load(Outer, [first, second], ["sparsity.shape.type=even"]).sparsity.shape == Even()
    assert load(Outer, [first, second], ["sparsity.shape.type=odd"]).sparsity.shape == Odd(power=2)
    assert load(Outer, [first], ["sparsity.shape.type=even", "sparsity.shape.weight=3e-4"]).sparsity.shape == Even(weight=3e-4)


def test_every_problem_in_one_error():
    with pytest.raises(ConfigError) as error:
        load(Outer, [], ["seed=-1", "sparsity.target=1", "sparsity.densty=0.5", "sparsity.levels.head=x", "nam=a"])
    assert str(error.value) == (
        "Expected a valid Outer. Got 5 problems:\n"
        "  seed: Input should be greater than or equal to 0 (got -1)\n"
        "  sparsity.target: Input should be less than 1 (got 1)\n"
        "  sparsity.levels.head: Input should be a valid number, unable to parse string as a number (got 'x')\n"
        "  sparsity.densty: no such key\n"
        "  nam: no such key\n"
        "Correct these keys; `raysparse VERB --keys` explains every key."
    )


def test_one_problem_and_an_unknown_type():
    with pytest.raises(ConfigError) as error:
        load(Outer, [], ["sparsity.shape.type=evn"])
    assert str(error.value) == (
        "Expected a valid Outer. Got 1 problem:\n"
        "  sparsity.shape: Input tag 'evn' found using 'type' does not match any of the expected tags: 'even', 'odd' "
        "(got {'type': 'evn'})\n"
        "Correct these keys; `raysparse VERB --keys` explains every key."
    )


def test_key_of_another_type_is_unknown():
    with pytest.raises(ConfigError, match=r"\n  sparsity\.shape\.weight: no such key\n"):
        load(Outer, [], ["sparsity.shape.type=odd", "sparsity.shape.weight=1"])


def test_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "b.yaml").touch()
    (tmp_path / "a.yaml").touch()
    with pytest.raises(ConfigError) as error:
        load(Outer, [tmp_path / "c.yaml"])
    assert str(error.value) == (
        f"Expected a config file at {tmp_path}/c.yaml. Got none there. Beside it lie: {tmp_path}/a.yaml, {tmp_path}/b.yaml."
    )
    for path in (tmp_path / "no" / "c.yaml", tmp_path.parent):  # a folder that is not there; a folder
        with pytest.raises(ConfigError, match=f"^Expected a config file at {path}. Got none there. "):
            read_yaml(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", r"^Expected YAML in .*x\.yaml\. Got: while parsing a flow sequence(?s:.*)\. Mend the file\.$"),
        (b"a: \xff", r"^Expected YAML in .*x\.yaml\. Got: 'utf-8' codec .*\. Mend the file\.$"),
        (
            b"a: !!python/object:os.system {}",
            r"^Expected YAML in .*x\.yaml\. Got: could not determine a constructor(?s:.*)Mend the file\.$",
        ),
        (b"- a\n- b\n", r"^Expected a mapping in .*x\.yaml\. Got a list\. Write `key: value` lines\.$"),
        (b"word", r"^Expected a mapping in .*x\.yaml\. Got a str\. Write `key: value` lines\.$"),
    ],
)
def test_malformed_file(tmp_path, content, message):
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load(Outer, [tmp_path / "x.yaml"])


def test_empty_file_is_an_empty_mapping(tmp_path):
    (tmp_path / "x.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "x.yaml") == {}


@pytest.mark.parametrize("name", ["run", "1e5", "3e-4", "-1_0e2", "1.5e+3", "12", "1_000", "0x1f", "true", "on", "null", "~", "",
                                  "12:30:45",
                                  "2020-01-01", "a: b", "# c", "é", "'", "line\nline", "=", "<<", " x "])  # fmt: skip
def test_yaml_round_trip(tmp_path, name):
    config = Outer(name=name, seed=3, sparsity=Inner(target=1e-05, shape=Odd(power=5), names=(name, "b"), levels={name: 1e-7}))
    (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load(Outer, [tmp_path / "config.yaml"]) == config


def test_yaml_is_complete_and_in_order():
    assert Outer().to_yaml() == (
        "name: run\nseed: 0\nsparsity:\n  target: 0.0\n  shape:\n    type: even\n    weight: 1.0\n  names: []\n  levels: {}\n"
    )


def test_digest():
    assert Outer().digest() == "0a7394257160a57c"  # the same on any machine, forever
    assert load(Outer, [], ["sparsity.target=0", "name=run"]).digest() == Outer().digest()
    others = [Outer(seed=1), Outer(name="b"), Outer(sparsity=Inner(target=0.5)), Outer(sparsity=Inner(shape=Odd()))]
    assert len({config.digest() for config in [Outer(), *others]}) == 5
    levels = [Outer(sparsity=Inner(levels=dict(pairs))).digest() for pairs in ([("a", 0.1), ("b", 0.2)], [("b", 0.2), ("a", 0.1)])]
    assert levels[0] == levels[1]


def test_frozen():
    config = Outer()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config, "seed", 1)  # noqa: B010
    with pytest.raises(ValidationError, match="frozen"):
        setattr(config.sparsity, "target", 0.5)  # noqa: B010
    assert config == Outer()


def test_field_docstrings_are_descriptions():
    class Told(Config):
        size: int = 1
        """How large."""

    assert Told.model_fields["size"].description == "How large."
