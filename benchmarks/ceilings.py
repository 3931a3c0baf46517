"""``python -m benchmarks.ceilings FILE``: what this GPU can do, to hold every other figure against.

Copy bandwidth (bytes read and written), matrix products, the convolutions of the CIFAR-10 network one by one
(channels-last, bfloat16) and how long a node of a graph takes that does nothing. All are replayed from graphs, so that
launches cost nothing, on random data.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastdiff as fd
from benchmarks.harness import commit, race
from fastdiff.models.convolution import Conv

CUDA, LAST = torch.device("cuda"), torch.channels_last
BATCHES = (1, 16, 256)
Facts = dict[str, Any]
Call = Callable[[], Any]


def milliseconds(call: Call, repeats: int = 20) -> float:
    """Of one call among ``repeats`` in a graph."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return race({"ours": [graph.replay]}, CUDA, 0.05)["ours"] / repeats


def copy() -> Iterator[Facts]:
    for megabytes in (4, 64, 2048):
        x = torch.randn(megabytes << 18, device=CUDA)
        y = torch.empty_like(x)
        ms = milliseconds(lambda x=x, y=y: torch.neg(x, out=y))  # a kernel, where copy_ is the slower copying unit
        yield {"case": f"copy {megabytes} MiB", "ms": ms, "GB_per_s": 2 * x.nbytes / ms / 1e6}


def products() -> Iterator[Facts]:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for side in (2048, 8192):
            a, b = (torch.randn(side, side, dtype=dtype, device=CUDA) for _ in range(2))
            ms = milliseconds(lambda a=a, b=b: a @ b, 3)
            yield {"case": f"product {side}^3 {_name(dtype)}", "ms": ms, "TFLOP_per_s": 2 * side**3 / ms / 1e9}


def convolutions() -> Iterator[Facts]:
    """Each shape of convolution that the network has, once; ``count`` is how often."""
    shapes = Counter(convolution_shapes())
    for batch in BATCHES:
        for (width, out, size, kernel, stride), count in shapes.items():
            conv = nn.Conv2d(width, out, kernel, stride, padding=kernel // 2, device=CUDA, dtype=torch.bfloat16)
            conv = conv.to(memory_format=LAST).requires_grad_(False)
            x = torch.randn(batch, width, size, size, device=CUDA, dtype=torch.bfloat16).to(memory_format=LAST)
            flops = 2 * batch * width * out * kernel**2 * (size // stride) ** 2
            ms = milliseconds(lambda conv=conv, x=x: conv(x))
            name = f"conv {kernel}x{kernel} {width}->{out} {size}x{size} stride {stride}, batch {batch}"
            yield {"case": name, "count": count, "ms": ms, "TFLOP_per_s": flops / ms / 1e9}


def convolution_shapes() -> Iterator[tuple[int, ...]]:
    unet = fd.UNet(32, channel_mult=(1, 2, 2, 2), attention_resolutions=(16,))
    seen: list[tuple[int, ...]] = []

    def look(layer: Any, inputs: Any, _: Any) -> None:
        out, width, kernel = layer.weight.shape[:3] if layer.weight.ndim == 4 else (*layer.weight.shape[:2], 1)
        stride = inputs[0].shape[-1] // _.shape[-1] if _.shape[-1] < inputs[0].shape[-1] else 1
        seen.append((width, out, inputs[0].shape[-1], kernel, stride))

    for layer in unet.modules():
        if isinstance(layer, nn.Conv2d | Conv):
            layer.register_forward_hook(look)
    unet(torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64))
    yield from seen


def nodes() -> Iterator[Facts]:
    x = torch.zeros(1, device=CUDA)
    yield {"case": "node of a graph that adds one number", "ms": milliseconds(lambda: x.add_(1), 1000)}


def main(file: str) -> None:
    torch.backends.cudnn.benchmark = True
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": commit()}
    rows = []
    for part in (copy, products, nodes, convolutions):
        for row in part():
            print(*(f"{value:.5g}" if isinstance(value, float) else value for value in row.values()), flush=True)
            rows.append(row | about)
    Path(file).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main(sys.argv[1])
