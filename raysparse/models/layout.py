"""One layout for every weight matrix: ``nn.Linear``'s [out, in].

GPT-2 of transformers keeps its matrices in ``Conv1D`` modules, [in, out]. Masks, N:M patterns, kernels and reports speak of
rows = outputs, so a model is turned to `nn.Linear` when it is built and turned back when it is exported.

Rounding: with equal values ``Linear`` and ``Conv1D`` may differ in the last bit, because a matrix product picks its summation
order by the memory order of its operands; for a single row also by their alignment, and a weight that transformers maps from a
file need not be aligned to 64 bytes. Bit-equal logits are therefore a promise between models of one layout in memory of their
own, such as `build` returns.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

M = TypeVar("M", bound=nn.Module)


def to_linear(model: M) -> M:
    """Replace every ``Conv1D`` by an `nn.Linear` with the transposed weight, in place; returns the model.

    Works on the meta device, draws no random numbers, keeps dtype, ``requires_grad`` and the bias parameter itself.
    """
    from transformers.pytorch_utils import Conv1D

    for parent in [module for module in model.modules() if not isinstance(module, Conv1D)]:  # a list of all would keep the old weights
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                setattr(parent, name, _linear(child.weight, child.bias))
    return model


def to_hub(state: Mapping[str, Tensor], model: "PreTrainedModel") -> dict[str, Tensor]:
    """A state dict in the layout and with the names that transformers stores: its ``from_pretrained`` reads it.

    Weights of ``Conv1D`` modules are transposed back to [in, out]; of tied parameters only the one that transformers keeps is
    left. Values are copied bit for bit, so zeros stay zeros.

    Args:
        state: full tensors, [out, in], under the names of ``model.state_dict()``.
        model: tells class and config; its own layout and device do not matter, and it may be sharded.
    """
    twin = hub_skeleton(model)
    turned = conv1d_weights(twin)
    tied: Mapping[str, str] = twin.all_tied_weights_keys
    stored: dict[str, Tensor] = {}
    for name, value in state.items():
        kept = tied.get(name, name)
        if kept in stored or (kept != name and kept in state):
            assert torch.equal(value, state[kept] if kept in state else stored[kept]), f"{name} is no longer tied to {kept}"
            continue
        stored[kept] = value.t().contiguous() if kept in turned else value.contiguous()
    expected = {tied.get(name, name) for name in twin.state_dict()}
    assert stored.keys() == expected, f"state dict does not fit the model: {sorted(stored.keys() ^ expected)}"
    return stored


def hub_skeleton(model: "PreTrainedModel") -> "PreTrainedModel":
    """The same model as transformers builds it (``Conv1D`` and all), on the meta device."""
    own = next(kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers."))  # FSDP2 subclasses it
    with torch.device("meta"):
        return own(model.config)


def conv1d_weights(model: nn.Module) -> set[str]:
    """Names of the weights that transformers keeps as [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}


def _linear(weight: nn.Parameter, bias: nn.Parameter) -> nn.Linear:
    """``x @ weight + bias`` as a Linear. weight: [in, out]."""
    linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta")
    linear.weight = nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)
    linear.bias = bias
    return linear
