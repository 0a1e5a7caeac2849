"""The nodes of the cluster that this process is in: whether more may come, and whether all of them share a folder."""

import json
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from raysparse.config import ConfigError

READ_ONLY = re.compile(r"node_[0-9a-f]{56}")
"""What Ray calls the type of a node on a cluster without an autoscaler; with one, types have the names of its config."""

DRIVER = "driver"


def grows() -> bool:
    """Whether an autoscaler may add nodes."""
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.experimental.internal_kv import _internal_kv_get

    status = _internal_kv_get("__autoscaling_status")
    report = json.loads(status).get("autoscaler_report") if status else None
    return is_autoscaler_v2(fetch_from_server=True) or has_types((report or {}).get("node_type_mapping"))


def has_types(types: Mapping[str, str] | None) -> bool:
    """Whether somebody named the types of the nodes (node -> type), as the config of an autoscaler does."""
    return any(not READ_ONLY.fullmatch(kind) for kind in (types or {}).values())


def check_storage(folders: Iterable[Path], patience_s: float = 60.0) -> int:
    """Have every node read a file that this process writes into each folder, and write one beside it; returns how many nodes there are.

    Raises:
        ConfigError: a node does not; names it.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return len(nodes)
    task = ray.remote(num_cpus=0, max_retries=0)(visit)
    for folder in folders:
        mark = folder / f".raysparse-{secrets.token_hex(6)}"
        mark.mkdir(parents=True)
        try:
            (mark / DRIVER).write_text("here")
            asked = {}
            for node in nodes:
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                asked[node["NodeID"]] = task.options(scheduling_strategy=there).remote(str(mark), node["NodeID"])
            answered, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=patience_s)
            problems = []
            for node in nodes:
                name, reference = node["NodeID"], asked[node["NodeID"]]
                problem = ray.get(reference) if reference in answered else f"no answer within {patience_s:g} s"
                problem = problem or (None if (mark / name).exists() else "what it writes is not seen here")
                problems += [f"{node['NodeManagerAddress']} ({name[:6]}): {problem}"] if problem else []
        finally:
            shutil.rmtree(mark, ignore_errors=True)
        if problems:
            raise ConfigError(
                f"Expected {folder} on storage that all {len(nodes)} nodes share. Got {'; '.join(problems)}. "
                "Mount it on every node in the same place, or set run.folder and the cache to a folder that is."
            )
    return len(nodes)


def visit(mark: str, name: str) -> str | None:
    """On another node: see the driver's file, leave one; returns what is wrong."""
    try:
        if not (Path(mark) / DRIVER).exists():
            return "does not see it"
        (Path(mark) / name).write_text("here")
    except OSError as error:
        return f"cannot write there ({error.strerror})"
    return None
