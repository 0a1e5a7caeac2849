"""Fine-tune a model on a downstream task: densely, its mask lifted (SPDF), or sparsely, its mask kept; then score it.

SPDF (arXiv:2303.10464, section 2.3): the mask goes, revived weights start at exactly 0 and train like the others.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

import torch.distributed as dist
from pydantic import Field, model_validator

from raysparse.config import Config, ConfigError
from raysparse.data.pairs import PairFeed, PairRows, PairValidation
from raysparse.kernels.bits import unpack
from raysparse.models.adapters import AllWeights, AnyAdapters, LowRank, adapt, merge
from raysparse.models.build import ModelConfig, architecture, block_linears, build, skeleton
from raysparse.recipes import evaluate, training
from raysparse.recipes.export import MASKS, write_model
from raysparse.recipes.job import Job, check_folder, open_job, opening
from raysparse.recipes.masks import nnz_of_bits, read_masks
from raysparse.recipes.pretrain import FlopsConfig
from raysparse.sparsity.agenda import Agenda
from raysparse.sparsity.plan import SparsityConfig
from raysparse.sparsity.topology import Topology
from raysparse.tasks import AnyTask
from raysparse.tasks.base import Example
from raysparse.tasks.generate import GenerationConfig
from raysparse.tasks.metrics import LOWER_IS_BETTER
from raysparse.train.distill import DistillationConfig
from raysparse.train.run import Run, resolve_device
from raysparse.train.shard import Sharded
from raysparse.train.state import Judged, Training

VALIDATED = "validated"
"""In a run folder: the model and its answers of the last validation by metric."""


class HandOverConfig(Config):
    """What becomes of the zeros that the model comes with."""

    masks: Literal["lift", "keep"] = "lift"
    """lift: every weight trains, revived ones from 0 (SPDF). keep: dead weights stay dead (sparse fine-tuning)."""


class FinetuneConfig(training.TrainingRunConfig):
    """`raysparse finetune`: a pre-trained model (`model.path`: an exported folder or a run) on a task."""

    task: AnyTask
    context: int = Field(256, ge=8)
    """Tokens of the longest prompt and answer together; longer prompts are cut and counted."""
    window: int = Field(16, ge=1)
    """Batches whose pairs are sorted by length together, so that pairs of similar length share a batch; 1 sorts nothing."""
    sparsity: HandOverConfig = HandOverConfig()
    distillation: DistillationConfig | None = None
    """Learn from a dense teacher besides (SquareHead, arXiv:2310.06927); null: from the data alone."""
    adapters: AnyAdapters = AllWeights()
    """Few parameters of a sparse model train, no zero is touched (PERP, arXiv:2312.15230): none, selective, mask_lora, scale_lora."""
    generation: GenerationConfig = GenerationConfig()
    evaluation: evaluate.EvaluationConfig = evaluate.EvaluationConfig()
    validate_by: Literal["loss", "metric"] = "loss"
    """What training.patience and the best checkpoint go by: validation loss, or the task's first score of answers at each validation."""
    validate_examples: int = Field(256, ge=1)
    """Of the validation split, answered at each validation with validate_by=metric."""
    flops: FlopsConfig = FlopsConfig()
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Dotted keys -> values, of which ``--grid`` runs every combination: ``{optimizer.lr: [1e-4, 5e-5]}``; else nothing reads this."""
    cache_dir: str = "~/.cache/raysparse"
    """Where the examples are kept for the workers; with several nodes, on storage they all share."""

    @model_validator(mode="after")
    def _adapters_combine(self) -> Self:
        kind = self.adapters.type
        if kind == "none":
            return self
        if self.sparsity.masks != "keep":
            raise ValueError(
                f"Expected sparsity.masks=keep with adapters.type={kind}, which trains few parameters and leaves every zero as it is. "
                "Got lift. Use sparsity.masks=keep and a sparse model, or adapters.type=none"
            )
        if self.sharding.type == "fairscale":
            raise ValueError(
                f"Expected sharding.type fsdp2 or none with adapters.type={kind}. Got fairscale, which does not freeze. Use fsdp2"
            )
        if isinstance(self.adapters, LowRank) and self.kernels == "sparse":
            raise ValueError(
                f"Expected kernels auto or dense with adapters.type={kind}, whose layers multiply by a weight that is made anew in "
                "every forward pass. Got sparse. Use kernels=auto"
            )
        return self


def check(config: FinetuneConfig, tokenizer_folder: str | None = None) -> dict[str, Any]:
    """Everything that can be wrong, found on the driver before any worker starts; returns what the workers need to know.

    Args:
        tokenizer_folder: of a model that an earlier stage of the same group will have trained by then.
    """
    training.check_sizes(config)
    pending = tokenizer_folder is not None
    if not pending:
        config = with_model_folder(config)
        _check_model(config)
        tokenizer_folder = config.model.path
    assert tokenizer_folder is not None
    tokenizer = evaluate.load_tokenizer(tokenizer_folder)
    evaluate.check_scores(config.task, tokenizer, config.context, config.generation, config.evaluation)
    rows = PairRows.encode(evaluate.examples_of(config.task, "train"), tokenizer, config.task, config.context)
    training.pace(config, config.training.sequences * config.context, -(-len(rows) // config.training.sequences))
    taught = {} if config.distillation is None else {"teacher": _check_teacher(config, config.distillation, tokenizer_folder)}
    examples = str(evaluate.store_examples(config.task, config.cache_dir))
    weights = "of an earlier stage" if pending else evaluate.weights_digest(tokenizer_folder)
    return {
        "examples": examples,
        "content": {"examples": Path(examples).stem, "model": weights} | taught,
        "num_pairs": len(rows),
        "num_truncated": rows.num_truncated,
        "num_truncated_targets": rows.num_truncated_targets,
    }


def _check_model(config: FinetuneConfig) -> None:
    """A model folder that fits the task, with masks if they are to be kept."""
    assert config.model.path is not None
    folder = Path(config.model.path)
    model = skeleton(config.model, len(evaluate.load_tokenizer(folder)), config.context)
    if config.sparsity.masks == "keep" and not (folder / MASKS).exists():
        raise ConfigError(
            f"Expected {MASKS} in {folder} for sparsity.masks=keep. Got none: the model is dense, or not from raysparse. "
            "Use sparsity.masks=lift, or a model that raysparse pre-trained with sparsity.target above 0."
        )
    adapt(model, config.adapters, config.run.seed)


def _check_teacher(config: FinetuneConfig, distillation: DistillationConfig, tokenizer_folder: str) -> str:
    """The digest of a teacher whose tokenizer is the student's, and whose blocks are, as far as it is known by now."""
    folder, tokenizer = evaluate.model_folder(distillation.teacher), evaluate.load_tokenizer(tokenizer_folder)
    its = architecture(_teacher_model(config, distillation), len(tokenizer), config.context)
    if (Path(tokenizer_folder) / "config.json").exists():
        student = config.model.model_copy(update={"preset": None, "path": tokenizer_folder})
        _check_alike(distillation, architecture(student, len(tokenizer), config.context), its)
    if evaluate.load_tokenizer(folder).get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"Expected the student's tokenizer with distillation.teacher={distillation.teacher}. Got another vocabulary. "
            "Take a teacher that reads the same tokens."
        )
    return evaluate.weights_digest(folder)


def _check_alike(distillation: DistillationConfig, mine: Any, its: Any) -> None:
    keys = [key for key in ("model_type", "num_hidden_layers", "hidden_size", "vocab_size") if getattr(mine, key) != getattr(its, key)]
    if keys:
        raise ConfigError(
            f"Expected a teacher of the student's architecture in distillation.teacher={distillation.teacher}. "
            f"Got {', '.join(f'{key} {getattr(its, key)} instead of {getattr(mine, key)}' for key in keys)}. "
            "Take the dense model that the student was pruned from, fine-tuned on the task."
        )


def _teacher_model(config: FinetuneConfig, distillation: DistillationConfig) -> ModelConfig:
    return config.model.model_copy(update={"preset": None, "path": evaluate.model_folder(distillation.teacher), "overrides": {}})


def open_run(config: FinetuneConfig, tokenizer_folder: str | None = None) -> Job:
    """Check the config and the model (see `check`), make or reopen the run folder."""
    with opening("finetune", config, config.run):
        prepared = check(config, tokenizer_folder)
        return open_job("finetune", config, config.run, prepared, prepared["content"])


def dry_run(config: FinetuneConfig) -> dict[str, Any]:
    check_folder("finetune", config, config.run)
    return check(config)


def work(job: Job, run: Run) -> dict[str, Any]:
    """Fine-tune, export and score on this rank; returns the run's summary."""
    config = with_model_folder(FinetuneConfig.check(job.config))
    assert config.model.path is not None
    folder, task = Path(config.model.path), config.task
    tokenizer = evaluate.load_tokenizer(folder)
    splits = evaluate.load_examples(Path(job.prepared["examples"]))
    model = build(config.model, config.run.seed, len(tokenizer), config.context)
    sparse = _keys(folder / MASKS) if (folder / MASKS).exists() else block_linears(model)
    device, keep = resolve_device(config.run), config.sparsity.masks == "keep"
    size = min(config.training.validation_sequences, sum(len(example.references) for example in splits["validation"]))
    feed = PairFeed(splits["train"], tokenizer, task, config.context, config.training.sequences, config.run.seed, config.window)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if name in sparse}
    tokens_per_step = config.training.sequences * config.context
    agenda = Agenda(
        sparsity=SparsityConfig(masks=str(folder / MASKS) if keep else None),
        shapes=shapes,
        steps=training.pace(config, tokens_per_step, feed.steps_per_epoch).steps,
        tokens_per_step=tokens_per_step,
        seed=config.run.seed,
        nnz=nnz_of_bits(read_masks(str(folder / MASKS), folder)) if keep else {},
    )
    teacher = None
    if (taught := config.distillation) is not None:
        teacher = build(_teacher_model(config, taught), config.run.seed, len(tokenizer), config.context)
        _check_alike(taught, model.config, teacher.config)
    parts = training.Ingredients(
        model=model,
        sparse=shapes,
        target=None if keep else 0.0,
        agenda=agenda,
        topology=(lambda sharded: load_masks(folder / MASKS, sharded, device)) if keep else None,
        feed=feed,
        validation=PairValidation(splits["validation"], tokenizer, task, config.context, size),
        num_validation=size,
        tokens_per_sequence=config.context,
        steps_per_epoch=feed.steps_per_epoch,
        convention=config.flops.convention,
        adapters=config.adapters,
        distillation=taught,
        teacher=teacher,
    )
    parent = folder.parent / "summary.json"
    facts = {
        "parent": json.loads(parent.read_text())["name"] if parent.exists() else None,
        "data": {key: job.prepared[key] for key in ("num_pairs", "num_truncated", "num_truncated_targets")},
    }
    judge = None
    if config.validate_by == "metric" and task.primary != "perplexity":
        judge = _judge(job, config, run, parts, splits["validation"], str(folder), device)
    summary = training.carry_out(job, config, run, parts, facts, str(folder), judge)
    scores = evaluate.score_model(
        job.path / "export",
        job.path,
        task,
        splits[config.evaluation.split],
        config.context,
        config.generation,
        config.evaluation,
        run,
        device,
    )
    return training.finish(job, run, summary | {"task": scores})


def _judge(
    job: Job, config: FinetuneConfig, run: Run, parts: training.Ingredients, examples: list[Example], tokenizer: str, device: str
) -> Callable[[Training], Judged]:
    """The task's first score, of a model written to `VALIDATED` at each validation."""
    name, place = config.task.primary, job.path / VALIDATED
    task = config.task.model_copy(update={"metrics": (name,)})
    which = evaluate.EvaluationConfig(split="validation", max_examples=config.validate_examples)

    def judge(t: Training) -> Judged:
        weights, masks = training.gather(t)
        if run.rank == 0:
            shutil.rmtree(place, ignore_errors=True)
            write_model(place, merge(weights, parts.adapters), masks, parts.model.config, tokenizer, {"run": job.path.name})
        dist.barrier()
        told = evaluate.score_model(place, place, task, examples, config.context, config.generation, which, run, device)
        score = told["scores"][name]
        return Judged(name, score, score if name in LOWER_IS_BETTER else -score)

    return judge


def with_model_folder(config: FinetuneConfig) -> FinetuneConfig:
    """`model.path` may name a run: its exported model is meant."""
    if config.model.path is None:
        raise ConfigError(
            "Expected model.path for fine-tuning: a Hugging Face folder, a hub name or a finished run. Got a preset, that is "
            "random weights. Example: model.path=runs/spdf_gpt2_small"
        )
    path = evaluate.model_folder(config.model.path)
    return config.model_copy(update={"model": config.model.model_copy(update={"path": path})})


def load_masks(file: Path, sharded: Sharded, device: str) -> Topology:
    """The masks that were exported with a model, this rank's rows of them."""
    from safetensors import safe_open

    masks, shapes = {}, {}
    with safe_open(str(file), "pt") as stored:
        for name in (name for name in sharded.parts if name in set(stored.keys())):
            part = sharded.parts[name]
            bits = stored.get_slice(name)[part.first : part.first + part.local.shape[0]]
            masks[name], shapes[name] = unpack(bits, part.shape[1]).to(device), part.shape
    if not masks or len(masks) != len(_keys(file)):
        raise ConfigError(
            f"Expected the masks in {file} to be of this model's weights. Got {sorted(_keys(file))[:3]} ... Use the masks of this model."
        )
    return Topology(shapes, {name: sharded.parts[name].rows for name in masks}, masks)


def _keys(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(str(file), "pt") as stored:
        return list(stored.keys())
