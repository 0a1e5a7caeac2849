"""Weights packed for decoding, where a few tokens meet every weight of a model and the bytes that are read are the time.

A weight [rows, cols] is kept in one of three ways (`Kind`): ``bits``, one bit a weight and the live weights in order; ``columns``, a
16-bit column and a value for each live weight; ``dense``. Its elements are float32, bfloat16 or int8 with a float32 scale for each
row. Activations are float32, with bfloat16 weights bfloat16.

Up to `FEW_TOKENS` tokens run in the native library, more, and all without it, as dense products of unpacked weights. Natively and
with int8 the activations x of a token become integers q = round(x 32512 / max|x|), 16 bits in two bytes. Their products with the weights
are summed exactly, to the same bits on every machine; q is off by 2^-16 of the largest activation at most. A token with an
activation that is not finite gives NaN. With floats a dead weight takes no part: it hides an infinite activation, where 0 * inf would
be NaN.
"""

import ctypes
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from raysparse.kernels import library
from raysparse.kernels.bits import pack as pack_bits
from raysparse.kernels.bits import unpack as unpack_bits
from raysparse.kernels.library import address, check, pointer

Kind = Literal["bits", "columns", "dense"]

MOST_COLS = 65_536
"""Of a packed weight: a column has 16 bits, a sum of int8 products 32."""
SPARE_BYTES = 64
"""Behind the live weights: kernels load whole vectors."""
ZERO = 128
"""int8 weights are stored as bytes from 0 on: weight = scale * (byte - 128), as x86 multiplies bytes."""
FEW_TOKENS = 32
"""More tokens are multiplied by torch, with a block of rows unpacked at a time: then arithmetic, not reading, takes the time."""

_BLOCK_BYTES = 1 << 20  # of unpacked rows: they stay in the second-level cache
_SMALL = 1 << 15  # a weight of fewer elements is one thread's work
_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.uint8: "u8"}
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


@dataclass(frozen=True)
class Packed:
    """A weight, ready for `linear`. Made by `pack`, or from stored tensors: then `problem` of it must be None.

    Attributes:
        values: the live weights, row by row, and `SPARE_BYTES` of zeros; of a dense weight [rows, cols] and no more. float32, bfloat16,
            or uint8: int8 as `ZERO` says.
        starts: [rows + 1], int32: the first live weight of each row, and their number. None: dense.
        bits: [rows, 8 * ceil(cols / 64)], uint8, lowest bit first, zero beyond cols. None of the other kinds.
        columns: uint16, one for each live weight, ascending in a row. None of the other kinds.
        scale: [rows], float32, of int8. None of the other types.
    """

    rows: int
    cols: int
    values: Tensor
    starts: Tensor | None = None
    bits: Tensor | None = None
    columns: Tensor | None = None
    scale: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: a copy finds its own native functions."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def kind(self) -> Kind:
        return "dense" if self.starts is None else "bits" if self.columns is None else "columns"

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the activations, and of the weight when it is unpacked."""
        return torch.float32 if self.values.dtype == torch.uint8 else self.values.dtype

    @property
    def nbytes(self) -> int:
        """Read for a token, or for a few together."""
        return sum(tensor.nbytes for tensor in (self.values, self.starts, self.bits, self.columns, self.scale) if tensor is not None)

    @cached_property
    def _native(self) -> Any:
        """The weight as native functions take it, for as long as this object lives."""
        tensors = (self.bits, self.columns, self.starts, self.values, self.scale)
        few = self.bits is not None and self.scale is not None and _most_of_64(self.bits) <= 32
        return ctypes.byref(_Native(self.rows, self.cols, *map(pointer, tensors), few))

    @cached_property
    def _decode(self) -> Any:
        return library.function(f"rs_decode_{_NAMES[self.values.dtype]}", None, _POINTER, _POINTER, _SIZE, _POINTER, _POINTER, ctypes.c_int)

    @cached_property
    def _unpack(self) -> Any:
        return library.function(f"rs_unpack_{_NAMES[self.values.dtype]}", None, _POINTER, _SIZE, _SIZE, _POINTER, ctypes.c_int)


class _Native(ctypes.Structure):
    """``Weight`` of native/decode.cpp."""

    _fields_: ClassVar = [
        *((name, _SIZE) for name in ("rows", "cols")),
        *((name, _POINTER) for name in ("bits", "columns", "starts", "values", "scale")),
        ("few", _SIZE),
    ]


def pack(weight: Tensor, dtype: torch.dtype, kind: Kind) -> Packed:
    """The elements of `weight` that are not zero after rounding.

    Args:
        weight: [rows, cols], float32 or bfloat16; finite where it becomes int8. At most `MOST_COLS` columns unless it is a dense one of
            floats.
        dtype: float32, bfloat16 or int8. int8 has a scale of max|row| / 127.
    """
    rows, cols = weight.shape
    scale, dead = None, 0
    if dtype == torch.int8:
        check(bool(weight.isfinite().all()), "int8 knows no inf and no NaN")
        scale = weight.float().abs().amax(1) / 127 if cols else torch.zeros(rows)
        weight = (weight.float() / scale.where(scale > 0, 1.0).unsqueeze(1)).round() + ZERO
        dtype, dead = torch.uint8, ZERO
    check(cols <= MOST_COLS or (kind == "dense" and scale is None), cols, "columns")
    weight = weight.to(dtype).contiguous()
    if kind == "dense":
        return Packed(rows, cols, weight, scale=scale)
    live = weight != dead
    starts = torch.zeros(rows + 1, dtype=torch.int64)
    starts[1:] = live.sum(1).cumsum(0)
    check(int(starts[-1]) < 2**31, int(starts[-1]), "live weights")
    values = torch.cat([weight[live], weight.new_zeros(SPARE_BYTES // weight.element_size())])
    bits = _bits(live) if kind == "bits" else None
    columns = live.nonzero()[:, 1].to(torch.uint16) if kind == "columns" else None
    return Packed(rows, cols, values, starts.int(), bits, columns, scale)


def choose(weight: Tensor, dtype: torch.dtype) -> Kind:
    """The kind that is read and expanded fastest, as benchmarks/decode.py measures it.

    Dense where packing saves less than a tenth of the bytes; columns for float32 of at most 15 % live weights, where expanding the bits of
    the dead ones takes longer than reading.
    """
    nnz, total, size = int(weight.count_nonzero()), weight.numel(), dtype.itemsize
    if weight.shape[1] > MOST_COLS or nnz >= 2**31 or nnz * size + total / 8 > 0.9 * total * size:
        return "dense"
    return "columns" if dtype == torch.float32 and nnz <= 0.15 * total else "bits"


def problem(weight: Packed) -> str | None:
    """What is unsound about a stored weight; None where kernels may read it."""
    return _shape_problem(weight) or _index_problem(weight)


def linear(weight: Packed, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, without gradients: [..., rows].

    Args:
        x: [..., cols], of `weight.dtype`.
        bias: [rows], of `weight.dtype`.

    The same bits for any number of threads up to `FEW_TOKENS` tokens; with int8 also whatever other tokens there are.
    """
    check((x.is_cpu, x.dtype, x.shape[-1]) == (True, weight.dtype, weight.cols), f"{x.device} {x.dtype} {x.shape}")
    check(not x.requires_grad, "an input that requires a gradient")
    check(bias is None or (bias.dtype, bias.shape) == (weight.dtype, (weight.rows,)), "a bias that does not fit")
    leading = x.shape[:-1]
    x, y, tokens = x.contiguous(), x.new_empty((*leading, weight.rows)), leading.numel()
    if tokens > FEW_TOKENS or not library.available():
        _many(weight, x.view(tokens, weight.cols), bias, y.view(tokens, weight.rows))
    else:
        threads = _threads(weight.rows * weight.cols)
        weight._decode(weight._native, pointer(bias), tokens, address(x), y.data_ptr(), threads)
    return y


def unpack(weight: Packed, first: int = 0, last: int | None = None) -> Tensor:
    """Rows `first` to `last` (all) as a dense weight: [last - first, cols], of `weight.dtype`."""
    last = weight.rows if last is None else last
    check(0 <= first <= last <= weight.rows, (first, last))
    if weight.starts is None:
        return _scaled(weight, weight.values[first:last], first, last)
    if library.available():
        out = torch.empty(last - first, weight.cols, dtype=weight.dtype)
        if out.numel():
            weight._unpack(weight._native, first, last - first, out.data_ptr(), _threads(out.numel()))
        return out
    begin, end = int(weight.starts[first]), int(weight.starts[last])
    if weight.columns is None:
        assert weight.bits is not None
        live = unpack_bits(weight.bits[first:last], weight.cols)
    else:
        counts = weight.starts[first : last + 1].long().diff()
        live = torch.zeros(last - first, weight.cols, dtype=torch.bool)
        live[torch.repeat_interleave(torch.arange(last - first), counts), weight.columns[begin:end].long()] = True
    values = torch.full(live.shape, 0 if weight.scale is None else ZERO, dtype=weight.values.dtype)
    values[live] = weight.values[begin:end]
    return _scaled(weight, values, first, last)


def _many(weight: Packed, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """`linear` by torch. x: [tokens, cols], y: [tokens, rows]."""
    whole = weight.kind == "dense" and weight.scale is None
    block = max(weight.rows, 1) if whole else max(_BLOCK_BYTES // max(weight.cols * weight.dtype.itemsize, 1), 1)
    for first in range(0, weight.rows, block):
        last = min(first + block, weight.rows)
        y[:, first:last] = F.linear(x, unpack(weight, first, last), None if bias is None else bias[first:last])


def _scaled(weight: Packed, values: Tensor, first: int, last: int) -> Tensor:
    return values if weight.scale is None else (values.float() - ZERO) * weight.scale[first:last, None]


def _threads(size: int) -> int:
    return library.threads() if size > _SMALL else 1


def _shape_problem(weight: Packed) -> str | None:
    values, rows = weight.values, weight.rows
    if values.dtype not in _NAMES:
        return f"values of {values.dtype}"
    num_live = max(values.numel() - SPARE_BYTES // values.element_size(), 0)
    wanted = {
        "values": (values.dtype, (rows, weight.cols) if weight.starts is None else (num_live + SPARE_BYTES // values.element_size(),)),
        "starts": (torch.int32, (rows + 1,)),
        "bits": (torch.uint8, (rows, 8 * -(-weight.cols // 64))),
        "columns": (torch.uint16, (num_live,)),
        "scale": (torch.float32, (rows,)),
    }
    for name, (dtype, shape) in wanted.items():
        tensor = getattr(weight, name)
        if tensor is not None and (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            return f"{name} of {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}"
    if (weight.scale is None) == (values.dtype == torch.uint8):
        return "uint8 values without a scale" if weight.scale is None else f"a scale for {values.dtype} values"
    if weight.cols > MOST_COLS and not (weight.kind == "dense" and weight.scale is None):
        return f"{weight.cols} columns, more than {MOST_COLS}"
    if weight.starts is None:
        return None if weight.bits is None and weight.columns is None else "an index without starts"
    return None if (weight.bits is None) != (weight.columns is None) else "not one index, bits or columns"


def _index_problem(weight: Packed) -> str | None:
    if weight.starts is None:
        return None
    counts, num_live = weight.starts.long().diff(), weight.values.numel() - SPARE_BYTES // weight.values.element_size()
    if int(weight.starts[0]) != 0 or bool((counts < 0).any()) or int(weight.starts[-1]) != num_live:
        return f"starts that do not rise from 0 to {num_live}"
    if weight.columns is None:
        assert weight.bits is not None
        live = unpack_bits(weight.bits, 8 * weight.bits.shape[1])
        return None if torch.equal(live.sum(1), counts) and not live[:, weight.cols :].any() else "bits that do not fit the starts"
    columns, rows = weight.columns.int(), torch.repeat_interleave(torch.arange(weight.rows), counts)
    ascending = (columns.diff() > 0) | (rows.diff() > 0)
    return None if bool((columns < weight.cols).all()) and bool(ascending.all()) else "columns out of order or range"


def _bits(live: Tensor) -> Tensor:
    """[rows, cols] bool -> [rows, 8 * ceil(cols / 64)] uint8, lowest bit first."""
    return pack_bits(F.pad(live, (0, -live.shape[1] % 64)))


def _most_of_64(bits: Tensor) -> int:
    """Set bits in the fullest word of 64."""
    return int(unpack_bits(bits, 8 * bits.shape[1]).view(-1, 64).sum(1).amax()) if bits.numel() else 0
