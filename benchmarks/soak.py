"""A run that goes on for hours while workers die: is what it holds flat?

    python -m benchmarks.soak                        one hour
    python -m benchmarks.soak --minutes 6 --lose-every 1 --warmup 1

An MST run on Ray with two workers saves a checkpoint about every 30 seconds and loses a worker, drawn by `--seed`, to SIGKILL every
five minutes. Every ten seconds the benchmark looks at the memory, file handles and threads of the command, its workers, the mask
manager, Ray Train's controller and Ray's own processes, at Ray's object store and at the run folder. Slopes are those of medians over
the time between two losses, after a warm-up. Linux only. Exit status 1 if a bound is missed.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from benchmarks.measure import write
from benchmarks.processes import Held, command, held, tree
from benchmarks.soak_report import ROLES, Soak, picture, report, series, within_lives
from raysparse.runtime.live import MANAGER
from raysparse.runtime.ray_run import PROGRESS
from raysparse.train.checkpoint import MARKER, committed
from raysparse.train.state import HISTORY

SAVE_S, LOOK_S = 30.0, 10.0
KINDS = ("checkpoints", "metrics", "progress", "tensorboard")
"""How files and folders of a run begin. Journals count apart: the run's, and the copies in its checkpoints."""


def config(folder: Path, name: str, warmup: int, steps: int, save_every: int) -> Path:
    """A GPT of 0.9 million parameters on made-up text; MST with an update every 20 steps.

    Args:
        warmup: steps until it is sparse, and at the end from then on.
    """
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        draw = random.Random(0)
        words = [f"word{k}" for k in range(400)]
        corpus.write_text("".join(json.dumps({"text": " ".join(draw.choices(words, k=400))}) + "\n" for _ in range(400)))
    attention = {"type": "local_or_strided", "width": 16, "stride": 16}
    curve = {"type": "polynomial", "start": 1, "end": 0, "mirrored": True}
    values = {
        "run": {"name": name, "folder": str(folder / "runs"), "workers": 2, "device": "cpu"},
        "model": {"preset": "debug", "overrides": {"n_embd": 128, "n_head": 4, "n_layer": 4}},
        "data": {
            "train": {"type": "files", "paths": [str(corpus)]},
            "validation": {"type": "holdout", "fraction": 0.1},
            "tokenizer": {"type": "train", "vocab_size": 512},
            "context": 64,
            "cache_dir": str(folder / "cache"),
        },
        "sparsity": {
            "target": 0.8,
            "distribution": {"type": "er"},
            "include": ["block_linears", "lm_head.weight"],
            "evolution": {"type": "mixed", "update_interval": 20},
            "timeline": [
                {"name": "warm_up", "length": warmup, "sparsity": {"type": "polynomial"}, "attention": attention},
                {"name": "ultra_sparsification", "length": steps - 2 * warmup, "attention": attention},
                {"name": "restoration", "length": warmup, "sparsity": curve},
            ],
        },
        "training": {"length": steps, "sequences": 8, "micro": 4, "validate_every": 10 * save_every, "validation_sequences": 16},
        "checkpoint": {"every": save_every},
        "logging": {"every": 10},
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def start(folder: Path, file: Path) -> "subprocess.Popen[bytes]":
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"RAY_AUTH_MODE": "disabled"}
    with (folder / "console.txt").open("a") as said:
        words = [sys.executable, "-m", "raysparse", "pretrain", str(file)]
        return subprocess.Popen(words, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)


def calibrate(folder: Path) -> float:
    """Seconds of a step."""
    process = start(folder, config(folder, "calibration", 60, 300, 300))
    if process.wait():
        raise RuntimeError(f"Expected a run to calibrate with. Got exit status {process.returncode}; see {folder / 'console.txt'}.")
    records = [json.loads(line) for line in (folder / "runs" / "calibration" / "metrics.jsonl").read_text().splitlines()]
    return median(record["step_seconds"] for record in records[3:] if "step_seconds" in record)


def soak(folder: Path, minutes: float, lose_every: float, seed: int) -> Soak:
    step_s = calibrate(folder)
    every = max(1, round(SAVE_S / step_s))
    found = Soak(folder / "runs" / "soak", step_s, every)
    steps = round(60 * minutes / step_s)  # as many as that if the machine stays as busy as it is
    process = start(folder, config(folder, "soak", max(60, steps // 10), 20 * steps, every))
    draw = random.Random(seed)
    try:
        _wait(process, lambda: committed(found.folder / "checkpoints"), 300)
        began = time.monotonic()
        next_loss = 60 * lose_every
        while (now := time.monotonic() - began) < 60 * minutes:
            if process.poll() is not None:
                raise RuntimeError(f"Expected the run to go on. Got exit status {process.returncode}; see {folder / 'console.txt'}.")
            if lose_every and now >= next_loss and now < 60 * (minutes - 1):
                found.losses.append({"seconds": now} | lose(found.folder, process, draw))
                next_loss += 60 * lose_every
            for checkpoint in committed(found.folder / "checkpoints"):
                with contextlib.suppress(OSError):  # a newer one took its place
                    found.saved[checkpoint.name] = (checkpoint / MARKER).stat().st_mtime
            found.samples.append(look(found.folder, process.pid) | {"seconds": time.monotonic() - began})
            time.sleep(max(0.0, LOOK_S - (time.monotonic() - began - now)))
        descendants = tree(process.pid)
        process.send_signal(signal.SIGINT)
        asked = time.monotonic()
        process.wait(120)
        time.sleep(5)
        left = [command(pid) for pid in descendants if held(pid)]
        found.ended = {"status": process.returncode, "seconds": time.monotonic() - asked - 5, "left_behind": left}
    except RuntimeError as error:
        found.ended = {"error": str(error)}
    finally:
        if process.poll() is None:
            process.kill()
    return found


def look(folder: Path, root: int) -> dict[str, Any]:
    """What is held now, by role, in the object store and in the run folder."""
    workers = _json(folder / "workers.json") or []
    roles: dict[str, Held] = {}
    for pid in tree(root):
        if (one := held(pid)) is not None:
            role = "command" if pid == root else "workers" if pid in workers else role_of(command(pid))
            roles[role] = roles[role] + one if role in roles else one
    parts: dict[str, int] = {}
    for file, size in _sizes(folder).items():
        kind = "journal" if file.endswith(HISTORY) else next((name for name in KINDS if file.startswith(name)), "rest of the folder")
        parts[kind] = parts.get(kind, 0) + size
    return {
        "step": last_step(folder),
        "workers": workers,
        "roles": {role: asdict(one) for role, one in roles.items()},
        "object_store_bytes": object_store_bytes(folder),
        "checkpoints": len(committed(folder / "checkpoints")),
        "disk": parts | {"Ray's logs": log_bytes(root)},
    }


def role_of(words: str) -> str:
    """The first that fits. Of a program what it was started with does not count, but for Python's."""
    shown = words if "python" in words.split(" ")[0] else words.split(" ")[0]
    return next(role for role, mark in ROLES.items() if mark is not None and mark in shown)


def log_bytes(root: int) -> int:
    """Of Ray's session, which keeps a file for each process that it had."""
    words = next((words for pid in tree(root) if "gcs_server" in (words := command(pid))), "")
    folder = next((word.partition("=")[2] for word in words.split(" ") if word.startswith("--log_dir=")), None)
    return sum(_sizes(Path(folder)).values()) if folder else 0


def object_store_bytes(folder: Path) -> int | None:
    """In use on the cluster of the run; asked without joining it, which would start processes there."""
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    if (manager := _json(folder / MANAGER)) is None:
        return None
    return get_memory_info_reply(get_state_from_address(manager["address"])).store_stats.object_store_bytes_used


def lose(folder: Path, process: Any, draw: random.Random) -> dict[str, Any]:
    """Kill a worker, and wait until the run goes on."""
    pids, step, size, began = _json(folder / "workers.json"), last_step(folder), (folder / PROGRESS).stat().st_size, time.monotonic()
    rank = draw.randrange(len(pids))
    os.kill(pids[rank], signal.SIGKILL)
    _wait(process, lambda: _json(folder / "workers.json") not in (None, pids), 300)
    new = (folder / PROGRESS).stat().st_size
    _wait(process, lambda: _steps(_told(folder, new)), 300)
    recovered = time.monotonic() - began
    (origin,) = {text.rpartition("step_")[2] for record in _told(folder, size) if "going on from" in (text := record.get("text", ""))}
    return {"rank": rank, "killed_at": step, "went_on_from": int(origin), "recovery_s": recovered}


def last_step(folder: Path) -> int:
    return max(_steps(_told(folder, max(0, (folder / PROGRESS).stat().st_size - 10_000))), default=0)


def _told(folder: Path, start: int) -> list[dict[str, Any]]:
    """The records from that place of the progress on."""
    with (folder / PROGRESS).open("rb") as stream:
        stream.seek(start)
        lines = stream.read().split(b"\n")
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):  # the first and last may be parts of one
            found.append(json.loads(line))
    return [record for record in found if isinstance(record, dict)]


def _steps(records: Sequence[dict[str, Any]]) -> list[int]:
    return [record["step"] for record in records if "loss" in record]


def _wait(process: Any, done: Any, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while not done():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"Expected the run to go on within {patience_s:.0f} s. Got none: exit status {process.poll()}.")
        time.sleep(0.1)


def _json(file: Path) -> Any:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(file.read_text())
    return None


def _sizes(folder: Path) -> dict[str, int]:
    """Path below the folder -> bytes; what is deleted meanwhile is left out."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            file = Path(place) / name
            with contextlib.suppress(OSError):
                found[file.relative_to(folder).as_posix()] = file.lstat().st_size
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--lose-every", type=float, default=5.0, help="minutes; 0: never")
    parser.add_argument("--warmup", type=float, default=10.0, help="minutes that do not count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the run lies, and stays; default: one that is deleted")
    parser.add_argument("--out", type=Path, help="folder for soak_<hardware>_<date>.{json,md,svg}")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found = soak(folder.absolute(), args.minutes, args.lose_every, args.seed)
    values, lives = series(found, 60 * args.warmup), within_lives(found, 60 * args.warmup)
    tables, met = report(found, values, lives)
    print("\n".join(tables))
    if args.out:
        file = write(args.out, "soak", asdict(found) | {"folder": None, "series": values, "within_lives": lives}, tables, indent=None)
        file.with_suffix(".svg").write_text(picture(found))
        file.write_text(f"{file.read_text()}\n![memory over time]({file.stem}.svg)\n")
        print(file)
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
