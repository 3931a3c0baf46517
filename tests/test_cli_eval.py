"""``fastdiff eval``: equal numbers from all kinds of sources and any number of processes; bad input in one line."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import fastdiff as fd
from fastdiff.cli import judging, main
from fastdiff.cli.drawing import Drawing
from fastdiff.cli.sample import SampleConfig
from fastdiff.cli.sources import Wanted, open_source
from fastdiff.errors import InputError
from fastdiff.metrics.evaluation import Pixels, collect, evaluate
from fastdiff.metrics.features import Features
from fastdiff.metrics.statistics import FeatureStatistics
from fastdiff.training import checkpoint
from fastdiff.training.data import load
from fastdiff.training.run import load_run, save_run

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*biased upwards"),  # by few images
    pytest.mark.usefixtures("one_thread"),
]
PIXELS = ("--features", "pixels")
HERE = "python:test_cli_eval:"


class Looks:
    """An extractor of all kinds of features: 5 numbers of each image."""

    settings = {"features": "looks", "weights": "none", "resize": "none"}  # noqa: RUF012

    def __call__(self, images):
        pixels = images.flatten(1).double() / 255
        five = torch.stack([pixels[:, i::5].mean(1) for i in range(5)], 1)
        return Features(five, five[:, :3], 10 * five)

    def to(self, device):
        return self


def looks(device):
    return Looks()


def broken(device):
    return lambda images: images.flatten(1).double() / (images.flatten(1).double().sum(1, keepdim=True))


def no_extractor(device):
    return 3


def run(*arguments) -> int:
    with warnings.catch_warnings():  # main shows warnings in its own way from now on
        return main(["eval", *map(str, arguments)])


def report(place, name="eval"):
    return json.loads((place / f"{name}.json").read_text())


def values(place):
    return {result["metric"]: result["value"] for result in report(place)["results"]}


def digits(count: int) -> torch.Tensor:
    data = load("digits")
    return data.to_raw(data.batch(torch.arange(count))[0])


def write_folder(place, images):
    place.mkdir()
    for i, image in enumerate(images):
        pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(place / f"{i:04d}.png")
    return place


def write_npz(path, images, **more):
    np.savez(path, images.permute(0, 2, 3, 1).numpy(), **more)
    return path


def damaged(path):
    path.write_bytes(path.read_bytes()[:-30])
    return path


def color(count: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def tiny_unet(**settings) -> fd.UNet:
    """A network that says something without having been trained."""
    torch.manual_seed(0)
    small = {"model_channels": 8, "channel_mult": (1,), "num_res_blocks": 1, "attention_resolutions": ()}
    unet = fd.UNet(8, 1, **small, norm_groups=4, **settings)
    for parameter in unet.parameters():
        if not parameter.any():  # what begins at zero says nothing
            torch.nn.init.normal_(parameter, std=0.2)
    return unet


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    unet = tiny_unet()
    path = tmp_path_factory.mktemp("runs") / "network"
    save_run(path, unet, fd.Diffusion(fd.Schedule.cosine(100), "sample"))
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """60 digits as a folder and as an npz."""
    place = tmp_path_factory.mktemp("sets")
    return write_folder(place / "folder", digits(60)), write_npz(place / "images.npz", digits(60))


# ---- sources -------------------------------------------------------------------------------------------


def test_all_sources_of_the_same_images_give_the_same(sets, tmp_path) -> None:
    names = ["fid", "pr"]
    folder, archive = sets
    for i, a in enumerate((folder, f"folder:{folder}", archive)):
        options = ("--metrics", ",".join(names), "--real-count", 300, "--out", tmp_path / str(i))
        assert run(a, "digits", *options, *PIXELS) == 0
    found = [values(tmp_path / str(i)) for i in range(3)]
    assert found[0] == found[1] == found[2]
    ids = torch.randperm(1797, generator=torch.Generator().manual_seed(0))[:300].sort().values
    generated = collect(digits(60).split(64), Pixels(), names)
    real = collect(digits(1797)[ids].split(64), Pixels(), names)
    expected = {result.metric: result.value for result in evaluate(generated, real, names)}
    assert found[0] == pytest.approx(expected, rel=1e-12)


def test_a_set_is_at_no_distance_of_itself(sets, capsys) -> None:
    assert run(sets[0], sets[1], *PIXELS) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "features: pixels, weights: none, resize: none, seed: 0"
    assert printed[1].split() == ["metric", "value", "generated", "real"]
    assert printed[2].split() == ["fid", "0", "60", "60"]


def test_a_run_is_judged_by_its_samples(network, sets, tmp_path) -> None:
    """Those of ``fastdiff sample``, in batches of other sizes."""
    options = ("--steps", 3, "--seed", 5, "--solver", "ddpm")
    sample = ("sample", "--checkpoint", network, "--count", 21, "--out", tmp_path, *options)
    assert main([str(a) for a in sample]) == 0
    common = (sets[1], *PIXELS, "--seed", 5)
    assert run(network, *common, *options, "--count", 21, "--batch", 6) == 0
    assert run(tmp_path / "samples.npz", *common, "--out", tmp_path) == 0
    found = report(network / "eval")
    assert values(network / "eval") == pytest.approx(values(tmp_path), rel=1e-3)  # pixels may round to the next
    assert found["settings"]["sampling"].items() >= {"count": 21, "steps": 3, "seed": 5, "solver": "ddpm"}.items()
    assert report(tmp_path)["settings"]["sampling"] is None


def test_a_sample_is_the_same_in_every_batch(tmp_path) -> None:
    """Its noise and its label."""
    unet = tiny_unet(num_classes=3)
    save_run(tmp_path / "run", unet, fd.Diffusion(fd.Schedule.cosine(100), "sample"))
    drawing = Drawing(load_run(tmp_path / "run"), SampleConfig(count=10, steps=2, labels="0,2,1", seed=4))
    assert drawing.labels.tolist() == [0, 2, 1, 0, 2, 1, 0, 2, 1, 0]
    whole = drawing.samples(torch.arange(10))
    parts = torch.cat([drawing.samples(ids) for ids in torch.arange(10).split(4)])
    assert torch.allclose(whole, parts, atol=1e-5)
    *_, last = drawing.states(torch.arange(3, 7))
    assert torch.allclose(whole[3:7], last.x, atol=1e-5)
    other = Drawing(drawing.run, SampleConfig(count=10, steps=2, labels="1", seed=4)).samples(torch.arange(10))
    same = (whole - other).abs().flatten(1).amax(1) < 1e-5
    assert same.tolist() == (drawing.labels == 1).tolist()


def test_as_many_samples_as_there_are_real_images(network, sets, tmp_path) -> None:
    assert run(network, sets[1], *PIXELS, "--steps", 1, "--out", tmp_path) == 0
    (result,) = report(tmp_path)["results"]
    assert (result["generated"], result["real"]) == (60, 60)
    newest = checkpoint.steps(network)[0]
    assert run(newest, sets[1], *PIXELS, "--steps", 1, "--out", tmp_path / "again") == 0
    assert values(tmp_path / "again") == values(tmp_path)


def test_pictures_are_read_upright_and_in_color_where_some_are(tmp_path) -> None:
    picture = color(1, 6)[0, :, :4]  # 4 rows, 6 columns
    folder = write_folder(tmp_path / "folder", [picture])
    exif = Image.Exif()
    exif[274] = 8  # to be turned by 90 degrees
    turned = Image.fromarray(picture.permute(1, 2, 0).rot90(-1, (0, 1)).contiguous().numpy())
    turned.save(folder / "turned.png", exif=exif)
    Image.fromarray(picture[0].numpy()).save(folder / "grey.png")
    images = open_source(str(folder), Wanted(None, 0, None, {}, 0, torch.device("cpu")))
    assert images.shape == (3, 4, 6)
    first, grey, last = images.read(torch.arange(3))
    assert torch.equal(first, picture)
    assert torch.equal(last, picture)
    assert torch.equal(grey, picture[:1].expand(3, -1, -1))


def test_a_count_chooses_by_the_seed_and_none_twice(sets) -> None:
    def chosen(seed):
        images = open_source(str(sets[1]), Wanted(20, 0, None, {}, seed, torch.device("cpu")))
        return images.read(torch.arange(images.count))

    assert torch.equal(chosen(1), chosen(1))
    assert not torch.equal(chosen(1), chosen(2))
    assert len(chosen(1).unique(dim=0)) == 20


def test_image_size_brings_images_together(sets, tmp_path) -> None:
    large = write_npz(tmp_path / "large.npz", digits(60).repeat_interleave(2, 2).repeat_interleave(2, 3))
    odd = write_folder(tmp_path / "odd", [*digits(5), torch.zeros(1, 9, 12, dtype=torch.uint8)])
    for a in (large, odd):
        assert run(a, "digits", *PIXELS, "--image-size", 8, "--out", tmp_path / "out") == 0
        assert report(tmp_path / "out")["settings"]["image_size"] == 8


# ---- features ---------------------------------------------------------------------------------------------


def test_results_say_what_they_depend_on(sets, tmp_path) -> None:
    options = ("--metrics", "fid,sfid,kid,is,pr,cmmd,fid_infinity", "--features", HERE + "looks", "--seed", 3)
    assert run(*sets, *options, "--confidence", 10, "--out", tmp_path) == 0
    found = report(tmp_path)["results"]
    assert len(found) == 10
    for result in found:
        assert result["seed"] == 3
        assert result["features"] == Looks.settings
        assert result["generated"] == 60
        assert result["real"] == (None if result["metric"] == "is" else 60)
    assert {r["metric"] for r in found if r["interval"]} == {"fid", "sfid", "is"}


def test_images_alone_have_a_score(sets, tmp_path, capsys) -> None:
    assert run(sets[0], "--features", HERE + "looks", "--out", tmp_path) == 0
    assert list(values(tmp_path)) == ["is"]
    assert "splits 10" in capsys.readouterr().out


def test_saved_statistics_stand_for_the_images(sets, tmp_path) -> None:
    file = tmp_path / "statistics.npz"
    other = write_npz(tmp_path / "other.npz", digits(100)[60:])
    assert run(other, sets[0], *PIXELS, "--out", tmp_path / "a", "--save-statistics", file) == 0
    assert run(other, file, *PIXELS, "--out", tmp_path / "b") == 0
    assert values(tmp_path / "a") == pytest.approx(values(tmp_path / "b"), rel=1e-9)
    assert report(tmp_path / "b")["results"][0]["real"] == 60
    assert run(other, "--features", HERE + "looks", "--save-statistics", file) == 0  # of A, where it is alone
    assert FeatureStatistics.load(file).count == 40
    assert run(file, file, "--out", tmp_path / "c") == 0
    assert values(tmp_path / "c") == {"fid": 0}


@pytest.fixture
def inception(monkeypatch):
    """Stands in for the network, whose weights are not here."""
    paths = []

    def stand_in(path=None):
        paths.append(path)
        return Looks()

    monkeypatch.setattr(judging.Inception, "load", stand_in)
    return paths


def test_inception_looks_at_pictures(inception, tmp_path) -> None:
    a, b = (write_npz(tmp_path / f"{seed}.npz", color(12, seed=seed)) for seed in (1, 2))
    assert run(a, b, "--out", tmp_path, "--weights", "somewhere.pth") == 0
    assert inception == ["somewhere.pth"]


def test_a_file_of_images_and_statistics_gives_each_to_its_metric(inception, tmp_path) -> None:
    """As guided-diffusion's reference files, whose statistics are of more images than they hold."""
    features = Looks()(color(90, seed=3)).pool
    statistics = FeatureStatistics(5)
    statistics.update(features)
    mean, covariance = statistics.mean.numpy(), statistics.covariance.numpy()
    a = write_npz(tmp_path / "a.npz", color(40, seed=1))
    b = write_npz(tmp_path / "b.npz", color(30, seed=2), mu=mean, sigma=covariance)
    options = ("--metrics", "fid,cmmd", "--confidence", 5)
    assert run(a, b, *options, "--out", tmp_path / "both") == 0
    statistics.save(tmp_path / "alone.npz")
    assert run(a, tmp_path / "alone.npz", "--confidence", 5, "--out", tmp_path / "alone") == 0
    write_npz(tmp_path / "b.npz", color(30, seed=2))
    assert run(a, tmp_path / "b.npz", *options, "--out", tmp_path / "images") == 0
    both, alone, images = (values(tmp_path / name) for name in ("both", "alone", "images"))
    assert both["fid"] == pytest.approx(alone["fid"])
    intervals = [report(tmp_path / name)["results"][0]["interval"] for name in ("both", "alone")]
    assert intervals[0] == pytest.approx(intervals[1])
    assert both["fid"] != pytest.approx(images["fid"])
    assert both["cmmd"] == images["cmmd"]
    assert [result["real"] for result in report(tmp_path / "both")["results"]] == [None, 30]
    write_npz(tmp_path / "b.npz", color(30, seed=2), mu=mean, sigma=covariance)
    assert run(a, b, *options, "--features", HERE + "looks", "--out", tmp_path / "other") == 0
    assert values(tmp_path / "other") == images  # the statistics are of Inception's features


# ---- processes -------------------------------------------------------------------------------------------


def test_two_processes_judge_the_same(network, sets, tmp_path) -> None:
    options = ("--metrics", "fid,is,pr", "--features", HERE + "looks", "--steps", 2, "--count", 33, "--batch", 8)
    assert run(network, sets[0], *options, "--out", tmp_path / "1") == 0
    torch.set_num_threads(2)
    assert run(network, sets[0], *options, "--processes", 2, "--out", tmp_path / "2") == 0
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    one, two = (values(tmp_path / str(n)) for n in (1, 2))
    assert two == pytest.approx(one, rel=1e-6, abs=1e-9)
    counts = {(r["generated"], r["real"]) for r in report(tmp_path / "2")["results"]}
    assert counts == {(33, 60), (33, None)}


def test_bad_input_of_one_process_ends_all(tmp_path, capfd) -> None:
    folder = write_folder(tmp_path / "folder", digits(20))
    damaged(folder / "0019.png")  # which the second process reads
    assert run(folder, "digits", *PIXELS, "--processes", 2, "--out", tmp_path / "out") == 2
    said = [line for line in capfd.readouterr().err.splitlines() if "0019.png" in line or "Error" in line]
    assert len(said) == 1, said
    assert said[0].startswith("fastdiff: image ")
    assert not (tmp_path / "out").exists()


def test_torchrun_may_start_the_processes(sets, tmp_path, monkeypatch, capsys) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in {"TORCHELASTIC_RUN_ID": "test", **environment}.items():
        monkeypatch.setenv(name, str(value))
    assert run(*sets, *PIXELS, "--out", tmp_path) == 0
    assert values(tmp_path) == {"fid": 0}
    assert not torch.distributed.is_initialized()
    assert run(*sets, *PIXELS, "--processes", 2) == 2
    assert "so has torchrun" in capsys.readouterr().err


@pytest.mark.slow
def test_torchrun_starts_two(sets, tmp_path) -> None:
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def torchrun(a, place):
        command = [*starter, "-m", "fastdiff", "eval", a, sets[1], *PIXELS, "--out", place]
        return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)

    assert torchrun(sets[0], tmp_path / "out").returncode == 0
    assert values(tmp_path / "out") == pytest.approx({"fid": 0}, abs=1e-12)
    folder = write_folder(tmp_path / "folder", digits(20))
    damaged(folder / "0019.png")
    failed = torchrun(folder, tmp_path / "failed")
    assert failed.returncode != 0
    assert failed.stderr.count("fastdiff: image ") == 1
    assert not (tmp_path / "failed").exists()


# ---- curves ----------------------------------------------------------------------------------------------


def judged(network, sets, place, *more):
    options = ("--metrics", "fid,is", "--features", HERE + "looks", "--count", 12, "--solver", "heun")
    assert run(network, sets[0], *options, "--out", place, *more) == 0


def test_metrics_over_the_number_of_steps(network, sets, tmp_path) -> None:
    judged(network, sets, tmp_path, "--curve", "steps", "--steps", "1,2,5")
    points = report(tmp_path, "curve-steps")["points"]
    assert [point["steps"] for point in points] == [1, 2, 5]
    for point in points:
        judged(network, sets, tmp_path / "one", "--steps", point["steps"])
        assert report(tmp_path / "one")["results"] == point["results"]
    with Image.open(tmp_path / "curve-steps.png") as picture:
        assert picture.size[0] > 500


def test_metrics_along_a_trajectory(network, sets, tmp_path) -> None:
    judged(network, sets, tmp_path, "--curve", "trajectory", "--steps", "8", "--batch", 5)
    points = report(tmp_path, "curve-trajectory")["points"]
    assert [point["step"] for point in points] == [1, 3, 4, 6, 7, 9, 10, 12, 13, 15]  # 8 steps of Heun: 15 rows
    for steps, point in ((8, points[-1]), (1, points[0])):  # one step ends with its estimate
        judged(network, sets, tmp_path / "end", "--steps", steps, "--batch", 5)
        assert report(tmp_path / "end")["results"] == point["results"]
    fids = [point["results"][0]["value"] for point in points]
    assert len(set(fids)) == len(fids)
    with Image.open(tmp_path / "curve-trajectory.png") as picture:
        assert picture.size[0] > 500


# ---- bad input ---------------------------------------------------------------------------------------------


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
    save_run(tmp_path / "run", unet, fd.Diffusion(fd.Schedule.cosine(100)))
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
        ("digits", narrow, ("--metrics", "fid,kid", *PIXELS), "kid needs .* statistics of a file have none"),
        ("digits", narrow, ("--real-count", 5, *PIXELS), "of which no 5 can be chosen"),
        (write_npz(tmp_path / "color.npz", color(4)), "digits", PIXELS, "images of 3x32x32 and 1x8x8 .*--image-size"),
        (tmp_path / "color.npz", tmp_path / "color.npz", ("--weights", weights), "is not the published file"),
    ]:
        refused(capsys, message, a, b, *options, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_known_of_a_source_that_is_no_name() -> None:
    with pytest.raises(InputError, match="lacks its path"):
        open_source("folder:", Wanted(None, 0, None, {}, 0, torch.device("cpu")))
