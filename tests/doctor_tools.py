"""What tests of ``fastdiff doctor`` share: configurations as diffusers writes them, and what is found of them."""

import json
import warnings

import diffusers
import pytest

from fastdiff.adapters import doctor
from fastdiff.adapters.doctor.facts import CLASSES
from fastdiff.cli import main

COSINE = {"beta_schedule": "squaredcos_cap_v2"}
STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ZERO = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
PIXELS = ({}, {"in_channels": 3, "out_channels": 3})
LEARNED = ({}, {"in_channels": 3, "out_channels": 6})
LATENTS = ({"vae": ["diffusers", "AutoencoderKL"]}, {"in_channels": 4, "out_channels": 4})
NAMES = [name for name in CLASSES if name != "DPMSolverSDEScheduler"]  # which needs another package


@pytest.fixture
def quiet():
    """main shows warnings in its own way from now on; diffusers says what it does on its own."""
    diffusers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of diffusers' calls of numpy
        yield


def peer(name, **settings):
    return getattr(diffusers, name)(**settings)


def run(*arguments) -> int:
    return main(["doctor", *map(str, arguments)])


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def saved(folder, name, settings, network=None):
    """A scheduler as diffusers writes it, or where it refuses to be made as somebody would; and a network beside."""
    place = folder / "scheduler"
    try:
        peer(name, **settings).save_pretrained(place)
        config = json.loads((place / "scheduler_config.json").read_text())
    except (TypeError, ValueError, NotImplementedError, FutureWarning):
        config = {"_class_name": name, "prediction_type": "epsilon"}
    write(place / "scheduler_config.json", {**config, **settings})
    if network is not None:
        index, unet = network
        write(folder / "model_index.json", index)
        write(folder / "unet" / "config.json", unet)
    return folder if network is not None else place


def names(path, **how):
    return [finding.check for finding in doctor.examine(doctor.read(path, **how))]


def found(path, check, **how):
    return next(finding for finding in doctor.examine(doctor.read(path, **how)) if finding.check == check)
