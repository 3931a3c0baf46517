"""Networks. Any callable ``model(x, t, **cond)`` will do in their place."""

from fastdiff.models.classifier import Classifier
from fastdiff.models.mlp import MLP
from fastdiff.models.unet import UNet

__all__ = ["MLP", "Classifier", "UNet"]
