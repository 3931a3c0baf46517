"""``fastdiff convert``."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fastdiff import _io
from fastdiff.adapters.diffusers.tables import KINDS as BETA_SCHEDULES
from fastdiff.adapters.diffusers.tables import schedule_of
from fastdiff.diffusion import Diffusion
from fastdiff.errors import check, choose
from fastdiff.models import UNet
from fastdiff.models.diffusers import CONFIG, PIPELINE, WEIGHTS
from fastdiff.ops.row import PREDICTIONS
from fastdiff.schedule import Schedule
from fastdiff.training import manifest
from fastdiff.training.checkpoint import FOLDER
from fastdiff.training.config import TRAINED_SCHEDULES
from fastdiff.training.run import load_run, save_run

FORMATS = ("fastdiff", "diffusers", "guided-diffusion")
ENDINGS = (".pt", ".pth", ".bin", ".safetensors")
KINDS = f"a fastdiff run, a directory of diffusers with {CONFIG} or {PIPELINE}, or a .pt or .safetensors file"
SCHEDULER = "scheduler_config.json"  #: of a pipeline, beside its network's files or in its own directory
VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned_range": "learned_range",
}


@dataclass(frozen=True)
class Source:
    """A network, its format, and what its files say of the diffusion: arguments of :class:`Diffusion`."""

    format: str
    unet: UNet
    diffusion: dict[str, Any]


def convert(
    source: Annotated[Path, typer.Argument(help=KINDS)],
    out: Annotated[Path, typer.Argument(help="the directory to write; it must not exist")],
    to: Annotated[str, typer.Option("--to", help=", ".join(FORMATS))],
    config: Annotated[
        Path | None, typer.Option(help="JSON: arguments or flags of guided-diffusion's UNetModel")
    ] = None,
    schedule: Annotated[str | None, typer.Option(help=f"of the diffusion, {', '.join(TRAINED_SCHEDULES)}")] = None,
    timesteps: Annotated[int | None, typer.Option(help="of --schedule; default 1000")] = None,
    prediction: Annotated[
        str | None, typer.Option(help="what the network predicts: epsilon, v_prediction, ...")
    ] = None,
) -> None:
    """Convert a U-Net's weights between fastdiff, diffusers and guided-diffusion; the source is found by looking."""
    choose("--to", to, FORMATS)
    check(not out.exists(), f"{out} already exists: choose another OUT")
    said = _of_options(schedule, timesteps, prediction)
    check(to == "fastdiff" or not said, f"--schedule and --prediction belong to --to fastdiff, not to {to}")
    found = _read(source, config)
    check(found.format != to, f"{source} is of {to} already")
    if to == "fastdiff":
        save_run(out, found.unet, _diffusion(found.unet, found.diffusion | said, source))
    elif to == "diffusers":
        found.unet.save_diffusers(out)
    else:
        _write_guided(found.unet, out)
    print(f"{source} is now in {out}, as {to} has it")


# ---- the diffusion ----------------------------------------------------------------------------


def _diffusion(unet: UNet, said: dict[str, Any], source: Path) -> Diffusion:
    missing = [f"--{name}" for name in ("schedule", "prediction") if name not in said]
    check(not missing, f"{source} does not say what diffusion it was trained for: give {' and '.join(missing)}")
    learned = unet.config["learned_variance"]
    variance = said.get("variance", "learned_range" if learned else "fixed_small")
    fits = (variance == "learned_range") == learned
    check(fits, f"{source}: the network has {'a' if learned else 'no'} learned variance, but its diffusion {variance}")
    return Diffusion(said["schedule"], said["prediction"], variance)


def _of_options(schedule: str | None, timesteps: int | None, prediction: str | None) -> dict[str, Any]:
    check(schedule is not None or timesteps is None, "--timesteps needs --schedule")
    said: dict[str, Any] = {}
    if schedule is not None:
        choose("schedule", schedule, TRAINED_SCHEDULES)
        size = "n" if schedule in ("edm", "flow") else "timesteps"
        said["schedule"] = Schedule.from_config({"name": schedule, size: 1000 if timesteps is None else timesteps})
    if prediction is not None:
        choose("prediction", prediction, PREDICTIONS)
        said["prediction"] = prediction
    return said


def _of_scheduler(path: Path) -> dict[str, Any]:
    """What a scheduler of diffusers says; nothing if it is one without betas."""
    given = _io.read_json(path)
    if given.get("trained_betas") is None and given.get("beta_schedule") not in BETA_SCHEDULES:
        return {}
    variance = given.get("variance_type", "fixed_small")
    choose(f"variance_type in {path}:", variance, VARIANCES)
    fixed = {"variance": VARIANCES[variance]} if "variance_type" in given else {}
    return {"schedule": schedule_of(given), "prediction": given.get("prediction_type", "epsilon"), **fixed}


def _of_flags(path: Path | None) -> dict[str, Any]:
    """What flags of guided-diffusion's scripts say, if they name a schedule. Loading the network has checked them."""
    flags = {} if path is None else _io.read_json(path)
    if "noise_schedule" not in flags:
        return {}
    steps, name = flags.get("diffusion_steps", 1000), flags["noise_schedule"]
    same = steps == 1000 or not flags.get("rescale_timesteps")
    check(same, f"{path}: rescale_timesteps with diffusion_steps={steps} cannot be converted: it must be False")
    kind = "squaredcos_cap_v2" if name == "cosine" else name
    betas = {"num_train_timesteps": steps, "beta_start": 0.1 / steps, "beta_end": 20 / steps}
    return {
        "schedule": schedule_of({"beta_schedule": kind, **betas}),
        "prediction": "sample" if flags.get("predict_xstart") else "epsilon",
        "variance": "learned_range" if flags.get("learn_sigma") else "fixed_large",
    }


# ---- the files --------------------------------------------------------------------------------


def _read(source: Path, config: Path | None) -> Source:
    check(source.exists(), f"{source} does not exist: give {KINDS}")
    folder = source if source.is_dir() else source.parent
    run = (folder / manifest.NAME).is_file() or (source / FOLDER).is_dir()
    if not run and source.suffix in ENDINGS and source.is_file():
        return _read_guided(source, config)
    check(config is None, f"--config belongs to a file of guided-diffusion, {source} is none")
    if run:
        return _read_run(source)
    known = any((source / name).is_file() for name in (CONFIG, PIPELINE))
    check(known, f"{source} is none of what can be converted: give {KINDS}")
    said = [_of_scheduler(path) for path in (source / SCHEDULER, source / "scheduler" / SCHEDULER) if path.is_file()]
    return Source("diffusers", UNet.from_diffusers(source), said[0] if said else {})


def _read_run(source: Path) -> Source:
    run = load_run(source)
    check(isinstance(run.model, UNet), f"{source} holds a {type(run.model).__name__}: only a UNet can be converted")
    assert isinstance(run.model, UNet)
    process = run.diffusion
    said = {"schedule": process.schedule, "prediction": process.prediction, "variance": process.variance}
    return Source("fastdiff", run.model, said)


def _read_guided(source: Path, config: Path | None) -> Source:
    beside = f", or its directory for {WEIGHTS}" if source.name.startswith(WEIGHTS) else ""
    check(config is not None, f"{source} needs --config, the JSON file of its settings{beside}")
    return Source("guided-diffusion", UNet.from_guided_diffusion(source, config), _of_flags(config))


def _write_guided(unet: UNet, out: Path) -> None:
    """``model.pt``, as guided-diffusion's scripts load it, and ``config.json``, the arguments of its constructor."""
    settings, state = unet.to_guided_diffusion()
    content = io.BytesIO()
    torch.save(state, content)
    with _io.new_directory(out) as folder:
        _io.write(folder / CONFIG, _io.to_json(settings))
        _io.write(folder / "model.pt", content.getvalue())
