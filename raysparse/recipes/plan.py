"""What a run will be, before it is: layers, live weights, FLOPs, memory and bytes on the wire. Trains nothing, downloads nothing."""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from math import prod
from typing import Any

import torch

from raysparse.models.build import blocks, skeleton
from raysparse.models.multiplied import flops_architecture
from raysparse.recipes import training
from raysparse.recipes.masks import nnz_of_bits
from raysparse.recipes.pretrain import PretrainConfig, agenda_of, given_masks
from raysparse.sparsity.agenda import Agenda
from raysparse.sparsity.flops import Architecture, Convention, Ledger, growth_flops, training_flops
from raysparse.sparsity.plan import SparsityPlan
from raysparse.train.exchange import WORTH
from raysparse.train.placement import largest_share
from raysparse.train.run import resolve_device, resolve_dtype


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. The first four are exact; the others are estimates (`estimate_memory`)."""

    weights: int
    gradients: int
    moments: int
    masks: int
    update: int
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
    agenda = agenda_of(config, model, nnz_of_bits(given_masks(config, model)))
    sparsest, arch = sparsest_plan(agenda), flops_architecture(model)
    pace = training.pace(config, agenda.tokens_per_step, None)
    ledger = count_flops(agenda, arch, context, config.flops.convention)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    dtype = resolve_dtype(config.run, resolve_device(config.run))
    memory = estimate_memory(config, model, agenda, dtype)
    return {
        "verb": "pretrain",
        "config": config.model_dump(mode="json"),
        "config_digest": config.digest(),
        "model": {"class": type(model).__name__, "parameters": sum(sizes.values()), "vocabulary": arch.vocab},
        "sparsity": {
            "target": config.sparsity.target,
            "actual": sparsest.sparsity,
            "of_model": (sparsest.size - sparsest.total) / sum(sizes.values()),
            "nnz": sparsest.total,
            "total": sparsest.size,
            "layers": [
                {"name": name, "shape": list(shape), "nnz": sparsest.nnz[name], "density": sparsest.nnz[name] / prod(shape)}
                for name, shape in sparsest.shapes.items()
            ],
        },
        "phases": [
            {
                "name": span.phase.name,
                "steps": [span.first, span.end],
                "evolution": span.rule.type,
                "updates": len(span.updates),
                "attention": span.phase.attention.type,
                "attention_density": span.phase.attention.mean_density(context, arch.layers, arch.heads),
            }
            for span in agenda.spans
        ],
        "density": densities(agenda),
        "mean_density": mean_density(agenda),
        "mean_attention_density": training.mean_attention_density(agenda, arch, context, agenda.steps),
        "updates": len(agenda.update_steps),
        "flops": ledger.savings().to_dict() | {"reduction_head_excluded": reduction_head_excluded(agenda, arch, config)},
        "steps": pace.steps,
        "warmup_steps": pace.warmup,
        "tokens": pace.steps * agenda.tokens_per_step,
        "tokens_per_step": agenda.tokens_per_step,
        "workers": config.run.sizes[0],
        "memory_bytes_per_rank": vars(memory) | {"total": memory.total},
        "bytes_sent_per_rank_and_step": estimate_bytes_sent(config, model, dtype),
        "packed_bytes_sent_per_rank_and_step": estimate_bytes_sent(config, model, dtype, agenda),
    }


def sparsest_plan(agenda: Agenda) -> SparsityPlan:
    """The plan of the first version with the fewest live weights; of all versions the one that decides what zeros can save."""
    if not agenda.sparsity.wants_masks:
        return SparsityPlan(agenda.shapes, {name: prod(shape) for name, shape in agenda.shapes.items()})
    version = min(range(len(agenda.update_steps) + 1), key=lambda v: sum(agenda.plan(v).values()))
    return SparsityPlan(agenda.shapes, agenda.plan(version))


def segments(agenda: Agenda) -> list[tuple[int, int, int]]:
    """(first step, end, version) of the spans in which neither masks nor phase change; an update's own step runs before it."""
    masks = agenda.update_steps if agenda.sparsity.wants_masks else []
    ends = sorted({*(step + 1 for step in masks), *(span.end for span in agenda.spans)})
    return [(first, end, agenda.version(first) if masks else 0) for first, end in zip([0, *ends], ends, strict=False)]


def densities(agenda: Agenda) -> list[tuple[int, float]]:
    """(step, live share of the sparse weights from it on) wherever it changes."""
    size = sum(map(prod, agenda.shapes.values()))
    found: list[tuple[int, float]] = []
    for first, _, version in segments(agenda):
        density = sum(agenda.plan(version).values()) / size if agenda.sparsity.wants_masks else 1.0
        if not found or found[-1][1] != density:
            found.append((first, density))
    return found


def mean_density(agenda: Agenda) -> float:
    """Live share of the sparse weights, over the steps of the run."""
    points = [*densities(agenda), (agenda.steps, 0.0)]
    return sum((after - step) * density for (step, density), (after, _) in pairwise(points)) / agenda.steps


def count_flops(agenda: Agenda, arch: Architecture, context: int, convention: Convention) -> Ledger:
    """FLOPs of the whole run, as the loop will add them up: each span at its own live weights and attention."""
    ledger = Ledger(convention)
    dense = training_flops(arch, 1.0, agenda.tokens_per_step, context, convention)
    attention = [span.phase.attention.mean_density(context, arch.layers, arch.heads) for span in agenda.spans]
    places = {id(span): density for span, density in zip(agenda.spans, attention, strict=True)}
    for first, end, version in segments(agenda):
        live = agenda.plan(version) if agenda.sparsity.wants_masks else {}
        span = agenda.span(first)
        counted = training_flops(arch, live, agenda.tokens_per_step, context, convention, places[id(span)])
        last = end - 1  # the step of an update, if there is one
        reads = agenda.sparsity.wants_masks and agenda.is_update(last) and span.rule.grows_by_gradient
        growth = growth_flops(arch, live, agenda.tokens_per_step, context, convention) if reads else None
        ledger.add(counted * (end - first), dense * (end - first), growth)
    return ledger


def reduction_head_excluded(agenda: Agenda, arch: Architecture, config: PretrainConfig) -> float:
    """Dense / counted FLOPs of the blocks alone, were the head dense: what the same target saves on what every convention counts."""
    shapes = {name: shape for name, shape in agenda.shapes.items() if name != arch.head}
    nnz = {name: count for name, count in agenda.nnz.items() if name != arch.head}
    values = agenda.model_dump() | {"shapes": shapes, "nnz": nnz}
    levels = agenda.sparsity.layers.items()
    values["sparsity"]["layers"] = {key: level for key, level in levels if any(fnmatchcase(name, key) for name in shapes)}
    blocks_only = Agenda.check(values)
    return count_flops(blocks_only, arch, config.data.context, config.flops.convention).savings().reduction_without_head


def estimate_memory(config: PretrainConfig, model: Any, agenda: Agenda, dtype: torch.dtype) -> Memory:
    """Bytes on one rank in a step.

    Weights, gradients and both moments (of live weights alone unless ``optimizer.state`` is dense) are float32, masks 1 byte a weight
    while training (1 bit at rest), twice where the topology evolves, all spread over the shards. An update takes 31 bytes a sparse weight
    more at its peak (measured), for scores and keys.
    Gathered: what FSDP2 holds whole at a time, the root's weights and two blocks. Activations follow 34 T b d bytes a block in 16
    bits with fused attention (Korthikanti et al. 2022, arXiv:2205.05198, table 2, without the 5 a T^2 b of unfused scores), twice
    that in 32 bits, plus three float32 copies of the logits.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total, width = sum(sizes.values()), dtype.itemsize
    units = [sum(p.numel() for p in unit.parameters()) for unit in blocks(model).values()]
    workers = config.run.sizes[0]
    shards = workers // config.sharding.replicas if config.sharding.type == "fsdp2" else 1
    owners = workers if config.sharding.type == "fairscale" else shards
    sharded = config.sharding.type == "fsdp2" and workers > 1
    gathered = (total - sum(units) + 2 * max(units)) * width if sharded else 0
    rows = min(config.training.micro, largest_share(config.training.sequences, workers))
    tokens = rows * config.data.context
    block = 34 * tokens * model.config.hidden_size * width // 2
    kept = 2 * width * tokens * model.config.hidden_size
    blocks_now = kept * len(units) + block if config.training.activation_checkpointing else block * len(units)
    live = agenda.sparsity.wants_masks and config.optimizer.keeps_live(agenda)
    plans = [sum(agenda.plan(version).values()) for version in range(len(agenda.update_steps) + 1)] if live else []
    never_live = sum(map(prod, agenda.shapes.values())) - max(plans) if live else 0
    return Memory(
        weights=4 * total // shards,
        gradients=4 * total // owners,
        moments=8 * (total - never_live) // owners,
        masks=sum(map(prod, agenda.shapes.values())) * agenda.sparsity.wants_masks * (2 if agenda.update_steps else 1) // shards,
        update=31 * sum(map(prod, agenda.shapes.values())) * bool(agenda.update_steps) // shards,
        gathered=gathered,
        activations=blocks_now + 3 * 4 * tokens * model.config.vocab_size,
    )


def estimate_bytes_sent(config: PretrainConfig, model: Any, dtype: torch.dtype, packed: Agenda | None = None) -> int:
    """Payload that one rank sends in a step, counted as `train.exchange.Wire` counts it.

    FSDP2 on S shards: (S - 1) / S of every weight in each all-gather (twice a micro-batch for blocks that are freed after the
    forward pass) and of every float32 gradient in the reduce-scatter; HSDP adds an all-reduce of the shard over R replicas.

    Args:
        packed: of live elements alone, at the run's mean density, where FSDP2 sends them so; ranks that share them unequally, and
            steps whose dead gradients are looked at, send more.
    """
    density = mean_density(packed) if packed is not None and packed.sparsity.wants_masks and config.sharding.packed != "off" else 1.0
    sparse = set(packed.shapes) if packed is not None and config.sharding.type == "fsdp2" else set()
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def elements(parameters: list[Any]) -> int:
        whole = sum(p.numel() for p in parameters)
        live = sum(p.numel() * (density if names[id(p)] in sparse else 1.0) for p in parameters)
        return round(live) if live <= WORTH * whole else whole

    units = [list(unit.parameters()) for unit in blocks(model).values()]
    in_units = {id(p) for unit in units for p in unit}
    in_blocks = sum(map(elements, units))
    total = in_blocks + elements([p for p in model.parameters() if id(p) not in in_units])
    workers, replicas = config.run.sizes[0], config.sharding.replicas
    if config.sharding.type != "fsdp2":
        return 2 * 4 * total * (workers - 1) // workers
    shards = workers // replicas
    micro_batches = -(-largest_share(config.training.sequences, workers) // config.training.micro)
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
    if len(facts["phases"]) > 1 or facts["updates"]:
        lines += ["", *_timeline(facts)]
    lines += [
        "",
        f"model          {facts['model']['class']}, {facts['model']['parameters']:,} parameters",
        f"sparse weights {sparsity['nnz']:,} live of {sparsity['total']:,}: sparsity {sparsity['actual']:.4f}, "
        f"{sparsity['of_model']:.4f} of the whole model",
        f"length         {facts['steps']:,} steps x {facts['tokens_per_step']:,} tokens = {facts['tokens']:,} tokens; "
        f"warm-up {facts['warmup_steps']:,} steps",
        f"training FLOPs {flops['counted']:.4g} counted, {flops['dense']:.4g} dense: {flops['reduction']:.2f}x fewer, "
        f"{flops['reduction_head_excluded']:.2f}x with the head excluded, neither sparse nor counted (convention {flops['convention']})",
        *_growth(facts),
        "               counted = if every zero were skipped; what a machine skips, it measures when the run starts (kernels=auto)",
        f"per rank       of {facts['workers']} workers{', the fewest' if config.run.elastic else ''}, estimated:",
        *(f"  {key:<13}{value / 2**20:>12,.1f} MiB" for key, value in facts["memory_bytes_per_rank"].items()),
        f"  sent a step {facts['bytes_sent_per_rank_and_step'] / 2**20:>13,.1f} MiB",
        f"  or packed   {facts['packed_bytes_sent_per_rank_and_step'] / 2**20:>13,.1f} MiB, live elements alone (sharding.packed)",
    ]
    return "\n".join(lines)


def _growth(facts: Mapping[str, Any]) -> list[str]:
    flops = facts["flops"]
    if not flops["updates"]:
        return []
    return [f"               {flops['reduction_with_updates']:.2f}x with the dense gradients of {facts['updates']:,} updates counted"]


def _timeline(facts: Mapping[str, Any], width: int = 60, height: int = 8) -> list[str]:
    """The phases as a table, and the density over the run as a plot of characters."""
    lines = [f"{'phase':<24} {'steps':>21} {'rule':<9} {'updates':>7}  attention"]
    for phase in facts["phases"]:
        steps = f"{phase['steps'][0]:,} to {phase['steps'][1]:,}"
        attention = f"{phase['attention']} ({phase['attention_density']:.3f} of full)"
        lines.append(f"{phase['name']:<24} {steps:>21} {phase['evolution']:<9} {phase['updates']:>7,}  {attention}")
    points, steps = facts["density"], facts["steps"]
    starts = [step for step, _ in points]
    columns = [points[bisect_right(starts, round(i * (steps - 1) / (width - 1))) - 1][1] for i in range(width)]
    lines += ["", f"density of the sparse weights over the run, {facts['mean_density']:.4f} in the mean:"]
    for row in range(height, 0, -1):
        eighths = [min(8, max(0, round(8 * (density * height - row + 1)))) for density in columns]
        label = f"{row / height:>5.2f} " if row in (height, height // 2) else " " * 6
        lines.append(f"{label}|{''.join(_BARS[n] for n in eighths)}")
    return [*lines, f" 0.00 +{'-' * width}", f"       0{f'{steps:,} steps':>{width - 1}}"]


_BARS = " ▁▂▃▄▅▆▇█"
"""A column's eighths."""
