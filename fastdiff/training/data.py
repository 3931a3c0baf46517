"""Data sets as the trainer sees them: batches on the network's scale, and the way back to data units."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.errors import InputError, check, choose

POINTS = 1024 * 128  #: in a 2-D training set
GREY = 127.5  #: the middle of 0 ... 255
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")

_MNIST = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
_EMNIST = ("emnist-letters-train-images-idx3-ubyte", "emnist-letters-train-labels-idx1-ubyte")
_CIFAR = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
#: name: class in torchvision, its folder below the root, the files in it, further arguments
ARCHIVES: dict[str, tuple[str, str, tuple[str, ...], dict[str, str]]] = {
    "mnist": ("MNIST", "MNIST/raw", _MNIST, {}),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST/raw", _MNIST, {}),
    "emnist": ("EMNIST", "EMNIST/raw", _EMNIST, {"split": "letters"}),
    "cifar10": ("CIFAR10", "cifar-10-batches-py", _CIFAR, {}),
}
#: the data sets with labels, for messages
LABELLED = f"digits, {', '.join(ARCHIVES)} and folder:PATH with a sub-folder for each class"


@dataclass(frozen=True, eq=False)
class Source:
    """``count`` samples: ``read(indices)`` gets some in data units, ``y`` are the labels of all (int64) or None."""

    count: int
    read: Callable[[Tensor], Tensor]
    y: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Description:
    """What samples look like, and the way between data units and the network's scale.

    Attributes:
        name: what :func:`load` was asked for.
        shape: of one sample: (C, H, W), or (2,) for points.
        classes: names of the classes 0, 1, ...; () when there are no labels.
        mean, std: what is subtracted from data units and then divided by: 127.5 per channel of images (0 ... 255
            to [-1, 1]), each coordinate's own for points.
    """

    name: str
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Description:
        """The inverse of :meth:`to_json`."""
        return cls(value["name"], *(tuple(value[key]) for key in ("shape", "classes", "mean", "std")))

    def to_json(self) -> dict[str, Any]:
        """In types that JSON has."""
        return {"name": self.name, **{key: list(getattr(self, key)) for key in ("shape", "classes", "mean", "std")}}

    @property
    def is_points(self) -> bool:
        """Whether samples are points and not images."""
        return len(self.shape) == 1

    def scale(self, raw: Tensor) -> Tensor:
        """float32 on the network's scale, images in [-1, 1], of samples ``[N, *shape]`` in data units."""
        return (raw.float() - self._per_channel(self.mean, raw)) / self._per_channel(self.std, raw)

    def to_raw(self, x: Tensor) -> Tensor:
        """Data units of ``x`` ``[N, *shape]``: float32 for points, uint8 (nearest, clamped to 0 ... 255) for images."""
        raw = x.float() * self._per_channel(self.std, x) + self._per_channel(self.mean, x)
        return raw if self.is_points else raw.round().clamp(0, 255).to(torch.uint8)

    def _per_channel(self, values: Sequence[float], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=like.device).view(-1, *[1] * (len(self.shape) - 1))


@dataclass(frozen=True, eq=False)
class Data(Description):
    """A data set as the trainer sees it: its description and its samples. :func:`load` makes it."""

    source: Source

    def __len__(self) -> int:
        return self.source.count

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """The samples at ``indices`` (int64 ``[B]``, 0 ... len - 1); an image that cannot be read is an InputError.

        Returns:
            x: float32 ``[B, *shape]`` on the network's scale, images in [-1, 1]; y: int64 ``[B]`` or None.
        """
        y = self.source.y
        return self.scale(self.source.read(indices)), None if y is None else y[indices]


def load(name: str, *, image_size: int | None = None) -> Data:
    """The training data called ``name``.

    Args:
        name: one of ``NAMES``. ``digits``: scikit-learn's 1,797 scans, 8 x 8. 2-D sets: ``points(name, 131072, 0)``.
            ``mnist``, ``fashion-mnist``, ``emnist`` (letters, upright) and ``cifar10``: the training half, in
            torchvision's layout below PATH if given as NAME:PATH, else the environment variable FASTDIFF_DATA, else
            ./data; downloaded when missing. ``folder:PATH``: images; sub-folders are classes when they hold them all.
        image_size: resize images (antialiased) so that the shorter side has this many pixels and cut out the centre
            square. Default: as they are; for a folder the shorter side of its first image, down to a multiple of 8.

    Raises:
        InputError: an unknown name, a size that does not apply, files missing or damaged, scikit-learn missing.
    """
    kind, colon, path = name.partition(":")
    choose("data set", "folder:PATH" if kind == "folder" else kind, NAMES)
    check(path or not (colon or kind == "folder"), f"data set {name!r} lacks its path: {kind}:PATH")
    check(not path or kind == "folder" or kind in ARCHIVES, f"data set {name!r}: {kind} takes no path")
    check(image_size is None or _is_whole(image_size, 1), f"image_size must be a whole number >= 1, got {image_size!r}")
    if kind in DRAWS:
        check(image_size is None, f"image_size does not apply to {name}: its samples are points")
        return from_tensor(name, points(kind, POINTS, 0))
    root = Path(path or os.environ.get("FASTDIFF_DATA") or "data").expanduser()
    if kind == "folder":
        return _folder(name, root, image_size)
    x, y, classes = _digits() if kind == "digits" else _archive(kind, root)
    if image_size is not None:
        x = torch.cat([resize(part, image_size) for part in x.split(1000)])  # in parts, for it may pass by float32
    return from_tensor(name, x, y, classes)


def points(name: str, count: int, seed: int) -> Tensor:
    """Independent draws from a 2-D set, in data units, float32 ``[count, 2]``.

    ``swiss-roll``: coordinates 0 and 2 of scikit-learn's swiss roll with noise 0.5. ``moons-circles``: half two
    moons, moved by 15, and half two circles (factor 0.1), all with noise 0.01. ``parabola``: x ~ N(0, 4^2),
    y ~ N(x^2 / 4, 1). Seed 0 draws the training set: compare with another one.

    Raises:
        InputError: an unknown name, a count below 1, a seed outside 0 ... 2**32 - 1, scikit-learn missing.
    """
    choose("2-D set", name, DRAWS)
    check(_is_whole(count, 1), f"the number of points must be a whole number >= 1, got {count!r}")
    check(_is_whole(seed, 0) and seed < 2**32, f"seed must be a whole number in 0...2**32-1, got {seed!r}")
    return torch.from_numpy(DRAWS[name](int(count), int(seed))).float()


def from_tensor(name: str, x: Tensor, y: Tensor | None = None, classes: Sequence[str] = ()) -> Data:
    """A data set of samples in memory.

    Args:
        x: points, float ``[N, D]``, in any units; or images ``[N, C, H, W]``, uint8 or float in 0 ... 255.
        y: whole numbers ``[N]`` in 0 ... len(classes) - 1; given together with ``classes``.

    Raises:
        InputError: no samples, NaN or infinite values, images outside 0 ... 255, equal points, labels that do not fit.
    """
    check(x.ndim in (2, 4) and x.numel(), f"{name} must hold points [N, D] or images [N, C, H, W], got {list(x.shape)}")
    x = x if x.dtype == torch.uint8 and x.ndim == 4 else x.float()
    check(x.isfinite().all(), f"{name} holds values that are NaN or infinite")
    check((y is None) == (len(classes) == 0), f"{name} needs both labels and class names, or neither")
    source = Source(len(x), x.__getitem__, None if y is None else _labels(name, len(x), y, classes))
    return Data(name, tuple(x.shape[1:]), tuple(classes), *_scale(name, x), source)


def _scale(name: str, x: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if x.ndim == 4:
        low, high = map(float, x.aminmax())
        check(low >= 0 and high <= 255, f"{name} must hold images in 0...255, got {low:g} to {high:g}")
        return (GREY,) * x.shape[1], (GREY,) * x.shape[1]
    std, mean = torch.std_mean(x.double(), 0, correction=0)
    check((std > 0).all(), f"{name} has a coordinate that all points share")
    # Resuming compares these, perhaps on another machine: keep the digits that float32 data have, and no noise.
    return tuple(float(f"{value:.8g}") for value in mean), tuple(float(f"{value:.8g}") for value in std)


def _labels(name: str, count: int, y: Tensor, classes: Sequence[str]) -> Tensor:
    valid = not y.is_floating_point() and y.shape == (count,)
    check(valid, f"{name} needs {count} whole numbers as labels, got {y.dtype} {list(y.shape)}")
    low, high, top = int(y.min()), int(y.max()), len(classes) - 1
    check(low >= 0 and high <= top, f"labels of {name} must lie in 0...{top}, got {low} to {high}")
    return y.long()


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def resize(x: Tensor, size: int) -> Tensor:
    """Centre squares ``[..., C, size, size]`` of ``x`` ``[..., C, H, W]`` with the shorter side brought to ``size``."""
    from torchvision.transforms.v2 import functional

    return torch.as_tensor(functional.center_crop(functional.resize(x, [int(size)], antialias=True), [int(size)]))


def _sklearn(name: str) -> Any:
    try:
        from sklearn import datasets
    except ImportError:
        raise InputError(f"data set {name} needs scikit-learn: pip install 'fastdiff[demo]'") from None
    return datasets


def _digits() -> tuple[Tensor, Tensor, tuple[str, ...]]:
    digits = _sklearn("digits").load_digits()
    return torch.from_numpy(digits.images)[:, None] * (255 / 16), torch.from_numpy(digits.target), tuple("0123456789")


def _swiss_roll(count: int, seed: int) -> NDArray[np.float64]:
    roll, _ = _sklearn("swiss-roll").make_swiss_roll(count, noise=0.5, random_state=seed)
    return np.asarray(roll[:, [0, 2]])


def _moons_circles(count: int, seed: int) -> NDArray[np.float64]:
    # scikit-learn puts points at equal angles, which are no independent draws: draw from many of them.
    datasets, rng = _sklearn("moons-circles"), np.random.default_rng(seed)
    moons = datasets.make_moons(POINTS, shuffle=False)[0] + 15
    pool = np.concatenate((moons, datasets.make_circles(POINTS, factor=0.1, shuffle=False)[0]))
    return np.asarray(pool[rng.integers(len(pool), size=count)] + rng.normal(0, 0.01, (count, 2)))


def _parabola(count: int, seed: int) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 4, count)
    return np.stack((x, rng.normal(x**2 / 4, 1)), 1)


DRAWS = {"swiss-roll": _swiss_roll, "moons-circles": _moons_circles, "parabola": _parabola}
NAMES = ("digits", *DRAWS, *ARCHIVES, "folder:PATH")


def _archive(name: str, root: Path) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Images uint8 ``[N, C, H, W]``, labels from 0, and class names of a training half."""
    from torchvision import datasets

    kind, place, files, options = ARCHIVES[name]
    missing = not all((root / place / file).is_file() for file in files)
    state = "are missing and cannot be downloaded" if missing else "are damaged (delete them to download them again)"
    with _reading(f"{name}: files in {root / place} {state}, expected {', '.join(files)}"):
        dataset = getattr(datasets, kind)(root, train=True, download=missing, **options)
        x, y, classes = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets), dataset.classes
        x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous()
        if name == "emnist":  # stored with rows and columns exchanged, and labels from 1
            x, y, classes = x.mT.contiguous(), y - 1, classes[1:]
        _labels(name, len(x), y, classes)
    return x, y, tuple(label.partition(" - ")[0] for label in classes)  # MNIST's are "0 - zero", ...


def _folder(name: str, root: Path, image_size: int | None) -> Data:
    check(root.is_dir(), f"{root} {'is a file, not a folder' if root.exists() else 'does not exist'}")
    with _reading(f"folder {root} cannot be read"):
        paths = list(images_below(root))
    check(paths, f"folder {root} holds no images ({', '.join(ENDINGS)})")
    looks = [open_image(path, lambda image: (image.mode, min(image.size))) for path in paths[:16]]
    mode, channels = ("L", 1) if all(mode in ("1", "L") for mode, _ in looks) else ("RGB", 3)
    size = int(image_size) if image_size else max(8, looks[0][1] // 8 * 8)
    folders = [path.relative_to(root).parts[:-1] for path in paths]
    number = {label: i for i, label in enumerate(sorted({parts[0] for parts in folders}))} if all(folders) else {}
    y = torch.tensor([number[parts[0]] for parts in folders]) if number else None

    def read(indices: Tensor) -> Tensor:
        return torch.stack([open_image(paths[i], lambda image: _square(image, mode, size)) for i in indices.tolist()])

    grey = (GREY,) * channels
    return Data(name, (channels, size, size), tuple(number), grey, grey, Source(len(paths), read, y))


def images_below(folder: Path) -> Iterator[Path]:
    """The images in ``folder`` and its sub-folders, in order, without hidden ones."""
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        if path.is_dir():  # perhaps a link: one to a folder that we are in would lead round in circles
            yield from () if folder.resolve().is_relative_to(path.resolve()) else images_below(path)
        elif path.suffix.lower() in ENDINGS:
            yield path


def open_image(path: Path, use: Callable[[Any], Any]) -> Any:
    from PIL import Image

    with _reading(f"image {path} cannot be read"), Image.open(path) as image:
        # PIL would clip what does not fit into 8 bits, without a word.
        check(image.mode[0] not in "IF", f"pixels of mode {image.mode}, only 8-bit images can be used")
        return use(image)


def _square(image: Any, mode: str, size: int) -> Tensor:
    """uint8 ``[C, size, size]`` of an image, upright, in PIL's ``mode``."""
    from PIL import ImageOps
    from torchvision.transforms.v2 import functional

    return resize(functional.pil_to_tensor(ImageOps.exif_transpose(image).convert(mode)), size)


@contextmanager
def _reading(failure: str) -> Iterator[None]:
    """Whatever goes wrong with files from outside becomes one line that starts with ``failure``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transparent palettes, odd metadata, old pickles: they change nothing
            yield
    except Exception as error:
        raise InputError(f"{failure}: {' '.join(str(error).split()) or type(error).__name__}") from None
