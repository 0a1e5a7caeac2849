"""The masks of a model: which weights live. Sharded by rows, exactly like the weights."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raysparse.sparsity import counter
from raysparse.sparsity.distribution import Shape
from raysparse.sparsity.plan import SparsityPlan
from raysparse.sparsity.ranks import Ranks
from raysparse.sparsity.select import top_masks

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element -> the integer type that sees its bits."""


@dataclass(frozen=True)
class Rows:
    """The consecutive rows of one [rows, cols] weight that a rank holds."""

    first: int
    count: int
    cols: int


class Topology:
    """The live weights, this rank's rows of them.

    Attributes:
        shapes: whole shape of each sparse weight, in model order.
        rows: which rows of it are here.
        masks: name -> [rows, cols] bool, True = live.
    """

    def __init__(self, shapes: Mapping[str, Shape], rows: Mapping[str, Rows], masks: Mapping[str, Tensor]):
        self.shapes, self.rows = dict(shapes), dict(rows)
        self.replace(masks)

    def replace(self, masks: Mapping[str, Tensor]) -> None:
        """Other masks for the same weights."""
        self.masks = dict(masks)

    @classmethod
    def random(cls, plan: SparsityPlan, rows: Mapping[str, Rows], seed: int, ranks: Ranks, device="cpu") -> "Topology":
        """Draw exactly ``plan.nnz`` live weights in each layer, uniformly at random (SPDF, arXiv:2303.10464, section 2.1).

        A weight lives if its random key, a function of (seed, layer name, element), is among the layer's nnz largest. Every
        rank calls this; the drawn weights do not depend on how many ranks there are.
        """
        keys = [
            counter.random_keys(here.first * here.cols, here.count * here.cols, counter.key(seed, "mask", name), device)
            for name, here in rows.items()
        ]
        flat = top_masks(keys, [plan.nnz[name] for name in rows], ranks)
        masks = {name: mask.view(rows[name].count, rows[name].cols) for name, mask in zip(rows, flat, strict=True)}
        return cls(plan.shapes, rows, masks)

    @torch.no_grad()
    def kill(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the dead entries of [rows, cols] tensors to +0, in place; a NaN or infinity there is gone too.

        The bits are multiplied by 0 or 1 as integers: six times faster on CPUs than masked_fill_ or torch.where.
        """
        for name, tensor in tensors.items():
            tensor.view(_INTEGERS[tensor.element_size()]).mul_(self.masks[name])

    @torch.no_grad()
    def leaks(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Names of the tensors that are not exactly 0 at a dead entry."""
        return [name for name, tensor in tensors.items() if bool(((tensor != 0) & ~self.masks[name]).any())]

    def nnz(self, ranks: Ranks) -> dict[str, int]:
        """Live weights of each layer over all ranks."""
        counts = torch.tensor([int(mask.sum()) for mask in self.masks.values()], dtype=torch.int64)
        return dict(zip(self.masks, ranks.sum(counts).tolist(), strict=True))

    def digest(self, ranks: Ranks) -> str:
        """Names which weights live, in 32 hex digits; equal masks have equal digests at any number of ranks.

        For each layer the sum modulo 2^64 of `counter.mix` over the live element indices; a hash of all of them.
        """
        sums = torch.zeros(len(self.masks), dtype=torch.int64)
        for i, (name, mask) in enumerate(self.masks.items()):
            live = mask.flatten().nonzero().flatten() + self.rows[name].first * self.rows[name].cols
            sums[i] = counter.mix(live, counter.key("digest", name)).sum().cpu()
        text = "\n".join(f"{name} {value}" for name, value in zip(self.masks, ranks.sum(sums).tolist(), strict=True))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def pack(mask: Tensor) -> Tensor:
    """[rows, cols] bool -> [rows, ceil(cols / 8)] uint8, lowest bit first. Rows stay whole, so it shards like the weight."""
    rows, cols = mask.shape
    padded = torch.zeros(rows, -(-cols // 8) * 8, dtype=torch.uint8, device=mask.device)
    padded[:, :cols] = mask
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.unflatten(1, (-1, 8)) * weights).sum(2, dtype=torch.uint8)


def unpack(bits: Tensor, cols: int) -> Tensor:
    """The inverse of `pack`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits.unsqueeze(2) >> shifts) & 1).flatten(1)[:, :cols].bool()
