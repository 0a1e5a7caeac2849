"""The process a rank trains in: its group, its collectives as the pure core wants them, its peak of memory."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from raysparse.config import ConfigError
from raysparse.sparsity.ranks import Ranks

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)
"""Of collectives: the first rank reads a model while the others wait."""


def torchrun_rank() -> tuple[int, int] | None:
    """(rank, number of ranks) of a process that torchrun started; None of any other."""
    if not dist.is_torchelastic_launched():
        return None
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """A default process group: the one that is there, torchrun's if it started this process, else one of this process alone."""
    if dist.is_initialized():
        yield
        return
    backend = "nccl" if device == "cuda" else "gloo"
    if torchrun_rank() is not None:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend, timeout=PATIENCE)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Signals:
    """SIGTERM as a request.

    Attributes:
        seen: whether one has come.
    """

    def __init__(self) -> None:
        self.seen = False

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Inside, the first SIGTERM is noted; a second one does what it did before. No other than the main thread can ask for that."""
        if current_thread() is not main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGTERM)

        def note(*_: object) -> None:
            self.seen = True
            signal.signal(signal.SIGTERM, before)

        signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def ranks_of(group: dist.ProcessGroup, device: torch.device) -> Ranks:
    """The collectives of `group`; tensors travel through `device` (NCCL has no CPU tensors)."""

    def reduce(x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        y = x.to(device, copy=True)
        dist.all_reduce(y, op=op, group=group)
        return y.to(x.device)

    def sum_lower(x: Tensor) -> Tensor:
        here = x.to(device)
        parts = [torch.empty_like(here) for _ in range(group.size())]
        dist.all_gather(parts, here, group=group)
        return torch.stack([torch.zeros_like(here), *parts[: group.rank()]]).sum(0).to(x.device)

    return Ranks(
        sum=lambda x: reduce(x, dist.ReduceOp.SUM),
        sum_lower=sum_lower,
        max=lambda x: reduce(x, dist.ReduceOp.MAX),
    )


def gathered(value: Any) -> list[Any]:
    """Of all ranks, in their order. Every rank calls this."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value)
    return parts


def alike(make: Callable[[], T]) -> T:
    """What each rank makes. What one cannot make is raised on all, which would wait for it else. Every rank calls this.

    Raises:
        ConfigError: of any rank; also where another rank raised something else.
    """
    made, problem = None, None
    try:
        made = make()
    except Exception as error:  # raised below, once the other ranks know
        problem = error
    told = None if problem is None else str(problem) if isinstance(problem, ConfigError) else f"{type(problem).__name__}: {problem}"
    found = [text for text in gathered(told) if text is not None]
    if problem is not None and not isinstance(problem, ConfigError):
        raise problem
    if found:
        raise ConfigError(found[0])
    return cast(T, made)


def forget_peak_memory() -> None:
    """Start a new peak: several stages may run in one process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # where the kernel does not allow it the peak is the process's own
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Of GPU memory allocated where there is a GPU, else of this process's resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
