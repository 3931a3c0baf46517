"""Averages of weights chosen after training (Karras et al. 2024, section 3 and appendix C).

An average with power-function weights is the integral of the weights' path with a known profile. Snapshots of a few
such averages along a run therefore give, by least squares of profiles, any other one: ``reconstruct(snapshots(run),
0.07)``. ``run/averages/step-00001000/`` holds a file for each average and ``manifest.json``, as checkpoints do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastdiff import _io
from fastdiff.errors import InputError, check
from fastdiff.training import manifest
from fastdiff.training.checkpoint import ALONE
from fastdiff.training.distributed import Group
from fastdiff.training.ema import Average, PowerEMA, gamma_of
from fastdiff.training.parallel import whole_of

FOLDER = "averages"
BLOCK = 2**20  # bytes that are hashed at once


class Profile(NamedTuple):
    """How much an average after ``time`` steps holds of each moment tau: (gamma + 1) tau^gamma / time^(gamma + 1)."""

    gamma: float
    time: float


@dataclass(frozen=True)
class Snapshot:
    """An average on disk: its file, its profile, and what the manifest says of the file."""

    file: Path
    profile: Profile
    bytes: int
    sha256: str


# ---- on disk --------------------------------------------------------------------------------


def snapshot(
    run: Path,
    step: int,
    averages: Mapping[str, Average],
    *,
    dtype: torch.dtype = torch.float32,
    group: Group = ALONE,
) -> Path:
    """Commit the power-function averages among ``averages`` after ``step`` steps, in place of what was there.

    Args:
        dtype: to store them in; float16 takes half the space and keeps three digits.
        group: the processes that call this together; the first one writes.

    Raises:
        InputError: no power-function average, no step yet, values that ``dtype`` cannot hold.
    """
    powers = {name: average for name, average in averages.items() if isinstance(average, PowerEMA)}
    check(powers, "snapshots are of power-function averages: train with one, power:SIGMA_REL")
    check(step >= 1, f"before the first step there is nothing to average, got step {step}")
    whole = {name: {key: whole_of(value) for key, value in each.tensors.items()} for name, each in powers.items()}
    target = run / FOLDER / f"step-{step:08d}"
    widths = {name: average.sigma_rel for name, average in powers.items()}
    group.together(partial(_commit, target, step, whole, widths, dtype) if group.is_first else lambda: None)
    return target


def snapshots(run: Path) -> list[Snapshot]:
    """The snapshots of a run, oldest first.

    Raises:
        InputError: none there, or a manifest that cannot be read.
    """
    folders = sorted((run / FOLDER).glob("step-" + 8 * "[0-9]"))
    check(folders, f"{run} holds no snapshots of averages: expected {run / FOLDER}/step-*")
    return [each for folder in folders for each in _listed(folder)]


def forget(run: Path, step: int) -> None:
    """Remove the snapshots after ``step``, from which training goes on."""
    for folder in (run / FOLDER).glob("step-" + 8 * "[0-9]"):
        if int(folder.name.removeprefix("step-")) > step:
            _io.discard(folder)


def _commit(
    target: Path, step: int, whole: dict[str, dict[str, Tensor]], widths: dict[str, float], dtype: torch.dtype
) -> None:
    """One file after the other, so that only one is ever in memory."""
    if target.exists():  # of a run that was resumed from before it
        _io.discard(target)
    for litter in target.parent.glob(".unfinished-*"):
        _io.remove_tree(litter)
    with _io.new_directory(target) as unfinished:
        files = {}
        for name, tensors in whole.items():
            content = safetensors.torch.save({key: _stored(key, value, dtype) for key, value in tensors.items()})
            _io.write(unfinished / f"{name}.safetensors", content)
            files[f"{name}.safetensors"] = {"sigma_rel": widths[name], **manifest.digest(content)}
        manifest.write(unfinished, step, files)


def _stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.contiguous().cpu()
    stored = tensor.to("cpu", dtype).contiguous()
    check(bool(stored.isfinite().all()), f"{name} of an average is not finite in {dtype}: no snapshot is written")
    return stored


def _listed(folder: Path) -> list[Snapshot]:
    try:
        found = manifest.read(folder)
        return [_entry(folder / name, found["step"], **entry) for name, entry in found["files"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"snapshot {folder} has no readable {manifest.NAME}: {error}") from None


def _entry(file: Path, step: int, *, sigma_rel: float, bytes: int, sha256: str) -> Snapshot:
    return Snapshot(file, Profile(gamma_of(sigma_rel), step), bytes, sha256)


# ---- reconstruction -------------------------------------------------------------------------


def reconstruct(found: Sequence[Snapshot], sigma_rel: float, *, step: int | None = None) -> dict[str, Tensor]:
    """The average that training with this ``sigma_rel`` would have had after ``step`` steps, by default the last.

    Files are read one tensor at a time: memory holds the result, in float64, and the largest tensor. What is not
    averaged (whole numbers) is the last snapshot's.

    Returns:
        Tensors by name, at least float32.

    Raises:
        InputError: no snapshots, a width or step out of range, a file that is damaged or lacks a tensor.
    """
    check(found, "no snapshots of averages to reconstruct from")
    found = sorted(found, key=lambda each: each.profile.time)
    newest = found[-1].profile.time
    check(step is None or 1 <= step <= newest, f"step must lie in 1...{newest:g}, the newest snapshot's, got {step}")
    target = Profile(gamma_of(PowerEMA.checked(sigma_rel)), newest if step is None else step)
    total: dict[str, Tensor] = {}
    for each, share in zip(found, weights([each.profile for each in found], target).tolist(), strict=True):
        dtypes = _add(total, each, share)
    return {name: value.to(dtypes[name]) for name, value in total.items()}


def weights(profiles: Sequence[Profile], target: Profile) -> Tensor:
    """Of each average in the combination whose profile is nearest to the target's: float64 ``[n]``, their sum 1.

    Least squares in the profiles' inner products (Karras et al. 2024, appendix C). That the sum is 1, which they leave
    to the fit, keeps what does not change in training as it is; it is the last row, with its multiplier.
    """
    gamma, time = torch.tensor(profiles, dtype=torch.float64).T
    products = inner(gamma[:, None], time[:, None], gamma, time)
    wanted = inner(gamma, time, *torch.tensor(target, dtype=torch.float64))
    scale = products.diagonal().rsqrt()  # profiles of length 1, for the sake of the condition number
    system = torch.zeros(len(gamma) + 1, len(gamma) + 1, dtype=torch.float64)
    system[:-1, :-1] = products * scale * scale[:, None]
    system[-1, :-1] = system[:-1, -1] = scale / scale.max()
    right = torch.cat((wanted * scale, 1 / scale.max()[None]))
    solution: Tensor = torch.linalg.lstsq(system, right, driver="gelsd").solution
    return solution[:-1] * scale


def inner(gamma1: Tensor, time1: Tensor, gamma2: Tensor, time2: Tensor) -> Tensor:
    """The integral over tau of the product of two profiles."""
    a, b = gamma1 + 1, gamma2 + 1
    # tau^(a + b - 2) up to the earlier time, its power in logarithms lest it overflow
    power = (a + b - 1) * torch.minimum(time1, time2).log() - a * time1.log() - b * time2.log()
    return a * b / (a + b - 1) * power.exp()


def _add(total: dict[str, Tensor], each: Snapshot, share: float) -> dict[str, torch.dtype]:
    """Add a share of a snapshot's tensors; returns the dtypes of the result."""
    _verify(each)
    try:
        with safe_open(each.file, "pt") as tensors:
            names = list(tensors.keys())
            check(not total or total.keys() == set(names), f"snapshot {each.file} has not the tensors of the others")
            return {name: _add_one(total, name, tensors.get_tensor(name), share) for name in names}
    except SafetensorError as error:
        raise InputError(f"snapshot {each.file} cannot be read: {error}") from None


def _add_one(total: dict[str, Tensor], name: str, tensor: Tensor, share: float) -> torch.dtype:
    if not tensor.is_floating_point():
        total[name] = tensor.clone()
        return tensor.dtype
    total.setdefault(name, torch.zeros(tensor.shape, dtype=torch.float64)).add_(tensor, alpha=share)
    return torch.promote_types(tensor.dtype, torch.float32)


def _verify(each: Snapshot) -> None:
    """Every byte against the manifest, without holding them."""
    found = hashlib.sha256()
    try:
        with open(each.file, "rb") as file:
            while block := file.read(BLOCK):
                found.update(block)
            size = file.tell()
    except OSError as error:
        raise InputError(f"snapshot {each.file} cannot be read: {error.strerror}") from None
    whole = size == each.bytes and found.hexdigest() == each.sha256
    check(whole, f"snapshot {each.file} is damaged: it is not what its {manifest.NAME} says")
