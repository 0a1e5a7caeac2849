"""A cell is what is searched by itself: a task, and the model that it starts from.

Trials of different tasks have different scores, and a sparse model's early losses are above a dense one's: compared with each other, one
cell would starve the others. So each has its own sampler and its own rungs, in one search that fills the cluster.
"""

import json
import pickle
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search import Searcher

from raysparse.report.search import canonical, read_search
from tuning.config import ASHA, NSGA2, Optuna
from tuning.space import LOSS, Point, Search
from tuning.trial import FLOPS, OBJECTIVE, POINT, PROGRESS


class CellSearcher(Searcher):
    """Optuna, cell by cell in turn; of NSGA-II a cell is a task, and the model one of its choices.

    A point that is suggested again runs at the next seed: the same once more would tell nothing.
    """

    def __init__(self, search: Search):
        from ray.tune.search.optuna import OptunaSearch

        super().__init__()
        algorithm = search.config.algorithm
        assert isinstance(algorithm, Optuna | NSGA2)
        self._space, self._seeds = search.space, search.config.seeds
        is_pareto = isinstance(algorithm, NSGA2)
        self._cells = [(task, search.models(task)) for task in search.space] if is_pareto else [(t, [m]) for t, m in search.cells()]
        self._total = algorithm.num_samples * len(self._cells)
        self._samplers: list[Any] = []
        for number, (task, models) in enumerate(self._cells):
            domains = {key: domain.to_tune() for key, domain in self._space[task].items()} | {MODEL_INDEX: _index(models)}
            mode = "min" if search.lower_is_better(task) else "max"
            objectives: dict[str, Any] = (
                {"metric": [OBJECTIVE, FLOPS], "mode": [mode, "min"]} if is_pareto else {"metric": OBJECTIVE, "mode": mode}
            )
            sampler = _sampler(algorithm, search.config.run.seed + number)
            self._samplers.append(OptunaSearch(OptunaSearch.convert_search_space(domains), sampler=sampler, **objectives))
        self._cell_of: dict[str, int] = {}
        self._asked: Counter[str] = Counter()

    def suggest(self, trial_id: str) -> Any:
        if trial_id not in self._cell_of and len(self._cell_of) == self._total:
            return self.FINISHED
        cell = self._cell_of.setdefault(trial_id, len(self._cell_of) % len(self._cells))
        task, models = self._cells[cell]
        suggested = self._samplers[cell].suggest(trial_id)
        model = models[suggested.pop(MODEL_INDEX)]
        params = {key: self._space[task][key].of_tune(value) for key, value in suggested.items()}
        again = Point(task, model, params, 0).digest
        seed = self._seeds[n] if (n := self._asked[again]) < len(self._seeds) else max(self._seeds) + 1 + n - len(self._seeds)
        self._asked[again] += 1
        return {POINT: asdict(Point(task, model, params, seed))}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._samplers[self._cell_of[trial_id]].on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._samplers[self._cell_of[trial_id]].on_trial_complete(trial_id, result, error)

    def save(self, checkpoint_path: str) -> None:
        with open(checkpoint_path, "wb") as file:
            pickle.dump(self.__dict__, file)

    def restore(self, checkpoint_path: str) -> None:
        with open(checkpoint_path, "rb") as file:
            self.__dict__.update(pickle.load(file))


MODEL_INDEX = "model"
"""Of what a sampler suggests: which of the cell's models."""


def _index(models: list[Any]) -> Any:
    from ray import tune

    return tune.choice(list(range(len(models))))


def _sampler(algorithm: Optuna | NSGA2, seed: int) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if isinstance(algorithm, Optuna):
        return optuna.samplers.TPESampler(seed=seed)
    return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(2, algorithm.num_samples // 4))  # four generations


class CellScheduler(FIFOScheduler):
    """ASHA in each cell. A trial that has come to its last step is never stopped: it has its answers to give.

    Ray Tune keeps no scheduler's state: that of a resumed search is made again from what its trials have left.
    """

    def __init__(self, search: Search):
        super().__init__()
        assert isinstance(search.config.scheduler, ASHA)
        self._settings = {
            "time_attr": PROGRESS,
            "metric": OBJECTIVE,
            "max_t": 100,
            "grace_period": round(100 * search.config.scheduler.grace),
            "reduction_factor": search.config.scheduler.reduction,
            "stop_last_trials": False,
        }
        self._modes = {task: "min" if search.lower_is_better(task) else "max" for task in search.space}
        self._metrics = {task: search.metric(task) for task in search.space}
        self._path = search.path
        self._rungs: dict[str, ASHAScheduler] = {}

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_error(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = self._of(trial).on_trial_result(tune_controller, trial, result)
        return self.CONTINUE if result[PROGRESS] >= 100 else decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_remove(tune_controller, trial)

    def debug_string(self) -> str:
        return "\n".join(rungs.debug_string() for rungs in self._rungs.values())

    def _of(self, trial: Any) -> ASHAScheduler:
        """The rungs of a trial's cell."""
        point = Point(**trial.config[POINT])
        if point.cell not in self._rungs:
            rungs: Any = ASHAScheduler(mode=self._modes[point.task], **self._settings)
            self._rungs[point.cell] = rungs
            for folder, reports in self._left(point):
                past: Any = SimpleNamespace(trial_id=folder)
                rungs.on_trial_add(None, past)
                for report in reports:
                    rungs.on_trial_result(None, past, report)
        return self._rungs[point.cell]

    def _left(self, point: Point) -> Iterator[tuple[str, list[dict[str, float]]]]:
        """Of each trial of the cell that has ended: its folder, and what it reported."""
        for trial in read_search(self._path).trials:
            if (trial.task, canonical(trial.model)) != (point.task, canonical(point.model)) or trial.status == "failed":
                continue
            lines = map(json.loads, (self._path / trial.folder / "metrics.jsonl").read_text().splitlines())
            key = "validation_loss" if self._metrics[point.task] == LOSS else "validation_score"
            yield trial.folder, [{PROGRESS: 100 * line["step"] / line["steps"], OBJECTIVE: line[key]} for line in lines if key in line]
