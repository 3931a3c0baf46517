"""Proves the Triton kernels without a GPU: their values in the interpreter, their machine code by compiling them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdiff.noise import Address
from fastdiff.ops.row import make_table

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

from fastdiff.ops.triton import bodies, kernels, norm, norm_bodies  # noqa: E402

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KERNELS = {
    kernels: ("normal", "add_noise", "guide", "affine_step", "loss_sums", "mean"),
    norm: ("normalise", "chunk_moments", "join_moments", "normalise_chunk"),
}
KERNELS[norm] += ("gradient", "chunk_sums", "join_sums", "gradient_chunk")
N, C, SIDE = 4, 3, 32


@pytest.mark.skipif(TRITON < (3, 9), reason="the interpreter of this Triton rounds an fma twice")
@pytest.mark.parametrize(
    ("name", "which"),
    [
        ("triton_interpreted.py", "not slow"),
        ("triton_norm_interpreted.py", "not slow"),
        pytest.param("triton_norm_interpreted.py", "slow", marks=pytest.mark.slow),
    ],
)
def test_values_in_the_interpreter(name, which):
    path = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", "-q", "-m", which, "-p", "no:cacheprovider", str(path)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=path.parents[1])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


# ---- machine code ---------------------------------------------------------------------------


class Device:
    """What Triton asks of a GPU in order to compile for it."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)


class Recorder:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel, compiled):
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            assert options["enable_fp_fusion"] is False
            self.compiled.append(self.kernel.warmup(*arguments, grid=grid, **options))

        return launch


@pytest.fixture(params=[80, 90, 100])
def compiled(request, monkeypatch, tmp_path):
    """What the bodies launch, compiled for an architecture."""
    if bodies.INTERPRETED:
        pytest.skip("TRITON_INTERPRET is set")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", Device(request.param))
    found = []
    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), found))
    return found


def arch_of(compiled):
    return compiled[0].metadata.target.arch


def inspect(kernel, folder):
    """Registers, bytes of stack, bytes of shared memory, and the instructions of a kernel."""
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    usage, code = (
        subprocess.run([TOOLS / "cuobjdump", option, path], capture_output=True, text=True, check=True)
        for option in ("-res-usage", "-sass")
    )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr).groups()
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", code.stdout, re.M)
    return int(registers), int(stack), kernel.metadata.shared, instructions


def tensor(channels=C, dtype=torch.float32, memory_format=torch.contiguous_format):
    return torch.zeros(N, channels, SIDE, SIDE, dtype=dtype).to(memory_format=memory_format)


def step(output, *, uncond=None, history=(), anchor=None, noise=None, results=()):
    row = torch.tensor(1)
    results = (tensor(), *results, *(None,) * (4 - len(results)))
    bodies.affine_step(tensor(), output, make_table(5).float(), row, uncond, history, anchor, noise, results)


ADDRESS = Address(5, torch.tensor(3), None, 0)
BF16 = torch.bfloat16
LAST = {"memory_format": torch.channels_last}
ONES, THREE = torch.ones(N), (torch.ones(N),) * 3


def everything():
    vectors = [tensor() for _ in range(4)]
    given = {"uncond": tensor(2 * C), "history": tuple(vectors[:3]), "anchor": tensor(), "noise": ADDRESS}
    step(tensor(2 * C), **given, results=vectors)


def loss(channels, bound=None, kept=True):
    residual, slope = tensor() if kept else None, tensor() if kept and bound is not None else None
    bodies.diffusion_loss(tensor(channels), tensor(), *THREE, bound, ADDRESS, ONES, residual, slope)


# For each launch: what it does, its 128-bit loads and stores, and its bytes of shared memory at most.
LAUNCHES = {
    "guided step": (lambda: step(tensor(), uncond=tensor(), results=(tensor(),)), 3, 2, 0),
    "stochastic step": (lambda: step(tensor(), noise=ADDRESS), 2, 1, 0),
    "second-order step": (lambda: step(tensor(), history=(tensor(),), results=(None, tensor())), 3, 2, 0),
    "learned step": (lambda: step(tensor(2 * C), noise=ADDRESS, results=(tensor(),)), 3, 2, 0),
    "bf16 output": (lambda: step(tensor(dtype=BF16), uncond=tensor(dtype=BF16), noise=ADDRESS), 1, 1, 0),
    "next input": (lambda: step(tensor(), results=(None, None, None, tensor(C, BF16, **LAST))), 2, 1, 4096),
    "everything": (everything, 8, 5, 0),
    "add_noise drawn": (lambda: bodies.add_noise(tensor(), ONES, ONES, ADDRESS, tensor()), 1, 1, 0),
    "add_noise given": (lambda: bodies.add_noise(tensor(), ONES, 0.5, tensor(), tensor()), 2, 1, 0),
    "guide": (lambda: bodies.guide(tensor(), tensor(), 2.0, tensor()), 2, 1, 0),
    "guide channels-last": (lambda: bodies.guide(tensor(**LAST), tensor(**LAST), 2.0, tensor(**LAST)), 2, 1, 0),
    "guide strided": (lambda: bodies.guide(*(torch.zeros(7, 6)[:, ::2],) * 2, 2.0, torch.zeros(7, 3)), 0, 0, 4096),
    "loss": (lambda: loss(C), 2, 1, 64),
    "loss alone": (lambda: loss(C, kept=False), 2, 0, 64),
    "loss of half the output": (lambda: loss(2 * C), 2, 1, 64),
    "hybrid loss": (lambda: loss(2 * C, torch.ones(N, 8)), 3, 2, 64),
    "hybrid loss alone": (lambda: loss(2 * C, torch.ones(N, 8), kept=False), 3, 0, 64),
    "normal": (lambda: bodies.normal(tensor(), ADDRESS), 0, 1, 0),
    "normal of one element": (lambda: bodies.normal(torch.zeros(3, 1), ADDRESS), 0, 0, 0),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_machine_code(name, compiled, tmp_path):
    launch, loads, stores, shared = LAUNCHES[name]
    launch()
    assert compiled
    registers, stack, used, instructions = inspect(compiled[0], tmp_path)
    print(f"{name}: {registers} registers, {len(instructions)} instructions")
    assert registers <= 64
    assert stack == 0
    assert used <= shared
    assert not any(i.startswith(("LDL", "STL")) for i in instructions), "spilled registers"
    assert instructions.count("LDG.E.128") == loads
    assert instructions.count("STG.E.128") == stores
    ptx = compiled[0].asm["ptx"]
    assert not re.search(r"\.ftz|\.approx", ptx), "arithmetic that other backends do not have"
    # The ptxas of older Tritons fuses packed products and sums on Blackwell whatever it is told.
    if name.startswith(("guide", "add_noise given", "second-order")) and (TRITON >= (3, 9) or arch_of(compiled) < 100):
        assert not any(i.startswith("FFMA") for i in instructions), "a product and a sum that round as one"


# ---- group norm -----------------------------------------------------------------------------

SIZES = [(128, 32), (384, 32), (256, 16), (512, 16), (256, 8), (512, 8), (256, 4)]  # channels and side, as in DDPM
LARGE = [(128, 32), (256, 8), (128, 64), (384, 128)]


def often(sizes):
    """All of them, but those after the first only with the slow tests."""
    return [pytest.param(*size, marks=[pytest.mark.slow] * (i > 0)) for i, size in enumerate(sizes)]


def images(channels, side, dtype, layout):
    return torch.zeros(N, channels, side, side, dtype=dtype).to(memory_format=layout)


def norm_forward(x, scale=None, shift=None, residual=None):
    channels, moments = x.shape[1], torch.zeros(N, 32, 2)
    weight = torch.zeros(channels)
    norm_bodies.group_norm_silu(x, 32, weight, weight, 1e-5, scale, shift, residual, True, x, residual, moments)


def norm_backward(x, scale=None, shift=None, more=None):
    channels, moments = x.shape[1], torch.zeros(N, 32, 2)
    weight, sums = torch.zeros(channels), torch.zeros(N, channels, 2)
    norm_bodies.group_norm_silu_backward(x, x, moments, 32, weight, weight, scale, shift, True, more, x, sums)


def with_everything(run, x):
    run(x, *torch.zeros(N, 2 * x.shape[1]).chunk(2, 1), x)


def assert_in_registers(kernel, tmp_path, most=128, spilled=0):
    registers, stack, _, instructions = inspect(kernel, tmp_path)
    print(f"{registers} registers, {len(instructions)} instructions")
    assert registers <= most
    assert stack <= spilled
    assert spilled or not any(i.startswith(("LDL", "STL")) for i in instructions), "spilled registers"
    assert not re.search(r"\.ftz|\.approx", kernel.asm["ptx"]), "arithmetic that other backends do not have"
    return instructions


@pytest.mark.parametrize("run", [norm_forward, norm_backward])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(("channels", "side"), often(SIZES))
def test_machine_code_of_the_group_norm(run, dtype, channels, side, compiled, tmp_path):
    run(images(channels, side, dtype, torch.channels_last))
    assert len(compiled) == 1, "the tile does not stay in registers"
    instructions = assert_in_registers(compiled[0], tmp_path)
    # Twelve channels to a group are 24 bytes, of which a program of a backward tile at this size has one group.
    wide = "64" if run is norm_backward and dtype == BF16 and (channels, side) == (384, 32) else "128"
    assert instructions.count(f"STG.E.{wide}") > 0
    assert instructions.count(f"LDG.E.{wide}") >= instructions.count(f"STG.E.{wide}")
    assert all(i in ("STG.E", f"STG.E.{wide}") for i in instructions if i.startswith("STG")), "narrow stores"


@pytest.mark.parametrize("run", [norm_forward, norm_backward])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("channels", "side"), often(LARGE))
def test_machine_code_of_a_group_norm_with_everything(run, layout, channels, side, compiled, tmp_path):
    with_everything(run, images(channels, side, BF16, layout))
    assert len(compiled) in (1, 3)
    for kernel in compiled:
        # The largest forward tile, of 512 threads: with all its parts it spills six numbers on Blackwell.
        largest = run is norm_forward and (channels, side) == (128, 64) and arch_of(compiled) == 100
        assert_in_registers(kernel, tmp_path, 168, 24 if largest else 0)


def test_numbers_compile_once(compiled):
    """Seeds, steps and rows are not compiled in."""
    for number in (0, 1, 16, 12345):
        results = (tensor(), *(None,) * 4)
        address = Address(number, number, None, number % 8)
        bodies.affine_step(tensor(), tensor(), make_table(20000).float(), number, None, (), None, address, results)
    assert len(compiled) == 4
    assert len({kernel.hash for kernel in compiled}) == 1


@pytest.mark.skipif(bodies.INTERPRETED, reason="the interpreter runs on the CPU")
def test_what_it_refuses():
    assert not bodies.refuses("guide", "cuda", torch.float32)
    assert bodies.refuses("guide", "cuda", torch.float64) == "computes in float32, not in float64"
    assert "TRITON_INTERPRET=1" in bodies.refuses("guide", "cpu", torch.float32)


def test_a_missing_triton_is_named():
    code = "import sys; sys.modules['triton'] = None\nimport fastdiff as fd\nprint(fd.backends.load('triton')[1])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "triton is missing" in done.stdout
