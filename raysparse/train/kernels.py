"""Which kernels a run's sparse layers use, kept in step with its topology."""

import importlib.util
import json
import math
import os
from collections.abc import Container, Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, Literal, Self, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raysparse.config import ConfigError
from raysparse.kernels import choice, library, tiles
from raysparse.kernels.bits import pack
from raysparse.kernels.choice import Gains
from raysparse.kernels.linear import DENSE, SPARSE, Products, SparseLinear, adopt
from raysparse.sparsity.topology import Topology
from raysparse.train.process import gathered
from raysparse.train.run import Run, RunConfig, resolve_device, resolve_dtype
from raysparse.train.shard import Sharded

KernelMode = Literal["auto", "dense", "sparse"]
FILE = "kernels.json"
"""In a run folder: what was measured. A run that goes on chooses by it, and so computes with the same bits as before."""


def check_kernels(mode: KernelMode, run: RunConfig) -> None:
    """Raise a `ConfigError` if sparse kernels are asked for that this machine cannot run."""
    assert mode in get_args(KernelMode)
    if (wanted := os.environ.get(library.CHOICE, "")) not in ("", "off", *library.VARIANTS):
        raise ConfigError(
            f"Expected {library.CHOICE} to be one of {', '.join(library.VARIANTS)}, off. Got {wanted!r}. Correct it, or unset it."
        )
    if mode != "sparse":
        return
    if resolve_device(run) != "cpu":
        if importlib.util.find_spec("triton") is None:
            raise ConfigError("Expected the package triton for kernels=sparse on a GPU. Got none. Install it, or use kernels=auto.")
        return
    if (reason := library.why_not()) is not None:
        raise ConfigError(
            f"Expected the native kernels for kernels=sparse. Got none: {reason}. "
            f"{library.remedy()} Or use kernels=auto. `raysparse doctor` shows what is there."
        )


def why_not() -> str | None:
    """Why the ranks cannot compute natively, all in the same way; None where they can. Every rank calls this."""
    reason = library.why_not()
    here = library.variant() if reason is None else f"none ({reason})"
    builds = gathered(here) if dist.is_initialized() else [here]
    if len(set(builds)) > 1:
        found = ", ".join(f"rank {rank}: {build}" for rank, build in enumerate(builds))
        return f"The ranks do not share a native library: {found}; {library.CHOICE}=baseline makes them where all have one"
    return None if reason is None else f"There is no native library: {reason}"


class Kernels:
    """The sparse layers of a model in training on one rank.

    On CPUs they skip single weights, on GPUs blocks, where a layer's mask is made of blocks. Without a native library or Triton, with
    ``kernels=dense`` and, where the choice is free, with ``run.parity`` (which promises equal bits on other machines) the layers stay as
    they are.
    """

    def __init__(
        self, layers: Mapping[str, list[SparseLinear]], mode: KernelMode, device: str, dtype: torch.dtype, tokens: int, run: Run, file: Path
    ):
        self._layers, self._mode, self._device, self._dtype, self._tokens = layers, mode, torch.device(device), dtype, tokens
        self._run, self._file = run, file
        self._in_blocks = device != "cpu"
        self._blocks: dict[str, int | None] = {}
        self._wrong: dict[int, str | None] = {}
        self._gains: dict[str, Gains] = {}
        if file.exists():
            self._gains = {name: Gains(**gains) for name, gains in json.loads(file.read_text()).items()}
        self._products: dict[str, Products] = {}
        self._cases: dict[str, str] = {}
        self._shown = ""
        for layer in self._all():
            layer.held = True

    @classmethod
    def install(
        cls,
        model: nn.Module,
        names: Container[str],
        mode: KernelMode,
        config: RunConfig,
        tokens: int,
        run: Run,
        file: Path,
    ) -> Self | None:
        """Adopt the linear layers that hold the named weights, before the model is compiled or sharded; None where all stays dense.

        Args:
            names: of the sparse parameters.
            tokens: of a micro-batch on this rank.
            file: where measurements are kept.
        """
        if mode == "dense" or (mode == "auto" and config.parity):
            return None
        device = resolve_device(config)
        if device != "cpu" and importlib.util.find_spec("triton") is None:
            run.show({"text": "kernels: dense, zeros are multiplied. There is no package triton"})
            return None
        if device == "cpu" and (reason := why_not()) is not None:
            if mode == "sparse":
                raise ConfigError(f"Expected the native kernels on all ranks for kernels=sparse. Got: {reason}. Use kernels=auto.")
            run.show({"text": f"kernels: dense, zeros are multiplied. {reason}"})
            return None
        of = {id(parameter): name for name, parameter in model.named_parameters() if name in names}
        layers: dict[str, list[SparseLinear]] = {}
        for module in list(model.modules()):
            if type(module) is nn.Linear and (name := of.get(id(module.weight))) is not None:
                layers.setdefault(name, []).append(adopt(module))
        return cls(layers, mode, device, resolve_dtype(config, device), tokens, run, file) if layers else None

    def refresh(self, topology: Topology, live: Mapping[str, int], sharded: Sharded) -> None:
        """After the masks have changed: new streams, and where the sparsity is another, a new choice. Every rank calls this.

        Args:
            live: live weights of each layer over all ranks.
        """
        shapes = {name: topology.shapes[name] for name in self._layers}
        sparse = {name for name in self._layers if live[name] < math.prod(shapes[name])}
        self._blocks = dict.fromkeys(sorted(sparse))
        if self._in_blocks:
            self._find_blocks(topology.masks)
            sparse = {name for name in sparse if self._blocks[name] is not None}
        bits = {name: sharded.whole(name, pack(topology.masks[name])).to(self._device) for name in self._layers if name in sparse}
        if self._mode == "auto":
            size = self._tokens
            self._cases = {n: choice.case(bits[n], shapes[n][1], live[n], self._dtype, size, self._blocks[n]) for n in sparse}
            self._measure(bits, shapes)
        for name, layers in self._layers.items():
            products = DENSE
            if name in sparse:
                products = SPARSE if self._mode == "sparse" else self._gains[self._cases[name]].products
            self._products[name] = products
            for layer in layers:
                layer.sparsify(bits[name], self._dtype, products, self._blocks[name]) if products.any else layer.densify()
        self._show()

    def _find_blocks(self, masks: Mapping[str, Tensor]) -> None:
        """Of every sparse layer; none of a size whose kernels give wrong results on any rank's GPU, or do not run there.

        Args:
            masks: this rank's rows; what they are made of on all ranks holds for the layer, for no rank's rows end within a block.
        """
        here = {name: tiles.block_of(masks[name]) or 0 for name in self._blocks}
        found = gathered(here)
        self._blocks = {name: min(of[name] for of in found) or None for name in here}
        for size in sorted({size for size in self._blocks.values() if size is not None} - self._wrong.keys()):
            reasons = gathered(tiles.why_not(self._device, self._dtype, size))
            self._wrong[size] = next((f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason is not None), None)
            if (wrong := self._wrong[size]) is not None:
                self._run.show({"text": f"kernels: blocks of {size} are multiplied whole, their test at the start failed. {wrong}"})
            elif size < tiles.FAST:
                self._run.show(
                    {"text": f"kernels: no speed is to be expected of blocks of {size} on a GPU, of {tiles.FAST} and 128 there is."}
                )
        self._blocks = {name: None if size is None or self._wrong[size] is not None else size for name, size in self._blocks.items()}
        if self._mode == "sparse" and (dense := [name for name, size in self._blocks.items() if size is None]):
            raise ConfigError(
                f"Expected masks in blocks of {', '.join(map(str, tiles.SIZES))} for kernels=sparse on a GPU, and kernels for them that "
                f"pass their test. Got neither for {len(dense)} layers, such as {dense[0]}. Use sparsity.pattern.type=block, or "
                "kernels=auto."
            )

    def begin(self, dense_gradient: bool) -> None:
        """Before the forward passes of a step: the weights may have changed since the last.

        Args:
            dense_gradient: this step's gradients will be looked at where weights are dead.
        """
        for layer in self._all():
            layer.release()
            layer.dense_gradient = dense_gradient

    def executed(self, live: Mapping[str, int], dense_gradient: bool) -> list[dict[str, int]]:
        """Of the forward product, the gradient of the input and that of the weight: live weights of the layers that skip zeros in it.

        Args:
            live: live weights of every sparse layer.
        """

        def skipped_by(which: str) -> dict[str, int]:
            return {name: live[name] for name, products in self._products.items() if getattr(products, which)}

        return [skipped_by("forward"), skipped_by("backward"), {} if dense_gradient else skipped_by("gradient")]

    def facts(self) -> dict[str, Any]:
        """For the summary: the build, and of each product how many layers skip zeros and the median gain of all that were measured."""
        return {"native": self._name(), "mode": self._mode, "layers": len(self._layers)} | {
            which: {"sparse": sparse, "gain": gain} for which, (sparse, gain) in self._totals().items()
        }

    def _measure(self, bits: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Rank 0 measures what was not yet, and tells the others, for all must choose alike."""
        new: dict[str, str] = {case: name for name, case in self._cases.items() if case not in self._gains}
        if self._run.rank == 0 and new:
            for case, name in new.items():
                self._gains[case] = choice.measure(bits[name], shapes[name][1], self._dtype, self._tokens, self._blocks[name])
            partial = self._file.with_suffix(".partial")  # a run that dies here leaves no half a file
            partial.write_text(json.dumps({case: asdict(gains) for case, gains in self._gains.items()}, indent=1) + "\n")
            partial.replace(self._file)
        box = [self._gains]
        dist.broadcast_object_list(box, src=0)
        self._gains = box[0]

    def _name(self) -> str:
        if not self._in_blocks:
            return library.variant()
        return "blocks of " + (" and ".join(str(size) for size in sorted({s for s in self._blocks.values() if s})) or "no size")

    def _totals(self) -> dict[str, tuple[int, float | None]]:
        """Of each product: layers that skip zeros, and the median gain of all that were measured."""
        totals: dict[str, tuple[int, float | None]] = {}
        for which in ("forward", "backward", "gradient"):
            names = [name for name, products in self._products.items() if getattr(products, which)]
            gains = [getattr(self._gains[case], which) for case in self._cases.values()]
            totals[which] = len(names), median(gains) if gains else None
        return totals

    def _show(self) -> None:
        """One line, where it says something new."""
        words = {"forward": "forward", "backward": "input gradient", "gradient": "weight gradient"}
        parts = [
            f"{words[which]} {sparse} of {len(self._layers)}" + (f" ({gain:.1f}x)" if gain else "")
            for which, (sparse, gain) in self._totals().items()
        ]
        text = f"kernels: layers that skip zeros: {', '.join(parts)}; {self._name()}"
        if text != self._shown:
            self._run.show({"text": text})
            self._shown = text

    def _all(self) -> list[SparseLinear]:
        return [layer for layers in self._layers.values() for layer in layers]
