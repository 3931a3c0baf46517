"""Weights of diffusers' ``UNet2DModel``: its settings in ours and back, its names of our tensors, its files.

The facts are those of diffusers 0.42: the arguments of ``UNet2DModel``, which block does what, the names in its files.
diffusers itself is never imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fastdiff import _io
from fastdiff.errors import check
from fastdiff.models import weights
from fastdiff.models.convolution import Downsample, Upsample
from fastdiff.models.layers import Attention, ResBlock
from fastdiff.models.settings import (
    Check,
    Setting,
    anything,
    exactly,
    is_whole,
    number,
    refuse,
    settled,
    several,
    whole,
)
from fastdiff.models.weights import UNFIT, Entry

if TYPE_CHECKING:
    from fastdiff.models.unet import UNet

NAME = "UNet2DModel"
CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model"
PIPELINE = "model_index.json"
#: plain; with attention; without, and with residual blocks that change the resolution
DOWN = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")

# ---- settings ---------------------------------------------------------------------------------


def _types(names: tuple[str, ...], default: tuple[int, ...]) -> Setting:
    return several([names[i] for i in default], lambda name: _plain(name) in names, f"of {', '.join(names)}")


def _plain(name: Any) -> Any:
    """A block's type without the prefix that old checkpoints have."""
    return name.removeprefix("UNetRes") if isinstance(name, str) else name


def _is_size(value: Any) -> bool:
    sizes = value if isinstance(value, list | tuple) else [value]
    return value is None or (0 < len(sizes) <= 2 and all(map(is_whole, sizes)))


SETTINGS: dict[str, Setting] = {
    "sample_size": Setting(None, _is_size, "a whole number, two of them, or None"),
    "in_channels": whole(3),
    "out_channels": whole(3),
    "center_input_sample": exactly(False),
    "time_embedding_type": exactly("positional"),
    "time_embedding_dim": whole(or_value=(None,)),
    "freq_shift": exactly(0, 1),
    "flip_sin_to_cos": exactly(True, False),
    "down_block_types": _types(DOWN, (0, 1, 1, 1)),
    "mid_block_type": exactly("UNetMidBlock2D"),
    "up_block_types": _types(UP, (1, 1, 1, 0)),
    "block_out_channels": several((224, 448, 672, 896), is_whole, "whole numbers"),
    "layers_per_block": whole(2),
    "mid_block_scale_factor": exactly(1),
    "downsample_padding": exactly(1, 0),
    "downsample_type": exactly("conv", "resnet", None),
    "upsample_type": exactly("conv", "resnet", None),
    "dropout": number(0.0),
    "act_fn": exactly("silu", "swish"),
    "attention_head_dim": whole(8, or_value=(None,)),
    "norm_num_groups": whole(32),
    "attn_norm_num_groups": whole(or_value=(None,)),
    "norm_eps": number(1e-5),
    "resnet_time_scale_shift": exactly("default", "scale_shift"),
    "add_attention": exactly(True, False),
    "class_embed_type": exactly(None),
    "num_class_embeds": whole(or_value=(None,)),
    "num_train_timesteps": anything(),
}
TYPES = ("block_out_channels", "down_block_types", "up_block_types")


def _attention(values: dict[str, Any]) -> list[bool]:
    """Which levels have attention on the way down."""
    return [_plain(name) == DOWN[1] for name in values["down_block_types"]]


def _levels(values: dict[str, Any]) -> list[str]:
    counts = [len(values[name]) for name in TYPES]
    if len(set(counts)) > 1 or not counts[0]:
        return [f"{', '.join(TYPES)} must name the same levels, got {counts} of them"]
    up = [_plain(name) == UP[1] for name in reversed(values["up_block_types"])]
    differing = [level for level, (a, b) in enumerate(zip(_attention(values), up, strict=True)) if a != b]
    where = f"at levels {differing}"
    return [f"down_block_types and up_block_types must both have attention or none {where}"] if differing else []


def _changes(values: dict[str, Any]) -> set[str]:
    """How the resolution is changed: ``conv``, ``resnet``, both, or never."""
    kinds = set()
    for side, names in (("down", DOWN), ("up", UP)):
        own = ("conv", values[f"{side}sample_type"] or "conv", "resnet")
        kinds |= {own[names.index(_plain(name))] for name in values[f"{side}_block_types"][:-1]}
    return kinds


def _one_change(values: dict[str, Any]) -> list[str]:
    mixed = len(_changes(values)) > 1
    names = "down_block_types, downsample_type, up_block_types, upsample_type"
    return [f"{names} change the resolution by conv here and by resnet there: must be one kind"] if mixed else []


def _widths(values: dict[str, Any]) -> list[str]:
    widths, groups, head = (values[key] for key in ("block_out_channels", "norm_num_groups", "attention_head_dim"))
    uneven = [width for width in widths if width % groups]
    problems = [f"norm_num_groups={groups} must divide the widths {uneven}"] if uneven else []
    attended = {width for width, here in zip(widths, _attention(values), strict=False) if here}
    attended |= set(widths[-1:]) if values["add_attention"] else set()
    uneven = sorted(width for width in attended if width % (head or width))
    return problems + ([f"attention_head_dim={head} must divide the widths {uneven}"] if uneven else [])


def _middle_norm(values: dict[str, Any]) -> list[str]:
    groups, given = values["norm_num_groups"], values["attn_norm_num_groups"]
    fits = not values["add_attention"] or given in (None, groups)
    return [] if fits else [f"attn_norm_num_groups={given} must be None or norm_num_groups={groups}"]


CHECKS: tuple[Check, ...] = (
    (TYPES, _levels),
    (("down_block_types", "up_block_types", "downsample_type", "upsample_type"), _one_change),
    ((*TYPES[:2], "norm_num_groups", "attention_head_dim", "add_attention"), _widths),
    (("norm_num_groups", "attn_norm_num_groups", "add_attention"), _middle_norm),
)


def arguments(values: dict[str, Any]) -> dict[str, Any]:
    """UNet's arguments for the settings of a ``UNet2DModel``."""
    widths, sizes, head = values["block_out_channels"], values["sample_size"], values["attention_head_dim"]
    size = weights.image_size(max(sizes) if isinstance(sizes, list | tuple) else sizes, len(widths))
    learned = values["out_channels"] == 2 * values["in_channels"]
    scale_shift = values["resnet_time_scale_shift"] == "scale_shift"
    return {
        "image_size": size,
        "in_channels": values["in_channels"],
        "out_channels": values["in_channels"] if learned else values["out_channels"],
        "learned_variance": learned,
        "model_channels": widths[0],
        "channel_mult": weights.multiples(widths, widths[0]),
        "num_res_blocks": values["layers_per_block"],
        "attention_resolutions": [size >> level for level, here in enumerate(_attention(values)) if here],
        "num_head_channels": head,
        "norm_groups": values["norm_num_groups"],
        "norm_eps": values["norm_eps"],
        "dropout": values["dropout"],
        "scale_shift": scale_shift,
        "resblock_updown": _changes(values) == {"resnet"},
        "downsample_padding": values["downsample_padding"],
        "num_classes": values["num_class_embeds"],
        "null_label": False,
        "embedding_channels": values["time_embedding_dim"],
        "frequency_shift": values["freq_shift"],
        "middle_attention": values["add_attention"],
        "middle_attention_norm": not scale_shift or values["attn_norm_num_groups"] is not None,
    }


def config(unet: UNet, flip_sin_to_cos: bool) -> dict[str, Any]:
    """The arguments of the ``UNet2DModel`` that computes what ``unet`` computes.

    Raises:
        InputError: every setting of ``unet`` that it does not have.
    """
    ours = unet.config
    refuse(f"this UNet is no {NAME}", _not_theirs(unet))
    attention = [
        unet.config["image_size"] >> level in ours["attention_resolutions"] for level in range(len(unet.widths))
    ]
    resnet, norm = ours["resblock_updown"], ours["middle_attention_norm"] and ours["scale_shift"]
    kinds = [1 if here else 2 * resnet for here in attention]
    change = "resnet" if resnet else "conv"
    theirs = {
        "sample_size": ours["image_size"],
        "in_channels": unet.conv_in.in_channels,
        "out_channels": unet.conv_out.out_channels,
        "time_embedding_dim": ours["embedding_channels"],
        "freq_shift": ours["frequency_shift"],
        "flip_sin_to_cos": flip_sin_to_cos,
        "down_block_types": [DOWN[kind] for kind in kinds],
        "up_block_types": [UP[kind] for kind in reversed(kinds)],
        "block_out_channels": unet.widths,
        "layers_per_block": ours["num_res_blocks"],
        "downsample_padding": ours["downsample_padding"],
        "downsample_type": change,
        "upsample_type": change,
        "dropout": ours["dropout"],
        "attention_head_dim": _head_width(unet),
        "norm_num_groups": ours["norm_groups"],
        "attn_norm_num_groups": ours["norm_groups"] if norm and ours["middle_attention"] else None,
        "norm_eps": ours["norm_eps"],
        "resnet_time_scale_shift": "scale_shift" if ours["scale_shift"] else "default",
        "add_attention": ours["middle_attention"],
        "num_class_embeds": None if unet.label is None else unet.label.num_embeddings,
    }
    return {key: theirs.get(key, setting.default) for key, setting in SETTINGS.items()}


def _not_theirs(unet: UNet) -> list[str]:
    ours, problems = unet.config, []
    if unet.widths[0] != ours["model_channels"]:
        problems.append(f"channel_mult must begin with 1, got {ours['channel_mult']}")
    if len(unet.widths) > 1 and not (ours["resblock_updown"] or ours["conv_resample"]):
        problems.append("conv_resample must be True")
    if ours["middle_attention"] and not (ours["middle_attention_norm"] or ours["scale_shift"]):
        problems.append("middle_attention_norm must be True without scale_shift")
    head_widths = _head_widths(unet)
    if ours["num_heads"] > 1 and len(head_widths) > 1:
        problems.append(f"num_heads={ours['num_heads']} must make heads of one width, not {sorted(head_widths)}")
    return problems


def _head_widths(unet: UNet) -> set[int]:
    return {m.qkv.in_features // m.heads for m in unet.modules() if isinstance(m, Attention)}


def _head_width(unet: UNet) -> int | None:
    ours = unet.config
    if ours["num_head_channels"] is not None or ours["num_heads"] == 1:
        return ours["num_head_channels"]  # type: ignore[no-any-return]
    return next(iter(_head_widths(unet)), None)


# ---- names ------------------------------------------------------------------------------------

ENDS = {
    "time.linear1": "time_embedding.linear_1",
    "time.linear2": "time_embedding.linear_2",
    "label": "class_embedding",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
RESIDUAL = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "skip": "conv_shortcut"}
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def table(unet: UNet, flip_sin_to_cos: bool) -> list[Entry]:
    """Where each tensor of a ``UNet2DModel`` lives in ``unet``."""
    made = weights.entries(unet, ENDS, _blocks(unet), _parts, "time_emb_proj")
    return made if flip_sin_to_cos else [_sines_first(entry) for entry in made]


def _blocks(unet: UNet) -> Iterator[tuple[str, str]]:
    yield from _side("down", unet.down)
    for place, part in enumerate(unet.middle):
        kind = "attentions.0" if isinstance(part, Attention) else f"resnets.{min(place, 1)}"
        yield f"middle.{place}", f"mid_block.{kind}"
    yield from _side("up", unet.up)


def _side(side: str, blocks: nn.ModuleList) -> Iterator[tuple[str, str]]:
    """The parts of one side: a level ends with its change of resolution."""
    level = layer = 0
    for n, block in enumerate(blocks):
        for m, part in enumerate(block.children()):
            ours, theirs = f"{side}.{n}.{m}", f"{side}_blocks.{level}"
            if isinstance(part, Attention):
                yield ours, f"{theirs}.attentions.{layer - 1}"
            elif isinstance(part, ResBlock) and not part.resample:
                yield ours, f"{theirs}.resnets.{layer}"
                layer += 1
            else:
                yield ours, f"{theirs}.{side}samplers.0"
                level, layer = level + 1, 0


def _parts(module: nn.Module) -> Iterator[tuple[str, str, Tensor | None]]:
    if isinstance(module, ResBlock):
        yield from ((ours, theirs, None) for ours, theirs in RESIDUAL.items())
    elif isinstance(module, Attention):
        yield "norm", "group_norm", None
        names = ("to_q", "to_k", "to_v")
        yield from (("qkv", name, rows) for name, rows in zip(names, _thirds(module), strict=True))
        yield "out", "to_out.0", None
    elif isinstance(module, Downsample | Upsample):
        yield "", "conv", None


def _thirds(attention: Attention) -> tuple[Tensor, ...]:
    return torch.arange(attention.qkv.out_features).chunk(3)


def _sines_first(entry: Entry) -> Entry:
    """The first layer of a time embedding that gets the sines before the cosines."""
    if entry.ours != "time.linear1.weight":
        return entry
    columns = torch.arange(entry.shape[1])
    half = len(columns) // 2
    return replace(entry, index=torch.cat((columns[half : 2 * half], columns[:half], columns[2 * half :])), dim=1)


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with today's names of the attention's parts."""
    new = {name: re.sub(r"(?<=\.)(query|key|value|proj_attn)(?=\.)", lambda m: OLD[m[0]], name) for name in state}
    return {name if new[name] in state else new[name]: tensor for name, tensor in state.items()}


# ---- networks and files -----------------------------------------------------------------------


def load(build: Callable[..., UNet], source: object, subfolder: str | None) -> UNet:
    """See :meth:`UNet.from_diffusers`."""
    live = getattr(source, "state_dict", None)
    if callable(live):
        what = f"this {type(source).__name__}"
        given, state = getattr(source, "config", None), weights.state_dict(live(), what)
        check(isinstance(given, Mapping), f"{what} has no configuration: it must be a {NAME} of diffusers")
        assert isinstance(given, Mapping)
    else:
        folder = _folder(weights.as_path(source), subfolder)
        what, given = str(folder), _io.read_json(folder / CONFIG)
        state = None
    kind = given.get("_class_name", NAME)
    check(kind == NAME, f"{what} is of class {kind}: only {NAME} can be loaded")
    values = settled(f"{what} {UNFIT}", given, SETTINGS, CHECKS)
    unet = weights.empty(build, arguments(values))
    state = _read(Path(what)) if state is None else state
    return weights.filled(unet, table(unet, values["flip_sin_to_cos"]), _renamed(state), what)


def _folder(path: Path, subfolder: str | None) -> Path:
    check(path.is_dir(), f"{path} is not a directory with {CONFIG} and {WEIGHTS}.safetensors")
    if subfolder is not None:
        return path / weights.as_path(subfolder)
    pipeline = (path / PIPELINE).is_file() and not (path / CONFIG).is_file()
    return path / "unet" if pipeline else path


def _read(folder: Path) -> dict[str, Tensor]:
    """The weights of a directory: one file or several with an index, safetensors or what torch.save writes."""
    for name in (f"{WEIGHTS}.safetensors", f"{WEIGHTS}.bin"):
        if (folder / name).is_file():
            return weights.read_tensors(folder / name)
        if (folder / f"{name}.index.json").is_file():
            return _read_shards(folder / f"{name}.index.json")
    check(False, f"{folder} has no {WEIGHTS}.safetensors or .bin, nor an index of such files")
    return {}


def _read_shards(index: Path) -> dict[str, Tensor]:
    places = _io.read_json(index).get("weight_map")
    plain = isinstance(places, dict) and all(isinstance(f, str) and Path(f).name == f for f in places.values())
    check(plain, f"{index} must have a weight_map of tensors' names to names of files beside it")
    assert isinstance(places, dict)
    files = {file: weights.read_tensors(index.parent / file) for file in sorted(set(places.values()))}
    return {name: tensor for tensors in files.values() for name, tensor in tensors.items()}


def save(unet: UNet, path: object) -> None:
    """See :meth:`UNet.save_diffusers`."""
    target = weights.as_path(path)
    settings, state = unet.to_diffusers()
    with _io.new_directory(target) as folder:
        _io.write(folder / CONFIG, _io.to_json({"_class_name": NAME, **settings}))
        _io.write(folder / f"{WEIGHTS}.safetensors", safetensors.torch.save(state, {"format": "pt"}))
