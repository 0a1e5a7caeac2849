"""The Triton kernels without a GPU: interpreted on CPU tensors, and compiled ahead of time."""

import importlib.util
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton: pip install triton")


@pytest.mark.parametrize("how", ["interpret", "compile", pytest.param("compile-all", marks=pytest.mark.slow)])
def test_kernels(how):
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton_cases", how], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
