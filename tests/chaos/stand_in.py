"""What a worker runs in the place of `raysparse.runtime.worker.work`: the same, with one fault at one point, once in a run."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import ray.train

from raysparse.data.tokens import TokenFeed
from raysparse.runtime import ray_run, worker

STEP = 50
"""Of the fault, or the one after it that has a checkpoint."""
MARK = "fault"
"""In the run folder: the fault has been."""
real = worker.work


def once(payload: dict[str, Any]) -> bool:
    """Whether it has not been yet; then it has."""
    try:
        (Path(payload["jobs"][0]["folder"]) / MARK).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def hangs(payload: dict[str, Any]) -> dict[str, Any]:
    """Rank 1's data feed never returns."""
    batch = TokenFeed.batch

    def stuck(self: TokenFeed, step: int, rows: Any) -> Any:
        while step == STEP and ray.train.get_context().get_world_rank() == 1 and (stuck.begun or once(payload)):
            stuck.begun = True
            time.sleep(0.01)
        return batch(self, step, rows)

    stuck.begun = False
    TokenFeed.batch = stuck
    return real(payload)


def dies_in_upload(payload: dict[str, Any]) -> dict[str, Any]:
    """Rank 0 is killed when a checkpoint is committed and Ray Train has not been told."""
    wait = ray_run.when_committed

    def dying(reported: Any, checkpoint: Path) -> Any:
        found = wait(reported, checkpoint)
        if int(checkpoint.name[5:]) >= STEP and ray.train.get_context().get_world_rank() == 0 and once(payload):
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    ray_run.when_committed = dying
    return real(payload)
