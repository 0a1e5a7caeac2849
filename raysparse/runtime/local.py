"""Run jobs in this very process, without Ray, so that ``breakpoint()`` works: the same loop, the same masks and losses.

Under torchrun rank 0 is the driver: it alone prepares the data, opens the run folders and prints; the others `assist`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raysparse.recipes import MODULES
from raysparse.recipes.job import Job, carrying_out, finished
from raysparse.train.metrics import Console
from raysparse.train.process import process_group
from raysparse.train.run import LocalRun, RunConfig, resolve_device


def run_here(
    jobs: Sequence[Job], run: RunConfig, console: Console, committed: Callable[[Path], None] | None = None
) -> list[dict[str, Any]]:
    """Carry out the jobs one after another, with the other ranks if torchrun started some; returns their summaries.

    Args:
        committed: is told of each checkpoint when its saving has begun.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(run.threads)
    try:
        with process_group(resolve_device(run)), carrying_out(jobs):
            here, box = LocalRun(console, committed), [list(jobs)]
            dist.broadcast_object_list(box, src=0)
            return [finished(job) or MODULES[job.verb].work(job, here) for job in box[0]]
    finally:
        console.close()
        torch.set_num_threads(before)


def assist(run: RunConfig, console: Console) -> None:
    """Take part in the jobs that rank 0 carries out; every other rank of torchrun calls this, and ends with it."""
    run_here([], run, console)
