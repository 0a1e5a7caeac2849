"""What the driver does while trials run: a line for each, the list of what became of them, and room on the disk."""

import json
import math
import shutil
import sys
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ray.tune import Callback

from raysparse.config import ConfigError
from raysparse.recipes.job import write_atomically
from tuning.keys import words
from tuning.space import LOSS, Point, Search
from tuning.trial import ERROR, FOLDER, HANDOVER, MODEL, OBJECTIVE, POINT, PROGRESS, STATUS

TRIALS = "trials.jsonl"
EVERY_S = 10.0
"""Between two lines about trials that go on."""


class Watcher(Callback):
    """Plain data inside: Ray Tune pickles it, to go on with a search."""

    def __init__(self, search: Search, total: int):
        self._plain, self._total, self._said = search.plain, total, 0.0

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        if STATUS not in result and OBJECTIVE in result and time.monotonic() - self._said > EVERY_S:
            self._say("", trial, f"{result[PROGRESS]:.0f} % | {self._metric(trial)} {result[OBJECTIVE]:.4f}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        self._end(trials, trial, result.get(STATUS, "stopped"), result.get(ERROR))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        file = getattr(trial, "error_file", None)
        lines = Path(file).read_text(errors="replace").strip().splitlines() if file and Path(file).exists() else []
        self._end(trials, trial, "failed", lines[-1] if lines else "the trial died, and too often")

    def _end(self, trials: list[Any], trial: Any, status: str, error: str | None) -> None:
        result, ended = trial.last_result or {}, 1 + sum(one.is_finished() for one in trials if one is not trial)
        value = result.get(OBJECTIVE)
        told = f"{self._metric(trial)} {value:.4f}" if status != "failed" and value is not None else error or ""
        where = f" at {result.get(PROGRESS, 0):.0f} %" if status == "stopped" else ""
        self._say(f"[{ended:>3}/{self._total}] {status}{where}", trial, told)
        if POINT in trial.config:
            record = self._record(self._search, Point(**trial.config[POINT]), result, status, error)
            write_record(self._search.path, record)
            tidy(self._search, record)

    def _record(self, search: Search, point: Point, result: Mapping[str, Any], status: str, error: str | None) -> dict[str, Any]:
        value = result.get(OBJECTIVE)
        try:
            folder, parent, command = search.trial_config(point).run.path, search.parent(point), search.command(point)
        except ConfigError:  # the trial has failed by that
            folder, parent, command = search.path / "trials" / point.digest, None, ""
        folder = Path(result.get(FOLDER) or folder)
        return {
            "folder": str(folder.relative_to(search.path)),
            "status": status,
            "task": point.task,
            "model": dict(point.model),
            "params": dict(point.params),
            "seed": point.seed,
            "parent": None if parent is None else str(parent),
            "command": command,
            "metric": search.metric(point.task),
            "lower_is_better": search.lower_is_better(point.task),
            "objective": value if status != "failed" else None,
            "error": error,
            "exported": (folder / "export").exists(),
        }

    @cached_property
    def _search(self) -> Search:
        return Search.of(self._plain)

    def _metric(self, trial: Any) -> str:
        return self._search.metric(Point(**trial.config[POINT]).task) if POINT in trial.config else LOSS

    def _say(self, head: str, trial: Any, told: str) -> None:
        of, level = trial.config, self._search.level
        what = Point(**of[POINT]).text() if level is None or POINT in of else " ".join([level.verb, *words(of[MODEL])])
        self._said = time.monotonic()
        print(f"{head:<26} {what} | {told}", file=sys.stderr, flush=True)


def records(path: Path) -> list[dict[str, Any]]:
    """What became of the trials that have ended, in that order."""
    return [json.loads(line) for line in (path / TRIALS).read_text(encoding="utf-8").splitlines()] if (path / TRIALS).exists() else []


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add what became of a trial, in the place of what was known of its folder; the file is whole at any time."""
    kept = [other for other in records(path) if other["folder"] != record["folder"]]
    write_atomically(path / TRIALS, "".join(json.dumps(one) + "\n" for one in (*kept, record)))


def forget(path: Path, folder: str) -> None:
    """The trial is to be run again: first it is no longer listed, then its folder goes."""
    write_atomically(path / TRIALS, "".join(json.dumps(one) + "\n" for one in records(path) if one["folder"] != folder))
    shutil.rmtree(path / folder, ignore_errors=True)


def tidy(search: Search, ended: Mapping[str, Any]) -> None:
    """A trial that has ended keeps no checkpoints; of finished ones in its cell the best keep their models."""
    for what in ("checkpoints", "validated", HANDOVER):
        shutil.rmtree(search.path / ended["folder"] / what, ignore_errors=True)
    cell = [one for one in records(search.path) if (one["task"], one["model"]) == (ended["task"], ended["model"])]
    scored = [one for one in cell if one["status"] == "finished" and one["objective"] is not None and not math.isnan(one["objective"])]
    scored.sort(key=lambda one: one["objective"], reverse=not ended["lower_is_better"])
    for one in scored[search.config.keep :]:
        shutil.rmtree(search.path / one["folder"] / "export", ignore_errors=True)
