"""``fastdiff verify``: right runs pass, and one that is wrong in a single step does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_tools import images, write_model

import fastdiff as fd
from fastdiff import backends
from fastdiff.adapters.verification import FLOOR, Verification, verify
from fastdiff.cli import main
from fastdiff.ops import row as rows
from fastdiff.solvers import SOLVERS
from fastdiff.training.config import TrainConfig
from fastdiff.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (3, 2)


def network(**options: Any) -> fd.MLP:
    mlp = fd.MLP(2, width=16, depth=1, **options).eval()
    for index, parameter in enumerate(mlp.parameters()):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(index))
    return mlp


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = TrainConfig(model=write_model(folder), train_steps=2, batch=4, schedule="linear", prediction="epsilon")
    Trainer(config, images(), folder / "run").train()
    return folder / "run"


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "ddim_inverse"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_every_solver_is_within_its_budget(solver: str, precision: torch.dtype) -> None:
    diffusion = fd.Diffusion(fd.Schedule.cosine(200), "v_prediction")
    found = verify(network(), diffusion, SHAPE, solver=solver, steps=12, precision=precision)
    assert found.first_over is None, (found.fused, found.budget)
    assert len(found.fused) == len(found.plain) == len(found.timesteps) >= 12
    assert 0 < found.fused[0] < (1e-5 if precision == torch.float32 else 0.1)


def test_a_step_that_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch, run: Path, tmp_path: Path, capsys: Any) -> None:
    original = fd.ops.affine_step

    def wrong(x: Tensor, output: Tensor, table: Tensor, *rest: Any, **how: Any) -> fd.ops.Step:
        if backends.choice() == "native":
            table = table.clone()
            table[7, rows.LETTERS.index("a")] += 1e-4
        return original(x, output, table, *rest, **how)

    monkeypatch.setattr(fd.ops, "affine_step", wrong)
    arguments = ["verify", "--checkpoint", str(run), "--steps", "12", "--backend", "native", "--out", str(tmp_path)]
    assert main(arguments) == 1
    said = capsys.readouterr().out
    assert "step 7 at t =" in said
    assert "NOT verified" in said
    assert json.loads((tmp_path / "verify.json").read_text())["first_over"] == 7


def test_the_command_says_and_leaves_what_it_found(run: Path, capsys: Any) -> None:
    assert main(["verify", "--checkpoint", str(run), "--steps", "6", "--solver", "dpmpp_2m", "--labels", "0,2"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("dpmpp_2m, 6 steps, backend auto, fp32 on cpu\nfrom float64: ")
    for name in ("diffusers", "k-diffusion", "guided-diffusion"):
        assert f"\n{name}" in said
    assert said.splitlines()[-1] == f"verified: {run / 'verify'}"
    values = json.loads((run / "verify" / "verify.json").read_text())
    assert values["verified"]
    assert len(values["fused"]) == 6
    assert (run / "verify" / "verify.png").stat().st_size > 1000


def test_bad_input_ends_in_one_line(run: Path, tmp_path: Path, capsys: Any) -> None:
    for arguments, said in (
        (["--checkpoint", str(tmp_path / "none")], "does not exist"),
        (["--checkpoint", str(run), "--solver", "magic"], "unknown solver 'magic'"),
        (["--checkpoint", str(run), "--backend", "fast"], "fast"),
        (["--checkpoint", str(run), "--labels", "7"], "--labels must lie in 0...2"),
    ):
        assert main(["verify", *arguments]) == 2
        assert said in capsys.readouterr().err


def test_numbers_that_are_none_are_over_the_budget() -> None:
    found = Verification([3.0, 1.0], [0.0, float("inf")], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0], {})
    assert found.first_over == 1
    assert found.budget[0] == FLOOR * 2.0**-23
