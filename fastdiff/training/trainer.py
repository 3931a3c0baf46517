"""Training in a single process. Everything random is keyed by (seed, step), so resuming is continuing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import _io, noise
from fastdiff._progress import progress
from fastdiff.diffusion import LOSSES, Diffusion
from fastdiff.errors import InputError, check, choose
from fastdiff.models import Classifier
from fastdiff.ops.row import PREDICTIONS
from fastdiff.ops.step import VARIANCES
from fastdiff.schedule import SCHEDULES, Schedule
from fastdiff.training import checkpoint, classification
from fastdiff.training.data import Data, Description
from fastdiff.training.ema import EMA
from fastdiff.training.presets import PRESETS, RECIPES, build_model, model_config, preset

FLUSH_EVERY = 100
PRECISIONS = ("fp32", "bf16")
DECAYS = ("constant", "cosine")
#: settings that a classifier has no use for
OF_DENOISERS = ("prediction", "variance", "loss", "label_dropout")
TRAINED_SCHEDULES = tuple(name for name in SCHEDULES if name != "from_betas")


def option(default: Any, meaning: str) -> Any:
    """A field with its meaning, which is also the help of the command line's option."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class TrainConfig:
    """What determines a run, down to the last bit on one machine. Each field's meaning is its help text.

    The defaults are those of ``unet-small``; :meth:`by_model` takes what suits the model.
    """

    model: str = option("auto", f"{', '.join(PRESETS)}, or a JSON file with a configuration")
    schedule: str = option("cosine", f"noise schedule: {', '.join(TRAINED_SCHEDULES)}")
    timesteps: int = option(1000, "T, the noise levels of the schedule")
    zero_terminal_snr: bool = option(False, "rescale the schedule so that its last timestep holds no signal")
    prediction: str = option("v_prediction", f"what the network predicts: {', '.join(PREDICTIONS)}")
    variance: str = option("fixed_small", f"of the reverse process: {', '.join(VARIANCES)}")
    loss: str = option("simple", f"{', '.join(LOSSES)}")
    train_steps: int = option(2000, "optimiser steps")
    batch: int = option(128, "samples in an optimiser step")
    learning_rate: float = option(2e-3, "largest rate of AdamW")
    warmup: int = option(100, "optimiser steps until that rate is reached")
    decay: str = option("cosine", f"of the rate after that, to the last step: {', '.join(DECAYS)}")
    weight_decay: float = option(0.0, "of AdamW")
    clip_grad: float = option(1.0, "largest norm of the gradient")
    ema_decay: float = option(0.999, "of the averaged weights, which are the ones to sample from")
    label_dropout: float = option(0.1, "share of samples that lose their label, for classifier-free guidance")
    seed: int = option(0, "of everything random")
    precision: str = option("fp32", "of the network: fp32, bf16 (autocast; weights and optimiser stay float32)")
    save_every: int = option(1000, "optimiser steps between checkpoints; the two newest are kept")

    def __post_init__(self) -> None:
        choose("schedule", self.schedule, TRAINED_SCHEDULES)
        choose("prediction", self.prediction, PREDICTIONS)
        choose("variance", self.variance, VARIANCES)
        choose("loss", self.loss, LOSSES)
        choose("precision", self.precision, PRECISIONS)
        choose("decay", self.decay, DECAYS)
        for name in ("train_steps", "batch", "save_every"):
            check(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "clip_grad"):
            value = getattr(self, name)
            check(value > 0 and math.isfinite(value), f"{name} must be positive and finite, got {value}")
        for name in ("weight_decay", "warmup"):
            value = getattr(self, name)
            check(value >= 0 and math.isfinite(value), f"{name} must be at least 0, got {value}")
        check(0 <= self.ema_decay < 1, f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        check(0 <= self.label_dropout < 1, f"label_dropout must lie in [0, 1), got {self.label_dropout}")
        noise.check_seed(self.seed)
        trained = self.variance != "learned_range" or self.loss in ("hybrid", "vlb")
        check(trained, f"loss {self.loss} does not train a learned variance: use hybrid or vlb")
        silent = self.prediction == "epsilon" and self.diffusion().schedule.zero_terminal_snr
        check(not silent, "an epsilon prediction says nothing at zero terminal SNR: use v_prediction or sample")

    @classmethod
    def by_model(cls, data: Description, **given: Any) -> TrainConfig:
        """The configuration with ``given`` settings, and for the others what suits the model."""
        return cls(**{**RECIPES.get(preset(given.get("model", "auto"), data), {}), **given})

    def diffusion(self) -> Diffusion:
        """The process this configuration trains for."""
        size = "n" if self.schedule in ("edm", "flow") else "timesteps"
        settings = {"name": self.schedule, size: self.timesteps, "zero_terminal_snr": self.zero_terminal_snr}
        return Diffusion(Schedule.from_config(settings), self.prediction, self.variance)

    def learning_rate_at(self, step: int) -> float:
        """The rate of optimiser step ``step``, from 0."""
        rate = self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup))
        return rate * (1 + math.cos(math.pi * step / self.train_steps)) / 2 if self.decay == "cosine" else rate


class Trainer:
    """Trains a model into a run directory: ``config.json``, ``log.jsonl``, ``checkpoints/``.

    Args:
        config: the run.
        data: what to train on.
        run: the directory; a new one, or with ``resume`` one that holds a checkpoint of the same configuration.
        device: where to train.
        resume: continue from the newest whole checkpoint. Bit-equal to never having stopped, on the CPU.

    Raises:
        InputError: a directory that is in use, nothing to resume, or another configuration (what differs is named).
    """

    def __init__(
        self, config: TrainConfig, data: Data, run: Path, *, device: torch.device | str = "cpu", resume: bool = False
    ) -> None:
        self.config, self.data, self.run, self.device = config, data, run, torch.device(device)
        self.diffusion = config.diffusion()
        self.description = {
            "data": data.to_json(),
            "model": model_config(config.model, data, learned_variance=config.variance == "learned_range"),
            "diffusion": {
                "schedule": self.diffusion.schedule.config,
                "prediction": config.prediction,
                "variance": config.variance,
            },
            "training": asdict(config),
        }
        if self.description["model"].get("type") == "classifier":
            _check_classifier(config)
        with torch.random.fork_rng([]):
            torch.manual_seed(config.seed)
            self.model = build_model(self.description["model"]).to(self.device)
        self.ema = EMA(self.model, config.ema_decay)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.step = 0
        self._order = _Order(len(data), config.seed)
        self._log: list[dict[str, Tensor]] = []
        if resume:
            self._resume()
        else:
            check(
                not checkpoint.steps(run),
                f"{run} already holds a run: continue it with --resume or choose another --out",
            )
            self._try_model()
            _io.replace_json(run / "config.json", self.description)
            _io.replace(run / "log.jsonl", b"")

    def train(self) -> None:
        """Train to the end, with checkpoints on the way.

        Raises:
            InputError: the loss is no longer finite; nothing of that is saved.
        """
        self.model.train()
        steps = range(self.step, self.config.train_steps)
        for step in progress(steps, self.config.train_steps, "training", start=self.step):
            self._log.append(self.train_step(step))
            self.step = step + 1
            due = self.step % self.config.save_every == 0 or self.step == self.config.train_steps
            if due or len(self._log) == FLUSH_EVERY:
                self._flush_log()
            if due:
                self.save()

    def train_step(self, step: int) -> dict[str, Tensor]:
        """One optimiser step; returns what is logged of it, the ``loss`` first, scalars on the device."""
        config = self.config
        x, y = self.data.batch(self._order.batch(step, config.batch))
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(_torch_seed(config.seed, step, noise.Stream.NETWORK))
            values = self._objective(x.to(self.device), y, step)
        self.optimizer.zero_grad()
        values["loss"].backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        self.optimizer.step()
        self.ema.update(self.model, step)
        return {name: value.detach() for name, value in values.items()}

    def losses(self) -> list[float]:
        """The loss of every step so far that is on disk."""
        return [row["loss"] for row in _read_log(self.run / "log.jsonl")]

    def save(self) -> Path:
        """Commit a checkpoint of this step."""
        optimizer = self.optimizer.state_dict()
        state = {f"{i}.{name}": t for i, values in optimizer["state"].items() for name, t in values.items()}
        tensors = {"model": self.model.state_dict(), "ema": self.ema.model.state_dict(), "optimizer": state}
        return checkpoint.save(self.run, self.step, tensors, {"config": self.description})

    @torch.no_grad()
    def _try_model(self) -> None:
        """Evaluate the loss of one sample, so that a model that does not fit ends before anything is written."""
        x, y = self.data.batch(torch.zeros(1, dtype=torch.int64))
        self.model.eval()
        self._objective(x.to(self.device), y, 0)

    def _objective(self, x: Tensor, y: Tensor | None, step: int) -> dict[str, Tensor]:
        """The loss of a batch, and what else is logged of it."""
        seed = self.config.seed
        if isinstance(self.model, Classifier):
            assert y is not None  # the model's configuration was checked
            y = y.to(self.device)
            return classification.cross_entropy(self._network, self.diffusion, x, y, seed=seed, step=step)
        decoder = "gaussian" if self.data.is_points else "discrete"
        cond: dict[str, Any] = self._drop_labels(self._condition(y), step)
        kind = self.config.loss
        loss = self.diffusion.loss(self._network, x, kind=kind, decoder=decoder, seed=seed, step=step, **cond)
        return {"loss": loss}

    def _condition(self, y: Tensor | None) -> dict[str, Any]:
        """What the model is given beside x and t: labels, if there are any and it takes them."""
        return {} if y is None or getattr(self.model, "label", None) is None else {"y": y.to(self.device)}

    def _network(self, x: Tensor, t: Tensor, **cond: Tensor) -> Any:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return self.model(x, t, **cond)

    def _drop_labels(self, cond: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Replace the share ``label_dropout`` of the conditions by their null (Ho & Salimans 2022, algorithm 1)."""
        if not cond:
            return cond
        n = len(cond["y"])
        words = noise.uniform_words(n, seed=self.config.seed, step=step, stream=noise.Stream.DROPOUT)
        dropped = (words < self.config.label_dropout * 2**32).to(self.device)
        null = self.model.null_condition(cond)  # type: ignore[operator]
        return {name: torch.where(dropped, null[name], value) for name, value in cond.items()}

    def _flush_log(self) -> None:
        first = self.step - len(self._log)
        rows = [
            {"step": first + i, **{name: float(value) for name, value in values.items()}}
            for i, values in enumerate(self._log)
        ]
        for row in rows:
            if not math.isfinite(row["loss"]):
                kept = checkpoint.steps(self.run)
                last = f"the last checkpoint is {kept[0]}" if kept else "no checkpoint was written"
                raise InputError(f"the loss is {row['loss']} at training step {row['step']}: training stopped, {last}")
        _io.append(self.run / "log.jsonl", _log_lines(rows))
        self._log.clear()

    def _resume(self) -> None:
        saved = checkpoint.load(self.run)
        _check_same_run(saved.json("config"), self.description)
        check(
            saved.step <= self.config.train_steps,
            f"{self.run} is at step {saved.step}, past train_steps {self.config.train_steps}",
        )
        load_weights(self.model, saved, "model")
        load_weights(self.ema.model, saved, "ema")
        state: dict[int, dict[str, Tensor]] = {}
        parameters = list(self.model.parameters())
        for name, tensor in saved.tensors("optimizer").items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = _like(parameters[int(index)], tensor)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.step = saved.step
        rows = [row for row in _read_log(self.run / "log.jsonl") if row["step"] < saved.step]
        _io.replace(self.run / "log.jsonl", _log_lines(rows))


def load_weights(model: nn.Module, saved: checkpoint.Checkpoint, name: str) -> None:
    """Load ``name.safetensors`` of a checkpoint into a model; every tensor must fit."""
    try:
        model.load_state_dict(saved.tensors(name))
    except RuntimeError as error:
        raise InputError(f"checkpoint {saved.path}: {' '.join(str(error).split())}") from None


def _check_classifier(config: TrainConfig) -> None:
    defaults = {field.name: field.default for field in fields(config)}
    given = [name for name in OF_DENOISERS if getattr(config, name) != defaults[name]]
    check(not given, f"{', '.join(given)}: settings of diffusion models, to be left out for a classifier")


def _torch_seed(seed: int, step: int, stream: noise.Stream) -> int:
    """A seed for torch's own generators, which on the CPU take 32 bits only."""
    return int(noise.uniform_words(1, seed=seed, step=step, stream=stream))


class _Order:
    """Which samples training step k sees: one shuffled pass over the data after another, from (seed, epoch)."""

    def __init__(self, size: int, seed: int) -> None:
        check(size > 0, "the data set is empty")
        self.size, self.seed = size, seed
        self._epoch, self._shuffled = -1, torch.empty(0)

    def batch(self, step: int, count: int) -> Tensor:
        return torch.cat(list(self._parts(step * count, count)))

    def _parts(self, first: int, count: int) -> Iterator[Tensor]:
        while count:
            epoch, offset = divmod(first, self.size)
            part = self._permutation(epoch)[offset : offset + count]
            yield part
            first, count = first + len(part), count - len(part)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(_torch_seed(self.seed, epoch, noise.Stream.ORDER))
            self._epoch, self._shuffled = epoch, torch.randperm(self.size, generator=generator)
        return self._shuffled


def _like(parameter: Tensor, state: Tensor) -> Tensor:
    """An optimiser's state in the memory format of its parameter, without which the update rounds differently."""
    return torch.empty_like(parameter).copy_(state) if state.shape == parameter.shape else state


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


def _log_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _read_log(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from None
