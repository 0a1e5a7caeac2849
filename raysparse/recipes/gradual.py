"""A trained model made sparser in stages: pruned to a level, fine-tuned with its mask kept, and from there on to the next level.

SquareHead's way to 90 % (arXiv:2310.06927): every stage has an optimizer and a schedule of its own. All stages run back to back in one
worker group.
"""

import json
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from raysparse.config import Config, ConfigError
from raysparse.models.build import ModelConfig
from raysparse.recipes import finetune, prune
from raysparse.recipes.compare import Launch, StageConfig
from raysparse.recipes.finetune import FinetuneConfig
from raysparse.recipes.job import Job, write_atomically
from raysparse.recipes.prune import PruneConfig
from raysparse.recipes.training import check_sizes
from raysparse.report.table import Block, Table
from raysparse.train.run import RunConfig

Level = Annotated[float, Field(gt=0, lt=1)]


class GradualConfig(Config):
    """`raysparse gradual`: prune, fine-tune, prune further, fine-tune ... down to the last level."""

    run: RunConfig = RunConfig(name="gradual")
    """Name and place of the whole; its name, folder, seed, workers, threads, device and parity hold for every stage."""
    model: ModelConfig
    """The trained model to begin with."""
    levels: tuple[Level, ...] = Field((0.50, 0.67, 0.75, 0.80, 0.83, 0.86, 0.88, 0.90), min_length=1)
    """sparsity.target of each stage, rising; SquareHead's compression by 2, 3, 4, 5, 6, 7, 8 and 10."""
    prune: StageConfig
    """Of every level; its sparsity.target is the level's."""
    finetune: StageConfig
    """Of every pruned model; its masks are kept."""

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if list(self.levels) != sorted(set(self.levels)):
            raise ValueError(f"Expected levels that rise. Got {', '.join(f'{level:g}' for level in self.levels)}. Put them in order")
        return self


def gradual(config: GradualConfig, launch: Launch) -> tuple[dict[str, Any], str]:
    """Run every stage that is not finished; returns the facts and a table."""
    summaries = launch(open_runs(config))
    stages = [dict(zip(("pruned", "tuned"), pair, strict=True)) for pair in zip(summaries[::2], summaries[1::2], strict=True)]
    facts = {"levels": [_row(stage) for stage in stages]}
    columns = ("sparsity", "live", "loss before", "pruned", "fine-tuned", *facts["levels"][0]["scores"])
    cells = tuple(map(_cells, facts["levels"]))
    notes = ("Losses are of held-out samples, nats a token: those of prune's calibration, and of fine-tuning's validation.",)
    table = Table((Block(f"Stages of {config.run.name}", columns, cells, notes),))
    write_atomically(config.run.path / "config.yaml", config.to_yaml())
    write_atomically(config.run.path / "gradual.json", json.dumps(facts, indent=1) + "\n")
    write_atomically(config.run.path / "gradual.md", table.markdown() + "\n")
    return facts, table.terminal()


def dry_run(config: GradualConfig) -> dict[str, Any]:
    """Check the configs of all stages, and the model."""
    check(config)
    pairs = stages_of(config)
    folder = prune.model_of(pairs[0][0])
    for pruned, _ in pairs:
        prune.check_model(pruned, folder)
    return {name: stage.model_dump(mode="json") for name, stage in stages(config).items()}


def check(config: GradualConfig) -> None:
    """What can be told from the configs alone."""
    for _, tuned in stages_of(config):
        check_sizes(tuned)


def stages(config: GradualConfig) -> dict[str, PruneConfig | FinetuneConfig]:
    """Stage -> config, all of them in order."""
    return {stage.run.name: stage for pair in stages_of(config) for stage in pair}


def open_runs(config: GradualConfig) -> list[Job]:
    """The jobs of all stages, everything checked that can be checked before the first one has run."""
    pairs, jobs = stages_of(config), []
    folder = prune.model_of(pairs[0][0])  # all stages have its shapes and its tokenizer
    for pruned, tuned in pairs:
        jobs.append(prune.open_run(pruned, folder if jobs else None))
        jobs.append(finetune.open_run(tuned, folder))
    return jobs


def stages_of(config: GradualConfig) -> list[tuple[PruneConfig, FinetuneConfig]]:
    """Of each level the two stages: each begins with what the stage before it ends with."""
    if (config.run.path / "identity.json").exists():
        raise ConfigError(f"Expected {config.run.path} to be new or a gradual pruning. Got a run of another verb. Choose another run.name.")
    found, model = [], config.model.model_dump(mode="json")
    for level in config.levels:
        pruned = PruneConfig.check(config.prune.values(config.run, f"prune-{level:g}", {"model": model, "sparsity": {"target": level}}))
        own = {"model": {"path": str(pruned.run.path)}, "sparsity": {"masks": "keep"}}
        tuned = FinetuneConfig.check(config.finetune.values(config.run, f"tune-{level:g}", own))
        found.append((pruned, tuned))
        model = model | {"preset": None, "path": str(tuned.run.path)}
    return found


def _row(stage: dict[str, Any]) -> dict[str, Any]:
    pruned, tuned = stage["pruned"], stage["tuned"]
    loss = pruned["pruning"]["loss"]
    return {
        "sparsity": tuned["sparsity"]["actual"],
        "nnz": tuned["sparsity"]["nnz"],
        "before": loss["before"],
        "pruned": loss["after"],
        "tuned": tuned["loss"]["validation"],
        "scores": tuned["task"]["scores"],
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    losses = ("" if row[key] is None else f"{row[key]:.4f}" for key in ("before", "pruned", "tuned"))
    return (f"{row['sparsity']:.4f}", f"{row['nnz']:,}", *losses, *(f"{score:.2f}" for score in row["scores"].values()))
