"""Counted FLOPs: what training costs if zeros are skipped. A count says nothing about what a kernel executed.

Forward pass over one sequence of T tokens, L layers, h heads of width e, vocabulary V, model width d, 2 FLOPs a
multiply-add, attention over the full T x T square (no causal discount)::

    linears    2 * nnz * T            every matrix inside the blocks
    head       2 * nnz_head * T       V * d while dense
    attention  4 * L * h * e * T^2    queries by keys, and their weights by values
    softmax    3 * L * h * T^2        convention "spdf" only

Training costs 3 forwards (the backward computes two gradients of the same size). Lookups (embeddings) are free; norms, biases
and activations are left out. Convention "spdf" reproduces the tables of SPDF (arXiv:2303.10464, supplement), which follow
Chinchilla's appendix F (arXiv:2203.15556) less the embedding lookup. Convention "palm" is 6 N + 12 L h e T a token with N the
matrices and the head (PaLM, arXiv:2204.02311, appendix B), the count of MST's code.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any, Literal, Self

from raysparse.sparsity.distribution import Shape

Convention = Literal["spdf", "palm"]
Live = Mapping[str, int] | float
"""Live weights by name (a weight that is not named is dense), or one density for all `Architecture.linears`."""


@dataclass(frozen=True)
class Architecture:
    """What a decoder-only model multiplies.

    Attributes:
        linears: parameter name -> [rows, cols] of every matrix inside the blocks, sparse or not.
        head: parameter name of the [vocab, width] output head; the token embedding's where they are tied.
        head_counted: False leaves the head out of every figure.
        head_sparse: whether a density given as one number holds for the head too.
        lookups: names of other weights that may be sparse but are never multiplied (embedding tables).
    """

    layers: int
    width: int
    heads: int
    head_dim: int
    vocab: int
    linears: Mapping[str, Shape]
    head: str
    head_counted: bool = True
    head_sparse: bool = False
    lookups: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Flops:
    """A cost by part, with the convention it was counted by."""

    convention: Convention
    linears: float = 0.0
    head: float = 0.0
    attention: float = 0.0
    softmax: float = 0.0

    @property
    def total(self) -> float:
        return self.linears + self.head + self.attention + self.softmax

    def __add__(self, other: "Flops") -> "Flops":
        assert self.convention == other.convention, f"cannot add {other.convention} to {self.convention} FLOPs"
        parts = ("linears", "head", "attention", "softmax")
        return Flops(self.convention, **{part: getattr(self, part) + getattr(other, part) for part in parts})

    def __mul__(self, times: float) -> "Flops":
        scaled = (self.linears * times, self.head * times, self.attention * times, self.softmax * times)
        return Flops(self.convention, *scaled)


def forward_flops(arch: Architecture, live: Live, length: int, convention: Convention, attention_density: float = 1.0) -> Flops:
    """One forward pass over one sequence of `length` tokens.

    Args:
        attention_density: share of the `length` x `length` attention scores that is computed.

    Raises:
        ValueError: `live` names a weight that the architecture does not have, or more live weights than it holds.
    """
    linears, head = _live_weights(arch, live)
    scores = arch.layers * arch.heads * length**2 * attention_density
    return Flops(
        convention,
        linears=2.0 * linears * length,
        head=2.0 * head * length if arch.head_counted else 0.0,
        attention=4.0 * arch.head_dim * scores,
        softmax=3.0 * scores if convention == "spdf" else 0.0,
    )


def training_flops(
    arch: Architecture,
    live: Live,
    tokens: float,
    context: int,
    convention: Convention,
    attention_density: float = 1.0,
) -> Flops:
    """Forward and backward over `tokens` tokens in sequences of `context`: a step, or a whole run of fixed sparsity.

    Raises:
        ValueError: as `forward_flops`.
    """
    return forward_flops(arch, live, context, convention, attention_density) * (3 * tokens / context)


def growth_flops(arch: Architecture, live: Live, tokens: float, context: int, convention: Convention) -> Flops:
    """What one step's gradient of the dead weights costs beside `training_flops`: one of the two backward products, dense there.

    Raises:
        ValueError: as `forward_flops`.
    """
    dense, sparse = (forward_flops(arch, weights, context, convention) for weights in ({}, live))
    extra = Flops(convention, linears=dense.linears - sparse.linears, head=dense.head - sparse.head)
    return extra * (tokens / context)


def finetuning_flops(arch: Architecture, sequences: float, convention: Convention, length: int = 512) -> Flops:
    """Dense fine-tuning on `sequences` sequences seen (epochs included), padded to `length` as SPDF counts them."""
    return forward_flops(arch, 1.0, length, convention) * (3 * sequences)


@dataclass(frozen=True)
class Savings:
    """Dense against counted FLOPs of one run. Reductions are dense / counted: 2 means half the FLOPs."""

    dense: Flops
    counted: Flops
    finetuning: Flops | None = None
    growth: Flops | None = None
    """Of the dense gradients that growing weights looks at; not part of `counted`."""

    @property
    def reduction(self) -> float:
        """Of pre-training alone."""
        return self.dense.total / self.counted.total

    @property
    def reduction_without_head(self) -> float:
        """Of pre-training alone, the head left out of both sides."""
        return (self.dense.total - self.dense.head) / (self.counted.total - self.counted.head)

    @property
    def reduction_with_growth(self) -> float:
        """Of pre-training alone, the dense gradients of topology updates counted too."""
        return self.dense.total / (self.counted.total + (self.growth.total if self.growth else 0.0))

    def to_dict(self) -> dict[str, float | str]:
        """The figures to report; ``reduction_end_to_end`` adds the dense fine-tuning to both sides (SPDF's table 2)."""
        assert self.dense.convention == self.counted.convention
        figures: dict[str, float | str] = {
            "convention": self.dense.convention,
            "dense": self.dense.total,
            "counted": self.counted.total,
            "reduction": self.reduction,
            "reduction_without_head": self.reduction_without_head,
            "updates": self.growth.total if self.growth else 0.0,
            "reduction_with_updates": self.reduction_with_growth,
        }
        if self.finetuning is not None:
            dense, counted = self.dense + self.finetuning, self.counted + self.finetuning
            figures |= {"finetuning": self.finetuning.total, "reduction_end_to_end": dense.total / counted.total}
        return figures


def savings(
    arch: Architecture,
    live: Live,
    tokens: float,
    context: int,
    convention: Convention,
    finetuning_sequences: float | None = None,
) -> Savings:
    """Pre-training at a fixed sparsity against dense, and optionally with SPDF's dense fine-tuning after it.

    Raises:
        ValueError: as `forward_flops`.
    """
    return Savings(
        dense=training_flops(arch, 1.0, tokens, context, convention),
        counted=training_flops(arch, live, tokens, context, convention),
        finetuning=None if finetuning_sequences is None else finetuning_flops(arch, finetuning_sequences, convention),
    )


_PARTS = ("counted", "dense", "growth", "executed", "teacher")


@dataclass
class Ledger:
    """FLOPs so far, added step by step, so that a sparsity that changes over training is counted as it was."""

    convention: Convention
    dense: Flops = field(init=False)
    counted: Flops = field(init=False)
    executed: Flops = field(init=False)
    growth: Flops = field(init=False)
    teacher: Flops = field(init=False)

    def __post_init__(self) -> None:
        self.dense = self.counted = self.executed = self.growth = self.teacher = Flops(self.convention)

    def add(
        self,
        counted: Flops,
        dense: Flops,
        growth: Flops | None = None,
        executed: Flops | None = None,
        teacher: Flops | None = None,
    ) -> None:
        """Some steps: what they cost with their zeros skipped, what the dense model would have cost, growth gradients, what the
        kernels computed (None: every zero was multiplied), and a teacher's forward passes, which are in none of the others."""
        self.dense, self.counted = self.dense + dense, self.counted + counted
        self.executed = self.executed + (dense if executed is None else executed)
        if growth is not None:
            self.growth = self.growth + growth
        if teacher is not None:
            self.teacher = self.teacher + teacher

    def savings(self) -> Savings:
        return Savings(self.dense, self.counted, growth=self.growth)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint; JSON keeps them exactly."""
        return {part: asdict(getattr(self, part)) for part in _PARTS}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        ledger = cls(state["dense"]["convention"])
        ledger.add(**{part: Flops(**state[part]) for part in _PARTS if part in state})
        return ledger


def _live_weights(arch: Architecture, live: Live) -> tuple[float, float]:
    """Live weights of all linears, and of the head."""
    size = sum(map(prod, arch.linears.values()))
    head = arch.vocab * arch.width
    if not isinstance(live, Mapping):
        if not 0 <= live <= 1:
            raise ValueError(f"Expected a density in [0, 1]. Got {live}. Pass 1 - sparsity, or live counts by name.")
        return live * size, (live if arch.head_sparse else 1.0) * head
    whole = {**{name: prod(shape) for name, shape in arch.linears.items()}, arch.head: head}
    for name, count in live.items():
        if name in arch.lookups:
            continue
        if not 0 <= count <= whole.get(name, -1):
            raise ValueError(
                f"Expected live counts of the weights that the model multiplies, such as {next(iter(whole))}. "
                f"Got {count} for {name!r}, which holds {whole.get(name, 'no weights here')}. Use the parameter names."
            )
    return sum(live.get(name, whole[name]) for name in arch.linears), live.get(arch.head, head)
