"""What comes back: a dense model of a task pruned to several levels, each fine-tuned in several ways with its mask kept.

The table of SquareHead's paper (arXiv:2310.06927): is learning from the dense teacher better than learning from the data alone, and from
which sparsity on? Every stage is a run of its own, so that the same command goes on where it was.
"""

import json
from typing import Any, Self

from pydantic import Field, model_validator

from raysparse.config import Config, ConfigError, merge, within
from raysparse.models.build import skeleton
from raysparse.recipes import evaluate, finetune, pretrain, prune
from raysparse.recipes.compare import Launch, MethodName, StageConfig
from raysparse.recipes.finetune import FinetuneConfig
from raysparse.recipes.gradual import Level
from raysparse.recipes.job import Job, write_atomically
from raysparse.recipes.pretrain import PretrainConfig
from raysparse.recipes.prune import PruneConfig
from raysparse.recipes.training import check_sizes
from raysparse.report.recovery import Recovery, Row
from raysparse.train.run import RunConfig


class RecoverConfig(Config):
    """`raysparse recover`: teacher, pruned models and what they become, of every level, seed and way to fine-tune."""

    run: RunConfig = RunConfig(name="recover")
    """Name and place of the whole; its name, folder, workers, threads, device and parity hold for every stage, its seed for the teacher."""
    pretrain: StageConfig | None = None
    """Of the model that the teacher starts from; null: the teacher's own model section says what it starts from."""
    teacher: StageConfig
    """The dense model, fine-tuned on the task. Its task, context and source_context hold for every stage."""
    prune: StageConfig
    """Of the teacher; its sparsity.target is the level's."""
    finetune: StageConfig
    """Of every pruned model; its masks are kept, and distillation.teacher is the teacher."""
    levels: tuple[Level, ...] = Field((0.5, 0.75, 0.9), min_length=1)
    """sparsity.target, rising; every level is pruned from the teacher itself."""
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    """Of the samples that pruning looks at, and of the order of the data."""
    ways: dict[MethodName, dict[str, Any]] = Field(
        default_factory=lambda: {
            "cross_entropy": {"distillation": None},
            "kl": {"distillation": {"task": 1.0, "logit": 1.0, "feature": 0.0}},
            "squarehead": {"distillation": {"task": 1.0, "logit": 0.0, "feature": 1.0}},
        },
        min_length=1,
    )
    """Name -> what it changes in finetune's files and set."""

    @model_validator(mode="after")
    def _sorted(self) -> Self:
        if list(self.levels) != sorted(set(self.levels)):
            raise ValueError(f"Expected levels that rise. Got {', '.join(f'{level:g}' for level in self.levels)}. Put them in order")
        if len({f"{level:g}" for level in self.levels}) < len(self.levels):
            raise ValueError("Expected levels that six digits tell apart. Got two that they do not. Drop one")
        if taken := {"prune"} & self.ways.keys():
            raise ValueError(f"Expected ways with names of their own. Got {', '.join(taken)}, which is a stage. Rename it")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"Expected each seed once. Got {', '.join(map(str, self.seeds))}. Drop what is there twice")
        return self


Key = tuple[float, int]
"""(level, seed)."""


class Stages:
    """The checked configs of all stages.

    Attributes:
        pretrain: of the model that the teacher starts from.
        pruned: by level and seed.
        tuned: by level, seed and way.
    """

    def __init__(self, config: RecoverConfig):
        if (config.run.path / "identity.json").exists():
            raise ConfigError(f"Expected {config.run.path} to be new or a recovery. Got a run of another verb. Choose another run.name.")
        self.pretrain = None if config.pretrain is None else PretrainConfig.check(config.pretrain.values(config.run, "pretrained", {}))
        base = {} if self.pretrain is None else {"model": {"path": str(self.pretrain.run.path)}}
        with within("teacher"):
            self.teacher = FinetuneConfig.check(config.teacher.values(config.run, "teacher", base))
        shared = self.teacher.model_dump(mode="json", include={"task", "context", "source_context"})
        model = shared | {"model": {"preset": None, "path": str(self.teacher.run.path), "overrides": {}}}
        self.pruned: dict[Key, PruneConfig] = {}
        self.tuned: dict[tuple[float, int, str], FinetuneConfig] = {}
        for level in config.levels:
            for seed in config.seeds:
                run = config.run.model_copy(update={"seed": seed})
                own = model | {"sparsity": {"target": level}}
                with within("prune"):
                    self.pruned[level, seed] = PruneConfig.check(config.prune.values(run, f"prune-{level:g}-{seed}", own))
                path = {"path": str(self.pruned[level, seed].run.path)}
                for way, changes in config.ways.items():
                    own = shared | {"model": {"preset": None, "overrides": {}} | path, "tokenizer": None, "sparsity": {"masks": "keep"}}
                    own = merge(own, changes)
                    if own.get("distillation") is not None:
                        own = merge(own, {"distillation": {"teacher": str(self.teacher.run.path)}})
                    values = config.finetune.values(run, f"{way}-{level:g}-{seed}", own)
                    with within(f"finetune or ways.{way}"):
                        self.tuned[level, seed, way] = FinetuneConfig.check(values)
        for stage in (self.teacher, *self.tuned.values()):
            check_sizes(stage)

    @property
    def all(self) -> dict[str, PretrainConfig | FinetuneConfig | PruneConfig]:
        """Stage -> config, in order."""
        first = (self.teacher,) if self.pretrain is None else (self.pretrain, self.teacher)
        return {stage.run.name: stage for stage in (*first, *self.pruned.values(), *self.tuned.values())}

    def check(self) -> None:
        """What can be known of the later stages before there is a teacher: it is found before hours are spent on one."""
        if self.pretrain is not None:
            pretrain.check(self.pretrain)
            return
        _, folder = finetune.with_model(self.teacher)
        self._check_later(finetune.model_skeleton(self.teacher), folder)

    def _check_later(self, model: Any, tokenizer_folder: str) -> None:
        """The stages behind the teacher, whose shapes and tokenizer these are."""
        tokenizer = evaluate.load_tokenizer(tokenizer_folder)
        for pruned in self.pruned.values():
            prune.plan_of(pruned, model)
        one = next(iter(self.pruned.values()))
        if one.task is not None:
            examples = evaluate.store_examples(one.task, one.cache_dir, ("train", "validation"))
            prune.samples_of(one, {"examples": str(examples)}, tokenizer, model.config)
        for tuned in {way: tuned for (_, _, way), tuned in self.tuned.items()}.values():  # levels and seeds read the same
            finetune.check_data(tuned, tokenizer, model.config)

    def first(self) -> list[Job]:
        """The jobs up to the teacher."""
        if self.pretrain is None:
            return [finetune.open_run(self.teacher)]
        job = pretrain.open_run(self.pretrain)
        size = len(evaluate.load_tokenizer(job.prepared["tokenizer"]))
        self._check_later(skeleton(self.pretrain.model, size, self.pretrain.data.context), job.prepared["tokenizer"])
        return [job, finetune.open_run(self.teacher, job.prepared["tokenizer"])]

    def then(self) -> list[Job]:
        """The jobs of the pruned models and of what becomes of them, once there is a teacher."""
        folder, jobs = prune.model_of(next(iter(self.pruned.values()))), []
        for key, pruned in self.pruned.items():
            jobs.append(prune.open_run(pruned))
            jobs += [finetune.open_run(tuned, folder) for (*of, _), tuned in self.tuned.items() if tuple(of) == key]
        return jobs


def recover(config: RecoverConfig, launch: Launch) -> tuple[dict[str, Any], str]:
    """Run every stage that is not finished, then compare; returns the facts and the table."""
    whole = Stages(config)
    whole.check()
    teacher = launch(whole.first())[-1]
    summaries = launch(whole.then())
    by_name = {summary["name"]: summary for summary in summaries}
    rows = [
        Row(way, level, [by_name[whole.tuned[level, seed, way].run.name] for seed in config.seeds])
        for level in config.levels
        for way in config.ways
    ]
    pruned = {level: [by_name[whole.pruned[level, seed].run.name] for seed in config.seeds] for level in config.levels}
    recovery = Recovery(config.run.name, Row("dense", 0.0, [teacher]), teacher["task"]["primary"], pruned, rows)
    root = config.run.path
    write_atomically(root / "config.yaml", config.to_yaml())
    write_atomically(root / "recover.json", json.dumps(recovery.facts, indent=1) + "\n")
    write_atomically(root / "table.md", recovery.table.markdown() + "\n")
    write_atomically(root / "report.html", recovery.page(f"raysparse recover {root}/config.yaml run.name={config.run.name}-again"))
    return recovery.facts | {"report": str(root / "report.html")}, f"{recovery.table.terminal()}\nPlots: {root / 'report.html'}"


def check(config: RecoverConfig) -> None:
    """What can be told from the configs alone."""
    Stages(config)


def stages(config: RecoverConfig) -> dict[str, PretrainConfig | FinetuneConfig | PruneConfig]:
    """Stage -> config, all of them."""
    return Stages(config).all


def dry_run(config: RecoverConfig) -> dict[str, Any]:
    """Check the configs of all stages, and what is known of the models."""
    whole = Stages(config)
    whole.check()
    return {name: stage.model_dump(mode="json") for name, stage in whole.all.items()}
