"""The classifier of noised images (Dhariwal & Nichol 2021, section 4): the way down of the U-Net, and one answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.errors import check
from fastdiff.models import encoder, guided_diffusion
from fastdiff.models.convolution import Linear
from fastdiff.models.encoder import CHECKS, Encoder, Parts
from fastdiff.models.layers import AttentionPool, zero_init
from fastdiff.models.settings import Setting, exactly, settled, whole
from fastdiff.ops.checks import check_floating

SETTINGS: dict[str, Setting] = {
    **encoder.SETTINGS,
    "num_classes": whole(),
    "pool": exactly("attention", "average"),
}


class Classifier(Encoder):
    """Noise-conditional classifier: ``classifier(x, t)``, images ``[N, C, H, W]`` to logits ``[N, num_classes]``.

    It computes in the precision of its parameters, or in autocast's; what it returns has the dtype of x. Inside all
    images are channels-last. For :class:`~fastdiff.guidance.ClassifierGuidance`, and by its features for metrics.

    Args:
        image_size: height and width of the images.
        in_channels: of the image.
        num_classes: how many there are.
        pool: what makes one vector of the last level: ``attention`` of its mean to all positions, or ``average``.
        The rest: as of :class:`~fastdiff.models.UNet`; the defaults are those of Dhariwal & Nichol.

    Raises:
        InputError: a configuration that does not fit together, inputs of the wrong shape.
    """

    label = None  # it is asked for one

    def __init__(
        self,
        image_size: int = 64,
        in_channels: int = 3,
        *,
        num_classes: int,
        model_channels: int = 128,
        channel_mult: Sequence[float] = (1, 2, 3, 4),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (32, 16, 8),
        num_heads: int = 1,
        num_head_channels: int | None = 64,
        norm_groups: int = 32,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        scale_shift: bool = True,
        resblock_updown: bool = True,
        conv_resample: bool = True,
        pool: str = "attention",
    ) -> None:
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        settings = settled("this configuration does not fit fastdiff.Classifier", config, SETTINGS, CHECKS)
        self.config: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
        parts = Parts(settings)
        width, size = parts.widths[-1], parts.sizes[-1]
        self.shape = (in_channels, image_size, image_size)
        self.time = parts.time()
        self.conv_in = parts.conv_in(in_channels)
        self.down, _ = parts.down()
        self.middle = parts.middle()
        self.norm_out = parts.norm(width)
        self.pool = (
            AttentionPool(width, parts.heads(width), size**2)
            if pool == "attention"
            else nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        )
        self.out = zero_init(Linear(width, num_classes))
        self.blocks, self.emb = parts.conditioning(self)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Logits ``[N, num_classes]`` of x ``[N, C, H, W]`` at t ``[N]`` (whole or fractional)."""
        return self.read(x, t)[1]

    def features(self, x: Tensor, t: Tensor) -> Tensor:
        """What the logits are a linear function of, ``[N, D]``: the pooled last level."""
        return self.read(x, t)[0]

    def read(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The features and the logits."""
        self._check_input(x, t)
        pooled = self._in_precision(lambda image: self._pooled(image, t), x)
        return pooled.to(x.dtype), self.out(pooled).to(x.dtype)

    @classmethod
    def from_guided_diffusion(cls, source: object, config: object) -> Classifier:
        """The network that an ``EncoderUNetModel`` of guided-diffusion (Dhariwal & Nichol 2021) is.

        Args:
            source: the path of a ``.pt`` file, of which no code is run, or of a ``.safetensors``; or a state dict.
            config: the arguments of ``EncoderUNetModel``, or the flags of ``classifier_train.py`` (those without
                ``model_channels``), as a dict or the path of a JSON file. What is left out has the default of there.

        Returns:
            In float32, with exactly the file's values, on the CPU, in evaluation mode.

        Raises:
            InputError: as :meth:`UNet.from_guided_diffusion <fastdiff.models.UNet.from_guided_diffusion>`.
        """
        return guided_diffusion.load_classifier(cls, source, config)

    def _pooled(self, image: Tensor, t: Tensor) -> Tensor:
        return self.norm_out.then(self.pool, self._encoded(image, t)[0])

    def _check_input(self, x: Tensor, t: Tensor) -> None:
        check_floating("x", x)
        fits = x.ndim == 4 and x.shape[1:] == self.shape
        check(fits, f"x must be [N, {', '.join(map(str, self.shape))}], got {list(x.shape)}")
        self._check_conditions(x, t, None)
