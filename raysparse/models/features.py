"""What the blocks of a model give, seen by hooks (transformers' own ``output_hidden_states`` differs between models in where it looks),
and logits of some tokens alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from raysparse.models.build import blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class BlockOutputs:
    """Of one model. Install it before the model is compiled or sharded.

    Attributes:
        num_encoder: blocks of an encoder, which come first; 0 where there is none.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        self._found: list[Tensor] | None = None
        found = blocks(model)
        inside = {id(module) for module in model.get_encoder().modules()} if model.config.is_encoder_decoder else set()
        self.num_encoder = sum(id(block) in inside for block in found.values())
        for block in found.values():
            block.register_forward_hook(self._note)

    @contextmanager
    def noted(self) -> Iterator[list[Tensor]]:
        """Gives a list that a forward pass inside fills with the output of each block, [rows, length, width], in order.

        Outside nothing is noted: not in a validation, nor when a block is computed again in a backward pass.
        """
        self._found = found = []
        try:
            yield found
        finally:
            self._found = None

    @torch.compiler.disable
    def _note(self, block: nn.Module, args: Any, output: Any) -> Any:
        if self._found is None:
            return output
        features, *rest = output if isinstance(output, tuple) else (output,)
        self._found.append(features)
        alias = features.view_as(features)  # gradients of what follows are added up before that of the noted one, sharded or not
        return (alias, *rest) if isinstance(output, tuple) else alias


class ChosenLogits:
    """Of one model: logits of chosen tokens alone. Install it before the model is sharded.

    The head of a small model is more than half of its forward pass, and of a task's tokens those of the answers alone are predicted.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        self._chosen: Tensor | None = None
        head: Any = model.get_output_embeddings()
        head.register_forward_pre_hook(self._choose)

    @contextmanager
    def of(self, chosen: Tensor) -> Iterator[None]:
        """Inside, the model's logits are [chosen tokens, vocabulary]; ``chosen`` is [rows, length] bool."""
        self._chosen = chosen
        try:
            yield
        finally:
            self._chosen = None

    @torch.compiler.disable
    def _choose(self, head: nn.Module, args: Any) -> Any:
        return args if self._chosen is None else (args[0][self._chosen],)
