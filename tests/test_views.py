"""Every view is a function of seed and step, and is cropped and coloured as torchvision would."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from helpers import DIGITS, PretendedGPU
from PIL import Image
from sklearn.datasets import load_sample_images
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.testing import assert_close

import clutter
import settings
import views
from data import Split
from views import CropPlan, EvaluationBatch, TrainingViews


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def laptop(**changes) -> settings.Config:
    """The settings of the preset laptop with a batch of 12, with changes."""
    return settings.make_config({"batch_size": 12} | changes, "laptop")


@pytest.fixture(scope="module")
def photographs():
    """40 colourful images of 96×96 pixels, cut from scikit-learn's two photographs."""
    originals = [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]
    rng = seeded(1)
    images = []
    for number in range(40):
        side = int(torch.randint(96, 400, (), generator=rng))
        top = int(torch.randint(427 - side, (), generator=rng))
        left = int(torch.randint(640 - side, (), generator=rng))
        photo = originals[number % 2]
        images.append(TF.resized_crop(photo, top, left, side, side, [96, 96], antialias=True))
    return Split(torch.stack(images), torch.arange(40) % 10)


def noise_photographs(count: int) -> Split:
    images = torch.randint(256, (count, 3, 96, 96), dtype=torch.uint8, generator=seeded())
    return Split(images, torch.arange(count) % 10)


@pytest.fixture
def photo_folder(tmp_path):
    """A picture of noise, for a background."""
    noise = torch.randint(256, (150, 150), dtype=torch.uint8, generator=seeded())
    Image.fromarray(noise.numpy()).save(tmp_path / "a.png")
    return str(tmp_path)


# --------------------------------------------------------------------------------- the plan of crops


def test_same_views_show_both_branches_the_same_crops():
    plan = views.crop_plan("same", 4)
    assert plan.crops == [(0, "global"), (0, "global"), (0, "local"), (0, "local")]
    assert plan.teacher == [0, 1, 2, 3]
    assert plan.student == [0, 1, 2, 3]
    # every crop with every other
    assert sorted(plan.pairs) == list(itertools.permutations(range(4), 2))


def test_same_views_with_one_crop_show_each_branch_its_own():
    expected = CropPlan(
        crops=[(0, "global"), (0, "global")], teacher=[0], student=[1], pairs=[(0, 0)]
    )
    assert views.crop_plan("same", 1) == expected


def test_different_views_show_each_branch_one_canvas():
    plan = views.crop_plan("different", 2)
    assert plan.crops == [(0, "global"), (0, "global"), (1, "global"), (1, "global")]
    assert plan.teacher == [0, 1]
    assert plan.student == [2, 3]
    assert sorted(plan.pairs) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_symmetric_different_views_show_both_branches_both_canvases():
    plan = views.crop_plan("different", 1, symmetric=True)
    assert plan.crops == [(0, "global"), (1, "global")]
    assert plan.teacher == [0, 1]
    assert plan.student == [0, 1]
    assert sorted(plan.pairs) == [(0, 1), (1, 0)]
    # crops of the same canvas are not compared
    plan = views.crop_plan("different", 2, symmetric=True)
    assert sorted(plan.pairs) == [
        *[(0, 2), (0, 3), (1, 2), (1, 3)],
        *[(2, 0), (2, 1), (3, 0), (3, 1)],
    ]


# ------------------------------------------------------------------------------ the training step

SIZES = [("same", 1), ("same", 2), ("same", 4), ("different", 1), ("different", 4)]


@pytest.mark.parametrize("background", ["black", "texture", "folder"])
@pytest.mark.parametrize("kind_of_views,crops", SIZES)
def test_rows_of_a_batch_are_rendered_as_in_the_whole(
    kind_of_views, crops, background, photo_folder
):
    """So micro-batches and ranks see the images of the whole batch."""
    if background == "folder":
        background = photo_folder
    config = laptop(views=kind_of_views, crops=crops, background=background)
    training_views = TrainingViews(config, DIGITS["train"])
    params = training_views.sample(step=5)
    batch = training_views.render(params)
    assert batch.shape == (len(training_views.plan.crops), 12, 3, 56, 56)
    rows = {name: value[3:8] for name, value in params.items()}
    # A convolution of fewer images may round otherwise.
    assert_close(training_views.render(rows), batch[:, 3:8], rtol=0, atol=1e-5)


@pytest.mark.parametrize("background", ["black", "texture"])
def test_views_are_a_function_of_seed_and_step(background):
    config = laptop(background=background)
    training_views = TrainingViews(config, DIGITS["train"])
    params = training_views.sample(step=5)
    resumed = TrainingViews(config, DIGITS["train"])
    assert torch.equal(training_views.render(params), resumed.render(resumed.sample(step=5)))
    next_step = training_views.sample(step=6)
    other_seed = TrainingViews(replace(config, seed=1), DIGITS["train"]).sample(step=5)
    other_split = TrainingViews(config, DIGITS["train"], "validation").sample(step=5)
    for name in ("position", "corner", "centre"):
        assert not torch.equal(params[name], next_step[name])
        assert not torch.equal(params[name], other_seed[name])
        assert not torch.equal(params[name], other_split[name])
    assert not torch.equal(params["digit"], next_step["digit"])
    assert not torch.equal(params["digit"], other_seed["digit"])


def test_random_numbers_are_those_of_earlier_versions():
    """Every published number depends on them."""
    params = TrainingViews(laptop(background="texture"), DIGITS["train"]).sample(step=5)
    assert params["digit"][:2].tolist() == [304, 958]
    assert params["position"][:2].tolist() == [[[31, 19]], [[2, 10]]]
    side = torch.tensor([[57.63531, 61.76751], [49.67056, 53.24195]])
    assert_close(params["side"][:2], side, atol=1e-4, rtol=0)
    angle = torch.tensor([[-0.004726, -0.197347], [0.036327, 0.061514]])
    assert_close(params["angle"][:2], angle, atol=1e-5, rtol=0)
    # what is drawn after the crops
    assert params["family"][:4].tolist() == [[4], [4], [5], [0]]
    assert_close(params["dark"][:2], torch.tensor([[0.034219], [0.142449]]), atol=1e-5, rtol=0)

    config = laptop(dataset="stl10")
    params = TrainingViews(config, noise_photographs(40)).sample(step=5)
    assert params["photo"][:4].tolist() == [34, 21, 15, 17]
    hue = torch.tensor([[0.012407, -0.073425], [-0.053510, 0.058390]])
    assert_close(params["hue"][:2], hue, atol=1e-5, rtol=0)
    assert params["flip"][:3].tolist() == [[True, True], [False, True], [True, True]]

    batch = next(views.evaluation_batches(laptop(), DIGITS["test"], 5))
    assert batch.index.tolist() == [200, 147, 104, 228, 115]


def test_different_views_share_the_digit_and_nothing_else():
    config = laptop(views="different", crops=4, background="texture")
    training_views = TrainingViews(config, DIGITS["train"])
    params = training_views.sample(step=0)
    assert params["digit"].shape == (12,)
    assert (params["position"][:, 0] != params["position"][:, 1]).any(-1).sum() > 8
    assert (params["corner"][:, 0] != params["corner"][:, 1]).any(-1).sum() > 30
    assert (params["wave"][:, 0] != params["wave"][:, 1]).any((1, 2)).all()
    # local crops lie on the digit of their own canvas
    for number, (canvas, size) in enumerate(training_views.plan.crops):
        digit_centre = params["position"][:, canvas] + 14.0
        is_centred = (params["centre"][:, number] == digit_centre).all(-1)
        assert is_centred.all() == (size == "local")


def test_labels_are_those_of_the_images(photographs):
    training_views = TrainingViews(laptop(), DIGITS["train"])
    params = training_views.sample(step=0)
    assert torch.equal(training_views.labels(params), DIGITS["train"].labels[params["digit"]])
    training_views = TrainingViews(laptop(dataset="stl10"), photographs)
    params = training_views.sample(step=0)
    assert torch.equal(training_views.labels(params), photographs.labels[params["photo"]])


def test_a_batch_larger_than_the_data_set_is_refused():
    with pytest.raises(ValueError, match="--batch-size 12: use no more than the 11 images"):
        TrainingViews(laptop(), DIGITS["train"][:11])
    TrainingViews(laptop(), DIGITS["train"][:12])


def test_a_background_folder_that_cannot_be_used_is_refused(tmp_path):
    config = laptop(background=str(tmp_path))
    with pytest.raises(ValueError, match=f"--background {tmp_path}: no images there"):
        TrainingViews(config, DIGITS["train"])
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(OSError, match="a.png cannot be read as a picture"):
        TrainingViews(config, DIGITS["train"])


def test_crops_are_sampled_from_their_ranges():
    config = laptop(crops=4, batch_size=1000, canvas_size=100)
    params = TrainingViews(config, DIGITS["train"]).sample(step=0)
    area = (params["side"] / 100) ** 2
    assert 0.5 <= area[:, :2].min() < 0.52
    assert 0.98 < area[:, :2].max() <= 1
    assert 0.3 <= area[:, 2:].min() < 0.31
    assert 0.59 < area[:, 2:].max() <= 0.6
    # global crops do not leave the canvas
    to_border = torch.minimum(params["centre"], 100 - params["centre"]).amin(-1)
    assert (to_border - params["side"] / 2)[:, :2].min() > -1e-4
    largest = np.radians(15)
    assert params["angle"].abs().max() <= largest
    assert params["angle"].min() < -0.9 * largest
    assert params["angle"].max() > 0.9 * largest
    # sigma is given for crops of 224 pixels
    blurred = params["sigma"] > 0
    assert 0.45 < blurred.float().mean() < 0.55
    assert 0.1 * 56 / 224 <= params["sigma"][blurred].min() < 0.03
    assert 0.49 < params["sigma"].max() <= 2 * 56 / 224


def test_local_crops_show_the_digit_in_their_centre():
    """Rendered without clutter, the ink of a local crop balances around its centre."""
    config = laptop(crops=4, num_distractors=0, batch_size=200)
    training_views = TrainingViews(config, DIGITS["train"])
    crops = views.denormalize(training_views.render(training_views.sample(step=0)))
    local = crops[2:, :, 0].flatten(0, 1)  # (400, 56, 56)
    coordinate = torch.arange(56) - 27.5
    ink = local.sum((1, 2))
    for axis in (1, 2):
        offset = (local.sum(3 - axis) * coordinate).sum(1) / ink
        assert offset.mean().abs() < 1
        assert offset.abs().max() < 10


def test_beyond_a_black_canvas_lies_black():
    config = laptop(crops=4, rotation=0.0, blur=(0.0, 0.0), batch_size=100)
    training_views = TrainingViews(config, DIGITS["train"])
    params = training_views.sample(step=0)
    crops = views.denormalize(training_views.render(params))
    local = crops[2:, :, 0].transpose(0, 1)  # (100, 2, 56, 56)
    # where the pixels of the local crops lie on the canvas
    offset = (torch.arange(56) + 0.5) / 56 - 0.5
    centre = params["centre"][:, 2:, :, None]
    side = params["side"][:, 2:, None, None]
    place = centre + side * offset  # (100, 2, row or column, 56)
    is_beyond = (place < -0.5) | (place > 64.5)  # by more than half a pixel
    row_is_beyond, column_is_beyond = is_beyond.unbind(2)
    beyond = row_is_beyond[..., :, None] | column_is_beyond[..., None, :]
    assert beyond.sum() > 10_000
    assert local[beyond].abs().max() < 1e-6


def test_beyond_a_textured_canvas_it_is_mirrored():
    training_views = TrainingViews(laptop(background="texture", views="different"), DIGITS["train"])
    crops = views.denormalize(training_views.render(training_views.sample(step=0)))
    corners = crops[..., [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners < 1e-3).double().mean() < 0.05


WHOLE_CANVASES = {"global_crops_scale": (1.0, 1.0), "rotation": 0.0, "blur": (0.0, 0.0)}


@pytest.mark.parametrize("kind_of_views", ["same", "different"])
def test_every_crop_shows_its_own_canvas(kind_of_views):
    config = laptop(views=kind_of_views, crops=1, image_size=64, **WHOLE_CANVASES)
    split = DIGITS["train"]
    training_views = TrainingViews(config, split)
    params = training_views.sample(step=0)
    crops = views.denormalize(training_views.render(params))[:, :, 0]
    canvases, _, _ = clutter.render_canvases(params, config, split.images)
    for number, (canvas, _) in enumerate(training_views.plan.crops):
        assert_close(crops[number], canvases[:, canvas], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dataset", ["clutter", "stl10"])
def test_crops_are_blurred_as_much_as_sampled(dataset, photographs):
    config = laptop(dataset=dataset, image_size=112, blur=(2.0, 2.0))
    split = photographs if dataset == "stl10" else DIGITS["train"]
    training_views = TrainingViews(config, split)
    params = training_views.sample(step=0)
    if dataset == "stl10":
        params |= no_colour_changes(params["side"].shape)
    blurred = training_views.render(params)
    sharp = training_views.render(params | {"sigma": torch.zeros_like(params["sigma"])})
    assert set(params["sigma"].flatten().tolist()) == {0.0, 1.0}
    expected = TF.gaussian_blur(sharp.flatten(0, 1), [11, 11], [1.0, 1.0]).view(sharp.shape)
    is_blurred = (params["sigma"] > 0).T
    assert_close(blurred[is_blurred], expected[is_blurred], rtol=0, atol=1e-4)
    assert_close(blurred[~is_blurred], sharp[~is_blurred], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------- crop, rotation and blur


def whole_image(size: float, count: int = 1, **changes) -> dict:
    """Parameters of `count` crops that are the whole image."""
    params = {
        "centre": torch.full((count, 1, 2), size / 2),
        "side": torch.full((count, 1), float(size)),
        "angle": torch.zeros(count, 1),
        "sigma": torch.zeros(count, 1),
    }
    return params | changes


@pytest.fixture
def smooth_image():
    noise = torch.rand(1, 1, 64, 64, generator=seeded(4))
    return views.gaussian_blur_(noise, torch.tensor([2.0]), 2.0)


def test_a_crop_of_the_whole_image_is_the_image(smooth_image):
    crop = views.render_crops(smooth_image[None], whole_image(64), 64)[0]
    assert_close(crop, smooth_image)


def test_crop_and_resize_agree_with_torchvision(smooth_image):
    params = whole_image(64, centre=torch.tensor([[[20.0, 40.0]]]), side=torch.tensor([[16.0]]))
    crop = views.render_crops(smooth_image[None], params, 64)[0]
    expected = TF.resize(smooth_image[..., 12:28, 32:48], [64, 64], antialias=False)
    # At the crop's border torchvision repeats the last pixel; here the canvas goes on.
    assert_close(crop[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2])


def test_rotation_agrees_with_torchvision(smooth_image):
    angle = torch.tensor([[np.radians(15.0)]]).float()
    crop = views.render_crops(smooth_image[None], whole_image(64, angle=angle), 64)[0]
    expected = TF.rotate(smooth_image, 15.0, TF.InterpolationMode.BILINEAR)
    assert_close(crop, expected, rtol=0, atol=1e-4)
    assert crop[0, 0, 0, 0] == 0  # beyond the canvas


def test_blur_agrees_with_torchvision():
    images = torch.rand(4, 1, 40, 40, generator=seeded(5))
    sigma = torch.tensor([0.0, 0.3, 0.7, 2.0])
    blurred = views.gaussian_blur_(images.clone(), sigma, 2.5)
    assert torch.equal(blurred[:2], images[:2])  # 0.3 is too little to be seen
    for number in (2, 3):
        both_sigmas = [sigma[number].item()] * 2
        expected = TF.gaussian_blur(images[number], [23, 23], both_sigmas)
        assert_close(blurred[number], expected, rtol=0, atol=1e-5)
    # the same as a part of render_crops
    params = whole_image(40, 4, sigma=sigma[:, None])
    crops = views.render_crops(images[:, None], params, 40, max_blur=14.0)
    assert_close(crops[:, 0], blurred)


def test_blur_of_an_image_does_not_depend_on_its_neighbours():
    images = torch.rand(3, 3, 20, 20, generator=seeded(5))
    sigma = torch.tensor([1.0, 0.4, 2.0])
    together = views.gaussian_blur_(images.clone(), sigma, 2.0)
    alone = views.gaussian_blur_(images[:1].clone(), sigma[:1], 2.0)
    assert_close(together[:1], alone, rtol=0, atol=1e-6)


def test_cropping_leaves_the_canvas_as_it_was():
    canvas = torch.rand(1, 1, 1, 64, 64, generator=seeded(5))
    before = canvas.clone()
    views.render_crops(canvas, whole_image(64, sigma=torch.tensor([[1.0]])), 28, max_blur=8.0)
    assert torch.equal(canvas, before)


def test_shrinking_does_not_alias():
    """Stripes finer than the pixels of the small image become grey, not other stripes."""
    stripes = torch.zeros(1, 1, 128, 128)
    stripes[..., ::3] = 1
    small = views.render_crops(stripes[None], whole_image(128), 32)[0, ..., 2:-2, 2:-2]
    assert (small - 1 / 3).abs().max() < 0.05
    # without smoothing they alias
    aliased = F.interpolate(stripes, size=32, mode="bilinear")[..., 2:-2, 2:-2]
    assert (aliased - 1 / 3).abs().max() > 0.1


@pytest.mark.parametrize("size,image_size", [(128, 32), (100, 56), (64, 28)])
def test_shrinking_keeps_as_much_detail_as_torchvision_does(size, image_size):
    noise = torch.rand(8, 1, size, size, generator=seeded(4))
    small = views.render_crops(noise[:, None], whole_image(size, 8), image_size)[:, 0]
    expected = TF.resize(noise, [image_size, image_size], antialias=True)
    inner = (..., slice(2, -2), slice(2, -2))
    both = torch.stack([small[inner].flatten(), expected[inner].flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.98


@pytest.mark.parametrize("image_size", [56, 84, 112, 224])
def test_a_resized_white_image_is_white_to_its_last_pixel(image_size):
    white = torch.ones(1, 3, 96, 96)
    assert_close(views.resize(white, image_size), torch.ones(1, 3, image_size, image_size))


@pytest.mark.parametrize("size", [28, 40, 64, 96, 97, 100])
@pytest.mark.parametrize("image_size", [28, 56, 96, 112, 224])
def test_resizing_is_that_of_grid_samples_border(size, image_size, monkeypatch):
    """It is not asked for, because MPS lacks it before torch 2.13."""
    images = torch.rand(3, 2, size, size, generator=seeded())
    resized = views.resize(images, image_size)
    grid_sample = F.grid_sample

    def with_border(x, grid, padding_mode, **kwargs):
        assert padding_mode == "zeros"
        return grid_sample(x, grid, padding_mode="border", **kwargs)

    monkeypatch.setattr(F, "grid_sample", with_border)
    assert_close(resized, views.resize(images, image_size), atol=1e-6, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_normalization_is_that_of_imagenet_and_can_be_undone(channels):
    images = torch.rand(2, channels, 5, 5, generator=seeded(6))
    in_colour = images.expand(-1, 3, -1, -1)
    expected = TF.normalize(in_colour, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    normalized = views.normalize(images)
    assert_close(normalized, expected)
    assert_close(views.denormalize(normalized), in_colour)


# ------------------------------------------------------------------------------------------ colour


def torchvision_grey(image, is_grey: bool):
    return TF.rgb_to_grayscale(image, 3) if is_grey else image


def torchvision_flip(image, is_flipped: bool):
    return TF.horizontal_flip(image) if is_flipped else image


# The changes in the order in which they are made, and how strong they are for each of six images.
COLOUR_CHANGES = {
    "brightness": (TF.adjust_brightness, torch.linspace(0.6, 1.4, 6)),
    "contrast": (TF.adjust_contrast, torch.linspace(1.4, 0.6, 6)),
    "saturation": (TF.adjust_saturation, torch.linspace(0.8, 1.2, 6)),
    "hue": (TF.adjust_hue, torch.linspace(-0.1, 0.1, 6)),
    "gray": (torchvision_grey, torch.arange(6) == 2),
    "flip": (torchvision_flip, torch.arange(6) > 3),
}


def no_colour_changes(shape: tuple) -> dict:
    """Parameters with which color_jitter leaves images as they are."""
    return {
        "brightness": torch.ones(shape),
        "contrast": torch.ones(shape),
        "saturation": torch.ones(shape),
        "hue": torch.zeros(shape),
        "gray": torch.zeros(shape, dtype=torch.bool),
        "flip": torch.zeros(shape, dtype=torch.bool),
    }


@pytest.mark.parametrize(
    "names", [*([name] for name in COLOUR_CHANGES), list(COLOUR_CHANGES)], ids="+".join
)
def test_colours_agree_with_torchvision(names):
    photos = torch.rand(6, 3, 20, 20, generator=seeded(2))
    photos[5, :, :5] = 0.5  # grey pixels have no hue
    params = no_colour_changes((6,)) | {name: COLOUR_CHANGES[name][1] for name in names}
    changed = views.color_jitter(photos, params)
    for number, image in enumerate(photos):
        expected = image
        for name in names:
            change, strengths = COLOUR_CHANGES[name]
            expected = change(expected, strengths[number].item())
        assert_close(changed[number], expected, atol=1e-5, rtol=0)


def test_colours_are_sampled_as_often_as_dino_does():
    params = views.sample_color_jitter(seeded(), (20_000,))
    largest = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
    for name, most in largest.items():
        change = params[name] if name == "hue" else params[name] - 1
        assert (change != 0).double().mean().item() == pytest.approx(0.8, abs=0.01)
        assert -most - 1e-6 <= change.min() < -0.98 * most
        assert 0.98 * most < change.max() <= most + 1e-6
    assert params["gray"].double().mean().item() == pytest.approx(0.2, abs=0.01)
    assert params["flip"].double().mean().item() == pytest.approx(0.5, abs=0.012)


@pytest.mark.parametrize("image_size", [56, 112])
def test_views_of_photographs(photographs, image_size):
    config = laptop(dataset="stl10", crops=4, image_size=image_size)
    training_views = TrainingViews(config, photographs)
    params = training_views.sample(step=0)
    crops = training_views.render(params)
    assert crops.shape == (4, 12, 3, image_size, image_size)
    assert crops.isfinite().all()
    # rows of a batch are rendered as in the whole
    rows = {name: value[2:5] for name, value in params.items()}
    assert_close(training_views.render(rows), crops[:, 2:5], rtol=0, atol=1e-5)
    # crops are colourful, but for those that were sampled to be grey
    crops = views.denormalize(crops)
    spread = crops.std(2).amax((-1, -2))  # (C, B), between the colours of a pixel
    assert (spread > 0.05).double().mean() > 0.5
    assert torch.equal((spread < 1e-3).T, params["gray"])
    # local crops lie anywhere in the photograph, since there is no digit to centre them on
    assert (params["centre"][:, 2:] - 48).abs().max() > 15
    assert (params["centre"] >= params["side"][..., None] / 2 - 1e-4).all()
    # beyond the border it is mirrored, not black
    corner_pixel = crops[..., 0, 0].mean(-1)
    assert (corner_pixel > 0.02).double().mean() > 0.9


@pytest.mark.parametrize("image_size,side", [(56, 56), (112, 96)])
def test_colours_are_changed_where_there_are_fewer_pixels(
    photographs, monkeypatch, image_size, side
):
    """That is after shrinking, or before enlarging."""
    sides = []

    def recorded(photos, params):
        sides.append(photos.shape[-1])
        return photos

    monkeypatch.setattr(views, "color_jitter", recorded)
    training_views = TrainingViews(laptop(dataset="stl10", image_size=image_size), photographs)
    training_views.render(training_views.sample(step=0))
    assert sides == [side]


@pytest.mark.parametrize("image_size", [56, 112])
def test_an_unchanged_photograph_is_seen_as_it_is(photographs, image_size):
    """One crop of the whole photograph, neither turned nor blurred, in its own colours."""
    config = laptop(dataset="stl10", image_size=image_size, **WHOLE_CANVASES)
    training_views = TrainingViews(config, photographs)
    params = training_views.sample(step=0)
    params |= no_colour_changes(params["side"].shape)
    crop = views.denormalize(training_views.render(params))[0]
    expected = views.resize(photographs.images[params["photo"]] / 255, image_size)
    assert_close(crop[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------- evaluation

TENSORS = ("images", "labels", "index", "digit", "clutter")  # of an EvaluationBatch


def joined(batches) -> EvaluationBatch:
    """All rows of several batches, without left-out parts."""
    batches = list(batches)
    tensors = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in TENSORS}
    return EvaluationBatch(**tensors)


def assert_starts_with(batch: EvaluationBatch, beginning: EvaluationBatch):
    count = len(beginning.labels)
    for name in TENSORS:
        rows = getattr(batch, name)[:count]
        assert_close(rows, getattr(beginning, name), rtol=0, atol=1e-5)


@pytest.mark.parametrize("background", ["black", "texture"])
def test_evaluation_canvases_are_the_same_for_every_run(background):
    config = laptop(background=background)
    split = DIGITS["test"]
    thirty = joined(views.evaluation_batches(config, split, 30))
    batches = list(views.evaluation_batches(config, split, 260))
    assert [len(batch.labels) for batch in batches] == [100, 100, 60]
    all_canvases = joined(batches)
    assert_starts_with(all_canvases, thirty)
    other_run = replace(config, seed=1, batch_size=64, views="different")
    assert_starts_with(joined(views.evaluation_batches(other_run, split, 30)), thirty)

    # Every digit is used before one is used again, on another canvas. The first of the file are
    # not the first here, because MNIST's test file begins with the cleaner digits.
    index = all_canvases.index.tolist()
    assert sorted(index[:250]) == list(range(250))
    assert index[250:] == index[:10]
    assert not torch.equal(all_canvases.images[250:], all_canvases.images[:10])
    assert index[:30] != sorted(index[:30])
    assert np.mean(index[:30]) > 60
    assert torch.equal(all_canvases.labels, split.labels[all_canvases.index])

    # Other splits and layouts have other canvases.
    validation = joined(views.evaluation_batches(config, split, 30, split_name="validation"))
    assert not torch.equal(validation.images, thirty.images)
    paper = joined(views.evaluation_batches(config, split, 30, layout="paper"))
    assert torch.equal(paper.index, thirty.index)
    assert not torch.equal(paper.digit, thirty.digit)


def test_every_batch_of_evaluation_canvases_is_sampled_anew():
    hundred_digits = DIGITS["test"][:100]
    first, second = views.evaluation_batches(laptop(), hundred_digits, 200)
    assert torch.equal(first.index, second.index)
    assert not torch.equal(first.digit, second.digit)
    assert not torch.equal(first.clutter, second.clutter)


@pytest.mark.parametrize("image_size", [28, 56, 84])
def test_a_resized_mask_takes_the_nearest_pixel(image_size):
    batch = next(views.evaluation_batches(laptop(image_size=image_size), DIGITS["test"], 20))
    unresized = next(views.evaluation_batches(laptop(image_size=64), DIGITS["test"], 20))
    pixel_centres = (torch.arange(image_size) + 0.5) * 64 / image_size
    nearest = pixel_centres.long()
    assert torch.equal(batch.digit, unresized.digit[:, nearest][:, :, nearest])
    assert torch.equal(batch.clutter, unresized.clutter[:, nearest][:, :, nearest])


@pytest.mark.parametrize("background", ["black", "texture"])
def test_masks_cover_the_ink_of_the_resized_canvases(background):
    batch = next(views.evaluation_batches(laptop(background=background), DIGITS["test"], 30))
    assert batch.digit.shape == batch.clutter.shape == (30, 56, 56)
    assert batch.digit.any((1, 2)).all()
    assert not (batch.digit & batch.clutter).any()
    ink = batch.images[:, 0] > 0.75
    covered = ink & (batch.digit | batch.clutter)
    assert covered.sum() > 0.97 * ink.sum() > 1000


def test_the_background_changes_nothing_but_what_lies_behind():
    config = laptop(image_size=64)
    black = next(views.evaluation_batches(config, DIGITS["test"], 100))
    textured_config = replace(config, background="texture")
    textured = next(views.evaluation_batches(textured_config, DIGITS["test"], 100))
    for name in ("index", "digit", "clutter"):
        assert torch.equal(getattr(black, name), getattr(textured, name))
    assert (textured.images >= black.images - 1e-6).all()
    assert (textured.images > black.images + 0.1).any((1, 2, 3)).all()


@pytest.mark.parametrize("background", ["black", "texture"])
def test_left_out_parts_are_all_that_changes(background):
    """At the network's size, and over the same background as the whole canvas."""
    config = laptop(background=background)
    batches = list(views.left_out_batches(config, DIGITS["test"], 140))
    assert [len(batch.labels) for batch in batches] == [100, 40]
    assert_starts_with(
        joined(batches), joined(views.evaluation_batches(config, DIGITS["test"], 140))
    )
    for batch in batches:
        count = len(batch.labels)
        assert batch.left_out.images.shape == (count, 6, 1, 56, 56)
        assert batch.left_out.masks.shape == (count, 6, 56, 56)
        assert batch.left_out.ink.shape == (count, 6)
        assert batch.left_out.ink.min() >= 5
        change = (batch.left_out.images - batch.images[:, None]).abs()[:, :, 0]
        masks = batch.left_out.masks.float()
        is_near = F.max_pool2d(masks.flatten(0, 1), 9, stride=1, padding=4) > 0
        change_near = change[is_near.view(change.shape)].sum()
        assert change_near > 0.97 * change.sum() > 100


def test_the_ink_of_left_out_parts_is_counted_on_the_canvas():
    small = next(views.left_out_batches(laptop(image_size=28), DIGITS["test"], 20)).left_out
    full = next(views.left_out_batches(laptop(image_size=64), DIGITS["test"], 20)).left_out
    assert torch.equal(full.ink, full.masks.sum((-2, -1)))
    assert torch.equal(small.ink, full.ink)


def test_without_distractors_a_piece_of_the_digit_is_left_out():
    config = laptop(num_distractors=0)
    batch = next(views.left_out_batches(config, DIGITS["test"], 5))
    assert batch.left_out.images.shape == (5, 1, 1, 56, 56)
    assert not batch.clutter.any()


def test_evaluation_photographs_are_the_photographs_in_another_order():
    split = noise_photographs(130)
    config = laptop(dataset="stl10", image_size=96)
    batches = list(views.evaluation_batches(config, split, 500))
    assert [len(batch.labels) for batch in batches] == [100, 30]  # no photograph comes twice
    order = torch.cat([batch.index for batch in batches])
    assert sorted(order.tolist()) == list(range(130))
    assert order.tolist() != list(range(130))
    for batch in batches:
        assert_close(batch.images, split.images[batch.index] / 255)
        assert torch.equal(batch.labels, split.labels[batch.index])
        assert batch.digit is None
        assert batch.clutter is None
        assert batch.left_out is None
    # fewer are the first of more
    (fewer,) = views.evaluation_batches(config, split, 20)
    assert torch.equal(fewer.index, order[:20])


# ---------------------------------------------------------------------------------- on another device


@pytest.fixture
def pretended_gpu():
    with PretendedGPU(), torch.no_grad():
        yield torch.device("cuda")


GPU_RUNS = [
    ("same", 1, "black"),
    ("same", 4, "texture"),
    ("different", 4, "black"),
    ("different", 1, "texture"),
    ("different", 1, "folder"),
]


@pytest.mark.parametrize("kind_of_views,crops,background", GPU_RUNS)
def test_views_of_digits_are_rendered_on_the_gpu(
    kind_of_views, crops, background, pretended_gpu, photo_folder
):
    if background == "folder":
        background = photo_folder
    config = laptop(views=kind_of_views, crops=crops, background=background)
    split = DIGITS["train"].to(pretended_gpu)
    training_views = TrainingViews(config, split)
    params = training_views.sample(step=0)
    assert {value.device.type for value in params.values()} == {"cpu"}
    batch = training_views.render(params)
    assert batch.device.type == "cuda"
    assert batch.shape == (len(training_views.plan.crops), 12, 3, 56, 56)
    assert views.denormalize(batch).device.type == "cuda"
    assert training_views.labels(params).device.type == "cuda"


@pytest.mark.parametrize("place_of_photos", ["cpu", "cuda"])
@pytest.mark.parametrize("image_size", [56, 112])
def test_views_of_photographs_are_rendered_on_the_gpu(pretended_gpu, image_size, place_of_photos):
    config = laptop(dataset="stl10", image_size=image_size)
    split = noise_photographs(20).to(torch.device(place_of_photos))
    training_views = TrainingViews(config, split, device=pretended_gpu)
    params = training_views.sample(step=0)
    crops = training_views.render(params)
    assert crops.device.type == "cuda"
    assert crops.shape == (2, 12, 3, image_size, image_size)
    assert training_views.labels(params).device.type == "cuda"


@pytest.mark.parametrize("background", ["black", "texture", "folder"])
def test_evaluation_canvases_are_rendered_on_the_gpu(background, pretended_gpu, photo_folder):
    if background == "folder":
        background = photo_folder
    split = DIGITS["test"].to(pretended_gpu)
    batch = next(views.left_out_batches(laptop(background=background), split, 10))
    tensors = [batch.images, batch.labels, batch.digit, batch.clutter]
    tensors += [batch.left_out.images, batch.left_out.masks, batch.left_out.ink]
    assert {tensor.device.type for tensor in tensors} == {"cuda"}
    assert batch.images.shape == (10, 1, 56, 56)
    assert batch.left_out.images.shape == (10, 6, 1, 56, 56)


FAULTS = [
    pytest.param(lambda x: x + torch.ones(1), RuntimeError, id="a tensor of the CPU"),
    pytest.param(
        lambda x: x * x.mean().item(), DataDependentOutputException, id="a number read from the GPU"
    ),
]


@pytest.mark.parametrize("fault,error", FAULTS)
def test_the_pretended_gpu_notices_faults(fault, error, pretended_gpu, monkeypatch):
    training_views = TrainingViews(laptop(), DIGITS["train"].to(pretended_gpu))
    normalize = views.normalize
    monkeypatch.setattr(views, "normalize", lambda x: fault(normalize(x)))
    with pytest.raises(error):
        training_views.render(training_views.sample(step=0))


# ------------------------------------------------------------------------------------------- marks


def test_a_shortcut_adds_marks_and_changes_nothing_else():
    plain = TrainingViews(laptop(views="different"), DIGITS["train"])
    marked = TrainingViews(laptop(views="different", shortcut=0.5), DIGITS["train"])
    without_params = plain.sample(3)
    params = marked.sample(3)
    for name, value in without_params.items():
        assert_close(params[name], value, rtol=0, atol=0)
    has_mark = params["has_mark"]
    assert 0 < has_mark.sum() < len(has_mark)
    changed = (marked.render(params) != plain.render(without_params)).flatten(2).any(-1)  # (C, B)
    assert not changed[:, ~has_mark].any()
    assert changed[:, has_mark].float().mean() > 0.8  # a crop may have cut the mark off
    # any rows give the same crops
    rows = {name: value[5:8] for name, value in params.items()}
    assert_close(marked.render(rows), marked.render(params)[:, 5:8])


@pytest.mark.parametrize("background", ["black", "texture"])
def test_marked_canvases_are_those_of_the_evaluation_with_a_mark(background):
    config = laptop(background=background, image_size=64)
    batches = list(views.marked_batches(config, DIGITS["test"], 130))
    plain = list(views.evaluation_batches(config, DIGITS["test"], 130))
    assert [len(batch.images) for batch in batches] == [100, 30]
    for batch, reference in zip(batches, plain):
        assert_close(batch.without_mark, reference.images)
        assert (batch.mark.sum((-2, -1)) == 81).all()
        outside = ~batch.mark[:, None]
        assert_close(batch.images[outside], batch.without_mark[outside])
        levels = batch.images[batch.mark[:, None]].view(-1, 81)
        assert_close(levels, levels[:, :1].expand(-1, 81))
        assert levels[:, 0].std() > 0.1
    # a smaller count gives the first of a larger one
    fewer = next(views.marked_batches(config, DIGITS["test"], 7))
    assert_close(fewer.images, batches[0].images[:7])
