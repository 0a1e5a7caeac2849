import json

import pytest

from raysparse.config import Config, ConfigError
from raysparse.tasks import AnyTask, Example, Seq2seq
from raysparse.tasks.tables import PairFiles, PairHub

ROWS = [
    {"mr": "name[a]", "kind": "pub", "text": "A is a pub.", "all": ["one", "two"]},
    {"mr": "name[b]", "kind": "bar", "text": "B is a bar.", "all": ["three"]},
    {"mr": "name[a]", "kind": "inn", "text": "A, a pub.", "all": ["two", "four"]},
    {"mr": "name[a]", "kind": "pub", "text": "A is a pub.", "all": ["two"]},
]


class Holder(Config):
    task: AnyTask


@pytest.fixture
def task(tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({**row, "split": split}) + "\n" for row in ROWS))
    files = PairFiles.check({split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation", "test")})
    return Seq2seq(data=files, source="mr", target="text")


def test_equal_sources_are_one_example_with_several_references(task):
    examples = [Example("name[a]", ("A is a pub.", "A, a pub.", "A is a pub.")), Example("name[b]", ("B is a bar.",))]
    assert task.examples("train") == examples
    assert task.prompt(examples[0]) == task.baseline(examples[0]) == "name[a]"


def test_a_target_may_be_a_list(task):
    lists = task.model_copy(update={"target": "all"})
    assert [example.references for example in lists.examples("test")] == [("one", "two", "two", "four", "two"), ("three",)]


def test_a_source_may_be_a_template(task):
    template = Seq2seq(data=task.data, source="{{{kind}}} {mr} of {split}:", target="text")
    assert [example.source for example in template.examples("validation")] == [
        "{pub} name[a] of validation:",
        "{bar} name[b] of validation:",
        "{inn} name[a] of validation:",
    ]


def test_max_examples_counts_sources(task):
    few = Seq2seq(data=task.data, source="mr", target="text", max_examples=1)
    assert [example.source for example in few.examples("train")] == ["name[a]"]


def test_the_same_rows_as_a_hub_data_set(task, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    hub = Seq2seq(data=PairHub(name=str(tmp_path)), source="mr", target="text")
    assert hub.examples("validation") == task.examples("validation")


def test_the_union_reads_plain_data(task):
    values = {"type": "seq2seq", "data": {"type": "files", "train": "a.csv", "validation": ["b.csv"], "test": "c.csv"}}
    read = Holder.check({"task": values}).task
    assert isinstance(read, Seq2seq)
    assert read.data == PairFiles(train=("a.csv",), validation=("b.csv",), test=("c.csv",))
    assert Holder.check({"task": read.model_dump(mode="json")}).task == read
    assert Holder.check({"task": {"type": "docstrings"}}).task.primary == "rouge_l"
    with pytest.raises(ConfigError, match=r"task\.metrics\.0: Input should be 'bleu', "):
        Holder.check({"task": {**values, "metrics": ["blue"]}})


@pytest.mark.parametrize(
    ("source", "message"),
    [("{mr", r"a template with \{column\}\. Got '\{mr'"), ("{}", "plain column names"), ("{mr.x}", "plain"), ("{mr:>9}", "plain")],
)
def test_a_malformed_template_is_an_error(source, message):
    values = {"type": "seq2seq", "data": {"type": "hub", "name": "x"}, "source": source}
    with pytest.raises(ConfigError, match=message):
        Holder.check({"task": values})


@pytest.mark.parametrize(
    ("lines", "fields", "message"),
    [
        (['{"mr": "a", "text": "b"}', '{"mr": "a"}'], {}, r"column 'text' at .*\.jsonl:2\. Got the columns \['mr'\]"),
        (['{"mr": "a", "text": "b"}', '{"mr": null, "text": "b"}'], {}, r"Expected text in column 'mr' at .*\.jsonl:2\. Got None"),
        (['{"mr": "a", "text": " "}'], {}, r"Expected a target, none of them empty, at .*\.jsonl:1\. Got \[' '\]"),
        (['{"mr": "a", "text": []}'], {}, r"Expected a target, none of them empty, at .*\.jsonl:1\. Got \[\]"),
        (['{"mr": "a", "text": [null]}'], {}, r"Expected text in column 'text' at .*\.jsonl:1\. Got None"),
        (
            ['{"mr": "a", "text": "b"}'],
            {"source": "{mr} {other}"},
            r"Expected the columns mr, other, text at .*\.jsonl\. Got the columns \['mr', 'text'\]",
        ),
        ([], {}, r"Expected pairs in the train split\. Got no rows\. Check task\.data\.train"),
    ],
)
def test_errors_name_the_file_line_and_column(task, tmp_path, lines, fields, message):
    (tmp_path / "train.jsonl").write_text("".join(line + "\n" for line in lines))
    with pytest.raises(ConfigError, match=message):
        Seq2seq(**{"data": task.data, "source": "mr", "target": "text"} | fields).examples("train")
