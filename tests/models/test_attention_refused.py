"""Models, and inputs, that cannot have sparse attention."""

from typing import Any

import pytest
import torch

from raysparse.config import ConfigError
from raysparse.models.attention import HybridAttention, check_attention
from tests.models.attentive import LENGTH, SPARSE, gpt2, tokens


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
