"""Data sets are split as they should be, and a bad file costs one line and nothing else."""

import contextlib
import functools
import gzip
import hashlib
import http.server
import os
import shutil
import socket
import struct
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from helpers import DIGITS, PretendedGPU
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
    # 20×20 pixels in the middle of 28×28, and about as much ink, as in MNIST
    border = images.clone()
    border[:, 4:24, 4:24] = 0
    assert not border.any()
    assert 95 < (images > 127).float().sum((1, 2)).mean() < 105  # MNIST: 103
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
