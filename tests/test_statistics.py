"""Streaming mean and covariance, and FID as an object: any cut, order and number of processes; files; bad input."""

import math
import pickle
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing

import fastdiff as fd
from fastdiff.metrics import FID, FeatureStatistics, frechet_distance_from_features
from fastdiff.metrics.statistics import BLOCK, PANEL

F64 = torch.float64
pytestmark = pytest.mark.usefixtures("one_thread")


def features(n=500, d=24, mean=0.0, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=g, dtype=F64)
    return (torch.randn(n, d, generator=g, dtype=F64) @ mix + mean).to(dtype)


def of(*parts, d=24):
    made = FeatureStatistics(d)
    for part in parts:
        made.update(part)
    return made


def same(a, b, bound):
    assert a.count == b.count
    scale = float(b.covariance.abs().max())
    assert float((a.covariance - b.covariance).abs().max()) <= bound * scale
    assert float((a.mean - b.mean).abs().max()) <= bound * (1 + float(b.mean.abs().max()))


# ---- sums -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [0.0, 100.0, 1000.0])
@pytest.mark.parametrize("n", [2, 3, 500, BLOCK, 3 * BLOCK + 7])
def test_they_are_those_of_all_rows_at_once(n, mean):
    x = features(n, mean=mean)
    made, exact = of(*x.split(77)), x.double()
    assert made.count == n
    assert float((made.mean - exact.mean(0)).abs().max()) <= 1e-12 * (1 + abs(mean))
    truth = torch.cov(exact.T - exact.mean(0)[:, None])
    assert float((made.covariance - truth).abs().max()) <= 1e-12 * float(truth.abs().max())


def test_float32_sums_of_squares_would_be_wrong():
    x = features(4000, mean=1000.0)
    truth = torch.cov(x.double().T)
    naive = (x.T @ x - len(x) * x.mean(0).outer(x.mean(0))) / (len(x) - 1)
    assert float((naive - truth).abs().max()) > 1e-3 * float(truth.abs().max())
    assert float((of(x).covariance - truth).abs().max()) <= 1e-10 * float(truth.abs().max())


@pytest.mark.parametrize("cut", [1, 7, 100, 1023, 1024, 1025])
def test_neither_cuts_nor_order_matter(cut):
    x, mean = features(2600), torch.arange(24) * 50.0
    x = x + mean * torch.linspace(-1, 1, len(x))[:, None]  # blocks have means of their own
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    same(of(*x.split(cut)), of(x), 1e-10)
    same(of(*x[order].split(cut)), of(x), 1e-10)


@pytest.mark.parametrize("world", range(1, 9))
def test_parts_merge_to_the_whole(world):
    x = features(2 * BLOCK + 5, mean=100.0)
    parts = [of(*x[rank::world].split(300)) for rank in range(world)]
    before = parts[-1].covariance
    first, *others = parts
    for other in others:
        first.merge(other)
    same(first, of(x), 1e-10)
    assert world == 1 or torch.equal(parts[-1].covariance, before)
    first.update(x)  # and goes on
    same(first, of(x, x), 1e-10)


def test_an_empty_part_changes_nothing():
    x = features()
    made = of(x, x[:0])
    made.merge(FeatureStatistics(24))
    same(made, of(x), 0)
    empty = FeatureStatistics(24)
    empty.merge(made)
    same(empty, made, 1e-14)


def test_rows_are_taken_as_they_are_when_they_are_given():
    x = features()
    made, truth = FeatureStatistics(24), of(x)
    buffer = x.clone()
    made.update(buffer)
    buffer.zero_()
    same(made, truth, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_other_dtypes(dtype):
    x = (features() * 10).to(dtype)
    truth = torch.cov(x.double().T)
    assert float((of(*x.split(99)).covariance - truth).abs().max()) <= 1e-12 * float(truth.abs().max())


def test_memory_does_not_grow_with_the_rows():
    made, x = FeatureStatistics(64), features(256, 64)
    made.update(x)
    before = len(pickle.dumps(vars(made)))
    for _ in range(200):
        made.update(x)
    assert len(pickle.dumps(vars(made))) < before + 100


@pytest.mark.parametrize("width", [1, PANEL - 1, PANEL, PANEL + 1, 2 * PANEL + 44])
def test_any_width(width):
    x = features(50, width)
    made = of(x, d=width)
    assert torch.equal(made.covariance, made.covariance.mT)
    assert torch.allclose(made.covariance, torch.cov(x.double().T).view(width, width), rtol=1e-12, atol=1e-14)


# ---- files ----------------------------------------------------------------------------------


def test_a_file_gives_back_what_was_saved(tmp_path):
    made = of(features())
    made.save(tmp_path / "a.npz")
    loaded = FeatureStatistics.load(tmp_path / "a.npz")
    same(loaded, made, 1e-15)
    loaded.merge(of(features(seed=1)))
    same(loaded, of(features(), features(seed=1)), 1e-12)


def test_peers_read_it_and_it_reads_theirs(tmp_path):
    made = of(features())
    made.save(tmp_path / "ours.npz")
    with np.load(tmp_path / "ours.npz") as file:  # as pytorch-fid and EDM do
        assert np.array_equal(file["mu"], made.mean.numpy())
        assert np.array_equal(file["sigma"], made.covariance.numpy())
    np.savez(tmp_path / "theirs.npz", mu=made.mean.numpy(), sigma=made.covariance.numpy())
    loaded = FeatureStatistics.load(tmp_path / "theirs.npz")
    assert loaded.count == 0
    assert torch.equal(loaded.mean, made.mean)
    assert torch.equal(loaded.covariance, made.covariance)
    for change in (lambda: loaded.update(features()), lambda: loaded.merge(made), lambda: made.merge(loaded)):
        with pytest.raises(fd.InputError, match="does not say of how many rows"):
            change()


EYE = np.eye(3)
FILES = {
    "missing": (None, "does not exist"),
    "text": (b"mu, sigma", "is no .npz file of arrays"),
    "cut short": ("half", "is no .npz file of arrays|damaged"),
    "other arrays": ({"arr_0": EYE}, "lacks mu, sigma: it holds arr_0"),
    "shapes": ({"mu": EYE, "sigma": EYE}, r"must hold mu \[d\] and sigma \[d, d\]"),
    "NaN": ({"mu": EYE[0], "sigma": EYE * np.nan}, "holds NaN"),
    "pickles": ({"mu": np.array([{"a": 1}], dtype=object), "sigma": EYE}, "is no .npz file of arrays"),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_files_are_named(case, tmp_path):
    content, message = FILES[case]
    path = tmp_path / "file.npz"
    if isinstance(content, dict):
        np.savez(path, **content)
    elif content == "half":
        of(features()).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif content:
        path.write_bytes(content)
    with pytest.raises(fd.InputError, match=message) as caught:
        FeatureStatistics.load(path)
    assert "file.npz" in str(caught.value)


def test_no_damage_is_anything_but_an_input_error(tmp_path):
    path, random = tmp_path / "a.npz", np.random.default_rng(0)
    of(features()).save(path)
    whole = path.read_bytes()
    for _ in range(300):
        damaged = bytearray(whole)
        for place in random.integers(0, len(whole), 3):
            damaged[place] ^= 1 << int(random.integers(0, 8))
        path.write_bytes(damaged[: int(random.integers(1, len(whole) + 1))] if random.random() < 0.3 else damaged)
        with suppress(fd.InputError):
            FeatureStatistics.load(path)


def test_nothing_half_written_where_there_is_nothing_to_save(tmp_path):
    with pytest.raises(fd.InputError, match="at least 2 features, there were 1"):
        of(features(1)).save(tmp_path / "a.npz")
    assert not list(tmp_path.iterdir())


# ---- bad features ---------------------------------------------------------------------------

BAD = {
    "width": (torch.zeros(3, 5), "24 wide, as those before, got 5"),
    "NaN": (torch.zeros(3, 24).index_fill(0, torch.tensor([2]), math.nan), "NaN or infinite values, first in row 2"),
    "one row": (torch.zeros(24), r"must be features \[N, D\], got \[24\]"),
    "text": ("features", "must be features"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_features_are_named_and_not_taken_up(case):
    made = of(features())
    wrong, message = BAD[case]
    with pytest.raises(fd.InputError, match=message):
        made.update(wrong)
    same(made, of(features()), 0)


def test_statistics_of_nothing():
    with pytest.raises(fd.InputError, match="no mean of no features"):
        _ = FeatureStatistics(3).mean
    with pytest.raises(fd.InputError, match="dim must be a whole number"):
        FeatureStatistics(0)
    with pytest.raises(fd.InputError, match="24 wide, got 3"):
        of(features()).merge(FeatureStatistics(3))


# ---- FID ------------------------------------------------------------------------------------


def images(n, seed=0, channels=3, size=4):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), generator=g, dtype=torch.uint8)


def pixels(x):
    return x.flatten(1).float()


def fid_of(real, fake, **options):
    metric = FID(pixels, **options)
    for kind, x in ((True, real), (False, fake)):
        for part in x.split(50):
            metric.update(part, real=kind)
    return metric


def test_it_is_the_distance_of_the_features():
    real, fake = images(300), images(200, seed=1) // 2
    found = fid_of(real, fake).compute()
    assert found.shape == ()
    assert float(found) == pytest.approx(frechet_distance_from_features(pixels(fake), pixels(real)), rel=1e-9)
    assert float(fid_of(real, real).compute()) == 0


def test_torchmetrics_object_says_the_same():
    module = pytest.importorskip("torchmetrics.image.fid")

    class Pixels(torch.nn.Module):
        num_features = 48

        def forward(self, x):
            return pixels(x)

    theirs, (real, fake) = module.FrechetInceptionDistance(Pixels()), (images(300), images(200, seed=1) // 2)
    theirs.update(real, real=True), theirs.update(fake, real=False)
    assert float(fid_of(real, fake).compute()) == pytest.approx(float(theirs.compute()), rel=1e-4)


@pytest.mark.parametrize("keeps", [False, True])
def test_reset(keeps):
    metric = fid_of(images(100), images(100, seed=1), reset_real_features=not keeps)
    metric.reset()
    metric.update(images(90, seed=2), real=False)
    if keeps:
        assert metric.compute() == fid_of(images(100), images(90, seed=2)).compute()
    else:
        with pytest.raises(fd.InputError, match="at least 2 real images are needed, there were 0"):
            metric.compute()


def test_float_images():
    real, fake = images(100), images(100, seed=1)
    metric = fid_of(real / 255, fake / 255, normalize=True)
    assert metric.compute() == fid_of(real, fake).compute()
    for wrong, message in ((real / 255 * 2, r"\[0, 1\], got 0 to 2"), (real, "takes float images")):
        with pytest.raises(fd.InputError, match=message):
            metric.update(wrong, real=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (images(5).float(), r"uint8 \[N, C, H, W\], got torch.float32; .* fd.metrics.to_uint8"),
        (images(5, channels=2), "1 or 3 channels"),
        (images(5)[0], r"got \[3, 4, 4\]"),
        (images(5, size=6), "48 wide, as those before, got 108"),
    ],
)
def test_bad_images_are_named(wrong, message):
    metric = fid_of(images(100), images(100))
    with pytest.raises(fd.InputError, match=message):
        metric.update(wrong, real=True)
    assert metric.compute() == 0


def test_bad_extractors_are_named():
    for extractor, message in (
        (lambda x: pixels(x)[:-1], "gave 4 rows of pool for 5 images"),
        (lambda x: pixels(x) * math.nan, "extractor's pool holds NaN or infinite values, first in row 0"),
        (lambda x: x, r"extractor's pool must be features \[N, D\]"),
    ):
        with pytest.raises(fd.InputError, match=message):
            FID(extractor).update(images(5), real=True)
    with pytest.raises(fd.InputError, match="feature_extractor must be callable"):
        FID("inception")


def test_more_features_than_samples_are_warned_of():
    with pytest.warns(UserWarning, match=r"20 samples of 48 features: .* rank 19 .* biased upwards, by .* means alone"):
        fid_of(images(100), images(20, seed=1)).compute()


def _rank(rank, world, n, place):
    distributed.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=world)
    real, fake = images(n)[rank::world], images(n, seed=1)[rank::world]
    torch.save(fid_of(real, fake).compute(), f"{place}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.parametrize(("n", "world"), [(101, 2), pytest.param(100, 3, marks=pytest.mark.slow)])
def test_processes_count_each_image_once(n, world, tmp_path):
    multiprocessing.spawn(_rank, (world, n, tmp_path), nprocs=world)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    assert all(result == results[0] for result in results)
    alone = fid_of(images(n), images(n, seed=1)).compute()
    assert float(results[0]) == pytest.approx(float(alone), rel=1e-10)
