"""The row: one step of any solver as numbers.

State is ``x``, stored vectors ``h1 h2 h3`` and one ``anchor``; a row is one network evaluation::

    out     = guide(model(c_in x, t), w)
    x0      = clamp(p x + q out, -clip, clip)
    x'      = a x + b x0 + c1 h1 + c2 h2 + c3 h3 + e anchor + s exp((f hi + (1 - f) lo) / 2) z
    push    = u x + v x0                    shifted into h1 (h1 into h2, h2 into h3)
    anchor' = k anchor + m x + n x0

``z`` is standard normal. ``f = (1 + last half of the network's channels) / 2`` where the network has
learned-range variance channels (Nichol & Dhariwal 2021, eq. 15), and the exponential is 1 elsewhere.
All functions here take and give float64 tensors, elementwise, so one call makes the column of a whole table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.errors import InputError, choose

DEFAULTS = {
    "c_in": 1.0,
    "w": 1.0,
    "p": 0.0,
    "q": 1.0,
    "clip": torch.inf,
    "a": 0.0,
    "b": 0.0,
    "c1": 0.0,
    "c2": 0.0,
    "c3": 0.0,
    "e": 0.0,
    "s": 0.0,
    "lo": 0.0,
    "hi": 0.0,
    "u": 0.0,
    "v": 0.0,
    "k": 1.0,
    "m": 0.0,
    "n": 0.0,
}
LETTERS = tuple(DEFAULTS)
PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")


def make_table(rows: int, **letters: Tensor | float) -> Tensor:
    """A float64 table ``[rows, len(LETTERS)]``; letters that are not given take their neutral value.

    Raises:
        InputError: an unknown letter, or a coefficient that is not finite (``clip`` may be infinite).
    """
    table = torch.tensor(list(DEFAULTS.values()), dtype=torch.float64).repeat(rows, 1)
    for letter, value in letters.items():
        choose("letter", letter, LETTERS)
        column = torch.as_tensor(value, dtype=torch.float64)
        if not torch.compiler.is_compiling() and letter != "clip" and not torch.isfinite(column).all():
            raise InputError(f"coefficient {letter} must be finite, got {column.tolist()}")
        table[:, LETTERS.index(letter)] = column
    return table


def to_x0(prediction: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """p, q with ``x0 = p x + q out``; infinite where the prediction says nothing about x0.

    epsilon: Ho et al. 2020, eq. 15. v_prediction: Salimans & Ho 2022, appendix D, for any alpha and sigma
    (v = (alpha noise - sigma x0) / sqrt(alpha² + sigma²)). flow_prediction: noise - x0 (Liu et al. 2023).
    """
    choose("prediction", prediction, PREDICTIONS)
    if prediction == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction == "sample":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction == "v_prediction":
        norm = torch.hypot(alpha, sigma)
        return alpha / norm**2, -sigma / norm
    return 1 / (alpha + sigma), -sigma / (alpha + sigma)


def target(prediction: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """f, g with ``target = f x0 + g noise``, what the network of this prediction type should give."""
    choose("prediction", prediction, PREDICTIONS)
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if prediction == "epsilon":
        return zero, one
    if prediction == "sample":
        return one, zero
    if prediction == "v_prediction":
        norm = torch.hypot(alpha, sigma)
        return -sigma / norm, alpha / norm
    return -one, one


def snr_ratio(alpha: Tensor, sigma: Tensor, alpha_next: Tensor, sigma_next: Tensor) -> Tensor:
    """SNR(t) / SNR(t'), in [0, 1] when t' is cleaner; 0 where t holds no signal or t' no noise."""
    return (alpha * sigma_next / (sigma * alpha_next)) ** 2


def posterior(alpha: Tensor, sigma: Tensor, alpha_next: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a, b, variance of q(x_t' | x_t, x0) = N(a x_t + b x0, variance) (Ho et al. 2020, eq. 7; any alpha, sigma)."""
    ratio = snr_ratio(alpha, sigma, alpha_next, sigma_next)
    a = alpha / alpha_next * (sigma_next / sigma) ** 2
    return a, alpha_next * (1 - ratio), (1 - ratio) * sigma_next**2


def forward_variance(alpha: Tensor, sigma: Tensor, alpha_next: Tensor, sigma_next: Tensor) -> Tensor:
    """Variance of q(x_t | x_t'), which is beta_t for the variance-preserving process (Kingma et al. 2021, eq. 24)."""
    return sigma**2 * (1 - snr_ratio(alpha, sigma, alpha_next, sigma_next))


def ddim(
    alpha: Tensor, sigma: Tensor, alpha_next: Tensor, sigma_next: Tensor, eta: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """a, b, s of the DDIM step (Song et al. 2021, eq. 12 and 16); eta = 1 is the DDPM posterior."""
    ratio = snr_ratio(alpha, sigma, alpha_next, sigma_next)
    a = sigma_next / sigma * (1 - eta**2 * (1 - ratio)).sqrt()
    return a, alpha_next - alpha * a, eta * sigma_next * (1 - ratio).clamp(min=0).sqrt()
