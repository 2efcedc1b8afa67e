"""Handwritten digits in clutter, with the truth about every pixel, or photographs; views of them.

Cluttered MNIST (the paper's section II.C, after deepmind/mnist-cluttered) is made here: a digit
among fragments of others, and the masks that say which pixels are which. `sample_…` draws the
parameters of a whole batch on the CPU, from a generator seeded by (seed, split, step). `render_…`
turns any rows of them into pixels, on any device, without randomness, and so always the same.
"""

import functools
import gzip
import hashlib
import http.client
import math
import os
import tarfile
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sklearn.datasets
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import rgb_to_grayscale

MIN_WINDOW_INK = 5  # ink pixels that a distractor must hold
STL10_COUNTS = {"unlabeled": 100_000, "train": 5000, "test": 8000}
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")
# Pillow knows other formats that start other programs (EPS runs Ghostscript)
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
TEXTURES = ("grating", "checks", "dots", "rings", "noise", "blobs")
WAVES = 16  # plane waves that noise and blobs are the sum of
# ImageNet's mean and standard deviation, which DINO's weights expect
MEAN, STD = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]


@dataclass
class Split:
    """`images` uint8, digits (N, 28, 28) or photographs (N, 3, 96, 96); `labels` (N,) int64."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, rows):
        return Split(self.images[rows], self.labels[rows])

    def to(self, device):
        return Split(self.images.to(device), self.labels.to(device))


def to_device(tensor, device):
    # to a GPU without waiting; on MPS that may read memory freed since (pytorch issue 189690)
    return tensor.to(device, non_blocking=device.type == "cuda")


def load_dataset(config, device):
    """The splits that a run's settings ask for, on the device, and a warning or None.

    `config["digits"]` becomes what "auto" came to. OSError or ValueError for what cannot be had.
    """
    if config["dataset"] == "stl10":
        splits, warning = load_stl10(config["data_root"], config["split"])
        size = splits["train"].images.nbytes  # a GPU may have no room for it
        if device.type != "cuda" or torch.cuda.mem_get_info(device)[0] < 3 * size:
            return splits, warning
    else:
        Background(config, "train", device)  # raises for a folder that is of no use
        splits, config["digits"], warning = load_digits(config["digits"], config["data_root"])
    return {name: split.to(device) for name, split in splits.items()}, warning


def load_digits(source="auto", data_root="data"):
    """The splits of the handwritten digits, {"train", "validation", "test"} (section II.C).

    `source` is "mnist" (data_root/MNIST/raw/, fetched if it is not there), "sklearn" (its 1,797
    digits) or "auto": MNIST, else scikit-learn's. Returns the splits, what "auto" came to, and a
    line on what was replaced and why, or None. Raises OSError if "mnist" cannot be had.
    """
    if source == "sklearn":
        return read_sklearn_digits(), source, None
    try:
        train, test = read_mnist(os.path.join(data_root, "MNIST", "raw"))
        n = len(train) * 5 // 6  # 50,000 of 60,000
        return {"train": train[:n], "validation": train[n:], "test": test}, "mnist", None
    except Exception as error:  # of many kinds, for damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = f"{data_root}/MNIST/raw is missing or damaged, and its download failed ({reason})"
        if source == "mnist":
            ways_out = "use --data-root with the folder that holds MNIST/raw, or --digits sklearn"
            raise OSError(f"{reason}; {ways_out}") from error
    warning = f"scikit-learn's 1,797 digits instead of MNIST: {reason}"
    return read_sklearn_digits(), "sklearn", warning


def read_mnist(folder):
    """MNIST's training and test Split, from the four files in `folder`, unpacked or gzipped."""
    arrays = []
    for name, md5 in torchvision.datasets.MNIST.resources:  # images, labels; of training, of test
        path = os.path.join(folder, name)
        unpacked = os.path.isfile(path.removesuffix(".gz"))
        if not unpacked and not os.path.isfile(path):
            fetch_mnist(folder, name, md5)
        with open(path.removesuffix(".gz"), "rb") if unpacked else gzip.open(path) as file:
            content = np.frombuffer(bytearray(file.read()), dtype=np.uint8)
        start = 4 + 4 * content[3]  # so many dimensions, and four bytes, big end first, for each
        shape = content[4:start].view(">i4").tolist()
        arrays.append(torch.from_numpy(content[start:].reshape(shape)))
    return [Split(arrays[k], arrays[k + 1].long()) for k in (0, 2)]


def fetch_mnist(folder, name, md5):
    """Fetch a file of MNIST from the first mirror that has it; OSError if none has."""
    reasons = []
    for mirror in torchvision.datasets.MNIST.mirrors:
        try:
            return torchvision.datasets.utils.download_url(mirror + name, folder, md5=md5)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            reasons.append(f"{mirror}: {error}")
            Path(folder, name).unlink(missing_ok=True)  # not what was asked for
    raise OSError("; ".join(reasons))


def read_sklearn_digits():
    """scikit-learn's 8×8 digits in MNIST's format: 20×20, centred in 28×28."""
    bunch = sklearn.datasets.load_digits()
    small = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16  # (N, 1, 8, 8)
    digits = F.interpolate(small, size=(20, 20), mode="bicubic").clamp(0, 1)
    images = F.pad(digits, (4, 4, 4, 4)).mul(255).round().to(torch.uint8)[:, 0]
    digits = Split(images, torch.tensor(bunch.target, dtype=torch.int64))
    order = np.random.RandomState(0).permutation(len(digits))  # numpy has frozen this stream
    parts = zip(("train", "validation", "test"), torch.from_numpy(order).split([1297, 250, 250]))
    return {name: digits[rows] for name, rows in parts}


def load_stl10(data_root, split="unlabeled"):
    """STL-10 (section II.C): photographs of 96 px in ten classes, most of them without a label.

    Returns {"train": the `split` "unlabeled" (100,000 images, labels -1) or "train" (5,000),
    "bank": the labelled ones, which k-NN and probe learn from, "test", "validation": 7,000 and
    1,000 of the test file}, mapped, not read; and a warning if there are not as many, or None.
    Fetches what data_root/stl10_binary/ lacks; raises OSError.
    """
    stl10, files = torchvision.datasets.STL10, {}
    folder = os.path.join(data_root, stl10.base_folder)
    names = list(dict.fromkeys((split, "train", "test")))
    try:
        if not all(os.path.isfile(f"{folder}/{name}_X.bin") for name in names):
            try:
                archive = os.path.join(data_root, stl10.filename)
                torchvision.datasets.utils.extract_archive(archive, data_root)
            except (OSError, EOFError, tarfile.TarError, zlib.error):  # not there, or cut off
                stl10(data_root, "train", download=True)
        for name in names:
            images = np.memmap(f"{folder}/{name}_X.bin", dtype=np.uint8, mode="c")
            images = torch.from_numpy(images.reshape(-1, 3, 96, 96)).mT  # stored by columns
            labels, least = np.zeros(len(images), dtype=np.uint8), 0
            if name != "unlabeled":
                labels, least = np.fromfile(f"{folder}/{name}_y.bin", dtype=np.uint8), 1
            if len(labels) != len(images) or labels.min() < least or labels.max() > 10:
                raise ValueError(f"{name}_y.bin does not hold a label of 1 to 10 for every image")
            files[name] = Split(images, torch.from_numpy(labels).long() - 1)
    except Exception as error:  # numpy's and torchvision's are of many kinds
        reason = f"{folder} is missing or damaged, and cannot be fetched ({error})"
        ways_out = "use --data-root with the folder that holds stl10_binary, with"
        raise OSError(f"{reason}; {ways_out} {', '.join(names)}") from error
    odd = [f"{len(f):,} {name} images" for name, f in files.items() if len(f) != STL10_COUNTS[name]]
    train, test, n = files["train"], files["test"], len(files["test"]) * 7 // 8
    splits = {"train": files[split], "bank": train, "test": test[:n], "validation": test[n:]}
    return splits, f"this is not the whole STL-10: {', '.join(odd)}" if odd else None


def read_image(path):
    """An image file as "RGB": first frame, upright, on white where transparent. Raises OSError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # more than 89 million pixels, which take a gigabyte
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=IMAGE_FORMATS) as file:
                image = ImageOps.exif_transpose(file)  # a copy
            if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip
                levels = np.asarray(image).astype(np.int32).clip(0, 65535)
                # cameras and scanners put 10 or 12 bits into 16
                bits = max(8, int(levels.max()).bit_length())
                white = 2 ** (bits if bits <= 12 else 16) - 1
                levels = (levels * 255 + white // 2) // white
                image = Image.fromarray(levels.astype(np.uint8))
            if image.mode == "F":
                raise ValueError("floating point pixels; use 8 or 16 bits")
            if "A" in image.getbands() or "transparency" in image.info:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return image.convert("RGB")
    except Exception as error:  # Pillow raises many kinds for a file that is not its own
        reason = "no such file" if isinstance(error, FileNotFoundError) else error
        raise OSError(f"{path} cannot be read as a picture ({reason}); use PNG or JPEG") from error


def generator(*key):
    """A CPU random generator of its own for every key, such as (seed, "train", step)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@functools.lru_cache(maxsize=1)  # it takes longer than all else that is drawn for a step
def permutation(seed, epoch, n):
    return torch.randperm(n, generator=generator(seed, "order", epoch))


def sample_digits(seed, step, n, batch_size):
    """Which of n training digits make up the batch of `step`: (B,) int64, none twice in a pass."""
    if batch_size > n:
        raise ValueError(f"--batch-size {batch_size} is larger than the data set of {n:,} images")
    # in one batch a digit would be its own negative
    epoch, k = divmod(step, n // batch_size)
    return permutation(seed, epoch, n)[k * batch_size : (k + 1) * batch_size]


class CanvasSampler:
    """Draws the parameters of canvases: where the digit lies, and what clutters it (section II.C).

    `layout` "paper": digit and distractors lie uniformly, so digits, being larger, more centrally.
    "matched": a distractor's centre has the distribution of a digit's ink (a new digit position
    plus the place of an ink pixel of another digit, moved inside), so that position says nothing.
    """

    def __init__(self, config, digits, layout="paper"):
        self.config, self.layout, size = config, layout, config["distractor_size"]
        self.ink = digits.images.cpu() > 127  # (N, 28, 28), ink is above 0.5
        ink_share = F.avg_pool2d(self.ink[:, None].float(), size, stride=1)[:, 0]
        self.window_holds_ink = ink_share * size**2 > MIN_WINDOW_INK - 0.5  # (N, 20, 20)

    def sample(self, rng, index, canvases=1):
        """Parameters of V = `canvases` canvases for each digit of `index` (B,), the same on each.

        Returns int64 CPU tensors, M = distractors, places (row, column): `digit` (B,) and its
        upper left corner, `position` (B, V, 2); `source` (B, V, M) and `window` (B, V, M, 2), the
        digit that a distractor is cut from, and where; `corner` (B, V, M, 2), where it is put.
        """
        n, S, size = len(self.ink), self.config["canvas_size"], self.config["distractor_size"]
        shape = (len(index), canvases, self.config["num_distractors"])  # (B, V, M)
        tries = 16  # one window in nine is too empty, and drawn again: all 16 are once in 10¹⁵
        other = torch.randint(n - 1, (*shape, tries), generator=rng)
        other += other >= index[:, None, None, None]  # any digit but the canvas's own
        window = torch.randint(28 - size + 1, (*shape, tries, 2), generator=rng)
        good = self.window_holds_ink[other, window[..., 0], window[..., 1]]
        first = good.int().argmax(-1, keepdim=True)
        position = torch.randint(S - 28 + 1, (*shape[:2], 2), generator=rng)
        if self.layout == "paper":
            corner = torch.randint(S - size + 1, (*shape, 2), generator=rng)
        else:
            place = torch.randint(S - 28 + 1, (*shape, 2), generator=rng)
            ink = self.ink[torch.randint(n, shape, generator=rng)].flatten(0, 2).flatten(1)
            pixel = torch.multinomial(ink.float(), 1, generator=rng).view(shape)
            centre = place + torch.stack([pixel // 28, pixel % 28], -1)
            corner = (centre - size // 2).clamp(0, S - size)
        source = other.take_along_dim(first, -1)[..., 0]
        window = window.take_along_dim(first[..., None], -2)[..., 0, :]
        drawn = {"digit": index, "position": position, "source": source}
        return drawn | {"window": window, "corner": corner}

    def sample_pieces(self, rng, index):
        """Corners (B, 1, P, 2) of windows of the digits `index`, as those of distractors."""
        good = self.window_holds_ink[index]
        n = max(1, self.config["num_distractors"])
        window = torch.multinomial(good.flatten(1).float(), n, replacement=True, generator=rng)
        return torch.stack([window // good.shape[2], window % good.shape[2]], -1)[:, None]


def render_canvases(params, config, images, masks=True):
    """Canvases and their masks from what `CanvasSampler.sample` drew, or any rows of it.

    `images` (N, 28, 28) uint8 are the digits of the same split. Returns, on their device, canvas
    (B, V, S, S) float32 in [0, 1], and digit_mask and clutter_mask, bool, or None without `masks`,
    which take half the time. Ink, above 0.5, is the digit's where the digit alone is, else clutter.
    """
    names = ("digit", "position", "source", "window", "corner")
    drawn = (to_device(params[name], images.device) for name in names)
    digit, position, source, window, corner = drawn
    (B, V, _), S = source.shape, config["canvas_size"]
    # Whole numbers up to 255, whose sums do not depend on the order that a GPU adds them in.
    canvas = torch.zeros(B, V, S, S, device=images.device)
    digits = images[digit][:, None, None].expand(B, V, 1, 28, 28)
    paste_windows(canvas, digits, position[:, :, None])
    digit_mask = canvas > 127 if masks else None
    distractors = cut_windows(images, source, window, config["distractor_size"])
    paste_windows(canvas, distractors, corner)
    clutter_mask = (canvas > 127) & ~digit_mask if masks else None
    return canvas.clamp_(max=255).div_(255), digit_mask, clutter_mask


def leave_out(params, config, images):
    """Each canvas without one of its parts, and the ink of that part.

    The parts: P pieces of the digit, at `piece` (B, 1, P, 2), from `sample_pieces`, then the M
    distractors, all of one size. Each is left out of the sum before it is clipped at 1. `params`,
    `images`: as in `render_canvases`, V = 1. Returns (B, P + M, S, S) in [0, 1], and the same bool.
    """
    names = ("digit", "position", "source", "window", "corner", "piece")
    drawn = (to_device(params[name], images.device) for name in names)
    digit, position, source, window, corner, piece = drawn
    S, size, pieces = config["canvas_size"], config["distractor_size"], piece.shape[2]
    windows = cut_windows(images, digit[:, None, None].expand(-1, 1, pieces), piece, size)
    windows = torch.cat([windows, cut_windows(images, source, window, size)], dim=2)
    corner = torch.cat([position[:, :, None] + piece, corner], dim=2)
    parts = torch.zeros(*corner.shape[::2], S, S, device=images.device)  # (B, P + M, S, S)
    paste_windows(parts, windows.transpose(1, 2), corner.transpose(1, 2))
    whole = parts[:, pieces:].sum(1, keepdim=True)
    paste_windows(whole, images[digit][:, None, None], position[:, :, None])
    return (whole - parts).clamp(max=255) / 255, parts > 127


def window_pixels(corner, size, width):
    """Flat indices of the size × size window at each corner of an image `width` wide."""
    k = torch.arange(size, device=corner.device)
    return (corner[..., 0, None, None] + k[:, None]) * width + corner[..., 1, None, None] + k


def cut_windows(images, index, corner, size):
    """Windows (B, V, M, size, size) of images[index], index (B, V, M), corner (B, V, M, 2)."""
    pixels = window_pixels(corner, size, images.shape[-1])
    return images.flatten()[index[..., None, None] * images[0].numel() + pixels]


def paste_windows(canvas, windows, corner):
    """Add windows (B, V, M, s, s) to canvas (B, V, S, S) at corner (B, V, M, 2), in place."""
    pixels = window_pixels(corner, windows.shape[-1], canvas.shape[-1]).flatten(2)
    canvas.flatten(2).scatter_add_(2, pixels, windows.flatten(2).to(canvas.dtype))


class Background:
    """What lies behind digit and clutter (figure 5): black, textures, or a folder's images.

    With config["texture_pool"] = N the split of this name has N textures in all, else one for every
    canvas. Raises ValueError or OSError for a folder whose images cannot be read.
    """

    def __init__(self, config, name, device):
        self.kind, self.size, self.pool = config["background"], config["canvas_size"], None
        if n := config["texture_pool"]:
            self.pool = sample_textures(generator("textures", name), (n,), self.size)
        if self.kind not in ("black", "texture"):
            self.images = read_folder(self.kind, 2 * self.size).to(device)

    def sample(self, rng, shape):
        """Parameters of the backgrounds of canvases, shape (B, V) and more, on the CPU."""
        if self.kind == "black":
            return {}
        if self.kind != "texture":
            image = torch.randint(len(self.images), shape, generator=rng)
            corner = torch.randint(self.size + 1, (*shape, 2), generator=rng)
            return {"image": image, "image_corner": corner}
        if self.pool is None:
            return sample_textures(rng, shape, self.size)
        index = torch.randint(len(self.pool["family"]), shape, generator=rng)
        return {name: value[index] for name, value in self.pool.items()}

    def put_behind(self, canvas, params):
        """Canvases (B, V, S, S) in [0, 1] over their backgrounds, which show where ink does not."""
        if self.kind == "black":
            return canvas
        if self.kind == "texture":
            behind = render_textures(params, self.size, canvas.device)
        else:
            index, corner = (params[k].to(canvas.device) for k in ("image", "image_corner"))
            behind = cut_windows(self.images, index[..., None], corner[..., None, :], self.size)
            behind = 0.45 * behind[:, :, 0] / 255  # darker than ink
        return canvas + (1 - canvas) * behind


def sample_textures(rng, shape, size):
    """Parameters of random textures: CPU tensors, `shape` first.

    `family` indexes TEXTURES; `wave` (…, WAVES, 3): two numbers of cycles a pixel and a phase in
    radians; `ring_centre` (…, 2) in pixels; `dark`, `bright`: extreme greys, below ink's 0.5.
    """
    u = torch.rand((7, *shape), generator=rng)
    period = 4 + 12 * u[1]  # pixels
    v = torch.rand((3, *shape, WAVES), generator=rng)
    # noise and blobs: waves of all directions and about one length; else only the first counts
    angle, spread = 2 * math.pi * v[0], 0.7 + 0.6 * v[1]
    direction = torch.stack([angle.sin(), angle.cos()], -1)
    frequency = (spread / period[..., None])[..., None] * direction
    wave = torch.cat([frequency, 2 * math.pi * v[2][..., None]], -1)
    centre, family = size * torch.stack([u[2], u[3]], -1), (u[0] * len(TEXTURES)).long()
    greys = {"dark": 0.15 * u[4], "bright": 0.25 + 0.2 * u[5]}
    return {"family": family, "wave": wave, "ring_centre": centre} | greys


def render_textures(params, size, device):
    """Textures (…, size, size) from what `sample_textures` drew, between dark and bright."""
    shape = params["family"].shape
    family = params["family"].flatten()  # on the CPU: only what a family needs is computed
    names = ("wave", "ring_centre", "dark", "bright")
    flat = {name: params[name].flatten(0, len(shape) - 1).to(device) for name in names}
    pixel = torch.arange(size, device=device, dtype=torch.float32)
    out = torch.empty(len(family), size, size, device=device)
    for number in family.unique().tolist():
        name, rows = TEXTURES[number], (family == number).nonzero()[:, 0].to(device)
        wave, centre = flat["wave"][rows], flat["ring_centre"][rows]
        if name == "rings":
            row, column = centre[..., None, None].unbind(1)  # (n, 1, 1)
            distance = torch.hypot(pixel[:, None] - row, pixel - column)
            frequency = wave[:, 0, :2].norm(dim=-1)[:, None, None]
            t = torch.sin(2 * math.pi * frequency * distance)
        elif name in ("noise", "blobs"):
            t = sum_of_waves(wave, pixel) * math.sqrt(2 / WAVES)  # of variance 1
            t = torch.tanh(4 * t) if name == "blobs" else t.div(2.5).clamp(-1, 1)
        else:
            t = sum_of_waves(wave[:, :1], pixel)
            if name != "grating":  # crossed with a wave at a right angle
                crossed = torch.stack([wave[:, 0, 1], -wave[:, 0, 0], wave[:, 1, 2]], -1)
                t = t * sum_of_waves(crossed[:, None], pixel)
                t = torch.tanh(8 * t) if name == "checks" else t
        out[rows] = t
    dark, bright = flat["dark"][:, None, None], flat["bright"][:, None, None]
    return (dark + (bright - dark) * (out + 1) / 2).view(*shape, size, size)


def sum_of_waves(wave, pixel):
    """Sum of plane waves (n, K, 3) on a grid of pixels: (n, size, size)."""
    # sin(a + b) = sin a cos b + cos a sin b, so the sum is one product of matrices
    y = 2 * math.pi * wave[..., :1] * pixel + wave[..., 2:]  # (n, K, size)
    x = 2 * math.pi * wave[..., 1:2] * pixel
    return torch.cat([y.sin(), y.cos()], 1).mT @ torch.cat([x.cos(), x.sin()], 1)


def image_files(folder):
    """The paths of all images below a folder, but those that macOS writes: ._NAME beside NAME."""
    return [
        os.path.join(path, name)
        for path, _, names in sorted(os.walk(folder))
        for name in sorted(names)
        if name.lower().endswith(IMAGE_ENDINGS) and not name.startswith("._")
    ]


@functools.lru_cache(maxsize=1)  # every set of canvases asks for it
def read_folder(folder, size):
    """All images below a folder, grey, cut square: (N, size, size) uint8. ValueError if none."""
    photos = (read_image(path).convert("L") for path in image_files(folder))
    images = [np.asarray(ImageOps.fit(photo, (size, size))) for photo in photos]
    if not images:
        raise ValueError(f"--background {folder}: no images there; use black, texture or a folder")
    return torch.from_numpy(np.stack(images))


def crop_plan(views, crops, symmetric=False):
    """Which crops are cut from which canvas, who sees them, and what the loss compares.

    `views` "same": one canvas, the same crops to both branches; with one crop each has its own.
    "different": the digit on two canvases, the teacher fed from the one, the student from the
    other; `symmetric`: each from both (III.B). `crops` a branch: 4 (2 global and 2 local), 2 or 1
    (global) (III.C). Returns plan, a list of (canvas 0 or 1, "global" or "local"); teacher and
    student, indices into it; pairs (i, j), the student's i-th crop against the teacher's j-th.
    """
    kinds = ["global", "global", "local", "local"][:crops]
    plan = [(canvas, kind) for canvas in range(1 + (views == "different")) for kind in kinds]
    if views == "same" and crops == 1:
        plan = plan * 2
    teacher = student = list(range(len(plan)))
    if len(plan) > crops and not (views == "different" and symmetric):
        teacher, student = teacher[:crops], student[crops:]
    pairs = [(i, j) for i, s in enumerate(student) for j, t in enumerate(teacher) if s != t]
    if views == "different":  # never two crops of one canvas
        pairs = [(i, j) for i, j in pairs if plan[student[i]][0] != plan[teacher[j]][0]]
    return plan, teacher, student, pairs


def sample_crops(rng, plan, batch, position, canvas_size, config):
    """Parameters of the crops in `plan` for each of B = `batch` images (section III.B).

    `position` (B, V, 2) is the digit's corner on each canvas, where local crops are centred; None
    for photographs, where they lie anywhere. Returns float32 CPU tensors, C = len(plan): `centre`
    (B, C, 2), row and column, and `side` (B, C) in canvas pixels; `angle` (B, C) radians; `sigma`
    (B, C) of the blur, pixels of the finished crop, 0 where it is not blurred.
    """
    u = torch.rand((7, batch, len(plan)), generator=rng)
    local = torch.tensor([kind == "local" for _, kind in plan])
    scales = zip(config["local_crops_scale"], config["global_crops_scale"])
    low, high = (torch.where(local, *scale) for scale in scales)
    side = canvas_size * (low + (high - low) * u[0]).sqrt()
    centre = side[..., None] / 2 + (canvas_size - side[..., None]) * u[1:3].movedim(0, -1)
    if position is not None:
        canvas = [v for v, _ in plan]
        centre = torch.where(local[:, None], position[:, canvas] + 14.0, centre)  # (B, C, 2)
    angle = math.radians(config["rotation"]) * (2 * u[4] - 1)
    least, most = config["blur"]
    sigma = (least + (most - least) * u[3]) * config["image_size"] / 224
    sigma = torch.where(u[5] < 0.5, sigma, 0.0)
    return {"centre": centre, "side": side, "angle": angle, "sigma": sigma}


def render_crops(canvases, crops, image_size, max_blur=2.0, outside="zeros"):
    """Crop, rotate, resize and blur: each crop of each image, from its canvas.

    Crop, rotation and resizing are one affine map and so one bilinear resampling. `canvases`
    (B, C, channels, S, S) float32, one for each crop; `crops` from `sample_crops`, with sigmas of
    at most `max_blur` pixels at 224. Beyond the canvas lies `outside`: "zeros" (black) or
    "reflection". Returns (B, C, channels, image_size, image_size) in [0, 1].
    """
    S, x = canvases.shape[-1], canvases.flatten(0, 1)
    crops = {name: crops[name].flatten(0, 1) for name in ("centre", "side", "angle", "sigma")}
    if S > image_size:  # smoothed first, so that thin strokes do not break up
        shrink = crops["side"] / image_size  # so many pixels become one
        sigma = 0.5 * (shrink**2 - 1).clamp(min=0).sqrt()
        x = gaussian_blur(x.clone(), sigma, 0.5 * math.sqrt((S / image_size) ** 2 - 1))
    half = crops["side"] / S  # grid_sample calls the canvas [-1, 1]²
    cos, sin = half * crops["angle"].cos(), half * crops["angle"].sin()
    row, column = (2 * crops["centre"] / S - 1).unbind(-1)
    affine = to_device(torch.stack([cos, sin, row, column]), x.device)
    cos, sin, row, column = affine[..., None, None]  # each (B·C, 1, 1)
    u = (2 * torch.arange(image_size, device=x.device) + 1) / image_size - 1  # pixel centres
    v = u[:, None]
    grid = torch.empty(len(x), image_size, image_size, 2, device=x.device)  # column, row
    torch.add(cos * u, column - sin * v, out=grid[..., 0])
    torch.add(sin * u, row + cos * v, out=grid[..., 1])
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode=outside, align_corners=False)
    x = gaussian_blur(x, crops["sigma"], max_blur * image_size / 224)
    return x.unflatten(0, canvases.shape[:2])


def gaussian_blur(x, sigma, max_sigma):
    """Blur each image (B, channels, n, n) by its own sigma (B,) in pixels, a CPU tensor.

    Borders are mirrored; x itself may be changed. `max_sigma`, the largest sigma possible, says how
    wide the kernels are, so that an image's blur does not depend on its neighbours in the batch.
    """
    # known on the CPU, so the device is not asked; below 0.3 a neighbour counts less than 0.5%
    blurred = (sigma > 0.3).nonzero()[:, 0]
    if len(blurred) == 0:
        return x
    radius = min(math.ceil(5 * max_sigma), x.shape[-1] - 1)  # what lies beyond counts for nothing
    distance = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (distance / sigma[blurred, None]) ** 2)  # (b, 2·radius + 1)
    kernel[kernel < 1e-9] = 0  # numbers below float32's normal range make a CPU ten times slower
    kernel = to_device(kernel / kernel.sum(1, keepdim=True), x.device)
    kernel = kernel.repeat_interleave(x.shape[1], dim=0)[:, None]
    blurred = to_device(blurred, x.device)
    # along rows, then along columns; each channel of each image is a group of one convolution
    y = F.pad(x[blurred], (radius,) * 4, mode="reflect").flatten(0, 1)[None]
    y = F.conv2d(y, kernel[:, :, None], groups=len(kernel))
    y = F.conv2d(y, kernel[..., None], groups=len(kernel))
    return x.index_copy_(0, blurred, y.view(len(blurred), *x.shape[1:]))


def sample_color_jitter(rng, shape):
    """Parameters of DINO's color jitter; each a CPU tensor of `shape`.

    With probability 0.8 brightness and contrast are multiplied by 0.6 to 1.4, saturation by 0.8 to
    1.2, and the hue is turned by up to a tenth of the circle; 0.2: `gray`; 0.5: mirrored, `flip`.
    """
    u = torch.rand((7, *shape), generator=rng)
    brightness, contrast, saturation, hue = torch.where(u[0] < 0.8, 2 * u[1:5] - 1, 0.0)
    params = {"brightness": 1 + 0.4 * brightness, "contrast": 1 + 0.4 * contrast}
    params |= {"saturation": 1 + 0.2 * saturation, "hue": 0.1 * hue}
    return params | {"gray": u[5] < 0.2, "flip": u[6] < 0.5}


def color_jitter(photos, params):
    """Photographs (…, 3, h, w) in [0, 1] with what `sample_color_jitter` drew for each.

    In the order brightness, contrast, saturation, hue, gray, flip, each as in torchvision. Only
    contrast, which keeps the mean, depends on other pixels, so they may come before the crop.
    """
    names = ("brightness", "contrast", "saturation", "hue", "gray", "flip")
    p = {name: to_device(params[name], photos.device)[..., None, None, None] for name in names}
    x = (photos * p["brightness"]).clamp(0, 1)
    mean = rgb_to_grayscale(x).mean((-2, -1), keepdim=True)
    x = torch.lerp(mean, x, p["contrast"]).clamp_(0, 1)
    x = torch.lerp(rgb_to_grayscale(x), x, p["saturation"]).clamp_(0, 1)
    x = adjust_hue(x, p["hue"])
    x = torch.where(p["gray"], rgb_to_grayscale(x), x)
    return torch.where(p["flip"], x.flip(-1), x)


def adjust_hue(x, turn):
    """Images (…, 3, h, w), their hue turned by this share of the circle, (…, 1, 1, 1)."""
    r, g, b = x.split(1, dim=-3)
    value, least = x.amax(-3, keepdim=True), x.amin(-3, keepdim=True)
    chroma = value - least
    scale = 1 / chroma.clamp(min=1e-12)
    green_or_blue = torch.where(value == g, (b - r) * scale + 2, (r - g) * scale + 4)
    sixth = torch.where(value == r, (g - b) * scale, green_or_blue) + 6 * turn
    offset = torch.tensor([5.0, 3.0, 1.0], device=x.device)[:, None, None]  # red, green, blue
    k = (sixth + offset).remainder_(6)
    return torch.addcmul(value, chroma, torch.minimum(k, 4 - k).clamp_(0, 1), value=-1)


def normalize(x):
    """Images (…, 1 or 3, h, w) in [0, 1] to the network's input (…, 3, h, w)."""
    return (x - to_device(MEAN, x.device)).div_(to_device(STD, x.device))


def denormalize(x):
    """The inverse of `normalize`: (…, 3, h, w) back to [0, 1]."""
    return x * STD.to(x.device) + MEAN.to(x.device)


class TrainingViews:
    """What the two branches are fed in each step; all of it a function of (seed, split, step)."""

    def __init__(self, config, split, name="train", device=None):
        self.config, self.split, self.name = config, split, name
        self.device = device or split.images.device
        self.photos = config["dataset"] == "stl10"
        if not self.photos:
            self.canvases = CanvasSampler(config, split)
            self.background = Background(config, name, self.device)
        plan = crop_plan(config["views"], config["crops"], config["symmetric"])
        self.plan, self.teacher, self.student, self.pairs = plan

    def sample(self, step):
        """Parameters of the whole batch of `step`: CPU tensors, batch first."""
        c, rng = self.config, generator(self.config["seed"], self.name, step)
        index = sample_digits(c["seed"], step, len(self.split), c["batch_size"])
        if self.photos:
            crops = sample_crops(rng, self.plan, len(index), None, self.split.images.shape[-1], c)
            return {"photo": index} | crops | sample_color_jitter(rng, crops["side"].shape)
        params = self.canvases.sample(rng, index, 2 if c["views"] == "different" else 1)
        position = params["position"]
        params |= sample_crops(rng, self.plan, len(index), position, c["canvas_size"], c)
        return params | self.background.sample(rng, position.shape[:2])

    def labels(self, params):
        """The labels (B,) of the images that `params` describe, which --loss supervised learns."""
        index = params["photo" if self.photos else "digit"]
        return self.split.labels[index.to(self.split.labels.device)].to(self.device)

    def render(self, params):
        """Crops (C, B, 3, image_size, image_size), normalized, of sampled rows; C as in plan."""
        c, size, blur = self.config, self.config["image_size"], self.config["blur"][1]
        if self.photos:
            canvas = read_photos(self.split, params["photo"], self.device)[:, None]
            canvas = canvas.expand(-1, len(self.plan), -1, -1, -1)
            first = size > canvas.shape[-1]  # change colors where there are fewer pixels
            canvas = color_jitter(canvas, params) if first else canvas
            crops = render_crops(canvas, params, size, blur, "reflection")
            crops = crops if first else color_jitter(crops, params)
        else:
            canvas, _, _ = render_canvases(params, c, self.split.images, masks=False)
            canvas = self.background.put_behind(canvas, params)
            canvas = torch.stack([canvas[:, v] for v, _ in self.plan], dim=1)  # (B, C, S, S)
            outside = "zeros" if self.background.kind == "black" else "reflection"
            crops = render_crops(canvas[:, :, None], params, size, blur, outside)
        return normalize(crops.transpose(0, 1).contiguous())


def read_photos(split, index, device):
    """STL-10's images of these indices as float32 (B, 3, 96, 96) in [0, 1]."""
    return to_device(split.images[index.to(split.images.device)], device) / 255


def evaluation_batches(
    config, split, n, layout="matched", name="test", batch_size=100, parts=False
):
    """n whole canvases or photographs, not augmented, with what is where on them.

    The same for every run: they depend on the split, the layout and the canvas alone, and fewer
    are the first of more. Photographs and digits are spread over the split by a fixed permutation,
    for MNIST's test file begins with the cleaner ones; digits come again if they are too few.
    Yields dicts of up to batch_size = b rows, with I = image_size: `images` (b, 1 or 3, I, I) in
    [0, 1]; `labels` (b,); `index` (b,), the digit or photograph of the split; of canvases also
    `digit` and `clutter` (b, I, I) bool, the masks at that size by nearest neighbour; and with
    `parts` what `leave_out` says of K parts: `without` (b, K, 1, I, I), `own` (b, K, I, I), and
    how many pixels of the canvas that is, `own_ink` (b, K).
    """
    size = config["image_size"]
    order = torch.randperm(len(split), generator=generator("evaluation", name))
    if config["dataset"] == "stl10":
        for index in order[:n].split(batch_size):
            photos = read_photos(split, index, split.images.device)
            yield {"images": resize(photos, size), "labels": split.labels[index], "index": index}
        return
    background = Background(config, name, split.images.device)
    sampler, blocks = CanvasSampler(config, split, layout), []
    for start in range(0, n, 100):
        rng = generator("evaluation", name, layout, start)
        block = sampler.sample(rng, order[torch.arange(start, start + 100) % len(split)])
        block |= background.sample(rng, (100, 1))
        blocks.append(block | {"piece": sampler.sample_pieces(rng, block["digit"])})
    params = {key: torch.cat([block[key] for block in blocks])[:n] for key in blocks[0]}
    for start in range(0, n, batch_size):
        rows = {key: value[start : start + batch_size] for key, value in params.items()}
        canvas, *masks = render_canvases(rows, config, split.images)
        digit, clutter = (nearest(mask, size)[:, 0] for mask in masks)
        batch = {"digit": digit, "clutter": clutter, "index": rows["digit"]}
        batch["labels"] = split.labels[rows["digit"].to(split.labels.device)]
        if parts:
            canvases, own = leave_out(rows, config, split.images)
            canvases = background.put_behind(canvases, rows).flatten(0, 1)[:, None]
            batch["without"] = resize(canvases, size).unflatten(0, own.shape[:2])
            batch |= {"own": nearest(own, size), "own_ink": own.sum((-2, -1))}
        yield batch | {"images": resize(background.put_behind(canvas, rows), size)}


def nearest(masks, image_size):
    """Masks (b, n, S, S) at another size, by nearest neighbour: (b, n, image_size, image_size)."""
    return F.interpolate(masks.float(), size=image_size, mode="nearest-exact") > 0.5


def resize(images, image_size):
    """Images (b, channels, S, S) brought to image_size as crops are, but uncropped."""
    n, S = len(images), float(images.shape[-1])
    crops = {"centre": torch.full((n, 1, 2), S / 2), "side": torch.full((n, 1), S)}
    crops |= {"angle": torch.zeros(n, 1), "sigma": torch.zeros(n, 1)}
    # At the rim half a pixel lies outside, in black. Divided by what becomes of white, the image
    # ends as it would if its last pixels went on: padding_mode="border", which MPS may lack.
    white = images.new_ones(1, 1, 1, *images.shape[2:])
    rim = render_crops(white, {name: value[:1] for name, value in crops.items()}, image_size)
    rim[rim > 1 - 1e-5] = 1  # rounding
    return (render_crops(images[:, None], crops, image_size) / rim)[:, 0]
