"""The native library: which build of it this machine runs, and how it is called.

It is one set of C++ sources with a plain C ABI (`native/`), built for up to three instruction sets when raysparse is installed. The
best one that the CPU has is loaded at first use. Its threads are torch's own: OpenMP is not linked but bound to the library that
torch has loaded, so there is one pool of threads and no oversubscription.
"""

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
VARIANTS = ("avx512", "avx2", "baseline")
"""Builds of the library, best first; on other machines than x86-64 there is the baseline alone."""
CHOICE = "RAYSPARSE_NATIVE"
"""Environment variable: one of `VARIANTS` to load that build, ``off`` to load none."""


class Missing(Exception):
    """There is no native library here; the text says why."""


@cache
def load() -> ctypes.CDLL:
    """The library for this machine.

    Raises:
        Missing: none was built, or none can be loaded.
    """
    wanted = os.environ.get(CHOICE, "")
    if wanted == "off":
        raise Missing(f"{CHOICE}=off")
    if wanted and wanted not in VARIANTS:
        raise Missing(f"{CHOICE} is {wanted!r}, not one of {', '.join(VARIANTS)}, off")
    if not path("baseline").exists():
        raise Missing("it was not built when raysparse was installed: that needs Linux and g++")
    _share_openmp()
    best = _best(_open("baseline"))
    usable = VARIANTS[VARIANTS.index(best) :]
    if wanted and wanted not in usable:
        raise Missing(f"{CHOICE} is {wanted}, which this CPU does not support (best: {best})")
    built = [name for name in usable if path(name).exists()]
    return _open(wanted or built[0])


def why_not() -> str | None:
    """Why there are no native kernels here; None where there are."""
    try:
        load()
    except Missing as missing:
        return str(missing)
    return None


def remedy() -> str:
    """What to do where there is none."""
    if os.environ.get(CHOICE):
        return f"Unset {CHOICE}, or set it to one of {', '.join(VARIANTS)}."
    return "Install g++ (Debian: apt install g++) and raysparse again (in its folder: pip install --no-deps -e .)."


def available() -> bool:
    return why_not() is None


def variant() -> str:
    """Name of the loaded build."""
    return function("rs_variant", ctypes.c_char_p)().decode()


def path(name: str) -> Path:
    """Where the build `name` lies, if there is one."""
    return FOLDER / f"_{name}.so"


@cache
def function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    """A function of the library, its ctypes signature set. The interpreter lock is released while it runs."""
    found = load()[name]
    found.restype, found.argtypes = result, arguments
    return found


def check(sound: bool, *got: object) -> None:
    """A ValueError that says what was got, unless it is sound: kernels trust their arguments, so ``python -O`` checks them too."""
    if not sound:
        raise ValueError(" ".join(map(str, got)))


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a contiguous CPU tensor's first element; None for None."""
    if tensor is None:
        return None
    check(tensor.is_contiguous(), tuple(tensor.shape), "with strides", tensor.stride())
    return address(tensor)


def address(tensor: Tensor) -> int:
    """Of the first element of a CPU tensor of any strides: a multiple of its size."""
    check(tensor.is_cpu, tensor.device)
    check(not tensor.is_neg(), "a tensor that is negated when it is read")
    found = tensor.data_ptr()
    check(found % tensor.element_size() == 0, f"{tensor.dtype} at the address {found:#x}, between two of them")
    return found


def threads() -> int:
    """Threads that a kernel may use: torch's setting."""
    return torch.get_num_threads()


def openmp() -> list[Path]:
    """The OpenMP libraries in this process, torch's first: several only where another package brought its own."""
    table = Path("/proc/self/maps")
    if not table.exists():  # not Linux: there is no native library either
        return []
    maps = table.read_text().splitlines()
    files = dict.fromkeys(Path(line.split(maxsplit=5)[5]) for line in maps if "/" in line)
    found = [file for file in files if file.name.startswith(("libgomp", "libiomp5", "libomp"))]
    return sorted(found, key=lambda file: Path(torch.__file__).parent not in file.parents)


def _best(baseline: ctypes.CDLL) -> str:
    baseline.rs_best_variant.restype = ctypes.c_char_p
    return baseline.rs_best_variant().decode()


def _open(name: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path(name)))
    except OSError as error:
        raise Missing(f"{path(name).name} does not load: {error}") from None


def _share_openmp() -> None:
    """Make the OpenMP library that torch runs on visible to ours."""
    if not (found := openmp()):
        raise Missing("this torch runs without OpenMP, so the kernels would have no threads to share")
    ctypes.CDLL(str(found[0]), ctypes.RTLD_GLOBAL)
