"""A packed model is the model: the same tokens, from memory and from a folder; and a folder that is not one is refused."""

import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raysparse.config import ConfigError
from raysparse.kernels import library
from raysparse.models import packed
from raysparse.models.build import ModelConfig, block_linears, build
from raysparse.models.export import write_folder
from tests.kernels.conftest import forget

NATIVE = pytest.mark.skipif(not library.available(), reason=f"no native kernels: {library.why_not()}")
VOCABULARY, END = 80, 79
IDS = (torch.arange(22) * 7 % 70).view(2, 11)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    core = Tokenizer(WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token=f"w{END}").save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sparse(model: Any, density: float) -> Any:
    """Large weights, so that logits differ; block linears with zeros."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g) * 0.2)
            if name in block_linears(model):
                parameter.mul_(torch.rand(parameter.shape, generator=g) < density)
    model.config.use_cache = True
    return model.eval()


def gpt2(density: float = 0.25) -> Any:
    return sparse(build(ModelConfig(preset="debug"), 0, VOCABULARY, 64), density)


def llama(density: float = 0.25) -> Any:
    """Untied, with buffers that no file holds, and grouped keys."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return sparse(LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=END, **sizes)), density)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer_folder) -> Path:
    model = gpt2()
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    write_folder(folder, model.state_dict(), model.config, tokenizer_folder, {})
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory, exported) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "gpt2"
    packed.write(exported, folder, "int8")
    return folder


def greedy(model: Any, ids: Tensor = IDS) -> list[list[int]]:
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    return output[:, ids.shape[1] :].tolist()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@NATIVE
@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("density", [0.25, 0.1, 1.0])
def test_greedy_tokens_are_those_of_the_dense_model(make, density):
    dense = make(density)
    expected, tokens = greedy(dense), [greedy(dense, row.unsqueeze(0))[0] for row in IDS]
    assert len({token for row in expected for token in row}) > 2
    model = packed.pack(make(density), "float32")
    assert greedy(model) == expected
    assert [greedy(model, row.unsqueeze(0))[0] for row in IDS] == tokens
    kinds = packed.reading(model)["kinds"]
    assert kinds == {0.25: {"bits": len(block_linears(dense)), "dense": 1}, 0.1: {"columns": len(block_linears(dense)), "dense": 1}}.get(
        density, {"dense": len(block_linears(dense)) + 1}
    )


@NATIVE
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05), ("int8", 0.02)])
def test_logits_are_near(dtype, tolerance):
    expected = logits(gpt2())
    found = logits(packed.pack(gpt2(), dtype))
    assert found.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    assert float((found.float() - expected).abs().max()) < tolerance * float(expected.abs().max())


@NATIVE
def test_all_is_in_one_buffer_and_what_is_read_is_counted():
    model = packed.pack(gpt2(), "float32")
    places = [(p.data_ptr(), p.nbytes) for p in model.parameters()]
    total = 0
    for module in model.modules():
        if isinstance(module, packed.PackedLinear):
            weight = module.weight
            parts = [t for t in (weight.values, weight.starts, weight.bits, weight.columns, module.bias) if t is not None]
            places += [(t.data_ptr(), t.nbytes) for t in parts]
            total += sum(t.nbytes for t in parts)
    assert packed.reading(model)["bytes"] == total
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    spans = sorted(set(places))
    assert spans[-1][0] + spans[-1][1] - spans[0][0] < sum(size for _, size in spans) + 64 * len(spans)
    assert all(place % 64 == 0 for place, _ in spans)
    head = model.get_output_embeddings()
    assert head.weight.values.data_ptr() == model.transformer.wte.weight.data_ptr()  # tied as before, stored once


@NATIVE
def test_int8_keeps_the_embedding_and_has_a_head_of_its_own():
    model = packed.pack(gpt2(), "int8")
    head = model.get_output_embeddings().weight
    assert (head.kind, head.values.dtype) == ("dense", torch.uint8)
    assert model.transformer.wte.weight.dtype == torch.float32
    assert torch.equal(model.transformer.wte.weight, gpt2().transformer.wte.weight)


@NATIVE
@pytest.mark.parametrize("dtype", list(packed.DTYPES))
@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_folder_gives_the_packed_model(tmp_path, tokenizer_folder, make, dtype):
    from transformers import AutoTokenizer

    model = make()
    write_folder(tmp_path / "model", model.state_dict(), model.config, tokenizer_folder, {})
    facts = packed.write(tmp_path / "model", tmp_path / "out" / "packed", dtype)
    loaded = packed.load(tmp_path / "out" / "packed")
    in_memory = packed.pack(make(), dtype)
    assert torch.equal(logits(loaded), logits(in_memory))
    assert greedy(loaded) == greedy(in_memory)
    assert packed.reading(loaded) == packed.reading(in_memory)
    assert loaded.generation_config is not None
    assert loaded.generation_config.eos_token_id == END
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out" / "packed")) == VOCABULARY
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["packed"], "no partial folder is left"
    assert not (tmp_path / "out" / "packed" / "model.safetensors").exists()
    assert facts["packed"] == len(block_linears(model)) + (dtype == "int8")
    assert packed.is_packed(tmp_path / "out" / "packed")
    assert not packed.is_packed(tmp_path / "model")


def test_without_a_library_a_packed_model_is_unpacked_and_says_so(written, monkeypatch, caplog):
    monkeypatch.setenv(library.CHOICE, "off")
    forget()
    with caplog.at_level(logging.WARNING):
        model = packed.load(written)
    assert [record.getMessage() for record in caplog.records] == [
        f"weights are unpacked and multiplied as dense ones, for there are no native kernels: {library.CHOICE}=off"
    ]
    found, tokens = logits(model), greedy(model)
    assert packed.reading(model)["kinds"] == {"torch": 9}
    monkeypatch.undo()
    forget()
    if library.available():
        torch.testing.assert_close(logits(packed.load(written)), found, rtol=1e-3, atol=1e-3)
        assert greedy(packed.load(written)) == tokens


def test_weights_that_int8_cannot_hold(tmp_path):
    model = gpt2()
    model.transformer.h[1].mlp.c_fc.weight.data[3, 5] = float("inf")
    with pytest.raises(ConfigError, match=r"Expected finite weights for int8. Got inf or NaN in transformer.h.1.mlp.c_fc.weight. Pack to"):
        packed.encode(model, "int8")


def test_an_export_never_overwrites(exported, tmp_path):
    (tmp_path / "precious").write_text("")
    with pytest.raises(ConfigError, match="Expected a new or empty folder"):
        packed.write(exported, tmp_path, "float32")


NAME = "transformer.h.0.mlp.c_fc.weight"
PARTS = [f"{NAME}.{part}" for part in ("values", "starts", "bits", "scale")]


def without(*names: str) -> Any:
    return lambda tensors: [tensors.pop(name) for name in names]


def assign(name: str, make: Any) -> Any:
    return lambda tensors: tensors.update({name: make(tensors.get(name))})


@pytest.mark.parametrize(("change", "says"), [
    (without(f"{NAME}.values"), f"Got {NAME}.bits without values. Pack"),
    (without(f"{NAME}.bits"), f"Got {NAME} with not one index, bits or columns"),
    (without(f"{NAME}.scale"), f"Got {NAME} with uint8 values without a scale"),
    (without(*PARTS), rf"Got nothing for {NAME}, not torch.float32 \[256, 64\]"),
    (without("transformer.wpe.weight"), "Got nothing for transformer.wpe.weight"),
    (assign("transformer.h.0.mlp.c_fc.bias", lambda old: old[1:].clone()), r"Got torch.float32 \[255\] for transformer.h.0.mlp.c_fc.bias"),
    (assign("transformer.h.0.mlp.c_fc.bias", lambda old: old.double()), "Got torch.float64"),
    (assign(f"{NAME}.values", lambda old: old.view(torch.int8)), f"Got {NAME}.values of torch.int8, not torch.uint8"),
    (assign(f"{NAME}.starts", lambda old: old.flip(0).clone()), f"Got {NAME} with starts that do not rise from 0 to"),
    (assign(f"{NAME}.bits", lambda old: old.roll(1, 0).clone()), f"Got {NAME} with bits that do not fit the starts"),
    (assign("transformer.h.9.extra", lambda old: torch.zeros(1)), "Got tensors that the model has no place for: transformer.h.9.extra"),
])  # fmt: skip
def test_a_changed_file_is_refused(written, tmp_path, change, says):
    folder = shutil.copytree(written, tmp_path / "copy")
    with safe_open(folder / packed.FILE, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / packed.FILE)
    change(tensors)
    save_file(tensors, folder / packed.FILE, metadata)
    refuses(folder, says)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {packed.METADATA: "2 int8"}, {packed.METADATA: "1 float16"}])
def test_another_version_is_refused(written, tmp_path, metadata):
    folder = shutil.copytree(written, tmp_path / "copy")
    save_file(load_file(folder / packed.FILE), folder / packed.FILE, metadata)
    refuses(folder, r"Got (None|'.*') for raysparse.packed in its metadata, not version 1 and one of float32, bfloat16, int8")


def test_a_cut_file_is_refused(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "copy")
    whole = (folder / packed.FILE).read_bytes()
    (folder / packed.FILE).write_bytes(whole[: len(whole) // 2])
    refuses(folder, "Got")
    (folder / packed.FILE).unlink()
    refuses(folder, "Got")


def test_a_config_that_does_not_fit_is_refused(written, tmp_path):
    folder = shutil.copytree(written, tmp_path / "copy")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"n_inner": 100}))
    refuses(folder, r"Got transformer.h.0.mlp.c_fc.weight with starts of torch.int32 \[257\], not torch.int32 \[101\]")
    (folder / "config.json").write_text("{")
    refuses(folder, "Got a config that transformers cannot read")


def refuses(folder: Path, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        packed.load(folder)
    assert str(error.value).startswith(f"Expected a packed model of this version of raysparse in {folder / packed.FILE}. Got ")
    assert str(error.value).endswith("Pack the model again.")
    assert re.search(says, str(error.value)), str(error.value)
