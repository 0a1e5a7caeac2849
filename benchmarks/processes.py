"""What the processes of a command hold, read from /proc (Linux): memory, file handles, threads; and slopes of such numbers over time."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import median

PROC = Path("/proc")


@dataclass(frozen=True)
class Held:
    """By some processes together.

    Attributes:
        memory_bytes: resident and anonymous: what they have allocated. Files that are mapped, such as libraries, do not count: how much of
            them is resident, and whose, depends on what else runs on the machine.
        handles: open file descriptors.
    """

    processes: int
    memory_bytes: int
    handles: int
    threads: int

    def __add__(self, other: "Held") -> "Held":
        return Held(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def tree(root: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def command(pid: int) -> str:
    """Its command line, or the title that it gave itself; empty where it has ended."""
    with contextlib.suppress(OSError):
        return (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def held(pid: int) -> Held | None:
    """None where it has ended."""
    here = PROC / str(pid)
    try:
        status = (here / "status").read_text()
        memory, threads = 1024 * int(_value(status, "RssAnon")), int(_value(status, "Threads"))
        return Held(1, memory, len(os.listdir(here / "fd")), threads)
    except (OSError, StopIteration):
        return None


@dataclass(frozen=True)
class Slope:
    """Theil and Sen's: the median of the slopes between all pairs of points, with an interval of 95 % by Kendall's statistic."""

    slope: float
    low: float
    high: float

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]]) -> "Slope":
        """Args:
        points: (time, value), at least two at different times.
        """
        slopes = sorted(_pairs(points))
        n, last = len(points), len(slopes) - 1
        reach = 1.96 * sqrt(n * (n - 1) * (2 * n + 5) / 18)
        low = max(0, int((len(slopes) - reach) / 2))
        return cls(median(slopes), slopes[low], slopes[last - low])

    def __str__(self) -> str:
        return f"{self.slope:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def _pairs(points: Sequence[tuple[float, float]]) -> Iterator[float]:
    for i, (x, y) in enumerate(points):
        yield from ((other - y) / (later - x) for later, other in points[i + 1 :])


def _value(text: str, name: str) -> str:
    return next(line.split()[1] for line in text.splitlines() if line.startswith(f"{name}:"))
