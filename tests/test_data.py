"""Data sets are split as they should be, and a bad file costs one line and nothing else."""

import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import os
import random
import resource
import shutil
import socket
import struct
import tarfile
import threading
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from helpers import DIGITS, PretendedGPU
from PIL import Image, PngImagePlugin
from torch.testing import assert_close

import data
import settings

CPU = torch.device("cpu")


def closed_url() -> str:
    """An address of this machine where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"http://127.0.0.1:{port}/"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [closed_url()])
    monkeypatch.setattr(torchvision.datasets.STL10, "url", f"{closed_url()}stl10_binary.tar.gz")


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@contextlib.contextmanager
def served(folder):
    """The address of a server on this machine from which a folder can be downloaded."""
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


def assert_same_splits(splits, expected):
    assert splits.keys() == expected.keys()
    for name, split in expected.items():
        assert torch.equal(splits[name].images, split.images), name
        assert torch.equal(splits[name].labels, split.labels), name


# ------------------------------------------------------------------------------ seeded randomness


def test_every_key_has_random_numbers_of_its_own():
    keys = [(0, "train", 5), (1, "train", 5), (0, "test", 5), (0, "train", 6), (0, "train", 56)]
    draws = [torch.rand(3, generator=data.generator(*key)).tolist() for key in keys]
    assert len({tuple(draw) for draw in draws}) == len(keys)
    torch.manual_seed(1)
    assert torch.rand(3, generator=data.generator(0, "train", 5)).tolist() == draws[0]


def test_random_numbers_are_those_of_earlier_versions():
    """Every published number depends on them."""
    assert data.generator(0, "train", 5).initial_seed() == 4737383280758332460
    assert data.generator("evaluation", "test").initial_seed() == 4117740966445446365


def test_an_epoch_shows_every_image_once():
    epochs = []
    for first_step in (0, 10):
        steps = range(first_step, first_step + 10)
        batches = [data.batch_indices(0, step, 100, 10) for step in steps]
        epochs.append(torch.cat(batches).tolist())
    assert sorted(epochs[0]) == list(range(100))
    assert sorted(epochs[1]) == list(range(100))
    assert epochs[0] != epochs[1]


def test_a_batch_depends_on_seed_and_step_alone():
    """Which steps were asked for before makes no difference; a resumed run starts in the middle."""
    in_order = [data.batch_indices(0, step, 25, 10) for step in range(8)]
    backwards = [data.batch_indices(0, step, 25, 10) for step in reversed(range(8))]
    for batch, expected in zip(reversed(backwards), in_order):
        assert torch.equal(batch, expected)
    assert not torch.equal(data.batch_indices(1, 0, 25, 10), in_order[0])
    # 25 images make two batches of ten; the five that remain are left out of this epoch
    assert [len(batch) for batch in in_order] == [10] * 8


# -------------------------------------------------------------------------------- sklearn's digits


def test_sklearn_splits():
    assert {name: len(split) for name, split in DIGITS.items()} == {
        "train": 1297,
        "validation": 250,
        "test": 250,
    }
    images = torch.cat([split.images for split in DIGITS.values()])
    assert images.dtype == torch.uint8
    assert images.shape == (1797, 28, 28)
    assert images.max() == 255
    # 20×20 pixels in the middle of 28×28, as in MNIST
    border = images.clone()
    border[:, 4:24, 4:24] = 0
    assert not border.any()
    # No digit of one split is in another. scikit-learn's file has no two pictures alike.
    assert len(torch.unique(images.flatten(1), dim=0)) == 1797
    assert len(torch.unique(DIGITS["test"].labels)) == 10


# ------------------------------------------------------------------------------------------- MNIST


def write_idx(path, array):
    """Write a file in MNIST's format."""
    magic = struct.pack(">HBB", 0, 8, array.ndim)
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(magic + sizes + array.astype(np.uint8).tobytes())


@pytest.fixture
def mnist_root(tmp_path):
    """A small MNIST in torchvision's layout: 120 training digits, 30 test digits."""
    raw = tmp_path / "root" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.RandomState(0)
    for name, count in (("train", 120), ("t10k", 30)):
        write_idx(raw / f"{name}-images-idx3-ubyte", rng.randint(0, 256, (count, 28, 28)))
        write_idx(raw / f"{name}-labels-idx1-ubyte", np.arange(count) % 10)
    return tmp_path / "root"


def test_mnist_splits(mnist_root):
    splits, source, warning = data.load_digits("auto", str(mnist_root))
    assert source == "mnist"
    assert warning is None
    theirs = torchvision.datasets.MNIST(str(mnist_root), train=True)
    # the first five sixths, which are 50,000 of 60,000
    assert torch.equal(splits["train"].images, theirs.data[:100])
    assert torch.equal(splits["validation"].images, theirs.data[100:])
    assert torch.equal(splits["train"].labels, torch.arange(100) % 10)
    assert torch.equal(splits["validation"].labels, torch.arange(100, 120) % 10)
    theirs = torchvision.datasets.MNIST(str(mnist_root), train=False)
    assert torch.equal(splits["test"].images, theirs.data)
    assert torch.equal(splits["test"].labels, torch.arange(30) % 10)


def gzip_files(folder):
    """Replace every file of a folder by one that was compressed by hand."""
    for file in folder.iterdir():
        Path(f"{file}.gz").write_bytes(gzip.compress(file.read_bytes(), compresslevel=1))
        file.unlink()


def test_gzipped_mnist_is_read_where_it_lies(mnist_root):
    """Its bits differ from those of the mirrors, and the folder may be read-only."""
    unpacked = data.load_digits("mnist", str(mnist_root))[0]
    raw = mnist_root / "MNIST" / "raw"
    gzip_files(raw)
    before = sorted(os.listdir(raw))
    assert_same_splits(data.load_digits("mnist", str(mnist_root))[0], unpacked)
    assert sorted(os.listdir(raw)) == before


def test_without_mnist_auto_warns_and_takes_sklearns_digits(tmp_path):
    splits, source, warning = data.load_digits("auto", str(tmp_path))
    assert source == "sklearn"
    assert_same_splits(splits, DIGITS)
    assert warning.startswith("scikit-learn's 1,797 digits instead of MNIST: ")
    assert f"{tmp_path}/MNIST/raw is missing or damaged" in warning
    assert "\n" not in warning


def assert_mnist_is_refused(root, reason: str = ""):
    """`reason` is a regular expression."""
    folder = os.path.join(root, "MNIST", "raw")
    what = rf"( is missing or damaged \(.*{reason}.*\)|: .*{reason}.*)"
    sentence = rf"{folder}{what}; use .*"
    with pytest.raises(OSError, match=rf"^{sentence}--digits sklearn$") as caught:
        data.load_digits("mnist", str(root))
    assert "\n" not in str(caught.value)
    assert data.load_digits("auto", str(root))[1] == "sklearn"


def test_mnist_that_cannot_be_had_costs_one_line(tmp_path):
    assert_mnist_is_refused(tmp_path, "Connection refused")


def test_a_silent_server_counts_as_unreachable(tmp_path, monkeypatch, request):
    request.addfinalizer(functools.partial(socket.setdefaulttimeout, socket.getdefaulttimeout()))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [url])
        socket.setdefaulttimeout(0.3)
        assert_mnist_is_refused(tmp_path, "timed out")


@pytest.fixture
def mirror(mnist_root, tmp_path, monkeypatch):
    """A folder with the small MNIST as it is downloaded, and its address, the second mirror."""
    folder = tmp_path / "mirror"
    shutil.copytree(mnist_root / "MNIST" / "raw", folder)
    gzip_files(folder)
    sums = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    mnist = torchvision.datasets.MNIST
    resources = [(name, sums[name]) for name, _ in mnist.resources]
    monkeypatch.setattr(mnist, "resources", resources)
    with served(folder) as url:
        monkeypatch.setattr(mnist, "mirrors", [closed_url(), url])
        yield folder


def test_mnist_is_downloaded_from_a_mirror_that_has_it(mirror, mnist_root, tmp_path):
    splits, source, warning = data.load_digits("auto", str(tmp_path / "new"))
    assert source == "mnist"
    assert warning is None
    assert_same_splits(splits, data.load_digits("mnist", str(mnist_root))[0])


def test_a_download_leaves_the_files_that_are_there_alone(mirror, mnist_root):
    """One is missing, and another holds what the user put there."""
    raw = mnist_root / "MNIST" / "raw"
    before = data.load_digits("mnist", str(mnist_root))[0]
    (raw / "train-labels-idx1-ubyte").unlink()
    own = raw / "t10k-labels-idx1-ubyte"
    own.write_bytes(own.read_bytes()[:-1] + b"\7")
    splits, _, _ = data.load_digits("mnist", str(mnist_root))
    assert torch.equal(splits["train"].labels, before["train"].labels)
    assert splits["test"].labels[-1] == 7 and before["test"].labels[-1] != 7
    assert len(list(raw.iterdir())) == 4  # and nothing else is left behind


def test_a_download_that_is_not_mnist_is_refused(mirror, tmp_path):
    for file in mirror.iterdir():
        file.write_text("<html>Please log in</html>")
    assert_mnist_is_refused(tmp_path / "new", "corrupted")


@pytest.mark.parametrize("kept_bytes", [0, 2, 6, 16, 1000])  # 16: the header alone
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-images-idx3-ubyte"])
def test_mnist_that_is_cut_off_is_refused(mnist_root, name, kept_bytes):
    file = mnist_root / "MNIST" / "raw" / name
    file.write_bytes(file.read_bytes()[:kept_bytes])
    assert_mnist_is_refused(mnist_root)


def test_gzipped_mnist_that_is_cut_off_is_refused(mnist_root):
    gzip_files(mnist_root / "MNIST" / "raw")
    file = mnist_root / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-100])
    assert_mnist_is_refused(mnist_root)


def write_labels(raw, name: str, labels):
    write_idx(raw / f"{name}-labels-idx1-ubyte", np.asarray(labels))


def write_images(raw, name: str, images):
    write_idx(raw / f"{name}-images-idx3-ubyte", np.asarray(images))


WHITE = np.full((120, 28, 28), 255)
NOT_DIGITS = [
    (write_labels, "train", np.arange(120) % 26, "train-labels.* labels up to 25; .* 0 to 9"),
    (write_labels, "t10k", np.arange(30) % 10 + 1, "t10k-labels.* labels up to 10; .* 0 to 9"),
    (write_labels, "t10k", np.full(30, -1), "labels up to 255; supported are 0 to 9"),
    (write_labels, "train", np.arange(119) % 10, "holds 119 labels of 120 images"),
    (write_labels, "train", np.arange(121) % 10, "holds 121 labels of 120 images"),
    (write_labels, "train", np.zeros((120, 1)), "holds 120×1 labels of 120 images"),
    (write_labels, "t10k", [], "holds 0 labels of 30 images"),
    (write_images, "train", WHITE[:, :27], "is of 120×27×28 pixels; supported are images of 28×28"),
    (write_images, "train", np.full((120, 28, 28, 3), 255), "is of 120×28×28×3 pixels"),
    (write_images, "t10k", np.full(30, 255), "is of 30 pixels"),
    (write_images, "train", WHITE[:0], "holds 0 images; at least 12 are needed"),
    (write_images, "t10k", WHITE[:1], "holds 1 images; at least 12 are needed"),
    (write_images, "train", 0 * WHITE, "holds a dark image, number 0 from 0"),
]


@pytest.mark.parametrize("write, name, array, reason", NOT_DIGITS)
def test_files_that_do_not_hold_digits_are_refused(mnist_root, write, name, array, reason):
    write(mnist_root / "MNIST" / "raw", name, array)
    assert_mnist_is_refused(mnist_root, reason)


def test_a_file_of_numbers_that_are_no_bytes_is_refused(mnist_root):
    path = mnist_root / "MNIST" / "raw" / "train-images-idx3-ubyte"
    content = path.read_bytes()
    path.write_bytes(content[:2] + b"\x0d" + content[3:])  # float32
    assert_mnist_is_refused(mnist_root, "train-images-idx3-ubyte is not in MNIST's format")


@pytest.mark.parametrize("source", ["auto", "mnist"])
def test_what_is_said_of_digits_fits_on_two_lines(mnist_root, source):
    write_labels(mnist_root / "MNIST" / "raw", "train", np.arange(120) % 26)
    config = settings.make_config({"data_root": str(mnist_root), "digits": source}, "laptop")
    if source == "auto":
        (line,) = data.load_dataset(config, CPU)[1].fallbacks
    else:
        with pytest.raises(OSError) as caught:
            data.load_dataset(config, CPU)
        line = str(caught.value)
    assert "labels up to 25" in line
    assert len(line.replace(str(mnist_root), "data")) < 180


@pytest.mark.parametrize("shape", [(3000, 4), (5,), ()])
def test_a_digest_tells_tensors_apart(shape):
    tensor = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    digest = data.digest(tensor)
    assert data.digest(tensor.clone()) == digest
    assert data.digest(tensor + 1) != digest
    assert data.digest(tensor, tensor) != digest


# ------------------------------------------------------------------------------------------ STL-10


def write_stl10(root, counts: dict):
    """Write random images in STL-10's layout; `counts` are like {"train": 20, "test": 16}."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    rng = np.random.RandomState(0)
    for name, count in counts.items():
        images = rng.randint(0, 256, (count, 3, 96, 96)).astype(np.uint8)
        images.tofile(folder / f"{name}_X.bin")
        if name != "unlabeled":
            labels = 1 + np.arange(count) % 10
            labels.astype(np.uint8).tofile(folder / f"{name}_y.bin")


@pytest.fixture(scope="module")
def stl10_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("stl10")
    write_stl10(root, {"unlabeled": 30, "train": 20, "test": 16})
    return root


@pytest.fixture
def labelled_root(stl10_root, tmp_path):
    """STL-10 without its unlabelled images."""
    root = tmp_path / "labelled"
    shutil.copytree(stl10_root, root)
    (root / "stl10_binary" / "unlabeled_X.bin").unlink()
    return root


def test_stl10_is_read_as_torchvision_reads_it(stl10_root, monkeypatch):
    splits, _ = data.load_stl10(str(stl10_root))
    # torchvision accepts the original files only
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    names_of_files = {
        "unlabeled": splits["train"],
        "train": splits["bank"],
        "test": join(splits["test"], splits["validation"]),
    }
    for name, split in names_of_files.items():
        theirs = torchvision.datasets.STL10(str(stl10_root), name)
        assert torch.equal(split.images, torch.from_numpy(theirs.data)), name
        assert split.labels.tolist() == theirs.labels.tolist(), name
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64


def join(first: data.Split, second: data.Split) -> data.Split:
    images = torch.cat([first.images, second.images])
    labels = torch.cat([first.labels, second.labels])
    return data.Split(images, labels)


def test_stl10_splits(stl10_root, labelled_root):
    splits, warning = data.load_stl10(str(stl10_root))
    # test: seven of eight images of the test file, as 7,000 of 8,000
    counts = {name: len(split) for name, split in splits.items()}
    assert counts == {"train": 30, "bank": 20, "test": 14, "validation": 2}
    assert set(splits["train"].labels.tolist()) == {-1}
    assert warning == (
        "this is not the whole of STL-10: 30 unlabeled images, 20 train images, 16 test images"
    )

    # trained on the labelled images, the unlabelled ones are not needed
    splits, warning = data.load_stl10(str(labelled_root), "train")
    assert torch.equal(splits["train"].images, splits["bank"].images)
    assert splits["train"].labels.tolist() == [*range(10), *range(10)]
    assert splits["bank"].labels.tolist() == [*range(10), *range(10)]
    assert "unlabeled" not in warning


def test_the_whole_of_stl10_causes_no_warning(stl10_root, monkeypatch):
    counts = {"unlabeled": 30, "train": 20, "test": 16}
    monkeypatch.setattr(data, "STL10_COUNTS", counts)
    assert data.load_stl10(str(stl10_root))[1] is None


def assert_stl10_is_refused(root, split: str = "unlabeled"):
    sentence = rf"^{root}/stl10_binary is missing or damaged \(.*\); use "
    with pytest.raises(OSError, match=f"{sentence}--data-root .*with {split}, ") as caught:
        data.load_stl10(str(root), split)
    assert "\n" not in str(caught.value)


def test_stl10_that_cannot_be_had_costs_one_line(tmp_path, labelled_root):
    assert_stl10_is_refused(tmp_path)
    assert_stl10_is_refused(labelled_root)


DAMAGE = [
    pytest.param("unlabeled_X.bin", lambda raw: raw[:-1], id="a byte is missing"),
    pytest.param("test_X.bin", lambda raw: raw[: -3 * 96 * 96], id="an image is missing"),
    pytest.param("unlabeled_X.bin", lambda raw: b"", id="no image is left"),
    pytest.param("test_y.bin", lambda raw: raw[:-1], id="a label is missing"),
    pytest.param("test_y.bin", lambda raw: b"", id="no label is left"),
    pytest.param("train_y.bin", lambda raw: b"\x00" + raw[1:], id="label 0"),
    pytest.param("train_y.bin", lambda raw: raw[:-1] + b"\x0b", id="label 11"),
]


@pytest.mark.parametrize("name,change", DAMAGE)
def test_damaged_stl10_is_refused(stl10_root, tmp_path, name, change):
    shutil.copytree(stl10_root, tmp_path / "root")
    file = tmp_path / "root" / "stl10_binary" / name
    file.write_bytes(change(file.read_bytes()))
    assert_stl10_is_refused(tmp_path / "root")


def test_one_image_is_not_enough_to_test_and_validate(tmp_path):
    write_stl10(tmp_path, {"unlabeled": 8, "train": 8, "test": 1})
    with pytest.raises(ValueError, match="test_X.bin holds one image; at least 2 are needed"):
        data.load_stl10(str(tmp_path))


def test_stl10_without_a_file_of_labels_is_refused(stl10_root, tmp_path):
    shutil.copytree(stl10_root, tmp_path / "root")
    (tmp_path / "root" / "stl10_binary" / "train_y.bin").unlink()
    assert_stl10_is_refused(tmp_path / "root")


@pytest.fixture
def archive(labelled_root, tmp_path):
    """STL-10 as it is downloaded, but without its unlabelled images."""
    path = tmp_path / "archive" / "stl10_binary.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        tar.add(labelled_root / "stl10_binary", "stl10_binary")
    return path


def test_stl10_is_unpacked_from_its_archive(archive, labelled_root):
    splits, _ = data.load_stl10(str(archive.parent), "train")
    assert_same_splits(splits, data.load_stl10(str(labelled_root), "train")[0])


def test_an_archive_that_is_cut_off_is_refused(archive):
    archive.write_bytes(archive.read_bytes()[:50_000])
    assert_stl10_is_refused(archive.parent, "train")


def test_stl10_is_downloaded(archive, labelled_root, tmp_path, monkeypatch):
    stl10 = torchvision.datasets.STL10
    monkeypatch.setattr(stl10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    with served(archive.parent) as url:
        monkeypatch.setattr(stl10, "url", f"{url}{archive.name}")
        splits, _ = data.load_stl10(str(tmp_path / "new"), "train")
    assert_same_splits(splits, data.load_stl10(str(labelled_root), "train")[0])


def test_photographs_are_read_as_numbers_up_to_1(stl10_root):
    split = data.load_stl10(str(stl10_root))[0]["train"]
    index = torch.tensor([4, 0, 4])
    photos = data.read_photos(split, index, CPU)
    assert photos.dtype == torch.float32
    assert_close(photos, split.images[index].float() / 255, atol=0, rtol=0)


# --------------------------------------------------------------------- the data set of the settings


def test_what_had_to_be_replaced_is_noted_in_the_settings_once(tmp_path):
    config = settings.make_config({"data_root": str(tmp_path)}, "laptop")
    splits, resolved = data.load_dataset(config, CPU)
    assert_same_splits(splits, DIGITS)
    assert resolved.digits == "sklearn"
    assert len(resolved.fallbacks) == 1
    assert "instead of MNIST" in resolved.fallbacks[0]
    # the settings that were passed are as before
    assert config.digits == "auto"
    assert config.fallbacks == []
    # the line is not repeated when a run is resumed
    _, again = data.load_dataset(replace(resolved, digits="auto"), CPU)
    assert again == resolved


def test_mnist_that_is_there_causes_no_fallback(mnist_root):
    config = settings.make_config({"data_root": str(mnist_root)}, "laptop")
    splits, resolved = data.load_dataset(config, CPU)
    assert len(splits["train"]) == 100
    assert resolved == replace(config, digits="mnist")


def stl10_config(root, split: str = "unlabeled") -> settings.Config:
    flags = {"dataset": "stl10", "data_root": str(root), "split": split}
    return settings.make_config(flags, "laptop")


def test_the_settings_choose_the_part_of_stl10(stl10_root):
    splits, resolved = data.load_dataset(stl10_config(stl10_root), CPU)
    assert len(splits["train"]) == 30
    assert "not the whole of STL-10" in resolved.fallbacks[0]
    splits, _ = data.load_dataset(stl10_config(stl10_root, "train"), CPU)
    assert len(splits["train"]) == 20


@pytest.mark.parametrize("free_share,device", [(3.01, "cuda"), (2.99, "cpu")])
def test_photographs_go_to_a_gpu_that_has_room_for_them(
    stl10_root, monkeypatch, free_share, device
):
    nbytes = 30 * 3 * 96 * 96
    free_bytes = int(free_share * nbytes)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, 10**12))
    with PretendedGPU():
        splits, _ = data.load_dataset(stl10_config(stl10_root), torch.device("cuda"))
    for split in splits.values():
        assert split.images.device.type == device
        assert split.labels.device.type == device


def test_photographs_are_not_copied_to_an_apple_gpu(stl10_root):
    """All of them take 2.8 GB of the memory that it shares with the CPU."""
    splits, _ = data.load_dataset(stl10_config(stl10_root), torch.device("mps"))
    assert splits["train"].images.device.type == "cpu"


def test_digits_always_go_to_the_gpu(monkeypatch):
    """Canvases are rendered where the digits are."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 10**12))
    config = settings.make_config({"digits": "sklearn"}, "laptop")
    with PretendedGPU():
        splits, _ = data.load_dataset(config, torch.device("cuda"))
    assert splits["train"].images.device.type == "cuda"


# ----------------------------------------------------------------------------------- picture files

RAMP = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))  # black on the left, white on the right


def encoded(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    """The bytes of a picture file."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def colour_picture() -> Image.Image:
    grey = Image.fromarray(RAMP)
    return Image.merge("RGB", [grey, grey.rotate(90), grey.rotate(180)])


def good_pictures() -> dict[str, bytes]:
    """Files that are unusual, but pictures."""
    colour = colour_picture()
    grey = Image.fromarray(RAMP)
    pictures = {
        "5000×5000": encoded(Image.new("L", (5000, 5000))),
        "64×20,000": encoded(Image.new("L", (64, 20_000))),
        "16 bits of grey": encoded(Image.fromarray(RAMP.astype(np.uint16) * 257)),
        "32 bits of grey": encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
        "transparent palette": encoded(colour.quantize(16), transparency=bytes(range(16))),
        "transparent grey": encoded(Image.merge("LA", [grey, grey])),
        "CMYK": encoded(colour.convert("CMYK"), "JPEG"),
        "bad EXIF": encoded(colour, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"),
    }
    for mode in ("1", "L", "P", "RGBA"):
        pictures[mode] = encoded(colour.convert(mode))
    for mode in ("YCbCr", "LAB"):
        pictures[mode] = encoded(colour.convert(mode), "TIFF")
    for file_format in ("BMP", "GIF", "JPEG", "PPM", "WEBP"):
        pictures[file_format] = encoded(colour, file_format)
    return pictures


def bad_pictures() -> dict[str, bytes]:
    """Files that are no pictures, or too large, or in formats that may start other programs."""
    colour = colour_picture()
    png = encoded(colour)
    pictures = {
        "20,000×20,000": encoded(Image.new("1", (20_000, 20_000))),
        "10,000×10,000": encoded(Image.new("1", (10_000, 10_000))),
        "65,535×65,535 in its header only": png[:16] + b"\0\0\xff\xff" * 2 + png[24:],
        "floating point": encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
        "text": b"no picture\n",
        "JPEG that is cut off": encoded(colour, "JPEG")[:700],
    }
    for file_format in ("PCX", "EPS", "PDF"):
        pictures[file_format] = encoded(colour, file_format)
    for count in (0, 9, 40, len(png) // 2):
        pictures[f"the first {count} bytes"] = png[:count]
    return pictures


@pytest.mark.filterwarnings("error")  # Pillow warns about some of them
def test_unusual_pictures_are_read(tmp_path):
    for number, (name, content) in enumerate(good_pictures().items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / "x.png"
        path.write_bytes(content)
        image = data.read_image(str(path))
        assert image.mode == "RGB", name
        assert data.read_folder(str(folder), 64).shape == (1, 64, 64), name


@pytest.mark.filterwarnings("error")
def test_what_is_no_picture_is_refused_in_one_line(tmp_path):
    for number, (name, content) in enumerate(bad_pictures().items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = str(folder / "x.png")
        Path(path).write_bytes(content)
        with pytest.raises(
            OSError, match="cannot be read as a picture .*use PNG or JPEG"
        ) as caught:
            data.read_image(path)
        message = str(caught.value)
        assert message.startswith(path), name
        assert message.isprintable(), name
        assert len(message) < 500, name
        with pytest.raises(OSError, match="cannot be read as a picture"):
            data.read_folder(str(folder), 64)


def test_a_picture_that_does_not_exist(tmp_path):
    with pytest.raises(OSError, match=r"x.png cannot be read as a picture \(no such file\)"):
        data.read_image(str(tmp_path / "x.png"))


def test_colours_are_kept(tmp_path):
    picture = colour_picture()
    picture.save(tmp_path / "x.png")
    np.testing.assert_array_equal(data.read_image(str(tmp_path / "x.png")), picture)


def test_a_picture_taken_with_a_turned_camera_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: the camera was turned by a quarter
    picture = Image.fromarray(RAMP[:32])  # 64 wide, 32 high, dark on the left
    picture.save(tmp_path / "x.png", exif=exif)
    upright = data.read_image(str(tmp_path / "x.png"))
    assert upright.size == (32, 64)
    assert upright.getpixel((16, 0)) == (0, 0, 0)
    assert upright.getpixel((16, 63)) == (252, 252, 252)


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert data.read_image(str(tmp_path / "x.gif")).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
@pytest.mark.parametrize(
    "brightest,white",
    [
        (100, 255),
        (255, 255),
        (300, 1023),
        (1000, 1023),
        (4095, 4095),
        (4096, 16383),
        (16384, 65535),
        (65535, 65535),
    ],
)
def test_grey_of_up_to_16_bits_is_scaled_and_not_clipped(tmp_path, brightest, white, file_format):
    levels = np.linspace(0, brightest, 64).astype(np.uint16)[None].repeat(2, axis=0)
    Image.fromarray(levels).save(tmp_path / "x", file_format)
    red = np.asarray(data.read_image(str(tmp_path / "x")))[..., 0]
    np.testing.assert_allclose(red, levels * (255 / white), atol=0.51)


@pytest.mark.parametrize("mode,color", [("RGBA", (0, 0, 0, 0)), ("LA", (0, 0))])
def test_what_is_transparent_lies_on_white(tmp_path, mode, color):
    Image.new(mode, (9, 9), color).save(tmp_path / "x.png")
    assert data.read_image(str(tmp_path / "x.png")).getpixel((4, 4)) == (255, 255, 255)


def test_a_transparent_entry_of_a_palette_lies_on_white(tmp_path):
    Image.new("P", (9, 9), 0).save(tmp_path / "x.png", transparency=0)
    assert data.read_image(str(tmp_path / "x.png")).getpixel((4, 4)) == (255, 255, 255)


# Four greys as shares of white, and a picture of them in three colours.
SHARES = np.array([[0.25, 0.5], [0.75, 1.0]]).repeat(8, axis=0).repeat(8, axis=1)
COLOUR_SHARES = np.stack([SHARES, SHARES[::-1], SHARES[:, ::-1]], axis=-1)


def png_of_16_bits(samples, chunk: bytes = b"") -> bytes:
    """A PNG file of (H, W, channels) uint16, each row with another of the five filters."""
    height, width, channels = samples.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = samples.astype(">u2").view(np.uint8).reshape(height, -1).astype(int)
    step = 2 * channels  # bytes of a pixel
    content = b""
    above = np.zeros_like(rows[0])
    for number, row in enumerate(rows):
        left = np.concatenate([np.zeros(step, int), row[:-step]])
        above_left = np.concatenate([np.zeros(step, int), above[:-step]])
        estimate = left + above - above_left
        distances = [abs(estimate - one) for one in (left, above, above_left)]
        nearest = np.choose(np.argmin(distances, axis=0), [left, above, above_left])
        predictions = [0 * row, left, above, (left + above) // 2, nearest]
        filtered = (row - predictions[number % 5]) % 256
        content += bytes([number % 5]) + filtered.astype(np.uint8).tobytes()
        above = row
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", header), chunk, png_chunk(b"IDAT", zlib.compress(content))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + png_chunk(b"IEND", b"")


def png_chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def tiff_of(samples, byte_order: str = "<", photometric: int = 1, compression: int = 1) -> bytes:
    """A TIFF file of (H, W) or (H, W, 3) samples of any type."""
    height, width = samples.shape[:2]
    channels = 3 if samples.ndim == 3 else 1
    bits = 8 * samples.dtype.itemsize
    content = samples.astype(samples.dtype.newbyteorder(byte_order)).tobytes()
    if compression == 8:
        content = zlib.compress(content)
    sample_format = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    place_of_bits = 8 + len(content)
    place_of_tags = place_of_bits + 2 * channels
    short, long = 3, 4
    tags = [
        (256, long, 1, width),
        (257, long, 1, height),
        (258, short, channels, bits if channels == 1 else place_of_bits),
        (259, short, 1, compression),
        (262, short, 1, 2 if channels == 3 else photometric),
        (273, long, 1, 8),
        (277, short, 1, channels),
        (278, long, 1, height),
        (279, long, 1, len(content)),
        (339, short, 1, sample_format),
    ]
    start = {"<": b"II", ">": b"MM"}[byte_order] + struct.pack(f"{byte_order}HI", 42, place_of_tags)
    entries = b""
    for tag, kind, count, value in tags:
        entries += struct.pack(f"{byte_order}HHI", tag, kind, count)
        is_short = kind == short and count == 1
        entries += struct.pack(
            f"{byte_order}HH" if is_short else f"{byte_order}I", value, *[0] * is_short
        )
    directory = struct.pack(f"{byte_order}H", len(tags)) + entries + bytes(4)
    return start + content + struct.pack(f"{byte_order}{channels}H", *[bits] * channels) + directory


def drawn(path, levels=None):
    """The picture in a file as (H, W, 3) int."""
    return np.asarray(data.read_image(str(path), levels)).astype(int)


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["PNG", "PNG with opacity", "TIFF <", "TIFF >", "TIFF deflated"])
def test_colours_of_up_to_16_bits_are_read_with_all_their_bits(tmp_path, kind, bits):
    samples = np.round((2**bits - 1) * COLOUR_SHARES).astype(np.uint16)
    content = {
        "PNG": lambda: png_of_16_bits(samples),
        "PNG with opacity": lambda: png_of_16_bits(
            np.dstack([samples, 0 * samples[..., :1] + 65535])
        ),
        "TIFF <": lambda: tiff_of(samples),
        "TIFF >": lambda: tiff_of(samples, ">"),
        "TIFF deflated": lambda: tiff_of(samples, compression=8),
    }[kind]()
    (tmp_path / "x").write_bytes(content)
    np.testing.assert_allclose(drawn(tmp_path / "x"), 255 * COLOUR_SHARES, atol=0.51)


def test_both_bytes_of_every_sample_are_read(tmp_path):
    """Of noise, the sixteen bits are as they were stored."""
    for channels in (1, 2, 3, 4):
        noise = np.random.default_rng(channels).integers(0, 65536, (11, 7, channels))
        noise = noise.astype(np.uint16)
        (tmp_path / "x").write_bytes(png_of_16_bits(noise))
        with data.opened_picture(str(tmp_path / "x")) as file:
            samples = data.read_deep_picture(file, str(tmp_path / "x")).samples
        np.testing.assert_array_equal(samples, noise[..., 0] if channels == 1 else noise)
    with_colours = noise[..., :3]
    for byte_order in "<>":
        for compression in (1, 8):
            (tmp_path / "x").write_bytes(tiff_of(with_colours, byte_order, compression=compression))
            with data.opened_picture(str(tmp_path / "x")) as file:
                samples = data.read_deep_picture(file, str(tmp_path / "x")).samples
            np.testing.assert_array_equal(samples, with_colours)


@pytest.mark.parametrize("channels", [2, 4])
@pytest.mark.parametrize("opaque", [1023, 65535])
def test_deep_pictures_lie_on_white_where_they_are_transparent(tmp_path, channels, opaque):
    """Programs that put 10 bits into 16 may do so for the opacity too."""
    samples = np.round(1023 * COLOUR_SHARES).astype(np.uint16)
    opacity = np.full((16, 16, 1), opaque, np.uint16)
    opacity[:4] = 0
    (tmp_path / "x.png").write_bytes(
        png_of_16_bits(np.dstack([samples[..., : channels - 1], opacity]))
    )
    expected = 255 * (COLOUR_SHARES if channels == 4 else SHARES[..., None].repeat(3, -1))
    expected[:4] = 255
    np.testing.assert_allclose(drawn(tmp_path / "x.png"), expected, atol=0.51)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_transparent_colour_of_a_deep_picture_lies_on_white(tmp_path, channels):
    samples = np.round(65535 * COLOUR_SHARES[..., :channels]).astype(np.uint16)
    colour = samples[0, 0].astype(">u2").tobytes()
    (tmp_path / "x.png").write_bytes(png_of_16_bits(samples, png_chunk(b"tRNS", colour)))
    picture = drawn(tmp_path / "x.png")
    assert (picture[:8, :8] == 255).all()
    assert (picture[:8, 8:] < 255).any()


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32])
def test_samples_below_zero_reach_from_the_lowest_to_the_highest(tmp_path, dtype):
    """As in a CT slice, where air is -1000."""
    samples = np.round(-100 + 200 * SHARES).astype(dtype)
    (tmp_path / "x.tif").write_bytes(tiff_of(samples))
    expected = (samples.astype(float) + 50) * 255 / 150
    np.testing.assert_allclose(drawn(tmp_path / "x.tif")[..., 0], expected, atol=0.51)


def test_32_bits_without_a_sign_are_not_taken_for_numbers_below_zero(tmp_path):
    samples = np.round((2**32 - 1) * SHARES).astype(np.uint32)
    (tmp_path / "x.tif").write_bytes(tiff_of(samples))
    np.testing.assert_allclose(drawn(tmp_path / "x.tif")[..., 0], 255 * SHARES, atol=0.51)


def test_zero_may_be_white(tmp_path):
    samples = np.round(4095 * (1 - SHARES)).astype(np.uint16)
    samples[0, 0] = 4095
    expected = 255 * SHARES
    expected[0, 0] = 0
    (tmp_path / "x.tif").write_bytes(tiff_of(samples, photometric=0))
    np.testing.assert_allclose(drawn(tmp_path / "x.tif")[..., 0], expected, atol=0.51)


def test_a_format_that_says_what_is_white_is_believed(tmp_path):
    """A PGM file of which 1000 is white, and nothing in it is brighter than 200."""
    samples = np.round(200 * SHARES).astype(">u2")
    (tmp_path / "x.pgm").write_bytes(b"P5 16 16 1000\n" + samples.tobytes())
    np.testing.assert_allclose(drawn(tmp_path / "x.pgm")[..., 0], 51 * SHARES, atol=0.51)


def test_a_deep_picture_of_a_turned_camera_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    samples = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(32, axis=0)
    Image.fromarray(samples).save(tmp_path / "x.png", exif=exif)
    upright = data.read_image(str(tmp_path / "x.png"))
    assert upright.size == (32, 64)
    assert upright.getpixel((16, 0)) == (0, 0, 0)


def deep_frames(folder, brightest) -> list[str]:
    """Frames of one camera of 12 bits, each with another brightest pixel."""
    paths = []
    for number, value in enumerate(brightest):
        paths.append(str(folder / f"{number}.png"))
        samples = np.round(value * SHARES).astype(np.uint16)
        Image.fromarray(samples).save(paths[-1])
    return paths


def test_all_pictures_of_a_call_have_one_scale(tmp_path):
    """The same light has the same grey in two frames, whatever else is in them."""
    paths = deep_frames(tmp_path, [900, 4000])
    Image.fromarray(RAMP).save(tmp_path / "8 bits.png")
    paths.append(str(tmp_path / "8 bits.png"))
    survey = data.survey_pictures(paths)
    assert survey.levels == {"16-bit": (0, 4095)}
    for path, brightest in zip(paths, (900, 4000)):
        expected = SHARES * brightest * 255 / 4095
        np.testing.assert_allclose(drawn(path, survey.levels)[..., 0], expected, atol=0.51)
    np.testing.assert_array_equal(drawn(paths[2], survey.levels)[..., 0], RAMP)
    (line,) = survey.notes("; override")
    assert line == "2 pictures of 16-bit samples: 0 is black, and 4095 is white; override"


def test_kinds_of_samples_have_scales_of_their_own(tmp_path):
    """Beside a photograph of 16 bits, a CT slice is not black."""
    paths = deep_frames(tmp_path, [60000])
    (tmp_path / "ct.tif").write_bytes(tiff_of(np.array([[-1000, 400]], np.int16)))
    survey = data.survey_pictures([*paths, str(tmp_path / "ct.tif")])
    assert survey.levels == {"16-bit": (0, 65535), "signed 16-bit": (-1000, 400)}
    assert len(survey.notes()) == 2


def test_levels_that_are_given_hold_for_all_kinds(tmp_path):
    paths = deep_frames(tmp_path, [1000, 4000])
    (tmp_path / "float.tif").write_bytes(tiff_of((1000 * SHARES).astype(np.float32)))
    paths.append(str(tmp_path / "float.tif"))
    survey = data.survey_pictures(paths, (250, 1000))
    expected = (1000 * SHARES - 250) * 255 / 750
    for path in (paths[0], paths[2]):
        np.testing.assert_allclose(drawn(path, survey.levels)[..., 0], expected, atol=0.51)
    assert drawn(paths[1], survey.levels).max() == 255
    with pytest.raises(OSError, match="nothing says which number is white.*--levels LOW HIGH"):
        data.read_image(paths[2])


def test_floating_point_that_is_not_finite_is_refused(tmp_path):
    (tmp_path / "x.tif").write_bytes(tiff_of(np.array([[0, np.nan]], np.float32)))
    levels = {"32-bit floating point": (0, 1)}
    with pytest.raises(OSError, match="NaN or infinite"):
        data.read_image(str(tmp_path / "x.tif"), levels)


def test_a_file_with_several_pages_is_named(tmp_path):
    pages = [Image.new("L", (8, 8), value) for value in (10, 200)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "one.tif")
    paths = [str(tmp_path / "one.tif"), str(tmp_path / "pages.tif")]
    assert data.read_image(paths[1]).getpixel((0, 0)) == (10, 10, 10)
    (line,) = data.survey_pictures(paths).notes()
    assert line == "only the first page or frame is read of 1 file with several (pages.tif)"


def mutated(content: bytes, chance: random.Random) -> bytes:
    """A file some of whose bytes are overwritten, cut out or doubled at random."""
    content = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 10))):
        start = chance.randrange(len(content) + 1)
        end = start + chance.choice((1, 8, 1000, 10**9))
        old = content[start:end]
        replacements = [
            chance.randbytes(len(old)),
            bytes(len(old)),
            b"\xff" * len(old),
            b"",
            old * 2,
        ]
        content[start:end] = chance.choice(replacements)
    return bytes(content)


def peak_megabytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def test_mutated_pictures_are_read_or_refused_in_one_line(tmp_path):
    sources = [content for content in good_pictures().values() if len(content) < 20_000]
    samples = np.round(1023 * COLOUR_SHARES).astype(np.uint16)
    sources += [png_of_16_bits(samples), tiff_of(samples), tiff_of(samples[..., 0], photometric=0)]
    chance = random.Random(2)
    path = str(tmp_path / "x")
    pictures_read = 0
    before = peak_megabytes()
    for number in range(300):
        Path(path).write_bytes(mutated(sources[number % len(sources)], chance))
        try:
            data.read_image(path)
            pictures_read += 1
        except OSError as error:
            assert str(error).startswith(path), number
            assert "\n" not in str(error), number
    assert 10 < pictures_read < 290
    assert peak_megabytes() - before < 300


# -------------------------------------------------------------------------------- picture folders


def test_pictures_are_found_in_order_below_a_folder(tmp_path):
    """What a Mac leaves beside a picture, ._NAME, is left out."""
    for folder in ("f", "d", "e", "c"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.JPG").touch()
        (tmp_path / folder / "._x.JPG").touch()
    for name in ("b.tif", "a.PNG", "._a.PNG", "notes.txt"):
        (tmp_path / name).touch()
    paths = [os.path.relpath(path, tmp_path) for path in data.image_files(str(tmp_path))]
    assert paths == ["a.PNG", "b.tif", "c/x.JPG", "d/x.JPG", "e/x.JPG", "f/x.JPG"]


def names_in(folder) -> list[str]:
    return [os.path.relpath(path, folder) for path in data.image_files(str(folder))]


def test_hidden_files_and_folders_are_left_out(tmp_path):
    (tmp_path / ".thumbnails").mkdir()
    for name in (".thumbnails/a.png", ".a.png", "a.png"):
        (tmp_path / name).touch()
    assert names_in(tmp_path) == ["a.png"]
    assert names_in(tmp_path / ".thumbnails") == ["a.png"]  # which is named itself


def test_numbers_in_names_are_counted(tmp_path):
    names = ["frame1.png", "frame2.png", "frame10.png", "part2/a.png", "part10/a.png"]
    for name in reversed(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert names_in(tmp_path) == names


def test_links_are_followed_without_loops(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.png").touch()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "to a folder").symlink_to(elsewhere)
    (folder / "to itself").symlink_to(folder)
    (elsewhere / "back").symlink_to(folder)
    (folder / "z.png").symlink_to(elsewhere / "a.png")  # which is the same file
    (folder / "b.png").touch()
    assert sorted(names_in(folder)) == ["b.png", "z.png"]
    (folder / "z.png").unlink()
    assert names_in(folder) == ["b.png", "to a folder/a.png"]


def test_a_pipe_is_no_picture(tmp_path):
    """Reading it would wait for ever."""
    os.mkfifo(tmp_path / "a.png")
    assert names_in(tmp_path) == []


def test_figures_of_this_program_are_left_out_by_their_mark(tmp_path):
    marked = PngImagePlugin.PngInfo()
    marked.add_text("Software", data.FIGURE_MARK)
    Image.new("L", (8, 8)).save(tmp_path / "renamed.png", pnginfo=marked)
    earlier = PngImagePlugin.PngInfo()
    earlier.add_text("Software", "Matplotlib version3.9.0, https://matplotlib.org/")
    # The figures of earlier versions are known by their names, and other plots are pictures.
    for name in ("attention-images-12.png", "attention.png", "tsne.png", "my plot.png"):
        Image.new("L", (8, 8)).save(tmp_path / name, pnginfo=earlier)
    Image.new("L", (8, 8)).save(tmp_path / "views.png")
    assert names_in(tmp_path) == ["my plot.png", "views.png"]


def test_backgrounds_that_cannot_be_read_are_skipped_with_a_line(tmp_path, capsys):
    data.read_folder.cache_clear()
    for number in range(7):
        (tmp_path / f"bad\n{number}.png").write_text("no picture")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    deep_frames(tmp_path, [900, 4000])
    images = data.read_folder(str(tmp_path), 16)
    assert images.amax((1, 2)).tolist() == [56, 249]  # of one scale
    printed = capsys.readouterr()
    assert "2 pictures of 16-bit samples: 0 is black, and 4095 is white\n" in printed.out
    lines = printed.err.splitlines()
    assert len(lines) == 6
    assert all(line.startswith("warning: skipped: ") for line in lines)
    assert lines[-1] == "warning: skipped: 3 other files too"


def test_text_is_shortened_in_its_middle():
    assert data.shortened("short.png", 20) == "short.png"
    assert data.shortened("a very long name of a picture.png", 20) == "a very lon…cture.png"
    assert data.shortened("caf\udce9\n.png", 20) == "caf??.png"


def test_the_pictures_of_a_folder_are_grey_and_cut_square(tmp_path):
    stripes = np.zeros((30, 90), dtype=np.uint8)
    stripes[:, 30:60] = 255  # a white square in the middle
    Image.fromarray(stripes).save(tmp_path / "a.png")
    Image.new("RGB", (50, 70), (255, 0, 0)).save(tmp_path / "b.png")
    (tmp_path / "notes.txt").write_text("no picture")
    images = data.read_folder(str(tmp_path), 20)
    assert images.dtype == torch.uint8
    assert images.shape == (2, 20, 20)
    assert images[0, :, 2:-2].min() == 255
    assert images[1].unique().tolist() == [76]  # the brightness of red


@pytest.mark.parametrize("folder", ["empty", "missing"])
def test_a_folder_without_pictures_is_refused(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    path = str(tmp_path / folder)
    with pytest.raises(ValueError, match=f"^--background {path}: no images there; use "):
        data.read_folder(path, 20)
