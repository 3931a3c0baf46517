"""Training continues as if it had never stopped; bad runs end early."""

import math

import pytest
import torch
from train_tools import cloud, images, write_model

from fastdiff import MLP, InputError
from fastdiff.training import checkpoint
from fastdiff.training.config import TrainConfig
from fastdiff.training.data import from_tensor
from fastdiff.training.presets import PRESETS, RECIPES, build_model, model_config
from fastdiff.training.run import load_run
from fastdiff.training.trainer import Trainer


@pytest.fixture
def tiny(tmp_path):
    return write_model(tmp_path)


def weights(trainer):
    average = trainer.averages["0.999"].tensors
    return [p.clone() for tensors in (trainer.model.state_dict(), average) for p in tensors.values()]


class Stop(Exception):
    pass


def stop_after(trainer, steps):
    """Train, and be interrupted before step ``steps``."""
    original = trainer.train_step

    def step(i, *args, **how):
        if i == steps:
            raise Stop
        return original(i, *args, **how)

    trainer.train_step = step
    with pytest.raises(Stop):
        trainer.train()


# ---- resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 4, 5, 9])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resuming_is_bit_equal_to_never_stopping(tiny, tmp_path, stop, precision):
    config = TrainConfig(model=tiny, train_steps=10, batch=7, save_every=4, warmup=3, precision=precision)
    whole = Trainer(config, images(), tmp_path / "whole")
    whole.train()
    stop_after(Trainer(config, images(), tmp_path / "cut"), stop)
    if stop < 4:
        with pytest.raises(InputError, match="holds no checkpoint"):
            Trainer(config, images(), tmp_path / "cut", resume=True)
        return
    torch.manual_seed(999)  # the global generator must not matter
    resumed = Trainer(config, images(), tmp_path / "cut", resume=True)
    assert resumed.step == stop // 4 * 4
    resumed.train()
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    assert whole.losses() == resumed.losses()
    assert len(whole.losses()) == 10
    saved = [checkpoint.load(tmp_path / name).files for name in ("whole", "cut")]
    assert saved[0] == saved[1]


def test_two_runs_of_a_seed_are_equal_and_two_seeds_are_not(tiny, tmp_path):
    runs = []
    for i, seed in enumerate((1, 1, 2)):
        trainer = Trainer(TrainConfig(model=tiny, train_steps=3, batch=5, seed=seed), images(), tmp_path / str(i))
        trainer.train()
        runs.append(weights(trainer))
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))


def test_a_run_can_be_made_longer_at_a_constant_rate(tiny, tmp_path):
    short = TrainConfig(model=tiny, train_steps=3, batch=4, decay="constant")
    Trainer(short, images(), tmp_path).train()
    longer = Trainer(TrainConfig(model=tiny, train_steps=5, batch=4, decay="constant"), images(), tmp_path, resume=True)
    longer.train()
    assert longer.step == 5


def test_resuming_names_what_differs(tiny, tmp_path):
    Trainer(TrainConfig(model=tiny, train_steps=2, batch=4), images(), tmp_path).train()
    with pytest.raises(InputError, match=r"training\.batch was 4 and is 5"):
        Trainer(TrainConfig(model=tiny, train_steps=2, batch=5), images(), tmp_path, resume=True)
    with pytest.raises(InputError, match=r"diffusion\.schedule\.name was 'cosine' and is 'linear'"):
        Trainer(TrainConfig(model=tiny, train_steps=2, batch=4, schedule="linear"), images(), tmp_path, resume=True)


def test_a_used_directory_is_refused(tiny, tmp_path):
    config = TrainConfig(model=tiny, train_steps=2, batch=4)
    Trainer(config, images(), tmp_path).train()
    with pytest.raises(InputError, match="already holds a run"):
        Trainer(config, images(), tmp_path)


def test_training_leaves_the_global_generator_alone(tiny, tmp_path):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Trainer(TrainConfig(model=tiny, train_steps=2, batch=4), images(), tmp_path).train()
    assert torch.equal(torch.get_rng_state(), before)


# ---- what a step does ----------------------------------------------------------------------------


def test_training_learns(tmp_path):
    config = TrainConfig(train_steps=300, batch=64, warmup=10)
    corners = torch.tensor([[-1.0, -2.0], [1.0, 2.0]]).repeat(200, 1)
    trainer = Trainer(config, from_tensor("corners", corners), tmp_path)
    trainer.train()
    losses = trainer.losses()
    assert sum(losses[-30:]) < 0.6 * sum(losses[:30])


@pytest.mark.parametrize("loss", ["simple", "vlb", "hybrid", "min_snr", "snr_sample"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_every_loss_trains_images_and_points(tiny, tmp_path, loss, prediction):
    variance = "learned_range" if loss in ("vlb", "hybrid") else "fixed_small"
    for name, data, model in (("images", images(), "unet-small"), ("points", cloud(), "auto")):
        settings = {"train_steps": 2, "batch": 4, "loss": loss, "prediction": prediction, "variance": variance}
        trainer = Trainer(TrainConfig(model=model, **settings), data, tmp_path / name)
        trainer.train()
        assert all(math.isfinite(value) for value in trainer.losses())


def test_learning_rate_warms_up_and_decays():
    config = TrainConfig(learning_rate=0.1, warmup=10, train_steps=100, decay="cosine")
    rates = [config.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.01, rel=1e-3)
    assert max(rates) == pytest.approx(0.1, rel=0.03)
    assert rates[50] == pytest.approx(0.05)
    assert 0 < rates[-1] < 1e-4
    constant = TrainConfig(learning_rate=0.1, warmup=0, train_steps=100, decay="constant")
    assert {constant.learning_rate_at(step) for step in range(100)} == {0.1}


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_labels_are_dropped_at_their_share(tiny, tmp_path, share):
    trainer = Trainer(TrainConfig(model=tiny, label_dropout=share), images(), tmp_path)
    y, places = torch.arange(4000) % 3, torch.arange(4000)
    dropped = trainer.objective.drop_labels({"y": y}, places, 0)["y"]
    kept = dropped == y
    assert dropped[~kept].eq(3).all()
    assert (~kept).float().mean().item() == pytest.approx(share, abs=5 * math.sqrt(share * 0.7 / 4000) + 1e-9)
    assert torch.equal(dropped[1000:], trainer.objective.drop_labels({"y": y[1000:]}, places[1000:], 0)["y"])


@pytest.mark.parametrize("clip_grad", [1e-3, 1e3])
def test_gradients_that_are_too_long_are_clipped(tmp_path, clip_grad):
    trainer = Trainer(TrainConfig(clip_grad=clip_grad, batch=8), cloud(), tmp_path)
    row = next(trainer.steps())
    norm = torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm()
    assert float(norm) == pytest.approx(min(row["grad_norm"], clip_grad), rel=1e-5)


# ---- models by name ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ("auto", "mlp", "classifier")])
@pytest.mark.parametrize("size", [8, 28, 32, 64])
def test_presets_fit_image_sizes(name, size):
    x = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    config = model_config(name, from_tensor("blank", x), learned_variance=True)
    with torch.device("meta"):
        model = build_model(config)
    assert model.conv_out.out_channels == 6
    assert model.config["image_size"] == size


def test_recipes_name_settings_that_exist():
    for recipe in RECIPES.values():
        TrainConfig(**recipe)


def test_a_run_is_loaded_with_its_average(tiny, tmp_path):
    trainer = Trainer(TrainConfig(model=tiny, train_steps=3, batch=4, schedule="linear"), images(), tmp_path)
    trainer.train()
    run = load_run(tmp_path)
    assert run.step == 3
    assert run.data.to_json() == trainer.data.to_json()
    assert run.diffusion.schedule.config == trainer.diffusion.schedule.config
    average = trainer.averages["0.999"].tensors
    assert all(torch.equal(value, average[name]) for name, value in run.model.state_dict().items())
    assert not run.model.training


def test_weights_that_do_not_fit_are_named(tmp_path):
    Trainer(TrainConfig(train_steps=1, batch=2), cloud(), tmp_path).train()
    saved = checkpoint.load(tmp_path)
    config = {**saved.json("config"), "model": MLP(2, width=16).config | {"type": "mlp"}}
    checkpoint.save(tmp_path, 2, {"ema": saved.tensors("ema")}, {"config": config})
    with pytest.raises(InputError, match="size mismatch"):
        load_run(tmp_path)
