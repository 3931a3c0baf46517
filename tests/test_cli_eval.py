"""``fastdiff eval``: equal numbers from all kinds of sources and any number of processes; curves."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
import torch
from eval_tools import (
    HERE,
    PIXELS,
    Looks,
    color,
    damaged,
    digits,
    report,
    run,
    tiny_unet,
    values,
    write_folder,
    write_npz,
    write_run,
)
from PIL import Image

from fastdiff.cli import judging, main
from fastdiff.cli.drawing import Drawing
from fastdiff.cli.sample import SampleConfig
from fastdiff.cli.sources import Wanted, open_source
from fastdiff.metrics.evaluation import Pixels, collect, evaluate
from fastdiff.metrics.statistics import FeatureStatistics
from fastdiff.training import checkpoint
from fastdiff.training.run import load_run

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*biased upwards"),  # by few images
    pytest.mark.usefixtures("one_thread"),
]


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
    write_run(tmp_path / "run", unet)
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
    assert run(other, file, *PIXELS) == 2  # its statistics are of another extractor's features


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
    a = write_npz(tmp_path / "a.npz", color(12))
    assert run(a, a, "--weights", "somewhere.pth") == 0
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
    def torchrun(a, place):
        start = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "fastdiff",
        ]
        command = [*start, "eval", str(a), str(sets[1]), *PIXELS, "--out", str(place)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

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
    assert len({point["results"][0]["value"] for point in points}) == len(points)
    assert (tmp_path / "curve-trajectory.png").exists()
