"""Batches of similar length: what evaluation and fine-tuning gain by them.

    python -m benchmarks.answers --out benchmarks/results                            docstrings, a GPT of 4 layers, 5 minutes on 2 cores
    python -m benchmarks.answers --task e2e=data/e2e_nlg --task dart=data/dart --tokenizer gpt2    padding on other data

Answers: raysparse's `generate`, batches sorted by length, against transformers' own ``generate`` over batches of as many prompts in the
order of the data, padded on the left, the same settings; wall-clock, in turns. How many answers are the same is counted. Padding: tokens of
a training batch of 8 pairs, padding included, by the window of batches that are sorted together. Exit status 1 if ours is slower.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import GenerationConfig as Settings
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.measure import Ratio, interleave, table, write
from raysparse.data.pairs import PairFeed, PairRows, encode_prompts
from raysparse.data.tokenizer import TrainTokenizer, load, train
from raysparse.recipes.evaluate import load_tokenizer
from raysparse.recipes.score import KINDS
from raysparse.tasks import Dart, Docstrings
from raysparse.tasks.base import Task
from raysparse.tasks.generate import Beginnings, GenerationConfig, generate, left_pad
from raysparse.tasks.tables import PairFolder

CONTEXT, NEW = 256, 48
SETTINGS = {"greedy": {}, "4 beams": {"num_beams": 4, "length_penalty": 0.8, "no_repeat_ngram_size": 4}}
WINDOWS = (1, 8, 16, 64)


def plainly(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> list[str]:
    """transformers alone: batches in the order of the data."""
    settings = Settings(
        max_new_tokens=config.max_new_tokens,
        num_beams=config.num_beams,
        length_penalty=config.length_penalty if config.num_beams > 1 else None,
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    texts = []
    for first in range(0, len(prompts), config.batch_size):
        ids, mask = left_pad(prompts[first : first + config.batch_size], tokenizer.eos_token_id)
        with torch.no_grad():
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        texts += tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def answers(tokenizer: Any, task: Task, num_prompts: int, rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=256, n_layer=4, n_head=4, n_positions=CONTEXT, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    prompts = encode_prompts(task.examples("test")[:num_prompts], tokenizer, task, CONTEXT, NEW)
    asked = Beginnings(prompts, tokenizer.eos_token_id)
    rows = []
    for name, more in SETTINGS.items():
        settings = GenerationConfig(max_new_tokens=NEW, batch_size=16, **cast(Any, more))
        ours = generate(cast(Any, model), tokenizer, asked, settings, progress=False)
        same = sum(ours[k] == text for k, text in enumerate(plainly(model, tokenizer, prompts, settings)))
        times = interleave(
            {
                "plain": lambda _, settings=settings: plainly(model, tokenizer, prompts, settings),
                "ours": lambda _, settings=settings: generate(cast(Any, model), tokenizer, asked, settings, progress=False),
            },
            rounds,
            warmup=1,
            clock=time.perf_counter,
        )
        rows.append(
            {"settings": name, "same": same, "prompts": len(prompts), "times": times, "ratio": Ratio.of(times["plain"], times["ours"])}
        )
    return rows


def padding(tokenizer: Any, task: Task, steps: int = 320) -> dict[int, float]:
    """Window -> mean tokens of a batch of 8 pairs."""
    found = {}
    rows = PairRows.encode(task.examples("train"), tokenizer, task, 512)
    for window in WINDOWS:
        feed = PairFeed(rows, 8, 0, window)
        found[window] = sum(feed.batch(step, range(8)).input_ids.numel() for step in range(steps)) / steps
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.answers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--task", action="append", default=[], metavar="NAME=FOLDER", help="padding of this task's data too")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="of the padding of --task")
    parser.add_argument("--out", type=Path, help="folder for answers_<hardware>_<date>.{json,md}")
    args = parser.parse_args(argv)
    docstrings = Docstrings()
    with tempfile.TemporaryDirectory() as folder:
        sources = (example.source for example in docstrings.examples("train"))
        tokenizer = load(train(TrainTokenizer(vocab_size=2048), sources, "docstrings", Path(folder)))
        rows = answers(tokenizer, docstrings, args.prompts, args.rounds)
        found = {"docstrings": padding(tokenizer, docstrings)}
    other = None if args.tokenizer is None else load_tokenizer(args.tokenizer)
    for name, path in (word.split("=", 1) for word in args.task):
        data = PairFolder(path=path)
        task = Dart(data=data, resplit=True) if name == "dart" else cast(Any, KINDS[name])(data=data)
        found[name] = padding(other or tokenizer, task)
    cells = [
        [
            row["settings"],
            f"{row['ratio']}",
            f"{sum(row['times']['ours']) / len(row['times']['ours']):.1f}",
            f"{row['same']} of {row['prompts']}",
        ]
        for row in rows
    ]
    told = table(["answers", "transformers / raysparse, times faster", "raysparse, s", "the same answer"], cells)
    pads = table(
        ["tokens of a batch", *(f"window {w}" for w in WINDOWS)], [[name, *(f"{of[w]:.0f}" for w in WINDOWS)] for name, of in found.items()]
    )
    print(told, pads, sep="\n")
    if args.out:
        print(write(args.out, "answers", {"answers": rows, "padding": found}, [told, pads]))
    return int(any(row["ratio"].median < 1 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
