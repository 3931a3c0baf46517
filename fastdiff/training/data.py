"""Data sets as the trainer sees them: batches on the network's scale, and the way back to data units."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff.errors import InputError, check, choose
from fastdiff.losses import brought
from fastdiff.training.images import ENDINGS, POLICIES, Files, Folder, Squares, images_below, reading, resize
from fastdiff.training.shards import load_shards

POINTS = 1024 * 128  #: in a 2-D training set
GREY = 127.5  #: the middle of 0 ... 255

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
Reader = Callable[[Files], Squares]
#: the data sets with labels, for messages
LABELLED = f"digits, {', '.join(ARCHIVES)}, folder:PATH with a sub-folder for each class and tar:PATH with labels"


@dataclass(frozen=True, eq=False)
class Source:
    """``count`` samples: ``read(indices)`` gets some in data units, ``y`` are the labels of all (int64) or None.

    Attributes:
        groups: how many consecutive samples each file holds; None where reading one is as good as reading another.
        decodes: whether reading is work for other processes, to which this goes pickled, and may fail.
        name: of a sample, for messages.
    """

    count: int
    read: Callable[[Tensor], Tensor]
    y: Tensor | None = None
    groups: Sequence[int] | None = None
    decodes: bool = False
    name: Callable[[int], str] = "sample {}".format


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
        column = torch.tensor(values, dtype=torch.float32).view(-1, *[1] * (len(self.shape) - 1))
        return brought(column, like.device)


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
        raw, y = self.raw(indices)
        return self.scale(raw), y

    def raw(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """:meth:`batch` in data units, as stored: uint8 of images in files."""
        y = self.source.y
        return self.source.read(indices), None if y is None else y[indices]


def load(name: str, *, image_size: int | None = None, corrupt: str = "fail") -> Data:
    """The training data called ``name``.

    Args:
        name: one of ``NAMES``. ``digits``: scikit-learn's 1,797 scans, 8 x 8. 2-D sets: ``points(name, 131072, 0)``.
            ``mnist``, ``fashion-mnist``, ``emnist`` (letters, upright) and ``cifar10``: the training half, in
            torchvision's layout below PATH if given as NAME:PATH, else the environment variable FASTDIFF_DATA, else
            ./data; downloaded when missing. ``folder:PATH``: images; sub-folders are classes when they hold them all.
            ``tar:PATH``: a tar, a directory of tars or a glob, in WebDataset's layout (:mod:`.shards`).
        image_size: resize images (antialiased) so that the shorter side has this many pixels and cut out the centre
            square. Default: as they are; for files the shorter side of the first image, down to a multiple of 8.
        corrupt: whether one of the first images that cannot be read is an error (``fail``), or others tell what images
            look like (``skip``).

    Raises:
        InputError: an unknown name, a size that does not apply, files missing or damaged, scikit-learn missing.
    """
    kind, colon, path = name.partition(":")
    choose("data set", f"{kind}:PATH" if kind in FILES else kind, NAMES)
    check(path or not (colon or kind in FILES), f"data set {name!r} lacks its path: {kind}:PATH")
    check(not path or kind in (*FILES, *ARCHIVES), f"data set {name!r}: {kind} takes no path")
    check(image_size is None or _is_whole(image_size, 1), f"image_size must be a whole number >= 1, got {image_size!r}")
    if kind in DRAWS:
        check(image_size is None, f"image_size does not apply to {name}: its samples are points")
        return from_tensor(name, points(kind, POINTS, 0))
    if kind in FILES:
        choose("policy for images that cannot be read", corrupt, POLICIES)
        return FILES[kind](name, path, lambda files: Squares.of(files, image_size, corrupt))
    root = Path(path or os.environ.get("FASTDIFF_DATA") or "data").expanduser()
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
    source = Source(len(x), partial(_rows, x), None if y is None else _labels(name, len(x), y, classes))
    return Data(name, tuple(x.shape[1:]), tuple(classes), *_scale(name, x), source)


def _rows(x: Tensor, indices: Tensor) -> Tensor:
    return x[indices]


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


def _archive(name: str, root: Path) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Images uint8 ``[N, C, H, W]``, labels from 0, and class names of a training half."""
    from torchvision import datasets

    kind, place, files, options = ARCHIVES[name]
    missing = not all((root / place / file).is_file() for file in files)
    state = "are missing and cannot be downloaded" if missing else "are damaged (delete them to download them again)"
    with reading(lambda: f"{name}: files in {root / place} {state}, expected {', '.join(files)}"):
        dataset = getattr(datasets, kind)(root, train=True, download=missing, **options)
        x, y, classes = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets), dataset.classes
        x = x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous()
        if name == "emnist":  # stored with rows and columns exchanged, and labels from 1
            x, y, classes = x.mT.contiguous(), y - 1, classes[1:]
        _labels(name, len(x), y, classes)
    return x, y, tuple(label.partition(" - ")[0] for label in classes)  # MNIST's are "0 - zero", ...


def _folder(name: str, path: str, squares: Reader) -> Data:
    root = Path(path).expanduser()
    check(root.is_dir(), f"{root} {'is a file, not a folder' if root.exists() else 'does not exist'}")
    with reading(lambda: f"folder {root} cannot be read"):
        paths = list(images_below(root))
    check(paths, f"folder {root} holds no images ({', '.join(ENDINGS)})")
    folders = [path.relative_to(root).parts[:-1] for path in paths]
    number = {label: i for i, label in enumerate(sorted({parts[0] for parts in folders}))} if all(folders) else {}
    y = torch.tensor([number[parts[0]] for parts in folders]) if number else None
    return _of_files(name, squares(Folder(list(map(str, paths)))), y, tuple(number))


def _tar(name: str, path: str, squares: Reader) -> Data:
    shards, y, classes = load_shards(path)
    groups = [len(tar.offsets) for tar in shards.tars]
    labels = None if y is None else torch.from_numpy(y)
    return _of_files(name, squares(shards), labels, classes, groups)


def _of_files(
    name: str, squares: Squares, y: Tensor | None, classes: tuple[str, ...], groups: list[int] | None = None
) -> Data:
    grey = (GREY,) * squares.shape[0]
    source = Source(len(squares.files), squares, y, groups, decodes=True, name=squares.files.name)
    return Data(name, squares.shape, classes, grey, grey, source)


FILES = {"folder": _folder, "tar": _tar}
NAMES = ("digits", *DRAWS, *ARCHIVES, *(f"{kind}:PATH" for kind in FILES))
