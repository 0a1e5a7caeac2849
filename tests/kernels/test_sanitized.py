"""The native library under AddressSanitizer and UBSan, on drawn cases: a short run of `make fuzz`."""

import pytest

from raysparse.kernels import library
from tests.kernels import fuzz

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """Folder of the sanitized builds."""
    if fuzz.sanitizer() is None:
        pytest.skip("needs g++ with AddressSanitizer")
    return fuzz.build(tmp_path_factory.mktemp("sanitized"))


@pytest.mark.parametrize("variant", library.VARIANTS)
def test_drawn_cases(where, variant):
    done = fuzz.run_apart(where, variant, "--cases", "60", "--seed", "11")
    if done.returncode == fuzz.UNSUPPORTED:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_read_outside_is_seen(where):
    done = fuzz.run_apart(where, "baseline", "--outside")
    assert done.returncode not in (0, fuzz.UNSUPPORTED)
    assert "heap-buffer-overflow" in done.stderr
    assert "rs_multiply_f32" in done.stderr
