"""Runs at equal counted FLOPs: of two runs of equally many steps the sparser one has spent less."""

import math
from collections.abc import Sequence

import numpy as np

from raysparse.report import Run


def counted_after(run: Run, tokens: Sequence[float]) -> list[float]:
    """Counted FLOPs that the run had spent after so many tokens, linear between its records; empty where it recorded none."""
    known = [(record["tokens"], record["flops"]) for record in run.train if "flops" in record]
    if not known:
        return []
    xs, ys = zip((0, 0), *known, strict=True)
    return np.interp(tokens, xs, ys).tolist()


def at_equal_flops(runs: Sequence[Run]) -> tuple[float, dict[str, float]]:
    """The counted FLOPs of the cheapest run, and by name the validation loss that each run had after as many, best first.

    Linear between validations; a run that had not been validated by then, or recorded no FLOPs, is left out.
    """
    budget, losses = min(run.counted for run in runs), {}
    for run in runs:
        spent = counted_after(run, [record["tokens"] for record in run.validation])
        if spent and spent[0] <= budget:
            losses[run.name] = float(np.interp(budget, spent, [record["validation_loss"] for record in run.validation]))
    return budget, dict(sorted(losses.items(), key=lambda item: (math.isnan(item[1]), item[1])))


def equal_flops_text(runs: Sequence[Run]) -> str | None:
    """A sentence that says which run is best at equal counted FLOPs, or None where fewer than two can be compared."""
    budget, losses = at_equal_flops(runs)
    if len(losses) < 2:
        return None
    updates = any(run.summary.get("topology", {}).get("updates") for run in runs)
    return (
        f"Validation loss at equal counted FLOPs ({budget:.3e}, all that the cheapest run spent): "
        f"{', '.join(f'{name} {loss:.4f}' for name, loss in losses.items())}. The others are seen in mid-course, where their "
        "learning rate is still high." + " The dense gradients of updates are not counted here." * updates
    )
