"""One trial: a run of a recipe, in the trial's own process or in a worker group of Ray Train, whose validations Ray Tune sees.

Everything a trial does lies in a run folder, as if `raysparse finetune` had been called: one that is finished is not run again, one that
was lost goes on from its last checkpoint.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raysparse.config import ConfigError
from raysparse.recipes import MODULES
from raysparse.recipes.finetune import FinetuneConfig
from raysparse.recipes.job import Job, finished
from raysparse.recipes.pretrain import PretrainConfig
from raysparse.recipes.prune import PruneConfig
from raysparse.train.error import TrainingError
from raysparse.train.metrics import Console
from tuning.config import PBT
from tuning.space import LOSS, Point, Search

POINT, MODEL = "point", "model"
"""Keys of Ray Tune's config: the fields of the trial's `Point`, or the settings of a model of the first level."""
FOLDER, OBJECTIVE, FLOPS, PROGRESS = "folder", "objective", "flops", "progress"
"""Of what a trial reports: its run folder, what it is chosen by, counted FLOPs end to end, percent of its steps."""
STATUS, ERROR = "status", "error"
"""Of its last report: finished or failed, and why."""
LOG = "log.txt"
"""In a run folder: the lines that a console would show."""
HANDOVER = "handover"
"""In a run folder: the checkpoint that Ray Tune takes a copy of."""


def trial(params: dict[str, Any], search: dict[str, Any]) -> None:
    """What Ray Tune calls, in a process of the trial's own.

    Args:
        params: `POINT` or `MODEL`.
        search: `Search.plain`.
    """
    import ray
    from ray import tune

    found = Search.of(search)
    if not (found.config.is_nested or ray.get_gpu_ids()):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # one that this trial has no share of
    if POINT not in params:
        _Trial(found, found.model_config(params[MODEL]), None).run(None)
        return
    point = Point(**params[POINT])
    try:
        config, given = found.trial_config(point), None
    except ConfigError as error:  # values that do not go together; only a sampler comes to them unchecked
        _report_failure(found.lower_is_better(point.task), error)
        return
    if isinstance(found.config.scheduler, PBT):
        checkpoint, own = tune.get_checkpoint(), f"{point.task or 'pretrain'}-{tune.get_context().get_trial_id()}"
        given = None if checkpoint is None else Path(checkpoint.path)
        start = hashlib.sha256(f"{point.digest} {given}".encode()).hexdigest()[:10]
        config = config.model_copy(update={"run": config.run.model_copy(update={"name": f"{own}-{start}"})})
        for former in [folder for folder in config.run.path.parent.glob(f"{own}-*") if folder != config.run.path]:
            for what in ("checkpoints", HANDOVER):
                shutil.rmtree(former / what, ignore_errors=True)
    _Trial(found, config, point).run(given)


class _Trial:
    def __init__(self, search: Search, config: PretrainConfig | PruneConfig | FinetuneConfig | None, point: Point | None):
        """Args:
        point: None: the run makes a model of the first level.
        """
        assert config is not None
        self._search, self._level, self._config = search.config, search.level if point is None else None, config
        self._verb = self._level.verb if self._level else "pretrain" if isinstance(config, PretrainConfig) else "finetune"
        self._metric = LOSS if point is None else search.metric(point.task)
        self._lower = point is None or search.lower_is_better(point.task)
        self._before = 0.0 if point is None else _flops_of(search.parent(point))

    def run(self, given: Path | None) -> None:
        """Carry out the run and report it.

        Args:
            given: a checkpoint of another trial to go on from.
        """
        from ray import tune

        try:
            job = MODULES[self._verb].open_run(self._config)
            if given is not None:
                shutil.copytree(given, job.path / "checkpoints", dirs_exist_ok=True)
            reporter = Reporter(job, self._metric, self._before, with_checkpoints=isinstance(self._search.scheduler, PBT))
            summary = finished(job) or self._carry_out(job, reporter)
        except (ConfigError, TrainingError) as error:  # trying again would come to the same
            _report_failure(self._lower, error, self._config.run.path)
            return
        tune.report(self._final(summary) | {FOLDER: job.folder, STATUS: "finished"})

    def _carry_out(self, job: Job, reporter: "Reporter") -> dict[str, Any]:
        if self._search.is_nested:
            from raysparse.runtime.launch import launch

            _tell_address()
            (summary,) = launch([job], self._config.run, reporter)
        else:
            from raysparse.runtime.local import run_here

            (summary,) = run_here([job], self._config.run, reporter, reporter.committed)
        return summary

    def _final(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        told = {PROGRESS: 100.0, "seconds": summary["seconds"]}
        if self._level is not None:
            loss = self._level.loss_of(summary)
            return told if loss is None else told | {OBJECTIVE: loss}
        loss = summary["loss"]
        best = loss["validation"] if self._metric == LOSS else loss["validation_score"]
        return told | {OBJECTIVE: best, FLOPS: self._before + summary["flops"]["counted"]}


def _report_failure(lower: bool, error: Exception, folder: Path | None = None) -> None:
    """As bad as can be; what went wrong is told beside it.

    Args:
        lower: whether the objective is to be small.
        folder: of the run, if it has one.
    """
    from ray import tune

    worst = {OBJECTIVE: math.inf if lower else -math.inf, FLOPS: math.inf, PROGRESS: 100.0}
    tune.report(worst | {STATUS: "failed", ERROR: str(error)} | ({} if folder is None else {FOLDER: str(folder)}))


class Reporter(Console):
    """Hands a run's validations to Ray Tune, in place of the console that would show them.

    Ray Tune answers a report with its decision: where that is to stop the trial, the report ends the thread that made it.
    """

    def __init__(self, job: Job, metric: str, before: float, with_checkpoints: bool):
        """Args:
        before: counted FLOPs of what the run starts from.
        with_checkpoints: report a validation with the checkpoint of its step, when that is there.
        """
        self._job, self._metric, self._before, self._with_checkpoints = job, metric, before, with_checkpoints
        self._train: dict[str, Any] = {"flops": 0.0, "seconds": 0.0}
        self._validation: tuple[int, dict[str, Any]] = 0, {}

    def show(self, record: Mapping[str, Any]) -> None:
        if "text" in record:
            with (self._job.path / LOG).open("a", encoding="utf-8") as stream:
                stream.write(record["text"] + "\n")
        if "loss" in record:
            self._train = {"flops": record["flops"], "seconds": record["seconds"]}
        if "validation_loss" not in record:
            return
        value = record["validation_loss"] if self._metric == LOSS else record["validation_score"]
        report = {OBJECTIVE: value, PROGRESS: 100.0 * record["step"] / record["steps"], FOLDER: self._job.folder}
        report |= {FLOPS: self._before + self._train["flops"], "seconds": self._train["seconds"]}
        self._validation = record["step"], report
        if not self._with_checkpoints:
            self._report()

    def committed(self, checkpoint: Path) -> None:
        """A checkpoint is being written; it is of the step that was last validated, if that is of the same number."""
        from ray import tune

        from raysparse.runtime.ray_run import when_committed

        step, report = self._validation
        if not self._with_checkpoints or int(checkpoint.name.rpartition("_")[2]) != step:
            return
        when_committed(None, checkpoint)
        shutil.rmtree(handover := self._job.path / HANDOVER, ignore_errors=True)
        shutil.copytree(checkpoint, handover / checkpoint.name, copy_function=os.link)
        tune.report(report, checkpoint=tune.Checkpoint.from_directory(handover))

    def close(self) -> None:
        pass

    def _report(self) -> None:
        from ray import tune

        tune.report(self._validation[1])


def _tell_address() -> None:
    """When a trial is stopped, a process of Ray Train's frees what its workers held. It looks for its cluster by RAY_ADDRESS, and with
    several on a machine and no address it fails, and the next trial waits for ever; Ray Train hands few variables on."""
    import ray
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")


def _flops_of(parent: Path | None) -> float:
    """Counted FLOPs of the run that a trial starts from; 0 where it starts from none, or from a pruning, which counts none."""
    if parent is None or not (parent / "summary.json").exists():
        return 0.0
    summary = json.loads((parent / "summary.json").read_text())
    return summary["flops"]["counted"] if "flops" in summary else 0.0
