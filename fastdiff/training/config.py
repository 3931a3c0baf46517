"""The settings of a training run: what determines its numbers, and how it is carried out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from fastdiff import noise
from fastdiff.diffusion import LOSSES, Diffusion
from fastdiff.errors import check, choose
from fastdiff.ops.row import PREDICTIONS
from fastdiff.ops.step import VARIANCES
from fastdiff.schedule import SCHEDULES
from fastdiff.training.data import Description
from fastdiff.training.ema import check_averages
from fastdiff.training.images import POLICIES
from fastdiff.training.loader import AUGMENTS
from fastdiff.training.presets import PRESETS, RECIPES, preset
from fastdiff.training.process import LEARNED, starting_schedule
from fastdiff.training.timesteps import SAMPLERS

PRECISIONS = ("fp32", "bf16")
DECAYS = ("constant", "cosine")
PARALLELS = ("ddp", "fsdp")
TRAINED_SCHEDULES = (*(name for name in SCHEDULES if name not in ("from_betas", "from_log_snr")), LEARNED)


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
    timestep_sampler: str = option("uniform", f"how training draws timesteps: {', '.join(SAMPLERS)}")
    train_steps: int = option(2000, "optimiser steps")
    batch: int = option(128, "samples in an optimiser step, of all processes together")
    learning_rate: float = option(2e-3, "largest rate of AdamW")
    warmup: int = option(100, "optimiser steps until that rate is reached")
    decay: str = option("cosine", f"of the rate after that, to the last step: {', '.join(DECAYS)}")
    weight_decay: float = option(0.0, "of AdamW")
    clip_grad: float = option(1.0, "largest norm of the gradient")
    ema: str = option("0.999", "averages of the weights, with commas: decays, or power:SIGMA_REL; the first is sampled")
    label_dropout: float = option(0.1, "share of samples that lose their label, for classifier-free guidance")
    augment: str = option("none", f"of training images: {', '.join(AUGMENTS)}")
    corrupt: str = option("fail", f"what an image that cannot be read leads to: {', '.join(POLICIES)}")
    seed: int = option(0, "of everything random")
    precision: str = option("fp32", "of the network: fp32, bf16 (autocast; weights and optimiser stay float32)")
    save_every: int = option(1000, "optimiser steps between checkpoints")

    def __post_init__(self) -> None:
        choose("schedule", self.schedule, TRAINED_SCHEDULES)
        choose("prediction", self.prediction, PREDICTIONS)
        choose("variance", self.variance, VARIANCES)
        choose("loss", self.loss, LOSSES)
        choose("timestep_sampler", self.timestep_sampler, SAMPLERS)
        choose("precision", self.precision, PRECISIONS)
        choose("decay", self.decay, DECAYS)
        choose("augment", self.augment, AUGMENTS)
        choose("corrupt", self.corrupt, POLICIES)
        _at_least(1, self, "train_steps", "batch", "save_every")
        _at_least(0, self, "weight_decay", "warmup")
        for name in ("learning_rate", "clip_grad"):
            value = getattr(self, name)
            check(value > 0 and math.isfinite(value), f"{name} must be positive and finite, got {value}")
        check_averages(self.ema)
        check(0 <= self.label_dropout < 1, f"label_dropout must lie in [0, 1), got {self.label_dropout}")
        noise.check_seed(self.seed)
        if self.schedule == LEARNED:
            self._check_learned()
        trained = self.variance != "learned_range" or self.loss in ("hybrid", "vlb")
        check(trained, f"loss {self.loss} does not train a learned variance: use hybrid or vlb")
        silent = self.prediction == "epsilon" and self.diffusion().schedule.zero_terminal_snr
        check(not silent, "an epsilon prediction says nothing at zero terminal SNR: use v_prediction or sample")

    def _check_learned(self) -> None:
        """A learned schedule has one objective, the bound in continuous time, and draws its own times."""
        wanted = {"loss": "vlb", "variance": "fixed_small", "timestep_sampler": "uniform", "zero_terminal_snr": False}
        wrong = [f"{name} {value}" for name, value in wanted.items() if getattr(self, name) != value]
        check(not wrong, f"a learned schedule is trained with {', '.join(wrong)}")

    @classmethod
    def by_model(cls, data: Description, **given: Any) -> TrainConfig:
        """The configuration with ``given`` settings, and for the others what suits the model."""
        return cls(**{**RECIPES.get(preset(given.get("model", "auto"), data), {}), **given})

    def diffusion(self) -> Diffusion:
        """The process this configuration trains for; with a learned schedule, what it starts from."""
        return Diffusion(starting_schedule(self.schedule_settings()), self.prediction, self.variance)

    def schedule_settings(self) -> dict[str, Any]:
        """The schedule's, as a run keeps them."""
        size = "n" if self.schedule in ("edm", "flow") else "timesteps"
        settings = {"name": self.schedule, size: self.timesteps, "zero_terminal_snr": self.zero_terminal_snr}
        return settings if self.schedule == LEARNED else starting_schedule(settings).config

    def learning_rate_at(self, step: int) -> float:
        """The rate of optimiser step ``step``, from 0."""
        rate = self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup))
        return rate * (1 + math.cos(math.pi * step / self.train_steps)) / 2 if self.decay == "cosine" else rate


@dataclass(frozen=True)
class Operation:
    """How a run is carried out: its speed and safety. Its numbers change in rounding at most, so that any of these
    may be another when a run is resumed. Each field's meaning is its help text.
    """

    parallel: str = option("ddp", "several processes: ddp (each holds the network) or fsdp (each holds a part of it)")
    accumulate: int = option(1, "parts in which a process takes its share of a batch")
    compile: bool = option(False, "run the network through torch.compile")
    graph: bool = option(False, "make each step one CUDA graph; for one process on a GPU")
    workers: int | None = option(None, "processes that read images; default: none for data in memory, else up to 4")
    keep: int = option(2, "checkpoints that are kept, the newest ones")
    background: bool = option(True, "write checkpoints while training goes on")
    snapshot_every: int = option(0, "optimiser steps between snapshots of the averages, for post-hoc ones; 0 for none")
    grid_every: int = option(0, "optimiser steps between pictures of samples; 0 for none")
    tensorboard: bool = option(False, "write what is logged for TensorBoard too")
    patience: int = option(5, "steps in a row that may fail to be finite (each is left out) before training stops")
    timeout: int = option(600, "seconds that a process waits for the others")

    def __post_init__(self) -> None:
        choose("parallel", self.parallel, PARALLELS)
        _at_least(1, self, "accumulate", "keep", "patience", "timeout")
        _at_least(0, self, "snapshot_every", "grid_every")
        check(self.workers is None or self.workers >= 0, f"workers must be at least 0, got {self.workers}")


def _at_least(least: int, settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        check(value >= least and math.isfinite(value), f"{name} must be at least {least}, got {value}")
