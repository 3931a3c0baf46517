"""Data sets: files in their real formats come back exactly, draws follow their laws, bad input ends in one line."""

import gzip
import json
import math
import os
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from data_tools import CIFAR_CLASSES, colours, grey_images, rng, save, write_cifar, write_emnist, write_gz, write_mnist
from PIL import Image
from scipy import stats
from torchvision import datasets

from fastdiff.errors import InputError
from fastdiff.training import data
from fastdiff.training.data import NAMES, POINTS, Data, from_tensor, load, points

POINT_SETS = ("swiss-roll", "moons-circles", "parabola")
LETTER = np.zeros((28, 28), np.uint8)  # an upright L
LETTER[4:24, 8:11] = LETTER[21:24, 8:20] = 255


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A machine without a network."""

    def fail(*args, **kwargs):
        raise urllib.error.URLError("no network\nhere")

    monkeypatch.setattr(urllib.request, "urlopen", fail)


def everything(dataset: Data):
    return dataset.batch(torch.arange(len(dataset)))


def everything_but(dataset: Data, index: int):
    return dataset.batch(torch.tensor([i for i in range(len(dataset)) if i != index]))[0]


def error(call, *args, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert message == message.strip() != ""
    return message


# ---- the archives ---------------------------------------------------------------------------


def assert_holds(dataset: Data, images, labels):
    """The images are the network's input times 127.5 plus 127.5, exactly, and the labels are the labels."""
    x, y = everything(dataset)
    raw = torch.as_tensor(images)
    assert x.dtype == torch.float32
    assert x.shape == (len(dataset), *dataset.shape) == raw.shape
    assert torch.equal(dataset.to_raw(x), raw)
    assert torch.equal(x, ((raw.double() - 127.5) / 127.5).float())
    assert y.dtype == torch.int64
    assert y.tolist() == list(labels)


@pytest.mark.parametrize(("name", "kind"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_compressed_files_as_distributed(tmp_path, monkeypatch, name, kind) -> None:
    images, labels = write_gz(tmp_path, kind, monkeypatch)
    dataset = load(f"{name}:{tmp_path}")
    assert_holds(dataset, images[:, None], labels)
    assert (dataset.shape, dataset.mean, dataset.std) == ((1, 28, 28), (127.5,), (127.5,))
    assert len(dataset.classes) == 10
    assert dataset.source.read(torch.arange(1)).dtype == torch.uint8


def test_names_of_classes(tmp_path) -> None:
    write_mnist(tmp_path)
    write_mnist(tmp_path, "FashionMNIST")
    assert load(f"mnist:{tmp_path}").classes == tuple("0123456789")
    assert load(f"fashion-mnist:{tmp_path}").classes[:2] == ("T-shirt/top", "Trouser")


def test_emnist_is_upright_and_counts_from_zero(tmp_path, monkeypatch) -> None:
    images = np.stack((LETTER, *grey_images()))
    labels = np.array([12, 1, 26, 2, 25, 13])
    write_emnist(tmp_path, monkeypatch, images.transpose(0, 2, 1), labels)
    dataset = load(f"emnist:{tmp_path}")
    assert_holds(dataset, images[:, None], labels - 1)
    assert dataset.classes == tuple("abcdefghijklmnopqrstuvwxyz")
    assert dataset.classes[int(dataset.batch(torch.tensor([0]))[1])] == "l"


def test_cifar10_as_python_2_wrote_it(tmp_path, monkeypatch) -> None:
    images, labels = write_cifar(tmp_path, monkeypatch)
    dataset = load(f"cifar10:{tmp_path}")
    assert_holds(dataset, images, labels)
    assert (dataset.shape, dataset.classes) == ((3, 32, 32), tuple(CIFAR_CLASSES))
    assert dataset.mean == dataset.std == (127.5,) * 3


def test_root_is_the_path_or_the_environment_or_data(tmp_path, monkeypatch) -> None:
    for i, place in enumerate(("path", "environment", "here/data")):
        write_mnist(tmp_path / place, labels=np.full(5, i))
    (tmp_path / "here").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("FASTDIFF_DATA", raising=False)
    assert int(everything(load("mnist"))[1][0]) == 2
    monkeypatch.setenv("FASTDIFF_DATA", str(tmp_path / "environment"))
    assert int(everything(load("mnist"))[1][0]) == 1
    assert int(everything(load(f"mnist:{tmp_path / 'path'}"))[1][0]) == 0


def stripes(size: int) -> np.ndarray:
    """Every fourth column is white: brought to a quarter of its size it is 255 / 4 grey, without antialiasing black."""
    return np.where(np.arange(size) % 4, 0, 255)[None].repeat(size, 0)


def test_archive_resizes_with_antialiasing(tmp_path) -> None:
    images = np.stack((stripes(28), np.full((28, 28), 77)))
    write_mnist(tmp_path, images=images)
    small = load(f"mnist:{tmp_path}", image_size=7)
    raw = small.to_raw(everything(small)[0])
    assert small.shape == (1, 7, 7)
    assert raw.shape == (2, 1, 7, 7)
    assert ((raw[0, :, :, 1:-1].float() - 255 / 4).abs() < 8).all()
    assert (raw[1] == 77).all()
    assert_holds(load(f"mnist:{tmp_path}", image_size=28), images[:, None], [0, 1])


def test_many_images_resize_as_each_alone(tmp_path) -> None:
    images, _ = write_mnist(tmp_path, images=rng().integers(0, 256, (2300, 28, 28), dtype=np.uint8))
    many = everything(load(f"mnist:{tmp_path}", image_size=8))[0]
    write_mnist(tmp_path, images=images[1999:2000])
    assert torch.equal(everything(load(f"mnist:{tmp_path}", image_size=8))[0][0], many[1999])


def test_what_is_there_is_not_downloaded(tmp_path, monkeypatch) -> None:
    write_mnist(tmp_path)
    write_emnist(tmp_path, monkeypatch, grey_images(), np.arange(1, 6))
    write_cifar(tmp_path, monkeypatch)
    names = [f"{name}:{tmp_path}" for name in ("mnist", "emnist", "cifar10")]
    before = [len(load(name)) for name in names]
    for kind in (datasets.MNIST, datasets.EMNIST, datasets.CIFAR10):
        monkeypatch.setattr(kind, "download", None)
    assert [len(load(name)) for name in names] == before == [5, 5, 15]


def test_missing_archives(tmp_path) -> None:
    for name, files in (("mnist", "t10k-labels-idx1-ubyte"), ("cifar10", "data_batch_5"), ("emnist", "emnist-letters")):
        message = error(load, f"{name}:{tmp_path / 'nowhere'}")
        assert message.startswith(name)
        assert str(tmp_path / "nowhere") in message
        assert files in message
        assert "no network" in message


def test_wrong_checksum_of_compressed_file(tmp_path, monkeypatch) -> None:
    write_gz(tmp_path, "MNIST", monkeypatch)
    (tmp_path / "MNIST/raw/train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"nonsense"))
    assert str(tmp_path) in error(load, f"mnist:{tmp_path}")


DAMAGE = {
    "truncated": lambda content: content[:-1],
    "empty": lambda content: b"",
    "half a header": lambda content: content[:6],
    "too long": lambda content: content + b"\0",
    "another type": lambda content: content[:2] + b"\x0d" + content[3:],
    "no such type": lambda content: content[:2] + b"\x63" + content[3:],
    "nonsense": lambda content: b"\xff" * len(content),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("part", ["images-idx3", "labels-idx1"])
def test_damaged_archive(tmp_path, part, damage) -> None:
    write_mnist(tmp_path)
    file = tmp_path / "MNIST/raw" / f"train-{part}-ubyte"
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    message = error(load, f"mnist:{tmp_path}")
    assert message.startswith("mnist: ")
    assert str(tmp_path / "MNIST/raw") in message
    assert "damaged" in message


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, 1, 2, 3, 10]])
def test_labels_that_do_not_fit_the_archive(tmp_path, labels) -> None:
    write_mnist(tmp_path, labels=np.array(labels))
    message = error(load, f"mnist:{tmp_path}")
    assert str(tmp_path / "MNIST/raw") in message
    assert "labels" in message


def test_damaged_cifar10(tmp_path, monkeypatch) -> None:
    write_cifar(tmp_path, monkeypatch)
    file = tmp_path / "cifar-10-batches-py/data_batch_3"
    file.write_bytes(file.read_bytes()[:-5] + b"other")
    message = error(load, f"cifar10:{tmp_path}")
    assert str(file.parent) in message
    assert "damaged" in message
    assert "no network" not in message


def test_root_that_is_a_file(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in error(load, f"mnist:{tmp_path / 'file'}")


# ---- folders --------------------------------------------------------------------------------


def first(dataset: Data, index=0):
    """Raw pixels ``[H, W, C]`` of one image."""
    return dataset.to_raw(dataset.batch(torch.tensor([index]))[0])[0].permute(1, 2, 0).numpy()


def test_folder_without_classes(tmp_path) -> None:
    images = [colours(seed=i) for i in range(4)]
    for i, ending in enumerate(("png", "PNG", "bmp", "webp")):
        save(tmp_path / f"{i}.{ending}", images[i], **({"lossless": True} if ending == "webp" else {}))
    dataset = load(f"folder:{tmp_path}")
    x, y = everything(dataset)
    assert y is None
    assert (len(dataset), dataset.shape, dataset.classes) == (4, (3, 16, 16), ())
    assert dataset.mean == dataset.std == (127.5,) * 3
    assert np.array_equal(dataset.to_raw(x).permute(0, 2, 3, 1).numpy(), np.stack(images))
    assert float(x.min()) >= -1
    assert float(x.max()) <= 1


@pytest.mark.parametrize("ending", ["jpg", "jpeg", "JPG"])
def test_jpeg_is_what_pil_decodes(tmp_path, ending) -> None:
    path = save(tmp_path / f"a.{ending}", colours())
    with Image.open(path) as image:
        assert np.array_equal(first(load(f"folder:{tmp_path}")), np.asarray(image))


def test_sub_folders_are_classes_in_order(tmp_path) -> None:
    for i, place in enumerate(("b/1.png", "a/2.png", "a/deep/er/3.png", "c/0.png")):
        save(tmp_path / place, np.full((8, 8, 3), i))
    dataset = load(f"folder:{tmp_path}")
    x, y = everything(dataset)
    assert dataset.classes == ("a", "b", "c")
    assert y.dtype == torch.int64
    found = [(int(value), int(label)) for value, label in zip(dataset.to_raw(x)[:, 0, 0, 0], y, strict=True)]
    assert sorted(found) == [(0, 1), (1, 0), (2, 0), (3, 2)]
    assert dataset.batch(torch.tensor([3, 0]))[1].tolist() == [int(y[3]), int(y[0])]


def test_images_beside_sub_folders_have_no_classes(tmp_path) -> None:
    save(tmp_path / "a/1.png", colours())
    save(tmp_path / "2.png", colours())
    dataset = load(f"folder:{tmp_path}")
    assert (len(dataset), dataset.classes, everything(dataset)[1]) == (2, (), None)


def test_other_and_hidden_files_are_ignored(tmp_path) -> None:
    save(tmp_path / "a/1.png", colours())
    save(tmp_path / ".thumbnails/1.png", colours())
    save(tmp_path / "a/.1.png", colours())
    (tmp_path / "empty").mkdir()
    for name in ("notes.txt", "a/labels.csv", "png", ".png"):
        (tmp_path / name).write_text("no image")
    dataset = load(f"folder:{tmp_path}")
    assert (len(dataset), dataset.classes) == (1, ("a",))


def test_links_are_followed_but_not_in_circles(tmp_path) -> None:
    save(tmp_path / "elsewhere/1.png", colours())
    save(tmp_path / "set/b/2.png", colours())
    os.symlink(tmp_path / "elsewhere", tmp_path / "set/a")
    os.symlink(tmp_path / "set", tmp_path / "set/b/round")
    dataset = load(f"folder:{tmp_path / 'set'}")
    assert (len(dataset), dataset.classes) == (2, ("a", "b"))
    assert everything(dataset)[1].tolist() == [0, 1]


def test_grey_folder_has_one_channel(tmp_path) -> None:
    pixels = colours()[..., 0]
    save(tmp_path / "1.png", pixels)
    save(tmp_path / "2.png", pixels, "1")
    save(tmp_path / "3.jpg", pixels)
    dataset = load(f"folder:{tmp_path}")
    assert dataset.shape == (1, 16, 16)
    assert np.array_equal(first(dataset)[..., 0], pixels)
    assert set(np.unique(first(dataset, 1))) == {0, 255}
    save(tmp_path / "4.png", colours())
    mixed = load(f"folder:{tmp_path}")
    assert mixed.shape == (3, 16, 16)
    assert np.array_equal(first(mixed), np.repeat(pixels[..., None], 3, -1))


def test_only_the_first_sixteen_decide_about_channels(tmp_path) -> None:
    for i in range(16):
        save(tmp_path / f"{i:02}.png", colours()[..., 0])
    save(tmp_path / "16.png", np.full((16, 16, 3), 99))
    dataset = load(f"folder:{tmp_path}")
    assert dataset.shape == (1, 16, 16)
    assert (first(dataset, 16) == 99).all()


def test_transparency_is_dropped(tmp_path) -> None:
    pixels = colours(channels=4)
    save(tmp_path / "1.png", pixels)
    save(tmp_path / "2.png", pixels[..., :2], "LA")
    dataset = load(f"folder:{tmp_path}")
    assert dataset.shape == (3, 16, 16)
    assert np.array_equal(first(dataset), pixels[..., :3])


@pytest.mark.parametrize("options", [{}, {"transparency": bytes(range(200))}, {"transparency": 3}])
def test_palette(tmp_path, options) -> None:
    palette, pixels = rng(1).integers(0, 256, (256, 3), dtype=np.uint8), colours()[..., 0]
    image = Image.fromarray(pixels).convert("P")
    image.putpalette(palette.tobytes())
    image.save(tmp_path / "1.png", **options)
    with Image.open(tmp_path / "1.png") as saved:
        indices = np.asarray(saved)
    assert np.array_equal(first(load(f"folder:{tmp_path}")), palette[indices])


@pytest.mark.parametrize("transposed", [False, True])
def test_centre_square(tmp_path, transposed) -> None:
    pixels = colours(16, 40)
    save(tmp_path / "1.png", pixels.transpose(1, 0, 2) if transposed else pixels)
    seen = first(load(f"folder:{tmp_path}"))
    assert np.array_equal(seen.transpose(1, 0, 2) if transposed else seen, pixels[:, 12:28])


def test_resize_keeps_proportions_and_antialiases(tmp_path) -> None:
    pixels = np.zeros((32, 96, 3))
    pixels[:, 32:64] = stripes(32)[..., None]
    save(tmp_path / "1.png", pixels)
    dataset = load(f"folder:{tmp_path}", image_size=8)
    assert dataset.shape == (3, 8, 8)
    assert (abs(first(dataset)[:, 1:-1] - 255 / 4) < 8).all()


def test_photographs_are_turned_upright(tmp_path) -> None:
    pixels, exif = colours(), Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees to the right
    save(tmp_path / "1.png", pixels, exif=exif)
    assert np.array_equal(first(load(f"folder:{tmp_path}")), np.rot90(pixels, -1))


@pytest.mark.parametrize(("height", "width", "size"), [(16, 16, 16), (21, 35, 16), (35, 24, 24), (5, 50, 8), (8, 8, 8)])
def test_default_size(tmp_path, height, width, size) -> None:
    save(tmp_path / "1.png", colours(height, width))
    save(tmp_path / "2.png", colours(64, 65))
    dataset = load(f"folder:{tmp_path}")
    assert dataset.shape == (3, size, size)
    assert everything(dataset)[0].shape == (2, 3, size, size)


def test_images_are_read_when_asked_for(tmp_path) -> None:
    for i in range(3):
        save(tmp_path / f"{i}.png", colours(seed=i))
    dataset = load(f"folder:{tmp_path}")
    (tmp_path / "1.png").unlink()
    assert everything_but(dataset, 1).shape == (2, 3, 16, 16)
    assert str(tmp_path / "1.png") in error(everything, dataset)


@pytest.mark.parametrize("share", [0.5, 0.98])
@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "webp"])
def test_truncated_image_is_named(tmp_path, ending, share) -> None:
    save(tmp_path / "a.png", colours())
    path = save(tmp_path / f"broken.{ending}", colours(64, 64))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert str(path) in error(lambda: everything(load(f"folder:{tmp_path}")))


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0\x00\x10JFIF"])
def test_file_that_is_no_image(tmp_path, content) -> None:
    for i in range(17):
        save(tmp_path / f"{i:02}.png", colours())
    (tmp_path / "99.png").write_bytes(content)
    dataset = load(f"folder:{tmp_path}")
    assert everything_but(dataset, 17).shape == (17, 3, 16, 16)
    assert str(tmp_path / "99.png") in error(everything, dataset)
    (tmp_path / "00.png").write_bytes(content)
    assert str(tmp_path / "00.png") in error(load, f"folder:{tmp_path}")


def test_sixteen_bit_images_are_refused(tmp_path) -> None:
    Image.fromarray(np.full((16, 16), 40000, np.uint16)).save(tmp_path / "deep.png")
    message = error(lambda: everything(load(f"folder:{tmp_path}")))
    assert str(tmp_path / "deep.png") in message
    assert "8-bit" in message


# ---- digits and points ----------------------------------------------------------------------


def test_digits_are_the_real_ones() -> None:
    from sklearn.datasets import load_digits

    digits, dataset = load_digits(), load("digits")
    x, y = everything(dataset)
    assert (len(dataset), dataset.shape, dataset.classes) == (1797, (1, 8, 8), tuple("0123456789"))
    assert torch.equal(x[:, 0], torch.from_numpy(digits.images).float() / 8 - 1)
    assert torch.equal(y, torch.from_numpy(digits.target))
    raw = dataset.to_raw(x)
    assert raw.dtype == torch.uint8
    assert torch.equal(raw[:, 0], (torch.from_numpy(digits.images) * 255 / 16).round().to(torch.uint8))
    assert load("digits", image_size=16).shape == (1, 16, 16)


@pytest.mark.parametrize("name", POINT_SETS)
def test_training_points_are_standardised(name) -> None:
    dataset = load(name)
    x, y = everything(dataset)
    assert y is None
    assert dataset.is_points
    assert (len(dataset), dataset.shape, dataset.classes) == (POINTS, (2,), ())
    assert torch.allclose(x.double().mean(0), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-6)
    assert torch.allclose(x.double().var(0, correction=0), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-6)
    raw = dataset.to_raw(x)
    assert raw.dtype == torch.float32
    assert torch.allclose(raw, points(name, POINTS, 0), atol=2e-5)


def test_description_survives_json() -> None:
    dataset = load("parabola")
    described = json.loads(json.dumps(dataset.to_json()))
    assert described == dataset.to_json()
    assert described == {
        "name": "parabola",
        "shape": [2],
        "classes": [],
        "mean": list(dataset.mean),
        "std": list(dataset.std),
    }


@pytest.mark.parametrize("name", POINT_SETS)
def test_seeds(name) -> None:
    draw = points(name, 1000, 7)
    assert draw.dtype == torch.float32
    assert draw.shape == (1000, 2)
    assert torch.equal(draw, points(name, 1000, 7))
    assert not torch.isin(points(name, 1000, 8), draw).any()
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    assert torch.equal(draw, points(name, 1000, 7))


def assert_near(value, expected, deviation):
    assert abs(float(value) - expected) < 5 * deviation


def test_moments_of_the_parabola() -> None:
    x, y = points("parabola", POINTS, 1).double().unbind(1)
    root = math.sqrt(POINTS)
    assert_near(x.mean(), 0, 4 / root)
    assert_near(x.var(), 16, 16 * math.sqrt(2) / root)
    assert_near(y.mean(), 4, math.sqrt(33) / root)  # E y = E x^2 / 4; Var y = 1 + Var(x^2) / 16 = 1 + 2 * 16^2 / 16
    assert_near((x * y).mean(), 0, math.sqrt(16 * 1 + 15 * 16**3 / 16) / root)
    assert_near((y - x**2 / 4).var(), 1, math.sqrt(2) / root)
    assert stats.kstest((y - x**2 / 4).numpy(), "norm").pvalue > 1e-4
    assert stats.kstest(x.numpy() / 4, "norm").pvalue > 1e-4


def test_swiss_roll_is_a_roll() -> None:
    """Coordinates t cos t and t sin t with t uniform on 1.5 pi ... 4.5 pi: E r^2 = E t^2, plus the noise."""
    draw = points("swiss-roll", POINTS, 1).double()
    low, high = 1.5 * math.pi, 4.5 * math.pi
    moment = {k: (high ** (k + 1) - low ** (k + 1)) / ((k + 1) * (high - low)) for k in (2, 4)}
    deviation = math.sqrt(moment[4] - moment[2] ** 2 + 4 * moment[2] * 0.25 + 4 * 0.25**2)
    assert_near(draw.square().sum(1).mean(), moment[2] + 2 * 0.25, deviation / math.sqrt(POINTS))
    assert (draw.norm(dim=1) > low - 3).all()
    assert (draw.norm(dim=1) < high + 3).all()
    # Radius minus angle: the noise across the curve, and to first order 1 / t of that along it.
    residual = draw.norm(dim=1) - torch.atan2(draw[:, 1], draw[:, 0])
    residual = torch.remainder(residual + math.pi, math.tau) - math.pi
    assert float(residual.std()) == pytest.approx(0.5 * math.sqrt(1 + 1 / (low * high)), rel=0.01)


def test_components_of_moons_and_circles() -> None:
    draw = points("moons-circles", POINTS, 1).double()
    circles = draw[(draw < 7).all(1)]
    moons = draw[(draw > 7).all(1)] - 15
    assert len(circles) + len(moons) == POINTS
    half = math.sqrt(0.25 * POINTS)
    assert_near(len(circles), POINTS / 2, half)
    radius = circles.norm(dim=1)
    assert_near((radius > 0.5).sum(), len(circles) / 2, math.sqrt(0.25 * len(circles)))
    assert_near(radius[radius > 0.5].mean(), 1 + 0.01**2 / 2, 0.01 / math.sqrt(POINTS / 4))
    assert_near((circles[radius < 0.5].square().mean(0)).sum(), 0.1**2 + 2 * 0.01**2, 0.0021 / math.sqrt(POINTS / 4))
    upper = ((moons.norm(dim=1) - 1).abs() < 0.06) & (moons[:, 1] > -0.06)
    lower = ((moons - torch.tensor([1, 0.5])).norm(dim=1) - 1).abs() < 0.06
    assert (upper | (lower & (moons[:, 1] < 0.56))).all()
    assert_near(upper.sum(), len(moons) / 2, math.sqrt(0.25 * len(moons)))


def test_small_draws_are_independent() -> None:
    """Counts per component vary as a binomial's do, and angles as independent uniform ones do."""
    draws = [points("moons-circles", 60, seed) for seed in range(60)]
    counts = np.array([int((draw[:, 0] < 7).sum()) for draw in draws])
    assert 0.5 < counts.var() / 15 < 1.7  # equal angles and shares: 0
    outer = [draw[(draw.norm(dim=1) < 2) & (draw.norm(dim=1) > 0.5)].double() for draw in draws]
    shares = [stats.kstest((torch.atan2(d[:, 1], d[:, 0]) / math.tau % 1).numpy(), "uniform").pvalue for d in outer]
    assert stats.kstest(shares, "uniform").pvalue > 0.01  # equal angles: all near 1


@pytest.mark.parametrize("name", POINT_SETS)
def test_seeds_are_samples_of_one_law(name) -> None:
    """The p-values of two-sample tests between seeds, and between the halves of one draw, are uniform."""
    draws = [points(name, 400, seed).numpy() for seed in range(1, 81)]
    for side in (0, 1):
        between = [stats.ks_2samp(a[:, side], b[:, side]).pvalue for a, b in zip(draws[::2], draws[1::2], strict=True)]
        within = [stats.ks_2samp(draw[:200, side], draw[200:, side]).pvalue for draw in draws]
        for pvalues in (between, within):
            assert 0.3 < np.mean(pvalues) < 0.7
            assert np.mean(np.array(pvalues) < 0.05) < 0.15


# ---- from tensors ---------------------------------------------------------------------------


def test_every_byte_comes_back() -> None:
    raw = torch.arange(256, dtype=torch.uint8).view(64, 1, 2, 2)
    dataset = from_tensor("bytes", raw, torch.arange(64) % 2, ("even", "odd"))
    x, y = everything(dataset)
    assert torch.equal(dataset.to_raw(x), raw)
    assert torch.equal(y, torch.arange(64) % 2)
    assert (float(x.min()), float(x.max())) == (-1, 1)


def test_to_raw_rounds_and_clamps() -> None:
    dataset = from_tensor("grey", torch.zeros(1, 3, 1, 1, dtype=torch.uint8))
    x = torch.tensor([-9.0, -1.0, 0.0, 0.5 / 127.5, 1.49 / 127.5, 1.0, 9.0])
    raw = dataset.to_raw(x[:, None, None, None].expand(7, 3, 1, 1))
    assert raw.dtype == torch.uint8
    assert raw[:, 0, 0, 0].tolist() == [0, 0, 128, 128, 129, 255, 255]
    assert torch.equal(dataset.to_raw(x.bfloat16()[:, None, None, None].expand(7, 3, 1, 1))[0], raw[0])


def test_points_of_any_size() -> None:
    raw = torch.from_numpy(rng().normal(3, 2, (100, 3)))
    dataset = from_tensor("cloud", raw)
    x, _ = everything(dataset)
    assert dataset.shape == (3,)
    assert dataset.is_points
    assert torch.allclose(dataset.to_raw(x).double(), raw, atol=1e-6)
    assert dataset.mean == pytest.approx(raw.mean(0).tolist(), rel=1e-6)


IMAGE, CLOUD = torch.zeros(2, 1, 2, 2), torch.tensor([[0.0, 1.0], [2.0, 3.0]])
UNFIT = {
    "nan": ((torch.full((2, 2), math.nan),), "NaN"),
    "infinite": ((torch.tensor([[0.0, math.inf], [1.0, 2.0]]),), "infinite"),
    "too large for float32": ((torch.tensor([[0.0, 1e300], [1.0, 2.0]], dtype=torch.float64),), "infinite"),
    "nan in an image": ((IMAGE + math.nan,), "NaN"),
    "no samples": ((torch.zeros(0, 2),), "0, 2"),
    "no pixels": ((torch.zeros(2, 1, 0, 0),), "2, 1, 0, 0"),
    "neither points nor images": ((torch.zeros(2, 2, 2),), "2, 2, 2"),
    "too bright": ((IMAGE + 256,), "0...255"),
    "too dark": ((IMAGE - 1,), "0...255"),
    "all points on a line": ((torch.tensor([[0.0, 1.0], [2.0, 1.0]]),), "coordinate"),
    "labels without classes": ((CLOUD, torch.tensor([0, 1])), "class names"),
    "classes without labels": ((CLOUD, None, ("a",)), "labels"),
    "too few labels": ((CLOUD, torch.tensor([0]), ("a",)), "2 whole numbers"),
    "broken labels": ((CLOUD, torch.tensor([0.0, 0.5]), ("a",)), "whole numbers"),
    "label too large": ((CLOUD, torch.tensor([0, 1]), ("a",)), "0...0"),
    "negative label": ((CLOUD, torch.tensor([0, -1]), ("a",)), "0...0"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_unfit_tensors(case) -> None:
    arguments, expected = UNFIT[case]
    message = error(from_tensor, "mine", *arguments)
    assert "mine" in message
    assert expected in message


# ---- bad requests ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "nope", "MNIST", "nope:path", ":", "digits ", "swiss_roll"])
def test_unknown_names_list_the_known_ones(name) -> None:
    message = error(load, name)
    assert repr(name.partition(":")[0]) in message
    assert all(known in message for known in NAMES)


@pytest.mark.parametrize("name", ["digits:path", "parabola:path", "folder", "folder:", "mnist:", "digits:"])
def test_paths_where_they_do_not_belong(name) -> None:
    assert repr(name) in error(load, name)


@pytest.mark.parametrize("size", [0, -8, 8.5, True, "8"])
def test_bad_image_size(size) -> None:
    assert repr(size) in error(load, "digits", image_size=size)


def test_points_have_no_image_size() -> None:
    assert "swiss-roll" in error(load, "swiss-roll", image_size=8)


def test_bad_folders(tmp_path) -> None:
    assert str(tmp_path / "nowhere") in error(load, f"folder:{tmp_path / 'nowhere'}")
    assert str(tmp_path) in error(load, f"folder:{tmp_path}")
    path = save(tmp_path / "1.png", colours())
    message = error(load, f"folder:{path}")
    assert str(path) in message
    assert "is a file" in message


def test_folder_that_may_not_be_read(tmp_path, monkeypatch) -> None:
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    save(tmp_path / "1.png", colours())
    monkeypatch.setattr(type(tmp_path), "iterdir", refuse)
    assert str(tmp_path) in error(load, f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("digits", 10, 0), "'digits'"),
        (("nope", 10, 0), "'nope'"),
        (("parabola", 0, 0), "got 0"),
        (("parabola", 2.5, 0), "got 2.5"),
        (("parabola", 10, -1), "got -1"),
        (("parabola", 10, 2**32), "got 4294967296"),
        (("parabola", 10, None), "got None"),
    ],
)
def test_bad_draws(arguments, expected) -> None:
    assert expected in error(points, *arguments)


@pytest.mark.parametrize("name", ["digits", "swiss-roll", "moons-circles"])
def test_without_scikit_learn(monkeypatch, name) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    message = error(load, name)
    assert name in message
    assert "pip install 'fastdiff[demo]'" in message
    assert len(load("parabola")) == POINTS


def test_names_are_the_promised_ones() -> None:
    promised = "digits swiss-roll moons-circles parabola mnist fashion-mnist emnist cifar10 folder:PATH tar:PATH"
    assert promised.split() == list(data.NAMES)


def test_import_takes_only_torch() -> None:
    program = (
        "import sys, fastdiff.training.data; print([m for m in ('torchvision', 'sklearn', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
