"""A picture of topologies that evolve: how dense, how much changed, how much attention, in which phase."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from raysparse.report import Run
from raysparse.report.drawing import COLOURS, INK, canvas, dots, short, smoothed, stroke, style, svg, tokens_unit

_LETTER = 0.055  # inches, of the letters in the strip of phases
_PANEL = 3.7  # inches, width of a panel without its labels


class PhaseSpan(NamedTuple):
    """A phase of a run in tokens."""

    name: str
    first: float
    end: float


class Panel(NamedTuple):
    """Curves by run, of (tokens, share): of what holds until the next point, or of single events."""

    label: str
    curves: Sequence[Sequence[tuple[float, float]]]
    events: bool = False


def phases(run: Run) -> list[PhaseSpan]:
    """The phases in order, as records and updates tell; a border lies after the last step that is known to be before it.

    It is exact where the logging interval divides the phase.
    """
    seen = [(record["tokens"], record["phase"]) for record in run.train if "phase" in record]
    seen += [(after, record["phase"]) for after, record in zip(_ends(run), run.history, strict=True) if "phase" in record]
    spans: list[PhaseSpan] = []
    for name, group in groupby(sorted(seen), key=lambda place: place[1]):
        spans.append(PhaseSpan(name, spans[-1].end if spans else 0, [after for after, _ in group][-1]))
    return spans


def density(run: Run) -> list[tuple[float, float]]:
    """(tokens, live share of the sparse weights from there on), at the end once more; of a run without history as it was logged.

    An update in step s, counted from 0, is felt from step s + 1 on.
    """
    if not run.history:
        return _from_there_on([(record["tokens"], 1 - record["sparsity"]) for record in run.train if "sparsity" in record])
    places = [0, *_ends(run)[1:]]
    shares = [1 - record["sparsity"] for record in run.history]
    return [*zip(places, shares, strict=True), (run.summary["tokens"], shares[-1])]


def churn(run: Run) -> list[tuple[float, float]]:
    """(tokens, share of the live weights that an update brought to life)."""
    return [(after, record["churn"]) for after, record in zip(_ends(run)[1:], run.history[1:], strict=True)]


def attention(run: Run) -> list[tuple[float, float]]:
    """(tokens, computed share of full causal attention from there on), at the end once more."""
    return _from_there_on([(record["tokens"], record["attention_density"]) for record in run.train if "attention_density" in record])


def topology_curves(runs: Sequence[Run]) -> str:
    """Density, churn and attention over tokens in percent, under a strip of phases for each run that has several.

    A panel in which nothing happens, no update or full attention throughout, is left out.
    """
    timelines = [(i, spans) for i, run in enumerate(runs) if len(spans := phases(run)) > 1]
    panels = [Panel("live weights (%)", [density(run) for run in runs])]
    if any(changes := [churn(run) for run in runs]):
        panels.append(Panel("churn (% of live)", [smoothed(points) for points in changes], events=True))
    if any(share < 1 for run in runs for _, share in attention(run)):
        panels.append(Panel("attention (% of full)", [attention(run) for run in runs]))
    with style():
        figure = canvas(0.6 + 0.2 * len(timelines) + 1.3 * len(panels) + 0.2 * ((len(runs) + 1) // 2))
        ratios = ([0.15 * len(timelines)] if timelines else []) + [1] * len(panels)
        axes = list(figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0])
        scale, unit = tokens_unit([run.summary["tokens"] for run in runs])
        end = max(run.summary["tokens"] for run in runs) / scale
        if timelines:
            _draw_phases(axes[0], axes[1:], runs, timelines, scale)
        for place, panel in zip(axes[-len(panels) :], panels, strict=True):
            _draw_panel(place, panel, scale)
        axes[-1].set(xlabel=f"tokens trained on ({unit})", xlim=(0, 1.01 * end))
        handles = [axes[-1].plot([], [], **stroke(i), label=short(run.name))[0] for i, run in enumerate(runs)]
        figure.legend(handles=handles, loc="outside lower center", ncols=1 if len(runs) < 3 else 2, handlelength=3.5)
        return svg(figure, "Density, churn and attention over tokens, by run")


def _ends(run: Run) -> list[float]:
    """Tokens after the step, counted from 0, of each record of the history."""
    return [(record["step"] + 1) * run.summary["tokens"] / run.summary["steps"] for record in run.history]


def _from_there_on(logged: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """What a record tells holds for the interval that it ends."""
    if not logged:
        return []
    ends, values = zip(*logged, strict=True)
    return [*zip((0, *ends[:-1]), values, strict=True), logged[-1]]


def _draw_panel(axes: Any, panel: Panel, scale: float) -> None:
    for i, points in enumerate(panel.curves):
        xs, ys = [x / scale for x, _ in points], [100 * y for _, y in points]
        axes.plot(xs, ys, **stroke(i), drawstyle="default" if panel.events else "steps-post")
        if panel.events:
            axes.plot(xs, ys, **(dots(i) | {"markersize": 2.5}), linestyle="")
    axes.set(ylabel=panel.label, ylim=(0, None if panel.events else 105))


def _draw_phases(
    strip: Any, panels: Sequence[Any], runs: Sequence[Run], timelines: Sequence[tuple[int, list[PhaseSpan]]], scale: float
) -> None:
    """A row a run; a phase too short for its name has its number, which the caption explains."""
    for row, (i, spans) in enumerate(timelines):
        for number, span in enumerate(spans):
            first, width = span.first / scale, (span.end - span.first) / scale
            strip.barh(row, width, left=first, height=0.9, color=COLOURS[i % 4], alpha=0.35 if number % 2 else 0.15)
            room = (span.end - span.first) / spans[-1].end * _PANEL
            text = span.name if len(span.name) * _LETTER <= room else str(number + 1)
            strip.text(first + width / 2, row, text, ha="center", va="center", fontsize=7)
            for axes in panels if number else ():
                axes.axvline(first, color=INK, linewidth=0.6, linestyle=(0, (1, 3)))
    strip.set(ylim=(len(timelines) - 0.5, -0.5))
    strip.set_yticks(range(len(timelines)), [short(runs[i].name, 14) for i, _ in timelines], fontsize=7)
    strip.tick_params(length=0, labelbottom=False)
    strip.spines[:].set_visible(False)
