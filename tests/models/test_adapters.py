"""Adapters that merge without touching a zero."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from raysparse.config import ConfigError
from raysparse.models.adapters import AdaptedLinear, MaskLora, ScaleLora, Selective, adapt, changed, is_factor, merge, needs_no_gradient
from raysparse.models.build import ModelConfig, block_linears, build, skeleton
from raysparse.models.multiplied import flops_architecture

SMALL = ModelConfig(preset="debug", overrides={"n_embd": 16, "n_head": 2, "n_layer": 2, "vocab_size": 31, "n_positions": 8})
KINDS = {"mask_lora": MaskLora, "scale_lora": ScaleLora}
IDS = torch.arange(16).view(2, 8)


def sparse_model() -> Any:
    """Three quarters of the blocks' weights are 0."""
    model = build(SMALL, 3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in block_linears(model):
            weight = model.get_parameter(name)
            weight.masked_fill_(torch.rand(weight.shape, generator=generator) < 0.75, 0.0)
    return model


def adapted(kind: str, seed: int = 7, **fields: Any) -> tuple[Any, Any, MaskLora | ScaleLora]:
    """(the model before, the same with adapters whose factors are not at their start any more, their config)."""
    model, config = sparse_model(), KINDS[kind](rank=4, **fields)
    before = copy.deepcopy(model)
    adapt(model, config, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.shape[0]))
    return before, model, config


#           W    0    2   -3    0          s B A = 0.5 * [1, -2] [2, 4, -6, 8]
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mask_lora", [[0.0, 4.0, -6.0, 0.0], [1.0 - 2.0, 0.0, 0.0, 5.0 - 8.0]]),
        ("scale_lora", [[0.0, 2.0 * 3, -3.0 * -2, 0.0], [1.0 * -1, 0.0, 0.0, 5.0 * -7]]),
    ],
)
def test_equations_by_hand(kind, expected):
    weight = torch.tensor([[0.0, 2.0, -3.0, 0.0], [1.0, 0.0, 0.0, 5.0]])
    a, b = torch.tensor([[2.0, 4.0, -6.0, 8.0]]), torch.tensor([[1.0], [-2.0]])
    found = changed(weight, a, b, kind, 0.5)
    assert found.tolist() == expected
    assert not torch.signbit(found[weight == 0]).any(), "a -0 is not the zero that was there"


@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_the_pruned_model(kind):
    model = sparse_model()
    with torch.no_grad():
        before = model(IDS).logits
        adapt(model, KINDS[kind](rank=4), 7)
        assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_logits_are_those_of_the_adapters_and_no_zero_is_touched(kind):
    before, model, config = adapted(kind)
    plain = merge(dict(model.state_dict()), config)
    assert plain.keys() == before.state_dict().keys()
    merged = build(SMALL, 3)
    merged.load_state_dict(plain)
    with torch.no_grad():
        found, expected = merged(IDS).logits, model(IDS).logits
        assert (expected - before(IDS).logits).abs().max() > 1e-3, "the adapters change nothing"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for name in block_linears(before):
        dead, weight = before.get_parameter(name) == 0, merged.get_parameter(name)
        assert dead.any()
        assert not weight[dead].any()
        assert not torch.signbit(weight[dead]).any()
        assert (weight[~dead] != before.get_parameter(name)[~dead]).float().mean() > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_named_gets_gradients_and_those_are_right(kind):
    _, model, _ = adapted(kind)
    model(IDS, labels=IDS).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    names = [name for name, _ in model.named_parameters()]
    assert trained == {name for name in names if is_factor(name) or name.endswith("bias") or ".ln_" in name}
    layer = next(module for module in model.modules() if isinstance(module, AdaptedLinear)).double()
    x = torch.randn(2, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(lambda *_: layer(x).square().sum(), (x, layer.lora_a, layer.lora_b, layer.bias))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_formula(kind, dtype):
    """Of torch's own autograd through W', also with autocast."""
    _, model, config = adapted(kind)
    layer = next(module for module in model.modules() if isinstance(module, AdaptedLinear))
    x, of = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1)), (layer.lora_a, layer.lora_b, layer.bias)
    weights = torch.linspace(-1, 1, 2 * 3 * 48).view(2, 3, 48)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found = layer(x)
        expected = torch.nn.functional.linear(x, changed(layer.weight, *of[:2], kind, config.alpha / config.rank), layer.bias)
    assert found.dtype == dtype
    rtol, atol = (1e-5, 1e-6) if dtype == torch.float32 else (0.05, 0.02)  # of bfloat16: 8 bits, which the two round in other places
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    pairs = [torch.autograd.grad((y.float() * weights).sum(), of) for y in (found, expected)]
    for ours, theirs in zip(*pairs, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=10 * atol)


@pytest.mark.parametrize("kind", KINDS)
def test_no_copy_of_a_weight_is_kept_for_the_backward_pass(kind):
    _, model, _ = adapted(kind)
    layer = next(module for module in model.modules() if isinstance(module, AdaptedLinear))
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.ones(1, 3, 16, requires_grad=True))
    of_that_size = [tensor for tensor in kept if tensor.numel() >= layer.weight.numel()]
    assert [tensor.data_ptr() for tensor in of_that_size] == [layer.weight.data_ptr()]


def test_all_ranks_of_the_product_learn():
    """The paper's start of ScaleLoRA, all entries equal, would keep the product at rank one."""
    model = sparse_model()
    adapt(model, ScaleLora(rank=4), 7)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS, labels=IDS.flip(1)).loss.backward()
        optimizer.step()
    layer = model.transformer.h[0].mlp.c_fc
    values = torch.linalg.svdvals((layer.lora_b @ layer.lora_a).detach())
    assert values[3] > 1e-4 * values[0] > 0


@pytest.mark.parametrize(
    ("train", "trained"),
    [
        (("bias",), {"transformer.ln_f.bias", "transformer.h.0.ln_1.bias", "transformer.h.0.mlp.c_fc.bias"}),
        (("norm",), {"transformer.ln_f.bias", "transformer.ln_f.weight", "transformer.h.0.ln_1.weight"}),
        (("head",), {"transformer.wte.weight"}),
    ],
)
def test_selective(train, trained):
    model = sparse_model()
    adapt(model, Selective(train=train), 7)
    found = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found >= trained
    assert not any(is_factor(name) for name, _ in model.named_parameters())
    if train == ("norm",):
        assert all(".ln_" in name for name in found)
    if train == ("head",):
        assert found == trained


def test_factors_are_a_function_of_the_seed_and_the_name():
    torch.manual_seed(1)
    first = dict(adapted("mask_lora")[1].named_parameters())
    torch.manual_seed(2)
    again, other = (dict(adapted("mask_lora", seed=seed)[1].named_parameters()) for seed in (7, 8))
    names = [name for name in first if name.endswith("lora_a")]
    assert len(names) == 8
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in names)
    assert not torch.equal(first[names[0]], first[names[4]])  # of one shape


def test_flops_are_those_of_the_plain_model():
    model = skeleton(SMALL)
    before = flops_architecture(model)
    adapt(model, MaskLora(rank=4), 7)
    assert flops_architecture(model) == before
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert needs_no_gradient([*before.linears, before.head], trained) == {before.head}
    selective = skeleton(SMALL)
    adapt(selective, Selective(train=("norm", "head")), 7)
    trained = {name: parameter.requires_grad for name, parameter in selective.named_parameters()}
    assert needs_no_gradient([*before.linears, before.head], trained) == before.linears.keys()


def test_a_rank_above_the_smaller_side_is_refused():
    expected = r"adapters.rank of at most 16, the smaller side of transformer.h.0.attn.c_attn.weight \[48, 16\]. Got 17"
    with pytest.raises(ConfigError, match=expected):
        adapt(skeleton(SMALL), MaskLora(rank=17), 7)
    adapt(skeleton(SMALL), MaskLora(rank=16), 7)


def test_linear_layers_of_another_class_are_refused():
    class Own(nn.Linear):
        pass

    model: Any = skeleton(SMALL)
    model.transformer.h[1].mlp.c_fc.__class__ = Own
    with pytest.raises(ConfigError, match=r"Got transformer\.h\.1.mlp.c_fc.weight in a Own"):
        adapt(model, MaskLora(rank=4), 7)


def test_nothing_to_train_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 31}
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(**small))
    with pytest.raises(ConfigError, match=r"adapters.train=\['bias'\], of which LlamaForCausalLM has none"):
        adapt(llama, Selective(train=("bias",)), 7)
    adapt(llama, Selective(train=("norm",)), 7)
    assert {name.split(".")[-2] for name, parameter in llama.named_parameters() if parameter.requires_grad} == {
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    }
