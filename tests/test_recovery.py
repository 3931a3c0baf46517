"""Runs under torchrun that lose processes: killed, hanging or asked to end, they go on as if nothing had been."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from train_tools import write_model

from fastdiff.training import checkpoint
from fastdiff.training.log import read

STEPS, EVERY = 40, 4


def command(run: Path, model: str, *options: str) -> list[str]:
    train = ["train", "--data", "digits", "--model", model, "--out", str(run), "--batch", "6", "--warmup", "2"]
    lengths = ["--train-steps", str(STEPS), "--save-every", str(EVERY), "--resume", "auto"]
    return ["-m", "fastdiff", *train, *lengths, *options]


@contextmanager
def torchrun(processes: int, arguments: list[str], restarts: int = 3) -> Iterator[subprocess.Popen[str]]:
    """A job of its own process group, of which nothing is left afterwards."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    line = [sys.executable, *start, f"--max-restarts={restarts}", "--monitor-interval=0.2", *arguments]
    with subprocess.Popen(line, env=settings, **how) as job:  # type: ignore[call-overload]
        try:
            yield job
        finally:
            for pid in [job.pid, *below(job.pid)]:
                send(pid, signal.SIGKILL)


def below(pid: int) -> list[int]:
    """Its child processes, and theirs."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [each for child in children for each in (child, *below(child))]


def ranks(job: subprocess.Popen[str]) -> list[int]:
    """The training processes of a job."""
    return [pid for pid in below(job.pid) if b"fastdiff" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def wait_for(condition: Callable[[], bool], job: subprocess.Popen[str], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None, job.stdout and job.stdout.read()
        assert time.monotonic() < deadline, "nothing has happened"
        time.sleep(0.02)


def newest(run: Path) -> int:
    return int(kept[0].name.removeprefix("step-")) if (kept := checkpoint.steps(run)) else 0


def finished(job: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str]:
    output, _ = job.communicate(timeout=seconds)
    return job.returncode, output


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The model's file, and the run of two processes that nothing has happened to."""
    folder = tmp_path_factory.mktemp("whole")
    model = write_model(folder, num_classes=10)
    with torchrun(2, command(folder / "run", model)) as job:
        status, output = finished(job)
    assert status == 0, output
    return model, folder / "run"


def same(run: Path, whole: Path) -> None:
    assert checkpoint.load(run).files == checkpoint.load(whole).files
    losses = [[(row["step"], row["loss"]) for row in read(each / "log.jsonl")] for each in (run, whole)]
    assert losses[0] == losses[1]
    assert not list((run / "checkpoints").glob(".unfinished-*"))


@pytest.mark.parametrize("whose", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_process_costs_nothing_that_was_committed(whole, tmp_path, whose) -> None:
    model, straight = whole
    with torchrun(2, command(tmp_path, model)) as job:
        wait_for(lambda: newest(tmp_path) >= 2 * EVERY and len(ranks(job)) >= 2, job)
        before = newest(tmp_path)
        send(ranks(job)[whose], signal.SIGKILL)
        status, output = finished(job)
    assert status == 0, output
    reached = [int(number) for number in re.findall(rf"training: (\d+)/{STEPS}", output)]
    assert reached[-1] == STEPS
    assert all(reached.count(number) == 1 for number in reached if number <= before)  # not trained again
    same(tmp_path, straight)


@pytest.mark.slow
def test_many_kills_at_random_times(whole, tmp_path) -> None:
    model, straight = whole
    random.seed(3)
    with torchrun(2, command(tmp_path, model), restarts=50) as job:
        for _ in range(30):
            wait_for(lambda: len(ranks(job)) >= 2 or job.poll() is not None, job)
            time.sleep(random.uniform(0, 8))
            if job.poll() is None and (alive := ranks(job)):
                send(random.choice(alive), signal.SIGKILL)
        status, output = finished(job, 400)
    assert status == 0, output
    same(tmp_path, straight)


@pytest.mark.slow
def test_a_process_that_hangs_is_noticed(whole, tmp_path) -> None:
    model, straight = whole
    with torchrun(2, command(tmp_path, model, "--timeout", "10")) as job:
        wait_for(lambda: newest(tmp_path) >= EVERY, job)
        began = time.monotonic()
        hanging = ranks(job)[1]
        send(hanging, signal.SIGSTOP)
        wait_for(lambda: len(ranks(job)) >= 2 and hanging not in ranks(job), job, 90)
        assert time.monotonic() - began < 90
        status, output = finished(job, 200)
    assert status == 0, output
    same(tmp_path, straight)


@pytest.mark.slow
def test_restarts_come_to_an_end(whole, tmp_path) -> None:
    model, _ = whole
    with torchrun(2, command(tmp_path, model), restarts=1) as job:
        for _ in range(2):
            wait_for(lambda: len(ranks(job)) >= 2 and newest(tmp_path) >= EVERY, job)
            send(ranks(job)[0], signal.SIGKILL)
            time.sleep(2)
        status, _ = finished(job, 60)
    assert status != 0
    assert checkpoint.load(tmp_path).step >= EVERY


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["all", "first", "other"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_the_step_it_meets(whole, tmp_path, whose, number) -> None:
    model, straight = whole
    with torchrun(2, command(tmp_path, model, "--save-every", "1000"), restarts=0) as job:
        wait_for(lambda: (tmp_path / "config.json").exists(), job)  # before that there is nothing to save
        time.sleep(0.5)
        reached = ranks(job)
        for pid in {"all": reached, "first": reached[:1], "other": reached[1:]}[whose]:
            send(pid, number)
        status, output = finished(job)
    assert status != 0
    assert "asked to end, saved to step" in output
    assert read(tmp_path / "log.jsonl")[-1]["step"] == newest(tmp_path) - 1 < STEPS - 1
    with torchrun(2, command(tmp_path, model, "--save-every", "1000")) as job:
        status, output = finished(job)
    assert status == 0, output
    files, wanted = checkpoint.load(tmp_path).files, checkpoint.load(straight).files
    assert all(files[name] == wanted[name] for name in files if name != "config.json")
