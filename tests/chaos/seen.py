"""Runs that a fault strikes, and what it did to them, as their files tell."""

import io
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from raysparse.recipes import pretrain
from raysparse.recipes.job import Job
from raysparse.runtime.local import run_here
from raysparse.train.checkpoint import newest
from raysparse.train.metrics import Console
from raysparse.train.process import process_group

EVERY = 20
"""Steps between checkpoints."""
MST = {
    "sparsity": {
        "evolution": {"type": "mixed", "update_interval": 3},
        "timeline": [
            {
                "name": "warm_up",
                "length": "40 %",
                "sparsity": {"type": "polynomial"},
                "attention": {"type": "local_or_strided", "width": 4, "stride": 4},
            },
            {"name": "ultra", "length": "60 %"},
        ],
    },
    "run": {"workers": 2},
    "kernels": "dense",
    "training": {"length": 160, "validate_every": 160},
    "checkpoint": {"every": EVERY},
    "logging": {"every": 1, "histograms": 0},
}
"""Masks that change every few steps; of a pre-training."""


def two_ranks(values: dict[str, Any]) -> str:
    """Pre-train without Ray, on two ranks; returns the folder."""
    config = pretrain.PretrainConfig.check(values)
    run_here([pretrain.open_run(config)] if dist.get_rank() == 0 else [], config.run, Console(io.StringIO()))
    return str(config.run.path)


def check_equal(calm: Path, struck: Path) -> None:
    """Two runs have the same bits, masks, losses and FLOPs; the second has no step twice in its metrics."""
    assert differing(calm, struck) == []
    assert topologies(calm) == topologies(struck)
    records = [[json.loads(line) for line in (at / "metrics.jsonl").read_text().splitlines()] for at in (calm, struck)]
    losses = [[(r["step"], r["loss"]) for r in found if "loss" in r] for found in records]
    assert losses[0] == losses[1]
    one, two = (json.loads((at / "summary.json").read_text()) for at in (calm, struck))
    assert [key for key in ("loss", "flops", "sparsity", "steps", "tokens") if one[key] != two[key]] == []


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, moments and masks in the newest checkpoint of a run, whole."""
    path = newest(folder / "checkpoints")
    assert path is not None
    meta = dcp.FileSystemReader(str(path)).read_metadata().state_dict_metadata
    state = {key: torch.empty(value.size, dtype=value.properties.dtype) for key, value in meta.items() if key != "extra"}
    with process_group("cpu"):
        dcp.load(state, checkpoint_id=str(path))
    return state


def differing(a: Job | Path, b: Job | Path) -> list[str]:
    """Tensors of two runs that are not bit-equal."""
    one, two = (trained(at.path if isinstance(at, Job) else at) for at in (a, b))
    assert one.keys() == two.keys()
    return [key for key in one if not torch.equal(one[key], two[key])]


def topologies(folder: Path) -> list[str]:
    """Digests of the committed versions of the masks."""
    return [json.loads(line)["digest"] for line in (folder / "topology.jsonl").read_text().splitlines()[1:]]


def pids(folder: Path) -> list[int]:
    """Of the workers, by rank."""
    return json.loads((folder / "workers.json").read_text())


def stat(pid: int) -> list[str]:
    """Of a process: state, parent, and more; see proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def family(pid: int) -> list[int]:
    """A process, and all that it has started and they have."""
    children: list[int] = []
    with suppress(OSError):  # it has ended meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):  # this thread of it has
                children += map(int, (task / "children").read_text().split())
    return [pid, *(one for child in children for one in family(child))]


def ends(pid: int, timeout_s: float = 30.0) -> bool:
    """Whether a process is gone in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


class Fault:
    """Strikes a run on Ray once it has shown a step, and sees when it goes on. Use as a context: the run begins and ends inside.

    Attributes:
        seconds: from the strike to the first step that was shown after it.
        lost: steps that were done and had to be done again.
        went_on_from: step of the checkpoint; None where no rank had to start again.
    """

    def __init__(self, folder: Path, step: int, strike: Callable[[], Any], after: int = 1):
        """Args:
        after: of a run whose ranks live on, the step that shows it, counted from the strike.
        """
        self._file, self._step, self._strike, self._after = folder / "progress.jsonl", step, strike, after
        self._struck = self._back = 0.0
        self._last = 0
        self._failed: Exception | None = None
        self.went_on_from: int | None = None
        self._over, self._thread = Event(), Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "Fault":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def struck(self) -> bool:
        if self._failed is not None:
            raise self._failed
        return self._struck > 0

    @property
    def seconds(self) -> float:
        assert self.struck, "the run ended before the fault"
        assert self._back, "the run did not go on after the fault"
        return self._back - self._struck

    @property
    def lost(self) -> int:
        return 0 if self.went_on_from is None else self._last - self.went_on_from

    def _follow(self) -> None:
        while not self._file.exists():
            if self._over.wait(0.02):
                return
        with self._file.open() as stream:
            rest = ""
            while True:
                ending = self._over.is_set()
                *lines, rest = (rest + stream.read()).split("\n")
                for line in lines:
                    self._see(json.loads(line))
                if ending or self._back:
                    return
                time.sleep(0.02)

    def _see(self, record: dict[str, Any]) -> None:
        if self.struck and "going on from step_" in record.get("text", ""):
            self.went_on_from = int(record["text"].rpartition("_")[2])
        if "loss" not in record or self._back:
            return
        if self.struck and (self.went_on_from is not None or record["step"] >= self._last + self._after > self._last + 1):
            self._back = time.time()
        elif not self.struck or self._after == 1:
            self._last = record["step"]
        if not self.struck and record["step"] >= self._step:
            try:
                found = self._strike()
            except Exception as error:
                self._failed = error
                raise
            self._struck = found if isinstance(found, float) else time.time()
