"""The job server of a Ray cluster, over HTTP: connections whose errors are hints, nodes, jobs, and logs that survive a lost connection."""

import asyncio
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from cluster.check import Node
from raysparse.config import ConfigError
from raysparse.runtime.nodes import has_types

DEFAULT = "http://127.0.0.1:8265"
TIMEOUT_S = 60.0
"""Of one answer."""
SILENCE_S = 60.0
"""After so long without a line the log is asked for anew: a connection may be dead without anybody having said so."""
RETRY_S, RETRY_MOST_S = 1.0, 30.0
"""Between attempts to connect: at first, and at most."""
RUN, VERB = "raysparse_run", "raysparse_verb"
"""Keys of a job's metadata: the run's folder and the verb."""


def address_of(given: str | None) -> str:
    """The cluster's dashboard: as given, else RAY_API_SERVER_ADDRESS, else RAY_ADDRESS where that is a dashboard's, else this machine's."""
    of_ray = os.environ.get("RAY_ADDRESS", "")
    address = given or os.environ.get("RAY_API_SERVER_ADDRESS") or (of_ray if of_ray.startswith("http") else DEFAULT)
    address = address.rstrip("/") if "://" in address else f"http://{address.rstrip('/')}"
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"Expected the address of a Ray dashboard, such as {DEFAULT}. Got {address}. Correct --address.")
    return address


@contextmanager
def hints(address: str) -> Iterator[None]:
    """What a cluster can answer wrong, as one line that says what to do."""
    import requests
    from ray.exceptions import AuthenticationError
    from ray.util.state.exception import RayStateApiException

    try:
        yield
    except AuthenticationError as error:
        raise ConfigError(
            f"Expected a token that the cluster at {address} takes. Got: {str(error).splitlines()[0]}. "
            "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH; `ray get-auth-token` on the head node prints the token."
        ) from None
    except (OSError, requests.RequestException, RayStateApiException) as error:
        raise ConfigError(_unreachable(address, error)) from None
    except RuntimeError as error:
        raise ConfigError(
            f"Expected the job server of a Ray cluster at {address}. Got: {str(error).splitlines()[0]:.300}. "
            "Correct --address, or see the cluster's logs."
        ) from None


def connect(address: str) -> Any:
    """Ray's own client of the job server."""
    parts = urlsplit(address)
    assert parts.hostname is not None
    try:  # requests would wait for minutes
        socket.create_connection((parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)), timeout=10).close()
    except OSError as error:
        raise ConfigError(_unreachable(address, error)) from None
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers its environment to an argument
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    with hints(address):
        client: Any = JobSubmissionClient(address)
        client._do_request = partial(client._do_request, timeout=TIMEOUT_S)  # it has none of its own
    return client


def _unreachable(address: str, error: Exception) -> str:
    return (
        f"Expected a Ray dashboard at {address}. Got: {str(error).splitlines()[0]:.200}. Start the cluster, correct --address, or open "
        "the way to it (ray dashboard cluster.yaml; kubectl port-forward service/NAME-head-svc 8265)."
    )


def nodes(address: str) -> list[Node]:
    """The living ones, the head first."""
    from ray.util.state import list_nodes

    with hints(address):
        found = [node for node in list_nodes(address=address, limit=10_000, timeout=int(TIMEOUT_S)) if node.state == "ALIVE"]
    found.sort(key=lambda node: (not node.is_head_node, node.node_ip))
    names = [node.node_ip for node in found]
    several = {name for name in names if names.count(name) > 1}
    return [Node(f"{n.node_ip} ({n.node_id[:6]})" if n.node_ip in several else n.node_ip, n.resources_total) for n in found]


def grows(client: Any, address: str) -> bool:
    """Whether an autoscaler reports on the cluster; the second generation of Ray's does not, which is what --autoscaling is for."""
    with hints(address):
        answer = client._do_request("GET", "/api/cluster_status")
        status = answer.json()["data"].get("clusterStatus") if answer.ok else None
    return has_types(((status or {}).get("autoscalerReport") or {}).get("nodeTypeMapping"))


def jobs(client: Any, address: str) -> list[Any]:
    """All that were submitted, the newest first."""
    with hints(address):
        found = [job for job in client.list_jobs() if job.submission_id]
    return sorted(found, key=lambda job: job.start_time or 0, reverse=True)


def find(client: Any, address: str, word: str) -> Any:
    """The job of that ID, else the newest of the run of that name."""
    found = jobs(client, address)
    for job in found:
        if job.submission_id == word:
            return job
    for job in found:
        if run_of(job).rpartition("/")[2] == word:
            return job
    there = ", ".join(job.submission_id for job in found[:8]) or "none"
    raise ConfigError(f"Expected the ID of a job, or the name of a run that was submitted. Got {word}. On {address} there are: {there}.")


def run_of(job: Any) -> str:
    return (job.metadata or {}).get(RUN, "")


def is_over(job: Any) -> bool:
    return str(job.status) in ("SUCCEEDED", "FAILED", "STOPPED")


def next_id(found: list[Any], name: str) -> str:
    """``raysparse-NAME-N``, of which N is new on this cluster."""
    pattern = re.compile(rf"raysparse-{re.escape(name)}-(\d+)")
    used = [int(match[1]) for job in found if (match := pattern.fullmatch(job.submission_id))]
    return f"raysparse-{name}-{max(used, default=0) + 1}"


def stop(client: Any, address: str, job_id: str, patience_s: float = 60.0) -> Any:
    """Ask the job to end, and wait until it has."""
    with hints(address):
        client.stop_job(job_id)
        deadline = time.monotonic() + patience_s
        while not is_over(job := client.get_job_info(job_id)) and time.monotonic() < deadline:
            time.sleep(0.5)
    return job


def follow(client: Any, address: str, job_id: str, write: Callable[[str], object], tell: Callable[[str], object]) -> Any:
    """Hand on the job's log as it grows until the job is over; returns the job.

    A lost connection is told, and made anew until it holds: the log goes on where it was.
    """
    with hints(address):
        return asyncio.run(_follow(client, job_id, write, tell))


async def _follow(client: Any, job_id: str, write: Callable[[str], object], tell: Callable[[str], object]) -> Any:
    import aiohttp
    import requests

    lost = (
        OSError,
        aiohttp.ClientError,
        requests.RequestException,
        RuntimeError,
    )  # RuntimeError: Ray's for a broken websocket, and for 5xx
    seen, wait_s, told = 0, RETRY_S, False
    while True:
        try:
            job = await asyncio.to_thread(client.get_job_info, job_id)
            if told:
                tell("connected again")
            wait_s, told = RETRY_S, False
            over = is_over(job)
            async for text in _tail(client, job_id, seen):
                seen += len(text)
                write(text)
            if over:
                return job
            await asyncio.sleep(RETRY_S)
        except lost as error:
            if "status code 404" in str(error):
                raise
            if not told:
                tell(f"lost the connection ({type(error).__name__}: {str(error).splitlines()[0]:.120}); the job goes on, trying again")
            told = True
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, RETRY_MOST_S)


async def _tail(client: Any, job_id: str, seen: int) -> Any:
    """What the log has after its first `seen` characters, until it ends or is silent; Ray tells it from the start each time."""
    async with aclosing(client.tail_job_logs(job_id)) as chunks:
        while True:
            try:
                chunk = await asyncio.wait_for(anext(chunks), SILENCE_S)
            except (StopAsyncIteration, TimeoutError):
                return
            text, seen = chunk[seen:], max(0, seen - len(chunk))
            if text:
                yield text


def say(text: str) -> None:
    print(f"raysparse: {text}", file=sys.stderr, flush=True)
