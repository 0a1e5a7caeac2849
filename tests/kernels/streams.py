"""Drawn sparse products, and what they must be: by definition, in float64, with a bound on the rounding."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from raysparse.kernels.bits import pack
from raysparse.kernels.stream import Stream, Use


@dataclass(frozen=True)
class Case:
    """A weight's shape, its mask and the activations it meets.

    Attributes:
        grain: rows and columns of the mask's square blocks.
        wild: NaNs and infinities among the activations.
        garbage: bits past the last column are set.
    """

    rows: int
    cols: int
    tokens: int
    density: float = 0.25
    grain: int = 1
    dtype: torch.dtype = torch.float32
    bias: bool = False
    wild: bool = False
    garbage: bool = False
    seed: int = 0


def draw(rng: random.Random) -> Case:
    """Small sizes, those beside the kernels' tiles and panels, and now and then a larger one."""
    sizes = [0, 1, 2, 3, 5, 7, 8, 13, 16, 31, 63, 64, 65, 67, 127, 128, 130, 191, 193, 256, 257, 383, 385, 521]
    tokens = [0, 1, 2, 15, 31, 32, 33, 63, 64, 65, 127, 129, 257, 300]
    wild, grain = rng.random() < 0.2, rng.choice([1, 1, 2, 4])
    few = 14 if wild else len(sizes)  # by definition means a product per weight and token
    rows, cols = (grain * -(-rng.choice(sizes[:few]) // grain) for _ in range(2))
    return Case(
        rows=rows + (rng.random() < 0.2),
        cols=cols + (rng.random() < 0.2),
        tokens=rng.choice(tokens[: 11 if wild else len(tokens)]),
        density=rng.choice([0.0, 0.02, 0.1, 0.19, 0.25, 0.5, 0.9, 1.0, rng.random()]),
        grain=grain,
        dtype=rng.choice([torch.float32, torch.bfloat16]),
        bias=rng.random() < 0.5,
        wild=wild,
        garbage=rng.random() < 0.5,
        seed=rng.getrandbits(32),
    )


def mask_of(case: Case) -> Tensor:
    """[rows, cols] bool."""
    g = torch.Generator().manual_seed(case.seed)
    blocks = torch.rand(-(-case.rows // case.grain), -(-case.cols // case.grain), generator=g) < case.density
    return blocks.repeat_interleave(case.grain, 0).repeat_interleave(case.grain, 1)[: case.rows, : case.cols]


def bits_of(mask: Tensor, garbage: bool = False) -> Tensor:
    bits = pack(mask)
    if garbage and mask.shape[1] % 8:
        bits[:, -1] |= (0xFF << mask.shape[1] % 8) & 0xFF
    return bits


def tensors(case: Case) -> dict[str, Tensor]:
    """weight [rows, cols] with garbage at dead weights, x [tokens, cols], dy [tokens, rows], bias [rows]."""
    g = torch.Generator().manual_seed(case.seed + 1)
    shapes = {"weight": (case.rows, case.cols), "x": (case.tokens, case.cols), "dy": (case.tokens, case.rows), "bias": (case.rows,)}
    found = {name: torch.randn(shape, generator=g).to(case.dtype) for name, shape in shapes.items()}
    found["weight"][~mask_of(case)] = float("nan")  # dead weights are not read
    if case.wild:
        for name in ("x", "dy"):
            for value in (float("nan"), float("inf"), -float("inf")):
                found[name][torch.rand(found[name].shape, generator=g) < 0.02] = value
    return found


def outer_sum(a: Tensor, b: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """``sum over k of a[i, k] b[k, j]`` where ``live[k, j]`` (broadcast), in float64, and the same of magnitudes.

    The dead are absent: a NaN or infinity that meets one leaves no trace.
    """
    a, b = a.double(), b.double()
    if bool(a.isfinite().all() & b.isfinite().all()):
        b = b * live
        return a @ b, a.abs() @ b.abs()
    terms = torch.where(live, a.unsqueeze(2) * b, 0.0)
    return terms.sum(1), terms.abs().sum(1)


def assert_rounded(found: Tensor, expected: Tensor, magnitude: Tensor, num_terms: int) -> None:
    """Each number within the rounding of its dtype and of a float32 sum of `num_terms` in any order; NaNs and infinities the same."""
    assert found.shape == expected.shape
    number = expected.isfinite()
    unit = 2**-8 if found.dtype == torch.bfloat16 else 2**-23
    bound = unit * expected.abs() + 2**-23 * (num_terms + 2) * magnitude + 1e-37
    error = (found.double() - expected).abs()
    wrong = ~(error <= bound) & number
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} are wrong, by up to {float(error[wrong].max())}"
    torch.testing.assert_close(found[~number].double(), expected[~number], rtol=0, atol=0, equal_nan=True)


def products(case: Case) -> dict[str, Tensor]:
    """The three products of a layer as the native streams compute them."""
    t, bits = tensors(case), bits_of(mask_of(case), case.garbage)
    streams = {use: Stream(bits, case.cols, case.dtype, use) for use in Use}
    for use in (Use.FORWARD, Use.BACKWARD):
        streams[use].load(t["weight"])
    return {
        "y": streams[Use.FORWARD].multiply(t["x"], t["bias"] if case.bias else None),
        "dx": streams[Use.BACKWARD].multiply(t["dy"]),
        "dw": streams[Use.GRADIENT].gradient(t["x"], t["dy"]),
    }


def check(case: Case) -> None:
    """The products of a case against their definitions."""
    t, live, found = tensors(case), mask_of(case), products(case)
    weight = t["weight"].nan_to_num()
    y, size = outer_sum(t["x"], weight.t(), live.t())
    if case.bias:
        y, size = y + t["bias"].double(), size + t["bias"].double().abs()
    assert_rounded(found["y"], y, size, case.cols + 1)
    assert_rounded(found["dx"], *outer_sum(t["dy"], weight, live), case.rows)
    everywhere = torch.ones((), dtype=torch.bool)
    dw, size = outer_sum(t["dy"].t(), t["x"], everywhere)
    assert_rounded(found["dw"], dw.where(live, 0), size.where(live, 0), case.tokens)
    assert not found["dw"][~live].any()
