"""SPDF from end to end, beside its dense twin: two pre-trainings, three fine-tunings, one table and one page.

The stages run back to back in one worker group: `dense` and `sparse` share seed, data order and steps; each is fine-tuned with
every weight alive, and the sparse one once more with its mask kept.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from raysparse.config import Config, ConfigError, merge, read_yaml
from raysparse.recipes import finetune, pretrain
from raysparse.recipes.finetune import FinetuneConfig
from raysparse.recipes.job import Job, write_atomically
from raysparse.recipes.pretrain import PretrainConfig
from raysparse.recipes.training import check_sizes
from raysparse.sparsity.plan import Sparsity
from raysparse.train.run import RunConfig

Launch = Callable[[list[Job]], list[dict[str, Any]]]


class StageConfig(Config):
    """The config of a kind of stage: YAML files, and what to change in them."""

    files: tuple[str, ...] = Field(min_length=1)
    """Config files of the stage's own verb, merged left to right."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Keys to change, for example ``pretrain.set.training.length=100`` on the command line."""


class CompareConfig(Config):
    """`raysparse compare`: is it worth it to leave most weights out? All stages, one worker group, report.html."""

    run: RunConfig = RunConfig(name="compare")
    """Name and place of the whole; its name, folder, seed, workers, threads, device and parity hold for every stage."""
    pretrain: StageConfig
    finetune: StageConfig
    sparsity: Sparsity = 0.75
    """Of the sparse pre-training."""


def compare(config: CompareConfig, launch: Launch) -> tuple[dict[str, Any], str]:
    """Run every stage that is not finished, then compare; returns the facts and the table as text."""
    jobs = open_runs(config)
    launch(jobs)
    return report(config, [job.path for job in jobs])


def dry_run(config: CompareConfig) -> dict[str, Any]:
    """Check the configs of all stages; nothing is tokenized or written."""
    twins, tuned = check(config)
    facts = {name: pretrain.dry_run(stage) for name, stage in twins.items()}
    return facts | {name: stage.model_dump(mode="json") for name, stage in tuned.items()}


def check(config: CompareConfig) -> tuple[dict[str, PretrainConfig], dict[str, FinetuneConfig]]:
    """The configs of all stages, before anything is written; raises a `ConfigError` for stages that do not fit."""
    if config.sparsity == 0:
        raise ConfigError("Expected a sparsity above 0 to compare with the dense twin. Got 0. Example: sparsity=0.75")
    if (config.run.path / "identity.json").exists():
        raise ConfigError(f"Expected {config.run.path} to be new or a comparison. Got a run of another verb. Choose another run.name.")
    twins, tuned = pretrain_configs(config), finetune_configs(config)
    context = twins["pretrain-dense"].data.context
    for stage in tuned.values():
        check_sizes(stage)
        if stage.context > context or stage.generation.max_new_tokens >= stage.context:
            raise ConfigError(
                f"Expected finetune's context of at most {context} tokens, which pre-training has, with room for "
                f"generation.max_new_tokens. Got {stage.context} and {stage.generation.max_new_tokens}. Change finetune.set."
            )
    return twins, tuned


def pretrain_configs(config: CompareConfig) -> dict[str, PretrainConfig]:
    """The twins: equal but for the sparsity."""
    levels = {"pretrain-dense": 0.0, "pretrain-sparse": config.sparsity}
    return {
        name: PretrainConfig.check(_values(config, config.pretrain, name, {"sparsity": {"target": level}}))
        for name, level in levels.items()
    }


def finetune_configs(config: CompareConfig) -> dict[str, FinetuneConfig]:
    """Dense from dense, dense from sparse (SPDF), sparse from sparse."""
    stages = {
        "dense-to-dense": ("pretrain-dense", "lift"),
        "sparse-to-dense": ("pretrain-sparse", "lift"),
        "sparse-to-sparse": ("pretrain-sparse", "keep"),
    }
    result = {}
    for name, (parent, masks) in stages.items():
        own = {"model": {"path": str(config.run.path / parent)}, "sparsity": {"masks": masks}}
        result[name] = FinetuneConfig.check(_values(config, config.finetune, name, own))
    return result


def open_runs(config: CompareConfig) -> list[Job]:
    """The jobs of all stages, everything checked that can be checked before the first one has run."""
    twins, tuned = check(config)
    jobs = [pretrain.open_run(stage) for stage in twins.values()]
    tokenizer = jobs[0].prepared["tokenizer"]
    return jobs + [finetune.open_run(stage, tokenizer) for stage in tuned.values()]


def report(config: CompareConfig, folders: list[Path]) -> tuple[dict[str, Any], str]:
    """Write ``report.html`` and ``table.md`` into the run folder; returns the facts and the table."""
    from raysparse.report import read_run
    from raysparse.report.distance import cosine_distances
    from raysparse.report.page import Notes, write_page
    from raysparse.report.table import comparison

    runs = [read_run(folder) for folder in folders]
    table = comparison(runs)
    root = config.run.path
    distances = {
        "dense": cosine_distances(root / "pretrain-dense" / "export", root / "dense-to-dense" / "export"),
        f"{config.sparsity:.0%} sparse": cosine_distances(root / "pretrain-sparse" / "export", root / "sparse-to-dense" / "export"),
    }
    write_atomically(root / "config.yaml", config.to_yaml())
    command = f"raysparse compare {config.run.folder}/{config.run.name}/config.yaml run.name={config.run.name}-again"
    write_page(root / "report.html", f"raysparse: {config.sparsity:.0%} sparse against dense", runs, distances, Notes(commands=(command,)))
    write_atomically(root / "table.md", table.markdown() + "\n")
    facts = {
        "report": str(root / "report.html"),
        "stages": {run.name: run.summary for run in runs},
        "distances": distances,
    }
    return facts, f"{table.terminal()}\nPlots and details: {root / 'report.html'}"


def _values(config: CompareConfig, stage: StageConfig, name: str, own: dict[str, Any]) -> dict[str, Any]:
    """The plain config of a stage: its files, the user's changes, what the comparison needs, and the common run section."""
    values: dict[str, Any] = {}
    for file in stage.files:
        values = merge(values, read_yaml(file))
    common = config.run.model_dump(mode="json") | {"name": name, "folder": str(config.run.path)}
    return merge(merge(merge(values, stage.set), own), {"run": common})
