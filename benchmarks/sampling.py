"""Whole runs, from noise to images: the DDPM CIFAR-10 network, and a network of 10,000 points of the plane.

All start from the same noise and have the same weights. A run of ours is compared with the textbook's formulas in
float64 around the same network, and so is every peer that draws no noise of its own. Peers: diffusers' pipelines as
they come (float32), in bfloat16 and channels-last, and with a compiled network; where it has no pipeline, the loop of
its documentation; and a loop as guided-diffusion has it. The floor is as many products of matrices as the network has.

Beside the time each row says, of ours and (``peer_``) of the peer: samples a second; the share of the run that is not
the network, timed with a network that costs nothing; how often a step waits for a number from the device, and on a GPU
how many launches it makes. On a CPU, DDPM takes 100 steps at batch 8, which cost a tenth of 1000.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastdiff as fd
from benchmarks.harness import Bind, Call, Case, Peer
from benchmarks.unet import BF16, LAST, _name, _product, make_network, our_network

RUNS = {"ddim": 50, "dpmpp_2m": 20, "ddpm": 1000}
TOLERANCE = {torch.float32: 1e-3, BF16: 0.1}
V = "v_prediction"  # which an untrained network does not turn into huge estimates, as it does noise
POINTS = (10_000, 2)
WAITS = {"cpu": "aten::_local_scalar_dense", "cuda": "Memcpy DtoH"}  # what reads a number
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")


class Setting(NamedTuple):
    """A run that everybody makes."""

    solver: str
    steps: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def clip(self) -> bool:
        """Whether estimates are clamped, as the pipelines of these two do; diffusers' 2M does not."""
        return len(self.shape) == 4 and self.solver != "dpmpp_2m"


Run = Callable[[Tensor], Tensor]  # from noise to samples
Contestant = Callable[[Setting, Any], Run]  # with a network


def cases(device: torch.device, quick: bool = False) -> Iterator[Case]:
    batches = (1, 16, 256) if device.type == "cuda" else (1, 8)
    for solver, steps in RUNS.items():
        count = min(steps, 5) if quick else steps
        for fast in (False,) if quick else (False, True):
            yield points(Setting(solver, count, (64, 2) if quick else POINTS, torch.float32, device), fast)
    for solver, steps in RUNS.items():
        for batch in batches[:1] if quick else batches:
            cut = device.type == "cpu" and batch > 1 and steps > 100
            count = 3 if quick else 100 if cut else steps
            for dtype in (torch.float32, BF16) if solver == "ddim" else (BF16,):
                yield images(Setting(solver, count, (batch, 3, 32, 32), dtype, device), quick)


def points(setting: Setting, fast: bool) -> Case:
    """``fast``: everybody has the compiled network."""
    network = cache(partial(make_mlp, setting.device))
    made = cache(partial(compiled, network)) if fast else network
    contestants = {"diffusers loop": scheduler_loop, "guided-diffusion style": guided_diffusion_loop}
    contestants["ours, recorded"] = recorded
    peers = {name: (contestant, made, 1e-3) for name, contestant in contestants.items()}
    return case("points, compiled" if fast else "points", setting, made, network, peers)


def images(setting: Setting, quick: bool) -> Case:
    network = cache(partial(make_images_network, setting, quick, torch.float32))
    half = cache(partial(make_images_network, setting, quick, BF16))
    ours = cache(lambda: our_network(network).to(setting.dtype).eval())
    pipeline: Contestant = scheduler_loop if setting.solver == "dpmpp_2m" else diffusers_pipeline
    name, plain = "pipeline", 1e-2  # their tables are of float32
    precise = setting.dtype == torch.float32
    fast = partial(compiled, network if precise else half)
    peers: dict[str, tuple[Contestant, Any, float | None]] = {f"diffusers {name}": (pipeline, network, plain)}
    if not precise:
        peers[f"diffusers {name}, bf16 last"] = (pipeline, half, TOLERANCE[BF16])
    peers[f"diffusers {name}, compiled"] = (pipeline, fast, TOLERANCE[setting.dtype])
    peers["guided-diffusion style"] = (guided_diffusion_loop, network, plain)
    peers["ours, recorded"] = (recorded, ours, TOLERANCE[setting.dtype])
    return case(f"images {_name(setting.dtype)}", setting, ours, network, peers)


def case(
    subject: str,
    setting: Setting,
    ours: Callable[[], Any],
    network: Callable[[], Any],
    peers: dict[str, tuple[Contestant, Any, float | None]],
) -> Case:
    all_: dict[str, tuple[Contestant, Any]] = {"ours": (fastdiff, ours)}
    for name, (contestant, made, _) in peers.items():
        if setting.solver != "dpmpp_2m" or contestant is not guided_diffusion_loop:  # which has no such solver
            all_[name] = contestant, made
    drawing = setting.solver == "ddpm"  # noise of their own
    return Case(
        name=f"{setting.solver} {setting.steps}, {subject}, {'x'.join(map(str, setting.shape))}",
        shape=setting.shape,
        reads=1,
        writes=0,
        ours=bound(setting, *all_["ours"]),
        formula=lambda arrays: [formula(setting, network(), arrays.reads[0])],
        peers=tuple(
            Peer(name, partial(bound, setting, *all_[name]), None if drawing else tolerance, slow="compiled" in name)
            for name, (_, _, tolerance) in peers.items()
            if name in all_
        ),
        tolerance=TOLERANCE[setting.dtype],
        floor=lambda arrays: _product(network, setting.dtype, arrays, times=setting.steps),
        facts=lambda name, ms: facts(setting, *all_[name], ms),
    )


def bound(setting: Setting, contestant: Contestant, network: Callable[[], Any]) -> Bind:
    run = cache(lambda: contestant(setting, network()))
    return lambda arrays: lambda: [run()(arrays.reads[0])]


# ---- networks ---------------------------------------------------------------------------------


def make_images_network(setting: Setting, quick: bool, dtype: torch.dtype) -> Any:
    network = make_network(setting.device, quick).to(dtype).eval()
    return network if dtype == torch.float32 else network.to(memory_format=LAST)


def make_mlp(device: torch.device) -> fd.MLP:
    torch.manual_seed(0)
    mlp = fd.MLP(width=64, depth=2).to(device).eval()
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.1)
    return mlp


def compiled(network: Callable[[], Any]) -> Any:
    torch.compiler.reset()
    made = network()
    on_gpu = next(made.parameters()).is_cuda
    return torch.compile(made, mode="reduce-overhead" if on_gpu else None)


class Free(nn.Module):
    """A network that costs nothing: what it says is what the real one said once."""

    def __init__(self, network: Any, x: Tensor) -> None:
        super().__init__()
        self.config, like = getattr(network, "config", None), next(network.parameters())
        self.dtype, self.device = like.dtype, like.device
        self.weight = nn.Parameter(torch.zeros((), dtype=like.dtype, device=like.device))
        self.out = output(network, x.to(like.dtype), torch.full((len(x),), 500, device=x.device)).clone()

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return SimpleNamespace(sample=self.out)


def output(network: Any, x: Tensor, t: Tensor) -> Tensor:
    out = network(x, t)
    return out if isinstance(out, Tensor) else out.sample


# ---- ours -------------------------------------------------------------------------------------


def fastdiff(setting: Setting, network: Any, record: fd.Recorder | None = None) -> Run:
    diffusion = fd.Diffusion(fd.Schedule.linear(1000), V)
    clip = 1.0 if setting.clip else None
    sampler = fd.Sampler(network, diffusion, setting.solver, setting.steps, clip=clip, device=setting.device)
    return lambda x: sampler(setting.shape, x=x, seed=0, record=record)


def recorded(setting: Setting, network: Any) -> Run:
    """Ours again, with 40 of its states kept, as animations want them: what that costs is this ratio above 1."""
    return fastdiff(setting, network, fd.Recorder(every=max(1, setting.steps // 40)))


# ---- the formulas -----------------------------------------------------------------------------


def formula(setting: Setting, network: Any, x: Tensor) -> Tensor:
    """Ho et al. 2020, algorithm 2; Song et al. 2021, eq. 12; Lu et al. 2022, algorithm 2; from linear betas."""
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).tolist()
    timesteps = visited(setting)
    before, last = None, 0.0
    for i, t in enumerate(timesteps):
        here, there = alpha_bar[t], alpha_bar[timesteps[i + 1]] if i + 1 < setting.steps else 1.0
        v = output(network, x.float(), torch.full((len(x),), t, device=x.device)).double()
        x0 = here**0.5 * x - (1 - here) ** 0.5 * v
        x0 = x0.clamp(-1, 1) if setting.clip else x0
        if setting.solver == "ddpm":
            beta = 1 - here / there
            mean = there**0.5 * beta / (1 - here) * x0 + (1 - beta) ** 0.5 * (1 - there) / (1 - here) * x
            noise = fd.noise.normal(setting.shape, seed=0, step=i, device=setting.device, dtype=torch.float64)
            x = mean + (beta * (1 - there) / (1 - here)) ** 0.5 * noise
        else:
            rise = 0.5 * (torch.logit(torch.tensor(there)) - torch.logit(torch.tensor(here))).item()
            estimate = x0
            if setting.solver == "dpmpp_2m" and before is not None and there < 1:
                estimate = x0 + rise / (2 * last) * (x0 - before)
            direction = (x - here**0.5 * x0) / (1 - here) ** 0.5
            x = there**0.5 * x0 + (1 - there) ** 0.5 * direction
            if there < 1:
                keep = ((1 - there) / (1 - here)) ** 0.5
                x = x + (there**0.5 - keep * here**0.5) * (estimate - x0)
            before, last = x0, rise
    return x


def visited(setting: Setting) -> list[int]:
    return [round(1000 - i * 1000 / setting.steps) - 1 for i in range(setting.steps)]


# ---- diffusers --------------------------------------------------------------------------------


def make_scheduler(setting: Setting) -> Any:
    import diffusers

    classes = {
        "ddpm": partial(diffusers.DDPMScheduler, clip_sample=setting.clip),
        "ddim": partial(diffusers.DDIMScheduler, clip_sample=setting.clip),
        "dpmpp_2m": partial(diffusers.DPMSolverMultistepScheduler, algorithm_type="dpmsolver++"),
    }
    return classes[setting.solver](
        beta_schedule="linear", beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing", prediction_type=V
    )


def make_pipeline(setting: Setting, network: Any) -> Any:
    import diffusers

    kind = {"ddim": diffusers.DDIMPipeline, "ddpm": diffusers.DDPMPipeline}[setting.solver]
    pipeline = kind(network, make_scheduler(setting))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def diffusers_pipeline(setting: Setting, network: Any) -> Run:
    return run_of(make_pipeline(setting, network), setting)


def run_of(pipeline: Any, setting: Setting) -> Run:
    """Its start is PyTorch's noise of seed 0, which the input of a case is too."""

    def run(x: Tensor) -> Tensor:
        generator = torch.Generator(setting.device).manual_seed(0)
        more = {"batch_size": len(x), "num_inference_steps": setting.steps, "output_type": "pt"}
        if setting.solver == "ddim":  # else noise and image are not those of one x where an estimate is clamped
            more["use_clipped_model_output"] = True
        return 2 * pipeline(generator=generator, **more).images - 1

    return run


def scheduler_loop(setting: Setting, network: Any) -> Run:
    """The loop of its documentation."""
    scheduler = make_scheduler(setting)
    dtype = next(network.parameters()).dtype

    @torch.no_grad()
    def run(x: Tensor) -> Tensor:
        scheduler.set_timesteps(setting.steps, device=setting.device)
        x = x.to(dtype) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            out = output(network, scheduler.scale_model_input(x, t), t.expand(len(x)))
            x = scheduler.step(out, t, x).prev_sample
        return x

    return run


# ---- guided-diffusion -------------------------------------------------------------------------


def guided_diffusion_loop(setting: Setting, network: Any) -> Run:
    """Tables in NumPy, from which each step takes its coefficients one by one, one for each sample."""
    timesteps = visited(setting)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[timesteps[::-1]].numpy()
    before = [1.0, *alpha_bar[:-1]]
    beta = 1 - alpha_bar / before
    columns = {
        "signal": alpha_bar**0.5,
        "noise": (1 - alpha_bar) ** 0.5,
        "per_signal": alpha_bar**-0.5,
        "ratio": (1 / alpha_bar - 1) ** 0.5,
        "of_x0": [b**0.5 for b in before] * beta / (1 - alpha_bar),
        "of_x": (1 - beta) ** 0.5 * [1 - b for b in before] / (1 - alpha_bar),
        "alpha_bar": alpha_bar,
        "before": torch.tensor(before, dtype=torch.float64).numpy(),
    }
    variance = beta * [1 - b for b in before] / (1 - alpha_bar)
    columns["variance"] = variance
    variance = variance.copy()
    variance[0] = variance[min(1, len(variance) - 1)]
    columns["log_variance"] = torch.from_numpy(variance).clamp(min=1e-20).log().numpy()
    told = torch.tensor(timesteps[::-1])

    def extract(name: str, i: Tensor, x: Tensor) -> Tensor:
        return torch.from_numpy(columns[name]).to(i.device)[i].float().reshape(-1, *(1,) * (x.ndim - 1)).expand(x.shape)

    def step(x: Tensor, i: Tensor) -> Tensor:
        out = output(network, x, told.to(x.device)[i])
        x0 = extract("signal", i, x) * x - extract("noise", i, x) * out
        x0 = x0.clamp(-1, 1) if setting.clip else x0
        mean = extract("of_x0", i, x) * x0 + extract("of_x", i, x) * x
        log_variance = extract("log_variance", i, x)
        extract("variance", i, x)  # it gives this back too
        noise = torch.randn_like(x)
        nonzero = (i != 0).float().reshape(-1, *(1,) * (x.ndim - 1))
        if setting.solver == "ddpm":
            return mean + nonzero * torch.exp(0.5 * log_variance) * noise
        epsilon = (extract("per_signal", i, x) * x - x0) / extract("ratio", i, x)
        here, there = extract("alpha_bar", i, x), extract("before", i, x)
        sigma = 0.0 * torch.sqrt((1 - there) / (1 - here)) * torch.sqrt(1 - here / there)
        return x0 * torch.sqrt(there) + torch.sqrt(1 - there - sigma**2) * epsilon + nonzero * sigma * noise

    def run(x: Tensor) -> Tensor:
        for i in reversed(range(setting.steps)):
            with torch.no_grad():
                x = step(x, torch.tensor([i] * len(x), device=x.device))
        return x

    return run


# ---- facts ------------------------------------------------------------------------------------


@torch.no_grad()
def facts(setting: Setting, contestant: Contestant, network: Callable[[], Any], ms: float) -> dict[str, Any]:
    """What a row says of a contestant beside its time."""
    x = torch.randn(setting.shape, device=setting.device)
    plain = getattr(network(), "_orig_mod", network())
    free = partial(contestant(setting, Free(plain, x)), x)
    short = setting._replace(steps=min(setting.steps, 20))
    events = profiled(partial(contestant(short, network()), x), setting.device)
    waits = sum(name.startswith(WAITS[setting.device.type]) for name in events)
    launches = sum(name in LAUNCHES for name in events)
    return {
        "samples_per_s": 1e3 * setting.shape[0] / ms,
        "outside": seconds(free, setting.device) * 1e3 / ms,
        "waits_per_step": waits / short.steps,
        "launches_per_step": launches / short.steps if setting.device.type == "cuda" else None,
    }


def profiled(call: Call, device: torch.device) -> list[str]:
    """The names of what happened during a call, the second one."""
    from torch.profiler import ProfilerActivity, profile

    call()
    activities = [ProfilerActivity.CPU, *((ProfilerActivity.CUDA,) if device.type == "cuda" else ())]
    with profile(activities=activities) as profiler:
        call()
    return [event.name for event in profiler.events()]


def seconds(call: Call, device: torch.device) -> float:
    """The median of five calls."""
    once(call, device)
    return statistics.median(once(call, device) for _ in range(5))


def once(call: Call, device: torch.device) -> float:
    """Seconds of a call, on a GPU until it is done."""
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
