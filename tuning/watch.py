"""What the driver does while trials run: a line for each, the list of what became of them, and room on the disk."""

import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.tune import Callback

from raysparse.report.search import canonical, read_search
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
        told = f"{self._metric(trial)} {value:.4f}" if status != "failed" and value is not None else f"{error}"
        where = f" at {result.get(PROGRESS, 0):.0f} %" if status == "stopped" else ""
        self._say(f"[{ended:>3}/{self._total}] {status}{where}", trial, told)
        if POINT not in trial.config:
            return
        search = self._search
        point = Point(**trial.config[POINT])
        record = self._record(search, point, result, status, error)
        root = search.path
        with (root / TRIALS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        prune(search, point)

    def _record(self, search: Search, point: Point, result: Mapping[str, Any], status: str, error: str | None) -> dict[str, Any]:
        folder = Path(result.get(FOLDER) or search.trial_config(point).run.path)
        value = result.get(OBJECTIVE)
        has_models = search.config.pretrain is not None and point.task is not None
        return {
            "folder": str(folder.relative_to(search.path)),
            "status": status,
            "task": point.task,
            "pretrain": dict(point.pretrain),
            "params": dict(point.params),
            "seed": point.seed,
            "parent": str(search.pretrain_config(point.pretrain).run.path) if has_models else None,
            "command": search.command(point),
            "metric": search.metric(point.task),
            "lower_is_better": search.lower_is_better(point.task),
            "objective": value if status != "failed" else None,
            "error": error,
            "exported": (folder / "export").exists(),
        }

    @property
    def _search(self) -> Search:
        return Search.of(self._plain)

    def _metric(self, trial: Any) -> str:
        return self._search.metric(Point(**trial.config[POINT]).task) if POINT in trial.config else LOSS

    def _say(self, head: str, trial: Any, told: str) -> None:
        of = trial.config
        point = Point(**of[POINT]) if POINT in of else Point(None, {}, of[MODEL], self._search.config.run.seed)
        self._said, what = time.monotonic(), point.text()
        print(f"{head:<26} {what} | {told}", file=sys.stderr, flush=True)


def prune(search: Search, point: Point) -> None:
    """Of a cell keep the models of the best settings alone, and checkpoints of no trial that has ended."""
    root = search.path
    cells = [cell for cell in read_search(root).cells if (cell.task, canonical(cell.pretrain)) == (point.task, canonical(point.pretrain))]
    for cell in cells:
        sign = 1 if search.lower_is_better(cell.task) else -1
        ended = [(sign * one.objective, one.folder) for one in cell.trials if one.status == "finished" and one.objective is not None]
        best = [folder for _, folder in sorted(ended)[: search.config.keep]]
        best += [trial.folder for trial in cell.chosen]
        for trial in cell.trials:
            shutil.rmtree(root / trial.folder / HANDOVER, ignore_errors=True)
            if trial.folder not in best:
                shutil.rmtree(root / trial.folder / "export", ignore_errors=True)
            shutil.rmtree(root / trial.folder / "checkpoints", ignore_errors=True)
