"""What the blocks of a model give, seen by hooks: transformers' own ``output_hidden_states`` differs between models in where it looks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from raysparse.models.build import blocks


class BlockOutputs:
    """Of one model. Install it before the model is compiled or sharded."""

    def __init__(self, model: nn.Module) -> None:
        self._found: list[Tensor] | None = None
        for block in blocks(model).values():
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
