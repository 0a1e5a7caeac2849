"""Ask the mask manager of a run that trains on Ray, from any other process.

The question is put by a process of its own, which joins the cluster, asks and ends: one that hangs, on a cluster that does not
answer, is ended in time.
"""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MANAGER = "manager.json"
"""In the folder of a run that is training on Ray: its manager's name and namespace, the cluster's address and kind of authentication."""
NAMESPACE = "raysparse"


def ask(folder: Path, timeout_s: float = 10.0) -> tuple[dict[str, Any], float]:
    """`MaskManager.view` of a run, and the seconds it took.

    Raises:
        ConnectionError: there is no manager, or no answer in time.
    """
    began = time.perf_counter()
    file = folder / MANAGER
    if not file.exists():
        raise ConnectionError("no manager is running on Ray")
    address = json.loads(file.read_text())
    command = [sys.executable, "-m", __name__, address["address"], address["namespace"], address["name"]]
    env = os.environ | {"RAY_AUTH_MODE": address["auth"]}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise ConnectionError(f"the cluster at {address['address']} gave no answer within {timeout_s:g} s") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise ConnectionError(f"the manager on the cluster at {address['address']} did not answer ({reason})")
    return json.loads(done.stdout.splitlines()[-1]), time.perf_counter() - began


def main(address: str, namespace: str, name: str) -> None:
    """Print the view of the manager `name` as one line of JSON."""
    import ray

    ray.init(address=address, namespace=namespace, logging_level=logging.ERROR, log_to_driver=False)
    print(json.dumps(ray.get(ray.get_actor(name).view.remote())))


if __name__ == "__main__":
    main(*sys.argv[1:])
