"""All metrics from one pass: each is its own function, in any batches and processes; what is missing is said."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.metrics.confidence import bootstrap, fid_infinity
from fastdiff.metrics.evaluation import (
    METRICS,
    FeatureSet,
    Pixels,
    check_metrics,
    collect,
    evaluate,
    settings_of,
    share,
)
from fastdiff.metrics.features import Features
from fastdiff.metrics.frechet import frechet_distance_from_features
from fastdiff.metrics.inception_score import inception_score
from fastdiff.metrics.kernel import cmmd, kid
from fastdiff.metrics.neighbours import prdc

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = list(METRICS)
NAMES = [name for metric in METRICS.values() for name in metric.names]


class Projections:
    """Random projections of pixels: an extractor of every kind of features."""

    def __init__(self, width: int = 6) -> None:
        generator = torch.Generator().manual_seed(0)
        self.settings = {"features": "projections", "weights": "seed 0", "resize": "none", "width": width}
        self.pool, self.spatial, self.logits = (
            torch.randn(12, n, generator=generator, dtype=torch.float64) for n in (width, 4, 5)
        )

    def __call__(self, images: Tensor) -> Features:
        x = images.flatten(1).double() / 255
        return Features(x @ self.pool, x @ self.spatial, x @ self.logits)


def images(count: int, seed: int = 0, *, high: int = 256) -> Tensor:
    return torch.randint(high, (count, 3, 2, 2), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def features_of(pixels: Tensor, metrics=ALL, *, batch: int = 16, confidence: bool = False) -> FeatureSet:
    return collect(pixels.split(batch), Projections(), metrics, confidence=confidence)


def values(results) -> dict[str, float]:
    return {result.metric: result.value for result in results}


@pytest.fixture(scope="module")
def pair() -> tuple[Tensor, Tensor]:
    return images(60, 1), images(50, 2, high=200)


@pytest.fixture(scope="module")
def results(pair):
    return {r.metric: r for r in evaluate(*map(features_of, pair), ALL, seed=7)}


# ---- what the numbers are --------------------------------------------------------------------------


def test_each_metric_is_its_own_function(pair, results) -> None:
    (x, xs, xl), (y, ys, _) = map(Projections(), pair)
    expected = {
        "fid": frechet_distance_from_features(x, y),
        "sfid": frechet_distance_from_features(xs, ys),
        "kid": kid(x, y, subset_size=50, seed=7).value,
        "is": inception_score(xl, seed=7).value,
        **prdc(y, x)._asdict(),
        "cmmd": cmmd(x, y).value,
        "fid_infinity": fid_infinity(x, y, seed=7).value,
    }
    assert list(results) == NAMES
    for name, value in expected.items():
        assert results[name].value == pytest.approx(value, rel=1e-9, abs=1e-12), name


def test_standard_errors_are_their_functions(pair, results) -> None:
    (x, _, _), (y, _, _) = map(Projections(), pair)
    errors = {name: result.standard_error for name, result in results.items() if result.standard_error is not None}
    expected = {
        "kid": kid(x, y, subset_size=50, seed=7).standard_error,
        "cmmd": cmmd(x, y).standard_error,
        "fid_infinity": fid_infinity(x, y, seed=7).standard_error,
    }
    assert errors == pytest.approx(expected, rel=1e-6)


def test_every_result_says_what_it_depends_on(results) -> None:
    for name, result in results.items():
        assert (result.generated, result.real) == (60, None if name == "is" else 50), name
        assert result.features == Projections().settings
        assert result.seed == 7
        assert result.interval is None
    details = {name: result.details for name, result in results.items()}
    assert {"subsets": 100, "subset_size": 50}.items() <= details["kid"].items()
    assert details["is"]["splits"] == 10
    assert details["is"]["std"] > 0
    assert [details[name]["k"] for name in ("precision", "recall", "density", "coverage")] == [3, 3, 5, 5]
    assert details["fid_infinity"]["sizes"][-1] == 60
    json.dumps([asdict(result) for result in results.values()], allow_nan=False)


def test_a_set_is_as_good_as_itself(pair) -> None:
    same = features_of(pair[0])
    found = values(evaluate(same, same, ALL))
    assert found["fid"] == 0
    assert found["sfid"] == 0
    assert found["kid"] <= 0  # unbiased
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)


def test_brighter_images_are_as_far_as_they_are_brighter() -> None:
    """FID of a shift is its square: 12 values brighter by 3 of 255."""
    dark = images(40, high=250)
    dark_features, bright = (collect([x], Pixels()) for x in (dark, dark + 3))
    (result,) = evaluate(bright, dark_features)
    assert result.value == pytest.approx(12 * (3 / 255) ** 2, rel=1e-4)  # pixels are float32
    assert result.features == {"features": "pixels", "weights": "none", "resize": "none"}


def test_sure_and_balanced_answers_score_the_number_of_classes() -> None:
    class Reader:
        def __call__(self, x: Tensor) -> Features:
            return Features(x.flatten(1).double(), None, 100 * torch.eye(4, dtype=torch.float64)[x[:, 0, 0, 0].long()])

    pixels = images(4000)
    pixels[:, 0, 0, 0] = torch.arange(4000) % 4
    (result,) = evaluate(collect([pixels], Reader(), ["is"]), None, ["is"])
    assert 3.97 < result.value < 4  # of a tenth of the images, which are not quite balanced


def test_few_images_make_fewer_splits_and_smaller_subsets() -> None:
    few, more = images(7), images(9, 1)
    found = {r.metric: r for r in evaluate(*map(features_of, (few, more)), ["kid", "is"])}
    assert found["is"].details["splits"] == 7
    assert found["is"].value == pytest.approx(1)  # each split is one image
    assert found["kid"].details["subset_size"] == 7
    tiny = evaluate(*map(features_of, (images(2), images(3, 1))), ["kid"])
    assert tiny[0].standard_error is None  # unknown below 4 rows


def test_the_seed_counts(pair) -> None:
    sets = [features_of(x) for x in pair]
    a, b, c = (values(evaluate(*sets, ["kid", "is", "fid_infinity"], seed=seed)) for seed in (1, 2, 1))
    assert a == c
    assert all(a[name] != b[name] for name in a)


# ---- batches and processes --------------------------------------------------------------------------


@pytest.mark.parametrize("processes", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 16, 33])
def test_shares_hold_every_image_once(count: int, processes: int) -> None:
    shares = [share(count, rank, processes) for rank in range(processes)]
    assert [i for part in shares for i in part] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.filterwarnings("ignore:.*biased upwards")
@pytest.mark.parametrize("processes", [2, 3, 5, 8])
@pytest.mark.parametrize("count", [7, 16, 33])
def test_processes_change_nothing(count: int, processes: int) -> None:
    """In one process: what each would have seen, merged in the order of ranks."""
    pixels, real = images(count), features_of(images(40, 1))
    whole = FeatureSet(Projections().settings, ALL)
    for rank in range(processes):
        part = share(count, rank, processes)
        whole.merge(features_of(pixels[part.start : part.stop], batch=4) if part else FeatureSet({}, ALL))
    one = features_of(pixels)
    assert whole.count == one.count == count
    assert whole.statistics["pool"].count == count
    for kind in ("pool", "logits"):
        assert torch.equal(whole.rows(kind), one.rows(kind))
    a, b = (values(evaluate(features, real, ["fid", "sfid", "is", "pr"])) for features in (whole, one))
    assert a == pytest.approx(b, rel=1e-9, abs=1e-12)


def test_images_are_asked_about_once() -> None:
    seen = []

    class Counting(Projections):
        def __call__(self, x: Tensor) -> Features:
            seen.extend(x[:, 0, 0, 0].tolist())
            return super().__call__(x)

    pixels = images(30)
    evaluate(collect(pixels.split(7), Counting(), ALL), features_of(pixels), ALL)
    assert seen == pixels[:, 0, 0, 0].tolist()


def test_only_what_is_needed_is_kept() -> None:
    pixels = images(10)
    kept = {name: set(features_of(pixels, [name]).kept) for name in METRICS}
    assert kept == {
        "fid": set(),
        "sfid": set(),
        "kid": {"pool"},
        "is": {"logits"},
        "pr": {"pool"},
        "cmmd": {"pool"},
        "fid_infinity": {"pool"},
    }
    assert set(features_of(pixels, ["fid"]).statistics) == {"pool"}
    assert set(features_of(pixels, ["sfid"]).statistics) == {"pool", "spatial"}
    assert set(features_of(pixels, ["fid", "sfid", "is"], confidence=True).kept) == {"pool", "spatial", "logits"}


# ---- intervals and files --------------------------------------------------------------------------------


def test_intervals_are_those_of_the_bootstrap(pair) -> None:
    (x, xs, xl), (y, ys, _) = map(Projections(), pair)
    sets = [features_of(pixels, confidence=True) for pixels in pair]
    found = {r.metric: r for r in evaluate(*sets, ALL, seed=3, confidence=10)}
    options = {"resamples": 10, "method": "basic", "seed": 3}
    expected = {
        "fid": bootstrap(frechet_distance_from_features, x, y, **options),
        "sfid": bootstrap(frechet_distance_from_features, xs, ys, **options),
        "is": bootstrap(lambda rows: inception_score(rows, seed=3).value, xl, **options),
    }
    for name, interval in expected.items():
        assert found[name].value == pytest.approx(interval.value, rel=1e-8)
        assert found[name].interval == pytest.approx((interval.low, interval.high), rel=1e-6)
        assert found[name].standard_error == pytest.approx(interval.standard_error, rel=1e-6)
    assert all(found[name].interval is None for name in NAMES if name not in expected)


@pytest.mark.parametrize("says_how_many", [True, False])
def test_statistics_stand_for_real_images(pair, tmp_path, says_how_many: bool) -> None:
    generated, real = (features_of(pixels, confidence=True) for pixels in pair)
    real.save(tmp_path / "real.npz")
    loaded = FeatureSet.load(tmp_path / "real.npz")
    if not says_how_many:
        for statistics in loaded.statistics.values():
            statistics.count = loaded.count = 0
            statistics._squares /= 49
            statistics._summed = False
    names = ["fid", "sfid", "fid_infinity"]
    from_file = evaluate(generated, loaded, names)
    assert values(from_file) == pytest.approx(values(evaluate(generated, real, names)), rel=1e-9)
    assert [r.real for r in from_file] == 3 * [50 if says_how_many else None]
    assert from_file[0].features == Projections().settings
    x, y = Projections()(pair[0]).pool, Projections()(pair[1]).pool
    fixed = bootstrap(lambda rows: frechet_distance_from_features(rows, y), x, resamples=10, method="basic")
    (result,) = evaluate(generated, loaded, ["fid"], confidence=10)
    assert result.interval == pytest.approx((fixed.low, fixed.high), rel=1e-6)


def reloaded(features: FeatureSet, path: Path) -> FeatureSet:
    features.save(path)
    return FeatureSet.load(path)


def test_a_file_says_what_its_statistics_are_of(pair, tmp_path) -> None:
    features = features_of(pair[0])
    loaded = reloaded(features, tmp_path / "all.npz")
    assert (loaded.settings, loaded.count, loaded.is_file) == (features.settings, 60, True)
    other = Projections()
    other.settings["weights"] = "seed 1"
    with pytest.raises(InputError, match=r"'seed 1'.* and of .*'seed 0'.*one extractor"):
        evaluate(collect([pair[1]], other), loaded)


def test_guided_diffusions_files_have_spatial_statistics(pair, tmp_path) -> None:
    generated, real = map(features_of, pair)
    names = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
    moments = {kind: (real.statistics[kind].mean, real.statistics[kind].covariance) for kind in names}
    arrays = {n: m.numpy() for kind in names for n, m in zip(names[kind], moments[kind], strict=True)}
    np.savez(tmp_path / "theirs.npz", **arrays)
    found = values(evaluate(generated, FeatureSet.load(tmp_path / "theirs.npz"), ["fid", "sfid"]))
    assert found == pytest.approx(values(evaluate(generated, real, ["fid", "sfid"])), rel=1e-9)
    del arrays["sigma_s"]
    np.savez(tmp_path / "without.npz", **arrays)
    with pytest.raises(InputError, match=r"sfid needs spatial statistics .* holds statistics of pool features"):
        evaluate(generated, FeatureSet.load(tmp_path / "without.npz"), ["sfid"])


@pytest.mark.parametrize("settings", ["{", "[1]", np.ones(3)])
def test_settings_that_are_none_are_refused(tmp_path, settings) -> None:
    np.savez(tmp_path / "bad.npz", mu=np.zeros(2), sigma=np.eye(2), settings=settings)
    with pytest.raises(InputError, match=r"settings of .*bad.npz must be a JSON object"):
        FeatureSet.load(tmp_path / "bad.npz")


def test_statistics_of_both_allow_fid(pair, tmp_path) -> None:
    for i, pixels in enumerate(pair):
        features_of(pixels).statistics["pool"].save(tmp_path / f"{i}.npz")
    (result,) = evaluate(*(FeatureSet.load(tmp_path / f"{i}.npz") for i in range(2)))
    assert result.value == pytest.approx(values(evaluate(*map(features_of, pair)))["fid"])
    assert (result.generated, result.real) == (60, 50)
    assert result.features == {"features": "unknown", "weights": "unknown", "resize": "unknown"}


def test_too_few_images_are_warned_of() -> None:
    few, more = (features_of(images(n, n)) for n in (4, 20))
    with pytest.warns(UserWarning, match="4 samples of 6 features"):
        evaluate(few, more)


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metrics", "without", "message"),
    [
        (["fjd"], "", "unknown metric 'fjd': choose from fid, sfid, kid, is, pr, cmmd, fid_infinity"),
        ([], "", "no metric is named"),
        (["is", "kid"], "real", "kid compares with real images"),
        (["kid"], "rows", "kid needs pool rows of both sets: they were not kept, name the metrics"),
        (["sfid"], "rows", "sfid needs spatial statistics of both sets: they were not kept"),
    ],
)
def test_metrics_that_cannot_be_are_refused(pair, metrics, without: str, message: str) -> None:
    sets = [features_of(pixels, ["fid"] if without == "rows" else ALL) for pixels in pair]
    with pytest.raises(InputError, match=message):
        evaluate(sets[0], None if without == "real" else sets[1], metrics)


@pytest.mark.parametrize("name", [name for name in METRICS if name not in ("fid", "sfid", "is", "fid_infinity")])
def test_statistics_alone_do_not_allow_the_others(pair, name: str, tmp_path) -> None:
    generated, real = map(features_of, pair)
    with pytest.raises(InputError, match=f"{name} needs .* a file holds statistics of pool and spatial features"):
        evaluate(generated, reloaded(real, tmp_path / "real.npz"), [name])


def test_intervals_need_what_they_resample(pair) -> None:
    sets = [features_of(pixels, ["fid"]) for pixels in pair]
    with pytest.raises(InputError, match="there are no pool features: they were not kept"):
        evaluate(*sets, confidence=5)
    with pytest.raises(InputError, match="confidence must be 0 or at least 2 resamples, got 1"):
        evaluate(*sets, confidence=1)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images_are_refused(count: int) -> None:
    few = collect([images(count)] if count else [], Projections(), ALL)
    for sets, whose in (((few, features_of(images(9))), "generated"), ((features_of(images(9)), few), "real")):
        for name in ("fid", "kid", "pr"):
            with pytest.raises(InputError, match=f"at least 2 {whose} images are needed, there were {count}"):
                evaluate(*sets, [name])
    with pytest.raises(InputError, match="at least 2 generated images"):
        evaluate(few, None, ["is"])


def test_two_extractors_are_refused(pair) -> None:
    wide = collect([pair[1]], Projections(8), ALL)
    with pytest.raises(InputError, match=r"generated features are 6 wide, real ones 8: .*one extractor"):
        evaluate(features_of(pair[0]), wide, ["kid"])
    other = Projections()
    other.settings["weights"] = "seed 1"
    with pytest.raises(InputError, match=r"'seed 0'.* and of .*'seed 1'.*one extractor"):
        evaluate(features_of(pair[0]), collect([pair[1]], other), ["fid"])


def test_missing_kinds_of_features_are_named() -> None:
    with pytest.raises(InputError, match="is needs logits, which the extractor does not give"):
        collect([images(4)], Pixels(), ["fid", "is"])
    with pytest.raises(InputError, match="sfid needs spatial"):
        collect([images(4)], Pixels(), ["sfid"])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused(bad: float) -> None:
    def broken(x: Tensor) -> Tensor:
        features = x.flatten(1).double()
        features[2, 3] = bad
        return features

    with pytest.raises(InputError, match="pool holds NaN or infinite values, first in row 2"):
        collect([images(4)], broken)


def test_other_images_are_refused() -> None:
    with pytest.raises(InputError, match=r"images must be uint8.*fd\.metrics\.to_uint8"):
        collect([images(4).float() / 255], Pixels())
    with pytest.raises(InputError, match="must be 12 wide, as those before, got 27"):
        collect([images(4), torch.zeros(2, 3, 3, 3, dtype=torch.uint8)], Pixels())


def test_settings_are_always_there() -> None:
    def mine(x: Tensor) -> Tensor:
        return x.flatten(1).double()

    assert settings_of(mine) == {"features": "mine", "weights": "unknown", "resize": "unknown"}
    assert settings_of(Projections())["width"] == 6


def test_metrics_are_checked_before_there_are_images() -> None:
    check_metrics(["kid", "is"], None, FeatureSet({"features": "x"}, ["kid"]))
    check_metrics(["is"], None, None)
    with pytest.raises(InputError, match="unknown metric"):
        FeatureSet({}, ["kidd"])
