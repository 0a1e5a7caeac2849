"""Sparse attention inside transformers' models: against the definition written out, alone, in company, sharded and compiled."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from raysparse.config import ConfigError
from raysparse.models.attention import HybridAttention, block_mask, check_attention, dense_mask
from raysparse.models.build import blocks
from raysparse.models.layout import to_hub, to_linear
from raysparse.sparsity.attention import AnyAttention, ByHead, ByLayer, Fixed, Full, Local, LocalOrStrided, Pattern, Strided
from raysparse.train.shard import ShardingConfig, shard
from tests.ranks import spawn
from tests.sparsity.test_attention import sees

LAYERS, HEADS, LENGTH = 3, 4, 23
HEADS_OF_ALL_KINDS = ByHead(heads=(Local(width=5), Strided(stride=4), Fixed(width=6)))
SPARSE = [
    Local(width=5),
    Strided(stride=4),
    LocalOrStrided(width=3, stride=7),
    Fixed(width=6),
    HEADS_OF_ALL_KINDS,
    ByHead(heads=(Full(), Local(width=2))),
    ByLayer(layers=(Full(), Local(width=4))),
    ByLayer(layers=(Fixed(width=5), HEADS_OF_ALL_KINDS)),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small only wait for more of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gpt2(**changes: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": 16, "vocab_size": 50, "n_positions": 64}
    ends = {"bos_token_id": None, "eos_token_id": None}
    drops = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    return drawn(lambda: to_linear(GPT2LMHeadModel(GPT2Config(**(sizes | ends | drops | {"use_cache": False} | changes)))))


def llama(**changes: Any) -> Any:
    """With grouped queries: two heads share a key."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        vocab_size=50,
        use_cache=False,
        **changes,
    )
    return drawn(lambda: LlamaForCausalLM(config))


def drawn(make: Any) -> Any:
    """A model with weights large enough for attention to matter, the same in any process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = make().double()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.normal_(std=0.3)
    return model.train()


MODELS = pytest.mark.parametrize("make", [gpt2, llama])


def tokens(rows: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


def run(model: Any, ids: Tensor) -> list[Tensor]:
    """Logits, and the gradient of every parameter; the loss weighs each logit differently."""
    model.zero_grad()
    logits = model(input_ids=ids).logits
    (logits * torch.linspace(-1, 1, logits[0].numel(), dtype=logits.dtype, device=logits.device).view_as(logits[0])).sum().backward()
    return [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def of_heads(attention: AnyAttention, heads: int = HEADS) -> tuple[Pattern, ...]:
    return tuple(attention.of(0, head) for head in range(heads))


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(found, expected, strict=True))


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


def test_masks_are_made_once_and_shared(monkeypatch):
    made = []
    monkeypatch.setattr("raysparse.models.attention.dense_mask", lambda *args: (made.append(args), dense_mask(*args))[1])
    model = gpt2(n_layer=4)
    hybrid = HybridAttention.install(model, "cpu")
    for _ in range(3):
        hybrid.set(ByLayer(layers=(Local(width=4), HEADS_OF_ALL_KINDS)))
        model(tokens())
    assert [patterns for patterns, *_ in made] == [(Local(width=4),) * HEADS, of_heads(HEADS_OF_ALL_KINDS)]
    assert dense_mask(*made[0]).shape == (1, 1, LENGTH, LENGTH)
    assert dense_mask(*made[1]).shape == (1, HEADS, LENGTH, LENGTH)


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
    assert model.eval()(tokens()).logits.equal(clean.eval()(tokens()).logits)


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


def mpt() -> Any:
    from transformers import MptConfig, MptForCausalLM

    return MptForCausalLM(MptConfig(d_model=16, n_heads=2, n_layers=2, vocab_size=50, max_seq_len=32))


def looks_ahead() -> Any:
    model = gpt2()
    model.transformer.h[1].attn.is_causal = False
    return model


def mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    return MistralForCausalLM(MistralConfig(**sizes, vocab_size=50, sliding_window=8))


def eager_gpt2() -> Any:
    model = gpt2()
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (mpt, r"Expected a model with transformers' attention interface .* Got MptForCausalLM, which .* Use full attention"),
        (looks_ahead, r"Expected one causal attention in each block of GPT2LMHeadModel .* Got 0 in transformer.h.1. Use full attention"),
        (eager_gpt2, "Expected model.attention=sdpa with sparse attention. Got eager. Leave model.attention out"),
        (mistral, r"Expected full attention in Mistral.* Got sliding_window=8. Set model.overrides=\{sliding_window: null\}"),
    ],
)
def test_models_that_cannot_have_it(make, message):
    with torch.device("meta"):
        skeleton = make()
    for refuse in (check_attention, lambda model: HybridAttention.install(model, "cpu")):
        with pytest.raises(ConfigError, match=message):
            refuse(skeleton)


def test_flex_attention_has_no_dropout():
    with pytest.raises(ConfigError, match=r"Got attn_pdrop=0.1. Set model.overrides=\{attn_pdrop: 0\}, or use full attention"):
        HybridAttention.install(gpt2(attn_pdrop=0.1), "cuda")


def test_what_sparse_attention_cannot_run():
    model = gpt2()
    hybrid = HybridAttention.install(model, "cpu")
    padded = torch.ones(2, LENGTH, dtype=torch.int64)
    padded[0, :5] = 0
    for attention in SPARSE:
        hybrid.set(attention)
        with pytest.raises(ConfigError, match=r"Expected whole rows.* Got an attention mask. Pass input_ids alone"):
            model(input_ids=tokens(), attention_mask=padded)
        cache = model(tokens(), use_cache=True).past_key_values
        with pytest.raises(ConfigError, match=r"Expected whole rows.* Got a key-value cache. .* load the exported model"):
            model(tokens(length=1), past_key_values=cache)


FLEX = [*(of_heads(attention) for attention in (Local(), Local(width=300), Strided(), Fixed())), of_heads(HEADS_OF_ALL_KINDS)]
FLEX += [of_heads(ByHead(heads=(Full(), LocalOrStrided(width=130, stride=70), Local(width=1), Strided(stride=400))))]


@pytest.mark.parametrize("patterns", FLEX, ids=lambda patterns: "-".join(dict.fromkeys(pattern.type for pattern in patterns)))
@pytest.mark.parametrize("length", [300, 384, 100])
def test_block_masks_hold_the_whole_pattern(patterns, length):
    """Blocks of 128; the last of 300 is ragged."""
    from torch.nn.attention.flex_attention import create_mask

    cpu = torch.device("cpu")
    masks, blocked = dense_mask(patterns, length, cpu).expand(1, HEADS, length, length), block_mask(patterns, length, cpu)
    assert create_mask(blocked.mask_mod, 1, HEADS, length, length, "cpu").equal(masks)
    size = -(-length // 128)
    assert blocked.shape == (1, HEADS, length, length)
    tiles = nn.functional.pad(masks, (0, size * 128 - length) * 2).view(HEADS, size, 128, size, 128)
    allowed = tiles.sum((2, 4))
    listed = {
        "partial": (blocked.kv_num_blocks, blocked.kv_indices, (allowed > 0) & (allowed < 128**2)),
        "full": (blocked.full_kv_num_blocks, blocked.full_kv_indices, allowed == 128**2),
    }
    for count, indices, expected in listed.values():
        for head in range(HEADS):
            for row in range(size):
                assert indices[0, head, row, : count[0, head, row]].tolist() == expected[head, row].nonzero().flatten().tolist()
    for count, indices, expected in (  # the same blocks by column, for the backward
        (blocked.q_num_blocks, blocked.q_indices, listed["partial"][2]),
        (blocked.full_q_num_blocks, blocked.full_q_indices, listed["full"][2]),
    ):
        for head in range(HEADS):
            for column in range(size):
                rows = expected[head, :, column].nonzero().flatten().tolist()
                assert indices[0, head, column, : count[0, head, column]].tolist() == rows


def test_what_blocks_of_128_can_skip():
    def blocks_kept(pattern: Pattern) -> int:
        blocked = block_mask((pattern,), 1024, torch.device("cpu"))
        return int(blocked.kv_num_blocks.sum() + blocked.full_kv_num_blocks.sum())

    causal = 8 * 9 // 2
    assert blocks_kept(Local()) == 8 + 7
    assert [blocks_kept(pattern) for pattern in (Full(), Strided(), LocalOrStrided(), Fixed())] == [causal] * 4
    assert blocks_kept(Strided(stride=512)) == 8 + 4
    assert blocks_kept(Strided(stride=500)) == 8 + (4 + 5) + 1  # 500 below the diagonal: through two blocks of each row; 1000: one


def compiles(test: Any) -> Any:
    """torch's compiler warns of its own imports, and of the gradients that it looks for."""
    for message in ("`torch.jit.script_method` is deprecated", "The .grad attribute of a Tensor that is not a leaf"):
        test = pytest.mark.filterwarnings(f"ignore:{message}")(test)
    return test


@pytest.mark.slow
@compiles
@MODELS
def test_compiled_blocks_train_alike(make):
    model, compiled = make(), make()
    hybrids = HybridAttention.install(model, "cpu"), HybridAttention.install(compiled, "cpu")
    for block in blocks(compiled).values():
        block.compile()

    def check(attention: AnyAttention) -> None:
        for hybrid in hybrids:
            hybrid.set(attention)
        for found, expected in zip(run(compiled, tokens()), run(model, tokens()), strict=True):
            assert (found - expected).abs().max() < 1e-4 * expected.abs().max()  # Llama's norms are float32 even here

    for attention in (Full(), Local(width=5), HEADS_OF_ALL_KINDS):
        check(attention)
    with torch.compiler.set_stance("fail_on_recompile"):
        for attention in (*SPARSE[:6], Full()):
            check(attention)


@pytest.mark.slow
@compiles
@pytest.mark.parametrize("whole_blocks", [False, True], ids=["alone", "in compiled blocks"])
@MODELS
def test_flex_attention_sees_the_same_and_compiles_once(make, whole_blocks):
    """The CPU has its forward alone."""
    model, flex = make().float(), make().float()
    hybrids = HybridAttention.install(model, "cpu"), HybridAttention.install(flex, "cuda")
    if whole_blocks:
        for block in blocks(flex).values():
            block.compile()

    def check(attention: AnyAttention, length: int) -> None:
        for hybrid in hybrids:
            hybrid.set(attention)
        with torch.no_grad():
            found, expected = (each(tokens(2, length)).logits for each in (flex, model))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert attention != Full() or found.equal(expected) or whole_blocks

    check(Full(), 60)
    check(SPARSE[0], 60)
    with torch.compiler.set_stance("fail_on_recompile"):
        for attention in (*SPARSE, Full(), *SPARSE):
            check(attention, 60)
    check(SPARSE[-1], 41)


@pytest.mark.slow
@compiles
def test_flex_attention_under_autocast():
    """Rotary embeddings leave queries and keys in float32 there, values in bfloat16."""
    model, flex = llama().float(), llama().float()
    for each, device in ((model, "cpu"), (flex, "cuda")):
        HybridAttention.install(each, device).set(SPARSE[-1])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = flex(tokens()).logits.float(), model(tokens()).logits.float()
    assert (found - expected).norm() < 0.02 * expected.norm()  # bfloat16 has 8 bits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@compiles
@pytest.mark.parametrize("whole_blocks", [False, True], ids=["alone", "in compiled blocks"])
@MODELS
def test_flex_attention_trains_alike_on_a_gpu(make, whole_blocks):
    """Forward and gradients against the dense masks on the CPU; heads of 16, rows that end within a block."""
    widths = {"n_embd": 64, "n_positions": 512} if make is gpt2 else {"head_dim": 16}
    reference, model = make(**widths), make(**widths).float().cuda()
    hybrids = HybridAttention.install(reference, "cpu"), HybridAttention.install(model, "cuda")
    if whole_blocks:
        for block in blocks(model).values():
            block.compile()

    def check(attention: AnyAttention) -> None:
        for hybrid in hybrids:
            hybrid.set(attention)
        expected = run(reference, tokens(2, 300))
        for found, value in zip(run(model, tokens(2, 300).cuda()), expected, strict=True):
            torch.testing.assert_close(found.double().cpu(), value, rtol=1e-2, atol=1e-3 * float(value.abs().max()))

    check(Full())
    check(Local(width=40))
    with torch.compiler.set_stance("fail_on_recompile"):
        for attention in (*SPARSE, Local(), Fixed(), Full()):
            check(attention)
