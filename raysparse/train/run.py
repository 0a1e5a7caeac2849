"""What the loop sees of the world outside: who am I, where do I write, and whom do I tell."""

import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from pydantic import Field, field_validator

from raysparse.config import Config, ConfigError
from raysparse.sparsity.agenda import TopologyUpdate
from raysparse.sparsity.manager import MaskManager, Verdict, Vote
from raysparse.train.metrics import Console
from raysparse.train.process import Signals


class RunConfig(Config):
    """Name, place and size of a run. The same name again resumes it; another config under a used name is refused."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder of the run below `folder`, and its name on the cluster."""
    folder: str = "runs"
    """Where runs are kept; on several nodes a path that all of them share."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Masks, initial weights and data order are functions of it."""
    workers: int | tuple[int, int] = 1
    """Ray Train workers, one process and (on CUDA) one GPU each. Divides training.sequences. [least, most]: as many as the cluster has
    room for at the time; the run goes on with fewer when nodes are lost, and with more when they come (docs/distributed.md)."""
    threads: int = Field(1, ge=1)
    """CPU threads of each worker; results on CPUs are bit-equal only at equal numbers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where the workers have GPUs, else cpu."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation; weights and optimizer state are float32 always. auto: bfloat16 on CUDA, float32 on CPU."""
    parity: bool = False
    """Rank 0 carries the whole batch, the others add exact zeros: slow, but bit-equal at any number of workers. For checking."""
    grace_s: float = Field(60.0, gt=0)
    """How long workers on Ray may take to save and leave when the command is told to end (SIGTERM); then it ends without them."""
    max_failures: int = Field(3, ge=0)
    """How often lost workers are replaced, each time from the last checkpoint; a run that has saved a newer one since is replaced as often
    again, so that a long run outlives any number of losses. 0: never."""
    hang_timeout_s: float = Field(600.0, gt=0)
    """A worker whose micro-batch takes longer, or that does not answer for so long, hangs and is replaced as if it were lost. Workers of
    a run in this process (--local) are not watched."""

    @field_validator("workers", mode="before")
    @classmethod
    def _check_workers(cls, value: Any) -> Any:
        sizes = list(value) if isinstance(value, list | tuple) else [value, value]
        if len(sizes) != 2 or not all(type(size) is int for size in sizes) or not 1 <= sizes[0] <= sizes[1]:
            raise ValueError("Expected a number of at least 1, or [least, most] of such")
        return value

    @property
    def path(self) -> Path:
        return Path(self.folder).expanduser().absolute() / self.name

    @property
    def elastic(self) -> bool:
        """Whether the number of workers follows the cluster."""
        return not isinstance(self.workers, int)

    @property
    def sizes(self) -> range:
        """The numbers of workers that a group may have."""
        least, most = (self.workers, self.workers) if isinstance(self.workers, int) else self.workers
        return range(least, most + 1)

    def check_fixed(self, why: str) -> None:
        """Raise a `ConfigError` if the number of workers may change, which makes no sense here."""
        if not isinstance(self.workers, int):
            raise ConfigError(f"Expected one number as run.workers: {why}. Got {list(self.workers)}. Use run.workers={self.workers[1]}.")


class Manager(Protocol):
    """`MaskManager`, wherever it is; its docstrings hold. `view`, for people, is not called by ranks."""

    def begin(
        self,
        nonce: str,
        agenda: dict[str, Any],
        world_size: int,
        version: int,
        votes: Sequence[Vote],
        history: str,
    ) -> Verdict: ...

    def decide(self, step: int) -> TopologyUpdate: ...

    def commit(self, attempt: int, version: int, step: int, votes: Sequence[Vote], seconds: float, skipped: str | None) -> Verdict: ...

    def published(self, attempt: int, version: int, checkpoint: str) -> None: ...

    def history(self) -> list[dict[str, Any]]: ...

    def text(self, first: int, stop: int) -> str: ...


class Run(Protocol):
    """One rank's view of a run; `raysparse.runtime` has the one over Ray Train."""

    rank: int
    world_size: int
    node: str
    """Names the machine that this rank is on."""
    is_watched: bool
    """Whether a hanging step ends this process: nobody debugs it, and somebody sees it end."""

    def committed(self, checkpoint: Path, metrics: dict[str, float]) -> None:
        """Every rank calls this once for each checkpoint, in the same order, when its saving has begun."""

    def manager(self, journal: Path) -> Manager:
        """Who decides and audits the topology that `journal` records; only rank 0 asks."""
        ...

    def show(self, record: Mapping[str, Any]) -> None:
        """Show a training record, or ``{"text": ...}``, to the user; only rank 0's are shown."""

    def say(self, text: str) -> None:
        """Show a line to the user, whichever rank says it."""

    def heeding(self) -> AbstractContextManager[None]:
        """Inside, whoever tells the run to end is heeded by `leaving`."""
        ...

    def leaving(self) -> bool:
        """Whether this rank was told to save and leave; asked in every step. One rank that says so is enough."""
        ...


class LocalRun:
    """The ranks of the default process group: this process alone, or torchrun's."""

    def __init__(self, console: Console, committed: Callable[[Path], None] | None = None) -> None:
        """Args:
        committed: is told of each checkpoint on rank 0, as `Run.committed` is.
        """
        self.rank, self.world_size, self._console = dist.get_rank(), dist.get_world_size(), console
        self.node, self.is_watched = platform.node(), self.world_size > 1
        self._committed, self._signals = committed, Signals()

    def committed(self, checkpoint: Path, metrics: dict[str, float]) -> None:
        if self._committed is not None and self.rank == 0:
            self._committed(checkpoint)

    def manager(self, journal: Path) -> Manager:
        return MaskManager(journal)

    def show(self, record: Mapping[str, Any]) -> None:
        if self.rank == 0:
            self._console.show(record)

    def say(self, text: str) -> None:
        self._console.show({"text": text})

    def heeding(self) -> AbstractContextManager[None]:
        return self._signals.heeded()

    def leaving(self) -> bool:
        return self._signals.seen


def resolve_device(config: RunConfig) -> str:
    """The device type of this process."""
    if config.device != "auto":
        return config.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_dtype(config: RunConfig, device: str) -> torch.dtype:
    if config.precision == "auto":
        return torch.bfloat16 if device == "cuda" else torch.float32
    return torch.bfloat16 if config.precision == "bfloat16" else torch.float32
