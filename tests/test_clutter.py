"""A canvas is exactly the sum of its parts, and its masks tell which pixel belongs to what."""

import math

import numpy as np
import pytest
import torch
from helpers import DIGITS
from PIL import Image
from scipy.stats import chisquare
from sklearn.metrics import roc_auc_score
from torch.testing import assert_close

import clutter
import settings
from data import Split

CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def laptop(**changes) -> settings.Config:
    """The settings of the preset laptop, with changes."""
    return settings.make_config(changes, "laptop")


# ---------------------------------------------------------------------------------------- canvases


@pytest.mark.parametrize(
    "canvas_size,num_distractors,distractor_size", [(64, 6, 9), (100, 2, 12), (28, 1, 28)]
)
def test_a_canvas_is_rebuilt_from_its_parts(canvas_size, num_distractors, distractor_size):
    """With numpy, one canvas after the other."""
    config = laptop(
        canvas_size=canvas_size, num_distractors=num_distractors, distractor_size=distractor_size
    )
    split = DIGITS["train"][:12]
    sampler = clutter.CanvasSampler(config, split)
    params = sampler.sample(seeded(), torch.arange(40) % 12, canvases=2)
    canvas, digit_mask, clutter_mask = clutter.render_canvases(params, config, split.images)
    shape = (40, 2, canvas_size, canvas_size)
    assert canvas.shape == digit_mask.shape == clutter_mask.shape == shape
    assert params["corner"].shape == (40, 2, num_distractors, 2)

    images = split.images.numpy().astype(int)
    for b, v in np.ndindex(40, 2):
        # the digit
        digit = np.zeros((canvas_size, canvas_size), dtype=int)
        row, column = params["position"][b, v].tolist()
        digit[row : row + 28, column : column + 28] += images[params["digit"][b]]
        # the distractors
        distractors = np.zeros((canvas_size, canvas_size), dtype=int)
        for m in range(num_distractors):
            source = params["source"][b, v, m]
            assert source != params["digit"][b]
            window = square(images[source], params["window"][b, v, m], distractor_size)
            assert window.shape == (distractor_size, distractor_size)
            assert (window > 127).sum() >= 5
            place = square(distractors, params["corner"][b, v, m], distractor_size)
            assert place.shape == window.shape
            place += window
        # what is on the canvas
        expected = np.minimum(digit + distractors, 255)
        np.testing.assert_array_equal(canvas[b, v], expected.astype(np.float32) / np.float32(255))
        np.testing.assert_array_equal(digit_mask[b, v], digit > 127)
        np.testing.assert_array_equal(clutter_mask[b, v], (expected > 127) & ~(digit > 127))


def square(image, corner, size: int):
    """The part of an image of which the corner is the upper left one; a view of it."""
    row, column = corner.tolist()
    return image[row : row + size, column : column + size]


def test_canvases_without_masks_and_rows_of_a_batch_are_the_same_canvases():
    config = laptop()
    images = DIGITS["train"].images
    sampler = clutter.CanvasSampler(config, DIGITS["train"])
    params = sampler.sample(seeded(), torch.arange(20), canvases=2)
    rendered = clutter.render_canvases(params, config, images)
    canvas, digit_mask, clutter_mask = clutter.render_canvases(params, config, images, masks=False)
    assert torch.equal(canvas, rendered[0])
    assert digit_mask is None
    assert clutter_mask is None
    rows = {name: value[3:8] for name, value in params.items()}
    for tensor, expected in zip(clutter.render_canvases(rows, config, images), rendered):
        assert torch.equal(tensor, expected[3:8])


def test_random_numbers_are_those_of_earlier_versions():
    """Every published number depends on them."""
    sampler = clutter.CanvasSampler(laptop(), DIGITS["train"])
    params = sampler.sample(seeded(), torch.arange(2))
    assert params["position"].tolist() == [[[20, 26]], [[30, 21]]]
    assert params["source"].tolist() == [[[1053, 937, 180]], [[735, 536, 843]]]
    assert params["window"].tolist() == [
        [[[6, 15], [13, 11], [10, 6]]],
        [[[6, 15], [1, 3], [17, 3]]],
    ]
    assert params["corner"].tolist() == [
        [[[40, 3], [32, 20], [34, 30]]],
        [[[27, 37], [53, 44], [23, 40]]],
    ]

    textures = clutter.sample_textures(seeded(), (2,), 64)
    assert textures["family"].tolist() == [2, 4]
    first_waves = torch.tensor([[0.226079, -0.063973, 3.430596], [0.138513, -0.049966, 0.032248]])
    assert_close(textures["wave"][:, 0], first_waves, atol=1e-5, rtol=0)
    assert_close(textures["dark"], torch.tensor([0.068344, 0.094846]), atol=1e-5, rtol=0)
    assert_close(textures["bright"], torch.tensor([0.319779, 0.330343]), atol=1e-5, rtol=0)


def test_places_do_not_depend_on_how_many_windows_hold_too_little_ink():
    """Each distractor draws as many random numbers, whatever the digits look like."""
    white = Split(torch.full((1297, 28, 28), 255, dtype=torch.uint8), DIGITS["train"].labels)
    params = clutter.CanvasSampler(laptop(), DIGITS["train"]).sample(seeded(), torch.arange(50))
    of_white = clutter.CanvasSampler(laptop(), white).sample(seeded(), torch.arange(50))
    assert torch.equal(params["position"], of_white["position"])
    assert torch.equal(params["corner"], of_white["corner"])
    assert not torch.equal(params["window"], of_white["window"])


def test_positions_are_uniform_and_inside():
    sampler = clutter.CanvasSampler(laptop(), DIGITS["train"])
    index = torch.randint(1297, (20_000,), generator=seeded(2))
    params = sampler.sample(seeded(1), index)
    for name, size in (("position", 28), ("corner", 9)):
        for axis in (0, 1):
            places = params[name][..., axis].flatten()
            counts = torch.bincount(places, minlength=64 - size + 1)
            assert len(counts) == 64 - size + 1, "outside of the canvas"
            assert chisquare(counts.numpy()).pvalue > 0.001
    # distractors are cut from every digit
    assert torch.bincount(params["source"].flatten(), minlength=1297).min() > 0


@pytest.mark.parametrize("preset", ["paper", "laptop"])
def test_matched_layout_hides_position_and_paper_layout_does_not(preset):
    """A Gaussian in the centre, blind to the image, cannot tell digit from clutter on `matched`."""
    config = settings.make_config(preset=preset)
    canvas_size = config.canvas_size
    coordinate = (torch.arange(canvas_size) - (canvas_size - 1) / 2) / canvas_size
    distance = torch.hypot(coordinate[:, None], coordinate)
    gaussian = torch.exp(-0.5 * (distance / 0.15) ** 2).expand(2000, -1, -1)
    density_ratio = {}
    auroc = {}
    for layout in ("paper", "matched"):
        sampler = clutter.CanvasSampler(config, DIGITS["test"], layout)
        params = sampler.sample(seeded(3), torch.arange(2000) % 250)
        assert params["corner"].min() >= 0
        assert params["corner"].max() <= canvas_size - 9
        _, digit, distractors = clutter.render_canvases(params, config, DIGITS["test"].images)
        digit = digit[:, 0]
        distractors = distractors[:, 0]
        density_ratio[layout] = (gaussian[digit].mean() / gaussian[distractors].mean()).item()
        ink = digit | distractors
        auroc[layout] = roc_auc_score(digit[ink], gaussian[ink])
    assert 0.95 < density_ratio["matched"] < 1.05
    assert 0.48 < auroc["matched"] < 0.52
    assert density_ratio["paper"] > 1.3  # which is why `matched` is the layout that counts


# ---------------------------------------------------------------------------- leaving out one part


@pytest.fixture(scope="module")
def params_with_pieces():
    """20 canvases of the laptop's test digits, with three distractors and three pieces each."""
    sampler = clutter.CanvasSampler(laptop(), DIGITS["test"], "matched")
    index = torch.arange(20)
    params = sampler.sample(seeded(1), index)
    params["piece"] = sampler.sample_pieces(seeded(2), index)
    return params


def keep_distractors(params: dict, numbers: list[int]) -> dict:
    """Parameters of the same canvases with only these of their distractors."""
    names = ("source", "window", "corner")
    return params | {name: params[name][:, :, numbers] for name in names}


def test_without_a_distractor_a_canvas_is_as_if_it_had_never_been_there(params_with_pieces):
    config = laptop()
    images = DIGITS["test"].images
    canvases, masks = clutter.leave_out(params_with_pieces, config, images)
    assert canvases.shape == masks.shape == (20, 6, 64, 64)
    black_digit = torch.zeros(1, 28, 28, dtype=torch.uint8)
    images_and_black = torch.cat([images, black_digit])
    for number in range(3):
        remaining = [0, 1, 2]
        remaining.remove(number)
        two_distractors = keep_distractors(params_with_pieces, remaining)
        expected, _, _ = clutter.render_canvases(two_distractors, config, images)
        assert torch.equal(canvases[:, 3 + number], expected[:, 0])
        # its mask is its ink on an otherwise black canvas
        alone = keep_distractors(params_with_pieces, [number])
        alone["digit"] = torch.full((20,), len(images))
        _, _, ink = clutter.render_canvases(alone, config, images_and_black)
        assert torch.equal(masks[:, 3 + number], ink[:, 0])


def test_without_a_piece_a_canvas_is_as_if_the_digit_had_a_hole(params_with_pieces):
    config = laptop()
    images = DIGITS["test"].images
    canvases, masks = clutter.leave_out(params_with_pieces, config, images)
    _, digit_mask, _ = clutter.render_canvases(params_with_pieces, config, images)
    for number in range(3):
        digits = images[:20].clone()
        for digit, corner in zip(digits, params_with_pieces["piece"][:, 0, number]):
            hole = square(digit, corner, 9)
            assert (hole > 127).sum() >= 5  # as in a distractor
            hole.zero_()
        # The distractors are cut from whole digits.
        images_and_holed = torch.cat([images, digits])
        holed = params_with_pieces | {"digit": len(images) + torch.arange(20)}
        expected, rest_mask, _ = clutter.render_canvases(holed, config, images_and_holed)
        assert torch.equal(canvases[:, number], expected[:, 0])
        assert torch.equal(masks[:, number], (digit_mask & ~rest_mask)[:, 0])


def test_a_canvas_without_distractors_has_one_piece_to_leave_out():
    config = laptop(num_distractors=0)
    sampler = clutter.CanvasSampler(config, DIGITS["test"])
    params = sampler.sample(seeded(), torch.arange(5))
    params["piece"] = sampler.sample_pieces(seeded(), torch.arange(5))
    canvases, masks = clutter.leave_out(params, config, DIGITS["test"].images)
    assert canvases.shape == masks.shape == (5, 1, 64, 64)
    assert masks.sum((-2, -1)).min() >= 5


# ------------------------------------------------------------------------------------------- marks


def test_a_mark_has_one_level_on_all_canvases_of_a_digit_and_others_on_other_digits():
    params = clutter.sample_marks(seeded(), (200, 3), canvas_size=64, probability=1)
    assert params["has_mark"].all()
    grey = torch.full((200, 3, 64, 64), 0.3)
    canvas, mask = clutter.put_marks(grey, params)
    assert (canvas[~mask] == 0.3).all()
    assert (mask.sum((-2, -1)) == 81).all()
    levels = canvas[mask].view(200, 3, 81)
    assert (levels == levels[:, :1, :1]).all()
    level = levels[:, 0, 0]
    assert level.min() >= 0.2 and level.max() <= 1
    assert level.min() < 0.25 and level.max() > 0.95
    assert len(level.unique()) == 200
    # at places of their own, up to the rim
    places = params["mark_corner"]
    assert places.amin() == 0 and places.amax() == 64 - 9
    assert (places[:, 0] != places[:, 1]).any(-1).float().mean() > 0.9


@pytest.mark.parametrize("probability", [0, 0.25, 1])
def test_marks_are_as_frequent_as_asked_and_the_rest_has_none(probability):
    params = clutter.sample_marks(seeded(), (4000, 1), canvas_size=28, probability=probability)
    assert abs(params["has_mark"].float().mean() - probability) < 0.02
    canvas, mask = clutter.put_marks(torch.full((4000, 1, 28, 28), 0.3), params)
    assert (mask.flatten(1).any(1) == params["has_mark"]).all()
    assert (canvas[~params["has_mark"]] == 0.3).all()


# ------------------------------------------------------------------------------------- backgrounds


def background_of(config, count: int):
    """Backgrounds (count, S, S) behind black canvases, and their parameters."""
    background = clutter.Background(config, CPU)
    params = background.sample(seeded(3), (count, 1))
    black = torch.zeros(count, 1, config.canvas_size, config.canvas_size)
    return background.put_behind(black, params)[:, 0], params


def test_black_changes_nothing_and_draws_no_random_numbers():
    background = clutter.Background(laptop(), CPU)
    rng = seeded()
    before = rng.get_state()
    assert background.sample(rng, (5, 1)) == {}
    assert torch.equal(rng.get_state(), before)
    canvas = torch.rand(5, 1, 64, 64, generator=rng)
    assert torch.equal(background.put_behind(canvas, {}), canvas)


def test_textures_are_of_all_families_and_none_comes_twice():
    images, params = background_of(laptop(background="texture"), 600)
    assert len(clutter.TEXTURES) >= 5
    assert set(params["family"].flatten().tolist()) == set(range(len(clutter.TEXTURES)))
    assert len(torch.unique(images.flatten(1), dim=0)) == 600
    # between their extreme greys, which are darker than ink
    assert (images >= params["dark"][..., None] - 1e-6).all()
    assert (images <= params["bright"][..., None] + 1e-6).all()
    assert images.min() >= 0
    assert images.max() <= 0.45 + 1e-6
    # none is one plain grey
    assert (images.flatten(1).std(1) > 0.01).double().mean() > 0.99


def test_waves_summed_as_matrices_are_waves():
    wave = torch.rand(2, 3, 3, generator=seeded(4))
    pixel = torch.arange(9.0)
    y, x, phase = wave[..., None, None].unbind(2)  # (2, 3, 1, 1)
    direct = torch.sin(2 * math.pi * (y * pixel[:, None] + x * pixel) + phase).sum(1)
    assert_close(clutter.sum_of_waves(wave, pixel), direct, atol=1e-4, rtol=0)


@pytest.fixture
def photo_folder(tmp_path):
    """A white picture, and a black one in a folder below."""
    Image.new("RGB", (300, 200), "white").save(tmp_path / "white.png")
    (tmp_path / "deeper").mkdir()
    Image.new("L", (90, 90), 0).save(tmp_path / "deeper" / "black.jpg")
    (tmp_path / "notes.txt").write_text("no picture")
    return str(tmp_path)


def test_every_picture_of_a_folder_lies_behind_some_canvas(photo_folder):
    images, _ = background_of(laptop(background=photo_folder), 100)
    brightness = images.flatten(1).mean(1)
    assert set(brightness.mul(100).round().tolist()) == {0.0, 45.0}
    assert (images.flatten(1).std(1) < 1e-6).all()


def test_a_window_of_a_picture_lies_behind(tmp_path):
    """A picture is brought to twice the canvas's size; the window may lie anywhere in it."""
    ramp = np.arange(128 * 128).reshape(128, 128) // 64
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "ramp.png")
    images, params = background_of(laptop(background=str(tmp_path)), 200)
    corners = params["image_corner"][:, 0]
    assert corners.min() == 0
    assert corners.max() == 64
    for image, corner in zip(images, corners):
        expected = square(ramp, corner, 64)
        np.testing.assert_allclose(image, 0.45 * expected / 255, atol=1e-6)


@pytest.mark.parametrize("background", ["texture", "folder"])
def test_ink_is_brighter_than_the_background_around_it(background, photo_folder):
    config = laptop(background=photo_folder if background == "folder" else background)
    split = DIGITS["test"]
    params = clutter.CanvasSampler(config, split).sample(seeded(), torch.arange(100))
    canvas, digit, distractors = clutter.render_canvases(params, config, split.images)
    behind = clutter.Background(config, CPU)
    params |= behind.sample(seeded(1), (100, 1))
    images = behind.put_behind(canvas, params)
    for image, digit_mask, clutter_mask in zip(images, digit, distractors):
        around = image[~digit_mask & ~clutter_mask]
        darkest_ink = image[digit_mask].min()
        assert darkest_ink > 0.5
        assert darkest_ink >= around.quantile(0.95)
    assert (images >= canvas - 1e-6).all()
    assert images.max() <= 1
    if background == "texture":
        assert (images > canvas + 0.1).any((1, 2, 3)).all()
