"""Conv1D to Linear and back: nothing lost, nothing rounded."""

from typing import Any

import torch
from torch import nn

from raysparse.models.layout import conv1d_weights, hub_skeleton, to_hub, to_linear

NO_END: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}


def gpt2(**values: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 32, **values}
    return GPT2LMHeadModel(GPT2Config(**NO_END, **sizes)).eval()


def test_to_linear_transposes_exactly_and_keeps_everything_else():
    model = gpt2()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    turned = conv1d_weights(model)
    model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    bias, head = model.transformer.h[1].attn.c_attn.bias, model.lm_head.weight
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        random = torch.get_rng_state()
        assert to_linear(model) is model
        assert torch.equal(torch.get_rng_state(), random)
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    assert len(turned) == 8
    assert conv1d_weights(model) == set()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name].T if name in turned else before[name]), name
        assert value.is_contiguous()
    assert not model.transformer.h[0].mlp.c_fc.weight.requires_grad
    assert model.transformer.h[0].mlp.c_proj.weight.requires_grad
    assert model.transformer.h[1].attn.c_attn.bias is bias
    assert model.lm_head.weight is head is model.transformer.wte.weight
    linear = model.transformer.h[0].attn.c_attn
    assert (type(linear), linear.in_features, linear.out_features) == (nn.Linear, 16, 48)


def test_to_linear_keeps_a_narrow_dtype():
    model = to_linear(gpt2().bfloat16())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_to_linear_works_on_meta():
    with torch.device("meta"):
        model = gpt2()
    linear = to_linear(model).transformer.h[0].attn.c_attn
    assert linear.weight.is_meta
    assert linear.weight.shape == (48, 16)


def test_to_hub_is_the_inverse_and_drops_the_tied_copy():
    model = gpt2()
    original = {name: value.clone() for name, value in model.state_dict().items()}
    stored = to_hub(to_linear(model).state_dict(), model)
    assert original.keys() - stored.keys() == {"lm_head.weight"}
    for name, value in stored.items():
        assert torch.equal(value, original[name]), name
        assert value.is_contiguous()


def test_to_hub_reads_a_tied_weight_from_either_name():
    model = to_linear(gpt2())
    state = model.state_dict()
    embedding = state.pop("transformer.wte.weight")
    stored = to_hub(state, model)
    assert "lm_head.weight" not in stored
    assert torch.equal(stored["transformer.wte.weight"], embedding)


def test_to_hub_refuses_what_is_not_this_model():
    model = to_linear(gpt2())
    state = dict(model.state_dict())
    for bad in (
        {name: value for name, value in state.items() if name != "transformer.ln_f.bias"},
        {**state, "extra": torch.zeros(1)},
        {**state, "lm_head.weight": torch.zeros(50, 16)},
    ):
        try:
            to_hub(bad, model)
        except AssertionError:
            continue
        raise RuntimeError("a state dict that does not fit was accepted")


def test_to_hub_keeps_untied_heads():
    model = to_linear(gpt2(tie_word_embeddings=False))
    assert "lm_head.weight" in to_hub(model.state_dict(), model)


def test_hub_skeleton_sees_through_a_subclass():
    """FSDP2 replaces a sharded module's class by a subclass of its own."""
    model = to_linear(gpt2())
    model.__class__ = type("Sharded", (type(model),), {"__module__": "elsewhere"})
    twin = hub_skeleton(model)
    assert type(twin).__name__ == "GPT2LMHeadModel"
    assert len(conv1d_weights(twin)) == 8
    assert all(parameter.is_meta for parameter in twin.parameters())
