"""The benchmark of packed collectives on shaped links: what it prints, and, as root, that it runs."""

import os
import shutil

import pytest

from benchmarks import wire
from benchmarks.measure import Ratio


def row(sparsity, gbit, step, communication):
    values = {"step": step, "communication": communication, "interface": 4.0, "counted": 4.0}
    ratio = {key: Ratio(value, value, value, value, value) for key, value in values.items()}
    median = {"whole": {key: 4e6 * value for key, value in values.items()}, "packed": dict.fromkeys(values, 1e6)}
    return {"ranks": 2, "gbit": gbit, "measured_gbit": [1.0, 0.5], "sparsity": sparsity, "ratio": ratio, "median": median}


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


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("tc") is None, reason="needs root and tc for network namespaces")
def test_packed_buffers_leave_the_interface(capsys):
    wire.main(["--ranks", "2", "--rates", "0", "--sparsities", "0.75", "--rounds", "1", "--layers", "1"])
    cells = capsys.readouterr().out.splitlines()[-2].split("|")
    assert "2 ranks, unshaped, 75 %" in cells[1]
    assert float(cells[-3]) > 3
