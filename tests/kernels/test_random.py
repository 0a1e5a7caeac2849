"""Native splitmix64 against the plain one, on every build and any number of threads."""

import pytest
import torch

from raysparse.kernels import random as splitmix
from tests.sparsity.test_counter import WORD, signed, splitmix64

KEYS = [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 16, 17, 31, 33, 1009])
def test_keys(build, threads, count):
    torch.set_num_threads(threads)
    for key in KEYS:
        for first in (0, 5, 2**40 + 1):
            found = splitmix.random_keys(first, count, key)
            assert found.dtype == torch.int32
            assert found.tolist() == [splitmix64((first + i + key) % WORD) >> 33 for i in range(count)]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 16, 17, 31, 33, 1009])
def test_mix(build, threads, count):
    torch.set_num_threads(threads)
    index = torch.randint(-(2**62), 2**62, (count,), generator=torch.Generator().manual_seed(count))
    for key in KEYS:
        assert splitmix.mix(index, key).tolist() == [signed(splitmix64((i + key) % WORD)) for i in index.tolist()]


def test_what_is_not_as_it_should_be_never_reaches_native_code(native):
    with pytest.raises(ValueError, match="int32"):
        splitmix.mix(torch.zeros(3, dtype=torch.int32), 0)
    with pytest.raises(ValueError, match="strides"):
        splitmix.mix(torch.zeros(6, dtype=torch.int64)[::2], 0)
    with pytest.raises(ValueError, match="-1"):
        splitmix.random_keys(0, -1, 0)
