"""What pre-training and fine-tuning share: the sections of their configs, the assembly on each rank, the summary at the end."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch.distributed as dist
from torch import Tensor

from raysparse import __version__, length
from raysparse.config import Config, ConfigError
from raysparse.data.batch import Batch, Feed
from raysparse.kernels.bits import pack
from raysparse.models.adapters import Adapters, AllWeights, adapt, is_factor, merge, needs_no_gradient
from raysparse.models.attention import HybridAttention
from raysparse.models.build import ModelConfig, blocks, build, hollow
from raysparse.models.features import BlockOutputs, ChosenLogits
from raysparse.models.int8 import Quantization, make_aware
from raysparse.models.multiplied import flops_architecture
from raysparse.recipes.environment import versions, write_environment
from raysparse.recipes.export import write_model
from raysparse.recipes.job import Job, check_claim, write_atomically
from raysparse.sparsity.agenda import Agenda
from raysparse.sparsity.distribution import Shape
from raysparse.sparsity.flops import Architecture, Convention, Ledger
from raysparse.sparsity.topology import Topology
from raysparse.train.checkpoint import CheckpointConfig, Checkpointer
from raysparse.train.distill import Distillation, DistillationConfig, Teacher
from raysparse.train.error import TrainingError
from raysparse.train.keeper import Keeper
from raysparse.train.kernels import FILE as KERNELS
from raysparse.train.kernels import KernelMode, Kernels, check_kernels
from raysparse.train.loop import train
from raysparse.train.metrics import LoggingConfig, Meter
from raysparse.train.objective import CrossEntropy, Objective
from raysparse.train.optimizer import OptimizerConfig, ScheduleConfig, build_optimizer
from raysparse.train.placement import largest_share, scattered, show_shares
from raysparse.train.process import alike, forget_peak_memory, gathered, peak_memory_bytes
from raysparse.train.recovery import resume
from raysparse.train.run import Run, RunConfig, resolve_device, resolve_dtype
from raysparse.train.shard import Sharded, ShardingConfig, shard
from raysparse.train.state import HISTORY, Judged, Pace, State, Training, TrainingConfig
from raysparse.train.watch import Watch

HANGS = "hangs"
"""In a run folder: where each rank stood when a step hung."""


class TrainingRunConfig(Config):
    """The sections that every training recipe has."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    sharding: ShardingConfig = ShardingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    kernels: KernelMode = "auto"
    """How sparse layers are computed: on CPUs without their zeros, on GPUs without their dead blocks. auto: each product of each layer as
    measured to be fastest on this machine, so two runs may round differently; dense with run.parity. dense, sparse: everywhere, and on
    CPUs equal runs have equal bits."""


def check_sizes(config: TrainingRunConfig) -> None:
    """Raise a `ConfigError` if the batch or the sharding does not fit the number of workers.

    Of an elastic run the batch is shared out unevenly where it must be: better than to wait for the next node, or not to go on.
    """
    workers, sequences = config.run.sizes[-1], config.training.sequences
    if config.run.elastic and workers > sequences and not config.run.parity:
        raise ConfigError(
            f"Expected at least one sequence for each of at most {workers} workers. Got training.sequences={sequences}. "
            f"Use run.workers=[{min(config.run.sizes[0], sequences)}, {sequences}], or training.sequences={workers}."
        )
    if sequences % workers and not config.run.parity and not config.run.elastic:
        fits = [n for n in range(1, sequences + 1) if sequences % n == 0]
        near = min(fits, key=lambda n: abs(n - workers))
        raise ConfigError(
            f"Expected run.workers to divide training.sequences. Got {workers} workers, {sequences} sequences. "
            f"Use run.workers={near}, or training.sequences={-(-sequences // workers) * workers}."
        )
    config.sharding.check_workers(config.run.sizes)
    check_kernels(config.kernels, config.run)


def pace(config: TrainingRunConfig, tokens_per_step: int, steps_per_epoch: int | None) -> Pace:
    """The config's lengths in steps; raises a `ConfigError` that names the key of one that makes no sense."""

    def measure(key: str, text: str, scale: length.Scale) -> int:
        try:
            return length.steps(text, scale)
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from None

    steps = measure("training.length", config.training.length, length.Scale(tokens_per_step, steps_per_epoch))
    if steps < 1:
        raise ConfigError(f"Expected training.length of at least one step. Got {config.training.length!r}.")
    scale = length.Scale(tokens_per_step, steps_per_epoch, steps)
    return Pace(
        steps=steps,
        warmup=measure("schedule.warmup", config.schedule.warmup, scale),
        validate=measure("training.validate_every", config.training.validate_every, scale),
        save=measure("checkpoint.every", config.checkpoint.every, scale),
        log=measure("logging.every", config.logging.every, scale),
        histograms=measure("logging.histograms", config.logging.histograms, scale),
    )


@dataclass(frozen=True)
class Ingredients:
    """What differs between recipes.

    Attributes:
        model: float32, on the CPU, see `first_builds`.
        sparse: whole shapes of the weights that may be sparse (all of them live in a dense run).
        target: the sparsity that was asked for; None where masks came with the model.
        agenda: phases of the run, and what happens to the masks.
        topology: sharded model -> the first masks; None to train dense.
        convention: how FLOPs are counted.
        adapters: what trains.
        quantization: how the blocks' linear layers compute.
        distillation: what is learned from `teacher`, which is built like `model`; None for neither.
    """

    model: Any
    sparse: Mapping[str, Shape]
    target: float | None
    agenda: Agenda
    topology: Callable[[Sharded], Topology] | None
    feed: Feed
    validation: Feed
    num_validation: int
    tokens_per_sequence: int
    steps_per_epoch: int | None
    convention: Convention
    adapters: Adapters = field(default_factory=AllWeights)
    quantization: Quantization = "none"
    distillation: DistillationConfig | None = None
    teacher: Any = None


def first_builds(run: Run, config: ModelConfig, seed: int, *of: Any) -> Any:
    """The model of `raysparse.models.build.build` on the first rank, a hollow one on the others, whose hosts need not hold it whole.

    Every rank calls this.

    Args:
        of: vocab_size, context and kinds.
    """
    model = alike(lambda: build(config, seed, *of) if run.rank == 0 else hollow(config, *of))
    here = [(name, tuple(t.shape), t.requires_grad) for name, t in (*model.named_parameters(), *model.named_buffers())]
    if run.world_size > 1 and any(other != here for other in gathered(here)):
        odd = sorted({name for other in gathered(here) for name, *_ in set(other) ^ set(here)})
        raise ConfigError(
            f"Expected weights at {config.path} that are tied as their config says. Got others of their own: {', '.join(odd[:3])}. Set "
            "model.overrides={tie_word_embeddings: false}, or save the model anew by transformers."
        )
    return model


def assemble(job: Job, config: TrainingRunConfig, run: Run, parts: Ingredients) -> tuple[Training, State]:
    """Shard the model, make the masks and the optimizer, load the newest checkpoint; every rank calls this."""
    device = resolve_device(config.run)
    adapt(parts.model, parts.adapters, config.run.seed)
    make_aware(parts.model, parts.quantization)
    if config.training.activation_checkpointing:
        former = "gradient_checkpointing_enable"  # its name before transformers 5.23
        getattr(parts.model, "activation_checkpointing_enable", getattr(parts.model, former))({"use_reentrant": False})
    hybrid = hybrid_attention(parts.agenda, parts.model, device)
    sequences = config.training.sequences
    tokens = min(config.training.micro, sequences if config.run.parity else largest_share(sequences, run.world_size))
    tokens *= parts.tokens_per_sequence
    names = parts.sparse if parts.topology is not None else {}
    kernels = Kernels.install(parts.model, names, config.kernels, config.run, tokens, run, job.path / KERNELS)
    units, outputs = blocks(parts.model), None if parts.distillation is None else BlockOutputs(parts.model)
    if config.training.compile:
        for unit in units.values():
            unit.compile()
    sharded = shard(parts.model, units, config.sharding, device, resolve_dtype(config.run, device))
    tell_placement(job, config, run)
    if not isinstance(parts.adapters, AllWeights):
        trained, total = count_parameters(sharded)
        share = f"{trained / total:.2%} of the model's {total:,}"
        run.show({"text": f"{job.path.name}: {parts.adapters.type} trains {trained:,} parameters, {share}"})
    topology = None if parts.topology is None else parts.topology(sharded)
    if topology is not None:
        topology.kill(sharded.local)
    live = topology is not None and config.optimizer.keeps_live(parts.agenda)
    optimizer = build_optimizer(sharded, config.optimizer, config.run.parity, topology if live else None)

    def tell(text: str) -> None:
        run.show({"text": f"{job.path.name}: {text}"})

    folder, guard = job.path / "checkpoints", lambda: check_claim(job)
    checkpointer = Checkpointer(folder, config.checkpoint, sharded, optimizer, topology, parts.agenda, guard, tell)
    keeper = None
    if topology is not None:
        keeper = Keeper(parts.agenda, topology, sharded, optimizer, lambda: run.manager(job.path / HISTORY))
    arch = flops_architecture(parts.model)
    training = Training(
        stage=job.path.name,
        config=config.training,
        schedule=config.schedule,
        clip_norm=config.optimizer.clip_norm,
        seed=config.run.seed,
        parity=config.run.parity,
        pace=pace(config, config.training.sequences * parts.tokens_per_sequence, parts.steps_per_epoch),
        sharded=sharded,
        objective=make_objective(config, parts, sharded, outputs, device),
        optimizer=optimizer,
        agenda=parts.agenda,
        keeper=keeper,
        hybrid=hybrid,
        kernels=kernels,
        feed=parts.feed,
        validation=parts.validation,
        num_validation=parts.num_validation,
        context=parts.tokens_per_sequence,
        arch=arch,
        frozen=dict.fromkeys(needs_no_gradient([*arch.linears, arch.head], {n: p.trained for n, p in sharded.parts.items()}), 0),
        ledger=Ledger(parts.convention),
        checkpointer=checkpointer,
        meter=Meter(job.path, config.logging, enabled=run.rank == 0),
        run=run,
        watch=Watch(
            config.run.hang_timeout_s if run.is_watched else None,
            job.path / HANGS / f"rank_{run.rank}.txt",
            lambda what: run.say(f"{job.path.name}: {what}"),
        ),
    )
    return training, resume(training)


def tell_placement(job: Job, config: TrainingRunConfig, run: Run) -> None:
    """Say how the batch is shared out where that may change, and that replicas lie badly; every rank calls this."""
    if config.run.elastic and not config.run.parity:
        run.show({"text": f"{job.path.name}: {show_shares(config.training.sequences, run.world_size)}"})
    if (told := scattered(config.sharding, gathered(run.node))) is not None:
        run.show({"text": told})


def make_objective(config: TrainingRunConfig, parts: Ingredients, sharded: Sharded, outputs: BlockOutputs | None, device: str) -> Objective:
    """Cross-entropy alone, or with what a teacher says, which is sharded as its student is. Every rank calls this.

    Args:
        outputs: of the student's blocks.
    """

    def forward(batch: Batch) -> Tensor:
        return sharded.module(**batch.inputs).logits

    smoothing = config.training.label_smoothing
    if parts.distillation is None or outputs is None:
        return CrossEntropy(forward, smoothing)
    model, its, head = parts.teacher.requires_grad_(False), BlockOutputs(parts.teacher), ChosenLogits(parts.teacher)
    whole = config.sharding.model_copy(update={"packed": "off"})
    dtype, offload = resolve_dtype(config.run, device), parts.distillation.offload
    teacher = Teacher(shard(model, blocks(model), whole, device, dtype, sharded.wire, offload), its, head)
    return Distillation(parts.distillation, forward, outputs, teacher, smoothing)


def hybrid_attention(agenda: Agenda, model: Any, device: str) -> HybridAttention | None:
    """Attention that follows the phases, where any of them asks for more than full attention.

    Raises:
        ConfigError: a model that does not let its attention be replaced, or a setting that the kernels do not have.
    """
    wanted = any(span.phase.attention.type != "full" for span in agenda.spans)
    return HybridAttention.install(model, device) if wanted else None


def carry_out(
    job: Job,
    config: TrainingRunConfig,
    run: Run,
    parts: Ingredients,
    facts: Mapping[str, Any],
    tokenizer: str,
    judge: Callable[[Training], Judged] | None = None,
) -> dict[str, Any]:
    """Train to the end and write the model in Hugging Face format; returns the summary (see `finish`). Every rank calls this.

    Args:
        facts: what the recipe adds to the summary.
        tokenizer: folder of the tokenizer that goes with the model.
        judge: see `Training.judge`.
    """
    forget_peak_memory()
    if run.rank == 0:
        write_environment(job.path, config.run)
        facts_for_export = {
            "hf_config": parts.model.config.to_dict(),
            "tokenizer": tokenizer,
            "patience": config.training.patience,
            "adapters": parts.adapters.model_dump(),
        }
        write_atomically(job.path / "job.json", json.dumps(facts_for_export))
    t, state = assemble(job, config, run, parts)
    t.judge = judge
    try:
        with run.heeding():
            state = train(t, state)
    except TrainingError:  # of all ranks
        t.checkpointer.wait()  # the save in flight, for whoever goes on
        raise
    finally:
        t.watch.close()
    t.meter.close()
    summary = summarize(job, config, t, state, parts.sparse, parts.target) | dict(facts)
    if (last := parts.agenda.spans[-1].phase.attention).type != "full":
        run.show({"text": f"{t.stage}: trained and validated with {last.type} attention to the end; the exported model attends fully"})
    weights, masks = gather(t)
    check_claim(job)
    if run.rank == 0:
        shutil.rmtree(job.path / "export", ignore_errors=True)  # of an attempt that died before its summary
        write_model(job.path / "export", merge(weights, parts.adapters), masks, parts.model.config, tokenizer, summary)
    dist.barrier()
    return summary


def finish(job: Job, run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    """Write ``summary.json``: from here on the run is finished. Returns the summary; every rank calls this."""
    check_claim(job)
    if run.rank == 0:
        write_atomically(job.path / "summary.json", json.dumps(summary, indent=1) + "\n")
    dist.barrier()
    return summary


def summarize(
    job: Job, config: TrainingRunConfig, t: Training, state: State, sparse: Mapping[str, Shape], target: float | None
) -> dict[str, Any]:
    """The facts of a finished run, documented key by key in docs/summary.md; every rank calls this."""
    trained, parameters = count_parameters(t.sharded)
    live = {name: t.nnz.get(name, prod(shape)) for name, shape in sparse.items()}
    nnz, total = sum(live.values()), sum(map(prod, sparse.values()))
    actual = 1 - nnz / total if total else 0.0
    largest = t.largest(state)
    return header(job, config, t.run) | {
        "model": {
            "class": type(t.sharded.module).__name__.removeprefix("FSDP"),
            "parameters": parameters,
            "trained": trained,
            "trained_share": trained / parameters,
        },
        "loss": state.losses
        | {"perplexity": math.exp(min(700.0, state.losses["validation"])), "step": state.best_step if t.config.patience else state.step},
        "sparsity": {
            "target": actual if target is None else target,
            "actual": actual,
            "of_model": (total - nnz) / parameters,
            "nnz": nnz,
            "total": total,
            "mask_digest": "" if t.topology is None else t.topology.digest(t.sharded.ranks),
            "layers": [
                {"name": name, "shape": list(shape), "nnz": live[name], "sparsity": 1 - live[name] / prod(shape)}
                for name, shape in sparse.items()
            ],
        },
        "topology": history_of(t, state.step),
        "flops": t.ledger.savings().to_dict() | {"executed": t.ledger.executed.total, "teacher": t.ledger.teacher.total},
        "kernels": None if t.kernels is None else t.kernels.facts(),
        "steps": state.step,
        "tokens": state.tokens,
        "seconds": state.seconds,
        "tokens_per_s": state.tokens / max(1e-9, state.seconds),
        "bytes_sent": largest["bytes_sent"],
        "dense_bytes_sent": largest["dense_bytes"],
        "wire_seconds": largest["wire_seconds"],
        "packed": t.sharded.choice.facts(),
        "memory_bytes": largest["memory_bytes"],
        "peak_memory_bytes": int(t.all_max([peak_memory_bytes()])[0]),
    }


def count_parameters(sharded: Sharded) -> tuple[int, int]:
    """(parameters that train, adapters' factors among them; parameters of the model, without them)."""
    sizes = {name: prod(part.shape) for name, part in sharded.parts.items()}
    trained = sum(sizes[name] for name, part in sharded.parts.items() if part.trained)
    return trained, sum(size for name, size in sizes.items() if not is_factor(name))


def history_of(t: Training, steps: int) -> dict[str, Any]:
    """What the topology went through in `steps` steps, means taken over steps; empty where there are no masks, or on other ranks than 0."""
    if t.keeper is None or not (history := t.keeper.history()):
        return {}
    updates = history[1:]
    total = sum(map(prod, t.keeper.topology.shapes.values()))
    ends = [record["step"] + 1 for record in updates] + [steps]  # the step of an update still runs with the masks before it
    spans = [(end - start) for start, end in zip([0, *ends], ends, strict=False)]
    return {
        "updates": len(updates),
        "skipped": sum(record["skipped"] is not None for record in updates),
        "explored": history[-1]["explored"],
        "mean_churn": sum(record["churn"] for record in updates) / max(1, len(updates)),
        "seconds_per_update": sum(record["seconds"] for record in updates) / max(1, len(updates)),
        "mean_density": sum(span * sum(r["nnz"].values()) for span, r in zip(spans, history, strict=True)) / total / max(1, steps),
        "mean_attention_density": mean_attention_density(t.agenda, t.arch, t.context, steps),
    }


def mean_attention_density(agenda: Agenda, arch: Architecture, context: int, steps: int) -> float:
    """Share of full causal attention that a run computes, over its first `steps` steps."""
    lengths = [max(0, min(span.end, steps) - span.first) for span in agenda.spans]
    of = [span.phase.attention.mean_density(context, arch.layers, arch.heads) for span in agenda.spans]
    return sum(length * density for length, density in zip(lengths, of, strict=True)) / max(1, steps)


def header(job: Job, config: Config, run: Run) -> dict[str, Any]:
    """What every summary begins with."""
    return {
        "raysparse": __version__,
        "verb": job.verb,
        "name": job.path.name,
        "config_digest": config.digest(),
        "workers": run.world_size,
        "versions": versions(),
    }


def gather(t: Training) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights, bit-packed masks), whole, on the CPU of the first rank; the others get empty dicts. Every rank calls this."""

    def whole(locals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, local in locals.items():
            value = t.sharded.whole(name, local.detach())
            if t.run.rank == 0:
                found[name] = value
        return found

    return whole(t.sharded.local), {} if t.topology is None else whole({name: pack(m) for name, m in t.topology.masks.items()})
