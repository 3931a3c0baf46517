"""What the training objective takes from a timestep, and how it does so without looking at a device.

:meth:`fastdiff.Diffusion.losses` asks for it. To look at values on a GPU is to wait for it: there timesteps choose
columns of tables that lie beside them, and no shape depends on them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from fastdiff import likelihood
from fastdiff import noise as noises
from fastdiff.errors import check
from fastdiff.ops import row as rows
from fastdiff.ops.checks import is_finite
from fastdiff.schedule import Schedule

LOSSES = ("simple", "vlb", "hybrid", "min_snr", "snr_sample")
HYBRID_WEIGHT = 1e-3  # lambda of Nichol & Dhariwal 2021, eq. 16
MIN_SNR_GAMMA = 5.0  # Hang et al. 2023, section 3.4


def visible(x: Tensor) -> bool:
    """Whether looking at the values of a tensor costs nothing."""
    return x.device.type == "cpu"


def brought(x: Tensor, device: torch.device) -> Tensor:
    """x on a device that is not waited for: a copy from pageable memory would wait."""
    if visible(x) and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def check_data(x0: Tensor) -> None:
    """Raise for data that cannot be trained on; on a device, values are not looked at."""
    finite = len(x0) > 0 and (not visible(x0) or is_finite(x0))
    check(finite, "x0 is empty or holds NaN or infinite values")


# ---- tables by timestep ---------------------------------------------------------------------


class Tables:
    """Tables of a diffusion by timestep, which are kept on each device that asked for them.

    ``tables(name, t)`` gives columns ``[..., N]`` in float64: of a schedule's own table, the ``letters`` of the bound,
    or for a kind of loss alpha, sigma, the target's f and g, and the weight of its squared error.
    """

    def __init__(self, schedule: Schedule, prediction: str, variance: str) -> None:
        self.schedule, self.prediction, self.variance = schedule, prediction, variance
        self._kept: dict[tuple[str, torch.device], Tensor] = {}

    def __call__(self, name: str, t: Tensor) -> Tensor:
        table = self._kept.get((name, t.device))
        if table is None:
            with torch.inference_mode(False):
                table = self._kept[name, t.device] = self._make(name).to(t.device)
        return table.index_select(-1, t)

    def _make(self, name: str) -> Tensor:
        if name == "letters":
            return self._letters()
        alpha, sigma = self.schedule.alpha, self.schedule.sigma
        if name not in LOSSES:
            return cast(Tensor, getattr(self.schedule, name))
        weight = _weight(name, self.prediction, alpha, sigma)
        return torch.stack((alpha, sigma, *rows.target(self.prediction, alpha, sigma), weight))

    def _letters(self) -> Tensor:
        """The :data:`~fastdiff.ops.forward.BOUND` of the hybrid objective, in which t = 0 has no weight, ``[8, T]``."""
        table = likelihood.bound_table(self.schedule, self.prediction, self.variance)
        weight = table.new_full((1, len(table)), HYBRID_WEIGHT * len(table) / math.log(2))  # of nats
        weight[:, 0] = 0
        return torch.cat((table.T, weight))


def _weight(kind: str, prediction: str, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Of the squared error in the network's own output; not finite where that says nothing about x0."""
    if kind not in ("min_snr", "snr_sample"):
        return torch.ones_like(alpha)
    snr = (alpha / sigma) ** 2
    if kind == "min_snr" and prediction == "epsilon":
        return (MIN_SNR_GAMMA / snr).clamp(max=1)  # min(SNR, gamma) / SNR, with its limit 1 at SNR = 0
    _, q = rows.to_x0(prediction, alpha, sigma)
    if kind == "min_snr":
        return snr.clamp(max=MIN_SNR_GAMMA) * q**2
    return torch.cat((snr[:1], -snr.diff())) / 2 * q**2


def check_says_x0(values: Tensor) -> None:
    """Raise where one of them is not finite because the prediction says nothing about x0; not on a device."""
    check(not visible(values) or bool(torch.isfinite(values).all()), likelihood.NO_SIGNAL)


# ---- the bound ------------------------------------------------------------------------------


def bound(out: Tensor, x0: Tensor, x_t: Tensor, letters: Tensor, first: Tensor, decoder: str) -> Tensor:
    """:func:`fastdiff.likelihood.bound_terms`, with ``first`` bool ``[N]`` on any device."""
    if visible(first):
        return likelihood.bound_terms(out, x0, x_t, letters, first, decoder)
    later = likelihood.bound_terms(out, x0, x_t, letters, slice(0), decoder)
    return torch.where(first, _decoded(out, x0, x_t, letters, first, decoder), later)


def decoder_of_variance(out: Tensor, x0: Tensor, x_t: Tensor, letters: Tensor, first: Tensor, decoder: str) -> Tensor:
    """The bound's term where ``first``, 0 elsewhere, ``[N]``: of its gradient the network's prediction gets nothing."""
    if not visible(first):
        return _decoded(_fixed(out, x0), x0, x_t, letters, first, decoder).masked_fill(~first, 0)
    at = first.nonzero()[:, 0]
    result = torch.zeros(len(x0), dtype=torch.promote_types(x0.dtype, torch.float32))
    if not len(at):
        return result
    terms = likelihood.bound_terms(_fixed(out[at], x0), x0[at], x_t[at], letters[at], slice(None), decoder)
    return result.index_copy(0, at, terms)


def _decoded(out: Tensor, x0: Tensor, x_t: Tensor, letters: Tensor, first: Tensor, decoder: str) -> Tensor:
    """The decoder's term where ``first``; elsewhere that of N(0, 1), whose gradient is 0 and never NaN."""
    letters = letters.masked_fill(~first[:, None], 0)
    return likelihood.bound_terms(out, x0, x_t, letters, slice(None), decoder)


def _fixed(out: Tensor, x0: Tensor) -> Tensor:
    """The output, whose prediction gets no gradient (Nichol & Dhariwal 2021, section 3.1)."""
    prediction, fractions = out.tensor_split([x0.shape[1]], 1)
    return torch.cat((prediction.detach(), fractions), 1)


# ---- draws ----------------------------------------------------------------------------------


def timestep_words(
    count: int,
    *,
    seed: int,
    step: int | Tensor,
    sample: Sequence[int] | Tensor | None,
    device: torch.device | str | None,
) -> Tensor:
    """The uniform 32-bit words that timesteps are made of, int64 ``[count]`` on a device that is not waited for.

    They are drawn where the ids are: hundreds of small operations, which a GPU takes longer for.
    """
    at, stream = torch.device("cpu" if device is None else device), noises.Stream.TIMESTEP
    if not isinstance(sample, Tensor) or visible(sample):
        return brought(noises.uniform_words(count, seed=seed, step=step, sample=sample, stream=stream), at)
    words = noises.uniform_words(count, seed=seed, step=step, sample=sample, stream=stream, device=sample.device)
    return words.to(at)
