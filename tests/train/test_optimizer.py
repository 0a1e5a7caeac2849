"""Which AdamW steps the weights of a run, and what it is told of the masks."""

import pytest
import torch
from torch import nn

from raysparse.config import ConfigError
from raysparse.kernels import adamw, library
from raysparse.sparsity.topology import Rows, Topology
from raysparse.train.loop import forward_backward
from raysparse.train.optimizer import OptimizerConfig, build_optimizer, dense_moments, moments, set_masks, state_of
from raysparse.train.process import process_group
from raysparse.train.shard import Replicated
from tests.ranks import spawn
from tests.train.steps import SPARSE, assemble, differences, masks_of, run
from tests.train.test_evolving import METHODS

needs_native = pytest.mark.skipif(not library.available(), reason="needs the native library")


@pytest.fixture
def sharded():
    with process_group("cpu"):
        yield Replicated(nn.Linear(3, 2), "cpu", torch.float32)


def built(sharded, implementation, parity=False):
    """What was chosen, as its parameter groups have it."""
    optimizer = build_optimizer(sharded, OptimizerConfig.check({"implementation": implementation}), parity)
    group = optimizer.param_groups[0]
    return "native" if type(optimizer) is adamw.AdamW else next(name for name in ("fused", "foreach") if group[name])


@needs_native
@pytest.mark.parametrize("parity", [False, True])
def test_choices(sharded, parity):
    chosen = {name: built(sharded, name, parity) for name in ("auto", "native", "fused", "foreach")}
    assert chosen == {"auto": "native", "native": "native", "fused": "fused", "foreach": "foreach"}


@pytest.mark.parametrize(("parity", "chosen"), [(False, "fused"), (True, "foreach")])
def test_choices_without_the_native_library(sharded, monkeypatch, parity, chosen):
    monkeypatch.setattr(library, "why_not", lambda: "none was built")
    assert built(sharded, "auto", parity) == chosen
    with pytest.raises(ConfigError) as error:
        built(sharded, "native", parity)
    assert str(error.value) == (
        "Expected an optimizer that runs here. Got optimizer.implementation=native, but there is no native library: none was built. "
        "Use optimizer.implementation=auto."
    )


@needs_native
def test_other_dtypes_are_torchs(sharded):
    sharded.parts["weight"].local.data = sharded.parts["weight"].local.data.double()
    assert built(sharded, "auto") == "fused"
    with pytest.raises(ConfigError, match="but it steps float32 on CPUs, not float64 on cpu"):
        built(sharded, "native")


def test_triton_wants_gpus(sharded):
    with pytest.raises(ConfigError, match=r"Expected GPUs and Triton for optimizer\.implementation=triton\. Got parameters on cpu"):
        built(sharded, "triton")


@needs_native
def test_it_is_made_with_its_state(sharded):
    config = OptimizerConfig(lr=0.25, betas=(0.5, 0.75), eps=1e-3, weight_decay=0.125)
    optimizer = build_optimizer(sharded, config, parity=True)
    decays = [(group["weight_decay"], [p.shape for p in group["params"]]) for group in optimizer.param_groups]
    assert decays == [(0.125, [(2, 3)]), (0.0, [(2,)])]
    assert all((group["lr"], group["betas"], group["eps"]) == (0.25, (0.5, 0.75), 1e-3) for group in optimizer.param_groups)
    for part in sharded.parts.values():
        state = state_of(optimizer)[part.local]
        assert {name: (tuple(value.shape), value.dtype, bool(value.any())) for name, value in state.items()} == {
            "step": ((), torch.float32, False),
            "exp_avg": (part.shape, torch.float32, False),
            "exp_avg_sq": (part.shape, torch.float32, False),
        }


def told(folder, kind, implementation, state):
    """A step that nobody has masked the gradients of: whether dead weights and moments are 0 after it, and whether any was not masked."""
    t, _ = assemble(folder, {"sharding": {"type": kind}, "optimizer": {"implementation": implementation, "state": state}}, SPARSE)
    masks = masks_of(t)
    set_masks(t.sharded, t.optimizer, t.topology)
    forward_backward(t, 0)
    gradients = t.sharded.collect()
    mine = {name: mask for name, mask in masks.items() if t.sharded.parts[name].mine}
    assert any((gradients[name][~mask] != 0).any() for name, mask in mine.items())
    t.optimizer.step()
    tensors = [{name: part.local for name, part in t.sharded.parts.items()}]
    tensors += [dense_moments(t.sharded, t.optimizer, which, t.topology) for which in ("exp_avg", "exp_avg_sq")]
    assert [bool(found) for found in tensors[1:]] == [state == "dense" and bool(mine)] * 2
    zero = all(not (values[name][~mask] != 0).any() for values in tensors for name, mask in mine.items() if name in values)
    moved = all((t.sharded.parts[name].local[mask] != 0).all() for name, mask in mine.items())
    return zero, moved


@needs_native
@pytest.mark.parametrize("state", ["live", "dense"])
@pytest.mark.parametrize("kind", ["fsdp2", "none", "fairscale"])
def test_masks_reach_it_under_every_sharding(tmp_path, kind, state):
    if kind == "fairscale":
        pytest.importorskip("fairscale", reason="pip install 'raysparse[fairscale]'")
    assert spawn(told, 2, str(tmp_path), kind, "native", state) == [(True, True)] * 2


def test_masks_do_not_reach_torchs(tmp_path):
    assert spawn(told, 1, str(tmp_path), "none", "fused", "dense") == [(False, True)]


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_live_moments_make_torchs_leave_dead_weights(tmp_path, implementation):
    assert spawn(told, 2, str(tmp_path), "fsdp2", implementation, "live") == [(True, True)] * 2


@needs_native
def test_only_what_a_rank_steps_is_masked(sharded):
    optimizer = build_optimizer(sharded, OptimizerConfig(), parity=False)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    topology = Topology({"weight": (2, 3)}, {"weight": Rows(0, 2, 3)}, {"weight": mask})
    seen = []
    optimizer.set_masks = seen.append  # type: ignore[attr-defined]
    set_masks(sharded, optimizer, topology)
    sharded.parts["weight"].mine = False
    set_masks(sharded, optimizer, topology)
    assert seen == [{sharded.parts["weight"].local: topology.live("weight")}, {}]


# --- moments of live weights alone ------------------------------------------------------------------------------------

STATES = {
    "static": ({"training": {"length": 12}}, SPARSE),
    "rigl": ({"training": {"length": 12}}, METHODS["rigl"]),
    "set": ({"training": {"length": 12}}, METHODS["set"]),
    "mst": ({}, METHODS["mst"]),
}


@pytest.mark.parametrize("implementation", ["auto", "foreach"])
@pytest.mark.parametrize("method", STATES)
def test_live_moments_train_the_same_bits(tmp_path, method, implementation):
    """Through updates of the topology too: what grows has moments of 0, what dies loses them."""
    sections, sparsity = STATES[method]
    found = {}
    for state in ("live", "dense"):
        optimizer = {"state": state, "implementation": implementation}
        found[state] = spawn(run, 2, str(tmp_path / state), sections | {"optimizer": optimizer}, sparsity)
    for live, dense in zip(found["live"], found["dense"], strict=True):
        assert differences(live, dense) == []


def sizes(folder, state):
    """Elements of the moments of the sparse weights, and of the weights."""
    t, _ = assemble(folder, {"optimizer": {"state": state}}, SPARSE)
    found = moments(t.sharded, t.optimizer, "exp_avg"), moments(t.sharded, t.optimizer, "exp_avg_sq")
    return sum(m[name].numel() for m in found for name in masks_of(t)), sum(mask.numel() for mask in masks_of(t).values())


@pytest.mark.parametrize(("state", "share"), [("auto", 0.25), ("live", 0.25), ("dense", 1.0)])
def test_live_moments_take_what_lives(tmp_path, state, share):
    (moments, weights), (more_moments, more_weights) = spawn(sizes, 2, str(tmp_path), state)
    assert (moments + more_moments) / (weights + more_weights) == pytest.approx(2 * share, rel=1e-3)


KEEPS = {"target": 0.75, "evolution": {"type": "set", "update_interval": 3, "reset_grown_state": False}}


def refused(folder, state):
    try:
        t, _ = assemble(folder, {"optimizer": {"state": state}}, KEEPS)
    except ConfigError as error:
        return str(error)
    return {m.ndim for name, m in moments(t.sharded, t.optimizer, "exp_avg").items() if name in masks_of(t)}


def test_rules_that_keep_moments_of_dead_weights_keep_all(tmp_path):
    assert spawn(refused, 1, str(tmp_path / "auto"), "auto") == [{2}]
    (message,) = spawn(refused, 1, str(tmp_path / "live"), "live")
    assert message.startswith(
        "Expected rules that reset the moments of grown weights with optimizer.state=live. Got reset_grown_state: false in "
    )
    assert message.endswith("Use optimizer.state=auto, or reset_grown_state: true.")
