"""How far fine-tuning moved each weight matrix: the subspace analysis of SPDF (arXiv:2303.10464, section 5).

The distance of a matrix before and after is ``1 - <a, b> / (|a| |b|)`` over its flattened elements, in float64: 0 where only
the length changed, 1 where the two are orthogonal. Folders are what `save_pretrained` writes; one matrix is read at a time.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from raysparse.config import ConfigError

MODULES = ("WQ", "WK", "WV", "WD", "WI", "WO")
"""SPDF's names: query, key, value and output projection of the attention, first and second linear of the MLP."""

# The module's name inside its block -> SPDF's names of its parts, and the axis they lie along ([in, out] in GPT-2's Conv1D).
_PARTS: dict[str, tuple[tuple[str, ...], int]] = {
    "attn.c_attn": (("WQ", "WK", "WV"), 1),
    "attn.c_proj": (("WD",), 0),
    "mlp.c_fc": (("WI",), 0),
    "mlp.c_proj": (("WO",), 0),
    "self_attn.q_proj": (("WQ",), 0),
    "self_attn.k_proj": (("WK",), 0),
    "self_attn.v_proj": (("WV",), 0),
    "self_attn.o_proj": (("WD",), 0),
    "mlp.up_proj": (("WI",), 0),
    "mlp.down_proj": (("WO",), 0),
}
_BLOCK = re.compile(r"(?:^|.*\.)(?:h|layers)\.(?P<layer>\d+)\.(?P<module>.+)\.weight$")


class HeatMap(NamedTuple):
    """Distances arranged for a picture: ``values[module][layer]``, None where a layer has no such module."""

    modules: tuple[str, ...]
    layers: tuple[int, ...]
    values: tuple[tuple[float | None, ...], ...]


def cosine_distances(before: str | Path, after: str | Path) -> dict[str, float]:
    """Distance of every block-linear weight of two exported Hugging Face folders, by layer and name: ``{"0.WQ": 0.002}``.

    GPT-2's fused c_attn counts as its three thirds. A further matrix of a block keeps its own name (``0.mlp.gate_proj``).

    Raises:
        ConfigError: a folder without safetensors, two folders of different models, no block linears, or a matrix that is all
            zero, of which there is no angle.
    """
    with ExitStack() as stack:
        first, second = _open(Path(before), stack), _open(Path(after), stack)
        names = [name for name in first if _BLOCK.match(name) and len(first[name].get_slice(name).get_shape()) == 2]
        if not names:
            raise ConfigError(f"Expected weights of numbered blocks in {before}. Got none. Name an exported folder.")
        distances: dict[str, float] = {}
        for name in names:
            if name not in second or first[name].get_slice(name).get_shape() != second[name].get_slice(name).get_shape():
                raise ConfigError(
                    f"Expected {name} with the same shape in {before} and {after}. Got another or none. "
                    "Compare a model with its own fine-tuned copy."
                )
            for part, a, b in _parts(name, first[name].get_tensor(name), second[name].get_tensor(name)):
                distances[part] = _distance(part, a, b)
    return dict(sorted(distances.items(), key=lambda item: _place(item[0])))


def block_weights(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """(layer and name, ``0.WQ``, the matrix) of every block-linear weight of a Hugging Face folder, one at a time."""
    with ExitStack() as stack:
        files = _open(Path(folder), stack)
        names = [name for name in files if _BLOCK.match(name) and len(files[name].get_slice(name).get_shape()) == 2]
        if not names:
            raise ConfigError(f"Expected weights of numbered blocks in {folder}. Got none. Name an exported folder.")
        for name in sorted(names, key=lambda name: (int(_BLOCK.match(name)["layer"]), name)):  # pyrefly: ignore
            weight = files[name].get_tensor(name)
            for part, values, _ in _parts(name, weight, weight):
                yield part, values


def heat_map(distances: Mapping[str, float]) -> HeatMap:
    """The arrangement [module x layer] of SPDF's figure: `MODULES` first, then what else there is by name."""
    layers = sorted({_place(name)[0] for name in distances})
    modules = {name.partition(".")[2]: None for name in sorted(distances, key=lambda name: _place(name)[1:])}
    values = tuple(tuple(distances.get(f"{layer}.{module}") for layer in layers) for module in modules)
    return HeatMap(tuple(modules), tuple(layers), values)


def _open(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Every tensor's name -> the open file it lies in; nothing is read yet."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ConfigError(f"Expected {', '.join(missing)} in {folder}. Got none there. Name a folder that raysparse exported.")
    opened = [stack.enter_context(safe_open(folder / file, framework="pt")) for file in files]
    return {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (not a mapping)


def _parts(name: str, a: Tensor, b: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    found = _BLOCK.match(name)
    assert found is not None
    layer, module = found["layer"], found["module"]
    parts, axis = _PARTS.get(module, ((module,), 0))
    for part, ours, theirs in zip(parts, a.chunk(len(parts), axis), b.chunk(len(parts), axis), strict=True):
        yield f"{layer}.{part}", ours, theirs


def _distance(name: str, a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    lengths = (a.norm() * b.norm()).item()
    if lengths == 0:
        raise ConfigError(f"Expected a weight {name} that is not all zero. Got zeros, which have no angle. Lower the sparsity.")
    return max(0.0, 1 - (a @ b).item() / lengths)


def _place(name: str) -> tuple[int, int, str]:
    layer, _, module = name.partition(".")
    return int(layer), MODULES.index(module) if module in MODULES else len(MODULES), module
