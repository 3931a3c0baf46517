"""Training, on one process or many. Everything random is keyed by (seed, step, place in the batch), so that resuming
is continuing, and any number of processes sees the same samples, timesteps and noise.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import _io, graph
from fastdiff._progress import progress
from fastdiff.errors import InputError, check
from fastdiff.metrics.evaluation import share
from fastdiff.training import checkpoint, log, posthoc
from fastdiff.training.config import Operation, TrainConfig
from fastdiff.training.data import Data
from fastdiff.training.distributed import Group
from fastdiff.training.ema import averages, files_of
from fastdiff.training.loader import Batch, Loader
from fastdiff.training.objective import Objective
from fastdiff.training.order import Order
from fastdiff.training.parallel import Parallel, is_split, part_of, split_like
from fastdiff.training.picture import draw
from fastdiff.training.presets import build_model, model_config
from fastdiff.training.process import LEARNED, attach_schedule
from fastdiff.training.saving import Saver, Signals, Tensors, last_checkpoint
from fastdiff.training.step import Captured, Inputs, Step

#: settings that a classifier has no use for
OF_DENOISERS = ("prediction", "variance", "loss", "label_dropout", "timestep_sampler")
OPERATION = Operation()
QUIET = Signals()  # which nobody sends
TABLE_EVERY = 100  # steps between tables of the loss by timestep


class Trainer:
    """Trains a model into a run directory: ``config.json``, ``log.jsonl``, ``checkpoints/``.

    Every process of ``torch.distributed`` makes one, and takes its share of each batch.

    Args:
        config: the run.
        data: what to train on.
        run: the directory; a new one, or with ``resume`` one that holds a checkpoint of the same configuration.
        device: where to train.
        resume: continue from the newest whole checkpoint; ``auto``: if there is one. Bit-equal to never having
            stopped, on the CPU and with as many processes.
        operation: how.

    Raises:
        InputError: a directory that is in use, nothing to resume, or another configuration (what differs is named).
    """

    def __init__(
        self,
        config: TrainConfig,
        data: Data,
        run: Path,
        *,
        device: torch.device | str = "cpu",
        resume: bool | str = False,
        operation: Operation = OPERATION,
    ) -> None:
        self.config, self.data, self.run, self.device = config, data, run, torch.device(device)
        self.operation, self.group = operation, Group.of_all()
        _check_operation(config, operation, self.group.world, self.device)
        self.positions = share(config.batch, self.group.rank, self.group.world)
        self.diffusion = config.diffusion()
        self.description = _description(config, data)
        saved = self.group.together(lambda: self._saved(resume))
        with torch.random.fork_rng([]):
            torch.manual_seed(config.seed)
            self.model = build_model(self.description["model"]).to(self.device)
        attach_schedule(self.model, self.description["diffusion"]["schedule"])
        if saved:
            saved.load_into(self.model, "model")
        else:
            self.group.together(self._try_model)
        self.parallel = Parallel(self.model, operation.parallel, compiled=operation.compile)
        self.objective = Objective(config, self.model, self.parallel.network, self.diffusion, data)
        self.averages = averages(self.model, config.ema)
        self.optimizer = _adamw(config, self.model)
        each = self.objective, self.parallel, self.optimizer, self.averages.values()
        step = Step(config, *each, parts=operation.accumulate)
        self._run = Captured(step) if operation.graph else step
        self.step = 0 if saved is None else saved.step
        if saved:
            self._load(saved)
            self.group.together(lambda: posthoc.forget(run, saved.step) if self.group.is_first else None)
        elif self.group.is_first:
            _io.replace_json(run / "config.json", self.description)
        board = operation.tensorboard
        self.log = log.Log(run, self.step, tensorboard=board) if self.group.is_first else log.Nothing()
        self._failed = 0  # steps in a row

    def train(self) -> bool:
        """Train to the end, with checkpoints on the way.

        Returns:
            Whether the end was reached: False after SIGTERM or SIGUSR1, when the step they met has been saved.

        Raises:
            InputError: ``patience`` steps in a row had a loss or a gradient that is not finite; none of them has
                changed anything. What the data, or saving, have to say.
        """
        config, operation = self.config, self.operation
        how: dict[str, Any] = {"keep": operation.keep, "background": operation.background}
        how |= {"sharded": self.parallel.sharded, "timeout": timedelta(seconds=operation.timeout)}
        shown: dict[str, Any] = {"start": self.step, "enabled": self.group.is_first}
        with Signals() as signals, Saver(self.run, **how) as saver, closing(self.steps(signals)) as steps:
            for row in progress(steps, config.train_steps, "training", **shown):
                saver.look()
                if row["stop"] or self._due(config.save_every):
                    self.log.flush()
                    saver.save(self.step, self.state(), {"config": self.description})
                if row["stop"]:
                    return False
        return True

    def steps(self, signals: Signals = QUIET) -> Generator[dict[str, Any], None, None]:
        """One optimiser step after another, without saving; gives what is logged of each, and whether to ``stop``."""
        self.model.train()
        batches = self._loader().batches(self.step, self.config.train_steps)
        with closing(batches), self.log:
            while self.step < self.config.train_steps:
                began = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - began
                row = self.train_step(self.step, batch, stop=signals.received)
                took = time.perf_counter() - began
                row |= {"images_per_s": self.config.batch / took, "data_wait": waited / took}
                self.step += 1
                self._note(row, batch)
                yield row

    def _note(self, row: dict[str, Any], batch: Batch) -> None:
        """What is written down of a step that is done."""
        row["memory"] = log.memory(self.device)
        if self._due(TABLE_EVERY):
            row |= self.objective.by_timestep()
        self.log.add({"step": self.step - 1, **{name: value for name, value in row.items() if name != "stop"}})
        for name in batch.skipped:
            warnings.warn(f"{name} cannot be read: the next image is taken in its place", stacklevel=3)
        self._failed = 0 if _is_finite(row) else self._failed + 1
        if self._failed == self.operation.patience:
            where = f"training step {self.step - 1}, the last of {self._failed} in a row that changed nothing"
            raise InputError(f"{_what(row)} at {where}: training stopped, {last_checkpoint(self.run)}")
        if self._due(self.operation.grid_every):
            draw(self)
        if self._due(self.operation.snapshot_every):
            posthoc.snapshot(self.run, self.step, self.averages, group=self.group)

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.config.train_steps)

    def train_step(self, step: int, batch: Batch, *, stop: bool = False) -> dict[str, Any]:
        """One optimiser step with this process's share of a batch; returns what is logged of it, of all processes.

        The decision whether its loss and gradient are finite, and the weights change, is the same in all of them.

        Args:
            stop: whether this process is asked to stop; the row says whether any is.
        """
        outcome = self._run(self._inputs(step, batch, stop))
        *found, stops, grad_norm = outcome.totals.tolist()
        row = {name: total / self.config.batch for name, total in zip(outcome.found.values, found, strict=True)}
        row |= {"grad_norm": grad_norm, "learning_rate": self.config.learning_rate_at(step)}
        if _is_finite(row):
            self.objective.learn(outcome.found)
        return {**row, "stop": stops > 0}

    def _inputs(self, step: int, batch: Batch, stop: bool) -> Inputs:
        """On the device, which is not waited for."""

        def number(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((), value, dtype=dtype, device=self.device)

        return Inputs(
            x=self.data.scale(batch.x.to(self.device, non_blocking=True)),
            y=None if batch.y is None else batch.y.to(self.device, non_blocking=True),
            places=torch.arange(self.positions.start, self.positions.stop),
            step=step,
            rate=number(self.config.learning_rate_at(step), torch.float32),
            shares=tuple(number(average.share(step), torch.float64) for average in self.averages.values()),
            stop=number(stop, torch.bool),
            allowed=number(True, torch.bool),
        )

    def losses(self) -> list[float]:
        """The loss of every step so far that is on disk."""
        return [row["loss"] for row in log.read(self.run / log.NAME) if row["loss"] is not None]

    @torch.no_grad()
    def _try_model(self) -> None:
        """Evaluate the loss of a blank sample, so that a model that does not fit ends before anything is written."""
        x, first = torch.zeros(1, *self.data.shape, device=self.device), torch.zeros(1, dtype=torch.int64)
        y = None if self.data.source.y is None else first.to(self.device)
        self.model.eval()
        trial = Objective(self.config, self.model, self.model, self.diffusion, self.data)
        trial(x, y, first, 0)

    def _loader(self) -> Loader:
        config, groups = self.config, self.data.source.groups
        how: dict[str, Any] = {"augment": config.augment, "corrupt": config.corrupt, "workers": self.operation.workers}
        order = Order(len(self.data), config.seed, groups)
        where: dict[str, Any] = {"batch": config.batch, "positions": self.positions, "seed": config.seed}
        return Loader(self.data, order, **where, **how, pin=self.device.type == "cuda")

    # ---- checkpoints ------------------------------------------------------------------------

    def state(self) -> Tensors:
        """What a checkpoint holds, by file and name; of tensors that are split, this process's parts."""
        first = self.group.is_first
        if not (first or self.parallel.sharded):
            return {}
        optimizer = self.optimizer.state_dict()["state"]
        named = {f"{i}.{name}": value for i, values in optimizer.items() for name, value in values.items()}
        files = {"model": self.model.state_dict(), "optimizer": named, "timesteps": self.objective.timesteps.state()}
        files |= {file: self.averages[name].tensors for name, file in files_of(self.config.ema).items()}
        return {
            file: {name: part_of(value) for name, value in tensors.items() if first or is_split(value)}
            for file, tensors in files.items()
            if tensors
        }

    def _saved(self, resume: bool | str) -> checkpoint.Checkpoint | None:
        """The checkpoint to go on from."""
        kept = checkpoint.steps(self.run)
        if not resume or (resume == "auto" and not kept):
            check(not kept, f"{self.run} already holds a run: continue it with --resume or choose another --out")
            return None
        saved = checkpoint.load(self.run)
        _check_same_run(saved.json("config"), self.description)
        end = self.config.train_steps
        check(saved.step <= end, f"{self.run} is at step {saved.step}, past train_steps {end}")
        return saved

    def _load(self, saved: checkpoint.Checkpoint) -> None:
        """All but the model's weights, which were loaded before they were split."""
        for name, file in files_of(self.config.ema).items():
            self.averages[name].load(saved.tensors(file))
        state: dict[int, dict[str, Tensor]] = {}
        parameters = list(self.model.parameters())
        for name, tensor in saved.tensors("optimizer").items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = split_like(parameters[int(index)], tensor)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        if self.objective.timesteps.state():
            self.objective.timesteps.load(saved.tensors("timesteps"))


def _adamw(config: TrainConfig, model: nn.Module) -> torch.optim.AdamW:
    """With a rate on the device, where a step reads it."""
    parameters = list(model.parameters())
    device = parameters[0].device
    rate = torch.zeros((), dtype=torch.float32, device=device)
    capturable = device.type == "cuda"
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=config.weight_decay, fused=True, capturable=capturable)


def _is_finite(row: dict[str, Any]) -> bool:
    return math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])


def _what(row: dict[str, Any]) -> str:
    return f"the loss is {row['loss']}" if not math.isfinite(row["loss"]) else f"the gradient is {row['grad_norm']}"


def _description(config: TrainConfig, data: Data) -> dict[str, Any]:
    """What config.json says of a run."""
    model = model_config(config.model, data, learned_variance=config.variance == "learned_range")
    if model.get("type") == "classifier":
        _check_classifier(config)
    schedule = config.schedule_settings()
    process = {"schedule": schedule, "prediction": config.prediction, "variance": config.variance}
    return {"data": data.to_json(), "model": model, "diffusion": process, "training": asdict(config)}


def _check_operation(config: TrainConfig, operation: Operation, world: int, device: torch.device) -> None:
    powers = "power:" in config.ema or not operation.snapshot_every
    check(powers, f"snapshots are of power-function averages, for instance --ema {config.ema},power:0.05")
    check(config.batch >= world, f"{world} processes cannot share a batch of {config.batch}")
    whole = config.schedule != LEARNED or operation.parallel != "fsdp" or world == 1
    check(whole, "a learned schedule is not trained with --parallel fsdp: take ddp")
    fits = world == 1 and graph.serves(device)
    check(
        fits or not operation.graph, f"--graph is for one process on a GPU, here are {world} on {device}: leave it out"
    )


def _check_classifier(config: TrainConfig) -> None:
    defaults = {field.name: field.default for field in fields(config)}
    given = [name for name in OF_DENOISERS if getattr(config, name) != defaults[name]]
    check(not given, f"{', '.join(given)}: settings of diffusion models, to be left out for a classifier")


def _check_same_run(saved: dict[str, Any], mine: dict[str, Any]) -> None:
    """Name what differs; only the length of the run and the checkpoints' rhythm may."""
    free = {"training.save_every"} | ({"training.train_steps"} if mine["training"]["decay"] == "constant" else set())
    old, new = _flatten(saved), _flatten(json.loads(_io.to_json(mine)))
    differing = sorted(key for key in (old.keys() | new.keys()) - free if old.get(key) != new.get(key))
    listed = ", ".join(f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in differing)
    check(not differing, f"the run to resume has another configuration: {listed}")


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
    return flat
