"""What a teacher costs: a step of fine-tuning with KL and SquareHead over one without, and the memory that it takes more.

    python -m benchmarks.distillation                GPT-2-small width, 4 layers, 2 micro-batches of 256 tokens, 1 and 2 ranks; 4 GB
    python -m benchmarks.distillation --ranks 1 --rounds 5

A teacher's forward pass is a third of the FLOPs of a step, so that 1.33 is the floor where it computes all that its student does. All
losses take turns in one process, over the same student and the same teacher. Memory is the peak of resident bytes over three steps, of
each loss in processes of its own. Exit status 1 if a loss with a bound costs more than 1.5 times the step without a teacher.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.masks import alone
from benchmarks.measure import Ratio, interleave, table, write
from benchmarks.step import Size, assemble
from raysparse.data.batch import IGNORED, Batch
from raysparse.models.build import build
from raysparse.train.distill import Distillation, DistillationConfig
from raysparse.train.loop import forward_backward, update
from raysparse.train.objective import CrossEntropy, Objective
from raysparse.train.process import forget_peak_memory, peak_memory_bytes
from raysparse.train.state import Training

AT_MOST = 1.5
PLAIN = "no teacher"
LOSSES: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    "KL": {"logit": 1.0, "feature": 0.0},
    "SquareHead": {"logit": 0.0, "feature": 1.0},
    "SquareHead and KL": {"logit": 1.0, "feature": 1.0},
    "SquareHead, features not kept": {"logit": 0.0, "feature": 1.0, "keep_features": False},
}
UNBOUNDED = (PLAIN, "SquareHead, features not kept")
"""The latter goes through the teacher twice."""
STUDENTS = {"dense": 0.0, "75 %": 0.75}
MICRO_BATCHES, WARMUP = 2, 2


class Pairs:
    """Random pairs, made once: the last `answer` of a sequence is predicted, as in a task."""

    def __init__(self, size: Size, answer: float):
        ids = torch.randint(size.vocabulary, (64, size.tokens + 1), generator=torch.Generator().manual_seed(0))
        labels = ids[:, 1:].clone()
        labels[:, : size.tokens - round(answer * size.tokens)] = IGNORED
        self._batch = Batch(ids[:, :-1].contiguous(), labels)

    def batch(self, step: int, rows: Sequence[int]) -> Batch:
        return Batch(*(tensor[list(rows)] for tensor in (self._batch.input_ids, self._batch.labels)))


def student(folder: Path, size: Size, answer: float, sparsity: float, loss: Mapping[str, Any] | None) -> Training:
    """A student with this loss and, if it takes one, a dense teacher."""
    pairs = Pairs(size, answer)
    taught: dict[str, Any] = {} if loss is None else {"distillation": DistillationConfig.check({"teacher": "it"} | dict(loss))}
    if taught:
        taught["teacher"] = build(size.model, 1, size.vocabulary, size.tokens)
    place = folder / str(dist.get_rank())
    return assemble(place, size, sparsity, micro_batches=MICRO_BATCHES, feed=pairs, validation=pairs, **taught)


def times(folder: Path, size: Size, answer: float, sparsity: float, rounds: int) -> dict[str, Any]:
    """CPU and wall seconds of a step with each loss; every rank calls this."""
    t = student(folder, size, answer, sparsity, LOSSES["SquareHead and KL"])
    steps, walls = {}, {name: [] for name in LOSSES}
    for name, loss in LOSSES.items():
        steps[name] = partial(_step, replace(t, objective=_objective(t, loss)), walls[name])
    cpu = interleave(steps, rounds, WARMUP)
    return {"cpu_s": cpu, "wall_s": {name: values[WARMUP:] for name, values in walls.items()}}


def _objective(t: Training, loss: Mapping[str, Any] | None) -> Objective:
    """Of the same student and teacher with another loss."""
    whole = t.objective
    assert isinstance(whole, Distillation)
    if loss is None:
        return CrossEntropy(whole._forward, 0.0)
    config = DistillationConfig.check({"teacher": "it"} | dict(loss))
    return Distillation(config, whole._forward, whole._outputs, whole._teacher, 0.0)


def _step(t: Training, seconds: list[float], index: int) -> None:
    began = time.perf_counter()
    forward_backward(t, index)
    update(t, index)
    seconds.append(time.perf_counter() - began)


def peak(folder: Path, size: Size, answer: float, sparsity: float, name: str) -> int:
    """Bytes of the largest rank."""
    t = student(folder, size, answer, sparsity, LOSSES[name])
    forget_peak_memory()
    for index in range(3):
        _step(t, [], index)
    return int(t.all_max([peak_memory_bytes()])[0])


def measure(size: Size, answer: float, ranks: int, kind: str, rounds: int) -> dict[str, Any]:
    call: Callable[..., Any] = partial(alone, num_ranks=ranks)
    found = call(times, size, answer, STUDENTS[kind], rounds)
    peaks = {name: call(peak, size, answer, STUDENTS[kind], name) for name in LOSSES}
    return {"ranks": ranks, "student": kind, "peak_bytes": peaks} | found


def ratios(one: Mapping[str, Any]) -> dict[str, Ratio]:
    """Of CPU times over those without a teacher."""
    return {name: Ratio.of(values, one["cpu_s"][PLAIN]) for name, values in one["cpu_s"].items() if name != PLAIN}


def report(results: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for one in results:
        plain, steps, ratio = one["peak_bytes"][PLAIN], one["wall_s"], ratios(one)
        for name, peak_bytes in one["peak_bytes"].items():
            row = [f"{one['student']}, {one['ranks']} rank{'s' if one['ranks'] > 1 else ''}: {name}", f"{median(steps[name]):.2f}"]
            row += [str(ratio[name]) if name in ratio else "", "" if name in UNBOUNDED else f"{AT_MOST:.2f}"]
            row += [f"{(peak_bytes - plain) / 1e6:+,.0f}" if name != PLAIN else f"{plain / 1e6:,.0f}"]
            rows.append([*row, f"{peak_bytes / plain:.2f}"])
    columns = ["student: loss", "wall seconds a step", "CPU time over no teacher", "at most", "peak MB, more", "peak / no teacher"]
    return table(columns, rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.distillation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--tokens", type=int, default=256, help="of each of the 2 micro-batches of a rank")
    parser.add_argument("--answer", type=float, default=0.5, help="share of the tokens that is predicted")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="folder for distillation_<hardware>_<date>.{json,md}")
    args = parser.parse_args(argv)
    size, results = Size(args.layers, args.width, args.vocabulary, args.tokens), []
    for ranks in args.ranks:
        for kind in STUDENTS:
            results.append(measure(size, args.answer, ranks, kind, args.rounds))
            print(report(results[-1:]), flush=True)
    told = (
        f"{size.layers} layers of width {size.width}, vocabulary {size.vocabulary:,}, {MICRO_BATCHES} micro-batches of {size.tokens} "
        f"tokens a step and rank, {args.answer:.0%} of them predicted; {args.rounds} rounds.\n"
    )
    if args.out:
        print(write(args.out, "distillation", {"size": vars(size), "answer": args.answer, "results": results}, [told, report(results)]))
    worst = max(ratio.median for one in results for name, ratio in ratios(one).items() if name not in UNBOUNDED)
    return int(worst > AT_MOST)


if __name__ == "__main__":
    sys.exit(main())
