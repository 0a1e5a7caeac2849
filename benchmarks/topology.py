"""What an update of the topology costs: one layer, its share of training, by ranks and model sizes, and the manager's part; and the
passes over all weights of GPT-2 Small that selections and AdamW make.

    python -m benchmarks.topology --out benchmarks/results        under 8 minutes on 2 cores
    python -m benchmarks.topology --quick                         toy sizes, seconds; its numbers mean nothing

One thread a rank. Ratios are of CPU times of contestants that take turns in one process; the manager is in wall time, for it waits
for the disk and for Ray. Exit status 1 if a bound is missed.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.manager import measure
from benchmarks.measure import table, write
from benchmarks.passes import optimizers, selections
from benchmarks.step import Size
from benchmarks.updates import DROP, SPARSITY, on_ranks, one_layer, share
from raysparse.train.process import process_group

FAR_WEIGHTS, FAR_LAYERS, FAR_RANKS = 1.3e9, 96, 64
"""GPT-3 XL: 24 blocks of 4 sparse weights."""
HOP_S, BYTES_PER_S = 100e-6, 1e9
"""Assumed, not measured: a message from node to node, and a network of 10 Gbit/s."""


@dataclass(frozen=True)
class Scope:
    """How much is measured.

    Attributes:
        layer: [rows, cols] of the single layer.
        steps: models whose training steps are compared with an update.
        models: those that are updated on each number of `ranks`, the smallest first, the largest last.
        passes: layers and width of the model whose weights are all gone through.
        rounds, updates, calls: of the single layer, the steps and the passes, of each model on ranks, of the manager.
    """

    layer: tuple[int, int]
    steps: tuple[Size, ...]
    models: Mapping[str, Size]
    ranks: tuple[int, ...]
    passes: tuple[int, int]
    rounds: int
    updates: int
    calls: int


FULL = Scope(
    layer=(768, 3072),
    steps=(Size(2, 768, 512, 512), Size(2, 768, 50257, 512)),
    models={"debug": Size(2, 64, 512, 64), "tiny": Size(4, 128, 512, 64), "gpt2-small": Size(12, 768, 512, 64)},
    ranks=(1, 2, 4),
    passes=(12, 768),
    rounds=11,
    updates=3,
    calls=100,
)
QUICK = Scope((64, 96), (Size(1, 64, 50, 8),), {"one": Size(1, 64, 50, 8), "two": Size(2, 128, 50, 8)}, (1, 2), (1, 64), 3, 2, 5)


def estimate(on_ranks: Sequence[Mapping[str, Any]], managed: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of an update of N = 1.3 billion sparse weights in L = 96 layers on W = 64 ranks, from what was measured here.

    a and b, seconds a weight and a layer, go through the smallest and the largest model on one rank. C collectives, S bytes of
    histograms and V of decision and vote are those counted for the largest model; bytes and the manager's m grow with the layers.
    """
    alone = [row for row in on_ranks if row["ranks"] == 1]
    (n, k, s), (n2, k2, s2) = ((row["sparse_weights"], row["layers"], median(row["cpu_seconds"])) for row in (alone[0], alone[-1]))
    a = (s2 * k - s * k2) / (n2 * k - n * k2)
    b = (s - a * n) / k
    sent, layers = on_ranks[-1]["sent_bytes"], FAR_LAYERS / on_ranks[-1]["layers"]
    collectives = len(sent["selection"]) + len(sent["control"])
    calls = [row for row in managed["calls"] if row["ranks"] == FAR_RANKS]
    seconds = {
        "own rows: a N / W": a * FAR_WEIGHTS / FAR_RANKS,
        "own layers: b L": b * FAR_LAYERS,
        "messages: 2 C (W - 1) h": 2 * collectives * (FAR_RANKS - 1) * HOP_S,
        "histograms: 2 S / B": 2 * sum(sent["selection"]) * layers / BYTES_PER_S,
        "decision and votes: W V / B": FAR_RANKS * sum(sent["control"]) * layers / BYTES_PER_S,
        "manager: m": sum(median(row["seconds"]) for row in calls) * FAR_LAYERS / managed["layers"],
    }
    checks = [
        {"model": row["model"], "ranks": row["ranks"], "seconds": a * row["most_weights_on_a_rank"] + b * row["layers"]} for row in on_ranks
    ]
    return {"a": a, "b": b, "collectives": collectives, "seconds": seconds, "total": sum(seconds.values()), "checks": checks}


def missed(row: Mapping[str, Any]) -> bool:
    """Whether the median of a ratio, or of seconds, is over the row's bound."""
    value = row["ratio"].median if "ratio" in row else median(row["seconds"])
    return row["at_most"] is not None and value > row["at_most"]


def bounded(facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All rows that may have a bound."""
    measured = [facts["layer"], *facts["steps"], facts["selections"], facts["optimizers"]]
    return [*(row for one in measured for row in one["ratios"]), *facts["manager"]["calls"]]


def report_layer(facts: Mapping[str, Any]) -> str:
    rows, cols = facts["shape"]
    return (
        f"## One layer\n\n{rows} x {cols:,}, {100 * SPARSITY:g} % sparse; {facts['dropped']:,} weights go, {100 * DROP:g} % of the live, "
        "and as many come. All contestants choose equally many; RigL's are, bit by bit, those that sorting finds.\n\n"
        + _ratios("ratio of CPU times", facts["ratios"])
        + "\n"
        + _seconds("CPU seconds", facts["cpu_seconds"])
    )


def report_steps(facts: Sequence[Mapping[str, Any]]) -> str:
    times = {f"{which}, vocabulary {one['size']['vocabulary']:,}": values for one in facts for which, values in one["cpu_seconds"].items()}
    return (
        "## Share of training\n\n"
        "RigL's update every 100 steps, audit, journal and swap included, in percent of the CPU time of the steps.\n\n"
        + _ratios("percent", [row for one in facts for row in one["ratios"]])
        + "\n"
        + _seconds("CPU seconds", times)
    )


def report_passes(selections: Mapping[str, Any], optimizers: Mapping[str, Any]) -> str:
    return (
        f"## All weights\n\n{selections['weights']:,} weights in {selections['layers']} layers. Selections as the engine makes them over\n"
        "torch.topk of as many; the largest magnitudes are checked. torch.topk gets magnitudes that are there, and writes no mask.\n\n"
        + _ratios("ratio of CPU times", [*selections["ratios"], *optimizers["ratios"]])
        + "\n"
        + _seconds("CPU seconds", {**selections["cpu_seconds"], **{f"AdamW: {name}": t for name, t in optimizers["cpu_seconds"].items()}})
    )


def report_ranks(rows: Sequence[Mapping[str, Any]], checks: Sequence[Mapping[str, Any]]) -> str:
    """What was measured, beside what the formula of the estimate says of it."""
    columns = [
        *("model", "sparse weights", "layers", "ranks", "CPU s", "a n + b L", "wall s", "CPU s a million weights of a rank"),
        *("selection: collectives, bytes", "decision, votes: collectives, bytes"),
    ]
    lines = []
    for row, check in zip(rows, checks, strict=True):
        cpu, wall, sent = median(row["cpu_seconds"]), median(row["wall_seconds"]), row["sent_bytes"]
        lines.append(
            [
                *(row["model"], f"{row['sparse_weights']:,}", row["layers"], row["ranks"]),
                *(f"{value:.3f}" for value in (cpu, check["seconds"], wall, 1e6 * cpu / row["most_weights_on_a_rank"])),
                *(f"{len(sent[kind])}, {sum(sent[kind]):,}" for kind in ("selection", "control")),
            ]
        )
    return (
        "## Ranks and sizes\n\nRigL's update, audit, journal and swap included. Gloo on this one machine, one thread a rank; medians of\n"
        "the slowest rank of each update; bytes that rank 0 puts in.\n\n" + table(columns, lines)
    )


def report_estimate(facts: Mapping[str, Any]) -> str:
    terms = [*facts["seconds"].items(), ("all", facts["total"])]
    return (
        f"## An estimate: {FAR_WEIGHTS:,.0f} sparse weights in {FAR_LAYERS} layers on {FAR_RANKS} ranks\n\n"
        "Not measured: `a N / W + b L + 2 C (W - 1) h + 2 S / B + W V / B + m` seconds. Every rank has a core like this machine's and\n"
        "equally many rows, and waits for nobody.\n\n"
        f"- a = {1e6 * facts['a']:.4f} s a million weights and b = {1e3 * facts['b']:.3f} ms a layer go through the smallest and the\n"
        "  largest model on one rank.\n"
        f"- C = {facts['collectives']} collectives, counted, as rings of 2 (W - 1) messages of h = {1e6 * HOP_S:.0f} us: assumed.\n"
        "- S and V, bytes of histograms and of decision and vote, are the last row's, times the layers;\n"
        f"  B = {1e-9 * BYTES_PER_S:g} GB/s: assumed.\n"
        "- m: the manager's two calls with as many ranks in one process, times the layers.\n\n"
        + table(["term", "seconds"], [[name, f"{seconds:.3f}"] for name, seconds in terms])
    )


def report_manager(facts: Mapping[str, Any]) -> str:
    rows = [
        [
            f"{row['call']}, {row['ranks']} ranks, {row['where']}",
            *(f"{1000 * seconds:.2f}" for seconds in (median(row["seconds"]), min(row["seconds"]), max(row["seconds"]))),
            *_verdict(row, "" if row["at_most"] is None else f"{1000 * row['at_most']:.0f}"),
        ]
        for row in facts["calls"]
    ]
    return (
        f"## The manager\n\nThe first {len(facts['calls'][0]['seconds'])} of {facts['updates']:,} updates of {facts['run']}, "
        f"{facts['layers']} layers. A commit audits the votes of all ranks and is on the disk (fsync) when it returns. Load of the machine "
        f"before: {facts['load_before']:.1f}.\n\n" + table(["wall milliseconds", "median", "least", "most", "at most", ""], rows)
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.topology", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy sizes: does it run?")
    parser.add_argument("--out", type=Path, help="folder for topology_<hardware>_<date>.{json,md}")
    args = parser.parse_args(argv)
    scope = QUICK if args.quick else FULL
    torch.set_num_threads(1)
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with process_group("cpu"):
            facts["layer"] = one_layer(folder, scope.layer, scope.rounds)
            facts["steps"] = [share(folder / str(i), size, scope.rounds) for i, size in enumerate(scope.steps)]
        facts["selections"], facts["optimizers"] = selections(*scope.passes, scope.rounds), optimizers(*scope.passes, scope.rounds)
        facts["ranks"] = [row for num_ranks in scope.ranks for row in on_ranks(num_ranks, scope.models, scope.updates)]
        facts["manager"] = measure(folder, scope.calls, FAR_RANKS)
    facts["estimate"] = estimate(facts["ranks"], facts["manager"])
    tables = [
        report_layer(facts["layer"]),
        report_steps(facts["steps"]),
        report_passes(facts["selections"], facts["optimizers"]),
        report_ranks(facts["ranks"], facts["estimate"]["checks"]),
        report_estimate(facts["estimate"]),
        report_manager(facts["manager"]),
    ]
    print("\n".join(tables))
    if args.out:
        print(write(args.out, "topology-quick" if args.quick else "topology", facts, tables))
    return int(any(map(missed, bounded(facts))))


def _ratios(what: str, rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [
            row["what"],
            f"{row['contestant']} / {row['over']}",
            row["ratio"],
            f"{row['ratio'].smallest:.3f} - {row['ratio'].largest:.3f}",
            *_verdict(row, "" if row["at_most"] is None else f"{row['at_most']:.2f}"),
        ]
        for row in rows
    ]
    return table(["", what, "median [95 %]", "all rounds", "at most", ""], lines)


def _verdict(row: Mapping[str, Any], bound: str) -> tuple[str, str]:
    return bound, "" if row["at_most"] is None else "MISSED" if missed(row) else "met"


def _seconds(what: str, times: Mapping[str, Sequence[float]]) -> str:
    lines = [[name, f"{median(values):.4f}", f"{min(values):.4f}", f"{max(values):.4f}"] for name, values in times.items()]
    return table([what, "median", "least", "most"], lines)


if __name__ == "__main__":
    sys.exit(main())
