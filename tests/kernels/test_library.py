"""Which build of the native library is loaded, and what is said where none can be."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raysparse.kernels import library
from tests.kernels.conftest import forget


@pytest.fixture
def fresh(monkeypatch):
    """The library is loaded anew in the test and after it, and no build is asked for."""
    monkeypatch.delenv(library.CHOICE, raising=False)
    forget()
    yield
    forget()


def test_a_build_is_what_it_says(build):
    assert library.variant() == build
    assert library.available()


def test_the_best_build_of_the_cpu_is_loaded(native, fresh):
    best = library._best(library._open("baseline"))
    assert library.variant() == next(name for name in library.VARIANTS[library.VARIANTS.index(best) :] if library.path(name).exists())


def test_a_build_that_is_missing_is_made_up_for_by_the_next(native, fresh, monkeypatch, tmp_path):
    (tmp_path / "_baseline.so").symlink_to(library.path("baseline"))
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    assert library.variant() == "baseline"


def test_none_was_built(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    assert library.why_not() == "it was not built when raysparse was installed: that needs Linux and g++"
    assert not library.available()


def test_one_that_does_not_load(fresh, monkeypatch, tmp_path):
    (tmp_path / "_baseline.so").write_text("no library")
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    assert str(library.why_not()).startswith("_baseline.so does not load: ")


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ("off", "RAYSPARSE_NATIVE=off"),
        ("AVX2", "RAYSPARSE_NATIVE is 'AVX2', not one of avx512, avx2, baseline, off"),
    ],
)
def test_a_choice_of_none(fresh, monkeypatch, choice, text):
    monkeypatch.setenv(library.CHOICE, choice)
    assert library.why_not() == text


def test_a_choice_that_the_cpu_lacks(native, fresh, monkeypatch):
    monkeypatch.setenv(library.CHOICE, "avx512")
    monkeypatch.setattr(library, "_best", lambda _: "avx2")
    assert library.why_not() == "RAYSPARSE_NATIVE is avx512, which this CPU does not support (best: avx2)"


def test_torch_without_openmp(native, fresh, monkeypatch):
    monkeypatch.setattr(
        Path, "read_text", lambda _: "7f00-7f01 r--p 00000000 00:01 1 /usr/lib/libc.so.6\n7f02-7f03 rw-p 00000000 00:00 0\n"
    )
    assert library.why_not() == "this torch runs without OpenMP, so the kernels would have no threads to share"


def test_torchs_own_openmp_is_taken_before_others(native, fresh, monkeypatch):
    own = Path(torch.__file__).parent / "lib" / "libgomp-1.so"
    monkeypatch.setattr(Path, "read_text", lambda _: f"a r--p 0 0 1 /usr/lib/libgomp.so.1\nb r--p 0 0 1 {own}\n")
    opened = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name, mode: opened.append((name, mode)))
    library._share_openmp()
    assert opened == [(str(own), ctypes.RTLD_GLOBAL)]


def test_there_is_one_pool_of_threads(native):
    """In a process of its own: no second OpenMP library, and no thread more than torch has made."""
    script = (
        "import os, torch; from pathlib import Path; from raysparse.kernels import library\n"
        "from tests.kernels.streams import Case, products\n"
        "torch.set_num_threads(2); torch.randn(600, 600) @ torch.randn(600, 600); torch.randn(10**6).exp()\n"
        "maps = lambda: {l.split()[-1] for l in Path('/proc/self/maps').read_text().splitlines() if 'omp' in l.split('/')[-1]}\n"
        "before = maps(), len(os.listdir('/proc/self/task'))\n"
        "products(Case(256, 256, 600))\n"
        "assert (maps(), len(os.listdir('/proc/self/task'))) == before, (before, maps(), len(os.listdir('/proc/self/task')))"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_pointers_are_of_contiguous_tensors_here(native):
    x = torch.ones(3, 4)
    assert library.pointer(None) is None
    assert library.pointer(x[1:]) == x.data_ptr() + 16
    with pytest.raises(ValueError, match=r"strides \(1, 4\)"):
        library.pointer(x.t())
    with pytest.raises(ValueError, match="negated"):
        library.pointer(torch._neg_view(torch.ones(3)))
    with pytest.raises(ValueError, match="meta"):
        library.pointer(x.to("meta"))


def test_threads_are_torchs():
    torch.set_num_threads(3)
    assert library.threads() == 3
