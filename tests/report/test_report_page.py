import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from raysparse.config import ConfigError
from raysparse.report import Run, read_run
from raysparse.report.budget import at_equal_flops, equal_flops_text
from raysparse.report.distance import cosine_distances, heat_map
from raysparse.report.evolving import attention, churn, density, phases, topology_curves
from raysparse.report.page import Notes, write_page
from raysparse.report.plots import cost_bars, distance_maps, flops_curves, layer_sparsity, loss_curves

NASTY = '<b>&"$_x^</b>'


def gpt2(folder: Path, seed: int, changes: dict[str, torch.Tensor] | None = None, layers: int = 2, files: int = 1) -> Path:
    """An exported GPT-2 of width 4 in one or more safetensors files."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"attn.c_attn": (4, 12), "attn.c_proj": (4, 4), "mlp.c_fc": (4, 16), "mlp.c_proj": (16, 4)}
    weights = {f"transformer.h.{i}.{m}.weight": torch.randn(s, generator=generator) for i in range(layers) for m, s in shapes.items()}
    weights |= {"transformer.wte.weight": torch.ones(7, 4), "transformer.h.0.ln_1.weight": torch.ones(4)}
    weights |= changes or {}
    folder.mkdir()
    if files == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    place = {name: f"model-{i % files}.safetensors" for i, name in enumerate(weights)}
    for file in set(place.values()):
        save_file({name: weights[name] for name in place if place[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {str(place).replace(chr(39), chr(34))}}}')
    return folder


def test_distances_by_hand_and_in_thirds(tmp_path):
    before = torch.zeros(2, 6)
    before[0] = 1.0
    after = before.clone()
    after[1, 2:4] = 1.0  # WK turns by 45 degrees
    after[0, 4:] = -3.0  # WV points the other way
    key = "transformer.h.0.attn.c_attn.weight"
    distances = cosine_distances(gpt2(tmp_path / "a", 0, {key: before}, layers=1), gpt2(tmp_path / "b", 0, {key: after}, layers=1))
    assert list(distances) == ["0.WQ", "0.WK", "0.WV", "0.WD", "0.WI", "0.WO"]
    assert distances["0.WQ"] == pytest.approx(0.0, abs=1e-15)
    assert distances["0.WK"] == pytest.approx(1 - math.sqrt(0.5), abs=1e-12)
    assert distances["0.WV"] == pytest.approx(2.0, abs=1e-12)


def test_distances_are_exact_in_bfloat16_and_over_several_files(tmp_path):
    name = "transformer.h.1.mlp.c_fc.weight"
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randn(4, 16, generator=generator).bfloat16() for _ in range(2))
    one = cosine_distances(gpt2(tmp_path / "a", 0, {name: a}), gpt2(tmp_path / "b", 1, {name: b}))
    two = cosine_distances(gpt2(tmp_path / "c", 0, {name: a}, files=3), gpt2(tmp_path / "d", 1, {name: b}, files=2))
    x, y = a.double().flatten(), b.double().flatten()
    assert one == two
    assert one["1.WI"] == pytest.approx(1 - (x @ y / x.norm() / y.norm()).item(), abs=1e-12)


def test_heat_map_orders_modules_and_layers():
    values = {f"{layer}.{module}": layer + i / 10 for layer in (10, 2) for i, module in enumerate(("WO", "mlp.gate_proj", "WQ"))}
    del values["2.WQ"]
    modules, layers, cells = heat_map(values)
    assert modules == ("WQ", "WO", "mlp.gate_proj")
    assert layers == (2, 10)
    assert cells == ((None, 10.2), (2.0, 10.0), (2.1, 10.1))


def test_distance_errors(tmp_path):
    good = gpt2(tmp_path / "good", 0)
    with pytest.raises(ConfigError, match=r"Expected model.safetensors in .*empty. Got none there"):
        cosine_distances(good, tmp_path / "empty")
    other = gpt2(tmp_path / "other", 0, {"transformer.h.1.mlp.c_fc.weight": torch.ones(4, 8)})
    with pytest.raises(ConfigError, match=r"Expected transformer.h.1.mlp.c_fc.weight with the same shape"):
        cosine_distances(good, other)
    dead = gpt2(tmp_path / "dead", 0, {"transformer.h.1.mlp.c_proj.weight": torch.zeros(16, 4)})
    with pytest.raises(ConfigError, match=r"Expected a weight 1.WO that is not all zero"):
        cosine_distances(good, dead)
    flat = gpt2(tmp_path / "flat", 0, layers=0)
    with pytest.raises(ConfigError, match="Expected weights of numbered blocks"):
        cosine_distances(flat, flat)


@pytest.fixture
def runs(write_run):
    folders = [
        write_run("dense"),
        write_run("sparse", sparsity=0.75, name=NASTY),
        write_run("fine", "finetune"),
        write_run("fine sparse", "finetune", parent=NASTY, task__scores={"bleu": 5.0}),
    ]
    return [read_run(folder) for folder in folders]


MAPS = {
    "dense": {f"{i}.W{m}": 0.001 * (i + 1) for i in range(2) for m in "QO"},
    "75 % <x>": {f"{i}.WQ": 0.004 for i in range(24)},
}


def text_of(svg: str) -> str:
    return " ".join("".join(element.itertext()) for element in ET.fromstring(svg).iter() if element.tag.endswith("text"))


def test_plots_are_well_formed_themed_and_labelled(runs):
    labels = {
        loss_curves(runs[:2]): ("tokens trained on (thousands)", "loss (nats per token)", NASTY, "unigram"),
        layer_sparsity(runs[:2]): ("zeros (%)", "sparse weights in order, by block", NASTY),
        flops_curves(runs[:2]): ("counted FLOPs (×10¹²)", "tokens trained on (thousands)", "loss (nats per token)", NASTY),
        distance_maps(MAPS): ("WQ", "WO", "75 % <x>", "layer", "cosine distance (×10⁻³)", "4.0", "2.0"),
        cost_bars(runs[:2]): ("wall-clock time (s)", "sent per rank (bytes)", "100 s", "12.3 MB"),
    }
    seen: set[str] = set()
    for svg, texts in labels.items():
        words = text_of(svg)
        assert [text for text in texts if text not in words] == []
        assert svg.startswith("<svg viewBox=")
        assert 'aria-label="' in svg
        assert "currentColor" in svg
        assert "<image" not in svg
        assert "#ffffff" not in re.sub(r"<text.*?</text>", "", svg, flags=re.DOTALL)  # clear on any page
        ids = re.findall(r'\bid="([^"]+)"', svg)
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) <= set(ids)
        assert not seen & set(ids)
        seen |= set(ids)


def test_heat_maps_share_one_scale_and_series_differ_without_colour(runs):
    def fills(*distances: float) -> list[str]:
        svg = distance_maps({str(i): {"0.WQ": distance} for i, distance in enumerate(distances)})
        return re.findall(r"fill: (#[0-9a-f]{6})", re.sub(r"<text.*?</text>", "", svg, flags=re.DOTALL))

    cells, apart = fills(0.002, 0.004), fills(0.002)
    assert cells[0] != cells[1]
    assert apart[0] == cells[1]  # alone, 0.002 is the top of the scale
    assert "stroke-dasharray" in loss_curves(runs[:2])
    assert "<pattern" in cost_bars(runs[:2])


def test_loss_curves_bear_a_run_that_diverged_or_logged_nothing(write_run):
    nan = read_run(write_run("nan", loss__validation=math.nan))
    nan.train[5]["loss"] = math.nan
    empty = write_run("empty")
    (empty / "metrics.jsonl").write_text("")
    assert "nan" in text_of(loss_curves([nan, read_run(empty)]))
    assert "tokens" in text_of(loss_curves([read_run(empty)]))


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]


def test_page_is_complete_escaped_and_asks_for_nothing(runs, tmp_path):
    path = tmp_path / "new" / "page.html"
    notes = Notes(question="Why <this>?", commands=("raysparse pretrain a&b",), negative=("It <did> not.",), remarks=("A TITLE & BODY.",))
    write_page(path, "T <i> BODY", runs, MAPS, notes)
    page = path.read_text()
    reader = _Reader()
    reader.feed(page)
    assert not {"script", "link", "img", "iframe", "b", "i", "this"} & set(reader.tags)
    assert reader.tags.count("svg") == 6
    assert [link for link in reader.links if not link.startswith("#")] == []
    assert "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []
    for text in (
        "<title>T &lt;i&gt; BODY</title>",
        "Why &lt;this&gt;?",
        "raysparse pretrain a&amp;b",
        "It &lt;did&gt; not.",
        "A TITLE &amp; BODY.",
    ):
        assert text in page
    for text in ("digest-of-dense", "feedc0de", "torch 2.13.0", "prefers-color-scheme: dark", "width=device-width"):
        assert text in page
    assert page.index("Why") < page.index('class="answer"') < page.index("<table>") < page.index("<svg") < page.index("How to reproduce")


def test_page_says_negative_results_plainly(runs, write_run, tmp_path):
    weak = read_run(write_run("weak", sparsity=0.9, loss__validation=6.0, tokens=1))
    lost = read_run(write_run("lost", model__parameters=2, sparsity=0.5, loss__validation=math.nan))
    write_page(tmp_path / "page.html", "t", [*runs, weak, lost], {}, Notes())
    page = (tmp_path / "page.html").read_text()
    negative = page[page.index("What did not work") : page.index("How to reproduce")]
    for text in (
        "the zeros saved no time here; the FLOPs above are counted",
        "weak has not learned more than word frequencies",
        "weak is worse than its dense twin dense: +3.0000 (noise not judged) nats a token",
        "lost diverged",
        "lost has no dense twin here",
        "fine sparse is no better than the baseline of e2e by bleu: 5.00 against 10.00",
        "fine sparse is worse than its dense pair fine: -55.00 (noise not judged) bleu",
    ):
        assert text in negative
    assert "fine is" not in negative
    assert "dense is" not in negative


def test_answer_holds_difference_and_reduction(runs, tmp_path):
    write_page(tmp_path / "page.html", "t", runs, {}, Notes())
    found = re.search(r'<p class="answer">(.*?)</p>', (tmp_path / "page.html").read_text())
    assert found is not None
    assert " at 75 % sparsity +0.7500 (noise not judged), 1.60x fewer" in found[1]
    assert "bleu on e2e against the dense pair, and counted FLOPs end to end: fine sparse (75 % → dense) -55.00" in found[1]
    assert "-55.00 (noise not judged), 1.23x fewer" in found[1]
    assert "the zeros saved no time here" in found[1]
    write_page(tmp_path / "page.html", "t", runs[:1], {}, Notes())
    assert "No run here has a dense twin" in (tmp_path / "page.html").read_text()


@pytest.fixture
def methods(write_run, write_mst, edit_metrics):
    """Dense, static as runs were before topologies evolved, and MST: 20 steps of 100 tokens."""
    static = write_run("static", sparsity=0.8)
    edit_metrics(static, lambda record: {key: value for key, value in record.items() if key not in ("phase", "attention_density")})
    return [read_run(folder) for folder in (write_run("dense"), static, write_mst("mst"))]


def test_curves_of_a_topology_are_exact(methods):
    dense, static, mst = methods
    #                       an update of step s, from 0, is felt after s + 1 steps
    assert density(mst) == [(0, 1.0), (400, pytest.approx(0.2)), (1000, pytest.approx(0.2)), (1800, 1.0), (2000, 1.0)]
    assert churn(mst) == [(400, 0.0), (1000, 0.25), (1800, 0.75)]
    assert phases(mst) == [("warm_up", 0, 500), ("ultra_sparsification", 500, 1500), ("restoration", 1500, 2000)]
    assert [share for _, share in attention(mst)] == [0.25] * 15 + [1.0] * 6
    assert [tokens for tokens, _ in attention(mst)][14:17] == [1400, 1500, 1600]
    assert [share for _, share in density(static)] == [pytest.approx(0.2)] * 21
    assert [share for _, share in density(dense)] == [1.0] * 21
    assert (churn(static), attention(static), phases(static)) == ([], [], [])
    assert phases(dense) == [("training", 0, 2000)]
    rare = Run(mst.summary, mst.train[9::10], history=mst.history)  # logged after steps 10 and 20; updates after 4, 10 and 18
    assert phases(rare) == [("warm_up", 0, 400), ("ultra_sparsification", 400, 1000), ("restoration", 1000, 2000)]


def test_topology_curves_show_what_happened_and_nothing_else(methods):
    words = text_of(topology_curves(methods))
    for text in ("live weights (%)", "churn (% of live)", "attention (% of full)", "ultra_sparsification", "mst", "static", "dense"):
        assert text in words
    static = text_of(topology_curves(methods[:2]))
    assert "live weights (%)" in static
    assert "churn" not in static
    assert "attention" not in static
    assert "training" not in static  # the only phase of a run is not worth a strip


def test_page_of_methods_has_every_plot(methods, tmp_path):
    write_page(tmp_path / "page.html", "t", methods, {}, Notes())
    page = (tmp_path / "page.html").read_text()
    labels = re.findall(r'<svg [^>]*aria-label="([^"]*)"', page)
    assert [label.split(" ")[0] for label in labels] == ["Training", "Counted", "Density,", "Sparsity", "Measured"]
    for text in (
        "Phases of mst: 1 warm_up, 2 ultra_sparsification, 3 restoration.",
        "mst at 80 % sparsity +0.8000 (noise not judged), 1.67x fewer (1.50x with the dense gradients of its 3 updates)",
        "mst changed nothing in 1 of 3 updates: a gradient was not finite.",
        "Validation loss at equal counted FLOPs (6.000e+11",
    ):
        assert text in page
    panels = next(text_of(svg) for svg in re.findall("<svg.*?</svg>", page, re.DOTALL) if "Sparsity of each" in svg)
    assert "static" in panels
    assert "mst" not in panels  # it ended dense: no zeros to show


def test_page_of_static_masks_says_nothing_of_evolution(methods, tmp_path):
    write_page(tmp_path / "page.html", "t", methods[:2], {}, Notes())
    page = (tmp_path / "page.html").read_text()
    for text in ("Density, churn", "updates", "Phases of"):
        assert text not in page


def test_the_lower_curve_at_equal_flops_wins(methods, write_run, edit_metrics):
    #  counted      1e12            0.6e12
    #  validated    after 10 and 20 steps of 20, 5 / step above the last loss
    budget, losses = at_equal_flops(methods)
    assert budget == pytest.approx(0.6e12)
    assert losses == {"dense": pytest.approx(3 + 0.5 - 0.25 * 0.2), "static": pytest.approx(3.8 + 0.25), "mst": pytest.approx(3.8 + 0.25)}
    assert next(iter(losses)) == "dense"
    folder = write_run("cheap", flops__counted=0.4e12)
    edit_metrics(folder, lambda record: record | ({"flops": 0.02e12 * record["step"]} if "loss" in record else {}))
    cheap = read_run(folder)
    assert at_equal_flops([methods[0], cheap]) == (0.4e12, {"cheap": 3.25})  # dense had not been validated by then
    assert equal_flops_text([methods[0], cheap]) is None


def test_runs_that_recorded_no_flops_are_left_out(write_run, edit_metrics, tmp_path):
    folders = [write_run("dense"), write_run("sparse", sparsity=0.5)]
    for folder in folders:
        edit_metrics(folder, lambda record: {key: record[key] for key in record if key not in ("flops", "sparsity", "phase")})
    runs = [read_run(folder) for folder in folders]
    assert equal_flops_text(runs) is None
    assert density(runs[1]) == []
    write_page(tmp_path / "page.html", "t", runs, {}, Notes())
    assert "Counted FLOPs over tokens" not in (tmp_path / "page.html").read_text()
