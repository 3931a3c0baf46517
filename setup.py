"""Everything static is in pyproject.toml; this builds the optional extension ``fastdiff._C``.

It needs no torch. Without a C++ compiler the package installs as pure Python, without nvcc the extension is for the
CPU only; either way ``fastdiff/_build.txt`` keeps the reason, which ``fastdiff info`` shows.
"""

import os
import re
import shutil
import subprocess
from copy import deepcopy
from functools import partial
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Products and sums are not contracted, so that every backend gives the same bits; the math flags let loops vectorise.
CPP = ["-O3", "-std=c++17", "-fopenmp", "-fvisibility=hidden", "-Wextra", "-Wno-maybe-uninitialized"]
CPP += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
NVCC = ["-O3", "-std=c++17", "--fmad=false", "--threads", "0", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
ARCHITECTURES = ("80", "86", "89", "90", "100")
KERNELS = sorted(glob("csrc/cuda/*.cu"))
run = partial(subprocess.run, check=True, capture_output=True, text=True)


class BuildNative(build_ext):
    """Builds what can be built: with CUDA, without, or nothing; and writes down why not more."""

    def build_extension(self, ext):
        home = "fastdiff" if self.inplace else Path(self.get_ext_fullpath(ext.name)).parent
        report, problems = Path(home, "_build.txt"), []
        report.unlink(missing_ok=True)
        for attempt, what in ((self.with_cuda, "no CUDA kernels"), (self.with_cpp, "no compiled extension")):
            try:
                attempt(ext)
                break
            except (Exception, SystemExit) as error:  # whatever went wrong, the rest of the package stands
                said = getattr(error, "stderr", None) or str(error) or type(error).__name__
                problems.append(f"{what}: {said.strip().splitlines()[-1][:300]}")
                report.parent.mkdir(parents=True, exist_ok=True)
                report.write_text("; ".join(problems) + "\n")

    def with_cpp(self, ext):
        import pybind11

        ext.include_dirs.append(pybind11.get_include())
        super().build_extension(ext)

    def with_cuda(self, ext):
        ext, nvcc, folder = deepcopy(ext), find_nvcc(), Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        for source in KERNELS:
            ext.extra_objects.append(str(folder / f"{Path(source).stem}.cu.o"))
            run([nvcc, *NVCC, *architectures(nvcc), "-c", source, "-o", ext.extra_objects[-1]])
        ext.library_dirs += library_folders(nvcc)
        ext.libraries += ["cudart_static", "dl", "rt", "pthread"]
        ext.define_macros.append(("FASTDIFF_CUDA", "1"))
        self.with_cpp(ext)


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        raise FileNotFoundError("nvcc was not found at build time (PATH, CUDA_HOME)")
    return nvcc


def architectures(nvcc):
    """Machine code for the architectures this nvcc knows, and PTX of the newest, for what comes after it."""
    known = run([nvcc, "--list-gpu-arch"]).stdout.split()
    served = [a for a in ARCHITECTURES if f"compute_{a}" in known]
    pairs = [(a, f"sm_{a}") for a in served] + [(served[-1], f"compute_{served[-1]}")]
    return [f"-gencode=arch=compute_{a},code={code}" for a, code in pairs]


def library_folders(nvcc):
    top = re.search(r"TOP=(.*)", run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull]).stderr)[1]
    return [folder for pattern in ("lib64", "lib", "targets/*/lib") for folder in glob(f"{top}/{pattern}")]


SOURCES, HEADERS = (sorted(glob(f"csrc/**/*.{kind}", recursive=True)) for kind in ("cpp", "h"))
LINK = ["-fopenmp", "-s"]
NATIVE = Extension("fastdiff._C", SOURCES, depends=HEADERS + KERNELS, extra_compile_args=CPP, extra_link_args=LINK)
NATIVE.optional = True
setup(ext_modules=[NATIVE], cmdclass={"build_ext": BuildNative})
