"""``fastdiff doctor``: each fault is found where it is and gone where it is mended; other files; the command."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from doctor_tools import COSINE, LATENTS, LEARNED, PIXELS, STABLE, ZERO, found, names, peer, quiet, run, saved, write  # noqa: F401

from fastdiff.adapters import doctor
from fastdiff.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("quiet")

FAULTS = [
    ("terminal_signal", "DDIMScheduler", STABLE, None, {}, "fault"),
    ("terminal_signal", "DDPMScheduler", {"prediction_type": "v_prediction"}, None, {}, "warning"),
    ("terminal_signal", "DDPMScheduler", {"num_train_timesteps": 100}, None, {}, "fault"),
    ("terminal_signal", "DDPMScheduler", {"num_train_timesteps": 20}, None, {}, "fault"),
    ("terminal_signal", "LMSDiscreteScheduler", STABLE, None, {}, "fault"),
    ("start", "DDIMScheduler", COSINE, None, {}, "fault"),
    ("start", "EulerDiscreteScheduler", {"timestep_spacing": "leading"}, None, {"steps": 10}, "warning"),
    ("start", "DDIMScheduler", {**STABLE, **ZERO, "steps_offset": 1}, None, {"steps": 50}, "warning"),
    ("zero_snr_epsilon", "DDIMScheduler", {"rescale_betas_zero_snr": True}, None, {}, "fault"),
    ("zero_snr_epsilon", "EulerDiscreteScheduler", {"rescale_betas_zero_snr": True}, None, {}, "fault"),
    (
        "zero_snr_epsilon",
        "PNDMScheduler",
        {"trained_betas": [0.1, 0.5, 1.0], "num_train_timesteps": 3},
        None,
        {},
        "fault",
    ),
    ("min_snr", "DDPMScheduler", {"rescale_betas_zero_snr": True}, None, {}, "warning"),
    ("betas", "DDPMScheduler", {"num_train_timesteps": 10, "beta_start": 0.01, "beta_end": 2.0}, None, {}, "fault"),
    ("betas", "DDPMScheduler", {"trained_betas": [0.1, 0.2]}, None, {}, "fault"),
    ("betas", "DDIMScheduler", {"beta_schedule": "cosine"}, None, {}, "fault"),
    ("large_betas", "DDPMScheduler", {"num_train_timesteps": 20, "beta_end": 0.99}, None, {}, "warning"),
    ("idle_timesteps", "DDPMScheduler", {"num_train_timesteps": 4000}, None, {}, "warning"),
    ("duplicates", "DPMSolverMultistepScheduler", {**COSINE, "use_karras_sigmas": True}, None, {"steps": 20}, "fault"),
    ("duplicates", "UniPCMultistepScheduler", {**COSINE, "use_exponential_sigmas": True}, None, {"steps": 50}, "fault"),
    ("duplicates", "DEISMultistepScheduler", {"use_beta_sigmas": True}, None, {"steps": 50}, "warning"),
    ("duplicates", "KDPM2DiscreteScheduler", {**COSINE, "use_karras_sigmas": True}, None, {}, "fault"),
    ("duplicates", "DPMSolverMultistepScheduler", {}, None, {}, "warning"),
    ("duplicates", "DPMSolverMultistepScheduler", {"timestep_spacing": "leading"}, None, {"steps": 1000}, "fault"),
    ("one_too_many", "DDPMScheduler", {"timestep_spacing": "trailing"}, None, {"steps": 61}, "fault"),
    ("one_too_many", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, None, {"steps": 103}, "fault"),
    ("out_of_range", "DDIMScheduler", {**STABLE, "steps_offset": 1}, None, {}, "warning"),
    ("out_of_range", "DDIMScheduler", {**STABLE, "steps_offset": 1}, None, {"steps": 1000}, "fault"),
    ("stride", "DDIMScheduler", {"timestep_spacing": "linspace"}, None, {}, "fault"),
    ("stride", "DDIMScheduler", {"timestep_spacing": "trailing"}, None, {"steps": 30}, "fault"),
    ("stride", "DDIMScheduler", {"steps_offset": 30}, None, {"steps": 50}, "fault"),
    ("stride", "PNDMScheduler", {"timestep_spacing": "linspace"}, None, {}, "fault"),
    ("final_alpha", "DDIMScheduler", {"set_alpha_to_one": False}, None, {}, "warning"),
    ("final_alpha", "PNDMScheduler", {}, None, {}, "warning"),
    ("third_order", "DPMSolverSinglestepScheduler", {"solver_order": 3}, None, {"steps": 11}, "warning"),
    ("nan_variance", "DDPMScheduler", {"variance_type": "fixed_large_log"}, None, {}, "fault"),
    ("nan_variance", "DDPMScheduler", {"variance_type": "learned"}, LEARNED, {}, "fault"),
    ("variance_channels", "DDPMScheduler", {"variance_type": "learned_range"}, PIXELS, {}, "fault"),
    ("variance_channels", "DDPMScheduler", {}, LEARNED, {}, "fault"),
    ("unclipped_pixels", "DDIMScheduler", {"clip_sample": False}, PIXELS, {}, "warning"),
    ("clipped_latents", "DDIMScheduler", {}, LATENTS, {}, "fault"),
    ("clipped_latents", "DDPMScheduler", {}, ({}, {"in_channels": 4, "out_channels": 4}), {}, "fault"),
    ("thresholded_latents", "DPMSolverMultistepScheduler", {"thresholding": True}, LATENTS, {}, "fault"),
    ("prediction", "EulerAncestralDiscreteScheduler", {"prediction_type": "sample"}, None, {}, "fault"),
    ("prediction", "DDPMScheduler", {"prediction_type": "v-prediction"}, None, {}, "fault"),
    ("spacing_name", "DDPMScheduler", {"timestep_spacing": "trailling"}, None, {}, "fault"),
    ("unknown_keys", "DDIMScheduler", {"beta_shedule": "linear"}, None, {}, "fault"),
    ("unknown_keys", "DDIMScheduler", {"author": "me"}, None, {}, "warning"),
    ("ignored_keys", "DDIMScheduler", {"use_karras_sigmas": True}, None, {}, "warning"),
    ("sigmas", "EulerDiscreteScheduler", {"use_karras_sigmas": True, "use_beta_sigmas": True}, None, {}, "fault"),
    ("final_level", "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, None, {}, "fault"),
    ("scheduler_class", "DDIMSchedular", {}, None, {}, "warning"),
    ("training_length", "DDPMScheduler", {}, ({}, {"in_channels": 3, "num_train_timesteps": 4000}), {}, "fault"),
]


@pytest.mark.parametrize(
    ("check", "name", "settings", "network", "how", "severity"), FAULTS, ids=[f"{f[0]}-{f[1]}" for f in FAULTS]
)
def test_a_fault_is_found_and_mended(check, name, settings, network, how, severity, tmp_path):
    if name == "DDIMSchedular":
        write(tmp_path / "scheduler_config.json", {"_class_name": name, "prediction_type": "epsilon"})
        path = tmp_path
    else:
        path = saved(tmp_path, name, settings, network)
    finding = found(path, check, **how)
    assert finding.severity == severity
    assert finding.problem
    assert finding.cost
    file = next(path.rglob("scheduler_config.json"))
    config = {key: value for key, value in json.loads(file.read_text()).items() if key not in finding.remove}
    write(file, {**config, **finding.set})
    assert all(f"{json.dumps(key)}: {json.dumps(value)}" in finding.fix for key, value in finding.set.items())
    if not (finding.set or finding.remove):
        how = {"steps": int(re.search(r"num_inference_steps=(\d+)", finding.fix)[1])}
    assert check not in names(path, **how)


CLEAN = [
    ("DDPMScheduler", {**COSINE, "timestep_spacing": "linspace"}, None, {}),
    ("DDPMScheduler", {**COSINE, "timestep_spacing": "linspace"}, PIXELS, {}),
    ("DDIMScheduler", {**COSINE, **ZERO, "timestep_spacing": "trailing"}, None, {"steps": 50}),
    ("DDIMScheduler", {**STABLE, **ZERO, "timestep_spacing": "trailing", "clip_sample": False}, LATENTS, {"steps": 50}),
    ("DDIMScheduler", {}, PIXELS, {"steps": 50}),
    ("EulerDiscreteScheduler", {}, None, {}),
    ("EulerDiscreteScheduler", {**STABLE, **ZERO, "timestep_spacing": "trailing"}, None, {"steps": 25}),
    ("EulerAncestralDiscreteScheduler", COSINE, None, {}),
    ("DPMSolverMultistepScheduler", {}, None, {"steps": 20}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, PIXELS, {"steps": 50}),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3}, None, {"steps": 13}),
    ("UniPCMultistepScheduler", {**COSINE, "use_karras_sigmas": True}, None, {"steps": 5}),
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, None, {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, LATENTS, {}),
    ("LMSDiscreteScheduler", {}, None, {}),
    ("DDPMScheduler", {"variance_type": "learned_range", **COSINE, "timestep_spacing": "linspace"}, LEARNED, {}),
    ("DDPMScheduler", {"num_train_timesteps": 4000, **COSINE, "timestep_spacing": "linspace"}, None, {}),
]


@pytest.mark.parametrize(("name", "settings", "network", "how"), CLEAN)
def test_clean_configurations(name, settings, network, how, tmp_path, capsys):
    path = saved(tmp_path, name, settings, network)
    assert names(path, **how) == []
    assert run(path, *[word for key, value in how.items() for word in (f"--{key}", value)]) == 0
    assert capsys.readouterr().out.endswith("nothing found\n")


@pytest.mark.parametrize(
    ("name", "settings"),
    [(f[1], f[2]) for f in FAULTS if f[0] in ("sigmas", "spacing_name") or "cosine" in f[2].values()],
)
def test_what_cannot_be_made(name, settings):
    with pytest.raises((ValueError, NotImplementedError)):
        peer(name, **settings).set_timesteps(10)


# ---- other files --------------------------------------------------------------------------------


def test_precision_of_a_pipeline(tmp_path):
    path = saved(tmp_path, "DDIMScheduler", {**STABLE, "clip_sample": False}, LATENTS)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2, dtype=torch.float16), "b": torch.zeros(1)}, weights)
    assert "noise_precision" not in names(path)  # as many of float32
    safetensors.torch.save_file({name: torch.zeros(1, dtype=torch.bfloat16) for name in "ab"}, weights)
    assert {"noise_precision", "state_precision"} <= set(names(path))
    weights.write_bytes(b"nothing")
    assert run(path) == 2


@pytest.mark.parametrize(
    ("given", "check", "change"),
    [
        ({"guidance_scale": 0.0, "steps": 50}, "guidance", {"guidance_scale": 1.0}),
        ({"guidance_scale": 0.5}, "guidance", {"guidance_scale": 1.5}),
        ({"schedule": "linear", "timesteps": 100}, "terminal_signal", {"zero_terminal_snr": True}),
        ({"schedule": "scaled_linear", "prediction": "epsilon"}, "terminal_signal", {"prediction": "v_prediction"}),
        ({"zero_terminal_snr": True, "schedule": "linear", "prediction": "epsilon"}, "zero_snr_epsilon", {}),
        ({"schedule": "cosin"}, "betas", {"schedule": "cosine"}),
        ({"schedule": "cosine", "prediction": "eps"}, "prediction", {"prediction": "epsilon"}),
        ({"schedule": "cosine", "train_step": 10}, "unknown_keys", {"train_steps": 10}),
    ],
)
def test_configurations_of_ours(given, check, change, tmp_path):
    path = write(tmp_path / "config.json", given)
    finding = found(path, check)
    assert finding.set.items() >= change.items()
    mended = {key: value for key, value in given.items() if key not in finding.remove}
    write(path, {**mended, **finding.set})
    assert check not in names(path)
    assert "min_snr" not in names(path)


def test_runs_of_ours(tmp_path):
    """The default run is clean; a scheduler of another T beside it is not."""
    config = TrainConfig()
    process = {"schedule": config.schedule_settings(), "prediction": config.prediction, "variance": "fixed_small"}
    place = write(tmp_path / "run" / "config.json", {"diffusion": process, "training": dataclasses.asdict(config)})
    assert names(place.parent) == []
    assert names(place) == []
    settings = {"guidance_scale": 1.0, "steps": 20, "spacing": "trailing", "checkpoint": "runs/x"}
    assert names(write(tmp_path / "samples" / "samples.json", {"seconds": 1.0, "settings": settings}).parent) == []
    scheduler = saved(tmp_path, "DDPMScheduler", {**COSINE, "num_train_timesteps": 500, "timestep_spacing": "linspace"})
    first, second = doctor.together([doctor.read(place), doctor.read(scheduler)])
    assert doctor.examine(first) == []
    assert [finding.check for finding in doctor.examine(second)] == ["training_length"]


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "null",
        "{",
        "[1, 2]",
        "{}",
        '{"_class_name": "UNet2DModel", "in_channels": 3}',
        '{"a": 1, "seed": 2, "b": 3}',
    ]
    + [json.dumps({"_class_name": "DDIMScheduler", "num_train_timesteps": t}) for t in (0, "many", 1e12, 10**12, -3)]
    + [
        '{"_class_name": "DDIMScheduler", "beta_start": "low"}',
        '{"diffusion": 3}',
        '{"schedule": "linear", "timesteps": 0}',
    ]
    + ['{"_class_name": "DDIMScheduler", "steps_offset": 0.5}'],
)
def test_nothing_of_the_kind(content, tmp_path, capsys):
    for path in (tmp_path / "scheduler_config.json", tmp_path):
        if content is not None:
            (tmp_path / "scheduler_config.json").write_text(content)
        assert run(path, "--json", tmp_path / "out.json") == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("fastdiff: ")
        assert said.err.count("\n") == 1
        assert not (tmp_path / "out.json").exists()


def test_options_that_are_wrong(tmp_path, capsys):
    path = saved(tmp_path, "DDIMScheduler", {})
    assert run(path, "--steps", 0) == 2
    assert run(path, "--precision", "int8") == 2
    assert run() == 2
    assert capsys.readouterr().err.count("\n") == 3


def test_the_command(tmp_path, capsys):
    stable = saved(tmp_path, "DDIMScheduler", {**STABLE, "steps_offset": 1, "set_alpha_to_one": False})
    assert run(stable, "--steps", 50, "--json", tmp_path / "out.json") == 1
    said = capsys.readouterr().out
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert row["source"] == str(stable / "scheduler_config.json")
    assert [each["check"] for each in row["findings"]] == ["terminal_signal", "start", "final_alpha"]
    assert all(each[part] in said for each in row["findings"] for part in ("check", "problem", "cost", "fix"))
    assert said.endswith("3 found\n")
    assert run(saved(tmp_path / "two", "PNDMScheduler", {**COSINE, "timestep_spacing": "trailing"}), "--steps", 50) == 0
    assert "final_alpha" in capsys.readouterr().out  # a warning alone


def test_diffusers_is_not_imported(tmp_path):
    path = saved(tmp_path, "DDIMScheduler", {})
    code = "import sys; from fastdiff.cli import main; sys.exit(main(sys.argv[1:]) or ('diffusers' in sys.modules))"
    command = [sys.executable, "-c", code, "doctor", str(path), "--steps", "50"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_check_has_its_fault():
    """Each check is the name of what it finds, and finds something in some test."""
    tested = {fault[0] for fault in FAULTS} | {"noise_precision", "state_precision", "guidance"}
    assert {check.__name__ for check in doctor.CHECKS} == tested
