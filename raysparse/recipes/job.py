"""A job is what travels to the workers: a verb, its checked config and what the driver prepared. Plain data, no tensors."""

import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysparse.config import Config, ConfigError
from raysparse.recipes.lease import beginning, drive, driving, is_of_driver
from raysparse.train import checkpoint
from raysparse.train.error import TrainingError
from raysparse.train.run import RunConfig

GOES_ON = ("pretrain", "finetune")
"""Verbs that write checkpoints, and so may change the number of their workers in the middle."""

NOT_IDENTITY = {
    "run": {"workers", "threads", "device", "max_failures", "hang_timeout_s", "grace_s", "folder", "name"},
    "logging": ...,
    "training": {"on_nan"},
    "checkpoint": {"keep", "asynchronous", "every", "patience_s"},
    "sharding": {"packed"},
    "optimizer": {"state"},
}
"""Config keys that may change when a run is resumed: they change nothing in what is computed (but for rounding, and what follows a NaN)."""


@dataclass(frozen=True)
class Job:
    """One stage of work for a worker group.

    Attributes:
        verb: names the recipe.
        config: its config as plain data; validates back to an equal object.
        prepared: what the driver found out before any worker started (data files, model facts).
        folder: where the stage writes.
        claim: this driver's mark in the folder; workers of an older driver stop when they see another.
    """

    verb: str
    config: dict[str, Any]
    prepared: dict[str, Any]
    folder: str
    claim: str

    @property
    def path(self) -> Path:
        return Path(self.folder)


def runs_in(folder: Path) -> str:
    """A sentence that names the runs right below a folder; empty where there is none."""
    names = sorted(file.parent.name for file in folder.glob("*/identity.json"))
    return f"It is a folder of runs: name one of {', '.join(str(folder / name) for name in names)}." if names else ""


def check_folder(verb: str, config: Config, run: RunConfig) -> None:
    """Call before anything long: the run folder must be new, or hold this very run.

    Raises:
        ConfigError: the name belongs to a run with another config or to something else, the folder cannot be written, or all
            of its checkpoints are damaged.
    """
    if verb not in GOES_ON:
        run.check_fixed(f"`raysparse {verb}` writes no checkpoints and would begin again with every change")
    check_place(run)
    folder, used = run.path, run.path / "identity.json"
    if used.exists():
        try:
            before = json.loads(used.read_text())
        except ValueError as error:
            raise ConfigError(f"Expected JSON in {used}. Got: {error}. Choose another run.name.") from None
        if changed := different_keys(before, {"verb": verb} | identity_of(config)):
            raise ConfigError(
                f"Expected run.name={run.name} to be new, or its config to be as it was. Got other values of: {', '.join(changed)}. "
                f"Choose another run.name, go back to that config ({folder / 'config.yaml'}), or delete the folder {folder}."
            )
        if not (folder / "summary.json").exists():
            checkpoint.newest(folder / "checkpoints")
    elif folder.exists() and not all(map(is_of_driver, folder.iterdir())):
        raise ConfigError(f"Expected {folder} to be a raysparse run, or empty. Got other files there. Choose another run.name.")


def check_place(run: RunConfig) -> None:
    """Raise a `ConfigError` if the run folder cannot be written."""
    parent = next(path for path in (run.path, *run.path.parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"Expected {run.path} to be a folder that can be written. Got {parent}, which cannot. Choose another run.folder.")


@contextmanager
def opening(verb: str, config: Config, run: RunConfig) -> Iterator[None]:
    """Inside, what may take long before `open_job`: the folder is checked, and this process drives the run, if it is not finished.

    Raises:
        ConfigError: as `check_folder`, or another process drives the run. After any error in here the folder is as it was.
    """
    check_place(run)
    with nullcontext() if (run.path / "summary.json").exists() else beginning(run.path):
        check_folder(verb, config, run)
        yield


def open_job(verb: str, config: Config, run: RunConfig, prepared: Mapping[str, Any], content: Mapping[str, str] | None = None) -> Job:
    """Make or reopen the run folder and drive the run; a finished run's is left as it is.

    Args:
        prepared: what the workers need to know.
        content: names the data and weights that the run reads, so that other ones are not taken for the same run.

    Raises:
        ConfigError: as `check_folder`, a run of this name has read other content, or another process drives it.
    """
    check_folder(verb, config, run)
    folder, content = run.path, dict(content or {})
    folder.mkdir(parents=True, exist_ok=True)
    used = folder / "content.json"
    before = json.loads(used.read_text()) if used.exists() else content
    if before != content:
        raise ConfigError(
            f"Expected run.name={run.name} to read what it read before. Got other content of: {', '.join(different_keys(before, content))} "
            "(the config is the same, the files are not). Choose another run.name, or restore the files."
        )
    job = Job(verb, config.model_dump(mode="json"), dict(prepared), str(folder), secrets.token_hex(8))
    if finished(job) is not None:
        return job
    drive(folder)
    write_atomically(used, json.dumps(content))
    write_atomically(folder / "identity.json", json.dumps({"verb": verb} | identity_of(config)))
    write_atomically(folder / "config.yaml", config.to_yaml())
    write_atomically(folder / "claim", job.claim)
    return job


def carrying_out(jobs: Sequence[Job]) -> AbstractContextManager[None]:
    """While inside, this process drives the jobs that are not finished; after it, others may.

    Raises:
        ConfigError: another process drives one.
    """
    return driving(*(job.path for job in jobs if finished(job) is None))


def check_claim(job: Job) -> None:
    """Raise a `TrainingError` if another driver has taken over the run folder."""
    found = (job.path / "claim").read_text()
    if found != job.claim:
        raise TrainingError(f"Expected to be the only driver of {job.folder}. Got a newer one, which goes on. Nothing to do.")


def identity_of(config: Config) -> dict[str, Any]:
    """What makes a run that run: its config without the keys that may change on resuming."""
    values = config.model_dump(mode="json")
    for section, keys in NOT_IDENTITY.items():
        if section in values:
            values[section] = {} if keys is ... else {key: v for key, v in values[section].items() if key not in keys}
    return values


def write_atomically(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    partial.write_text(text, encoding="utf-8")
    partial.rename(file)


def finished(job: Job) -> dict[str, Any] | None:
    """The summary of a run that has ended, or None."""
    file = job.path / "summary.json"
    return json.loads(file.read_text()) if file.exists() else None


def different_keys(before: Any, after: Any, at: str = "") -> list[str]:
    """Dotted keys whose values differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = list(before) + [key for key in after if key not in before]
        return [key for k in keys for key in different_keys(before.get(k), after.get(k), f"{at}.{k}" if at else k)]
    return [] if before == after else [at]
