"""Training steps of the DDPM CIFAR-10 network, with all that belongs to one, against diffusers' example.

The peer is the loop of diffusers' unconditional example as its documentation calls it: noise, timesteps,
``DDPMScheduler``, mean squared error, clipped gradients, AdamW, a schedule of rates, ``EMAModel``, the loss read for a
progress bar. It is run as it comes (float32), in bfloat16 under autocast with channels-last weights, and through
torch.compile. Ours is ``Trainer.train_step`` with fresh noise of its own; its loss and the norm of its gradient are
compared with the formula's in float64. Rates are tiny, so that every call computes the same. The floor is one matrix
product of as many multiplications. Beside the time each row says images a second, and of ours the milliseconds of its
parts and the share of the time that is neither forward nor backward.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastdiff as fd
from benchmarks.harness import Bind, Call, Case, Peer
from benchmarks.sampling import once
from benchmarks.unet import BF16, LAST, TOLERANCE, _name, _product, make_network, our_network
from fastdiff import _io
from fastdiff.training.config import Operation, TrainConfig
from fastdiff.training.data import from_tensor
from fastdiff.training.loader import Batch
from fastdiff.training.saving import Saver
from fastdiff.training.trainer import Trainer

RATE = 1e-12
SIDE = 32
TIMESTEPS = 1000
TURNS = 9
Network = Callable[[], Any]


def cases(device: torch.device, quick: bool = False) -> Iterator[Case]:
    for count in (2,) if quick else (128, 512) if device.type == "cuda" else (8,):
        for dtype in (BF16,) if quick else (torch.float32, BF16):
            for graph in (False, True) if device.type == "cuda" else (False,):
                yield case(count, dtype, partial(make_network, device, quick), device, graph)


def case(count: int, dtype: torch.dtype, network: Network, device: torch.device, graph: bool) -> Case:
    ours = cache(lambda: trainer(network, count, dtype, device, graph))
    bf16 = dtype == BF16
    peers = [Peer("diffusers example, float32", partial(_peer, network, bf16=False), None)]
    if bf16:
        peers.append(Peer("diffusers example, channels-last", partial(_peer, network, bf16=True), None))
    peers.append(
        Peer("diffusers example, compiled", partial(_peer, network, bf16=bf16, compiled=True), None, slow=True)
    )
    return Case(
        name=f"training step{' as one graph' if graph else ''}, {_name(dtype)}, {count}x3x{SIDE}x{SIDE}",
        shape=(count, 3, SIDE, SIDE),
        reads=1,
        writes=0,
        ours=lambda arrays: partial(_step, ours(), arrays.reads[0]),
        formula=lambda arrays: _formula(ours(), network, arrays.reads[0]),
        peers=tuple(peers),
        tolerance=2 * TOLERANCE[dtype],
        floor=partial(_product, network, dtype, times=3),
        facts=lambda name, ms: {"images_per_s": 1e3 * count / ms, **(_ours(ours()) if name == "ours" else {})},
    )


# ---- ours -------------------------------------------------------------------------------------


def trainer(network: Network, count: int, dtype: torch.dtype, device: torch.device, graph: bool) -> Trainer:
    """Of the same network and weights, on images in memory."""
    with torch.random.fork_rng([]):
        images = torch.randint(0, 256, (4 * count, 3, SIDE, SIDE), dtype=torch.uint8)
    unet = our_network(network)
    folder = Path(tempfile.mkdtemp())
    (folder / "model.json").write_bytes(_io.to_json({"type": "unet", **unet.config}))
    settings: dict[str, Any] = {"precision": "bf16" if dtype == BF16 else "fp32", "prediction": "epsilon"}
    settings |= {"learning_rate": RATE, "schedule": "linear", "batch": count, "model": str(folder / "model.json")}
    how: dict[str, Any] = {"device": device, "operation": Operation(graph=graph)}
    made = Trainer(TrainConfig(**settings), from_tensor("noise", images), folder / "run", **how)
    made.model.load_state_dict(unet.state_dict())
    made.model.train()
    return made


@torch.enable_grad()
def _step(made: Trainer, x: Tensor) -> tuple[Tensor, Tensor]:
    row = made.train_step(0, Batch(_bytes(x), None, ()))
    return torch.tensor(row["loss"], device=x.device), torch.tensor(row["grad_norm"], device=x.device)


def _bytes(x: Tensor) -> Tensor:
    return fd.metrics.to_uint8(x.clamp(-1, 1))


@torch.enable_grad()
def _formula(made: Trainer, network: Network, x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean squared error of the noise (Ho et al. 2020, eq. 14), in float64."""
    model, x0 = network().double(), made.data.scale(_bytes(x)).double()
    t = made.diffusion.draw_timesteps(len(x), seed=0, step=0)
    noise = fd.noise.normal(x.shape, seed=0, step=0, stream=fd.noise.Stream.TRAINING, device=x.device).double()
    alpha, sigma = (made.diffusion.schedule.alpha[t], made.diffusion.schedule.sigma[t])
    x_t = alpha.to(x0).view(-1, 1, 1, 1) * x0 + sigma.to(x0).view(-1, 1, 1, 1) * noise
    loss = F.mse_loss(model(x_t, t.to(x.device)).sample, noise)
    loss.backward()
    return loss.detach(), torch.stack([p.grad.norm() for p in model.parameters()]).norm()


def _ours(made: Trainer) -> dict[str, float]:
    return {**parts(made), "checkpoint_stall_steps": stall(made)}


def stall(made: Trainer) -> float:
    """By how many steps training falls behind for a checkpoint that is written beside it, from the call until it is
    on disk.
    """
    batch = next(made._loader().batches(0, 1))

    @torch.enable_grad()
    def steps(count: int) -> float:
        return sum(once(lambda: made.train_step(0, batch), made.device) for _ in range(count))

    def behind(saver: Saver, number: int) -> float:
        began, done = time.perf_counter(), 0
        saver.save(number, made.state(), {})
        while saver.writing:
            steps(1)
            done += 1
        took = time.perf_counter() - began
        return took / (steps(done) / done) - done

    with Saver(made.run, keep=1, background=True, sharded=False) as saver:
        return statistics.median(behind(saver, number) for number in range(TURNS // 3))


def parts(made: Trainer) -> dict[str, float]:
    """Milliseconds of the parts of a step, each by itself, and what share of them is neither forward nor backward."""
    device, batches = made.device, made._loader().batches(0, made.config.train_steps)
    batch = next(batches)
    x = made.data.scale(batch.x.to(device))
    places = torch.arange(len(x))

    def forward() -> Tensor:
        return made.objective(x, None, places, 0).values["loss"].mean()

    def network() -> Tensor:
        with torch.autocast(device.type, BF16, enabled=made.config.precision == "bf16"):
            return made.model(x, places.to(device)).float().square().mean()

    def backward(loss: Callable[[], Tensor]) -> None:
        made.optimizer.zero_grad()
        loss().backward()

    calls: dict[str, Call] = {
        "data": lambda: made.data.scale(next(batches).x.to(device)),
        "network": partial(backward, network),
        "network_and_objective": partial(backward, forward),
        "norm": lambda: nn.utils.get_total_norm([p.grad for p in made.model.parameters()]),
        "optimizer": made.optimizer.step,
        "ema": lambda: [average.update(made.model, 0) for average in made.averages.values()],
    }
    with torch.enable_grad():  # in turns, for the machine's speed moves
        turns = [{name: 1e3 * once(call, device) for name, call in calls.items()} for _ in range(TURNS)]
    for turn in turns:
        turn["objective"] = turn.pop("network_and_objective") - turn["network"]
    times = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    return {f"{name}_ms": ms for name, ms in times.items()} | {"outside": 1 - times["network"] / sum(times.values())}


# ---- diffusers' example -----------------------------------------------------------------------


def _peer(network: Network, *, bf16: bool, compiled: bool = False) -> Bind:
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    @cache
    def made() -> Call:
        model = network().train()
        if bf16:
            model = model.to(memory_format=LAST)
        if compiled:
            torch.compiler.reset()
        scheduler = DDPMScheduler(TIMESTEPS)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
        rates = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=100_000)
        ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        return partial(_example, torch.compile(model) if compiled else model, scheduler, optimizer, rates, ema, bf16)

    return lambda arrays: partial(made(), arrays.reads[0].clamp(-1, 1))


@torch.enable_grad()
def _example(model: Any, scheduler: Any, optimizer: Any, rates: Any, ema: Any, bf16: bool, x: Tensor) -> tuple[Tensor]:
    noise = torch.randn_like(x)
    t = torch.randint(0, TIMESTEPS, (len(x),), device=x.device)
    noisy = scheduler.add_noise(x, noise, t)
    with torch.autocast(x.device.type, BF16, enabled=bf16):
        out = model(noisy, t).sample
    loss = F.mse_loss(out.float(), noise.float())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    rates.step()
    optimizer.zero_grad()
    ema.step(model.parameters())
    return (torch.tensor(loss.detach().item()),)
