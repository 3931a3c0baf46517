"""Proves the build: without a compiler the package stands and says why, and the CUDA kernels are what they should be
(no spills, registers that leave the machine busy, sixteen-byte accesses) on each architecture, without a GPU."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
MAX_REGISTERS = 64  # four blocks of 256 threads on a multiprocessor


def build(folder, **environment):
    """Build the extension of a copy of the sources in place; what the build says of itself, or None."""
    for name in ("csrc", "fastdiff"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build.txt"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, env={**os.environ, **environment}, check=True, capture_output=True)
    report = folder / "fastdiff" / "_build.txt"
    return report.read_text() if report.exists() else None


def ask(folder, code):
    """What a fresh interpreter prints that imports the package of a folder, whatever is installed."""
    path = (
        "import sys; sys.path.insert(0, '.'); sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]"
    )
    command = [sys.executable, "-c", f"{path}; {code}"]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def test_without_a_compiler_the_package_works_and_says_why(tmp_path):
    no_cuda = {"PATH": os.path.dirname(sys.executable), "CUDA_HOME": str(tmp_path)}
    report = build(tmp_path, CC="no-such-compiler", CXX="no-such-compiler", **no_cuda)
    assert "no compiled extension: " in report
    assert "no-such-compiler" in report
    assert not list((tmp_path / "fastdiff").glob("_C*.so"))
    said = ask(tmp_path, "import fastdiff as fd; print(fd.explain()); print(fd.noise.normal((1, 2), seed=0).shape)")
    assert "add_noise        reference" in said
    assert "no-such-compiler" in said
    assert "torch.Size([1, 2])" in said
    assert "no-such-compiler" in ask(tmp_path, "from fastdiff.cli import main; sys.argv = ['fastdiff', 'info']; main()")


# ---- CUDA kernels ---------------------------------------------------------------------------


def triton_tool(name):
    triton = pytest.importorskip("triton")
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def compiled(name, architecture, folder):
    """The machine code of every kernel of a file: name to (registers, stack, instructions)."""
    cubin, source = folder / f"{name}.cubin", ROOT / "csrc" / "cuda" / f"{name}.cu"
    command = [NVCC, "-O3", "-std=c++17", "--fmad=false", f"-arch=sm_{architecture}", "-cubin", source, "-o", cubin]
    subprocess.run(command, check=True, capture_output=True)
    used = subprocess.run([triton_tool("cuobjdump"), "-res-usage", cubin], check=True, capture_output=True, text=True)
    code = subprocess.run([triton_tool("cuobjdump"), "-sass", cubin], check=True, capture_output=True, text=True)
    resources = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", used.stdout)
    bodies = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)", code.stdout, re.S))
    return {kernel: (int(registers), int(stack), bodies[kernel]) for kernel, registers, stack in resources}


@pytest.fixture(scope="module", params=["80", "90", "100"])
def kernels(request, tmp_path_factory):
    return compiled("step", request.param, tmp_path_factory.mktemp("cubin"))


def spills(stack, body):
    return stack > 0 or re.search(r"\b(STL|LDL)\b", body)


@needs_nvcc
def test_kernels_neither_spill_nor_crowd(kernels):
    assert len(kernels) >= 17
    for name, (registers, stack, body) in kernels.items():
        strided = "Lb0EEE" in name  # an element at a time, which memory does not bound
        assert registers <= (80 if strided else MAX_REGISTERS), name
        assert not spills(stack, body), name


@needs_nvcc
@pytest.mark.parametrize("kernel", ["affine_step", "add_noise", "guide", "loss", "normal"])
def test_flat_kernels_move_sixteen_bytes_at_a_time(kernels, kernel):
    flat = {
        name: body for name, (_, _, body) in kernels.items() if re.search(rf"{kernel}_kernelI(Lb[01]E)*Lb1EE", name)
    }
    assert flat, "no flat kernel of that name"
    for name, body in flat.items():
        stores, loads = body.count("STG.E.EF.128"), body.count("LDG.E.128")
        assert stores >= (2 if kernel == "loss" else 1), name  # the residual and the slope
        assert loads >= 1 or kernel == "normal", name


@needs_nvcc
def test_products_and_sums_are_fused_only_where_the_source_says_so(kernels):
    """Guidance has none; its sums and products must stay apart for every backend to give the same bits."""
    guide = [body for name, (_, _, body) in kernels.items() if "guide_kernelILb1E" in name]
    assert len(guide) == 1
    assert "FFMA" not in guide[0]
    assert "FMUL" in guide[0]


@pytest.fixture(scope="module", params=["80", "90", "100"])
def norms(request, tmp_path_factory):
    """The kernels of the group norm, and whether the architecture has clusters."""
    made = compiled("norm", request.param, tmp_path_factory.mktemp("cubin"))
    return made, int(request.param) >= 90


@needs_nvcc
def test_norms_neither_spill_nor_crowd(norms):
    """Three blocks of 256 threads on a multiprocessor, or two where the gradient is made."""
    kernels, clusters = norms
    assert len(kernels) == 16
    for name, (registers, stack, body) in kernels.items():
        assert registers <= (80 if "forward" in name else 128), name
        assert not spills(stack, body), name
        assert ("UCGABAR" in body) == clusters, name


@needs_nvcc
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_norms_move_sixteen_bytes_at_a_time(norms, kernel):
    """Between device memory, shared memory and registers."""
    vectors = {name: body for name, (*_, body) in norms[0].items() if re.search(f"{kernel}_kernelI.*Vector", name)}
    assert len(vectors) == 6
    for name, body in vectors.items():
        for move, least in (("LDG.E.128", 6), ("STG.E.128", 2), ("LDS.128", 4), ("STS.128", 3)):
            assert body.count(move) >= least, (name, move)
        assert "STG.E.U16" not in body, name
