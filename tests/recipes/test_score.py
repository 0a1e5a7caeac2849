"""`raysparse score`: any system's file of outputs."""

import gzip
import json
from pathlib import Path

import pytest

from raysparse.__main__ import main
from raysparse.config import ConfigError
from raysparse.recipes.score import read_references, score
from raysparse.tasks import Seq2seq
from raysparse.tasks.metrics import missing

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def write(tmp_path):
    def files(**texts):
        for name, text in texts.items():
            (tmp_path / name.replace("__", ".")).write_text(text, encoding="utf-8")
        return lambda name: str(tmp_path / name)

    return files


TASK = Seq2seq.model_construct()


def test_forms_of_references(write):
    at = write(
        one__txt="a\nb\nc\n",
        blocks__txt="a\na2\n\nb\n\n\nc\nc2\nc3\n",
        first__txt="a\nb\n",
        second__txt="a2\n \n",
        table__jsonl='{"references": ["a", "a2"]}\n{"references": "b"}\n',
        own__jsonl='{"source": "x", "target": "a"}\n{"source": "y", "target": "b"}\n{"source": "x", "target": "a2"}\n',
    )
    wanted = [["a", "a2"], ["b"]]
    read = lambda names, count: read_references([Path(at(name)) for name in names], TASK, count)  # noqa: E731
    assert read(["one.txt"], 3) == [["a"], ["b"], ["c"]]
    assert read(["blocks.txt"], 3) == [["a", "a2"], ["b"], ["c", "c2", "c3"]]
    assert read(["first.txt", "second.txt"], 2) == read(["table.jsonl"], 2) == read(["own.jsonl"], 2) == wanted


def test_a_run_is_rescored_from_its_predictions(write, capsys):
    rows = [{"source": "s", "hypothesis": "a b c d", "references": ["a b c d", "x"]}, {"hypothesis": "", "references": ["e"]}]
    at = write(predictions__jsonl="".join(json.dumps(row) + "\n" for row in rows))
    words = ("--outputs", at("predictions.jsonl"), "--references", at("predictions.jsonl"))
    assert main(["score", "--task", "seq2seq", "--metrics", "exact_match", "bleu", *words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["scores"] == {"exact_match": 50.0, "bleu": pytest.approx(100 * 2.718281828 ** (1 - 5 / 4))}
    assert (facts["num_examples"], facts["num_references"], facts["num_empty_outputs"]) == (2, 3, 1)
    assert main(["score", "--task", "seq2seq", *words]) == 0
    assert "1 outputs are empty" in capsys.readouterr().out


def test_the_task_of_a_config(write):
    at = write(
        task__yaml="task: {type: seq2seq, data: {type: folder, path: x}, metrics: [exact_match]}\n", out__txt="a\n", right__txt="a\n"
    )
    assert score(at("task.yaml"), at("out.txt"), [at("right.txt")])["scores"] == {"exact_match": 100.0}


@pytest.mark.parametrize(
    ("files", "references", "message"),
    [
        ({"out__txt": "a\nb\nc\n", "right__txt": "a\nb\n"}, ["right.txt"], r"as many outputs as examples.*out\.txt has 3, .*right\.txt 2"),
        ({"out__txt": "a\n", "right__txt": "a\n"}, ["none.txt"], r"Expected a file at .*none\.txt"),
        ({"out__txt": "a\n", "right__txt": "a\n", "more__txt": "a\nb\n"}, ["right.txt", "more.txt"], r"equally many lines.*right\.txt 1"),
        ({"out__txt": "a\n", "right__txt": " \n", "more__txt": "\n"}, ["right.txt", "more.txt"], r"Got none for number 1 of"),
        ({"out__txt": "a\n", "right__jsonl": '{"target": "a"}\n'}, ["right.jsonl"], r"Expected a column 'references' at .*right\.jsonl"),
    ],
)
def test_bad_files_are_named(write, files, references, message):
    at = write(**files)
    with pytest.raises(ConfigError, match=message):
        score("seq2seq", at("out.txt"), [at(name) for name in references], ["exact_match"])


def test_an_encoding_that_changes_is_named(write, tmp_path):
    at = write(right__txt="a\nb\n")
    (tmp_path / "out.txt").write_bytes("é\n".encode() + "é\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"Expected UTF-8 at .*out\.txt:2"):
        score("seq2seq", at("out.txt"), [at("right.txt")])


def test_unknown_names(write):
    at = write(out__txt="a\n", right__txt="a\n")
    with pytest.raises(ConfigError, match=r"Expected a task: docstrings, e2e, .* Got 'e3e'"):
        score("e3e", at("out.txt"), [at("right.txt")])
    with pytest.raises(ConfigError, match=r"Expected metrics among bleu, .* Got blue"):
        score("e2e", at("out.txt"), [at("right.txt")], ["blue"])
    with pytest.raises(ConfigError, match=r"judged by perplexity"):
        score("curation", at("out.txt"), [at("right.txt")])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--task", "e2e", "--outputs", "e2e_example10/hypothesis.txt", "--references", "e2e_example10/references.txt"],
            "e2e_bleu 72.0293",
        ),
        (
            ["--task", "webnlg", "--metrics", "webnlg_bleu", "--outputs", "webnlg_example/hypothesis.txt.gz", "--references"]
            + [f"webnlg_example/reference{k}.txt.gz" for k in range(4)],
            "webnlg_bleu 51.3190",
        ),
    ],
)
def test_the_official_examples(monkeypatch, capsys, words, expected):
    if not (SHARED / "metrics_reference").is_dir():
        pytest.skip("the reference outputs are not on this machine")
    monkeypatch.chdir(SHARED / "metrics_reference")
    assert main(["score", *words]) == 0
    assert expected in " ".join(capsys.readouterr().out.split())


def test_the_tasks_own_data_are_references(tmp_path):
    """E2E's development set holds the references of the example system."""
    if not (SHARED / "metrics_reference").is_dir():
        pytest.skip("the reference outputs are not on this machine")
    outputs = str(SHARED / "metrics_reference" / "e2e_dev_mlp" / "hypothesis.txt")
    facts = score("e2e", outputs, [str(SHARED / "e2e_nlg" / "validation.jsonl.gz")], ["e2e_bleu"])
    assert facts["num_references"] == 4672
    assert round(facts["scores"]["e2e_bleu"] / 100, 4) == 0.7109


def test_what_cannot_be_computed_is_said(write, monkeypatch):
    monkeypatch.setattr("raysparse.tasks.metrics.scripts.shutil.which", lambda name: None)
    if not missing(["e2e_meteor"])["e2e_meteor"].startswith("needs Java"):
        pytest.skip("pycocoevalcap is not installed")
    at = write(out__txt="a\n", right__txt="a\n")
    assert "needs Java" in score("e2e", at("out.txt"), [at("right.txt")])["missing"]["e2e_meteor"]
    with pytest.raises(ConfigError, match=r"Expected a score that this machine can compute\. Got e2e_meteor, which needs Java"):
        score("e2e", at("out.txt"), [at("right.txt")], ["e2e_meteor"])


def test_compressed_files(tmp_path, write):
    at = write(right__txt="a\n")
    with gzip.open(tmp_path / "out.txt.gz", "wt") as file:
        file.write("a\n")
    assert score("seq2seq", at("out.txt.gz"), [at("right.txt")], ["exact_match"])["scores"] == {"exact_match": 100.0}
