"""`raysparse prune`: what it writes, that others go on from it, its bits at any number of ranks, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from raysparse.__main__ import main
from raysparse.config import ConfigError, merge
from raysparse.kernels.bits import unpack
from raysparse.models.build import ModelConfig, build
from raysparse.recipes import MODULES, masks, pretrain, prune, text
from raysparse.recipes.job import Job
from raysparse.recipes.pretrain import PretrainConfig
from raysparse.recipes.prune import PruneConfig
from raysparse.runtime.local import run_here
from raysparse.train.metrics import Console
from raysparse.train.run import LocalRun
from tests.ranks import spawn

METHODS = ("sparsegpt", "wanda", "magnitude")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """A dense GPT that has learnt something of real text, Python's own library: half a minute of training."""
    values = {
        "run": {"name": "dense", "folder": str(tmp_path_factory.mktemp("trained")), "device": "cpu"},
        "model": {"preset": "debug", "overrides": {"n_embd": 64, "n_head": 4, "n_layer": 2}},
        "data": data(cache_dir),
        "optimizer": {"lr": 1e-2},
        "schedule": {"warmup": "10 %"},
        "training": {"length": 300, "sequences": 16, "micro": 16, "validate_every": 300, "validation_sequences": 8},
        "checkpoint": {"every": 300},
        "logging": {"every": 100},
    }
    config = PretrainConfig.check(values)
    carry_out(pretrain.open_run(config), config)
    return config.run.path


def data(cache_dir: Path) -> dict[str, Any]:
    return {
        "train": {"type": "python_stdlib", "max_bytes": 1_000_000},
        "validation": {"type": "holdout", "fraction": 0.1},
        "tokenizer": {"type": "train", "vocab_size": 300},
        "context": 64,
        "cache_dir": str(cache_dir),
        "num_proc": 1,
    }


def carry_out(job: Job, config: Any) -> dict[str, Any]:
    with (job.path / "console.txt").open("w") as stream:
        return run_here([job], config.run, Console(stream))[0]


@pytest.fixture
def values(trained: Path, cache_dir: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "run": {"name": "pruned", "folder": str(tmp_path / "runs"), "device": "cpu"},
        "model": {"path": str(trained)},
        "sparsity": {"target": 0.75},
        "data": data(cache_dir),
        "calibration": {"samples": 64, "batch": 8, "validation_sequences": 64},
    }


def pruned(values: dict[str, Any], **sections: Any) -> tuple[dict[str, Any], Path]:
    config = PruneConfig.check(merge(values, sections))
    job = prune.open_run(config)
    return carry_out(job, config), job.path


def whole(folder: Path) -> dict[str, torch.Tensor]:
    """Weights as the training model has them."""
    return {name: p.detach() for name, p in build(ModelConfig(path=str(folder / "export")), 0).named_parameters()}


def live(folder: Path) -> dict[str, torch.Tensor]:
    weights = whole(folder)
    return {name: unpack(bits, weights[name].shape[1]) for name, bits in load_file(folder / "export" / "masks.safetensors").items()}


def test_sparsegpt_beats_wanda_and_magnitude_on_a_real_model(values):
    found = {m: pruned(values, run={"name": m}, method={"type": m}, calibration={"samples": 128})[0] for m in METHODS}
    before = {summary["pruning"]["loss"]["before"] for summary in found.values()}
    after = {method: summary["pruning"]["loss"]["after"] for method, summary in found.items()}
    assert len(before) == 1
    assert {summary["sparsity"]["actual"] for summary in found.values()} == {0.75}
    dense = before.pop()
    print({"dense": dense} | after)
    assert dense < after["sparsegpt"]
    assert after["sparsegpt"] - dense < 0.8 * (min(after["wanda"], after["magnitude"]) - dense)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_ends_with_a_model_and_its_masks(values, method, capsys):
    summary, folder = pruned(values, method={"type": method}, sparsity={"target": 0.6, "distribution": {"type": "er"}})
    layers, found, weights = summary["sparsity"]["layers"], live(folder), whole(folder)
    assert [layer["name"] for layer in layers] == list(found)
    assert [layer["nnz"] for layer in layers] == [int(mask.sum()) for mask in found.values()]
    assert len({layer["sparsity"] for layer in layers}) > 1
    assert sum(layer["nnz"] for layer in layers) == summary["sparsity"]["nnz"] == round(0.4 * summary["sparsity"]["total"])
    assert all(torch.equal(weights[name] != 0, mask) for name, mask in found.items())
    facts = masks.count(folder)
    assert (facts["nnz"], facts["digest"]) == (summary["sparsity"]["nnz"], summary["sparsity"]["mask_digest"])
    hub = AutoModelForCausalLM.from_pretrained(folder / "export")
    assert sum(int((p == 0).sum()) for p in hub.parameters()) >= summary["sparsity"]["total"] - summary["sparsity"]["nnz"]
    told = text(summary, Job("prune", {}, {}, str(folder), ""))
    assert f"by {method}" in told
    assert ("validation loss" in told) == (summary["pruning"]["loss"]["after"] is not None)


def test_magnitude_needs_no_data(values):
    values.pop("data")
    summary, folder = pruned(values, method={"type": "magnitude"})
    assert summary["pruning"] == {"method": "magnitude", "samples": 0, "loss": {"before": None, "after": None}}
    dense = whole(Path(values["model"]["path"]))
    for name, mask in live(folder).items():
        assert dense[name].abs()[mask].min() >= dense[name].abs()[~mask].max()


def test_a_sparse_model_is_pruned_further_and_nothing_comes_back(values):
    _, half = pruned(values, run={"name": "half"}, sparsity={"target": 0.5})
    summary, folder = pruned(values, run={"name": "more"}, sparsity={"target": 0.8}, model={"path": str(half)})
    before, after = live(half), live(folder)
    assert summary["sparsity"]["actual"] == pytest.approx(0.8, abs=1e-4)
    assert all(not (after[name] & ~before[name]).any() for name in after)
    assert all(torch.equal(weight != 0, after[name]) for name, weight in whole(folder).items() if name in after)
    with pytest.raises(ConfigError, match=r"sparsity of at least 0\.5000 for .*c_attn.*Got 0\.4000.*Raise sparsity\.target"):
        pruned(values, run={"name": "less"}, sparsity={"target": 0.4}, model={"path": str(half)})
    pattern = {"target": 0.75, "pattern": {"type": "n:m", "n": 1, "m": 4}}
    with pytest.raises(ConfigError, match=r"Expected 1 live weights in each group.*Got 0 in one.*Prune the dense model"):
        pruned(values, run={"name": "groups"}, sparsity=pattern, model={"path": str(half)})


def test_zeros_of_a_model_without_masks_are_dead_too(values):
    _, half = pruned(values, run={"name": "half"}, sparsity={"target": 0.5})
    before = live(half)
    (half / "export" / "masks.safetensors").unlink()
    _, folder = pruned(values, run={"name": "more"}, sparsity={"target": 0.8}, model={"path": str(half / "export")})
    assert all(not (mask & ~before[name]).any() for name, mask in live(folder).items())
    job = prune.open_run(
        PruneConfig.check(merge(values, {"run": {"name": "less"}, "sparsity": {"target": 0.4}, "model": {"path": str(half / "export")}}))
    )
    with pytest.raises(ConfigError, match=r"sparsity of at least 0\.5000"):
        carry_out(job, PruneConfig.check(job.config))


def test_masks_of_layers_that_are_left_out_are_kept(values):
    _, half = pruned(values, run={"name": "half"}, sparsity={"target": 0.5})
    _, folder = pruned(values, run={"name": "more"}, sparsity={"target": 0.8, "include": ["*.mlp.c_fc.weight"]}, model={"path": str(half)})
    before, after = live(half), live(folder)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == [n for n in before if "c_fc" in n]


def test_groups_of_a_pattern(values):
    _, folder = pruned(values, sparsity={"target": 0.5, "pattern": {"type": "n:m", "n": 2, "m": 4}})
    assert all((mask.view(-1, 4).sum(1) == 2).all() for mask in live(folder).values())


def on_ranks(job: Job) -> dict[str, Any]:
    return MODULES["prune"].work(job, LocalRun(Console()))


@pytest.mark.parametrize(("method", "source"), [("sparsegpt", "text"), ("sparsegpt", "pairs"), ("wanda", "pairs"), ("magnitude", "text")])
def test_the_same_bits_at_any_number_of_ranks(values, method, source, tmp_path):
    """10 chunks of 3, the last one of 1 sample: no split over ranks is even, and pairs have padding."""
    if source == "pairs":
        values.pop("data")
        values |= {"task": task(tmp_path), "context": 48}
    digests, weights = [], []
    for ranks in (1, 2, 3):
        sections = {"run": {"name": f"ranks-{ranks}"}, "method": {"type": method}, "calibration": {"samples": 28, "batch": 3}}
        config = PruneConfig.check(merge(values, sections))
        job = prune.open_run(config)
        results = spawn(on_ranks, ranks, job)
        assert len({result["sparsity"]["mask_digest"] for result in results}) == 1
        digests.append((results[0]["sparsity"]["mask_digest"], results[0]["pruning"]["loss"]))
        weights.append(whole(job.path))
    assert digests[0] == digests[1] == digests[2]
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name
        assert torch.equal(weight, weights[2][name]), name


def test_more_ranks_than_chunks(values):
    sections = {"calibration": {"samples": 8, "batch": 8, "validation_sequences": 0}}
    found = []
    for ranks in (1, 3):
        job = prune.open_run(PruneConfig.check(merge(values, sections | {"run": {"name": f"ranks-{ranks}"}})))
        found.append(spawn(on_ranks, ranks, job)[0]["sparsity"]["mask_digest"])
    assert found[0] == found[1]


def task(folder: Path) -> dict[str, Any]:
    rows = [
        json.dumps({"source": f"def f{k}():" + " return 1" * (k % 5), "target": f"returns {k}" + " and more" * (k % 3)}) for k in range(40)
    ]
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    paths = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    return {"type": "seq2seq", "data": {"type": "files", **paths}}


def test_finetuning_evaluation_and_masks_go_on_from_it(values, tmp_path, capsys, monkeypatch):
    values |= {"task": task(tmp_path), "context": 48}
    values.pop("data")
    _, folder = pruned(values, calibration={"samples": 30})
    common = ["--local", f"task={json.dumps(values['task'])}", "context=48", f"run.folder={tmp_path / 'runs'}", f"cache_dir={tmp_path}"]
    shortened = ["training.length=2", "training.sequences=4", "training.validation_sequences=4", "evaluation.max_examples=2"]
    answers = ["generation.max_new_tokens=4"]
    words = [f"model.path={folder}", "run.name=tuned", "sparsity.masks=keep", *shortened, *answers]
    assert main(["finetune", *common, *words]) == 0
    tuned = tmp_path / "runs" / "tuned"
    before, after = live(folder), live(tuned)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tuned / "summary.json").read_text())["parent"] == "pruned"
    assert not torch.equal(whole(folder)["transformer.wte.weight"], whole(tuned)["transformer.wte.weight"])
    assert main(["evaluate", *common, f"model.path={folder}", "run.name=scored", "evaluation.max_examples=2", *answers]) == 0
    capsys.readouterr()
    assert main(["masks", str(folder)]) == 0
    assert "sparsity 0.75" in capsys.readouterr().out
    # and a stage of gradual pruning: the fine-tuned sparse model further down
    _, deeper = pruned(values, run={"name": "deeper"}, sparsity={"target": 0.9}, calibration={"samples": 30}, model={"path": str(tuned)})
    assert all(not (mask & ~after[name]).any() for name, mask in live(deeper).items())


def test_a_finished_run_is_left_as_it_is_and_another_config_is_refused(values):
    first, folder = pruned(values)
    weights = (folder / "export" / "model.safetensors").stat().st_mtime_ns
    again, _ = pruned(values)
    assert again == first
    assert (folder / "export" / "model.safetensors").stat().st_mtime_ns == weights
    with pytest.raises(ConfigError, match=r"Got other values of: method\.damping"):
        pruned(values, method={"type": "sparsegpt", "damping": 0.1})


def test_a_run_that_died_begins_again(values):
    first, folder = pruned(values)
    digest = first["sparsity"]["mask_digest"]
    (folder / "summary.json").unlink()  # killed between the export and the summary
    (folder / "export" / "model.safetensors").write_bytes(b"half")
    again, _ = pruned(values)
    assert again["sparsity"]["mask_digest"] == digest
    assert whole(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": {"target": 0}}, r"Expected sparsity\.target above 0"),
        ({"data": None}, r"Expected task or data to calibrate on: method sparsegpt.*Got neither"),
        ({"task": {"type": "docstrings"}}, r"Expected task or data to calibrate on\. Got both"),
        ({"sparsity": {"pattern": {"type": "block", "size": 4}}}, r"sparsity\.pattern.*'block'"),
        (
            {"sparsity": {"target": 0.5, "pattern": {"type": "n:m", "n": 3, "m": 6}}},
            r"Expected method\.block_size that m divides\. Got 128 and m = 6.*192",
        ),
        ({"calibration": {"samples": 10**7}}, r"Expected calibration\.samples of at most [0-9]+, the windows of 64 tokens in data\.train"),
        ({"sparsity": {"include": ["*.wte.weight"]}}, r"Expected linear layers inside the blocks of GPT2LMHeadModel.*wte.*magnitude"),
        ({"sparsity": {"include": ["*.ln_f.weight"]}}, r"only parameters of other shapes"),
        ({"model": {"path": None, "preset": "debug"}}, r"Expected model\.path: a trained model to prune"),
        ({"model": {"path": "/nowhere/at/all"}}, r"Expected a model folder"),
    ],
)
def test_what_cannot_be_pruned_is_refused_before_anything_starts(values, change, message):
    with pytest.raises(ConfigError, match=message):
        prune.open_run(PruneConfig.check(merge(values, change)))
    assert not Path(values["run"]["folder"]).exists()


def test_inputs_that_are_not_finite_are_named(values, trained, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(trained / "export")
    model.transformer.h[1].ln_1.weight.data.fill_(float("inf"))
    model.save_pretrained(tmp_path / "broken")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "broken" / file).write_bytes((trained / "export" / file).read_bytes())
    with pytest.raises(ConfigError, match=r"Expected finite inputs.*Got transformer\.h\.1\.[a-z_.]+: inputs that are not finite"):
        pruned(values, model={"path": str(tmp_path / "broken")})


def test_a_folder_on_the_command_line_is_the_model(values, trained, tmp_path, capsys):
    words = ["sparsity.target=0.5", "method.type=magnitude", f"run.folder={tmp_path / 'runs'}"]
    assert main(["prune", str(trained), *words, "--local"]) == 0
    assert "by magnitude" in capsys.readouterr().out
    assert main(["prune", str(trained), *words, "run.name=other", "--dry-run"]) == 0
    assert "Nothing was started" in capsys.readouterr().out
    assert not (tmp_path / "runs" / "other").exists()
