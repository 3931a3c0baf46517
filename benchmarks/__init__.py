"""What fastdiff costs against its peers and against the memory: ``python -m benchmarks NAME``.

A case module has a function ``cases(device, quick)`` that yields the cases; its file name is the benchmark's name.
"""

from pathlib import Path

TOOLS = ("ceilings", "harness", "peers", "summary")
NAMES = sorted(
    path.stem
    for path in Path(__file__).parent.glob("*.py")
    if path.stem not in TOOLS and not path.stem.startswith(("_", "test_"))
)
