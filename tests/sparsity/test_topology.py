"""Masks: exactly as many as planned, the same at any split of the rows, and lethal to what is dead."""

from itertools import pairwise

import pytest
import torch

from raysparse.kernels.bits import pack, unpack
from raysparse.sparsity import counter
from raysparse.sparsity.agenda import Agenda
from raysparse.sparsity.evolve import first_topology
from raysparse.sparsity.plan import SparsityConfig
from raysparse.sparsity.ranks import ALONE
from raysparse.sparsity.topology import Rows, Topology
from tests.ranks import spawn
from tests.threads import together

SHAPES = {"h.0.attn": (7, 5), "h.0.mlp": (13, 9), "h.1.attn": (7, 5), "h.1.mlp": (2, 30)}


def agenda(seed=0, **sparsity):
    config = SparsityConfig.check({"target": 0.6, "layers": {"h.1.attn": 0.9}} | sparsity)
    return Agenda(sparsity=config, shapes=SHAPES, steps=1, tokens_per_step=1, seed=seed)


def cut(borders):
    """For each rank, its rows of every layer; `borders` are fractions of the rows."""
    return [
        {name: Rows(int(rows * low), int(rows * high) - int(rows * low), cols) for name, (rows, cols) in SHAPES.items()}
        for low, high in pairwise([0, *borders, 1])
    ]


SPLITS = {"1": [], "2": [0.5], "2, empty": [0], "3": [1 / 3, 2 / 3], "3, empty": [0.1, 0.1], "5": [0.2, 0.4, 0.6, 0.8]}


def draw(agenda, rows, ranks):
    """The first topology of a rule that draws at random, whatever the weights are."""
    values = {name: torch.full((here.count, here.cols), torch.nan) for name, here in rows.items()}
    return first_topology(agenda, rows, values, ranks)


def alone(seed=0, **sparsity):
    return draw(agenda(seed, **sparsity), cut([])[0], ALONE)


def small(mask):
    """A topology of one layer "w" with the given mask, all of it here."""
    mask = torch.tensor(mask, dtype=torch.bool)
    return Topology({"w": tuple(mask.shape)}, {"w": Rows(0, *mask.shape)}, {"w": mask})


@pytest.mark.parametrize("target", [0.0, 0.3, 0.6, 0.9, 0.97])
def test_nnz_is_the_plans(target):
    topology, nnz = alone(target=target), agenda(target=target).plan(0)
    assert topology.nnz(ALONE) == nnz
    assert (topology.shapes, topology.rows) == (SHAPES, cut([])[0])
    for name, mask in topology.masks.items():
        assert mask.dtype == torch.bool
        assert (*mask.shape, int(mask.sum())) == (*SHAPES[name], nnz[name])


@pytest.mark.parametrize("borders", SPLITS.values(), ids=SPLITS)
def test_the_same_masks_at_any_split(borders):
    def here(rows, ranks):
        topology = draw(agenda(), rows, ranks)
        return topology.masks, topology.digest(ranks), topology.nnz(ranks), topology.digest_sums()

    found = together(here, cut(borders))
    whole = alone()
    for name, mask in whole.masks.items():
        assert torch.equal(torch.cat([masks[name] for masks, _, _, _ in found]), mask)
    assert {digest for _, digest, _, _ in found} == {whole.digest(ALONE)}
    assert all(nnz == agenda().plan(0) for _, _, nnz, _ in found)
    assert torch.equal(sum(sums for _, _, _, sums in found), whole.digest_sums())  # modulo 2^64


def draw_here():
    import torch.distributed as dist

    from raysparse.train.process import ranks_of

    group = dist.group.WORLD
    assert group is not None
    ranks = ranks_of(group, torch.device("cpu"))
    borders = [i / dist.get_world_size() for i in range(1, dist.get_world_size())]
    topology = draw(agenda(), cut(borders)[dist.get_rank()], ranks)
    return {name: mask.tolist() for name, mask in topology.masks.items()}, topology.digest(ranks)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_same_masks_on_gloo_ranks(world_size):
    found, whole = spawn(draw_here, world_size), alone()
    assert {digest for _, digest in found} == {whole.digest(ALONE)}
    for name, mask in whole.masks.items():
        assert [row for masks, _ in found for row in masks[name]] == mask.tolist()


def test_layers_and_seeds_differ():
    masks, others = alone(seed=0).masks, alone(seed=1).masks
    even = alone(layers={}).masks
    assert even["h.0.attn"].sum() == even["h.1.attn"].sum()
    assert not torch.equal(even["h.0.attn"], even["h.1.attn"])
    assert all(not torch.equal(masks[name], others[name]) for name in SHAPES)
    assert alone(seed=0).digest(ALONE) != alone(seed=1).digest(ALONE)
    assert all(torch.equal(masks[name], again) for name, again in alone(seed=0).masks.items())


def test_masks_are_uniform():
    """Live weights over 400 seeds: every position of 35 is live 0.4 of the time, within five standard deviations."""
    drawn = torch.stack([alone(seed=seed).masks["h.0.attn"] for seed in range(400)])
    live = agenda().plan(0)["h.0.attn"] / 35
    assert (drawn.float().mean(0) - live).abs().max() < 5 * (live * (1 - live) / 400) ** 0.5


def test_a_higher_sparsity_draws_a_subset():
    wide, narrow = alone(target=0.5), alone(target=0.8)
    assert all(bool((wide.masks[name] | ~narrow.masks[name]).all()) for name in SHAPES)


@pytest.mark.parametrize("cols", [1, 7, 8, 9, 15, 16, 17, 40])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_unpack_inverts_pack(rows, cols):
    mask = torch.rand(rows, cols, generator=torch.Generator().manual_seed(cols)) < 0.5
    for special in (mask, torch.ones_like(mask), torch.zeros_like(mask)):
        bits = pack(special)
        assert bits.dtype == torch.uint8
        assert bits.shape == (rows, (cols + 7) // 8)
        assert torch.equal(unpack(bits, cols), special)


def test_packed_bits():
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[0, [0, 3]] = mask[1, [7, 8, 9]] = True
    #                                    bits 0 and 3     bit 7, then 8 and 9
    assert pack(mask).tolist() == [[0b1001, 0], [0b10000000, 0b11]]


def test_packing_shards_by_rows():
    mask = alone().masks["h.0.mlp"]
    assert torch.equal(torch.cat([pack(part) for part in mask.split([4, 0, 9])]), pack(mask))


def test_digest_is_what_it_was():
    assert small([[1, 0, 1], [0, 1, 0]]).digest(ALONE) == "62a41a6702d78505696897cff74d5341"  # checkpoints and reports name masks by it
    assert alone().digest(ALONE) == "77cf683af075ccb58480256910da2bf2"  # a run draws what it always drew


def test_digest_sees_one_moved_bit():
    base = small([[1, 0, 1], [0, 1, 0]])
    seen = {base.digest(ALONE)}
    for other in ([[0, 1, 1], [0, 1, 0]], [[1, 0, 0], [1, 1, 0]], [[1, 0, 1], [0, 0, 1]], [[1, 1, 1], [0, 1, 0]], [[1, 0, 1], [0, 0, 0]]):
        seen.add(small(other).digest(ALONE))
    assert len(seen) == 6
    # Every single move in a larger mask, at equal nnz.
    mask = alone().masks["h.0.attn"].clone()
    found = {small(mask.tolist()).digest(ALONE)}
    live, dead = mask.flatten().nonzero().flatten().tolist(), (~mask).flatten().nonzero().flatten().tolist()
    for a in live:
        for b in dead:
            moved = mask.clone().flatten()
            moved[a], moved[b] = False, True
            found.add(small(moved.view_as(mask).tolist()).digest(ALONE))
    assert len(found) == 1 + len(live) * len(dead)


def test_digest_sees_swapped_layers():
    one, two = torch.tensor([[True, False]]), torch.tensor([[False, True]])
    shapes, rows = {"a": (1, 2), "b": (1, 2)}, {"a": Rows(0, 1, 2), "b": Rows(0, 1, 2)}
    assert Topology(shapes, rows, {"a": one, "b": two}).digest(ALONE) != Topology(shapes, rows, {"a": two, "b": one}).digest(ALONE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_kill_leaves_plus_zero(dtype):
    topology = small([[1, 0, 0], [0, 1, 0]])
    inf, nan = float("inf"), float("nan")
    tensor = torch.tensor([[-1.5, nan, -inf], [inf, nan, -2.0]], dtype=dtype)
    topology.kill({"w": tensor})
    assert tensor.nan_to_num(99).tolist() == [[-1.5, 0, 0], [0, 99, 0]]  # a live NaN stays to be seen
    assert not torch.signbit(tensor[~topology.masks["w"]]).any()


def test_kill_is_in_place_and_without_a_graph():
    topology = small([[1, 0]])
    leaf = torch.ones(1, 2, requires_grad=True)
    topology.kill({"w": leaf})
    assert leaf.tolist() == [[1, 0]]
    assert leaf.grad_fn is None


@pytest.mark.parametrize("bad", [1e-45, -1.0, float("nan"), float("inf")])
def test_one_bad_element_is_a_leak(bad):
    topology = alone()
    tensors = {name: mask.float() for name, mask in topology.masks.items()}
    assert topology.leaks(tensors) == []
    row, col = (~topology.masks["h.1.mlp"]).nonzero()[-1].tolist()
    tensors["h.1.mlp"][row, col] = bad
    assert topology.leaks(tensors) == ["h.1.mlp"]
    topology.kill(tensors)
    assert topology.leaks(tensors) == []


def test_replaced_masks_are_obeyed():
    """Nothing that is derived from the old masks survives."""
    topology = small([[1, 0]])
    before = topology.digest(ALONE)
    other = {"w": torch.tensor([[False, True]])}
    topology.replace(other, other)
    tensor = torch.tensor([[5.0, 6.0]])
    assert topology.leaks({"w": tensor}) == ["w"]
    topology.kill({"w": tensor})
    assert tensor.tolist() == [[0, 6]]
    assert topology.digest(ALONE) == small([[0, 1]]).digest(ALONE) != before
    assert topology.nnz(ALONE) == {"w": 1}


def test_ever_collects_what_was_alive():
    one, two = torch.tensor([[True, False, False]]), torch.tensor([[True, True]])
    topology = Topology({"a": (1, 3), "b": (1, 2)}, {"a": Rows(0, 1, 3), "b": Rows(0, 1, 2)}, {"a": one, "b": two})
    assert topology.ever == topology.masks
    for mask, ever in (([0, 1, 0], [1, 1, 0]), ([1, 0, 0], [1, 1, 0]), ([0, 0, 1], [1, 1, 1])):
        new = torch.tensor([mask], dtype=torch.bool)
        topology.evolve({"a": new, "b": topology.masks["b"]})
        assert topology.masks["a"] is new
        assert topology.ever["a"].int().tolist() == [ever]
    assert topology.ever["b"] is topology.masks["b"] is two  # a mask that never changes is kept once
    topology.evolve(topology.masks)  # as an update leaves a layer of which it moves nothing
    assert topology.ever["a"].int().tolist() == [[1, 1, 1]]
    assert one.tolist() == [[True, False, False]]


def test_digest_sums_of_other_masks():
    """Of what an update dropped and grew: before - dropped + grown is what is live after it, in every layer."""
    topology = alone()
    masks = dict(topology.masks)
    dropped, grown = torch.zeros(13, 9, dtype=torch.bool), torch.zeros(13, 9, dtype=torch.bool)
    live, dead = masks["h.0.mlp"].nonzero(), (~masks["h.0.mlp"]).nonzero()
    dropped[live[3:9, 0], live[3:9, 1]] = grown[dead[:6, 0], dead[:6, 1]] = True
    masks["h.0.mlp"] = masks["h.0.mlp"] & ~dropped | grown
    sums = [topology.digest_sums(which) for which in (None, {"h.0.mlp": dropped}, {"h.0.mlp": grown}, masks)]
    assert [sum_.dtype for sum_ in sums] == [torch.int64] * 4
    assert sums[1].count_nonzero() == sums[2].count_nonzero() == 1
    assert torch.equal(sums[0] - sums[1] + sums[2], sums[3])
    assert not torch.equal(sums[0], sums[3])
    topology.evolve(masks)
    assert torch.equal(topology.digest_sums(), sums[3])


def test_checksums_see_one_or_two_elements_that_changed():
    rows, cols = 257, 1029  # several chunks, and a last word that is not full
    mask = torch.rand(rows, cols, generator=torch.Generator().manual_seed(1)) < 0.3
    topology = Topology({"w": (rows, cols)}, {"w": Rows(0, rows, cols)}, {"w": mask})
    flat, before = mask.view(-1), topology.checksums()
    words = torch.nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % 8)).view(torch.int64)
    assert before.tolist() == [int(((words + (words >> 32)) * (2 * torch.arange(len(words)) + 1)).sum())]
    live, dead = (flat == value for value in (True, False))
    places = [*torch.randint(flat.numel(), (200,), generator=torch.Generator().manual_seed(2)).tolist(), 0, 7, 8, flat.numel() - 1]
    found = []
    for place in places:
        flat[place] ^= True
        found.append(int(topology.checksums()))
        flat[place] ^= True
    pairs = list(zip(live.nonzero()[:300:7, 0].tolist(), dead.nonzero()[-300::7, 0].tolist(), strict=False))
    for one, other in pairs:  # as many live weights as before
        flat[one], flat[other] = False, True
        found.append(int(topology.checksums()))
        flat[one], flat[other] = True, False
    assert len(set(found[: len(places)])) == len(set(places))
    assert int(before) not in found
    assert torch.equal(topology.checksums(), before)
    assert Topology({"w": (4, 3)}, {"w": Rows(4, 0, 3)}, {"w": mask[:0, :3]}).checksums().tolist() == [0]  # a rank without rows


def test_digest_sums_by_hand():
    """Of the indices in the whole weight: the same bits in other rows count otherwise."""
    mask = torch.tensor([[True, False, True]])
    for first in (0, 2):
        topology = Topology({"w": (3, 3)}, {"w": Rows(first, 1, 3)}, {"w": mask})
        index = torch.tensor([3 * first, 3 * first + 2])
        assert topology.digest_sums().tolist() == [int(counter.mix(index, counter.key("digest", "w")).sum())]
