"""Score a model on a task: every rank answers its share of the examples, rank 0 scores all and keeps them beside the answers."""

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field
from tqdm import tqdm

from raysparse.config import Config, ConfigError
from raysparse.data import audio
from raysparse.losses import cross_entropy_sum
from raysparse.models import int8, packed
from raysparse.models.build import ModelConfig, architecture, build
from raysparse.models.hub_config import CAUSAL
from raysparse.recipes.environment import write_environment
from raysparse.recipes.job import Job, check_folder, open_job, opening, runs_in, write_atomically
from raysparse.recipes.reading import Reader, kinds_for
from raysparse.recipes.training import finish, header
from raysparse.tasks import AnyTask
from raysparse.tasks.base import Example, Split
from raysparse.tasks.generate import GenerationConfig, generate
from raysparse.tasks.metrics import METRICS, missing, score, score_parts
from raysparse.train.checkpoint import crc32
from raysparse.train.run import Run, RunConfig, resolve_device

PREDICTIONS = "predictions.jsonl"
"""One line an example: its source, the model's answer, the references, the baseline's answer. Anyone can rescore it."""

FLOAT_PREDICTIONS = "predictions_float.jsonl"
"""The same of the model before its weights became int8."""

Weights = Literal["dense", "packed", "int8", "int8_weight_only"]

AUDIO = "audio"
"""Among stored examples: split -> folder of its recordings."""


class EvaluationConfig(Config):
    """Which examples are scored."""

    split: Split = "test"
    """The split that the final scores are of."""
    max_examples: int = Field(100_000, ge=1)
    """Score the first this many examples of the split."""


class EvaluateConfig(Config):
    """`raysparse evaluate`: a causal language model, T5 or Whisper (`model.path`: an exported folder, a hub name or a run) on a task."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    task: AnyTask
    context: int = Field(256, ge=8)
    """Tokens of the longest prompt and answer together; longer prompts are cut. Of an encoder-decoder: of the longest answer."""
    source_context: int = Field(256, ge=8)
    """Of an encoder-decoder that reads text: tokens of the longest source; longer ones are cut."""
    generation: GenerationConfig = GenerationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    weights: Weights = "dense"
    """packed: live weights alone are read, on the CPU, in float32 or as model.path was packed (`raysparse export`). int8: weights and
    inputs of the blocks' linear layers rounded to 8 bits by torchao, and scored beside the floats; int8_weight_only: the weights alone."""
    cache_dir: str = "~/.cache/raysparse"
    """Where the examples are kept for the workers; with several nodes, on storage they all share."""


def check(config: EvaluateConfig) -> dict[str, Any]:
    """Everything that can be wrong, found on the driver."""
    if config.model.path is None:
        raise ConfigError("Expected model.path for evaluation: a folder, a hub name or a finished run. Got a preset: random weights.")
    folder = model_folder(config.model.path)
    tokenizer = load_tokenizer(folder)
    if packed.is_packed(folder) and config.weights != "packed":
        raise ConfigError(f"Expected weights=packed for {folder}. Got weights={config.weights}, and a packed model. Use weights=packed.")
    if config.weights in int8.KINDS:
        int8.check_package()
    if config.weights == "packed" and resolve_device(config.run) != "cpu":
        raise ConfigError("Expected run.device=cpu with weights=packed. Got a GPU. Add run.device=cpu, or drop weights=packed.")
    hf_config = None
    if not packed.is_packed(folder):
        kinds = CAUSAL if config.weights == "packed" else kinds_for(config.task)
        hf_config = architecture(ModelConfig(path=folder), len(tokenizer), config.context, kinds)
    check_task(config.task)
    examples = store_examples(config.task, config.cache_dir, (config.evaluation.split,))
    reader = Reader(hf_config, tokenizer, config.task, config.context, config.source_context)
    check_scores(reader, load_examples(examples)[config.evaluation.split], config.generation)
    return {"examples": str(examples), "model": folder, "content": {"examples": examples.stem, "model": weights_digest(folder)}}


def open_run(config: EvaluateConfig) -> Job:
    with opening("evaluate", config, config.run):
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
        config.weights, config.source_context,
    )  # fmt: skip
    summary = header(job, config, run) | {"model": {"path": job.prepared["model"]}, "task": scores}
    summary |= {"seconds": time.perf_counter() - began}
    return finish(job, run, summary)


def score_model(
    model_folder: str | Path, out: Path, task: Any, examples: list[Example], context: int, generation: GenerationConfig,
    evaluation: EvaluationConfig, run: Run, device: str, weights: Weights = "dense", source_context: int = 256,
) -> dict[str, Any]:  # fmt: skip
    """Answer and score examples; every rank calls this, each loads the whole model. Rank 0 writes ``predictions.jsonl`` into `out`.

    Of int8 weights ``quantization`` tells what `int8.quantize` does, and ``float_scores``, of the same model and examples before it.
    """
    examples = examples[: evaluation.max_examples]
    tokenizer = load_tokenizer(model_folder)
    if packed.is_packed(model_folder):
        model = packed.load(model_folder)
    else:
        model = build(ModelConfig(path=str(model_folder)), 0, len(tokenizer), context, kinds_for(task))
        if weights == "packed":
            model = packed.pack(model, "float32")
    model.to(device)  # pyrefly: ignore
    reader = Reader(model.config, tokenizer, task, context, source_context)
    facts: dict[str, Any] = {"name": task.type, "primary": task.primary, "split": evaluation.split}
    if weights in int8.KINDS:
        floats = score_examples(model, reader, examples, generation, run, out / FLOAT_PREDICTIONS)
        facts["quantization"] = int8.quantize(model, weights) | {"float_scores": floats["scores"]}
    return facts | score_examples(model, reader, examples, generation, run, out / PREDICTIONS)


def score_examples(
    model: Any, reader: Reader, examples: list[Example], generation: GenerationConfig, run: Run, file: Path
) -> dict[str, Any]:
    """The scores of a model on its rank's device, by the metrics of the reader's task; see `score_model`."""
    task = reader.task
    result: dict[str, Any] = {"num_examples": len(examples), "remark": task.told, "missing": missing(task.metrics)}
    result |= {"scores": {}, "baseline": {}, "subsets": {}}
    if "perplexity" in task.metrics:
        result["scores"]["perplexity"] = perplexity(model, reader, examples, generation.batch_size, run)
    if any(name in METRICS for name in task.metrics):
        answer_and_score(model, reader, examples, generation, run, file, result)
    result["scores"] = {name: result["scores"][name] for name in task.metrics if name in result["scores"]}
    return result


def answer_and_score(
    model: Any, reader: Reader, examples: list[Example], generation: GenerationConfig, run: Run, file: Path, result: dict[str, Any],
) -> None:  # fmt: skip
    """Fill `result` with the scores of the model's answers and of the baseline's. Every rank calls this, the first one scores."""
    model.config.use_cache = True
    task, tokenizer = reader.task, reader.tokenizer
    prompts = reader.prompts(examples, generation.max_new_tokens)
    began = time.perf_counter()
    answers = generate(model, tokenizer, prompts, generation, run.rank, run.world_size, run.rank == 0)
    parts: list[Any] = [None] * run.world_size
    dist.all_gather_object(parts, (answers, time.perf_counter() - began))
    if run.rank == 0:
        merged = {index: answer for part, _ in parts for index, answer in part.items()}
        outputs, guesses = [merged[k] for k in range(len(examples))], [task.baseline(example) for example in examples]
        lines = [
            json.dumps({"source": e.source, "hypothesis": h, "references": e.references, "baseline": g})
            for e, h, g in zip(examples, outputs, guesses, strict=True)
        ]
        write_atomically(file, "".join(line + "\n" for line in lines))
        references, subsets = [example.references for example in examples], [example.subset for example in examples]
        for name, reason in result["missing"].items():
            run.show({"text": f"{task.type}: {name} is not scored, it {reason}"})
        scores = score_parts(task.metrics, outputs, references, subsets)
        result["scores"] |= scores.pop("")
        counts = Counter(subsets)
        result["subsets"] = {name: {"num_examples": counts[name], "scores": own} for name, own in sorted(scores.items())}
        result["baseline"] = score(task.metrics, guesses, references)
        result["tokens_per_s"] = sum(map(len, tokenizer(outputs)["input_ids"])) / max(seconds for _, seconds in parts)
    box = [result]
    dist.broadcast_object_list(box, src=0)
    result |= box[0]


@torch.no_grad()
def perplexity(model: Any, reader: Reader, examples: list[Example], batch_size: int, run: Run) -> float:
    """exp of the mean loss of all tokens of all references, end of text included, as training predicts them. Every rank calls this."""
    rows = reader.rows(examples)
    order = np.argsort(-rows.sizes, kind="stable")
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    total = torch.zeros(2, dtype=torch.float64)
    model.eval()
    mine = range(run.rank, len(batches), run.world_size)
    for number in tqdm(mine, desc="perplexity", disable=None if run.rank == 0 else True):
        batch = rows.batch(batches[number], batches[number]).to(model.device)
        loss = cross_entropy_sum(model(**batch.inputs).logits, batch.labels)
        total += torch.tensor([float(loss), batch.num_targets], dtype=torch.float64)
    parts: list[Any] = [None] * run.world_size
    dist.all_gather_object(parts, total)
    loss, num_targets = torch.stack(parts).sum(0).tolist()
    return math.exp(min(700.0, loss / num_targets))


def check_task(task: Any) -> None:
    """Raise a `ConfigError` for what this machine lacks to read a task and to score it."""
    task.check_metrics()
    if task.hears:
        audio.check_packages(task.resample)


def check_scores(reader: Reader, examples: list[Example], generation: GenerationConfig) -> None:
    """Raise a `ConfigError` for what would only show when the model answers."""
    reader.prompts(examples if reader.task.hears else examples[:1], generation.max_new_tokens)


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
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Expected a model folder with a tokenizer, or a hub name, at {folder}. Got: {str(error).splitlines()[0]}. Correct the model."
        ) from None


@lru_cache(maxsize=12)
def _examples_by_json(task_json: str, split: Split) -> list[Example]:
    from pydantic import TypeAdapter

    return TypeAdapter(AnyTask).validate_json(task_json).examples(split)


def examples_of(task: Any, split: Split) -> list[Example]:
    """Of a split; made once a process for equal tasks."""
    return _examples_by_json(task.model_dump_json(), split)


def store_examples(task: Any, cache_dir: str, splits: Sequence[Split] = get_args(Split)) -> Path:
    """Write the examples, recordings too, where the workers read them, under a name that is a hash of their content."""
    rows: dict[str, Any] = {split: [[e.source, e.references, e.subset] for e in examples_of(task, split)] for split in splits}
    cache = Path(cache_dir).expanduser().absolute()
    if task.hears:
        clips = {split: (task.clips(split, len(found)), task.clips(split, len(found))) for split, found in rows.items()}
        rows[AUDIO] = {split: audio.store(*pair, task.resample, cache).name for split, pair in clips.items()}
    text = json.dumps(rows)
    file = cache / "examples" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text)
    return file


def load_examples(file: Path) -> dict[Split, list[Example]]:
    if not file.exists():
        raise ConfigError(f"Expected prepared examples at {file}. Got none on this machine. Put the cache on storage that all nodes share.")
    stored = json.loads(file.read_text())
    heard = {split: audio.load(file.parent.parent / "audio" / name) for split, name in stored.pop(AUDIO, {}).items()}
    return {
        split: [
            Example(source, tuple(references), subset, heard[split][number] if heard else None)
            for number, (source, references, subset) in enumerate(rows)
        ]
        for split, rows in stored.items()
    }
