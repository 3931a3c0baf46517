"""Weights of guided-diffusion's ``UNetModel`` (Dhariwal & Nichol 2021): its settings, names and order of rows.

Settings are the arguments of ``UNetModel`` or ``SuperResModel``, or the flags of its scripts, which have other names,
other defaults and attention by pixels. The older improved-diffusion has the same names of tensors. So has the
classifier, ``EncoderUNetModel``, whose settings are its arguments or the flags of its script.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastdiff import _io
from fastdiff.models import weights
from fastdiff.models.convolution import Downsample, Upsample
from fastdiff.models.layers import Attention, ResBlock
from fastdiff.models.settings import (
    Check,
    Setting,
    anything,
    exactly,
    is_number,
    is_whole,
    number,
    refuse,
    settled,
    several,
    whole,
)
from fastdiff.models.weights import UNFIT, Entry

if TYPE_CHECKING:
    from fastdiff.models.classifier import Classifier
    from fastdiff.models.encoder import Encoder
    from fastdiff.models.unet import UNet

FIRST = "input_blocks.0.0"  #: the first convolution
GROUPS, EPS = 32, 1e-5  #: of every group norm
IMAGENET = 1000  #: classes that the flag class_cond stands for

# ---- settings ---------------------------------------------------------------------------------


def _pixels(default: str) -> Setting:
    return Setting(default, lambda value: bool(_numbers(value)), 'pixels such as "32,16,8"')


_EITHER = exactly(False, True)
_HEADS = {
    "num_head_channels": whole(-1, or_value=(-1,)),
    "num_heads_upsample": whole(-1, or_value=(-1,)),
    "use_checkpoint": anything(False),
    "use_fp16": anything(False),
    "resblock_updown": _EITHER,
    "use_new_attention_order": _EITHER,
    "dropout": number(0.0),
}
ARGUMENTS: dict[str, Setting] = {
    "image_size": whole(),
    "in_channels": whole(),
    "model_channels": whole(),
    "out_channels": whole(),
    "num_res_blocks": whole(),
    "attention_resolutions": several(None, is_whole, "factors by which the image is smaller there"),
    "channel_mult": several((1, 2, 4, 8), lambda value: _is_factor(value), "positive numbers"),
    "conv_resample": exactly(True, False),
    "dims": exactly(2),
    "num_classes": whole(or_value=(None,)),
    "num_heads": whole(1),
    "use_scale_shift_norm": _EITHER,
    **_HEADS,
}
DIFFUSION = {
    "learn_sigma": _EITHER,
    "diffusion_steps": whole(1000),
    "noise_schedule": exactly("linear", "cosine"),
    "predict_xstart": _EITHER,
    "rescale_timesteps": _EITHER,
    **{key: anything() for key in ("timestep_respacing", "use_kl", "rescale_learned_sigmas")},
}
FLAGS: dict[str, Setting] = {
    "image_size": whole(64),
    "large_size": whole(or_value=(None,)),
    "small_size": whole(or_value=(None,)),
    "num_channels": whole(128),
    "num_res_blocks": whole(2),
    "num_heads": whole(4),
    "attention_resolutions": _pixels("16,8"),
    "channel_mult": Setting("", lambda v: v == "" or bool(_numbers(v)), 'factors such as "1,2,4", or ""'),
    "class_cond": _EITHER,
    "use_scale_shift_norm": exactly(True, False),
    **_HEADS,
    **DIFFUSION,
}
#: channel_mult where the flag is empty, by the size of the image; of super-resolution where it differs
MULTIPLES: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}
MULTIPLES_UPSAMPLING: dict[int, tuple[float, ...]] = {
    512: (1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    64: (1, 2, 3, 4),
}


def _numbers(text: Any) -> list[float]:
    """The numbers of a list with commas; none where it is something else."""
    try:
        numbers = [float(part) for part in text.split(",")] if isinstance(text, str) else []
    except ValueError:
        return []
    return numbers if all(map(_is_factor, numbers)) else []


def _is_factor(value: Any) -> bool:
    return is_number(value) and 0 < value < 10_000


def _same_heads(values: dict[str, Any]) -> list[str]:
    heads, upsample = values["num_heads"], values["num_heads_upsample"]
    same = values["num_head_channels"] != -1 or upsample in (-1, heads)
    return [] if same else [f"num_heads_upsample={upsample} must be -1 or num_heads={heads}"]


def _known_size(flags: dict[str, Any]) -> list[str]:
    size, known = flags["large_size"] or flags["image_size"], _multiples(flags)
    fits = flags["channel_mult"] != "" or size in known
    return [] if fits else [f"channel_mult='' must be factors: it has a default for {', '.join(map(str, known))} only"]


def _multiples(flags: dict[str, Any]) -> dict[int, tuple[float, ...]]:
    return MULTIPLES_UPSAMPLING if flags["large_size"] else MULTIPLES


CHECKS: tuple[Check, ...] = ((("num_heads", "num_heads_upsample", "num_head_channels"), _same_heads),)
FLAG_CHECKS: tuple[Check, ...] = (*CHECKS, (("large_size", "image_size", "channel_mult"), _known_size))


def constructor(config: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of ``UNetModel`` from some of them, or from the flags of the scripts.

    Raises:
        InputError: every setting that does not fit.
    """
    if "model_channels" in config:
        return settled(f"the configuration (arguments of UNetModel) {UNFIT}", config, ARGUMENTS, CHECKS)
    flags = settled(f"the configuration (flags of guided-diffusion) {UNFIT}", config, FLAGS, FLAG_CHECKS)
    size = flags["large_size"] or flags["image_size"]
    return {
        **{key: flags[key] for key in ARGUMENTS if key in flags},
        "image_size": size,
        "in_channels": 3,
        "model_channels": flags["num_channels"],
        "out_channels": 6 if flags["learn_sigma"] else 3,
        "attention_resolutions": [size // pixels for pixels in _numbers(flags["attention_resolutions"])],
        "channel_mult": _numbers(flags["channel_mult"]) or _multiples(flags)[size],
        "conv_resample": True,
        "num_classes": IMAGENET if flags["class_cond"] else None,
    }


def arguments(values: dict[str, Any], super_resolution: bool) -> dict[str, Any]:
    """UNet's arguments for those of a ``UNetModel`` or, with ``super_resolution``, of a ``SuperResModel``."""
    size = weights.image_size(values["image_size"], len(values["channel_mult"]))
    image, condition = _channels(values["in_channels"], values["out_channels"], super_resolution)
    learned = values["out_channels"] == 2 * image
    return {
        "image_size": size,
        "in_channels": image,
        "condition_channels": condition,
        "out_channels": image if learned else values["out_channels"],
        "learned_variance": learned,
        "num_classes": values["num_classes"],
        "null_label": False,
        **_of_blocks(values, size),
    }


def _of_blocks(values: dict[str, Any], size: int) -> dict[str, Any]:
    channels, mult, head = values["model_channels"], values["channel_mult"], values["num_head_channels"]
    return {
        "model_channels": channels,
        "channel_mult": weights.multiples([int(factor * channels) for factor in mult], channels),
        "num_res_blocks": values["num_res_blocks"],
        "attention_resolutions": [size >> i for i in range(len(mult)) if 2**i in values["attention_resolutions"]],
        "num_heads": values["num_heads"],
        "num_head_channels": None if head == -1 else head,
        "norm_groups": GROUPS,
        "norm_eps": EPS,
        "dropout": values["dropout"],
        "scale_shift": values["use_scale_shift_norm"],
        "resblock_updown": values["resblock_updown"],
        "conv_resample": values["conv_resample"],
    }


def _channels(inputs: int, outputs: int, super_resolution: bool) -> tuple[int, int]:
    """Channels of the image and of its condition. Fewer outputs than inputs are those of the image alone."""
    if super_resolution:
        return inputs, inputs
    return (outputs, inputs - outputs) if outputs < inputs else (inputs, 0)


def config(unet: UNet, new_attention_order: bool) -> dict[str, Any]:
    """The arguments of the ``UNetModel`` (``SuperResModel`` if the condition has the image's channels) like ``unet``.

    Raises:
        InputError: every setting of ``unet`` that it does not have.
    """
    ours = unet.config
    refuse("this UNet is no UNetModel of guided-diffusion", _not_theirs(unet))
    image, condition = unet.in_channels, unet.condition_channels
    return {
        "image_size": ours["image_size"],
        "in_channels": image if condition == image else image + condition,
        "model_channels": ours["model_channels"],
        "out_channels": unet.conv_out.out_channels,
        "num_res_blocks": ours["num_res_blocks"],
        "attention_resolutions": [ours["image_size"] // size for size in ours["attention_resolutions"]],
        "dropout": ours["dropout"],
        "channel_mult": ours["channel_mult"],
        "conv_resample": ours["conv_resample"],
        "dims": 2,
        "num_classes": None if unet.label is None else unet.label.num_embeddings,
        "use_checkpoint": False,
        "use_fp16": False,
        "num_heads": ours["num_heads"],
        "num_head_channels": ours["num_head_channels"] or -1,
        "num_heads_upsample": -1,
        "use_scale_shift_norm": ours["scale_shift"],
        "resblock_updown": ours["resblock_updown"],
        "use_new_attention_order": new_attention_order,
    }


def _not_theirs(unet: UNet) -> list[str]:
    ours = unet.config
    strided = any(isinstance(module, Downsample) for module in unet.modules())
    need = {
        "norm_groups": GROUPS,
        "norm_eps": EPS,
        "frequency_shift": 0,
        "middle_attention": True,
        "middle_attention_norm": True,
        "downsample_padding": 1 if strided else ours["downsample_padding"],
    }
    emb, four = unet.emb.in_features, 4 * ours["model_channels"]
    problems = [f"{name}={ours[name]} must be {value}" for name, value in need.items() if ours[name] != value]
    return problems + ([] if emb == four else [f"embedding_channels={emb} must be 4 model_channels = {four}"])


# ---- settings of classifiers ------------------------------------------------------------------

POOLS = {"attention": "attention", "adaptive": "average"}  #: theirs in ours
CLASSIFIER_ARGUMENTS: dict[str, Setting] = {
    **{key: setting for key, setting in ARGUMENTS.items() if key != "num_classes"},
    "pool": exactly("adaptive", "attention"),
}
CLASSIFIER_FLAGS: dict[str, Setting] = {
    "image_size": exactly(*sorted(MULTIPLES)),
    "classifier_width": whole(128),
    "classifier_depth": whole(2),
    "classifier_attention_resolutions": _pixels("32,16,8"),
    "classifier_use_scale_shift_norm": exactly(True, False),
    "classifier_resblock_updown": exactly(True, False),
    "classifier_pool": exactly("attention", "adaptive"),
    "classifier_use_fp16": anything(False),
    **{key: anything() for key in DIFFUSION},
}


def _heads_of_pool(values: dict[str, Any]) -> list[str]:
    fits = values["pool"] != "attention" or values["num_head_channels"] != -1
    return [] if fits else ["num_head_channels=-1 must be the width of a head with pool='attention'"]


CLASSIFIER_CHECKS: tuple[Check, ...] = (*CHECKS, (("pool", "num_head_channels"), _heads_of_pool))


def classifier_constructor(config: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of ``EncoderUNetModel`` from some of them, or from the flags of the script that trains it.

    Raises:
        InputError: every setting that does not fit.
    """
    unfit = "does not fit fastdiff.Classifier"
    if "model_channels" in config:
        what = f"the configuration (arguments of EncoderUNetModel) {unfit}"
        return settled(what, config, CLASSIFIER_ARGUMENTS, CLASSIFIER_CHECKS)
    flags = settled(f"the configuration (flags of guided-diffusion) {unfit}", config, CLASSIFIER_FLAGS)
    size, pixels = flags["image_size"], _numbers(flags["classifier_attention_resolutions"])
    given = {
        "image_size": size,
        "in_channels": 3,
        "model_channels": flags["classifier_width"],
        "out_channels": IMAGENET,
        "num_res_blocks": flags["classifier_depth"],
        "attention_resolutions": [size // number for number in pixels],
        "channel_mult": MULTIPLES[size],
        "num_head_channels": 64,
        **{key: flags[f"classifier_{key}"] for key in ("use_scale_shift_norm", "resblock_updown", "pool")},
    }
    return {key: given.get(key, setting.default) for key, setting in CLASSIFIER_ARGUMENTS.items()}


def classifier_arguments(values: dict[str, Any]) -> dict[str, Any]:
    """Classifier's arguments for those of an ``EncoderUNetModel``."""
    return {
        "image_size": values["image_size"],
        "in_channels": values["in_channels"],
        "num_classes": values["out_channels"],
        "pool": POOLS[values["pool"]],
        **_of_blocks(values, values["image_size"]),
    }


# ---- names ------------------------------------------------------------------------------------

ENDS = {
    "time.linear1": "time_embed.0",
    "time.linear2": "time_embed.2",
    "label": "label_emb",
    "conv_in": FIRST,
    "norm_out": "out.0",
    "conv_out": "out.2",
}
CLASSIFIER_ENDS = {
    **{ours: theirs for ours, theirs in ENDS.items() if ours not in ("label", "conv_out")},
    "pool": "out.2",
    "pool.qkv": "out.2.qkv_proj",
    "out": "out.2.c_proj",
}
AVERAGE_ENDS = {ours: theirs for ours, theirs in CLASSIFIER_ENDS.items() if "pool" not in ours} | {"out": "out.3"}
RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}


def table(network: Encoder, new_attention_order: bool, ends: Mapping[str, str] = ENDS) -> list[Entry]:
    """Where each tensor of a ``UNetModel`` lives in ``network``, or with other ``ends`` of an ``EncoderUNetModel``."""

    def parts(module: nn.Module) -> Iterator[tuple[str, str, Tensor | None]]:
        if isinstance(module, ResBlock):
            yield from ((ours, theirs, None) for ours, theirs in RESIDUAL.items())
        elif isinstance(module, Attention):
            yield "norm", "norm", None
            yield "qkv", "qkv", None if new_attention_order else _by_heads(module)
            yield "out", "proj_out", None
        elif isinstance(module, Downsample | Upsample):
            yield "", "op" if isinstance(module, Downsample) else "conv", None

    made = weights.entries(network, ends, _blocks(network), parts, "emb_layers.1")
    return [_convolution(entry) for entry in made]


def _blocks(network: Encoder) -> Iterator[tuple[str, str]]:
    for n, block in enumerate(network.down):
        yield from ((f"down.{n}.{m}", f"input_blocks.{n + 1}.{m}") for m, _ in enumerate(block.children()))
    yield from ((f"middle.{m}", f"middle_block.{m}") for m, _ in enumerate(network.middle))
    for n, block in enumerate(getattr(network, "up", ())):
        yield from ((f"up.{n}.{m}", f"output_blocks.{n}.{m}") for m, _ in enumerate(block.children()))


def _by_heads(attention: Attention) -> Tensor:
    """Our rows (q, k, v; head; channel) in the older order: head; q, k, v; channel."""
    rows = torch.arange(attention.qkv.out_features)
    return rows.view(3, attention.heads, -1).transpose(0, 1).flatten()


def _convolution(entry: Entry) -> Entry:
    """Attention multiplies by convolutions of one position."""
    matrix = entry.theirs.endswith((".qkv.weight", "_proj.weight", ".proj_out.weight"))
    return replace(entry, shape=(*entry.shape, 1)) if matrix else entry


# ---- networks and files -----------------------------------------------------------------------


def load(build: Callable[..., UNet], source: object, config: object) -> UNet:
    """See :meth:`UNet.from_guided_diffusion`."""
    values = constructor(_settings(config))
    what, state = _state(source)
    first = state.get(f"{FIRST}.weight")
    twice = first is not None and first.ndim == 4 and first.shape[1] == 2 * values["in_channels"]
    unet = weights.empty(build, arguments(values, twice))
    return weights.filled(unet, table(unet, values["use_new_attention_order"]), state, what)


def load_classifier(build: Callable[..., Classifier], source: object, config: object) -> Classifier:
    """See :meth:`Classifier.from_guided_diffusion`."""
    values = classifier_constructor(_settings(config))
    what, state = _state(source)
    network = weights.empty(build, classifier_arguments(values))
    ends = CLASSIFIER_ENDS if values["pool"] == "attention" else AVERAGE_ENDS
    return weights.filled(network, table(network, values["use_new_attention_order"], ends), state, what)


def _settings(config: object) -> Mapping[str, Any]:
    return config if isinstance(config, Mapping) else _io.read_json(weights.as_path(config))


def _state(source: object) -> tuple[str, dict[str, Tensor]]:
    """What the source is called, and its tensors by name."""
    if isinstance(source, Mapping):
        return "the state dict", weights.state_dict(source, "the state dict")
    return str(source), weights.read_tensors(weights.as_path(source))
