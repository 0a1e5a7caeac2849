"""A cell is what is searched by itself: a task, and the model that it starts from.

Trials of different tasks have different scores, and a sparse model's early losses are above a dense one's: compared with each other, one
cell would starve the others. So each has its own sampler and its own rungs, in one search that fills the cluster.
"""

import pickle
from collections import Counter
from dataclasses import asdict
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from tuning.space import ASHA, NSGA2, Optuna, Point, Search
from tuning.trial import FLOPS, OBJECTIVE, POINT, PROGRESS


class CellSearcher(Searcher):
    """Optuna, cell by cell in turn; of NSGA-II a cell is a task, and the model one of its choices.

    A point that is suggested again runs at the next seed: the same once more would tell nothing.
    """

    def __init__(self, search: Search):
        from ray.tune.search.optuna import OptunaSearch

        super().__init__()
        algorithm, seed = search.config.algorithm, search.config.run.seed
        assert isinstance(algorithm, Optuna | NSGA2)
        self._space, self._models, self._seeds = search.space, search.models(), search.config.seeds
        both = isinstance(algorithm, NSGA2)
        self._cells = [(task, None) for task in search.space] if both else search.cells()
        self._total = algorithm.num_samples * len(self._cells)
        self._of: list[Any] = []
        for number, (task, _) in enumerate(self._cells):
            domains = {key: domain.to_tune() for key, domain in self._space[task].items()}
            mode = "min" if search.lower_is_better(task) else "max"
            if both:
                from ray import tune

                domains["model"] = tune.choice(list(range(len(self._models))))
            own = OptunaSearch.convert_search_space(domains)
            sampler = _sampler(both, seed + number)
            metric, mode = ([OBJECTIVE, FLOPS], [mode, "min"]) if both else (OBJECTIVE, mode)
            self._of.append(OptunaSearch(own, metric=metric, mode=mode, sampler=sampler))
        self._cell_of: dict[str, int] = {}
        self._asked: Counter[str] = Counter()

    def suggest(self, trial_id: str) -> Any:
        if trial_id not in self._cell_of and len(self._cell_of) == self._total:
            return self.FINISHED
        cell = self._cell_of.setdefault(trial_id, len(self._cell_of) % len(self._cells))
        task, model = self._cells[cell]
        found = self._of[cell].suggest(trial_id)
        number = found.pop("model", None)
        params = {key: self._space[task][key].of_tune(value) for key, value in found.items()}
        model = self._models[number] if model is None else model
        again = Point(task, model, params, 0).digest
        seed = self._seeds[n] if (n := self._asked[again]) < len(self._seeds) else max(self._seeds) + 1 + n - len(self._seeds)
        self._asked[again] += 1
        return {POINT: asdict(Point(task, model, params, seed))}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._of[self._cell_of[trial_id]].on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._of[self._cell_of[trial_id]].on_trial_complete(trial_id, result, error)

    def save(self, checkpoint_path: str) -> None:
        with open(checkpoint_path, "wb") as file:
            pickle.dump(self.__dict__, file)

    def restore(self, checkpoint_path: str) -> None:
        with open(checkpoint_path, "rb") as file:
            self.__dict__.update(pickle.load(file))


def _sampler(both: bool, seed: int) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.samplers.NSGAIISampler(seed=seed) if both else optuna.samplers.TPESampler(seed=seed)


class CellScheduler(FIFOScheduler):
    """ASHA in each cell. A trial that has come to its last step is never stopped: it has its answers to give."""

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
        self._of: dict[str, TrialScheduler] = {}

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._own(trial).on_trial_add(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self._own(trial).on_trial_error(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = self._own(trial).on_trial_result(tune_controller, trial, result)
        return self.CONTINUE if result[PROGRESS] >= 100 else decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._own(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._own(trial).on_trial_remove(tune_controller, trial)

    def debug_string(self) -> str:
        return "\n".join(own.debug_string() for own in self._of.values())

    def save(self, checkpoint_path: str) -> None:
        with open(checkpoint_path, "wb") as file:
            pickle.dump(self.__dict__, file)

    def restore(self, checkpoint_path: str) -> None:
        with open(checkpoint_path, "rb") as file:
            self.__dict__.update(pickle.load(file))

    def _own(self, trial: Any) -> TrialScheduler:
        point = Point(**trial.config[POINT])
        if point.cell not in self._of:
            self._of[point.cell] = ASHAScheduler(mode=self._modes[point.task], **self._settings)
        return self._of[point.cell]
