import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from raysparse.config import ConfigError
from raysparse.data.tokenizer import TrainTokenizer, load, train
from raysparse.tasks.generate import Beginnings, GenerationConfig, left_pad
from raysparse.tasks.generate import generate as answer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load(train(TrainTokenizer(vocab_size=300), iter(["the mask is live " * 20]), "x", tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 48}
    config = GPT2Config(vocab_size=len(tokenizer), **size, initializer_range=0.3)
    return GPT2LMHeadModel(config).train()


def generate(model, tokenizer, prompts, config, *ranks):
    return answer(model, tokenizer, Beginnings(prompts, tokenizer.eos_token_id), config, *ranks)


def greedy(model, tokenizer, prompt, count):
    """One token at a time, no padding, no cache."""
    ids = list(prompt)
    model.eval()
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    model.train()
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


def test_answers_come_in_order_and_padding_changes_nothing(model, tokenizer):
    prompts = [tokenizer(text)["input_ids"] for text in ("the", "the mask is live the dead", "mask", "is live is", "q")]
    answers = generate(model, tokenizer, prompts, GenerationConfig(max_new_tokens=8, batch_size=2))
    assert answers == dict(enumerate(greedy(model, tokenizer, prompt, 8) for prompt in prompts))
    assert len(set(answers.values())) > 2
    assert model.training


def test_beam_search_finds_answers_at_least_as_likely(model, tokenizer):
    prompts = [tokenizer(text)["input_ids"] for text in ("the mask", "live", "is the")]
    config = GenerationConfig(max_new_tokens=6, num_beams=4, length_penalty=0.8, no_repeat_ngram_size=2, batch_size=3)
    answers = generate(model, tokenizer, prompts, config)
    assert answers == {number: generate(model, tokenizer, [prompt], config)[0] for number, prompt in enumerate(prompts)}
    assert answers != generate(model, tokenizer, prompts, GenerationConfig(max_new_tokens=6))


def test_prompts_beyond_the_model_are_an_error(model, tokenizer):
    with pytest.raises(ConfigError, match=r"prompts and answers within the model's 48 positions\. Got 50"):
        generate(model, tokenizer, [[5] * 42, [5]], GenerationConfig(max_new_tokens=8))


def test_no_prompts_no_answers(model, tokenizer):
    assert generate(model, tokenizer, [], GenerationConfig(max_new_tokens=8)) == {}


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3, "no_repeat_ngram_size": 2}, {"temperature": 1.5, "top_p": 0.9, "seed": 5}])
def test_any_number_of_ranks_gives_the_same_answers(model, tokenizer, settings):
    prompts = [tokenizer("the mask is live " * (1 + k % 5) + "q" * (k % 3))["input_ids"] for k in range(17)]
    config = GenerationConfig(max_new_tokens=6, batch_size=3, **settings)
    alone = generate(model, tokenizer, prompts, config)
    assert sorted(alone) == list(range(17))
    for ranks in (2, 3):
        shares = [generate(model, tokenizer, prompts, config, rank, ranks) for rank in range(ranks)]
        assert sum(map(len, shares)) == 17
        assert {number: text for share in shares for number, text in share.items()} == alone


def test_drawn_answers_are_those_of_the_seed(model, tokenizer):
    prompts, state = [tokenizer("the mask")["input_ids"]] * 4, torch.get_rng_state()
    drawn = [generate(model, tokenizer, prompts, GenerationConfig(max_new_tokens=8, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0].values())) > 1
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ConfigError, match=r"Expected num_beams 1 with a temperature\. Got 2"):
        GenerationConfig.check({"temperature": 1.0, "num_beams": 2})


def test_left_pad():
    ids, mask = left_pad([[1], [2, 3]], pad=9)
    assert ids.tolist() == [[9, 1], [2, 3]]
    assert mask.tolist() == [[0, 1], [1, 1]]
