"""The masks of a model: which weights live. Sharded by rows, exactly like the weights."""

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from raysparse.kernels.bits import kill
from raysparse.kernels.live import Live
from raysparse.sparsity import counter
from raysparse.sparsity.distribution import Shape
from raysparse.sparsity.ranks import Ranks


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
        ever: name -> [rows, cols] bool, True = was alive in this or an earlier version; masks that never change share its memory.
    """

    def __init__(self, shapes: Mapping[str, Shape], rows: Mapping[str, Rows], masks: Mapping[str, Tensor]):
        self.shapes, self.rows = dict(shapes), dict(rows)
        self._live: dict[str, Live] = {}
        self.replace(masks, masks)

    def replace(self, masks: Mapping[str, Tensor], ever: Mapping[str, Tensor]) -> None:
        """Other masks for the same weights, and which weights were ever alive."""
        self._live = {name: live for name, live in self._live.items() if masks[name] is self.masks[name]}
        self.masks, self.ever = dict(masks), dict(ever)

    def evolve(self, masks: Mapping[str, Tensor]) -> None:
        """The next version of the topology."""
        ever = {name: self.ever[name] if mask is self.masks[name] else self.ever[name] | mask for name, mask in masks.items()}
        self.replace(masks, ever)

    def live(self, name: str) -> Live:
        """The live weights of this rank's rows, to be taken out and put back; made when they are first asked for."""
        if name not in self._live:
            self._live[name] = Live(self.masks[name])
        return self._live[name]

    @torch.no_grad()
    def kill(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the dead entries of this rank's rows to +0, in place; tensors that have no mask stay, and any may be absent."""
        for name, mask in self.masks.items():
            if name in tensors:
                kill(tensors[name], mask)

    @torch.no_grad()
    def leaks(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Names of the tensors that are not exactly 0 at a dead entry."""
        return [name for name, tensor in tensors.items() if bool(((tensor != 0) & ~self.masks[name]).any())]

    def nnz(self, ranks: Ranks) -> dict[str, int]:
        """Live weights of each layer over all ranks."""
        counts = torch.tensor([int(mask.sum()) for mask in self.masks.values()], dtype=torch.int64)
        return dict(zip(self.masks, ranks.sum(counts).tolist(), strict=True))

    def digest_sums(self, masks: Mapping[str, Tensor] | None = None) -> Tensor:
        """[layers] int64: of each layer the sum modulo 2^64 of `counter.mix` over the indices that are True here.

        Sums of the ranks that share a weight add up (modulo 2^64) to the whole weight's; it does not matter how many there are.

        Args:
            masks: of these instead of the live weights; a layer that is absent counts 0.
        """
        masks = self.masks if masks is None else masks
        sums = torch.zeros(len(self.masks), dtype=torch.int64)
        for i, name in enumerate(self.masks):
            if name not in masks:
                continue
            first, key = self.rows[name].first * self.rows[name].cols, counter.key("digest", name)
            for start, part in zip(itertools.count(first, counter.CHUNK), masks[name].flatten().split(counter.CHUNK), strict=False):
                sums[i] += counter.mix(part.nonzero().flatten() + start, key).sum().cpu()
        return sums

    def checksums(self) -> Tensor:
        """[layers] int64 that one or two elements of the masks here never change unnoticed; a tenth of the time of `digest_sums`.

        The sum modulo 2^64 of w_i (2 i + 1), w_i the 8-byte word i plus its upper half: an element that changes adds +-2^k (2 i + 1) or
        +-2^k (2^32 + 1) (2 i + 1), k <= 24, and in a layer of less than 2^33 elements no two of these add up to 0.
        """
        sums, chunk = torch.zeros(len(self.masks), dtype=torch.int64), 1 << 15  # words that stay in a core's cache
        for i, mask in enumerate(self.masks.values()):
            flat = mask.flatten().view(torch.uint8)
            words = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(torch.int64) if len(flat) % 8 else flat.view(torch.int64)
            odd = 2 * torch.arange(min(chunk, len(words)), device=mask.device) + 1
            for start, part in zip(itertools.count(0, chunk), words.split(chunk), strict=False):
                part = part + (part >> 32)
                sums[i] += ((part * odd[: len(part)]).sum() + 2 * start * part.sum()).cpu()
        return sums

    def digest(self, ranks: Ranks) -> str:
        """Names which weights live, in 32 hex digits: a hash of the whole layers' `digest_sums`."""
        sums = ranks.sum(self.digest_sums()).tolist()
        text = "\n".join(f"{name} {value}" for name, value in zip(self.masks, sums, strict=True))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
