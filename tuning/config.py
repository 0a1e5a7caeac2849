"""The config of a search: its stages, its algorithm, its scheduler."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from raysparse.config import Config
from raysparse.train.run import RunConfig
from tuning.domain import Space


class StageConfig(Config):
    """The config of a kind of run: its YAML files, what to change in them, and what to search."""

    files: tuple[str, ...] = Field(min_length=1)
    """Config files of the stage's own verb, merged left to right."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Keys to change in every run of the stage, for example ``pretrain.set.training.length=100``."""
    space: Space = Field(default_factory=dict)
    """Dotted key -> its values: ``optimizer.lr: {loguniform: [1e-5, 1e-3]}``."""

    @field_validator("space", mode="before")
    @classmethod
    def _dotted(cls, value: Any) -> Any:
        """An override of a key comes nested, and after what the files say: it takes the place of their values."""
        return dict(_domains(value, "")) if isinstance(value, Mapping) else value


def _domains(values: Mapping[str, Any], at: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        is_section = isinstance(value, Mapping) and value and all(isinstance(inner, Mapping) for inner in value.values())
        if is_section:
            yield from _domains(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", value


class Grid(Config):
    """Every combination, at every seed."""

    type: Literal["grid"] = "grid"


class Random(Config):
    """Points drawn from the space, functions of run.seed."""

    type: Literal["random"] = "random"
    num_samples: int = Field(16, ge=1)
    """Points of each cell (a task and a model)."""


class Optuna(Config):
    """Optuna's TPE: each cell's next points follow from how its earlier ones did (pip install raysparse[tune])."""

    type: Literal["optuna"] = "optuna"
    num_samples: int = Field(16, ge=1)
    """Points of each cell (a task and a model)."""


class NSGA2(Config):
    """Optuna's NSGA-II: score and counted FLOPs at once, over models too: a Pareto front of each task."""

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
    """Every combination of its space is pre-trained once; null, without prune: the tasks' model.path says what to fine-tune."""
    prune: StageConfig | None = None
    """Instead of pretrain: by every combination of its space one trained model (prune.set.model.path) is pruned once, and the tasks
    fine-tune it with its masks kept. sparsity.target 0 is that model as it is."""
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
    """Trials of each cell whose model is kept, the best ones. No trial that has ended keeps checkpoints."""
    max_concurrent: int = Field(0, ge=0)
    """Trials at a time; 0: as many as the cluster holds."""
    max_failures: int = Field(2, ge=0)
    """How often a trial that died is tried again, from its last checkpoint."""

    @model_validator(mode="after")
    def _one_first_level(self) -> Self:
        if self.pretrain is not None and self.prune is not None:
            raise ValueError("Expected pretrain or prune to make the models that tasks start from. Got both. Drop one, or set it to null")
        return self

    @property
    def path(self) -> Path:
        return self.run.path

    @property
    def is_nested(self) -> bool:
        """Whether a trial has a worker group of Ray Train, and does not run in the trial's own process."""
        return self.run.sizes[-1] > 1
