"""A small GPT trained for a few steps on made-up tokens, through the product's own assembly: what distributed tests run."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from raysparse.data.batch import IGNORED, Batch, Feed
from raysparse.kernels.bits import pack, unpack
from raysparse.models.adapters import AnyAdapters
from raysparse.models.build import select
from raysparse.models.hub_config import ANY_KIND, kind_of
from raysparse.recipes import training
from raysparse.recipes.job import Job
from raysparse.sparsity.agenda import Agenda
from raysparse.sparsity.evolve import first_topology
from raysparse.sparsity.plan import SparsityConfig
from raysparse.sparsity.topology import Topology
from raysparse.train.distill import DistillationConfig
from raysparse.train.loop import train
from raysparse.train.metrics import Console
from raysparse.train.optimizer import moments
from raysparse.train.run import LocalRun
from raysparse.train.state import State, Training

CONTEXT = 16
SPARSE = {"target": 0.75}


@dataclass(frozen=True)
class Tokens:
    """Feed of tokens that are a function of (step, row)."""

    vocab: int

    def batch(self, step: int, rows: Sequence[int]) -> Batch:
        ids = torch.stack([self._row(997 * step + row) for row in rows])
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    def _row(self, seed: int) -> torch.Tensor:
        return torch.randint(self.vocab, (CONTEXT + 1,), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Pairs:
    """Feed of an encoder-decoder: sources and targets of lengths that are a function of (step, row), padded with a token of one's own.

    Attributes:
        frames: of audio, which is heard instead of a text; 0 for a text.
    """

    vocab: int
    frames: int = 0
    padding: int = 0

    def batch(self, step: int, rows: Sequence[int]) -> Batch:
        parts = [self._row(997 * step + row) for row in rows]
        return Batch(*(torch.stack(tensors) for tensors in zip(*parts, strict=True)))

    def _row(self, seed: int) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(self.vocab, (CONTEXT + 1,), generator=generator)
        source = torch.randint(self.vocab, (2 * CONTEXT,), generator=generator)
        target, heard = (int(torch.randint(3, size, (), generator=generator)) for size in (CONTEXT, 2 * CONTEXT))
        labels = ids[1:].clone()
        labels[target:], ids[target:], source[heard:] = IGNORED, self.padding, self.padding
        if self.frames:
            return ids[:-1].contiguous(), labels, torch.randn(8, self.frames, generator=generator)
        return ids[:-1].contiguous(), labels, source, torch.arange(2 * CONTEXT) < heard


ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "t5": {"preset": "t5-small", "overrides": {"d_model": 40, "d_kv": 8, "d_ff": 96, "num_layers": 2, "num_heads": 5, "vocab_size": 101}},
    "whisper": {
        "preset": "whisper-tiny",
        "overrides": {
            "d_model": 40,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 5,
            "decoder_attention_heads": 5,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "num_mel_bins": 8,
            "max_source_positions": 10,
            "vocab_size": 101,
            "pad_token_id": 0,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "decoder_start_token_id": 0,
        },
    },
}
"""Sections `model`."""


def config(**sections: Any) -> training.TrainingRunConfig:
    """A GPT-2 of width 40: weights of 101, 120, 40 and 160 rows. `sections` are merged over it, one level deep."""
    values: dict[str, Any] = {
        "run": {"name": "steps", "seed": 3},
        "model": {"preset": "debug", "overrides": {"n_embd": 40, "n_head": 5, "n_layer": 2, "vocab_size": 101}},
        "optimizer": {"lr": 1e-2, "clip_norm": 0.05, "weight_decay": 0.1},
        "schedule": {"warmup": 4},
        "training": {"length": 24, "sequences": 6, "micro": 3, "validate_every": 12, "validation_sequences": 5},
        "checkpoint": {"every": "0 steps"},
        "logging": {"every": 1, "tensorboard": False},
        "kernels": "dense",  # auto is a measurement: two runs may round differently
    }
    for name, section in sections.items():
        values[name] = values[name] | section if isinstance(section, dict) and name in values else section
    return training.TrainingRunConfig.check(values)


def assemble(folder: str | Path, sections: dict[str, Any], sparsity: dict[str, Any]) -> tuple[Training, State]:
    """The product's assembly on this rank; goes on from the newest checkpoint in the folder.

    `sections` may have `adapters`, `quantization`, and `distillation`, whose teacher is a model of another seed.
    """
    adapters = TypeAdapter(AnyAdapters).validate_python(sections.get("adapters", {"type": "none"}))
    taught = DistillationConfig.check({"teacher": "seed 4"} | sections["distillation"]) if "distillation" in sections else None
    quantization = sections.get("quantization", "none")
    sections = {name: section for name, section in sections.items() if name not in ("adapters", "distillation", "quantization")}
    settings, sparse, folder = config(**sections), SparsityConfig.check(sparsity), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "claim").write_text("me")
    run = LocalRun(Console((folder / "console.txt").open("a")))
    model = training.first_builds(run, settings.model, settings.run.seed, None, CONTEXT, ANY_KIND)
    whole = dict(model.named_parameters())
    agenda = Agenda(
        sparsity=sparse,
        shapes={name: tuple(whole[name].shape) for name in select(model, sparse.include, sparse.exclude)},
        steps=int(settings.training.length.split()[0]),
        tokens_per_step=settings.training.sequences * CONTEXT,
        seed=settings.run.seed,
    )

    def topology(sharded: Any) -> Topology:
        rows = {name: sharded.parts[name].rows for name in agenda.shapes}
        return first_topology(agenda, rows, sharded.local, sharded.ranks)

    vocab, kind = settings.model.overrides["vocab_size"], kind_of(model.config)
    frames = 2 * getattr(model.config, "max_source_positions", 0)
    tokens: Feed = Tokens(vocab) if kind == "causal" else Pairs(vocab, frames)
    parts = training.Ingredients(
        model=model,
        sparse=agenda.shapes,
        target=sparse.target,
        agenda=agenda,
        topology=topology if sparse.wants_masks else None,
        feed=tokens,
        validation=tokens,
        num_validation=settings.training.validation_sequences,
        tokens_per_sequence=CONTEXT,
        steps_per_epoch=None,
        convention="spdf",
        adapters=adapters,
        quantization=quantization,
        distillation=taught,
        teacher=taught and training.first_builds(run, settings.model, 4, None, CONTEXT, ANY_KIND),
    )
    job = Job("pretrain", settings.model_dump(mode="json"), {}, str(folder), "me")
    return training.assemble(job, settings, run, parts)


def masks_of(t: Training) -> dict[str, torch.Tensor]:
    """This rank's rows of the masks of a sparse run."""
    assert t.topology is not None
    return t.topology.masks


def snapshot(t: Training) -> dict[str, Any]:
    """What must not depend on the number of ranks: whole weights, moments and masks as tensors, and the mask digest."""
    result: dict[str, Any] = {f"model/{name}": t.sharded.whole(name, part.local.detach()) for name, part in t.sharded.parts.items()}
    for which in ("exp_avg", "exp_avg_sq"):
        for name, value in moments(t.sharded, t.optimizer, which).items():
            if t.topology is not None and name in t.topology.masks and value.ndim == 1:
                value = t.topology.live(name).put(value)
            result[f"{which}/{name}"] = t.sharded.whole(name, value)
    if t.topology is not None:
        result |= {f"mask/{name}": t.sharded.whole(name, pack(mask)) for name, mask in t.topology.masks.items()}
        result["digest"] = t.topology.digest(t.sharded.ranks)
    return result


class Died(Exception):
    """The end of a process that did not finish its run."""


def run(folder: str | Path, sections: dict[str, Any], sparsity: dict[str, Any], die_in: int = 0) -> dict[str, Any]:
    """Train to the end, or to the middle of step `die_in`; returns `snapshot`, the state, and what the run's steps were.

    ``history`` is rank 0's [(step, loss, gradient norm), ...] of the whole run, earlier processes included.
    """
    t, state = assemble(folder, sections, sparsity)

    def die(*_: Any) -> None:
        if state.step + 1 == die_in:
            t.checkpointer.wait()
            raise Died

    t.optimizer.register_step_pre_hook(die)
    try:
        state = train(t, state)
    except Died:
        return {"state": asdict(state)}
    return snapshot(t) | {"state": asdict(state), "nnz": dict(t.nnz), "history": history(folder), "sent": t.sharded.wire.bytes_sent}


def run_with_hash_seed(seed: int, folder: Path, sections: dict[str, Any], sparsity: dict[str, Any]) -> dict[str, Any]:
    """`run` in a process of its own whose PYTHONHASHSEED is `seed`; those of `spawn` share a random one."""
    script = (
        "import pickle, sys, torch; from raysparse.train.process import process_group; from tests.train.steps import run\n"
        f"torch.set_num_threads(1)\nwith process_group('cpu'): result = run({str(folder)!r}, {sections!r}, {sparsity!r})\n"
        "sys.stdout.buffer.write(pickle.dumps(result))"
    )
    environment = os.environ | {"PYTHONHASHSEED": str(seed)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, check=True, timeout=240)
    return pickle.loads(done.stdout)


def history(folder: str | Path) -> list[tuple[int, float, float]]:
    records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records if "loss" in r]


def dead(result: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Name -> [rows, cols] bool, True = dead, of a snapshot."""
    names = [key.removeprefix("mask/") for key in result if key.startswith("mask/")]
    return {name: ~unpack(result[f"mask/{name}"], result[f"model/{name}"].shape[1]) for name in names}


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Keys of tensors that are not bit-equal, and of losses, norms and digests that are not equal."""
    keys = [key for key in a if isinstance(a[key], torch.Tensor)]
    assert len(keys) > 10
    assert keys == [key for key in b if isinstance(b[key], torch.Tensor)]
    found = [key for key in keys if not torch.equal(a[key], b[key])]
    return found + [key for key in ("digest", "history", "nnz") if a.get(key) != b.get(key)]
