"""What a training step costs: masks against none, raysparse against a bare PyTorch loop of the same model.

    python -m benchmarks.step                        GPT-2-small width, 2 layers, 512 tokens, one thread
    python -m benchmarks.step --vocabulary 50257 --layers 12 --rounds 21

Contestants take turns in one process and are compared round by round in CPU time, which other programs on the machine disturb
little. Exit status 1 if a bound is missed.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Ratio, interleave, table, write
from raysparse.data.batch import Batch
from raysparse.models.build import ModelConfig, architecture, blocks, build, select
from raysparse.recipes import training
from raysparse.recipes.job import Job
from raysparse.sparsity.agenda import Agenda
from raysparse.sparsity.evolve import first_topology
from raysparse.sparsity.plan import SparsityConfig
from raysparse.sparsity.topology import Topology
from raysparse.train.clip import clip_, global_norm
from raysparse.train.interval import check_leaks
from raysparse.train.loop import forward_backward, update
from raysparse.train.metrics import Console
from raysparse.train.objective import CrossEntropy
from raysparse.train.optimizer import OptimizerConfig, build_optimizer
from raysparse.train.process import process_group
from raysparse.train.run import LocalRun
from raysparse.train.shard import FSDP2, ShardingConfig
from raysparse.train.state import Training

OPTIMIZER = OptimizerConfig(lr=1e-4)
BOUNDS = [  # contestant, over which, at most, what it says
    ("sparsity 0", "no sparsity code", 1.02, "asking for no zeros is free"),
    ("masked", "dense", 1.05, "masks, 75 % zeros"),
    ("masked, FSDP2", "dense, FSDP2", 1.05, "masks, 75 % zeros, FSDP2's code path"),
    ("dense", "bare PyTorch", 1.05, "raysparse on one worker"),
    ("dense", "bare PyTorch, Conv1D", 1.05, "the same over transformers' own GPT-2 with Conv1D"),
    ("dense, FSDP2", "bare PyTorch", None, "what FSDP2 would cost one worker, which does not use it"),
]


@dataclass(frozen=True)
class Size:
    layers: int
    width: int
    vocabulary: int
    tokens: int
    heads: int | None = None
    """None: as many as have a width of 64."""

    @property
    def model(self) -> ModelConfig:
        overrides = {"n_layer": self.layers, "n_embd": self.width, "n_head": self.heads or max(1, self.width // 64)}
        return ModelConfig(preset="gpt2-small", overrides=overrides)


class Feed:
    """Random tokens, made once: no contestant pays for data."""

    def __init__(self, size: Size, sequences: int = 1, device: str | torch.device = "cpu"):
        ids = torch.randint(size.vocabulary, (sequences, size.tokens + 1), generator=torch.Generator().manual_seed(0)).to(device)
        self._batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    def batch(self, step: int, rows: Sequence[int]) -> Batch:
        return Batch(self._batch.input_ids[: len(rows)], self._batch.labels[: len(rows)])


def assemble(
    folder: Path,
    size: Size,
    sparsity: float,
    sharding: ShardingConfig | None = None,
    optimizer: OptimizerConfig = OPTIMIZER,
    micro_batches: int = 1,
    settings: Mapping[str, Any] | None = None,
    pruned: SparsityConfig | None = None,
    **more: Any,
) -> Training:
    """raysparse as a recipe assembles it, `micro_batches` sequences of `size.tokens` a step and rank.

    Args:
        settings: sections of the config in the place of those here.
        pruned: masks in the place of unstructured ones of `sparsity`.
        more: `training.Ingredients` in the place of those of a pre-training.
    """
    ranks = dist.get_world_size()
    sections: dict[str, Any] = {
        "model": size.model.model_dump(),
        "optimizer": optimizer.model_dump(),
        "run": {"workers": ranks},
        "sharding": (sharding or ShardingConfig()).model_dump(),
        "training": {"sequences": ranks * micro_batches, "micro": 1},
        "checkpoint": {"asynchronous": False},
        "logging": {"tensorboard": False},
        "kernels": "dense",  # what masks cost where no zero is skipped; benchmarks.cpu_step has the kernels
    }
    config = training.TrainingRunConfig.check(sections | dict(settings or {}))
    model = build(size.model, 0, size.vocabulary, size.tokens)
    shapes = {name: tuple(model.get_parameter(name).shape) for name in select(model)}
    sparse, sequences = pruned or SparsityConfig(target=sparsity), config.training.sequences
    agenda = Agenda(sparsity=sparse, shapes=shapes, steps=1000, tokens_per_step=sequences * size.tokens, seed=0)

    def topology(sharded: Any) -> Topology:
        return first_topology(agenda, {name: sharded.parts[name].rows for name in shapes}, sharded.local, sharded.ranks)

    folder.mkdir(parents=True, exist_ok=True)
    job = Job("pretrain", config.model_dump(mode="json"), {}, str(folder), "")
    parts: dict[str, Any] = {
        "model": model,
        "sparse": shapes,
        "target": sparse.target,
        "agenda": agenda,
        "topology": topology if sparse.wants_masks else None,
        "feed": Feed(size, sequences),
        "validation": Feed(size),
        "num_validation": 1,
        "tokens_per_sequence": size.tokens,
        "steps_per_epoch": None,
        "convention": "spdf",
    }
    t, _ = training.assemble(job, config, LocalRun(Console(sys.stderr)), training.Ingredients(**parts | more))
    t.meter.close()  # single steps log nothing
    return t


def through_fsdp2(t: Training, size: Size) -> Training:
    """The same run with FSDP2 around the model, as on several ranks; one rank leaves it out."""
    model = build(size.model, 0, size.vocabulary, size.tokens)
    sharded = FSDP2(model, blocks(model), ShardingConfig(), "cpu", torch.float32)
    if t.topology is not None:
        t.topology.kill(sharded.local)
    objective = CrossEntropy(lambda batch: sharded.module(**batch.inputs).logits, 0.0)
    return replace(t, sharded=sharded, objective=objective, optimizer=build_optimizer(sharded, OPTIMIZER, parity=False))


def product(t: Training) -> Callable[[int], None]:
    """One step of `train.loop.train`."""

    def step(index: int) -> None:
        forward_backward(t, index)
        update(t, index)

    return step


def without_sparsity(t: Training) -> Callable[[int], None]:
    """The same step with the sparsity code left out."""
    assert t.topology is None

    def step(index: int) -> None:
        forward_backward(t, index)
        gradients = list(t.sharded.collect().values())
        norm = global_norm(gradients, sum(part.shape[0] for part in t.sharded.parts.values()), t.sharded.owners)
        clip_(gradients, norm, t.clip_norm)
        t.optimizer.step()
        t.sharded.zero_grad()

    return step


def bare(model: torch.nn.Module, size: Size, sequences: int = 1, device: str | torch.device = "cpu") -> Callable[[int], None]:
    """What a PyTorch user would write: the same optimizer settings, torch's own clipping, no framework."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    feed = Feed(size, sequences, device)

    def step(index: int) -> None:
        batch = feed.batch(index, range(sequences))
        logits = model(input_ids=batch.input_ids).logits
        F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(folder: Path, size: Size, rounds: int) -> dict[str, Any]:
    """Seconds and ratios of all contestants at one size; asserts that they compute the same."""
    from transformers import AutoModelForCausalLM

    runs = {
        "masked": assemble(folder / "masked", size, 0.75),
        "dense": assemble(folder / "dense", size, 0.0),
        "no sparsity code": assemble(folder / "plain", size, 0.0),
    }
    runs |= {f"{name}, FSDP2": through_fsdp2(runs[name], size) for name in ("masked", "dense")}
    linear = build(size.model, 0, size.vocabulary, size.tokens)
    conv1d = AutoModelForCausalLM.from_config(architecture(size.model, size.vocabulary, size.tokens)).train()
    steps = {name: product(t) for name, t in runs.items()}
    steps["no sparsity code"] = without_sparsity(runs["no sparsity code"])
    steps |= {"bare PyTorch": bare(linear, size), "bare PyTorch, Conv1D": bare(conv1d, size)}
    times = interleave(steps, rounds)
    dense = runs["dense"].sharded.local
    assert difference(dense, runs["no sparsity code"].sharded.local) == 0, "sparsity 0 trained other weights than without sparsity code"
    times["sparsity 0"] = times["dense"]
    masked = runs["masked"]
    assert masked.topology is not None
    leaks = interleave({"leaks": lambda _: check_leaks(masked)}, rounds)["leaks"]
    return {
        "size": vars(size),
        "parameters": sum(p.numel() for p in linear.parameters()),
        "sparse_weights": sum(mask.numel() for mask in masked.topology.masks.values()),
        "rounds": rounds,
        "cpu_seconds": times,
        "leak_check_cpu_seconds": leaks,
        "largest_weight_difference": {
            "no sparsity code": difference(dense, runs["no sparsity code"].sharded.local),
            "dense, FSDP2": difference(dense, runs["dense, FSDP2"].sharded.local),
            "bare PyTorch": difference(dense, dict(linear.named_parameters())),
        },
        "ratios": [
            {"contestant": a, "over": b, "at_most": bound, "what": what, "ratio": Ratio.of(times[a], times[b])}
            for a, b, bound, what in BOUNDS
        ],
    }


@torch.no_grad()
def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Largest absolute difference of a weight; 0.0 says bit-equal (but for the sign of a zero)."""
    assert one.keys() == other.keys()
    return max(float((value - other[name]).abs().max()) for name, value in one.items())


def report(facts: dict[str, Any]) -> str:
    """One size as text: the bounds, then the seconds behind them."""
    size = facts["size"]
    ratios = [
        [
            row["what"],
            f"{row['contestant']} / {row['over']}",
            row["ratio"],
            f"{row['ratio'].smallest:.3f} - {row['ratio'].largest:.3f}",
            "" if row["at_most"] is None else f"{row['at_most']:.2f}",
            "" if row["at_most"] is None else "MISSED" if missed(row) else "met",
        ]
        for row in facts["ratios"]
    ]
    seconds = [[name, f"{median(values):.3f}", f"{min(values):.3f}", f"{max(values):.3f}"] for name, values in facts["cpu_seconds"].items()]
    leaks = median(facts["leak_check_cpu_seconds"])
    return (
        f"## Vocabulary {size['vocabulary']:,}: {size['layers']} layers of width {size['width']}, {size['tokens']} tokens a step\n\n"
        f"{facts['parameters']:,} parameters, {facts['sparse_weights']:,} in sparse layers; {facts['rounds']} rounds.\n\n"
        + table(["claim", "ratio of CPU times", "median [95 %]", "all rounds", "at most", ""], ratios)
        + "\n"
        + table(["CPU seconds a step", "median", "least", "most"], seconds)
        + f"\nLeak check, once a logging interval: {leaks:.3f} s. Largest difference of a weight from those of `dense` at the end: "
        + ", ".join(f"{name} {value:.1g}" for name, value in facts["largest_weight_difference"].items())
        + ".\n"
    )


def missed(row: dict[str, Any]) -> bool:
    return row["at_most"] is not None and row["ratio"].median > row["at_most"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[50257, 512], help="with the head of GPT-2, and nearly without")
    parser.add_argument("--out", type=Path, help="folder for step_<hardware>_<date>.{json,md}")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    sizes = [Size(args.layers, args.width, vocabulary, args.tokens) for vocabulary in args.vocabulary]
    results = []
    with process_group("cpu"), tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            results.append(compare(Path(folder) / str(size.vocabulary), size, args.rounds))
            print(report(results[-1]), flush=True)
    if args.out:
        print(write(args.out, "step", {"sizes": results}, [report(facts) for facts in results]))
    return int(any(missed(row) for facts in results for row in facts["ratios"]))


if __name__ == "__main__":
    sys.exit(main())
