"""What may be sparse: the full list for each architecture, drawn out by hand."""

import pytest
import torch

from raysparse.config import ConfigError
from raysparse.models.build import BLOCK_LINEARS, block_linears, blocks, select
from raysparse.models.layout import to_linear


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))


def whisper():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=64,
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return WhisperForConditionalGeneration(config)


def mpt():
    from transformers import MptConfig, MptForCausalLM

    return MptForCausalLM(MptConfig(vocab_size=64, d_model=16, n_heads=2, n_layers=2, max_seq_len=32))


CASES = {
    gpt2: (
        ["transformer.h.0", "transformer.h.1"],
        [
            "transformer.h.0.attn.c_attn.weight",
            "transformer.h.0.attn.c_proj.weight",
            "transformer.h.0.mlp.c_fc.weight",
            "transformer.h.0.mlp.c_proj.weight",
            "transformer.h.1.attn.c_attn.weight",
            "transformer.h.1.attn.c_proj.weight",
            "transformer.h.1.mlp.c_fc.weight",
            "transformer.h.1.mlp.c_proj.weight",
        ],
    ),
    llama: (
        ["model.layers.0", "model.layers.1"],
        [
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.0.self_attn.k_proj.weight",
            "model.layers.0.self_attn.v_proj.weight",
            "model.layers.0.self_attn.o_proj.weight",
            "model.layers.0.mlp.gate_proj.weight",
            "model.layers.0.mlp.up_proj.weight",
            "model.layers.0.mlp.down_proj.weight",
            "model.layers.1.self_attn.q_proj.weight",
            "model.layers.1.self_attn.k_proj.weight",
            "model.layers.1.self_attn.v_proj.weight",
            "model.layers.1.self_attn.o_proj.weight",
            "model.layers.1.mlp.gate_proj.weight",
            "model.layers.1.mlp.up_proj.weight",
            "model.layers.1.mlp.down_proj.weight",
        ],
    ),
    t5: (  # not relative_attention_bias, not shared / lm_head
        ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"],
        [
            "encoder.block.0.layer.0.SelfAttention.q.weight",
            "encoder.block.0.layer.0.SelfAttention.k.weight",
            "encoder.block.0.layer.0.SelfAttention.v.weight",
            "encoder.block.0.layer.0.SelfAttention.o.weight",
            "encoder.block.0.layer.1.DenseReluDense.wi.weight",
            "encoder.block.0.layer.1.DenseReluDense.wo.weight",
            "encoder.block.1.layer.0.SelfAttention.q.weight",
            "encoder.block.1.layer.0.SelfAttention.k.weight",
            "encoder.block.1.layer.0.SelfAttention.v.weight",
            "encoder.block.1.layer.0.SelfAttention.o.weight",
            "encoder.block.1.layer.1.DenseReluDense.wi.weight",
            "encoder.block.1.layer.1.DenseReluDense.wo.weight",
            "decoder.block.0.layer.0.SelfAttention.q.weight",
            "decoder.block.0.layer.0.SelfAttention.k.weight",
            "decoder.block.0.layer.0.SelfAttention.v.weight",
            "decoder.block.0.layer.0.SelfAttention.o.weight",
            "decoder.block.0.layer.1.EncDecAttention.q.weight",
            "decoder.block.0.layer.1.EncDecAttention.k.weight",
            "decoder.block.0.layer.1.EncDecAttention.v.weight",
            "decoder.block.0.layer.1.EncDecAttention.o.weight",
            "decoder.block.0.layer.2.DenseReluDense.wi.weight",
            "decoder.block.0.layer.2.DenseReluDense.wo.weight",
            "decoder.block.1.layer.0.SelfAttention.q.weight",
            "decoder.block.1.layer.0.SelfAttention.k.weight",
            "decoder.block.1.layer.0.SelfAttention.v.weight",
            "decoder.block.1.layer.0.SelfAttention.o.weight",
            "decoder.block.1.layer.1.EncDecAttention.q.weight",
            "decoder.block.1.layer.1.EncDecAttention.k.weight",
            "decoder.block.1.layer.1.EncDecAttention.v.weight",
            "decoder.block.1.layer.1.EncDecAttention.o.weight",
            "decoder.block.1.layer.2.DenseReluDense.wi.weight",
            "decoder.block.1.layer.2.DenseReluDense.wo.weight",
        ],
    ),
    whisper: (  # not the convolutions, positions, embed_tokens / proj_out
        ["model.encoder.layers.0", "model.decoder.layers.0", "model.decoder.layers.1"],
        [
            "model.encoder.layers.0.self_attn.k_proj.weight",
            "model.encoder.layers.0.self_attn.v_proj.weight",
            "model.encoder.layers.0.self_attn.q_proj.weight",
            "model.encoder.layers.0.self_attn.out_proj.weight",
            "model.encoder.layers.0.fc1.weight",
            "model.encoder.layers.0.fc2.weight",
            "model.decoder.layers.0.self_attn.k_proj.weight",
            "model.decoder.layers.0.self_attn.v_proj.weight",
            "model.decoder.layers.0.self_attn.q_proj.weight",
            "model.decoder.layers.0.self_attn.out_proj.weight",
            "model.decoder.layers.0.encoder_attn.k_proj.weight",
            "model.decoder.layers.0.encoder_attn.v_proj.weight",
            "model.decoder.layers.0.encoder_attn.q_proj.weight",
            "model.decoder.layers.0.encoder_attn.out_proj.weight",
            "model.decoder.layers.0.fc1.weight",
            "model.decoder.layers.0.fc2.weight",
            "model.decoder.layers.1.self_attn.k_proj.weight",
            "model.decoder.layers.1.self_attn.v_proj.weight",
            "model.decoder.layers.1.self_attn.q_proj.weight",
            "model.decoder.layers.1.self_attn.out_proj.weight",
            "model.decoder.layers.1.encoder_attn.k_proj.weight",
            "model.decoder.layers.1.encoder_attn.v_proj.weight",
            "model.decoder.layers.1.encoder_attn.q_proj.weight",
            "model.decoder.layers.1.encoder_attn.out_proj.weight",
            "model.decoder.layers.1.fc1.weight",
            "model.decoder.layers.1.fc2.weight",
        ],
    ),
    mpt: (
        ["transformer.blocks.0", "transformer.blocks.1"],
        [
            "transformer.blocks.0.attn.Wqkv.weight",
            "transformer.blocks.0.attn.out_proj.weight",
            "transformer.blocks.0.ffn.up_proj.weight",
            "transformer.blocks.0.ffn.down_proj.weight",
            "transformer.blocks.1.attn.Wqkv.weight",
            "transformer.blocks.1.attn.out_proj.weight",
            "transformer.blocks.1.ffn.up_proj.weight",
            "transformer.blocks.1.ffn.down_proj.weight",
        ],
    ),
}


def meta(make):
    with torch.device("meta"):
        return to_linear(make())


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_blocks_and_their_linears(make):
    model = meta(make)
    names, linears = CASES[make]
    assert list(blocks(model)) == names
    assert all(module is model.get_submodule(name) for name, module in blocks(model).items())
    assert block_linears(model) == linears
    assert select(model) == select(model, BLOCK_LINEARS) == select(model, [BLOCK_LINEARS]) == linears


def test_tied_weight_is_chosen_once_under_either_name():
    model = meta(gpt2)
    tied = ["transformer.wte.weight"]
    assert select(model, ["lm_head.weight"]) == tied
    assert select(model, ["lm_head.weight", "*.wte.weight"]) == tied
    assert select(model, ["block_linears", "lm_head.weight"]) == tied + CASES[gpt2][1]
    assert select(model, ["*.w?e.weight"], exclude=["lm_head.weight"]) == ["transformer.wpe.weight"]
    assert select(meta(t5), ["decoder.embed_tokens.weight"]) == ["shared.weight"]


def test_patterns_take_matrices_only():
    model = meta(gpt2)
    everything = select(model, ["*"])
    assert everything == ["transformer.wte.weight", "transformer.wpe.weight", *CASES[gpt2][1]]
    assert select(model, ["transformer.h.1.*"]) == CASES[gpt2][1][4:]
    assert select(model, BLOCK_LINEARS, exclude=["*.attn.*", "*.h.0.*"]) == CASES[gpt2][1][6:]


@pytest.mark.parametrize(
    ("include", "exclude", "text"),
    [
        (["h.*.c_attn.weight"], [], r"'h.\*.c_attn.weight' to match .* GPT2LMHeadModel. Got no match. Near names: .*c_attn"),
        (["*.bias"], [], r"Got only parameters of other shapes, such as transformer.h.0.ln_1.bias with 1 axes"),
        ("blok_linears", [], r"'blok_linears' to match 2-D weights"),
        (BLOCK_LINEARS, ["transformer.h.7.*"], r"'transformer.h.7.\*' to match .* Got no match"),
        (["*"], ["*"], r"Expected at least one weight to be sparse. Got none from include \['\*'\] without exclude"),
        ([], [], r"Expected at least one weight to be sparse"),
    ],
)
def test_bad_patterns_are_explained(include, exclude, text):
    with pytest.raises(ConfigError, match=text):
        select(meta(gpt2), include, exclude)


def test_convolutions_are_never_chosen():
    with pytest.raises(ConfigError, match=r"such as model.encoder.conv1.weight with 3 axes"):
        select(meta(whisper), ["model.encoder.conv?.weight"])
