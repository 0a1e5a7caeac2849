import sys
import textwrap
from pathlib import Path

import pytest

from raysparse.data import sources
from raysparse.data.sources import stdlib_split
from raysparse.tasks import Docstrings, docstrings
from raysparse.tasks.docstrings import first_sentence

MODULE = '''
import os

@decorated
def get_name(self):
    """Return the name. Never
    empty.

    Not this."""
    return "é"


class Thing:
    async def getHTTPHeader(self): # why
        r\'\'\'Read a header \\d.\'\'\'
        if self:
            def inner():
                "The inner one"
                return {1: "x"}
        return inner

    def no_docstring(self):
        return 1

    def only_docstring(self):
        """Do nothing at all."""

    def one_line(self): "Do it on one line."; return 1

    def shared_line(self):
        """Share a line."""; return 1

    def no_sentence(self):
        """1234 5."""
        return 1
'''


def split_name(split, number=0):
    names = (f"m{k}.py" for k in range(10_000))
    return [name for name, _ in zip((n for n in names if stdlib_split(n) == split), range(number + 1), strict=False)][-1]


@pytest.fixture
def library(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "stdlib_root", lambda: tmp_path)
    monkeypatch.setattr(docstrings, "stdlib_root", lambda: tmp_path)
    docstrings._pairs.cache_clear()
    yield tmp_path
    docstrings._pairs.cache_clear()


def function(name, sentence, body="return 0"):
    return f'def {name}():\n    """{sentence}"""\n    {body}\n'


def test_functions_lose_their_docstring_and_nothing_else(library):
    (library / split_name("train")).write_text(MODULE, encoding="utf-8")
    found = {example.references[0]: example.source for example in Docstrings().examples("train")}
    assert set(found) == {"Return the name.", "Read a header \\d.", "The inner one"}
    assert found["Return the name."] == '@decorated\ndef get_name(self):\n    return "é"'
    assert found["The inner one"] == 'def inner():\n    return {1: "x"}'
    assert found["Read a header \\d."] == textwrap.dedent("""\
        async def getHTTPHeader(self): # why
            if self:
                def inner():
                    "The inner one"
                    return {1: "x"}
            return inner""")


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return x.", "Return x."),
        ("\n    Return\n      x.  Then y.\n\n    More.", "Return x."),
        ("Return x, e.g. y. Then z.", "Return x, e.g. y."),
        ("Return x", "Return x"),
        ("Really? Yes.", ""),
        (">>> f()\n1", ""),
        ("word", ""),
        ("", ""),
        ("  \n ", ""),
        ("a " * 200, ""),
    ],
)
def test_first_sentence(docstring, sentence):
    assert first_sentence(docstring) == sentence


def test_near_duplicates_do_not_straddle_splits(library):
    train, validation, test = (library / split_name(split) for split in ("train", "validation", "test"))
    train.write_text(function("a", "Return a thing.") + function("b", "Return b thing."))
    validation.write_text(
        function("a", "Return a thing.", "return 1")  # the name and the sentence are in train
        + function("b", "Say something else.")  # the source is in train
        + function("c", "Return c thing.")
        + "if 1:\n"
        + textwrap.indent(function("b", "Say it indented.").replace("return 0", "return  0"), "    ")  # but for spaces
    )
    test.write_text(function("c", "Say c again.") + function("d", "Return d thing.") + function("d", "Return it."))
    task = Docstrings()
    assert [e.references for e in task.examples("train")] == [("Return a thing.",), ("Return b thing.",)]
    assert [e.references for e in task.examples("validation")] == [("Return c thing.",)]
    assert [e.references for e in task.examples("test")] == [("Return d thing.", "Return it.")]


def test_max_examples_is_a_fixed_choice_of_each_split(library):
    (library / split_name("train")).write_text("".join(function(f"f{k}", f"Return number {k}.") for k in range(30)))
    few, more = (Docstrings(max_examples=count).examples("train") for count in (5, 10))
    assert more[:5] == few
    assert few != Docstrings().examples("train")[:5]
    assert len(Docstrings(max_examples=99).examples("train")) == 30


def test_files_that_are_not_python_are_passed_over(library):
    (library / split_name("train", 0)).write_text('def f(:\n    """Not Python at all."""\n')
    (library / split_name("train", 1)).write_bytes(b'def f():\n    """Latin \xe9 text."""\n    return 1\n')
    (library / split_name("train", 2)).write_bytes(b'def f():\r\n    """Windows line ends."""\r\n    return "\x0c"\r\n')
    assert [(e.source, e.references) for e in Docstrings().examples("train")] == [('def f():\n    return "\x0c"', ("Windows line ends.",))]


def test_the_baseline_is_the_name_as_a_sentence(library):
    names = {"get_name": "Get name.", "__init__": "Init.", "getHTTPHeader": "Get httpheader.", "isTrue2": "Is true2."}
    content = "".join(function(name, f"Say what {name} does.", f"return '{name}'") for name in names)
    (library / split_name("train")).write_text(content)
    task = Docstrings()
    assert [task.baseline(example) for example in task.examples("train")] == list(names.values())
    assert task.primary == "rouge_l"


def test_the_real_library():
    """Enough pairs; no source and no (name, sentence) is in two splits; the modules of a split are in no other."""
    if not (Path(sources.stdlib_root()) / "test" / "test_ast.py").is_file():
        pytest.skip(f"the standard library of {sys.executable} comes without its tests")
    sizes = {split: len(Docstrings().examples(split)) for split in ("train", "validation", "test")}
    assert sizes["train"] > 6000
    assert min(sizes.values()) > 300
    pairs = docstrings._pairs(sources.stdlib_root())
    for key in (lambda pair: " ".join(pair.source.split()), lambda pair: (pair.name, pair.sentence)):
        first, second, third = ({key(pair) for pair in pairs if pair.split == split} for split in sizes)
        assert len(first | second | third) == len(first) + len(second) + len(third)
    assert all('"""' + pair.sentence not in pair.source for pair in pairs)
