"""What test files share: float32 tests of the step family run on each backend, tiny networks on one thread."""

import pytest
import torch
from op_tools import BACKENDS

import fastdiff as fd


@pytest.fixture(params=BACKENDS)
def each_backend(request):
    with fd.backend(request.param):
        yield request.param


@pytest.fixture(scope="module")
def one_thread():
    """For tiny networks: threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
