"""Palette: one network restores images, told of the damage by an image beside x_t

Saharia et al. 2022: the damaged image is joined to the noised one as further channels, and nothing else is changed. One
network for all tasks: super-resolution ×2, inpainting, uncropping and, of images with colours, colourisation. It has
never seen the images that it restores here; the classifier that reads them has.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastdiff as fd
from fastdiff import figures
from fastdiff._progress import progress
from fastdiff.reproduce.page import Page
from fastdiff.reproduce.studio import Studio
from fastdiff.training.config import TrainConfig
from fastdiff.training.presets import build_model, model_config


def smaller(x: Tensor) -> Tensor:
    """Half the size, and back."""
    return F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear")


def with_a_hole(x: Tensor) -> Tensor:
    """Without the middle quarter."""
    h, w = (side // 4 for side in x.shape[2:])
    x = x.clone()
    x[:, :, h : 3 * h, w : 3 * w] = 0
    return x


def cropped(x: Tensor) -> Tensor:
    """Without the right half."""
    x = x.clone()
    x[..., x.shape[-1] // 2 :] = 0
    return x


def grey(x: Tensor) -> Tensor:
    """Without colours."""
    return x.mean(1, keepdim=True).expand_as(x)


TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "super-resolution x2": smaller,
    "inpainting": with_a_hole,
    "uncropping": cropped,
}


def run(studio: Studio, page: Page) -> None:
    tasks = TASKS | ({"colourisation": grey} if studio.data.shape[0] == 3 else {})
    held_out = torch.arange(len(studio.data)) % 5 == 0
    x, y = studio.data.batch(torch.arange(len(studio.data)))
    diffusion = fd.Diffusion(fd.Schedule.cosine(studio.effort.timesteps), "v_prediction")
    networks = [_trained(studio, diffusion, x[~held_out], tasks, seed) for seed in studio.seeds]
    x, labels = x[held_out][: studio.effort.count], y[held_out][: studio.effort.count]  # type: ignore[index]
    rows = []
    for name, damage in tasks.items():
        damaged = damage(x)
        restored = [_restored(studio, network, diffusion, damaged, seed) for seed, network in enumerate(networks)]
        raw, original = studio.data.to_raw(damaged), studio.data.to_raw(x)
        before, after = studio.accuracy(raw, labels), [studio.accuracy(images, labels) for images in restored]
        errors = [_rms(images, original) for images in restored]
        rows.append([name, before, after, _rms(raw, original), errors])
        page.claim(f"{name}: more is read right after than before", after, [before] * len(after))
        triplets = [("damaged", raw[:12]), ("restored", restored[0][:12]), ("original", original[:12])]
        page.figure(
            f"{name.split()[0]}.png", f"{name}: images the network has not seen", figures.labelled_grid, triplets, name
        )
    columns = ["", "read right, damaged", "restored", "RMS error in grey levels, damaged", "restored"]
    page.table(f"{len(x)} held-out images", columns, rows)


def _trained(
    studio: Studio, diffusion: fd.Diffusion, x0: Tensor, tasks: dict[str, Callable[[Tensor], Tensor]], seed: int
) -> nn.Module:
    """A loop of one's own around the library's loss."""
    config = model_config(studio.effort.model, studio.data) | {"condition_channels": studio.data.shape[0]}
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        network = build_model(config | {"num_classes": None}).to(studio.device)
    steps, random = studio.effort.train_steps, torch.Generator().manual_seed(seed)
    highest = TrainConfig.by_model(studio.data, model=studio.effort.model).learning_rate
    optimizer = torch.optim.AdamW(network.parameters(), lr=highest, weight_decay=0.0, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, highest, total_steps=steps + 1, pct_start=0.1)
    damages = list(tasks.values())
    for step in progress(range(steps), steps, "training"):
        images = x0[torch.randint(len(x0), (studio.effort.batch,), generator=random)].to(studio.device)
        parts = [damages[i % len(damages)](part) for i, part in enumerate(images.chunk(len(damages)))]
        loss = diffusion.loss(network, images, seed=seed, step=step, condition=torch.cat(parts))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rate.step()
    return network.eval()


def _restored(studio: Studio, network: nn.Module, diffusion: fd.Diffusion, damaged: Tensor, seed: int) -> Tensor:
    sampler = fd.Sampler(network, diffusion, "ddim", min(50, len(diffusion.schedule)), clip=1.0)
    return studio.data.to_raw(sampler(damaged.shape, seed=seed, condition=damaged.to(studio.device))).cpu()


def _rms(images: Tensor, original: Tensor) -> float:
    return float((images.float() - original.float()).square().mean().sqrt())
