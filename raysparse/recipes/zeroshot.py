"""Ask a model what it was not trained for: every rank takes its share of the likelihoods, rank 0 scores."""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field

from raysparse.config import Config, ConfigError
from raysparse.models import packed
from raysparse.models.build import ModelConfig, architecture, build
from raysparse.recipes.environment import write_environment
from raysparse.recipes.evaluate import PREDICTIONS, load_tokenizer, model_folder, weights_digest
from raysparse.recipes.job import Job, check_folder, open_job, opening, write_atomically
from raysparse.recipes.training import finish, header
from raysparse.tasks.likelihood import Window, likelihoods, merged, of_pair, of_text
from raysparse.tasks.zeroshot import AnyProbe, Item, Text
from raysparse.train.run import Run, RunConfig, resolve_device


class ZeroshotConfig(Config):
    """`raysparse zeroshot`: a language model (`model.path`: an exported folder, a hub name or a run) on a task it was not trained for."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    task: AnyProbe
    context: int = Field(1024, ge=8)
    """Tokens that the model reads at most; what is longer loses its start, and is counted."""
    batch_size: int = Field(16, ge=1)
    """Rows that are computed at once."""
    cache_dir: str = "~/.cache/raysparse"
    """Where the examples are kept for the workers; with several nodes, on storage they all share."""


def check(config: ZeroshotConfig) -> dict[str, Any]:
    """Everything that can be wrong, found on the driver."""
    if config.model.path is None:
        raise ConfigError("Expected model.path for an evaluation: a folder, a hub name or a finished run. Got a preset: random weights.")
    folder = model_folder(config.model.path)
    if packed.is_packed(folder):
        raise ConfigError(f"Expected a model in Hugging Face format at {folder}. Got a packed one. Name the model that it was packed from.")
    tokenizer = load_tokenizer(folder)
    architecture(ModelConfig(path=folder), len(tokenizer), config.context)
    if isinstance(config.task, Text) and config.task.stride is not None and config.task.stride > config.context:
        raise ConfigError(f"Expected task.stride within the context of {config.context}. Got {config.task.stride}. Lower it.")
    items = config.task.items()
    _requests(config, items, tokenizer)
    text = json.dumps([[item.pairs, item.gold] for item in items])
    file = Path(config.cache_dir).expanduser().absolute() / "examples" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text)
    return {"items": str(file), "model": folder, "content": {"items": file.stem, "model": weights_digest(folder)}}


def open_run(config: ZeroshotConfig) -> Job:
    with opening("zeroshot", config, config.run):
        prepared = check(config)
        return open_job("zeroshot", config, config.run, prepared, prepared["content"])


def dry_run(config: ZeroshotConfig) -> dict[str, Any]:
    check_folder("zeroshot", config, config.run)
    return check(config)


def work(job: Job, run: Run) -> dict[str, Any]:
    """Compute this rank's share of the likelihoods; returns the scores. Rank 0 writes ``predictions.jsonl``: an item a line."""
    config = ZeroshotConfig.check(job.config)
    began, device, task = time.perf_counter(), resolve_device(config.run), config.task
    if run.rank == 0:
        write_environment(job.path, config.run)
    file = Path(job.prepared["items"])
    if not file.exists():
        raise ConfigError(f"Expected prepared examples at {file}. Got none on this machine. Put the cache on storage that all nodes share.")
    items = [Item(tuple((a, b) for a, b in pairs), gold) for pairs, gold in json.loads(file.read_text())]
    tokenizer = load_tokenizer(job.prepared["model"])
    model: Any = build(ModelConfig(path=job.prepared["model"]), 0, len(tokenizer), config.context).eval()
    model.to(device)
    requests = _requests(config, items, tokenizer)
    forward = lambda ids: model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits  # noqa: E731
    mine = likelihoods(forward, requests, model.device, config.batch_size, run.rank, run.world_size, run.rank == 0)
    parts: list[Any] = [None] * run.world_size
    dist.all_gather_object(parts, mine)
    each = merged(parts, len(requests))
    found = [[next(each) for _ in item.pairs] for item in items]
    scores = task.scores(items, found)
    if run.rank == 0:
        lines = [
            json.dumps({"pairs": item.pairs, "gold": item.gold, "logprobs": [o.logprob for o in own], "greedy": [o.greedy for o in own]})
            for item, own in zip(items, found, strict=True)
        ]
        write_atomically(job.path / PREDICTIONS, "".join(line + "\n" for line in lines))
    told = {
        "name": task.type,
        "files": list(task.files),
        "num_examples": len(items),
        "num_truncated": sum(any(one.cut for one in own) for own in found),
        "scores": scores,
    }
    summary = header(job, config, run) | {"model": {"path": job.prepared["model"]}, "zeroshot": told}
    return finish(job, run, summary | {"seconds": time.perf_counter() - began})


def _requests(config: ZeroshotConfig, items: Sequence[Item], tokenizer: Any) -> list[tuple[list[Window], int]]:
    pairs, task = [pair for item in items for pair in item.pairs], config.task
    if isinstance(task, Text):
        return [of_text(text, tokenizer, config.context, task.stride or config.context) for _, text in pairs]
    return [of_pair(*pair, tokenizer, config.context) for pair in pairs]
