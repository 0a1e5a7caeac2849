"""``python -m tests.chaos.stopped_in_commit STEP WORDS``: `raysparse` that stops itself when a checkpoint is written but not committed."""

import os
import signal
import sys
import time
from pathlib import Path

from raysparse.__main__ import main
from raysparse.train import checkpoint

crc32 = checkpoint.crc32


def stopping(file: Path) -> int:
    if file.name == ".metadata" and f"{int(sys.argv[1]):08d}" in file.parent.name:
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(1)  # the signal may reach this thread a little later
    return crc32(file)


checkpoint.crc32 = stopping
sys.exit(main(sys.argv[2:]))
