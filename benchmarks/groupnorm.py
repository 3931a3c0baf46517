"""Group norm with SiLU at the sizes of the CIFAR-10 network: ours channels-last, PyTorch in both layouts.

The backward pass is timed alone, over a graph that is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import fastdiff as fd
from benchmarks.harness import Arrays, Bind, Call, Case, Peer

Shape = tuple[int, ...]
GROUPS, EPS = 32, 1e-5
CPU = ((16, 128, 32, 32), (16, 256, 16, 16), (16, 512, 8, 8))
CUDA = ((256, 128, 32, 32), (256, 256, 16, 16), (256, 512, 8, 8), (1, 128, 32, 32), (1, 256, 8, 8))
TINY = ((2, 64, 4, 4),)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
Norm = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases(device: torch.device, quick: bool = False) -> Iterator[Case]:
    for shape in TINY if quick else CUDA if device.type == "cuda" else CPU:
        for dtype in (torch.float32, torch.bfloat16):
            yield forward(shape, dtype)
            yield backward(shape, dtype)


def forward(shape: Shape, dtype: torch.dtype) -> Case:
    return _case("forward", partial(_forward, "channels-last"), _forward, shape, dtype, (1, 1))


def backward(shape: Shape, dtype: torch.dtype) -> Case:
    """The gradients of x, weight and bias: x and dy are read, dx is written."""
    return _case("backward", partial(_backward, "channels-last"), _backward, shape, dtype, (2, 1))


def _case(
    name: str, ours: Callable[..., Call], theirs: Callable[..., Call], shape: Shape, dtype: torch.dtype, moves: Any
) -> Case:
    others = [Peer(f"torch {layout}", partial(_bind, theirs, layout, aten), TOLERANCE[dtype]) for layout in LAYOUTS]
    compiled = (
        Peer(f"torch.compile {layout}", partial(_compiled, theirs, layout), TOLERANCE[dtype], slow=True)
        for layout in LAYOUTS
    )
    return Case(
        name=f"group_norm_silu {name}, {str(dtype).removeprefix('torch.')}, {'x'.join(map(str, shape))}",
        shape=shape,
        reads=moves[0],
        writes=moves[1],
        ours=partial(ours, fused),
        formula=lambda arrays: theirs("contiguous", aten, arrays)(),
        peers=(*others, *compiled),
        tolerance=TOLERANCE[dtype],
        dtype=dtype,
    )


def _bind(run: Callable[..., Call], layout: str, norm: Norm) -> Bind:
    return partial(run, layout, norm)


def _compiled(run: Callable[..., Call], layout: str) -> Bind:
    torch.compiler.reset()
    torch._functorch.config.donated_buffer = False  # the graph of a backward pass is kept
    return partial(run, layout, torch.compile(aten, fullgraph=True, dynamic=False))


def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return fd.ops.group_norm_silu(x, GROUPS, weight, bias, EPS)


def aten(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, GROUPS, weight, bias, EPS))


def _forward(layout: str, norm: Norm, arrays: Arrays) -> Call:
    x, weight, bias = _inputs(layout, arrays)
    return lambda: (norm(x, weight, bias),)


def _backward(layout: str, norm: Norm, arrays: Arrays) -> Call:
    leaves = [value.requires_grad_() for value in _inputs(layout, arrays)]
    with torch.enable_grad():
        y = norm(*leaves)
    grad = arrays.reads[1].to(memory_format=LAYOUTS[layout])
    return partial(torch.autograd.grad, y, leaves, grad, retain_graph=True)


def _inputs(layout: str, arrays: Arrays) -> Sequence[Tensor]:
    """x in a layout, and weight and bias that are not trivial."""
    x = arrays.reads[0].detach().clone(memory_format=LAYOUTS[layout])
    ramp = torch.linspace(0, 1, x.shape[1], dtype=x.dtype, device=x.device)
    return x, 0.5 + ramp, ramp - 0.5
