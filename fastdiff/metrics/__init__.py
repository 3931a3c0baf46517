"""Measures of how close samples are to data, of their features: Fréchet and kernel distances, precision and recall."""

from fastdiff.metrics.confidence import bootstrap, extrapolate, fid_infinity
from fastdiff.metrics.energy import energy_distance
from fastdiff.metrics.evaluation import FeatureSet, collect, evaluate
from fastdiff.metrics.features import Features, to_uint8
from fastdiff.metrics.fid import FID
from fastdiff.metrics.frechet import frechet_distance, frechet_distance_from_features, sqrtm_psd
from fastdiff.metrics.inception import Inception
from fastdiff.metrics.inception_score import inception_score
from fastdiff.metrics.kernel import cmmd, kid, mmd
from fastdiff.metrics.neighbours import prdc
from fastdiff.metrics.statistics import FeatureStatistics

__all__ = [
    "FID",
    "FeatureSet",
    "FeatureStatistics",
    "Features",
    "Inception",
    "bootstrap",
    "cmmd",
    "collect",
    "energy_distance",
    "evaluate",
    "extrapolate",
    "fid_infinity",
    "frechet_distance",
    "frechet_distance_from_features",
    "inception_score",
    "kid",
    "mmd",
    "prdc",
    "sqrtm_psd",
    "to_uint8",
]
