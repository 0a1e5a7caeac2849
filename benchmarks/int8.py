"""What int8 costs and gains on this CPU: the 12 x 4 matrices of GPT-2 small's blocks, and training steps through four of them.

    python -m benchmarks.int8 --threads 1 --out benchmarks/results      3 minutes
    python -m benchmarks.int8 --quick                                   toy sizes, seconds; its numbers mean nothing

Contestants take turns; times are CPU time with one thread, and wall-clock with more. torchao runs as
`raysparse evaluate weights=int8` has it, not compiled.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Ratio, interleave, table, write
from raysparse.kernels import decode, library
from raysparse.models.int8 import KINDS, Quantization, make_aware, quantize

SHAPES = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
BLOCKS = 12
SPARSITY = 0.75


def model(blocks: int, shapes: Sequence[tuple[int, int]]) -> nn.Module:
    """Blocks of linear layers, `SPARSITY` of their weights 0 at random."""
    torch.manual_seed(0)
    made = nn.ModuleList(nn.ModuleList(nn.Linear(cols, rows) for rows, cols in shapes) for _ in range(blocks))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.masked_fill_(torch.rand_like(parameter) < SPARSITY, 0.0)
    return nn.ModuleDict({"h": made})


def layers_of(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def applied(layers: Sequence[Callable[[Tensor], Tensor]], inputs: Sequence[Tensor]) -> Callable[[int], None]:
    def run(_: int) -> None:
        with torch.inference_mode():
            for layer, x in zip(layers, inputs, strict=True):
                layer(x)

    return run


def stepped(layers: Sequence[nn.Module], inputs: Sequence[Tensor]) -> Callable[[int], None]:
    def run(_: int) -> None:
        for layer, x in zip(layers, inputs, strict=True):
            layer(x).sum().backward()

    return run


def scoring(blocks: int, shapes: Sequence[tuple[int, int]], tokens: int) -> dict[str, Callable[[int], None]]:
    inputs = [torch.randn(tokens, cols) for _ in range(blocks) for _, cols in shapes]

    runs = {"torch, float32": applied(layers_of(model(blocks, shapes)), inputs)}
    for kind in KINDS:
        quantize(made := model(blocks, shapes), kind)
        runs[f"torchao, {kind}"] = applied(layers_of(made), inputs)
    if library.available():
        layers = layers_of(model(blocks, shapes))
        packed = [(decode.pack(layer.weight.detach(), torch.int8, "bits"), layer.bias.detach()) for layer in layers]
        runs["packed, int8"] = applied([lambda x, w=w, b=b: decode.linear(w, x, b) for w, b in packed], inputs)
    return runs


def training(shapes: Sequence[tuple[int, int]], tokens: int) -> dict[str, Callable[[int], None]]:
    kinds: tuple[Quantization, ...] = ("none", *KINDS)
    inputs, runs = [torch.randn(tokens, cols, requires_grad=True) for _, cols in shapes], {}
    for kind in kinds:
        make_aware(made := model(1, shapes), kind)
        runs[f"quantization={kind}"] = stepped(layers_of(made), inputs)
    return runs


def rows(times: dict[str, list[float]], first: str) -> list[tuple[str, str, str]]:
    return [(name, f"{1e3 * median(seconds):.2f}", str(Ratio.of(times[first], seconds))) for name, seconds in times.items()]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.int8", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 512], help="multiplied together")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="toy sizes: does it run?")
    parser.add_argument("--out", type=Path, help="folder for int8_<hardware>_<date>.{json,md}")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    blocks, shapes = (1, [(24, 16), (16, 64)]) if args.quick else (BLOCKS, SHAPES)
    facts: dict[str, Any] = {"threads": args.threads, "sparsity": SPARSITY}
    tables = [f"{args.threads} threads, {SPARSITY:.0%} sparse.\n"]
    for tokens in args.tokens:
        times = interleave(scoring(blocks, shapes, tokens), args.rounds, clock=clock)
        facts[f"{tokens} tokens"] = times
        found = rows(times, "torch, float32")
        tables.append(f"## {tokens} tokens\n\n" + table(["", "ms", "times faster than torch"], found))
        print(tables[-1], flush=True)
    times = interleave(training(shapes, args.tokens[-1]), args.rounds, clock=clock)
    facts["training"] = times
    tables.append(f"## Forward and backward, {args.tokens[-1]} tokens\n\n" + table(["", "ms", "speed"], rows(times, "quantization=none")))
    print(tables[-1], flush=True)
    if args.out:
        print(write(args.out, "int8-quick" if args.quick else "int8", facts, tables))
    return 0


if __name__ == "__main__":
    sys.exit(main())
