"""Pictures of every kind are read rightly or refused in one line, and found in order."""

import io
import os
import random
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import picture_files

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
        image = picture_files.read_image(str(path))
        assert image.mode == "RGB", name
        assert picture_files.read_folder(str(folder), 64).shape == (1, 64, 64), name


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
            picture_files.read_image(path)
        message = str(caught.value)
        assert message.startswith(path), name
        assert message.isprintable(), name
        assert len(message) < 500, name
        with pytest.raises(OSError, match="cannot be read as a picture"):
            picture_files.read_folder(str(folder), 64)


def test_a_picture_that_does_not_exist(tmp_path):
    with pytest.raises(OSError, match=r"x.png: no such file; use"):
        picture_files.read_image(str(tmp_path / "x.png"))
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(OSError, match=r"pipe.png is not a regular file; use"):
        picture_files.read_image(str(tmp_path / "pipe.png"))


def test_colours_are_kept(tmp_path):
    picture = colour_picture()
    picture.save(tmp_path / "x.png")
    np.testing.assert_array_equal(picture_files.read_image(str(tmp_path / "x.png")), picture)


def test_a_picture_taken_with_a_turned_camera_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: the camera was turned by a quarter
    picture = Image.fromarray(RAMP[:32])  # 64 wide, 32 high, dark on the left
    picture.save(tmp_path / "x.png", exif=exif)
    upright = picture_files.read_image(str(tmp_path / "x.png"))
    assert upright.size == (32, 64)
    assert upright.getpixel((16, 0)) == (0, 0, 0)
    assert upright.getpixel((16, 63)) == (252, 252, 252)


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert picture_files.read_image(str(tmp_path / "x.gif")).getpixel((4, 4)) == (255, 0, 0)


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
    red = np.asarray(picture_files.read_image(str(tmp_path / "x")))[..., 0]
    np.testing.assert_allclose(red, levels * (255 / white), atol=0.51)


@pytest.mark.parametrize("mode,color", [("RGBA", (0, 0, 0, 0)), ("LA", (0, 0))])
def test_what_is_transparent_lies_on_white(tmp_path, mode, color):
    Image.new(mode, (9, 9), color).save(tmp_path / "x.png")
    assert picture_files.read_image(str(tmp_path / "x.png")).getpixel((4, 4)) == (255, 255, 255)


def test_a_transparent_entry_of_a_palette_lies_on_white(tmp_path):
    Image.new("P", (9, 9), 0).save(tmp_path / "x.png", transparency=0)
    assert picture_files.read_image(str(tmp_path / "x.png")).getpixel((4, 4)) == (255, 255, 255)


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
    return np.asarray(picture_files.read_image(str(path), levels)).astype(int)


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
        with picture_files.opened_picture(str(tmp_path / "x")) as file:
            samples = picture_files.read_deep_picture(file, str(tmp_path / "x")).samples
        np.testing.assert_array_equal(samples, noise[..., 0] if channels == 1 else noise)
    with_colours = noise[..., :3]
    for byte_order in "<>":
        for compression in (1, 8):
            (tmp_path / "x").write_bytes(tiff_of(with_colours, byte_order, compression=compression))
            with picture_files.opened_picture(str(tmp_path / "x")) as file:
                samples = picture_files.read_deep_picture(file, str(tmp_path / "x")).samples
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


def test_levels_do_not_make_a_picture_transparent(tmp_path):
    """A row of black and opaque colours: levels beyond 16 bits are about the colours alone."""
    samples = np.zeros((1, 8, 4), np.uint16)
    samples[..., 3] = 65535
    (tmp_path / "x.png").write_bytes(png_of_16_bits(samples))
    black = drawn(tmp_path / "x.png", {"16-bit": (0, 100_000)})
    assert black.shape == (1, 8, 3)
    assert black.max() == 0


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
    upright = picture_files.read_image(str(tmp_path / "x.png"))
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
    survey = picture_files.survey_pictures(paths)
    assert survey.levels == {"16-bit": (0, 4095)}
    for path, brightest in zip(paths, (900, 4000)):
        expected = SHARES * brightest * 255 / 4095
        np.testing.assert_allclose(drawn(path, survey.levels)[..., 0], expected, atol=0.51)
    np.testing.assert_array_equal(drawn(paths[2], survey.levels)[..., 0], RAMP)
    (line,) = survey.notes("; override")
    assert line == "2 pictures of 16-bit samples: 0 is black, and 4095 is white; override"


def test_pictures_that_are_too_small_to_be_shown_do_not_set_the_scale(tmp_path):
    paths = deep_frames(tmp_path, [900])
    Image.fromarray(np.full((4, 20), 65535, np.uint16)).save(tmp_path / "icon.png")
    paths.append(str(tmp_path / "icon.png"))
    assert picture_files.survey_pictures(paths, least_side=5).levels == {"16-bit": (0, 1023)}
    assert picture_files.survey_pictures(paths, least_side=4).levels == {"16-bit": (0, 65535)}


def test_kinds_of_samples_have_scales_of_their_own(tmp_path):
    """Beside a photograph of 16 bits, a CT slice is not black."""
    paths = deep_frames(tmp_path, [60000])
    (tmp_path / "ct.tif").write_bytes(tiff_of(np.array([[-1000, 400]], np.int16)))
    survey = picture_files.survey_pictures([*paths, str(tmp_path / "ct.tif")])
    assert survey.levels == {"16-bit": (0, 65535), "signed 16-bit": (-1000, 400)}
    assert len(survey.notes()) == 2


def test_levels_that_are_given_hold_for_all_kinds(tmp_path):
    paths = deep_frames(tmp_path, [1000, 4000])
    (tmp_path / "float.tif").write_bytes(tiff_of((1000 * SHARES).astype(np.float32)))
    paths.append(str(tmp_path / "float.tif"))
    survey = picture_files.survey_pictures(paths, (250, 1000))
    expected = (1000 * SHARES - 250) * 255 / 750
    for path in (paths[0], paths[2]):
        np.testing.assert_allclose(drawn(path, survey.levels)[..., 0], expected, atol=0.51)
    assert drawn(paths[1], survey.levels).max() == 255
    with pytest.raises(OSError, match="nothing says which number is white.*--levels LOW HIGH"):
        picture_files.read_image(paths[2])


def test_floating_point_that_is_not_finite_is_refused(tmp_path):
    (tmp_path / "x.tif").write_bytes(tiff_of(np.array([[0, np.nan]], np.float32)))
    levels = {"32-bit floating point": (0, 1)}
    with pytest.raises(OSError, match="NaN or infinite"):
        picture_files.read_image(str(tmp_path / "x.tif"), levels)


def test_a_file_with_several_pages_is_named(tmp_path):
    pages = [Image.new("L", (8, 8), value) for value in (10, 200)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "one.tif")
    paths = [str(tmp_path / "one.tif"), str(tmp_path / "pages.tif")]
    assert picture_files.read_image(paths[1]).getpixel((0, 0)) == (10, 10, 10)
    (line,) = picture_files.survey_pictures(paths).notes()
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
            picture_files.read_image(path)
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
    paths = [os.path.relpath(path, tmp_path) for path in picture_files.image_files(str(tmp_path))]
    assert paths == ["a.PNG", "b.tif", "c/x.JPG", "d/x.JPG", "e/x.JPG", "f/x.JPG"]


def names_in(folder) -> list[str]:
    return [os.path.relpath(path, folder) for path in picture_files.image_files(str(folder))]


def test_hidden_files_and_folders_are_left_out(tmp_path):
    (tmp_path / ".thumbnails").mkdir()
    for name in (".thumbnails/a.png", ".a.png", "a.png"):
        (tmp_path / name).touch()
    assert names_in(tmp_path) == ["a.png"]
    assert names_in(tmp_path / ".thumbnails") == ["a.png"]  # which is named itself


def test_numbers_in_names_are_counted(tmp_path):
    names = ["frame1.png", "frame2.png", "frame10.png"]
    names += ["part/a.png", "part2/a.png", "part10/a.png"]
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
    marked.add_text("Software", picture_files.FIGURE_MARK)
    Image.new("L", (8, 8)).save(tmp_path / "renamed.png", pnginfo=marked)
    earlier = PngImagePlugin.PngInfo()
    earlier.add_text("Software", "Matplotlib version3.9.0, https://matplotlib.org/")
    # The figures of earlier versions are known by their names, and other plots are pictures.
    for name in ("attention-images-12.png", "attention.png", "tsne.png", "my plot.png"):
        Image.new("L", (8, 8)).save(tmp_path / name, pnginfo=earlier)
    Image.new("L", (8, 8)).save(tmp_path / "views.png")
    assert names_in(tmp_path) == ["my plot.png", "views.png"]


def test_backgrounds_that_cannot_be_read_are_skipped_with_a_line(tmp_path, capsys):
    picture_files.read_folder.cache_clear()
    for number in range(7):
        (tmp_path / f"bad\n{number}.png").write_text("no picture")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    deep_frames(tmp_path, [900, 4000])
    images = picture_files.read_folder(str(tmp_path), 16)
    assert images.amax((1, 2)).tolist() == [56, 249]  # of one scale
    printed = capsys.readouterr()
    assert "2 pictures of 16-bit samples: 0 is black, and 4095 is white\n" in printed.out
    lines = printed.err.splitlines()
    assert len(lines) == 6
    assert all(line.startswith("warning: skipped: ") for line in lines)
    assert lines[-1] == "warning: skipped: 3 other files too"


def test_text_is_shortened_in_its_middle():
    assert picture_files.shortened("short.png", 20) == "short.png"
    assert (
        picture_files.shortened("a very long name of a picture.png", 20) == "a very lon…cture.png"
    )
    assert picture_files.shortened("caf\udce9\n.png", 20) == "caf??.png"


def test_the_pictures_of_a_folder_are_grey_and_cut_square(tmp_path):
    stripes = np.zeros((30, 90), dtype=np.uint8)
    stripes[:, 30:60] = 255  # a white square in the middle
    Image.fromarray(stripes).save(tmp_path / "a.png")
    Image.new("RGB", (50, 70), (255, 0, 0)).save(tmp_path / "b.png")
    (tmp_path / "notes.txt").write_text("no picture")
    images = picture_files.read_folder(str(tmp_path), 20)
    assert images.dtype == torch.uint8
    assert images.shape == (2, 20, 20)
    assert images[0, :, 2:-2].min() == 255
    assert images[1].unique().tolist() == [76]  # the brightness of red


@pytest.mark.parametrize("folder", ["empty", "missing"])
def test_a_folder_without_pictures_is_refused(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    path = str(tmp_path / folder)
    with pytest.raises(ValueError, match=f"^--background {path}: no images there; use "):
        picture_files.read_folder(path, 20)
