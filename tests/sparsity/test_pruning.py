"""One-shot pruning rules on hand-made layers: closed forms, exact counts, ties, dead features, sums that do not depend on ranks."""

from typing import get_args

import pytest
import torch

from raysparse.sparsity.pattern import NM, Unstructured
from raysparse.sparsity.pruning import AnyPruner, Layer, Magnitude, SparseGPT, Total, Wanda
from raysparse.sparsity.pruning.base import best, shares

RULES = [kind() for kind in get_args(get_args(AnyPruner)[0])]
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.type)


def layer(weight, nnz, live=None, pattern=None):
    return Layer(weight, torch.ones_like(weight, dtype=torch.bool) if live is None else live, nnz, pattern or Unstructured())


def drawn(rows, cols, tokens=200, seed=0):
    """A weight, and inputs whose features depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=generator) / cols**0.5 + torch.eye(cols)
    inputs = torch.randn(tokens, cols, generator=generator) @ mix * torch.linspace(0.2, 3, cols)
    return torch.randn(rows, cols, generator=generator), inputs


def loss(weight, pruned, inputs):
    return float(((weight - pruned) @ inputs.T).double().square().sum())


def test_wanda_by_hand():
    weight = torch.tensor([[7.0, -3.0, 2.0, 1.0], [1.0, 1.0, -1.0, 1.0]])
    inputs = torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 2.0, 12.0], [0.0, 0.0, 0.0, 5.0]])
    #   norms of the features:   1    2    2    13       scores:  7  6  4  13   and   1  2  2  13
    rule = Wanda()
    pruned, mask = rule.prune(layer(weight, 4), rule.statistic(inputs))
    assert mask.tolist() == [[True, False, False, True], [False, True, False, True]]  # a tie of 2 and 2: the first; two in each row
    assert pruned.tolist() == [[7.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0]]


def test_magnitude_by_hand():
    weight = torch.tensor([[4.0, -3.0, 2.0, 1.0], [1.0, 2.0, -1.0, 1.0]])
    pruned, mask = Magnitude().prune(layer(weight, 3), None)
    assert mask.tolist() == [[True, True, True, False], [False, False, False, False]]  # of the whole layer, of equals the first
    assert pruned.tolist() == [[4.0, -3.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]]


def test_one_weight_of_a_row_is_made_up_for_as_the_optimal_brain_surgeon_does():
    """The first column is the one to go, so that all others may change: the exact update."""
    weight, inputs = drawn(5, 12)
    weight[:, 0] *= 1e-3
    rule = SparseGPT(damping=0, block_size=12)
    pruned, mask = rule.prune(layer(weight, 5 * 11), rule.statistic(inputs))
    assert not mask[:, 0].any()
    assert mask[:, 1:].all()
    inverse = torch.linalg.inv((inputs.T @ inputs).double())
    expected = weight.double() - torch.outer(weight[:, 0].double() / inverse[0, 0], inverse[0])
    assert torch.allclose(pruned.double(), expected, rtol=1e-4, atol=1e-6)
    assert (pruned[:, 0] == 0).all()


def test_weights_behind_the_last_dead_one_are_the_least_squares_optimum():
    rows, cols, dead = 4, 16, 6
    weight, inputs = drawn(rows, cols)
    weight[:, :dead] *= 1e-4  # the first to go
    rule = SparseGPT(damping=0)
    pruned, mask = rule.prune(layer(weight, rows * (cols - dead)), rule.statistic(inputs))
    assert torch.equal(mask, (torch.arange(cols) >= dead).expand(rows, cols))
    x = inputs.double()
    optimum = torch.linalg.lstsq(x[:, dead:], x @ weight.double().T).solution.T
    assert torch.allclose(pruned[:, dead:].double(), optimum, rtol=1e-4, atol=1e-6)
    assert not torch.equal(pruned[:, dead:], weight[:, dead:])


def test_blocks_only_gather_updates():
    """Where the groups of a pattern decide, the size of a block changes nothing but rounding."""
    weight, inputs = drawn(6, 48)
    found = [
        SparseGPT(block_size=size).prune(layer(weight, 6 * 24, pattern=NM(n=2, m=4)), inputs.T @ inputs) for size in (4, 12, 20, 48, 128)
    ]
    assert all(torch.equal(mask, found[0][1]) for _, mask in found)
    assert all(torch.allclose(pruned, found[0][0], rtol=1e-4, atol=1e-5) for pruned, _ in found)


def test_the_steps_agree_with_a_slow_reference():
    """Column by column, the inverse of what is left of H anew each time, scores and updates straight from the formulas."""
    rows, cols, block = 6, 20, 8
    weight, inputs = drawn(rows, cols)
    nnz = 41
    rule = SparseGPT(damping=0.05, block_size=block)
    pruned, mask = rule.prune(layer(weight, nnz), rule.statistic(inputs))
    hessian = (inputs.T @ inputs).double()
    hessian += 0.05 * hessian.diagonal().mean() * torch.eye(cols)
    w, expected_mask = weight.double(), torch.zeros(rows, cols, dtype=torch.bool)
    counts = [
        17,
        16,
        8,
    ]  # of 41 * 8 / 20 = 16.4, 16.4 and 8.2 the floors, and the one that is missing to the first of the largest remainders
    for first, count in zip(range(0, cols, block), counts, strict=True):
        here = range(first, min(first + block, cols))
        scores = torch.stack([w[:, j] ** 2 / torch.linalg.inv(hessian[j:, j:])[0, 0] for j in here], 1)
        chosen = scores.flatten().topk(count).indices
        expected_mask[:, here.start : here.stop] = (
            torch.zeros_like(scores, dtype=torch.bool).flatten().scatter(0, chosen, True).view_as(scores)
        )
        for j in here:
            inverse = torch.linalg.inv(hessian[j:, j:])
            error = w[:, j].masked_fill(expected_mask[:, j], 0) / inverse[0, 0]
            w[:, j:] -= torch.outer(error, inverse[0])
    assert torch.equal(mask, expected_mask)
    assert torch.allclose(pruned.double(), w.where(expected_mask, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
def test_outputs_suffer_least_under_sparsegpt(sparsity):
    weight, inputs = drawn(48, 64, tokens=400)
    nnz = int(weight.numel() * (1 - sparsity))
    losses = {}
    for rule in RULES:
        pruned, _ = rule.prune(layer(weight, nnz), rule.statistic(inputs) if rule.reads_inputs else None)
        losses[rule.type] = loss(weight, pruned, inputs)
    assert losses["sparsegpt"] < 0.9 * losses["wanda"]
    assert losses["wanda"] < 0.9 * losses["magnitude"]


@every_rule
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 5), (7, 129), (13, 300), (5, 128)])
@pytest.mark.parametrize("density", [0.0, 0.1, 1 / 3, 0.5, 1.0])
def test_counts_are_exact_in_odd_shapes(rule, rows, cols, density):
    weight, inputs = drawn(rows, cols, tokens=40)
    nnz = round(rows * cols * density)
    pruned, mask = rule.prune(layer(weight, nnz), rule.statistic(inputs) if rule.reads_inputs else None)
    assert int(mask.sum()) == nnz
    assert torch.equal(pruned != 0, mask)


@every_rule
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 8), (16, 32)])
def test_patterns_are_kept(rule, n, m):
    weight, inputs = drawn(6, 192)
    nnz = weight.numel() // m * n
    pruned, mask = rule.prune(layer(weight, nnz, pattern=NM(n=n, m=m)), rule.statistic(inputs) if rule.reads_inputs else None)
    assert (mask.view(-1, m).sum(1) == n).all()
    assert torch.equal(pruned != 0, mask)


@every_rule
@pytest.mark.parametrize("pattern", [Unstructured(), NM(n=1, m=4)], ids=["unstructured", "1:4"])
def test_dead_weights_stay_dead(rule, pattern):
    weight, inputs = drawn(8, 160)
    statistic = rule.statistic(inputs) if rule.reads_inputs else None
    first = layer(weight, weight.numel() // 2, pattern=NM(n=2, m=4) if pattern.group(160) else pattern)
    half, live = rule.prune(first, statistic)
    quarter, mask = rule.prune(layer(half, weight.numel() // 4, live, pattern), statistic)
    assert int(mask.sum()) == weight.numel() // 4
    assert not (mask & ~live).any()
    assert not quarter[~mask].any()
    same, again = rule.prune(layer(half, weight.numel() // 2, live, first.pattern), statistic)
    assert torch.equal(again, live)
    assert torch.equal(same, half)


@every_rule
def test_of_equal_scores_the_first_live(rule):
    weight = torch.ones(3, 4)
    statistic = rule.statistic(torch.eye(4)) if rule.reads_inputs else None
    _, mask = rule.prune(layer(weight, 6), statistic)
    if rule.type == "wanda":
        assert mask.tolist() == [[True, True, False, False]] * 3  # each row has rivals of its own
    else:
        assert mask.flatten().tolist() == [True] * 6 + [False] * 6


def test_features_that_were_never_seen_go_first_and_hurt_nobody():
    weight, inputs = drawn(6, 20)
    inputs[:, [2, 11]] = 0
    rule = SparseGPT()
    pruned, mask = rule.prune(layer(weight, 60), rule.statistic(inputs))
    assert not mask[:, [2, 11]].any()
    rest = [column for column in range(20) if column not in (2, 11)]
    without, same = rule.prune(layer(weight[:, rest].clone(), 60), rule.statistic(inputs[:, rest]))
    assert torch.equal(mask[:, rest], same)
    assert torch.allclose(pruned[:, rest], without, atol=1e-5)
    everything, mask = rule.prune(layer(weight, 120), rule.statistic(inputs))
    assert int(mask.sum()) == 120  # the plan's count holds; such a weight is alive, and 0
    assert not everything[:, [2, 11]].any()


def test_a_hessian_of_few_samples_needs_damping():
    weight, inputs = drawn(4, 40, tokens=8)
    inputs = inputs * 1e3
    with pytest.raises(torch.linalg.LinAlgError):
        SparseGPT(damping=0).prune(layer(weight, 80), inputs.T @ inputs)
    pruned, _ = SparseGPT(damping=0.01).prune(layer(weight, 80), inputs.T @ inputs)
    assert pruned.isfinite().all()


def test_damping_keeps_weights_where_they_were():
    weight, inputs = drawn(8, 32)
    moved = []
    for damping in (0.01, 1.0, 1e6):
        pruned, mask = SparseGPT(damping=damping).prune(layer(weight, 128), inputs.T @ inputs)
        moved.append(float((pruned - weight)[mask].abs().max()))
    assert moved[0] > moved[1] > moved[2]
    assert moved[2] < 1e-4


def test_shares_by_hand():
    assert shares(5, torch.tensor([4, 4, 2])).tolist() == [2, 2, 1]
    assert shares(4, torch.tensor([4, 4, 2])).tolist() == [2, 1, 1]  # 1.6, 1.6, 0.8: floors 1 1 0, then 0.8, then the first 0.6
    assert shares(0, torch.tensor([4, 4])).tolist() == [0, 0]
    assert shares(3, torch.tensor([0, 3])).tolist() == [0, 3]


def test_best_by_hand():
    score = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 0.0, 0.0, 4.0]])
    live = torch.tensor([[True, True, True, True], [False, True, True, True]])
    assert best(score, live, torch.tensor([1, 2])).tolist() == [[False, True, False, False], [False, True, False, True]]


@pytest.mark.parametrize("terms", [1, 2, 3, 7, 8, 13])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 16])
def test_a_total_has_the_same_bits_however_its_terms_are_spread(terms, ranks):
    generator = torch.Generator().manual_seed(terms)
    values = [torch.randn(50, generator=generator) * 10.0 ** float(torch.randint(-3, 4, (1,), generator=generator)) for _ in range(terms)]
    alone = Total()
    for number, value in enumerate(values):
        alone.add(number, value.clone())
    whole = Total()
    for rank in range(ranks):
        mine = Total()
        for number in range(rank * terms // ranks, (rank + 1) * terms // ranks):
            mine.add(number, values[number].clone())
        for (level, number), value in mine.nodes.items():
            whole.add(number, value, level)
    assert torch.equal(whole.value(), alone.value())
    assert torch.allclose(whole.value(), torch.stack(values).sum(0), rtol=1e-4, atol=1e-3)
    assert len(alone.nodes) == terms.bit_count()
