"""`raysparse analyze`: each analysis by hand, its files, and what it refuses."""

import json
import xml.etree.ElementTree as ET

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from raysparse.__main__ import main
from raysparse.config import ConfigError
from raysparse.kernels.bits import pack
from raysparse.recipes.analyze import analyze

NAMES = [f"transformer.h.{i}.mlp.c_fc.weight" for i in range(2)]


def model(folder, seed, density=1.0, scale=1.0):
    """A GPT-2 of two layers whose first MLP matrices have live weights of this density."""
    torch.manual_seed(seed)
    made = GPT2LMHeadModel(GPT2Config(vocab_size=17, n_embd=8, n_layer=2, n_head=2, n_positions=8))
    masks = {}
    for name in NAMES:
        weight = made.get_parameter(name)
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        mask[torch.randperm(weight.numel())[: int(density * weight.numel())]] = True
        masks[name] = mask.view(weight.shape)
        weight.data.mul_(scale).mul_(masks[name])
    made.save_pretrained(folder)
    if density < 1:
        save_file({name: pack(mask.T) for name, mask in masks.items()}, str(folder / "masks.safetensors"))
        shapes = {name: {"shape": list(mask.T.shape)} for name, mask in masks.items()}
        (folder / "sparsity.json").write_text(json.dumps({"tensors": shapes}))
    return masks


def test_distance_is_what_turned(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    model(a, 0)
    model(b, 0, scale=3.0)  # longer alone: no angle
    found = analyze("distance", [str(a), str(b)])
    assert found.facts["distances"]["b"] == pytest.approx(dict.fromkeys(found.facts["distances"]["b"], 0.0), abs=1e-9)
    assert len(found.facts["distances"]["b"]) == 2 * 6
    c = tmp_path / "c"
    model(c, 1)
    found = analyze("distance", [str(a), str(b), str(a), str(c)])
    one, other = (GPT2LMHeadModel.from_pretrained(folder).get_parameter(NAMES[1]).detach().flatten().double() for folder in (a, c))
    angle = 1 - float(one @ other / (one.norm() * other.norm()))
    assert found.facts["distances"]["c"]["1.WI"] == pytest.approx(angle)
    assert list(found.facts["distances"]) == ["b", "c"]
    row = next(row for row in found.block.rows if row[0] == "WI")
    values = [found.facts["distances"]["c"][f"{layer}.WI"] for layer in range(2)]
    assert row[4:] == (f"{sum(values) / 2:.5f}", f"{max(values):.5f}", str(1 + values.index(max(values))))


def test_weights_counts_what_lives(tmp_path):
    model(tmp_path, 0, density=0.25)
    found = analyze("weights", [str(tmp_path)])
    rows = {row["name"]: row for row in found.facts["weights"]}
    assert len(rows) == 12
    weight = GPT2LMHeadModel.from_pretrained(tmp_path).get_parameter(NAMES[0]).detach()
    live = weight[weight != 0].abs().double()
    row = rows["0.WI"]
    assert (row["nnz"], row["size"], row["density"]) == (64, 256, 0.25)
    assert rows["0.WO"]["density"] == 1
    assert row["magnitude"]["q50"] == pytest.approx(float(live.quantile(0.5)))
    assert row["magnitude"]["largest"] == pytest.approx(float(live.max()))


def test_overlap_beside_chance(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    one, two = model(a, 0, density=0.5), model(b, 1, density=0.25)
    found = analyze("overlap", [str(a), str(b)])
    layer = next(layer for layer in found.facts["layers"] if layer["name"] == NAMES[0])
    both = int((one[NAMES[0]] & two[NAMES[0]]).sum())
    assert (layer["only_a"] + both, layer["only_b"] + both, layer["both"]) == (128, 64, both)
    assert layer["expected"] == 128 * 64 / 256 == 32
    assert layer["chance"] == pytest.approx(32 / (128 + 64 - 32))
    assert layer["jaccard"] == pytest.approx(both / (192 - both))
    same = analyze("overlap", [str(a), str(a)])
    assert same.facts["all"]["jaccard"] == 1.0 > same.facts["all"]["chance"]


@pytest.fixture
def studied(write_run, write_predictions):
    """Two tasks, a dense model and one of 75 %, fine-tuned with masks lifted and kept."""
    write_run("dense", "pretrain")
    write_run("sparse", "pretrain", 0.75)
    folders = []
    for task, scores in (("e2e", (60.0, 57.0, 54.0)), ("dart", (40.0, 30.0, 20.0))):
        for name, parent, sparsity, score in zip(
            ("base", "lift", "keep"), ("dense", "sparse", "sparse"), (0.0, 0.0, 0.75), scores, strict=True
        ):
            told = {"name": task, "primary": "bleu", "num_examples": 4, "scores": {"bleu": score}, "baseline": {"bleu": 1.0}}
            folders.append(write_run(f"{task}-{name}", "finetune", sparsity, task=told, parent=parent))
    return [str(folder) for folder in folders]


def test_finetuning_sets_lifted_against_kept(studied):
    found = analyze("finetuning", studied)  # the pre-training runs are found beside them
    rows = {row["task"]: row for row in found.facts["rows"]}
    assert set(rows) == {"e2e", "dart"}
    row = rows["dart"]
    assert [row[kind]["score"] for kind in ("base", "dense", "sparse")] == [40.0, 30.0, 20.0]
    assert row["sparse_minus_dense"]["value"] == -10
    assert row["dense_minus_base"]["value"] == -10
    assert row["sparsity"] == 0.75
    with pytest.raises(ConfigError, match=r"lift and one with keep.* Got e2e-lift \(e2e, parent sparse, 75 %, masks lifted\)"):
        analyze("finetuning", [studied[1]])


def test_difficulty_orders_tasks_by_their_drop(studied):
    found = analyze("difficulty", studied)
    assert [(row["task"], row["masks"], round(row["drop"], 6)) for row in found.facts["rows"]] == [
        ("dart", "kept", 50.0),
        ("dart", "lifted", 25.0),
        ("e2e", "kept", 10.0),
        ("e2e", "lifted", 5.0),
    ]
    with pytest.raises(ConfigError, match="and of the dense model of the same size on the same task"):
        analyze("difficulty", studied[1:3])


def test_where_lower_is_better_more_is_worse(write_run):
    write_run("dense", "pretrain")
    write_run("sparse", "pretrain", 0.5)
    task = {"name": "curation", "primary": "perplexity", "num_examples": 4, "baseline": {}}
    folders = [
        str(write_run(name, "finetune", 0.0, task=task | {"scores": {"perplexity": value}}, parent=parent))
        for name, parent, value in (("a", "dense", 10.0), ("b", "sparse", 12.0))
    ]
    (row,) = analyze("difficulty", folders).facts["rows"]
    assert row["drop"] == pytest.approx(20.0)


@pytest.mark.parametrize("what", ["distance", "weights", "overlap", "finetuning", "difficulty"])
def test_every_analysis_writes_a_table_a_picture_and_json(what, tmp_path, studied, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    model(a, 0, density=0.5)
    model(b, 1, density=0.25)
    paths = {"distance": [a, b], "weights": [a], "overlap": [a, b]}.get(what, studied)
    assert main(["analyze", what, *map(str, paths), "--out", str(tmp_path / "out"), "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["what"] == what
    assert json.loads((tmp_path / "out" / f"{what}.json").read_text()) == json.loads(told.out)
    markdown = (tmp_path / "out" / f"{what}.md").read_text()
    assert "| --- |" in markdown
    assert f"({what}.svg)" in markdown
    picture = ET.fromstring((tmp_path / "out" / f"{what}.svg").read_text())
    assert picture.tag.endswith("svg")
    assert "currentColor" not in (tmp_path / "out" / f"{what}.svg").read_text()
    assert main(["analyze", what, *map(str, paths), "--out", str(tmp_path / "out")]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 110


@pytest.mark.parametrize(
    ("what", "paths", "message"),
    [
        ("distance", ["a"], "Expected pairs of a pre-trained and a fine-tuned model. Got 1 paths"),
        ("weights", ["a", "b"], "Expected 1 path for `raysparse analyze weights`. Got 2"),
        ("overlap", ["a"], "Expected 2 paths"),
        ("weights", ["nowhere"], "Expected a finished run or a model folder at nowhere. Got nothing there"),
        ("finetuning", ["nowhere"], "Got nothing there"),
    ],
)
def test_wrong_paths(what, paths, message):
    with pytest.raises(ConfigError, match=message):
        analyze(what, paths)


def test_an_overlap_needs_masks(tmp_path):
    model(tmp_path, 0)
    with pytest.raises(ConfigError, match=r"Expected masks in .* Got none: it is dense"):
        analyze("overlap", [str(tmp_path), str(tmp_path)])
