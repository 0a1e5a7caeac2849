"""What runs in processes of their own, for Triton decides at its import whether it interprets: ``python -m tests.kernels.triton_cases
interpret | compile``."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = str(int(sys.argv[1:] == ["interpret"]))

import torch
import triton

from raysparse.kernels import adamw, gpu
from raysparse.kernels.bits import pack
from raysparse.kernels.live import Live
from tests.kernels.test_adamw import RATES, copies, drawn, same_bits

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


def compile_ahead() -> None:
    """Machine code of three generations of GPUs, without one: no register is spilled."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    matrices = {"dense": "*fp32", "values": "*fp32", "out": "*fp32", "bits": "*u8", "starts": "*i64"}
    matrices |= dict.fromkeys(("weights", "gradients", "firsts", "seconds"), "*fp32")
    numbers = dict.fromkeys(("keep", "beta1", "rest1", "beta2", "rest2", "root_scale", "eps", "step"), "fp32")
    kernels = [(gpu._take, {}), (gpu._put, {}), (gpu._adamw, {"PACKED": True}), (gpu._adamw, {"PACKED": False})]
    for arch in (80, 90, 100):
        for kernel, constants in kernels:
            constants = constants | {"BLOCK": gpu.BLOCK}
            types = {name: "constexpr" if name in constants else (matrices | numbers).get(name, "i64") for name in kernel.arg_names}
            aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in matrices}
            source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
            made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4})
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(made.asm["cubin"])
                file.flush()
                told = subprocess.run([tools / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
            registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", told.stdout).groups())  # type: ignore[union-attr]
            print(f"sm_{arch} {kernel.__name__} {constants} registers {registers} stack {stack} local {local}")
            assert stack == local == 0, (arch, kernel.__name__)


if __name__ == "__main__":
    for run in {"interpret": (interpret, train), "compile": (compile_ahead,)}[sys.argv[1]]:
        run()
