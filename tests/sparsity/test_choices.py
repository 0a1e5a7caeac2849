"""Which weights go and come: against a slow scan in plain Python, against every choice there is, and by hand."""

from fractions import Fraction as F
from itertools import combinations
from math import floor

import pytest
import torch

from raysparse.sparsity import counter
from raysparse.sparsity.agenda import Agenda, TopologyUpdate
from raysparse.sparsity.evolve import _block_sums, propose
from raysparse.sparsity.pattern import Unstructured
from raysparse.sparsity.plan import SparsityConfig
from raysparse.sparsity.ranks import ALONE
from raysparse.sparsity.topology import Rows, Topology
from tests.sparsity.walk import BLOCKS, PATTERNS, RULES, Walk, agenda_of, title
from tests.threads import together


def scan(scores, eligible, count, size, room):
    """The `count` largest eligible, ties to the lowest index, at most `room` in each group of `size` (0: no groups)."""
    chosen, taken = [], dict.fromkeys(range(len(scores)), 0)
    for i in sorted(eligible, key=lambda i: (-scores[i], i)):
        group = i // size if size else 0
        if len(chosen) < count and (not size or taken[group] < room[group]):
            chosen.append(i)
            taken[group] += 1
    return set(chosen)


def unit_scores(tensor, unit):
    """Sums of absolute values over the units, exact: the tests draw small whole numbers."""
    (rows, cols), (height, width) = tensor.shape, unit
    return tensor.double().abs().view(rows // height, height, cols // width, width).sum((1, 3)).flatten().tolist()


def expected_units(agenda, update, name, before, value, grad, f):
    """(kept, grown) units of a layer, from the formula in `evolve` and the rules' papers."""
    pattern, rule = agenda.sparsity.pattern, agenda.span(update.step).rule
    unit, size = pattern.unit, pattern.group(agenda.shapes[name][1])
    w, g = unit_scores(value, unit), unit_scores(grad, unit)
    random = counter.random_keys(0, len(w), counter.key(agenda.seed, "grow", update.version, name)).tolist()
    live = {i for i, s in enumerate(unit_scores(before, unit)) if s}
    planned = update.nnz[name] // pattern.size_of_unit
    drop = max(floor(f * len(live)), len(live) - planned)
    grow = planned - (len(live) - drop)
    room = [planned // pattern.num_groups(agenda.shapes[name])] * pattern.num_groups(agenda.shapes[name]) if size else []
    keep_by = unit_scores(value.abs() + 2 * grad.abs(), unit) if rule.type == "mest" else w
    kept = scan(keep_by, live, len(live) - drop, size, room)
    grown = set()
    by_gradient = {"rigl": grow, "mixed": floor(F(3, 4) * grow)}.get(rule.type, 0)
    for score, count in ((g, by_gradient), (random, grow - by_gradient)):
        free = [room[j] - sum(i // size == j for i in kept | grown) for j in range(len(room))]
        grown |= scan(score, set(range(len(w))) - kept - grown, count, size, free)
    return kept, grown


REFERENCED = {"set": {}, "rigl": {}, "mest": {"gradient_weight": 2}, "mixed": {}, "gradual": {}, "one_shot": {}}


@pytest.mark.parametrize("kind", REFERENCED)
@pytest.mark.parametrize("pattern", [*PATTERNS[:4], *BLOCKS[:3]], ids=title)
def test_choices_against_a_scan(kind, pattern):
    """Scores of few whole numbers, so that nearly everything is tied, over rising, constant and falling plans."""
    agenda = agenda_of(kind, pattern, **REFERENCED[kind])
    walk, returned = Walk(agenda), 0
    for update, _, _ in walk.updates():
        generator = torch.Generator().manual_seed(update.step)
        gradients = {}
        for name, shape in agenda.shapes.items():
            walk.values[name] = torch.randint(-3, 4, shape, generator=generator).float() * walk.topology.masks[name]
            gradients[name] = torch.randint(-2, 3, shape, generator=generator).float()
        proposal = propose(agenda, update, walk.topology, walk.live, walk.values, gradients, ALONE)
        for name in proposal.dropped:
            before = walk.topology.masks[name]
            f = F(str(update.drop_fraction))
            kept, grown = expected_units(agenda, update, name, before, walk.values[name], gradients[name], f)
            assert {i for i, s in enumerate(unit_scores(before & ~proposal.dropped[name], pattern.unit)) if s} == kept
            assert {i for i, s in enumerate(unit_scores(proposal.grown[name], pattern.unit)) if s} == grown
            returned += int((proposal.dropped[name] & proposal.grown[name]).sum())
    assert bool(returned) == RULES[kind].can_grow  # dropped weights may come back


@pytest.mark.parametrize(
    ("n", "m", "points"), [(2, 4, [[0, 0], [0.3, 0.5], [0.6, 1]]), (1, 4, [[0, 1], [0.5, 0.6]]), (3, 6, [[0, 0.7], [0.5, 1]])]
)
@pytest.mark.parametrize("kind", ["rigl", "set"])
def test_grouped_choices_are_the_best_there_are(n, m, points, kind):
    """Of all choices that keep the groups' limits none has larger scores, first by first: by trying every one."""
    shapes = {"w": (2, 6 if m == 6 else 8)}
    sparsity = {
        "target": 1 - n / m,
        "pattern": {"type": "n:m", "n": n, "m": m},
        "evolution": {"type": kind, "update_interval": 1, "drop_fraction": 0.4, "drop_decay": "constant", "stop": "100 %"},
        "timeline": [{"sparsity": {"type": "table", "points": points}}],
    }
    agenda = Agenda(sparsity=SparsityConfig.check(sparsity), shapes=shapes, steps=11, tokens_per_step=1, seed=5)
    walk, tried = Walk(agenda), 0
    for update, gradients, proposal in walk.updates():
        if "w" not in proposal.dropped:  # dense, and stays so
            continue
        tried += 1
        live = walk.topology.masks["w"].flatten()
        limit = [update.nnz["w"] // (live.numel() // m)] * (live.numel() // m)
        kept = live & ~proposal.dropped["w"].flatten()
        best = best_by_trial(walk.values["w"].abs().flatten().tolist(), live.nonzero().flatten().tolist(), int(kept.sum()), m, limit)
        assert set(kept.nonzero().flatten().tolist()) == best
        grown = proposal.grown["w"].flatten()
        score = gradients["w"].abs().flatten() if kind == "rigl" else counter.random_keys(0, live.numel(), grow_key(update, agenda))
        free = [a - b for a, b in zip(limit, kept.view(-1, m).sum(1).tolist(), strict=True)]
        best = best_by_trial(score.tolist(), (~kept).nonzero().flatten().tolist(), int(grown.sum()), m, free)
        assert set(grown.nonzero().flatten().tolist()) == best
    assert tried >= 8


def grow_key(update, agenda):
    return counter.key(agenda.seed, "grow", update.version, "w")


def best_by_trial(scores, eligible, count, m, limit):
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    worth = {i: 2 ** (len(order) - place) for place, i in enumerate(order)}  # more than all that come after it together
    fitting = [c for c in combinations(eligible, count) if all(sum(i // m == j for i in c) <= most for j, most in enumerate(limit))]
    return set(max(fitting, key=lambda c: sum(worth[i] for i in c)))


def one(mask, kind, nnz, drop_fraction, value, grad, **rule):
    """One update of one small layer, all of whose settings are in the call."""
    mask = torch.tensor(mask, dtype=torch.bool)
    agenda = agenda_of(kind, Unstructured(), {"w": tuple(mask.shape)}, **rule)
    topology = Topology(agenda.shapes, {"w": Rows(0, *mask.shape)}, {"w": mask})
    update = TopologyUpdate(step=2, version=1, phase="training", nnz={"w": nnz}, drop_fraction=drop_fraction, seed=agenda.seed)
    values = {"w": torch.tensor(value, dtype=torch.float32) * mask}
    return propose(agenda, update, topology, {"w": int(mask.sum())}, values, {"w": torch.tensor(grad, dtype=torch.float32)}, ALONE)


@pytest.mark.parametrize(
    ("nnz", "fraction", "dropped", "grown"),
    [
        #    4 live of 8: values 5 1 4 2, then 4 dead; gradients largest at the end, then at the second
        (4, 0.3, [0, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1]),  # floor(1.2)
        (4, 0.5, [0, 1, 0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 1]),  # the second comes back
        (2, 0.3, [0, 1, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]),  # the plan asks for more than the fraction
        (3, 0.5, [0, 1, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1]),
        (6, 0.3, [0, 1, 0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 1, 1]),
        (6, 0.0, [0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1]),
        (8, 1.0, [1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]),
        (0, 0.0, [1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_drawn_updates(nnz, fraction, dropped, grown):
    found = one([[1, 1, 1, 1, 0, 0, 0, 0]], "rigl", nnz, fraction, [[5, -1, 4, 2, 0, 0, 0, 0]], [[1, -8, 1, 1, 2, 3, -7, 9]])
    assert found.dropped["w"].int().tolist() == [dropped]
    assert found.grown["w"].int().tolist() == [grown]


def test_ties_go_to_the_lowest_index():
    found = one([[1, 1, 1, 1, 0, 0, 0, 0]], "rigl", 4, 0.5, [[1] * 8], [[0] * 8])
    assert found.dropped["w"].int().tolist() == [[0, 0, 1, 1, 0, 0, 0, 0]]
    assert found.grown["w"].int().tolist() == [[0, 0, 1, 1, 0, 0, 0, 0]]


@pytest.mark.parametrize(("grown", "by_gradient"), [(1, 0), (3, 2), (4, 3), (7, 5), (8, 6)])
def test_mixed_rounds_the_gradient_share_down(grown, by_gradient):
    """Of 8 dead weights; which of the others come is drawn, but never one that has come already."""
    found = one([[1] * 4 + [0] * 8], "mixed", 4 + grown, 0.0, [[1] * 12], [[0] * 4 + [8, 7, 6, 5, 4, 3, 2, 1]])
    assert int(found.grown["w"].sum()) == grown
    assert found.grown["w"][0, 4 : 4 + by_gradient].all()
    shares = {
        share: one([[1] * 4 + [0] * 8], "mixed", 8, 0.0, [[1] * 12], [[0] * 4 + [8, 7, 6, 5, 4, 3, 2, 1]], gradient_share=share)
        for share in (0, 1)
    }
    assert shares[1].grown["w"].int().tolist() == [[0] * 4 + [1] * 4 + [0] * 4]
    keys = counter.random_keys(4, 8, counter.key(3, "grow", 1, "w"))
    assert set(shares[0].grown["w"][0].nonzero().flatten().tolist()) == set((4 + keys.topk(4).indices).tolist())


@pytest.mark.parametrize(
    ("mask", "nnz", "fraction"), [([[1, 1, 1]], 3, 0.3), ([[0, 0, 0]], 0, 0.3), ([[1, 0, 0]], 1, 0.3), ([[1, 1, 0]], 2, 0.0)]
)
def test_a_layer_with_nothing_to_do_is_left_alone(mask, nnz, fraction):
    """Dense and to stay so, empty, or too few weights for a whole one to go."""
    found = one(mask, "rigl", nnz, fraction, [[1, 2, 3]], [[1, 1, 1]])
    assert (found.dropped, found.grown) == ({}, {})
    assert found.masks["w"].int().tolist() == mask


def wild():
    """Scores from the smallest float32 to nearly the largest, with zeros between."""
    generator = torch.Generator().manual_seed(7)
    exponent = torch.randint(-149, 120, (96, 64), generator=generator).double()
    score = (torch.rand(96, 64, generator=generator).double() * 2**exponent).float()
    score[torch.rand(96, 64, generator=generator) < 0.2] = 0
    return score


SCORES = {
    "wild": wild(),
    "tiny": wild().clamp(max=1e-42),
    "huge": wild() + 1e35,
    "zero": torch.zeros(96, 64),
    "one peak": torch.zeros(96, 64).index_put((torch.tensor([95]), torch.tensor([63])), torch.tensor(3e38)) + 1e-3,
    "normal": torch.randn(96, 64, generator=torch.Generator().manual_seed(1)).abs() * torch.linspace(0.2, 1.8, 96).unsqueeze(1),
}


@pytest.mark.parametrize("unit", [(4, 2), (16, 16), (32, 32)])
@pytest.mark.parametrize("case", SCORES)
def test_block_sums_are_the_same_bits_however_rows_are_spread(case, unit):
    """And near the exact sums: half a unit of float32 off, and half a unit of the 62-bit integers for each weight."""
    score, (height, width) = SCORES[case], unit
    whole = _block_sums([score, score.flip(0)], unit, ALONE)
    for borders in ([96], [64, 32], [32, 32, 32], [0, 96, 0], [32, 0, 64]):
        pairs = list(zip(score.split(borders), score.flip(0).split(borders), strict=True))
        parts = together(lambda pair, ranks: _block_sums(pair, unit, ranks), pairs)
        for i in range(2):
            assert torch.equal(torch.cat([part[i] for part in parts]).view(torch.int32), whole[i].view(torch.int32))
    rows = score.view(96 // height, height, 64 // width, width).permute(0, 2, 1, 3).reshape(-1, height * width).double().tolist()
    exact = [sum(map(F, row)) for row in rows]
    peak = F(float(score.max()))
    for found, true in zip(whole[0].flatten().tolist(), exact, strict=True):
        scaled = true * scale_of(peak, height * width)
        assert abs(F(found) - scaled) <= scaled / 2**24 + F(height * width, 2)


def scale_of(peak, size):
    """The power of two that brings the peak to less than 2^61 / size, and at least half of that."""
    scale = F(1)
    while peak and peak * scale < 2**60 // size:
        scale *= 2
    while peak and peak * scale >= 2**61 // size:
        scale /= 2
    return scale
