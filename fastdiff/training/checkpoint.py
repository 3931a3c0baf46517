"""Checkpoints: directories that exist only when they are whole.

``run/checkpoints/step-00000500/`` holds safetensors and JSON files and their :mod:`~fastdiff.training.manifest`. It is
written beside, synced, renamed into place, and only then is an old one removed. A directory without a valid manifest
does not exist for resuming. Nothing is ever unpickled.

Tensors that are split over processes are written by each of them, ``model.1-of-4.safetensors``, along their first
dimension in the order of ranks; what is whole in every process is in the first one's file alone.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fastdiff import _io
from fastdiff.errors import InputError, check
from fastdiff.training import manifest
from fastdiff.training.distributed import Group

ALONE = Group()
FOLDER = "checkpoints"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory: its files as bytes, each with the SHA-256 of the manifest."""

    path: Path
    step: int
    files: dict[str, bytes]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of ``name.safetensors``, whole, however many processes have written them."""
        parts = [self._tensors(file) for file in self._parts(name)]
        return {key: parts[0][key] if len(found) == 1 else torch.cat(found) for key, found in _joined(parts).items()}

    def load_into(self, model: nn.Module, name: str) -> None:
        """Load ``name.safetensors`` into a model; every tensor must fit."""
        load_tensors(model, self.tensors(name), self.path)

    def json(self, name: str) -> Any:
        """The value of ``name.json``."""
        return json.loads(self._file(f"{name}.json"))

    def _parts(self, name: str) -> list[str]:
        """The file of a name, or those of all processes by rank."""
        form = re.compile(re.escape(name) + r"\.(\d+)-of-(\d+)\.safetensors")
        found = sorted((int(m[1]), int(m[2]), m[0]) for m in map(form.fullmatch, self.files) if m)
        if not found:
            return [f"{name}.safetensors"]
        world = found[0][1]
        complete = [(rank, of) for rank, of, _ in found] == [(rank, world) for rank in range(world)]
        check(complete, f"checkpoint {self.path}: {name} lacks the parts of some of {world} processes")
        return [file for _, _, file in found]

    def _tensors(self, file: str) -> dict[str, Tensor]:
        try:
            return safetensors.torch.load(self._file(file))
        except SafetensorError as error:
            raise InputError(f"checkpoint {self.path}: {file} cannot be read: {error}") from None

    def _file(self, name: str) -> bytes:
        check(name in self.files, f"checkpoint {self.path} has no {name}")
        return self.files[name]


def load_tensors(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load the tensors of a checkpoint at ``path`` into a model; every one must fit."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(f"checkpoint {path}: {' '.join(str(error).split())}") from None


def save(
    run: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    values: dict[str, Any],
    *,
    keep: int = 2,
    group: Group = ALONE,
    sharded: bool = False,
) -> Path:
    """Commit a checkpoint of ``run`` at ``step`` and then remove all but the ``keep`` newest.

    Args:
        tensors: file name (without ending) to named tensors, written as safetensors; this process's parts of them
            where they are ``sharded``.
        values: file name (without ending) to a value, written as JSON.
        group: the processes that call this together. The checkpoint exists when all have written their part.

    Returns:
        The checkpoint's directory. One that is already there and whole is kept as it is.

    Raises:
        InputError, OSError: it cannot be written, by any of the processes; nothing of it is left.
    """
    target = run / FOLDER / f"step-{step:08d}"
    if group.everyone(group.together(_in_first(group, lambda: _is_there(target))))[0]:
        return target
    contents: dict[str, bytes] = {}
    if sharded or group.is_first:
        part = f".{group.rank}-of-{group.world}" if sharded and group.world > 1 else ""
        contents = {f"{name}{part}.safetensors": _serialized(named) for name, named in tensors.items()}
    if group.is_first:
        contents |= {f"{name}.json": _io.to_json(value) for name, value in values.items()}
    _commit(target, contents, step, group)
    group.together(_in_first(group, lambda: _rotate(target, keep)))
    return target


def _in_first(group: Group, work: Callable[[], Any]) -> Callable[[], Any]:
    return work if group.is_first else lambda: None


def _is_there(target: Path) -> bool:
    """Whether it is there and whole; a damaged one is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists() or _is_whole(target):
        return target.exists()
    _io.discard(target)
    return False


def load(path: Path | str) -> Checkpoint:
    """Read and verify a checkpoint.

    Args:
        path: a run directory (its newest whole checkpoint; damaged newer ones are named in a warning), a
            checkpoint directory, or a file in one.

    Raises:
        InputError: nothing there, a damaged or newer checkpoint, or a pickle, which is never opened.
    """
    path = Path(path)
    check(path.exists(), f"checkpoint {path} does not exist")
    if path.is_file():
        inside = (path.parent / manifest.NAME).is_file()
        check(inside, f"{path} is not part of a fastdiff checkpoint: give a run directory (pickles are never opened)")
        path = path.parent
    if (path / manifest.NAME).is_file() or path.name.startswith("step-"):
        return _read(path)
    return _newest(path)


def steps(run: Path) -> list[Path]:
    """The checkpoint directories of a run by name, newest first; whether they are whole is for :func:`load` to say."""
    return sorted((run / FOLDER).glob("step-" + 8 * "[0-9]"), reverse=True)


def _newest(run: Path) -> Checkpoint:
    candidates = steps(run)
    check(candidates, f"{run} holds no checkpoint: expected {run / FOLDER}/step-*")
    damage = []
    for candidate in candidates:
        try:
            checkpoint = _read(candidate)
        except _NewerError:
            raise
        except InputError as error:
            damage.append(str(error))
            continue
        if damage:
            warnings.warn(f"using {candidate.name} instead: {'; '.join(damage)}", stacklevel=3)
        return checkpoint
    raise InputError(f"{run} holds no whole checkpoint: {'; '.join(damage)}")


class _NewerError(InputError):
    """Written by a newer version: falling back to an older checkpoint would be silent loss."""


def _read(path: Path) -> Checkpoint:
    """Verify every byte against the manifest."""
    try:
        found = manifest.read(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"checkpoint {path} has no readable {manifest.NAME}: {error}") from None
    if (version := found["format"]) > manifest.FORMAT:
        upgrade = f"this fastdiff reads up to {manifest.FORMAT}: upgrade it"
        raise _NewerError(f"checkpoint {path} has format {version}; {upgrade}")
    return Checkpoint(path, found["step"], {name: _verified(path, name, each) for name, each in found["files"].items()})


def _verified(path: Path, name: str, entry: dict[str, Any]) -> bytes:
    check(Path(name).name == name, f"checkpoint {path}: {name!r} is not a plain file name")
    try:
        content = (path / name).read_bytes()
    except OSError as error:
        raise InputError(f"checkpoint {path}: {name} cannot be read: {error.strerror}") from None
    expected = entry.get("bytes") if isinstance(entry, dict) else None
    check(len(content) == expected, f"checkpoint {path}: {name} has {len(content)} bytes instead of {expected}")
    check(manifest.digest(content) == entry, f"checkpoint {path}: {name} is damaged, its SHA-256 does not match")
    return content


def _commit(target: Path, contents: dict[str, bytes], step: int, group: Group) -> None:
    """Each process writes its files, the first one the manifest of all and the name."""
    unfinished = group.everyone(group.together(_in_first(group, lambda: _io.begin_directory(target))))[0]
    try:
        digests = group.together(lambda: _written(unfinished, contents))
        files = {name: entry for each in group.everyone(digests) for name, entry in each.items()}
        group.together(_in_first(group, lambda: _finish(unfinished, target, step, files)))
    except BaseException:
        if group.is_first:
            _io.abandon_directory(unfinished)
        raise


def _written(folder: Path, contents: dict[str, bytes]) -> dict[str, Any]:
    for name, content in contents.items():
        _io.write(folder / name, content)
    return {name: manifest.digest(content) for name, content in contents.items()}


def _finish(unfinished: Path, target: Path, step: int, files: dict[str, Any]) -> None:
    manifest.write(unfinished, step, files)
    _io.finish_directory(unfinished, target)


def _rotate(newest: Path, keep: int) -> None:
    """Remove old checkpoints, later ones (found damaged when the run was resumed), and what a kill left unfinished."""
    others = [path for path in steps(newest.parent.parent) if path != newest]
    kept = [path for path in others if path.name < newest.name][: keep - 1]
    for path in others:
        if path not in kept:
            _io.discard(path)
    for litter in newest.parent.glob(".unfinished-*"):
        _io.remove_tree(litter)


def _is_whole(path: Path) -> bool:
    try:
        _read(path)
    except InputError:
        return False
    return True


def _serialized(named: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.detach().contiguous().cpu() for name, tensor in named.items()})


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, tensor in part.items():
            found.setdefault(name, []).append(tensor)
    return found
