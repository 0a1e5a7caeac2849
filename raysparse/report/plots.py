"""Pictures of runs as SVG text for one page: light or dark, in colour or without.

Text stays text and takes the page's colour and font (``currentColor``); backgrounds are clear. Series differ in dash, marker
or hatch as well as in colour (Okabe-Ito, of which four keep 3:1 on white and on black). Every function returns an ``<svg>``
element without scripts, links or a fixed size, with ids that no other picture of the page shares.
"""

import hashlib
import html
import io
import math
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from raysparse.report import Run, bytes_text
from raysparse.report.distance import heat_map

_INK = "#0a0b0c"  # stands for currentColor: matplotlib wants a number
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_DASHES = ("solid", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
_MARKERS = ("o", "s", "^", "D")
_HATCHES = ("", "////", "....", "xxxx")
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "raysparse",
    "text.parse_math": False,
    "font.size": 9,
    "hatch.linewidth": 0.6,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
}
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_WIDTH = 4.6  # inches; a picture fills a telephone's width without shrinking its text much


def loss_curves(runs: Sequence[Run]) -> str:
    """Training loss (running mean over 2 % of the run) as lines and validation loss as markers, over tokens.

    Above the whole run, where the first 5 % of the tokens may leave the picture at the top; below its last half, enlarged.
    """
    with _style():
        figure = _figure(4.4)
        whole, half = figure.subplots(2, 1)
        scale, unit = _tokens_unit([record["tokens"] for run in runs for record in (*run.train, *run.validation)])
        shown = [_draw_loss(axes, run, i, scale) for axes in (whole, half) for i, run in enumerate(runs)][: len(runs)]
        heights = {axes: _heights(shown, start) for axes, start in ((whole, 0.05), (half, 0.5))}
        for value in sorted({run.summary["data"]["unigram_cross_entropy"] for run in runs if run.verb == "pretrain"}):
            whole.axhline(value, color=_INK, linewidth=0.8, linestyle=(0, (1, 3)))
            place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right", "fontsize": 8}
            whole.annotate("word frequencies alone (unigram)", (1, value), (0, 3), **place)
            heights[whole].append(value)
        for axes, values in heights.items():
            if values:
                room = 0.06 * (max(values) - min(values)) or 0.1
                axes.set_ylim(min(values) - room, max(values) + room)
            axes.set_ylabel("loss (nats per token)")
        ends = [points[-1][0] for points in shown if points]
        half.set_xlim(0.5 * min(ends, default=0) / scale, 1.02 * max(ends, default=1) / scale)
        half.set(xlabel=f"tokens trained on ({unit})", title="last half, enlarged")
        figure.legend(*whole.get_legend_handles_labels(), loc="outside lower center", ncols=1 if len(runs) < 3 else 2, handlelength=3.5)
        return _svg(figure, "Training and validation loss over tokens, by run")


def layer_sparsity(runs: Sequence[Run]) -> str:
    """One panel a sparse run, one bar a sparse weight in the order of the model: the fraction of its zeros in percent."""
    with _style():
        figure = _figure(0.5 + 1.25 * len(runs))
        for i, (axes, run) in enumerate(zip(figure.subplots(len(runs), squeeze=False)[:, 0], runs, strict=True)):
            layers = run.summary["sparsity"]["layers"]
            axes.bar(range(len(layers)), [100 * layer["sparsity"] for layer in layers], **_fill(i), width=0.8)
            axes.set(ylim=(0, 100), ylabel="zeros (%)", title=_short(run.name))
            blocks = [(key, [at for at, _ in group]) for key, group in groupby(enumerate(layers), key=_block)]
            every = math.ceil(len(blocks) / 12)
            axes.set_xticks([sum(at) / len(at) for _, at in blocks[::every]], [key for key, _ in blocks[::every]])
        axes.set_xlabel("sparse weights in order, by block")
        return _svg(figure, "Sparsity of each sparse weight, by run")


def distance_maps(distances: Mapping[str, Mapping[str, float]]) -> str:
    """One heat-map [module x layer] a label, all on one colour scale; numbers in the cells, or row maxima where it is deep."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    with _style():
        maps = {label: heat_map(of) for label, of in distances.items()}
        top = max((value for of in maps.values() for row in of.values for value in row if value is not None), default=0.0)
        power = math.floor(math.log10(top)) if top > 0 else 0
        scale = ScalarMappable(Normalize(0, top / 10**power or 1), colormaps["cividis"].resampled(24))
        figure = _figure(sum(0.55 + 0.24 * len(of.modules) for of in maps.values()) + 0.6)
        heights = [1 + len(of.modules) for of in maps.values()]
        panels = figure.subplots(len(maps), squeeze=False, height_ratios=heights)[:, 0]
        for axes, (label, of) in zip(panels, maps.items(), strict=True):
            cells = [[math.nan if value is None else value / 10**power for value in row] for row in of.values]
            axes.pcolormesh(cells, cmap=scale.cmap, norm=scale.norm)
            every = math.ceil(len(of.layers) / 12)
            axes.set_xticks([i + 0.5 for i in range(0, len(of.layers), every)], [str(layer + 1) for layer in of.layers[::every]])
            axes.set_yticks([i + 0.5 for i in range(len(of.modules))], of.modules)
            axes.set(title=_short(label), ylim=(len(of.modules), 0))
            axes.tick_params(length=0)
            for row, numbers in enumerate(cells):
                _write_numbers(axes, row, numbers, top / 10**power)
        panels[-1].set_xlabel("layer")
        figure.colorbar(scale, ax=panels, label=f"cosine distance (×10{str(power).translate(_RAISED)})", aspect=30, pad=0.02)
        return _svg(figure, "Cosine distance of each weight before and after fine-tuning, module by layer")


def cost_bars(runs: Sequence[Run]) -> str:
    """Measured wall-clock seconds and bytes sent per rank, a bar a run."""
    with _style():
        figure = _figure(1.0 + 0.6 * len(runs))
        panels = figure.subplots(2, 1)
        measures = (
            ("wall-clock time (s)", [run.seconds for run in runs], lambda value: f"{value:,.0f} s"),
            ("sent per rank (bytes)", [run.summary["bytes_sent"] for run in runs], bytes_text),
        )
        for axes, (label, values, text) in zip(panels, measures, strict=True):
            for i, value in enumerate(values):
                axes.barh(i, value, **_fill(i), height=0.6)
                axes.annotate(text(value), (value, i), (3, 0), textcoords="offset points", va="center", fontsize=8)
            axes.set(xlim=(0, 1.25 * max(values) or 1), xlabel=label, xticks=[], ylim=(len(runs) - 0.5, -0.5))
            axes.set_yticks(range(len(runs)), [_short(run.name, 24) for run in runs])
        return _svg(figure, "Measured seconds and bytes sent per rank, by run")


def _draw_loss(axes: Any, run: Run, i: int, scale: float) -> list[tuple[float, float]]:
    """Draw one run; its points (tokens, loss) in order of tokens."""
    colour, dash, marker = (kind[i % 4] for kind in (_COLOURS, _DASHES, _MARKERS))
    line = _smoothed([(record["tokens"], record["loss"]) for record in run.train])
    points = [(record["tokens"], record["validation_loss"]) for record in run.validation]
    axes.plot([x / scale for x, _ in line], [y for _, y in line], color=colour, linestyle=dash, linewidth=1.2)
    axes.plot([x / scale for x, _ in points], [y for _, y in points], color=colour, linestyle="", marker=marker, markersize=4)
    axes.plot([], [], color=colour, linestyle=dash, linewidth=1.2, marker=marker, markersize=4, label=_short(run.name))
    return sorted((*line, *points))


def _heights(runs: Sequence[Sequence[tuple[float, float]]], start: float) -> list[float]:
    """Every finite loss after the share ``start`` of its run's tokens."""
    return [y for points in runs for x, y in points if x >= start * points[-1][0] and math.isfinite(y)]


def _smoothed(points: Sequence[tuple[float, float]], at_most: int = 400) -> list[tuple[float, float]]:
    """Mean of the last 2 % of all records up to each, at ``at_most`` places."""
    window, every = max(1, len(points) // 50), max(1, math.ceil(len(points) / at_most))
    means = []
    for end in range(len(points), 0, -every):
        last = [y for _, y in points[max(0, end - window) : end]]
        means.append((points[end - 1][0], sum(last) / len(last)))
    return means[::-1]


def _write_numbers(axes: Any, row: int, numbers: Sequence[float], top: float) -> None:
    if len(numbers) > 12:
        largest = max(range(len(numbers)), key=lambda i: -1.0 if math.isnan(numbers[i]) else numbers[i])
        wanted = {largest} if numbers[largest] > 0 else set()
    else:
        wanted = {i for i, number in enumerate(numbers) if not math.isnan(number)}
    for i in wanted:
        ink = "#ffffff" if numbers[i] < 0.55 * top else "#000000"
        axes.text(i + 0.5, row + 0.5, f"{numbers[i]:.1f}", color=ink, ha="center", va="center", fontsize=6.5)


def _fill(i: int) -> dict[str, Any]:
    return {"facecolor": _COLOURS[i % 4], "hatch": _HATCHES[i % 4], "edgecolor": _INK, "linewidth": 0.4}


def _block(at: tuple[int, dict[str, Any]]) -> str:
    found = re.search(r"\.(\d+)\.", at[1]["name"])
    return str(int(found[1]) + 1) if found else at[1]["name"].rpartition(".")[2]


def _tokens_unit(tokens: Sequence[float]) -> tuple[float, str]:
    most = max(tokens, default=1)
    for scale, unit in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if most >= scale:
            return scale, unit
    return 1, "count"


def _short(text: str, length: int = 34) -> str:
    """A name as a label: one line, no longer than it can be read, never starting with the ``_`` that hides it in legends."""
    text = " ".join("".join(letter if letter.isprintable() else "?" for letter in text).split())
    text = text if len(text) <= length else f"{text[: length // 2]}…{text[1 - length // 2 :]}"
    return f" {text}" if text.startswith("_") else text


@contextmanager
def _style() -> Generator[None]:
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def _figure(height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _svg(figure: Any, label: str) -> str:
    """The figure as one ``<svg>`` element to stand inside a page."""
    with io.StringIO() as file:
        figure.savefig(file, format="svg", transparent=True)
        text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'font-family: [^;"]*', "font-family: system-ui, sans-serif", text)
    text = re.sub(_INK, "currentColor", text, flags=re.IGNORECASE)
    mark = "p" + hashlib.sha256(text.encode()).hexdigest()[:8]
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{mark}-", text)
    size = re.search(r'viewBox="[^"]*"', text)
    assert size is not None
    opening = f'<svg {size[0]} xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img"'
    return re.sub(r"<svg[^>]*>", lambda _: f'{opening} aria-label="{html.escape(label)}">', text, count=1)
