"""The process that drives a run is killed, stopped, started twice, or lost with the head node it is on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from raysparse.config import merge
from raysparse.recipes.lease import LEASE_S
from tests.chaos.seen import EVERY, Fault, check_equal, differing, ends, family, pids, stat
from tests.cluster.conftest import ENVIRON, ROOT, ray_head

COMMAND = [sys.executable, "-m", "raysparse", "pretrain"]


def written(folder: Path, found: dict[str, Any]) -> str:
    file = folder / f"{found['run']['name']}.yaml"
    file.write_text(yaml.safe_dump(found))
    return str(file)


@contextmanager
def started(command: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """A command that goes on while inside."""
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRON, stdout=stream, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait(what: Callable[[], Any], log: Path, process: subprocess.Popen | None = None, timeout_s: float = 600.0) -> None:
    """Until it is so; a process that ends before fails the test."""
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        assert process is None or process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.02)


def of_driver(folder: Path) -> list[str]:
    return [file.name for file in folder.glob("driver.*.json")]


# --- one after another ------------------------------------------------------------------------------------------------


def test_the_driver_is_killed(values, calm, tmp_path, outcome):
    """One of its workers is stopped before, wakes up when the next driver trains, and spoils nothing."""
    config = values("driver")
    command, folder = [*COMMAND, written(tmp_path, config)], Path(config["run"]["folder"]) / "driver"
    stale: list[int] = []
    with started(command, tmp_path / "first") as first:

        def strike() -> None:
            stale.append(pids(folder)[0])
            os.kill(stale[0], signal.SIGSTOP)
            first.kill()
            first.wait()

        with Fault(folder, 50, strike) as fault:
            wait(lambda: fault.struck, tmp_path / "first")
            with started(command, tmp_path / "second") as second:
                wait(lambda: "going on from step_" in (tmp_path / "second").read_text(), tmp_path / "second", second)
                with suppress(ProcessLookupError):  # its raylet may have ended it by now
                    os.kill(stale[0], signal.SIGCONT)
                assert second.wait(900) == 0, (tmp_path / "second").read_text()[-3000:]
    assert ends(stale[0])
    check_equal(calm, folder)
    assert of_driver(folder) == []
    outcome("driver SIGKILL, the same command again", "it takes over at once; old workers are fenced", fault.seconds, fault.lost, EVERY)


def test_a_driver_that_was_thought_dead_writes_nothing(pretrain_values, tmp_path, outcome):
    """It is stopped when a checkpoint lacks its last act, as if on a machine that cannot be asked, and wakes when the next one is done."""
    few = {"run": {"name": "stale"}, "training": {"length": 80}, "checkpoint": {"every": EVERY}, "kernels": "dense"}
    config = merge(pretrain_values, few)  # no journal of masks that would stop it
    file, folder = written(tmp_path, config), Path(config["run"]["folder"]) / "stale"
    words = ["pretrain", file, "--local"]
    with started([sys.executable, "-m", "tests.chaos.stopped_in_commit", "40", *words], tmp_path / "first") as first:
        wait(lambda: stat(first.pid)[0] == "T", tmp_path / "first", first)
        of_first = folder / "driver.1.json"
        of_first.write_text(json.dumps(json.loads(of_first.read_text()) | {"place": "far away"}))
        struck = time.time()
        with started([*COMMAND, *words[1:]], tmp_path / "second") as second:
            wait(lambda: "going on from step_" in (tmp_path / "second").read_text(), tmp_path / "second", second)
            seconds = time.time() - struck
            assert second.wait(900) == 0, (tmp_path / "second").read_text()[-3000:]
        before = contents(folder)
        os.kill(first.pid, signal.SIGCONT)
        assert first.wait(200) == 1
    assert "going on from step_00000020" in (tmp_path / "second").read_text()
    assert f"Waiting up to {LEASE_S:g} s" in (tmp_path / "second").read_text()
    assert "Got a newer one, which goes on" in (tmp_path / "first").read_text()
    assert contents(folder) == before
    alone = [*COMMAND, file, "--local", "run.name=alone"]
    subprocess.run(alone, cwd=ROOT, env=ENVIRON, check=True, capture_output=True)
    assert differing(folder.parent / "alone", folder) == []
    outcome("driver silent on another machine, then back", "its lease runs out; it finds a newer driver", seconds, 20, EVERY)


def contents(folder: Path) -> dict[str, bytes]:
    """Of every file that holds a result."""
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file() and "tensorboard" not in file.parts}


# --- two at a time ----------------------------------------------------------------------------------------------------


def test_two_drivers_on_one_run(values, tmp_path, outcome):
    """The second is refused before it looks at any data, whatever it would run on; the first does not notice."""
    config = values("twice", run={"workers": 1}, training={"length": 100_000, "validate_every": 100_000})
    file, folder = written(tmp_path, config), Path(config["run"]["folder"]) / "twice"
    gone = f"data.cache_dir={tmp_path / 'none'}"  # not part of a run's identity where the content is the same: it would be prepared anew
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", "raysparse", "pretrain"]
    with started([*COMMAND, file, "--local"], tmp_path / "first") as first:
        wait(lambda: list(folder.glob("checkpoints/step_*")), tmp_path / "first", first)
        began = time.monotonic()
        for command in ([*COMMAND, file, "--local"], [*COMMAND, file], [*torchrun, file]):
            done = subprocess.run([*command, gone], cwd=ROOT, env=ENVIRON, capture_output=True, text=True, timeout=600, check=False)
            assert done.returncode in (1, 2), done.stderr
            host = os.uname().nodename
            assert (
                f"Expected to be the only driver of {folder}. Got another that lives: process {first.pid} on {host}, since " in done.stderr
            )
        seconds = (time.monotonic() - began) / 3
        assert not (tmp_path / "none").exists()
        assert first.poll() is None
        steps = len((folder / "metrics.jsonl").read_text().splitlines())
        wait(lambda: len((folder / "metrics.jsonl").read_text().splitlines()) > steps, tmp_path / "first")
        first.send_signal(signal.SIGINT)
        assert first.wait(200) == 130
    assert of_driver(folder) == []
    outcome("two drivers on one run folder", f"the second is refused (after {seconds:.0f} s), told who the first is", None, None)


# --- the head node ----------------------------------------------------------------------------------------------------


def test_the_head_is_lost_and_the_job_submitted_again(values, calm, tmp_path, outcome):
    project, config = tmp_path / "project", values("head")
    (project / "data").mkdir(parents=True)
    shutil.copy(config["data"]["train"]["paths"][0], project / "data" / "docs.jsonl")
    config["data"] |= {"train": {"type": "files", "paths": ["data/docs.jsonl"]}}
    written(project, config)
    folder = Path(config["run"]["folder"]) / "head"
    environ = ENVIRON | {"PYTHONPATH": str(ROOT)}

    def submit(address: str, *words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "raysparse", "submit", "--address", address, *words, "pretrain", "head.yaml"]
        return subprocess.run(command, cwd=project, env=environ, capture_output=True, text=True, timeout=900, check=False)

    with ray_head(ENVIRON) as (first, _):
        sent = submit(first)
        assert sent.returncode == 0, sent.stderr
        with Fault(folder, 50, lambda: lose(first)) as fault:
            wait(lambda: fault.struck, folder / "progress.jsonl")
            with ray_head(ENVIRON) as (second, _):
                done = submit(second, "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    check_equal(calm, folder)
    outcome("head node, the job submitted to another", "it goes on under the same name", fault.seconds, fault.lost, EVERY)


def lose(address: str) -> None:
    """The machine of a head is gone, with all that ran on it."""
    port = address.rpartition(":")[2]
    (head,) = [pid for pid in family(os.getpid()) if "start\0--head\0" in (words := cmdline(pid)) and f"--dashboard-port={port}" in words]
    for pid in family(head):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def cmdline(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:  # it has ended meanwhile
        return ""
