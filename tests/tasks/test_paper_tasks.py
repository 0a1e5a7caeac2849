"""The papers' tasks: what they read, and their sizes on the real data."""

import json
from pathlib import Path

import pytest

from raysparse.config import ConfigError
from raysparse.data.files import read_rows
from raysparse.data.pairs import PairRows, encode_prompts
from raysparse.data.tokenizer import TrainTokenizer, load, train
from raysparse.tasks import E2E, GSM8K, Completion, Curation, Dart, Example, WebNLG, e2e, triples
from raysparse.tasks.tables import PairFiles, PairFolder

SHARED = Path(__file__).parents[3] / "shared" / "data"


def real(name):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{name} is not on this machine")
    return PairFolder(path=str(SHARED / name))


def rows_of(name, split):
    return [row for _, row in read_rows(real(name).file(split), ())]


def sizes(task, split):
    examples = task.examples(split)
    return len(examples), sum(len(example.references) for example in examples)


@pytest.mark.parametrize(
    ("make", "name", "expected"),
    [
        (E2E, "e2e_nlg", {"train": (4862, 42061), "validation": (547, 4672), "test": (630, 4693)}),
        (WebNLG, "webnlg_2017", {"train": (6935, 18025), "validation": (872, 2268), "test": (1862, 4928)}),
        (lambda data: Dart(data=data, resplit=True), "dart", {"train": (2268, 5732), "validation": (500, 1248), "test": (5097, 12551)}),
        (GSM8K, "gsm8k", {"train": (6973, 6973), "validation": (500, 500), "test": (1319, 1319)}),
        (Curation, "scitldr", {"train": (1992, 1992), "validation": (619, 1453), "test": (618, 1967)}),
    ],
    ids=["e2e", "webnlg", "dart", "gsm8k", "scitldr"],
)
def test_sizes_of_the_real_data(make, name, expected):
    task = make(data=real(name))
    assert {split: sizes(task, split) for split in expected} == expected


def test_the_official_splits_where_nothing_is_re_split():
    assert sizes(Dart(data=real("dart")), "validation") == (2768, 6980)
    with pytest.raises(ConfigError, match=r"Expected one table train\.jsonl.* Got 0: .*train_from_dev"):
        Dart(data=real("dart")).examples("train")
    assert WebNLG(data=real("webnlg_2017")).examples("test")[0].subset == "seen"
    subsets = [example.subset for example in WebNLG(data=real("webnlg_2017")).examples("test")]
    assert (subsets.count("seen"), subsets.count("unseen")) == (971, 891)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_sources_are_loras(split):
    rows = rows_of("e2e_nlg", split)
    assert all(e2e.linearized(row["mr"]) == row["lora_context"] for row in rows)
    rows = rows_of("webnlg_2017", split)
    assert all(triples.linearized(row["triples"], "") == row["linearized"] for row in rows)
    if split != "train":
        rows = rows_of("dart", split)
        assert all(triples.linearized(row["tripleset"], "", lower=True) == row["linearized"] for row in rows)


def test_e2e_by_hand():
    meaning = "name[The Mill], eatType[pub], priceRange[£20-25], familyFriendly[no], near[Café Rouge]"
    assert e2e.linearized(meaning) == "name : The Mill | Type : pub | price : £ 20 - 25 | family friendly : no | near : Café Rouge"


def folder(tmp_path, **tables):
    for name, rows in tables.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PairFolder(path=str(tmp_path))


def test_layouts_of_the_hub_read_the_same(tmp_path):
    lex = {"comment": ["good", "toFix"], "text": ["one", "two"]}
    hub = {"modified_triple_sets": {"mtriple_set": [[["a", "b", "c"]]]}, "lex": lex, "category": "Airport"}
    here = {"triples": [["a", "b", "c"]], "references": lex["text"], "comments": lex["comment"], "category": "Airport"}
    found = [WebNLG(data=folder(tmp_path, train=[row], test=[row])) for row in (hub, here)]
    for task in found:
        assert task.examples("train") == [Example("a : b : c", ("one",), "seen")]
        assert task.examples("test") == [Example("a : b : c", ("one", "two"), "seen")]
    told = {"tripleset": [["A", "B", "C"]]}
    for row in (told | {"references": ["x"]}, told | {"annotations": [{"source": "s", "text": "x"}]}):
        assert Dart(data=folder(tmp_path, test=[row])).examples("test") == [Example("A : b : C", ("x",))]


def test_curation_leaves_out_rows_without_a_text_and_says_so(tmp_path, caplog):
    rows = [{"article": "long", "summary": "short"}, {"article": "", "summary": "x"}, {"article": "y", "summary": None}]
    assert Curation(data=folder(tmp_path, test=rows)).examples("test") == [Example("long", ("short",))]
    assert "2 of 3 test rows have no article or no summary and are left out" in caplog.text


def test_gsm8k_validates_on_the_last_training_problems(tmp_path):
    rows = [{"question": f"q{k}", "answer": f"#### {k}"} for k in range(503)]
    task = GSM8K(data=folder(tmp_path, train=rows, test=rows))
    assert [example.source for example in task.examples("train")] == ["q0", "q1", "q2"]
    assert [example.source for example in task.examples("validation")][:2] == ["q3", "q4"]
    assert task.prompt(task.examples("test")[0]) == "Question: q0"
    assert task.baseline(Example("He has 3 of 1,200 apples.", ("",))) == "#### 1,200"
    with pytest.raises(ConfigError, match=r"more than 500 training problems.* Got 3\."):
        GSM8K(data=task.data, max_examples=3).examples("train")


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        (E2E, [{"mr": "name[a]", "text": "b"}], r"Expected the columns mr, target or mr, ref or .* at .*train\.jsonl\. Got the columns"),
        (WebNLG, [{"triples": [["a", "b"]], "references": ["x"], "comments": ["good"], "category": "c"}], r"a list of triples .*jsonl:1"),
        (Dart, [{"tripleset": [["a", "b", "c"]], "references": [" "]}], r"Expected a target, none of them empty, at .*train\.jsonl:1"),
    ],
)
def test_bad_rows_are_named(tmp_path, task, rows, message):
    with pytest.raises(ConfigError, match=message):
        task(data=folder(tmp_path, train=rows)).examples("train")


def test_a_folder_without_the_split_tells_what_is_there(tmp_path):
    folder(tmp_path, dev=[{}])
    with pytest.raises(ConfigError, match=r"Expected one table test\.jsonl.*Got 0: dev\.jsonl"):
        E2E(data=PairFolder(path=str(tmp_path))).examples("test")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load(train(TrainTokenizer(vocab_size=300), iter(["name : a | area 100 98 99 " * 20]), "x", tmp_path_factory.mktemp("cache")))


def test_rows_are_loras(tokenizer):
    """Context, end of text, a blank and the completion, end of text."""
    task = E2E(data=PairFiles(train="", validation="", test=""))
    rows = PairRows.encode([Example("name : a", ("A is.",))], tokenizer, task, 64)
    assert tokenizer.decode(rows.ids) == "name : a<|endoftext|> A is.<|endoftext|>"
    assert tokenizer.decode(rows.ids[rows.num_prompt[0] :]) == " A is.<|endoftext|>"


def test_a_completion_loses_its_start(tokenizer):
    task = Completion(data=PairFiles(train="", validation="", test=""))
    long = Example(" ".join(map(str, range(100))), (" 100",))
    (prompt,) = encode_prompts([long], tokenizer, task, context=32, max_new_tokens=8)
    assert len(prompt) == 24
    assert tokenizer.decode(prompt).endswith("98 99")
    rows = PairRows.encode([long], tokenizer, task, 32)
    assert rows.num_truncated == 1
    assert tokenizer.decode(rows.ids).endswith("98 99 100<|endoftext|>")
