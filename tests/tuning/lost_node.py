"""A search on two nodes, of which the one that a trial runs on is lost: ``python -m tests.tuning.lost_node SEARCH.yaml``."""

import os
import sys
import tempfile
import time
from pathlib import Path
from threading import Thread

os.environ |= {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "3", "RAY_AUTH_MODE": "disabled"}


def main(file: str) -> None:
    import psutil
    import ray
    from ray.cluster_utils import Cluster

    from raysparse.config import load
    from raysparse.runtime.launch import SETTINGS
    from tuning import search
    from tuning.config import SearchConfig

    os.environ |= SETTINGS
    config = load(SearchConfig, [file])
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 << 20, "temp_dir": tempfile.mkdtemp(prefix="rs")}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=80 << 20) for _ in range(2)]
    ray.init(address=cluster.address, namespace="raysparse", log_to_driver=False, logging_level="ERROR")
    thread = Thread(target=search.search, args=(config, False))
    thread.start()
    while not list(config.path.glob("trials/*/checkpoints/*/COMMITTED.json")):
        assert thread.is_alive()
        time.sleep(0.1)
    (trial,) = (process for process in psutil.process_iter() if _is_trial(process, nodes))
    (lost,) = (node for node in nodes if _raylet(node) == trial.ppid())
    cluster.remove_node(lost, allow_graceful=False)
    print("a node is lost", file=sys.stderr, flush=True)  # what trials print to stdout is not shown
    thread.join()
    ray.shutdown()
    cluster.shutdown()


def _raylet(node: object) -> int:
    return node.all_processes["raylet"][0].process.pid  # pyrefly: ignore


def _is_trial(process: object, nodes: list) -> bool:
    """Whether it is a trial of these nodes; others run searches too."""
    return process.name().startswith("ray::Impl") and process.ppid() in {_raylet(node) for node in nodes}  # pyrefly: ignore


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main(sys.argv[1])
