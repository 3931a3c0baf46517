"""What training sees depends on (seed, step, position) only; workers end, and whatever ends them is one line."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from test_shards import numbered, picture, write_tar

from fastdiff import InputError
from fastdiff.noise import Stream, uniform_words
from fastdiff.training import loader as module
from fastdiff.training.data import Data, Source, from_tensor, load
from fastdiff.training.loader import Loader
from fastdiff.training.order import Order

pytestmark = pytest.mark.usefixtures("one_thread")
COUNT = 30


def alive(pid):
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def soon(condition, seconds):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()


def remains():
    """Zombies and live children of this process, and shared memory that is its own, or nobody's."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, _, fields = stat.read_text().rpartition(")")
            command = (stat.parent / "cmdline").read_text()
            lasting = "resource_tracker" in command or "forkserver" in command  # Python's own, as long as it runs
            if int(fields.split()[1]) == os.getpid() and not lasting:
                children.append((name, fields.split()[0]))
    segments = [name for name in os.listdir("/dev/shm") if name.startswith("torch_")]
    return children, {name for name in segments if (pid := int(name.split("_")[1])) == os.getpid() or not alive(pid)}


@pytest.fixture(autouse=True)
def nothing_remains():
    children, segments = remains()
    yield
    left, more = remains()
    assert [child for child in left if child not in children] == []
    assert more <= segments


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """Looks for dead workers are frequent: tests wait for them."""
    monkeypatch.setattr(module, "POLL", 0.1)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The same images as a folder with classes, as tars and in memory."""
    place = tmp_path_factory.mktemp("sets")
    for i in range(COUNT):
        folder = place / "folder" / str(i % 3)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:04}.png").write_bytes(picture(i))
    for i, (first, count) in enumerate(((0, 9), (9, 1), (10, 7), (17, 5), (22, 8))):
        write_tar(place / "tars" / f"{i}.tar", numbered(count, first, label=lambda i: i % 3))
    tars = load(f"tar:{place}/tars")
    memory = from_tensor("memory", *tars.raw(torch.arange(COUNT)), tars.classes)
    return {"folder": load(f"folder:{place}/folder"), "tars": tars, "memory": memory}


def make(data, batch=8, positions=None, seed=5, **options):
    order = Order(len(data), seed, data.source.groups)
    return Loader(data, order, batch=batch, positions=positions or range(batch), seed=seed, **options)


def read(loader, start, stop):
    """All batches as two tensors."""
    found = list(loader.batches(start, stop))
    assert all(batch.skipped == () for batch in found)
    return torch.stack([batch.x for batch in found]), torch.stack([batch.y for batch in found])


def assert_same(a, b):
    assert a[0].dtype == torch.uint8
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


# ---- what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["folder", "tars", "memory"])
def test_batches_are_as_defined(sets, name):
    data = sets[name]
    order = Order(COUNT, 5, data.source.groups)
    x, y = read(make(data), 3, 12)
    for step in range(3, 12):
        expected = data.raw(order.indices(8 * step, 8))
        assert_same((x[step - 3], y[step - 3]), expected)
    x, y = read(make(data, augment="flip", seed=-7), 0, 40)
    flips = 0
    for step in range(40):
        plain, labels = data.raw(Order(COUNT, -7, data.source.groups).indices(8 * step, 8))
        words = uniform_words(8, seed=-7, step=step, sample=range(8), stream=Stream.AUGMENT).tolist()
        expected = [image.flip(2) if word < 2**31 else image for image, word in zip(plain, words, strict=True)]
        assert_same((x[step], y[step]), (torch.stack(expected), labels))
        flips += sum(word < 2**31 for word in words)
    assert 120 < flips < 200


@pytest.mark.parametrize("name", ["folder", "tars", "memory"])
def test_any_number_of_processes_and_workers(sets, name):
    data, options = sets[name], {"batch": 8, "augment": "flip"}
    whole = read(make(data, **options, workers=0), 0, 9)
    for processes, workers in ((1, 1), (1, 2), (2, 0), (2, 1), (4, 0), (4, 2)):
        size = 8 // processes
        shares = [range(rank * size, rank * size + size) for rank in range(processes)]
        parts = [read(make(data, positions=share, workers=workers, **options), 0, 9) for share in shares]
        assert_same([torch.cat(values, 1) for values in zip(*parts, strict=True)], whole)
    alternating = [read(make(data, positions=range(rank, 8, 2), **options, workers=0), 0, 9) for rank in range(2)]
    assert_same([torch.stack(values, 2).flatten(1, 2) for values in zip(*alternating, strict=True)], whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_at_any_step(sets, workers):
    whole = read(make(sets["tars"], augment="flip"), 0, 9)
    for step in range(9):
        assert_same(read(make(sets["tars"], augment="flip", workers=workers), step, 9), [v[step:] for v in whole])
    assert list(make(sets["tars"], workers=workers).batches(4, 4)) == []


@pytest.mark.parametrize("name", ["folder", "tars", "memory"])
def test_every_sample_once_an_epoch(sets, name):
    data = sets[name]
    everything = {bytes(image.flatten().tolist()) for image in data.raw(torch.arange(COUNT))[0]}
    x, _ = read(make(data, batch=6, workers=2), 0, 15)
    for epoch in x.flatten(0, 1).split(COUNT):
        assert {bytes(image.flatten().tolist()) for image in epoch} == everything
    assert len(everything) == COUNT


def test_points_in_memory():
    data = load("parabola")
    (batch,) = make(data, batch=4).batches(0, 1)
    assert (batch.x.dtype, batch.x.shape, batch.y, batch.skipped) == (torch.float32, (4, 2), None, ())
    (ahead,) = make(data, batch=4, workers=1).batches(0, 1)
    assert torch.equal(batch.x, ahead.x)


def test_workers_by_default(sets, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert [make(sets[name]).workers for name in ("folder", "tars", "memory")] == [4, 4, 0]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert make(sets["folder"]).workers == 1


def test_generators_are_left_alone(sets):
    before = torch.get_rng_state()
    read(make(sets["folder"], workers=1, augment="flip"), 0, 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "method",
    ["spawn", pytest.param("forkserver", marks=pytest.mark.slow), pytest.param("fork", marks=pytest.mark.slow)],
)
def test_start_methods(sets, method):
    """Spawned workers get the data pickled: they see the same, tars and memory (with labels) too."""
    semaphores = {name for name in os.listdir("/dev/shm") if name.startswith("sem.")}
    data = sets["tars"]
    assert_same(read(make(data, workers=1, start_method=method), 2, 6), read(make(data, workers=0), 2, 6))
    if method != "fork":
        assert {name for name in os.listdir("/dev/shm") if name.startswith("sem.")} <= semaphores


@pytest.mark.slow
@pytest.mark.parametrize("name", ["folder", "memory"])
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_sets_by_other_start_methods(sets, name, method):
    data = sets[name]
    assert_same(read(make(data, workers=2, start_method=method), 2, 6), read(make(data, workers=0), 2, 6))


@pytest.mark.gpu
def test_pinned_batches(sets):
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    expected = read(make(sets["folder"], workers=0), 0, 5)
    for workers in (0, 2):
        found = list(make(sets["folder"], workers=workers, pin=True).batches(0, 5))
        assert all(batch.x.is_pinned() and batch.y.is_pinned() for batch in found)
        assert_same([torch.stack([batch[i] for batch in found]) for i in (0, 1)], expected)


# ---- images that cannot be read -----------------------------------------------------------------


@pytest.fixture(params=["folder", "tars"])
def damaged(request, tmp_path):
    """Twelve images of which 3, 7 and 8 cannot be read, and their names."""
    members = numbered(12) | {"0003.png": b"no image", "0007.png": picture(7)[:-100], "0008.png": b""}
    if request.param == "tars":
        write_tar(tmp_path / "0.tar", dict(list(members.items())[:6]))
        write_tar(tmp_path / "1.tar", dict(list(members.items())[6:]))
        bad = [f"000{i}.png in {tmp_path}/{int(i > 5)}.tar" for i in (3, 7, 8)]
        return load(f"tar:{tmp_path}", corrupt="skip"), bad
    for name, content in members.items():
        (tmp_path / name).write_bytes(content)
    return load(f"folder:{tmp_path}", corrupt="skip"), [f"{tmp_path}/000{i}.png" for i in (3, 7, 8)]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_fatal_by_choice(damaged, workers):
    data, bad = damaged
    with pytest.raises(InputError) as caught:
        list(make(data, batch=4, workers=workers).batches(0, 3))
    order = Order(12, 5, data.source.groups).indices(0, 12).tolist()
    first = next(index for index in order if index in (3, 7, 8))
    name = bad[(3, 7, 8).index(first)]
    assert str(caught.value).startswith(f"image {name} cannot be read: ")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_skipped_and_named_once(damaged):
    """The next readable image takes the place, for every number of processes and workers, and is named once."""
    data, bad = damaged
    plain = data.raw(torch.tensor([i for i in range(12) if i not in (3, 7, 8)]))[0]
    images = dict(zip((i for i in range(12) if i not in (3, 7, 8)), plain, strict=True))
    images |= {3: images[4], 7: images[9], 8: images[9]}
    order = Order(12, 5, data.source.groups).indices(0, 36).tolist()
    expected = torch.stack([images[i] for i in order]).reshape(9, 4, 3, 16, 16)
    for processes, workers in ((1, 0), (1, 2), (2, 0), (2, 1)):
        size, parts, named = 4 // processes, [], []
        for rank in range(processes):
            loader = make(data, 4, range(rank * size, rank * size + size), workers=workers, corrupt="skip")
            found = [*loader.batches(0, 4), *loader.batches(4, 9)]
            parts.append(torch.stack([batch.x for batch in found]))
            named.append([name for batch in found for name in batch.skipped])
        assert torch.equal(torch.cat(parts, 1), expected)
        assert all(len(set(names)) == len(names) for names in named)
        assert {name for names in named for name in names} == set(bad)
    (whole,) = make(data, 12, workers=1, corrupt="skip").batches(0, 1)
    assert sorted(whole.skipped) == bad


def test_many_in_a_row_are_no_accident(damaged, monkeypatch):
    data, bad = damaged
    monkeypatch.setattr(module, "TRIES", 2)
    with pytest.raises(InputError) as caught:
        list(make(data, 12, workers=0, corrupt="skip").batches(0, 1))
    assert str(caught.value) == f"none of 2 images from {bad[1]} on can be read"


def test_labels_are_those_of_the_image_taken(tmp_path):
    files = numbered(4, label=lambda i: i) | {"0001.png": b"", "0003.png": b""}
    data = load(f"tar:{write_tar(tmp_path / 'a.tar', files)}", corrupt="skip")
    order = Order(4, 5).indices(0, 4).tolist()
    (batch,) = Loader(data, Order(4, 5), batch=4, positions=range(4), seed=5, corrupt="skip", workers=0).batches(0, 1)
    taken = {0: 0, 1: 2, 2: 2, 3: 0}
    assert batch.y.tolist() == [taken[index] for index in order]
    assert torch.equal(batch.x, data.raw(batch.y)[0])
    assert sorted(batch.skipped) == [f"000{i}.png in {tmp_path}/a.tar" for i in (1, 3)]


def test_first_images_that_cannot_be_read(tmp_path):
    """By choice they do not say what images look like."""
    files = {
        f"{i:04}.png": b"" if i < 17 else picture(i, size, size, channels=1) for i, size in enumerate(range(16, 36))
    }
    path = write_tar(tmp_path / "a.tar", files)
    for corrupt in ("fail", "ignore"):
        with pytest.raises(InputError, match={"fail": "0000.png", "ignore": "'ignore': choose from"}[corrupt]):
            load(f"tar:{path}", corrupt=corrupt)
    assert load(f"tar:{path}", corrupt="skip").shape == (1, 32, 32)
    write_tar(path, {"0.png": b"", "1.png": b""})
    with pytest.raises(InputError, match=r"none of 2 images from 0.png in .*a.tar on can be read"):
        load(f"tar:{path}", corrupt="skip")


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable(tmp_path, workers):
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    data = load(f"folder:{tmp_path}")
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(InputError, match=rf"none of 5 images from {tmp_path}/\d.png on can be read"):
        list(make(data, workers=workers, corrupt="skip").batches(0, 1))


# ---- what happens to workers --------------------------------------------------------------------


class Trouble:
    """Reads sample i as images of i, and does something else at sample 13."""

    def __init__(self, trouble, everywhere=False):
        self.trouble, self.everywhere, self.main = trouble, everywhere, os.getpid()

    def __call__(self, indices):
        if (13 in indices.tolist() or self.everywhere) and os.getpid() != self.main:
            self.trouble()
        return indices.to(torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4).contiguous()


def troubled(trouble, **options):
    read = Trouble(trouble, options.pop("everywhere", False))
    source = Source(COUNT, read, None, decodes=options.pop("decodes", True), name="file-{}".format)
    data = Data("troubled", (1, 4, 4), (), (127.5,), (127.5,), source)
    return make(data, **{"batch": 4, "workers": 2, **options})


def step_of_13(batch=4):
    return Order(COUNT, 5).indices(0, COUNT).tolist().index(13) // batch


def fails(loader):
    """The line of the failure, how many batches came before it, and how long after them it came."""
    times = [time.monotonic()]

    def run():
        for batch in loader.batches(0, 8):
            assert len(batch.x) == len(loader._steps.positions)
            times.append(time.monotonic())

    with pytest.raises(InputError) as caught:
        run()
    assert "\n" not in str(caught.value)
    return str(caught.value), len(times) - 1, time.monotonic() - times[-1]


def kill(number):
    return lambda: os.kill(os.getpid(), number)


def value_error():
    raise ValueError("two\nlines")


ENDS = {
    "SIGKILL": (kill(signal.SIGKILL), "was ended by SIGKILL (where memory ran out"),
    "SIGSEGV": (kill(signal.SIGSEGV), "was ended by SIGSEGV at"),
    "SIGBUS": (kill(signal.SIGBUS), "was ended by SIGBUS (where shared memory ran out"),
    "exit": (lambda: os._exit(3), "ended with exit status 3 at"),
    "quiet exit": (lambda: os._exit(0), "ended with exit status 0 at"),
}


@pytest.mark.parametrize("case", ENDS)
def test_dead_workers(case, capfd):
    trouble, expected = ENDS[case]
    message, found, took = fails(troubled(trouble))
    assert message.startswith(f"a process that reads data {expected}")
    assert message.endswith(f"at training step {step_of_13()}, reading file-13")
    assert found <= step_of_13()
    assert took < 5


@pytest.mark.slow
def test_dead_workers_by_spawn():
    message, _, _ = fails(troubled(ExitWith(3), start_method="spawn", workers=1))
    assert (
        message
        == f"a process that reads data ended with exit status 3 at training step {step_of_13()}, reading file-13"
    )


class ExitWith:
    """What can be pickled."""

    def __init__(self, status):
        self.status = status

    def __call__(self):
        os._exit(self.status)


def test_exceptions_in_workers():
    loader = troubled(value_error)
    with pytest.raises(InputError) as caught:
        list(loader.batches(0, 8))
    assert str(caught.value) == f"training step {step_of_13()}, reading file-13: ValueError: two lines"
    assert "in value_error" in str(caught.value.__cause__)  # the way to it


@pytest.mark.parametrize("decodes", [True, False])
@pytest.mark.parametrize("trouble", [lambda: time.sleep(1000), kill(signal.SIGSTOP)])
def test_hanging_workers(trouble, decodes):
    message, found, took = fails(troubled(trouble, timeout=0.7, decodes=decodes))
    names = [f"file-{i}" for i in Order(COUNT, 5).indices(4 * step_of_13(), 4).tolist()]
    what = "file-13" if decodes else ", ".join(names[:3]) + ", ..."
    assert message == (
        f"a process that reads data has not answered for 0.7 s at training step {step_of_13()}, reading {what}"
    )
    assert found <= step_of_13()  # a worker that is stopped may hold the way of what is read
    assert took < 5


def test_slow_workers_are_waited_for():
    loader = troubled(lambda: time.sleep(0.3))
    assert len(list(loader.batches(0, 8))) == 8


def test_full_shared_memory():
    """Shared memory is a file, and here no file may have more than 4 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        message, found, _ = fails(troubled(lambda: None, batch=2**16, workers=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert message.startswith("3 MB of shared memory for processes that read data: unable to ")
    assert "--shm-size" in message
    assert found == 0


@pytest.mark.slow
def test_really_full_shared_memory():
    mount = "mount -t tmpfs -o size=2m none /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("may not mount")
    program = (
        "from test_loader import *; message, _, _ = fails(troubled(None, batch=2**16)); print(message, *remains())"
    )
    run = f"{mount} && exec {sys.executable} -c '{program}'"
    place = os.path.dirname(__file__)
    done = subprocess.run(["unshare", "-m", "sh", "-c", run], capture_output=True, text=True, cwd=place, check=True)
    assert "No space left on device" in done.stdout
    assert done.stdout.endswith(" [] set()\n")


def test_death_while_nobody_waits(monkeypatch):
    """Torch would raise an exception in whatever the trainer is doing then."""
    other = signal.getsignal(signal.SIGCHLD)
    loader = troubled(lambda: None, workers=1)
    with closing(loader.batches(0, 1000)) as batches:
        next(batches)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)
        for _ in range(100):
            time.sleep(0.002)
        assert signal.getsignal(signal.SIGCHLD) == other
        with pytest.raises(InputError, match="was ended by SIGKILL"):
            list(batches)


@pytest.mark.parametrize(
    "method", ["fork", *(pytest.param(m, marks=pytest.mark.slow) for m in ("spawn", "forkserver"))]
)
def test_signals_that_the_trainer_saves_on(sets, method):
    """They may go to all processes of a run: workers go on, from their first moment, but those of a server."""
    expected = read(make(sets["folder"], workers=0), 0, 50)
    for _ in range(3):
        batches = make(sets["folder"], workers=2, start_method=method).batches(0, 50)
        with nullcontext() if method == "forkserver" else disturbed():
            first = next(batches)
        with disturbed():
            found = [first, *batches]
        assert_same([torch.stack([batch[i] for batch in found]) for i in (0, 1)], expected)


@contextmanager
def disturbed():
    stop = threading.Event()

    def disturb():
        while not stop.wait(0.003):
            for worker in multiprocessing.active_children():
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                    with suppress(ProcessLookupError):
                        os.kill(worker.pid, number)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_other_processes_hear_signals(sets, method):
    read(make(sets["folder"], workers=1, start_method=method), 0, 3)
    process = multiprocessing.get_context(method).Process(target=time.sleep, args=(100,))
    process.start()
    process.terminate()
    process.join(20)
    assert process.exitcode == -signal.SIGTERM


def test_workers_have_one_thread():
    class Threads(Trouble):
        def __call__(self, indices):
            return torch.full((len(indices), 1, 4, 4), torch.get_num_threads(), dtype=torch.uint8)

    torch.set_num_threads(2)
    loader = troubled(None)
    object.__setattr__(loader._steps.data.source, "read", Threads(None))
    assert all((batch.x == 1).all() for batch in loader.batches(0, 4))


# ---- how workers end ----------------------------------------------------------------------------


def test_closing_early_ends_everything(sets):
    read(make(sets["folder"], workers=2), 0, 3)
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    folders = set(Path("/tmp").glob("pymp-*"))
    for _ in range(3):
        batches = make(sets["folder"], workers=2).batches(0, 10**6)
        first = next(batches)
        began = time.monotonic()
        batches.close()
        assert time.monotonic() - began < 2
        assert remains()[0] == []
        assert first.x.sum() > 0  # it outlives the worker
        del first, batches
    assert soon(lambda: threading.active_count() <= threads, 2)
    assert soon(lambda: len(os.listdir("/proc/self/fd")) <= files, 2)
    assert set(Path("/tmp").glob("pymp-*")) <= folders


def test_closing_while_a_worker_hangs():
    with closing(troubled(lambda: time.sleep(1000)).batches(0, 8)) as batches:
        next(batches)
        time.sleep(0.1)
        began = time.monotonic()
    assert time.monotonic() - began < 2


def test_exceptions_of_the_trainer(sets):
    def train():
        with closing(make(sets["folder"], workers=2).batches(0, 100)) as batches:
            raise ZeroDivisionError(next(batches))

    with pytest.raises(ZeroDivisionError):
        train()
    assert remains()[0] == []


def test_in_another_thread(sets):
    found = []
    expected = read(make(sets["folder"], workers=0), 0, 5)
    thread = threading.Thread(target=lambda: found.append(read(make(sets["folder"], workers=2), 0, 5)))
    thread.start()
    thread.join()
    assert_same(found[0], expected)
    messages = []
    thread = threading.Thread(target=lambda: messages.append(fails(troubled(kill(signal.SIGKILL)))))
    thread.start()
    thread.join()
    assert "was ended by SIGKILL" in messages[0][0]
    assert messages[0][2] < 5


SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, {tests!r})
from test_loader import troubled
batches = troubled({trouble}, everywhere={everywhere}, workers=2).batches(0, 10**6)
{first}
print(*[child.pid for child in __import__("multiprocessing").active_children()], flush=True)
{then}
"""


def script(**parts):
    parts = {
        "tests": os.path.dirname(__file__),
        "trouble": "lambda: None",
        "everywhere": False,
        "first": "next(batches)",
        **parts,
    }
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(**parts)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_exit_without_closing():
    """Python would wait for workers that do not hear SIGTERM."""
    process = script(then="sys.exit(7)")
    out, err = process.communicate(timeout=30)
    assert process.returncode == 7
    assert err == ""
    assert len(out.split()) == 2
    assert soon(lambda: not any(map(alive, out.split())), 1)


@pytest.fixture
def keyboard():
    """What started the tests may have told them to ignore it, as shells do with what runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("keyboard")
def test_interrupted_by_the_keyboard():
    """While it waits for a worker that hangs."""
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), closing(troubled(lambda: time.sleep(1000)).batches(0, 8)) as batches:
        list(batches)
    assert remains()[0] == []
    assert time.monotonic() - began < 3


@pytest.mark.slow
def test_trainer_that_is_killed():
    """Its workers notice within five seconds."""
    with script(then="time.sleep(1000)") as process:
        workers = process.stdout.readline().split()
        process.kill()
        process.communicate()
    assert soon(lambda: not any(map(alive, workers)), 15)


@pytest.mark.slow
def test_many_kills_leave_nothing(sets):
    """Workers are killed at random times, large batches in shared memory among their hands."""
    generator = np.random.default_rng(3)
    for i in range(60):
        loader = troubled(lambda: None, batch=4096, workers=2, decodes=False)
        with closing(loader.batches(0, 10**6)) as batches:
            next(batches)
            victim = multiprocessing.active_children()[i % 2]
            timer = threading.Timer(float(generator.uniform(0, 0.05)), os.kill, (victim.pid, signal.SIGKILL))
            timer.start()
            with pytest.raises(InputError, match="was ended by SIGKILL"):
                list(batches)
        assert remains()[0] == []


# ---- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"augment": "rotate"}, "unknown augmentation 'rotate': choose from none, flip"),
        ({"corrupt": "ignore"}, "'ignore': choose from fail, skip"),
        ({"start_method": "thread"}, "unknown start method 'thread'"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"timeout": 0}, "timeout must be positive, got 0"),
        ({"positions": range(4, 9)}, r"positions must lie in 0\.\.\.7"),
        ({"positions": range(3, 0, -1)}, "positions must lie in"),
        ({"positions": range(-1, 3)}, "positions must lie in"),
        ({"positions": range(3, 3)}, "positions must lie in"),
    ],
)
def test_refusals(sets, options, expected):
    options = {"batch": 8, "positions": range(8), **options}
    with pytest.raises(InputError, match=expected):
        Loader(sets["memory"], Order(COUNT, 0), seed=0, **options)


def test_points_cannot_be_flipped():
    with pytest.raises(InputError, match="parabola holds points: flip is for images"):
        make(load("parabola"), augment="flip")


def test_steps_that_are_none(sets):
    for start, stop in ((-1, 3), (4, 3)):
        with pytest.raises(InputError, match="training steps must lie in"):
            list(make(sets["memory"]).batches(start, stop))


def test_data_that_cannot_be_sent():
    loader = troubled(lambda: None, start_method="spawn", workers=1)
    with pytest.warns(UserWarning, match="pickle"), pytest.raises(InputError, match="cannot be started"):
        list(loader.batches(0, 2))
