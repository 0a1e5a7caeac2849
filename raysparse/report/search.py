"""A search over sparsity and settings, as it lies on the disk: its config, its trials, and what was chosen in each cell.

A search is a folder with `search.yaml` (its config), `trials.jsonl` (an object each time a trial ends; of several with one folder the
last counts) and the trials' run folders. Settings are chosen by the objective, a measure on the validation split; scores are
those of the test split, which no choice has seen.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from raysparse.config import ConfigError, read_yaml
from raysparse.report import Run, json_lines, read_run

STATUSES = ("finished", "stopped", "failed")

_NUMBER = (int, float)
_CONFIG = {"run": dict, "tasks": (dict, type(None)), "algorithm": dict, "scheduler": dict, "seeds": list, "tolerance": _NUMBER}
_TRIAL = {
    "folder": str, "status": str, "task": (str, type(None)), "model": (dict, type(None)), "params": dict, "seed": int,
    "parent": (str, type(None)), "command": str, "metric": str, "lower_is_better": bool, "objective": (*_NUMBER, type(None)),
    "error": (str, type(None)), "exported": bool,
}  # fmt: skip


@dataclass(frozen=True)
class Parent:
    """The run that a trial started from: a training, or a pruning, of which no FLOPs are counted.

    Attributes:
        skips: whether its kernels left out zeros.
    """

    sparsity: float
    counted: float
    seconds: float
    skips: bool


@dataclass(frozen=True)
class Trial:
    """One trial that ended.

    Attributes:
        folder: of its run, relative to the search's.
        status: ``finished``, ``stopped`` (early, by the scheduler) or ``failed``.
        task: None where trials are pre-trainings.
        model: the settings of the model that it started from, or that it is; dotted key -> value.
        params: the settings of its own.
        parent: folder of the run that it started from.
        metric, lower_is_better, objective: by which settings are chosen, on the validation split; None or not a number where the
            trial has none.
        exported: whether its folder still has export/.
        run: None unless it finished.
        parent_run: None where it started from no run, or from one that is not finished or not here.
        validation: (step, validation loss) in order, as far as it came.
    """

    folder: str
    status: str
    task: str | None
    model: Mapping[str, Any]
    params: Mapping[str, Any]
    seed: int
    parent: str | None
    command: str
    metric: str
    lower_is_better: bool
    objective: float | None
    error: str | None
    exported: bool
    run: Run | None = None
    parent_run: Parent | None = None
    validation: tuple[tuple[int, float], ...] = ()

    @property
    def name(self) -> str:
        return Path(self.folder).name

    @property
    def sparsity(self) -> float | None:
        """Of the run that it started from, else the setting of its model; None where neither is known."""
        return self.parent_run.sparsity if self.parent_run else self.model.get("sparsity.target")

    @property
    def counted(self) -> float | None:
        """Counted training FLOPs end to end: its own and those of the run that it started from; None where these are not known."""
        return self._end_to_end("counted")

    @property
    def seconds(self) -> float | None:
        """Measured seconds of training, end to end as `counted`."""
        return self._end_to_end("seconds")

    def _end_to_end(self, what: str) -> float | None:
        if self.run is None or (self.parent is not None and self.parent_run is None):
            return None
        return getattr(self.run, what) + (getattr(self.parent_run, what) if self.parent_run else 0)

    @property
    def steps(self) -> int | None:
        """Steps of its own run, of an unfinished one up to its last validation."""
        return self.run.summary["steps"] if self.run else self.validation[-1][0] if self.validation else None


@dataclass(frozen=True)
class Cell:
    """The trials of one task that started from the same model.

    Attributes:
        level: what made it (`Search.level`).
    """

    task: str | None
    model: Mapping[str, Any]
    trials: tuple[Trial, ...]
    level: str

    @cached_property
    def sparsity(self) -> float | None:
        """Of the parent run, else as its model was set, else of its own runs; None where nothing is known yet."""
        known = self.trials[0].sparsity  # of all: `Search.cells`
        return max((trial.run.sparsity for trial in self.trials if trial.run), default=None) if known is None else known

    @property
    def dense(self) -> bool:
        return self.sparsity == 0

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The settings chosen: those with the best mean objective over their finished seeds, of equals the ones with more seeds.

        None where no trial has finished with an objective; empty where the task has no settings to search.
        """
        return self.chosen[0].params if self.chosen else None

    @cached_property
    def chosen(self) -> tuple[Trial, ...]:
        """The finished trials of the `best` settings, by seed; of two with one seed the better."""
        by_settings: dict[str, dict[int, Trial]] = {}
        for trial in sorted(self.trials, key=badness, reverse=True):
            if trial.status == "finished" and trial.objective is not None:
                by_settings.setdefault(canonical(trial.params), {})[trial.seed] = trial

        def rank(seeds: Mapping[int, Trial]) -> tuple[float, int]:
            return fmean(map(badness, seeds.values())), -len(seeds)

        seeds = min(by_settings.values(), key=rank, default={})
        return tuple(seeds[seed] for seed in sorted(seeds))


def badness(trial: Trial) -> float:
    """What is to be small: the objective, negative where higher is better; infinite where there is none."""
    value = trial.objective
    if value is None or math.isnan(value):
        return math.inf
    return value if trial.lower_is_better else -value


@dataclass(frozen=True)
class Search:
    """A search: its config, and its trials in the order in which they ended."""

    folder: Path
    config: Mapping[str, Any]
    trials: tuple[Trial, ...]

    @property
    def name(self) -> str:
        return str(self.config["run"].get("name", self.folder.name))

    @property
    def level(self) -> str:
        """What made the models that tasks start from: ``pretrain``, ``prune``, or empty: they were there, or trials are pre-trainings."""
        return next((level for level in ("pretrain", "prune") if self.config["tasks"] and self.config.get(level)), "")

    @property
    def tolerance(self) -> float:
        """Most loss of a task's primary score against dense that the user tolerates, in units of the score."""
        return self.config["tolerance"]

    @cached_property
    def tasks(self) -> tuple[str | None, ...]:
        """Those of the trials, in the order of the config; (None,) where trials are pre-trainings."""
        order = list(self.config["tasks"] or {})
        found = {trial.task for trial in self.trials}
        return tuple(sorted(found, key=lambda task: (task not in order, order.index(task) if task in order else 0, task or "")))

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """In order of task, then of sparsity, then as their first trials ended."""
        groups: dict[tuple[str | None, str, float | None], list[Trial]] = {}
        for trial in self.trials:
            groups.setdefault((trial.task, canonical(trial.model), trial.sparsity), []).append(trial)
        cells = [Cell(trials[0].task, trials[0].model, tuple(trials), self.level) for trials in groups.values()]
        unknown = math.inf  # last
        return tuple(sorted(cells, key=lambda cell: (self.tasks.index(cell.task), unknown if cell.sparsity is None else cell.sparsity)))

    def of(self, task: str | None) -> tuple[Cell, ...]:
        """The cells of one task."""
        return tuple(cell for cell in self.cells if cell.task == task)


def read_search(folder: str | Path) -> Search:
    """The search that lies in ``folder``; it may still be going on, even without a trial.

    Raises:
        ConfigError: the folder is no search, a line or a config is malformed, or a finished trial has no readable run.
    """
    folder = Path(folder)
    config = _config(folder / "search.yaml")
    records = dict(_records(folder / "trials.jsonl")) if (folder / "trials.jsonl").is_file() else {}

    @cache
    def parent_run(parent: str) -> Parent | None:
        places = (base / parent for base in (Path(), *folder.resolve().parents))  # written relative to where the search was started
        return next((_parent(place) for place in places if (place / "summary.json").is_file()), None)

    return Search(folder, config, tuple(_trial(folder, record, parent_run) for record in records.values()))


def canonical(settings: Mapping[str, Any]) -> str:
    """Equal settings, equal text."""
    return json.dumps(settings, sort_keys=True)


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"Expected a search in {path.parent}. Got no {path.name} there. Name a folder that `raysparse tune` made.")
    config = read_yaml(path)
    config["tasks"] = config.get("tasks")
    _check(config, _CONFIG, f"in {path}")
    return config


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, record in json_lines(path):
        _check(record, _TRIAL, f"in line {number} of {path}")
        if record["status"] not in STATUSES:
            raise ConfigError(
                f"Expected the status {', '.join(STATUSES)} in line {number} of {path}. Got {record['status']!r}. Mend or remove the line."
            )
        yield record["folder"], record


def _check(values: Mapping[str, Any], kinds: Mapping[str, Any], where: str) -> None:
    problems = []
    for key, kind in kinds.items():
        value, allowed = values.get(key, ...), kind if isinstance(kind, tuple) else (kind,)
        if type(value) not in allowed:  # not isinstance: true is no number
            names = " or ".join("null" if one is type(None) else one.__name__ for one in allowed)
            problems.append(f"  {key}: expected {names}, got {'nothing' if value is ... else repr(value)[:60]}")
    if problems:
        what = "\n".join(problems)
        raise ConfigError(f"Expected the keys of a search {where}. Got:\n{what}\nMend or remove it.")


def _trial(folder: Path, record: Mapping[str, Any], parent_run: Any) -> Trial:
    values = {field.name: record[field.name] for field in fields(Trial) if field.name in _TRIAL} | {"model": record["model"] or {}}
    place, finished = folder / record["folder"], record["status"] == "finished"
    if finished and not (place / "summary.json").is_file():
        raise ConfigError(
            f"Expected the run of a finished trial in {place}. Got no summary.json there. "
            f"Restore the folder, or remove the trial's line from {folder / 'trials.jsonl'}."
        )
    run = read_run(place) if finished else None
    curve = _points(run.validation) if run else _curve(place / "metrics.jsonl")
    return Trial(**values, run=run, parent_run=parent_run(record["parent"]) if record["parent"] else None, validation=curve)


def _parent(folder: Path) -> Parent:
    """Of a finished run."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    if summary["verb"] == "prune":
        sparsity = summary["sparsity"]["target"] or summary["sparsity"]["actual"]  # 0: some layers have levels of their own
        return Parent(sparsity, 0.0, summary["seconds"], skips=False)
    run = read_run(folder)
    return Parent(run.sparsity, run.counted, run.seconds, run.summary["flops"]["executed"] < run.summary["flops"]["dense"])


def _curve(metrics: Path) -> tuple[tuple[int, float], ...]:
    """Of a trial that did not finish: it may have no metrics, and end in half a line."""
    if not metrics.is_file():
        return ()
    found: dict[int, dict[str, Any]] = {}
    try:
        for _, record in json_lines(metrics):
            if isinstance(record.get("step"), int) and isinstance(record.get("validation_loss"), float):
                found[record["step"]] = record
    except ConfigError:
        pass
    return _points([found[step] for step in sorted(found)])


def _points(records: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, float], ...]:
    return tuple((record["step"], record["validation_loss"]) for record in records)
