"""What a directory holds, byte by byte: ``manifest.json`` with the size and SHA-256 of each file, and its own.

It is written last. What it says of itself makes a bit that flips in it as visible as one in a file.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fastdiff import _io

NAME = "manifest.json"
FORMAT = 2  # 1 had no seal
SEAL = "seal"


def digest(content: bytes) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def write(folder: Path, step: int, files: dict[str, Any]) -> None:
    """Of these files: name to :func:`digest`, and whatever else there is to say."""
    manifest = {"format": FORMAT, "step": step, "files": files}
    _io.write(folder / NAME, _io.to_json({**manifest, SEAL: _seal(manifest)}))


def read(folder: Path) -> dict[str, Any]:
    """``format``, ``step`` and ``files``; of a newer format, as it is.

    Raises:
        OSError, ValueError, KeyError, TypeError: none that can be read, or not as it was written.
    """
    manifest: dict[str, Any] = json.loads((folder / NAME).read_bytes())
    seal, version = manifest.pop(SEAL, None), manifest.setdefault("format", 1)
    _check(type(version) is int and version >= 1, f"its format is {version!r}")
    if version == FORMAT:
        _check(seal == _seal(manifest), "its own SHA-256 does not match")
    _check(type(manifest["step"]) is int and type(manifest["files"]) is dict, "step and files are missing")
    return manifest


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(_io.to_json(manifest)).hexdigest()


def _check(whole: bool, what: str) -> None:
    if not whole:
        raise ValueError(what)
