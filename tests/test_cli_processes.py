"""Training and sampling on several processes from the command line: one run, one message, one status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from train_tools import write_model

from fastdiff.cli import main
from fastdiff.training import checkpoint


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    model = write_model(folder, num_classes=10)
    options = ("--model", model, "--batch", 5, "--train-steps", 3, "--ema", "0.9,power:0.1", "--grid-every", 3)
    assert run("train", "--data", "digits", "--out", folder / "run", *options, "--processes", 2, "--accumulate", 2) == 0
    return folder / "run"


def test_two_processes_leave_one_run(trained) -> None:
    assert checkpoint.load(trained).step == 3
    assert len((trained / "log.jsonl").read_text().splitlines()) == 3
    names = {path.name for path in trained.iterdir()}
    assert names == {"checkpoints", "config.json", "log.jsonl", "loss.png", "pictures"}


@pytest.mark.parametrize("count", [7, 1])
def test_two_processes_draw_the_samples_of_one(trained, tmp_path, count) -> None:
    options = ("--checkpoint", trained, "--count", count, "--steps", 3, "--seed", 4, "--ema", "power:0.1")
    for processes in (1, 2):
        assert run("sample", *options, "--processes", processes, "--out", tmp_path / str(processes)) == 0
    one, two = (np.load(tmp_path / name / "samples.npz") for name in ("1", "2"))
    assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1  # rounding may depend on the batch
    assert np.array_equal(one["arr_1"], two["arr_1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--batch", 1), "2 processes cannot share a batch of 1"),
        (("train", "--learning-rate", -1), "learning_rate must be positive"),
        (("train", "--data", "folder:nowhere"), "nowhere does not exist"),
        (("sample", "--checkpoint", "nowhere"), "checkpoint nowhere does not exist"),
    ],
)
def test_bad_input_is_one_line_of_one_process(tmp_path, arguments, message) -> None:
    line = [sys.executable, "-m", "fastdiff", *map(str, arguments), "--processes", "2", "--out", str(tmp_path / "out")]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2
    assert [text for text in done.stderr.splitlines() if text.startswith("fastdiff:")] == done.stderr.splitlines()
    assert done.stderr.count(message) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "value"), [("--resume", "maybe"), ("--processes", 0), ("--parallel", "horovod")])
def test_options_are_checked(tmp_path, capsys, option, value) -> None:
    assert run("train", "--out", tmp_path / "out", option, value) == 2
    assert str(value) in capsys.readouterr().err


def test_corrupt_images_end_training_or_are_replaced_and_named(tmp_path, capsys) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(6):
        Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).save(images / f"{i}.png")
    for i in (0, 3):
        (images / f"{i}.png").write_bytes(b"no image")
    model = write_model(tmp_path, num_classes=None)
    common = ("train", "--data", f"folder:{images}", "--model", model, "--batch", 6, "--train-steps", 2)
    assert run(*common, "--out", tmp_path / "fail") == 2
    assert "0.png cannot be read" in capsys.readouterr().err
    for workers in (0, 1):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            assert run(*common, "--corrupt", "skip", "--out", tmp_path / f"skip-{workers}", "--workers", workers) == 0
        warned = capsys.readouterr().err
        assert [warned.count(f"{i}.png cannot be read: the next") for i in range(6)] == [1, 0, 0, 1, 0, 0]
    first, second = (checkpoint.load(tmp_path / f"skip-{workers}").files for workers in (0, 1))
    assert first == second


def test_resume_may_stand_alone_or_wait_for_a_run(tmp_path, capsys) -> None:
    common = ("train", "--data", "parabola", "--batch", 4, "--decay", "constant", "--out", tmp_path / "run")
    assert run(*common, "--train-steps", 1, "--resume") == 2
    assert "run does not exist" in capsys.readouterr().err
    for steps in (1, 2):
        assert run(*common, "--train-steps", steps, "--resume", "auto") == 0
    assert run(*common, "--resume", "--train-steps", 3) == 0
    assert run(*common, "--train-steps", 3) == 2
    assert "already holds a run: continue it with --resume" in capsys.readouterr().err
    assert checkpoint.load(tmp_path / "run").step == 3


def test_sigterm_saves_and_ends_with_143(tmp_path) -> None:
    model = write_model(tmp_path, num_classes=10)
    options = ["train", "--data", "digits", "--model", model, "--batch", "8", "--train-steps", "100000"]
    line = [sys.executable, "-m", "fastdiff", *options, "--out", str(tmp_path / "run")]
    with subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as job:
        log, deadline = tmp_path / "run" / "log.jsonl", time.monotonic() + 90
        while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(job.pid, signal.SIGTERM)
        output, errors = job.communicate(timeout=60)
    assert job.returncode == 143, errors
    step = checkpoint.load(tmp_path / "run").step
    assert f"asked to end, saved to step {step}" in output
    assert len(log.read_text().splitlines()) == step
