"""Pipelines of diffusers with one line changed, against the same pipelines as they come.

Our scheduler alone in ``DDPMPipeline``, with a small network, 1,000 steps; and ``accelerate(pipeline)``, scheduler and
network, in ``DDIMPipeline`` with the DDPM CIFAR-10 network, 50 steps. All draw from one of PyTorch's generators, and
what is compared are the images: with those of diffusers' pipeline in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch

from benchmarks.harness import Case, Peer
from benchmarks.sampling import (
    TOLERANCE,
    Run,
    Setting,
    bound,
    diffusers_pipeline,
    make_images_network,
    make_pipeline,
    run_of,
)
from benchmarks.unet import BF16, _name, _product, make_network
from fastdiff.adapters import diffusers as adapters

ALONE = {"ddpm": 1000, "ddim": 50}


def cases(device: torch.device, quick: bool = False) -> Iterator[Case]:
    small = cache(lambda: make_network(device, True).eval())
    for solver, steps in ALONE.items():
        setting = Setting(solver, 4 if quick else steps, (1, 3, 32, 32), torch.float32, device)
        yield case("our scheduler, small network", setting, scheduled, small, {"diffusers": small})
    for batch in (1,) if quick else (1, 16) if device.type == "cuda" else (1, 8):
        for dtype in (torch.float32, BF16):
            yield accelerated(Setting("ddim", 2 if quick else 50, (batch, 3, 32, 32), dtype, device), quick)


def accelerated(setting: Setting, quick: bool) -> Case:
    network = cache(partial(make_images_network, setting, quick, torch.float32))
    peers: dict[str, Callable[[], Any]] = {"diffusers": network}
    if setting.dtype == BF16:
        peers["diffusers, bf16 last"] = cache(partial(make_images_network, setting, quick, BF16))
    return case(f"accelerate, {_name(setting.dtype)}", setting, whole, network, peers)


def case(
    subject: str,
    setting: Setting,
    ours: Callable[[Setting, Any], Run],
    network: Callable[[], Any],
    peers: dict[str, Callable[[], Any]],
) -> Case:
    theirs = cache(lambda: diffusers_pipeline(setting, network()))
    tolerance = TOLERANCE[setting.dtype]
    return Case(
        name=f"{subject}, {setting.solver} {setting.steps}, {'x'.join(map(str, setting.shape))}",
        shape=setting.shape,
        reads=1,
        writes=0,
        ours=bound(setting, ours, network),
        formula=lambda arrays: [theirs()(arrays.reads[0])],
        peers=tuple(
            Peer(name, partial(bound, setting, diffusers_pipeline, made), None) for name, made in peers.items()
        ),
        tolerance=10 * tolerance if setting.dtype == torch.float32 else tolerance,  # diffusers' tables are of float32
        floor=lambda arrays: _product(network, setting.dtype, arrays, times=setting.steps),
        facts=lambda name, ms: {"samples_per_s": 1e3 * setting.shape[0] / ms},
    )


def scheduled(setting: Setting, network: Any) -> Run:
    pipeline = make_pipeline(setting, network)
    kind = getattr(adapters, type(pipeline.scheduler).__name__)
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    return run_of(pipeline, setting)


def whole(setting: Setting, network: Any) -> Run:
    pipeline = adapters.accelerate(make_pipeline(setting, network), precision=_precision(setting.dtype))
    return run_of(pipeline, setting)


def _precision(dtype: torch.dtype) -> str:
    return "bf16" if dtype == BF16 else "fp32"
