"""A walk over blocks sees what a whole forward of the model as it is by then would show, for every family, at two passes a block."""

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from raysparse.config import ConfigError
from raysparse.data.calibration import Chunk
from raysparse.models.build import block_linears
from raysparse.models.layout import to_linear
from raysparse.models.walk import BlockWalk


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=32))


def llama():
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    return LlamaForCausalLM(config)


def mpt():
    return MptForCausalLM(MptConfig(vocab_size=50, d_model=16, n_layers=3, n_heads=2, max_seq_len=32))


def t5():
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


def whisper():
    config = WhisperConfig(
        vocab_size=50, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=20, max_target_positions=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config)


def chunks(kind, count=2):
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 50, (2, 9), generator=generator) for _ in range(count)]
    if kind is t5:
        inputs = [{"input_ids": x, "decoder_input_ids": x[:, :6]} for x in ids]
    elif kind is whisper:
        inputs = [{"input_features": torch.randn(2, 8, 40, generator=generator), "decoder_input_ids": x} for x in ids]
    else:
        inputs = [{"input_ids": x} for x in ids]
    return [Chunk(number, each) for number, each in enumerate(inputs)]


def built(kind):
    torch.manual_seed(1)
    model = to_linear(kind()).eval()
    model.config.use_cache = False
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))  # T5 and others begin with gains of 1 and biases of 0
    return model


@torch.no_grad()
def seen_by_hooks(model, layers, chunk):
    """The obvious way: a forward of the whole model."""
    found = {}
    hooks = [m.register_forward_pre_hook(lambda _, args, n=n: found.__setitem__(n, args[0].flatten(0, -2))) for n, m in layers.items()]
    model(**chunk.inputs)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("kind", [gpt2, llama, mpt, t5, whisper], ids=lambda kind: kind.__name__)
def test_layers_read_what_changed_blocks_before_them_give(kind):
    model, parts = built(kind), chunks(kind)
    walk = BlockWalk(model, parts, block_linears(model))
    assert sorted(name for layers in walk.layers.values() for name in layers) == sorted(block_linears(model))
    runs = dict.fromkeys(block_linears(model), 0)
    for name, layer in (pair for layers in walk.layers.values() for pair in layers.items()):
        layer.register_forward_hook(lambda *_, name=name: runs.__setitem__(name, runs[name] + 1))
    checked = 0
    for block, layers in walk.layers.items():
        found = dict(walk.statistics(block, lambda x: x))
        for chunk in parts:
            before = dict(runs)
            expected = seen_by_hooks(model, layers, chunk)
            runs |= before
            assert found[chunk.number].keys() == expected.keys() == layers.keys()
            for name, inputs in expected.items():
                assert torch.equal(found[chunk.number][name], inputs), name
                checked += 1
        with torch.no_grad():
            for layer in layers.values():
                layer.weight.mul_(torch.rand_like(layer.weight) < 0.5)
        walk.finish(block)
    assert checked == 2 * len(block_linears(model))
    assert set(runs.values()) == {4}  # two passes over two chunks
    assert not any("forward" in vars(module) for module in model.modules())


def test_padding_is_left_out_and_changes_nothing():
    model = built(gpt2)
    ids = torch.randint(3, 50, (2, 9))
    real = torch.arange(9) < torch.tensor([[9], [5]])
    names = block_linears(model)

    def sums(ids, real):
        walk = BlockWalk(model, [Chunk(0, {"input_ids": ids, "attention_mask": real.long()}, real)], names)
        found = {}
        for block in walk.layers:
            for _, statistic in walk.statistics(block, lambda x: torch.cat([x.sum(0), torch.tensor([float(len(x))])])):
                found |= statistic
            walk.finish(block)
        return found

    first, other = sums(ids, real), sums(torch.where(real, ids, 7), real)
    assert all(torch.equal(first[name], other[name]) for name in names)
    assert all(float(first[name][-1]) == 14 for name in names)


def test_padding_of_a_source_and_of_an_answer_is_left_out_of_the_layers_that_read_each():
    model = built(t5)
    source, answer = torch.randint(3, 50, (2, 9)), torch.randint(3, 50, (2, 6))
    heard, real = torch.arange(9) < torch.tensor([[9], [5]]), torch.arange(6) < torch.tensor([[2], [6]])
    names = block_linears(model)

    def sums(source, answer):
        inputs = {"input_ids": source, "attention_mask": heard, "decoder_input_ids": answer}
        walk = BlockWalk(model, [Chunk(0, inputs, real, heard)], names)
        found = {}
        for block in walk.layers:
            for _, statistic in walk.statistics(block, lambda x: torch.cat([x.sum(0), torch.tensor([float(len(x))])])):
                found |= statistic
            walk.finish(block)
        return found

    first, other = sums(source, answer), sums(torch.where(heard, source, 7), torch.where(real, answer, 8))
    assert all(torch.equal(first[name], other[name]) for name in names)
    of_source = {
        name for name in names if name.startswith("encoder.") or name.endswith(("EncDecAttention.k.weight", "EncDecAttention.v.weight"))
    }
    assert {name for name in names if float(first[name][-1]) == 14} == of_source
    assert {name for name in names if float(first[name][-1]) == 8} == set(names) - of_source


def test_a_layer_that_reads_other_positions_cannot_leave_padding_out():
    model = built(t5)
    real = torch.arange(9) < torch.tensor([[9], [5]])
    chunk = Chunk(0, chunks(t5)[0].inputs, real)
    walk = BlockWalk(model, [chunk], block_linears(model))
    for block in ("encoder.block.0", "encoder.block.1"):
        list(walk.statistics(block, lambda x: x))
        walk.finish(block)
    with pytest.raises(ConfigError, match=r"the 18 positions of its samples.*Got 12.*calibration\.batch=1"):
        list(walk.statistics("decoder.block.0", lambda x: x))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.once, self.twice, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.twice(self.twice(self.once(x)))


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Twice(), Twice()])
        self.conv, self.head = nn.Conv1d(4, 4, 1), nn.Linear(4, 4)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def test_a_layer_that_is_called_twice_counts_twice_and_one_that_is_not_is_absent():
    walk = BlockWalk(Toy(), [Chunk(5, {"x": torch.ones(3, 4)})], ["layers.0.once.weight", "layers.0.twice.weight", "layers.0.never.weight"])
    ((number, found),) = walk.statistics("layers.0", lambda x: torch.tensor(len(x)))
    assert (number, {name: int(count) for name, count in found.items()}) == (5, {"layers.0.once.weight": 3, "layers.0.twice.weight": 6})


def test_weights_that_no_linear_layer_of_a_block_has_are_refused():
    with pytest.raises(ConfigError, match=r"Expected linear layers inside the blocks of Toy.*Got head\.weight and 1 more.*exclude"):
        BlockWalk(Toy(), [], ["layers.0.once.weight", "head.weight", "conv.weight"])
