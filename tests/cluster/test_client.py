"""Against a job server that lies down in mid-answer, wants a token, or is none: what a user is told, and that no line of a log is lost."""

import json
import signal
import socket
import subprocess
import sys
from threading import Thread

import pytest

from cluster import client as jobs
from raysparse.__main__ import main
from raysparse.config import ConfigError
from tests.cluster.conftest import ENVIRON, free_ports
from tests.cluster.server import LOG, job


def followed(server):
    texts, told = [], []
    job = jobs.follow(jobs.connect(server.address), server.address, "raysparse-tiny-1", texts.append, told.append)
    return job, "".join(texts), told


def test_a_log_is_followed_to_its_end(server):
    job, text, told = followed(server)
    assert (str(job.status), text, told) == ("SUCCEEDED", "".join(LOG), [])


@pytest.mark.parametrize("cuts", [[3], [5, 5], [0, 7, 2, 11]], ids=str)
def test_no_line_is_lost_or_told_twice_when_the_connection_breaks(server, cuts):
    server.cuts, server.down = list(cuts), 1
    job, text, told = followed(server)
    assert text == "".join(LOG)
    assert str(job.status) == "SUCCEEDED"
    assert server.connections >= len(cuts) + 1
    assert [line.partition(" (")[0] for line in told] == ["lost the connection", "connected again"] * len(cuts)


def test_a_connection_that_is_dead_without_a_word_is_made_anew(server, monkeypatch):
    monkeypatch.setattr(jobs, "SILENCE_S", 0.3)
    server.cuts, server.silent = [4], True
    _, text, told = followed(server)
    assert (text, told) == ("".join(LOG), [])
    assert server.connections >= 2


def test_ctrl_c_leaves_the_job_alone(server):
    server.cuts, server.silent, server.jobs = [4], True, [job("raysparse-a-1", "/s/a", "RUNNING")]
    command = [sys.executable, "-m", "raysparse", "jobs", "logs", "a", "--follow", "--address", server.address]
    follower = subprocess.Popen(command, env=ENVIRON, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert [follower.stdout.readline() for _ in range(4)] == LOG[:4]
    follower.send_signal(signal.SIGINT)
    _, err = follower.communicate(timeout=60)
    assert follower.returncode == 130
    assert err == "raysparse: the job goes on: raysparse jobs logs raysparse-a-1 --follow shows it again\n"
    assert server.statuses == ["RUNNING"]


def test_a_job_that_is_gone_is_an_error(server):
    with pytest.raises(ConfigError, match=r"404: Job nobody does not exist"):
        jobs.follow(jobs.connect(server.address), server.address, "nobody", print, print)


def test_a_missing_token_is_a_hint(server, capsys):
    server.token = "right"
    assert main(["jobs", "--address", server.address]) == 2
    message = capsys.readouterr().err
    for part in ("Expected a token that the cluster at", "Missing authentication token", "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"):
        assert part in message
    assert message.count("\n") == 1


def test_nobody_there_is_a_hint(capsys, server):
    (port,) = free_ports(1)
    assert main(["jobs", "list", "--address", f"127.0.0.1:{port}"]) == 2
    message = capsys.readouterr().err
    assert f"Expected a Ray dashboard at http://127.0.0.1:{port}. Got: [Errno 111] Connection refused. Start the cluster" in message
    assert message.count("\n") == 1


def test_another_server_is_a_hint(capsys, server):
    """It listens, and hangs up."""
    other = socket.create_server(("127.0.0.1", 0))

    def hang_up():
        with other:
            for _ in range(2):  # of the look at the port, and of the first question
                other.accept()[0].close()

    thread = Thread(target=hang_up)
    thread.start()
    assert main(["jobs", "--address", f"http://127.0.0.1:{other.getsockname()[1]}"]) == 2
    thread.join(10)
    assert "Expected a Ray dashboard at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "environ", "address"),
    [
        (None, {}, "http://127.0.0.1:8265"),
        ("head:8265", {}, "http://head:8265"),
        ("https://ray.example/", {"RAY_ADDRESS": "http://other:1"}, "https://ray.example"),
        (None, {"RAY_ADDRESS": "http://head:1", "RAY_API_SERVER_ADDRESS": "http://api:2"}, "http://api:2"),
        (None, {"RAY_ADDRESS": "http://head:1"}, "http://head:1"),
        (None, {"RAY_ADDRESS": "10.0.0.1:6379"}, "http://127.0.0.1:8265"),
    ],
)
def test_the_address(monkeypatch, given, environ, address):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert jobs.address_of(given) == address


def test_an_address_that_is_none():
    with pytest.raises(ConfigError, match=r"Expected the address of a Ray dashboard.* Got ray://head:10001"):
        jobs.address_of("ray://head:10001")


def test_jobs_are_listed_newest_first(server, capsys):
    server.jobs = [job("raysparse-a-1", "/s/a"), job("raysparse-a-2", "/s/a", start=9000), job("raysubmit_x", start=5)]
    assert main(["jobs", "--address", server.address]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["id", "raysparse-a-2", "raysubmit_x", "raysparse-a-1"]
    assert main(["jobs", "status", "a", "--address", server.address, "--json"]) == 0  # by the run's name: the newest
    facts = json.loads(capsys.readouterr().out)
    assert (facts["id"], facts["run"], facts["seconds"]) == ("raysparse-a-2", "/s/a", 5)
    assert main(["jobs", "stop", "b", "--address", server.address]) == 2
    assert "Got b. On http" in capsys.readouterr().err


def test_a_job_is_stopped(server, capsys):
    server.jobs = [job("raysparse-a-1", "/s/a", "RUNNING")]
    assert main(["jobs", "stop", "raysparse-a-1", "--address", server.address]) == 0
    assert "STOPPED" in capsys.readouterr().out
    assert main(["jobs", "logs", "a", "--address", server.address]) == 0
    assert capsys.readouterr().out == "".join(LOG)


@pytest.mark.parametrize("words", [["list", "a"], ["logs"], ["stop"], ["logs", "a", "b"]])
def test_words_that_make_no_sense(words):
    with pytest.raises(SystemExit) as end:
        main(["jobs", *words])
    assert end.value.code == 2


def test_ids_name_the_run_and_count_on():
    found = [
        type("Job", (), {"submission_id": name}) for name in ("raysparse-a-1", "raysparse-a-7", "raysparse-a-b-9", "raysparse-axb-9", "x")
    ]
    assert jobs.next_id(found, "a") == "raysparse-a-8"
    assert jobs.next_id(found, "a.b") == "raysparse-a.b-1"
