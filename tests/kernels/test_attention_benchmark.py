"""The benchmark of attention runs, at a toy size, and says what it should; its numbers mean nothing here."""

import json

import torch

from benchmarks import attention
from benchmarks.measure import Ratio


def test_contestants_compute_the_same_and_bounds_are_reported(tmp_path, capsys):
    status = attention.main(["--quick", "--rounds", "2", "--out", str(tmp_path)])
    (result,) = tmp_path.glob("attention-quick_*.json")
    facts = json.loads(result.read_text())
    assert status == 0  # a toy has no bounds
    assert [(one["dtype"], one["length"]) for one in facts["results"]] == [("float32", 160), ("bfloat16", 160)]
    for one in facts["results"]:
        assert max(one["largest_difference"].values()) < {"float32": 1e-5, "bfloat16": 5e-2}[one["dtype"]]
        assert len(one["ratios"]) == 2 * (1 + 2 * len(one["density"]))  # masked attention, and each pattern with and without the library
        assert {len(times) for seconds in one["cpu_seconds"].values() for times in seconds.values()} == {2}
    text = result.with_suffix(".md").read_text()
    assert "| local_or_strided, plain torch | forward, backward |" in text
    assert capsys.readouterr().out.rstrip().endswith(str(result.with_suffix(".md")))


def test_a_bound_that_is_missed_is_said():
    size = attention.TOY
    facts = attention.measure(size, torch.float32, size.lengths[0], rounds=2) | {"native": "native library: none"}
    row = next(row for row in facts["ratios"] if row["contestant"] == "fixed" and row["what"] == "forward, backward")
    for median, missed in ((1.9, True), (2.1, False)):
        row |= {"at_least": 2.0, "ratio": Ratio(median, median, median, median, median)}
        assert attention.missed(row) == missed
        assert attention.report(facts).count("MISSED") == missed
