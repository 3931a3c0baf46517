"""Files in the formats in which data sets are distributed."""

import gzip
import hashlib
import io
import struct
import zipfile

import numpy as np
from PIL import Image
from torchvision import datasets


def rng(seed=0):
    return np.random.default_rng(seed)


def idx(array: np.ndarray) -> bytes:
    """The IDX format: two zero bytes, type 8 (unsigned byte), rank, big-endian sizes, bytes."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def idx_files(images: np.ndarray, labels: np.ndarray) -> dict[str, bytes]:
    parts = {"images-idx3": idx(images), "labels-idx1": idx(labels)}
    return {f"{half}-{part}-ubyte": parts[part] for half in ("train", "t10k") for part in parts}


def write(folder, files: dict[str, bytes]):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def grey_images(count=5):
    return rng().integers(0, 256, (count, 28, 28), dtype=np.uint8)


def write_mnist(root, kind="MNIST", images=None, labels=None):
    images = grey_images() if images is None else images
    labels = np.arange(len(images)) % 10 if labels is None else labels
    write(root / kind / "raw", idx_files(images, labels))
    return images, labels


def write_gz(root, kind, monkeypatch):
    """The compressed files as they are distributed; torchvision is told their checksums."""
    images, labels = grey_images(), np.array([3, 1, 4, 1, 5])
    files = {f"{name}.gz": gzip.compress(content) for name, content in idx_files(images, labels).items()}
    write(root / kind / "raw", files)
    monkeypatch.setattr(getattr(datasets, kind), "resources", [(name, md5(files[name])) for name in files])
    return images, labels


def write_emnist(root, monkeypatch, images, labels):
    """gzip.zip with gzip/emnist-letters-*.gz, as distributed; ``images`` are as stored, with axes exchanged."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in idx_files(images, labels).items():
            name = name.replace("t10k", "test")
            archive.writestr(f"gzip/emnist-letters-{name}.gz", gzip.compress(content))
    write(root / "EMNIST" / "raw", {"gzip.zip": buffer.getvalue()})
    monkeypatch.setattr(datasets.EMNIST, "md5", md5(buffer.getvalue()))


def py2(value) -> bytes:
    """Pickle opcodes as Python 2 wrote them in 2009: byte strings, and numpy arrays by the names of that time."""
    if isinstance(value, dict):
        return b"}(" + b"".join(py2(key) + py2(item) for key, item in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(py2, value)) + b"e"
    if isinstance(value, str | bytes):
        content = value.encode() if isinstance(value, str) else value
        return b"T" + struct.pack("<I", len(content)) + content
    if isinstance(value, np.ndarray):
        empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        shape = py2(value.shape[0]) + py2(value.shape[1]) + b"\x86"
        return empty + b"(K\x01" + shape + dtype + b"\x89" + py2(value.tobytes()) + b"tb"
    return b"J" + struct.pack("<i", value)


CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def write_cifar(root, monkeypatch):
    """cifar-10-batches-py with three images per batch; torchvision is told the checksums of these files."""
    images = rng().integers(0, 256, (18, 3, 32, 32), dtype=np.uint8)
    labels = [int(label) for label in rng(1).integers(0, 10, 18)]
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    files = {"batches.meta": {"num_cases_per_batch": 3, "label_names": CIFAR_CLASSES, "num_vis": 3072}}
    for i, name in enumerate(names):
        part = slice(3 * i, 3 * i + 3)
        files[name] = {"batch_label": name, "labels": labels[part], "data": images[part].reshape(3, 3072)}
    files = {name: b"\x80\x02" + py2(content) + b"." for name, content in files.items()}
    write(root / "cifar-10-batches-py", files)
    checksums = [[name, md5(files[name])] for name in names]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", checksums[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", checksums[5:])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": md5(files["batches.meta"])})
    return images[:15], labels[:15]


def save(path, pixels, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def colours(height=16, width=16, channels=3, seed=0):
    return rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
