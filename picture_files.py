"""Picture files: which lie in a folder, and how their samples become 8 bits.

Pictures of 8 bits are shown as they are. With more bits a file rarely says which number is white, so
one scale is assumed for all pictures of a call, and printed. What cannot be read raises OSError or
ValueError, with a message that says what to use instead.
"""

import contextlib
import functools
import os
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError
from tqdm import tqdm

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
IMAGE_ENDINGS += (".ppm", ".pgm", ".pbm", ".pnm")
# Some of Pillow's other formats start other programs (EPS runs Ghostscript).
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# What visualize.py writes into its figures, so that they are not taken for pictures to look at.
FIGURE_MARK = "visualize.py of Where does a Vision Transformer look?"
OWN_FIGURE_NAMES = re.compile(r"(attention(-compared|-images(-\d+)?)?|curves|views|tsne)\.png")
MOST_SKIPPED_LINES = 5


# ----------------------------------------------------------------------------------- picture files


@dataclass
class DeepPicture:
    """A picture whose samples have more than 8 bits or a sign, as they are stored.

    `samples` are (H, W), or (H, W, channels): 2 channels for grey and opacity, 3 for colours, 4 for
    colours and opacity. Nothing in most of these files says which number is white.
    """

    samples: np.ndarray
    kind: str  # "16-bit", "signed 16-bit", "32-bit floating point", …
    white_is_zero: bool = False
    orientation: int = 1  # of the camera, as EXIF counts


@dataclass
class PictureSurvey:
    """What several picture files have in common, see `survey_pictures`."""

    levels: dict[str, tuple[float, float]]  # {kind: (what is black, what is white)}
    counts: dict[str, int]  # {kind: how many pictures there are of it}
    several_pages: list[str]  # the paths of files with more than one page or frame

    def notes(self, override: str = "") -> list[str]:
        """Lines that say what was assumed, and `override`, how to change it."""
        lines = [
            f"{count_of(self.counts[kind], 'picture')} of {kind} samples: {low:g} is black, and "
            f"{high:g} is white{override}"
            for kind, (low, high) in self.levels.items()
        ]
        if self.several_pages:
            first = shortened(os.path.basename(self.several_pages[0]), 40)
            count = count_of(len(self.several_pages), "file")
            lines.append(f"only the first page or frame is read of {count} with several ({first})")
        return lines


def count_of(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def printable(text: str) -> str:
    """The text with ? for what cannot be printed: control characters, and what is not UTF-8."""
    return "".join(character if character.isprintable() else "?" for character in text)


def shortened(text: str, length: int) -> str:
    """The text, printable, with … in its middle if it has more than `length` characters."""
    text = printable(text)
    if len(text) <= length:
        return text
    end = (length - 1) // 2
    return f"{text[: length - 1 - end]}…{text[len(text) - end :]}"


@contextlib.contextmanager
def opened_picture(path: str):
    """An image file that Pillow has opened: it has read the header, but not the pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Pillow warns of more than 89 million pixels, which would take a gigabyte.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=IMAGE_FORMATS) as file:
            yield file


def read_image(path: str, levels: dict[str, tuple[float, float]] | None = None) -> Image.Image:
    """An image file as "RGB": its first page or frame, upright, on white where it is transparent.

    `levels` says what is black and white in pictures of more than 8 bits, {kind: (black, white)};
    `survey_pictures` finds them for several pictures. A kind that is not there is given the levels
    that this file suggests. Pictures of 8 bits stay as they are.

    Raises OSError for a file that is no picture, or too large, or whose levels cannot be told.
    """
    way_out = "use PNG or JPEG"
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"{path} is not a regular file; use a picture or a folder")
    try:
        with opened_picture(path) as file:
            deep = read_deep_picture(file, path)
            if deep is not None:
                way_out = "use PNG or JPEG of 8 bits, or --levels LOW HIGH of visualize.py"
                image = to_8_bits(deep, levels or {})
            else:
                image = ImageOps.exif_transpose(file)  # a copy
                if image.mode == "I":  # a PGM file, which says what is white; Pillow makes it 65535
                    image = Image.fromarray(scaled(np.asarray(image), 0, 65535))
                if image.mode == "F":
                    raise ValueError("floating point pixels; use 8 or 16 bits")
        if "A" in image.getbands() or "transparency" in image.info:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return image.convert("RGB")
    except Exception as error:  # Pillow raises many kinds for a file that is not its own
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{path}: no such file; use a picture or a folder") from error
        reason = error
        if isinstance(error, UnidentifiedImageError):  # which repeats the path
            reason = "unknown format"
        raise OSError(f"{path} cannot be read as a picture ({reason}); {way_out}") from error


def read_deep_picture(file: Image.Image, path: str) -> DeepPicture | None:
    """The samples of a picture that Pillow has opened, or None if they are of 8 bits or fewer.

    Raises ValueError for samples that cannot be read as they are stored.
    """
    deep = None
    if file.format == "PNG" and file.tile and str(file.tile[0][3]).endswith(";16B"):
        deep = DeepPicture(read_deep_png(file, path), "16-bit")
    elif file.format == "TIFF":
        deep = read_deep_tiff(file, path)
    if deep is not None:
        deep.orientation = file.getexif().get(ExifTags.Base.Orientation, 1)
    return deep


def read_deep_png(file: Image.Image, path: str) -> np.ndarray:
    """The samples of a PNG file of 16 bits: (H, W) or (H, W, channels) uint16."""
    if file.mode == "I;16":
        samples = np.asarray(loaded(file))
    elif file.tile[0][3] == "LA;16B":
        # Pillow would drop the lower byte of each sample. Read as RGBA, the four bytes of a pixel
        # are both bytes of its grey and both of its opacity.
        file.tile = [with_layout(tile, "RGBA") for tile in file.tile]
        samples = np.asarray(loaded(file)).view(">u2").astype(np.uint16)
    else:
        samples = read_both_bytes(file, path)
    transparent = file.info.get("transparency")  # the one colour that is not drawn
    if transparent is not None:
        channels = samples if samples.ndim == 3 else samples[..., None]
        is_opaque = (channels != transparent).any(-1)
        samples = np.dstack([channels, is_opaque.astype(np.uint16) * 65535])
    return samples


def read_deep_tiff(file: Image.Image, path: str) -> DeepPicture | None:
    """The samples of a TIFF file; None for those of 8 bits or fewer without a sign."""
    tags = file.tag_v2
    bits = max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
    sample_format = max(tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,)))
    is_signed = sample_format == 2
    if bits <= 8 and not is_signed:
        return None
    if file.mode in ("RGB", "RGBA") and bits == 16:
        if tags.get(TiffImagePlugin.PLANAR_CONFIGURATION, 1) != 1:
            raise ValueError("16 bits, and its colours one after the other")
        return DeepPicture(read_both_bytes(file, path), "16-bit")

    samples = np.asarray(loaded(file))
    if samples.ndim > 2:
        sign = "signed " if is_signed else ""
        raise ValueError(f"{sign}{bits}-bit samples of {file.mode}")
    white_is_zero = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    if file.mode == "F":
        return DeepPicture(samples, f"{bits}-bit floating point", white_is_zero)
    if is_signed:
        dtype = np.dtype(f"int{bits}")
        # Pillow takes int8 for uint8, whose bytes are the same.
        samples = samples.view(dtype) if bits == 8 else samples.astype(dtype)
        return DeepPicture(samples, f"signed {bits}-bit", white_is_zero)
    if bits == 32:
        samples = samples.view(np.uint32)  # Pillow takes it for int32
    else:
        samples = samples.astype(np.uint16)
    return DeepPicture(samples, f"{bits}-bit", white_is_zero)


def read_both_bytes(file: Image.Image, path: str) -> np.ndarray:
    """The samples of a picture with 16 bits for each colour: (H, W, 3 or 4) uint16.

    Pillow keeps the more significant byte of each sample. If it is told that the bytes are stored in
    the other order, it keeps the less significant one, so the file is read twice.
    """
    upper = np.asarray(loaded(file))
    other_order = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}  # N: native
    with opened_picture(path) as again:
        tiles = []
        for tile in again.tile:
            layout = tile[3] if isinstance(tile[3], str) else tile[3][0]
            if layout[-4:-1] != ";16":
                raise ValueError(f"16 bits as {layout}")
            tiles.append(with_layout(tile, layout[:-1] + other_order[layout[-1]]))
        again.tile = tiles
        lower = np.asarray(loaded(again))
    return upper.astype(np.uint16) * 256 + lower


def with_layout(tile: tuple, layout: str) -> tuple:
    """A tile of Pillow's, (decoder, extents, offset, options), with another layout of its bytes."""
    options = layout if isinstance(tile[3], str) else (layout, *tile[3][1:])
    make_tuple = getattr(type(tile), "_make", tuple)  # older versions of Pillow have plain tuples
    return make_tuple([*tile[:3], options])


def loaded(file: Image.Image) -> Image.Image:
    """The picture, whose pixels are read now, since numpy would hide why they cannot be."""
    file.load()
    return file


def to_8_bits(deep: DeepPicture, levels: dict[str, tuple[float, float]]) -> Image.Image:
    """A picture with 8 bits a sample, upright: "L", "LA", "RGB" or "RGBA".

    `levels` are those of `read_image`. Raises ValueError if nothing says what is white.
    """
    samples = deep.samples
    opacity = None
    if samples.ndim == 3 and samples.shape[-1] in (2, 4):
        opacity = samples[..., -1]
        samples = samples[..., :-1]
        if samples.shape[-1] == 1:
            samples = samples[..., 0]
    if not np.isfinite(samples).all():
        raise ValueError("some pixels are NaN or infinite")
    if deep.kind in levels:
        black, white = levels[deep.kind]
    else:
        black, white = assumed_levels(deep.kind, *extremes(deep))

    values = scaled(samples, black, white)
    if deep.white_is_zero:
        values = 255 - values
    image = Image.fromarray(values)
    if opacity is not None:
        # Some programs that put 10 bits into 16 do so for the opacity too.
        opaque = white if opacity.max() <= white <= 65535 else 65535
        image.putalpha(Image.fromarray(scaled(opacity, 0, opaque)))
    image.getexif()[ExifTags.Base.Orientation] = deep.orientation
    return ImageOps.exif_transpose(image)


def scaled(samples: np.ndarray, black: float, white: float) -> np.ndarray:
    """Samples as uint8: `black` becomes 0, `white` 255, and what lies beyond is clipped."""
    precision = np.float32 if samples.dtype.itemsize <= 2 else np.float64
    shares = (samples.astype(precision) - black) / (white - black)
    return (255 * shares.clip(0, 1) + 0.5).astype(np.uint8)


def extremes(deep: DeepPicture) -> tuple[float, float]:
    """The lowest and the highest sample, ignoring opacity."""
    samples = deep.samples
    if samples.ndim == 3 and samples.shape[-1] in (2, 4):
        samples = samples[..., :-1]
    return samples.min().item(), samples.max().item()


def assumed_levels(kind: str, lowest: float, highest: float) -> tuple[float, float]:
    """What is black and what is white in pictures of one kind with these extremes.

    Cameras and scanners put 8, 10, 12 or 14 bits into 16: white is the largest number of the fewest
    bits that hold the highest sample. Where samples may be below 0, as in a CT slice, or have 32
    bits, black is the lowest sample, or 0 if that is lower, and white is the highest.
    Raises ValueError for floating point, of which nothing can be assumed.
    """
    if "floating point" in kind:
        raise ValueError("floating point pixels, and nothing says which number is white")
    if kind == "12-bit":  # the file says so
        return 0, 4095
    if kind == "16-bit":
        bits = next(bits for bits in (8, 10, 12, 14, 16) if highest < 2**bits)
        return 0, 2**bits - 1
    black = min(0, lowest)
    return black, max(highest, black + 1)


def survey_pictures(
    paths: Iterable[str], levels: tuple[float, float] | None = None, least_side: int = 1
) -> PictureSurvey:
    """What is black and what is white in all of these pictures, for each kind of more than 8 bits.

    All pictures of a kind have the same levels, so that two frames of one camera can be compared:
    `levels` if they are given, or else what is assumed of the lowest and highest sample of all.
    Files that cannot be read, or have fewer than `least_side` pixels, do not count: they will not be
    shown.
    """
    all_extremes = {}
    counts = {}
    several_pages = []
    for path in tqdm(paths, "looking at levels", unit="picture", leave=False, disable=None):
        deep = None
        with contextlib.suppress(Exception), opened_picture(path) as file:
            if min(file.size) < least_side:
                continue
            deep = read_deep_picture(file, path)
            if getattr(file, "is_animated", False):
                several_pages.append(path)
        if deep is not None:
            counts[deep.kind] = counts.get(deep.kind, 0) + 1
            all_extremes.setdefault(deep.kind, []).append(extremes(deep))

    levels_of_kinds = {}
    for kind, of_pictures in all_extremes.items():
        if levels is not None:
            levels_of_kinds[kind] = levels
        elif "floating point" not in kind:
            lowest = min(low for low, _ in of_pictures)
            highest = max(high for _, high in of_pictures)
            levels_of_kinds[kind] = assumed_levels(kind, lowest, highest)
    return PictureSurvey(levels_of_kinds, counts, several_pages)


# --------------------------------------------------------------------------------- picture folders


def is_own_figure(path: str) -> bool:
    """Whether a file is a figure that visualize.py has drawn, of which it writes a mark.

    Earlier versions wrote none; theirs are known by their names and by matplotlib's mark.
    """
    if not path.lower().endswith(".png"):
        return False
    try:
        with open(path, "rb") as file:
            header = file.read(1000)
    except OSError:
        return False
    has_own_name = OWN_FIGURE_NAMES.fullmatch(os.path.basename(path)) is not None
    return FIGURE_MARK.encode() in header or (has_own_name and b"Matplotlib version" in header)


def natural_order(name: str) -> tuple:
    """A key to sort names by, in which frame2 comes before frame10."""
    parts = re.split("([0-9]+)", name)  # text, number, text, …
    return [int(part) if position % 2 else part for position, part in enumerate(parts)], name


def image_files(folder: str) -> list[str]:
    """The paths of all images below a folder, each file once, those of a folder before its folders'.

    Names with a leading dot and the figures of visualize.py are left out. Links are followed.
    """
    paths = {}  # {where it really is: path}
    folders_seen = {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders_to_enter = []
        for name in sorted(folders, key=natural_order):
            real_path = os.path.realpath(os.path.join(parent, name))
            if not name.startswith(".") and real_path not in folders_seen:
                folders_seen.add(real_path)
                folders_to_enter.append(name)
        folders[:] = folders_to_enter  # os.walk goes on with these

        for name in sorted(names, key=natural_order):
            path = os.path.join(parent, name)
            if not name.lower().endswith(IMAGE_ENDINGS) or name.startswith("."):
                continue
            is_device = os.path.exists(path) and not os.path.isfile(path)  # or a pipe
            if not is_device and not is_own_figure(path):
                paths.setdefault(os.path.realpath(path), path)
    return list(paths.values())


def print_skipped(errors: Sequence[Exception]):
    """Say why files of a folder are skipped, in a line each for the first ones."""
    for error in errors[:MOST_SKIPPED_LINES]:
        print(printable(f"warning: skipped: {error}"), file=sys.stderr)
    if len(errors) > MOST_SKIPPED_LINES:
        others = len(errors) - MOST_SKIPPED_LINES
        print(f"warning: skipped: {count_of(others, 'other file')} too", file=sys.stderr)


@functools.lru_cache(maxsize=1)  # every set of canvases asks for it
def read_folder(folder: str, size: int):
    """All images below a folder in grey, cut square: (N, size, size) uint8.

    What was assumed about them is printed, and which files cannot be read and are skipped. Raises
    ValueError if there are none, OSError if none can be read.
    """
    paths = image_files(folder)
    survey = survey_pictures(paths)
    images = []
    errors = []
    for path in paths:
        try:
            photo = read_image(path, survey.levels).convert("L")
        except OSError as error:
            errors.append(error)
        else:
            images.append(np.asarray(ImageOps.fit(photo, (size, size))))
    if errors and not images:
        raise errors[0]
    if not images:
        raise ValueError(f"--background {folder}: no images there; use black, texture or a folder")
    is_first_rank = not dist.is_initialized() or dist.get_rank() == 0
    if is_first_rank:
        for line in survey.notes():
            print(printable(f"--background {folder}: {line}"))
        print_skipped(errors)
    return torch.from_numpy(np.stack(images))
