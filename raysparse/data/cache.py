"""Folders named by a hash of what they hold: complete or absent, whoever is killed and however many build at once."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def publish(target: Path, build: Callable[[Path], object]) -> Path:
    """`target`, built by ``build(empty folder)`` unless it is there already.

    The folder is built beside the target and renamed at the end. Of two processes that build at once, the first to finish wins
    and the other takes its result: both hold the same, as the name is a hash of the content.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        build(temporary)
        temporary.chmod(0o755)
        os.rename(temporary, target)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
