"""The variational bound of a few samples, every term of it, against the loop that takes one timestep after another.

The loop is guided-diffusion's way to bits per dimension: the network is asked once a timestep with the whole batch, the
tables are NumPy's. Ours asks for many timesteps at once. Ours is compared with the same loop in float64 around the same
network; peers draw noise of their own. Subjects: points of the plane, small images, and CIFAR-10's network, where the
multiplications are what takes long, so that a loop of 1000 timesteps is cut to 100 on a CPU. The floor is as many
products of matrices as the network has. Beside the time each row says, of ours and (``peer_``) of the peer: terms a
second, and the share of the time that is not the network, from a network that costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastdiff as fd
from benchmarks.harness import Arrays, Bind, Call, Case, Peer
from benchmarks.sampling import make_mlp, output, seconds
from benchmarks.unet import BF16, LAST, _name, _product, make_network
from fastdiff.noise import Stream

TOLERANCE = {torch.float32: 1e-3, BF16: 0.1}
V = "v_prediction"  # which an untrained network does not turn into huge estimates
Networks = dict[str, Callable[[], Any]]
Draw = Callable[[Tensor, int], Tensor]


class Setting(NamedTuple):
    """A bound that everybody computes."""

    timesteps: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def decoder(self) -> str:
        return "discrete" if len(self.shape) == 4 else "gaussian"


def cases(device: torch.device, quick: bool = False) -> Iterator[Case]:
    total = 20 if quick else 1000
    for n in (1,) if quick else (1, 8, 64):
        network = cache(partial(make_mlp, device))
        yield case(Setting(total, (n, 2), torch.float32, device), network, network, {"": network})
    for size, n in ((8, 1),) if quick else ((8, 1), (8, 8), (16, 1), (16, 8)):
        for dtype in (torch.float32,) if quick else (torch.float32, BF16):
            yield images(Setting(total, (n, 3, size, size), dtype, device), small=True)
    if not quick:
        for n in (1, 8) if device.type == "cpu" else (1, 16):
            for dtype in (torch.float32, BF16):
                steps = 1000 if device.type == "cuda" else 100
                yield images(Setting(steps, (n, 3, 32, 32), dtype, device), small=False)


def images(setting: Setting, small: bool) -> Case:
    network = cache(lambda: make_network(setting.device, small).eval())
    same = cache(lambda: fd.UNet.from_diffusers(network()).to(setting.device).eval())
    ours = cache(lambda: fd.UNet.from_diffusers(network()).to(setting.device, setting.dtype).eval())
    peers: Networks = {", diffusers": network, ", our network": same}
    if setting.dtype == BF16:
        peers[", bf16 last"] = cache(lambda: make_network(setting.device, small).eval().to(BF16, memory_format=LAST))
    return case(setting, ours, network, peers)


def case(setting: Setting, ours: Callable[[], Any], network: Callable[[], Any], peers: Networks) -> Case:
    def peer(made: Callable[[], Any]) -> Bind:
        return lambda arrays: partial(loop, setting, made(), data(arrays), random)

    return Case(
        name=f"bits per dim, {setting.timesteps} steps, {_name(setting.dtype)}, {'x'.join(map(str, setting.shape))}",
        shape=setting.shape,
        reads=1,
        writes=0,
        ours=lambda arrays: partial(fastdiff, setting, ours(), data(arrays)),
        formula=lambda arrays: loop(setting, network(), data(arrays), addressed),
        peers=tuple(Peer(f"loop{name}", partial(peer, made), None) for name, made in peers.items()),
        tolerance=TOLERANCE[setting.dtype],
        floor=partial(floor, setting, network),
        facts=lambda name, ms: facts(setting, name, ms),
    )


def data(arrays: Arrays) -> Tensor:
    return arrays.reads[0].clamp(-1, 1)


def fastdiff(setting: Setting, network: Any, x: Tensor) -> tuple[Tensor, ...]:
    diffusion = fd.Diffusion(fd.Schedule.linear(setting.timesteps), V)
    return diffusion.bits_per_dim(network, x, decoder=setting.decoder, clip=1.0)


# ---- the loop ---------------------------------------------------------------------------------


def random(x: Tensor, t: int) -> Tensor:
    return torch.randn_like(x)


def addressed(x: Tensor, t: int) -> Tensor:
    return fd.noise.normal(x.shape, seed=0, step=t, stream=Stream.LIKELIHOOD, device=x.device, dtype=x.dtype)


@torch.no_grad()
def loop(setting: Setting, network: Any, x0: Tensor, draw: Draw) -> tuple[Tensor, ...]:
    """Ho et al. 2020, eq. 5, in x0's precision: total, prior and terms, bits per dimension."""
    columns = tables(setting.timesteps)

    def extract(name: str, t: Tensor) -> Tensor:
        values = torch.from_numpy(columns[name]).to(t.device)[t].to(x0.dtype)
        return values.reshape(-1, *(1,) * (x0.ndim - 1)).expand(x0.shape)

    def posterior(start: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean = extract("of_x0", t) * start + extract("of_x", t) * x
        return mean, extract("variance", t), extract("log_variance", t)

    dtype = next(network.parameters()).dtype
    terms = []
    for step in range(setting.timesteps):
        t = torch.tensor([step] * len(x0), device=x0.device)
        x = extract("signal", t) * x0 + extract("noise", t) * draw(x0, step)
        true_mean, _, true_log_variance = posterior(x0, x, t)
        out = output(network, x.to(dtype), t).to(x0.dtype)
        estimate = (extract("signal", t) * x - extract("noise", t) * out).clamp(-1, 1)
        mean, _, log_variance = posterior(estimate, x, t)
        divergence = bits(kl(true_mean, true_log_variance, mean, log_variance))
        decoder = bits(nll(setting.decoder, x0, mean, log_variance))
        terms.append(torch.where(t == 0, decoder, divergence))
    t = torch.tensor([setting.timesteps - 1] * len(x0), device=x0.device)
    zero = torch.zeros_like(x0)
    prior = bits(kl(extract("signal", t) * x0, 2 * extract("noise", t).log(), zero, zero))
    every = torch.stack(terms, 1)
    return prior + every.sum(1), prior, every


@cache
def tables(timesteps: int) -> dict[str, Any]:
    """By timestep, from linear betas; the variance of t = 0 is that of t = 1."""
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64), 0)
    before = torch.cat((torch.ones(1, dtype=torch.float64), alpha_bar[:-1]))
    beta = 1 - alpha_bar / before
    variance = beta * (1 - before) / (1 - alpha_bar)
    columns = {
        "signal": alpha_bar.sqrt(),
        "noise": (1 - alpha_bar).sqrt(),
        "of_x0": before.sqrt() * beta / (1 - alpha_bar),
        "of_x": (1 - beta).sqrt() * (1 - before) / (1 - alpha_bar),
        "variance": variance,
        "log_variance": torch.cat((variance[1:2], variance[1:])).log(),
    }
    return {name: column.numpy() for name, column in columns.items()}


def kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    difference = (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    return 0.5 * (-1.0 + log_variance2 - log_variance1 + torch.exp(log_variance1 - log_variance2) + difference)


def nll(decoder: str, x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    centred, inverse = x - mean, torch.exp(-0.5 * log_variance)
    if decoder == "gaussian":
        return 0.5 * (math.log(2 * math.pi) + log_variance + (centred * inverse) ** 2)
    above, below = (torch.special.ndtr(inverse * (centred + side / 255)) for side in (1, -1))
    inside = (above - below).clamp(min=1e-12).log()
    ends = torch.where(x > 0.999, (1 - below).clamp(min=1e-12).log(), inside)
    return -torch.where(x < -0.999, above.clamp(min=1e-12).log(), ends)


def bits(nats: Tensor) -> Tensor:
    return nats.flatten(1).mean(1) / math.log(2)


# ---- the floor and the facts ------------------------------------------------------------------


def floor(setting: Setting, network: Callable[[], Any], arrays: Arrays) -> Call:
    return _product(network, setting.dtype, arrays, times=setting.timesteps)


class Free(nn.Module):
    """A network that costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x


def facts(setting: Setting, name: str, ms: float) -> dict[str, Any]:
    x = torch.randn(setting.shape, device=setting.device).clamp(-1, 1)
    free = Free().to(setting.device)
    call: Call = partial(fastdiff, setting, free, x) if name == "ours" else partial(loop, setting, free, x, random)
    terms = setting.shape[0] * setting.timesteps
    return {"terms_per_s": 1e3 * terms / ms, "outside": seconds(call, setting.device) * 1e3 / ms}
