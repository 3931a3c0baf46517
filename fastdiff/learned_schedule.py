"""A noise schedule that is trained with the network, and the bound it is trained on (Kingma et al. 2021).

gamma(t), t from 0 (clean) to 1, is minus the log-SNR of a variance-preserving process, made by a monotone network.
In continuous time the bound depends on the two ends of gamma alone; what lies between them changes only the variance
of its estimate, and is trained to make that small, while ends and network are trained on the bound::

    learned = LearnedSchedule()
    terms = variational_loss(model, learned, x0, seed=0, step=step, minimise_variance=True)
    terms.total.mean().backward()
    sampler = fd.Sampler(model, fd.Diffusion(learned.schedule(1000), "epsilon"), solver="ddim", steps=50)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff import likelihood
from fastdiff import noise as noises
from fastdiff.diffusion import network_output
from fastdiff.errors import check, choose
from fastdiff.likelihood import spread
from fastdiff.losses import check_data, visible
from fastdiff.ops import row as rows
from fastdiff.ops.checks import check_floating, check_same
from fastdiff.schedule import Schedule

TOLD = 1000.0  # what a network is told at the noisy end that the schedule starts with
STEEPEST = 200.0


class VariationalLoss(NamedTuple):
    """The bound on -log2 p(x0) in bits per dimension: ``total = prior + reconstruction + diffusion``, ``[N]`` each."""

    total: Tensor
    prior: Tensor  #: KL of q(z_1 | x0) from the standard normal
    reconstruction: Tensor  #: -log2 p(x0 | z_0)
    diffusion: Tensor  #: an unbiased estimate of what lies between, at one time


class LearnedSchedule(nn.Module):
    """gamma(t) = -log-SNR of t in [0, 1], rising: l1(t) + l3(sigmoid(l2(l1(t)))) with weights that are positive.

    Scaled so that gamma(0) = ``gamma_min`` and gamma(1) = ``gamma_max`` exactly, which are parameters (Kingma et al.
    2021, appendix H). It starts nearly straight. Everything it gives is float64 on its device.

    Args:
        gamma_min, gamma_max: the ends to start from.
        hidden: outputs of l2.

    Raises:
        InputError: ends that are not finite or not in order.
    """

    def __init__(self, gamma_min: float = -13.3, gamma_max: float = 5.0, *, hidden: int = 1024) -> None:
        super().__init__()
        ordered = math.isfinite(gamma_min) and math.isfinite(gamma_max) and gamma_min < gamma_max
        check(ordered, f"gamma_min must lie below gamma_max, both finite, got {gamma_min} and {gamma_max}")
        check(isinstance(hidden, int) and hidden >= 1, f"hidden must be a whole number of at least 1, got {hidden!r}")
        self.config = {"gamma_min": gamma_min, "gamma_max": gamma_max, "hidden": hidden}
        self.gamma_min, self.gamma_max = (nn.Parameter(torch.tensor(float(end))) for end in (gamma_min, gamma_max))
        # Sigmoids of all widths, in turn, all over the interval; their heights add up to the line's.
        place = (torch.arange(hidden) + 0.5) / hidden
        steep = STEEPEST ** (torch.arange(hidden) * 0.618034 % 1)
        self.l1 = nn.Parameter(_before_softplus(torch.ones(())))
        self.l2, self.l2_bias = nn.Parameter(_before_softplus(steep)), nn.Parameter(-steep * place)
        self.l3 = nn.Parameter(_before_softplus(torch.full((hidden,), 1 / hidden)))

    def gamma(self, t: Tensor) -> Tensor:
        """t of any shape, in [0, 1]."""
        return self.between(self.interior(t)[0])

    forward = gamma

    def log_snr(self, t: Tensor) -> Tensor:
        return -self.gamma(t)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return _levels(self.gamma(t))

    def c_noise(self, gamma: Tensor) -> Tensor:
        """What a network is told: the noise level, 0 and 1000 at the ends that this schedule started from.

        So a network means the same by it however gamma(t) is bent in training, and in tables of any length.
        """
        low, high = self.config["gamma_min"], self.config["gamma_max"]
        return (gamma - low) * (TOLD / (high - low))

    @torch.no_grad()
    def schedule(self, timesteps: int = 1000) -> Schedule:
        """The schedule as it is now, frozen: ``timesteps`` levels from t = 0 to t = 1, with what networks are told."""
        fits = isinstance(timesteps, int) and timesteps >= 2
        check(fits, f"timesteps must be a whole number of at least 2, got {timesteps!r}")
        gamma = self.gamma(torch.linspace(0, 1, timesteps, dtype=torch.float64, device=self.gamma_min.device))
        return Schedule.from_log_snr(-gamma, c_noise=self.c_noise(gamma))

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """gamma(0) and gamma(1)."""
        return self.gamma_min.double(), self.gamma_max.double()

    def between(self, share: Tensor) -> Tensor:
        """gamma at a share of the way between the ends."""
        return torch.lerp(*self.ends, share)

    def interior(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The share of the way that gamma has gone at t, exactly 0 and 1 at the ends, and its derivative by t."""
        l1, l2, l3 = (F.softplus(weight.double()) for weight in (self.l1, self.l2, self.l3))
        bias, line = self.l2_bias.double(), l1 * torch.cat((t.double().flatten(), t.new_ones(1, dtype=torch.float64)))
        bent = torch.sigmoid(l2 * line[:, None] + bias)
        rise = line + ((bent - torch.sigmoid(bias)) * l3).sum(1)
        slope = l1 * (1 + (bent * (1 - bent) * l2 * l3).sum(1))
        return (rise[:-1] / rise[-1]).view(t.shape), (slope[:-1] / rise[-1]).view(t.shape)


def variational_loss(
    model: Callable[..., Any],
    learned: LearnedSchedule,
    x0: Tensor,
    *,
    prediction: str = "epsilon",
    decoder: str = "discrete",
    timesteps: int | None = None,
    minimise_variance: bool = False,
    seed: int = 0,
    step: int | Tensor = 0,
    sample: Sequence[int] | Tensor | None = None,
    batch: int | None = None,
    **cond: Any,
) -> VariationalLoss:
    """The variational bound of each sample under a learned schedule, with gradients for it and the network.

    Args:
        model: ``model(z_t, c_noise, **cond)``, with the noise level as :meth:`LearnedSchedule.c_noise` tells it.
        x0: data ``[N, C, ...]``.
        decoder: N(z_0 / alpha_0, sigma_0² / alpha_0²): its density (``gaussian``), or its integral over the bin of an
            8-bit image in [-1, 1] (``discrete``).
        timesteps: of the bound (eq. 14: T terms from t = 1/T to 1, next to z_0); None for continuous time (eq. 17).
        minimise_variance: a backward pass through ``total`` gives the inside of gamma the gradient of ``diffusion``
            squared, in place of its own (section 5.1); ends and network get that of ``total`` as ever.
        seed, step, sample: address of times and noise; ``sample`` are the places in the step's batch, by default 0
            ... N-1.
        batch: samples of the step in all processes, over which times are spread; default N.

    Raises:
        InputError: what does not fit.
    """
    choose("prediction", prediction, rows.PREDICTIONS)
    check_floating("x0", x0)
    check_data(x0)
    if visible(x0):
        likelihood.check_decoder(decoder, x0)
    x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
    words = low_discrepancy(len(x0), seed=seed, step=step, sample=sample, batch=batch, device=x0.device)
    place: dict[str, Any] = {"seed": seed, "step": step, "sample": sample, "stream": noises.Stream.TRAINING}
    noise = noises.normal(x0.shape, **place, device=x0.device, dtype=x0.dtype)
    inside, gamma, weight = _at_times(learned, words, timesteps)
    diffusion = weight * _squared_error(model, learned, x0, noise, gamma, prediction, cond)
    low, high = learned.ends
    prior, reconstruction = _prior(x0, high), _reconstruction(x0, noise, low, decoder)
    if minimise_variance and inside.requires_grad:
        # d loss² = 2 loss d loss, sample by sample
        factor = 2 * diffusion.detach()
        inside.register_hook(lambda gradient: gradient * factor)
    return VariationalLoss(prior + reconstruction + diffusion, prior, reconstruction, diffusion)


def low_discrepancy(
    count: int,
    *,
    seed: int,
    step: int | Tensor,
    sample: Sequence[int] | Tensor | None = None,
    batch: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Times as uniform 32-bit words ``[count]``, equally far apart in a batch from a random start (appendix I.1)."""
    check(batch is None or (isinstance(batch, int) and batch >= 1), f"batch must be at least 1, got {batch!r}")
    first = noises.uniform_words(1, seed=seed, step=step, stream=noises.Stream.TIMESTEP, device=device)
    _, places = noises.sample_ids(count, seed, sample, device)
    return (first + (places << 32) // (batch or count)) & noises.MASK


def _at_times(learned: LearnedSchedule, words: Tensor, timesteps: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """What the inside of gamma gives, ``[2, N]``; gamma there; and the weight of the squared error of the noise."""
    if timesteps is None:
        inside = torch.stack(learned.interior((words.double() + 0.5) / 2**32))
        low, high = learned.ends
        return inside, learned.between(inside[0]), inside[1] * (high - low) / 2
    check(isinstance(timesteps, int) and timesteps >= 1, f"timesteps must be at least 1, got {timesteps!r}")
    number = (words * timesteps >> 32) + torch.tensor([[1], [0]], device=words.device)
    inside, _ = learned.interior(number.double() / timesteps)
    later, earlier = learned.between(inside)
    return inside, later, torch.expm1(later - earlier) * timesteps / 2


def _squared_error(
    model: Callable[..., Any],
    learned: LearnedSchedule,
    x0: Tensor,
    noise: Tensor,
    gamma: Tensor,
    prediction: str,
    cond: dict[str, Any],
) -> Tensor:
    """The squared error of the noise that the network implies, float64 ``[N]``: mean over dimensions, for bits."""
    alpha, sigma = _levels(gamma)
    z = spread(alpha, x0) * x0 + spread(sigma, x0) * noise
    out = network_output(model(z, learned.c_noise(gamma).to(x0.dtype), **cond)).to(x0.dtype)
    check_same("the model's out", out, x0)
    f, g = (spread(letter, x0) for letter in rows.target(prediction, alpha, sigma))
    _, q = rows.to_x0(prediction, alpha, sigma)
    error = (out - f * x0 - g * noise).square().flatten(1).mean(1)
    return (alpha * q / sigma).square() * error.double() / math.log(2)


def _prior(x0: Tensor, gamma: Tensor) -> Tensor:
    """KL of N(alpha x0, sigma²) from the standard normal."""
    squares = x0.double().square().flatten(1).mean(1)
    return (torch.sigmoid(-gamma) * (squares - 1) - F.logsigmoid(gamma)) / (2 * math.log(2))


def _reconstruction(x0: Tensor, noise: Tensor, gamma: Tensor, decoder: str) -> Tensor:
    """The decoder's term: a row of letters that makes :func:`likelihood.bound_terms` take z_0 / alpha_0 for x0."""
    zero, one = torch.zeros_like(gamma), torch.ones_like(gamma)
    letters = torch.stack((one, zero, zero, one, zero, gamma, gamma)).expand(len(x0), -1)
    decoded = x0 + (gamma / 2).exp().to(x0) * noise
    return likelihood.bound_terms(decoded, x0, x0, letters, slice(None), decoder).double()


def _levels(gamma: Tensor) -> tuple[Tensor, Tensor]:
    return torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()


def _before_softplus(positive: Tensor) -> Tensor:
    """What softplus makes ``positive`` of; where it is large, the same."""
    return positive + torch.log(-torch.expm1(-positive))
