"""The mask manager as an actor: it outlives worker groups, its own death costs a second, and any terminal can ask it.

The driver owns it, so it cannot outlive the run. It is pinned to the head node, where the driver and Ray Train's controller are
already. Its address is written to ``manager.json`` in the run folder: workers, which may be started again and again, and
`runtime.live` find it there.
"""

import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raysparse.recipes.finetune import FinetuneConfig
from raysparse.recipes.job import Job, finished, write_atomically
from raysparse.recipes.pretrain import PretrainConfig
from raysparse.runtime.live import MANAGER, NAMESPACE
from raysparse.sparsity.agenda import TopologyUpdate
from raysparse.sparsity.manager import MaskManager, Verdict, Vote
from raysparse.train.state import HISTORY

PATIENCE_S = 120.0
"""How long rank 0 waits for an answer. A manager that was killed is back in about a second, with its journal read."""


class ManagerProxy:
    """`MaskManager` in the actor of a run; its calls may be sent twice, if the actor dies in one.

    Raises:
        ConnectionError: by every call, if there is no answer in time or the actor is gone for good.
    """

    def __init__(self, folder: Path, patience_s: float = PATIENCE_S):
        import ray

        self._folder, self._patience_s = folder, patience_s
        address = json.loads((folder / MANAGER).read_text())
        try:
            self._actor = ray.get_actor(address["name"], address["namespace"])
        except ValueError as error:
            raise self._lost(str(error)) from None

    def begin(self, nonce: str, agenda: dict[str, Any], world_size: int, version: int, votes: Sequence[Vote], history: str) -> Verdict:
        return self._answer(self._actor.begin.remote(nonce, agenda, world_size, version, votes, history))

    def decide(self, step: int) -> TopologyUpdate:
        return self._answer(self._actor.decide.remote(step))

    def commit(self, attempt: int, version: int, step: int, votes: Sequence[Vote], seconds: float, skipped: str | None) -> Verdict:
        return self._answer(self._actor.commit.remote(attempt, version, step, votes, seconds, skipped))

    def published(self, attempt: int, version: int, checkpoint: str) -> None:
        self._answer(self._actor.published.remote(attempt, version, checkpoint))

    def history(self) -> list[dict[str, Any]]:
        return self._answer(self._actor.history.remote())

    def text(self, first: int, stop: int) -> str:
        return self._answer(self._actor.text.remote(first, stop))

    def _answer(self, reference: Any) -> Any:
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

        try:
            return ray.get(reference, timeout=self._patience_s)
        except GetTimeoutError:
            raise self._lost(f"no answer within {self._patience_s:.0f} s") from None
        except (RayActorError, RayTaskError) as error:  # it is gone, or could not write its journal
            raise self._lost(str(error).splitlines()[-1].rstrip(".")) from None

    def _lost(self, problem: str) -> ConnectionError:
        return ConnectionError(
            f"Expected the mask manager of {self._folder} on the head node. Got: {problem}. "
            "See whether the head node lives and has room; the same command goes on from the last checkpoint."
        )


@contextmanager
def managers(jobs: Sequence[Job]) -> Iterator[None]:
    """While inside, every job that is not finished and trains with masks has a manager; nobody waits for it to start.

    Raises:
        ConfigError: the journal of a run is not one.
    """
    import ray

    actors: dict[Path, Any] = {}
    try:
        for job in jobs:
            if finished(job) is None and _has_masks(job):
                journal, name = job.path / HISTORY, f"raysparse/{job.path}/{secrets.token_hex(4)}"
                MaskManager(journal)  # a journal that cannot be read is the user's to mend, before anything starts
                actors[job.path] = _actor_class(ray).options(name=name, namespace=NAMESPACE).remote(journal)
                write_atomically(job.path / MANAGER, json.dumps({"name": name} | _cluster(ray)))
        yield
    finally:
        for folder, actor in actors.items():
            (folder / MANAGER).unlink(missing_ok=True)
            ray.kill(actor, no_restart=True)


def _cluster(ray: Any) -> dict[str, str]:
    """What another process of the same user needs to join; no secrets, Ray keeps its token in the user's home."""
    auth = os.environ.get("RAY_AUTH_MODE", "disabled")  # ray.init has set it, where it turned tokens on
    return {"namespace": NAMESPACE, "address": ray.get_runtime_context().gcs_address, "auth": auth}


def _actor_class(ray: Any) -> Any:
    head = {"node:__internal_head__": 0.001}
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, resources=head)(MaskManager)


def _has_masks(job: Job) -> bool:
    if job.verb == "pretrain":
        return PretrainConfig.check(job.config).sparsity.wants_masks
    return job.verb == "finetune" and FinetuneConfig.check(job.config).sparsity.masks == "keep"
