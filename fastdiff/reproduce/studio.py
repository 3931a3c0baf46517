"""Where recipes work: data, networks that are trained once for all of them, samples, and what samples are worth."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastdiff as fd
from fastdiff import figures
from fastdiff.errors import check
from fastdiff.metrics.evaluation import FeatureSet
from fastdiff.reproduce.networks import Network, train
from fastdiff.training.config import TrainConfig, option
from fastdiff.training.data import Data, load
from fastdiff.training.run import ClassifierRun, Run, load_classifier, load_run

NETWORKS = "networks"
METRICS = ("fid", "is", "pr")
BATCH = 500  # images that are sampled together


@dataclass(frozen=True)
class Effort:
    """How much work a recipe does. Each field's meaning is its help text."""

    train_steps: int = option(600, "optimiser steps of each network")
    batch: int = option(64, "images in an optimiser step")
    model: str = option("unet-tiny", "of images: a model of fastdiff train")
    image_size: int | None = option(None, "resize images to this; default: as they are")
    count: int = option(1000, "samples that a figure is of")
    chain_count: int = option(300, "samples of whole chains")
    seeds: int = option(4, "networks of each kind, for intervals")
    classifier_steps: int = option(400, "optimiser steps of the classifier that judges images")
    point_steps: int = option(2500, "optimiser steps of each network of points")
    points: int = option(3000, "points that a distance is of")
    timesteps: int = option(1000, "T, of networks that have no other")


FULL = Effort()
QUICK = replace(
    FULL, train_steps=200, count=300, chain_count=100, seeds=1, classifier_steps=200, point_steps=800, points=1000
)
#: that of the tests
TINY = Effort(
    train_steps=3,
    batch=8,
    count=20,
    chain_count=20,
    seeds=1,
    classifier_steps=3,
    point_steps=4,
    points=50,
    timesteps=20,
)


#: what tables and figures call the parts of a Score
SCORES = ("FID", "Inception Score", "precision", "recall", "read as asked for", "diversity")


class Score(NamedTuple):
    """What samples are worth, by features of the data's own classifier.

    ``fid``, ``precision`` and ``recall`` against all data; ``inception_score``; ``accuracy``, the share read as the
    class asked for; ``diversity``, the mean distance of two samples of a class, in those of two real images of it.
    """

    fid: float
    inception_score: float
    precision: float
    recall: float
    accuracy: float
    diversity: float


class Studio:
    """The means of all recipes of one gallery.

    Args:
        folder: of the gallery; networks are kept below it, and not trained again.
        data: a data set of images with labels, see :func:`fastdiff.training.data.load`.
        effort: how much work is done.
        device: where.
    """

    def __init__(
        self, folder: Path, data: str = "digits", effort: Effort = FULL, device: torch.device | str = "cpu"
    ) -> None:
        self.folder, self.name, self.effort, self.device = folder, data, effort, torch.device(device)
        self.data = load(data, image_size=effort.image_size)
        check(not self.data.is_points and self.data.classes, f"recipes need images with labels, which {data} is not")
        least, fewest = 2 * len(self.data.classes), min(effort.count, effort.chain_count)
        check(fewest >= least, f"count and chain_count must be at least {least}, two for each class, got {fewest}")
        self.seeds = range(effort.seeds)

    # ---- training -------------------------------------------------------------------------

    def train(self, data: str | None = None, **settings: Any) -> Run:
        """The network of these settings of :class:`TrainConfig`, trained or, where it has been before, loaded.

        Args:
            data: a set of points; by default the studio's images.
        """
        return load_run(self._folders(data, [settings])[0], device=self.device)

    def train_each(self, data: str | None = None, **settings: Any) -> list[Run]:
        """One for each seed."""
        folders = self._folders(data, [settings | {"seed": seed} for seed in self.seeds])
        return [load_run(folder, device=self.device) for folder in folders]

    def _folders(self, name: str | None, settings: Sequence[dict[str, Any]]) -> list[Path]:
        data = self.data if name is None else load(name)
        where = (name or self.name, None if name else self.effort.image_size, str(self.device))
        chosen = [Network.of(self.folder / NETWORKS, self._config(data, each), data, *where) for each in settings]
        train(chosen)
        return [network.folder for network in chosen]

    def _config(self, data: Data, settings: dict[str, Any]) -> TrainConfig:
        effort = self.effort
        if data.is_points:
            given: dict[str, Any] = {"model": "mlp", "train_steps": effort.point_steps}
        else:
            given = {"model": effort.model, "train_steps": effort.train_steps, "batch": effort.batch}
        given |= {"timesteps": effort.timesteps} | settings
        given.setdefault("save_every", given["train_steps"])
        return TrainConfig.by_model(data, **given)

    def train_classifier(self, seed: int = 0) -> ClassifierRun:
        """Of noised images of the data, trained or loaded."""
        settings = {"model": "classifier", "train_steps": self.effort.classifier_steps, "seed": seed}
        return load_classifier(self._folders(None, [settings])[0], device=self.device)

    @cached_property
    def classifier(self) -> ClassifierRun:
        """The one that judges."""
        return self.train_classifier()

    # ---- sampling -------------------------------------------------------------------------

    def labels(self, count: int | None = None) -> Tensor:
        """All classes in turn, int64 ``[count]``."""
        return torch.arange(count or self.effort.count) % len(self.data.classes)

    def sample(
        self,
        run: Run,
        solver: str = "ddim",
        steps: int = 50,
        *,
        count: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Tensor:
        """uint8 images ``[count, C, H, W]`` of the classes in turn, or points; ``options`` are of :class:`fd.Sampler`.

        Args:
            steps: at most; a schedule of fewer timesteps takes them all.
        """
        steps = min(steps, len(run.diffusion.schedule))
        clip = None if run.data.is_points else 1.0
        sampler = fd.Sampler(run.model, run.diffusion, solver, steps, **{"clip": clip} | options)
        parts = [
            run.data.to_raw(sampler((len(ids), *run.data.shape), seed=seed, sample=ids, **cond)).cpu()
            for ids, cond in self._batches(run, count or self.effort.count)
        ]
        return torch.cat(parts)

    def _batches(self, run: Run, count: int) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        conditional = getattr(run.model, "label", None) is not None
        for ids in torch.arange(count).split(BATCH):
            yield ids, {"y": self.labels(count)[ids].to(self.device)} if conditional else {}

    def frames(self, run: Run, solver: str, steps: int, *, count: int = 100, **options: Any) -> list[Tensor]:
        """uint8 images ``[count, C, H, W]`` after each of 40 rows of a run, as a :class:`fd.Recorder` keeps them."""
        steps = min(steps, len(run.diffusion.schedule))
        sampler = fd.Sampler(run.model, run.diffusion, solver, steps, **{"clip": 1.0} | options)
        recorder = fd.Recorder(every=max(1, len(sampler.table) // 40))
        for ids, cond in self._batches(run, count):
            sampler((len(ids), *run.data.shape), seed=0, sample=ids, **cond, record=recorder)
        return [run.data.to_raw(x).cpu() for x in recorder.values]

    def grid(self, path: Path, samples: Tensor, columns: int = 10, title: str = "") -> None:
        """A picture of samples of the classes in turn, a row for each of at most ten classes."""
        labels, shown = self.labels(len(samples)), list(enumerate(self.data.classes))[:10]
        figures.labelled_grid(path, [(name, samples[labels == y][:columns]) for y, name in shown], title)

    # ---- judging --------------------------------------------------------------------------

    @cached_property
    def real(self) -> Tensor:
        """All images of the data, uint8 ``[N, C, H, W]``."""
        return self.data.to_raw(self.data.batch(torch.arange(len(self.data)))[0])

    @cached_property
    def real_labels(self) -> Tensor:
        """Their classes, int64 ``[N]``."""
        y = self.data.batch(torch.arange(len(self.data)))[1]
        assert y is not None
        return y

    def some(self, count: int) -> tuple[Tensor, Tensor]:
        """``count`` images of the data on the network's scale, evenly from all of it, and their classes."""
        x, y = self.data.batch(torch.linspace(0, len(self.data) - 1, count).long())
        assert y is not None
        return x.to(self.device), y.to(self.device)

    @cached_property
    def real_score(self) -> Score:
        """Of the data themselves."""
        return self.score(self.real, self.real_labels)

    @cached_property
    def real_spread(self) -> float:
        """Mean distance of two of the data's images of a class."""
        return spread(self.real, self.real_labels)

    @cached_property
    def real_features(self) -> FeatureSet:
        """Of all images of the data."""
        return self.features(self.real)

    def features(self, images: Tensor) -> FeatureSet:
        """By the classifier, of uint8 images ``[N, C, H, W]``."""
        return fd.metrics.collect((part.to(self.device) for part in images.split(BATCH)), self.classifier, METRICS)

    def fid(self, images: Tensor, real: FeatureSet | None = None) -> float:
        """The Fréchet distance of uint8 images to others, by default to all data."""
        return self.metrics(images, "fid", real=real)["fid"]

    def score(self, images: Tensor, labels: Tensor | None = None) -> Score:
        """All of :class:`Score`, of uint8 images and the classes that were asked for: by default all in turn."""
        labels = self.labels(len(images)) if labels is None else labels
        found = self.metrics(images, *METRICS)
        fid, inception_score, precision, recall = (found[name] for name in ("fid", "is", "precision", "recall"))
        diversity = spread(images, labels) / self.real_spread
        return Score(fid, inception_score, precision, recall, self.accuracy(images, labels), diversity)

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The share of uint8 images that the classifier reads as these classes."""
        return float((self.read(images) == labels).float().mean())

    def read(self, images: Tensor) -> Tensor:
        """The classes that the classifier reads, int64 ``[N]``."""
        logits = [self.classifier(part.to(self.device)).logits for part in images.split(BATCH)]
        return torch.cat([each for each in logits if each is not None]).argmax(1).cpu()

    def metrics(self, images: Tensor, *names: str, real: FeatureSet | None = None) -> dict[str, float]:
        """Those of :func:`fd.metrics.evaluate`, of uint8 images against others, by default all data."""
        reference = real or self.real_features
        with warnings.catch_warnings():  # of few images the distance is larger: equal numbers of them are compared
            warnings.filterwarnings("ignore", message=".*biased upwards", category=UserWarning)
            results = fd.metrics.evaluate(self.features(images), reference, names, device=self.device)
        return {result.metric: result.value for result in results}


def spread(images: Tensor, labels: Tensor) -> float:
    """Mean Euclidean distance between two images ``[N, C, H, W]`` of one class, averaged over the classes with two."""
    flat = images.flatten(1).float()
    classes = (labels.bincount() > 1).nonzero().flatten()
    return float(torch.stack([torch.pdist(flat[labels == label]).mean() for label in classes]).mean())
