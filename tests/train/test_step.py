"""The masked step: dead entries are zero at every moment, whatever their gradients are; a dense run is plain PyTorch."""

import math
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raysparse.kernels import library
from raysparse.sparsity.ranks import ALONE
from raysparse.train.clip import clip_, global_norm
from raysparse.train.error import TrainingError
from raysparse.train.loop import forward_backward, train, update
from raysparse.train.optimizer import ScheduleConfig, moments
from raysparse.train.shard import Sharded
from tests.ranks import spawn
from tests.train.steps import CONTEXT, SPARSE, Tokens, assemble, differences, masks_of, run, snapshot

STEPS = 6
needs_native = pytest.mark.skipif(not library.available(), reason="needs the native library")


def sections(**more: dict) -> dict:
    length = {"length": STEPS, "sequences": 6, "micro": 3, "validate_every": STEPS, "validation_sequences": 4}
    return {"training": length | more.pop("training", {}), **more}


# --- dead entries -----------------------------------------------------------------------------------------------------


def watched(folder: str, implementation: str) -> list[dict[str, int]]:
    """Before and after each optimizer step: what -> nonzero dead entries here; ``live``: nonzero live gradients."""
    t, state = assemble(
        folder, sections(optimizer={"lr": 1e-2, "weight_decay": 0.5, "implementation": implementation, "state": "dense"}), SPARSE
    )
    assert t.optimizer.param_groups[0].get("fused", "native") == {"fused": True, "foreach": False, "native": "native"}[implementation]
    seen = []

    def look(*_) -> None:
        gradients = {name: cast(Tensor, part.local.grad) for name, part in t.sharded.parts.items()}
        tensors = {"weight": t.sharded.local, "gradient": gradients}
        tensors |= {which: moments(t.sharded, t.optimizer, which) for which in ("exp_avg", "exp_avg_sq")}
        masks = masks_of(t).items()
        found = {what: sum(int((values[name][~mask] != 0).sum()) for name, mask in masks) for what, values in tensors.items()}
        seen.append(found | {"live": sum(int((gradients[name][mask] != 0).sum()) for name, mask in masks)})

    t.optimizer.register_step_pre_hook(look)
    t.optimizer.register_step_post_hook(look)
    train(t, state)
    return seen


@pytest.mark.parametrize("implementation", ["fused", "foreach", pytest.param("native", marks=needs_native)])
def test_dead_entries_are_zero_before_and_after_every_step(tmp_path, implementation):
    for seen in spawn(watched, 2, str(tmp_path), implementation):
        assert len(seen) == 2 * STEPS
        for found in seen:
            assert found.pop("live") > 1000
            assert found == {"weight": 0, "gradient": 0, "exp_avg": 0, "exp_avg_sq": 0}


def poison(sharded: Sharded, masks: dict[str, Tensor], factor: float) -> None:
    """Multiply every dead gradient by `factor` between the backward pass and what the loop does with it."""
    clean = sharded.collect

    def collect() -> dict[str, Tensor]:
        gradients = clean()
        for name, mask in masks.items():
            assert (gradients[name][~mask] != 0).any()
            gradients[name][~mask] *= factor
        return gradients

    sharded.collect = collect


def poisoned(folder: str) -> dict[float, dict]:
    """Factor of the dead gradients -> everything after three steps, and the norms of the steps."""
    results = {}
    for factor in (1.0, 1e6, math.inf, math.nan):
        t, _ = assemble(f"{folder}/{factor}", sections(), SPARSE)
        poison(t.sharded, masks_of(t), factor)
        norms = []
        for step in range(3):
            forward_backward(t, step)
            norms.append((step, 0.0, update(t, step)[0]))
        results[factor] = snapshot(t) | {"history": norms}
    return results


def test_dead_gradients_are_neither_in_the_norm_nor_in_the_step(tmp_path):
    for results in spawn(poisoned, 2, str(tmp_path)):
        clean = results.pop(1.0)
        assert all(0.1 < norm < 10 for _, _, norm in clean["history"])
        assert len(results) == 3
        for other in results.values():
            assert differences(clean, other) == []


def live_nan(folder: str) -> dict:
    """A NaN in one live gradient of the last rank in step 4: the error, and what the step changed."""
    t, state = assemble(folder, sections(), SPARSE)
    clean, before = t.sharded.collect, {}

    def collect() -> dict[str, Tensor]:
        gradients = clean()
        if state.step == 3:
            before.update(snapshot(t))
            if t.run.rank == t.run.world_size - 1:
                name, mask = next(iter(masks_of(t).items()))
                gradients[name].view(-1)[mask.view(-1).nonzero()[0]] = math.nan
        return gradients

    t.sharded.collect = collect
    try:
        train(t, state)
    except TrainingError as error:
        steps = {int(values["step"]) for values in t.optimizer.state.values()}
        return {"error": str(error), "differences": differences(before, snapshot(t)), "steps": steps}
    raise AssertionError("trained on")


@pytest.mark.parametrize("ranks", [1, 2])
def test_nan_in_a_live_gradient_stops_every_rank_before_it_does_harm(tmp_path, ranks):
    for found in spawn(live_nan, ranks, str(tmp_path)):
        assert found["error"].startswith(
            f"Expected finite gradients in step 4 of {tmp_path.name}. Got a NaN or infinity. Lower optimizer.lr"
        )
        assert found["differences"] == []
        assert found["steps"] == {3}


# --- dense runs -------------------------------------------------------------------------------------------------------


def bare(steps: int, fused: bool) -> dict:
    """What a dense run is, in transformers and PyTorch alone: the weights after it, and [(step, loss, norm), ...]."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from raysparse.models.layout import to_linear

    torch.manual_seed(3)
    same = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "activation_function": "gelu_pytorch_tanh"}
    shape = GPT2Config(vocab_size=101, n_positions=CONTEXT, n_embd=40, n_layer=2, n_head=5, use_cache=False, **same)
    model = to_linear(GPT2LMHeadModel(shape).train())
    named = dict(model.named_parameters())
    decayed, plain = [p for p in named.values() if p.ndim > 1], [p for p in named.values() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=fused, foreach=not fused)
    tokens, history = Tokens(101), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * ScheduleConfig().factor(step, 4, steps)
        loss = torch.zeros(())
        for first in (0, 3):
            batch = tokens.batch(step, range(first, first + 3))
            part = F.cross_entropy(model(input_ids=batch.input_ids).logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
            (part / (6 * CONTEXT)).backward()
            loss += part.detach()
        gradients = [cast(Tensor, p.grad) for p in named.values()]
        norm = global_norm(gradients, sum(p.shape[0] for p in named.values()), ALONE)
        clip_(gradients, norm, 0.05)
        optimizer.step()
        optimizer.zero_grad()
        history.append((step + 1, float(loss.double()) / (6 * CONTEXT), norm))
    weights = {f"model/{name}": p.detach().clone() for name, p in named.items()}
    averages = {f"{w}/{name}": optimizer.state[p][w] for w in ("exp_avg", "exp_avg_sq") for name, p in named.items()}
    return weights | averages | {"history": history}


@pytest.mark.parametrize("ranks", [1, 2])
def test_sparsity_0_is_bit_equal_to_plain_pytorch(tmp_path, ranks):
    """With torch's own AdamW; on two ranks sharded, in parity mode, with its foreach one."""
    (expected,) = spawn(bare, 1, STEPS, ranks == 1)
    implementation = "fused" if ranks == 1 else "foreach"
    plain = sections(run={"name": "dense", "seed": 3, "parity": ranks > 1}, optimizer={"implementation": implementation})
    for found in spawn(run, ranks, str(tmp_path), plain, {"target": 0.0}):
        assert found.pop("nnz") == {}
        assert "digest" not in found
        assert differences(expected, found) == []


# --- memory and speed -------------------------------------------------------------------------------------------------


def counted(folder: str, training: dict) -> dict:
    """A run, and how often the first block's feed-forward layer ran in its first step."""
    t, state = assemble(folder, sections(training=training), SPARSE)
    calls = []
    t.sharded.module.get_submodule("transformer.h.0.mlp").register_forward_pre_hook(lambda *_: calls.append(state.step))
    train(t, state)
    return snapshot(t) | {"loss": state.losses, "calls": calls.count(0)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_activation_checkpointing_recomputes_and_changes_no_bit(tmp_path, ranks):
    kept = spawn(counted, ranks, str(tmp_path / "kept"), {})
    recomputed = spawn(counted, ranks, str(tmp_path / "recomputed"), {"activation_checkpointing": True})
    for a, b in zip(kept, recomputed, strict=True):
        assert b["calls"] == 2 * a["calls"] > 0
        assert differences(a, b) == []
        assert a["loss"] == b["loss"]


@pytest.mark.slow
def test_compiled_blocks_train_alike(tmp_path):
    (eager,) = spawn(run, 1, str(tmp_path / "eager"), sections(), SPARSE)
    (compiled,) = spawn(run, 1, str(tmp_path / "compiled"), sections(training={"compile": True}), SPARSE, timeout_s=600.0)
    assert compiled["digest"] == eager["digest"]
    torch.testing.assert_close(torch.tensor(compiled["history"]), torch.tensor(eager["history"]), rtol=1e-4, atol=0)
