"""The gradient norm: torch's value, and the same bits however the rows are spread."""

import math

import pytest
import torch

from raysparse.sparsity.ranks import ALONE
from raysparse.train.clip import clip_, global_norm
from tests.ranks import spawn
from tests.threads import together

SHAPES = [(37, 24), (120, 40), (5,), (40,), (1, 3), (2, 3, 4), (1, 1000)]
ROWS = sum(shape[0] for shape in SHAPES)


def gradients(seed=0, scale=1.0):
    """Rows of very different sizes, as gradients have."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [torch.logspace(-6, 2, shape[0]) for shape in SHAPES]
    return [
        scale * size.view(-1, *[1] * (len(shape) - 1)) * torch.randn(shape, generator=generator)
        for shape, size in zip(SHAPES, sizes, strict=True)
    ]


def norm(tensors, num_rows=ROWS):
    return global_norm(tensors, num_rows, ALONE)


def split(tensors, fractions):
    """Each rank's rows of every tensor."""
    borders = [[int(len(t) * f) for f in fractions] for t in tensors]
    cut = [t.tensor_split(at) for t, at in zip(tensors, borders, strict=True)]
    return [[parts[rank].contiguous() for parts in cut] for rank in range(len(fractions) + 1)]


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ([[[3.0, 4.0]]], 5.0),
        ([[[3.0], [4.0]]], 5.0),
        ([[3.0, 4.0]], 5.0),
        ([[[1.0, 2.0], [2.0, 4.0]], [[-10.0]], [4.0, 2.0]], math.sqrt(145)),
        ([[[0.0, 0.0]]], 0.0),
        ([], 0.0),
    ],
)
def test_drawn(tensors, expected):
    assert norm([torch.tensor(t) for t in tensors], 10) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_rows", [ROWS, 1 << 20])
def test_equals_torch(seed, num_rows):
    found = gradients(seed)
    exact = float(torch.nn.utils.get_total_norm([g.double() for g in found]))
    assert norm(found, num_rows) == pytest.approx(exact, rel=1e-6)
    assert norm(found, num_rows) == pytest.approx(float(torch.nn.utils.get_total_norm(found)), rel=1e-6)


FRACTIONS = [[0.5], [0.0], [1.0], [0.1], [1 / 3, 2 / 3], [0, 0], [0.5, 0.5], [0.2, 0.4, 0.6, 0.8], [i / 37 for i in range(1, 37)]]


@pytest.mark.parametrize("fractions", FRACTIONS, ids=[f"{len(f) + 1} ranks from {f[0]:.2f}" for f in FRACTIONS])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_bit_equal_at_any_split(fractions, scale):
    whole = gradients(scale=scale)
    found = together(lambda part, ranks: global_norm(part, ROWS, ranks), split(whole, fractions))
    assert len(set(found)) == 1
    assert found[0] == norm(whole)


def test_a_plain_sum_would_not_be_bit_equal():
    """Else the tests above show nothing."""
    whole = gradients()
    plain = {
        float(torch.stack([sum((g.square().sum() for g in part), torch.zeros(())) for part in split(whole, fractions)]).sum())
        for fractions in FRACTIONS
    }
    assert len(plain) > 1


def norm_here(scale):
    import torch.distributed as dist

    from raysparse.train.process import ranks_of

    rank, size, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    assert group is not None
    ranks = ranks_of(group, torch.device("cpu"))
    mine = split(gradients(scale=scale), [i / size for i in range(1, size)])[rank]
    uneven = split(gradients(1, scale), [0.0] * (size - 1))[rank]  # all rows on the last rank
    poisoned = [g.clone() for g in mine]
    if rank == size - 1:
        poisoned[0][-1, -1] = math.nan
    value = global_norm(mine, ROWS, ranks)
    clip_(mine, value, value / 3)
    return value, global_norm(uneven, ROWS, ranks), math.isnan(global_norm(poisoned, ROWS, ranks)), global_norm(mine, ROWS, ranks)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("scale", [1.0, 1e30])
def test_bit_equal_on_gloo_ranks(world_size, scale):
    found = spawn(norm_here, world_size, scale)
    whole = gradients(scale=scale)
    value = norm(whole)
    clip_(whole, value, value / 3)
    assert found == [(value, norm(gradients(1, scale)), True, norm(whole))] * world_size


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", range(len(SHAPES)))
def test_nan_and_infinity_are_nan(bad, at):
    found = gradients()
    found[at].view(-1)[-1] = bad
    assert math.isnan(norm(found))
    parts = split(found, [0.5])
    assert all(map(math.isnan, together(lambda part, ranks: global_norm(part, ROWS, ranks), parts)))


def test_zero_gradients_are_zero():
    assert norm([torch.zeros(shape) for shape in SHAPES]) == 0.0
    assert norm([torch.full(shape, -0.0) for shape in SHAPES]) == 0.0
    assert norm([torch.zeros(0, 4), torch.zeros(0)]) == 0.0


@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e19, 1e30, 3e38])
@pytest.mark.parametrize("shape", [(1,), (7,), (6, 1), (6, 11)])
def test_magnitudes(magnitude, shape):
    g = torch.full(shape, magnitude)
    expected = float(g.flatten()[0]) * math.sqrt(g.numel())
    assert norm([g], shape[0]) == pytest.approx(expected, rel=1e-6)


def test_a_huge_and_a_tiny_gradient():
    assert norm([torch.full((4, 4), 1e30), torch.full((4, 4), 1e-30)], 8) == pytest.approx(4e30, rel=1e-6)
    # 10,000 rows of 1 beside one of 1,000: a tenth of a percent must not be lost.
    assert norm([torch.ones(10_000, 1), torch.tensor([[1000.0]])], 10_001) == pytest.approx(math.sqrt(1_010_000), rel=1e-9)


@pytest.mark.parametrize("power", [-90, -40, -1, 1, 30, 100])
def test_powers_of_two_scale_exactly(power):
    drawn = [g.clamp(-2, 2) + 2.0 for g in gradients()]  # no element vanishes or overflows
    assert norm([g * 2.0**power for g in drawn]) == pytest.approx(norm(drawn) * 2.0**power, rel=1e-7)
    if -20 <= power <= 50:  # summed in float32 on both sides: not a bit differs
        assert norm([g * 2.0**power for g in drawn]) == norm(drawn) * 2.0**power


def test_the_gradients_are_left_alone():
    found = gradients()
    before = [g.clone() for g in found]
    norm(found)
    assert all(map(torch.equal, found, before))


@pytest.mark.parametrize(("limit", "clipped"), [(1.0, True), (4.999, True), (5.0, False), (6.0, False)])
def test_clip(limit, clipped):
    found = [torch.tensor([[3.0]]), torch.zeros(0, 2), torch.tensor([4.0])]
    clip_(found, 5.0, limit)
    factor = limit / (5.0 + 1e-6) if clipped else 1.0
    assert found[0].item() == pytest.approx(3 * factor, rel=1e-7)
    assert found[2].item() == pytest.approx(4 * factor, rel=1e-7)


def test_clip_equals_torch():
    ours, theirs = gradients(), gradients()
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in theirs]
    for parameter, g in zip(parameters, theirs, strict=True):
        parameter.grad = g
    torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    clip_(ours, norm(ours), 0.5)
    for g, parameter in zip(ours, parameters, strict=True):
        torch.testing.assert_close(g, parameter.grad, rtol=1e-6, atol=0)
    assert norm(ours) == pytest.approx(0.5, rel=1e-5)


def test_clip_on_a_rank_without_rows():
    clip_([], 5.0, 1.0)
    clip_([torch.zeros(0, 3), torch.zeros(0)], 5.0, 1.0)
