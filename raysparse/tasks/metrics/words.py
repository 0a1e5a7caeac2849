"""Scores that compare words: ROUGE-L, exact match, the answer to a maths problem, error rates of words and characters."""

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from raysparse.tasks.metrics.base import Additive, Mean, References


class RougeL(Mean):
    """ROUGE-L F1 (Lin 2004), the best reference's: with the longest common subsequence of the lower-cased words, precision = its length /
    words of the output, recall = its length / words of the reference. No stemming. Equals rouge_score's rougeL on ASCII text; E2E's script
    has another (`e2e_rouge_l`).
    """

    def one(self, output: str, references: Sequence[str]) -> float:
        words = _words(output)
        return max(_f1(words, _words(reference)) for reference in references)


class ExactMatch(Mean):
    """Share of outputs that equal one of their references, spaces at the ends aside."""

    def one(self, output: str, references: Sequence[str]) -> float:
        return output.strip() in {reference.strip() for reference in references}


class Accuracy(Mean):
    """Share of outputs that equal one of their references, spaces at the ends and case aside: for labels."""

    def one(self, output: str, references: Sequence[str]) -> float:
        return output.strip().casefold() in {reference.strip().casefold() for reference in references}


class GSM8K(Mean):
    """Share of right final numbers, as GSM8K's own script counts (Cobbe et al. 2021): the number behind ``####``, without its commas; an
    output without one is wrong."""

    _FINAL = re.compile(r"#### (-?[0-9.,]+)")

    def one(self, output: str, references: Sequence[str]) -> float:
        found = self._number(output)
        return found is not None and found in map(self._number, references)

    def _number(self, text: str) -> str | None:
        match = self._FINAL.search(text)
        return match[1].strip().replace(",", "") if match else None


class ErrorRate(Additive):
    """Units to insert, delete and substitute over units of the references, over the whole split, in per cent (may exceed 100). Of several
    references the one with fewest errors a unit counts. Units are words, which white space separates, or characters, a blank between words
    among them; on texts as they are both equal jiwer's."""

    lower_is_better = True

    def __init__(self, units: Callable[[str], Sequence[str]], normal: Callable[[str], str] = str) -> None:
        """Args:
        normal: what is done to texts before they are compared.
        """
        self._units, self._normal = units, normal

    def sums(self, outputs: Sequence[str], references: References) -> NDArray[np.float64]:
        found = []
        for output, right in zip(outputs, references, strict=True):
            said, wanted = self._units(self._normal(output)), [self._units(self._normal(reference)) for reference in right]
            pairs = [(edits(said, reference), len(reference)) for reference in wanted]
            found.append(min(pairs, key=lambda pair: pair[0] / max(1, pair[1])))
        return np.array(found, dtype=np.float64)

    def of_sums(self, total: NDArray[np.float64]) -> float:
        return float(100 * total[0] / max(1.0, total[1]))


def characters(text: str) -> str:
    return " ".join(text.split())


def basic(text: str) -> str:
    """As OpenAI's Whisper has it for languages other than English, by transformers: lower case, no punctuation, nothing in brackets. It
    removes combining marks too, and with them the vowels of Hindi and its like."""
    return _normalizer("basic")(text)


def english(text: str) -> str:
    """As OpenAI's Whisper has it for English, by transformers: besides contractions, fillers, numbers and currencies. Its list of British
    and American spellings comes with a model, not with transformers, and is left out."""
    return _normalizer("english")(text)


@cache
def _normalizer(kind: Literal["basic", "english"]) -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    return BasicTextNormalizer() if kind == "basic" else EnglishTextNormalizer({})


def lcs(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence: c[i, j] = c[i-1, j-1] + 1 where a_i = b_j, else max(c[i-1, j], c[i, j-1])."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def edits(a: Sequence[str], b: Sequence[str]) -> int:
    """Levenshtein's distance: d[i, j] = min(d[i-1, j] + 1, d[i, j-1] + 1, d[i-1, j-1] + (a_i != b_j))."""
    row = list(range(len(b) + 1))
    for i, word in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _f1(output: list[str], reference: list[str]) -> float:
    common = lcs(output, reference)
    return 2 * common / (len(output) + len(reference)) if common else 0.0
