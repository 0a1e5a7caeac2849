"""Warm-up, decay, end: the learning rate as a share of its peak."""

import math
from itertools import pairwise

import pytest

from raysparse.config import ConfigError
from raysparse.train.optimizer import ScheduleConfig


def factors(num_steps, warmup, **config):
    schedule = ScheduleConfig.check(config)
    return [schedule.factor(step, warmup, num_steps) for step in range(num_steps)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_warm_up_is_linear_from_above_zero_to_the_peak(kind):
    #                                 1/4   2/4   3/4   4/4  then the peak once more, where the decay begins
    assert factors(12, 4, decay=kind)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors(12, 0, decay=kind)[0] == 1.0
    assert factors(12, 1, decay=kind)[:2] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("kind", "drawn"),
    [
        #            progress: 0    1/4                                         1/2   3/4
        ("cosine", [1.0, 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2, 0.6, 0.2 + 0.8 * (1 - math.sqrt(0.5)) / 2]),
        ("linear", [1.0, 0.8, 0.6, 0.4]),
        ("constant", [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_decay(kind, drawn):
    assert factors(6, 2, decay=kind, final=0.2)[2:] == pytest.approx(drawn, abs=1e-15)


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_end(kind, final):
    schedule = ScheduleConfig(decay=kind, final=final)
    assert schedule.factor(1000, 100, 1000) == pytest.approx(final, abs=1e-15)
    assert schedule.factor(5000, 100, 1000) == pytest.approx(final, abs=1e-15)  # past the end nothing rises again
    assert schedule.factor(999, 100, 1000) == pytest.approx(final, abs=2e-3)  # the last step of the run
    whole = [schedule.factor(step, 100, 1000) for step in range(1000)]
    assert all(a >= b for a, b in pairwise(whole[100:]))
    assert all(final <= factor <= 1 for factor in whole[100:])


def test_spdf_gpt2_small():
    """4,768 steps, 715 of warm-up, cosine to a tenth (arXiv:2303.10464): peak, middle and end of the decay."""
    schedule = ScheduleConfig()
    assert schedule.factor(0, 715, 4768) == 1 / 715
    assert schedule.factor(714, 715, 4768) == 1.0
    assert schedule.factor(715 + (4768 - 715) // 2, 715, 4768) == pytest.approx(0.55, abs=2e-4)
    assert schedule.factor(4767, 715, 4768) == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize(("num_steps", "warmup"), [(1, 0), (1, 1), (5, 5), (5, 9)])
def test_runs_that_are_all_warm_up(num_steps, warmup):
    found = factors(num_steps, warmup)
    assert found == [(step + 1) / warmup if warmup else 1.0 for step in range(num_steps)]
    assert all(0 < factor <= 1 for factor in found)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"decay": "step"}, "decay: Input should be 'cosine', 'linear' or 'constant' (got 'step')"),
        ({"final": 1.5}, "final: Input should be less than or equal to 1 (got 1.5)"),
        ({"final": -0.1}, "final: Input should be greater than or equal to 0 (got -0.1)"),
        ({"warmup": "long"}, "warmup: Expected a length such as "),
        ({"warm_up": 5}, "warm_up: no such key"),
    ],
)
def test_errors(config, problem):
    with pytest.raises(ConfigError) as error:
        ScheduleConfig.check(config)
    assert f"\n  {problem}" in str(error.value)
