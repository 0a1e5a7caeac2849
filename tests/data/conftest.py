import json
import random

import pytest

from raysparse.data.sources import Files
from raysparse.data.tokens import DataConfig, Holdout, TrainTokenizer


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def texts():
    rng = random.Random(0)
    words = ["mask", "live", "dead", "weight", "sparse", "dense", "grow", "drop", "keep", "rank", "shard", "epoch", "node", "é"]
    return [" ".join(rng.choice(words) for _ in range(rng.randint(5, 60))) + f" {k}" for k in range(150)]


@pytest.fixture(scope="session")
def data(tmp_path_factory, texts):
    """A small prepared corpus in JSON lines; its cache is shared by the tests."""
    folder = tmp_path_factory.mktemp("data")
    path = write_jsonl(folder / "train.jsonl", [{"text": text} for text in texts])
    return DataConfig(
        train=Files(paths=(path,)),
        validation=Holdout(fraction=0.1),
        tokenizer=TrainTokenizer(vocab_size=300),
        context=16,
        cache_dir=str(folder / "cache"),
        num_proc=1,
    )
