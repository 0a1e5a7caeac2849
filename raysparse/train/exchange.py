"""What FSDP2 sends, packed: live weights and live gradients alone. Unstructured zeros cost no bytes on the wire.

A unit of FSDP2 gathers its weights, and scatters its gradients, as one flat buffer: of every rank the rows that it holds of each
parameter, padded to as many rows on all ranks. Where masks leave out enough of it, the live elements of this buffer are sent instead,
padded to those of the rank that has most, and put back with zeros between. Values are moved and not computed, and on CPUs gradients are
added in the order of the ranks: the same bits arrive as from the whole buffer (with NCCL up to its order of summation). Gradients that
an update of the topology looks at are sent whole.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

from raysparse.kernels.library import check
from raysparse.kernels.live import Live

Mode = Literal["auto", "on", "off"]
WORTH = 0.9
"""Share of the whole buffer up to which a packed one is sent."""


class Wire:
    """Counts what this rank sends: the payload of each collective as a ring moves it, (W - 1) / W of the whole per pass.

    Attributes:
        bytes_sent: so far.
        dense_bytes: that whole buffers would have been.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Count from 0."""
        self.bytes_sent = self.dense_bytes = 0
        self._seconds = 0.0  # without those of `_events`
        self._events: deque[tuple[Any, Any]] = deque()  # of the device, not all over yet

    def add(self, whole_bytes: int, size: int, passes: int = 1, dense: int | None = None) -> None:
        """Args:
        whole_bytes: of the buffer over all `size` ranks.
        dense: the same if it is not packed; None: it is not.
        """
        self.bytes_sent += passes * whole_bytes * (size - 1) // size
        self.dense_bytes += passes * (whole_bytes if dense is None else dense) * (size - 1) // size

    @property
    def seconds(self) -> float:
        """In collectives so far, packing included: of this thread on CPUs, of the device's streams on CUDA. Waits for the device."""
        if self._events:
            self._events[-1][1].synchronize()
        self._settle()
        return self._seconds

    @property
    def so_far(self) -> tuple[int, int, float]:
        """(bytes_sent, dense_bytes, seconds)."""
        return self.bytes_sent, self.dense_bytes, self.seconds

    @contextmanager
    def timed(self, device: torch.device):
        """Count the time of a collective."""
        if device.type == "cuda":
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            yield
            last.record()
            self._events.append((first, last))
            self._settle()
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def _settle(self) -> None:
        """Count the events that are over: no more of them are kept than the device is behind."""
        while self._events and self._events[0][1].query():
            first, last = self._events.popleft()
            self._seconds += first.elapsed_time(last) / 1000


def reduce_scatter(mine: Tensor, whole: Tensor, group: dist.ProcessGroup) -> None:
    """Sum over the ranks of a group, of which each gets its row.

    On CPUs every rank sends each other its row, and adds up what it gets in the order of the ranks, so that no sum depends on its place in
    the buffer. gloo's own reduces the whole buffer on every rank, which takes twice the bytes.

    Args:
        mine: [n], to be filled.
        whole: [ranks, n].
    """
    if mine.device.type != "cpu":
        dist.reduce_scatter_tensor(mine, whole.view(-1), group=group)
        return
    got = torch.empty_like(whole)
    dist.all_to_all_single(got, whole, group=group)
    mine.copy_(got[0])
    for other in got[1:]:
        mine += other


def all_reduce(values: Tensor, group: dist.ProcessGroup) -> None:
    """Sum [n] over the ranks of a group, in place; on CPUs in the order of the ranks, as `reduce_scatter` does."""
    if values.device.type != "cpu":
        dist.all_reduce(values, group=group)
        return
    share = -(-values.numel() // group.size())
    whole = values.new_zeros(group.size(), share)
    whole.view(-1)[: values.numel()] = values
    mine = values.new_empty(share)
    reduce_scatter(mine, whole, group)
    dist.all_gather_into_tensor(whole.view(-1), mine, group=group)
    values.copy_(whole.view(-1)[: values.numel()])


class Layout:
    """Which elements live in the flat buffer of a unit.

    Attributes:
        rooms: elements of each parameter in the buffer, on each rank, padding included.
        length: elements of the buffer on each rank.
        live: of each rank the live ones, as a matrix of one row.
        width: live elements of the rank that has most.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], masks: Mapping[str, Tensor], num_ranks: int):
        """Args:
        shapes: whole shapes of the unit's parameters, in FSDP2's order.
        masks: whole masks of those that are sparse.
        """
        pieces: list[list[Tensor]] = [[] for _ in range(num_ranks)]
        self.rooms: list[int] = []
        for name, shape in shapes.items():
            rows, width = shape[0], math.prod(shape[1:])
            here = -(-rows // num_ranks)
            self.rooms.append(here * width)
            device = next(iter(masks.values())).device
            mask = masks[name] if name in masks else torch.ones(rows, width, dtype=torch.bool, device=device)
            for rank, piece in enumerate(pieces):
                part = mask[rank * here : (rank + 1) * here].flatten()
                piece += [part, part.new_zeros(here * width - part.numel())]
        self.live = [Live(torch.cat(piece).unsqueeze(0)) for piece in pieces]
        self.length = self.live[0].shape[1]
        self.width = max(live.nnz for live in self.live)

    def pack(self, flat: Tensor, rank: int, packed: Tensor) -> None:
        """The live elements of `flat` [length], which are `rank`'s, into `packed` [width]; zeros behind them."""
        check(flat.numel() == self.length, flat.numel(), "elements for", self.length)
        live = self.live[rank]
        live.take(flat, packed[: live.nnz])
        packed[live.nnz :].zero_()

    def unpack(self, packed: Tensor, rank: int, flat: Tensor) -> None:
        """The inverse."""
        check(flat.numel() == self.length, flat.numel(), "elements for", self.length)
        live = self.live[rank]
        live.put(packed[: live.nnz], flat)


class Exchange:
    """The collectives of one unit, whole or packed.

    Attributes:
        layout: of the masks as they are; None where they leave out too little.
        packed: whether to send packed buffers now.
        whole_gradients: whether gradients of dead weights are to arrive too.
    """

    def __init__(self, wire: Wire, own: Sequence[Tensor], rank: int, replicas: dist.ProcessGroup | None):
        """Args:
        own: this rank's rows of the unit's parameters, in the order of the buffer.
        rank: of this process among those that share a replica of the model.
        replicas: the processes that hold the same rows, where there are several.
        """
        self.layout: Layout | None = None
        self.packed = self.whole_gradients = False
        self.gather, self.scatter = _Gather(self), _Scatter(self)
        self._wire, self._own, self._rank, self._replicas = wire, own, rank, replicas
        self._is_known = False

    def weights(self, whole: Tensor, mine: Tensor, group: dist.ProcessGroup, send: Callable[[Tensor, Tensor], Any]) -> Any:
        """Gather `mine` [length] of all ranks into `whole` [ranks * length]."""
        size, layout = group.size(), self.layout if self.packed else None
        with self._wire.timed(mine.device):
            if layout is None:
                self._wire.add(whole.nbytes, size)
                return send(whole, mine)
            self._know(mine, layout)
            packed = mine.new_empty(layout.width)
            layout.pack(mine, self._rank, packed)
            everyone = mine.new_empty(size, layout.width)
            self._wire.add(everyone.nbytes, size, dense=whole.nbytes)
            if (work := send(everyone.view(-1), packed)) is not None:
                work.wait()  # asked for asynchronously, but there is work to do on what arrives
            for rank, flat in enumerate(whole.view(size, layout.length)):
                layout.unpack(everyone[rank], rank, flat)
            return None

    def gradients(self, mine: Tensor, whole: Tensor, group: dist.ProcessGroup) -> None:
        """Sum `whole` [ranks * length] over the ranks, of which each gets its own part into `mine` [length]."""
        size, layout = group.size(), self._gradient_layout(mine)
        with self._wire.timed(mine.device):
            if layout is None:
                self._wire.add(whole.nbytes, size)
                reduce_scatter(mine, whole.view(size, -1), group)
                return
            everyone = whole.new_empty(size, layout.width)
            for rank, flat in enumerate(whole.view(size, layout.length)):
                layout.pack(flat, rank, everyone[rank])
            packed = mine.new_empty(layout.width)
            self._wire.add(everyone.nbytes, size, dense=whole.nbytes)
            reduce_scatter(packed, everyone, group)
            layout.unpack(packed, self._rank, mine)

    def over_replicas(self, mine: Tensor) -> None:
        """Sum `mine` [length] over the replicas of the model, in place."""
        assert self._replicas is not None
        size, layout = self._replicas.size(), self._gradient_layout(mine)
        with self._wire.timed(mine.device):
            if layout is None:
                self._wire.add(mine.nbytes, size, passes=2)
                all_reduce(mine, self._replicas)
                return
            packed = mine.new_empty(layout.live[self._rank].nnz)
            layout.live[self._rank].take(mine, packed)
            self._wire.add(packed.nbytes, size, passes=2, dense=mine.nbytes)
            all_reduce(packed, self._replicas)
            layout.live[self._rank].put(packed, mine)

    def _know(self, mine: Tensor, layout: Layout) -> None:
        """Once: FSDP2 does not tell in public in which order its buffer is, and elements of another one would be lost."""
        if not self._is_known:
            rooms = mine.split(layout.rooms)
            for room, rows in zip(rooms, self._own, strict=True):
                if not torch.equal(room[: rows.numel()], rows.detach().flatten().to(mine.dtype)):
                    raise RuntimeError(
                        f"Expected FSDP2 to gather a unit's parameters in the order of its groups. Got another one from torch "
                        f"{torch.__version__}. Set sharding.packed=off."
                    )
        self._is_known = True

    def _gradient_layout(self, mine: Tensor) -> Layout | None:
        """Of a rank's part; None for one of another length too: FSDP2 leaves parameters out that have no gradient."""
        layout = self.layout if self.packed and not self.whole_gradients else None
        return layout if layout is not None and layout.length == mine.numel() else None


class _Gather(DefaultAllGather):
    def __init__(self, exchange: Exchange):
        self._exchange = exchange

    def __call__(self, output_tensor, input_tensor, group, async_op=False):
        whole = super().__call__
        return self._exchange.weights(output_tensor, input_tensor, group, lambda to, mine: whole(to, mine, group, async_op))


class _Scatter(DefaultReduceScatter):
    def __init__(self, exchange: Exchange):
        self._exchange = exchange

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        check(op == dist.ReduceOp.SUM, op)
        self._exchange.gradients(output_tensor, input_tensor, group)


class Choice:
    """Whether buffers are sent packed: as told, or with ``auto`` as steps of each density measure it.

    Two ways of the same bits can take turns in training itself: `TURNS` steps of each, after which one is kept until the masks have
    another density (in tenths): packed where the median step is `GAIN` times faster, so that noise does not choose.
    """

    TURNS = 4
    GAIN = 1.05

    def __init__(self, mode: Mode, slowest: Callable[[float], float] = float):
        """Args:
        slowest: the largest over all ranks, so that all choose alike.
        """
        self._mode, self._slowest = mode, slowest
        self._seconds: dict[float | None, dict[bool, list[float]]] = {}
        self._chosen: dict[float, tuple[float, float]] = {}
        self._density: float | None = None
        self._rest = 0

    @property
    def packed(self) -> bool:
        """In the next step."""
        if self._mode != "auto":
            return self._mode == "on"
        if self._density in self._chosen:
            return self._gains(self._density)
        taken = self._seconds.get(self._density, {})
        return len(taken.get(True, [])) < len(taken.get(False, []))

    @property
    def is_whole(self) -> bool:
        """Whether nothing is packed at this density, from now on."""
        return self._mode == "off" or (self._mode == "auto" and self._density in self._chosen and not self._gains(self._density))

    def at(self, density: float | None) -> None:
        """The masks have changed, or the run begins.

        Args:
            density: share of the whole buffers that packed ones are; None: no buffer is worth packing, and there is nothing to choose.
        """
        density = None if density is None else round(density, 1)
        if density != self._density:
            self._density, self._rest = density, 1  # its first step is like no other

    def took(self, seconds: float) -> str | None:
        """A step took so long. Returns what was chosen, when it is chosen."""
        if self._mode != "auto" or self._density is None or self._density in self._chosen:
            return None
        if self._rest:
            self._rest -= 1
            return None
        taken = self._seconds.setdefault(self._density, {False: [], True: []})
        taken[self.packed].append(seconds)
        if len(taken[True]) < self.TURNS:
            return None
        self._chosen[self._density] = packed, whole = (self._slowest(median(taken[True])), self._slowest(median(taken[False])))
        verb = "packed" if self._gains(self._density) else "whole"
        return f"sharding: buffers are sent {verb}: a step took {packed:.3g} s packed, {whole:.3g} s whole (sharding.packed=auto)"

    def facts(self) -> dict[str, Any]:
        """For the summary: the mode, and of each density that was measured the median seconds of a step either way, and what was chosen."""
        measured = [
            {"density": density, "packed_seconds": packed, "whole_seconds": whole, "packed": self._gains(density)}
            for density, (packed, whole) in self._chosen.items()
        ]
        return {"mode": self._mode, "measured": measured}

    def _gains(self, density: float | None) -> bool:
        assert density is not None
        packed, whole = self._chosen[density]
        return whole >= self.GAIN * packed
