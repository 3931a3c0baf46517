"""Bad input of ``fastdiff eval`` ends in one line with status 2, and nothing is written."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from eval_tools import HERE, PIXELS, color, damaged, digits, run, tiny_unet, write_folder, write_npz, write_run

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*biased upwards"),  # by few images
    pytest.mark.usefixtures("one_thread"),
]


def refused(capsys, message, *arguments) -> None:
    assert run(*arguments) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if not re.match(r"(reading|sampling|metrics) ?", line)]
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("fastdiff: ")
    assert re.search(message, lines[0]), lines[0]
    assert printed.out == ""


#: A, B, further options, the message
BAD = {
    "name": ("nope", "digits", (), "'nope' is no data set .* and there is no file or directory of that name"),
    "no path": ("folder:", "digits", PIXELS, "data set 'folder:' lacks its path"),
    "points": ("swiss-roll", "digits", (), "swiss-roll holds points"),
    "no B": ("digits", None, ("--metrics", "fid"), "fid compares with real images"),
    "metric": ("digits", "digits", ("--metrics", "fid,fjd"), "unknown metric 'fjd': choose from fid, sfid"),
    "no logits": ("digits", "digits", ("--metrics", "is", *PIXELS), "is needs logits"),
    "features": ("digits", "digits", ("--features", "clip"), "unknown features 'clip': choose from inception, pixels"),
    "no classifier": ("digits", "digits", ("--features", "classifier:/no/run"), "/no/run does not exist"),
    "no module": ("digits", "digits", ("--features", "python:no_module:f"), "python:no_module:f is no function"),
    "no function": ("digits", "digits", ("--features", HERE + "nope"), "is no function .*nope"),
    "no extractor": ("digits", "digits", ("--features", HERE + "no_extractor"), "must make an extractor, got int"),
    "NaN": ("digits", "digits", ("--features", HERE + "broken"), "pool holds NaN or infinite values"),
    "inception unasked": (
        "digits",
        "digits",
        (),
        "Inception says nothing of 1x8x8 images: take --features classifier:RUN",
    ),
    "weights of pixels": ("digits", "digits", ("--weights", "x", *PIXELS), "--weights are Inception's"),
    "no weights": ("digits", "digits", ("--features", "inception", "--weights", "/no/file"), "no file /no/file"),
    "too many": ("digits", "digits", ("--count", 1798, *PIXELS), "digits holds 1797 images: 1798 cannot be chosen"),
    "one": ("digits", "digits", ("--count", 1, *PIXELS), "1 image of digits is too few"),
    "none": ("digits", "digits", ("--real-count", 0, *PIXELS), "0 cannot be chosen"),
    "batch": ("digits", "digits", ("--batch", 0, *PIXELS), "batch must be at least 1"),
    "seed": ("digits", "digits", ("--seed", -1, *PIXELS), "seed"),
    "confidence": ("digits", "digits", ("--confidence", 1, *PIXELS), "confidence must be 0 or above 1"),
    "processes": ("digits", "digits", ("--processes", 0, *PIXELS), "processes must be at least 1"),
    "device": ("digits", "digits", ("--device", "warp", *PIXELS), "--device warp"),
    "curve": ("digits", "digits", ("--curve", "time", *PIXELS), "unknown curve 'time': choose from steps, trajectory"),
    "curve of no run": ("digits", "digits", ("--curve", "steps", *PIXELS), "is of a run, which digits is not"),
    "several steps": ("digits", "digits", ("--steps", "5,10", *PIXELS), "several numbers go with --curve steps"),
    "steps": ("digits", "digits", ("--steps", "five", *PIXELS), "--steps must be whole numbers"),
    "save": ("digits", "digits", ("--save-statistics", "x.pt", *PIXELS), "must name an .npz file, got x.pt"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_end_in_one_line(case, tmp_path, capsys) -> None:
    a, b, options, message = BAD[case]
    refused(capsys, message, a, *([b] if b else []), *options, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_samples_end_in_one_line(network, sets, tmp_path, capsys) -> None:
    for options, message in [
        (("--steps", "101"), r"steps must lie in 1\.\.\.100, got 101"),
        (("--curve", "steps", "--steps", "5,101"), r"steps must lie in 1\.\.\.100, got 101"),
        (("--solver", "rk4"), "unknown solver 'rk4'"),
        (("--labels", "3"), "not class-conditional"),
        (("--count", "0"), "count must be at least 1"),
        (("--image-size", "16"), "makes images of 8 x 8 pixels, which --image-size does not change"),
    ]:
        refused(capsys, message, network, sets[0], *PIXELS, *options, "--out", tmp_path / "out")
    file = tmp_path / "file"
    file.touch()
    refused(capsys, "is no directory", network, sets[0], *PIXELS, "--out", file)
    refused(capsys, "pickles are never opened", file, sets[0], *PIXELS)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_samples_that_are_not_finite_end_in_one_line(sets, tmp_path, capsys) -> None:
    unet = tiny_unet()
    torch.nn.init.constant_(unet.conv_out.bias, torch.nan)
    write_run(tmp_path / "run", unet)
    refused(capsys, "gives NaN or infinity", tmp_path / "run", sets[0], *PIXELS, "--steps", 2)
    assert not (tmp_path / "run" / "eval").exists()


def test_bad_files_end_in_one_line(sets, tmp_path, capsys) -> None:
    mixed = write_folder(tmp_path / "mixed", [*digits(2), torch.zeros(1, 9, 8, dtype=torch.uint8)])
    text = write_folder(tmp_path / "text", digits(3))
    (text / "0001.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "float.npz", digits(3).permute(0, 2, 3, 1).numpy() / 255)
    np.savez(tmp_path / "channels-first.npz", digits(3).numpy())
    np.savez(tmp_path / "points.npz", np.zeros((5, 2), np.float32))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(5), sigma=np.eye(4))
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(4), sigma=np.eye(4))
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"other weights")
    uint8 = r"must be uint8 \[N, H, W, C\] in 0\.\.\.255 with 1 or 3 channels, got"
    narrow = tmp_path / "narrow.npz"
    for a, b, options, message in [
        (mixed, "digits", PIXELS, r"0000.png has 8 x 8 pixels, .*0002.png 8 x 9: --image-size makes them equal"),
        (text, "digits", PIXELS, "0001.png cannot be read"),
        (write_folder(tmp_path / "one", digits(1)), "digits", PIXELS, "1 image of .*one is too few"),
        (tmp_path / "empty", "digits", PIXELS, "empty holds neither images .* nor a checkpoint"),
        (damaged(write_npz(tmp_path / "cut.npz", digits(3))), "digits", PIXELS, "cut.npz is no .npz file.*damaged"),
        (tmp_path / "float.npz", "digits", PIXELS, uint8 + r" float64 \[3, 8, 8, 1\]"),
        (tmp_path / "channels-first.npz", "digits", PIXELS, uint8 + r" uint8 \[3, 1, 8, 8\]"),
        (tmp_path / "points.npz", "digits", PIXELS, uint8 + r" float32 \[5, 2\]"),
        (tmp_path / "other.npz", "digits", PIXELS, r"neither images \(arr_0\) nor statistics"),
        ("digits", tmp_path / "statistics.npz", PIXELS, r"mu \[5\] and sigma \[4, 4\]"),
        ("digits", narrow, PIXELS, "generated features are 64 wide, real ones 4"),
        ("digits", narrow, ("--metrics", "fid,kid", *PIXELS), "kid needs .* a file holds statistics of pool"),
        ("digits", narrow, ("--real-count", 5, *PIXELS), "of which no 5 can be chosen"),
        (write_npz(tmp_path / "color.npz", color(4)), "digits", PIXELS, "images of 3x32x32 and 1x8x8 .*--image-size"),
        (tmp_path / "color.npz", tmp_path / "color.npz", ("--weights", weights), "is not the published file"),
    ]:
        refused(capsys, message, a, b, *options, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
