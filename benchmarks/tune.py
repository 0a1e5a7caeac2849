"""What Ray Tune costs: the trials of a search against the same commands by hand, one after another.

    python -m benchmarks.tune                            four short fine-tunings of the quickstart's model; 15 minutes
    python -m benchmarks.tune --rounds 3 --out benchmarks/results

By hand: the search's own printed commands, each `raysparse finetune ... --local`, a process after a process. As a search: `raysparse tune`
with the same points, one trial at a time. Both are timed from the start of their first process to the end of their last, and both also
over what lies inside the runs: training and answers, from the end of a run's checks to its summary. Start-up of the search is what passes
before its first trial's process is asked for: its checks and Ray. What each trial's own process takes to start counts on both sides. Exit
status 1 if the search without its start-up takes over 10 % more than by hand.
"""

import argparse
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measure import Ratio, table, write
from tuning.check import CONFIG
from tuning.config import SearchConfig
from tuning.space import Search

ROOT = Path(__file__).parents[1]
BOUND = 1.10
"""As a search, without its start-up, over by hand."""


def config(folder: Path, name: str) -> SearchConfig:
    values = yaml.safe_load((ROOT / "tuning" / "spaces" / "demo.yaml").read_text())
    values["run"] = {"name": name, "folder": str(folder)}
    values["tasks"]["docstrings"]["set"] = {"training": {"length": "100 steps"}, "evaluation": {"max_examples": 100}}
    values["pretrain"]["space"] = {"sparsity.target": {"choice": [0.75]}}
    values |= {"scheduler": {"type": "none"}, "max_concurrent": 1, "keep": 4}
    return SearchConfig.check(values)


def run(*words: str) -> float:
    """Seconds of a command that prints nothing unless it fails."""
    began = time.perf_counter()
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"Expected `{shlex.join(words)}` to succeed. Got exit status {done.returncode}:\n{done.stderr}")
    return time.perf_counter() - began


def as_search(folder: Path, index: int) -> dict[str, float]:
    """Seconds of all, of the start-up, and inside the runs."""
    search = config(folder, f"search{index}")
    file = folder / f"search{index}.yaml"
    file.write_text(search.to_yaml())
    began = time.time()
    seconds = run("tuning", str(file))
    runs = list((search.path / "trials").iterdir())
    return {"all": seconds, "start-up": (search.path / CONFIG).stat().st_mtime - began, "inside": sum(map(_inside, runs))}


def by_hand(folder: Path, index: int) -> dict[str, float]:
    search = Search(config(folder, f"search{index}"))
    seconds, inside = 0.0, 0.0
    for point in search.points():
        words = [*shlex.split(search.command(point)), "--local", f"run.name=hand{index}-{point.digest}"]
        seconds += run(*words)
        inside += _inside(folder / f"hand{index}-{point.digest}")
    return {"all": seconds, "start-up": 0.0, "inside": inside}


def _began(folder: Path) -> float:
    """When the run had been checked and its training began."""
    return (folder / "environment.json").stat().st_mtime


def _inside(folder: Path) -> float:
    return (folder / "summary.json").stat().st_mtime - _began(folder)


def report(rows: Sequence[dict[str, dict[str, float]]]) -> tuple[str, Ratio]:
    found = {way: {key: [row[way][key] for row in rows] for key in rows[0][way]} for way in rows[0]}
    hand, search = found["hand"], found["search"]
    ratio = Ratio.of([a - b for a, b in zip(search["all"], search["start-up"], strict=True)], hand["all"])
    lines: list[list[Any]] = [
        [name, *(f"{statistics.median(of[key]):.1f}" for key in ("all", "start-up", "inside"))]
        for name, of in (("by hand, one after another", hand), ("as a search", search))
    ]
    lines.append(["search / hand", Ratio.of(search["all"], hand["all"]), "", Ratio.of(search["inside"], hand["inside"])])
    lines.append(["search without its start-up / hand", ratio, "", ""])
    return table(["seconds of 4 trials", "all", "start-up", "inside the runs"], lines), ratio


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for tune_<hardware>_<date>.{json,md}")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        search = Search(config(place, "search"))
        model = search.first_level()[0][1]
        (place / "model.yaml").write_text(model.to_yaml())
        run("raysparse", "pretrain", str(place / "model.yaml"), "--local")
        rows = []
        for index in range(args.rounds):
            ways = {"search": as_search, "hand": by_hand}
            rows.append({way: ways[way](place, index) for way in list(ways)[:: 1 if index % 2 else -1]})
            for name in place.glob("*[0-9]*"):
                if name.is_dir():
                    shutil.rmtree(name)
    text, ratio = report(rows)
    print(text)
    if args.out:
        print(write(args.out, "tune", {"bound": BOUND, "rows": rows}, [text]))
    return int(ratio.median > BOUND)


if __name__ == "__main__":
    sys.exit(main())
