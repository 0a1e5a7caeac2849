"""Analyses of models and runs: what fine-tuning moved, what the weights and topologies are like, what sparsity cost which task."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raysparse.config import ConfigError
from raysparse.recipes import masks
from raysparse.recipes.evaluate import model_folder
from raysparse.report import Run, dense_twin, parent_of, percent, read_run
from raysparse.report.analysis import Analysis, layer_label, lines_by_sparsity, magnitude_bands, overlap_bars
from raysparse.report.difference import loss_difference, task_difference
from raysparse.report.distance import block_weights, cosine_distances
from raysparse.report.plots import distance_maps
from raysparse.report.table import Block
from raysparse.tasks.metrics import LOWER_IS_BETTER

QUANTILES = {"q01": 0.01, "q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95, "q99": 0.99}


def distance(paths: Sequence[str]) -> Analysis:
    """``1 - cos`` of each weight before and after fine-tuning, of pairs of a pre-trained and a fine-tuned model (SPDF, section 5).

    Raises:
        ConfigError: an odd number of paths, or no models there, or a pair of different models.
    """
    if not paths or len(paths) % 2:
        raise ConfigError(f"Expected pairs of a pre-trained and a fine-tuned model. Got {len(paths)} paths. Name them in pairs.")
    folders = [_model(path) for path in paths]
    pairs = dict(zip(_labels(paths[1::2]), zip(folders[::2], folders[1::2], strict=True), strict=True))
    found = {label: cosine_distances(*pair) for label, pair in pairs.items()}
    modules = list(dict.fromkeys(name.partition(".")[2] for of in found.values() for name in of))
    rows = [(module, *(cell for of in found.values() for cell in _distance_cells(of, module))) for module in modules]
    columns = ("module", *(f"{word}: {label}" for label in found for word in ("mean", "largest", "in layer")))
    notes = (
        "1 - cos of the flattened matrix before and after fine-tuning, mean and largest over the layers. WQ, WK, WV, WD: query, key, value "
        "and output of the attention; WI, WO: first and second linear of the MLP (SPDF's names).",
    )
    facts = {"what": "distance", "pairs": {label: {"pretrained": str(a), "finetuned": str(b)} for label, (a, b) in pairs.items()}}
    block = Block("What fine-tuning moved", columns, tuple(rows), notes)
    return Analysis("distance", facts | {"distances": found}, block, distance_maps(found))


def weights(path: str) -> Analysis:
    """How many weights of each matrix are not zero, and how large these are."""
    folder = _model(path)
    rows = []
    for name, weight in block_weights(folder):
        layer, _, module = name.partition(".")
        live = weight.double().flatten()
        live = live[live != 0].numpy()
        size = np.abs(live)
        quantiles = dict(zip(QUANTILES, np.quantile(size, list(QUANTILES.values())).tolist(), strict=True)) if len(live) else {}
        told = {"mean": float(size.mean()), "std": float(live.std()), "largest": float(size.max())} if len(live) else {}
        about: dict[str, Any] = {"name": name, "layer": int(layer), "module": module, "shape": list(weight.shape), "size": weight.numel()}
        rows.append(about | {"nnz": len(live), "density": len(live) / weight.numel(), "magnitude": quantiles | told})
    columns = ("weight", "shape", "nnz", "density", "std", "|w| median", "1 %", "99 %", "largest")
    cells = tuple(
        (row["name"], " x ".join(map(str, row["shape"])), f"{row['nnz']:,}", f"{row['density']:.4f}", *_sizes(row)) for row in rows
    )
    notes = (f"Weights of {folder} that are not zero: nnz, their share, and their sizes.",)
    facts = {"what": "weights", "model": str(folder), "weights": rows}
    return Analysis("weights", facts, Block("Live weights and their magnitudes", columns, cells, notes), magnitude_bands(rows))


def overlap(a: str, b: str) -> Analysis:
    """How many weights two topologies share, beside what two random ones of their densities would: ``|a| |b| / size`` of them."""
    runs = Path("runs")
    found = masks.diff(masks.find(a, runs), masks.find(b, runs))
    size = {layer["name"]: int(np.prod(layer["shape"])) for layer in masks.count(masks.find(a, runs))["layers"]}
    layers: list[dict[str, Any]] = [layer | _chance(layer, size[layer["name"]]) for layer in found["layers"]]
    total = {key: sum(layer[key] for layer in layers) for key in ("only_a", "only_b", "both", "expected")}
    whole: dict[str, Any] = {"name": "all", **total, **masks.overlap(total["only_a"], total["only_b"], total["both"])}
    whole["chance"] = _jaccard(total["only_a"] + total["both"], total["only_b"] + total["both"], total["expected"])
    columns = ("layer", "live in A", "live in B", "in both", "by chance", "Jaccard", "by chance")
    cells: list[tuple[str, ...]] = []
    for row in [*layers, whole]:
        counts = (row["only_a"] + row["both"], row["only_b"] + row["both"], row["both"], round(row["expected"]))
        cells.append((layer_label(row["name"]), *(f"{count:,}" for count in counts), f"{row['jaccard']:.4f}", f"{row['chance']:.4f}"))
    notes = (f"A: {found['a']}. B: {found['b']}. By chance: two random topologies of as many live weights a layer, in expectation.",)
    facts = {"what": "overlap", "a": found["a"], "b": found["b"], "all": whole, "layers": layers}
    return Analysis("overlap", facts, Block("Overlap of two topologies", columns, tuple(cells), notes), overlap_bars(layers))


def finetuning(folders: Sequence[str]) -> Analysis:
    """Sparse models fine-tuned densely (masks lifted) and sparsely (masks kept), beside the dense model (SPDF, Fig. 2)."""
    runs = _runs(folders)
    rows: list[dict[str, Any]] = []
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    unit: dict[str, str] = {}
    for task, model in _tasks(runs):
        own = [run for run in runs if _key(run) == (task, model)]
        base = _best([run for run in own if _parent_sparsity(run, runs) == 0 and run.sparsity == 0])
        title = f"{task}, {model}"
        for sparsity in sorted({known for run in own if (known := _parent_sparsity(run, runs))}):
            of = [run for run in own if _parent_sparsity(run, runs) == sparsity]
            dense, sparse = _best([run for run in of if run.sparsity == 0]), _best([run for run in of if run.sparsity > 0])
            if dense is None or sparse is None:
                continue
            told = {"dense": dense, "sparse": sparse} | ({} if base is None else {"base": base})
            row: dict[str, Any] = {"task": task, "model": model, "metric": dense.summary["task"]["primary"], "sparsity": sparsity}
            row |= {kind: {"run": run.name, "score": run.score} for kind, run in told.items()}
            differences = {"sparse_minus_dense": task_difference(sparse, dense)}
            if base is not None:
                differences |= {"dense_minus_base": task_difference(dense, base), "sparse_minus_base": task_difference(sparse, base)}
            rows.append(row | {name: vars(one) | {"text": one.text(2)} for name, one in differences.items()})
            unit[title] = row["metric"]
            for kind, name in (("dense", "dense fine-tuning (masks lifted)"), ("sparse", "sparse fine-tuning (masks kept)")):
                points = panels.setdefault(title, {}).setdefault(name, [] if base is None else [(0.0, base.score)])
                points.append((sparsity, row[kind]["score"]))
    if not rows:
        raise ConfigError(
            "Expected for one task and sparse model a run with sparsity.masks=lift and one with keep, and their pre-training run "
            f"beside them. Got {_told(runs)}. Name more runs."
        )
    columns = (
        "task",
        "model",
        "metric",
        "sparsity",
        "dense model",
        "dense-FT",
        "- dense model",
        "sparse-FT",
        "- dense model",
        "- dense-FT",
    )
    cells = tuple(
        (
            *(row["task"], row["model"], row["metric"], percent(row["sparsity"]), f"{row['base']['score']:.2f}" if "base" in row else "–"),
            *(f"{row['dense']['score']:.2f}", row.get("dense_minus_base", {}).get("text", "–")),
            *(f"{row['sparse']['score']:.2f}", row.get("sparse_minus_base", {}).get("text", "–"), row["sparse_minus_dense"]["text"]),
        )
        for row in rows
    )
    notes = (
        "Dense-FT: masks lifted, every weight trains (SPDF). Sparse-FT: masks kept. Of several runs of a kind the one that validates best. "
        "≈: the 95 % interval by paired bootstrap over test examples holds zero; ?: not judged.",
    )
    block = Block("Sparse against dense fine-tuning", columns, cells, notes)
    picture = lines_by_sparsity(panels, unit, "Task score over sparsity, dense and sparse fine-tuning")
    return Analysis("finetuning", {"what": "finetuning", "rows": rows}, block, picture)


def difficulty(folders: Sequence[str]) -> Analysis:
    """What sparsity costs each task: relative drop of its score against the dense model, by sparsity and model size."""
    runs = _runs(folders)
    rows: list[dict[str, Any]] = []
    for run in [run for run in runs if run.verb == "finetune" and _parent_sparsity(run, runs)]:
        twin = dense_twin(run, runs)
        if twin is None:
            continue
        sign = -1 if run.summary["task"]["primary"] in LOWER_IS_BETTER else 1
        score, loss = task_difference(run, twin), loss_difference(run, twin)
        row: dict[str, Any] = {
            "task": run.summary["task"]["name"],
            "model": _model_size(run),
            "parameters": run.summary["model"]["parameters"],
        }
        row |= {"sparsity": _parent_sparsity(run, runs), "masks": "kept" if run.sparsity else "lifted", "run": run.name, "dense": twin.name}
        row |= {"metric": run.summary["task"]["primary"], "score": run.score, "dense_score": twin.score}
        row |= {"drop": 100 * sign * (twin.score - run.score) / twin.score if twin.score else float("nan")}
        rows.append(row | {"difference": vars(score) | {"text": score.text(2)}, "loss": vars(loss) | {"text": loss.text(4)}})
    if not rows:
        raise ConfigError(
            "Expected fine-tuning runs of sparse models, and of the dense model of the same size on the same task. "
            f"Got {_told(runs)}. Name the missing runs, their pre-training runs beside them."
        )
    means = {task: np.nanmean([row["drop"] for row in rows if row["task"] == task]) for task in {row["task"] for row in rows}}
    rows.sort(key=lambda row: (-means[row["task"]], row["parameters"], row["sparsity"], row["masks"]))
    columns = ("task", "model", "sparsity", "masks", "metric", "score", "dense", "difference", "drop, %", "loss difference")
    cells = tuple(
        (
            *(row["task"], row["model"], percent(row["sparsity"]), row["masks"], row["metric"], f"{row['score']:.2f}"),
            *(f"{row['dense_score']:.2f}", row["difference"]["text"], f"{row['drop']:.2f}", row["loss"]["text"]),
        )
        for row in rows
    )
    notes = (
        "Tasks in order of their mean drop, the hardest hit first. Drop: how much worse than the dense model, in per cent of its score. "
        "≈: the 95 % interval holds zero; ?: not judged.",
    )
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        line = panels.setdefault(row["model"], {}).setdefault(f"{row['task']}, masks {row['masks']}", [(0.0, 0.0)])
        line.append((row["sparsity"], row["drop"]))
    block = Block("What sparsity costs each task", columns, cells, notes)
    picture = lines_by_sparsity(panels, dict.fromkeys(panels, "worse than dense (%)"), "Drop of the task score over sparsity, by task")
    return Analysis("difficulty", {"what": "difficulty", "rows": rows}, block, picture)


KINDS: dict[str, Callable[..., Analysis]] = {
    "distance": distance,
    "weights": weights,
    "overlap": overlap,
    "finetuning": finetuning,
    "difficulty": difficulty,
}


def analyze(what: str, paths: Sequence[str]) -> Analysis:
    """One of `KINDS` of as many paths as it takes."""
    if (count := {"weights": 1, "overlap": 2}.get(what)) is not None:
        if len(paths) != count:
            raise ConfigError(f"Expected {count} path{'s' * (count > 1)} for `raysparse analyze {what}`. Got {len(paths)}. See --help.")
        return KINDS[what](*paths)
    return KINDS[what](paths)


def _model(path: str) -> Path:
    """The folder of a model in Hugging Face format that `path` names: that, or what a finished run exported."""
    place = next((place for place in (Path(path).expanduser(), Path("runs") / path) if place.exists()), Path(path))
    folder = Path(model_folder(str(place)))
    if not folder.is_dir():
        raise ConfigError(f"Expected a finished run or a model folder at {path}. Got nothing there, nor in runs/. Check the path.")
    return folder


def _labels(paths: Sequence[str]) -> list[str]:
    names = [Path(path).name for path in paths]
    return [name if names.count(name) == 1 else path for name, path in zip(names, paths, strict=True)]


def _distance_cells(distances: Mapping[str, float], module: str) -> tuple[str, str, str]:
    """Mean and largest distance of a module, and the layer of the largest, counted from 1."""
    own = {int(name.partition(".")[0]): value for name, value in distances.items() if name.partition(".")[2] == module}
    most = max(own, key=lambda layer: own[layer], default=0)
    return (f"{np.mean(list(own.values())):.5f}", f"{own[most]:.5f}", str(most + 1)) if own else ("–", "–", "–")


def _sizes(row: dict[str, Any]) -> tuple[str, ...]:
    told = row["magnitude"]
    return tuple(f"{told[key]:.3g}" if told else "–" for key in ("std", "q50", "q01", "q99", "largest"))


def _chance(layer: dict[str, Any], size: int) -> dict[str, float]:
    a, b = layer["only_a"] + layer["both"], layer["only_b"] + layer["both"]
    expected = a * b / size
    return {"expected": expected, "chance": _jaccard(a, b, expected)}


def _jaccard(a: int, b: int, both: float) -> float:
    return both / (a + b - both) if a + b else 1.0


def _runs(folders: Sequence[str]) -> list[Run]:
    """The runs, and the pre-training runs beside them that they name as parents."""
    places = [masks.find(folder, Path("runs")) for folder in folders]
    if not places:
        raise ConfigError("Expected folders of finished runs. Got none. Name some.")
    runs = {place: read_run(place) for place in dict.fromkeys(places)}
    for place, run in list(runs.items()):
        beside = place.parent / (run.summary.get("parent") or ".")
        if run.verb == "finetune" and beside not in runs and (beside / "summary.json").is_file():
            runs[beside] = read_run(beside)
    return list(runs.values())


def _tasks(runs: Sequence[Run]) -> list[tuple[str, str]]:
    return sorted({_key(run) for run in runs if run.verb == "finetune"})


def _key(run: Run) -> tuple[str, str]:
    return (run.summary["task"]["name"], _model_size(run)) if run.verb == "finetune" else ("", "")


def _model_size(run: Run) -> str:
    model = run.summary["model"]
    return f"{re.sub('LMHeadModel|ForCausalLM', '', model['class'])}, {model['parameters'] / 1e6:,.1f} M"


def _parent_sparsity(run: Run, runs: Sequence[Run]) -> float | None:
    parent = parent_of(run, runs) if run.verb == "finetune" else None
    return None if parent is None else parent.sparsity


def _best(runs: Sequence[Run]) -> Run | None:
    return min(runs, key=lambda run: (run.validation_loss, run.name), default=None)


def _told(runs: Sequence[Run]) -> str:
    words = []
    for run in runs:
        if run.verb == "finetune":
            parent, sparsity = run.summary.get("parent"), _parent_sparsity(run, runs)
            known = f"parent {parent}, {'not found' if sparsity is None else percent(sparsity)}"
            words.append(f"{run.name} ({run.summary['task']['name']}, {known}, masks {'kept' if run.sparsity else 'lifted'})")
    return "; ".join(words) or "no fine-tuning run"
