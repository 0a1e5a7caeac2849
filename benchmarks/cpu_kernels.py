"""What the CPU kernels gain: one linear layer, one GPT-2-small block, and the sparse products that users could have instead.

    python -m benchmarks.cpu_kernels                          all of it, 10 minutes
    python -m benchmarks.cpu_kernels --only linear --rounds 21

Times are CPU times of one thread, contestants interleaved, ratios to torch's dense product of the same dtype; the rows with two
threads are wall-clock. A layer is timed in three manners. "products": the three matrix products, each alone with warm caches and its
result in new memory (the gradient of the weight is a whole matrix, zeros included), and their times added. "held": the layer as
training uses it, with autograd and the gradient of the bias, among cold caches; its live values are read once, as between two optimizer
steps with several micro-batches. "step": the same, but they are read out of the dense weight in every pass. Goals are checked against
"products" for the layer and against "step" for the block. Exit status 1 if one is missed.
"""

import argparse
import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Ratio, interleave, table, write
from raysparse.kernels import library
from raysparse.kernels.bits import pack
from raysparse.kernels.linear import SPARSE, SparseLinear, adopt
from raysparse.kernels.stream import Stream, Use
from raysparse.models.attention import HybridAttention
from raysparse.models.build import ModelConfig, build, select
from raysparse.sparsity.attention import Fixed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LINEAR = {  # dtype -> sparsity -> at least so many times faster than dense: forward + both gradients
    "float32": {0.5: 1.7, 0.75: 3.2, 0.9: 6.8, 0.95: 11.0},
    "bfloat16": {0.5: 1.25, 0.75: 2.4, 0.9: 5.1, 0.95: 9.0},
}
BLOCK = {  # (sequences, length, hybrid attention) -> sparsity -> at least
    (1, 1024, False): {0.75: 2.0, 0.9: 2.8},
    (4, 256, False): {0.75: 2.3, 0.9: 3.7},
    (1, 1024, True): {0.75: 2.3, 0.9: 4.0},
}
BREAK_EVEN = (0.1, 0.25, 0.4)
"""Sparsities without a goal."""
REBUILT = 0.005
"""Seconds in which a stream of 768 x 3072 weights is built from the bits of a mask."""
OURS = "raysparse"
PRODUCTS = ("forward", "dX", "dW")
THREADS_KEEP = 0.9
"""Share of the one-thread ratio that two threads must keep."""


@dataclass(frozen=True)
class Row:
    """One line of a table: what, how many times faster than dense, and the goal."""

    what: str
    ratio: Ratio
    goal: float | None = None

    @property
    def missed(self) -> bool:
        return self.goal is not None and self.ratio.median < self.goal

    @property
    def cells(self) -> list[object]:
        return [
            self.what,
            self.ratio,
            "" if self.goal is None else f"{self.goal:.2f}",
            "" if self.goal is None else "MISSED" if self.missed else "met",
        ]


def mask_of(shape: tuple[int, int], sparsity: float, grain: tuple[int, int] = (1, 1)) -> Tensor:
    """A random mask whose blocks of `grain` live and die together."""
    rows, cols = grain
    units = torch.rand(shape[0] // rows, shape[1] // cols) >= sparsity
    return units.repeat_interleave(rows, 0).repeat_interleave(cols, 1)


def sparse_linear(out: int, cols: int, mask: Tensor, dtype: torch.dtype, held: bool) -> SparseLinear:
    layer = adopt(nn.Linear(cols, out, dtype=dtype))
    with torch.no_grad():
        layer.weight.mul_(mask)
    layer.held = held
    layer.sparsify(pack(mask), dtype, SPARSE)
    return layer


def passes(module: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, parameters: Sequence[nn.Parameter]) -> Callable[[int], None]:
    """Forward and backward, gradients made anew."""

    def run(_: int) -> None:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        module(x).backward(dy)

    return run


def products(x: Tensor, dy: Tensor, layer: nn.Linear) -> dict[str, Callable[[int], Tensor]]:
    """Torch's products, or the streams of a held layer."""
    x, weight, bias = x.detach(), layer.weight.detach(), layer.bias.detach()
    if not isinstance(layer, SparseLinear):
        return {"forward": lambda _: F.linear(x, weight, bias), "dX": lambda _: dy @ weight, "dW": lambda _: dy.t() @ x}
    forward, backward, gradient = (layer.stream(use, weight if use is not Use.GRADIENT else None) for use in Use)
    return {
        "forward": lambda _: forward.multiply(x, bias),
        "dX": lambda _: backward.multiply(dy),
        "dW": lambda _: gradient.gradient(x, dy),
    }


def linear_ratios(
    shape: tuple[int, int, int], dtype: torch.dtype, masks: dict[str, Tensor], rounds: int, clock=time.process_time
) -> dict[str, Ratio]:
    """Dense time over the layer's for every mask in every manner, and of every product; `shape`: outputs, inputs, tokens."""
    out, cols, tokens = shape
    x, dy = torch.randn(tokens, cols, dtype=dtype, requires_grad=True), torch.randn(tokens, out, dtype=dtype)
    dense = nn.Linear(cols, out, dtype=dtype)
    layers = {"dense": passes(dense, x, dy, list(dense.parameters()))}
    alone: dict[str, Callable[[int], Any]] = {f"dense, {product}": run for product, run in products(x, dy, dense).items()}
    for name, mask in masks.items():
        held, step = (sparse_linear(out, cols, mask, dtype, held) for held in (True, False))
        alone |= {f"{name}, {product}": run for product, run in products(x, dy, held).items()}
        layers |= {
            f"{name}, {manner}": passes(layer, x, dy, list(layer.parameters())) for manner, layer in (("held", held), ("step", step))
        }
    times = interleave(alone, rounds, clock=clock, warm=True)
    for name in ("dense", *masks):
        times[f"{name}, products"] = [sum(parts) for parts in zip(*(times[f"{name}, {product}"] for product in PRODUCTS), strict=True)]
    ratios = {
        f"{name}, {part}": Ratio.of(times[f"dense, {part}"], times[f"{name}, {part}"]) for name in masks for part in (*PRODUCTS, "products")
    }
    times = interleave(layers, rounds, clock=clock)
    return ratios | {name: Ratio.of(times["dense"], seconds) for name, seconds in times.items() if name != "dense"}


def linear(rounds: int, tokens: int = 512) -> list[Row]:
    """Forward + both gradients of a layer, one thread."""
    rows = []
    for out, cols in ((3072, 768), (768, 3072)):
        for name, dtype in DTYPES.items():
            masks = {f"{100 * sparsity:g} %": mask_of((out, cols), sparsity) for sparsity in (*BREAK_EVEN, *LINEAR[name])}
            masks |= {f"75 % in blocks {r}x{c}": mask_of((out, cols), 0.75, (r, c)) for r, c in ((4, 4), (4, 2))}
            goals = {f"{100 * sparsity:g} %": goal for sparsity, goal in LINEAR[name].items()} if out == 3072 else {}
            ratios = linear_ratios((out, cols, tokens), dtype, masks, rounds)
            for mask in masks:
                parts = ", ".join(f"{product} {ratios[f'{mask}, {product}'].median:.1f}" for product in PRODUCTS)
                what = f"{cols} -> {out}, {tokens} tokens, {name}, {mask}"
                rows.append(Row(f"{what}, products ({parts})", ratios[f"{mask}, products"], goals.get(mask)))
                rows += [Row(f"{what}, {manner}", ratios[f"{mask}, {manner}"]) for manner in ("held", "step")]
    return rows


def two_threads(rounds: int) -> list[Row]:
    """Wall-clock with two threads over wall-clock with one: the ratio of the ratios."""
    rows = []
    for name, dtype in DTYPES.items():
        masks = {f"{100 * sparsity:g} %": mask_of((3072, 768), sparsity) for sparsity in LINEAR[name]}
        ratios: dict[int, dict[str, Ratio]] = {}
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ratios[threads] = linear_ratios((3072, 768, 2048), dtype, masks, rounds, time.perf_counter)
        torch.set_num_threads(1)
        for mask in masks:
            for manner in ("products", "held"):
                one, two = (ratios[threads][f"{mask}, {manner}"] for threads in (1, 2))
                kept = Ratio(*(value / one.median for value in vars(two).values()))
                what = f"{name}, {mask}, {manner}: {two.median:.2f}x with two threads, {one.median:.2f}x with one"
                rows.append(Row(what, kept, THREADS_KEEP if manner == "products" else None))
    return rows


def block(rounds: int) -> list[Row]:
    """Forward and backward through a GPT-2-small block (a model of one layer with hardly a vocabulary)."""
    rows = []
    for name, dtype in DTYPES.items():
        for (sequences, length, hybrid), goals in BLOCK.items():
            ids = torch.randint(64, (sequences, length))
            runs = {"dense": model_passes(ids, 0.0, False, dtype)}
            for sparsity in goals:
                runs[f"{100 * sparsity:g} %"] = model_passes(ids, sparsity, hybrid, dtype)
            times = interleave(runs, rounds)
            attention = ", fixed attention of width 128" if hybrid else ""
            for sparsity, goal in goals.items():
                key = f"{100 * sparsity:g} %"
                what = f"{sequences} x {length} tokens, {name}, {key}{attention}"
                rows.append(Row(what, Ratio.of(times["dense"], times[key]), goal if name == "float32" else None))
    return rows


def model_passes(ids: Tensor, sparsity: float, hybrid: bool, dtype: torch.dtype) -> Callable[[int], None]:
    model = build(ModelConfig(preset="gpt2-small", overrides={"n_layer": 1}), 0, 64, ids.shape[1])
    if hybrid:
        HybridAttention.install(model, "cpu").set(Fixed(width=128))
    torch.nn.Module.to(model, dtype)
    if sparsity:
        for name in select(model):
            module = model.get_submodule(name.removesuffix(".weight"))
            assert isinstance(module, nn.Linear)
            mask = mask_of((module.out_features, module.in_features), sparsity)
            with torch.no_grad():
                module.weight.mul_(mask)
            adopt(module).sparsify(pack(mask), dtype, SPARSE)

    def run(_: int) -> None:
        model.zero_grad()
        logits = model(input_ids=ids).logits
        F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()).backward()

    return run


def rivals(rounds: int, tokens: int = 512) -> list[Row]:
    """What else multiplies by a sparse matrix here, float32, its time over ours: layers forward and backward, matrices forward alone."""
    rows = []
    for sparsity in LINEAR["float32"]:
        layer = sparse_linear(3072, 768, mask_of((3072, 768), sparsity), torch.float32, held=False)
        x, dy = torch.randn(tokens, 768, requires_grad=True), torch.randn(tokens, 3072)
        layers = {OURS: layer, "torch dense": nn.Linear(768, 3072), **installed_layers(layer, sparsity)}
        runs = {name: passes(module, x, dy, list(module.parameters())) for name, module in layers.items()}
        weight, given = layer.weight.detach(), x.detach()
        products = {OURS: torch.no_grad()(lambda _, layer=layer, x=given: layer(x)), **csr_products(weight, given)}
        for what, contestants in (("forward and backward", runs), ("forward", products)):
            times = interleave(contestants, rounds)
            rows += [
                Row(f"{100 * sparsity:g} %, {name}, {what}", Ratio.of(times[name], times[OURS]), 1.0)
                for name in contestants
                if name != OURS
            ]
    return rows


def installed_layers(layer: SparseLinear, sparsity: float) -> dict[str, nn.Module]:
    """Sparse layers of other packages, of those that are installed."""
    found: dict[str, nn.Module] = {}
    with contextlib.suppress(ImportError):
        from sparseprop.modules import SparseLinear as SparsePropLinear  # pyrefly: ignore[missing-import]

        found["SparseProp"] = SparsePropLinear(dense_weight=layer.weight.detach().clone(), bias=nn.Parameter(layer.bias.detach().clone()))
    with contextlib.suppress(ImportError):
        from sparselab import SparseLinear as SparseLabLinear  # pyrefly: ignore[missing-import]

        found["SparseLab"] = SparseLabLinear(layer.in_features, layer.out_features, sparsity=sparsity)
    return found


def csr_products(weight: Tensor, x: Tensor) -> dict[str, Callable[[int], Any]]:
    """CSR times the activations, which are given transposed, as it wants them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        csr, turned = weight.to_sparse_csr(), x.t().contiguous()
    found: dict[str, Callable[[int], Any]] = {"torch CSR": lambda _: csr @ turned}
    with contextlib.suppress(ImportError):
        from scipy.sparse import csr_matrix  # pyrefly: ignore[missing-import]

        matrix, array = csr_matrix(weight.numpy()), turned.numpy()
        found["scipy CSR"] = lambda _: matrix @ array
    return found


def streams(rounds: int) -> list[Row]:
    """What a layer builds anew when its topology changes, against the time that is allowed."""
    rows = []
    for sparsity in LINEAR["float32"]:
        bits = pack(mask_of((3072, 768), sparsity))
        for use in Use:
            times = interleave({"build": lambda _, bits=bits, use=use: Stream(bits, 768, torch.float32, use)}, rounds)["build"]
            what = f"{100 * sparsity:g} %, {use.name.lower()}: {1000 * median(times):.2f} ms"
            rows.append(Row(what, Ratio.of([REBUILT] * len(times), times), 1.0))
    return rows


TABLES = {
    "linear": (linear, "One layer: forward, gradient of the input, gradient of the weight; one thread"),
    "threads": (two_threads, "Two threads: share of the one-thread ratio that is kept (768 -> 3072, 2,048 tokens, wall-clock)"),
    "streams": (streams, f"Building a stream of a 768 -> 3072 layer from its mask ({1000 * REBUILT:g} ms over its time)"),
    "block": (block, "A GPT-2-small block, forward and backward; one thread"),
    "rivals": (rivals, "Other sparse layers and products (768 -> 3072, 512 tokens, float32; their time over ours)"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.cpu_kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", choices=list(TABLES), nargs="+", default=list(TABLES), help="tables to make")
    parser.add_argument("--out", type=Path, help="folder for cpu_kernels_<hardware>_<date>.{json,md}")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"native library: {library.variant()}", flush=True)
    results, tables = {}, []
    for name in args.only:
        make, title = TABLES[name]
        results[name] = make(args.rounds)
        tables.append(f"## {title}\n\n" + table(["", "times faster, median [95 %]", "goal", ""], [row.cells for row in results[name]]))
        print(tables[-1], flush=True)
    if args.out:
        name = "-".join(["cpu_kernels", *([] if args.only == list(TABLES) else args.only)])
        print(write(args.out, name, {"native": library.variant(), "tables": results}, tables))
    return int(any(row.missed for rows in results.values() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
