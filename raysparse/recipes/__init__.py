"""One file per verb: a Config, ``open_run`` for the driver, ``work`` for every rank."""

from typing import Any

from raysparse.config import Config
from raysparse.recipes import compare, evaluate, export, finetune, generate, gradual, pretrain, prune, recover, zeroshot
from raysparse.recipes.job import Job
from raysparse.report import bytes_text

MODULES: dict[str, Any] = {"pretrain": pretrain, "prune": prune, "finetune": finetune, "evaluate": evaluate, "zeroshot": zeroshot}
"""Verb -> module with ``open_run(config) -> Job``, ``work(job, run) -> summary`` and ``dry_run(config) -> facts``."""

GROUPS: dict[str, Any] = {"compare": compare, "gradual": gradual, "recover": recover}
"""Verb of several stages -> module with ``stages(config) -> stage -> config``, ``check(config)`` of what needs no files,
``dry_run(config) -> facts`` and a function of the verb's name, ``(config, launch) -> (facts, text)``."""

CONFIGS: dict[str, type[Config]] = {
    "pretrain": pretrain.PretrainConfig,
    "prune": prune.PruneConfig,
    "finetune": finetune.FinetuneConfig,
    "evaluate": evaluate.EvaluateConfig,
    "zeroshot": zeroshot.ZeroshotConfig,
    "export": export.ExportConfig,
    "generate": generate.GenerateConfig,
    "gradual": gradual.GradualConfig,
    "recover": recover.RecoverConfig,
    "compare": compare.CompareConfig,
}
"""Verb -> its config."""


def text(summary: dict[str, Any], job: Job) -> str:
    """The end of a run in a few lines."""
    lines = [f"{summary['name']} is finished: {job.path / 'summary.json'}"]
    if "loss" in summary:
        loss, sparsity, flops = summary["loss"], summary["sparsity"], summary["flops"]
        lines += [
            f"validation loss   {loss['validation']:.4f} (perplexity {loss['perplexity']:.2f})",
            f"sparse weights    {sparsity['nnz']:,} live of {sparsity['total']:,} (sparsity {sparsity['actual']:.4f})",
            f"training FLOPs    {flops['counted']:.4g} counted, {flops['dense']:.4g} dense: {flops['reduction']:.2f}x "
            f"({flops['convention']}); counted = if zeros were skipped; the kernels executed {flops['executed']:.4g}",
            *_topology(summary),
            f"time              {summary['seconds']:.1f} s, {summary['tokens_per_s']:,.0f} tokens/s, {summary['workers']} workers",
            *_cost_of_a_worker(summary),
            f"model             {job.path / 'export'}",
        ]
    if "pruning" in summary:
        sparsity, told = summary["sparsity"], summary["pruning"]
        lines += (
            [f"validation loss   {told['loss']['before']:.4f} before, {told['loss']['after']:.4f} after"] if told["loss"]["after"] else []
        )
        lines += [
            f"sparse weights    {sparsity['nnz']:,} live of {sparsity['total']:,} (sparsity {sparsity['actual']:.4f}), by {told['method']}",
            f"time              {summary['seconds']:.1f} s, {summary['workers']} workers",
            f"model             {job.path / 'export'}",
        ]
    if "zeroshot" in summary:
        told = summary["zeroshot"]
        for name in [name for name in told["scores"] if not name.endswith("_stderr")]:
            error = told["scores"].get(f"{name}_stderr")
            lines.append(f"{name:<17} {told['scores'][name]:.4f}{'' if error is None else f' ± {error:.4f}'}")
        cut = f", {told['num_truncated']:,} of them cut at their start" if told["num_truncated"] else ""
        lines.append(f"examples          {told['num_examples']:,}{cut}")
    if "task" in summary:
        task = summary["task"]
        for name, value in task["scores"].items():
            baseline = f"baseline {task['baseline'][name]:.2f}" if name in task["baseline"] else "no baseline"
            parts = "".join(f", {part} {own['scores'][name]:.2f}" for part, own in task["subsets"].items() if name in own["scores"])
            lines.append(f"{name:<17} {value:.2f} ({baseline}{parts}) on {task['num_examples']:,} examples")
        lines += _int8(task)
        lines += [f"{name:<17} not scored: it {reason}" for name, reason in task["missing"].items()]
        lines += [f"remark            {task['remark']}"] if task["remark"] else []
    return "\n".join(lines)


def _int8(task: dict[str, Any]) -> list[str]:
    """What these scores are of, beside those of the float32 model."""
    if "quantization" not in task:
        return []
    told, floats = task["quantization"], task["quantization"]["float_scores"]
    scores = ", ".join(f"{name} {value:.2f} ({task['scores'][name] - value:+.2f} in int8)" for name, value in floats.items())
    return [
        f"in float32        {scores}",
        f"{told['type']:<17} {told['layers']} layers, {told['nnz']:,} live weights of {told['weights']:,}: every zero is still one, "
        f"{told['rounded_to_zero']:,} more were rounded to it",
    ]


def _cost_of_a_worker(summary: dict[str, Any]) -> list[str]:
    """Of the one that has most: what it sent in a step, and what it kept."""
    steps, kept, lines = max(1, summary["steps"]), summary["memory_bytes"], []
    if summary["bytes_sent"]:
        sent, dense = bytes_text(summary["bytes_sent"] / steps), bytes_text(summary["dense_bytes_sent"] / steps)
        seconds = f"; {summary['wire_seconds'] / steps:.3g} s in collectives" if summary["wire_seconds"] else ""  # fairscale does not tell
        lines.append(f"sent in a step    {sent} by a worker at most, {dense} with its zeros{seconds}")
    sizes = {name: bytes_text(size) for name, size in (kept | {"peak": summary["peak_memory_bytes"]}).items()}
    return [
        *lines,
        "memory            {weights} weights, {gradients} gradients, {moments} moments ({dense_moments} if of all weights), "
        "{peak} at the peak".format(**sizes),
    ]


def _topology(summary: dict[str, Any]) -> list[str]:
    found = summary["topology"]
    if not found.get("updates"):
        return []
    return [
        f"topology          {found['updates']:,} updates ({found['skipped']} skipped), density {found['mean_density']:.4f} in the mean, "
        f"{found['explored']:.1%} of the sparse weights explored; "
        f"{summary['flops']['reduction_with_updates']:.2f}x with the dense gradients of updates counted"
    ]
