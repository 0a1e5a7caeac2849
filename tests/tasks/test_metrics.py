import gzip
import json
from itertools import combinations
from pathlib import Path
from typing import get_args

import pytest

from raysparse.tasks.metrics import METRICS, MetricName, bleu, chrf, exact_match, lcs, rouge_l, score

SHARED = Path(__file__).parents[3] / "shared" / "data"


def lines(path):
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        return file.read().split("\n")


def test_every_metric_is_100_for_a_perfect_answer_and_0_for_none():
    right = ["the mask is live here", "a dense weight is never dead"]
    assert set(METRICS) == set(get_args(MetricName))
    assert score(METRICS, right, [[text, "other"] for text in right]) == pytest.approx(dict.fromkeys(METRICS, 100.0))
    assert score(METRICS, ["", ""], [[text] for text in right]) == dict.fromkeys(METRICS, 0.0)


def test_rouge_l_by_hand():
    #  "a b c d" and "a x c": LCS "a c" = 2, precision 2/4, recall 2/3, F1 = 4/7; the second reference is worse
    assert rouge_l(["a b, C d!"], [["A x c", "z"]]) == pytest.approx(100 * 4 / 7)
    assert rouge_l(["a b c d", "q"], [["a x c"], ["r"]]) == pytest.approx(50 * 4 / 7)
    assert rouge_l(["été"], [["été"]]) == 100


def test_lcs_is_the_longest_common_subsequence():
    def subsequences(words):
        return {tuple(pick) for size in range(len(words) + 1) for pick in combinations(words, size)}

    for a, b in (("abcbdab", "bdcaba"), ("aaaa", "aa"), ("abc", "xyz"), ("", "abc"), ("abcd", "abcd")):
        assert lcs(a, b) == lcs(b, a) == max(map(len, subsequences(a) & subsequences(b)))


def test_bleu_by_hand():
    #  4-gram precisions of 5 of 6 words, in order: 5/6, 4/5, 3/4, 2/3; the lengths are equal
    wanted = 100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25
    assert bleu(["a b c d e x"], [["a b c d e f"]]) == pytest.approx(wanted)
    assert bleu(["A b c d e x"], [["a b c d e f"]]) < wanted
    assert bleu(["A b c d e x"], [["a b c d e f"]], lowercase=True) == pytest.approx(wanted)


def test_examples_may_differ_in_their_number_of_references():
    hypotheses = ["one two three four", "five six seven eight"]
    references = [["one two three four"], ["no", "five six seven eight", "nothing"]]
    assert bleu(hypotheses, references) == pytest.approx(100)
    assert chrf(hypotheses, references) == pytest.approx(100)
    assert chrf(hypotheses, [["one two three four"], ["no"]]) < 95


def test_exact_match_ignores_spaces_at_the_ends_only():
    assert exact_match([" a b", "A b", "c"], [["a b"], ["a b"], ["d", "c "]]) == pytest.approx(200 / 3)


def test_official_values():
    """Outputs of real systems; the official scripts of E2E and WebNLG print 0.7109 and 51.32."""
    folder = SHARED / "metrics_reference"
    if not folder.is_dir():
        pytest.skip("the reference outputs are not on this machine")
    values = json.loads((folder / "values.json").read_text())
    blocks = "\n".join(lines(folder / "e2e_dev_mlp" / "references.txt.gz")).strip().split("\n\n")
    hypotheses = lines(folder / "e2e_dev_mlp" / "hypothesis.txt")[: len(blocks)]
    references = [block.split("\n") for block in blocks]
    assert len(hypotheses) == 547
    found = score(("bleu_lowercase", "bleu", "rouge_l"), hypotheses, references)
    others = values["other_libraries"]["e2e_dev_mlp"]
    assert found["bleu_lowercase"] == pytest.approx(100 * values["e2e_dev_mlp"]["official_perl"]["BLEU"], abs=0.005)
    assert found["bleu"] == pytest.approx(100 * others["sacrebleu 13a lc=False smooth=exp"], abs=0.005)
    # rouge-score takes letters with accents for spaces, which moves a few words
    assert found["rouge_l"] == pytest.approx(100 * others["rouge-score rougeL F max-ref stem=False"], abs=0.1)

    hypotheses = lines(folder / "webnlg_example" / "hypothesis.txt.gz")[:1862]
    streams = [lines(folder / "webnlg_example" / f"reference{k}.txt.gz")[:1862] for k in range(4)]
    references = [[text for text in right if text] for right in zip(*streams, strict=True)]
    official = values["webnlg_example"]["official_generation_eval"]["BLEU"]
    assert bleu(hypotheses, references) == pytest.approx(official, abs=0.005)
