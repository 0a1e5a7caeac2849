"""For all tests of the pure core."""

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two only get in each other's way on tensors as small as these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
