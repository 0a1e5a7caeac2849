"""Masks on disk: read them, count them, compare two sets of them, show what became of a run's; weights are never read.

Masks are bit-packed, [rows, ceil(cols / 8)] uint8 (`topology.pack`), under the names and in the [out, in] layout of the training
model: in ``masks.safetensors`` of an exported model, and in checkpoints as ``mask/<name>``.
"""

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raysparse.config import ConfigError
from raysparse.kernels.bits import unpack
from raysparse.recipes.export import MASKS
from raysparse.sparsity.distribution import Shape
from raysparse.sparsity.manager import MaskManager
from raysparse.sparsity.topology import Rows, Topology
from raysparse.sparsity.vote import digest
from raysparse.train import checkpoint
from raysparse.train.state import HISTORY

_POPCOUNT = torch.tensor([value.bit_count() for value in range(256)])


def find(path: str, folder: Path) -> Path:
    """What `path` names: a file or folder, or a run below `folder`."""
    here, below = Path(path).expanduser().absolute(), folder.expanduser().absolute() / path
    for place in (here, below) if "/" in path else (below, here):
        if place.exists():
            return place
    raise ConfigError(
        f"Expected a run, a checkpoint, an exported model or a {MASKS} at {path}. Got nothing there, nor in {folder}. Check the path."
    )


def read_masks(path: str, folder: Path) -> dict[str, Tensor]:
    """Name -> whole bit-packed mask, [rows, ceil(cols / 8)] uint8, of what `path` names.

    Args:
        path: a masks file, an exported model, a checkpoint, or a run: its newest undamaged checkpoint or, without any, its export.
        folder: where a run is looked for by its name.

    Raises:
        ConfigError: nothing there, or no masks in it (a dense model), or they cannot be read.
    """
    return _read(_place(find(path, folder)))


def nnz_of_bits(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Live weights of each bit-packed mask."""
    return {name: int((torch.bincount(bits.flatten(), minlength=256) * _POPCOUNT).sum()) for name, bits in masks.items()}


def count(found: Path) -> dict[str, Any]:
    """Shape and live weights of every layer of what was found (see `read_masks`), and `Topology.digest` of its masks.

    The digest is None of a masks file without its export's sparsity.json, which has the order of the layers.
    """
    place = _place(found)
    masks, known = _read(place), _known_shapes(place)
    shapes = {name: _shape(bits, known.get(name)) for name, bits in masks.items()}
    order = [name for name in known if name in masks] if masks.keys() <= known.keys() else None
    nnz = nnz_of_bits(masks)
    live, size = sum(nnz.values()), sum(map(prod, shapes.values()))
    history = MaskManager(place / HISTORY).view() if place.is_dir() else None
    planned = {} if history is None else {layer["name"]: {"planned": layer["planned"]} for layer in history["layers"]}
    return {
        "masks": str(place),
        "nnz": live,
        "total": size,
        "sparsity": 1 - live / size,
        "digest": None if order is None else digest(order, (digest_sum(name, masks[name], shapes[name]) for name in order)),
        "layers": [{"name": name, "shape": list(shapes[name]), "nnz": nnz[name]} | planned.get(name, {}) for name in order or masks],
        "history": history,
    }


def diff(a: Path, b: Path) -> dict[str, Any]:
    """Of every layer how many weights live only in `a`, only in `b` and in both, and the Jaccard index, both / any.

    Raises:
        ConfigError: see `read_masks`; or the masks are of different weights.
    """
    places = [_place(a), _place(b)]
    one, two = map(_read, places)
    wrong = sorted(one.keys() ^ two.keys()) or [name for name in one if one[name].shape != two[name].shape]
    if wrong:
        raise ConfigError(
            f"Expected masks of the same weights in {places[0]} and {places[1]}. Got {len(wrong)} that differ in name or shape, such as "
            f"{wrong[0]}. Compare masks of one model and one sparse set."
        )
    both, only_a, only_b = (
        nnz_of_bits({name: operation(one[name], two[name]) for name in one})
        for operation in (torch.bitwise_and, lambda x, y: x & ~y, lambda x, y: y & ~x)
    )
    layers = [{"name": name, **overlap(only_a[name], only_b[name], both[name])} for name in one]
    return {
        "a": str(places[0]),
        "b": str(places[1]),
        **overlap(*(sum(counts.values()) for counts in (only_a, only_b, both))),
        "layers": layers,
    }


def has_history(found: Path) -> bool:
    """Whether `found` is the folder of a run with a topology that has begun."""
    return (found / HISTORY).exists() and not (found / checkpoint.MARKER).exists()


def recorded(folder: Path) -> dict[str, Any]:
    """`MaskManager.view` of a run's topology as its journal has it."""
    return MaskManager(folder / HISTORY).view()


def show_view(view: Mapping[str, Any]) -> str:
    """`MaskManager.view` as text, with `source`: ``live`` and ``seconds``, or ``disk`` and ``why``."""
    published = view["published"]
    source = f"live, {view['seconds']:.1f} s" if view["source"] == "live" else f"from disk: {view['why']}"
    lines = [
        f"source      {source}",
        *_state(view),
        f"checkpoint  {'none yet' if published is None else 'version {version} in {checkpoint}'.format(**published)}",
        f"digest      {view['now']['digest']}",
        "",
        *_layer_table(view["layers"]),
        "",
        *_updates(view),
    ]
    return "\n".join(lines)


def _state(view: Mapping[str, Any]) -> list[str]:
    now = view["now"]
    return [
        f"version     {now['version']} of {view['updates']}, made in step {now['step']:,} of {view['steps']:,}, phase {now['phase']}",
        f"attempt     {view['attempt']}, on {view['world_size']} workers",
        f"sparsity    {now['sparsity']:.6f}",
        f"churn       {now['churn']:.4f} of the live weights came to life in the last update",
        f"explored    {now['explored']:.4f} of the sparse weights are or were alive",
    ]


def _updates(view: Mapping[str, Any]) -> list[str]:
    lines = ["version         step  phase                 sparsity   churn  explored   drop  seconds"]
    for r in view["last"]:
        lines.append(
            f"{r['version']:>7,} {r['step']:>12,}  {r['phase']:<20.20}  {r['sparsity']:.6f}  {r['churn']:.4f}    {r['explored']:.4f}  "
            f"{r['drop_fraction']:.3f} {r['seconds']:>8.3f}{'' if r['skipped'] is None else '  unchanged: ' + r['skipped']}"
        )
    return lines


def show_count(facts: Mapping[str, Any]) -> str:
    """What `count` found as text."""
    digest = facts["digest"] or f"unknown without the sparsity.json of the export that {MASKS} is of"
    lines = [
        f"masks       {facts['masks']}",
        f"live        {facts['nnz']:,} of {facts['total']:,} sparse weights (sparsity {facts['sparsity']:.6f})",
        f"digest      {digest}",
        *(_state(facts["history"]) if facts["history"] else []),
        "",
        *_layer_table(facts["layers"]),
        *(["", *_updates(facts["history"])] if facts["history"] else []),
    ]
    return "\n".join(lines)


def show_diff(facts: Mapping[str, Any]) -> str:
    """What `diff` found as text."""
    rows = [*facts["layers"], {"name": "all", **facts}]
    width = max(len(row["name"]) for row in rows)
    lines = [f"A  {facts['a']}", f"B  {facts['b']}", "", f"{'layer':<{width}} {'only in A':>14} {'only in B':>14} {'in both':>14}  Jaccard"]
    lines += [f"{r['name']:<{width}} {r['only_a']:>14,} {r['only_b']:>14,} {r['both']:>14,}   {r['jaccard']:.4f}" for r in rows]
    return "\n".join(lines)


def _layer_table(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line a layer; where there is a plan, beside it."""
    width, planned = max(len(layer["name"]) for layer in layers), "planned" in layers[0]
    lines = [f"{'layer':<{width}} {'shape':>16} {'live':>14}{' ' * 8 + 'planned' if planned else ''}  sparsity"]
    for layer in layers:
        rows, cols = layer["shape"]
        plan = f" {layer['planned']:>14,}" if planned else ""
        lines.append(f"{layer['name']:<{width}} {f'{rows} x {cols}':>16} {layer['nnz']:>14,}{plan}  {1 - layer['nnz'] / (rows * cols):.6f}")
    return lines


def overlap(only_a: int, only_b: int, both: int) -> dict[str, Any]:
    """These counts, and the Jaccard index: both / any."""
    union = only_a + only_b + both
    return {"only_a": only_a, "only_b": only_b, "both": both, "jaccard": both / union if union else 1.0}


def _place(found: Path) -> Path:
    """The masks file or checkpoint folder that holds the masks of what was found."""
    if found.is_file():
        return found
    if (found / checkpoint.MARKER).exists():
        if (problem := checkpoint.damage(found)) is not None:
            raise ConfigError(f"Expected an undamaged checkpoint at {found}. Got: {problem}. Use another one.")
        return found
    finished = (found / "summary.json").exists() and (found / "export" / MASKS).exists()
    if not finished and (newest := checkpoint.newest(found / "checkpoints")) is not None:
        return newest  # a finished run may have gone back to an earlier version than its newest checkpoint's
    for file in (found / MASKS, found / "export" / MASKS):
        if file.exists():
            return file
    raise ConfigError(
        f"Expected masks in {found}: a checkpoint, {MASKS} or export/{MASKS}. Got none: it is dense, or has no checkpoint yet. "
        "Name a sparse run, a checkpoint, an exported model or a masks file."
    )


def _read(place: Path) -> dict[str, Tensor]:
    return _from_file(place) if place.is_file() else _from_checkpoint(place)


def _from_file(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(str(file), "pt") as stored:
            names = stored.keys()
            slices = [stored.get_slice(name) for name in names]
            odd = [name for name, bits in zip(names, slices, strict=True) if bits.get_dtype() != "U8" or len(bits.get_shape()) != 2]
            masks = {} if odd else {name: stored.get_tensor(name) for name in names}
            problem = f"{odd[0]}, which is none" if odd else "an empty file"
    except SafetensorError as error:
        masks, problem = {}, str(error)
    if not masks:
        raise ConfigError(f"Expected bit-packed masks, [rows, bytes] uint8, in {file}. Got: {problem}. Name a {MASKS} of raysparse.")
    return masks


def _from_checkpoint(folder: Path) -> dict[str, Tensor]:
    masks = checkpoint.read_masks(folder)
    if not masks:
        raise ConfigError(f"Expected masks in the checkpoint {folder}. Got a dense model. Name a checkpoint of a sparse run.")
    return masks


def _known_shapes(place: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights in model order, as the checkpoint, or the export around a masks file, tells them."""
    if place.is_dir():
        return checkpoint.sparse_shapes(place)
    facts = place.with_name("sparsity.json")
    return {name: tuple(found["shape"]) for name, found in json.loads(facts.read_text())["tensors"].items()} if facts.exists() else {}


def _shape(bits: Tensor, known: tuple[int, ...] | None) -> tuple[int, int]:
    """[rows, cols] of a mask: as known, or turned as exports store some weights; else all columns of its bytes."""
    rows, width = bits.shape
    shapes = [] if known is None else [known, known[::-1]]
    return next(((r, cols) for r, cols in shapes if (r, -(-cols // 8)) == (rows, width)), (rows, 8 * width))


def digest_sum(name: str, bits: Tensor, shape: Shape) -> int:
    """`Topology.digest_sums` of one whole layer."""
    rows, cols = shape
    return int(Topology({name: shape}, {name: Rows(0, rows, cols)}, {name: unpack(bits, cols)}).digest_sums())
