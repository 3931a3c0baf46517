"""Weights of other people's networks: their tensors' names and shapes, their files.

One table of entries says where each tensor of a peer lives in our network. Import and export read the same table.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from fastdiff.errors import InputError, check
from fastdiff.models.layers import ResBlock
from fastdiff.models.settings import refuse

if TYPE_CHECKING:
    from fastdiff.models.encoder import Encoder

E = TypeVar("E", bound="Encoder")
UNFIT = "does not fit fastdiff.UNet"
LISTED = 10  #: names of one kind in a message; the rest is counted


def image_size(size: int | None, levels: int) -> int:
    """The ``image_size`` for a peer's, which need not be halved ``levels - 1`` times: the next one that can be."""
    factor: int = 2 ** (levels - 1)
    return -(-(size or 32) // factor) * factor


def multiples(widths: list[int], channels: int) -> list[float]:
    """``channel_mult`` of the widths."""
    return [width / channels if width % channels else width // channels for width in widths]


# ---- names ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One tensor of a peer: our parameter ``ours``, or what ``index`` picks of it along ``dim``, in shape ``shape``."""

    theirs: str
    ours: str
    shape: tuple[int, ...]
    index: Tensor | None = None
    dim: int = 0

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of that shape is this one; a matrix may carry trailing ones or lack them."""
        if shape == self.shape:
            return True
        return len(shape) >= 2 and shape[:2] == self.shape[:2] and set(shape[2:] + self.shape[2:]) <= {1}

    def give(self, parameter: Tensor) -> Tensor:
        """The peer's tensor of our parameter: a contiguous copy."""
        picked = parameter.detach()
        if self.index is not None:
            picked = picked.index_select(self.dim, self.index.to(picked.device))
        return picked.reshape(self.shape).clone(memory_format=torch.contiguous_format)

    def take(self, parameter: Tensor, tensor: Tensor) -> None:
        """Write the peer's tensor into our parameter."""
        where = slice(None) if self.index is None else (slice(None),) * self.dim + (self.index,)
        target = parameter[where]
        parameter[where] = tensor.detach().reshape(target.shape).to(parameter)


#: tensors of a part of a block: our module in it, their name of it, the rows of ours
Parts = Callable[[nn.Module], Iterable[tuple[str, str, Tensor | None]]]


def entries(
    network: Encoder, ends: Mapping[str, str], blocks: Iterable[tuple[str, str]], parts: Parts, emb: str
) -> list[Entry]:
    """The table of a network's tensors.

    Args:
        ends: our names and theirs of what stands outside the blocks.
        blocks: our names and theirs of the parts of the blocks, in our order.
        parts: what is in such a part.
        emb: their name of a residual block's projection of the time embedding. Ours are the rows of one.
    """
    widths = [block.condition for block in network.blocks]
    rows = iter(torch.arange(sum(widths)).split(widths))
    table = [entry for ours, theirs in ends.items() for entry in _tensors(network, ours, theirs)]
    for ours, theirs in blocks:
        module = network.get_submodule(ours)
        for part, name, index in parts(module):
            table += _tensors(network, _join(ours, part), _join(theirs, name), index)
        if isinstance(module, ResBlock):
            table += _tensors(network, "emb", _join(theirs, emb), next(rows))
    return table


def _tensors(network: Encoder, ours: str, theirs: str, index: Tensor | None = None) -> Iterator[Entry]:
    module = network.get_submodule(ours) if ours != "label" or network.label is not None else nn.Identity()
    for name, parameter in module.named_parameters(recurse=False):
        shape = tuple(parameter.shape) if index is None else (len(index), *parameter.shape[1:])
        yield Entry(f"{theirs}.{name}", f"{ours}.{name}", shape, index)


def _join(*names: str) -> str:
    return ".".join(filter(None, names))


def exported(network: Encoder, table: list[Entry]) -> dict[str, Tensor]:
    """The peer's state dict: copies, contiguous, in the dtype and on the device of the network."""
    check(not any(p.is_meta for p in network.parameters()), "a UNet on the meta device has no weights to export")
    return {entry.theirs: entry.give(network.get_parameter(entry.ours)) for entry in table}


def empty(build: Callable[..., E], settings: dict[str, Any]) -> E:
    """The network without memory for its weights."""
    try:
        with torch.device("meta"):
            return build(**settings)
    except (TypeError, RuntimeError, OverflowError) as error:  # beyond what a tensor's size can be
        raise InputError(f"no network can be that large: {str(error).splitlines()[0]}") from None


@torch.no_grad()
def filled(network: E, table: list[Entry], state: Mapping[str, Tensor], what: str) -> E:
    """A network made by :func:`empty`, with the weights of a state dict: float32, on the CPU, in evaluation mode.

    Raises:
        InputError: every tensor that is missing or not in the table, has another shape, no floating dtype, no values.
    """
    known = {entry.theirs: entry for entry in table}
    both = [known[name] for name in known if name in state]
    wrong = [entry for entry in both if not entry.fits(tuple(state[entry.theirs].shape))]
    problems = _listed("missing", [name for name in known if name not in state])
    problems += _listed("not expected", [name for name in state if name not in known])
    problems += _listed("of another shape", [_shapes(entry, state[entry.theirs]) for entry in wrong])
    problems += _listed("not floating", [e.theirs for e in both if not state[e.theirs].is_floating_point()])
    problems += _listed("without values", [e.theirs for e in both if not _has_values(state[e.theirs])])
    refuse(f"the tensors of {what} do not fit its configuration", problems)
    network = network.to_empty(device="cpu").float().eval()
    for entry in table:
        entry.take(network.get_parameter(entry.ours), state[entry.theirs])
    return network


def _has_values(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_nested or tensor.is_quantized)


def _shapes(entry: Entry, tensor: Tensor) -> str:
    return f"{entry.theirs} {list(tensor.shape)} instead of {list(entry.shape)}"


def _listed(kind: str, names: list[str]) -> list[str]:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return [f"{len(names)} {kind}: {', '.join(names[:LISTED])}{more}"] if names else []


# ---- files ------------------------------------------------------------------------------------


def as_path(source: object) -> Path:
    check(isinstance(source, str | PathLike), f"expected a path, got {type(source).__name__}")
    return Path(source)  # type: ignore[arg-type]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors by name of a safetensors file, or of one that torch.save wrote; code in a pickle is never run.

    Raises:
        InputError: no such file, damaged, anything in it but tensors by name.
    """
    check(path.is_file(), f"{path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in its reader
        lines = [] if isinstance(error, pickle.UnpicklingError) else str(error).splitlines()  # which advises to run it
        reason = f": {lines[0]}" if lines else ""
        raise InputError(f"{path} cannot be read as tensors (code in pickles is never run){reason}") from None
    return state_dict(state, str(path))


def state_dict(state: object, what: str) -> dict[str, Tensor]:
    """``state`` if it is tensors by name."""
    check(isinstance(state, Mapping), f"{what} must be tensors by name, got {type(state).__name__}")
    assert isinstance(state, Mapping)
    fits = {name: isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()}
    others = [f"{name!r} is {type(state[name]).__name__}" for name in state if not fits[name]]
    refuse(f"{what} must be tensors by name", _listed("others", others))
    return dict(state)
