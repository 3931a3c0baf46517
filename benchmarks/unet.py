"""The DDPM CIFAR-10 network (35.7 million parameters), forward and training step, against diffusers' UNet2DModel.

All have the same weights. The floor is one matrix product of as many multiplications as the network's convolutions and
matrix products have, in the same precision. Peers: diffusers as it comes (float32), channels-last in bfloat16, and
both through torch.compile, for inference on a CPU also with frozen weights. A training step is forward, mean squared
error, backward and fused AdamW (with a learning rate of 0, so that every call computes the same), under autocast in
bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastdiff as fd
from benchmarks.harness import Arrays, Bind, Call, Case, Peer

Shape = tuple[int, ...]
CPU: tuple[Shape, ...] = ((8, 3, 32, 32),)
CUDA: tuple[Shape, ...] = ((1, 3, 32, 32), (16, 3, 32, 32), (256, 3, 32, 32))
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
LAST = torch.channels_last
BF16 = torch.bfloat16


def cases(device: torch.device, quick: bool = False) -> Iterator[Case]:
    for shape in ((2, 3, 16, 16),) if quick else CUDA if device.type == "cuda" else CPU:
        network = partial(make_network, device, quick)
        for dtype in (torch.float32, BF16):
            yield forward(shape, dtype, network)
        yield training(shape, network)


def make_network(device: torch.device, small: bool) -> Any:
    """diffusers' network with weights that hide nothing."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    down, up = ("Down", "AttnDown", "Down", "Down"), ("Up", "Up", "AttnUp", "Up")
    return UNet2DModel(
        sample_size=32,
        block_out_channels=(32, 32) if small else (128, 256, 256, 256),
        norm_num_groups=8 if small else 32,
        down_block_types=[f"{kind}Block2D" for kind in down[: 2 if small else 4]],
        up_block_types=[f"{kind}Block2D" for kind in up[2 if small else 0 :]],
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    ).to(device)


def our_network(network: Callable[[], Any]) -> fd.UNet:
    """The same network and weights, on the same device."""
    return fd.UNet.from_diffusers(theirs := network()).to(theirs.device)


# ---- forward ----------------------------------------------------------------------------------


def forward(shape: Shape, dtype: torch.dtype, network: Callable[[], Any]) -> Case:
    ours = cache(lambda: our_network(network).prepared(dtype))
    tolerance = TOLERANCE[dtype]
    peers = [Peer("diffusers float32", partial(_eager, network), tolerance)]
    if dtype == BF16:
        peers.append(Peer("diffusers channels-last", partial(_eager, network, BF16), tolerance))
    for frozen in (False,) if network().device.type == "cuda" else (False, True):
        name = f"diffusers compiled{', frozen' * frozen}"
        peers.append(Peer(name, partial(_compiled, network, dtype, frozen), tolerance, slow=True))
    return Case(
        name=f"unet forward, {_name(dtype)}, {'x'.join(map(str, shape))}",
        shape=shape,
        reads=1,
        writes=0,
        ours=lambda arrays: partial(_run, ours(), arrays.reads[0]),
        formula=lambda arrays: _run(network().double(), arrays.reads[0]),
        peers=tuple(peers),
        tolerance=tolerance,
        floor=partial(_product, network, dtype),
    )


def _eager(network: Callable[[], Any], dtype: torch.dtype = torch.float32) -> Bind:
    model = network().to(dtype)
    if dtype == BF16:
        model = model.to(memory_format=LAST)
    return partial(_bind, model, dtype)


def _compiled(network: Callable[[], Any], dtype: torch.dtype, frozen: bool) -> Bind:
    import torch._inductor.config as inductor

    torch.compiler.reset()
    run = torch.compile(network().to(dtype, memory_format=LAST))

    def bind(arrays: Arrays) -> Call:
        call = _bind(run, dtype, arrays)
        with inductor.patch(freezing=frozen):
            call()
        return call

    return bind


def _bind(model: Any, dtype: torch.dtype, arrays: Arrays) -> Call:
    x = arrays.reads[0].to(dtype, memory_format=LAST if dtype == BF16 else torch.contiguous_format)
    return partial(_run, model, x)


def _run(model: Any, x: Tensor) -> tuple[Tensor]:
    out = model(x, _times(x))
    return (out if isinstance(out, Tensor) else out.sample,)


# ---- a training step --------------------------------------------------------------------------


def training(shape: Shape, network: Callable[[], Any]) -> Case:
    """The loss, and of its gradient that of the first weights, to be compared."""
    tolerance = 2 * TOLERANCE[BF16]
    compiled = Peer("diffusers compiled", partial(_trainer, network, compile=True), tolerance, slow=True)
    return Case(
        name=f"unet training step, bfloat16, {'x'.join(map(str, shape))}",
        shape=shape,
        reads=2,
        writes=0,
        ours=_trainer(partial(our_network, network), ours=True),
        formula=lambda arrays: _step(network().double(), None, False, *arrays.reads),
        peers=(
            Peer("diffusers float32", partial(_trainer, network, autocast=False), tolerance),
            Peer("diffusers channels-last", partial(_trainer, network), tolerance),
            compiled,
        ),
        tolerance=tolerance,
        floor=partial(_product, network, BF16, times=3),
    )


def _trainer(network: Callable[[], Any], *, autocast: bool = True, compile: bool = False, ours: bool = False) -> Bind:
    @cache
    def made() -> tuple[Any, torch.optim.Optimizer, Any]:
        model = network().train()
        if autocast and not ours:
            model = model.to(memory_format=LAST)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
        if compile:
            torch.compiler.reset()
        return model, optimizer, torch.compile(model) if compile else model

    def bind(arrays: Arrays) -> Call:
        model, optimizer, run = made()
        return partial(_step, model, optimizer, autocast, *arrays.reads, run=run)

    return bind


@torch.enable_grad()
def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    autocast: bool,
    x: Tensor,
    target: Tensor,
    run: Any = None,
) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, BF16, enabled=autocast):
        (out,) = _run(model if run is None else run, x)
    loss = F.mse_loss(out.to(target.dtype), target)
    for parameter in model.parameters():
        parameter.grad = None
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    first: Any = model.conv_in
    return loss.detach(), first.weight.grad


# ---- the floor --------------------------------------------------------------------------------


def _product(network: Callable[[], Any], dtype: torch.dtype, arrays: Arrays, times: int = 1) -> Call:
    """One product of matrices with as many multiplications, and as large as products get efficient."""
    side = 2048 if arrays.reads[0].is_cuda or len(arrays.reads[0]) > 2 else 256
    rows = max(1, round(times * multiplications(network(), arrays.reads[0]) / side**2))
    like: dict[str, Any] = {"dtype": dtype, "device": arrays.reads[0].device}
    return partial(torch.mm, torch.randn(rows, side, **like), torch.randn(side, side, **like))


def multiplications(model: nn.Module, x: Tensor) -> int:
    """In the convolutions and matrix products of one forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        _run(model, x)
    return counter.get_total_flops() // 2


def _times(x: Tensor) -> Tensor:
    return torch.linspace(50, 950, len(x), device=x.device).long()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
