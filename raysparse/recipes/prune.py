"""Prune a trained model at once: every block on what the pruned blocks before it give, exactly as many live weights as the plan has."""

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor

from raysparse.config import Config, ConfigError, together
from raysparse.data.batch import Feed
from raysparse.data.calibration import Chunk, PairSamples, Samples, TextSamples
from raysparse.data.pairs import PairValidation
from raysparse.data.tokenizer import PretrainedTokenizer
from raysparse.data.tokens import DataConfig, Prepared, TokenFile, TokenValidation, num_windows, prepare
from raysparse.kernels.bits import pack
from raysparse.losses import cross_entropy_sum
from raysparse.models import packed
from raysparse.models.build import ModelConfig, architecture, build, select, skeleton
from raysparse.models.hub_config import ANY_KIND, CAUSAL, Kind
from raysparse.models.walk import BlockWalk
from raysparse.recipes import evaluate
from raysparse.recipes.environment import write_environment
from raysparse.recipes.export import MASKS, write_model
from raysparse.recipes.job import Job, check_folder, open_job, opening
from raysparse.recipes.masks import digest_sum, nnz_of_bits, read_masks
from raysparse.recipes.pretrain import check_sources
from raysparse.recipes.reading import Reader, kinds_for, tokenizer_of
from raysparse.recipes.training import finish, header
from raysparse.sparsity.pattern import NM, Unstructured
from raysparse.sparsity.plan import LevelsConfig, SparsityPlan
from raysparse.sparsity.pruning import AnyPruner, SparseGPT
from raysparse.sparsity.vote import digest
from raysparse.tasks import AnyTask
from raysparse.train.process import forget_peak_memory, peak_memory_bytes
from raysparse.train.prune import check_live, prune_model
from raysparse.train.run import Run, RunConfig, resolve_device


class PruneLevels(LevelsConfig):
    """How many weights of which layers go; those that are dead already count, and stay so."""

    pattern: Annotated[Unstructured | NM, Field(discriminator="type")] = Unstructured()
    """The grain: {type: unstructured} or {type: "n:m", n: 2, m: 4}."""


class CalibrationConfig(Config):
    """How much of the data the method sees."""

    samples: int = Field(128, ge=1)
    """Windows of text, or pairs; a random choice by run.seed."""
    batch: int = Field(8, ge=1)
    """Samples that go through the model together. Sums round by it, as by nothing else: the number of workers changes no bit."""
    validation_sequences: int = Field(128, ge=0)
    """Held-out samples on which the loss before and after is measured; 0 measures nothing."""


class PruneConfig(Config):
    """`raysparse prune`: a trained model (`model.path`: an exported folder, a hub name or a run) without most of its weights."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    sparsity: PruneLevels
    method: AnyPruner = SparseGPT()
    """Which weights go, and what becomes of the others: {type: sparsegpt}, wanda or magnitude."""
    task: AnyTask | None = None
    """Calibrate on pairs of this task's train split, prompt and answer."""
    context: int = Field(256, ge=8)
    """With a task: tokens of the longest prompt and answer together; of an encoder-decoder, of the longest answer. Windows of text are
    data.context long."""
    source_context: int = Field(256, ge=8)
    """With a task: tokens of an encoder-decoder's longest source."""
    data: DataConfig | None = None
    """Calibrate on windows of this text. Its tokens are those of the model, whatever data.tokenizer says."""
    calibration: CalibrationConfig = CalibrationConfig()
    cache_dir: str = "~/.cache/raysparse"
    """Where a task's examples are kept for the workers; with several nodes, on storage they all share."""

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if not self.sparsity.wants_masks:
            raise ValueError("Expected sparsity.target above 0: what is to be pruned. Got 0. Set it, or sparsity.layers")
        if self.task is not None and self.data is not None:
            raise ValueError("Expected task or data to calibrate on. Got both. Drop one")
        if self.method.reads_inputs and self.task is None and self.data is None:
            raise ValueError(
                f"Expected task or data to calibrate on: method {self.method.type} looks at what layers read. Got neither. Set one, "
                "such as data.train.type=python_stdlib, or method.type=magnitude"
            )
        if (
            isinstance(self.method, SparseGPT)
            and isinstance(self.sparsity.pattern, NM)
            and self.method.block_size % self.sparsity.pattern.m
        ):
            raise ValueError(
                f"Expected method.block_size that m divides. Got {self.method.block_size} and m = {self.sparsity.pattern.m}. "
                f"Use method.block_size={32 * self.sparsity.pattern.m}"
            )
        return self


def plan_of(config: PruneConfig, model: Any) -> SparsityPlan:
    """How many weights of which layers are to live (the meta device will do); a `ConfigError` for layers that do not fit."""
    names = select(model, config.sparsity.include, config.sparsity.exclude)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if name in names}
    together(*(lambda name=name: config.sparsity.pattern.check_shape(name, shapes[name], 1) for name in names))
    if config.method.reads_inputs:
        BlockWalk(model, (), names)
    return SparsityPlan.build(shapes, config.sparsity)


def check_model(config: PruneConfig, like: str | None = None) -> tuple[str, SparsityPlan]:
    """The model's folder or hub name, and how many of its weights are to live; a `ConfigError` for what does not fit.

    Args:
        like: a model of the same shapes and tokenizer, where an earlier stage of the same group will have made the model by then.
    """
    folder = like or model_of(config)
    if packed.is_packed(folder):
        raise ConfigError(f"Expected a model in Hugging Face format at {folder}. Got a packed one. Name the model that it was packed from.")
    plan = plan_of(config, model_skeleton(config, folder))
    if like is None:
        check_live(plan, config.sparsity.pattern, _masks_in(folder))
    return folder, plan


def model_skeleton(config: PruneConfig, folder: str) -> Any:
    """The model that lies in a folder, without storage, or a `ConfigError` if it cannot read what is calibrated on."""
    longest = config.data.context if config.data is not None else config.context if config.task is not None else None
    return skeleton(_at(config, folder), len(evaluate.load_tokenizer(folder)), longest, kinds_of(config))


def check(config: PruneConfig, like: str | None = None) -> dict[str, Any]:
    """Everything that can be wrong, found on the driver before any worker starts; returns what the workers need to know."""
    folder, _ = check_model(config, like)
    prepared: dict[str, Any] = {"tokenizer": tokenizer_of(folder, Path(config.cache_dir).expanduser().absolute())}
    content = {"model": evaluate.weights_digest(folder) if like is None else "of an earlier stage"}
    if config.task is not None:
        prepared["examples"] = str(evaluate.store_examples(config.task, config.cache_dir, ("train", "validation")))
        content["examples"] = Path(prepared["examples"]).stem
    if config.data is not None:
        found = prepare(config.data.model_copy(update={"tokenizer": PretrainedTokenizer(path=folder)}))
        prepared["tokens"], content["tokens"] = asdict(found), Path(found.train).parent.parent.name
    tokenizer = evaluate.load_tokenizer(folder)
    samples_of(config, prepared, tokenizer, architecture(_at(config, folder), len(tokenizer), None, kinds_of(config)))
    return prepared | {"content": content}


def open_run(config: PruneConfig, like: str | None = None) -> Job:
    """Check the config and the model (see `check_model`), prepare the data, make or reopen the run folder."""
    with opening("prune", config, config.run):
        prepared = check(config, like)
        return open_job("prune", config, config.run, prepared, prepared["content"])


def dry_run(config: PruneConfig) -> dict[str, Any]:
    """Check what can be checked without tokenizing."""
    check_folder("prune", config, config.run)
    folder, plan = check_model(config)
    if config.task is not None:
        evaluate.examples_of(config.task, "train")
    if config.data is not None:
        check_sources(config.data)
    return {"model": folder, "nnz": plan.total, "total": plan.size, "sparsity": plan.sparsity}


def work(job: Job, run: Run) -> dict[str, Any]:
    """Prune on this rank's share of the samples and layers; rank 0 writes the model. Returns the run's summary."""
    config = PruneConfig.check(job.config)
    began, folder = time.perf_counter(), model_of(config)
    forget_peak_memory()
    if run.rank == 0:
        write_environment(job.path, config.run)
    tokenizer = evaluate.load_tokenizer(job.prepared["tokenizer"])
    model: Any = build(_at(config, folder), config.run.seed, len(tokenizer), None, kinds_of(config)).eval()
    samples, validation = samples_of(config, job.prepared, tokenizer, model.config)
    plan, before = plan_of(config, model), _masks_in(folder)
    weights = dict(model.named_parameters())
    live = {name: before[name] if name in before else pack(weights[name].detach() != 0) for name in plan.shapes}
    check_live(plan, config.sparsity.pattern, live)
    model.to(resolve_device(config.run))
    losses = {"before": loss_of(model, validation, config, run)}

    def show(text: str) -> None:
        run.show({"text": f"{job.path.name}: {text}"})

    masks = prune_model(model, config.method, plan, config.sparsity.pattern, live, my_chunks(config, samples, run, model.device), show)
    losses["after"] = loss_of(model, validation, config, run)
    summary = header(job, config, run) | {
        "model": {
            "class": type(model).__name__,
            "path": folder,
            "parameters": sum(weight.numel() for weight in weights.values()),
        },
        "sparsity": _sparsity(config, plan, masks, sum(weight.numel() for weight in weights.values())),
        "pruning": {"method": config.method.type, "samples": config.calibration.samples if samples else 0, "loss": losses},
        "seconds": time.perf_counter() - began,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    if run.rank == 0:
        shutil.rmtree(job.path / "export", ignore_errors=True)  # of an attempt that died before its summary
        whole = {name: weight.detach().cpu() for name, weight in weights.items()}
        all_masks = {name: (before | masks)[name] for name in whole if name in before or name in masks}
        write_model(job.path / "export", whole, all_masks, model.config, job.prepared["tokenizer"], summary)
    dist.barrier()
    return finish(job, run, summary)


def kinds_of(config: PruneConfig) -> Sequence[Kind]:
    """Models that read what is calibrated on; without data any will do."""
    return kinds_for(config.task) if config.task is not None else CAUSAL if config.data is not None else ANY_KIND


def samples_of(config: PruneConfig, prepared: Mapping[str, Any], tokenizer: Any, hf_config: Any) -> tuple[Samples | None, Feed | None]:
    """What to calibrate on, and what the loss is measured on; None and None without data."""
    count, seed, held_out = config.calibration.samples, config.run.seed, config.calibration.validation_sequences
    if config.task is not None:
        splits = evaluate.load_examples(Path(prepared["examples"]))
        reader = Reader(hf_config, tokenizer, config.task, config.context, config.source_context)
        rows, held = reader.rows(splits["train"]), reader.rows(splits["validation"])
        validation = PairValidation(held, min(held_out, len(held))) if held_out else None
        return PairSamples(rows, count, seed), validation
    if config.data is not None:
        found, context = Prepared(**prepared["tokens"]), config.data.context
        held = TokenFile.open(found.validation)
        validation = TokenValidation(held, context, min(held_out, num_windows(held, context))) if held_out else None
        return TextSamples(TokenFile.open(found.train), context, count, seed), validation
    return None, None


def my_chunks(config: PruneConfig, samples: Samples | None, run: Run, device: torch.device) -> list[Chunk]:
    """This rank's consecutive chunks of `calibration.batch` samples."""
    if samples is None or not config.method.reads_inputs:
        return []
    lots = np.arange(config.calibration.samples).reshape(-1) // config.calibration.batch
    chunks = []
    for number in _share(int(lots[-1]) + 1, run):
        chunks.append(samples.chunk(number, np.flatnonzero(lots == number)).to(device))
    return chunks


@torch.no_grad()
def loss_of(model: Any, validation: Any, config: PruneConfig, run: Run) -> float | None:
    """Mean cross-entropy of the held-out samples, nats per predicted token; None without any. Every rank calls this."""
    if validation is None:
        return None
    found = []
    lots = [
        range(validation.sequences)[first : first + config.calibration.batch]
        for first in range(0, validation.sequences, config.calibration.batch)
    ]
    for number in _share(len(lots), run):
        batch = validation.batch(0, lots[number]).to(model.device)
        logits = model(**batch.inputs).logits
        found.append((float(cross_entropy_sum(logits, batch.labels)), batch.num_targets))
    parts: list[Any] = [None] * run.world_size
    dist.all_gather_object(parts, found)
    losses, counts = zip(*(pair for part in parts for pair in part), strict=True)
    return math.fsum(losses) / sum(counts)


def _share(count: int, run: Run) -> range:
    """This rank's consecutive numbers of [0, count)."""
    return range(run.rank * count // run.world_size, (run.rank + 1) * count // run.world_size)


def _sparsity(config: PruneConfig, plan: SparsityPlan, masks: Mapping[str, Tensor], parameters: int) -> dict[str, Any]:
    """As the summaries of training tell it, counted in the masks."""
    nnz = nnz_of_bits(masks)
    live = sum(nnz.values())
    return {
        "target": config.sparsity.target,
        "actual": 1 - live / plan.size,
        "of_model": (plan.size - live) / parameters,
        "nnz": live,
        "total": plan.size,
        "mask_digest": digest(masks, (digest_sum(name, bits, plan.shapes[name]) for name, bits in masks.items())),
        "layers": [
            {"name": name, "shape": list(shape), "nnz": nnz[name], "sparsity": 1 - nnz[name] / prod(shape)}
            for name, shape in plan.shapes.items()
        ],
    }


def model_of(config: PruneConfig) -> str:
    """Folder or hub name of the model."""
    if config.model.path is None:
        raise ConfigError("Expected model.path: a trained model to prune. Got a preset: random weights. Example: model.path=runs/tiny")
    return evaluate.model_folder(config.model.path)


def _at(config: PruneConfig, folder: str) -> ModelConfig:
    """The model, at the folder that a run's name stands for."""
    return config.model.model_copy(update={"path": folder})


def _masks_in(folder: str) -> dict[str, Tensor]:
    """Bit-packed masks that come with the model, of whatever weights."""
    file = Path(folder) / MASKS
    return read_masks(str(file), file.parent) if file.exists() else {}
