"""Training with a learned schedule: it moves, is saved, averaged and sampled from, and is the same on any processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_tools import cloud, far, images, on, write_model

import fastdiff as fd
from fastdiff import InputError
from fastdiff.training import checkpoint
from fastdiff.training.config import Operation, TrainConfig
from fastdiff.training.log import read
from fastdiff.training.run import load_run
from fastdiff.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

LEARNED: dict[str, Any] = {"schedule": "learned", "loss": "vlb", "timesteps": 50, "warmup": 1, "batch": 6}


@pytest.mark.parametrize("kind", ["images", "points"])
def test_a_schedule_is_trained_saved_and_sampled_from(tmp_path, kind) -> None:
    model, data = (write_model(tmp_path), images()) if kind == "images" else ("auto", cloud())
    config = TrainConfig(model=model, **LEARNED, train_steps=5, learning_rate=0.05, ema="0.5")
    trainer = Trainer(config, data, tmp_path / "run", operation=Operation(grid_every=5))
    before = trainer.model.learned_schedule.schedule(50).log_snr
    assert trainer.train()
    rows = read(tmp_path / "run" / "log.jsonl")
    assert all(row["loss"] == pytest.approx(row["prior"] + row["reconstruction"] + row["diffusion"]) for row in rows)
    run = load_run(tmp_path / "run")
    assert not hasattr(run.model, "learned_schedule")
    log_snr = run.diffusion.schedule.log_snr
    average = trainer.averages["0.5"].tensors
    assert log_snr[[0, -1]].tolist() == pytest.approx(
        [-float(average[f"learned_schedule.gamma_{end}"]) for end in ("min", "max")]
    )
    assert (log_snr - before).abs().max() > 0.01
    cond = {"y": torch.zeros(3, dtype=torch.int64)} if kind == "images" else {}
    x = fd.Sampler(run.model, run.diffusion, "ddim", 10, clip=1.0)((3, *data.shape), seed=0, **cond)
    assert x.isfinite().all()
    assert len(list((tmp_path / "run" / "pictures").iterdir())) == 1


def test_resuming_is_bit_equal(tmp_path) -> None:
    config = TrainConfig(model=write_model(tmp_path), **LEARNED, train_steps=6, save_every=3)
    Trainer(config, images(), tmp_path / "whole").train()
    cut = Trainer(config, images(), tmp_path / "cut")
    steps = cut.steps()
    for _ in range(3):
        next(steps)
    checkpoint.save(cut.run, cut.step, cut.state(), {"config": cut.description})
    steps.close()
    Trainer(config, images(), tmp_path / "cut", resume=True).train()
    assert checkpoint.load(tmp_path / "whole").files == checkpoint.load(tmp_path / "cut").files


def gradients(argument: tuple[dict[str, Any], Path]) -> dict[str, Tensor]:
    settings, run = argument
    torch.set_num_threads(1)
    trainer = Trainer(TrainConfig(**settings), images(), run)
    next(trainer.steps())
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def test_two_processes_find_the_gradient_of_one(tmp_path) -> None:
    settings = {**LEARNED, "model": write_model(tmp_path, dropout=0.0), "batch": 5, "clip_grad": 1e9}
    alone, shared = (on(count, gradients, (settings, tmp_path / str(count))) for count in (1, 2))
    assert any(name.startswith("learned_schedule.l2") for name in alone)
    assert far(shared, alone) < 1e-5


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"loss": "simple"}, "a learned schedule is trained with loss vlb"),
        ({"variance": "learned_range"}, "with variance fixed_small"),
        ({"timestep_sampler": "stratified"}, "with timestep_sampler uniform"),
        ({"zero_terminal_snr": True}, "with zero_terminal_snr False"),
    ],
)
def test_settings_that_do_not_fit_are_named(setting, message) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig(**{**LEARNED, **setting})
