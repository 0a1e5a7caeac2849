"""Ray nodes on this machine, each a raylet of its own. A script's: `Cluster` adds nodes from the main thread of a process alone."""

import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_raylet_start_wait_time_s": "120", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1"}
os.environ |= {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "5", "RAY_health_check_initial_delay_ms": "2000"}
MEMORY = 80 << 20


@contextmanager
def cluster() -> Iterator[Any]:
    """A Ray cluster whose head has no CPUs, so that workers are on the nodes that are added; this process is its driver."""
    import ray
    from ray.cluster_utils import Cluster

    from raysparse.runtime.launch import ELASTIC

    for key, value in ELASTIC.items():
        os.environ.setdefault(key, value)
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": MEMORY, "temp_dir": tempfile.mkdtemp(prefix="rs")}
    found = Cluster(initialize_head=True, head_node_args=head)
    try:
        ray.init(address=found.address, namespace="raysparse", log_to_driver=False, logging_level="ERROR")
        yield found
    finally:
        ray.shutdown()
        found.shutdown()


def add(found: Any, num_cpus: int) -> Any:
    return found.add_node(num_cpus=num_cpus, object_store_memory=MEMORY)


class Launch(Thread):
    """`launch` in a thread."""

    def __init__(self, jobs: list[Any], run: Any):
        super().__init__()
        self.jobs, self.config, self.problem = jobs, run, None
        self.start()

    def run(self) -> None:
        from raysparse.runtime.launch import launch
        from raysparse.train.metrics import Console

        try:
            launch(self.jobs, self.config, Console(io.StringIO()))
        except BaseException as error:
            self.problem = error

    def until(self, done: Callable[[], Any], patience_s: float = 240.0) -> None:
        deadline = time.monotonic() + patience_s
        while not done():
            assert self.is_alive(), self.problem or "the run has ended"
            assert time.monotonic() < deadline, "nothing happened"
            time.sleep(0.05)

    def finish(self) -> None:
        self.join()
        if self.problem is not None:
            raise self.problem
