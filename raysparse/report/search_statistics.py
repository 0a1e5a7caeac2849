"""What a search found: scores over seeds, what sparsity costs, which sparsity to take, and which settings mattered."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

import numpy as np

from raysparse.report import percent
from raysparse.report.difference import Difference, resampled_scores
from raysparse.report.search import Cell, Search, Trial, canonical
from raysparse.tasks.metrics import LOWER_IS_BETTER

VALIDATION_LOSS = "validation_loss"
"""The score of a pre-training."""
RESAMPLES = 1000
_ROUNDING = 1e-9  # 30.0 - 29.5 is no more than 0.5


@dataclass(frozen=True)
class Spread:
    """Mean and sample deviation over seeds; one seed has no deviation."""

    mean: float
    deviation: float | None
    count: int

    def text(self, digits: int = 2) -> str:
        return f"{self.mean:.{digits}f}" + ("" if self.deviation is None else f" ± {self.deviation:.{digits}f}")


@dataclass(frozen=True)
class Judged:
    """A cell against the dense one of its task, by the task's primary score.

    Attributes:
        difference: of the means, with the 95 % interval over resamples.
        loss: the same as a loss: above zero is worse than dense, whichever way the score points.
        confidence: share of the resamples in which the loss is at most the tolerance; None where nothing could be resampled.
        basis: what was resampled, empty where nothing was.
    """

    difference: Difference
    loss: float
    confidence: float | None = None
    basis: str = ""


@dataclass(frozen=True)
class Result:
    """The settings chosen in a cell, over their seeds.

    Attributes:
        label: tells it from the other cells of its task, such as ``75 %``.
        scores: every test score.
        counted, seconds: means of `Trial.counted` and `Trial.seconds`; None where one is not known.
        reduction: counted FLOPs of the dense cell over these.
        judged: None of the dense cell, and where there is no dense cell.
    """

    cell: Cell
    label: str
    scores: Mapping[str, Spread]
    counted: float | None
    seconds: float | None
    reduction: float | None = None
    judged: Judged | None = None

    @property
    def winner(self) -> Trial:
        """The seed with the best objective."""
        sign = 1 if self.cell.chosen[0].lower_is_better else -1
        return min(self.cell.chosen, key=lambda trial: (math.isnan(trial.objective or 0), sign * (trial.objective or 0)))


@dataclass(frozen=True)
class Finding:
    """What a search says of one task.

    Attributes:
        task: None where trials are pre-trainings.
        metric: the primary score.
        results: one a cell with finished trials, in order of sparsity.
        dense: the dense cell's; of several the one with the best objective; None where no dense trial finished.
        recommended: of the results at most ``tolerance`` worse than dense the one with the fewest counted FLOPs, in doubt the dense
            one; None where there is no dense one.
    """

    task: str | None
    metric: str
    tolerance: float
    results: tuple[Result, ...]
    dense: Result | None
    recommended: Result | None

    @property
    def lower_is_better(self) -> bool:
        return lower_is_better(self.metric)

    @property
    def winner(self) -> Result:
        """The recommended one, else the one with the best objective."""
        return self.recommended or _best_objective(self.results)


def finding(search: Search, task: str | None, tolerance: float) -> Finding | None:
    """What the trials of a task say; None where none has finished with an objective."""
    cells = [cell for cell in search.of(task) if cell.chosen]
    if not cells:
        return None
    metric = primary(cells[0].chosen[0])
    names = labels(search.of(task))
    results = [_result(cell, names[search.of(task).index(cell)]) for cell in cells]
    dense = _best_objective([result for result in results if result.cell.dense])
    if dense is not None:
        rows = _resampled(cells)
        results = [result if result is dense else _against(result, dense, metric, tolerance, rows) for result in results]
    return Finding(task, metric, tolerance, tuple(results), dense, dense and _recommended(results, dense, tolerance))


def primary(trial: Trial) -> str:
    """The score that a finished trial is compared by."""
    assert trial.run is not None, trial.folder
    return trial.run.summary["task"]["primary"] if trial.task is not None else VALIDATION_LOSS


def scores_of(trial: Trial) -> dict[str, float]:
    """Every test score of a trial, its validation loss where it is a pre-training; empty unless it finished."""
    if trial.run is None:
        return {}
    return dict(trial.run.summary["task"]["scores"]) if trial.task is not None else {VALIDATION_LOSS: trial.run.validation_loss}


def lower_is_better(metric: str) -> bool:
    return metric in LOWER_IS_BETTER or metric == VALIDATION_LOSS


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample deviation (n - 1 in the denominator)."""
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def pareto(points: Sequence[tuple[float, float]], lower: bool) -> list[int]:
    """Which points (cost, score) no other beats, in order of cost: none costs as little or less and scores better, or as well for less.

    Args:
        lower: whether a lower score is better.
    """
    sign, best, front = (1 if lower else -1), math.inf, []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1])):
        if sign * points[i][1] < best:
            best, front = sign * points[i][1], [*front, i]
    return front


def importance(cells: Sequence[Cell]) -> dict[str, tuple[float, float]]:
    """Of each parameter of a task the share of the variance of the objective that its values explain, the largest first.

    One-way eta squared over finished trials: ``sum_g n_g (mean_g - mean)^2 / sum_i (y_i - mean)^2``, groups of equal values, more than
    6 distinct numbers cut into quartiles. Beside it what values dealt at random would explain in expectation,
    ``(groups - 1) / (trials - 1)``. The sparsity is one of the parameters; one with a single value is none. Empty for fewer than 4
    trials, or where all objectives are equal.
    """
    found = [(cell, trial) for cell in cells for trial in cell.trials if trial.status == "finished" and math.isfinite(_objective(trial))]
    objectives = np.array([_objective(trial) for _, trial in found])
    total = float(((objectives - objectives.mean()) ** 2).sum()) if len(found) >= 4 else 0.0
    if total <= 1e-24:
        return {}
    settings = [settings_of(cell, trial) for cell, trial in found]
    shares = {}
    for name in dict.fromkeys(name for of in settings for name in of):
        groups = _groups([of.get(name) for of in settings])
        members = [objectives[[group == one for group in groups]] for one in dict.fromkeys(groups)]
        if len(members) > 1:
            between = sum(len(member) * float(member.mean() - objectives.mean()) ** 2 for member in members)
            shares[name] = (between / total, (len(members) - 1) / (len(found) - 1))
    return dict(sorted(shares.items(), key=lambda item: -item[1][0]))


def judge(ours: np.ndarray, theirs: np.ndarray, resampled: tuple[np.ndarray, ...] | None, lower: bool, tolerance: float) -> Judged:
    """Scores of one cell's seeds against those of the dense cell's, by resampling seeds and test examples.

    Every resample draws one set of examples for all systems, and of each cell as many seeds as it has, with replacement and
    apart from the other cell. Without predictions seeds alone are drawn, which takes two of each cell.

    Args:
        ours, theirs: [seeds].
        resampled: of each, [seeds, resamples], on the same resamples of the examples; None where these cannot be resampled.
        lower: whether a lower score is better.
    """
    value, sign = float(ours.mean() - theirs.mean()), 1 if lower else -1
    seeds = min(len(ours), len(theirs))
    if resampled is None and seeds < 2:
        return Judged(Difference(value), sign * value)
    basis = "seeds alone" if resampled is None else "test examples alone" if max(len(ours), len(theirs)) < 2 else "seeds and test examples"
    tables = resampled or tuple(np.repeat(side[:, None], RESAMPLES, axis=1) for side in (ours, theirs))
    generator = np.random.default_rng(0)
    drawn = [np.take_along_axis(of, generator.integers(len(of), size=of.shape), axis=0).mean(axis=0) for of in tables]
    differences = drawn[0] - drawn[1]
    low, high = np.percentile(differences, [2.5, 97.5]).tolist()
    confidence = float((sign * differences <= tolerance + _ROUNDING).mean())
    return Judged(Difference(value, low, high), sign * value, confidence, basis)


def settings_of(cell: Cell, trial: Trial) -> dict[str, Any]:
    """Everything that was searched, by name: the sparsity, others of the model as ``pretrain.KEY`` or ``prune.KEY``, and its own."""
    others = {f"{cell.level}.{key}" if cell.level else key: value for key, value in cell.model.items() if key != "sparsity.target"}
    return {"sparsity": cell.sparsity} | others | dict(trial.params)


def labels(cells: Sequence[Cell]) -> list[str]:
    """The sparsity of each cell of a task, and where several share it what else tells them apart."""
    sparsities = ["unknown sparsity" if cell.sparsity is None else percent(cell.sparsity) for cell in cells]
    names = []
    for cell, sparsity in zip(cells, sparsities, strict=True):
        twins = [other for other, same in zip(cells, sparsities, strict=True) if same == sparsity]
        own = {key: value for key, value in cell.model.items() if len({canonical({"": twin.model.get(key)}) for twin in twins}) > 1}
        names.append(", ".join([sparsity, *([settings_text(own)] if own else [])]))
    return names


def settings_text(settings: Mapping[str, Any]) -> str:
    """``lr=0.001, masks=lift``: keys without their sections where these are not needed to tell them apart."""
    ends = [key.rpartition(".")[2] for key in settings]
    return ", ".join(
        f"{end if ends.count(end) == 1 else key}={value_text(value)}" for end, (key, value) in zip(ends, settings.items(), strict=True)
    )


def value_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _result(cell: Cell, label: str) -> Result:
    each = [scores_of(trial) for trial in cell.chosen]
    scores = {name: spread([of[name] for of in each]) for name in each[0] if all(name in of for of in each)}
    counted, seconds = (_mean([getattr(trial, what) for trial in cell.chosen]) for what in ("counted", "seconds"))
    return Result(cell, label, scores, counted, seconds)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _best_objective(results: Sequence[Result]) -> Any:
    """The result with the best mean objective; None of none."""

    def rank(result: Result) -> tuple[bool, float]:
        mean = fmean(_objective(trial) for trial in result.cell.chosen)
        return math.isnan(mean), mean if result.cell.chosen[0].lower_is_better else -mean

    return min(results, key=rank, default=None)


def _objective(trial: Trial) -> float:
    return math.nan if trial.objective is None else trial.objective


def _resampled(cells: Sequence[Cell]) -> dict[str, np.ndarray]:
    """Folder -> scores [resamples] on the same resamples of the test examples, of the chosen trials that can be judged so."""
    trials = [
        trial for cell in cells for trial in cell.chosen if trial.task is not None and trial.run and trial.run.predictions is not None
    ]
    scores = resampled_scores([trial.run for trial in trials if trial.run], RESAMPLES)
    return {} if scores is None else {trial.folder: row for trial, row in zip(trials, scores, strict=True)}


def _against(result: Result, dense: Result, metric: str, tolerance: float, rows: Mapping[str, np.ndarray]) -> Result:
    """The result with what it lost and saved against the dense one."""
    reduction = dense.counted / result.counted if dense.counted and result.counted else None
    if metric not in result.scores or metric not in dense.scores:
        return replace(result, reduction=reduction)
    sides = [of.cell.chosen for of in (result, dense)]
    ours, theirs = (np.array([scores_of(trial)[metric] for trial in side]) for side in sides)
    resampled = None
    if all(trial.folder in rows for side in sides for trial in side):
        resampled = tuple(np.stack([rows[trial.folder] for trial in side]) for side in sides)
    return replace(result, reduction=reduction, judged=judge(ours, theirs, resampled, lower_is_better(metric), tolerance))


def _recommended(results: Sequence[Result], dense: Result, tolerance: float) -> Result:
    within = [result for result in results if result.judged and result.judged.loss <= tolerance + _ROUNDING and (result.reduction or 0) > 1]
    return min(within, key=lambda result: result.counted or math.inf, default=dense)


def _groups(values: Sequence[Any]) -> list[str]:
    """Which values count as equal: more than 6 distinct numbers by quartile."""
    if len(set(map(str, values))) > 6 and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return [str(quartile) for quartile in np.searchsorted(np.quantile(values, [0.25, 0.5, 0.75]), values)]
    return [canonical({"": value}) for value in values]
