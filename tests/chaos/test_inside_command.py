"""Faults inside the command itself: killed in the middle of what must be whole, checkpoints that were damaged, and told to end."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

from raysparse.config import merge
from raysparse.recipes.lease import is_of_driver
from raysparse.runtime.launch import _passing_on_sigterm
from raysparse.train.checkpoint import MARKER, committed, newest
from raysparse.train.process import Signals
from raysparse.train.reading import read
from tests.chaos.victim import POINTS

RUN = [sys.executable, "-m", "raysparse", "pretrain"]
INTERVAL = 4


@pytest.fixture
def config_file(pretrain_values: dict[str, Any], tmp_path: Path) -> Path:
    return written(pretrain_values, tmp_path)


def written(values: dict[str, Any], folder: Path, **more: Any) -> Path:
    """The config of a RigL run of 24 steps with updates in steps 4, 8, ..., checkpoints every 4, in one thread."""
    rigl = {"target": 0.75, "evolution": {"type": "rigl", "update_interval": 3, "optimizer_steps": True}}
    training = {"length": 24, "sequences": 4, "micro": 2, "validate_every": 12, "validation_sequences": 8}
    logging = {"every": 1, "tensorboard": False}
    own = {"run": {"name": "calm"}, "kernels": "dense", "sparsity": rigl, "training": training, "logging": logging}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(merge(merge(values, own | {"checkpoint": {"every": INTERVAL, "keep": 2}}), more)))
    return file


def end_of(run: Path) -> dict[str, torch.Tensor]:
    """Weights, moments and masks in the newest checkpoint, the last of a finished run."""
    path = newest(run / "checkpoints")
    assert path is not None
    assert (run / "summary.json").exists()
    entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items() if hasattr(entry, "properties")}
    read(state, path, None)
    return state


def same(a: Path, b: Path) -> None:
    """Two finished runs ended with the same bits, and their topology went the same way."""
    one, two = end_of(a), end_of(b)
    assert one.keys() == two.keys()
    assert [key for key in one if not torch.equal(one[key], two[key])] == []
    digests = [[json.loads(line)["digest"] for line in (run / "topology.jsonl").read_text().splitlines()[1:]] for run in (a, b)]
    assert digests[0] == digests[1]
    steps = [[r["step"] for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in r] for run in (a, b)]
    assert steps[0] == steps[1]


def last_step(run: Path) -> int:
    """The last step that metrics.jsonl tells of."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return max((json.loads(line)["step"] for line in lines), default=0)
    except (OSError, ValueError):  # not there yet, or half a line
        return 0


def finish(command: list[str], run: Path) -> tuple[float, int, str]:
    """The same command once more, to its end: seconds to its first new step, the step that it went on from, what it said."""
    began, first = time.monotonic(), None
    saved = committed(run / "checkpoints")
    step = int(saved[-1].name[5:]) if saved else 0
    seen = ""
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as again:
        assert again.stderr is not None
        for line in again.stderr:
            seen += line
            if first is None and "| loss" in line:
                first = time.monotonic() - began
            if "going on from step_" in line:
                step = int(line.rpartition("step_")[2])
    assert again.returncode == 0, seen
    return first or 0.0, step, seen


@pytest.fixture(scope="module")
def calm(tmp_path_factory, corpus, cache_dir) -> Callable[[dict[str, Any]], Path]:
    """The folder of the uninterrupted run."""
    folder = tmp_path_factory.mktemp("calm")
    found: list[Path] = []

    def get(values: dict[str, Any]) -> Path:
        if not found:
            file = written(merge(values, {"run": {"folder": str(folder)}}), folder)
            subprocess.run([*RUN, str(file), "--local"], check=True, capture_output=True, timeout=300)
            found.append(folder / "calm")
        return found[0]

    return get


# --- killed at a point ------------------------------------------------------------------------------------------------

CALLS = {"in the commit marker": 9, "between proposal and commit": 5}
"""The marker knows three files a checkpoint; the first agreement is that of the start. Of all else the third: 4 and 8 are saved."""


@pytest.mark.parametrize("point", POINTS)
def test_killed_at(calm, pretrain_values, config_file, tmp_path, outcome, point):
    run = tmp_path / "runs" / "killed"
    words = [str(config_file), "--local", "run.name=killed"]
    victim = [sys.executable, "-m", "tests.chaos.victim", point, str(CALLS.get(point, 3)), "pretrain", *words]
    died = subprocess.run(victim, capture_output=True, timeout=300, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()[-2000:]
    at = last_step(run)
    before = committed(run / "checkpoints")
    assert before, "killed before there was a checkpoint to lose"
    seconds, step, said = finish([*RUN, *words], run)
    assert f"going on from {before[-1].name}" in said
    assert 0 <= at - step <= 2 * INTERVAL
    same(calm(pretrain_values), run)
    happens = "the same command goes on from the newest whole checkpoint: bit-equal"
    outcome(f"kill -9 {point}", happens, seconds, at - step, 2 * INTERVAL)  # it trained on while the checkpoint was written


# --- damage -----------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    file = next(path.glob("*.distcp"))
    os.truncate(file, file.stat().st_size - 100)


def flip(path: Path) -> None:
    file = next(path.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], None], str | None]] = {
    "truncated": (truncate, " bytes instead of "),
    "a bit flipped": (flip, "another checksum than when it was written"),
    "a file in it gone": (lambda path: (path / ".metadata").unlink(), ".metadata is missing"),
    "its marker gone": (lambda path: (path / MARKER).unlink(), None),
    "gone": (shutil.rmtree, None),
}


@pytest.fixture(scope="module")
def halfway(tmp_path_factory) -> Callable[[Path], Path]:
    """The folder of a run that was killed with checkpoints at 8 and 12, to be copied."""
    folder = tmp_path_factory.mktemp("halfway")

    def get(file: Path) -> Path:
        if not (folder / "hurt").exists():
            words = [str(file), "--local", "run.name=hurt", f"run.folder={folder}"]
            command = [sys.executable, "-m", "tests.chaos.victim", "between data and commit marker", "4", "pretrain", *words]
            assert subprocess.run(command, capture_output=True, timeout=300, check=False).returncode == -signal.SIGKILL
        return folder / "hurt"

    return get


@pytest.mark.parametrize("what", DAMAGE)
def test_the_newest_checkpoint_is(calm, halfway, pretrain_values, config_file, tmp_path, outcome, what):
    run = Path(shutil.copytree(halfway(config_file), tmp_path / "runs" / "hurt"))
    harm, warning = DAMAGE[what]
    harm(run / "checkpoints" / "step_00000012")
    seconds, step, said = finish([*RUN, str(config_file), "--local", "run.name=hurt"], run)
    assert step == 8
    if warning is not None:
        assert said.count("WARNING Checkpoint ") >= 1
        assert warning in said
        assert "falling back to the one before" in said
    same(calm(pretrain_values), run)
    happens = "a warning, and on from the one before: bit-equal" if warning else "on from the one before: bit-equal"
    outcome(f"newest checkpoint: {what}", happens, seconds, 12 - step, INTERVAL)


def test_all_checkpoints_are_damaged(halfway, config_file, tmp_path, outcome):
    run = Path(shutil.copytree(halfway(config_file), tmp_path / "runs" / "hurt"))
    for path in committed(run / "checkpoints"):
        flip(path)

    def content() -> dict[str, str]:
        files = (file for file in run.rglob("*") if file.is_file() and not is_of_driver(file))
        return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    before = content()
    done = subprocess.run([*RUN, str(config_file), "--local", "run.name=hurt"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    assert f"raysparse: Expected an undamaged checkpoint in {run / 'checkpoints'}. Got 2 damaged: " in done.stderr
    assert "Restore one from a copy, or choose another run.name to start anew." in done.stderr
    assert content() == before
    outcome("all checkpoints damaged", "an error that names them; nothing is overwritten", None, None)


# --- told to end ------------------------------------------------------------------------------------------------------

LONG = {"training": {"length": 160, "validate_every": 160}, "checkpoint": {"every": 1000}, "logging": {"every": 5}}


def wait_for(run: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while last_step(run) < step:
        assert process.poll() is None, "ended before it could be told to"
        assert time.monotonic() < deadline, f"no step {step} within 240 s"
        time.sleep(0.01)


def saved_step(run: Path) -> int:
    return int(committed(run / "checkpoints")[-1].name[5:])


def ranks_of(words: list[str], ranks: int) -> list[subprocess.Popen]:
    """The command on ranks as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": "test"}
    own = [os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return [subprocess.Popen([*RUN, *words], env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) for env in own]


def ended(processes: list[subprocess.Popen], status: int) -> list[str]:
    """What each of them said."""
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [status] * len(processes), errors
    return errors


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_and_leaves(pretrain_values, tmp_path, outcome, ranks):
    """Of two ranks one is told; both save and leave. No checkpoint was due for a long time, and no step is lost."""
    file = written(pretrain_values, tmp_path, **LONG)
    runs = tmp_path / "runs"
    ended(ranks_of([str(file)], ranks), 0)
    told = ranks_of([str(file), "run.name=told"], ranks)
    wait_for(runs / "told", 40, told[-1])
    began = time.monotonic()
    told[-1].send_signal(signal.SIGTERM)
    errors = ended(told, 143)
    took = time.monotonic() - began
    step = saved_step(runs / "told")
    assert 40 <= last_step(runs / "told") <= step < 160
    assert f"raysparse: told was told to leave, and has saved step {step}. The same command goes on from there." in errors[0]
    assert f"going on from step_{step:08d}" in ended(ranks_of([str(file), "run.name=told"], ranks), 0)[0]
    same(runs / "calm", runs / "told")
    happens = f"saves and leaves within {took:.1f} s (exit status 143); the same command: bit-equal"
    outcome(f"SIGTERM to {'the process' if ranks == 1 else 'one of two ranks'}", happens, None, 0, 1000)


def test_a_second_sigterm_is_not_held_up():
    """It does what it did before: here a handler of the test's own, elsewhere the end of the process."""
    others: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: others.append(number))
    try:
        signals = Signals()
        with signals.heeded():
            assert not signals.seen
            os.kill(os.getpid(), signal.SIGTERM)
            assert (signals.seen, others) == (True, [])
            os.kill(os.getpid(), signal.SIGTERM)
            assert others == [signal.SIGTERM]
        with Signals().heeded():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(others) == 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_workers_that_do_not_leave_in_time(tmp_path):
    """The driver asks by a file; it waits for `run.grace_s` and no longer."""
    leave = tmp_path / "leave"
    leave.touch()  # of a driver that was killed
    began = time.monotonic()

    def told() -> None:
        with _passing_on_sigterm(leave, 0.5):
            assert not leave.exists()
            os.kill(os.getpid(), signal.SIGTERM)
            assert leave.exists()
            time.sleep(30)

    with pytest.raises(KeyboardInterrupt, match="did not save and leave in time"):
        told()
    assert 0.4 < time.monotonic() - began < 20
    assert not leave.exists()


@pytest.mark.ray
def test_sigterm_under_ray(pretrain_values, tmp_path, outcome):
    """The driver is told, as `ray job stop` does; its workers save and leave."""
    file = written(pretrain_values, tmp_path, **merge(LONG, {"run": {"workers": 2}}))
    runs = tmp_path / "runs"
    told = subprocess.Popen([*RUN, str(file), "run.name=told"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    wait_for(runs / "told", 40, told)
    began = time.monotonic()
    told.send_signal(signal.SIGTERM)
    _, error = told.communicate(timeout=120)
    took = time.monotonic() - began
    assert told.returncode == 143, error
    step = saved_step(runs / "told")
    assert 40 <= last_step(runs / "told") <= step < 160
    assert f"told was told to leave, and has saved step {step}." in error
    assert not (runs / "told" / "leave").exists()
    seconds, went_on_from, _ = finish([*RUN, str(file), "run.name=told"], runs / "told")
    assert went_on_from == step
    ended(ranks_of([str(file)], 2), 0)  # as on Ray, but quicker to start
    same(runs / "calm", runs / "told")
    happens = f"the workers save, all end within {took:.1f} s (exit status 143); the same command: bit-equal"
    outcome("SIGTERM to the driver on Ray", happens, seconds, 0, 1000)
