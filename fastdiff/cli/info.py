"""``fastdiff info``."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import fastdiff
from fastdiff import backends
from fastdiff.cli.options import DeviceName, choose_device

PACKAGES = ("torch", "torchvision", "triton", "numpy", "scipy", "scikit-learn", "matplotlib", "diffusers")


def info(device: DeviceName = "auto") -> None:
    """Say what is installed here and which backend would run each op."""
    print(f"fastdiff {fastdiff.__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    print(f"CPU threads: {torch.get_num_threads()}, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        print(f"cuda:{index}: {torch.cuda.get_device_name(index)}")
    native, reason = backends.load("native")
    print(f"native: {native.describe() if native else reason}")
    print(fastdiff.explain(choose_device(device)))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
