"""An analysis of models or runs: facts, a table of them and a picture; and the pictures."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysparse.report.drawing import canvas, dots, fill, short, stroke, style, svg
from raysparse.report.table import Block, Table


@dataclass(frozen=True)
class Analysis:
    """What an analysis found.

    Attributes:
        what: its name, and that of its files.
        facts: everything, as plain data.
        block: the same to read.
        picture: an ``<svg>`` element.
    """

    what: str
    facts: dict[str, Any]
    block: Block
    picture: str

    def terminal(self) -> str:
        return Table((self.block,)).terminal()

    def write(self, folder: Path) -> list[Path]:
        """``<what>.json``, ``.md`` and ``.svg`` in `folder`, which is made; returns them."""
        folder.mkdir(parents=True, exist_ok=True)
        texts = {
            ".json": json.dumps(self.facts, indent=1) + "\n",
            ".md": f"{Table((self.block,)).markdown()}\n![{self.block.title}]({self.what}.svg)\n",
            ".svg": self.picture.replace("currentColor", "#333333") + "\n",  # a file of its own has no page to take it from
        }
        files = {folder / f"{self.what}{suffix}": text for suffix, text in texts.items()}
        for file, text in files.items():
            file.write_text(text, encoding="utf-8")
        return list(files)


def magnitude_bands(rows: Sequence[Mapping[str, Any]]) -> str:
    """A panel a module: over the layers the median of |w| of the live weights, half of them in the darker band, 98 % in the lighter."""
    modules = list(dict.fromkeys(row["module"] for row in rows))
    with style():
        columns = 2 if len(modules) > 1 else 1
        figure = canvas(0.5 + 1.4 * math.ceil(len(modules) / columns))
        panels = figure.subplots(math.ceil(len(modules) / columns), columns, squeeze=False, sharex=True).flatten()
        for i, (axes, module) in enumerate(zip(panels, modules, strict=False)):
            own = [row for row in rows if row["module"] == module and row["nnz"]]
            layers = [row["layer"] + 1 for row in own]
            for (low, high), alpha in ((("q01", "q99"), 0.2), (("q25", "q75"), 0.45)):
                bounds = [[row["magnitude"][key] for row in own] for key in (low, high)]
                axes.fill_between(layers, *bounds, color=stroke(i)["color"], alpha=alpha, linewidth=0)
            axes.plot(layers, [row["magnitude"]["q50"] for row in own], **(stroke(0) | dots(0) | {"color": "#000000", "markersize": 2}))
            axes.set(title=f"{module}, {100 * sum(r['nnz'] for r in own) / max(1, sum(r['size'] for r in own)):.3g} % live", ylim=(0, None))
        for axes in panels[len(modules) :]:
            axes.set_axis_off()
        figure.supxlabel("layer", fontsize=9)
        figure.supylabel("|weight|, live ones", fontsize=9)
        return svg(figure, "Magnitudes of the live weights by module and layer")


def overlap_bars(layers: Sequence[Mapping[str, Any]]) -> str:
    """A bar a layer: the Jaccard index of two topologies; a marker where chance would put it."""
    with style():
        figure = canvas(0.7 + 0.17 * len(layers))
        axes = figure.subplots()
        places = range(len(layers))
        axes.barh(places, [layer["jaccard"] for layer in layers], **fill(0), height=0.7, label="Jaccard index")
        axes.plot([layer["chance"] for layer in layers], places, linestyle="", **dots(1), label="two random topologies of this density")
        axes.set_yticks(places, [layer_label(layer["name"]) for layer in layers], fontsize=7)
        axes.set(xlim=(0, 1.02), ylim=(len(layers) - 0.5, -0.5), xlabel="live in both / live in any")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=1)
        return svg(figure, "Overlap of two topologies, layer by layer")


def layer_label(name: str) -> str:
    """``transformer.h.0.mlp.c_fc.weight`` -> ``h.0.mlp.c_fc``."""
    return short(name.removesuffix(".weight").removeprefix("transformer.").removeprefix("model."), 30)


def lines_by_sparsity(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    unit: Mapping[str, str],
    label: str,
    of: str = "the pre-trained model",
) -> str:
    """A panel a key of `panels`: lines over the sparsity in per cent.

    Args:
        panels: title -> name of a line -> its points (sparsity, value).
        unit: title -> label of the vertical axis.
        of: whose sparsity it is.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    with style():
        figure = canvas(0.6 + 1.9 * len(panels) + 0.18 * len(names))
        for axes, (title, lines) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
            for name, points in lines.items():
                i = names.index(name)
                axes.plot([100 * x for x, _ in sorted(points)], [y for _, y in sorted(points)], **(stroke(i) | dots(i)), label=short(name))
            axes.set(title=short(title, 60), xlabel=f"sparsity of {of} (%)", ylabel=unit[title])
            axes.margins(x=0.08, y=0.15)
        found = {text: handle for axes in figure.axes for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=1)
        return svg(figure, label)
