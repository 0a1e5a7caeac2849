"""The command `raysparse`, killed with SIGKILL at one point of its code: python -m tests.chaos.victim POINT N VERB CONFIG ...

The N-th time that it comes to POINT. What runs is the product; only the point is wrapped, in this process.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemWriter

from raysparse.__main__ import main
from raysparse.sparsity.journal import Journal
from raysparse.train import checkpoint
from raysparse.train.keeper import Keeper


def killed_at(owner: Any, name: str, n: int, after: bool = False, before_dying: Callable[..., None] = lambda *_: None) -> None:
    """Wrap ``owner.name``: in the n-th call the process is gone, before it has done anything or after it has done all."""
    real, calls = getattr(owner, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        result = real(*args, **kwargs) if calls[0] < n or after else None
        if calls[0] == n:
            before_dying(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapped)


def half_a_line(journal: Journal, record: dict[str, Any]) -> None:
    with journal.path.open("ab") as stream:
        stream.write(b'{"version": ' + str(record["version"]).encode() + b', "nnz": {"tra')


def half_a_marker(file: Path) -> None:
    (file.parent / f"{checkpoint.MARKER}.partial").write_text('{"files": {"__0_0')


POINTS: dict[str, Callable[[int], None]] = {
    "before the data is written": lambda n: killed_at(FileSystemWriter, "write_data", n),
    "after the data, before its metadata": lambda n: killed_at(FileSystemWriter, "write_data", n, after=True),
    "between data and commit marker": lambda n: killed_at(checkpoint.Checkpointer, "_commit", n),
    "in the commit marker": lambda n: killed_at(checkpoint, "crc32", n, before_dying=half_a_marker),
    "between commit and deletion of old ones": lambda n: killed_at(checkpoint.Checkpointer, "_prune", n),
    "between proposal and commit": lambda n: killed_at(Keeper, "_agreed", n),
    "in the journal's line": lambda n: killed_at(Journal, "append", n, before_dying=half_a_line),
    "between commit and swap": lambda n: killed_at(Keeper, "_swap", n),
    "after the swap": lambda n: killed_at(Keeper, "_swap", n, after=True),
}

if __name__ == "__main__":
    point, n, *words = sys.argv[1:]
    POINTS[point](int(n))
    sys.exit(main(words))
