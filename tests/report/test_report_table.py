import json
import random
from html import escape

import pytest
from sacrebleu.metrics.bleu import BLEU

from raysparse.config import ConfigError
from raysparse.report import bytes_text, read_run
from raysparse.report.difference import Difference, loss_difference, paired_bootstrap
from raysparse.report.table import NO_TIME_SAVED, WIDTH, comparison, wall_clock

WORDS = ["a", "restaurant", "near", "the", "river", "serves", "cheap", "Italian", "food", "and", "is", "family", "friendly"]


def corpus(share: float, seed: int, n: int = 60) -> tuple[list[str], list[list[str]]]:
    """Outputs of which about ``share`` of the words are right, and two references each; the references ignore ``seed``."""
    texts, drawn = random.Random(0), random.Random(seed)
    references = [[" ".join(texts.choices(WORDS, k=12)) for _ in range(2)] for _ in range(n)]
    outputs = [" ".join(word if drawn.random() < share else "wrong" for word in pair[0].split()) for pair in references]
    return outputs, references


def bleu(outputs: list[str], references: list[list[str]]) -> float:
    return BLEU().corpus_score(outputs, [list(column) for column in zip(*references, strict=True)]).score


def test_bootstrap_difference_is_the_difference_of_corpus_scores():
    ours, references = corpus(0.9, 1)
    theirs, _ = corpus(0.7, 2)
    difference = paired_bootstrap("bleu", ours, theirs, references)
    assert difference.value == pytest.approx(bleu(ours, references) - bleu(theirs, references), abs=1e-9)
    assert difference.low is not None
    assert difference.high is not None
    assert difference.low < difference.value < difference.high
    assert difference.within_noise is False


def test_bootstrap_agrees_with_resampling_the_texts_themselves():
    ours, references = corpus(0.85, 1, 25)
    theirs, _ = corpus(0.8, 2, 25)
    difference = paired_bootstrap("bleu", ours, theirs, references, resamples=2000)
    drawn, slow = random.Random(3), []
    for _ in range(300):
        at = drawn.choices(range(25), k=25)
        pick = [references[i] for i in at]
        slow.append(bleu([ours[i] for i in at], pick) - bleu([theirs[i] for i in at], pick))
    slow.sort()
    spread = slow[292] - slow[7]
    assert difference.low == pytest.approx(slow[7], abs=0.15 * spread)  # 300 resamples know their 2.5 % point that well
    assert difference.high == pytest.approx(slow[292], abs=0.15 * spread)


def test_bootstrap_is_seeded_and_a_system_is_within_noise_of_itself_and_of_an_equal():
    ours, references = corpus(0.8, 1)
    equal, _ = corpus(0.8, 2)
    assert paired_bootstrap("bleu", ours, ours, references) == Difference(0.0, 0.0, 0.0)
    first = paired_bootstrap("bleu", ours, equal, references)
    assert first == paired_bootstrap("bleu", ours, equal, references)
    assert first != paired_bootstrap("bleu", ours, equal, references, seed=1)
    assert first.within_noise


def test_bootstrap_of_a_mean_over_examples():
    references = [["the cat"], ["a dog"], ["one bird"], ["two fish"]]
    ours, theirs = ["the cat", "a dog", "no", "no"], ["the cat", "no", "no", "no"]
    #               100       100       0     0        100        0     0     0
    judged = paired_bootstrap("exact_match", ours, theirs, references)
    assert judged.value == 25.0
    assert judged.low == 0.0
    assert 25.0 < judged.high <= 100.0
    assert paired_bootstrap("rouge_l", ours, theirs, references).value == 25.0


def test_bootstrap_wants_the_same_examples():
    with pytest.raises(ConfigError, match="Got 1, 2 and 1 references"):
        paired_bootstrap("bleu", ["a"], ["a", "b"], [["a"]])


def test_what_a_worker_sent_and_kept(write_run):
    """Of a step: 12.3 MB in 20 steps, 24.6 MB as whole buffers, 2.5 s in collectives."""
    block = comparison([read_run(write_run("sparse", sparsity=0.75))]).blocks[-1]
    assert block.title == "On the wire and in memory"
    assert dict(zip(block.columns, block.rows[0], strict=True)) == {
        "run": "sparse",
        "sent/step": "615.0 kB",
        "unpacked": "1.2 MB",
        "in comm.": "0.125 s",
        "weights": "4.0 kB",
        "gradients": "4.0 kB",
        "moments": "5.0 kB",
        "if dense": "8.0 kB",
        "peak": "4.0 MB",
    }


def test_pretraining_block_holds_what_the_summary_says(write_run):
    skipping = write_run("sparse", sparsity=0.75, flops__executed=7e11, seconds=62.0)
    runs = [read_run(skipping), read_run(write_run("masked", sparsity=0.75)), read_run(write_run("dense"))]
    block = comparison(runs).blocks[0]
    rows = [dict(zip(block.columns, row, strict=True)) for row in block.rows]
    assert [row["run"] for row in rows] == ["dense", "sparse", "masked", "unigram (train data)"]
    assert rows.pop(2)["speed"] == "", "no zero was skipped, so what differs is noise"
    assert rows[1] == {
        "run": "sparse",
        "sparsity": "75 %",
        "nnz": "308,642",
        "val. loss": "3.7500",
        "vs dense": "+0.7500 ?",
        "perplexity": "42.52",
        "FLOPs": "6.250e+11",
        "reduction": "1.60x",
        "without head": "2.50x",
        "seconds": "62",
        "speed": "1.6x",
        "tokens/s": "20",
        "sent/rank": "12.3 MB",
    }
    assert rows[0]["vs dense"] == ""
    assert rows[2]["val. loss"] == "5.0000"
    assert any("convention: spdf" in note for note in block.notes)
    assert any("noise not judged" in note for note in block.notes)


def test_an_evolving_topology_has_its_own_columns(write_run, write_mst):
    static = {"updates": 0, "skipped": 0, "explored": 0.2, "mean_density": 0.2, "mean_attention_density": 1.0}
    folders = [
        write_mst("mst"),
        write_run("static", sparsity=0.8, topology=static, flops__reduction_with_updates=1.67),
        write_run("old", sparsity=0.8),
        write_run("dense", topology={}),
    ]
    runs = [read_run(folder) for folder in folders]
    block = comparison(runs).blocks[0]
    rows = {row[0]: dict(zip(block.columns, row, strict=True)) for row in block.rows}
    assert list(rows) == ["dense", "mst", "static", "old", "unigram (train data)"]
    assert rows["mst"] == {
        "run": "mst",
        "nnz": "1,234,568",
        "density": "44.0 %",
        "attention": "43.8 %",
        "val. loss": "3.8000",
        "vs dense": "+0.8000 ?",
        "perplexity": "44.70",
        "FLOPs": "6.000e+11",
        "reduction": "1.67x",
        "with updates": "1.50x",
        "updates": "3",
        "explored": "97.5 %",
        "seconds": "100",
        "speed": "",
        "sent/rank": "12.3 MB",
    }
    told = ("density", "attention", "with updates", "updates", "explored")
    assert [rows["dense"][column] for column in told] == ["100.0 %", "100.0 %", "1.00x", "", ""]
    assert [rows["static"][column] for column in told] == ["20.0 %", "100.0 %", "1.67x", "0", "20.0 %"]
    assert [rows["old"][column] for column in told] == ["20.0 %", "100.0 %", "1.67x", "", ""]
    assert any("Validation loss at equal counted FLOPs" in note for note in block.notes)
    assert any("noise not judged" in note for note in block.notes)
    assert "without head" in comparison(runs[1:]).blocks[0].columns  # nothing evolves there
    assert max(map(len, comparison(runs).terminal().splitlines())) <= WIDTH


def test_sparse_attention_alone_is_an_evolution_too(write_run, edit_metrics):
    path = write_run("local")
    edit_metrics(path, lambda record: record | {"attention_density": 0.5 if record["step"] <= 10 else 1.0})
    run = read_run(path)
    assert (run.evolves, run.attention_density) == (True, 0.75)


@pytest.mark.parametrize(("error", "mark"), [(0.5, " ≈"), (0.01, "")])
def test_loss_difference_is_judged_by_the_standard_errors(write_run, error, mark):
    dense, sparse = (read_run(write_run(name, sparsity=s, loss__validation_stderr=error)) for name, s in (("dense", 0), ("sparse", 0.75)))
    assert loss_difference(sparse, dense).text(4) == "+0.7500" + mark
    assert loss_difference(sparse, dense).high == pytest.approx(0.75 + 1.96 * 2**0.5 * error)


def pair(write_run, write_predictions, ours: list[str], theirs: list[str], references: list[list[str]]) -> list:
    """Dense and sparse pre-training, and fine-tuning from both."""
    folders = [write_run("dense"), write_run("sparse", sparsity=0.75)]
    for parent, outputs in (("sparse", ours), ("dense", theirs)):
        scores = {"bleu": bleu(outputs, references), "ter": 30.0}
        folder = write_run(f"from {parent}", "finetune", parent=parent, task__scores=scores)
        write_predictions(folder, outputs, references)
        folders.append(folder)
    return [read_run(folder) for folder in folders]


def test_finetuning_block_compares_with_the_dense_pair_end_to_end(write_run, write_predictions):
    ours, references = corpus(0.8, 1)
    theirs, _ = corpus(0.8, 2)
    block = comparison(pair(write_run, write_predictions, ours, theirs, references)).blocks[1]
    rows = {row[0]: dict(zip(block.columns, row, strict=True)) for row in block.rows}
    assert rows["from sparse"]["path"] == "75 % → dense"
    assert rows["from dense"]["path"] == "dense → dense"
    assert rows["from sparse"]["vs dense"] == f"{bleu(ours, references) - bleu(theirs, references):+.2f} ≈"
    low, high = map(float, rows["from sparse"]["95 %"].split(" to "))
    assert low < bleu(ours, references) < high
    assert high - low < 20
    assert (rows["baseline"]["path"], rows["baseline"]["bleu"], rows["baseline"]["ter"]) == ("no model", "10.00", "–")
    assert rows["from sparse"]["ter"] == "30.00"
    assert rows["from sparse"]["FLOPs"] == "1.625e+12"  # (1 - 0.75 / 2) 1e12 + 1e12
    assert rows["from sparse"]["reduction"] == "1.23x"  # 2 / 1.625
    assert rows["from dense"]["reduction"] == "1.00x"
    assert rows["from dense"]["vs dense"] == ""


def test_a_difference_outside_noise_has_no_mark(write_run, write_predictions):
    ours, references = corpus(0.6, 1)
    theirs, _ = corpus(0.95, 2)
    cell = comparison(pair(write_run, write_predictions, ours, theirs, references)).blocks[1].rows[1][4]
    assert cell == f"{bleu(ours, references) - bleu(theirs, references):+.2f}"


def test_predictions_of_another_split_are_refused(write_run, write_predictions):
    ours, references = corpus(0.8, 1)
    runs = pair(write_run, write_predictions, ours, ours, references)
    other = write_run("from other", "finetune", parent="sparse")
    write_predictions(other, ours[::-1], references[::-1])
    with pytest.raises(ConfigError, match="predictions of from other and from dense for the same references"):
        comparison([*runs, read_run(other)])
    write_predictions(other, ours, references)
    with pytest.raises(ConfigError, match=r"Got \+0.00. predictions.jsonl belongs to another split or scorer"):
        comparison([*runs, read_run(other)])


def test_without_the_parent_nothing_is_said_end_to_end(write_run):
    block = comparison([read_run(write_run("alone", "finetune", parent="lost"))]).blocks[0]
    row = dict(zip(block.columns, block.rows[0], strict=True))
    assert (row["path"], row["FLOPs"], row["reduction"]) == ("? → dense", "–", "–")
    assert "not among these runs" in block.notes[-1]


@pytest.mark.parametrize(
    ("seconds", "executed", "saved"),
    [(120.0, 1.0, False), (95.0, 0.5, False), (94.0, 0.5, True), (94.0, 1.0, False)],
)
def test_wall_clock_says_plainly_that_nothing_was_saved(write_run, seconds, executed, saved):
    runs = [read_run(write_run("dense")), read_run(write_run("sparse", sparsity=0.75, seconds=seconds))]
    flops = runs[1].summary["flops"]
    flops["executed"] = executed * flops["dense"]
    sentence = wall_clock(runs)
    assert f"sparse took {seconds:.0f} s against 100 s dense ({seconds / 100:.2f}x)" in sentence
    assert (NO_TIME_SAVED in sentence) is not saved
    assert escape(sentence) in comparison(runs).html()


def test_wall_clock_is_not_judged_across_different_work(write_run):
    runs = [read_run(write_run("dense", workers=4)), read_run(write_run("sparse", sparsity=0.75))]
    assert "sparse: no dense twin of as many tokens and workers" in wall_clock(runs)
    assert "nothing to judge" in wall_clock(runs[:1])


def test_unequal_data_is_said(write_run):
    runs = [
        read_run(write_run("dense", tokens=1000)),
        read_run(write_run("sparse", sparsity=0.5, data__unigram_cross_entropy=4.0)),
    ]
    notes = comparison(runs).blocks[0].notes
    assert any("equally many tokens" in note for note in notes)
    assert any("not trained on the same data" in note for note in notes)
    assert not any("same data" in note or "equally" in note for note in comparison(runs[:1]).blocks[0].notes)


def test_the_dense_twin_is_the_best_one_of_the_same_model(write_run):
    runs = [
        read_run(write_run("other model", model__parameters=5, loss__validation=1.0)),
        read_run(write_run("dense a", loss__validation=3.2)),
        read_run(write_run("dense b", loss__validation=3.1)),
        read_run(write_run("dense c", loss__validation=float("nan"))),
        read_run(write_run("sparse", sparsity=0.5, loss__validation=3.3)),
    ]
    block = comparison(runs).blocks[0]
    assert next(row[4] for row in block.rows if row[0] == "sparse") == "+0.2000 ?"
    assert any("lowest validation loss" in note for note in block.notes)


NASTY = '<script>alert("x")</script> | *a*\n_b_ `c`\x1b[31m'


def test_terminal_is_narrow_and_plain(write_run):
    path = write_run("placeholder", sparsity=0.5, name=NASTY)
    text = comparison([read_run(path), read_run(write_run("dense"))]).terminal()
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "\x1b" not in text
    assert text.count("dense  ") >= 1
    assert "sent/rank" in text


def test_markdown_and_html_escape(write_run):
    table = comparison([read_run(write_run("placeholder", sparsity=0.5, name=NASTY)), read_run(write_run("dense"))])
    rows = [line for line in table.markdown().splitlines() if line.startswith("|")]
    assert {len(row.replace("\\|", "").split("|")) for row in rows} == {15, 11}  # of both blocks
    assert "<script>" not in table.markdown()
    assert r"\*a\*" in table.markdown()
    assert "<script>" not in table.html()
    assert "&lt;script&gt;" in table.html()


def test_runs_must_differ_in_name_and_be_there(write_run):
    run = read_run(write_run("dense"))
    with pytest.raises(ConfigError, match=r"at least one run to compare. Got none"):
        comparison([])
    with pytest.raises(ConfigError, match="Got 2 pretrain runs named 'dense'"):
        comparison([run, run])


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (999_960, "1.0 MB"), (12_345_678_901, "12.3 GB"), (5e15, "5000.0 TB")],
)
def test_bytes_text(count, text):
    assert bytes_text(count) == text


def test_read_run_keeps_the_later_of_lines_written_twice(write_run):
    path = write_run("resumed")
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 7, "tokens": 700, "loss": 1.25}) + "\n")
    run = read_run(path)
    assert [record["step"] for record in run.train] == list(range(1, 21))
    assert run.train[6]["loss"] == 1.25
    assert [record["step"] for record in run.validation] == [10, 20]


def test_read_run_errors(write_run, write_predictions, tmp_path):
    with pytest.raises(ConfigError, match=r"summary at .*nowhere.*Got none there"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"verb pretrain or finetune .* Got 'export'"):
        read_run(_with(write_run("a"), verb="export"))
    with pytest.raises(ConfigError, match=r"tokens: expected a number, got 'many'\n  versions: expected a list or"):
        read_run(_with(write_run("b"), tokens="many", versions=None))
    with pytest.raises(ConfigError, match="expected the primary metric cider, got bleu, ter"):
        read_run(write_run("c", "finetune", task__primary="cider"))
    broken = write_run("d")
    (broken / "summary.json").write_text("{")
    with pytest.raises(ConfigError, match="Expected JSON in"):
        read_run(broken)
    for name, line, message in (
        ("e", "{", "JSON object in line 1 .*Got Expecting property name"),
        ("f", "[1]", r"JSON object in line 1 .*Got '\[1\]'"),
        ("g", '{"step": 1}', "step, tokens and loss or validation_loss in line 1 .*Got step"),
    ):
        path = write_run(name)
        (path / "metrics.jsonl").write_text(line)
        with pytest.raises(ConfigError, match=message):
            read_run(path)
    for name, journal, message in (
        ("j", '{"version": 0}\n', "Expected attempt in line 1 .*Got version"),
        ("k", '{"attempt": 1}\n{"step": 3, "churn": 0}\n', "Expected churn, sparsity, step in line 2 .*Got step, churn"),
    ):
        path = write_run(name)
        (path / "topology.jsonl").write_text(journal)
        with pytest.raises(ConfigError, match=message):
            read_run(path)
    with pytest.raises(ConfigError, match=r"topology.explored: expected a number, got None"):
        read_run(write_run("l", sparsity=0.5, topology={"updates": 3}))
    path = write_run("h")
    (path / "predictions.jsonl").write_text('{"hypothesis": "a"}')
    with pytest.raises(ConfigError, match=r"a hypothesis and its references in line 1 .*Got hypothesis"):
        read_run(path)
    (path / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"Expected a file at .*metrics.jsonl"):
        read_run(path)


def _with(path, **changes):
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps(summary | changes))
    return path


def test_two_parents_of_one_name_are_refused(write_run):
    from raysparse.report import parent_of

    parent, child = read_run(write_run("dense")), read_run(write_run("child", "finetune"))
    assert parent_of(child, [child, parent]) is parent
    with pytest.raises(ConfigError, match=r"one pre-training run named 'dense'. Got 2"):
        parent_of(child, [parent, parent])


def test_a_remark_stands_beside_the_scores(write_run):
    task = {"name": "dart", "primary": "bleu", "num_examples": 4, "scores": {"bleu": 1.0}, "baseline": {}, "remark": "not a DART score"}
    run = read_run(write_run("a", "finetune", task=task))
    assert "Remark: not a DART score." in comparison([run]).terminal()
    assert "Remark" not in comparison([read_run(write_run("b", "finetune", task=task | {"remark": ""}))]).terminal()
