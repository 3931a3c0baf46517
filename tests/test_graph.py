"""The captured loop, with a stand-in for CUDA graphs: what is captured when, what a replay does, what goes wrong."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from graph_tools import Device, stand_in
from torch import Tensor, nn

import fastdiff as fd
from fastdiff import graph
from fastdiff.errors import InputError
from fastdiff.solvers import SOLVERS

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (4, 2)
LABELS = torch.tensor([0, 1, 2, 1])


@pytest.fixture(autouse=True)
def on_the_reference() -> Iterator[None]:
    """What a tape sees: the other backends write to memory behind PyTorch's back."""
    with fd.backend("reference"):
        yield


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = stand_in(monkeypatch)
    monkeypatch.setattr("fastdiff.ops.step.check_row", lambda *_: None)  # it looks at a row on the CPU only
    return made


def network(features: int = 2, **options: Any) -> fd.MLP:
    mlp = fd.MLP(features, width=16, depth=1, **options).eval()
    for index, parameter in enumerate(mlp.parameters()):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(index))
    return mlp


def pair(model: Any, solver: str = "ddim", steps: Any = 8, **options: Any) -> tuple[fd.Sampler, fd.Sampler]:
    """The same sampler with and without graphs."""
    schedule = options.pop("schedule", None) or fd.Schedule.cosine(100)
    diffusion = fd.Diffusion(
        schedule, options.pop("prediction", "v_prediction"), options.pop("variance", "fixed_small")
    )
    captured, eager = (fd.Sampler(model, diffusion, solver, steps, graph=graph, **options) for graph in (True, False))
    return captured, eager


def same(captured: fd.Sampler, eager: fd.Sampler, shape: tuple[int, ...] = SHAPE, **call: Any) -> None:
    assert torch.equal(captured(shape, **call), eager(shape, **call))


# ---- a replay gives what the rows give ------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("guided", [False, True])
def test_every_solver(solver: str, guided: bool, device: Device) -> None:
    captured, eager = pair(network(num_classes=3), solver, guidance_scale=2.5 if guided else 1.0)
    for seed in (0, 5):
        same(captured, eager, seed=seed, y=LABELS, x=torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)))
    assert device.replays == 2 * len(captured.table)


def log_p(x: Tensor, t: Tensor) -> Tensor:
    return x.flatten(1)[:, :1] * SLOPES + 0.01 * t[:, None]


SLOPES = torch.tensor([1.0, -1.0, 0.5])
IMAGE = torch.tensor([[0.5, -0.5]]).repeat(4, 1)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "two calls": ({"guidance_scale": 2.5, "guidance": fd.guidance.ClassifierFree(batched=False)}, {}),
    "a scale per step": ({"guidance_scale": [1.0, 2.0, 3.0, 1.0, 1.0, 0.5, 4.0, 1.0]}, {}),
    "a scale per sample": ({}, {"guidance_scale": torch.tensor([1.0, 2.0, 0.0, 5.0])}),
    "an interval": ({"guidance_scale": 3.0, "guidance_interval": (0.3, 3.0)}, {}),
    "rescaled": ({"guidance_scale": 3.0, "guidance": fd.guidance.ClassifierFree(rescale=0.7)}, {}),
    "autoguidance": ({"guidance_scale": 2.0, "guidance": fd.guidance.AutoGuidance(network(num_classes=3))}, {}),
    "a classifier": ({"guidance_scale": 2.0, "guidance": fd.guidance.ClassifierGuidance(log_p, conditional=True)}, {}),
    "thresholded": ({"guidance_scale": 3.0, "threshold": 0.9, "clip": 0.5}, {}),
    "clipped": ({"clip": 0.5}, {}),
    "an image": ({"strength": 0.5}, {"image": IMAGE}),
    "inpainting": ({}, {"image": IMAGE, "keep": torch.tensor([True, False])}),
    "resampled": ({"resample": (2, 3)}, {"image": IMAGE, "keep": torch.tensor([True, False])}),
    "seeds and ids": ({}, {"seed": [1, 2, 3, 4], "sample": [9, 8, 7, 6]}),
    "minimal": ({"final": "minimal"}, {}),
    "float64": ({"dtype": torch.float64}, {}),
    "edm": ({"schedule": fd.Schedule.edm(100), "prediction": "sample"}, {}),
    "flow": ({"schedule": fd.Schedule.flow(100), "prediction": "flow_prediction"}, {}),
}


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
@pytest.mark.parametrize("case", CASES)
def test_every_option(case: str, solver: str, device: Device) -> None:
    options, call = CASES[case]
    captured, eager = pair(network(num_classes=3), solver, **options)
    for seed in (0, 5):
        same(captured, eager, **{"seed": seed, **call}, y=LABELS)
    assert device.replays == 2 * len(captured.table)


def learned(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat((0.25 * x + 0.1, x.sin()), 1)


@pytest.mark.parametrize("options", [{}, {"threshold": 0.9, "clip": 0.5}], ids=["plain", "thresholded"])
def test_learned_variances(options: dict[str, Any], device: Device) -> None:
    same(*pair(learned, "ddpm", variance="learned_range", **options))
    assert device.replays == 8


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 3, 4, 4, 2)], ids=str)
def test_the_memory_format_is_kept(shape: tuple[int, ...], device: Device) -> None:
    captured, eager = pair(lambda x, t: 0.25 * x, "dpmpp_2m")
    form = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x = torch.randn(shape).to(memory_format=form)
    result = captured(shape, x=x)
    assert result.is_contiguous(memory_format=form)
    assert torch.equal(result, eager(shape, x=x))


@pytest.mark.parametrize("what", ["x", "x0"])
def test_states_are_recorded_and_iterated(what: str, device: Device) -> None:
    captured, eager = pair(network(), "ddpm")
    records = [fd.Recorder(every=3, what=what), fd.Recorder(every=3, what=what)]
    for sampler, record in zip((captured, eager), records, strict=True):
        sampler(SHAPE, seed=3, record=record)
    assert records[0].steps == records[1].steps == [2, 5]
    assert torch.equal(records[0].values, records[1].values)
    states = [list(sampler.iterate(SHAPE, seed=3)) for sampler in (captured, eager)]
    for one, other in zip(*states, strict=True):
        assert one.step == other.step
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.x0, other.x0)


def test_the_result_is_the_caller_s(device: Device) -> None:
    captured, _ = pair(network())
    first = captured(SHAPE, seed=1)
    kept = first.clone()
    second = captured(SHAPE, seed=2)
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)
    second.zero_()
    assert torch.equal(captured(SHAPE, seed=1), kept)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_caller_s_gradient_mode_does_not_matter(mode: Any, device: Device) -> None:
    captured, eager = pair(network(), "ddpm")
    with mode():
        first = captured(SHAPE, seed=1)
    assert torch.equal(first, captured(SHAPE, seed=1))
    assert torch.equal(first, eager(SHAPE, seed=1))


# ---- what needs a capture, and what does not ------------------------------------------------


def test_numbers_need_no_new_capture(device: Device) -> None:
    """Another seed, scale, number of steps, schedule, spacing, solver of as many vectors, or sampler at all."""
    model = network(num_classes=3)
    call = {"y": LABELS}
    pair(model, "ddpm", guidance_scale=2.0)[0](SHAPE, **call)
    captures = device.captures
    for solver, options in {
        "ddpm": {"guidance_scale": 7.5},
        "euler_a": {"steps": 13, "guidance_scale": 2.0},
        "ddim": {"eta": 1.0, "steps": 100, "guidance_scale": 1.5},
        "euler": {"schedule": fd.Schedule.linear(77), "spacing": "leading", "guidance_scale": 3.0},
        "lcm": {"clip": 0.7, "guidance_scale": 0.5},
    }.items():
        captured, eager = pair(model, solver, **options)
        noisy = bool((captured.table.rows.s != 0).any())
        for seed in (3, 4):
            same(captured, eager, seed=seed, sample=[7, 8, 9, 5], **call)
        captures += not noisy and solver == "euler"  # the first without noise
        assert device.captures == captures, solver


def test_a_table_of_more_rows_than_there_is_room_for(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "LEAST_ROWS", 8)
    model = network()
    for steps, captures in ((5, 1), (8, 1), (9, 2), (16, 2), (3, 2)):
        same(*pair(model, "ddpm", steps))
        assert device.captures == captures


def model_of_two(x: Tensor, t: Tensor, a: Any = None, b: Any = None) -> Tensor:
    return 0.25 * x if a is None else 0.25 * x + 0.01 * (a.reshape(-1, 1) if isinstance(a, Tensor) else a)


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a batch": ({}, {"shape": (5, 2)}),
    "a shape": ({}, {"shape": (4, 3)}),
    "a condition": ({}, {"a": torch.ones(4)}),
    "an image that is kept": ({}, {"image": IMAGE, "keep": torch.tensor([True, False])}),
    "a scale per sample": ({"guidance_scale": 2.0}, {"a": torch.ones(4), "uncond": {"a": 0}}),
    "float64": ({"dtype": torch.float64}, {}),
    "history": ({"solver": "dpmpp_2m"}, {}),
    "an anchor": ({"solver": "heun"}, {}),
    "noise": ({"solver": "ddpm"}, {}),
    "a threshold": ({"threshold": 0.9, "clip": 1.0}, {}),
    "whole times": ({"schedule": fd.Schedule.edm(100), "prediction": "sample"}, {}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_shape_class_is_captured_for_itself(other: str, device: Device) -> None:
    options, call = OTHERS[other]
    call = {"shape": SHAPE, **call}
    same(*pair(model_of_two))
    assert device.captures == 1
    for _ in range(2):
        same(*pair(model_of_two, **options), **call)
        assert device.captures == 2
    same(*pair(model_of_two))
    assert device.captures == 2


@pytest.mark.parametrize(
    ("one", "another"),
    [
        ({"a": torch.ones(4)}, {"a": torch.ones(4, 1)}),
        ({"a": torch.ones(4)}, {"a": torch.ones(4, dtype=torch.float64)}),
        ({"a": torch.ones(4)}, {"b": torch.ones(4)}),
        ({"a": 1.0}, {"a": 2.0}),
        ({"a": torch.ones(8)[::2]}, {"a": torch.ones(4)}),
        ({"b": [torch.ones(4)]}, {"b": (torch.ones(4),)}),
        ({"b": {"c": torch.ones(4)}}, {"b": {"d": torch.ones(4)}}),
    ],
    ids=["shape", "dtype", "name", "number", "strides", "kind", "structure"],
)
def test_conditions_of_another_structure(one: dict[str, Any], another: dict[str, Any], device: Device) -> None:
    captured, eager = pair(model_of_two)
    for captures, cond in enumerate((one, another), 1):
        for _ in range(2):
            same(captured, eager, **cond)
            assert device.captures == captures


def test_a_condition_of_the_same_structure_brings_its_values(device: Device) -> None:
    captured, eager = pair(model_of_two)
    results = []
    for value in (1.0, 2.0):
        same(captured, eager, a=torch.full((4,), value))
        results.append(captured(SHAPE, a=torch.full((4,), value)))
    assert device.captures == 1
    assert not torch.equal(*results)


def test_backend_and_autocast_are_told_apart(device: Device) -> None:
    captured, _ = pair(network())
    device.taped = False
    captured(SHAPE)
    with fd.backend("native"):
        captured(SHAPE)
    assert device.captures == 2
    with torch.autocast("cpu", torch.bfloat16):
        captured(SHAPE)
    assert device.captures == 3
    with torch.autocast("cpu", torch.float16):
        captured(SHAPE)
    assert device.captures == 4


def test_on_every_backend(each_backend: str, device: Device) -> None:
    captured, eager = pair(network(num_classes=3), "dpmpp_2m_sde", guidance_scale=2.0)
    device.taped = False
    for seed in (0, 5):
        same(captured, eager, seed=seed, y=LABELS)
    assert device.replays == 2 * len(captured.table)


# ---- weights --------------------------------------------------------------------------------


def test_weights_that_change_in_place_are_seen(device: Device) -> None:
    model = network()
    captured, eager = pair(model)
    before = captured(SHAPE, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    same(captured, eager, seed=1)
    assert not torch.equal(before, captured(SHAPE, seed=1))
    assert device.captures == 1


def test_weights_in_another_place_are_captured_anew(device: Device) -> None:
    model = network()
    captured, eager = pair(model)
    same(captured, eager)
    model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()}, assign=True)
    same(captured, eager)
    assert device.captures == 2


def test_weights_of_a_guide_are_weights_too(device: Device) -> None:
    weak = network(num_classes=3)
    captured, eager = pair(network(num_classes=3), guidance_scale=2.0, guidance=fd.guidance.AutoGuidance(weak))
    same(captured, eager, y=LABELS)
    with torch.no_grad():
        for parameter in weak.parameters():
            parameter.mul_(1.5)
    same(captured, eager, y=LABELS)
    assert device.captures == 1
    weak.load_state_dict({name: 2 * value for name, value in weak.state_dict().items()}, assign=True)
    same(captured, eager, y=LABELS)
    assert device.captures == 2


def test_training_mode_is_told_apart(device: Device) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    model.forward = lambda x, t: nn.Sequential.forward(model, x)  # type: ignore[method-assign]
    captured, eager = pair(model.eval())
    same(captured, eager)
    model.train()
    captured(SHAPE)
    assert device.captures == 2
    model.eval()
    same(captured, eager)
    assert device.captures == 2


def test_the_prepared_form_of_a_unet_follows_its_weights(device: Device) -> None:
    unet = fd.UNet(8, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(4,)).eval()
    captured, eager = pair(unet, steps=3)
    device.taped = False  # oneDNN's operations take what no tape can
    for factor in (1.0, 1.3):
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.mul_(factor)
        same(captured, eager, (2, 3, 8, 8))
    assert device.captures == 1


# ---- memory ---------------------------------------------------------------------------------


def test_the_result_of_a_function_is_the_caller_s(device: Device) -> None:
    model = network(num_classes=3)
    given = [(torch.full(SHAPE, value), torch.tensor(value), LABELS) for value in (0.5, 1.5)]

    def asked(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = model(x, t.expand(len(x)), y=y)
        return out

    with torch.no_grad():
        results = [graph.replayed(model, asked, values) for values in given]
        assert all(torch.equal(result, asked(*values)) for result, values in zip(results, given, strict=True))
    assert (device.captures, device.replays) == (1, 2)
    assert not torch.equal(*results)


def slots(model: Any) -> Any:
    return graph._of[model]._slots


def test_a_network_keeps_so_many_classes(device: Device) -> None:
    model = network()
    captured, eager = pair(model)
    for n in range(1, graph.BOUND + 3):
        same(captured, eager, (n, 2))
    assert len(slots(model)) == graph.BOUND
    captures = device.captures
    same(captured, eager, (graph.BOUND + 2, 2))  # still there
    same(captured, eager, (3, 2))  # the oldest that is; now the youngest
    assert device.captures == captures
    same(captured, eager, (1, 2))  # gone, and puts out (4, 2)
    same(captured, eager, (3, 2))
    assert device.captures == captures + 1
    same(captured, eager, (4, 2))
    assert device.captures == captures + 2


def test_teardown_forgets(device: Device) -> None:
    model = network()
    captured, eager = pair(model)
    same(captured, eager)
    held = weakref.ref(next(iter(slots(model).values()))._kept)
    captured.teardown()
    gc.collect()
    assert held() is None
    assert model not in graph._of
    same(captured, eager)
    assert device.captures == 2
    captured.teardown()
    captured.teardown()  # of nothing


def test_a_run_under_way_outlives_teardown_and_eviction(device: Device) -> None:
    captured, eager = pair(network(), "ddpm")
    states = captured.iterate(SHAPE, seed=3)
    next(states)
    captured.teardown()
    *_, last = states
    assert torch.equal(last.x, eager(SHAPE, seed=3))


def test_a_network_that_is_gone_takes_its_graphs_along(device: Device) -> None:
    model = network()
    captured, _ = pair(model)
    captured(SHAPE)
    gone = weakref.ref(model)
    del model, captured, _
    gc.collect()
    assert gone() is None


def test_nothing_is_made_between_rows(device: Device) -> None:
    """The rows of a run in the CPU's allocator: none of them makes a tensor of the state's size."""
    eager = pair(lambda x, t: out, "dpmpp_2m", 50)[1]
    out = torch.zeros(1000, 64)
    with fd.backend("native"), torch.profiler.profile(profile_memory=True) as profile:
        eager((1000, 64))
    size = 1000 * 64 * 4
    made = [event for event in profile.events() if event.name == "[memory]" and event.cpu_memory_usage >= size]
    assert len(made) <= 6, "the start, the state, the history, the result"


# ---- threads and pauses ---------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m"])
def test_threads_share_a_sampler(solver: str, device: Device) -> None:
    captured, eager = pair(network(), solver)
    alone = [eager(SHAPE, seed=seed) for seed in range(32)]
    device.taped = False
    with ThreadPoolExecutor(32) as pool:

        def run(seed: int) -> Tensor:
            with fd.backend("reference"):
                return captured(SHAPE, seed=seed)

        shared = list(pool.map(run, range(32)))
    assert all(torch.equal(one, other) for one, other in zip(alone, shared, strict=True))
    assert device.replays == 32 * len(captured.table)


def test_a_paused_run_keeps_nobody_waiting(device: Device) -> None:
    captured, eager = pair(network(), "ddpm")
    paused = captured.iterate(SHAPE, seed=1)
    first = next(paused)
    same(captured, eager, seed=2)
    threads = [threading.Thread(target=captured, args=(SHAPE,)) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
    rest = list(paused)
    for state, expected in zip([first, *rest], eager.iterate(SHAPE, seed=1), strict=True):
        assert torch.equal(state.x, expected.x)


def test_a_sampler_called_by_its_own_callback(device: Device) -> None:
    captured, eager = pair(network(), "ddpm")
    inner: list[Tensor] = []
    outer = captured(SHAPE, seed=1, callback=lambda state: inner.append(captured(SHAPE, seed=state.step)))
    assert torch.equal(outer, eager(SHAPE, seed=1))
    assert all(torch.equal(x, eager(SHAPE, seed=step)) for step, x in enumerate(inner))


def test_a_run_left_early_leaves_the_next_one_its_place(device: Device) -> None:
    captured, eager = pair(network(), "ddpm")
    for state in captured.iterate(SHAPE, seed=1):
        if state.step == 2:
            break
    del state
    gc.collect()
    same(captured, eager, seed=2)
    with pytest.raises(KeyError):
        captured(SHAPE, callback=lambda state: {}[state.step])
    same(captured, eager, seed=2)
    assert device.captures == 1 + 1  # with and without x0


# ---- what cannot be captured ----------------------------------------------------------------


class Reader(nn.Module):
    """Networks that a graph cannot hold, each in its way, and their results otherwise."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.times = way, 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out = 0.25 * x
        self.times += 1
        if self.way == "item":
            return out * (1 + 0 * float(x.sum()))
        if self.way == "branch":
            return out if (x.abs() < 1e6).all() else -out
        if self.way == "nonzero":
            return out + 0 * len(x.nonzero())
        if self.way == "times" and self.times == 3:
            raise RuntimeError("only once")
        return out


@pytest.mark.parametrize("way", ["item", "branch", "nonzero", "times"])
def test_a_network_that_cannot_be_captured(way: str, device: Device) -> None:
    captured, _ = pair(Reader(way), "ddpm")
    expected = pair(Reader(""), "ddpm")[1](SHAPE)
    with pytest.warns(RuntimeWarning, match="no CUDA graph of this loop, it runs row by row") as warned:
        assert torch.equal(captured(SHAPE), expected)
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(captured(SHAPE), expected)  # and is not tried again
    assert (device.captures, device.replays) == (1, 0)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: operation not permitted when stream is capturing"),
        torch.OutOfMemoryError("CUDA out of memory"),
        NotImplementedError("no such kernel"),
        ValueError("\n"),
        AssertionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_capture_that_fails(error: Exception, device: Device) -> None:
    def fail() -> None:
        raise error

    device.trouble = fail
    captured, eager = pair(network(), "ddpm")
    with pytest.warns(RuntimeWarning, match=f"row by row: {type(error).__name__}"):
        same(captured, eager)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(captured, eager)


def test_an_interrupted_capture_is_no_failure(device: Device) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    device.trouble = interrupt
    captured, eager = pair(network())
    with pytest.raises(KeyboardInterrupt):
        captured(SHAPE)
    device.trouble = None
    same(captured, eager)
    assert device.replays == len(captured.table)


@pytest.mark.parametrize("cond", [{"a": torch.ones(4), "b": {1, 2}}, {"b": [["text", {3}]]}], ids=["set", "nested"])
def test_conditions_that_cannot_be_compared_run_row_by_row(cond: dict[str, Any], device: Device) -> None:
    same(*pair(model_of_two), **cond)
    assert device.captures == 0


class Slotted:
    """A model without weak references."""

    __slots__ = ()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.25 * x


def test_a_model_that_cannot_be_held_weakly_runs_row_by_row(device: Device) -> None:
    same(*pair(Slotted()))
    assert device.captures == 0


def test_bad_input_is_no_failed_capture(device: Device) -> None:
    def wrong(x: Tensor, t: Tensor) -> Tensor:
        return x[:, :1] if device.trouble else 0.25 * x

    device.trouble = lambda: None
    captured, eager = pair(wrong)
    with pytest.raises(InputError, match="must be"):
        captured(SHAPE)
    device.trouble = None
    same(captured, eager)
    assert device.replays == len(captured.table)


def test_no_graph_means_none(device: Device) -> None:
    pair(network())[1](SHAPE)
    assert device.captures == 0


def test_nothing_is_captured_on_the_cpu() -> None:
    assert not graph.serves(torch.device("cpu"))
    assert graph.serves(torch.device("cuda"))
