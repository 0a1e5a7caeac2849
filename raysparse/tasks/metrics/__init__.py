"""Scores of generated text over a whole split. A name tells the script whose value it equals; the class says how."""

from collections.abc import Iterable, Sequence
from typing import Literal

from raysparse.tasks.metrics.base import Additive, Metric, References
from raysparse.tasks.metrics.ngrams import Bleu, CharacterBleu, ChineseBleu, Chrf, E2EBleu, Nist, Ter, WebNLGBleu
from raysparse.tasks.metrics.scripts import E2ECider, E2EMeteor, E2ERougeL, WebNLGMeteor, WebNLGTer
from raysparse.tasks.metrics.words import GSM8K, Accuracy, ErrorRate, ExactMatch, RougeL, basic, characters, english

TextMetric = Literal[
    "bleu", "bleu_zh", "bleu_char", "chrf", "ter", "rouge_l", "exact_match", "accuracy", "gsm8k",
    "wer", "cer", "wer_basic", "cer_basic", "wer_english", "cer_english",
    "e2e_bleu", "e2e_nist", "e2e_meteor", "e2e_rouge_l", "e2e_cider", "webnlg_bleu", "webnlg_meteor", "webnlg_ter",
]  # fmt: skip
"""Scores of texts."""

MetricName = Literal[TextMetric, "perplexity"]
"""Perplexity is of the references' tokens under a model, exp of their mean loss: no file of outputs has it."""

METRICS: dict[TextMetric, Metric] = {
    "bleu": Bleu(),
    "bleu_zh": ChineseBleu(),
    "bleu_char": CharacterBleu(),
    "chrf": Chrf(),
    "ter": Ter(),
    "rouge_l": RougeL(),
    "exact_match": ExactMatch(),
    "accuracy": Accuracy(),
    "gsm8k": GSM8K(),
    "wer": ErrorRate(str.split),
    "cer": ErrorRate(characters),
    "wer_basic": ErrorRate(str.split, basic),
    "cer_basic": ErrorRate(characters, basic),
    "wer_english": ErrorRate(str.split, english),
    "cer_english": ErrorRate(characters, english),
    "e2e_bleu": E2EBleu(),
    "e2e_nist": Nist(),
    "e2e_meteor": E2EMeteor(),
    "e2e_rouge_l": E2ERougeL(),
    "e2e_cider": E2ECider(),
    "webnlg_bleu": WebNLGBleu(),
    "webnlg_meteor": WebNLGMeteor(),
    "webnlg_ter": WebNLGTer(),
}

LOWER_IS_BETTER = {"perplexity", *(name for name, metric in METRICS.items() if metric.lower_is_better)}


def missing(names: Iterable[str]) -> dict[str, str]:
    """Of the named scores those that this machine cannot compute, and why."""
    reasons = {name: METRICS[name].missing() for name in names if name in METRICS}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def score(names: Iterable[str], outputs: Sequence[str], references: References) -> dict[str, float]:
    """Each named score of texts that this machine can compute, over all outputs."""
    return score_parts(names, outputs, references, [""] * len(outputs))[""]


def score_parts(names: Iterable[str], outputs: Sequence[str], references: References, parts: Sequence[str]) -> dict[str, dict[str, float]]:
    """The same of every part that examples are said to be in, and of all of them together under ""."""
    assert len(outputs) == len(references) == len(parts) > 0, (len(outputs), len(references), len(parts))
    assert all(references), "every example has a reference"
    names = list(names)
    absent = missing(names)
    rows = {part: [k for k, own in enumerate(parts) if part in ("", own)] for part in dict.fromkeys(["", *parts])}
    found: dict[str, dict[str, float]] = {part: {} for part in rows}
    for name in [name for name in names if name in METRICS and name not in absent]:
        metric = METRICS[name]
        sums = metric.sums(outputs, references) if isinstance(metric, Additive) else None
        for part, chosen in rows.items():
            if isinstance(metric, Additive) and sums is not None:
                found[part][name] = metric.of_sums(sums[chosen].sum(axis=0))
            else:
                found[part][name] = metric.score([outputs[k] for k in chosen], [references[k] for k in chosen])
    return found


__all__ = ["LOWER_IS_BETTER", "METRICS", "Additive", "Metric", "MetricName", "References", "TextMetric", "missing", "score", "score_parts"]
