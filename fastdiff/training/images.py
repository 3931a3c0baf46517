"""Image files: found, named, opened, and read as squares of one size."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdiff.errors import InputError, check

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
POLICIES = ("fail", "skip")  #: for images that cannot be read


class Files(Protocol):
    """Images in files, wherever those lie."""

    def __len__(self) -> int: ...

    def open(self, index: int) -> Any:
        """What PIL opens: a path or a binary file."""

    def name(self, index: int) -> str:
        """For messages; made without a look at the disk, which may be what has failed."""


@dataclass(frozen=True, eq=False)
class Folder:
    """Images that are files of their own."""

    paths: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> str:
        return self.paths[index]

    name = open


@dataclass(frozen=True, eq=False)
class Squares:
    """Reads images of ``files`` as uint8 ``[N, C, size, size]``: upright, centre squares, in PIL's ``mode``."""

    files: Files
    mode: str
    size: int

    @classmethod
    def of(cls, files: Files, size: int | None, corrupt: str = "fail") -> Squares:
        """Grey if the first 16 images are, and by default of the first one's shorter side, down to a multiple of 8."""
        looks = list(islice(_looks(files, corrupt == "skip"), 16))
        check(looks, f"none of {len(files)} images from {files.name(0)} on can be read")
        mode = "L" if all(found in ("1", "L") for found, _ in looks) else "RGB"
        return cls(files, mode, int(size) if size else max(8, looks[0][1] // 8 * 8))

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.mode), self.size, self.size

    def __call__(self, indices: Tensor) -> Tensor:
        return torch.stack([use_image(self.files, i, self._square) for i in indices.tolist()])

    def _square(self, image: Any) -> Tensor:
        from PIL import ImageOps
        from torchvision.transforms.v2 import functional

        return resize(functional.pil_to_tensor(ImageOps.exif_transpose(image).convert(self.mode)), self.size)


def _looks(files: Files, skip: bool) -> Iterator[tuple[str, int]]:
    """Mode and shorter side of each image, or of each that can be read."""
    for i in range(len(files)):
        try:
            yield use_image(files, i, lambda image: (image.mode, min(image.size)))
        except InputError:
            if not skip:
                raise


def images_below(folder: Path) -> Iterator[Path]:
    """The images in ``folder`` and its sub-folders, in order, without hidden ones."""
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        if path.is_dir():  # perhaps a link: one to a folder that we are in would lead round in circles
            yield from () if folder.resolve().is_relative_to(path.resolve()) else images_below(path)
        elif path.suffix.lower() in ENDINGS:
            yield path


def open_image(path: Path, use: Callable[[Any], Any]) -> Any:
    """:func:`use_image` of one path."""
    return use_image(Folder([str(path)]), 0, use)


def use_image(files: Files, index: int, use: Callable[[Any], Any]) -> Any:
    """``use`` of an opened image; whatever goes wrong is an InputError that names it."""
    from PIL import Image, UnidentifiedImageError

    with reading(lambda: f"image {files.name(index)} cannot be read"):
        try:
            image = Image.open(files.open(index))
        except UnidentifiedImageError:
            raise InputError("it is no image of a known kind") from None
        with image:
            # PIL would clip what does not fit into 8 bits, without a word.
            check(image.mode[0] not in "IF", f"pixels of mode {image.mode}, only 8-bit images can be used")
            return use(image)


def resize(x: Tensor, size: int) -> Tensor:
    """Centre squares ``[..., C, size, size]`` of ``x`` ``[..., C, H, W]`` with the shorter side brought to ``size``."""
    from torchvision.transforms.v2 import functional

    return torch.as_tensor(functional.center_crop(functional.resize(x, [int(size)], antialias=True), [int(size)]))


@contextmanager
def reading(failure: Callable[[], str]) -> Iterator[None]:
    """Whatever goes wrong with files from outside becomes one line that starts with ``failure()``."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transparent palettes, odd metadata, old pickles: they change nothing
            yield
    except Exception as error:
        raise InputError(f"{failure()}: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    """What an exception says."""
    return " ".join(str(error).split()) or type(error).__name__
