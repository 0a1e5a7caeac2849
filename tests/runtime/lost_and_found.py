"""An elastic run on two nodes, of which one is lost and another comes: ``python -m tests.runtime.lost_and_found CONFIG.yaml``.

Prints as JSON when what happened, in seconds since the loss, and since the new node.
"""

import json
import sys
import time

from tests.runtime import nodes, slow
from tests.runtime.slow import last


def main(file: str) -> None:
    from raysparse.config import load
    from raysparse.recipes import pretrain

    config = load(pretrain.PretrainConfig, [file])
    slow.be_slow()
    with nodes.cluster() as cluster:
        _, lost = [nodes.add(cluster, 1) for _ in range(2)]
        run = nodes.Launch([pretrain.open_run(config)], config.run)
        run.until(lambda: last(config.run.path)["step"] >= 40)
        began = time.monotonic()
        cluster.remove_node(lost, allow_graceful=False)
        run.until(lambda: last(config.run.path)["workers"] == 1)
        told = {"smaller_s": time.monotonic() - began}
        began = time.monotonic()
        nodes.add(cluster, 1)
        run.until(lambda: last(config.run.path)["workers"] == 2)
        told["larger_s"] = time.monotonic() - began
        run.finish()
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
