"""Handwritten digits hidden in clutter, with the truth about every pixel, and views of them.

Cluttered MNIST (the paper's section II.C, after deepmind/mnist-cluttered) is made here, not
read from disk: a digit somewhere on a black canvas among fragments of other digits. Because
the program puts every stroke where it is, it knows which pixels are digit and which clutter,
and attention can be measured against that.

Two kinds of function, kept apart. `draw_…` chooses the *parameters* (which digit, where, which
crop, how blurred) of a whole batch on the CPU, from a generator seeded by (seed, split, step).
`render_…` turns parameters into pixels, on any device, in batches, without randomness. So any
slice of a batch can be rendered anywhere, again and again, and is always the same.
"""

import hashlib
import http.client
import math
import os
import socket
import urllib.parse
import urllib.request
from dataclasses import dataclass

import numpy as np
import sklearn.datasets
import torch
import torch.nn.functional as F
import torchvision

NO_ANSWER_SECONDS = 15  # a host that stays silent this long counts as unreachable
MIN_WINDOW_INK = 5  # ink pixels a distractor must hold
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # what DINO's weights were trained to expect
IMAGENET_STD = (0.229, 0.224, 0.225)


# -------------------------------------------------------------------------------- the digits


@dataclass
class Digits:
    """One split: `images` (N, 28, 28) uint8, `labels` (N,) int64, both on `images.device`."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self):
        return len(self.labels)

    def to(self, device):
        return Digits(self.images.to(device), self.labels.to(device))


def load_digits(source="auto", data_root="data"):
    """The three splits of the handwritten digits (section II.C).

    Args:
        source: "mnist" (from `data_root`, else by download into it), "sklearn" (1,797 digits
            that come with scikit-learn), or "auto": MNIST, else scikit-learn's with a warning.
        data_root: folder that holds, or will hold, MNIST/raw/ as torchvision lays it out.

    Returns:
        splits: {"train", "validation", "test"} of Digits. MNIST: the first 50,000 and the last
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
        "train": Digits(train[0][:n], train[1][:n]),
        "validation": Digits(train[0][n:], train[1][n:]),
        "test": Digits(*test),
    }


def download_mnist(data_root):
    silence = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NO_ANSWER_SECONDS)
    try:
        # Ask before torchvision does, which makes folders first. A host's addresses are tried in turn.
        mirror = torchvision.datasets.MNIST.mirrors[0]
        addresses = socket.getaddrinfo(urllib.parse.urlsplit(mirror).hostname, None, type=socket.SOCK_STREAM)
        first_file = mirror + torchvision.datasets.MNIST.resources[0][0]
        urllib.request.urlopen(first_file, timeout=NO_ANSWER_SECONDS / len(addresses)).close()
        torchvision.datasets.MNIST(data_root, download=True)
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
        raise OSError(
            f"no MNIST in {data_root}/MNIST/raw, and its download failed ({one_line(error)}); "
            "--data-root names the folder that has it, --digits sklearn does without"
        ) from error
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
    return {s: Digits(images[i], labels[i]) for s, i in zip(("train", "validation", "test"), parts)}


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
        raise ValueError(f"--batch-size {batch_size} is larger than the data set of {n:,} digits: at most {n:,}")
    epoch, k = divmod(step, n // batch_size)
    return torch.randperm(n, generator=generator(seed, "order", epoch))[k * batch_size : (k + 1) * batch_size]


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


def render_canvases(params, images, canvas_size, distractor_size=9):
    """Canvases and their masks from the parameters of `CanvasSampler.draw`.

    Args:
        params: as drawn, or any rows of it.
        images: (N, 28, 28) uint8, the digits of the same split; the device of the result.

    Returns, for V canvases of each of B digits, S = canvas_size:
        canvas (B, V, S, S) float32 in [0, 1];
        digit_mask, clutter_mask (B, V, S, S) bool, disjoint; what is in neither is background.
        Ink is above 0.5; it is the digit's where the digit alone is ink, else clutter's.
    """
    names = ("digit", "position", "source", "window", "corner")
    p = {name: params[name].to(images.device, non_blocking=True) for name in names}
    B, V, _ = p["source"].shape
    # In integers, whose sums do not depend on the order that a GPU adds them in.
    digit = torch.zeros(B, V, canvas_size, canvas_size, dtype=torch.int32, device=images.device)
    clutter = torch.zeros_like(digit)
    whole = images[p["digit"]][:, None, None].expand(B, V, 1, 28, 28)
    paste(digit, whole, p["position"][:, :, None])
    paste(clutter, cut(images, p["source"], p["window"], distractor_size), p["corner"])
    canvas = (digit + clutter).clamp(max=255)
    digit_mask = digit > 127
    return canvas / 255, digit_mask, (canvas > 127) & ~digit_mask


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


def draw_crops(rng, plan, position, canvas_size, image_size,
               global_crops_scale=(0.5, 1.0), local_crops_scale=(0.1, 0.4), rotation=15.0, blur=(0.1, 2.0)):
    """Parameters of the crops in `plan` for each image (section III.B).

    Args:
        position: (B, V, 2), the digit's corner on each canvas, where local crops are centred.
        global_crops_scale, local_crops_scale: range of a crop's share of the canvas's area.
        rotation: largest angle, degrees. blur: range of the Gaussian's sigma, pixels at 224;
            half of the crops are blurred.

    Returns float32 CPU tensors, batch first, C = len(plan): `centre` (B, C, 2) row and column
    in canvas pixels, `side` (B, C) likewise, `angle` (B, C) radians, `sigma` (B, C) pixels of
    the finished crop, 0 where it is not blurred.
    """
    shape = (len(position), len(plan))
    u = torch.rand((7, *shape), generator=rng)
    local = torch.tensor([kind == "local" for _, kind in plan])
    low = torch.where(local, local_crops_scale[0], global_crops_scale[0])
    high = torch.where(local, local_crops_scale[1], global_crops_scale[1])
    side = canvas_size * (low + (high - low) * u[0]).sqrt()
    anywhere = side[..., None] / 2 + (canvas_size - side[..., None]) * u[1:3].movedim(0, -1)
    canvas = torch.tensor([v for v, _ in plan])
    on_digit = position[:, canvas] + 14.0  # (B, C, 2)
    sigma = (blur[0] + (blur[1] - blur[0]) * u[3]) * image_size / 224
    return {
        "centre": torch.where(local[:, None], on_digit, anywhere),
        "side": side,
        "angle": math.radians(rotation) * (2 * u[4] - 1),
        "sigma": torch.where(u[5] < 0.5, sigma, 0.0),
    }


def render_crops(canvases, crops, image_size, max_blur=2.0):
    """Cut, turn, resize and blur: each crop of each image, from its canvas.

    Crop, rotation and resizing are one affine map and so one bilinear resampling; where the
    crop shrinks, the canvas is smoothed first, so that thin strokes do not break up. Outside
    the canvas lies black.

    Args:
        canvases: (B, C, S, S) float32, the canvas of each crop.
        crops: as `draw_crops` returns, or any rows of it.
        max_blur: the largest sigma that they were drawn from, pixels at 224.

    Returns (B, C, image_size, image_size) float32 in [0, 1].
    """
    B, C, S, _ = canvases.shape
    x = canvases.reshape(B * C, 1, S, S)
    crops = {name: value.flatten(0, 1) for name, value in crops.items()}
    shrink = crops["side"] / image_size  # canvas pixels to an image pixel
    x = gaussian_blur(x, smoothing(shrink), smoothing(torch.tensor(S / image_size)).item())
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
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return gaussian_blur(x, crops["sigma"], max_blur * image_size / 224).view(B, C, image_size, image_size)


def smoothing(shrink):
    """Sigma in canvas pixels that a crop needs before `shrink` of them become one; 0 if it grows."""
    return 0.5 * (shrink**2 - 1).clamp(min=0).sqrt()


def gaussian_blur(x, sigma, max_sigma):
    """Blur each image (B, 1, n, n) by its own sigma (B,) in pixels, a CPU tensor; 0 leaves it.

    Along rows, then along columns, each image a group of one convolution. Borders are mirrored.
    No sigma is above `max_sigma`, which says how wide the kernels are, so that the blur of an
    image does not depend on its neighbours in the batch.
    """
    some = (sigma > 0).nonzero()[:, 0]  # known on the CPU: the device is not asked
    if len(some) == 0:
        return x
    radius = min(math.ceil(6 * max_sigma), x.shape[-1] - 1)  # what lies beyond counts for nothing
    distance = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (distance / sigma[some, None]) ** 2)  # (b, 2·radius + 1)
    kernel = (kernel / kernel.sum(1, keepdim=True)).to(x.device, non_blocking=True)
    some = some.to(x.device, non_blocking=True)
    blurred = F.pad(x[some], (radius,) * 4, mode="reflect").transpose(0, 1)  # (1, b, …)
    blurred = F.conv2d(blurred, kernel[:, None, None, :], groups=len(some))
    blurred = F.conv2d(blurred, kernel[:, None, :, None], groups=len(some))
    return x.index_copy(0, some, blurred.transpose(0, 1))


def normalise(x):
    """Grey images (…, h, w) in [0, 1] to the network's input (…, 3, h, w)."""
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]).to(x.device, non_blocking=True)[..., None, None]
    return torch.addcmul(-mean / std, x.unsqueeze(-3), 1 / std)  # (x - mean) / std in one pass


def denormalise(x):
    """The inverse of `normalise`: (…, 3, h, w) back to grey (…, h, w) in [0, 1]."""
    return x[..., 0, :, :] * IMAGENET_STD[0] + IMAGENET_MEAN[0]


class TrainingViews:
    """What the two branches are fed in each step; all of it a function of (seed, split, step).

    Args:
        config: the run's settings (a dict, see train.py): seed, views, crops, symmetric,
            batch_size, image_size, canvas_size, num_distractors, distractor_size,
            global_crops_scale, local_crops_scale, rotation, blur.
        digits: the digits of `split`; views are rendered on the device of their images.
    """

    def __init__(self, config, digits, split="train"):
        self.config, self.digits, self.split = config, digits, split
        self.canvases = CanvasSampler(
            digits, config["canvas_size"], config["num_distractors"], config["distractor_size"]
        )
        plan = crop_plan(config["views"], config["crops"], config["symmetric"])
        self.plan, self.teacher, self.student, self.pairs = plan

    def draw(self, step):
        """Parameters of the whole batch of `step`: CPU tensors, batch first."""
        c = self.config
        rng = generator(c["seed"], self.split, step)
        index = draw_digits(c["seed"], step, len(self.digits), c["batch_size"])
        params = self.canvases.draw(rng, index, canvases=2 if c["views"] == "different" else 1)
        return params | draw_crops(
            rng, self.plan, params["position"], c["canvas_size"], c["image_size"],
            c["global_crops_scale"], c["local_crops_scale"], c["rotation"], c["blur"],
        )

    def render(self, params):
        """Crops (C, B, 3, image_size, image_size), normalised, of the drawn rows; C as in plan."""
        c = self.config
        canvas, _, _ = render_canvases(params, self.digits.images, c["canvas_size"], c["distractor_size"])
        canvas = torch.stack([canvas[:, v] for v, _ in self.plan], dim=1)  # (B, C, S, S)
        crops = {name: params[name] for name in ("centre", "side", "angle", "sigma")}
        return normalise(render_crops(canvas, crops, c["image_size"], c["blur"][1]).transpose(0, 1))


def evaluation_batches(config, digits, n, layout="matched", split="test", batch_size=100):
    """n whole canvases, neither cropped nor turned nor blurred, with what is where on them.

    The same for every run: they depend on the split, the layout and the canvas's size alone, and
    fewer of them are the first of more. Digits are taken in order, from the first again when
    there are fewer than n.

    Yields dicts of up to batch_size rows b, with I = config["image_size"]: `images` (b, I, I)
    float32 in [0, 1]; `digit` and `clutter` (b, I, I) bool, the masks at that size by nearest
    neighbour; `labels` (b,); `index` (b,), which digit of the split a canvas shows.
    """
    size, S = config["image_size"], config["canvas_size"]
    sampler = CanvasSampler(digits, S, config["num_distractors"], config["distractor_size"], layout)
    blocks = [
        sampler.draw(generator("evaluation", split, layout, i), torch.arange(i, i + 100) % len(digits))
        for i in range(0, n, 100)
    ]
    params = {name: torch.cat([block[name] for block in blocks])[:n] for name in blocks[0]}
    for start in range(0, n, batch_size):
        rows = {name: value[start : start + batch_size] for name, value in params.items()}
        b = len(rows["digit"])
        canvas, digit, clutter = render_canvases(rows, digits.images, S, config["distractor_size"])
        whole = {
            "centre": torch.full((b, 1, 2), S / 2),
            "side": torch.full((b, 1), float(S)),
            "angle": torch.zeros(b, 1),
            "sigma": torch.zeros(b, 1),
        }
        yield {
            "images": render_crops(canvas, whole, size)[:, 0],
            "digit": F.interpolate(digit.float(), size=size, mode="nearest-exact")[:, 0] > 0.5,
            "clutter": F.interpolate(clutter.float(), size=size, mode="nearest-exact")[:, 0] > 0.5,
            "labels": digits.labels[rows["digit"].to(digits.labels.device)],
            "index": rows["digit"],
        }
