"""Every case of this folder is a fault: what happens, how long until training goes on, what was lost. The table is printed at the end."""

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raysparse.config import merge

ROWS = pytest.StashKey[list[dict[str, Any]]]()
CALM: list[Path] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("chaos")


@pytest.fixture
def outcome(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``outcome(case, happens, recovery_s, lost_steps)``: a row of the table of docs/faults.md, once the test has seen it.

    recovery_s: from the fault to the first new step (None where the run ends); lost_steps: done again, of those between checkpoints.
    """

    def note(case: str, happens: str, recovery_s: float | None, lost_steps: int | None, interval: int | None = None) -> None:
        row = {"case": case, "happens": happens, "recovery_s": recovery_s, "lost_steps": lost_steps, "interval": interval}
        request.config.stash.setdefault(ROWS, []).append(row)

    return note


@pytest.fixture
def values(pretrain_values: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """``values(name, **changes)``: the plain config of an MST run on two workers."""
    from tests.chaos.seen import MST

    return lambda name, **changes: merge(merge(pretrain_values, MST), merge({"run": {"name": name}}, changes))


@pytest.fixture
def calm(values: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `values` that was left alone."""
    from tests.chaos.seen import two_ranks
    from tests.ranks import spawn

    if not CALM:
        folder = str(tmp_path_factory.mktemp("calm"))
        CALM.append(Path(spawn(two_ranks, 2, values("calm", run={"folder": folder}))[0]))
    return CALM[0]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    terminalreporter.write_line(f"\nOn {os.cpu_count()} cores ({platform.machine()}{load}):\n")
    terminalreporter.write_line("| fault | what happens | training goes on after | steps done again |\n| --- | --- | --- | --- |")
    for row in rows:
        back = "it ends" if row["recovery_s"] is None else f"{row['recovery_s']:.1f} s"
        lost = "-" if row["lost_steps"] is None else f"{row['lost_steps']} of at most {row['interval']}"
        terminalreporter.write_line(f"| {row['case']} | {row['happens']} | {back} | {lost} |")
