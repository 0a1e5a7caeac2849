"""What a set of finished runs says, beside each other: tables, plots, distances between weights, and one HTML page.

A run is a folder that a recipe wrote: `summary.json` (one object), `metrics.jsonl` (one object a line), of a run with masks
`topology.jsonl` (a header, then one object a version of the topology) and, after fine-tuning, optionally `predictions.jsonl`
(one ``{"hypothesis": str, "references": [str, ...]}`` a test example, in the order of the test set), which is what lets a
difference of two systems be judged.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from raysparse.config import ConfigError

_TEXT = ("raysparse", "verb", "name", "config_digest", "model.class", "sparsity.mask_digest", "flops.convention")
_NUMBERS = (
    *("model.parameters", "loss.train", "loss.validation", "loss.perplexity"),
    *("sparsity.target", "sparsity.actual", "sparsity.of_model", "sparsity.nnz", "sparsity.total"),
    *("flops.counted", "flops.executed", "flops.dense", "flops.reduction", "flops.reduction_without_head"),
    *("steps", "tokens", "seconds", "tokens_per_s", "bytes_sent", "peak_memory_bytes", "workers"),
)
_OTHERS = ("sparsity.layers", "versions")
_OF_MASKS = (
    *("topology.updates", "topology.skipped", "topology.explored"),
    *("topology.mean_density", "topology.mean_attention_density", "flops.reduction_with_updates"),
)
_OF_VERB = {
    "pretrain": ((), ("data.unigram_cross_entropy", "data.train_tokens"), ()),
    "finetune": (("parent", "task.name", "task.primary"), ("task.num_examples",), ("task.scores", "task.baseline")),
}


@dataclass(frozen=True)
class Run:
    """One finished run.

    ``summary`` is `summary.json`; ``train`` and ``validation`` are the two kinds of line of `metrics.jsonl`, in order of
    step; ``history`` are the versions of the topology, the first masks first, empty without masks; ``predictions`` are pairs of
    a hypothesis and its references, or None where the run left none.
    """

    summary: dict[str, Any]
    train: tuple[dict[str, Any], ...] = ()
    validation: tuple[dict[str, Any], ...] = ()
    history: tuple[dict[str, Any], ...] = ()
    predictions: tuple[tuple[str, tuple[str, ...]], ...] | None = None

    @property
    def name(self) -> str:
        return self.summary["name"]

    @property
    def verb(self) -> str:
        return self.summary["verb"]

    @property
    def sparsity(self) -> float:
        """The target: fraction of zeros in the sparse weights; 0 for a dense run."""
        return self.summary["sparsity"]["target"]

    @property
    def seconds(self) -> float:
        return self.summary["seconds"]

    @property
    def counted(self) -> float:
        """Counted training FLOPs of this run alone: what it would take if zeros were skipped."""
        return self.summary["flops"]["counted"]

    @property
    def validation_loss(self) -> float:
        """In nats a token; not a number where the run diverged."""
        return self.summary["loss"]["validation"]

    @property
    def topology(self) -> dict[str, Any]:
        """What the masks went through, as `summary.json` tells it; empty where it tells nothing."""
        return self.summary.get("topology", {})

    @property
    def density(self) -> float:
        """Mean live share of the sparse weights over the steps of the run."""
        return self.topology.get("mean_density", self.summary["sparsity"]["nnz"] / self.summary["sparsity"]["total"])

    @property
    def attention_density(self) -> float:
        """Mean computed share of full causal attention: over the steps, or over the logged ones where the summary tells nothing."""
        logged = [record.get("attention_density", 1.0) for record in self.train]
        return self.topology.get("mean_attention_density", fmean(logged or [1.0]))

    @property
    def evolves(self) -> bool:
        """Whether more than static masks made it sparse: updates of the topology, or sparse attention."""
        return self.topology.get("updates", 0) > 0 or self.attention_density < 1

    @property
    def score(self) -> float:
        """The task's primary metric (fine-tuning runs)."""
        return self.summary["task"]["scores"][self.summary["task"]["primary"]]


def read_run(folder: str | Path) -> Run:
    """The run that lies in ``folder``.

    Lines of `metrics.jsonl` that a resumed run wrote twice count once: the later one.

    Raises:
        ConfigError: a file is missing or malformed, or a key of `summary.json` is missing or of another kind.
    """
    folder = Path(folder)
    summary = _read_summary(folder / "summary.json")
    train: dict[int, dict[str, Any]] = {}
    validation: dict[int, dict[str, Any]] = {}
    for number, record in json_lines(folder / "metrics.jsonl"):
        if "event" in record:  # a fault that the run outlived
            continue
        if "step" not in record or "tokens" not in record or not ({"loss", "validation_loss"} & record.keys()):
            raise ConfigError(
                f"Expected step, tokens and loss or validation_loss in line {number} of {folder / 'metrics.jsonl'}. "
                f"Got {', '.join(record) or 'no keys'}. Mend or remove the line."
            )
        (validation if "validation_loss" in record else train)[record["step"]] = record
    history = tuple(_history(folder / "topology.jsonl")) if (folder / "topology.jsonl").is_file() else ()
    predictions = None
    if (folder / "predictions.jsonl").is_file():
        predictions = tuple(_prediction(folder, number, record) for number, record in json_lines(folder / "predictions.jsonl"))
    in_order = [tuple(kind[step] for step in sorted(kind)) for kind in (train, validation)]
    return Run(summary, in_order[0], in_order[1], history, predictions)


def runs_of(runs: Sequence[Run], verb: str) -> list[Run]:
    """The runs of one verb, dense first, then by sparsity and by that of the parent; equal ones in the order given."""

    def key(run: Run) -> tuple[float, float]:
        parent = parent_of(run, runs)
        return run.sparsity, parent.sparsity if parent else 0.0

    return sorted((run for run in runs if run.verb == verb), key=key)


def parent_of(run: Run, runs: Sequence[Run]) -> Run | None:
    """The pre-training run that a fine-tuning run started from, or None where it is not among ``runs``."""
    parents = [other for other in runs if other.verb == "pretrain" and other.name == run.summary.get("parent")]
    if len(parents) > 1:
        raise ConfigError(f"Expected one pre-training run named {parents[0].name!r}. Got {len(parents)}. Rename or drop one.")
    return parents[0] if parents else None


def dense_twin(run: Run, runs: Sequence[Run]) -> Run | None:
    """The dense run to compare ``run`` with, or None; of several that fit, the one with the lowest validation loss.

    A twin has the same verb and a model of the same class and size, and no sparsity; after fine-tuning it learned the same
    task and its parent is dense too. A dense run whose whole path is dense has no twin: it is one.
    """

    def path(other: Run) -> list[float | None]:
        parent = parent_of(other, runs)
        return [other.sparsity, (parent.sparsity if parent else None) if other.verb == "finetune" else 0.0]

    if path(run) == [0.0, 0.0]:
        return None
    kin = [other for other in runs if _kind(other) == _kind(run) and path(other) == [0.0, 0.0]]
    return min(kin, key=lambda other: (math.isnan(other.validation_loss), other.validation_loss, other.name), default=None)


def end_to_end(run: Run, runs: Sequence[Run]) -> float | None:
    """Counted FLOPs of a fine-tuning run and of the pre-training it started from; None where that is not among ``runs``."""
    parent = parent_of(run, runs)
    return parent.counted + run.counted if parent else None


def reduction(run: Run, runs: Sequence[Run]) -> float | None:
    """How many times fewer counted FLOPs: than the same steps dense after pre-training, than the dense pair after fine-tuning."""
    if run.verb == "pretrain":
        return run.summary["flops"]["dense"] / run.counted
    twin = dense_twin(run, runs) or run
    ours, theirs = end_to_end(run, runs), end_to_end(twin, runs)
    return theirs / ours if ours and theirs else None


def path_of(run: Run, runs: Sequence[Run]) -> str:
    """How a fine-tuned model was trained, such as ``75 % → dense``."""
    parent = parent_of(run, runs)
    return f"{percent(parent.sparsity) if parent else '?'} → {percent(run.sparsity)}"


def percent(sparsity: float) -> str:
    """``dense`` or ``75 %``."""
    return "dense" if sparsity == 0 else f"{100 * sparsity:.4g} %"


def bytes_text(count: float) -> str:
    """``12.3 GB``, powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.95:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _kind(run: Run) -> tuple[Any, ...]:
    model = run.summary["model"]
    return run.verb, model["class"], model["parameters"], run.summary.get("task", {}).get("name")


def _read_summary(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"Expected a run's summary at {path}. Got none there. Name the folder of a finished run.")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"Expected JSON in {path}. Got: {error}. Run it again or mend the file.") from None
    verb = summary.get("verb") if isinstance(summary, dict) else None
    if verb not in _OF_VERB:
        raise ConfigError(f"Expected the verb pretrain or finetune in {path}. Got {verb!r}. Only these runs are compared.")
    texts, numbers, others = _OF_VERB[verb]
    numbers += _OF_MASKS if summary.get("topology") else ()
    kinds = (
        (str, "text", _TEXT + texts),
        ((int, float), "a number", _NUMBERS + numbers),
        ((dict, list), "a list or mapping", _OTHERS + others),
    )
    problems = [
        f"  {key}: expected {words}, got {_at(summary, key)!r}"
        for kind, words, keys in kinds
        for key in keys
        if not isinstance(_at(summary, key), kind) or isinstance(_at(summary, key), bool)
    ]
    if not problems and verb == "finetune" and summary["task"]["primary"] not in summary["task"]["scores"]:
        primary, scores = summary["task"]["primary"], ", ".join(summary["task"]["scores"])
        problems = [f"  task.scores: expected the primary metric {primary}, got {scores or 'none'}"]
    if problems:
        what = "\n".join(problems)
        raise ConfigError(f"Expected a complete summary in {path}. Got:\n{what}\nRun it again with this version.")
    return summary


def _at(summary: Any, key: str) -> Any:
    for part in key.split("."):
        summary = summary.get(part) if isinstance(summary, dict) else None
    return summary


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of every line that is not blank; a `ConfigError` at the first that is no object."""
    if not path.is_file():
        raise ConfigError(f"Expected a file at {path}. Got none there. Name the folder of a finished run.")
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            record, got = None, str(error)
        else:
            got = repr(line[:60])
        if not isinstance(record, dict):
            raise ConfigError(f"Expected a JSON object in line {number} of {path}. Got {got}. Mend or remove the line.")
        yield number, record


def _history(path: Path) -> Iterator[dict[str, Any]]:
    """The versions of the topology, without the header before them."""
    for number, record in json_lines(path):
        keys = {"attempt"} if number == 1 else {"step", "sparsity", "churn"}
        if keys - record.keys():
            raise ConfigError(
                f"Expected {', '.join(sorted(keys))} in line {number} of {path}. Got {', '.join(record) or 'no keys'}. "
                "Restore the file, or remove it: the plots of the topology then say less."
            )
        if number > 1:
            yield record


def _prediction(folder: Path, number: int, record: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    hypothesis, references = record.get("hypothesis"), record.get("references")
    if not isinstance(hypothesis, str) or not isinstance(references, list) or not references:
        raise ConfigError(
            f"Expected a hypothesis and its references in line {number} of {folder / 'predictions.jsonl'}. "
            f"Got {', '.join(record) or 'no keys'}. Mend or remove the file."
        )
    return hypothesis, tuple(map(str, references))
