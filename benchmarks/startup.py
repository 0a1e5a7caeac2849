"""From the command to the first training step: ``raysparse pretrain configs/debug.yaml`` with its data already tokenized.

    python -m benchmarks.startup                 on a Ray that the command starts and ends
    python -m benchmarks.startup --runs 9 --out benchmarks/results

Wall time from the start of the process to the console line of step 1, and to the end of the process after step 2. Exit status 1
if the median to the first step is over the goal. Wall time means little on a busy machine: the load is reported beside it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import table, write

GOAL_S = 25.0
"""To the first step on Ray, on an idle machine with 2 cores."""

ROOT = Path(__file__).parents[1]
SHORT = ["training.length=2", "logging.every=1", "training.validate_every=2", "checkpoint.every=2"]


def start(folder: Path, name: str, local: bool) -> dict[str, float]:
    """Run the command once; seconds to its first step and to its end, and the CPU seconds of all its processes.

    Raises:
        RuntimeError: it failed, or ended without a step; the message has its output.
    """
    command = [sys.executable, "-m", "raysparse", "pretrain", str(ROOT / "configs" / "debug.yaml"), *SHORT]
    command += [f"run.folder={folder}", f"run.name={name}", *(["--local"] if local else [])]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    load, began = os.getloadavg()[0], time.perf_counter()
    first, lines = None, []
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if first is None and "| step" in line and "| loss" in line:
                first = time.perf_counter() - began
    if process.returncode != 0 or first is None:
        raise RuntimeError(f"Expected a training step from {' '.join(command)}. Got exit status {process.returncode}:\n{''.join(lines)}")
    return {"first_step_s": first, "end_s": time.perf_counter() - began, "load_before": load}


def measure(runs: int, local: bool) -> list[dict[str, float]]:
    """Several starts after one that is not counted: it tokenizes the data and warms the disk cache."""
    with tempfile.TemporaryDirectory() as folder:
        return [start(Path(folder), f"run{index}", local) for index in range(runs + 1)][1:]


def report(results: dict[str, list[dict[str, float]]]) -> str:
    rows: list[list[Any]] = []
    for where, runs in results.items():
        for what, key in (("first step", "first_step_s"), ("end of the process", "end_s")):
            values = [run[key] for run in runs]
            rows.append([f"{where}: {what}", f"{median(values):.1f}", f"{min(values):.1f}", f"{max(values):.1f}", len(values)])
    loads = [run["load_before"] for runs in results.values() for run in runs]
    return (
        table(["seconds to", "median", "least", "most", "runs"], rows)
        + f"\nLoad of the machine before the runs: {min(loads):.1f} to {max(loads):.1f}.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.startup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--where", nargs="+", choices=["ray", "local"], default=["ray", "local"])
    parser.add_argument("--out", type=Path, help="folder for startup_<hardware>_<date>.{json,md}")
    args = parser.parse_args(argv)
    results = {where: measure(args.runs, where == "local") for where in args.where}
    print(report(results))
    if args.out:
        print(write(args.out, "startup", {"goal_s": GOAL_S, "seconds": results}, [report(results)]))
    return int("ray" in results and median(run["first_step_s"] for run in results["ray"]) > GOAL_S)


if __name__ == "__main__":
    sys.exit(main())
