"""A rank's view of a run under Ray Train, and the driver's view of its progress."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Event
from typing import Any

from raysparse.runtime.gauges import Gauges
from raysparse.runtime.mask_actor import ManagerProxy
from raysparse.train.checkpoint import MARKER, committed
from raysparse.train.metrics import Console

PROGRESS = "progress.jsonl"
"""What rank 0 shows, one JSON record a line; the driver follows it. Ray's own log forwarding is off: it is noisy and late."""


class RayRun:
    """`Run` over ray.train."""

    is_watched = True

    def __init__(self, progress: Path):
        import ray.train

        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self._progress = progress
        self._gauges = Gauges() if self.rank == 0 else None

    def committed(self, checkpoint: Path, metrics: dict[str, float]) -> None:
        """Tell Ray Train; it registers the checkpoint when the marker is there, while training goes on."""
        import ray.train
        from ray.train import Checkpoint, CheckpointUploadMode

        ray.train.report(
            metrics,
            checkpoint=Checkpoint(str(checkpoint)),
            checkpoint_dir_name=checkpoint.name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=lambda reported, name: when_committed(reported, checkpoint),
            delete_local_checkpoint_after_upload=False,
        )

    def manager(self, journal: Path) -> ManagerProxy:
        """The actor that the driver has made for the run."""
        return ManagerProxy(journal.parent)

    def show(self, record: Mapping[str, Any]) -> None:
        if self._gauges is not None:
            self._gauges.set(record)
            self._write(record)

    def say(self, text: str) -> None:
        self._write({"text": text})

    def _write(self, record: Mapping[str, Any]) -> None:
        with self._progress.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(dict(record)) + "\n")


def follow(progress: Path, console: Console, stop: Event) -> None:
    """Show the records that are added to a progress file until told to stop; earlier ones are not repeated."""
    with progress.open(encoding="utf-8") as stream:
        stream.seek(0, 2)
        rest = ""
        while True:
            ending = stop.is_set()
            rest += stream.read()
            *lines, rest = rest.split("\n")
            for line in lines:
                console.show(json.loads(line))
            if ending:
                return
            time.sleep(0.1)


def when_committed(reported: Any, checkpoint: Path, timeout_s: float = 1800.0) -> Any:
    """Wait for the marker of a checkpoint, or of a later one: quick steps may have pruned this one by then."""
    deadline = time.monotonic() + timeout_s
    while not any(found >= checkpoint for found in committed(checkpoint.parent)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"Expected {checkpoint / MARKER} within {timeout_s:.0f} s. Got nothing; is the storage full or gone?")
        time.sleep(0.05)
    return reported
