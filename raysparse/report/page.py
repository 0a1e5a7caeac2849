"""One HTML file that says what was asked, what came out, and how to get it again. It asks the network for nothing."""

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from raysparse.report import Run, bytes_text, dense_twin, parent_of, path_of, percent, reduction, runs_of
from raysparse.report.budget import equal_flops_text
from raysparse.report.difference import Difference, loss_difference, task_difference
from raysparse.report.distance import heat_map
from raysparse.report.evolving import phases, topology_curves
from raysparse.report.plots import cost_bars, distance_maps, flops_curves, layer_sparsity, loss_curves
from raysparse.report.table import NO_TIME_SAVED, Block, comparison
from raysparse.tasks.metrics import LOWER_IS_BETTER


@dataclass(frozen=True)
class Notes:
    """What only the author knows; the answer, the tables and most negative results are computed from the runs."""

    question: str = "What does training with most weights absent cost in quality, and what would it save?"
    commands: tuple[str, ...] = ()
    """Command lines that make these runs again, in order."""
    negative: tuple[str, ...] = ()
    """Further negative results, a sentence each."""
    remarks: tuple[str, ...] = ()
    """Further sentences after the plots, such as what the runs cannot show."""


def write_page(path: str | Path, title: str, runs: Sequence[Run], distances: Mapping[str, Mapping[str, float]], notes: Notes) -> None:
    """Write the page to ``path``, whose folder is made.

    Args:
        distances: by label (``dense``, ``75 %``), what `cosine_distances` gave; may be empty.

    Raises:
        ConfigError: the runs cannot be compared (`comparison`).
    """
    table = comparison(runs)
    parts = [
        f"<h1>{text(title)}</h1>",
        f'<p class="question">{text(notes.question)}</p>',
        f'<p class="answer">{text(" ".join([*_answer(runs), table.time]))}</p>',
        *(block.html() for block in table.blocks),
        "<h2>What the runs look like</h2>",
        f'<div class="plots">{"".join(_plots(runs, distances))}</div>',
        "<h2>What did not work</h2>",
        bullets([*_negative(runs, table.time), *notes.negative]),
        *(["<h2>Remarks</h2>", bullets(notes.remarks)] if notes.remarks else []),
        "<h2>How to reproduce</h2>",
        *_reproduce(runs, notes.commands),
    ]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(title, parts), encoding="utf-8")


def page(title: str, parts: Sequence[str]) -> str:
    """The whole page, of parts that are HTML."""
    return _PAGE.replace("BODY", "\n".join(parts), 1).replace("TITLE", text(title), 1)


def figure(svg: str, caption: str) -> str:
    """A picture, to stand in ``<div class="plots">``."""
    return f"<figure>{svg}<figcaption>{text(caption)}</figcaption></figure>\n"


def bullets(sentences: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{text(sentence)}</li>' for sentence in sentences)}</ul>"


def preformatted(lines: Sequence[str]) -> str:
    """Lines to paste; they scroll."""
    return f'<pre class="scroll" tabindex="0">{text(chr(10).join(lines))}</pre>'


def text(plain: str) -> str:
    """Plain text as HTML."""
    return html.escape(plain)


def _answer(runs: Sequence[Run]) -> Iterator[str]:
    """One sentence on pre-training and one a task: difference to dense and counted FLOPs of every run that has a twin."""
    found: dict[str, list[str]] = {}
    for run in (*runs_of(runs, "pretrain"), *runs_of(runs, "finetune")):
        twin, times = dense_twin(run, runs), reduction(run, runs)
        if twin is None:
            continue
        if run.verb == "pretrain":
            about = "Validation loss against dense, and counted training FLOPs"
            change = f"{run.name} at {percent(run.sparsity)} sparsity {_judged(loss_difference(run, twin), 4)}"
        else:
            task = run.summary["task"]
            about = f"{task['primary']} on {task['name']} against the dense pair, and counted FLOPs end to end"
            change = f"{run.name} ({path_of(run, runs)}) {_judged(task_difference(run, twin), 2)}"
        found.setdefault(about, []).append(change + (f", {times:.2f}x fewer" if times else "") + _with_updates(run))
    if not found:
        yield "No run here has a dense twin to be compared with; the tables say what each did by itself."
    for about, changes in found.items():
        yield f"{about}: {'; '.join(changes)}."


def _with_updates(run: Run) -> str:
    updates = run.topology.get("updates", 0)
    return (
        f" ({run.summary['flops']['reduction_with_updates']:.2f}x with the dense gradients of its {updates:,} updates)" if updates else ""
    )


def _judged(difference: Difference, digits: int) -> str:
    verdict = {None: "noise not judged", True: "within noise", False: "more than noise"}[difference.within_noise]
    return f"{difference.value:+.{digits}f} ({verdict})"


def _negative(runs: Sequence[Run], time: str) -> list[str]:
    found = ["Wall-clock time: " + NO_TIME_SAVED + "; the FLOPs above are counted, not saved."] if NO_TIME_SAVED in time else []
    for run in (*runs_of(runs, "pretrain"), *runs_of(runs, "finetune")):
        twin = dense_twin(run, runs)
        dense = run.sparsity == 0 and (run.verb == "pretrain" or getattr(parent_of(run, runs), "sparsity", 1) == 0)
        if math.isnan(run.validation_loss):
            found.append(f"{run.name} diverged: its validation loss is not a number.")
        if skipped := run.topology.get("skipped", 0):
            found.append(f"{run.name} changed nothing in {skipped:,} of {run.topology['updates']:,} updates: a gradient was not finite.")
        if twin is None and not dense:
            found.append(f"{run.name} has no dense twin here: what its sparsity cost cannot be said.")
        found += _worse_loss(run, twin) if run.verb == "pretrain" else _worse_score(run, twin)
    return found or ["Nothing that is checked here: time, divergence, quality against the dense twin and against the baseline."]


def _worse_loss(run: Run, twin: Run | None) -> Iterator[str]:
    if run.validation_loss >= run.summary["data"]["unigram_cross_entropy"]:
        yield f"{run.name} has not learned more than word frequencies: its loss is not below the unigram cross-entropy."
    if twin is not None:
        difference = loss_difference(run, twin)
        if difference.value > 0 and not difference.within_noise:
            yield f"{run.name} is worse than its dense twin {twin.name}: {_judged(difference, 4)} nats a token."


def _worse_score(run: Run, twin: Run | None) -> Iterator[str]:
    task = run.summary["task"]
    for metric, score in task["scores"].items():
        baseline, sign = task["baseline"].get(metric), -1 if metric in LOWER_IS_BETTER else 1
        if baseline is not None and sign * (score - baseline) <= 0:
            yield f"{run.name} is no better than the baseline of {task['name']} by {metric}: {score:.2f} against {baseline:.2f}."
    sign = -1 if task["primary"] in LOWER_IS_BETTER else 1
    if twin is not None:
        difference = task_difference(run, twin)
        if sign * difference.value < 0 and not difference.within_noise:
            yield f"{run.name} is worse than its dense pair {twin.name}: {_judged(difference, 2)} {task['primary']}."


def _plots(runs: Sequence[Run], distances: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    pretrained, finetuned = runs_of(runs, "pretrain"), runs_of(runs, "finetune")
    if pretrained:
        see = "the gap in the lower picture is what sparsity cost, and every run must end below the dotted line"
        yield figure(loss_curves(pretrained), f"Pre-training: lines are training, markers validation; {see}.")
    if finetuned:
        see = "a validation curve that turns up while training goes down is over-fitting"
        yield figure(loss_curves(finetuned), f"Fine-tuning: lines are training, markers validation; {see}.")
    if equal_flops_text(pretrained):
        see = "of two curves in the lower picture the lower one is better for the same counted FLOPs."
        yield figure(
            flops_curves(pretrained), f"Counted FLOPs spent, and loss over them (the dotted line: all that the cheapest spent): {see}"
        )
    if any(run.evolves for run in pretrained):
        yield figure(topology_curves(pretrained), _topology_caption(pretrained))
    if any(run.summary["sparsity"]["actual"] > 0 for run in pretrained):
        yield figure(layer_sparsity(pretrained), "Equal bars mean that every weight matrix lost the same share of its weights.")
    if distances:
        yield figure(distance_maps(distances), _distance_caption(distances))
    if pretrained:
        yield figure(cost_bars(pretrained), "Measured, not counted: bars of equal length mean that masks saved nothing.")


def _topology_caption(runs: Sequence[Run]) -> str:
    timelines = [
        f" Phases of {run.name}: {', '.join(f'{number} {span.name}' for number, span in enumerate(spans, start=1))}."
        for run in runs
        if len(spans := phases(run)) > 1
    ]
    return (
        "Live share of the sparse weights; share of the live weights that an update brought to life; computed share of full causal "
        f"attention.{''.join(timelines)}"
    )


def _distance_caption(distances: Mapping[str, Mapping[str, float]]) -> str:
    moved = []
    for label, of in distances.items():
        places = heat_map(of)
        means = [fmean(value for value in row if value is not None) for row in places.values]
        most = max(range(len(means)), key=means.__getitem__)
        moved.append(f"{label} moved most in {places.modules[most]} (mean {means[most]:.2g}; over all {fmean(of.values()):.2g})")
    numbers = "numbers in units of the colour bar; of a deep model the largest of each row"
    return f"How far fine-tuning moved each weight, on one scale ({numbers}): {'; '.join(moved)}."


def _reproduce(runs: Sequence[Run], commands: Sequence[str]) -> Iterator[str]:
    if commands:
        yield preformatted(commands)
    columns = ("run", "verb", "config digest", "mask digest", "steps", "tokens", "workers", "peak memory")
    rows = []
    for run in (*runs_of(runs, "pretrain"), *runs_of(runs, "finetune")):
        s = run.summary
        digests = (s["config_digest"], s["sparsity"]["mask_digest"] or "–")
        numbers = (f"{s['steps']:,}", f"{s['tokens']:,}", f"{s['workers']}", bytes_text(s["peak_memory_bytes"]))
        rows.append((run.name, run.verb, *digests, *numbers))
    yield Block("Runs", columns, tuple(rows), ()).html()
    made: dict[str, list[str]] = {}
    for run in runs:
        versions = {"raysparse": run.summary["raysparse"], **run.summary["versions"]}
        made.setdefault(", ".join(f"{name} {version}" for name, version in versions.items()), []).append(run.name)
    for versions, names in made.items():
        yield f"<p>{text(versions)}{text(' (' + ', '.join(names) + ')') if len(made) > 1 else ''}</p>"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>TITLE</title>
<style>
:root { --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --paper: #ffffff; --raised: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9aa4af; --line: #3a424c; --paper: #14171b; --raised: #1d2127; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .7rem; padding-top: .7rem; border-top: 1px solid var(--line); }
p, li { max-width: 80ch; overflow-wrap: anywhere; }
.question { color: var(--soft); margin: 0 0 .5rem; }
.answer { margin: 0 0 1rem; padding: .1rem 0 .1rem .9rem; border-left: 4px solid #0072b2; max-width: 90ch; }
figure { margin: 0 0 1rem; min-width: 0; }
figcaption { color: var(--soft); font-size: .875rem; }
.table figcaption { color: var(--ink); font-size: 1rem; font-weight: 600; margin-bottom: .3rem; }
main .table p { max-width: 120ch; color: var(--soft); font-size: .85rem; margin: .35rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; font-size: .875rem; white-space: nowrap; }
table { font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
thead th { color: var(--soft); }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); background-clip: padding-box; }
tbody th { min-width: 7.5rem; max-width: 16rem; white-space: normal; overflow-wrap: break-word; }
.words th, .words td { text-align: left; white-space: normal; overflow-wrap: break-word; vertical-align: top; }
.plots { display: grid; gap: 1.6rem 2rem; align-items: start; }
.plots { grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); }
.plots svg { display: block; width: 100%; height: auto; max-width: 560px; }
pre { background: var(--raised); padding: .8rem; border-radius: 6px; font-size: .85rem; }
@media (max-width: 600px) { tbody th { max-width: 7.5rem; } th, td { padding: .3rem .45rem; } }
</style>
</head>
<body>
<main>
BODY
</main>
</body>
</html>
"""
