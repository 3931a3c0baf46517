"""The estimate of x0 as guided-diffusion's scripts may change it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.diffusion import Diffusion, Model, inference_form, network_output, precision_of
from fastdiff.errors import check
from fastdiff.likelihood import spread
from fastdiff.losses import Tables
from fastdiff.ops.checks import check_same

DenoisedFn = Callable[[Tensor], Tensor]
CondFn = Callable[..., Tensor]


class Estimate:
    """A model as one that predicts x0, in which denoised_fn, clamping and cond_fn have had their say, in this order.

    Args:
        model, diffusion: the chain whose times the model is told.
        clip: bound of the estimate, None for no bound.
        denoised_fn, cond_fn: the user's.
        moves_mean: whether the gradient moves the mean of an ancestral step (Dhariwal & Nichol 2021, algorithm 1), or
            the score (algorithm 2).

    Attributes:
        x0: the latest estimate, their ``pred_xstart``, to which a gradient that moves the mean does nothing.
    """

    x0: Tensor

    def __init__(
        self,
        model: Model,
        diffusion: Diffusion,
        clip: float | None,
        denoised_fn: DenoisedFn | None = None,
        cond_fn: CondFn | None = None,
        moves_mean: bool = False,
    ) -> None:
        for name, function in (("model", model), ("denoised_fn", denoised_fn), ("cond_fn", cond_fn)):
            fits = callable(function) or (function is None and name != "model")
            check(fits, f"{name} must be callable, got {type(function).__name__}")
        self._network, self._precision, self._diffusion = inference_form(model), precision_of(model), diffusion
        self._clip, self._denoised_fn, self._cond_fn, self._moves_mean = clip, denoised_fn, cond_fn, moves_mean
        self._tables = Tables(diffusion.schedule, diffusion.prediction, diffusion.variance)
        told = diffusion.schedule.c_noise.double()
        self._between = (told[1:] + told[:-1]) / 2

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        out = network_output(self._network(x.to(self._precision or x.dtype), t, **cond))
        self._diffusion.check_output(out, x)
        prediction, fractions = out.to(x.dtype).tensor_split([x.shape[1]], 1)
        index = self._index_of(t)
        letters = self._tables("letters", index)
        p, q = (spread(letter, x) for letter in letters[2:4])
        self.x0 = moved = self._denoised(p * x + q * prediction)
        if self._cond_fn is not None:
            gradient = self._cond_fn(x, t, **cond)
            check_same("the gradient of cond_fn", gradient, x)
            moved = moved + self._push(letters, index, fractions, x) * gradient.to(x.dtype)
        self.x0 = self.x0 if self._moves_mean else moved
        return torch.cat((moved, fractions), 1)

    def _index_of(self, time: Tensor) -> Tensor:
        """Which timesteps of the chain those are that a model is told of, ``[N]``."""
        self._between = self._between.to(time.device)
        return torch.bucketize(time.double(), self._between)

    def _denoised(self, x0: Tensor) -> Tensor:
        if self._denoised_fn is not None:
            given, x0 = x0, self._denoised_fn(x0)
            check_same("what denoised_fn gives", x0, given)
        return x0 if self._clip is None else x0.clamp(-self._clip, self._clip)

    def _push(self, letters: Tensor, index: Tensor, fractions: Tensor, x: Tensor) -> Tensor:
        """By how many gradients x0 moves: for the score to move by one, or the mean by the variance times one."""
        alpha, sigma, _, _, b, small, large, _ = letters
        if not self._moves_mean:
            return spread(sigma**2 / alpha, x)
        if fractions.shape[1]:
            share = (1 + fractions) / 2
            return (share * spread(large, x) + (1 - share) * spread(small, x)).exp() / spread(b, x)
        none = (index == 0) & (self._diffusion.variance == "fixed_small")  # the posterior's at t = 0
        return spread((large.exp() / b).masked_fill(none, 0), x)
