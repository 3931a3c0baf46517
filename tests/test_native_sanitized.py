"""Proves that the kernels touch no memory but their own and do nothing undefined: ASan and UBSan over the op tests.

And that they share no state behind the scenes: TSan over eight threads that call them at once. The sanitizers are
themselves proven, by bugs planted in calls of the kernels that must each be reported.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLAGS = ["-O1", "-g", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC"]
SANITIZE = ["-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
RACES = ["-pthread", "-fsanitize=thread"]  # without OpenMP, whose library TSan does not see into
OPS = ("edges", "results", "step", "forward", "norm")
TESTS = (*(f"test_ops_{name}.py" for name in OPS), "test_native.py")
# What measures memory or time, and what starts a process of its own.
WITHOUT = "not memory_behind and not python_goes_on and not hostile and not as_many_threads and not allocates_nothing"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="needs g++ on Linux"),
]


def run(command, **more):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **more)


def build(*arguments, sanitize=SANITIZE):
    done = run(["g++", *FLAGS, *sanitize, *arguments])
    assert done.returncode == 0, done.stderr[-3000:]


def objects(folder, *names):
    """Object files of sources of csrc."""
    includes = run([sys.executable, "-m", "pybind11", "--includes"]).stdout.split()
    made = []
    for name in names:
        made.append(folder / f"{Path(name).stem}.o")
        build("-fvisibility=hidden", "-c", *includes, ROOT / "csrc" / name, "-o", made[-1])
    return made


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    made = objects(folder, "cpu/baseline.cpp")
    build("-I", ROOT / "csrc", ROOT / "tests/native/planted.cpp", *made, "-o", folder / "planted")
    return folder / "planted"


PLANTED = {
    "none": "",
    "read": "heap-buffer-overflow",
    "write": "heap-buffer-overflow",
    "overflow": "signed integer overflow",
    "misaligned": "misaligned address",
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_reported(planted, bug):
    done = run([planted, bug])
    assert (done.returncode == 0) == (bug == "none"), done.stderr
    assert PLANTED[bug] in done.stderr
    if bug in ("read", "write"):
        assert f"{bug.upper()} of size" in done.stderr


@pytest.fixture(scope="module")
def threads(tmp_path_factory):
    """The command that calls the kernels from eight threads; TSan needs its addresses where it looks for them."""
    program = tmp_path_factory.mktemp("threads") / "threads"
    sources = ROOT / "tests/native/threads.cpp", ROOT / "csrc/cpu/baseline.cpp"
    build("-I", ROOT / "csrc", *sources, "-o", program, sanitize=RACES)
    fixed = ["setarch", "-R"]
    return [*fixed, program] if shutil.which(fixed[0]) and run([*fixed, "true"]).returncode == 0 else [program]


def test_a_planted_race_is_reported(threads):
    done = run([*threads, "race", 100])
    assert done.returncode != 0
    assert "data race" in done.stderr
    assert "csrc/cpu/" in done.stderr


def test_threads_share_nothing_but_what_they_read(threads):
    done = run([*threads, "none", 100_000])
    assert done.returncode == 0, done.stderr[-5000:] or "other results than those of one thread"
    assert not done.stderr


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """A folder with the package and its tests, in which the extension is built with sanitizers."""
    folder = tmp_path_factory.mktemp("sanitized")
    skip = shutil.ignore_patterns("*.so", "__pycache__", "cuda")
    for part in ("fastdiff", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", folder)
    made = objects(folder, "cpu/baseline.cpp", "cpu/avx2.cpp", "cpu/avx512.cpp", "bindings.cpp")
    build("-shared", *made, "-o", folder / "fastdiff" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}")
    return folder


@pytest.mark.parametrize("file", TESTS)
def test_the_sanitizers_find_nothing(sanitized, file):
    # With the library that throws exceptions, which the sanitizer looks for as it starts.
    preload = [run(["g++", f"-print-file-name={name}"]).stdout.strip() for name in ("libasan.so", "libstdc++.so")]
    more = {
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": str(sanitized),
    }
    environment = {**os.environ, **more}
    where = run([sys.executable, "-c", "from fastdiff import _C; print(_C.__file__)"], cwd=sanitized, env=environment)
    assert where.stdout.startswith(str(sanitized)), where.stderr
    command = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", f"tests/{file}", "-k", WITHOUT]
    done = run(command, cwd=sanitized, env=environment)
    # A test that fails without a report is for the plain run to tell.
    said = done.stdout + done.stderr
    assert " passed" in said, said[-5000:]
    assert "Sanitizer" not in said, said[-5000:]
    assert "runtime error" not in said, said[-5000:]
