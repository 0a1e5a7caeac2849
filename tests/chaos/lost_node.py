"""A run of two workers on a cluster with three nodes for them, of which one is lost: ``python -m tests.chaos.lost_node CONFIG FOLDER``.

Once there is a file ``now`` in the folder the node goes, and ``lost`` is made.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from threading import Thread

os.environ |= {"RAY_AUTH_MODE": "disabled"}


def main(file: str, folder: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster

    from raysparse.config import load
    from raysparse.recipes import pretrain
    from raysparse.runtime.launch import SETTINGS, launch
    from raysparse.train.metrics import Console
    from tests.chaos.seen import pids, stat

    os.environ |= SETTINGS
    config = load(pretrain.PretrainConfig, [file])
    small = {"num_gpus": 0, "object_store_memory": 80 << 20}
    head = small | {"num_cpus": 0, "include_dashboard": False, "temp_dir": tempfile.mkdtemp(prefix="rs")}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = {node.all_processes["raylet"][0].process.pid: node for node in (cluster.add_node(num_cpus=1, **small) for _ in range(3))}
    ray.init(address=cluster.address, namespace="raysparse", log_to_driver=False, logging_level="ERROR")
    job = pretrain.open_run(config)
    thread = Thread(target=launch, args=([job], config.run, Console()))
    thread.start()
    while not (folder / "now").exists():
        assert thread.is_alive()
        time.sleep(0.01)
    (folder / "lost").touch()
    cluster.remove_node(nodes[int(stat(pids(job.path)[1])[1])], allow_graceful=False)
    thread.join()
    ray.shutdown()
    cluster.shutdown()
    assert (job.path / "summary.json").exists()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main(sys.argv[1], Path(sys.argv[2]))
