"""How pictures are drawn: SVG text for one page, light or dark, in colour or without.

Text stays text and takes the page's colour and font (``currentColor``); backgrounds are clear. Series differ in dash, marker
or hatch as well as in colour (Okabe-Ito, of which four keep 3:1 on white and on black). `svg` gives an ``<svg>`` element
without scripts, links or a fixed size, with ids that no other picture of the page shares.
"""

import hashlib
import html
import io
import math
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

INK = "#0a0b0c"  # stands for currentColor: matplotlib wants a number
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_DASHES = ("solid", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
_MARKERS = ("o", "s", "^", "D")
_HATCHES = ("", "////", "....", "xxxx")
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "raysparse",
    "text.parse_math": False,
    "font.size": 9,
    "hatch.linewidth": 0.6,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
}
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")  # no formulas: text stays text
_WIDTH = 4.6  # inches; a picture fills a telephone's width without shrinking its text much


def stroke(i: int) -> dict[str, Any]:
    """The line of the i-th run; 16 differ."""
    return {"color": COLOURS[i % 4], "linestyle": _DASHES[_turn(i)], "linewidth": 1.2}


def dots(i: int) -> dict[str, Any]:
    """The markers of the i-th run."""
    return {"color": COLOURS[i % 4], "marker": _MARKERS[_turn(i)], "markersize": 4}


def fill(i: int) -> dict[str, Any]:
    """The bars of the i-th run."""
    return {"facecolor": COLOURS[i % 4], "hatch": _HATCHES[_turn(i)], "edgecolor": INK, "linewidth": 0.4}


def _turn(i: int) -> int:
    """Of the dashes, markers or hatches the one for the i-th run: each time that the colours start again it is another."""
    return (i + i // 4) % 4


def smoothed(points: Sequence[tuple[float, float]], at_most: int = 400) -> list[tuple[float, float]]:
    """Mean of the last 2 % of all records up to each, at ``at_most`` places."""
    window, every = max(1, len(points) // 50), max(1, math.ceil(len(points) / at_most))
    means = []
    for end in range(len(points), 0, -every):
        last = [y for _, y in points[max(0, end - window) : end]]
        means.append((points[end - 1][0], sum(last) / len(last)))
    return means[::-1]


def times_ten(power: int) -> str:
    """``×10⁻³``, for the label of an axis."""
    return f"×10{str(power).translate(_RAISED)}"


def tokens_unit(tokens: Sequence[float]) -> tuple[float, str]:
    """What to divide tokens by for an axis, and its name."""
    most = max(tokens, default=1)
    for scale, unit in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if most >= scale:
            return scale, unit
    return 1, "count"


def short(text: str, length: int = 34) -> str:
    """A name as a label: one line, no longer than it can be read, never starting with the ``_`` that hides it in legends."""
    text = " ".join("".join(letter if letter.isprintable() else "?" for letter in text).split())
    text = text if len(text) <= length else f"{text[: length // 2]}…{text[1 - length // 2 :]}"
    return f" {text}" if text.startswith("_") else text


@contextmanager
def style() -> Generator[None]:
    """Everything is drawn inside this."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def canvas(height: float) -> Any:
    """An empty figure as wide as all others; height in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained")


def svg(figure: Any, label: str) -> str:
    """The figure as one ``<svg>`` element to stand inside a page."""
    with io.StringIO() as file:
        figure.savefig(file, format="svg", transparent=True)
        text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'font-family: [^;"]*', "font-family: system-ui, sans-serif", text)
    text = re.sub(INK, "currentColor", text, flags=re.IGNORECASE)
    mark = "p" + hashlib.sha256(text.encode()).hexdigest()[:8]
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{mark}-", text)
    size = re.search(r'viewBox="[^"]*"', text)
    assert size is not None
    opening = f'<svg {size[0]} xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img"'
    return re.sub(r"<svg[^>]*>", lambda _: f'{opening} aria-label="{html.escape(label)}">', text, count=1)
