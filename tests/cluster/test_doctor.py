"""`raysparse doctor --cluster`: verdicts on made-up facts, and on two real nodes."""

import copy
import json
import subprocess
import sys

import pytest

from cluster import doctor
from raysparse import __version__
from raysparse.__main__ import main
from tests.cluster.conftest import ENVIRON, free_ports

VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "ray": "2.60.0", "raysparse": "0.1.0"}
NODE = {"host": "a", "versions": VERSIONS, "cores": 8, "gpus": ["H100"] * 2, "shm_bytes": 16 << 30, "interface": "eth0"}
NODE |= {"ray_gpus": 2, "ray_cpus": 8, "clock_s": [0.01, 0.001]}


def nodes(**changes):
    """Two alike but for what is changed in the second."""
    return {"one": NODE, "two": copy.deepcopy(NODE) | changes}


def test_equal_nodes_are_well():
    for check in (doctor.check_versions, doctor.check_gpus, doctor.check_memory, doctor.check_clocks):
        assert check(nodes()) == []
    assert doctor.check_links({"one -> two": 1e9}) == []


def test_what_is_wrong_is_told_with_what_to_do():
    old = VERSIONS | {"torch": "2.12.0"}
    assert doctor.check_versions(nodes(versions=old)) == [
        "torch differs: 2.13.0 on one; 2.12.0 on two. Install the same everywhere, best from one image."
    ]
    missing = VERSIONS | {"raysparse": "none"}
    assert "raysparse differs: 0.1.0 on one; none on two" in doctor.check_versions(nodes(versions=missing))[0]
    assert "raysparse is on no node" in doctor.check_versions({"one": NODE | {"versions": missing}})[0]
    assert "two has 2 GPUs by nvidia-smi, and 0 in Ray. Start Ray there with --num-gpus=2" in doctor.check_gpus(nodes(ray_gpus=0))[0]
    assert "two has 0 GPUs by nvidia-smi, and 2 in Ray" in doctor.check_gpus(nodes(gpus=[]))[0]
    assert "GPUs differ: A10G, H100" in doctor.check_gpus(nodes(gpus=["A10G"] * 2))[0]
    assert "two has 67.1 MB of /dev/shm" in doctor.check_memory(nodes(shm_bytes=64 << 20))[0]
    assert "--shm-size" in doctor.check_memory(nodes(shm_bytes=None))[0]
    assert doctor.check_clocks(nodes(clock_s=[-3.0, 0.01])) == [
        "The clock of two is -3.0 s off that of this machine. Run chrony or ntpd on all nodes."
    ]
    assert doctor.check_clocks(nodes(clock_s=[-3.0, 2.5])) == []  # not known well enough to blame it
    assert "one -> two carries 5.0 MB/s" in doctor.check_links({"one -> two": 5e6})[0]


def test_the_page():
    facts = {
        "nodes": nodes(),
        "links": {"one -> two": 1e9},
        "folder": "/shared",
        "problems": ["it leaks. Mend it."],
        "notes": [],
        "well": False,
    }
    text = doctor.show(facts)
    for part in (
        "torch 2.13.0",
        "2 x H100",
        "clock +0.010 s ± 0.001",
        "one -> two: 1.0 GB/s",
        "mend          it leaks",
        "2 nodes: 1 to mend.",
    ):
        assert part in text
    assert "2 nodes: all is well." in doctor.show(facts | {"problems": [], "well": True})


def test_no_cluster_is_a_hint(capsys):
    (port,) = free_ports(1)
    assert main(["doctor", "--cluster", f"127.0.0.1:{port}"]) == 2
    assert (
        f"Expected a Ray cluster at 127.0.0.1:{port}. Got: [Errno 111] Connection refused. Run this on one of its nodes"
        in capsys.readouterr().err
    )
    assert main(["doctor", "--cluster", "http://head:8265"]) == 2
    assert "ray job submit --address http://head:8265 -- raysparse doctor --cluster" in capsys.readouterr().err


def examine(address, *words):
    command = [sys.executable, "-m", "raysparse", "doctor", "--cluster", address, *words]
    return subprocess.run(command, env=ENVIRON, capture_output=True, text=True, timeout=180, check=False)


@pytest.mark.slow
def test_two_real_nodes(two_nodes, tmp_path):
    done = examine(two_nodes, "--folder", str(tmp_path / "shared"), "--json")
    facts = json.loads(done.stdout)
    assert [problem for problem in facts["problems"] if "carries" not in problem] == []  # a busy machine may be slow
    assert done.returncode == (1 if facts["problems"] else 0)
    assert sorted(node["ray_cpus"] for node in facts["nodes"].values()) == [2, 3]
    for node in facts["nodes"].values():
        assert node["versions"]["raysparse"] == __version__
        assert abs(node["clock_s"][0]) <= node["clock_s"][1] + 0.1
        assert node["shm_bytes"] > 0
    assert len(facts["links"]) == 2
    assert all(speed > 0 for speed in facts["links"].values())
    assert list((tmp_path / "shared").iterdir()) == []


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_status_1(two_nodes, tmp_path):
    (tmp_path / "file").write_text("")
    done = examine(two_nodes, "--folder", str(tmp_path / "file" / "runs"))
    assert done.returncode == 1, done.stderr
    assert f"mend          {tmp_path / 'file' / 'runs'} cannot be written on this machine: Not a directory" in done.stdout
    assert "2 nodes: " in done.stdout
