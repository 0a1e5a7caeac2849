"""A linear layer that skips its zeros is a linear layer: to autograd, to the compiler, to FSDP2 and to transformers' models."""

import gc
import threading
import weakref
from copy import deepcopy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raysparse.kernels import linear
from raysparse.kernels.linear import DENSE, SPARSE, Products, SparseLinear, adopt
from raysparse.kernels.stream import Use
from raysparse.models.layout import to_linear
from tests.kernels.streams import bits_of
from tests.ranks import spawn

pytestmark = pytest.mark.usefixtures("native")

ALL_PRODUCTS = [Products(*which) for which in product([False, True], repeat=3)]


def random_mask(rows: int, cols: int, seed: int = 0, density: float = 0.25) -> Tensor:
    return torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) < density


def masked(rows: int, cols: int, bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[nn.Linear, Tensor]:
    """An ordinary layer whose dead weights are zero, and its mask."""
    torch.manual_seed(seed)
    layer, mask = nn.Linear(cols, rows, bias, dtype=dtype), random_mask(rows, cols, seed)
    with torch.no_grad():
        layer.weight.mul_(mask)
    return layer, mask


def sparse(layer: nn.Linear, mask: Tensor, products: Products = SPARSE, dtype: torch.dtype | None = None) -> SparseLinear:
    copy = adopt(deepcopy(layer))
    copy.sparsify(bits_of(mask), dtype or layer.weight.dtype, products)
    return copy


def results(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of a loss that weighs every output differently."""
    x = x.clone().requires_grad_()
    y = layer(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}  # type: ignore[dict-item]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], mask: Tensor | None, tolerance: float) -> None:
    """Within `tolerance` of the largest; the gradient of dead weights, where there is a mask, exactly zero."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name == "weight" and mask is not None:
            value = value.masked_fill(~mask, 0)
            assert not found[name][~mask].any()
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        atol = tolerance * float(value.abs().max()) if value.numel() else 0
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float64: 1e-12}
"""Of the largest number: rounding of the result, and of float32 sums in another order."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("products", ALL_PRODUCTS, ids=str)
def test_all_results_are_those_of_the_dense_layer(products, dtype):
    for bias in (True, False):
        layer, mask = masked(50, 70, bias, dtype)
        x = torch.randn(3, 11, 70, dtype=dtype)
        found = results(sparse(layer, mask, products), x)
        assert_equal(found, results(layer, x), mask if products.any else None, TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(70,), (0, 70), (1, 70), (2, 0, 70), (2, 3, 1, 70)], ids=str)
def test_any_shape_of_input(shape):
    layer, mask = masked(50, 70)
    x = torch.randn(shape)
    assert_equal(results(sparse(layer, mask), x), results(layer, x), mask, TOLERANCE[torch.float32])


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 70), (70, 1), (0, 5), (5, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
def test_any_shape_of_weight(rows, cols):
    layer, mask = masked(rows, cols)
    x = torch.randn(2, 3, cols)
    assert_equal(results(sparse(layer, mask), x), results(layer, x), mask, TOLERANCE[torch.float32])


def test_views_are_read_as_they_are():
    """Transposed and sliced activations, an expanded gradient, a transposed weight."""
    layer, mask = masked(50, 70)
    other = sparse(layer, mask)
    for each in (layer, other):
        each.weight.data = each.weight.data.t().contiguous().t()
    for x in (torch.randn(70, 9).t(), torch.randn(9, 140)[:, ::2], torch.randn(70).expand(9, 70)):
        assert_equal(results(other, x), results(layer, x), mask, TOLERANCE[torch.float32])
    found, expected = (torch.autograd.grad(each(x).sum(), each.weight)[0] for each in (other, layer))
    torch.testing.assert_close(found, expected.masked_fill(~mask, 0))


def test_gradcheck_in_float64():
    """In a dtype without kernels the products are dense, and the operator's formula is checked alone."""
    layer, mask = masked(5, 7, dtype=torch.float64)
    other = sparse(layer, mask, dtype=torch.float32)
    inputs = (torch.randn(3, 7, dtype=torch.float64, requires_grad=True), layer.weight, layer.bias, other.number)
    other.dense_gradient = True
    assert torch.autograd.gradcheck(torch.ops.raysparse.linear, inputs)


def test_derivatives_in_float32():
    """The layer is linear in each argument, so a difference is the derivative: for any size of step, with no error but rounding."""
    layer, mask = masked(30, 40)
    other = sparse(layer, mask)
    torch.manual_seed(1)
    x, dy = torch.randn(9, 40), torch.randn(9, 30)
    for name, step in {"x": torch.randn(9, 40), "weight": torch.randn(30, 40) * mask, "bias": torch.randn(30)}.items():
        arguments = {"x": x, "weight": layer.weight.detach(), "bias": layer.bias.detach()}
        moved = arguments | {name: arguments[name] + step}
        with torch.no_grad():
            a, b = (torch.ops.raysparse.linear(*values.values(), other.number) for values in (arguments, moved))
        leaves = {key: value.clone().requires_grad_() for key, value in arguments.items()}
        torch.ops.raysparse.linear(*leaves.values(), other.number).backward(dy)
        derivative = (leaves[name].grad * step).sum()
        torch.testing.assert_close(((b - a) * dy).sum(), derivative, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    layer, mask = masked(5, 7, dtype=dtype)
    other = sparse(layer, mask)
    for shape in ((3, 7), (2, 3, 7)):
        x = torch.randn(shape, dtype=dtype)
        for bias in (layer.bias, None):
            torch.library.opcheck(torch.ops.raysparse.linear, (x.requires_grad_(), layer.weight, bias, other.number))
        arguments = (torch.randn(*shape[:-1], 5, dtype=dtype), x.detach(), layer.weight.detach(), other.number)
        for asked in product([False, True], repeat=2):
            torch.library.opcheck(torch.ops.raysparse.linear_backward, (*arguments, *asked))


# --- what a layer does with its mask -----------------------------------------------------------------------------------


def test_another_mask_is_taken_at_once():
    layer, first = masked(50, 70)
    other = sparse(layer, first)
    x = torch.randn(9, 70)
    for seed in (1, 2):
        mask = random_mask(50, 70, seed)
        for each in (layer, other):
            each.zero_grad()
            each.weight.data = torch.randn(50, 70, generator=torch.Generator().manual_seed(seed)) * mask
        other.sparsify(bits_of(mask), torch.float32, SPARSE)
        assert_equal(results(other, x), results(layer, x), mask, TOLERANCE[torch.float32])


def test_without_a_mask_it_is_an_ordinary_layer():
    layer, mask = masked(50, 70)
    adopted, densified = adopt(deepcopy(layer)), sparse(layer, mask)
    densified.densify()
    x = torch.randn(9, 70)
    expected = results(layer, x)
    for other in (adopted, densified):
        assert other.products == DENSE
        found = results(other, x)
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_dense_gradient_is_of_all_weights_while_it_is_set():
    layer, mask = masked(50, 70)
    other = sparse(layer, mask)
    x = torch.randn(9, 70)
    expected = results(layer, x)
    other.dense_gradient = True
    assert_equal(results(other, x), expected, None, TOLERANCE[torch.float32])
    assert other.weight.grad is not None
    assert other.weight.grad[~mask].any()
    other.dense_gradient = False
    other.zero_grad()
    assert_equal(results(other, x), expected, mask, TOLERANCE[torch.float32])


def test_held_weights_are_read_once_until_released(monkeypatch):
    layer, mask = masked(50, 70)
    other = sparse(layer, mask)
    loads: list[Use] = []
    load = linear.Stream.load
    monkeypatch.setattr(linear.Stream, "load", lambda stream, weight: (loads.append(stream.use), load(stream, weight)))
    x = torch.randn(9, 70)
    once = [Use.FORWARD, Use.BACKWARD]
    results(other, x), results(other, x)
    assert loads == once * 2
    other.held = True
    for factor in (1, -2):
        with torch.no_grad():
            layer.weight.mul_(factor), other.weight.mul_(factor)
        other.release()
        loads.clear()
        for _ in range(3):
            other.zero_grad(), layer.zero_grad()
            assert_equal(results(other, x), results(layer, x), mask, TOLERANCE[torch.float32])
        assert loads == once
    other.sparsify(bits_of(mask), torch.float32, SPARSE)
    loads.clear()
    results(other, x)
    assert loads == once


def test_only_what_is_asked_for_is_computed(monkeypatch):
    layer, mask = masked(50, 70)
    other = sparse(layer, mask)
    used: list[str] = []
    for name in ("multiply", "gradient"):
        method = getattr(linear.Stream, name)
        monkeypatch.setattr(linear.Stream, name, lambda s, *a, method=method: (used.append(s.use.name), method(s, *a))[1])
    x = torch.randn(9, 70)
    other(x).sum().backward()
    assert used == ["FORWARD", "GRADIENT"]
    used.clear()
    other.weight.requires_grad_(False)
    x.requires_grad_()
    other(x).sum().backward()
    assert used == ["FORWARD", "BACKWARD"]
    used.clear()
    with torch.no_grad():
        other(x)
    assert used == ["FORWARD"]
    used.clear()
    (layer.double()(x.double()).sum() + other.double()(x.double()).sum()).backward()
    assert used == []  # no kernel of this dtype


def test_a_copy_is_a_layer_of_its_own():
    layer, mask = masked(50, 70)
    first = sparse(layer, mask)
    first.held = True
    x = torch.randn(9, 70)
    first(x)
    second, live = deepcopy(first), random_mask(50, 70, 5)
    assert second.number != first.number
    with torch.no_grad():
        second.weight.copy_(layer.weight * 3)
    torch.testing.assert_close(second(x), F.linear(x, layer.weight * 3, layer.bias))
    second.sparsify(bits_of(live), torch.float32, SPARSE)
    torch.testing.assert_close(first(x), layer(x))
    torch.testing.assert_close(second(x), F.linear(x, layer.weight * 3 * live, layer.bias))


def test_a_layer_that_is_gone_leaves_nothing():
    layer, mask = masked(50, 70)
    other = sparse(layer, mask)
    number, stream = int(other.number), weakref.ref(other.stream(Use.FORWARD))
    other(torch.randn(3, 70, requires_grad=True)).sum().backward()
    del other
    gc.collect()
    assert stream() is None
    assert number not in linear._LAYERS


def test_a_layer_that_is_gone_before_its_backward_pass_says_so():
    other = sparse(*masked(50, 70))
    y = other(torch.randn(3, 70, requires_grad=True))
    del other
    gc.collect()
    with pytest.raises(RuntimeError, match="Keep a reference to its model"):
        y.sum().backward()


def test_threads_may_share_a_layer(native):
    """The first pass loads the values; none may see them half loaded, nor memory move under it."""
    layer, mask = masked(600, 500)
    other, x = sparse(layer, mask), torch.randn(4, 500)
    expected, start, found = layer(x).detach(), threading.Barrier(4), []

    def run():
        with torch.no_grad():
            start.wait()
            found.extend(other(x) for _ in range(8))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 32
    for y in found:
        torch.testing.assert_close(y, expected)


def test_input_of_another_width_or_between_addresses_is_refused(native):
    other = sparse(*masked(50, 70))
    with pytest.raises((ValueError, RuntimeError), match=r"70|shape"):
        other(torch.ones(2, 60))
    odd = torch.frombuffer(bytearray(4 * 140 + 1), dtype=torch.float32, offset=1).view(2, 70)
    with pytest.raises(ValueError, match="between two of them"):
        other(odd)


@pytest.mark.parametrize("wrong", [nn.Bilinear(2, 3, 4), adopt(nn.Linear(2, 3)), nn.modules.linear.NonDynamicallyQuantizableLinear(2, 3)])
def test_only_plain_linear_layers_are_adopted(wrong):
    with pytest.raises(AssertionError):
        adopt(wrong)


def test_a_weight_of_another_shape_is_refused():
    other = sparse(*masked(50, 70))
    with pytest.raises(ValueError, match=r"\(70, 50\)"):
        torch.ops.raysparse.linear(torch.ones(2, 50), other.weight.t(), None, other.number)


# --- in company -------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two layers and what stands between them."""

    def __init__(self, products: Products | None, width: int = 48, seed: int = 0, dtype: torch.dtype = torch.float32):
        super().__init__()
        parts = [masked(2 * width, width, True, dtype, seed), masked(width, 2 * width, True, dtype, seed + 1)]
        self.up, self.down = (layer if products is None else sparse(layer, mask, products) for layer, mask in parts)
        self.masks = [mask for _, mask in parts]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


def assert_blocks_equal(found: nn.Module, expected: nn.Module, x: Tensor, tolerance: float, masks: list[Tensor] | None = None) -> None:
    a, b = results(found, x), results(expected, x)
    assert a.keys() == b.keys()
    masks = masks or [mask for block in expected.modules() if isinstance(block, Block) for mask in block.masks]
    for name, mask in zip((name for name in b if name.endswith("weight")), masks, strict=True):
        b[name] = b[name].masked_fill(~mask, 0)
    assert_equal(a, b, None, tolerance)


def test_activation_checkpointing():
    class Recomputed(nn.Module):
        def __init__(self, block: Block):
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=False)

    x = torch.randn(2, 9, 48)
    a, b = results(Recomputed(Block(SPARSE)), x), results(Block(SPARSE), x)
    assert all(torch.equal(a[name if name in a else f"block.{name}"], value) for name, value in b.items())


def test_autocast_computes_in_bfloat16():
    layer, mask = masked(50, 70)
    other = sparse(layer, mask, dtype=torch.bfloat16)
    x = torch.randn(9, 70)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = results(other, x), results(layer, x)
    assert found["y"].dtype == torch.bfloat16
    assert found["weight"].dtype == torch.float32
    assert_equal(found, expected, mask, 2 * TOLERANCE[torch.bfloat16])


def test_autocast_to_another_type_is_dense():
    layer, mask = masked(50, 70)
    x = torch.randn(5, 70)
    with torch.autocast("cpu", torch.float16):
        assert sparse(layer, mask)(x).dtype == layer(x).dtype == torch.float16


def test_streams_of_another_dtype_than_autocast_leave_dead_gradients_zero():
    """Products are dense then, and the mask is all that keeps dead weights dead."""
    layer, mask = masked(50, 70)
    x = torch.randn(9, 70)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = results(sparse(layer, mask, SPARSE, torch.float32), x), results(layer, x)
    assert_equal(found, expected, mask, 2 * TOLERANCE[torch.bfloat16])


def test_compiled_whole_and_not_anew_for_another_mask():
    """The streams are no part of the graph."""
    torch.compiler.reset()
    blocks, plain = Block(SPARSE), Block(None)
    compiled = torch.compile(blocks, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 9, 48)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            for layer, twin, i in ((blocks.up, plain.up, 0), (blocks.down, plain.down, 1)):
                mask = random_mask(*layer.weight.shape, seed)
                weight = torch.randn(layer.weight.shape) * mask
                layer.weight.data, twin.weight.data, plain.masks[i] = weight, weight.clone(), mask
                layer.sparsify(bits_of(mask), torch.float32, SPARSE)
                layer.release()
            blocks.zero_grad(), plain.zero_grad()
            a, b = results(compiled, x), results(plain, x)
            a = {name.removeprefix("_orig_mod."): value for name, value in a.items()}
            for i, name in enumerate(("up.weight", "down.weight")):
                b[name] = b[name].masked_fill(~plain.masks[i], 0)
            assert_equal(a, b, None, 1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks at a block's input
def test_compiled_block_by_block_is_compiled_once():
    """As in training: equal blocks share their code, whatever the number of a layer."""
    torch.compiler.reset()
    model = nn.Sequential(*(Block(SPARSE, seed=3 * i) for i in range(3)))
    plain = nn.Sequential(*(Block(None, seed=3 * i) for i in range(3)))
    x = torch.randn(2, 9, 48)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for block in model:
            block.compile(fullgraph=True, backend="aot_eager")
        assert_blocks_equal(model, plain, x, 1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_compiled_to_native_code():
    torch.compiler.reset()
    block, plain = Block(SPARSE), Block(None)
    compiled = torch.compile(block, fullgraph=True)
    x = torch.randn(2, 9, 48)
    a, b = results(compiled, x), results(plain, x)
    for i, name in enumerate(("up.weight", "down.weight")):
        b[name] = b[name].masked_fill(~plain.masks[i], 0)
    assert_equal({name.removeprefix("_orig_mod."): value for name, value in a.items()}, b, None, 1e-5)


def sharded(dtype: torch.dtype | None) -> tuple[dict[str, float], int]:
    """Under FSDP2, two steps: distance of the sparse blocks' results from the dense ones', as a share of the largest, and loads."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    found: dict[str, dict[str, Tensor]] = {}
    loads, load = [], linear.Stream.load
    linear.Stream.load = lambda stream, weight: (loads.append(stream.use), load(stream, weight))[1]
    for which in ("sparse", "dense"):
        model = nn.Sequential(*(Block(None, seed=3 * i) for i in range(2)))
        masks = {name: mask for i, block in enumerate(model) for name, mask in zip((f"{i}.up", f"{i}.down"), block.masks, strict=True)}
        layers = {name: adopt(model.get_submodule(name)) for name in masks} if which == "sparse" else {}
        for block in model:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        for name, layer in layers.items():
            layer.held = True
            layer.sparsify(bits_of(masks[name]), dtype or torch.float32, SPARSE)
        x = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(torch.distributed.get_rank()))
        for _ in range(2):
            model.zero_grad()
            for layer in layers.values():
                layer.release()
            y = model(x)
            y.float().square().sum().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 1e-3 * parameter.grad
                for name, mask in masks.items():
                    weight = model.get_submodule(name).weight
                    weight *= torch.distributed.tensor.distribute_tensor(mask.float(), weight.device_mesh, weight.placements)
        values = {name: p.grad.full_tensor() for name, p in model.named_parameters() if isinstance(p.grad, DTensor)}
        for name, mask in masks.items():
            values[f"{name}.weight"] = values[f"{name}.weight"] * mask
        found[which] = values | {"y": y.detach().float()}
    assert found["sparse"].keys() == found["dense"].keys()
    assert len(found["dense"]) == 9
    expected, values = found["dense"], found["sparse"]
    return {name: float((value - values[name]).abs().max() / value.abs().max()) for name, value in expected.items()}, len(loads)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_under_fsdp2(dtype):
    for distances, loads in spawn(sharded, 2, dtype):
        assert loads == 2 * (4 + 3)  # of four layers' streams, forth and back; the first needs no gradient of its input
        assert max(distances.values()) < (1e-5 if dtype is None else 3e-2)


# --- transformers' models ----------------------------------------------------------------------------------------------


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60,
            hidden_size=32,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def whisper():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = WhisperConfig(
        vocab_size=60, num_mel_bins=8, **sizes, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=10, max_target_positions=16,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, decoder_start_token_id=0, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config)


@pytest.mark.parametrize("make", [gpt2, llama, t5, whisper])
def test_models_of_transformers(make):
    torch.manual_seed(0)
    model = to_linear(make()).eval()  # no dropout
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear and module is not head]
    assert len(names) >= 8
    masks = {name: random_mask(*model.get_submodule(name).weight.shape, seed) for seed, name in enumerate(names)}
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_submodule(name).weight.mul_(mask)
    twin = deepcopy(model)
    for name, mask in masks.items():
        adopt(twin.get_submodule(name)).sparsify(bits_of(mask), torch.float32, SPARSE)
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    inputs = {"input_features": torch.randn(2, 8, 20)} if make is whisper else {"input_ids": ids}
    found = []
    for each in (twin, model):
        result = each(**inputs, labels=ids)
        result.loss.backward()
        found.append({"logits": result.logits.detach()} | {name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    for name, mask in masks.items():
        found[1][f"{name}.weight"].mul_(mask)
    assert_equal(found[0], found[1], None, 5e-5)
