"""The page of a search: what is read, what is computed, and what the page says of it."""

import csv
import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from raysparse.__main__ import main
from raysparse.config import ConfigError
from raysparse.report.drawing import dots, fill, stroke
from raysparse.report.search import read_search
from raysparse.report.search_page import read_report, write_report
from raysparse.report.search_plots import learning_curves, pareto_panels
from raysparse.report.search_statistics import finding, importance, labels, pareto, settings_text, spread

RIGHT = ["one fish", "two fish", "red fish", "blue fish"]


def append(folder, **changes):
    """The last line of trials.jsonl once more, with changes."""
    file = folder / "trials.jsonl"
    record = json.loads(file.read_text().splitlines()[-1]) | changes
    file.write_text(file.read_text() + json.dumps(record) + "\n")


def test_cells_are_in_order_of_task_then_sparsity(write_search):
    places = [("b", 0.5), ("a", 0.75), ("b", 0.0), ("a", 0.0), ("a", 0.75)]
    search = read_search(write_search([{"task": task, "sparsity": sparsity, "seed": i} for i, (task, sparsity) in enumerate(places)]))
    told = [(cell.task, cell.sparsity, cell.dense, [trial.seed for trial in cell.trials]) for cell in search.cells]
    # the order of tasks in search.yaml, here b before a by yaml's sorted keys: a, b
    assert told == [("a", 0.0, True, [3]), ("a", 0.75, False, [1, 4]), ("b", 0.0, True, [2]), ("b", 0.5, False, [0])]
    assert (search.name, search.tolerance, search.tasks) == ("demo", 0.5, ("a", "b"))
    assert [cell.sparsity for cell in search.of("b")] == [0.0, 0.5]
    trial = search.cells[1].trials[0]
    assert (trial.counted, trial.seconds, trial.steps) == (2 * 1e12 - 0.375e12, 200.0, 20)
    assert trial.validation == ((10, 3.5), (20, 3.25))


def test_the_best_settings_have_the_best_mean_then_most_seeds(write_search):
    a, b, c = ({"optimizer.lr": lr} for lr in (1e-3, 1e-4, 1e-5))
    trials = [
        {"params": a, "seed": 1, "objective": 2.0},
        {"params": a, "seed": 0, "objective": 3.0},  # mean 2.5
        {"params": b, "seed": 0, "objective": 2.3},
        {"params": b, "seed": 1, "objective": 2.5},  # mean 2.4
        {"params": c, "seed": 0, "objective": 2.4},  # one seed alone
        {"params": c, "seed": 1, "objective": 1.0, "status": "stopped"},
    ]
    (cell,) = read_search(write_search(trials)).cells
    assert cell.best == b
    assert [(trial.seed, trial.objective) for trial in cell.chosen] == [(0, 2.3), (1, 2.5)]
    higher = [trial | {"lower_is_better": False, "metric": "bleu"} for trial in trials]
    assert read_search(write_search(higher, folder="higher")).cells[0].best == a
    nan = [{"params": a, "objective": float("nan")}, {"params": b, "objective": 9.0}, {"params": c, "objective": None}]
    assert read_search(write_search(nan, folder="nan")).cells[0].best == b


def test_a_search_that_goes_on_can_be_read(write_search):
    folder = write_search([{"status": "failed", "error": "out of memory", "objective": None}, {"status": "stopped", "seed": 1}])
    (cell,) = read_search(folder).cells
    assert (cell.best, cell.chosen, cell.sparsity) == (None, (), 0.0)
    failed, stopped = cell.trials
    assert (failed.validation, failed.steps, failed.counted, failed.error) == ((), None, None, "out of memory")
    assert (stopped.validation, stopped.steps) == (((5, 3.5),), 5)  # the half line after it was being written
    (folder / "trials.jsonl").unlink()
    assert read_search(folder).cells == ()


def test_of_several_lines_of_one_trial_the_last_wins(write_search):
    folder = write_search([{"objective": 2.0}])
    append(folder, objective=1.5)
    assert [trial.objective for trial in read_search(folder).trials] == [1.5]


def test_a_parent_is_found_from_the_folder_of_the_search(write_search, tmp_path, monkeypatch):
    folder = write_search([{"sparsity": 0.5}])
    append(folder, parent="pretrain-0.5", model={})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (cell,) = read_search(folder).cells
    assert cell.sparsity == 0.5
    append(folder, parent="nowhere", model={"sparsity.target": 0.25})
    (cell,) = read_search(folder).cells
    assert (cell.sparsity, cell.trials[0].counted) == (0.25, None)
    append(folder, parent=None, model=None)
    (cell,) = read_search(folder).cells
    assert (cell.sparsity, cell.trials[0].counted) == (0.0, 1e12)  # of its own run: nothing else is known


def test_errors_of_reading(write_search, tmp_path):
    with pytest.raises(ConfigError, match=r"Expected a search in .*nowhere. Got no search.yaml there. Name a folder"):
        read_search(tmp_path / "nowhere")
    folder = write_search([{}])
    lines = (folder / "trials.jsonl").read_text()
    for line, message in (
        ("{", "JSON object in line 2 of .*trials.jsonl"),
        ('{"folder": "x"}', r"in line 2 of .*trials.jsonl. Got:\n  status: expected str, got nothing\n  task: expected str or null, got"),
        (lines.replace('"seed": 0', '"seed": true').strip(), "seed: expected int, got True"),
        (lines.replace('"finished"', '"done"').strip(), "status finished, stopped, failed in line 2 .* Got 'done'"),
    ):
        (folder / "trials.jsonl").write_text(lines + line + "\n")
        with pytest.raises(ConfigError, match=message):
            read_search(folder)
    (folder / "trials.jsonl").write_text(lines)
    (folder / "trials" / "t0" / "summary.json").unlink()
    with pytest.raises(ConfigError, match=r"run of a finished trial in .*t0. Got no summary.json there. Restore"):
        read_search(folder)
    bad = write_search([{}], folder="bad", tolerance="much", seeds=None)
    with pytest.raises(ConfigError, match=r"seeds: expected list, got None\n  tolerance: expected int or float, got 'much'"):
        read_search(bad)


def seeds(sparsity, *scores, metric="bleu", hypotheses=None, **more):
    """A trial a score, with one setting and the seeds 0, 1, ..."""
    each = hypotheses or [None] * len(scores)
    told = {"sparsity": sparsity, "objective": 2 + sparsity, **more}
    return [told | {"seed": i, "scores": {metric: score}, "hypotheses": each[i]} for i, score in enumerate(scores)]


THREE = [*seeds(0.0, 30.0, 31.0), *seeds(0.5, 30.2, 30.4), *seeds(0.75, 29.0, 28.0)]


def found(folder, tolerance=0.5, task="docstrings"):
    return finding(read_search(folder), task, tolerance)


def test_mean_and_sample_deviation():
    assert spread([30.0, 31.0]).text() == "30.50 ± 0.71"
    assert spread([1.0, 2.0, 6.0]).deviation == pytest.approx(7**0.5)
    assert (spread([30.0]).text(), spread([30.0]).deviation) == ("30.00", None)


@pytest.mark.parametrize(("tolerance", "label", "times"), [(0.1, "dense", None), (0.5, "50 %", 2 / 1.75), (2.0, "75 %", 2 / 1.625)])
def test_recommended_is_the_cheapest_within_the_tolerance(write_search, tolerance, label, times):
    told = found(write_search(THREE), tolerance)
    dense, half, most = told.results
    assert dense.scores["bleu"].mean == 30.5
    assert (half.judged.loss, most.judged.loss) == (pytest.approx(0.2), pytest.approx(2.0))
    assert (dense.counted, half.counted, most.counted) == (2e12, 1.75e12, 1.625e12)  # parent 1e12 (1 - sparsity / 2), own 1e12
    assert (dense.seconds, dense.judged, dense.reduction) == (200.0, None, None)
    assert told.recommended.label == label
    assert told.recommended.reduction == (times and pytest.approx(times))


def test_confidence_over_seeds_alone(write_search):
    half = found(write_search(THREE)).results[1].judged
    # dense mean 30, 30.5, 31 in 1, 2, 1 of 4 draws; sparse 30.2 to 30.4: more than 0.5 is lost where dense draws 31 twice
    assert half.confidence == pytest.approx(0.75, abs=0.05)  # 1000 resamples: 3.6 standard errors
    assert half.basis == "seeds alone"
    assert half.difference.within_noise is True


def test_confidence_over_examples(write_search):
    wrong = [*RIGHT[:3], "no"]
    trials = [*seeds(0.0, 100.0, metric="exact_match", hypotheses=[RIGHT]), *seeds(0.5, 75.0, metric="exact_match", hypotheses=[wrong])]
    judged = found(write_search(trials), 25.0).results[1].judged
    assert judged.confidence == pytest.approx(0.75**4 + 4 * 0.25 * 0.75**3, abs=0.05)  # the wrong example drawn at most once
    assert (judged.basis, judged.loss) == ("test examples alone", 25.0)


def test_examples_are_paired_over_systems_and_seeds_drawn_too(write_search):
    wrong = [*RIGHT[:3], "no"]
    same = [seeds(sparsity, 75.0, 75.0, metric="exact_match", hypotheses=[wrong] * 2) for sparsity in (0.0, 0.5)]
    judged = found(write_search([trial for of in same for trial in of]), 0.0).results[1].judged
    assert (judged.confidence, judged.difference.low, judged.difference.high) == (1.0, 0.0, 0.0)
    assert judged.basis == "seeds and test examples"
    mixed = [*same[0], *seeds(0.5, 75.0, 100.0, metric="exact_match", hypotheses=[wrong, RIGHT])]
    judged = found(write_search(mixed, folder="mixed"), 0.0).results[1].judged
    assert judged.difference.high > 12.5  # both seeds the better one, and the example more than once
    assert judged.confidence == 1.0


def test_without_seeds_and_predictions_nothing_is_judged(write_search):
    trials = [*seeds(0.0, 100.0, metric="exact_match", hypotheses=[RIGHT]), *seeds(0.5, 99.9, metric="exact_match")]
    folder = write_search(trials, seeds=[0])
    judged = found(folder).results[1].judged
    assert (judged.confidence, judged.basis, judged.difference.within_noise) == (None, "", None)
    assert judged.loss == pytest.approx(0.1)
    answer = read_report(folder).answers[0]
    assert "50 %, 1.14x fewer FLOPs, confidence not judged" in answer


def test_predictions_of_another_split_are_refused(write_search):
    one = [*seeds(0.0, 100.0, metric="exact_match", hypotheses=[RIGHT]), *seeds(0.5, 50.0, metric="exact_match", hypotheses=[RIGHT])]
    with pytest.raises(ConfigError, match=r"Expected the exact_match 50.00 of trials/t1 from its predictions. Got 100.00"):
        found(write_search(one))


def test_where_lower_is_better_a_rise_is_the_loss(write_search):
    trials = [*seeds(0.0, 10.0, 10.0, metric="perplexity"), *seeds(0.5, 10.4, 10.4, metric="perplexity")]
    trials += [*seeds(0.75, 11.0, 11.0, metric="perplexity"), *seeds(0.9, 8.0, 8.0, metric="perplexity")]
    told = found(write_search(trials))
    assert [result.judged and round(result.judged.loss, 9) for result in told.results] == [None, 0.4, 1.0, -2.0]
    assert [result.judged and result.judged.confidence for result in told.results] == [None, 1.0, 0.0, 1.0]
    assert (told.recommended.label, told.lower_is_better) == ("90 %", True)
    report = read_report(write_search(trials[:6], folder="other"))
    assert report.answers[0].startswith("docstrings: at most 0.5 perplexity above dense: 50 %, 1.14x fewer FLOPs, confidence above 99 %.")
    assert any("75 % is worse than dense: +1.00 perplexity (more than noise)" in line for line in report.facts["negative"])


def test_without_dense_nothing_is_compared(write_search):
    report = read_report(write_search([*seeds(0.5, 30.0, 30.0), *seeds(0.75, 31.0, 31.0)]))
    assert report.findings[0].recommended is None
    assert "nothing can be compared, for no dense trial (sparsity 0) finished. Best on the validation split: 50 %" in report.answers[0]
    only = read_report(write_search(seeds(0.0, 30.0), folder="only"))
    assert "nothing can be compared, for only dense trials finished" in only.answers[0]


def test_dense_is_recommended_plainly(write_search):
    report = read_report(write_search(THREE), 0.1)
    assert "docstrings: nothing sparse is within 0.1 bleu of dense: dense is recommended, 30.50 ± 0.71" in report.answers[0]
    assert "The nearest is 50 %, 0.20 worse." in report.answers[0]
    costly = [trial | {"changes": {"flops__counted": 9e12}} if trial["sparsity"] else trial for trial in THREE[:4]]
    assert "50 % would do, but no fewer FLOPs are counted" in read_report(write_search(costly, folder="costly")).answers[0]


def test_pareto_front():
    points = [(1, 5), (2, 6), (3, 6), (3, 7), (1, 4)]
    assert pareto(points, lower=False) == [0, 1, 3]
    assert pareto(points, lower=True) == [4]
    assert pareto([], lower=True) == []


def test_importance_by_hand(write_search):
    values = [("a", 0.0, 1.0), ("b", 0.0, 2.0), ("a", 0.5, 3.0), ("b", 0.5, 4.0)]
    trials = [{"params": {"x": x, "fixed": 1}, "sparsity": sparsity, "objective": y} for x, sparsity, y in values]
    shares = importance(read_search(write_search(trials)).cells)
    # mean 2.5, total 5; by sparsity 1.5 and 3.5: 4 of 5; by x 2 and 3: 1 of 5
    assert shares == {"sparsity": (pytest.approx(0.8), pytest.approx(1 / 3)), "x": (pytest.approx(0.2), pytest.approx(1 / 3))}
    assert importance(read_search(write_search(trials[:3], folder="few")).cells) == {}
    equal = [trial | {"objective": 1.0} for trial in trials]
    assert importance(read_search(write_search(equal, folder="equal")).cells) == {}


def test_many_numbers_are_cut_into_quartiles(write_search):
    trials = [{"params": {"lr": k / 10, "flag": bool(k % 2)}, "objective": float((k - 1) // 2 % 2)} for k in range(1, 9)]
    shares = importance(read_search(write_search(trials)).cells)
    assert shares["lr"] == (pytest.approx(1.0), pytest.approx(3 / 7))  # 1 2 | 3 4 | 5 6 | 7 8
    assert shares["flag"] == (pytest.approx(0.0), pytest.approx(1 / 7))


def test_labels_tell_cells_apart(write_search):
    trials = [{"sparsity": 0.5, "model": {"sparsity.target": 0.5, "sparsity.distribution.type": kind}} for kind in ("er", "uniform")]
    cells = read_search(write_search([*trials, {"sparsity": 0.0}])).cells
    assert labels(cells) == ["dense", "50 %, type=er", "50 %, type=uniform"]
    assert settings_text({"a.lr": 1e-4, "b.lr": 2, "c.on": True}) == "a.lr=0.0001, b.lr=2, on=true"


def test_pruned_models(write_search, tmp_path):
    """Of a pruning no FLOPs are counted; the dense cell starts from the model that was pruned, which costs nobody anything."""
    trials = []
    for sparsity, method in ((0.0, None), (0.5, "wanda"), (0.5, "sparsegpt")):
        model = {"sparsity.target": sparsity} | ({"method.type": method} if method else {})
        parent = str(tmp_path / f"pruned-{method}") if method else None
        changes = {"flops__counted": 1e12 * (1 - sparsity / 2), "sparsity__target": sparsity}
        trials += [trial | {"model": model, "parent": parent, "changes": changes} for trial in seeds(sparsity, 30.0, 30.2)]
        if method:
            (tmp_path / f"pruned-{method}").mkdir()
            summary = {"verb": "prune", "sparsity": {"target": sparsity}, "seconds": 7.0}
            (tmp_path / f"pruned-{method}" / "summary.json").write_text(json.dumps(summary))
    prune = {"files": ["prune.yaml"], "space": {"sparsity.target": {"choice": [0, 0.5]}}}
    facts = write_report(folder := write_search(trials, pretrain=None, prune=prune))
    cells = facts["tasks"][0]["cells"]
    assert [cell["label"] for cell in cells] == ["dense", "50 %, type=wanda", "50 %, type=sparsegpt"]
    assert [(cell["counted_flops"], cell["seconds"]) for cell in cells] == [(1e12, 100.0), (0.75e12, 107.0), (0.75e12, 107.0)]
    assert "prune.method.type" in facts["tasks"][0]["importance"]
    page = (folder / "report.html").read_text()
    assert "What trained the model that was pruned is in neither" in page
    assert "whose config.yaml tells how that was pruned" in page
    assert "| pruning | sparsity.target | choice: 0, 0.5 |" in (folder / "report.md").read_text()
    assert {row["prune.method.type"] for row in table(folder)} == {"", "wanda", "sparsegpt"}


def test_sixteen_cells_look_different(write_search):
    for look in (stroke, dots, fill):
        assert len({str(look(i)) for i in range(16)}) == 16
    trials = [trial for k in range(6) for trial in seeds(k / 10, 30.0 - k, 31.0 - k)]
    search = read_search(write_search(trials))
    picture = pareto_panels(finding(search, "docstrings", 0.5), search.cells, "bleu")
    words = " ".join(re.findall("<text[^>]*>([^<]*)</text>", picture))
    for text in ("dense", "10 %", "50 %", "counted FLOPs, end to end (×10¹²)", "measured seconds, end to end", "bleu"):
        assert text in words
    assert "validation loss (nats)" in learning_curves(search.cells)


class _Reader(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.links = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]


def table(folder):
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


STOPPED = [{"sparsity": 0.5, "status": "stopped", "seed": 5}, {"status": "failed", "error": "no <memory>", "objective": None, "seed": 6}]
SCENARIOS = {
    "three": (THREE, {}),
    "several tasks": ([*THREE, *(trial | {"task": "e2e", "scores": {"ter": 30.0}} for trial in THREE[:4])], {}),
    "one seed": (THREE[::2], {"seeds": [0]}),
    "failed and stopped": ([*THREE, *STOPPED, {"sparsity": 0.9, "status": "failed", "objective": None}], {}),
    "no dense": (THREE[2:], {}),
    "no tasks": ([trial | {"task": None, "changes": {"loss__validation": trial["objective"]}} for trial in THREE], {"pretrain": None}),
    "many cells": ([trial for k in range(7) for trial in seeds(k / 10, 30.0 - k, 31.0 - k)], {}),
    "lower is better": ([*seeds(0.0, 10.0, 10.1, metric="ter"), *seeds(0.5, 10.4, 10.5, metric="ter")], {}),
    "no parents": ([trial | {"parent": None} for trial in THREE], {"pretrain": None}),
    "parents lost": ([trial | {"parent": "lost"} for trial in THREE], {}),
    "no settings": ([trial | {"params": {}} for trial in THREE], {}),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_page_is_complete(name, write_search):
    trials, config = SCENARIOS[name]
    folder = write_search(trials, **config)
    facts = write_report(folder)
    json.dumps(facts, allow_nan=False)
    page, markdown = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    tasks = len({trial.get("task", "docstrings") for trial in trials})
    told = _Reader(page)
    assert not {"script", "link", "img", "iframe", "memory"} & set(told.tags)
    assert [link for link in told.links if not link.startswith("#")] == []
    assert told.tags.count("svg") == (3 if len(trials) > 3 else 2) * tasks
    assert told.tags.count("table") == tasks + (tasks > 1) + 2
    for heading in ("What was searched", "What did not work", "How to reproduce"):
        assert f"<h2>{heading}</h2>" in page
        assert f"## {heading}\n" in markdown
    assert page.index('class="question"') < page.index('class="answer"') < page.index("<table>") < page.index("<svg")
    assert page.count('class="answer"') == tasks == len(facts["answers"])
    assert not re.search(r"\bnan\b", page)
    assert "None" not in page
    rows = table(folder)
    assert len(rows) == len(trials)
    assert {row["command"] for row in rows} == {trial.command for trial in read_search(folder).trials}
    assert sum(path.is_dir() for path in (folder / "tensorboard").iterdir()) == len(trials)
    for told in facts["tasks"]:
        assert told["winner"]["command"] in page
        assert told["winner"]["command"] in markdown


def test_the_page_tells_failures_and_what_did_not_work(write_search):
    trials, config = SCENARIOS["failed and stopped"]
    folder = write_search(trials, **config)
    negative = "\n".join(write_report(folder)["negative"])
    for text in (
        "1 of 9 trials (11 %) were stopped early (asha (grace=10))",
        "2 of 9 trials failed",
        "docstrings, 90 %: no trial finished, of 1.",
        "75 % is worse than dense: -2.00 bleu (more than noise)",
        "50 % 200 s (1.00x), 75 % 200 s (1.00x) against 200 s dense: the zeros saved no time here",
    ):
        assert text in negative
    assert "50 % is worse" not in negative  # within noise
    page = (folder / "report.html").read_text()
    assert "trials/t7 (docstrings, dense, lr=0.001, seed 6): no &lt;memory&gt;" in page
    assert "9: 6 finished, 1 stopped, 2 failed" in page
    few = write_report(write_search([*THREE[:3]], folder="few"))["negative"]
    assert any("50 %: too few seeds, the chosen settings finished with 1 of 2 seeds" in line for line in few)


def test_few_seeds_look_too_certain(write_search):
    many = [trial for sparsity in (0.0, 0.5) for trial in seeds(sparsity, *(30.0 + k / 10 for k in range(5)))]
    assert "Resamples of 2 seeds hold no others" in read_report(write_search(THREE)).terminal()
    assert "hold no others" not in read_report(write_search(many, folder="many")).terminal()


def test_zeros_that_kernels_skipped_may_save_time(write_search):
    fast = [trial | {"changes": {"seconds": 50.0} if trial["sparsity"] else {}} for trial in THREE[:4]]
    assert any(
        "(0.75x)" in line and "dense kernels multiply every zero" in line for line in read_report(write_search(fast)).facts["negative"]
    )
    skipping = [trial | {"changes": {"seconds": 50.0, "flops__executed": 0.5e12} if trial["sparsity"] else {}} for trial in THREE[:4]]
    assert not any("against 200 s" in line for line in read_report(write_search(skipping, folder="skipping")).facts["negative"])


def test_no_better_than_the_baseline_is_said(write_search, edit_summary):
    folder = write_search(THREE)
    for trial in read_search(folder).trials:
        edit_summary(folder / trial.folder, task__baseline={"bleu": 29.0})
    negative = read_report(folder).facts["negative"]
    assert "docstrings, 75 % is no better than the task's baseline by bleu: 28.50 against 29.00." in negative
    assert not any("50 % is no better" in line for line in negative)


def test_the_winner_can_be_made_again(write_search):
    trials = [*seeds(0.0, 30.0, 31.0), *seeds(0.5, 30.2, 30.4)]
    trials[3] |= {"objective": 1.5, "exported": True}  # of the chosen settings the seed that validates best
    folder = write_search(trials)
    winner = write_report(folder)["tasks"][0]["winner"]
    assert winner == {"trial": "trials/t3", "command": "raysparse finetune docstrings.yaml run.name=t3", "export": None}
    assert "no longer there" in (folder / "report.html").read_text()
    (folder / "trials" / "t3" / "export").mkdir()
    assert write_report(folder)["tasks"][0]["winner"]["export"] == str(folder / "trials" / "t3" / "export")
    assert f"Its exported model: {folder / 'trials' / 't3' / 'export'}" in (folder / "report.html").read_text()


def test_results_csv_holds_every_number(write_search):
    folder = write_search([{"sparsity": 0.5, "seed": 1}, {"task": "e2e", "status": "stopped", "params": {"x": [1]}}])
    write_report(folder)
    one, two = table(folder)
    assert one == {
        "trial": "trials/t0", "task": "docstrings", "sparsity": "0.5", "pretrain.sparsity.target": "0.5", "optimizer.lr": "0.001", "x": "",
        "seed": "1", "status": "finished", "objective": "2.0", "test_bleu": "30.0", "counted_flops_end_to_end": "1750000000000.0",
        "seconds_end_to_end": "200.0", "steps": "20", "command": "raysparse finetune docstrings.yaml run.name=t0",
    }  # fmt: skip
    assert (two["status"], two["test_bleu"], two["steps"], two["x"], two["counted_flops_end_to_end"]) == ("stopped", "", "5", "[1]", "")


def test_tensorboard_is_not_doubled(write_search):
    folder = write_search(THREE[:2])
    write_report(folder)
    write_report(folder)
    files = sorted(path for path in (folder / "tensorboard").rglob("events.*") if path.parent.name != "tensorboard")
    assert [path.parent.name for path in files] == ["t0", "t1"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(files[1].parent))
    events.Reload()
    assert {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]} == {
        "test/bleu": 31.0, "objective": 2.0, "counted_flops": pytest.approx(2e12), "seconds": 200.0,
    }  # fmt: skip


NASTY = '<script>alert("x")</script> | *a* _b_ `c`'


def test_nasty_names_are_escaped(write_search):
    trials = [trial | {"task": NASTY, "params": {NASTY: NASTY}} for trial in THREE[:4]]
    trials.append({"task": NASTY, "status": "failed", "objective": None, "error": NASTY + "\n" + NASTY, "params": {NASTY: 1}})
    folder = write_search(trials, run={"name": NASTY})
    write_report(folder)
    page, markdown = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert not {"script", "img"} & set(_Reader(page).tags)
    outside = "\n".join(line for line in markdown.splitlines() if not line.startswith("    "))
    assert "<script>" not in outside
    rows = [line.replace("\\|", "") for line in outside.splitlines() if line.startswith("|")]
    assert rows
    for above, row in pairwise(rows):
        assert row.count("|") == above.count("|") or row.startswith(("| of", "| what", "| parameter"))


def test_errors_of_reporting(write_search, tmp_path):
    with pytest.raises(
        ConfigError, match=r"finished trial with an objective in .*Got 0 finished, 0 stopped, 1 failed.\n  trials/t0.*: boom"
    ):
        read_report(write_search([{"status": "failed", "objective": None, "error": "boom"}]))
    folder = write_search(THREE, folder="good")
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="Expected a tolerance of 0 or more"):
            read_report(folder, bad)


def test_the_verb(write_search, capsys):
    folder = write_search(THREE)
    assert main(["report", str(folder)]) == 0
    told = capsys.readouterr()
    assert "docstrings: at most 0.5 bleu below dense: 50 %, 1.14x fewer FLOPs, confidence 7" in " ".join(told.out.split())
    assert "30.30 ± 0.14" in told.out
    assert max(map(len, told.out.splitlines())) <= 110
    assert f"written: {folder / 'report.html'}" in told.err
    assert main(["report", str(folder), "--tolerance", "2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["tolerance"], facts["tasks"][0]["recommended"]) == (2.0, "75 %")
    assert facts["tasks"][0]["cells"][1]["scores"]["bleu"]["mean"] == pytest.approx(30.3)
    assert main(["report", str(folder), "another"]) == 2
    assert "Expected one SEARCH_DIR. Got 2" in capsys.readouterr().err
    assert main(["report", str(folder / "nowhere")]) == 2
