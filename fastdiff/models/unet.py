"""The U-Net of DDPM (Ho et al. 2020) and of ADM (Dhariwal & Nichol 2021), by configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.errors import check
from fastdiff.models import diffusers, encoder, guided_diffusion, weights
from fastdiff.models.convolution import Conv
from fastdiff.models.encoder import CHECKS, EITHER, MAYBE, Encoder, Parts, run_block
from fastdiff.models.layers import LabelEmbedding, zero_init
from fastdiff.models.settings import Setting, settled, whole
from fastdiff.ops.checks import check_floating
from fastdiff.ops.layout import format_of

SETTINGS: dict[str, Setting] = {
    **encoder.SETTINGS,
    "out_channels": MAYBE,
    "num_classes": MAYBE,
    "null_label": EITHER,
    "learned_variance": EITHER,
    "condition_channels": whole(least=0),
}


class UNet(Encoder):
    """Noise-conditional U-Net: ``unet(x, t, y=None, condition=None)``, ``[N, C, H, W]`` to ``[N, out, H, W]``.

    It computes in the precision of its parameters, or in autocast's; what it returns has the dtype and memory format of
    x. Inside all images are channels-last. For sampling, :meth:`prepared` is the same network, faster.

    Args:
        image_size: height and width it is built for; it places the attention. Other sizes run if they divide by
            2 ** (levels - 1).
        in_channels: of the image.
        out_channels: default ``in_channels``; twice that with ``learned_variance``.
        model_channels: what widths are counted in; the time embedding has as many sines and cosines.
        channel_mult: width of each level in units of ``model_channels``; a fraction will do if the product is whole.
        num_res_blocks: per level on the way down; one more on the way up.
        attention_resolutions: resolutions (pixels) that have attention.
        num_heads, num_head_channels: attention heads; ``num_head_channels`` sets their width instead of their number.
        norm_groups, norm_eps: of group norm.
        dropout: in the residual blocks.
        scale_shift: AdaGN (ADM) instead of adding the time embedding (DDPM).
        resblock_updown: change the resolution in residual blocks (ADM) instead of by single convolutions (DDPM).
        conv_resample: False changes the resolution by averaging and repeating pixels alone.
        downsample_padding: 1, or 0 for padding on the right and below only (the TensorFlow network of Ho et al.).
        num_classes: class-conditional on ``y``, int64 ``[N]``. None: unconditional.
        null_label: ``y = num_classes`` is the label of classifier-free guidance that stands for no condition.
        learned_variance: twice the output channels, the last half for the variance.
        condition_channels: channels of an image ``condition`` joined to x (Palette, Saharia et al. 2022);
            a smaller one is upsampled to x's size.
        embedding_channels: of the time embedding; default 4 ``model_channels``.
        frequency_shift: 1 spreads the frequencies of the time embedding to 1/10,000, as Ho et al. do; 0 stops before.
        middle_attention, middle_attention_norm: whether the middle has attention, and that a norm in front.

    The CIFAR-10 network of Ho et al. 2020 is
    ``UNet(32, channel_mult=(1, 2, 2, 2), attention_resolutions=(16,), dropout=0.1)``.

    Raises:
        InputError: a configuration that does not fit together, inputs of the wrong shape, labels out of range.
    """

    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 3,
        out_channels: int | None = None,
        *,
        model_channels: int = 128,
        channel_mult: Sequence[float] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        num_heads: int = 1,
        num_head_channels: int | None = None,
        norm_groups: int = 32,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        scale_shift: bool = False,
        resblock_updown: bool = False,
        conv_resample: bool = True,
        downsample_padding: int = 1,
        num_classes: int | None = None,
        null_label: bool = True,
        learned_variance: bool = False,
        condition_channels: int = 0,
        embedding_channels: int | None = None,
        frequency_shift: int = 0,
        middle_attention: bool = True,
        middle_attention_norm: bool = True,
    ) -> None:
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        settled("this configuration does not fit fastdiff.UNet", config, SETTINGS, CHECKS)
        self.config: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
        parts = Parts(self.config)
        self.in_channels, self.condition_channels = in_channels, condition_channels
        self.widths, self.factor = parts.widths, 2 ** (len(channel_mult) - 1)
        self.time = parts.time()
        self.label = LabelEmbedding(num_classes, parts.embedding, null_label) if num_classes is not None else None
        self.conv_in = parts.conv_in(in_channels + condition_channels)
        self.down, skips = parts.down()
        self.middle = parts.middle()
        self.up = parts.up(skips)
        self.norm_out = parts.norm(parts.widths[0])
        out = (out_channels or in_channels) * (2 if learned_variance else 1)
        self.conv_out = zero_init(Conv(parts.widths[0], out, 3, padding=1))
        self.blocks, self.emb = parts.conditioning(self)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """x ``[N, C, H, W]``, t ``[N]`` (whole or fractional), y int64 ``[N]``, condition ``[N, c, h, w]``."""
        self._check_input(x, t, y, condition)
        out = self._in_precision(lambda image: self._run(image, t, y), self._with_condition(x, condition))
        return out.to(x.dtype, memory_format=format_of(x))

    @classmethod
    def from_diffusers(cls, source: object, *, subfolder: str | None = None) -> UNet:
        """The network that a ``UNet2DModel`` of diffusers is: ``unet(x, t, y)`` is its ``model(x, t, y).sample``.

        The blocks of DDPM and ADM are known: ``DownBlock2D``, ``AttnDownBlock2D``, ``ResnetDownsampleBlock2D``, the
        same on the way up, and ``UNetMidBlock2D``. Twice as many output as input channels are a learned variance.

        Args:
            source: a directory with ``config.json`` and ``diffusion_pytorch_model.safetensors`` (or an index of
                several; or ``.bin``, of which no code is run), a pipeline's directory, of which its ``unet`` is read,
                or a live ``UNet2DModel``.
            subfolder: of the directory.

        Returns:
            In float32, with exactly the file's values, on the CPU, in evaluation mode, without a null label.

        Raises:
            InputError: nothing there or damaged, every setting that has no counterpart here, every tensor that is
                missing, unknown or of another shape.
        """
        return diffusers.load(cls, source, subfolder)

    @classmethod
    def from_guided_diffusion(cls, source: object, config: object) -> UNet:
        """The network that a ``UNetModel`` of guided-diffusion (Dhariwal & Nichol 2021) is, or its ``SuperResModel``.

        Args:
            source: the path of a ``.pt`` file, of which no code is run, or of a ``.safetensors``; or a state dict.
            config: the arguments of ``UNetModel``, or the flags of its scripts (those without ``model_channels``),
                as a dict or the path of a JSON file. What is left out has the default of there. Channels that the
                input has and the output has not, and those of ``SuperResModel``, are ``condition_channels``.

        Returns:
            As :meth:`from_diffusers`.

        Raises:
            InputError: as :meth:`from_diffusers`.
        """
        return guided_diffusion.load(cls, source, config)

    def to_diffusers(self, *, flip_sin_to_cos: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """``(config, state)``: ``UNet2DModel(**config)`` with ``load_state_dict(state)`` computes what this does.

        A null label is its last class. It takes a condition's channels after the image's, of the image's size.

        Args:
            flip_sin_to_cos: of the time embedding: False puts the sines first, as the networks of Ho et al. have them.

        Returns:
            config: all 28 arguments; state: copies, in this network's dtype and on its device.

        Raises:
            InputError: every setting that ``UNet2DModel`` does not have.
        """
        settings = diffusers.config(self, flip_sin_to_cos)
        return settings, weights.exported(self, diffusers.table(self, flip_sin_to_cos))

    def save_diffusers(self, path: object) -> None:
        """Write a new directory that ``UNet2DModel.from_pretrained`` reads; whole or not at all.

        Raises:
            InputError: the path exists, or a setting that ``UNet2DModel`` does not have.
        """
        diffusers.save(self, path)

    def to_guided_diffusion(self, *, new_attention_order: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """``(config, state)`` of the ``UNetModel`` of guided-diffusion that computes what this does.

        A null label is its last class. With a condition of as many channels as the image it is a ``SuperResModel``.

        Args:
            new_attention_order: ``use_new_attention_order``: rows of query, key and value in turn, not head by head.

        Returns:
            config: the arguments of its constructor; state: copies, in this network's dtype and on its device.

        Raises:
            InputError: every setting that ``UNetModel`` does not have; its group norms are of 32 groups.
        """
        settings = guided_diffusion.config(self, new_attention_order)
        return settings, weights.exported(self, guided_diffusion.table(self, new_attention_order))

    def _run(self, image: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        h, skips, conditions = self._encoded(image, t, y)
        for block in self.up:
            h = run_block(block, torch.cat((h, skips.pop()), 1), conditions)
        return self.norm_out.then(self.conv_out, h)

    def _with_condition(self, x: Tensor, condition: Tensor | None) -> Tensor:
        if condition is None:
            return x
        if condition.shape[2:] != x.shape[2:]:
            condition = F.interpolate(condition, x.shape[2:], mode="bilinear", antialias=True)
        return torch.cat((x, condition.to(x.dtype)), 1)

    def _check_input(self, x: Tensor, t: Tensor, y: Tensor | None, condition: Tensor | None) -> None:
        check_floating("x", x)
        shape = list(x.shape)
        check(x.ndim == 4 and shape[1] == self.in_channels, f"x must be [N, {self.in_channels}, H, W], got {shape}")
        fits = all(size and size % self.factor == 0 for size in shape[2:])
        check(fits, f"height and width must divide by {self.factor}, got {shape[2:]}")
        self._check_conditions(x, t, y)
        wanted = self.condition_channels > 0
        check(wanted or condition is None, "this model takes no condition image (condition_channels=0)")
        if wanted:
            self._check_image(condition, x)

    def _check_image(self, condition: Tensor | None, x: Tensor) -> None:
        expected = [len(x), self.condition_channels]
        need = f"condition must be {[*expected, 'h', 'w']}"
        check(condition is not None, f"{need}, got None")
        assert condition is not None
        check_floating("condition", condition)
        fits = condition.ndim == 4 and list(condition.shape[:2]) == expected and condition.shape[2:].numel() > 0
        check(fits, f"{need}, got {list(condition.shape)}")
        check(condition.device == x.device, f"condition must be on {x.device}, got {condition.device}")
