"""What the layers of a trained model read, block by block, each on what the blocks before it give as they are by then.

The model's own forward does the work, so that nothing has to be known of how blocks are called: those that are done answer with what the
last of them gave, unrun, and the forward ends behind the block in question. A walk costs two passes through each block, and the
embeddings once more for each.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raysparse.config import ConfigError
from raysparse.data.calibration import Chunk
from raysparse.models.build import blocks
from raysparse.models.multiplied import sees_source


class _Done(Exception):
    """The block in question has answered; the rest of the forward is not needed."""


class BlockWalk:
    """A walk over the blocks of a model in evaluation mode, in order.

    Attributes:
        layers: name of a block -> the linear layers in it, by the names of their weights.
    """

    def __init__(self, model: nn.Module, chunks: Sequence[Chunk], weights: Sequence[str]) -> None:
        """Args:
        chunks: this rank's samples, on the device of the model.
        weights: those that are of interest, as in ``named_parameters``.

        Raises:
            ConfigError: a weight that no linear layer of a block multiplies its inputs by.
        """
        self.model, self.chunks, self._blocks = model, chunks, blocks(model)
        names = {id(parameter): name for name, parameter in model.named_parameters() if name in set(weights)}
        self._of_source = sees_source(model, weights)
        self.layers = {
            block: {names[id(m.weight)]: m for m in module.modules() if isinstance(m, nn.Linear) and id(m.weight) in names}
            for block, module in self._blocks.items()
        }
        if missing := [name for name in weights if not any(name in own for own in self.layers.values())]:
            raise ConfigError(
                f"Expected linear layers inside the blocks of {type(model).__name__}, whose inputs calibration can see. Got {missing[0]}"
                f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}. Leave them out with sparsity.exclude, or use "
                "method.type=magnitude, which looks at no inputs."
            )
        self._answers: list[dict[str, Any]] = [{} for _ in chunks]  # of each chunk: group -> what its last finished block gave
        self._finished: list[str] = []

    @torch.no_grad()
    def statistics(self, block: str, of: Callable[[Tensor], Tensor]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Of each chunk its number, and for each layer of the block `of` its [tokens, cols] float32 inputs, padding left out.

        Where a layer is called several times in a forward, what `of` gives is added up; one that is not called is absent.
        """
        for position, chunk in enumerate(self.chunks):
            found: dict[str, Tensor] = {}

            def see(name: str, inputs: Tensor, chunk: Chunk = chunk, found: dict[str, Tensor] = found) -> None:
                new = of(_tokens(name, inputs, chunk.source_real if name in self._of_source else chunk.real))
                found[name] = found[name] + new if name in found else new

            hooks = [
                layer.register_forward_pre_hook(lambda _, args, name=name, see=see: see(name, args[0]))
                for name, layer in self.layers[block].items()
            ]
            try:
                self._answer(block, position)
            finally:
                for hook in hooks:
                    hook.remove()
            yield chunk.number, found

    @torch.no_grad()
    def finish(self, block: str) -> None:
        """The block is as it is to be: keep what it gives to those behind it."""
        for position in range(len(self.chunks)):
            self._answers[position][_group(block)] = self._answer(block, position)
        self._finished.append(block)

    def _answer(self, block: str, position: int) -> Any:
        """What a block gives on a chunk."""
        found: list[Any] = []

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            found.append(output)
            raise _Done

        hook = self._blocks[block].register_forward_hook(stop)
        for name in self._finished:
            answer = self._answers[position][_group(name)]
            self._blocks[name].forward = lambda *args, answer=answer, **kwargs: answer
        try:
            self.model(**self.chunks[position].inputs)
        except _Done:
            pass
        finally:
            hook.remove()
            for name in self._finished:
                del self._blocks[name].forward  # the class's own again
        assert found, f"{block} was not called"
        return found[0]


def _group(block: str) -> str:
    """The list that a block is an entry of: an encoder's blocks, say."""
    return block.rpartition(".")[0]


def _tokens(name: str, inputs: Tensor, real: Tensor | None) -> Tensor:
    """[tokens, cols] float32: without padding."""
    tokens = inputs.flatten(0, -2).float()
    if real is None:
        return tokens
    if len(tokens) != real.numel():
        raise ConfigError(
            f"Expected the layer of {name} to read the {real.numel()} positions of its samples, so that padding can be left out. Got "
            f"{len(tokens)}. Use calibration.batch=1, which pads nothing."
        )
    return tokens[real.flatten()]
