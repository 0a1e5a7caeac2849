"""What each way of fine-tuning brought back of pruned models, over levels and seeds: `raysparse recover` as tables, a picture, a page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import combinations
from statistics import mean, stdev
from typing import Any

from raysparse.report.analysis import lines_by_sparsity
from raysparse.report.page import bullets, figure, page, preformatted, text
from raysparse.report.table import Block, Table

LOSS = "validation loss"
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""97.5 % quantiles of Student's t by degrees of freedom, from 1 on."""


class Row:
    """One way at one level, over the seeds.

    Attributes:
        measures: name -> its values: validation loss (nats a token), the task's scores.
    """

    def __init__(self, way: str, level: float, summaries: Sequence[dict[str, Any]]):
        self.way, self.level, self.summaries = way, level, summaries
        self.measures = {LOSS: [summary["loss"]["validation"] for summary in summaries]}
        self.measures |= {name: [summary["task"]["scores"][name] for summary in summaries] for name in summaries[0]["task"]["scores"]}

    def facts(self) -> dict[str, Any]:
        first = self.summaries[0]
        return {
            "way": self.way,
            "level": self.level,
            "sparsity": first["sparsity"]["actual"],
            "nnz": first["sparsity"]["nnz"],
            "measures": {name: {"mean": mean(v), "deviation": _deviation(v), "values": v} for name, v in self.measures.items()},
            "seconds": mean(summary["seconds"] for summary in self.summaries),
        }


@dataclass(frozen=True)
class Recovery:
    """All of it.

    Attributes:
        dense: the teacher.
        primary: the score that ways are compared by; the loss if the teacher has none of that name.
        pruned: level -> summaries of the prunings, one a seed.
        rows: of every level and way, in order.
    """

    name: str
    dense: Row
    primary: str
    pruned: Mapping[float, Sequence[dict[str, Any]]]
    rows: Sequence[Row]

    @property
    def measure(self) -> str:
        return self.primary if self.primary in self.dense.measures else LOSS

    @cached_property
    def differences(self) -> dict[float, list["Difference"]]:
        """Level -> of every pair of ways."""
        return {level: differences([row for row in self.rows if row.level == level], self.measure) for level in self.pruned}

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "dense": self.dense.facts(),
            "rows": [row.facts() for row in self.rows],
            "differences": [asdict(each) for found in self.differences.values() for each in found],
        }

    @property
    def notes(self) -> tuple[str, ...]:
        seeds = len(self.rows[0].summaries)
        meaning = f"; mean ± standard error, * where a t-test over {seeds} seeds has p < 0.05" if seeds > 1 else "; one seed judges nothing"
        return (
            f"{'Mean ± standard deviation' if seeds > 1 else 'One value'} over {seeds} seed{'s' * (seeds > 1)} of pruning and fine-tuning; "
            "one teacher. Every way has the same settings and steps: none is tuned.",
            *(_pruned_note(level, summaries) for level, summaries in self.pruned.items()),
            *(
                f"At {level:g}, {self.measure} seed by seed: {', '.join(each.text for each in found)}{meaning}."
                for level, found in self.differences.items()
                if found
            ),
        )

    @property
    def table(self) -> Table:
        names = list(self.dense.measures)
        cells = [
            (f"{row.level:g}", row.way, *(_cell(name, row.measures[name]) for name in names), _seconds(row))
            for row in (self.dense, *self.rows)
        ]
        return Table((Block(f"What comes back of {self.name}", ("sparsity", "way", *names, "seconds"), tuple(cells), self.notes),))

    def page(self, command: str) -> str:
        """HTML: what was found, the measures over the sparsity, the table, and the command that makes it again."""
        ways = dict.fromkeys(row.way for row in self.rows)
        lines = {
            name: {
                way: [(0.0, self.dense.measures[name][0]), *((row.level, mean(row.measures[name])) for row in self.rows if row.way == way)]
                for way in ways
            }
            for name in dict.fromkeys((self.measure, LOSS))
        }
        picture = lines_by_sparsity(
            lines, dict(zip(lines, lines, strict=True)), "Quality over sparsity, by what is learned from", "the model"
        )
        title = f"raysparse: what comes back of {self.name}"
        drawn = f'<div class="plots">{figure(picture, "The dense teacher is at 0 %. Means over the seeds.")}</div>'
        parts = (
            f"<h1>{text(title)}</h1>",
            bullets(self.notes),
            drawn,
            replace(self.table.blocks[0], notes=()).html(),
            preformatted([command]),
        )
        return page(title, parts)


@dataclass(frozen=True)
class Difference:
    """Of two ways at a level, seed by seed: the second minus the first.

    Attributes:
        error: standard error of the mean; None of one seed.
        judged: whether 0 lies outside the 95 % interval of a paired t-test (errors taken as normal); None of one seed.
    """

    level: float
    measure: str
    ways: tuple[str, str]
    mean: float
    error: float | None
    judged: bool | None

    @property
    def text(self) -> str:
        first, second = self.ways
        digits = 4 if self.measure == LOSS else 2
        error = "" if self.error is None else f" ± {self.error:.{digits}f}"
        return f"{second} - {first} {self.mean:+.{digits}f}{error}{'*' * bool(self.judged)}"


def differences(rows: Sequence[Row], measure: str) -> list[Difference]:
    """Of every pair of ways of one level, in their order."""
    found = []
    for one, other in combinations(rows, 2):
        each = [b - a for a, b in zip(one.measures[measure], other.measures[measure], strict=True)]
        error = stdev(each) / math.sqrt(len(each)) if len(each) > 1 else None
        judged = None if error is None else abs(mean(each)) > _T[min(len(each) - 1, len(_T)) - 1] * error
        found.append(Difference(one.level, measure, (one.way, other.way), mean(each), error, judged))
    return found


def _pruned_note(level: float, summaries: Sequence[dict[str, Any]]) -> str:
    losses = [summary["pruning"]["loss"]["after"] for summary in summaries]
    told = "" if None in losses else f", loss {_cell(LOSS, losses)} on samples that were held out before it is fine-tuned"
    return f"At {level:g}: {summaries[0]['sparsity']['nnz']:,} weights live of {summaries[0]['sparsity']['total']:,}{told}."


def _cell(name: str, values: Sequence[float]) -> str:
    digits = 4 if name == LOSS else 2
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def _seconds(row: Row) -> str:
    return f"{mean(summary['seconds'] for summary in row.summaries):.0f}"


def _deviation(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None
