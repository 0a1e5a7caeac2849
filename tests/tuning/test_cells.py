"""Rungs of one cell know nothing of another's."""

from dataclasses import asdict
from types import SimpleNamespace

import pytest

from tuning.cells import CellScheduler, CellSearcher
from tuning.space import Point, Search, SearchConfig
from tuning.trial import FLOPS, OBJECTIVE, POINT, PROGRESS


def scheduler(search_values, **changes):
    changes = {"scheduler": {"type": "asha", "grace": 0.25, "reduction": 2}} | changes
    return CellScheduler(Search(SearchConfig.check(search_values(**changes))))


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


def test_a_resumed_scheduler_remembers_its_rungs(search_values, tmp_path):
    own = scheduler(search_values)
    report(own, "a", 0.75, 1.0)
    own.save(str(tmp_path / "state"))
    again = scheduler(search_values)
    again.restore(str(tmp_path / "state"))
    assert report(again, "b", 0.75, 2.0) == "STOP"


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
    assert [point["pretrain"]["sparsity.target"] for point in points] == [0.0, 0.75] * 6
    assert own.suggest("t12") == own.FINISHED
    assert len({Point(**point).digest for point in points}) == 12
    for sparsity in (0.0, 0.75):
        for lr in (1e-2, 1e-3):
            same = [p["seed"] for p in points if p["pretrain"]["sparsity.target"] == sparsity and p["params"]["optimizer.lr"] == lr]
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
    own = searcher(algorithm={"type": "nsga2", "num_samples": 20})
    points = []
    for i in range(20):
        points.append(own.suggest(f"t{i}")[POINT])
        own.on_trial_complete(f"t{i}", {OBJECTIVE: 1.0, FLOPS: 2.0})
    assert {point["pretrain"]["sparsity.target"] for point in points} == {0.0, 0.75}
    assert own.suggest("t20") == own.FINISHED
