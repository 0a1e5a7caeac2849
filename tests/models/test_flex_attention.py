"""FlexAttention in transformers' models: the blocks that it skips, and that it sees what the CPU's ways see."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from raysparse.config import ConfigError
from raysparse.models.attention import HybridAttention, block_mask, dense_mask
from raysparse.models.build import blocks
from raysparse.sparsity.attention import AnyAttention, ByHead, Fixed, Full, Local, LocalOrStrided, Pattern, Strided
from tests.models.attentive import HEADS, HEADS_OF_ALL_KINDS, MODELS, SPARSE, compiles, gpt2, llama, of_heads, run, tokens


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small only wait for more of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_flex_attention_has_no_dropout():
    with pytest.raises(ConfigError, match=r"Got attn_pdrop=0.1. Set model.overrides=\{attn_pdrop: 0\}, or use full attention"):
        HybridAttention.install(gpt2(attn_pdrop=0.1), "cuda")


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
