"""A search as data: a row a trial for spreadsheets, a sub-run a trial for TensorBoard's HParams."""

import csv
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raysparse.report.search import Cell, Search, Trial
from raysparse.report.search_statistics import scores_of, settings_of


def write_csv(search: Search, path: Path) -> None:
    """A row a trial, in the order of the cells; a setting or score that a trial does not have is left empty."""
    trials = [(cell, trial) for cell in search.cells for trial in cell.trials]
    model = dict.fromkeys(key for _, trial in trials for key in trial.model)
    own = dict.fromkeys(key for _, trial in trials for key in trial.params)
    scores = dict.fromkeys(key for _, trial in trials for key in scores_of(trial))
    prefix = f"{search.level}." if search.level else ""
    rows = []
    for cell, trial in trials:
        row: dict[str, Any] = {"trial": trial.folder, "task": trial.task, "sparsity": cell.sparsity}
        row |= {f"{prefix}{name}": trial.model.get(name) for name in model} | {name: trial.params.get(name) for name in own}
        row |= {"seed": trial.seed, "status": trial.status, "objective": trial.objective}
        row |= {f"test_{name}": scores_of(trial).get(name) for name in scores}
        row |= {"counted_flops_end_to_end": trial.counted, "seconds_end_to_end": trial.seconds, "steps": trial.steps}
        rows.append(row | {"command": trial.command})
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_hparams(search: Search, folder: Path) -> None:
    """The settings and measures of every trial for TensorBoard; what was in the folder goes, or trials would stand there twice."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as board:
        for cell in search.cells:
            for trial in cell.trials:
                board.add_hparams(_hparams(cell, trial), _measures(trial), run_name=trial.name)


def _hparams(cell: Cell, trial: Trial) -> dict[str, Any]:
    settings: Mapping[str, Any] = {
        "task": trial.task or "pre-training",
        **settings_of(cell, trial),
        "seed": trial.seed,
        "status": trial.status,
    }
    return {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in settings.items()}


def _measures(trial: Trial) -> dict[str, float]:
    named = {f"test/{name}": value for name, value in scores_of(trial).items()}
    named |= {"objective": trial.objective, "counted_flops": trial.counted, "seconds": trial.seconds}
    return {name: value for name, value in named.items() if value is not None and math.isfinite(value)}
