"""Runs on two nodes of two workers, one after another in one group: ``python -m tests.runtime.four_workers CONFIG.yaml ...``."""

import sys
from typing import Any

from tests.runtime import nodes


def main(files: list[str]) -> None:
    from raysparse.config import load
    from raysparse.recipes import pretrain

    configs = [load(pretrain.PretrainConfig, [file]) for file in files]
    with nodes.cluster() as cluster:
        for _ in range(2):
            nodes.add(cluster, 2)
        nodes.Launch([pretrain.open_run(config) for config in configs], whole(configs[0].run)).finish()


def whole(run: Any) -> Any:
    """The run that the others are stages of: Ray Train wants all of its checkpoints below one folder."""
    folder = run.path.parent
    return run.model_copy(update={"name": folder.name, "folder": str(folder.parent)})


if __name__ == "__main__":
    main(sys.argv[1:])
