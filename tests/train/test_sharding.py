"""Every kind of sharding trains the same sparse model; bytes on the wire are what the plan says."""

import ctypes
import importlib.util
import sys
import tempfile
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from raysparse.config import ConfigError
from raysparse.data.tokens import DataConfig
from raysparse.models.build import ModelConfig, blocks, build, skeleton
from raysparse.recipes import training
from raysparse.recipes.plan import estimate_bytes_sent
from raysparse.recipes.pretrain import PretrainConfig, agenda_of
from raysparse.train.loop import forward_backward, update
from raysparse.train.metrics import Console
from raysparse.train.optimizer import moments
from raysparse.train.process import alike, forget_peak_memory, peak_memory_bytes
from raysparse.train.run import LocalRun
from raysparse.train.shard import ShardingConfig, shard
from tests.ranks import spawn
from tests.train.steps import CONTEXT, SPARSE, assemble, config, dead, masks_of, run

KINDS = {
    "none": {"type": "none"},
    "fsdp2": {"type": "fsdp2"},
    "keep gathered": {"type": "fsdp2", "reshard_after_forward": False},
    "replicas": {"type": "fsdp2", "replicas": 2},
    "fairscale": {"type": "fairscale"},
}
STEPS = 8


def sections(kind: str, micro: int = 2) -> dict:
    """8 steps of 6 sequences: 3 on each of 2 ranks, in micro-batches of 2 and 1."""
    if kind == "fairscale" and importlib.util.find_spec("fairscale") is None:
        pytest.skip("fairscale is not installed: pip install 'raysparse[fairscale]'")
    training = {"length": STEPS, "sequences": 6, "micro": micro, "validate_every": STEPS, "validation_sequences": 5}
    return {"training": training, "sharding": KINDS[kind]}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return spawn(run, 1, str(tmp_path_factory.mktemp("alone")), sections("fsdp2"), SPARSE)[0]


@pytest.mark.parametrize("micro", [1, 3], ids=["accumulated", "at once"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_the_same_model(alone, tmp_path, kind, micro):
    for other in spawn(run, 2, str(tmp_path), sections(kind, micro), SPARSE):
        assert other["digest"] == alone["digest"]
        assert other["nnz"] == alone["nnz"]
        torch.testing.assert_close(torch.tensor(other["history"]), torch.tensor(alone["history"]), rtol=1e-4, atol=0)
        assert other["state"]["losses"]["validation"] == pytest.approx(alone["state"]["losses"]["validation"], rel=1e-4)
        for name, mask in dead(other).items():
            assert not other[f"model/{name}"][mask].any()
            torch.testing.assert_close(other[f"model/{name}"], alone[f"model/{name}"], rtol=0, atol=1e-3)


LARGE = {"preset": "debug", "overrides": {"n_embd": 512, "n_head": 2, "n_layer": 16, "vocab_size": 97}}
"""200 MB of weights."""


def memory_of_first_and_second(kind: str) -> tuple[float, dict[str, float]]:
    """(growth of this rank's peak while a model is made and sharded, in sizes of the model; sums of this rank's values)."""
    model, place = ModelConfig.check(LARGE), ShardingConfig.check(KINDS[kind])
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back to the system, and the peak is what was held
    small = build(ModelConfig(preset="debug"), 0, 97, CONTEXT)
    shard(small, blocks(small), place, "cpu", torch.float32)  # what is imported and allocated once
    with tempfile.TemporaryFile("w") as file:
        local = LocalRun(Console(file))
        forget_peak_memory()
        before = peak_memory_bytes()
        whole = training.first_builds(local, model, 3, None, CONTEXT)
        size = sum(weight.nbytes for weight in whole.parameters())
        sharded = shard(whole, blocks(whole), place, "cpu", torch.float32)
        grown = (peak_memory_bytes() - before) / size
    whole_values = {name: sharded.whole(name, part.local.detach()).double().sum().item() for name, part in sharded.parts.items()}
    return grown, whole_values


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and sets glibc's malloc")
def test_only_the_first_rank_holds_a_model_whole_while_it_is_made():
    (first, values), (second, others) = spawn(memory_of_first_and_second, 2, "fsdp2")
    assert values == others
    built = build(ModelConfig.check(LARGE), 3, context=CONTEXT)
    assert {name: weight.double().sum().item() for name, weight in built.named_parameters()} == pytest.approx(values, abs=1e-9)
    assert 1.4 < first < 1.8, f"{first:.2f}: the whole model, and its own half"
    assert second < 0.75, f"{second:.2f} of the model, of which this rank keeps a half, and the largest weight for a while"


def logits_after(kind: str) -> tuple[Tensor, Tensor]:
    """Of a Llama, whose positions are in buffers, before it is sharded and after; on the second rank all values are others before."""
    sections(kind)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
    ids = torch.arange(12).view(1, 12)
    before = model(input_ids=ids).logits.detach()
    if dist.get_rank() > 0:
        for value in (*model.parameters(), *model.buffers()):
            value.data.fill_(7)
    sharded = shard(model, blocks(model), ShardingConfig.check(KINDS[kind]), "cpu", torch.float32)
    return before, sharded.module(input_ids=ids).logits.detach()


@pytest.mark.parametrize("kind", ["none", "fsdp2", "replicas", "fairscale"])
def test_every_rank_gets_weights_and_buffers_of_the_first(kind):
    for before, after in spawn(logits_after, 2, kind):
        assert torch.equal(before, after)


def fails_on_the_second(error: Exception) -> str:
    def make() -> int:
        if dist.get_rank() == 1:
            raise error
        return 0

    try:
        alike(make)
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    return "nothing"


def test_what_one_rank_cannot_read_all_ranks_tell():
    assert spawn(fails_on_the_second, 2, ConfigError("Expected a file. Got none.")) == ["ConfigError: Expected a file. Got none."] * 2
    assert spawn(fails_on_the_second, 2, MemoryError("no room")) == ["ConfigError: MemoryError: no room", "MemoryError: no room"]


def untied(path: str) -> str:
    with tempfile.TemporaryFile("w") as file:
        try:
            training.first_builds(LocalRun(Console(file)), ModelConfig(path=path), 0)
        except ConfigError as error:
            return str(error)
    return "nothing"


def test_weights_that_are_not_tied_as_their_config_says_are_refused(tmp_path):
    """The ranks that only have the config would not have them."""
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(state | {"lm_head.weight": torch.ones(50, 16)}, tmp_path / "model.safetensors", {"format": "pt"})
    for said in spawn(untied, 2, str(tmp_path)):
        assert said.startswith("Expected weights at ")
        assert "Got others of their own: lm_head.weight. Set model.overrides={tie_word_embeddings: false}" in said


def handed_to_fairscale(folder: str) -> tuple[dict[str, int], int, int]:
    """(name -> dead entries that were ever not 0 in the weight, gradient or moments of a tensor that this rank owns,
    reductions, parameters), of three steps of two micro-batches."""
    t, _ = assemble(folder, sections("fairscale") | {"optimizer": {"state": "dense"}}, SPARSE)
    found: dict[str, int] = {}
    reductions, reduce = [], torch.distributed.reduce
    torch.distributed.reduce = lambda *args, **kwargs: (reductions.append(0), reduce(*args, **kwargs))[1]  # pyrefly: ignore

    def look(*_: object) -> None:
        averages = moments(t.sharded, t.optimizer, "exp_avg"), moments(t.sharded, t.optimizer, "exp_avg_sq")
        for name, mask in masks_of(t).items():
            part = t.sharded.parts[name]
            assert part.mine == (part.local.grad is not None)
            if part.mine:
                tensors = [part.local, cast(Tensor, part.local.grad), *(values[name] for values in averages)]
                found[name] = found.get(name, 0) + sum(int((tensor[~mask] != 0).sum()) for tensor in tensors)

    inner = cast(Any, t.optimizer).optim  # the AdamW that OSS wraps
    inner.register_step_pre_hook(look)
    inner.register_step_post_hook(look)
    for step in range(3):
        forward_backward(t, step)
        update(t, step)
        for name, mask in masks_of(t).items():
            assert not t.sharded.local[name][~mask].any()  # what the owner has sent, too
            assert t.sharded.local[name][mask].all()
    return found, len(reductions), len(t.sharded.parts)


def test_dead_entries_are_zero_on_the_owner_under_fairscale(tmp_path):
    sections("fairscale")
    (first, reductions, parameters), (second, _, _) = spawn(handed_to_fairscale, 2, str(tmp_path))
    assert not first.keys() & second.keys()
    assert len(first | second) == 8
    assert set((first | second).values()) == {0}
    assert reductions == 3 * parameters  # once a step, not once a micro-batch


WIRE = {"preset": "debug", "overrides": {"n_embd": 40, "n_head": 5, "n_layer": 2, "vocab_size": 102}}


def bytes_sent(folder: str, settings: dict) -> int:
    t, _ = assemble(folder, settings, SPARSE)
    for step in range(3):
        forward_backward(t, step)
        update(t, step)
    return t.sharded.wire.bytes_sent


@pytest.mark.parametrize("packed", ["off", "on"])
@pytest.mark.parametrize("kind", KINDS)
def test_plan_says_how_many_bytes_are_sent(tmp_path, kind, packed):
    """2 divides all rows here; where the ranks do not, FSDP2 pads, and a little more is sent than planned."""
    wire = sections(kind) | {"model": WIRE}
    wire["sharding"] = wire["sharding"] | {"packed": packed}
    settings = config(**wire | {"run": {"name": "wire", "workers": 2}})
    values = settings.model_dump() | {"data": DataConfig(context=CONTEXT).model_dump(), "sparsity": SPARSE}
    pretrain, model = PretrainConfig.check(values), skeleton(settings.model, None, CONTEXT)
    planned, live = (estimate_bytes_sent(pretrain, model, torch.float32, agenda) for agenda in (None, agenda_of(pretrain, model)))
    sent = spawn(bytes_sent, 2, str(tmp_path), wire)
    if packed == "on" and wire["sharding"]["type"] == "fsdp2":
        assert sent == pytest.approx([3 * live] * 2, rel=0.02)  # the fuller rank's live weights count
        assert live < 0.8 * planned
    else:
        assert sent == [3 * planned] * 2
        assert live == planned > 4 * 102 * 40


@pytest.mark.parametrize(
    ("values", "workers", "text"),
    [
        ({"replicas": 3}, 4, "Expected sharding.replicas to divide run.workers. Got 3 replicas, 4 workers."),
        ({"type": "none", "replicas": 2}, 4, "Expected sharding.replicas=1 with sharding.type=none. Got 2."),
    ],
)
def test_impossible_shardings_are_refused(values, workers, text):
    with pytest.raises(ConfigError, match=text.replace(".", r"\.")):
        ShardingConfig.check(values).check_workers([workers])


def memory(folder: str, kind: str, state: str) -> dict[str, int]:
    return assemble(folder, sections(kind) | {"optimizer": {"state": state}}, SPARSE)[0].memory()


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_what_the_ranks_keep(tmp_path, kind):
    dense, live = (spawn(memory, 2, str(tmp_path / state), kind, state) for state in ("dense", "live"))
    sizes, packed = ({name: sum(one[name] for one in found) for name in found[0]} for found in (dense, live))
    weights, gradients = {"none": (2, 2), "replicas": (2, 2), "fairscale": (2, 1)}.get(kind, (1, 1))  # copies over both ranks
    once = sizes["weights"] // weights
    assert once == 4 * sum(parameter.numel() for parameter in skeleton(config(**sections(kind)).model, context=CONTEXT).parameters())
    assert sizes["gradients"] == gradients * once
    assert sizes["moments"] == sizes["dense_moments"] == packed["dense_moments"] == 2 * gradients * once
    assert packed["moments"] < sizes["moments"]


def test_missing_fairscale_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fairscale.optim.oss", None)
    with pytest.raises(ConfigError, match=r"Expected the package fairscale.*pip install 'raysparse\[fairscale\]'"):
        ShardingConfig(type="fairscale").check_workers([1])
