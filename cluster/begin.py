"""What a submitted job runs on the head node: `python -m cluster.begin VERB CONFIG`. First every node is asked whether it shares the
folders of the run, before hours go into data that the others would not see; then the verb runs as it does anywhere."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.check import KINDS, folders
from raysparse.__main__ import main as raysparse
from raysparse.config import ConfigError, load
from raysparse.runtime.launch import start
from raysparse.runtime.nodes import check_storage


def main(argv: Sequence[str]) -> int:
    """The exit status of the verb; 2 if a node does not share a folder."""
    verb, file, *_ = argv
    config: Any = load(KINDS[verb], [file])
    start(config.run)  # the cluster of RAY_ADDRESS, which Ray sets for its jobs
    import ray

    try:
        places = list(dict.fromkeys(Path(folder).expanduser() for folder in folders(config).values()))
        if (number := check_storage(places)) > 1:
            print(f"{number} nodes share {', '.join(map(str, places))}", flush=True)
        return raysparse(argv)
    except (ConfigError, OSError) as error:
        print(f"raysparse: {error}", file=sys.stderr)
        return 2
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
