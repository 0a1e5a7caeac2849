"""Faults inside a run, on two ranks: a NaN, a mask that something has written into, a disk that is full or away."""

import itertools
import json
import math
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch
import torch.distributed as dist

from raysparse.train.checkpoint import committed
from raysparse.train.error import TrainingError
from raysparse.train.loop import train
from raysparse.train.state import Training
from tests.ranks import spawn
from tests.train.steps import SPARSE, assemble, differences, history, masks_of, run, snapshot
from tests.train.test_evolving import MST, RIGL, SET

METHODS = {"static": SPARSE, "rigl": RIGL, "set": SET, "mst": MST}
INTERVAL = 5


def sections(**more: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"checkpoint": {"every": INTERVAL, "keep": 2}}
    return values | {name: values.get(name, {}) | section for name, section in more.items()}


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> Callable[[str], dict[str, Any]]:
    """The uninterrupted run of each method."""
    found: dict[str, Any] = {}

    def get(method: str) -> dict[str, Any]:
        if method not in found:
            found[method] = spawn(run, 2, str(tmp_path_factory.mktemp(method)), sections(), METHODS[method])[0]
        return found[method]

    return get


def events(folder: Path) -> list[tuple[str, int]]:
    """(event, step) of the faults that metrics.jsonl tells of."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["event"], line.get("bad_step", line["step"])) for line in lines if "event" in line]


class Watched:
    """A feed that calls `look(step)` before each batch: where the tests' faults come from."""

    def __init__(self, t: Training, look: Callable[[int], None]):
        self._feed, self._look, t.feed = t.feed, look, self

    def batch(self, step: int, rows: Any) -> Any:
        self._look(step)
        return self._feed.batch(step, rows)


# --- NaN --------------------------------------------------------------------------------------------------------------


def poisoned(folder: str, settings: dict[str, Any], sparsity: dict[str, Any], what: str, bad: dict[int, int]) -> dict[str, Any]:
    """Train; rank 1 spoils step s the first bad[s] times that it comes: its logits, the gradient behind them, or its loss alone."""
    t, state = assemble(folder, settings, sparsity)
    left, now, seen = dict(bad), [False], []

    def look(step: int) -> None:
        seen.append((step, time.perf_counter()))
        now[0] = left.get(step, 0) > 0 and t.sharded.module.training
        left[step] = left.get(step, 0) - now[0]

    def spoil(_module: Any, _inputs: Any, output: Any) -> None:
        if not now[0] or dist.get_rank() == 0:
            return
        if what == "logits":
            output.logits = output.logits * math.nan
        elif what == "gradients":
            output.logits.register_hook(lambda gradient: gradient * math.nan)
        else:  # tokens that are impossible cost infinitely much, and pull nowhere
            output.logits = output.logits + torch.tensor([-math.inf] * 50 + [0.0] * 51)

    Watched(t, look)
    t.sharded.module.register_forward_hook(spoil)
    try:
        state = train(t, state)
    except TrainingError as error:
        t.checkpointer.wait()
        return {"error": str(error), "step": state.step}
    first = next((i for i, (step, _) in enumerate(seen) if bad.get(step)), 0)
    after = next((at for step, at in seen[first + 1 :] if step > seen[first][0]), seen[-1][1])
    facts = {"recovery_s": after - seen[first][1], "steps": [step for step, _ in seen], "left_out": state.left_out}
    return snapshot(t) | facts | {"nnz": dict(t.nnz), "history": history(folder)}


def without_step(folder: str, settings: dict[str, Any], sparsity: dict[str, Any], bad: int) -> dict[str, Any]:
    """Train with an optimizer that sits out a step."""
    t, state = assemble(folder, settings, sparsity)
    step = t.optimizer.step
    t.optimizer.step = lambda: None if state.step == bad else step()
    train(t, state)
    return snapshot(t)


ALWAYS = 99


@pytest.mark.parametrize("what", ["logits", "gradients", "loss"])
def test_a_nan_stops_the_run(tmp_path, what):
    found = spawn(poisoned, 2, str(tmp_path), sections(), SPARSE, what, {7: ALWAYS})
    for rank in found:
        assert rank["step"] == 7
        assert rank["error"].startswith("Expected finite gradients in step 8 of ")
        assert rank["error"].endswith("the same command with training.on_nan=skip or roll_back goes on from it.")
    assert [path.name for path in committed(tmp_path / "checkpoints")] == ["step_00000005"]


@pytest.mark.parametrize("method", ["static", "rigl"])
def test_a_nan_is_skipped(tmp_path, outcome, method):
    """Step 8 is stepped on by nobody; the run goes on as one whose optimizer sat it out. (RigL's update in it is kept from seeing it.)"""
    skip = sections(training={"on_nan": "skip"})
    found = spawn(poisoned, 2, str(tmp_path / "skips"), skip, METHODS[method], "logits", {7: ALWAYS})
    (reference, _) = spawn(without_step, 2, str(tmp_path / "sits out"), sections(), METHODS[method], 7)
    for rank in found:
        assert [key for key in differences(reference, rank) if key not in ("history", "nnz")] == []
        assert rank["left_out"] == [7]
        assert [step for step, _, _ in rank["history"]] == [step for step in range(1, 25) if step != 8]
    assert events(tmp_path / "skips") == [("left_out", 8)]
    if method == "static":
        happens = "the step's gradients are thrown away on all ranks; as a run whose optimizer sat it out"
        outcome("a NaN on one rank, on_nan: skip", happens, found[0]["recovery_s"], 0, INTERVAL)


def test_too_many_in_a_row(tmp_path):
    skip = sections(training={"on_nan": "skip"})
    for rank in spawn(poisoned, 2, str(tmp_path), skip, SPARSE, "logits", dict.fromkeys(range(3, 24), ALWAYS)):
        assert rank["step"] == 13
        assert rank["error"].startswith("Expected at most 10 steps in a row without finite gradients. Got one more, up to step 14 of ")
    assert events(tmp_path) == [("left_out", step) for step in range(4, 14)]


@pytest.mark.parametrize(
    ("method", "what", "bad"), [("static", "loss", 7), ("mst", "gradients", 12), ("set", "logits", 3), ("rigl", "logits", 19)]
)
def test_a_glitch_is_rolled_back_bit_equal(calm, tmp_path, outcome, method, what, bad):
    """Once bad: from the newest checkpoint the step is good, and all is as if it had not been. Updates are made again."""
    back = sections(training={"on_nan": "roll_back"})
    found = spawn(poisoned, 2, str(tmp_path), back, METHODS[method], what, {bad: 1})
    saved = bad // INTERVAL * INTERVAL
    for rank in found:
        assert differences(calm(method), rank) == []
        assert [step for step in rank["steps"] if step < 24][: bad + 2] == [*range(bad + 1), saved]
        assert rank["left_out"] == []
    assert events(tmp_path) == [("rolled_back", bad + 1)]
    if method == "mst":
        happens = "back to the newest checkpoint in the same processes, the step once more: bit-equal"
        outcome("a NaN on one rank, once, on_nan: roll_back", happens, found[0]["recovery_s"], bad - saved, INTERVAL)


def test_a_step_that_is_bad_twice_is_left_out(tmp_path, outcome):
    back, skip = (sections(training={"on_nan": policy}) for policy in ("roll_back", "skip"))
    found = spawn(poisoned, 2, str(tmp_path / "back"), back, MST, "logits", {7: ALWAYS})
    skipped = spawn(poisoned, 2, str(tmp_path / "skip"), skip, MST, "logits", {7: ALWAYS})
    for a, b in zip(found, skipped, strict=True):
        assert differences(a, b) == []
        assert a["left_out"] == [7]
    assert events(tmp_path / "back") == [("rolled_back", 8), ("left_out", 8)]
    happens = "back to the newest checkpoint; bad again, so the step is left out: as with skip"
    outcome("a NaN in the data, on_nan: roll_back", happens, found[0]["recovery_s"], 7 - INTERVAL, INTERVAL)


# --- masks ------------------------------------------------------------------------------------------------------------


def flipped(folder: str, settings: dict[str, Any], sparsity: dict[str, Any], at: int) -> dict[str, Any]:
    """Train; before step `at` a bit of rank 1's masks turns over in memory."""
    t, state = assemble(folder, settings, sparsity)

    def look(step: int) -> None:
        if step == at and dist.get_rank() == 1:
            mask = masks_of(t)["transformer.h.1.attn.c_attn.weight"]
            mask[3, 5] = ~mask[3, 5]

    Watched(t, look)
    try:
        train(t, state)
    except TrainingError as error:
        t.checkpointer.wait()
        return {"error": str(error), "step": state.step, "saved": [path.name for path in committed(Path(folder) / "checkpoints")]}
    raise AssertionError("trained on")


LOOKS = {
    "console": {"logging": {"every": 2}, "checkpoint": {"every": 6}},
    "checkpoint": {"logging": {"every": 100}},
    "update": {"logging": {"every": 100}, "checkpoint": {"every": 6}},
}


@pytest.mark.parametrize(
    ("method", "look"),
    [("rigl", "console"), ("static", "console"), ("static", "checkpoint"), ("rigl", "update"), ("set", "update"), ("mst", "update")],
)
def test_a_corrupted_mask_is_found_and_not_saved(calm, tmp_path, outcome, method, look):
    """In step 7 (0-based). Console lines every 2 steps, a checkpoint every 10, updates of all three rules in step 8 or 9."""
    found = spawn(flipped, 2, str(tmp_path), sections(**LOOKS[look]), METHODS[method], 7)
    expected = {"console": 8, "checkpoint": 10, "update": 8 if method == "mst" else 9}
    for rank in found:
        assert rank["step"] == expected[look]
        assert "transformer.h.1.attn.c_attn.weight" in rank["error"]
        assert ("rank 1's of" in rank["error"]) if look != "update" else ("unchanged since they were committed" in rank["error"])
    assert found[0]["error"] == found[1]["error"]
    saved = 5 if look == "checkpoint" else 6
    assert found[0]["saved"] == [f"step_{saved:08d}"]
    again = spawn(run, 2, str(tmp_path), sections(), METHODS[method])[0]
    assert [key for key in differences(calm(method), again) if key != "history"] == []
    if (method, look) in (("static", "console"), ("mst", "update")):
        where = "at the next console line" if look == "console" else "at the next update"
        happens = f"an error on all ranks {where}, nothing saved of it; the same command: bit-equal"
        outcome(f"a bit of one rank's mask turned over, {method}", happens, None, rank["step"] - saved, 6)


# --- storage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that is soon full."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def longest(times: list[float]) -> float:
    """Seconds between two steps, at most: how long training stood still."""
    return max(after - before for before, after in itertools.pairwise(times))


def filling(folder: str, settings: dict[str, Any], sparsity: dict[str, Any], full: int, free: int) -> dict[str, Any]:
    """Train; before step `full` something else takes all of the disk, before step `free` it is gone again."""
    t, state = assemble(folder, settings, sparsity)
    filler, kept, times = Path(folder) / "filler", [], []

    def look(step: int) -> None:
        times.append(time.perf_counter())
        if dist.get_rank() == 0 and step == full and not filler.exists():
            t.checkpointer.wait()
            with filler.open("wb", buffering=0) as stream:
                try:
                    while True:
                        stream.write(bytes(1 << 16))
                except OSError:
                    pass
        if step == free:
            kept.append([path.name for path in committed(Path(folder) / "checkpoints")])
            filler.unlink(missing_ok=True) if dist.get_rank() == 0 else None

    Watched(t, look)
    try:
        train(t, state)
    except TrainingError as error:
        return {"error": str(error), "step": state.step}
    finally:
        t.meter.close()
    return snapshot(t) | {"nnz": dict(t.nnz), "history": history(folder), "kept": kept, "stall_s": longest(times)}


QUICK = {"patience_s": 1.5}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_costs_a_checkpoint_not_the_run(calm, small_disk, outcome):
    """Full when steps 10 and 15 are to be saved, until step 16; their lines of metrics.jsonl come when there is room."""
    found = spawn(filling, 2, str(small_disk / "run"), sections(checkpoint=QUICK), SPARSE, 7, 16)
    for rank in found:
        assert differences(calm("static"), rank) == []
    assert found[0]["kept"] == [["step_00000005"]]
    assert [path.name for path in committed(small_disk / "run" / "checkpoints")] == ["step_00000020", "step_00000024"]
    assert events(small_disk / "run") == [("not_saved", 10)]  # that of step 15 is tried again until there is room
    console = (small_disk / "run" / "console.txt").read_text()
    assert console.count("step 10 is NOT SAVED: [Errno 28] No space left on device") == 1
    assert "step_00000010 could not be written ([Errno 28] No space left on device" in console
    happens = "tried again, then said loudly; training goes on, the older checkpoint stays: bit-equal"
    outcome("disk full during a checkpoint", happens, found[0]["stall_s"], 0, INTERVAL)


def test_a_disk_that_stays_full_is_an_error(calm, small_disk, outcome):
    folder = small_disk / "run"
    for rank in spawn(filling, 2, str(folder), sections(checkpoint=QUICK), SPARSE, 7, ALWAYS):
        assert rank["error"].startswith(f"Expected to write a checkpoint of step 20 to {folder}/checkpoints/step_00000020. Got: ")
        assert ", 3 times in a row. Make room there, or mend the storage; the same command then goes on " in rank["error"]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000005"]
    (folder / "filler").unlink()
    again = spawn(run, 2, str(folder), sections(), SPARSE)[0]
    assert [key for key in differences(calm("static"), again) if key != "history"] == []
    outcome(
        "disk full for good", "an error after three checkpoints that failed; with room, the same command: bit-equal", None, 15, 3 * INTERVAL
    )


def away(folder: str, settings: dict[str, Any], sparsity: dict[str, Any], at: int, seconds: float) -> dict[str, Any]:
    """Train; before step `at` the storage of the run goes, for so long."""
    t, state = assemble(folder, settings, sparsity)
    here, there, meanwhile, times = Path(folder), Path(folder + " unplugged"), [], []

    def look(step: int) -> None:
        times.append(time.perf_counter())
        if step == at and dist.get_rank() == 0:
            t.checkpointer.wait()
            here.rename(there)
            Timer(seconds, there.rename, [here]).start()
        elif not here.exists():
            meanwhile.append(step)

    Watched(t, look)
    train(t, state)
    return snapshot(t) | {"nnz": dict(t.nnz), "history": history(folder), "meanwhile": meanwhile, "stall_s": longest(times)}


@pytest.mark.parametrize("method", ["static", "rigl"])
def test_storage_that_is_away_for_a_while(calm, tmp_path, outcome, method):
    """Away when step 10 is to be saved and, with RigL, in the update of step 9: training goes on until it must wait."""
    folder, seconds = tmp_path / "run", float(os.environ.get("AWAY_S", 4))
    found = spawn(away, 2, str(folder), sections(), METHODS[method], 8, seconds)
    for rank in found:
        assert differences(calm(method), rank) == []
    assert max(found[0]["meanwhile"]) == (14 if method == "static" else 9)
    assert [path.name for path in committed(folder / "checkpoints")] == ["step_00000020", "step_00000024"]
    assert events(folder) == []
    if method == "static":
        assert "step_00000010 could not be written" in (folder / "console.txt").read_text()
        happens = f"tried again in the background until it is back (here {seconds:g} s), the next checkpoint waits: bit-equal"
        outcome("storage unreachable", happens, found[0]["stall_s"], 0, INTERVAL)
