"""TensorBoard on a run's folder, on this machine alone, until Ctrl-C."""

import importlib.util
import logging
import os
import threading
from pathlib import Path
from typing import Any

from raysparse.config import ConfigError


def find(word: str, root: Path = Path("runs")) -> Path:
    """The folder of a run, or of several; names are also looked for below `root`."""
    tried = [Path(word).expanduser(), *([root / word] if not Path(word).is_absolute() else [])]
    for folder in tried:
        if folder.is_dir():
            if next(folder.rglob("events.out.tfevents.*"), None) is None:
                raise ConfigError(
                    f"Expected TensorBoard files below {folder}. Got none. The run may not have begun, or has logging.tensorboard=false."
                )
            return folder.absolute()
    raise ConfigError(
        f"Expected the folder of a run, or its name below {root}/. Got {word}, and no folder at {' or '.join(map(str, tried))}."
    )


def serve(folder: Path, port: int) -> None:
    """Serve until interrupted; a port of 0 is a free one.

    Raises:
        ConfigError: TensorBoard is not installed, or cannot have the port.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("Expected TensorBoard in this environment. Got none. Install it: pip install tensorboard.")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from tensorboard import program

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    board: Any = program.TensorBoard()
    board.configure(argv=["tensorboard", f"--logdir={folder}", "--host=127.0.0.1", f"--port={port}", "--load_fast=false"])
    try:
        address = board.launch()
    except program.TensorBoardServerException as error:
        raise ConfigError(
            f"Expected to serve on port {port}. Got: {error.msg.splitlines()[0]} Choose another --port; 0 takes a free one."
        ) from None
    print(f"TensorBoard of {folder}: {address} (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print()
