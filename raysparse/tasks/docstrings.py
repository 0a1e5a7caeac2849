"""Say in a sentence what a function does: pairs from the standard library's own source, so no download is needed."""

import ast
import functools
import hashlib
import inspect
import re
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from pydantic import Field

from raysparse.data.sources import decode, stdlib_names, stdlib_root, stdlib_split
from raysparse.tasks.base import Example, Split, Task, merged
from raysparse.tasks.metrics import MetricName

_MAX_SENTENCE = 300  # characters; what is longer is a table or a list that no full stop ends
_MAY_HOLD_DOCSTRINGS = re.compile(rb":[^\S\n]*(#[^\n]*)?\n\s*[rRuU]?(\"|')")


class Pair(NamedTuple):
    """A function without its docstring, and the docstring's first sentence."""

    split: Split
    name: str
    source: str
    sentence: str


class Docstrings(Task):
    """Function source without its docstring -> first sentence of the docstring: some 8,000 pairs of the Python standard library.

    Whole modules belong to a split (`stdlib_split`), and `PythonStdlib.exclude_task_splits` keeps those of validation and test
    out of pre-training. A pair whose source, or whose function name and sentence, is in an earlier split too is left out.
    """

    type: Literal["docstrings"] = "docstrings"
    separator: str | None = '\n"""'
    """Text between the function and the sentence."""
    metrics: tuple[MetricName, ...] = Field(("rouge_l", "chrf", "bleu"), min_length=1)
    """Scores to report; the first is the primary one. BLEU says little about single short sentences, so it comes last."""
    max_examples: int | None = Field(None, gt=0)
    """Use at most this many examples of each split, a fixed pseudo-random choice; null uses all."""

    def examples(self, split: Split) -> list[Example]:
        found = merged(Example(pair.source, (pair.sentence,)) for pair in _pairs(stdlib_root()) if pair.split == split)
        if self.max_examples is None or len(found) <= self.max_examples:
            return found
        return sorted(found, key=lambda example: hashlib.sha256(example.source.encode()).digest())[: self.max_examples]

    def prompt(self, example: Example) -> str:
        return example.source

    def baseline(self, example: Example) -> str:
        """The function's name as a sentence: ``get_name`` -> ``Get name.``"""
        match = re.search(r"\bdef\s+(\w+)", example.source)
        assert match is not None, "every source holds a def"
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", match[1]).lower().replace("_", " ").split()
        return " ".join(words).capitalize() + "."


def first_sentence(docstring: str) -> str:
    """Up to the first full stop that is followed by a capital, within the first paragraph; "" where that is no sentence."""
    paragraph = " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z`'\"*(])", paragraph, maxsplit=1)[0]
    is_sentence = len(sentence.split()) >= 2 and sentence[0].isalpha() and len(sentence) <= _MAX_SENTENCE
    return sentence if is_sentence else ""


@functools.cache
def _pairs(root: Path) -> tuple[Pair, ...]:
    """All pairs, without near-duplicates across splits, in the order of the files. Parses the library once a process."""
    by_split: dict[Split, list[Pair]] = {split: [] for split in get_args(Split)}
    for name in stdlib_names():
        if name.endswith(".py"):
            by_split[stdlib_split(name)] += (Pair(stdlib_split(name), *found) for found in _functions(root / name))
    seen: set[str | tuple[str, str]] = set()
    kept: list[Pair] = []
    for pairs in by_split.values():
        fresh = [pair for pair in pairs if seen.isdisjoint(_keys(pair))]
        seen.update(key for pair in fresh for key in _keys(pair))
        kept += fresh
    return tuple(kept)


def _keys(pair: Pair) -> tuple[str, tuple[str, str]]:
    return " ".join(pair.source.split()), (pair.name, pair.sentence)


def _functions(path: Path) -> Iterator[tuple[str, str, str]]:
    """(name, source without docstring, sentence) of the functions and methods of a file that say what they do."""
    content = path.read_bytes()
    text = decode(path) if _MAY_HOLD_DOCSTRINGS.search(content) else None
    if text is None:
        return
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # so that lines are those of the parser
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escapes such as "\d" in old modules
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):  # test data of the library: deliberately not Python, or Python 2
            return
    lines = text.split("\n")
    for function in _definitions(tree):
        docstring = ast.get_docstring(function, clean=False)
        sentence = first_sentence(docstring) if docstring else ""
        source = _without_docstring(function, lines) if sentence else ""
        if source:
            yield function.name, source, sentence


def _definitions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions in order of appearance; only statements are entered, as expressions hold none."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for block in ("body", "handlers", "orelse", "finalbody", "cases"):
        for child in getattr(node, block, ()):
            yield from _definitions(child)


def _without_docstring(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """Decorators, signature and body, dedented; "" where the body is the docstring alone, or it shares a line with code."""
    docstring, *body = function.body
    signature = lines[docstring.lineno - 1][: docstring.col_offset]
    if not body or signature.strip() or body[0].lineno == docstring.end_lineno:
        return ""
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    assert docstring.end_lineno is not None
    assert function.end_lineno is not None
    kept = lines[first - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : function.end_lineno]
    return textwrap.dedent("\n".join(kept)).strip("\n")
