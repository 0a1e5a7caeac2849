"""Whole pre-training steps with and without zeros, through `raysparse pretrain`: head, attention, optimizer, data, logging and all.

    python -m benchmarks.cpu_step                       12 layers of width 512, 8,192 tokens of vocabulary; and the quickstart's model
    python -m benchmarks.cpu_step --only quickstart

Each contestant is the command itself in a process of its own, one thread; contestants take turns. Time is the wall-clock of the steps
after the first log interval as the run's own log has it, so it counts everything but start-up. Exit status 1 if a goal is missed.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from benchmarks.measure import Ratio, table, write

CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = {  # overrides of configs/quickstart.yaml, and what each contestant's time over the dense one's must at least gain
    "12 layers, width 512, vocabulary 8,192": (
        [
            "model={preset: gpt2-small, overrides: {n_layer: 12, n_embd: 512, n_head: 8}}",
            *("data.tokenizer.vocab_size=8192", "data.context=256", "training.sequences=4", "training.micro=4", "training.length=9 steps"),
        ],
        {0.75: 1.6, 0.9: 2.2},
    ),
    "quickstart": (["training.length=60 steps", "logging.every=12 steps"], {0.75: 1.3}),
}
LOCAL = ["run.workers=1", "run.threads=1", "training.validate_every=0 steps", "training.validation_sequences=4", "checkpoint.every=0 steps"]


def seconds(folder: Path, overrides: Sequence[str]) -> float:
    """Seconds a step, of all steps after the first log interval."""
    command = [sys.executable, "-m", "raysparse", "pretrain", str(CONFIGS / "quickstart.yaml"), "--local"]
    settings = [f"run.folder={folder}", "run.name=run", *LOCAL, "logging.every=3 steps", *overrides]
    done = subprocess.run([*command, *settings], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    intervals = [line for line in lines if "tokens_per_s" in line]
    tokens = [late["tokens"] - early["tokens"] for early, late in itertools.pairwise(intervals)]
    spent = [count / line["tokens_per_s"] for count, line in zip(tokens, intervals[1:], strict=True)]
    return sum(spent) / (intervals[-1]["step"] - intervals[0]["step"])


def compare(folder: Path, model: str, rounds: int) -> dict[str, Any]:
    """Seconds a step of the dense and the sparse runs, and their ratios."""
    overrides, goals = MODELS[model]
    cases = {"dense": ["sparsity.target=0"]} | {f"{100 * s:g} %": [f"sparsity.target={s}"] for s in goals}
    cases |= {f"{100 * s:g} %, kernels=dense": [f"sparsity.target={s}", "kernels=dense"] for s in list(goals)[:1]}
    times: dict[str, list[float]] = {name: [] for name in cases}
    turns = [(turn, name) for turn in range(rounds) for name in list(cases)[turn % len(cases) :] + list(cases)[: turn % len(cases)]]
    for turn, name in tqdm(turns, desc=model, leave=False):
        times[name].append(seconds(folder / name / str(turn), [*overrides, *cases[name]]))
    bounds = {f"{100 * s:g} %": goal for s, goal in goals.items()}
    return {
        "model": model,
        "overrides": overrides,
        "rounds": rounds,
        "seconds": times,
        "ratios": [
            {"contestant": name, "goal": bounds.get(name), "ratio": Ratio.of(times["dense"], times[name])}
            for name in cases
            if name != "dense"
        ],
    }


def missed(row: dict[str, Any]) -> bool:
    return row["goal"] is not None and row["ratio"].median < row["goal"]


def report(facts: dict[str, Any]) -> str:
    rows = [
        [
            row["contestant"],
            row["ratio"],
            f"{median(facts['seconds'][row['contestant']]):.3f}",
            "" if row["goal"] is None else f"{row['goal']:.1f}",
            "" if row["goal"] is None else "MISSED" if missed(row) else "met",
        ]
        for row in facts["ratios"]
    ]
    rows.insert(0, ["dense", "1", f"{median(facts['seconds']['dense']):.3f}", "", ""])
    interval = "all rounds" if facts["rounds"] < 6 else "95 %"  # so few rounds hold the median less surely
    head = f"## {facts['model']}\n\n`raysparse pretrain configs/quickstart.yaml --local {' '.join(facts['overrides'])}`\n\n"
    return head + table(["sparsity", f"times faster, median [{interval}]", "seconds a step", "goal", ""], rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.cpu_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="models whose name begins so")
    parser.add_argument("--out", type=Path, help="folder for cpu_step_<hardware>_<date>.{json,md}")
    args = parser.parse_args(argv)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for number, model in enumerate(MODELS):
            if args.only is None or model.startswith(args.only):
                results.append(compare(Path(folder) / str(number), model, args.rounds))
                print(report(results[-1]), flush=True)
    if args.out:
        print(write(args.out, "cpu_step", {"models": results}, [report(facts) for facts in results]))
    return int(any(missed(row) for facts in results for row in facts["ratios"]))


if __name__ == "__main__":
    sys.exit(main())
