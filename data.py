"""What is loaded: handwritten digits, STL-10's photographs, picture files; and seeded generators.

A data set is a dict of `Split`s. What cannot be read raises OSError or ValueError, with one line
that says what to use instead. torchvision and scikit-learn take seconds to import, so they are
imported where they are needed.
"""

import functools
import gzip
import hashlib
import math
import os
import tarfile
import tempfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from picture_files import read_image  # noqa: F401  (scripts call data.read_image)
from settings import Config

# Images and labels for training, images and labels for testing
MNIST_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
MNIST_FILES += ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
STL10_COUNTS = {"unlabeled": 100_000, "train": 5000, "test": 8000}
LEAST_DIGITS = 12  # in a file, so that each split has two


@dataclass
class Split:
    """One part of a data set.

    `images` uint8: digits (N, 28, 28) or photographs (N, 3, 96, 96). `labels` (N,) int64.
    """

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, rows):
        return Split(self.images[rows], self.labels[rows])

    def to(self, device):
        return Split(self.images.to(device), self.labels.to(device))


def to_device(tensor, device: torch.device):
    """Copy a tensor to a device, and do not wait for the copy if the device is a GPU."""
    # On MPS such a copy may read memory that has been freed since (pytorch issue 189690).
    return tensor.to(device, non_blocking=device.type == "cuda")


def digest(*tensors, rows: int = 1000) -> str:
    """A short text by which other tensors can be told apart, from up to `rows` rows of each."""
    sha = hashlib.sha256()
    for tensor in tensors:
        tensor = torch.atleast_1d(tensor.detach())
        step = max(1, len(tensor) // rows)
        sha.update(tensor[::step].cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:12]


# ------------------------------------------------------------------------------ seeded randomness


def generator(*key) -> torch.Generator:
    """A CPU random generator of its own for every key, such as (seed, "train", step)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    seed = int.from_bytes(digest[:8], "little") >> 1  # manual_seed takes 63 bits
    return torch.Generator().manual_seed(seed)


@functools.lru_cache(maxsize=1)  # drawing it takes longer than all else that a step draws
def pass_order(seed: int, pass_number: int, count: int):
    """The order of `count` images in a pass over them: (count,) int64."""
    return torch.randperm(count, generator=generator(seed, "order", pass_number))


def batch_indices(seed: int, step: int, count: int, batch_size: int):
    """Which of `count` training images make up the batch of `step`: (batch_size,) int64.

    No image comes twice in one pass over the data, so none is its own negative in the NCE loss.
    Images that do not fill a batch are left out of the pass.
    """
    pass_number, batch = divmod(step, count // batch_size)
    order = pass_order(seed, pass_number, count)
    return order[batch * batch_size : (batch + 1) * batch_size]


# --------------------------------------------------------------------------------------- data sets


def load_dataset(config: Config, device: torch.device):
    """The data set that the settings ask for, on the device if it fits.

    Returns {"train", "validation", "test", …: Split}, and the settings, in which `digits` now names
    what "auto" came to and `fallbacks` has a line on what was replaced, if anything was.
    Raises OSError or ValueError for data that cannot be had.
    """
    if config.dataset == "stl10":
        splits, warning = load_stl10(config.data_root, config.split)
    else:
        splits, digits, warning = load_digits(config.digits, config.data_root)
        config = replace(config, digits=digits)
    if warning and warning not in config.fallbacks:
        config = replace(config, fallbacks=[*config.fallbacks, warning])
    if config.dataset != "stl10" or fits_on(device, splits["train"].images.nbytes):
        splits = {name: split.to(device) for name, split in splits.items()}
    return splits, config


def fits_on(device: torch.device, nbytes: int) -> bool:
    """Whether a data set of that size can lie on the device without being in the way.

    On a GPU it may take a third of the free memory. Apple's GPUs do not say how much is free.
    """
    if device.type != "cuda":
        return device.type == "cpu"
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return free_bytes >= 3 * nbytes


def load_digits(source: str = "auto", data_root: str = "data"):
    """The handwritten digits (section II.C), 28×28 pixels each.

    `source` is "mnist" (in data_root/MNIST/raw/, downloaded if it is not there), "sklearn"
    (scikit-learn's 1,797 digits), or "auto": MNIST if it can be had, else scikit-learn's.

    Returns {"train", "validation", "test": Split}, the source that was used, and a line that says
    what was replaced and why, or None. Raises OSError if "mnist" cannot be had.
    """
    if source == "sklearn":
        return read_sklearn_digits(), "sklearn", None
    try:
        train, test = load_mnist(data_root)
    except Exception as error:  # damaged files and failed downloads raise many kinds
        reason = f"{data_root}/MNIST/raw is missing or damaged ({short_reason(error)})"
        if isinstance(error, ValueError):  # the files are there
            reason = f"{data_root}/MNIST/raw: {short_reason(error)}"
        way_out = "use --data-root with the folder of MNIST/raw"
        if source == "mnist":
            raise OSError(f"{reason}; {way_out}, or --digits sklearn") from error
        warning = f"scikit-learn's 1,797 digits instead of MNIST: {reason}; {way_out}"
        return read_sklearn_digits(), "sklearn", warning
    training_count = len(train) * 5 // 6  # 50,000 of 60,000
    splits = {
        "train": train[:training_count],
        "validation": train[training_count:],
        "test": test,
    }
    return splits, "mnist", None


def short_reason(error: Exception) -> str:
    """What an error says, on one line of at most 90 characters.

    After a failed download that is what the last of torchvision's addresses answered.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    _, was_download, answer = text.rpartition("got: ")
    if was_download:
        answer = answer.removeprefix("<urlopen error ").removesuffix(">")
        text = f"download failed: {answer}"
    return "".join(filter(str.isprintable, text))[:90]


def load_mnist(data_root: str):
    """MNIST's training and test Split; torchvision downloads what is missing."""
    folder = os.path.join(data_root, "MNIST", "raw")
    missing = [
        name
        for name in MNIST_FILES
        if not os.path.isfile(f"{folder}/{name}") and not os.path.isfile(f"{folder}/{name}.gz")
    ]
    if missing:
        import torchvision

        os.makedirs(folder, exist_ok=True)
        # torchvision would write over files that are there, so it works in a folder of its own.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            torchvision.datasets.MNIST(scratch, download=True)
            for name in missing:
                os.replace(f"{scratch}/MNIST/raw/{name}", f"{folder}/{name}")
    return read_mnist(folder)


def read_mnist(folder: str):
    """MNIST's training and test Split, from its four files in `folder`, unpacked or gzipped.

    Raises ValueError for files that do not hold digits of 28×28 pixels and a label of 0 to 9 for
    each.
    """
    splits = []
    for images_name, labels_name in (MNIST_FILES[:2], MNIST_FILES[2:]):
        images = read_idx(os.path.join(folder, images_name))
        labels = read_idx(os.path.join(folder, labels_name))
        check_digits(images_name, images, labels_name, labels)
        splits.append(Split(images, labels.long()))
    return splits


def check_digits(images_name: str, images, labels_name: str, labels):
    """Raise ValueError unless there are digits of 28×28 pixels, with a label of 0 to 9 for each."""
    if images.ndim != 3 or images.shape[1:] != (28, 28):
        size = "×".join(str(side) for side in images.shape)
        raise ValueError(f"{images_name} is of {size} pixels; supported are images of 28×28")
    if len(images) < LEAST_DIGITS:
        raise ValueError(
            f"{images_name} holds {len(images)} images; at least {LEAST_DIGITS} are needed"
        )
    if labels.shape != images.shape[:1]:
        count = "×".join(str(size) for size in labels.shape)
        raise ValueError(f"{labels_name} holds {count} labels of {len(images)} images")
    if labels.max() > 9:
        raise ValueError(f"{labels_name} holds labels up to {labels.max()}; supported are 0 to 9")
    bright_pixels = (images > 127).flatten(1).sum(1)
    if bright_pixels.min() < 5:
        number = int(bright_pixels.argmin())
        raise ValueError(f"{images_name} holds a dark image, number {number} from 0")


def read_idx(path: str):
    """The uint8 array in a file of MNIST's format, or in the same file with .gz at its end.

    Two zeros; 8, which stands for uint8; the number of dimensions; four bytes for the size of each,
    the most significant first; then the numbers. Raises ValueError for any other file.
    """
    if os.path.isfile(path):
        raw = Path(path).read_bytes()
    else:
        with gzip.open(f"{path}.gz") as file:
            raw = file.read()
    name = os.path.basename(path)
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise ValueError(f"{name} is not in MNIST's format")
    dimensions = raw[3]
    header_size = 4 + 4 * dimensions
    shape = []
    for start in range(4, header_size, 4):
        shape.append(int.from_bytes(raw[start : start + 4], "big"))
    if len(raw) != header_size + math.prod(shape):
        raise ValueError(f"{name} has {len(raw):,} bytes, which is not what its header says")
    content = np.frombuffer(bytearray(raw), dtype=np.uint8)  # torch wants a writable buffer
    return torch.from_numpy(content[header_size:].reshape(shape))


def read_sklearn_digits():
    """scikit-learn's 8×8 digits in MNIST's format: enlarged to 20×20, thinned, centred in 28×28.

    Merely enlarged, they would have a quarter more ink than MNIST's, in strokes half as wide again,
    which fill whole patches. Then attention after training on the same views would be a quarter more
    selective than brightness, unlike on MNIST. So pixels below 0.3 become black.
    """
    import sklearn.datasets

    bunch = sklearn.datasets.load_digits()
    small = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16  # (N, 1, 8, 8)
    digits = F.interpolate(small, size=(20, 20), mode="bicubic")
    digits = ((digits - 0.3) / 0.7).clamp(0, 1)
    images = F.pad(digits, (4, 4, 4, 4)).mul(255).round().to(torch.uint8)[:, 0]
    digits = Split(images, torch.tensor(bunch.target, dtype=torch.int64))
    order = np.random.RandomState(0).permutation(len(digits))  # numpy has frozen this stream
    train, validation, test = torch.from_numpy(order).split([1297, 250, 250])
    return {"train": digits[train], "validation": digits[validation], "test": digits[test]}


def load_stl10(data_root: str, split: str = "unlabeled"):
    """STL-10 (section II.C): photographs of 96×96 pixels in ten classes, most without a label.

    Returns two things. First the splits: "train" holds what `split` names, the 100,000 images
    without labels (label -1) or the 5,000 with; "bank" holds the latter, from which k-NN and probe
    learn; "test" and "validation" are 7,000 and 1,000 images of the test file. Images are mapped
    into memory, not read. Second a line of warning if STL-10 has more images than these, or None.

    Downloads files that data_root/stl10_binary/ lacks. Raises OSError for what cannot be had.
    """
    folder = os.path.join(data_root, "stl10_binary")  # as the archive has it
    names = list(dict.fromkeys((split, "train", "test")))  # each once
    try:
        if not all(os.path.isfile(f"{folder}/{name}_X.bin") for name in names):
            unpack_or_download_stl10(data_root)
        files = {name: read_stl10_file(folder, name) for name in names}
    except Exception as error:  # numpy and torchvision raise many kinds
        raise OSError(
            f"{folder} is missing or damaged ({short_reason(error)}); use --data-root with the "
            f"folder of stl10_binary, with {', '.join(names)}"
        ) from error

    test = files["test"]
    if len(test) < 2:
        raise ValueError(f"{folder}/test_X.bin holds one image; at least 2 are needed")
    test_count = len(test) * 7 // 8
    splits = {
        "train": files[split],
        "bank": files["train"],
        "test": test[:test_count],
        "validation": test[test_count:],
    }
    counts = [
        f"{len(file):,} {name} images"
        for name, file in files.items()
        if len(file) != STL10_COUNTS[name]
    ]
    warning = f"this is not the whole of STL-10: {', '.join(counts)}" if counts else None
    return splits, warning


def unpack_or_download_stl10(data_root: str):
    """Unpack STL-10's archive if it lies in data_root and is whole; else download it."""
    import torchvision

    stl10 = torchvision.datasets.STL10
    try:
        archive = os.path.join(data_root, stl10.filename)
        torchvision.datasets.utils.extract_archive(archive, data_root)
    except (OSError, EOFError, tarfile.TarError, zlib.error):  # not there, or cut off
        stl10(data_root, "train", download=True)


def read_stl10_file(folder: str, name: str) -> Split:
    """One of STL-10's files, "unlabeled", "train" or "test".

    Raises ValueError unless it holds whole images, and a label of 1 to 10 for each.
    """
    path = f"{folder}/{name}_X.bin"
    size = os.path.getsize(path)
    if not size or size % (3 * 96 * 96):
        raise ValueError(f"{name}_X.bin has {size:,} bytes, no multiple of 3×96×96")
    images = np.memmap(path, dtype=np.uint8, mode="c")  # copy on write
    images = torch.from_numpy(images.reshape(-1, 3, 96, 96)).mT  # they are stored by columns
    if name == "unlabeled":
        return Split(images, torch.full((len(images),), -1))
    labels = np.fromfile(f"{folder}/{name}_y.bin", dtype=np.uint8)
    if len(labels) != len(images) or labels.min() < 1 or labels.max() > 10:
        raise ValueError(f"{name}_y.bin has no label of 1 to 10 for every image")
    return Split(images, torch.from_numpy(labels).long() - 1)


def read_photos(split: Split, index, device: torch.device):
    """STL-10's images of these indices as float32 (B, 3, 96, 96) in [0, 1], on the device."""
    return to_device(split.images[index.to(split.images.device)], device) / 255
