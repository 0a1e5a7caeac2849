"""Scores of the scripts of E2E, WebNLG and DART that need what those use: Java, its METEOR and its tokenizer, nltk, pyter3.

They come with ``pip install raysparse[metrics]``, Java with the system. Where they are missing these scores are not computed, and the
result says so: none of them has a substitute under its name.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from abc import abstractmethod
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raysparse.tasks.metrics.base import Mean, Metric, References

_PUNCTUATION = {"''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
"""Stanford tokens that MS-COCO's scripts leave out, which E2E's uses."""


def _missing(*packages: str, java: bool = False) -> str | None:
    if absent := [package for package in packages if importlib.util.find_spec(package) is None]:
        return f"needs the Python package{'s' if len(absent) > 1 else ''} {', '.join(absent)}: pip install 'raysparse[metrics]'"
    return "needs Java (java on the PATH): apt-get install default-jre-headless" if java and shutil.which("java") is None else None


class _OfTokens(Metric):
    """A score of texts that are first cut into words, separated by a space."""

    scale = 100.0

    def missing(self) -> str | None:
        return _missing("pycocoevalcap", java=True)

    def score(self, outputs: Sequence[str], references: References) -> float:
        words = iter(self.tokens([*outputs, *(text for right in references for text in right)]))
        said = [next(words) for _ in outputs]
        return self.scale * self.of_tokens(said, [[next(words) for _ in right] for right in references])

    def tokens(self, texts: Sequence[str]) -> Sequence[str]:
        return stanford(tuple(texts))

    @abstractmethod
    def of_tokens(self, outputs: Sequence[str], references: References) -> float: ...


class E2ERougeL(_OfTokens):
    """ROUGE-L of E2E's ``measure_scores.py``, that is MS-COCO's: F with beta = 1.2 of the best precision and the best recall of any
    reference, mean over examples."""

    def of_tokens(self, outputs: Sequence[str], references: References) -> float:
        from pycocoevalcap.rouge.rouge import Rouge

        return float(Rouge().compute_score(*_as_coco(outputs, references))[0])


class E2ECider(_OfTokens):
    """CIDEr-D (Vedantam et al. 2015) of E2E's ``measure_scores.py``, that is MS-COCO's, tf-idf from the references; not in per cent."""

    scale = 1.0

    def of_tokens(self, outputs: Sequence[str], references: References) -> float:
        from pycocoevalcap.cider.cider import Cider

        return float(Cider().compute_score(*_as_coco(outputs, references))[0])


class E2EMeteor(_OfTokens):
    """METEOR 1.5 (Denkowski and Lavie 2014) of E2E's ``measure_scores.py``."""

    def of_tokens(self, outputs: Sequence[str], references: References) -> float:
        return meteor(outputs, references)


class WebNLGMeteor(E2EMeteor):
    """METEOR 1.5 of WebNLG's and DART's ``eval.py``: on nltk's words, with METEOR's own normalisation."""

    def missing(self) -> str | None:
        return _missing("pycocoevalcap", "nltk", "punkt", java=True)

    def tokens(self, texts: Sequence[str]) -> Sequence[str]:
        return [" ".join(nltk_words(text)) for text in texts]


class WebNLGTer(Mean):
    """TER of WebNLG's and DART's ``eval.py``: pyter3's edits a word of the reference on nltk's words, of the best reference, mean over
    examples, in per cent. An example with fewer references than others has at most 100, which the script gives an empty reference."""

    lower_is_better = True

    def missing(self) -> str | None:
        return _missing("pyter", "nltk", "punkt")

    def sums(self, outputs: Sequence[str], references: References) -> NDArray[np.float64]:
        self._width = max(len(right) for right in references)
        return super().sums(outputs, references)

    def one(self, output: str, references: Sequence[str]) -> float:
        import pyter

        words = nltk_words(output)
        found = [pyter.ter(words, right) if (right := nltk_words(reference)) else 1.0 for reference in references]
        return min(found + [1.0] * (len(references) < self._width))


@lru_cache(maxsize=4)
def stanford(texts: tuple[str, ...]) -> list[str]:
    """Stanford CoreNLP 3.4.1's Penn Treebank tokens of each text, lower-cased, without punctuation, with spaces between."""
    jar = _folder() / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    command = ["java", *_UTF8, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    lines = "".join(" ".join(text.split()) + "\n" for text in texts)
    environment = os.environ | {"LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, input=lines, capture_output=True, encoding="utf-8", env=environment, check=False)
    found = done.stdout.split("\n")[:-1]
    assert (done.returncode, len(found)) == (0, len(texts)), f"{len(found)} lines for {len(texts)} texts: {done.stderr[-1000:]}"
    return [" ".join(word for word in line.split(" ") if word not in _PUNCTUATION).strip() for line in found]


def meteor(outputs: Sequence[str], references: References) -> float:
    """METEOR 1.5 for English, of words with spaces between, by its Java program: 0 to 1."""
    command = ["java", *_UTF8, "-Xmx2G", "-jar", str(_folder() / "meteor" / "meteor-1.5.jar"), "-", "-", "-stdio", "-l", "en", "-norm"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, encoding="utf-8", env=os.environ | {"LC_ALL": "C.UTF-8"}, **pipes) as program:
        assert program.stdin is not None
        assert program.stdout is not None

        def ask(*parts: str) -> None:
            program.stdin.write(" ||| ".join(" ".join(part.replace("|||", " ").split()) for part in parts) + "\n")
            program.stdin.flush()

        found = []
        for output, right in zip(outputs, references, strict=True):
            ask("SCORE", *right, output)
            found.append(program.stdout.readline().strip())
        ask("EVAL", *found)
        answers = [float(program.stdout.readline()) for _ in range(len(found) + 1)]  # of each example, then of all
        program.stdin.close()
    return answers[-1]


_UTF8 = ("-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8")


def _folder() -> Path:
    import pycocoevalcap

    return Path(next(iter(pycocoevalcap.__path__)))


def _as_coco(outputs: Sequence[str], references: References) -> tuple[dict[int, Sequence[str]], dict[int, list[str]]]:
    return dict(enumerate(references)), {number: [text] for number, text in enumerate(outputs)}


@lru_cache(maxsize=100_000)
def nltk_words(text: str) -> list[str]:
    """``word_tokenize`` of nltk 3.5, with which the script's values were computed: Punkt's English sentences, then Treebank words."""
    import punkt

    tokenizer = _words_of_nltk()
    return [word for sentence in punkt.sent_tokenize(text) for word in tokenizer.tokenize(sentence)]


@cache
def _words_of_nltk() -> Any:
    from nltk.tokenize import NLTKWordTokenizer

    class OfVersion35(NLTKWordTokenizer):
        """Later versions also split at dashes, and an apostrophe from a word of several letters."""

        PUNCTUATION = [rule for rule in NLTKWordTokenizer.PUNCTUATION if not rule[0].search("–")]  # noqa: RUF012
        STARTING_QUOTES = [*NLTKWordTokenizer.STARTING_QUOTES[:-1], (re.compile(r"(?i)'(?=(?![mtsd])\w\b)"), "' ")]  # noqa: RUF012

    return OfVersion35()
