"""Building models: the same weights everywhere, nothing global touched, and every refusal explained."""

import json
import logging
from typing import Any

import pytest
import torch
from torch import nn

from raysparse.config import ConfigError
from raysparse.models.build import ModelConfig, architecture, build, hollow, skeleton
from raysparse.models.hub_config import ANY_KIND

DEBUG = ModelConfig(preset="debug")
NO_END: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}


def pretrained(tmp_path, **values: Any) -> tuple[Any, ModelConfig]:
    """A small GPT-2 folder as transformers writes it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 32, **values}
    model = GPT2LMHeadModel(GPT2Config(**NO_END, **sizes))
    model.save_pretrained(tmp_path / "model")
    return model, ModelConfig(path=str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("preset", "parameters", "tolerance"),
    # GPT-2: as released. GPT-3: Brown et al. 2020, table 2.1, rounded there.
    [
        ("gpt2-small", 124_439_808, 0),
        ("gpt2-medium", 354_823_168, 0),
        ("gpt2-large", 774_030_080, 0),
        ("gpt2-xl", 1_557_611_200, 0),
        ("gpt3-small", 125e6, 0.02),
        ("gpt3-medium", 350e6, 0.02),
        ("gpt3-large", 760e6, 0.02),
        ("gpt3-xl", 1.3e9, 0.02),
        ("gpt3-2.7b", 2.7e9, 0.02),
        ("gpt3-6.7b", 6.7e9, 0.02),
        ("gpt3-13b", 13.0e9, 0.02),
    ],
)
def test_presets_have_the_published_sizes(preset, parameters, tolerance):
    model = skeleton(ModelConfig(preset=preset))
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(parameters, rel=tolerance)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert (model.config.resid_pdrop, model.config.embd_pdrop, model.config.attn_pdrop) == (0, 0, 0)


def test_gpt3_xl_has_16_heads_of_128():
    config = architecture(ModelConfig(preset="gpt3-xl"), vocab_size=50257, context=512)
    assert (config.n_layer, config.n_embd, config.n_head, config.n_positions) == (24, 2048, 16, 512)


def test_build_depends_on_the_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one: Any = build(DEBUG, seed=3, vocab_size=97, context=16)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    two: Any = build(DEBUG, 3, 97, 16)
    other: Any = build(DEBUG, 4, 97, 16)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.transformer.wte.weight, other.transformer.wte.weight)


def test_build_uses_the_initialisation_of_transformers():
    """Residual projections are scaled by 1 / sqrt(2 layers); a change of layout must not lose that."""
    model: Any = build(ModelConfig(preset="tiny"), 0, 64, 16)
    block = model.transformer.h[0]
    assert block.attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.03)


def test_built_model_is_ready_to_train():
    model: Any = build(DEBUG, 0, 97, 16)
    assert model.training
    assert model.config.use_cache is False
    assert model.generation_config.use_cache is True
    assert model.lm_head.weight is model.transformer.wte.weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    logits = model(input_ids=torch.arange(16).view(1, 16)).logits
    assert logits.shape == (1, 16, 97)


def test_skeleton_and_build_agree():
    thin: Any = skeleton(DEBUG, 97, 16)
    real = build(DEBUG, 0, 97, 16)
    assert [(n, p.shape) for n, p in thin.named_parameters()] == [(n, p.shape) for n, p in real.named_parameters()]
    assert thin.lm_head.weight is thin.transformer.wte.weight
    assert not any(parameter.is_meta for parameter in real.parameters())


def test_hollow_and_build_agree():
    empty: Any = hollow(DEBUG, 97, 16)
    real: Any = build(DEBUG, 0, 97, 16)
    for kind in ("named_parameters", "named_buffers"):
        of_both = [[(n, t.shape, t.dtype, t.device, t.requires_grad) for n, t in getattr(m, kind)()] for m in (empty, real)]
        assert of_both[0] == of_both[1]
    assert empty.state_dict().keys() == real.state_dict().keys()
    assert empty.lm_head.weight is empty.transformer.wte.weight


@pytest.mark.parametrize("kind", ["whisper", "t5", "gpt2"])
def test_hollow_and_build_agree_of_what_is_read(kind, tmp_path):
    """Reading makes new parameters of a Whisper's positions, which do not train."""
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        T5Config,
        T5ForConditionalGeneration,
        WhisperConfig,
        WhisperForConditionalGeneration,
    )

    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    model: Any = {
        "whisper": lambda: WhisperForConditionalGeneration(
            WhisperConfig(vocab_size=50, encoder_ffn_dim=16, decoder_ffn_dim=16, max_source_positions=20, **sizes, **ends)
        ),
        "t5": lambda: T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16)),
    }[kind]()
    model.save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path))
    empty, real = hollow(config, kinds=ANY_KIND), build(config, 0, kinds=ANY_KIND)
    told = [[(n, t.shape, t.dtype, t.requires_grad) for n, t in (*m.named_parameters(), *m.named_buffers())] for m in (empty, real)]
    assert told[0] == told[1]
    assert any(not t.requires_grad for t in real.parameters()) == (kind == "whisper")


def test_small_vocabulary_has_no_end_of_text(caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        assert architecture(DEBUG, 97).eos_token_id is None
        assert architecture(DEBUG, 50257).eos_token_id == 50256
        assert architecture(ModelConfig(preset="debug", overrides={"eos_token_id": 7}), 97).eos_token_id == 7
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.records == []


def test_overrides_reach_the_model_under_either_name():
    model: Any = skeleton(ModelConfig(preset="debug", overrides={"num_hidden_layers": 5, "n_embd": 32, "resid_pdrop": 0.1}))
    assert (len(model.transformer.h), model.config.n_embd, model.config.resid_pdrop) == (5, 32, 0.1)


def test_attention_is_the_configured_one():
    assert skeleton(DEBUG).config._attn_implementation == "sdpa"
    assert skeleton(ModelConfig(preset="debug", attention="eager")).config._attn_implementation == "eager"


def test_padded_vocabulary_holds_the_data():
    config = ModelConfig(preset="debug", overrides={"vocab_size": 50304})
    assert architecture(config, vocab_size=50257).vocab_size == 50304


def test_path_is_read_exactly(tmp_path):
    saved, config = pretrained(tmp_path)
    before = torch.get_rng_state()
    model: Any = build(config, seed=0, vocab_size=50, context=32)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model.transformer.h[0].attn.c_attn.weight, saved.transformer.h[0].attn.c_attn.weight.T)
    assert isinstance(model.transformer.h[0].attn.c_attn, nn.Linear)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.training
    assert model.config.resid_pdrop == 0.1, "a pretrained model keeps its own dropout"
    thin = skeleton(config, 50, 32)
    assert [(n, p.shape) for n, p in thin.named_parameters()] == [(n, p.shape) for n, p in model.named_parameters()]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "Expected exactly one of preset and path. Got neither"),
        ({"preset": "tiny", "path": "x"}, "Got preset tiny and path x"),
        ({"preset": "gpt5"}, "Input should be 'debug', 'tiny', 'gpt2-small'"),
    ],
)
def test_one_source_of_weights(values, text):
    with pytest.raises(ConfigError, match=text):
        ModelConfig.check(values)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"n_layr": 2}, "Got 'n_layr'. Nearest fields: n_layer, num_hidden_layers"),
        ({"model_type": "llama"}, "Got 'model_type'"),
        ({"use_cache": True}, "Got 'use_cache'"),
        ({"n_layer": "six"}, "GPT2Config accepts. Got: (.|\\n)*'n_layer' expected int"),
        ({"n_head": 3}, "Got: `embed_dim` must be divisible by num_heads"),
        ({"vocab_size": 90}, "vocab_size of at least 97, which the data needs. Got 90 tokens in model.overrides of debug"),
        ({"n_positions": 8}, "n_positions of at least 16, which the data needs. Got 8 positions"),
        ({"max_position_embeddings": 8}, "n_positions of at least 16"),
    ],
)
def test_bad_overrides_are_explained(overrides, text):
    with pytest.raises(ConfigError, match=text):
        skeleton(ModelConfig(preset="debug", overrides=overrides), vocab_size=97, context=16)


def test_nested_overrides_reach_the_nested_config_and_are_checked(tmp_path):
    from transformers import MptConfig, MptForCausalLM

    MptForCausalLM(MptConfig(vocab_size=50, d_model=16, n_heads=2, n_layers=1)).save_pretrained(tmp_path / "mpt")
    config = ModelConfig(path=str(tmp_path / "mpt"), overrides={"attn_config": {"clip_qkv": 3.0}}, attention="eager")
    assert build(config, 0).config.attn_config.clip_qkv == 3.0
    assert build(config, 0).config.attn_config.alibi is True
    config = ModelConfig(path=str(tmp_path / "mpt"), overrides={"attn_config": {"clip": 3.0}}, attention="eager")
    with pytest.raises(ConfigError, match=r"model.overrides.attn_config. Got 'clip'. Nearest fields: clip_qkv"):
        architecture(config)
    with pytest.raises(ConfigError, match=r"and sdpa attention. Got: MptForCausalLM does not support"):
        skeleton(ModelConfig(path=str(tmp_path / "mpt"), attention="sdpa"))


def test_pretrained_sizes_must_hold_the_data(tmp_path):
    _, config = pretrained(tmp_path)
    assert architecture(config, vocab_size=40, context=8).vocab_size == 50
    with pytest.raises(ConfigError, match=r"vocab_size of at least 51, which the data needs. Got 50 tokens in"):
        architecture(config, vocab_size=51)
    with pytest.raises(ConfigError, match=r"n_positions of at least 33, which the data needs. Got 32 positions in"):
        architecture(config, context=33)


def test_overrides_that_do_not_fit_the_weights(tmp_path):
    _, config = pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"Got none for 12 of them: transformer.h.1.attn.c_attn.bias"):
        build(ModelConfig(path=config.path, overrides={"n_layer": 2}), 0)
    with pytest.raises(ConfigError, match=r"with overrides \{'vocab_size': 60\} and auto attention. Got: "):
        build(ModelConfig(path=config.path, overrides={"vocab_size": 60}), 0)


def test_missing_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"Expected a model folder at model.path .*absent. Got none there"):
        architecture(ModelConfig(path=str(tmp_path / "absent")))
    with pytest.raises(ConfigError, match=r"Expected a config.json in model.path .*. Got none"):
        architecture(ModelConfig(path=str(tmp_path)))


@pytest.mark.parametrize("text", ["{broken", "{}", '{"model_type": "nonesuch"}', '{"model_type": "gpt2", "n_layer": "x"}'])
def test_damaged_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"Expected a model in Hugging Face format at model.path .* Got: "):
        architecture(ModelConfig(path=str(tmp_path)))


def test_damaged_weights_are_found_before_anything_starts(tmp_path):
    _, config = pretrained(tmp_path)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"Expected whole weight files .* Got: .*incomplete.*Copy the model again"):
        architecture(config)
    weights.unlink()
    with pytest.raises(ConfigError, match=r"Got: .*No such file.*model.safetensors"):
        architecture(config)


def test_missing_shard(tmp_path):
    model, config = pretrained(tmp_path, n_layer=2)
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(shards) > 1
    config = ModelConfig(path=str(tmp_path / "shards"))
    read: Any = build(config, 0)
    assert torch.equal(read.transformer.wte.weight, model.transformer.wte.weight)
    shards[-1].unlink()
    with pytest.raises(ConfigError, match=f"Expected whole weight files .*{shards[-1].name}"):
        architecture(config)


@pytest.mark.parametrize(
    ("values", "got"),
    [
        ({"model_type": "t5"}, "Got an encoder-decoder of the T5 type at model.path"),
        ({"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}, "Got a Whisper model at model.path"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "a T5 or a Whisper at model.path .*Got BertForMaskedLM"),
        ({"model_type": "t5", "architectures": ["T5EncoderModel"]}, "a T5 or a Whisper at model.path .*Got T5EncoderModel"),
        ({"model_type": "bart", "architectures": ["BartForConditionalGeneration"]}, "a T5 or a Whisper .*Got BartForConditional"),
    ],
)
def test_only_causal_language_models_unless_others_are_asked_for(tmp_path, values, got):
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=f"Expected a causal language model.*{got}"):
        architecture(ModelConfig(path=str(tmp_path)))


def test_a_whisper_that_hears_less_keeps_its_first_positions(tmp_path):
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes: dict[str, Any] = {"vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "max_target_positions": 16}
    sizes |= {"suppress_tokens": None, "begin_suppress_tokens": None}
    whole = WhisperForConditionalGeneration(WhisperConfig(max_source_positions=50, **sizes)).eval()
    whole.save_pretrained(tmp_path / "model")
    config = ModelConfig(path=str(tmp_path / "model"), overrides={"max_source_positions": 20})
    short = build(config, 0, kinds=("audio",)).eval()
    by_hand = WhisperForConditionalGeneration(WhisperConfig(max_source_positions=20, **sizes)).eval()
    weights = whole.state_dict()
    weights["model.encoder.embed_positions.weight"] = weights["model.encoder.embed_positions.weight"][:20]
    by_hand.load_state_dict(weights)
    heard = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": torch.tensor([[1, 4, 7], [1, 9, 3]])}
    with torch.no_grad():
        assert torch.equal(short(**heard).logits, by_hand(**heard).logits)
    shapes = {name: parameter.shape for name, parameter in skeleton(config, kinds=("audio",)).named_parameters()}
    assert {name: parameter.shape for name, parameter in short.named_parameters()} == shapes
    short.save_pretrained(tmp_path / "short")
    assert build(ModelConfig(path=str(tmp_path / "short")), 0, kinds=("audio",)).config.max_source_positions == 20
    longer = config.model_copy(update={"overrides": {"max_source_positions": 60}})
    with pytest.raises(ConfigError, match=r"Expected a model that transformers can build.*max_source_positions"):
        build(longer, 0, kinds=("audio",))


def test_mpt_as_its_authors_name_it(tmp_path):
    from transformers import MptConfig, MptForCausalLM

    model = MptForCausalLM(MptConfig(vocab_size=50, d_model=16, n_layers=1, n_heads=2, max_seq_len=32))
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["MPTForCausalLM"]}))
    found = build(ModelConfig(path=str(tmp_path / "model")), 0)
    assert type(found).__name__ == "MptForCausalLM"
    assert found.config._attn_implementation == "eager"  # transformers has no other for it
