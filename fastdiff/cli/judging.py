"""What each process of ``fastdiff eval`` does: open the images, look at its share, and in the first one judge all."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff._progress import progress
from fastdiff.cli.drawing import Drawing
from fastdiff.cli.sample import SampleConfig
from fastdiff.cli.sources import CONVENTION, Images, Source, Wanted, drawn, open_source
from fastdiff.errors import InputError, check, choose
from fastdiff.metrics.evaluation import (
    METRICS,
    FeatureSet,
    Pixels,
    Result,
    check_metrics,
    check_pair,
    check_seed,
    collect,
    evaluate,
    gather,
    settings_of,
)
from fastdiff.metrics.features import Extractor, extract
from fastdiff.metrics.inception import Inception
from fastdiff.training.config import option
from fastdiff.training.distributed import first_alone, placed, rank, together, world
from fastdiff.training.run import load_classifier

CURVES = ("steps", "trajectory")
PLACES = 10  # along a trajectory
LEAST = 32  # pixels of a side, below which Inception's features say nothing
FEATURES = ("inception", "pixels", "classifier:RUN", "python:MODULE:FUNCTION")


@dataclass(frozen=True)
class EvalConfig:
    """How images are judged. Each field's meaning is its help text."""

    metrics: str | None = option(None, f"with commas: {', '.join(METRICS)}; default fid, or is where there is no B")
    features: str | None = option(None, f"{', '.join(FEATURES)} (of a device, makes an extractor); default inception")
    weights: str | None = option(None, "Inception's, where they are not in their usual place")
    count: int | None = option(None, f"images of A; default all, of a run as many as of B, at most {CONVENTION}")
    real_count: int | None = option(None, "images of B; default all")
    image_size: int | None = option(None, "resize images to this; default: as they are")
    batch: int = option(64, "images that are read, sampled and looked at together")
    steps: str | None = option(None, "sampling steps; default 50; for --curve steps several, default 5,10,20,50")
    seed: int = option(0, "of samples, choices of images, subsets and resamples")
    confidence: int = option(0, "resamples for confidence intervals of fid, sfid and is; 0 for none")
    curve: str | None = option(None, "steps: A over numbers of steps; trajectory: A's estimates of x0 on their way")

    def __post_init__(self) -> None:
        check(self.batch >= 1, f"batch must be at least 1, got {self.batch}")
        check(self.confidence == 0 or self.confidence > 1, f"confidence must be 0 or above 1, got {self.confidence}")
        check_seed(self.seed)
        if self.curve is not None:
            choose("curve", self.curve, CURVES)
        one = self.curve == "steps" or len(self.step_numbers()) == 1
        check(one, f"--steps {self.steps}: several numbers go with --curve steps")
        inception = self.features in (None, "inception")
        check(inception or self.weights is None, f"--weights are Inception's, and not of --features {self.features}")

    def step_numbers(self) -> list[int]:
        """The numbers of sampling steps."""
        steps = self.steps or ("5,10,20,50" if self.curve == "steps" else "50")
        try:
            return [int(part) for part in steps.split(",")]
        except ValueError:
            raise InputError(f"--steps must be whole numbers with commas, got {self.steps!r}") from None

    def metric_names(self, alone: bool) -> list[str]:
        """The metrics of images that are compared, or alone."""
        names = (self.metrics or ("is" if alone else "fid")).split(",")
        check_metrics(names, None, None if alone else FeatureSet({}, names))
        return names


@dataclass(frozen=True)
class Request:
    """What each process is told; ``sampling`` are settings of :class:`SampleConfig`."""

    generated: str
    real: str | None
    config: EvalConfig
    sampling: dict[str, Any]
    device: torch.device
    backend: str


class Point(NamedTuple):
    """Results, and of a curve where they are: ``{"steps": 20}``, of a trajectory ``{"step": 12}``, from 1."""

    at: dict[str, int]
    results: list[Result]


class Report(NamedTuple):
    """One point or a curve; the features of B, or of A where it is alone; how A was sampled, if it was."""

    points: list[Point]
    features: FeatureSet
    sampling: SampleConfig | None


def judge(request: Request) -> Report | None:
    """The report in the first process, None in the others."""
    with ops.backend(request.backend):
        return _Judge(request).report()


class _Judge:
    def __init__(self, request: Request) -> None:
        self.request, self.config = request, request.config
        self.metrics = request.config.metric_names(request.real is None)
        self.device = placed(request.device)
        self.generated, self.real = first_alone(self._open)
        self.variants = together(self._variants)
        self.extractor = together(self._extractor)

    def report(self) -> Report | None:
        real = None if self.real is None else self._features(self.real)
        of_file = getattr(self.real, "statistics", None)  # of more images than the file holds, perhaps
        if real is not None and isinstance(of_file, FeatureSet) and self._may_be_of(of_file):
            real.statistics |= of_file.statistics
        points = []
        for at, features in self._points():
            points.append(Point(at, together(partial(self._results, features, real))))
            judged = real or features
        drawing = getattr(self.generated, "drawing", None)
        settings = drawing.config if drawing else None
        return Report(points, judged, settings) if judged else None

    # ---- what there is ----

    def _open(self) -> tuple[Source, Source | None]:
        config, real, samples = self.config, None, CONVENTION
        if self.request.real is not None:
            real = open_source(self.request.real, self._wanted(config.real_count, samples))
            samples = min(real.count or samples, samples)
        generated = open_source(self.request.generated, self._wanted(config.count, samples))
        check_metrics(self.metrics, self._promised(generated), self._promised(real))
        shapes = [s.shape for s in (generated, real) if isinstance(s, Images)]
        what = " and ".join("x".join(map(str, shape)) for shape in shapes)
        check(len(set(shapes)) <= 1, f"A and B hold images of {what} (channels, height, width): see --image-size")
        return generated, real

    def _wanted(self, count: int | None, samples: int) -> Wanted:
        config = self.config
        settings = {"seed": config.seed, "batch": config.batch, "steps": config.step_numbers()[0]}
        return Wanted(count, samples, config.image_size, settings | self.request.sampling, config.seed, self.device)

    def _promised(self, source: Source | None) -> FeatureSet | None:
        """What a source's features will be."""
        if source is None:
            return None
        return source if isinstance(source, FeatureSet) else FeatureSet({}, self.metrics)

    def _variants(self) -> list[tuple[dict[str, int], Source]]:
        """A, or of a curve over steps A with each number of them."""
        a, curve = self.generated, self.config.curve
        drawing: Any = getattr(a, "drawing", None)
        check(not curve or drawing, f"--curve {curve} is of a run, which {self.request.generated} is not")
        if curve != "steps":
            return [({}, a)]
        run, config = drawing.run, drawing.config
        every = [replace(config, steps=n) for n in self.config.step_numbers()]
        return [({"steps": each.steps}, drawn(self.request.generated, Drawing(run, each))) for each in every]

    def _may_be_of(self, file: FeatureSet) -> bool:
        """Whether a file's statistics are of our extractor's features; of Inception's, where it does not say."""
        known = bool(file.settings) or self.config.features in (None, "inception")
        return known and file.is_of(settings_of(self.extractor))

    def _extractor(self) -> Extractor:
        seen = [source for source in (self.generated, self.real) if isinstance(source, Images)]
        if not seen:
            return Pixels()  # which nobody will ask
        extractor = make_extractor(self.config, seen[0], self.device)
        black = torch.zeros(1, *seen[0].shape, dtype=torch.uint8, device=self.device)
        trial = self._set(extractor)
        trial.update(extract(extractor, black))  # what does not fit is said before the work
        for file in (self.generated, self.real):
            if isinstance(file, FeatureSet):
                check_pair(trial, file)
        return extractor

    # ---- looking at images ----

    def _set(self, extractor: Extractor) -> FeatureSet:
        return FeatureSet(settings_of(extractor), self.metrics, self.config.confidence > 0)

    def _features(self, source: Source) -> FeatureSet | None:
        """All of a source's features in the first process, None in the others."""
        if isinstance(source, FeatureSet):
            return None if rank() else source
        images = (source.read(ids).to(self.device) for ids in self._ids(source))
        confidence = self.config.confidence > 0
        return gather(together(lambda: collect(images, self.extractor, self.metrics, confidence=confidence)))

    def _ids(self, images: Images) -> Iterator[Tensor]:
        """The numbers of this process's images, by batches."""
        mine = list(images.ids(self.config.batch, rank(), world()))
        what = f"{'sampling' if images.drawing else 'reading'} {images.name}"
        return progress(mine, len(mine), what, enabled=rank() == 0)

    def _points(self) -> Iterator[tuple[dict[str, int], FeatureSet | None]]:
        if self.config.curve != "trajectory":
            for at, source in self.variants:
                yield at, self._features(source)
            return
        for row, features in together(self._trajectory).items():
            yield {"step": row + 1}, gather(features)

    def _trajectory(self) -> dict[int, FeatureSet]:
        """Features of the estimates of x0 after some rows of the sampler's table."""
        images: Any = self.generated
        drawing: Drawing = images.drawing
        last = len(drawing.sampler.table) - 1
        sets = {round(last * i / (PLACES - 1)): self._set(self.extractor) for i in range(PLACES)}
        for ids in self._ids(images):
            for state in drawing.states(ids):
                if state.step in sets:
                    estimates = drawing.to_raw(state.x0).to(self.device)
                    sets[state.step].update(extract(self.extractor, estimates))
        return sets

    def _results(self, features: FeatureSet | None, real: FeatureSet | None) -> list[Result]:
        if features is None:
            return []
        options: dict[str, Any] = {"seed": self.config.seed, "confidence": self.config.confidence}
        names = progress(self.metrics, len(self.metrics), "metrics", enabled=self.config.curve is None)
        return [r for name in names for r in evaluate(features, real, [name], device=self.device, **options)]


def make_extractor(config: EvalConfig, images: Images, device: torch.device) -> Extractor:
    """What ``config.features`` names, for images of this kind.

    Raises:
        InputError: no such features, or Inception unasked for images that it says nothing of.
    """
    kind, _, place = (config.features or "inception").partition(":")
    if kind == "classifier" and place:
        return load_classifier(place, device=device)
    if kind == "python" and place:
        return _imported(place, device)
    choose("features", config.features or kind, FEATURES)
    if kind == "pixels":
        return Pixels()
    channels, *sides = images.shape
    small = f"Inception says nothing of {'x'.join(map(str, images.shape))} images"
    other = "--features classifier:RUN, of fastdiff train --classifier --data ..., or --features pixels"
    check(config.features or (channels == 3 and min(sides) >= LEAST), f"{small}: take {other}")
    return Inception.load(config.weights).to(device)


def _imported(place: str, device: torch.device) -> Extractor:
    module, _, name = place.partition(":")
    try:
        extractor = getattr(importlib.import_module(module), name)(device)
    except (ImportError, AttributeError, TypeError) as error:
        raise InputError(f"--features python:{place} is no function of a device in a module: {error}") from None
    check(callable(extractor), f"--features python:{place} must make an extractor, got {type(extractor).__name__}")
    return extractor  # type: ignore[no-any-return]
