"""What is searched: a YAML file whose keys are the dotted keys of the trainer, and the points that it spans.

Two levels. The space of `pretrain`, or of `prune`, spans models; each is made once and shared by every trial and search that needs it
(`tuning/first.py`). The space of a task spans fine-tunings of each of these. A trial is a run of `raysparse finetune` (of `raysparse
pretrain` where there are no tasks), and a `Point` has the command that makes it again.
"""

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from raysparse.config import ConfigError, merge, read_yaml
from raysparse.recipes.finetune import FinetuneConfig
from raysparse.recipes.job import identity_of
from raysparse.recipes.pretrain import PretrainConfig
from raysparse.recipes.prune import PruneConfig
from raysparse.recipes.training import TrainingRunConfig, check_sizes
from raysparse.tasks.metrics import LOWER_IS_BETTER
from raysparse.train.run import RunConfig
from tuning.config import PBT, Random, SearchConfig, StageConfig
from tuning.domain import Space, combinations, draw, representatives
from tuning.first import LEVELS, PRUNED, UNPRUNED, level_of
from tuning.keys import flat, nested, override, short, words
from tuning.together import check_parts, check_pruned, check_together

LOSS = "validation_loss"
C = TypeVar("C", bound=PretrainConfig | PruneConfig | FinetuneConfig)


@dataclass(frozen=True)
class Point:
    """One trial.

    Attributes:
        task: its name; None: a pre-training.
        model: key -> value that its cell's model has: of the first level, of the task's model.path where there is no such level.
        params: key -> value that is searched within the cell.
    """

    task: str | None
    model: Mapping[str, Any]
    params: Mapping[str, Any]
    seed: int

    @property
    def cell(self) -> str:
        """What is searched by itself: the task, and the model that it starts from."""
        return json.dumps([self.task, self.model], sort_keys=True)

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:10]

    def text(self) -> str:
        """For a line on the console."""
        return " ".join([self.task or "pretrain", *words({**self.model, **self.params}), f"seed={self.seed}"])


class Search:
    """A checked search: its points and the configs that they stand for.

    Attributes:
        config: what the user wrote.
        level: what makes the models that tasks start from; None: they are there, or pre-training itself is searched.
        stages: ``pretrain``, ``prune`` or ``tasks.NAME`` -> its part of the config.
        contents: stage -> what its files hold; with these another machine needs no files.
    """

    def __init__(self, config: SearchConfig, contents: Mapping[str, Any] | None = None):
        """Raises:
        ConfigError: a stage whose config is not valid at an end of a domain, an unknown key, or parts that do not go together.
        """
        self.config = config
        self.level = level_of(config) if config.tasks else None
        first = {level.verb: stage for level in LEVELS if (stage := level.stage(config)) is not None}
        self.stages: dict[str, StageConfig] = first | {f"tasks.{name}": stage for name, stage in config.tasks.items()}
        self.contents = {name: _read(stage.files) for name, stage in self.stages.items()} if contents is None else contents
        check_parts(self)
        check_pruned(self)
        for task, space in self.space.items():
            for settings in representatives(space):
                for model in self.models(task):
                    self.trial_config(Point(task, model, settings, config.seeds[0]))
        check_together(self)

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
            task: {key: domain for key, domain in self._stage(task).space.items() if key != self._model_key(task)}
            for task in self.config.tasks or [None]
        }

    def where(self, task: str | None) -> str:
        """The key of a task's space."""
        return f"{self._name(task)}.space"

    def first_level(self) -> list[tuple[dict[str, Any], PretrainConfig | PruneConfig]]:
        """(settings, config) of every model that is made for the tasks."""
        found = [] if self.level is None else [(settings, self.model_config(settings)) for settings in self._models()]
        return [(settings, config) for settings, config in found if config is not None]

    def models(self, task: str | None) -> list[dict[str, Any]]:
        """Settings that set the cells of a task apart: of the models of the first level, of the model where there is no such level, of
        sparsity where pre-training itself is searched."""
        if self.level is not None:
            return self._models()
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
                found += [Point(task, model, params, seed) for params in combinations(space, self.where(task)) for seed in seeds]
        return list({point.digest: point for point in found}.values())

    def model_config(self, settings: Mapping[str, Any]) -> PretrainConfig | PruneConfig | None:
        """Of the run that makes a model of the first level: its folder is its content's, so that every search of this run.folder shares
        it. None of the model that is pruned, as it is."""
        assert self.level is not None
        if self.level is PRUNED and settings == UNPRUNED:
            return None
        config = self._config(self.level.config, self.level.verb, settings, self._run("run", None), {})
        digest = hashlib.sha256(json.dumps(identity_of(config), sort_keys=True).encode()).hexdigest()[:10]
        name = f"sparsity{config.sparsity.target:g}-{digest}"
        run = config.run.model_copy(update={"name": name, "folder": str(self.path.parent / self.level.folder)})
        return config.model_copy(update={"run": run})

    def trial_config(self, point: Point) -> PretrainConfig | FinetuneConfig:
        settings, model = self._parts(point)
        run = self._run(f"{point.task or 'pretrain'}-{point.digest}", point.seed)
        if point.task is None:
            return self._config(PretrainConfig, self._name(None), settings, run, model)
        return self._config(FinetuneConfig, self._name(point.task), settings, run, model)

    def parent(self, point: Point) -> Path | None:
        """The run that a trial starts from; None: none, a model that no run left, or one that is pruned in other cells: what
        trained it is theirs too."""
        config = self.trial_config(point)
        if isinstance(config, PretrainConfig) or config.model.path is None:
            return None
        folder = Path(config.model.path)
        if self.level is not None:
            return None if self.model_config(point.model) is None else folder
        return next((place for place in (folder, folder.parent) if (place / "identity.json").exists()), None)

    def command(self, point: Point) -> str:
        """The line that makes a trial again, in a folder of its own."""
        where, (settings, model) = self._name(point.task), self._parts(point)
        config = self.trial_config(point)
        run = config.run.model_copy(update={"name": f"{config.run.name}-again", "folder": self.config.run.folder})
        values = self._values(where, settings, {"run": run.model_dump(mode="json")}, model)
        usual = {f"run.{key}": value for key, value in RunConfig().model_dump(mode="json").items()}
        written = dict(flat(self.contents[where]))
        overrides = [override(key, value) for key, value in flat(values) if value != written.get(key, usual.get(key, ...))]
        return shlex.join(["raysparse", "pretrain" if point.task is None else "finetune", *self._stage(point.task).files, *overrides])

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

    def _name(self, task: str | None) -> str:
        """Of the stage that a trial is a run of."""
        return "pretrain" if task is None else f"tasks.{task}"

    def _stage(self, task: str | None) -> StageConfig:
        return self.stages[self._name(task)]

    def _model_key(self, task: str | None) -> str:
        """The key whose values set cells apart where there is no first level."""
        return "sparsity.target" if task is None else "model.path"

    def _models(self) -> list[dict[str, Any]]:
        """Settings of the first level; of all that prune nothing one is kept."""
        assert self.level is not None
        found = combinations(self.stages[self.level.verb].space, f"{self.level.verb}.space")
        if self.level is PRUNED:
            found = (UNPRUNED if self._prunes_nothing(settings) else settings for settings in found)
        return list({json.dumps(settings, sort_keys=True): dict(settings) for settings in found}.values())

    def _prunes_nothing(self, settings: Mapping[str, Any]) -> bool:
        """Whatever else such a point sets then makes no difference."""
        return settings.get("sparsity.target") == 0 and not self._values(PRUNED.verb, settings, {}, {})["sparsity"].get("layers")

    def _parts(self, point: Point) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings of a point's own stage, and the part of its config that the first level gives it."""
        if self.level is None:
            return {**point.model, **point.params}, {}
        config, where = self.model_config(point.model), self._name(point.task)
        path = self.first_level()[0][1].model.path if config is None else str(config.run.path)
        given = {"sparsity": {"masks": "lift"}} if config is None else self.level.gives
        is_scratch = merge(self.contents[where], self.stages[where].set).get("model", {}).get("preset")  # files of the dense model itself
        no_preset = {"model": {"preset": None}, "tokenizer": None} if is_scratch else {}
        return dict(point.params), merge(merge(no_preset, {"model": {"path": path}}), given)

    def _run(self, name: str, seed: int | None) -> dict[str, Any]:
        """The run section of every stage: the search's, in a folder below its own."""
        own = {"name": name, "folder": str(self.path / "trials")} | ({} if seed is None else {"seed": seed})
        return {"run": self.config.run.model_dump(mode="json") | own}

    def _values(self, where: str, settings: Mapping[str, Any], run: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
        """The plain config of a stage: its files, the search's run, the user's changes, the point."""
        values = merge(merge(self.contents[where], run), self.stages[where].set)
        if isinstance(self.config.scheduler, PBT) and where != PRUNED.verb:
            every = f"{100 * self.config.scheduler.every:g} %"
            values = merge(values, {"training": {"validate_every": every}, "checkpoint": {"every": every}})
        return merge(merge(values, nested(settings)), model)

    def _config(self, kind: type[C], where: str, settings: Mapping[str, Any], run: Mapping[str, Any], model: Mapping[str, Any]) -> C:
        try:
            config = kind.check(self._values(where, settings, run, model))
            if isinstance(config, TrainingRunConfig):
                check_sizes(config)
            return config
        except ConfigError as error:
            at = ", ".join(f"{key}={short(value)}" for key, value in settings.items())
            raise ConfigError(f"{where}{f' at {at}' if at else ''}: {error}") from None


def _read(files: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for file in files:
        values = merge(values, read_yaml(file))
    return values
