"""``fastdiff reproduce``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fastdiff import figures, ops
from fastdiff.cli.options import BackendName, DataName, DeviceName, choose_device, with_fields
from fastdiff.errors import check, choose
from fastdiff.reproduce import gallery
from fastdiff.reproduce.page import Page
from fastdiff.reproduce.recipes import NAMES, recipe
from fastdiff.reproduce.studio import FULL, QUICK, Effort, Studio

ALL = "all"
HELP = f"{', '.join(NAMES)}; or {ALL}"
QUICK_HELP = "less training, fewer samples: a look at everything, and not what the figures are worth"


@with_fields(Effort)
def reproduce(
    given: dict[str, Any],
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help=HELP)],
    quick: Annotated[bool, typer.Option("--quick", help=QUICK_HELP)] = False,
    data: DataName = "digits",
    out: Annotated[Path, typer.Option("--out", help="directory of the gallery")] = Path("runs/reproduce"),
    device: DeviceName = "auto",
    backend: BackendName = "auto",
) -> None:
    """Make systems and figures of the sources again: pages of pictures, tables and claims, in OUT/index.html.

    Networks that recipes share are trained once, and kept.
    """
    figures.require_matplotlib()
    for name in names:
        choose("recipe", name, (*NAMES, ALL))
    chosen = NAMES if ALL in names else tuple(dict.fromkeys(names))
    effort = replace(QUICK if quick else FULL, **given)
    check(effort.seeds >= 1, f"seeds must be at least 1, got {effort.seeds}")
    settings = {"data": data, **asdict(effort), "backend": backend}
    options = ["--quick"] * quick + [f"--{name.replace('_', '-')} {value}" for name, value in given.items()]
    options += [f"--data {data}"] * (data != "digits")
    studio = Studio(out, data, effort, choose_device(device))
    with ops.backend(backend):
        for name in chosen:
            run(studio, name, " ".join(["fastdiff reproduce", name, *options]), settings)
    print(f"see {gallery.write(out, NAMES)}")


def run(studio: Studio, name: str, command: str, settings: dict[str, Any]) -> Page:
    """One recipe: its page, written."""
    module, began = recipe(name), time.perf_counter()
    title, _, text = (module.__doc__ or name).partition("\n")
    page = Page(studio.folder / name, name, title, " ".join(text.split()))
    module.run(studio, page)
    seconds = round(time.perf_counter() - began, 1)
    settings = {**settings, "device": str(studio.device), "threads": torch.get_num_threads()}
    page.save(command=command, settings=settings, seconds=seconds)
    print(f"{name}: {_verdicts(page.claims)}; {seconds:.0f} s")
    return page


def _verdicts(claims: Sequence[dict[str, Any]]) -> str:
    """How many claims have each verdict."""
    found = [claim["verdict"] for claim in claims]
    return ", ".join(
        f"{found.count(verdict)} {verdict}" for verdict in ("holds", "open", "reversed") if verdict in found
    )
