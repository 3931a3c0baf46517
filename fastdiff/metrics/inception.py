"""Inception-v3 of 2015: the features of FID, sFID, KID, precision and recall, and the Inception Score's logits.

The network of TensorFlow's graph ``inception-2015-12-05`` (Szegedy et al. 2016), on which FID was defined (Heusel et
al. 2017). It is not torchvision's Inception-v3: averages at the border leave the padding out, the last block takes
maxima, and there are 1008 outputs. Modules have torchvision's names, which are those of the published weights.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.errors import InputError, check, choose
from fastdiff.metrics.features import Features, check_images
from fastdiff.metrics.resize import RESIZES

#: One file under two names, by pytorch-fid and by torch-fidelity; the last digits of the names begin its SHA-256.
WEIGHTS = {
    "pt_inception-2015-12-05-6726825d.pth": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/",
    "weights-inception-2015-12-05-6726825d.pth": "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/",
}
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
VARIABLE = "FASTDIFF_INCEPTION"  #: the environment variable with the path of the weights
SIZE = 299  #: height and width of what the network sees
SPATIAL = 7  #: channels of the spatial features


class Preset(NamedTuple):
    """How images become the network's input: ``(resize(images) - half) / half``."""

    resize: str  #: a name in :data:`~fastdiff.metrics.resize.RESIZES`
    half: float


PRESETS = {
    "tf": Preset("tf1", 128.0),  # the graph itself; guided-diffusion's evaluator and torch-fidelity
    "pytorch-fid": Preset("bilinear", 127.5),
    "clean-fid": Preset("clean", 128.0),
}


class Inception(nn.Module):
    """Features of uint8 images: ``inception(images)`` gives :class:`~fastdiff.metrics.features.Features`.

    ``Inception.load()`` has the published weights. ``Inception()`` has random ones, for ``load_state_dict``.
    The network always evaluates and never asks for gradients. On a GPU too it computes in float32, without TF32 and
    outside autocast, whatever the process allows elsewhere; ``.double()`` makes it float64.

    Args:
        preset: ``tf``: TensorFlow 1's resize, (x - 128) / 128, as the graph, guided-diffusion's evaluator and
            torch-fidelity have it; ``pytorch-fid``: bilinear, 2 x / 255 - 1; ``clean-fid``: bicubic and antialiased,
            (x - 128) / 128.

    Attributes:
        settings: what features depend on: ``features``, ``preset``, ``resize`` and ``weights``: the SHA-256 of the
            published file, "random", or "custom" after ``load_state_dict``.

    Raises:
        InputError: unknown preset.
    """

    def __init__(self, preset: str = "tf") -> None:
        choose("preset", preset, PRESETS)
        super().__init__()
        layers = _layers()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.fc = nn.Linear(2048, 1008)
        self.layers = tuple(layers)
        self.preset = PRESETS[preset]
        self.settings: dict[str, Any] = {"features": "inception-2015-12-05", "preset": preset}
        self.settings |= {"resize": self.preset.resize, "weights": "random"}
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: Path | str | None = None, *, preset: str = "tf") -> Inception:
        """The network with the published weights, from a file on this machine: nothing is ever fetched.

        Args:
            path: pytorch-fid's or torch-fidelity's file. Left out: the one that the environment variable
                FASTDIFF_INCEPTION names, or else either in ``checkpoints`` of torch.hub's directory, where those
                packages keep it.
            preset: as in the class.

        Raises:
            InputError: no such file (the message says where it can be had), a file with another SHA-256 than the
                published one, unknown preset.
        """
        with torch.device("meta"):  # no random weights to be made first
            inception = cls(preset)
        inception.load_state_dict(_read(_find(path)), assign=True)
        inception.settings["weights"] = SHA256
        return inception

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As every module's; :attr:`settings` then say that the weights are not the published file's."""
        self.settings["weights"] = "custom"
        return super().load_state_dict(state_dict, *args, **kwargs)

    def train(self, mode: bool = True) -> Inception:
        """The network evaluates whatever ``mode`` is."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """The features of uint8 images ``[N, C, H, W]`` of any size, C = 1 (repeated) or 3, on the network's device.

        Returns:
            pool ``[N, 2048]``; spatial ``[N, 2023]``: the first 7 channels of 17x17, channels last, as in the
            reference statistics of guided-diffusion; logits ``[N, 1008]`` without their bias, as the Inception Score
            is computed by guided-diffusion and torch-fidelity (its ``logits_unbiased``).

        Raises:
            InputError: other images.
        """
        check_images(images)
        x = RESIZES[self.preset.resize](images.to(self.fc.weight.device), SIZE)
        x = ((x - self.preset.half) / self.preset.half).to(self.fc.weight.dtype).expand(-1, 3, -1, -1)
        with _full_precision(x.device):
            for name in self.layers:
                x = self.get_submodule(name)(x)
                if name == "Mixed_6d":
                    # guided-diffusion's mixed_6/conv:0. The graph counts mixed (5b), mixed_1 (5c) ... mixed_10 (7c);
                    # a layer's own name is its last node, the ReLU; and this branch is the block's first channels.
                    spatial = x[:, :SPATIAL].permute(0, 2, 3, 1).flatten(1)
            pool = x.mean((2, 3))
            logits = pool.double() @ self.fc.weight.double().T  # where neither TF32 nor bfloat16 has a say
        return Features(pool, spatial, logits.to(pool.dtype))


# ---- the network ----------------------------------------------------------------------------

Stages = Sequence[tuple[Any, ...]]  # channels and a kernel, or several kernels side by side


def _convolution(channels: int, out: int, kernel: Any, stride: int = 1, padding: str = "valid") -> nn.Module:
    convolution = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
    parts = {"conv": convolution, "bn": nn.BatchNorm2d(out, eps=0.001), "relu": nn.ReLU(inplace=True)}
    return nn.Sequential(OrderedDict(parts))


class _Block(nn.Module):
    """Branches side by side, their channels one after another; the last of them begins with a pool.

    Args:
        channels: of the input.
        pool: what ``branch_pool`` begins with.
        branches: the stages of each branch by its name. A stage's name is the branch's with its number, where there is
            more than one, and a letter, where it has several kernels: branch3x3_2a.
        stride: of the last stage of a branch; 2 goes with no padding.
    """

    def __init__(self, channels: int, pool: nn.Module, branches: Mapping[str, Stages], stride: int = 1) -> None:
        super().__init__()
        self.pool = pool
        self.branches = {name: self._add(name, channels, stages, stride) for name, stages in branches.items()}

    def _add(self, branch: str, channels: int, stages: Stages, stride: int) -> list[list[str]]:
        """The names of a branch's convolutions by stage."""
        names = []
        for number, (out, *kernels) in enumerate(stages, 1):
            stem = f"{branch}_{number}" if len(stages) > 1 else branch
            names.append([stem + letter for letter in ("ab" if len(kernels) > 1 else [""])])
            how = (stride, "valid") if number == len(stages) and stride > 1 else (1, "same")
            for name, kernel in zip(names[-1], kernels, strict=True):
                self.add_module(name, _convolution(channels, out, kernel, *how))
            channels = out * len(kernels)
        return names

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._branch(name, x) for name in self.branches], 1)

    def _branch(self, branch: str, x: Tensor) -> Tensor:
        if branch == "branch_pool":
            x = self.pool(x)
        for names in self.branches[branch]:
            x = torch.cat([self.get_submodule(name)(x) for name in names], 1)
        return x


def _average() -> nn.Module:
    # TensorFlow divides by the pixels that there are, torchvision's blocks by nine.
    return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)


def _block_a(channels: int, pool_channels: int) -> _Block:
    return _Block(
        channels,
        _average(),
        {
            "branch1x1": [(64, 1)],
            "branch5x5": [(48, 1), (64, 5)],
            "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
            "branch_pool": [(pool_channels, 1)],
        },
    )


def _block_b(channels: int) -> _Block:
    branches = {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)], "branch_pool": []}
    return _Block(channels, nn.MaxPool2d(3, 2), branches, stride=2)


def _block_c(channels: int, inner: int) -> _Block:
    row, column = (1, 7), (7, 1)
    return _Block(
        channels,
        _average(),
        {
            "branch1x1": [(192, 1)],
            "branch7x7": [(inner, 1), (inner, row), (192, column)],
            "branch7x7dbl": [(inner, 1), (inner, column), (inner, row), (inner, column), (192, row)],
            "branch_pool": [(192, 1)],
        },
    )


def _block_d(channels: int) -> _Block:
    branches: dict[str, Stages] = {
        "branch3x3": [(192, 1), (320, 3)],
        "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)],
        "branch_pool": [],
    }
    return _Block(channels, nn.MaxPool2d(3, 2), branches, stride=2)


def _block_e(channels: int, pool: nn.Module) -> _Block:
    row, column = (1, 3), (3, 1)
    return _Block(
        channels,
        pool,
        {
            "branch1x1": [(320, 1)],
            "branch3x3": [(384, 1), (384, row, column)],
            "branch3x3dbl": [(448, 1), (384, 3), (384, row, column)],
            "branch_pool": [(192, 1)],
        },
    )


def _layers() -> dict[str, nn.Module]:
    """All but the last layer, in order."""
    return {
        "Conv2d_1a_3x3": _convolution(3, 32, 3, stride=2),
        "Conv2d_2a_3x3": _convolution(32, 32, 3),
        "Conv2d_2b_3x3": _convolution(32, 64, 3, padding="same"),
        "maxpool1": nn.MaxPool2d(3, 2),
        "Conv2d_3b_1x1": _convolution(64, 80, 1),
        "Conv2d_4a_3x3": _convolution(80, 192, 3),
        "maxpool2": nn.MaxPool2d(3, 2),
        "Mixed_5b": _block_a(192, 32),
        "Mixed_5c": _block_a(256, 64),
        "Mixed_5d": _block_a(288, 64),
        "Mixed_6a": _block_b(288),
        "Mixed_6b": _block_c(768, 128),
        "Mixed_6c": _block_c(768, 160),
        "Mixed_6d": _block_c(768, 160),
        "Mixed_6e": _block_c(768, 192),
        "Mixed_7a": _block_d(768),
        "Mixed_7b": _block_e(1280, _average()),
        "Mixed_7c": _block_e(2048, nn.MaxPool2d(3, stride=1, padding=1)),  # an oddity of the graph
    }


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Convolutions in float32 as it is: neither TF32 (which cuDNN uses by default), nor bfloat16, nor autocast."""
    backends: Any = torch.backends
    switches = [backends.cudnn.conv, backends.mkldnn.conv]
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


# ---- the weights ----------------------------------------------------------------------------


def _find(path: Path | str | None) -> Path:
    given = path or os.environ.get(VARIABLE)
    hub = Path(torch.hub.get_dir(), "checkpoints")
    places = [Path(given).expanduser()] if given else [hub / name for name in WEIGHTS]
    for place in places:
        if place.is_file():
            return place
    looked, sources = " or ".join(map(str, places)), " or ".join(url + name for name, url in WEIGHTS.items())
    raise InputError(f"Inception's weights are missing: no file {looked} ({VARIABLE} can name another); get {sources}")


def _read(path: Path) -> dict[str, Tensor]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    found = hashlib.sha256(content).hexdigest()
    whole = f"{path} ({len(content)} bytes) is not the published file: its SHA-256 is {found}, not {SHA256}"
    check(found == SHA256, whole)
    weights: dict[str, Tensor] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return weights
