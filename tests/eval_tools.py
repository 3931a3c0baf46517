"""What tests of ``fastdiff eval`` share: sets of images, an extractor, an untrained network, what was found."""

from __future__ import annotations

import json
import warnings

import numpy as np
import torch
from PIL import Image

import fastdiff as fd
from fastdiff.cli import main
from fastdiff.metrics.features import Features
from fastdiff.training.data import load
from fastdiff.training.run import save_run

PIXELS = ("--features", "pixels")
HERE = "python:eval_tools:"


class Looks:
    """An extractor of all kinds of features: 5 numbers of each image."""

    settings = {"features": "looks", "weights": "none", "resize": "none"}  # noqa: RUF012

    def __call__(self, images):
        pixels = images.flatten(1).double() / 255
        five = torch.stack([pixels[:, i::5].mean(1) for i in range(5)], 1)
        return Features(five, five[:, :3], 10 * five)

    def to(self, device):
        return self


def looks(device):
    return Looks()


def broken(device):
    return lambda images: images.flatten(1).double() / (images.flatten(1).double().sum(1, keepdim=True))


def no_extractor(device):
    return 3


def run(*arguments) -> int:
    with warnings.catch_warnings():  # main shows warnings in its own way from now on
        return main(["eval", *map(str, arguments)])


def report(place, name="eval"):
    return json.loads((place / f"{name}.json").read_text())


def values(place):
    return {result["metric"]: result["value"] for result in report(place)["results"]}


def digits(count: int) -> torch.Tensor:
    data = load("digits")
    return data.to_raw(data.batch(torch.arange(count))[0])


def write_folder(place, images):
    place.mkdir()
    for i, image in enumerate(images):
        pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(place / f"{i:04d}.png")
    return place


def write_npz(path, images, **more):
    np.savez(path, images.permute(0, 2, 3, 1).numpy(), **more)
    return path


def damaged(path):
    path.write_bytes(path.read_bytes()[:-30])
    return path


def color(count: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def tiny_unet(**settings) -> fd.UNet:
    """A network that says something without having been trained."""
    torch.manual_seed(0)
    small = {"model_channels": 8, "channel_mult": (1,), "num_res_blocks": 1, "attention_resolutions": ()}
    unet = fd.UNet(8, 1, **small, norm_groups=4, **settings)
    for parameter in unet.parameters():
        if not parameter.any():  # what begins at zero says nothing
            torch.nn.init.normal_(parameter, std=0.2)
    return unet


def write_run(path, unet):
    save_run(path, unet, fd.Diffusion(fd.Schedule.cosine(100), "sample"))
    return path
