"""Mean and covariance of features as they come, in float64 and in memory that does not grow with their number."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import _io
from fastdiff.errors import InputError, check
from fastdiff.metrics.features import check_features

BLOCK = 1024  # rows that wait to be multiplied together: fewer are slower, as the whole covariance is read each time
PANEL = 256  # columns of the covariance that are summed together


class FeatureStatistics:
    """The mean and the covariance of features, batch by batch.

    Rows are centred on the mean of their block before they are multiplied, and blocks joined by the difference of
    their means (Chan et al. 1979): nothing cancels, wherever the features lie. The order of batches, how they are cut
    and which process saw them change rounding only.

    Args:
        dim: width of the features.
        device: where the covariance is summed: 8 dim^2 bytes.

    Attributes:
        count: how many rows there were, 0 for statistics of a file that does not say.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        check(isinstance(dim, int) and dim >= 1, f"dim must be a whole number of at least 1, got {dim!r}")
        self.dim, self.device, self.count = dim, torch.device(device), 0
        self._taken = 0  # rows that mean and squares are of; the others wait
        self._summed = True  # squares are sums, and not a file's covariance of nobody knows how many rows
        self._rows: Tensor | None = None  # where they wait; the last one is for what joins them to those taken up
        self._mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self._squares = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # the lower half

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Those of features ``[n, dim]``, on their device."""
        made = cls(features.shape[1], features.device)
        made.update(features)
        return made

    def update(self, features: Tensor) -> None:
        """Take up features ``[n, dim]`` of any real dtype, on any device.

        Raises:
            InputError: another width, values that are not finite (the row is named); nothing has been taken up.
        """
        check_features("features", features, 0)
        width = features.shape[1]
        check(width == self.dim, f"features must be {self.dim} wide, as those before, got {width}")
        self._check_sums()
        features = features.detach()
        while len(features):
            free = self._free_rows()[: len(features)]
            free.copy_(features[: len(free)])
            self.count += len(free)
            if self.count - self._taken == BLOCK:
                self._take_up()
            features = features[len(free) :]

    def merge(self, other: FeatureStatistics) -> None:
        """Take up what another one has seen, which stays as it is.

        Raises:
            InputError: another width, or statistics of a file that does not say of how many rows they are.
        """
        check(isinstance(other, FeatureStatistics), f"merge needs FeatureStatistics, got {type(other).__name__}")
        check(other.dim == self.dim, f"merge needs statistics {self.dim} wide, got {other.dim}")
        for each in (self, other):
            each._check_sums()
            each._take_up()
        if other.count:
            between, self._mean = self._joined(other._mean.to(self.device), other.count)
            self._squares += other._squares.to(self.device)
            self._add_squares(between[None])
            self.count = self._taken = self.count + other.count

    @property
    def mean(self) -> Tensor:
        """float64 ``[dim]``.

        Raises:
            InputError: there were no features.
        """
        check(self.count or not self._summed, "there is no mean of no features: update first")
        self._take_up()
        return self._mean.clone()

    @property
    def covariance(self) -> Tensor:
        """float64 ``[dim, dim]``, with n - 1 in the denominator.

        Raises:
            InputError: there were fewer than two features.
        """
        check(self.count > 1 or not self._summed, f"a covariance needs at least 2 features, there were {self.count}")
        self._take_up()
        return _mirrored(self._squares / (self.count - 1 if self._summed else 1))

    def state(self) -> tuple[int, Tensor, Tensor]:
        """``(count, mean, squares)``, on the CPU: what another process needs to :meth:`merge` these statistics."""
        self._take_up()
        return self.count, self._mean.cpu(), self._squares.cpu()

    @classmethod
    def from_state(cls, count: int, mean: Tensor, squares: Tensor) -> FeatureStatistics:
        """The inverse of :meth:`state`."""
        made = cls(len(mean), mean.device)
        made.count = made._taken = count
        made._mean, made._squares = mean, squares
        return made

    def save(self, path: Path | str) -> None:
        """Write an ``.npz`` with ``mu`` and ``sigma``, as pytorch-fid and EDM read them, and ``count``.

        Raises:
            InputError: fewer than two features.
        """
        write_arrays(Path(path), self.arrays())

    def arrays(self, suffix: str = "") -> dict[str, Any]:
        """What :meth:`save` writes, by names with a suffix."""
        moments = {"mu": self.mean.cpu().numpy(), "sigma": self.covariance.cpu().numpy(), "count": np.int64(self.count)}
        return {name + suffix: value for name, value in moments.items()}

    @classmethod
    def load(cls, path: Path | str, device: torch.device | str = "cpu") -> FeatureStatistics:
        """Read what :meth:`save`, pytorch-fid or EDM wrote: ``mu``, ``sigma`` and perhaps ``count``.

        Raises:
            InputError: no such file, damaged, other arrays in it, or values that are not finite.
        """
        return cls.from_arrays(path, read_arrays(Path(path), ("mu", "sigma"), ("count",)), device=device)

    @classmethod
    def from_arrays(
        cls, path: Path | str, arrays: dict[str, Any], suffix: str = "", device: torch.device | str = "cpu"
    ) -> FeatureStatistics:
        """The inverse of :meth:`arrays`, as they were found in ``path``; raises as :meth:`load` does."""
        mu, sigma = (name + suffix for name in ("mu", "sigma"))
        mean, covariance = (torch.from_numpy(arrays[key]).to(device, torch.float64) for key in (mu, sigma))
        fits = mean.ndim == 1 and covariance.shape == 2 * mean.shape and len(mean) > 0
        shapes = f"{mu} {list(mean.shape)} and {sigma} {list(covariance.shape)}"
        check(fits, f"{path} must hold {mu} [d] and {sigma} [d, d], got {shapes}")
        finite = bool(mean.isfinite().all() and covariance.isfinite().all())
        check(finite, f"{path} holds NaN or infinite values")
        count = int(arrays.get("count" + suffix, np.int64(0)))
        if count > 1:
            return cls.from_state(count, mean, covariance * (count - 1))
        made = cls.from_state(0, mean, covariance)
        made._summed = False
        return made

    def _check_sums(self) -> None:
        check(self._summed, "these statistics are of a file that does not say of how many rows they are")

    def _free_rows(self) -> Tensor:
        if self._rows is None:
            self._rows = torch.empty(BLOCK + 1, self.dim, dtype=torch.float64, device=self.device)
        return self._rows[self.count - self._taken : BLOCK]

    def _take_up(self) -> None:
        waiting = self.count - self._taken
        if not waiting or self._rows is None:
            return
        rows = self._rows[: waiting + 1]
        mean = rows[:-1].mean(0)
        rows[:-1] -= mean
        rows[-1], self._mean = self._joined(mean, waiting)
        self._add_squares(rows)
        self._taken = self.count

    def _joined(self, mean: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The row whose square joins ``count`` rows of a mean to those that are taken up, and the mean of all."""
        apart, share = mean - self._mean, count / (self._taken + count)
        return apart * (self._taken * share) ** 0.5, self._mean + apart * share

    def _add_squares(self, rows: Tensor) -> None:
        """Add the lower half of rows^T rows, column by column of blocks: half the products."""
        for i in range(0, self.dim, PANEL):
            panel = slice(i, i + PANEL)
            self._squares[i:, panel].addmm_(rows[:, i:].mT, rows[:, panel])


def _mirrored(lower: Tensor) -> Tensor:
    """The symmetric matrix of a lower half, in its memory; by blocks, which is four times as fast as all at once."""
    for i in range(0, len(lower), PANEL):
        panel, rest = slice(i, i + PANEL), slice(i + PANEL, None)
        lower[panel, rest] = lower[rest, panel].mT
        corner = lower[panel, panel]
        corner.copy_(corner.tril() + corner.tril(-1).mT)
    return lower


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """An ``.npz``, whole or not at all."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    _io.replace(path, buffer.getvalue())


def read_arrays(path: Path, needed: tuple[str, ...], more: tuple[str, ...] = ()) -> dict[str, Any]:
    """The arrays of an ``.npz`` by name; nothing in it is ever unpickled.

    Raises:
        InputError: no such file, damaged, an array missing.
    """
    check(path.is_file(), f"{path} does not exist or is no file")
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            found = {name: file[name] for name in (*needed, *more) if name in file.files}
            names = list(file.files)
    except Exception as error:  # whatever zip, deflate and NumPy's header say of damage
        raise InputError(f"{path} is no .npz file of arrays, or damaged: {error}") from None
    missing = [name for name in needed if name not in found]
    check(not missing, f"{path} lacks {', '.join(missing)}: it holds {', '.join(names) or 'nothing'}")
    return found
