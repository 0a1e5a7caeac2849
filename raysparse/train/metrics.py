"""What a run says while it trains: metrics.jsonl, TensorBoard, and one line (or a progress bar) on the console."""

import json
import logging
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from raysparse.config import Config
from raysparse.length import Length

log = logging.getLogger(__name__)


class LoggingConfig(Config):
    """How often a run speaks."""

    every: Length = "10 steps"
    """Between console lines, TensorBoard points and metrics.jsonl records: '10 steps', '1M tokens', '1 %'."""
    histograms: Length = "25 %"
    """Between TensorBoard histograms of weights and masks (rank 0's rows); '0 steps' writes none."""
    tensorboard: bool = Field(True)
    """Write TensorBoard event files into the run folder."""


class Meter:
    """Rank 0's pen: appends records to ``metrics.jsonl`` and TensorBoard in the run folder; other ranks write nothing.

    A disk that is full costs no run: lines of ``metrics.jsonl`` are kept and written with a later one, TensorBoard's curves end.
    """

    def __init__(self, folder: Path, config: LoggingConfig, enabled: bool):
        self._folder, self._config, self._enabled = folder, config, enabled
        self._file: Any = None
        self._board: Any = None
        self._unwritten = b""
        self._told = False  # that there is something unwritten

    def begin(self, step: int) -> None:
        """The run goes on after `step`: what is there of later ones, of an attempt that died or was taken back, is dropped."""
        self.close()
        self._unwritten = b""
        if not self._enabled:
            return
        rewind(self._folder, step)
        self._file = (self._folder / "metrics.jsonl").open("ab", buffering=0)
        if self._config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, record: Mapping[str, Any], tags: Mapping[str, float]) -> None:
        """One metrics.jsonl line, and one TensorBoard point for each tag at the record's step."""
        if self._file is not None:
            self._unwritten += json.dumps(dict(record)).encode() + b"\n"
            self._write()
        self.point(record["step"], tags)

    def point(self, step: int, tags: Mapping[str, float]) -> None:
        """TensorBoard points alone."""
        for tag, value in tags.items():
            self._draw("add_scalar", tag, value, step)

    def histograms(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        for tag, tensor in tensors.items():
            if tensor.numel():
                self._draw("add_histogram", tag, tensor.detach().float().cpu(), step)

    def close(self) -> None:
        if self._file is not None:
            self._write()
            self._file.close()
        if self._board is not None:
            self._board.close()
        self._file = self._board = None

    def _write(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not self._told:
                log.warning("metrics.jsonl could not be written (%s): its lines are kept, and written with a later one.", error)
        self._told = bool(self._unwritten)

    def _draw(self, what: Literal["add_scalar", "add_histogram"], tag: str, value: Any, step: int) -> None:
        if self._board is None:
            return
        try:
            getattr(self._board, what)(tag, value, step)
        except OSError as error:  # of the thread that writes, which has ended with it
            log.warning("TensorBoard's files could not be written (%s): its curves end here; metrics.jsonl goes on.", error)
            self._board = None


def rewind(folder: Path, step: int) -> None:
    """Drop the records after `step` from metrics.jsonl: a resumed run writes them again."""
    file = folder / "metrics.jsonl"
    if not file.exists():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:  # the last line of a process that died while writing it
            continue
    partial = file.with_suffix(".partial")
    partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    partial.rename(file)


class Console:
    """Shows a run's records to a person: a progress bar on a terminal, fixed-width lines elsewhere."""

    def __init__(self, stream: Any = None):
        self._stream = stream or sys.stderr
        self._bar: Any = None

    def show(self, record: Mapping[str, Any]) -> None:
        """A record of `train.loop`, or ``{"text": ...}`` for a line of its own."""
        if "text" in record:
            self._print(record["text"])
        elif self._stream.isatty():
            self._advance(record)
        elif "loss" in record:
            self._print(line(record))
        if "validation_loss" in record:
            self._print(f"{record['stage']:>16.16} | step {record['step']:>9,} | validation loss {record['validation_loss']:.4f}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _advance(self, record: Mapping[str, Any]) -> None:
        from tqdm import tqdm

        if "loss" not in record:
            return
        if self._bar is None or self._bar.desc != record["stage"]:
            self.close()
            self._bar = tqdm(total=record["steps"], desc=record["stage"], unit="step", file=self._stream, initial=record["step"])
        self._bar.update(record["step"] - self._bar.n)
        self._bar.set_postfix_str(
            f"loss {record['loss']:.4f}, sparsity {record['sparsity']:.3f}, {record['tokens_per_s']:,.0f} tok/s", refresh=True
        )
        if record["step"] >= record["steps"]:
            self.close()

    def _print(self, text: str) -> None:
        with suppress(OSError):  # of a log on a full disk
            if self._bar is not None:
                self._bar.write(text, file=self._stream)
            else:
                print(text, file=self._stream, flush=True)


def line(record: Mapping[str, Any]) -> str:
    """The console line of a training record; columns keep their places."""
    left = int(record["seconds_left"])
    return (
        f"{record['stage']:>16.16} | step {record['step']:>9,}/{record['steps']:<9,} | loss {_fixed(record['loss'])} | "
        f"lr {record['lr']:.2e} | norm {_fixed(record['grad_norm'])} | sparsity {record['sparsity']:.3f} | churn {record['churn']:.3f} | "
        f"{record['tokens_per_s']:>10,.0f} tok/s | left {left // 3600:>3}:{left // 60 % 60:02}:{left % 60:02} | {record['phase']}"
    )


def _fixed(value: float) -> str:
    """Eight characters: four decimals below 1,000, powers of ten above; for values that are not negative."""
    return f"{value:8.4f}" if value < 999.99995 else f"{value:8.2e}"
