"""Importing is lean, the public names are there, and setup.py stays small."""

import subprocess
import sys
from pathlib import Path

import pytest

import fastdiff as fd

HEAVY = (
    "triton",
    "torchvision",
    "matplotlib",
    "sklearn",
    "diffusers",
    "scipy",
    "PIL",
    "fastdiff._C",
    "fastdiff.training",
)


def test_import_loads_nothing_heavy():
    code = (
        "import sys, fastdiff, torch; "
        f"print([name for name in {HEAVY!r} if name in sys.modules], torch.cuda.is_initialized())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[] False"


@pytest.mark.parametrize(
    "name",
    [
        "Schedule",
        "Diffusion",
        "Sampler",
        "UNet",
        "MLP",
        "Classifier",
        "InputError",
        "backend",
        "explain",
        "ops",
        "noise",
        "metrics",
    ],
)
def test_public_names(name):
    assert hasattr(fd, name)


@pytest.mark.parametrize(
    "name", ["add_noise", "posterior_step", "ddim_step", "guide", "affine_step", "diffusion_loss", "group_norm_silu"]
)
def test_ops_are_public_and_documented(name):
    assert getattr(fd.ops, name).__doc__
    assert name in fd.explain()


def test_setup_is_short():
    setup = Path(__file__).parent.parent / "setup.py"
    assert len(setup.read_text().splitlines()) < 90
