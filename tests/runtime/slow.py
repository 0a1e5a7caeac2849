"""A run in slow steps, which lasts longer than Ray takes to see nodes go and come: ``python -m tests.runtime.slow CONFIG.yaml``."""

import json
import sys
import time
from pathlib import Path
from typing import Any

STEP_S = 0.05
"""What a step takes at least."""


def be_slow() -> None:
    """In the driver: the workers of what it launches take `STEP_S` a step, and Ray looks for new nodes more often."""
    from raysparse.runtime import launch, worker

    launch.LOOKS_EVERY_S = 5.0
    worker.work = slow_work


def last(folder: Path) -> dict[str, Any]:
    """The newest training record."""
    file = folder / "metrics.jsonl"
    lines = [line for line in file.read_text().splitlines() if '"workers"' in line] if file.exists() else []
    return json.loads(lines[-1]) if lines else {"step": 0, "workers": 0}


def slow_work(payload: dict[str, Any]) -> dict[str, Any]:
    """`work`, in steps of at least `STEP_S`."""
    from raysparse.runtime import worker
    from raysparse.train import loop

    forward_backward = loop.forward_backward

    def slower(*given: Any) -> Any:
        time.sleep(STEP_S)
        return forward_backward(*given)

    loop.forward_backward = slower
    return worker.work(payload)


def main(file: str) -> int:
    from raysparse.__main__ import main as raysparse

    be_slow()
    return raysparse(["pretrain", file])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
