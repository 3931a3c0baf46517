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

BLOCK = 4096  # rows that wait to be taken up together


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
        self._waiting: list[Tensor] = []
        self._mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self._squares = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # on a CPU the lower half

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Those of features ``[n, dim]``, on their device."""
        made = cls(features.shape[1], features.device)
        for part in features.split(BLOCK):  # each is copied
            made.update(part)
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
        if len(features):
            self._waiting.append(features.detach().to(self.device, copy=True))
            self.count += len(features)
        if self.count - self._taken >= BLOCK:
            self._take_up()

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
        whole = self._squares.tril() + self._squares.tril(-1).mT
        return whole / (self.count - 1) if self._summed else whole

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
        buffer = io.BytesIO()
        np.savez(buffer, mu=self.mean.cpu().numpy(), sigma=self.covariance.cpu().numpy(), count=np.int64(self.count))
        _io.replace(Path(path), buffer.getvalue())

    @classmethod
    def load(cls, path: Path | str, device: torch.device | str = "cpu") -> FeatureStatistics:
        """Read what :meth:`save`, pytorch-fid or EDM wrote: ``mu``, ``sigma`` and perhaps ``count``.

        Raises:
            InputError: no such file, damaged, other arrays in it, or values that are not finite.
        """
        arrays = read_arrays(Path(path), ("mu", "sigma"), ("count",))
        mean, covariance = (torch.from_numpy(arrays[key]).to(device, torch.float64) for key in ("mu", "sigma"))
        fits = mean.ndim == 1 and covariance.shape == 2 * mean.shape and len(mean) > 0
        shapes = f"mu {list(mean.shape)} and sigma {list(covariance.shape)}"
        check(fits, f"{path} must hold mu [d] and sigma [d, d], got {shapes}")
        finite = bool(mean.isfinite().all() and covariance.isfinite().all())
        check(finite, f"{path} holds NaN or infinite values")
        count = int(arrays.get("count", np.int64(0)))
        if count > 1:
            return cls.from_state(count, mean, covariance * (count - 1))
        made = cls.from_state(0, mean, covariance)
        made._summed = False
        return made

    def _check_sums(self) -> None:
        check(self._summed, "these statistics are of a file that does not say of how many rows they are")

    def _take_up(self) -> None:
        if not self._waiting:
            return
        rows = torch.cat([part.double() for part in self._waiting])
        self._waiting = []
        mean = rows.mean(0)
        between, self._mean = self._joined(mean, len(rows))
        self._add_squares(torch.cat((rows.sub_(mean), between[None])))
        self._taken += len(rows)

    def _joined(self, mean: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The row whose square joins ``count`` rows of a mean to those that are taken up, and the mean of all."""
        apart, share = mean - self._mean, count / (self._taken + count)
        return apart * (self._taken * share) ** 0.5, self._mean + apart * share

    def _add_squares(self, rows: Tensor) -> None:
        """Add rows^T rows, on a CPU in half the products."""
        if self.device.type != "cpu":
            self._squares.addmm_(rows.mT, rows)
            return
        from scipy.linalg.blas import dsyrk

        squares = self._squares.numpy().T  # BLAS counts columns first: this is the same memory, and its upper half
        dsyrk(1.0, rows.numpy().T, beta=1.0, c=squares, overwrite_c=1)


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
