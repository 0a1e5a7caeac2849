"""Installing from source where nothing compiles: the package works, and says why it multiplies zeros."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from raysparse.kernels import library

ROOT = Path(__file__).parents[1]
WHY = "it was not built when raysparse was installed: that needs Linux and g++"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder that holds the package as pip installs it with compilers that always fail."""
    for package in ("pip", "setuptools"):
        if not list(importlib.metadata.distributions(name=package)):
            pytest.skip(f"needs {package} in this environment, for nothing is downloaded")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("raysparse", "cluster", "tuning"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--target",
        str(target),
        str(source),
    ]
    done = subprocess.run(command, env=os.environ | {"CC": "false", "CXX": "false"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(target.rglob("*.so"))
    return target


def raysparse(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != library.CHOICE} | {"PYTHONPATH": str(installed)}
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def test_it_trains_masked_and_says_why_dense(installed: Path, tmp_path: Path, pretrain_values: dict[str, Any]):
    found = raysparse(installed, tmp_path, "-c", "import raysparse; print(raysparse.__file__)")
    assert Path(found.stdout.strip()).is_relative_to(installed), found.stderr
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(pretrain_values))
    done = raysparse(installed, tmp_path, "-m", "raysparse", "pretrain", str(config), "--local")
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert said.count(f"kernels: dense, zeros are multiplied. There is no native library: {WHY}") == 1
    summary = json.loads((tmp_path / "runs" / "tiny" / "summary.json").read_text())
    assert summary["sparsity"]["actual"] == pytest.approx(0.75, abs=1e-3)
    assert summary["kernels"] is None
    assert summary["flops"]["executed"] > summary["flops"]["counted"]


def test_what_needs_the_library_says_so(installed: Path, tmp_path: Path, pretrain_values: dict[str, Any]):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(pretrain_values))
    done = raysparse(installed, tmp_path, "-m", "raysparse", "pretrain", str(config), "kernels=sparse", "--dry-run")
    assert done.returncode == 2
    assert f"Got none: {WHY}. Install g++" in done.stderr
    doctor = raysparse(installed, tmp_path, "-m", "raysparse", "doctor")
    assert doctor.returncode == 1
    assert f"There is no native library: {WHY}." in doctor.stdout
