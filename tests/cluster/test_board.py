"""`raysparse tensorboard` serves a run's curves on this machine, ends at Ctrl-C, and says what is missing."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from urllib.request import urlopen

import pytest

from raysparse.__main__ import main
from tests.cluster.conftest import ENVIRON


@pytest.fixture
def run(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    folder = tmp_path / "runs" / "tiny"
    with SummaryWriter(str(folder / "tensorboard")) as board:
        board.add_scalar("loss", 1.5, 3)
    return folder


def start(run, *words, **more):
    command = [sys.executable, "-m", "raysparse", "tensorboard", *words]
    return subprocess.Popen(command, cwd=run.parents[1], env=ENVIRON, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def test_it_serves_the_run_until_ctrl_c(run):
    board = start(run, "tiny", "--port", "0")
    try:
        line = board.stdout.readline()
        assert line.startswith(f"TensorBoard of {run}: http://127.0.0.1:"), line
        address = line.split()[3]
        with urlopen(f"{address}data/environment", timeout=30) as answer:
            assert json.load(answer)["data_location"] == str(run)
    finally:
        board.send_signal(signal.SIGINT)
    out, err = board.communicate(timeout=60)
    assert (board.returncode, err, out.strip()) == (0, "", "")


def test_a_port_that_is_taken(run):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        board = start(run, str(run), "--port", str(port))
        out, err = board.communicate(timeout=60)
    assert board.returncode == 2
    assert f"Expected to serve on port {port}. Got: " in err
    assert "--port" in err
    assert "Traceback" not in err + out


def test_what_is_no_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "young").mkdir(parents=True)
    assert main(["tensorboard", "nowhere"]) == 2
    assert "Got nowhere, and no folder at nowhere or runs/nowhere" in capsys.readouterr().err
    assert main(["tensorboard", "young"]) == 2
    assert "Expected TensorBoard files below runs/young. Got none" in capsys.readouterr().err


def test_without_tensorboard_it_says_what_to_install(run, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "tensorboard" else found(name, *more))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    assert main(["tensorboard", str(run)]) == 2
    assert "Got none. Install it: pip install tensorboard" in capsys.readouterr().err
