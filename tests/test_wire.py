"""The benchmark of packed collectives on shaped links: what it prints, and, as root, that it runs."""

import os
import shutil
import subprocess
from contextlib import nullcontext

import pytest

from benchmarks import wire
from benchmarks.measure import Ratio


def row(sparsity, gbit, step, communication):
    values = {"step": step, "communication": communication, "interface": 4.0, "counted": 4.0}
    ratio = {key: Ratio(value, value, value, value, value) for key, value in values.items()}
    median = {"whole": {key: 4e6 * value for key, value in values.items()}, "packed": dict.fromkeys(values, 1e6)}
    return {"ranks": 2, "gbit": gbit, "measured_gbit": [1.0, 0.5], "sparsity": sparsity, "parameters": 9, "ratio": ratio} | {
        "median": median,
        "follow": [0.2, 0.3],
    }


@pytest.mark.parametrize(
    ("sparsity", "gbit", "step", "communication", "missed"),
    [
        (0.75, 1, 2.1, 3.1, False),
        (0.75, 1, 1.9, 3.1, True),
        (0.75, 1, 2.1, 2.9, True),
        (0.5, 10, 0.99, 0.9, False),
        (0.5, 10, 0.97, 0.9, True),
    ],
)
def test_goals(sparsity, gbit, step, communication, missed):
    one = row(sparsity, gbit, step, communication)
    assert wire.missed(one) == missed
    assert wire.report([one]).count("MISSED") == missed


def test_a_link_is_predicted_from_the_unshaped_one():
    """100 MB at 0.5 Gbit/s are 1.6 s on the link; unshaped, at 8 Gbit/s, 0.1 s of 0.4 and 0.05 of 0.2 are the link's."""
    slow, fast = row(0.75, 1, 1.0, 1.0), row(0.75, 0, 1.0, 1.0)
    for one, rate, seconds in ((slow, 0.5, 9.0), (fast, 8.0, 0.4)):
        one["measured_gbit"] = [rate, rate]
        one["median"] = {way: {"counted": 1e8 / share, "communication": seconds / share} for way, share in (("whole", 1), ("packed", 2))}
    assert wire.predicted(slow, [slow, fast]) == pytest.approx([1.6 + 0.3, 0.8 + 0.15])
    assert wire.predicted(fast, [slow, fast]) == wire.predicted(slow, [slow]) == []


def test_layouts_are_made_in_seconds(capsys):
    assert wire.main(["--layouts", "--ranks", "2"]) == 0
    assert 0 < float(capsys.readouterr().out.splitlines()[-2].split("|")[2]) < 60


def test_a_rank_that_fails_takes_the_others_with_it(monkeypatch):
    """No cables here: the ranks are programs, of which one fails at once and the other would sleep for an hour."""
    programs = iter([["sleep", "3600"], ["false"]])
    started: list[subprocess.Popen] = []

    def popen(command, **settings):
        started.append(real(next(programs), **settings))
        return started[-1]

    real = subprocess.Popen
    monkeypatch.setattr(wire, "network", lambda link: nullcontext(["one", "other"]))
    monkeypatch.setattr(wire.subprocess, "Popen", popen)
    with pytest.raises(SystemExit, match=r"Got exit codes \[None, 1\]"):
        wire.launch(wire.Link(2, 1), [])
    assert started[0].wait(10) != 0


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("tc") is None, reason="needs root and tc for network namespaces")
def test_packed_buffers_leave_the_interface(capsys):
    wire.main(["--ranks", "2", "--rates", "0", "--sparsities", "0.75", "--rounds", "1", "--layers", "1"])
    cells = capsys.readouterr().out.splitlines()[-2].split("|")
    assert "2 ranks, unshaped, 75 %" in cells[1]
    assert float(cells[-4]) > 3
    assert float(cells[-3]) > 0


@pytest.mark.slow
def test_without_links_the_process_group_is_throttled(capsys, monkeypatch):
    """18 MB whole at 1 Gbit/s: what is counted takes its time on the link at least."""
    monkeypatch.setattr(wire, "refusal", lambda: "Got a kernel without them.")
    wire.main(["--ranks", "2", "--rates", "1", "--sparsities", "0.75", "--rounds", "1", "--layers", "1"])
    said = capsys.readouterr()
    assert "process group is throttled. Got a kernel without them." in said.err
    assert "throttled in process" in said.out
    cells = said.out.splitlines()[-2].split("|")
    (whole, packed), megabytes = ([float(part) for part in cells[column].split(":")] for column in (5, 8))
    assert whole >= 8e-3 * megabytes[0] > 3 * 8e-3 * megabytes[1]
    assert packed >= 8e-3 * megabytes[1]
