"""What training makes small: a loss for each sample, with all that is drawn for it by its place in the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff import noise
from fastdiff.diffusion import Diffusion
from fastdiff.learned_schedule import LearnedSchedule, variational_loss
from fastdiff.losses import brought
from fastdiff.models import Classifier
from fastdiff.training import classification
from fastdiff.training.config import TrainConfig
from fastdiff.training.data import Description
from fastdiff.training.distributed import of_all, summed
from fastdiff.training.timesteps import SAMPLERS, LossTable

BINS = 10


class Found(NamedTuple):
    """What is found of samples, a value for each."""

    values: dict[str, Tensor]  #: ``loss``, and what else is logged
    seen: tuple[Tensor, ...] = ()  #: timesteps and losses without weights, of what learns from them


class Objective:
    """The loss of a diffusion model, or of a classifier of noised images.

    Timesteps, noise and lost labels belong to (seed, step, position in the batch of all processes): however the batch
    is shared and cut, a sample gets the same.

    Args:
        model: what is trained, and ``network`` what runs it: ``network(x, t, **cond)``.

    Attributes:
        timesteps: draws timesteps, and may learn from the losses.
        table: the mean loss by timestep since it was last read.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        network: Callable[..., Any],
        diffusion: Diffusion,
        data: Description,
    ) -> None:
        self.config, self.model, self.diffusion = config, model, diffusion
        self.device = next(model.parameters()).device
        where: dict[str, Any] = {"batch": config.batch, "seed": config.seed, "device": self.device}
        self.timesteps = SAMPLERS[config.timestep_sampler](diffusion.schedule, **where)
        self.table = LossTable(len(diffusion.schedule), self.device, bins=min(BINS, len(diffusion.schedule)))
        self._network, self._decoder = network, "gaussian" if data.is_points else "discrete"
        self._learned: LearnedSchedule | None = getattr(model, "learned_schedule", None)
        self._keeps_table = self._learned is None and not isinstance(model, Classifier)

    def __call__(self, x: Tensor, y: Tensor | None, positions: Tensor, step: int | Tensor) -> Found:
        """Of samples ``x`` on the network's scale at these positions, int64; positions and step on a GPU are not
        looked at.
        """
        config = self.config
        if isinstance(self.model, Classifier):
            assert y is not None  # the trainer has seen to it
            how: dict[str, Any] = {"seed": config.seed, "step": step, "positions": positions, "batch": config.batch}
            return Found(classification.cross_entropies(self.network, self.diffusion, x, y, **how))
        cond: dict[str, Any] = self.drop_labels(self._conditions(y), positions, step)
        if self._learned is not None:
            return self._bound(self._learned, x, positions, step, cond)
        t, weight = self.timesteps.draw(positions, step=step)
        where: dict[str, Any] = {"seed": config.seed, "step": step, "sample": brought(positions, self.device)}
        losses = self.diffusion.losses(self.network, x, t, kind=config.loss, decoder=self._decoder, **where, **cond)
        return Found({"loss": losses * weight}, (t, losses))

    def _bound(
        self, learned: LearnedSchedule, x: Tensor, positions: Tensor, step: int | Tensor, cond: dict[str, Any]
    ) -> Found:
        """The bound under a schedule that is trained too, and its parts (Kingma et al. 2021)."""
        config = self.config
        how: dict[str, Any] = {"prediction": config.prediction, "decoder": self._decoder, "minimise_variance": True}
        where: dict[str, Any] = {"seed": config.seed, "step": step, "sample": positions, "batch": config.batch}
        found = variational_loss(self.network, learned, x, **how, **where, **cond)
        return Found({"loss": found.total, **{name: each for name, each in found._asdict().items() if name != "total"}})

    def network(self, x: Tensor, t: Tensor, **cond: Tensor) -> Any:
        """In the precision of the run."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return self._network(x, t, **cond)

    def learn(self, found: Found) -> None:
        """Take up the losses of a step that has changed the weights, of all this process's samples."""
        if not found.seen:
            return
        self.table.add(*found.seen)
        if self.timesteps.learns:
            self.timesteps.update(*(torch.cat(of_all(each)) for each in found.seen))

    def by_timestep(self) -> dict[str, list[float]]:
        """The mean loss by tenths of the timesteps since this was asked last, of all processes; nothing without."""
        if not self._keeps_table:
            return {}
        summed(self.table.totals)
        means = self.table.means()
        self.table.reset()
        return {"loss_by_timestep": means}

    def _conditions(self, y: Tensor | None) -> dict[str, Tensor]:
        """What the model is given beside x and t: labels, if there are any and it takes them."""
        return {} if y is None or getattr(self.model, "label", None) is None else {"y": y}

    def drop_labels(self, cond: dict[str, Tensor], positions: Tensor, step: int | Tensor) -> dict[str, Tensor]:
        """Replace the share ``label_dropout`` of the conditions by their null (Ho & Salimans 2022, algorithm 1)."""
        if not cond:
            return cond
        where: dict[str, Any] = {"step": step, "sample": positions, "stream": noise.Stream.DROPOUT}
        words = noise.uniform_words(len(positions), seed=self.config.seed, **where)
        dropped = brought(words < self.config.label_dropout * 2**32, self.device)
        null = self.model.null_condition(cond)  # type: ignore[operator]
        return {name: torch.where(dropped, null[name], value) for name, value in cond.items()}
