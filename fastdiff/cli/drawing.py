"""A run as a source of samples by their ids."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdiff.errors import check
from fastdiff.guidance import ClassifierFree, ClassifierGuidance
from fastdiff.sampler import Sampler, State
from fastdiff.training.run import ClassifierRun, Run

if TYPE_CHECKING:
    from fastdiff.cli.sample import SampleConfig


class Drawing:
    """Draws samples of a run: sample k is the same in whatever batch and process it is drawn.

    Args:
        run: what to sample from.
        config: ``config.count`` samples 0, 1, ...
        guide: the classifier to guide by, of the same images, noise levels and, if the model has any, classes.

    Attributes:
        sampler: on the network's scale.
        labels: of all samples, int64 ``[count]``, or None.

    Raises:
        InputError: settings that the model or the sampler does not have.
    """

    def __init__(self, run: Run, config: SampleConfig, guide: ClassifierRun | None = None) -> None:
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        conditional = is_conditional(run)
        self.run, self.config = run, config
        self.sampler = Sampler(
            run.model if dtype == torch.float32 else copy.deepcopy(run.model).to(dtype),
            run.diffusion,
            solver=config.solver,
            steps=config.steps,
            spacing=config.spacing,
            guidance_scale=config.guidance_scale if guide is None else config.classifier_scale,
            guidance=ClassifierFree() if guide is None else ClassifierGuidance(guide.model, conditional),
            clip=None if run.data.is_points else 1.0,
        )
        classes = run.data.classes if guide is None else guide.data.classes
        self.labels = config.label_tensor(len(classes) if conditional or guide else 0)

    def samples(self, ids: Tensor) -> Tensor:
        """Finished samples ``[len(ids), *run.data.shape]``, float32 on the network's scale."""
        return self.sampler(self._shape(ids), **self._settings(ids))

    def states(self, ids: Tensor) -> Iterator[State]:
        """The same samples on their way: the state after each row of the sampler's table."""
        return self.sampler.iterate(self._shape(ids), **self._settings(ids))

    def to_raw(self, x: Tensor) -> Tensor:
        """What has been drawn in data units, uint8 images or float32 points, on the CPU.

        Raises:
            InputError: values that are not finite.
        """
        check(x.isfinite().all(), f"the model of {self.run.data.name} at step {self.run.step} gives NaN or infinity")
        return self.run.data.to_raw(x).cpu()

    def _shape(self, ids: Tensor) -> tuple[int, ...]:
        return len(ids), *self.run.data.shape

    def _settings(self, ids: Tensor) -> dict[str, Any]:
        cond = {} if self.labels is None else {"y": self.labels[ids].to(self.sampler.device)}
        return {"seed": self.config.seed, "sample": ids, **cond}


def is_conditional(run: Run) -> bool:
    return getattr(run.model, "label", None) is not None
