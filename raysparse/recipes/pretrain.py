"""Pre-train a model from scratch (or go on from one) on a stream of text, dense or with masks, static or evolving."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from raysparse.config import Config, ConfigError, together
from raysparse.data.sources import Hub
from raysparse.data.tokens import DataConfig, Holdout, Prepared, TokenFeed, TokenFile, TokenValidation, num_windows, prepare
from raysparse.kernels.bits import pack, unpack
from raysparse.kernels.tiles import SIZES
from raysparse.models.build import build, select, skeleton
from raysparse.recipes import training
from raysparse.recipes.job import Job, check_folder, open_job, opening
from raysparse.recipes.masks import nnz_of_bits, read_masks
from raysparse.sparsity.agenda import Agenda
from raysparse.sparsity.evolve import first_topology, has_grain
from raysparse.sparsity.flops import Convention
from raysparse.sparsity.pattern import NM
from raysparse.sparsity.plan import SparsityConfig, SparsityPlan
from raysparse.sparsity.topology import Topology
from raysparse.train.run import Run, resolve_device
from raysparse.train.shard import Sharded

FIRST_MASKS = "first_masks.safetensors"
"""In the folder of a run whose first masks were given: those masks, bit-packed."""


class FlopsConfig(Config):
    """How FLOPs are counted; every figure names its convention."""

    convention: Convention = "spdf"
    """spdf: SPDF's tables (arXiv:2303.10464), logits and full attention counted dense. palm: 6 N + 12 L h d T per token."""


class PretrainConfig(training.TrainingRunConfig):
    """`raysparse pretrain`: a GPT on text, with a part of its weights absent from the first step to the last."""

    data: DataConfig = DataConfig()
    sparsity: SparsityConfig = SparsityConfig()
    flops: FlopsConfig = FlopsConfig()


def sparse_shapes(config: PretrainConfig, model: Any) -> dict[str, tuple[int, int]]:
    """[rows, cols] of each weight that is to be sparse (the meta device will do).

    Raises:
        ConfigError: name patterns that match nothing, or shapes that the pattern does not fit.
    """
    names = select(model, config.sparsity.include, config.sparsity.exclude)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if config.sparsity.wants_masks:
        sharded = config.sharding.type == "fsdp2"
        shards = {max(1, size // config.sharding.replicas) if sharded else 1 for size in config.run.sizes}
        checks = [lambda at=at: config.sparsity.pattern.check_shape(at[0], shapes[at[0]], at[1]) for at in product(names, sorted(shards))]
        together(*checks)
    return {name: shapes[name] for name in names}


def agenda_of(config: PretrainConfig, model: Any, nnz: Mapping[str, int] | None = None) -> Agenda:
    """What will happen to the topology.

    Args:
        nnz: live weights of each layer, where masks are given.

    Raises:
        ConfigError: see `sparse_shapes`, `SparsityPlan.build` and `Agenda.spans`.
    """
    tokens_per_step = config.training.sequences * config.data.context
    steps = training.pace(config, tokens_per_step, None).steps
    shapes = sparse_shapes(config, model)
    agenda = Agenda(
        sparsity=config.sparsity, shapes=shapes, steps=steps, tokens_per_step=tokens_per_step, seed=config.run.seed, nnz=dict(nnz or {})
    )
    together(lambda: config.optimizer.keeps_live(agenda), lambda: SparsityPlan.build(shapes, config.sparsity), lambda: check_blocks(config))
    return agenda


def given_masks(config: PretrainConfig, model: Any) -> dict[str, Tensor]:
    """Bit-packed masks that the run starts from instead of drawing some: of `sparsity.masks`, or the nonzeros of `model.path`.

    Raises:
        ConfigError: none there, of other weights, or of another sparsity than `sparsity.target` asks for.
    """
    sparsity = config.sparsity
    if not sparsity.given:
        return {}
    if (own := config.run.path / FIRST_MASKS).exists():  # of a run that goes on, whatever became of the source
        return load_file(str(own))
    shapes = sparse_shapes(config, model)
    if sparsity.masks is not None:
        source = sparsity.masks
        found = read_masks(source, Path(config.run.folder))
    elif config.model.path is not None:
        source = config.model.path
        whole = dict(build(config.model, config.run.seed, context=config.data.context).named_parameters())
        found = {name: pack(whole[name] != 0) for name in shapes}
    else:
        raise ConfigError("Expected model.path for evolution zeros: the checkpoint whose zeros stay zero. Got a preset. Set model.path.")
    wrong = sorted(found.keys() ^ shapes.keys())
    wrong += [name for name in shapes if name in found and tuple(found[name].shape) != (shapes[name][0], -(-shapes[name][1] // 8))]
    if wrong:
        raise ConfigError(
            f"Expected masks of the {len(shapes)} sparse weights in {source}. Got {len(wrong)} that differ, such as {wrong[0]}. "
            "Use masks of this model, or set sparsity.include and exclude to the weights that have masks."
        )
    if coarse := [n for n, shape in shapes.items() if not has_grain(unpack(found[n], shape[1]), sparsity.pattern)]:
        raise ConfigError(
            f"Expected masks of the pattern {sparsity.pattern.model_dump()} in {source}. Got others in {len(coarse)} weights, such as "
            f"{coarse[0]}. Use masks of this pattern, or sparsity.pattern={{type: unstructured}}."
        )
    live, size = sum(nnz_of_bits(found).values()), sum(map(prod, shapes.values()))
    wanted = 1 - sparsity.pattern.n / sparsity.pattern.m if isinstance(sparsity.pattern, NM) else sparsity.target
    if wanted and abs(1 - live / size - wanted) > 1e-3:
        raise ConfigError(
            f"Expected masks of sparsity {wanted:g} in {source}. Got {1 - live / size:.4f}. "
            "Use masks of this sparsity; without n:m, sparsity.target=0 takes them as they are."
        )
    return {name: found[name] for name in shapes}


def _name_masks(masks: Mapping[str, Tensor]) -> str:
    """A hash of bit-packed masks."""
    digest = hashlib.sha256()
    for name, bits in masks.items():
        digest.update(name.encode() + bits.numpy().tobytes())
    return digest.hexdigest()[:16]


def check(config: PretrainConfig) -> Prepared:
    """Everything that can be wrong, found on the driver before any worker starts; tokenizes the data (cached)."""
    vocab_size = getattr(config.data.tokenizer, "vocab_size", None)

    def check_model() -> None:
        model = skeleton(config.model, vocab_size, config.data.context)
        agenda = agenda_of(config, model, nnz_of_bits(given_masks(config, model)))
        training.hybrid_attention(agenda, model, resolve_device(config.run))

    together(lambda: training.check_sizes(config), check_model, lambda: check_sources(config.data))
    prepared = prepare(config.data)
    agenda_of(config, skeleton(config.model, prepared.vocab_size, config.data.context))
    return prepared


def open_run(config: PretrainConfig) -> Job:
    """Check the config, prepare the data, make or reopen the run folder."""
    with opening("pretrain", config, config.run):
        prepared = check(config)
        content = {"tokens": Path(prepared.train).parent.parent.name}
        given = given_masks(config, skeleton(config.model, prepared.vocab_size, config.data.context))
        if given:
            content["masks"] = _name_masks(given)
        job = open_job("pretrain", config, config.run, asdict(prepared), content)
        if given:
            partial = job.path / f".{FIRST_MASKS}"
            save_file(given, str(partial))
            partial.rename(job.path / FIRST_MASKS)
    return job


def dry_run(config: PretrainConfig) -> dict[str, Any]:
    """Check what can be checked without tokenizing: the config, the model, the presence of local data."""
    from raysparse.recipes.plan import plan

    check_folder("pretrain", config, config.run)
    facts = plan(config)
    check_sources(config.data)
    return facts


def check_blocks(config: PretrainConfig) -> None:
    """Raise a `ConfigError` if ``kernels=sparse`` is asked for on a GPU, of weights that do not live in blocks that it has kernels for."""
    asked = config.kernels == "sparse" and config.sparsity.wants_masks and resolve_device(config.run) != "cpu"
    if asked and not config.sparsity.given and config.sparsity.pattern.unit not in [(size, size) for size in SIZES]:
        raise ConfigError(
            f"Expected sparsity.pattern.type=block with size {', '.join(map(str, SIZES))} for kernels=sparse on a GPU. Got "
            f"{config.sparsity.pattern.model_dump()}. Use such blocks, or kernels=auto."
        )


def check_sources(data: DataConfig) -> None:
    """Local data must be there; the hub is not asked."""
    for source in (data.train, data.validation):
        if not isinstance(source, Holdout | Hub):
            source.fingerprint()


def work(job: Job, run: Run) -> dict[str, Any]:
    """Train on this rank; rank 0 writes the model in Hugging Face format and returns the run's summary."""
    config, data = PretrainConfig.check(job.config), Prepared(**job.prepared)
    model = training.first_builds(run, config.model, config.run.seed, data.vocab_size, config.data.context)
    given = load_file(str(job.path / FIRST_MASKS)) if config.sparsity.given else {}
    agenda = agenda_of(config, model, nnz_of_bits(given))

    def topology(sharded: Sharded) -> Topology:
        rows = {name: sharded.parts[name].rows for name in agenda.shapes}
        if given:
            device = sharded.parts[next(iter(rows))].local.device
            masks = {n: unpack(given[n][here.first : here.first + here.count], here.cols).to(device) for n, here in rows.items()}
            return Topology(agenda.shapes, rows, masks)
        return first_topology(agenda, rows, sharded.local, sharded.ranks)

    validation = TokenFile.open(data.validation)
    num_validation = min(config.training.validation_sequences, num_windows(validation, config.data.context))
    parts = training.Ingredients(
        model=model,
        sparse=agenda.shapes,
        target=None if given else config.sparsity.target,
        agenda=agenda,
        topology=topology if config.sparsity.wants_masks else None,
        feed=TokenFeed(TokenFile.open(data.train), config.data.context, config.training.sequences, config.run.seed),
        validation=TokenValidation(validation, config.data.context, num_validation),
        num_validation=num_validation,
        tokens_per_sequence=config.data.context,
        steps_per_epoch=None,
        convention=config.flops.convention,
    )
    facts = {
        "data": {
            "train_tokens": data.num_train_tokens,
            "validation_tokens": data.num_validation_tokens,
            "unigram_cross_entropy": data.validation_unigram_nats,
        }
    }
    return training.finish(job, run, training.carry_out(job, config, run, parts, facts, data.tokenizer))
