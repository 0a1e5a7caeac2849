"""Reading what a model multiplies off the model itself."""

from typing import Any

import pytest
import torch

from raysparse.config import ConfigError
from raysparse.models.build import ModelConfig, flops_architecture, select, skeleton
from raysparse.sparsity.flops import forward_flops, training_flops


def meta(make, config) -> Any:
    with torch.device("meta"):
        return make(config)


def test_gpt2_small_of_spdf():
    arch = flops_architecture(skeleton(ModelConfig(preset="gpt2-small"), 50257, 2048))
    assert (arch.layers, arch.width, arch.heads, arch.head_dim, arch.vocab) == (12, 768, 12, 64, 50257)
    assert arch.head == "transformer.wte.weight"
    assert arch.lookups == {"transformer.wpe.weight"}
    assert len(arch.linears) == 48
    assert arch.linears["transformer.h.0.attn.c_attn.weight"] == (2304, 768)
    assert training_flops(arch, 1.0, 2.5e9, 2048, "spdf").total == pytest.approx(2.426e18, rel=1e-3)


def test_names_are_those_of_the_sparse_set():
    model = skeleton(ModelConfig(preset="debug"), 97, 16)
    arch = flops_architecture(model)
    everything = {name: model.get_parameter(name).numel() for name in select(model, ["*"])}
    assert forward_flops(arch, everything, 16, "palm") == forward_flops(arch, 1.0, 16, "palm")
    none = forward_flops(arch, dict.fromkeys(everything, 0), 16, "palm")
    assert none.linears == none.head == 0


def test_llama_with_grouped_keys_and_its_own_head():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=12,
    )
    arch = flops_architecture(meta(LlamaForCausalLM, config))
    assert (arch.layers, arch.width, arch.heads, arch.head_dim, arch.vocab) == (2, 16, 2, 12, 64)
    assert (arch.head, arch.lookups) == ("lm_head.weight", {"model.embed_tokens.weight"})
    assert arch.linears["model.layers.1.self_attn.k_proj.weight"] == (12, 16)
    assert len(arch.linears) == 14


def test_mpt():
    from transformers import MptConfig, MptForCausalLM

    arch = flops_architecture(meta(MptForCausalLM, MptConfig(vocab_size=64, d_model=16, n_heads=2, n_layers=3)))
    assert (arch.layers, arch.width, arch.heads, arch.head_dim, arch.vocab) == (3, 16, 2, 8, 64)
    assert (arch.head, arch.lookups) == ("transformer.wte.weight", frozenset())
    assert len(arch.linears) == 12


def test_encoder_decoders_are_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    with pytest.raises(ConfigError, match=r"Got the encoder-decoder T5ForConditionalGeneration, whose two sequence"):
        flops_architecture(meta(T5ForConditionalGeneration, config))


def test_blocks_that_are_not_linear_layers_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, bos_token_id=None, eos_token_id=None)
    with pytest.raises(ConfigError, match=r"Got transformer.h.0.attn.c_attn.weight of shape \(16, 48\)"):
        flops_architecture(meta(GPT2LMHeadModel, config))
