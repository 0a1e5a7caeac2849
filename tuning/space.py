"""What is searched: a YAML file whose keys are the dotted keys of the trainer, and the points that it spans.

Two levels. `pretrain.space` spans pre-training runs; each is run once and shared by every trial and search that needs it. The space of
a task spans fine-tunings of each of these. A trial is a run of `raysparse finetune` (of `raysparse pretrain` where there are no tasks),
and a `Point` has the command that makes it again.
"""

import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from raysparse.config import ConfigError, merge, parse_override, read_yaml
from raysparse.recipes.finetune import FinetuneConfig
from raysparse.recipes.job import identity_of
from raysparse.recipes.pretrain import PretrainConfig
from raysparse.recipes.training import check_sizes
from raysparse.tasks.metrics import LOWER_IS_BETTER
from raysparse.train.run import RunConfig
from tuning.config import NSGA2, PBT, Grid, NoScheduler, Optuna, Random, SearchConfig, StageConfig
from tuning.domain import Space, combinations, draw, is_plain, representatives

LOSS = "validation_loss"
MODELS = "pretrained"
"""Beside the folder of a search: the models of first levels."""
C = TypeVar("C", bound=PretrainConfig | FinetuneConfig)


@dataclass(frozen=True)
class Point:
    """One trial.

    Attributes:
        task: its name; None: a pre-training.
        pretrain: key -> value of the first level.
        params: key -> value of the second.
    """

    task: str | None
    pretrain: Mapping[str, Any]
    params: Mapping[str, Any]
    seed: int

    @property
    def cell(self) -> str:
        """What is searched by itself: the task, and the model that it starts from."""
        return json.dumps([self.task, self.pretrain], sort_keys=True)

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:10]

    def text(self) -> str:
        """For a line on the console."""
        settings = [f"{key.removeprefix('sparsity.')}={_short(value)}" for key, value in {**self.pretrain, **self.params}.items()]
        return " ".join([self.task or "pretrain", *settings, f"seed={self.seed}"])


class Search:
    """A checked search: its points and the configs that they stand for.

    Attributes:
        config: what the user wrote.
        contents: stage -> what its files hold; with these another machine needs no files.
    """

    def __init__(self, config: SearchConfig, contents: Mapping[str, Any] | None = None):
        """Raises:
        ConfigError: a stage whose config is not valid at an end of a domain, an unknown key, or parts that do not go together.
        """
        self.config = config
        self.contents = {name: _read(stage.files) for name, stage in _stages(config)} if contents is None else contents
        if config.pretrain is None and not config.tasks:
            raise ConfigError("Expected pretrain or tasks. Got neither. Example: tuning/spaces/docstrings.yaml")
        for name, stage in _stages(config):
            self._check_owned(name, stage)
        for settings in self.first_level():
            self.pretrain_config(settings)
        for task, space in self.space.items():
            for settings in representatives(space):
                for model in self.models(task):
                    self.trial_config(Point(task, model, settings, config.seeds[0]))
        self._check_together()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Search":
        """The inverse of `plain`."""
        return cls(SearchConfig.check(values["config"]), values["contents"])

    @property
    def plain(self) -> dict[str, Any]:
        """Plain data, to travel."""
        return {"config": self.config.model_dump(mode="json"), "contents": self.contents}

    @property
    def path(self) -> Path:
        return self.config.path

    @property
    def space(self) -> dict[str | None, Space]:
        """Task -> what a trial of it searches within a cell; key None where pre-training itself is searched."""
        return {
            task: {key: domain for key, domain in stage.space.items() if key != self._model_key(task)}
            for task, stage in (self.config.tasks.items() if self.config.tasks else [(None, self._stage(None))])
        }

    def first_level(self) -> list[dict[str, Any]]:
        """Settings of the models that are pre-trained for the tasks."""
        return self.models(next(iter(self.config.tasks))) if self.config.pretrain is not None and self.config.tasks else []

    def models(self, task: str | None) -> list[dict[str, Any]]:
        """Settings that set the cells of a task apart: of the pre-trainings that it starts from, of the model where there is no such
        level, of sparsity where pre-training itself is searched."""
        if task is not None and self.config.pretrain is not None:
            return list(combinations(self.config.pretrain.space, "pretrain.space"))
        key, space = self._model_key(task), self._stage(task).space
        return list(combinations({key: space[key]} if key in space else {}, "a cell"))

    def cells(self) -> list[tuple[str | None, dict[str, Any]]]:
        """(task, settings of its model), each searched by itself."""
        return [(task, model) for task in self.space for model in self.models(task)]

    def points(self) -> list[Point]:
        """Of a grid or a random search: every trial, of all cells; a point that is drawn twice is one."""
        found, seeds = [], self.config.seeds
        for task, model in self.cells():
            space = self.space[task]
            if isinstance(self.config.algorithm, Random):
                drawn = [draw(space, self.config.run.seed, i) for i in range(self.config.algorithm.num_samples)]
                found += [Point(task, model, params, seeds[0]) for params in drawn]
            else:
                found += [Point(task, model, params, seed) for params in combinations(space, _where(task)) for seed in seeds]
        return list({point.digest: point for point in found}.values())

    def pretrain_config(self, settings: Mapping[str, Any]) -> PretrainConfig:
        """Of a model that tasks start from: its folder is its content's, so that every search of this run.folder shares it."""
        config = self._config(PretrainConfig, "pretrain", settings, self._run("run", None), {})
        digest = hashlib.sha256(json.dumps(identity_of(config), sort_keys=True).encode()).hexdigest()[:10]
        name = f"sparsity{config.sparsity.target:g}-{digest}"
        run = config.run.model_copy(update={"name": name, "folder": str(self.path.parent / MODELS)})
        return config.model_copy(update={"run": run})

    def trial_config(self, point: Point) -> PretrainConfig | FinetuneConfig:
        where, settings, model = self._parts(point)
        run = self._run(f"{point.task or 'pretrain'}-{point.digest}", point.seed)
        if point.task is None:
            return self._config(PretrainConfig, where, settings, run, model)
        return self._config(FinetuneConfig, where, settings, run, model)

    def parent(self, point: Point) -> Path | None:
        """The run that a trial starts from; None: none, or a model that no run left."""
        config = self.trial_config(point)
        if isinstance(config, PretrainConfig) or config.model.path is None:
            return None
        folder = Path(config.model.path)
        places = [place for place in (folder, folder.parent) if (place / "identity.json").exists()]
        return folder if self.config.pretrain is not None else next(iter(places), None)

    def command(self, point: Point) -> str:
        """The line that makes a trial again, in a folder of its own."""
        where, settings, model = self._parts(point)
        config = self.trial_config(point)
        run = config.run.model_copy(update={"name": f"{config.run.name}-again", "folder": self.config.run.folder})
        values = self._values(where, settings, {"run": run.model_dump(mode="json")}, model)
        usual = {f"run.{key}": value for key, value in RunConfig().model_dump(mode="json").items()}
        written = dict(flat(self.contents[where]))
        words = [_word(key, value) for key, value in flat(values) if value != written.get(key, usual.get(key, ...))]
        return shlex.join(["raysparse", "pretrain" if point.task is None else "finetune", *self._stage(point.task).files, *words])

    def metric(self, task: str | None) -> str:
        """What settings of a task are chosen by."""
        reported = [LOSS]
        if task is not None:
            config = self.trial_config(self.some_point(task))
            assert isinstance(config, FinetuneConfig)
            if config.validate_by == "metric" and config.task.primary != "perplexity":
                reported.append(config.task.primary)
        if self.config.metric == "auto":
            return reported[-1]
        if self.config.metric not in reported:
            raise ConfigError(
                f"Expected a metric that trials of {task or 'pre-training'} report: {', '.join(reported)}. Got {self.config.metric}. "
                f"Use one of these{'' if task is None or len(reported) > 1 else f', or tasks.{task}.set.validate_by=metric'}."
            )
        return self.config.metric

    def lower_is_better(self, task: str | None) -> bool:
        metric = self.metric(task)
        return metric == LOSS or metric in LOWER_IS_BETTER

    def some_point(self, task: str | None) -> Point:
        """One of a task's, to look at its config."""
        params = {key: domain.ends()[0] for key, domain in self.space[task].items()}
        return Point(task, self.models(task)[0], params, self.config.seeds[0])

    def _stage(self, task: str | None) -> StageConfig:
        return dict(_stages(self.config))[_where(task).removesuffix(".space")]

    def _model_key(self, task: str | None) -> str:
        """The key whose values set cells apart where there is no first level."""
        return "sparsity.target" if task is None else "model.path"

    def _parts(self, point: Point) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """A point's stage, the settings of it, and the model that the first level gives it."""
        where = _where(point.task).removesuffix(".space")
        if point.task is None or self.config.pretrain is None:
            return where, {**point.pretrain, **point.params}, {}
        return where, dict(point.params), {"model": {"path": str(self.pretrain_config(point.pretrain).run.path)}}

    def _run(self, name: str, seed: int | None) -> dict[str, Any]:
        """The run section of every stage: the search's, in a folder below its own."""
        own = {"name": name, "folder": str(self.path / "trials")} | ({} if seed is None else {"seed": seed})
        return {"run": self.config.run.model_dump(mode="json") | own}

    def _values(self, where: str, settings: Mapping[str, Any], run: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
        """The plain config of a stage: its files, the search's run, the user's changes, the point."""
        values = merge(merge(self.contents[where], run), dict(_stages(self.config))[where].set)
        if isinstance(self.config.scheduler, PBT):
            every = f"{100 * self.config.scheduler.every:g} %"
            values = merge(values, {"training": {"validate_every": every}, "checkpoint": {"every": every}})
        return merge(merge(values, nested(settings)), model)

    def _config(self, kind: type[C], where: str, settings: Mapping[str, Any], run: Mapping[str, Any], model: Mapping[str, Any]) -> C:
        try:
            config = kind.check(self._values(where, settings, run, model))
            check_sizes(config)
            return config
        except ConfigError as error:
            at = ", ".join(f"{key}={_short(value)}" for key, value in settings.items())
            raise ConfigError(f"{where}{f' at {at}' if at else ''}: {error}") from None

    def _check_owned(self, name: str, stage: StageConfig) -> None:
        """What the search sets in every run is not the stage's to change."""
        keys = [key for key in (*dict(flat(stage.set)), *stage.space) if key == "run" or key.startswith("run.")]
        if self.config.pretrain is not None and name != "pretrain":
            keys += [key for key in (*dict(flat(stage.set)), *stage.space) if key == "model.path"]
        if keys:
            raise ConfigError(
                f"Expected {name} without {', '.join(keys)}, which the search sets. Change the search's own run section (run.seed is of "
                "pre-training, seeds of the trials), or leave pretrain out to fine-tune models that are there."
            )

    def _check_together(self) -> None:
        config = self.config
        config.run.check_fixed("a trial that grows would take the room of the next one")
        for task, space in self.space.items():
            self.metric(task)
            if isinstance(config.algorithm, Optuna) and not space:
                raise ConfigError(f"Expected keys in {_where(task)} for algorithm.type=optuna. Got none. Use algorithm.type=grid.")
        if isinstance(config.scheduler, PBT):
            if config.is_nested:
                raise ConfigError(
                    f"Expected run.workers=1 with scheduler.type=pbt. Got {config.run.workers}: Ray Tune cannot hand a checkpoint to a "
                    "trial whose weights are in a worker group of its own, so no trial could go on from a better one's. "
                    "Use run.workers=1 or scheduler.type=asha."
                )
            if len(self.cells()) > 1 or not isinstance(config.algorithm, Grid | Random):
                raise ConfigError(
                    f"Expected one task, one pre-trained model and algorithm.type grid or random with scheduler.type=pbt: one population. "
                    f"Got {len(self.cells())} cells and {config.algorithm.type}. Search them one after another, or use scheduler.type=asha."
                )
            if fixed := [key for space in self.space.values() for key, domain in space.items() if not is_plain(domain)]:
                raise ConfigError(f"Expected plain values to perturb with scheduler.type=pbt. Got sections in {', '.join(fixed)}.")
        if isinstance(config.algorithm, NSGA2) and not isinstance(config.scheduler, NoScheduler):
            raise ConfigError(
                f"Expected scheduler.type=none with algorithm.type=nsga2, which judges FLOPs and score of whole runs. "
                f"Got {config.scheduler.type}. Use scheduler.type=none or algorithm.type=optuna."
            )


def _where(task: str | None) -> str:
    return "pretrain.space" if task is None else f"tasks.{task}.space"


def _stages(config: SearchConfig) -> Iterator[tuple[str, StageConfig]]:
    if config.pretrain is not None:
        yield "pretrain", config.pretrain
    for name, stage in config.tasks.items():
        yield f"tasks.{name}", stage


def _read(files: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for file in files:
        values = merge(values, read_yaml(file))
    return values


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` -> ``{"a": {"b": 1}}``."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        found = merge(found, value)
    return found


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The inverse; a mapping that names a type stays whole, for as such it is merged."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value and "type" not in value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _word(key: str, value: Any) -> str:
    """The override that reads back as this value."""
    if isinstance(value, str) and parse_override(f"{key}={value}") == nested({key: value}):
        return f"{key}={value}"
    return f"{key}={json.dumps(value)}"


def _short(value: Any) -> str:
    text = f"{value:.3g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
