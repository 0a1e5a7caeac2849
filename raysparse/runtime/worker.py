"""What each Ray Train worker runs."""

from pathlib import Path
from typing import Any

import torch

from raysparse.config import ConfigError
from raysparse.recipes import MODULES
from raysparse.recipes.job import Job, finished
from raysparse.runtime.ray_run import RayRun
from raysparse.train.loop import TrainingError


def work(payload: dict[str, Any]) -> dict[str, Any]:
    """Carry out the jobs that are not finished; returns their summaries, or the error that trying again would not mend."""
    torch.set_num_threads(payload["threads"])
    run = RayRun(Path(payload["progress"]))
    summaries = []
    try:
        for job in (Job(**values) for values in payload["jobs"]):
            summaries.append(finished(job) or MODULES[job.verb].work(job, run))
    except (ConfigError, TrainingError) as error:
        return {"error": str(error), "kind": type(error).__name__}
    return {"summaries": summaries}
