"""Ratios of CPU times that hold on a busy machine, and result files that can be repeated."""

import json
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from math import comb
from pathlib import Path
from typing import Any

from raysparse.recipes.environment import write_environment
from raysparse.train.run import RunConfig


@dataclass(frozen=True)
class Ratio:
    """A ratio of two contestants over paired rounds.

    Attributes:
        low, high: an interval that holds the true median with at least 95 % (order statistics; nothing is assumed normal).
        smallest, largest: of all rounds.
    """

    median: float
    low: float
    high: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, above: Sequence[float], below: Sequence[float]) -> "Ratio":
        values = sorted(a / b for a, b in zip(above, below, strict=True))
        first = _rank(len(values))
        return cls(statistics.median(values), values[first], values[-1 - first], values[0], values[-1])

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interleave(
    contestants: Mapping[str, Callable[[int], Any]],
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.process_time,
    warm: bool = False,
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round: CPU time of all threads of the process, or by another clock.

    Every round runs every contestant once and starts with another one, so that what drifts in the machine meets all alike.
    The first `warmup` rounds are not kept. A contestant finds the caches full of the others' data; `warm` runs it twice and times the
    second run.
    """
    names, times = list(contestants), {name: [] for name in contestants}
    for index in range(warmup + rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            if warm:
                contestants[name](index)
            began = clock()
            contestants[name](index)
            if index >= warmup:
                times[name].append(clock() - began)
    return times


def environment() -> dict[str, Any]:
    """Versions, hardware, commit (with "-dirty" where files differ from it), command and time."""
    with tempfile.TemporaryDirectory() as folder:
        write_environment(Path(folder), RunConfig())
        facts = json.loads((Path(folder) / "environment.json").read_text())
    git = ["git", "-C", str(Path(__file__).parent), "status", "--porcelain", "--untracked-files=no", "--", "../raysparse", "."]
    changed = facts["commit"] and subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    program = f"-m benchmarks.{Path(sys.argv[0]).stem}"
    return facts | {
        "commit": f"{facts['commit']}-dirty" if changed else facts["commit"],
        "command": shlex.join(["python", *program.split(), *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write(out: Path, what: str, facts: Mapping[str, Any], tables: Sequence[str], indent: int | None = 1) -> Path:
    """``<what>_<hardware>_<date>.json`` and ``.md`` in the folder `out`; returns the latter.

    Args:
        indent: of the JSON; None: all in a line, for thousands of samples.
    """
    setting = environment()
    hardware = re.sub(r"[^a-z0-9]+", "-", f"{setting['processor']} {setting['cores']} cores".lower()).strip("-")
    stem = out / f"{what}_{hardware}_{setting['date'][:10]}"
    out.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps({"environment": setting} | dict(facts), indent=indent, default=asdict) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in setting["versions"].items())
    head = (
        f"# {what}: {setting['processor']}, {setting['cores']} cores, {setting['date'][:10]}\n\n"
        f"    {setting['command']}\n\nCommit {setting['commit']}; {versions}; {setting['machine']}.\n"
    )
    stem.with_suffix(".md").write_text("\n".join([head, *tables]))
    return stem.with_suffix(".md")


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first column is left-aligned, the others to the right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def _rank(count: int) -> int:
    """The largest k such that the k-th smallest and k-th largest of `count` values hold the median with 95 % or more (0-based)."""
    outside, last = 0.0, 0
    for k in range((count + 1) // 2):
        outside += 2 * comb(count, k) / 2**count
        if outside > 0.05:
            break
        last = k
    return last
