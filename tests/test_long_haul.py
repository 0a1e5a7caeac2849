"""The benchmarks of checkpoints and of a long run, at toy sizes and on made-up looks; their numbers mean nothing here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import checkpoint
from benchmarks.masks import alone
from benchmarks.processes import Held, Slope, command, held, tree
from benchmarks.soak import role_of
from benchmarks.soak_report import Soak, report, series, within_lives
from benchmarks.step import Size


def test_a_checkpoint_is_timed_beside_its_steps(tmp_path):
    size, rows = Size(1, 64, 50, 8), []
    for ranks in (2, 1):
        for kind in checkpoint.KINDS:
            rows.append({"kind": kind, "ranks": ranks} | alone(checkpoint.measure, str(tmp_path), kind, size, [4], 1, num_ranks=ranks))
    for row in rows:
        for way in checkpoint.WAYS:
            (save,) = row[way]
            assert 0 < save["call"] <= save["committed"]
            assert save["steps"] >= 1
        assert len(row["restore_on_others"]) == (2 if row["ranks"] == 1 else 0)
    sizes = {row["kind"]: row["bytes"] for row in rows if row["ranks"] == 1}
    assert sizes["75 %"] < sizes["75 %, stored whole"]
    blocks, stored = checkpoint.report(rows, size, [4])[1:]
    assert blocks.count("asynchronous") == 2 * len(checkpoint.KINDS)
    assert stored.count("75 %") == 4


def test_slopes_of_a_line_with_a_wild_point():
    line = [(float(x), 2.0 * x + 1) for x in range(10)]
    line[4] = (4.0, 1000.0)
    slope = Slope.of(line)
    assert slope.slope == 2.0
    assert slope.low <= 2.0 <= slope.high
    assert str(Slope.of([(0.0, 1.0), (2.0, 2.0)])) == "+0.50 [+0.50, +0.50]"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_a_process_holds():
    script = "import sys, time; block = b'x' * 50_000_000; files = [open('/dev/null') for _ in range(30)]; "
    script += "print('up', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        one = held(child.pid)
        assert child.pid in tree(os.getpid())
        assert "import sys, time" in command(child.pid)
        child.kill()
    assert one is not None
    assert one.memory_bytes > 50_000_000
    assert one.handles >= 33
    assert one + one == Held(2, 2 * one.memory_bytes, 2 * one.handles, 2 * one.threads)
    assert held(child.pid) is None


@pytest.mark.parametrize(
    ("words", "role"),
    [
        ("ray::MaskManager.commit", "mask manager"),
        ("ray::TrainController.run", "controller"),
        ("/lib/ray/core/src/ray/raylet/raylet --log_dir=/x --agent=no", "raylet"),
        ("/lib/ray/core/src/ray/gcs/gcs_server --log_dir=/x", "GCS"),
        ("/usr/bin/python -u /lib/ray/_private/log_monitor.py --gcs-address=x", "log monitor"),
        ("ray::IDLE", "rest of Ray"),
    ],
)
def test_processes_are_known_by_their_command_lines(words, role):
    assert role_of(words) == role


def made_up(leak_mb_per_hour: float) -> Soak:
    """An hour with a look every ten seconds and a loss every five minutes; the command leaks, the workers rise within their lives."""
    found = Soak(Path("x"), 0.1, 300)
    lost = [{"seconds": 300.0 * k, "recovery_s": 20.0, "killed_at": 90, "went_on_from": 60, "rank": 0} for k in range(1, 12)]
    found.losses, found.ended = lost, {"status": 130, "seconds": 3.0, "left_behind": []}
    for k in range(360):
        seconds, life = 10.0 * k, k // 30
        roles = {
            "command": {"processes": 1, "memory_bytes": 400e6 + leak_mb_per_hour * 1e6 * seconds / 3600, "handles": 35, "threads": 20},
            "workers": {"processes": 2, "memory_bytes": 900e6 + 12e6 * (seconds - 300 * life) / 3600, "handles": 90, "threads": 40},
        }
        looked = {"seconds": seconds, "step": k, "workers": [life, life + 1], "roles": roles, "object_store_bytes": 100}
        found.samples.append(looked | {"checkpoints": 2, "disk": {"checkpoints": 5_000_000, "journal": 1000 * k}})
        found.saved[f"step_{k // 3:08d}"] = 30.0 * (k // 3)
    return found


@pytest.mark.parametrize(("leak", "met"), [(0.0, True), (4.0, True), (8.0, False)])
def test_a_leak_is_found(leak, met):
    found = made_up(leak)
    values, lives = series(found, 600.0), within_lives(found, 600.0)
    assert len(values["command, memory"]) == 10  # a point for each life after the warm-up
    assert Slope.of(values["command, memory"]).slope == pytest.approx(leak)
    assert lives == pytest.approx([12.0] * len(lives))
    tables, fine = report(found, values, lives)
    assert fine == met
    assert "".join(tables).count("MISSED") == (not met)
    assert "11 workers killed" in tables[2]
    found.ended = {"error": "The run ended."}
    assert not report(found, values, lives)[1]
