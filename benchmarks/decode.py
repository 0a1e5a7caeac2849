"""What packed weights gain in decoding: the 48 matrices of GPT-2 small's blocks, 85 M weights, that every token reads.

    python -m benchmarks.decode --threads 2 --out benchmarks/results      4 minutes
    python -m benchmarks.decode --quick                                   toy sizes, seconds; its numbers mean nothing

Contestants take turns: our dense kernel of each dtype, packed weights of several sparsities, and torch's linear on the same dense
weights. All lie in one buffer on huge pages. Times are wall-clock, with one thread CPU time. Goals are for one token and two threads:
the ratio of the bytes within 15 % of our dense kernel, and five times torch's linear. Exit status 1 if one is missed.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Ratio, interleave, table, write
from raysparse.kernels import decode, library
from raysparse.kernels.decode import Kind, Packed
from raysparse.models.packed import DTYPES, in_one_buffer

SHAPES = [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12
SPARSITIES = (0.5, 0.75, 0.9, 0.95)
GOALS = {"float32": 3.0, "bfloat16": 2.7, "int8": 2.3}
"""At 75 %, one token, two threads: so many times faster than our dense kernel of that dtype."""
TORCH_GOAL = 5.0
"""And than torch's linear, int8 than that of float32."""


@dataclass(frozen=True)
class Row:
    """A contestant.

    Attributes:
        seconds: median.
        bytes: of weights, read once.
        fewer_bytes: than the dense weights of the dtype, so many times: the limit where reading takes all the time.
        dense, torch: so many times faster than our dense kernel of the dtype, than torch's linear.
        goal, torch_goal: what the last two should be.
    """

    what: str
    seconds: float
    bytes: int
    fewer_bytes: float
    dense: Ratio
    torch: Ratio
    goal: float | None
    torch_goal: float | None

    @property
    def missed(self) -> bool:
        return (self.goal is not None and self.dense.median < self.goal) or (
            self.torch_goal is not None and self.torch.median < self.torch_goal
        )

    @property
    def cells(self) -> list[object]:
        goals = "" if self.goal is None else f"{self.goal:.1f}, {self.torch_goal:.0f}"
        return [
            *(self.what, f"{1000 * self.seconds:.2f}", f"{1e-9 * self.bytes / self.seconds:.1f}", f"{self.fewer_bytes:.2f}"),
            *(self.dense, self.torch, goals, "" if self.goal is None else "MISSED" if self.missed else "met"),
        ]


def weights(shapes: Sequence[tuple[int, int]], sparsity: float) -> list[Tensor]:
    return [torch.randn(shape) * (torch.rand(shape) >= sparsity) for shape in shapes]


def side_by_side(packed: Sequence[Packed]) -> list[Packed]:
    """The same in one buffer, in their order."""
    names = [field.name for field in fields(Packed) if field.name not in ("rows", "cols")]
    tensors = {f"{i} {name}": tensor for i, one in enumerate(packed) for name in names if (tensor := getattr(one, name)) is not None}
    placed = in_one_buffer(tensors)
    changes: list[dict[str, Any]] = [{name: placed.get(f"{i} {name}") for name in names} for i in range(len(packed))]
    return [replace(one, **change) for one, change in zip(packed, changes, strict=True)]


def contestants(shapes: Sequence[tuple[int, int]], dtype: str) -> dict[str, list[Packed]]:
    """Dense, and packed as `choose` says; of float32 also in the other way, to see whether it says the right thing."""
    kind = DTYPES[dtype]
    dense = side_by_side([decode.pack(weight, kind, "dense") for weight in weights(shapes, 0)])
    found = {"dense": dense}
    for sparsity in SPARSITIES:
        matrices = weights(shapes, sparsity)
        ways: list[Kind] = ["bits", "columns"] if dtype == "float32" and sparsity > 0.5 else ["bits"]
        for way in ways:
            found[f"{100 * sparsity:g} %, {way}"] = side_by_side([decode.pack(weight, kind, way) for weight in matrices])
    return found


def product(packed: Sequence[Packed], inputs: Mapping[int, Tensor]) -> Callable[[int], None]:
    def run(_: int) -> None:
        for weight in packed:
            decode.linear(weight, inputs[weight.cols])

    return run


def by_torch(packed: Sequence[Packed], inputs: Mapping[int, Tensor]) -> Callable[[int], None]:
    matrices = [weight.values if weight.scale is None else decode.unpack(weight) for weight in packed]

    def run(_: int) -> None:
        for matrix in matrices:
            F.linear(inputs[matrix.shape[1]], matrix)

    return run


def measure(shapes: Sequence[tuple[int, int]], dtype: str, tokens: Sequence[int], rounds: int) -> list[Row]:
    threads, rows = torch.get_num_threads(), []
    packed = contestants(shapes, dtype)
    sizes = {name: sum(weight.nbytes for weight in matrices) for name, matrices in packed.items()}
    for many in tokens:
        inputs = {cols: torch.randn(many, cols).to(packed["dense"][0].dtype) for _, cols in shapes}
        runs = {name: product(matrices, inputs) for name, matrices in packed.items()}
        runs["torch"] = by_torch(packed["dense"], inputs)
        times = interleave(runs, rounds, clock=time.process_time if threads == 1 else time.perf_counter)
        sizes["torch"] = sum(rows * cols for rows, cols in shapes) * packed["dense"][0].dtype.itemsize
        for name, seconds in times.items():
            goal = GOALS[dtype] if (many, threads, name) == (1, 2, "75 %, bits") else None
            rows.append(
                Row(
                    f"{many} {'token' if many == 1 else 'tokens'}, {dtype}, {name}",
                    *(median(seconds), sizes[name], sizes["dense"] / sizes[name]),
                    *(Ratio.of(times["dense"], seconds), Ratio.of(times["torch"], seconds)),
                    *(goal, TORCH_GOAL if goal else None),
                )
            )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 8], help="multiplied together")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtypes", choices=list(DTYPES), nargs="+", default=list(DTYPES))
    parser.add_argument("--quick", action="store_true", help="toy sizes: does it run?")
    parser.add_argument("--out", type=Path, help="folder for decode_<hardware>_<date>.{json,md}")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shapes = [(24, 16), (16, 64)] if args.quick else SHAPES
    rows: list[Row] = []
    columns = ["", "ms", "GB/s", "fewer bytes", "times faster than our dense kernel", "than torch", "goals", ""]
    tables = [f"{args.threads} threads, native library {library.variant()}, {sum(r * c for r, c in shapes):,} weights.\n"]
    for dtype in args.dtypes:
        rows += (found := measure(shapes, dtype, args.tokens, args.rounds))
        tables.append(f"## {dtype}\n\n" + table(columns, [row.cells for row in found]))
        print(tables[-1], flush=True)
    if args.out:
        name = "decode-quick" if args.quick else f"decode-{args.threads}-threads"
        print(write(args.out, name, {"native": library.variant(), "threads": args.threads, "rows": rows}, tables))
    return int(any(row.missed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
