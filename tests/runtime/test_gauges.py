"""A run's numbers on Ray's metrics endpoint."""

import io
import os
import time
from threading import Thread
from urllib.request import urlopen

import pytest

from raysparse.config import merge
from raysparse.recipes import pretrain
from raysparse.runtime.gauges import NUMBERS, Gauges
from raysparse.runtime.launch import launch
from raysparse.train.metrics import Console

pytestmark = pytest.mark.ray


def test_the_phase_that_is_left_is_zero(monkeypatch):
    seen = {}

    class Gauge:
        def __init__(self, name, description, tag_keys):
            self.name = name

        def set(self, value, tags):
            seen[self.name, *tags.values()] = value

    monkeypatch.setattr("ray.util.metrics.Gauge", Gauge)
    gauges, record = Gauges(), dict.fromkeys(NUMBERS, 2) | {"stage": "mst", "phase": "warm_up"}
    gauges.set({"text": "nothing"})
    gauges.set(record)
    gauges.set(record | {"phase": "ultra", "sparsity": 0.8})
    assert seen == {(f"raysparse_{name}", "mst"): 2.0 for name in NUMBERS} | {
        ("raysparse_sparsity", "mst"): 0.8,
        ("raysparse_phase", "mst", "warm_up"): 0.0,
        ("raysparse_phase", "mst", "ultra"): 1.0,
    }


@pytest.mark.slow
def test_prometheus_may_collect_a_run(ray_instance, pretrain_values):
    """Ray's agent of the node collects every few seconds what its workers say."""
    more = {"run": {"name": "seen", "workers": 2}, "training": {"length": 800, "validate_every": 800}, "checkpoint": {"every": 800}}
    config = pretrain.PretrainConfig.check(merge(pretrain_values, more))
    job = pretrain.open_run(config)
    run = Thread(target=launch, args=([job], config.run, Console(io.StringIO())))
    run.start()
    (node,) = [node for node in ray_instance.nodes() if node["Alive"]]
    address, wanted = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", {*NUMBERS, "phase"}
    found: dict[str, float] = {}
    while run.is_alive() and {*found} != wanted:
        lines = urlopen(address, timeout=10).read().decode().splitlines()
        told = [line for line in lines if line.startswith("ray_raysparse_") and 'run="seen"' in line]
        found = {line.split("{")[0].removeprefix("ray_raysparse_"): float(line.split()[-1]) for line in told}
        time.sleep(0.5)
    run.join()
    assert {*found} == wanted, os.linesep.join(found)
    assert found["sparsity"] == pytest.approx(0.75, abs=0.01)
    assert found["phase"] == 1
