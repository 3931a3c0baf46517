"""The native backend: C++ on the CPU, CUDA C++ on the GPU, through the compiled extension ``fastdiff._C``."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import Refused
from fastdiff.noise import Address
from fastdiff.ops.layout import format_of, is_dense

REPORT = Path(__file__).parent.parent / "_build.txt"  # what the build says it could not build, and why


def _report(otherwise: object) -> str:
    return REPORT.read_text().strip() if REPORT.exists() else str(otherwise)


try:
    import fastdiff._C as _C
except ModuleNotFoundError as error:
    raise ImportError(f"the compiled extension is missing: {_report(error)}") from None


def refuses(op: str, device: str, dtype: torch.dtype) -> str:
    """Why an op cannot run on a device with its state in a dtype; empty if it can."""
    if device not in ("cpu", "cuda"):
        return f"runs on cpu and cuda, not on {device}"
    if device == "cuda" and not _C.cuda:
        return f"was built without CUDA: {_report('no nvcc')}"
    return "computes in float32, not in float64" if dtype == torch.float64 else ""


def describe() -> str:
    """What this build of the extension has."""
    cuda = "CUDA kernels" if _C.cuda else _report("no CUDA kernels")
    return f"C++ for {_C.level()} (has {', '.join(_C.levels())}), {cuda}"


def _body(run: Callable[..., None], given: int = -1) -> Callable[..., None]:
    """A body over a function of the extension, whose arguments up to ``given`` are read and the rest written."""

    def body(*arguments: Any) -> None:
        if arguments[0].is_cuda:
            arguments = _mended(arguments, given, is_dense, Tensor.contiguous)
        try:
            run(*arguments, torch.get_num_threads())
        except ValueError as error:
            plain = _mended(arguments, given, lambda x: not x.is_neg(), Tensor.resolve_neg)
            if all(a is b for a, b in zip(plain, arguments, strict=True)):
                raise Refused(str(error)) from None
            body(*plain)

    body.checks_arguments = True  # type: ignore[attr-defined]
    return body


def _mended(
    arguments: tuple[Any, ...], given: int, fits: Callable[[Tensor], bool], mend: Callable[[Tensor], Tensor]
) -> tuple[Any, ...]:
    return (*(_mend(argument, fits, mend) for argument in arguments[:given]), *arguments[given:])


def _mend(argument: Any, fits: Callable[[Tensor], bool], mend: Callable[[Tensor], Tensor]) -> Any:
    """An argument, or a tuple of vectors, that fits the kernels: a copy where it does not."""
    if isinstance(argument, Tensor):
        return argument if fits(argument) else mend(argument)
    if type(argument) is tuple:  # of vectors; an address is a tuple of another type
        mended = tuple(_mend(part, fits, mend) for part in argument)
        return argument if all(a is b for a, b in zip(mended, argument, strict=True)) else mended
    return argument


def _alike(run: Callable[..., None], lead: int, others: tuple[int, ...], result: int) -> Callable[..., None]:
    """A body whose tensors have to lie alike: those that do not are copied to the lead's format."""

    def body(*arguments: Any) -> None:
        given = list(arguments)
        form = format_of(given[result])
        for i in (lead, *others):
            if given[i] is not None:
                given[i] = given[i].contiguous(memory_format=form).resolve_neg()
        try:
            run(*given, torch.get_num_threads())
        except ValueError as error:
            raise Refused(str(error)) from None

    return body


normal = _body(_C.normal, given=0)
add_noise = _body(_C.add_noise)
guide = _body(_C.guide)
affine_step = _body(_C.affine_step)
group_norm_silu = _alike(_C.group_norm_silu, 0, (7,), result=9)
group_norm_silu_backward = _alike(_C.group_norm_silu_backward, 1, (0, 9), result=10)
_diffusion_loss = _body(_C.diffusion_loss, given=-4)


def diffusion_loss(
    output: Tensor,
    x0: Tensor,
    f: Tensor,
    g: Tensor,
    weight: Tensor,
    bound: Tensor | None,
    noise: Tensor | Address,
    result: Tensor,
    residual: Tensor | None = None,
    slope: Tensor | None = None,
) -> None:
    sums = None  # of a sample's parts, in memory that torch keeps for the next call
    if x0.is_cuda:
        sums = torch.empty(len(x0), _C.chunks(math.prod(x0.shape[1:])), dtype=torch.float32, device=x0.device)
    _diffusion_loss(output, x0, f, g, weight, bound, noise, result, residual, slope, sums)
