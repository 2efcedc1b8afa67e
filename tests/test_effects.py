"""Effects that can be computed by hand, or in a second way."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import DIGITS, PretendedGPU, config_of, on_pretended_gpu
from test_explain import pictures, small_backbone

import effects
import explain
import metrics
import views
import vit
from vit import ViTShape

# ---------------------------------------------------------------------- what several tests need


class MixingBlock(torch.nn.Module):
    """The token of each patch gives a share of itself to [CLS], and keeps the rest."""

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, x, angles=None):
        given = self.share * x[:, 1:]
        cls = x[:, :1] + given.sum(1, keepdim=True)
        return torch.cat([cls, x[:, 1:] - given], dim=1)


class WeighingNetwork(torch.nn.Module):
    """A network whose feature is (1, Σ w x), with the mean x of each patch and its weight w.

    The tokens of patches are w x, and that of [CLS] is 0. There is a block for each of `shares`,
    which mixes this share into [CLS]; the last block adds up what is left. The feature is at the
    angle atan(Σ w x), so cosines are those of differences of such angles.
    """

    def __init__(self, patch_weights: list[float], shares: tuple[float, ...] = ()):
        super().__init__()
        self.shape = ViTShape(patch_size=7, depth=len(shares) + 1)
        self.blocks = [*map(MixingBlock, shares), None]
        self.patch_weights = torch.tensor(patch_weights, dtype=torch.float64)
        self.cls_token = torch.zeros(1, 1, 1)

    def prepare_tokens(self, images, keep=None):
        grey = views.denormalize(images).mean(1, keepdim=True)
        means = metrics.patch_sums(grey, 7)[:, 0].double() / 49
        tokens = means * self.patch_weights
        if keep is not None:
            tokens = tokens.take_along_dim(keep, 1)
        return F.pad(tokens, (1, 0))[..., None]

    def rotary_angles(self, images, keep=None):
        return None

    def last_feature(self, x, angles=None):
        total = x.sum((1, 2))
        return torch.stack([torch.ones_like(total), total], dim=-1)

    def forward(self, images, keep=None):
        return self.last_feature(self.prepare_tokens(images, keep))


def in_patches(values, columns: int = 2):
    """Images (…, H, W) whose patches of 7 × 7 pixels have these values (…, patches)."""
    grid = torch.tensor(values).unflatten(-1, (-1, columns))
    return grid.repeat_interleave(7, -1).repeat_interleave(7, -2)


def effect_of(before: float, after: float) -> float:
    """1 − cosine of the features (1, before) and (1, after)."""
    return 1 - math.cos(math.atan(before) - math.atan(after))


def unit_features(backbone, images, keep=None):
    return F.normalize(backbone(views.normalize(images), keep), dim=-1)


def canvases_with_ink(count: int):
    """Images (count, 1, 28, 28) of noise in which a patch in five is black, and which are not."""
    images = pictures(count, channels=1)
    has_ink = torch.rand(count, 16, generator=torch.Generator().manual_seed(1)) < 0.8
    return images * in_patches(has_ink.tolist(), columns=4)[:, None], has_ink


# -------------------------------------------------------------------------------- blackened patches


def test_feature_distance_by_hand():
    """The features (1, 2) and (1, ½) stand at the angles atan 2 and atan ½."""
    network = WeighingNetwork([1.0, 1.0, 0.0, 0.0])
    image = in_patches([[1.0, 1.0, 1.0, 1.0]])[:, None]
    features = unit_features(network, image)
    changed = in_patches([[0.25, 0.25, 1.0, 0.0]])[:, None]
    distance = effects.feature_distance(network, changed, features).item()
    angle = math.atan(2) - math.atan(0.5)
    assert distance == pytest.approx(2 * math.sin(angle / 2))
    assert effects.feature_distance(network, image, features).item() == pytest.approx(0, abs=1e-7)


def test_a_patch_without_ink_is_not_blackened():
    """More patches than go through the network at a time, each with an effect of its own."""
    backbone = small_backbone()
    images, has_ink = canvases_with_ink(10)
    assert has_ink.sum() > effects.CHANGED_IMAGES
    features = unit_features(backbone, images)
    blackening = effects.blackening_effects(backbone, images, has_ink, features)
    for image in range(10):
        for patch in range(16):
            top = 7 * (patch // 4)
            left = 7 * (patch % 4)
            blackened = images[image].clone()
            blackened[:, top : top + 7, left : left + 7] = 0
            cosine = (unit_features(backbone, blackened[None])[0] @ features[image]).item()
            expected = 1 - cosine if has_ink[image, patch] else 0
            assert blackening[image, patch].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("shape", [{"registers": 2}, {"rotary": True}])
def test_patches_of_a_wide_image_are_blackened_row_by_row(shape):
    backbone = small_backbone(**shape)
    images = pictures(4, 14, 35)
    has_ink = torch.zeros(4, 10, dtype=torch.bool)
    corners = {0: (0, 0), 4: (0, 28), 5: (7, 0), 9: (7, 28)}
    for image, patch in enumerate(corners):
        has_ink[image, patch] = True
    features = unit_features(backbone, images)
    blackening = effects.blackening_effects(backbone, images, has_ink, features)
    for image, (patch, (top, left)) in enumerate(corners.items()):
        blackened = images[image].clone()
        blackened[:, top : top + 7, left : left + 7] = 0
        cosine = (unit_features(backbone, blackened[None])[0] @ features[image]).item()
        assert blackening[image, patch].item() == pytest.approx(1 - cosine, abs=1e-5)
        assert 1 - cosine > 1e-3
    assert (blackening[~has_ink] == 0).all()


def test_effects_of_blank_canvases_and_of_a_single_inky_patch():
    backbone = small_backbone()
    images = torch.zeros(3, 1, 28, 28)
    images[1, :, 14:21, 7:14] = 1  # patch 9
    has_ink = metrics.patch_sums(images[:, 0], 7) > 0
    features = unit_features(backbone, images)
    blackening = effects.blackening_effects(backbone, images, has_ink, features)
    direct = effects.direct_effects(backbone, images, has_ink)
    assert blackening.nonzero().tolist() == [[1, 9]]
    assert direct.nonzero().tolist() == [[0, 1, 9], [1, 1, 9], [2, 1, 9]]

    blank = effects.blackening_effects(backbone, images[:1], has_ink[:1], features[:1])
    assert torch.equal(blank, torch.zeros(1, 16))
    assert torch.equal(effects.direct_effects(backbone, images[:1], has_ink[:1]), direct[:, :1])


# ---------------------------------------------------------------------------------- direct effects


def test_direct_effects_by_hand():
    """Tokens keep ¾ after the first block and ⅜ after the second; only that much is direct."""
    network = WeighingNetwork([4.0, 2.0, 2.0, 1.0], shares=(0.25, 0.5))
    images = in_patches([[1.0, 0.5, 1.0, 1.0], [1.0, 1.0, 0.5, 0.0]])[:, None]
    has_ink = torch.tensor([[True] * 4, [True, True, True, False]])
    direct = effects.direct_effects(network, images, has_ink)
    totals = [8, 7]
    patches = [[4, 1, 2, 1], [4, 2, 1, 0]]
    for block, kept in enumerate([1, 3 / 4, 3 / 8]):
        for image, total in enumerate(totals):
            for patch, weight in enumerate(patches[image]):
                expected = effect_of(total, total - kept * weight)
                actual = direct[block, image, patch].item()
                assert actual == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("registers", [0, 2])
def test_a_direct_effect_passes_through_the_own_token_alone(registers):
    """At the input of the second block, the token of patch 6 is that of the blackened image."""
    backbone = small_backbone(registers=registers)
    images, _ = canvases_with_ink(2)
    blackened = images.clone()
    blackened[..., 7:14, 14:21] = 0
    first, second, last = backbone.blocks
    x = first(backbone.prepare_tokens(views.normalize(images)))
    of_blackened = first(backbone.prepare_tokens(views.normalize(blackened)))
    x[:, 1 + registers + 6] = of_blackened[:, 1 + registers + 6]
    feature = F.normalize(backbone.norm(last(second(x)))[:, 0], dim=-1)
    expected = 1 - (feature * unit_features(backbone, images)).sum(-1)

    only_patch = (torch.arange(16) == 6).expand(2, -1)
    direct = effects.direct_effects(backbone, images, only_patch)
    torch.testing.assert_close(direct[1, :, 6], expected, atol=1e-6, rtol=1e-3)


def direct_and_whole(backbone):
    """Direct effects (depth, B, patches) of some images, and the whole effects (B, patches)."""
    images, has_ink = canvases_with_ink(3)
    images = images.double()
    features = unit_features(backbone, images)
    whole = effects.blackening_effects(backbone, images, has_ink, features)
    assert (whole[has_ink] > 1e-6).all()
    return effects.direct_effects(backbone, images, has_ink), whole


@pytest.mark.parametrize("changes", [{}, {"registers": 2}, {"depth": 1}, {"depth": 2, "heads": 1}])
def test_the_direct_effect_at_the_first_block_is_the_whole_effect(changes):
    backbone = small_backbone(**changes).double()
    direct, whole = direct_and_whole(backbone)
    assert direct.shape == (backbone.shape.depth, 3, 16)
    torch.testing.assert_close(direct[0], whole)
    if backbone.shape.depth > 1:
        assert not torch.allclose(direct[1], whole, rtol=0.01)


def test_everything_is_direct_if_the_first_blocks_mix_nothing():
    backbone = small_backbone().double()
    for block in backbone.blocks[:-1]:
        torch.nn.init.zeros_(block.attn.proj.weight)
    direct, whole = direct_and_whole(backbone)
    torch.testing.assert_close(direct[-1], whole)


def test_nothing_is_direct_if_the_last_block_reads_no_patch():
    backbone = small_backbone().double()
    torch.nn.init.zeros_(backbone.blocks[-1].attn.proj.weight)
    direct, _ = direct_and_whole(backbone)
    assert direct[-1].max() < 1e-12
    assert direct[1].max() > 1e-3


@pytest.mark.parametrize("changed_images", [1, 7])
def test_effects_do_not_depend_on_how_many_images_go_together(monkeypatch, changed_images):
    backbone = small_backbone(registers=1)
    images, has_ink = canvases_with_ink(4)
    features = unit_features(backbone, images)
    direct = effects.direct_effects(backbone, images, has_ink)
    whole = effects.blackening_effects(backbone, images, has_ink, features)
    monkeypatch.setattr(effects, "CHANGED_IMAGES", changed_images)
    direct_again = effects.direct_effects(backbone, images[1:], has_ink[1:])
    whole_again = effects.blackening_effects(backbone, images[1:], has_ink[1:], features[1:])
    torch.testing.assert_close(direct_again, direct[:, 1:], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(whole_again, whole[1:], atol=1e-6, rtol=1e-4)


# ----------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize(
    "grid, side",
    [
        ((1, 1), 1),
        ((8, 8), 1),
        ((1, 64), 1),
        ((8, 9), 2),
        ((1, 65), 2),
        ((5, 17), 2),
        ((14, 14), 2),
        ((16, 16), 2),
        ((28, 28), 4),
        ((32, 32), 4),
        ((33, 32), 5),
    ],
)
def test_windows_are_as_small_as_there_may_be_64_of_them(grid, side):
    assert effects.window_side(grid) == side


def test_windows_at_the_edge_are_smaller():
    """On 5 × 17 patches there are 3 × 9 windows; the last row and column have a patch less."""
    rows = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8]
    windows = effects.window_of_patches((5, 17)).view(5, 17)
    assert windows[0].tolist() == windows[1].tolist() == rows
    assert windows[2].tolist() == windows[3].tolist() == [9 + window for window in rows]
    assert windows[4].tolist() == [18 + window for window in rows]


def test_every_patch_is_its_own_window_on_a_small_grid():
    assert effects.window_of_patches((3, 7)).tolist() == list(range(21))


def test_window_sums_by_hand():
    """On 9 × 8 patches the windows of 2 × 2 lie in 5 rows, of which the last is cut in half."""
    maps = torch.arange(72.0).view(1, 72)
    sums = effects.window_sums(maps, (9, 8)).view(5, 4)
    assert sums[0, 0] == 0 + 1 + 8 + 9
    assert sums[0, 1] == 2 + 3 + 10 + 11
    assert sums[3, 3] == 54 + 55 + 62 + 63
    assert sums[4].tolist() == [64 + 65, 66 + 67, 68 + 69, 70 + 71]


@pytest.mark.parametrize("grid", [(4, 4), (5, 17), (28, 28), (1, 100)])
def test_window_sums_keep_the_mass_of_maps(grid):
    maps = torch.rand(2, 3, grid[0] * grid[1], generator=torch.Generator().manual_seed(0)).double()
    sums = effects.window_sums(maps, grid)
    assert sums.shape[:2] == (2, 3)
    assert sums.shape[2] <= effects.MAX_WINDOWS
    torch.testing.assert_close(sums.sum(-1), maps.sum(-1))


# --------------------------------------------------------------------------------- patches left out


def test_token_effects_by_hand():
    """What a block has mixed into [CLS] stays there when the token is left out after it."""
    network = WeighingNetwork([4.0, 2.0, 2.0, 1.0], shares=(0.25, 0.5))
    images = in_patches([[1.0, 0.5, 1.0, 1.0], [0.0, 1.0, 0.5, 0.0]])[:, None]
    token_effects = effects.window_effects(network, images, [0, 2, 1])
    totals = [8, 3]
    patches = [[4, 1, 2, 1], [0, 2, 1, 0]]
    for number, kept in enumerate([1, 3 / 8, 3 / 4]):
        for image, total in enumerate(totals):
            for patch, weight in enumerate(patches[image]):
                expected = effect_of(total, total - kept * weight)
                actual = token_effects[number, image, patch].item()
                assert actual == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("rows, columns", [(4, 4), (2, 5), (9, 8)])
def test_patches_left_out_of_the_first_block_do_not_exist(registers, rows, columns):
    """The effect is that of the network on the patches that stay; 9 × 8 patches make windows."""
    backbone = small_backbone(registers=registers)
    images = pictures(2, 7 * rows, 7 * columns)
    (of_windows,) = effects.window_effects(backbone, images, [0])
    windows = effects.window_of_patches((rows, columns))
    assert of_windows.shape == (2, int(windows.max()) + 1)
    features = unit_features(backbone, images)
    for window in range(of_windows.shape[1]):
        keep = (windows != window).nonzero()[:, 0].expand(2, -1)
        cosine = (unit_features(backbone, images, keep) * features).sum(-1)
        torch.testing.assert_close(of_windows[:, window], 1 - cosine, atol=1e-6, rtol=1e-4)


def test_leaving_out_is_wholly_direct_if_the_first_blocks_mix_nothing():
    backbone = small_backbone(registers=1).double()
    for block in backbone.blocks[:-1]:
        torch.nn.init.zeros_(block.attn.proj.weight)
    whole, later, last = effects.window_effects(backbone, pictures(2).double(), [0, 1, 2])
    assert (whole > 1e-6).all()
    torch.testing.assert_close(later, whole)
    torch.testing.assert_close(last, whole)


def test_leaving_out_has_no_direct_effect_if_the_last_block_reads_no_patch():
    backbone = small_backbone(registers=1).double()
    torch.nn.init.zeros_(backbone.blocks[-1].attn.proj.weight)
    whole, last = effects.window_effects(backbone, pictures(2).double(), [0, 2])
    assert (whole > 1e-6).all()
    assert last.abs().max() < 1e-12


@pytest.mark.parametrize("changes", [{}, {"depth": 1}, {"registers": 2}])
def test_token_effects_do_not_depend_on_the_batch(changes):
    backbone = small_backbone(**changes)
    images = pictures(4)
    blocks = sorted({0, backbone.shape.depth - 1})
    together = effects.window_effects(backbone, images, blocks)
    assert together.shape == (len(blocks), 4, 16)
    for number, image in enumerate(images):
        alone = effects.window_effects(backbone, image[None], blocks)
        torch.testing.assert_close(alone[:, 0], together[:, number], atol=1e-6, rtol=1e-4)


def test_the_only_patch_can_be_left_out():
    """[CLS] is then alone, as it is for any other image."""
    backbone = small_backbone()
    images = pictures(2, 7, 7)
    (of_windows,) = effects.window_effects(backbone, images, [0])
    no_patch = torch.empty(2, 0, dtype=torch.int64)
    cosine = (unit_features(backbone, images, no_patch) * unit_features(backbone, images)).sum(-1)
    torch.testing.assert_close(of_windows[:, 0], 1 - cosine, atol=1e-6, rtol=1e-4)


# ------------------------------------------------------------------------- curves of leaving out


def cosines_by_hand(totals: list[float]):
    """The cosines of the features (1, total) with the first of them."""
    return [1 - effect_of(totals[0], total) for total in totals]


def test_curves_of_leaving_out_by_hand():
    """A patch of eleven goes in each step. They weigh 0 to 10, and the map has their order."""
    network = WeighingNetwork([3.0, 0.0, 1.0, 10.0, 2.0, 8.0, 4.0, 7.0, 5.0, 9.0, 6.0])
    images = in_patches([[0.1] * 11], columns=11)[:, None]
    maps = network.patch_weights[None] / 55
    most_first, least_first = effects.left_out_cosines(network, images, maps)
    without_heaviest = cosines_by_hand([0.1 * sum(range(11 - gone)) for gone in range(11)])
    without_lightest = cosines_by_hand([0.1 * sum(range(gone, 11)) for gone in range(11)])
    assert most_first[0].tolist() == pytest.approx(without_heaviest[1:], abs=1e-6)
    assert least_first[0].tolist() == pytest.approx(without_lightest[1:], abs=1e-6)


@pytest.mark.parametrize(
    "patches, left",
    [
        (2, [2, 2, 2, 2, 2, 1, 1, 1, 1, 1]),
        (4, [4, 3, 3, 3, 2, 2, 2, 2, 1, 1]),
        (64, [58, 51, 45, 39, 32, 26, 20, 14, 7, 1]),
    ],
)
def test_all_patches_but_one_are_left_out_in_ten_equal_steps(patches, left):
    """The feature counts the patches that stay; half a patch is rounded to an even number."""
    network = WeighingNetwork([1.0] * patches)
    images = torch.ones(1, 1, 7, 7 * patches)
    maps = torch.rand(1, patches, generator=torch.Generator().manual_seed(0))
    for curve in effects.left_out_cosines(network, images, maps):
        angle_left = math.atan(patches) - curve[0].clamp(max=1).acos()
        assert angle_left.tan().tolist() == pytest.approx(left, rel=1e-3)


def gain(network, images, maps) -> float:
    return metrics.relevance_gain(*effects.left_out_cosines(network, images, maps)).item()


def test_gain_of_a_perfect_map_and_of_its_inverse():
    """One patch of eleven matters. If it goes first, each step loses 1 − cos 45°, else none does.

    The first of the ten steps between the curves is half as large, since both begin at 1.
    """
    network = WeighingNetwork([0.0] * 7 + [1.0] + [0.0] * 3)
    images = torch.ones(1, 1, 7, 77)
    perfect = torch.linspace(0, 1, 11).roll(8)[None]
    assert perfect.argmax() == 7
    expected = 0.95 * (1 - math.sqrt(1 / 2))
    assert gain(network, images, perfect) == pytest.approx(expected, abs=1e-6)
    assert gain(network, images, 1 - perfect) == pytest.approx(-expected, abs=1e-6)


def test_the_inverse_of_a_map_has_minus_its_gain():
    backbone = small_backbone()
    images = pictures(5)
    maps = explain.attention(backbone, images)
    gains = metrics.relevance_gain(*effects.left_out_cosines(backbone, images, maps))
    inverse = metrics.relevance_gain(*effects.left_out_cosines(backbone, images, 1 - maps))
    assert gains.abs().min() > 1e-4
    torch.testing.assert_close(inverse, -gains)


def test_gains_of_a_map_that_prefers_nothing_are_0_on_average():
    """Whichever of eleven patches matters: it goes as early in one order as late in the other."""
    images = torch.ones(1, 1, 7, 77)
    uniform = torch.full((1, 11), 1 / 11)
    gains = [gain(WeighingNetwork(row), images, uniform) for row in torch.eye(11).tolist()]
    assert sum(gains) == pytest.approx(0, abs=1e-6)
    assert max(gains) > 0.2


def test_patches_with_equal_shares_do_not_go_in_the_order_of_rows():
    """The upper half of 64 patches matters, which a map of nothing does not know."""
    network = WeighingNetwork([1 / 32] * 32 + [0.0] * 32)
    images = torch.ones(1, 1, 56, 56)
    upper_half_first = torch.arange(64.0).flip(0)[None]
    assert gain(network, images, upper_half_first) > 0.14
    assert abs(gain(network, images, torch.ones(1, 64))) < 0.05


def test_curves_do_not_depend_on_the_batch():
    backbone = small_backbone(registers=1)
    images = pictures(4)
    maps = explain.attention(backbone, images)
    maps[2] = 1 / 16
    together = effects.left_out_cosines(backbone, images, maps)
    for number in range(4):
        rows = slice(number, number + 1)
        alone = effects.left_out_cosines(backbone, images[rows], maps[rows])
        for curve_alone, curve in zip(alone, together):
            torch.testing.assert_close(curve_alone, curve[rows], atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------- a pretended GPU


@pytest.fixture
def on_gpu():
    """A network and canvases on a pretended GPU, which has no numbers.

    Blackening finds patches by their index, so it cannot be tried there.
    """
    config = config_of("--preset laptop --digits sklearn --registers 1")
    with PretendedGPU(), torch.no_grad():
        backbone = on_pretended_gpu(vit.build_network(config).backbone)
        batch = next(views.left_out_batches(config, DIGITS["test"].to("cuda"), 10))
        yield backbone, batch


def test_distances_and_curves_stay_on_the_gpu(on_gpu):
    backbone, batch = on_gpu
    heads, features = explain.cls_attention(backbone, batch.images)
    distance = effects.feature_distance(backbone, batch.left_out.images[:, 0], features)
    curves = effects.left_out_cosines(backbone, batch.images, heads.mean(1))
    gains = metrics.relevance_gain(*curves)
    ink = metrics.patch_sums(batch.left_out.masks[:, 0], 7)
    assert distance.shape == gains.shape == (10,)
    assert curves[0].shape == curves[1].shape == (10, 10)
    assert ink.shape == (10, 64)
    tensors = [distance, *curves, gains, ink]
    assert {tensor.device.type for tensor in tensors} == {"cuda"}


def test_leaving_out_windows_stays_on_the_gpu(on_gpu):
    backbone, batch = on_gpu
    of_windows = effects.window_effects(backbone, batch.images, [0, 1])
    mass = effects.window_sums(explain.attention(backbone, batch.images), (8, 8))
    assert of_windows.shape == (2, 10, 64)
    assert mass.shape == (10, 64)
    assert of_windows.device.type == mass.device.type == "cuda"
