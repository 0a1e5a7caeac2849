"""What a node says of itself. Sent to the nodes by value and free of raysparse, for one may have none."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from raysparse.runtime.interface import VARIABLE, interface_of

PACKAGES = ("torch", "ray", "raysparse")


class Probe:
    """An actor, one on each node; it takes nothing of the cluster's CPUs."""

    def facts(self) -> dict[str, Any]:
        from ray.util import get_node_ip_address

        memory = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
        return {
            "host": platform.node(),
            "versions": {"python": platform.python_version()} | {name: self._version(name) for name in PACKAGES},
            "cores": os.cpu_count(),
            "interface": os.environ.get(VARIABLE) or interface_of(get_node_ip_address()),
            "gpus": self._gpus(),
            "shm_bytes": None if memory is None else memory.f_blocks * memory.f_frsize,
        }

    def clock(self) -> float:
        return time.time()

    def give(self, num_bytes: int) -> Any:
        """An object of random bytes: what is sent cannot be compressed."""
        return os.urandom(num_bytes)

    def take(self, references: list[Any]) -> float:
        """Seconds until an object of another node is here."""
        import ray

        began = time.perf_counter()
        ray.get(references[0])
        return time.perf_counter() - began

    def visit(self, folder: str, name: str, patience_s: float) -> str | None:
        """See the file ``driver`` in a folder, and leave one of that name; returns what is wrong."""
        mark, deadline = Path(folder) / "driver", time.monotonic() + patience_s
        while not mark.exists():  # a network file system may remember for a while that there was none
            if time.monotonic() > deadline:
                return f"does not see {folder}"
            time.sleep(0.1)
        try:
            (Path(folder) / name).write_text(name)
        except OSError as error:
            return f"cannot write to it: {error.strerror}"
        return None

    def _version(self, package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "none"

    def _gpus(self) -> list[str]:
        """By the driver: Ray hides GPUs from who did not ask for one."""
        if shutil.which("nvidia-smi") is None:
            return []
        done = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False)
        return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []
