"""What Ray Train is told of checkpoints."""

import threading
import time

import pytest

from raysparse.runtime.ray_run import when_committed
from raysparse.train.checkpoint import MARKER


def commit(folder, step):
    path = folder / f"step_{step:08d}"
    path.mkdir(parents=True, exist_ok=True)
    (path / MARKER).write_text("{}")
    return path


def test_a_checkpoint_is_reported_once_it_is_committed(tmp_path):
    threading.Timer(0.2, commit, (tmp_path, 100)).start()
    began = time.monotonic()
    assert when_committed("it", tmp_path / "step_00000100", timeout_s=20) == "it"
    assert time.monotonic() - began > 0.15


def test_a_checkpoint_that_was_pruned_by_then_is_not_waited_for(tmp_path):
    commit(tmp_path, 200)
    assert when_committed("it", tmp_path / "step_00000100", timeout_s=0.2) == "it"


def test_an_older_one_does_not_count(tmp_path):
    commit(tmp_path, 50)
    with pytest.raises(TimeoutError, match=r"Expected .*step_00000100/COMMITTED\.json within 0 s"):
        when_committed("it", tmp_path / "step_00000100", timeout_s=0.2)
