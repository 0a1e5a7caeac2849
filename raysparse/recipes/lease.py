"""Who drives a run folder: one process at a time.

The driver keeps a file ``driver.N.json`` there that says who it is, touches it every few seconds, and removes it at the end. Whoever
finds one that lives is refused. Whoever finds one that is dead makes the file of the next number, which succeeds for one process
alone (O_EXCL, on NFS too). A driver on this machine is asked of the kernel; of one elsewhere all that is seen is whether its file is
still touched: no clock is compared with that of another machine.
"""

import atexit
import json
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from raysparse.config import ConfigError

log = logging.getLogger(__name__)
BEAT_S = 5.0
"""Between touches."""
LEASE_S = 30.0
"""A driver elsewhere that has not touched its file for so long is dead."""
NAME = re.compile(r"driver\.(\d+)\.json")

_held: dict[Path, int] = {}
"""Folder -> N, of what this process drives."""
_lock = Lock()
_heart: Thread | None = None


def drive(folder: Path) -> bool:
    """Be the driver of a folder until `leave`, or the end of this process; False if this process is that already.

    Raises:
        ConfigError: another process is.
    """
    global _heart
    with _lock:
        if folder in _held and _held[folder] == _newest(folder):
            return False
        _held[folder] = _take(folder)
        if _heart is None or not _heart.is_alive():
            _heart = Thread(target=_beat, daemon=True, name="heartbeat")
            _heart.start()
        return True


def leave(folder: Path) -> None:
    """The next driver need not wait."""
    if number := _held.pop(folder, 0):
        _file(folder, number).unlink(missing_ok=True)


@contextmanager
def driving(*folders: Path) -> Iterator[None]:
    """`drive` them while inside."""
    try:
        for folder in folders:
            drive(folder)
        yield
    finally:
        for folder in folders:
            leave(folder)


@contextmanager
def beginning(folder: Path) -> Iterator[None]:
    """`drive` a folder; after an error inside it is as it was before."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    fresh = drive(folder)
    try:
        yield
    except BaseException:
        if fresh:
            leave(folder)
        with suppress(OSError):  # one is not empty
            for path in new:
                path.rmdir()
        raise


def is_of_driver(file: Path) -> bool:
    return NAME.fullmatch(file.name) is not None


def _take(folder: Path) -> int:
    while True:
        number = _newest(folder)
        if number and not _outlived(_file(folder, number)):
            continue  # it has left
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with _file(folder, number + 1).open("x", encoding="utf-8") as stream:
                stream.write(json.dumps(_myself()))
        except FileExistsError:  # another was quicker
            time.sleep(0.1)
            continue
        for older in range(1, number + 1):
            _file(folder, older).unlink(missing_ok=True)
        return number + 1


def _outlived(file: Path) -> bool:
    """Whether the driver of a file is dead; False if it has left meanwhile.

    Raises:
        ConfigError: it lives.
    """
    seen = _look(file)
    if seen is None:
        return False
    who = _parse(seen[0])
    if who.get("place") == _place():
        if _born(who["pid"]) == who["born"] and who["pid"] != os.getpid():
            raise _refused(file, who)
        return True
    log.warning("%s was driven by %s. Waiting up to %g s to see whether it still is.", file.parent, _name(who), LEASE_S)
    deadline = time.monotonic() + LEASE_S
    while time.monotonic() < deadline:
        time.sleep(min(0.5, LEASE_S / 10))
        if (now := _look(file)) is None:
            return False
        if now != seen:
            raise _refused(file, _parse(now[0]))
    return True


def _refused(file: Path, who: dict[str, Any]) -> ConfigError:
    return ConfigError(
        f"Expected to be the only driver of {file.parent}. Got another that lives: {_name(who)}. Wait until it has ended, or end it "
        f"(kill {who.get('pid', 'it')}) and start again, which goes on from its last checkpoint; or choose another run.name."
    )


def _name(who: dict[str, Any]) -> str:
    return "process {pid} on {host}, since {since}".format(**who) if who else "a process that has only just begun"


def _parse(text: str) -> dict[str, Any]:
    """Nothing of a driver that died, or is, between making its file and writing it."""
    try:
        return json.loads(text)
    except ValueError:
        return {}


def _look(file: Path) -> tuple[str, int] | None:
    """What a driver's file says, and when it was touched by the clock of whoever keeps it; opened each time, for NFS remembers."""
    try:
        with file.open(encoding="utf-8") as stream:
            return stream.read(), os.fstat(stream.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _myself() -> dict[str, Any]:
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "born": _born(os.getpid()), "place": _place()}


def _place() -> str:
    """Equal for processes that see each other in ``/proc``: same machine, same boot, same container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux: nobody is seen
        return secrets.token_hex(8)


def _born(pid: int) -> str | None:
    """When a process started, in the kernel's ticks: another one of the same number has another; None of one that is dead."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else rest[18]


def _newest(folder: Path) -> int:
    """The highest N there, or 0."""
    return max((int(match[1]) for file in folder.glob("driver.*.json") if (match := NAME.fullmatch(file.name))), default=0)


def _file(folder: Path, number: int) -> Path:
    return folder / f"driver.{number}.json"


def _beat() -> None:
    while True:
        time.sleep(BEAT_S)
        for folder, number in list(_held.items()):
            with suppress(OSError):  # it was taken over, or the storage is away
                os.utime(_file(folder, number))


@atexit.register
def _leave_all() -> None:
    for folder in list(_held):
        with suppress(OSError):
            leave(folder)


os.register_at_fork(after_in_child=_held.clear)  # it drives nothing
