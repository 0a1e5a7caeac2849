"""On a real Ray head: a submitted run trains there, is followed, listed, stopped."""

import json
import shutil
import subprocess
import sys
import time

import pytest
import yaml

from raysparse.config import merge
from tests.cluster.conftest import ENVIRON

pytestmark = pytest.mark.slow


@pytest.fixture
def project(pretrain_values, tmp_path):
    """A user's folder: a config, data that travels, a secret, something large that git ignores; runs lie elsewhere."""
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    shutil.copy(pretrain_values["data"]["train"]["paths"][0], folder / "data" / "docs.jsonl")
    values = merge(pretrain_values, {"data": {"train": {"paths": ["data/docs.jsonl"]}, "cache_dir": str(tmp_path / "cache")}})
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    (folder / ".env").write_text("KEY=hidden")
    (folder / ".gitignore").write_text("big.bin\n")
    (folder / "big.bin").write_bytes(b"0" * 1000)
    return folder


def raysparse(project, *words, timeout=300, **more):
    command = [sys.executable, "-m", "raysparse", *words]
    return subprocess.run(command, cwd=project, env=ENVIRON, capture_output=True, text=True, timeout=timeout, check=False, **more)


def test_a_submitted_run_ends_with_its_summary(head, project, tmp_path):
    submit = ["submit", "--address", head, "--follow", "--json", "pretrain", "tiny.yaml", "run.workers=2", "kernels=dense"]
    done = raysparse(project, *submit)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
    assert summary["steps"] == 12
    assert summary["workers"] == 2
    assert "step        12/12" in done.stdout  # the progress line
    assert "tiny is finished" in done.stdout
    assert "raysparse-tiny-1 has succeeded" in done.stderr
    facts = json.loads(done.stdout[: done.stdout.index("\n}\n") + 2])
    assert set(facts["files"]) == {"data/docs.jsonl", "tiny.yaml"}
    listed = json.loads(raysparse(project, "jobs", "--address", head, "--json").stdout)
    (job,) = [job for job in listed if job["id"] == "raysparse-tiny-1"]
    assert (job["status"], job["verb"], job["run"]) == ("SUCCEEDED", "pretrain", str(tmp_path / "runs" / "tiny"))
    status = raysparse(project, "jobs", "status", "tiny", "--address", head)
    assert "SUCCEEDED" in status.stdout
    logs = raysparse(project, "jobs", "logs", "raysparse-tiny-1", "--address", head)
    assert "step        12/12" in logs.stdout
    again = raysparse(project, *submit)  # finished: the job says so, and trains nothing
    assert "raysparse-tiny-2 has succeeded" in again.stderr
    assert "step        12/12" not in again.stdout


def test_what_a_real_head_cannot_hold_is_refused(head, project):
    done = raysparse(project, "submit", "--address", head, "pretrain", "tiny.yaml", "run.workers=4", "run.threads=2")
    assert done.returncode == 2
    assert "Got room for 2: " in done.stderr


def test_a_job_is_stopped_and_goes_on(head, project, tmp_path):
    longer = ["training.length=4000", "training.validate_every=4000", "checkpoint.every=20", "run.name=long", "kernels=dense"]
    submit = ["submit", "--address", head, "pretrain", "tiny.yaml", *longer]
    sent = raysparse(project, *submit)
    assert sent.returncode == 0, sent.stderr
    checkpoints = tmp_path / "runs" / "long" / "checkpoints"
    deadline = time.monotonic() + 180
    while not list(checkpoints.glob("step_*/COMMITTED.json")):
        assert time.monotonic() < deadline, raysparse(project, "jobs", "logs", "long", "--address", head).stdout
        time.sleep(0.5)
    twice = raysparse(project, *submit)
    assert twice.returncode == 2
    assert "Got job raysparse-long-1, which is RUNNING" in twice.stderr
    stopped = raysparse(project, "jobs", "stop", "long", "--address", head)
    assert (stopped.returncode, "STOPPED" in stopped.stdout) == (0, True), stopped.stdout + stopped.stderr
    followed = raysparse(project, "jobs", "logs", "long", "--follow", "--address", head)
    assert followed.returncode == 1
    assert "raysparse-long-1 is STOPPED" in followed.stderr
    resumed = raysparse(project, *submit)
    assert resumed.stdout.startswith("raysparse-long-2 is on its way"), resumed.stderr
    deadline = time.monotonic() + 180
    while "going on from step_" not in raysparse(project, "jobs", "logs", "long", "--address", head).stdout:
        assert time.monotonic() < deadline
        time.sleep(1)
    assert "STOPPED" in raysparse(project, "jobs", "stop", "raysparse-long-2", "--address", head).stdout
