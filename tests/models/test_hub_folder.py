"""The exported folder: any user of transformers reads the same model, zeros and all."""

import json
import logging
from typing import Any

import pytest
import torch

from raysparse.config import ConfigError
from raysparse.models.build import ModelConfig, block_linears, build
from raysparse.models.export import check_target, count_zeros, write_folder
from raysparse.models.layout import to_linear

END = 40
VOCABULARY = 50


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(VOCABULARY)}
    folder = tmp_path_factory.mktemp("tokenizer")
    core = Tokenizer(WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token=f"w{END}").save_pretrained(folder)
    (folder / "README.md").write_text("not a tokenizer file")
    return folder


@pytest.fixture
def log():
    """What transformers logs at warning level or above."""
    records: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def sparse_model(density=0.25) -> Any:
    """A debug GPT-2 whose block linears have zeros, biases and norms moved off their initial values."""
    model = build(ModelConfig(preset="debug"), 0, VOCABULARY, 32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
        for name in block_linears(model):
            weight = model.get_parameter(name)
            weight.masked_fill_(torch.rand(weight.shape, generator=generator) >= density, 0.0)
    return model.eval()


IDS = (torch.arange(44) % VOCABULARY).view(2, 22)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_folder_gives_the_same_logits_and_zeros(tmp_path, tokenizer_folder, log):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = sparse_model()
    write_folder(tmp_path / "out", model.state_dict(), model.config, tokenizer_folder, {})
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == VOCABULARY
    assert log == []
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-6)
    built = build(ModelConfig(path=str(tmp_path / "out")), 0, VOCABULARY, 32).eval()
    for ids in (IDS, IDS[:1, :1], IDS[:1, :7], IDS[:, :3]):  # with few rows Conv1D and unaligned memory round otherwise
        assert torch.equal(logits(built, ids), logits(model, ids))
    to_linear(loaded)
    assert torch.equal(logits(loaded), logits(model))
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    zeros = {name: int((model.get_parameter(name) == 0).sum()) for name in block_linears(model)}
    assert all(0.7 < count / model.get_parameter(name).numel() < 0.8 for name, count in zeros.items())
    assert {name: int((loaded.get_parameter(name) == 0).sum()) for name in zeros} == zeros
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_other_families_are_bit_equal_as_loaded(tmp_path, tokenizer_folder, log):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config).eval()
    write_folder(tmp_path / "llama", model.state_dict(), model.config, tokenizer_folder, {})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert torch.equal(logits(loaded), logits(model))
    assert log == []


def test_files_of_the_folder(tmp_path, tokenizer_folder):
    model = sparse_model()
    write_folder(tmp_path / "a" / "out", model.state_dict(), model.config, tokenizer_folder, {"loss": 1.5})
    names = {path.name for path in (tmp_path / "a" / "out").iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        "sparsity.json",
    }
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"], "no partial folder is left"
    config = json.loads((tmp_path / "a" / "out" / "config.json").read_text())
    assert (config["architectures"], config["use_cache"], config["dtype"]) == (["GPT2LMHeadModel"], True, "float32")
    assert config["eos_token_id"] == END
    generation = json.loads((tmp_path / "a" / "out" / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (END, END)
    assert model.config.use_cache is False
    assert model.config.eos_token_id is None


def test_sparsity_json_counts_what_is_stored(tmp_path, tokenizer_folder):
    from safetensors.torch import load_file

    model = sparse_model()
    write_folder(tmp_path / "out", model.state_dict(), model.config, tokenizer_folder, {})
    counts = json.loads((tmp_path / "out" / "sparsity.json").read_text())
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert counts["tensors"].keys() == stored.keys()
    for name, value in stored.items():
        nnz = int((value != 0).sum())
        assert counts["tensors"][name] == {"shape": list(value.shape), "nnz": nnz, "sparsity": 1 - nnz / value.numel()}
    assert counts["tensors"]["transformer.h.0.attn.c_attn.weight"]["shape"] == [64, 192]
    assert counts["model"]["weights"] == sum(parameter.numel() for parameter in model.parameters())
    live = sum(int((model.get_parameter(name) != 0).sum()) for name in block_linears(model))
    assert counts["block_linears"]["nnz"] == live
    assert counts["block_linears"]["weights"] == 2 * 12 * 64**2


def test_count_zeros_by_hand():
    counts = count_zeros({"a": torch.tensor([[1.0, 0.0], [-0.0, 3.0]]), "b": torch.ones(4)}, {"a"})
    assert counts["tensors"]["a"] == {"shape": [2, 2], "nnz": 2, "sparsity": 0.5}
    assert counts["block_linears"] == {"weights": 4, "nnz": 2, "sparsity": 0.5}
    assert counts["model"] == {"weights": 8, "nnz": 6, "sparsity": 0.25}


def test_model_card(tmp_path, tokenizer_folder):
    model = sparse_model()
    card = {"steps": 120, "flops": {"convention": "spdf", "reduction": 1.36}, "note": "a|b\nc"}
    write_folder(tmp_path / "my-model", model.state_dict(), model.config, tokenizer_folder, card)
    text = (tmp_path / "my-model" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert "\n# license: choose one" in text
    assert "| steps | 120 |\n| flops.convention | spdf |\n| flops.reduction | 1.36 |\n| note | a\\|b c |" in text
    live = sum(int((model.get_parameter(name) != 0).sum()) for name in block_linears(model))
    assert f"({live:,} live)" in text
    assert f"{1 - live / (2 * 12 * 64**2):.4%} of the 98,304 weights" in text


def test_large_models_are_sharded(tmp_path, tokenizer_folder, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("raysparse.models.export._MAX_SHARD", "200KB")
    model = sparse_model()
    write_folder(tmp_path / "out", model.state_dict(), model.config, tokenizer_folder, {})
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(to_linear(loaded)), logits(model))


def test_exported_folder_is_a_model_path(tmp_path, tokenizer_folder):
    model = sparse_model()
    write_folder(tmp_path / "out", model.state_dict(), model.config, tokenizer_folder, {})
    again = build(ModelConfig(path=str(tmp_path / "out")), 5, VOCABULARY, 32)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_never_over_something(tmp_path, tokenizer_folder):
    model = sparse_model()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(ConfigError, match=rf"Expected a new or empty folder .* Got .*{name}, which holds something"):
            write_folder(tmp_path / name, model.state_dict(), model.config, tokenizer_folder, {})
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["keep.txt"]
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty")
    write_folder(tmp_path / "empty", model.state_dict(), model.config, tokenizer_folder, {})
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_nothing_is_left_of_a_failed_export(tmp_path, tokenizer_folder):
    model = sparse_model()
    state = dict(model.state_dict())
    del state["transformer.ln_f.bias"]
    with pytest.raises(AssertionError, match=r"state dict does not fit the model: \['transformer.ln_f.bias'\]"):
        write_folder(tmp_path / "out", state, model.config, tokenizer_folder, {})
    assert list(tmp_path.iterdir()) == []


def test_bad_tokenizers_are_explained(tmp_path, tokenizer_folder):
    model = sparse_model()
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ConfigError, match=r"Expected tokenizer files in .*nothing. Got none of tokenizer.json"):
        write_folder(tmp_path / "out", model.state_dict(), model.config, tmp_path / "nothing", {})
    (tmp_path / "nothing" / "tokenizer_config.json").write_text("{broken")
    with pytest.raises(ConfigError, match=r"Expected a tokenizer that transformers reads in .*nothing. Got: "):
        write_folder(tmp_path / "out", model.state_dict(), model.config, tmp_path / "nothing", {})
    small = build(ModelConfig(preset="debug"), 0, 49, 32)
    with pytest.raises(ConfigError, match=r"at most the model's 49 tokens. Got 50 in"):
        write_folder(tmp_path / "out", small.state_dict(), small.config, tokenizer_folder, {})
    assert not (tmp_path / "out").exists()
