"""The self-check for several GPUs, on CPUs: what it says, and that it says when something differs."""

import subprocess
import sys

import pytest
import torch

from raysparse.sparsity.plan import SparsityConfig
from tests.gpu_cluster import Case, cases, main, problem

CASE = Case("unstructured", "mixed", 1, "on", True)


def result(**changes):
    tensors = {f"model/{i}": torch.zeros(2) for i in range(11)}
    return tensors | {"digest": "a", "history": [(1, 2.0, 3.0)], "nnz": {"w": 2}} | changes


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, None),
        ({"model/3": torch.tensor([0.0, 1e-9])}, "1 of 14: model/3"),
        ({"digest": "b", "nnz": {"w": 3}}, "2 of 14: digest, nnz"),
    ],
    ids=["equal", "one weight", "masks"],
)
def test_every_bit_counts_with_parity(changes, found):
    assert problem(CASE, result(), result(**changes)) == found


def test_masks_count_without_parity():
    static = Case("unstructured", "static", 1, "on", False)
    assert problem(static, result(), result(**{"model/3": torch.ones(2)})) is None
    assert problem(static, result(), result(digest="b")) == "the masks"


def test_no_case_is_dense():
    assert all(SparsityConfig.check(case.sparsity()).wants_masks for case in cases(2))


def test_every_pattern_and_way_is_tried():
    for ranks, ways in ((2, {1, 2}), (3, {1}), (4, {1, 2})):
        found = cases(ranks)
        assert {case.replicas for case in found} == ways
        tried = {(case.pattern, case.replicas, case.packed) for case in found if case.parity}
        assert len(tried) == 3 * 2 * len(ways)


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="this machine has several GPUs")
def test_too_few_to_check_anything(capsys):
    assert main([]) == 2
    assert "Expected two or more GPUs. Got " in capsys.readouterr().err
    assert main(["--device", "cpu", "--ranks", "1"]) == 2
    assert main(["--ranks", "64"]) == 2
    assert "Expected 64 GPUs" in capsys.readouterr().err


@pytest.mark.slow
def test_four_ranks_on_cpus():
    command = [sys.executable, "-m", "tests.gpu_cluster", "--device", "cpu", "--ranks", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("| FSDP2", "| HSDP"))]
    assert len(lines) == len(cases(4)) == 18
    assert all("| equal |" in line for line in lines)
