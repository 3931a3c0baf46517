"""Everything static is in pyproject.toml; this builds the optional extension ``fastdiff._C``, which needs no torch.

Without a compiler the package is pure Python, without nvcc for the CPU; ``fastdiff/_build.txt`` keeps the reason."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Products and sums are not contracted, so that every backend gives the same bits; the math flags let loops vectorise.
CC = ["-O3", "-std=c++17", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
CC += ["-fno-trapping-math", "-Wno-maybe-uninitialized", "-Wno-psabi"]
NVCC = ["-O3", "-std=c++17", "--fmad=false", "--threads", "0", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
ARCHITECTURES = ("80", "86", "89", "90", "100")
REPORT = "fastdiff/_build.txt"
run = partial(subprocess.run, check=True, capture_output=True, text=True)
KERNELS, SOURCES, HEADERS = (sorted(glob(f"csrc/**/*.{kind}", recursive=True)) for kind in ("cu", "cpp", "h"))
NATIVE = Extension("fastdiff._C", SOURCES, depends=HEADERS + KERNELS, extra_compile_args=CC, optional=True)
NATIVE.extra_link_args = ["-fopenmp", "-s"]


class BuildNative(build_ext):
    """Builds what can be built: with CUDA, without, or nothing; and writes down why not more."""

    def build_extension(self, ext):
        report, problems = Path(self.build_lib, REPORT), []
        report.unlink(missing_ok=True)
        for attempt, what in ((self.with_cuda, "no CUDA kernels"), (self.with_cpp, "no compiled extension")):
            try:
                attempt(ext)
                break
            except (Exception, SystemExit) as error:  # whatever went wrong, the rest of the package stands
                said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
                said = re.sub(r"Command '\['([^']*)'.*", r"\1 failed (pip install -v shows how)", said)
                problems.append(f"{what}: {said}")
                report.parent.mkdir(parents=True, exist_ok=True)
                report.write_text("; ".join(problems) + "\n")

    def run(self):
        super().run()
        if not self.inplace:  # Python started in a clone finds the clone's package: the extension belongs there too
            self.copy_extensions_to_source()

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        made = Path(self.build_lib, REPORT)
        shutil.copy(made, REPORT) if made.exists() else Path(REPORT).unlink(missing_ok=True)

    def with_cpp(self, ext):
        import pybind11

        ext.include_dirs.append(pybind11.get_include())
        one, pool = type(self.compiler).compile.__get__(self.compiler), ThreadPoolExecutor(os.cpu_count())
        self.compiler.compile = lambda all_, **more: [o for m in pool.map(lambda s: one([s], **more), all_) for o in m]
        super().build_extension(ext)

    def with_cuda(self, ext):
        ext, home = deepcopy(ext), os.environ.get("CUDA_HOME", "/usr/local/cuda")
        nvcc = shutil.which("nvcc", path=f"{home}/bin{os.pathsep}{os.environ['PATH']}")
        if nvcc is None:
            raise FileNotFoundError("nvcc was not found at build time (CUDA_HOME, PATH)")
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        ext.extra_objects = [str(Path(self.build_temp, f"{Path(source).stem}.cu.o")) for source in KERNELS]
        for source, target in zip(KERNELS, ext.extra_objects, strict=True):
            run([nvcc, *NVCC, *architectures(nvcc), "-c", source, "-o", target])
        top = re.search(r"TOP=(.*)", run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull]).stderr)[1]
        ext.library_dirs += [f for pattern in ("lib64", "lib", "targets/*/lib") for f in glob(f"{top}/{pattern}")]
        ext.libraries += ["cudart_static", "dl", "rt", "pthread"]
        ext.define_macros.append(("FASTDIFF_CUDA", "1"))
        self.with_cpp(ext)


def architectures(nvcc):
    """Machine code for the architectures this nvcc knows, and PTX of the newest, for what comes after it."""
    known = run([nvcc, "--list-gpu-arch"]).stdout.split()
    served = [a for a in ARCHITECTURES if f"compute_{a}" in known]
    pairs = [(a, f"sm_{a}") for a in served] + [(served[-1], f"compute_{served[-1]}")]
    return [f"-gencode=arch=compute_{a},code={code}" for a, code in pairs]


setup(ext_modules=[NATIVE], cmdclass={"build_ext": BuildNative})
