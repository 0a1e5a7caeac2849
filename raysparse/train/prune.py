"""Prune a trained model at once: ranks share the samples, then the layers of a block, and all end with the same bits.

Each rank has the whole model. A rank runs its chunks of samples through a block and adds up what the rule wants to know of the inputs
(`Total`: the same bits at any number of ranks), each layer goes to one rank, which prunes it, and back to all.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raysparse.config import ConfigError
from raysparse.data.calibration import Chunk
from raysparse.kernels.bits import pack, unpack
from raysparse.models.walk import BlockWalk
from raysparse.sparsity.pattern import Pattern
from raysparse.sparsity.plan import SparsityPlan
from raysparse.sparsity.pruning import Layer, Pruner, Total
from raysparse.train.process import gathered


@torch.no_grad()
def prune_model(
    model: Any,
    rule: Pruner,
    plan: SparsityPlan,
    pattern: Pattern,
    live: Mapping[str, Tensor],
    chunks: Sequence[Chunk],
    show: Callable[[str], None],
) -> dict[str, Tensor]:
    """Prune the weights of the plan, in place; returns their bit-packed masks. Every rank calls this.

    Args:
        model: whole on each rank, in evaluation mode.
        live: name -> bit-packed mask of what lives now, see `check_live`.
        chunks: this rank's consecutive ones of those that all ranks have together.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in plan.shapes}

    def settle(names: Sequence[str], statistics: Mapping[str, Total]) -> dict[str, Tensor]:
        layers = {
            name: Layer(parameters[name].detach(), unpack(live[name], plan.shapes[name][1]).to(model.device), plan.nnz[name], pattern)
            for name in names
        }
        return _settle(rule, layers, statistics)

    names = list(plan.shapes)
    masks: dict[str, Tensor] = {}
    if not rule.reads_inputs:
        for first in range(0, len(names), dist.get_world_size()):  # one layer for each rank at a time
            masks |= settle(names[first : first + dist.get_world_size()], {})
        return masks
    walk = BlockWalk(model, chunks, names)
    for number, (block, layers) in enumerate(walk.layers.items(), 1):
        if layers:
            masks |= settle(list(layers), _statistics(walk, block, rule))
            show(f"{block} is pruned, {number} of {len(walk.layers)} blocks")
        if number < len(walk.layers):
            walk.finish(block)
    return {name: masks[name] for name in names}


def check_live(plan: SparsityPlan, pattern: Pattern, live: Mapping[str, Tensor]) -> None:
    """Raise a `ConfigError` unless the plan takes weights away from what lives, and gives none back.

    Args:
        live: name -> bit-packed mask; layers without one are not looked at.
    """
    for name, shape in plan.shapes.items():
        if name not in live:
            continue
        mask, size = unpack(live[name], shape[1]), prod(shape)
        have, want = int(mask.sum()), plan.nnz[name]
        if want > have:
            raise ConfigError(
                f"Expected a sparsity of at least {1 - have / size:.4f} for {name}, which is so sparse already. Got {1 - want / size:.4f}: "
                "pruning brings no weight back to life. Raise sparsity.target, or prune the dense model."
            )
        if groups := pattern.num_groups(shape):
            least = int(mask.view(groups, -1).sum(1).min())
            if least < want // groups:
                raise ConfigError(
                    f"Expected {want // groups} live weights in each group of {name} for pattern {pattern.model_dump()}. Got {least} in "
                    "one: pruning brings no weight back to life. Prune the dense model."
                )


def _statistics(walk: BlockWalk, block: str, rule: Pruner) -> dict[str, Total]:
    """Of this rank's chunks."""
    totals = {name: Total() for name in walk.layers[block]}
    for number, found in walk.statistics(block, rule.statistic):
        for name, total in totals.items():
            if name in found:
                total.add(number, found[name])
    return totals


def _settle(rule: Pruner, layers: Mapping[str, Layer], statistics: Mapping[str, Total]) -> dict[str, Tensor]:
    """Each layer is pruned by one rank, the most expensive ones by different ranks, and sent to all; returns their bit-packed masks."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    by_cost = sorted(layers, key=lambda name: -layers[name].weight.shape[1])
    owners = {name: number % world_size for number, name in enumerate(by_cost)}
    whole = _handed_over(statistics, owners)
    mine: dict[str, tuple[Tensor, Tensor]] = {}
    problems = []
    for name in (name for name, owner in owners.items() if owner == rank):
        statistic = whole[name].value() if rule.reads_inputs else None
        try:
            if statistic is not None and not statistic.isfinite().all():
                raise torch.linalg.LinAlgError("inputs that are not finite.")
            mine[name] = rule.prune(layers[name], statistic)
        except torch.linalg.LinAlgError as error:
            problems.append(f"{name}: {error}")
        whole.pop(name, None)
    if found := [problem for some in gathered(problems) for problem in some]:
        raise ConfigError(
            f"Expected finite inputs of every layer, and a Hessian that is positive definite. Got {found[0]} Raise method.damping, or look "
            "at the model: its activations may overflow."
        )
    masks = {}
    for name, owner in owners.items():
        weight, empty = layers[name].weight, torch.zeros_like(layers[name].live)
        pruned, mask = mine.pop(name, (weight, empty))
        bits = pack(mask)
        weight.copy_(pruned)
        dist.broadcast(weight, owner)
        dist.broadcast(bits, owner)
        masks[name] = bits.cpu()
    return {name: masks[name] for name in layers}


def _handed_over(statistics: Mapping[str, Total], owners: Mapping[str, int]) -> dict[str, Total]:
    """All ranks' nodes of the layers that are this rank's."""
    rank = dist.get_rank()
    known = gathered({name: [(*node, tuple(value.shape)) for node, value in total.nodes.items()] for name, total in statistics.items()})
    if unseen := [name for name in statistics if not any(nodes[name] for nodes in known)]:
        raise ConfigError(
            f"Expected calibration samples to pass through every layer. Got none through {unseen[0]}. Use more samples, or leave it out "
            "with sparsity.exclude."
        )
    whole: dict[str, Total] = {}
    for name, total in statistics.items():
        owner = owners[name]
        for source, nodes in enumerate(known):
            for level, number, shape in nodes[name]:
                if source == rank and owner != rank:
                    dist.send(total.nodes.pop((level, number)), owner)
                if owner == rank:
                    value = total.nodes[level, number] if source == rank else torch.empty(shape, device=_device())
                    if source != rank:
                        dist.recv(value, source)
                    whole.setdefault(name, Total()).add(number, value, level)
    return whole


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"
