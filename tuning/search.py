"""`raysparse tune`: check, make the models that are missing, search, run the best settings at the seeds they lack, report.

Each of the three levels is one experiment of Ray Tune below ``tune/`` in the search's folder. What a trial has done lies in its run folder,
what became of it in ``trials.jsonl``; Ray Tune's own files are there to go on from (``--resume``).
"""

import io
import json
import logging
import os
import random
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from raysparse.config import ConfigError
from raysparse.recipes.job import write_atomically
from raysparse.recipes.lease import beginning, leave
from raysparse.report.search import badness, read_search
from raysparse.runtime.launch import check_resources, per_worker, start
from raysparse.runtime.nodes import check_storage
from tuning.check import CONFIG, check, check_dashboard, check_disk, check_folder, concurrency
from tuning.config import ASHA, NSGA2, PBT, NoScheduler, Optuna, SearchConfig
from tuning.space import Point, Search
from tuning.trial import MODEL, OBJECTIVE, POINT, PROGRESS, trial
from tuning.watch import Watcher, forget

DRIVER_BYTES = 512 << 20
"""What a trial takes of the cluster whose workers are a group of their own: no CPU, which they would lack."""
SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # every trial's run folder has its own, and the report HParams
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_AIR_NEW_OUTPUT": "1",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
}


def search(config: SearchConfig, resume: bool) -> tuple[dict[str, Any], str]:
    """Search to the end and report; returns the facts and a text.

    Raises:
        ConfigError: anything that can be known to be wrong before the first trial.
        KeyboardInterrupt: Ctrl-C; what is there is consistent, and `resume` goes on.
    """
    from raysparse.report.search_page import read_report

    config = settled(config)
    found = Search(config)
    check_folder(config, resume)
    with beginning(config.path):
        check(found)
    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)
    started = start(config.run, spare=0, dashboard=config.is_nested)
    try:
        check_resources(config.run)
        config.path.mkdir(parents=True, exist_ok=True)
        check_storage([config.path])
        check_disk(found, concurrency(config))
        if config.is_nested:
            check_dashboard()
        write_atomically(config.path / CONFIG, config.to_yaml())
        _make_models(found)
        _level(found, "search")
        _confirm(found)
    finally:
        leave(config.path)
        if started:
            import ray

            ray.shutdown()
    report = read_report(config.path)
    report.write()
    return report.facts, f"{report.terminal()}\nPlots and details: {report.files['html']}"


def settled(config: SearchConfig) -> SearchConfig:
    """With a folder that means the same in every process."""
    return config.model_copy(update={"run": config.run.model_copy(update={"folder": str(config.path.parent)})})


def dry_run(config: SearchConfig) -> tuple[dict[str, Any], str]:
    """Check every config of the search, and tell what would run; data, disk and cluster are not looked at."""
    config = settled(config)
    found = Search(config)
    check_folder(config, resume=True)
    models = [model for _, model in found.first_level()]
    done = [model.run.name for model in models if (model.run.path / "summary.json").exists()]
    facts: dict[str, Any] = {
        "models": [model.run.name for model in models],
        "models_done": done,
        "trials": _num_trials(found),
        "metric": {task or "pretrain": found.metric(task) for task in found.space},
    }
    lines = [
        *([f"{len(models)} models to be {found.level.made}, {len(done)} of them done"] if found.level else []),
        f"{facts['trials']} trials, chosen by {', '.join(f'{metric} ({task})' for task, metric in facts['metric'].items())}",
    ]
    if not isinstance(config.algorithm, Optuna | NSGA2):
        facts["commands"] = [found.command(point) for point in found.points()]
        lines += facts["commands"]
    return facts, "\n".join([*lines, "Every config is sound. Nothing was started."])


def _make_models(search: Search) -> None:
    """The first level: every model that tasks start from and that no search has made yet."""
    missing = [(settings, model) for settings, model in search.first_level() if not (model.run.path / "summary.json").exists()]
    if search.level is None or not missing:
        return
    _run(search, "models", [{MODEL: settings} for settings, _ in missing])
    failed = [str(model.run.path) for _, model in missing if not (model.run.path / "summary.json").exists()]
    if failed:
        raise ConfigError(
            f"Expected every model of the first level to be {search.level.made}. Got {len(failed)} that failed: {', '.join(failed)}. "
            "What went wrong is above; --resume tries again."
        )


def _level(search: Search, name: str) -> None:
    algorithm = search.config.algorithm
    points = None if isinstance(algorithm, Optuna | NSGA2) else [{POINT: asdict(point)} for point in search.points()]
    _run(search, name, points)


def _confirm(search: Search) -> None:
    """The chosen settings of each cell at the seeds that they lack, and the winner's model if it was given up before it won. What comes
    of it may choose others."""
    tried: set[str] = set()
    while missing := {point.digest: point for point in _missing(search) if point.digest not in tried}:
        for point in missing.values():
            forget(search.path, str(search.trial_config(point).run.path.relative_to(search.path)))
        _run(search, "confirm", [{POINT: asdict(point)} for point in missing.values()])
        tried |= missing.keys()


def _missing(search: Search) -> Iterator[Point]:
    if isinstance(search.config.scheduler, PBT):
        return  # the winner is a lineage, and there is nothing to run again
    for cell in read_search(search.path).cells:
        if cell.best is None:
            continue
        winner = min(cell.chosen, key=badness)
        lost = set() if (search.path / winner.folder / "export").exists() else {winner.seed}
        seeds = {*search.config.seeds} - {trial.seed for trial in cell.chosen} | lost
        yield from (Point(cell.task, cell.model, cell.best, seed) for seed in sorted(seeds))


def _num_trials(search: Search) -> int:
    algorithm = search.config.algorithm
    if isinstance(algorithm, NSGA2):
        return algorithm.num_samples * len(search.space)
    return algorithm.num_samples * len(search.cells()) if isinstance(algorithm, Optuna) else len(search.points())


def _run(search: Search, level: str, space: Sequence[Mapping[str, Any]] | None) -> None:
    """One experiment of Ray Tune, begun or gone on with.

    Args:
        space: what Ray Tune gives each trial, one key each; None: what Optuna suggests.
    """
    from ray import tune

    config, folder = search.config, search.path / "tune"
    done, wanted = folder / f"{level}.done", json.dumps(space)
    if done.exists() and done.read_text() == wanted:
        return
    resources = {"memory": float(DRIVER_BYTES)} if config.is_nested else per_worker(config.run)
    trainable = tune.with_resources(tune.with_parameters(trial, search=search.plain), resources)
    if level == "search" and tune.Tuner.can_restore(str(folder / level)) and any((folder / level).glob("experiment_state-*.json")):
        tuner = tune.Tuner.restore(str(folder / level), trainable, resume_unfinished=True, restart_errored=True)
    else:
        shutil.rmtree(folder / level, ignore_errors=True)
        tuner = _tuner(search, trainable, level, space)
    with _quiet():
        trials = tuner.fit()._experiment_analysis.trials
    if not all(one.is_finished() for one in trials) or len(trials) < (_num_trials(search) if space is None else len(space)):
        raise KeyboardInterrupt(f"interrupted; {search.path} is consistent. The same command with --resume goes on.")
    done.write_text(wanted)


def _tuner(search: Search, trainable: Any, level: str, space: Sequence[Mapping[str, Any]] | None) -> Any:
    from ray import tune

    config, searcher, param_space = search.config, None, {}
    if space is None:
        from tuning.cells import CellSearcher

        searcher, samples = CellSearcher(search), _num_trials(search)
    else:
        (key,), samples = space[0], 1
        param_space = {key: tune.grid_search([entry[key] for entry in space])}
    return tune.Tuner(
        trainable,
        param_space=param_space,
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=_scheduler(search) if level == "search" else None,
            num_samples=samples,
            max_concurrent_trials=concurrency(config),
            trial_name_creator=lambda one: one.trial_id,
            trial_dirname_creator=lambda one: one.trial_id,
        ),
        run_config=tune.RunConfig(
            name=level,
            storage_path=str(search.path / "tune"),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=4),  # of population based training, which exploits earlier ones too
            callbacks=[Watcher(search, _num_trials(search) if space is None else len(space))],
        ),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray Tune prints tables and hints of its own; `Watcher` says what happens."""
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Consider boosting PBT")  # a process of its own is what a trial is meant to have
        yield


def _clip(bounds: Mapping[str, tuple[float, float]], config: dict[str, Any]) -> dict[str, Any]:
    """What PBT has perturbed, within the space."""
    params = config[POINT]["params"]
    for key, (low, high) in bounds.items():
        params[key] = min(max(params[key], low), high)
    return config


def _scheduler(search: Search) -> Any:
    scheduler = search.config.scheduler
    if isinstance(scheduler, NoScheduler):
        return None
    if isinstance(scheduler, ASHA):
        from tuning.cells import CellScheduler

        return CellScheduler(search)
    from ray.tune.schedulers import PopulationBasedTraining

    assert isinstance(scheduler, PBT)
    random.seed(search.config.run.seed)  # PBT draws from the global generators
    np.random.seed(search.config.run.seed % 2**32)
    (task,) = search.space
    bounds = {key: (domain.ends()[0], domain.ends()[1]) for key, domain in search.space[task].items() if domain.choice is None}
    return PopulationBasedTraining(
        time_attr=PROGRESS,
        metric=OBJECTIVE,
        mode="min" if search.lower_is_better(task) else "max",
        perturbation_interval=100 * scheduler.every,
        quantile_fraction=scheduler.quantile,
        hyperparam_mutations={POINT: {"params": {key: domain.to_mutate() for key, domain in search.space[task].items()}}},
        custom_explore_fn=partial(_clip, bounds),
        log_config=False,
    )
