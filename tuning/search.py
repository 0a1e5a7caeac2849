"""`raysparse tune`: check, pre-train what is missing, search, run the best settings at the seeds they lack, report.

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
from typing import Any, cast

import numpy as np

from raysparse.config import ConfigError, read_yaml
from raysparse.models.build import skeleton
from raysparse.recipes import finetune, pretrain
from raysparse.recipes.finetune import FinetuneConfig
from raysparse.recipes.job import different_keys, write_atomically
from raysparse.recipes.pretrain import PretrainConfig
from raysparse.report import bytes_text
from raysparse.report.search import read_search
from raysparse.runtime.launch import check_resources, per_worker, start
from tuning.space import ASHA, NSGA2, PBT, NoScheduler, Optuna, Point, Search, SearchConfig
from tuning.trial import MODEL, OBJECTIVE, POINT, PROGRESS, trial

CONFIG = "search.yaml"
NOT_IDENTITY = ("keep", "max_concurrent", "max_failures", "tolerance")
"""Keys that may change when a search is resumed, and those of `run` about the machine."""
OF_MACHINE = ("workers", "threads", "device", "max_failures", "folder", "name")
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

    found = Search(config)
    check_folder(config, resume)
    check(found)
    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)
    started = start(config.run, spare=0, dashboard=config.is_nested)
    try:
        check_resources(config.run)
        if config.is_nested:
            _check_dashboard()
        config.path.mkdir(parents=True, exist_ok=True)
        write_atomically(config.path / CONFIG, config.to_yaml())
        _pretrain(found)
        _level(found, "search")
        _confirm(found)
    finally:
        if started:
            import ray

            ray.shutdown()
    report = read_report(config.path)
    report.write()
    return report.facts, f"{report.terminal()}\nPlots and details: {report.files['html']}"


def dry_run(config: SearchConfig) -> tuple[dict[str, Any], str]:
    """Check everything that can be checked without tokenizing, and tell what would run."""
    found = Search(config)
    check_folder(config, resume=True)
    models = [found.pretrain_config(settings) for settings in found.models()] if config.pretrain and config.tasks else []
    done = [model.run.name for model in models if (model.run.path / "summary.json").exists()]
    facts: dict[str, Any] = {
        "models": [model.run.name for model in models],
        "models_done": done,
        "trials": _num_trials(found),
        "metric": {task or "pretrain": found.metric(task) for task in found.space},
    }
    lines = [
        f"{len(models)} models to pre-train, {len(done)} of them done",
        f"{facts['trials']} trials, chosen by {', '.join(f'{metric} ({task})' for task, metric in facts['metric'].items())}",
    ]
    if not isinstance(config.algorithm, Optuna | NSGA2):
        facts["commands"] = [found.command(point) for point in found.points()]
        lines += facts["commands"]
    return facts, "\n".join([*lines, "The search is sound. Nothing was started."])


def check_folder(config: SearchConfig, resume: bool) -> None:
    """The search's folder must be new, or hold this very search if it is resumed."""
    file = config.path / CONFIG
    if not file.exists():
        if config.path.exists() and any(config.path.iterdir()):
            raise ConfigError(f"Expected {config.path} to be a search, or empty. Got other files there. Choose another run.name.")
        return
    before, now = read_yaml(file), config.model_dump(mode="json")
    for values in (before, now):
        for key in NOT_IDENTITY:
            values.pop(key, None)
        for key in OF_MACHINE:
            values["run"].pop(key, None)
    if keys := different_keys(before, now):
        raise ConfigError(
            f"Expected run.name={config.run.name} to be new, or the search as it was. Got other values of: {', '.join(keys)}. "
            f"Choose another run.name, or go back to {file}."
        )
    if not resume:
        raise ConfigError(
            f"Expected a new run.name. Got {config.run.name}, a search that was begun in {config.path}. "
            f"Add --resume to go on with it, or choose another run.name; `raysparse report {config.path}` reports it as it stands."
        )


def check(search: Search) -> None:
    """Models, data and disk, before anything is started; tokenizes the data (cached)."""
    config = search.config
    tokenizer: str | None = None
    for settings in search.models() if config.tasks and config.pretrain else []:
        tokenizer = pretrain.check(search.pretrain_config(settings)).tokenizer
    for task in search.space:
        some = search.trial_config(search.some_point(task))
        if isinstance(some, FinetuneConfig):
            finetune.check(some, tokenizer)
        else:
            pretrain.check(some)
    if isinstance(config.algorithm, Optuna | NSGA2):
        try:
            import optuna  # noqa: F401
        except ImportError:
            raise ConfigError(
                f"Expected the package optuna for algorithm.type={config.algorithm.type}. Got an ImportError. "
                "pip install 'raysparse[tune]', or use algorithm.type=random."
            ) from None
    check_disk(search)


def check_disk(search: Search) -> None:
    """Room for the checkpoints and models that are there at once, estimated from the number of parameters."""
    config, cells = search.config, len(search.cells())
    models = [search.pretrain_config(settings) for settings in search.models()] if config.pretrain and config.tasks else []
    some = search.trial_config(search.some_point(next(iter(search.space))))
    parameters = _parameters(models[0] if models else some)
    of_run = 12 * (some.checkpoint.keep + 1) + 4  # weights and two moments, one more while it is written; the export
    at_once = config.max_concurrent or 2
    need = parameters * of_run * (len(models) + cells * config.keep + at_once)
    place = next(path for path in (config.path, *config.path.parents) if path.exists())
    if (free := shutil.disk_usage(place).free) < need:
        raise ConfigError(
            f"Expected about {bytes_text(need)} of disk at {place}: {len(models)} models, {cells} cells that keep "
            f"{config.keep} trials each, and {at_once} trials at a time of {parameters:,} parameters ({of_run} bytes each). "
            f"Got {bytes_text(free)} free. Choose another run.folder, or lower keep, checkpoint.keep or max_concurrent."
        )


def _parameters(config: PretrainConfig | FinetuneConfig) -> int:
    from raysparse.recipes.evaluate import load_tokenizer

    if isinstance(config, PretrainConfig):
        model = skeleton(config.model, getattr(config.data.tokenizer, "vocab_size", None), config.data.context)
    else:
        config = finetune.with_model_folder(config)
        model = skeleton(config.model, len(load_tokenizer(str(config.model.path))), config.context)
    return sum(parameter.numel() for parameter in model.parameters())


def _check_dashboard() -> None:
    """Ray Train frees what a stopped trial held by asking the dashboard; without one the next trial would wait for ever."""
    import ray
    from ray.util.state import list_nodes

    try:
        list_nodes(address=ray.get_runtime_context().gcs_address, limit=1, timeout=20)
    except Exception as error:
        raise ConfigError(
            f"Expected a Ray cluster with a dashboard for trials of several workers. Got: {str(error).splitlines()[0]}. "
            "Start it with `ray start --head --include-dashboard=true` (pip install 'ray[default]'), or use run.workers=1."
        ) from None


def _pretrain(search: Search) -> None:
    """The first level: every model that tasks start from and that no search has made yet."""
    if not (search.config.pretrain and search.config.tasks):
        return
    missing = [model for model in search.models() if not (search.pretrain_config(model).run.path / "summary.json").exists()]
    if not missing:
        return
    _run(search, "pretrain", [{MODEL: settings} for settings in missing])
    failed = [model for model in missing if not (search.pretrain_config(model).run.path / "summary.json").exists()]
    if failed:
        raise ConfigError(
            f"Expected every model of the first level to be pre-trained. Got {len(failed)} that failed: "
            f"{', '.join(str(search.pretrain_config(model).run.path) for model in failed)}. What went wrong is above; --resume tries again."
        )


def _level(search: Search, name: str) -> None:
    algorithm = search.config.algorithm
    points = None if isinstance(algorithm, Optuna | NSGA2) else [{POINT: asdict(point)} for point in search.points()]
    _run(search, name, points)


def _confirm(search: Search) -> None:
    """The chosen settings of each cell at the seeds that they lack, and the winner's model if it was given up before it won."""
    missing = []
    for cell in read_search(search.path).cells:
        if cell.best is None:
            continue
        done = {trial.seed for trial in cell.chosen}
        missing += [Point(cell.task, cell.pretrain, cell.best, seed) for seed in search.config.seeds if seed not in done]
        sign = 1 if cell.chosen[0].lower_is_better else -1
        winner = min(cell.chosen, key=lambda trial: sign * cast(float, trial.objective))
        if not (search.path / winner.folder / "export").exists():
            shutil.rmtree(search.path / winner.folder, ignore_errors=True)
            missing.append(Point(cell.task, cell.pretrain, cell.best, winner.seed))
    if missing:
        _run(search, "confirm", [{POINT: asdict(point)} for point in missing])


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
    if level == "search" and tune.Tuner.can_restore(str(folder / level)):
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

    from tuning.watch import Watcher

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


def concurrency(config: SearchConfig) -> int:
    """Trials at a time: what the cluster holds, which Ray Tune does not know of trials with a worker group of their own."""
    import ray

    have, need = ray.cluster_resources(), per_worker(config.run)
    fits = min(int(have.get(name, 0) // (amount * config.run.workers)) for name, amount in need.items())
    return min(fits, config.max_concurrent or fits)


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
    return PopulationBasedTraining(
        time_attr=PROGRESS,
        metric=OBJECTIVE,
        mode="min" if search.lower_is_better(task) else "max",
        perturbation_interval=100 * scheduler.every,
        quantile_fraction=scheduler.quantile,
        hyperparam_mutations={POINT: {"params": {key: domain.to_mutate() for key, domain in search.space[task].items()}}},
        log_config=False,
    )
