"""How many losses a run outlives: any number, as long as it gets on between them. Ray Train is played; the soak has the real one."""

import json
from typing import Any

import pytest
import ray.train.torch
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from raysparse.recipes.job import Job
from raysparse.runtime import launch
from raysparse.train.checkpoint import MARKER
from raysparse.train.run import RunConfig


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """``fit(max_failures, *rounds)``: of each round of Ray Train whether a checkpoint is saved in it, and what it ends in (None: well).

    Returns the pauses that were made.
    """

    def play(max_failures: int, *rounds: tuple[bool, TrainingFailedError | None]) -> list[float]:
        left, pauses = list(rounds), []

        class Trainer:
            def __init__(self, *args: Any, **more: Any):
                self.return_value = {"summaries": []}

            def fit(self) -> Any:
                saves, error = left.pop(0)
                if saves:
                    checkpoint = tmp_path / "checkpoints" / f"step_{100 - len(left):08d}"
                    checkpoint.mkdir(parents=True)
                    (checkpoint / MARKER).write_text(json.dumps({"files": {}}))
                if error is not None:
                    raise error
                return self

        monkeypatch.setattr(ray.train.torch, "TorchTrainer", Trainer)
        monkeypatch.setattr(launch.time, "sleep", pauses.append)
        run = RunConfig(folder=str(tmp_path.parent), name=tmp_path.name, device="cpu", max_failures=max_failures)
        launch._fit([Job("pretrain", {}, {}, str(tmp_path), "")], run, tmp_path / "progress")
        assert left == []
        return pauses

    return play


LOST = WorkerGroupError("a worker died", {0: RuntimeError()})
CROWDED = ControllerError(RuntimeError("no group could start"))


def test_losses_with_a_newer_checkpoint_between_them_do_not_add_up(fit):
    assert fit(1, *[(True, LOST)] * 5, (False, None)) == [1] * 5


def test_losses_without_a_newer_checkpoint_end_the_run(fit):
    with pytest.raises(WorkerGroupError):
        fit(3, (True, LOST), (False, LOST))


def test_a_run_that_is_to_have_no_other_workers_gets_none(fit):
    with pytest.raises(WorkerGroupError):
        fit(0, (True, LOST))


def test_groups_that_do_not_start_are_tried_ever_later(fit):
    assert fit(2, (False, CROWDED), (False, CROWDED), (True, CROWDED), (False, CROWDED), (False, None)) == [2, 4, 1, 2]
    with pytest.raises(ControllerError):
        fit(1, (False, CROWDED), (False, CROWDED))
