"""Training on several processes: the same samples, gradients, losses and checkpoints as on one."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from train_tools import far, images, on, write_model

from fastdiff import InputError
from fastdiff.training import checkpoint
from fastdiff.training.config import Operation, TrainConfig
from fastdiff.training.distributed import Group, of_all, rank, summed, world
from fastdiff.training.log import read
from fastdiff.training.parallel import whole_of
from fastdiff.training.run import load_run
from fastdiff.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

Argument = tuple[dict[str, Any], dict[str, Any], Path, bool | str]


def made(argument: Argument) -> Trainer:
    settings, operation, run, resume = argument
    torch.set_num_threads(1)
    return Trainer(TrainConfig(**settings), images(), run, operation=Operation(**operation), resume=resume)


def train(argument: Argument) -> bool:
    return made(argument).train()


def first_gradient(argument: Argument) -> dict[str, Tensor]:
    trainer = made(argument)
    next(trainer.steps())
    return {name: whole_of(p.grad).clone() for name, p in trainer.model.named_parameters()}  # type: ignore[arg-type]


def inputs(argument: Argument) -> Tensor:
    """What all processes' networks see in three steps, in the order of the batch: x_t, t and labels as numbers."""
    trainer, seen = made(argument), []

    class Look(nn.Module):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            seen.append(torch.cat((x.flatten(1), t[:, None], y[:, None]), 1).detach())
            return torch.zeros_like(x, requires_grad=True)

    trainer.objective._network = Look()
    steps = trainer.steps()
    batches = []
    for _ in range(3):
        next(steps)
        batches.append(torch.cat(of_all(torch.cat(seen))))
        seen.clear()
    return torch.stack(batches)


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": write_model(folder, dropout=0.0),
        "batch": 7,
        "train_steps": 6,
        "warmup": 2,
        "save_every": 3,
        **more,
    }


MANY = [(2, 1, "ddp"), (2, 1, "fsdp"), (3, 1, "ddp"), (4, 1, "ddp"), (4, 1, "fsdp"), (4, 2, "ddp")]
PARTS = [(1, 3, "ddp"), (2, 2, "ddp"), (2, 2, "fsdp"), *(pytest.param(*each, marks=pytest.mark.slow) for each in MANY)]
SHARED = [(1, 2), (2, 3), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((2, 1), (3, 2), (4, 1)))]


@pytest.mark.parametrize(("processes", "accumulate", "parallel"), PARTS)
def test_gradients_are_those_of_the_whole_batch(tmp_path, processes, accumulate, parallel) -> None:
    given = settings(tmp_path)
    alone = first_gradient((given, {}, tmp_path / "alone", False))
    operation = {"parallel": parallel, "accumulate": accumulate}
    shared = on(processes, first_gradient, (given, operation, tmp_path / "shared", False))
    assert far(shared, alone) <= 1e-6


@pytest.mark.parametrize(("processes", "accumulate"), SHARED)
@pytest.mark.parametrize("sampler", ["uniform", "stratified"])
def test_networks_are_given_the_same_samples(tmp_path, processes, accumulate, sampler) -> None:
    given = settings(tmp_path, timestep_sampler=sampler, label_dropout=0.5, augment="flip")
    alone = inputs((given, {}, tmp_path / "alone", False))
    shared = on(processes, inputs, (given, {"accumulate": accumulate}, tmp_path / "shared", False))
    assert torch.equal(alone, shared)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, parallel) -> None:
    """Written by two, read by one and by two; the losses are those of one process that never stopped."""
    given = settings(tmp_path, decay="constant", ema="0.9,power:0.1")
    operation = {"parallel": parallel}
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert train((given, {}, alone, False))
    assert on(2, train, ({**given, "train_steps": 3}, operation, shared, False))
    files = sorted(path.name for path in checkpoint.steps(shared)[0].iterdir())
    assert ("model.1-of-2.safetensors" in files) == (parallel == "fsdp")
    for processes in (2, 1):
        end = {**given, "train_steps": 3 + 3 // processes}
        assert on(processes, train, (end, operation, shared, True))
    losses = [[row["loss"] for row in read(run / "log.jsonl")] for run in (alone, shared)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    saved = [checkpoint.load(run) for run in (alone, shared)]
    for name in ("model", "ema", "ema-power-0.1"):
        assert far(saved[1].tensors(name), saved[0].tensors(name)) < 1e-3
    assert far(load_run(shared).model.state_dict(), saved[1].tensors("ema")) == 0


def too_many(argument: Argument) -> None:
    made(argument)


def test_processes_that_have_nothing_to_do_are_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="2 processes cannot share a batch of 1"):
        on(2, too_many, (settings(tmp_path, batch=1), {}, tmp_path / "run", False))


# ---- what processes say to each other ----------------------------------------------------------


def gathers(_: Any) -> tuple[list[list[float]], list[float], list[str]]:
    mine = torch.arange(rank() + 1.0)
    everyone = Group.of_all(apart=True).everyone(f"rank {rank()} of {world()}")
    return [part.tolist() for part in of_all(mine)], summed(torch.ones(2)).tolist(), everyone


def test_everyone_hears_everyone() -> None:
    parts, total, words = on(3, gathers, None)
    assert parts == [[0.0], [0.0, 1.0], [0.0, 1.0, 2.0]]
    assert total == [3.0, 3.0]
    assert words == ["rank 0 of 3", "rank 1 of 3", "rank 2 of 3"]


def ends_alone(whose: int) -> None:
    if rank() == whose:
        raise InputError(f"image 7 cannot be read in {rank()}")
    summed(torch.ones(1))


@pytest.mark.parametrize("whose", [0, 1, 2])
def test_what_ends_one_process_is_said_by_the_first(whose: int) -> None:
    with pytest.raises(InputError, match=f"image 7 cannot be read in {whose}"):
        on(3, ends_alone, whose)


def waits_in_vain(_: Any) -> str:
    group, said = Group.of_all(apart=True, timeout=timedelta(seconds=1)), ""
    if rank() == 0:
        try:
            group.everyone(0)
        except RuntimeError as error:
            said = str(error)
    distributed.barrier()
    return said


def test_nobody_waits_longer_than_the_timeout() -> None:
    """With torch's own half an hour, a process that hangs while a checkpoint is written is not noticed."""
    assert "1000ms" in on(2, waits_in_vain, None)


def half_written(run: Path) -> str:
    """A checkpoint that the second process cannot write its part of."""
    tensors = {"model": {"w": torch.full((2,), float(rank()))}}
    if rank() == 1:
        tensors = {"model/below": tensors["model"]}
    try:
        checkpoint.save(run, 1, tensors, {}, group=Group.of_all(), sharded=True)
    except InputError as error:
        return str(error)
    return ""


def test_a_part_that_cannot_be_written_leaves_nothing(tmp_path) -> None:
    checkpoint.save(tmp_path, 0, {"model": {"w": torch.ones(1)}}, {})
    assert "model/below.1-of-2.safetensors" in on(2, half_written, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000000"]


def test_parts_that_are_missing_are_named(tmp_path) -> None:
    contents = {"model.1-of-2": {"w": torch.ones(1)}}
    checkpoint.save(tmp_path, 0, contents, {})
    with pytest.raises(InputError, match="model lacks the parts of some of 2 processes"):
        checkpoint.load(tmp_path).tensors("model")
