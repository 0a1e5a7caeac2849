"""Pictures of a search: what a score costs, how trials learned, which settings mattered; each function returns an ``<svg>``."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from raysparse.report.drawing import COLOURS, INK, canvas, dots, fill, short, stroke, style, svg, times_ten
from raysparse.report.search import Cell
from raysparse.report.search_statistics import Finding, labels, pareto, scores_of

_OFFSETS = [(dx, dy) for far in (6, 16, 27) for dx, dy in ((far, 4), (far, -10), (-far, 4), (-far, -10), (0, far), (0, -far - 6))]
"""Where the label of a point may stand, in points from it, the nearest first."""


def pareto_panels(finding: Finding, cells: Sequence[Cell], metric: str) -> str:
    """The primary score over counted FLOPs and over measured seconds, both end to end.

    Every finished trial is a faint dot, the mean of each cell's chosen trials a mark with its label; the means that no other beats
    are joined, and dashed the single trials that no other beats. Dotted: the dense mean less the tolerance.

    Args:
        cells: all of the task; the place in it is the look of a cell.
        metric: how the score is called.
    """
    with style():
        figure = canvas(5.0)
        panels = figure.subplots(2, 1)
        power = math.floor(math.log10(max((result.counted or 1.0 for result in finding.results), default=1.0)))
        measures = (
            ("counted", 10.0**power, f"counted FLOPs, end to end ({times_ten(power)})"),
            ("seconds", 1.0, "measured seconds, end to end"),
        )
        for axes, (what, scale, label) in zip(panels, measures, strict=True):
            _trials(axes, cells, finding, what, scale)
            points = _means(finding, cells, what, scale)
            front = [points[k] for k in pareto([(x, y) for _, _, x, y in points], finding.lower_is_better)]
            axes.plot([x for _, _, x, _ in front], [y for *_, y in front], color=INK, linewidth=0.8, zorder=1)
            for i, _, x, y in points:
                axes.plot(x, y, **(dots(i) | {"markersize": 7}), linestyle="", zorder=3)
            _tolerance(axes, finding)
            axes.set(xlabel=label, ylabel=short(metric, 24))
            axes.margins(x=0.14, y=0.16)
        figure.draw_without_rendering()  # now it is known where points lie
        for axes, (what, scale, _) in zip(panels, measures, strict=True):
            _write_labels(axes, [(short(label, 22), (x, y)) for _, label, x, y in _means(finding, cells, what, scale)])
        return svg(figure, f"{metric} over counted FLOPs and over measured seconds")


def learning_curves(cells: Sequence[Cell]) -> str:
    """Validation loss over the steps of every trial of a task, a look a cell.

    Chosen trials are drawn strong, other finished ones weaker; those that were stopped or failed are thin and end in a cross. The
    highest tenth of the losses may leave the picture at the top.
    """
    with style():
        rows = math.ceil(len(cells) / 2)
        figure = canvas(2.9 + 0.2 * rows)
        axes = figure.subplots()
        values = []
        for i, (cell, label) in enumerate(zip(cells, labels(cells), strict=True)):
            for trial in cell.trials:
                points = [(step, loss) for step, loss in trial.validation if math.isfinite(loss)]
                values += [loss for _, loss in points]
                finished, chosen = trial.status == "finished", trial in cell.chosen
                look = {"linewidth": 1.6 if chosen else 0.9 if finished else 0.6, "alpha": 1.0 if chosen else 0.6}
                axes.plot([x for x, _ in points], [y for _, y in points], **(stroke(i) | look))
                if points and not finished:
                    axes.plot(*points[-1], color=COLOURS[i % 4], marker="x", markersize=5, linestyle="")
                elif len(points) == 1:
                    axes.plot(*points[-1], **dots(i), linestyle="")
            axes.plot([], [], **stroke(i), label=short(label))
        if values:
            top, bottom = sorted(values)[math.ceil(0.9 * (len(values) - 1))], min(values)
            room = 0.06 * (top - bottom) or 0.1
            axes.set_ylim(bottom - room, top + room)
        axes.set(xlabel="training steps of the trial", ylabel="validation loss (nats)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, handlelength=3.5)
        return svg(figure, "Validation loss over steps, by trial")


def importance_bars(shares: Mapping[str, tuple[float, float]]) -> str:
    """A bar a parameter: the share of the variance of the objective that its values explain; a mark where chance would put it."""
    with style():
        figure = canvas(1.0 + 0.3 * len(shares))
        axes = figure.subplots()
        places = range(len(shares))
        axes.barh(places, [100 * share for share, _ in shares.values()], **fill(0), height=0.6, label="its values explain")
        axes.plot([100 * chance for _, chance in shares.values()], places, linestyle="", **dots(1), label="values dealt at random would")
        axes.set_yticks(places, [short(name, 26) for name in shares], fontsize=8)
        axes.set(xlim=(0, 102), ylim=(len(shares) - 0.5, -0.5), xlabel="variance of the objective explained (%)")
        handles, names = axes.get_legend_handles_labels()
        figure.legend(handles[::-1], names[::-1], loc="outside lower center", ncols=2)
        return svg(figure, "Which settings mattered")


def _trials(axes: Any, cells: Sequence[Cell], finding: Finding, what: str, scale: float) -> None:
    """Every finished trial, and the front of these, faintly."""
    every: list[tuple[float, float]] = []
    for i, cell in enumerate(cells):
        known = [(getattr(trial, what), scores_of(trial).get(finding.metric)) for trial in cell.trials]
        places = [(cost / scale, score) for cost, score in known if cost is not None and score is not None]
        axes.plot([x for x, _ in places], [y for _, y in places], **(dots(i) | {"markersize": 3, "alpha": 0.35}), linestyle="", zorder=2)
        every += places
    front = [every[k] for k in pareto(every, finding.lower_is_better)]
    axes.plot([x for x, _ in front], [y for _, y in front], color=INK, linewidth=0.6, linestyle=(0, (4, 3)), alpha=0.6, zorder=1)


def _tolerance(axes: Any, finding: Finding) -> None:
    if finding.dense is not None and finding.metric in finding.dense.scores:
        worst = finding.dense.scores[finding.metric].mean + finding.tolerance * (1 if finding.lower_is_better else -1)
        axes.axhline(worst, color=INK, linewidth=0.8, linestyle=(0, (1, 3)), zorder=0)


def _means(finding: Finding, cells: Sequence[Cell], what: str, scale: float) -> list[tuple[int, str, float, float]]:
    """(place of the cell, its label, cost, mean score) of every result that has both."""
    found = []
    for result in finding.results:
        cost, score = getattr(result, what), result.scores.get(finding.metric)
        if cost is not None and score is not None and math.isfinite(score.mean):
            found.append((next(i for i, cell in enumerate(cells) if cell is result.cell), result.label, cost / scale, score.mean))
    return found


def _write_labels(axes: Any, points: Sequence[tuple[str, tuple[float, float]]]) -> None:
    """The label of each point beside it, clear of the other labels, of points and of lines where there is room."""
    pixel = axes.figure.dpi / 72
    at = [axes.transData.transform(place) / pixel for _, place in points]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in at]
    faint = [place for line in axes.lines if line.get_linestyle() == "None" for place in line.get_xydata()]
    taken += [(x - 2, y - 2, x + 2, y + 2) for x, y in (axes.transData.transform(place) / pixel for place in faint)]
    for line in axes.lines:  # the front and the tolerance, as a string of small boxes
        if line.get_linestyle() != "None" and len(places := line.get_transform().transform(line.get_xydata()) / pixel) > 1:
            for one, other in pairwise(places):
                count = 2 + int(max(abs(other - one)) // 3)
                taken += [(x - 1, y - 1, x + 1, y + 1) for x, y in zip(*map(np.linspace, one, other, (count, count)), strict=True)]
    (left, bottom), (right, top) = axes.get_window_extent().get_points() / pixel
    for (label, place), here in zip(points, at, strict=True):
        width, boxes = 4.8 * len(label), []
        for dx, dy in _OFFSETS:
            x, y = here[0] + dx - (width if dx < 0 else width / 2 if dx == 0 else 0), here[1] + dy
            box = (x, y - 2, x + width, y + 8)
            inside = left <= box[0] and box[2] <= right and bottom <= box[1] and box[3] <= top
            blame = sum(_overlap(one, box) for one in taken) + 2 * math.hypot(dx, dy) + (0 if inside else 1e3)
            boxes.append((blame, len(boxes), (dx, dy), box))
        _, _, offset, box = min(boxes)
        taken.append(box)
        side = "right" if offset[0] < 0 else "center" if offset[0] == 0 else "left"
        axes.annotate(label, place, offset, textcoords="offset points", ha=side, fontsize=8, annotation_clip=False)


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Area that two boxes (left, bottom, right, top) share."""
    return max(0.0, min(one[2], other[2]) - max(one[0], other[0])) * max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
