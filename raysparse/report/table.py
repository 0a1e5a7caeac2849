"""The comparison of runs as tables: what sparsity cost in quality, what it would save if zeros were skipped, what it took.

A difference is set against the dense twin (`dense_twin`) and marked ``≈`` where a 95 % interval of it holds zero, ``?`` where
the runs left nothing to judge it by.
"""

import html
import math
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from raysparse.config import ConfigError
from raysparse.report import Run, bytes_text, dense_twin, end_to_end, path_of, percent, reduction, runs_of
from raysparse.tasks.metrics import METRICS, MetricName, streams

WIDTH = 110
NO_TIME_SAVED = "masks on dense kernels saved no time here"


@dataclass(frozen=True)
class Difference:
    """A run minus its dense twin; ``low`` and ``high`` bound it with 95 % confidence, None where that is not known."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def within_noise(self) -> bool | None:
        return None if self.low is None or self.high is None else self.low <= 0 <= self.high

    def text(self, digits: int) -> str:
        return f"{self.value:+.{digits}f}" + {None: " ?", True: " ≈", False: ""}[self.within_noise]


def paired_bootstrap(
    metric: str,
    ours: Sequence[str],
    theirs: Sequence[str],
    references: Sequence[Sequence[str]],
    resamples: int = 1000,
    seed: int = 0,
) -> Difference:
    """A metric of ``ours`` minus that of ``theirs`` with its 95 % percentile interval (Koehn 2004, EMNLP, section 3).

    Every resample draws as many examples as there are, with replacement, the same ones for both systems. The metric of a corpus
    is a function of sums over its examples (BLEU, chrF: n-gram matches and counts; ROUGE-L, exact match: the scores
    themselves), so the text is read once and a resample is a weighted sum ``[N] @ [N, sums]``.

    Args:
        metric: one of `JUDGED`.
        ours, theirs: [N] outputs for the same N examples.
        references: [N], one or more texts each.
    """
    if not len(ours) == len(theirs) == len(references) or not references:
        raise ConfigError(
            f"Expected outputs of two systems for the same examples. Got {len(ours)}, {len(theirs)} and {len(references)} "
            "references. Evaluate both on the same split."
        )
    (first, second), whole = _resampled(metric, (ours, theirs), references, resamples, seed)
    low, high = np.percentile(first - second, [2.5, 97.5]).tolist()
    return Difference(whole[0] - whole[1], low, high)


def _resampled(
    metric: str, systems: Sequence[Sequence[str]], references: Sequence[Sequence[str]], resamples: int = 1000, seed: int = 0
) -> tuple[np.ndarray, list[float]]:
    """Scores of each system on every resample, [systems, resamples], and on all examples."""
    sums, score = _mean_sums(metric) if metric in ("rouge_l", "exact_match") else _corpus_sums(metric)
    all_sums = np.stack([sums(outputs, references) for outputs in systems])
    n, generator = len(references), np.random.default_rng(seed)
    scores = np.empty((len(systems), resamples))
    for k in range(resamples):
        weight = np.bincount(generator.integers(n, size=n), minlength=n)
        scores[:, k] = [score(total) for total in weight @ all_sums]
    return scores, [score(total) for total in all_sums.sum(axis=1)]


def score_interval(run: Run) -> str:
    """The 95 % bootstrap interval of a run's primary metric, as text; a dash where it cannot be judged."""
    metric = run.summary["task"]["primary"]
    if run.predictions is None or metric not in JUDGED:
        return "–"
    scores, _ = _resampled(metric, [[text for text, _ in run.predictions]], [texts for _, texts in run.predictions])
    low, high = np.percentile(scores[0], [2.5, 97.5])
    return f"{low:.2f} to {high:.2f}"


JUDGED = ("bleu", "bleu_lowercase", "chrf", "rouge_l", "exact_match")
"""Metrics whose differences `paired_bootstrap` can judge."""

Sums = Callable[[Sequence[str], Sequence[Sequence[str]]], np.ndarray]


def _corpus_sums(metric: str) -> tuple[Sums, Callable[[np.ndarray], float]]:
    """BLEU and chrF by sacrebleu: the statistics of each example, [N, some], and the score of their total, as its own
    bootstrap adds them up."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    scorer: Any = CHRF() if metric == "chrf" else BLEU(lowercase=metric == "bleu_lowercase", force=True)

    def sums(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        return np.array(scorer._extract_corpus_statistics(outputs, streams(references)), dtype=np.float64)

    return sums, lambda total: scorer._compute_score_from_stats(total.astype(int).tolist()).score


def _mean_sums(metric: str) -> tuple[Sums, Callable[[np.ndarray], float]]:
    """A metric that is a mean over examples: [N, 2] of (score, 1)."""
    one = METRICS[cast(MetricName, metric)]

    def sums(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        return np.array([[one([output], [texts]), 1.0] for output, texts in zip(outputs, references, strict=True)])

    return sums, lambda total: float(total[0] / total[1])


def loss_difference(run: Run, twin: Run) -> Difference:
    """Validation loss of ``run`` minus that of ``twin``, judged by ``loss.validation_stderr`` (over windows) if both have it.

    The two errors are taken as independent: +-1.96 sqrt(a^2 + b^2). Both runs read the same windows, so the interval is too
    wide rather than too narrow.
    """
    value = run.validation_loss - twin.validation_loss
    errors = [side.summary["loss"].get("validation_stderr") for side in (run, twin)]
    if None in errors or math.isnan(value):
        return Difference(value)
    half = 1.96 * math.hypot(*errors)
    return Difference(value, value - half, value + half)


def task_difference(run: Run, twin: Run) -> Difference:
    """Primary metric of ``run`` minus that of ``twin``, judged by `paired_bootstrap` where both kept predictions."""
    value = run.score - twin.score
    metric = run.summary["task"]["primary"]
    if metric not in JUDGED or run.predictions is None or twin.predictions is None:
        return Difference(value)
    if [references for _, references in run.predictions] != [references for _, references in twin.predictions]:
        raise ConfigError(
            f"Expected predictions of {run.name} and {twin.name} for the same references. Got different ones. "
            "Evaluate both on the same split."
        )
    ours, theirs = ([hypothesis for hypothesis, _ in side.predictions or ()] for side in (run, twin))
    judged = paired_bootstrap(metric, ours, theirs, [references for _, references in run.predictions])
    if abs(judged.value - value) > 0.1:
        raise ConfigError(
            f"Expected the {metric} difference {value:+.2f} of {run.name} and {twin.name} from their predictions. "
            f"Got {judged.value:+.2f}. predictions.jsonl belongs to another split or scorer: evaluate again."
        )
    return Difference(value, judged.low, judged.high)


@dataclass(frozen=True)
class Block:
    """One table: a title, the names of the columns, rows of text, and sentences to read it by."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]

    def html(self) -> str:
        """A figure that scrolls sideways on a narrow screen."""
        head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in self.columns)
        rows = ""
        for name, *cells in self.rows:
            name = html.escape(name).replace("_", "_<wbr>")
            rows += f'<tr><th scope="row">{name}</th>{"".join(f"<td>{html.escape(cell)}</td>" for cell in cells)}</tr>\n'
        return (
            f'<figure class="table"><figcaption>{html.escape(self.title)}</figcaption><div class="scroll" tabindex="0">'
            f"<table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>"
            f"{''.join(f'<p>{html.escape(note)}</p>' for note in self.notes)}</figure>"
        )


@dataclass(frozen=True)
class Table:
    """The blocks of a comparison and the sentence on wall-clock time, in three renderings."""

    blocks: tuple[Block, ...]
    time: str

    def terminal(self) -> str:
        """Plain text, at most `WIDTH` columns; a wide block goes on below with its first column repeated."""
        parts = ["\n\n".join([_wrapped(block.title), *_stacked(block), *map(_wrapped, block.notes)]) for block in self.blocks]
        return "\n\n".join([*parts, _wrapped(self.time)]) + "\n"

    def markdown(self) -> str:
        """GitHub Markdown."""
        parts = []
        for block in self.blocks:
            lines = [[_escaped(cell) for cell in line] for line in (block.columns, *block.rows)]
            lines.insert(1, ["---", *["---:"] * (len(block.columns) - 1)])
            parts.append(f"### {_escaped(block.title)}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
            parts += map(_escaped, block.notes)
        return "\n\n".join([*parts, _escaped(self.time)]) + "\n"

    def html(self) -> str:
        """A fragment: the figures of the blocks, then a paragraph."""
        return "\n".join([*(block.html() for block in self.blocks), f"<p>{html.escape(self.time)}</p>"])


def comparison(runs: Sequence[Run]) -> Table:
    """One block after pre-training, one after fine-tuning for each task, and whether masks saved wall-clock time.

    Raises:
        ConfigError: no runs, or two runs of one verb share a name.
    """
    if not runs:
        raise ConfigError("Expected at least one run to compare. Got none. Name the folders of finished runs.")
    for (verb, name), count in Counter((run.verb, run.name) for run in runs).items():
        if count > 1:
            raise ConfigError(f"Expected runs with different names. Got {count} {verb} runs named {name!r}. Rename or drop one.")
    pretrained, finetuned = runs_of(runs, "pretrain"), runs_of(runs, "finetune")
    blocks = [_after_pretraining(pretrained, runs)] if pretrained else []
    for task in sorted({run.summary["task"]["name"] for run in finetuned}):
        blocks.append(_after_finetuning([run for run in finetuned if run.summary["task"]["name"] == task], runs))
    return Table(tuple(blocks), wall_clock(runs))


def wall_clock(runs: Sequence[Run]) -> str:
    """Whether masks saved time: seconds of each sparse run against its dense twin of as many tokens and workers.

    Where the kernels executed as many FLOPs as the dense run's, no difference in seconds is credited to the zeros.
    """
    measured: dict[str, list[str]] = {}
    for run in [run for verb in ("pretrain", "finetune") for run in runs_of(runs, verb) if run.sparsity > 0]:
        twin = dense_twin(run, [other for other in runs if other.verb != run.verb or _same_work(run, other)])
        if twin is None:
            measured.setdefault("no dense twin of as many tokens and workers here, so nothing to judge by", []).append(run.name)
            continue
        ratio = run.seconds / twin.seconds
        flops = run.summary["flops"]
        verdict = NO_TIME_SAVED if ratio >= 0.95 else "fewer seconds than dense were measured"
        if flops["executed"] >= flops["dense"] and ratio < 0.95:
            verdict = f"{NO_TIME_SAVED}; they multiply every zero, so this difference is the machine's noise"
        took = measured.setdefault(verdict, [])
        took.append(f"{run.name} took {run.seconds:,.0f} s against {twin.seconds:,.0f} s dense ({ratio:.2f}x)")
    sentences = [f"{', '.join(took)}: {verdict}." for verdict, took in measured.items()]
    return "Wall-clock time: " + (" ".join(sentences) or "no run here trained with masks, so there is nothing to judge.")


def _same_work(run: Run, other: Run) -> bool:
    return (run.summary["tokens"], run.summary["workers"]) == (other.summary["tokens"], other.summary["workers"])


def _after_pretraining(pretrained: Sequence[Run], runs: Sequence[Run]) -> Block:
    columns = ("run", "sparsity", "nnz", "val. loss", "vs dense", "perplexity", "FLOPs", "reduction", "without head")
    rows, unigram = [], set()
    for run in pretrained:
        summary, twin = run.summary, dense_twin(run, runs)
        unigram.add(summary["data"]["unigram_cross_entropy"])
        rows.append(
            (
                *(run.name, percent(run.sparsity), f"{summary['sparsity']['nnz']:,}", f"{run.validation_loss:.4f}"),
                *(loss_difference(run, twin).text(4) if twin else "", f"{summary['loss']['perplexity']:,.2f}"),
                *(f"{run.counted:.3e}", f"{reduction(run, runs):.2f}x", f"{summary['flops']['reduction_without_head']:.2f}x"),
                *(f"{run.seconds:,.0f}", f"{summary['tokens_per_s']:,.0f}", bytes_text(summary["bytes_sent"])),
            )
        )
    columns += ("seconds", "tokens/s", "sent/rank")
    rows += [("unigram (train data)", "", "", f"{loss:.4f}", "", f"{math.exp(loss):,.2f}", *[""] * 6) for loss in sorted(unigram)]
    conventions = ", ".join(sorted({run.summary["flops"]["convention"] for run in pretrained}))
    notes = [
        f"FLOPs are counted training FLOPs (convention: {conventions}): what the steps would take if zeros were skipped; dense "
        "kernels with masks execute the dense number. Reduction is dense / counted. Loss in nats a token; unigram is the "
        "loss of knowing word frequencies alone.",
        *_marks(rows, "the 95 % interval of the difference by the standard error over validation windows holds zero"),
    ]
    if sum(run.sparsity == 0 for run in pretrained) > 1:
        notes.append("Of several dense runs of one model, the one with the lowest validation loss is compared with.")
    if len({run.summary["tokens"] for run in pretrained}) > 1:
        notes.append("These runs did not train on equally many tokens: a difference of losses is not sparsity's alone.")
    if len(unigram) > 1:
        notes.append("These runs were not trained on the same data (unigram differs): their losses cannot be compared.")
    return Block("After pre-training", columns, tuple(rows), tuple(notes))


def _after_finetuning(finetuned: Sequence[Run], runs: Sequence[Run]) -> Block:
    task = finetuned[0].summary["task"]
    others = [name for name in task["scores"] if name != task["primary"]]
    rows = []
    for run in finetuned:
        own, twin = run.summary["task"], dense_twin(run, runs)
        total, times = end_to_end(run, runs), reduction(run, runs)
        rows.append(
            (
                *(run.name, path_of(run, runs), f"{run.score:.2f}", score_interval(run)),
                task_difference(run, twin).text(2) if twin else "",
                *(_score(own["scores"], name) for name in others),
                *(f"{total:.3e}" if total else "–", f"{times:.2f}x" if times else "–", f"{run.seconds:,.0f}"),
            )
        )
    columns = ("run", "path", task["primary"], "95 %", "vs dense", *others, "FLOPs", "reduction", "seconds")
    notes = ["FLOPs are counted training FLOPs of pre-training and fine-tuning; reduction is against the dense pair."]
    baseline = task["baseline"]
    scores = (_score(baseline, task["primary"]), "", "", *(_score(baseline, name) for name in others))
    notes += _marks(rows, "the 95 % interval of the difference by paired bootstrap over test examples holds zero")
    if any("–" in row[-3:] for row in rows):
        notes.append("–: the pre-training run or the dense pair is not among these runs.")
    rows.append(("baseline", "no model", *scores, "", "", ""))
    return Block(f"After fine-tuning on {task['name']} ({task['num_examples']:,} examples)", columns, tuple(rows), tuple(notes))


def _marks(rows: Sequence[tuple[str, ...]], how: str) -> Iterator[str]:
    marks = {row[4][-1:] for row in rows}
    if "≈" in marks:
        yield f"≈: within noise, {how}."
    if "?" in marks:
        yield "?: noise not judged, the runs left no measure of it."


def _score(scores: dict[str, float], name: str) -> str:
    return f"{scores[name]:.2f}" if name in scores else "–"


def _stacked(block: Block) -> list[str]:
    lines = [[_plain(cell) for cell in line] for line in (block.columns, *block.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    groups, room = [[0]], 0
    for column, width in enumerate(widths[1:], start=1):
        if widths[0] + room + 2 + width > WIDTH:
            groups, room = [*groups, [0]], 0
        groups[-1].append(column)
        room += 2 + width
    return ["\n".join(_line(line, widths, group) for line in lines if any(line[i] for i in group[1:])) for group in groups]


def _line(cells: list[str], widths: list[int], group: list[int]) -> str:
    return "  ".join(cells[i].rjust(widths[i]) if i else cells[i].ljust(widths[i]) for i in group).rstrip()


def _plain(text: str, width: int = 30) -> str:
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= width else f"{text[: width // 2]}…{text[1 - width // 2 :]}"


def _wrapped(text: str) -> str:
    return textwrap.fill(_plain(text, len(text)), WIDTH)


def _escaped(text: str) -> str:
    return re.sub(r"([\\|`*_\[\]~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
