"""Training with a teacher: the objective as published, whatever it is split into; the teacher stays as it is."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, MptConfig, MptForCausalLM

from raysparse.config import ConfigError
from raysparse.losses import cross_entropy_sum, kl_sum
from raysparse.models.build import blocks, build
from raysparse.models.features import BlockOutputs, ChosenLogits
from raysparse.train.distill import Distillation, DistillationConfig
from raysparse.train.loop import forward_backward, train
from tests.ranks import spawn
from tests.train.steps import CONTEXT, SPARSE, Tokens, assemble, config, dead, differences, run

STEPS = 8
ALL = {"task": 0.5, "logit": 0.7, "feature": 1.3, "temperature": 2.0, "eps": 1e-3}


def sections(distillation: dict[str, Any] = ALL, micro: int = 2, **more: Any) -> dict[str, Any]:
    """8 steps of 6 sequences, in micro-batches; AdamW's steps are larger than a weight's rounding errors."""
    training = {"length": STEPS, "sequences": 6, "micro": micro, "validate_every": STEPS, "validation_sequences": 5}
    return {"distillation": distillation, "training": training, "optimizer": {"lr": 1e-3}} | more


def gradients(folder: str, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Of the first step, whole; and what is told of it."""
    t, _ = assemble(folder, given, SPARSE)
    loss, _, _, _ = forward_backward(t, 0)
    found = {name: t.sharded.whole(name, gradient) for name, gradient in t.sharded.collect().items()}
    parts = {name: t.all_sum(part) for name, part in t.objective.parts().items()}
    return found | {"loss": t.all_sum(loss), "passes": torch.tensor(t.objective.passes)} | parts


def by_hand(distillation: dict[str, Any], **given: Any) -> dict[str, torch.Tensor]:
    """The same in plain torch: the whole batch at once, all hidden states kept, means over the batch."""
    settings = config(**given)
    student, teacher = build(settings.model, settings.run.seed, context=CONTEXT), build(settings.model, 4, context=CONTEXT).eval()
    outputs: tuple[list[torch.Tensor], ...] = [], []
    for model, found in zip((student, teacher), outputs, strict=True):
        for block in blocks(model).values():
            block.register_forward_hook(lambda _, __, out, found=found: found.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        for name, weight in spawn(first_weights, 1, given)[0].items():
            student.get_parameter(name).copy_(weight)
    batch = Tokens(101).batch(0, range(6))
    c = DistillationConfig.check({"teacher": "it"} | distillation)
    logits = student(input_ids=batch.input_ids).logits
    with torch.no_grad():
        told = teacher(input_ids=batch.input_ids).logits
    count = batch.num_targets
    features = sum(((s - t).square().mean() / (t.square().mean() + c.eps)) for s, t in zip(*outputs, strict=True))
    kl = kl_sum(logits.flatten(0, 1), told.flatten(0, 1), c.temperature) / count
    cross_entropy = cross_entropy_sum(logits, batch.labels)
    (c.task * cross_entropy / count + c.logit * kl + c.feature * features).backward()
    found = {name: parameter.grad for name, parameter in student.named_parameters()}
    return found | {"loss": cross_entropy.detach(), "logit": kl.detach(), "feature": features.detach()}


def first_weights(given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """With the zeros of the product's first masks."""
    with tempfile.TemporaryDirectory() as folder:
        t, _ = assemble(folder, sections(**given), SPARSE)
        return {name: part.local.detach().clone() for name, part in t.sharded.parts.items()}


CASES = [(1, 6, True), (1, 2, True), (1, 2, False), (2, 2, True), (2, 3, False), (3, 1, False)]


@pytest.mark.parametrize(("ranks", "micro", "keep"), CASES)
def test_gradients_are_those_of_the_published_loss_over_the_whole_batch(tmp_path, ranks, micro, keep):
    expected = by_hand(ALL)
    found = spawn(gradients, ranks, str(tmp_path), sections(ALL | {"keep_features": keep}, micro))[0]
    assert int(found.pop("passes")) == (1 if keep or 6 // ranks <= micro else 2)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


def family(name: str, folder: Path) -> dict[str, Any]:
    """A small model of another family than GPT-2, in a folder; student and teacher begin with its weights, the student's masked."""
    torch.manual_seed(5)
    if name == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=101, **sizes))
    else:
        model = MptForCausalLM(MptConfig(vocab_size=101, d_model=32, n_layers=2, n_heads=4, max_seq_len=32))
    model.save_pretrained(folder)
    return {"model": {"preset": None, "path": str(folder), "overrides": {"vocab_size": 101}}}


@pytest.mark.parametrize("name", ["llama", "mpt"])
def test_other_families_learn_by_the_same_loss(tmp_path, name):
    model = family(name, tmp_path / "model")
    expected = by_hand(ALL, **model)
    assert expected["feature"] > 0.01
    found = spawn(gradients, 2, str(tmp_path / "run"), sections(ALL, 2, **model))[0]
    for part, value in expected.items():
        torch.testing.assert_close(found[part], value, rtol=2e-4, atol=2e-6, msg=lambda text, part=part: f"{part}: {text}")
    given = sections(run={"parity": True}, **model)
    one, two = (spawn(run, ranks, str(tmp_path / str(ranks)), given, SPARSE)[0] for ranks in (1, 2))
    assert differences(one, two) == []


@pytest.mark.parametrize("only", ["logit", "feature"])
def test_a_weight_of_0_leaves_a_part_out(tmp_path, only):
    weights = {"task": 0.0, "logit": 0.0, "feature": 0.0, "eps": 1e-3} | {only: 1.0}
    expected, found = by_hand(weights), spawn(gradients, 1, str(tmp_path), sections(weights))[0]
    assert {"logit", "feature"} & found.keys() == {only}
    for name in expected.keys() - {"logit", "feature"}:
        torch.testing.assert_close(found[name], expected[name], rtol=2e-4, atol=2e-6)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, Any]:
    return spawn(run, 1, str(tmp_path_factory.mktemp("alone")), sections(), SPARSE)[0]


SPREAD = {
    "none": {"type": "none"},
    "fsdp2": {"type": "fsdp2"},
    "packed": {"type": "fsdp2", "packed": "on"},
    "replicas": {"type": "fsdp2", "replicas": 2},
    "recomputed": {"type": "fsdp2"},
}


@pytest.mark.parametrize("kind", SPREAD)
def test_two_ranks_learn_what_one_learns(alone, tmp_path, kind):
    given = sections(sharding=SPREAD[kind])
    given["training"] |= {"activation_checkpointing": kind == "recomputed"}
    for other in spawn(run, 2, str(tmp_path), given, SPARSE):
        assert other["digest"] == alone["digest"]
        torch.testing.assert_close(torch.tensor(other["history"]), torch.tensor(alone["history"]), rtol=1e-3, atol=0)
        for name, mask in dead(other).items():
            assert not other[f"model/{name}"][mask].any()
            torch.testing.assert_close(other[f"model/{name}"], alone[f"model/{name}"], rtol=0, atol=1e-3)


def test_bfloat16_is_close(alone, tmp_path):
    settings = sections(run={"precision": "bfloat16"})
    one, two = (spawn(run, ranks, str(tmp_path / str(ranks)), settings, SPARSE)[0] for ranks in (1, 2))
    for other in (one, two):
        torch.testing.assert_close(torch.tensor(other["history"]), torch.tensor(alone["history"]), rtol=2e-2, atol=0)
        assert other["state"]["losses"]["validation"] == pytest.approx(alone["state"]["losses"]["validation"], rel=1e-2)


@pytest.mark.slow
def test_compiled_blocks_learn_alike(alone, tmp_path):
    settings = sections()
    settings["training"] |= {"compile": True}
    compiled = spawn(run, 2, str(tmp_path), settings, SPARSE, timeout_s=600.0)[0]
    assert compiled["digest"] == alone["digest"]
    torch.testing.assert_close(torch.tensor(compiled["history"]), torch.tensor(alone["history"]), rtol=1e-3, atol=0)


def test_parity_is_bit_equal_at_two_ranks(tmp_path):
    given = sections(run={"parity": True})
    one = spawn(run, 1, str(tmp_path / "1"), given, SPARSE)[0]
    two = spawn(run, 2, str(tmp_path / "2"), given, SPARSE)[0]
    assert differences(one, two) == []


def halfway(folder: str, given: dict[str, Any]) -> dict[str, Any]:
    run(folder, given, SPARSE, die_in=6)
    return run(folder, given, SPARSE)


def test_a_run_that_died_goes_on_exactly(alone, tmp_path):
    resumed = spawn(halfway, 1, str(tmp_path), sections(checkpoint={"every": 2}))[0]
    assert differences(alone, resumed) == []


def teachers_weights(folder: str) -> tuple[dict[str, torch.Tensor], ...]:
    """Before and after, whether it was ever in training mode, and gradients that it has."""
    t, _ = assemble(folder, sections(), SPARSE)
    assert isinstance(t.objective, Distillation)
    teacher = t.objective._teacher._sharded
    before = copy.deepcopy({name: part.local for name, part in teacher.parts.items()})
    modes = []
    teacher.module.register_forward_hook(lambda module, *_: modes.append(module.training))
    for step in range(2):
        forward_backward(t, step)
    optimizer: Optimizer = t.optimizer
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not stepped & {id(part.local) for part in teacher.parts.values()}
    assert modes
    assert not any(modes)
    assert all(parameter.grad is None for parameter in teacher.module.parameters())
    return before, {name: part.local for name, part in teacher.parts.items()}


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_teacher_does_not_learn(tmp_path, ranks):
    before, after = spawn(teachers_weights, ranks, str(tmp_path))[0]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_blocks_are_noted_only_while_told_to():
    model = build(config().model, 3, context=CONTEXT)
    outputs, ids = BlockOutputs(model), torch.zeros(1, 4, dtype=torch.int64)
    model(input_ids=ids)
    with outputs.noted() as found:
        model(input_ids=ids)
    model(input_ids=ids)
    assert [tuple(features.shape) for features in found] == [(1, 4, 40)] * 2
    assert torch.equal(model.transformer.ln_f(found[-1]), model.transformer(input_ids=ids).last_hidden_state)


def test_a_distillation_that_teaches_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"Expected distillation\.logit or distillation\.feature above 0"):
        DistillationConfig.check({"teacher": "it", "feature": 0})


def flops(folder: str, logit: float) -> tuple[float, float, float]:
    t, state = assemble(folder, sections(ALL | {"logit": logit}), SPARSE)
    train(t, state)
    return t.ledger.teacher.total, t.ledger.dense.total, t.ledger.dense.head


@pytest.mark.parametrize("logit", [0.0, 1.0])
def test_the_ledger_counts_the_teacher_apart(tmp_path, logit):
    """Its head is computed for tokens that are predicted, here all of them, and only if the loss asks for logits."""
    teacher, dense, head = spawn(flops, 1, str(tmp_path), logit)[0]
    assert teacher == pytest.approx((dense if logit else dense - head) / 3)


def test_logits_of_chosen_tokens_alone():
    model = build(config().model, 3, context=CONTEXT)
    head, ids = ChosenLogits(model), torch.arange(8).view(2, 4)
    whole, chosen = model(input_ids=ids).logits, torch.tensor([[True, False, False, True], [False, True, False, False]])
    with head.of(chosen):
        torch.testing.assert_close(model(input_ids=ids).logits, whole[chosen])
    with head.of(torch.zeros_like(chosen)):
        assert model(input_ids=ids).logits.shape == (0, whole.shape[-1])
    assert torch.equal(model(input_ids=ids).logits, whole)
