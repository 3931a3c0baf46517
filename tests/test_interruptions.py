"""Hundreds of lives of a trainer, each ended at another moment: what was committed is there, and the run ends as if
nothing had been. Processes are forked from this one, which is warm, so that a life takes a moment.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from train_tools import images, spoil, write_model

from fastdiff import InputError
from fastdiff.training import checkpoint
from fastdiff.training.config import Operation, TrainConfig
from fastdiff.training.distributed import rank
from fastdiff.training.log import read
from fastdiff.training.saving import Signals
from fastdiff.training.trainer import Trainer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]
STEPS = 12
PATIENCE = 30.0  # seconds


def sizes(few: int, many: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.slow)])


def trainer(folder: Path, run: Path, pictures: int = 0) -> Trainer:
    """Of a run that goes on where it was, with checkpoints on the way."""
    settings: dict[str, Any] = {"model": str(folder / "tiny.json"), "batch": 6, "train_steps": STEPS, "warmup": 4}
    operation = Operation(grid_every=pictures, patience=2, accumulate=2)
    return Trainer(TrainConfig(**settings, save_every=3), images(), run, resume="auto", operation=operation)


def life(folder: Path, run: Path, pictures: int = 0) -> int:
    """From where the run is to its end; notes from which step, and once it trains."""
    made = trainer(folder, run, pictures)
    original = made.steps

    def steps(signals: Signals) -> Iterator[dict[str, Any]]:
        (run / f"ready-{rank()}").touch()
        return original(signals)

    made.steps = steps  # type: ignore[method-assign, assignment]
    with (run / "starts").open("a") as file:
        file.write(f"{made.step}\n")
    return 0 if made.train() else Signals.STATUS


class Lives:
    """Forked processes that work together on ``work()``, their exit status."""

    def __init__(self, count: int, folder: Path, work: Callable[[], int]) -> None:
        meeting = folder / "meeting"
        meeting.unlink(missing_ok=True)
        self.pids = [self._fork(number, count, meeting, work) for number in range(count)]

    def _fork(self, number: int, count: int, meeting: Path, work: Callable[[], int]) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            if count > 1:
                store = distributed.FileStore(str(meeting), count)
                distributed.init_process_group("gloo", store=store, rank=number, world_size=count)
            status = work()
            if count > 1:
                distributed.barrier()
        except InputError:
            status = 2
        finally:
            os._exit(status)

    def ended(self) -> list[int]:
        """The status of each; minus the signal for those that one has killed."""
        deadline, ends = time.monotonic() + PATIENCE, dict[int, int]()
        while len(ends) < len(self.pids):
            for pid in set(self.pids) - ends.keys():
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    ends[pid] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                for pid in set(self.pids) - ends.keys():
                    os.kill(pid, signal.SIGKILL)
                deadline = math.inf
            time.sleep(0.002)
        return [ends[pid] for pid in self.pids]


@pytest.fixture
def folder(tmp_path):
    write_model(tmp_path)
    return tmp_path


def straight(folder: Path, processes: int, pictures: int = 0) -> tuple[Path, float]:
    """A run that nothing has happened to, and how long it took."""
    began, run = time.monotonic(), fresh(folder / "straight")
    assert Lives(processes, folder, lambda: life(folder, run, pictures)).ended() == processes * [0]
    return run, time.monotonic() - began


def fresh(run: Path) -> Path:
    run.mkdir(exist_ok=True)
    return run


def starts(run: Path) -> list[int]:
    noted = run / "starts"
    return [int(step) for step in noted.read_text().split()] if noted.exists() else []


def newest(run: Path) -> int:
    return checkpoint.load(run).step if checkpoint.steps(run) else 0


def same(run: Path, whole: Path) -> None:
    assert checkpoint.load(run).files == checkpoint.load(whole).files
    losses = [[(row["step"], row["loss"]) for row in read(each / "log.jsonl")] for each in (run, whole)]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(STEPS))
    assert not list((run / "checkpoints").glob(".unfinished-*"))


@sizes(4, 300)
def test_kills_cost_nothing_that_was_committed(folder, count) -> None:
    whole, took = straight(folder, 1)
    run, moments = fresh(folder / "run"), random.Random(1)
    committed, seen = 0, 0
    for _ in range(count):
        lives = Lives(1, folder, lambda: life(folder, run))
        time.sleep(moments.uniform(0.1, 0.9) * took)
        os.kill(lives.pids[0], signal.SIGKILL)
        (status,) = lives.ended()
        assert status in (0, -signal.SIGKILL)
        begun = starts(run)
        assert begun[seen:] in ([], [committed]), "it goes on from what was committed last"
        seen = len(begun)
        assert newest(run) >= committed, "a committed step is lost"
        committed = newest(run)
        if committed == STEPS and status == 0:
            same(run, whole)
            shutil.rmtree(run)
            fresh(run)
            committed, seen = 0, 0
    assert Lives(1, folder, lambda: life(folder, run)).ended() == [0]
    same(run, whole)


@sizes(3, 100)
def test_signals_at_any_moment_save_the_step_they_meet(folder, count) -> None:
    """To one process or all of them: in a step, in a picture, in a save, while they wait for each other."""
    whole, took = straight(folder, 2, pictures=8)
    run, moments, saved = fresh(folder / "run"), random.Random(2), 0
    for _ in range(count):
        lives = Lives(2, folder, lambda: life(folder, run, pictures=8))
        deadline = time.monotonic() + PATIENCE
        while not all((run / f"ready-{number}").exists() for number in range(2)):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.5) * took)
        number = moments.choice(Signals.ASKING)
        for pid in moments.choice([lives.pids, lives.pids[:1], lives.pids[1:]]):
            os.kill(pid, number)
        ends = lives.ended()
        for mark in run.glob("ready-*"):
            mark.unlink()
        if newest(run) == STEPS:  # the signal came when all was done
            assert set(ends) <= {0, Signals.STATUS, -number}
            same(run, whole)
            shutil.rmtree(run)
            fresh(run)
            continue
        assert ends == 2 * [Signals.STATUS]
        assert read(run / "log.jsonl")[-1]["step"] == newest(run) - 1
        saved += 1
    assert saved > 0
    assert Lives(2, folder, lambda: life(folder, run, pictures=8)).ended() == [0, 0]
    same(run, whole)


def spoilt(folder: Path, run: Path, kind: str, step: int, whose: int, bad: float) -> int:
    """A life in which something is not finite at a step in one process."""
    made = trainer(folder, run)
    spoil(made, kind, step, whose, bad)
    return 0 if made.train() else Signals.STATUS


@sizes(3, 50)
def test_what_is_not_finite_is_met_alike_and_never_saved(folder, count) -> None:
    moments = random.Random(3)
    for number in range(count):
        run = fresh(folder / str(number))
        kind, bad = moments.choice(["loss", "gradient", "optimizer"]), moments.choice([math.nan, math.inf])
        step, whose = moments.randrange(1, STEPS), moments.randrange(2)
        ends = Lives(2, folder, lambda: spoilt(folder, run, kind, step, whose, bad)).ended()  # noqa: B023
        kept = checkpoint.steps(run)
        for path in kept:
            saved = checkpoint.load(path)
            assert all(
                t.isfinite().all() for file in ("model", "optimizer", "ema") for t in saved.tensors(file).values()
            )
        rows = read(run / "log.jsonl")
        spoilt_steps = [row["step"] for row in rows if row["loss"] is None or row["grad_norm"] is None]
        if kind == "optimizer" and whose == 0:  # which shows when its weights have met the data, or are to be saved
            assert ends == [2, 2]
            assert newest(run) == step // 3 * 3
        elif kind == "optimizer":  # what the first process saves is whole
            assert ends == (2 * [2] if step < STEPS - 2 else 2 * [0])
            assert newest(run) <= step + 2
        else:
            assert ends == [0, 0]
            assert spoilt_steps == [step]
            assert newest(run) == STEPS


MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "accumulate": ({"batch": 8}, {"accumulate": 4}),
    "bf16": ({"precision": "bf16"}, {}),
    "compile": ({}, {"compile": True}),
    "workers": ({"augment": "flip"}, {"workers": 2}),
    "within epochs": ({"batch": 7}, {}),
    "at ends of epochs": ({"batch": 12}, {}),
    "beside pictures": ({"timestep_sampler": "second_moment"}, {"grid_every": 1}),
}


@pytest.mark.parametrize("mode", [*(pytest.param(m, marks=pytest.mark.slow) for m in MODES)])
def test_resuming_at_any_step_is_bit_equal(folder, mode) -> None:
    more, how = MODES[mode]
    settings = {"model": str(folder / "tiny.json"), "batch": 6, "train_steps": 21, "save_every": 1, **more}

    def make(name: str, resume: bool = False) -> Trainer:
        operation = Operation(keep=30, **how)
        return Trainer(TrainConfig(**settings), images(), folder / name, resume=resume, operation=operation)

    make("whole").train()
    wanted = checkpoint.load(folder / "whole").files
    losses = [row["loss"] for row in read(folder / "whole" / "log.jsonl")]
    for step in range(1, 21):
        run = folder / f"from-{step}"
        kept = run / "checkpoints" / f"step-{step:08d}"
        shutil.copytree(folder / "whole" / "checkpoints" / kept.name, kept)
        shutil.copy(folder / "whole" / "log.jsonl", run)
        with torch.random.fork_rng():
            torch.manual_seed(step)  # which must not matter
            make(run.name, resume=True).train()
        assert checkpoint.load(run).files == wanted
        assert [row["loss"] for row in read(run / "log.jsonl")] == losses
        shutil.rmtree(run)
