"""The page of a search: what is read, what is computed, and what the page says of it."""

import json

import pytest

from raysparse.config import ConfigError
from raysparse.report.search import read_search


def append(folder, **changes):
    """The last line of trials.jsonl once more, with changes."""
    file = folder / "trials.jsonl"
    record = json.loads(file.read_text().splitlines()[-1]) | changes
    file.write_text(file.read_text() + json.dumps(record) + "\n")


def test_cells_are_in_order_of_task_then_sparsity(write_search):
    places = [("b", 0.5), ("a", 0.75), ("b", 0.0), ("a", 0.0), ("a", 0.75)]
    search = read_search(write_search([{"task": task, "sparsity": sparsity, "seed": i} for i, (task, sparsity) in enumerate(places)]))
    told = [(cell.task, cell.sparsity, cell.dense, [trial.seed for trial in cell.trials]) for cell in search.cells]
    # the order of tasks in search.yaml, here b before a by yaml's sorted keys: a, b
    assert told == [("a", 0.0, True, [3]), ("a", 0.75, False, [1, 4]), ("b", 0.0, True, [2]), ("b", 0.5, False, [0])]
    assert (search.name, search.tolerance, search.tasks) == ("demo", 0.5, ("a", "b"))
    assert [cell.sparsity for cell in search.of("b")] == [0.0, 0.5]
    trial = search.cells[1].trials[0]
    assert (trial.counted, trial.seconds, trial.steps) == (2 * 1e12 - 0.375e12, 200.0, 20)
    assert trial.validation == ((10, 3.5), (20, 3.25))


def test_the_best_settings_have_most_seeds_then_the_best_mean(write_search):
    a, b, c = ({"optimizer.lr": lr} for lr in (1e-3, 1e-4, 1e-5))
    trials = [
        {"params": a, "seed": 1, "objective": 2.0},
        {"params": a, "seed": 0, "objective": 3.0},  # mean 2.5
        {"params": b, "seed": 0, "objective": 2.3},
        {"params": b, "seed": 1, "objective": 2.5},  # mean 2.4
        {"params": c, "seed": 0, "objective": 1.0},  # one seed alone
        {"params": c, "seed": 1, "objective": 1.0, "status": "stopped"},
    ]
    (cell,) = read_search(write_search(trials)).cells
    assert cell.best == b
    assert [(trial.seed, trial.objective) for trial in cell.chosen] == [(0, 2.3), (1, 2.5)]
    higher = [trial | {"lower_is_better": False, "metric": "bleu"} for trial in trials]
    assert read_search(write_search(higher, folder="higher")).cells[0].best == a
    nan = [{"params": a, "objective": float("nan")}, {"params": b, "objective": 9.0}, {"params": c, "objective": None}]
    assert read_search(write_search(nan, folder="nan")).cells[0].best == b


def test_a_search_that_goes_on_can_be_read(write_search):
    folder = write_search([{"status": "failed", "error": "out of memory", "objective": None}, {"status": "stopped", "seed": 1}])
    (cell,) = read_search(folder).cells
    assert (cell.best, cell.chosen, cell.sparsity) == (None, (), 0.0)
    failed, stopped = cell.trials
    assert (failed.validation, failed.steps, failed.counted, failed.error) == ((), None, None, "out of memory")
    assert (stopped.validation, stopped.steps) == (((5, 3.5),), 5)  # the half line after it was being written
    (folder / "trials.jsonl").unlink()
    assert read_search(folder).cells == ()


def test_of_several_lines_of_one_trial_the_last_wins(write_search):
    folder = write_search([{"objective": 2.0}])
    append(folder, objective=1.5)
    assert [trial.objective for trial in read_search(folder).trials] == [1.5]


def test_a_parent_is_found_from_the_folder_of_the_search(write_search, tmp_path, monkeypatch):
    folder = write_search([{"sparsity": 0.5}])
    append(folder, parent="pretrain-0.5", pretrain={})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (cell,) = read_search(folder).cells
    assert cell.sparsity == 0.5
    append(folder, parent="nowhere", pretrain={"sparsity.target": 0.25})
    (cell,) = read_search(folder).cells
    assert (cell.sparsity, cell.trials[0].counted) == (0.25, None)
    append(folder, parent=None, pretrain=None)
    (cell,) = read_search(folder).cells
    assert (cell.sparsity, cell.trials[0].counted) == (0.0, 1e12)  # of its own run: nothing else is known


def test_errors_of_reading(write_search, tmp_path):
    with pytest.raises(ConfigError, match=r"Expected a search in .*nowhere. Got no search.yaml there. Name a folder"):
        read_search(tmp_path / "nowhere")
    folder = write_search([{}])
    lines = (folder / "trials.jsonl").read_text()
    for line, message in (
        ("{", "JSON object in line 2 of .*trials.jsonl"),
        ('{"folder": "x"}', r"in line 2 of .*trials.jsonl. Got:\n  status: expected str, got nothing\n  task: expected str or null, got"),
        (lines.replace('"seed": 0', '"seed": true').strip(), "seed: expected int, got True"),
        (lines.replace('"finished"', '"done"').strip(), "status finished, stopped, failed in line 2 .* Got 'done'"),
    ):
        (folder / "trials.jsonl").write_text(lines + line + "\n")
        with pytest.raises(ConfigError, match=message):
            read_search(folder)
    (folder / "trials.jsonl").write_text(lines)
    (folder / "trials" / "t0" / "summary.json").unlink()
    with pytest.raises(ConfigError, match=r"run of a finished trial in .*t0. Got no summary.json there. Restore"):
        read_search(folder)
    bad = write_search([{}], folder="bad", tolerance="much", seeds=None)
    with pytest.raises(ConfigError, match=r"seeds: expected list, got None\n  tolerance: expected int or float, got 'much'"):
        read_search(bad)
