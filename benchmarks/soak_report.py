"""What a soak saw: slopes, bounds, tables and a picture. See `benchmarks.soak`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import table
from benchmarks.processes import Slope
from raysparse.report.drawing import canvas, stroke, style, svg

ROLES = {  # of a process by what its command line holds
    "command": None,
    "workers": None,
    "mask manager": "ray::MaskManager",
    "controller": "ray::TrainController",
    "GCS": "gcs_server",
    "raylet": "raylet/raylet",
    "log monitor": "log_monitor.py",
    "agents": "Agent",
    "rest of Ray": "",
}
BOUNDS = {  # role or thing -> (what of it, at most, unit of a rise in an hour)
    "command": (("memory", 5.0), ("handles", 2.0), ("threads", 2.0)),
    "workers": (("memory", 10.0), ("handles", 2.0), ("threads", 2.0)),
    "mask manager": (("memory", 5.0), ("handles", 2.0), ("threads", 2.0)),
}
STORE_BOUND, CHECKPOINTS_BOUND = 1.0, 2.0


@dataclass
class Soak:
    """What was seen.

    Attributes:
        samples: one a look; times in seconds since the first checkpoint.
        losses: one a kill: when, which rank, in which step, from which step it went on, seconds until a new step was told.
        saved: checkpoint -> when it was committed, of those that a look found.
    """

    folder: Path
    step_s: float
    save_every: int
    samples: list[dict[str, Any]] = field(default_factory=list)
    losses: list[dict[str, Any]] = field(default_factory=list)
    saved: dict[str, float] = field(default_factory=dict)
    ended: dict[str, Any] = field(default_factory=dict)


def series(found: Soak, warmup_s: float) -> dict[str, list[tuple[float, float]]]:
    """Name -> (hours, value): the median of each time between two losses, of the samples after the warm-up.

    Of a group's first minute nothing counts: it starts.
    """
    starts = [0.0, *(loss["seconds"] + loss["recovery_s"] + 60 for loss in found.losses)]
    ends = [*(loss["seconds"] for loss in found.losses), float("inf")]
    if not found.losses:  # no losses: as if there had been some, every five minutes
        starts, ends = [300.0 * k for k in range(1000)], [300.0 * (k + 1) for k in range(1000)]
    result: dict[str, list[tuple[float, float]]] = {}
    for start, end in zip(starts, ends, strict=True):
        if seen := [one for one in found.samples if max(start, warmup_s) <= one["seconds"] < end]:
            for name in _values(seen[0]):
                values = [_values(one)[name] for one in seen if name in _values(one)]
                result.setdefault(name, []).append((median(one["seconds"] for one in seen) / 3600, median(values)))
    return result


def _values(sample: dict[str, Any]) -> dict[str, float]:
    values = {}
    for role, one in sample["roles"].items():
        values |= {f"{role}, memory": one["memory_bytes"] / 1e6, f"{role}, handles": one["handles"], f"{role}, threads": one["threads"]}
        values[f"{role}, processes"] = one["processes"]
    if sample["object_store_bytes"] is not None:
        values["object store"] = sample["object_store_bytes"] / 1e6
    return values | {"checkpoints, number": sample["checkpoints"]} | {name: size / 1e6 for name, size in sample["disk"].items()}


def within_lives(found: Soak, warmup_s: float) -> list[float]:
    """MB an hour by which the workers' memory rises within each group's life, but for its first minute."""
    slopes = []
    for pids in {tuple(one["workers"]) for one in found.samples}:
        life = [one for one in found.samples if tuple(one["workers"]) == pids and "workers" in one["roles"]]
        life = [
            one
            for one in life
            if one["seconds"] > max(warmup_s, life[0]["seconds"] + 60) and one["roles"]["workers"]["processes"] == len(pids)
        ]
        if len(life) >= 6:
            slopes.append(Slope.of([(one["seconds"] / 3600, one["roles"]["workers"]["memory_bytes"] / 1e6) for one in life]).slope)
    return sorted(slopes)


def report(found: Soak, values: dict[str, list[tuple[float, float]]], lives: Sequence[float]) -> tuple[list[str], bool]:
    """Tables, and whether every bound is met."""
    bounds = {f"{role}, {what}": most for role, bound in BOUNDS.items() for what, most in bound}
    bounds |= {"object store": STORE_BOUND, "checkpoints": CHECKPOINTS_BOUND}
    rows, met = [], True
    for name, points in sorted(values.items(), key=lambda item: (item[0] not in bounds, item[0])):
        if name not in bounds and name.endswith(("threads", "processes")):
            continue
        slope = Slope.of(points) if len(points) > 1 else None
        verdict = "" if slope is None or name not in bounds else "met" if slope.slope <= bounds[name] else "MISSED"
        met = met and verdict != "MISSED"
        rows.append([name, f"{points[0][1]:.1f}", f"{points[-1][1]:.1f}", slope or "", bounds.get(name, ""), verdict])
    told = f"{len(found.samples)} looks in {found.samples[-1]['seconds'] / 60:.0f} minutes, {found.samples[-1]['step']:,} steps of about "
    times = sorted(found.saved.values())
    between = [later - earlier for earlier, later in pairwise(times)]
    told += f"{found.step_s:.2f} s, {len(times)} checkpoints seen, {median(between):.0f} s between them "
    told += f"(median; {found.save_every} steps). Memory, disk and object store in MB.\n"
    if lives:
        told += f"\nWithin a life of the workers their memory rises by {median(lives):+.0f} MB an hour "
        told += f"({lives[0]:+.0f} to {lives[-1]:+.0f} over {len(lives)} lives).\n"
    tables = [told, table(["what", "first", "last", "rise an hour [95 %]", "at most", ""], rows)]
    if found.losses:
        lost = [loss["killed_at"] - loss["went_on_from"] for loss in found.losses]
        back = sorted(loss["recovery_s"] for loss in found.losses)
        tables.append(
            f"{len(back)} workers killed. From the kill to the first new steps on the console {median(back):.0f} s ({back[0]:.0f} to "
            f"{back[-1]:.0f}); steps done again {median(lost):.0f} ({min(lost)} to {max(lost)}).\n"
        )
    ended = found.ended
    if "error" in ended:
        return [*tables, f"It ended too early. {ended['error']}\n"], False
    left = f"{len(ended['left_behind'])} processes: {', '.join(ended['left_behind'])}" if ended["left_behind"] else "no process"
    tables.append(
        f"At the end the command was interrupted: exit status {ended['status']} after {ended['seconds']:.0f} s, which left {left}.\n"
    )
    return tables, met and not ended["left_behind"]


def picture(found: Soak) -> str:
    """Memory by role, over the hours."""
    with style():
        figure = canvas(3.6)
        ours, theirs = figure.subplots(2, 1, sharex=True)
        for i, role in enumerate(ROLES):
            points = [(one["seconds"] / 60, one["roles"][role]["memory_bytes"] / 1e6) for one in found.samples if role in one["roles"]]
            (ours if i < 4 else theirs).plot(*zip(*points, strict=True), **stroke(i), label=role) if points else None
        for axes in (ours, theirs):
            axes.set(ylabel="memory (MB)", ylim=(0, None))
        theirs.set_xlabel("minutes")
        figure.legend(loc="outside lower center", ncols=3)
        return svg(figure, "Memory of the processes of a run over time")
