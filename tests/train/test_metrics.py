"""What a run writes and shows."""

import io
import json
from typing import Any

import pytest
import torch

from raysparse.train.metrics import Console, LoggingConfig, Meter, line, rewind

RECORD = {
    "stage": "pretrain", "step": 1200, "steps": 4768, "tokens": 10**9, "loss": 3.41214, "lr": 5.5e-4, "grad_norm": 0.31234,
    "tokens_per_s": 118204.3, "seconds": 5.0, "bytes_sent": 12, "flops": 1.0, "sparsity": 0.75, "churn": 0.0312, "phase": "training",
    "seconds_left": 3725.9,
}  # fmt: skip


def test_line():
    assert line(RECORD) == (
        "        pretrain | step     1,200/4,768     | loss   3.4121 | lr 5.50e-04 | norm   0.3123 | sparsity 0.750 | churn 0.031 | "
        "   118,204 tok/s | left   1:02:05 | training"
    )


@pytest.mark.parametrize(
    "other",
    [
        {"loss": 0.0, "grad_norm": 0.0, "lr": 0.0, "sparsity": 0.0, "tokens_per_s": 0.0, "seconds_left": 0.0},
        {"loss": 12.3456, "grad_norm": 123.456},
        {"loss": 999.94, "grad_norm": 999.99996},
        {"loss": 1e4, "grad_norm": 98765.4321},
        {"loss": 1e30, "grad_norm": 1e-30, "lr": 1e-30},
        {"loss": float("nan"), "grad_norm": float("inf")},
        {"step": 1, "steps": 1, "sparsity": 0.99999},
        {"step": 9_999_999, "steps": 9_999_999, "tokens_per_s": 98_765_432.1, "seconds_left": 999 * 3600.0},
        {"stage": "a"},
        {"stage": "a-name-that-is-much-longer-than-its-column"},
    ],
)
def test_columns_keep_their_places(other):
    def bars(text):
        return [i for i, character in enumerate(text) if character == "|"]

    found = line(RECORD | other)
    assert bars(found) == bars(line(RECORD))
    assert len(found) == len(line(RECORD))


def test_large_values_are_readable():
    text = line(RECORD | {"loss": 98765.4321, "grad_norm": 999.9})
    assert "| loss 9.88e+04 |" in text
    assert "| norm 999.9000 |" in text


def begun(folder, config, step=0, enabled=True):
    meter = Meter(folder, config, enabled)
    meter.begin(step)
    return meter


def records(folder):
    return [json.loads(row)["step"] for row in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("written", "step", "kept"),
    [
        ([10, 20, 30], 30, [10, 20, 30]),
        ([10, 20, 30], 20, [10, 20]),
        ([10, 20, 30], 25, [10, 20]),
        ([10, 20, 30], 0, []),
        ([10, 20, 20, 30], 20, [10, 20, 20]),  # training and validation of a step
        ([], 5, []),
    ],
)
def test_rewind_drops_later_records(tmp_path, written, step, kept):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in written))
    rewind(tmp_path, step)
    assert records(tmp_path) == kept
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", ['{"step": 30, "lo', '{"step": 1', "{", '{"step": 1, "stage": "a"'])
def test_rewind_drops_a_torn_record(tmp_path, torn):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n' + torn)
    rewind(tmp_path, 100)
    assert records(tmp_path) == [10]
    meter = begun(tmp_path, LoggingConfig(tensorboard=False), 10)
    meter.write({"step": 20}, {})
    meter.close()
    assert records(tmp_path) == [10, 20]


def test_rewind_of_a_new_run(tmp_path):
    rewind(tmp_path, 5)
    assert list(tmp_path.iterdir()) == []


def test_meter_writes_jsonl_and_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for step in (10, 20):  # the second as a resumed run: it appends
        meter = begun(tmp_path, LoggingConfig(), step - 10)
        meter.write({"step": step, "loss": 2.5}, {"loss/train": 2.5 / step, "sparsity/all": 0.75})
        meter.write({"step": step, "validation_loss": 3.0}, {"loss/validation": 3.0})
        meter.histograms(step, {"weights/w": torch.randn(4, 4), "masks/empty": torch.zeros(0)})
        assert records(tmp_path)[-1] == step  # at once: a run that dies leaves what it said
        meter.close()
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 10, "loss": 2.5}\n{"step": 10, "validation_loss": 3.0}\n{"step": 20, "loss": 2.5}\n{"step": 20, "validation_loss": 3.0}\n'
    )
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0})
    board.Reload()
    tags: dict[str, Any] = board.Tags()
    assert sorted(tags["scalars"]) == ["loss/train", "loss/validation", "sparsity/all"]
    assert [(e.step, e.value) for e in board.Scalars("loss/train")] == [(10, 0.25), (20, 0.125)]
    assert tags["histograms"] == ["weights/w"]
    assert [e.step for e in board.Histograms("weights/w")] == [10, 20]


def test_meter_without_tensorboard(tmp_path):
    meter = begun(tmp_path, LoggingConfig(tensorboard=False))
    meter.write({"step": 1}, {"loss/train": 1.0})
    meter.histograms(1, {"w": torch.ones(3)})
    meter.close()
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_other_ranks_write_nothing(tmp_path):
    meter = begun(tmp_path, LoggingConfig(), enabled=False)
    meter.write({"step": 1}, {"loss/train": 1.0})
    meter.histograms(1, {"w": torch.ones(3)})
    meter.close()
    assert list(tmp_path.iterdir()) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_console_prints_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    console = Console(stream)
    console.show({"text": "hello"})
    console.show(RECORD)
    console.show({"stage": "pretrain", "step": 1200, "tokens": 1, "validation_loss": 3.5, "validation_stderr": 0.1})
    console.close()
    assert stream.getvalue() == f"hello\n{line(RECORD)}\n        pretrain | step     1,200 | validation loss 3.5000\n"


def test_console_keeps_one_bar_for_a_stage():
    stream = Terminal()
    console = Console(stream)
    console.show(RECORD | {"step": 10, "steps": 40})
    bar = console._bar
    assert bar.n == 10
    console.show(RECORD | {"step": 20, "steps": 40})
    assert console._bar is bar
    assert bar.n == 20
    console.show({"stage": "pretrain", "step": 20, "tokens": 1, "validation_loss": 3.5, "validation_stderr": 0.1})
    assert console._bar is bar
    console.show(RECORD | {"step": 30, "steps": 60, "stage": "finetune"})
    assert console._bar is not bar
    assert (console._bar.n, console._bar.total) == (30, 60)
    console.show(RECORD | {"step": 60, "steps": 60, "stage": "finetune"})
    assert console._bar is None
    console.close()
    text = stream.getvalue()
    assert "validation loss 3.5000\n" in text
    assert "loss 3.4121, sparsity 0.750, 118,204 tok/s" in text
