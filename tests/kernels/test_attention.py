"""Attention to spans of keys against masked attention in float64, and which way of computing it runs."""

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raysparse.kernels import attention as kernels
from raysparse.kernels import blocks, library
from raysparse.kernels.attention import attention
from raysparse.sparsity.attention import Fixed, Full, Local, LocalOrStrided, Pattern, Strided

needs_native = pytest.mark.skipif(not library.available(), reason="needs the native library")
WAYS = [pytest.param("native", marks=needs_native), "torch"]
BLOCKED = [Local(width=48), Strided(stride=9), LocalOrStrided(width=20, stride=16), Fixed(width=32)]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Of the largest number: some units of the last place, and in half precision the rounding of the output that gradients are made from."""


@pytest.fixture
def choose(monkeypatch) -> Any:
    """Make a way run, however short the rows."""

    def chosen(way: str) -> None:
        monkeypatch.setattr(kernels, "SHORTEST", 1)
        monkeypatch.setattr(blocks, "SHORT", 0)
        if way == "torch":
            monkeypatch.setattr(library, "available", lambda: False)
        blocks._plan.cache_clear()

    yield chosen
    blocks._plan.cache_clear()


def rules_of(patterns: list[Pattern]) -> Tensor:
    return torch.tensor([pattern.rule for pattern in patterns])


def inputs(batch: int, heads: int, key_heads: int, length: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key, value and the gradient of the output, as a transformer lays them out; the first three want gradients."""
    generator = torch.Generator().manual_seed(length * width + heads)
    sizes = [heads, key_heads, key_heads, heads]
    made = [torch.randn(batch, length, n, width, dtype=torch.float64, generator=generator).to(dtype).transpose(1, 2) for n in sizes]
    return [*(tensor.requires_grad_() for tensor in made[:3]), made[3]]


def run(tensors: list[Tensor], rules: Tensor, scale: float = 0.3) -> list[Tensor]:
    """The output, and the gradients of query, key and value."""
    out, _ = attention(*tensors[:3], rules, scale)
    return [out.detach(), *torch.autograd.grad(out, tensors[:3], tensors[3])]


def masked(tensors: list[Tensor], patterns: list[Pattern], scale: float = 0.3) -> list[Tensor]:
    """The same in float64 with every score computed."""
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    at = torch.arange(tensors[0].shape[2])
    mask = torch.stack([pattern.allows(at[:, None], at) for pattern in patterns])
    out = F.scaled_dot_product_attention(*exact[:3], attn_mask=mask[None], scale=scale, enable_gqa=True)
    return [out.detach(), *torch.autograd.grad(out, exact[:3], exact[3])]


def check(tensors: list[Tensor], patterns: list[Pattern], scale: float = 0.3) -> None:
    found, expected = run(tensors, rules_of(patterns), scale), masked(tensors, patterns, scale)
    tolerance = TOLERANCE[tensors[0].dtype]
    for name, mine, exact in zip(("out", "query", "key", "value"), found, expected, strict=True):
        assert mine.dtype == tensors[0].dtype
        worst = float((mine.double() - exact).abs().max() / (1 + exact.abs().max()))
        assert worst < tolerance, f"{name} {worst} {patterns} {tensors[0].shape} {tensors[1].shape}"


def check_drawn(dtype: torch.dtype) -> None:
    """Shapes and patterns of all kinds, alone and in company."""
    draw = random.Random(0)
    for _ in range(40):
        length, width = draw.choice([1, 2, 7, 16, 31, 33, 64, 67, 100, 128, 199]), draw.choice([1, 3, 8, 16, 24, 33, 64, 80])
        batch, key_heads, shared = draw.choice([1, 2]), draw.choice([1, 2, 3]), draw.choice([1, 2])
        size = [draw.choice([1, 2, 3, 5, 16, 17, 32, 48, 64, 100, 400]) for _ in range(4)]
        kinds = [Full(), Local(width=size[0]), Strided(stride=size[1]), LocalOrStrided(width=size[2], stride=size[3]), Fixed(width=size[0])]
        chosen = draw.choices(kinds, k=draw.choice([1, 1, 2, 3]))
        heads = key_heads * shared
        check(inputs(batch, heads, key_heads, length, width, dtype), [chosen[head % len(chosen)] for head in range(heads)])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_blocks_of_torch_equal_masked_attention(choose, dtype):
    choose("torch")
    check_drawn(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_build_equals_masked_attention(choose, build, dtype):
    choose("native")
    check_drawn(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [397, 512])
def test_equals_masked_attention_on_long_rows(dtype, length):
    """A prime and a multiple, as it runs by itself: the native kernel where there is one, else blocks of torch."""
    for pattern in (*BLOCKED, Local(width=length - 1), Fixed(width=300)):
        check(inputs(1, 2, 2, length, 64, dtype), [pattern] * 2)
    check(inputs(1, 4, 2, length, 64, dtype), BLOCKED)


@pytest.mark.parametrize("way", WAYS)
def test_scores_may_be_large(choose, way):
    """Sums of exponentials that would overflow, and keys that weigh nothing: softmax does not see what all scores share."""
    choose(way)
    query, key, value, grad = (tensor.detach() for tensor in inputs(1, 4, 4, 67, 16))
    query[..., 0], key[..., 0] = 10.0, torch.linspace(290, 300, 67)  # scores up to 900, in steps of 0.5
    key[:, :, ::7, 0] = -300
    tensors = [*(tensor.requires_grad_() for tensor in (query, key, value)), grad]
    (out, of_query, of_key, of_value), exact = run(tensors, rules_of(BLOCKED)), masked(tensors, BLOCKED)
    torch.testing.assert_close(out.double(), exact[0], rtol=1e-3, atol=1e-3)  # a float32 score of 900 is one of +- 3e-5
    torch.testing.assert_close(of_value.double(), exact[3], rtol=1e-3, atol=1e-3)
    assert of_query.isfinite().all()
    assert of_key.isfinite().all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(choose, way, poison):
    """In every query that sees it, and in no other head or row."""
    choose(way)
    tensors = [tensor.detach() for tensor in inputs(2, 4, 4, 67, 16)]
    clean, _ = attention(*tensors[:3], rules_of(BLOCKED), 0.3)
    tensors[2][1, 2, 40, 5] = poison
    out, _ = attention(*tensors[:3], rules_of(BLOCKED), 0.3)
    at = torch.arange(67)
    assert not out[1, 2, BLOCKED[2].allows(at, 40), 5].isfinite().any()
    untouched = torch.ones(2, 4, dtype=torch.bool)
    untouched[1, 2] = False
    assert out[untouched].equal(clean[untouched])
    tensors[0][0, 1, 30, 2] = poison
    out, _ = attention(*tensors[:3], rules_of(BLOCKED), 0.3)
    assert not out[0, 1, 30].isfinite().any()
    grads = run([*(tensor.requires_grad_() for tensor in tensors[:3]), tensors[3]], rules_of(BLOCKED))[1:]
    assert all(grad[:, [0, 3]].isfinite().all() for grad in grads)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype):
    tensors = inputs(2, 4, 2, 150, 24, dtype)
    expected = run(tensors, rules_of(BLOCKED))
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        try:
            assert all(mine.equal(one) for mine, one in zip(run(tensors, rules_of(BLOCKED)), expected, strict=True))
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("way", WAYS)
def test_tensors_may_lie_in_memory_as_they_like(choose, way):
    choose(way)
    plain = [tensor.detach().contiguous() for tensor in inputs(2, 4, 4, 50, 8)]
    expected = run([*(tensor.requires_grad_() for tensor in plain[:3]), plain[3]], rules_of(BLOCKED))
    fused = torch.cat([tensor.detach().transpose(1, 2).flatten(2) for tensor in plain], 2)  # [batch, length, 4 * heads * width]
    turned = [tensor.detach().transpose(2, 3).contiguous().transpose(2, 3) for tensor in plain]
    padded = [F.pad(tensor.detach(), (3, 2))[..., 3:-2] for tensor in plain]
    for tensors in ([part.unflatten(2, (4, 8)).transpose(1, 2) for part in fused.chunk(4, 2)], turned, padded):
        found = run([*(tensor.detach().requires_grad_() for tensor in tensors[:3]), tensors[3]], rules_of(BLOCKED))
        for mine, one in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, one)
    one = [tensor.detach()[:1] for tensor in plain]
    several = [tensor.expand(2, -1, -1, -1) for tensor in one]
    assert attention(*several[:3], rules_of(BLOCKED), 0.3)[0][1].equal(attention(*one[:3], rules_of(BLOCKED), 0.3)[0][0])


def test_its_gradient_is_the_derivative(choose):
    choose("torch")
    tensors = inputs(1, 4, 2, 21, 3, torch.float64)[:3]
    assert torch.autograd.gradcheck(lambda *tensors: attention(*tensors, rules_of(BLOCKED), 0.3)[0], tensors)


@pytest.mark.parametrize("length", [21, 150])
def test_is_an_operator_as_torch_wants_it(length):
    torch.library.opcheck(attention, (*inputs(1, 4, 2, length, 8)[:3], rules_of(BLOCKED), 0.3))


def test_under_autocast_it_computes_in_bfloat16():
    query, key, value, _ = inputs(1, 4, 4, 150, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = attention(query, key, value.bfloat16(), rules_of(BLOCKED), 0.3)  # a rotary embedding leaves the others in float32
    halves = (tensor.bfloat16() for tensor in (query, key, value))
    assert out.equal(attention(*halves, rules_of(BLOCKED), 0.3)[0])


# ---- which way runs ---------------------------------------------------------------------------------------------------------------


@needs_native
def test_the_way_follows_from_dtype_and_length(monkeypatch):
    calls = []
    monkeypatch.setattr(kernels, "_call", lambda direction, *_, **__: calls.append(direction))
    for dtype, length, native in [
        (torch.float32, 127, False),
        (torch.float32, 128, True),
        (torch.bfloat16, 128, True),
        (torch.float64, 300, False),
        (torch.float16, 300, False),
    ]:
        calls.clear()
        run(inputs(1, 4, 4, length, 8, dtype), rules_of(BLOCKED))
        assert calls == (["forward", "backward"] if native else []), f"{dtype} {length}"


def test_torch_takes_one_block_for_short_rows_and_causal_attention_where_all_is_seen(monkeypatch):
    calls = []

    def spy(query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Any:
        calls.append((query.shape[2], key.shape[2], options.get("is_causal", False)))
        return forward(query, key, *rest, **options)

    forward = blocks._forward
    monkeypatch.setattr(blocks, "_forward", spy)
    for pattern, length, expected in [
        (Local(width=64), 384, [(384, 384, False)]),
        (Fixed(width=200), 384, [(384, 384, False)]),
        (Local(width=64), 385, [(64, 64, False), *[(64, 127, False)] * 5, (1, 64, False)]),
        (Fixed(width=200), 400, [(64, 64, False), (64, 128, False), (64, 192, False), (64, 256, False), (64, 120, False)]),
        (Strided(stride=200), 400, [(2, 2, False)]),
        (Local(width=384), 384, [(384, 384, True)]),
        (Fixed(width=500), 500, [(500, 500, True)]),
        (LocalOrStrided(stride=1), 500, [(500, 500, True)]),
    ]:
        calls.clear()
        query, key, value, _ = inputs(1, 2, 2, length, 8, torch.float64)
        attention(query, key, value, rules_of([pattern] * 2), 0.3)
        assert calls[: len(expected)] == expected, f"{pattern} {length} {calls}"


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v, r: (q, k[:, :, :-1], v, r),
        lambda q, k, v, r: (q, k, v[..., :-1], r),
        lambda q, k, v, r: (q, k[:, :3], v[:, :3], r),
        lambda q, k, v, r: (q, k.double(), v, r),
        lambda q, k, v, r: (q, k, v, r[:3]),
        lambda q, k, v, r: (q, k, v, r.int()),
        lambda q, k, v, r: (q, k, v, r * 0),
        lambda q, k, v, r: (q[:, :, :0], k[:, :, :0], v[:, :, :0], r),
    ],
)
def test_native_code_is_not_entered_with_what_does_not_fit(change):
    query, key, value, _ = (tensor.detach() for tensor in inputs(1, 4, 4, 150, 8))
    with pytest.raises(ValueError, match=r"\w"):
        attention(*change(query, key, value, rules_of(BLOCKED)), 0.3)


@pytest.mark.parametrize("which", ["out_grad", "out", "log_sum"])
@pytest.mark.parametrize("change", [lambda tensor: tensor[:, :1], lambda tensor: tensor.double()])
def test_gradients_of_another_shape_or_dtype_are_refused(which, change):
    query, key, value, _ = (tensor.detach() for tensor in inputs(1, 4, 4, 150, 8))
    out, log_sum = attention(query, key, value, rules_of(BLOCKED), 0.3)
    given = {"out_grad": out, "out": out, "log_sum": log_sum}
    given[which] = change(given[which])
    with pytest.raises(ValueError, match=r"not torch\.Size"):
        torch.ops.raysparse.attention_backward(given["out_grad"], query, key, value, rules_of(BLOCKED), given["out"], given["log_sum"], 0.3)
