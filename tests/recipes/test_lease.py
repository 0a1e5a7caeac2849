"""One driver a folder: who lives is not disturbed, who is dead is not waited for, and of two that come at once one goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import pytest

from raysparse.config import ConfigError
from raysparse.recipes import lease
from raysparse.recipes.lease import beginning, drive, driving, leave

ROOT = Path(__file__).parents[2]
LEASE = f"""import sys, time, runpy; from pathlib import Path
lease = runpy.run_path({lease.__file__!r}, run_name='lease')  # without the rest of the package: a second instead of ten
"""
DRIVER = LEASE + "lease['drive'](Path(sys.argv[1])); "


@contextmanager
def another(folder: Path, then: str = "print('drives', flush=True); time.sleep(600)") -> Iterator[subprocess.Popen]:
    """A process that drives the folder."""
    command = [sys.executable, "-c", DRIVER + then, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(autouse=True)
def left(tmp_path: Path) -> Iterator[None]:
    yield
    leave(tmp_path / "run")


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def driven_elsewhere(folder: Path) -> Path:
    """As another machine's driver leaves it."""
    folder.mkdir()
    file = folder / "driver.7.json"
    file.write_text(json.dumps({"pid": os.getpid(), "host": "far", "since": "noon", "born": "1", "place": "far"}))
    return file


def test_who_lives_is_named_at_once(tmp_path):
    with another(tmp_path / "run") as first:
        began = time.monotonic()
        with pytest.raises(ConfigError) as error:
            drive(tmp_path / "run")
        assert time.monotonic() - began < 5
        since = json.loads((tmp_path / "run" / "driver.1.json").read_text())["since"]
        host = os.uname().nodename
        assert str(error.value) == (
            f"Expected to be the only driver of {tmp_path}/run. Got another that lives: process {first.pid} on {host}, since {since}. Wait "
            f"until it has ended, or end it (kill {first.pid}) and start again, which goes on from its last checkpoint; or choose another "
            "run.name."
        )
        os.kill(first.pid, signal.SIGSTOP)  # it may wake
        with pytest.raises(ConfigError, match="that lives"):
            drive(tmp_path / "run")


def test_who_is_dead_is_not_waited_for(tmp_path):
    with another(tmp_path / "run") as first:
        first.kill()
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # a zombie
        began = time.monotonic()
        assert drive(tmp_path / "run")
        assert time.monotonic() - began < 5
    assert files(tmp_path / "run") == ["driver.2.json"]
    assert not drive(tmp_path / "run")  # we do already


def test_another_process_of_the_same_number_is_not_it(tmp_path):
    with another(tmp_path / "run") as first:
        file = tmp_path / "run" / "driver.1.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"born": "5"}))
        assert drive(tmp_path / "run")
        assert first.poll() is None


def test_who_has_ended_leaves_nothing(tmp_path):
    with another(tmp_path / "run", "print(1)") as first:
        first.wait()
    assert files(tmp_path / "run") == []
    with driving(tmp_path / "run"):
        assert files(tmp_path / "run") == ["driver.1.json"]
    assert files(tmp_path / "run") == []


def test_a_driver_elsewhere_lives_while_its_file_is_touched(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lease, "LEASE_S", 20.0)
    file, over = driven_elsewhere(tmp_path / "run"), Event()

    def beat() -> None:
        while not over.wait(0.2):
            os.utime(file, ns=(0, file.stat().st_mtime_ns - 10**9))  # its clock goes backwards

    thread = Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ConfigError, match=r"process .* on far, since noon"):
            drive(tmp_path / "run")
    finally:
        over.set()
        thread.join()
    assert f"{tmp_path}/run was driven by process {os.getpid()} on far, since noon. Waiting up to 20 s" in caplog.text


def test_a_driver_elsewhere_that_is_silent_is_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "LEASE_S", 1.0)
    driven_elsewhere(tmp_path / "run")
    began = time.monotonic()
    assert drive(tmp_path / "run")
    assert time.monotonic() - began >= 1
    assert files(tmp_path / "run") == ["driver.8.json"]


def test_a_driver_elsewhere_that_leaves_is_not_waited_for(tmp_path, monkeypatch):
    file = driven_elsewhere(tmp_path / "run")
    waiting = Thread(target=drive, args=(tmp_path / "run",))
    waiting.start()
    time.sleep(0.3)
    file.unlink()
    waiting.join(10)
    assert files(tmp_path / "run") == ["driver.1.json"]


def test_a_file_that_says_nothing_may_be_of_one_that_has_just_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "LEASE_S", 20.0)
    file = driven_elsewhere(tmp_path / "run")
    text = file.read_text()
    file.write_text("")
    waiting = Thread(target=lambda: (time.sleep(0.5), file.write_text(text)))
    waiting.start()
    with pytest.raises(ConfigError, match="on far"):
        drive(tmp_path / "run")
    waiting.join()


def test_we_touch_ours_and_do_not_bring_it_back(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    monkeypatch.setattr(lease, "_heart", None)
    drive(tmp_path / "run")
    file = tmp_path / "run" / "driver.1.json"
    before = file.stat().st_mtime_ns
    time.sleep(0.5)
    assert file.stat().st_mtime_ns > before
    file.rename(tmp_path / "run" / "driver.2.json")  # another took over
    time.sleep(0.5)
    assert files(tmp_path / "run") == ["driver.2.json"]


def test_of_many_at_once_one_goes_on(tmp_path):
    (tmp_path / "run").mkdir()
    with another(tmp_path / "run") as first:
        first.kill()
        first.wait()
        word = "print('drives', flush=True); time.sleep(600)"
        wait = LEASE + "print('ready', flush=True); sys.stdin.readline(); lease['drive'](Path(sys.argv[1])); "
        command = [sys.executable, "-c", wait + word, str(tmp_path / "run")]
        pipe = subprocess.PIPE
        rivals = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=ROOT) for _ in range(6)]
        assert [rival.stdout.readline() for rival in rivals if rival.stdout is not None] == ["ready\n"] * 6
        for rival in rivals:
            assert rival.stdin is not None
            rival.stdin.write("go\n")
            rival.stdin.flush()
        deadline = time.monotonic() + 60
        while len([rival for rival in rivals if rival.poll() is None]) > 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        alive = [rival for rival in rivals if rival.poll() is None]
        for rival in alive:
            rival.kill()
        told = [rival.communicate() for rival in rivals]
    assert len(alive) == 1
    assert sum("drives" in out for out, _ in told) == 1
    assert sum("Expected to be the only driver" in err for _, err in told) == 5


def test_what_fails_to_begin_leaves_the_folder_as_it_was(tmp_path):
    with pytest.raises(FileNotFoundError), beginning(tmp_path / "runs" / "run"):
        (tmp_path / "runs" / "run" / "driver.1.json").rename(tmp_path / "none" / "x")
    assert files(tmp_path) == []
    (tmp_path / "runs").mkdir()
    with pytest.raises(FileNotFoundError), beginning(tmp_path / "runs" / "run"):
        (tmp_path / "none").read_text()
    assert files(tmp_path) == ["runs"]
