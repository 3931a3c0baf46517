"""``fastdiff verify``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fastdiff import _io, figures
from fastdiff.adapters.verification import Peer, Verification, verify
from fastdiff.cli.drawing import Drawing
from fastdiff.cli.options import BackendName, CheckpointPath, DeviceName, OutDir, choose_device, with_fields
from fastdiff.cli.sample import POINTS, SampleConfig, run_directory
from fastdiff.training.run import load_run

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
COUNT = 4


@with_fields(SampleConfig, but=("batch", "classifier_scale"))
def verify_(
    given: dict[str, Any],
    checkpoint: CheckpointPath = Path("runs/demo"),
    ema: Annotated[str | None, typer.Option(help="average of weights; default the first")] = None,
    out: OutDir = None,
    device: DeviceName = "auto",
    backend: BackendName = "auto",
) -> int:
    """Prove on a trained run that fused sampling is the textbook's: by default of 4 samples, into the run's verify/.

    Exit status 1 where a step loses more than twice what plain PyTorch loses. Peers that are installed are compared.
    """
    run = load_run(checkpoint, device=choose_device(device), ema=ema)
    points = (
        {name: value for name, value in POINTS.items() if name in ("steps", "solver")} if run.data.is_points else {}
    )
    config = SampleConfig(**{"count": COUNT, **points, **given})
    drawing = Drawing(run, config)
    labels = {} if drawing.labels is None else {"y": drawing.labels.to(drawing.sampler.device)}
    how: dict[str, Any] = {"solver": config.solver, "steps": config.steps, "spacing": config.spacing}
    how |= {"guidance_scale": config.guidance_scale, "clip": None if run.data.is_points else 1.0}
    how |= {"precision": PRECISIONS[config.precision], "seed": config.seed, "backend": backend, "cond": labels}
    found = verify(run.model, run.diffusion, (config.count, *run.data.shape), **how)
    place = out or run_directory(checkpoint) / "verify"
    _write(place, found)
    what = f"{config.solver}, {config.steps} steps, backend {backend}, {config.precision} on {drawing.sampler.device}"
    print("\n".join([what, *_said(found), f"{'verified' if found.first_over is None else 'NOT verified'}: {place}"]))
    return 0 if found.first_over is None else 1


def _said(found: Verification) -> list[str]:
    ulps = f"{max(found.ulps):.0f} units in the last place"
    lines = [f"from float64: {max(found.fused):.2g} at most ({ulps}), plain PyTorch {max(found.plain):.2g}"]
    lines += [_said_of(name, peer, found) for name, peer in found.peers.items()]
    if (row := found.first_over) is not None:
        at = f"step {row} at t = {found.timesteps[row]:g}"
        lines.append(f"{at} is {found.fused[row]:.2g} off, its budget is {found.budget[row]:.2g}")
    return lines


def _said_of(name: str, peer: Peer, found: Verification) -> str:
    what = name if peer.version is None else f"{name} {peer.version}"
    if peer.why_not is not None:
        return f"{what}: {peer.why_not}"
    ends = f"{what}: ends {peer.far[-1]:.2g} from float64, {peer.from_fused:.2g} from the fused run"
    if (row := peer.first_over) is None:
        return ends
    return f"{ends}; DIFFERENT from step {row} at t = {found.timesteps[row]:g} on"


def _write(place: Path, found: Verification) -> None:
    values = {name: getattr(found, name) for name in ("timesteps", "fused", "plain", "ulps", "budget", "first_over")}
    peers = {name: asdict(peer) for name, peer in found.peers.items()}
    _io.replace_json(place / "verify.json", {**values, "peers": peers, "verified": found.first_over is None})
    curves = {"fused": found.fused, "plain PyTorch": found.plain, "budget": found.budget}
    figures.divergence(place / "verify.png", curves)
