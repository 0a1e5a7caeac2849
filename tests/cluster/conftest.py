"""A Ray head of the tests' own: its ports, its folder, its process; nothing of another Ray on this machine is touched."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from raysparse.runtime.launch import SETTINGS

ROOT = Path(__file__).parents[2]
ENVIRON = os.environ | {
    "RAY_AUTH_MODE": "disabled",
    "PYTHONPATH": str(ROOT),
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "OMP_NUM_THREADS": "1",
} | {key: value for key, value in SETTINGS.items() if key != "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"}  # fmt: skip
PORTS = ("port", "ray-client-server-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port")


def free_ports(number: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [server.getsockname()[1] for server in held]
    for server in held:
        server.close()
    return ports


@contextmanager
def ray_head(environ: dict[str, str]) -> Iterator[tuple[str, str]]:
    """The addresses of the dashboard and of the cluster: a Ray with 4 logical CPUs, which ends with the block."""
    folder = tempfile.mkdtemp(prefix="rs")  # short: a socket's path has at most 107 bytes
    dashboard, *ports = free_ports(1 + len(PORTS))
    words = ["start", "--head", "--block", "--num-cpus=4", "--num-gpus=0", f"--temp-dir={folder}", "--object-store-memory=134217728"]
    words += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--disable-usage-stats"]
    words += ["--min-worker-port=0", "--max-worker-port=0", *(f"--{name}={port}" for name, port in zip(PORTS, ports, strict=True))]
    log = Path(folder) / "start.log"
    with log.open("w") as stream:
        command = [str(Path(sys.executable).with_name("ray")), *words]
        ray = subprocess.Popen(command, env=environ, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while not (_answers(dashboard) and (found := re.search(rf"[\d.]+:{ports[0]}\b", log.read_text()))):
            assert ray.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{dashboard}", found[0]
    finally:
        ray.send_signal(signal.SIGTERM)  # it ends its daemons
        ray.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def head() -> Iterator[str]:
    """The address of the dashboard of a Ray without tokens."""
    with ray_head(ENVIRON) as (dashboard, _):
        yield dashboard


@pytest.fixture(scope="session")
def two_nodes() -> Iterator[str]:
    """The address of a cluster of two Ray nodes on this machine."""
    from ray.cluster_utils import Cluster

    settings, folder = {"num_gpus": 0, "object_store_memory": 128 << 20}, tempfile.mkdtemp(prefix="rs")
    with pytest.MonkeyPatch.context() as patch:  # what the nodes inherit
        for key, value in ENVIRON.items():
            patch.setenv(key, value)
        cluster = Cluster(initialize_head=True, head_node_args=settings | {"num_cpus": 2, "temp_dir": folder})
        cluster.add_node(num_cpus=3, **settings)
    yield cluster.address
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A job server that follows a script."""
    from tests.cluster.server import Server

    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("cluster.client.RETRY_S", 0.05)
    found = Server()
    yield found
    found.close()
    os.environ.pop("RAY_API_SERVER_ADDRESS", None)


def _answers(port: int) -> bool:
    from urllib.error import HTTPError
    from urllib.request import urlopen

    try:
        with urlopen(f"http://127.0.0.1:{port}/api/version", timeout=2) as answer:
            return answer.status == 200
    except HTTPError as error:
        return error.code == 401  # it wants a token
    except OSError:
        return False
