"""No work is lost when an elastic run gets more workers: the old group saves before Ray Train ends it, which Ray would not wait for."""

import time
from pathlib import Path
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback


class SaveFirst(ControllerCallback, WorkerGroupCallback):
    """Runs in the process of Ray Train's controller, which does nothing else meanwhile.

    Groups that are replaced because they failed have nothing to save.
    """

    def __init__(self, request: Path, grace_s: float):
        """Args:
        request: the file by which the workers are told (`RayRun.leaving`).
        grace_s: how long they may take; then they are ended, and the next group goes on from the last checkpoint.
        """
        self._request, self._grace_s = request, grace_s
        self._group: Any = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._group = worker_group

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        group, self._group = self._group, None
        if group is None or group.get_latest_poll_status().errors:
            return
        self._request.touch()
        deadline = time.monotonic() + self._grace_s
        while time.monotonic() < deadline and not ((status := group.poll_status(timeout=1)).finished or status.errors):
            time.sleep(0.1)
        self._request.unlink(missing_ok=True)
