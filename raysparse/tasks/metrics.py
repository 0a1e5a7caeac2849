"""Scores of generated text, all from 0 (worst) to 100, over a whole split."""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

MetricName = Literal["bleu", "bleu_lowercase", "chrf", "rouge_l", "exact_match"]
References = Sequence[Sequence[str]]


def bleu(hypotheses: Sequence[str], references: References, lowercase: bool = False) -> float:
    """Corpus BLEU (Papineni et al. 2002) by sacrebleu: ``case:mixed|eff:no|tok:13a|smooth:exp``, or ``case:lc``.

    Cased is the official score of WebNLG and DART, lower-cased that of E2E. Examples may differ in their number of references.
    """
    from sacrebleu.metrics import BLEU

    metric = BLEU(lowercase=lowercase, tokenize="13a", smooth_method="exp", force=True)
    return metric.corpus_score(hypotheses, streams(references)).score


def chrf(hypotheses: Sequence[str], references: References) -> float:
    """Corpus chrF2 (Popović 2015) by sacrebleu: ``case:mixed|eff:yes|nc:6|nw:0|space:no``."""
    from sacrebleu.metrics import CHRF

    return CHRF().corpus_score(hypotheses, streams(references)).score


def rouge_l(hypotheses: Sequence[str], references: References) -> float:
    """Mean over examples of the best reference's ROUGE-L F1 (Lin 2004): with the longest common subsequence of the lower-cased
    words, precision = its length / words of the hypothesis, recall = its length / words of the reference. No stemming.
    """
    total = 0.0
    for hypothesis, right in zip(hypotheses, references, strict=True):
        words = _words(hypothesis)
        total += max(_f1(words, _words(reference)) for reference in right)
    return 100 * total / len(hypotheses)


def exact_match(hypotheses: Sequence[str], references: References) -> float:
    """Share of hypotheses that equal one of their references, spaces at the ends aside."""
    pairs = zip(hypotheses, references, strict=True)
    return 100 * sum(hyp.strip() in {ref.strip() for ref in right} for hyp, right in pairs) / len(hypotheses)


METRICS: dict[MetricName, Callable[[Sequence[str], References], float]] = {
    "bleu": bleu,
    "bleu_lowercase": partial(bleu, lowercase=True),
    "chrf": chrf,
    "rouge_l": rouge_l,
    "exact_match": exact_match,
}


def score(names: Iterable[MetricName], hypotheses: Sequence[str], references: References) -> dict[str, float]:
    """Each named metric over all hypotheses; ``references[k]`` are the right answers to what ``hypotheses[k]`` answers."""
    assert len(hypotheses) == len(references) > 0, (len(hypotheses), len(references))
    assert all(references), "every example has a reference"
    return {name: METRICS[name](hypotheses, references) for name in names}


def streams(references: References) -> list[list[Any]]:
    """Per example -> per stream, as sacrebleu wants it; None where an example has fewer references than another."""
    width = max(len(right) for right in references)
    return [[right[k] if k < len(right) else None for right in references] for k in range(width)]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _f1(hypothesis: list[str], reference: list[str]) -> float:
    common = lcs(hypothesis, reference)
    return 2 * common / (len(hypothesis) + len(reference)) if common else 0.0


def lcs(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence: c[i, j] = c[i-1, j-1] + 1 where a_i = b_j, else max(c[i-1, j], c[i, j-1])."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]
