"""What int8 does to the layers of each family: zeros, numbers, and the training that sees them coming."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raysparse.config import ConfigError
from raysparse.models import int8
from raysparse.models.build import block_linears
from raysparse.models.int8 import KINDS, AwareLinear, check_package, check_zeros, make_aware, quantize, rounded
from raysparse.models.layout import to_linear
from tests.models.test_sparse_set import gpt2, llama, mpt, t5, whisper

pytest.importorskip("torchao", reason="pip install 'raysparse[int8]'")
FAMILIES = [gpt2, llama, mpt, t5, whisper]
HALVED = "torchao halves the range of int8 on CPUs without VNNI"


def full_range() -> bool:
    from torchao.utils import should_reduce_range

    return not should_reduce_range(torch.device("cpu"))


def made(family) -> nn.Module:
    """Weights large enough that layers matter."""
    torch.manual_seed(0)
    model = to_linear(family()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.2)
    return model


def prune(model: nn.Module, n: int, m: int) -> None:
    """The n largest of every m weights in a row live."""
    with torch.no_grad():
        for name in block_linears(model):
            weight = model.get_parameter(name)
            groups = weight.view(-1, m)
            groups[torch.zeros_like(groups).scatter_(1, groups.abs().topk(m - n, largest=False).indices, 1).bool()] = 0.0


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(24).view(2, 12) % 50
    config = model.config
    inputs = {"input_ids": ids}
    if config.model_type == "whisper":
        frames = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions, generator=torch.Generator().manual_seed(1))
        inputs = {"input_features": frames, "decoder_input_ids": ids}
    elif config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(0)
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (8, 8)], ids=["1:4", "2:4", "dense"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_zeros_stay_zeros_and_logits_stay_close(family, n, m, kind):
    model = made(family)
    prune(model, n, m)
    before, expected = {name: p.detach().clone() for name, p in model.named_parameters()}, logits(model)
    told = quantize(model, kind)
    sparse = {name: model.get_parameter(name) for name in block_linears(model)}
    live = {name: before[name] != 0 for name in sparse}
    for name, weight in sparse.items():
        values = weight.dequantize()
        assert not values[~live[name]].any()
        assert not weight.zero_point.any()
        assert int((values.view(-1, m) != 0).sum(1).max()) <= n
        step = before[name].abs().amax(1, keepdim=True) / ((told["highest"] - told["lowest"]) / 2)
        assert ((values - before[name]).abs() <= 0.501 * step).all()
        assert (values != before[name]).any()
    for name, parameter in model.named_parameters():
        assert name in sparse or torch.equal(parameter, before[name])
    assert told["live"] == sum(int(mask.sum()) for mask in live.values()) == told["weights"] * n // m
    assert told["nnz"] == sum(int(weight.dequantize().count_nonzero()) for weight in sparse.values())
    assert told["rounded_to_zero"] == told["live"] - told["nnz"]
    assert (told["type"], told["layers"]) == (kind, len(sparse))
    error = (logits(model) - expected).norm() / expected.norm()
    assert 0 < error < 10 / (told["highest"] - told["lowest"])


def block(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Module:
    """A model of one block, which is one layer."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict({"layer": layer})])})


def layer_of(model: nn.Module) -> nn.Module:
    return model.get_submodule("h.0.layer")


DRAWN = torch.tensor(
    [
        [127.5, 1.0, 0.4, 0.0, -127.5],  # scale 1: halves go to the even number, 128 is cut off
        [0.0, -0.0, 0.0, 0.0, 0.0],
        [-255.0, 0.9, 1.1, 0.0, 127.5],  # scale 2
    ]
)
WHOLE = [[127, 1, 0, 0, -128], [0, 0, 0, 0, 0], [-128, 0, 1, 0, 64]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.skipif(not full_range(), reason=HALVED)
def test_a_drawn_weight(kind):
    model = block(DRAWN)
    told = quantize(model, kind)
    assert layer_of(model).weight.qdata.tolist() == rounded(DRAWN)[0].tolist() == WHOLE
    assert (told["live"], told["nnz"], told["rounded_to_zero"]) == (8, 6, 2)


def test_half_the_range_where_sums_would_overflow(monkeypatch):
    """As on CPUs without VNNI: scale 255 / 127 for weights and inputs; of weights alone nothing changes."""
    monkeypatch.setattr("torchao.utils.should_reduce_range", lambda device: True)
    for kind, lowest, highest in (("int8", -64, 63), ("int8_weight_only", -128, 127)):
        told = quantize(model := block(DRAWN), kind)
        assert (told["lowest"], told["highest"]) == (lowest, highest)
        weight = layer_of(model).weight
        assert (int(weight.qdata.min()), int(weight.qdata.max())) == (lowest, highest)
        assert not weight.qdata[DRAWN == 0].any()


def test_rounding_has_the_bits_of_torchao():
    from torchao.quantization import Int8Tensor, PerRow

    values = torch.randn(4, 50, 96) * torch.logspace(-9, 3, 50)[:, None]
    values[0, :, 3] *= 1000
    values[1] = 0.0
    theirs = Int8Tensor.from_hp(values, PerRow())
    whole, scale = rounded(values)
    assert torch.equal(whole, theirs.qdata.float())
    assert torch.equal(scale, theirs.scale)


def drawn(rows: int, cols: int, tokens: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(rows, cols, generator=generator).masked_fill(torch.rand(rows, cols, generator=generator) < 0.75, 0.0)
    return weight, torch.randn(rows, generator=generator), torch.randn(*tokens, cols, generator=generator)


@pytest.mark.skipif(not full_range(), reason=HALVED)
@pytest.mark.parametrize("tokens", [(1,), (3, 7)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("cols", [20, 1024])
def test_training_sees_what_torchao_computes(cols, with_bias, tokens):
    weight, bias, x = drawn(24, cols, tokens)
    outputs = {}
    for kind in KINDS:
        aware, done = block(weight, bias if with_bias else None), block(weight, bias if with_bias else None)
        make_aware(aware, kind)
        quantize(done, kind)
        with torch.no_grad():
            outputs[kind] = layer_of(aware)(x), layer_of(done)(x)
    assert torch.equal(*outputs["int8"])  # sums of whole numbers
    torch.testing.assert_close(*outputs["int8_weight_only"])
    plain = F.linear(x, weight, bias if with_bias else None)
    errors = [float((outputs[kind][0] - plain).norm() / plain.norm()) for kind in KINDS]
    assert 1e-4 < errors[1] < errors[0] < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_go_straight_through(kind):
    weight, bias, x = drawn(24, 20, (3, 7))
    model = block(weight, bias)
    make_aware(model, kind)
    layer = layer_of(model)
    assert isinstance(layer, AwareLinear)
    x.requires_grad_()
    layer(x).square().sum().backward()
    found = x.grad, layer.weight.grad, layer.bias.grad

    def straight(values: torch.Tensor) -> torch.Tensor:
        whole, scale = rounded(values)
        return values + (whole * scale - values).detach()

    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, weight, bias)]
    inputs = straight(leaves[0]) if kind == "int8" else leaves[0]
    F.linear(inputs, straight(leaves[1]), leaves[2]).square().sum().backward()
    for gradient, leaf in zip(found, leaves, strict=True):
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_compiled_whole():
    torch.compiler.reset()
    weight, bias, x = drawn(24, 20, (3, 7))
    results = []
    for backend in (None, "aot_eager"):
        make_aware(model := block(weight, bias), "int8")
        layer, inputs = layer_of(model), x.clone().requires_grad_()
        call = layer if backend is None else torch.compile(layer, fullgraph=True, backend=backend)
        call(inputs).square().sum().backward()
        results.append([inputs.grad, layer.weight.grad, layer.bias.grad])
    torch.testing.assert_close(*results)


def test_bfloat16_holds_the_whole_numbers():
    weight, bias, x = drawn(24, 96, (5,))
    model = block(weight, bias)
    make_aware(model, "int8")
    whole = layer_of(model)(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer_of(model)(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), whole, rtol=2e-2, atol=6e-2)


def test_a_skeleton_is_made_aware_and_keeps_its_names():
    with torch.device("meta"):
        model = to_linear(t5())
    names = [name for name, _ in model.named_parameters()]
    make_aware(model, "int8")
    assert [name for name, _ in model.named_parameters()] == names
    kinds = {name: type(model.get_submodule(name.removesuffix(".weight"))) for name in names if name.endswith(".weight")}
    assert {name for name, kind in kinds.items() if kind is AwareLinear} == set(block_linears(model))


def test_a_lost_zero_is_an_error(monkeypatch):
    import torchao.quantization

    whole = torchao.quantization.quantize_

    def asymmetric(model, config, filter_fn):
        whole(model, config, filter_fn)
        layer_of(model).weight.qdata[2, 3] = 1

    monkeypatch.setattr(torchao.quantization, "quantize_", asymmetric)
    with pytest.raises(ConfigError, match=r"int8 weights of h\.0\.layer\.weight to be 0 where the model's are\. Got 1 that are not"):
        quantize(block(DRAWN), "int8")
    check_zeros("w", DRAWN, DRAWN.masked_fill(DRAWN.abs() < 0.5, 0.0))  # fewer live weights are none


def test_what_cannot_be_rounded_is_said(monkeypatch):
    weight = DRAWN.clone()
    weight[0, 0] = torch.inf
    with pytest.raises(ConfigError, match=r"Expected finite weights for int8\. Got inf or NaN in h\.0\.layer\.weight\. Use weights=dense"):
        quantize(block(weight), "int8")

    class Own(nn.Linear):
        pass

    model = block(DRAWN)
    layer_of(model).__class__ = Own
    with pytest.raises(ConfigError, match=r"Expected linear layers of torch's own class for quantization=int8\. Got h.* in a Own"):
        make_aware(model, "int8")
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    with pytest.raises(ConfigError, match=r"Expected the package torchao for int8\. Got: .* pip install 'raysparse\[int8\]'"):
        check_package()
    with pytest.raises(ConfigError, match="Expected the package torchao"):
        int8.quantize(block(DRAWN), "int8")
