"""Run jobs in this very process, without Ray, so that ``breakpoint()`` works: the same loop, the same masks and losses."""

from collections.abc import Sequence
from typing import Any

import torch

from raysparse.recipes import MODULES
from raysparse.recipes.job import Job, finished
from raysparse.train.metrics import Console
from raysparse.train.process import process_group
from raysparse.train.run import LocalRun, RunConfig, resolve_device


def run_here(jobs: Sequence[Job], run: RunConfig, console: Console) -> list[dict[str, Any]]:
    """Carry out the jobs one after another; under torchrun each of its ranks calls this."""
    before = torch.get_num_threads()
    torch.set_num_threads(run.threads)
    try:
        with process_group(resolve_device(run)):
            here = LocalRun(console)
            return [finished(job) or MODULES[job.verb].work(job, here) for job in jobs]
    finally:
        console.close()
        torch.set_num_threads(before)
