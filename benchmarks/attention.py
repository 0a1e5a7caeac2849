"""What attention to some of the keys saves in training on a CPU: forward, and forward with backward, over full causal attention.

    python -m benchmarks.attention --out benchmarks/results       about 3 minutes
    python -m benchmarks.attention --quick                        toy sizes, seconds; its numbers mean nothing

One thread, one row, the sizes of GPT-2 small. Full attention is torch's `scaled_dot_product_attention`, for which a pattern can only be a
mask. Contestants take turns in one process and are compared round by round in CPU time. Exit status 1 if a bound is missed.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Ratio, interleave, table, write
from raysparse.kernels import library
from raysparse.kernels.attention import attention
from raysparse.sparsity.attention import AnyAttention, ByHead, Fixed, Full, Local, LocalOrStrided, Strided

AT_LEAST = {("fixed", torch.float32, 2048): 2.2, ("fixed", torch.float32, 1024): 1.5}
"""Bounds of forward with backward: how many times faster than full attention, by pattern, dtype and length."""
FULL, MASKED, TORCH = "full", "full, masked", "plain torch"
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""Query, key, value, and the gradient of the output: [1, heads, length, width], as a fused projection leaves them."""


@dataclass(frozen=True)
class Size:
    heads: int
    width: int
    lengths: tuple[int, ...]
    near: int
    """Width and stride of the patterns."""

    def patterns(self, length: int) -> dict[str, AnyAttention]:
        """By name; the last leave out little of the row, nothing in every other head, nothing at all."""
        near = self.near
        return {
            "fixed": Fixed(width=near),
            "local": Local(width=near),
            "strided": Strided(stride=near),
            "local_or_strided": LocalOrStrided(width=near, stride=near),
            f"local_or_strided, every {near // 16}th": LocalOrStrided(width=near, stride=near // 16),
            "local, 15/16 of the row": Local(width=length * 15 // 16),
            "by_head: full, local_or_strided": ByHead(heads=(Full(), LocalOrStrided(width=near, stride=near))),
            "every key": Full(),
        }


@dataclass(frozen=True)
class Way:
    """A contestant.

    Attributes:
        attend: query, key and value to the output.
        library: whether it may use the native library.
    """

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    library: bool = True

    @torch.no_grad()
    def forward(self, inputs: Inputs) -> Tensor:
        with self._library():
            return self.attend(*inputs[:3])

    def backward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Forward too."""
        with self._library():
            return torch.autograd.grad(self.attend(*inputs[:3]), inputs[:3], inputs[3])

    def _library(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.library else patch.object(library, "available", lambda: False)


GPT2_SMALL, TOY = Size(12, 64, (1024, 2048), 128), Size(2, 8, (160,), 16)


def measure(size: Size, dtype: torch.dtype, length: int, rounds: int) -> dict[str, Any]:
    """Seconds of every contestant, ratios over full attention, and how far outputs are from masked attention's."""
    inputs, patterns = _inputs(size, dtype, length), size.patterns(length)
    by_head = {name: [pattern.of(0, head) for head in range(size.heads)] for name, pattern in patterns.items()}
    at = torch.arange(length)
    masks = {name: torch.stack([pattern.allows(at[:, None], at) for pattern in heads]) for name, heads in by_head.items()}
    ways = {
        FULL: Way(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
        MASKED: Way(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=masks["fixed"][:1])),
    }
    difference = {}
    for name, heads in by_head.items():
        rules = torch.tensor([pattern.rule for pattern in heads])
        ways[name] = Way(lambda q, k, v, rules=rules: attention(q, k, v, rules, size.width**-0.5)[0])
        ways[f"{name}, {TORCH}"] = Way(ways[name].attend, library=False)
        with torch.no_grad():
            expected = F.scaled_dot_product_attention(*inputs[:3], attn_mask=masks[name])
        found = [ways[way].forward(inputs) for way in (name, f"{name}, {TORCH}")]
        difference[name] = max(float((mine - expected).abs().max()) for mine in found)
    seconds = {
        "forward": interleave({name: _turn(way.forward, inputs) for name, way in ways.items()}, rounds),
        "forward, backward": interleave({name: _turn(way.backward, inputs) for name, way in ways.items()}, rounds),
    }
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "length": length,
        "size": asdict(size),
        "density": {name: mean(pattern.density(length) for pattern in heads) for name, heads in by_head.items()},
        "largest_difference": difference,
        "cpu_seconds": seconds,
        "ratios": [
            {
                "what": what,
                "contestant": name,
                "ratio": Ratio.of(times[FULL], times[name]),
                "at_least": AT_LEAST.get((name, dtype, length)) if "backward" in what else None,
            }
            for name in ways
            if name != FULL
            for what, times in seconds.items()
        ],
    }


def missed(row: Mapping[str, Any]) -> bool:
    return row["at_least"] is not None and row["ratio"].median < row["at_least"]


def report(facts: Mapping[str, Any]) -> str:
    rows = [
        [
            row["contestant"],
            row["what"],
            f"{1000 * median(facts['cpu_seconds'][row['what']][row['contestant']]):.1f}",
            row["ratio"],
            f"{row['ratio'].smallest:.2f} - {row['ratio'].largest:.2f}",
            *(("", "") if row["at_least"] is None else (row["at_least"], "MISSED" if missed(row) else "met")),
        ]
        for row in facts["ratios"]
    ]
    full = ", ".join(f"{what} {1000 * median(times[FULL]):.1f} ms" for what, times in facts["cpu_seconds"].items())
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in facts["density"].items())
    return (
        f"## {facts['dtype']}, {facts['length']:,} tokens\n\n"
        f"{facts['size']['heads']} heads of {facts['size']['width']}; {facts['native']}. Full attention: {full}.\n"
        f"Of its scores are seen: {shares}.\n\n"
        + table(["", "", "CPU ms", "times faster than full [95 %]", "all rounds", "at least", ""], rows)
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy sizes: does it run?")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, help="folder for attention_<hardware>_<date>.{json,md}")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    size, reason = TOY if args.quick else GPT2_SMALL, library.why_not()
    native = f"native library: {library.variant() if reason is None else f'none, {reason}'}"
    cases = [(dtype, length) for dtype in (torch.float32, torch.bfloat16) for length in size.lengths]
    results = [measure(size, dtype, length, args.rounds) | {"native": native} for dtype, length in cases]
    tables = [report(facts) for facts in results]
    print("\n".join(tables))
    if args.out:
        print(write(args.out, "attention-quick" if args.quick else "attention", {"results": results}, tables))
    return int(any(missed(row) for facts in results for row in facts["ratios"]))


def _inputs(size: Size, dtype: torch.dtype, length: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, length, size.heads, size.width, generator=generator).to(dtype).transpose(1, 2) for _ in range(4)]
    return made[0].requires_grad_(), made[1].requires_grad_(), made[2].requires_grad_(), made[3]


def _turn(run: Callable[[Inputs], Any], inputs: Inputs) -> Callable[[int], None]:
    def turn(_: int) -> None:
        run(inputs)

    return turn


if __name__ == "__main__":
    sys.exit(main())
