"""The Fréchet distance rises with every disturbance of the images (Heusel et al. 2017, figure 3), level by level."""

import pytest
import torch
from torch.nn import functional as F

from fastdiff.metrics import FID, kid, prdc, to_uint8

pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("one_thread")
LEVELS = (0.0, 0.25, 0.5, 0.75)


@pytest.fixture(scope="module")
def digits():
    """Scans of handwritten digits, 16 x 16, in [-1, 1]."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
    return F.interpolate(images, size=16, mode="bilinear")


def draw(kind, *shape):
    return getattr(torch, kind)(shape, generator=torch.Generator().manual_seed(0))


def gaussian_noise(x, level):
    return (1 - level) * x + level * draw("randn", *x.shape)


def gaussian_blur(x, level):
    sigma = 4 * level
    if not sigma:
        return x
    weights = torch.exp(-0.5 * (torch.arange(-8, 9) / sigma) ** 2)
    kernel = (weights / weights.sum())[None, None, None]
    for each in (kernel, kernel.mT):
        x = F.conv2d(F.pad(x, (0, 0, 8, 8) if each.shape[2] > 1 else (8, 8, 0, 0), mode="replicate"), each)
    return x


def black_rectangles(x, level):
    x, side = x.clone(), round(16 * level)
    for image, (top, left) in zip(x, (draw("rand", len(x), 2) * (17 - side)).long().tolist(), strict=True):
        image[:, top : top + side, left : left + side] = -1
    return x


def swirl(x, level):
    """Turned by an angle that falls with the distance from the middle."""
    grid = F.affine_grid(torch.eye(2, 3)[None], [1, 1, 16, 16], align_corners=False)
    angle = 6 * level * torch.exp(-1.5 * grid.norm(dim=-1))
    cos, sin = angle.cos(), angle.sin()
    turned = torch.stack((cos * grid[..., 0] - sin * grid[..., 1], sin * grid[..., 0] + cos * grid[..., 1]), -1)
    return F.grid_sample(x, turned.expand(len(x), -1, -1, -1), padding_mode="border", align_corners=False)


def salt_and_pepper(x, level):
    u = draw("rand", *x.shape)
    return torch.where(u < level / 2, -1.0, torch.where(u > 1 - level / 2, 1.0, x))


def contamination(x, level):
    """Some images are of another set: digits mirrored and white on black."""
    other = (torch.arange(len(x)) % 100 < 100 * level)[:, None, None, None]
    return torch.where(other, -x.flip(3), x)


DISTURBANCES = (gaussian_noise, gaussian_blur, black_rectangles, swirl, salt_and_pepper, contamination)


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
