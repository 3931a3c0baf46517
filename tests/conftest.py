"""What every test file shares: the fixture that runs a float32 test of the step family on each of its backends."""

import pytest
from op_tools import BACKENDS

import fastdiff as fd


@pytest.fixture(params=BACKENDS)
def each_backend(request):
    with fd.backend(request.param):
        yield request.param
