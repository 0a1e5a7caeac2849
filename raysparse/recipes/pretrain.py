"""Pre-train a model from scratch (or go on from one) on a stream of text, dense or with static masks."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from raysparse.config import Config, together
from raysparse.data.sources import Hub
from raysparse.data.tokens import DataConfig, Holdout, Prepared, TokenFeed, TokenFile, TokenValidation, num_windows, prepare
from raysparse.models.build import build, select, skeleton
from raysparse.recipes import training
from raysparse.recipes.job import Job, check_folder, open_job
from raysparse.sparsity.flops import Convention
from raysparse.sparsity.plan import SparsityConfig, SparsityPlan
from raysparse.sparsity.topology import Topology
from raysparse.train.run import Run, resolve_device
from raysparse.train.shard import Sharded


class FlopsConfig(Config):
    """How FLOPs are counted; every figure names its convention."""

    convention: Convention = "spdf"
    """spdf: SPDF's tables (arXiv:2303.10464), logits and full attention counted dense. palm: 6 N + 12 L h d T per token."""


class PretrainConfig(training.TrainingRunConfig):
    """`raysparse pretrain`: a GPT on text, with a part of its weights absent from the first step to the last."""

    data: DataConfig = DataConfig()
    sparsity: SparsityConfig = SparsityConfig()
    flops: FlopsConfig = FlopsConfig()


def plan_of(config: PretrainConfig, model: Any) -> SparsityPlan:
    """Live weights of each sparse layer of a model (its shapes are enough: the meta device will do)."""
    names = select(model, config.sparsity.include, config.sparsity.exclude)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return SparsityPlan.build({name: shapes[name] for name in names}, config.sparsity)


def check(config: PretrainConfig) -> Prepared:
    """Everything that can be wrong, found on the driver before any worker starts; tokenizes the data (cached)."""
    vocab_size = getattr(config.data.tokenizer, "vocab_size", None)
    together(
        lambda: training.check_sizes(config),
        lambda: training.pace(config, config.training.sequences * config.data.context, None),
        lambda: plan_of(config, skeleton(config.model, vocab_size, config.data.context)),
        lambda: check_sources(config),
    )
    prepared = prepare(config.data)
    plan_of(config, skeleton(config.model, prepared.vocab_size, config.data.context))
    return prepared


def open_run(config: PretrainConfig) -> Job:
    """Check the config, prepare the data, make or reopen the run folder."""
    check_folder("pretrain", config, config.run)
    prepared = check(config)
    content = {"tokens": Path(prepared.train).parent.parent.name}
    return open_job("pretrain", config, config.run, asdict(prepared), content)


def dry_run(config: PretrainConfig) -> dict[str, Any]:
    """Check what can be checked without tokenizing: the config, the model, the presence of local data."""
    from raysparse.recipes.plan import plan

    check_folder("pretrain", config, config.run)
    facts = plan(config)
    check_sources(config)
    return facts


def check_sources(config: PretrainConfig) -> None:
    """Local data must be there; the hub is not asked."""
    for source in (config.data.train, config.data.validation):
        if not isinstance(source, Holdout | Hub):
            source.fingerprint()


def work(job: Job, run: Run) -> dict[str, Any]:
    """Train on this rank; rank 0 writes the model in Hugging Face format and returns the run's summary."""
    config, data = PretrainConfig.check(job.config), Prepared(**job.prepared)
    model = build(config.model, config.run.seed, data.vocab_size, config.data.context)
    plan = plan_of(config, model)
    device = resolve_device(config.run)

    def topology(sharded: Sharded) -> Topology | None:
        if plan.total == plan.size:
            return None
        rows = {name: sharded.parts[name].rows for name in plan.shapes}
        return Topology.random(plan, rows, config.run.seed, sharded.ranks, device)

    validation = TokenFile.open(data.validation)
    num_validation = min(config.training.validation_sequences, num_windows(validation, config.data.context))
    parts = training.Ingredients(
        model=model,
        sparse=plan.shapes,
        target=config.sparsity.target,
        topology=topology,
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
