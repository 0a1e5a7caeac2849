"""Live elements of a matrix taken out of it, and put back: what is sent, what is stored, what an optimizer keeps moments of."""

import ctypes
import importlib.util
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from raysparse.kernels import library
from raysparse.kernels.bits import pack, unpack
from raysparse.kernels.library import check, function, pointer

BLOCK = 1024
"""Elements of a matrix that a program on a GPU takes."""

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


class Live:
    """Which elements of a [rows, cols] tensor live, prepared once to take them out and put them back many times.

    The native library on CPUs (`native/live.cpp`) and Triton on GPUs (`gpu`) read the bits. Without them torch gathers and scatters by an
    index of 8 bytes for each live element.

    Attributes:
        shape: (rows, cols).
        bits: [rows, ceil(cols / 8)] uint8, as `bits.pack` makes them.
        nnz: how many live.
    """

    def __init__(self, mask: Tensor):
        """Args:
        mask: [rows, cols] bool, True = live.
        """
        check(mask.dtype == torch.bool and mask.ndim == 2, mask.dtype, tuple(mask.shape))
        rows, cols = mask.shape
        self.shape, self.bits, self.nnz = (rows, cols), pack(mask), int(mask.sum())
        self._way = "torch"
        if mask.is_cpu and library.available():
            self._way = "native"
        elif mask.is_cuda and importlib.util.find_spec("triton") is not None:
            self._way = "triton"

    @cached_property
    def starts(self) -> Tensor:
        """How many live before each `BLOCK` elements, int64."""
        counts = F.pad(self._mask.flatten(), (0, -self._mask.numel() % BLOCK)).view(-1, BLOCK).sum(1)
        return counts.cumsum(0) - counts

    @cached_property
    def _index(self) -> Tensor:
        return self._mask.flatten().nonzero().flatten()

    @property
    def _mask(self) -> Tensor:
        return unpack(self.bits, self.shape[1])

    def take(self, dense: Tensor, live: Tensor | None = None) -> Tensor:
        """The live elements, row by row.

        Args:
            dense: [rows, cols], or of any other shape of as many elements; contiguous, of 2 or 4 bytes an element.
            live: [nnz], to be filled; None: a new one.
        """
        live = dense.new_empty(self.nnz) if live is None else live
        self._check(dense, live)
        if self._way == "native":
            self._run("take", dense, live)
        elif self._way == "triton":
            _gpu().take(dense, self, live)
        else:
            torch.index_select(dense.view(-1), 0, self._index, out=live)
        return live

    def put(self, live: Tensor, dense: Tensor | None = None) -> Tensor:
        """The inverse: what is not live becomes +0.

        Args:
            live: [nnz].
            dense: [rows, cols], or of any other shape of as many elements, to be filled; contiguous. None: a new one.
        """
        dense = live.new_empty(self.shape) if dense is None else dense
        self._check(dense, live)
        if self._way == "native":
            self._run("put", dense, live)
        elif self._way == "triton":
            _gpu().put(live, self, dense)
        else:
            dense.view(-1).zero_().index_copy_(0, self._index, live)
        return dense

    def _run(self, what: Literal["take", "put"], dense: Tensor, live: Tensor) -> None:
        if self.nnz == 0:
            if what == "put":
                dense.zero_()
            return
        run = function(f"rs_{what}_{dense.element_size()}", _SIZE, _POINTER, _POINTER, *[_SIZE] * 3, _POINTER, ctypes.c_int)
        first, last = (dense, live) if what == "take" else (live, dense)
        found = run(pointer(first), pointer(self.bits), *self.shape, self.nnz, pointer(last), library.threads())
        check(found == self.nnz, f"{found} live elements, {self.nnz} expected")

    def _check(self, dense: Tensor, live: Tensor) -> None:
        check(dense.dtype == live.dtype and dense.element_size() in (2, 4), dense.dtype, live.dtype)
        check(dense.is_contiguous() and live.is_contiguous(), dense.stride(), live.stride())
        check(dense.numel() == self.shape[0] * self.shape[1], tuple(dense.shape), "for", self.shape)
        check(live.shape == (self.nnz,), tuple(live.shape), "for", self.nnz)


def _gpu() -> Any:
    from raysparse.kernels import gpu  # Triton is imported where there are GPUs alone

    return gpu
