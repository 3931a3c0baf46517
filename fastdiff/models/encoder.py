"""What the U-Net and the classifier have in common: the settings of their blocks, how these are built and run."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.errors import check
from fastdiff.models.convolution import Conv, Downsample, Layer, Linear, Upsample, packs
from fastdiff.models.layers import Attention, Conditional, GroupNormSiLU, Resample, ResBlock, TimeEmbedding
from fastdiff.models.settings import Check, Setting, exactly, is_number, is_whole, number, several, whole
from fastdiff.ops.layout import channels_last

E = TypeVar("E", bound="Encoder")
EITHER, MAYBE = exactly(True, False), whole(or_value=(None,))
SETTINGS: dict[str, Setting] = {
    "image_size": whole(),
    "in_channels": whole(),
    "model_channels": whole(least=2),
    "channel_mult": several(None, lambda value: is_number(value) and 0 < value < math.inf, "positive numbers"),
    "num_res_blocks": whole(),
    "attention_resolutions": several(None, is_whole, "resolutions of levels in pixels"),
    "num_heads": whole(),
    "num_head_channels": MAYBE,
    "norm_groups": whole(),
    "norm_eps": number(),
    "dropout": number(below=1),
    "scale_shift": EITHER,
    "resblock_updown": EITHER,
    "conv_resample": EITHER,
    "downsample_padding": exactly(1, 0),
    "embedding_channels": MAYBE,
    "frequency_shift": exactly(0, 1),
    "middle_attention": EITHER,
    "middle_attention_norm": EITHER,
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


class Encoder(Conditional):
    """A network whose blocks lead down through levels of half the resolution, conditional on the time.

    Attributes:
        blocks: the residual blocks in the order in which they run.
        emb: makes the conditions of all blocks of the time embedding.
    """

    conv_in: Conv
    down: nn.ModuleList
    middle: nn.ModuleList
    emb: Linear
    blocks: list[ResBlock]

    def prepared(self: E, dtype: torch.dtype | None = None) -> E:
        """A copy for inference, with its weights in ``dtype`` (default: theirs) and arranged for the machine once.

        Where there is nothing to convert or arrange it is this network itself. The copy takes new weights when it is
        told to: ``copy.refresh(network)``.
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
    def refresh(self, network: Encoder) -> None:
        """Take the weights of ``network``, of the same configuration, into the memory they have here.

        Raises:
            InputError: another configuration.
        """
        if network is self:
            return
        need = f"refresh needs a {type(self).__name__}"
        check(isinstance(network, type(self)), f"{need}, got {type(network).__name__}")
        mine, its = _values(self), _values(network)
        differing = [name for name in {**mine, **its} if name not in mine or name not in its]
        differing += [name for name in mine if name in its and mine[name].shape != its[name].shape]
        check(not differing, f"{need} of the same configuration, this one differs in {differing[:3]}")
        for name, value in mine.items():
            value.copy_(its[name])
        dtype = self.emb.weight.dtype
        if self._arranges(dtype):
            for layer in self.modules():
                if isinstance(layer, Layer):
                    layer.pack(dtype)

    def _arranges(self, dtype: torch.dtype) -> bool:
        return self.emb.weight.device.type == "cpu" and packs(dtype)

    def _in_precision(self, run: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
        """``run`` an image, channels-last, in the precision of the parameters, or in autocast's."""
        device = image.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.emb.weight.dtype
        with torch.autocast(device, enabled=False):
            return run(image.to(dtype, memory_format=channels_last(4)))

    def _conditions(self, embedding: Tensor) -> Iterator[Tensor]:
        """Each block's condition, all of one product, with the biases that blocks want to be part of them."""
        joined = [block.joined for block in self.blocks if block.joined is not None]
        made: Tensor = self.emb(F.silu(embedding), bias=self.emb.bias + torch.cat(joined) if joined else True)
        return iter(made.split([block.condition for block in self.blocks], 1))

    def _encoded(
        self, image: Tensor, t: Tensor, y: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor], Iterator[Tensor]]:
        """What the middle gives, what each block before it gave, and the conditions of the blocks that are left."""
        conditions = self._conditions(self._embedding(t, y, image.dtype))
        h = self.conv_in(image)
        skips = [h]
        for block in self.down:
            h = run_block(block, h, conditions)
            skips.append(h)
        return run_block(self.middle, h, conditions), skips, conditions


def _values(network: nn.Module) -> dict[str, Tensor]:
    return dict((*network.named_parameters(), *network.named_buffers()))


def run_block(block: nn.Module, h: Tensor, conditions: Iterator[Tensor]) -> Tensor:
    """The layers of a block one after another; each residual block takes its condition."""
    for layer in block.children():
        h = layer(h, next(conditions)) if isinstance(layer, ResBlock) else layer(h)
    return h


class Parts:
    """Builds the parts of one configuration, all settings of :data:`SETTINGS`."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config, self.blocks = config, config["num_res_blocks"]
        self.sizes = [config["image_size"] >> level for level in range(len(config["channel_mult"]))]
        self.widths = [round(multiple * config["model_channels"]) for multiple in config["channel_mult"]]
        self.embedding = config["embedding_channels"] or 4 * config["model_channels"]
        self._norm = {"groups": config["norm_groups"], "eps": config["norm_eps"]}

    def time(self) -> TimeEmbedding:
        return TimeEmbedding(self.config["model_channels"], self.embedding, self.config["frequency_shift"])

    def conv_in(self, channels: int) -> Conv:
        return Conv(channels, self.widths[0], 3, padding=1)

    def norm(self, channels: int) -> GroupNormSiLU:
        return GroupNormSiLU(channels, **self._norm)

    def conditioning(self, network: nn.Module) -> tuple[list[ResBlock], Linear]:
        """The residual blocks, and the layer that makes the conditions of all of them."""
        blocks = [block for block in network.modules() if isinstance(block, ResBlock)]
        return blocks, Linear(self.embedding, sum(block.condition for block in blocks))

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

    def heads(self, channels: int) -> int:
        """The number of attention heads for so many channels."""
        wide = self.config["num_head_channels"]
        if wide is None:
            return int(self.config["num_heads"])
        fits = channels % wide == 0
        check(fits, f"{channels} channels cannot be split into heads of {wide} (num_head_channels)")
        return int(channels // wide)

    def _block(self, inside: int, outside: int, level: int) -> nn.ModuleList:
        attention = [self._attention(outside)] if self.sizes[level] in self.config["attention_resolutions"] else []
        return nn.ModuleList([self._res(inside, outside), *attention])

    def _res(self, inside: int, outside: int, direction: int = 0) -> ResBlock:
        config = self.config
        settings = {"dropout": config["dropout"], "scale_shift": config["scale_shift"], **self._norm}
        return ResBlock(inside, outside, **settings, resample=direction)

    def _attention(self, channels: int, norm: bool = True) -> Attention:
        return Attention(channels, self.heads(channels), **self._norm, norm=norm)

    def _change(self, channels: int, direction: int) -> nn.Module:
        if self.config["resblock_updown"]:
            return self._res(channels, channels, direction)
        if not self.config["conv_resample"]:
            return Resample(direction)
        return (
            Upsample(channels, channels) if direction > 0 else Downsample(channels, self.config["downsample_padding"])
        )
