"""The benchmarks measure what they say: every case computes its formula, and what is wrong is never timed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the package

from benchmarks import NAMES, harness, steps  # noqa: E402
from benchmarks.__main__ import main  # noqa: E402
from benchmarks.harness import Arrays, Case, Peer, Row  # noqa: E402

CPU = torch.device("cpu")
CASES = list(steps.cases(CPU, quick=True))
CASE = next(case for case in CASES if "ddim+guidance, out=" in case.name)


def wrong(arrays: Arrays):
    """A step whose x' is off by a hundredth in one element."""
    right = CASE.ours(arrays)

    def call():
        step = right()
        step.x.view(-1)[-1] += 0.01
        return step

    return call


def half(arrays: Arrays):
    return lambda: (CASE.ours(arrays)().x, torch.full(CASE.shape, torch.nan))


def missing():
    raise ImportError("no such library")


def nothing(arrays: Arrays):
    return lambda: arrays.writes


# ---- the cases ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ours_and_peers_compute_the_formula(case: Case):
    inputs = harness.make_arrays(case, CPU)
    with torch.no_grad():
        want = harness.truth(case, inputs)
        assert harness.gate(case, inputs, want) <= case.tolerance
        for peer in case.peers:
            if not peer.slow and (find_spec("diffusers") or "diffusers" not in peer.name):
                harness.build(peer, inputs, want)


def test_every_op_of_the_family_has_cases():
    assert {case.name.split()[0].rstrip(",") for case in CASES} == {
        "affine_step", "guide", "add_noise", "normal", "diffusion_loss", "objective",
    }  # fmt: skip
    assert len({case.name for case in CASES}) == len(CASES)


def test_large_cases_do_not_stay_in_the_cache():
    large = replace(CASE, shape=(16, 3, 256, 256))
    size = 4 * 16 * 3 * 256 * 256 * 5
    assert harness.count_sets(CASE, CPU) == 1
    assert harness.count_sets(large, CPU) * size >= 2 * harness.cache_size(CPU)


# ---- the gate -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad", [wrong, half, nothing, lambda _: lambda: None], ids=["off", "half", "unwritten", "none"]
)
def test_a_wrong_result_is_not_timed(bad, capsys, monkeypatch):
    monkeypatch.setattr(harness, "race", lambda *_: pytest.fail("timed"))
    (row,) = harness.measure(replace(CASE, ours=bad), CPU, seconds=0)
    assert row.keys() == Row.__annotations__.keys()
    assert row["ours_ms"] is row["peer"] is row["of_floor"] is None
    assert row["error"] is None or row["error"] > CASE.tolerance
    assert "FAILED" in harness.format_row(row)
    assert CASE.name in capsys.readouterr().err


def test_a_wrong_peer_is_left_out(capsys):
    peers = (Peer("liar", lambda: wrong), Peer("absent", missing))
    (row,) = harness.measure(replace(CASE, peers=peers), CPU, seconds=0)
    assert row["peer"] is None
    assert row["ours_ms"] > 0
    assert row["of_floor"] > 0
    said = capsys.readouterr().err
    assert "liar is left out: WrongResult" in said
    assert "absent is left out: ImportError no such library" in said


# ---- the floor ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moves", "operations"),
    [
        ((3, 2), ["add", "copy_"]),
        ((4, 2), ["add", "add"]),
        ((4, 3), ["add", "copy_", "copy_"]),
        ((2, 2), ["copy_", "copy_"]),
        ((2, 1), ["add"]),
        ((1, 1), ["copy_"]),
        ((0, 1), ["fill_"]),
        ((6, 1), ["add", "sum", "sum", "sum", "sum"]),
        ((4, 1), ["add", "sum", "sum"]),
    ],
)
def test_the_floor_moves_as_many_arrays(moves, operations):
    arrays = harness.make_arrays(replace(CASE, reads=max(moves[0], 1), writes=moves[1]), CPU)
    calls = list(harness._streams(arrays, *moves))
    assert [call.func.__name__ for call in calls] == operations
    if moves[0]:
        harness.streaming(arrays, moves)()


def test_turns_are_taken_in_rotation():
    seen: list[int] = []
    calls = [lambda i=i: seen.append(i) for i in range(3)]
    times = harness.race({"ours": calls, "floor": calls}, CPU, 0)
    assert seen == [i % 3 for i in range(len(seen))]
    assert all(0 < ms < 1 for ms in times.values())


# ---- the command ----------------------------------------------------------------------------


def test_the_command_writes_rows(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "steps", "--quick", "--json", str(tmp_path / "rows.json")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "is left out" not in result.stderr or not find_spec("diffusers")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert all(row.keys() == Row.__annotations__.keys() for row in rows)
    assert [*dict.fromkeys(row["case"] for row in rows)] == [case.name for case in CASES]
    assert all(row["ours_ms"] > 0 and row["of_floor"] > 0 and row["error"] < 2e-6 for row in rows)
    assert len(result.stdout.splitlines()) == len(rows) + 1
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stepz"], "unknown benchmark 'stepz': choose from"),
        (["steps", "--device", "tpu"], "unknown device 'tpu'"),
        (["steps", "--sets", "0"], "sets must be at least 1"),
        (["steps", "--quick", "--match", "no such case"], "no case of steps holds"),
        ([], "Missing argument"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, said, capsys):
    assert main(arguments) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("benchmarks: ")
    assert said in line


def test_names_are_the_case_modules():
    assert "steps" in NAMES
    assert all((ROOT / "benchmarks" / f"{name}.py").exists() for name in NAMES)
