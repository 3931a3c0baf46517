"""The native backend: C++ on the CPU, CUDA C++ on the GPU, through the compiled extension ``fastdiff._C``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops.layout import is_dense

REPORT = Path(__file__).parent.parent / "_build.txt"  # what the build says it could not build, and why


def _report(otherwise: object) -> str:
    return REPORT.read_text().strip() if REPORT.exists() else str(otherwise)


try:
    import fastdiff._C as _C
except ImportError as error:
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


def _body(run: Callable[..., None]) -> Callable[..., None]:
    def body(*arguments: Any) -> None:
        if arguments[0].is_cuda:
            arguments = tuple(map(_dense, arguments))
        try:
            run(*arguments, torch.get_num_threads())
        except ValueError as error:
            raise InputError(str(error)) from None

    body.checks_arguments = True  # type: ignore[attr-defined]
    return body


def _dense(argument: Any) -> Any:
    """CUDA kernels read contiguous and channels-last tensors; another layout is copied (results are never such)."""
    if isinstance(argument, Tensor):
        return argument if is_dense(argument) else argument.contiguous()
    if type(argument) is tuple:  # of vectors; an address is a tuple of another type
        return tuple(map(_dense, argument))
    return argument


normal = _body(_C.normal)
add_noise = _body(_C.add_noise)
guide = _body(_C.guide)
affine_step = _body(_C.affine_step)
diffusion_loss = _body(_C.diffusion_loss)
diffusion_loss_backward = _body(_C.diffusion_loss_backward)
