"""Numbers of workers that change: who asks for what, and that nothing is lost when a group grows. The runs are in test_nodes.py."""

import socket
from pathlib import Path
from typing import Any

import pytest

from cluster.check import Node, check_resources
from raysparse.config import ConfigError
from raysparse.recipes.compare import CompareConfig
from raysparse.recipes.compare import check as check_comparison
from raysparse.recipes.job import check_folder
from raysparse.recipes.plan import plan
from raysparse.recipes.pretrain import PretrainConfig
from raysparse.runtime import interface
from raysparse.runtime.resize import SaveFirst
from raysparse.train.run import RunConfig


class Group:
    """A worker group that is polled; it ends when the file is there, after some polls."""

    def __init__(self, request: Path, polls: int, errors: dict[int, Exception] | None = None):
        self.request, self.polls, self.errors = request, polls, errors or {}
        self.finished, self.asked = False, 0

    def poll_status(self, timeout: float) -> Any:
        self.asked += self.request.exists()
        self.finished = self.asked >= self.polls
        return self

    def get_latest_poll_status(self) -> Any:
        return self


def test_a_group_saves_before_a_larger_one_starts(tmp_path):
    request = tmp_path / "resize"
    callback, group = SaveFirst(request, grace_s=60), Group(request, polls=3)
    callback.before_controller_execute_resize_decision(None)  # the first group: nobody to ask
    assert not request.exists()
    callback.after_worker_group_start(group)
    callback.before_controller_execute_resize_decision(None)
    assert group.finished
    assert not request.exists()  # the next group is not to leave


def test_a_group_that_failed_is_not_asked(tmp_path):
    request = tmp_path / "resize"
    callback, group = SaveFirst(request, grace_s=60), Group(request, 3, {0: RuntimeError("killed")})
    callback.after_worker_group_start(group)
    callback.before_controller_execute_resize_decision(None)
    assert group.asked == 0


def test_a_group_that_does_not_answer_is_given_up(tmp_path):
    request = tmp_path / "resize"
    callback, group = SaveFirst(request, grace_s=0.3), Group(request, polls=10**9)
    callback.after_worker_group_start(group)
    callback.before_controller_execute_resize_decision(None)
    assert group.asked > 0
    assert not request.exists()


def test_the_interface_of_an_address(monkeypatch):
    assert interface.interface_of("127.0.0.1") == "lo"
    assert interface.interface_of("203.0.113.7") is None
    monkeypatch.delenv(interface.VARIABLE, raising=False)
    interface.use_interface("203.0.113.7")
    assert interface.VARIABLE not in interface.os.environ
    monkeypatch.setenv(interface.VARIABLE, "eth7")
    interface.use_interface("127.0.0.1")
    assert interface.os.environ[interface.VARIABLE] == "eth7"  # somebody chose it
    monkeypatch.setenv(interface.VARIABLE, "")
    monkeypatch.delenv(interface.VARIABLE)
    interface.use_interface("127.0.0.1")
    assert interface.os.environ[interface.VARIABLE] == "lo"
    assert "lo" in [name for _, name in socket.if_nameindex()]


def nodes(*cpus: int) -> list[Node]:
    return [Node(f"n{i}", {"CPU": float(number)}) for i, number in enumerate(cpus)]


def test_the_fewest_workers_are_enough_for_a_cluster():
    run = RunConfig(workers=(2, 8), device="cpu")
    assert check_resources(run, nodes(1, 2), grows=False).startswith("2 to 8 workers of 1 CPU: the cluster holds 3")
    with pytest.raises(ConfigError, match=r"Expected a cluster that holds 2 workers of 1 CPU each \(run\.workers=\(2, 8\)"):
        check_resources(run, nodes(1), grows=False)


@pytest.mark.parametrize("verb", ["evaluate", "zeroshot"])
def test_verbs_without_checkpoints_have_one_number(verb, tmp_path):
    run = RunConfig(folder=str(tmp_path), workers=(1, 2))
    with pytest.raises(ConfigError, match=rf"`raysparse {verb}` writes no checkpoints .* Got \[1, 2\]\. Use run\.workers=2\."):
        check_folder(verb, run, run)
    check_folder("pretrain", run, run)


def test_seconds_of_a_comparison_are_of_one_number():
    values = {"run": {"workers": [1, 2]}, "pretrain": {"files": ["configs/debug.yaml"]}}
    with pytest.raises(ConfigError, match=r"Expected one number as run\.workers: the seconds of the stages are compared"):
        check_comparison(CompareConfig.check(values))


def test_memory_is_planned_for_the_fewest(pretrain_values):
    def memory(workers: Any) -> dict[str, int]:
        values = pretrain_values | {"run": pretrain_values["run"] | {"workers": workers}}
        return plan(PretrainConfig.check(values))["memory_bytes_per_rank"]

    assert memory([2, 4]) == memory(2) != memory(4)
