"""A training step as one graph, with a stand-in for CUDA graphs: it computes what the step by itself computes."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_tools import Device, stand_in
from train_tools import far, images, write_model

import fastdiff as fd
from fastdiff import InputError
from fastdiff.training.config import Operation, TrainConfig
from fastdiff.training.loader import Batch
from fastdiff.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSIFIER = {"type": "classifier", "num_head_channels": 16, "model_channels": 16}
#: settings of a run, its model, its operation
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "simple": ({}, {}, {}),
    "hybrid": ({"loss": "hybrid", "variance": "learned_range"}, {"learned_variance": True}, {}),
    "averages": ({"ema": "0.9,power:0.1", "loss": "vlb"}, {}, {}),
    "stratified": ({"timestep_sampler": "stratified", "prediction": "epsilon", "clip_grad": 0.01}, {}, {}),
    "second_moment": ({"timestep_sampler": "second_moment", "timesteps": 2, "train_steps": 12}, {}, {}),
    "learned schedule": ({"schedule": "learned", "loss": "vlb", "prediction": "epsilon"}, {}, {}),
    "bf16": ({"precision": "bf16"}, {}, {}),
    "parts": ({}, {"dropout": 0.0}, {"accumulate": 3}),
    "classifier": ({}, CLASSIFIER, {}),
}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Its values nobody looks at."""
    made = stand_in(monkeypatch)
    for place in ("losses", "diffusion", "learned_schedule"):
        monkeypatch.setattr(f"fastdiff.{place}.visible", lambda x: False)
    monkeypatch.setattr("fastdiff.noise._word", lambda name, value: torch.as_tensor(value))
    return made


def trainer(folder: Path, case: str = "simple", device: str = "cpu", **operation: Any) -> Trainer:
    folder.mkdir()
    settings, model, more = CASES[case]
    given = {"model": write_model(folder, **model), "batch": 6, "train_steps": 5, "warmup": 2, **settings}
    how: dict[str, Any] = {"device": device, "operation": Operation(**operation, **more)}
    return Trainer(TrainConfig(**given), images(), folder / "run", **how)


def rows_of(made: Trainer) -> list[list[float]]:
    """What was logged of its steps."""
    with fd.backend("reference"):  # a tape sees no other
        return [[row["loss"], row["grad_norm"], row["learning_rate"]] for row in made.steps()]


@pytest.mark.parametrize("case", CASES)
def test_a_captured_step_is_the_step(case: str, tmp_path: Path, device: Device) -> None:
    alone, captured = trainer(tmp_path / "alone", case), trainer(tmp_path / "captured", case, graph=True)
    rows, again = rows_of(alone), rows_of(captured)
    assert (device.captures, device.replays) == (1, len(rows))
    assert torch.allclose(torch.tensor(again), torch.tensor(rows), rtol=1e-5)
    states = captured.state(), alone.state()
    assert states[0].keys() == states[1].keys()
    bound = 0.05 if case == "bf16" else 1e-3  # Adam divides small gradients by themselves
    assert all(far(states[0][file], states[1][file]) < bound for file in states[0])
    assert torch.allclose(captured.objective.table.totals, alone.objective.table.totals, rtol=1e-5)


def test_a_captured_step_that_is_not_finite_changes_nothing(tmp_path: Path, device: Device) -> None:
    made = trainer(tmp_path / "run", graph=True)
    y = torch.arange(6) % 3
    with fd.backend("reference"):
        assert math.isfinite(made.train_step(0, Batch(torch.zeros(6, 1, 8, 8), y, ()))["loss"])
        before = copy.deepcopy(made.state())
        row = made.train_step(1, Batch(torch.full((6, 1, 8, 8), math.inf), y, ()), stop=True)
    assert not math.isfinite(row["loss"])
    assert row["stop"]
    assert all(far(made.state()[file], before[file]) == 0 for file in before)
    assert device.replays == 2


def test_what_cannot_be_captured_says_so(tmp_path: Path, device: Device) -> None:
    def trouble() -> None:
        raise RuntimeError("no memory")

    made, device.trouble = trainer(tmp_path / "run", graph=True), trouble
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    with pytest.raises(InputError, match="cannot be a CUDA graph, leave out --graph: no memory"):
        rows_of(made)
    assert far(made.model.state_dict(), before) == 0  # two steps have warmed up
    assert far(made.averages["0.999"].tensors, before) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_s_graph_is_the_step(case: str, tmp_path: Path) -> None:
    """Dropout among it: its key is the first place of the one part."""
    alone, captured = (
        trainer(tmp_path / "alone", case, "cuda"),
        trainer(tmp_path / "captured", case, "cuda", graph=True),
    )
    rows, again = (
        torch.tensor([[row["loss"], row["grad_norm"]] for row in made.steps()]) for made in (alone, captured)
    )
    bound = 2e-2 if case == "bf16" else 1e-3
    assert torch.allclose(again, rows, rtol=bound)
    assert all(far(captured.state()[file], alone.state()[file]) < 10 * bound for file in ("model", "ema"))


def test_a_device_without_graphs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--graph is for one process on a GPU, here are 1 on cpu"):
        trainer(tmp_path / "run", graph=True)
