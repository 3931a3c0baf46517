"""Networks of ours as denoisers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.adapters.k_diffusion.levels import ended
from fastdiff.diffusion import Diffusion, Model, network_output, precision_of
from fastdiff.errors import check
from fastdiff.guidance import spread
from fastdiff.ops import row as rows
from fastdiff.ops.checks import check_floating


class Denoiser(nn.Module):
    """A network of a variance-preserving diffusion as a denoiser, for k-diffusion's samplers and these.

    Called as ``denoiser(x, sigma, **cond)``: the network is given ``alpha x`` with alpha² = 1 / (1 + sigma²), and the
    timestep of that sigma. Epsilon, sample, v and flow predictions; of a learned variance only the mean is used.

    Args:
        model: ``model(x_t, t, **cond)``, as of :class:`fastdiff.Sampler`.
        diffusion: what it was trained with.
        quantize: whether it is told the nearest timestep, int64, or a fractional one, floating.

    Attributes:
        sigmas, log_sigmas: float64 ``[T]``, sigma / alpha by timestep, and its logarithm.

    Raises:
        InputError: a schedule that is not variance-preserving, has one timestep or ends without signal.
    """

    sigmas: Tensor
    log_sigmas: Tensor

    def __init__(self, model: Model, diffusion: Diffusion, quantize: bool = False) -> None:
        super().__init__()
        check(callable(model), f"model must be callable, got {type(model).__name__}")
        check(isinstance(diffusion, Diffusion), f"diffusion must be a Diffusion, got {type(diffusion).__name__}")
        schedule = diffusion.schedule
        fits = schedule.variance_preserving and not schedule.zero_terminal_snr and len(schedule) > 1
        check(fits, f"a denoiser needs a variance-preserving schedule whose sigmas are finite, got {schedule}")
        self.inner_model, self.diffusion, self.quantize = model, diffusion, quantize
        self.register_buffer("sigmas", schedule.sigma / schedule.alpha, persistent=False)
        self.register_buffer("log_sigmas", -schedule.log_snr / 2, persistent=False)

    @property
    def sigma_min(self) -> Tensor:
        return self.sigmas[0]

    @property
    def sigma_max(self) -> Tensor:
        return self.sigmas[-1]

    def get_sigmas(self, n: int | None = None) -> Tensor:
        """``[n + 1]`` levels of equidistant timesteps and 0, those of all timesteps left out; torch's default dtype."""
        check(n is None or (isinstance(n, int) and n >= 1), f"n must be a whole number of at least 1, got {n!r}")
        t = torch.linspace(len(self.sigmas) - 1, 0, n or len(self.sigmas), dtype=torch.float64)
        return ended(self.t_to_sigma(t.to(self.sigmas.device)), self.sigmas.device)

    def sigma_to_t(self, sigma: Tensor, quantize: bool | None = None) -> Tensor:
        """The timesteps of sigmas of any shape: the nearest, int64, or where log(sigma) lies between two, floating."""
        table, log_sigma = self.log_sigmas, sigma.to(self.log_sigmas).log().contiguous()
        if self.quantize if quantize is None else quantize:
            return (log_sigma[..., None] - table).abs().argmin(-1)
        high = torch.searchsorted(table, log_sigma).clamp(1, len(table) - 1)
        part = (log_sigma - table[high - 1]) / (table[high] - table[high - 1])
        return (high - 1 + part.clamp(0, 1)).to(torch.promote_types(sigma.dtype, torch.float32))

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """The sigmas of timesteps of any shape, whole or fractional, in t's floating dtype or torch's default one."""
        at = t.to(self.log_sigmas).clamp(0, len(self.log_sigmas) - 1)
        low, high = self.log_sigmas[at.floor().long()], self.log_sigmas[at.ceil().long()]
        return torch.lerp(low, high, at.frac()).exp().to(t.dtype if t.is_floating_point() else None)

    def forward(self, x: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
        """The estimate of the data, like x ``[N, C, ...]``, for sigma ``[N]``."""
        check_floating("x", x)
        check(sigma.shape == x.shape[:1], f"sigma must hold one level per sample ({len(x)}), got {list(sigma.shape)}")
        alpha = (1 + sigma.double() ** 2).rsqrt()
        p, q = rows.to_x0(self.diffusion.prediction, alpha, alpha * sigma)
        wide = torch.promote_types(x.dtype, torch.float32)
        alpha, p, q = (spread(c, x).to(wide) for c in (alpha, p, q))
        x_t = alpha * x
        asked = x_t.to(precision_of(self.inner_model) or x.dtype)
        out = network_output(self.inner_model(asked, self.sigma_to_t(sigma), **cond))
        self.diffusion.check_output(out, x)
        return (p * x_t + q * out[:, : x.shape[1]]).to(x.dtype)
