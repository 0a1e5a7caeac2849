"""Reading what a model multiplies off the model itself."""

from typing import Any

import pytest
import torch

from raysparse.config import ConfigError
from raysparse.models.build import ModelConfig, select, skeleton
from raysparse.models.multiplied import flops_architecture
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


T5_SIZES = {"vocab_size": 64, "d_model": 16, "d_kv": 12, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2}


def test_t5():
    from transformers import T5Config, T5ForConditionalGeneration

    arch = flops_architecture(meta(T5ForConditionalGeneration, T5Config(**T5_SIZES)))
    assert (arch.layers, arch.width, arch.heads, arch.head_dim, arch.vocab) == (3, 16, 2, 12, 64)
    assert arch.head == "shared.weight"
    assert {name.rpartition(".relative")[0] for name in arch.lookups} == {
        f"{stack}.block.0.layer.0.SelfAttention" for stack in ("encoder", "decoder")
    }
    encoder = arch.encoder
    assert encoder is not None
    assert (encoder.layers, encoder.heads, encoder.head_dim, encoder.stride) == (2, 2, 12, 1)
    across = {f"decoder.block.{k}.layer.1.EncDecAttention.{m}.weight" for k in range(3) for m in "kv"}
    assert encoder.sees == {name for name in arch.linears if name.startswith("encoder.")} | across
    # 2 multiply-adds; inner width 24. T = 5 target tokens, S = 7 source tokens.
    block, attention, feed = 4 * 16 * 24, 2, 2 * 16 * 32
    of_source = 2 * (block + feed) + 3 * 2 * 16 * 24
    of_target = 3 * (block + 2 * 16 * 24 + feed)
    scores = 2 * 7 * 7 + 3 * 5 * 5 + 3 * 5 * 7
    flops = forward_flops(arch, 1.0, 5, "spdf", source=7)
    assert (flops.linears, flops.head) == (2 * (of_source * 7 + of_target * 5), 2 * 64 * 16 * 5)
    assert (flops.attention, flops.softmax) == (4 * 24 * scores, 3 * attention * scores)
    named = {name: rows * cols for name, (rows, cols) in arch.linears.items()}
    assert forward_flops(arch, named, 5, "spdf", source=7) == flops
    dead = {name: 0 if name in encoder.sees else size for name, size in named.items()}
    assert forward_flops(arch, dead, 5, "spdf", source=7).linears == 2 * of_target * 5
    assert training_flops(arch, 1.0, 50, 5, "spdf", source=7).total == pytest.approx(30 * flops.total)


def test_whisper_hears_two_frames_a_position_and_its_convolutions_are_not_counted():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=64,
        pad_token_id=0,
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=48,
        max_source_positions=20,
    )
    arch = flops_architecture(meta(WhisperForConditionalGeneration, config))
    assert (arch.layers, arch.heads, arch.head_dim, arch.head) == (2, 2, 8, "model.decoder.embed_tokens.weight")
    encoder = arch.encoder
    assert encoder is not None
    assert (encoder.layers, encoder.heads, encoder.head_dim, encoder.stride) == (1, 4, 4, 2)
    across = {f"model.decoder.layers.{k}.encoder_attn.{m}_proj.weight" for k in range(2) for m in "kv"}
    assert encoder.sees == {name for name in arch.linears if ".encoder.layers." in name} | across
    flops = forward_flops(arch, 1.0, 5, "palm", source=40)
    square = 16 * 16
    of_source = 4 * square + 2 * 16 * 32 + 2 * 2 * square
    of_target = 2 * (4 * square + 2 * square + 2 * 16 * 48)
    assert flops.linears == 2 * (of_source * 20 + of_target * 5)
    assert flops.attention == 4 * 16 * (20 * 20 + 2 * 5 * 5 + 2 * 5 * 20)


def test_blocks_that_are_not_linear_layers_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, bos_token_id=None, eos_token_id=None)
    with pytest.raises(ConfigError, match=r"Got transformer.h.0.attn.c_attn.weight of shape \(16, 48\)"):
        flops_architecture(meta(GPT2LMHeadModel, config))
