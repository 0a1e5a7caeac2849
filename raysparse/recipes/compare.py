"""Methods of pre-training side by side: the same model, data, steps and seed; one table and one page.

The stages run back to back in one worker group. A method is a name and what it changes in the config of pre-training; one is
dense, the twin of the others. SPDF from end to end is the default pair with a fine-tuning: the sparse model once with every
weight alive and once with its mask kept.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from raysparse.config import Config, ConfigError, merge, read_yaml, within
from raysparse.recipes import finetune, pretrain
from raysparse.recipes.finetune import FinetuneConfig
from raysparse.recipes.job import Job, opening, write_atomically
from raysparse.recipes.pretrain import PretrainConfig
from raysparse.recipes.training import check_sizes
from raysparse.sparsity.plan import Sparsity
from raysparse.train.run import RunConfig

Launch = Callable[[list[Job]], list[dict[str, Any]]]
MethodName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
"""Part of folder names: without a hyphen, so that no stage of one method has the name of another's."""


class StageConfig(Config):
    """The config of a kind of stage: YAML files, and what to change in them."""

    files: tuple[str, ...] = Field(min_length=1)
    """Config files of the stage's own verb, merged left to right."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Keys to change, for example ``pretrain.set.training.length=100`` on the command line."""

    def values(self, run: RunConfig, name: str, own: Mapping[str, Any]) -> dict[str, Any]:
        """The plain config of a stage below the folder of `run`: files, the user's changes, `own`, and what holds for all stages."""
        values: dict[str, Any] = {}
        for file in self.files:
            values = merge(values, read_yaml(file))
        common = run.model_dump(mode="json") | {"name": name, "folder": str(run.path)}
        return merge(merge(merge(values, self.set), own), {"run": common})


class CompareConfig(Config):
    """`raysparse compare`: is it worth it to leave most weights out, and how best? All stages, one worker group, report.html."""

    run: RunConfig = RunConfig(name="compare")
    """Name and place of the whole; its name, folder, seed, workers, threads, device and parity hold for every stage."""
    pretrain: StageConfig
    finetune: StageConfig | None = None
    """Of every pre-trained model with all weights alive, and of one that ends sparse also with its mask kept; null: none."""
    sparsity: Sparsity = 0.75
    """sparsity.target of every method that does not set its own."""
    methods: dict[MethodName, dict[str, Any]] = Field(default_factory=lambda: {"dense": {"sparsity": {"target": 0.0}}, "sparse": {}})
    """Name -> what the method changes in pretrain's files and set. Exactly one is dense: the others are compared with it."""


def compare(config: CompareConfig, launch: Launch) -> tuple[dict[str, Any], str]:
    """Run every stage that is not finished, then compare; returns the facts and the table as text."""
    jobs = open_runs(config)
    launch(jobs)
    return report(config, [job.path for job in jobs])


def dry_run(config: CompareConfig) -> dict[str, Any]:
    """Check the configs of all stages; nothing is tokenized or written."""
    pretrained, tuned = check(config)
    facts = {name: pretrain.dry_run(stage) for name, stage in pretrained.items()}
    return facts | {name: stage.model_dump(mode="json") for name, stage in tuned.items()}


def check(config: CompareConfig) -> tuple[dict[str, PretrainConfig], dict[str, FinetuneConfig]]:
    """The configs of all stages, before anything is written; raises a `ConfigError` for stages that do not fit."""
    config.run.check_fixed("the seconds of the stages are compared")
    if (config.run.path / "identity.json").exists():
        raise ConfigError(f"Expected {config.run.path} to be new or a comparison. Got a run of another verb. Choose another run.name.")
    pretrained = pretrain_configs(config)
    dense = [name for name, stage in zip(config.methods, pretrained.values(), strict=True) if not stage.sparsity.wants_masks]
    if len(dense) != 1 or len(pretrained) == 1:
        raise ConfigError(
            f"Expected one dense method, which the others are compared with, and at least one sparse. Got {len(dense)} dense "
            f"({', '.join(dense) or 'none'}) of: {', '.join(config.methods) or 'no methods'}. Set methods.NAME.sparsity.target to 0 in "
            "one, and sparsity, or the target of the others, above 0."
        )
    tuned = finetune_configs(config)
    for stage in tuned.values():
        check_sizes(stage)
        context = pretrained[_parent(stage)].data.context
        if stage.context > context or stage.generation.max_new_tokens >= stage.context:
            raise ConfigError(
                f"Expected finetune's context of at most {context} tokens, which pre-training has, with room for "
                f"generation.max_new_tokens. Got {stage.context} and {stage.generation.max_new_tokens}. Change finetune.set."
            )
    return pretrained, tuned


def pretrain_configs(config: CompareConfig) -> dict[str, PretrainConfig]:
    """Stage -> config, in the order of the methods; equal but for what the methods change."""
    configs = {}
    for name, changes in config.methods.items():
        own = merge({"sparsity": {"target": config.sparsity}}, changes)
        with within(f"methods.{name}"):
            configs[f"pretrain-{name}"] = PretrainConfig.check(config.pretrain.values(config.run, f"pretrain-{name}", own))
    return configs


def stages(config: CompareConfig) -> dict[str, PretrainConfig | FinetuneConfig]:
    """Stage -> config, all of them in order."""
    return {**pretrain_configs(config), **finetune_configs(config)}


def finetune_configs(config: CompareConfig) -> dict[str, FinetuneConfig]:
    """Stage -> config: dense from dense, dense from sparse (SPDF), and sparse from what ends sparse."""
    if config.finetune is None:
        return {}
    configs = {}
    for name, parent in zip(config.methods, pretrain_configs(config).values(), strict=True):
        for masks, end in (("lift", "dense"), ("keep", "sparse")):
            if end == "dense" or _ends_sparse(parent):
                own = {"model": {"path": str(parent.run.path)}, "sparsity": {"masks": masks}}
                configs[f"{name}-to-{end}"] = FinetuneConfig.check(config.finetune.values(config.run, f"{name}-to-{end}", own))
    return configs


def open_runs(config: CompareConfig) -> list[Job]:
    """The jobs of all stages, everything checked that can be checked before the first one has run."""
    pretrained, tuned = check(config)
    with ExitStack() as begun:
        for stage in pretrained.values():
            begun.enter_context(opening("pretrain", stage, stage.run))
        for name, stage in zip(config.methods, pretrained.values(), strict=True):
            with within(f"methods.{name}"):
                pretrain.check(stage)  # of all, before the first folder is filled
        jobs = {name: pretrain.open_run(stage) for name, stage in pretrained.items()}
        return [*jobs.values(), *(finetune.open_run(stage, jobs[_parent(stage)].prepared["tokenizer"]) for stage in tuned.values())]


def report(config: CompareConfig, folders: list[Path]) -> tuple[dict[str, Any], str]:
    """Write ``report.html`` and ``table.md`` into the run folder; returns the facts and the table."""
    from raysparse.report import read_run
    from raysparse.report.distance import cosine_distances
    from raysparse.report.page import Notes, write_page
    from raysparse.report.table import comparison

    runs = [read_run(folder) for folder in folders]
    table = comparison(runs)
    root = config.run.path
    stages = dict(zip(config.methods, pretrain_configs(config).values(), strict=True))
    sparse = {name: f"{stage.sparsity.target:.0%} {name}" for name, stage in stages.items() if stage.sparsity.wants_masks}
    distances = {
        sparse.get(name, name): cosine_distances(root / f"pretrain-{name}" / "export", root / f"{name}-to-dense" / "export")
        for name in stages
        if config.finetune is not None
    }
    write_atomically(root / "config.yaml", config.to_yaml())
    command = f"raysparse compare {config.run.folder}/{config.run.name}/config.yaml run.name={config.run.name}-again"
    title = f"raysparse: {', '.join(sparse.values())} against dense"
    write_page(root / "report.html", title, runs, distances, Notes(commands=(command,)))
    write_atomically(root / "table.md", table.markdown() + "\n")
    facts = {
        "report": str(root / "report.html"),
        "stages": {run.name: run.summary for run in runs},
        "distances": distances,
    }
    return facts, f"{table.terminal()}\nPlots and details: {root / 'report.html'}"


def _ends_sparse(config: PretrainConfig) -> bool:
    """Whether there is a mask left to keep: MST's restoration leaves none."""
    return config.sparsity.wants_masks and config.sparsity.timeline[-1].sparsity.at(Fraction(1)) > 0


def _parent(stage: FinetuneConfig) -> str:
    """The pre-training stage that a fine-tuning starts from."""
    assert stage.model.path is not None
    return Path(stage.model.path).name
