"""Writing that outlives a full disk, or a storage that is away for a while: all ranks try again together, or give up together."""

import time
from collections.abc import Callable

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from raysparse.train.error import TrainingError

PAUSES_S = 1.0, 15.0
"""Between two tries: the first, doubled up to the longest."""


def persist(
    prepare: Callable[[], None],
    store: Callable[[], None],
    commit: Callable[[], None],
    group: dist.ProcessGroup,
    patience_s: float,
    tell: Callable[[str], None],
) -> str | None:
    """`prepare` on rank 0, `store` on all ranks, `commit` on rank 0; from the beginning again while something fails and patience lasts.

    Args:
        store: a collective of `group`, as those of torch.distributed.checkpoint: if it fails on one rank, it raises on all of them.
        tell: is told the first failure, on rank 0.

    Returns:
        None when it is done, else what went wrong in the last try; the same on every rank. Every rank calls this.

    Raises:
        TrainingError: what rank 0's parts raise of it, on every rank.
    """
    deadline, pause, told = time.monotonic() + patience_s, PAUSES_S[0], False
    while (problem := _on_first(prepare, group) or _together(store) or _on_first(commit, group)) is not None:
        again = [time.monotonic() + pause < deadline]  # by one clock
        dist.broadcast_object_list(again, src=0, group=group)
        if not again[0]:
            break
        if not told and dist.get_rank() == 0:
            tell(problem)
        told = True
        time.sleep(pause)
        pause = min(2 * pause, PAUSES_S[1])
    return problem


def _on_first(do: Callable[[], None], group: dist.ProcessGroup) -> str | None:
    """What went wrong on rank 0, on every rank."""
    box: list[OSError | TrainingError | None] = [None]
    if dist.get_rank() == 0:
        try:
            do()
        except (OSError, TrainingError) as error:
            box = [error]
    dist.broadcast_object_list(box, src=0, group=group)
    if isinstance(box[0], TrainingError):
        raise box[0]
    return None if box[0] is None else str(box[0])


def _together(store: Callable[[], None]) -> str | None:
    try:
        store()
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        if not isinstance(cause, OSError | RuntimeError):  # the latter: torch's own writer
            raise
        return f"{cause} on rank {rank}"
    return None
