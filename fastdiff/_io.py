"""Every write to disk goes through here: synced, atomic, and in one place for tests to break; and what people write."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastdiff.errors import InputError, check


def write(path: Path, content: bytes) -> None:
    """Write a new file and wait until it is on disk."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the directory's entries are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Rename and wait until the new name is on disk."""
    os.rename(source, target)
    sync_directory(target.parent)


def remove_tree(path: Path) -> None:
    shutil.rmtree(path)


def discard(path: Path) -> None:
    """Take the name away first, so that no half-removed directory is ever found under it."""
    unfinished = beside(path)
    rename(path, unfinished)
    remove_tree(unfinished)


def beside(path: Path) -> Path:
    """A fresh hidden name in the same directory, for what is not finished."""
    return path.parent / f".unfinished-{path.name}-{uuid.uuid4().hex[:8]}"


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """An unfinished directory to write into, which gets its name when it is whole, or is removed."""
    unfinished = begin_directory(target)
    try:
        yield unfinished
        finish_directory(unfinished, target)
    except BaseException:
        abandon_directory(unfinished)
        raise


def begin_directory(target: Path) -> Path:
    """What :func:`new_directory` begins with, where several processes write together."""
    check(not target.exists(), f"{target} already exists")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = beside(target)
    unfinished.mkdir()
    return unfinished


def finish_directory(unfinished: Path, target: Path) -> None:
    """And what it ends with."""
    sync_directory(unfinished)
    rename(unfinished, target)


def abandon_directory(unfinished: Path) -> None:
    """Or so."""
    if unfinished.exists():
        remove_tree(unfinished)


def replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, over an old one of that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = beside(path)
    try:
        write(unfinished, content)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def append(path: Path, content: bytes) -> None:
    """Add to the end of a file and wait until it is on disk; a kill may leave an unfinished last line."""
    with open(path, "ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_json(path: Path, value: Any) -> None:
    replace(path, to_json(value))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file that somebody else may have written.

    Raises:
        InputError: no such file, no JSON, something else than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    check(isinstance(value, dict), f"{path} must hold an object, got {type(value).__name__}")
    return dict(value)


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
