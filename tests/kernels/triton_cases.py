"""What runs in processes of their own, for Triton decides at its import whether it interprets: ``python -m tests.kernels.triton_cases
interpret | compile | compile-all``."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = str(int(sys.argv[1:] == ["interpret"]))

import torch
import triton

from raysparse.kernels import adamw, gpu, tiles_gpu
from raysparse.kernels.bits import pack
from raysparse.kernels.linear import SPARSE, adopt
from raysparse.kernels.live import Live
from raysparse.kernels.stream import Use
from raysparse.kernels.tiles import SIZES, Tiles, why_not
from tests.kernels.test_adamw import RATES, copies, drawn, same_bits

MOST_SHARED = {80: 163, 90: 227, 100: 227}
"""KiB of shared memory that a program may have."""
SHAPES = [(1, 1), (1, 7), (7, 1), (3, 13), (31, 63), (2, 1024), (3, 1025), (67, 64)]


def interpret() -> None:
    """Every kernel on CPU tensors, against boolean indexing and the native step."""
    for shape in SHAPES:
        for density in (0.0, 0.25, 1.0):
            tensors, mask = drawn(shape, density, seed=sum(shape))
            live = Live(mask)
            live._way = "triton"  # as on GPUs
            for dtype in (torch.float32, torch.bfloat16):
                dense = tensors[1].to(dtype)
                taken, back = dense.new_empty(live.nnz), torch.full_like(dense, torch.nan)
                live.take(dense, taken)
                assert torch.equal(taken, dense[mask]), (shape, density, dtype)
                live.put(taken, back)
                assert torch.equal(back, dense.where(mask, torch.zeros((), dtype=dtype))), (shape, density, dtype)
            tensors[1][~mask] = torch.nan
            expected = copies(tensors)
            adamw.advance(*expected, RATES, pack(mask))
            found = copies(tensors)
            gpu.advance(*found, RATES, live)
            for i in (0, 2, 3):
                torch.testing.assert_close(found[i], expected[i], rtol=1e-5, atol=1e-7)
                assert not found[i][~mask].any()
            packed = [*copies(tensors[:2]), tensors[2][mask], tensors[3][mask]]
            gpu.advance(*packed, RATES, live)
            assert same_bits([packed[0], packed[2], packed[3]], [found[0], found[2][mask], found[3][mask]]), (shape, density)


def train() -> None:
    """Some steps of the optimizer, with moments of live weights and of all, over torch's on gradients that are masked."""
    for packed in (True, False):
        generator = torch.Generator().manual_seed(0)
        mask = torch.rand(9, 21, generator=generator) < 0.3
        weights = [torch.nn.Parameter(torch.randn(9, 21, generator=generator) * mask) for _ in range(1)] + [
            torch.nn.Parameter(torch.ones(5))
        ]
        theirs = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
        ours, reference = adamw.TritonAdamW(weights, lr=0.01, fused=True), torch.optim.AdamW(theirs, lr=0.01)
        ours.set_masks({weights[0]: Live(mask)})
        shape = (int(mask.sum()),) if packed else mask.shape
        ours.state[weights[0]] = {"step": torch.zeros(()), **{which: torch.zeros(shape) for which in adamw.MOMENTS}}
        for _ in range(4):
            for mine, other in zip(weights, theirs, strict=True):
                mine.grad = torch.randn(mine.shape, generator=generator)
                other.grad = mine.grad * mask if mine.ndim == 2 else mine.grad.clone()
            ours.step()
            reference.step()
        for mine, other in zip(weights, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
        assert not weights[0][~mask].any()
        assert ours.state[weights[0]]["exp_avg"].shape == shape
        assert float(ours.state[weights[0]]["step"]) == 4


def blocks() -> None:
    """The products of block-sparse layers against float64: ragged numbers of tokens, rows, columns and weights without a live block."""
    Tiles._interpreted = True
    cases = [(70, 2, 3, 0.5), (1, 3, 2, 0.3), (130, 1, 4, 1.0), (65, 2, 2, 0.0)]
    for size in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            assert why_not(torch.device("cpu"), dtype, size) is None
            for tokens, rows, cols, density in cases if size < 128 else cases[:1]:
                generator = torch.Generator().manual_seed(size + tokens)
                live = torch.rand(rows, cols, generator=generator) < density
                mask = live.repeat_interleave(size, 0).repeat_interleave(size, 1)
                shapes = mask.shape, (tokens, mask.shape[1]), (tokens, len(mask)), (len(mask),)
                weight, x, dy, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
                weight *= mask
                exact = {
                    Use.FORWARD: x.double() @ weight.double().t() + bias.double(),
                    Use.BACKWARD: dy.double() @ weight.double(),
                    Use.GRADIENT: (dy.double().t() @ x.double()) * mask,
                }
                for use, expected in exact.items():
                    tiles = Tiles(pack(mask), mask.shape[1], dtype, use, size)
                    tiles.load(weight)
                    product = tiles.gradient(x, dy) if use is Use.GRADIENT else tiles.multiply(*{0: (x, bias), 1: (dy,)}[use])
                    torch.testing.assert_close(product.double(), expected, rtol=4e-3 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)
                    assert use is not Use.GRADIENT or not product[~mask].any()


def layer() -> None:
    """A layer through autograd, its mask moving on."""
    Tiles._interpreted = True
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.nn.Linear(48, 32), torch.nn.Linear(48, 32)
    sparse = adopt(ours)
    for _ in range(3):
        mask = (torch.rand(2, 3, generator=generator) < 0.5).repeat_interleave(16, 0).repeat_interleave(16, 1)
        sparse.sparsify(pack(mask), torch.float32, SPARSE, 16)
        with torch.no_grad():
            ours.weight.copy_(torch.randn(32, 48, generator=generator) * mask)
            theirs.load_state_dict(ours.state_dict())
        inputs = [torch.randn(2, 9, 48, generator=generator).requires_grad_()]
        inputs.append(inputs[0].detach().clone().requires_grad_())
        for model, x in zip((ours, theirs), inputs, strict=True):
            model.zero_grad()
            model(x).square().sum().backward()
        gradients = (inputs[0].grad, ours.weight.grad, ours.bias.grad), (inputs[1].grad, theirs.weight.grad * mask, theirs.bias.grad)
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def compile_ahead() -> None:
    """Machine code of three generations of GPUs, without one: no register is spilled, shared memory is there, tensor cores multiply."""
    pointers = {"dense": "*fp32", "values": "*fp32", "out": "*fp32", "bits": "*u8", "starts": "*i64"}
    pointers |= dict.fromkeys(("weights", "gradients", "firsts", "seconds"), "*fp32")
    numbers = dict.fromkeys(("keep", "beta1", "rest1", "beta2", "rest2", "root_scale", "eps", "step"), "fp32")
    kernels = [(gpu._take, {}), (gpu._put, {}), (gpu._adamw, {"PACKED": True}), (gpu._adamw, {"PACKED": False})]
    for arch in MOST_SHARED:
        for kernel, constants in kernels:
            machine_code(kernel, arch, constants | {"BLOCK": gpu.BLOCK}, pointers, numbers)
        products(arch, 128, torch.bfloat16, 1)
        products(arch, 64, torch.float32, 1)


def compile_all() -> None:
    """Every tile that is tried of the products of blocks."""
    for arch in MOST_SHARED:
        for dtype in (torch.bfloat16, torch.float32):
            for size in SIZES:
                products(arch, size, dtype)


def products(arch: int, size: int, dtype: torch.dtype, most: int | None = None) -> None:
    """Of blocks, with the first tiles that are tried, or all."""
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    precise = {"PRECISION": "ieee" if name == "fp32" else "tf32", "SOFT": False, "B": size}
    pointers = dict.fromkeys(("x", "weight", "bias", "y", "dy", "dw"), f"*{name}") | dict.fromkeys(
        ("first", "others", "rows", "cols"), "*i32"
    )
    along = precise | {"STEP": min(tiles_gpu.STEP[dtype], size), "GROUP": 8}
    cases = [
        (tiles_gpu._along, along | {"BIAS": True, "by_other": 1}),
        (tiles_gpu._along, along | {"BIAS": False, "by_strip": 1}),
        (tiles_gpu._across, precise),
    ]
    for kernel, constants in cases:
        for config in tiles_gpu.CONFIGS[kernel][dtype][:most]:
            sizes = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            code = machine_code(kernel, arch, constants | config.kwargs, pointers, {}, "i32", sizes)
            if name == "bf16":
                wide = kernel is tiles_gpu._along or size >= 64  # Hopper's takes 64 rows at least
                wanted = {80: "mma.sync", 90: "wgmma.mma_async" if wide else "mma.sync", 100: "tcgen05.mma" if wide else "mma.sync"}[arch]
                assert wanted in code, (arch, kernel.__name__, constants, config)


def machine_code(
    kernel: Any, arch: int, constants: dict[str, Any], pointers: dict[str, str], numbers: dict[str, str], whole: str = "i64",
    options: dict[str, int] | None = None,
) -> str:  # fmt: skip
    """The PTX of a kernel whose other arguments are numbers of type `whole`; checks what the machine code needs."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    types = {name: "constexpr" if name in constants else (pointers | numbers).get(name, whole) for name in kernel.arg_names}
    known = pointers.keys() | {"width", "result_width", "by_strip", "by_other", "out", "into"} if whole == "i32" else pointers.keys()
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in known and name not in constants}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options or {"num_warps": 4})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        told = subprocess.run([tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", told.stdout).groups())  # type: ignore[union-attr]
    shared = made.metadata.shared
    print(f"sm_{arch} {kernel.__name__} {constants} {options} registers {registers} stack {stack} local {local} shared {shared}")
    assert stack == local == 0, (arch, kernel.__name__, constants, options)
    assert shared <= MOST_SHARED[arch] * 1024, (arch, kernel.__name__, shared)
    return made.asm["ptx"]


if __name__ == "__main__":
    for run in {"interpret": (interpret, train, blocks, layer), "compile": (compile_ahead,), "compile-all": (compile_all,)}[sys.argv[1]]:
        run()
