"""What a run will be, before it is: layers, live weights, FLOPs, memory and bytes on the wire. Trains nothing, downloads nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from raysparse.models.build import blocks, flops_architecture, skeleton
from raysparse.recipes import training
from raysparse.recipes.pretrain import PretrainConfig, plan_of
from raysparse.sparsity.flops import savings
from raysparse.sparsity.plan import SparsityPlan
from raysparse.train.run import resolve_device, resolve_dtype


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. The first four are exact; activations are an estimate (`estimate_memory`)."""

    weights: int
    gradients: int
    moments: int
    masks: int
    gathered: int
    activations: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def plan(config: PretrainConfig) -> dict[str, Any]:
    """The facts of a pre-training run as plain data; what ``raysparse plan --json`` prints.

    Raises:
        ConfigError: everything that `pretrain` would refuse, save what only reading the data shows.
    """
    training.check_sizes(config)
    context = config.data.context
    model = skeleton(config.model, getattr(config.data.tokenizer, "vocab_size", None), context)
    sparse, arch = plan_of(config, model), flops_architecture(model)
    tokens_per_step = config.training.sequences * context
    pace = training.pace(config, tokens_per_step, None)
    saved = savings(arch, sparse.nnz, pace.steps * tokens_per_step, context, config.flops.convention)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    dtype = resolve_dtype(config.run, resolve_device(config.run))
    memory = estimate_memory(config, model, sparse, dtype)
    return {
        "verb": "pretrain",
        "config": config.model_dump(mode="json"),
        "config_digest": config.digest(),
        "model": {"class": type(model).__name__, "parameters": sum(sizes.values()), "vocabulary": arch.vocab},
        "sparsity": {
            "target": config.sparsity.target,
            "actual": sparse.sparsity,
            "of_model": (sparse.size - sparse.total) / sum(sizes.values()),
            "nnz": sparse.total,
            "total": sparse.size,
            "layers": [
                {"name": name, "shape": list(shape), "nnz": sparse.nnz[name], "density": sparse.nnz[name] / prod(shape)}
                for name, shape in sparse.shapes.items()
            ],
        },
        "flops": saved.to_dict(),
        "steps": pace.steps,
        "warmup_steps": pace.warmup,
        "tokens": pace.steps * tokens_per_step,
        "tokens_per_step": tokens_per_step,
        "workers": config.run.workers,
        "memory_bytes_per_rank": vars(memory) | {"total": memory.total},
        "bytes_sent_per_rank_and_step": estimate_bytes_sent(config, model, dtype),
    }


def estimate_memory(config: PretrainConfig, model: Any, sparse: SparsityPlan, dtype: torch.dtype) -> Memory:
    """Bytes on one rank in a step.

    Weights, gradients and both moments are float32, masks 1 byte a weight while training (1 bit at rest), all spread over the
    shards. Gathered: what FSDP2 holds whole at a time, the root's weights and two blocks. Activations follow
    34 T b d bytes a block in 16 bits with fused attention (Korthikanti et al. 2022, arXiv:2205.05198, table 2, without the
    5 a T^2 b of unfused scores), twice that in 32 bits, plus three float32 copies of the logits.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total, width = sum(sizes.values()), dtype.itemsize
    units = [sum(p.numel() for p in unit.parameters()) for unit in blocks(model).values()]
    shards = config.run.workers // config.sharding.replicas if config.sharding.type == "fsdp2" else 1
    owners = config.run.workers if config.sharding.type == "fairscale" else shards
    sharded = config.sharding.type == "fsdp2" and config.run.workers > 1
    gathered = (total - sum(units) + 2 * max(units)) * width if sharded else 0
    rows = min(config.training.micro, config.training.sequences // config.run.workers)
    tokens = rows * config.data.context
    block = 34 * tokens * model.config.hidden_size * width // 2
    kept = 2 * width * tokens * model.config.hidden_size
    blocks_now = kept * len(units) + block if config.training.activation_checkpointing else block * len(units)
    return Memory(
        weights=4 * total // shards,
        gradients=4 * total // owners,
        moments=8 * total // owners,
        masks=(sparse.size if sparse.total < sparse.size else 0) // shards,
        gathered=gathered,
        activations=blocks_now + 3 * 4 * tokens * model.config.vocab_size,
    )


def estimate_bytes_sent(config: PretrainConfig, model: Any, dtype: torch.dtype) -> int:
    """Payload that one rank sends in a step, counted as `train.shard.Wire` counts it.

    FSDP2 on S shards: (S - 1) / S of every weight in each all-gather (twice a micro-batch for blocks that are freed after the
    forward pass) and of every float32 gradient in the reduce-scatter; HSDP adds an all-reduce of the shard over R replicas.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    in_blocks = sum(p.numel() for unit in blocks(model).values() for p in unit.parameters())
    workers, replicas = config.run.workers, config.sharding.replicas
    if config.sharding.type != "fsdp2":
        return 2 * 4 * total * (workers - 1) // workers
    shards = workers // replicas
    share = config.training.sequences // workers
    micro_batches = -(-share // config.training.micro)
    gathers = (total + (in_blocks if config.sharding.reshard_after_forward else 0)) * dtype.itemsize * micro_batches
    reduced = 4 * total
    return (gathers + reduced) * (shards - 1) // shards + 2 * (reduced // shards) * (replicas - 1) // replicas


def show(facts: Mapping[str, Any], config: PretrainConfig) -> str:
    """The facts as a page of text."""
    lines = ["# The resolved config", config.to_yaml()]
    sparsity, flops = facts["sparsity"], facts["flops"]
    width = max([len(layer["name"]) for layer in sparsity["layers"]] + [5])
    lines += [f"{'layer':<{width}} {'shape':>15} {'density':>9} {'nnz':>14}"]
    for layer in sparsity["layers"]:
        shape = " x ".join(map(str, layer["shape"]))
        lines.append(f"{layer['name']:<{width}} {shape:>15} {layer['density']:>9.4f} {layer['nnz']:>14,}")
    lines += [
        "",
        f"model          {facts['model']['class']}, {facts['model']['parameters']:,} parameters",
        f"sparse weights {sparsity['nnz']:,} live of {sparsity['total']:,}: sparsity {sparsity['actual']:.4f}, "
        f"{sparsity['of_model']:.4f} of the whole model",
        f"length         {facts['steps']:,} steps x {facts['tokens_per_step']:,} tokens = {facts['tokens']:,} tokens; "
        f"warm-up {facts['warmup_steps']:,} steps",
        f"training FLOPs {flops['counted']:.4g} counted, {flops['dense']:.4g} dense: {flops['reduction']:.2f}x fewer, "
        f"{flops['reduction_without_head']:.2f}x without the head (convention {flops['convention']})",
        "               counted = if every zero were skipped; dense kernels skip none",
        f"per rank       of {facts['workers']} workers, estimated:",
        *(f"  {key:<13}{value / 2**20:>12,.1f} MiB" for key, value in facts["memory_bytes_per_rank"].items()),
        f"  sent a step {facts['bytes_sent_per_rank_and_step'] / 2**20:>13,.1f} MiB",
    ]
    return "\n".join(lines)
