"""The cases of ``steps`` under pytest-benchmark, on demand: ``python -m pytest benchmarks``."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest
import torch

from benchmarks import harness, steps

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONTESTS = [
    pytest.param(case, contestant, id=f"{case.name}, {contestant.name}")
    for case in steps.cases(DEVICE)
    for contestant in case.contestants()
]


@pytest.mark.parametrize(("case", "contestant"), CONTESTS)
@torch.no_grad()
def test_speed(benchmark: Any, case: harness.Case, contestant: harness.Peer) -> None:
    inputs = harness.make_inputs(case, DEVICE)
    try:
        bind = harness.build(contestant, inputs[0], harness.truth(case, inputs[0]))
    except ImportError as missing:
        pytest.skip(str(missing))
    calls = cycle([bind(arrays) for arrays in inputs])
    benchmark.group = case.name
    benchmark(lambda: finish(next(calls)()))


def finish(_: Any) -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
