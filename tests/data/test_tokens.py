import json
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from raysparse.config import ConfigError
from raysparse.data import encode, tokens
from raysparse.data.cache import publish
from raysparse.data.shards import ShardWriter, TokenFile, cross_entropy, entropy
from raysparse.data.sources import Files, Hub
from raysparse.data.tokenizer import END_OF_TEXT, load
from raysparse.data.tokens import DataConfig, Holdout, Prepared, TokenFeed, TokenValidation, prepare


@pytest.fixture
def write(tmp_path):
    def write(ids, shard_tokens=100, vocab_size=1000):
        folder = tmp_path / f"tokens{len(list(tmp_path.iterdir()))}"
        writer = ShardWriter(folder, "uint16", vocab_size, shard_tokens)
        for part in np.array_split(np.asarray(ids, dtype=np.uint16), 3):
            writer.write(part)
        return writer.close(0.0)

    return write


def with_text(config, path, rows, **changes):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return config.model_copy(update={"train": Files(paths=(str(path),)), **changes})


def decoded(prepared, split):
    file = TokenFile.open(getattr(prepared, split))
    return str(load(prepared.tokenizer).decode(file.windows(np.array([0]), len(file))[0]))


def test_every_document_is_in_exactly_one_split(data, texts):
    prepared = prepare(data)
    held_out = [text for text in texts if Holdout(fraction=0.1).takes(text)]
    kept = [text for text in texts if text not in held_out]
    assert 0 < len(held_out) == prepared.num_validation_documents < 40
    assert decoded(prepared, "train") == "".join(text + END_OF_TEXT for text in kept)
    assert decoded(prepared, "validation") == "".join(text + END_OF_TEXT for text in held_out)
    assert prepared.num_train_tokens == len(TokenFile.open(prepared.train))
    TokenFile.open(prepared.train).verify()


def test_what_is_prepared_is_found_again_and_travels_as_json(data, monkeypatch):
    prepared = prepare(data)
    monkeypatch.setattr(tokens, "_tokenize", lambda *args: pytest.fail("tokenized again"))
    assert prepare(data) == prepared == Prepared(**json.loads(json.dumps(asdict(prepared))))
    with pytest.raises(pytest.fail.Exception, match=r"tokenized again"):
        prepare(data.model_copy(update={"validation": Holdout(fraction=0.2)}))


def test_the_cache_follows_the_content(data, tmp_path):
    config = with_text(data, tmp_path / "a.jsonl", [f"one {k}" for k in range(300)])
    first = prepare(config)
    second = prepare(with_text(data, tmp_path / "a.jsonl", [f"two {k}" for k in range(300)]))
    assert first.train != second.train
    assert "two" in decoded(second, "train")
    assert "two" not in decoded(first, "train")


def test_processes_do_not_change_the_tokens(data, tmp_path, monkeypatch):
    """Many small chunks, in this process and in two others; a limit in the middle of a chunk."""
    monkeypatch.setattr(tokens, "_CHUNK_CHARS", 700)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    pools = []

    def pool(*args):
        pools.append(args[0])
        return ProcessPoolExecutor(*args)

    monkeypatch.setattr(encode, "ProcessPoolExecutor", pool)
    for max_tokens in (None, 2000):
        config = data.model_copy(update={"max_tokens": max_tokens})
        alone, parallel = (
            prepare(config.model_copy(update={"num_proc": num_proc, "cache_dir": str(tmp_path / f"{num_proc}")})) for num_proc in (1, 2)
        )
        for split in ("train", "validation"):
            indices = [json.loads(Path(getattr(p, split)).read_text()) for p in (alone, parallel)]
            assert indices[0] == indices[1]
        assert alone.num_train_tokens == (max_tokens or alone.num_train_tokens)
    assert pools == [2, 2]


def test_max_tokens_bounds_a_stream(data, texts, tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepared = prepare(data.model_copy(update={"train": Hub(name=str(tmp_path)), "max_tokens": 500}))
    assert prepared.num_train_tokens == 500
    assert decoded(prepare(data), "train").startswith(decoded(prepared, "train"))


def test_validation_may_have_a_source_of_its_own(data, texts, tmp_path):
    (tmp_path / "v.txt").write_text("mask live\n" * 20)
    prepared = prepare(data.model_copy(update={"validation": Files(paths=(str(tmp_path / "v.txt"),))}))
    assert prepared.num_train_documents == len(texts)
    assert decoded(prepared, "validation") == "mask live\n" * 20 + END_OF_TEXT


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([], {}, "Expected training documents to train a tokenizer on. Got none"),
        (["a"], {"validation": Holdout(fraction=1e-9)}, r"at least 17 tokens in .*train/index\.json for one sequence. Got 2"),
        (["a " * 50], {"validation": Holdout(fraction=1e-9)}, "Expected validation documents. Got none that hold text, from 1"),
        (["a " * 50], {"validation": Files(paths=("no.txt",))}, r"at 'no\.txt'. Got none"),
    ],
)
def test_too_little_data_is_an_error(data, tmp_path, rows, changes, message):
    if "17" in message:
        changes = {"validation": with_text(data, tmp_path / "v.jsonl", ["b " * 99]).train}
    with pytest.raises(ConfigError, match=message):
        prepare(with_text(data, tmp_path / "a.jsonl", rows, **changes))


def test_a_context_longer_than_the_corpus_is_an_error(data):
    with pytest.raises(ConfigError, match=r"Expected at least 100001 tokens in .* Give more data or lower data.context"):
        prepare(data.model_copy(update={"context": 100_000}))


def test_unigram_entropies():
    #  p = (1/2, 1/4, 1/4), H = 1.5 ln 2; q = (5, 3, 3, 1) / 12 after adding one to each of (4, 2, 2, 0)
    counts = np.array([4, 2, 2, 0])
    assert entropy(counts) == pytest.approx(1.5 * np.log(2))
    assert cross_entropy(np.array([1, 0, 0, 1]), counts) == pytest.approx(-(np.log(5 / 12) + np.log(1 / 12)) / 2)


def test_prepared_states_the_unigram_losses(data):
    prepared = prepare(data)
    ids = [
        TokenFile.open(path).windows(np.array([0]), n)[0]
        for path, n in ((prepared.train, prepared.num_train_tokens), (prepared.validation, prepared.num_validation_tokens))
    ]
    counts = [np.bincount(split, minlength=prepared.vocab_size) for split in ids]
    share = counts[0] / counts[0].sum()
    assert prepared.train_unigram_nats == pytest.approx(-np.log(share[ids[0]]).mean())
    smooth = (counts[0] + 1) / (counts[0] + 1).sum()
    assert prepared.validation_unigram_nats == pytest.approx(-np.log(smooth[ids[1]]).mean())
    assert json.loads(Path(prepared.validation).read_text())["unigram_nats"] == prepared.validation_unigram_nats


def test_windows_cross_shards(write):
    file = TokenFile.open(write(range(1000), shard_tokens=7))
    assert len(file.shards) == 143
    assert len(file) == 1000
    starts = np.array([0, 5, 990])
    assert file.windows(starts, 10).tolist() == [list(range(start, start + 10)) for start in starts]
    one = TokenFile.open(write(range(1000), shard_tokens=10_000))
    assert one.windows(starts, 10).tolist() == file.windows(starts, 10).tolist()


def test_large_vocabularies_get_32_bits(tmp_path):
    writer = ShardWriter(tmp_path / "t", "uint32", 70_000)
    writer.write(np.array([69_999, 1], dtype=np.uint32))
    assert TokenFile.open(writer.close(0.0)).windows(np.array([0]), 2).tolist() == [[69_999, 1]]


def test_a_damaged_or_missing_cache_says_what_to_do(write):
    path = write(range(250))
    with pytest.raises(ConfigError, match=r"Got none on this machine. Put data.cache_dir on storage that all nodes share"):
        TokenFile.open(path.with_name("nothing.json"))
    shard = path.parent / "00001.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[::-1])
    with pytest.raises(ConfigError, match=r"Expected SHA-256 \w+ at .*00001\.bin"):
        TokenFile.open(path).verify()
    for broken in (content[:-2], None):
        shard.write_bytes(broken) if broken else shard.unlink()
        with pytest.raises(ConfigError, match=r"Expected 200 bytes at .*00001\.bin. Got (198|0). Delete the folder"):
            TokenFile.open(path)


def test_an_epoch_sees_every_window_once(write):
    feed = TokenFeed(TokenFile.open(write(range(101))), context=10, sequences=4, seed=1)
    assert (feed.num_windows, feed.steps_per_epoch) == (10, 3)
    batches = [feed.batch(step, range(4)) for step in range(5)]
    firsts = torch.cat([batch.input_ids[:, 0] for batch in batches]).tolist()
    assert sorted(firsts[:10]) == sorted(firsts[10:]) == list(range(0, 100, 10))
    assert firsts[:10] != firsts[10:]
    for batch in batches:
        assert torch.equal(batch.labels, batch.input_ids + 1)
        assert batch.input_ids.shape == (4, 10)
        assert batch.input_ids.dtype == torch.int64


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_one_global_batch(write, world_size):
    feed = TokenFeed(TokenFile.open(write(range(500))), context=8, sequences=6, seed=0)
    share = 6 // world_size
    parts = [feed.batch(20, range(rank * share, (rank + 1) * share)) for rank in range(world_size)]
    assert torch.equal(torch.cat([part.input_ids for part in parts]), feed.batch(20, range(6)).input_ids)


def test_validation_is_spread_over_the_file_and_always_the_same(write):
    feed = TokenValidation(TokenFile.open(write(range(101))), context=10, sequences=4)
    assert feed.batch(0, range(4)).input_ids[:, 0].tolist() == [0, 20, 50, 70]
    assert feed.batch(9, [2]).input_ids.tolist() == [list(range(50, 60))]
    assert feed.batch(0, range(4)).num_targets == 40


def test_a_killed_build_leaves_nothing(tmp_path):
    def killed(folder):
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "a" / "x", killed)
    assert list((tmp_path / "a").iterdir()) == []


def test_two_builders_agree(tmp_path):
    both = threading.Barrier(2)

    def build(folder):
        (folder / "file").write_text("same")
        both.wait(timeout=30)

    with ThreadPoolExecutor(2) as pool:
        builders = [pool.submit(publish, tmp_path / "x", build) for _ in range(2)]
    assert [builder.result() for builder in builders] == [tmp_path / "x"] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x" / "file").read_text() == "same"


def test_the_config_reads_from_plain_data():
    config = DataConfig.check({"train": {"type": "files", "paths": "a.txt"}, "validation": {"type": "holdout", "fraction": 0.1}})
    assert config.train == Files(paths=("a.txt",))
    assert DataConfig.check(config.model_dump(mode="json")) == config
    with pytest.raises(ConfigError, match=r"validation\.fraction: Input should be less than 1"):
        DataConfig.check({"validation": {"type": "holdout", "fraction": 1}})
