"""The native AdamW against torch's, and its three steps against each other, bit by bit."""

import random
from copy import deepcopy
from functools import partial
from itertools import product

import pytest
import torch
from torch import nn

from raysparse.kernels import adamw, library
from raysparse.kernels.adamw import AdamW, Rates, TorchAdamW
from raysparse.kernels.bits import pack
from raysparse.kernels.live import Live
from tests.kernels.conftest import forget

SHAPES = [(0, 5), (3, 0), (1, 1), (1, 7), (7, 1), (5, 8), (3, 13), (4, 16), (2, 17), (31, 63), (1, 1023), (2, 1024), (3, 1025), (67, 64)]
DENSITIES = [0.0, 0.1, 0.5, 1.0]
SETTINGS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
RATES = Rates.at(3, *SETTINGS.values())


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    """After it the setting is what it was: see `one_thread`."""
    torch.set_num_threads(request.param)


def drawn(shape, density=1.0, seed=0):
    """Weight, gradient and moments as in the middle of a training, zero where dead but for the gradient, and the mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < density
    weight, gradient, first, second = (torch.randn(shape, generator=generator) for _ in range(4))
    weight, first, second = (tensor.where(mask, 0.0) for tensor in (weight, 0.1 * first, 0.01 * second.square()))
    return [weight, gradient, first, second], mask


def copies(tensors):
    return [tensor.clone() for tensor in tensors]


def same_bits(found, expected):
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(found, expected, strict=True))


def check_drawn(rng):
    """Any shape and mask, wild gradients where weights are dead: all steps agree bit by bit with one whose gradient is zero there."""
    rows, cols = (rng.choice([0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 63, 64, 65, 130, 1023, 1025]) for _ in range(2))
    tensors, mask = drawn((min(rows, 130), cols), rng.choice([0.0, 0.1, 0.5, 0.9, 1.0]), rng.getrandbits(31))
    expected = copies(tensors)
    expected[1] = expected[1].where(mask, 0.0)
    adamw.advance(*expected, RATES)
    tensors[1][~mask] = rng.choice([torch.nan, torch.inf, -torch.inf, 3e38])
    masked, live = copies(tensors), copies(tensors)
    adamw.advance(*masked, RATES, pack(mask))
    assert same_bits([masked[i] for i in (0, 2, 3)], [expected[i] for i in (0, 2, 3)])
    live[2], live[3] = live[2][mask], live[3][mask]
    adamw.advance_live(*live, RATES, pack(mask))
    assert same_bits([live[0], live[2], live[3]], [expected[0], expected[2][mask], expected[3][mask]])


def by_definition(tensors, step, lr, betas, eps, weight_decay):
    """Loshchilov and Hutter's algorithm 2 with a constant schedule, in float64."""
    weight, gradient, first, second = (tensor.double() for tensor in tensors)
    first = betas[0] * first + (1 - betas[0]) * gradient
    second = betas[1] * second + (1 - betas[1]) * gradient.square()
    size = (second / (1 - betas[1] ** step)).sqrt() + eps
    weight = weight - lr * weight_decay * weight - lr * first / (1 - betas[0] ** step) / size
    return [weight, gradient, first, second]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_is_that_of_the_paper(build, shape):
    """Within eight roundings of the terms, which may cancel in their sums."""
    tensors, _ = drawn(shape)
    expected = by_definition(tensors, 3, **SETTINGS)
    weight, gradient, first, second = (tensor.abs() for tensor in tensors)
    terms = by_definition([-weight, gradient, first, second], 3, **SETTINGS)
    adamw.advance(*tensors, RATES)
    for found, true, size in zip(tensors, expected, terms, strict=True):
        assert ((found.double() - true).abs() <= 8 * 2**-24 * size.abs()).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", DENSITIES)
def test_a_mask_is_a_gradient_of_zeros(build, threads, shape, density):
    tensors, mask = drawn(shape, density)
    expected = copies(tensors)
    expected[1] = expected[1].where(mask, 0.0)
    adamw.advance(*expected, RATES)
    assert not any((expected[i][~mask] != 0).any() for i in (0, 2, 3))
    garbage = pack(mask)
    if shape[1] % 8:
        garbage[:, -1:] |= 0xFF << shape[1] % 8 & 0xFF  # bits past the last column
    for bits in (pack(mask), garbage):
        found = copies(tensors)
        found[1][~mask] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30]).repeat(mask.numel())[: int((~mask).sum())]
        before = found[1].clone()
        adamw.advance(*found, RATES, bits)
        assert torch.equal(found[1].view(torch.int32), before.view(torch.int32))  # the gradient is read alone
        assert same_bits([found[i] for i in (0, 2, 3)], [expected[i] for i in (0, 2, 3)])
        assert not any(torch.signbit(found[i][~mask]).any() for i in (0, 2, 3))  # +0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", DENSITIES)
def test_live_weights_alone_get_the_same_bits(build, threads, shape, density):
    (weight, gradient, first, second), mask = drawn(shape, density)
    masked = copies([weight, gradient, first, second])
    adamw.advance(*masked, RATES, pack(mask))
    gradient[~mask] = torch.nan
    live = [weight, gradient, first[mask], second[mask]]
    adamw.advance_live(*live, RATES, pack(mask))
    assert same_bits([weight, live[2], live[3]], [masked[0], masked[2][mask], masked[3][mask]])


def test_dead_weights_with_moments_become_zero(build):
    """As they have where a rule keeps the moments of what dies: the moments fade, the weight does not move."""
    tensors, _ = drawn((5, 37))
    mask = drawn((5, 37), 0.5)[1]
    expected = [tensors[2] * RATES.beta1, tensors[3] * RATES.beta2]
    adamw.advance(*tensors, RATES, pack(mask))
    assert not (tensors[0][~mask] != 0).any()
    for found, true in zip(tensors[2:], expected, strict=True):
        assert torch.allclose(found[~mask], true[~mask])


def test_drawn_cases(build, threads):
    rng = random.Random(5)
    for _ in range(40):
        check_drawn(rng)


@pytest.mark.parametrize("masked", [False, True])
def test_a_number_does_not_depend_on_where_a_shard_begins(build, threads, masked):
    tensors, mask = drawn((23, 45), 0.5)
    whole = copies(tensors)
    adamw.advance(*whole, RATES, pack(mask) if masked else None)
    for start, stop in ((0, 1), (1, 4), (3, 23), (22, 23), (5, 5)):
        part = [tensor[start:stop].clone() for tensor in tensors]
        adamw.advance(*part, RATES, pack(mask[start:stop]) if masked else None)
        assert same_bits(part, [tensor[start:stop] for tensor in whole])
        view = [tensor.clone()[start:stop] for tensor in tensors]  # aligned like no other
        adamw.advance(*view, RATES, pack(mask[start:stop]) if masked else None)
        assert same_bits(view, part)


def test_builds_that_multiply_and_add_in_one_operation_agree(monkeypatch, native):
    found = []
    for build in ("avx512", "avx2"):
        monkeypatch.setenv(library.CHOICE, build)
        forget()
        if library.available():
            tensors, mask = drawn((31, 77), 0.5)
            adamw.advance(*tensors, RATES, pack(mask))
            found.append(tensors)
    monkeypatch.delenv(library.CHOICE)
    forget()
    assert all(same_bits(tensors, found[0]) for tensors in found)


# --- as an optimizer --------------------------------------------------------------------------------------------------


def model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(13, 17), nn.GELU(), nn.Linear(17, 5))


def groups(module):
    parameters = list(module.parameters())
    return [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.3}, {"params": [p for p in parameters if p.ndim == 1]}]


def trained(module, optimizer, steps, first=0):
    """Some steps on drawn data, one parameter without a gradient in every third."""
    for step in range(first, first + steps):
        x = torch.randn(8, 13, generator=torch.Generator().manual_seed(step))
        module(x).square().mean().backward()
        if step % 3 == 2:
            module[0].bias.grad = None
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (step + 1)
        optimizer.step()
        optimizer.zero_grad()


def test_as_torch_trains(build):
    settings = product([(0.9, 0.999), (0.0, 0.5)], [1e-8, 1e-3], [0.0, 0.1])
    for betas, eps, weight_decay in settings:
        ours, theirs = model(), model()
        native = AdamW(groups(ours), betas=betas, eps=eps, weight_decay=weight_decay)
        torchs = torch.optim.AdamW(groups(theirs), betas=betas, eps=eps, weight_decay=weight_decay, foreach=False)
        trained(ours, native, 30)
        trained(theirs, torchs, 30)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
            assert native.state[a].keys() == torchs.state[b].keys()
            for name, value in torchs.state[b].items():
                assert (native.state[a][name].dtype, native.state[a][name].shape) == (value.dtype, value.shape)
                assert torch.allclose(native.state[a][name], value, rtol=1e-3, atol=1e-7), name


def test_defaults_are_torchs(native):
    ours, theirs = AdamW(model().parameters()).defaults, torch.optim.AdamW(model().parameters()).defaults
    assert ours == {name: theirs[name] for name in ours}


@pytest.mark.parametrize("other", [AdamW, torch.optim.AdamW])
def test_its_state_is_saved_and_loaded(native, other):
    """By itself bit for bit, and by torch's, whose state it is too."""
    module = model()
    optimizer = AdamW(groups(module))
    trained(module, optimizer, 4)
    copy = deepcopy(module)
    loaded = other(groups(copy))
    loaded.load_state_dict(deepcopy(optimizer.state_dict()))
    trained(module, optimizer, 4, first=4)
    trained(copy, loaded, 4, first=4)
    for a, b in zip(module.parameters(), copy.parameters(), strict=True):
        assert torch.equal(a, b) if other is AdamW else torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_masked_parameters(native):
    module = model()
    optimizer = AdamW(groups(module))
    mask = drawn(module[0].weight.shape, 0.5)[1]
    with torch.no_grad():
        module[0].weight.mul_(mask)
    optimizer.set_masks({module[0].weight: Live(mask)})
    trained(module, optimizer, 5)
    state = optimizer.state[module[0].weight]
    for tensor in (module[0].weight, state["exp_avg"], state["exp_avg_sq"]):
        assert torch.equal(tensor != 0, mask)
    assert (module[2].weight != 0).all()
    optimizer.set_masks({})
    trained(module, optimizer, 1, first=5)
    assert (module[0].weight != 0).all()


def test_a_copy_has_no_masks(native):
    module = model()
    optimizer = AdamW(module.parameters())
    optimizer.set_masks({module[0].weight: Live(torch.zeros(17, 13, dtype=torch.bool))})
    copy = deepcopy(optimizer)
    copy.param_groups[0]["params"][0].grad = torch.ones(17, 13)
    copy.step()
    assert (copy.param_groups[0]["params"][0] != 0).all()


def test_loading_a_state_leaves_the_masks(native):
    module = model()
    optimizer = AdamW(module.parameters())
    optimizer.set_masks({module[0].weight: Live(torch.zeros(17, 13, dtype=torch.bool))})
    optimizer.load_state_dict(optimizer.state_dict())
    trained(module, optimizer, 1)
    assert not module[0].weight.any()


@pytest.mark.parametrize("kind", [AdamW, partial(TorchAdamW, foreach=True), partial(TorchAdamW, fused=True)])
def test_live_moments_follow_the_masks(native, kind):
    """Kept where a weight stays alive, 0 where it grew, gone where it died: as moments of all weights that are masked."""
    mine, dense = model(), model()
    weight, other = mine[0].weight, dense[0].weight
    first, second = (drawn(weight.shape, 0.5, seed)[1] for seed in (1, 2))
    optimizer, reference = kind(groups(mine), lr=0.01), AdamW(groups(dense), lr=0.01)
    optimizer.set_masks({weight: Live(first)})
    optimizer.state[weight] = {"step": torch.zeros(()), **{name: torch.zeros(int(first.sum())) for name in adamw.MOMENTS}}
    for mask, begin in ((first, 0), (second, 3)):
        optimizer.set_masks({weight: Live(mask)})
        reference.set_masks({other: Live(mask)})
        with torch.no_grad():
            weight.mul_(mask)
            other.mul_(mask)
            for name in adamw.MOMENTS if begin else ():
                reference.state[other][name].mul_(first & mask)
        for module, steps in ((mine, optimizer), (dense, reference)):
            trained(module, steps, 3, first=begin)
        for name in adamw.MOMENTS:
            assert optimizer.state[weight][name].shape == (int(mask.sum()),)
            torch.testing.assert_close(optimizer.state[weight][name], reference.state[other][name][mask], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(weight, other, rtol=1e-5, atol=1e-6)
        assert not weight[~mask].any()


def test_parameters_that_are_not_contiguous_are_not_for_it(native):
    assert adamw.why_not([torch.zeros(3, 4).t()]) == "it steps contiguous parameters"


def test_hooks_and_closure(native):
    module, seen = model(), []
    optimizer = AdamW(module.parameters())
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure():
        seen.append("loss")
        loss = module(torch.ones(1, 13)).sum()
        loss.backward()
        return loss

    before = module[0].weight.clone()
    assert optimizer.step(closure) is not None
    assert seen == ["before", "loss", "after"]
    assert not torch.equal(module[0].weight, before)


def test_a_gradient_of_any_strides(build):
    """As autograd may leave it: expanded, or turned."""
    for gradient in (torch.ones(1, 1).expand(17, 13), torch.randn(13, 17).t()):
        ours = [nn.Parameter(torch.ones(17, 13)) for _ in range(2)]
        ours[0].grad, ours[1].grad = gradient, gradient.contiguous()
        AdamW(ours).step()
        assert torch.equal(*ours)


FLAT = torch.zeros(24)
BITS = torch.zeros(3, 1, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda w: adamw.advance(w, w.double(), w, w, RATES), "float64"),
        (lambda w: adamw.advance(w, w[:2], w, w, RATES), "2, 8"),
        (lambda w: adamw.advance(w, w, w.flatten(), w, RATES), "24"),
        (lambda w: adamw.advance(w.t(), w.t(), w.t(), w.t(), RATES), "strides"),
        (lambda w: adamw.advance(w, w.to_sparse(), w, w, RATES), "sparse"),
        (lambda w: adamw.advance(w, w, w, w, RATES, BITS[:2]), "2, 1"),
        (lambda w: adamw.advance(w, w, w, w, RATES, BITS.bool()), "bool"),
        (lambda w: adamw.advance(FLAT, FLAT, FLAT, FLAT, RATES, BITS), "24"),
        (lambda w: adamw.advance_live(w, w, FLAT[:5], FLAT[:5], RATES, BITS + 1), "3 live weights, 5 moments"),
        (lambda w: adamw.advance_live(w, w, FLAT[:3], FLAT[:2], RATES, BITS + 1), "2"),
        (lambda w: adamw.advance_live(w, w, w, w, RATES, BITS), "3, 8"),
        (lambda w: Rates.at(0, 1.0, (0.9, 0.9), 1.0, 0.0), "0"),
        (lambda w: AdamW([nn.Parameter(w)]).set_masks({nn.Parameter(w): Live(w[:2] == 0)}), r"\(2, 8\) for \(3, 8\)"),
    ],
)
def test_what_is_not_as_it_should_be_never_reaches_native_code(native, call, text):
    with pytest.raises(ValueError, match=text):
        call(torch.zeros(3, 8))


def test_moments_that_do_not_fit_are_left_alone(native):
    """The number of live weights is only known inside."""
    tensors, mask = drawn((9, 10), 0.5)
    live = [tensors[0], tensors[1], torch.ones(int(mask.sum()) - 1), torch.ones(int(mask.sum()) - 1)]
    before = copies(live)
    with pytest.raises(ValueError, match="live weights"):
        adamw.advance_live(*live, RATES, pack(mask))
    assert same_bits(live, before)


def test_why_not(native, monkeypatch):
    assert adamw.why_not([torch.zeros(1)]) is None
    assert adamw.why_not([]) is None
    odd = [torch.zeros(1), torch.zeros(1).half(), torch.zeros(1, device="meta")]
    assert adamw.why_not(odd) == "it steps float32 on CPUs, not float16 on cpu or float32 on meta"
    monkeypatch.setattr(library, "why_not", lambda: "none was built")
    assert adamw.why_not([]) == "there is no native library: none was built"
