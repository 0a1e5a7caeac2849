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
from raysparse.data.pairs import PairFeed, PairValidation
from raysparse.data.tokenizer import AnyTokenizer
from raysparse.kernels.bits import unpack
from raysparse.models import int8
from raysparse.models.adapters import AllWeights, AnyAdapters, LowRank, adapt, merge
from raysparse.models.build import architecture, block_linears, skeleton
from raysparse.recipes import evaluate, teachers, training
from raysparse.recipes.export import MASKS, write_model
from raysparse.recipes.job import Job, check_folder, open_job, opening
from raysparse.recipes.masks import nnz_of_bits, read_masks
from raysparse.recipes.pretrain import FlopsConfig
from raysparse.recipes.reading import Reader, from_scratch, kinds_for, new_tokenizer, tokenizer_of
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
    """`raysparse finetune`: a pre-trained model (`model.path`: an exported folder or a run) on a task, or one from scratch."""

    task: AnyTask
    tokenizer: AnyTokenizer | None = None
    """Of a model.preset, whose weights are random: {type: train} on the task's texts, or {type: pretrained, path: FOLDER}."""
    context: int = Field(256, ge=8)
    """Tokens of the longest prompt and answer together; longer prompts are cut and counted. Encoder-decoders: of the longest answer."""
    source_context: int = Field(256, ge=8)
    """Of an encoder-decoder that reads text: tokens of the longest source; longer ones are cut and counted."""
    window: int = Field(16, ge=1)
    """Batches whose pairs are sorted by length together, so that pairs of similar length share a batch; 1 sorts nothing."""
    sparsity: HandOverConfig = HandOverConfig()
    distillation: DistillationConfig | None = None
    """Learn from a dense teacher besides (SquareHead, arXiv:2310.06927); null: from the data alone."""
    adapters: AnyAdapters = AllWeights()
    """Few parameters of a sparse model train, no zero is touched (PERP, arXiv:2312.15230): none, selective, mask_lora, scale_lora."""
    quantization: int8.Quantization = "none"
    """int8: train through weights and inputs of the blocks' linear layers rounded to 8 bits, with float weights and gradients, and score as
    such; int8_weight_only: through rounded weights alone (docs/quantization.md)."""
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
    def _one_tokenizer(self) -> Self:
        if self.model.path is not None and self.tokenizer is not None:
            raise ValueError("Expected the tokenizer of model.path, which comes with it. Got tokenizer besides. Drop one of the two")
        if self.model.preset is not None and self.tokenizer is None:
            raise ValueError(
                "Expected model.path for fine-tuning: a Hugging Face folder, a hub name or a finished run. Got a preset, that is random "
                "weights. Use model.path=runs/spdf_gpt2_small, or train from scratch: add tokenizer={type: train, vocab_size: 4096}"
            )
        return self

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

    @model_validator(mode="after")
    def _quantization_combines(self) -> Self:
        if self.quantization == "none":
            return self
        if isinstance(self.adapters, LowRank):
            raise ValueError(
                f"Expected adapters.type none or selective with quantization={self.quantization}. Got {self.adapters.type}, whose layers "
                "multiply by a weight of their own. Fine-tune with adapters first, then its exported model with quantization"
            )
        if self.kernels == "sparse":
            raise ValueError(
                f"Expected kernels auto or dense with quantization={self.quantization}, whose layers multiply by rounded weights. "
                "Got sparse. Use kernels=auto"
            )
        return self


def check(config: FinetuneConfig, tokenizer_folder: str | None = None) -> dict[str, Any]:
    """Everything that can be wrong, found on the driver before any worker starts; returns what the workers need to know.

    Args:
        tokenizer_folder: of a model that an earlier stage of the same group will have trained by then; if it holds a model, that
            one has its shapes.
    """
    training.check_sizes(config)
    evaluate.check_task(config.task)
    if config.quantization != "none":
        int8.check_package()
    pending, hf_config = tokenizer_folder is not None, None
    if tokenizer_folder is None:
        config, tokenizer_folder = with_model(config)
        hf_config = _check_model(config, evaluate.load_tokenizer(tokenizer_folder))
    elif (Path(tokenizer_folder) / "config.json").exists():
        like = config.model.model_copy(update={"path": tokenizer_folder})
        hf_config = architecture(like, len(evaluate.load_tokenizer(tokenizer_folder)), config.context, kinds_for(config.task))
    tokenizer = evaluate.load_tokenizer(tokenizer_folder)
    found = check_data(config, tokenizer, hf_config)
    taught = (
        {}
        if config.distillation is None
        else {"teacher": teachers.check(config.distillation, config.model, reader_of(config, tokenizer, hf_config))}
    )
    weights = f"from scratch, tokenizer {Path(tokenizer_folder).name}"
    if config.model.path is not None:
        weights = "of an earlier stage" if pending else evaluate.weights_digest(config.model.path)
    content = {"examples": Path(found["examples"]).stem, "model": weights} | taught
    return found | {"tokenizer": tokenizer_folder, "content": content}


def check_data(config: FinetuneConfig, tokenizer: Any, hf_config: Any) -> dict[str, Any]:
    """Read the task's examples as the model will, and lengths in steps of them; returns where they are kept, and how many were cut."""
    examples = evaluate.store_examples(config.task, config.cache_dir)
    splits = evaluate.load_examples(examples)
    reader = reader_of(config, tokenizer, hf_config)
    evaluate.check_scores(reader, splits[config.evaluation.split], config.generation)
    rows = reader.rows(splits["train"])
    reader.rows(splits["validation"])
    training.pace(config, config.training.sequences * config.context, -(-len(rows) // config.training.sequences))
    return {
        "examples": str(examples),
        "num_pairs": len(rows),
        "num_truncated": rows.num_truncated,
        "num_truncated_targets": rows.num_truncated_targets,
    }


def reader_of(config: FinetuneConfig, tokenizer: Any, hf_config: Any) -> Reader:
    return Reader(hf_config, tokenizer, config.task, config.context, config.source_context)


def with_model(config: FinetuneConfig) -> tuple[FinetuneConfig, str]:
    """What `model` means, and the folder of its tokenizer: `path` may name a run, whose exported model is meant; a preset takes the special
    tokens of the tokenizer that is given or trained."""
    if config.model.path is None:
        assert config.tokenizer is not None
        examples = evaluate.examples_of(config.task, "train")
        folder = new_tokenizer(config.tokenizer, config.task, examples, Path(config.cache_dir).expanduser().absolute())
        return config.model_copy(update={"model": from_scratch(config.model, evaluate.load_tokenizer(folder))}), folder
    config = _found(config)
    return config, tokenizer_of(config.model.path or "", Path(config.cache_dir).expanduser().absolute())


def _found(config: FinetuneConfig) -> FinetuneConfig:
    """With the folder, or the hub name, of the model that `model.path` means."""
    return config.model_copy(update={"model": config.model.model_copy(update={"path": evaluate.model_folder(config.model.path or "")})})


def model_skeleton(config: FinetuneConfig) -> Any:
    """The model that will be trained, without storage, or a `ConfigError` if it cannot do the task."""
    config, folder = with_model(config)
    return skeleton(config.model, len(evaluate.load_tokenizer(folder)), config.context, kinds_for(config.task))


def _check_model(config: FinetuneConfig, tokenizer: Any) -> Any:
    """The config of a model that fits the task, with masks if they are to be kept; of a config `with_model`."""
    model = skeleton(config.model, len(tokenizer), config.context, kinds_for(config.task))
    if config.sparsity.masks == "keep" and _masks(config) is None:
        raise ConfigError(
            f"Expected {MASKS} in {config.model.path or f'preset {config.model.preset}'} for sparsity.masks=keep. Got none: the model is "
            "dense, or not from raysparse. Use sparsity.masks=lift, or a model that raysparse pre-trained with sparsity.target above 0."
        )
    drawn = ("apply_spec_augment", "encoder_layerdrop", "decoder_layerdrop")
    if found := {key: value for key in drawn if (value := getattr(model.config, key, 0))}:
        raise ConfigError(
            f"Expected a model that leaves nothing out at random but by dropout: workers would draw differently. Got {found}. "
            f"Set model.overrides={{{', '.join(f'{key}: 0' if 'drop' in key else f'{key}: false' for key in found)}}}."
        )
    adapt(model, config.adapters, config.run.seed)
    int8.make_aware(model, config.quantization)
    return model.config


def _masks(config: FinetuneConfig) -> Path | None:
    """The masks that come with a model."""
    file = Path(config.model.path or "") / MASKS
    return file if config.model.path is not None and file.exists() else None


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
    config, tokenizer_folder = _as_prepared(FinetuneConfig.check(job.config), job.prepared["tokenizer"])
    task, masks = config.task, _masks(config)
    tokenizer = evaluate.load_tokenizer(tokenizer_folder)
    splits = evaluate.load_examples(Path(job.prepared["examples"]))
    model = training.first_builds(run, config.model, config.run.seed, len(tokenizer), config.context, kinds_for(task))
    reader = reader_of(config, tokenizer, model.config)
    sparse = block_linears(model) if masks is None else _keys(masks)
    device, keep = resolve_device(config.run), masks if config.sparsity.masks == "keep" else None
    held_out = reader.rows(splits["validation"])
    size = min(config.training.validation_sequences, len(held_out))
    feed = PairFeed(reader.rows(splits["train"]), config.training.sequences, config.run.seed, config.window)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if name in sparse}
    tokens_per_step = config.training.sequences * config.context
    agenda = Agenda(
        sparsity=SparsityConfig(masks=None if keep is None else str(keep)),
        shapes=shapes,
        steps=training.pace(config, tokens_per_step, feed.steps_per_epoch).steps,
        tokens_per_step=tokens_per_step,
        seed=config.run.seed,
        nnz={} if keep is None else nnz_of_bits(read_masks(str(keep), keep.parent)),
    )
    parts = training.Ingredients(
        model=model,
        sparse=shapes,
        target=0.0 if keep is None else None,
        agenda=agenda,
        topology=None if keep is None else (lambda sharded: load_masks(keep, sharded, device)),
        feed=feed,
        validation=PairValidation(held_out, size),
        num_validation=size,
        tokens_per_sequence=config.context,
        steps_per_epoch=feed.steps_per_epoch,
        convention=config.flops.convention,
        adapters=config.adapters,
        quantization=config.quantization,
        distillation=(taught := config.distillation),
        teacher=taught and teachers.read(run, taught, config.model, reader),
    )
    parent = None if config.model.path is None else Path(config.model.path).parent / "summary.json"
    facts = {
        "parent": json.loads(parent.read_text())["name"] if parent is not None and parent.exists() else None,
        "data": {key: job.prepared[key] for key in ("num_pairs", "num_truncated", "num_truncated_targets")},
    }
    judge = None
    if config.validate_by == "metric" and task.primary != "perplexity":
        judge = _judge(job, config, run, parts, splits["validation"], tokenizer_folder, device)
    summary = training.carry_out(job, config, run, parts, facts, tokenizer_folder, judge)
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
        scored_as(config),
        config.source_context,
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
        told = evaluate.score_model(
            place, place, task, examples, config.context, config.generation, which, run, device, scored_as(config), config.source_context
        )
        score = told["scores"][name]
        return Judged(name, score, score if name in LOWER_IS_BETTER else -score)

    return judge


def scored_as(config: FinetuneConfig) -> evaluate.Weights:
    """The weights that the task is scored with: those that were trained for."""
    return "dense" if config.quantization == "none" else config.quantization


def _as_prepared(config: FinetuneConfig, tokenizer_folder: str) -> tuple[FinetuneConfig, str]:
    """`with_model`, after the driver has made the tokenizer."""
    if config.model.path is not None:
        config = _found(config)
        path = config.model.path or ""
        return config, path if Path(path).is_dir() else tokenizer_folder
    return config.model_copy(update={"model": from_scratch(config.model, evaluate.load_tokenizer(tokenizer_folder))}), tokenizer_folder


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
