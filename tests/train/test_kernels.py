"""Runs whose layers skip their zeros: the same training within rounding, chosen once, and counted as it was computed."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from raysparse.config import ConfigError
from raysparse.kernels import choice, library
from raysparse.kernels.choice import Gains
from raysparse.kernels.linear import SPARSE as ALL_SPARSE
from raysparse.kernels.linear import SparseLinear
from raysparse.train.kernels import FILE, Kernels, check_kernels, why_not
from raysparse.train.loop import forward_backward, train, update, validate
from raysparse.train.run import RunConfig
from tests.ranks import spawn
from tests.train.steps import SPARSE, assemble, dead, differences, run, snapshot
from tests.train.test_evolving import MST

STEPS = 8
RIGL: dict[str, Any] = {"target": 0.75, "evolution": {"type": "rigl", "update_interval": 2, "optimizer_steps": True}}


@pytest.fixture
def native() -> None:
    if (reason := library.why_not()) is not None:
        pytest.skip(reason)


def sections(kernels: str, **more: Any) -> dict[str, Any]:
    length = {"length": STEPS, "sequences": 6, "micro": 2, "validate_every": STEPS, "validation_sequences": 5}
    return {"kernels": kernels, "training": length | more.pop("training", {}), **more}


def assert_same_training(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """Losses and gradient norms within `tolerance`, the same masks, and zeros in the same places."""
    assert (found["digest"], found["nnz"]) == (expected["digest"], expected["nnz"])
    torch.testing.assert_close(torch.tensor(found["history"]), torch.tensor(expected["history"]), rtol=tolerance, atol=0)
    assert found["state"]["losses"]["validation"] == pytest.approx(expected["state"]["losses"]["validation"], rel=tolerance)
    for name, mask in dead(expected).items():
        assert not any(found[f"{what}/{name}"][mask].any() for what in ("model", "exp_avg", "exp_avg_sq"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return spawn(run, 1, str(tmp_path_factory.mktemp("dense")), sections("dense"), SPARSE)[0]


KINDS = {
    "alone": (1, {}),
    "fsdp2": (2, {"type": "fsdp2"}),
    "keep gathered": (2, {"type": "fsdp2", "reshard_after_forward": False}),
    "none": (2, {"type": "none"}),
    "fairscale": (2, {"type": "fairscale"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_kernels_train_the_same_model(native, dense, tmp_path, kind):
    ranks, sharding = KINDS[kind]
    if kind == "fairscale" and importlib.util.find_spec("fairscale") is None:
        pytest.skip("fairscale is not installed: pip install 'raysparse[fairscale]'")
    for found in spawn(run, ranks, str(tmp_path), sections("sparse", sharding=sharding), SPARSE):
        if kind != "fairscale":  # whose ranks have the moments that they own
            assert_same_training(found, dense, 1e-4)
        torch.testing.assert_close(torch.tensor(found["history"]), torch.tensor(dense["history"]), rtol=1e-4, atol=0)
        assert found["digest"] == dense["digest"]
        assert any(not torch.equal(found[key], dense[key]) for key in dense if key.startswith("model/"))  # other kernels, other rounding


def test_bfloat16(native, tmp_path):
    half = {"run": {"precision": "bfloat16"}}
    one, other = (spawn(run, 1, str(tmp_path / mode), sections(mode, **half), SPARSE)[0] for mode in ("dense", "sparse"))
    assert_same_training(other, one, 2e-2)


@pytest.mark.parametrize("kernels", ["sparse", "auto"])
def test_killed_and_resumed_is_bit_equal_to_straight_on(native, tmp_path, kernels):
    """auto: as the measurement is kept."""
    more = sections(kernels, checkpoint={"every": "3 steps"})
    straight, broken = str(tmp_path / "straight"), str(tmp_path / "broken")
    (expected,) = spawn(run, 1, straight, more, SPARSE)
    if kernels == "auto":
        Path(broken).mkdir()
        (Path(broken) / FILE).write_bytes((Path(straight) / FILE).read_bytes())
    spawn(run, 1, broken, more, SPARSE, 5)
    assert differences(expected, spawn(run, 1, broken, more, SPARSE)[0]) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_compiled_and_recomputed(native, dense, tmp_path):
    more = sections("sparse", training={"compile": True, "activation_checkpointing": True})
    assert_same_training(spawn(run, 1, str(tmp_path), more, SPARSE)[0], dense, 1e-3)


# --- topologies that change -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [RIGL, MST], ids=["rigl", "mst"])
def test_what_grows_is_chosen_by_the_gradients_of_all_weights(native, tmp_path, method):
    """After the first update the masks are those of the run with dense kernels."""
    short = sections("sparse", training={"length": STEPS if method is RIGL else 24})
    found = []
    for mode in ("dense", "sparse"):
        spawn(run, 1, str(tmp_path / mode), short | {"kernels": mode}, method, 6 if method is MST else 0)
        lines = (tmp_path / mode / "topology.jsonl").read_text().splitlines()[1:3]
        found.append([(r["step"], r["digest"], r["churn"]) for r in map(json.loads, lines)])
    assert found[0] == found[1]
    assert len(found[0]) == 2
    assert found[0][0][1] != found[0][1][1]


def gradients_seen(folder: str) -> list[tuple[bool, int]]:
    """Of each step: whether it is an update, and how many gradients of dead weights were not 0 in it."""
    t, _ = assemble(folder, sections("sparse"), RIGL)
    assert t.topology is not None
    found = []
    for step in range(STEPS):
        forward_backward(t, step)
        gradients = t.sharded.collect()
        count = sum(int((gradients[name][~mask] != 0).sum()) for name, mask in t.topology.masks.items())
        found.append((t.agenda.is_update(step), count))
        t.sharded.collect = lambda gradients=gradients: gradients
        update(t, step)
        del t.sharded.collect
        validate(t)
    return found


def test_dead_gradients_are_formed_in_updates_alone(native, tmp_path):
    (found,) = spawn(gradients_seen, 1, str(tmp_path))
    assert [step for step, (is_update, _) in enumerate(found) if is_update] == [2, 4]
    assert all((count > 1000) == is_update for is_update, count in found)
    assert {count for is_update, count in found if not is_update} == {0}


def restored(folder: str) -> tuple[dict[str, Any], dict[str, Any], list[type]]:
    """A run of MST to its end: the result, what its kernels are then, and the classes of the sparse layers."""
    t, state = assemble(folder, sections("sparse", training={"length": 24}), MST)
    state = train(t, state)
    assert t.kernels is not None
    return snapshot(t) | {"nnz": dict(t.nnz)}, t.kernels.facts(), [layer.products for layer in t.kernels._all()]


def test_phases_end_dense(native, tmp_path):
    ((result, facts, products),) = spawn(restored, 1, str(tmp_path))
    assert not any(mask.any() for mask in dead(result).values())
    assert facts == {"native": library.variant(), "mode": "sparse", "layers": 9} | {
        which: {"sparse": 0, "gain": None} for which in ("forward", "backward", "gradient")
    }
    assert not any(each.any for each in products)
    text = (tmp_path / "console.txt").read_text()
    lines = [line for line in text.splitlines() if "layers that skip zeros" in line]
    counts = [line.split("forward ")[1].split(",")[0] for line in lines]
    assert counts == ["0 of 9", "9 of 9", "0 of 9"]  # dense, sparse, and restored: said once each


# --- the choice -------------------------------------------------------------------------------------------------------


def measured(folder: str, die_in: int = 0) -> tuple[list[int], dict[str, str]]:
    """Train with a measurement that says sparse, sparse, dense: the tokens of each measurement here, and the layers' products."""
    calls = []

    def measure(bits: torch.Tensor, cols: int, dtype: torch.dtype, tokens: int, block: int | None = None) -> Gains:
        calls.append(tokens)
        return Gains(2.0, 3.0, 0.5)

    choice.measure = measure
    products = []
    refresh = Kernels.refresh
    Kernels.refresh = lambda kernels, *rest: (refresh(kernels, *rest), products.append(dict(kernels._products)))[0]
    run(folder, sections("auto", checkpoint={"every": "2 steps"}), SPARSE, die_in)
    return calls, products[0]


def test_a_measurement_is_made_once_and_kept(native, tmp_path):
    first, second = spawn(measured, 2, str(tmp_path), 6)
    kept = json.loads((tmp_path / FILE).read_text())
    assert sorted({name.split(",")[0] for name in kept}) == ["120x40 at 75 %", "160x40 at 75 %", "40x160 at 75 %", "40x40 at 75 %"]
    assert all(gains == {"forward": 2.0, "backward": 3.0, "gradient": 0.5} for gains in kept.values())
    assert (len(first[0]), set(first[0])) == (4, {2 * 16})  # micro-batches of 2 sequences
    assert second[0] == []  # rank 0 has told it
    assert first[1] == second[1]
    assert {(p.forward, p.backward, p.gradient) for p in first[1].values()} == {(True, True, False)}
    text = (tmp_path / "console.txt").read_text()
    assert (
        text.count("kernels: layers that skip zeros: forward 8 of 8 (2.0x), input gradient 8 of 8 (3.0x), weight gradient 0 of 8 (0.5x); ")
        == 1
    )
    assert [calls for calls, _ in spawn(measured, 2, str(tmp_path))] == [[], []]  # goes on from step 4
    assert json.loads((tmp_path / FILE).read_text()) == kept
    assert not list(tmp_path.glob("*.partial"))


def installed(folder: str, more: dict[str, Any], sparsity: dict[str, Any], native: str = "") -> tuple[bool, int]:
    """Whether a run has sparse kernels, and how many layers are other than plain linear ones."""
    os.environ[library.CHOICE] = native
    t, _ = assemble(folder, more, sparsity)
    dist.barrier()
    return t.kernels is not None, sum(isinstance(module, SparseLinear) for module in t.sharded.module.modules())


@pytest.mark.parametrize(
    ("more", "sparsity", "expected"),
    [
        (sections("auto"), SPARSE, (True, 8)),
        (sections("auto", run={"parity": True}), SPARSE, (False, 0)),
        (sections("sparse", run={"parity": True}), SPARSE, (True, 8)),
        (sections("dense"), SPARSE, (False, 0)),
        (sections("auto"), {"target": 0.0}, (False, 0)),
        (sections("sparse"), SPARSE | {"include": ["*.c_fc.weight"]}, (True, 2)),
        (sections("sparse"), SPARSE | {"include": ["*.c_fc.weight", "lm_head.weight"]}, (True, 3)),  # tied to the embedding
    ],
    ids=["auto", "parity", "sparse parity", "dense", "no masks", "some layers", "a tied layer"],
)
def test_where_layers_skip_zeros(native, tmp_path, more, sparsity, expected):
    assert spawn(installed, 1, str(tmp_path), more, sparsity) == [expected]


def test_without_a_library_it_is_said_once_why(tmp_path):
    assert spawn(installed, 2, str(tmp_path), sections("auto"), SPARSE, "off") == [(False, 0)] * 2
    text = (tmp_path / "console.txt").read_text()
    assert text.count("kernels: dense, zeros are multiplied. There is no native library: RAYSPARSE_NATIVE=off") == 1
    assert text.count("kernels:") == 1


def test_sparse_kernels_that_cannot_be_are_refused(monkeypatch):
    with monkeypatch.context() as absent:
        absent.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match=r"Expected the package triton for kernels=sparse on a GPU. Got none. .* kernels=auto."):
            check_kernels("sparse", RunConfig(device="cuda"))
    monkeypatch.setattr(library, "why_not", lambda: "the reason")
    with pytest.raises(ConfigError, match=r"Expected the native kernels for kernels=sparse\. Got none: the reason\. Install g"):
        check_kernels("sparse", RunConfig(device="cpu"))
    check_kernels("auto", RunConfig(device="cpu"))
    check_kernels("dense", RunConfig(device="cuda"))
    monkeypatch.setenv(library.CHOICE, "off")
    with pytest.raises(ConfigError, match=r"Unset RAYSPARSE_NATIVE, or set it to one of avx512, avx2, baseline\. Or use kernels=auto"):
        check_kernels("sparse", RunConfig(device="cpu"))
    monkeypatch.setenv(library.CHOICE, "AVX2")
    for mode in ("auto", "sparse", "dense"):
        with pytest.raises(ConfigError, match=r"Expected RAYSPARSE_NATIVE to be one of avx512, avx2, baseline, off\. Got .AVX2.\."):
            check_kernels(mode, RunConfig(device="cpu"))


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def flops(folder: str, more: dict[str, Any], sparsity: dict[str, Any]) -> tuple[float, float, float]:
    """Executed, counted and dense FLOPs of a run."""
    t, state = assemble(folder, more, sparsity)
    train(t, state)
    return t.ledger.executed.total, t.ledger.counted.total, t.ledger.dense.total


def test_executed_flops_are_those_of_the_products_that_ran(native, tmp_path):
    ((executed, counted, dense),) = spawn(flops, 1, str(tmp_path / "dense"), sections("dense"), SPARSE)
    assert executed == dense > counted
    ((executed, counted, dense),) = spawn(flops, 1, str(tmp_path / "static"), sections("sparse"), SPARSE)
    assert executed == pytest.approx(counted, rel=1e-9)
    assert executed < dense
    ((executed, counted, dense),) = spawn(flops, 1, str(tmp_path / "rigl"), sections("sparse"), RIGL)
    updates = 2  # in each the gradient of all weights
    assert executed == pytest.approx(counted + updates / STEPS * (dense - counted) / 3, rel=1e-6)


def test_executed_flops_leave_out_what_attention_does_not_see(tmp_path):
    one = {"timeline": [{"name": "all", "length": "100 %", "attention": {"type": "local", "width": 2}}]}
    ((executed, counted, dense),) = spawn(flops, 1, str(tmp_path), sections("dense"), {"target": 0.0} | one)
    assert executed == pytest.approx(counted, rel=1e-9)
    assert executed < dense


def test_a_mixed_choice_counts_each_product(native):
    """Products of two layers: all sparse, and the forward pass alone."""
    kernels = Kernels.__new__(Kernels)
    kernels._products = {"a": ALL_SPARSE, "b": type(ALL_SPARSE)(forward=True)}
    assert kernels.executed({"a": 3, "b": 5, "c": 7}, dense_gradient=False) == [{"a": 3, "b": 5}, {"a": 3}, {"a": 3}]
    assert kernels.executed({"a": 3, "b": 5, "c": 7}, dense_gradient=True) == [{"a": 3, "b": 5}, {"a": 3}, {}]


def common(odd: str | None) -> str | None:
    """What a group says of its native library where rank 1 has another build."""
    if odd is not None and dist.get_rank() == 1:
        os.environ[library.CHOICE] = odd
        library.load.cache_clear()
        library.function.cache_clear()
    return why_not()


def test_ranks_agree_on_what_they_have(native):
    assert spawn(common, 2, None) == [None, None]
    first, second = spawn(common, 2, "off")
    assert first == second
    assert first.startswith("The ranks do not share a native library: rank 0: ")
    assert "rank 1: none (RAYSPARSE_NATIVE=off)" in first
