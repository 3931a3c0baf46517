"""Training continues as if it had never stopped; the average of weights has its closed form; bad runs end early."""

import json
import math

import pytest
import torch
from torch import nn

from fastdiff import MLP, InputError
from fastdiff.training import checkpoint
from fastdiff.training.data import from_tensor
from fastdiff.training.ema import EMA
from fastdiff.training.presets import PRESETS, RECIPES, build_model, model_config
from fastdiff.training.run import load_run
from fastdiff.training.trainer import TrainConfig, Trainer, _Order


def images(count=24, classes=3):
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return from_tensor("noise", x, torch.arange(count) % classes, [str(i) for i in range(classes)])


def cloud(count=50):
    return from_tensor("cloud", torch.randn(count, 2, generator=torch.Generator().manual_seed(5)))


@pytest.fixture
def tiny(tmp_path):
    """A U-Net with dropout, so that resuming has a random generator to lose."""
    path = tmp_path / "tiny.json"
    path.write_text(
        json.dumps(
            {
                "type": "unet",
                "image_size": 8,
                "in_channels": 1,
                "model_channels": 8,
                "channel_mult": [1, 2],
                "num_res_blocks": 1,
                "attention_resolutions": [4],
                "norm_groups": 4,
                "num_classes": 3,
                "dropout": 0.2,
            }
        )
    )
    return str(path)


def weights(trainer):
    return [p.clone() for model in (trainer.model, trainer.ema.model) for p in model.state_dict().values()]


class Stop(Exception):
    pass


def stop_after(trainer, steps):
    """Train, and be interrupted before step ``steps``."""
    original = trainer.train_step

    def step(i):
        if i == steps:
            raise Stop
        return original(i)

    trainer.train_step = step
    with pytest.raises(Stop):
        trainer.train()


# ---- the average of weights ------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.9999])
def test_ema_closed_form(decay):
    model = nn.Linear(3, 2).double()
    ema = EMA(model, decay)
    history, factors = [model.weight.detach().clone()], []
    for step in range(60):
        with torch.no_grad():
            model.weight.copy_(torch.full_like(model.weight, math.sin(step)))
        ema.update(model, step)
        history.append(model.weight.detach().clone())
        factors.append(min(decay, (1 + step) / (10 + step)))
    # sum over k of (1 - d_k) d_{k+1} ... d_n w_k, with the initial weights as the zeroth
    shares = [math.prod(factors)] + [(1 - d) * math.prod(factors[k + 1 :]) for k, d in enumerate(factors)]
    expected = sum(share * w for share, w in zip(shares, history, strict=True))
    assert sum(shares) == pytest.approx(1, abs=1e-12)
    assert (ema.model.weight - expected).abs().max() < 1e-12


def test_ema_leaves_the_model_alone_and_copies_buffers():
    model = nn.BatchNorm1d(2)
    ema = EMA(model, 0.9)
    model.running_mean.fill_(3.0)
    before = [p.clone() for p in model.parameters()]
    ema.update(model, 0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert ema.model.running_mean.eq(3).all()
    assert not ema.model.training
    assert not any(p.requires_grad for p in ema.model.parameters())


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0, float("nan")])
def test_ema_refuses(decay):
    with pytest.raises(InputError, match="ema_decay"):
        EMA(nn.Linear(1, 1), decay)


# ---- the order of the data ---------------------------------------------------------------------


@pytest.mark.parametrize(("size", "batch"), [(10, 3), (7, 7), (5, 12), (1, 4)])
def test_every_epoch_sees_every_sample_once(size, batch):
    order = _Order(size, seed=3)
    seen = torch.cat([order.batch(step, batch) for step in range(4 * size)])
    epochs = seen[: len(seen) // size * size].reshape(-1, size)
    assert torch.equal(epochs.sort(1).values, torch.arange(size).expand_as(epochs))


def test_the_order_depends_on_seed_and_step_only():
    forward = [_Order(20, 1).batch(step, 8) for step in range(10)]
    order = _Order(20, 1)
    backward = [order.batch(step, 8) for step in reversed(range(10))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not torch.equal(forward[0], _Order(20, 2).batch(0, 8))


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
    y = torch.arange(4000) % 3
    dropped = trainer._drop_labels({"y": y}, 0)["y"]
    kept = dropped == y
    assert dropped[~kept].eq(3).all()
    assert (~kept).float().mean().item() == pytest.approx(share, abs=5 * math.sqrt(share * 0.7 / 4000) + 1e-9)
    assert torch.equal(dropped, trainer._drop_labels({"y": y}, 0)["y"])


def test_gradients_are_clipped(tmp_path):
    trainer = Trainer(TrainConfig(clip_grad=1e-3, batch=8), cloud(), tmp_path)
    trainer.train_step(0)
    norm = torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm()
    assert norm <= 1e-3 * 1.001


def test_a_loss_that_is_not_finite_stops_training_and_is_not_saved(tmp_path):
    trainer = Trainer(TrainConfig(train_steps=20, batch=4, save_every=5), cloud(), tmp_path)
    original = trainer.train_step

    def step(i):
        if i == 12:
            with torch.no_grad():
                trainer.model.out.bias.fill_(float("nan"))
        return original(i)

    trainer.train_step = step
    with pytest.raises(InputError, match=r"the loss is nan at training step 12.*step-00000010"):
        trainer.train()
    assert checkpoint.load(tmp_path).step == 10


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
    average = trainer.ema.model.state_dict()
    assert all(torch.equal(value, average[name]) for name, value in run.model.state_dict().items())
    assert not run.model.training


def test_weights_that_do_not_fit_are_named(tmp_path):
    Trainer(TrainConfig(train_steps=1, batch=2), cloud(), tmp_path).train()
    saved = checkpoint.load(tmp_path)
    config = {**saved.json("config"), "model": MLP(2, width=16).config | {"type": "mlp"}}
    checkpoint.save(tmp_path, 2, {"ema": saved.tensors("ema")}, {"config": config})
    with pytest.raises(InputError, match="size mismatch"):
        load_run(tmp_path)
