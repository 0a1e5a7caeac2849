"""Curves against values worked out by hand; nothing is rounded on the way but the cosine."""

from fractions import Fraction as F
from typing import get_args

import pytest

from raysparse.config import Config, ConfigError
from raysparse.sparsity.curve import AnyCurve, Constant, Cosine, Polynomial, Table, decimal


class Holder(Config):
    curve: AnyCurve


@pytest.mark.parametrize(
    ("curve", "values"),
    [
        # progress    0        1/4            1/2          3/4           1
        (Constant(), [1, 1, 1, 1, 1]),
        (Constant(value=0.3), [F(3, 10)] * 5),
        (Constant(value=0), [0] * 5),
        (Polynomial(), [0, 1 - F(27, 64), 1 - F(1, 8), 1 - F(1, 64), 1]),
        (Polynomial(power=1), [0, F(1, 4), F(1, 2), F(3, 4), 1]),
        (Polynomial(power=2), [0, F(7, 16), F(3, 4), F(15, 16), 1]),
        (Polynomial(mirrored=True), [0, F(1, 64), F(1, 8), F(27, 64), 1]),
        (Polynomial(start=1, end=0), [1, F(27, 64), F(1, 8), F(1, 64), 0]),
        (Polynomial(start=1, end=0, mirrored=True), [1, F(63, 64), F(7, 8), F(37, 64), 0]),
        (Polynomial(start=0.5, end=0.9, power=1), [F(1, 2), F(6, 10), F(7, 10), F(8, 10), F(9, 10)]),
        (Cosine(), [0, F("0.146446609407"), F(1, 2), F("0.853553390593"), 1]),
        (Cosine(start=1, end=0.5), [1, 1 - F("0.0732233047035"), F(3, 4), F("0.5732233047035"), F(1, 2)]),
        (Table(points=((0, 0), (0.25, 0.5), (0.7, 1))), [0, F(1, 2), F(1, 2), 1, 1]),
        (Table(points=((0, 0.9), (1, 0.1))), [F(9, 10)] * 4 + [F(1, 10)]),
    ],
    ids=str,
)
def test_by_hand(curve, values):
    found = [curve.at(F(quarter, 4)) for quarter in range(5)]
    assert found == values
    assert all(type(value) is F for value in found)


def test_restoration_is_the_warm_up_mirrored_in_time():
    up, down = Polynomial(), Polynomial(start=1, end=0, mirrored=True)
    assert all(down.at(F(k, 17)) == up.at(1 - F(k, 17)) for k in range(18))


@pytest.mark.parametrize("curve", [Polynomial(), Polynomial(mirrored=True), Cosine(), Polynomial(power=7), Polynomial(start=0.2, end=0.7)])
def test_rises_within_its_ends(curve):
    values = [curve.at(F(k, 999)) for k in range(1000)]
    assert values == sorted(values)
    assert (values[0], values[-1]) == (decimal(curve.start), decimal(curve.end))


def test_a_table_steps_at_the_decimal_it_is_written_as():
    table = Table(points=((0, 0), (0.1, 1)))  # as a float 0.1 is more than a tenth
    assert [table.at(F(k, 1000)) for k in (99, 100, 101)] == [0, 1, 1]


@pytest.mark.parametrize("kind", get_args(get_args(AnyCurve)[0]), ids=lambda kind: kind.__name__)
def test_only_constant_is_constant(kind):
    curve = Table(points=((0, 1),)) if kind is Table else kind()
    assert curve.is_constant == (kind is Constant)
    assert Holder.check({"curve": curve.model_dump(mode="json")}).curve == curve


@pytest.mark.parametrize(
    ("curve", "problem"),
    [
        ({"type": "constant", "value": 1.5}, "curve.value: Input should be less than or equal to 1 (got 1.5)"),
        ({"type": "constant", "value": -0.1}, "curve.value: Input should be greater than or equal to 0 (got -0.1)"),
        ({"type": "polynomial", "power": 0}, "curve.power: Input should be greater than or equal to 1 (got 0)"),
        ({"type": "polynomial", "end": 2}, "curve.end: Input should be less than or equal to 1 (got 2)"),
        ({"type": "cosine", "start": float("nan")}, "curve.start: Input should be "),
        ({"type": "table", "points": []}, "curve.points: Tuple should have at least 1 item"),
        ({"type": "table", "points": [[0.5, 1]]}, "Expected points from progress 0 on, each later than the one before. Got progress [0.5]"),
        (
            {"type": "table", "points": [[0, 0], [0.5, 1], [0.5, 0]]},
            "Expected points from progress 0 on, each later than the one before. Got progress [0.0, 0.5, 0.5]",
        ),
        ({"type": "cubic"}, "Input tag 'cubic' found using 'type' does not match any of the expected tags"),
    ],
)
def test_what_is_refused(curve, problem):
    with pytest.raises(ConfigError) as error:
        Holder.check({"curve": curve})
    assert problem in str(error.value)
