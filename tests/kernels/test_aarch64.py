"""The portable path on another kind of CPU: cross-compiled with every warning an error, and run in an emulator."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.kernels.fuzz import compile_sources, setup_flags

COMPILER, EMULATOR, SYSTEM = "aarch64-linux-gnu-g++", "qemu-aarch64", Path("/usr/aarch64-linux-gnu")

pytestmark = pytest.mark.slow


def test_products_on_aarch64(tmp_path):
    if missing := [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]:
        pytest.skip(f"needs {' and '.join(missing)}")
    flags = [*setup_flags()["baseline"], "-O2", "-Werror"]
    objects = compile_sources(COMPILER, flags, tmp_path, "aarch64")
    program = tmp_path / "driver"
    driver = Path(__file__).with_name("driver.cpp")
    subprocess.run([COMPILER, *flags, str(driver), *objects, "-o", str(program)], check=True)
    done = subprocess.run([EMULATOR, "-L", str(SYSTEM), str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "baseline: 252 right, 0 wrong\n"
