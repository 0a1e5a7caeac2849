"""Rungs of one cell know nothing of another's."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from tuning.cells import CellScheduler, CellSearcher
from tuning.check import CONFIG
from tuning.config import SearchConfig
from tuning.space import Point, Search
from tuning.trial import FLOPS, OBJECTIVE, POINT, PROGRESS
from tuning.watch import write_record


def scheduler(search_values, **changes):
    changes = {"scheduler": {"type": "asha", "grace": 0.25, "reduction": 2}} | changes
    found = Search(SearchConfig.check(search_values(**changes)))
    found.path.mkdir(parents=True, exist_ok=True)
    (found.path / CONFIG).write_text(found.config.to_yaml())
    return CellScheduler(found)


def report(own, name, sparsity, objective, progress=25.0):
    trial = SimpleNamespace(trial_id=name, config={POINT: asdict(Point("pairs", {"sparsity.target": sparsity}, {}, 0))})
    if progress == 25:
        own.on_trial_add(None, trial)
    return own.on_trial_result(None, trial, {OBJECTIVE: objective, PROGRESS: progress})


def test_a_sparse_model_is_not_measured_by_a_dense_one(search_values):
    own = scheduler(search_values)
    assert report(own, "a", 0.0, 1.0) == "CONTINUE"
    assert report(own, "b", 0.75, 5.0) == "CONTINUE"  # pooled, it would be the worse half
    assert report(own, "c", 0.75, 6.0) == "STOP"
    assert report(own, "d", 0.0, 0.5) == "CONTINUE"


def test_nobody_is_stopped_at_the_last_step(search_values):
    own = scheduler(search_values)
    assert [report(own, name, 0.0, loss) for name, loss in (("a", 2.0), ("b", 1.0))] == ["CONTINUE"] * 2
    assert [report(own, name, 0.0, loss, 50.0) for name, loss in (("b", 1.0), ("a", 2.0))] == ["CONTINUE", "STOP"]
    assert [report(own, name, 0.0, loss, 100.0) for name, loss in (("b", 1.0), ("a", 2.0))] == ["CONTINUE"] * 2


def test_a_resumed_scheduler_knows_what_trials_have_left(search_values):
    """One trial of the sparse cell was stopped at half of its steps, with 1.0 at a quarter."""
    path = scheduler(search_values)._path
    run = path / "trials" / "past"
    run.mkdir(parents=True)
    lines = [{"step": step, "steps": 100, "tokens": step, "validation_loss": 25 / step} for step in (25, 50)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{"step": 25, "tokens": 25, "loss": 3.0}, *lines]))
    record = {"folder": "trials/past", "status": "stopped", "task": "pairs", "model": {"sparsity.target": 0.75}, "params": {}, "seed": 0}
    record |= {"parent": None, "command": "", "metric": "validation_loss", "lower_is_better": True, "objective": 0.5, "error": None}
    write_record(path, record | {"exported": False})
    own = scheduler(search_values)
    assert report(own, "a", 0.0, 2.0) == "CONTINUE"
    assert report(own, "b", 0.75, 2.0) == "STOP"
    assert report(own, "c", 0.75, 0.9) == "CONTINUE"


@pytest.fixture
def searcher(search_values):
    pytest.importorskip("optuna")

    def make(**changes):
        values = search_values(**({"algorithm": {"type": "optuna", "num_samples": 6}} | changes))
        values["tasks"]["pairs"]["space"] = {"optimizer.lr": {"choice": [1e-2, 1e-3]}}
        return CellSearcher(Search(SearchConfig.check(values)))

    return make


def test_cells_take_turns_and_equal_points_other_seeds(searcher):
    own = searcher(seeds=[7, 8])
    points = []
    for i in range(12):
        points.append(own.suggest(f"t{i}")[POINT])
        own.on_trial_complete(f"t{i}", {OBJECTIVE: points[-1]["params"]["optimizer.lr"], PROGRESS: 100})
    assert [point["model"]["sparsity.target"] for point in points] == [0.0, 0.75] * 6
    assert own.suggest("t12") == own.FINISHED
    assert len({Point(**point).digest for point in points}) == 12
    for sparsity in (0.0, 0.75):
        for lr in (1e-2, 1e-3):
            same = [p["seed"] for p in points if p["model"]["sparsity.target"] == sparsity and p["params"]["optimizer.lr"] == lr]
            assert same == [7, 8, 9, 10, 11, 12][: len(same)]


def test_a_resumed_searcher_goes_on(searcher, tmp_path):
    one, other = searcher(), searcher()
    for i in range(3):
        one.suggest(f"t{i}")
        one.on_trial_complete(f"t{i}", {OBJECTIVE: float(i)})
    one.save(str(tmp_path / "state"))
    other.restore(str(tmp_path / "state"))
    assert [other.suggest(f"t{i}") for i in range(3, 12)] == [one.suggest(f"t{i}") for i in range(3, 12)]


def test_score_and_flops_are_weighed_over_models(searcher):
    """The sparse model is a third of the FLOPs and no worse: generations come to it alone."""
    own = searcher(algorithm={"type": "nsga2", "num_samples": 80})
    points = []
    for i in range(80):
        points.append(own.suggest(f"t{i}")[POINT])
        dense = points[-1]["model"]["sparsity.target"] == 0
        own.on_trial_complete(f"t{i}", {OBJECTIVE: 1.0, FLOPS: 3.0 if dense else 1.0})
    dense = [point["model"]["sparsity.target"] == 0 for point in points]
    assert 4 < sum(dense[:20]) < 16
    assert sum(dense[60:]) < 0.5 * sum(dense[:20])
    assert own.suggest("t80") == own.FINISHED
