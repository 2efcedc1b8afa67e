"""Handwritten digits hidden in clutter, with the truth about every pixel, or photographs; views of them.

Cluttered MNIST (the paper's section II.C, after deepmind/mnist-cluttered) is made here, not
read from disk: a digit somewhere on a black canvas among fragments of other digits. Because
the program puts every stroke where it is, it knows which pixels are digit and which clutter,
and attention can be measured against that.

Two kinds of function, kept apart. `draw_…` chooses the *parameters* (which digit, where, which
crop, how blurred) of a whole batch on the CPU, from a generator seeded by (seed, split, step).
`render_…` turns parameters into pixels, on any device, in batches, without randomness. So any
slice of a batch can be rendered anywhere, again and again, and is always the same.
"""

import functools
import hashlib
import http.client
import math
import os
import socket
import tempfile
import urllib.parse
import urllib.request
import warnings
from dataclasses import dataclass

import numpy as np
import sklearn.datasets
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps, UnidentifiedImageError

NO_ANSWER_SECONDS = 15  # a host that stays silent this long counts as unreachable
MIN_WINDOW_INK = 5  # ink pixels a distractor must hold
STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow knows some that start other programs
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # what DINO's weights were trained to expect
IMAGENET_STD = (0.229, 0.224, 0.225)


# ------------------------------------------------------------------------------ the data sets


@dataclass
class Split:
    """`images` uint8, digits (N, 28, 28) or STL-10's (N, 3, 96, 96), and `labels` (N,) int64, on one device."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self):
        return len(self.labels)

    def to(self, device):
        return Split(self.images.to(device), self.labels.to(device))


def load_dataset(config, device):
    """The splits that a run's settings ask for, on the device, and a line on what was replaced, or None.

    `config["digits"]` becomes what "auto" came to. STL-10 stays in the host's memory where the
    device has no room for it. Raises OSError if the data cannot be had, ValueError for a background
    folder that is of no use.
    """
    if config.get("background", "black") not in ("black", "texture"):
        Background(config, "train", device)
    if config.get("dataset") == "stl10":
        splits, warning = load_stl10(config.get("data_root", "data"), config["split"])
        roomy = device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > 3 * splits["train"].images.nbytes
        return {name: split.to(device) if roomy else split for name, split in splits.items()}, warning
    splits, config["digits"], warning = load_digits(config["digits"], config.get("data_root", "data"))
    return {name: split.to(device) for name, split in splits.items()}, warning


def load_digits(source="auto", data_root="data"):
    """The three splits of the handwritten digits (section II.C).

    Args:
        source: "mnist" (from `data_root`, else by download into it), "sklearn" (1,797 digits
            that come with scikit-learn), or "auto": MNIST, else scikit-learn's with a warning.
        data_root: folder that holds, or will hold, MNIST/raw/ as torchvision lays it out.

    Returns:
        splits: {"train", "validation", "test"}, each a Split. MNIST: the first 50,000 and the last
            10,000 of its training file, and its test file. scikit-learn: 1,297 / 250 / 250.
        source: "mnist" or "sklearn", what it came to.
        warning: None, or a line that says what was replaced and why.

    Raises OSError if "mnist" cannot be had.
    """
    warning = None
    if source != "sklearn":
        try:
            return read_mnist(data_root), "mnist", None
        except OSError as error:
            if source == "mnist":
                raise
            reason = str(error).partition(";")[0]  # without the advice, which is for whom nothing stood in
            warning = f"scikit-learn's 1,797 digits instead of MNIST: {reason}"
    return read_sklearn_digits(), "sklearn", warning


def read_mnist(data_root):
    names = [name.removesuffix(".gz") for name, _ in torchvision.datasets.MNIST.resources]
    if not all(os.path.isfile(os.path.join(data_root, "MNIST", "raw", name)) for name in names):
        download_mnist(data_root)
    try:
        files = [torchvision.datasets.MNIST(data_root, train=train) for train in (True, False)]
    except (OSError, ValueError, AssertionError, RuntimeError, KeyError, TypeError) as error:
        raise OSError(f"{data_root}/MNIST/raw is damaged: delete it, so that it is fetched again ({one_line(error)})") from error
    train, test = ((f.data, f.targets) for f in files)
    n = len(train[0]) * 5 // 6  # 50,000 of 60,000
    return {
        "train": Split(train[0][:n], train[1][:n]),
        "validation": Split(train[0][n:], train[1][n:]),
        "test": Split(*test),
    }


def download_mnist(data_root):
    mirror = torchvision.datasets.MNIST.mirrors[0]
    download(
        f"no MNIST in {data_root}/MNIST/raw", "--data-root names the folder that has it, --digits sklearn does without",
        mirror + torchvision.datasets.MNIST.resources[0][0], lambda root: torchvision.datasets.MNIST(root, download=True),
        data_root, os.path.join("MNIST", "raw"),
    )


def download(missing, advice, url, fetch, data_root, below):
    """Have `fetch` download, with torchvision, from where `url` lies; OSError if that fails.

    `fetch` is given a temporary folder as data_root; the files get their place, in the folder `below`
    of the true data_root, once all have come. So two processes do not write to the same ones.
    """
    silence = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NO_ANSWER_SECONDS)
    try:
        # Ask before any folder is made. A host's addresses are tried in turn.
        addresses = socket.getaddrinfo(urllib.parse.urlsplit(url).hostname, None, type=socket.SOCK_STREAM)
        urllib.request.urlopen(url, timeout=NO_ANSWER_SECONDS / len(addresses)).close()
        target = os.path.join(data_root, below)
        os.makedirs(target, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".part-") as root:
            fetch(root)
            for name in os.listdir(os.path.join(root, below)):
                os.replace(os.path.join(root, below, name), os.path.join(target, name))
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
        raise OSError(f"{missing}, and its download failed ({one_line(error)}); {advice}") from error
    finally:
        socket.setdefaulttimeout(silence)


def one_line(error):
    """What an exception says, without line breaks; its kind if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def read_sklearn_digits():
    """scikit-learn's 8×8 digits in MNIST's format: 20×20, centred in 28×28."""
    bunch = sklearn.datasets.load_digits()
    small = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16  # (N, 1, 8, 8)
    digits = F.interpolate(small, size=(20, 20), mode="bicubic").clamp(0, 1)
    images = F.pad(digits, (4, 4, 4, 4)).mul(255).round().to(torch.uint8)[:, 0]
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(labels)))  # a stream frozen for good
    parts = order.split([1297, 250, 250])
    return {s: Split(images[i], labels[i]) for s, i in zip(("train", "validation", "test"), parts)}


def load_stl10(data_root, split="unlabeled"):
    """STL-10 (section II.C): photographs of 96 px in ten classes, most of them without a label.

    Args:
        data_root: folder that holds, or will hold, stl10_binary/ as torchvision unpacks it.
        split: what is trained on, "unlabeled" (100,000 images) or "train" (5,000).

    Returns:
        splits: {"train": as asked for; "bank": the 5,000 labelled ones, which k-NN and probe learn
            from; "test" and "validation": the first 7,000 and the last 1,000 of the test file}.
            The files are mapped, not read; unlabelled images have the label -1.
        warning: None, or a line if files hold other numbers of images than STL-10 does.

    Raises OSError if a file is missing, truncated or altered.
    """
    folder = os.path.join(data_root, torchvision.datasets.STL10.base_folder)
    names = ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin", "unlabeled_X.bin")
    if not all(os.path.isfile(os.path.join(folder, name)) for name in names):
        download(
            f"no STL-10 in {folder}", f"put its {', '.join(names)} there, or let --data-root name the folder above theirs",
            torchvision.datasets.STL10.url, lambda root: torchvision.datasets.STL10(root, "train", download=True),
            data_root, torchvision.datasets.STL10.base_folder,
        )
    files = {name: read_stl10(folder, name) for name in dict.fromkeys((split, "train", "test"))}
    counts = {"unlabeled": 100_000, "train": 5000, "test": 8000}
    odd = [f"{len(files[name]):,} {name}, not {counts[name]:,}" for name in files if len(files[name]) != counts[name]]
    test, n = files["test"], len(files["test"]) * 7 // 8
    splits = {
        "train": files[split],
        "bank": files["train"],
        "validation": Split(test.images[n:], test.labels[n:]),
        "test": Split(test.images[:n], test.labels[:n]),
    }
    return splits, f"this STL-10 is not the whole one: {'; '.join(odd)} images" if odd else None


def read_stl10(folder, name):
    """One of STL-10's pairs of files as a Split; each image is 3 × 96 × 96 bytes, column by column."""
    path = os.path.join(folder, f"{name}_X.bin")
    n, surplus = divmod(os.path.getsize(path), 3 * 96 * 96)
    if n == 0 or surplus:
        raise OSError(f"{path} is damaged: {os.path.getsize(path):,} bytes are no whole number of images of 27,648; "
                      "delete it, so that it is fetched again")
    labels = np.full(n, -1)
    if name != "unlabeled":
        labels = np.fromfile(os.path.join(folder, f"{name}_y.bin"), dtype=np.uint8).astype(np.int64) - 1
        if len(labels) != n or not (0 <= labels.min() and labels.max() <= 9):
            raise OSError(f"{folder}/{name}_y.bin or {name}_X.bin is damaged: {len(labels):,} labels, of which each "
                          f"must be 1 to 10, for {n:,} images; delete both, so that they are fetched again")
    images = np.memmap(path, dtype=np.uint8, mode="c", shape=(n, 3, 96, 96))
    return Split(torch.from_numpy(images).mT, torch.from_numpy(labels))


# -------------------------------------------------------------------------------- the canvas


def generator(*key):
    """A CPU random generator of its own for every key, such as (seed, "train", step)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def draw_digits(seed, step, n, batch_size):
    """Which of n training digits make up the batch of `step`: (B,) int64.

    Every pass through the n digits has a permutation of its own, so that none comes twice in a
    batch, where it would be its own negative.
    """
    if batch_size > n:
        raise ValueError(f"--batch-size {batch_size} is larger than the data set of {n:,} images: at most {n:,}")
    epoch, k = divmod(step, n // batch_size)
    return order(seed, epoch, n)[k * batch_size : (k + 1) * batch_size]


@functools.lru_cache(maxsize=1)  # it takes longer than all else that is drawn for a step
def order(seed, epoch, n):
    return torch.randperm(n, generator=generator(seed, "order", epoch))


class CanvasSampler:
    """Draws the parameters of canvases: where the digit lies, and what clutters it.

    Args:
        digits: the split that digits and distractors come from; drawn from on the CPU.
        canvas_size: side in pixels; num_distractors, distractor_size: the clutter. The
            defaults are the paper's (section II.C).
        layout: "paper": digit and distractors lie uniformly. Then digits lie more centrally,
            being larger, and a map that ignores the image could tell them from clutter.
            "matched": a distractor's centre follows the law of a digit's ink (a new digit
            position plus the place of a random ink pixel of another digit, moved inside where
            it would stick out), so that position says nothing.

    A departure from the paper: a distractor window with fewer than 5 ink pixels is drawn
    again, else one in nine would be empty.
    """

    def __init__(self, digits, canvas_size=100, num_distractors=6, distractor_size=9, layout="paper"):
        if canvas_size < max(28, distractor_size):
            raise ValueError(f"canvas size {canvas_size}: a digit of 28×28 does not fit, 28 is the least")
        if layout not in ("paper", "matched"):
            raise ValueError(f"layout {layout!r}: it is paper or matched")
        self.canvas_size, self.num_distractors, self.distractor_size = canvas_size, num_distractors, distractor_size
        self.layout = layout
        self.ink = digits.images.cpu() > 127  # (N, 28, 28), ink is above 0.5
        counts = F.avg_pool2d(self.ink[:, None].float(), distractor_size, stride=1)[:, 0]  # (N, 20, 20)
        self.window_holds_ink = counts * distractor_size**2 > MIN_WINDOW_INK - 0.5

    def draw(self, rng, index, canvases=1):
        """Parameters of `canvases` canvases for each digit of `index` (B,), the same digit on each.

        Returns int64 CPU tensors, batch first; V = canvases, M = distractors, places (row, column):
            digit (B,), position (B, V, 2): the digit and its upper left corner;
            source (B, V, M), window (B, V, M, 2): the digit that a distractor is cut from,
            never the canvas's own, and where; corner (B, V, M, 2): where it is put.
        """
        B, V, M, S = len(index), canvases, self.num_distractors, self.canvas_size
        shape = (B, V, M)
        tries = 16  # one window in nine is too empty: all 16 are once in 10¹⁵
        other = torch.randint(len(self.ink) - 1, (*shape, tries), generator=rng)
        other += other >= index[:, None, None, None]  # any digit but the own
        window = torch.randint(28 - self.distractor_size + 1, (*shape, tries, 2), generator=rng)
        good = self.window_holds_ink[other, window[..., 0], window[..., 1]]
        first = good.int().argmax(-1, keepdim=True)
        position = torch.randint(S - 28 + 1, (B, V, 2), generator=rng)
        if self.layout == "paper":
            corner = torch.randint(S - self.distractor_size + 1, (*shape, 2), generator=rng)
        else:
            place = torch.randint(S - 28 + 1, (*shape, 2), generator=rng)
            model = torch.randint(len(self.ink), shape, generator=rng)
            pixel = torch.multinomial(self.ink[model].flatten(0, 2).flatten(1).float(), 1, generator=rng).view(shape)
            centre = place + torch.stack([pixel // 28, pixel % 28], -1)
            corner = (centre - self.distractor_size // 2).clamp(0, S - self.distractor_size)
        return {
            "digit": index,
            "position": position,
            "source": other.gather(-1, first)[..., 0],
            "window": window.gather(-2, first[..., None].expand(*shape, 1, 2))[..., 0, :],
            "corner": corner,
        }


def render_canvases(params, images, canvas_size, distractor_size=9, masks=True):
    """Canvases and their masks from the parameters of `CanvasSampler.draw`.

    Args:
        params: as drawn, or any rows of it.
        images: (N, 28, 28) uint8, the digits of the same split; the device of the result.
        masks: False leaves them out, which takes half the time: None stands for them.

    Returns, for V canvases of each of B digits, S = canvas_size:
        canvas (B, V, S, S) float32 in [0, 1];
        digit_mask, clutter_mask (B, V, S, S) bool, disjoint; what is in neither is background.
        Ink is above 0.5; it is the digit's where the digit alone is ink, else clutter's.
    """
    names = ("digit", "position", "source", "window", "corner")
    p = {name: params[name].to(images.device, non_blocking=True) for name in names}
    B, V, _ = p["source"].shape
    # Whole numbers up to 255, whose sums do not depend on the order that a GPU adds them in.
    canvas = torch.zeros(B, V, canvas_size, canvas_size, device=images.device)
    whole = images[p["digit"]][:, None, None].expand(B, V, 1, 28, 28)
    paste(canvas, whole, p["position"][:, :, None])
    digit_mask = canvas > 127 if masks else None
    paste(canvas, cut(images, p["source"], p["window"], distractor_size), p["corner"])
    clutter_mask = (canvas > 127) & ~digit_mask if masks else None
    return canvas.clamp_(max=255).div_(255), digit_mask, clutter_mask


def places(corner, size, width):
    """Flat indices of the size × size window at each corner of an image `width` wide."""
    k = torch.arange(size, device=corner.device)
    return (corner[..., 0, None, None] + k[:, None]) * width + corner[..., 1, None, None] + k


def cut(images, index, corner, size):
    """Windows (B, V, M, size, size) out of images[index], index (B, V, M), corner (B, V, M, 2)."""
    flat = index[..., None, None] * images[0].numel() + places(corner, size, images.shape[-1])
    return images.flatten()[flat]


def paste(canvas, windows, corner):
    """Add windows (B, V, M, s, s) to canvas (B, V, S, S) at corner (B, V, M, 2), in place."""
    index = places(corner, windows.shape[-1], canvas.shape[-1]).flatten(2)
    canvas.view(*canvas.shape[:2], -1).scatter_add_(2, index, windows.flatten(2).to(canvas.dtype))


# ------------------------------------------------------------------------------ the background

TEXTURES = ("grating", "checks", "dots", "rings", "noise", "blobs")
WAVES = 16  # plane waves that noise and blobs are the sum of


class Background:
    """What lies behind digit and clutter (the paper's figure 5): black, textures, or a folder's images.

    Args:
        config: its "background" is "black", "texture" or the name of a folder; its "texture_pool"
            how many textures there are in all, 0 for one of its own for every canvas.
        name: of the split, which has a pool of its own. device: of what is rendered.

    Raises ValueError or OSError for a folder without images, or with one that cannot be read.
    """

    def __init__(self, config, name, device):
        self.kind, self.pool, self.size = config.get("background", "black"), None, config["canvas_size"]
        pool = config.get("texture_pool", 0)
        if self.kind == "texture" and pool:
            self.pool = draw_textures(generator("textures", name), (pool,), self.size)
        if self.kind not in ("black", "texture"):
            self.images = read_folder(self.kind, 2 * self.size).to(device)

    def draw(self, rng, shape):
        """Parameters of the backgrounds of canvases, shape (B, V): CPU tensors of that shape or more."""
        if self.kind == "black":
            return {}
        if self.kind == "texture" and self.pool is None:
            return draw_textures(rng, shape, self.size)
        if self.kind == "texture":
            index = torch.randint(len(self.pool["family"]), shape, generator=rng)
            return {name: value[index] for name, value in self.pool.items()}
        return {
            "image": torch.randint(len(self.images), shape, generator=rng),
            "image_corner": torch.randint(self.size + 1, (*shape, 2), generator=rng),
        }

    def lay_behind(self, canvas, params):
        """Canvases (B, V, S, S) in [0, 1] with their backgrounds behind: as bright as ink is opaque there."""
        if self.kind == "black":
            return canvas
        if self.kind == "texture":
            behind = render_textures(params, self.size, canvas.device)
        else:
            index, corner = (params[name].to(canvas.device) for name in ("image", "image_corner"))
            behind = cut(self.images, index[..., None], corner[..., None, :], self.size)[:, :, 0]
            behind = 0.45 * behind / 255
        return canvas + (1 - canvas) * behind


def draw_textures(rng, shape, size):
    """Parameters of random textures: CPU tensors, `shape` first.

    `family` indexes TEXTURES; `wave` (…, WAVES, 3) holds plane waves, two numbers of cycles a pixel and a
    phase in radians; `ring_centre` (…, 2) is in pixels; `dark` and `bright` are the
    texture's darkest and brightest grey, below ink's 0.5.
    """
    u = torch.rand((7, *shape), generator=rng)
    family = (u[0] * len(TEXTURES)).long()
    period = 4 + 12 * u[1]  # pixels
    v = torch.rand((3, *shape, WAVES), generator=rng)
    # noise and blobs: waves of all directions and about one length; else the first wave counts alone
    angle, spread = 2 * math.pi * v[0], 0.7 + 0.6 * v[1]
    frequency = (spread / period[..., None])[..., None] * torch.stack([angle.sin(), angle.cos()], -1)
    return {
        "family": family,
        "wave": torch.cat([frequency, 2 * math.pi * v[2][..., None]], -1),
        "ring_centre": size * torch.stack([u[2], u[3]], -1),
        "dark": 0.15 * u[4],
        "bright": 0.25 + 0.2 * u[5],
    }


def render_textures(params, size, device):
    """Textures (…, size, size) of the parameters that `draw_textures` drew, between dark and bright."""
    family = params["family"].flatten()  # on the CPU: only what a family needs is computed
    wave, centre = (params[name].flatten(0, params["family"].ndim - 1).to(device) for name in ("wave", "ring_centre"))
    pixel = torch.arange(size, device=device, dtype=torch.float32)
    out = torch.empty(len(family), size, size, device=device)
    for number, name in enumerate(TEXTURES):
        rows = (family == number).nonzero()[:, 0].to(device)
        if len(rows) == 0:
            continue
        w, c = wave[rows], centre[rows]
        if name == "rings":
            distance = torch.hypot(pixel[:, None] - c[:, :1, None], pixel - c[:, 1:, None])
            t = torch.sin(2 * math.pi * w[:, 0, :2].norm(dim=-1)[:, None, None] * distance)
        elif name in ("noise", "blobs"):
            t = sum_of_waves(w, pixel) * math.sqrt(2 / WAVES)  # of variance 1
            t = torch.tanh(4 * t) if name == "blobs" else t.div(2.5).clamp(-1, 1)
        else:
            t = sum_of_waves(w[:, :1], pixel)
            if name != "grating":  # crossed with a wave at a right angle
                crossed = torch.stack([w[:, 0, 1], -w[:, 0, 0], w[:, 1, 2]], -1)[:, None]
                t = t * sum_of_waves(crossed, pixel)
                t = torch.tanh(8 * t) if name == "checks" else t
        out[rows] = t
    dark, bright = (params[name].flatten().to(device)[:, None, None] for name in ("dark", "bright"))
    return (dark + (bright - dark) * (out + 1) / 2).view(*params["family"].shape, size, size)


def sum_of_waves(wave, pixel):
    """Sum of plane waves (n, K, 3) on a grid of pixels: (n, size, size).

    sin(a + b) = sin a cos b + cos a sin b, so the sum is one product of matrices.
    """
    y = 2 * math.pi * wave[..., :1] * pixel + wave[..., 2:]  # (n, K, size)
    x = 2 * math.pi * wave[..., 1:2] * pixel
    return torch.cat([y.sin(), y.cos()], 1).mT @ torch.cat([x.cos(), x.sin()], 1)


def read_image(path):
    """An image file as Pillow's "RGB", 8 bits a channel: the first frame, upright, on white where it is transparent.

    Raises OSError, in one line, for what is missing, no image, damaged, or of more pixels than
    Pillow's limit, 89 million, up to which it takes under a gigabyte.
    """
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = ImageOps.exif_transpose(Image.open(file, formats=IMAGE_FORMATS))  # a copy
            if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip
                levels = np.asarray(image).astype(np.int32).clip(0, 65535)
                image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
            if image.mode == "F":
                raise ValueError("its pixels are floating point numbers; 8 or 16 bits are wanted")
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                page = Image.new("RGB", image.size, "white")
                page.paste(image, mask=image.getchannel("A"))
                return page
            return image.convert("RGB")
    except Exception as error:  # Pillow raises many kinds for a file that is not its own
        reason = f"cannot be read ({one_line(error)})"
        if isinstance(error, UnidentifiedImageError):
            reason = "is not a picture; PNG and JPEG files are"
        if isinstance(error, FileNotFoundError):
            reason = "is not there"
        raise OSError(f"{path} {reason}") from error


@functools.lru_cache(maxsize=1)  # every set of canvases asks for it
def read_folder(folder, size, least=8):
    """All images below a folder, grey, their shorter side brought to size and cut square: (N, size, size) uint8.

    Raises ValueError if there is none, or one that cannot be read or has a side of less than `least`.
    """
    files = []
    for path, _, names in sorted(os.walk(folder)):
        files += [os.path.join(path, name) for name in sorted(names) if name.lower().endswith(IMAGE_ENDINGS)]
    if not files:
        what = f"no image ({', '.join(IMAGE_ENDINGS)}) lies in it" if os.path.isdir(folder) else "there is no such folder"
        raise ValueError(f"--background {folder}: {what}; black, texture or a folder of images is wanted")
    images = []
    for file in files:
        try:
            image = read_image(file).convert("L")
        except OSError as error:
            raise ValueError(f"--background {folder}: {error}") from error
        if min(image.size) < least:
            raise ValueError(f"--background {folder}: {file} is too small, {image.width}×{image.height} pixels; {least} a side do")
        images.append(np.asarray(ImageOps.fit(image, (size, size))))
    return torch.from_numpy(np.stack(images))


# --------------------------------------------------------------------------------- the views


def crop_plan(views, crops, symmetric=False):
    """Which crops are cut from which canvas, who sees them, and what the loss compares.

    Args:
        views: "same" or "different" (section III.B).
        crops: 4 (2 global and 2 local), 2 (global) or 1 (global), for each branch (III.C).
        symmetric: with different views, each branch sees the crops of both canvases.

    Returns:
        plan: list of (canvas 0 or 1, "global" or "local"), all crops of one image.
        teacher, student: lists of indices into plan, what each branch is fed.
        pairs: list of (i, j), the student's i-th crop against the teacher's j-th.

    Same: one canvas, the same crops to both branches, compared wherever they are not the same
    crop; with one crop each branch has its own. Different: the digit on two canvases, the
    teacher fed from the one and the student from the other.
    """
    kinds = {1: ["global"], 2: ["global"] * 2, 4: ["global"] * 2 + ["local"] * 2}[crops]
    if views == "same" and crops > 1:
        plan = [(0, kind) for kind in kinds]
        teacher = student = list(range(crops))
    elif views == "same":
        plan = [(0, "global"), (0, "global")]
        teacher, student = [0], [1]
    else:
        plan = [(0, kind) for kind in kinds] + [(1, kind) for kind in kinds]
        teacher, student = list(range(crops)), list(range(crops, 2 * crops))
        if symmetric:
            teacher = student = list(range(2 * crops))
    pairs = [
        (i, j)
        for i, s in enumerate(student)
        for j, t in enumerate(teacher)
        if s != t and (views == "same" or plan[s][0] != plan[t][0])
    ]
    return plan, teacher, student, pairs


def draw_crops(rng, plan, batch, position, canvas_size, image_size,
               global_crops_scale=(0.5, 1.0), local_crops_scale=(0.1, 0.4), rotation=15.0, blur=(0.1, 2.0)):
    """Parameters of the crops in `plan` for each image (section III.B).

    Args:
        batch: B. position: (B, V, 2), the digit's corner on each canvas, where local crops are
            centred; None for photographs, where they lie anywhere.
        global_crops_scale, local_crops_scale: range of a crop's share of the canvas's area.
        rotation: largest angle, degrees. blur: range of the Gaussian's sigma, pixels at 224;
            half of the crops are blurred.

    Returns float32 CPU tensors, batch first, C = len(plan): `centre` (B, C, 2) row and column
    in canvas pixels, `side` (B, C) likewise, `angle` (B, C) radians, `sigma` (B, C) pixels of
    the finished crop, 0 where it is not blurred.
    """
    shape = (batch, len(plan))
    u = torch.rand((7, *shape), generator=rng)
    local = torch.tensor([kind == "local" for _, kind in plan])
    low = torch.where(local, local_crops_scale[0], global_crops_scale[0])
    high = torch.where(local, local_crops_scale[1], global_crops_scale[1])
    side = canvas_size * (low + (high - low) * u[0]).sqrt()
    centre = side[..., None] / 2 + (canvas_size - side[..., None]) * u[1:3].movedim(0, -1)
    if position is not None:
        canvas = torch.tensor([v for v, _ in plan])
        centre = torch.where(local[:, None], position[:, canvas] + 14.0, centre)  # (B, C, 2)
    sigma = (blur[0] + (blur[1] - blur[0]) * u[3]) * image_size / 224
    return {
        "centre": centre,
        "side": side,
        "angle": math.radians(rotation) * (2 * u[4] - 1),
        "sigma": torch.where(u[5] < 0.5, sigma, 0.0),
    }


def render_crops(canvases, crops, image_size, max_blur=2.0, outside="zeros"):
    """Cut, turn, resize and blur: each crop of each image, from its canvas.

    Crop, rotation and resizing are one affine map and so one bilinear resampling; where the
    crop shrinks, the canvas is smoothed first, so that thin strokes do not break up.

    Args:
        canvases: (B, C, channels, S, S) float32, the canvas of each crop.
        crops: as `draw_crops` returns, or any rows of it.
        max_blur: the largest sigma that they were drawn from, pixels at 224.
        outside: what lies beyond the canvas, "zeros" (black), "reflection" or "border" (its last pixels).

    Returns (B, C, channels, image_size, image_size) float32 in [0, 1].
    """
    B, C, channels, S, _ = canvases.shape
    x = canvases.reshape(B * C, channels, S, S)
    crops = {name: value.flatten(0, 1) for name, value in crops.items()}
    shrink = crops["side"] / image_size  # canvas pixels to an image pixel
    if S > image_size:
        x = gaussian_blur(x.clone(), smoothing(shrink), smoothing(torch.tensor(S / image_size)).item())
    half = crops["side"] / S  # grid_sample calls the canvas [-1, 1]²
    cos, sin = half * crops["angle"].cos(), half * crops["angle"].sin()
    row, column = (2 * crops["centre"] / S - 1).unbind(-1)
    affine = torch.stack([cos, sin, row, column]).to(x.device, non_blocking=True)
    cos, sin, row, column = affine[..., None, None]  # each (B·C, 1, 1)
    u = (2 * torch.arange(image_size, device=x.device) + 1) / image_size - 1  # pixel centres
    v = u[:, None]
    grid = torch.empty(B * C, image_size, image_size, 2, device=x.device)  # column, row
    torch.add(cos * u, column - sin * v, out=grid[..., 0])
    torch.add(sin * u, row + cos * v, out=grid[..., 1])
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode=outside, align_corners=False)
    return gaussian_blur(x, crops["sigma"], max_blur * image_size / 224).unflatten(0, (B, C))


def smoothing(shrink):
    """Sigma in canvas pixels that a crop needs before `shrink` of them become one; 0 if it grows."""
    return 0.5 * (shrink**2 - 1).clamp(min=0).sqrt()


def gaussian_blur(x, sigma, max_sigma):
    """Blur each image (B, channels, n, n) by its own sigma (B,) in pixels, a CPU tensor; up to 0.3 leaves it.

    (A neighbour would count for less than half a percent.) Along rows, then along columns, each
    channel a group of one convolution. Borders are mirrored. x itself may be changed. No sigma is
    above `max_sigma`, which says how wide the kernels are, so that the blur of an image does not
    depend on its neighbours in the batch.
    """
    some = (sigma > 0.3).nonzero()[:, 0]  # known on the CPU: the device is not asked
    if len(some) == 0:
        return x
    radius = min(math.ceil(5 * max_sigma), x.shape[-1] - 1)  # what lies beyond counts for nothing
    distance = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (distance / sigma[some, None]) ** 2)  # (b, 2·radius + 1)
    kernel[kernel < 1e-9] = 0  # numbers too small for float32's normal range make a CPU ten times slower
    kernel = (kernel / kernel.sum(1, keepdim=True)).to(x.device, non_blocking=True)
    kernel = kernel.repeat_interleave(x.shape[1], dim=0)
    some = some.to(x.device, non_blocking=True)
    blurred = F.pad(x[some], (radius,) * 4, mode="reflect").flatten(0, 1)[None]  # (1, b·channels, …)
    blurred = F.conv2d(blurred, kernel[:, None, None, :], groups=len(kernel))
    blurred = F.conv2d(blurred, kernel[:, None, :, None], groups=len(kernel))
    blurred = blurred.view(len(some), *x.shape[1:])
    return x.index_copy_(0, some, blurred)


def draw_colours(rng, shape, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1):
    """Parameters of the colours of photographs, as DINO changes them; each a CPU tensor of this shape.

    With probability 0.8 brightness, contrast and saturation are multiplied by up to 1 ± their
    value, and the hue is turned by up to ± `hue` of the circle; with probability 0.2 the crop
    becomes `grey`; with 0.5 it is mirrored, `flip`.
    """
    u = torch.rand((7, *shape), generator=rng)
    jitter = u[0] < 0.8
    factors = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
    params = {"hue": torch.where(jitter, hue * (2 * u[4] - 1), 0.0), "grey": u[5] < 0.2, "flip": u[6] < 0.5}
    for k, (name, most) in enumerate(factors.items(), 1):
        params[name] = torch.where(jitter, 1 + most * (2 * u[k] - 1), 1.0)
    return params


def change_colours(photos, params):
    """Photographs (…, 3, h, w) in [0, 1] with the colours that `draw_colours` drew for each.

    In the order brightness, contrast, saturation, hue, grey, flip, as torchvision defines each. None
    but contrast, which keeps the mean, depends on the place, so they may come before the crop.
    """
    p = {name: params[name].to(photos.device, non_blocking=True)[..., None, None, None] for name in
         ("brightness", "contrast", "saturation", "hue", "grey", "flip")}
    x = (photos * p["brightness"]).clamp(0, 1)
    x = torch.lerp(grey(x).mean((-2, -1), keepdim=True), x, p["contrast"]).clamp_(0, 1)
    x = torch.lerp(grey(x), x, p["saturation"]).clamp_(0, 1)
    x = turn_hue(x, p["hue"])
    x = torch.where(p["grey"], grey(x), x)
    return torch.where(p["flip"], x.flip(-1), x)


def grey(x):
    """Luminance of (…, 3, h, w), as (…, 1, h, w)."""
    r, g, b = x.split(1, dim=-3)
    return (0.2989 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)


def turn_hue(x, turn):
    """Images (…, 3, h, w) in [0, 1], their hue turned by this share of the circle, a tensor (…, 1, 1, 1)."""
    r, g, b = x.split(1, dim=-3)
    value, least = x.amax(-3, keepdim=True), x.amin(-3, keepdim=True)
    chroma = value - least
    scale = 1 / chroma.clamp(min=1e-12)
    sixth = torch.where(
        value == r, (g - b) * scale, torch.where(value == g, (b - r) * scale + 2, (r - g) * scale + 4)
    ) + 6 * turn
    k = (sixth + torch.tensor([5.0, 3.0, 1.0], device=x.device)[:, None, None]).remainder_(6)  # red, green, blue
    return torch.addcmul(value, chroma, torch.minimum(k, 4 - k).clamp_(0, 1), value=-1)


def normalise(x):
    """Images (…, 1 or 3, h, w) in [0, 1] to the network's input (…, 3, h, w)."""
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]).to(x.device, non_blocking=True)[..., None, None]
    return torch.sub(x, mean).div_(std)


def denormalise(x):
    """The inverse of `normalise`: (…, 3, h, w) back to [0, 1]."""
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=x.device)[..., None, None]
    return x * std + mean


class TrainingViews:
    """What the two branches are fed in each step; all of it a function of (seed, split, step).

    Args:
        config: the run's settings (a dict, see train.py): seed, views, crops, symmetric,
            batch_size, image_size, global_crops_scale, local_crops_scale, rotation, blur; of
            cluttered digits canvas_size, num_distractors, distractor_size and background, of
            photographs `dataset` = "stl10".
        split: the digits or photographs to draw from, and its name.
        device: what views are rendered on.
    """

    def __init__(self, config, split, name="train", device=None):
        self.config, self.split, self.name = config, split, name
        self.device = device or split.images.device
        self.photos = config.get("dataset") == "stl10"
        self.canvas_size = split.images.shape[-1] if self.photos else config["canvas_size"]
        if not self.photos:
            self.canvases = CanvasSampler(
                split, config["canvas_size"], config["num_distractors"], config["distractor_size"]
            )
            self.background = Background(config, name, self.device)
        plan = crop_plan(config["views"], config["crops"], config["symmetric"])
        self.plan, self.teacher, self.student, self.pairs = plan

    def draw(self, step):
        """Parameters of the whole batch of `step`: CPU tensors, batch first."""
        c = self.config
        rng = generator(c["seed"], self.name, step)
        index = draw_digits(c["seed"], step, len(self.split), c["batch_size"])
        params = {"photo": index}
        if not self.photos:
            params = self.canvases.draw(rng, index, canvases=2 if c["views"] == "different" else 1)
        params |= draw_crops(
            rng, self.plan, len(index), params.get("position"), self.canvas_size, c["image_size"],
            c["global_crops_scale"], c["local_crops_scale"], c["rotation"], c["blur"],
        )
        if self.photos:
            return params | draw_colours(rng, (len(index), len(self.plan)))
        return params | self.background.draw(rng, params["position"].shape[:2])

    def render(self, params):
        """Crops (C, B, 3, image_size, image_size), normalised, of the drawn rows; C as in plan."""
        c = self.config
        crops = {name: params[name] for name in ("centre", "side", "angle", "sigma")}
        if self.photos:
            canvas = read_photos(self.split, params["photo"], self.device)[:, None].expand(-1, len(self.plan), -1, -1, -1)
            first = c["image_size"] > self.canvas_size  # colours are changed where there are fewer pixels
            canvas = change_colours(canvas, params) if first else canvas
            views = render_crops(canvas, crops, c["image_size"], c["blur"][1], "reflection")
            return normalise((views if first else change_colours(views, params)).transpose(0, 1).contiguous())
        canvas, _, _ = render_canvases(params, self.split.images, c["canvas_size"], c["distractor_size"], masks=False)
        canvas = self.background.lay_behind(canvas, params)
        canvas = torch.stack([canvas[:, v] for v, _ in self.plan], dim=1)[:, :, None]  # (B, C, 1, S, S)
        outside = "zeros" if self.background.kind == "black" else "reflection"
        return normalise(render_crops(canvas, crops, c["image_size"], c["blur"][1], outside).transpose(0, 1).contiguous())


def read_photos(split, index, device):
    """STL-10's images of these indices as float32 (B, 3, 96, 96) in [0, 1]."""
    return split.images[index.to(split.images.device)].to(device, non_blocking=True) / 255


def evaluation_batches(config, split, n, layout="matched", name="test", batch_size=100, device=None):
    """n whole canvases or photographs, neither cropped nor turned nor blurred, with what is where on them.

    The same for every run: they depend on the split, the layout and the canvas alone, and fewer of
    them are the first of more. Digits and photographs are taken in order; digits from the first
    again when there are fewer than n.

    Yields dicts of up to batch_size rows b on `device` (None: the split's), with I =
    config["image_size"]: `images` (b, 1 or 3, I, I) float32 in [0, 1]; `labels` (b,); `index` (b,),
    which digit or photograph of the split it shows; of canvases also `digit` and `clutter` (b, I, I)
    bool, the masks at that size by nearest neighbour.
    """
    size = config["image_size"]
    if config.get("dataset") == "stl10":
        for index in torch.arange(min(n, len(split))).split(batch_size):
            photos = read_photos(split, index, device or split.images.device)
            yield {"images": whole(photos, size), "labels": split.labels[index], "index": index}
        return
    S, background = config["canvas_size"], Background(config, name, split.images.device)
    sampler = CanvasSampler(split, S, config["num_distractors"], config["distractor_size"], layout)
    blocks = []
    for start in range(0, n, 100):
        rng = generator("evaluation", name, layout, start)
        block = sampler.draw(rng, torch.arange(start, start + 100) % len(split))
        blocks.append(block | background.draw(rng, (100, 1)))
    params = {key: torch.cat([block[key] for block in blocks])[:n] for key in blocks[0]}
    for start in range(0, n, batch_size):
        rows = {key: value[start : start + batch_size] for key, value in params.items()}
        canvas, digit, clutter = render_canvases(rows, split.images, S, config["distractor_size"])
        yield {
            "images": whole(background.lay_behind(canvas, rows), size),
            "digit": F.interpolate(digit.float(), size=size, mode="nearest-exact")[:, 0] > 0.5,
            "clutter": F.interpolate(clutter.float(), size=size, mode="nearest-exact")[:, 0] > 0.5,
            "labels": split.labels[rows["digit"].to(split.labels.device)],
            "index": rows["digit"],
        }


def whole(images, image_size):
    """Images (b, channels, S, S) brought to image_size as crops are, but uncropped."""
    b, S = len(images), images.shape[-1]
    crops = {
        "centre": torch.full((b, 1, 2), S / 2),
        "side": torch.full((b, 1), float(S)),
        "angle": torch.zeros(b, 1),
        "sigma": torch.zeros(b, 1),
    }
    return render_crops(images[:, None], crops, image_size, outside="border")[:, 0]
