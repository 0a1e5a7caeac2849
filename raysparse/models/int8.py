"""The linear layers of a model's blocks in int8: torchao's own to score with, and the same rounding in training.

Of a layer W [out, in] that reads x [..., in], with q(v) = clamp(round(v / s), -128, 127), s = max|v| / 127.5 for each row of W or token::

    int8               y = s_x s_W (q(x) q(W)^T) + b
    int8_weight_only   y = s_W (x q(W)^T) + b

Both are symmetric: 0 is the integer 0, so what is dead stays dead, n:m or not. In training (`make_aware`) weights are floats that compute
by this rule, and get their gradients as if nothing was rounded (straight through: Bengio et al., arXiv:1308.3432). torchao's own training
does not fit: it has no symmetric rounding of tokens, and keeps a rounded copy of every weight from the forward to the backward pass.
"""

from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysparse.config import ConfigError
from raysparse.models.build import block_linears

Int8 = Literal["int8", "int8_weight_only"]
KINDS: tuple[Int8, ...] = get_args(Int8)
Quantization = Literal["none", "int8", "int8_weight_only"]

_LOWEST, _HIGHEST = -128, 127
_EPS = torch.finfo(torch.float32).eps
"""Least scale, as torchao has it."""


def check_package() -> None:
    """A `ConfigError` without torchao."""
    try:
        import torchao.quantization  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"Expected the package torchao for int8. Got: {error}. pip install 'raysparse[int8]'.") from None


@torch.no_grad()
def quantize(model: nn.Module, kind: Int8) -> dict[str, Any]:
    """Make the weights of the blocks' linear layers torchao's int8 tensors, in place: the model can only be used for inference afterwards.

    Returns:
        ``type``; ``layers``, their ``weights``, how many of them were ``live`` and how many are (``nnz``); ``rounded_to_zero``, what is
        between the two; ``lowest`` and ``highest`` integer of an activation or weight; version of ``torchao``.

    Raises:
        ConfigError: no torchao, a weight that is not finite, or a zero that came back as something else.
    """
    check_package()
    import torchao
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, PerRow, quantize_
    from torchao.quantization.quant_primitives import MappingType
    from torchao.utils import should_reduce_range

    linears = {name: model.get_submodule(name.removesuffix(".weight")) for name in block_linears(model)}
    before = {name: cast(nn.Linear, linear).weight.detach() for name, linear in linears.items()}
    for name, weight in before.items():
        if not bool(weight.isfinite().all()):
            raise ConfigError(f"Expected finite weights for {kind}. Got inf or NaN in {name}. Use weights=dense.")
    halved = kind == "int8" and should_reduce_range(next(iter(before.values())).device)  # sums of products would overflow
    config = Int8WeightOnlyConfig(granularity=PerRow(), set_inductor_config=False)
    if kind == "int8":
        config = Int8DynamicActivationInt8WeightConfig(
            act_mapping_type=MappingType.SYMMETRIC, granularity=PerRow(), set_inductor_config=False, reduce_range=halved
        )
    chosen = {id(linear) for linear in linears.values()}
    quantize_(model, config, lambda module, _: id(module) in chosen)
    live = nnz = 0
    for name, linear in linears.items():
        now: Any = linear.weight
        check_zeros(name, before[name], now.dequantize())
        live += int(before[name].count_nonzero())
        nnz += int(now.qdata.count_nonzero())
    return {
        "type": kind,
        "layers": len(linears),
        "weights": sum(weight.numel() for weight in before.values()),
        "live": live,
        "nnz": nnz,
        "rounded_to_zero": live - nnz,
        "lowest": _LOWEST // 2 if halved else _LOWEST,
        "highest": _HIGHEST // 2 if halved else _HIGHEST,
        "torchao": torchao.__version__,
    }


def check_zeros(name: str, before: Tensor, after: Tensor) -> None:
    """A `ConfigError` unless `after` is 0 wherever `before` is."""
    if lost := int(after[before == 0].count_nonzero()):
        raise ConfigError(
            f"Expected int8 weights of {name} to be 0 where the model's are. Got {lost} that are not. "
            "Use weights=dense, and the version of torchao in constraints.txt."
        )


def make_aware(model: nn.Module, kind: Quantization) -> None:
    """Let the blocks' linear layers compute as `quantize` will have them, in place, before the model is compiled or sharded; or as ever.

    Parameters and their names stay as they are. Works on the meta device, for checks.

    Raises:
        ConfigError: blocks with linear layers of a class of their own.
    """
    for name in block_linears(model) if kind != "none" else ():
        module = model.get_submodule(name.removesuffix(".weight"))
        if type(module) is not nn.Linear:
            raise ConfigError(
                f"Expected linear layers of torch's own class for quantization={kind}. Got {name} in a {type(module).__name__}. "
                "Use quantization=none."
            )
        module.__class__ = AwareLinear
        cast(AwareLinear, module).rounds_inputs = kind == "int8"


class AwareLinear(nn.Linear):
    """An `nn.Linear` that rounds its weight, and its inputs too if told so, to int8 whenever it computes. Made by `make_aware`."""

    rounds_inputs: bool

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        return cast(Tensor, _Product.apply(input.to(dtype), self.weight, self.bias, self.rounds_inputs))


class _Product(torch.autograd.Function):
    """See the top of this file. Weights are rounded anew in the backward pass: nothing of their size is kept between the two.

    Products are of whole numbers, which bfloat16 holds too; in float32 their sums are exact, in any order, up to 1,024 columns.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rounds_inputs: bool) -> Tensor:  # pyrefly: ignore[bad-override]
        ctx.save_for_backward(x, weight)
        ctx.rounds_inputs = rounds_inputs
        with torch.autocast(x.device.type, enabled=False):
            whole, scale = rounded(weight)
            inputs, its = rounded(x) if rounds_inputs else (x, None)
            y = F.linear(inputs.to(x.dtype), whole.to(x.dtype)).float()
            y = (y if its is None else y * its) * scale.flatten()
            return (y if bias is None else y + bias).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyrefly: ignore[bad-override]
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        dx = dw = None
        with torch.autocast(x.device.type, enabled=False):
            rows = dy.flatten(0, -2)
            if of_x:
                whole, scale = rounded(weight)
                dx = dy @ (whole * scale).to(dy.dtype)
            if of_weight:
                inputs, its = rounded(x) if ctx.rounds_inputs else (x, 1.0)
                dw = (rows.t() @ (inputs * its).to(dy.dtype).flatten(0, -2)).to(weight.dtype)
        return dx, dw, rows.sum(0) if of_bias else None, None


def rounded(values: Tensor) -> tuple[Tensor, Tensor]:
    """(whole numbers [..., cols], scale [..., 1]) whose product is close to `values`; float32, the bits of torchao's."""
    values = values.detach().float()
    scale = (values.abs().amax(-1, keepdim=True) / ((_HIGHEST - _LOWEST) / 2)).clamp(min=_EPS)
    return (values * (1.0 / scale)).round().clamp(_LOWEST, _HIGHEST), scale
