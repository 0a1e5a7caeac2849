"""What each Ray Train worker runs."""

import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raysparse.config import ConfigError
from raysparse.recipes import MODULES
from raysparse.recipes.job import Job, finished, write_atomically
from raysparse.runtime.ray_run import RayRun
from raysparse.train.error import Left, TrainingError


def work(payload: dict[str, Any]) -> dict[str, Any]:
    """Carry out the jobs that are not finished; returns their summaries, or why they ended: no new group of workers is to try again."""
    torch.set_num_threads(payload["threads"])
    run = RayRun(Path(payload["progress"]))
    _announce(run, payload["jobs"])
    summaries = []
    try:
        for job in (Job(**values) for values in payload["jobs"]):
            summaries.append(finished(job) or MODULES[job.verb].work(job, run))
    except (ConfigError, TrainingError, Left) as error:
        return {"error": str(error), "kind": type(error).__name__}
    return {"summaries": summaries}


def _announce(run: RayRun, jobs: list[dict[str, Any]]) -> None:
    """workers.json in each run folder: process ids by rank, for whoever looks after the machines."""
    pids: list[Any] = [None] * run.world_size
    dist.all_gather_object(pids, os.getpid())
    if run.rank == 0:
        for job in jobs:
            write_atomically(Path(job["folder"]) / "workers.json", json.dumps(pids))
