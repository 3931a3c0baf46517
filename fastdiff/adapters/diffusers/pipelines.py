"""Whole pipelines of diffusers: their scheduler and, where it is a ``UNet2DModel``, their network become ours."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel, UNet2DOutput
from torch import Tensor, nn

from fastdiff import graph
from fastdiff.adapters.diffusers import SCHEDULERS, schedulers
from fastdiff.errors import check, choose
from fastdiff.models import UNet

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PLACE = "_before_fastdiff"


def accelerate(pipeline: Any, *, precision: str | None = None, strict_compat: bool = False) -> Any:
    """Let a pipeline run on our scheduler and network, in place. Its call, callbacks and outputs stay what they are.

    Its loop stays, too: beside network and scheduler it takes some ten microseconds a step. On a GPU the network is a
    CUDA graph for each shape and dtype, of which it keeps the latest :data:`fastdiff.graph.BOUND`, and is replayed
    where no gradients are asked for; threads take turns. What cannot be captured runs as it is, with one warning.

    Args:
        pipeline: of DDPM's, DDIM's or Stable Diffusion's kind: an object with ``scheduler``, one of
            :data:`~fastdiff.adapters.diffusers.SCHEDULERS` by its class, and perhaps ``unet``.
        precision: in which a ``UNet2DModel`` computes, ``fp32`` | ``bf16`` | ``fp16``; by default that of its weights.
            What it is given and gives keeps its dtype.
        strict_compat: of the scheduler.

    Returns:
        The pipeline; :func:`restore` undoes it.

    Raises:
        InputError: nothing to replace, a pipeline that is accelerated already, a network that has no counterpart.
    """
    choose("precision", precision, [None, *PRECISIONS])
    check(not hasattr(pipeline, PLACE), "this pipeline is accelerated already: restore(pipeline) first")
    scheduler, unet = (getattr(pipeline, name, None) for name in ("scheduler", "unet"))
    name = type(scheduler).__name__
    choose("scheduler of a pipeline", name, SCHEDULERS)
    config = pipeline.scheduler.config
    ours = getattr(schedulers, name).from_config(config, strict_compat=strict_compat)
    replaced: dict[str, Any] = {"scheduler": ours}
    if isinstance(unet, UNet2DModel):
        replaced["unet"] = Network(unet, None if precision is None else PRECISIONS[precision])
    else:
        check(precision is None, f"precision is of a UNet2DModel, this pipeline has {type(unet).__name__}")
    object.__setattr__(pipeline, PLACE, {part: getattr(pipeline, part) for part in replaced})
    for part, value in replaced.items():
        setattr(pipeline, part, value)
    return pipeline


def restore(pipeline: Any) -> Any:
    """Give a pipeline back what :func:`accelerate` has replaced, and a GPU the memory of its graphs.

    Raises:
        InputError: a pipeline that is not accelerated.
    """
    check(hasattr(pipeline, PLACE), "this pipeline is not accelerated")
    for part, value in getattr(pipeline, PLACE).items():
        graph.teardown(getattr(pipeline, part))
        setattr(pipeline, part, value)
    object.__delattr__(pipeline, PLACE)
    return pipeline


class Network(nn.Module):
    """Our U-Net in its form for inference, called as a ``UNet2DModel`` is and looking like one to a pipeline.

    Args:
        unet: whose weights it takes, as they are now.
        dtype: in which it computes.
    """

    def __init__(self, unet: UNet2DModel, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config, self.dtype = unet.config, unet.dtype
        self.network = UNet.from_diffusers(unet).to(unet.device).prepared(dtype or unet.dtype)
        self._computes = dtype or unet.dtype

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        """As ``UNet2DModel.forward``: one timestep or ``[N]``, class labels ``[N]``."""
        given = sample, _told(timestep, sample.device), class_labels
        replays = graph.serves(sample.device) and not torch.is_grad_enabled()
        output = graph.replayed(self, self._output, given) if replays else self._output(*given)
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def _output(self, sample: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        cond = {} if labels is None else {"y": labels}
        output: Tensor = self.network(sample.to(self._computes), t.expand(len(sample)), **cond)
        return output.to(sample.dtype)


def _told(timestep: Tensor | float, device: torch.device) -> Tensor:
    """A timestep on the device. A number is made there: to bring it would wait for the GPU."""
    told = torch.as_tensor(timestep)
    if told.ndim or told.device.type != "cpu" or not graph.serves(device):
        return told.to(device)
    return torch.full((), told.item(), dtype=told.dtype, device=device)
