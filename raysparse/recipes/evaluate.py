"""Score a model on a task: every rank answers its share of the examples, rank 0 scores all and keeps them beside the answers."""

import json
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from pydantic import Field

from raysparse.config import Config, ConfigError
from raysparse.data.pairs import encode_prompts
from raysparse.models import packed
from raysparse.models.build import ModelConfig, architecture, build
from raysparse.recipes.environment import write_environment
from raysparse.recipes.job import Job, check_folder, open_job, runs_in, write_atomically
from raysparse.recipes.training import finish, header
from raysparse.tasks import AnyTask
from raysparse.tasks.base import Example, Split
from raysparse.tasks.generate import GenerationConfig, generate
from raysparse.tasks.metrics import score
from raysparse.train.checkpoint import crc32
from raysparse.train.run import Run, RunConfig, resolve_device

PREDICTIONS = "predictions.jsonl"
"""One line an example: its source, the model's answer, the references, the baseline's answer. Anyone can rescore it."""


class EvaluationConfig(Config):
    """Which examples are scored."""

    split: Split = "test"
    """The split that the final scores are of."""
    max_examples: int = Field(100_000, ge=1)
    """Score the first this many examples of the split."""


class EvaluateConfig(Config):
    """`raysparse evaluate`: any causal language model (`model.path`: an exported folder, a hub name or a run) on a task."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    task: AnyTask
    context: int = Field(256, ge=8)
    """Tokens of the longest prompt and answer together; longer prompts are cut."""
    generation: GenerationConfig = GenerationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    weights: Literal["dense", "packed"] = "dense"
    """packed: live weights alone are read, on the CPU, in float32 or as model.path was packed (`raysparse export`)."""
    cache_dir: str = "~/.cache/raysparse"
    """Where the examples are kept for the workers; with several nodes, on storage they all share."""


def check(config: EvaluateConfig) -> dict[str, Any]:
    """Everything that can be wrong, found on the driver."""
    if config.model.path is None:
        raise ConfigError("Expected model.path for evaluation: a folder, a hub name or a finished run. Got a preset: random weights.")
    folder = model_folder(config.model.path)
    tokenizer = load_tokenizer(folder)
    if packed.is_packed(folder) and config.weights == "dense":
        raise ConfigError(f"Expected weights=packed for {folder}. Got weights=dense, and a packed model. Add weights=packed.")
    if config.weights == "packed" and resolve_device(config.run) != "cpu":
        raise ConfigError("Expected run.device=cpu with weights=packed. Got a GPU. Add run.device=cpu, or drop weights=packed.")
    if not packed.is_packed(folder):
        architecture(ModelConfig(path=folder), len(tokenizer), config.context)
    encode_prompts(
        examples_of(config.task)[config.evaluation.split][:1],
        tokenizer,
        config.task,
        config.context,
        config.generation.max_new_tokens,
    )
    examples = str(store_examples(config.task, config.cache_dir))
    return {"examples": examples, "model": folder, "content": {"examples": Path(examples).stem, "model": weights_digest(folder)}}


def open_run(config: EvaluateConfig) -> Job:
    check_folder("evaluate", config, config.run)
    prepared = check(config)
    return open_job("evaluate", config, config.run, prepared, prepared["content"])


def dry_run(config: EvaluateConfig) -> dict[str, Any]:
    check_folder("evaluate", config, config.run)
    return check(config)


def work(job: Job, run: Run) -> dict[str, Any]:
    """Answer this rank's share; returns the scores."""
    config = EvaluateConfig.check(job.config)
    began, device = time.perf_counter(), resolve_device(config.run)
    if run.rank == 0:
        write_environment(job.path, config.run)
    examples = load_examples(Path(job.prepared["examples"]))[config.evaluation.split]
    scores = score_model(
        job.prepared["model"], job.path, config.task, examples, config.context, config.generation, config.evaluation, run, device,
        config.weights,
    )  # fmt: skip
    summary = header(job, config, run) | {"model": {"path": job.prepared["model"]}, "task": scores}
    summary |= {"seconds": time.perf_counter() - began}
    return finish(job, run, summary)


def score_model(
    model_folder: str | Path, out: Path, task: Any, examples: list[Example], context: int, generation: GenerationConfig,
    evaluation: EvaluationConfig, run: Run, device: str, weights: Literal["dense", "packed"] = "dense",
) -> dict[str, Any]:  # fmt: skip
    """Answer and score examples; every rank calls this, each loads the whole model. Rank 0 writes ``predictions.jsonl`` into `out`."""
    examples = examples[: evaluation.max_examples]
    tokenizer = load_tokenizer(model_folder)
    if packed.is_packed(model_folder):
        model = packed.load(model_folder)
    else:
        model = build(ModelConfig(path=str(model_folder)), 0, len(tokenizer), context)
        if weights == "packed":
            model = packed.pack(model, "float32")
    model.to(device)  # pyrefly: ignore
    model.config.use_cache = True
    mine = list(range(run.rank, len(examples), run.world_size))
    prompts = encode_prompts([examples[i] for i in mine], tokenizer, task, context, generation.max_new_tokens)
    parts: list[Any] = [None] * run.world_size
    began = time.perf_counter()
    answers = dict(zip(mine, generate(model, tokenizer, prompts, generation, run.rank == 0), strict=True))
    dist.all_gather_object(parts, (answers, time.perf_counter() - began))
    merged = {index: answer for part, _ in parts for index, answer in part.items()}
    hypotheses = [merged[i] for i in range(len(examples))]
    num_tokens = sum(map(len, tokenizer(hypotheses)["input_ids"])) if hypotheses else 0
    references = [example.references for example in examples]
    guesses = [task.baseline(example) for example in examples]
    if run.rank == 0:
        lines = [
            json.dumps({"source": e.source, "hypothesis": h, "references": e.references, "baseline": g})
            for e, h, g in zip(examples, hypotheses, guesses, strict=True)
        ]
        write_atomically(out / PREDICTIONS, "".join(line + "\n" for line in lines))
    return {
        "name": task.type,
        "primary": task.primary,
        "split": evaluation.split,
        "num_examples": len(examples),
        "tokens_per_s": num_tokens / max(seconds for _, seconds in parts),
        "scores": score(task.metrics, hypotheses, references),
        "baseline": score(task.metrics, guesses, references),
    }


def model_folder(path: str) -> str:
    """A finished run stands for the model that it exported; anything else is left as it is."""
    folder = Path(path).expanduser()
    if (folder / "identity.json").exists():
        if not ((folder / "export" / "config.json").exists() and (folder / "summary.json").exists()):
            raise ConfigError(f"Expected {path} to be a finished run. Got one without an exported model. Finish it: run its command again.")
        return str((folder / "export").absolute())
    if not (folder / "config.json").exists() and (hint := runs_in(folder)):
        raise ConfigError(f"Expected a model folder, a finished run or a hub name at {path}. Got none. {hint}")
    return str(folder.absolute()) if folder.exists() else path


def weights_digest(folder: str | Path) -> str:
    """Names the weights in a local model folder, by the CRC-32 of their files; a hub name stands for itself."""
    files = sorted(Path(folder).glob("*.safetensors")) + sorted(Path(folder).glob("*.bin"))
    return " ".join(f"{file.name}:{crc32(file):08x}" for file in files) or str(folder)


def load_tokenizer(folder: str | Path) -> Any:
    """Of a model folder or hub name, or a `ConfigError`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Expected a model folder with a tokenizer, or a hub name, at {folder}. Got: {str(error).splitlines()[0]}. Correct the model."
        ) from None


@lru_cache(maxsize=4)
def _examples_by_json(task_json: str) -> dict[Split, list[Example]]:
    from pydantic import TypeAdapter

    task = TypeAdapter(AnyTask).validate_json(task_json)
    return {split: task.examples(split) for split in ("train", "validation", "test")}


def examples_of(task: Any) -> dict[Split, list[Example]]:
    """All splits; made once a process for equal tasks."""
    return _examples_by_json(task.model_dump_json())


def store_examples(task: Any, cache_dir: str) -> Path:
    """Write the examples where the workers read them, under a name that is a hash of their content."""
    import hashlib

    splits = examples_of(task)
    text = json.dumps({split: [[e.source, e.references] for e in examples] for split, examples in splits.items()})
    file = Path(cache_dir).expanduser().absolute() / "examples" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text)
    return file


def load_examples(file: Path) -> dict[Split, list[Example]]:
    if not file.exists():
        raise ConfigError(f"Expected prepared examples at {file}. Got none on this machine. Put the cache on storage that all nodes share.")
    return {split: [Example(source, tuple(refs)) for source, refs in rows] for split, rows in json.loads(file.read_text()).items()}
