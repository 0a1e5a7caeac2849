"""What is searched: a YAML file whose keys are the dotted keys of the trainer, and the points that it spans.

Two levels. `pretrain.space` spans pre-training runs; each is run once and shared by every trial and search that needs it. The space of
a task spans fine-tunings of each of these. A trial is a run of `raysparse finetune` (of `raysparse pretrain` where there are no tasks),
and a `Point` has the command that makes it again.
"""

import hashlib
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from raysparse.config import Config, ConfigError, merge, parse_override, read_yaml
from raysparse.recipes.finetune import FinetuneConfig
from raysparse.recipes.job import identity_of
from raysparse.recipes.pretrain import PretrainConfig
from raysparse.sparsity import counter
from raysparse.tasks.metrics import LOWER_IS_BETTER
from raysparse.train.run import RunConfig

LOSS = "validation_loss"
Number = int | float
C = TypeVar("C", bound=PretrainConfig | FinetuneConfig)


class Domain(Config):
    """The values of one key; exactly one of these."""

    choice: tuple[Any, ...] | None = None
    """Any of these, which may be whole sections: ``{choice: [0, 0.5, 0.75]}``."""
    uniform: tuple[float, float] | None = None
    """A float of [low, high)."""
    loguniform: tuple[float, float] | None = None
    """A float whose logarithm is uniform: learning rates."""
    randint: tuple[int, int] | None = None
    """An integer of [low, high)."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if len(given := [name for name, value in self if value is not None]) != 1:
            raise ValueError(f"Expected one of choice, uniform, loguniform, randint. Got {', '.join(given) or 'none'}")
        if self.choice is not None:
            if not self.choice:
                raise ValueError("Expected at least one value in choice. Got none")
            if len(set(map(json.dumps, self.choice))) < len(self.choice):
                raise ValueError(f"Expected different values in choice. Got one twice in {list(self.choice)}")
        else:
            low, high = self.bounds
            if not low < high or (self.loguniform and low <= 0):
                raise ValueError(f"Expected [low, high] with low < high{', both above 0' * bool(self.loguniform)}. Got {[low, high]}")
        return self

    @model_serializer(mode="wrap")
    def _given(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in serialize(self).items() if value is not None}

    @property
    def bounds(self) -> tuple[Number, Number]:
        """Of a domain that is no choice."""
        found = self.uniform or self.loguniform or self.randint
        assert found is not None
        return found

    def ends(self) -> tuple[Any, ...]:
        """Values that stand for all: every one of a choice, both ends of a range."""
        return self.choice if self.choice is not None else (self.bounds[0], self.bounds[1] - 1 if self.randint else self.bounds[1])

    def at(self, share: float) -> Any:
        """The value at `share` of [0, 1) of the domain."""
        if self.choice is not None:
            return self.choice[int(share * len(self.choice))]
        low, high = self.bounds
        if self.loguniform:
            return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
        return math.floor(low + share * (high - low)) if self.randint else low + share * (high - low)

    def to_tune(self) -> Any:
        """As Ray Tune has it; a choice by its index, for its values may be anything."""
        from ray import tune

        if self.choice is not None:
            return tune.choice(list(range(len(self.choice))))
        kinds = {"uniform": tune.uniform, "loguniform": tune.loguniform, "randint": tune.randint}
        return next(kinds[name](*bounds) for name, bounds in self if bounds is not None)

    def to_mutate(self) -> Any:
        """As Ray Tune's PBT has it."""
        return list(self.choice) if self.choice is not None else self.to_tune()

    def of_tune(self, value: Any) -> Any:
        """The value that `to_tune`'s stands for."""
        return value if self.choice is None else self.choice[value]


Space = dict[str, Domain]
"""Dotted key -> values."""


class StageConfig(Config):
    """The config of a kind of run: its YAML files, what to change in them, and what to search."""

    files: tuple[str, ...] = Field(min_length=1)
    """Config files of the stage's own verb, merged left to right."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Keys to change in every run of the stage, for example ``pretrain.set.training.length=100``."""
    space: Space = Field(default_factory=dict)
    """Dotted key -> its values: ``optimizer.lr: {loguniform: [1e-5, 1e-3]}``."""


class Grid(Config):
    """Every combination, at every seed."""

    type: Literal["grid"] = "grid"


class Random(Config):
    """Points drawn from the space, functions of run.seed."""

    type: Literal["random"] = "random"
    num_samples: int = Field(16, ge=1)
    """Points of each cell (a task and a pre-trained model)."""


class Optuna(Config):
    """Optuna's TPE: each cell's next points follow from how its earlier ones did (pip install raysparse[tune])."""

    type: Literal["optuna"] = "optuna"
    num_samples: int = Field(16, ge=1)
    """Points of each cell (a task and a pre-trained model)."""


class NSGA2(Config):
    """Optuna's NSGA-II: score and counted FLOPs at once, over pre-trained models too: a Pareto front of each task."""

    type: Literal["nsga2"] = "nsga2"
    num_samples: int = Field(32, ge=1)
    """Points of each task."""


class NoScheduler(Config):
    """Every trial runs to its end."""

    type: Literal["none"] = "none"


class ASHA(Config):
    """Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934): at each rung the best 1 / reduction of a cell go on."""

    type: Literal["asha"] = "asha"
    grace: float = Field(0.2, gt=0, lt=1)
    """Share of the steps before which no trial is stopped: the first rung."""
    reduction: int = Field(2, ge=2)
    """Steps and stopped trials from rung to rung."""


class PBT(Config):
    """Population based training (Jaderberg et al. 2017, arXiv:1711.09846): the worst go on from the best's weights, settings perturbed."""

    type: Literal["pbt"] = "pbt"
    every: float = Field(0.2, gt=0, lt=1)
    """Share of the steps between perturbations; a validation and a checkpoint each."""
    quantile: float = Field(0.25, gt=0, le=0.5)
    """Share of the population that is replaced, and replaces."""


class SearchConfig(Config):
    """`raysparse tune`: which sparsity and which settings give a task the best score for the fewest FLOPs; ends with report.html."""

    run: RunConfig = RunConfig(name="search")
    """Name and place of the whole; folder, seed, workers, threads, device, precision and parity hold for every run."""
    pretrain: StageConfig | None = None
    """Every combination of its space is pre-trained once; null: the tasks' model.path says what to fine-tune."""
    tasks: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], StageConfig] = Field(default_factory=dict)
    """Name -> fine-tunings of it. None: pre-training itself is searched."""
    algorithm: Annotated[Grid | Random | Optuna | NSGA2, Field(discriminator="type")] = Grid()
    scheduler: Annotated[NoScheduler | ASHA | PBT, Field(discriminator="type")] = NoScheduler()
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1)
    """run.seed of the fine-tunings. A grid has all points at all seeds; else the best of each cell is run again at those it lacks."""
    metric: str = "auto"
    """What settings are chosen by, on the validation split: validation_loss, or the task's first score where it has
    validate_by=metric. auto: the latter where it is there."""
    tolerance: float = Field(0.5, ge=0)
    """How much worse than dense the task's first score may be, in its own units: of what the report recommends."""
    keep: int = Field(1, ge=1)
    """Trials of each cell whose model and checkpoints are kept, the best ones."""
    max_concurrent: int = Field(0, ge=0)
    """Trials at a time; 0: as many as the cluster holds."""
    max_failures: int = Field(2, ge=0)
    """How often a trial that died is tried again, from its last checkpoint."""

    @property
    def path(self) -> Path:
        return self.run.path

    @property
    def is_nested(self) -> bool:
        """Whether a trial has a worker group of Ray Train, and does not run in the trial's own process."""
        return self.run.workers > 1


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
        self.contents = {name: _read(stage.files) for name, stage in _stages(config)} if contents is None else contents
        if config.pretrain is None and not config.tasks:
            raise ConfigError("Expected pretrain or tasks. Got neither. Example: tuning/spaces/docstrings.yaml")
        self.config = config
        if config.pretrain is not None:
            for settings in _representatives(config.pretrain.space, "pretrain.space"):
                self._pretrain(settings)
        for name, stage in config.tasks.items():
            for settings in _representatives(stage.space, f"tasks.{name}.space"):
                self._finetune(Point(name, self.models()[0], settings, config.seeds[0]), "run")
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
        """Task -> what a trial of it searches; key None where pre-training itself is searched."""
        if self.config.tasks:
            return {name: stage.space for name, stage in self.config.tasks.items()}
        assert self.config.pretrain is not None
        return {None: self.config.pretrain.space}

    def models(self) -> list[dict[str, Any]]:
        """Settings of the pre-trainings that tasks start from, a combination each; one without settings where there is no such level."""
        if self.config.pretrain is None or not self.config.tasks:
            return [{}]
        return list(combinations(self.config.pretrain.space, "pretrain.space"))

    def cells(self) -> list[tuple[str | None, dict[str, Any]]]:
        """(task, settings of the model that it starts from), each searched by itself."""
        return [(task, model) for task in self.space for model in self.models()]

    def points(self) -> list[Point]:
        """Of a grid or a random search: every trial, of all cells; a point that is drawn twice is one."""
        found, seeds = [], self.config.seeds
        for task, model in self.cells():
            space = self.space[task]
            if isinstance(self.config.algorithm, Random):
                drawn = [draw(space, self.config.run.seed, i) for i in range(self.config.algorithm.num_samples)]
                found += [Point(task, model, params, seeds[0]) for params in drawn]
            else:
                key = "pretrain.space" if task is None else f"tasks.{task}.space"
                found += [Point(task, model, params, seed) for params in combinations(space, key) for seed in seeds]
        return list({point.digest: point for point in found}.values())

    def pretrain_config(self, settings: Mapping[str, Any]) -> PretrainConfig:
        """Of a model that tasks start from: its folder is its content's, so that every search of this run.folder shares it."""
        config = self._pretrain(settings)
        digest = hashlib.sha256(json.dumps(identity_of(config), sort_keys=True).encode()).hexdigest()[:10]
        run = config.run.model_copy(
            update={"name": f"sparsity{config.sparsity.target:g}-{digest}", "folder": str(self.config.path.parent / "pretrained")}
        )
        return config.model_copy(update={"run": run})

    def trial_config(self, point: Point) -> PretrainConfig | FinetuneConfig:
        name = f"{point.task or 'pretrain'}-{point.digest}"
        return self._pretrain(point.params, name, point.seed) if point.task is None else self._finetune(point, name)

    def command(self, point: Point) -> str:
        """The line that makes a trial again, in a folder of its own."""
        where = "pretrain" if point.task is None else f"tasks.{point.task}"
        stage, config = dict(_stages(self.config))[where], self.trial_config(point)
        run = config.run.model_copy(update={"name": f"{config.run.name}-again", "folder": self.config.run.folder})
        values = self._values(where, point.params, {"run": run.model_dump(mode="json")}, self._model_of(point))
        usual = {f"run.{key}": value for key, value in RunConfig().model_dump(mode="json").items()}
        written = dict(flat(self.contents[where]))
        words = [_word(key, value) for key, value in flat(values) if value != written.get(key, usual.get(key, ...))]
        return shlex.join(["raysparse", "pretrain" if point.task is None else "finetune", *stage.files, *words])

    def metric(self, task: str | None) -> str:
        """What settings of a task are chosen by."""
        reported = [LOSS]
        if task is not None:
            config = self._finetune(self.some_point(task), "run")
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
        return Point(task, self.models()[0], {key: domain.ends()[0] for key, domain in self.space[task].items()}, self.config.seeds[0])

    def _pretrain(self, settings: Mapping[str, Any], name: str = "run", seed: int | None = None) -> PretrainConfig:
        return self._config(PretrainConfig, "pretrain", settings, self._run(name, seed), {})

    def _finetune(self, point: Point, name: str) -> FinetuneConfig:
        return self._config(FinetuneConfig, f"tasks.{point.task}", point.params, self._run(name, point.seed), self._model_of(point))

    def _run(self, name: str, seed: int | None) -> dict[str, Any]:
        """The run section of every stage: the search's, in a folder below its own."""
        own = {"name": name, "folder": str(self.path / "trials")} | ({} if seed is None else {"seed": seed})
        return {"run": self.config.run.model_dump(mode="json") | own}

    def _model_of(self, point: Point) -> dict[str, Any]:
        if point.task is None or self.config.pretrain is None:
            return {}
        return {"model": {"path": str(self.pretrain_config(point.pretrain).run.path)}}

    def _values(self, where: str, settings: Mapping[str, Any], run: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
        """The plain config of a stage: its files, the search's run, the user's changes, the point."""
        values = merge(merge(self.contents[where], run), dict(_stages(self.config))[where].set)
        if isinstance(self.config.scheduler, PBT):
            every = f"{100 * self.config.scheduler.every:g} %"
            values = merge(values, {"training": {"validate_every": every}, "checkpoint": {"every": every}})
        return merge(merge(values, nested(settings)), model)

    def _config(self, kind: type[C], where: str, settings: Mapping[str, Any], run: Mapping[str, Any], model: Mapping[str, Any]) -> C:
        try:
            return kind.check(self._values(where, settings, run, model))
        except ConfigError as error:
            at = ", ".join(f"{key}={_short(value)}" for key, value in settings.items())
            raise ConfigError(f"{where}{f' at {at}' if at else ''}: {error}") from None

    def _check_together(self) -> None:
        config = self.config
        for task in self.space:
            self.metric(task)
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
            if fixed := [key for space in self.space.values() for key, domain in space.items() if not _is_plain(domain)]:
                raise ConfigError(f"Expected plain values to perturb with scheduler.type=pbt. Got sections in {', '.join(fixed)}.")
        if isinstance(config.algorithm, NSGA2) and not isinstance(config.scheduler, NoScheduler):
            raise ConfigError(
                f"Expected scheduler.type=none with algorithm.type=nsga2, which judges FLOPs and score of whole runs. "
                f"Got {config.scheduler.type}. Use scheduler.type=none or algorithm.type=optuna."
            )


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


def combinations(space: Space, where: str) -> Iterator[dict[str, Any]]:
    """Key -> value of every combination.

    Raises:
        ConfigError: a range, of which there is no every.
    """
    ranges = [key for key, domain in space.items() if domain.choice is None]
    if ranges:
        raise ConfigError(
            f"Expected choices for every combination of {where}. Got a range for {', '.join(ranges)}. "
            f"List values ({ranges[0]}: {{choice: [...]}}), or use algorithm.type=random or optuna where it is a task's."
        )
    for values in product(*(domain.choice or () for domain in space.values())):
        yield dict(zip(space, values, strict=True))


def draw(space: Space, seed: int, index: int) -> dict[str, Any]:
    """The index-th random point: a function of the seed, the index and each key."""
    return {key: domain.at(counter.key(seed, "tune", index, key) % 2**53 / 2**53) for key, domain in space.items()}


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


def _representatives(space: Space, where: str) -> Iterator[dict[str, Any]]:
    """Settings in which every end of every domain occurs."""
    ends = {key: domain.ends() for key, domain in space.items()}
    for i in range(max(map(len, ends.values()), default=1)):
        yield {key: values[min(i, len(values) - 1)] for key, values in ends.items()}


def _is_plain(domain: Domain) -> bool:
    return all(isinstance(value, int | float | str) for value in domain.ends())


def _short(value: Any) -> str:
    text = f"{value:.3g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
