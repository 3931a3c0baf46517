"""``fastdiff eval``."""

from __future__ import annotations

import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff import _io, figures
from fastdiff.cli.judging import EvalConfig, Point, Report, Request, judge
from fastdiff.cli.options import BackendName, DeviceName, OutDir, choose_device, with_fields
from fastdiff.cli.sample import SampleConfig, run_directory
from fastdiff.cli.sources import HELP
from fastdiff.errors import check
from fastdiff.metrics.evaluation import Result
from fastdiff.training.checkpoint import FOLDER
from fastdiff.training.distributed import on_processes

HEADER = ("", "metric", "value", "standard error", "95 % interval", "generated", "real", "")


@with_fields(EvalConfig, SampleConfig, but=("classifier_scale",))
def eval_(
    given: dict[str, Any],
    generated: Annotated[str, typer.Argument(metavar="A", help=f"what is judged: {HELP}")],
    real: Annotated[str | None, typer.Argument(metavar="B", help="what it is compared with")] = None,
    save_statistics: Annotated[Path | None, typer.Option(help="an .npz for the statistics of B, or of A alone")] = None,
    out: OutDir = None,
    processes: Annotated[int, typer.Option(help="that share the images; torchrun may start them instead")] = 1,
    device: DeviceName = "auto",
    backend: BackendName = "auto",
) -> None:
    """Judge images A against images B: FID, KID, Inception Score, precision and recall from one pass over them.

    Results are printed, and written into --out, by default a run's eval/.
    """
    own = {field.name for field in fields(EvalConfig)}
    config = EvalConfig(**{name: value for name, value in given.items() if name in own})
    config.metric_names(real is None)
    sampling = {name: value for name, value in given.items() if name not in own}
    request = Request(generated, real, config, sampling, choose_device(device), backend)
    place = out or _place(Path(generated))
    _check_targets(place, save_statistics, config.curve)
    began = time.perf_counter()
    report = on_processes(processes, judge, request)
    if report is None:  # the first process has it
        return
    seconds = time.perf_counter() - began
    print(table(report.points))
    if place is not None:
        _write(place, request, report, seconds)
    if save_statistics is not None:
        report.features.save(save_statistics)


def _place(generated: Path) -> Path | None:
    run = run_directory(generated) if generated.exists() else generated
    return run / "eval" if (run / FOLDER).is_dir() else None


def _check_targets(place: Path | None, statistics: Path | None, curve: str | None) -> None:
    """Before any work is done."""
    check(place is None or place.is_dir() or not place.exists(), f"--out {place} is no directory")
    fits = statistics is None or (statistics.suffix == ".npz" and not statistics.is_dir())
    check(fits, f"--save-statistics must name an .npz file, got {statistics}")
    if curve:
        figures.require_matplotlib()


def _write(place: Path, request: Request, report: Report, seconds: float) -> None:
    """``eval.json``; of a curve ``curve-NAME.json`` and ``.png``."""
    settings = {
        "generated": request.generated,
        "real": request.real,
        **{name: str(v) if isinstance(v, Path) else v for name, v in asdict(request.config).items()},
        "sampling": None if report.sampling is None else asdict(report.sampling),
        "device": str(request.device),
        "backend": request.backend,
    }
    curve = request.config.curve
    points = [{**at, "results": [asdict(result) for result in results]} for at, results in report.points]
    found = {"points": points} if curve else points[0]
    name = f"curve-{curve}" if curve else "eval"
    if curve:
        title = (
            f"{request.generated} against {request.real}, features: {report.points[0].results[0].features['features']}"
        )
        figures.metric_curves(place / f"{name}.png", curve, _curves(report.points), title)
    _io.replace_json(place / f"{name}.json", {**found, "seconds": seconds, "settings": settings})


def _curves(points: list[Point]) -> dict[str, list[tuple[int, Result]]]:
    """Each metric's results by place."""
    curves: dict[str, list[tuple[int, Result]]] = {}
    for at, results in points:
        for result in results:
            curves.setdefault(result.metric, []).append((next(iter(at.values())), result))
    return curves


# ---- the table ----------------------------------------------------------------------------------


def table(points: list[Point]) -> str:
    """What is printed."""
    lines = [HEADER] + [_line(at, result) for at, results in points for result in results]
    used = [column for column in zip(*lines, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in used]
    rows = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in zip(*used, strict=True)]
    return "\n".join([_settings(points[0].results[0]), *(row.rstrip() for row in rows)])


def _line(at: dict[str, int], result: Result) -> tuple[str, ...]:
    return (
        " ".join(f"{name} {value}" for name, value in at.items()),
        result.metric,
        f"{result.value:.6g}",
        "" if result.standard_error is None else f"{result.standard_error:.2g}",
        "" if result.interval is None else "{:.6g} ... {:.6g}".format(*result.interval),
        str(result.generated or ""),
        str(result.real or ""),
        ", ".join(f"{name} {value:.4g}" for name, value in result.details.items() if not isinstance(value, list)),
    )


def _settings(result: Result) -> str:
    """Features and seed, hashes shortened."""
    named = {**result.features, "seed": result.seed}
    return ", ".join(f"{name}: {value[:16] if isinstance(value, str) else value}" for name, value in named.items())
