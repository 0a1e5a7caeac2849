"""A job's first question, on two real nodes: do all of them share the folders? Then it trains."""

import json
import subprocess
import sys

import pytest
import yaml

from tests.cluster.conftest import ENVIRON

pytestmark = pytest.mark.slow


def begin(two_nodes, values, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "cluster.begin", "pretrain", str(tmp_path / "config.yaml")]
    return subprocess.run(command, env=ENVIRON | {"RAY_ADDRESS": two_nodes}, capture_output=True, text=True, timeout=300, check=False)


def test_a_job_asks_every_node_and_trains_on_both(two_nodes, pretrain_values, tmp_path):
    run = pretrain_values["run"] | {"workers": 4, "device": "cpu"}  # more than either node has CPUs
    done = begin(two_nodes, pretrain_values | {"run": run, "kernels": "dense"}, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"2 nodes share {run['folder']}, {pretrain_values['data']['cache_dir']}" in done.stdout
    assert json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())["workers"] == 4


def test_a_folder_that_cannot_be_made_ends_the_job(two_nodes, pretrain_values, tmp_path):
    (tmp_path / "file").write_text("")
    done = begin(two_nodes, pretrain_values | {"run": {"folder": str(tmp_path / "file" / "runs")}}, tmp_path)
    assert done.returncode == 2
    assert "Not a directory" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_run_asks_every_node_for_its_folder(two_nodes, tmp_path):
    """`launch` does, before the first step; here one node is made blind by what it is asked to do."""
    script = f"""
import pathlib, ray
from raysparse.config import ConfigError
from raysparse.runtime import nodes
ray.init({two_nodes!r}, log_to_driver=False, logging_level="ERROR")
folder = pathlib.Path({str(tmp_path / "shared")!r})
nodes.check_storage([folder])
assert list(folder.iterdir()) == []
seen = nodes.visit
nodes.visit = lambda mark, name: "does not see it" if name == ray.nodes()[1]["NodeID"] else seen(mark, name)
try:
    nodes.check_storage([folder])
except ConfigError as error:
    print(error)
nodes.visit = lambda mark, name: None
try:
    nodes.check_storage([folder])
except ConfigError as error:
    print(error)
assert list(folder.iterdir()) == []
"""
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRON, capture_output=True, text=True, timeout=180, check=False)
    blind, elsewhere = done.stdout.splitlines()
    assert "on storage that all 2 nodes share. Got " in blind
    assert blind.count("does not see it") == 1
    assert elsewhere.count("what it writes is not seen here") == 2
