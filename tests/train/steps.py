"""A small GPT trained for a few steps on made-up tokens, through the product's own assembly: what distributed tests run."""

from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from raysparse.data.batch import Batch
from raysparse.models.build import ModelConfig, build
from raysparse.recipes import training
from raysparse.recipes.job import Job
from raysparse.sparsity.plan import SparsityConfig, SparsityPlan
from raysparse.sparsity.topology import Topology
from raysparse.models.build import select
from raysparse.train.loop import State, train
from raysparse.train.metrics import Console
from raysparse.train.run import LocalRun

VOCAB, CONTEXT = 101, 16


@dataclass(frozen=True)
class Tokens:
    """Feed of tokens that are a function of (step, row)."""

    vocab: int = VOCAB
    context: int = CONTEXT

    def batch(self, step: int, rows: Any) -> Batch:
        ids = torch.stack([torch.randint(self.vocab, (self.context + 1,), generator=torch.Generator().manual_seed(997 * step + row)) for row in rows])
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def config(**sections: Any) -> training.TrainingRunConfig:
    """A GPT-2 of width 40 (5 heads): 120, 40 and 160 rows; 3 ranks divide none but the first, so shards are uneven."""
    values: dict[str, Any] = {
        "run": {"name": "steps", "seed": 3},
        "model": {"preset": "debug", "overrides": {"n_embd": 40, "n_head": 5, "n_layer": 2}},
        "optimizer": {"lr": 1e-2, "clip_norm": 0.05, "weight_decay": 0.1},
        "schedule": {"warmup": 4},
        "training": {"length": 24, "sequences": 6, "micro": 3, "validate_every": 12, "validation_sequences": 5},
        "checkpoint": {"every": "0 steps"},
        "logging": {"every": 6, "tensorboard": False},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return training.TrainingRunConfig.check(values)


def assemble(folder: Path, settings: training.TrainingRunConfig, sparsity: SparsityConfig) -> tuple[training.Training, State]:
    """The product's assembly over this rank."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "claim").write_text("me")
    model = build(settings.model, settings.run.seed, VOCAB, CONTEXT)
    shapes = {name: tuple(dict(model.named_parameters())[name].shape) for name in select(model, sparsity.include, sparsity.exclude)}
    plan = SparsityPlan.build(shapes, sparsity)

    def topology(sharded: Any) -> Topology | None:
        if plan.total == plan.size:
            return None
        return Topology.random(plan, {name: sharded.parts[name].rows for name in shapes}, settings.run.seed, sharded.ranks)

    parts = training.Ingredients(model, topology, Tokens(), Tokens(), settings.training.validation_sequences, CONTEXT, None, "spdf")
    job = Job("pretrain", settings.model_dump(mode="json"), {}, str(folder), "me")
    quiet = Console(open("/dev/null", "w"))  # noqa: SIM115
    return training.assemble(job, settings, LocalRun(quiet), parts)


def snapshot(t: training.Training) -> dict[str, Any]:
    """Everything that must be equal at any world size: whole weights, moments, masks, as tensors."""
    from raysparse.sparsity.topology import pack
    from raysparse.train.optimizer import moments

    result = {f"model/{name}": t.sharded.whole(name, part.local.detach()) for name, part in t.sharded.parts.items()}
    for which in ("exp_avg", "exp_avg_sq"):
        for name, value in moments(t.sharded, t.optimizer, which).items():
            result[f"{which}/{name}"] = t.sharded.whole(name, value)
    if t.topology is not None:
        result |= {f"mask/{name}": t.sharded.whole(name, pack(mask)) for name, mask in t.topology.masks.items()}
        result["digest"] = t.topology.digest(t.sharded.ranks)
    return result


def run(folder: str, sections: dict[str, Any], sparsity: dict[str, Any], stop: int | None = None) -> dict[str, Any]:
    """Train to the end; returns the snapshot, the losses and the gradient norms of the run."""
    settings = config(**sections)
    t, state = assemble(Path(folder), settings, SparsityConfig.check(sparsity))
    state = train(t, state)
    return snapshot(t) | {"state": asdict(state), "nnz": dict(t.nnz)}
