"""A topology that evolves is a fact of the run: not of the ranks, nor of how often the run died."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from raysparse.models.build import ModelConfig, build
from raysparse.train.error import TrainingError
from raysparse.train.loop import forward_backward, train, update
from raysparse.train.optimizer import dense_moments, moments
from tests.ranks import spawn
from tests.train.steps import CONTEXT, Died, assemble, dead, differences, history, masks_of, run, run_with_hash_seed, snapshot

# Two micro-batches a step, clipping that bites. Rows: 101, 16, 120, 40, and 2 in the feed-forward layers, fewer than 3 ranks.
SECTIONS: dict[str, Any] = {
    "run": {"name": "parity", "seed": 3, "parity": True},
    "model": {"preset": "debug", "overrides": {"n_embd": 40, "n_head": 5, "n_layer": 2, "n_inner": 2, "vocab_size": 101}},
}
MST: dict[str, Any] = {
    "target": 0.8,
    "distribution": {"type": "er"},
    "include": ["block_linears", "lm_head.weight"],
    "evolution": {"type": "mixed", "update_interval": 2},
    "timeline": [
        {
            "name": "warm_up",
            "length": 6,
            "sparsity": {"type": "polynomial"},
            "attention": {"type": "local_or_strided", "width": 3, "stride": 5},
        },
        {"name": "ultra_sparsification", "length": 12, "attention": {"type": "local_or_strided", "width": 3, "stride": 5}},
        {"name": "restoration", "length": 6, "sparsity": {"type": "polynomial", "start": 1, "end": 0, "mirrored": True}},
    ],
}
RIGL: dict[str, Any] = {"target": 0.75, "evolution": {"type": "rigl", "update_interval": 3, "optimizer_steps": True}}
SET: dict[str, Any] = {"target": 0.75, "evolution": {"type": "set", "update_interval": 3}}
METHODS = {"mst": MST, "rigl": RIGL, "set": SET}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Each method on one rank."""
    found: dict[str, Any] = {}

    def get(method: str) -> Any:
        if method not in found:
            found[method] = spawn(run, 1, str(tmp_path_factory.mktemp(method)), SECTIONS, METHODS[method])[0]
        return found[method]

    return get


def records(folder: Any) -> list[dict[str, Any]]:
    """The committed versions of a run."""
    return [json.loads(line) for line in (Path(folder) / "topology.jsonl").read_text().splitlines()[1:]]


@pytest.mark.parametrize("method", ["mst", "rigl"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_any_world_size_is_bit_equal(alone, tmp_path, method, ranks):
    for other in spawn(run, ranks, str(tmp_path), SECTIONS, METHODS[method]):
        assert differences(alone(method), other) == []


@pytest.mark.parametrize("sharding", [{"replicas": 2}, {"type": "none"}, {"type": "fairscale"}], ids=["hsdp", "none", "fairscale"])
def test_any_sharding_is_bit_equal(alone, tmp_path, sharding):
    ranks = 4 if "replicas" in sharding else 3
    others = spawn(run, ranks, str(tmp_path), SECTIONS | {"sharding": sharding}, MST)
    expected = alone("mst")
    for other in others:
        have = {key for key in other if not key.startswith("exp_avg")} | {"digest"}  # a fairscale rank has the moments that it owns
        assert differences_of(expected, other, have) == []
    if sharding.get("type") == "fairscale":
        owned = [{key for key in other if key.startswith("exp_avg")} for other in others]
        assert owned[0] | owned[1] | owned[2] == {key for key in expected if key.startswith("exp_avg")}
        for other, keys in zip(others, owned, strict=True):
            assert differences_of(expected, other, keys) == []


def differences_of(a: dict[str, Any], b: dict[str, Any], keys: set[str]) -> list[str]:
    return [k for k in keys - {"state", "sent"} if not (torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k])]


def test_hash_seed_of_a_process_changes_nothing(alone, tmp_path):
    assert differences(alone("mst"), run_with_hash_seed(7, tmp_path, SECTIONS, MST)) == []


WIDE = SECTIONS | {"model": {"preset": "debug", "overrides": {"n_embd": 64, "n_head": 4, "n_layer": 1, "vocab_size": 101}}}


@pytest.mark.parametrize(
    ("target", "pattern"),
    [
        (0.5, {"type": "n:m", "n": 2, "m": 4}),
        (0.75, {"type": "block", "size": 16}),
        (0.5, {"type": "block", "size": 16, "fan_in": "constant"}),
    ],
    ids=["2:4", "block", "constant-fan-in"],
)
def test_patterns_are_bit_equal_too(tmp_path, target, pattern):
    sparsity = {"target": target, "pattern": pattern, "evolution": {"type": "mixed", "update_interval": 4, "drop_decay": "constant"}}
    (one,) = spawn(run, 1, str(tmp_path / "one"), WIDE, sparsity)
    assert differences(one, spawn(run, 2, str(tmp_path / "two"), WIDE, sparsity)[1]) == []
    found = records(tmp_path / "one")
    assert len({r["digest"] for r in found}) == len(found) == 6
    mask = ~dead(one)["transformer.h.0.mlp.c_fc.weight"]
    if pattern["type"] == "n:m":
        assert mask.view(-1, 4).sum(1).unique().tolist() == [2]
    else:
        blocks = mask.view(16, 16, 4, 16).sum((1, 3))
        assert blocks.unique().tolist() == [0, 256]
        assert pattern.get("fan_in") is None or blocks.sum(1).unique().tolist() == [512]


def test_bfloat16_computation_is_bit_equal(tmp_path):
    half = SECTIONS | {"run": SECTIONS["run"] | {"precision": "bfloat16"}}
    (one,) = spawn(run, 1, str(tmp_path / "one"), half, RIGL)
    assert differences(one, spawn(run, 2, str(tmp_path / "two"), half, RIGL)[1]) == []


def test_what_was_compared_evolves(alone):
    result = alone("mst")
    assert result["state"]["step"] == 24
    assert result["state"]["optimizer_steps"] == 24 - 9  # updates at 2, 4; 8, 10, ... 16; 20, 22; MST skips the optimizer there
    assert min(norm for _, _, norm in result["history"]) > 2 * 0.05  # clip_norm
    names = [name for name, mask in dead(result).items() if mask.any()]
    assert names == []  # restored: dense at the end
    sparse = alone("set")
    for name, mask in dead(sparse).items():
        assert (~mask).sum() == sparse["nnz"][name]
        for what in ("model", "exp_avg", "exp_avg_sq"):
            assert not sparse[f"{what}/{name}"][mask].any()


def test_history_of_mst(tmp_path):
    (result,) = spawn(run, 1, str(tmp_path), SECTIONS, MST)
    found = records(tmp_path)
    assert [r["version"] for r in found] == list(range(10))
    assert [r["step"] for r in found[1:]] == [2, 4, 8, 10, 12, 14, 16, 20, 22]
    assert [r["phase"] for r in found[1:]] == ["warm_up"] * 2 + ["ultra_sparsification"] * 5 + ["restoration"] * 2
    size = 101 * 40 + 2 * (120 * 40 + 40 * 40 + 2 * 2 * 40)
    live = [sum(r["nnz"].values()) for r in found]
    shares = [0, 1 - (1 / 2) ** 3, 1, 1, 1, 1, 1, 1, 1 - (1 / 2) ** 3, 0]
    assert live == [int(size * (1 - 0.8 * share) + 0.5) for share in shares]
    assert all(r["churn"] > 0.05 for r in found[3:9])
    explored = [r["explored"] for r in found]
    assert explored[0] == explored[-1] == 1.0  # it began dense
    assert result["nnz"] == found[-1]["nnz"]


@pytest.mark.parametrize("sharding", [{"type": "fsdp2"}, {"type": "none"}], ids=["fsdp2", "none"])
def test_two_ranks_and_two_micro_batches_and_one_batch_grow_the_same(tmp_path, sharding):
    """The growth gradient is |mean over the global batch|, all micro-batches in it, taken dense after the reduction."""
    plain = {"run": {"name": "plain", "seed": 3}, "sharding": sharding}
    one = {"training": {"length": 4, "sequences": 4, "micro": 4, "validate_every": 4, "validation_sequences": 2}}
    two = {"training": one["training"] | {"micro": 2}}
    joined = spawn(grown_against_reference, 1, str(tmp_path / "joined"), SECTIONS | plain | one)
    split = spawn(grown_against_reference, 1, str(tmp_path / "split"), SECTIONS | plain | two)
    ranks = spawn(grown_against_reference, 2, str(tmp_path / "ranks"), SECTIONS | plain | two)
    assert joined[0]["digest"] == split[0]["digest"] == ranks[0]["digest"] == ranks[1]["digest"]


def grown_against_reference(folder: str, sections: dict[str, Any]) -> dict[str, Any]:
    """The masks after one RigL update are those of a float64 gradient of the joined batch, computed without any of our code."""
    sparsity = {"target": 0.75, "evolution": {"type": "rigl", "update_interval": 2, "drop_decay": "constant"}}
    t, _ = assemble(folder, sections, sparsity)
    assert t.keeper is not None
    before = {name: t.sharded.whole(name, mask) for name, mask in masks_of(t).items()}
    values = {name: t.sharded.whole(name, t.sharded.parts[name].local.detach()).clone() for name in before}
    reference = joined_gradient(t, 2)
    forward_backward(t, 2)
    _, stepped, change = update(t, 2)
    assert change is not None
    assert not stepped
    moved = 0
    for name, old in before.items():
        new = t.sharded.whole(name, masks_of(t)[name])
        count = int(change.update.drop_fraction * int(old.sum()))
        dropped = values[name].abs().where(old, torch.inf).flatten().argsort(stable=True)[:count]
        kept = old.flatten().clone()
        kept[dropped] = False
        order = reference[name].abs().where(~kept.view_as(old), -1).flatten().argsort(descending=True, stable=True)
        expected = kept.clone()
        expected[order[:count]] = True
        assert torch.equal(new.flatten(), expected), name
        moved += count
    assert moved > 500
    return snapshot(t)


def joined_gradient(t: Any, step: int) -> dict[str, torch.Tensor]:
    """Gradient of the mean loss over the whole batch of a step, in float64, of a model that is whole on this rank."""
    model = build(ModelConfig.check(SECTIONS["model"]), 3, context=CONTEXT).double()
    names = [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        whole = {name: t.sharded.whole(name, t.sharded.parts[name].local.detach()) for name in names}
        for name, parameter in model.named_parameters():
            parameter.copy_(whole[name])
    batch = t.feed.batch(step, range(4))
    logits = model(input_ids=batch.input_ids).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def dying(folder: str, sections: dict[str, Any], sparsity: dict[str, Any], step: int, where: str) -> dict[str, Any]:
    """Train; where `step` >= 0 every rank dies in it: before its batch, between proposal and commit, or between commit and swap."""
    t, state = assemble(folder, sections, sparsity)
    assert t.keeper is not None
    keeper, agreed, swap = t.keeper, t.keeper._agreed, t.keeper._swap

    def die(at: str) -> None:
        if state.step == step and where == at:
            t.checkpointer.wait()
            raise Died

    def agreed_or_died(ask: Any) -> Any:
        die("proposed")
        return agreed(ask)

    def swap_or_die(*arguments: Any) -> None:
        die("committed")
        swap(*arguments)

    feed = t.feed

    class Feed:
        def batch(self, at: int, rows: Any) -> Any:
            die("before")
            return feed.batch(at, rows)

    keeper._agreed, keeper._swap, t.feed = agreed_or_died, swap_or_die, Feed()
    try:
        state = train(t, state)
    except Died:
        return {}
    return snapshot(t) | {"nnz": dict(t.nnz), "history": history(folder)}


@pytest.mark.parametrize(
    ("step", "where"),
    # the step before an update, in the update, the last step of a phase, the first of the next
    [
        (7, "before"),
        (8, "before"),
        (8, "proposed"),
        (8, "committed"),
        (5, "before"),
        (6, "before"),
        (17, "before"),
        (18, "before"),
        (20, "committed"),
    ],
)
def test_dying_anywhere_changes_nothing(alone, tmp_path, step, where):
    sections = SECTIONS | {"checkpoint": {"every": 5 if step != 6 else 6}}
    spawn(dying, 2, str(tmp_path), sections, MST, step, where)
    committed = [r["step"] for r in records(tmp_path)]
    assert max(committed) == max([s for s in (0, 2, 4, 8, 10, 12, 14, 16, 20, 22) if s < step or (s == step and where == "committed")])
    (result,) = spawn(dying, 1, str(tmp_path), sections, MST, -1, "never")  # another world size goes on
    assert differences(alone("mst"), result) == []
    assert [r["step"] for r in records(tmp_path)[1:]] == [2, 4, 8, 10, 12, 14, 16, 20, 22]


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2)])
def test_packed_buffers_go_on_on_other_ranks(alone, tmp_path, before, after):
    """They follow the masks of the checkpoint, which those of the beginning are no longer."""
    sections = SECTIONS | {"checkpoint": {"every": 5}, "sharding": {"packed": "on"}}
    spawn(run, before, str(tmp_path), sections, RIGL, 17)
    for other in spawn(run, after, str(tmp_path), sections, RIGL):
        assert differences(alone("rigl"), other) == []
        assert other["state"]["bytes_sent"] < 0.75 * other["state"]["dense_bytes"]


KILLED = """
import os, signal, sys
import torch
import torch.distributed as dist
from tests.train import test_evolving as here
from tests.train.steps import assemble
from raysparse.train.loop import train

torch.set_num_threads(1)
dist.init_process_group("gloo")
t, state = assemble({folder!r}, here.SECTIONS | {{"checkpoint": {{"every": 5}}}}, here.MST)
agreed = t.keeper._agreed

def agreed_or_killed(ask):
    if state.step == 8 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)  # it has proposed and voted; rank 0 asks for the verdict and waits for it
    return agreed(ask)

t.keeper._agreed = agreed_or_killed
train(t, state)
"""


def test_a_rank_killed_between_proposal_and_commit(alone, tmp_path):
    """kill -9 of one rank while the other is in the vote: the other ends too, and the run goes on bit-equal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", KILLED.format(folder=str(tmp_path))]
    ranks = [subprocess.Popen(command, env=os.environ | common | {"RANK": str(r)}, stderr=subprocess.PIPE, text=True) for r in range(2)]
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert ranks[1].returncode == -signal.SIGKILL
    assert ranks[0].returncode != 0
    assert "onnection" in errors[0]  # closed by peer
    assert max(r["step"] for r in records(tmp_path)) in (4, 8)  # rank 0 may have committed before it noticed
    (result,) = spawn(run, 1, str(tmp_path), SECTIONS | {"checkpoint": {"every": 5}}, MST)
    assert differences(alone("mst"), result) == []


def a_thousand_updates(dtype: torch.dtype) -> tuple[list[int], str]:
    """(live weights of each layer after each update, minus the plan; digest of the last masks): random walks with many ties."""
    from raysparse.sparsity.agenda import Agenda
    from raysparse.sparsity.evolve import first_topology, propose
    from raysparse.sparsity.topology import Rows
    from raysparse.train.process import ranks_of

    world, rank = dist.get_world_size(), dist.get_rank()
    ranks = ranks_of(dist.group.WORLD, torch.device("cpu"))
    shapes = {"a": (7, 16), "b": (2, 24), "c": (1, 8)}  # rows that 3 does not divide, and fewer rows than ranks
    sparsity = {"target": 0.6, "evolution": {"type": "mixed", "update_interval": 1}, "timeline": [{"sparsity": {"type": "cosine"}}]}
    agenda = Agenda.check({"sparsity": sparsity, "shapes": shapes, "steps": 1001, "tokens_per_step": 1, "seed": 5})
    chunk = {name: -(-rows // world) for name, (rows, _) in shapes.items()}
    first = {name: min(rank * chunk[name], rows) for name, (rows, _) in shapes.items()}
    here = {name: Rows(first[name], min(chunk[name], rows - first[name]), cols) for name, (rows, cols) in shapes.items()}

    def values(step: int) -> dict[str, torch.Tensor]:
        found = {}
        for name, (rows, cols) in shapes.items():
            whole = torch.randint(3, (rows, cols), generator=torch.Generator().manual_seed(step)).to(dtype)
            found[name] = whole[here[name].first : here[name].first + here[name].count].contiguous()
        return found

    topology = first_topology(agenda, here, values(0), ranks)
    live, wrong = topology.nnz(ranks), []
    for step in agenda.update_steps:
        weights = values(step)
        topology.kill(weights)
        update = agenda.decide(step)
        topology.evolve(propose(agenda, update, topology, live, weights, values(step + 5000), ranks).masks)
        live = topology.nnz(ranks)
        wrong += [live[name] - update.nnz[name] for name in shapes]
    return wrong, topology.digest(ranks)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "ranks"), [(torch.float32, 2), (torch.bfloat16, 3)])
def test_a_thousand_updates_are_exact_over_all_ranks(dtype, ranks):
    expected = spawn(a_thousand_updates, 1, dtype)[0]
    assert expected[0] == [0] * 3000
    assert spawn(a_thousand_updates, ranks, dtype) == [expected] * ranks


def moved_bit(folder: str, sections: dict[str, Any], where: str) -> str:
    """The error of a run in which rank 1 moves one live bit, at equal nnz."""
    t, state = assemble(folder, sections, RIGL)
    assert t.keeper is not None
    name = "transformer.h.0.attn.c_attn.weight"

    def move(masks: dict[str, torch.Tensor]) -> None:
        mask = masks[name]
        live, gone = mask.flatten().nonzero()[0], (~mask).flatten().nonzero()[0]
        mask.view(-1)[live], mask.view(-1)[gone] = False, True

    if dist.get_rank() == 1 and where == "in place":
        masks_of(t)[name] = masks_of(t)[name].clone()
        move(t.keeper.topology.masks)
    if dist.get_rank() == 1 and where == "proposal":
        import raysparse.train.keeper as keeper

        honest = keeper.propose

        def propose(*arguments: Any) -> Any:
            proposal = honest(*arguments)
            move(proposal.masks)
            return proposal

        keeper.propose = propose
    try:
        train(t, state)
    except TrainingError as error:
        assert state.step == 3, "it must stop before the step of the update"
        return str(error)
    return "no error"


@pytest.mark.parametrize("where", ["in place", "proposal"])
@pytest.mark.parametrize("sharding", [{}, {"type": "none"}, {"replicas": 2}], ids=["shards", "replicas", "hsdp"])
def test_one_moved_bit_stops_the_run(tmp_path, sharding, where):
    sections = SECTIONS | {"sharding": sharding, "logging": {"every": 100, "tensorboard": False}}  # a look for leaks would be first
    errors = spawn(moved_bit, 4 if "replicas" in sharding else 2, str(tmp_path), sections, where)
    assert len(set(errors)) == 1
    assert "Expected" in errors[0]
    assert "transformer.h.0.attn.c_attn.weight" in errors[0]
    assert any(ranks in errors[0] for ranks in ("rank 1", "ranks 0, 1", "ranks 1, 3"))  # of shards only the sum is known


def nan_in_a_dead_gradient(folder: str, sections: dict[str, Any], sparsity: dict[str, Any]) -> dict[str, Any]:
    """In step 3, that of an update, and in step 4 one dead gradient is NaN."""
    t, state = assemble(folder, sections, sparsity)
    collect, name = t.sharded.collect, "transformer.h.0.attn.c_attn.weight"

    def poisoned() -> dict[str, torch.Tensor]:
        gradients = collect()
        if state.step in (3, 4) and (gone := (~masks_of(t)[name]).flatten().nonzero()).numel():
            gradients[name].view(-1)[gone[0]] = torch.nan
        return gradients

    t.sharded.collect = poisoned
    state = train(t, state)
    weights = [part.local for part in t.sharded.parts.values()] + list(moments(t.sharded, t.optimizer, "exp_avg").values())
    assert all(bool(weight.isfinite().all()) for weight in weights)
    return {"console": (Path(folder) / "console.txt").read_text(), "step": state.step, "growth": t.ledger.growth.total}


def test_nan_in_a_dead_gradient_skips_the_update_and_spreads_nowhere(tmp_path):
    results = spawn(nan_in_a_dead_gradient, 2, str(tmp_path), SECTIONS, RIGL)
    assert "topology unchanged in step 4" in results[0]["console"]
    assert "is not finite" in results[0]["console"]
    found = records(tmp_path)
    assert [r["skipped"] is not None for r in found] == [False, True] + [False] * (len(found) - 2)
    assert found[1]["digest"] == found[0]["digest"] != found[2]["digest"]
    assert results[0]["step"] == 24


def test_mest_looks_at_no_dead_gradient(tmp_path):
    """Its importance is of live weights and its growth is random: a dead NaN is nothing to it, and no dense gradient is counted."""
    mest = {"target": 0.75, "evolution": {"type": "mest", "update_interval": 3}}
    results = spawn(nan_in_a_dead_gradient, 2, str(tmp_path), SECTIONS, mest)
    assert "unchanged" not in results[0]["console"]
    found = records(tmp_path)
    assert not any(r["skipped"] for r in found)
    assert len({r["digest"] for r in found}) > 5
    assert results[0]["growth"] == 0.0


def moments_of_mst_code(folder: str, sections: dict[str, Any], reset: bool) -> tuple[int, int]:
    """(nonzero dead weights, nonzero dead first moments) after the run."""
    t, state = assemble(folder, sections, SET | {"evolution": {"type": "set", "update_interval": 3, "reset_grown_state": reset}})
    train(t, state)
    assert t.topology is not None
    found = dense_moments(t.sharded, t.optimizer, "exp_avg", t.topology)
    masks = masks_of(t)
    assert found.keys() == (set() if reset else masks.keys())  # live moments alone where none is to be kept of the dead
    weights = sum(int((t.sharded.parts[name].local[~mask] != 0).sum()) for name, mask in masks.items())
    return weights, sum(int((found[name][~mask] != 0).sum()) for name, mask in masks.items() if name in found)


@pytest.mark.parametrize("implementation", ["auto", "fused"])
def test_dead_moments_are_kept_only_on_request(tmp_path, implementation):
    sections = SECTIONS | {"optimizer": SECTIONS.get("optimizer", {}) | {"implementation": implementation, "state": "auto"}}
    assert spawn(moments_of_mst_code, 1, str(tmp_path / "reset"), sections, True) == [(0, 0)]
    ((weights, kept),) = spawn(moments_of_mst_code, 1, str(tmp_path / "kept"), sections, False)
    assert weights == 0
    assert kept > 100


def regrown(folder: str, sections: dict[str, Any]) -> None:
    """A weight that comes back starts at 0 with moments 0, and with no gradient and weight decay on it stays 0."""
    t, _ = assemble(folder, sections, {"target": 0.75, "evolution": {"type": "set", "update_interval": 2, "optimizer_steps": False}})
    forward_backward(t, 0)
    update(t, 0)
    forward_backward(t, 1)
    update(t, 1)
    before = {name: mask.clone() for name, mask in masks_of(t).items()}
    forward_backward(t, 2)
    update(t, 2)
    grown = {name: mask & ~before[name] for name, mask in masks_of(t).items()}
    assert sum(int(mask.sum()) for mask in grown.values()) > 50
    for _ in range(10):
        for part in t.sharded.parts.values():
            part.local.grad = torch.zeros_like(part.local)
        t.optimizer.step()
    for name, mask in grown.items():
        kept = [moments(t.sharded, t.optimizer, which)[name] for which in ("exp_avg", "exp_avg_sq")]
        whole = [value if value.ndim == 2 else t.topology.live(name).put(value) for value in kept]
        for tensor in (t.sharded.parts[name].local, *whole):
            assert not tensor[mask].any(), name


@pytest.mark.parametrize("state", ["live", "dense"])
@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_a_regrown_weight_starts_from_nothing(tmp_path, implementation, state):
    sections = SECTIONS | {
        "optimizer": {"lr": 1e-2, "clip_norm": 0.05, "weight_decay": 0.1, "implementation": implementation, "state": state}
    }
    spawn(regrown, 1, str(tmp_path), sections)
