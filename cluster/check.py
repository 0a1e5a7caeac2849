"""What is checked before a submission leaves: the config, what it reads, where it writes, and whether the cluster can ever hold it."""

import glob
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cluster.ship import Parcel
from raysparse.config import Config, ConfigError, merge
from raysparse.recipes import CONFIGS, GROUPS, MODULES, grid, training
from raysparse.recipes.compare import StageConfig
from raysparse.recipes.plan import plan
from raysparse.recipes.pretrain import PretrainConfig
from raysparse.train.run import RunConfig
from tuning import search
from tuning.config import SearchConfig
from tuning.space import MODELS, Search

KINDS: dict[str, type[Config]] = CONFIGS | {"tune": SearchConfig}
"""Verb -> its config."""
WORDS = ("path", "paths", "files", "teacher", "masks")
"""Keys whose values name files; beside them the splits of `type: files` and the name of `type: hub`."""
OF_ONE_NODE = ("/tmp", "/var/tmp", "/dev", "/run", "/proc")
"""Each node has its own."""


@dataclass(frozen=True)
class Node:
    """A node of the cluster, alive, and what Ray may give away of it."""

    name: str
    resources: Mapping[str, float]


def stages(config: Any) -> dict[str, Any]:
    """Prefix of keys -> config, of all that one submission runs: itself, stages of a group, a search's models and a trial a task."""
    if isinstance(config, SearchConfig):
        whole = Search(config)
        models = map(whole.pretrain_config, whole.first_level())
        trials = {f"{task or 'pretrain'}: ": whole.trial_config(whole.some_point(task)) for task in whole.space}
        return {f"{model.run.name}: ": model for model in models} | trials
    group = _group(config)
    return {"": config} if group is None else {f"{name}: ": one for name, one in group.stages(config).items()}


def check_config(config: Any, parcel: Parcel, whole_grid: bool) -> list[str]:
    """The recipe's own checks, as far as this machine has what it reads; returns what is left to the cluster.

    Raises:
        ConfigError: what the recipe refuses, or a file that the config names and that would stay here.
    """
    left = check_paths(config, parcel)
    with tempfile.TemporaryDirectory() as scratch:
        here = _with_folders_here(config, scratch)
        if whole_grid:
            grid.points(here)
        if not left:
            _dry_run(here, whole_grid)
        elif (group := _group(here)) is not None:
            group.check(here)
        elif isinstance(here, PretrainConfig) and not any(word.startswith(("model.", "sparsity.")) for word in left):
            plan(here)
        elif isinstance(here, training.TrainingRunConfig):
            training.check_sizes(here)
    return left


def check_paths(config: Any, parcel: Parcel) -> list[str]:
    """Raise a `ConfigError` if a relative path of the config names a file that is not shipped; returns those that only the cluster has."""
    found = {(f"{prefix}{key}", word): None for prefix, one in stages(config).items() for key, word in paths_of(one)}
    if isinstance(config, SearchConfig):
        own = {"pretrain": config.pretrain} | {f"tasks.{name}": stage for name, stage in config.tasks.items()}
    else:
        own = {name: stage for name, stage in dict(config).items() if isinstance(stage, StageConfig)}
    found |= {(f"{key}.files", word): None for key, stage in own.items() if stage is not None for word in stage.files}
    left = []
    for key, word in found:
        path = Path(word).expanduser()
        here = bool(glob.glob(str(path if path.is_absolute() else parcel.folder / path), recursive=True))
        if not here and (path.is_absolute() or key.endswith("sparsity.masks")):  # masks may be named by their run
            if not any(path.is_relative_to(made) for made in _made_on_the_way(config)):
                left.append(f"{key}={word}")
        elif here and not path.is_absolute():
            _check_shipped(key, word, parcel)
    return left


def _made_on_the_way(config: Any) -> list[Path]:
    """Folders of what an earlier stage will write."""
    if isinstance(config, SearchConfig):
        return [config.path.parent / MODELS]
    return [] if _group(config) is None else [config.run.path]


def paths_of(config: Config) -> list[tuple[str, str]]:
    """(dotted key, path) of all that the config reads; names on the hub are among them, and no file has them."""
    words = WORDS if isinstance(config, PretrainConfig) else WORDS[:-1]  # `sparsity.masks` of a fine-tuning is lift or keep
    values = config.model_dump(mode="json", exclude={"run", "grid"})
    return list(_paths(values, "", words))


def folders(config: Any) -> dict[str, str]:
    """Key -> folder, of all that a submission writes into."""
    found = {"run.folder": config.run.folder}
    for prefix, one in stages(config).items():
        values = one.model_dump(mode="json")
        places = {"cache_dir": values, "data.cache_dir": values.get("data") or {}}
        found |= {f"{prefix}{key}": at["cache_dir"] for key, at in places.items() if "cache_dir" in at}
    return found


def check_storage(config: Any, num_nodes: int) -> None:
    """The storage rule: raysparse writes plain files, to folders that outlive the job and that all nodes share.

    Raises:
        ConfigError: for what cannot be such a folder. Whether the others are, only the cluster can tell; `begin` asks its nodes.
    """
    for key, folder in folders(config).items():
        if problem := _why_no_storage(folder, num_nodes):
            raise ConfigError(
                f"Expected {key} on storage that outlives the job and that every node reads and writes. Got {folder}: {problem}. "
                f"Set {key.rpartition(' ')[2]} to an absolute path on a shared file system (NFS, EFS, Filestore, Lustre), or on a bucket "
                "that every node mounts as one."
            )


def _why_no_storage(folder: str, num_nodes: int) -> str | None:
    if "://" in folder:
        return "an address; raysparse writes plain files"
    if folder.startswith("~"):
        return None if num_nodes == 1 else f"in the home folder, of which each of the {num_nodes} nodes has its own"
    if not folder.startswith("/"):
        return "relative, so inside the copy of the working directory that Ray unpacks for the job, on one node, and deletes in the end"
    if num_nodes > 1 and any(PurePosixPath(folder).is_relative_to(local) for local in OF_ONE_NODE):
        return f"of which each of the {num_nodes} nodes has its own"
    return None


def check_resources(run: RunConfig, nodes: Sequence[Node], grows: bool) -> str:
    """What the workers need beside what the cluster has, in a sentence.

    Args:
        grows: an autoscaler may add nodes.

    Raises:
        ConfigError: the nodes can never hold the workers.
    """
    num_gpus = sum(node.resources.get("GPU", 0.0) for node in nodes)
    gpu = run.device == "cuda" or (run.device == "auto" and num_gpus >= run.sizes[0])  # as `launch` decides
    each = f"{run.threads} CPU{' and 1 GPU' if gpu else ''}"
    room = {node.name: _room(node, run.threads, gpu) for node in nodes}
    told = ", ".join(f"{node.name} holds {room[node.name]} ({_amounts(node)})" for node in nodes[:8]) + (", ..." if len(nodes) > 8 else "")
    total = sum(room.values())
    wanted = f"{run.workers}" if isinstance(run.workers, int) else "{} to {}".format(*run.workers)
    if total >= run.sizes[0]:
        return f"{wanted} workers of {each}: the cluster holds {total} ({told})"
    if grows:
        return f"{wanted} workers of {each}: the cluster holds {total} now ({told}); its autoscaler has to add nodes"
    raise ConfigError(
        f"Expected a cluster that holds {run.sizes[0]} workers of {each} each (run.workers={run.workers}, run.threads={run.threads}, "
        f"run.device={run.device}). Got room for {total}: {told}. Lower run.workers or run.threads, or add nodes; "
        "with --autoscaling if the cluster adds them itself."
    )


def _room(node: Node, threads: int, gpu: bool) -> int:
    room = int(node.resources.get("CPU", 0.0) // threads)
    return min(room, int(node.resources.get("GPU", 0.0))) if gpu else room


def _amounts(node: Node) -> str:
    return ", ".join(f"{node.resources.get(name, 0.0):g} {name}" for name in ("CPU", "GPU") if name == "CPU" or name in node.resources)


def _group(config: Any) -> Any:
    """The module of a config of several stages, else None."""
    return next((module for verb, module in GROUPS.items() if type(config) is CONFIGS[verb]), None)


def _dry_run(config: Any, whole_grid: bool) -> None:
    if whole_grid:
        grid.dry_run(config)
    elif (group := _group(config)) is not None:
        group.dry_run(config)
    elif isinstance(config, SearchConfig):
        search.dry_run(config)
    else:
        verb = next(verb for verb, kind in CONFIGS.items() if kind is type(config))
        MODULES[verb].dry_run(config)


def _with_folders_here(config: Any, scratch: str) -> Any:
    """The config as this machine can check it: folders that it does not have are empty ones."""
    values = config.model_dump(mode="json")
    if not Path(config.run.folder).expanduser().is_dir():
        values = merge(values, {"run": {"folder": f"{scratch}/runs"}})
    for at in (values, values.get("data") or {}):
        if "cache_dir" in at and not Path(at["cache_dir"]).expanduser().parent.is_dir():
            at["cache_dir"] = f"{scratch}/cache"
    return type(config).check(values)


def _paths(values: Mapping[str, Any], at: str, words: Sequence[str]) -> Iterator[tuple[str, str]]:
    kind = values.get("type")
    for key, value in values.items():
        of_kind = (kind == "files" and key in ("train", "validation", "test")) or (kind == "hub" and key == "name")
        if key in words or of_kind:
            several = value if isinstance(value, list) else [value]
            yield from ((f"{at}{key}", word) for word in several if isinstance(word, str))
        elif isinstance(value, Mapping):
            yield from _paths(value, f"{at}{key}.", words)


def _check_shipped(key: str, word: str, parcel: Parcel) -> None:
    for match in sorted(glob.glob(word, root_dir=parcel.folder, recursive=True)):
        path = parcel.folder / match
        for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
            name = os.path.relpath(file, parcel.folder)
            if name not in parcel.files:
                reason = parcel.left_out.get(name, "it is outside of the folder" if name.startswith("..") else "git ignores it")
                raise ConfigError(
                    f"Expected {key}={word} to travel with the submission. Got {name}, which stays here: {reason}. "
                    "Copy it to storage that all nodes share and give its absolute path there."
                )
