"""Noise schedules: float64 tables of alpha and sigma by timestep, and ways to space the timesteps.

A schedule states how much signal and how much noise is in x_t::

    x_t = alpha[t] * x0 + sigma[t] * noise,        t = 0 (cleanest) ... T-1 (noisiest)

``t = 0`` is one noising step, not the clean image: the clean end (alpha 1, sigma 0) is not in the table.
``alpha`` and ``sigma`` are square roots: for variance-preserving schedules ``alpha**2`` is the
alpha-bar of Ho et al. 2020 and ``alpha**2 + sigma**2 = 1``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import InputError, check, choose

SPACINGS = ("leading", "trailing", "linspace", "karras", "exponential", "beta")
MAX_BETA = 0.999
TABLES = ("betas", "log_snr", "c_noise", "kept")  # settings too long to show


@dataclass(frozen=True)
class Levels:
    """alpha, sigma, c_in and c_noise of :class:`Schedule` at some times, float64 ``[n]`` each."""

    alpha: Tensor
    sigma: Tensor
    c_in: Tensor
    c_noise: Tensor


@dataclass(frozen=True, eq=False)
class Schedule:
    """Signal and noise levels by timestep. Build one with the class methods.

    Attributes:
        alpha: float64 ``[T]``, scale of the data in x_t, non-increasing.
        sigma: float64 ``[T]``, standard deviation of the noise in x_t, increasing.
        c_in: float64 ``[T]``, scale of x_t on its way into the network (1 but for EDM).
        c_noise: ``[T]``, what the network is told at timestep t: int64 ``t`` itself for discrete
            schedules, float64 for EDM (ln(sigma)/4) and flow (1000 sigma).
        config: the arguments that build this schedule again, see :meth:`from_config`.
    """

    alpha: Tensor
    sigma: Tensor
    c_in: Tensor
    c_noise: Tensor
    config: dict[str, Any]

    def __post_init__(self) -> None:
        finite = all(bool(torch.isfinite(table).all()) for table in (self.alpha, self.sigma, self.c_in, self.c_noise))
        ordered = bool((self.alpha >= 0).all() and (self.sigma > 0).all() and (self.sigma.diff() >= 0).all())
        settings = {key: value for key, value in self.config.items() if key not in TABLES}
        check(finite and ordered, f"these settings give no schedule (finite, sigma positive and rising): {settings}")

    def __len__(self) -> int:
        return len(self.alpha)

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self.config.items() if k not in ("name", *TABLES))
        return f"Schedule.{self.config['name']}({settings})"

    # ---- quantities -------------------------------------------------------------------------

    @property
    def log_snr(self) -> Tensor:
        """float64 ``[T]``, ``log(alpha**2 / sigma**2)``; ``-inf`` at zero terminal SNR."""
        return 2 * (self.alpha.log() - self.sigma.log())

    @property
    def snr(self) -> Tensor:
        """float64 ``[T]``, ``alpha**2 / sigma**2``."""
        return (self.alpha / self.sigma) ** 2

    @property
    def variance_preserving(self) -> bool:
        """Whether ``alpha**2 + sigma**2 = 1`` throughout."""
        return bool(torch.allclose(self.alpha**2 + self.sigma**2, torch.ones_like(self.alpha), atol=1e-9))

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the last timestep holds no signal at all."""
        return bool(self.alpha[-1] == 0)

    # ---- between the timesteps --------------------------------------------------------------

    def at(self, t: Tensor) -> Levels:
        """The levels at fractional timesteps, float64 ``[n]`` in 0 ... T-1.

        What the network is told is linear between two timesteps, and with it the log-SNR or, for flow, sigma.
        """
        low = t.long()
        high, part = (low + 1).clamp(max=len(self) - 1), t - low
        tables = self.alpha, self.sigma, self.c_in, self.c_noise.double()
        alpha, sigma, c_in, c_noise = (torch.lerp(table[low], table[high], part) for table in tables)
        if self.config["name"] != "flow":
            ratio = torch.exp(-torch.lerp(self.log_snr[low], self.log_snr[high], part) / 2)
            alpha = (1 + ratio**2).rsqrt() if self.variance_preserving else alpha
            sigma = alpha * ratio
        if self.config["name"] == "edm":
            c_in, _ = _edm_inputs(sigma, self.config["sigma_data"])
        between = alpha, sigma, c_in, c_noise
        return Levels(*(torch.where(part == 0, table[low], b) for table, b in zip(tables, between, strict=True)))

    def timestep_of(self, log_snr: Tensor) -> Tensor:
        """The fractional timesteps ``[n]`` of given log-SNRs, 0 ... T-1: the inverse of :meth:`at`."""
        flow = self.config["name"] == "flow"
        levels, wanted = (self.sigma, torch.sigmoid(-log_snr / 2)) if flow else (-self.log_snr, -log_snr)
        high = torch.searchsorted(levels, wanted).clamp(1, max(1, len(self) - 1))
        low = high - 1
        high = high.clamp(max=len(self) - 1)
        part = (wanted - levels[low]) / (levels[high] - levels[low])
        return low + part.nan_to_num(0.0).clamp(0, 1)

    # ---- the schedules ----------------------------------------------------------------------

    @classmethod
    def linear(cls, timesteps: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """Betas linear in t (Ho et al. 2020, section 4). The default ends are tuned for T = 1000."""
        betas = torch.linspace(beta_start, beta_end, _length(timesteps), dtype=torch.float64)
        return _from_betas(betas, "linear", timesteps=timesteps, beta_start=beta_start, beta_end=beta_end)

    @classmethod
    def scaled_linear(cls, timesteps: int = 1000, *, beta_start: float = 0.00085, beta_end: float = 0.012) -> Schedule:
        """Square roots of the betas linear in t (Rombach et al. 2022, the latent-diffusion schedule)."""
        check(beta_start >= 0 and beta_end >= 0, f"betas must lie in (0, 1), got {beta_start} to {beta_end}")
        ends = math.sqrt(beta_start), math.sqrt(beta_end)
        betas = torch.linspace(*ends, _length(timesteps), dtype=torch.float64) ** 2
        return _from_betas(betas, "scaled_linear", timesteps=timesteps, beta_start=beta_start, beta_end=beta_end)

    @classmethod
    def cosine(cls, timesteps: int = 1000, *, s: float = 0.008, max_beta: float = MAX_BETA) -> Schedule:
        """alpha-bar = cos²((t/T + s)/(1 + s) π/2), betas capped (Nichol & Dhariwal 2021, eq. 17)."""
        check(s >= 0, f"s must be at least 0, got {s}")
        check(0 < max_beta < 1, f"max_beta must lie in (0, 1), got {max_beta}")
        grid = torch.arange(_length(timesteps) + 1, dtype=torch.float64) / timesteps
        alpha_bar = torch.cos((grid + s) / (1 + s) * (math.pi / 2)) ** 2
        betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta)
        return _from_betas(betas, "cosine", timesteps=timesteps, s=s, max_beta=max_beta)

    @classmethod
    def sigmoid(cls, timesteps: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
        """Betas along a sigmoid over (-6, 6) between the two ends (as in GeoDiff, Xu et al. 2022)."""
        ramp = torch.sigmoid(torch.linspace(-6, 6, _length(timesteps), dtype=torch.float64))
        betas = ramp * (beta_end - beta_start) + beta_start
        return _from_betas(betas, "sigmoid", timesteps=timesteps, beta_start=beta_start, beta_end=beta_end)

    @classmethod
    def laplace(cls, timesteps: int = 1000, *, mu: float = 0.0, b: float = 0.5) -> Schedule:
        """log-SNR follows a Laplace(mu, b) quantile function of t (Hang et al. 2024, Improved Noise Schedule)."""
        check(b > 0, f"b must be positive, got {b}")
        # The midpoints of T equal cells keep both ends finite.
        u = 0.5 - (torch.arange(_length(timesteps), dtype=torch.float64) + 0.5) / timesteps
        log_snr = mu - b * torch.sign(u) * torch.log1p(-2 * u.abs())
        alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        return _discrete(alpha, sigma, "laplace", timesteps=timesteps, mu=mu, b=b)

    @classmethod
    def from_betas(cls, betas: Sequence[float] | Tensor) -> Schedule:
        """Any betas in (0, 1); the last one may be 1 (zero terminal SNR)."""
        table = _numbers("betas", betas)
        return _from_betas(table, "from_betas", betas=table.tolist())

    @classmethod
    def from_log_snr(
        cls, log_snr: Sequence[float] | Tensor, *, c_noise: Sequence[float] | Tensor | None = None
    ) -> Schedule:
        """Any log-SNRs in falling order, variance-preserving: alpha² = sigmoid(log-SNR) (Kingma et al. 2021, eq. 3).

        Args:
            c_noise: what the network is told of each timestep, float64; left out, its number.
        """
        table = _numbers("log_snr", log_snr)
        check(bool(torch.isfinite(table).all() and (table.diff() < 0).all()), "log_snr must be finite and fall")
        alpha, sigma = torch.sigmoid(table).sqrt(), torch.sigmoid(-table).sqrt()
        if c_noise is None:
            return _discrete(alpha, sigma, "from_log_snr", log_snr=table.tolist())
        told = _numbers("c_noise", c_noise)
        check(told.shape == table.shape, f"c_noise must hold one number for each of {len(table)} timesteps")
        config = {"name": "from_log_snr", "log_snr": table.tolist(), "c_noise": told.tolist()}
        return cls(alpha, sigma, torch.ones_like(alpha), told, config)

    @classmethod
    def edm(
        cls,
        n: int = 1000,
        *,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        sigma_data: float = 0.5,
    ) -> Schedule:
        """Variance-exploding levels of Karras et al. 2022, eq. 5: alpha = 1, index 0 = sigma_min.

        The network sees ``x / sqrt(sigma**2 + sigma_data**2)`` and ``ln(sigma) / 4`` (table 1).
        """
        check(0 < sigma_min < sigma_max, f"0 < sigma_min < sigma_max must hold, got {sigma_min}, {sigma_max}")
        check(rho > 0 and sigma_data > 0, f"rho and sigma_data must be positive, got {rho}, {sigma_data}")
        sigma = karras_levels(_length(n), sigma_min, sigma_max, rho).flip(0)
        c_in, c_noise = _edm_inputs(sigma, sigma_data)
        settings = {"n": n, "sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho, "sigma_data": sigma_data}
        return cls(
            alpha=torch.ones_like(sigma),
            sigma=sigma,
            c_in=c_in,
            c_noise=c_noise,
            config={"name": "edm", **settings},
        )

    @classmethod
    def flow(cls, n: int = 1000, *, shift: float = 1.0) -> Schedule:
        """Rectified flow: alpha = 1 - s, sigma = s for s = 1/n ... 1 (Liu et al. 2023), index 0 = the cleanest.

        ``shift`` moves levels to the noisy end: s -> shift s / (1 + (shift - 1) s) (Esser et al. 2024, eq. 23).
        """
        check(shift > 0, f"shift must be positive, got {shift}")
        s = torch.arange(1, _length(n) + 1, dtype=torch.float64) / n
        alpha, sigma = (1 - s) / (1 + (shift - 1) * s), shift * s / (1 + (shift - 1) * s)
        sigma[-1] = 1  # exactly
        return cls(alpha, sigma, torch.ones_like(s), 1000 * sigma, {"name": "flow", "n": n, "shift": shift})

    def rescale_zero_terminal_snr(self) -> Schedule:
        """Shift and scale alpha so that the last timestep holds no signal (Lin et al. 2024, algorithm 1)."""
        check(self.variance_preserving, "only a variance-preserving schedule can be rescaled to zero terminal SNR")
        check(len(self) > 1, "a schedule of one timestep cannot be rescaled to zero terminal SNR")
        check("kept" not in self.config, "a spaced schedule cannot be rescaled: rescale, then take some timesteps")
        first, last = self.alpha[0], self.alpha[-1]
        alpha = (self.alpha - last) * first / (first - last)
        alpha[0] = first  # exactly, and so sigma[0] keeps all its digits
        sigma = (1 - alpha**2).sqrt()
        sigma[0] = self.sigma[0]
        return Schedule(alpha, sigma, self.c_in, self.c_noise, {**self.config, "zero_terminal_snr": True})

    def spaced(self, steps: int | Sequence[int] | Tensor, spacing: str = "trailing") -> Schedule:
        """The levels of some timesteps as a schedule of their own, which the network is told as before.

        A trained network's bound on the likelihood in fewer steps is that of its spaced schedule (Nichol & Dhariwal
        2021, section 4).

        Args:
            steps, spacing: see :meth:`timesteps`.
        """
        kept = self.timesteps(steps, spacing).flip(0)
        alpha, sigma, c_in, c_noise = (table[kept] for table in (self.alpha, self.sigma, self.c_in, self.c_noise))
        before = self.config.get("kept")
        config = {**self.config, "kept": kept.tolist() if before is None else [before[i] for i in kept.tolist()]}
        return Schedule(alpha, sigma, c_in, c_noise, config)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Schedule:
        """Build the schedule that ``config`` describes: ``{"name": "cosine", "timesteps": 1000, ...}``."""
        settings = dict(config)
        name, rescale = settings.pop("name", None), settings.pop("zero_terminal_snr", False)
        kept = settings.pop("kept", None)
        choose("schedule", name, SCHEDULES)
        try:
            schedule: Schedule = getattr(cls, str(name))(**settings)
        except TypeError as error:
            raise InputError(f"schedule {name}: {error}") from None
        schedule = schedule.rescale_zero_terminal_snr() if rescale else schedule
        return schedule if kept is None else schedule.spaced(kept[::-1])

    # ---- spacings ---------------------------------------------------------------------------

    def timesteps(self, steps: int | Sequence[int] | Tensor, spacing: str = "trailing") -> Tensor:
        """Choose ``steps`` of the T timesteps, int64, strictly descending, without duplicates.

        Args:
            steps: how many, 1 ... T; or the timesteps themselves in descending order.
            spacing: ``trailing`` ends at T-1 and ``leading`` at 0 with equal strides, ``linspace`` holds both
                ends (Lin et al. 2024, table 2, in exact integer arithmetic), ``beta`` follows the quantiles of
                Beta(0.6, 0.6) (Lee et al. 2024), ``karras`` the noise levels of Karras et al. 2022, eq. 5, and
                ``exponential`` equal strides of the log-SNR, each at the nearest timestep still free.

        Raises:
            InputError: an unknown spacing, ``steps`` outside 1 ... T, a list that does not descend within 0 ... T-1.
        """
        total = len(self)
        choose("spacing", spacing, SPACINGS)
        if isinstance(steps, Integral) and not isinstance(steps, bool):
            return self._spaced(int(steps), spacing)
        return _free_list(steps, total)

    def _spaced(self, steps: int, spacing: str) -> Tensor:
        total = len(self)
        check(1 <= steps <= total, f"steps must lie in 1...{total}, got {steps}")
        if steps == 1 and spacing != "leading":
            return torch.tensor([total - 1])
        count = torch.arange(steps)
        if spacing == "leading":
            return (count * total // steps).flip(0)
        if spacing == "trailing":
            return _divide(total * (steps - count), steps) - 1
        if spacing == "linspace":
            return _divide((total - 1) * (steps - 1 - count), steps - 1)
        if spacing == "beta":
            from scipy.special import betaincinv

            quantiles = betaincinv(0.6, 0.6, torch.linspace(1, 0, steps, dtype=torch.float64).numpy())
            return _distinct((torch.from_numpy(quantiles) * (total - 1)).round().long(), total)
        return self._at_levels(steps, spacing)

    def _at_levels(self, steps: int, spacing: str) -> Tensor:
        """The timesteps whose noise-to-signal ratios are nearest to given levels."""
        log_ratio: Tensor = -0.5 * self.log_snr
        first, last = log_ratio[torch.isfinite(log_ratio)][[0, -1]].tolist()
        levels = torch.linspace(last, first, steps, dtype=torch.float64)
        if spacing == "karras":
            levels = karras_levels(steps, math.exp(first), math.exp(last), 7.0).log()
        return _distinct((log_ratio - levels[:, None]).abs().argmin(1), len(self))


SCHEDULES = ("linear", "scaled_linear", "cosine", "sigmoid", "laplace", "from_betas", "from_log_snr", "edm", "flow")


def karras_levels(n: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """n noise levels from sigma_max down to sigma_min, equidistant in sigma^(1/rho) (Karras et al. 2022, eq. 5)."""
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    levels: Tensor = (high + ramp * (low - high)) ** rho
    return levels


def _distinct(nearest: Tensor, total: int) -> Tensor:
    """Timesteps from the last on, strictly descending: pushed apart where they meet."""
    nearest[0] = total - 1
    count = torch.arange(len(nearest))
    # First push later ones down, then lift what fell below the cleanest end.
    down: Tensor = torch.cummin(nearest + count, 0)[0] - count
    return torch.maximum(down, len(nearest) - 1 - count)


def _edm_inputs(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    return (sigma**2 + sigma_data**2).rsqrt(), sigma.log() / 4


def _length(timesteps: int) -> int:
    valid = isinstance(timesteps, int) and not isinstance(timesteps, bool) and timesteps >= 1
    check(valid, f"a schedule needs a whole number of timesteps, at least 1, got {timesteps!r}")
    return timesteps


def _from_betas(betas: Tensor, name: str, /, **settings: Any) -> Schedule:
    """alpha-bar = prod(1 - beta), with 1 - alpha-bar computed without cancellation."""
    bad = ~((betas > 0) & (betas < 1))
    bad[-1] &= betas[-1] != 1
    if bad.any():
        t = int(bad.nonzero()[0])
        raise InputError(f"betas must lie in (0, 1), got {float(betas[t])!r} at timestep {t} of the {name} schedule")
    log_alpha_bar = torch.log1p(-betas).cumsum(0)
    return _discrete((log_alpha_bar / 2).exp(), (-torch.expm1(log_alpha_bar)).sqrt(), name, **settings)


def _numbers(name: str, values: Sequence[float] | Tensor) -> Tensor:
    """Numbers that somebody gives as a table, float64 on the host."""
    try:
        table = torch.as_tensor(values, dtype=torch.float64).detach().cpu().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must be a sequence of numbers: {error}") from None
    shape = list(table.shape)
    check(table.ndim == 1 and len(table) > 0, f"{name} must be one-dimensional and not empty, got {shape}")
    return table


def _discrete(alpha: Tensor, sigma: Tensor, name: str, **settings: Any) -> Schedule:
    return Schedule(alpha, sigma, torch.ones_like(alpha), torch.arange(len(alpha)), {"name": name, **settings})


def _divide(numerator: Tensor, denominator: int) -> Tensor:
    """Round the exact quotient to the nearest integer, halves to even, as numpy's round does."""
    quotient, remainder = numerator // denominator, numerator % denominator
    up = (2 * remainder > denominator) | ((2 * remainder == denominator) & (quotient % 2 == 1))
    return quotient + up.long()


def _free_list(steps: object, total: int) -> Tensor:
    try:
        table = torch.as_tensor(steps)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"steps must be a whole number or a list of timesteps: {error}") from None
    valid = table.ndim == 1 and len(table) > 0 and not table.is_floating_point() and table.dtype != torch.bool
    check(valid, f"timesteps must be a non-empty list of whole numbers, got {steps!r}")
    table = table.to("cpu", torch.int64)
    check(bool((table.diff() < 0).all()), f"timesteps must be strictly descending, got {table.tolist()}")
    check(table[-1] >= 0 and table[0] < total, f"timesteps must lie in 0...{total - 1}, got {table.tolist()}")
    return table
