"""The last lines of a run."""

import pytest

from raysparse.recipes import _cost_of_a_worker

KEPT = {"weights": 4_000_000, "gradients": 4_000_000, "moments": 2_000_000, "dense_moments": 8_000_000}
SUMMARY = {"steps": 20, "memory_bytes": KEPT, "peak_memory_bytes": 9_000_000_000, "bytes_sent": 12_300_000, "dense_bytes_sent": 24_600_000}
MEMORY = "memory            4.0 MB weights, 4.0 MB gradients, 2.0 MB moments (8.0 MB if of all weights), 9.0 GB at the peak"


@pytest.mark.parametrize(("seconds", "told"), [(2.5, "; 0.125 s in collectives"), (0.0, "")])
def test_what_a_worker_sent_and_kept(seconds, told):
    sent = f"sent in a step    615.0 kB by a worker at most, 1.2 MB with its zeros{told}"
    assert _cost_of_a_worker(SUMMARY | {"wire_seconds": seconds}) == [sent, MEMORY]


def test_one_worker_sends_nothing():
    assert _cost_of_a_worker(SUMMARY | {"bytes_sent": 0, "dense_bytes_sent": 0, "wire_seconds": 0.0}) == [MEMORY]
