"""What this machine runs sparse layers on: which kernels, why not better ones, whether they are right, and how fast they are."""

import ctypes
import importlib.metadata
import os
import platform
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

import raysparse
from raysparse.kernels import choice, library
from raysparse.kernels.bits import pack
from raysparse.kernels.linear import SPARSE, adopt

SIZE, TOKENS, SPARSITY = 768, 256, 0.75
"""Of the layer of the self-test: [SIZE, SIZE]."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Of the largest number of a result: how far sparse and dense may lie apart, as float32 sums in another order and rounding do."""


def examine() -> dict[str, Any]:
    """The facts, in about a second; ``well`` is whether sparse kernels run here and are right."""
    why_not = library.why_not()
    facts: dict[str, Any] = {
        "versions": {"raysparse": raysparse.__version__, "python": platform.python_version()} | {p: _version(p) for p in _PACKAGES},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "why_not": why_not,
        "builds": builds(),
        "openmp": [file.name for file in library.openmp()],
        "tests": {},
    }
    if why_not is None:
        facts["tests"] = {str(dtype).removeprefix("torch."): _test(dtype) for dtype in TOLERANCE}
    facts["well"] = why_not is None and all(test["right"] for test in facts["tests"].values())
    return facts


def builds() -> dict[str, str]:
    """Of each build of the native library: that it is in use, or why it is not."""
    if (why_not := library.why_not()) is not None:
        return dict.fromkeys(library.VARIANTS, why_not)
    used, best = library.variant(), library.function("rs_best_variant", ctypes.c_char_p)().decode()

    def state(name: str) -> str:
        if name == used:
            return "in use"
        if library.VARIANTS.index(name) < library.VARIANTS.index(best):
            return "not for this CPU"
        if not library.path(name).exists():
            return "not built"
        return f"not asked for: {library.CHOICE}={used}" if os.environ.get(library.CHOICE) else f"slower than {used}"

    return {name: state(name) for name in library.VARIANTS}


def show(facts: dict[str, Any]) -> str:
    """The facts in plain lines, the verdict last."""
    openmp = facts["openmp"]
    lines = [
        ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        f"GPU           {facts['gpu'] or 'none'}",
        f"threads       {facts['threads']} on {facts['cores']} cores; a run takes run.threads",
    ]
    if facts["why_not"] is None:
        lines += [f"kernels       {name:<9} {state}" for name, state in facts["builds"].items()]
        shared = f"{openmp[0]}, shared with torch"
        lines.append(f"OpenMP        {shared if len(openmp) == 1 else f'{shared}; also loaded here: ' + ', '.join(openmp[1:])}")
        lines += [f"self-test     {dtype:<9} {_outcome(test)}" for dtype, test in facts["tests"].items()]
        what = f"{SIZE}x{SIZE}, {100 * SPARSITY:.0f} % zeros, {TOKENS} tokens, dense time over sparse time"
        lines.append(f"speed         {what}, {facts['threads']} threads:")
        lines += [f"              {dtype:<9} {_gains(test)}" for dtype, test in facts["tests"].items()]
    return "\n".join([*lines, _verdict(facts)])


_PACKAGES = ("torch", "ray", "transformers")


def _version(name: str) -> str:
    """As installed, without importing it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _test(dtype: torch.dtype) -> dict[str, Any]:
    """A sparse layer against its dense twin, and its gains."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(SIZE, SIZE, generator=generator) >= SPARSITY
    weight, x, dy = (torch.randn(shape, generator=generator) for shape in ((SIZE, SIZE), (TOKENS, SIZE), (TOKENS, SIZE)))
    weight, x, dy = (weight * mask).to(dtype), x.to(dtype), dy.to(dtype)
    layer = adopt(torch.nn.Linear(SIZE, SIZE, bias=False, dtype=dtype))
    layer.weight.data = weight
    results: list[tuple[Tensor, ...]] = []
    for sparse in (False, True):
        if sparse:
            layer.sparsify(pack(mask), dtype, SPARSE)
        y = layer(x.requires_grad_())
        dx, dw = torch.autograd.grad(y, (x, layer.weight), dy)
        results.append((y.detach(), dx, dw if sparse else dw * mask))
    error = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*results, strict=True))
    gains = choice.measure(pack(mask), SIZE, dtype, TOKENS)
    return {"right": error <= TOLERANCE[dtype], "error": error, "gains": asdict(gains)}


def _outcome(test: dict[str, Any]) -> str:
    words = "sparse equals dense" if test["right"] else "WRONG: sparse is not dense"
    return f"{words} (largest error {test['error']:.1e} of the largest number)"


def _gains(test: dict[str, Any]) -> str:
    names = {"forward": "forward", "backward": "input gradient", "gradient": "weight gradient"}
    return ", ".join(f"{words} {test['gains'][name]:.1f}x" for name, words in names.items())


def _verdict(facts: dict[str, Any]) -> str:
    if facts["why_not"] is not None:
        return f"Sparse layers are computed dense here, zeros included. There is no native library: {facts['why_not']}.\n{library.remedy()}"
    if not facts["well"]:
        return f"The kernels of this build are wrong here: run with kernels=dense or {library.CHOICE}=baseline, and report this."
    return "Sparse layers skip their zeros on this machine's CPU." + (" On its GPU they are computed dense." if facts["gpu"] else "")
