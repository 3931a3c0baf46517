"""fastdiff: diffusion-model sampling and training, fused and proven against its own plain-PyTorch reference."""

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version

from fastdiff import guidance, metrics, noise, ops
from fastdiff.diffusion import Diffusion
from fastdiff.errors import InputError
from fastdiff.learned_schedule import LearnedSchedule
from fastdiff.models import MLP, Classifier, UNet
from fastdiff.ops import backend, explain
from fastdiff.sampler import Recorder, Sampler
from fastdiff.schedule import Schedule

try:
    __version__ = _version("fastdiff")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "MLP",
    "Classifier",
    "Diffusion",
    "InputError",
    "LearnedSchedule",
    "Recorder",
    "Sampler",
    "Schedule",
    "UNet",
    "backend",
    "explain",
    "guidance",
    "metrics",
    "noise",
    "ops",
]
