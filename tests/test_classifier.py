"""The classifier: against another assembly, its gradient against differences, what it learns, reads and guides."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import guided_diffusion_unet as guided
import pytest
import torch
from oracles import Mixture, model_of
from torch import Tensor, nn
from torch.nn import functional as F
from weights_tools import randomise

import fastdiff as fd
from fastdiff.guidance import ClassifierGuidance
from fastdiff.metrics.features import extract
from fastdiff.models import guided_diffusion as names
from fastdiff.models import weights
from fastdiff.training import checkpoint
from fastdiff.training.classification import CLEAN, cross_entropies
from fastdiff.training.config import TrainConfig
from fastdiff.training.data import Data, from_tensor, load
from fastdiff.training.log import read
from fastdiff.training.presets import build_model, model_config
from fastdiff.training.run import load_classifier, load_run
from fastdiff.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
Config = dict[str, Any]
SMALL: Config = {
    "image_size": 8,
    "in_channels": 1,
    "num_classes": 3,
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [4],
    "num_head_channels": 16,
    "norm_groups": 4,
}
CONFIGURATIONS: dict[str, Config] = {
    "adm": {},
    "average": {"pool": "average", "num_heads": 2, "num_head_channels": None},
    "ddpm": {"scale_shift": False, "resblock_updown": False, "attention_resolutions": []},
    "one level": {"channel_mult": [2], "attention_resolutions": [], "num_res_blocks": 2, "num_heads": 4},
}
configurations = pytest.mark.parametrize("name", CONFIGURATIONS)


def small(name: str = "adm", **settings: Any) -> fd.Classifier:
    torch.manual_seed(0)
    model = fd.Classifier(**{**SMALL, **CONFIGURATIONS[name], **settings})
    randomise(model)
    return model.eval()


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def far(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    assert a.shape == b.shape
    return float((a - b).detach().abs().max() / (b.detach().abs().max() + floor))


# ---- the network -------------------------------------------------------------------------------


class Pool(nn.Module):
    """Attention pooling as guided-diffusion's weights are laid out: what the mean, the first position, attends to."""

    def __init__(self, channels: int, width: int, positions: int, classes: int) -> None:
        super().__init__()
        self.heads = channels // width
        self.positional_embedding = nn.Parameter(torch.zeros(channels, positions + 1))
        self.qkv_proj, self.c_proj = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        x = torch.cat([x.mean(2, keepdim=True), x], 2) + self.positional_embedding
        q, k, v = self.qkv_proj(x).view(len(x), 3, self.heads, -1, x.shape[2]).unbind(1)
        weight = torch.einsum("nhct,nhcs->nhts", q, k) / math.sqrt(q.shape[2])
        out = torch.einsum("nhts,nhcs->nhct", weight.softmax(3), v).flatten(1, 2)
        return self.c_proj(out)[:, :, 0]


class EncoderUNetModel(guided.UNetModel):
    """The way down of the U-Net of guided-diffusion, with the classifier's ends."""

    def __init__(self, pool: str = "adaptive", **settings: Any) -> None:
        super().__init__(**settings)
        del self.output_blocks
        classes = settings["out_channels"]
        width = int(settings["channel_mult"][-1] * settings["model_channels"])
        positions = (settings["image_size"] // 2 ** (len(settings["channel_mult"]) - 1)) ** 2
        if pool == "attention":
            ends = [Pool(width, settings["num_head_channels"], positions, classes)]
        else:
            ends = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, classes, 1), nn.Flatten()]
        self.out = nn.Sequential(guided.norm(width), nn.SiLU(), *ends)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        emb = self.time_embed(guided.embedding(timesteps, self.model_channels).to(x.dtype))
        for block in (*self.input_blocks, self.middle_block):
            x = block(x, emb)
        return self.out(x)


def theirs(**settings: Any) -> Config:
    common = {"image_size": 8, "in_channels": 3, "model_channels": 32, "out_channels": 5, "num_res_blocks": 1}
    levels = {"attention_resolutions": [2], "channel_mult": [1, 2], "num_head_channels": 16}
    return {**common, **levels, "pool": "attention", **settings}


ADM = {"use_scale_shift_norm": True, "resblock_updown": True}
GUIDED: dict[str, Config] = {
    "adm": theirs(**ADM, num_res_blocks=2),
    "attention everywhere": theirs(attention_resolutions=[1, 2], num_head_channels=32, in_channels=1),
    "average": theirs(pool="adaptive", num_head_channels=-1, num_heads=4),
    "adm, average, newer": theirs(**ADM, pool="adaptive", use_new_attention_order=True),
    "no conv_resample": theirs(conv_resample=False, channel_mult=[1, 1, 2]),
    "fractions": theirs(**ADM, channel_mult=[0.5, 1.5, 1], model_channels=64, out_channels=2),
}


@pytest.mark.parametrize("name", GUIDED)
def test_a_classifier_of_guided_diffusion(name: str) -> None:
    """Logits and gradients of an assembly of its own, whose weights are read by their names."""
    config = GUIDED[name]
    other = EncoderUNetModel(**config)
    randomise(other)
    ours = fd.Classifier.from_guided_diffusion(other.state_dict(), config)
    assert not ours.training
    ends = names.CLASSIFIER_ENDS if config["pool"] == "attention" else names.AVERAGE_ENDS
    table = names.table(ours, config.get("use_new_attention_order", False), ends)
    assert {entry.ours for entry in table} == set(dict(ours.named_parameters()))
    for entry in table:
        its = other.get_parameter(entry.theirs).reshape(entry.shape)  # some matrices are convolutions of one place
        assert torch.equal(entry.give(ours.get_parameter(entry.ours)), its), entry
    for dtype, bounds in ((torch.float32, (1e-5, 1e-4)), (torch.float64, (1e-9, 1e-9))):
        x, t = drawn(2, config["in_channels"], 8, 8).to(dtype), torch.tensor([3, 917])
        mine, its = x.clone().requires_grad_(), x.clone().requires_grad_()
        a, b = ours.to(dtype)(mine, t), other.to(dtype)(its, t)
        weight = drawn(*b.shape, seed=2).to(dtype)
        (a * weight).sum().backward()
        (b * weight).sum().backward()
        grads = {name: parameter.grad for name, parameter in other.named_parameters()}
        floor = 0.01 * max(float(grad.abs().max()) for grad in grads.values())
        pairs = [
            (entry.give(ours.get_parameter(entry.ours).grad), grads[entry.theirs].reshape(entry.shape))
            for entry in table
        ]
        assert far(a, b) < bounds[0]
        assert max(far(mine.grad, its.grad), *(far(*pair, floor) for pair in pairs)) < bounds[1]
        ours.zero_grad()
        other.zero_grad()


def test_flags_of_guided_diffusion_stand_for_arguments(tmp_path: Path) -> None:
    flags = {"image_size": 64, "classifier_width": 64, "classifier_depth": 1, "classifier_use_fp16": True}
    config = names.classifier_constructor(flags)
    assert config["attention_resolutions"] == [2, 4, 8]
    other = EncoderUNetModel(**config)
    torch.save(other.state_dict(), tmp_path / "classifier.pt")
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    ours = fd.Classifier.from_guided_diffusion(tmp_path / "classifier.pt", tmp_path / "flags.json")
    x, t = drawn(1, 3, 64, 64).float(), torch.tensor([400])
    assert ours(x, t).shape == (1, 1000)
    assert far(ours(x, t), other(x, t)) < 1e-5
    assert ours.config["pool"] == "attention"


def test_the_flags_of_a_classifier_s_script_have_its_defaults() -> None:
    """ADM's classifier for 256 pixels has 54 million parameters."""
    config = names.classifier_arguments(names.classifier_constructor({"image_size": 256}))
    network = weights.empty(fd.Classifier, config)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(54.1e6, rel=0.01)
    assert network.config["attention_resolutions"] == [32, 16, 8]
    assert network.config["num_head_channels"] == 64


BAD_GUIDED = {
    "pool": ({"pool": "spatial"}, "pool='spatial' must be 'adaptive' or 'attention'"),
    "heads": ({"num_head_channels": -1}, "num_head_channels=-1 must be the width of a head"),
    "classes": ({"num_classes": 3}, "num_classes is not known"),
    "weights": ({"num_res_blocks": 3}, "missing: input_blocks"),
    "flags": ({"model_channels": None}, "image_size=8 must be 64 or 128 or 256 or 512"),
}


@pytest.mark.parametrize("case", BAD_GUIDED)
def test_what_no_classifier_of_guided_diffusion_is(case: str) -> None:
    settings, message = BAD_GUIDED[case]
    config = {**GUIDED["adm"], **settings}
    config = {"image_size": 8} if case == "flags" else config
    with pytest.raises(fd.InputError, match=f"fastdiff.Classifier.*{message}|{message}") as error:
        fd.Classifier.from_guided_diffusion(EncoderUNetModel(**GUIDED["adm"]).state_dict(), config)
    assert "\n" not in str(error.value)


@configurations
def test_logits_are_a_linear_function_of_the_features(name: str) -> None:
    model = small(name)
    x, t = drawn(3, 1, 8, 8).float(), torch.tensor([0.0, 17.5, 999.0])
    features = model.features(x, t)
    assert features.shape == (3, 32)
    assert far(features @ model.out.weight.T + model.out.bias, model(x, t)) < 1e-6
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(3)])
    assert far(alone, model(x, t)) < 1e-5
    assert far(model(x, t + 100), model(x, t)) > 1e-3  # it sees the time


def test_untrained_it_knows_nothing() -> None:
    model = fd.Classifier(**SMALL)
    assert (model(drawn(2, 1, 8, 8).float(), torch.tensor([0, 9])) == 0).all()


@configurations
def test_the_gradient_reaches_every_parameter_and_the_image(name: str) -> None:
    model = small(name, dropout=0.1).train()
    x = drawn(3, 1, 8, 8).float().requires_grad_()
    model(x, torch.tensor([0, 400, 999])).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().min() > 0
    assert all(p.grad is not None and p.grad.any() and p.grad.isfinite().all() for p in model.parameters())


@configurations
@torch.no_grad()
def test_precisions_and_layouts(name: str) -> None:
    x, t = drawn(4, 1, 8, 8), torch.arange(4)
    true = small(name).double()(x, t)
    assert true.dtype == torch.float64
    model = small(name)
    plain = model(x.float(), t)
    assert far(plain, true) < 1e-5
    assert far(model.prepared()(x.float(), t), plain) < 1e-5
    assert torch.equal(model(x.float().to(memory_format=torch.channels_last), t), plain)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(x.float(), t)
    for rounded in (cast, model.prepared(torch.bfloat16)(x.float(), t)):
        assert rounded.dtype == torch.float32
        assert 1e-5 < far(rounded, true) < 0.1
    assert small(name).bfloat16()(x.bfloat16(), t).dtype == torch.bfloat16


def test_a_configuration_builds_the_same_network_again() -> None:
    model = small("average")
    again = build_model({"type": "classifier", **json.loads(json.dumps(model.config))})
    again.load_state_dict(model.state_dict())
    x, t = drawn(2, 1, 8, 8).float(), torch.tensor([1, 2])
    assert torch.equal(again(x, t), model(x, t))


BAD_SETTINGS = {
    "num_classes": ({"num_classes": 0}, "num_classes=0 must be a whole number of at least 1"),
    "pool": ({"pool": "max"}, "pool='max' must be 'attention' or 'average'"),
    "image_size": ({"image_size": 9}, "image_size 9 cannot be halved 1 times"),
    "in_channels": ({"in_channels": None}, "in_channels=None must be"),
    "channel_mult": ({"channel_mult": []}, "channel_mult must name at least one level"),
    "attention": ({"attention_resolutions": [5]}, r"attention_resolutions \[5\] do not occur: the levels are \[8, 4\]"),
    "heads": ({"num_head_channels": 7}, "32 channels cannot be split into heads of 7"),
    "number of heads": ({"num_head_channels": None, "num_heads": 5}, "32 channels cannot be split into 5 attention"),
    "groups": ({"norm_groups": 3}, "16 channels cannot be split into 3 groups"),
    "dropout": ({"dropout": 1.0}, "dropout=1.0 must be a number of at least 0 and below 1"),
    "several": ({"pool": "max", "num_classes": 2.5}, "num_classes=2.5 must .*; pool='max' must"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_settings_that_do_not_fit_are_named(case: str) -> None:
    settings, message = BAD_SETTINGS[case]
    with pytest.raises(fd.InputError, match=message) as error:
        fd.Classifier(**{**SMALL, **settings})
    assert "\n" not in str(error.value)


BAD_INPUT = {
    "channels": ((torch.zeros(2, 3, 8, 8), torch.zeros(2)), r"x must be \[N, 1, 8, 8\], got \[2, 3, 8, 8\]"),
    "size": ((torch.zeros(2, 1, 16, 16), torch.zeros(2)), r"x must be \[N, 1, 8, 8\]"),
    "dimensions": ((torch.zeros(1, 8, 8), torch.zeros(1)), r"x must be \[N, 1, 8, 8\]"),
    "uint8": ((torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2)), "x must"),
    "times": ((torch.zeros(2, 1, 8, 8), torch.zeros(3)), "t must"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_input_that_does_not_fit_is_refused(case: str) -> None:
    arguments, message = BAD_INPUT[case]
    for method in (small(), small().features):
        with pytest.raises(fd.InputError, match=message):
            method(*arguments)


@configurations
def test_the_gradient_of_log_p_is_that_of_differences(name: str) -> None:
    """Central differences of log p(y | x_t) in float64 along directions of x."""
    guidance = ClassifierGuidance(small(name).double())
    x, t, y = drawn(2, 1, 8, 8), torch.tensor([3, 700]), torch.tensor([2, 0])

    def log_p(x: Tensor) -> Tensor:
        with torch.no_grad():
            return guidance.classifier(x, t).log_softmax(1).gather(1, y[:, None])[:, 0]

    slope = guidance.gradient(x, t, y)
    for seed in range(5):
        direction = drawn(2, 1, 8, 8, seed=10 + seed)
        differences = (log_p(x + 1e-5 * direction) - log_p(x - 1e-5 * direction)) / 2e-5
        assert far((slope * direction).flatten(1).sum(1), differences) < 1e-7


# ---- what it is trained for ----------------------------------------------------------------------


def spots(count: int = 600) -> Data:
    """Images 8 x 8 of three classes that a mixture describes: each has its own picture, and noise."""
    x = SPOTS.means[torch.arange(count) % 3] + SPOTS.stds[0] * drawn(count, 64, seed=7)
    images = ((x + 1) * 127.5).clamp(0, 255).float().view(count, 1, 8, 8)
    return from_tensor("spots", images, torch.arange(count) % 3, ["a", "b", "c"])


PLACES = 0.4 * F.interpolate(torch.eye(3, 4).double().view(3, 1, 2, 2), scale_factor=4.0)  # each class lights a corner
SPOTS = Mixture(torch.full((3,), 1 / 3).double(), PLACES.flatten(1), torch.full((3,), 0.15).double())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("configurations") / "tiny.json"
    path.write_text(json.dumps({"type": "classifier", **SMALL, "dropout": 0.1}))
    return str(path)


@pytest.fixture(scope="module")
def run(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of spots, trained."""
    out = tmp_path_factory.mktemp("runs") / "spots"
    config = TrainConfig(
        model=tiny, train_steps=120, batch=64, learning_rate=5e-3, warmup=10, ema="0.95", timesteps=100
    )
    Trainer(config, spots(), out).train()
    return out


def mean_of(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.mean() for name, value in values.items()}


@pytest.mark.parametrize("schedule", [fd.Schedule.cosine(50), fd.Schedule.edm(50), fd.Schedule.flow(50)], ids=repr)
def test_the_loss_is_the_cross_entropy_of_clean_and_noised_images(schedule: fd.Schedule) -> None:
    diffusion, model = fd.Diffusion(schedule, "sample"), small()
    x0, y = drawn(7, 1, 8, 8).float(), torch.arange(7) % 3
    values = mean_of(cross_entropies(model, diffusion, x0, y, seed=3, step=4, positions=torch.arange(7), batch=7))
    noise = fd.noise.normal(x0.shape, seed=3, step=4, stream=fd.noise.Stream.TRAINING)
    t = diffusion.draw_timesteps(7, seed=3, step=4)
    t[: math.ceil(CLEAN * 7)] = 0
    x_t = diffusion.add_noise(x0, noise, t)
    x_t[: math.ceil(CLEAN * 7)] = x0[: math.ceil(CLEAN * 7)]
    logits = model(schedule.c_in[t].float().view(-1, 1, 1, 1) * x_t, schedule.c_noise[t].float())
    expected = -logits.log_softmax(1)[torch.arange(7), y].mean()
    assert far(values["loss"], expected) < 1e-5
    assert 0 < float(values["accuracy"]) < 1
    assert float(values["accuracy"]) == pytest.approx(int((logits.argmax(1) == y).sum()) / 7)
    other = mean_of(cross_entropies(model, diffusion, x0, y, seed=3, step=5, positions=torch.arange(7), batch=7))
    assert far(other["loss"], values["loss"]) > 1e-4


class Stop(Exception):
    pass


def test_resuming_is_bit_equal_to_never_stopping(tiny: str, tmp_path: Path) -> None:
    config = TrainConfig(model=tiny, train_steps=7, batch=9, save_every=3, warmup=2)
    whole = Trainer(config, spots(30), tmp_path / "whole")
    whole.train()
    cut = Trainer(config, spots(30), tmp_path / "cut")
    step = cut.train_step

    def stopping(i: int, *args: Any, **how: Any) -> dict[str, Any]:
        if i == 5:
            raise Stop
        return step(i, *args, **how)

    cut.train_step = stopping  # type: ignore[method-assign]
    with pytest.raises(Stop):
        cut.train()
    resumed = Trainer(config, spots(30), tmp_path / "cut", resume=True)
    assert resumed.step == 3
    resumed.train()
    saved = [checkpoint.load(tmp_path / name).files for name in ("whole", "cut")]
    assert saved[0] == saved[1]
    rows, others = (read(tmp_path / name / "log.jsonl") for name in ("whole", "cut"))
    assert [row["step"] for row in rows] == [row["step"] for row in others] == list(range(7))
    for name in ("loss", "accuracy", "grad_norm", "learning_rate"):
        assert [row[name] for row in rows] == [row[name] for row in others]
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    assert whole.losses() == [row["loss"] for row in rows]


def test_it_learns(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    first, last = (sum(row["loss"] for row in part) / 20 for part in (rows[:20], rows[-20:]))
    assert last < 0.6 * first
    assert sum(row["accuracy"] for row in rows[-20:]) / 20 > 0.7
    read = load_classifier(run)
    x, y = spots().batch(torch.arange(300))
    assert y is not None
    logits = read(spots().to_raw(x)).logits
    assert logits is not None
    assert (logits.argmax(1) == y).float().mean() > 0.98


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("schedule", ["linear", "edm", "flow"])
def test_every_schedule_and_precision_trains(tiny: str, tmp_path: Path, schedule: str, precision: str) -> None:
    config = TrainConfig(model=tiny, train_steps=2, batch=5, schedule=schedule, precision=precision)
    trainer = Trainer(config, spots(20), tmp_path)
    trainer.train()
    assert all(math.isfinite(loss) for loss in trainer.losses())


@pytest.mark.parametrize("size", [8, 28, 32, 64, 7])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_preset_fits_image_sizes(size: int, channels: int) -> None:
    x = torch.zeros(2, channels, size, size, dtype=torch.uint8)
    config = model_config("classifier", from_tensor("blank", x, torch.tensor([0, 1]), ["no", "yes"]))
    model = build_model(config)
    assert model(torch.zeros(1, channels, size, size), torch.zeros(1)).shape == (1, 2)
    assert sum(p.numel() for p in model.parameters()) < 2e6


def test_what_no_classifier_can_be_trained_on(tiny: str, tmp_path: Path) -> None:
    unlabelled = from_tensor("blank", torch.zeros(4, 1, 8, 8, dtype=torch.uint8))
    four = from_tensor("four", torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4), list("abcd"))
    for model in ("classifier", tiny):
        for data in (unlabelled, load("parabola")):
            with pytest.raises(fd.InputError, match=f"{data.name} has no labels, .*: digits, mnist, .* folder:PATH"):
                Trainer(TrainConfig(model=model), data, tmp_path / "run")
    with pytest.raises(fd.InputError, match="num_classes=3 must be 4, the classes of four"):
        Trainer(TrainConfig(model=tiny), four, tmp_path / "run")
    for setting in ({"prediction": "epsilon"}, {"loss": "min_snr"}, {"label_dropout": 0.2}):
        with pytest.raises(fd.InputError, match=f"{next(iter(setting))}: settings of diffusion models"):
            Trainer(TrainConfig(model="classifier", **setting), four, tmp_path / "run")
    large = from_tensor("large", torch.zeros(3, 1, 16, 16, dtype=torch.uint8), torch.arange(3), list("abc"))
    with pytest.raises(fd.InputError, match=r"x must be \[N, 1, 8, 8\]"):
        Trainer(TrainConfig(model=tiny), large, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- what reads images -----------------------------------------------------------------------------


def test_a_run_is_an_extractor(run: Path) -> None:
    read = load_classifier(run)
    x, _ = spots().batch(torch.arange(5))
    images = spots().to_raw(x)
    features = extract(read, images)
    model, t = read.model, torch.zeros(5, dtype=torch.int64)
    scaled = images.float() / 127.5 - 1
    assert far(features.pool, model.features(scaled, t)) < 1e-5
    assert features.logits is not None
    assert far(features.logits, model(scaled, t)) < 1e-5
    assert features.spatial is None
    assert features.pool.dtype == torch.float32
    saved = checkpoint.load(run)
    digest = hashlib.sha256(saved.files["ema.safetensors"]).hexdigest()
    assert read.settings == {"features": "classifier", "weights": digest, "resize": "none"}
    average = saved.tensors("ema")
    assert all(torch.equal(value, average[name]) for name, value in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())
    assert (read.step, read.data.name, len(read.diffusion.schedule)) == (120, "spots", 100)


def test_images_it_cannot_read_are_refused(run: Path) -> None:
    read = load_classifier(run)
    for shape in ((2, 3, 8, 8), (2, 1, 16, 16), (2, 1, 8, 9)):
        with pytest.raises(fd.InputError, match=r"this classifier of spots reads images \[N, 1, 8, 8\], got"):
            read(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(fd.InputError, match="images must be uint8"):
        read(torch.zeros(2, 1, 8, 8))


def test_runs_are_told_apart(run: Path, tmp_path: Path) -> None:
    with pytest.raises(fd.InputError, match="holds a classifier: give the run of a diffusion model"):
        load_run(run)
    cloud = from_tensor("cloud", drawn(20, 2).float())
    Trainer(TrainConfig(train_steps=1, batch=2), cloud, tmp_path).train()
    with pytest.raises(fd.InputError, match="holds no classifier but a MLP: fastdiff train --classifier makes one"):
        load_classifier(tmp_path)
    with pytest.raises(fd.InputError, match="does not exist"):
        load_classifier(tmp_path / "nothing")


# ---- what guides -----------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp_2m"])
def test_guidance_makes_the_class_asked_for(run: Path, solver: str) -> None:
    """The exact unconditional model, guided by the trained classifier."""
    read, count = load_classifier(run), 60
    exact = model_of(SPOTS, read.diffusion)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return exact(x.flatten(1), t).view_as(x).to(x.dtype)

    y = torch.arange(count) % 3
    made = {}
    for scale in (0.0, 3.0):
        guidance = ClassifierGuidance(read.model)
        sampler = fd.Sampler(model, read.diffusion, solver, 20, guidance_scale=scale, guidance=guidance)
        x = sampler((count, 1, 8, 8), seed=1, y=y)
        nearest = torch.cdist(x.flatten(1).double(), SPOTS.means).argmin(1)
        made[scale] = float((nearest == y).double().mean())
    assert made[0.0] < 0.55
    assert made[3.0] > 0.9


@pytest.mark.slow
def test_digits_are_read_and_made(tmp_path: Path) -> None:
    """The preset reads held-out digits; an unconditional U-Net makes, guided by it, the digits asked for."""
    from sklearn.svm import SVC

    data = load("digits")
    x, y = data.batch(torch.arange(len(data)))
    assert y is not None
    out = torch.arange(len(data)) % 5 == 0
    train = from_tensor("digits", ((x + 1) * 127.5)[~out], y[~out], data.classes)
    Trainer(TrainConfig.by_model(train, model="classifier"), train, tmp_path / "classifier").train()
    read = load_classifier(tmp_path / "classifier")
    clean = read(data.to_raw(x[out])).logits
    assert clean is not None
    assert (clean.argmax(1) == y[out]).float().mean() >= 0.97
    accuracy = []
    for t in (0, 250, 500, 900):
        times = torch.full((int(out.sum()),), t)
        x_t = read.diffusion.add_noise(x[out], fd.noise.normal(x[out].shape, seed=1, step=t), times)
        accuracy.append(float((read.model(x_t, times).argmax(1) == y[out]).float().mean()))
    assert accuracy == sorted(accuracy, reverse=True)
    assert accuracy[1] > 0.9
    network = {**model_config("unet-small", train), "num_classes": None}
    (tmp_path / "unet.json").write_text(json.dumps(network))
    config = TrainConfig(model=str(tmp_path / "unet.json"), train_steps=300, label_dropout=0.0)
    Trainer(config, train, tmp_path / "unet").train()
    made = load_run(tmp_path / "unet")
    asked = torch.arange(200) % 10
    judge = SVC(gamma="scale").fit(x[~out].flatten(1).numpy(), y[~out].numpy())
    shares = {}
    for scale in (0.0, 4.0):
        guidance = ClassifierGuidance(read.model)
        sampler = fd.Sampler(made.model, made.diffusion, "ddim", 25, guidance_scale=scale, guidance=guidance, clip=1.0)
        digits = sampler((200, 1, 8, 8), seed=0, y=asked)
        shares[scale] = float(judge.score(digits.flatten(1).numpy(), asked.numpy()))
    print(f"held out, by noise level: {accuracy}; samples of the class asked for, by scale: {shares}")
    assert shares[0.0] < 0.25
    assert shares[4.0] > 0.9
