"""``fastdiff verify`` against other libraries: those that are installed, and small ones with the textbook's loops.

``pip install --no-deps k-diffusion torchdiffeq torchsde trampoline`` brings what the tests of k-diffusion need.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_verify import SHAPE, network, run
from torch import Tensor

import fastdiff as fd
from fastdiff.adapters import peers
from fastdiff.adapters.verification import Verification, verify
from fastdiff.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")
run = run  # the fixture
PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")


def compared(solver: str, prediction: str = "v_prediction", schedule: fd.Schedule | None = None, **how: Any) -> Any:
    diffusion = fd.Diffusion(schedule or fd.Schedule.linear(300), prediction)
    return verify(network(), diffusion, SHAPE, solver=solver, **{"steps": 10, "clip": 1.0, **how})


def check_the_same(found: Verification, name: str, loses: float) -> None:
    peer = found.peers[name]
    assert peer.why_not is None
    assert peer.first_over is None, (peer.far, found.budget)
    assert all(far <= loses * found.largest[row] for far, row in zip(peer.far, peer.rows, strict=True))
    assert peer.from_fused <= peer.far[-1] + found.fused[-1]


# ---- what is installed ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("solver", peers.IN_DIFFUSERS)
def test_diffusers_goes_the_same_way(solver: str, prediction: str) -> None:
    pytest.importorskip("diffusers")
    check_the_same(compared(solver, prediction), "diffusers", 5e-3)


@pytest.mark.parametrize("schedule", [fd.Schedule.linear(300), fd.Schedule.edm(100)], ids=["linear", "edm"])
@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("solver", peers.IN_K_DIFFUSION)
def test_k_diffusion_goes_the_same_way(solver: str, steps: int, schedule: fd.Schedule) -> None:
    if find_spec("k_diffusion") is None:
        pytest.skip("k-diffusion is not installed")
    check_the_same(compared(solver, schedule=schedule, steps=steps), "k-diffusion", 1e-7)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guided_diffusion_goes_the_same_way(prediction: str) -> None:
    if find_spec("guided_diffusion") is None:
        pytest.skip("guided-diffusion is not installed")
    check_the_same(compared("ddim", prediction), "guided-diffusion", 1e-3)


def test_where_a_run_differs_from_diffusers() -> None:
    """At timesteps that its solver does not take."""
    pytest.importorskip("diffusers")
    for solver, steps in (("pndm", [299, 200, 50]), ("unipc", [299, 200, 50]), ("lms", [290, 3])):
        assert "does not run at these timesteps" in str(compared(solver, steps=steps).peers["diffusers"].why_not)
    check_the_same(compared("heun", steps=[299, 200, 50]), "diffusers", 1e-3)


# ---- the textbook's loops, by the names of the others -----------------------------------------


def installed(monkeypatch: pytest.MonkeyPatch, name: str, **modules: dict[str, Any]) -> None:
    """A package of these modules, in place of what is installed."""
    package = ModuleType(name)
    package.__spec__, package.__path__ = ModuleSpec(name, None), []
    monkeypatch.setitem(sys.modules, name, package)
    for inner, content in modules.items():
        module = ModuleType(f"{name}.{inner}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def samplers(wrong_at: int | None) -> dict[str, Any]:
    def sample_euler(model: Any, x: Tensor, sigmas: Tensor, callback: Any, disable: bool) -> Tensor:
        """Karras et al. 2022, algorithm 1."""
        for i, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
            callback({"x": x, "i": i})
            x = x + (following - sigma) * (x - model(x, sigma.expand(len(x)))) / sigma
            x = x + 0.01 if i == wrong_at else x
        return x

    return {"sampling": {"sample_euler": sample_euler}}


def processes(wrong_at: int | None) -> dict[str, Any]:
    class SpacedDiffusion:
        """Song et al. 2021, eq. 12."""

        def __init__(self, kept: set[int], betas: np.ndarray, model_mean_type: str, **rest: Any) -> None:
            assert model_mean_type == "x0"
            self.kept, self.bars = sorted(kept), [1.0, *np.cumprod(1 - betas)[sorted(kept)]]

        def ddim_sample_loop_progressive(
            self, model: Any, shape: tuple[int, ...], x: Tensor, clip_denoised: bool, device: Any, eta: float
        ) -> Iterator[dict[str, Tensor]]:
            assert not clip_denoised
            assert eta == 0
            for i in reversed(range(len(self.kept))):
                x0 = model(x, torch.full((len(x),), self.kept[i]))
                bar, before = self.bars[i + 1], self.bars[i]
                epsilon = (x - math.sqrt(bar) * x0) / math.sqrt(1 - bar)
                x = math.sqrt(before) * x0 + math.sqrt(1 - before) * epsilon
                x = x + 0.01 if len(self.kept) - 1 - i == wrong_at else x
                yield {"sample": x, "pred_xstart": x0}

    names = SimpleNamespace(START_X="x0", FIXED_LARGE="large", MSE="mse")
    kinds = {"ModelMeanType": names, "ModelVarType": names, "LossType": names}
    return {"gaussian_diffusion": kinds, "respace": {"SpacedDiffusion": SpacedDiffusion}}


OTHERS = {"k-diffusion": ("k_diffusion", samplers), "guided-diffusion": ("guided_diffusion", processes)}
others = pytest.mark.parametrize("name", OTHERS)


@others
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_textbook_s_loop_is_the_same(
    name: str, prediction: str, clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, content = OTHERS[name]
    installed(monkeypatch, module, **content(None))
    found = compared("ddim", prediction, clip=clip)
    check_the_same(found, name, 1e-8)
    assert found.peers[name].rows == list(range(10))


@others
def test_a_peer_that_is_wrong_is_different(
    name: str, monkeypatch: pytest.MonkeyPatch, run: Path, tmp_path: Path, capsys: Any
) -> None:
    module, content = OTHERS[name]
    installed(monkeypatch, module, **content(6))
    assert main(["verify", "--checkpoint", str(run), "--steps", "12", "--out", str(tmp_path)]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(name))
    assert "DIFFERENT from step 6 at t =" in line
    values = json.loads((tmp_path / "verify.json").read_text())
    assert values["peers"][name]["first_over"] == 6
    assert values["peers"][name]["far"][5] < 1e-5 < values["peers"][name]["far"][6]


def test_diffusers_with_a_wrong_step_is_different(monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers = pytest.importorskip("diffusers")
    right = diffusers.HeunDiscreteScheduler.step

    def step(self: Any, output: Tensor, *rest: Any, **how: Any) -> Any:
        return right(self, output * (1.1 if self.step_index == 5 else 1), *rest, **how)

    monkeypatch.setattr(diffusers.HeunDiscreteScheduler, "step", step)
    assert compared("heun").peers["diffusers"].first_over == 5  # the second row of the third step


# ---- guidance, what is missing and what fails --------------------------------------------------


@others
def test_the_estimate_is_guided(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, content = OTHERS[name]
    installed(monkeypatch, module, **content(None))
    diffusion, y = fd.Diffusion(fd.Schedule.linear(300), "v_prediction"), torch.tensor([0, 2, 1])
    ends = []
    for scale in (1.0, 3.0):
        model = network(num_classes=3)
        found = verify(model, diffusion, SHAPE, steps=8, clip=1.0, guidance_scale=scale, cond={"y": y})
        check_the_same(found, name, 1e-8)
        ends.append(found.largest)
    assert ends[0] != ends[1]


def test_what_is_missing_or_fails_is_named(
    monkeypatch: pytest.MonkeyPatch, run: Path, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setitem(sys.modules, "k_diffusion", None)
    installed(monkeypatch, "guided_diffusion", gaussian_diffusion={}, respace={})
    assert main(["verify", "--checkpoint", str(run), "--steps", "4", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "\ndiffusers" in said
    assert said.count(": not installed\n") == 2
    assert ": failed: AttributeError: " in said
    values = json.loads((tmp_path / "verify.json").read_text())["peers"]
    assert values["k-diffusion"]["why_not"] == "not installed"
    assert values["k-diffusion"]["far"] == []


@pytest.mark.parametrize(
    ("solver", "how", "said"),
    [
        ("euler_a", {}, {"diffusers": "ddim, euler, heun", "k-diffusion": "dpm2", "guided-diffusion": "is ddim"}),
        ("dpmpp_2m", {"form": "heun"}, dict.fromkeys(OTHERS, "not with form")),
        ("ddim", {"steps": 2, "guidance_scale": [1.0, 1.0]}, dict.fromkeys(OTHERS, "a guidance_scale for each step")),
        ("ddim", {"steps": 1}, {"guided-diffusion": "no run of one step"}),
        ("heun", {"schedule": fd.Schedule.edm(50)}, {"diffusers": "has no Schedule.edm"}),
        ("ddim", {"schedule": fd.Schedule.flow(50)}, dict.fromkeys(OTHERS, "has no Schedule.flow")),
    ],
)
def test_why_a_peer_is_not_asked(
    solver: str, how: dict[str, Any], said: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    for module, content in OTHERS.values():
        installed(monkeypatch, module, **content(None))
    found = compared(solver, "sample", **how)
    for name, words in said.items():
        assert words in str(found.peers[name].why_not)


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("solver", {*peers.IN_DIFFUSERS, *peers.IN_K_DIFFUSION})
def test_the_last_rows_of_steps(solver: str, steps: int) -> None:
    """A state of the level of the next timestep."""
    diffusion = fd.Diffusion(fd.Schedule.linear(300))
    sampler = fd.Sampler(network(), diffusion, solver, steps)
    rows = torch.tensor(peers.ends(len(sampler.table), steps))
    after = [*diffusion.schedule.sigma[sampler.timesteps[1:]].tolist(), 0.0]
    assert sampler.table.sigma[rows + 1].tolist() == pytest.approx(after, abs=1e-12)
    assert rows[-1] == len(sampler.table) - 1
