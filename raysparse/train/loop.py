"""THE training loop: pre-training, fine-tuning, tests and benchmarks use this one.

One step: batch -> forward and backward in micro-batches (gradients summed over ranks) -> in some steps an update of the
topology, which sees the dense gradients -> dead gradients zeroed -> clipped by the norm of the live ones -> AdamW. Weights and
moments of dead entries are zero before a step and have zero gradients in it, so they are exactly zero after it;
`Topology.leaks` checks that at every logging interval.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from raysparse.config import Config
from raysparse.data.batch import IGNORED, Batch, Feed
from raysparse.length import Length
from raysparse.losses import cross_entropy_sum
from raysparse.models.attention import HybridAttention
from raysparse.sparsity import counter
from raysparse.sparsity.agenda import Agenda
from raysparse.sparsity.flops import Architecture, Ledger, growth_flops, training_flops
from raysparse.sparsity.topology import Topology
from raysparse.train.checkpoint import Checkpointer
from raysparse.train.clip import clip_, global_norm
from raysparse.train.error import TrainingError
from raysparse.train.keeper import Change, Keeper
from raysparse.train.metrics import Meter
from raysparse.train.optimizer import ScheduleConfig, moments
from raysparse.train.run import Run
from raysparse.train.shard import Sharded

HISTORY = "topology.jsonl"
"""In a run folder the journal of the topology, in a checkpoint the history up to it: one committed version a line."""


class TrainingConfig(Config):
    """How long to train, in which batches, and how often to validate."""

    length: Length = "1000 steps"
    """'4768 steps', '2.5e9 tokens', or in fine-tuning '5 epochs'."""
    sequences: int = Field(8, ge=1)
    """Sequences in a global batch, over all workers; a multiple of run.workers."""
    micro: int = Field(8, ge=1)
    """Most sequences that one worker runs forward and backward at a time; more are accumulated."""
    validate_every: Length = "10 %"
    """Between validations; the last step always validates."""
    validation_sequences: int = Field(64, ge=1)
    """Held-out sequences in a validation, the same ones every time (fewer if there are fewer)."""
    patience: int = Field(0, ge=0)
    """Stop after so many validations in a row without a new best loss, and go back to the best one's weights; 0 never stops."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Of the training loss; validation has none."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile each block: slower start, faster steps on GPUs."""


@dataclass(frozen=True)
class Pace:
    """Lengths of the config, in steps."""

    steps: int
    warmup: int
    validate: int
    save: int
    log: int
    histograms: int


@dataclass
class State:
    """What a checkpoint holds besides tensors; plain numbers."""

    step: int = 0
    optimizer_steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    bytes_sent: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    stale: int = 0
    losses: dict[str, float] = field(default_factory=dict)


@dataclass
class Training:
    """Everything that takes part in a run on one rank."""

    stage: str
    config: TrainingConfig
    schedule: ScheduleConfig
    clip_norm: float
    seed: int
    parity: bool
    pace: Pace
    sharded: Sharded
    optimizer: Optimizer
    agenda: Agenda
    keeper: Keeper | None
    hybrid: HybridAttention | None
    feed: Feed
    validation: Feed
    num_validation: int
    context: int
    arch: Architecture
    ledger: Ledger
    checkpointer: Checkpointer
    meter: Meter
    run: Run
    guard: Callable[[], None]
    saved: tuple[Path, int] | None = None

    @property
    def topology(self) -> Topology | None:
        """This rank's rows of the masks; None where the run is dense."""
        return None if self.keeper is None else self.keeper.topology

    @property
    def nnz(self) -> Mapping[str, int]:
        """Live weights of each sparse layer over all ranks."""
        return {} if self.keeper is None else self.keeper.live


def train(t: Training, state: State) -> State:
    """Train from `state` to the end of the run; returns the final state. Every rank calls this."""
    interval = _Interval(t, state)
    while state.step < t.pace.steps and not _stale(t, state):
        lr = _set_lr(t, state.step)
        loss, targets, tokens = forward_backward(t, state.step)
        _count(t, state.step, tokens)
        norm, stepped, change = update(t, state.step)
        if not math.isfinite(norm):
            raise TrainingError(
                f"Expected finite gradients in step {state.step + 1} of {t.stage}. Got a NaN or infinity. "
                "Lower optimizer.lr, lengthen schedule.warmup, or look at the data of this step; the last checkpoint is kept."
            )
        state.step += 1
        state.optimizer_steps += stepped
        state.tokens += tokens
        interval.add(loss, targets)
        if change is not None:
            interval.note(change)
        last = state.step == t.pace.steps
        if last or _due(state.step, t.pace.log):
            interval.report(lr, norm)
        if _due(state.step, t.pace.histograms):
            t.meter.histograms(state.step, _histograms(t))
        if last or _due(state.step, t.pace.validate):
            _validate_and_report(t, state, interval)
        new_best = t.config.patience > 0 and state.best_step == state.step
        if last or new_best or _stale(t, state) or _due(state.step, t.pace.save):
            save(t, state, interval)
    _publish(t)
    dist.barrier()
    if t.config.patience > 0 and 0 < state.best_step < state.step:
        t.run.show({"text": f"{t.stage}: back to the weights of step {state.best_step}, which validated best"})
        state.losses |= t.checkpointer.load(t.checkpointer.path(state.best_step))["state"]["losses"]
        if t.keeper is not None:
            t.keeper.count()
    return state


def forward_backward(t: Training, step: int) -> tuple[Tensor, int, int]:
    """Run the batch of `step`.

    Returns:
        This rank's sum of losses (nats, detached), and of the global batch the predicted tokens and all tokens (padding too).
    """
    torch.manual_seed(counter.key(t.seed, "dropout", step, t.run.rank))
    if t.hybrid is not None:
        t.hybrid.set(t.agenda.attention(step))  # validation keeps the pattern of the last step
    micro_batches = _micro_batches(t, step)
    count = torch.tensor([sum(batch.num_targets for batch in micro_batches)], dtype=torch.int64)
    targets = int(_all_sum(count, t))
    device = next(iter(t.sharded.parts.values())).local.device
    total = torch.zeros((), device=device)
    for i, batch in enumerate(micro_batches):
        with t.sharded.accumulate(last=i == len(micro_batches) - 1):
            loss = _loss(t, batch, device, t.config.label_smoothing)
            (loss / max(1, targets)).backward()
        total += loss.detach()
    return total, targets, t.config.sequences * micro_batches[0].input_ids.shape[1]


def update(t: Training, step: int) -> tuple[float, bool, Change | None]:
    """Evolve the topology if the step has an update; mask, clip, step the optimizer.

    Returns:
        The global norm of the live gradients before clipping, whether the optimizer stepped, and what the update did.
    """
    gradients = t.sharded.collect()
    change = None if t.keeper is None else t.keeper.evolve(step, gradients)
    _kill(t, gradients)
    num_rows = sum(part.shape[0] for part in t.sharded.parts.values())
    norm = global_norm(list(gradients.values()), num_rows, t.sharded.owners)
    steps = change is None or change.skipped is not None or t.agenda.span(step).rule.steps_on_update
    if math.isfinite(norm) and steps:
        clip_(list(gradients.values()), norm, t.clip_norm)
        t.optimizer.step()
        if t.keeper is not None and t.keeper.keeps_moments:
            _kill(t, t.sharded.local)  # moments of dead weights moved them
    t.sharded.zero_grad()
    return norm, steps, change


@torch.no_grad()
def validate(t: Training) -> tuple[float, float]:
    """Mean cross-entropy (nats) of the held-out sequences, and the standard error of that mean over sequences."""
    device = next(iter(t.sharded.parts.values())).local.device
    t.sharded.module.eval()
    sums = torch.zeros(t.num_validation, 2, dtype=torch.float64)
    share = -(-t.num_validation // t.run.world_size)
    mine = [min(t.run.rank * share + i, t.num_validation - 1) for i in range(share)]  # ranks run equally many passes
    counted = [t.run.rank * share + i < t.num_validation for i in range(share)]
    for start in range(0, share, t.config.micro):
        rows = mine[start : start + t.config.micro]
        batch = t.validation.batch(0, rows)
        for row, flag, (loss, num) in zip(rows, counted[start:], _losses_by_row(t, batch, device), strict=False):
            if flag:
                sums[row] = torch.tensor([loss, num], dtype=torch.float64)
    t.sharded.module.train()
    sums = _all_sum(sums, t)
    means, weights = sums[:, 0] / sums[:, 1].clamp_min(1), sums[:, 1] / sums[:, 1].sum()
    mean = float((means * weights).sum())
    return mean, float(((means - mean).square() * weights).sum().sqrt() / math.sqrt(max(1, t.num_validation - 1)))


def save(t: Training, state: State, interval: "_Interval") -> None:
    t.guard()
    _publish(t)
    interval.into(state)
    extra = {"state": vars(state), "ledger": t.ledger.to_dict(), "optimizer_steps": state.optimizer_steps}
    notes = {} if t.keeper is None else {HISTORY: "".join(json.dumps(record) + "\n" for record in t.keeper.history())}
    path = t.checkpointer.save(state.step, extra, protect=state.best_step if t.config.patience else 0, notes=notes)
    t.saved = (path, state.step)
    t.run.committed(path, {"step": state.step} | state.losses)


def _publish(t: Training) -> None:
    """Wait for the last checkpoint and let the manager know of it."""
    t.checkpointer.wait()
    if t.keeper is not None and t.saved is not None:
        path, step = t.saved
        t.keeper.published(str(path), step)
        t.saved = None


class _Interval:
    """Sums between two console lines, and the clock of the run."""

    def __init__(self, t: Training, state: State):
        self._t, self._state = t, state
        self._seconds_before, self._bytes_before = state.seconds, state.bytes_sent
        self._began = self._mark = time.perf_counter()
        self._first, self._targets, self._tokens = state.step, 0, state.tokens
        self._loss: Tensor | None = None
        self._churn = 0.0

    def add(self, loss: Tensor, targets: int) -> None:
        self._loss = loss if self._loss is None else self._loss + loss
        self._targets += targets

    def note(self, change: Change) -> None:
        """Of an update: TensorBoard points, and a line where it changed nothing."""
        t, step, self._churn = self._t, self._state.step, change.churn
        if change.skipped:
            last = change.update.version == len(t.agenda.update_steps)
            then = "it was the last update, the sparsity stays" if last else "the next update makes up for it"
            t.run.show({"text": f"{t.stage}: topology unchanged in step {step}: {change.skipped}; {then}"})
        tags = {
            "topology/churn": change.churn, "topology/explored": change.explored, "topology/seconds": change.seconds,
            "topology/drop_fraction": change.update.drop_fraction, "topology/version": change.update.version,
        }  # fmt: skip
        t.meter.point(step, tags)

    def into(self, state: State) -> None:
        state.seconds = self._seconds_before + time.perf_counter() - self._began
        state.bytes_sent = self._bytes_before + self._t.sharded.wire.bytes_sent

    def report(self, lr: float, norm: float) -> None:
        t, state = self._t, self._state
        assert self._loss is not None
        _check_leaks(t)
        loss = float(_all_sum(self._loss.double().cpu().reshape(1), t)) / max(1, self._targets)
        now = time.perf_counter()
        rate = (state.tokens - self._tokens) / max(1e-9, now - self._mark)
        self.into(state)
        state.losses["train"] = loss
        record = {
            "stage": t.stage, "step": state.step, "steps": t.pace.steps, "tokens": state.tokens,
            "loss": loss, "lr": lr, "grad_norm": norm, "tokens_per_s": rate,
            "seconds": state.seconds, "bytes_sent": state.bytes_sent,
            "flops": t.ledger.counted.total, "sparsity": _sparsity(t), "churn": self._churn,
            "phase": t.agenda.span(state.step - 1).phase.name, "attention_density": _attention_density(t, state.step - 1),
            "seconds_left": (now - self._began) / (state.step - self._first) * (t.pace.steps - state.step),
        }  # fmt: skip
        tags = {
            "loss/train": loss, "train/lr": lr, "train/grad_norm": norm,
            "speed/tokens_per_s": rate, "speed/bytes_sent": state.bytes_sent, "sparsity/all": record["sparsity"],
            "attention/density": record["attention_density"],
            "flops/counted": t.ledger.counted.total, "flops/dense": t.ledger.dense.total,
        } | _layer_sparsity(t)  # fmt: skip
        t.meter.write(record, tags)
        t.run.show(record)
        self._loss, self._targets, self._tokens, self._mark = None, 0, state.tokens, now

    def pause(self, seconds: float) -> None:
        """Time that is not training (validation) counts neither in tokens/s nor in the run's seconds."""
        self._mark += seconds
        self._began += seconds


def _validate_and_report(t: Training, state: State, interval: _Interval) -> None:
    began = time.perf_counter()
    loss, error = validate(t)
    interval.pause(time.perf_counter() - began)
    state.losses |= {"validation": loss, "validation_stderr": error}
    if loss < state.best_loss:
        state.best_loss, state.best_step, state.stale = loss, state.step, 0
    else:
        state.stale += 1
    record = {"stage": t.stage, "step": state.step, "tokens": state.tokens, "validation_loss": loss, "validation_stderr": error}
    t.meter.write(record, {"loss/validation": loss})
    t.run.show(record)


def _micro_batches(t: Training, step: int) -> list[Batch]:
    """This rank's rows of the global batch; with parity all of them on every rank, counted on rank 0 alone."""
    share = t.config.sequences if t.parity else t.config.sequences // t.run.world_size
    first = 0 if t.parity else share * t.run.rank
    batch = t.feed.batch(step, range(first, first + share))
    if t.parity and t.run.rank > 0:
        batch = Batch(batch.input_ids, torch.full_like(batch.labels, IGNORED))
    return [batch.rows(start, start + t.config.micro) for start in range(0, share, t.config.micro)]


def _loss(t: Training, batch: Batch, device: torch.device, smoothing: float = 0.0) -> Tensor:
    logits = t.sharded.module(input_ids=batch.input_ids.to(device)).logits
    return cross_entropy_sum(logits, batch.labels.to(device), smoothing)


def _losses_by_row(t: Training, batch: Batch, device: torch.device) -> list[tuple[float, int]]:
    """(sum of losses, predicted tokens) of each row."""
    with t.sharded.accumulate(last=True):
        logits = t.sharded.module(input_ids=batch.input_ids.to(device)).logits
    labels = batch.labels.to(device)
    return [(float(cross_entropy_sum(logits[i : i + 1], labels[i : i + 1])), int((labels[i] != IGNORED).sum())) for i in range(len(labels))]


def _all_sum(x: Tensor, t: Training) -> Tensor:
    """Sum over every rank of the run, replicas too."""
    if t.run.world_size == 1:
        return x
    device = next(iter(t.sharded.parts.values())).local.device
    y = x.to(device)
    dist.all_reduce(y)
    return y.to(x.device)


def _set_lr(t: Training, step: int) -> float:
    factor = t.schedule.factor(step, t.pace.warmup, t.pace.steps)
    for group in t.optimizer.param_groups:
        group.setdefault("peak_lr", group["lr"])
        group["lr"] = group["peak_lr"] * factor
    return t.optimizer.param_groups[0]["lr"]


def _kill(t: Training, tensors: Mapping[str, Tensor]) -> None:
    if t.topology is not None:
        t.topology.kill({name: tensors[name] for name in t.topology.masks if name in tensors})


def _attention_density(t: Training, step: int) -> float:
    """Share of full causal attention that the step's pattern computes."""
    return t.agenda.attention(step).mean_density(t.context, t.arch.layers, t.arch.heads)


def _check_leaks(t: Training) -> None:
    if t.keeper is None:
        return
    tensors = {"weight": t.sharded.local}
    if not t.keeper.keeps_moments:
        tensors |= {which: moments(t.sharded, t.optimizer, which) for which in ("exp_avg", "exp_avg_sq")}
    for what, found in tensors.items():
        present = {name: found[name] for name in t.keeper.topology.masks if name in found}
        leaks = t.keeper.topology.leaks(present)
        assert not leaks, f"{what} of dead entries is not 0 on rank {t.run.rank}: {leaks}"


def _sparsity(t: Training) -> float:
    if t.topology is None:
        return 0.0
    total = sum(math.prod(shape) for shape in t.topology.shapes.values())
    return 1 - sum(t.nnz[name] for name in t.topology.shapes) / total


def _layer_sparsity(t: Training) -> dict[str, float]:
    if t.topology is None:
        return {}
    return {f"sparsity/{name}": 1 - t.nnz[name] / math.prod(shape) for name, shape in t.topology.shapes.items()}


def _histograms(t: Training) -> dict[str, Tensor]:
    """Of rank 0's rows: weight values (live ones where there is a mask) and live weights per row."""
    masks: Mapping[str, Tensor] = {} if t.topology is None else t.topology.masks
    values = {
        f"weights/{name}": part.local[masks[name]] if name in masks else part.local
        for name, part in t.sharded.parts.items()
        if len(part.shape) > 1
    }
    return values | {f"masks/{name}": mask.sum(1) for name, mask in masks.items()}


def _count(t: Training, step: int, tokens: int) -> None:
    """Add a step to the ledger, at its own sequence length, attention and numbers of live weights."""
    length, convention = tokens // t.config.sequences, t.ledger.convention
    counted = training_flops(t.arch, t.nnz, tokens, length, convention, _attention_density(t, step))
    reads = t.keeper is not None and t.agenda.is_update(step) and t.agenda.span(step).rule.reads_gradient
    growth = growth_flops(t.arch, t.nnz, tokens, length, convention) if reads else None
    t.ledger.add(counted, training_flops(t.arch, 1.0, tokens, length, convention), growth)


def _stale(t: Training, state: State) -> bool:
    return 0 < t.config.patience <= state.stale


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
