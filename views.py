"""What the network is fed: crops for a training step, whole images for evaluation.

`sample_…` draws the parameters of a whole batch on the CPU, from a seeded generator: (seed, split,
step) in training, the split and the layout in evaluation. `render_…` and the others turn any rows
of them into pixels on the device, without randomness. So an image is the same whether the run was
resumed, the batch is computed in pieces, or another rank renders it.

Shapes: B images, V canvases of each (1, or 2 for different views), C crops of each image.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from clutter import (
    DIGIT_SIZE,
    Background,
    CanvasSampler,
    leave_out,
    put_marks,
    render_canvases,
    sample_marks,
)
from data import Split, batch_indices, generator, read_photos, to_device
from settings import Config

# ImageNet's mean and standard deviation, which DINO's weights expect: (3, 1, 1) each.
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
BLUR_REFERENCE = 224  # side in pixels of the crops for which the blur's sigma is given
EVALUATION_ROWS = 100  # canvases or photographs in a batch of evaluation images


def normalize(x):
    """Images (…, 1 or 3, h, w) in [0, 1] to the network's input, (…, 3, h, w)."""
    return (x - to_device(MEAN, x.device)).div_(to_device(STD, x.device))


def denormalize(x):
    """The inverse of `normalize`: (…, 3, h, w) back to [0, 1]."""
    return x * STD.to(x.device) + MEAN.to(x.device)


# ------------------------------------------------------------------------------------------- crops


@dataclass
class CropPlan:
    """Which crops are made of an image, who sees them, and which are compared."""

    crops: list[tuple[int, str]]  # (canvas 0 or 1, "global" or "local") of each crop
    teacher: list[int]  # the crops that the teacher sees, as indices into `crops`
    student: list[int]  # the same for the student
    # (i, j): the loss compares the student's i-th crop, crops[student[i]], with the teacher's j-th.
    pairs: list[tuple[int, int]]


def crop_plan(views: str, crops_per_branch: int, symmetric: bool = False) -> CropPlan:
    """The plan for `views` "same" or "different" (section III.B) and 4, 2 or 1 crops a branch.

    Four crops are two global and two local ones; two crops or one are global (section III.C). With
    "same", both branches see the same crops of one canvas, unless `crops_per_branch` is 1: then
    each branch sees a crop of its own. With "different", the same digit lies on two canvases: the
    teacher sees crops of the first, the student of the second, or, if `symmetric`, both see crops
    of both. The teacher sees local crops too, as the paper says; DINO's sees global ones only.
    """
    sizes = ["global", "global", "local", "local"][:crops_per_branch]
    if views == "same" and crops_per_branch == 1:
        crops = [(0, "global"), (0, "global")]
        return CropPlan(crops, teacher=[0], student=[1], pairs=[(0, 0)])

    if views == "same":
        crops = [(0, size) for size in sizes]
        numbers = list(range(len(crops)))
        # A crop is not compared with itself.
        pairs = [(i, j) for i in numbers for j in numbers if i != j]
        return CropPlan(crops, teacher=numbers, student=numbers, pairs=pairs)

    crops = [(0, size) for size in sizes] + [(1, size) for size in sizes]
    numbers = list(range(len(crops)))
    if symmetric:
        # Crops of one canvas are not compared.
        pairs = [(i, j) for i in numbers for j in numbers if crops[i][0] != crops[j][0]]
        return CropPlan(crops, teacher=numbers, student=numbers, pairs=pairs)

    of_first_canvas = numbers[:crops_per_branch]
    of_second_canvas = numbers[crops_per_branch:]
    pairs = [(i, j) for i in range(crops_per_branch) for j in range(crops_per_branch)]
    return CropPlan(crops, teacher=of_first_canvas, student=of_second_canvas, pairs=pairs)


def sample_crops(
    rng: torch.Generator,
    crops: list[tuple[int, str]],
    batch: int,
    position,
    canvas_size: int,
    config: Config,
) -> dict:
    """Parameters of C = len(crops) crops of each of B = `batch` images (section III.B).

    `position` (B, V, 2) is the digit's upper left corner on each canvas; local crops are centred on
    the digit. It is None for photographs, whose local crops may lie anywhere. Returns float32 CPU
    tensors: `centre` (B, C, 2), row and column, and `side` (B, C), in pixels of the canvas; `angle`
    (B, C) in radians; `sigma` (B, C) of the blur, in pixels of the finished crop, 0 where there is
    none.
    """
    # Uniform numbers in [0, 1), (B, C) each. The last ones are not used. They are drawn so that the
    # numbers after them stay as they were, and a seed gives the images that it gave in the study.
    uniform = torch.rand((7, batch, len(crops)), generator=rng)
    scale_u, row_u, column_u, sigma_u, angle_u, coin, _ = uniform

    # side: a crop covers a share of the canvas's area, in the range for global or local crops
    is_local = torch.tensor([size == "local" for _, size in crops])
    low = torch.where(is_local, config.local_crops_scale[0], config.global_crops_scale[0])
    high = torch.where(is_local, config.local_crops_scale[1], config.global_crops_scale[1])
    side = canvas_size * (low + (high - low) * scale_u).sqrt()

    # centre: anywhere inside the canvas, or on the digit
    centre_u = torch.stack([row_u, column_u], -1)
    centre = side[..., None] / 2 + (canvas_size - side[..., None]) * centre_u
    if position is not None:
        canvas_of_crop = [number for number, _ in crops]
        digit_centre = position[:, canvas_of_crop] + DIGIT_SIZE / 2  # (B, C, 2)
        centre = torch.where(is_local[:, None], digit_centre, centre)

    # rotation, and a blur of half of the crops
    angle = math.radians(config.rotation) * (2 * angle_u - 1)
    least, most = config.blur
    sigma = (least + (most - least) * sigma_u) * config.image_size / BLUR_REFERENCE
    sigma = torch.where(coin < 0.5, sigma, 0.0)
    return {"centre": centre, "side": side, "angle": angle, "sigma": sigma}


def render_crops(
    canvases, params: dict, image_size: int, max_blur: float = 2.0, outside: str = "zeros"
):
    """Crop, rotate, resize and blur: each crop of each image, from its canvas.

    `canvases` (B, C, channels, S, S) float32 in [0, 1], one for each crop. `params` are those of
    `sample_crops`, with sigmas of at most `max_blur` pixels of a crop of 224. `outside` says what
    lies beyond the canvas: "zeros", which is black, or "reflection". Returns (B, C, channels,
    image_size, image_size) in [0, 1].

    Crop, rotation and resizing are one affine map, and so one bilinear resampling.
    """
    canvas_size = canvases.shape[-1]
    x = canvases.flatten(0, 1)
    centre, side, angle, sigma = (
        params[name].flatten(0, 1) for name in ("centre", "side", "angle", "sigma")
    )

    # Blur before shrinking, so that thin strokes do not break up. A pixel is taken to be a Gaussian
    # with a sigma of half its side, and variances add up.
    if canvas_size > image_size:
        shrinking = side / image_size  # pixels of the canvas for each of the crop, along one side
        antialias_sigma = 0.5 * (shrinking**2 - 1).clamp(min=0).sqrt()
        max_sigma = 0.5 * math.sqrt((canvas_size / image_size) ** 2 - 1)
        x = gaussian_blur_(x.clone(), antialias_sigma, max_sigma)

    # Find the place on the canvas of each pixel of the crop. In grid_sample's coordinates the canvas
    # spans -1 to 1. A pixel at (down, across) of the crop, also from -1 to 1, lies at
    #     row    = centre_row    + half · (sin(angle) · across + cos(angle) · down)
    #     column = centre_column + half · (cos(angle) · across - sin(angle) · down)
    half = side / canvas_size
    half_cos = half * angle.cos()
    half_sin = half * angle.sin()
    centre_row, centre_column = (2 * centre / canvas_size - 1).unbind(-1)
    affine = torch.stack([half_cos, half_sin, centre_row, centre_column])
    affine = to_device(affine, x.device)[..., None, None]
    half_cos, half_sin, centre_row, centre_column = affine  # (B · C, 1, 1) each
    across = (2 * torch.arange(image_size, device=x.device) + 1) / image_size - 1  # pixel centres
    down = across[:, None]
    row = half_sin * across + (centre_row + half_cos * down)
    column = half_cos * across + (centre_column - half_sin * down)
    grid = torch.stack([column, row], -1)  # (B · C, image_size, image_size, 2)

    x = F.grid_sample(x, grid, mode="bilinear", padding_mode=outside, align_corners=False)
    x = gaussian_blur_(x, sigma, max_blur * image_size / BLUR_REFERENCE)
    return x.unflatten(0, canvases.shape[:2])


def gaussian_blur_(x, sigma, max_sigma: float):
    """Blur each image of x (n, channels, S, S), in place, by its own sigma (n,) in pixels.

    `sigma` is a CPU tensor; images with 0.3 or less are left as they are. Borders are mirrored.
    `max_sigma`, the largest sigma that is possible, decides how wide the kernels are, so that the
    blur of an image does not depend on its neighbours in the batch. Returns x.
    """
    # At a sigma of 0.3 a neighbour counts for less than 0.5%. Which images are to be blurred is
    # known on the CPU, so nothing waits for the device.
    rows = (sigma > 0.3).nonzero()[:, 0]
    if len(rows) == 0:
        return x
    # Pixels more than five sigmas off count for nothing. The mirrored border must be narrower than
    # the image.
    radius = min(math.ceil(5 * max_sigma), x.shape[-1] - 1)
    offset = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offset / sigma[rows, None]) ** 2)  # (rows, 2 · radius + 1)
    # Smaller numbers may be below float32's normal range, where a CPU takes ten times as long.
    kernel[kernel < 1e-9] = 0
    kernel = to_device(kernel / kernel.sum(1, keepdim=True), x.device)
    kernel = kernel.repeat_interleave(x.shape[1], dim=0)[:, None]  # (rows · channels, 1, width)
    rows = to_device(rows, x.device)

    # Along rows, then along columns. Each channel of each image is a group of one convolution.
    y = F.pad(x[rows], (radius,) * 4, mode="reflect").flatten(0, 1)[None]
    y = F.conv2d(y, kernel[:, :, None], groups=len(kernel))
    y = F.conv2d(y, kernel[..., None], groups=len(kernel))
    return x.index_copy_(0, rows, y.view(len(rows), *x.shape[1:]))


# ------------------------------------------------------------------------------------------ colour


def sample_color_jitter(rng: torch.Generator, shape: tuple) -> dict:
    """Parameters of DINO's colour jitter; each a CPU tensor of `shape`.

    With probability 0.8 brightness and contrast are multiplied by 0.6 to 1.4, saturation by 0.8 to
    1.2, and the hue is turned by up to a tenth of the circle either way. An image loses its colours
    (`gray`) with probability 0.2, and is mirrored (`flip`) with probability 0.5.
    """
    jitter, brightness, contrast, saturation, hue, gray, flip = torch.rand(
        (7, *shape), generator=rng
    )
    is_jittered = jitter < 0.8

    def signed(uniform):
        """Uniform in [-1, 1] where the image is jittered, else 0."""
        return torch.where(is_jittered, 2 * uniform - 1, 0.0)

    return {
        "brightness": 1 + 0.4 * signed(brightness),
        "contrast": 1 + 0.4 * signed(contrast),
        "saturation": 1 + 0.2 * signed(saturation),
        "hue": 0.1 * signed(hue),
        "gray": gray < 0.2,
        "flip": flip < 0.5,
    }


def color_jitter(photos, params: dict):
    """Photographs (…, 3, h, w) in [0, 1], changed as `sample_color_jitter` drew for each.

    The order is brightness, contrast, saturation, hue, gray, flip; each works as in torchvision. All
    of it may be done before the crop or after. Only contrast depends on other pixels, through their
    mean, so there the results differ slightly. Flipping before the crop gives another crop than
    flipping after it, but places and angles are symmetric, so both are equally random.
    """
    # imported here, since it takes two seconds, and only photographs need it
    from torchvision.transforms.v2.functional import rgb_to_grayscale

    brightness, contrast, saturation, hue, gray, flip = (
        to_device(params[name], photos.device)[..., None, None, None]
        for name in ("brightness", "contrast", "saturation", "hue", "gray", "flip")
    )
    x = (photos * brightness).clamp(0, 1)
    mean = rgb_to_grayscale(x).mean((-2, -1), keepdim=True)
    x = torch.lerp(mean, x, contrast).clamp_(0, 1)
    x = torch.lerp(rgb_to_grayscale(x), x, saturation).clamp_(0, 1)
    x = adjust_hue(x, hue)
    x = torch.where(gray, rgb_to_grayscale(x), x)
    return torch.where(flip, x.flip(-1), x)


def adjust_hue(x, turn):
    """Images (…, 3, h, w) in [0, 1] with their hue turned by `turn` (…, 1, 1, 1) of the circle."""
    red, green, blue = x.split(1, dim=-3)
    value = x.amax(-3, keepdim=True)
    chroma = value - x.amin(-3, keepdim=True)
    scale = 1 / chroma.clamp(min=1e-12)

    # the hue in sixths of the circle: 0 is red, 2 green, 4 blue
    if_red = (green - blue) * scale
    if_green = (blue - red) * scale + 2
    if_blue = (red - green) * scale + 4
    hue = torch.where(value == red, if_red, torch.where(value == green, if_green, if_blue))
    hue = hue + 6 * turn

    # Back to colours, by the usual formula (Smith 1978): with k = (n + hue) mod 6, and n = 5 for
    # red, 3 for green, 1 for blue, a channel is value - chroma · clamp(min(k, 4 - k), 0, 1).
    n = torch.tensor([5.0, 3.0, 1.0], device=x.device)[:, None, None]
    k = (n + hue).remainder_(6)
    below_value = torch.minimum(k, 4 - k).clamp_(0, 1)
    return torch.addcmul(value, chroma, below_value, value=-1)  # `value=-1` is addcmul's factor


# ------------------------------------------------------------------------------- the training step


class TrainingViews:
    """What the two branches are fed in each step, as a function of (seed, split, step) alone.

    The validation loss is computed on such views too, of the validation split.

    Raises ValueError or OSError for a background folder that cannot be used, or a batch that is
    larger than the data set.
    """

    def __init__(
        self,
        config: Config,
        split: Split,
        split_name: str = "train",
        device: torch.device | None = None,
    ):
        if config.batch_size > len(split):
            raise ValueError(
                f"--batch-size {config.batch_size}: use no more than the {len(split):,} images "
                f"of the data set"
            )
        self.config = config
        self.split = split
        self.split_name = split_name
        self.device = device or split.images.device
        self.plan = crop_plan(config.views, config.crops, config.symmetric)
        self.has_photos = config.dataset == "stl10"
        if not self.has_photos:
            self.sampler = CanvasSampler(config, split)
            self.background = Background(config, self.device)

    def sample(self, step: int) -> dict:
        """Parameters of the whole batch of `step`: CPU tensors, batch first."""
        config = self.config
        rng = generator(config.seed, self.split_name, step)
        index = batch_indices(config.seed, step, len(self.split), config.batch_size)
        if self.has_photos:
            photo_size = self.split.images.shape[-1]
            crops = sample_crops(rng, self.plan.crops, len(index), None, photo_size, config)
            return {"photo": index} | crops | sample_color_jitter(rng, crops["side"].shape)
        canvases = 2 if config.views == "different" else 1
        params = self.sampler.sample(rng, index, canvases)
        position = params["position"]
        canvas_size = config.canvas_size
        params |= sample_crops(rng, self.plan.crops, len(index), position, canvas_size, config)
        params |= self.background.sample(rng, position.shape[:2])
        if config.shortcut:
            params |= sample_marks(rng, position.shape[:2], canvas_size, config.shortcut)
        return params

    def labels(self, params: dict):
        """The labels (B,) of the images that `params` describe, for --loss supervised."""
        index = params["photo"] if self.has_photos else params["digit"]
        return self.split.labels[index.to(self.split.labels.device)].to(self.device)

    def render(self, params: dict):
        """Crops (C, B, 3, image_size, image_size), normalized, of any rows of sampled parameters.

        C is the number of crops in the plan.
        """
        crops = self.render_photos(params) if self.has_photos else self.render_digits(params)
        return normalize(crops.transpose(0, 1).contiguous())

    def render_photos(self, params: dict):
        """Crops of photographs, (B, C, 3, image_size, image_size) in [0, 1]."""
        image_size = self.config.image_size
        max_blur = self.config.blur[1]
        photos = read_photos(self.split, params["photo"], self.device)[:, None]
        photos = photos.expand(-1, len(self.plan.crops), -1, -1, -1)
        # Change the colours where there are fewer pixels: before enlarging, or after shrinking.
        if image_size > photos.shape[-1]:
            photos = color_jitter(photos, params)
            return render_crops(photos, params, image_size, max_blur, "reflection")
        crops = render_crops(photos, params, image_size, max_blur, "reflection")
        return color_jitter(crops, params)

    def render_digits(self, params: dict):
        """Crops of cluttered digits, (B, C, 1, image_size, image_size) in [0, 1]."""
        config = self.config
        canvas, _, _ = render_canvases(params, config, self.split.images, masks=False)
        canvas = self.background.put_behind(canvas, params)  # (B, V, S, S)
        if config.shortcut:
            canvas, _ = put_marks(canvas, params)
        canvas = torch.stack([canvas[:, number] for number, _ in self.plan.crops], dim=1)
        outside = "zeros" if config.background == "black" else "reflection"
        return render_crops(canvas[:, :, None], params, config.image_size, config.blur[1], outside)


# -------------------------------------------------------------------------------------- evaluation


@dataclass
class LeftOut:
    """b canvases K times: images[:, k] lack their k-th part (see `clutter.leave_out`)."""

    images: torch.Tensor  # (b, K, 1, I, I) in [0, 1]
    masks: torch.Tensor  # (b, K, I, I) bool, the ink of the part
    ink: torch.Tensor  # (b, K) int64, area of that ink before resizing, in pixels of the canvas


@dataclass
class EvaluationBatch:
    """b canvases or photographs that are not augmented, I × I pixels, with what is known of them.

    Photographs have no masks. Only `left_out_batches` fills in `left_out`.
    """

    images: torch.Tensor  # (b, 1 or 3, I, I) in [0, 1]
    labels: torch.Tensor  # (b,) int64
    index: torch.Tensor  # (b,) int64, the digit or photograph of the split
    digit: torch.Tensor | None = None  # (b, I, I) bool, ink of the digit
    clutter: torch.Tensor | None = None  # (b, I, I) bool, ink of the distractors alone
    left_out: LeftOut | None = None


def evaluation_batches(
    config: Config, split: Split, count: int, layout: str = "matched", split_name: str = "test"
) -> Iterator[EvaluationBatch]:
    """`count` whole canvases or photographs of a split, the same for every seed.

    `layout` is that of `clutter.CanvasSampler`. A smaller count gives the first images of a larger
    one. If a split has fewer than `count`, digits are used again, on other canvases; photographs
    are then fewer.
    """
    if config.dataset == "stl10":
        for index in evaluation_order(split, split_name)[:count].split(EVALUATION_ROWS):
            photos = read_photos(split, index, split.images.device)
            yield EvaluationBatch(resize(photos, config.image_size), split.labels[index], index)
    else:
        background = Background(config, split.images.device)
        for params in evaluation_params(config, split, count, layout, split_name):
            yield render_evaluation_canvases(params, config, split, background)


def left_out_batches(
    config: Config, split: Split, count: int, split_name: str = "test"
) -> Iterator[EvaluationBatch]:
    """The canvases of `evaluation_batches`, layout "matched", and the same without each part.

    There are none of photographs, which have no parts.
    """
    background = Background(config, split.images.device)
    for params in evaluation_params(config, split, count, "matched", split_name):
        batch = render_evaluation_canvases(params, config, split, background)
        canvases, masks = leave_out(params, config, split.images)  # (b, K, S, S)
        canvases = background.put_behind(canvases, params).flatten(0, 1)[:, None]
        images = resize(canvases, config.image_size).unflatten(0, masks.shape[:2])
        ink = masks.sum((-2, -1))
        batch.left_out = LeftOut(images, resize_masks(masks, config.image_size), ink)
        yield batch


@dataclass
class MarkedBatch:
    """b canvases with a mark, and the same without it; I × I pixels, in [0, 1]."""

    images: torch.Tensor  # (b, 1, I, I)
    without_mark: torch.Tensor  # (b, 1, I, I)
    mark: torch.Tensor  # (b, I, I) bool, all pixels of the mark
    index: torch.Tensor  # (b,) int64, the digit of the split


def marked_batches(
    config: Config, split: Split, count: int, split_name: str = "test"
) -> Iterator[MarkedBatch]:
    """The canvases of `evaluation_batches`, layout "matched", each with a mark.

    The marks are the same for every seed and for every `--shortcut`.
    """
    background = Background(config, split.images.device)
    batches = evaluation_params(config, split, count, "matched", split_name)
    for number, params in enumerate(batches):
        marks = evaluation_marks(config, len(params["digit"]), number, split_name)
        canvas, _, _ = render_canvases(params, config, split.images, masks=False)
        canvas = background.put_behind(canvas, params)
        marked, mask = put_marks(canvas, marks)
        yield MarkedBatch(
            images=resize(marked, config.image_size),
            without_mark=resize(canvas, config.image_size),
            mark=resize_masks(mask, config.image_size)[:, 0],
            index=params["digit"],
        )


def evaluation_marks(config: Config, count: int, number: int, split_name: str) -> dict:
    """The parameters (`clutter.sample_marks`) of the marks on a batch of test canvases.

    The batch is the one with this number, from 0, and has `count` canvases.
    """
    rng = generator("evaluation", split_name, "marks", number)
    marks = sample_marks(rng, (EVALUATION_ROWS, 1), config.canvas_size, probability=1)
    return {name: value[:count] for name, value in marks.items()}


def evaluation_order(split: Split, split_name: str):
    """A fixed permutation of a split, because MNIST's test file begins with the cleaner digits."""
    return torch.randperm(len(split), generator=generator("evaluation", split_name))


def evaluation_params(
    config: Config, split: Split, count: int, layout: str, split_name: str
) -> Iterator[dict]:
    """Sample the parameters of `count` canvases, in dicts of up to EVALUATION_ROWS rows.

    Each dict is drawn whole and then cut, so that a smaller count gives the first of a larger one.
    The pieces of the digit for `clutter.leave_out` are drawn too, last: only `left_out_batches` uses
    them.
    """
    order = evaluation_order(split, split_name)
    background = Background(config, split.images.device)
    sampler = CanvasSampler(config, split, layout)
    for start in range(0, count, EVALUATION_ROWS):
        rng = generator("evaluation", split_name, layout, start)
        rows = torch.arange(start, start + EVALUATION_ROWS)
        params = sampler.sample(rng, order[rows % len(split)])
        params |= background.sample(rng, (EVALUATION_ROWS, 1))
        params["piece"] = sampler.sample_pieces(rng, params["digit"])
        yield {name: value[: count - start] for name, value in params.items()}


def render_evaluation_canvases(
    params: dict, config: Config, split: Split, background: Background
) -> EvaluationBatch:
    """The batch that `params` describe, with its masks."""
    canvas, digit_mask, clutter_mask = render_canvases(params, config, split.images)
    index = params["digit"]
    return EvaluationBatch(
        # (b, 1, S, S): there is one canvas for each digit, and it becomes the channel
        images=resize(background.put_behind(canvas, params), config.image_size),
        labels=split.labels[index.to(split.labels.device)],
        index=index,
        digit=resize_masks(digit_mask, config.image_size)[:, 0],
        clutter=resize_masks(clutter_mask, config.image_size)[:, 0],
    )


def resize_masks(masks, image_size: int):
    """Masks (b, n, S, S) resized by nearest neighbour: (b, n, image_size, image_size) bool."""
    return F.interpolate(masks.float(), size=image_size, mode="nearest-exact") > 0.5


def resize(images, image_size: int):
    """Images (b, channels, S, S) brought to image_size as crops are, but not cropped."""
    count = len(images)
    side = float(images.shape[-1])
    params = {
        "centre": torch.full((count, 1, 2), side / 2),
        "side": torch.full((count, 1), side),
        "angle": torch.zeros(count, 1),
        "sigma": torch.zeros(count, 1),
    }
    resized = render_crops(images[:, None], params, image_size)
    # Where an image is enlarged, pixels at its rim mix with the black outside. Dividing by what
    # becomes of a white image mends that, as if the outermost pixels were repeated beyond the rim.
    # grid_sample's padding_mode="border" does the same, but MPS may lack it.
    white = images.new_ones(1, 1, 1, *images.shape[2:])
    rim = render_crops(white, {name: value[:1] for name, value in params.items()}, image_size)
    rim[rim > 1 - 1e-5] = 1  # rounding
    return (resized / rim)[:, 0]
