"""Proves on an NVIDIA GPU that captured rows give what rows alone give, without a wait, and give memory back."""

from __future__ import annotations

import gc
import random
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff as fd
from fastdiff.solvers import SOLVERS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
SOLVERS_FROM_NOISE = [solver for solver in SOLVERS if solver != "ddim_inverse"]


def network(**options: Any) -> fd.MLP:
    torch.manual_seed(0)
    mlp = fd.MLP(2, width=32, depth=1, num_classes=3, **options).cuda().eval()
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.3)
    return mlp


def pair(model: Any, solver: str = "ddim", steps: int = 8, **options: Any) -> tuple[fd.Sampler, fd.Sampler]:
    """The same sampler with and without graphs."""
    diffusion = fd.Diffusion(fd.Schedule.cosine(100), "v_prediction")
    options = {"device": "cuda", **options}
    captured, eager = (fd.Sampler(model, diffusion, solver, steps, graph=graph, **options) for graph in (True, False))
    return captured, eager


def labels(n: int) -> Tensor:
    return torch.arange(n, device="cuda") % 3


def test_a_hundred_random_runs_with_canaries_between() -> None:
    """Of every solver, with memory taken and given back between the rows of a run."""
    numbers, model, seen = random.Random(0), network(), set()
    canaries: list[tuple[Tensor, float]] = []

    def disturb(state: Any) -> None:
        canaries.append(
            (torch.full((numbers.randrange(1, 5000),), float(state.step), device="cuda"), float(state.step))
        )
        if len(canaries) > 5:
            canaries.pop(numbers.randrange(5))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(100):
            solver, n = numbers.choice(SOLVERS_FROM_NOISE), numbers.choice([1, 4, 64])
            scale, seed = numbers.choice([1.0, 2.5]), numbers.randrange(2**40)
            captured, eager = pair(model, solver, numbers.randrange(1, 30), guidance_scale=scale)
            results = [captured((n, 2), seed=seed, y=labels(n), callback=call) for call in (None, disturb)]
            assert torch.equal(results[0], eager((n, 2), seed=seed, y=labels(n)))
            assert torch.equal(*results)
            seen.add(float(results[0].sum()))
    assert len(seen) == 100
    assert all(bool((canary == value).all()) for canary, value in canaries)


@pytest.mark.parametrize("solver", SOLVERS_FROM_NOISE)
def test_one_launch_a_row_and_nothing_waits(solver: str) -> None:
    from torch.profiler import ProfilerActivity, profile

    captured, _ = pair(network(), solver, 20, guidance_scale=2.0)
    y, uncounted = labels(64), captured((64, 2), y=labels(64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the profiler, about itself
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            result = captured((64, 2), y=y)
            torch.cuda.synchronize()
        counts = Counter(event.name.split(" (")[0] for event in profiler.events())
    assert counts["cudaGraphLaunch"] == len(captured.table)
    assert not [name for name in counts if name.startswith(("Memcpy DtoH", "cudaStreamSynchronize"))]
    assert torch.equal(result, uncounted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_unet_in_its_inference_form(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    unet = fd.UNet(16, model_channels=32, channel_mult=(1, 2), attention_resolutions=(8,)).cuda().to(dtype).eval()
    captured, eager = pair(unet, "dpmpp_2m")
    for factor in (1.0, 1.2):
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.mul_(factor)
        one, other = (sampler((4, 3, 16, 16), seed=3) for sampler in (captured, eager))
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


GUIDANCES: dict[str, dict[str, Any]] = {
    "two calls": {"guidance": fd.guidance.ClassifierFree(batched=False)},
    "rescaled": {"guidance": fd.guidance.ClassifierFree(rescale=0.7)},
    "an interval": {"guidance_interval": (0.3, 3.0)},
    "a threshold": {"threshold": 0.9, "clip": 0.5},
    "a classifier": {"guidance": fd.guidance.ClassifierGuidance(lambda x, t: torch.cat((x, -x), 1).square(), True)},
}


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
@pytest.mark.parametrize("kind", GUIDANCES)
def test_every_guidance(kind: str, solver: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captured, eager = pair(network(), solver, guidance_scale=2.0, **GUIDANCES[kind])
        for seed in (0, 1):
            assert torch.equal(captured((8, 2), seed=seed, y=labels(8)), eager((8, 2), seed=seed, y=labels(8)))


def test_threads_share_a_sampler() -> None:
    captured, eager = pair(network(), "ddpm")
    alone = [eager((4, 2), seed=seed, y=labels(4)) for seed in range(32)]
    with ThreadPoolExecutor(32) as pool:
        shared = list(pool.map(lambda seed: captured((4, 2), seed=seed, y=labels(4)), range(32)))
    assert all(torch.equal(one, other) for one, other in zip(alone, shared, strict=True))


def settled() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def test_twenty_failures_give_their_memory_back() -> None:
    def waits(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return 0.25 * x * (1 + 0 * float(x.sum()))

    expected = pair(lambda x, t, y: 0.25 * x)[1]((4096, 64), y=labels(4096))
    before = None
    for _ in range(20):
        captured, _ = pair(lambda x, t, y: waits(x, t, y))
        with pytest.warns(RuntimeWarning, match="it runs row by row"):
            assert torch.equal(captured((4096, 64), y=labels(4096)), expected)
        del captured, _
        before = settled() if before is None else before
    assert settled() <= before + 2**21
    captured, eager = pair(network())  # random numbers are as before
    assert torch.equal(captured((8, 2), y=labels(8)), eager((8, 2), y=labels(8)))  # and the next is captured


def test_teardown_gives_memory_back() -> None:
    model = network()
    captured, _ = pair(model)
    captured((100, 2), y=labels(100))  # libraries keep what they need for the stream of captures
    captured.teardown()
    before = settled()
    captured((100_000, 2), y=labels(100_000))
    assert settled() > before
    captured.teardown()
    assert settled() <= before + 2**21
