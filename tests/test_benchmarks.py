"""Every benchmark runs, at toy sizes, and says what it should; its numbers mean nothing here."""

import json

import pytest
import torch

from benchmarks import masks, startup, step
from benchmarks.measure import Ratio, interleave
from tests.ranks import spawn


def test_ratio_is_over_pairs_with_an_interval_of_order_statistics():
    ratio = Ratio.of([2.0 * k for k in range(1, 12)], [1.0] * 11)
    # 2 4 6 ... 22: of 11 values the 2nd smallest and 2nd largest hold the median with 98.8 %, the 3rd with 93.5 %
    assert (ratio.median, ratio.low, ratio.high) == (12.0, 4.0, 20.0)
    assert (ratio.smallest, ratio.largest) == (2.0, 22.0)
    assert str(Ratio.of([3.0, 8.0, 2.0], [2.0, 4.0, 2.0])) == "1.500 [1.000, 2.000]"


def test_interleave_gives_everyone_a_turn_in_each_round_and_drops_the_warmup():
    seen = []
    times = interleave({"a": lambda i: seen.append(f"a{i}"), "b": lambda i: seen.append(f"b{i}")}, rounds=2, warmup=1)
    assert seen == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}


def test_step_compares_contestants_that_compute_the_same(tmp_path, capsys):
    threads = torch.get_num_threads()
    size = ["--layers", "1", "--width", "64", "--tokens", "8", "--vocabulary", "50", "--rounds", "3"]
    try:
        status = step.main([*size, "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    (result,) = tmp_path.glob("step_*.json")
    facts = json.loads(result.read_text())
    (one,) = facts["sizes"]
    assert one["largest_weight_difference"]["no sparsity code"] == 0
    assert one["largest_weight_difference"]["dense, FSDP2"] == 0
    assert one["largest_weight_difference"]["bare PyTorch"] < 1e-4  # the learning rate: a gradient near 0 may change its sign
    assert {len(times) for times in one["cpu_seconds"].values()} == {3}
    missed = [row["what"] for row in one["ratios"] if row["at_most"] and row["ratio"]["median"] > row["at_most"]]
    assert status == bool(missed)
    text = result.with_suffix(".md").read_text()
    assert text.count("MISSED") == len(missed)
    assert all(f"| {row['what']} |" in text for row in one["ratios"])
    assert capsys.readouterr().out.rstrip().endswith(str(result.with_suffix(".md")))
    assert {"commit", "command", "versions", "processor", "cores"} <= facts["environment"].keys()


def test_masks_take_one_bit_and_are_sharded_like_their_weights(tmp_path):
    one = spawn(masks.measure, 2, tmp_path, step.Size(layers=1, width=64, vocabulary=50, tokens=8))[0]
    assert one["bits_per_weight"] == 1.0
    assert one["file_bits_per_weight"] > 1.0  # the file format has headers
    assert one["memory_bytes_by_rank"] == one["weights_by_rank"] == [one["sparse_weights"] // 2] * 2
    assert one["sharded_like_the_weights"]
    assert f"| 2 | {one['sparse_weights']:,} | 1.0000 |" in masks.report([one])


@pytest.mark.slow
def test_masks_as_a_command(tmp_path):
    assert masks.main(["--ranks", "2", "--layers", "1", "--width", "64", "--out", str(tmp_path)]) == 0
    (one,) = json.loads(next(tmp_path.glob("masks_*.json")).read_text())["results"]
    assert one["ranks"] == 2


def test_startup_finds_the_first_step(tmp_path):
    run = startup.start(tmp_path, "one", local=True)
    assert 0 < run["first_step_s"] < run["end_s"]
    assert "| local: first step | " in startup.report({"local": [run]})


@pytest.mark.slow
def test_startup_shows_the_output_of_a_command_that_fails(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(RuntimeError, match="exit status 2") as failure:
        startup.start(tmp_path, "taken", local=True)
    assert "Got other files there" in str(failure.value)
