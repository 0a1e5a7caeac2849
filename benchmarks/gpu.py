"""What zeros save on a GPU, and what they do not: layers, whole steps, attention, the optimizer, a real config's first steps.

    python -m benchmarks.gpu --out benchmarks/results        one H200, no Ray, no network; meant to fit 10 minutes
    python -m benchmarks.gpu --quick                          toy sizes, also without a GPU; the numbers mean nothing

Contestants of a table take turns in one process; milliseconds are wall times between synchronisations. A section that fails, or runs out
of its time, says so in its place. Exit status 1 if a section failed or a goal is missed.
"""

import argparse
import gc
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.measure import Ratio, interleave, table, write
from benchmarks.step import Size, assemble, bare, product
from raysparse.config import load
from raysparse.kernels.bits import pack
from raysparse.kernels.linear import SPARSE, adopt
from raysparse.models.attention import HybridAttention
from raysparse.models.build import ModelConfig, architecture, build, skeleton
from raysparse.recipes.plan import plan
from raysparse.recipes.pretrain import PretrainConfig
from raysparse.sparsity.attention import AnyAttention, Full, Local
from raysparse.sparsity.plan import SparsityConfig
from raysparse.sparsity.ranks import ALONE
from raysparse.sparsity.select import top_masks
from raysparse.train.process import forget_peak_memory, peak_memory_bytes, process_group
from raysparse.train.run import RunConfig, resolve_device

CONFIG = Path(__file__).parents[1] / "configs" / "pretrain" / "spdf_gpt3_xl.yaml"


class Layer(NamedTuple):
    name: str
    into: int
    out: int


@dataclass(frozen=True)
class Scale:
    """Sizes of everything.

    Attributes:
        tokens: rows of a layer's input.
        steps: models of the whole steps.
        attention: (layers, width, heads, sequences, tokens) of the model whose attention is timed.
        weights: of the optimizer and the selection.
    """

    tokens: int
    layers: tuple[Layer, ...]
    steps: tuple[Size, ...]
    attention: tuple[int, int, int, int, int]
    weights: int
    rounds: int


H200 = Scale(
    tokens=16384,
    layers=(Layer("GPT-3 XL, up", 2048, 8192), Layer("GPT-3 XL, down", 8192, 2048), Layer("GPT-2 Small, up", 768, 3072)),
    steps=(Size(12, 768, 50257, 1024), Size(8, 2048, 50257, 2048)),
    attention=(4, 2048, 16, 2, 8192),
    weights=1 << 28,
    rounds=11,
)
TOY = Scale(
    tokens=256,
    layers=(Layer("toy", 256, 512),),
    steps=(Size(1, 256, 256, 64),),
    attention=(1, 64, 2, 1, 256),
    weights=1 << 16,
    rounds=3,
)
SPARSITIES = (0.5, 0.75, 0.9)
GOALS = {  # (section, contestant, over) -> at least
    ("GPT-3 XL, up", "dense", "block 128, 75 %"): 2.5,
    ("step 2048", "dense", "block 128, 75 %"): 1.5,
    ("step 2048", "dense", "unstructured, 75 %"): 0.99,
    ("step 768", "dense", "unstructured, 75 %"): 0.99,
    ("step 768", "bare, compiled", "dense"): 0.95,
    ("step 2048", "bare, compiled", "dense"): 0.95,
    ("attention", "full", "local, 1/8 of the row"): 1.5,
}


@dataclass(frozen=True)
class Bench:
    scale: Scale
    device: torch.device
    folder: Path

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and products."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def clock(self) -> float:
        self.wait()
        return time.perf_counter()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def turns(self, contestants: Mapping[str, Callable[[int], Any]]) -> dict[str, list[float]]:
        """Seconds of each in each round."""
        return interleave(contestants, self.scale.rounds, warmup=3, clock=self.clock)

    def random(self, *shape: int, seed: int = 0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(self.dtype)


def timed(section: str, times: Mapping[str, Sequence[float]], baseline: str, **more: Any) -> dict[str, Any]:
    """A table of contestants, with the ratios of the baseline to each and the goals of the section."""
    goals = [
        {"what": f"{above} / {below}", "at_least": least, "ratio": Ratio.of(times[above], times[below])}
        for (where, above, below), least in GOALS.items()
        if where == section and {above, below} <= times.keys()
    ]
    ratios = {name: Ratio.of(times[baseline], values) for name, values in times.items()}
    return {"section": section, "baseline": baseline, "seconds": times, "ratios": ratios, "goals": goals} | more


def ceilings(b: Bench) -> Iterator[dict[str, Any]]:
    """What the device gives: copies and dense products."""
    side = 8192 if b.device.type == "cuda" else 256
    one, other = b.random(side, side), b.random(side, side, seed=1)
    source = torch.empty(b.scale.weights, dtype=torch.float32, device=b.device)
    target = torch.empty_like(source)
    times = b.turns({f"product {side}": lambda _: one @ other, "copy": lambda _: target.copy_(source)})
    flops = 2 * side**3 / median(times[f"product {side}"])
    yield timed("ceilings", times, "copy", tflops=flops / 1e12, tb_per_s=2 * source.nbytes / median(times["copy"]) / 1e12)


def blocks_of(layer: Layer, size: int, sparsity: float, device: torch.device) -> Tensor:
    """[out, in] bool: equally many live blocks in every row of blocks."""
    rows, cols = layer.out // size, layer.into // size
    live = max(1, round(cols * (1 - sparsity)))
    order = torch.rand(rows, cols, generator=torch.Generator().manual_seed(0)).argsort(1)
    return (order < live).repeat_interleave(size, 0).repeat_interleave(size, 1).to(device)


def layers(b: Bench) -> Iterator[dict[str, Any]]:
    """Forward and backward of single layers through autograd, at equal tokens."""
    for layer in b.scale.layers:
        x, dy = b.random(b.scale.tokens, layer.into).requires_grad_(), b.random(b.scale.tokens, layer.out, seed=1)

        def both(linear: nn.Linear, x: Tensor = x, dy: Tensor = dy) -> Callable[[int], None]:
            def run(index: int) -> None:
                x.grad = linear.weight.grad = linear.bias.grad = None
                linear(x).backward(dy)

            return run

        def made(mask: Tensor | None, size: int | None, layer: Layer = layer) -> nn.Linear:
            linear = nn.Linear(layer.into, layer.out, device=b.device, dtype=b.dtype)
            if mask is None:
                return linear
            with torch.no_grad():
                linear.weight.masked_fill_(~mask, 0.0)
            sparse = adopt(linear)
            if size is not None:
                sparse.sparsify(pack(mask), b.dtype, SPARSE, size)
            return sparse

        contestants = {"dense": both(made(None, None))}
        loose = torch.rand(layer.out, layer.into, generator=torch.Generator().manual_seed(0)).to(b.device) < 0.25
        contestants["unstructured, 75 %"] = both(made(loose, None))
        for size in (32, 64, 128):
            for sparsity in SPARSITIES if size > 32 else (0.75,):
                mask = blocks_of(layer, size, sparsity, b.device)
                contestants[f"block {size}, {sparsity:.0%}".replace("%", " %")] = both(made(mask, size))
        flops = 6 * b.scale.tokens * layer.into * layer.out
        times = b.turns(contestants)
        yield timed(layer.name, times, "dense", tflops=flops / median(times["dense"]) / 1e12)


def whole_steps(b: Bench) -> Iterator[dict[str, Any]]:
    """A training step as the product takes it, compiled, against a bare compiled transformers GPT-2 with torch's fused AdamW."""
    patterns = {"unstructured": {"type": "unstructured"}} | {f"block {n}": {"type": "block", "size": n} for n in (64, 128)}
    masks: dict[str, SparsityConfig | None] = {"dense": None}
    masks |= {f"{name}, 75 %": SparsityConfig.check({"target": 0.75, "pattern": given}) for name, given in patterns.items()}
    for size in b.scale.steps:
        contestants: dict[str, Callable[[int], None]] = {}
        memory: dict[str, int] = {}
        for name in ("bare, compiled", *masks):
            gc.collect()
            forget_peak_memory()
            before = peak_memory_bytes()
            contestants[name] = ours(b, size, name, masks[name]) if name in masks else theirs(b, size)
            contestants[name](0)  # compiled
            contestants[name](1)
            memory[name] = peak_memory_bytes() - before
        times = b.turns(contestants)
        tokens, parameters = 4 * size.tokens, sum(p.numel() for p in skeleton(size.model, size.vocabulary, size.tokens).parameters())
        facts = {
            "tokens_per_s": tokens / median(times["dense"]),
            "tflops": 6 * parameters * tokens / median(times["dense"]) / 1e12,  # without attention's
            "peak_memory_bytes": memory,
        }
        yield timed(f"step {size.width}", times, "dense", **facts)


def ours(b: Bench, size: Size, name: str, sparse: SparsityConfig | None) -> Callable[[int], None]:
    """A step of the product, of 4 sequences."""
    step = {"sequences": 4, "micro": 4, "compile": b.device.type == "cuda"}
    settings = {"run": {"device": b.device.type}, "kernels": "auto", "training": step}
    return product(assemble(b.folder / f"{size.width}-{name}", size, 0.0, settings=settings, pruned=sparse))


def theirs(b: Bench, size: Size) -> Callable[[int], None]:
    """A step of a bare loop, of 4 sequences."""
    model: Any = build(size.model, 0, size.vocabulary, size.tokens)
    model = model.to(b.device)
    if b.device.type == "cuda":
        model.compile()
    return in_autocast(bare(model, size, sequences=4, device=b.device), b)


def in_autocast(step: Callable[[int], None], b: Bench) -> Callable[[int], None]:
    def run(index: int) -> None:
        with torch.autocast(b.device.type, torch.bfloat16, enabled=b.dtype == torch.bfloat16):
            step(index)

    return run


def attention(b: Bench) -> Iterator[dict[str, Any]]:
    """Forward and backward of a model whose attention is most of its work, by what its queries see; masks change between rounds."""
    layers, width, heads, rows, length = b.scale.attention
    overrides = {"n_layer": layers, "n_embd": width, "n_head": heads}
    model: Any = build(ModelConfig(preset="gpt2-small", overrides=overrides), 0, 256, length)
    model = model.to(b.device, b.dtype)
    hybrid = HybridAttention.install(model, b.device.type)
    ids = torch.zeros(rows, length, dtype=torch.int64, device=b.device)
    seen: dict[str, AnyAttention] = {"full": Full()}
    seen |= {f"local, 1/{part} of the row": Local(width=length // part) for part in (2, 4, 8)}

    def both(pattern: AnyAttention) -> Callable[[int], None]:
        def run(index: int) -> None:
            hybrid.set(pattern)
            model.zero_grad()
            model(input_ids=ids).logits.sum().backward()

        return run

    yield timed("attention", b.turns({name: both(pattern) for name, pattern in seen.items()}), "full")


def optimizer(b: Bench) -> Iterator[dict[str, Any]]:
    """AdamW over one weight: torch's fused one, masked, and with moments of live weights alone."""
    from raysparse.kernels.adamw import AdamW, Masked, TritonAdamW
    from raysparse.kernels.live import Live

    side = int(b.scale.weights**0.5)
    mask = torch.rand(side, side, generator=torch.Generator().manual_seed(0)).to(b.device) < 0.25

    def stepping(kind: Any, live: bool) -> Callable[[int], None]:
        weight = nn.Parameter(torch.randn(side, side, device=b.device))
        made = kind([weight], lr=1e-4, **({} if kind is AdamW else {"fused": True}))
        weight.grad = torch.randn_like(weight)
        if isinstance(made, Masked):
            made.set_masks({weight: Live(mask)})
            shape = (int(mask.sum()),) if live else (side, side)
            zeros = {which: torch.zeros(shape, device=b.device) for which in ("exp_avg", "exp_avg_sq")}
            made.state[weight] = {"step": torch.zeros((), device="cpu"), **zeros}
        return lambda index: made.step()

    kind = TritonAdamW if b.device.type == "cuda" else AdamW
    contestants = {
        "torch, fused": stepping(torch.optim.AdamW, False),
        "masked": stepping(kind, False),
        "live moments, 75 %": stepping(kind, True),
    }
    yield timed("optimizer", b.turns(contestants), "torch, fused", weights=side * side)


def selection(b: Bench) -> Iterator[dict[str, Any]]:
    """The largest quarter of the weights of one tensor, exactly: by radix, by torch's top-k and by a sort."""
    values = torch.randn(b.scale.weights, device=b.device)
    keys = values.abs().view(torch.int32)
    every, count = torch.ones_like(keys, dtype=torch.bool), b.scale.weights // 4
    contestants: dict[str, Callable[[int], Any]] = {
        "radix": lambda _: top_masks(lambda i: [keys], [every], [count], ALONE),
        "top-k": lambda _: keys.topk(count),
        "sort": lambda _: keys.sort(),
    }
    (chosen,) = contestants["radix"](0)
    assert int(chosen.sum()) == count
    assert int(keys[chosen].min()) >= int(keys[~chosen].max())
    yield timed("selection", b.turns(contestants), "radix")


def at_size(b: Bench) -> Iterator[dict[str, Any]]:
    """Ten steps of the GPT-3 XL config on this one device, and what `raysparse plan` says of them."""
    small = {"model.preset": "debug", "model.overrides.vocab_size": 256, "data.context": 64, "training.micro": 2} if b.scale is TOY else {}
    changes = {"run.workers": 1, "training.sequences": 8, "run.device": b.device.type} | small
    config = load(PretrainConfig, [CONFIG], [f"{key}={value}" for key, value in changes.items()])
    predicted = plan(config)
    shape = architecture(config.model, context=config.data.context)
    size = Size(shape.n_layer, shape.n_embd, shape.vocab_size, config.data.context, shape.n_head)
    sections = config.model_dump(mode="json", include={"run", "optimizer", "training", "kernels"}) | {"kernels": "auto"}
    sections["run"] |= {"name": "at_size", "folder": str(b.folder)}
    t = assemble(b.folder / "at_size", size, 0.0, settings=sections, pruned=config.sparsity)
    step, seconds = product(t), []
    forget_peak_memory()
    for index in range(10):
        began = b.clock()
        step(index)
        seconds.append(b.clock() - began)
    memory, told = peak_memory_bytes(), predicted["memory_bytes_per_rank"]["total"]
    facts = {"peak_memory_bytes": {"measured": memory, "plan": told}, "tokens_per_s": predicted["tokens_per_step"] / median(seconds[3:])}
    yield timed("at size", {"a step": seconds[3:]}, "a step", first_seconds=seconds[0], memory_over_plan=memory / told, **facts)


SECTIONS: dict[str, Callable[[Bench], Iterator[dict[str, Any]]]] = {
    "ceilings": ceilings,
    "layers": layers,
    "steps": whole_steps,
    "at_size": at_size,
    "attention": attention,
    "optimizer": optimizer,
    "selection": selection,
}


def report(facts: Mapping[str, Any]) -> str:
    if "failed" in facts:
        return f"## {facts['section']}\n\nFailed: {facts['failed']}\n"
    rows = [[name, f"{1000 * median(values):.3f}", facts["ratios"][name], mib(facts, name)] for name, values in facts["seconds"].items()]
    text = f"## {facts['section']}\n\n" + table(["", "ms", f"{facts['baseline']} / this", "peak MiB of its own"], rows)
    told = {key: value for key, value in facts.items() if isinstance(value, float | int)}
    text += "".join(f"\n{key}: {value:,.4g}" for key, value in told.items())
    for goal in facts["goals"]:
        text += f"\n{'MISSED' if missed(goal) else 'Met'}: {goal['what']} of at least {goal['at_least']}, {goal['ratio']}"
    return text + "\n"


def mib(facts: Mapping[str, Any], name: str) -> str:
    found = facts.get("peak_memory_bytes", {}).get(name)
    return "" if found is None else f"{found / 2**20:,.0f}"


def missed(goal: Mapping[str, Any]) -> bool:
    return goal["ratio"].median < goal["at_least"]


def checked(facts: dict[str, Any], b: Bench) -> dict[str, Any]:
    """Toy sizes have no goals."""
    return facts | {"goals": []} if b.scale is TOY else facts


def run(b: Bench, wanted: Sequence[str], limit_s: float) -> list[dict[str, Any]]:
    """Every section in turn; what is not begun in time is named."""
    began, found = time.perf_counter(), []
    for name in wanted:
        if time.perf_counter() - began > limit_s:
            found.append({"section": name, "failed": f"not begun within {limit_s:.0f} s"})
            continue
        try:
            for facts in SECTIONS[name](b):
                found.append(checked(facts, b))
                print(report(found[-1]), flush=True)
        except Exception as error:  # the others are still to be measured
            traceback.print_exc()
            found.append({"section": name, "failed": f"{type(error).__name__}: {error}"})
        gc.collect()
        if b.device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--limit", type=float, default=480.0, help="seconds after which no section is begun")
    parser.add_argument("--out", type=Path, help="folder for gpu_<hardware>_<date>.{json,md}")
    args = parser.parse_args(argv)
    device = resolve_device(RunConfig())
    if device != "cuda" and not args.quick:
        parser.error("Expected a GPU. Got none. Use --quick for toy sizes on this CPU.")
    with process_group(device), tempfile.TemporaryDirectory() as folder:
        found = run(Bench(TOY if args.quick else H200, torch.device(device), Path(folder)), args.only, args.limit)
    if args.out:
        print(write(args.out, "gpu", {"sections": found}, [report(facts) for facts in found]))
    return int(any("failed" in facts or any(map(missed, facts["goals"])) for facts in found))


if __name__ == "__main__":
    sys.exit(main())
