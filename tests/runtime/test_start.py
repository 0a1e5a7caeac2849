"""Which Ray a run is on."""

import pytest

from raysparse.runtime import launch
from raysparse.train.run import RunConfig


@pytest.fixture
def asked(monkeypatch):
    """What ray.init is called with."""
    import ray

    calls = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: calls.append(settings))
    monkeypatch.setattr(launch.os, "cpu_count", lambda: 8)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return calls


def test_without_an_address_it_is_one_of_its_own(asked):
    """Even where `ray start` has one running on this machine, which Ray would find by a file."""
    assert launch.start(RunConfig(workers=2), spare=1)
    assert (asked[0]["address"], asked[0]["num_cpus"], asked[0]["include_dashboard"]) == ("local", 9, False)


def test_with_an_address_it_is_that(asked, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert launch.start(RunConfig(workers=2))
    assert "address" not in asked[0]
    assert "num_cpus" not in asked[0]
