"""What comes back: a dense model of a task pruned to several levels, each fine-tuned in several ways with its mask kept.

The table of SquareHead's paper (arXiv:2310.06927): is learning from the dense teacher better than learning from the data alone, and from
which sparsity on? Every stage is a run of its own, so that the same command goes on where it was.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import mean, stdev
from typing import Any, Self

from pydantic import Field, model_validator

from raysparse.config import Config, ConfigError, merge
from raysparse.recipes import finetune, pretrain, prune
from raysparse.recipes.compare import Launch, MethodName, StageConfig
from raysparse.recipes.finetune import FinetuneConfig
from raysparse.recipes.gradual import Level
from raysparse.recipes.job import Job, write_atomically
from raysparse.recipes.pretrain import PretrainConfig
from raysparse.recipes.prune import PruneConfig
from raysparse.recipes.training import check_sizes
from raysparse.tasks.metrics import LOWER_IS_BETTER
from raysparse.train.run import RunConfig

LOSS = "validation loss"


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
        self.teacher = FinetuneConfig.check(config.teacher.values(config.run, "teacher", base))
        shared = self.teacher.model_dump(mode="json", include={"task", "context", "source_context"})
        model = shared | {"model": {"preset": None, "path": str(self.teacher.run.path), "overrides": {}}}
        self.pruned: dict[Key, PruneConfig] = {}
        self.tuned: dict[tuple[float, int, str], FinetuneConfig] = {}
        for level in config.levels:
            for seed in config.seeds:
                run = config.run.model_copy(update={"seed": seed})
                own = model | {"sparsity": {"target": level}}
                self.pruned[level, seed] = PruneConfig.check(config.prune.values(run, f"prune-{level:g}-{seed}", own))
                path = {"path": str(self.pruned[level, seed].run.path)}
                for way, changes in config.ways.items():
                    own = shared | {"model": {"preset": None, "overrides": {}} | path, "tokenizer": None, "sparsity": {"masks": "keep"}}
                    own = merge(own, changes)
                    if own.get("distillation") is not None:
                        own = merge(own, {"distillation": {"teacher": str(self.teacher.run.path)}})
                    values = config.finetune.values(run, f"{way}-{level:g}-{seed}", own)
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
        model = finetune.model_skeleton(self.teacher)
        for pruned in self.pruned.values():
            prune.plan_of(pruned, model)

    def first(self) -> list[Job]:
        """The jobs up to the teacher."""
        if self.pretrain is None:
            return [finetune.open_run(self.teacher)]
        job = pretrain.open_run(self.pretrain)
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
    return _report(config, teacher, pruned, rows)


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


class Row:
    """One way at one level, over the seeds.

    Attributes:
        measures: name -> its values: validation loss (nats a token), the task's scores.
    """

    def __init__(self, way: str, level: float, summaries: Sequence[dict[str, Any]]):
        self.way, self.level, self.summaries = way, level, summaries
        self.measures = {LOSS: [summary["loss"]["validation"] for summary in summaries]}
        self.measures |= {name: [summary["task"]["scores"][name] for summary in summaries] for name in summaries[0]["task"]["scores"]}

    def facts(self) -> dict[str, Any]:
        first = self.summaries[0]
        return {
            "way": self.way,
            "level": self.level,
            "sparsity": first["sparsity"]["actual"],
            "nnz": first["sparsity"]["nnz"],
            "measures": {name: {"mean": mean(v), "deviation": _deviation(v), "values": v} for name, v in self.measures.items()},
            "seconds": mean(summary["seconds"] for summary in self.summaries),
        }


def _report(config: RecoverConfig, teacher: dict[str, Any], pruned: dict[float, list[dict[str, Any]]], rows: Sequence[Row]) -> Any:
    from raysparse.report.analysis import lines_by_sparsity
    from raysparse.report.page import bullets, figure, page
    from raysparse.report.table import Block, Table

    dense = Row("dense", 0.0, [teacher])
    names = list(dense.measures)
    columns = ("sparsity", "way", *names, "seconds")
    cells = [(f"{row.level:g}", row.way, *(_cell(name, row.measures[name]) for name in names), _seconds(row)) for row in (dense, *rows)]
    notes = (
        f"{'Mean ± standard deviation' if len(config.seeds) > 1 else 'One value'} over {len(config.seeds)} "
        f"seed{'s' * (len(config.seeds) > 1)} of pruning and fine-tuning; one teacher.",
        *(_pruned_note(level, summaries) for level, summaries in pruned.items()),
        *(sentence for level in config.levels for sentence in _ordering(config, level, rows, teacher["task"]["primary"])),
    )
    table = Table((Block(f"What comes back of {config.run.name}", columns, tuple(cells), notes),))
    lines = {
        name: {
            way: [(0.0, dense.measures[name][0]), *((row.level, mean(row.measures[name])) for row in rows if row.way == way)]
            for way in config.ways
        }
        for name in (teacher["task"]["primary"], LOSS)
        if name in names
    }
    picture = lines_by_sparsity(lines, dict(zip(lines, lines, strict=True)), "Quality over sparsity, by what is learned from")
    root = config.run.path
    title = f"raysparse: what comes back of {config.run.name}"
    command = f"raysparse recover {root}/config.yaml run.name={config.run.name}-again"
    parts = [
        f"<h1>{title}</h1>", bullets(notes), figure(picture, "The dense teacher is at 0 %. Means over the seeds."),
        table.blocks[0].html(), f'<pre class="scroll" tabindex="0">{command}</pre>',
    ]  # fmt: skip
    facts = {"dense": dense.facts(), "rows": [row.facts() for row in rows], "report": str(root / "report.html")}
    write_atomically(root / "config.yaml", config.to_yaml())
    write_atomically(root / "recover.json", json.dumps(facts, indent=1) + "\n")
    write_atomically(root / "table.md", table.markdown() + "\n")
    write_atomically(root / "report.html", page(title, parts))
    return facts, f"{table.terminal()}\nPlots and details: {root / 'report.html'}"


def _ordering(config: RecoverConfig, level: float, rows: Sequence[Row], measure: str) -> Iterator[str]:
    """The ways from best to worst, and whether neighbours differ by more than the seeds do."""
    sign = 1 if measure in LOWER_IS_BETTER else -1
    here = sorted((row for row in rows if row.level == level), key=lambda row: sign * mean(row.measures[measure]))
    if len(here) < 2:
        return
    text = here[0].way
    for better, worse in pairwise(here):
        text += f"{' > ' if _apart(better.measures[measure], worse.measures[measure]) else ' ≈ '}{worse.way}"
    how = "seed by seed all differences have one sign" if len(config.seeds) > 1 else "one seed judges nothing"
    yield f"At {level:g} by {measure}: {text} (> where {how})."


def _apart(better: Sequence[float], worse: Sequence[float]) -> bool:
    differences = [a - b for a, b in zip(better, worse, strict=True)]
    return len(differences) > 1 and (all(d > 0 for d in differences) or all(d < 0 for d in differences))


def _pruned_note(level: float, summaries: Sequence[dict[str, Any]]) -> str:
    losses = [summary["pruning"]["loss"]["after"] for summary in summaries]
    told = "" if None in losses else f", loss {_cell(LOSS, losses)} on samples that were held out before it is fine-tuned"
    return f"At {level:g}: {summaries[0]['sparsity']['nnz']:,} weights live of {summaries[0]['sparsity']['total']:,}{told}."


def _cell(name: str, values: Sequence[float]) -> str:
    digits = 4 if name == LOSS else 2
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def _seconds(row: Row) -> str:
    return f"{mean(summary['seconds'] for summary in row.summaries):.0f}"


def _deviation(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None
