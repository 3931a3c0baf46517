"""The Fréchet distance rises with every disturbance of the images (Heusel et al. 2017, figure 3), level by level."""

import pytest
import torch
from torch.nn import functional as F

from fastdiff.metrics import FID, kid, prdc, to_uint8
from fastdiff.reproduce.recipes.disturbances import DISTURBANCES

pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("one_thread")
LEVELS = (0.0, 0.25, 0.5, 0.75)


@pytest.fixture(scope="module")
def digits():
    """Scans of handwritten digits, 16 x 16, in [-1, 1]."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
    return F.interpolate(images, size=16, mode="bilinear")


def edges(images):
    """Pixels, coarse pixels and differences of neighbours: a look at images that needs no weights."""
    x = images.float() / 127.5 - 1
    parts = (F.avg_pool2d(x, 2), F.avg_pool2d(x.diff(dim=2).abs(), 3), F.avg_pool2d(x.diff(dim=3).abs(), 3))
    return torch.cat([part.flatten(1) for part in parts], 1)


@pytest.mark.parametrize("disturb", DISTURBANCES, ids=lambda f: f.__name__)
def test_distances_rise_with_every_disturbance(disturb, digits):
    real, found = to_uint8(digits[::2]), []
    for level in LEVELS:
        images = to_uint8(disturb(digits[1::2], level))
        fid = FID(edges)
        fid.update(real, real=True), fid.update(images, real=False)
        a, b = edges(real), edges(images)
        found.append((float(fid.compute()), kid(b, a, subset_size=500, subsets=4).value, 1 - prdc(a, b).coverage))
    *distances, uncovered = (list(values) for values in zip(*found, strict=True))
    for values in (*distances, uncovered):
        assert values == sorted(values)
    for values in distances:
        assert len(set(values)) == len(LEVELS)
    assert uncovered[0] < uncovered[-1]
