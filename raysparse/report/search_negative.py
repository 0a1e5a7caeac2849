"""What did not work in a search, as far as its trials tell."""

import math
from collections.abc import Iterator, Sequence

from raysparse.report.search import Cell, Search
from raysparse.report.search_statistics import Finding, Result, labels, lower_is_better
from raysparse.report.search_tables import count, digits, score_name, task_title, typed
from raysparse.report.table import NO_TIME_SAVED

NOTHING_WRONG = "Nothing that is checked here: loss against dense, baselines, time, failed and stopped trials, seeds."


def negative(search: Search, findings: Sequence[Finding]) -> list[str]:
    """What did not work, as far as the trials tell."""
    found = [sentence for finding in findings for sentence in (*_worse(finding), *_time(finding))]
    for task in search.tasks:
        cells = search.of(task)
        found += [sentence for cell, label in zip(cells, labels(cells), strict=True) for sentence in _seeds(search, cell, label)]
    counts, total = count(search.trials), len(search.trials)
    if counts["stopped"]:
        found.append(
            f"{counts['stopped']} of {total} trials ({100 * counts['stopped'] / total:.0f} %) were stopped early "
            f"({typed(search.config['scheduler'])}): what they would have come to is not known."
        )
    if counts["failed"]:
        found.append(f"{counts['failed']} of {total} trials failed; their errors stand under What was searched.")
    if any(trial.objective is not None and math.isnan(trial.objective) for trial in search.trials):
        found.append("Some trials diverged: their objective is not a number.")
    return found or [NOTHING_WRONG]


def _worse(finding: Finding) -> Iterator[str]:
    about = f"{task_title(finding.task)}, "
    if finding.dense is None:
        yield f"{about}no dense trial finished: what sparsity costs cannot be said."
    for result in finding.results:
        if result.judged and not result.judged.loss <= 0 and not result.judged.difference.within_noise:
            noise = "noise not judged" if result.judged.difference.within_noise is None else "more than noise"
            difference = f"{result.judged.difference.value:+.{digits(finding.metric)}f}"
            yield f"{about}{result.label} is worse than dense: {difference} {score_name(finding.metric)} ({noise})."
        run = result.cell.chosen[0].run
        baseline = run.summary["task"]["baseline"] if finding.task and run else {}
        for metric, scores in result.scores.items():
            sign = -1 if lower_is_better(metric) else 1
            if metric in baseline and sign * (scores.mean - baseline[metric]) <= 0:
                against = f"{scores.mean:.2f} against {baseline[metric]:.2f}"
                yield f"{about}{result.label} is no better than the task's baseline by {metric}: {against}."


def _time(finding: Finding) -> Iterator[str]:
    dense, verdicts = finding.dense, {}
    for result in finding.results:
        if dense is None or result.cell.dense or not result.seconds or not dense.seconds:
            continue
        ratio = result.seconds / dense.seconds
        verdict = NO_TIME_SAVED if ratio >= 0.95 else None if _skips(result) else f"{NO_TIME_SAVED}, for dense kernels multiply every zero"
        verdicts.setdefault(verdict, []).append(f"{result.label} {result.seconds:,.0f} s ({ratio:.2f}x)")
    for verdict, took in verdicts.items():
        if verdict and dense and dense.seconds:
            yield (
                f"{task_title(finding.task)}, measured end to end: {', '.join(took)} against {dense.seconds:,.0f} s dense: {verdict}. "
                "The FLOPs above are counted, not saved."
            )


def _skips(result: Result) -> bool:
    """Whether kernels left out zeros in the run or in that which it started from."""
    flops = [trial.run.summary["flops"] for trial in result.cell.chosen if trial.run]
    parents = [trial.parent_run for trial in result.cell.chosen if trial.parent_run]
    return any(of["executed"] < of["dense"] for of in flops) or any(parent.skips for parent in parents)


def _seeds(search: Search, cell: Cell, label: str) -> Iterator[str]:
    about, wanted = f"{task_title(cell.task)}, {label}", len(search.config["seeds"])
    if not cell.chosen:
        yield f"{about}: no trial finished, of {len(cell.trials)}."
    elif len(cell.chosen) < max(2, wanted):
        few = f"{len(cell.chosen)} of {wanted} seeds" if len(cell.chosen) < wanted else "one seed"
        yield f"{about}: too few seeds, the chosen settings finished with {few}."
