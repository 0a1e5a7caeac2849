"""`raysparse recover`: a teacher, what is pruned from it, and what each way of fine-tuning brings back."""

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from raysparse.__main__ import main
from raysparse.config import read_yaml
from raysparse.recipes.recover import RecoverConfig, Stages
from raysparse.report.recovery import Difference, differences

T5 = {"preset": "t5-small", "overrides": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}}


@pytest.fixture
def values(pretrain_values, tmp_path) -> dict[str, Any]:
    for split in ("train", "validation", "test"):
        rows = [json.dumps({"source": f"layer {k}", "target": f"live {k % 3}"}) for k in range(12)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    paths = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation", "test")}
    task = {"type": "seq2seq", "data": {"type": "files", **paths}, "metrics": ["chrf"]}
    common = {"task": task, "context": 16, "cache_dir": str(tmp_path)}
    calibration = {"samples": 8, "validation_sequences": 4}
    files = {
        "pretrain": pretrain_values | {"sparsity": {"target": 0}},
        "prune": common | {"model": {"path": "elsewhere"}, "sparsity": {"target": 0.1}, "calibration": calibration},
        "finetune": common
        | {
            "model": {"path": "elsewhere"},
            "training": {"length": 4, "sequences": 4, "micro": 4, "validation_sequences": 4},
            "generation": {"max_new_tokens": 3},
        },
    }
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    stages = {name: {"files": [str(tmp_path / f"{name}.yaml")]} for name in files}
    return stages | {
        "run": {"name": "back", "folder": str(tmp_path / "runs"), "device": "cpu"},
        "teacher": stages["finetune"] | {"set": {"training": {"length": 6}}},
        "levels": [0.5, 0.75],
        "seeds": [3, 4],
    }


def written(tmp_path: Path, values: dict[str, Any]) -> str:
    file = tmp_path / "recover.yaml"
    file.write_text(yaml.safe_dump(values))
    return str(file)


def test_every_way_starts_from_the_same_pruned_model_and_ends_in_one_table(values, tmp_path, capsys):
    file = written(tmp_path, values)
    assert main(["recover", file, "--local", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    folder = tmp_path / "runs" / "back"
    assert [(row["level"], row["way"]) for row in facts["rows"]] == [
        (level, way) for level in (0.5, 0.75) for way in ("cross_entropy", "kl", "squarehead")
    ]
    for row in facts["rows"]:
        runs = [folder / f"{row['way']}-{row['level']}-{seed}" for seed in (3, 4)]
        summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
        assert [read_yaml(run / "config.yaml")["run"]["seed"] for run in runs] == [3, 4]
        assert {summary["flops"]["teacher"] > 0 for summary in summaries} == {row["way"] != "cross_entropy"}
        losses = [summary["loss"]["validation"] for summary in summaries]
        assert row["measures"]["validation loss"] == {"mean": mean(losses), "deviation": stdev(losses), "values": losses}
        assert row["measures"]["chrf"]["values"] == [summary["task"]["scores"]["chrf"] for summary in summaries]
        assert row["sparsity"] == pytest.approx(row["level"], abs=1e-3)
        for seed in (3, 4):
            masks = [
                load_file(folder / name / "export" / "masks.safetensors")
                for name in (f"prune-{row['level']}-{seed}", f"{row['way']}-{row['level']}-{seed}")
            ]
            assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    told = (folder / "table.md").read_text()
    assert f"{facts['rows'][0]['measures']['validation loss']['mean']:.4f} ±" in told
    assert "| dense |" in told.replace(" 0 |", " |", 1)
    page = (folder / "report.html").read_text()
    assert "<svg" in page
    assert "squarehead" in page
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/summary.json")}
    assert len(before) == 2 + 4 + 12
    assert main(["recover", file, "--local"]) == 0  # finished stages are left as they are
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/summary.json")} == before
    told = " ".join(capsys.readouterr().out.split())
    assert f"At 0.75, chrf seed by seed: {Difference(**facts['differences'][3]).text}" in told
    assert len(facts["differences"]) == 6


def test_an_encoder_decoder_from_scratch(values, tmp_path, capsys):
    changes = {"tokenizer": {"type": "train", "vocab_size": 300}, "model": T5 | {"path": None}}
    values |= {"pretrain": None, "teacher": values["teacher"] | {"set": changes}, "levels": [0.5], "seeds": [0]}
    values["ways"] = {"squarehead": {"distillation": {"eps": 1e-9}}}
    assert main(["recover", written(tmp_path, values), "--local", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert row["measures"]["validation loss"]["deviation"] is None


def test_what_is_wrong_with_a_late_stage_is_found_before_the_teacher_is_trained(values, tmp_path, capsys):
    def refused(changes, text):
        assert main(["recover", written(tmp_path, values | changes), "--local"]) == 2
        assert text in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "runs" / "back").exists()

    refused({"levels": [0.75, 0.5]}, "Expected levels that rise. Got 0.75, 0.5. Put them in order Correct these keys")
    refused({"levels": [0.8333331, 0.8333332]}, "Expected levels that six digits tell apart")
    refused({"ways": {"prune": {}}}, "Expected ways with names of their own. Got prune")
    refused({"seeds": [1, 1]}, "Expected each seed once. Got 1, 1")
    refused(
        {"ways": {"kl": {"distillation": {"logit": -1}}}},
        "finetune or ways.kl: Expected a valid FinetuneConfig. Got 1 problem: distillation.logit",
    )
    refused({"ways": {"kl": {"distilation": {}}}}, "distilation")
    scratch = {"tokenizer": {"type": "train", "vocab_size": 300}, "model": {"preset": "debug", "path": None}}
    alone = {"pretrain": None, "teacher": values["teacher"] | {"set": scratch}}
    refused(alone | {"prune": values["prune"] | {"set": {"sparsity": {"include": ["nowhere"]}}}}, "nowhere")
    refused(alone | {"prune": values["prune"] | {"set": {"calibration": {"samples": 500}}}}, "Expected calibration.samples of at most 12")
    refused(alone | {"finetune": values["finetune"] | {"set": {"generation": {"max_new_tokens": 16}}}}, "16 for the answer")
    assert main(["recover", written(tmp_path, values), "--dry-run"]) == 0
    assert not (tmp_path / "runs" / "back").exists()
    many = values | {"prune": values["prune"] | {"set": {"calibration": {"samples": 500}}}}
    assert main(["recover", written(tmp_path, many), "--local"]) == 2  # whose tokenizer is known once its text is read
    assert "Expected calibration.samples of at most 12" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "runs" / "back" / "pretrained" / "metrics.jsonl").exists()


def test_task_and_lengths_of_every_stage_are_the_teachers(values):
    stages = Stages(RecoverConfig.check(values | {"teacher": values["teacher"] | {"set": {"context": 24, "task": {"metrics": ["bleu"]}}}}))
    for stage in (stages.teacher, *stages.pruned.values(), *stages.tuned.values()):
        assert (stage.context, stage.task.metrics) == (24, ("bleu",))
    ways = {way: stages.tuned[0.5, 3, way].distillation for way in ("cross_entropy", "kl", "squarehead")}
    assert ways["cross_entropy"] is None
    assert {taught.teacher for taught in ways.values() if taught} == {str(stages.teacher.run.path)}
    assert [(taught.task, taught.logit, taught.feature) for taught in ways.values() if taught] == [(1, 1, 0), (1, 0, 1)]
    assert {tuned.run.seed for tuned in stages.tuned.values()} == {3, 4}
    assert stages.teacher.run.seed == 0


class Told:
    def __init__(self, way, scores):
        self.way, self.level, self.measures = way, 0.5, {"chrf": scores, "wer": scores}


def test_differences_are_judged_seed_by_seed():
    def judged(*scores):
        rows: Any = [Told(way, values) for way, values in zip("abc", scores, strict=False)]
        return [(each.ways, each.judged) for each in differences(rows, "chrf")]

    three = judged([10.0, 11.0, 12.0], [12.0, 13.1, 14.0], [12.5, 12.9, 13.9])
    assert three == [(("a", "b"), True), (("a", "c"), True), (("b", "c"), False)]
    assert judged([10.0, 11.0, 12.0], [10.1, 11.5, 12.2]) == [(("a", "b"), False)]  # all of one sign, and yet
    assert judged([10.0], [12.0]) == [(("a", "b"), None)]
    first, second = [10.0, 11.0, 12.0], [12.0, 13.1, 14.0]
    rows: Any = [Told("a", first), Told("b", second)]
    (found,) = differences(rows, "chrf")
    each = [2.0, 13.1 - 11.0, 2.0]
    assert (found.mean, found.error) == (pytest.approx(mean(each)), pytest.approx(stdev(each) / 3**0.5))
    assert found.text == "b - a +2.03 ± 0.03*"


def test_the_shipped_study_is_that_of_the_paper():
    for file in ("tiny_translation", "tiny_speech"):
        config = RecoverConfig.check(read_yaml(Path(__file__).parents[2] / "configs" / "recover" / f"{file}.yaml"))
        assert (config.levels, len(config.seeds)) == ((0.5, 0.75, 0.9), 3)
        stages = Stages(config)
        assert stages.tuned[0.9, 2, "cross_entropy"].distillation is None
        assert len(stages.tuned) == 27
