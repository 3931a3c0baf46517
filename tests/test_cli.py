"""The commands do their job on small runs, and end bad input in one line with status 2 and nothing half-written."""

import json
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fastdiff import _io
from fastdiff.cli import demo, main
from fastdiff.training import checkpoint
from fastdiff.training.config import TrainConfig


def run(*arguments) -> int:
    return main([str(a) for a in arguments])


def train(out, *arguments) -> int:
    return run("train", "--out", out, "--train-steps", 2, "--batch", 4, *arguments)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    assert train(out, "--data", "digits") == 0
    return out


@pytest.fixture(scope="module")
def roll(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "roll"
    assert train(out, "--data", "swiss-roll") == 0
    return out


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "classifier"
    assert train(out, "--classifier", "--data", "digits") == 0
    return out


def picture(path):
    """Mode, size and number of frames of an image file."""
    with Image.open(path) as image:
        return image.mode, image.size, getattr(image, "n_frames", 1)


def arrays(folder):
    with np.load(folder / "samples.npz") as samples:
        return dict(samples)


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- the main paths --------------------------------------------------------------------------------


def test_train_leaves_a_whole_run(digits):
    config = json.loads((digits / "config.json").read_text())
    assert config["training"]["batch"] == 4
    assert config["data"]["name"] == "digits"
    assert checkpoint.load(digits).step == 2
    assert picture(digits / "loss.png")[1][0] > 100
    assert len((digits / "log.jsonl").read_text().splitlines()) == 2


def test_sample_images(digits, tmp_path):
    options = ("--count", 7, "--labels", "3,5", "--steps", 3, "--guidance-scale", 1.5)
    assert run("sample", "--checkpoint", digits, "--out", tmp_path, *options) == 0
    samples = arrays(tmp_path)
    assert samples["arr_0"].shape == (7, 8, 8, 1)
    assert samples["arr_0"].dtype == np.uint8
    assert samples["arr_1"].tolist() == [3, 5, 3, 5, 3, 5, 3]
    assert picture(tmp_path / "samples.png")[0] == "L"
    assert json.loads((tmp_path / "samples.json").read_text())["settings"]["steps"] == 3


def test_sample_points(roll, tmp_path):
    assert run("sample", "--checkpoint", roll, "--out", tmp_path, "--count", 50, "--steps", 4) == 0
    samples = arrays(tmp_path)
    assert list(samples) == ["arr_0"]
    assert samples["arr_0"].shape == (50, 2)
    assert samples["arr_0"].dtype == np.float32
    assert picture(tmp_path / "samples.png")[1][0] > 500


def test_sample_writes_into_the_run_by_default(roll):
    assert run("sample", "--checkpoint", roll, "--count", 2, "--steps", 1) == 0
    assert (roll / "samples" / "samples.npz").exists()


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "euler", "euler_a", "heun", "dpmpp_2m"])
def test_samples_do_not_depend_on_the_batch(digits, tmp_path, solver):
    for batch in (2, 5):
        options = ("--count", 5, "--batch", batch, "--steps", 4, "--solver", solver, "--seed", 3)
        assert run("sample", "--checkpoint", digits, "--out", tmp_path / str(batch), *options) == 0
    a, b = (arrays(tmp_path / str(batch))["arr_0"].astype(int) for batch in (2, 5))
    assert np.abs(a - b).max() <= 1  # the network's own rounding may depend on the batch


def test_train_resumes(tmp_path):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    common = ("--data", "parabola", "--batch", 4, "--decay", "constant")
    assert run("train", "--out", straight, *common, "--train-steps", 4) == 0
    assert run("train", "--out", cut, *common, "--train-steps", 2) == 0
    assert run("train", "--out", cut, *common, "--train-steps", 4, "--resume") == 0
    a, b = checkpoint.load(straight), checkpoint.load(cut)
    assert all(a.files[name] == b.files[name] for name in a.files if name != "config.json")


def test_train_a_classifier(classifier, tmp_path, monkeypatch):
    config = json.loads((classifier / "config.json").read_text())
    assert config["model"]["type"] == "classifier"
    assert config["model"]["num_classes"] == 10
    rows = [json.loads(line) for line in (classifier / "log.jsonl").read_text().splitlines()]
    assert all(row.keys() >= {"step", "loss", "accuracy", "grad_norm"} for row in rows)
    assert "loss_by_timestep" not in rows[-1]
    assert picture(classifier / "loss.png")[1][0] > 100
    monkeypatch.chdir(tmp_path)
    options = ("--batch", 4, "--schedule", "linear", "--seed", 3, "--decay", "constant")
    assert run("train", "--classifier", "--train-steps", 1, *options) == 0
    assert run("train", "--classifier", "--train-steps", 2, *options, "--resume") == 0
    assert [path.name for path in tmp_path.glob("runs/*")] == ["digits-classifier"]
    assert checkpoint.load(tmp_path / "runs" / "digits-classifier").step == 2


def test_sample_guided_by_a_classifier(digits, classifier, tmp_path):
    common = ("sample", "--count", 5, "--steps", 3, "--labels", "3,5")
    drawn = {}
    for scale in (None, 0, 50):
        options = () if scale is None else ("--classifier", classifier, "--classifier-scale", scale)
        assert run(*common, "--checkpoint", digits, "--out", tmp_path / str(scale), *options) == 0
        drawn[scale] = arrays(tmp_path / str(scale))
    assert drawn[50]["arr_1"].tolist() == [3, 5, 3, 5, 3]
    assert np.array_equal(drawn[0]["arr_0"], drawn[None]["arr_0"])  # the model alone
    assert not np.array_equal(drawn[50]["arr_0"], drawn[None]["arr_0"])
    settings = json.loads((tmp_path / "50" / "samples.json").read_text())["settings"]
    assert (settings["classifier"], settings["classifier_scale"]) == (str(classifier), 50)


def test_a_classifier_gives_an_unconditional_model_its_classes(digits, classifier, tmp_path):
    network = {**json.loads((digits / "config.json").read_text())["model"], "num_classes": None}
    (tmp_path / "model.json").write_text(json.dumps(network))
    assert train(tmp_path / "run", "--model", tmp_path / "model.json") == 0
    common = ("sample", "--checkpoint", tmp_path / "run", "--count", 3, "--steps", 2)
    assert run(*common) == 0
    assert list(arrays(tmp_path / "run" / "samples")) == ["arr_0"]
    assert run(*common, "--classifier", classifier, "--out", tmp_path / "guided", "--labels", 7) == 0
    assert arrays(tmp_path / "guided")["arr_1"].tolist() == [7, 7, 7]


def test_demo_leaves_everything_it_promises(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TRAINING", TrainConfig(train_steps=3, batch=8))
    monkeypatch.setattr(demo, "SAMPLING", demo.SampleConfig(count=200, steps=3, guidance_scale=1.5))
    results = []
    for _ in range(2):  # again into the same directory
        assert run("demo", "--out", tmp_path / "demo", "--seed", 5) == 0
        results.append(files(tmp_path / "demo"))
    pictures = {"samples.png", "denoising.gif", "forward.png", "loss.png"}
    assert results[0].keys() >= pictures | {"samples.npz", "report.json", "config.json", "log.jsonl"}
    same = [name for name in results[0] if name not in ("report.json", "log.jsonl")]  # which hold times
    assert [name for name in same if results[0][name] != results[1][name]] == []
    report = json.loads(results[0]["report.json"])
    keys = "class_accuracy intra_class_diversity train_seconds sample_seconds images_per_second settings"
    assert report.keys() >= set(keys.split())
    assert picture(tmp_path / "demo" / "denoising.gif")[2] >= 3
    samples = arrays(tmp_path / "demo")
    assert np.bincount(samples["arr_1"]).tolist() == [20] * 10


def test_demo_does_not_touch_another_run(roll, capsys):
    before = files(roll)
    assert run("demo", "--out", roll) == 2
    assert "holds another run" in capsys.readouterr().err
    assert files(roll) == before


def test_judge_tells_good_from_bad():
    data = demo.load("digits")
    x, y = data.batch(demo.torch.arange(len(data)))
    good = demo.judge(data.to_raw(x), y, data)
    assert good["class_accuracy"] > 0.98
    assert good["intra_class_diversity"] == pytest.approx(1, abs=1e-6)
    assert good["real_class_accuracy"] > 0.97
    bad = demo.judge(data.to_raw(x), (y + 1) % 10, data)
    assert bad["class_accuracy"] < 0.02


def test_info_names_versions_and_backends(capsys):
    assert run("info", "--device", "cpu") == 0
    printed = capsys.readouterr().out
    for word in ("fastdiff", "torch", "affine_step", "group_norm_silu", "native", "not triton"):
        assert word in printed


def test_progress_is_plain_lines_without_a_terminal(tmp_path, capsys):
    assert train(tmp_path / "run", "--data", "parabola") == 0
    err = capsys.readouterr().err
    assert "training: 2/2" in err
    assert "\r" not in err


def test_exit_status_and_one_line_in_a_process(tmp_path):
    command = [sys.executable, "-m", "fastdiff", "sample", "--checkpoint", str(tmp_path / "nothing")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "does not exist" in result.stderr
    assert result.stdout == ""


# ---- bad input ---------------------------------------------------------------------------------------

BAD_TRAINING = {
    "data": ("--data", "nope", "unknown data set 'nope'"),
    "folder missing": ("--data", "folder:/no/such/folder", "does not exist"),
    "folder without path": ("--data", "folder:", "lacks its path"),
    "no mnist files": ("--data", "mnist:/no/such/root", "mnist"),
    "model": ("--model", "resnet", "unknown model 'resnet'"),
    "model of points for images": ("--model", "mlp", "model mlp does not fit digits"),
    "model file": ("--model", "/no/such.json", r"/no/such\.json"),
    "schedule": ("--schedule", "quadratic", "unknown schedule 'quadratic'"),
    "timesteps": ("--timesteps", "0", "timesteps"),
    "timesteps no number": ("--timesteps", "many", "--timesteps"),
    "prediction": ("--prediction", "noise", "unknown prediction 'noise'"),
    "variance": ("--variance", "free", "unknown variance 'free'"),
    "variance not trained": ("--variance", "learned_range", "does not train a learned variance"),
    "loss": ("--loss", "l1", "unknown loss 'l1'"),
    "train steps": ("--train-steps", "0", "train_steps must be at least 1"),
    "batch": ("--batch", "-3", "batch must be at least 1"),
    "learning rate": ("--learning-rate", "nan", "learning_rate must be positive"),
    "ema": ("--ema", "1.5", "1.5"),
    "label dropout": ("--label-dropout", "1", "label_dropout"),
    "precision": ("--precision", "fp8", "unknown precision 'fp8'"),
    "decay": ("--decay", "step", "unknown decay 'step'"),
    "seed": ("--seed", "99999999999999999999", "seed"),
    "backend": ("--backend", "cudnn", "unknown backend 'cudnn'"),
    "backend that cannot serve": ("--backend", "triton", "triton runs on cuda"),
    "device": ("--device", "warp", "--device warp"),
    "image size": ("--image-size", "0", "image_size"),
    "option": ("--epochs", "3", "--epochs"),
    "save every": ("--save-every", "0", "save_every"),
    "clip": ("--clip-grad", "-1", "clip_grad"),
}


@pytest.mark.parametrize("case", BAD_TRAINING)
def test_bad_training_ends_in_one_line(case, tmp_path, capsys):
    option, value, message = BAD_TRAINING[case]
    if case == "no mnist files":
        pytest.importorskip("torchvision")
    out = tmp_path / "run"
    assert run("train", "--out", out, option, value) == 2
    _assert_one_line(capsys, message)
    assert not out.exists(), "something was written"


BAD_SAMPLING = {
    "steps zero": ("--steps", "0", "steps must lie in 1...1000, got 0"),
    "steps above T": ("--steps", "1001", "steps must lie in 1...1000, got 1001"),
    "steps no number": ("--steps", "ten", "--steps"),
    "solver": ("--solver", "rk4", "unknown solver 'rk4'"),
    "spacing": ("--spacing", "even", "unknown spacing 'even'"),
    "count": ("--count", "0", "count must be at least 1"),
    "batch": ("--batch", "0", "batch must be at least 1"),
    "labels out of range": ("--labels", "3,10", r"--labels must lie in 0\.\.\.9"),
    "labels no numbers": ("--labels", "three", "--labels must be whole numbers"),
    "guidance": ("--guidance-scale", "inf", "guidance_scale must be finite"),
    "precision": ("--precision", "int8", "unknown precision 'int8'"),
    "device": ("--device", "cuda:99", "--device cuda:99"),
    "seed": ("--seed", "99999999999999999999", "seed"),
    "checkpoint": ("--checkpoint", "/no/such/run", "does not exist"),
}


@pytest.mark.parametrize("case", BAD_SAMPLING)
def test_bad_sampling_ends_in_one_line(case, digits, tmp_path, capsys):
    option, value, message = BAD_SAMPLING[case]
    out = tmp_path / "samples"
    assert run("sample", "--checkpoint", digits, "--count", 3, "--steps", 2, "--out", out, option, value) == 2
    _assert_one_line(capsys, message)
    assert not out.exists(), "something was written"


def test_misuse_of_classifiers_ends_in_one_line(digits, roll, classifier, tmp_path, capsys):
    other, large = tmp_path / "other", tmp_path / "large"
    options = ("--classifier", "--train-steps", 1, "--batch", 2)
    assert run("train", *options, "--schedule", "linear", "--out", other) == 0
    assert run("train", *options, "--image-size", 16, "--out", large) == 0
    folder = tmp_path / "folder" / "one"
    folder.mkdir(parents=True)
    Image.new("L", (8, 8)).save(folder / "image.png")
    assert run("train", *options, "--data", f"folder:{folder.parent}", "--out", tmp_path / "one") == 0
    new, guided = ("train", "--out", tmp_path / "new"), ("sample", "--checkpoint", digits, "--out", tmp_path / "new")
    for arguments, message in [
        (
            (*new, "--classifier", "--data", "swiss-roll"),
            "swiss-roll has no labels, which a classifier needs: digits",
        ),
        ((*new, "--classifier", "--model", "unet-small"), "--classifier trains no unet: leave out --model unet-small"),
        ((*new, "--classifier", "--prediction", "epsilon"), "prediction: settings of diffusion models"),
        ((*new, "--classifier", "--data", f"folder:{folder}"), "has no labels"),
        (("sample", "--checkpoint", classifier), "holds a classifier: give the run of a diffusion model"),
        (("convert", classifier, tmp_path / "new", "--to", "diffusers"), "holds a classifier"),
        ((*guided, "--classifier-scale", 2), "--classifier-scale needs --classifier"),
        ((*guided, "--classifier", classifier, "--guidance-scale", 2), "--guidance-scale is not that of --classifier"),
        ((*guided, "--classifier", classifier, "--classifier-scale", "nan"), "classifier_scale must be finite"),
        ((*guided, "--classifier", classifier, "--labels", "11"), r"--labels must lie in 0\.\.\.9"),
        ((*guided, "--classifier", digits), "holds no classifier but a UNet: fastdiff train --classifier makes one"),
        ((*guided, "--classifier", tmp_path / "nothing"), "nothing does not exist"),
        ((*guided, "--classifier", other), "reads the noise levels of Schedule.linear.*has those of Schedule.cosine"),
        ((*guided, "--classifier", large), r"reads samples of \[1, 16, 16\], the model makes \[1, 8, 8\]"),
        ((*guided, "--classifier", tmp_path / "one"), "reads the classes of folder:.*, the model has those of digits"),
        (("sample", "--checkpoint", roll, "--classifier", classifier), r"the model makes \[2\]"),
    ]:
        capsys.readouterr()
        assert run(*arguments) == 2, arguments
        _assert_one_line(capsys, message)
    assert not (tmp_path / "new").exists()


def damage_nothing_there(run_):
    for path in checkpoint.steps(run_):
        _io.discard(path)


def damage_truncated(run_):
    file = checkpoint.steps(run_)[0] / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def damage_bit(run_):
    file = checkpoint.steps(run_)[0] / "ema.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(bytes(content))


def damage_newer(run_):
    file = checkpoint.steps(run_)[0] / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 3}))


def damage_no_manifest(run_):
    (checkpoint.steps(run_)[0] / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_nothing_there, "holds no checkpoint"),
        (damage_truncated, "bytes instead of"),
        (damage_bit, "SHA-256 does not match"),
        (damage_newer, "upgrade it"),
        (damage_no_manifest, "no readable manifest"),
    ],
)
def test_a_damaged_checkpoint_ends_in_one_line(damage, message, tmp_path, capsys):
    assert train(tmp_path / "run", "--data", "parabola") == 0
    damage(tmp_path / "run")
    capsys.readouterr()
    assert run("sample", "--checkpoint", tmp_path / "run", "--out", tmp_path / "samples") == 2
    _assert_one_line(capsys, message)
    assert not (tmp_path / "samples").exists()


class Payload:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (open, (str(self.canary), "w"))


def test_a_pickle_ends_in_one_line_and_is_not_executed(tmp_path, capsys):
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Payload(tmp_path / "canary")))
    assert run("sample", "--checkpoint", tmp_path / "model.pt", "--out", tmp_path / "samples") == 2
    _assert_one_line(capsys, "pickles are never opened")
    assert not (tmp_path / "canary").exists()


def test_other_misuse_ends_in_one_line(digits, roll, tmp_path, capsys):
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    (broken / "image.png").write_bytes(b"no image")
    for arguments, message in [
        (("dance",), "No such command 'dance'"),
        (("train", "--out", digits), "already holds a run"),
        (("train", "--out", tmp_path / "new", "--resume"), "new does not exist"),
        (("train", "--out", tmp_path / "new", "--data", f"folder:{empty}"), "holds no images"),
        (("train", "--out", tmp_path / "new", "--data", f"folder:{broken}"), "image.png cannot be read"),
        (("sample", "--checkpoint", roll, "--labels", "3"), "not class-conditional"),
        (("sample", "--checkpoint", roll, "--guidance-scale", "2"), "needs a condition"),
        (("sample", "--checkpoint", empty), "holds no checkpoint"),
        (("train", "--out", digits / "config.json" / "below", "--train-steps", "1"), "config.json"),
    ]:
        capsys.readouterr()
        assert run(*arguments) == 2, arguments
        _assert_one_line(capsys, message)
    assert not (tmp_path / "new").exists()


def _assert_one_line(capsys, message):
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1, printed.err
    assert lines[0].startswith("fastdiff: ")
    assert re.search(message, lines[0]), lines[0]
    assert printed.out == ""
