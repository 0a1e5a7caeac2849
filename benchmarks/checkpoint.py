"""What a checkpoint of GPT-2 Small costs: seconds that training stands still, bytes, seconds until it is there, and until it is read.

    python -m benchmarks.checkpoint                  dense and 75 %, 1 and 2 ranks; under 10 minutes, 8 GB of memory
    python -m benchmarks.checkpoint --layers 2 --tokens 64 --shares 64 --rounds 1

Synchronous and asynchronous saving take turns in one process, with one model. What blocks is all that a save adds to the training thread:
the call, and the wait for the copy before the optimizer steps. Exit status 1 if that is more than 5 % of a step of the last of `--shares`
tokens a rank with asynchronous saving.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist

from benchmarks.masks import alone
from benchmarks.measure import table, write
from benchmarks.step import Feed, Size, assemble
from raysparse.train import loop
from raysparse.train.checkpoint import CheckpointConfig, Checkpointer
from raysparse.train.interval import Interval
from raysparse.train.optimizer import OptimizerConfig
from raysparse.train.state import State, Training

AT_MOST = 0.05
KINDS = {"dense": (0.0, True), "75 %, stored whole": (0.75, False), "75 %": (0.75, True)}
"""Name -> (sparsity, whether of sparse weights and their moments the live elements alone are stored)."""
WAYS = ("asynchronous", "synchronous")


class Whole(Checkpointer):
    """Stores every element of sparse weights and moments: what it saves to leave out the dead ones is measured against this."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._live = ()


def measure(folder: Path, kept: str, kind: str, size: Size, shares: Sequence[int], rounds: int) -> dict[str, Any]:
    """Of one kind of model on the default process group; every rank calls this, rank 0's result counts.

    Args:
        kept: folder for the last checkpoint; if other ranks have left one of this kind there, it is read first.
        size: with the tokens of the steps beside which is saved.
        shares: tokens of other steps.
    """
    sparsity, live = KINDS[kind]
    optimizer = OptimizerConfig(lr=1e-4, state="live" if live and sparsity else "dense")
    t = assemble(folder / str(dist.get_rank()), replace(size, tokens=max(size.tokens, *shares)), sparsity, optimizer=optimizer)
    (folder / str(dist.get_rank()) / "claim").write_text("")
    parts, found = (t.sharded, t.optimizer, t.topology, t.agenda), {}
    kinds = {way: CheckpointConfig(asynchronous=way == WAYS[0], keep=1) for way in WAYS}
    savers = {way: (Checkpointer if live else Whole)(folder / way, config, *parts) for way, config in kinds.items()}
    place = Path(kept) / kind
    found["restore_on_others"] = [_seconds(lambda: savers[WAYS[0]].load(place)) for _ in range(2)] if place.exists() else []
    found["step_s"] = {}
    for tokens in (*shares, size.tokens):
        t.feed = Feed(replace(size, tokens=tokens))
        _step(t)
        found["step_s"][tokens] = median(_step(t) for _ in range(3 if tokens == size.tokens else 1))
    for way in WAYS:
        t.checkpointer = savers[way]
        found[way] = [_save(t, State(step=number + 1, optimizer_steps=1)) for number in range(rounds)]
    path = savers[WAYS[0]].path(rounds)
    found["restore"] = [_seconds(lambda: savers[WAYS[0]].load(path)) for _ in range(2)]
    found["bytes"] = sum(file.stat().st_size for file in path.iterdir())
    if dist.get_rank() == 0:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(path, place)
    return found


def _save(t: Training, state: State) -> dict[str, float]:
    """A save as the loop makes it, and the steps that run until it is committed."""
    dist.barrier()
    began = time.perf_counter()
    loop.save(t, state, Interval(t, state))
    call, waits, steps = time.perf_counter() - began, [], []
    staged = t.checkpointer.staged
    t.checkpointer.staged = lambda: waits.append(_seconds(staged))
    pending = t.checkpointer._pending
    while len(steps) < 1 or (pending is not None and not _everywhere(pending.done())):
        steps.append(_step(t))
    t.checkpointer.staged = staged
    t.checkpointer.wait()
    return {"call": call, "copy": waits[0], "committed": time.perf_counter() - began, "step": median(steps), "steps": len(steps)}


def _everywhere(flag: bool) -> bool:
    flags: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(flags, flag)
    return all(flags)


def _step(t: Training) -> float:
    def step() -> None:
        loop.forward_backward(t, 0)
        loop.update(t, 0)

    return _seconds(step)


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def report(results: Sequence[dict[str, Any]], size: Size, shares: Sequence[int]) -> list[str]:
    """Tables: what blocks, and what is stored."""
    blocks, stored = [], []
    for one in results:
        for way in WAYS:
            saves = one[way]
            blocked = median(save["call"] + save["copy"] for save in saves)
            beside = [save["step"] / one["step_s"][size.tokens] for save in saves if save["steps"] > 0] if way == WAYS[0] else []
            row = [f"{one['kind']}, {one['ranks']} rank{'s' if one['ranks'] > 1 else ''}", way, f"{blocked:.3f}"]
            row += [f"{median(save['copy'] for save in saves):.3f}"]
            row += [f"{blocked / one['step_s'][tokens]:.1%}" for tokens in (*shares, size.tokens)]
            row += [f"{median(save['committed'] for save in saves):.1f}", f"{median(beside):.2f}" if beside else ""]
            blocks.append(row)
        others = f"{median(one['restore_on_others']):.2f}" if one["restore_on_others"] else ""
        stored.append([f"{one['kind']}, {one['ranks']}", f"{one['bytes'] / 1e6:,.0f}", f"{median(one['restore']):.2f}", others])
    told = [
        f"{tokens} tokens {median(one['step_s'][tokens] for one in results if one['ranks'] == ranks):.2f} s"
        for ranks in sorted({one["ranks"] for one in results})
        for tokens in (*shares, size.tokens)
    ]
    columns = ["model", "saving", "blocked (s)", "of it for the copy", *(f"of a step of {tokens}" for tokens in (*shares, size.tokens))]
    columns += ["until it is committed (s)", "steps meanwhile / alone"]
    return [
        f"A step, alone: {', '.join(told)}.\n",
        table(columns, blocks),
        table(["model, ranks", "MB", "restored on as many (s)", "on other ranks (s)"], stored),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 1], help="each also restores what the number before it saved")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=256, help="of a step beside a save, of each rank")
    parser.add_argument("--shares", type=int, nargs="+", default=[64, 1024], help="tokens of other steps that are timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for checkpoint_<hardware>_<date>.{json,md}")
    args = parser.parse_args(argv)
    size, results = Size(args.layers, 768, 50257, args.tokens), []
    with tempfile.TemporaryDirectory() as kept:
        for ranks in args.ranks:
            for kind in KINDS:
                one = alone(measure, kept, kind, size, args.shares, args.rounds, num_ranks=ranks)
                results.append({"kind": kind, "ranks": ranks} | one)
                print(report(results[-1:], size, args.shares)[1], flush=True)
    tables = report(results, size, args.shares)
    print("\n".join(tables))
    if args.out:
        print(write(args.out, "checkpoint", {"size": vars(size), "results": results}, tables))
    shares = [median(save["call"] + save["copy"] for save in one[WAYS[0]]) / one["step_s"][args.shares[-1]] for one in results]
    return int(max(shares) > AT_MOST)


if __name__ == "__main__":
    sys.exit(main())
