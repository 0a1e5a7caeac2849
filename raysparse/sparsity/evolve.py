"""Drop and grow: one update of a topology, exact at any number of ranks.

For each layer with n live units (weights, or blocks), n' planned and a drop fraction f (arXiv:2408.11746, as its code has it)::

    drop   d = max(floor(f n), n - n')    the live units with the smallest keep score
    grow   n' - (n - d)                   the best of the units that are now dead, the d dropped ones included

so that exactly n' live after it, in one update. A unit that is dropped and grown in the same update never died: it keeps its
value and its moments; any other grown weight starts at 0. Where the pattern has groups, no group ever gets more than its share,
n' / groups: the best units within that limit are chosen (a partition matroid, on which choosing greedily is optimal).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import floor, prod

import torch
from torch import Tensor

from raysparse.sparsity import counter
from raysparse.sparsity.agenda import Agenda, TopologyUpdate
from raysparse.sparsity.curve import decimal
from raysparse.sparsity.distribution import Shape
from raysparse.sparsity.pattern import Pattern
from raysparse.sparsity.ranks import Ranks
from raysparse.sparsity.select import Keys, top_masks
from raysparse.sparsity.topology import Rows, Topology
from raysparse.sparsity.view import WeightView

PIECE = 1 << 20
"""Weights that are scored at a time on CPUs: their scores stay in cache."""


@dataclass(frozen=True)
class Proposal:
    """New masks, with what the selection said about them, for the audit.

    Attributes:
        masks: name -> [rows, cols] bool.
        dropped, grown: name -> [rows, cols] bool: what the selections chose; absent where the layer was left as it is.
    """

    masks: dict[str, Tensor]
    dropped: dict[str, Tensor]
    grown: dict[str, Tensor]


def first_topology(agenda: Agenda, rows: Mapping[str, Rows], values: Mapping[str, Tensor], ranks: Ranks) -> Topology:
    """The topology that a run begins with: exactly ``agenda.plan(0)`` live weights, the best by ``rule.first_score``.

    Random for all rules but those that prune (SPDF, arXiv:2303.10464, section 2.1): a weight lives if its key, a function of
    (seed, name, element), is among the nnz largest. Every rank calls this; the result does not depend on how many there are.

    Args:
        rows: name -> this rank's rows of each sparse weight.
        values: name -> [rows, cols].
    """
    rule, pattern, nnz = agenda.spans[0].rule, agenda.sparsity.pattern, agenda.plan(0)
    views = [
        _view(values[name], values[name].new_empty(0), here, pattern, counter.key(agenda.seed, "mask", name)) for name, here in rows.items()
    ]
    device = next((view.value.device for view in views), None)
    ones = torch.ones(max((view.count for view in views), default=0), dtype=torch.bool, device=device)  # one for all: it stays in the cache
    everything = [ones[: view.count] for view in views]
    counts = [nnz[name] // pattern.size_of_unit for name in rows]
    room = [_room(nnz[name], agenda.shapes[name], rows[name], pattern, view.value.device) for name, view in zip(rows, views, strict=True)]
    keys = _keys(rule.first_score, views, pattern, ranks)
    among = [prod(pattern.units(agenda.shapes[name])) for name in rows] if rule.draws_first else None
    chosen = _choose(keys, everything, counts, room, ranks, among)
    masks = {name: _weights(mask, rows[name], pattern) for name, mask in zip(rows, chosen, strict=True)}
    return Topology(agenda.shapes, rows, masks)


def propose(
    agenda: Agenda,
    update: TopologyUpdate,
    topology: Topology,
    live: Mapping[str, int],
    values: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    ranks: Ranks,
) -> Proposal:
    """The masks after an update; nothing is changed yet.

    Args:
        live: live weights of each layer over all ranks, as the topology has them.
        values: name -> [rows, cols], zero where dead.
        gradients: name -> [rows, cols], the mean gradient, dense; read where the rule does.

    Every rank calls this with the same update.
    """
    rule, pattern = agenda.span(update.step).rule, agenda.sparsity.pattern
    keep, grow = _counts(update, live, topology.shapes, pattern)
    names, here = list(keep), [topology.rows[name] for name in keep]
    views = [
        _view(
            values[name],
            gradients[name] if rule.reads_gradient else values[name].new_empty(0),
            topology.rows[name],
            pattern,
            counter.key(update.seed, "grow", update.version, name),
        )
        for name in names
    ]
    before = [_units(topology.masks[name], pattern) for name in names]
    room = [
        _room(update.nnz[name], topology.shapes[name], rows, pattern, mask.device)
        for name, rows, mask in zip(names, here, before, strict=True)
    ]
    keys = _keys(rule.keep_score, views, pattern, ranks)
    kept = _choose(keys, before, list(keep.values()), room, ranks)
    taken, left, dead = kept, list(grow.values()), [prod(pattern.units(topology.shapes[name])) - keep[name] for name in names]
    parts = rule.grow_scores(views[0]) if any(left) else []  # their shares and kinds are the same for all weights
    for part, (share, score) in enumerate(parts):
        last = part == len(parts) - 1
        counts = [count if last else floor(decimal(share) * grow[name]) for count, name in zip(left, names, strict=True)]
        free = [None if r is None else r - _by_group(mask, rows, pattern) for r, mask, rows in zip(room, taken, here, strict=True)]
        keys = _keys(lambda view, part=part: rule.grow_scores(view)[part][1], views, pattern, ranks)
        chosen = _choose(keys, [~mask for mask in taken], counts, free, ranks, None if score.is_floating_point() else dead)
        taken = [old | new for old, new in zip(taken, chosen, strict=True)]
        left, dead = ([a - b for a, b in zip(many, counts, strict=True)] for many in (left, dead))
    masks = dict(topology.masks)
    dropped, came = {}, {}
    for name, rows, old, stays, new in zip(names, here, before, kept, taken, strict=True):
        masks[name] = _weights(new, rows, pattern)
        dropped[name] = _weights(old & ~stays, rows, pattern)
        came[name] = _weights(new & ~stays, rows, pattern)
    return Proposal(masks, dropped, came)


def _counts(
    update: TopologyUpdate, live: Mapping[str, int], shapes: Mapping[str, Shape], pattern: Pattern
) -> tuple[dict[str, int], dict[str, int]]:
    """Units that each layer keeps, and grows, over all ranks; layers that stay as they are, are absent."""
    keep, grow = {}, {}
    for name, shape in shapes.items():
        n, planned = live[name] // pattern.size_of_unit, update.nnz[name] // pattern.size_of_unit
        drop = max(floor(decimal(update.drop_fraction) * n), n - planned)
        dense = n == planned == prod(pattern.units(shape))
        if not dense and (drop > 0 or planned > n):
            keep[name], grow[name] = n - drop, planned - (n - drop)
    return keep, grow


def has_grain(mask: Tensor, pattern: Pattern) -> bool:
    """Whether a whole [rows, cols] mask is made of the pattern's units, equally many of them in each group."""
    rows, units = Rows(0, *mask.shape), _units(mask, pattern)
    counts = _by_group(units, rows, pattern) if pattern.group(rows.cols) else units[:0]
    return torch.equal(_weights(units, rows, pattern), mask) and bool((counts == counts[:1]).all())


def _view(value: Tensor, grad: Tensor, rows: Rows, pattern: Pattern, key: int) -> WeightView:
    height, width = pattern.unit[0], rows.cols // pattern.unit[1]
    return WeightView(value, grad, rows.first // height * width, rows.count // height * width, key)


def _units(mask: Tensor, pattern: Pattern) -> Tensor:
    """[rows, cols] bool of weights -> [units] bool."""
    return mask[:: pattern.unit[0], :: pattern.unit[1]].contiguous().flatten()


def _weights(units: Tensor, rows: Rows, pattern: Pattern) -> Tensor:
    """The inverse of `_units`."""
    height, width = pattern.unit
    grid = units.view(rows.count // height, rows.cols // width)
    return grid if height * width == 1 else grid.repeat_interleave(height, 0).repeat_interleave(width, 1)


def _keys(score: Callable[[WeightView], Tensor], views: Sequence[WeightView], pattern: Pattern, ranks: Ranks) -> Keys:
    """Gives for each layer [units] int32 whose lower 31 bits order as the magnitudes of the scores do; integers are keys already.

    Scores of single weights are made some rows at a time and whenever they are asked for: in the cache, that is cheaper than to keep them.
    """
    if pattern.size_of_unit == 1:
        return lambda i: (_bits(score(view)) for view in _pieces(views[i]))
    scores = [score(view) for view in views]
    if scores and scores[0].is_floating_point():
        scores = _block_sums([score.abs() for score in scores], pattern.unit, ranks)
    return lambda i: [_bits(scores[i])]


def _pieces(view: WeightView) -> Iterator[WeightView]:
    """Consecutive rows; on a GPU all of them at once."""
    rows, cols = view.value.shape
    each = max(1, rows if view.value.device.type == "cuda" else PIECE // max(1, cols))
    for start in range(0, max(1, rows), each):
        value, grad = view.value[start : start + each], view.grad[start : start + each]
        yield WeightView(value, grad, view.first + start * cols, value.numel(), view.key)


def _bits(score: Tensor) -> Tensor:
    return score.float().contiguous().view(torch.int32).flatten() if score.is_floating_point() else score


def _block_sums(scores: Sequence[Tensor], unit: tuple[int, int], ranks: Ranks) -> list[Tensor]:
    """[rows, cols] scores >= 0 -> [rows / height, cols / width] sums, bit-equal however rows are spread or summed.

    Scores are scaled by a power of two that fits the largest of the weight and added as 62-bit integers, which is associative.
    """
    peaks = torch.tensor([float(score.max()) if score.numel() else 0.0 for score in scores], dtype=torch.float64)
    peaks = ranks.max(peaks.nan_to_num(0.0, 0.0, 0.0))
    height, width = unit
    exponents = 61 - ((height * width).bit_length() - 1) - torch.frexp(peaks)[1]
    sums = []
    for score, exponent in zip(scores, exponents, strict=True):
        rows, cols = score.shape
        whole = torch.ldexp(score.double(), exponent.to(score.device)).round().long()
        sums.append(whole.view(rows // height, height, cols // width, width).sum((1, 3)).float())
    return sums


def _room(nnz: int, shape: tuple[int, ...], rows: Rows, pattern: Pattern, device: torch.device) -> Tensor | None:
    """[groups here] int64: units that may live in each group; None where there are no groups."""
    groups = pattern.num_groups((shape[0], shape[1]))
    if groups == 0:
        return None
    here = rows.count * rows.cols // pattern.size_of_unit // pattern.group(rows.cols)
    return torch.full((here,), nnz // pattern.size_of_unit // groups, device=device)


def _by_group(mask: Tensor, rows: Rows, pattern: Pattern) -> Tensor:
    """[groups here] int64: units in each group."""
    return mask.view(-1, pattern.group(rows.cols)).sum(1)


def _choose(
    keys: Keys,
    eligible: Sequence[Tensor],
    counts: Sequence[int],
    room: Sequence[Tensor | None],
    ranks: Ranks,
    among: Sequence[int] | None = None,
) -> list[Tensor]:
    """For each layer [units] bool: the `counts` best eligible units over all ranks, at most `room` in a group.

    Args:
        among: how many are eligible over all ranks, where keys are random.
    """
    allowed = [
        mask if limit is None else _best_in_group(torch.cat([*keys(i)]), mask, limit)
        for i, (mask, limit) in enumerate(zip(eligible, room, strict=True))
    ]
    grouped = any(limit is not None for limit in room)
    return top_masks(keys, allowed, counts, ranks, None if grouped else among)


def _best_in_group(keys: Tensor, eligible: Tensor, limit: Tensor) -> Tensor:
    """[units] bool: the `limit` ([groups]) largest eligible of each group (ties: the earlier)."""
    ranked = ((keys & 0x7FFFFFFF) | (eligible.int() - 1)).view(len(limit), len(keys) // max(1, len(limit)))  # what is not eligible: -1
    order = ranked.argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(1, order, torch.arange(ranked.shape[1], device=keys.device).expand_as(order))
    return eligible & (place < limit.unsqueeze(1)).flatten()
