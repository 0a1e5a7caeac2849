"""Where a result was made: versions, hardware, commit."""

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from raysparse import __version__
from raysparse.recipes.job import write_atomically
from raysparse.train.run import RunConfig, resolve_device


def versions() -> dict[str, str]:
    """Of Python and the packages that a result depends on."""
    found = {"python": platform.python_version(), "raysparse": __version__}
    for package in ("torch", "ray", "transformers", "datasets", "tokenizers", "fairscale", "torchao"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_environment(folder: Path, config: RunConfig) -> None:
    """environment.json: versions, hardware and, in a git checkout of raysparse, the commit."""
    root = Path(__file__).parents[2]
    commit = None
    if (root / ".git").exists():
        done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        commit = done.stdout.strip() or None
    device = resolve_device(config)
    facts = {
        "versions": versions(),
        "commit": commit,
        "machine": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "workers": config.workers,
        "threads": config.threads,
    }
    write_atomically(folder / "environment.json", json.dumps(facts, indent=1) + "\n")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()
