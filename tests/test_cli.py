"""The console script: what it prints, what it refuses before anything starts, and that it loses nothing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from raysparse.__main__ import EXAMPLES, _config_type, main
from raysparse.config import ConfigError, load, merge
from raysparse.runtime.launch import check_address

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config_file(pretrain_values: dict[str, Any], tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(pretrain_values))
    return file


def cli(*words: object) -> int:
    return main([str(word) for word in words])


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as end:
        cli("--help")
    assert end.value.code == 0
    text = capsys.readouterr().out
    for verb in ("plan", "pretrain", "finetune", "evaluate", "export", "compare"):
        assert f"raysparse {verb}" in text
    with pytest.raises(SystemExit):
        cli("pretrain", "--help")
    text = capsys.readouterr().out
    assert "--local" in text
    assert "--dry-run" in text
    assert "sparsity.target=0.75" in text


def test_keys_are_explained(capsys):
    assert cli("pretrain", "--keys") == 0
    text = capsys.readouterr().out
    assert "sparsity.target = 0.0" in text
    assert "Fraction of zeros in the sparse weights" in text
    assert "run.workers = 1" in text


def test_console_script_and_module_are_one(tmp_path):
    script = Path(sys.executable).with_name("raysparse")
    commands = ([sys.executable, "-m", "raysparse"], *([[str(script)]] if script.exists() else []))
    for command in commands:
        done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
        assert "train large models with most of their weights absent" in done.stdout


def test_plan_of_gpt3_xl_takes_seconds_and_trains_nothing(capsys):
    assert cli("plan", ROOT / "configs" / "pretrain" / "spdf_gpt3_xl.yaml", "run.workers=64", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["sparsity"]["layers"]) == 24 * 4
    assert facts["sparsity"]["layers"][0] == {
        "name": "transformer.h.0.attn.c_attn.weight",
        "shape": [6144, 2048],
        "nnz": 6144 * 2048 // 4,
        "density": 0.25,
    }
    assert facts["memory_bytes_per_rank"]["weights"] == 4 * 1_315_723_264 // 64
    assert facts["bytes_sent_per_rank_and_step"] > 0


def test_plan_prints_a_page(capsys, config_file):
    assert cli("plan", config_file, "run.workers=2") == 0
    text = capsys.readouterr().out
    for part in ("target: 0.75", "transformer.h.1.mlp.c_proj.weight", "32 x 128", "1,024", "convention spdf", "sent a step"):
        assert part in text


def test_dry_run_writes_nothing(capsys, config_file, pretrain_values):
    assert cli("pretrain", config_file, "--dry-run") == 0
    assert "Nothing was started" in capsys.readouterr().out
    assert not Path(pretrain_values["run"]["folder"]).exists()


def test_a_local_run_from_pretraining_to_export(capsys, config_file, pretrain_values, tmp_path):
    assert cli("pretrain", config_file, "--local", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    folder = Path(pretrain_values["run"]["folder"]) / "tiny"
    assert summary == json.loads((folder / "summary.json").read_text())
    linears = {layer["name"]: layer for layer in summary["sparsity"]["layers"]}
    assert all(layer["nnz"] * 4 == layer["shape"][0] * layer["shape"][1] for layer in linears.values())
    documented = (ROOT / "docs" / "summary.md").read_text()
    for key, value in summary.items():
        for inner in value if isinstance(value, dict) and key != "versions" else [""]:
            name = f"{key}.{inner}".rstrip(".")
            assert f"`{name}" in documented or f"`{key}.*`" in documented, f"{name} is not in docs/summary.md"
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "tensorboard", "export", "checkpoints"):
        assert (folder / name).exists()
    exported = load_file(str(folder / "export" / "model.safetensors"))
    weight = exported["transformer.h.0.mlp.c_fc.weight"]
    assert int((weight != 0).sum()) == linears["transformer.h.0.mlp.c_fc.weight"]["nnz"]

    assert cli("pretrain", config_file, "--local", "--json") == 0  # finished: nothing is trained again
    assert json.loads(capsys.readouterr().out) == summary

    target = tmp_path / "hub"
    assert cli("export", f"run={folder}", f"to={target}", "--json") == 0
    capsys.readouterr()
    again = load_file(str(target / "model.safetensors"))
    assert all(torch.equal(exported[key], again[key]) for key in exported)
    assert cli("export", f"run={folder}", f"to={target}") == 2
    assert "Expected" in capsys.readouterr().err
    assert (target / "model.safetensors").exists()


def test_exported_logits_are_bit_equal(config_file, pretrain_values):
    """from_pretrained of the export against the model in training, its weights taken from the checkpoint."""
    from transformers import AutoModelForCausalLM

    from raysparse.models.build import ModelConfig, build
    from raysparse.train.checkpoint import newest, read_weights

    cli("pretrain", config_file, "--local")
    folder = Path(pretrain_values["run"]["folder"]) / "tiny"
    loaded = AutoModelForCausalLM.from_pretrained(folder / "export").eval()
    ours = build(ModelConfig.check(pretrain_values["model"]), 99, loaded.config.vocab_size, 16).eval()
    checkpoint = newest(folder / "checkpoints")
    assert checkpoint is not None
    ours.load_state_dict(read_weights(checkpoint), strict=False)  # a tied head has no entry of its own
    ids = torch.arange(48).view(3, 16)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        assert torch.equal(loaded(ids, attention_mask=mask).logits, ours(input_ids=ids).logits)


@pytest.mark.parametrize("verb", list(EXAMPLES))
def test_the_examples_of_the_help_are_configs(verb, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = EXAMPLES[verb].split()
    files, overrides = [w for w in words if "=" not in w], [w for w in words if "=" in w]
    load(_config_type(verb, files, overrides), files, overrides)


def test_changed_data_is_not_the_same_run(capsys, config_file, corpus, pretrain_values, tmp_path):
    copy = tmp_path / "docs.jsonl"
    copy.write_text(corpus.read_text())
    words = ("pretrain", config_file, "--local", f"data.train.paths=[{copy}]")
    assert cli(*words) == 0
    copy.write_text(corpus.read_text().replace("dead", "gone"))
    capsys.readouterr()
    assert cli(*words) == 2
    assert "Got other content of: tokens" in capsys.readouterr().err


def test_independent_errors_come_together(capsys, config_file):
    assert cli("pretrain", config_file, "run.workers=3", "data.train.paths=[nowhere.jsonl]", "sparsity.include=[nothing.*]") == 2
    message = capsys.readouterr().err
    for part in ("3 workers", "nowhere.jsonl", "nothing.*"):
        assert part in message


def test_an_unreachable_cluster_is_said_at_once():
    with pytest.raises(ConfigError, match=r"Expected a Ray cluster at RAY_ADDRESS=127\.0\.0\.1:1\. Got: .*refused"):
        check_address("127.0.0.1:1")
    check_address("auto")


#                        override                                  what the message says
REFUSED = [
    (["sparsity.levle=0.5", "optimizer.lr=-1"], ["2 problems", "sparsity.levle", "optimizer.lr"]),
    (["sparsity.target=1.0"], ["sparsity.target", "less than 1"]),
    (["sparsity.target=-0.1"], ["sparsity.target", "greater than or equal to 0"]),
    (["run.workers=3"], ["Expected run.workers to divide training.sequences. Got 3 workers, 4 sequences"]),
    (["run.workers=[2, 8]"], ["Expected at least one sequence for each of at most 8 workers. Got training.sequences=4", "[2, 4]"]),
    (["run.workers=[4, 2]"], ["run.workers: Expected a number of at least 1, or [least, most] of such (got [4, 2])"]),
    (["run.workers=[1, 3]", "sparsity.pattern={type: block, size: 16}"], ["Got 32 x 32, 11 rows on each of 3 ranks"]),
    (["data.train.paths=[nowhere.jsonl]"], ["nowhere.jsonl"]),
    (["data.context=100000"], ["100001 tokens"]),
    (["sharding.type=fsdp2", "sharding.replicas=2"], ["Expected sharding.replicas to divide run.workers. Got 2 replicas, 1 workers"]),
    (["model.preset=null", "model.overrides={}", "model.path=/no/such/model"], ["/no/such/model"]),
    (["model.overrides.n_hedd=2"], ["n_hedd", "n_head"]),
    (["training.length=3 epochs"], ["training.length", "pre-training text has no epochs"]),
    (["run.name=../escape"], ["run.name"]),
    (["sparsity.include=[nothing.*]"], ["nothing.*"]),
    (["sparsity.evolution.type=rigl"], ["Expected at least one update in phase training of 12 steps. Got none from rigl"]),
    (["sparsity.evolution.type=rigel"], ["sparsity.evolution", "rigl"]),
    (["sparsity.timeline=[{name: a, length: 5}, {name: b, length: 5}]"], ["12 steps together. Got ends at a 5, b 10"]),
    (
        ["sparsity.timeline=[{sparsity: {type: polynomial}}]"],
        ["Expected updates in phase training, whose sparsity moves. Got none from static"],
    ),
    (
        ["sparsity.timeline=[{sparsity: {type: cosine, start: 1, end: 0}}]", "sparsity.evolution={type: gradual, update_interval: 2}"],
        ["Expected a rule that grows weights in phase training, whose sparsity falls. Got gradual"],
    ),
    (["sparsity.target=0", "sparsity.masks=first", "sparsity.layers={'*': 0.5}"], ["Expected neither layers nor a distribution"]),
    (["sparsity.pattern={type: block, size: 64}"], ["rows (on every rank) that 64 divides", "Got 96 x 32"]),
    (["sparsity.pattern={type: 'n:m', n: 2, m: 4}"], ["Expected target 0.5", "2:4"]),
    (
        ["sparsity.timeline=[{attention: {type: local}}]", "model.attention=eager"],
        ["Expected model.attention=sdpa with sparse attention. Got eager"],
    ),
]


@pytest.mark.parametrize(("overrides", "parts"), REFUSED, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_refused_before_anything_starts(capsys, config_file, pretrain_values, overrides, parts):
    assert cli("pretrain", config_file, *overrides) == 2
    message = capsys.readouterr().err
    assert message.startswith("raysparse: ")
    assert "Expected" in message
    assert "Got" in message
    for part in parts:
        assert part in message
    assert not Path(pretrain_values["run"]["folder"]).exists()


def test_missing_config_file(capsys, tmp_path):
    assert cli("pretrain", tmp_path / "no.yaml") == 2
    assert "Expected a config file at" in capsys.readouterr().err


def test_empty_corpus(capsys, config_file, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    assert cli("pretrain", config_file, f"data.train.paths=[{tmp_path / 'empty.jsonl'}]") == 2
    assert "Got none" in capsys.readouterr().err


def test_a_used_name_with_another_config_is_refused_and_nothing_is_lost(capsys, config_file, pretrain_values):
    cli("pretrain", config_file, "--local")
    folder = Path(pretrain_values["run"]["folder"]) / "tiny"
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert cli("pretrain", config_file, "--local", "sparsity.target=0.5") == 2
    assert "Got other values of: sparsity.target" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()} == before


def test_a_file_in_the_place_of_the_run_folder(capsys, config_file, tmp_path):
    (tmp_path / "file").write_text("precious")
    assert cli("pretrain", config_file, f"run.folder={tmp_path / 'file'}") == 2
    assert "to be a folder that can be written" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "precious"


def test_unknown_option(capsys, config_file):
    with pytest.raises(SystemExit) as end:
        cli("pretrain", config_file, "--locl")
    assert end.value.code == 2
    assert "--locl" in capsys.readouterr().err


def finetune_values(values: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    pairs = [{"source": f"mask {i} layer", "target": f"live {i}"} for i in range(40)]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    files = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation", "test")}
    return {
        "run": values["run"] | {"name": "tuned"},
        "model": {"path": str(Path(values["run"]["folder"]) / "tiny")},
        "task": {"type": "seq2seq", "data": {"type": "files"} | files, "metrics": ["chrf", "bleu"]},
        "context": 16,
        "training": {"length": 6, "sequences": 4, "micro": 2, "validation_sequences": 8},
        "generation": {"max_new_tokens": 4},
        "evaluation": {"max_examples": 10},
        "cache_dir": values["data"]["cache_dir"],
    }


@pytest.mark.parametrize("masks", ["lift", "keep"])
def test_hand_over(capsys, config_file, pretrain_values, tmp_path, masks):
    """lift: revived weights start at exactly 0 and train. keep: dead weights stay dead."""
    cli("pretrain", config_file, "--local")
    tuned = tmp_path / "tuned.yaml"
    tuned.write_text(yaml.safe_dump(finetune_values(pretrain_values, tmp_path)))
    capsys.readouterr()
    assert cli("finetune", tuned, "--local", f"sparsity.masks={masks}", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    runs = Path(pretrain_values["run"]["folder"])
    before = load_file(str(runs / "tiny" / "export" / "model.safetensors"))
    after = load_file(str(runs / "tuned" / "export" / "model.safetensors"))
    name = "transformer.h.0.mlp.c_fc.weight"
    dead = before[name] == 0
    assert (after[name][dead] != 0).any() == (masks == "lift")
    assert (after[name][~dead] != before[name][~dead]).all()
    assert summary["sparsity"]["actual"] == (0.0 if masks == "lift" else 0.75)
    assert summary["parent"] == "tiny"
    assert summary["task"]["num_examples"] == 10
    assert len((runs / "tuned" / "predictions.jsonl").read_text().splitlines()) == 10
    assert cli("evaluate", tmp_path / "tuned.yaml", "--local") == 2  # a fine-tuning config has keys that evaluate has not
    capsys.readouterr()
    keys = {key: value for key, value in finetune_values(pretrain_values, tmp_path).items() if key != "training"}
    evaluation = tmp_path / "evaluation.yaml"
    evaluation.write_text(yaml.safe_dump(merge(keys, {"run": {"name": "scored"}, "model": {"path": str(runs / "tuned")}})))
    assert cli("evaluate", evaluation, "--local", "--json") == 0
    assert json.loads(capsys.readouterr().out)["task"]["scores"] == summary["task"]["scores"]


def test_keeping_masks_of_a_dense_model_is_refused(capsys, config_file, pretrain_values, tmp_path):
    cli("pretrain", config_file, "--local", "sparsity.target=0")
    tuned = tmp_path / "tuned.yaml"
    tuned.write_text(yaml.safe_dump(finetune_values(pretrain_values, tmp_path)))
    capsys.readouterr()
    assert cli("finetune", tuned, "--local", "sparsity.masks=keep") == 2
    assert "Expected masks.safetensors" in capsys.readouterr().err


def test_masks_of_a_run_its_export_and_its_checkpoints(capsys, config_file, pretrain_values):
    cli("pretrain", config_file, "--local", "sparsity.evolution={type: set, update_interval: 3}")
    folder = Path(pretrain_values["run"]["folder"]) / "tiny"
    summary = json.loads((folder / "summary.json").read_text())
    capsys.readouterr()
    assert cli("masks", folder, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["source"], facts["why"]) == ("disk", "no manager is running on Ray")
    assert facts["now"]["digest"] == summary["sparsity"]["mask_digest"]
    assert [record["step"] for record in facts["last"]] == [0, 3, 6, 9]
    for place in ("export", "checkpoints/step_00000012"):
        assert cli("masks", folder / place, "--json") == 0
        counted = json.loads(capsys.readouterr().out)
        assert counted["digest"] == summary["sparsity"]["mask_digest"]
    assert counted["history"]["now"] == facts["now"]  # the checkpoint knows what the run does
    assert counted["history"]["last"] == facts["last"]
    assert counted["layers"] == facts["layers"]
    assert cli("masks", "--diff", folder, folder / "export", "--json") == 0
    assert json.loads(capsys.readouterr().out)["jaccard"] == 1.0
    for words in ([folder], [folder / "export"], ["--diff", folder / "checkpoints" / "step_00000008", folder]):
        assert cli("masks", *words) == 0
        assert "transformer.h.1.mlp.c_proj.weight" in capsys.readouterr().out


def test_masks_are_read_without_ray(config_file, pretrain_values):
    cli("pretrain", config_file, "--local")
    folder = Path(pretrain_values["run"]["folder"]) / "tiny"
    code = "import sys; sys.modules['ray'] = None; from raysparse.__main__ import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "masks", str(folder)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "from disk" in done.stdout


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["one", "two"], "Expected one PATH, or two with --diff. Got 2."),
        (["--diff", "one"], "Got 1 with --diff. Example: raysparse masks --diff"),
        (["nowhere"], "Expected a run, a checkpoint, an exported model or a masks.safetensors at nowhere"),
        (["--diff", ".", "."], "Expected masks in"),
    ],
)
def test_masks_that_cannot_be_shown(capsys, tmp_path, monkeypatch, words, part):
    monkeypatch.chdir(tmp_path)
    assert cli("masks", *words) == 2
    assert part in capsys.readouterr().err


def test_the_help_of_masks_teaches(capsys):
    with pytest.raises(SystemExit):
        cli("masks", "--help")
    text = capsys.readouterr().out
    assert "--diff" in text
    assert "raysparse masks runs/mst" in text
    with pytest.raises(SystemExit):
        cli("--help")
    assert "raysparse masks" in capsys.readouterr().out


@pytest.fixture
def comparison_file(config_file: Path, pretrain_values: dict[str, Any], tmp_path: Path) -> Path:
    """Three methods, of seconds: dense, the values' own static masks, and MST's phases."""
    attention = {"type": "local_or_strided", "width": 4, "stride": 4}
    phases = [
        {"name": "warm_up", "length": "25 %", "sparsity": {"type": "polynomial"}, "attention": attention},
        {"name": "ultra_sparsification", "length": "50 %", "attention": attention},
        {"name": "restoration", "length": "25 %", "sparsity": {"type": "polynomial", "start": 1, "end": 0, "mirrored": True}},
    ]
    mst = {"evolution": {"type": "mixed", "update_interval": "1 steps"}, "timeline": phases}
    values = {
        "run": pretrain_values["run"] | {"name": "methods"},
        "pretrain": {"files": [str(config_file)]},
        "methods": {"dense": {"sparsity": {"target": 0}}, "static": {}, "mst": {"sparsity": mst}},
    }
    file = tmp_path / "comparison.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))  # the order of the methods is theirs in the table
    return file


def test_compare_pretrains_every_method(capsys, comparison_file, pretrain_values):
    assert cli("compare", comparison_file, "--dry-run", "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    folder = Path(pretrain_values["run"]["folder"]) / "methods"
    assert not folder.exists()
    assert cli("compare", comparison_file, "--local", "--json") == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert list(stages) == list(planned) == ["pretrain-dense", "pretrain-static", "pretrain-mst"]
    for name, summary in stages.items():
        assert summary["flops"]["counted"] == pytest.approx(planned[name]["flops"]["counted"])
        assert summary["steps"] == 12
    dense, static, mst = stages.values()
    assert static["sparsity"]["nnz"] == dense["sparsity"]["nnz"] // 4 == mst["sparsity"]["nnz"] // 4
    assert mst["topology"]["updates"] == planned["pretrain-mst"]["updates"] > 0
    table, page = (folder / "table.md").read_text(), (folder / "report.html").read_text()
    for text in ("| run | nnz | density | attention |", "| pretrain-mst |", "at equal counted FLOPs"):
        assert text in table
    assert "Phases of pretrain-mst: 1 warm_up, 2 ultra_sparsification, 3 restoration" in page
    written = {file: file.stat().st_mtime_ns for file in folder.glob("pretrain-*/*")}
    assert cli("compare", folder / "config.yaml", "--local") == 0  # finished: nothing is trained again
    assert {file: file.stat().st_mtime_ns for file in folder.glob("pretrain-*/*")} == written
    assert "pretrain-mst" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("methods.dense.sparsity.target=0.5", ["one dense method", "Got 0 dense (none) of: dense, static, mst"]),
        ("sparsity=0", ["one dense method", "Got 3 dense (dense, static, mst)"]),
        ("methods.a-b.sparsity.target=0.5", ["methods.a-b", "match pattern"]),
        ("methods.a/b.sparsity.target=0.5", ["methods.a/b", "match pattern"]),
        ("methods.mst.sparsity.levle=1", ["methods.mst: Expected a valid PretrainConfig", "sparsity.levle: no such key"]),
        ("methods.static.sparsity.include=[nothing.*]", ["methods.static: Expected the pattern 'nothing.*'"]),
        ("finetune.files=[]", ["finetune.files"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_compare_refuses_before_anything_starts(capsys, comparison_file, pretrain_values, override, parts):
    assert cli("compare", comparison_file, "--local", override) == 2
    message = capsys.readouterr().err
    for part in ["raysparse: ", "Expected", "Got", *parts]:
        assert part in message
    assert not Path(pretrain_values["run"]["folder"]).exists()


@pytest.mark.parametrize(
    ("methods", "got"),
    [({}, "Got 0 dense (none) of: no methods"), ({"a": 0.5}, "Got 0 dense (none) of: a"), ({"d": 0.0}, "Got 1 dense (d) of: d")],
)
def test_compare_wants_something_to_compare(capsys, comparison_file, methods, got):
    methods = {name: {"sparsity": {"target": target}} for name, target in methods.items()}
    comparison_file.write_text(yaml.safe_dump(yaml.safe_load(comparison_file.read_text()) | {"methods": methods}))
    assert cli("compare", comparison_file, "--local") == 2
    assert got in capsys.readouterr().err
