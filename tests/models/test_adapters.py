"""Adapters begin as the weight, keep its zeros, and merged are the same layer."""

import pytest
import torch

from raysparse.config import ConfigError
from raysparse.models.adapters import AdaptersConfig, _Product, install, is_adapter, merge, merged
from raysparse.models.build import ModelConfig, block_linears, build, flops_architecture

SIZE = ModelConfig(preset="debug", overrides={"n_embd": 24, "n_head": 2, "n_layer": 2, "vocab_size": 53})
IDS = torch.randint(53, (2, 9), generator=torch.Generator().manual_seed(1))


def made(config):
    """A model with half of its block weights zero, before and after adapters."""
    model = build(SIZE, 0, context=16)
    names = block_linears(model)
    for name in names:
        weight = model.get_parameter(name)
        weight.data[torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.5] = 0
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    install(model, config, names, 3)
    return model, before, names


@pytest.mark.parametrize("kind", ["mask_lora", "scale_lora"])
def test_adapters_begin_as_the_weight_and_merge_to_the_same_layer(kind):
    config = AdaptersConfig(type=kind, rank=4)
    plain = build(SIZE, 0, context=16)
    model, before, names = made(config)
    plain.load_state_dict(before, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-5, atol=1e-5)
        generator = torch.Generator().manual_seed(4)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        weights = merge(dict(model.named_parameters()), config)
        assert weights.keys() == before.keys()
        plain.load_state_dict(weights, strict=False)
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-5, atol=1e-5)
    for name in names:
        dead = before[name] == 0
        assert (weights[name][dead] == 0).all()
        assert not torch.signbit(weights[name][dead]).any()
        assert (weights[name][~dead] != before[name][~dead]).float().mean() > 0.9


@pytest.mark.parametrize("kind", ["mask_lora", "scale_lora"])
def test_gradients_are_those_of_the_merged_weight(kind):
    """By autograd of a layer that is merged first, in double precision."""
    config = AdaptersConfig(type=kind, rank=3, alpha=5)
    torch.manual_seed(0)
    weight = (torch.randn(7, 5) * (torch.rand(7, 5) < 0.5)).double()
    x, a, b, bias = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 4, 5), (3, 5), (7, 3), (7,)))
    given = torch.randn(2, 4, 7, dtype=torch.float64)
    found = torch.autograd.grad(_Product.apply(x, weight, bias, a, b, config), (x, a, b, bias), given)
    wanted = torch.autograd.grad(torch.nn.functional.linear(x, merged(weight, a, b, config), bias), (x, a, b, bias), given)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_what_a_step_changes_has_the_rank():
    """From the beginning on no two rows of A, or columns of B, are the same."""
    model, before, names = made(AdaptersConfig(type="scale_lora", rank=4))
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.5)
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    weights = merge(dict(model.named_parameters()), AdaptersConfig(type="scale_lora", rank=4))
    live = before[names[0]] != 0
    ratio = torch.where(live, weights[names[0]].detach() / before[names[0]].where(live, torch.ones(())) - 1, 0.0)
    assert torch.linalg.matrix_rank(ratio) > 1


@pytest.mark.parametrize("kind", ["selective", "mask_lora", "scale_lora"])
def test_what_trains(kind):
    model, _, names = made(AdaptersConfig(type=kind, rank=4))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(name.endswith(".bias") or ".ln_" in name or is_adapter(name) for name in trained)
    assert len([name for name in trained if is_adapter(name)]) == (0 if kind == "selective" else 2 * len(names))
    assert "transformer.ln_f.weight" in trained
    model(IDS, labels=IDS).loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained


def test_flops_are_of_the_model_without_adapters():
    model, _, _ = made(AdaptersConfig(type="mask_lora", rank=4))
    assert flops_architecture(model) == flops_architecture(build(SIZE, 0, context=16))


def test_adapters_are_drawn_by_their_weight_alone():
    first, second = (made(AdaptersConfig(type="mask_lora", rank=4))[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_impossible_adapters_are_refused():
    with pytest.raises(ConfigError, match=r"Expected adapters\.rank below 24: .*is 72 x 24\. Got 24\. Lower it"):
        made(AdaptersConfig(type="scale_lora", rank=24))
    with pytest.raises(ConfigError, match=r"Expected parameters that train\. Got none that match nothing\*"):
        made(AdaptersConfig(type="selective", train=("nothing*",)))
