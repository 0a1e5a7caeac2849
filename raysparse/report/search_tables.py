"""What the page of a search says, as sentences and tables of text."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raysparse.report import percent
from raysparse.report.search import Search, Trial
from raysparse.report.search_statistics import (
    RESAMPLES,
    VALIDATION_LOSS,
    Finding,
    Result,
    importance,
    labels,
    settings_text,
    value_text,
)
from raysparse.report.table import Block, marks

_MADE = {"": "trained", "pretrain": "pre-trained", "prune": "pruned"}
_TRAINED = "Both are end to end, that is with the pre-training."
_WHOLE = {
    "": _TRAINED,
    "pretrain": _TRAINED,
    "prune": "Seconds are with pruning and a teacher's passes, FLOPs without. What trained the model that was pruned is in neither: it is "
    "the same for all.",
}
"""By what made the models: what FLOPs and seconds are of."""


def question(findings: Sequence[Finding]) -> str:
    """What the search was to answer."""
    tolerance, names = findings[0].tolerance, [finding.task for finding in findings]
    if names == [None]:
        return f"How sparse may pre-training be, if its validation loss may end at most {tolerance:g} above that of the dense model?"
    measures = sorted({score_name(finding.metric) for finding in findings})
    by = measures[0] if len(measures) == 1 else "of its score"
    return f"How sparse may the model be for {' and '.join(map(str, names))}, if at most {tolerance:g} {by} may be lost against dense?"


def answer(finding: Finding) -> str:
    """One sentence or two: the recommended sparsity, what it saves, and how sure that is."""
    told, dense, best = f"{task_title(finding.task)}: ", finding.dense, finding.winner
    bound = f"at most {finding.tolerance:g} {score_name(finding.metric)} {'above' if finding.lower_is_better else 'below'} dense"
    chosen = settings_text(best.cell.best or {})
    with_settings = f" with {chosen}" if chosen else ""
    if dense is None:
        return (
            f"{told}nothing can be compared, for no dense trial (sparsity 0) finished. Best on the validation split: "
            f"{best.label}{with_settings}, {_score(best, finding.metric)} {score_name(finding.metric)}."
        )
    if len(finding.results) == 1:
        return (
            f"{told}nothing can be compared, for only dense trials finished: {_score(dense, finding.metric)} {score_name(finding.metric)}."
        )
    if best is not dense:
        saved = f"{best.label}, {best.reduction:.2f}x fewer FLOPs, {confidence(best)}"
        few = min(len(best.cell.chosen), len(dense.cell.chosen))
        scores = f"{_score(best, finding.metric)} against {_score(dense, finding.metric)} dense ({few} seed{'s' * (few > 1)})"
        return f"{told}{bound}: {saved}. That is {scores}{f'; settings {chosen}' if chosen else ''}."
    within = [result.label for result in finding.results if result.judged and result.judged.loss <= finding.tolerance]
    if within:
        return f"{told}{bound}: dense is recommended. {', '.join(within)} would do, but no fewer FLOPs are counted for it."
    judged = [(result.judged.loss, result.label) for result in finding.results if result.judged and not math.isnan(result.judged.loss)]
    nearest = " The nearest is {1}, {0:.{2}f} worse.".format(*min(judged), digits(finding.metric)) if judged else ""
    nothing = f"nothing sparse is within {finding.tolerance:g} {score_name(finding.metric)} of dense"
    return f"{told}{nothing}: dense is recommended, {_score(dense, finding.metric)}{with_settings}.{nearest}"


def confidence(result: Result) -> str:
    """``confidence 93 %``, or that it is not judged."""
    if result.judged is None or result.judged.confidence is None:
        return "confidence not judged (that takes two seeds, or predictions)"
    share = result.judged.confidence
    return "confidence above 99 %" if share > 0.99 else f"confidence {100 * share:.0f} %"


def score_name(metric: str) -> str:
    return "validation loss" if metric == VALIDATION_LOSS else metric


def task_title(task: str | None) -> str:
    return "Pre-training" if task is None else task


def overview(findings: Sequence[Finding]) -> Block:
    """Sparsity x task: mean ± deviation of the primary scores, and the difference to dense."""
    names = dict.fromkeys(result.label for finding in sorted(findings, key=lambda f: -len(f.results)) for result in finding.results)
    rows = []
    for name in sorted(names, key=lambda name: min(_sparsity(r) for f in findings for r in f.results if r.label == name)):
        found = [next((result for result in finding.results if result.label == name), None) for finding in findings]
        rows.append((name, *(_overview_cell(finding, result) for finding, result in zip(findings, found, strict=True))))
    columns = ("sparsity", *(f"{finding.task} ({score_name(finding.metric)})" for finding in findings))
    notes = ("* recommended for the task. In brackets the difference to dense.", *_marks_of(findings))
    return Block("Sparsity by task", columns, tuple(rows), notes)


def task_block(search: Search, finding: Finding) -> Block:
    """A row a cell: scores, the difference to dense, the chosen settings, and what it took."""
    cells = search.of(finding.task)
    results = {id(result.cell): result for result in finding.results}
    others = list(dict.fromkeys(name for result in finding.results for name in result.scores if name != finding.metric))
    rows = []
    for cell, label in zip(cells, labels(cells), strict=True):
        result = results.get(id(cell))
        finished = f"{sum(trial.status == 'finished' for trial in cell.trials)} of {len(cell.trials)}"
        if result is None:
            rows.append((label, *["–"] * (9 + len(others)), finished))
        else:
            rows.append((label + " *" * (result is finding.recommended), *_cells(finding, result, others), finished))
    columns = ("sparsity", score_name(finding.metric), "vs dense", "confidence", *others, "chosen settings", "seeds")
    columns += ("FLOPs", "reduction", "seconds", "time", "finished")
    title = f"{task_title(finding.task)}: what each sparsity came to"
    return Block(title, columns, tuple(rows), tuple(_task_notes(search, finding)))


def _cells(finding: Finding, result: Result, others: Sequence[str]) -> tuple[str, ...]:
    judged, dense = result.judged, finding.dense
    share = "" if judged is None else "?" if judged.confidence is None else f"{100 * judged.confidence:.0f} %"
    time = f"{result.seconds / dense.seconds:.2f}x" if dense and dense is not result and result.seconds and dense.seconds else ""
    return (
        *(_score(result, finding.metric), judged.difference.text(digits(finding.metric)) if judged else "", share),
        *(_score(result, name) for name in others),
        *(settings_text(result.cell.best or {}) or "–", ", ".join(str(trial.seed) for trial in result.cell.chosen)),
        *("–" if result.counted is None else f"{result.counted:.3e}", f"{result.reduction:.2f}x" if result.reduction else ""),
        *("–" if result.seconds is None else f"{result.seconds:,.0f}", time),
    )


def _task_notes(search: Search, finding: Finding) -> Iterator[str]:
    trial = finding.results[0].cell.chosen[0]
    way, better = ("lower" if lower else "higher" for lower in (finding.lower_is_better, trial.lower_is_better))
    held = "the validation split" if trial.task is None else "the test split, which no choice has seen"
    yield (
        f"Mean ± sample deviation over seeds, on {held}; {score_name(finding.metric)}: {way} is better. "
        f"Chosen settings: those with the best mean {score_name(trial.metric)} over their finished seeds on the "
        f"validation split ({better} is better)."
    )
    yield (
        f"FLOPs are counted: training FLOPs if zeros were skipped; seconds are measured. {_WHOLE[search.level]} Reduction is dense / "
        "counted; time is these seconds / the dense ones. Trials that ran side by side shared the machine."
    )
    if finding.recommended:
        yield "* recommended."
    bases = sorted({result.judged.basis for result in finding.results if result.judged and result.judged.basis})
    if bases:
        yield (
            f"Confidence: share of {RESAMPLES:,} resamples of {' or of '.join(bases)} in which the loss against dense is at most "
            f"{finding.tolerance:g}."
        )
    few = min(len(result.cell.chosen) for result in finding.results)
    if any("seeds" in basis for basis in bases) and few < 5:
        yield f"Resamples of {few} seeds hold no others: with so few, confidence and noise are known roughly, and look too certain."
    yield from _marks_of([finding])
    told = {trial.run.summary["task"].get("remark", "") for r in finding.results for trial in r.cell.chosen if trial.task and trial.run}
    yield from (f"Remark: {remark}." for remark in sorted(told - {""}))


def _marks_of(findings: Sequence[Finding]) -> Iterator[str]:
    differences = [result.judged.difference.text(2) for finding in findings for result in finding.results if result.judged]
    yield from marks(differences, "the 95 % interval of the difference over resamples holds zero")


def importance_block(search: Search, finding: Finding) -> Block | None:
    """How much of the variance of the objective each parameter explains; None where too few trials tell."""
    shares = importance(search.of(finding.task))
    if not shares:
        return None
    rows = tuple((name, f"{100 * share:.0f} %", f"{100 * chance:.0f} %") for name, (share, chance) in shares.items())
    note = "Chance: what the values of a parameter would explain if they were dealt at random."
    return Block(f"{task_title(finding.task)}: which settings mattered", ("parameter", "variance explained", "chance"), rows, (note,))


def space_block(search: Search) -> Block:
    """What was searched and what was fixed, key by key."""
    rows = []
    parts = {"pre-training": search.config.get("pretrain"), "pruning": search.config.get("prune"), **(search.config["tasks"] or {})}
    for part, told in parts.items():
        told = told or {}
        rows += [(part, key, _domain(domain)) for key, domain in (told.get("space") or {}).items()]
        rows += [(part, key, f"{value_text(value)} (fixed)") for key, value in (told.get("set") or {}).items()]
        if told.get("files"):
            rows.append((part, "files", " ".join(map(str, told["files"]))))
    notes = () if parts["pre-training"] else ("No pre-training was part of the search.",)
    return Block("Search space", ("of", "key", "values"), tuple(rows), notes)


def plan_block(search: Search) -> Block:
    """How the space was searched, and what became of the trials."""
    config = search.config
    metrics = dict.fromkeys(
        f"{trial.task or 'pre-training'}: {score_name(trial.metric)}, {'lower' if trial.lower_is_better else 'higher'} is better"
        for trial in search.trials
    )
    counts = count(search.trials)
    rows = (
        ("algorithm", typed(config["algorithm"])),
        ("scheduler", typed(config["scheduler"])),
        ("seeds", ", ".join(map(str, config["seeds"]))),
        ("settings chosen by", "; ".join(metrics)),
        ("workers a trial", str(config["run"].get("workers", "?"))),
        ("trials", f"{len(search.trials)}: " + ", ".join(f"{number} {status}" for status, number in counts.items())),
    )
    return Block("How it was searched", ("what", "value"), rows, ())


def count(trials: Sequence[Trial]) -> dict[str, int]:
    """Status -> number of trials."""
    return {status: sum(trial.status == status for trial in trials) for status in ("finished", "stopped", "failed")}


def failures(search: Search) -> list[str]:
    """A line a failed trial, with its error."""
    return [f"{told(trial)}: {_cut(trial.error or 'no error was kept')}" for trial in search.trials if trial.status == "failed"]


def told(trial: Trial) -> str:
    """A trial in words."""
    sparsity = "" if trial.sparsity is None else f", {percent(trial.sparsity)}"
    settings = f", {settings_text(trial.params)}" if trial.params else ""
    return f"{trial.folder} ({trial.task or 'pre-training'}{sparsity}{settings}, seed {trial.seed})"


def reproduce(search: Search, finding: Finding) -> tuple[str, list[str]]:
    """The command of the winner, and where its model and its pre-training lie."""
    trial = finding.winner.winner
    command = trial.command
    sentences = [f"It left {search.folder / trial.folder}: {told(trial)}."]
    exported = search.folder / trial.folder / "export"
    if trial.exported and exported.is_dir():
        sentences.append(f"Its exported model: {exported}")
    else:
        sentences.append("Its exported model is no longer there; the command makes it again.")
    if search.config["scheduler"].get("type") == "pbt":
        sentences.append(
            "It went on from other trials' weights: the command trains its last settings from the start, which is another model."
        )
    if trial.parent:
        sentences.append(f"It started from {trial.parent}, whose config.yaml tells how that was {_MADE[search.level]}.")
    return command, sentences


def _overview_cell(finding: Finding, result: Result | None) -> str:
    if result is None:
        return "–"
    difference = f" ({result.judged.difference.text(digits(finding.metric))})" if result.judged else ""
    return _score(result, finding.metric) + difference + " *" * (result is finding.recommended)


def _sparsity(result: Result) -> float:
    return math.inf if result.cell.sparsity is None else result.cell.sparsity


def _score(result: Result, metric: str) -> str:
    return result.scores[metric].text(digits(metric)) if metric in result.scores else "–"


def digits(metric: str) -> int:
    """How many decimals of a score are worth reading."""
    return 4 if metric == VALIDATION_LOSS else 2


def typed(section: Mapping[str, Any]) -> str:
    """``asha (grace=10)``."""
    others = {key: value for key, value in section.items() if key != "type"}
    return f"{section.get('type', '?')}{f' ({settings_text(others)})' if others else ''}"


def _domain(domain: Any) -> str:
    """``choice: 0, 0.5, 0.75``."""
    if not isinstance(domain, Mapping):
        return value_text(domain)
    kinds = [f"{kind}: {', '.join(map(value_text, of)) if isinstance(of, list) else value_text(of)}" for kind, of in domain.items()]
    return "; ".join(kinds)


def _cut(text: str, length: int = 400) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length // 4]} … {text[-3 * length // 4 :]}"
