"""FID's network and its resizes: against scalar loops, torchvision's blocks with other pools, Pillow, and the peers."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.models import inception as blocks

import fastdiff as fd
from fastdiff.metrics import inception as module
from fastdiff.metrics.features import Features, extract
from fastdiff.metrics.inception import PRESETS, SHA256, WEIGHTS, Inception
from fastdiff.metrics.resize import RESIZES, resize_bilinear, resize_clean, resize_tf1

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-4
SIZES = [(1, 1, 4), (2, 5, 3), (8, 8, 21), (7, 12, 7), (40, 9, 13), (256, 3, 11)]
BACKENDS: Any = torch.backends
SWITCHES = (BACKENDS.cudnn.conv, BACKENDS.mkldnn.conv)
Weights = dict[str, Tensor]


def images_of(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


# ---- sizes ----------------------------------------------------------------------------------


def by_scalars(channel: np.ndarray, size: int) -> np.ndarray:
    """TensorFlow 1's bilinear resize, one pixel after another: places in float32 as there, values in float64."""
    result = np.empty((size, size))
    scales = [np.float32(length) / np.float32(size) for length in channel.shape]
    for index in np.ndindex(size, size):
        places = [np.float32(i) * scale for i, scale in zip(index, scales, strict=True)]
        (y, dy), (x, dx) = ((int(place), float(place) - int(place)) for place in places)
        below, right = min(y + 1, channel.shape[0] - 1), min(x + 1, channel.shape[1] - 1)
        top = (1 - dx) * channel[y, x] + dx * channel[y, right]
        bottom = (1 - dx) * channel[below, x] + dx * channel[below, right]
        result[index] = (1 - dy) * top + dy * bottom
    return result


@pytest.mark.parametrize(("height", "width", "size"), SIZES)
def test_tf1_is_the_scalar_loop(height: int, width: int, size: int) -> None:
    images = images_of(2, 3, height, width)
    expected = [[by_scalars(channel.double().numpy(), size) for channel in image] for image in images]
    assert (resize_tf1(images, size) - torch.tensor(np.array(expected))).abs().max() <= 1e-4


def test_tf1_keeps_the_corner_and_repeats_the_last_pixel() -> None:
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    expected = torch.tensor([0, 0.5, 1, 1.5, 2, 2.5, 3, 3])
    assert torch.equal(resize_tf1(ramp, 8)[0, 0], expected.expand(8, 8))
    assert torch.equal(resize_tf1(ramp.mT, 8)[0, 0], expected[:, None].expand(8, 8))
    assert torch.equal(resize_tf1(ramp, 2)[0, 0, 0], torch.tensor([0.0, 2.0]))  # nothing averaged


def test_bilinear_keeps_the_centre() -> None:
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    assert torch.equal(resize_bilinear(ramp, 8)[0, 0, 0], torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]))
    assert torch.equal(resize_bilinear(ramp, 2)[0, 0, 0], torch.tensor([0.5, 2.5]))


@pytest.mark.parametrize(("height", "width", "size"), [*SIZES, (32, 32, 299), (400, 512, 299)])
def test_clean_is_pillow_s_on_floats(height: int, width: int, size: int) -> None:
    images = images_of(2, 3, height, width)
    for channel, result in zip(images.flatten(0, 1), resize_clean(images, size).flatten(0, 1), strict=True):
        expected = Image.fromarray(channel.float().numpy()).resize((size, size), Image.Resampling.BICUBIC)
        assert (result - torch.tensor(np.asarray(expected)).clamp(0, 255)).abs().max() <= 1e-4


@pytest.mark.parametrize("name", RESIZES)
def test_a_resize_takes_bytes_and_floats_and_no_images(name: str) -> None:
    resize, images = RESIZES[name], images_of(2, 1, 6, 9)
    result = resize(images, 5)
    assert (result.dtype, result.shape) == (torch.float32, (2, 1, 5, 5))
    assert torch.equal(result, result.clamp(0, 255))
    assert torch.equal(resize(images.double(), 5), result)
    assert resize(images[:0], 5).shape == (0, 1, 5, 5)
    assert torch.equal(resize(images_of(1, 3, 7, 7), 7), images_of(1, 3, 7, 7).float())


@pytest.mark.parametrize("name", RESIZES)
def test_what_cannot_be_resized(name: str) -> None:
    for images, size in ((images_of(3, 8, 8), 4), (images_of(1, 3, 0, 8), 4), (images_of(1, 3, 8, 8), 0)):
        with pytest.raises(fd.InputError, match="must be"):
            RESIZES[name](images, size)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (8, 8), (32, 32), (37, 53), (256, 256), (1024, 77), (299, 299)])
def test_tf1_has_torch_fidelity_s_bits(height: int, width: int) -> None:
    peer = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    images = images_of(1, 3, height, width)
    expected = peer.interpolate_bilinear_2d_like_tensorflow1x(images.float(), (299, 299), align_corners=False)
    assert torch.equal(resize_tf1(images, 299), expected)


# ---- the network ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights() -> Weights:
    """Random weights under which activations keep their size; every statistic and scale of its own."""
    rng = torch.Generator().manual_seed(0)
    weights = dict(Inception().state_dict())
    for name, value in weights.items():
        if name.endswith(("bn.weight", "running_var")):
            value.uniform_(0.5, 1.5, generator=rng)
        elif value.ndim > 0:
            scale = (2 / value[0].numel()) ** 0.5 if name.endswith("conv.weight") else 0.3
            value.normal_(0, 0.03 if name == "fc.weight" else scale, generator=rng)
    return weights


@pytest.fixture(scope="module")
def images() -> Tensor:
    """A smooth picture and a rough one, wider than high."""
    y, x = torch.meshgrid(torch.arange(40), torch.arange(56), indexing="ij")
    smooth = torch.stack([127 + 120 * torch.sin((a * y + b * x) / 9) for a, b in ((1, 2), (0, 1), (-2, 1))])
    return torch.stack((smooth.to(torch.uint8), images_of(3, 40, 56)))


@pytest.fixture(scope="module")
def network(weights: Weights) -> Inception:
    network = Inception()
    network.load_state_dict(weights)
    return network


@pytest.fixture(scope="module")
def features(network: Inception, images: Tensor) -> Features:
    return network(images)


def apart(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max())


def neighbours(x: Tensor, padding: float) -> Tensor:
    """The nine values around every pixel, ``[9, N, C, H, W]``."""
    height, width = x.shape[2:]
    wide = F.pad(x, (1, 1, 1, 1), value=padding)
    return torch.stack([wide[..., i : i + height, j : j + width] for i in range(3) for j in range(3)])


def average(x: Tensor) -> Tensor:
    """Of the neighbours that there are."""
    return neighbours(x, 0.0).sum(0) / neighbours(torch.ones_like(x), 0.0).sum(0)


def repool(block: nn.Module, pool: Any) -> None:
    """Let torchvision's block use another pool: its input is kept, and given to ``branch_pool`` pooled."""
    kept: list[Tensor] = []
    block.register_forward_pre_hook(lambda block, args: kept.append(args[0]))
    block.branch_pool.register_forward_pre_hook(lambda block, args: (pool(kept.pop()),))


def torchvision_network(weights: Weights) -> Any:
    peer = blocks.inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
    peer.load_state_dict(weights)
    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        repool(getattr(peer, f"Mixed_{name}"), average)
    repool(peer.Mixed_7c, lambda x: neighbours(x, -torch.inf).amax(0))
    return peer.eval().requires_grad_(False)


def test_features_are_those_of_torchvision_s_network_with_other_pools(
    weights: Weights, images: Tensor, features: Features
) -> None:
    peer = torchvision_network(weights)
    seen = {}
    peer.avgpool.register_forward_hook(lambda layer, args, out: seen.update(pool=out.flatten(1)))
    peer.Mixed_6d.branch1x1.register_forward_hook(lambda layer, args, out: seen.update(spatial=out))
    logits = peer((resize_tf1(images, 299) - 128) / 128) - weights["fc.bias"]
    channels_last = seen["spatial"].numpy().transpose(0, 2, 3, 1)[..., :7].reshape(2, -1)  # as evaluators save them
    assert apart(features.pool, seen["pool"]) <= TOLERANCE
    assert apart(features.spatial, torch.tensor(channels_last)) <= TOLERANCE
    assert apart(features.logits, logits) <= TOLERANCE
    for value, width in zip(features, (2048, 2023, 1008), strict=True):
        assert value.shape == (2, width)
        assert 0.5 < value.abs().mean() < 10  # the tolerance means something
        assert apart(value[0], value[1]) > 0.1


POOLS = {
    "Mixed_5c": (average, 64),
    "Mixed_6b": (average, 192),
    "Mixed_7b": (average, 192),
    "Mixed_7c": (lambda x: neighbours(x, -torch.inf).amax(0), 192),
}


@pytest.mark.parametrize("name", POOLS)
def test_a_block_pools_by_its_rule_and_is_torchvision_s_elsewhere(name: str, weights: Weights) -> None:
    pool, channels = POOLS[name]
    block = getattr(Inception(), name)
    block.load_state_dict({key[len(name) + 1 :]: value for key, value in weights.items() if key.startswith(name)})
    width = block.branch_pool.conv.in_channels
    makers = {"5": (blocks.InceptionA, width, 64), "6": (blocks.InceptionC, width, 128)}
    maker, *sizes = makers.get(name[6], (blocks.InceptionE, width))
    peer = maker(*sizes).eval().requires_grad_(False)
    peer.load_state_dict(block.state_dict())
    x = torch.randn(1, width, 4, 3, generator=torch.Generator().manual_seed(2))
    expected, result = peer(x), block(x)
    assert apart(result[:, :-channels], expected[:, :-channels]) <= TOLERANCE
    assert apart(result[:, -channels:], peer.branch_pool(pool(x))) <= TOLERANCE
    assert apart(result[:, -channels:], expected[:, -channels:]) > 0.1


def test_state_dict_is_torchvision_s() -> None:
    with torch.device("meta"):
        peer = blocks.inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
        ours = Inception().state_dict()
    assert {name: value.shape for name, value in ours.items()} == {k: v.shape for k, v in peer.state_dict().items()}
    assert {m.eps for m in Inception().modules() if isinstance(m, nn.BatchNorm2d)} == {0.001}


def test_features_are_torch_fidelity_s(weights: Weights, images: Tensor, features: Features, file: Path) -> None:
    peer = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    names, path = ["2048", "logits_unbiased", "logits"], str(file)
    extractor = peer.FeatureExtractorInceptionV3("inception", names, feature_extractor_weights_path=path)
    pool, logits, biased = extractor(images[:1])
    assert apart(features.pool[:1], pool) <= TOLERANCE
    assert apart(features.logits[:1], logits) <= TOLERANCE
    assert apart(features.logits[:1] + weights["fc.bias"], biased) <= TOLERANCE


def test_features_are_pytorch_fid_s(
    weights: Weights, images: Tensor, features: Features, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = pytest.importorskip("pytorch_fid.inception")
    monkeypatch.setattr(peer, "load_state_dict_from_url", lambda url, progress: weights)
    expected = peer.InceptionV3().eval()(images[:1] / 255)[0].flatten(1)
    ours = Inception(preset="pytorch-fid")
    ours.load_state_dict(weights)
    pool = ours(images[:1]).pool
    assert apart(pool, expected) <= TOLERANCE
    assert apart(pool, features.pool[:1]) > 10 * TOLERANCE


def test_what_the_network_sees_with_each_preset(images: Tensor) -> None:
    """Up to the first layer: the rest is the same."""
    expected = {
        "tf": (resize_tf1(images, 299) - 128) / 128,
        "pytorch-fid": 2 * resize_bilinear(images, 299) / 255 - 1,
        "clean-fid": (resize_clean(images, 299) - 128) / 128,
    }
    assert expected.keys() == PRESETS.keys()
    for preset, x in expected.items():
        assert apart(seen_by(Inception(preset), images).x, x) <= 1e-6


class Seen(Exception):
    """Ends a forward pass after its first layer."""


def seen_by(network: Inception, images: Tensor) -> SimpleNamespace:
    """What reaches the first layer, and how it is computed there."""
    seen = SimpleNamespace()

    def stop(layer: nn.Module, args: Any, out: Tensor) -> None:
        seen.x, seen.dtype, seen.grad = args[0], out.dtype, torch.is_grad_enabled()
        seen.precision = {switch.fp32_precision for switch in SWITCHES}
        raise Seen

    hook = network.Conv2d_1a_3x3.register_forward_hook(stop)
    with pytest.raises(Seen):
        network(images)
    hook.remove()
    return seen


def test_features_are_computed_in_full_float32_whatever_the_process_allows(network: Inception, images: Tensor) -> None:
    before = [switch.fp32_precision for switch in SWITCHES]
    try:
        for switch in SWITCHES:
            switch.fp32_precision = "tf32"
        with torch.autocast("cpu", torch.bfloat16):
            seen = seen_by(network, images)
        assert {switch.fp32_precision for switch in SWITCHES} == {"tf32"}  # after an error too
    finally:
        for switch, value in zip(SWITCHES, before, strict=True):
            switch.fp32_precision = value
    assert seen.precision == {"ieee"}
    assert seen.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_gives_the_same_features(weights: Weights, images: Tensor, features: Features) -> None:
    """PyTorch allows TF32 in convolutions unless told otherwise."""
    for name, resize in RESIZES.items():
        assert apart(resize(images.cuda(), 299).cpu(), resize(images, 299)) <= (0 if name == "tf1" else 1e-3)
    network = Inception()
    network.load_state_dict(weights)
    network.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        result = network(images)  # taken to the network's device
    for one, other in zip(result, features, strict=True):
        assert one.is_cuda
        assert apart(one.cpu(), other) <= TOLERANCE


def test_the_network_only_evaluates(network: Inception, images: Tensor, features: Features) -> None:
    assert not network.train().training
    assert not any(part.training for part in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not seen_by(network, images).grad
    assert not any(value.requires_grad for value in features)


def test_one_channel_is_repeated_and_images_may_be_tiny_or_none(network: Inception) -> None:
    tiny = images_of(1, 1, 8, 8)
    seen = seen_by(network, tiny).x
    assert seen.shape == (1, 3, 299, 299)
    assert torch.equal(seen, seen_by(network, tiny.expand(1, 3, 8, 8)).x)
    assert [value.shape for value in network(tiny[:0])] == [(0, 2048), (0, 2023), (0, 1008)]


def test_other_images_are_refused(network: Inception) -> None:
    for images in (images_of(1, 4, 8, 8), images_of(3, 8, 8), images_of(1, 3, 8, 8).float(), images_of(1, 3, 0, 8)):
        with pytest.raises(fd.InputError, match="must be"):
            network(images)


def test_weights_that_are_not_numbers_are_found_in_the_features(weights: Weights) -> None:
    broken = Inception()
    broken.load_state_dict(weights)
    broken.Mixed_7c.branch1x1.bn.bias.data[3] = torch.nan
    with pytest.raises(fd.InputError, match=r"pool holds NaN"):
        extract(broken, images_of(1, 3, 8, 8))


def test_unknown_presets_are_refused() -> None:
    for make in (Inception, lambda preset: Inception.load(preset=preset)):
        with pytest.raises(fd.InputError, match="unknown preset"):
            make("imagenet")


# ---- files ----------------------------------------------------------------------------------


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_names_carry_the_digest() -> None:
    assert len(SHA256) == 64
    assert {name.rpartition("-")[2] for name in WEIGHTS} == {f"{SHA256[:8]}.pth"}


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch.hub's directory of weights, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.delenv(module.VARIABLE, raising=False)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture(scope="module")
def file(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(weights, path)
    return path


@pytest.fixture
def published(file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that counts as the published one."""
    monkeypatch.setattr(module, "SHA256", digest(file))
    return file


def check_loaded(network: Inception, weights: Weights) -> None:
    assert network.settings["weights"] == module.SHA256
    loaded = network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_weights_are_loaded_from_a_path(
    published: Path, weights: Weights, nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(module.VARIABLE, str(nowhere / "a path comes first"))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for path in (published, str(published)):
        check_loaded(Inception.load(path), weights)
    assert torch.equal(torch.get_rng_state(), state)  # nothing random was made


def test_weights_are_found_by_the_variable(
    published: Path, weights: Weights, nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(module.VARIABLE, str(published))
    for name in WEIGHTS:
        (nowhere / name).write_text("the variable comes first")
    check_loaded(Inception.load(), weights)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_found_where_the_peers_keep_them(
    name: str, published: Path, weights: Weights, nowhere: Path
) -> None:
    os.link(published, nowhere / name)
    network = Inception.load(preset="clean-fid")
    check_loaded(network, weights)
    settings = {"features": "inception-2015-12-05", "preset": "clean-fid", "resize": "clean", "weights": module.SHA256}
    assert network.settings == settings


def test_older_files_are_read_too(weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's format before 1.6, without the counters that no evaluation reads."""
    old = {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    monkeypatch.setattr(module, "SHA256", digest(tmp_path / "old.pth"))
    network = Inception.load(tmp_path / "old.pth")
    check_loaded(network, old)
    assert not any(value.is_meta for value in network.state_dict().values())


def test_settings_tell_which_weights(weights: Weights) -> None:
    network = Inception("pytorch-fid")
    assert network.settings["weights"] == "random"
    assert network.settings["resize"] == "bilinear"
    network.load_state_dict(weights)
    assert network.settings["weights"] == "custom"


def test_missing_weights_say_where_they_were_sought_and_can_be_had(
    nowhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def message(path: Path | None = None) -> str:
        with pytest.raises(fd.InputError, match="weights are missing") as error:
            Inception.load(path)
        assert "\n" not in str(error.value)
        assert all(url + name in str(error.value) for name, url in WEIGHTS.items())
        assert "FASTDIFF_INCEPTION" in str(error.value)
        return str(error.value)

    assert all(str(nowhere / name) in message() for name in WEIGHTS)
    assert str(tmp_path / "absent.pth") in message(tmp_path / "absent.pth")
    assert str(tmp_path) in message(tmp_path)  # a directory
    monkeypatch.setenv(module.VARIABLE, str(tmp_path / "other.pth"))
    assert str(tmp_path / "other.pth") in message()
    assert str(nowhere) not in message()


@pytest.mark.parametrize("case", ["another", "truncated", "changed", "empty"])
def test_other_files_are_refused_with_both_digests(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(200))  # the published file's, say: the digest is looked at before anything else
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(content).hexdigest())
    contents = {"another": b"words", "truncated": content[:-1], "changed": content[:-1] + b"x", "empty": b""}
    path = tmp_path / "weights.pth"
    path.write_bytes(contents[case])
    with pytest.raises(fd.InputError) as error:
        Inception.load(path)
    for part in (str(path), digest(path), module.SHA256, f"{len(contents[case])} bytes"):
        assert part in str(error.value)


def test_nothing_in_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even in one with the right digest."""

    class Hostile:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"fc.weight": Hostile()}, tmp_path / "hostile.pth")
    monkeypatch.setattr(module, "SHA256", digest(tmp_path / "hostile.pth"))
    with pytest.raises(pickle.UnpicklingError):
        Inception.load(tmp_path / "hostile.pth")
    assert not (tmp_path / "ran").exists()


def test_a_file_that_cannot_be_read_is_named(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(fd.InputError, match=f"{published} cannot be read"):
        Inception.load(published)
