"""Runs without training: the topology core driven through every rule and pattern, for the tests of `sparsity.evolve`."""

from typing import get_args

import torch

from raysparse.length import Scale
from raysparse.sparsity import counter
from raysparse.sparsity.agenda import Agenda
from raysparse.sparsity.evolution import AnyEvolution
from raysparse.sparsity.evolve import first_topology, propose
from raysparse.sparsity.pattern import NM, Block, Unstructured
from raysparse.sparsity.plan import SparsityConfig
from raysparse.sparsity.ranks import ALONE
from raysparse.sparsity.topology import Rows

RULES = {kind.model_fields["type"].default: kind for kind in get_args(get_args(AnyEvolution)[0])}
BLOCKS = [Block(size=size, fan_in=fan_in) for size in ("4x2", 4, 16, 32, 64, 128) for fan_in in ("free", "constant")]
PATTERNS = [Unstructured(), NM(n=2, m=4), NM(n=4, m=8), NM(n=1, m=4), *BLOCKS]

UP = {"type": "polynomial"}
DOWN = {"type": "polynomial", "start": 1, "end": 0.25, "mirrored": True}


def title(value):
    if isinstance(value, NM):
        return f"{value.n}:{value.m}"
    return f"block {value.size} {value.fan_in}" if isinstance(value, Block) else getattr(value, "type", str(value))


def shapes_of(pattern):
    """Rows of units that neither 2 nor 3 divides, and a layer with fewer of them than there are ranks; less of large blocks."""
    rows, cols = pattern.unit[0], getattr(pattern, "m", pattern.unit[1])
    if rows > 32:
        return {"a": (rows, 4 * cols), "b": (2 * rows, 3 * cols)}
    wide = 4 * cols if rows == 4 else cols
    return {"a": (7 * rows, 4 * wide), "b": (5 * rows, 8 * wide), "c": (2 * rows, 5 * wide)}


def agenda_of(kind, pattern, shapes=None, steps=20, **rule):
    """Rising, constant and falling sparsity where the rule can, else what it can; updates every 2 steps."""
    settings = {"type": kind, **rule}
    if "update_interval" in RULES[kind].model_fields:
        settings = {"update_interval": 2, "stop": "100 %"} | settings
    updates = len(RULES[kind].model_validate(settings).offsets(Scale(1, None, steps)))
    if RULES[kind].can_grow:
        timeline = [{"length": "35 %", "sparsity": UP}, {"length": "30 %"}, {"length": "35 %", "sparsity": DOWN}]
    elif updates > 1:
        timeline = [{"length": "70 %", "sparsity": UP}, {"length": "30 %"}]
    elif updates == 1:
        timeline = [{"length": "30 %", "sparsity": {"type": "constant", "value": 0}, "evolution": {"type": "static"}}, {"length": "70 %"}]
    else:
        timeline = [{}]
    target = 1 - pattern.n / pattern.m if isinstance(pattern, NM) else 0.6
    given = settings["type"] == "zeros"  # its checkpoint says how many live
    distribution = {"type": "er" if pattern == Unstructured() and not given else "uniform"}
    sparsity = {"target": target, "distribution": distribution, "pattern": pattern, "evolution": settings, "timeline": timeline}
    return Agenda(sparsity=SparsityConfig.check(sparsity), shapes=shapes or shapes_of(pattern), steps=steps, tokens_per_step=1, seed=3)


class Walk:
    """A run on one rank without its training: between updates the weights move at random."""

    def __init__(self, agenda, rank=0, world_size=1, ranks=ALONE, dtype=torch.float32, device="cpu"):
        self.agenda, self.ranks, self.dtype, self.device = agenda, ranks, dtype, device
        self.rows = {}
        for name, (rows, cols) in agenda.shapes.items():  # equally many on all ranks but the last ones, as FSDP has it
            side = agenda.sparsity.pattern.unit[0]
            each = -(-rows // side // world_size) * side
            first = min(rank * each, rows)
            self.rows[name] = Rows(first, min(first + each, rows) - first, cols)
        self.values = self.drawn("values")
        self.topology = first_topology(agenda, self.rows, self.values, ranks)
        self.topology.kill(self.values)
        self.live = self.topology.nnz(ranks)

    def drawn(self, what):
        """This rank's rows of normal numbers that grow from row to row, the same for the same `what`."""
        found = {}
        for name, shape in self.agenda.shapes.items():
            generator = torch.Generator().manual_seed(counter.key(what, name) & 0xFFFF)
            whole = torch.randn(shape, generator=generator) * torch.linspace(0.2, 1.8, shape[0]).unsqueeze(1)
            found[name] = whole[self.rows[name].first :][: self.rows[name].count].to(self.device, self.dtype)
        return found

    def updates(self):
        """(update, gradients, proposal) of each; the topology and the weights are still as before it."""
        for step in self.agenda.update_steps:
            update = self.agenda.decide(step)
            for name, moved in self.drawn(f"moves {step}").items():
                self.values[name] += 0.5 * moved * self.topology.masks[name]
            gradients = self.drawn(f"gradients {step}")
            proposal = propose(self.agenda, update, self.topology, self.live, self.values, gradients, self.ranks)
            yield update, gradients, proposal
            self.commit(update, proposal)

    def commit(self, update, proposal):
        self.topology.evolve(proposal.masks)
        self.topology.kill(self.values)
        self.live = dict(update.nnz)

    def history(self):
        """The masks of every version."""
        return [self.topology.masks, *(proposal.masks for _, _, proposal in self.updates())]


def check_masks(masks, nnz, agenda):
    """Bool, as many as planned, and of the pattern's grain."""
    pattern = agenda.sparsity.pattern
    height, width = pattern.unit
    assert {name: int(mask.sum()) for name, mask in masks.items()} == nnz
    for name, mask in masks.items():
        assert (mask.dtype, tuple(mask.shape)) == (torch.bool, agenda.shapes[name])
        rows, cols = pattern.units(mask.shape)
        units = mask.view(rows, height, cols, width).sum((1, 3))
        assert set(units.unique().tolist()) <= {0, height * width}
        if groups := pattern.num_groups(mask.shape):
            size = rows * cols // groups
            assert set((units.view(-1, size) > 0).sum(1).tolist()) == {nnz[name] // pattern.size_of_unit // groups}
