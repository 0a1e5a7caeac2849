"""Pictures of runs: loss, cost, sparsity of layers, what fine-tuning moved; each function returns an ``<svg>`` (`drawing`)."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from raysparse.report import Run, bytes_text
from raysparse.report.budget import at_equal_flops, counted_after
from raysparse.report.distance import heat_map
from raysparse.report.drawing import INK, canvas, dots, fill, short, smoothed, stroke, style, svg, times_ten, tokens_unit


def loss_curves(runs: Sequence[Run]) -> str:
    """Training loss (running mean over 2 % of the run) as lines and validation loss as markers, over tokens.

    Above the whole run, where the first 5 % of the tokens may leave the picture at the top; below its last half, enlarged.
    """
    with style():
        figure = canvas(4.4)
        whole, half = figure.subplots(2, 1)
        scale, unit = tokens_unit([record["tokens"] for run in runs for record in (*run.train, *run.validation)])
        shown = [
            _draw_loss(axes, run, i, lambda tokens: [count / scale for count in tokens])
            for axes in (whole, half)
            for i, run in enumerate(runs)
        ][: len(runs)]
        heights = {axes: _heights(shown, start) for axes, start in ((whole, 0.05), (half, 0.5))}
        for value in sorted({run.summary["data"]["unigram_cross_entropy"] for run in runs if run.verb == "pretrain"}):
            whole.axhline(value, color=INK, linewidth=0.8, linestyle=(0, (1, 3)))
            place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right", "fontsize": 8}
            whole.annotate("word frequencies alone (unigram)", (1, value), (0, 3), **place)
            heights[whole].append(value)
        for axes, values in heights.items():
            _set_loss_axis(axes, values)
        ends = [points[-1][0] for points in shown if points]
        half.set_xlim(0.5 * min(ends, default=0), 1.02 * max(ends, default=1))
        half.set(xlabel=f"tokens trained on ({unit})", title="last half, enlarged")
        figure.legend(*whole.get_legend_handles_labels(), loc="outside lower center", ncols=1 if len(runs) < 3 else 2, handlelength=3.5)
        return svg(figure, "Training and validation loss over tokens, by run")


def flops_curves(runs: Sequence[Run]) -> str:
    """Above, counted FLOPs spent over tokens; below, loss over counted FLOPs with a line where the cheapest run ends.

    Runs that recorded no FLOPs are left out. Of the loss, the first fifth of each run may leave the picture at the top.
    """
    with style():
        figure = canvas(4.6)
        spent, loss = figure.subplots(2, 1)
        scale, unit = tokens_unit([run.summary["tokens"] for run in runs])
        power = math.floor(math.log10(max(run.counted for run in runs)))
        shown = []
        for i, run in enumerate(runs):
            tokens = [0, *(record["tokens"] for record in run.train)]
            if counted := counted_after(run, tokens):
                spent.plot([count / scale for count in tokens], [flops / 10**power for flops in counted], **stroke(i))
                shown.append(_draw_loss(loss, run, i, lambda at, run=run: [flops / 10**power for flops in counted_after(run, at)]))
        loss.axvline(at_equal_flops(runs)[0] / 10**power, color=INK, linewidth=0.8, linestyle=(0, (1, 3)))
        _set_loss_axis(loss, _heights(shown, 0.2))
        spent.set(xlabel=f"tokens trained on ({unit})", ylabel=f"counted FLOPs ({times_ten(power)})")
        loss.set(xlabel=f"counted FLOPs ({times_ten(power)})")
        figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=1 if len(runs) < 3 else 2, handlelength=3.5)
        return svg(figure, "Counted FLOPs over tokens, and loss over counted FLOPs, by run")


def layer_sparsity(runs: Sequence[Run]) -> str:
    """One panel a run that ended sparse, one bar a sparse weight in the order of the model: the fraction of its zeros in percent."""
    sparse = [(i, run) for i, run in enumerate(runs) if run.summary["sparsity"]["actual"] > 0]
    with style():
        figure = canvas(0.5 + 1.25 * len(sparse))
        for axes, (i, run) in zip(figure.subplots(len(sparse), squeeze=False)[:, 0], sparse, strict=True):
            layers = run.summary["sparsity"]["layers"]
            axes.bar(range(len(layers)), [100 * layer["sparsity"] for layer in layers], **fill(i), width=0.8)
            axes.set(ylim=(0, 100), ylabel="zeros (%)", title=short(run.name))
            blocks = [(key, [at for at, _ in group]) for key, group in groupby(enumerate(layers), key=_block)]
            every = math.ceil(len(blocks) / 12)
            axes.set_xticks([sum(at) / len(at) for _, at in blocks[::every]], [key for key, _ in blocks[::every]])
        axes.set_xlabel("sparse weights in order, by block")
        return svg(figure, "Sparsity of each sparse weight, by run")


def distance_maps(distances: Mapping[str, Mapping[str, float]]) -> str:
    """One heat-map [module x layer] a label, all on one colour scale; numbers in the cells, or row maxima where it is deep."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    with style():
        maps = {label: heat_map(of) for label, of in distances.items()}
        top = max((value for of in maps.values() for row in of.values for value in row if value is not None), default=0.0)
        power = math.floor(math.log10(top)) if top > 0 else 0
        scale = ScalarMappable(Normalize(0, top / 10**power or 1), colormaps["cividis"].resampled(24))
        figure = canvas(sum(0.55 + 0.24 * len(of.modules) for of in maps.values()) + 0.6)
        heights = [1 + len(of.modules) for of in maps.values()]
        panels = figure.subplots(len(maps), squeeze=False, height_ratios=heights)[:, 0]
        for axes, (label, of) in zip(panels, maps.items(), strict=True):
            cells = [[math.nan if value is None else value / 10**power for value in row] for row in of.values]
            axes.pcolormesh(cells, cmap=scale.cmap, norm=scale.norm)
            every = math.ceil(len(of.layers) / 12)
            axes.set_xticks([i + 0.5 for i in range(0, len(of.layers), every)], [str(layer + 1) for layer in of.layers[::every]])
            axes.set_yticks([i + 0.5 for i in range(len(of.modules))], of.modules)
            axes.set(title=short(label), ylim=(len(of.modules), 0))
            axes.tick_params(length=0)
            for row, numbers in enumerate(cells):
                _write_numbers(axes, row, numbers, top / 10**power)
        panels[-1].set_xlabel("layer")
        figure.colorbar(scale, ax=panels, label=f"cosine distance ({times_ten(power)})", aspect=30, pad=0.02)
        return svg(figure, "Cosine distance of each weight before and after fine-tuning, module by layer")


def cost_bars(runs: Sequence[Run]) -> str:
    """Measured wall-clock seconds and bytes sent per rank, a bar a run."""
    with style():
        figure = canvas(1.0 + 0.6 * len(runs))
        panels = figure.subplots(2, 1)
        measures = (
            ("wall-clock time (s)", [run.seconds for run in runs], lambda value: f"{value:,.0f} s"),
            ("sent per rank (bytes)", [run.summary["bytes_sent"] for run in runs], bytes_text),
        )
        for axes, (label, values, text) in zip(panels, measures, strict=True):
            for i, value in enumerate(values):
                axes.barh(i, value, **fill(i), height=0.6)
                axes.annotate(text(value), (value, i), (3, 0), textcoords="offset points", va="center", fontsize=8)
            axes.set(xlim=(0, 1.25 * max(values) or 1), xlabel=label, xticks=[], ylim=(len(runs) - 0.5, -0.5))
            axes.set_yticks(range(len(runs)), [short(run.name, 24) for run in runs])
        return svg(figure, "Measured seconds and bytes sent per rank, by run")


def _draw_loss(axes: Any, run: Run, i: int, place: Callable[[Sequence[float]], Sequence[float]]) -> list[tuple[float, float]]:
    """Draw one run, tokens at their `place`; its points (place, loss) in order of tokens."""
    line = smoothed([(record["tokens"], record["loss"]) for record in run.train])
    points = [(record["tokens"], record["validation_loss"]) for record in run.validation]
    line, points = (list(zip(place([x for x, _ in of]), [y for _, y in of], strict=True)) for of in (line, points))
    axes.plot([x for x, _ in line], [y for _, y in line], **stroke(i))
    axes.plot([x for x, _ in points], [y for _, y in points], **dots(i), linestyle="")
    axes.plot([], [], **(stroke(i) | dots(i)), label=short(run.name))
    return sorted((*line, *points))


def _set_loss_axis(axes: Any, values: Sequence[float]) -> None:
    if values:
        room = 0.06 * (max(values) - min(values)) or 0.1
        axes.set_ylim(min(values) - room, max(values) + room)
    axes.set_ylabel("loss (nats per token)")


def _heights(runs: Sequence[Sequence[tuple[float, float]]], start: float) -> list[float]:
    """Every finite loss after the share ``start`` of its run."""
    return [y for points in runs for x, y in points if x >= start * points[-1][0] and math.isfinite(y)]


def _write_numbers(axes: Any, row: int, numbers: Sequence[float], top: float) -> None:
    if len(numbers) > 12:
        largest = max(range(len(numbers)), key=lambda i: -1.0 if math.isnan(numbers[i]) else numbers[i])
        wanted = {largest} if numbers[largest] > 0 else set()
    else:
        wanted = {i for i, number in enumerate(numbers) if not math.isnan(number)}
    for i in wanted:
        ink = "#ffffff" if numbers[i] < 0.55 * top else "#000000"
        axes.text(i + 0.5, row + 0.5, f"{numbers[i]:.1f}", color=ink, ha="center", va="center", fontsize=6.5)


def _block(at: tuple[int, dict[str, Any]]) -> str:
    found = re.search(r"\.(\d+)\.", at[1]["name"])
    return str(int(found[1]) + 1) if found else at[1]["name"].removesuffix(".weight").rpartition(".")[2]
