"""T5 and Whisper in training: padding moves nothing, the teacher's blocks are compared where something is read, two ranks learn as one."""

from typing import Any

import pytest
import torch

from raysparse.losses import cross_entropy_sum
from raysparse.models.build import blocks, build
from raysparse.models.features import BlockOutputs
from raysparse.models.hub_config import ANY_KIND
from raysparse.train.distill import DistillationConfig
from raysparse.train.loop import forward_backward, train
from tests.ranks import spawn
from tests.train.steps import CONTEXT, ENCODER_DECODERS, SPARSE, Pairs, assemble, config, dead, differences, run

LEARN = {"task": 0.5, "logit": 0.7, "feature": 1.3, "temperature": 2.0, "eps": 1e-3}
KINDS = list(ENCODER_DECODERS)


def sections(kind: str, **more: Any) -> dict[str, Any]:
    training = {"length": 6, "sequences": 6, "micro": 2, "validate_every": 6, "validation_sequences": 5}
    return {"model": ENCODER_DECODERS[kind], "distillation": LEARN, "training": training, "optimizer": {"lr": 1e-3}} | more


def feed(kind: str, padding: int = 0) -> Pairs:
    return Pairs(101, 20 if kind == "whisper" else 0, padding)


def gradients(folder: str, given: dict[str, Any], padding: int = 0) -> dict[str, torch.Tensor]:
    """Of the first step, whole; and what is told of it."""
    t, _ = assemble(folder, given, SPARSE)
    t.feed = feed("whisper" if t.feed.frames else "t5", padding)  # pyrefly: ignore
    loss, *_ = forward_backward(t, 0)
    found = {name: t.sharded.whole(name, gradient) for name, gradient in t.sharded.collect().items()}
    parts = {name: t.all_sum(part) for name, part in t.objective.parts().items()}
    return found | {"loss": t.all_sum(loss)} | parts


@pytest.fixture(scope="module", params=KINDS)
def one(request, tmp_path_factory):
    """(model, gradients of its first step on one rank)."""
    return request.param, spawn(gradients, 1, str(tmp_path_factory.mktemp("one")), sections(request.param))[0]


def test_what_stands_in_the_padding_moves_no_bit(one, tmp_path):
    kind, expected = one
    found = spawn(gradients, 1, str(tmp_path), sections(kind), 77)[0]
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def by_hand(kind: str) -> dict[str, torch.Tensor]:
    """The published objective in plain torch, one row at a time and without any padding; sums over rows are divided at the end."""
    settings, c = config(model=ENCODER_DECODERS[kind]), DistillationConfig.check({"teacher": "it"} | LEARN)
    student, teacher = (build(settings.model, seed, context=CONTEXT, kinds=ANY_KIND) for seed in (settings.run.seed, 4))
    teacher.eval()
    with torch.no_grad():
        for name, weight in spawn(first_weights, 1, kind)[0].items():
            student.get_parameter(name).copy_(weight)
    noted: tuple[list[torch.Tensor], ...] = [], []
    for model, found in zip((student, teacher), noted, strict=True):
        for block in blocks(model).values():
            block.register_forward_hook(lambda _, __, out, found=found: found.append(out[0] if isinstance(out, tuple) else out))
    errors, squares, counts, cross_entropy, kl, targets = [0.0] * 4, [0.0] * 4, [0] * 4, 0.0, 0.0, 0
    for row in range(6):
        batch = feed(kind).batch(0, [row])
        length = batch.num_targets
        inputs, labels = batch.inputs | {"decoder_input_ids": batch.input_ids[:, :length]}, batch.labels[:, :length]
        if batch.source_mask is not None:
            heard = int(batch.source_mask.sum())
            inputs |= {"input_ids": batch.source[:, :heard], "attention_mask": batch.source_mask[:, :heard]}  # pyrefly: ignore
        for found in noted:
            found.clear()
        said, told = student(**inputs).logits, teacher(**inputs).logits.detach()
        for k, (s, t) in enumerate(zip(*noted, strict=True)):
            errors[k] = errors[k] + (s - t.detach()).square().sum()
            squares[k] += float(t.detach().square().sum())
            counts[k] += t.numel()
        log_s, log_t = (torch.log_softmax(x[0] / c.temperature, -1) for x in (said, told))
        kl = kl + (log_t.exp() * (log_t - log_s)).sum() * c.temperature**2
        cross_entropy = cross_entropy + cross_entropy_sum(said, labels)
        targets += length
    features = sum(e / (s + c.eps * n) for e, s, n in zip(errors, squares, counts, strict=True))
    (c.task * cross_entropy / targets + c.logit * kl / targets + c.feature * features).backward()
    found = {name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None}
    return found | {"loss": cross_entropy.detach(), "logit": kl.detach() / targets, "feature": features.detach()}


def first_weights(kind: str) -> dict[str, torch.Tensor]:
    """With the zeros of the product's first masks."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        t, _ = assemble(folder, sections(kind), SPARSE)
        return {name: part.local.detach().clone() for name, part in t.sharded.parts.items()}


def test_gradients_are_those_of_the_published_loss_of_rows_without_padding(one):
    kind, found = one
    expected = by_hand(kind)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("keep", [True, False])
def test_two_ranks_give_the_gradients_of_one(one, tmp_path, keep):
    kind, expected = one
    found = spawn(gradients, 2, str(tmp_path), sections(kind, distillation=LEARN | {"keep_features": keep}))[0]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module", params=KINDS)
def alone(request, tmp_path_factory):
    return request.param, spawn(run, 1, str(tmp_path_factory.mktemp("alone")), sections(request.param), SPARSE)[0]


@pytest.mark.parametrize("sharding", ["fsdp2", "none", "packed", "recomputed"])
def test_two_ranks_learn_what_one_learns(alone, tmp_path, sharding):
    kind, expected = alone
    given = sections(kind, sharding={"type": "none" if sharding == "none" else "fsdp2", "packed": "on" if sharding == "packed" else "off"})
    given["training"] |= {"activation_checkpointing": sharding == "recomputed"}
    for other in spawn(run, 2, str(tmp_path), given, SPARSE):
        assert other["digest"] == expected["digest"]
        torch.testing.assert_close(torch.tensor(other["history"]), torch.tensor(expected["history"]), rtol=1e-3, atol=0)
        for name, mask in dead(other).items():
            assert not other[f"model/{name}"][mask].any()
            torch.testing.assert_close(other[f"model/{name}"], expected[f"model/{name}"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_parity_is_bit_equal_at_two_ranks(kind, tmp_path):
    given = sections(kind, run={"parity": True})
    one = spawn(run, 1, str(tmp_path / "1"), given, SPARSE)[0]
    two = spawn(run, 2, str(tmp_path / "2"), given, SPARSE)[0]
    assert differences(one, two) == []


def halfway(folder: str, given: dict[str, Any]) -> dict[str, Any]:
    run(folder, given, SPARSE, die_in=4)
    return run(folder, given, SPARSE)


def test_a_run_that_died_goes_on_exactly(alone, tmp_path):
    kind, expected = alone
    resumed = spawn(halfway, 1, str(tmp_path), sections(kind, checkpoint={"every": 2}))[0]
    assert differences(expected, resumed) == []


def counted(folder: str, kind: str) -> tuple[float, ...]:
    """Of the first step: dense FLOPs, those of the teacher, tokens, those that are predicted, and what the encoder reads of each row."""
    t, state = assemble(folder, sections(kind), SPARSE)
    t.pace = type(t.pace)(**vars(t.pace) | {"steps": 1})
    state = train(t, state)
    return (
        t.ledger.dense.total,
        t.ledger.teacher.total,
        state.tokens,
        t.feed.batch(0, range(6)).num_targets,
        t.feed.batch(0, [0]).source_length,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_ledger_counts_source_and_target(kind, tmp_path):
    from raysparse.models.build import skeleton
    from raysparse.models.multiplied import flops_architecture
    from raysparse.sparsity.flops import training_flops

    dense, teacher, tokens, predicted, source = spawn(counted, 1, str(tmp_path), kind)[0]
    arch = flops_architecture(skeleton(config(model=ENCODER_DECODERS[kind]).model, context=CONTEXT, kinds=ANY_KIND))
    assert (tokens, source) == (6 * CONTEXT, 20 if kind == "whisper" else 2 * CONTEXT)
    flops = training_flops(arch, 1.0, tokens, CONTEXT, "spdf", source=source)
    assert dense == flops.total
    assert teacher == pytest.approx((dense - flops.head * (1 - predicted / tokens)) / 3)  # its head sees what is predicted alone


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoders_blocks_come_first(kind):
    model = build(config(model=ENCODER_DECODERS[kind]).model, 3, context=CONTEXT, kinds=ANY_KIND)
    outputs = BlockOutputs(model)
    batch = feed(kind).batch(0, [0, 1])
    with outputs.noted() as found:
        model(**batch.inputs)
    positions = 10 if kind == "whisper" else 2 * CONTEXT
    assert outputs.num_encoder == 2
    assert [features.shape[1] for features in found] == [positions] * 2 + [CONTEXT] * 2
