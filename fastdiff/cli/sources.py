"""What ``fastdiff eval`` compares: images of a folder, an archive, a data set or a run, read by their numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.cli.drawing import Drawing
from fastdiff.cli.sample import SampleConfig
from fastdiff.errors import check
from fastdiff.metrics.evaluation import STATISTICS, FeatureSet, share
from fastdiff.metrics.statistics import read_arrays
from fastdiff.training import checkpoint
from fastdiff.training.data import NAMES, Data, load
from fastdiff.training.images import ENDINGS, images_below, open_image, resize
from fastdiff.training.run import load_run

CONVENTION = 50_000  # samples that an FID is usually of
KINDS = {name.partition(":")[0] for name in NAMES}
HELP = "a folder of images, an .npz, a data set, a run or a checkpoint"


@dataclass(frozen=True)
class Images:
    """``count`` images of ``shape`` (C, H, W): ``read(ids)`` gives some, uint8 ``[len(ids), C, H, W]`` on the CPU.

    Attributes:
        name: what was asked for.
        statistics: of features of all images that these are some of, where a file holds them.
        drawing: what draws them, where they are a run's samples.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    read: Callable[[Tensor], Tensor]
    statistics: FeatureSet | None = None
    drawing: Drawing | None = None

    def ids(self, batch: int, rank: int, processes: int) -> Iterator[Tensor]:
        """The numbers of a process's images, in batches."""
        mine = share(self.count, rank, processes)
        yield from torch.arange(mine.start, mine.stop).split(batch) if mine else ()


Source = Images | FeatureSet


@dataclass(frozen=True)
class Wanted:
    """How sources are to be opened.

    Attributes:
        count: how many images; None for all.
        samples: how many of a run, where ``count`` is None.
        image_size: resize to this; None for as they are.
        sampling: settings of :class:`SampleConfig` but its count.
        seed: of the choice of ``count`` images of more.
        device: where runs are sampled.
    """

    count: int | None
    samples: int
    image_size: int | None
    sampling: dict[str, Any]
    seed: int
    device: torch.device


def open_source(name: str, wanted: Wanted) -> Source:
    """The images, or a file's statistics of some, that ``name`` means.

    Args:
        name: the name of a data set (see :func:`fastdiff.training.data.load`), an ``.npz`` with ``arr_0`` (uint8
            NHWC, as ``fastdiff sample`` and guided-diffusion write it) or with ``mu`` and ``sigma``, a run directory,
            a checkpoint, or a directory of images.

    Raises:
        InputError: nothing of the kind there, damaged, points, fewer images than two or than are wanted.
    """
    found = _find(name, wanted)
    if isinstance(found, FeatureSet):
        check(wanted.count is None, f"{name} holds statistics of images, of which no {wanted.count} can be chosen")
        return found
    if wanted.image_size:
        found = _resized(found, wanted.image_size)
    if wanted.count is not None and found.drawing is None:
        found = _chosen(found, wanted.count, wanted.seed)
    check(found.count >= 2, f"{found.count} image of {name} is too few: metrics need at least 2")
    return found


def _find(name: str, wanted: Wanted) -> Source:
    path = Path(name)
    if name.partition(":")[0] == "folder" and not wanted.image_size:
        return _folder(name, Path(name.partition(":")[2]).expanduser())
    if name.partition(":")[0] in KINDS:
        return _data(load(name, image_size=wanted.image_size))
    check(
        path.exists(), f"{name!r} is no data set ({', '.join(NAMES)}), and there is no file or directory of that name"
    )
    if path.suffix == ".npz":
        return _archive(path)
    if path.is_file() or (path / checkpoint.FOLDER).is_dir() or path.parent.name == checkpoint.FOLDER:
        return _run(name, wanted)
    return _find(f"folder:{name}", wanted)


def _data(data: Data) -> Images:
    check(not data.is_points, f"{data.name} holds points: these metrics are of images")
    return Images(data.name, len(data), data.shape, lambda ids: data.to_raw(data.batch(ids)[0]))


def _run(name: str, wanted: Wanted) -> Images:
    run = load_run(name, device=wanted.device)
    check(not run.data.is_points, f"{name} makes points: these metrics are of images")
    count = wanted.samples if wanted.count is None else wanted.count
    return drawn(name, Drawing(run, SampleConfig(**wanted.sampling, count=count)))


def drawn(name: str, drawing: Drawing) -> Images:
    """The samples of a run, made when they are read."""
    count, shape = drawing.config.count, drawing.run.data.shape
    return Images(name, count, shape, lambda ids: drawing.to_raw(drawing.samples(ids)), drawing=drawing)


def _archive(path: Path) -> Source:
    arrays = read_arrays(path, (), ("arr_0", *STATISTICS))
    statistics = FeatureSet.from_arrays(path, arrays) if {"mu", "sigma"} <= arrays.keys() else None
    if "arr_0" not in arrays:
        check(statistics, f"{path} holds neither images (arr_0) nor statistics (mu and sigma)")
        return statistics  # type: ignore[return-value]
    images = arrays["arr_0"]
    fits = images.dtype == "uint8" and images.ndim == 4 and images.shape[3] in (1, 3)
    right = "uint8 [N, H, W, C] in 0...255 with 1 or 3 channels"
    check(fits, f"arr_0 of {path} must be {right}, got {images.dtype} {list(images.shape)}")
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    return Images(str(path), len(pixels), tuple(pixels.shape[1:]), lambda ids: pixels[ids].contiguous(), statistics)


# ---- folders ----------------------------------------------------------------------------------


def _folder(name: str, root: Path) -> Images:
    """Images as they are, and so all of one size; grey where all are grey."""
    check(name != "folder:", f"data set {name!r} lacks its path: folder:PATH")
    check(root.is_dir(), f"{root} {'is a file, not a folder' if root.exists() else 'does not exist'}")
    paths = list(images_below(root))
    check(paths, f"{root} holds neither images ({', '.join(ENDINGS)}) nor a checkpoint")
    looks = list(map(_look, paths))
    width, height = looks[0][1]
    for path, (_, size) in zip(paths, looks, strict=True):
        sizes = f"{paths[0]} has {width} x {height} pixels, {path} {size[0]} x {size[1]}"
        check(size == (width, height), f"{sizes}: --image-size makes them equal")
    mode = "L" if all(found in ("1", "L") for found, _ in looks) else "RGB"

    def read(ids: Tensor) -> Tensor:
        return torch.stack([_pixels(paths[i], mode) for i in ids.tolist()])

    return Images(name, len(paths), ({"L": 1, "RGB": 3}[mode], height, width), read)


def _look(path: Path) -> tuple[str, tuple[int, int]]:
    """Mode and size, upright, of an image that is not read as a whole."""
    turned = 274, (5, 6, 7, 8)  # EXIF's orientation, and those that exchange width and height

    def look(image: Any) -> tuple[str, tuple[int, int]]:
        exchanged = image.getexif().get(turned[0]) in turned[1]
        return image.mode, image.size[::-1] if exchanged else image.size

    return open_image(path, look)  # type: ignore[no-any-return]


def _pixels(path: Path, mode: str) -> Tensor:
    from PIL import ImageOps
    from torchvision.transforms.v2 import functional

    return open_image(  # type: ignore[no-any-return]
        path, lambda image: functional.pil_to_tensor(ImageOps.exif_transpose(image).convert(mode))
    )


# ---- fewer or smaller images --------------------------------------------------------------------


def _resized(images: Images, size: int) -> Images:
    if images.shape[1:] == (size, size):
        return images
    made = f"{images.name} makes images of {images.shape[1]} x {images.shape[2]} pixels"
    check(images.drawing is None, f"{made}, which --image-size does not change")
    return replace(images, shape=(images.shape[0], size, size), read=lambda ids: resize(images.read(ids), size))


def _chosen(images: Images, count: int, seed: int) -> Images:
    """``count`` of them, drawn without replacement."""
    check(1 <= count <= images.count, f"{images.name} holds {images.count} images: {count} cannot be chosen")
    if count == images.count:
        return images
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(images.count, generator=generator)[:count].sort().values
    return replace(images, count=count, read=lambda some: images.read(ids[some]))
