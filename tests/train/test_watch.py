"""The watch ends a process whose step does not end, and no other."""

import subprocess
import sys
from pathlib import Path

import pytest

from raysparse.train import watch

BEGIN = f"""
import runpy, sys, time; from pathlib import Path
Watch = runpy.run_path({watch.__file__!r}, run_name="watch")["Watch"]
limit = 1.0
def stuck(): time.sleep(4)
def made(limit): return Watch(limit, Path(sys.argv[1]) / "hangs" / "rank_0.txt", lambda text: print(text, flush=True))
"""


@pytest.mark.parametrize(
    ("steps", "ends"),
    [
        ("w = made(limit); w.beat(); w.rest(); w.beat(); stuck()", True),
        ("w = made(limit); w.beat(); w.rest(); w.beat(); [(time.sleep(0.3), w.beat()) for _ in range(10)]", False),
        ("w = made(limit); w.beat(); stuck()", False),  # the first step may compile
        ("w = made(limit); w.beat(); w.rest(); w.beat(); w.rest(); stuck()", False),  # a validation, say
        ("w = made(limit); w.beat(); w.rest(); w.beat(); w.close(); stuck()", False),
        ("w = made(None); w.beat(); w.rest(); w.beat(); stuck()", False),
    ],
    ids=["hangs", "is slow", "compiles", "rests", "is over", "is not watched"],
)
def test_a_process_that(steps: str, ends: bool, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", BEGIN + steps, str(tmp_path)], capture_output=True, text=True, check=False)
    file = tmp_path / "hangs" / "rank_0.txt"
    assert done.returncode == ends, done.stderr
    assert file.exists() == ends
    if ends:
        assert "in stuck" in file.read_text()
        assert done.stdout == f"no micro-batch ended within run.hang_timeout_s=1; where the rank stood is in {file}\n"
