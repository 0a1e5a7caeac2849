"""Scores that count n-grams: BLEU and chrF by sacrebleu, and NIST."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysparse.tasks.metrics.base import Additive, Metric, References


class _Sacrebleu(Additive):
    """A metric of sacrebleu, whose statistics of each example add up."""

    padding: str | None = None
    """What stands for a reference where an example has fewer than another."""

    def scorer(self) -> Any:
        raise NotImplementedError

    def sums(self, outputs: Sequence[str], references: References) -> NDArray[np.float64]:
        return np.array(self.scorer()._extract_corpus_statistics(outputs, self.streams(references)), dtype=np.float64)

    def of_sums(self, total: NDArray[np.float64]) -> float:
        return self.scorer()._compute_score_from_stats(total.astype(int).tolist()).score

    def streams(self, references: References) -> list[list[Any]]:
        """Per example -> per stream, as sacrebleu wants it."""
        width = max(len(right) for right in references)
        return [[right[k] if k < len(right) else self.padding for right in references] for k in range(width)]


class Bleu(_Sacrebleu):
    """Corpus BLEU (Papineni et al. 2002) as sacrebleu has it: ``case:mixed|eff:no|tok:13a|smooth:exp``."""

    settings: dict[str, Any] = {"smooth_method": "exp"}  # noqa: RUF012
    tokenize = "13a"

    def scorer(self) -> Any:
        from sacrebleu.metrics.bleu import BLEU

        return BLEU(tokenize=self.tokenize, force=True, **self.settings)


class ChineseBleu(Bleu):
    """With sacrebleu's ``tok:zh``: every Chinese character is a word."""

    tokenize = "zh"


class CharacterBleu(Bleu):
    """With sacrebleu's ``tok:char``: for Japanese, Thai and others that write without spaces."""

    tokenize = "char"


class E2EBleu(Bleu):
    """BLEU of E2E's ``measure_scores.py``, that is mteval-v13a on lower-cased text without smoothing (0 where no 4-gram is right)."""

    settings = {"smooth_method": "none", "lowercase": True}  # noqa: RUF012


class WebNLGBleu(Bleu):
    """BLEU of WebNLG's and DART's ``eval.py``, that is multi-bleu-detok: cased, without smoothing. A reference that an example lacks counts
    as one of length 0 in the brevity penalty, as there."""

    settings = {"smooth_method": "none"}  # noqa: RUF012
    padding = ""


class Chrf(_Sacrebleu):
    """Corpus chrF2 (Popović 2015) by sacrebleu: ``case:mixed|eff:yes|nc:6|nw:0|space:no``."""

    def scorer(self) -> Any:
        from sacrebleu.metrics.chrf import CHRF

        return CHRF()


class Ter(_Sacrebleu):
    """Corpus TER (Snover et al. 2006) by sacrebleu: ``case:lc|tok:tercom|norm:no|punct:yes|asian:no``, in per cent of the mean reference.
    WebNLG's and DART's script has another (`webnlg_ter`)."""

    lower_is_better = True

    def scorer(self) -> Any:
        from sacrebleu.metrics.ter import TER

        return TER()


class Nist(Metric):
    """NIST-5 (Doddington 2002) of E2E's ``measure_scores.py``, that is mteval-v13a on lower-cased text; not in per cent, some 8 to 9 there.

    The information of an n-gram is log2(count of its first n - 1 words / its count) over all references, with all words in the numerator
    for n = 1. Score = sum over n = 1..5 of (information of the matched n-grams, each at most as often as in the one reference that has it
    most) / (n-grams in the output), times exp(-b ln(min(1, r))^2) with b = ln 2 / ln(1.5)^2 and r = words of the output / (words of all
    references / mean number of references). No library has the latter where examples differ in their number of references.
    """

    ORDER = 5

    def score(self, outputs: Sequence[str], references: References) -> float:
        from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

        tokenize = Tokenizer13a()
        said = [tokenize(output.lower()).split() for output in outputs]
        right = [[tokenize(reference.lower()).split() for reference in texts] for texts in references]
        everything = Counter(chain.from_iterable(self._ngrams(words) for words in chain.from_iterable(right)))
        num_words = sum(count for gram, count in everything.items() if len(gram) == 1)
        gained, possible = [0.0] * self.ORDER, [0] * self.ORDER
        for words, texts in zip(said, right, strict=True):
            most = Counter[tuple[str, ...]]()
            for text in texts:
                most |= Counter(self._ngrams(text))
            for gram, count in (Counter(self._ngrams(words)) & most).items():
                before = everything[gram[:-1]] if len(gram) > 1 else num_words
                gained[len(gram) - 1] += count * math.log2(before / everything[gram])
            for n in range(self.ORDER):
                possible[n] += max(0, len(words) - n)
        ratio = sum(map(len, said)) * len(list(chain.from_iterable(right))) / (len(right) * max(1, num_words))
        if not ratio:
            return 0.0
        penalty = math.exp(-math.log(2) / math.log(1.5) ** 2 * math.log(min(1.0, ratio)) ** 2)
        return penalty * sum(information / max(1, count) for information, count in zip(gained, possible, strict=True))

    def _ngrams(self, words: Sequence[str]) -> list[tuple[str, ...]]:
        return [tuple(words[i : i + n]) for n in range(1, self.ORDER + 1) for i in range(len(words) - n + 1)]
