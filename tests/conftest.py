"""What test files share: float32 tests of the step family run on each backend, tiny networks on one thread."""

import eval_tools
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


@pytest.fixture(scope="session")
def network(tmp_path_factory):
    """A run of an untrained network."""
    return eval_tools.write_run(tmp_path_factory.mktemp("runs") / "network", eval_tools.tiny_unet())


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """60 digits as a folder and as an npz."""
    place, digits = tmp_path_factory.mktemp("sets"), eval_tools.digits(60)
    return eval_tools.write_folder(place / "folder", digits), eval_tools.write_npz(place / "images.npz", digits)
