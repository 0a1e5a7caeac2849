"""Which AdamW steps the weights of a run, and what it is told of the masks."""

import pytest
import torch
from torch import nn

from raysparse.config import ConfigError
from raysparse.kernels import adamw, library
from raysparse.kernels.bits import pack
from raysparse.train.loop import forward_backward
from raysparse.train.optimizer import OptimizerConfig, build_optimizer, moments, set_masks, state_of
from raysparse.train.process import process_group
from raysparse.train.shard import Replicated
from tests.ranks import spawn
from tests.train.steps import SPARSE, assemble, masks_of

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


def told(folder, kind, implementation):
    """A step that nobody has masked the gradients of: whether dead weights and moments are 0 after it, and whether any was not masked."""
    t, _ = assemble(folder, {"sharding": {"type": kind}, "optimizer": {"implementation": implementation}}, SPARSE)
    masks = masks_of(t)
    set_masks(t.sharded, t.optimizer, masks)
    forward_backward(t, 0)
    gradients = t.sharded.collect()
    mine = {name: mask for name, mask in masks.items() if t.sharded.parts[name].mine}
    assert any((gradients[name][~mask] != 0).any() for name, mask in mine.items())
    t.optimizer.step()
    tensors = [{name: part.local for name, part in t.sharded.parts.items()}]
    tensors += [moments(t.sharded, t.optimizer, which) for which in ("exp_avg", "exp_avg_sq")]
    zero = all(not (values[name][~mask] != 0).any() for values in tensors for name, mask in mine.items())
    moved = all((t.sharded.parts[name].local[mask] != 0).all() for name, mask in mine.items())
    return zero, moved


@needs_native
@pytest.mark.parametrize("kind", ["fsdp2", "none", "fairscale"])
def test_masks_reach_it_under_every_sharding(tmp_path, kind):
    if kind == "fairscale":
        pytest.importorskip("fairscale", reason="pip install 'raysparse[fairscale]'")
    assert spawn(told, 2, str(tmp_path), kind, "native") == [(True, True)] * 2


def test_masks_do_not_reach_torchs(tmp_path):
    assert spawn(told, 1, str(tmp_path), "none", "fused") == [(False, True)]


@needs_native
def test_only_what_a_rank_steps_is_masked(sharded):
    optimizer = build_optimizer(sharded, OptimizerConfig(), parity=False)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    seen = []
    optimizer.set_masks = seen.append  # type: ignore[attr-defined]
    set_masks(sharded, optimizer, {"weight": mask})
    sharded.parts["weight"].mine = False
    set_masks(sharded, optimizer, {"weight": mask})
    assert list(seen[0]) == [sharded.parts["weight"].local]
    assert torch.equal(seen[0][sharded.parts["weight"].local], pack(mask))
    assert seen[1] == {}
