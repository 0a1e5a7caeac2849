"""From a run to a packed model to text, as the commands do it; packed weights score as dense ones do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from raysparse.__main__ import main
from raysparse.config import ConfigError, load
from raysparse.kernels import library
from raysparse.models import packed
from raysparse.recipes import generate
from raysparse.recipes.export import ExportConfig
from raysparse.recipes.generate import GenerateConfig
from tests.kernels.conftest import forget

NATIVE = pytest.mark.skipif(not library.available(), reason=f"no native kernels: {library.why_not()}")


def cli(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus, cache_dir) -> Path:
    """A finished run of a tiny sparse model."""
    folder = tmp_path_factory.mktemp("runs")
    values = {
        "run": {"name": "tiny", "folder": str(folder), "device": "cpu"},
        "model": {"preset": "debug", "overrides": {"n_embd": 64, "n_head": 2, "n_layer": 2}},
        "data": {
            "train": {"type": "files", "paths": [str(corpus)]},
            "validation": {"type": "holdout", "fraction": 0.2},
            "tokenizer": {"type": "train", "vocab_size": 300},
            "context": 32,
            "cache_dir": str(cache_dir),
            "num_proc": 1,
        },
        "sparsity": {"target": 0.75},
        "optimizer": {"lr": 1e-2},
        "training": {"length": 12, "sequences": 4, "micro": 2, "validation_sequences": 8},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    assert cli("pretrain", file, "--local") == 0
    return folder / "tiny"


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def generated(capsys, *words: object) -> dict[str, Any]:
    capsys.readouterr()
    assert cli("generate", *words, "max_new_tokens=8", "threads=1", "--json") == 0
    return json.loads(capsys.readouterr().out)


@NATIVE
def test_from_a_run_to_text(capsys, run, tmp_path):
    for words in (["format=packed"], ["--format", "packed"]):
        assert cli("export", f"run={run}", f"to={tmp_path / words[-1]}", *words) == 0
    assert cli("export", f"run={run / 'export'}", f"to={tmp_path / 'int8'}", "format=packed", "dtype=int8") == 0
    first, second = (tmp_path / name / packed.FILE for name in ("format=packed", "packed"))
    assert first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["format=packed", "int8", "packed"]

    prompt = "prompt=live: dead = 1 \U0001f600"  # no YAML, and taken as it is
    dense = generated(capsys, f"model={run}", prompt, "weights=dense")
    assert dense["kinds"] == {"torch": 9}
    for words in ([f"model={run}"], [f"model={run}", "weights=packed"], [f"model={tmp_path / 'packed'}"]):
        facts = generated(capsys, *words, prompt)
        assert facts["text"] == dense["text"]
        assert facts["kinds"] == {"bits": 8, "dense": 1}
        assert facts["weight_bytes_per_token"] < dense["weight_bytes_per_token"] / 1.5
        assert facts["tokens"] == 8
        assert facts["tokens_per_s"] > 0
    assert generated(capsys, f"model={tmp_path / 'int8'}", prompt)["weight_bytes_per_token"] < facts["weight_bytes_per_token"] / 2
    bfloat16 = generated(capsys, f"model={run}", prompt, "dtype=bfloat16", "weights=dense")
    assert bfloat16["weight_bytes_per_token"] == dense["weight_bytes_per_token"] / 2


def test_the_end_of_the_output_says_how_it_came_to_be(capsys, run):
    assert cli("generate", f"model={run}", "prompt=live", "max_new_tokens=5", "threads=1", "weights=dense") == 0
    text, _, line = capsys.readouterr().out.rpartition("\n\n")
    assert text
    assert line.startswith("5 tokens | ")
    for part in ("tokens/s | prefill ", " MB of weights a token | matrices: 9 torch | 1 threads"):
        assert part in line


def test_drawn_text_depends_on_the_seed_alone(capsys, run):
    words = (f"model={run}", "prompt=live", "temperature=2")
    texts = [generated(capsys, *words, f"seed={seed}")["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    likely = generated(capsys, *words, "top_p=0.0001")["text"]
    assert likely == generated(capsys, f"model={run}", "prompt=live")["text"]


def test_packed_weights_score_as_dense_ones(capsys, run, tmp_path):
    pairs = [{"source": f"mask {i} layer", "target": f"live {i}"} for i in range(12)]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation", "test")}
    values = {
        "run": {"name": "scores", "folder": str(tmp_path / "runs"), "device": "cpu"},
        "model": {"path": str(run)},
        "task": {"type": "seq2seq", "data": {"type": "files"} | files, "metrics": ["chrf"]},
        "context": 32,
        "generation": {"max_new_tokens": 8},
        "cache_dir": str(tmp_path / "cache"),
    }
    (tmp_path / "evaluation.yaml").write_text(yaml.safe_dump(values))
    assert cli("export", f"run={run}", f"to={tmp_path / 'model'}", "format=packed") == 0
    answers = []
    for name, words in {
        "dense": [],
        "packed": ["weights=packed"],
        "file": ["weights=packed", f"model.path={tmp_path / 'model'}"],
    }.items():
        assert cli("evaluate", tmp_path / "evaluation.yaml", "--local", f"run.name={name}", *words) == 0
        answers.append((tmp_path / "runs" / name / "predictions.jsonl").read_text())
    assert answers[0] == answers[1] == answers[2]
    capsys.readouterr()
    assert cli("evaluate", tmp_path / "evaluation.yaml", "--local", f"model.path={tmp_path / 'model'}") == 2
    assert "Got weights=dense, and a packed model. Use weights=packed." in capsys.readouterr().err
    assert cli("evaluate", tmp_path / "evaluation.yaml", "--local", "weights=packed", "run.device=cuda") == 2
    assert "Expected run.device=cpu with weights=packed. Got a GPU." in capsys.readouterr().err


def test_without_native_kernels_the_text_is_the_same(capsys, run, monkeypatch, caplog):
    expected = generated(capsys, f"model={run}", "prompt=live", "weights=dense")["text"]
    monkeypatch.setenv(library.CHOICE, "off")
    forget()
    facts = generated(capsys, f"model={run}", "prompt=live")
    monkeypatch.undo()
    forget()
    assert (facts["text"], facts["kinds"]) == (expected, {"torch": 9})
    assert [record.getMessage() for record in caplog.records] == [f"weights=dense, for there are no native kernels: {library.CHOICE}=off"]


@pytest.mark.parametrize(("words", "says"), [
    (["weights=dense", "dtype=int8"], "Expected weights packed with dtype int8"),
    (["threads=0"], "Expected threads auto or 1 and more. Got 0"),
    (["prompt="], "prompt"),
    (["max_new_tokens=100"], "within the model's 32 positions"),
    (["model=/no/such/model"], "Expected a model folder with a tokenizer, or a hub name, at /no/such/model"),
])  # fmt: skip
def test_what_generate_refuses(capsys, run, words, says):
    capsys.readouterr()
    assert cli("generate", f"model={run}", "prompt=live", *words) == 2
    assert says in capsys.readouterr().err


def test_a_packed_model_is_as_it_is(capsys, run, tmp_path):
    assert cli("export", f"run={run}", f"to={tmp_path / 'model'}", "format=packed") == 0
    capsys.readouterr()
    for word in ("weights=dense", "dtype=bfloat16"):
        assert cli("generate", f"model={tmp_path / 'model'}", "prompt=live", word) == 2
        assert f"as they were packed. Got {word}. Drop it" in capsys.readouterr().err
    assert cli("export", f"run={tmp_path / 'model'}", f"to={tmp_path / 'again'}", "format=packed") == 2
    assert "Got a packed one. Pack what it was made of." in capsys.readouterr().err
    assert cli("export", f"run={run}", f"to={tmp_path / 'model'}", "format=packed") == 2
    assert "Expected a new or empty folder" in capsys.readouterr().err


def test_an_ordinary_export_has_no_other_dtype():
    with pytest.raises(ConfigError, match=r"Expected dtype float32 with format huggingface. Got int8. Add format=packed"):
        load(ExportConfig, overrides=["run=a", "to=b", "dtype=int8"])


def test_dry_runs_start_nothing(capsys, run, tmp_path):
    assert cli("generate", f"model={run}", "prompt=live", "--dry-run") == 0
    assert "Nothing was started" in capsys.readouterr().out
    assert cli("export", f"run={run / 'export'}", f"to={tmp_path / 'model'}", "format=packed", "--dry-run") == 0
    assert not (tmp_path / "model").exists()


def test_a_prompt_without_tokens_is_refused(run, monkeypatch):
    monkeypatch.setattr(generate, "load_tokenizer", lambda folder: lambda text: {"input_ids": []})
    with pytest.raises(ConfigError, match=r"Expected a prompt of at least one token\. Got none in ' '\. Write more\."):
        generate.generate(GenerateConfig(model=str(run), prompt=" "))
