"""What the driver keeps, and what each trial's line says."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from raysparse.config import ConfigError
from tests.report.conftest import _write_run
from tuning.check import CONFIG, check
from tuning.config import SearchConfig
from tuning.space import Search
from tuning.trial import ERROR, FLOPS, FOLDER, OBJECTIVE, POINT, PROGRESS, STATUS
from tuning.watch import Watcher

CLASHING = {"sparsity.masks": {"choice": ["lift", "keep"]}, "adapters.type": {"choice": ["none", "selective"]}}


@pytest.fixture
def search(search_values):
    """Of three settings in one cell."""
    values = search_values()
    values["tasks"]["pairs"]["space"] = {"optimizer.lr": {"choice": [1e-2, 1e-3, 1e-4]}}
    values["pretrain"]["space"] = {"sparsity.target": {"choice": [0.5]}}
    search = Search(SearchConfig.check(values))
    search.path.mkdir(parents=True)
    (search.path / CONFIG).write_text(search.config.to_yaml())
    return search


def ended(search, point, tmp_path, **result):
    """A trial of Ray Tune, and the folder that it left."""
    folder = search.trial_config(point).run.path
    if result[STATUS] == "finished":
        _write_run(tmp_path, str(folder.relative_to(tmp_path)), "finetune")
    for part in ("export", "checkpoints"):
        (folder / part).mkdir(parents=True)
    result |= {FOLDER: str(folder), FLOPS: 1.0}
    return SimpleNamespace(config={POINT: asdict(point)}, last_result=result, is_finished=lambda: True)


def test_the_best_keeps_its_model_and_nobody_checkpoints(search, tmp_path, capsys):
    watcher, points, trials = Watcher(search, 3), search.points(), []
    for point, loss in zip(points, (2.0, 1.0, 3.0), strict=True):
        trials.append(ended(search, point, tmp_path, **{STATUS: "finished", OBJECTIVE: loss, PROGRESS: 100.0}))
        watcher.on_trial_complete(0, trials, trials[-1])
    folders = [search.trial_config(point).run.path for point in points]
    assert [(folder / "export").exists() for folder in folders] == [False, True, False]
    assert not any((folder / "checkpoints").exists() for folder in folders)
    assert all((folder / "summary.json").exists() for folder in folders)
    said = capsys.readouterr().err.splitlines()
    assert " ".join(said[1].split()) == "[ 2/3] finished pairs target=0.5 optimizer.lr=0.001 seed=0 | validation_loss 1.0000"
    lines = [json.loads(line) for line in (search.path / "trials.jsonl").read_text().splitlines()]
    assert [(line["objective"], line["status"], line["params"]["optimizer.lr"]) for line in lines] == [
        (2.0, "finished", 1e-2),
        (1.0, "finished", 1e-3),
        (3.0, "finished", 1e-4),
    ]


def test_failed_trials_say_why(search, tmp_path, capsys):
    (point, *_), watcher = search.points(), Watcher(search, 3)
    trial = ended(search, point, tmp_path, **{STATUS: "failed", OBJECTIVE: float("inf"), PROGRESS: 100.0, ERROR: "Got a NaN."})
    watcher.on_trial_complete(0, [trial], trial)
    assert "failed" in (said := capsys.readouterr().err)
    assert "Got a NaN." in said
    (line,) = (json.loads(line) for line in (search.path / "trials.jsonl").read_text().splitlines())
    assert (line["status"], line["objective"], line["error"]) == ("failed", None, "Got a NaN.")


def test_a_trial_of_values_that_do_not_go_together_is_one_that_failed(search_values, tmp_path, capsys):
    """A sampler may come to such; a grid's are refused before the search begins."""
    values = search_values()
    values["tasks"]["pairs"]["space"] = CLASHING
    search = Search(SearchConfig.check(values))
    search.path.mkdir(parents=True)
    point = next(point for point in search.points() if tuple(point.params.values()) == ("lift", "selective"))
    trial = SimpleNamespace(config={POINT: asdict(point)}, last_result={STATUS: "failed", ERROR: "Expected sparsity.masks=keep"})
    watcher = Watcher(search, 3)
    trial.is_finished = lambda: True
    watcher.on_trial_complete(0, [trial], trial)
    (line,) = (json.loads(line) for line in (search.path / "trials.jsonl").read_text().splitlines())
    assert (line["status"], line["parent"], line["command"], line["error"]) == ("failed", None, "", "Expected sparsity.masks=keep")


def test_no_trial_runs_if_a_grid_has_values_that_do_not_go_together(search_values):
    values = search_values()
    values["tasks"]["pairs"]["space"] = CLASHING
    with pytest.raises(ConfigError, match=r"tasks\.pairs at sparsity\.masks=lift, adapters\.type=selective: "):
        check(Search(SearchConfig.check(values)))
