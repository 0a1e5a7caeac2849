"""A run minus its dense twin, and whether that is more than noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raysparse.config import ConfigError
from raysparse.report import Run
from raysparse.tasks.metrics import METRICS, Additive


@dataclass(frozen=True)
class Difference:
    """A run minus its dense twin; ``low`` and ``high`` bound it with 95 % confidence, None where that is not known."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def within_noise(self) -> bool | None:
        return None if self.low is None or self.high is None else self.low <= 0 <= self.high

    def text(self, digits: int) -> str:
        return f"{self.value:+.{digits}f}" + {None: " ?", True: " ≈", False: ""}[self.within_noise]


def paired_bootstrap(
    metric: str,
    ours: Sequence[str],
    theirs: Sequence[str],
    references: Sequence[Sequence[str]],
    resamples: int = 1000,
    seed: int = 0,
) -> Difference:
    """A metric of ``ours`` minus that of ``theirs`` with its 95 % percentile interval (Koehn 2004, EMNLP, section 3).

    Every resample draws as many examples as there are, with replacement, the same ones for both systems. The metric of a corpus
    is a function of sums over its examples (BLEU, chrF: n-gram matches and counts; ROUGE-L, exact match: the scores
    themselves; `Additive`), so the text is read once and a resample is a weighted sum ``[N] @ [N, sums]``.

    Args:
        metric: one that is `Additive`.
        ours, theirs: [N] outputs for the same N examples.
        references: [N], one or more texts each.
    """
    if not len(ours) == len(theirs) == len(references) or not references:
        raise ConfigError(
            f"Expected outputs of two systems for the same examples. Got {len(ours)}, {len(theirs)} and {len(references)} "
            "references. Evaluate both on the same split."
        )
    (first, second), whole = _resampled(metric, (ours, theirs), references, resamples, seed)
    low, high = np.percentile(first - second, [2.5, 97.5]).tolist()
    return Difference(whole[0] - whole[1], low, high)


def _resampled(
    metric: str, systems: Sequence[Sequence[str]], references: Sequence[Sequence[str]], resamples: int = 1000, seed: int = 0
) -> tuple[np.ndarray, list[float]]:
    """Scores of each system on every resample, [systems, resamples], and on all examples."""
    additive = _additive(metric)
    assert additive is not None, metric
    all_sums = np.stack([additive.sums(outputs, references) for outputs in systems])
    n, generator = len(references), np.random.default_rng(seed)
    scores = np.empty((len(systems), resamples))
    for k in range(resamples):
        weight = np.bincount(generator.integers(n, size=n), minlength=n)
        scores[:, k] = [additive.of_sums(total) for total in weight @ all_sums]
    return scores, [additive.of_sums(total) for total in all_sums.sum(axis=1)]


def resampled_scores(runs: Sequence[Run], resamples: int = 1000) -> np.ndarray | None:
    """The primary metric of each run of one task on resamples of its test examples, the same ones for all: [runs, resamples].

    None where the metric is not `Additive` or a run left no predictions.
    """
    if not runs or _additive(metric := runs[0].summary["task"]["primary"]) is None or any(run.predictions is None for run in runs):
        return None
    for run in runs[1:]:
        _check_references(run, runs[0])
    systems = [[hypothesis for hypothesis, _ in run.predictions or ()] for run in runs]
    scores, whole = _resampled(metric, systems, [references for _, references in runs[0].predictions or ()], resamples)
    for run, score in zip(runs, whole, strict=True):
        if abs(score - run.score) > 0.1:
            raise ConfigError(
                f"Expected the {metric} {run.score:.2f} of {run.name} from its predictions. Got {score:.2f}. "
                "predictions.jsonl belongs to another split or scorer: evaluate again."
            )
    return scores


def score_interval(run: Run) -> str:
    """The 95 % bootstrap interval of a run's primary metric, as text; a dash where it cannot be judged."""
    metric = run.summary["task"]["primary"]
    if run.predictions is None or _additive(metric) is None:
        return "–"
    scores, _ = _resampled(metric, [[text for text, _ in run.predictions]], [texts for _, texts in run.predictions])
    low, high = np.percentile(scores[0], [2.5, 97.5])
    return f"{low:.2f} to {high:.2f}"


def _additive(metric: str) -> Additive | None:
    """The metric where its noise can be judged on this machine, from sums over examples."""
    found = {name: one for name, one in METRICS.items() if isinstance(one, Additive)}.get(metric)  # pyrefly: ignore
    return found if found is not None and found.missing() is None else None


def loss_difference(run: Run, twin: Run) -> Difference:
    """Validation loss of ``run`` minus that of ``twin``, judged by ``loss.validation_stderr`` (over windows) if both have it.

    The two errors are taken as independent: +-1.96 sqrt(a^2 + b^2). Both runs read the same windows, so the interval is too
    wide rather than too narrow.
    """
    value = run.validation_loss - twin.validation_loss
    errors = [side.summary["loss"].get("validation_stderr") for side in (run, twin)]
    if None in errors or math.isnan(value):
        return Difference(value)
    half = 1.96 * math.hypot(*errors)
    return Difference(value, value - half, value + half)


def task_difference(run: Run, twin: Run) -> Difference:
    """Primary metric of ``run`` minus that of ``twin``, judged by `paired_bootstrap` where both kept predictions."""
    value = run.score - twin.score
    metric = run.summary["task"]["primary"]
    if _additive(metric) is None or run.predictions is None or twin.predictions is None:
        return Difference(value)
    _check_references(run, twin)
    ours, theirs = ([hypothesis for hypothesis, _ in side.predictions or ()] for side in (run, twin))
    judged = paired_bootstrap(metric, ours, theirs, [references for _, references in run.predictions])
    if abs(judged.value - value) > 0.1:
        raise ConfigError(
            f"Expected the {metric} difference {value:+.2f} of {run.name} and {twin.name} from their predictions. "
            f"Got {judged.value:+.2f}. predictions.jsonl belongs to another split or scorer: evaluate again."
        )
    return Difference(value, judged.low, judged.high)


def _check_references(run: Run, twin: Run) -> None:
    ours, theirs = ([references for _, references in side.predictions or ()] for side in (run, twin))
    if ours != theirs:
        raise ConfigError(
            f"Expected predictions of {run.name} and {twin.name} for the same references. Got different ones. "
            "Evaluate both on the same split."
        )
