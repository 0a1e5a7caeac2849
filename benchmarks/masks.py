"""What a 75 % sparse model weighs: its checkpoint beside a dense one's, and its masks in memory on each of several ranks.

    python -m benchmarks.masks                       GPT-2-small width, 2 layers, 1 and 2 ranks
    python -m benchmarks.masks --ranks 1 2 4 --out benchmarks/results
    python -m benchmarks.masks --peak                and what a step of all GPT-2 Small takes on one worker; 4 GB

Exact numbers, no clock. Exit status 1 if a mask takes more than 1 bit a weight in the checkpoint, the sparse weights with their moments
and masks more than 0.30 of the dense ones' bytes, or a rank holds mask rows other than its weight rows.
"""

import argparse
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from benchmarks.measure import table, write
from benchmarks.step import Size, assemble
from raysparse.recipes.training import CheckpointConfig
from raysparse.train.checkpoint import Checkpointer
from raysparse.train.loop import forward_backward, update
from raysparse.train.optimizer import OptimizerConfig
from raysparse.train.process import forget_peak_memory, peak_memory_bytes
from raysparse.train.state import Training


def measure(folder: Path, size: Size) -> dict[str, Any]:
    """Sizes of a 75 % sparse model on the default process group; every rank calls this, rank 0's result has the files."""
    rank = dist.get_rank()
    t = assemble(folder / str(rank), size, 0.75)
    assert t.topology is not None
    masked, dense = (_save(folder / name, one) for name, one in (("masked", t), ("dense", assemble(folder / f"dense {rank}", size, 0.0))))
    stored = dcp.FileSystemReader(str(masked)).read_metadata().state_dict_metadata
    sizes = {
        key: value.size.numel() * value.properties.dtype.itemsize
        for key, value in stored.items()
        if isinstance(value, TensorStorageMetadata) and key.split("/")[1] in t.topology.masks
    }
    packed = sum(size for key, size in sizes.items() if key.startswith("mask/"))
    local = {name: t.sharded.parts[name].local for name in t.topology.masks}
    here = torch.tensor(
        [
            sum(weight.numel() for weight in local.values()),
            sum(mask.nbytes for mask in t.topology.masks.values()),
            int(all(t.topology.masks[name].shape == weight.shape for name, weight in local.items())),
        ]
    )
    ranks = [torch.zeros_like(here) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, here)
    weights = sum(int(one[0]) for one in ranks)
    return {
        "ranks": len(ranks),
        "sparse_weights": weights,
        "mask_bytes": packed,
        "share_of_sparse": sum(sizes.values()) / (12 * weights),
        "checkpoint_file_bytes": _bytes(masked),
        "share_of_file": _bytes(masked) / _bytes(dense),
        "bits_per_weight": 8 * packed / weights,
        "weights_by_rank": [int(one[0]) for one in ranks],
        "memory_bytes_by_rank": [int(one[1]) for one in ranks],
        "sharded_like_the_weights": all(int(one[2]) for one in ranks),
    }


PEAKS = {"dense": (0.0, "dense"), "75 %, moments of all": (0.75, "dense"), "75 %, live moments": (0.75, "live")}


def peak(folder: Path, size: Size, sparsity: float, state: Any) -> dict[str, int]:
    """Bytes of weights, gradients and moments, and the peak of this process's resident memory over three steps of one worker."""
    t = assemble(folder, size, sparsity, optimizer=OptimizerConfig(state=state))
    forget_peak_memory()
    for index in range(3):
        forward_backward(t, index)
        update(t, index)
    return t.memory() | {"peak": peak_memory_bytes()}


def report_peaks(found: dict[str, dict[str, int]]) -> str:
    rows = [
        [name, *(f"{value / 1e6:,.0f}" for value in kept.values()), f"{kept['peak'] / found['dense']['peak']:.3f}"]
        for name, kept in found.items()
    ]
    return table(["MB", "weights", "gradients", "moments", "moments if dense", "peak of the process", "peak / dense"], rows)


def on_ranks(num_ranks: int, size: Size) -> dict[str, Any]:
    """`measure` on that many gloo ranks of this machine."""
    return alone(measure, size, num_ranks=num_ranks)


def report(results: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            one["ranks"],
            f"{one['sparse_weights']:,}",
            f"{one['bits_per_weight']:.4f}",
            f"{one['share_of_sparse']:.4f}",
            f"{one['checkpoint_file_bytes']:,}",
            f"{one['share_of_file']:.4f}",
            ", ".join(f"{value:,}" for value in one["memory_bytes_by_rank"]),
            ", ".join(f"{value:,}" for value in one["weights_by_rank"]),
        ]
        for one in results
    ]
    columns = [
        "ranks",
        "sparse weights",
        "bits a weight, stored",
        "sparse weights, moments and masks / dense",
        "checkpoint bytes",
        "whole file / dense",
        "mask bytes in memory, by rank",
        "weights, by rank",
    ]
    return table(columns, rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.masks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--peak", action="store_true", help="also the peak memory of a step of GPT-2 Small, one sequence of 256 tokens")
    parser.add_argument("--out", type=Path, help="folder for masks_<hardware>_<date>.{json,md}")
    args = parser.parse_args(argv)
    results = [on_ranks(num_ranks, Size(args.layers, args.width, 512, 64)) for num_ranks in args.ranks]
    tables, peaks = [report(results)], {}
    if args.peak:
        size = Size(12, 768, 50257, 256)
        peaks = {name: alone(peak, size, sparsity, state) for name, (sparsity, state) in PEAKS.items()}
        tables.append("## A step of GPT-2 Small on one worker\n\n" + report_peaks(peaks))
    print("\n".join(tables))
    if args.out:
        print(write(args.out, "masks", {"results": results, "peaks": peaks}, tables))
    fits = [one["bits_per_weight"] <= 1 and one["share_of_sparse"] <= 0.3 and one["sharded_like_the_weights"] for one in results]
    return int(not all(fits))


def alone(function: Callable[..., Any], *arguments: Any, num_ranks: int = 1) -> Any:
    """Rank 0's result of ``function(folder, *arguments)`` in processes of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (num_ranks, port, folder, function, arguments), num_ranks)
        return torch.load(Path(folder) / "result.pt", weights_only=True)


def _save(folder: Path, t: Training) -> Path:
    """A checkpoint of `t`; every rank calls this."""
    saver = Checkpointer(folder, CheckpointConfig(asynchronous=False), t.sharded, t.optimizer, t.topology, t.agenda)
    path = saver.save(1, {})
    saver.wait()
    dist.barrier()
    return path


def _bytes(checkpoint: Path) -> int:
    return sum(file.stat().st_size for file in checkpoint.glob("*.distcp"))


def _rank(rank: int, num_ranks: int, port: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
    result = function(Path(folder) / "run", *arguments)
    if rank == 0:
        torch.save(result, Path(folder) / "result.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
