"""What takes part in a run on one rank, and what of it a checkpoint keeps besides tensors."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from raysparse.config import Config
from raysparse.data.batch import Feed
from raysparse.kernels.adamw import MOMENTS
from raysparse.length import Length
from raysparse.models.adapters import is_factor
from raysparse.models.attention import HybridAttention
from raysparse.sparsity.agenda import Agenda
from raysparse.sparsity.flops import Architecture, Ledger
from raysparse.sparsity.topology import Topology
from raysparse.train.checkpoint import Checkpointer
from raysparse.train.keeper import Keeper
from raysparse.train.kernels import Kernels
from raysparse.train.metrics import Meter
from raysparse.train.objective import Objective
from raysparse.train.optimizer import ScheduleConfig, moments
from raysparse.train.run import Run
from raysparse.train.shard import Sharded
from raysparse.train.watch import Watch

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
    on_nan: Literal["stop", "skip", "roll_back"] = "stop"
    """What happens in a step whose loss or gradients hold a NaN or infinity. stop: an error. skip: its gradients are thrown away, and the
    next batch comes; ten steps in a row, and it is an error. roll_back: the step is tried once more from the newest checkpoint, and if it
    is bad again left out as with skip. May change when a run goes on (docs/faults.md)."""
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
    dense_bytes: int = 0
    wire_seconds: float = 0.0
    memory_bytes: dict[str, int] = field(default_factory=dict)
    """Most of each kind at any console line so far (`Training.memory`)."""
    best_loss: float = math.inf
    """Of what patience goes by: validation loss, or `Judged.badness`."""
    best_step: int = 0
    stale: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    left_out: list[int] = field(default_factory=list)
    """Steps (0-based) whose gradients were not finite, and thrown away."""


class Judged(NamedTuple):
    """A score of the model in training.

    Attributes:
        badness: what is to be small: the score, negative where higher is better.
    """

    name: str
    score: float
    badness: float


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
    objective: Objective
    optimizer: Optimizer
    agenda: Agenda
    keeper: Keeper | None
    hybrid: HybridAttention | None
    kernels: Kernels | None
    feed: Feed
    validation: Feed
    num_validation: int
    context: int
    arch: Architecture
    frozen: Mapping[str, int]
    """Of the matrices whose weight-gradient product is left out: 0, the live weights that it has."""
    ledger: Ledger
    checkpointer: Checkpointer
    meter: Meter
    run: Run
    watch: Watch
    judge: "Callable[[Training], Judged] | None" = None
    """Scores the model at a validation; patience and the best checkpoint then go by that and not by the loss. Every rank calls it."""
    saved: tuple[Path, int] | None = None
    """A checkpoint and its step that the manager has not been told of: it is in flight."""
    saved_step: int = 0
    """Of the newest checkpoint, that in flight too."""
    unsaved: int = 0
    """Saves given up in a row."""
    tried_again: set[int] = field(default_factory=set)
    """Steps that the run has gone back for."""

    @property
    def topology(self) -> Topology | None:
        """This rank's rows of the masks; None where the run is dense."""
        return None if self.keeper is None else self.keeper.topology

    @property
    def nnz(self) -> Mapping[str, int]:
        """Live weights of each sparse layer over all ranks."""
        return {} if self.keeper is None else self.keeper.live

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self.sharded.parts.values())).local.device

    def follow(self) -> None:
        """The masks are new, or others: kernels and collectives follow them. Every rank calls this."""
        if self.topology is not None:
            if self.kernels is not None:
                self.kernels.refresh(self.topology, self.nnz, self.sharded)
            self.sharded.follow(self.topology, self.nnz)

    def looks_at_dead(self, step: int) -> bool:
        """Whether the step has an update that reads the gradients of dead weights."""
        return self.keeper is not None and self.agenda.is_update(step) and self.agenda.span(step).rule.grows_by_gradient

    def memory(self) -> dict[str, int]:
        """Bytes that this rank keeps between the steps, but for gradients: of its rows of the weights, of the gradients that it sums up
        and steps with, of AdamW's moments, and of these if all weights of the model had them, frozen ones too."""
        sizes = {name: part.local.nbytes for name, part in self.sharded.parts.items()}
        found = [moments(self.sharded, self.optimizer, which) for which in MOMENTS]
        dense = [name for name, part in self.sharded.parts.items() if (part.mine or not part.trained) and not is_factor(name)]
        return {
            "weights": sum(sizes.values()),
            "gradients": sum(sizes[name] for name, part in self.sharded.parts.items() if part.mine),
            "moments": sum(value.nbytes for of in found for value in of.values()),
            "dense_moments": len(MOMENTS) * sum(sizes[name] for name in dense),
        }

    def largest(self, state: State) -> dict[str, Any]:
        """What the rank that has most of it sent and kept so far, as fields of `State`. Every rank calls this."""
        memory = state.memory_bytes or self.memory()  # a checkpoint of an earlier version has none
        seconds, *counts = self.all_max([state.wire_seconds, state.bytes_sent, state.dense_bytes, *memory.values()])
        sent, dense, *sizes = map(int, counts)
        return {
            "bytes_sent": sent,
            "dense_bytes": dense,
            "wire_seconds": seconds,
            "memory_bytes": dict(zip(memory, sizes, strict=True)),
        }

    def all_max(self, values: Sequence[float]) -> list[float]:
        """The largest of each over every rank of the run; every rank calls this."""
        found = torch.tensor(values, dtype=torch.float64, device=self.device)  # NCCL has no CPU tensors
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def all_sum(self, x: Tensor) -> Tensor:
        """Sum over every rank of the run, replicas too; every rank calls this."""
        if self.run.world_size == 1:
            return x
        y = x.to(self.device)
        dist.all_reduce(y)
        return y.to(x.device)

    def attention_density(self, step: int) -> float:
        """Share of full causal attention that the step's pattern computes."""
        return self.agenda.attention(step).mean_density(self.context, self.arch.layers, self.arch.heads)
