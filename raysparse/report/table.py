"""The comparison of runs as tables: what sparsity cost in quality, what it would save if zeros were skipped, what it took.

A difference is set against the dense twin (`dense_twin`) and marked ``≈`` where a 95 % interval of it holds zero, ``?`` where
the runs left nothing to judge it by.
"""

import html
import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from raysparse.config import ConfigError
from raysparse.report import Run, bytes_text, dense_twin, end_to_end, path_of, percent, reduction, runs_of
from raysparse.report.budget import equal_flops_text
from raysparse.report.difference import loss_difference, score_interval, task_difference

WIDTH = 110
NO_TIME_SAVED = "the zeros saved no time here"

_STATIC = (
    *("run", "sparsity", "nnz", "val. loss", "vs dense", "perplexity", "FLOPs", "reduction", "without head"),
    *("seconds", "speed", "tokens/s", "sent/rank"),
)
_EVOLVING = (
    *("run", "nnz", "density", "attention", "val. loss", "vs dense", "perplexity", "FLOPs", "reduction", "with updates"),
    *("updates", "explored", "seconds", "speed", "sent/rank"),
)


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
    time: str = ""

    def terminal(self) -> str:
        """Plain text, at most `WIDTH` columns; a wide block goes on below with its first column repeated."""
        parts = ["\n\n".join([_wrapped(block.title), *_stacked(block), *map(_wrapped, block.notes)]) for block in self.blocks]
        return "\n\n".join([*parts, *[_wrapped(self.time)] * bool(self.time)]) + "\n"

    def markdown(self) -> str:
        """GitHub Markdown."""
        parts = []
        for block in self.blocks:
            lines = [[escaped(cell) for cell in line] for line in (block.columns, *block.rows)]
            lines.insert(1, ["---", *["---:"] * (len(block.columns) - 1)])
            parts.append(f"### {escaped(block.title)}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
            parts += map(escaped, block.notes)
        return "\n\n".join([*parts, *[escaped(self.time)] * bool(self.time)]) + "\n"

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
    if told := [run for run in runs if "memory_bytes" in run.summary]:
        blocks.append(_of_a_worker(told))
    return Table(tuple(blocks), wall_clock(runs))


def _of_a_worker(runs: Sequence[Run]) -> Block:
    """What masks saved on the wire and in memory, measured."""
    rows = []
    for run in runs:
        summary, kept = run.summary, run.summary["memory_bytes"]
        sent, dense, seconds = (summary[key] / max(1, summary["steps"]) for key in ("bytes_sent", "dense_bytes_sent", "wire_seconds"))
        sizes = (kept["weights"], kept["gradients"], kept["moments"], kept["dense_moments"], summary["peak_memory_bytes"])
        rows.append((run.name, bytes_text(sent), bytes_text(dense), f"{seconds:.3g} s", *map(bytes_text, sizes)))
    columns = ("run", "sent/step", "unpacked", "in comm.", "weights", "gradients", "moments", "if dense", "peak")
    notes = (
        "Of the worker that has most. Sent: weights gathered, gradients reduced and mask bits in a training step, which spent the "
        "seconds in comm.; unpacked: if live weights and gradients were not sent alone. Moments: AdamW's, of live weights alone where "
        "masks allow; peak: of the whole process.",
    )
    return Block("On the wire and in memory", columns, tuple(rows), notes)


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
        verdict = NO_TIME_SAVED if ratio >= 0.95 else "fewer seconds than dense were measured"
        if not _skips(run) and ratio < 0.95:
            verdict = f"{NO_TIME_SAVED}; dense kernels multiply every zero, so this difference is the machine's noise"
        took = measured.setdefault(verdict, [])
        took.append(f"{run.name} took {run.seconds:,.0f} s against {twin.seconds:,.0f} s dense ({ratio:.2f}x)")
    sentences = [f"{', '.join(took)}: {verdict}." for verdict, took in measured.items()]
    return "Wall-clock time: " + (" ".join(sentences) or "no run here trained with masks, so there is nothing to judge.")


def _skips(run: Run) -> bool:
    """Whether the kernels left out anything that the dense run's computed."""
    return run.summary["flops"]["executed"] < run.summary["flops"]["dense"]


def _same_work(run: Run, other: Run) -> bool:
    return (run.summary["tokens"], run.summary["workers"]) == (other.summary["tokens"], other.summary["workers"])


def _after_pretraining(pretrained: Sequence[Run], runs: Sequence[Run]) -> Block:
    evolving = any(run.evolves for run in pretrained)
    cells = [_pretraining_cells(run, runs) for run in pretrained]
    unigram = sorted({run.summary["data"]["unigram_cross_entropy"] for run in pretrained})
    cells += [{"run": "unigram (train data)", "val. loss": f"{loss:.4f}", "perplexity": f"{math.exp(loss):,.2f}"} for loss in unigram]
    columns = _EVOLVING if evolving else _STATIC
    rows = tuple(tuple(row.get(column, "") for column in columns) for row in cells)
    conventions = ", ".join(sorted({run.summary["flops"]["convention"] for run in pretrained}))
    notes = [
        f"FLOPs are counted training FLOPs (convention: {conventions}): what the steps would take if zeros were skipped. Reduction is "
        "dense / counted; speed is measured, the dense run's seconds / these. Loss in nats a token; unigram is the loss of knowing word "
        "frequencies alone.",
        *(_evolving_notes(pretrained) if evolving else ()),
        *marks(
            (row.get("vs dense", "") for row in cells),
            "the 95 % interval of the difference by the standard error over validation windows holds zero",
        ),
    ]
    if sum(run.sparsity == 0 for run in pretrained) > 1:
        notes.append("Of several dense runs of one model, the one with the lowest validation loss is compared with.")
    if len({run.summary["tokens"] for run in pretrained}) > 1:
        notes.append("These runs did not train on equally many tokens: a difference of losses is not sparsity's alone.")
    if len(unigram) > 1:
        notes.append("These runs were not trained on the same data (unigram differs): their losses cannot be compared.")
    return Block("After pre-training", columns, rows, tuple(notes))


def _pretraining_cells(run: Run, runs: Sequence[Run]) -> dict[str, str]:
    """Every column that a pre-training run has something to say in."""
    summary, twin = run.summary, dense_twin(run, runs)
    times = reduction(run, runs)
    cells = {
        "run": run.name,
        "sparsity": percent(run.sparsity),
        "nnz": f"{summary['sparsity']['nnz']:,}",
        "density": f"{100 * run.density:.1f} %",
        "attention": f"{100 * run.attention_density:.1f} %",
        "val. loss": f"{run.validation_loss:.4f}",
        "vs dense": loss_difference(run, twin).text(4) if twin else "",
        "perplexity": f"{summary['loss']['perplexity']:,.2f}",
        "FLOPs": f"{run.counted:.3e}",
        "reduction": f"{times:.2f}x",
        "with updates": f"{summary['flops'].get('reduction_with_updates', times):.2f}x",
        "without head": f"{summary['flops']['reduction_without_head']:.2f}x",
        "seconds": f"{run.seconds:,.0f}",
        "speed": f"{twin.seconds / run.seconds:.1f}x" if twin and _same_work(run, twin) and _skips(run) else "",
        "tokens/s": f"{summary['tokens_per_s']:,.0f}",
        "sent/rank": bytes_text(summary["bytes_sent"]),
    }
    if run.topology:
        cells |= {"updates": f"{run.topology['updates']:,}", "explored": f"{100 * run.topology['explored']:.1f} %"}
    return cells


def _evolving_notes(pretrained: Sequence[Run]) -> Iterator[str]:
    yield (
        "nnz is at the end; density and attention are means over the steps: live share of the sparse weights, computed share of full "
        "causal attention. With updates: the dense gradients that topology updates looked at counted too. Explored: share of the "
        "sparse weights that were ever alive."
    )
    if sentence := equal_flops_text(pretrained):
        yield sentence


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
    notes += marks((row[4] for row in rows), "the 95 % interval of the difference by paired bootstrap over test examples holds zero")
    notes += [f"Remark: {remark}." for remark in sorted({run.summary["task"].get("remark", "") for run in finetuned} - {""})]
    if any("–" in row[-3:] for row in rows):
        notes.append("–: the pre-training run or the dense pair is not among these runs.")
    rows.append(("baseline", "no model", *scores, "", "", ""))
    return Block(f"After fine-tuning on {task['name']} ({task['num_examples']:,} examples)", columns, tuple(rows), tuple(notes))


def marks(differences: Iterable[str], how: str) -> Iterator[str]:
    """What the marks at the end of `Difference.text` mean, of those that occur."""
    marks = {text[-1:] for text in differences}
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


def escaped(text: str) -> str:
    """One line of Markdown that shows the text as it stands."""
    return re.sub(r"([\\|`*_\[\]~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
