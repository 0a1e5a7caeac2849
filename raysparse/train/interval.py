"""What is said between two console lines: sums, rates, TensorBoard points, and a look for leaks."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from raysparse.kernels.adamw import MOMENTS
from raysparse.train.keeper import Change
from raysparse.train.optimizer import dense_moments
from raysparse.train.process import peak_memory_bytes
from raysparse.train.state import State, Training


class Interval:
    """Sums between two console lines, and the clock of the run."""

    def __init__(self, t: Training, state: State):
        self._t, self._state = t, state
        self._seconds_before = state.seconds
        self._sent_before: tuple[float, ...] = (state.bytes_sent, state.dense_bytes, state.wire_seconds)
        self._sent = (state.step, *self._sent_before)  # at the last report
        self._began = self._mark = time.perf_counter()
        self._first, self._targets, self._tokens = state.step, 0, state.tokens
        self._step = state.step  # at the last report
        self._loss: Tensor | None = None
        self._parts: dict[str, Tensor] = {}
        self._steps = 0  # that were not left out
        self._norm = 0.0
        self._churn = 0.0

    def add(self, loss: Tensor, targets: int, norm: float) -> None:
        """A step that was not left out."""
        for name, part in self._t.objective.parts().items():
            self._parts[name] = self._parts[name] + part if name in self._parts else part
        self._steps += 1
        self._loss = loss if self._loss is None else self._loss + loss
        self._targets += targets
        self._norm = norm

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
            "topology/phase": t.agenda.spans.index(t.agenda.span(change.update.step)),
        }  # fmt: skip
        t.meter.point(step, tags)

    def into(self, state: State) -> None:
        state.seconds = self._seconds_before + time.perf_counter() - self._began
        sent, dense, seconds = (a + b for a, b in zip(self._sent_before, self._t.sharded.wire.so_far, strict=True))
        state.bytes_sent, state.dense_bytes, state.wire_seconds = int(sent), int(dense), seconds

    def report(self, lr: float) -> None:
        t, state = self._t, self._state
        check_leaks(t)
        if self._loss is None:  # all of these steps were left out
            return
        loss = float(t.all_sum(self._loss.double().cpu().reshape(1))) / max(1, self._targets)
        now = time.perf_counter()
        rate = (state.tokens - self._tokens) / max(1e-9, now - self._mark)
        parts = {name: float(t.all_sum(part.double())) / self._steps for name, part in self._parts.items()}
        self.into(state)
        state.losses["train"] = loss
        memory, wire = t.memory(), self._wire()
        state.memory_bytes = {name: max(size, state.memory_bytes.get(name, 0)) for name, size in memory.items()}
        record = {
            "stage": t.stage, "step": state.step, "steps": t.pace.steps, "tokens": state.tokens,
            "loss": loss, "lr": lr, "grad_norm": self._norm, "tokens_per_s": rate,
            "seconds": state.seconds, "bytes_sent": state.bytes_sent, "workers": t.run.world_size,
            "flops": t.ledger.counted.total, "sparsity": _sparsity(t), "churn": self._churn,
            "phase": t.agenda.span(state.step - 1).phase.name, "attention_density": t.attention_density(state.step - 1),
            "step_seconds": (now - self._mark) / (state.step - self._step), "wire_seconds": wire["wire/seconds_per_step"],
            "seconds_left": (now - self._began) / (state.step - self._first) * (t.pace.steps - state.step),
        }  # fmt: skip
        tags = {
            "loss/train": loss, "train/lr": lr, "train/grad_norm": self._norm,
            "speed/tokens_per_s": rate, "speed/bytes_sent": state.bytes_sent, "sparsity/all": record["sparsity"],
            "attention/density": record["attention_density"],
            "flops/counted": t.ledger.counted.total, "flops/dense": t.ledger.dense.total,
        } | wire | _memory(memory) | _layer_sparsity(t)  # fmt: skip
        tags |= {f"loss/{name}": part for name, part in parts.items()}
        told = record | {f"{name}_loss": part for name, part in parts.items()}
        t.meter.write(told, tags)
        t.run.show(told)
        self._loss, self._targets, self._tokens, self._mark, self._step = None, 0, state.tokens, now, state.step
        self._parts, self._steps = {}, 0

    def _wire(self) -> dict[str, float]:
        """A step's bytes that this rank sent, those of whole buffers, and seconds in collectives, in the mean since the last report."""
        now = self._state.step, self._state.bytes_sent, self._state.dense_bytes, self._state.wire_seconds
        steps, *grown = (after - before for after, before in zip(now, self._sent, strict=True))
        self._sent = now
        names = ("wire/bytes_per_step", "wire/dense_bytes_per_step", "wire/seconds_per_step")
        return {name: amount / max(1, steps) for name, amount in zip(names, grown, strict=True)}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside is not training: neither its seconds nor what it sends count as the run's."""
        began, wire = time.perf_counter(), self._t.sharded.wire
        sent = wire.so_far
        yield
        self._sent_before = tuple(a + b - c for a, b, c in zip(self._sent_before, sent, wire.so_far, strict=True))
        seconds = time.perf_counter() - began
        self._mark += seconds
        self._began += seconds


def check_leaks(t: Training) -> None:
    """The masks are those that were committed, and what they leave out is 0. Every rank calls this."""
    if t.keeper is None:
        return
    t.keeper.audit()
    tensors = {"weight": t.sharded.local}
    if not t.keeper.keeps_moments:
        tensors |= {which: dense_moments(t.sharded, t.optimizer, which, t.keeper.topology) for which in MOMENTS}
    for what, found in tensors.items():
        present = {name: found[name] for name in t.keeper.topology.masks if name in found}
        leaks = t.keeper.topology.leaks(present)
        assert not leaks, f"{what} of dead entries is not 0 on rank {t.run.rank}: {leaks}"


def _memory(kept: dict[str, int]) -> dict[str, float]:
    return {f"memory/{name}": size for name, size in (kept | {"peak": peak_memory_bytes()}).items()}


def _sparsity(t: Training) -> float:
    if t.topology is None:
        return 0.0
    total = sum(math.prod(shape) for shape in t.topology.shapes.values())
    return 1 - sum(t.nnz[name] for name in t.topology.shapes) / total


def _layer_sparsity(t: Training) -> dict[str, float]:
    if t.topology is None:
        return {}
    return {f"sparsity/{name}": 1 - t.nnz[name] / math.prod(shape) for name, shape in t.topology.shapes.items()}


def histograms(t: Training) -> dict[str, Tensor]:
    """Of rank 0's rows: weight values (live ones where there is a mask) and live weights per row."""
    masks: Mapping[str, Tensor] = {} if t.topology is None else t.topology.masks
    values = {
        f"weights/{name}": part.local[masks[name]] if name in masks else part.local
        for name, part in t.sharded.parts.items()
        if len(part.shape) > 1
    }
    return values | {f"masks/{name}": mask.sum(1) for name, mask in masks.items()}
