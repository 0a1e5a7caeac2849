"""Scores by hand, and as the official scripts print them."""

import gzip
import json
import shutil
from itertools import combinations
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from raysparse.config import ConfigError
from raysparse.tasks.metrics import LOWER_IS_BETTER, METRICS, Additive, TextMetric, missing, score, score_parts, scripts
from raysparse.tasks.metrics.words import edits, lcs
from raysparse.tasks.translation import Translation

SHARED = Path(__file__).parents[3] / "shared" / "data"
OPEN_ENDED = {"e2e_nist", "e2e_cider"}
"""Not in per cent."""


def lines(path):
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        return file.read().split("\n")


def here(*names):
    """Those of the names that this machine can compute."""
    return [name for name in names if not missing([name])]


def one(name, outputs, references):
    return score([name], outputs, references)[name]


def test_a_perfect_answer_is_the_best_and_none_the_worst():
    right = ["the mask is live here #### 3", "a dense weight is never dead #### 4"]
    assert set(METRICS) == set(get_args(TextMetric))
    names = here(*METRICS)
    best, worst = score(names, right, [[text, "other"] for text in right]), score(names, ["", ""], [[text] for text in right])
    for name in set(names) - OPEN_ENDED:
        assert best[name] == pytest.approx(0.0 if name in LOWER_IS_BETTER else 100.0, abs=1e-6), name
        assert worst[name] == pytest.approx(100.0 if name in LOWER_IS_BETTER else 0.0), name
    for name in OPEN_ENDED & set(names):
        assert best[name] > worst[name] == 0


def test_bleu_of_languages_without_spaces():
    assert one("bleu", ["我喜欢大猫"], [["我喜欢大的猫"]]) == 0.0
    assert one("bleu_zh", ["我喜欢大猫"], [["我喜欢大的猫"]]) > 40
    assert one("bleu_char", ["わたしは猫が好き"], [["わたしは猫が大好き"]]) > 40
    with pytest.raises(ConfigError, match=r"written without spaces.*Use task\.metrics=\[bleu_zh, chrf\]"):
        Translation.check({"data": {"type": "folder", "path": "a"}, "source": "en", "target": "zh"})


SLOW = {"e2e_meteor", "webnlg_meteor"}
"""Every start of METEOR's program takes seconds."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in METRICS])
def test_parts_are_scored_as_if_they_were_all(name):
    if missing([name]):
        pytest.skip(f"{name} {missing([name])[name]}")
    outputs = ["the mask is live #### 1", "a weight is a dead one", "", "all live weights"]
    references = [["the mask lives #### 1", "a mask"], ["a dead weight"], ["nothing"], ["all weights are alive", "all of them"]]
    found = score_parts([name], outputs, references, ["a", "b", "a", "b"])
    assert found[""] == score([name], outputs, references)
    for part, rows in (("a", (0, 2)), ("b", (1, 3))):
        alone = score([name], [outputs[k] for k in rows], [references[k] for k in rows])
        assert found[part][name] == pytest.approx(alone[name])


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if isinstance(metric, Additive)])
def test_sums_are_over_examples(name):
    """A resample that takes the second example twice is scored as a split that has it twice."""
    if missing([name]):
        pytest.skip(f"{name} {missing([name])[name]}")
    metric = METRICS[name]
    outputs, references = ["the mask is live", "a b c d e"], [["the mask is alive", "masks"], ["a b c d f", "a"]]
    resampled = metric.of_sums(np.array([1.0, 2.0]) @ metric.sums(outputs, references))
    assert resampled == pytest.approx(metric.score([outputs[0], outputs[1], outputs[1]], [references[0], references[1], references[1]]))


def test_rouge_l_by_hand():
    #  "a b c d" and "a x c": LCS "a c" = 2, precision 2/4, recall 2/3, F1 = 4/7; the second reference is worse
    assert one("rouge_l", ["a b, C d!"], [["A x c", "z"]]) == pytest.approx(100 * 4 / 7)
    assert one("rouge_l", ["a b c d", "q"], [["a x c"], ["r"]]) == pytest.approx(50 * 4 / 7)
    assert one("rouge_l", ["été"], [["été"]]) == 100


def test_lcs_is_the_longest_common_subsequence():
    def subsequences(words):
        return {tuple(pick) for size in range(len(words) + 1) for pick in combinations(words, size)}

    for a, b in (("abcbdab", "bdcaba"), ("aaaa", "aa"), ("abc", "xyz"), ("", "abc"), ("abcd", "abcd")):
        assert lcs(a, b) == lcs(b, a) == max(map(len, subsequences(a) & subsequences(b)))


def test_edits_are_the_fewest():
    for a, b, number in (("kitten", "sitting", 3), ("", "abc", 3), ("abc", "abc", 0), ("flaw", "lawn", 2), ("ab", "ba", 2)):
        assert edits(a, b) == edits(b, a) == number


def test_word_error_rate_by_hand():
    #  one substitution of 3 words, and of the second the nearer reference: one deletion of 4
    assert one("wer", ["a b x", "c d e"], [["a b c"], ["q", "c d e f"]]) == pytest.approx(100 * 2 / 7)
    assert one("wer", ["a b c d e f"], [["x"]]) == pytest.approx(600)
    assert one("cer", ["abx  d", "xy"], [["abc d"], ["xy", "q"]]) == pytest.approx(100 * 1 / 7)


def test_whispers_normalisers_are_transformers():
    said, right = ["Hello, WORLD! [laughs]", "it's twenty one"], [["hello world"], ["It is 21."]]
    assert one("wer", said, right) == pytest.approx(100 * (3 + 3) / 5)
    assert one("wer_basic", said, right) == pytest.approx(100 * 3 / 5)  # it s twenty one, it is 21
    assert one("wer_english", said, right) == one("cer_english", said, right) == 0
    assert one("cer_basic", ["Ein Haus."], [["ein haus"]]) == 0


def test_bleu_by_hand():
    #  4-gram precisions of 5 of 6 words, in order: 5/6, 4/5, 3/4, 2/3; the lengths are equal
    wanted = 100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25
    for name in ("bleu", "webnlg_bleu", "e2e_bleu"):
        assert one(name, ["a b c d e x"], [["a b c d e f"]]) == pytest.approx(wanted)
    for name in ("bleu", "webnlg_bleu"):
        assert one(name, ["A b c d e x"], [["a b c d e f"]]) < wanted
    assert one("e2e_bleu", ["A b c d e x"], [["a b c d e f"]]) == pytest.approx(wanted)
    assert one("e2e_bleu", ["a b c x y z"], [["a b c d e f"]]) == 0 < one("bleu", ["a b c x y z"], [["a b c d e f"]])


def test_nist_by_hand():
    #  all 4 words are matched, each log2(4 / 1) bits in 4 words; no longer n-gram is in the reference: bits 8 / 4 words, full length
    assert one("e2e_nist", ["a b c d"], [["b a d c"]]) == pytest.approx(2.0)
    #  half as long: words 2 bits each, their bigram log2(1 / 1) = 0 bits; factor exp(-b ln(1/2)^2), b = ln 2 / ln(1.5)^2
    factor = np.exp(-np.log(2) / np.log(1.5) ** 2 * np.log(0.5) ** 2)
    assert one("e2e_nist", ["a b"], [["a b c d"]]) == pytest.approx(2.0 * factor)


def test_examples_may_differ_in_their_number_of_references():
    outputs = ["one two three four", "five six seven eight"]
    references = [["one two three four"], ["no", "five six seven eight", "nothing"]]
    for name in ("bleu", "chrf", "e2e_bleu"):
        assert one(name, outputs, references) == pytest.approx(100)
        assert one(name, outputs, [["one two three four"], ["no"]]) < 95


def test_exact_match_ignores_spaces_at_the_ends_only():
    assert one("exact_match", [" a b", "A b", "c"], [["a b"], ["a b"], ["d", "c "]]) == pytest.approx(200 / 3)
    assert one("accuracy", [" a b", "A b", "c"], [["a b"], ["a b"], ["d"]]) == pytest.approx(200 / 3)


def test_gsm8k_compares_final_numbers():
    outputs = ["so 2 #### 1,200", "#### 7 apples", "the answer is 3", "#### 5"]
    assert one("gsm8k", outputs, [["x\n#### 1200"], ["#### 7"], ["#### 3"], ["#### 6"]]) == 50


def test_what_is_missing_is_said_and_not_replaced(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(scripts.importlib.util, "find_spec", lambda name: name != "pyter" or None)
    absent = missing(METRICS)
    assert set(absent) == {"e2e_meteor", "e2e_rouge_l", "e2e_cider", "webnlg_meteor", "webnlg_ter"}
    assert "needs Java" in absent["e2e_meteor"]
    assert "needs the Python package pyter: pip install 'raysparse[metrics]'" in absent["webnlg_ter"]
    assert score(["e2e_meteor", "bleu"], ["a b c d"], [["a b c d"]]) == {"bleu": pytest.approx(100)}


@pytest.fixture(scope="module")
def official():
    folder = SHARED / "metrics_reference"
    if not folder.is_dir():
        pytest.skip("the reference outputs are not on this machine")
    return folder, json.loads((folder / "values.json").read_text())


def of_script(folder, name):
    references = next(folder.glob(f"{name}/references.txt*"))
    blocks = "\n".join(lines(references)).strip().split("\n\n")
    return lines(folder / name / "hypothesis.txt")[: len(blocks)], [block.split("\n") for block in blocks]


def of_webnlg(folder):
    outputs = lines(folder / "webnlg_example" / "hypothesis.txt.gz")[:1862]
    streams = [lines(folder / "webnlg_example" / f"reference{k}.txt.gz")[:1862] for k in range(4)]
    return outputs, [[text for text in right if text.strip()] for right in zip(*streams, strict=True)]


@pytest.mark.parametrize(("name", "size"), [("e2e_example10", 10), ("e2e_dev_mlp", 547)])
def test_values_of_e2es_script(official, name, size):
    """Outputs of real systems; the script prints 4 digits of all but the percentages."""
    folder, values = official
    outputs, references = of_script(folder, name)
    assert len(outputs) == size
    wanted = values[name]["official_perl"]
    found = score(["e2e_bleu", "e2e_nist", "e2e_meteor", "e2e_rouge_l", "e2e_cider", "rouge_l", "bleu"], outputs, references)
    for key, script, scale in (
        ("e2e_bleu", "BLEU", 100), ("e2e_nist", "NIST", 1), ("e2e_meteor", "METEOR", 100), ("e2e_rouge_l", "ROUGE_L", 100),
        ("e2e_cider", "CIDEr", 1),
    ):  # fmt: skip
        if key in found:
            assert found[key] / scale == pytest.approx(wanted[script], abs=5e-5), key
    others = values["other_libraries"][name]
    assert found["bleu"] / 100 == pytest.approx(others["sacrebleu 13a lc=False smooth=exp"], abs=5e-5)
    # rouge-score takes letters with accents for spaces, which moves a few words
    assert found["rouge_l"] / 100 == pytest.approx(others["rouge-score rougeL F max-ref stem=False"], abs=1e-3)


def test_values_of_webnlgs_script(official):
    folder, values = official
    found = score(["webnlg_bleu", "webnlg_meteor"], *of_webnlg(folder))
    wanted = values["webnlg_example"]["official_generation_eval"]
    assert found["webnlg_bleu"] == pytest.approx(wanted["BLEU"], abs=0.005)
    if "webnlg_meteor" in found:
        assert found["webnlg_meteor"] / 100 == pytest.approx(wanted["METEOR"], abs=5e-7)


@pytest.mark.slow
def test_ter_of_webnlgs_script(official):
    """A minute: pyter3 tries every shift."""
    folder, values = official
    if missing(["webnlg_ter"]):
        pytest.skip(f"webnlg_ter {missing(['webnlg_ter'])['webnlg_ter']}")
    wanted = values["webnlg_example"]["official_generation_eval"]["TER"]
    assert one("webnlg_ter", *of_webnlg(folder)) / 100 == pytest.approx(wanted, abs=5e-7)


def test_words_are_those_of_nltk_3_5():
    if missing(["webnlg_ter"]):
        pytest.skip(f"webnlg_ter {missing(['webnlg_ter'])['webnlg_ter']}")
    texts = ("Madrid–Barajas is it. He's 'Tudor' in style.", "It isn't 'a b' (or so); 3,000 metres.")
    assert [scripts.nltk_words(text) for text in texts] == [
        ["Madrid–Barajas", "is", "it", ".", "He", "'s", "'Tudor", "'", "in", "style", "."],
        ["It", "is", "n't", "'", "a", "b", "'", "(", "or", "so", ")", ";", "3,000", "metres", "."],
    ]
