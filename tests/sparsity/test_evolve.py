"""One contract for every rule and pattern: exact, of the pattern's grain, and the same however the rows are spread."""

from fractions import Fraction as F
from math import floor

import pytest
import torch

from raysparse.kernels import library
from raysparse.sparsity import evolve
from raysparse.sparsity.agenda import Agenda
from raysparse.sparsity.evolve import first_topology, propose
from raysparse.sparsity.pattern import NM, Block, Unstructured
from raysparse.sparsity.plan import SparsityConfig
from raysparse.sparsity.ranks import ALONE
from raysparse.sparsity.topology import Rows, Topology
from tests.ranks import spawn
from tests.sparsity.walk import PATTERNS, RULES, UP, Walk, agenda_of, check_masks, title
from tests.threads import together


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=title)
def test_contract(kind, pattern):
    agenda = agenda_of(kind, pattern)
    walk = Walk(agenda)
    check_masks(walk.topology.masks, agenda.plan(0), agenda)
    changed = 0
    for update, _, proposal in walk.updates():
        before, masks = walk.topology.masks, proposal.masks
        check_masks(masks, agenda.plan(update.version), agenda)
        assert list(masks) == list(agenda.shapes)
        assert proposal.dropped.keys() == proposal.grown.keys()
        for name, dropped in proposal.dropped.items():
            grown, kept = proposal.grown[name], before[name] & ~dropped
            assert dropped.dtype == grown.dtype == torch.bool
            assert not (dropped & ~before[name]).any()
            assert not (grown & kept).any()
            assert torch.equal(masks[name], kept | grown)
            n, area = int(before[name].sum()), pattern.size_of_unit
            drop = max(floor(F(str(update.drop_fraction)) * (n // area)) * area, n - int(masks[name].sum()))
            assert int(dropped.sum()) == drop
            changed += int((masks[name] & ~before[name]).sum())
        untouched = set(agenda.shapes) - set(proposal.dropped)
        assert all(masks[name] is before[name] for name in untouched)
        sums = [walk.topology.digest_sums(which) for which in (before, proposal.dropped, proposal.grown, masks)]
        assert torch.equal(sums[0] - sums[1] + sums[2], sums[3])
    assert bool(changed) == RULES[kind].can_grow
    assert bool(agenda.update_steps) == (kind not in ("static", "zeros"))


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("pattern", [Unstructured(), NM(n=2, m=4), Block(size=16, fan_in="constant")], ids=title)
def test_nothing_is_changed_by_proposing(kind, pattern):
    agenda = agenda_of(kind, pattern)
    walk = Walk(agenda)
    for update, gradients, _ in walk.updates():
        tensors = [walk.topology.masks, walk.topology.ever, walk.values, gradients]
        copies = [{name: tensor.clone() for name, tensor in which.items()} for which in tensors]
        live = dict(walk.live)
        again = propose(agenda, update, walk.topology, walk.live, walk.values, gradients, ALONE)
        assert all(torch.equal(which[name], copy[name]) for which, copy in zip(tensors, copies, strict=True) for name in copy)
        assert walk.live == live
        other = propose(agenda, update, walk.topology, walk.live, walk.values, gradients, ALONE)
        assert all(torch.equal(again.masks[name], other.masks[name]) for name in agenda.shapes)


def test_rules_without_gradients_get_none():
    walk = Walk(agenda_of("set", Unstructured()))
    update = walk.agenda.decide(2)
    assert propose(walk.agenda, update, walk.topology, walk.live, walk.values, {}, ALONE).grown


def test_magnitudes_choose_the_first_topology_of_pruning():
    for kind in ("one_shot", "gradual"):
        sparsity = SparsityConfig.check({"target": 0.5, "evolution": {"type": kind}})
        agenda = Agenda(sparsity=sparsity, shapes={"w": (2, 3)}, steps=300, tokens_per_step=1, seed=0)
        values = {"w": torch.tensor([[0.5, -3.0, 0.0], [-0.5, 0.5, 2.0]])}
        found = first_topology(agenda, {"w": Rows(0, 2, 3)}, values, ALONE)
        assert found.masks["w"].int().tolist() == [[1, 1, 0], [0, 0, 1]]  # of the three of 0.5 the first


def test_a_rule_that_only_drops_meets_a_plan_that_gives_a_layer_one_more():
    """Rounding to the largest fractions is not monotone in each layer (see test_agenda)."""
    shapes = dict.fromkeys("abcde", (7, 11)) | {"f": (3, 5)}
    sparsity = {"target": 0.8, "evolution": {"type": "gradual", "update_interval": 1}, "timeline": [{"sparsity": UP}]}
    agenda = Agenda(sparsity=SparsityConfig.check(sparsity), shapes=shapes, steps=300, tokens_per_step=1, seed=0)
    walk, grown = Walk(agenda), 0
    for update, _, proposal in walk.updates():
        assert {name: int(mask.sum()) for name, mask in proposal.masks.items()} == update.nnz
        grown += sum(int(mask.sum()) for mask in proposal.grown.values())
    assert grown > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_after_a_thousand_updates(dtype):
    """All but every tenth with nothing but ties: equal weights, zero gradients."""
    agenda = agenda_of("mixed", Unstructured(), {"a": (7, 5), "b": (13, 9)}, steps=1003, update_interval=1)
    walk = Walk(agenda, dtype=dtype)
    zeros = {name: torch.zeros(shape, dtype=dtype) for name, shape in agenda.shapes.items()}
    assert len(agenda.update_steps) == 1000
    for step in agenda.update_steps:
        update = agenda.decide(step)
        tied = step % 10 > 0
        values = {name: mask.to(dtype) for name, mask in walk.topology.masks.items()} if tied else walk.drawn(step)
        walk.topology.kill(values)
        proposal = propose(agenda, update, walk.topology, walk.live, values, zeros if tied else walk.drawn(-step), ALONE)
        walk.commit(update, proposal)
        assert walk.topology.nnz(ALONE) == agenda.plan(update.version)
    assert sum(walk.live.values()) == 129  # (1 - 0.25 * 0.6) * 152 = 129.2


def test_exact_above_two_to_the_24():
    """float32 does not hold this count, and a float32 fraction of it is 5,035,734.2."""
    shape, nnz = (2049, 8193), 16_785_779  # of 16,787,457
    sparsity = {"target": 9.9955e-5, "evolution": {"type": "rigl", "drop_decay": "constant", "drop_fraction": 0.3}}
    agenda = Agenda(sparsity=SparsityConfig.check(sparsity), shapes={"w": shape}, steps=400, tokens_per_step=1, seed=0)
    assert agenda.plan(0) == {"w": nnz}
    mask = torch.ones(shape, dtype=torch.bool)
    mask.view(-1)[: mask.numel() - nnz] = False
    topology = Topology({"w": shape}, {"w": Rows(0, *shape)}, {"w": mask})
    value = mask.to(torch.bfloat16)
    found = propose(agenda, agenda.decide(100), topology, {"w": nnz}, {"w": value}, {"w": value}, ALONE)
    assert int(found.dropped["w"].sum()) == 5_035_733  # 0.3 of it is 5,035,733.7
    assert int(found.masks["w"].sum()) == nnz


@pytest.mark.parametrize("pattern", [Unstructured(), NM(n=2, m=4), Block(size=16)], ids=title)
def test_exact_where_weights_have_diverged(pattern):
    """What is not finite cannot be compared; the run ends elsewhere, with a reason, and not here."""
    walk = Walk(agenda_of("mest", pattern, gradient_weight=0))
    for update, gradients, _ in walk.updates():
        for tensor in (walk.values["a"], gradients["a"]):
            tensor[0, :4], tensor[1, :4] = torch.nan, torch.inf
            tensor[2, :4] = -torch.inf
        proposal = propose(walk.agenda, update, walk.topology, walk.live, walk.values, gradients, ALONE)
        check_masks(proposal.masks, update.nnz, walk.agenda)


SPREAD = [Unstructured(), NM(n=2, m=4), Block(size=16), Block(size=16, fan_in="constant")]


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("pattern", SPREAD, ids=title)
def test_the_same_masks_at_any_number_of_ranks(kind, pattern):
    agenda = agenda_of(kind, pattern)
    whole = Walk(agenda).history()
    for size in (2, 3):
        parts = together(lambda rank, ranks, size=size: Walk(agenda, rank, size, ranks).history(), range(size))
        assert len(parts[0]) == len(whole) == len(agenda.update_steps) + 1
        for version, masks in enumerate(whole):
            for name, mask in masks.items():
                assert torch.equal(torch.cat([part[version][name] for part in parts]), mask), (size, version, name)
    assert size == 3
    assert parts[2][0]["c"].shape[0] == 0  # a rank without rows


def walk_here(kinds, patterns):
    """On a gloo rank: the digests of its walks."""
    import torch.distributed as dist

    from raysparse.train.process import ranks_of

    group = dist.group.WORLD
    assert group is not None
    where = dist.get_rank(), dist.get_world_size(), ranks_of(group, torch.device("cpu"))
    return [digests(Walk(agenda_of(kind, pattern), *where)) for kind in kinds for pattern in patterns]


def digests(walk):
    """Of every version."""
    topology = walk.topology
    return [topology.digest(walk.ranks), *(topology.digest(walk.ranks) for _ in walk.updates())]


def test_the_same_digests_on_gloo_ranks():
    kinds, patterns = ["mixed", "mest"], [Unstructured(), NM(n=2, m=4), Block(size=16, fan_in="constant")]
    alone = [digests(Walk(agenda_of(kind, pattern))) for kind in kinds for pattern in patterns]
    assert all(len(set(found)) > 5 for found in alone)
    for size in (2, 3):
        assert spawn(walk_here, size, kinds, patterns) == [alone] * size


@pytest.mark.parametrize("piece", [1, 7, 40])
@pytest.mark.parametrize("kind", RULES)
def test_weights_may_be_scored_any_number_at_a_time(monkeypatch, kind, piece):
    agenda = agenda_of(kind, Unstructured())
    whole = digests(Walk(agenda))
    monkeypatch.setattr(evolve, "PIECE", piece)
    assert digests(Walk(agenda)) == whole


@pytest.mark.skipif(not library.available(), reason="needs the native library")
@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("pattern", SPREAD, ids=title)
def test_the_same_digests_without_the_native_library(monkeypatch, kind, pattern):
    agenda = agenda_of(kind, pattern)
    native = digests(Walk(agenda))
    monkeypatch.setattr(library, "available", lambda: False)
    assert digests(Walk(agenda)) == native


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", ["mixed", "mest"])
@pytest.mark.parametrize("pattern", SPREAD, ids=title)
def test_the_same_digests_on_a_gpu(kind, pattern):
    agenda = agenda_of(kind, pattern)
    assert digests(Walk(agenda, device="cuda")) == digests(Walk(agenda))
