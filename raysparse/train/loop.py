"""THE training loop: pre-training, fine-tuning, tests and benchmarks use this one.

One step: batch -> forward and backward in micro-batches (gradients summed over ranks) -> in some steps an update of the
topology, which sees the dense gradients -> dead gradients zeroed -> clipped by the norm of the live ones -> AdamW. Weights and
moments of dead entries are zero before a step and have zero gradients in it, so they are exactly zero after it;
`Topology.leaks` checks that at every logging interval.

What may go wrong in a step is told in `docs/faults.md`: a NaN ends nothing before `recovery.bad_step` has said so, and a run that is
told to leave saves first.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from raysparse.data.batch import IGNORED, Batch
from raysparse.losses import cross_entropy_sum
from raysparse.sparsity import counter
from raysparse.sparsity.flops import growth_flops, training_flops
from raysparse.train.checkpoint import MARKER
from raysparse.train.clip import clip_, global_norm
from raysparse.train.error import Left, TrainingError
from raysparse.train.interval import Interval, histograms
from raysparse.train.keeper import Change
from raysparse.train.placement import largest_share, share_of
from raysparse.train.recovery import bad_step
from raysparse.train.state import HISTORY, State, Training

MOST_UNSAVED = 3
"""Saves given up in a row; a run that goes on longer without a checkpoint is not what its user asked for."""


def train(t: Training, state: State) -> State:
    """Train from `state` to the end of the run; returns the final state. Every rank calls this.

    Raises:
        Left: the run was told to leave (`Run.leaving`); its last step is saved.
        TrainingError: it cannot go on.
    """
    interval = Interval(t, state)
    if t.config.on_nan == "roll_back" and state.step == 0:
        save(t, state, interval)  # there must be something to go back to
    while state.step < t.pace.steps and not _stale(t, state):
        t.watch.beat()
        lr, began = _set_lr(t, state.step), time.perf_counter()
        done = forward_backward(t, state.step)
        if done is None:
            t.watch.rest()
            leave(t, state, interval)
        loss, targets, tokens, source = done
        _count(t, state.step, tokens, source)
        norm, stepped, change = update(t, state.step)
        t.watch.rest()
        finite = math.isfinite(norm)
        if not finite and (back := bad_step(t, state)) is not None:
            state, interval = back, Interval(t, back)
            continue
        state.step += 1
        state.optimizer_steps += stepped and finite
        state.tokens += tokens
        if finite:
            interval.add(loss, targets, norm)
        if change is not None:
            interval.note(change)
        elif said := t.sharded.took(time.perf_counter() - began):
            t.run.show({"text": said})
        last = state.step == t.pace.steps
        if last or _due(state.step, t.pace.log):
            interval.report(lr)
        if _due(state.step, t.pace.histograms):
            t.meter.histograms(state.step, histograms(t))
        if last or _due(state.step, t.pace.validate):
            _validate_and_report(t, state, interval)
        new_best = t.config.patience > 0 and state.best_step == state.step
        if last or new_best or _stale(t, state) or _due(state.step, t.pace.save):
            save(t, state, interval)
    _publish(t, last=True)
    dist.barrier()
    if t.config.patience > 0 and 0 < state.best_step < state.step:
        _check_best(t, state)
        t.run.show({"text": f"{t.stage}: back to the weights of step {state.best_step}, which validated best"})
        state.losses |= t.checkpointer.load(t.checkpointer.path(state.best_step))["state"]["losses"]
        if t.keeper is not None:
            t.keeper.count()
            t.follow()
    return state


def forward_backward(t: Training, step: int) -> tuple[Tensor, int, int, int] | None:
    """Run the batch of `step`.

    A loss that is not finite makes the gradients so, and the reduction carries that to all ranks.

    Returns:
        This rank's sum of losses (nats, detached); of the global batch the predicted tokens and all tokens (padding too, those that an
        encoder reads not); and what an encoder reads of each row. None if any rank was told to leave: then nothing is computed, on any.
    """
    torch.manual_seed(counter.key(t.seed, "dropout", step, t.run.rank))
    if t.hybrid is not None:
        t.hybrid.set(t.agenda.attention(step))  # validation keeps the pattern of the last step
    t.sharded.begin(t.looks_at_dead(step))
    if t.kernels is not None:
        t.kernels.begin(t.looks_at_dead(step))
    micro_batches = _micro_batches(t, step)
    mine = [sum(batch.num_targets for batch in micro_batches), int(t.run.leaving())]
    targets, leaving = t.all_sum(torch.tensor(mine, dtype=torch.int64)).tolist()
    if leaving:
        return None
    micro_batches = [batch.to(t.device) for batch in micro_batches]
    t.objective.begin(micro_batches, targets, t.watch.beat)
    total = torch.zeros((), device=t.device)
    for i, batch in enumerate(micro_batches):
        t.watch.beat()
        with t.sharded.accumulate(last=i == len(micro_batches) - 1):
            loss, cross_entropy = t.objective.loss(batch)
            sane = torch.where(loss.detach().isfinite(), 1.0, math.nan)
            (loss * sane).backward()
        total += cross_entropy
    first = micro_batches[0]
    return total, targets, t.config.sequences * first.input_ids.shape[1], first.source_length


def update(t: Training, step: int) -> tuple[float, bool, Change | None]:
    """Evolve the topology if the step has an update; mask, clip, step the optimizer.

    Returns:
        The global norm of the live gradients before clipping, whether the optimizer stepped, and what the update did.
    """
    t.checkpointer.staged()
    gradients = t.sharded.collect()
    change = None if t.keeper is None else t.keeper.evolve(step, gradients)
    if change is not None and change.skipped is None:
        t.follow()
    if t.topology is not None:
        t.topology.kill(gradients)
    num_rows = sum(part.shape[0] for part in t.sharded.parts.values())
    norm = global_norm(list(gradients.values()), num_rows, t.sharded.owners)
    steps = change is None or change.skipped is not None or t.agenda.span(step).rule.steps_on_update
    if math.isfinite(norm) and steps:
        clip_(list(gradients.values()), norm, t.clip_norm)
        t.optimizer.step()
        if t.keeper is not None:
            t.keeper.settle()
    t.sharded.zero_grad()
    return norm, steps, change


@torch.no_grad()
def validate(t: Training) -> tuple[float, float]:
    """Mean cross-entropy (nats) of the held-out sequences, and the standard error of that mean over sequences."""
    t.sharded.module.eval()
    if t.kernels is not None:
        t.kernels.begin(dense_gradient=False)
    sums = torch.zeros(t.num_validation, 2, dtype=torch.float64)
    share = -(-t.num_validation // t.run.world_size)
    mine = [min(t.run.rank * share + i, t.num_validation - 1) for i in range(share)]  # ranks run equally many passes
    counted = [t.run.rank * share + i < t.num_validation for i in range(share)]
    for start in range(0, share, t.config.micro):
        rows = mine[start : start + t.config.micro]
        batch = t.validation.batch(0, rows)
        for row, flag, (loss, num) in zip(rows, counted[start:], _losses_by_row(t, batch.to(t.device)), strict=False):
            if flag:
                sums[row] = torch.tensor([loss, num], dtype=torch.float64)
    t.sharded.module.train()
    sums = t.all_sum(sums)
    means, weights = sums[:, 0] / sums[:, 1].clamp_min(1), sums[:, 1] / sums[:, 1].sum()
    mean = float((means * weights).sum())
    return mean, float(((means - mean).square() * weights).sum().sqrt() / math.sqrt(max(1, t.num_validation - 1)))


def save(t: Training, state: State, interval: Interval) -> None:
    """Begin to save. Masks that are not what was committed are not written: that is a `TrainingError` on every rank."""
    _publish(t)
    if t.keeper is not None:
        t.keeper.audit()
    interval.into(state)
    extra = {"state": vars(state) | t.largest(state), "ledger": t.ledger.to_dict(), "optimizer_steps": state.optimizer_steps}
    path = t.checkpointer.save(state.step, extra, protect=state.best_step if t.config.patience else 0, notes=_notes(t, state.step))
    t.saved, t.saved_step = (path, state.step), state.step
    t.run.committed(path, {"step": state.step} | state.losses)


def _notes(t: Training, step: int) -> Callable[[], dict[str, Iterable[str]]]:
    """What is to lie in a checkpoint of `step` besides. Long after thousands of updates: so it is put together while training goes on."""
    return lambda: {} if t.keeper is None else {HISTORY: t.keeper.journal(step)}


def leave(t: Training, state: State, interval: Interval) -> NoReturn:
    """Save what is not saved, and go."""
    if state.step > t.saved_step:
        save(t, state, interval)
    _publish(t, last=True)
    t.meter.close()
    raise Left(f"{t.stage} was told to leave, and has saved step {state.step}. The same command goes on from there.")


def _publish(t: Training, last: bool = False) -> None:
    """Wait for the last checkpoint and let the manager know of it, or the user that there is none."""
    problem = t.checkpointer.wait()
    if t.saved is None:
        return
    (path, step), t.saved = t.saved, None
    if problem is None:
        t.unsaved = 0
        if t.keeper is not None:
            t.keeper.published(str(path), step)
        return
    t.unsaved += 1
    t.run.show({"text": f"{t.stage}: step {step} is NOT SAVED: {problem}. Earlier checkpoints are kept; make room, or mend the storage"})
    t.meter.write({"stage": t.stage, "step": step, "steps": t.pace.steps, "event": "not_saved", "why": problem}, {})
    if last or t.unsaved >= MOST_UNSAVED:
        raise TrainingError(
            f"Expected to write a checkpoint of step {step} to {path}. Got: {problem}{f', {t.unsaved} times in a row' * (t.unsaved > 1)}. "
            "Make room there, or mend the storage; the same command then goes on from the newest checkpoint."
        )


def _check_best(t: Training, state: State) -> None:
    best = t.checkpointer.path(state.best_step)
    if not (best / MARKER).exists():
        raise TrainingError(
            f"Expected the weights of step {state.best_step}, which validated best, in {best}. Got none: they could not be saved. "
            "The same command goes on from the newest checkpoint; training.patience=0 ends with the last weights."
        )


def _validate_and_report(t: Training, state: State, interval: Interval) -> None:
    with interval.paused():
        loss, error = validate(t)
        judged = None if t.judge is None else t.judge(t)
        t.sharded.rest()
    state.losses |= {"validation": loss, "validation_stderr": error}
    value = loss if judged is None else judged.badness
    if value < state.best_loss:
        state.best_loss, state.best_step, state.stale = value, state.step, 0
    else:
        state.stale += 1
    record = {"stage": t.stage, "step": state.step, "steps": t.pace.steps, "tokens": state.tokens}
    record |= {"validation_loss": loss, "validation_stderr": error}
    tags = {"loss/validation": loss}
    if judged is not None:
        record |= {"score": judged.name, "validation_score": judged.score}
        state.losses["validation_score"] = judged.score
        tags[f"task/{judged.name}"] = judged.score
    t.meter.write(record, tags)
    t.run.show(record)


def _micro_batches(t: Training, step: int) -> list[Batch]:
    """This rank's rows of the global batch, with parity all of them on rank 0; filled up to the largest share by rows that do not
    count, for collectives want equally many micro-batches of every rank."""
    sequences, rank, world_size = t.config.sequences, t.run.rank, t.run.world_size
    if t.parity:
        mine, size = range(sequences if rank == 0 else 0), sequences
    else:
        mine, size = share_of(sequences, rank, world_size), largest_share(sequences, world_size)
    batch = t.feed.batch(step, [min(mine.start + i, sequences - 1) for i in range(size)])
    batch = replace(batch, labels=batch.labels.index_fill(0, torch.arange(len(mine), size), IGNORED))
    return [batch.rows(start, start + t.config.micro) for start in range(0, size, t.config.micro)]


def _losses_by_row(t: Training, batch: Batch) -> list[tuple[float, int]]:
    """(sum of losses, predicted tokens) of each row."""
    with t.sharded.accumulate(last=True):
        logits = t.sharded.module(**batch.inputs).logits
    labels = batch.labels
    return [(float(cross_entropy_sum(logits[i : i + 1], labels[i : i + 1])), int((labels[i] != IGNORED).sum())) for i in range(len(labels))]


def _set_lr(t: Training, step: int) -> float:
    factor = t.schedule.factor(step, t.pace.warmup, t.pace.steps)
    for group in t.optimizer.param_groups:
        group.setdefault("peak_lr", group["lr"])
        group["lr"] = group["peak_lr"] * factor
    return t.optimizer.param_groups[0]["lr"]


def _count(t: Training, step: int, tokens: int, source: int) -> None:
    """Add a step to the ledger, at its own sequence lengths, attention and numbers of live weights."""
    length, convention = tokens // t.config.sequences, t.ledger.convention
    counted = training_flops(t.arch, t.nnz, tokens, length, convention, t.attention_density(step), source)
    if t.frozen:
        rest = training_flops(t.arch, {**t.nnz, **t.frozen}, tokens, length, convention, t.attention_density(step), source)
        counted = counted * (2 / 3) + rest * (1 / 3)
    dense = training_flops(t.arch, 1.0, tokens, length, convention, source=source)
    executed, reads = None, t.looks_at_dead(step)
    seen = t.attention_density(step) if t.hybrid is not None and t.hybrid.skips else 1.0
    if t.kernels is not None or seen < 1 or t.frozen:
        forward, backward, gradient = [{}] * 3 if t.kernels is None else t.kernels.executed(t.nnz, reads)
        products = forward, backward, {**gradient, **t.frozen}
        thirds = [training_flops(t.arch, live, tokens, length, convention, seen, source) * (1 / 3) for live in products]
        executed = thirds[0] + thirds[1] + thirds[2]
    growth = growth_flops(t.arch, t.nnz, tokens, length, convention, source) if reads else None
    teacher = None
    if t.objective.passes:
        teacher = replace(dense * t.objective.passes, head=dense.head * t.objective.logits / tokens) * (1 / 3)
    t.ledger.add(counted, dense, growth, executed, teacher)


def _stale(t: Training, state: State) -> bool:
    return 0 < t.config.patience <= state.stale


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
