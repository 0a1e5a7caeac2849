"""Run folders out of thin air."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """``write_run(folder, verb, sparsity, **changes)`` -> the folder of a finished run."""
    return partial(_write_run, tmp_path)


@pytest.fixture
def write_mst(tmp_path: Path) -> Callable[..., Path]:
    """``write_mst(folder, **changes)`` -> the folder of a finished run whose topology evolves as MST's does."""
    return partial(_write_mst, tmp_path)


@pytest.fixture
def edit_metrics() -> Callable[..., None]:
    """``edit_metrics(folder, change)``: ``change(record)`` returns what is to stand in the place of each record."""
    return _edit_metrics


@pytest.fixture
def edit_summary() -> Callable[..., None]:
    """``edit_summary(folder, **changes)``: as ``changes`` of `write_run`, afterwards."""
    return _edit_summary


@pytest.fixture
def write_predictions() -> Callable[..., None]:
    """``write_predictions(folder, hypotheses, references)``."""
    return _write_predictions


@pytest.fixture
def write_search(tmp_path: Path) -> Callable[..., Path]:
    """``write_search(trials, **changes of search.yaml)`` -> the folder of a search; each trial is a dict of what differs from `TRIAL`."""
    return partial(_write_search, tmp_path)


TRIAL: dict[str, Any] = {
    "status": "finished", "task": "docstrings", "sparsity": 0.0, "params": {"optimizer.lr": 0.001}, "seed": 0, "objective": 2.0,
    "metric": "validation_loss", "lower_is_better": True, "error": None, "exported": False, "scores": {"bleu": 30.0},
    "model": None, "parent": ..., "hypotheses": None, "changes": {},
}  # fmt: skip
"""``sparsity`` is that of the parent, or of a pre-training itself; ``hypotheses`` are set against `REFERENCES`; ``changes`` are those
of `write_run`. Of the parent as of the trial 1e12 (1 - sparsity / 2) FLOPs are counted and 100 s measured."""

REFERENCES = [["one fish"], ["two fish"], ["red fish"], ["blue fish"]]


def _write_search(root: Path, trials: list[dict[str, Any]], /, **changes: Any) -> Path:
    folder, lines = root / changes.pop("folder", "search"), []
    (folder / "trials").mkdir(parents=True)
    named = dict.fromkeys(told["task"] for told in (TRIAL | trial for trial in trials) if told["task"])
    space = {"optimizer.lr": {"loguniform": [1e-5, 1e-3]}}
    config: dict[str, Any] = {
        "run": {"name": "demo", "folder": str(root), "workers": 1},
        "pretrain": {"files": ["pretrain.yaml"], "set": {"training.steps": 20}, "space": {"sparsity.target": {"choice": [0, 0.5, 0.75]}}},
        "tasks": {name: {"files": [f"{name}.yaml"], "set": {}, "space": space} for name in named},
        "algorithm": {"type": "grid"},
        "scheduler": {"type": "asha", "grace": 10},
        "seeds": [0, 1],
        "metric": "auto",
        "tolerance": 0.5,
    }
    (folder / "search.yaml").write_text(yaml.safe_dump(config | changes))
    for i, trial in enumerate(trials):
        lines.append(_write_trial(root, folder, i, TRIAL | trial))
    (folder / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _write_trial(root: Path, folder: Path, i: int, told: dict[str, Any]) -> dict[str, Any]:
    """Leaves the trial's run, and its parent's; returns the line of trials.jsonl."""
    task, sparsity, name = told["task"], told["sparsity"], told.get("folder", f"trials/t{i}")
    parent = root / f"pretrain-{sparsity}" if task and told["parent"] is ... else told["parent"] if task else None
    if isinstance(parent, Path) and not parent.exists():
        _write_run(root, parent.name, sparsity=sparsity)
    if told["status"] == "finished":
        of_task = {"name": task, "primary": next(iter(told["scores"])), "num_examples": 4, "scores": told["scores"], "baseline": {}}
        changes = {"task": of_task, "parent": f"pretrain-{sparsity}"} if task else {}
        _write_run(folder, name, "finetune" if task else "pretrain", 0.0 if task else sparsity, **changes | told["changes"])
        if told["hypotheses"] is not None:
            _write_predictions(folder / name, told["hypotheses"], REFERENCES)
    else:
        (folder / name).mkdir(parents=True)
    if told["status"] == "stopped":
        (folder / name / "metrics.jsonl").write_text('{"step": 5, "tokens": 500, "validation_loss": 3.5}\n{"step": 6, "tok')
    line = {key: told[key] for key in ("status", "task", "params", "seed", "metric", "lower_is_better", "objective", "error", "exported")}
    model = {"sparsity.target": sparsity} if told["model"] is None else told["model"]
    command = f"raysparse {'finetune' if task else 'pretrain'} {task or 'pretrain'}.yaml run.name=t{i}"
    return line | {"folder": name, "model": model, "parent": None if parent is None else str(parent), "command": command}


def _write_run(root: Path, folder: str, /, verb: str = "pretrain", sparsity: float = 0.0, **changes: Any) -> Path:
    """A finished run of 20 steps; ``changes`` are dotted keys of its summary, with ``__`` for the dot."""
    path = root / folder
    path.mkdir(parents=True)
    counted, loss = 1e12 * (1 - sparsity / 2), 3.0 + sparsity
    layers = [
        {"name": f"transformer.h.{i}.mlp.c_fc.weight", "shape": [8, 8], "nnz": round(64 * (1 - sparsity)), "sparsity": sparsity}
        for i in range(3)
    ]
    summary: dict[str, Any] = {
        "raysparse": "0.1.0",
        "verb": verb,
        "name": folder,
        "config_digest": f"digest-of-{folder}",
        "model": {"class": "GPT2LMHeadModel", "parameters": 1000},
        "loss": {"train": loss, "validation": loss, "perplexity": math.exp(loss)},
        "sparsity": {
            "target": sparsity,
            "actual": sparsity,
            "of_model": sparsity / 2,
            "nnz": round(1_234_568 * (1 - sparsity)),
            "total": 1_234_568,
            "mask_digest": "feedc0de",
            "layers": layers,
        },
        "flops": {
            "convention": "spdf",
            "counted": counted,
            "executed": 1e12,
            "dense": 1e12,
            "reduction": 1e12 / counted,
            "reduction_without_head": 2.5,
        },
        "steps": 20,
        "tokens": 2000,
        "seconds": 100.0,
        "tokens_per_s": 20.0,
        "bytes_sent": 12_300_000,
        "workers": 2,
        "dense_bytes_sent": 24_600_000,
        "wire_seconds": 2.5,
        "memory_bytes": {"weights": 4000, "gradients": 4000, "moments": round(8000 * (1 - sparsity / 2)), "dense_moments": 8000},
        "peak_memory_bytes": 4_000_000,
        "versions": {"torch": "2.13.0"},
    }
    if verb == "pretrain":
        summary["data"] = {"unigram_cross_entropy": 5.0, "train_tokens": 2000}
    else:
        scores = {"scores": {"bleu": 60.0, "ter": 30.0}, "baseline": {"bleu": 10.0}}
        summary |= {"parent": "dense", "task": {"name": "e2e", "primary": "bleu", "num_examples": 40, **scores}}
    (path / "summary.json").write_text(json.dumps(summary))
    _edit_summary(path, **changes)
    records = [
        {"step": step, "tokens": 100 * step, "loss": loss + 5 / step, "lr": 1e-3, "seconds": 5.0, "sparsity": sparsity}
        | {"flops": counted * step / 20, "phase": "training", "attention_density": 1.0}
        for step in range(1, 21)
    ]
    records += [{"step": step, "tokens": 100 * step, "validation_loss": loss + 5 / step} for step in (10, 20)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def _write_mst(root: Path, folder: str, /, **changes: Any) -> Path:
    """20 steps in three phases: dense to 80 % in the update of step 3, dropping and growing in step 9, dense in that of step 17."""
    told = {"updates": 3, "skipped": 1, "explored": 0.975, "mean_churn": 0.3, "seconds_per_update": 0.1}
    told |= {"mean_density": 0.44, "mean_attention_density": 0.4375}
    changes = {"sparsity__actual": 0.0, "sparsity__nnz": 1_234_568, "flops__reduction_with_updates": 1.5} | changes
    path = _write_run(root, folder, sparsity=0.8, **{"topology": told, **changes})

    def change(record: dict[str, Any]) -> dict[str, Any]:
        last = record["step"] - 1  # the step that the record tells of
        phase = "warm_up" if last < 5 else "ultra_sparsification" if last < 15 else "restoration"
        told = {"sparsity": 0.8 if 3 <= last < 17 else 0.0, "attention_density": 0.25 if last < 15 else 1.0, "phase": phase}
        return record | told if "loss" in record else record

    _edit_metrics(path, change)
    #          step phase                   sparsity churn skipped
    versions = [
        (0, "warm_up", 0.0, 0.0, None),
        (3, "warm_up", 0.8, 0.0, None),
        (9, "ultra_sparsification", 0.8, 0.25, "no gradient"),
        (17, "restoration", 0.0, 0.75, None),
    ]
    keys = ("version", "step", "phase", "sparsity", "churn", "skipped")
    journal = [{"attempt": 1, "nonce": "feed"}] + [dict(zip(keys, (i, *row), strict=True)) for i, row in enumerate(versions)]
    (path / "topology.jsonl").write_text("".join(json.dumps(record) + "\n" for record in journal))
    return path


def _edit_summary(path: Path, **changes: Any) -> None:
    summary = json.loads((path / "summary.json").read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        at = summary
        for parent in parents:
            at = at[parent]
        at[last] = value
    (path / "summary.json").write_text(json.dumps(summary))


def _edit_metrics(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    file = path / "metrics.jsonl"
    records = [change(json.loads(line)) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def _write_predictions(path: Path, hypotheses: list[str], references: list[list[str]]) -> None:
    records = [{"hypothesis": text, "references": texts} for text, texts in zip(hypotheses, references, strict=True)]
    (path / "predictions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
