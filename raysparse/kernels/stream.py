"""A sparse weight as a stream of its non-zeros: what the native matrix products run on (layout: `native/stream.h`)."""

import ctypes
import threading
import weakref
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from raysparse.kernels import library
from raysparse.kernels.library import check, function, pointer

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}

_pointer, _long, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class Use(IntEnum):
    """What a stream is for; each has its own tiles."""

    FORWARD = 0
    """``x W^T + bias``"""
    BACKWARD = 1
    """``dy W``: the gradient of the input"""
    GRADIENT = 2
    """``dy^T x`` at the live weights: the gradient of the weight"""


class Stream:
    """The non-zeros of one weight in the order of use: 2 bytes each for its place, and where it multiplies its value.

    Attributes:
        shape: [out, in] of the weight.
        dtype: float32 or bfloat16, of the weight and the activations.
        grain: consecutive rows that share their columns everywhere (BACKWARD: consecutive columns their rows): 4, 2 or 1.
    """

    def __init__(self, bits: Tensor, cols: int, dtype: torch.dtype, use: Use):
        """
        Args:
            bits: [out, ceil(cols / 8)] uint8, the mask of the weight: lowest bit first, every row padded to whole bytes.
            cols: inputs of the weight.
        """
        check(bits.dtype == torch.uint8, bits.dtype)
        check(dtype in DTYPES, dtype)
        check(bits.ndim == 2 and cols >= 0 and bits.shape[1] == -(-cols // 8), f"{tuple(bits.shape)} for {cols} columns")
        self.shape, self.dtype, self.use, self._bits = (bits.shape[0], cols), dtype, use, bits
        new = function("rs_stream_new", _pointer, _pointer, _long, _long, _int, _int)
        self._loaded, self._lock = False, threading.Lock()
        self._handle = new(pointer(bits), *self.shape, use, DTYPES[dtype] == "bf16")
        weakref.finalize(self, function("rs_stream_free", None, _pointer), self._handle)
        self.grain: int = function("rs_stream_grain", _int, _pointer)(self._handle)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is made anew, with native memory of its own."""
        return Stream, (self._bits, self.shape[1], self.dtype, self.use)

    @property
    def nbytes(self) -> int:
        """Of its arrays, loaded values included."""
        return function("rs_stream_bytes", _long, _pointer)(self._handle)

    def load(self, weight: Tensor) -> None:
        """Take over the values of the weight ([out, in]) for the products to come; dead weights are not read."""
        check(self.use is not Use.GRADIENT, f"a stream for {self.use.name}")
        self._check(weight, self.shape)
        run = function(f"rs_load_{DTYPES[self.dtype]}", None, _pointer, _pointer, _int)
        with self._lock:
            run(self._handle, pointer(weight), library.threads())
            self._loaded = True

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x W^T + bias`` (FORWARD), ``x W`` (BACKWARD), with the weight that was loaded last.

        Args:
            x: [tokens, in]; BACKWARD: [tokens, out].
            bias: [out]; FORWARD only.

        Returns:
            [tokens, out]; BACKWARD: [tokens, in]. Sums are float32, rounded once to the dtype.
        """
        check(self._loaded, "no weight was loaded")
        rows, cols = self.shape if self.use is Use.FORWARD else self.shape[::-1]
        self._check(x, (x.shape[0], cols))
        y = x.new_empty(x.shape[0], rows)
        if bias is not None:
            check(self.use is Use.FORWARD, f"a stream for {self.use.name}")
            check(bias.shape == (rows,), f"{tuple(bias.shape)}, not {rows}")
            bias = bias.float().contiguous()
        if cols == 0:
            return y.zero_() if bias is None else y.copy_(bias)
        run = function(f"rs_multiply_{DTYPES[self.dtype]}", None, _pointer, _pointer, _long, _pointer, _pointer, _int)
        with self._lock:  # another thread may load
            run(self._handle, pointer(x), x.shape[0], pointer(bias), pointer(y), library.threads())
        return y

    def gradient(self, x: Tensor, dy: Tensor) -> Tensor:
        """``dy^T x`` at the live weights, 0 elsewhere (GRADIENT).

        Args:
            x: [tokens, in].
            dy: [tokens, out].

        Returns:
            [out, in].
        """
        check(self.use is Use.GRADIENT, f"a stream for {self.use.name}")
        self._check(x, (x.shape[0], self.shape[1]))
        self._check(dy, (x.shape[0], self.shape[0]))
        out = x.new_empty(self.shape)
        if out.numel():
            run = function(f"rs_gradient_{DTYPES[self.dtype]}", None, _pointer, _pointer, _pointer, _long, _pointer, _int)
            run(self._handle, pointer(x), pointer(dy), x.shape[0], pointer(out), library.threads())
        return out

    def _check(self, tensor: Tensor, shape: tuple[int, ...]) -> None:
        check((tensor.dtype, tuple(tensor.shape)) == (self.dtype, shape), f"{tensor.dtype} {tuple(tensor.shape)}, not {self.dtype} {shape}")
