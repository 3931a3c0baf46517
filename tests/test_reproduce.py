"""Every recipe runs in a tiny form and leaves a whole page; what it computes agrees with what is known exactly."""

import importlib
import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data_tools import colours, rng, save, write_cifar, write_emnist, write_mnist
from PIL import Image
from scipy import stats

import fastdiff as fd
from fastdiff.backends import choice
from fastdiff.cli import main
from fastdiff.cli import reproduce as command
from fastdiff.errors import InputError
from fastdiff.reproduce import networks, sources, summary
from fastdiff.reproduce.page import Mean, Page
from fastdiff.reproduce.recipes import DDPM, IDDPM, NAMES, iddpm, recipe, steps
from fastdiff.reproduce.recipes.disturbances import DISTURBANCES
from fastdiff.reproduce.recipes.x0_snr import exact_x0
from fastdiff.reproduce.studio import TINY, Score, Studio
from fastdiff.reproduce.sweep import sweep

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = [
    word
    for name in ("train_steps", "batch", "count", "chain_count", "seeds", "classifier_steps", "point_steps", "points")
    for word in (f"--{name.replace('_', '-')}", str(getattr(TINY, name)))
] + ["--timesteps", "20"]


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    return Studio(tmp_path_factory.mktemp("gallery"), "digits", TINY)


def is_whole(report, folder) -> None:
    """All pictures are there and can be opened; all numbers are finite."""
    assert report["title"]
    assert report["text"]
    assert report["figures"]
    for figure in report["figures"]:
        with Image.open(folder / figure["file"]) as image:
            image.load()
            assert min(image.size) > 50
    for table in report["tables"]:
        for row in table["rows"]:
            assert len(row) == len(table["columns"])
            numbers = [cell for cell in row if isinstance(cell, float)]
            numbers += [value for cell in row if isinstance(cell, dict) for value in cell["values"]]
            assert all(math.isfinite(number) for number in numbers)
    for claim in report["claims"]:
        assert claim["verdict"] in ("holds", "open", "reversed")
        assert len(claim["larger"]["values"]) == len(claim["smaller"]["values"]) >= TINY.seeds


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_leaves_a_whole_page(studio, name) -> None:
    command.run(studio, name, f"fastdiff reproduce {name}", {"data": "digits"})
    folder = studio.folder / name
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    is_whole(report, folder)
    assert report["claims"]
    assert report["command"] == f"fastdiff reproduce {name}"
    assert {path.name for path in folder.iterdir()} == {"report.json", *(f["file"] for f in report["figures"])}


def test_a_network_is_trained_once(studio) -> None:
    first = studio.train(**IDDPM, seed=0)
    files = {path: path.stat().st_mtime_ns for path in studio.folder.glob("networks/*/checkpoints/*/*")}
    again = studio.train(**IDDPM, seed=0)
    assert files == {path: path.stat().st_mtime_ns for path in studio.folder.glob("networks/*/checkpoints/*/*")}
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    other = studio.train(**IDDPM, seed=1)
    assert any(not torch.equal(a, b) for a, b in zip(first.model.parameters(), other.model.parameters(), strict=True))


def test_networks_side_by_side_are_those_of_one_after_another(request, tmp_path) -> None:
    one_by_one = Studio(tmp_path / "a", "digits", replace(TINY, seeds=3)).train_each(**IDDPM)
    request.getfixturevalue("two_threads")
    side_by_side = Studio(tmp_path / "b", "digits", replace(TINY, seeds=3)).train_each(**IDDPM)
    for a, b in zip(one_by_one, side_by_side, strict=True):
        for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
            assert torch.equal(p, q)
    assert [run.config["training"]["seed"] for run in side_by_side] == [0, 1, 2]


def test_a_network_is_trained_by_the_backend_that_was_chosen(studio, monkeypatch) -> None:
    """In another process the choice has its default."""
    found = []
    trainer = type("Trainer", (), {"__init__": lambda *_, **__: None, "train": lambda _: found.append(choice())})
    monkeypatch.setattr(networks, "Trainer", trainer)
    with fd.backend("reference"):
        network = networks.Network.of(
            studio.folder, studio._config(studio.data, {}), studio.data, "digits", None, "cpu"
        )
    network.train()
    assert found == ["reference"]


def test_a_moved_gallery_is_not_trained_again(tmp_path) -> None:
    Studio(tmp_path / "a", "digits", TINY).train(**IDDPM)
    (tmp_path / "a").rename(tmp_path / "b")
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    Studio(tmp_path / "b", "digits", TINY).train(**IDDPM)
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("two_threads")
def test_what_training_has_to_say_comes_from_other_processes_too(tmp_path) -> None:
    studio = Studio(tmp_path, "digits", replace(TINY, seeds=2))
    (tmp_path / "networks").write_text("in the way")
    with pytest.raises((InputError, OSError), match="networks"):
        studio.train_each(**IDDPM)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_asked_to_end_it_keeps_what_was_done(tmp_path) -> None:
    """Two networks are trained side by side, far from done, when the first process is told to end."""
    options = [*OPTIONS, "--train-steps", "2000", "--seeds", "2", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "fastdiff", "reproduce", "emnist-letters", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:  # of the first; the second may begin later
            if "training: " in line and len(list(tmp_path.glob("networks/*/config.json"))) == 2:
                break
        assert any("training: " in line for line in process.stderr)  # a fifth later, both are at it
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 143
    kept = [path.name for path in tmp_path.glob("networks/*/checkpoints/*")]
    assert len(kept) == 2
    assert all(name < "step-00002000" for name in kept)


def test_scores_of_the_data_themselves(studio) -> None:
    score = studio.real_score
    assert abs(score.fid) < 1e-9
    assert score.diversity == 1
    read = studio.read(studio.real)
    assert score.accuracy == pytest.approx(float((read == studio.real_labels).double().mean()), abs=1e-6)
    assert studio.fid(studio.real.flip(2)) > 0


def test_bits_of_recipes_are_those_of_spaced_schedules(studio) -> None:
    """Over all timesteps the recipe's bound is that of the library."""
    from fastdiff.reproduce.recipes.iddpm import _bits

    [run] = iddpm.networks(studio, "hybrid, learned")
    x0, y = studio.some(64)
    whole = run.diffusion.bits_per_dim(run.model, x0, y=y).total.mean()
    assert _bits(studio, run, TINY.timesteps) == pytest.approx(float(whole), rel=1e-6)


def test_what_a_part_of_the_chain_gains() -> None:
    """Two networks whose FID falls from 80 and 40 to nothing, evenly; and one that gains all in the last eighth."""
    even = [[80 - 10 * i, 40 - 5 * i] for i in range(9)]
    assert steps._gains(even, 0.5) == [[40, 20], [40, 20]]
    assert steps._gains(even, 0.75) == [[20, 10], [60, 30]]
    assert steps._gains([[9.0]] * 8 + [[0.0]], 0.75) == [[9.0], [0.0]]


def test_the_way_along_the_chain_ends_in_its_samples(studio) -> None:
    run = studio.train(**DDPM)
    found = steps._along(studio, run)
    count = TINY.chain_count // 4
    samples = studio.sample(run, "ddpm", TINY.timesteps, count=count)
    first = fd.noise.normal((count, *studio.data.shape), seed=0)
    assert {len(values) for values in found.values()} == {steps.PLACES}
    assert found["FID of x"][-1] == pytest.approx(studio.fid(samples), rel=1e-6)
    assert found["IS of x"][-1] == pytest.approx(studio.metrics(samples, "is")["is"], rel=1e-6)
    assert found["FID of x0"][-1] == pytest.approx(found["FID of x"][-1], rel=1e-6)  # the last step adds no noise
    assert found["FID of x"][0] == pytest.approx(studio.fid(studio.data.to_raw(first)), rel=0.2)  # after a step
    sampler = fd.Sampler(run.model, run.diffusion, "ddpm", TINY.timesteps, clip=1.0)
    x0 = next(iter(sampler.iterate(first.shape, seed=0, y=studio.labels(count)))).x0
    assert found["FID of x0"][0] == pytest.approx(studio.fid(studio.data.to_raw(x0)), rel=1e-6)


def test_a_sweep_compares_its_strength_with_none(tmp_path) -> None:
    def scores(accuracy: float, diversity: float) -> list[Score]:
        return [Score(1.0, 2.0, 0.5, 0.5, accuracy + k / 100, diversity - k / 100) for k in range(3)]

    page = Page(tmp_path, "name", "title", "text")
    by_strength = {0.0: scores(0.2, 1.0), 1.0: scores(0.9, 0.9), 2.0: scores(0.6, 0.5)}
    sweep(page, "w", by_strength, 2.0, "samples", [("another", scores(0.4, 0.4))])
    assert [claim["verdict"] for claim in page.claims] == ["holds", "holds"]
    assert page.claims[0]["larger"]["value"] == pytest.approx(0.61)
    assert page.claims[1]["smaller"]["value"] == pytest.approx(0.49)
    [table] = page.tables
    assert [row[0] for row in table["rows"]] == ["w = 0", "w = 1", "w = 2", "another"]
    assert table["rows"][1][table["columns"].index("read as asked for")]["value"] == pytest.approx(0.91)
    sweep(page, "w", dict(reversed(by_strength.items())), 0.0, "samples")
    assert [claim["verdict"] for claim in page.claims[2:]] == ["reversed", "reversed"]


# ---- oracles ----------------------------------------------------------------------------------


def test_interval_is_students() -> None:
    values = [1.0, 2.5, 3.0, 7.0]
    mean = Mean.of(values)
    low, high = stats.t.interval(0.95, 3, loc=statistics.fmean(values), scale=stats.sem(values))
    assert mean.value - mean.margin == pytest.approx(low)
    assert mean.value + mean.margin == pytest.approx(high)
    assert Mean.of([2.0]) == Mean(2.0, None)


def test_verdicts(tmp_path) -> None:
    page = Page(tmp_path, "name", "title", "text")
    page.claim("apart", [3.0, 3.1, 3.2], [1.0, 1.1, 1.0])
    page.claim("apart, the other way", [1.0, 1.1, 1.0], [3.0, 3.1, 3.2])
    page.claim("mixed", [3.0, 1.0, 3.2], [1.0, 3.1, 1.0])
    page.claim("one seed says nothing", [3.0], [1.0])
    page.claim("by a factor", [3.0, 3.1, 3.2], [1.0, 1.1, 1.0], factor=4.0)
    assert [claim["verdict"] for claim in page.claims] == ["holds", "reversed", "open", "open", "reversed"]


def test_exact_x0_of_gaussian_data() -> None:
    """E[x0 | x_t] of N(0, s^2) data is s^2 alpha x_t / (alpha^2 s^2 + sigma^2)."""
    s, alpha, sigma = 0.8, 0.7, 0.6
    data = s * fd.noise.normal((200_000, 1), seed=1)
    x_t = torch.tensor([[-1.0], [0.0], [0.5]])
    expected = s**2 * alpha * x_t / (alpha**2 * s**2 + sigma**2)
    assert (exact_x0(data, x_t, alpha, sigma) - expected).abs().max() < 0.01


@pytest.mark.parametrize("disturb", DISTURBANCES, ids=lambda f: f.__name__)
def test_level_zero_disturbs_nothing(disturb) -> None:
    x = torch.rand(4, 3, 8, 8) * 2 - 1
    assert (disturb(x, 0.0) - x).abs().max() < 1e-5
    assert disturb(x, 0.5).shape == x.shape
    assert (disturb(x, 0.5, seed=3) - x).abs().max() > 0.1


# ---- other data -------------------------------------------------------------------------------


def of_data(tmp_path, name, data, **settings) -> dict:
    studio = Studio(tmp_path / "gallery", data, replace(TINY, seeds=1, **settings))
    command.run(studio, name, name, {})
    report = json.loads((tmp_path / "gallery" / name / "report.json").read_text(encoding="utf-8"))
    assert report["figures"]
    return report


@pytest.mark.parametrize(("name", "kind"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_files(tmp_path, name, kind) -> None:
    write_mnist(tmp_path, kind, images=rng().integers(0, 256, (30, 28, 28), dtype="uint8"))
    of_data(tmp_path, "ddpm", f"{name}:{tmp_path}")


def test_emnist_files(tmp_path, monkeypatch) -> None:
    images = rng().integers(0, 256, (52, 28, 28), dtype="uint8")
    write_emnist(tmp_path, monkeypatch, images, 1 + torch.arange(52).numpy() % 26)
    report = of_data(tmp_path, "emnist-letters", f"emnist:{tmp_path}", count=52, chain_count=52)
    assert report["claims"][0]["smaller"]["value"] == pytest.approx(1 / 26)


def test_cifar10_files_are_coloured_too(tmp_path, monkeypatch) -> None:
    write_cifar(tmp_path, monkeypatch)
    report = of_data(tmp_path, "palette", f"cifar10:{tmp_path}", image_size=8)
    assert [row[0] for row in report["tables"][0]["rows"]][-1] == "colourisation"


def test_a_folder_of_classes(tmp_path) -> None:
    for i in range(12):
        save(tmp_path / "images" / "ab"[i % 2] / f"{i}.png", colours(8, 8, seed=i))
    of_data(tmp_path, "disturbances", f"folder:{tmp_path / 'images'}")


# ---- the command ------------------------------------------------------------------------------


def test_the_command_leaves_a_gallery(tmp_path, capsys) -> None:
    assert main(["reproduce", "disturbances", "vdm", "--out", str(tmp_path), *OPTIONS]) == 0
    shown = capsys.readouterr().out
    assert "disturbances: " in shown
    assert "vdm: " in shown
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "disturbances/fid.png" in page
    report = json.loads((tmp_path / "vdm" / "report.json").read_text(encoding="utf-8"))
    assert report["command"].startswith("fastdiff reproduce vdm --train-steps 3")
    assert report["settings"]["timesteps"] == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "recipe"),
        (["ddpm", "--seeds", "0"], "seeds must be at least 1"),
        (["ddpm", "--count", "19"], "count and chain_count must be at least 20, two for each class, got 19"),
        (["ddpm", "--data", "swiss-roll"], "images with labels"),
        (["ddpm", "--data", "nothing"], "data set"),
        (["ddpm", "--train-steps", "0"], "train_steps must be at least 1"),
        (["ddpm", "--model", "nothing"], "model"),
        ([], "NAME"),
    ],
)
def test_bad_input(tmp_path, capsys, arguments, message) -> None:
    assert main(["reproduce", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*/report.json"))


def test_a_recipe_without_a_name() -> None:
    with pytest.raises((InputError, ModuleNotFoundError)):
        recipe("nothing")


def test_every_recipe_says_what_it_is() -> None:
    for name in NAMES:
        title, _, text = recipe(name).__doc__.partition("\n")
        assert title
        assert len(text.split()) > 15


# ---- the sources ------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [row for rows in sources.ROWS.values() for row in rows], ids=lambda row: row.what)
def test_every_thing_of_the_sources_is_where_it_is_said_to_be(studio, row) -> None:
    module, _, name = row.code.partition(":")
    assert hasattr(importlib.import_module(module), name)
    file, _, test = row.test.partition("::")
    assert f"def {test}(" in (Path(__file__).parent / file).read_text(encoding="utf-8")
    name, _, figure = row.shown.partition("/")
    folder = studio.folder / name
    if not folder.exists():
        command.run(studio, name, name, {})
    assert (folder / figure).is_file()


def test_the_page_of_sources_is_up_to_date() -> None:
    assert sources.PAGE.read_text(encoding="utf-8") == sources.page()


# ---- the project's own pages ------------------------------------------------------------------


@pytest.mark.skipif(not summary.KEPT.is_file(), reason="results are kept in a clone")
def test_what_the_pages_say_is_what_was_found() -> None:
    found = json.loads(summary.KEPT.read_text(encoding="utf-8"))
    assert tuple(found) == NAMES
    assert summary.RESULTS.read_text(encoding="utf-8") == summary.results(found)
    readme = summary.README.read_text(encoding="utf-8")
    assert summary.with_block(readme, found) == readme
    for file in summary.PICTURES:
        assert (summary.IMAGES / file.replace("/", "-")).is_file()


def test_a_readme_without_marks_is_refused() -> None:
    found = {"a": {"claims": []}}
    assert "Of 0 orderings" in summary.with_block("x\n<!-- reproduce -->\nold\n<!-- /reproduce -->\ny\n", found)
    with pytest.raises(InputError, match="no marks"):
        summary.with_block("x", found)
