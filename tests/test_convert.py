"""``fastdiff convert`` between all formats: what it writes is whole and samples as its source does, or is not there."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch

import fastdiff as fd
from fastdiff import _io
from fastdiff.cli import main
from fastdiff.training import checkpoint
from fastdiff.training.run import load_run, save_run

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments) -> int:
    return main([str(a) for a in arguments])


def network(**settings) -> fd.UNet:
    generator = torch.Generator().manual_seed(0)
    common = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (4,)}
    unet = fd.UNet(8, **{**common, "null_label": False, **settings}).eval()
    for parameter in unet.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return unet


def pipeline(folder, unet, scheduler):
    """A pipeline's directory, as diffusers writes it."""
    unet.save_diffusers(folder / "unet")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


def guided(folder, unet):
    settings, state = unet.to_guided_diffusion()
    folder.mkdir()
    torch.save(state, folder / "model.pt")
    (folder / "config.json").write_text(json.dumps(settings))
    return folder / "model.pt", "--config", folder / "config.json"


def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


DDPM = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear"}


def test_a_pipeline_becomes_a_run_that_samples_the_same(tmp_path, capsys):
    unet = network(num_classes=3)
    source = pipeline(tmp_path / "ddpm", unet, {**DDPM, "beta_end": 0.03, "variance_type": "fixed_large"})
    assert run("convert", source, tmp_path / "runs" / "ddpm", "--to", "fastdiff") == 0
    assert "is now in" in capsys.readouterr().out
    found = load_run(tmp_path / "runs" / "ddpm")
    assert same(found.model, unet)
    assert found.diffusion.variance == "fixed_large"
    assert found.diffusion.schedule.config["beta_end"] == 0.03
    assert json.loads((tmp_path / "runs" / "ddpm" / "config.json").read_text()) == found.config
    options = ("--count", 5, "--steps", 4, "--labels", "2,0", "--seed", 3, "--out", tmp_path / "samples")
    assert run("sample", "--checkpoint", tmp_path / "runs" / "ddpm", *options) == 0
    diffusion = fd.Diffusion(fd.Schedule.linear(beta_end=0.03))
    sampler = fd.Sampler(unet, diffusion, solver="ddim", steps=4, clip=1.0)
    images = sampler((5, 3, 8, 8), seed=3, y=torch.tensor([2, 0, 2, 0, 2]))
    expected = ((images + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1)
    with np.load(tmp_path / "samples" / "samples.npz") as samples:
        assert np.abs(samples["arr_0"].astype(int) - expected.numpy().astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("scheduler", "schedule", "prediction"),
    [
        ({}, fd.Schedule.linear(), "epsilon"),
        ({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50}, fd.Schedule.cosine(50), "epsilon"),
        (
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "sample"},
            fd.Schedule.scaled_linear(),
            "sample",
        ),
        (
            {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
            fd.Schedule.linear().rescale_zero_terminal_snr(),
            "v_prediction",
        ),
        ({"beta_schedule": "sigmoid"}, fd.Schedule.sigmoid(), "epsilon"),
        ({"trained_betas": [0.1, 0.2, 0.3]}, fd.Schedule.from_betas([0.1, 0.2, 0.3]), "epsilon"),
    ],
)
def test_the_diffusion_of_a_scheduler(scheduler, schedule, prediction, tmp_path):
    source = pipeline(tmp_path / "source", network(), {**DDPM, **scheduler})
    assert run("convert", source, tmp_path / "out", "--to", "fastdiff") == 0
    found = load_run(tmp_path / "out").diffusion
    assert torch.equal(found.schedule.alpha, schedule.alpha)
    assert torch.equal(found.schedule.sigma, schedule.sigma)
    assert (found.prediction, found.variance) == (prediction, "fixed_small")


def test_a_pipeline_in_one_directory(tmp_path):
    network().save_diffusers(tmp_path / "flat")
    (tmp_path / "flat" / "model_index.json").write_text("{}")
    (tmp_path / "flat" / "scheduler_config.json").write_text(json.dumps({**DDPM, "beta_end": 0.03}))
    assert run("convert", tmp_path / "flat", tmp_path / "out", "--to", "fastdiff") == 0
    assert load_run(tmp_path / "out").diffusion.schedule.config["beta_end"] == 0.03


def test_options_win_over_the_scheduler(tmp_path):
    source = pipeline(tmp_path / "source", network(learned_variance=True), {"_class_name": "FlowMatchEuler"})
    options = ("--schedule", "cosine", "--timesteps", 40, "--prediction", "v_prediction")
    assert run("convert", source, tmp_path / "out", "--to", "fastdiff", *options) == 0
    found = load_run(tmp_path / "out").diffusion
    assert torch.equal(found.schedule.alpha, fd.Schedule.cosine(40).alpha)
    assert (found.prediction, found.variance) == ("v_prediction", "learned_range")


FLAGS = {
    "image_size": 8,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "4",
    "num_heads": 1,
    "use_scale_shift_norm": False,
}


@pytest.mark.parametrize(
    ("flags", "schedule", "prediction", "variance"),
    [
        ({"noise_schedule": "linear", "learn_sigma": True}, fd.Schedule.linear(), "epsilon", "learned_range"),
        (
            {"noise_schedule": "linear", "diffusion_steps": 100},
            fd.Schedule.linear(100, beta_start=1e-3, beta_end=0.2),
            "epsilon",
            "fixed_large",
        ),
        (
            {"noise_schedule": "cosine", "predict_xstart": True, "rescale_timesteps": True},
            fd.Schedule.cosine(),
            "sample",
            "fixed_large",
        ),
    ],
)
def test_the_diffusion_of_flags(flags, schedule, prediction, variance, tmp_path):
    unet = network(learned_variance="learn_sigma" in flags)
    file = guided(tmp_path / "source", unet)[0]
    (tmp_path / "flags.json").write_text(json.dumps({**FLAGS, **flags}))
    assert run("convert", file, tmp_path / "out", "--to", "fastdiff", "--config", tmp_path / "flags.json") == 0
    found = load_run(tmp_path / "out")
    assert same(found.model, unet)
    assert torch.allclose(found.diffusion.schedule.alpha, schedule.alpha, rtol=1e-12)
    assert (found.diffusion.prediction, found.diffusion.variance) == (prediction, variance)


def test_once_around(tmp_path):
    """A run to diffusers, to guided-diffusion, and back to a run: the same bits."""
    unet = network(num_classes=2)
    diffusion = fd.Diffusion(fd.Schedule.cosine(), "v_prediction")
    save_run(tmp_path / "run", unet, diffusion)
    assert run("convert", checkpoint.steps(tmp_path / "run")[0], tmp_path / "a", "--to", "diffusers") == 0
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert run("convert", tmp_path / "a", tmp_path / "b", "--to", "guided-diffusion") == 0
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["config.json", "model.pt"]
    model = ("convert", tmp_path / "b" / "model.pt", tmp_path / "c", "--to", "fastdiff")
    options = ("--config", tmp_path / "b" / "config.json", "--schedule", "cosine", "--prediction", "v_prediction")
    assert run(*model, *options) == 0
    assert same(load_run(tmp_path / "c").model, unet)
    first, last = (load_run(tmp_path / name).config for name in ("run", "c"))
    assert {**last, "model": None} == {**first, "model": None}
    assert same(fd.UNet.from_diffusers(tmp_path / "a"), unet)


def test_safetensors_of_guided_diffusion(tmp_path):
    file, *config = guided(tmp_path / "source", network())
    state = torch.load(file, weights_only=True)
    safetensors.torch.save_file({k: v.half() for k, v in state.items()}, tmp_path / "model.safetensors")
    assert run("convert", tmp_path / "model.safetensors", tmp_path / "out", "--to", "diffusers", *config) == 0
    loaded = fd.UNet.from_diffusers(tmp_path / "out")
    assert torch.equal(loaded.conv_in.weight, state["input_blocks.0.0.weight"].half().float())


def test_bad_input_ends_in_one_line_and_leaves_nothing(tmp_path, capsys):
    unet = network()
    file, *config = guided(tmp_path / "guided", unet)
    unet.save_diffusers(tmp_path / "unet")
    flow = pipeline(tmp_path / "flow", unet, {"_class_name": "FlowMatchEuler"})
    mixed = pipeline(tmp_path / "mixed", unet, {**DDPM, "variance_type": "learned_range"})
    learned = pipeline(tmp_path / "learned", unet, {**DDPM, "variance_type": "learned"})
    save_run(tmp_path / "run", unet, fd.Diffusion(fd.Schedule.linear()))
    save_run(tmp_path / "small", network(norm_groups=8), fd.Diffusion(fd.Schedule.linear()))
    assert run("train", "--data", "parabola", "--train-steps", 1, "--batch", 4, "--out", tmp_path / "points") == 0
    (tmp_path / "text.txt").write_text("no weights")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "slow.json").write_text(
        json.dumps({**FLAGS, "noise_schedule": "linear", "diffusion_steps": 4000, "rescale_timesteps": True})
    )
    before = sorted(p.name for p in tmp_path.iterdir())
    for source, to, options, *words in [
        (tmp_path / "nothing", "fastdiff", (), "nothing does not exist"),
        (tmp_path / "empty", "fastdiff", (), "empty is none of what can be converted"),
        (tmp_path / "text.txt", "fastdiff", (), "text.txt is none of what can be converted"),
        (tmp_path / "text.pt", "diffusers", config, "text.pt cannot be read"),
        (tmp_path / "unet", "onnx", (), "unknown --to 'onnx'"),
        (tmp_path / "unet", "diffusers", (), "is of diffusers already"),
        (tmp_path / "run", "fastdiff", (), "is of fastdiff already"),
        (tmp_path / "unet", "fastdiff", (), "give --schedule and --prediction"),
        (tmp_path / "unet", "fastdiff", ("--schedule", "linear"), "give --prediction"),
        (tmp_path / "unet", "fastdiff", ("--prediction", "epsilon"), "give --schedule"),
        (tmp_path / "unet", "fastdiff", ("--timesteps", 7), "--timesteps needs --schedule"),
        (tmp_path / "unet", "fastdiff", ("--schedule", "quick"), "unknown schedule 'quick'"),
        (tmp_path / "unet", "fastdiff", ("--prediction", "noise"), "unknown prediction 'noise'"),
        (tmp_path / "unet", "guided-diffusion", ("--schedule", "linear"), "belong to --to fastdiff"),
        (tmp_path / "unet", "guided-diffusion", config, "--config belongs to a file of guided-diffusion"),
        (flow, "fastdiff", (), "give --schedule and --prediction"),
        (mixed, "fastdiff", (), "no learned variance"),
        (learned, "fastdiff", (), "variance_type"),
        (file, "diffusers", (), "needs --config"),
        (file, "diffusers", ("--config", tmp_path / "no.json"), "no.json cannot be read"),
        (file, "fastdiff", config, "give --schedule and --prediction"),
        (file, "fastdiff", ("--config", tmp_path / "slow.json"), "rescale_timesteps"),
        (tmp_path / "small", "guided-diffusion", (), "norm_groups=8 must be 32"),
        (tmp_path / "points", "diffusers", (), "only a UNet"),
    ]:
        capsys.readouterr()
        assert run("convert", source, tmp_path / "out", "--to", to, *options) == 2, (source, to)
        printed = capsys.readouterr()
        assert len(printed.err.strip().splitlines()) == 1, printed.err
        assert all(word in printed.err for word in words), printed.err
        assert not printed.out
        assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_what_is_there_is_never_touched(tmp_path, capsys):
    network().save_diffusers(tmp_path / "unet")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert run("convert", tmp_path / "unet", tmp_path / "out", "--to", "guided-diffusion") == 2
    assert "already exists" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]
    assert run("convert", tmp_path / "unet", tmp_path / "new") == 2
    assert "--to" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["fastdiff", "diffusers", "guided-diffusion"])
def test_a_full_disk_leaves_nothing(to, tmp_path, capsys, monkeypatch):
    if to == "diffusers":
        save_run(tmp_path / "source", network(), fd.Diffusion(fd.Schedule.linear()))
    else:
        pipeline(tmp_path / "source", network(), DDPM)
    plain, calls = _io.write, []

    def full(path, content):
        calls.append(path)
        if len(calls) == 2:
            raise OSError("no space left on device")
        plain(path, content)

    monkeypatch.setattr("fastdiff._io.write", full)
    assert run("convert", tmp_path / "source", tmp_path / "out", "--to", to) == 2
    assert "no space left" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
