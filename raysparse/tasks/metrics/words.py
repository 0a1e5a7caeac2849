"""Scores that compare words: ROUGE-L, exact match, the answer to a maths problem, word error rate."""

import re
from collections.abc import Sequence

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


class WordErrorRate(Additive):
    """Words to insert, delete and substitute over words of the references, over the whole split, in per cent (may exceed 100). Of several
    references the one with fewest errors a word counts. Words are what white space separates; equals jiwer's on texts as they are."""

    lower_is_better = True

    def sums(self, outputs: Sequence[str], references: References) -> NDArray[np.float64]:
        found = []
        for output, right in zip(outputs, references, strict=True):
            pairs = [(edits(output.split(), reference.split()), len(reference.split())) for reference in right]
            found.append(min(pairs, key=lambda pair: pair[0] / max(1, pair[1])))
        return np.array(found, dtype=np.float64)

    def of_sums(self, total: NDArray[np.float64]) -> float:
        return float(100 * total[0] / max(1.0, total[1]))


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
