"""Which backend runs an op: native (C++, CUDA C++), triton, or reference.

A backend is the module ``fastdiff.ops.<name>`` with a function for each op it can run; its optional function
``refuses(op, device, dtype)`` gives the reason why it cannot run one there. ``auto`` takes the first of ``BACKENDS``
that serves, one of ``FASTER`` before them, and the next where that one raises ``Refused``; an explicit choice that
cannot be served raises with the reason.
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

from fastdiff.errors import InputError, Refused, choose

BACKENDS = ("native", "triton", "reference")
#: what auto asks first for an op on a device, where measurements say so (``python -m benchmarks groupnorm``)
FASTER = {("group_norm_silu", "cuda"): "triton", ("group_norm_silu_backward", "cuda"): "triton"}
STEPS = ("posterior_step", "ddim_step", "affine_step")  # one body runs them
OPS = ("normal", "add_noise", "guide", *STEPS, "diffusion_loss", "group_norm_silu")
DIFFERENTIABLE = "reference"  # the backend whose bodies are made of differentiable operations
_choice: ContextVar[str] = ContextVar("fastdiff_backend", default="auto")
Body = Callable[..., Any]


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run ops on one backend inside a ``with`` block: ``auto``, ``reference``, ``native`` or ``triton``.

    A compiled function asks for the backend when it runs: put the block around its call, not inside it.

    Raises:
        InputError: an unknown name, or a backend that is not available here (with the reason).
    """
    choose("backend", name, ("auto", *BACKENDS))
    if name != "auto":
        module, reason = load(name)
        if module is None:
            raise InputError(f"backend {name!r} is not available: {reason}")
    token = _choice.set(name)
    try:
        yield
    finally:
        _choice.reset(token)


def choice() -> str:
    """The backend that is asked for here: a name, or ``auto``."""
    return _choice.get()


def body(op: str, device: torch.device, dtype: torch.dtype, *, differentiable: bool = False) -> Body:
    """The function that runs ``op`` on ``device`` with its state in ``dtype`` under the current choice.

    ``differentiable`` asks for one that autograd can follow.
    """
    return _body(_choice.get(), op, device.type, dtype, differentiable)


def checked_body(op: str, device: str) -> Body | None:
    """The function that runs ``op`` in float32, if it checks its arguments itself."""
    return _checked_body(_choice.get(), op, device)


def explain(device: torch.device | str = "cpu") -> str:
    """Say which backend would run each op (float32) on ``device`` under the current choice, and why not another."""
    kind, choice = torch.device(device).type, _choice.get()
    lines = [f"backend choice: {choice}, device: {device}"]
    for op in OPS:
        verdicts = {
            name: _serve(name, op if op not in STEPS else "affine_step", kind, torch.float32, False)[1]
            for name in BACKENDS
        }
        allowed = [name for name in _order(op, kind) if choice in ("auto", name) and not verdicts[name]]
        others = "; ".join(f"not {name}: {reason}" for name, reason in verdicts.items() if reason)
        lines.append(f"{op:<16} {allowed[0] if allowed else 'nothing'}" + (f"  ({others})" if others else ""))
    return "\n".join(lines)


@cache
def load(name: str) -> tuple[ModuleType | None, str]:
    """The module of a backend, or None with the reason why there is none."""
    try:
        return importlib.import_module(f"fastdiff.ops.{name}"), ""
    except Exception as error:  # an extension of another version, say: the other backends stand
        return None, str(error) or type(error).__name__


@cache
def _body(choice: str, op: str, device: str, dtype: torch.dtype, differentiable: bool) -> Body:
    *others, last = _serving(choice, op, device, dtype, differentiable)

    def run(*arguments: Any) -> Any:
        for function in others:
            try:
                return function(*arguments)
            except Refused:
                continue
        return last(*arguments)

    return run if others else last


@cache
def _checked_body(choice: str, op: str, device: str) -> Body | None:
    first = _serving(choice, op, device, torch.float32, False)[0]
    return first if getattr(first, "checks_arguments", False) else None


def _serving(choice: str, op: str, device: str, dtype: torch.dtype, differentiable: bool) -> list[Body]:
    """The functions that may run an op, in the order in which they are asked."""
    verdicts = {
        name: _serve(name, op, device, dtype, differentiable)
        for name in (_order(op, device) if choice == "auto" else (choice,))
    }
    functions = [function for function, _ in verdicts.values() if function is not None]
    if not functions:
        raise InputError(f"{op} on {device}: " + "; ".join(f"{name} {why}" for name, (_, why) in verdicts.items()))
    return functions


def _order(op: str, device: str) -> list[str]:
    """The backends as ``auto`` asks them."""
    return sorted(BACKENDS, key=lambda name: name != FASTER.get((op, device)))


def _serve(name: str, op: str, device: str, dtype: torch.dtype, differentiable: bool) -> tuple[Body | None, str]:
    """The function of a backend for an op, or None with the reason."""
    module, reason = load(name)
    if module is None:
        return None, reason
    function = getattr(module, op, None)
    if function is None:
        return None, f"has no {op}"
    if differentiable and name != DIFFERENTIABLE:
        return None, f"has no gradient of {op}"
    refuses = getattr(module, "refuses", None)
    reason = refuses(op, device, dtype) if refuses else ""
    return (None, reason) if reason else (function, "")
