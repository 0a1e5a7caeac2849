"""A run's numbers on Ray's own metrics endpoint: its dashboard draws them, Prometheus collects them."""

from collections.abc import Mapping
from typing import Any

NUMBERS = {
    "tokens_per_s": "tokens a second over all workers, since the last console line",
    "loss": "training loss, nats per predicted token",
    "sparsity": "zeros over the sparse weights",
    "attention_density": "computed share of full causal attention",
    "step": "training steps done",
    "step_seconds": "seconds of a step",
    "wire_seconds": "seconds of a step in collectives, of worker 0",
}
"""Field of a training record -> what it is; ``raysparse_FIELD`` with the run's name as tag ``run``."""


class Gauges:
    """Set at each console line; ``raysparse_phase`` is 1 for the phase that the run is in and 0 for those that it has left."""

    def __init__(self) -> None:
        from ray.util.metrics import Gauge

        self._gauges = {name: Gauge(f"raysparse_{name}", description=what, tag_keys=("run",)) for name, what in NUMBERS.items()}
        self._phase = Gauge("raysparse_phase", description="1: the phase of the timeline that the run is in", tag_keys=("run", "phase"))
        self._phases: set[str] = set()

    def set(self, record: Mapping[str, Any]) -> None:
        """Take over a training record; others say nothing."""
        if "loss" not in record:
            return
        run = {"run": record["stage"]}
        for name, gauge in self._gauges.items():
            gauge.set(float(record[name]), run)
        self._phases.add(record["phase"])
        for phase in self._phases:
            self._phase.set(float(phase == record["phase"]), run | {"phase": phase})
