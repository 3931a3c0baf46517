"""``fastdiff doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastdiff import _io
from fastdiff.adapters.doctor import FAULT, Description, Finding, examine, read, together
from fastdiff.errors import check, choose

PRECISIONS = ("fp32", "bf16", "fp16")
PATHS = "scheduler configurations or pipelines of diffusers, runs or configurations of fastdiff"


def doctor(
    paths: Annotated[list[Path], typer.Argument(help=PATHS)],
    steps: Annotated[int | None, typer.Option(help="sampling steps to look at; default: 1 to 1000")] = None,
    precision: Annotated[
        str | None, typer.Option(help=f"of the network: {', '.join(PRECISIONS)}; default: as its files say")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="write the findings to this file too")] = None,
) -> int:
    """Name the faults of schedulers' configurations, what they cost and what mends them; exit status 1 if there are."""
    check(steps is None or steps >= 1, f"--steps must be at least 1, got {steps}")
    if precision is not None:
        choose("--precision", precision, PRECISIONS)
    found = [(d, examine(d)) for d in together([read(path, steps=steps, precision=precision) for path in paths])]
    for description, findings in found:
        _print(description, findings)
    if json is not None:
        rows = [{"source": d.source, "what": str(d), "findings": [f.to_json() for f in each]} for d, each in found]
        _io.replace_json(json, rows)
    return int(any(finding.severity == FAULT for _, findings in found for finding in findings))


def _print(description: Description, findings: list[Finding]) -> None:
    print(f"{description.source}: {description}")
    for finding in findings:
        print(f"{finding.severity:>7}  {finding.check}: {finding.problem}")
        print(f"{'cost':>7}  {finding.cost}")
        print(f"{'fix':>7}  {finding.fix}")
    print("nothing found" if not findings else f"{len(findings)} found")
