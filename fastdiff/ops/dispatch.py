"""Which backend runs an op: native (C++, CUDA C++), triton, or reference.

A backend is a module with a function for each op it can run. ``auto`` takes the first of ``BACKENDS`` that
serves the op on the device of its tensors; an explicit choice that cannot be served raises with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any

import torch

from fastdiff.errors import InputError, choose

BACKENDS = ("native", "triton", "reference")
OPS = ("add_noise", "posterior_step", "ddim_step", "guide", "affine_step", "diffusion_loss", "group_norm_silu")
SHARED_BODY = {"posterior_step": "affine_step", "ddim_step": "affine_step"}
_choice: ContextVar[str] = ContextVar("fastdiff_backend", default="auto")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run ops on one backend inside a ``with`` block: ``auto``, ``reference``, ``native`` or ``triton``.

    Raises:
        InputError: an unknown name, or a backend that is not available here (with the reason).
    """
    choose("backend", name, ("auto", *BACKENDS))
    if name != "auto":
        module, reason = _load(name)
        if module is None:
            raise InputError(f"backend {name!r} is not available: {reason}")
    token = _choice.set(name)
    try:
        yield
    finally:
        _choice.reset(token)


def body(op: str, device: torch.device) -> Callable[..., Any]:
    """The function that runs ``op`` on ``device`` under the current choice."""
    choice = _choice.get()
    reasons = {}
    for name in BACKENDS if choice == "auto" else (choice,):
        function, reasons[name] = _serve(name, op, device)
        if function is not None:
            return function
    raise InputError(f"{op} on {device}: " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))


def explain(device: torch.device | str = "cpu") -> str:
    """Say which backend would run each op on ``device`` under the current choice, and why not another."""
    lines = [f"backend choice: {_choice.get()}, device: {device}"]
    for op in OPS:
        verdicts = {}
        for name in BACKENDS:
            function, reason = _serve(name, SHARED_BODY.get(op, op), torch.device(device))
            verdicts[name] = reason if function is None else ""
        allowed = [name for name in BACKENDS if _choice.get() in ("auto", name) and not verdicts[name]]
        others = "; ".join(f"not {name}: {reason}" for name, reason in verdicts.items() if reason)
        lines.append(f"{op:<16} {allowed[0] if allowed else 'nothing'}" + (f"  ({others})" if others else ""))
    return "\n".join(lines)


def _serve(name: str, op: str, device: torch.device) -> tuple[Callable[..., Any] | None, str]:
    """The function of a backend for an op on a device, or None with the reason."""
    module, reason = _load(name)
    if module is None:
        return None, reason
    devices = getattr(module, "DEVICES", None)
    if devices is not None and device.type not in devices:
        return None, f"runs on {', '.join(devices)}, not on {device.type}"
    function = getattr(module, op, None)
    return function, "" if function else f"has no {op}"


@cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(f"fastdiff.ops.{name}"), ""
    except ModuleNotFoundError as error:
        if error.name == f"fastdiff.ops.{name}":
            return None, "this version of fastdiff has no such bodies yet"
        return None, str(error)
    except ImportError as error:
        return None, str(error)
