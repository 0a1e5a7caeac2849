"""Small models whose attention is made sparse, and what is asked of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from raysparse.models.layout import to_linear
from raysparse.sparsity.attention import AnyAttention, ByHead, ByLayer, Fixed, Full, Local, LocalOrStrided, Pattern, Strided

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


def gpt2(**changes: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": 16, "vocab_size": 50, "n_positions": 64}
    ends = {"bos_token_id": None, "eos_token_id": None}
    drops = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    return drawn(lambda: to_linear(GPT2LMHeadModel(GPT2Config(**(sizes | ends | drops | {"use_cache": False} | changes)))))


def llama(n_positions: int = 64, **changes: Any) -> Any:
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
        max_position_embeddings=n_positions,
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


def compiles(test: Any) -> Any:
    """torch's compiler warns of its own imports, and of the gradients that it looks for."""
    for message in ("`torch.jit.script_method` is deprecated", "The .grad attribute of a Tensor that is not a leaf"):
        test = pytest.mark.filterwarnings(f"ignore:{message}")(test)
    return test
