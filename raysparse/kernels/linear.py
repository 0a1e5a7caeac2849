"""Linear layers that skip their zeros, in any of the three products of training, behind one custom operator.

``y = x W^T + b`` needs the forward product, the gradient of its input and the gradient of its weight; each runs on a native stream
of the live weights (CPUs), on their blocks (GPUs) or as torch's dense product, as was chosen. The operator sees plain tensors and the
number of the layer, so a new topology changes no graph and torch.compile compiles nothing anew; autograd, autocast, activation
checkpointing and FSDP2 (it is called with the gathered weights) work as with any other operator.
"""

import itertools
import weakref
from copy import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysparse.kernels.bits import kill, unpack
from raysparse.kernels.library import check
from raysparse.kernels.stream import Stream, Use
from raysparse.kernels.tiles import Tiles


@dataclass(frozen=True)
class Products:
    """Which of a layer's products skip zeros."""

    forward: bool = False
    backward: bool = False
    """The gradient of the input."""
    gradient: bool = False
    """The gradient of the weight."""

    @property
    def any(self) -> bool:
        return self.forward or self.backward or self.gradient


DENSE, SPARSE = Products(), Products(True, True, True)


class SparseLinear(nn.Linear):
    """An `nn.Linear` whose dead weights may be skipped; without a mask it is an `nn.Linear`. Made by `adopt`.

    The caller promises that dead weights are zero. Their gradient is zero too, except where `dense_gradient` is set.

    Attributes:
        number: of the layer, as the operator names it; a tensor, for torch.compile would compile equal blocks anew for another int.
        products: which products skip zeros.
        dense_gradient: form the gradient of all weights, for growing by it.
        held: weights change only where `release` is called, so their live values are read once between two calls of it and not in every
            forward and backward pass.
    """

    number: Tensor
    held: bool
    dense_gradient: bool
    products: Products
    _bits: Tensor | None
    _mask: Tensor | None
    _streams: dict[Use, Stream | Tiles]
    _loaded: set[Use]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is a layer of its own."""
        super().__setstate__(state)
        self._streams = {use: copy(stream) for use, stream in self._streams.items()}
        self.release()
        _register(self)

    def sparsify(self, bits: Tensor, dtype: torch.dtype, products: Products, block: int | None = None) -> None:
        """Another mask, or other products.

        Args:
            bits: [out, ceil(in / 8)] uint8, lowest bit first, where the products are computed.
            dtype: of the products.
            block: see `skipping`.
        """
        wanted = {Use.FORWARD: products.forward, Use.BACKWARD: products.backward, Use.GRADIENT: products.gradient}
        self.products, self._bits, self._mask = products, bits, None
        self._streams = {use: skipping(bits, self.in_features, dtype, use, block) for use, sparse in wanted.items() if sparse}
        self.release()

    def densify(self) -> None:
        """No mask: an ordinary linear layer."""
        self._bits, self._mask, self.products, self._streams = None, None, DENSE, {}
        self.release()

    def release(self) -> None:
        """The weight has changed or may have."""
        self._loaded = set()

    def forward(self, input: Tensor) -> Tensor:
        if self.products.any and not _other_autocast(input.device.type):
            return torch.ops.raysparse.linear(input, self.weight, self.bias, self.number)
        return super().forward(input)

    def skips(self, use: Use, dtype: torch.dtype) -> bool:
        """Whether a product of tensors of `dtype` runs on the stream: it does if it is of the stream's dtype."""
        return use in self._streams and dtype == self._streams[use].dtype

    def stream(self, use: Use, weight: Tensor | None = None) -> Stream | Tiles:
        """Ready to multiply by `weight`."""
        stream = self._streams[use]
        if weight is not None and use not in self._loaded:
            stream.load(weight.contiguous())
            if self.held and isinstance(stream, Stream):
                self._loaded.add(use)
        return stream

    def live(self, gradient: Tensor) -> Tensor:
        """A dense gradient of the weight, zeroed in place at dead weights."""
        if self._mask is None:
            assert self._bits is not None
            self._mask = unpack(self._bits, self.in_features)
        return kill(gradient, self._mask)


def skipping(bits: Tensor, cols: int, dtype: torch.dtype, use: Use, block: int | None = None) -> Stream | Tiles:
    """What computes one product of a weight without its zeros.

    Args:
        bits: [out, ceil(cols / 8)] uint8, lowest bit first.
        block: rows and columns of the blocks that the mask is made of, for the kernels that need some; None: single weights, on a CPU.
    """
    return Stream(bits, cols, dtype, use) if block is None else Tiles(bits, cols, dtype, use, block)


def _other_autocast(device: str) -> bool:
    """Whether products are to be of a type that they cannot be computed in without zeros."""
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) != torch.bfloat16


_NUMBERS = itertools.count()
_LAYERS: weakref.WeakValueDictionary[int, SparseLinear] = weakref.WeakValueDictionary()
"""By number; no number is used twice."""


def adopt(linear: nn.Linear) -> SparseLinear:
    """Turn a layer into a `SparseLinear`, in place: parameters, hooks and names stay as they are."""
    assert type(linear) is nn.Linear, type(linear)
    linear.__class__ = SparseLinear
    layer = cast(SparseLinear, linear)
    layer.held, layer.dense_gradient = False, False
    layer.densify()
    _register(layer)
    return layer


def _register(layer: SparseLinear) -> None:
    number = next(_NUMBERS)
    layer.number = torch.tensor(number)
    _LAYERS[number] = layer


@torch.library.custom_op("raysparse::linear", mutates_args=(), device_types=("cpu", "cuda"))
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, number: Tensor) -> Tensor:
    """x: [..., in], weight: [out, in], bias: [out], number: the layer's -> [..., out]."""
    layer = _layer(weight, number)
    if not layer.skips(Use.FORWARD, x.dtype):
        return F.linear(x, weight, bias)
    y = layer.stream(Use.FORWARD, weight).multiply(_rows(x), bias)
    return y.view(*x.shape[:-1], weight.shape[0])


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, number: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("raysparse::linear_backward", mutates_args=(), device_types=("cpu", "cuda"))
def _linear_backward(dy: Tensor, x: Tensor, weight: Tensor, number: Tensor, of_input: bool, of_weight: bool) -> tuple[Tensor, Tensor]:
    """Gradients of the input [..., in] and of the weight [out, in]; empty tensors where not asked for."""
    layer = _layer(weight, number)
    rows_dy, rows_x = _rows(dy), _rows(x)
    dx, dw = x.new_empty(0), x.new_empty(0)
    if of_input and layer.skips(Use.BACKWARD, dy.dtype):
        dx = layer.stream(Use.BACKWARD, weight).multiply(rows_dy).view(x.shape)
    elif of_input:
        dx = (rows_dy @ weight).view(x.shape)
    if of_weight and layer.dense_gradient:
        dw = rows_dy.t() @ rows_x
    elif of_weight and layer.skips(Use.GRADIENT, dy.dtype):
        dw = layer.stream(Use.GRADIENT).gradient(rows_x, rows_dy)
    elif of_weight:
        dw = layer.live(rows_dy.t() @ rows_x)
    return dx, dw


@_linear_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, number: Tensor, of_input: bool, of_weight: bool) -> tuple[Tensor, Tensor]:
    dx = x.new_empty(x.shape) if of_input else x.new_empty(0)
    return dx, (weight.new_empty(weight.shape) if of_weight else x.new_empty(0))


def _save(ctx, inputs, output) -> None:
    x, weight, bias, number = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, number)


def _differentiate(ctx, dy: Tensor):
    x, weight, number = ctx.saved_tensors
    of_input, of_weight, of_bias, _ = ctx.needs_input_grad
    dx, dw = torch.ops.raysparse.linear_backward(dy, x, weight, number, of_input, of_weight)
    db = dy.sum_to_size(dy.shape[-1]) if ctx.has_bias and of_bias else None
    return (dx if of_input else None), (dw if of_weight else None), db, None


_linear.register_autograd(_differentiate, setup_context=_save)
for _device in ("cpu", "cuda"):
    torch.library.register_autocast("raysparse::linear", _device, torch.bfloat16)


def _layer(weight: Tensor, number: Tensor) -> SparseLinear:
    layer = _LAYERS.get(int(number))
    if layer is None:
        raise RuntimeError("Expected a layer that lives until its backward pass. Got one that is gone. Keep a reference to its model.")
    check(weight.shape == (layer.out_features, layer.in_features), tuple(weight.shape))
    return layer


def _rows(x: Tensor) -> Tensor:
    """[..., n] -> [tokens, n], contiguous."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()
