"""The U-Net of DDPM (Ho et al. 2020) and of ADM (Dhariwal & Nichol 2021), by configuration."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.errors import check
from fastdiff.models import diffusers, guided_diffusion, weights
from fastdiff.models.convolution import Conv, Downsample, Layer, Linear, Upsample, packs
from fastdiff.models.layers import (
    Attention,
    Conditional,
    GroupNormSiLU,
    LabelEmbedding,
    Resample,
    ResBlock,
    TimeEmbedding,
    zero_init,
)
from fastdiff.models.settings import Check, Setting, exactly, is_number, is_whole, number, settled, several, whole
from fastdiff.ops.checks import check_floating
from fastdiff.ops.layout import channels_last, format_of

_EITHER, _MAYBE = exactly(True, False), whole(or_value=(None,))
SETTINGS: dict[str, Setting] = {
    "image_size": whole(),
    "in_channels": whole(),
    "out_channels": _MAYBE,
    "model_channels": whole(least=2),
    "channel_mult": several(None, lambda value: is_number(value) and 0 < value < math.inf, "positive numbers"),
    "num_res_blocks": whole(),
    "attention_resolutions": several(None, is_whole, "resolutions of levels in pixels"),
    "num_heads": whole(),
    "num_head_channels": _MAYBE,
    "norm_groups": whole(),
    "norm_eps": number(),
    "dropout": number(below=1),
    "scale_shift": _EITHER,
    "resblock_updown": _EITHER,
    "conv_resample": _EITHER,
    "downsample_padding": exactly(1, 0),
    "num_classes": _MAYBE,
    "null_label": _EITHER,
    "learned_variance": _EITHER,
    "condition_channels": whole(least=0),
    "embedding_channels": _MAYBE,
    "frequency_shift": exactly(0, 1),
    "middle_attention": _EITHER,
    "middle_attention_norm": _EITHER,
}


def _frequencies(config: dict[str, Any]) -> list[str]:
    channels, least = config["model_channels"], 2 + 2 * config["frequency_shift"]
    return [] if channels >= least else [f"model_channels must be at least {least}, to be sines and cosines"]


def _levels(config: dict[str, Any]) -> list[str]:
    mult, channels, size = config["channel_mult"], config["model_channels"], config["image_size"]
    widths = [multiple * channels for multiple in mult]
    if not mult or any(round(width) < 1 or abs(width - round(width)) >= 1e-6 for width in widths):
        return [f"channel_mult must name at least one level, each a whole number of channels, got {mult}"]
    halvings = len(mult) - 1
    return [f"image_size {size} cannot be halved {halvings} times (channel_mult)"] if size % 2**halvings else []


def _attended(config: dict[str, Any]) -> list[str]:
    sizes = [config["image_size"] >> level for level in range(len(config["channel_mult"]))]
    unknown = sorted(set(config["attention_resolutions"]) - set(sizes))
    return [f"attention_resolutions {unknown} do not occur: the levels are {sizes}"] if unknown else []


CHECKS: tuple[Check, ...] = (
    (("frequency_shift", "model_channels"), _frequencies),
    (("channel_mult", "model_channels", "image_size"), _levels),
    (("channel_mult", "attention_resolutions", "image_size"), _attended),
)


class UNet(Conditional):
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
        parts = _Parts(self.config)
        emb = embedding_channels or 4 * model_channels
        self.in_channels, self.condition_channels = in_channels, condition_channels
        self.widths, self.factor = parts.widths, 2 ** (len(channel_mult) - 1)
        self.time = TimeEmbedding(model_channels, emb, frequency_shift)
        self.label = LabelEmbedding(num_classes, emb, null_label) if num_classes is not None else None
        width = parts.widths[0]
        self.conv_in = Conv(in_channels + condition_channels, width, 3, padding=1)
        self.down, skips = parts.down()
        self.middle = parts.middle()
        self.up = parts.up(skips)
        self.norm_out = GroupNormSiLU(width, norm_groups, norm_eps)
        out = (out_channels or in_channels) * (2 if learned_variance else 1)
        self.conv_out = zero_init(Conv(width, out, 3, padding=1))
        self.conditions = [block.condition for block in self.modules() if isinstance(block, ResBlock)]
        self.emb = Linear(emb, sum(self.conditions))
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """x ``[N, C, H, W]``, t ``[N]`` (whole or fractional), y int64 ``[N]``, condition ``[N, c, h, w]``."""
        self._check_input(x, t, y, condition)
        image, device = self._with_condition(x, condition), x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.emb.weight.dtype
        with torch.autocast(device, enabled=False):
            out = self._run(image.to(dtype, memory_format=channels_last(4)), t, y)
        return out.to(x.dtype, memory_format=format_of(x))

    def prepared(self, dtype: torch.dtype | None = None) -> UNet:
        """A copy for inference, with its weights in ``dtype`` (default: theirs) and arranged for the machine once.

        Where there is nothing to convert or arrange it is this network itself. The copy takes new weights when it is
        told to: ``copy.refresh(unet)``.
        """
        dtype = dtype or self.emb.weight.dtype
        if dtype == self.emb.weight.dtype and (self.emb.packed or not self._arranges(dtype)):
            return self
        with torch.inference_mode(False):
            made = copy.deepcopy(self).to(dtype).eval().requires_grad_(False)
        made.refresh(self)
        return made

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self, unet: UNet) -> None:
        """Take the weights of ``unet``, of the same configuration, into the memory they have here.

        Raises:
            InputError: another configuration.
        """
        if unet is self:
            return
        check(isinstance(unet, UNet), f"refresh needs a UNet, got {type(unet).__name__}")
        mine, its = _values(self), _values(unet)
        differing = [name for name in {**mine, **its} if name not in mine or name not in its]
        differing += [name for name in mine if name in its and mine[name].shape != its[name].shape]
        check(not differing, f"refresh needs a UNet of the same configuration, this one differs in {differing[:3]}")
        for name, value in mine.items():
            value.copy_(its[name])
        dtype = self.emb.weight.dtype
        if self._arranges(dtype):
            for layer in self.modules():
                if isinstance(layer, Layer):
                    layer.pack(dtype)

    def _arranges(self, dtype: torch.dtype) -> bool:
        return self.emb.weight.device.type == "cpu" and packs(dtype)

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

    def _run(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        conditions = iter(self.emb(F.silu(self._embedding(t, y, x.dtype))).split(self.conditions, 1))
        h = self.conv_in(x)
        skips = [h]
        for block in self.down:
            h = _run(block, h, conditions)
            skips.append(h)
        h = _run(self.middle, h, conditions)
        for block in self.up:
            h = _run(block, torch.cat((h, skips.pop()), 1), conditions)
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


def _values(unet: UNet) -> dict[str, Tensor]:
    return dict((*unet.named_parameters(), *unet.named_buffers()))


def _run(block: nn.Module, h: Tensor, conditions: Iterator[Tensor]) -> Tensor:
    for layer in block.children():
        h = layer(h, next(conditions)) if isinstance(layer, ResBlock) else layer(h)
    return h


class _Parts:
    """Builds the parts of one configuration."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config, self.blocks = config, config["num_res_blocks"]
        self.sizes = [config["image_size"] >> level for level in range(len(config["channel_mult"]))]
        self.widths = [round(multiple * config["model_channels"]) for multiple in config["channel_mult"]]
        self.norm = {"groups": config["norm_groups"], "eps": config["norm_eps"]}

    def down(self) -> tuple[nn.ModuleList, list[int]]:
        """The blocks on the way down, and the width of each skip connection."""
        blocks, skips = nn.ModuleList(), [self.widths[0]]
        for level, width in enumerate(self.widths):
            for _ in range(self.blocks):
                blocks.append(self._block(skips[-1], width, level))
                skips.append(width)
            if level < len(self.widths) - 1:
                blocks.append(nn.ModuleList([self._change(width, -1)]))
                skips.append(width)
        return blocks, skips

    def middle(self) -> nn.ModuleList:
        width = self.widths[-1]
        norm = self.config["middle_attention_norm"]
        attention = [self._attention(width, norm)] if self.config["middle_attention"] else []
        return nn.ModuleList([self._res(width, width), *attention, self._res(width, width)])

    def up(self, skips: list[int]) -> nn.ModuleList:
        """The blocks on the way up; each takes the newest skip connection that is left."""
        blocks, inside, skips = nn.ModuleList(), skips[-1], list(skips)
        for level, width in reversed(list(enumerate(self.widths))):
            for i in range(self.blocks + 1):
                block = self._block(inside + skips.pop(), width, level)
                if level and i == self.blocks:
                    block.append(self._change(width, 1))
                blocks.append(block)
                inside = width
        return blocks

    def _block(self, inside: int, outside: int, level: int) -> nn.ModuleList:
        attention = [self._attention(outside)] if self.sizes[level] in self.config["attention_resolutions"] else []
        return nn.ModuleList([self._res(inside, outside), *attention])

    def _res(self, inside: int, outside: int, direction: int = 0) -> ResBlock:
        config = self.config
        settings = {"dropout": config["dropout"], "scale_shift": config["scale_shift"], **self.norm}
        return ResBlock(inside, outside, **settings, resample=direction)

    def _attention(self, channels: int, norm: bool = True) -> Attention:
        heads, wide = self.config["num_heads"], self.config["num_head_channels"]
        if wide is not None:
            fits = wide >= 1 and channels % wide == 0
            check(fits, f"{channels} channels cannot be split into heads of {wide} (num_head_channels)")
            heads = channels // wide
        return Attention(channels, heads, **self.norm, norm=norm)

    def _change(self, channels: int, direction: int) -> nn.Module:
        if self.config["resblock_updown"]:
            return self._res(channels, channels, direction)
        if not self.config["conv_resample"]:
            return Resample(direction)
        return (
            Upsample(channels, channels) if direction > 0 else Downsample(channels, self.config["downsample_padding"])
        )
