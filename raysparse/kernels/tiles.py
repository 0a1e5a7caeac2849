"""A block-sparse weight as tables of its live blocks: what the products on GPUs run on (`tiles_gpu`), in the place of a `Stream`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raysparse.kernels.bits import kill, pack, unpack
from raysparse.kernels.library import check
from raysparse.kernels.stream import Use

SIZES = (16, 32, 64, 128)
"""Rows and columns of a block."""
FAST = 64
"""Smaller blocks run, and gain little: a tensor core of Hopper takes 64 rows at least."""


class Tiles:
    """The live blocks of one weight, for one of its products. The weight stays where it is, dense with zeros; a new mask is new tables.

    On CPUs the products are torch's dense ones: the reference.

    Attributes:
        shape: [out, in] of the weight.
        dtype: float32 or bfloat16, of the weight and the activations.
        use: the product.
        size: rows and columns of a block.
        nnz: live blocks.
    """

    _interpreted = False
    """Whether Triton interprets its kernels on CPU tensors, for tests."""

    def __init__(self, bits: Tensor, cols: int, dtype: torch.dtype, use: Use, size: int):
        """
        Args:
            bits: [out, ceil(cols / 8)] uint8, the mask of the weight (`bits.pack`), on the device of the products. A block with a live
                weight lives.
            cols: inputs of the weight; `size` divides both sides.
        """
        rows = bits.shape[0]
        check(rows % size == 0 and cols % size == 0, f"{rows} x {cols} in blocks of {size}")
        self.shape, self.dtype, self.use, self.size = (rows, cols), dtype, use, size
        self._bits = bits
        self._weight: Tensor | None = None
        live = unpack(bits, cols).view(rows // size, size, cols // size, size).any(3).any(1)
        self.nnz = int(live.sum())
        if use is Use.BACKWARD:
            live = live.t()
        strips, others = live.nonzero(as_tuple=True)
        ends = torch.bincount(strips, minlength=len(live)).cumsum(0)
        self._first = torch.cat([ends.new_zeros(1), ends]).int()
        self._strips, self._others = strips.int(), others.int()

    @property
    def nbytes(self) -> int:
        """Of its tables."""
        return self._first.nbytes + self._strips.nbytes + self._others.nbytes

    def load(self, weight: Tensor) -> None:
        """The weight [out, in] of the next product. It is not copied: under FSDP2 it is gone after that."""
        check((weight.dtype, tuple(weight.shape)) == (self.dtype, self.shape), weight.dtype, tuple(weight.shape))
        self._weight = weight

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x W^T + bias`` (FORWARD), ``x W`` (BACKWARD), with the weight that was loaded for it.

        Args:
            x: [tokens, in]; BACKWARD: [tokens, out]; contiguous.
            bias: [out]; FORWARD only.

        Returns:
            [tokens, out]; BACKWARD: [tokens, in].
        """
        weight, self._weight = self._weight, None
        if weight is None:
            raise RuntimeError("Expected a weight, loaded for this product. Got none. Call load first.")
        check(x.dtype == self.dtype and x.is_contiguous(), x.dtype, x.stride())
        check(x.shape[1] == self.shape[self.use is Use.FORWARD], tuple(x.shape), "for", self.shape)
        if self.use is Use.FORWARD:
            if self._in_triton(x):
                return _gpu().forward(x, weight, bias, self._first, self._others, self.size)
            return F.linear(x, weight, bias)
        check(bias is None, f"a bias for {self.use.name}")
        return _gpu().backward(x, weight, self._first, self._others, self.size) if self._in_triton(x) else x @ weight

    def gradient(self, x: Tensor, dy: Tensor) -> Tensor:
        """``dy^T x`` at the live blocks, 0 elsewhere (GRADIENT).

        Args:
            x: [tokens, in], contiguous.
            dy: [tokens, out], contiguous.

        Returns:
            [out, in].
        """
        check(x.dtype == dy.dtype == self.dtype and x.is_contiguous() and dy.is_contiguous(), x.dtype, dy.dtype)
        check((dy.shape[1], x.shape[1]) == self.shape and len(x) == len(dy), tuple(dy.shape), tuple(x.shape), "for", self.shape)
        if self._in_triton(x):
            return _gpu().gradient(dy, x, self._strips, self._others, self.size)
        return kill(dy.t() @ x, unpack(self._bits, self.shape[1]))

    def _in_triton(self, x: Tensor) -> bool:
        return x.is_cuda or self._interpreted


def block_of(mask: Tensor) -> int | None:
    """The largest of `SIZES` in whose blocks a mask [rows, cols] lives or dies as a whole; None of one that has no such blocks."""
    rows, cols = mask.shape
    for size in sorted(SIZES, reverse=True):
        if rows % size == 0 and cols % size == 0:
            units = mask.view(rows // size, size, cols // size, size)
            if bool((units.all(3).all(1) == units.any(3).any(1)).all()):
                return size
    return None


def is_exact(dtype: torch.dtype) -> bool:
    """Whether products are float32's, and not tensor float 32's (``torch.backends.cuda.matmul.fp32_precision``)."""
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"


def why_not(device: torch.device, dtype: torch.dtype, size: int) -> str | None:
    """Runs the three products on a small weight in blocks of `size`, against float64; returns what is wrong, if anything is."""
    generator = torch.Generator().manual_seed(0)
    live = torch.tensor([[1, 0, 1], [0, 0, 1]], dtype=torch.bool)
    mask = live.repeat_interleave(size, 0).repeat_interleave(size, 1)
    weight, x, dy, bias = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((2 * size, 3 * size), (70, 3 * size), (70, 2 * size), (2 * size,))
    )
    weight = weight * mask
    w, a, g = weight.double(), x.double(), dy.double()
    expected = {Use.FORWARD: a @ w.t() + bias.double(), Use.BACKWARD: g @ w, Use.GRADIENT: (g.t() @ a) * mask}
    bound = 1e-4 if is_exact(dtype) else 2e-2  # of the largest entry
    bits = pack(mask).to(device)
    weight, x, dy, bias = (tensor.to(device) for tensor in (weight, x, dy, bias))
    try:
        for use, right in expected.items():
            tiles = Tiles(bits, 3 * size, dtype, use, size)
            if use is Use.GRADIENT:
                found = tiles.gradient(x, dy)
            else:
                tiles.load(weight)
                found = tiles.multiply(x, bias) if use is Use.FORWARD else tiles.multiply(dy)
            error = float((found.double().cpu() - right).abs().max() / right.abs().max())
            if not error < bound:
                return f"{use.name.lower()} is off by {error:.1e} of the largest entry in blocks of {size}"
    except Exception as error:  # whatever a compiler or a driver raises: the dense products are there
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def _gpu() -> Any:
    from raysparse.kernels import tiles_gpu  # Triton is imported where there are GPUs alone

    return tiles_gpu
