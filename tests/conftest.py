"""What several test modules need: a tiny corpus with its config, and the one Ray instance of the session."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing may be downloaded
os.environ["RAY_AUTH_MODE"] = "disabled"  # leave no token in the user's home
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as in a background job of a shell; commands would inherit it, and tests interrupt some
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 made-up documents of a few hundred words, one JSON line each."""
    import json
    import random

    random.seed(5)
    words = ["sparse", "weights", "live", "dead", "mask", "layer", "ray", "train", "loss", "step", "row", "token", "grow", "drop"]
    file = tmp_path_factory.mktemp("corpus") / "docs.jsonl"
    lines = [json.dumps({"text": " ".join(random.choices(words, k=400)) + f" document {i}."}) for i in range(60)]
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers and tokens of the session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def pretrain_values(corpus: Path, cache_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """The plain config of a pre-training that takes a few seconds, in a folder of the test's own."""
    return {
        "run": {"name": "tiny", "folder": str(tmp_path / "runs"), "device": "cpu"},
        "model": {"preset": "debug", "overrides": {"n_embd": 32, "n_head": 2, "n_layer": 2}},
        "data": {
            "train": {"type": "files", "paths": [str(corpus)]},
            "validation": {"type": "holdout", "fraction": 0.2},
            "tokenizer": {"type": "train", "vocab_size": 300},
            "context": 16,
            "cache_dir": str(cache_dir),
            "num_proc": 1,
        },
        "sparsity": {"target": 0.75},
        "optimizer": {"lr": 1e-2},
        "training": {"length": 12, "sequences": 4, "micro": 2, "validate_every": 6, "validation_sequences": 8},
        "checkpoint": {"every": 4},
        "logging": {"every": 2},
    }


@pytest.fixture(scope="session")
def ray_instance() -> Iterator[Any]:
    """Ray on this machine, 4 logical CPUs, started once for all tests that ask for it."""
    from raysparse.runtime.launch import SETTINGS

    os.environ.update(SETTINGS | {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1"})
    import ray

    ray.init(
        num_cpus=4,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=128 << 20,
        logging_level="ERROR",
        log_to_driver=False,
        namespace="raysparse",
        _temp_dir=tempfile.mkdtemp(prefix="rs"),
    )
    yield ray
    ray.shutdown()
