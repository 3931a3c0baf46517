"""Other people's code over our schedulers: files, classes, pipelines, threads, and what was wrong in diffusers."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import subprocess
import sys
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_tools import Device, stand_in
from torch import Tensor

import fastdiff as fd
from fastdiff import InputError, graph
from fastdiff.adapters import diffusers as adapters

diffusers = pytest.importorskip("diffusers")
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
pytestmark = pytest.mark.usefixtures("one_thread")


def unet(**settings: Any) -> Any:
    torch.manual_seed(0)
    small = {"sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return diffusers.UNet2DModel(**small, **blocks, attention_head_dim=8, **settings).eval()


def pipeline(kind: str, scheduler: Any) -> Any:
    made = getattr(diffusers, kind)(unet(), scheduler)
    made.set_progress_bar_config(disable=True)
    return made


def images(pipe: Any, **call: Any) -> Tensor:
    """``[2, 8, 8, 3]`` in [0, 1]."""
    generator = torch.Generator().manual_seed(3)
    return torch.from_numpy(pipe(batch_size=2, generator=generator, output_type="np", **call).images)


def given_away(scheduler: Any, steps: int, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    """What a run of a scheduler leaves, of a network that is a function of its input."""
    scheduler.set_timesteps(steps)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    for t in scheduler.timesteps:
        asked = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(torch.tanh(asked + 0.1), t, x, **options).prev_sample
    return x


# ---- classes and files --------------------------------------------------------------------------


@pytest.mark.parametrize("name", adapters.SCHEDULERS)
def test_a_scheduler_is_diffusers_own_to_everybody(name: str, tmp_path: Path) -> None:
    theirs, ours = getattr(diffusers, name)(num_train_timesteps=500), getattr(adapters, name)(num_train_timesteps=500)
    assert isinstance(ours, type(theirs))
    ours.save_pretrained(tmp_path)
    for kind in (type(theirs), type(ours)):
        loaded = kind.from_pretrained(tmp_path)
        assert type(loaded) is kind
        assert loaded.config.num_train_timesteps == 500
    again = type(ours).from_config(theirs.config, strict_compat=True)
    assert again.config.strict_compat
    assert {**theirs.config, "strict_compat": True}.items() <= {**again.config}.items()
    assert type(theirs).from_config(ours.config).config.num_train_timesteps == 500
    for method in ("step", "set_timesteps", "add_noise", "get_velocity", "scale_model_input"):
        assert hasattr(theirs, method) == hasattr(ours, method)
        if hasattr(theirs, method):
            assert inspect.signature(getattr(theirs, method)) == inspect.signature(getattr(ours, method))


def test_a_config_of_another_scheduler_brings_what_it_says_and_no_defaults() -> None:
    """As with diffusers: settings that nobody had chosen do not go from one class to another."""
    config = diffusers.DDIMScheduler(beta_schedule="scaled_linear").config
    ours = adapters.DPMSolverMultistepScheduler.from_config(config)
    assert ours.config.beta_schedule == "scaled_linear"
    assert ours.config.timestep_spacing == "linspace"


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_copies_have_a_run_of_their_own(name: str) -> None:
    scheduler = getattr(adapters, name)()
    scheduler.set_timesteps(5)
    for copied in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert torch.equal(copied.timesteps, scheduler.timesteps)
        copied.set_timesteps(3)
        assert len(scheduler.timesteps) == 5


def test_the_adapters_bring_nothing_to_the_import_of_fastdiff() -> None:
    said = "import sys, fastdiff, fastdiff.adapters.diffusers; print('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True).stdout == "False\n"


# ---- what was wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [61, 103])
@pytest.mark.parametrize("name", [name for name in adapters.SCHEDULERS[:-2] if not name.startswith("Flow")])
def test_trailing_timesteps_do_not_end_in_minus_one(name: str, steps: int) -> None:
    settings = {"timestep_spacing": "trailing", **({"skip_prk_steps": True} if name == "PNDMScheduler" else {})}
    theirs, ours = (getattr(room, name)(**settings) for room in (diffusers, adapters))
    theirs.set_timesteps(steps)
    assert theirs.timesteps[-1] == -1
    left = given_away(ours, steps)
    assert torch.isfinite(left).all()
    assert ours.timesteps[-1] >= 0
    assert len(ours.timesteps.unique()) == steps
    assert torch.equal(ours.timesteps, theirs.timesteps[: len(ours.timesteps)])
    assert ours._run.next == len(ours.timesteps)


def test_equal_timesteps_do_not_end_a_run() -> None:
    settings = {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True}
    with pytest.raises(IndexError):
        given_away(diffusers.DPMSolverMultistepScheduler(**settings), 9)
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"):
        for steps in (5, 9, 20, 50):
            assert torch.isfinite(given_away(getattr(adapters, name)(**settings), steps)).all()


def test_fixed_large_log_is_a_variance() -> None:
    assert not torch.isfinite(given_away(diffusers.DDPMScheduler(variance_type="fixed_large_log"), 5)).all()
    runs = []
    for variance in ("fixed_large_log", "fixed_large"):
        generator = torch.Generator().manual_seed(0)
        runs.append(given_away(adapters.DDPMScheduler(variance_type=variance), 5, generator=generator))
    assert torch.equal(*runs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_noise_is_added_to_half_precision(dtype: torch.dtype) -> None:
    t, x0 = torch.arange(0, 1000, 7), torch.zeros(143, 3, 4, 4, dtype=dtype)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    sigma = (1 - adapters.DDPMScheduler(strict_compat=True).alphas_cumprod.double()[t]).sqrt().view(-1, 1, 1, 1)
    exact = sigma * noise.double()
    for name in ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "LCMScheduler"):
        noised = getattr(adapters, name)(beta_start=1e-4, beta_end=0.02, beta_schedule="linear").add_noise(x0, noise, t)
        assert noised.dtype == dtype
        assert float((noised.double() - exact).abs().max()) <= 2**-7 * float(exact.abs().max())
        assert (noised[0] != 0).any()  # where diffusers adds nothing to bfloat16


def test_a_state_in_half_precision_goes_on_unrounded() -> None:
    config = {"clip_sample": False, "beta_schedule": "scaled_linear"}
    wanted = given_away(adapters.DDIMScheduler(**config), 50)
    ours, strict, theirs = (
        float((given_away(scheduler, 50, torch.bfloat16) - wanted).abs().mean())
        for scheduler in (
            adapters.DDIMScheduler(**config),
            adapters.DDIMScheduler(**config, strict_compat=True),
            diffusers.DDIMScheduler(**config),
        )
    )
    assert ours < 0.7 * strict
    assert ours < 0.7 * theirs


def test_a_state_that_was_changed_in_between_is_taken_as_it_is() -> None:
    scheduler = adapters.DDIMScheduler()
    scheduler.set_timesteps(4)
    x = torch.ones(1, 3, 4, 4, dtype=torch.bfloat16)
    first = scheduler.step(x, scheduler.timesteps[0], x).prev_sample
    first.zero_()
    assert scheduler._run.left is first
    second = scheduler.step(torch.zeros_like(x), scheduler.timesteps[1], first).prev_sample
    assert not second.any()


@pytest.mark.parametrize(
    "name", [n for n in adapters.SCHEDULERS if "generator" in inspect.signature(getattr(adapters, n).step).parameters]
)
def test_as_much_is_drawn_from_a_generator(name: str) -> None:
    """What comes after a run gets the same numbers; and the strict mode's last step adds the noise that theirs adds."""
    settings: dict[str, Any] = {"num_train_timesteps": 500}
    if "steps_offset" in getattr(adapters, name)().config:
        settings["steps_offset"] = 1
    if name == "DDPMScheduler":
        settings["variance_type"] = "fixed_large"
    if name == "DPMSolverMultistepScheduler":
        settings["algorithm_type"] = "sde-dpmsolver++"
    theirs, ours = getattr(diffusers, name)(**settings), getattr(adapters, name)(**settings, strict_compat=True)
    generators = [torch.Generator().manual_seed(4) for _ in range(2)]
    more = {"eta": 1.0} if name == "DDIMScheduler" else {}
    left = [given_away(s, 4, generator=g, **more) for s, g in zip((theirs, ours), generators, strict=True)]
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
    assert (left[0] - left[1]).abs().max() < 1e-5 * left[0].abs().max()


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LCMScheduler"]
)
def test_a_step_before_set_timesteps_is_the_error_of_diffusers(name: str) -> None:
    x = torch.zeros(1, 3, 4, 4)
    for room in (diffusers, adapters):
        with pytest.raises(ValueError, match="set_timesteps"):
            getattr(room, name)().step(x, 1, x)


def test_wrong_lists_numbers_and_generators_are_errors_of_diffusers() -> None:
    x = torch.zeros(3, 3, 4, 4)
    for room in (diffusers, adapters):
        scheduler = room.DDPMScheduler()
        with pytest.raises(ValueError, match="descending"):
            scheduler.set_timesteps(timesteps=[1, 5])
        with pytest.raises(ValueError, match="cannot be larger"):
            scheduler.set_timesteps(2000)
        scheduler.set_timesteps(4)
        with pytest.raises(IndexError):  # one for three samples
            scheduler.step(x, scheduler.timesteps[0], x, generator=[torch.Generator()] * 2)
        euler = room.EulerDiscreteScheduler()
        euler.set_timesteps(4)
        with pytest.raises(ValueError, match="integer indices"):
            euler.step(x, 3, x)
        with pytest.raises(TypeError):
            scheduler.step(x, scheduler.timesteps[0], x, temperature=2)


def test_no_signal_and_epsilon_is_said() -> None:
    scheduler = adapters.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(InputError, match="zero terminal SNR"):
        given_away(scheduler, 4)


# ---- pipelines ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "call"),
    [("DDPMPipeline", "DDPMScheduler", {}), ("DDIMPipeline", "DDIMScheduler", {"eta": 0.5})],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_pipeline_gives_the_same_images(kind: str, name: str, call: dict[str, Any], strict: bool) -> None:
    pipe = pipeline(kind, getattr(diffusers, name)())
    theirs = images(pipe, num_inference_steps=20, **call)
    adapters.accelerate(pipe, strict_compat=strict)
    assert type(pipe.scheduler) is getattr(adapters, name)
    assert type(pipe.unet).__name__ == "Network"
    assert (images(pipe, num_inference_steps=20, **call) - theirs).abs().max() < (2e-5 if strict else 2e-3)
    adapters.restore(pipe)
    assert type(pipe.unet) is diffusers.UNet2DModel
    assert torch.equal(images(pipe, num_inference_steps=20, **call), theirs)


@pytest.mark.parametrize("t", [7, 7.0, torch.tensor(7), torch.tensor([7, 300])], ids=str)
@pytest.mark.parametrize("labels", [None, torch.tensor([4, 0])], ids=str)
def test_the_network_is_called_as_theirs(t: Any, labels: Tensor | None) -> None:
    theirs = unet(**({} if labels is None else {"num_class_embeds": 5}))
    pipe = adapters.accelerate(diffusers.DDPMPipeline(theirs, diffusers.DDPMScheduler()))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = theirs(x, t, class_labels=labels).sample
        assert (pipe.unet(x, t, class_labels=labels).sample - wanted).abs().max() < 1e-5
        assert (pipe.unet(x, t, labels, return_dict=False)[0] - wanted).abs().max() < 1e-5
    assert pipe.unet.config == theirs.config
    assert pipe.device == torch.device("cpu")


def test_bfloat16_is_inside_the_network_alone() -> None:
    pipe = pipeline("DDIMPipeline", diffusers.DDIMScheduler())
    exact = images(pipe, num_inference_steps=10)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = images(pipe, num_inference_steps=10)
    adapters.accelerate(pipe, precision="bf16")
    assert pipe.unet.dtype == torch.float32
    assert 0 < (images(pipe, num_inference_steps=10) - exact).abs().mean() < 2 * (theirs - exact).abs().mean()


def test_what_cannot_be_accelerated_says_so() -> None:
    pipe = pipeline("DDPMPipeline", diffusers.DDPMScheduler())
    with pytest.raises(InputError, match="not accelerated"):
        adapters.restore(pipe)
    with pytest.raises(InputError, match="unknown precision 'half'"):
        adapters.accelerate(pipe, precision="half")
    adapters.accelerate(pipe)
    with pytest.raises(InputError, match="accelerated already"):
        adapters.accelerate(pipe)
    other = pipeline("DDPMPipeline", diffusers.DDPMScheduler())
    other.scheduler = diffusers.DDIMInverseScheduler()
    with pytest.raises(InputError, match="DDIMInverseScheduler"):
        adapters.accelerate(other)


@pytest.mark.parametrize("kind", ["DDIMPipeline", "DDPMPipeline"])
def test_threads_share_a_pipeline(kind: str) -> None:
    """16 at once, of different lengths, over one scheduler: the images of one after another."""
    pipe = adapters.accelerate(pipeline(kind, getattr(diffusers, kind.replace("Pipeline", "Scheduler"))()))
    lengths = [3 + number % 5 for number in range(16)]
    alone = [images(pipe, num_inference_steps=steps) for steps in lengths]
    barrier = threading.Barrier(16)

    def run(steps: int) -> Tensor:
        torch.set_num_threads(1)
        barrier.wait()
        return images(pipe, num_inference_steps=steps)

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(run, lengths))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_threads_share_a_scheduler_that_remembers() -> None:
    scheduler = adapters.DPMSolverMultistepScheduler()
    lengths = [4 + number % 7 for number in range(16)]
    alone = [given_away(scheduler, steps) for steps in lengths]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda steps: given_away(scheduler, steps), lengths))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


# ---- pipelines whose network is a CUDA graph ------------------------------------------------------

PIPELINES = [("DDPMPipeline", {}), ("DDIMPipeline", {"eta": 0.5})]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Networks run again and are not taped: no tape can take oneDNN's operations."""
    made = stand_in(monkeypatch)
    made.taped = False
    return made


def accelerated(kind: str = "DDPMPipeline", place: str = "cpu") -> Any:
    made = pipeline(kind, getattr(diffusers, kind.replace("Pipeline", "Scheduler"))())
    return adapters.accelerate(made.to(place))


def eager(device: Device, pipe: Any, **call: Any) -> Tensor:
    device.serves = False
    made = images(pipe, **call)
    device.serves = True
    return made


@pytest.mark.parametrize(("kind", "call"), PIPELINES)
def test_a_replayed_network_gives_the_same_images(kind: str, call: dict[str, Any], device: Device) -> None:
    pipe = accelerated(kind)
    for steps in (5, 8):
        wanted = eager(device, pipe, num_inference_steps=steps, **call)
        assert torch.equal(images(pipe, num_inference_steps=steps, **call), wanted)
    assert (device.captures, device.replays) == (1, 13)
    assert images(adapters.restore(pipe), num_inference_steps=2).shape == (2, 8, 8, 3)
    assert device.replays == 13


def test_a_network_is_captured_once_for_each_shape(device: Device) -> None:
    """On the reference, which a tape can take: what a replay leaves is overwritten by the next one."""
    device.taped = True
    theirs = unet(num_class_embeds=5)
    network: Any = adapters.accelerate(diffusers.DDPMPipeline(theirs, diffusers.DDPMScheduler())).unet
    network.network = fd.UNet.from_diffusers(theirs).eval()
    made = []
    with fd.backend("reference"), torch.no_grad():
        for t in (7, torch.tensor(300), torch.tensor(20.0)):
            for size, labels in ((8, torch.tensor([4, 0])), (16, torch.tensor([1])), (8, torch.tensor([1, 2]))):
                x = torch.randn(len(labels), 3, size, size)
                made.append((network(x, t, labels).sample, theirs(x, t, class_labels=labels).sample))
    assert device.captures == 4, "two shapes, and whole and other timesteps"
    assert device.replays == len(made) == 9
    assert all((ours - wanted).abs().max() < 1e-5 for ours, wanted in made)


def test_missing_labels_are_no_failed_capture(device: Device) -> None:
    theirs = unet(num_class_embeds=5)
    network = adapters.accelerate(diffusers.DDPMPipeline(theirs, diffusers.DDPMScheduler())).unet
    x = torch.ones(2, 3, 8, 8)
    with torch.no_grad():
        with pytest.raises(InputError, match="pass y"):
            network(x, 3)
        for labels in (torch.tensor([0, 2]), torch.tensor([4, 1])):
            assert (network(x, 3, labels).sample - theirs(x, 3, class_labels=labels).sample).abs().max() < 1e-5
    assert (device.captures, device.replays) == (2, 2)


def test_gradients_are_not_replayed(device: Device) -> None:
    network = accelerated().unet
    x = torch.ones(1, 3, 8, 8, requires_grad=True)
    network(x, 3).sample.sum().backward()
    assert x.grad is not None
    assert device.captures == 0


def test_weights_that_have_moved_are_captured_anew(device: Device) -> None:
    network = accelerated().unet
    x = torch.ones(1, 3, 8, 8)
    with torch.no_grad():
        before = network(x, 3).sample
        network.network.load_state_dict({k: 2 * v for k, v in network.network.state_dict().items()}, assign=True)
        assert not torch.equal(network(x, 3).sample, before)
    assert device.captures == 2


def test_threads_share_a_replayed_network(device: Device) -> None:
    pipe = accelerated()
    lengths = [3 + number % 5 for number in range(16)]
    alone = [eager(device, pipe, num_inference_steps=steps) for steps in lengths]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda steps: images(pipe, num_inference_steps=steps), lengths))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert (device.captures, device.replays) == (1, sum(lengths))


def test_a_network_that_cannot_be_captured_says_so_once(device: Device) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    pipe, device.trouble = accelerated(), fail
    wanted = eager(device, pipe, num_inference_steps=4)
    with pytest.warns(RuntimeWarning, match="no CUDA graph of this network.*: OutOfMemoryError CUDA out of") as warned:
        assert torch.equal(images(pipe, num_inference_steps=4), wanted)
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images(pipe, num_inference_steps=4)
    assert (device.captures, device.replays) == (1, 0)


def test_restore_gives_back_the_memory_of_graphs(device: Device) -> None:
    pipe = accelerated()
    images(pipe, num_inference_steps=2)
    network, held = pipe.unet, weakref.ref(next(iter(graph._of[pipe.unet]._slots.values())))
    adapters.restore(pipe)
    gc.collect()
    assert network not in graph._of
    assert held() is None


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize(("kind", "call"), PIPELINES)
def test_a_gpu_s_graph_gives_the_same_images(kind: str, call: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = accelerated(kind, "cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        replayed = [images(pipe, num_inference_steps=20, **call) for _ in range(2)]
    assert len(graph._of[pipe.unet]._slots) == 1
    assert torch.equal(*replayed)
    monkeypatch.setattr(graph, "serves", lambda device: False)
    assert (images(pipe, num_inference_steps=20, **call) - replayed[0]).abs().max() < 1e-3
    assert (images(adapters.restore(pipe), num_inference_steps=20, **call) - replayed[0]).abs().max() < 1e-2


@pytest.mark.gpu
@on_a_gpu
def test_a_call_does_not_wait_for_the_gpu() -> None:
    """Timesteps of a pipeline lie on the host."""
    network, x = accelerated(place="cuda").unet, torch.ones(2, 3, 8, 8, device="cuda")
    with torch.no_grad():
        network(x, torch.tensor(7))
        torch.cuda.set_sync_debug_mode("error")
        try:
            results = [network(x, torch.tensor(t)).sample for t in (1, 900)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert (results[0] - results[1]).abs().max() > 0


@pytest.mark.gpu
@on_a_gpu
def test_threads_share_a_gpu_s_graph() -> None:
    """Each on a stream of its own."""
    pipe = accelerated(place="cuda")
    lengths = [3 + number % 5 for number in range(8)]
    alone = [images(pipe, num_inference_steps=steps) for steps in lengths]

    def run(steps: int) -> Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            return images(pipe, num_inference_steps=steps)

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(run, lengths))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.gpu
@on_a_gpu
def test_restore_gives_a_gpu_its_memory_back() -> None:
    """All but what libraries keep since the first time."""
    pipe, kept = pipeline("DDPMPipeline", diffusers.DDPMScheduler()).to("cuda"), []
    for _ in range(3):
        images(adapters.accelerate(pipe), num_inference_steps=2)
        adapters.restore(pipe)
        gc.collect()
        torch.cuda.empty_cache()
        kept.append(torch.cuda.memory_reserved())
    assert kept[1] == kept[2]
