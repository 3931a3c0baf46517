"""Guidance: what a network is asked in a row, and what is made of its answers.

A guidance is asked for its ``conditions`` once in a run and for two ``outputs`` in a row. They are combined with the
scale s of the row; ``off`` is the scale that is no guidance, at which the network is asked once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.diffusion import Model, network_output
from fastdiff.errors import InputError, check

Classifier = Callable[[Tensor, Tensor], Tensor]


class Conditions(NamedTuple):
    """What the network is given in all rows of a run: its condition, the other one, and both as one batch."""

    cond: dict[str, Any]
    other: dict[str, Any] | None = None
    both: dict[str, Any] | None = None


class Guidance:
    """What classifier-free guidance and autoguidance have in common: other + s (out - other)."""

    off: ClassVar[float] = 1.0
    by_gradient: ClassVar[bool] = False  #: whether the other output is a gradient of log p(y | x)
    rescale: float = 0.0

    def conditions(self, model: Model, n: int, cond: dict[str, Any], uncond: dict[str, Any] | None) -> Conditions:
        """What a run of ``n`` samples is asked with.

        Raises:
            InputError: there is nothing to guide by.
        """
        raise NotImplementedError

    def alone(self, cond: dict[str, Any]) -> dict[str, Any]:
        """What the network is given in rows without guidance."""
        return cond

    def outputs(self, model: Model, x: Tensor, t: Tensor, given: Conditions) -> tuple[Tensor, Tensor]:
        """The output with the condition and the other, each ``[N, C, ...]``; x is twice the batch if ``both`` is."""
        return network_output(model(x, t, **given.cond)), network_output(model(x, t, **given.other or {}))

    def combined(self, out: Tensor, other: Tensor, scale: Tensor, channels: int) -> Tensor:
        """One output of the two, for a ``scale`` ``[N]``; channels beyond the first ones stay the conditional."""
        cond, rest = out[:, :channels], out[:, channels:]
        guided = ops.guide(cond, other[:, :channels], scale)
        guided = rescaled(guided, cond, self.rescale) if self.rescale else guided
        return torch.cat((guided, rest), 1) if rest.shape[1] else guided


@dataclass(frozen=True)
class ClassifierFree(Guidance):
    """uncond + s (cond - uncond) (Ho & Salimans 2022, eq. 6, where w is s - 1).

    Args:
        batched: whether both go through the network in one batch, which all conditions have to be tensors with one
            row per sample for; otherwise in two calls, which need less memory.
        rescale: share in [0, 1] to which the output gets the standard deviation of the conditional one back
            (Lin et al. 2024, eq. 15 and 16, where 0.7 is advised).

    Raises:
        InputError: a ``rescale`` outside [0, 1].
    """

    batched: bool = True
    rescale: float = 0.0

    def __post_init__(self) -> None:
        _check_rescale(self.rescale)

    def conditions(self, model: Model, n: int, cond: dict[str, Any], uncond: dict[str, Any] | None) -> Conditions:
        check(cond, "guidance_scale other than 1 needs a condition: pass it by name, for instance y=labels")
        null = _null(model, cond) if uncond is None else _spread(uncond, cond)
        alike = all(isinstance(v, Tensor) and v.shape[:1] == (n,) for v in (*cond.values(), *null.values()))
        if not (self.batched and alike):
            return Conditions(cond, null)
        return Conditions(cond, null, {name: torch.cat((value, null[name])) for name, value in cond.items()})

    def outputs(self, model: Model, x: Tensor, t: Tensor, given: Conditions) -> tuple[Tensor, Tensor]:
        if given.both is None:
            return super().outputs(model, x, t, given)
        cond, other = network_output(model(x, t, **given.both)).chunk(2)
        return cond, other


@dataclass(frozen=True)
class AutoGuidance(Guidance):
    """weak + s (strong - weak): away from what a smaller or less trained model makes (Karras et al. 2024, eq. 1).

    Args:
        weak: called as the model is; it gets the same condition, or ``uncond`` where a call is given that.
        rescale: as of :class:`ClassifierFree`.

    Raises:
        InputError: what is no callable, a ``rescale`` outside [0, 1].
    """

    weak: Model
    rescale: float = 0.0

    def __post_init__(self) -> None:
        check(callable(self.weak), f"the weak model must be callable, got {type(self.weak).__name__}")
        _check_rescale(self.rescale)

    def conditions(self, model: Model, n: int, cond: dict[str, Any], uncond: dict[str, Any] | None) -> Conditions:
        return Conditions(cond, cond if uncond is None else _spread(uncond, cond))

    def outputs(self, model: Model, x: Tensor, t: Tensor, given: Conditions) -> tuple[Tensor, Tensor]:
        return network_output(model(x, t, **given.cond)), network_output(self.weak(x, t, **given.other or {}))


@dataclass(frozen=True)
class ClassifierGuidance(Guidance):
    """The score plus s grad log p(y | x_t) (Dhariwal & Nichol 2021): algorithm 2, and for ddpm its algorithm 1,
    the mean plus s times variance and gradient.

    Args:
        classifier: ``classifier(x, t)`` gives the logits ``[N, classes]`` of a noised x, as the network gets both. A
            call is given the classes as ``y``, int64 ``[N]``.
        conditional: whether the network is given ``y`` too.

    Raises:
        InputError: what is no callable.
    """

    classifier: Classifier
    conditional: bool = False
    off: ClassVar[float] = 0.0
    by_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check(callable(self.classifier), f"classifier must be callable, got {type(self.classifier).__name__}")

    def conditions(self, model: Model, n: int, cond: dict[str, Any], uncond: dict[str, Any] | None) -> Conditions:
        check(uncond is None, "a classifier has no null condition: leave uncond out")
        y = cond.get("y")
        labels = isinstance(y, Tensor) and y.dtype == torch.int64 and y.shape == (n,)
        check(labels, f"classifier guidance needs labels: y, int64 [{n}]")
        return Conditions(self.alone(cond), {"y": y})

    def alone(self, cond: dict[str, Any]) -> dict[str, Any]:
        return cond if self.conditional else {name: value for name, value in cond.items() if name != "y"}

    def outputs(self, model: Model, x: Tensor, t: Tensor, given: Conditions) -> tuple[Tensor, Tensor]:
        """The network's output, and the gradient of log p(y | x)."""
        assert given.other is not None
        return network_output(model(x, t, **given.cond)), self.gradient(x, t, given.other["y"])

    @torch.inference_mode(False)
    @torch.enable_grad()
    def gradient(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        logits = network_output(self.classifier(x, t))
        fits = logits.ndim == 2 and len(logits) == len(x)
        check(fits, f"the classifier's logits must be [{len(x)}, classes], got {list(logits.shape)}")
        wide = torch.promote_types(logits.dtype, torch.float32)
        log_p = logits.to(wide).log_softmax(1)
        try:
            chosen = log_p.gather(1, y[:, None])
        except RuntimeError as error:
            raise InputError(f"y must hold classes of the classifier, 0...{logits.shape[1] - 1}: {error}") from None
        return torch.autograd.grad(chosen.sum(), x)[0]


def rescaled(guided: Tensor, cond: Tensor, share: float) -> Tensor:
    """``guided`` with, to a share, the standard deviation that ``cond`` has in each sample (Lin et al. 2024)."""
    wide = torch.promote_types(guided.dtype, torch.float32)
    ratio = cond.to(wide).flatten(1).std(1) / guided.to(wide).flatten(1).std(1)
    return guided * spread(1 + share * (ratio - 1), guided).to(guided.dtype)


def thresholded(x0: Tensor, quantile: float, bound: float) -> Tensor:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3): each sample is clamped to the quantile of its absolute
    values and scaled into [-bound, bound], if the quantile is above the bound.
    """
    size = x0.flatten(1).abs()
    at = quantile * (size.shape[1] - 1)
    low = int(at)
    # The largest values alone: torch.quantile sorts all, and refuses more than 2^24.
    largest = size.topk(size.shape[1] - low, 1).values
    upper = largest[:, -2] if size.shape[1] - low > 1 else largest[:, -1]
    limit = torch.lerp(largest[:, -1], upper, at - low).clamp(min=bound)
    return x0.clamp(-spread(limit, x0), spread(limit, x0)) * spread(bound / limit, x0)


def spread(value: Tensor, x: Tensor) -> Tensor:
    """``[N]`` as something that broadcasts against x ``[N, C, ...]``."""
    return value.reshape(-1, *(1,) * (x.ndim - 1))


def _check_rescale(rescale: float) -> None:
    valid = isinstance(rescale, (int, float)) and 0 <= rescale <= 1
    check(valid, f"rescale must lie in [0, 1], got {rescale!r}")


def _null(model: Model, cond: dict[str, Any]) -> dict[str, Any]:
    null = getattr(model, "null_condition", None)
    if null is None:
        raise InputError("this model does not know its null condition: pass uncond={name: value}")
    return dict(null(cond))


def _spread(uncond: dict[str, Any], cond: dict[str, Any]) -> dict[str, Any]:
    """A null condition, each value given once spread over the batch of the condition it stands for."""
    check(isinstance(uncond, dict), f"uncond must be {{name: value}}, got {type(uncond).__name__}")
    missing = cond.keys() ^ uncond.keys()
    check(not missing, f"uncond must name what the condition names, not so: {', '.join(sorted(missing))}")
    return {name: _like(value, cond[name]) for name, value in uncond.items()}


def _like(value: Any, cond: Any) -> Any:
    if not isinstance(cond, Tensor):
        return value
    try:
        return torch.as_tensor(value, dtype=cond.dtype, device=cond.device).expand_as(cond)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"uncond must broadcast to its condition {list(cond.shape)}: {error}") from None
