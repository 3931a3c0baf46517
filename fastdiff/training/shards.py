"""Tar shards in WebDataset's layout: scanned once, then read at any place. Nothing is ever extracted.

A sample is consecutive files that share their name up to the first dot after its folder: an image, and perhaps a label,
as text in ``.cls`` or under "label" in ``.json``. Other files are ignored.
"""

from __future__ import annotations

import glob
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdiff._progress import progress
from fastdiff.errors import InputError, check
from fastdiff.metrics.statistics import read_arrays, write_arrays
from fastdiff.training.images import ENDINGS, reading

FORMAT = 1  #: of the index that is kept beside a tar
OPEN = 8  #: tars that a process holds open
LARGEST = 2**20  #: file with a label, in bytes
LONGEST = 1000  #: label, in characters
CLASSES = 2**16  #: most that labels which are numbers may count
MANY = 100  #: tars that take long to scan
NUMBER = re.compile(r"[+-]?[0-9]+")
Ints = NDArray[np.int64]
Status = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Tar:
    """What is known of a shard.

    Attributes:
        status: its size and the time of its last change, by which it is known again.
        names: of the images, each ended by a zero byte.
        offsets, lengths: where each image's bytes are.
        labels: numbers in ``classes``; none where samples have no labels.
    """

    path: str
    status: Status
    names: bytes
    offsets: Ints
    lengths: Ints
    labels: Ints
    classes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Shards:
    """The images of tars, one tar after another: :class:`~fastdiff.training.images.Files`."""

    tars: list[Tar]
    ends: Ints  # how many images the tars up to each hold

    @classmethod
    def of(cls, tars: Sequence[Tar]) -> Shards:
        return cls(list(tars), np.cumsum([len(tar.offsets) for tar in tars]))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def open(self, index: int) -> io.BytesIO:
        tar, row = self._find(index)
        content = os.pread(_opened(tar.path, tar.status).number, int(tar.lengths[row]), int(tar.offsets[row]))
        check(len(content) == tar.lengths[row], "the tar ends before it")
        return io.BytesIO(content)

    def name(self, index: int) -> str:
        tar, row = self._find(index)
        return f"{tar.names.split(bytes(1))[row].decode(errors='replace')} in {tar.path}"

    def _find(self, index: int) -> tuple[Tar, int]:
        number = int(np.searchsorted(self.ends, index, side="right"))
        tar = self.tars[number]
        return tar, index - int(self.ends[number]) + len(tar.offsets)


class _Descriptor:
    """An open file without a position of its own, and so safe to inherit; closed when it is forgotten."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):
            os.close(self.number)


@lru_cache(OPEN)
def _opened(path: str, status: Status) -> _Descriptor:
    descriptor = _Descriptor(path)
    check(_status(os.fstat(descriptor.number)) == status, "the tar was changed after it was scanned")
    return descriptor


def _status(found: os.stat_result) -> Status:
    return found.st_size, found.st_mtime_ns


# ---- labels of all ------------------------------------------------------------------------------


def load_shards(path: str) -> tuple[Shards, Ints | None, tuple[str, ...]]:
    """The images of a tar, a directory of tars or a glob; their labels and the names of the classes, if there are any.

    Labels that are all whole numbers are the numbers of classes, which are called by them; others are sorted.

    Raises:
        InputError: no tars, one that is damaged or not in WebDataset's layout, labels for some only.
    """
    paths = _find(path)
    tars = list(progress(map(load_tar, paths), len(paths), "scanning tars", enabled=len(paths) >= MANY))
    without = [tar.path for tar in tars if not tar.classes]
    check(len(without) in (0, len(tars)), f"{path}: {''.join(without[:1])} has no labels, others have")
    return Shards.of(tars), *((None, ()) if without else _labels(path, tars))


def _find(path: str) -> list[str]:
    place = Path(path).expanduser()
    pattern = str(place / "*.tar") if place.is_dir() else str(place)
    found = [str(place)] if place.is_file() else sorted(glob.glob(pattern))
    check(found, f"tar:{path}: no files {pattern}")
    return found


def _labels(path: str, tars: list[Tar]) -> tuple[Ints, tuple[str, ...]]:
    """Numbers of all samples in the classes of all tars, and these."""
    names = sorted({name for tar in tars for name in tar.classes})
    numbers = {name: i for i, name in enumerate(names)}
    if all(map(NUMBER.fullmatch, names)):
        numbers = {name: int(name) for name in names}
        low, high = min(numbers.values()), max(numbers.values())
        check(low >= 0 and high < CLASSES, f"labels of {path} must lie in 0...{CLASSES - 1}, got {low} to {high}")
        names = [str(i) for i in range(high + 1)]
    each = [np.array([numbers[name] for name in tar.classes], np.int64)[tar.labels] for tar in tars]
    return np.concatenate(each), tuple(names)


# ---- one tar ------------------------------------------------------------------------------------


def load_tar(path: str) -> Tar:
    """A shard, as it is or as the index beside it knows it; where it can, it leaves one there.

    Raises:
        InputError: a tar that is damaged or compressed, or not in WebDataset's layout.
    """
    with reading(lambda: f"{path} cannot be used as an uncompressed tar of images"):
        status = _status(os.stat(path))
        place = Path(path).with_name(f".{Path(path).name}.fastdiff.npz")
        arrays = _known(place, status)
        if arrays is None:
            arrays = _scan(path)
            with suppress(OSError):
                write_arrays(place, {**arrays, "version": [FORMAT, *status]})
    names, classes = bytes(arrays["names"]), tuple(map(str, arrays["classes"]))
    return Tar(path, status, names, arrays["offsets"], arrays["lengths"], arrays["labels"], classes)


def _known(place: Path, status: Status) -> dict[str, Any] | None:
    """What an index says, unless it is another tar's or damaged."""
    try:
        arrays = read_arrays(place, ("version", "names", "offsets", "lengths", "labels", "classes"))
    except InputError:
        return None
    return arrays if arrays["version"].tolist() == [FORMAT, *status] else None


def _scan(path: str) -> dict[str, Any]:
    with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        found = list(_samples(tar, file.fileno()))
        # Python's module takes anything that is no header for the end.
        check(os.pread(file.fileno(), 512, tar.offset) == bytes(512), "it is damaged or ends too early")
    check(found, f"it holds no images ({', '.join(ENDINGS)})")
    images = [image for image, _ in found]
    unlabelled = [image.name for image, label in found if label is None]
    check(len(unlabelled) in (0, len(images)), f"{''.join(unlabelled[:1])} has no label, others have")
    classes = sorted({label for _, label in found if label is not None})
    numbers = {name: i for i, name in enumerate(classes)}
    return {
        "names": np.frombuffer(b"".join(map(_name, images)), np.uint8),
        "offsets": np.array([image.offset_data for image in images], np.int64),
        "lengths": np.array([image.size for image in images], np.int64),
        "labels": np.array([numbers[label] for _, label in found if label is not None], np.int64),
        "classes": np.array(classes, np.str_),
    }


def _samples(tar: tarfile.TarFile, file: int) -> Iterator[tuple[tarfile.TarInfo, str | None]]:
    """The image and the label of each sample."""
    for name, group in groupby(filter(_ending, tar), key=_sample):
        members = list(group)
        images = [member for member in members if _ending(member) in ENDINGS]
        check(len(images) == 1, f"sample {name} must have one image, got {_listed(images)}")
        labels = [(member, _label(member, file)) for member in members if member not in images]
        found = [(member, label) for member, label in labels if label is not None]
        check(len(found) <= 1, f"sample {name} must have one label, got {_listed(member for member, _ in found)}")
        yield images[0], found[0][1] if found else None


def _sample(member: tarfile.TarInfo) -> str:
    folder, name = os.path.split(member.name)
    return os.path.join(folder, name.partition(".")[0])


def _ending(member: tarfile.TarInfo) -> str:
    """The ending of an image or a label; "" of other and of hidden files."""
    stem, dot, ending = os.path.basename(member.name).partition(".")
    ending = (dot + ending).lower()
    return ending if stem and member.isfile() and ending in (*ENDINGS, *LABELS) else ""


def _name(image: tarfile.TarInfo) -> bytes:
    return " ".join(image.name.replace("\0", " ").split()).encode(errors="replace") + bytes(1)


def _listed(members: Iterable[tarfile.TarInfo]) -> str:
    return " and ".join(member.name for member in members) or "none"


def _label(member: tarfile.TarInfo, file: int) -> str | None:
    with reading(lambda: f"{member.name} holds no label"):
        check(member.size <= LARGEST, f"it has {member.size} bytes")
        return LABELS[_ending(member)](os.pread(file, member.size, member.offset_data).decode())


def _of_text(text: str) -> str:
    name = " ".join(text.split())
    check(0 < len(name) <= LONGEST, f"names of classes have 1 to {LONGEST} characters, got {len(name)}")
    return name


def _of_json(text: str) -> str | None:
    value = json.loads(text)
    label = value.get("label") if isinstance(value, dict) else None
    check(label is None or type(label) in (int, str), f"labels are whole numbers or text, got {label!r:.50}")
    return None if label is None else _of_text(str(label))


LABELS: dict[str, Callable[[str], str | None]] = {".cls": _of_text, ".json": _of_json}
