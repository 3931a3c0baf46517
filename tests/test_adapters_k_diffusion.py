"""k-diffusion's look-alikes against plain recursions of the papers in float64, and against k-diffusion if installed.

``pip install --no-deps k-diffusion`` brings what the second needs.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import types
from typing import Any

import pytest
import torch
from k_diffusion_tools import PLAIN, denoise
from oracles import Mixture, model_of
from torch import Tensor

import fastdiff as fd
from fastdiff.adapters import k_diffusion as K

pytestmark = pytest.mark.usefixtures("one_thread")


CHURN = {"s_churn": 6.0, "s_tmin": 0.1, "s_tmax": 8.0, "s_noise": 1.1}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in PLAIN),
    *((name, CHURN) for name in ("sample_euler", "sample_heun", "sample_dpm_2")),
    ("sample_heun", {"s_churn": 500.0}),
    ("sample_euler_ancestral", {"eta": 0.4, "s_noise": 0.9}),
    ("sample_euler_ancestral", {"eta": 1.2}),
    ("sample_dpm_2_ancestral", {"eta": 0.0}),
    ("sample_dpmpp_2s_ancestral", {"eta": 0.4, "s_noise": 0.9}),
    ("sample_lms", {"order": 2}),
    ("sample_dpmpp_sde", {"eta": 0.4, "s_noise": 0.9, "r": 0.3}),
    ("sample_dpmpp_2m_sde", {"eta": 0.4, "s_noise": 0.9, "solver_type": "heun"}),
    ("sample_dpmpp_2m_sde", {"eta": 0.0}),
    ("sample_dpmpp_3m_sde", {"eta": 0.4, "s_noise": 0.9}),
]
RUNS = [(1, True), (2, True), (2, False), (3, True), (4, False), (20, True), (20, False)]  # steps, whether to 0
every_case = pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: value if value else "")


class Drawn:
    """Noise by number, which writes down what it is asked for; for churn, torch's own."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype, self.asked = dtype, list[tuple[float, float]]()
        torch.manual_seed(7)

    def __call__(self, sigma: Tensor | float, sigma_next: Tensor | float) -> Tensor:
        self.asked.append((float(sigma), float(sigma_next)))
        generator = torch.Generator().manual_seed(len(self.asked))
        return torch.randn(3, 2, generator=generator, dtype=torch.float64).to(self.dtype)


def levels(steps: int, to_zero: bool, dtype: torch.dtype = torch.float64) -> Tensor:
    ramp = torch.linspace(0, 1, steps + (not to_zero), dtype=torch.float64)
    sigmas = (10 ** (1 / 7) + ramp * (0.05 ** (1 / 7) - 10 ** (1 / 7))) ** 7
    return (torch.cat((sigmas, torch.zeros(1).double())) if to_zero else sigmas).to(dtype)


def start(dtype: torch.dtype = torch.float64) -> Tensor:
    return (10 * torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)


def sampled(library: Any, name: str, sigmas: Tensor, x: Tensor, **options: Any) -> tuple[Tensor, list[Any], Drawn]:
    """The result of a sampler, the dictionaries of its callback, and its noise."""
    seen: list[dict[str, Any]] = []
    noise = Drawn(x.dtype)
    if "ancestral" in name or "sde" in name:
        options["noise_sampler"] = noise
    return getattr(library, name)(denoise, x, sigmas, None, seen.append, True, **options), seen, noise


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@every_case
def test_samplers_follow_the_papers(name, options):
    for steps, to_zero in RUNS:
        sigmas, x = levels(steps, to_zero), start()
        got, seen, noise = sampled(K, name, sigmas, x, **options)
        own = Drawn()
        expected = PLAIN[name](x, sigmas.tolist(), own, **options)
        assert apart(got, expected) < 1e-10, (steps, to_zero)
        assert noise.asked == [pytest.approx(pair, rel=1e-12) for pair in own.asked]
        assert [state["i"] for state in seen] == list(range(steps))
        for state in seen:
            assert state["sigma"] == sigmas[state["i"]]
            assert torch.equal(state["denoised"], denoise(state["x"], state["sigma_hat"].expand(3)))


@every_case
def test_float32_is_float64_rounded(name, options):
    for steps, to_zero in RUNS:
        sigmas, x = levels(steps, to_zero, torch.float32), start(torch.float32)
        got, *_ = sampled(K, name, sigmas, x, **options)
        assert got.dtype == torch.float32
        expected = PLAIN[name](x.double(), sigmas.double().tolist(), Drawn(torch.float32), **options)
        assert apart(got, expected) < 1e-5, (steps, to_zero)


@pytest.mark.parametrize("to_zero", [True, False])
def test_churn_draws_as_much_as_k_diffusion(to_zero):
    """What is drawn from torch afterwards is the same too."""
    sampled(K, "sample_euler", levels(4, to_zero), start(), s_churn=1.0, s_tmax=1.0)
    after = torch.get_rng_state()
    PLAIN["sample_euler"](start(), levels(4, to_zero).tolist(), Drawn(), s_churn=1.0)
    assert torch.equal(torch.get_rng_state(), after)


# ---- k-diffusion itself ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def peer() -> Any:
    """Its samplers and denoisers alone, with stand-ins for what they import and do not need here."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        pytest.skip("k-diffusion is not installed")
    stand_ins = {
        name: types.ModuleType(name) for name in ("k_diffusion", "k_diffusion.utils", "torchdiffeq", "torchsde")
    }
    stand_ins["k_diffusion"].__path__ = list(spec.submodule_search_locations or [])
    stand_ins["k_diffusion"].utils = stand_ins["k_diffusion.utils"]  # type: ignore[attr-defined]
    stand_ins["k_diffusion.utils"].append_dims = lambda x, n: x.reshape(*x.shape, *(1,) * (n - x.ndim))  # type: ignore[attr-defined]
    stand_ins["torchdiffeq"].odeint = None  # type: ignore[attr-defined]
    parts = "k_diffusion.sampling", "k_diffusion.external"
    with pytest.MonkeyPatch.context() as patch:
        for name in parts:
            patch.delitem(sys.modules, name, raising=False)
        for name, module in stand_ins.items():
            patch.setitem(sys.modules, name, module)
        sampling, external = map(importlib.import_module, parts)
        for name in parts:
            del sys.modules[name]
    return types.SimpleNamespace(sampling=sampling, external=external)


@every_case
def test_k_diffusion_goes_the_same_way(name, options, peer):
    for steps, to_zero in RUNS:
        if name.endswith("m_sde") and (steps, to_zero) == (1, True):
            continue  # theirs fails there
        sigmas, x = levels(steps, to_zero), start()
        got, seen, noise = sampled(K, name, sigmas, x, **options)
        expected, states, asked = sampled(peer.sampling, name, sigmas, x, **options)
        assert apart(got, expected) < 1e-10, (steps, to_zero)
        assert noise.asked == [pytest.approx(pair, rel=1e-12) for pair in asked.asked]
        for ours, theirs in zip(seen, states, strict=True):
            assert list(ours) == list(theirs)
            assert ours["i"] == theirs["i"]
            for key in ("x", "sigma", "sigma_hat", "denoised"):
                torch.testing.assert_close(ours[key], theirs[key], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in PLAIN if "ancestral" in name])
def test_torchs_seed_gives_k_diffusions_images(name, peer):
    results = []
    for library in (K.sampling, peer.sampling):
        torch.manual_seed(0)
        results.append(getattr(library, name)(denoise, start(), levels(10, True), disable=True))
    assert apart(*results) < 1e-10


def test_levels_are_k_diffusions(peer):
    for name in ("get_sigmas_karras", "get_sigmas_exponential"):
        torch.testing.assert_close(getattr(K, name)(7, 0.02, 50.0), getattr(peer.sampling, name)(7, 0.02, 50.0))


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize(("prediction", "name"), [("epsilon", "Eps"), ("v_prediction", "V")])
def test_denoisers_are_k_diffusions(prediction, name, quantize, peer):
    schedule = fd.Schedule.scaled_linear(1000)
    ours = K.Denoiser(network, fd.Diffusion(schedule, prediction), quantize)
    theirs = getattr(peer.external, f"Discrete{name}DDPMDenoiser")(network, schedule.alpha**2, quantize)
    sigma, x = torch.tensor([0.01, 0.03, 0.77, 3.0, 14.0, 99.0], dtype=torch.float64), torch.randn(6, 2).double()
    close = {"rtol": 1e-9, "atol": 1e-9, "check_dtype": False}
    torch.testing.assert_close(ours.sigma_to_t(sigma), theirs.sigma_to_t(sigma), **close)
    torch.testing.assert_close(ours(x, sigma), theirs(x, sigma), **close)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, **close)
    for n in (None, 2, 30):  # theirs rounds timesteps to float32
        torch.testing.assert_close(ours.get_sigmas(n), theirs.get_sigmas(n).float(), rtol=1e-5, atol=0)


def network(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(x + t[:, None] / 300)


# ---- the contract ---------------------------------------------------------------------------


def test_levels():
    rho = [(50 ** (1 / 3) + i / 4 * (0.02 ** (1 / 3) - 50 ** (1 / 3))) ** 3 for i in range(5)]
    assert K.get_sigmas_karras(5, 0.02, 50.0, rho=3.0).tolist() == pytest.approx([*rho, 0.0], rel=1e-6)
    equal = [50 * (0.02 / 50) ** (i / 4) for i in range(5)]
    assert K.get_sigmas_exponential(5, 0.02, 50.0).tolist() == pytest.approx([*equal, 0.0], rel=1e-6)
    assert K.get_sigmas_karras(3, 0.1, 1.0).dtype == torch.float32


def test_what_inference_mode_has_remembered_serves_outside():
    sigmas, x = levels(7, True) * 1.01, start()
    with torch.inference_mode():
        first = K.sample_heun(denoise, x, sigmas, disable=True)
    assert torch.equal(K.sample_heun(denoise, x, sigmas, disable=True), first)


def test_half_precision_is_kept_between_steps():
    sigmas, x = levels(20, True, torch.float32), start(torch.float16)
    dtypes = set()

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        dtypes.update({x.dtype, sigma.dtype})
        return denoise(x.float(), sigma.float()).to(x.dtype)

    got = K.sample_dpmpp_2m(model, x, sigmas, disable=True)
    assert got.dtype == torch.float16
    assert dtypes == {torch.float16}
    assert apart(got, K.sample_dpmpp_2m(denoise, x.float(), sigmas, disable=True)) < 3e-3


def test_arguments_reach_the_model_and_a_callback_may_change_what_it_is_given():
    sigmas, x = levels(4, True), start()
    ours = K.sample_euler(
        lambda x, sigma, gain: gain * x, x, sigmas, {"gain": 0.5}, lambda state: state["denoised"].zero_(), True
    )
    assert torch.equal(ours, torch.zeros_like(x))
    assert torch.equal(x, start())


def test_noise_left_out_is_torchs(capsys):
    sigmas, x = levels(5, True), start()
    for name in ("sample_euler_ancestral", "sample_dpmpp_2m_sde", "sample_dpmpp_sde"):
        torch.manual_seed(3)
        first = getattr(K, name)(denoise, x, sigmas)
        torch.manual_seed(3)
        assert torch.equal(getattr(K, name)(denoise, x, sigmas), first)
        assert not torch.equal(getattr(K, name)(denoise, x, sigmas), first)
    assert "%" not in capsys.readouterr().err  # no terminal, no bar


def test_noise_of_overlapping_intervals_lies_on_one_path():
    path = K.BrownianPath(torch.empty(200_000, 1))
    half, whole, later = (path(*map(torch.tensor, ends)).flatten() for ends in ((9.0, 5.0), (9.0, 1.0), (1.0, 0.5)))
    got = torch.corrcoef(torch.stack((half, whole, later)))
    expected = torch.tensor([[1, math.sqrt(1 / 2), 0], [math.sqrt(1 / 2), 1, 0], [0, 0, 1]])
    torch.testing.assert_close(got, expected, atol=0.01, rtol=0)
    assert [float(z.std()) for z in (half, whole, later)] == pytest.approx([1, 1, 1], abs=0.01)


def test_a_step_of_the_singlestep_sde_solver_has_the_right_spread():
    """A point at 0: the state at sigma is N(0, sigma²), exactly so for every step of the reverse SDE."""
    x = 10 * torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    got = K.sample_dpmpp_sde(lambda x, sigma: torch.zeros_like(x), x, torch.tensor([10.0, 4.0, 1.0]), disable=True)
    assert float(got.std()) == pytest.approx(1.0, abs=0.01)


# ---- wrappers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "name"),
    [
        ("euler", "sample_euler"),
        ("heun", "sample_heun"),
        ("dpm2", "sample_dpm_2"),
        ("lms", "sample_lms"),
        ("dpmpp_2m", "sample_dpmpp_2m"),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1e-4])  # also where no noise is visible beside the data
def test_a_denoiser_is_a_network_of_ours(solver, name, scale):
    sigmas, x = scale * levels(12, True), scale * start()
    sampler = fd.Sampler(denoise, K.sigma_diffusion(sigmas), solver, 12, dtype=torch.float64)
    expected = PLAIN[name](x, sigmas.tolist(), Drawn())
    assert apart(sampler(x.shape, x=x), expected) < 1e-12
    assert apart(getattr(K, name)(denoise, x, sigmas, disable=True), expected) < 1e-12
    assert float(sampler((500, 2), seed=1).std()) > 0


def test_a_sampler_starts_denoisers_from_noise_of_the_first_level():
    sampler = fd.Sampler(lambda x, sigma: x, K.sigma_diffusion(torch.tensor([5.0, 1.0])), "euler", 2)
    first = fd.noise.normal((4, 2), seed=3, stream=fd.noise.Stream.INITIAL)
    torch.testing.assert_close(sampler((4, 2), seed=3), 5 * first)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_a_network_of_ours_is_a_denoiser(prediction):
    data = Mixture.random(2)
    diffusion = fd.Diffusion(fd.Schedule.cosine(100), prediction)
    denoiser = K.Denoiser(model_of(data, diffusion), diffusion)
    at = torch.cat((denoiser.sigmas[[0, 50, 99]], torch.tensor([0.5, 3.0, 11.0]).double()))
    x = at[:, None] * torch.randn(6, 2, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(denoiser(x, at), data.denoise(x, 1.0, at[:, None]), rtol=1e-9, atol=1e-9)
    assert denoiser(x.half(), at.half()).dtype == torch.float16


def test_eulers_method_on_a_denoiser_is_ddim():
    diffusion = fd.Diffusion(fd.Schedule.linear(1000), "epsilon")
    model, steps = model_of(Mixture.random(2), diffusion), [990, 700, 400, 90, 3]
    denoiser = K.Denoiser(model, diffusion)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(2)).double()
    sigmas = torch.cat((denoiser.sigmas[steps], torch.zeros(1).double()))
    got = K.sample_euler(denoiser, x / diffusion.schedule.alpha[990], sigmas, disable=True)
    expected = fd.Sampler(model, diffusion, "ddim", steps, dtype=torch.float64)(x.shape, x=x)
    assert apart(got, expected) < 1e-10


def test_timesteps_and_sigmas_are_inverse():
    denoiser = K.Denoiser(network, fd.Diffusion(fd.Schedule.cosine(50)))
    t = torch.linspace(0, 49, 200, dtype=torch.float64).reshape(10, 20)
    torch.testing.assert_close(denoiser.sigma_to_t(denoiser.t_to_sigma(t)), t)
    assert torch.equal(denoiser.sigma_to_t(denoiser.sigmas, quantize=True), torch.arange(50))
    assert denoiser.sigma_to_t(torch.tensor([1e-9, 1e9])).tolist() == [0, 49]
    assert denoiser.get_sigmas(10).shape == (11,)
    assert denoiser.get_sigmas()[[0, -2, -1]].tolist() == pytest.approx(
        [float(denoiser.sigma_max), float(denoiser.sigma_min), 0.0]
    )
    assert denoiser.t_to_sigma(torch.tensor([0, 49])).tolist() == pytest.approx(denoiser.sigmas[[0, 49]].tolist())


def test_a_unet_samples_and_learned_variances_are_passed_over():
    unet = fd.UNet(
        image_size=8,
        out_channels=6,
        model_channels=16,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        norm_groups=8,
    ).eval()
    denoiser = K.Denoiser(unet, fd.Diffusion(fd.Schedule.linear(100), variance="learned_range"))
    x = 5 * torch.randn(2, 3, 8, 8)
    images = K.sample_dpmpp_2m(denoiser, x, denoiser.get_sigmas(4), disable=True)
    assert images.shape == x.shape
    assert bool(images.isfinite().all())
    assert denoiser.state_dict().keys() == {f"inner_model.{name}" for name in unet.state_dict()}


# ---- what does not fit ----------------------------------------------------------------------

GOOD = torch.tensor([2.0, 1.0, 0.0])


@pytest.mark.parametrize(
    "sigmas",
    [
        [1.0, 2.0, 0.0],
        [1.0, 1.0, 0.0],
        [0.0, 0.0],
        [0.0],
        [2.0, -1.0],
        [torch.inf, 1.0],
        [torch.nan, 0.0],
        [[2.0, 1.0]],
        [],
    ],
)
def test_levels_that_do_not_fit(sigmas):
    with pytest.raises(fd.InputError, match=r"^sigmas must"):
        K.sample_euler(denoise, torch.ones(2, 2), torch.tensor(sigmas), disable=True)
    with pytest.raises(fd.InputError, match=r"^sigmas must be a floating-point tensor"):
        K.sample_euler(denoise, torch.ones(2, 2), torch.tensor([2, 1, 0]), disable=True)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sample_heun", {"s_churn": -1.0}, "s_churn"),
        ("sample_euler_ancestral", {"eta": -1.0}, "eta"),
        ("sample_dpmpp_2m_sde", {"eta": -1.0}, "eta"),
        ("sample_dpmpp_2m_sde", {"solver_type": "euler"}, "solver_type"),
        ("sample_dpmpp_sde", {"r": 0.0}, "r must"),
        ("sample_lms", {"order": 5}, "order"),
        ("sample_euler_ancestral", {"noise_sampler": lambda *_: torch.zeros(2, 3)}, "noise_sampler"),
        ("sample_dpmpp_sde", {"noise_sampler": lambda *_: 0.0}, "noise_sampler"),
    ],
)
def test_options_that_do_not_fit(name, options, message):
    with pytest.raises(fd.InputError, match=message):
        getattr(K, name)(denoise, torch.ones(2, 2), GOOD, disable=True, **options)


def test_models_and_states_that_do_not_fit():
    for wrong in (lambda x, sigma: x[:1], lambda x, sigma: torch.cat((x, x), 1)):
        with pytest.raises(fd.InputError, match="what the model gives must have shape"):
            K.sample_dpmpp_2m(wrong, torch.ones(2, 2), GOOD, disable=True)
    with pytest.raises(fd.InputError, match="must return a tensor"):
        K.sample_dpmpp_2m(lambda x, sigma: None, torch.ones(2, 2), GOOD, disable=True)
    with pytest.raises(fd.InputError, match="x must be"):
        K.sample_euler(denoise, torch.ones(2), GOOD, disable=True)
    for n, low, high in ((0, 0.1, 1.0), (3, 0.0, 1.0), (3, 2.0, 1.0)):
        with pytest.raises(fd.InputError):
            K.get_sigmas_karras(n, low, high)
    for schedule in (fd.Schedule.edm(10), fd.Schedule.cosine(10).rescale_zero_terminal_snr(), fd.Schedule.linear(1)):
        with pytest.raises(fd.InputError, match="variance-preserving"):
            K.Denoiser(network, fd.Diffusion(schedule, "v_prediction"))
    denoiser = K.Denoiser(network, fd.Diffusion(fd.Schedule.linear(10)))
    with pytest.raises(fd.InputError, match="sigma must hold one"):
        denoiser(torch.ones(2, 2), torch.ones(3))
    with pytest.raises(fd.InputError, match="n must"):
        denoiser.get_sigmas(0)
