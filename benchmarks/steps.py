"""The step family and the forward process, which are as fast as the memory if they are done in one pass.

``out=`` cases write to tensors that are there, ``new`` cases make theirs, as diffusers always does. Steps compute the
estimate of x0 too, as diffusers does; DPM-Solver++ 2M keeps it as its history. ``normal`` makes elements / ours_ms
normals a millisecond: 1.6 a nanosecond is 1.966 ms for 16x3x256x256.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastdiff as fd
from benchmarks import peers
from benchmarks.harness import Arrays, Bind, Call, Case, Peer
from benchmarks.peers import ROW, SCALE, STEPS, State
from fastdiff.backends import body
from fastdiff.noise import Address, Stream, draw
from fastdiff.ops.row import LETTERS
from fastdiff.table import build_table

Shape = tuple[int, ...]
Outputs = tuple[Tensor, ...]

CPU = ((64, 3, 32, 32), (16, 3, 256, 256))
CUDA = (*CPU, (256, 3, 32, 32), (1, 3, 32, 32), (342, 3, 256, 256))
HOST, TINY = (1, 1, 2, 2), (2, 3, 8, 8)
DIFFUSION = fd.Diffusion(fd.Schedule.linear())
SEED = 7


def cases(device: torch.device, quick: bool = False) -> Iterator[Case]:
    yield from host_cases(device)
    for shape in (TINY,) if quick else CUDA if device.type == "cuda" else CPU:
        for family in (step_cases, noise_cases, loss_cases):
            yield from family(shape, device)


def step_cases(shape: Shape, device: torch.device) -> Iterator[Case]:
    for new in (False, True):
        yield deterministic("ddim", "DDIM", shape, device, new=new, reads=3)
        yield deterministic("dpmpp_2m", "DPM++2M", shape, device, new=new, reads=4)
        yield ancestral(shape, device, new=new)
        yield guidance(shape, new=new)


def noise_cases(shape: Shape, device: torch.device) -> Iterator[Case]:
    yield forward_by_timestep(shape, device)
    for new in (False, True):
        yield forward(shape, device, new=new)
        yield forward_drawing(shape, device, new=new)
        yield normals(shape, device, new=new)


def loss_cases(shape: Shape, device: torch.device) -> Iterator[Case]:
    yield loss(shape, device)
    yield objective(shape, device)


def host_cases(device: torch.device) -> Iterator[Case]:
    """So small that only the way to the kernel counts; all schedulers, though only DDIM computes the same."""
    table = make_table("ddim", device)
    others = [peers.diffusers_step(name, device, None) for name in ("DDPM", "DPM++2M", "Euler")]
    everyone = (peers.diffusers_step("DDIM", device), *others)
    for new in (False, True):
        name = _name("affine_step host overhead", HOST, new)
        yield Case(name, HOST, 2, 2, our_step(table, new), partial(affine, table), everyone)


# ---- steps ------------------------------------------------------------------------------------


def deterministic(solver: str, peer: str, shape: Shape, device: torch.device, *, new: bool, reads: int) -> Case:
    table = make_table(solver, device)
    formula = partial(affine, table)
    others = (peers.diffusers_step(peer, device), peers.compiled(formula, new=new))
    return Case(
        _name(f"affine_step {solver}+guidance", shape, new), shape, reads, 2, our_step(table, new), formula, others
    )


def ancestral(shape: Shape, device: torch.device, *, new: bool) -> Case:
    """A DDPM step that makes its own noise."""
    table = make_table("ddpm", device)
    own, drawn = torch.randn_like, partial(address_noise, Stream.STEP, ROW)
    others = (
        peers.diffusers_step("DDPM", device, None),
        peers.eager("Tensor.normal_ alone", fill, None),
        peers.compiled(partial(affine, table, noise=own), new=new, tolerance=None),
    )
    formula = partial(affine, table, noise=drawn)
    name = _name("affine_step ddpm+own noise", shape, new)
    return Case(name, shape, 2, 2, our_step(table, new, seed=SEED), formula, others)


def guidance(shape: Shape, *, new: bool) -> Case:
    others = (peers.eager("torch formula", guide), peers.compiled(guide, new=new))
    return Case(_name("guide", shape, new), shape, 2, 1, partial(our_guide, new), guide, others)


def make_table(solver: str, device: torch.device) -> Tensor:
    timesteps = DIFFUSION.schedule.timesteps(STEPS, "trailing")
    return build_table(DIFFUSION, timesteps, solver, guidance_scale=SCALE).tensor(device, torch.float32)


def our_step(table: Tensor, new: bool, **noise: int) -> Bind:
    return partial(_our_step, table, new, noise)


def _our_step(table: Tensor, new: bool, noise: dict[str, Any], arrays: Arrays) -> Call:
    x, output, uncond, h1 = State(*arrays.reads)
    history = () if h1 is None else (h1,)
    kept: dict[str, Any] = {"history": arrays.writes[1:]} if history else {"x0": arrays.writes[1]}
    out = None if new else fd.ops.Step(arrays.writes[0], **kept)
    options: dict[str, Any] = {"uncond": uncond, "history": history, "keep_x0": not history, "out": out}
    return partial(fd.ops.affine_step, x, output, table, ROW, **options, **noise)


def affine(table: Tensor, arrays: Arrays, noise: Callable[[Tensor], Tensor] | None = None) -> Outputs:
    """x' and x0 by the letters of the row."""
    x, output, uncond, h1 = State(*arrays.reads)
    r = dict(zip(LETTERS, table[ROW].to(x.dtype).unbind(), strict=True))
    if uncond is not None:
        output = uncond + r["w"] * (output - uncond)
    x0 = r["p"] * x + r["q"] * output
    following = r["a"] * x + r["b"] * x0
    if h1 is not None:
        following = following + r["c1"] * h1
    return (following if noise is None else following + r["s"] * noise(x)), x0


def our_guide(new: bool, arrays: Arrays) -> Call:
    cond, uncond = arrays.reads
    return partial(fd.ops.guide, cond, uncond, SCALE, out=None if new else arrays.writes[0])


def guide(arrays: Arrays) -> Outputs:
    cond, uncond = arrays.reads
    return (uncond + SCALE * (cond - uncond),)


# ---- the forward process ----------------------------------------------------------------------


def forward(shape: Shape, device: torch.device, *, new: bool) -> Case:
    timesteps = make_timesteps(shape, device)
    formula = partial(noised, *levels(timesteps))
    others = (peers.diffusers_add_noise(timesteps, draws=False), peers.compiled(formula, new=new))
    ours = partial(our_add_noise, levels(timesteps), new)
    return Case(_name("add_noise given noise", shape, new), shape, 2, 1, ours, formula, others)


def forward_by_timestep(shape: Shape, device: torch.device) -> Case:
    """What training calls: the levels are looked up as well, as diffusers does it."""
    timesteps = make_timesteps(shape, device)
    formula = partial(noised, *levels(timesteps))
    others = (peers.diffusers_add_noise(timesteps, draws=False),)
    name = _name("add_noise given noise, by timestep", shape, True)
    return Case(name, shape, 2, 1, partial(our_noising, timesteps), formula, others)


def forward_drawing(shape: Shape, device: torch.device, *, new: bool) -> Case:
    timesteps = make_timesteps(shape, device)
    own = partial(noised, *levels(timesteps), noise=torch.randn_like)
    others = (
        peers.diffusers_add_noise(timesteps, draws=True),
        peers.eager("torch.randn + formula", own, None),
        peers.compiled(own, new=new, tolerance=None),
    )
    formula = partial(noised, *levels(timesteps), noise=partial(address_noise, Stream.TRAINING, ROW))
    ours = partial(our_add_noise, levels(timesteps), new, seed=SEED, step=ROW)
    return Case(_name("add_noise own noise", shape, new), shape, 1, 1, ours, formula, others)


def normals(shape: Shape, device: torch.device, *, new: bool) -> Case:
    place = Address(SEED, ROW, None, Stream.STEP)
    ours: Bind
    if new:
        make = partial(fd.noise.normal, shape, seed=SEED, step=ROW, device=device)
        ours, peer = lambda _: make, peers.eager("torch.randn", lambda _: torch.randn(shape, device=device), None)
    else:
        ours, peer = partial(our_normal, place), peers.eager("Tensor.normal_", fill, None)
    return Case(_name("normal", shape, new), shape, 0, 1, ours, lambda _: (draw(shape, place, device),), (peer,))


def fill(arrays: Arrays) -> Tensor:
    return arrays.writes[0].normal_()


def our_add_noise(at: tuple[Tensor, Tensor], new: bool, arrays: Arrays, **noise: Any) -> Call:
    x0, *given = arrays.reads
    return partial(fd.ops.add_noise, x0, *at, *given, out=None if new else arrays.writes[0], **noise)


def our_noising(timesteps: Tensor, arrays: Arrays) -> Call:
    x0, noise = arrays.reads
    return partial(DIFFUSION.add_noise, x0, noise, timesteps)


def our_normal(place: Address, arrays: Arrays) -> Call:
    (result,) = arrays.writes
    run = partial(body("normal", result.device, result.dtype), result, place)
    return lambda: run() or result


def noised(alpha: Tensor, sigma: Tensor, arrays: Arrays, noise: Callable[[Tensor], Tensor] | None = None) -> Outputs:
    x0 = arrays.reads[0]
    alpha, sigma = (level.to(x0.dtype).reshape(-1, 1, 1, 1) for level in (alpha, sigma))
    return (alpha * x0 + sigma * (arrays.reads[1] if noise is None else noise(x0)),)


def address_noise(stream: Stream, step: int, x: Tensor) -> Tensor:
    return draw(x.shape, Address(SEED, step, None, stream), x.device)


def make_timesteps(shape: Shape, device: torch.device) -> Tensor:
    return torch.linspace(50, 950, shape[0]).long().to(device)


def levels(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    at, schedule = timesteps.cpu(), DIFFUSION.schedule
    return schedule.alpha[at].float().to(timesteps.device), schedule.sigma[at].float().to(timesteps.device)


# ---- the loss ---------------------------------------------------------------------------------


def loss(shape: Shape, device: torch.device) -> Case:
    """Forward and backward of a v-prediction: three arrays are read and what the gradient is made of is written, which
    the other pass reads and writes again."""
    at = target_levels(shape, device)
    formula = partial(squared_error, *at)
    return Case(
        name=_name("diffusion_loss fwd+bwd given noise", shape, True),
        shape=shape,
        reads=3,
        writes=1,
        ours=lambda arrays: partial(with_gradient, partial(our_loss, at), arrays),
        formula=partial(with_gradient, formula),
        peers=tuple(loss_peers(formula, 1e-5)),
        moves=(4, 2),
    )


def objective(shape: Shape, device: torch.device) -> Case:
    """The training objective as it is used, with noise of its own: noising reads one array and writes one, the loss
    reads two and writes one, the backward pass reads one and writes one."""
    timesteps, at = make_timesteps(shape, device), target_levels(shape, device)
    formula = partial(noising_and_loss, levels(timesteps), at)
    truth = partial(formula, partial(address_noise, Stream.TRAINING, ROW))
    from_diffusers = Peer("diffusers", partial(_diffusers_objective, timesteps), None)
    return Case(
        name=_name("objective own noise (add_noise + diffusion_loss fwd+bwd)", shape, True),
        shape=shape,
        reads=2,
        writes=1,
        ours=lambda arrays: partial(with_gradient, partial(our_objective, levels(timesteps), at), arrays),
        formula=partial(with_gradient, truth),
        peers=(*loss_peers(partial(formula, torch.randn_like), None), from_diffusers),
        moves=(4, 3),
    )


def loss_peers(formula: Callable[..., Outputs], tolerance: float | None) -> Iterator[Peer]:
    yield peers.eager("torch formula", partial(with_gradient, formula), tolerance)
    yield Peer("torch.compile", partial(_compiled_loss, formula), tolerance, slow=True)


def _compiled_loss(formula: Callable[..., Outputs]) -> Bind:
    torch.compiler.reset()
    run = torch.compile(formula, fullgraph=True, dynamic=False)
    return lambda arrays: partial(with_gradient, run, arrays)


def _diffusers_objective(timesteps: Tensor) -> Bind:
    run = peers.diffusers_objective(timesteps)
    return lambda arrays: partial(with_gradient, run, arrays)


@torch.enable_grad()
def with_gradient(run: Callable[..., Outputs], arrays: Arrays) -> Outputs:
    """What is made of an output and others, the loss last, and the loss's gradient."""
    output, *rest = arrays.reads
    leaf = output.detach().requires_grad_()
    *others, values = run(leaf, *rest)
    return *others, values.detach(), *torch.autograd.grad(values.sum(), leaf)


def our_loss(at: Outputs, output: Tensor, x0: Tensor, noise: Tensor) -> Outputs:
    return (fd.ops.diffusion_loss(output, x0, *at, noise),)


def our_objective(scales: Outputs, at: Outputs, output: Tensor, x0: Tensor) -> Outputs:
    place: dict[str, Any] = {"seed": SEED, "step": ROW}
    return fd.ops.add_noise(x0, *scales, **place), fd.ops.diffusion_loss(output, x0, *at, **place)


def noising_and_loss(
    scales: tuple[Tensor, Tensor], at: Outputs, make_noise: Callable[[Tensor], Tensor], output: Tensor, x0: Tensor
) -> Outputs:
    noise = make_noise(x0)
    return *noised(*scales, Arrays((x0, noise), ())), *squared_error(*at, output, x0, noise)


def squared_error(f: Tensor, g: Tensor, weight: Tensor, output: Tensor, x0: Tensor, noise: Tensor) -> Outputs:
    f, g, weight = (value.to(x0.dtype) for value in (f, g, weight))
    target = f.reshape(-1, 1, 1, 1) * x0 + g.reshape(-1, 1, 1, 1) * noise
    return (weight * (output - target).square().flatten(1).mean(1),)


def target_levels(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """f, g and weight of a v-prediction."""
    alpha, sigma = levels(make_timesteps(shape, device))
    return -sigma, alpha, torch.ones_like(alpha)


def _name(op: str, shape: Shape, new: bool) -> str:
    return f"{op}, {'new' if new else 'out='}, {'x'.join(map(str, shape))}"
