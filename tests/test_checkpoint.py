"""A checkpoint exists only when it is whole: kills, full disks, damage, versions and foreign files."""

import contextlib
import json
import os
import pickle
import re
import signal

import pytest
import torch

from fastdiff import InputError, _io
from fastdiff.training import checkpoint, manifest

WRITES = 5  # synced by a save: three files, their directory, and the name of it


def tensors(step: int) -> dict:
    """Contents that tell their step, so that a mixture of two checkpoints shows."""
    return {"model": {"w": torch.full((64, 64), float(step)), "n": torch.tensor(step)}}


def save(run, step, **options):
    return checkpoint.save(run, step, tensors(step), {"config": {"step": step}}, **options)


def assert_whole(saved, step):
    assert saved.step == step
    assert saved.json("config") == {"step": step}
    assert torch.equal(saved.tensors("model")["w"], tensors(step)["model"]["w"])


def in_child(work) -> int:
    """Run ``work`` in a forked child; returns its wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def kill_at(call: int) -> None:
    """Make the ``call``-th step of any write the last thing this process does."""
    count = 0

    def before(function):
        def wrapped(*arguments, **options):
            nonlocal count
            count += 1
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return wrapped

    for name in ("open", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, before(getattr(os, name)))


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def test_what_was_saved_is_loaded(run):
    path = save(run, 7)
    for where in (run, path, path / "model.safetensors"):
        assert_whole(checkpoint.load(where), 7)


def test_the_newest_is_loaded_and_old_ones_go(run):
    for step in (1, 2, 3, 10):
        save(run, step, keep=2)
    assert [p.name for p in checkpoint.steps(run)] == ["step-00000010", "step-00000003"]
    assert_whole(checkpoint.load(run), 10)


def test_saving_a_step_again_keeps_the_first(run):
    path = save(run, 3)
    before = {p.name: p.stat().st_mtime_ns for p in path.iterdir()}
    save(run, 3)
    assert {p.name: p.stat().st_mtime_ns for p in path.iterdir()} == before


def test_kill_at_every_system_call_loses_nothing(run):
    save(run, 1)
    killed = 0
    for call in range(1, 200):
        status = in_child(lambda call=call: (kill_at(call), save(run, 2, keep=1)))
        whole = checkpoint.load(run)
        assert_whole(whole, whole.step)
        if not os.WIFSIGNALED(status):
            break
        killed += 1
        if whole.step == 2:  # committed before it died: start over from the old state
            for path in checkpoint.steps(run):
                _io.discard(path)
            save(run, 1)
    assert status == 0
    assert killed >= 12
    assert_whole(checkpoint.load(run), 2)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000002"], "litter is left"


def _saves_forever(run):
    step = checkpoint.load(run).step
    while True:
        step += 1
        save(run, step)


@pytest.mark.parametrize("count", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_kill_at_random_times_loses_nothing(run, count):
    save(run, 0)
    delays = torch.rand(count, generator=torch.Generator().manual_seed(0)) * 0.03
    last = 0
    for delay in delays.tolist():
        child = os.fork()
        if child == 0:
            signal.setitimer(signal.ITIMER_REAL, 10)
            _saves_forever(run)
        signal.sigtimedwait([], delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        saved = checkpoint.load(run)
        assert_whole(saved, saved.step)
        assert saved.step >= last
        last = saved.step
    assert last > 0


def test_a_failing_write_leaves_the_old_checkpoint_and_no_litter(run, monkeypatch):
    save(run, 1)
    original = os.fsync
    for failing in range(1, WRITES + 2):
        calls = iter(range(1, 100))

        def fsync(descriptor, failing=failing, calls=calls):
            if next(calls) == failing:
                raise OSError(28, "No space left on device")
            original(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left") if failing <= WRITES else contextlib.nullcontext():
            save(run, 2)
        monkeypatch.setattr(os, "fsync", original)
        assert checkpoint.load(run).step in (1, 2)
        names = {p.name for p in (run / "checkpoints").iterdir()}
        assert names <= {"step-00000001", "step-00000002"}


def in_parts(run, step):
    """A checkpoint as two processes write it."""
    halves = tensors(step)["model"]["w"].chunk(2)
    parts = {f"model.{rank}-of-2": {"w": half} for rank, half in enumerate(halves)}
    return checkpoint.save(run, step, parts, {"config": {"step": step}})


@pytest.mark.parametrize("count", [60, pytest.param(2500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("made", [save, in_parts])
def test_every_bit_flip_is_found(run, made, count):
    path = made(run, 1)
    places = torch.Generator().manual_seed(1)
    for name in sorted(file.name for file in path.iterdir()):
        whole = (path / name).read_bytes()
        for _ in range(count):
            at = int(torch.randint(len(whole), (), generator=places))
            bit = int(torch.randint(8, (), generator=places))
            (path / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            try:
                saved = checkpoint.load(path)
            except InputError:
                continue
            assert name == "manifest.json", "a damaged file was taken for whole"
            assert_whole(saved, saved.step if saved.step == 1 else pytest.fail("the step was changed"))
        (path / name).write_bytes(whole)


def swapped(newest, other):
    a, b = sorted(newest.glob("model.*"))
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second), b.write_bytes(first)


def missing(newest, other):
    next(newest.glob("model.1-of-2*")).unlink()


def of_another_step(newest, other):
    for file in other.glob("model.1-of-2*"):
        (newest / file.name).write_bytes(file.read_bytes())


@pytest.mark.parametrize("harm", [swapped, missing, of_another_step])
def test_parts_that_are_not_the_checkpoint_s_are_found(run, harm):
    other = in_parts(run, 1)
    in_parts(run, 2)
    with torch.random.fork_rng():
        halves = [torch.randn(32, 64), torch.randn(32, 64)]
    checkpoint.save(run, 3, {f"model.{rank}-of-2": {"w": half} for rank, half in enumerate(halves)}, {}, keep=3)
    newest = checkpoint.steps(run)[0]
    harm(newest, other)
    with pytest.raises(InputError, match=r"model\.\d-of-2\.safetensors (is damaged|cannot be read)"):
        checkpoint.load(newest)
    with pytest.warns(UserWarning, match="step-00000002 instead"):
        assert_whole(checkpoint.load(run), 2)


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_truncation_is_found(run, count):
    path = in_parts(run, 1)
    places = torch.Generator().manual_seed(2)
    for name in sorted(file.name for file in path.iterdir()):
        whole = (path / name).read_bytes()
        for at in torch.randint(len(whole), (count // 4,), generator=places).tolist():
            (path / name).write_bytes(whole[:at])
            with pytest.raises(InputError):
                checkpoint.load(path)
        (path / name).write_bytes(whole)
    assert_whole(checkpoint.load(path), 1)


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_truncation_is_found_and_an_older_checkpoint_is_used(run, length):
    save(run, 1)
    newest = save(run, 2)
    content = (newest / "model.safetensors").read_bytes()
    (newest / "model.safetensors").write_bytes(content[:length])
    with pytest.raises(InputError, match=r"model\.safetensors has \d+ bytes instead of \d+"):
        checkpoint.load(newest)
    with pytest.warns(UserWarning, match="step-00000001 instead"):
        assert_whole(checkpoint.load(run), 1)


def test_a_directory_without_manifest_does_not_exist(run):
    save(run, 1)
    newest = save(run, 2)
    (newest / "manifest.json").unlink()
    with pytest.warns(UserWarning, match=r"manifest\.json"):
        assert_whole(checkpoint.load(run), 1)


def test_checkpoints_without_a_seal_are_still_read(run):
    path = save(run, 1)
    (path / "manifest.json").write_text(json.dumps({**manifest.read(path), "format": 1}))
    assert_whole(checkpoint.load(run), 1)


def test_a_newer_format_is_refused_not_passed_over(run):
    save(run, 1)
    newest = save(run, 2)
    (newest / "manifest.json").write_text(json.dumps({**manifest.read(newest), "format": 99}))
    for where in (run, newest):
        with pytest.raises(InputError, match=r"format 99.*upgrade"):
            checkpoint.load(where)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/b", ""])
def test_a_manifest_cannot_name_files_elsewhere(run, name):
    path = save(run, 1)
    rewrite(path, **{name: {"bytes": 1, "sha256": "0" * 64}})
    with pytest.raises(InputError, match=r"is not a plain file name|cannot be read"):
        checkpoint.load(path)


def rewrite(path, **files):
    """The manifest of a checkpoint, with other files."""
    whole = manifest.read(path)
    (path / "manifest.json").unlink()
    manifest.write(path, whole["step"], {**whole["files"], **files})


class Payload:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (open, (str(self.canary), "w"))


@pytest.mark.parametrize("name", ["model.pt", "model.pkl", "model.safetensors"])
def test_a_pickle_is_never_opened(tmp_path, name):
    canary, file = tmp_path / "canary", tmp_path / name
    file.write_bytes(pickle.dumps(Payload(canary)))
    with pytest.raises(InputError, match="not part of a fastdiff checkpoint"):
        checkpoint.load(file)
    assert not canary.exists()


def test_a_pickle_inside_a_checkpoint_is_not_executed(run, tmp_path):
    path, canary = save(run, 1), tmp_path / "canary"
    content = pickle.dumps(Payload(canary))
    (path / "model.safetensors").write_bytes(content)
    rewrite(path, **{"model.safetensors": manifest.digest(content)})
    with pytest.raises(InputError, match="cannot be read"):
        checkpoint.load(path).tensors("model")
    assert not canary.exists()


def test_nothing_in_the_package_unpickles():
    """Peers' own files are read by the one call that runs no code of theirs."""
    package = os.path.dirname(checkpoint.__file__) + "/.."
    safe = re.compile(r'torch\.load\([\w.()]+, map_location="cpu", weights_only=True\)')
    banned = ("pickle.load", "torch.load(", "weights_only=False", "yaml.load", "eval(", "exec(", "extractall")
    for folder, _, files in os.walk(package):
        for file in files:
            if file.endswith(".py"):
                with open(os.path.join(folder, file), encoding="utf-8") as source:
                    text = source.read().replace(".eval()", "").replace("safetensors.torch.load(", "")
                text = safe.sub("", text)
                assert not [word for word in banned if word in text], file


def test_rotation_never_removes_what_was_just_saved(run):
    for step in (1, 2, 3):
        save(run, step, keep=3)
    for path in checkpoint.steps(run)[:2]:
        (path / "manifest.json").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="step-00000001 instead"):
        assert checkpoint.load(run).step == 1
    save(run, 2, keep=2)
    assert [p.name for p in checkpoint.steps(run)] == ["step-00000002", "step-00000001"]
    assert_whole(checkpoint.load(run), 2)


def test_a_directory_of_ones_own_is_left_alone(run):
    own = run / "checkpoints" / "step-best"
    own.mkdir(parents=True)
    for step in (1, 2, 3):
        save(run, step, keep=1)
    assert own.exists()
    assert_whole(checkpoint.load(run), 3)
