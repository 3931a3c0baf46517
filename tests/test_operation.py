"""A run in operation: what is not finite, signals, checkpoints written beside training, logs, pictures."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from train_tools import cloud, images, on, spoil, write_model

from fastdiff import InputError, _io
from fastdiff.training import checkpoint, saving
from fastdiff.training.config import Operation, TrainConfig
from fastdiff.training.distributed import rank
from fastdiff.training.log import Log, read
from fastdiff.training.posthoc import reconstruct, snapshots
from fastdiff.training.run import load_run
from fastdiff.training.saving import Saver, Signals
from fastdiff.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def injected(argument: tuple[dict[str, Any], Path, str, int, int, float]) -> tuple[list[bool], bool]:
    """Train with one bad value at a step, in one process: which steps changed nothing, and whether all is finite."""
    settings, run, kind, step, whose, bad = argument
    torch.set_num_threads(1)
    trainer = Trainer(TrainConfig(**settings), images(), run)
    spoil(trainer, kind, step, whose, bad)
    rows = [math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in trainer.steps()]
    tensors = [*trainer.model.state_dict().values(), *trainer.averages["0.999"].tensors.values()]
    return rows, all(bool(tensor.isfinite().all()) for tensor in tensors)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing_anywhere(tmp_path, kind, bad, processes) -> None:
    settings = {"model": write_model(tmp_path), "batch": 6, "train_steps": 4}
    argument = (settings, tmp_path / "run", kind, 1, processes - 1, bad)
    rows, finite = on(processes, injected, argument)
    assert rows == [True, False, True, True]
    assert finite
    logged = read(tmp_path / "run" / "log.jsonl")
    assert [row["step"] for row in logged] == [0, 1, 2, 3]
    assert logged[1]["loss"] is None or logged[1]["grad_norm"] is None


def test_patience_ends_and_the_last_good_checkpoint_is_named(tmp_path) -> None:
    config = TrainConfig(train_steps=20, batch=4, save_every=5)
    trainer = Trainer(config, cloud(), tmp_path, operation=Operation(patience=3))
    original = trainer.train_step

    def step(i: int, *args: Any, **how: Any) -> dict[str, Any]:
        if i == 12:
            with torch.no_grad():
                trainer.model.out.bias.fill_(math.nan)
        return original(i, *args, **how)

    trainer.train_step = step  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"the loss is nan at training step 14, the last of 3 .*step-00000010"):
        trainer.train()
    assert checkpoint.load(tmp_path).step == 10


def test_what_is_not_finite_is_never_saved(tmp_path) -> None:
    with Saver(tmp_path, keep=1, background=False, sharded=False) as saver:
        saver.save(1, {"model": {"w": torch.ones(3)}}, {})
        with pytest.raises(InputError, match=r"optimizer m holds NaN .* step 2, which is not saved; .*step-00000001"):
            saver.save(2, {"model": {"w": torch.ones(3)}, "optimizer": {"m": torch.tensor([1.0, math.inf])}}, {})
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-00000001"]


# ---- checkpoints beside training ---------------------------------------------------------------


def test_a_checkpoint_holds_what_was_there_when_it_was_asked_for(tmp_path, monkeypatch) -> None:
    slow, original = threading.Event(), checkpoint.save

    def save(*args: Any, **how: Any) -> Path:
        assert slow.wait(10)
        return original(*args, **how)

    monkeypatch.setattr(saving.checkpoint, "save", save)
    w = torch.arange(6.0).view(2, 3)
    with Saver(tmp_path, keep=2, background=True, sharded=False) as saver:
        for step in range(1, 101):
            began = time.perf_counter()
            slow.clear()
            expected = w.clone()
            saver.save(step, {"model": {"w": w}}, {})
            assert time.perf_counter() - began < 5
            w.add_(1).mul_(-2)
            slow.set()
            saver.wait()
            assert torch.equal(checkpoint.load(tmp_path).tensors("model")["w"], expected)


def test_the_next_one_waits_for_the_one_before(tmp_path, monkeypatch) -> None:
    order: list[str] = []
    original = checkpoint.save

    def save(run: Path, step: int, *args: Any, **how: Any) -> Path:
        order.append(f"begin {step}")
        time.sleep(0.1)
        made = original(run, step, *args, **how)
        order.append(f"end {step}")
        return made

    monkeypatch.setattr(saving.checkpoint, "save", save)
    with Saver(tmp_path, keep=2, background=True, sharded=False) as saver:
        for step in (1, 2, 3):
            saver.save(step, {"model": {"w": torch.ones(2)}}, {})
    assert order == [f"{what} {step}" for step in (1, 2, 3) for what in ("begin", "end")]


@pytest.mark.parametrize("ask", ["look", "save", "wait", "exit"])
def test_an_error_of_the_writer_is_not_lost(tmp_path, monkeypatch, ask) -> None:
    def save(*args: Any, **how: Any) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving.checkpoint, "save", save)
    tensors = {"model": {"w": torch.ones(2)}}

    def use() -> None:
        with Saver(tmp_path, keep=2, background=True, sharded=False) as saver:
            saver.save(1, tensors, {})
            while saver.writing:
                time.sleep(0.01)
            asks = {"look": saver.look, "wait": saver.wait, "save": lambda: saver.save(2, tensors, {})}
            asks.get(ask, lambda: None)()

    with pytest.raises(OSError, match="No space left"):
        use()


# ---- signals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_its_step_and_the_run_goes_on_from_there(tmp_path, number) -> None:
    config = TrainConfig(model=write_model(tmp_path), train_steps=8, batch=4, save_every=100)
    whole = Trainer(config, images(), tmp_path / "whole")
    assert whole.train()
    cut = Trainer(config, images(), tmp_path / "cut")
    original = cut.train_step

    def step(i: int, *args: Any, **how: Any) -> dict[str, Any]:
        if i == 4:
            os.kill(os.getpid(), number)
        return original(i, *args, **how)

    cut.train_step = step  # type: ignore[method-assign]
    handler = signal.getsignal(number)
    assert not cut.train()
    assert signal.getsignal(number) is handler
    assert checkpoint.load(tmp_path / "cut").step in (5, 6)
    assert Trainer(config, images(), tmp_path / "cut", resume="auto").train()
    assert checkpoint.load(tmp_path / "cut").files == checkpoint.load(tmp_path / "whole").files


def stopped(argument: tuple[dict[str, Any], Path, int]) -> tuple[bool, int]:
    settings, run, whose = argument
    torch.set_num_threads(1)
    trainer = Trainer(TrainConfig(**settings), images(), run)
    original = trainer.train_step

    def step(i: int, batch: Any, *, stop: bool) -> dict[str, Any]:
        return original(i, batch, stop=stop or (i == 2 and rank() == whose))

    trainer.train_step = step  # type: ignore[method-assign]
    return trainer.train(), trainer.step


@pytest.mark.parametrize("whose", [0, 1])
def test_a_signal_to_one_process_ends_all_at_one_step(tmp_path, whose) -> None:
    settings = {"model": write_model(tmp_path), "batch": 4, "train_steps": 9}
    assert on(2, stopped, (settings, tmp_path / "run", whose)) == (False, 3)
    assert checkpoint.load(tmp_path / "run").step == 3


def test_signals_are_left_alone_in_other_threads() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def work() -> None:
        with Signals():
            pass

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before


# ---- logs and pictures ---------------------------------------------------------------------------


def test_a_log_says_what_there_is_to_know(tmp_path) -> None:
    config = TrainConfig(model=write_model(tmp_path), train_steps=3, batch=4)
    Trainer(config, images(), tmp_path / "run").train()
    rows = read(tmp_path / "run" / "log.jsonl")
    names = {"step", "loss", "grad_norm", "learning_rate", "images_per_s", "data_wait", "memory"}
    assert [set(row) for row in rows] == [names, names, names | {"loss_by_timestep"}]
    assert all(row["images_per_s"] > 0 and 0 <= row["data_wait"] < 1 and row["memory"] > 1e7 for row in rows)


def test_a_log_loses_what_is_trained_again_and_an_unfinished_line(tmp_path) -> None:
    lines = [json.dumps({"step": i, "loss": i / 2}) for i in range(6)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 6, "lo')
    with Log(tmp_path, 4, tensorboard=False) as log:
        log.add({"step": 4, "loss": math.nan, "table": [1.0, math.inf]})
    rows = read(tmp_path / "log.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[-1] == {"step": 4, "loss": None, "table": [1.0, None]}


def test_tensorboard_is_given_the_same_numbers(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = TrainConfig(train_steps=4, batch=4, decay="constant")
    Trainer(config, cloud(), tmp_path, operation=Operation(tensorboard=True)).train()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = [event.value for event in events.Scalars("loss")]
    assert shown == pytest.approx([row["loss"] for row in read(tmp_path / "log.jsonl")])
    assert {"grad_norm", "images_per_s", "data_wait", "memory", "loss_by_timestep/0"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("kind", ["images", "points"])
def test_pictures_of_samples_are_drawn_on_the_way(tmp_path, kind) -> None:
    from PIL import Image

    model = write_model(tmp_path) if kind == "images" else "auto"
    data = images() if kind == "images" else cloud()
    config = TrainConfig(model=model, train_steps=5, batch=4)
    trainer = Trainer(config, data, tmp_path / "run", operation=Operation(grid_every=2))
    before = torch.get_rng_state()
    trainer.train()
    assert torch.equal(before, torch.get_rng_state())
    paths = sorted((tmp_path / "run" / "pictures").iterdir())
    assert [path.name for path in paths] == [f"step-{step:08d}.png" for step in (2, 4, 5)]
    sizes = set()
    for path in paths:
        with Image.open(path) as image:
            sizes.add(image.size)
    assert sizes == ({(530, 530)} if kind == "images" else {(128, 128)})
    assert len({path.read_bytes() for path in paths}) == 3


# ---- averages ------------------------------------------------------------------------------------


def test_a_run_is_loaded_with_any_of_its_averages(tmp_path) -> None:
    config = TrainConfig(train_steps=6, batch=4, decay="constant", ema="0.9,power:0.1,power:0.2", save_every=3)
    trainer = Trainer(config, cloud(), tmp_path, operation=Operation(snapshot_every=1))
    trainer.train()
    for name, average in trainer.averages.items():
        loaded = load_run(tmp_path, ema=name.replace("-", ":")).model.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in average.tensors.items())
    direct = reconstruct(snapshots(tmp_path), 0.15)
    between = load_run(tmp_path, ema="power:0.15").model.state_dict()
    assert all(torch.equal(between[key], value) for key, value in direct.items())
    first = load_run(tmp_path).model.state_dict()
    assert all(torch.equal(first[key], value) for key, value in trainer.averages["0.9"].tensors.items())
    with pytest.raises(InputError, match=r"holds no average 0.99, but 0.9, power-0.1, power-0.2"):
        load_run(tmp_path, ema="0.99")


def test_going_on_from_an_older_checkpoint_forgets_later_snapshots(tmp_path) -> None:
    config = TrainConfig(train_steps=6, batch=4, ema="power:0.1", save_every=3)
    Trainer(config, cloud(), tmp_path, operation=Operation(snapshot_every=2)).train()
    _io.remove_tree(checkpoint.steps(tmp_path)[0])
    Trainer(config, cloud(), tmp_path, resume=True)
    assert [each.profile.time for each in snapshots(tmp_path)] == [2]


def test_snapshots_need_an_average_that_they_are_of(tmp_path) -> None:
    with pytest.raises(InputError, match=r"snapshots are of power-function averages, .* --ema 0.999,power:0.05"):
        Trainer(TrainConfig(), cloud(), tmp_path, operation=Operation(snapshot_every=2))
    assert not list(tmp_path.iterdir())
