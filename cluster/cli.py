"""The verbs `submit`, `jobs` and `tensorboard`: their words, their help, and what they do."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raysparse.config import load

RUNS = ("pretrain", "prune", "finetune", "evaluate", "zeroshot", "compare", "gradual", "recover", "tune")
"""Verbs that start runs."""

SUBMIT_HELP = (
    "send a run to a Ray cluster, and leave",
    """Checks the config here as far as what it reads is here, asks the cluster whether it can ever hold the workers, packs the working
directory with the resolved config, and starts the verb on the head node as a Ray job, named raysparse-NAME-1 after run.name. What it
cannot check before it leaves it says; that all nodes share the folders is the first thing that the job finds out.

What travels: the files of this folder that git does not ignore (tracked or not). Never: .git, what .gitignore names, secrets by their
names (.env, *.pem, *.key, id_rsa*, credentials*, .netrc, *_token, .ssh, ...; cluster/README.md lists them), links out of the folder,
and raysparse itself, which must be installed on every node. What travels is listed with its size, and more than --max-ship is refused.

Where it writes: run.folder and the cache must be absolute paths on storage that every node shares; relative ones are refused, and on
several nodes those below ~ and /tmp.

--follow shows the log with the progress lines, and goes on where it was when the connection was lost; Ctrl-C leaves the job alone.
Exit status: 0 on its way (with --follow: succeeded), 1 the job failed or was stopped, 2 you can mend it.

The cluster's address is --address, else RAY_API_SERVER_ADDRESS, else RAY_ADDRESS if it begins with http, else http://127.0.0.1:8265. A
cluster with tokens wants RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH).

examples:
  raysparse submit --follow pretrain configs/pretrain/mst_gpt2_small.yaml run.folder=/shared/runs data.cache_dir=/shared/cache run.workers=8
  raysparse submit --address http://head:8265 --dry-run compare configs/compare/quickstart.yaml run.folder=/shared/runs
  raysparse submit finetune configs/finetune/e2e.yaml --grid run.folder=/shared/runs cache_dir=/shared/cache model.path=/shared/runs/mst""",
)
"""Short and long help of `raysparse submit`."""

JOBS_HELP = (
    "list, look at, stop the jobs of a Ray cluster, and read their logs",
    """list          every job that was submitted: its ID, status, run, when it began and how long it took
status ID     one of them, with what Ray says about it
stop ID       end it; the same submission goes on from the last checkpoint
logs ID       what it has printed; with --follow also what it prints until it is over (exit status 1 if it failed)

ID may also be the name of a run: its newest job is meant. The address is that of `raysparse submit`.

examples:
  raysparse jobs
  raysparse jobs logs mst --follow
  raysparse jobs --address http://head:8265 stop raysparse-mst-2""",
)
"""Short and long help of `raysparse jobs`."""


BOARD_HELP = (
    "show the curves of a run in TensorBoard, on this machine",
    """Starts TensorBoard on a run's folder, or on a folder of runs such as a comparison's, and prints its address. It listens on 127.0.0.1
alone; Ctrl-C ends it. RUN may be a folder or a name below runs/. On another machine that has the run's storage, reach it through
`ssh -L 6006:127.0.0.1:6006 MACHINE`.

examples:
  raysparse tensorboard quickstart
  raysparse tensorboard /shared/runs --port 0          a free port""",
)
"""Short and long help of `raysparse tensorboard`."""


def add(verbs: Any, form: Any) -> None:
    """Declare the verbs."""
    sub = verbs.add_parser("submit", help=SUBMIT_HELP[0], description=f"{SUBMIT_HELP[0]}.\n\n{SUBMIT_HELP[1]}", formatter_class=form)
    sub.add_argument("what", choices=RUNS, metavar="VERB", help=", ".join(RUNS))
    sub.add_argument("words", nargs="*", metavar="CONFIG.yaml | key=value", help="config files and overrides, in any order")
    _address(sub)
    sub.add_argument("--follow", action="store_true", help="show the job's log until it is over")
    sub.add_argument("--dry-run", action="store_true", help="check everything, list every file, send nothing")
    sub.add_argument("--max-ship", default="100MB", metavar="SIZE", help="refuse to ship more than this (default: 100MB)")
    sub.add_argument("--grid", action="store_true", help="of finetune: run every combination of `grid`")
    sub.add_argument(
        "--autoscaling", action="store_true", help="the cluster adds nodes itself: do not refuse what its present ones cannot hold"
    )
    sub.add_argument(
        "--unchecked", action="store_true", help="leave the config's own checks to the cluster, where this machine lacks what it has"
    )
    sub.add_argument("--json", action="store_true", help="print the facts as JSON on stdout")
    sub = verbs.add_parser("jobs", help=JOBS_HELP[0], description=f"{JOBS_HELP[0]}.\n\n{JOBS_HELP[1]}", formatter_class=form)
    sub.add_argument("what", nargs="?", default="list", choices=["list", "status", "stop", "logs"], metavar="list|status|stop|logs")
    sub.add_argument("id", nargs="?", metavar="ID", help="a job, or the name of a run")
    _address(sub)
    sub.add_argument("--follow", action="store_true", help="of logs: until the job is over")
    sub.add_argument("--json", action="store_true", help="print the facts as JSON on stdout")
    sub = verbs.add_parser("tensorboard", help=BOARD_HELP[0], description=f"{BOARD_HELP[0]}.\n\n{BOARD_HELP[1]}", formatter_class=form)
    sub.add_argument("run", metavar="RUN", help="a run, or a folder of runs")
    sub.add_argument("--port", type=int, default=6006, help="default: 6006; 0 takes a free one")


def submit(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from cluster.check import KINDS
    from cluster.submit import submit

    if args.grid and args.what != "finetune":
        parser.error("--grid is of finetune")
    files = [word for word in args.words if "=" not in word or Path(word).is_file()]
    config = load(KINDS[args.what], files, [word for word in args.words if word not in files])
    return submit(args.what, config, args)


def jobs(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from cluster import client
    from cluster.submit import follow

    if args.words:
        parser.error(f"unexpected {' '.join(args.words)}")
    if (args.id is None) != (args.what == "list"):
        parser.error("list takes no ID" if args.what == "list" else f"{args.what} needs the ID of a job, or the name of a run")
    address = client.address_of(args.address)
    server = client.connect(address)
    if args.what == "list":
        found = [_facts(job) for job in client.jobs(server, address)]
        print(json.dumps(found, indent=1) if args.json else _table(found))
        return 0
    job = client.find(server, address, args.id)
    if args.what == "logs":
        if args.follow:
            return follow(server, address, job.submission_id)
        with client.hints(address):
            print(server.get_job_logs(job.submission_id), end="")
        return 0
    if args.what == "stop" and not client.is_over(job):
        job = client.stop(server, address, job.submission_id)
    facts = _facts(job) | {"message": job.message}
    print(json.dumps(facts, indent=1) if args.json else "\n".join(f"{key:<8} {value}" for key, value in facts.items() if value is not None))
    return 0 if args.what != "stop" or client.is_over(job) else 1


def tensorboard(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from cluster import board

    if args.words:
        parser.error(f"unexpected {' '.join(args.words)}")
    board.serve(board.find(args.run), args.port)
    return 0


VERBS: dict[str, Callable[[argparse.Namespace, argparse.ArgumentParser], int]] = {
    "submit": submit,
    "jobs": jobs,
    "tensorboard": tensorboard,
}


def _address(parser: Any) -> None:
    parser.add_argument("--address", metavar="URL", help="the cluster's dashboard (default: http://127.0.0.1:8265, and see above)")


def _facts(job: Any) -> dict[str, Any]:
    from cluster.client import VERB, run_of

    begin, end = (None if t is None else t / 1000 for t in (job.start_time, job.end_time))
    return {
        "id": job.submission_id,
        "status": str(job.status),
        "verb": (job.metadata or {}).get(VERB),
        "run": run_of(job) or None,
        "began": None if begin is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(begin)),
        "seconds": None if begin is None else round((end or time.time()) - begin),
    }


def _table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "No jobs."
    cells = [list(rows[0]), *([("" if value is None else str(value)) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)
