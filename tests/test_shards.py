"""Tar shards: the images of a folder, labels and damage of every kind, an index that is never wrong."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff import InputError
from fastdiff.cli.sources import Wanted, open_source
from fastdiff.training import shards
from fastdiff.training.data import load
from fastdiff.training.order import Order

LONG = "a-folder-with-a-long-name/" * 8


def picture(seed=0, height=16, width=16, channels=3, ending="png", **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    buffer = io.BytesIO()
    kind = {"jpg": "jpeg"}.get(ending, ending)
    Image.fromarray(pixels if channels > 1 else pixels[..., 0]).save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path, members, **options):
    """A tar of (name, content) in this order; content may be a TarInfo."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items() if isinstance(members, dict) else members:
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if content is not info:
                info.size = len(content)
            tar.addfile(info, None if content is info else io.BytesIO(content))
    return path


def numbered(count, first=0, label=None):
    """Samples with images by their number and labels by ``label(number)``."""
    members = {}
    for i in range(first, first + count):
        members[f"{i:04}.png"] = picture(i)
        if label:
            members[f"{i:04}.cls"] = str(label(i)).encode()
    return members


def link(name, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "0000.png"
    return info


def everything(data):
    return data.raw(torch.arange(len(data)))


def error(call, *args) -> str:
    with pytest.raises(InputError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what is in it ------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_images_are_those_of_a_folder(tmp_path, format):
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "a.png": picture(0, 21, 35),
        "b.jpg": picture(1, 40, 24, ending="jpg", exif=turned),
        "c.jpeg": picture(2, 64, 64, 1, ending="jpg"),
        "d.BMP": picture(3, ending="bmp"),
        "e.webp": picture(4, ending="webp"),
        "f.png": picture(5, channels=4),
    }
    write_tar(tmp_path / "set.tar", files, format=format)
    (tmp_path / "folder").mkdir()
    for name, content in files.items():
        (tmp_path / "folder" / name).write_bytes(content)
    for size in (None, 8):
        folder, tar = (load(name, image_size=size) for name in (f"folder:{tmp_path}/folder", f"tar:{tmp_path}/set.tar"))
        assert torch.equal(everything(folder)[0], everything(tar)[0])
        assert everything(tar)[0].dtype == torch.uint8
        assert torch.equal(*(data.batch(torch.tensor([3, 0]))[0] for data in (folder, tar)))
        assert {**folder.to_json(), "name": ""} == {**tar.to_json(), "name": ""}
    assert tar.source.decodes
    assert everything(tar)[1] is None


def test_grey_tars_have_one_channel(tmp_path):
    write_tar(tmp_path / "a.tar", {f"{i}.png": picture(i, channels=1) for i in range(3)})
    assert load(f"tar:{tmp_path}/a.tar").shape == (1, 16, 16)


def test_a_tar_a_directory_or_a_glob(tmp_path, monkeypatch):
    for i in range(3):
        write_tar(tmp_path / f"set-{i}.tar", numbered(2 + i, 10 * i, label=lambda i: i))
    write_tar(tmp_path / "deeper/x.tar", numbered(1))
    (tmp_path / "notes.txt").write_text("no tar")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (str(tmp_path), f"{tmp_path}/set-*.tar", f"{tmp_path}/set-[012].tar", ".", "~"):
        data = load(f"tar:{path}")
        assert everything(data)[1].tolist() == [0, 1, 10, 11, 12, 20, 21, 22, 23]
        assert list(data.source.groups) == [2, 3, 4]
    assert len(load(f"tar:{tmp_path}/set-1.tar")) == 3
    write_tar(tmp_path / "odd[1].tar", numbered(2))
    assert len(load(f"tar:{tmp_path}/odd[1].tar")) == 2


def labels(path):
    data = load(f"tar:{path}")
    y = everything(data)[1]
    return data.classes, None if y is None else y.tolist()


def test_labels(tmp_path):
    path, image = tmp_path / "a.tar", picture()
    numbers = {"a.png": image, "a.cls": b"3\n", "b.png": image, "b.cls": b" 0 ", "c.cls": b"01", "c.png": image}
    assert labels(write_tar(path, numbers)) == (("0", "1", "2", "3"), [3, 0, 1])
    names = {
        "a.png": image,
        "a.cls": b"dog",
        "b.cls": "chat\té".encode(),
        "b.png": image,
        "c.png": image,
        "c.cls": b"1",
    }
    assert labels(write_tar(path, names)) == (("1", "chat é", "dog"), [2, 1, 0])
    records = [{"label": 2, "text": "x"}, {"label": "0"}]
    files = [pair for i, record in enumerate(records) for pair in ((f"{i}.png", image), (f"{i}.json", record))]
    files = {name: content if name.endswith("png") else json.dumps(content).encode() for name, content in files}
    assert labels(write_tar(path, files)) == (("0", "1", "2"), [2, 0])
    assert labels(write_tar(path, {"a.png": image, "a.json": b'{"text": "x"}', "b.json": b"[1]", "b.png": image})) == (
        (),
        None,
    )
    both = {"a.png": image, "a.json": b'{"width": 3}', "a.cls": b"7", "b.png": image, "b.JSON": b'{"label": 1}'}
    assert labels(write_tar(path, both)) == (tuple("01234567"), [7, 1])


def test_classes_are_those_of_all_tars(tmp_path):
    for name, kinds in (("1", "dog cat"), ("2", "ant dog"), ("3", "eel")):
        files = {
            f"{i}.{e}": c
            for i, kind in enumerate(kinds.split())
            for e, c in (("png", picture()), ("cls", kind.encode()))
        }
        write_tar(tmp_path / f"{name}.tar", files)
    for _ in range(2):  # scanned, and from the index
        assert labels(tmp_path) == (("ant", "cat", "dog", "eel"), [2, 1, 0, 2, 3])


def test_a_sample_ends_at_the_first_dot(tmp_path):
    """The key is the folder and the name up to its first dot; what is no image or label does not count."""
    members = {
        "train/0001.png": picture(1),
        "train/0001.cls": b"1",
        "train/0001.seg.png": picture(9),
        "train/0001.txt": b"a caption",
        "train.d/0001.cls": b"2",
        "train.d/0001.PNG": picture(2),
        "train.d/._0001.png": b"left by a Mac",
        "train.d/.cls": b"hidden",
        "README": b"no ending",
        "3.png": picture(3),
        "3.cls": b"3",
    }
    special = [("more/", tarfile.TarInfo("more/")), ("4.png", link("4.png")), ("5.png", link("5.png", tarfile.LNKTYPE))]
    special[0][1].type = tarfile.DIRTYPE
    write_tar(tmp_path / "a.tar", [*members.items(), *special])
    data = load(f"tar:{tmp_path}/a.tar")
    x, y = everything(data)
    assert y.tolist() == [1, 2, 3]
    for image, seed in zip(x, (1, 2, 3), strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(Image.open(io.BytesIO(picture(seed)))))
    assert data.source.name(1) == f"train.d/0001.PNG in {tmp_path}/a.tar"


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_any_kind(tmp_path, format):
    names = [f"{LONG}1.png", "é/ü 2.png", "3\n4.png", "../../evil.png", "/etc/absolute.png"]
    write_tar(tmp_path / "a" / "a.tar", {name: picture(i) for i, name in enumerate(names)}, format=format)
    data = load(f"tar:{tmp_path}/a/a.tar")
    assert everything(data)[0].shape == (5, 3, 16, 16)
    found = [data.source.name(i).removesuffix(f" in {tmp_path}/a/a.tar") for i in range(5)]
    assert found == [f"{LONG}1.png", "é/ü 2.png", "3 4.png", "../../evil.png", "/etc/absolute.png"]
    assert sorted(os.listdir(tmp_path)) == ["a"]  # nothing was extracted
    assert sorted(os.listdir(tmp_path / "a")) == [".a.tar.fastdiff.npz", "a.tar"]


def test_evaluation_reads_tars(tmp_path):
    write_tar(tmp_path / "a.tar", numbered(3))
    images = open_source(f"tar:{tmp_path}/a.tar", Wanted(None, 0, None, {}, 0, torch.device("cpu")))
    assert torch.equal(images.read(torch.arange(3)), everything(load(f"tar:{tmp_path}/a.tar"))[0])


# ---- what is wrong with it ----------------------------------------------------------------------


P = picture()
WRONG = {
    "nothing": ({}, "holds no images"),
    "no images": ({"a.txt": b"x", "b.tif": P}, "holds no images"),
    "a label alone": ({"a.png": P, "b.cls": b"1"}, "sample b must have one image, got none"),
    "a record alone": ({"b.json": b"{}", "c.png": P}, "sample b must have one image, got none"),
    "two images": ({"x/a.png": P, "x/a.jpg": P}, "sample x/a must have one image, got x/a.png and x/a.jpg"),
    "an image twice": ([("a.png", P), ("a.png", P)], "sample a must have one image"),
    "two labels": (
        {"a.png": P, "a.cls": b"1", "a.json": b'{"label": 1}'},
        "sample a must have one label, got a.cls and a.json",
    ),
    "a label twice": ([("a.png", P), ("a.cls", b"1"), ("a.cls", b"2")], "sample a must have one label"),
    "files apart": ({"a.png": P, "b.png": P, "a.cls": b"1"}, "sample a must have one image, got none"),
    "labels for some": ({"a.png": P, "a.cls": b"1", "b.png": P, "c.png": P}, "b.png has no label, others have"),
    "an empty label": ({"a.png": P, "a.cls": b" \n"}, "a.cls holds no label"),
    "a long label": ({"a.png": P, "a.cls": 1001 * b"x"}, "a.cls holds no label"),
    "a huge label": ({"a.png": P, "a.cls": bytes(2**20 + 1)}, "a.cls holds no label: it has 1048577 bytes"),
    "no text": ({"a.png": P, "a.cls": b"\xff\xfe"}, "a.cls holds no label"),
    "no JSON": ({"a.png": P, "a.json": b"{"}, "a.json holds no label"),
    "nested JSON": ({"a.png": P, "a.json": 10**5 * b"["}, "a.json holds no label"),
    "a fraction": ({"a.png": P, "a.json": b'{"label": 1.5}'}, "labels are whole numbers or text, got 1.5"),
    "a list": ({"a.png": P, "a.json": b'{"label": [1]}'}, r"got \[1\]"),
    "truth": ({"a.png": P, "a.json": b'{"label": true}'}, "got True"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_layouts(tmp_path, case):
    members, expected = WRONG[case]
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(InputError, match=expected) as caught:
        load(f"tar:{path}")
    assert str(caught.value).startswith(f"{path} cannot be used as an uncompressed tar of images: ")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["a.tar"]


@pytest.mark.parametrize(("label", "expected"), [(-1, "got -1 to 1"), (2**16, "got 1 to 65536"), (10**30, "0...65535")])
def test_numbers_that_are_no_classes(tmp_path, label, expected):
    write_tar(tmp_path / "a.tar", numbered(2, label=lambda i: (1, label)[i]))
    assert expected in error(load, f"tar:{tmp_path}/a.tar")


def test_labels_in_some_tars(tmp_path):
    write_tar(tmp_path / "a.tar", numbered(2, label=int))
    write_tar(tmp_path / "b.tar", numbered(2))
    assert f"{tmp_path}/b.tar has no labels, others have" in error(load, f"tar:{tmp_path}")


def test_nothing_there(tmp_path):
    assert f"{tmp_path}/no.tar" in error(load, f"tar:{tmp_path}/no.tar")
    assert f"{tmp_path}/*.tar" in error(load, f"tar:{tmp_path}")
    assert "lacks its path" in error(load, "tar:")
    assert "lacks its path" in error(load, "tar")
    (tmp_path / "a.tar").mkdir()
    assert f"{tmp_path}/a.tar cannot be used" in error(load, f"tar:{tmp_path}")


def test_every_truncation_is_found(tmp_path):
    """Wherever a tar is cut, no sample is lost without a word; only the padding after its end may be missing."""
    whole = write_tar(tmp_path / "whole.tar", numbered(3, label=int)).read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    path = tmp_path / "cut.tar"
    for size in [*range(0, end + 512, 256), 1, 511, end + 1]:
        path.write_bytes(whole[:size])
        assert f"{path} cannot be used" in error(load, f"tar:{path}")
    path.write_bytes(whole[: end + 512])
    assert len(load(f"tar:{path}")) == 3


def test_every_damaged_header_is_found(tmp_path):
    path = write_tar(tmp_path / "a.tar", numbered(3))
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar]
    for place in headers:
        for at, byte in ((0, 0xFF), (124, 0x39), (148, 0x37), (156, 0x35)):
            content = bytearray(whole)
            content[place + at] = byte
            path.write_bytes(content)
            assert str(path) in error(load, f"tar:{path}")


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compressed_tars(tmp_path, mode):
    with tarfile.open(tmp_path / "a.tar", f"w:{mode}") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    assert "uncompressed tar" in error(load, f"tar:{tmp_path}/a.tar")


@pytest.mark.parametrize("content", [b"", P[:-100], b"no image", P[:30], picture(ending="jpg")[:-50]])
def test_damaged_images_are_named(tmp_path, content):
    files = numbered(20) | {"0017.png": content}
    data = load(f"tar:{write_tar(tmp_path / 'a.tar', files)}")
    assert data.raw(torch.tensor([16, 18, 19]))[0].shape == (3, 3, 16, 16)
    message = error(data.raw, torch.tensor([16, 17]))
    assert message.startswith(f"image 0017.png in {tmp_path}/a.tar cannot be read: ")
    assert "BytesIO" not in message
    if len(content) < 50:  # nothing of it says what images look like
        write_tar(tmp_path / "a.tar", {"0.png": content, "1.png": P})
        assert f"image 0.png in {tmp_path}/a.tar cannot be read" in error(load, f"tar:{tmp_path}/a.tar")


# ---- the index ----------------------------------------------------------------------------------


def test_second_time_nothing_is_scanned(tmp_path, monkeypatch):
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", numbered(4, label=lambda i: f"class {i % 3}"))
    first = load(f"tar:{tmp_path}")
    monkeypatch.setattr(tarfile, "open", None)
    second = load(f"tar:{tmp_path}")
    assert all(map(torch.equal, everything(first), everything(second)))
    assert first.to_json() == second.to_json()
    assert [first.source.name(i) for i in range(8)] == [second.source.name(i) for i in range(8)]
    assert sorted(os.listdir(tmp_path)) == [".0.tar.fastdiff.npz", ".1.tar.fastdiff.npz", "0.tar", "1.tar"]


def test_changed_tars_are_scanned_again(tmp_path):
    path = write_tar(tmp_path / "a.tar", numbered(4))
    assert len(load(f"tar:{path}")) == 4
    write_tar(path, numbered(5))
    assert len(load(f"tar:{path}")) == 5
    before = os.stat(path)
    write_tar(path, numbered(4) | {"x.png": picture(4)})  # of the same size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert os.stat(path).st_size == before.st_size
    assert load(f"tar:{path}").source.name(4).startswith("x.png")
    write_tar(path, numbered(9))  # of another size, but the same time
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert len(load(f"tar:{path}")) == 9
    os.rename(tmp_path / ".a.tar.fastdiff.npz", tmp_path / ".b.tar.fastdiff.npz")
    assert len(load(f"tar:{write_tar(tmp_path / 'b.tar', numbered(2))}")) == 2


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-5], lambda c: b"", lambda c: c[:300] + b"x" + c[301:], lambda c: b"PK"]
)
def test_damaged_indices_are_made_again(tmp_path, damage):
    path, index = write_tar(tmp_path / "a.tar", numbered(4)), tmp_path / ".a.tar.fastdiff.npz"
    load(f"tar:{path}")
    whole = index.read_bytes()
    index.write_bytes(damage(whole))
    assert len(load(f"tar:{path}")) == 4
    assert len(index.read_bytes()) == len(whole)


def test_index_of_another_version(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", numbered(4))
    monkeypatch.setattr(shards, "FORMAT", 0)
    load(f"tar:{path}")
    monkeypatch.undo()
    scans = []
    monkeypatch.setattr(shards, "_scan", lambda path, scan=shards._scan: scans.append(path) or scan(path))
    load(f"tar:{path}")
    load(f"tar:{path}")
    assert scans == [str(path)]


def test_where_nothing_can_be_written(tmp_path, monkeypatch):
    def refuse(path, content):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("fastdiff._io.replace", refuse)
    path = write_tar(tmp_path / "a.tar", numbered(4))
    assert everything(load(f"tar:{path}"))[0].shape == (4, 3, 16, 16)
    assert os.listdir(tmp_path) == ["a.tar"]


def test_tar_that_is_changed_while_it_is_used(tmp_path):
    """Never another sample's bytes: the tar is as it was scanned, or there is an error that names it."""
    path = write_tar(tmp_path / "a.tar", numbered(4))
    data = load(f"tar:{path}", image_size=16)
    shards._opened.cache_clear()
    write_tar(path, numbered(5))
    message = error(data.raw, torch.tensor([2]))
    assert message == f"image 0002.png in {path} cannot be read: the tar was changed after it was scanned"
    path.unlink()
    assert f"image 0002.png in {path} cannot be read" in error(data.raw, torch.tensor([2]))
    again = load(f"tar:{write_tar(path, numbered(5))}")
    everything(again)
    os.truncate(path, 2048)
    assert error(again.raw, torch.tensor([3])) == f"image 0003.png in {path} cannot be read: the tar ends before it"


def test_few_files_are_open(tmp_path):
    def descriptors():
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        return sum(os.path.lexists(link) and str(tmp_path) in os.readlink(link) for link in links)

    for i in range(20):
        write_tar(tmp_path / f"{i:02}.tar", numbered(3))
    data = load(f"tar:{tmp_path}")
    everything(data)
    assert descriptors() == shards.OPEN
    reads = shards._opened.cache_info().misses
    for first in range(0, 60, 6):
        data.raw(Order(60, 0, data.source.groups).indices(first, 6))
    assert shards._opened.cache_info().misses <= reads + 20
    shards._opened.cache_clear()
    assert descriptors() == 0
