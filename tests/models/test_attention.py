"""Sparse attention inside transformers' models: against the definition written out, alone, in company, sharded and compiled."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from raysparse.kernels import library
from raysparse.models.attention import HybridAttention, dense_mask, head_rules
from raysparse.models.build import blocks
from raysparse.models.layout import to_hub, to_linear
from raysparse.sparsity.attention import AnyAttention, ByHead, ByLayer, Full, Local
from raysparse.train.shard import ShardingConfig, shard
from tests.models.attentive import (
    HEADS,
    HEADS_OF_ALL_KINDS,
    LENGTH,
    MODELS,
    SPARSE,
    compiles,
    drawn,
    equal,
    gpt2,
    llama,
    of_heads,
    run,
    tokens,
)
from tests.ranks import spawn
from tests.sparsity.test_attention import sees


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small only wait for more of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def written_out(attention: AnyAttention) -> Any:
    """An attention function for transformers: each query's softmax over the keys that the definition lets it see."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: None, scaling: float, **_: Any) -> Any:
        group = query.shape[1] // key.shape[1]
        heads = []
        for head in range(query.shape[1]):
            pattern, rows = attention.of(module.layer_idx, head), []
            for q in range(query.shape[2]):
                seen = [k for k in range(key.shape[2]) if sees(pattern, q, k)]
                scores = scaling * (key[:, head // group, seen] @ query[:, head, q, :, None]).squeeze(-1)
                rows.append((scores.softmax(-1)[:, None] @ value[:, head // group, seen]).squeeze(1))
            heads.append(torch.stack(rows, 1))
        return torch.stack(heads, 2), None

    return attend


@pytest.fixture
def reference() -> Iterator[Any]:
    """(model, attention) -> the model with the attention written out."""

    def rewritten(model: Any, attention: AnyAttention) -> Any:
        AttentionInterface.register("written_out", written_out(attention))
        AttentionMaskInterface.register("written_out", lambda *_, **__: None)
        model.set_attn_implementation("written_out")
        return model

    yield rewritten
    del AttentionInterface._global_mapping["written_out"], AttentionMaskInterface._global_mapping["written_out"]


@MODELS
@pytest.mark.parametrize("attention", [Full(), *SPARSE], ids=lambda attention: attention.type)
def test_forward_and_gradients_are_those_of_the_definition(make, attention, reference):
    model = make()
    hybrid = HybridAttention.install(model, "cpu")
    hybrid.set(attention)
    expected = run(reference(make(), attention), tokens())
    for found, value in zip(run(model, tokens()), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-10)
    assert attention == Full() or not torch.allclose(expected[0], run(make(), tokens())[0], atol=1e-3)  # it makes a difference


@MODELS
def test_full_attention_is_the_models_own_bit_for_bit(make):
    model, plain = make(), make()
    hybrid = HybridAttention.install(model, "cpu")
    expected = run(plain, tokens())
    assert equal(run(model, tokens()), expected)
    for attention in (ByHead(heads=(Full(),)), ByLayer(layers=(Full(), ByHead(heads=(Full(), Full()))))):
        hybrid.set(attention)
        assert equal(run(model, tokens()), expected)
    hybrid.set(Full())
    padded = torch.ones(2, LENGTH, dtype=torch.int64)
    padded[0, :5] = 0
    assert model(input_ids=tokens(), attention_mask=padded).logits.equal(plain(input_ids=tokens(), attention_mask=padded).logits)


@MODELS
def test_switching_leaves_no_trace(make):
    model = make()
    hybrid = HybridAttention.install(model, "cpu")
    alone = {}
    for attention in (Full(), *SPARSE):
        fresh = make()
        HybridAttention.install(fresh, "cpu").set(attention)
        alone[attention] = run(fresh, tokens())
    for attention in (*SPARSE, Full(), *reversed(SPARSE), Full()):
        hybrid.set(attention)
        assert equal(run(model, tokens()), alone[attention])
        assert equal(run(model, tokens()), alone[attention])


def test_rows_of_other_lengths_and_other_ways_in():
    model = gpt2()
    hybrid = HybridAttention.install(model, "cpu")
    hybrid.set(SPARSE[-1])
    whole = model(tokens()).logits
    for length in (1, 7, LENGTH, 12):
        torch.testing.assert_close(model(tokens()[:, :length]).logits, whole[:, :length])  # causal: a prefix is a prefix
    embedded = model.transformer.wte(tokens())
    assert model(inputs_embeds=embedded).logits.equal(whole)
    assert model.lm_head(model.transformer(tokens()).last_hidden_state).equal(whole)
    everything = torch.ones(2, LENGTH, dtype=torch.int64)
    assert model(input_ids=tokens(), attention_mask=everything).logits.equal(whole)


@pytest.mark.parametrize(("way", "dropout"), [("head_rules", 0.0), ("dense_mask", 0.1)])
def test_what_is_seen_is_made_once_and_shared(monkeypatch, way, dropout):
    made, make = [], {"head_rules": head_rules, "dense_mask": dense_mask}[way]
    monkeypatch.setattr(f"raysparse.models.attention.{way}", lambda *args: (made.append(args), make(*args))[1])
    model = gpt2(n_layer=4, attn_pdrop=dropout)
    hybrid = HybridAttention.install(model, "cpu")
    for _ in range(3):
        hybrid.set(ByLayer(layers=(Local(width=4), HEADS_OF_ALL_KINDS)))
        model(tokens())
    assert [patterns for patterns, *_ in made] == [(Local(width=4),) * HEADS, of_heads(HEADS_OF_ALL_KINDS)]
    shapes = {"head_rules": [(HEADS, 4)] * 2, "dense_mask": [(1, 1, LENGTH, LENGTH), (1, HEADS, LENGTH, LENGTH)]}
    assert [make(*args).shape for args in made] == shapes[way]


LONG = 150
"""Long enough for the native kernel."""


@MODELS
@pytest.mark.parametrize("attention", SPARSE, ids=lambda attention: attention.type)
def test_float32_is_as_close_to_float64_as_masked_attention_is(make, attention):
    """The one runs in the native kernel, the other in torch; with dropout, here of next to nothing, with a mask."""
    exact, single = make(n_positions=LONG), make(n_positions=LONG).float()
    dropout = {"attn_pdrop": 1e-30} if make is gpt2 else {"attention_dropout": 1e-30}
    masked = make(n_positions=LONG, **dropout).float().eval()
    results = []
    for model in (exact, single, masked):
        HybridAttention.install(model, "cpu").set(attention)
        results.append(run(model, tokens(2, LONG)))
    for value, found, other in zip(*results, strict=True):
        distance, allowed = (found - value).abs().max(), (other - value).abs().max()
        assert distance < 2 * allowed + 1e-6 * value.abs().max()


def test_values_may_be_narrower_than_keys():
    """Keys of 12, values of 6."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    heads = {"kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
    config = DeepseekV3Config(**sizes, **heads, first_k_dense_replace=2, vocab_size=50, use_cache=False)
    model, plain = (drawn(lambda: DeepseekV3ForCausalLM(config)).float() for _ in range(2))
    hybrid = HybridAttention.install(model, "cpu")
    hybrid.set(Local(width=LONG))
    for found, expected in zip(run(model, tokens(2, LONG)), run(plain, tokens(2, LONG)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    hybrid.set(Local(width=5))
    assert not model(tokens(2, LONG)).logits.allclose(plain(tokens(2, LONG)).logits, atol=1e-2)


def test_says_why_there_is_no_native_library(monkeypatch, caplog):
    monkeypatch.setattr(library, "why_not", lambda: "no compiler")
    HybridAttention.install(gpt2(), "cpu")
    (record,) = caplog.records
    assert record.getMessage() == "Sparse attention runs in plain torch, which takes longer. There is no native library: no compiler"


def test_models_do_not_disturb_each_other():
    alone = {}
    for attention in SPARSE[:2]:
        model = gpt2()
        HybridAttention.install(model, "cpu").set(attention)
        alone[attention] = run(model, tokens())
    first, second = gpt2(), gpt2()
    hybrids = HybridAttention.install(first, "cpu"), HybridAttention.install(second, "cpu")
    plain = run(gpt2(), tokens())
    for _ in range(2):
        hybrids[0].set(SPARSE[0])
        hybrids[1].set(SPARSE[1])
        assert equal(run(first, tokens()), alone[SPARSE[0]])
        assert equal(run(second, tokens()), alone[SPARSE[1]])
        hybrids[0].set(Full())
        assert equal(run(first, tokens()), plain)
        assert equal(run(second, tokens()), alone[SPARSE[1]])


def test_a_model_that_shares_the_config_stays_full():
    model = gpt2()
    plain = run(model, tokens())
    twin = drawn(lambda: to_linear(type(model)(model.config)))
    assert twin.config is model.config
    HybridAttention.install(model, "cpu").set(Local(width=3))
    assert equal(run(twin, tokens()), plain)
    HybridAttention.install(twin, "cpu").set(Local(width=3))
    assert equal(run(twin, tokens()), run(model, tokens()))
    assert not equal(run(twin, tokens()), plain)


def test_nothing_of_it_is_saved():
    model = gpt2()
    config, names = model.config.to_dict(), list(model.state_dict())
    HybridAttention.install(model, "cpu").set(Local(width=3))
    model(tokens())
    assert model.config.to_dict() == config
    assert list(model.state_dict()) == names
    assert set(to_hub(model.state_dict(), model)) <= set(names)


@MODELS
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_checkpointed_activations_are_recomputed_alike(make):
    results = []
    for checkpointing in (False, True):
        model = make()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        HybridAttention.install(model, "cpu").set(SPARSE[-1])
        results.append(run(model, tokens()))
    assert equal(*results)


def test_dropout_of_attention_weights_on_the_cpu():
    model = gpt2(attn_pdrop=0.5)
    HybridAttention.install(model, "cpu").set(Local(width=5))
    torch.manual_seed(0)
    dropped = model(tokens()).logits
    assert not dropped.allclose(model(tokens()).logits)
    torch.manual_seed(0)
    assert dropped.equal(model(tokens()).logits)
    clean = gpt2()
    HybridAttention.install(clean, "cpu").set(Local(width=5))
    torch.testing.assert_close(model.eval()(tokens()).logits, clean.eval()(tokens()).logits)


def on_a_rank(folders: list[str]) -> list[list[Tensor]]:
    """(logits, whole gradients) of this rank's two rows for each attention in turn, the model sharded by FSDP2."""
    import torch.distributed as dist

    results = []
    for make in (gpt2, llama):
        model = make()
        hybrid = HybridAttention.install(model, "cpu")
        sharded = shard(model, blocks(model), ShardingConfig(), "cpu", torch.float32)
        for attention in (SPARSE[-1], Local(width=5), Full()):
            hybrid.set(attention)
            sharded.zero_grad()
            with sharded.accumulate(last=True):
                logits = sharded.module(input_ids=tokens(4)[2 * dist.get_rank() :][:2]).logits
                (logits * torch.linspace(-1, 1, logits[0].numel(), dtype=logits.dtype).view_as(logits[0])).sum().backward()
            gradients = sharded.collect()
            results.append([logits.detach(), *(sharded.whole(name, gradient) for name, gradient in gradients.items())])
    return results


def test_sharded_over_two_ranks_it_is_the_same_model():
    ranks = spawn(on_a_rank, 2, [])
    expected = []
    for make in (gpt2, llama):
        model = make()
        hybrid = HybridAttention.install(model, "cpu")
        for attention in (SPARSE[-1], Local(width=5), Full()):
            hybrid.set(attention)
            expected.append(run(model, tokens(4)))
    for turn, (logits, *gradients) in enumerate(expected):
        torch.testing.assert_close(torch.cat([rank[turn][0] for rank in ranks]), logits)
        for rank in ranks:
            assert len(rank[turn][1:]) == len(gradients)
            for found, gradient in zip(rank[turn][1:], gradients, strict=True):
                torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@compiles
@pytest.mark.parametrize(("dtype", "length"), [(torch.float64, LENGTH), (torch.float32, LONG)], ids=["torch", "native"])
@MODELS
def test_compiled_blocks_train_alike(make, dtype, length):
    model, compiled = (make(n_positions=LONG).to(dtype) for _ in range(2))
    hybrids = HybridAttention.install(model, "cpu"), HybridAttention.install(compiled, "cpu")
    for block in blocks(compiled).values():
        block.compile()

    def check(attention: AnyAttention) -> None:
        for hybrid in hybrids:
            hybrid.set(attention)
        for found, expected in zip(run(compiled, tokens(2, length)), run(model, tokens(2, length)), strict=True):
            assert (found - expected).abs().max() < 1e-4 * expected.abs().max()  # Llama's norms are float32 even here

    check(Full())
    check(Local(width=5))
    with torch.compiler.set_stance("fail_on_recompile"):
        for attention in (*SPARSE[:6], Full()):
            check(attention)
