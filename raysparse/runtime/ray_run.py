"""A rank's view of a run under Ray Train, and the driver's view of its progress."""

import json
import logging
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from threading import Event
from typing import Any

from raysparse.runtime.gauges import Gauges
from raysparse.runtime.mask_actor import ManagerProxy
from raysparse.train.checkpoint import MARKER, committed
from raysparse.train.metrics import Console

log = logging.getLogger(__name__)

PROGRESS = "progress.jsonl"
"""What rank 0 shows, one JSON record a line; the driver follows it. Ray's own log forwarding is off: it is noisy and late."""
LEAVE = "leave"
"""Beside it, where the driver asks the workers to save and leave: signals do not reach the loop, which is not in their main thread."""
RESIZE = "resize"
"""Likewise, where Ray Train's controller asks them, because there is room for more of them."""
LOOKS_EVERY_S = 0.5
"""For these files."""


class RayRun:
    """`Run` over ray.train."""

    is_watched = True

    def __init__(self, progress: Path):
        import ray.train

        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        here = ray.get_runtime_context().get_node_id()
        self.node = f"{ray.util.get_node_ip_address()} ({here[:6]})"
        self._progress = progress
        self._gauges = Gauges() if self.rank == 0 else None
        self._looked, self._leaving = 0.0, False

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

    def heeding(self) -> AbstractContextManager[None]:
        return nullcontext()

    def leaving(self) -> bool:
        """Rank 0 looks for the files of the driver and the controller, now and then."""
        if self.rank == 0 and time.monotonic() - self._looked > LOOKS_EVERY_S:
            self._looked, self._leaving = time.monotonic(), any(self._progress.with_name(name).exists() for name in (LEAVE, RESIZE))
        return self._leaving

    def _write(self, record: Mapping[str, Any]) -> None:
        try:
            with self._progress.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(dict(record)) + "\n")
        except OSError as error:  # a full disk: no reason to end
            log.warning("What follows could not be shown (%s): %s", error, dict(record))


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
