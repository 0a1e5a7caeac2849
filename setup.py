"""Builds the native kernels, one shared library for each instruction set; without a compiler raysparse installs all the same.

The libraries have a plain C ABI and are loaded with ctypes: they need neither Python nor torch headers, and one build serves every
version of both. Everything else about the package is in pyproject.toml.
"""

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("raysparse/kernels/native")
COMMON = [
    "-std=c++17",
    "-O3",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",
]
X86 = {
    "avx512": ["-march=x86-64-v4", "-mavx512bf16", "-mavx512vbmi", "-mavx512vbmi2", "-mavx512vnni", "-mprefer-vector-width=512"],
    "avx2": ["-march=x86-64-v3"],
    "baseline": [],
}
VARIANTS = X86 if platform.machine().lower() in ("x86_64", "amd64") else {"baseline": []}


class BuildNative(build_ext):
    """Plain file names (``_avx2.so``): the libraries belong to no version of Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"


def libraries() -> list[Extension]:
    """OpenMP is compiled in but not linked: at import the library binds to the one that torch has loaded, and shares its threads."""
    sources, headers = sorted(map(str, NATIVE.glob("*.cpp"))), sorted(map(str, NATIVE.glob("*.h")))
    return [
        Extension(
            f"raysparse.kernels._{name}",
            sources,
            depends=headers,
            extra_compile_args=[*COMMON, *flags],
            language="c++",
            optional=True,
        )
        for name, flags in VARIANTS.items()
    ]


setup(ext_modules=libraries() if sys.platform == "linux" else [], cmdclass={"build_ext": BuildNative})
