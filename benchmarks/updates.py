"""Updates of a topology to be timed: of one layer beside plain exact selections, between training steps, on several ranks."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from math import floor
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.measure import Ratio, interleave
from benchmarks.step import OPTIMIZER, Size, assemble, product
from raysparse.sparsity.agenda import Agenda
from raysparse.sparsity.evolve import Proposal, first_topology, propose
from raysparse.sparsity.manager import MaskManager
from raysparse.sparsity.ranks import ALONE
from raysparse.sparsity.topology import Topology
from raysparse.train.keeper import Keeper
from raysparse.train.optimizer import build_optimizer
from raysparse.train.shard import Replicated, Sharded

SPARSITY, DROP = 0.75, 0.3
TIMES_BEST = 2.0
"""Bound: RigL's selection in one layer over the best plain exact one."""
PERCENT = 1.5
"""Bound: an update every 100 steps, as a share of training."""
WHOLE = "RigL, Keeper.evolve"
"""The contestant that is more than a selection."""


def evolving(rule: str, shapes: Mapping[str, tuple[int, ...]]) -> Agenda:
    """An agenda with an update in every step from step 1 on, each of which drops 30 %."""
    evolution = {"type": rule, "update_interval": "1 steps", "drop_fraction": DROP, "drop_decay": "constant"}
    sparsity = {"target": SPARSITY, "evolution": evolution}
    return Agenda.check({"sparsity": sparsity, "shapes": dict(shapes), "steps": 1000, "tokens_per_step": 1, "seed": 0})


class Updates:
    """RigL's updates one after another, by a keeper: selection, audit by a manager in this process, and swap.

    Weights and gradients are drawn, not trained; two drawings take turns. A contestant of `interleave`: calling it takes, beside
    the update, about 1 ms a million weights for the other drawing.
    """

    def __init__(self, journal: Path, sharded: Sharded, optimizer: Optimizer, topology: Topology):
        self.keeper = Keeper(evolving("rigl", topology.shapes), topology, sharded, optimizer, lambda: MaskManager(journal))
        self.keeper.begin(0, "")
        self._local = {name: sharded.local[name].detach() for name in topology.masks}
        random = torch.Generator().manual_seed(dist.get_rank())
        self._drawn = [tuple({n: _normal(x, random) for n, x in self._local.items()} for _ in range(2)) for _ in range(2)]

    def __call__(self, index: int) -> None:
        self.train(index)
        self.evolve(index)

    @torch.no_grad()
    def train(self, index: int) -> None:
        """Other values for the live weights, in the place of an optimizer's."""
        values, _ = self._drawn[index % 2]
        for name, local in self._local.items():
            local.copy_(values[name])
        self.keeper.topology.kill(self._local)

    def evolve(self, index: int) -> None:
        """Update number `index`, from 0."""
        _, gradients = self._drawn[index % 2]
        change = self.keeper.evolve(index + 1, gradients)
        assert change is not None, index
        assert change.skipped is None, change.skipped


class Layer:
    """One layer's weights, gradients and masks, and who selects in it; nothing is changed.

    Attributes:
        drop: how many weights are dropped, and as many grown.
    """

    def __init__(self, topology: Topology):
        random = torch.Generator().manual_seed(0)
        self._topology, self.mask = topology, topology.masks["weight"]
        self._value, self._gradient = (_normal(self.mask, random) for _ in range(2))
        topology.kill({"weight": self._value})
        self._live = topology.nnz(ALONE)
        self.drop = floor(DROP * self._live["weight"])
        self._agendas = {rule: evolving(rule, topology.shapes) for rule in ("rigl", "mixed")}

    def ours(self, rule: str) -> Proposal:
        agenda, values, gradients = self._agendas[rule], {"weight": self._value}, {"weight": self._gradient}
        return propose(agenda, agenda.decide(1), self._topology, self._live, values, gradients, ALONE)

    def by_argpartition(self) -> Tensor:
        """numpy, of the live and of the dead set apart: what is dropped does not come back, which is less to choose from than ours."""
        value, gradient, mask = (x.numpy().ravel() for x in (self._value, self._gradient, self.mask))
        live, dead, new = np.flatnonzero(mask), np.flatnonzero(~mask), mask.copy()
        new[live[np.argpartition(np.abs(value[live]), self.drop)[: self.drop]]] = False
        new[dead[np.argpartition(np.abs(gradient[dead]), -self.drop)[-self.drop :]]] = True
        return torch.from_numpy(new)

    def by_topk(self) -> Tensor:
        """The same in plain PyTorch."""
        value, gradient, mask = (x.flatten() for x in (self._value, self._gradient, self.mask))
        live, dead, new = mask.nonzero().flatten(), (~mask).nonzero().flatten(), mask.clone()
        new[live[value[live].abs().topk(self.drop, largest=False, sorted=False).indices]] = False
        new[dead[gradient[dead].abs().topk(self.drop, sorted=False).indices]] = True
        return new

    def by_sorting(self) -> Tensor:
        """[rows, cols] RigL's update by definition, with ties to the lowest index; slow."""

        def best(score: Tensor, eligible: Tensor, count: int) -> Tensor:
            order = score.abs().masked_fill(~eligible, -1).flatten().argsort(descending=True, stable=True)[:count]
            return torch.zeros(eligible.numel(), dtype=torch.bool).index_fill_(0, order, True).view_as(eligible)

        kept = best(self._value, self.mask, self._live["weight"] - self.drop)
        return kept | best(self._gradient, ~kept, self.drop)

    def check(self) -> None:
        """Assert that all drop and grow equally many, and that ours are the best."""
        old = self.mask.flatten()
        for new in (self.by_argpartition(), self.by_topk()):
            assert int((old & ~new).sum()) == int((new & ~old).sum()) == self.drop
        for proposal in map(self.ours, self._agendas):
            assert int(proposal.dropped["weight"].sum()) == int(proposal.grown["weight"].sum()) == self.drop
            assert int(proposal.masks["weight"].sum()) == self._live["weight"]
        assert torch.equal(self.ours("rigl").masks["weight"], self.by_sorting()), "other weights than those of the definition"


def one_layer(folder: Path, shape: tuple[int, int], rounds: int) -> dict[str, Any]:
    """CPU seconds of an update of one layer, ours and plain ones, and their ratios."""
    sharded = Replicated(nn.Linear(shape[1], shape[0], bias=False), "cpu", torch.float32)
    rows, agenda = {"weight": sharded.parts["weight"].rows}, evolving("rigl", {"weight": shape})
    still, moving = (first_topology(agenda, rows, sharded.local, ALONE) for _ in range(2))
    layer = Layer(still)
    layer.check()
    whole = Updates(folder / "layer.jsonl", sharded, build_optimizer(sharded, OPTIMIZER, parity=False), moving)
    plain = {"numpy argpartition": _contestant(layer.by_argpartition), "torch topk": _contestant(layer.by_topk)}
    ours = {"RigL": _contestant(lambda: layer.ours("rigl")), "mixed": _contestant(lambda: layer.ours("mixed")), WHOLE: whole}
    times = interleave(plain | ours, rounds)
    best, other = sorted(plain, key=lambda name: median(times[name]))
    claims = [
        ("RigL's selection", "RigL", best, TIMES_BEST),
        ("the slower plain selection", other, best, None),
        ("MST's mixed selection, a quarter at random", "mixed", best, None),
        ("RigL with audit, journal and swap", WHOLE, best, None),
    ]
    ratios = [{"what": what, "contestant": a, "over": b, "at_most": c, "ratio": Ratio.of(times[a], times[b])} for what, a, b, c in claims]
    return {"shape": shape, "dropped": layer.drop, "cpu_seconds": times, "ratios": ratios}


def share(folder: Path, size: Size, rounds: int) -> dict[str, Any]:
    """CPU seconds of a training step and of an update of the same model; their ratio is the update's share in percent, at interval 100."""
    t = assemble(folder / "run", size, SPARSITY)
    assert t.topology is not None
    updates = Updates(folder / "updates.jsonl", t.sharded, t.optimizer, t.topology)
    times = interleave({"step": product(t), "update": updates}, rounds)
    what = f"{size.layers} layers of width {size.width}, {size.tokens} tokens a step, vocabulary {size.vocabulary:,}"
    percent = Ratio.of(times["update"], times["step"])
    ratio = {"what": what, "contestant": "update", "over": "100 steps", "at_most": PERCENT, "ratio": percent}
    return {"size": asdict(size), "sparse_weights": _weights(t.topology.masks), "cpu_seconds": times, "ratios": [ratio]}


def on_ranks(num_ranks: int, models: Mapping[str, Size], updates: int) -> list[dict[str, Any]]:
    """`together` on that many gloo ranks of this machine, one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (num_ranks, folder, models, updates), num_ranks)
        return torch.load(Path(folder) / "result.pt", weights_only=True)


def together(folder: Path, models: Mapping[str, Size], updates: int) -> list[dict[str, Any]]:
    """Updates of each model on the default process group, and what one of them sends; every rank calls this and learns all.

    Seconds are those of the slowest rank in each update.
    """
    found = []
    for name, size in models.items():
        t = assemble(folder / name / str(dist.get_rank()), size, SPARSITY)
        assert t.topology is not None
        ours = Updates(folder / name / "updates.jsonl", t.sharded, t.optimizer, t.topology)
        seconds = [_timed(ours, index) for index in range(updates + 1)][1:]
        with traffic() as sent:
            ours.evolve(updates + 1)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (seconds, _weights(t.topology.masks)))
        slowest = [[max(of[i][which] for of, _ in everyone) for i in range(updates)] for which in range(2)]
        found.append(
            {
                "model": name,
                "ranks": len(everyone),
                "layers": len(t.topology.masks),
                "sparse_weights": sum(weights for _, weights in everyone),
                "most_weights_on_a_rank": max(weights for _, weights in everyone),
                "cpu_seconds": slowest[0],
                "wall_seconds": slowest[1],
                "sent_bytes": sent,
            }
        )
    return found


@contextmanager
def traffic() -> Iterator[dict[str, list[int]]]:
    """Collects the bytes that this rank puts into each collective: of selections, and of decisions and votes."""
    sent: dict[str, list[int]] = {"selection": [], "control": []}

    def spied(function: Callable[..., Any], kind: str, place: int) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            sent[kind].append(args[place].nbytes)
            return function(*args, **more)

        return call

    objects = dist.distributed_c10d  # here broadcast_object_list and all_gather_object look up what they call
    spies = [(dist, "all_reduce", "selection", 0), (dist, "all_gather", "selection", 1)]
    spies += [(objects, "broadcast", "control", 0), (objects, "all_gather", "control", 1)]
    with ExitStack() as stack:
        for module, name, kind, place in spies:
            stack.enter_context(patch.object(module, name, spied(getattr(module, name), kind, place)))
        yield sent


def _contestant(function: Callable[[], object]) -> Callable[[int], None]:
    def run(index: int) -> None:
        function()

    return run


def _timed(updates: Updates, index: int) -> tuple[float, float]:
    """CPU and wall seconds of an update on this rank; all begin together."""
    updates.train(index)
    dist.barrier()
    cpu, wall = time.process_time(), time.perf_counter()
    updates.evolve(index)
    return time.process_time() - cpu, time.perf_counter() - wall


def _rank(rank: int, num_ranks: int, folder: str, models: Mapping[str, Size], updates: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks)
    found = together(Path(folder), models, updates)
    if rank == 0:
        torch.save(found, Path(folder) / "result.pt")
    dist.barrier()
    dist.destroy_process_group()


def _normal(like: Tensor, random: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=random)


def _weights(masks: Mapping[str, Tensor]) -> int:
    return sum(mask.numel() for mask in masks.values())
