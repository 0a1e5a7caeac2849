"""Each build of the native library that this machine runs, in turn."""

from collections.abc import Iterator

import pytest
import torch

from raysparse.kernels import library


def forget() -> None:
    """Let the next call load the library anew."""
    library.load.cache_clear()
    library.function.cache_clear()


@pytest.fixture(params=library.VARIANTS)
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test on one build; streams made before stay with theirs."""
    monkeypatch.setenv(library.CHOICE, request.param)
    forget()
    if (reason := library.why_not()) is not None:
        pytest.skip(reason)
    yield request.param
    forget()


@pytest.fixture
def native() -> None:
    """Skips the test where there is no native library."""
    if (reason := library.why_not()) is not None:
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small sizes gain nothing by more; a test that wants more says so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
