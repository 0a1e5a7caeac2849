"""Packed buffers train the same bits as whole ones, whatever the ranks, and send fewer bytes."""

import math
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from raysparse.kernels.bits import unpack
from raysparse.sparsity.topology import Topology
from raysparse.train import loop, shard
from raysparse.train.exchange import WORTH, Choice, Layout
from raysparse.train.interval import Interval
from raysparse.train.loop import forward_backward, save, update
from raysparse.train.shard import FSDP2, ShardingConfig
from raysparse.train.state import State
from tests.ranks import spawn
from tests.train.steps import SPARSE, assemble, differences, history, run, snapshot
from tests.train.test_evolving import METHODS

EVOLVING = {"length": 24, "sequences": 6, "micro": 3}
TRAINING = {"length": 7, "sequences": 12, "micro": 2, "validate_every": 7, "validation_sequences": 5}


def sections(packed, **more):
    found = {"training": TRAINING, "sharding": {"packed": packed}}
    for name, section in more.items():
        found[name] = found.get(name, {}) | section
    return found


WAYS = {
    "float32": {},
    "bfloat16": {"run": {"precision": "bfloat16"}},
    "kept gathered": {"sharding": {"reshard_after_forward": False}},
    "accumulated": {"training": {"micro": 1}},
    "recomputed": {"training": {"activation_checkpointing": True}},
    "dense moments": {"optimizer": {"state": "dense"}},
}


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("way", WAYS)
def test_the_same_bits(tmp_path, way, ranks):
    whole, packed = (spawn(run, ranks, str(tmp_path / mode), sections(mode, **WAYS[way]), SPARSE) for mode in ("off", "on"))
    for one, other in zip(whole, packed, strict=True):
        assert differences(one, other) == []
        assert other["sent"] < 0.75 * one["sent"]  # of this small model embeddings are half


@pytest.mark.slow
def test_compiled_blocks(tmp_path):
    found = (spawn(run, 2, str(tmp_path / mode), sections(mode, training={"compile": True}), SPARSE) for mode in ("off", "on"))
    for one, other in zip(*found, strict=True):
        assert differences(one, other) == []
        assert other["sent"] < 0.75 * one["sent"]


def resumed(folder, mode):
    """A run that dies in step 5 and goes on from step 4 with the other way of sending."""
    more = {"checkpoint": {"every": "2 steps"}}
    run(folder, sections(mode, **more), SPARSE, 5)
    return run(folder, sections({"on": "off", "off": "on"}[mode], **more), SPARSE)


def test_a_run_goes_on_with_the_other_way(tmp_path):
    straight = spawn(run, 2, str(tmp_path / "straight"), sections("off"), SPARSE)
    for mode in ("on", "off"):
        for one, other in zip(straight, spawn(resumed, 2, str(tmp_path / mode), mode), strict=True):
            assert differences(one, other) == []


@pytest.mark.parametrize("replicas", [2, 4])
def test_with_replicas(tmp_path, replicas):
    whole, packed = (spawn(run, 4, str(tmp_path / mode), sections(mode, sharding={"replicas": replicas}), SPARSE) for mode in ("off", "on"))
    for one, other in zip(whole, packed, strict=True):
        assert differences(one, other) == []
        assert other["sent"] < 0.75 * one["sent"]


@pytest.mark.parametrize(
    ("method", "ranks", "way"),
    [*((method, 3, {}) for method in METHODS), ("rigl", 4, {"sharding": {"replicas": 2}}), ("mst", 3, WAYS["bfloat16"])],
    ids=[*METHODS, "replicas", "bfloat16"],
)
def test_where_masks_evolve(tmp_path, method, ranks, way):
    """Gradients that growth looks at arrive whole, and buffers follow the new masks."""
    more = {"training": EVOLVING} | way
    whole, packed = (spawn(run, ranks, str(tmp_path / mode), sections(mode, **more), METHODS[method]) for mode in ("off", "on"))
    for one, other in zip(whole, packed, strict=True):
        assert differences(one, other) == []
        assert other["sent"] < one["sent"]


def test_fewer_rows_than_ranks(tmp_path):
    """Of 3 rows 4 ranks hold one or none."""
    narrow = {"model": {"preset": "debug", "overrides": {"n_embd": 3, "n_head": 1, "n_layer": 2, "vocab_size": 101}}}
    whole, packed = (spawn(run, 4, str(tmp_path / mode), sections(mode, **narrow), SPARSE) for mode in ("off", "on"))
    for one, other in zip(whole, packed, strict=True):
        assert differences(one, other) == []


def dead_gradients(folder):
    """Largest dead and live gradient that arrives, of a step whose dead gradients are asked for and of one where they are not."""
    t, _ = assemble(folder, sections("on"), SPARSE)
    found = []
    for whole in (False, True):
        t.sharded.begin(whole)
        begin, t.sharded.begin = t.sharded.begin, lambda _: None
        forward_backward(t, 0)
        t.sharded.begin = begin
        gradients = t.sharded.collect()
        masks = t.topology.masks
        found.append([max(float(gradients[name][masks[name] == kind].abs().max()) for name in masks) for kind in (False, True)])
        t.sharded.zero_grad()
    return found


def test_dead_gradients_arrive_only_when_asked_for(tmp_path):
    for without, with_them in spawn(dead_gradients, 2, str(tmp_path)):
        assert without[0] == 0 < without[1]
        assert with_them[0] > 0
        assert with_them[1] == without[1]


def counted(folder, mode):
    """Bytes sent in two steps, and what whole buffers would have been."""
    t, _ = assemble(folder, sections(mode), SPARSE)
    for step in range(2):
        forward_backward(t, step)
        update(t, step)
    return t.sharded.wire.bytes_sent, t.sharded.wire.dense_bytes, t.sharded.wire.seconds


def test_validation_is_not_counted(tmp_path):
    """Nor what it sends; and it leaves nothing gathered that a step would gather."""
    often, seldom = (
        spawn(run, 2, str(tmp_path / f"every {every}"), sections("on", training={"validate_every": every}), SPARSE) for every in (1, 7)
    )
    for one, other in zip(often, seldom, strict=True):
        assert one["sent"] > other["sent"] > other["state"]["bytes_sent"]
        for key in ("bytes_sent", "dense_bytes"):
            assert one["state"][key] == other["state"][key]


def counts_after_resuming(folder):
    rank = dist.get_rank()
    t, _ = assemble(folder, sections("on"), SPARSE)
    save(t, State(step=1), Interval(t, State(bytes_sent=10 * rank, dense_bytes=10 - rank)))
    t.checkpointer.wait()
    _, state = assemble(folder, sections("on"), SPARSE)
    grown = state.bytes_sent - t.sharded.wire.bytes_sent, state.dense_bytes - t.sharded.wire.dense_bytes
    return *grown, state.memory_bytes["weights"], t.memory()["weights"]


def test_a_resumed_run_goes_on_from_the_largest_counts(tmp_path):
    told = spawn(counts_after_resuming, 2, str(tmp_path))
    assert [one[:3] for one in told] == [(10, 10, max(one[3] for one in told))] * 2


def in_another_order(folder):
    in_buffer, shard._in_buffer = shard._in_buffer, lambda unit: in_buffer(unit)[::-1]
    t, _ = assemble(folder, sections("on"), SPARSE)
    shard._in_buffer = in_buffer
    try:
        forward_backward(t, 0)
    except RuntimeError as error:
        return str(error)


def test_a_buffer_of_another_order_is_refused(tmp_path):
    for said in spawn(in_another_order, 2, str(tmp_path)):
        assert "Set sharding.packed=off" in said


def test_bytes_are_counted_beside_those_of_whole_buffers(tmp_path):
    for (sent, dense, seconds), (off, of_off, _) in zip(
        spawn(counted, 2, str(tmp_path / "on"), "on"), spawn(counted, 2, str(tmp_path / "off"), "off"), strict=True
    ):
        assert sent < dense == off == of_off
        assert seconds > 0


class Gated(nn.Module):
    """A parameter of its own beside a child's, which FSDP2 puts into its buffer in another order than ``parameters()``; one has no use."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(9, 6))
        self.inner = nn.Linear(6, 9)
        self.idle = nn.Linear(6, 5)

    def forward(self, x):
        return self.inner(x) * (x @ self.gate.t()).sigmoid()


def gated(whole_gradients):
    """Output and gradients of whole buffers and of packed ones, in a module whose weights are all sparse."""
    torch.manual_seed(0)
    found = []
    for mode in ("off", "on"):
        torch.manual_seed(0)
        block = Gated()
        sharded = FSDP2(nn.Sequential(block), {"0": block}, ShardingConfig(packed="on"), "cpu", torch.float32)
        shapes = {name: tuple(p.shape) for name, p in sharded.parts.items() if len(p.shape) == 2}
        masks = {name: torch.rand(shape) < 0.3 for name, shape in shapes.items()}
        rows = {name: sharded.parts[name].rows for name in shapes}
        local = {name: mask[rows[name].first : rows[name].first + rows[name].count] for name, mask in masks.items()}
        topology = Topology(shapes, rows, local)
        topology.kill(sharded.local)
        sharded.follow(topology, {name: int(mask.sum()) for name, mask in masks.items()})
        assert any(exchange.layout is not None for exchange, _ in sharded._units)
        sharded.choice = Choice(mode, float)
        sharded.begin(whole_gradients)
        y = sharded.module(torch.randn(4, 6))
        y.square().sum().backward()
        gradients = sharded.collect()
        topology.kill(gradients)
        found.append([y.detach(), *(gradient.clone() for gradient in gradients.values())])
    return [bool(torch.equal(a, b)) for a, b in zip(*found, strict=True)], [float(x.abs().sum()) for x in found[1]]


@pytest.mark.parametrize("whole_gradients", [False, True])
def test_any_order_of_parameters_and_idle_ones(whole_gradients):
    for equal, sizes in spawn(gated, 2, whole_gradients):
        assert all(equal)
        assert sizes[0] > 0
        assert sum(size > 0 for size in sizes[1:]) == 3  # gate, inner.weight, inner.bias


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_layouts_are_rows_padded_alike(num_ranks):
    shapes = {"weight": (7, 5), "bias": (7,), "other": (3, 2)}
    generator = torch.Generator().manual_seed(0)
    masks = {name: torch.rand(shapes[name], generator=generator) < 0.4 for name in ("weight", "other")}
    layout = Layout(shapes, masks, num_ranks)
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, mask in masks.items():
        values[name] *= mask
    widths = []
    for rank in range(num_ranks):
        flat = []
        for value in values.values():
            here = -(-len(value) // num_ranks)
            part = value[rank * here : (rank + 1) * here].flatten()
            flat += [part, torch.zeros(here * math.prod(value.shape[1:]) - part.numel())]
        flat = torch.cat(flat)
        assert layout.length == flat.numel()
        packed, again = torch.full((layout.width,), torch.nan), torch.full_like(flat, torch.nan)
        layout.pack(flat, rank, packed)
        layout.unpack(packed, rank, again)
        assert torch.equal(flat, again)
        widths.append(layout.live[rank].nnz)
    assert layout.width == max(widths)
    assert sum(widths) == 7 + sum(int(mask.sum()) for mask in masks.values())


def test_a_buffer_of_another_length_is_refused():
    layout = Layout({"weight": (2, 4)}, {"weight": unpack(torch.tensor([[1], [2]], dtype=torch.uint8), 4)}, 2)
    with pytest.raises(ValueError, match="5 elements for 4"):
        layout.pack(torch.zeros(5), 0, torch.zeros(1))


# --- the choice -------------------------------------------------------------------------------------------------------


def steps(choice, seconds, count):
    """What is said in so many steps that take ``seconds[packed]``, and in which buffers were packed."""
    said, ways = [], []
    for _ in range(count):
        ways.append(choice.packed)
        said.append(choice.took(seconds[choice.packed]))
    return [text for text in said if text], ways


@pytest.mark.parametrize(("packed", "verb"), [(1.0, "packed"), (1.95, "whole"), (3.0, "whole")])
def test_auto_measures_and_says(packed, verb):
    choice = Choice("auto", lambda seconds: seconds)
    choice.at(0.25)
    said, ways = steps(choice, {True: packed, False: 2.0}, 4 + 2 * Choice.TURNS)
    assert said == [f"sharding: buffers are sent {verb}: a step took {packed:.3g} s packed, 2 s whole (sharding.packed=auto)"]
    assert ways == [False, *[False, True] * Choice.TURNS, *[verb == "packed"] * 3]
    measured = {"density": 0.2, "packed_seconds": packed, "whole_seconds": 2.0, "packed": verb == "packed"}
    assert choice.facts() == {"mode": "auto", "measured": [measured]}


def test_where_nothing_is_packed_nothing_is_measured():
    choice = Choice("auto", lambda seconds: seconds)
    assert steps(choice, {True: 1.0, False: 2.0}, 10) == ([], [False] * 10)  # a dense run, whose masks nobody follows
    choice.at(0.5)
    assert len(steps(choice, {True: 1.0, False: 2.0}, 10)[0]) == 1
    choice.at(None)
    assert steps(choice, {True: 1.0, False: 2.0}, 3) == ([], [False] * 3)


def test_every_density_is_measured_once():
    choice = Choice("auto", lambda seconds: seconds)
    choice.at(0.25)
    choice.at(0.24)  # an update to as many: no step is left out for it
    assert choice._rest == 1
    choice._rest = 0
    choice.at(0.24)
    assert choice._rest == 0
    for density, expected in ((0.25, 1), (0.5, 1), (0.22, 0)):
        choice.at(density)
        assert len(steps(choice, {True: 1.0, False: 2.0}, 10)[0]) == expected
        assert choice.packed


def test_the_slowest_rank_decides():
    choice = Choice("auto", lambda seconds: 5.0 if seconds == 1.0 else seconds)
    choice.at(0.25)
    steps(choice, {True: 1.0, False: 2.0}, 10)
    assert not choice.packed


def timed(folder, mode, slow):
    """A run whose steps that are `slow` (packed or not) take 9 s longer by rank 1's clock, and the others 5 s longer by rank 0's.

    Adds the bytes of all steps but the last, and what was chosen.
    """
    t, state = assemble(folder, sections(mode, training={"length": 13, "validate_every": 13}), SPARSE)
    begin, late, sent = t.sharded.begin, 0, []

    def begin_late(dense_gradient):
        nonlocal late
        late += (0, 9)[dist.get_rank()] if t.sharded.choice.packed == slow else (5, 0)[dist.get_rank()]
        sent.append(t.sharded.wire.bytes_sent)
        begin(dense_gradient)

    t.sharded.begin, loop.time = begin_late, SimpleNamespace(perf_counter=lambda: time.perf_counter() + late)
    loop.train(t, state)
    steps = [after - before for before, after in pairwise(sent)]
    return snapshot(t) | {"history": history(folder), "steps": steps, "facts": t.sharded.choice.facts()}


def test_all_ranks_send_as_the_slowest_measures(tmp_path):
    """Here rank 0 alone would choose the other way, and so disagree."""
    whole, packed = (spawn(timed, 2, str(tmp_path / mode), mode, True) for mode in ("off", "on"))
    for slow, verb in ((True, "whole"), (False, "packed")):
        found = spawn(timed, 2, str(tmp_path / verb), "auto", slow)
        ways = [False, *[False, True] * Choice.TURNS, *[not slow] * 3]
        for one, other, auto in zip(whole, packed, found, strict=True):
            assert differences(one, auto) == []
            assert auto["steps"] == [b if way else a for way, a, b in zip(ways, one["steps"], other["steps"], strict=True)]
            assert auto["facts"] == found[0]["facts"]
        assert f"sharding: buffers are sent {verb}" in (tmp_path / verb / "console.txt").read_text()
    assert max(packed[0]["steps"]) < min(whole[0]["steps"])


@pytest.mark.parametrize("mode", ["on", "off"])
def test_told_is_told(mode):
    choice = Choice(mode, lambda seconds: seconds)
    choice.at(0.25)
    said, ways = steps(choice, {True: 1.0, False: 2.0}, 9)
    assert said == []
    assert ways == [mode == "on"] * 9


def test_too_little_to_leave_out_is_sent_whole(tmp_path):
    assert WORTH == 0.9
    whole, packed = (spawn(run, 2, str(tmp_path / mode), sections(mode), {"target": 0.05}) for mode in ("off", "on"))
    assert [one["sent"] for one in packed] == [one["sent"] for one in whole]


def skewed(folder):
    """The layouts that are kept where all live weights are in rank 0's rows."""
    t, _ = assemble(folder, sections("on"), SPARSE)
    first = {name: torch.full_like(mask, dist.get_rank() == 0) for name, mask in t.topology.masks.items()}
    t.topology.replace(first, first)
    t.follow()
    forward_backward(t, 0)
    return [exchange.layout for exchange, _ in t.sharded._units]


def test_padding_to_a_full_rank_is_sent_whole(tmp_path):
    """Half of the elements live; but one rank has all of its own, and the other is padded to as many."""
    for layouts in spawn(skewed, 2, str(tmp_path)):
        assert set(layouts) == {None}
