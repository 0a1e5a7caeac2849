"""The mask manager in its actor: found by its file, killed and back, gone with the run, and asked from another process."""

import json
import os
import signal
import time
from typing import Any

import pytest

from raysparse.__main__ import main
from raysparse.config import ConfigError, merge
from raysparse.recipes import pretrain
from raysparse.recipes.job import Job
from raysparse.runtime.live import MANAGER, ask
from raysparse.runtime.mask_actor import ManagerProxy, managers
from raysparse.sparsity.agenda import Agenda
from raysparse.sparsity.manager import MaskManager, Vote
from raysparse.train.state import HISTORY

AGENDA = Agenda.check(
    {
        "sparsity": {"target": 0.5, "evolution": {"type": "set", "update_interval": 1}},
        "shapes": {"a": [4, 4], "b": [2, 4]},
        "steps": 9,
        "tokens_per_step": 1,
        "seed": 0,
    }
)


@pytest.fixture
def job(pretrain_values: dict[str, Any]) -> Job:
    return opened(pretrain_values)


def opened(values: dict[str, Any], **more: Any) -> Job:
    """A pre-training that is ready to start, but for its data."""
    config = pretrain.PretrainConfig.check(merge(values, more))
    config.run.path.mkdir(parents=True)
    return Job("pretrain", config.model_dump(mode="json"), {}, str(config.run.path), "claim")


def votes(version: int) -> list[Vote]:
    """Of two ranks; digests are made up: ten a version."""
    sums, last, nnz = (10 * version, 0), (10 * max(0, version - 1), 0), tuple(AGENDA.plan(version).values())
    none = (0, 0)
    return [Vote(0, 0, nnz, last, sums, sums, nnz, none), Vote(1, 0, none, none, none, none, none, none)]


def begin(manager: Any, version: int = 0, nonce: str = "one") -> Any:
    return manager.begin(nonce, AGENDA.model_dump(mode="json"), 2, version, votes(version), "")


def commit(manager: Any, version: int, attempt: int = 1) -> Any:
    return manager.commit(attempt, version, version, votes(version), 0.5, None)


@pytest.mark.ray
def test_the_proxy_is_the_manager(ray_instance, job, capsys, monkeypatch):
    with managers([job]):
        proxy = ManagerProxy(job.path)
        assert begin(proxy).attempt == 1
        assert proxy.decide(1) == AGENDA.decide(1)
        assert commit(proxy, 1).ok
        proxy.published(1, 1, "checkpoints/step_2")
        assert begin(ManagerProxy(job.path), 1, "two").attempt == 2  # a new group of workers finds it by its file
        late = commit(proxy, 2)
        assert not late.ok
        assert "Expected attempt 1 to be the current one" in late.why
        here = MaskManager(job.path / HISTORY)
        assert proxy.history() == here.history()
        view, seconds = ask(job.path, timeout_s=60)
        assert view == here.view()
        assert 0 < seconds < 60
        monkeypatch.setattr("raysparse.runtime.live.ask", lambda folder: ask(folder, timeout_s=60))  # this machine may be busy
        capsys.readouterr()
        assert main(["masks", str(job.path)]) == 0
        assert "source      live, " in capsys.readouterr().out


@pytest.mark.ray
def test_a_killed_manager_is_back_with_all_it_knew(ray_instance, job):
    with managers([job]):
        proxy = ManagerProxy(job.path)
        begin(proxy)
        for version in (1, 2, 3):
            assert commit(proxy, version).ok
        before = proxy.history()
        for version in (4, 5):
            os.kill(pid_of(ray_instance, job), signal.SIGKILL)
            assert commit(proxy, version).ok  # waits for the new one
        assert proxy.history()[:4] == before
        assert [record["version"] for record in MaskManager(job.path / HISTORY).history()] == [0, 1, 2, 3, 4, 5]
        assert begin(proxy).attempt == 1  # the same nonce, to a manager that has read it
        assert begin(proxy, 5, "two").attempt == 2


@pytest.mark.ray
def test_a_manager_that_does_not_answer(ray_instance, job):
    with managers([job]):
        proxy = ManagerProxy(job.path, patience_s=1.0)
        pid = pid_of(ray_instance, job)
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(ConnectionError, match=r"Expected the mask manager .* Got: no answer within 1 s\. See whether the head"):
                proxy.history()
        finally:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.ray
def test_it_goes_with_the_run(ray_instance, job):
    with managers([job]):
        proxy, address = ManagerProxy(job.path), (job.path / MANAGER).read_text()
        begin(proxy)
    assert not (job.path / MANAGER).exists()
    with pytest.raises(ConnectionError, match=r"Got: .* the same command goes on from the last checkpoint"):
        commit(proxy, 1)
    with pytest.raises(ConnectionError, match="no manager is running on Ray"):
        ask(job.path)
    (job.path / MANAGER).write_text(address)  # a driver that was killed leaves it behind
    with pytest.raises(ConnectionError, match="Expected the mask manager"):
        ManagerProxy(job.path)
    with pytest.raises(ConnectionError, match=r"the manager on the cluster at .* did not answer"):
        ask(job.path, timeout_s=60)
    with managers([job]):  # at once again, under the same run
        assert begin(ManagerProxy(job.path), 0, "two").attempt == 2


@pytest.mark.ray
def test_only_runs_with_masks_have_one(ray_instance, pretrain_values):
    dense = opened(pretrain_values, run={"name": "dense"}, sparsity={"target": 0.0})
    done = opened(pretrain_values, run={"name": "done"})
    (done.path / "summary.json").write_text("{}")
    tuned = {"model": {"path": "x"}, "task": {"type": "seq2seq", "data": {"type": "files", "train": "t", "validation": "v", "test": "s"}}}
    lift, keep = (
        Job("finetune", tuned | {"sparsity": {"masks": masks}}, {}, str(dense.path.parent / masks), "claim") for masks in ("lift", "keep")
    )
    for folder in (lift.path, keep.path):
        folder.mkdir()
    with managers([dense, done, lift, keep]):
        assert [job.path.name for job in (dense, done, lift, keep) if (job.path / MANAGER).exists()] == ["keep"]


@pytest.mark.ray
def test_a_journal_that_is_none_is_refused_before_anything_starts(ray_instance, job):
    (job.path / HISTORY).write_text("not a journal\n")
    with pytest.raises(ConfigError, match="Expected the journal of a topology"), managers([job]):
        raise AssertionError("started")
    assert not (job.path / MANAGER).exists()


def test_a_cluster_that_is_gone_is_said_in_time(tmp_path):
    """Nothing listens on the port; Ray itself would try for half a minute."""
    address = {"name": "x", "namespace": "raysparse", "address": "127.0.0.1:1", "auth": "disabled"}
    (tmp_path / MANAGER).write_text(json.dumps(address))
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:1 gave no answer within 1 s"):
        ask(tmp_path, timeout_s=1)
    assert time.monotonic() - began < 10


def pid_of(ray: Any, job: Job) -> int:
    """Process of the job's manager."""
    address = json.loads((job.path / MANAGER).read_text())
    return ray.get(ray.get_actor(address["name"], address["namespace"]).__ray_call__.remote(lambda _: os.getpid()))
