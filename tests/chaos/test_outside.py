"""Faults that come from outside a run: its workers, nodes, head, manager and driver are killed or stopped. Each run ends with the weights,
moments and masks of one that was left alone, bit by bit."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from raysparse.recipes import pretrain
from raysparse.runtime.launch import launch
from raysparse.runtime.local import run_here
from raysparse.train.metrics import Console
from tests.chaos import stand_in
from tests.chaos.seen import EVERY, Fault, check_equal, ends, pids
from tests.runtime.test_mask_actor import pid_of

HANG_S = 15.0


def carried_out(values: dict[str, Any], step: int, strike: Callable[[Path], Any], after: int = 1) -> tuple[Fault, Path]:
    """A run on the Ray of the session that is struck once it has done `step`."""
    config = pretrain.PretrainConfig.check(values)
    job = pretrain.open_run(config)
    with Fault(job.path, step, lambda: strike(job.path), after) as fault:
        launch([job], config.run, Console(io.StringIO()))
    return fault, job.path


# --- workers ----------------------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_a_worker_is_killed(ray_instance, values, calm, outcome):
    fault, folder = carried_out(values("killed"), 50, lambda at: os.kill(pids(at)[1], signal.SIGKILL))
    check_equal(calm, folder)
    assert 0 <= fault.lost <= EVERY
    outcome("worker SIGKILL", "Ray Train starts a new group", fault.seconds, fault.lost, EVERY)


@pytest.mark.ray
def test_a_worker_is_stopped(ray_instance, values, calm, outcome):
    """Its peer, which waits for it in a collective, ends, or, where it waits with a report and not in a step, Ray Train asks in vain."""
    victim: list[int] = []

    def stop(folder: Path) -> None:
        victim.append(pids(folder)[1])
        os.kill(victim[0], signal.SIGSTOP)

    fault, folder = carried_out(values("stopped", run={"hang_timeout_s": HANG_S}), 50, stop)
    check_equal(calm, folder)
    assert ends(victim[0])
    stood = {file.name: file.read_text() for file in folder.glob("hangs/*")}
    assert stood.keys() <= {"rank_0.txt"}
    assert all("distributed_c10d.py" in text for text in stood.values())
    outcome(f"worker SIGSTOP, run.hang_timeout_s={HANG_S:g}", "the others end, a new group", fault.seconds, fault.lost, EVERY)


@pytest.mark.ray
def test_a_worker_that_has_no_peers_is_stopped(ray_instance, values, tmp_path, outcome):
    """Ray Train asks, and gets no answer."""
    alone = pretrain.PretrainConfig.check(values("alone", run={"workers": 1}))
    run_here([pretrain.open_run(alone)], alone.run, Console(io.StringIO()))
    victim: list[int] = []

    def stop(folder: Path) -> None:
        victim.append(pids(folder)[0])
        os.kill(victim[0], signal.SIGSTOP)

    fault, folder = carried_out(values("lone", run={"workers": 1, "hang_timeout_s": HANG_S}), 50, stop)
    check_equal(alone.run.path, folder)
    assert ends(victim[0])
    outcome(f"the only worker SIGSTOP, run.hang_timeout_s={HANG_S:g}", "a new one", fault.seconds, fault.lost, EVERY)


@pytest.mark.ray
def test_a_rank_hangs(ray_instance, values, calm, outcome, monkeypatch):
    monkeypatch.setattr("raysparse.runtime.worker.work", stand_in.hangs)
    config = pretrain.PretrainConfig.check(values("hangs", run={"hang_timeout_s": HANG_S}))
    job = pretrain.open_run(config)
    mark = job.path / stand_in.MARK
    with Fault(job.path, stand_in.STEP, lambda: time.time()) as fault:  # it has done so many: the next one hangs
        launch([job], config.run, Console(io.StringIO()))
    assert mark.exists()
    check_equal(calm, job.path)
    assert "in stuck" in (job.path / "hangs" / "rank_1.txt").read_text()
    assert "no micro-batch ended within run.hang_timeout_s=15" in (job.path / "progress.jsonl").read_text()
    outcome(
        f"a rank hangs in its data, run.hang_timeout_s={HANG_S:g}",
        "all say where they stood, a new group",
        fault.seconds,
        fault.lost,
        EVERY,
    )


@pytest.mark.ray
def test_a_worker_dies_between_saving_and_reporting(ray_instance, values, calm, outcome, monkeypatch):
    monkeypatch.setattr("raysparse.runtime.worker.work", stand_in.dies_in_upload)
    mark: list[Path] = []

    def wait(folder: Path) -> float:
        mark.append(folder / stand_in.MARK)
        while not mark[0].exists():
            time.sleep(0.01)
        return mark[0].stat().st_mtime

    fault, folder = carried_out(values("upload"), stand_in.STEP, wait)
    check_equal(calm, folder)
    assert fault.went_on_from is not None
    assert fault.went_on_from >= stand_in.STEP, "the committed checkpoint was not used"
    outcome("a kill between saved and reported to Ray", "the new group finds the checkpoint itself", fault.seconds, fault.lost, EVERY)


# --- the mask manager -------------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_the_mask_manager_is_killed(ray_instance, values, calm, outcome):
    config = pretrain.PretrainConfig.check(values("unmanaged"))
    job = pretrain.open_run(config)
    fault, folder = carried_out(values("unmanaged"), 50, lambda _: os.kill(pid_of(ray_instance, job), signal.SIGKILL), after=4)
    check_equal(calm, folder)
    assert fault.went_on_from is None
    outcome("mask manager SIGKILL", "Ray restarts it, it reads its journal, no rank starts again", fault.seconds, 0, EVERY)


# --- nodes ------------------------------------------------------------------------------------------------------------


def test_a_node_is_lost(values, calm, tmp_path, outcome):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values("node")))
    folder, mark = pretrain.PretrainConfig.check(values("node")).run.path, tmp_path / "lost"

    def wait() -> float:
        (tmp_path / "now").touch()
        while not mark.exists():
            time.sleep(0.01)
        return mark.stat().st_mtime

    with Fault(folder, 50, wait) as fault:
        command = [sys.executable, "-m", "tests.chaos.lost_node", str(file), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    check_equal(calm, folder)
    outcome(
        "a node of three, with one of two workers",
        "Ray sees its raylet go; the spare node takes the worker",
        fault.seconds,
        fault.lost,
        EVERY,
    )
