"""Passes over all sparse weights of a model, one thread: exact selections as the engine makes them, and steps of AdamW."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Ratio, interleave
from benchmarks.updates import DROP, SPARSITY, evolving
from raysparse.kernels import adamw
from raysparse.kernels.live import Live
from raysparse.sparsity.agenda import Agenda
from raysparse.sparsity.evolve import first_topology, propose
from raysparse.sparsity.ranks import ALONE
from raysparse.sparsity.topology import Rows, Topology

TIMES_TOPK = 0.2
"""Bound: a selection over torch.topk of as many. An update is two selections and more."""
TIMES_FUSED = {"native": None, "native, masked": 1.1, "native, live weights alone": 1.0}
"""Bounds: a step over torch's fused AdamW."""


def shapes_of(layers: int, width: int) -> dict[str, tuple[int, int]]:
    """The sparse weights of a GPT-2."""
    sizes = {"qkv": (3 * width, width), "out": (width, width), "up": (4 * width, width), "down": (width, 4 * width)}
    return {f"{layer}.{name}": shape for layer in range(layers) for name, shape in sizes.items()}


def selections(layers: int, width: int, rounds: int) -> dict[str, Any]:
    """CPU seconds of first topologies and of whole updates, and their ratios to torch.topk of as many scores.

    torch.topk is given magnitudes, no eligibility and no mask to write: less than is asked of ours.
    """
    shapes, random = shapes_of(layers, width), torch.Generator().manual_seed(0)
    rows = {name: Rows(0, *shape) for name, shape in shapes.items()}
    values, gradients = ({name: torch.randn(shape, generator=random) for name, shape in shapes.items()} for _ in range(2))
    scores = [value.abs().flatten() for value in values.values()]
    pruning = Agenda.check(
        {
            "sparsity": {"target": SPARSITY, "evolution": {"type": "one_shot"}},
            "shapes": shapes,
            "steps": 10,
            "tokens_per_step": 1,
            "seed": 0,
        }
    )
    best, drawn = (partial(first_topology, agenda, rows, values, ALONE) for agenda in (pruning, evolving("set", shapes)))
    _check(best().masks, values)
    topology = drawn()
    topology.kill(values)
    contestants: dict[str, Callable[[], object]] = {
        "topk, 25 %": partial(_topk, scores, 1 - SPARSITY),
        "topk, kept and grown": lambda: [_topk(scores, share * (1 - SPARSITY)) for share in (1 - DROP, DROP)],
        "magnitudes": best,
        "random": drawn,
        "SET": partial(_update, "set", topology, values, gradients),
        "RigL": partial(_update, "rigl", topology, values, gradients),
    }
    times = interleave({name: partial(_ignoring_index, function) for name, function in contestants.items()}, rounds, warm=True)
    claims = [
        ("the largest magnitudes live", "magnitudes", "topk, 25 %"),
        ("drawn at random", "random", "topk, 25 %"),
        ("update: kept by magnitude, grown at random", "SET", "topk, kept and grown"),
        ("update: kept by magnitude, grown by gradient", "RigL", "topk, kept and grown"),
    ]
    ratios = [
        {
            "what": what,
            "contestant": ours,
            "over": theirs,
            "at_most": None if "update" in what else TIMES_TOPK,
            "ratio": Ratio.of(times[ours], times[theirs]),
        }
        for what, ours, theirs in claims
    ]
    return {"weights": sum(map(prod, shapes.values())), "layers": len(shapes), "cpu_seconds": times, "ratios": ratios}


def optimizers(layers: int, width: int, rounds: int) -> dict[str, Any]:
    """CPU seconds of a step of AdamW, and their ratios to torch's fused one; masks are 75 % sparse, dead gradients 0 for all."""
    random = torch.Generator().manual_seed(0)
    parameters, masks = [], []
    for shape in shapes_of(layers, width).values():
        masks.append(torch.rand(shape, generator=random) >= SPARSITY)
        parameters.append(nn.Parameter(0.02 * torch.randn(shape, generator=random) * masks[-1]))
        parameters[-1].grad = torch.randn(shape, generator=random) * masks[-1]
    live = {parameter: Live(mask) for parameter, mask in zip(parameters, masks, strict=True)}
    native, masked, alone = (adamw.AdamW(parameters, lr=1e-4) for _ in range(3))
    for optimizer in (masked, alone):
        optimizer.set_masks(live)
    for parameter, which in live.items():
        moments = {name: torch.zeros(which.nnz) for name in adamw.MOMENTS}
        alone.state[parameter] = {"step": torch.zeros(()), **moments}
    steps = {
        "torch, fused": torch.optim.AdamW(parameters, lr=1e-4, fused=True),
        "native": native,
        "native, masked": masked,
        "native, live weights alone": alone,
    }
    times = interleave({name: partial(_ignoring_index, optimizer.step) for name, optimizer in steps.items()}, rounds)
    ratios = [
        {
            "what": "AdamW",
            "contestant": name,
            "over": "torch, fused",
            "at_most": bound,
            "ratio": Ratio.of(times[name], times["torch, fused"]),
        }
        for name, bound in TIMES_FUSED.items()
    ]
    return {"weights": sum(p.numel() for p in parameters), "layers": len(parameters), "cpu_seconds": times, "ratios": ratios}


def _topk(scores: Sequence[Tensor], share: float) -> list[Tensor]:
    return [score.topk(round(share * score.numel()), sorted=False).indices for score in scores]


def _update(rule: str, topology: Topology, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    agenda = evolving(rule, topology.shapes)
    return propose(agenda, agenda.decide(1), topology, topology.nnz(ALONE), values, gradients, ALONE).masks


def _check(masks: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Assert that these are the largest quarter."""
    for name, mask in masks.items():
        assert int(mask.sum()) == round((1 - SPARSITY) * mask.numel()), name
        assert values[name][mask].abs().min() >= values[name][~mask].abs().max(), name


def _ignoring_index(function: Callable[[], object], index: int) -> None:
    function()
