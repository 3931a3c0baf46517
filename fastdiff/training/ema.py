"""Averages of a model's weights, as tensors by name: several at once cost little and need no second module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastdiff.errors import InputError, check
from fastdiff.training.parallel import part_of, split_like

FLATTEST = 12**-0.5  # sigma_rel of equal weights, gamma = 0


class Average(ABC):
    """A running average of weights: average <- average + share (weights - average), the share of each step its own.

    ``step`` comes from outside, so there is no counter to lose when training resumes.

    Args:
        model: its weights are copied now. They may be DTensors (FSDP2), which are averaged where they are; names are
            those without ``torch.compile``.

    Attributes:
        tensors: by the names of the model's state: floating-point parameters are averaged, buffers are the last ones.
    """

    def __init__(self, model: nn.Module) -> None:
        learned = {_plain(name) for name, p in model.named_parameters(remove_duplicate=False) if p.is_floating_point()}
        self.tensors: dict[str, Tensor] = {name: tensor.clone() for name, tensor in _state(model).items()}
        self._averaged = [name for name in self.tensors if name in learned]
        self._copied = [name for name in self.tensors if name not in learned]

    @abstractmethod
    def share(self, step: int) -> float:
        """Of the weights after training step ``step``, from 0, when they are taken in."""

    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after training step ``step``."""
        self.take(model, self.share(step))

    @torch.no_grad()
    def take(self, model: nn.Module, share: float | Tensor) -> None:
        """Take in the weights with this share, a number or 0-d on their device."""
        state = _state(model)
        average = [part_of(self.tensors[name]) for name in self._averaged]
        _approach(average, [part_of(state[name]) for name in self._averaged], share)
        for name in self._copied:
            self.tensors[name].copy_(state[name])

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from whole tensors by name.

        Raises:
            InputError: names or shapes that are not the model's.
        """
        differing = sorted(self.tensors.keys() ^ tensors.keys())
        check(not differing, f"the average and the model differ in {', '.join(differing[:5])}")
        for name, mine in self.tensors.items():
            given = list(tensors[name].shape)
            check(given == list(mine.shape), f"{name} of the average is {given}, of the model {list(mine.shape)}")
            mine.copy_(split_like(mine, tensors[name]))


class EMA(Average):
    """Exponential average: the share is 1 - min(decay, (1 + step) / (10 + step)).

    The warm-up lets the average forget the initial weights early (as TensorFlow's moving average does).

    Args:
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = self.checked(decay)
        super().__init__(model)

    @staticmethod
    def checked(decay: float) -> float:
        check(0 <= decay < 1, f"the decay of an average must lie in [0, 1), got {decay}")
        return decay

    def share(self, step: int) -> float:
        return 1 - min(self.decay, (1 + step) / (10 + step))


class PowerEMA(Average):
    """Average with weights that rise as a power of time (Karras et al. 2024, section 3).

    After t steps the weights of time tau count as tau^gamma: initial weights are forgotten, and the profile widens in
    proportion to t. Snapshots of two such averages give all others afterwards, see :mod:`fastdiff.training.posthoc`.

    Args:
        sigma_rel: standard deviation of the profile over t, in (0, 0.2886]; 0.05 ... 0.1 is usual.

    Attributes:
        gamma: the power.
    """

    def __init__(self, model: nn.Module, sigma_rel: float) -> None:
        self.sigma_rel = self.checked(sigma_rel)
        self.gamma = gamma_of(sigma_rel)
        super().__init__(model)

    @staticmethod
    def checked(sigma_rel: float) -> float:
        check(0 < sigma_rel <= FLATTEST, f"sigma_rel of an average must lie in (0, {FLATTEST:.4f}], got {sigma_rel}")
        return sigma_rel

    def share(self, step: int) -> float:
        """1 - (1 - 1/t)^(gamma + 1) with t = step + 1: what the profile holds of the last of t steps."""
        power: float = (step / (step + 1)) ** (self.gamma + 1)
        return 1 - power


def _approach(average: list[Tensor], weights: list[Tensor], share: float | Tensor) -> None:
    """average <- average + share (weights - average), in one pass over memory or in few launches on a GPU."""
    if not isinstance(share, Tensor):
        torch._foreach_lerp_(average, weights, share)
    elif share.device.type == "cpu":
        torch._foreach_lerp_(average, weights, [share.to(each.dtype) for each in average])
    else:
        way = torch._foreach_sub(weights, average)
        torch._foreach_mul_(way, share)
        torch._foreach_add_(average, way)


def sigma_rel_of(gamma: float) -> float:
    """The standard deviation of the density (gamma + 1) tau^gamma on [0, 1] (Karras et al. 2024, section 3)."""
    width: float = ((gamma + 1) / (gamma + 3)) ** 0.5 / (gamma + 2)
    return width


def gamma_of(sigma_rel: float) -> float:
    """The power whose profile is so wide: the inverse of :func:`sigma_rel_of`."""
    from scipy.optimize import brentq

    # The width falls from gamma = -0.3 on, and at 1 / sigma_rel it is below sigma_rel.
    root: float = brentq(lambda gamma: sigma_rel_of(gamma) - sigma_rel, -0.2, 1 / sigma_rel, xtol=1e-14, rtol=1e-14)
    return root


KINDS: dict[str, type[EMA | PowerEMA]] = {"": EMA, "power:": PowerEMA}


def averages(model: nn.Module, setting: str) -> dict[str, Average]:
    """The averages that a setting asks for: decays, or power:SIGMA_REL, with commas between them.

    Returns:
        By name, in order; ``"0.999,power:0.05"`` gives ``0.999`` and ``power-0.05``, which are names of files too.

    Raises:
        InputError: what is no such list, or holds one twice.
    """
    return {name: kind(model, value) for name, (kind, value) in _entries(setting).items()}


def files_of(setting: str) -> dict[str, str]:
    """The file of each average in a checkpoint, by name; the first one is what people sample from."""
    return {name: f"ema-{name}" if number else "ema" for number, name in enumerate(_entries(setting))}


def sigma_rel_in(name: str) -> float:
    """SIGMA_REL of ``power:SIGMA_REL``.

    Raises:
        InputError: another name.
    """
    kind, value = _entry(name)
    check(kind is PowerEMA, f"{name!r} is no power-function average: those are power:SIGMA_REL")
    return value


def check_averages(setting: str) -> None:
    """Raise as :func:`averages` does, without a model."""
    _entries(setting)


def _entries(setting: str) -> dict[str, tuple[type[EMA | PowerEMA], float]]:
    parts = [part.strip() for part in setting.split(",")]
    entries = {part.replace(":", "-"): _entry(part) for part in parts}
    check(len(set(entries.values())) == len(parts), f"{setting!r} names an average twice")
    return entries


def _entry(text: str) -> tuple[type[EMA | PowerEMA], float]:
    kind, colon, number = text.rpartition(":")
    try:
        made = KINDS[kind + colon]
        return made, made.checked(float(number))
    except (KeyError, ValueError) as error:
        why = error if isinstance(error, InputError) else "give decays or power:SIGMA_REL, with commas between them"
        raise InputError(f"{text!r} is no average of weights: {why}") from None


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {_plain(name): tensor for name, tensor in model.state_dict().items()}


def _plain(name: str) -> str:
    """The name as it is without torch.compile, which wraps modules."""
    return name.replace("_orig_mod.", "")
