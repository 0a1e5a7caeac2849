"""Ends a process whose step does not: a rank that hangs would hold the others, and their GPUs, for ever.

The limit holds from one micro-batch to the next. Whatever else may be long and silent (validation, judging, a checkpoint on slow
storage, the first step, in which blocks are compiled) is not watched. A process that was stopped cannot end itself; the others, which
wait for it in a collective, do.
"""

import faulthandler
import os
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread


class Watch:
    """A thread that looks at the clock.

    Attributes:
        file: where the stacks of all threads are written before the process ends.
    """

    def __init__(self, limit_s: float | None, file: Path, tell: Callable[[str], None]):
        """Args:
        limit_s: between two beats; None watches nothing.
        tell: is told in a sentence what has happened.
        """
        self.file, self._tell = file, tell
        self._deadline: float | None = None
        self._warm, self._over = False, Event()
        self._limit_s = limit_s or 0.0
        if limit_s is not None:
            Thread(target=self._look, daemon=True, name="watch").start()

    def beat(self) -> None:
        """A micro-batch begins."""
        if self._warm:
            self._deadline = time.monotonic() + self._limit_s

    def rest(self) -> None:
        """The step is done."""
        self._deadline, self._warm = None, True

    def close(self) -> None:
        """There are no more steps."""
        self._over.set()

    def _look(self) -> None:
        while not self._over.wait(min(1.0, self._limit_s / 10)):
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                self._end()

    def _end(self) -> None:
        try:
            self.file.parent.mkdir(exist_ok=True)
            with self.file.open("w") as stream:
                faulthandler.dump_traceback(stream)
            self._tell(f"no micro-batch ended within run.hang_timeout_s={self._limit_s:g}; where the rank stood is in {self.file}")
        finally:
            os._exit(1)
