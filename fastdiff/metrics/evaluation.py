"""All metrics from one pass over the images: their features are taken once, and every metric is computed from them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed

from fastdiff.errors import InputError, check, choose
from fastdiff.metrics.confidence import ConfidenceInterval, bootstrap, fid_infinity
from fastdiff.metrics.features import Extractor, Features, extract
from fastdiff.metrics.fid import warn_of_bias
from fastdiff.metrics.frechet import frechet_distance
from fastdiff.metrics.inception_score import inception_score
from fastdiff.metrics.kernel import KernelDistance, cmmd, kid
from fastdiff.metrics.neighbours import prdc
from fastdiff.metrics.statistics import FeatureStatistics, read_arrays, write_arrays

CMMD_SIGMA = 10.0
SPLITS = 10  # of the Inception Score
SUBSETS, SUBSET_SIZE = 100, 1000  # of KID
NEIGHBOURS = {"k": 3, "density_k": 5}
SUFFIXES = {"pool": "", "spatial": "_s"}  # of arrays in files of statistics, as guided-diffusion names them
STATISTICS = ("settings", *(name + suffix for suffix in SUFFIXES.values() for name in ("mu", "sigma", "count")))
UNKNOWN = {"features": "unknown", "weights": "unknown", "resize": "unknown"}


@dataclass(frozen=True)
class Result:
    """A number, and what it depends on.

    Attributes:
        metric: what it is: fid, kid, precision, ...
        standard_error: of ``value``, where there is one.
        interval: 95 % confidence interval, where one was asked for and there is one.
        generated, real: how many images there were; None for no real ones, and for a file that does not say how many.
        features: the extractor's settings: ``features``, ``weights``, ``resize`` and others.
        seed: of all that is drawn.
        details: the metric's own settings, and what it has found besides.
    """

    metric: str
    value: float
    standard_error: float | None
    interval: tuple[float, float] | None
    generated: int | None
    real: int | None
    features: dict[str, Any]
    seed: int
    details: dict[str, Any]


class Value(NamedTuple):
    """A number as a metric's own function gives it."""

    value: float
    standard_error: float = math.nan
    details: dict[str, Any] = {}  # noqa: RUF012 - nobody changes it


@dataclass(frozen=True)
class Metric:
    """How a metric is computed from features.

    Attributes:
        compute: of generated features, real ones and a seed; a value for each of ``names``.
        kind: of features: a field of :class:`Features`.
        names: of the values.
        generated: what it takes of generated images: ``rows``, the features themselves, or their ``statistics``.
        real: the same of real ones, or "" where it needs none.
        resampled: whether a bootstrap says something; where rows are compared with each other, copies mislead.
    """

    compute: Callable[[Any, Any, int], Sequence[Value]]
    kind: str
    names: tuple[str, ...]
    generated: str = "rows"
    real: str = "rows"
    resampled: bool = False


# ---- the features of a set of images ---------------------------------------------------------


@dataclass
class FeatureSet:
    """What a pass over images leaves: statistics of their features, and the features that some metric needs.

    Attributes:
        settings: of the extractor; {} for unknown ones.
        metrics: the names of those to be computed.
        confidence: whether intervals are to be computed too, which need the features themselves.
        count: how many images there were; 0 for a file of statistics that does not say.
        statistics: by kind of features, ``pool`` always.
        kept: the features themselves, in parts, on the CPU.
    """

    settings: dict[str, Any]
    metrics: Sequence[str] = ("fid",)
    confidence: bool = False
    count: int = 0
    statistics: dict[str, FeatureStatistics] = field(default_factory=dict)
    kept: dict[str, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.metrics:
            choose("metric", name, METRICS)

    def update(self, features: Features) -> None:
        """Take up the features of a batch.

        Raises:
            InputError: kinds that a metric needs are missing, another width, values that are not finite.
        """
        for kind in self._kinds("statistics"):
            rows = self._of(features, kind)
            statistics = self.statistics.get(kind) or FeatureStatistics(rows.shape[1], rows.device)
            statistics.update(rows)
            self.statistics[kind] = statistics
        for kind in self._kinds("rows"):
            self.kept.setdefault(kind, []).append(self._of(features, kind).cpu())
        self.count += len(features.pool)

    def rows(self, kind: str) -> Tensor:
        """The features ``[count, D]`` of a kind, in the order in which they came, on the CPU."""
        parts = self.kept.get(kind, [])
        check(parts, f"there are no {kind} features: {self.why_not}")
        if len(parts) > 1:
            self.kept[kind] = parts = [torch.cat(parts)]
        return parts[0]

    @property
    def is_file(self) -> bool:
        """Whether these are statistics of a file, without images."""
        return not self.metrics

    @property
    def why_not(self) -> str:
        """Why features are missing."""
        if self.is_file:
            return f"a file holds statistics of {' and '.join(self.statistics)} features, and none themselves"
        return "they were not kept, name the metrics (and confidence) when you collect them"

    def has(self, kind: str, form: str) -> bool:
        """Whether a kind of features is here, as ``rows`` or ``statistics``, or will be after :meth:`update`."""
        return kind in (self.statistics if self.is_file and form == "statistics" else self._kinds(form))

    def is_of(self, settings: dict[str, Any]) -> bool:
        """Whether these features may come from an extractor of these settings; those of some files are unknown."""
        one, other = (json.dumps(each, sort_keys=True) for each in (self.settings, settings))
        return one == other or not self.settings or not settings

    def save(self, path: Path | str) -> None:
        """Write the statistics: an ``.npz`` that pytorch-fid, EDM and guided-diffusion read, and the settings.

        ``mu``, ``sigma`` and ``count`` of pool features, ``mu_s`` and ``sigma_s`` of spatial ones.

        Raises:
            InputError: fewer than two images.
        """
        arrays = {"settings": np.str_(json.dumps(self.settings))}
        for kind, suffix in SUFFIXES.items():
            if kind in self.statistics:
                arrays |= self.statistics[kind].arrays(suffix)
        write_arrays(Path(path), arrays)

    @classmethod
    def load(cls, path: Path | str) -> FeatureSet:
        """What :meth:`save`, pytorch-fid, EDM or guided-diffusion wrote; raises as :meth:`FeatureStatistics.load`."""
        return cls.from_arrays(path, read_arrays(Path(path), ("mu", "sigma"), STATISTICS))

    @classmethod
    def from_arrays(cls, path: Path | str, arrays: dict[str, Any]) -> FeatureSet:
        """The same from arrays that were found in ``path``, some of :data:`STATISTICS`."""
        kinds = {kind: s for kind, s in SUFFIXES.items() if {f"mu{s}", f"sigma{s}"} <= arrays.keys()}
        statistics = {kind: FeatureStatistics.from_arrays(path, arrays, suffix) for kind, suffix in kinds.items()}
        return cls(_settings_of(path, arrays), (), count=statistics["pool"].count, statistics=statistics)

    def merge(self, other: FeatureSet) -> None:
        """Take up what another one has seen, after what is here."""
        for kind, statistics in other.statistics.items():
            if kind in self.statistics:
                self.statistics[kind].merge(statistics)
            else:
                self.statistics[kind] = statistics
        for kind, parts in other.kept.items():
            self.kept.setdefault(kind, []).extend(parts)
        self.count += other.count

    def _kinds(self, form: str) -> set[str]:
        """The kinds of features that are needed in a form."""
        kinds = {"pool"} if form == "statistics" else set()
        for metric in map(METRICS.__getitem__, self.metrics):
            forms = {metric.generated, metric.real} | ({"rows"} if self.confidence and metric.resampled else set())
            kinds |= {metric.kind} if form in forms else set()
        return kinds

    def _of(self, features: Features, kind: str) -> Tensor:
        rows = getattr(features, kind)
        if isinstance(rows, Tensor):
            return rows
        names = [name for name in self.metrics if METRICS[name].kind == kind]
        raise InputError(f"{', '.join(names)} needs {kind}, which the extractor does not give")


def _settings_of(path: Path | str, arrays: dict[str, Any]) -> dict[str, Any]:
    try:
        settings = json.loads(str(arrays.get("settings", "{}")))
    except ValueError:
        settings = None
    check(isinstance(settings, dict), f"settings of {path} must be a JSON object")
    return settings  # type: ignore[no-any-return]


def collect(
    batches: Iterable[Tensor], extractor: Extractor, metrics: Sequence[str] = ("fid",), *, confidence: bool = False
) -> FeatureSet:
    """The features of images, each seen once.

    Args:
        batches: uint8 ``[N, C, H, W]``, each on the device where the extractor wants it.
        extractor: see :mod:`fastdiff.metrics.features`.
        metrics: those to be computed, names in :data:`METRICS`: what none of them needs is not kept.
        confidence: whether intervals are to be computed too.

    Raises:
        InputError: an unknown metric, one that needs what the extractor does not give, other images, features that
            are not finite or change their width.
    """
    features = FeatureSet(settings_of(extractor), tuple(metrics), confidence)
    for images in batches:
        features.update(extract(extractor, images))
    return features


def settings_of(extractor: Extractor) -> dict[str, Any]:
    """The extractor's settings; ``features``, ``weights`` and ``resize`` are always among them."""
    name = getattr(extractor, "__name__", type(extractor).__name__)
    return {**UNKNOWN, "features": name, **getattr(extractor, "settings", {})}


class Pixels:
    """The pixels themselves as features: ``pool`` ``[N, C H W]``, float32 in [0, 1]."""

    settings = {"features": "pixels", "weights": "none", "resize": "none"}  # noqa: RUF012 - nobody changes it

    def __call__(self, images: Tensor) -> Features:
        return Features(images.flatten(1).float() / 255)


# ---- several processes ------------------------------------------------------------------------


def share(count: int, rank: int, processes: int) -> range:
    """Which of ``count`` images are a process's: consecutive ones, each in one process, none twice."""
    return range(count * rank // processes, count * (rank + 1) // processes)


def gather(features: FeatureSet) -> FeatureSet | None:
    """What all processes of ``torch.distributed`` have seen, in the order of their ranks; None but in process 0.

    With each :func:`share` in its process this is what one process would have seen.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return features
    states = {kind: each.state() for kind, each in features.statistics.items()}
    mine = states, features.kept, features.count
    first = distributed.get_rank() == 0
    everyone: list[Any] | None = [None] * distributed.get_world_size() if first else None
    distributed.gather_object(mine, everyone)
    if everyone is None:
        return None
    whole = FeatureSet(features.settings, features.metrics, features.confidence)
    for sums, kept, count in everyone:
        statistics = {kind: FeatureStatistics.from_state(*state) for kind, state in sums.items()}
        whole.merge(FeatureSet({}, (), count=count, statistics=statistics, kept=kept))
    return whole


# ---- the metrics ------------------------------------------------------------------------------


def evaluate(
    generated: FeatureSet,
    real: FeatureSet | None = None,
    metrics: Sequence[str] = ("fid",),
    *,
    seed: int = 0,
    confidence: int = 0,
    device: torch.device | str = "cpu",
) -> list[Result]:
    """The metrics of generated images, compared with real ones.

    Args:
        generated, real: from :func:`collect`; or real ones from :meth:`FeatureSet.load` for ``fid``, ``sfid`` and
            ``fid_infinity``, and both for ``fid`` and ``sfid``. ``is`` needs no real ones.
        metrics: names in :data:`METRICS`. All but ``sfid`` and ``is`` are of any ``pool`` features; the results say of
            which.
        seed: of subsets, orders and resamples.
        confidence: how many resamples the intervals of ``fid``, ``sfid`` and ``is`` are of; 0 for no intervals.
            They are of independent images: too wide for samples whose labels go in turn. (``kid`` and ``cmmd`` have
            their standard error without any.)
        device: where to compute.

    Raises:
        InputError: an unknown metric, fewer than two images, two extractors or widths, features that were not kept.
    """
    check_metrics(metrics, generated, real)
    check_seed(seed)
    check(confidence == 0 or confidence >= 2, f"confidence must be 0 or at least 2 resamples, got {confidence}")
    enough = generated.count > 1 or generated.is_file
    check(enough, f"at least 2 generated images are needed, there were {generated.count}")
    compared = [METRICS[name] for name in metrics if METRICS[name].real]
    if real is not None and compared:
        check_pair(generated, real)
    evaluation = _Evaluation(generated, real, seed, confidence, torch.device(device))
    return [result for name in metrics for result in evaluation.results(METRICS[name])]


def check_metrics(metrics: Sequence[str], generated: FeatureSet | None, real: FeatureSet | None) -> None:
    """Raise :class:`InputError` where a metric is unknown, or needs what these sets have not or will not have.

    Args:
        generated: None for a set that is still to come.
    """
    check(metrics, f"no metric is named: choose from {', '.join(METRICS)}")
    for name in metrics:
        choose("metric", name, METRICS)
        metric = METRICS[name]
        check(real or not metric.real, f"{name} compares with real images: give those too")
        for features, form in ((generated, metric.generated), (real, metric.real)):
            if features and form and not features.has(metric.kind, form):
                raise InputError(f"{name} needs {metric.kind} {form} of both sets: {features.why_not}")


def check_seed(seed: int) -> None:
    """Raise :class:`InputError` unless NumPy's generators take this seed."""
    whole = isinstance(seed, int) and 0 <= seed < 2**32
    check(whole, f"seed must be a whole number in 0...2**32-1, got {seed!r}")


def check_pair(generated: FeatureSet, real: FeatureSet) -> None:
    """Raise :class:`InputError` where these cannot be compared: no two real images, or two extractors."""
    check(real.count > 1 or real.is_file, f"at least 2 real images are needed, there were {real.count}")
    widths = [each.statistics["pool"].dim for each in (generated, real)]
    one = "both must come from one extractor"
    check(widths[0] == widths[1], f"generated features are {widths[0]} wide, real ones {widths[1]}: {one}")
    check(generated.is_of(real.settings), f"features of {generated.settings} and of {real.settings}: {one}")


@dataclass(frozen=True)
class _Evaluation:
    generated: FeatureSet
    real: FeatureSet | None
    seed: int
    confidence: int
    device: torch.device

    def results(self, metric: Metric) -> list[Result]:
        x, y = self._take(self.generated, metric, metric.generated), self._take(self.real, metric, metric.real)
        if isinstance(x, FeatureStatistics):
            warn_of_bias(*filter(None, (x, y)))
        values = metric.compute(x, y, self.seed)
        interval = self._interval(metric, y) if self.confidence and metric.resampled else None
        counts = _count(x), _count(y)
        return [self._result(*named, interval, counts) for named in zip(metric.names, values, strict=True)]

    def _result(
        self, name: str, value: Value, interval: ConfidenceInterval | None, counts: tuple[int | None, int | None]
    ) -> Result:
        error = interval.standard_error if interval else value.standard_error
        return Result(
            name,
            value.value,
            error if math.isfinite(error) else None,
            (interval.low, interval.high) if interval else None,
            *counts,
            self._settings(),
            self.seed,
            value.details,
        )

    def _settings(self) -> dict[str, Any]:
        return self.generated.settings or (self.real.settings if self.real else {}) or UNKNOWN

    def _take(self, features: FeatureSet | None, metric: Metric, form: str) -> Any:
        if features is None or not form:
            return None
        return features.rows(metric.kind).to(self.device) if form == "rows" else features.statistics[metric.kind]

    def _interval(self, metric: Metric, y: Any) -> ConfidenceInterval:
        """From resampled rows of both sets; what is known by a file's statistics stays as it is."""
        sets = [self._take(self.generated, metric, "rows")]
        if self.real is not None and metric.real and not self.real.is_file and _count(y) == self.real.count:
            sets.append(self._take(self.real, metric, "rows"))

        def value(*rows: Tensor) -> float:
            x, *others = map(FeatureStatistics.of, rows) if metric.generated == "statistics" else rows
            return metric.compute(x, others[0] if others else y, self.seed)[0].value

        return bootstrap(value, *sets, resamples=self.confidence, method="basic", seed=self.seed)


def _count(y: Tensor | FeatureStatistics | None) -> int | None:
    """How many rows there were, None where there are none or nobody knows."""
    return len(y) if isinstance(y, Tensor) else (y and y.count) or None


def _fid(x: FeatureStatistics, y: FeatureStatistics, seed: int) -> list[Value]:
    place = x.device
    return [Value(frechet_distance(x.mean, x.covariance, y.mean.to(place), y.covariance.to(place)))]


def _kid(x: Tensor, y: Tensor, seed: int) -> list[Value]:
    """Of subsets as they are usual, or of all rows where there are fewer."""
    drawn = {"subsets": SUBSETS, "subset_size": min(SUBSET_SIZE, len(x), len(y))}
    return [_kernel_value(kid(x, y, **drawn, seed=seed), drawn)]


def _cmmd(x: Tensor, y: Tensor, seed: int) -> list[Value]:
    return [_kernel_value(cmmd(x, y, sigma=CMMD_SIGMA), {"sigma": CMMD_SIGMA})]


def _kernel_value(found: KernelDistance, details: dict[str, Any]) -> Value:
    spread = {"std": found.std} if found.std else {}
    return Value(found.value, found.standard_error, {**details, **spread})


def _inception_score(x: Tensor, y: None, seed: int) -> list[Value]:
    splits = min(SPLITS, len(x))
    score = inception_score(x, splits=splits, seed=seed)
    return [Value(score.value, details={"splits": splits, "std": score.std})]


def _neighbours(x: Tensor, y: Tensor, seed: int) -> list[Value]:
    found, counts = prdc(y, x, **NEIGHBOURS), (NEIGHBOURS["k"], NEIGHBOURS["density_k"])
    ks = (counts[0], counts[0], counts[1], counts[1])
    return [Value(value, details={"k": k}) for value, k in zip(found, ks, strict=True)]


def _fid_infinity(x: Tensor, y: FeatureStatistics, seed: int) -> list[Value]:
    found = fid_infinity(x, y, seed=seed)
    return [Value(found.value, found.standard_error, {"sizes": found.sizes, "values": found.values})]


#: by the names that people ask for
METRICS = {
    "fid": Metric(_fid, "pool", ("fid",), "statistics", "statistics", resampled=True),
    "sfid": Metric(_fid, "spatial", ("sfid",), "statistics", "statistics", resampled=True),
    "kid": Metric(_kid, "pool", ("kid",)),
    "is": Metric(_inception_score, "logits", ("is",), real="", resampled=True),
    "pr": Metric(_neighbours, "pool", ("precision", "recall", "density", "coverage")),
    "cmmd": Metric(_cmmd, "pool", ("cmmd",)),
    "fid_infinity": Metric(_fid_infinity, "pool", ("fid_infinity",), real="statistics"),
}
