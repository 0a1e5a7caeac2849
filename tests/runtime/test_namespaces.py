"""Two hosts with a cable between them: network namespaces, a raylet in each. As root, on Linux with `ip` and `tc`."""

import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from benchmarks.wire import NETWORK, Link, network, refusal
from raysparse.config import merge
from raysparse.recipes import pretrain
from raysparse.recipes.job import Job
from raysparse.runtime.launch import ELASTIC
from raysparse.runtime.local import run_here
from raysparse.train.metrics import Console
from tests.ranks import spawn
from tests.runtime.slow import last
from tests.runtime.test_nodes import alone, digests, records, values, weights

pytestmark = [pytest.mark.slow, pytest.mark.ray]
PORT = 6391
ENVIRON = os.environ | ELASTIC | {
    "RAY_AUTH_MODE": "disabled", "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "RAY_ADDRESS": f"{NETWORK}.1:{PORT}",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1", "RAY_health_check_initial_delay_ms": "2000", "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000", "RAY_health_check_failure_threshold": "5", "RAY_raylet_start_wait_time_s": "120",
}  # fmt: skip


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """Names of two namespaces: 1 Gbit/s between them, and 2 ms each way where the kernel can delay."""
    if (why := refusal()) is not None:
        pytest.skip(why)
    with network(Link(2, 1)) as names:
        for name in names:
            ip("-n", name, "route", "add", "default", "dev", "eth0")  # by which Ray finds its own address
            delay = ["tc", "-n", name, "qdisc", "replace", "dev", "eth0", "root", "netem", "delay", "2ms", "rate", "1gbit"]
            subprocess.run(delay, check=False, capture_output=True)
        yield names


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextmanager
def ray_node(host: str, number: int) -> Iterator[None]:
    """A raylet with 1 CPU on a host; the first one is the head. Its own process group is all that is ended."""
    folder = tempfile.mkdtemp(prefix="rs")
    words = [f"--node-ip-address={NETWORK}.{number + 1}", "--num-cpus=1", "--object-store-memory=83886080", "--disable-usage-stats"]
    if number == 0:
        words += ["--head", f"--port={PORT}", f"--temp-dir={folder}", "--include-dashboard=false"]
    else:
        words += [f"--address={NETWORK}.1:{PORT}"]
    command = ["ip", "netns", "exec", host, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *words]
    environ = {key: value for key, value in ENVIRON.items() if key != "RAY_ADDRESS"}
    with (Path(folder) / "start.log").open("w") as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True)
    try:
        wait(lambda: "To terminate" in (Path(folder) / "start.log").read_text() or process.poll() is not None, 200)
        assert process.poll() is None, (Path(folder) / "start.log").read_text()
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait(done: Any, patience_s: float, process: subprocess.Popen[str] | None = None) -> None:
    """Args:
    process: that is to live meanwhile.
    """
    deadline = time.monotonic() + patience_s
    while not done():
        assert process is None or process.poll() is None, process.communicate()[1][-4000:]
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.1)


@contextmanager
def driver(host: str, wanted: dict[str, Any], folder: Path, module: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    file = folder / f"{wanted['run']['name']}.yaml"
    file.write_text(yaml.safe_dump(wanted))
    command = ["ip", "netns", "exec", host, sys.executable, "-m", module, *words, str(file)]
    process = subprocess.Popen(command, env=ENVIRON, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ended_well(process: subprocess.Popen[str], patience_s: float = 500) -> None:
    _, said = process.communicate(timeout=patience_s)
    assert process.returncode == 0, said[-4000:]


def on_ranks(wanted: dict[str, Any]) -> str:
    """Train on the ranks of this process group."""
    config = pretrain.PretrainConfig.check(wanted)
    jobs: list[Job] = [pretrain.open_run(config)] if dist.get_rank() == 0 else []
    run_here(jobs, config.run, Console(io.StringIO()))
    return str(config.run.path)


def test_two_hosts_end_with_the_bits_of_one(hosts, pretrain_values, tmp_path):
    """Nobody sets GLOO_SOCKET_IFNAME: the host name leads nowhere in here, and the run finds the interface by Ray's address."""
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    wanted = values(pretrain_values, "two", "mixed", run={"workers": 2, "parity": False})
    with ray_node(hosts[0], 0), ray_node(hosts[1], 1), driver(hosts[0], wanted, tmp_path, "raysparse", "pretrain") as run:
        ended_well(run)
    here = Path(spawn(on_ranks, 2, merge(wanted, {"run": {"name": "here"}}))[0])
    there = here.with_name("two")
    assert digests(there) == digests(here)
    a, b = weights(here), weights(there)
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def test_a_cut_link(hosts, pretrain_values, tmp_path):
    """A host cannot be reached: the run goes on without it, and with it when the link is back and Ray is started there again."""
    more = {"training": {"length": 1600, "validate_every": 1600}, "checkpoint": {"every": 20}, "logging": {"every": 1}}
    wanted = merge(values(pretrain_values, "cut", "mixed", run={"workers": [1, 2]}), more)
    wanted = merge(wanted, {"sparsity": {"evolution": {"update_interval": 40}}})
    folder, cable = Path(wanted["run"]["folder"]) / "cut", hosts[1].replace("-", "o")
    with ExitStack() as stack:
        stack.enter_context(ray_node(hosts[0], 0))
        with ray_node(hosts[1], 1):
            run = stack.enter_context(driver(hosts[0], wanted, tmp_path, "tests.runtime.slow"))
            wait(lambda: last(folder)["step"] >= 40 and last(folder)["workers"] == 2, 240, run)
            ip("link", "set", cable, "down")
            cut = time.monotonic()
            wait(lambda: last(folder)["workers"] == 1, 240, run)
            print(f"on one host {time.monotonic() - cut:.0f} s after the cut")
            ip("link", "set", cable, "up")
        back = time.monotonic()
        with ray_node(hosts[1], 1):
            wait(lambda: last(folder)["workers"] == 2, 240, run)
            print(f"on two hosts {time.monotonic() - back:.0f} s after the link was back")
            ended_well(run)
    whole = alone(merge(wanted, {"run": {"name": "whole"}})).path
    sizes = [record["workers"] for record in records(folder)]
    assert [size for i, size in enumerate(sizes) if i == 0 or sizes[i - 1] != size] == [2, 1, 2]
    assert digests(folder) == digests(whole)
    a, b = weights(whole), weights(folder)
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
