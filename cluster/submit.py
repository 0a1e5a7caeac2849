"""Send a run to a Ray cluster: check it here, pack the working directory and the resolved config, start it as a job, follow its log."""

import json
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import client as jobs
from cluster.check import KINDS, check_config, check_resources, check_storage
from cluster.ship import Parcel, check_names, check_size, collect, pack, parse_size, show
from raysparse import __version__
from raysparse.config import ConfigError, together

CONFIG = "raysparse-job/config.yaml"
"""Where the resolved config lies in what is shipped."""
LEFT = (
    "that the data and models it names by absolute paths are there",
    "that every node shares run.folder and the cache (the first thing that the job asks)",
    "that the run's name is new there, or holds this very run",
)
"""What no laptop can know of a cluster."""

PATIENCE = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "1800"}
"""A node of a cloud takes minutes to come."""


@dataclass(frozen=True)
class Submission:
    """What is to run, and what travels for it."""

    verb: str
    config: Any
    whole_grid: bool
    parcel: Parcel

    @property
    def run(self) -> str:
        """The run's folder; that it is absolute was checked."""
        return f"{self.config.run.folder.rstrip('/')}/{self.config.run.name}"

    @property
    def entrypoint(self) -> str:
        """What the head node's shell gets to see: fixed words alone. Everything that a user wrote travels in the config file."""
        assert self.verb in KINDS
        more = ["--grid"] if self.whole_grid else ["--resume"] if self.verb == "tune" else []  # a search that is new there begins
        return shlex.join(["python", "-m", "cluster.begin", self.verb, CONFIG, *more])


def prepare(
    verb: str, config: Any, folder: Path, max_ship: str, whole_grid: bool = False, unchecked: bool = False
) -> tuple[Submission, list[str]]:
    """All that can be done without a cluster; returns also what is left for it to check.

    Raises:
        ConfigError: everything that this machine can see to be wrong.
    """
    parcel, left = collect(folder), []

    def check() -> None:
        left.extend(["the config's own checks (--unchecked)"] if unchecked else check_config(config, parcel, whole_grid))

    ship = (lambda: check_names(parcel), lambda: check_size(parcel, parse_size(max_ship)))
    together(check, *ship, lambda: check_storage(config, 1))
    return Submission(verb, config, whole_grid, parcel), [*left, *LEFT]


def send(submission: Submission, client: Any, address: str, grows: bool) -> str:
    """Upload and start; returns the job's ID, which names the run.

    Args:
        grows: the cluster may have to add nodes first: the workers have time until then.

    Raises:
        ConfigError: the run is on its way already, or the cluster does not take it.
    """
    found = jobs.jobs(client, address)
    for job in found:
        if jobs.run_of(job) == submission.run and not jobs.is_over(job):
            raise ConfigError(
                f"Expected {submission.run} not to be running. Got job {job.submission_id}, which is {job.status}. "
                f"Follow it (raysparse jobs logs {job.submission_id} --follow), stop it, or choose another run.name."
            )
    job_id = jobs.next_id(found, submission.config.run.name)
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "raysparse.zip"
        pack(submission.parcel, {CONFIG: submission.config.to_yaml()}, archive)
        with jobs.hints(address):
            return client.submit_job(
                entrypoint=submission.entrypoint,
                submission_id=job_id,
                runtime_env={"working_dir": str(archive)} | ({"env_vars": PATIENCE} if grows else {}),
                metadata={jobs.RUN: submission.run, jobs.VERB: submission.verb, "raysparse_version": __version__},
            )


def submit(verb: str, config: Any, args: Any) -> int:
    """The verb `submit`; returns the exit status: of the job with --follow, else 0 once it is on its way."""
    submission, left = prepare(verb, config, Path.cwd(), args.max_ship, args.grid, args.unchecked)
    address = jobs.address_of(args.address)
    client = jobs.connect(address)
    nodes = jobs.nodes(address)
    check_storage(config, len(nodes))
    grows = args.autoscaling or jobs.grows(client, address)
    room = check_resources(config.run, nodes, grows)
    print(show(submission.parcel, every_file=args.dry_run), file=sys.stderr)
    print(f"needs {room}", file=sys.stderr)
    print("left to the cluster:\n" + "\n".join(f"  {line}" for line in left), file=sys.stderr)
    facts: dict[str, Any] = {
        "address": address,
        "run": submission.run,
        "files": submission.parcel.files,
        "left_out": submission.parcel.left_out,
        "left_to_the_cluster": left,
        "entrypoint": submission.entrypoint,
    }
    if args.dry_run:
        print(json.dumps(facts, indent=1) if args.json else f"{config.to_yaml()}\nAll that can be checked here is sound. Nothing was sent.")
        return 0
    job_id = send(submission, client, address, grows)
    print(json.dumps(facts | {"id": job_id}, indent=1) if args.json else f"{job_id} is on its way: {submission.run}", flush=True)
    if args.follow:
        return follow(client, address, job_id)
    jobs.say(f"raysparse jobs logs {job_id} --follow shows it; raysparse jobs stop {job_id} ends it")
    return 0


def follow(client: Any, address: str, job_id: str) -> int:
    """Show the job's log until it is over; the exit status is whether it succeeded."""
    try:
        job = jobs.follow(client, address, job_id, lambda text: print(text, end="", flush=True), jobs.say)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the job goes on: raysparse jobs logs {job_id} --follow shows it again") from None
    if str(job.status) == "SUCCEEDED":
        jobs.say(f"{job_id} has succeeded")
        return 0
    reason = (job.message or "").strip().splitlines()[:1]
    jobs.say(f"{job_id} is {job.status}{': ' + reason[0] if reason else ''}. The same submission goes on from the last checkpoint.")
    return 1
