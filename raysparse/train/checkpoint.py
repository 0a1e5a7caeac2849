"""Checkpoints: weights, moments, bit-packed masks and counters in one distributed checkpoint, saved on N ranks, loaded on M.

Of a weight that has a mask the live elements alone are stored, row by row: those of the rows that a rank holds under
``model/<name>/<first of these rows>``. So are its moments (``exp_avg``, ``exp_avg_sq``), unless a phase keeps moments of dead weights.
``rows/<name>`` tells how many live in each row, from which another number of ranks finds what is its own. Everything else is whole:
``model/<name>``, ``mask/<name>``, ``ever/<name>``. Frozen weights have no moments.

A checkpoint is a folder ``step_00000100``. Its marker ``COMMITTED.json`` is written last, by rank 0, with the size and CRC-32 of
every file: a folder without a marker, or that differs from it, is not a checkpoint. Until then it has a name that only this start of
the run writes to: ranks of an earlier one, half dead perhaps, cannot touch what is committed. Randomness and the data position are
functions of (seed, step), so the step is all of their state.

Weights, moments and masks change only where the optimizer steps. So a background thread copies them while the next forward and
backward passes read them, and `Checkpointer.staged` is what the step waits for: mostly for nothing.
"""

import json
import logging
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import Field
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from raysparse.config import Config, ConfigError
from raysparse.kernels.adamw import MOMENTS
from raysparse.kernels.bits import pack, unpack
from raysparse.kernels.live import Live
from raysparse.length import Length
from raysparse.sparsity.agenda import Agenda
from raysparse.sparsity.distribution import Shape
from raysparse.sparsity.topology import Topology
from raysparse.train.optimizer import moments, set_masks, state_of
from raysparse.train.persist import persist
from raysparse.train.reading import Reader, read
from raysparse.train.shard import Sharded

log = logging.getLogger(__name__)
MARKER = "COMMITTED.json"
KINDS = ("model", *MOMENTS)
"""Of tensors that are stored by their live elements where there is a mask."""


class CheckpointConfig(Config):
    """When to save, and how many to keep. The last step is always saved."""

    every: Length = "1000 steps"
    """Between checkpoints: '1000 steps', '100M tokens', '10 %'."""
    keep: int = Field(2, ge=1)
    """Older checkpoints are deleted when a newer one is committed."""
    asynchronous: bool = True
    """Copy and write in a background thread while training goes on; the copy takes as much memory as the checkpoint has bytes."""
    patience_s: float = Field(120.0, ge=0)
    """How long a save that fails (disk full, storage away) is tried again in the background before it is given up. Training goes on
    meanwhile, until the next save is due. Three given up in a row, or the last one of a run, are an error (docs/faults.md)."""


class Checkpointer:
    """Saves and loads the state of a run below ``folder``. One save is in flight at most; every rank makes the same calls."""

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        sharded: Sharded,
        optimizer: Optimizer,
        topology: Topology | None,
        agenda: Agenda,
        guard: Callable[[], None] = lambda: None,
        tell: Callable[[str], None] = log.warning,
    ):
        """Args:
        guard: raises a `TrainingError` if the folder is somebody else's by now; rank 0 asks before it touches anything.
        tell: is told on rank 0 that a save is tried again.
        """
        self._folder, self._config = folder, config
        self._sharded, self._optimizer, self._topology = sharded, optimizer, topology
        self._kinds = ("mask", "ever") if agenda.update_steps else ("mask",)  # masks that never change are all that ever lived
        self._live = () if topology is None else ("model",) if agenda.keeps_moments else KINDS
        # A group of its own, so that it never mixes with the training's; patient, because rank 0 reads whole files.
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timedelta(hours=1)))
        own = [secrets.token_hex(4)]
        dist.broadcast_object_list(own, src=0, group=self._group)
        self._own = own[0]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[str | None] | None = None
        self._guard, self._tell = guard, tell
        self._staged = Event()
        self._staged.set()

    def save(self, step: int, extra: Mapping[str, Any], protect: int = 0, notes: Callable[[], Mapping[str, Iterable[str]]] = dict) -> Path:
        """Begin to save; returns the folder, which is a checkpoint once it is committed (`wait`).

        Older checkpoints than the newest ``keep`` are deleted after that, save the one of step `protect`.

        Args:
            extra: plain data, the same on every rank; ``optimizer_steps`` is how often the optimizer has stepped.
            notes: file name -> pieces of text, to lie in the checkpoint; called on rank 0, in the background.
        """
        self.wait()
        path = self.path(step)
        shapes = {} if self._topology is None else self._topology.shapes
        text = json.dumps(dict(extra) | {"step": step, "shapes": shapes})
        self._staged.clear()
        self._pending = self._thread.submit(self._write, path, text, protect, notes)
        if not self._config.asynchronous:
            wait([self._pending])
        return path

    def staged(self) -> None:
        """Until the save in flight has its copy: from here on weights, moments and masks may change. `wait` tells if it failed."""
        self._staged.wait()

    def path(self, step: int) -> Path:
        return self._folder / f"step_{step:08d}"

    def wait(self) -> str | None:
        """Until the save in flight is committed, or given up: what went wrong with it, the same on every rank."""
        pending, self._pending = self._pending, None
        return None if pending is None else pending.result()

    def newest(self) -> Path | None:
        """`newest` of the folder, as rank 0 finds it: one reader of all files is enough, and all ranks go on from the same."""
        found: list[Path | ConfigError | None] = [None]
        if dist.get_rank() == 0:
            try:
                found = [newest(self._folder)]
            except ConfigError as error:
                found = [error]
        dist.broadcast_object_list(found, src=0, group=self._group)
        if isinstance(found[0], ConfigError):
            raise found[0]
        return found[0]

    def load(self, path: Path) -> dict[str, Any]:
        """Load a checkpoint into the weights, optimizer and topology; returns what was saved as ``extra``.

        Raises:
            ConfigError: it is of another model.
        """
        self.staged()
        stored = self._check(path)
        counts = {f"rows/{name}": torch.empty(shape[0], 1, dtype=torch.int32) for name, shape in self._packed().items()}
        state: dict[str, Any] = self._whole() | counts | {"extra": ""}
        read(state, path, self._group)
        extra = json.loads(state["extra"])
        for part in self._sharded.parts.values():
            if part.mine:
                state_of(self._optimizer)[part.local]["step"].fill_(extra["optimizer_steps"])
        if self._topology is not None:
            rows = self._topology.rows
            masks, *ever = ({name: unpack(_local(state[f"{kind}/{name}"]), rows[name].cols) for name in rows} for kind in self._kinds)
            self._topology.replace(masks, ever[0] if ever else masks)
            set_masks(self._sharded, self._optimizer, self._topology)
            for kind in self._live:
                self._load_live(path, kind, stored, counts)
        return extra

    def _check(self, path: Path) -> dict[str, tuple[int, ...]]:
        """Compare names and whole shapes; DCP's own loading fails late, and would leave what it has loaded until then.

        Returns:
            Key -> shape of every stored tensor.
        """
        stored = stored_shapes(path)
        found: dict[str, Any] = {key: "live weights" if key.count("/") == 2 else shape for key, shape in stored.items()}
        found = {"/".join(key.split("/")[:2]): shape for key, shape in found.items() if not key.startswith("rows/")}
        parts = self._sharded.parts
        kept = [(kind, name) for kind in KINDS for name, part in parts.items() if kind == "model" or part.trained]
        expected: dict[str, Any] = {f"{kind}/{name}": parts[name].shape for kind, name in kept}
        if self._topology is not None:
            packed = {name: (rows, -(-cols // 8)) for name, (rows, cols) in self._topology.shapes.items()}
            expected |= {f"{kind}/{name}": size for kind in self._kinds for name, size in packed.items()}
            expected |= {f"{kind}/{name}": "live weights" for kind, name in kept if self._is_packed(kind, name)}
        wrong = [key for key in [*expected, *sorted(found.keys() - expected.keys())] if found.get(key) != expected.get(key)]
        if wrong:
            shown = ", ".join(f"{key} {found.get(key, 'missing')} instead of {expected.get(key, 'nothing')}" for key in wrong[:3])
            raise ConfigError(
                f"Expected {path} to be a checkpoint of this model. Got {len(wrong)} tensors that differ: {shown}. "
                "Choose another run.name, or go back to the model, the sparsity and the raysparse that the checkpoint was made with."
            )
        return stored

    def _whole(self) -> dict[str, Any]:
        """Key -> tensor that shares memory with the live one (masks: packed copies, or room for them), of all that is stored whole."""
        values = {key: found for key, found in self._values() if not self._is_packed(*key)}
        if self._topology is not None:
            kinds = {"mask": self._topology.masks, "ever": self._topology.ever}
            values |= {(kind, name): pack(mask) for kind in self._kinds for name, mask in kinds[kind].items()}
        return {f"{kind}/{name}": self._sharded.stored(name, value) for (kind, name), value in values.items()}

    def _parts(self) -> dict[str, Any]:
        """Key -> live elements of this rank's rows, and how many there are in each row."""
        found: dict[str, Any] = {}
        if self._topology is None:
            return found
        for (kind, name), value in self._values():
            if self._is_packed(kind, name) and self._topology.rows[name].count:
                live = value if value.ndim == 1 else self._topology.live(name).take(value)
                found[f"{kind}/{name}/{self._sharded.parts[name].first}"] = live
        for name, mask in self._topology.masks.items():
            found[f"rows/{name}"] = self._sharded.stored(name, mask.sum(1, keepdim=True, dtype=torch.int32))
        return found

    def _load_live(self, path: Path, kind: str, stored: Mapping[str, tuple[int, ...]], counts: Mapping[str, Tensor]) -> None:
        """Fill the live elements of this rank's rows from the parts that hold some of them."""
        assert self._topology is not None
        for (which, name), value in self._values():
            if which != kind or not self._is_packed(kind, name):
                continue
            rows, live = self._topology.rows[name], self._topology.live(name)
            starts = [0, *counts[f"rows/{name}"].flatten().cumsum(0).tolist()]  # of each row among all live weights
            begin, end = starts[rows.first] if rows.count else 0, starts[rows.first + rows.count] if rows.count else 0
            target = value if value.ndim == 1 else value.new_empty(live.nnz)
            parts: dict[str, Tensor] = {}
            moves: list[tuple[str, slice, slice]] = []
            for key in [key for key in stored if key.startswith(f"{kind}/{name}/")]:
                (size,), offset = stored[key], starts[int(key.rpartition("/")[2])]
                first, last = max(begin, offset), min(end, offset + size)
                if first < last:
                    parts[key] = torch.empty(size)
                    moves.append((key, slice(first - offset, last - offset), slice(first - begin, last - begin)))
            read(parts, path, None)  # weight by weight, for parts are read whole
            for key, there, here in moves:
                target[here] = parts[key][there]
            if target is not value:
                live.put(target, value)

    def _values(self) -> Iterator[tuple[tuple[str, str], Tensor]]:
        """((kind, name), this rank's rows or their live elements) of the weights, and of the moments that this rank has."""
        for name, part in self._sharded.parts.items():
            yield ("model", name), part.local.detach()
        for which in MOMENTS:
            for name, value in moments(self._sharded, self._optimizer, which).items():
                yield (which, name), value

    def _is_packed(self, kind: str, name: str) -> bool:
        return kind in self._live and name in self._packed()

    def _packed(self) -> dict[str, Shape]:
        return {} if self._topology is None else self._topology.shapes

    def _write(self, path: Path, extra: str, protect: int, notes: Callable[[], Mapping[str, Iterable[str]]]) -> str | None:
        """In the background: copy this rank's part, write and commit it; what went wrong, if it was given up, is left nothing of."""
        state, partial = self._copy() | {"extra": extra}, self._folder / f".{path.name}.{self._own}"

        def store() -> None:
            dcp.save(state, checkpoint_id=partial, process_group=self._group)

        def tell(problem: str) -> None:
            self._tell(f"{path.name} could not be written ({problem}); it is tried again for {self._config.patience_s:g} s")

        problem = persist(self._make_way, store, lambda: self._commit(partial, path, notes), self._group, self._config.patience_s, tell)
        if dist.get_rank() == 0:
            self._prune(path, protect) if problem is None else shutil.rmtree(partial, ignore_errors=True)
        return problem

    def _copy(self) -> dict[str, Any]:
        """What this rank stores, as it is now; in synchronous saves it shares memory, for training waits."""
        try:
            with torch.cuda.device_of(next(iter(self._sharded.parts.values())).local):  # threads begin on the first GPU
                state = self._whole() | self._parts()
                if self._config.asynchronous:
                    state = {key: _copied(value) for key, value in state.items()}
            return state
        finally:
            self._staged.set()

    def _make_way(self) -> None:
        """Away with what attempts that died or failed have half-written."""
        self._guard()
        for left in self._folder.glob(".step_*"):
            shutil.rmtree(left)

    def _commit(self, partial: Path, path: Path, notes: Callable[[], Mapping[str, Iterable[str]]]) -> None:
        """Every rank has written its part: mark it, and give it the name of a checkpoint."""
        for name, text in notes().items():
            with (partial / name).open("w", encoding="utf-8") as stream:
                stream.writelines(text)
        files = {file.name: [file.stat().st_size, crc32(file)] for file in sorted(partial.iterdir())}
        (partial / MARKER).write_text(json.dumps({"files": files}))
        self._guard()
        if path.exists():
            shutil.rmtree(path)  # damaged, or this start would have gone on from it
        partial.rename(path)

    def _prune(self, path: Path, protect: int) -> None:
        older = [checkpoint for checkpoint in committed(self._folder) if checkpoint < path]  # a later one is damaged
        for old in older[: max(0, len(older) + 1 - self._config.keep)]:
            if old != self.path(protect):
                shutil.rmtree(old, ignore_errors=True)  # what stays goes with the next one


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Key -> shape of each tensor in a checkpoint, as the top of this file names them."""
    entries = Reader(path).read_metadata().state_dict_metadata
    return {key: tuple(entry.size) for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def extra_of(path: Path) -> dict[str, Any]:
    """What a checkpoint was saved with as ``extra``, its ``step``, and the ``shapes`` of the weights that have masks."""
    state = {"extra": ""}
    read(state, path, None)
    return json.loads(state["extra"])


def read_masks(path: Path) -> dict[str, Tensor]:
    """Name -> whole mask, [rows, ceil(cols / 8)] uint8; empty for a dense model."""
    state = {key: torch.empty(shape, dtype=torch.uint8) for key, shape in stored_shapes(path).items() if key.startswith("mask/")}
    if state:
        read(state, path, None)
    return {key.removeprefix("mask/"): bits for key, bits in state.items()}


def sparse_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that have masks. Before live elements were stored alone, those of the whole weights told them."""
    told = extra_of(path).get("shapes")
    stored = stored_shapes(path)
    names = [key.removeprefix("mask/") for key in stored if key.startswith("mask/")]
    return {name: tuple(told[name]) if told else stored[f"model/{name}"] for name in names}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Name -> whole weight with its zeros, float32, whatever number of ranks wrote it."""
    state = {key: torch.empty(shape) for key, shape in stored_shapes(path).items() if key.startswith("model/")}
    read(state, path, None)
    weights = {key.removeprefix("model/"): value for key, value in state.items() if key.count("/") == 1}
    masks, shapes = read_masks(path), sparse_shapes(path)
    for name in [name for name in masks if name not in weights]:
        parts = {int(key.rpartition("/")[2]): value for key, value in state.items() if key.startswith(f"model/{name}/")}
        live = torch.cat([parts[first] for first in sorted(parts)])
        weights[name] = Live(unpack(masks[name], shapes[name][1])).put(live)
    return weights


def committed(folder: Path) -> list[Path]:
    """Checkpoint folders with a marker, oldest first; their files are not looked at."""
    return sorted(marker.parent for marker in folder.glob(f"step_*/{MARKER}"))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        files = json.loads((checkpoint / MARKER).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its marker {MARKER} cannot be read ({error})"
    for name, (size, crc) in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if crc32(file) != crc:
            return f"{name} has another checksum than when it was written"
    return None


def newest(folder: Path) -> Path | None:
    """The newest undamaged checkpoint, with a warning for each damaged one passed over; None where there is none at all.

    Raises:
        ConfigError: there are checkpoints, and all of them are damaged: starting anew would overwrite them.
    """
    found = committed(folder)
    problems = []
    for checkpoint in reversed(found):
        if (problem := damage(checkpoint)) is None:
            return checkpoint
        problems.append(f"{checkpoint.name}: {problem}")
        log.warning("Checkpoint %s is damaged (%s); falling back to the one before.", checkpoint, problem)
    if problems:
        raise ConfigError(
            f"Expected an undamaged checkpoint in {folder}. Got {len(problems)} damaged: {'; '.join(problems)}. "
            "Restore one from a copy, or choose another run.name to start anew."
        )
    return None


def crc32(file: Path) -> int:
    """Of a whole file."""
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _copied(tensor: Tensor) -> Tensor:
    """On the CPU. torch's own stagers copy storages, with Python's lock held: training would stand still although a thread does it."""
    if not isinstance(tensor, DTensor):
        return tensor.to("cpu", copy=True)
    tensor._local_tensor = tensor._local_tensor.to("cpu", copy=True)  # of a DTensor that was made for this checkpoint
    return tensor
