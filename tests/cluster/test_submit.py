"""`raysparse submit` from the command line to what a job server gets; the server is a script."""

import io
import json
import shutil
import zipfile

import pytest
import yaml

from raysparse.__main__ import main
from raysparse.config import load, merge
from raysparse.recipes.pretrain import PretrainConfig
from tests.cluster.server import job


@pytest.fixture
def words(server, pretrain_values, tmp_path, monkeypatch):
    """A working directory, and the command."""
    folder = tmp_path / "work"
    folder.mkdir()
    shutil.copy(pretrain_values["data"]["train"]["paths"][0], folder / "docs.jsonl")
    changes = {"run": {"folder": "/shared/runs"}, "data": {"train": {"paths": "docs.jsonl"}, "cache_dir": "/shared/cache"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(merge(pretrain_values, changes)))
    (folder / "hf_token").write_text("hidden")
    monkeypatch.chdir(folder)
    return ["submit", "--address", server.address, "pretrain", "config.yaml", "run.workers=2"]


def test_what_a_job_server_gets(server, words, capsys):
    server.jobs = [job("raysparse-tiny-1", "/shared/runs/tiny", "FAILED")]
    assert main(words) == 0
    told = capsys.readouterr()
    assert told.out == "raysparse-tiny-2 is on its way: /shared/runs/tiny\n"
    for part in ("docs.jsonl", "stays here, a secret by its name (*_token): hf_token", "needs 2 workers of 1 CPU", "left to the cluster"):
        assert part in told.err
    (sent,) = server.submitted
    assert sent["entrypoint"] == "python -m cluster.begin pretrain raysparse-job/config.yaml"
    assert sent["submission_id"] == "raysparse-tiny-2"
    assert sent["metadata"]["raysparse_run"] == "/shared/runs/tiny"
    assert set(sent["runtime_env"]) <= {"working_dir", "_ray_commit"}
    assert "entrypoint_num_cpus" not in sent
    with zipfile.ZipFile(io.BytesIO(server.package)) as archive:
        assert set(archive.namelist()) == {"config.yaml", "docs.jsonl", "raysparse-job/config.yaml"}
        archive.extract("raysparse-job/config.yaml")
    assert load(PretrainConfig, ["raysparse-job/config.yaml"]) == load(PretrainConfig, ["config.yaml"], ["run.workers=2"])


def test_follow_shows_the_log_and_has_its_status(server, words, capsys):
    server.cuts = [3]
    assert main([*words, "--follow"]) == 0
    told = capsys.readouterr()
    assert told.out.count("step         4/12") == 1
    assert "lost the connection" in told.err
    assert "raysparse-tiny-1 has succeeded" in told.err
    server.cuts, server.statuses = [], ["FAILED"]
    server.lines = []
    assert main(["jobs", "logs", "tiny", "--address", server.address]) == 2  # the script lists no job


def test_a_failed_job_is_status_1(server, words, capsys, monkeypatch):
    server.statuses = ["FAILED"]
    monkeypatch.setattr(server, "lines", ["boom\n"])
    monkeypatch.setattr(type(server), "_tail", _failed)
    assert main([*words, "--follow"]) == 1
    assert "raysparse-tiny-1 is FAILED" in capsys.readouterr().err


async def _failed(server, request):
    from aiohttp import web

    answer = web.WebSocketResponse()
    await answer.prepare(request)
    await answer.send_str("boom\n")
    return answer


def test_a_dry_run_sends_nothing(server, words, capsys):
    assert main([*words, "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["files"]) == {"config.yaml", "docs.jsonl"}
    assert list(facts["left_out"]) == ["hf_token"]
    assert server.submitted == []
    assert server.package is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["run.workers=4", "run.threads=2"], "Got room for 2: 10.0.0.1 holds 2 (4 CPU)"),
        (["run.folder=runs"], "Expected run.folder on storage that outlives the job"),
        (["--max-ship", "1k"], "Expected at most 1.0 kB to ship"),
        (["training.sequences=3"], "Expected run.workers to divide training.sequences"),
        (["sparsity.targte=1"], "sparsity.targte: no such key"),
    ],
)
def test_refusals_send_nothing(server, words, capsys, changes, message):
    assert main([*words, *changes]) == 2
    assert message in capsys.readouterr().err
    assert server.submitted == []
    assert server.package is None


def test_a_home_folder_is_refused_on_two_nodes(server, words, capsys):
    assert main([*words, "data.cache_dir=~/cache"]) == 0
    server.nodes.append(server.nodes[0] | {"node_ip": "10.0.0.2", "node_id": "cd" * 28, "is_head_node": False})
    assert main([*words, "data.cache_dir=~/cache"]) == 2
    assert "of which each of the 2 nodes has its own. Set data.cache_dir to an absolute path" in capsys.readouterr().err
    server.nodes[1]["state"] = "DEAD"
    assert main([*words, "data.cache_dir=~/cache"]) == 0


def test_a_growing_cluster_is_believed(server, words, capsys):
    assert main([*words, "run.workers=4", "run.threads=2", "--autoscaling"]) == 0
    assert "its autoscaler has to add nodes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mapping", "status"),
    [({"a" * 56: "node_" + "a" * 56}, 2), ({"10.0.0.1": "head", "10.0.0.2": "gpu"}, 0), (None, 2)],
    ids=["none", "cloud", "silent"],
)
def test_an_autoscaler_is_told_from_the_monitor_of_a_fixed_cluster(server, words, mapping, status):
    server.autoscaler = {"autoscalerReport": {"nodeTypeMapping": mapping}}
    assert main([*words, "run.workers=4", "run.threads=2"]) == status
    env = server.submitted[0]["runtime_env"].get("env_vars") if status == 0 else None
    assert env == ({"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "1800"} if status == 0 else None)


def test_a_run_that_is_on_its_way_is_not_sent_twice(server, words, capsys):
    server.jobs = [job("raysparse-tiny-1", "/shared/runs/tiny", "RUNNING")]
    assert main(words) == 2
    assert (
        "Got job raysparse-tiny-1, which is RUNNING. Follow it (raysparse jobs logs raysparse-tiny-1 --follow)" in capsys.readouterr().err
    )
    assert server.submitted == []


def test_help_teaches(capsys):
    for verb, parts in {
        "submit": ("--follow", "id_rsa*", "run.folder", "RAY_AUTH_TOKEN", "Exit status", "--max-ship"),
        "jobs": ("list", "status ID", "stop ID", "logs ID", "--address"),
    }.items():
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        text = capsys.readouterr().out
        for part in parts:
            assert part in text
    with pytest.raises(SystemExit):
        main(["submit", "plan", "config.yaml"])
    assert "invalid choice: 'plan'" in capsys.readouterr().err
