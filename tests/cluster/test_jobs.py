"""On a real Ray head: a submitted run trains there, is followed, listed, stopped."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from threading import Thread

import pytest
import yaml

from raysparse.config import merge
from tests.cluster.conftest import ENVIRON, ray_head

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


def raysparse(project, *words, **environ):
    command = [sys.executable, "-m", "raysparse", *words]
    return subprocess.run(command, cwd=project, env=ENVIRON | environ, capture_output=True, text=True, timeout=300, check=False)


class Proxy:
    """A way to the dashboard that breaks, once, when a text comes by; for a moment nobody answers then."""

    def __init__(self, address, text):
        self.port, self._text, self._open, self._down = int(address.rpartition(":")[2]), text.encode(), [], 0.0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near = self._server.accept()[0]
            except OSError:  # closed
                return
            if time.monotonic() < self._down:
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self.port))
            self._open += [near, far]
            for a, b in ((near, far), (far, near)):
                Thread(target=self._pump, args=(a, b), daemon=True).start()

    def _pump(self, a, b):
        with suppress(OSError):
            while data := a.recv(1 << 16):
                b.sendall(data)
                if self._text and self._text in data:
                    self._text, self._down = b"", time.monotonic() + 2
                    self.close_all()
        for end in (a, b):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close_all(self):
        for end in self._open:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._open = []

    def close(self):
        self._server.close()
        self.close_all()


@pytest.fixture
def frail(head):
    proxy = Proxy(head, "step         4/12")
    yield proxy.address
    proxy.close()


def test_a_submitted_run_ends_with_its_summary(head, frail, project, tmp_path):
    submit = ["submit", "--address", frail, "--follow", "--json", "pretrain", "tiny.yaml", "run.workers=2", "kernels=dense"]
    done = raysparse(project, *submit)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
    assert summary["steps"] == 12
    assert summary["workers"] == 2
    assert "lost the connection" in done.stderr
    assert "connected again" in done.stderr
    steps = re.findall(r"step +(\d+)/12 +\| loss +\d", done.stdout)
    assert steps == ["2", "4", "6", "8", "10", "12"]  # the progress lines, none lost, none twice
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


def test_a_submitted_search_ends_with_its_page(head, project, tmp_path):
    values = {
        "run": {"name": "search", "folder": str(tmp_path / "runs"), "device": "cpu"},
        "pretrain": {"files": ["tiny.yaml"], "space": {"sparsity.target": {"choice": [0.0, 0.5]}}},
    }
    (project / "search.yaml").write_text(yaml.safe_dump(values))
    submit = ["submit", "--address", head, "--follow", "tune", "search.yaml"]
    done = raysparse(project, *submit)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[  2/2] finished" in done.stdout
    assert (tmp_path / "runs" / "search" / "report.html").exists()
    again = raysparse(project, *submit)  # goes on, and nothing is left to do
    assert again.returncode == 0, again.stdout + again.stderr
    assert "/2] finished" not in again.stdout


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


def test_a_cluster_with_tokens(project, tmp_path):
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
    submit = ["submit", "--follow", "pretrain", "tiny.yaml", "run.name=closed", "training.length=2", "kernels=dense"]
    with ray_head(ENVIRON | token) as (dashboard, address):
        for wrong in ({"RAY_AUTH_MODE": "disabled"}, token | {"RAY_AUTH_TOKEN": "b" * 64}):
            refused = raysparse(project, *submit, "--address", dashboard, **wrong)
            assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
            assert refused.stderr.startswith(f"raysparse: Expected a token that the cluster at {dashboard} takes. Got: Authentication")
            assert "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in refused.stderr
        done = raysparse(project, *submit, "--address", dashboard, **token)
        assert done.returncode == 0, done.stdout + done.stderr
        assert (tmp_path / "runs" / "closed" / "summary.json").exists()
        looked = raysparse(project, "doctor", "--cluster", address, **token)
        assert looked.stdout.endswith("1 node: all is well.\n"), looked.stdout + looked.stderr
        refused = raysparse(project, "doctor", "--cluster", address, **token | {"RAY_AUTH_TOKEN": "b" * 64})
        assert refused.returncode == 2
        assert "RAY_AUTH_TOKEN" in refused.stderr.splitlines()[-1]
