"""Which files lie at a path, and what they say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fastdiff import _io
from fastdiff.adapters.diffusers.tables import schedule_of
from fastdiff.adapters.doctor.description import OF_FASTDIFF, Description, Network
from fastdiff.adapters.doctor.facts import CLASSES, LEVELS, OTHERS, Facts
from fastdiff.errors import InputError, check
from fastdiff.models.settings import is_number, is_whole
from fastdiff.schedule import Schedule

SCHEDULER, INDEX, CONFIG, SAMPLES = "scheduler_config.json", "model_index.json", "config.json", "samples.json"
WEIGHTS = "diffusion_pytorch_model"
KINDS = "a scheduler's configuration or folder or a pipeline of diffusers, a run or a configuration of fastdiff"
AUTOENCODERS = ("vae", "vqvae", "movq", "vqgan", "first_stage_model")
NETWORKS = ("unet", "transformer", "prior", "decoder")
PRECISIONS = {"F32": "fp32", "BF16": "bf16", "F16": "fp16", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
#: settings of fastdiff sample, and what samples.json adds
SAMPLING = (
    *("count", "labels", "solver", "steps", "spacing", "guidance_scale", "classifier_scale", "seed", "batch"),
    *("precision", "checkpoint", "classifier", "ema", "training_step", "backend"),
)
SCHEDULED = {"beta_schedule", "trained_betas", "prediction_type", "timestep_spacing"}
NUMBERS = (
    "beta_start",
    "beta_end",
    "clip_sample_range",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "lambda_min_clipped",
)
MOST_TIMESTEPS = 10**6


def read(path: Path, *, steps: int | None = None, precision: str | None = None) -> Description:
    """What the files at ``path`` say.

    Args:
        path: a scheduler's configuration or folder, a pipeline's folder, a run or a configuration of ours.
        steps: sampling steps to look at; None for what the file says, or all that are usual.
        precision: of the network, ``fp32``, ``bf16`` or ``fp16``; None for what the files say.

    Raises:
        InputError: nothing of the kind there, no JSON, a value that cannot be used.
    """
    check(path.exists(), f"{path} does not exist: give {KINDS}")
    found = _in_directory(path) if path.is_dir() else _of_file(path, Network())
    network = replace(found.network, precision=precision or found.network.precision)
    trained = {} if network.timesteps is None else {"the network's configuration": network.timesteps}
    said = found.given.get("steps") if found.ours else None
    wanted = steps if steps is not None else said if is_whole(said) else None
    return replace(found, network=network, trained=trained, steps=wanted)


def _in_directory(path: Path) -> Description:
    index = _io.read_json(path / INDEX) if (path / INDEX).is_file() else {}
    for place in (path / SCHEDULER, path / "scheduler" / SCHEDULER):
        if place.is_file():
            return _of_file(place, _network(path, index))
    for name in (CONFIG, SAMPLES):
        if (path / name).is_file():
            return _of_file(path / name, Network())
    raise InputError(f"{path} holds no {SCHEDULER}, {CONFIG} or {SAMPLES}: give {KINDS}")


def _of_file(path: Path, network: Network) -> Description:
    given = _io.read_json(path)
    if "diffusion" in given:
        return _of_run(path, given)
    settings = given.get("settings", given)
    name = given.get("_class_name")
    if str(name).endswith("Scheduler") or SCHEDULED & given.keys():
        return _of_scheduler(path, given, network)
    known = _known()
    fits = name is None and isinstance(settings, Mapping) and len(settings) <= 2 * len(known & settings.keys()) > 0
    check(fits, f"{path} says nothing of a scheduler or a run: give {KINDS}")
    return _of_settings(path, settings, known)


# ---- diffusers --------------------------------------------------------------------------------


def _of_scheduler(path: Path, given: dict[str, Any], network: Network) -> Description:
    name = str(given.get("_class_name"))
    facts = CLASSES.get(name, Facts(LEVELS if name not in OTHERS and "beta_schedule" in given else {}))
    values = {**facts.defaults, **{key: given[key] for key in facts.defaults if given.get(key) is not None}}
    total = values.get("num_train_timesteps", given.get("num_train_timesteps") or 1000)
    fits = is_whole(total) and total <= MOST_TIMESTEPS
    check(fits, f"{path}: num_train_timesteps={total!r} must be a whole number in 1...{MOST_TIMESTEPS}")
    for key in values:
        fits = is_number(values[key]) if key in NUMBERS else is_whole(values[key], 0) if key == "steps_offset" else True
        check(fits, f"{path}: {key}={values[key]!r} must be a {'whole ' * (key == 'steps_offset')}number")
    described = Description(str(path), name, facts, given, values, None, total=total, network=network)
    if not facts.defaults or given.get("use_flow_sigmas"):  # which has noise levels of its own
        return described
    try:
        return replace(described, schedule=schedule_of(values))
    except InputError as error:
        return replace(described, refused=str(error))


def _network(path: Path, index: Mapping[str, Any]) -> Network:
    place = next((path / name for name in NETWORKS if (path / name / CONFIG).is_file()), path)
    config = _io.read_json(place / CONFIG) if (place / CONFIG).is_file() else {}
    inside, outside, total = (_whole(config, key) for key in ("in_channels", "out_channels", "num_train_timesteps"))
    latent = True if any(name in index for name in AUTOENCODERS) else {1: False, 3: False, 4: True}.get(inside or 0)
    said = PRECISIONS.get(str(config.get("torch_dtype", config.get("dtype", ""))).removeprefix("torch."))
    return Network(inside, outside, latent, said or _stored_precision(place), total)


def _whole(config: Mapping[str, Any], key: str) -> int | None:
    return config[key] if is_whole(config.get(key)) else None


def _stored_precision(place: Path) -> str | None:
    """That of most of the network's tensors, if they are there."""
    path = place / f"{WEIGHTS}.safetensors"
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as tensors:
            dtypes = Counter(tensors.get_slice(name).get_dtype() for name in tensors.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    return PRECISIONS.get(dtypes.most_common(1)[0][0]) if dtypes else None


# ---- fastdiff ---------------------------------------------------------------------------------


def _of_run(path: Path, given: dict[str, Any]) -> Description:
    process = given["diffusion"]
    fits = isinstance(process, Mapping) and isinstance(process.get("schedule"), Mapping)
    check(fits, f"{path}: diffusion must be an object with a schedule")
    values = {"prediction_type": process.get("prediction")}
    return _of_ours(path, given, values, dict(process["schedule"]), None)


def _of_settings(path: Path, given: Mapping[str, Any], known: frozenset[str]) -> Description:
    values = {OTHER_NAMES[key]: given[key] for key in OTHER_NAMES.keys() & given.keys()}
    if "schedule" not in given and "timesteps" not in given:
        return _of_ours(path, given, values, {}, known)
    name, total = given.get("schedule", "cosine"), given.get("timesteps", 1000)
    ends = {"zero_terminal_snr": bool(given.get("zero_terminal_snr"))}
    values.setdefault("prediction_type", "v_prediction")
    return _of_ours(
        path, given, values, {"name": name, "n" if name in ("edm", "flow") else "timesteps": total, **ends}, known
    )


def _of_ours(
    path: Path,
    given: Mapping[str, Any],
    values: Mapping[str, Any],
    settings: dict[str, Any],
    known: frozenset[str] | None,
) -> Description:
    total = settings.get("timesteps", settings.get("n", 1000))
    check(is_whole(total) and total <= MOST_TIMESTEPS, f"{path}: timesteps={total!r} must be a whole number")
    described = Description(str(path), "fastdiff", OF_FASTDIFF, given, {**values}, None, total=total, known=known)
    if settings.get("name") in (None, "learned"):
        return described
    named = {**values, "beta_schedule": settings["name"], **settings}
    try:
        schedule = Schedule.from_config(settings)
    except InputError as error:
        return replace(described, values=named, refused=str(error))
    return replace(described, values=named, schedule=schedule, total=len(schedule))


OTHER_NAMES = {"prediction": "prediction_type", "spacing": "timestep_spacing"}


def _known() -> frozenset[str]:
    from fastdiff.training.config import Operation, TrainConfig  # brings data sets along

    return frozenset(SAMPLING) | {field.name for kind in (TrainConfig, Operation) for field in fields(kind)}


def together(found: list[Description]) -> Iterator[Description]:
    """Each with the lengths of the training runs that were given beside it."""
    runs = {d.source: d.total for d in found if d.ours and d.schedule is not None}
    for d in found:
        yield d if d.ours else replace(d, trained={**d.trained, **runs})
