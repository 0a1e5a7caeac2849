"""The page of a search: which sparsity to take for each task, how sure that is, and what it rests on."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from raysparse.config import ConfigError
from raysparse.report import search_tables as tables
from raysparse.report.page import bullets, figure, page, preformatted, text
from raysparse.report.search import Search, read_search
from raysparse.report.search_files import write_csv, write_hparams
from raysparse.report.search_negative import negative
from raysparse.report.search_plots import importance_bars, learning_curves, pareto_panels
from raysparse.report.search_statistics import Finding, Result, finding, importance
from raysparse.report.table import Block, Table, escaped


def write_report(folder: str | Path, tolerance: float | None = None) -> dict[str, Any]:
    """`Report.write` of the search in ``folder``; returns `Report.facts`."""
    report = read_report(folder, tolerance)
    report.write()
    return report.facts


def read_report(folder: str | Path, tolerance: float | None = None) -> "Report":
    """What the search in ``folder`` found.

    Args:
        tolerance: most loss of the primary score against dense; None: the search's own.

    Raises:
        ConfigError: no search lies there, no trial of it has finished, or the tolerance is below zero.
    """
    search = read_search(folder)
    tolerance = search.tolerance if tolerance is None else tolerance
    if not 0 <= tolerance < math.inf:
        raise ConfigError(f"Expected a tolerance of 0 or more. Got {tolerance:g}. It is the loss of score that you accept: --tolerance 0.5")
    findings = tuple(found for task in search.tasks if (found := finding(search, task, tolerance)))
    if not findings:
        counts = ", ".join(f"{number} {status}" for status, number in tables.count(search.trials).items())
        errors = "".join(f"\n  {line}" for line in tables.failures(search)[:3])
        raise ConfigError(
            f"Expected a finished trial with an objective in {search.folder}. Got {counts}.{errors}\n"
            "Let the search go on (`raysparse tune --resume`), then report."
        )
    return Report(search, tolerance, findings)


@dataclass(frozen=True)
class Report:
    """A search and what it found of each task that has a finished trial."""

    search: Search
    tolerance: float
    findings: tuple[Finding, ...]

    @property
    def files(self) -> dict[str, Path]:
        folder = self.search.folder
        return {"html": folder / "report.html", "markdown": folder / "report.md", "csv": folder / "results.csv"} | {
            "tensorboard": folder / "tensorboard"
        }

    def write(self) -> None:
        """All `files`; what an earlier report left there is replaced."""
        self.files["html"].write_text(page(self.search.name, list(self._html())), encoding="utf-8")
        self.files["markdown"].write_text("\n\n".join(self._markdown()) + "\n", encoding="utf-8")
        write_csv(self.search, self.files["csv"])
        write_hparams(self.search, self.files["tensorboard"])

    def terminal(self) -> str:
        """The tables and the answers, in plain text."""
        return "\n".join([Table(tuple(self._results)).terminal(), *(Table((), line).terminal() for line in self.answers)])

    @cached_property
    def answers(self) -> list[str]:
        return [tables.answer(found) for found in self.findings]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Everything that the page says, as plain data; what is not a number is null."""
        search = self.search
        facts = {
            "search": str(search.folder),
            "name": search.name,
            "tolerance": self.tolerance,
            "trials": tables.count(search.trials),
            "answers": self.answers,
            "tasks": [self._facts_of(found) for found in self.findings],
            "negative": negative(search, self.findings),
            "files": {kind: str(path) for kind, path in self.files.items()},
        }
        return json.loads(json.dumps(facts), parse_constant=lambda _: None)

    def _facts_of(self, found: Finding) -> dict[str, Any]:
        trial = found.winner.winner
        exported = self.search.folder / trial.folder / "export"
        return {
            "task": found.task,
            "metric": found.metric,
            "lower_is_better": found.lower_is_better,
            "recommended": found.recommended and found.recommended.label,
            "cells": [_facts_of_cell(result) for result in found.results],
            "importance": {name: share for name, (share, _) in importance(self.search.of(found.task)).items()},
            "winner": {"trial": trial.folder, "command": trial.command}
            | {"export": str(exported) if trial.exported and exported.is_dir() else None},
        }

    @property
    def _results(self) -> Iterator[Block]:
        if len(self.findings) > 1:
            yield tables.overview(self.findings)
        for found in self.findings:
            yield tables.task_block(self.search, found)

    def _html(self) -> Iterator[str]:
        search = self.search
        yield f"<h1>{text(search.name)}</h1>"
        yield f'<p class="question">{text(tables.question(self.findings))}</p>'
        for line in self.answers:
            yield f'<p class="answer">{text(line)}</p>'
        for block in self._results:
            yield block.html()
        yield "<h2>What it costs, how it learned, which settings mattered</h2>"
        for found in self.findings:
            yield f'<div class="plots">{"".join(self._plots(found))}</div>'
        yield "<h2>What was searched</h2>"
        yield f'<div class="words">{tables.plan_block(search).html()}{tables.space_block(search).html()}</div>'
        if failed := tables.failures(search):
            yield f"<p>Failed trials:</p>{bullets(failed)}"
        yield "<h2>What did not work</h2>"
        yield bullets(negative(search, self.findings))
        yield "<h2>How to reproduce</h2>"
        for found in self.findings:
            command, sentences = tables.reproduce(search, found)
            yield f"<p>{text(self._about(found))}</p>{preformatted([command])}{bullets(sentences)}"

    def _about(self, found: Finding) -> str:
        why = "recommended" if found.recommended else "best on the validation split"
        return f"{tables.task_title(found.task)}, {found.winner.label} ({why}), the seed that validates best:"

    def _plots(self, found: Finding) -> Iterator[str]:
        cells, title = self.search.of(found.task), tables.task_title(found.task)
        corner = "lower" if found.lower_is_better else "upper"
        yield figure(
            pareto_panels(found, cells, tables.score_name(found.metric)),
            f"{title}: faint, every finished trial; marked, the mean of the settings chosen at each sparsity. The line joins those, "
            f"dashed the single trials, that no other beats; better is towards the {corner} left corner."
            + (f" Dotted: {self.tolerance:g} worse than dense." if found.dense else ""),
        )
        curves = figure(
            learning_curves(cells),
            f"{title}: validation loss of every trial; strong lines are the chosen settings. Trials that ended early are thin and end in a "
            "cross.",
        )
        bars = ""
        if shares := importance(cells):
            bars = figure(
                importance_bars(shares),
                f"{title}: share of the variance of the objective over finished trials that a setting explains by itself (eta squared). A "
                "bar no longer than its mark says nothing.",
            )
        yield f"<div>{curves}{bars}</div>"

    def _markdown(self) -> Iterator[str]:
        search = self.search
        yield f"# {escaped(search.name)}"
        yield escaped(tables.question(self.findings))
        for line in self.answers:
            yield f"**{escaped(line)}**"
        yield Table(tuple(self._results)).markdown().strip()
        if blocks := [block for found in self.findings if (block := tables.importance_block(search, found))]:
            yield "## Which settings mattered"
            yield Table(tuple(blocks)).markdown().strip()
        yield "## What was searched"
        yield Table((tables.plan_block(search), tables.space_block(search))).markdown().strip()
        if failed := tables.failures(search):
            yield "Failed trials:"
            yield _list(failed)
        yield "## What did not work"
        yield _list(negative(search, self.findings))
        yield "## How to reproduce"
        for found in self.findings:
            command, sentences = tables.reproduce(search, found)
            yield escaped(self._about(found))
            yield "\n".join(f"    {line}" for line in command.splitlines())
            yield _list(sentences)


def _list(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {escaped(sentence)}" for sentence in sentences)


def _facts_of_cell(result: Result) -> dict[str, Any]:
    cell, judged = result.cell, result.judged
    told = {"difference": None, "low": None, "high": None, "confidence": None, "resampled": None}
    if judged is not None:
        told = {"difference": judged.difference.value, "low": judged.difference.low, "high": judged.difference.high}
        told |= {"confidence": judged.confidence, "resampled": judged.basis or None}
    return {
        "label": result.label,
        "sparsity": cell.sparsity,
        "model": dict(cell.model),
        "settings": dict(cell.best or {}),
        "seeds": [trial.seed for trial in cell.chosen],
        "scores": {name: {"mean": of.mean, "deviation": of.deviation} for name, of in result.scores.items()},
        **told,
        "counted_flops": result.counted,
        "reduction": result.reduction,
        "seconds": result.seconds,
        "trials": tables.count(cell.trials),
    }
