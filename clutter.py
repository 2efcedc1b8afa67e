"""What is generated: canvases of a digit in clutter, and the masks that say what is where.

Cluttered MNIST (section II.C, after deepmind/mnist-cluttered) puts one digit among fragments of
others. Randomness and pixels are kept apart: `sample` draws the parameters of a whole batch on the
CPU, from a seeded generator; `render_canvases` turns any rows of them into pixels on any device,
without randomness, and so always into the same ones.

Shapes: B digits, V canvases of each, M distractors on a canvas of S × S pixels. Places are upper
left corners, (row, column).
"""

import math

import torch
import torch.nn.functional as F

from data import Split, to_device
from picture_files import read_folder
from settings import Config

DIGIT_SIZE = 28  # MNIST's, pixels
MIN_WINDOW_INK = 5  # ink pixels that a distractor must hold
WINDOW_TRIES = 16  # one 9×9 window in five holds fewer; all 16 do four times in 10¹²
INK_LEVEL = 127  # a pixel of 0 to 255 is ink if it is above this, so above 0.5 in [0, 1]
TEXTURES = ("grating", "checks", "dots", "rings", "noise", "blobs")
MARK_SIZE = 9  # pixels, so that a mark is as large as a distractor
MARK_LEVELS = (0.2, 1.0)  # darkest and brightest grey of a mark, in [0, 1]
WAVES = 16  # plane waves that a texture of noise or blobs is the sum of
PHOTO_BRIGHTNESS = 0.45  # background photographs are darkened to at most this; ink is above 0.5


class CanvasSampler:
    """Draws the parameters of canvases: where the digit lies, and what clutters it (section II.C).

    `digits` is the Split that digits and distractors are taken from. `layout` "paper": digit and
    distractors lie uniformly; digits are larger, so they end up more centrally. `layout` "matched":
    a distractor's centre has the distribution of a digit's ink, except that it is moved inside the
    canvas, so that position says almost nothing about which is which.
    """

    def __init__(self, config: Config, digits: Split, layout: str = "paper"):
        self.config = config
        self.layout = layout
        self.ink = digits.images.cpu() > INK_LEVEL  # (N, 28, 28)
        size = config.distractor_size
        # First along columns, then along rows: pooling squares of 50,000 digits takes a second.
        ink_share = F.avg_pool2d(self.ink[:, None].float(), (size, 1), stride=1)
        ink_share = F.avg_pool2d(ink_share, (1, size), stride=1)[:, 0]
        # [n, row, column]: does the window of digit n at this corner hold enough ink? (N, 20, 20)
        # for windows of 9×9.
        self.window_holds_ink = ink_share * size**2 > MIN_WINDOW_INK - 0.5

    def sample(self, rng: torch.Generator, index, canvases: int = 1) -> dict:
        """Parameters of V = `canvases` canvases for each digit of `index` (B,).

        Returns a dict of int64 CPU tensors: `digit` (B,), the number of the digit, which is the
        same on all of its canvases; `position` (B, V, 2), where the digit lies on the canvas;
        `source` (B, V, M), the number of the digit that a distractor is cut from; `window`
        (B, V, M, 2), where on that digit it is cut; `corner` (B, V, M, 2), where on the canvas the
        distractor is put.
        """
        shape = (len(index), canvases, self.config.num_distractors)  # (B, V, M)
        source, window = self.sample_windows(rng, index, shape)
        num_corners = self.config.canvas_size - DIGIT_SIZE + 1  # along each side of the canvas
        position = torch.randint(num_corners, (*shape[:2], 2), generator=rng)
        if self.layout == "paper":
            corner = self.sample_uniform_corners(rng, shape)
        else:
            corner = self.sample_matched_corners(rng, shape)
        return {
            "digit": index,
            "position": position,
            "source": source,
            "window": window,
            "corner": corner,
        }

    def sample_windows(self, rng, index, shape):
        """What distractors are cut from: source (B, V, M) and window (B, V, M, 2).

        For each distractor WINDOW_TRIES candidates are drawn, digit and window, and the first that
        holds enough ink is taken (the first of all, should none do). So how many random numbers are
        drawn does not depend on the digits.
        """
        count = len(self.ink)
        tries = (*shape, WINDOW_TRIES)
        source = torch.randint(count - 1, tries, generator=rng)
        source += source >= index[:, None, None, None]  # any digit but the canvas's own
        num_corners = DIGIT_SIZE - self.config.distractor_size + 1  # along each side of a digit
        window = torch.randint(num_corners, (*tries, 2), generator=rng)
        is_good = self.window_holds_ink[source, window[..., 0], window[..., 1]]
        first_good = is_good.int().argmax(-1, keepdim=True)
        source = source.take_along_dim(first_good, -1)[..., 0]
        window = window.take_along_dim(first_good[..., None], -2)[..., 0, :]
        return source, window

    def sample_uniform_corners(self, rng, shape):
        """Corners of distractors that may lie anywhere: (B, V, M, 2)."""
        num_corners = self.config.canvas_size - self.config.distractor_size + 1
        return torch.randint(num_corners, (*shape, 2), generator=rng)

    def sample_matched_corners(self, rng, shape):
        """Corners of distractors whose centres are distributed as a digit's ink is: (B, V, M, 2).

        For each distractor an invisible digit is drawn, any of the split, at a position of its own.
        One of that digit's ink pixels is the distractor's centre, moved so that the distractor lies
        inside the canvas.
        """
        canvas_size = self.config.canvas_size
        size = self.config.distractor_size
        num_corners = canvas_size - DIGIT_SIZE + 1
        invisible_position = torch.randint(num_corners, (*shape, 2), generator=rng)
        invisible_digit = torch.randint(len(self.ink), shape, generator=rng)
        ink = self.ink[invisible_digit].flatten(0, 2).flatten(1)  # (B · V · M, 784)
        pixel = torch.multinomial(ink.float(), 1, generator=rng).view(shape)
        row_and_column = torch.stack([pixel // DIGIT_SIZE, pixel % DIGIT_SIZE], -1)
        centre = invisible_position + row_and_column
        return (centre - size // 2).clamp(0, canvas_size - size)

    def sample_pieces(self, rng: torch.Generator, index):
        """Windows of the digits `index` (B,) with enough ink, as large as distractors.

        They are for `leave_out`, which compares a piece of the digit with a distractor. Returns
        their corners on the digit, (B, 1, P, 2). P is the number of distractors, but at least 1;
        pieces may repeat.
        """
        holds_ink = self.window_holds_ink[index]
        count = max(1, self.config.num_distractors)
        window = torch.multinomial(
            holds_ink.flatten(1).float(), count, replacement=True, generator=rng
        )
        columns = holds_ink.shape[2]
        return torch.stack([window // columns, window % columns], -1)[:, None]


def render_canvases(params: dict, config: Config, images, masks: bool = True):
    """Canvases and their masks from what `CanvasSampler.sample` drew, or any rows of that.

    `images` (N, 28, 28) uint8 are the digits of the same split. Returns, on their device, canvas
    (B, V, S, S) float32 in [0, 1], digit_mask and clutter_mask (B, V, S, S) bool. A pixel above 0.5
    is ink. It belongs to the digit if the digit alone exceeds 0.5 there, else to the clutter.
    Without `masks`, which take half of the time, both are None.
    """
    digit, position, source, window, corner = (
        to_device(params[name], images.device)
        for name in ("digit", "position", "source", "window", "corner")
    )
    batch, canvases, _ = source.shape
    canvas_size = config.canvas_size
    # Pixels are added as whole numbers, which float32 holds exactly, so their sum does not depend
    # on the order in which a GPU adds them. They are clipped and divided by 255 at the end.
    canvas = torch.zeros(batch, canvases, canvas_size, canvas_size, device=images.device)

    # paste the digit
    digits = images[digit][:, None, None].expand(batch, canvases, 1, DIGIT_SIZE, DIGIT_SIZE)
    paste_windows_(canvas, digits, position[:, :, None])
    digit_mask = canvas > INK_LEVEL if masks else None

    # add the distractors
    distractors = cut_windows(images, source, window, config.distractor_size)
    paste_windows_(canvas, distractors, corner)
    clutter_mask = (canvas > INK_LEVEL) & ~digit_mask if masks else None
    return canvas.clamp_(max=255).div_(255), digit_mask, clutter_mask


def leave_out(params: dict, config: Config, images):
    """Each canvas without one of its parts, and the ink of that part.

    This is for asking what a network's feature depends on: how far does it move if the part is not
    there? The parts are P pieces of the digit, then the M distractors, all of one size. A part is
    taken out of the sum of pixels before this is clipped, so what lies beneath it appears.

    `params` and `images` are as in `render_canvases`, with V = 1 and with `piece` (B, 1, P, 2) from
    `sample_pieces`. Returns canvases (B, P + M, S, S) in [0, 1], and masks of the same shape, bool:
    all ink of the part, also where other ink covers it.
    """
    digit, position, source, window, corner, piece_corner = (
        to_device(params[name], images.device)
        for name in ("digit", "position", "source", "window", "corner", "piece")
    )
    canvas_size = config.canvas_size
    num_pieces = piece_corner.shape[2]

    # cut all parts
    piece_source = digit[:, None, None].expand(-1, 1, num_pieces)
    piece_windows = cut_windows(images, piece_source, piece_corner, config.distractor_size)
    distractors = cut_windows(images, source, window, config.distractor_size)
    windows = torch.cat([piece_windows, distractors], dim=2)
    part_corner = torch.cat([position[:, :, None] + piece_corner, corner], dim=2)

    # paste each on a canvas of its own
    batch, _, count, _ = part_corner.shape
    parts = torch.zeros(batch, count, canvas_size, canvas_size, device=images.device)
    paste_windows_(parts, windows.transpose(1, 2), part_corner.transpose(1, 2))

    # the whole canvas: all that `render_canvases` pastes, the digit and all distractors
    whole_canvas = parts[:, num_pieces:].sum(1, keepdim=True)
    paste_windows_(whole_canvas, images[digit][:, None, None], position[:, :, None])
    return (whole_canvas - parts).clamp(max=255) / 255, parts > INK_LEVEL


def window_pixels(corner, size: int, width: int):
    """Flat indices of the size × size window at each corner (…, 2) of an image `width` wide."""
    offset = torch.arange(size, device=corner.device)
    rows = corner[..., 0, None, None] + offset[:, None]
    columns = corner[..., 1, None, None] + offset
    return rows * width + columns


def cut_windows(images, index, corner, size: int):
    """Windows (B, V, M, size, size) of images[index], index (B, V, M), corner (B, V, M, 2)."""
    pixels = window_pixels(corner, size, images.shape[-1])
    return images.flatten()[index[..., None, None] * images[0].numel() + pixels]


def paste_windows_(canvas, windows, corner):
    """Add windows (B, V, M, s, s) to a contiguous canvas (B, V, S, S) at corner (B, V, M, 2).

    This changes the canvas.
    """
    pixels = window_pixels(corner, windows.shape[-1], canvas.shape[-1]).flatten(2)
    canvas.flatten(2).scatter_add_(2, pixels, windows.flatten(2).to(canvas.dtype))


# ------------------------------------------------------------------------------------------- marks


def sample_marks(
    rng: torch.Generator, shape: tuple[int, int], canvas_size: int, probability: float
) -> dict:
    """Parameters of the marks of B digits with V canvases each, `shape` (B, V): CPU tensors.

    A mark is a square of one grey level. With `probability` a digit has one, of the same level on
    all of its canvases, each at a place of its own. Two views that show a mark can be matched by
    its level, without the digit, so it is a shortcut. A mark also hides what lies under it.

    Returns `has_mark` (B,) bool, `mark_level` (B,) float32 from MARK_LEVELS, and `mark_corner`
    (B, V, 2).
    """
    batch, canvases = shape
    has_mark = torch.rand(batch, generator=rng) < probability
    darkest, brightest = MARK_LEVELS
    mark_level = darkest + (brightest - darkest) * torch.rand(batch, generator=rng)
    num_corners = canvas_size - MARK_SIZE + 1
    mark_corner = torch.randint(num_corners, (batch, canvases, 2), generator=rng)
    return {"has_mark": has_mark, "mark_level": mark_level, "mark_corner": mark_corner}


def put_marks(canvas, params: dict):
    """Canvases (B, V, S, S) in [0, 1] with their marks on top of all else, and where they lie.

    `params` are those of `sample_marks`, or any rows of them. Returns the canvases and a mask of
    the same shape, bool, of the marks.
    """
    has_mark, level, corner = (
        to_device(params[name], canvas.device) for name in ("has_mark", "mark_level", "mark_corner")
    )
    batch, canvases = canvas.shape[:2]
    squares = has_mark.view(batch, 1, 1, 1, 1).expand(-1, canvases, 1, MARK_SIZE, MARK_SIZE)
    mask = torch.zeros_like(canvas)
    paste_windows_(mask, squares, corner[:, :, None])
    mask = mask.bool()
    return torch.where(mask, level.view(batch, 1, 1, 1), canvas), mask


# ------------------------------------------------------------------------------------- backgrounds


class Background:
    """What lies behind digit and clutter (figure 5).

    config.background is "black"; "texture", a random one for every canvas; or a folder of images.
    Raises ValueError or OSError for a folder whose images cannot be read.
    """

    def __init__(self, config: Config, device: torch.device):
        self.background = config.background
        self.size = config.canvas_size
        if self.background not in ("black", "texture"):
            # (images, 2 · size, 2 · size) uint8, so that a canvas shows a part of an image
            self.images = read_folder(self.background, 2 * self.size).to(device)

    def sample(self, rng: torch.Generator, shape: tuple) -> dict:
        """Parameters of the backgrounds of canvases: CPU tensors, `shape` (B, V) first."""
        if self.background == "black":
            return {}
        if self.background == "texture":
            return sample_textures(rng, shape, self.size)
        image = torch.randint(len(self.images), shape, generator=rng)
        corner = torch.randint(self.size + 1, (*shape, 2), generator=rng)
        return {"image": image, "image_corner": corner}

    def put_behind(self, canvas, params: dict):
        """Canvases (B, V, S, S) in [0, 1] over their backgrounds, which show where there is no ink.

        Grey rims of strokes are blended, so masks are to be made before.
        """
        if self.background == "black":
            return canvas
        if self.background == "texture":
            background = render_textures(params, self.size, canvas.device)
        else:
            background = self.cut_photos(params, canvas.device)
        return canvas + (1 - canvas) * background

    def cut_photos(self, params: dict, device: torch.device):
        """Windows of the folder's images, darker than ink: (B, V, S, S)."""
        index = params["image"].to(device)[..., None]
        corner = params["image_corner"].to(device)[..., None, :]
        photos = cut_windows(self.images, index, corner, self.size)[:, :, 0]
        return PHOTO_BRIGHTNESS * photos / 255


def sample_textures(rng: torch.Generator, shape: tuple, size: int) -> dict:
    """Parameters of random textures: CPU tensors, `shape` first.

    `family` indexes TEXTURES. `wave` (…, WAVES, 3) holds two frequencies, in cycles per pixel down
    and across, and a phase in radians. `ring_centre` (…, 2) is in pixels. `dark` and `bright` are
    the extreme greys, below ink's 0.5.
    """
    # The last of the seven rows is not used. It is drawn so that the numbers after it stay as they
    # were, and a seed gives the textures that it gave when the study was made.
    family, period, row, column, dark, bright, _ = torch.rand((7, *shape), generator=rng)
    period = 4 + 12 * period  # pixels

    # Noise and blobs are sums of waves of about one length in all directions. The other families
    # use the first wave, and dots and checks also the phase of the second.
    angle, spread, phase = torch.rand((3, *shape, WAVES), generator=rng)
    angle = 2 * math.pi * angle
    spread = 0.7 + 0.6 * spread
    direction = torch.stack([angle.sin(), angle.cos()], -1)
    frequency = (spread / period[..., None])[..., None] * direction
    wave = torch.cat([frequency, 2 * math.pi * phase[..., None]], -1)
    return {
        "family": (family * len(TEXTURES)).long(),
        "wave": wave,
        "ring_centre": size * torch.stack([row, column], -1),
        "dark": 0.15 * dark,
        "bright": 0.25 + 0.2 * bright,
    }


def render_textures(params: dict, size: int, device: torch.device):
    """Textures (…, size, size) from what `sample_textures` drew, between dark and bright."""
    shape = params["family"].shape
    family = params["family"].flatten()  # on the CPU, to compute only what each family needs
    wave, ring_centre, dark, bright = (
        params[name].flatten(0, len(shape) - 1).to(device)
        for name in ("wave", "ring_centre", "dark", "bright")
    )
    pattern = torch.empty(len(family), size, size, device=device)  # from -1 to 1
    for number in family.unique().tolist():
        rows = (family == number).nonzero()[:, 0].to(device)
        pattern[rows] = texture_pattern(TEXTURES[number], wave[rows], ring_centre[rows], size)
    dark, bright = dark[:, None, None], bright[:, None, None]
    return (dark + (bright - dark) * (pattern + 1) / 2).view(*shape, size, size)


def texture_pattern(family: str, wave, ring_centre, size: int):
    """Patterns of one family, (n, size, size) in [-1, 1], from (n, WAVES, 3) and (n, 2)."""
    pixel = torch.arange(size, device=wave.device, dtype=torch.float32)
    if family == "rings":
        row, column = ring_centre[..., None, None].unbind(1)  # (n, 1, 1)
        distance = torch.hypot(pixel[:, None] - row, pixel - column)
        frequency = wave[:, 0, :2].norm(dim=-1)[:, None, None]
        return torch.sin(2 * math.pi * frequency * distance)
    if family in ("noise", "blobs"):
        noise = sum_of_waves(wave, pixel) * math.sqrt(2 / WAVES)  # its variance is 1
        if family == "noise":
            return noise.div(2.5).clamp(-1, 1)  # 2.5 standard deviations
        return torch.tanh(4 * noise)  # hardens the edges
    grating = sum_of_waves(wave[:, :1], pixel)
    if family == "grating":
        return grating
    # dots and checks: crossed with a second wave at a right angle
    crossed = torch.stack([wave[:, 0, 1], -wave[:, 0, 0], wave[:, 1, 2]], -1)
    dots = grating * sum_of_waves(crossed[:, None], pixel)
    if family == "dots":
        return dots
    return torch.tanh(8 * dots)  # hardens the edges


def sum_of_waves(wave, pixel):
    """Sum of plane waves (n, W, 3) on a square grid of pixels (size,): (n, size, size)."""
    # sin(a + b) = sin a cos b + cos a sin b, so the sum over waves is one product of matrices.
    y = 2 * math.pi * wave[..., :1] * pixel + wave[..., 2:]  # (n, W, size)
    x = 2 * math.pi * wave[..., 1:2] * pixel
    return torch.cat([y.sin(), y.cos()], 1).mT @ torch.cat([x.cos(), x.sin()], 1)
