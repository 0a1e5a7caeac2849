"""`raysparse doctor` tells the truth about the kernels of this machine, and its exit status is the verdict."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raysparse.__main__ import main
from raysparse.kernels import library
from raysparse.kernels.stream import Stream
from raysparse.recipes import doctor
from tests.kernels.conftest import forget

needs_native = pytest.mark.skipif(not library.available(), reason="needs the native library")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The self-test on a small layer; the library is loaded anew after the test."""
    monkeypatch.setattr(doctor, "SIZE", 96)
    monkeypatch.setattr(doctor, "TOKENS", 65)
    monkeypatch.delenv(library.CHOICE, raising=False)
    forget()
    yield
    forget()


@needs_native
def test_a_sound_machine(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for part in (f"torch {torch.__version__}", "GPU  ", f"{library.variant():<9} in use", "shared with torch", "self-test     bfloat16"):
        assert part in text
    assert text.count("sparse equals dense") == 2
    assert "96x96, 75 % zeros, 65 tokens" in text
    assert "Sparse layers skip their zeros on this machine's CPU." in text


@needs_native
def test_facts_are_plain(capsys):
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["well"] is True
    assert facts["why_not"] is None
    assert facts["threads"] == torch.get_num_threads()
    assert facts["versions"]["torch"] == torch.__version__
    assert set(facts["tests"]) == {"float32", "bfloat16"}
    for test in facts["tests"].values():
        assert 0 <= test["error"] < 1e-2
        assert set(test["gains"]) == {"forward", "backward", "gradient"}


@needs_native
def test_why_a_build_is_not_in_use(monkeypatch, tmp_path):
    monkeypatch.setenv(library.CHOICE, "baseline")
    assert doctor.builds()["baseline"] == "in use"
    best = library._best(library._open("baseline"))
    if best != "baseline":
        assert doctor.builds()[best] == "not asked for: RAYSPARSE_NATIVE=baseline"
    monkeypatch.delenv(library.CHOICE)
    forget()
    if best != "baseline":
        assert doctor.builds()["baseline"] == f"slower than {library.variant()}"
    forget()
    (tmp_path / "_baseline.so").symlink_to(library.path("baseline"))
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    not_built = library.VARIANTS.index(best)
    assert list(doctor.builds().values()) == ["not for this CPU"] * not_built + ["not built"] * (2 - not_built) + ["in use"]


def test_no_library_is_a_verdict_and_says_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "computed dense here, zeros included. There is no native library: it was not built when raysparse was installed" in text
    assert "Install g++" in text
    monkeypatch.setenv(library.CHOICE, "off")
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "RAYSPARSE_NATIVE=off.\nUnset RAYSPARSE_NATIVE, or set it to one of avx512, avx2, baseline." in text
    assert "Install" not in text


@needs_native
def test_wrong_kernels_are_found(monkeypatch, capsys):
    gradient = Stream.gradient
    monkeypatch.setattr(Stream, "gradient", lambda stream, x, dy: gradient(stream, x, dy) * 1.03)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert text.count("WRONG: sparse is not dense (largest error") == 2
    assert "run with kernels=dense" in text


@needs_native
def test_other_pools_of_threads_are_told(monkeypatch):
    library.load()
    monkeypatch.setattr(library, "openmp", lambda: [Path("/a/libgomp.so.1"), Path("/b/libiomp5.so")])
    assert "libgomp.so.1, shared with torch; also loaded here: libiomp5.so" in doctor.show(doctor.examine())


def test_what_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(doctor, "_PACKAGES", ("torch", "no-such-package"))
    assert doctor.examine()["versions"]["no-such-package"] == "not installed"


def test_ray_is_not_imported():
    script = "import sys; from raysparse.__main__ import main; status = main(['doctor']); sys.exit(9 if 'ray' in sys.modules else status)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == (0 if library.available() else 1), done.stdout + done.stderr


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for part in ("RAYSPARSE_NATIVE=avx2 raysparse doctor", "exit status is 0", "--json"):
        assert part in text
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "raysparse doctor" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["doctor", "quickly"])
    assert "takes no words, got quickly" in capsys.readouterr().err
