"""The long tail on an NVIDIA GPU: ten thousand random cases of each op, and races looked for by repetition."""

import random

import pytest
import torch
from op_tools import BF16, CALLS, F16, F32, LAYOUTS, agree, call_of, flat, lay_out, randn
from test_gpu import check_norm, moved

import fastdiff as fd
from fastdiff.backends import load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
CASES, PARTS = 10_000, 20  # of each op, in so many tests, which can run side by side
NORMS = [((8, 64, 16, 16), 32), ((2, 8, 255, 257), 2), ((64, 32, 4, 4), 8)]
on_gpu = pytest.mark.parametrize("backend", ["native", "triton"])
in_parts = pytest.mark.parametrize("part", range(PARTS))


def random_shape(draw: random.Random) -> tuple[int, ...]:
    """Of one to four dimensions after the samples; now and then of a size that takes several blocks."""
    shape = (draw.randint(1, 5), *(draw.randint(1, 7) for _ in range(draw.randint(1, 4))))
    return (*shape[:-1], draw.choice((127, 1000, 4099))) if draw.random() < 0.1 else shape


def random_case(op: str, draw: random.Random):
    """An op with random operands, and their layout."""
    call = call_of(op, random_shape(draw), draw.randrange(2**31), draw.choice((F32, BF16, F16)))
    return call, draw.choice(LAYOUTS)


@on_gpu
@pytest.mark.parametrize("op", CALLS)
@in_parts
def test_random_cases_equal_the_reference(op: str, part: int, backend: str) -> None:
    draw = random.Random(f"{op} {part}")
    for i in range(CASES // PARTS):
        call, layout = random_case(op, draw)
        tensors = {name: lay_out(t, layout) if t.ndim > 1 else t for name, t in call.tensors.items()}
        with fd.backend("reference"):
            expected = call.run(**tensors)
        with fd.backend(backend):
            gpu = {name: lay_out(t.cuda(), layout) if t.ndim > 1 else t.cuda() for name, t in call.tensors.items()}
            found = moved(call.run)(**gpu)
        try:
            agree(call, [t.cpu() for t in flat(found)], expected)
        except AssertionError as error:
            shapes = {name: tuple(t.shape) for name, t in call.tensors.items()}
            raise AssertionError(f"case {i}, {layout}, {shapes}: {error}") from None


@on_gpu
@in_parts
def test_random_group_norms(part: int, backend: str) -> None:
    if not hasattr(load(backend)[0], "group_norm_silu"):
        pytest.skip(f"{backend} has no group norm")
    draw = random.Random(part)
    for _ in range(CASES // PARTS):
        groups, width = draw.randint(1, 6), draw.randint(1, 9)
        places = [draw.randint(2, 9) for _ in range(draw.randint(1, 3))]
        parts = "".join(each for each in "wbshr" if draw.random() < 0.5)
        settings = draw.choice((F32, BF16, F16)), draw.choice(LAYOUTS), parts, draw.choice(("silu", "none"))
        check_norm((draw.randint(1, 4), groups * width, *places), groups, backend, *settings)


@on_gpu
@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("shape", [(3, 3, 129, 257), (300, 2)], ids=str)
def test_no_race_in_250_repeats(op: str, shape: tuple[int, ...], backend: str) -> None:
    """On two streams at once, beside products of matrices that keep multiprocessors busy at other times each time."""
    call = call_of(op, shape, seed=5)
    gpu, run = {name: t.cuda() for name, t in call.tensors.items()}, moved(call.run)
    streams, busy = [torch.cuda.Stream() for _ in range(2)], torch.randn(512, 512, device="cuda")
    with fd.backend(backend):
        expected = flat(run(**gpu))
        torch.cuda.synchronize()
        for i in range(250):
            found = []
            for stream in streams:
                with torch.cuda.stream(stream):
                    for _ in range(i % 4):
                        busy = (busy @ busy).clamp(-1, 1)
                    found.append(flat(run(**gpu)))
            torch.cuda.synchronize()
            for results in found:
                assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(results, expected, strict=True))


@on_gpu
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"), [((8, 64, 16, 16), 32), ((2, 8, 255, 257), 2), ((64, 32, 4, 4), 8)], ids=str
)
def test_no_race_of_group_norms_in_250_repeats(
    shape: tuple[int, ...], groups: int, backwards: bool, backend: str
) -> None:
    if not hasattr(load(backend)[0], "group_norm_silu"):
        pytest.skip(f"{backend} has no group norm")
    x = lay_out(randn(shape, 0, BF16), "channels_last").cuda().requires_grad_(backwards)
    grad = torch.randn_like(x)

    def once() -> list[torch.Tensor]:
        y = fd.ops.group_norm_silu(x, groups)
        return [y.detach(), *(torch.autograd.grad(y, x, grad) if backwards else ())]

    with fd.backend(backend):
        expected = once()
        for _ in range(250):
            assert all(torch.equal(a, b) for a, b in zip(once(), expected, strict=True))
