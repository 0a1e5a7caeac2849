"""Live elements taken out and put back, bit by bit, natively and by torch."""

from itertools import product

import pytest
import torch

from raysparse.kernels import library
from raysparse.kernels.live import Live
from tests.kernels.conftest import forget

SIZES = [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 130, 1023, 1024, 1025]
DTYPES = [torch.float32, torch.bfloat16]


def check_drawn(rng):
    """Any shape, density and bits (NaNs too): what boolean indexing finds, and zeros between."""
    rows, cols, dtype = min(rng.choice(SIZES), 65), rng.choice(SIZES), rng.choice(DTYPES)
    generator = torch.Generator().manual_seed(rng.getrandbits(31))
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    dense = torch.randint(-(2**15), 2**15, (rows, cols), generator=generator, dtype=integers).view(dtype)
    check(dense, torch.rand(rows, cols, generator=generator) < rng.choice([0.0, 0.05, 0.25, 0.5, 0.9, 1.0]))


def check(dense, mask):
    integers = torch.int32 if dense.element_size() == 4 else torch.int16
    live = Live(mask)
    taken = live.take(dense)
    assert torch.equal(taken.view(integers), dense.view(integers)[mask])
    put = live.put(taken, torch.full_like(dense, torch.nan))
    assert torch.equal(put.view(integers), dense.view(integers).where(mask, torch.zeros((), dtype=integers)))
    assert torch.equal(live.take(dense.flatten(), torch.empty_like(taken)).view(integers), taken.view(integers))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_taken_and_put_back(build, dtype, threads):
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    for rows, cols, density in product([0, 1, 3, 67], SIZES, [0.0, 0.25, 1.0]):
        dense = torch.randn(rows, cols, generator=generator).to(dtype)
        if dense.numel():
            dense.view(-1)[0] = -0.0
        check(dense, torch.rand(rows, cols, generator=generator) < density)


def test_without_the_library_torch_does_it(monkeypatch):
    monkeypatch.setenv(library.CHOICE, "off")
    forget()
    try:
        assert Live(torch.ones(2, 3, dtype=torch.bool))._way == "torch"
        for dtype in DTYPES:
            check(torch.randn(5, 37).to(dtype), torch.rand(5, 37) < 0.3)
    finally:
        monkeypatch.undo()
        forget()


@pytest.mark.parametrize(
    ("dense", "live", "text"),
    [
        (torch.zeros(2, 3), torch.zeros(5), r"\(5,\) for 6"),
        (torch.zeros(3, 3), torch.zeros(6), r"\(3, 3\) for \(2, 3\)"),
        (torch.zeros(2, 3), torch.zeros(6).bfloat16(), "float32 torch.bfloat16"),
        (torch.zeros(2, 3).double(), torch.zeros(6).double(), "float64"),
        (torch.zeros(3, 2).T, torch.zeros(6), r"\(1, 2\)"),
    ],
)
def test_what_does_not_fit_is_refused(dense, live, text):
    for run in (lambda: Live(torch.ones(2, 3, dtype=torch.bool)).take(dense, live), lambda: Live(torch.ones(2, 3) > 0).put(live, dense)):
        with pytest.raises(ValueError, match=text):
            run()
