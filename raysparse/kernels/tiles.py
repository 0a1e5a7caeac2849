"""A block-sparse weight as tables of its live blocks: what the products on GPUs run on (`tiles_gpu`), in the place of a `Stream`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raysparse.kernels.bits import kill, unpack
from raysparse.kernels.library import check
from raysparse.kernels.stream import Use


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
        self._bits, self._weight, self._interpreted = bits, None, False
        live = unpack(bits, cols).view(rows // size, size, cols // size, size).any(3).any(1)
        self.nnz = int(live.sum())
        if use is Use.BACKWARD:
            live = live.t()
        strips, others = live.nonzero(as_tuple=True)
        ends = torch.bincount(strips, minlength=len(live)).cumsum(0)
        self._first = torch.cat([ends.new_zeros(1), ends]).int()
        self._strips, self._others = strips.int(), others.int()

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
        check(self._weight is not None, "no weight was loaded")
        weight, self._weight = self._weight, None
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


def _gpu() -> Any:
    from raysparse.kernels import tiles_gpu  # Triton is imported where there are GPUs alone

    return tiles_gpu
