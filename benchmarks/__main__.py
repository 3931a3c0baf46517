"""``python -m benchmarks NAME``: time a family of ops and print, or write, what was found."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Annotated

import torch
import typer

import fastdiff as fd
from benchmarks import NAMES
from benchmarks.harness import HEADER, Case, Row, format_row, measure, note
from fastdiff import _io
from fastdiff.errors import check, choose


def bench(
    name: Annotated[str, typer.Argument(help=f"one of: {', '.join(NAMES)}")],
    json: Annotated[Path | None, typer.Option(help="file for the rows, rewritten after every case")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    quick: Annotated[bool, typer.Option(help="tiny arrays and few rounds: whether all runs, not how fast")] = False,
    match: Annotated[str, typer.Option(help="only the cases whose name holds this")] = "",
    slow: Annotated[bool, typer.Option(help="peers too that take minutes to build, as a compiled network does")] = True,
    seconds: Annotated[float, typer.Option(help="how long a case is timed")] = 1.0,
    sets: Annotated[int | None, typer.Option(help="input sets to rotate among; default: as the caches ask")] = None,
) -> int:
    """Time ours against its peers and the floor; ratio is peer / ours, of_floor is floor / ours."""
    choose("benchmark", name, NAMES)
    choose("device", device, ("cpu", "cuda"))
    check(device == "cpu" or torch.cuda.is_available(), "no CUDA device is available here")
    check(sets is None or sets > 0, f"sets must be at least 1, got {sets}")
    note(fd.explain(device).replace("\n", "\n      "))
    place, rows = torch.device(device), list[Row]()
    print(HEADER)
    for case in _cases(name, place, quick, match):
        found = measure(case, place, seconds=0.0 if quick else seconds, sets=sets, slow=slow and not quick)
        print(*map(format_row, found), sep="\n", flush=True)
        rows += found
        if json is not None:
            _io.replace_json(json, rows)
    check(rows, f"no case of {name} holds {match!r}")
    return int(any(row["ours_ms"] is None for row in rows))


def _cases(name: str, device: torch.device, quick: bool, match: str) -> Iterator[Case]:
    return (case for case in import_module(f"benchmarks.{name}").cases(device, quick) if match in case.name)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 a wrong result, 2 bad input (one line on standard error)."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(bench)
    try:
        return app(arguments, standalone_mode=False) or 0
    except (fd.InputError, OSError) as error:
        message = str(error)
    except Exception as error:
        if not hasattr(error, "format_message"):  # what the option parser raises
            raise
        message = error.format_message()
    print(f"benchmarks: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
