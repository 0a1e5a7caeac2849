"""Every combination of some settings of a fine-tuning, the best one chosen on the validation split and scored on the other."""

import json
from collections.abc import Callable
from itertools import product
from typing import Any

from raysparse.config import ConfigError, merge
from raysparse.recipes import evaluate, finetune
from raysparse.recipes.evaluate import EvaluateConfig
from raysparse.recipes.finetune import FinetuneConfig
from raysparse.recipes.job import Job, write_atomically
from raysparse.report.table import Block, Table
from raysparse.tasks.metrics import LOWER_IS_BETTER

Launch = Callable[[list[Job]], list[dict[str, Any]]]
BEST = "best"
"""Folder of the final scores."""


def grid(config: FinetuneConfig, launch: Launch) -> tuple[dict[str, Any], str]:
    """Fine-tune at every point that is not finished, score the best on `evaluation.split`; returns the facts and a table."""
    stages = points(config)
    summaries = dict(zip(stages, launch([finetune.open_run(stage) for stage in stages.values()]), strict=True))
    metric = config.task.primary
    sign = -1 if metric in LOWER_IS_BETTER else 1
    best = max(summaries, key=lambda name: sign * summaries[name]["task"]["scores"][metric])
    final = final_of(config, stages[best])
    (scored,) = launch([evaluate.open_run(final)])
    rows: list[dict[str, Any]] = [
        {"name": name, "settings": settings, "validation_loss": told["loss"]["validation"], metric: told["task"]["scores"][metric]}
        for (name, told), settings in zip(summaries.items(), combinations(config), strict=True)
    ]
    facts = {"metric": metric, "points": rows, "best": best, "split": config.evaluation.split, "scores": scored["task"]["scores"]}
    cells = tuple(
        (
            row["name"] + (" *" if row["name"] == best else ""),
            *(str(value) for value in row["settings"].values()),
            f"{row['validation_loss']:.4f}",
            f"{row[metric]:.2f}",
        )
        for row in sorted(rows, key=lambda row: -sign * row[metric])
    )
    told = ", ".join(f"{name} {value:.2f}" for name, value in facts["scores"].items())
    notes = (f"* chosen by {metric} on the validation split. On {config.evaluation.split}: {told}.",)
    columns = ("run", *config.grid, "val. loss", f"val. {metric}")
    table = Table((Block(f"Grid of {config.run.name}", columns, cells, notes),))
    write_atomically(config.run.path / "grid.json", json.dumps(facts, indent=1) + "\n")
    write_atomically(config.run.path / "grid.md", table.markdown())
    return facts, table.terminal()


def dry_run(config: FinetuneConfig) -> dict[str, Any]:
    return {name: finetune.dry_run(stage) for name, stage in points(config).items()}


def combinations(config: FinetuneConfig) -> list[dict[str, Any]]:
    """Dotted key -> value, of every point."""
    if not config.grid:
        raise ConfigError("Expected keys and their values in grid. Got none. Example: grid={optimizer.lr: [1e-4, 5e-5]}.")
    return [dict(zip(config.grid, values, strict=True)) for values in product(*config.grid.values())]


def points(config: FinetuneConfig) -> dict[str, FinetuneConfig]:
    """Name -> config of every point, in a folder below the grid's, scored on the validation split."""
    if (config.run.path / "identity.json").exists():
        raise ConfigError(f"Expected {config.run.path} to be new or a grid. Got a run of its own. Choose another run.name.")
    found = {}
    for settings in combinations(config):
        name = "-".join(f"{key.rpartition('.')[2]}{value}" for key, value in settings.items())
        values = config.model_dump(mode="json") | {"grid": {}}
        for key, value in settings.items():
            nested: Any = value
            for part in reversed(key.split(".")):
                nested = {part: nested}
            values = merge(values, nested)
        own = {"run": {"name": name, "folder": str(config.run.path)}, "evaluation": {"split": "validation"}}
        found[name] = FinetuneConfig.check(merge(values, own))
    return found


def final_of(config: FinetuneConfig, stage: FinetuneConfig) -> EvaluateConfig:
    """The evaluation of a point's model on the split that the grid is scored on."""
    values = config.model_dump(mode="json")
    kept = {key: values[key] for key in ("task", "context", "generation", "evaluation", "cache_dir")}
    run = values["run"] | {"name": BEST, "folder": str(config.run.path), "workers": config.run.sizes[0]}
    return EvaluateConfig.check(kept | {"run": run, "model": {"path": str(stage.run.path)}})
