"""Searches on a real Ray: what trials do, what survives, what is left behind."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from raysparse.__main__ import main
from raysparse.report.search import read_search
from tuning import search as driver
from tuning.config import SearchConfig
from tuning.space import Search
from tuning.trial import LOG

pytestmark = pytest.mark.ray


@pytest.fixture
def model(pretrain_values, tmp_path, capsys):
    """A pre-trained model, made in this process."""
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(pretrain_values))
    assert main(["pretrain", str(tmp_path / "model.yaml"), "--local", "run.name=model"]) == 0
    capsys.readouterr()
    return str(Path(pretrain_values["run"]["folder"]) / "model")


def of_one_model(values, model, space, **changes):
    """A search of the settings of one model."""
    stage = values["tasks"]["pairs"]
    return values | {"pretrain": None, "tasks": {"pairs": stage | {"set": {"model": {"path": model}}, "space": space}}} | changes


def told(config):
    """Learning rate -> last line of ``trials.jsonl``."""
    lines = [json.loads(line) for line in (config.path / "trials.jsonl").read_text().splitlines()]
    return {line["params"]["optimizer.lr"]: line for line in lines}


def last_step(config, line):
    records = [json.loads(record) for record in (config.path / line["folder"] / "metrics.jsonl").read_text().splitlines()]
    return max(record["step"] for record in records)


def test_two_levels_from_nothing_to_the_page(ray_instance, search_values, pretrain_values, tmp_path, capsys):
    config = SearchConfig.check(search_values())
    facts, text = driver.search(config, resume=False)
    trials = read_search(config.path).trials
    assert {(t.status, t.model["sparsity.target"], t.params["optimizer.lr"]) for t in trials} == {
        ("finished", sparsity, lr) for sparsity in (0.0, 0.75) for lr in (1e-2, 1e-9)
    }
    assert all(cell.best == {"optimizer.lr": 1e-2} for cell in read_search(config.path).cells)
    kept = {t.params["optimizer.lr"]: (config.path / t.folder / "export").exists() for t in trials}
    assert kept == {1e-2: True, 1e-9: False}
    assert not any((config.path / t.folder / "checkpoints").exists() for t in trials)
    assert {file.name for file in config.path.iterdir()} >= {"report.html", "report.md", "results.csv", "tensorboard"}
    assert json.dumps(facts)
    assert str(config.path / "report.html") in text

    written = {file: file.stat().st_mtime_ns for file in config.path.parent.rglob("summary.json")}
    assert len(written) == 6
    driver.search(config.model_copy(update={"tolerance": 3.0}), resume=True)
    assert {file: file.stat().st_mtime_ns for file in config.path.parent.rglob("summary.json")} == written

    assert_as_by_hand(config, trials, pretrain_values, tmp_path, capsys)


def assert_as_by_hand(config, trials, pretrain_values, tmp_path, capsys):
    """A trial at sparsity 0 is a plain dense run bit for bit: of a model that was pre-trained without a word of sparsity."""
    plain = {key: value for key, value in pretrain_values.items() if key != "sparsity"} | {"kernels": "dense"}
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(plain))
    assert main(["pretrain", str(tmp_path / "plain.yaml"), "--local", "run.name=plain"]) == 0
    dense = next(t for t in trials if t.model["sparsity.target"] == 0 and t.params["optimizer.lr"] == 1e-2)
    capsys.readouterr()
    words = [*shlex.split(dense.command)[1:], f"model.path={config.path.parent / 'plain'}", "run.name=by_hand"]
    assert main([*words, "--local", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["loss"] == dense.run.summary["loss"]
    assert again["task"] == dense.run.summary["task"] | {"tokens_per_s": again["task"]["tokens_per_s"]}
    folders = config.path.parent / "by_hand", config.path / dense.folder
    here, there = (load_file(folder / "export" / "model.safetensors") for folder in folders)
    assert all(here[name].equal(there[name]) for name in here | there)


@pytest.mark.slow
def test_pruned_models_from_nothing_to_the_page(ray_instance, pruned_values, pretrain_values, tmp_path, capsys):
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(pretrain_values))
    assert main(["pretrain", str(tmp_path / "model.yaml"), "--local", "run.name=dense", "sparsity.target=0"]) == 0
    dense = str(Path(pretrain_values["run"]["folder"]) / "dense")
    values = pruned_values(prune={"set": {"model": {"path": dense}}, "space": {"method.type": {"choice": ["wanda"]}}})
    values["tasks"]["pairs"]["set"]["distillation"]["teacher"] = dense
    config = SearchConfig.check(values)
    facts, _ = driver.search(config, resume=False)
    assert [cell["label"] for cell in facts["tasks"][0]["cells"]] == ["dense", "50 %"]
    trials = read_search(config.path).trials
    assert {(t.status, t.sparsity, t.run.summary["sparsity"]["actual"], t.params["distillation.feature"]) for t in trials} == {
        ("finished", sparsity, sparsity, weight) for sparsity in (0, 0.5) for weight in (0.5, 1.0)
    }
    assert all(t.run.summary["flops"]["teacher"] > 0 for t in trials)
    assert {t.parent is None for t in trials if t.sparsity == 0} == {True}
    written = {file: file.stat().st_mtime_ns for file in config.path.parent.rglob("summary.json")}
    assert len(written) == 1 + 1 + 4
    driver.search(config.model_copy(update={"tolerance": 3.0}), resume=True)
    assert {file: file.stat().st_mtime_ns for file in config.path.parent.rglob("summary.json")} == written

    capsys.readouterr()
    for trial in (next(t for t in trials if t.sparsity == sparsity) for sparsity in (0, 0.5)):
        assert main([*shlex.split(trial.command)[1:], "--local", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["loss"] == trial.run.summary["loss"]


def test_hopeless_and_failing_trials(ray_instance, search_values, model):
    """One after another: the second is stopped at its first rung, the third breaks down, the search goes on."""
    space = {"optimizer.lr": {"choice": [1e-2, 1e-9, 1e25]}}
    config = SearchConfig.check(
        of_one_model(search_values(), model, space, scheduler={"type": "asha", "grace": 0.25, "reduction": 4}, max_concurrent=1)
    )
    driver.search(config, resume=False)
    lines = told(config)
    assert {lr: line["status"] for lr, line in lines.items()} == {1e-2: "finished", 1e-9: "stopped", 1e25: "failed"}
    assert (last_step(config, lines[1e-2]), last_step(config, lines[1e-9])) == (8, 2)
    assert "Expected finite gradients" in lines[1e25]["error"]
    assert lines[1e25]["objective"] is None


@pytest.mark.slow
def test_optuna_searches_each_cell(ray_instance, search_values):
    values = search_values(algorithm={"type": "optuna", "num_samples": 3}, seeds=[0, 1])
    values["tasks"]["pairs"]["space"] = {"optimizer.lr": {"loguniform": [1e-4, 1e-1]}, "schedule.warmup": {"choice": ["0 %", "25 %"]}}
    values["tasks"]["others"] = values["tasks"]["pairs"] | {"set": {"training": {"length": 4}}}
    config = SearchConfig.check(values)
    facts, _ = driver.search(config, resume=False)
    assert [task["task"] for task in facts["tasks"]] == ["pairs", "others"]
    cells = read_search(config.path).cells
    assert len(cells) == 4
    for cell in cells:
        assert [trial.seed for trial in cell.trials].count(0) == 3
        assert [trial.seed for trial in cell.chosen] == [0, 1]  # the best again, at the other seed
        assert all(1e-4 <= trial.params["optimizer.lr"] < 1e-1 for trial in cell.trials)


@pytest.mark.slow
def test_score_and_flops_at_once(ray_instance, search_values):
    values = search_values(algorithm={"type": "nsga2", "num_samples": 4})
    values["tasks"]["pairs"]["space"] = {"training.length": {"choice": [4, 8]}}
    values["tasks"]["pairs"]["set"] = {"validate_by": "metric"}
    config = SearchConfig.check(values)
    assert Search(config).metric("pairs") == "chrf"
    driver.search(config, resume=False)
    trials = read_search(config.path).trials
    assert len(trials) >= 4  # a point that came again ran at another seed
    assert {trial.params["training.length"]: trial.run.summary["flops"]["counted"] for trial in trials}.keys() == {4, 8}
    assert all(trial.metric == "chrf" and trial.objective == trial.run.summary["loss"]["validation_score"] for trial in trials)


@pytest.mark.slow
def test_a_population_goes_on_from_the_best(ray_instance, search_values, model):
    space = {"optimizer.lr": {"choice": [1e-2, 1e-9]}}
    config = SearchConfig.check(
        of_one_model(search_values(), model, space, scheduler={"type": "pbt", "every": 0.25, "quantile": 0.5}, algorithm={"type": "grid"})
    )
    driver.search(config, resume=False)
    runs = list((config.path / "trials").iterdir())
    went_on = [run for run in runs if (run / LOG).exists() and "going on from step_" in (run / LOG).read_text()]
    assert len(runs) > 2, "nobody was perturbed"
    assert went_on
    untrained = max(json.loads(line)["validation_loss"] for run in runs for line in _validations(run) if json.loads(line)["step"] == 2)
    trials = read_search(config.path).trials
    assert len(trials) == 2
    assert all(trial.objective < 0.9 * untrained for trial in trials), "1e-9 alone learns nothing: it has the other's weights"


def _validations(run):
    file = run / "metrics.jsonl"
    return [line for line in file.read_text().splitlines() if "validation_loss" in line] if file.exists() else []


def command(values, tmp_path, *words):
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(values))
    return [sys.executable, "-m", "tuning", str(tmp_path / "search.yaml"), *words]


def wait_for(condition, process, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def lines_of(folder):
    file = folder / "trials.jsonl"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.slow
def test_interrupted_killed_and_resumed(search_values, model, tmp_path):
    """Ctrl-C, then kill -9 of the driver: each time --resume goes on, and runs nothing again that is finished."""
    space = {"optimizer.lr": {"choice": [1e-2, 2e-2, 3e-2, 4e-2]}}
    values = of_one_model(search_values(), model, space, max_concurrent=1)
    values["tasks"]["pairs"]["set"]["training"] = {"length": 100}
    folder = SearchConfig.check(values).path
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    first = subprocess.Popen(command(values, tmp_path), env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: len(lines_of(folder)) >= 1, first)
    first.send_signal(signal.SIGINT)
    said = first.communicate(timeout=120)[1]
    assert first.returncode == 130, said
    assert "--resume" in said
    finished = {file: file.stat().st_mtime_ns for file in folder.rglob("summary.json")}
    assert len(finished) >= 1

    second = subprocess.Popen(command(values, tmp_path, "--resume"), env=environment, start_new_session=True)
    wait_for(lambda: len(lines_of(folder)) >= 2, second)
    second.kill()
    second.wait()
    done = subprocess.run(command(values, tmp_path, "--resume", "--json"), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    trials = read_search(folder).trials
    assert sorted(trial.params["optimizer.lr"] for trial in trials) == [1e-2, 2e-2, 3e-2, 4e-2]
    assert all(trial.status == "finished" for trial in trials)
    assert (folder / "report.html").exists()


@pytest.mark.slow
def test_a_killed_trial_goes_on(search_values, model, tmp_path):
    values = of_one_model(search_values(), model, {"optimizer.lr": {"choice": [1e-2]}})
    values["tasks"]["pairs"]["set"]["training"] = {"length": 100}
    folder = SearchConfig.check(values).path
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command(values, tmp_path), env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    (run,) = Search(SearchConfig.check(values)).points()
    path = Search(SearchConfig.check(values)).trial_config(run).run.path
    wait_for(lambda: list(path.glob("checkpoints/*/COMMITTED.json")), process)
    assert not (path / LOG).exists()
    pids = [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if _trains(entry, process.pid)]
    assert len(pids) == 1
    os.kill(pids[0], signal.SIGKILL)
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 0, said
    (trial,) = read_search(folder).trials
    assert trial.status == "finished"
    assert trial.run.summary["steps"] == 100
    assert "going on from step_" in (path / LOG).read_text()


@pytest.mark.slow
def test_a_lost_node_costs_a_trial_one_checkpoint_at_most(search_values, model, tmp_path):
    values = of_one_model(search_values(), model, {"optimizer.lr": {"choice": [1e-2]}})
    values["tasks"]["pairs"]["set"]["training"] = {"length": 100}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(values))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-m", "tests.tuning.lost_node", str(tmp_path / "search.yaml")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "a node is lost" in done.stderr
    config = SearchConfig.check(values)
    (trial,) = read_search(config.path).trials
    assert (trial.status, trial.run.summary["steps"]) == ("finished", 100)
    assert "going on from step_" in (config.path / trial.folder / LOG).read_text()


def _trains(entry, session):
    """Whether a process is a trial of this session."""
    try:
        return (entry / "cmdline").read_text().startswith("ray::ImplicitFunc") and os.getsid(int(entry.name)) == session
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_a_hopeless_trial_of_two_workers_ends_at_its_first_rung(search_values, model, tmp_path):
    space = {"optimizer.lr": {"choice": [1e-2, 1e-9, 2e-2]}}
    values = of_one_model(search_values(), model, space, scheduler={"type": "asha", "grace": 0.25, "reduction": 4}, max_concurrent=1)
    values["run"] = values["run"] | {"workers": 2}
    values["tasks"]["pairs"]["set"]["training"] = {"length": 160, "validate_every": 40}
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command(values, tmp_path, "--json"), env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    config = SearchConfig.check(values)
    lines = told(config)
    assert lines[1e-2]["status"] == "finished"
    assert lines[1e-9]["status"] == "stopped"
    assert last_step(config, lines[1e-9]) < 80
    assert lines[2e-2]["status"] in ("finished", "stopped")  # what the stopped one held was free again
    summary = json.loads((config.path / lines[1e-2]["folder"] / "summary.json").read_text())
    assert summary["workers"] == 2
