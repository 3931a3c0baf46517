"""EDM's and EDM2's samplers by our rows, against the algorithms of Karras et al. 2022 written out in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff as fd
from fastdiff.adapters.edm import edm2_sampler, edm_sampler, levels_of, sampler_of
from fastdiff.solvers import SOLVERS

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (3, 2, 4, 4)
CLASSES = 5
Denoiser = Callable[[Tensor, Tensor], Tensor]


class Network(nn.Module):
    """An interface as EDM's: D between the data's mean, which the class shifts, and x; computed in float32."""

    def __init__(self, sigma_min: float = 0.0, sigma_max: float = math.inf, label_dim: int = CLASSES) -> None:
        super().__init__()
        self.sigma_min, self.sigma_max, self.label_dim = sigma_min, sigma_max, label_dim
        self.means = nn.Parameter(torch.linspace(-0.5, 0.5, CLASSES))
        self.told: list[Tensor] = []

    def round_sigma(self, sigma: Any) -> Tensor:
        return torch.as_tensor(sigma)

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, force_fp32: bool = False) -> Tensor:
        self.told.append(sigma.clone())
        assert x.dtype == torch.float32 or force_fp32 or not self.label_dim
        x, sigma = x.to(torch.float32), sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        assert class_labels is None or class_labels.shape == (len(x), CLASSES)
        mean = 0.1 if class_labels is None else (class_labels @ self.means.float()).reshape(-1, 1, 1, 1)
        return (x + sigma**2 * (mean + torch.sin(x / (1 + sigma)) / 2)) / (1 + sigma**2)


class Rounding(Network):
    """Knows some levels only, as networks do that were trained on a discrete schedule."""

    known = torch.logspace(-3, math.log10(200.0), 400, dtype=torch.float64)

    def round_sigma(self, sigma: Any) -> Tensor:
        return self.known[(torch.as_tensor(sigma)[:, None] - self.known).abs().argmin(1)]


def in_float64(net: Network, labels: Tensor | None = None) -> Denoiser:
    """The same denoiser without any rounding."""
    mean = 0.1 if labels is None else (labels.double() @ net.means.detach().double()).reshape(-1, 1, 1, 1)
    return lambda x, t: (x + t**2 * (mean + torch.sin(x / (1 + t)) / 2)) / (1 + t**2)


def levels(net: Network, n: int, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> list[float]:
    """Equation 5 of Karras et al. 2022, and the 0 at the end."""
    low, high = max(low, net.sigma_min), min(high, net.sigma_max)
    ends = high ** (1 / rho), low ** (1 / rho)
    steps = [(ends[0] + i / max(n - 1, 1) * (ends[1] - ends[0])) ** rho for i in range(n)]
    return [*net.round_sigma(torch.tensor(steps, dtype=torch.float64)).tolist(), 0.0]


def algorithm_2(
    denoise: Denoiser,
    x: Tensor,
    t: list[float],
    noise: Iterator[Tensor],
    churn: float = 0.0,
    window: tuple[float, float] = (0.0, math.inf),
    s_noise: float = 1.0,
    rounded: Callable[[float], float] = float,
    every: bool = True,
) -> Tensor:
    """Algorithm 2, line by line; 1 without churn. ``every``: noise is drawn where it is not used, too."""
    n = len(t) - 1
    x = x.double() * t[0]
    for i in range(n):
        inside = window[0] <= t[i] <= window[1]
        gamma = min(churn / n, math.sqrt(2) - 1) if inside else 0.0
        raised = rounded(t[i] + gamma * t[i])
        if churn and (every or inside):
            x = x + math.sqrt(raised**2 - t[i] ** 2) * s_noise * next(noise)
        slope = (x - denoise(x, torch.tensor(raised))) / raised
        ahead = x + (t[i + 1] - raised) * slope
        if t[i + 1] != 0:
            second = (ahead - denoise(ahead, torch.tensor(t[i + 1]))) / t[i + 1]
            ahead = x + (t[i + 1] - raised) * (slope + second) / 2
        x = ahead
    return x


def latents(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def one_hot() -> Tensor:
    return torch.eye(CLASSES)[torch.tensor([4, 0, 2])]


def noises(dtype: torch.dtype = torch.float64, seed: int = 1) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(SHAPE, generator=generator, dtype=dtype)


class Drawn:
    """randn_like that gives known noise and counts."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.noise, self.dtypes = noises(dtype), list[torch.dtype]()

    def __call__(self, like: Tensor) -> Tensor:
        assert like.shape == SHAPE
        self.dtypes.append(like.dtype)
        return next(self.noise)


def rounding(t: list[float]) -> float:
    """What the rounding of D to float32 comes to: a slope divides it by the level, a step multiplies by its length."""
    return 5e-6 + 5e-7 * max((a - b) / b for a, b in zip(t[:-1], [*t[1:-1], t[-2]], strict=True))


def assert_close(ours: Tensor, exact: Tensor, tolerance: float = 1e-5) -> None:
    error = float((ours.double() - exact).abs().max())
    assert error <= tolerance, error


# ---- without churn: algorithm 1 --------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 5, 18, 40])
@pytest.mark.parametrize("labels", [None, one_hot()], ids=["plain", "classes"])
def test_algorithm_1(steps, labels):
    net, x = Network(), latents()
    ours, t = edm_sampler(net, x, labels, num_steps=steps), levels(net, steps)
    assert ours.dtype == torch.float32
    assert_close(ours, algorithm_2(in_float64(net, labels), x, t, noises()), rounding(t))


@pytest.mark.parametrize("grid", [{"sigma_min": 0.01, "sigma_max": 20.0}, {"rho": 3.0}, {"sigma_max": 500.0}])
def test_the_levels_that_are_asked_for_within_the_networks_own(grid):
    net, x = Network(sigma_min=0.005, sigma_max=100.0), latents()
    low, high, rho = grid.get("sigma_min", 0.002), grid.get("sigma_max", 80.0), grid.get("rho", 7.0)
    t = levels(net, 12, low, high, rho)
    assert min(t[:-1]) == pytest.approx(max(low, 0.005), rel=1e-12)
    assert t[0] == pytest.approx(min(high, 100.0), rel=1e-12)
    assert levels_of(net, 12, low, high, rho).tolist() == pytest.approx(t[:-1], rel=1e-12)
    assert_close(edm_sampler(net, x, num_steps=12, **grid), algorithm_2(in_float64(net), x, t, noises()))


def test_the_network_is_told_sigma_rounded_once():
    net = Network()
    edm_sampler(net, latents(), num_steps=6)
    t = levels(net, 6)
    told = [t[0], *(level for level in t[1:-1] for _ in range(2))]
    expected = torch.tensor(told, dtype=torch.float64)
    assert [sigma.tolist() for sigma in net.told] == [[float(level)] * 3 for level in expected.float()]


def test_levels_that_the_network_rounds():
    net, x = Rounding(), latents()
    ours = edm_sampler(net, x, num_steps=10)
    assert {float(s[0]) for s in net.told} <= set(net.known.float().tolist())
    assert_close(ours, algorithm_2(in_float64(net), x, levels(net, 10), noises()))


def test_the_state_in_float64():
    """The network's own rounding to float32 is all that is left."""
    net, x = Network(), latents()
    ours = edm_sampler(net, x, dtype=torch.float64)
    assert ours.dtype == torch.float64
    rounded = algorithm_2(lambda x, t: net(x.float(), t.float()).double(), x, levels(net, 18), noises())
    assert_close(ours, rounded, 1e-6)


# ---- with churn: algorithm 2 -----------------------------------------------------------------

CHURNS = [
    {"churn": 40.0},  # every step, the first one above the grid
    {"churn": 4.0, "window": (0.05, 50.0), "s_noise": 1.003},
    {"churn": 1e9, "window": (0.0, 70.0)},  # the second step above the first level
    {"churn": 10.0, "window": (1e3, 1e4)},  # none
]


def words(churn: float, window: tuple[float, float] = (0.0, math.inf), s_noise: float = 1.0) -> dict[str, float]:
    return {"S_churn": churn, "S_min": window[0], "S_max": window[1], "S_noise": s_noise}


@pytest.mark.parametrize("network", [Network, Rounding])
@pytest.mark.parametrize("settings", CHURNS)
def test_algorithm_2_with_edms_noise(settings, network):
    net, x, drawn = network(), latents(), Drawn()
    ours = edm_sampler(net, x, one_hot(), drawn, num_steps=16, **words(**settings))
    exact = algorithm_2(
        in_float64(net, one_hot()),
        x,
        levels(net, 16),
        noises(),
        **settings,
        rounded=lambda level: float(net.round_sigma(torch.tensor([level], dtype=torch.float64))),
    )
    assert_close(ours, exact)
    if settings["window" if "window" in settings else "churn"] != (1e3, 1e4):
        assert drawn.dtypes == [torch.float64] * 16


@pytest.mark.parametrize("settings", CHURNS)
def test_algorithm_2_with_the_noise_of_edm2(settings):
    net, x, drawn = Network(), latents(), Drawn(torch.float32)
    ours = edm2_sampler(net, x, one_hot(), num_steps=16, randn_like=drawn, **words(**settings))
    t, (low, high) = levels(net, 16), settings.get("window", (0, math.inf))
    assert drawn.dtypes == [torch.float32] * sum(low <= level <= high for level in t[:-1])
    noise = noises(torch.float32)
    assert_close(ours, algorithm_2(in_float64(net, one_hot()), x, t, noise, **settings, every=False))


def test_torchs_noise_is_the_default():
    net, x = Network(), latents()
    torch.manual_seed(7)
    ours = edm_sampler(net, x, num_steps=12, S_churn=20)
    exact = algorithm_2(in_float64(net), x, levels(net, 12), noises(seed=7), 20)
    assert_close(ours, exact)


# ---- EDM2 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 1.7, 0.0])
@pytest.mark.parametrize("churn", [0.0, 12.0])
def test_a_guiding_network(guidance, churn):
    net, weak, x = Network(), Network(), latents()
    weak.means.data *= -0.5
    strong, other = in_float64(net, one_hot()), in_float64(weak, one_hot())
    drawn = Drawn(torch.float32)
    ours = edm2_sampler(net, x, one_hot(), weak, 12, guidance=guidance, S_churn=churn, randn_like=drawn)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        return other(x, t) + guidance * (strong(x, t) - other(x, t))

    assert_close(ours, algorithm_2(guided, x, levels(net, 12), noises(torch.float32), churn))
    assert bool(weak.told) == (guidance != 1)


def test_weights_in_float16_are_given_float32():
    net, x = Network().half(), latents()
    assert_close(edm2_sampler(net, x), algorithm_2(in_float64(net), x, levels(net, 32), noises()))


# ---- samplers to keep -------------------------------------------------------------------------


def test_a_sampler_has_seeds_of_its_own():
    net = Network()
    sampler = sampler_of(net)
    whole = sampler(SHAPE, seed=3, class_labels=one_hot())
    part = sampler((1, *SHAPE[1:]), seed=3, sample=[1], class_labels=one_hot()[1:2])
    assert torch.equal(whole[1:2], part)
    z = fd.noise.normal(SHAPE, seed=3, stream=fd.noise.Stream.INITIAL)
    assert_close(whole, algorithm_2(in_float64(net, one_hot()), z, levels(net, 18), noises()))


def test_churn_with_seeds_of_its_own():
    """The noise of a step is the last thing in the row before; the first level is not raised."""
    net, window = Network(), (0.05, 50.0)
    sampler = sampler_of(net, 16, solver="edm", s_churn=20.0, s_tmin=window[0], s_tmax=window[1], s_noise=1.003)
    ours, rows = sampler(SHAPE, seed=3), [-1, *range(1, 31, 2)]
    drawn = (fd.noise.normal(SHAPE, seed=3, step=max(row, 0), dtype=torch.float64) for row in rows)
    z = fd.noise.normal(SHAPE, seed=3, stream=fd.noise.Stream.INITIAL)
    exact = algorithm_2(in_float64(net), z, levels(net, 16), drawn, 20.0, window, 1.003)
    assert_close(ours, exact)


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s != "ddim_inverse"])
def test_every_solver_tells_the_network_the_level_of_its_state(solver):
    table = sampler_of(Network(), 12, solver=solver).table
    assert table.rows.t.tolist() == table.sigma[:-1].tolist()
    assert sampler_of(Network(), 12, solver=solver)(SHAPE).isfinite().all()


def test_classifier_free_guidance_and_autoguidance():
    net, labels = Network(), one_hot()
    zero = {"class_labels": torch.zeros(CLASSES)}
    ours = sampler_of(net, guidance_scale=2.0)(SHAPE, x=80 * latents(), class_labels=labels, uncond=zero)
    cond, null = in_float64(net, labels), in_float64(net, 0 * labels)
    t = levels(net, 18)
    assert_close(ours, algorithm_2(lambda x, t: 2 * cond(x, t) - null(x, t), latents(), t, noises()))
    weak = Network()
    weak.means.data *= 0
    guided = sampler_of(net, gnet=weak, guidance_scale=2.0)(SHAPE, x=80 * latents(), class_labels=labels)
    assert_close(guided, ours.double())


# ---- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 2.5}, "num_steps"),
        ({"sigma_min": 90.0}, "sigma_min"),
        ({"sigma_min": 0.0}, "sigma_min"),
        ({"sigma_max": math.inf}, "sigma_max"),
        ({"rho": 0.0}, "rho"),
        ({"S_churn": -1.0}, "S_churn"),
        ({"S_churn": "much"}, "S_churn"),
        ({"latents": torch.zeros(SHAPE, dtype=torch.int64)}, "latents"),
        ({"class_labels": torch.eye(CLASSES)}, "class_labels"),
        ({"dtype": torch.float16}, "dtype"),
    ],
)
def test_bad_input(words, match):
    with pytest.raises(fd.InputError, match=match):
        edm_sampler(Network(), **{"latents": latents(), **words})


def test_more_levels_than_the_network_knows():
    with pytest.raises(fd.InputError, match="fewer"):
        edm_sampler(Rounding(), latents(), num_steps=300)


def test_guidance_by_nothing():
    with pytest.raises(fd.InputError, match="gnet"):
        edm2_sampler(Network(), latents(), guidance=2.0)
