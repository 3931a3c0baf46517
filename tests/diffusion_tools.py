"""What tests of the diffusion process, of its losses and of timesteps share."""

import math

import pytest
import torch
from graph_tools import Tape
from torch.utils import _pytree as pytree

import fastdiff as fd

F64 = torch.float64
PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")
KINDS = ("simple", "vlb", "hybrid", "min_snr", "snr_sample")
SCHEDULES = {
    "linear": fd.Schedule.linear(100, beta_end=0.15),
    "scaled_linear": fd.Schedule.scaled_linear(100, beta_end=0.1),
    "cosine": fd.Schedule.cosine(100),
    "sigmoid": fd.Schedule.sigmoid(100, beta_end=0.15),
    "laplace": fd.Schedule.laplace(100),
    "zero_snr": fd.Schedule.linear(100, beta_end=0.15).rescale_zero_terminal_snr(),
    "edm": fd.Schedule.edm(100),
    "flow": fd.Schedule.flow(100),
}
VARIANCE_PRESERVING = [name for name, schedule in SCHEDULES.items() if schedule.variance_preserving]
every_schedule = pytest.mark.parametrize("name", SCHEDULES)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_variance = pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])


def randn(shape, seed, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def at(table, t, ndim=3):
    return table[t].reshape(-1, *(1,) * (ndim - 1))


def largest(difference):
    return float(difference.detach().abs().max())


def truth(prediction, x0, noise, alpha, sigma):
    """The four targets by their definitions."""
    norm = (alpha**2 + sigma**2) ** 0.5
    return {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": (alpha * noise - sigma * x0) / norm,
        "flow_prediction": noise - x0,
    }[prediction]


def network(x, t):
    """A network that is neither right nor constant."""
    return 0.3 * x - 0.1 * torch.tanh(x) + 0.001 * t.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))


def with_variance(x, t):
    """The same with variance channels that reach outside of [-1, 1]."""
    return torch.cat((network(x, t), 1.5 * torch.sin(3 * x)), 1)


def flow_x0(x_t, out, alpha, sigma):
    return (x_t - sigma * out) / (alpha + sigma)


def x0_of(prediction, x_t, out, alpha, sigma):
    """The estimate of x0 of the variance-preserving and the straight process."""
    return {
        "epsilon": (x_t - sigma * out) / alpha if (alpha > 0).all() else math.nan * out,
        "sample": out,
        "v_prediction": alpha * x_t - sigma * out,
        "flow_prediction": flow_x0(x_t, out, alpha, sigma),
    }[prediction]


def process_of(prediction):
    return SCHEDULES["flow" if prediction == "flow_prediction" else "linear"]


LATE = torch.tensor([1, 2, 30, 60, 97, 98])
EARLY = torch.tensor([0, 1, 30, 0, 60, 98])  # the decoder's among them


class OnGPU(Tape):
    """Refuses what would wait for a GPU, and what would bring numbers to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        leaves = pytree.tree_leaves((args, kwargs, result))
        devices = {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"{func} goes from one device to another")
        return result
