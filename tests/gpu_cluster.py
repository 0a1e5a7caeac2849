"""Whether several GPUs train what one does: FSDP2 and HSDP, every pattern, whole and packed collectives. ``make gpu-cluster``.

    python -m tests.gpu_cluster                            every GPU of this machine, over NCCL
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-endpoint HOST:29400 --rdzv-backend c10d -m tests.gpu_cluster
    python -m tests.gpu_cluster --device cpu --ranks 4     the same on CPUs, over gloo

Each case is a tiny GPT of the product's own loop, trained on one rank and then on all of them. With `run.parity` weights, moments,
losses and masks must be equal bit by bit; without it the masks that never change. Ends with a table; exit
status 1 if a case differs, 2 if there are no two ranks.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measure import table
from raysparse.train.process import process_group, torchrun_rank
from tests.train.steps import differences, run

PATTERNS = {
    "unstructured": {"target": 0.75},
    "2:4": {"target": 0.5, "pattern": {"type": "n:m", "n": 2, "m": 4}},
    "4x4 blocks": {"target": 0.75, "pattern": {"type": "block", "size": 4}},
}
STEPS, UPDATE = 8, 3


@dataclass(frozen=True)
class Case:
    """A run on all ranks."""

    pattern: str
    rule: str
    replicas: int
    packed: str
    parity: bool

    def __str__(self) -> str:
        shared = f"HSDP, {self.replicas} replicas" if self.replicas > 1 else "FSDP2"
        return f"{shared}, {self.pattern}, {self.rule}, {'packed' if self.packed == 'on' else 'whole'}{', parity' * self.parity}"

    def sparsity(self) -> dict[str, Any]:
        evolution = {"type": self.rule} | ({} if self.rule == "static" else {"update_interval": UPDATE})
        return PATTERNS[self.pattern] | {"evolution": evolution}

    def sections(self, device: str, ranks: int) -> dict[str, Any]:
        sequences = 2 * ranks
        width = 16 * ranks  # every rank has rows of whole blocks
        return {
            "run": {"name": "check", "device": device, "parity": self.parity},
            "model": {"preset": "debug", "overrides": {"n_embd": width, "n_head": ranks, "n_layer": 2, "vocab_size": 101}},
            "training": {"length": STEPS, "sequences": sequences, "micro": 2, "validate_every": STEPS, "validation_sequences": 4},
            "sharding": {"replicas": self.replicas, "packed": self.packed},
        }


def cases(ranks: int) -> list[Case]:
    """Weights and gradients decide who is dropped and grows, so that every bit of them matters; static masks need no parity."""
    ways = [1, 2] if ranks % 2 == 0 else [1]
    exact = [Case(pattern, "mixed", replicas, packed, True) for replicas in ways for pattern in PATTERNS for packed in ("off", "on")]
    return exact + [Case(pattern, "static", replicas, "on", False) for replicas in ways for pattern in PATTERNS]


def problem(case: Case, one: dict[str, Any], all_ranks: dict[str, Any]) -> str | None:
    """What differs."""
    if not case.parity:
        return None if one["digest"] == all_ranks["digest"] else "the masks"
    found = differences(one, all_ranks)
    return f"{len(found)} of {len(one)}: {', '.join(found[:3])}" if found else None


def work(device: str) -> int:
    """On each rank that torchrun has started: rank 0 trains alone, then all together; it prints the table."""
    torch.set_num_threads(1)
    rank, ranks = torchrun_rank() or (0, 1)
    if device == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    found = cases(ranks)
    with tempfile.TemporaryDirectory() as folder:
        alone = _alone(found, device, ranks, Path(folder)) if rank == 0 else {}
        rows, different = [], False
        with process_group(device):
            box = [folder]  # rank 0's, for all: what one writes there others may read
            dist.broadcast_object_list(box)
            for number, case in enumerate(found):
                dist.barrier()
                began = time.perf_counter()
                result = run(Path(box[0]) / f"all-{number}", case.sections(device, ranks), case.sparsity())
                if rank == 0:
                    said = problem(case, alone[case.pattern, case.rule, case.parity], result)
                    different |= said is not None
                    rows.append((str(case), f"DIFFERENT ({said})" if said else "equal", f"{time.perf_counter() - began:.1f}"))
        if rank == 0:
            what = "bits" if device == "cuda" else "bits (gloo)"
            print(table((f"{ranks} ranks on {_device(device)} against one", what, "seconds"), rows), flush=True)
    return int(different)


def _alone(found: Sequence[Case], device: str, ranks: int, folder: Path) -> dict[Any, dict[str, Any]]:
    """(pattern, rule, parity) -> what one rank ends with, in a group of its own."""
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    results: dict[Any, dict[str, Any]] = {}
    for case in found:
        key = case.pattern, case.rule, case.parity
        if key not in results:
            sections = case.sections(device, ranks)
            sections["sharding"] = {}
            results[key] = run(folder / f"alone-{len(results)}", sections, case.sparsity())
    dist.destroy_process_group()
    return results


def _device(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPUs"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.gpu_cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ranks", type=int, help="processes on this machine; without it as many as there are GPUs")
    args = parser.parse_args(argv)
    if torchrun_rank() is not None:
        return work(args.device)
    have = torch.cuda.device_count() if args.device == "cuda" else args.ranks or 2
    ranks = args.ranks or have
    if not 2 <= ranks <= have:
        words = "GPUs" if args.device == "cuda" else "ranks"
        print(
            f"gpu-cluster: Expected {ranks if ranks > 2 else 'two or more'} {words}. Got {have}. Nothing was checked. "
            "Run it where there are more; --device cpu --ranks 4 checks the same on CPUs.",
            file=sys.stderr,
        )
        return 2
    return launch(ranks, args.device)


def launch(ranks: int, device: str) -> int:
    """Run `work` on ranks of this machine as torchrun would; where one fails, all end, and its status is returned."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "check"}
    shared |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONWARNINGS": "ignore"}  # for equal bits; for a quiet table
    with ExitStack() as stack:
        processes = []
        for rank in range(ranks):
            own = {key: str(value) for key, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            command = [sys.executable, "-m", "tests.gpu_cluster", "--device", device]
            processes.append(subprocess.Popen(command, env=os.environ | own))
            stack.callback(processes[-1].kill)
        while (codes := [process.poll() for process in processes]) != [0] * ranks:
            if failed := next(filter(None, codes), 0):
                return failed
            time.sleep(0.1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
