"""One optimiser step as a function of tensors. Nothing in it looks at the device, so that a GPU is not waited for and
the whole step can be one CUDA graph; whether it changes anything is decided where the numbers are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastdiff import graph, noise
from fastdiff.errors import InputError
from fastdiff.losses import brought
from fastdiff.training.config import TrainConfig
from fastdiff.training.distributed import summed, world
from fastdiff.training.ema import Average
from fastdiff.training.objective import Found, Objective
from fastdiff.training.parallel import Parallel, whole_of


class Inputs(NamedTuple):
    """What differs from one step to the next; tensors are on the device, but places may be on the host."""

    x: Tensor  #: this process's samples, on the network's scale
    y: Tensor | None  #: their labels
    places: Tensor  #: int64, theirs in the batch of all processes
    step: int | Tensor
    rate: Tensor  #: of learning
    shares: tuple[Tensor, ...]  #: of the weights in each average, float64
    stop: Tensor  #: bool, whether this process is asked to stop
    allowed: Tensor  #: bool, whether the step may change anything


class Outcome(NamedTuple):
    """What came of it, on the device."""

    found: Found  #: of this process's samples
    totals: Tensor  #: float64: values summed over the whole batch, how many ask to stop, the norm of the gradient


@dataclass(frozen=True)
class Step:
    """Gradients of the mean loss of the batch in ``parts``; then, where loss and gradient are finite in all processes,
    clipping, the optimiser and the averages. Elsewhere nothing is changed.
    """

    config: TrainConfig
    objective: Objective
    parallel: Parallel
    optimizer: torch.optim.AdamW
    averages: Collection[Average]
    parts: int = 1

    def __call__(self, inputs: Inputs) -> Outcome:
        self.optimizer.zero_grad()
        found = self._backward(inputs)
        gradients = [p.grad for p in self.objective.model.parameters() if p.grad is not None]
        norm = whole_of(nn.utils.get_total_norm(gradients))
        sums = [value.double().sum() for value in found.values.values()]
        totals = summed(torch.stack((*sums, inputs.stop.double())))
        self._update(inputs, norm, inputs.allowed & torch.isfinite(totals[0]) & torch.isfinite(norm))
        return Outcome(found, torch.cat((totals, norm.double()[None])))

    def _backward(self, inputs: Inputs) -> Found:
        """Gradients of the mean loss, part after part."""
        cuts = min(self.parts, len(inputs.x))
        labels = cuts * [None] if inputs.y is None else inputs.y.tensor_split(cuts)
        found: list[Found] = []
        for x, y, places in zip(inputs.x.tensor_split(cuts), labels, inputs.places.tensor_split(cuts), strict=True):
            with self._randomness(inputs.step, places), self.parallel.backward(last=len(found) == cuts - 1):
                each = self.objective(x, y, places, inputs.step)
                # Gradients of processes are averaged, of which some may have a sample less than others.
                (each.values["loss"].sum() * (world() / self.config.batch)).backward()
            found.append(pytree.tree_map(Tensor.detach, each))
        values = {name: torch.cat([each.values[name] for each in found]) for name in found[0].values}
        return Found(values, tuple(map(torch.cat, zip(*(each.seen for each in found), strict=True))))

    def _randomness(self, step: int | Tensor, places: Tensor) -> AbstractContextManager[None]:
        """Of dropout, by the first place of a part; around a captured step it is set once."""
        return nullcontext() if isinstance(step, Tensor) else self.keyed(step, places)

    @contextmanager
    def keyed(self, step: int, places: Tensor) -> Iterator[None]:
        """Torch's own generators, keyed by the first place."""
        device = self.objective.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            where: dict[str, Any] = {"step": step, "sample": places[:1], "stream": noise.Stream.NETWORK}
            torch.manual_seed(int(noise.uniform_words(1, seed=self.config.seed, **where)))
            yield

    def _update(self, inputs: Inputs, norm: Tensor, changes: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"].copy_(inputs.rate)
        # As torch's GradScaler tells it: a fused optimiser divides by the one, and does nothing where the other is 1.
        told = {"grad_scale": (norm.float() / self.config.clip_grad).clamp(min=1), "found_inf": (~changes).float()}
        vars(self.optimizer).update(told)
        self.optimizer.step()
        for average, share in zip(self.averages, inputs.shares, strict=True):
            average.take(self.objective.model, share * changes)


class Captured:
    """A step as one CUDA graph, whose kernels start without the host. What it draws is drawn on the device; with
    dropout, all parts of a step have one key.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._graph: graph.Function | None = None

    def __call__(self, inputs: Inputs) -> Outcome:
        assert isinstance(inputs.step, int)
        device = inputs.x.device
        step = torch.full((), inputs.step, dtype=torch.int64, device=device)
        given = inputs._replace(step=step, places=brought(inputs.places, device))
        self._graph = self._graph or self._captured(given)
        with self._step.keyed(inputs.step, inputs.places):
            outcome: Outcome = self._graph(given)
        return outcome

    def _captured(self, given: Inputs) -> graph.Function:
        """Warmed up by steps that change nothing."""
        idle = given._replace(allowed=torch.zeros_like(given.allowed))
        try:
            return graph.Function(self._step, (idle,), graph.new_pool())
        except RuntimeError as error:
            raise InputError(f"the step cannot be a CUDA graph, leave out --graph: {error}") from error
