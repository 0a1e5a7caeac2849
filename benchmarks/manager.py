"""The mask manager to be timed: in its caller's process and in an actor, with the votes of few ranks and of many."""

import logging
import os
import time
from pathlib import Path
from typing import Any

from raysparse.config import load
from raysparse.models.build import skeleton
from raysparse.recipes.job import Job
from raysparse.recipes.pretrain import PretrainConfig, agenda_of
from raysparse.sparsity.agenda import Agenda
from raysparse.sparsity.manager import MaskManager
from raysparse.sparsity.vote import Vote
from raysparse.train.run import Manager

MST = Path(__file__).parents[1] / "configs" / "pretrain" / "mst_gpt2_small.yaml"
"""The run whose manager it is: other numbers of live weights in every one of the first updates, so that no plan is there already."""
BOUNDS_S = {"decide": 0.002, "commit": 0.01}
"""Of the medians, in wall time."""


def measure(folder: Path, calls: int, many: int) -> dict[str, Any]:
    """Wall seconds of the calls of the first updates of a run with 4 ranks and with `many`; journals go to the empty `folder`."""
    load_before, config = os.getloadavg()[0], load(PretrainConfig, [MST])
    agenda = agenda_of(config, skeleton(config.model, context=config.data.context))
    few, more = (through(MaskManager(folder / f"{world_size}.jsonl"), agenda, world_size, calls) for world_size in (4, many))
    actor = in_actor(folder / "actor", config, agenda, 4, calls)
    rows = [
        {"where": where, "ranks": world_size, "call": call, "at_most": bounds.get(call), "seconds": seconds}
        for where, world_size, bounds, found in (
            ("in process", 4, BOUNDS_S, few),
            ("Ray actor", 4, BOUNDS_S, actor),
            ("in process", many, {}, more),
        )
        for call, seconds in found.items()
    ]
    facts = {"run": MST.name, "layers": len(agenda.shapes), "updates": len(agenda.update_steps), "load_before": load_before}
    return facts | {"calls": rows}


def through(manager: Manager, agenda: Agenda, world_size: int, calls: int) -> dict[str, list[float]]:
    """Wall seconds of each `decide` and `commit` of that many updates, by ranks with made-up masks."""
    seconds: dict[str, list[float]] = {"decide": [], "commit": []}
    attempt = manager.begin("benchmark", agenda.model_dump(mode="json"), world_size, 0, votes(agenda, 0, world_size), "").attempt
    for step in agenda.update_steps[:calls]:
        began = time.perf_counter()
        update = manager.decide(step)
        seconds["decide"].append(time.perf_counter() - began)
        of_all = votes(agenda, update.version, world_size)
        began = time.perf_counter()
        verdict = manager.commit(attempt, update.version, step, of_all, 0.0, None)
        seconds["commit"].append(time.perf_counter() - began)
        assert verdict.ok, verdict.why
    return seconds


def in_actor(folder: Path, config: PretrainConfig, agenda: Agenda, world_size: int, calls: int) -> dict[str, list[float]]:
    """`through` the actor that a run has on Ray, here on this machine; starts a Ray if this process is in none."""
    from raysparse.runtime.launch import SETTINGS

    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)
    import ray

    from raysparse.runtime.mask_actor import ManagerProxy, managers

    folder.mkdir()
    job = Job("pretrain", config.model_dump(mode="json"), {}, str(folder), "")
    started = not ray.is_initialized()
    if started:
        memory = 128 << 20
        ray.init("local", num_cpus=1, include_dashboard=False, object_store_memory=memory, logging_level=logging.ERROR, log_to_driver=False)
    try:
        with managers([job]):
            return through(ManagerProxy(folder), agenda, world_size, calls)
    finally:
        if started:
            ray.shutdown()


def votes(agenda: Agenda, version: int, world_size: int) -> list[Vote]:
    """What the ranks of one replica say of a version that is as planned; masks are numbers here."""
    nnz, layers = agenda.plan(version), range(len(agenda.shapes))

    def digests(of: int, rank: int) -> tuple[int, ...]:
        return tuple(hash((of, rank, layer)) for layer in layers)

    found = []
    for rank in range(world_size):
        here = tuple(live // world_size + (rank < live % world_size) for live in nnz.values())
        before, after = digests(version - 1, rank), digests(version, rank)
        found.append(Vote(rank, 0, here, before, after, after, here, here))
    return found
