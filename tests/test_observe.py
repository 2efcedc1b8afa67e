"""What is gathered batch by batch is what each image gives, however they are put into batches."""

import math
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from helpers import DIGITS, config_of
from test_effects import WeighingNetwork, effect_of, in_patches
from test_explain import pictures, small_backbone

import effects
import explain
import metrics
import observe
import views
from views import EvaluationBatch, LeftOut

CONFIG = config_of("--preset laptop")
ROWS = ["mean", "rollout", "norm_rollout", "squared_gradient"]

# ---------------------------------------------------------------------- what several tests need


def in_pieces(batches, size: int):
    """The same evaluation images in batches of `size` rows."""
    for batch in batches:
        for start in range(0, len(batch.index), size):
            rows = slice(start, start + size)
            items = {}
            for entry in fields(batch):
                value = getattr(batch, entry.name)
                if isinstance(value, LeftOut):
                    value = LeftOut(value.images[rows], value.masks[rows], value.ink[rows])
                elif value is not None:
                    value = value[rows]
                items[entry.name] = value
            yield EvaluationBatch(**items)


def canvases(count: int):
    return views.evaluation_batches(CONFIG, DIGITS["test"], count)


def left_out_canvases(count: int) -> list[EvaluationBatch]:
    return list(views.left_out_batches(CONFIG, DIGITS["test"], count))


def photographs(count: int, height: int = 28, width: int = 28) -> EvaluationBatch:
    images = pictures(count, height, width)
    return EvaluationBatch(images, torch.arange(count) % 10, 3 * torch.arange(count))


def assert_close(actual, expected):
    """Two tensors, or two dicts or dataclasses of tensors, hold the same except for rounding."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_close(actual[key], expected[key])
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-3, equal_nan=True)
    elif hasattr(expected, "__dataclass_fields__"):
        assert type(actual) is type(expected)
        for entry in fields(expected):
            assert_close(getattr(actual, entry.name), getattr(expected, entry.name))
    else:
        assert actual == expected


# -------------------------------------------------------------------------- attention and features


def test_canvases_are_observed_with_their_masks():
    networks = {
        "trained": small_backbone(registers=1, pos_size=56),
        "other_network": small_backbone(pos_size=56),
    }
    observation = observe.observe(networks, canvases(15))
    (batch,) = canvases(15)
    assert observation.features.keys() == observation.attention.keys() == networks.keys()
    for name, network in networks.items():
        maps, features = explain.cls_attention(network, batch.images)
        torch.testing.assert_close(observation.attention[name], maps)
        torch.testing.assert_close(observation.features[name], features)
    assert observation.patch_area == 49
    assert torch.equal(observation.index, batch.index)
    assert torch.equal(observation.labels, DIGITS["test"].labels[batch.index])
    assert torch.equal(observation.digit, metrics.patch_sums(batch.digit, 7))
    assert torch.equal(observation.clutter, metrics.patch_sums(batch.clutter, 7))
    torch.testing.assert_close(observation.intensity, metrics.patch_sums(batch.images[:, 0], 7))


def test_photographs_have_no_masks():
    observation = observe.observe({"trained": small_backbone()}, [photographs(4), photographs(3)])
    assert observation.digit is None
    assert observation.clutter is None
    assert observation.intensity is None
    assert observation.index.tolist() == [0, 3, 6, 9, 0, 3, 6]
    assert observation.labels.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert observation.attention["trained"].shape == (7, 3, 16)


def test_features_alone_can_be_observed():
    networks = {"trained": small_backbone(pos_size=56)}
    alone = observe.observe(networks, canvases(5), maps=False)
    assert alone.attention == {}
    assert alone.digit is None
    observation = observe.observe(networks, canvases(5))
    assert torch.equal(alone.features["trained"], observation.features["trained"])


def test_observations_do_not_depend_on_the_batch_size():
    networks = {"trained": small_backbone(pos_size=56), "untrained": small_backbone(pos_size=28)}
    at_once = observe.observe(networks, canvases(20))
    assert_close(observe.observe(networks, in_pieces(canvases(20), 7)), at_once)


def test_weights_that_give_no_finite_numbers_are_refused():
    backbone = small_backbone(pos_size=56)
    with torch.no_grad():
        backbone.blocks[1].attn.qkv.weight[0, 0] = torch.nan
    for maps in (True, False):
        with pytest.raises(FloatingPointError, match="NaN or infinite"):
            observe.observe({"trained": backbone}, canvases(5), maps=maps)


def test_rows_have_the_names_of_maps_but_for_attention():
    for name in explain.MAPS:
        assert observe.name_of(observe.row_of(name)) == name
    assert observe.row_of("attention") == "mean"
    assert observe.row_of("norm_rollout") == observe.row_of("norm rollout") == "norm_rollout"
    images = pictures(2)
    backbone = small_backbone()
    maps = observe.maps_by_row(backbone, images, ["attention", "contrast"])
    assert list(maps) == ["mean", "contrast"]
    assert torch.equal(maps["mean"], explain.attention(backbone, images))
    assert torch.equal(maps["contrast"], explain.contrast(backbone, images))


# ------------------------------------------------------------------------------ effects on canvases


def batch_of_two_canvases() -> EvaluationBatch:
    """The digit lies on patches 0 and 1, a distractor on 2, and on 3 of the first canvas only.

    Left out are, one after another, patches 0 to 3.
    """
    grey = torch.tensor([[1.0, 0.5, 1.0, 1.0], [1.0, 1.0, 0.5, 0.0]])
    left_out = grey[:, None] * (1 - torch.eye(4))  # (2, 4, 4)
    ink = torch.eye(4) * grey[:, None] > 0.4
    return EvaluationBatch(
        images=in_patches(grey.tolist())[:, None],
        labels=torch.tensor([0, 1]),
        index=torch.tensor([5, 6]),
        digit=in_patches([[True, True, False, False]] * 2),
        clutter=in_patches([[False, False, True, True], [False, False, True, False]]),
        left_out=LeftOut(
            images=in_patches(left_out.tolist())[:, :, None],
            masks=in_patches(ink.tolist()),
            ink=torch.tensor([[49, 25, 49, 49], [49, 49, 25, 0]]),
        ),
    )


WEIGHTS = [4.0, 2.0, 2.0, 1.0]


def test_effects_of_a_network_that_weighs_patches():
    """Its features are (1, a) at the angle atan a; of the first canvas, a = 4 + 1 + 2 + 1 = 8.

    Of each patch, ¼ is still in its own token at the last block.
    """
    network = WeighingNetwork(WEIGHTS, shares=(0.75,))
    names = ("brightness", "centre")
    observed = observe.observe_effects(network, [batch_of_two_canvases()], names, direct_images=2)
    assert observed.index.tolist() == [5, 6]
    assert observed.has_ink.tolist() == [[True] * 4, [True, True, True, False]]
    assert torch.equal(observed.part_ink[0], 49 * torch.eye(4))
    assert torch.equal(observed.part_ink[1], torch.diag(torch.tensor([49.0, 49.0, 49.0, 0.0])))
    assert observed.canvas_ink.tolist() == [[49, 25, 49, 49], [49, 49, 25, 0]]
    assert observed.pieces == 2
    intensity = 49 * torch.tensor([[1.0, 0.5, 1.0, 1.0], [1.0, 1.0, 0.5, 0.0]])
    torch.testing.assert_close(observed.intensity, intensity)
    assert list(observed.maps) == ["brightness", "centre"]
    of_ink = intensity / intensity.sum(-1, keepdim=True)
    torch.testing.assert_close(observed.maps["brightness"], of_ink)

    totals = [8, 7]
    patches = [[4, 1, 2, 1], [4, 2, 1, 0]]
    assert observed.direct.shape == (2, 2, 4)
    for image, total in enumerate(totals):
        for patch, weight in enumerate(patches[image]):
            whole = effect_of(total, total - weight)
            direct = effect_of(total, total - weight / 4)
            assert observed.blackening[image, patch].item() == pytest.approx(whole, abs=1e-6)
            assert observed.direct[image, 0, patch].item() == pytest.approx(whole, abs=1e-6)
            assert observed.direct[image, 1, patch].item() == pytest.approx(direct, abs=1e-6)
            distance = math.sqrt(2 * whole)
            assert observed.distances[image, patch].item() == pytest.approx(distance, abs=1e-5)


@pytest.mark.parametrize("distractors, pieces", [(0, 1), (1, 1), (3, 3)])
def test_there_are_as_many_pieces_of_the_digit_as_distractors_or_one(distractors, pieces):
    config = config_of(f"--preset laptop --num-distractors {distractors}")
    batches = views.left_out_batches(config, DIGITS["test"], 2)
    observed = observe.observe_effects(small_backbone(pos_size=56), batches)
    assert observed.pieces == pieces
    assert observed.distances.shape == (2, pieces + distractors)


@pytest.mark.parametrize("direct_images", [0, 3, 5, 8, 100])
def test_direct_effects_are_those_of_the_first_canvases(direct_images):
    """They come in batches of five, five and two."""
    backbone = small_backbone(pos_size=56, depth=2)
    batches = left_out_canvases(12)
    expected = observe.observe_effects(backbone, batches, direct_images=12)
    assert expected.direct.isfinite().all()
    in_three_batches = in_pieces(batches, 5)
    observed = observe.observe_effects(backbone, in_three_batches, direct_images=direct_images)
    assert observed.direct.shape == (12, 2, 64)
    assert_close(observed.direct[:direct_images], expected.direct[:direct_images])
    assert observed.direct[direct_images:].isnan().all()
    assert_close(observed.blackening, expected.blackening)


def test_effects_do_not_depend_on_the_batch_size():
    backbone = small_backbone(pos_size=56, depth=2, registers=1)
    batches = left_out_canvases(10)
    names = ("attention", "rollout", "norm_rollout", "squared_gradient", "brightness", "random")
    at_once = observe.observe_effects(backbone, batches, names, direct_images=4)
    assert list(at_once.maps) == [*ROWS, "brightness", "random"]
    in_batches = observe.observe_effects(backbone, in_pieces(batches, 3), names, direct_images=4)
    assert_close(in_batches, at_once)


def test_a_blank_canvas_and_one_with_a_single_inky_patch():
    """On the second one patch 5 is white, and its only distractor, which is left out."""
    images = torch.zeros(2, 1, 28, 28)
    images[1, :, 7:14, 7:14] = 1
    has_ink = images[:, 0] > 0
    nothing = torch.zeros_like(has_ink)
    batch = EvaluationBatch(
        images=images,
        labels=torch.tensor([0, 1]),
        index=torch.tensor([0, 1]),
        digit=nothing,
        clutter=has_ink,
        left_out=LeftOut(
            images=torch.stack([images, torch.zeros_like(images)], 1),
            masks=torch.stack([nothing, has_ink], 1),
            ink=torch.tensor([[0, 0], [0, 49]]),
        ),
    )
    names = tuple(explain.MAPS)
    observed = observe.observe_effects(small_backbone(), [batch], names, direct_images=2)
    assert observed.has_ink.nonzero().tolist() == [[1, 5]]
    assert observed.blackening.nonzero().tolist() == [[1, 5]]
    assert torch.equal(observed.direct[0], torch.zeros(3, 16))
    assert observed.distances[0].max() < 1e-3
    effect = observed.distances[1, 1].item() ** 2 / 2
    assert observed.blackening[1, 5].item() == pytest.approx(effect, rel=1e-4)
    for row, maps in observed.maps.items():
        assert maps.isfinite().all(), row
        for name, value in metrics.faithfulness(maps.float(), observed).items():
            assert value.isnan().all(), (row, name)  # there are no two patches to compare


def test_maps_are_not_faithful_to_a_network_to_which_nothing_matters():
    network = WeighingNetwork([0.0, 0.0, 0.0, 0.0])
    observed = observe.observe_effects(network, [batch_of_two_canvases()], direct_images=1)
    assert (observed.blackening == 0).all()
    maps = torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 2)
    values = metrics.faithfulness(maps, observed)
    assert values["patch_faithfulness"].tolist() == [0, 0]
    assert values["object_faithfulness"][0] == 0
    assert values["equal_ink_wins"].tolist() == [1.5, 0.5]  # of three pairs and of one
    direct = values["direct_faithfulness"].tolist()
    assert direct[0] == 0
    assert math.isnan(direct[1])  # its direct effects are not measured


# ------------------------------------------------------------------- effects on images of any kind


def test_how_maps_stand_up_to_leaving_out_tokens_by_hand():
    """The patches add 4, 1, 2 and 1 to the feature, or 4, 2, 1 and 0, so ranks are known.

    The network mixes nothing before its last block, so all of it is direct.
    """
    network = WeighingNetwork(WEIGHTS, shares=(0.0,))
    images = batch_of_two_canvases().images
    maps = {
        "in_order": torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.5, 0.3, 0.2, 0.0]]),
        "reversed": torch.tensor([[0.1, 0.4, 0.1, 0.4], [0.0, 0.2, 0.3, 0.5]]),
        "uniform": torch.full((2, 4), 0.25),
    }
    index = torch.tensor([5, 6])
    whole, measured = observe.measure_tokens(network, images, maps, index, ["in_order"])
    totals = [8, 7]
    patches = [[4, 1, 2, 1], [4, 2, 1, 0]]
    for image, total in enumerate(totals):
        expected = [effect_of(total, total - weight) for weight in patches[image]]
        assert whole[image].tolist() == pytest.approx(expected, abs=1e-7)
        sums = measured.direct_sums[image].tolist()
        assert sums == pytest.approx([sum(expected)] * 2, abs=1e-7)

    assert torch.equal(measured.index, index)
    # The ranks of the first effects are 4, 1½, 3, 1½, and "reversed" has 1½, 3½, 1½, 3½.
    of_reversed = -4 / math.sqrt(4.5 * 4)
    for values in (measured.patch_faithfulness, measured.direct_faithfulness):
        assert values["in_order"].tolist() == pytest.approx([1, 1])
        assert values["reversed"].tolist() == pytest.approx([of_reversed, -1])
        assert values["uniform"].tolist() == [0, 0]
    assert (measured.srg["in_order"] > 0).all()
    assert measured.srg["reversed"].isnan().all()
    assert measured.srg["uniform"].isnan().all()


def test_direct_faithfulness_is_about_the_last_block():
    """The first block mixes all of patch 0 into [CLS], so the second reads the others alone."""

    class TakingPatch0(torch.nn.Module):
        def forward(self, x, angles=None):
            given = torch.zeros_like(x)
            given[:, 1] = x[:, 1]
            return x - given + given.roll(-1, 1)

    network = WeighingNetwork([3.0, 2.0, 1.0, 0.5], shares=(0.0,))
    network.blocks[0] = TakingPatch0()
    maps = {"in_order": torch.tensor([[0.4, 0.3, 0.2, 0.1]])}
    images = torch.ones(1, 1, 14, 14)
    whole, measured = observe.measure_tokens(network, images, maps, torch.tensor([0]))
    assert measured.patch_faithfulness["in_order"].item() == pytest.approx(1)
    # the direct effects have the ranks 1, 4, 3, 2, and the map 4, 3, 2, 1
    assert measured.direct_faithfulness["in_order"].item() == pytest.approx(-0.2)
    share = measured.direct_sums[0, 1] / measured.direct_sums[0, 0]
    assert share.item() == pytest.approx(1 - (whole[0, 0] / whole.sum()).item())


def test_gains_are_those_of_the_curves():
    backbone = small_backbone()
    batch = photographs(3)
    maps = observe.maps_by_row(backbone, batch.images, ["attention", "contrast"])
    _, measured = observe.measure_tokens(
        backbone, batch.images, maps, batch.index, ["mean", "contrast"]
    )
    for row, values in maps.items():
        curves = effects.left_out_cosines(backbone, batch.images, values)
        torch.testing.assert_close(measured.srg[row], metrics.relevance_gain(*curves))


def test_maps_are_compared_on_windows():
    """On 9 × 8 patches these are 20 windows, and so are the effects."""
    backbone = small_backbone()
    batch = photographs(2, 63, 56)
    rng = torch.Generator().manual_seed(0)
    maps = {"noise": explain.normalize_rows(torch.rand(2, 72, generator=rng))}
    whole, measured = observe.measure_tokens(backbone, batch.images, maps, batch.index)
    (expected,) = effects.window_effects(backbone, batch.images, [0])
    torch.testing.assert_close(whole, expected)
    mass = effects.window_sums(maps["noise"], (9, 8))
    # The windows of the last row are cut off, so they have less of any map, and less effect.
    is_whole = torch.arange(20).expand(2, 20) < 16
    rho = metrics.spearman(mass, whole, is_whole)
    torch.testing.assert_close(measured.patch_faithfulness["noise"], rho)


def test_windows_that_hold_the_same_shares_are_tied():
    """Shares in another order must not differ by rounding, which would make a rank of nothing."""
    rng = torch.Generator().manual_seed(0)
    shares = torch.rand(4, generator=rng)
    orders = torch.rand(64, 4, generator=rng).argsort(1)
    windows = shares[orders].view(8, 8, 2, 2)  # of 2 × 2 patches each
    maps = {"noise": explain.normalize_rows(windows.transpose(1, 2).reshape(1, 256))}
    network = WeighingNetwork(torch.linspace(0.1, 1, 256).tolist())
    images = torch.ones(1, 1, 112, 112)
    _, measured = observe.measure_tokens(network, images, maps, torch.tensor([0]))
    assert measured.patch_faithfulness["noise"].item() == 0


def test_images_of_a_single_patch_have_nothing_to_compare():
    backbone = small_backbone()
    names = list(explain.MAPS)
    observed = observe.observe_token_effects(backbone, [photographs(3, 7, 7)], names)
    for row in map(observe.row_of, names):
        assert observed.srg[row].isnan().all()
        assert observed.patch_faithfulness[row].isnan().all()
        assert observed.direct_faithfulness[row].isnan().all()
    assert (observed.direct_sums[:, 0] > 0).all()


@pytest.mark.parametrize("direct_images", [0, 2, 4, 6, 100])
def test_effects_at_blocks_in_between_are_those_of_the_first_images(direct_images):
    """Batches are of four, four and one, and those at the first and last block are of all."""
    backbone = small_backbone(depth=4)
    batch = photographs(9)
    expected = effects.window_effects(backbone, batch.images, [0, 1, 2, 3]).sum(-1).T
    observed = observe.observe_token_effects(
        backbone, in_pieces([batch], 4), ["centre"], direct_images
    )
    assert torch.equal(observed.index, batch.index)
    assert_close(observed.direct_sums[:, [0, 3]], expected[:, [0, 3]])
    between = observed.direct_sums[:, [1, 2]]
    assert_close(between[:direct_images], expected[:direct_images, [1, 2]])
    assert between[direct_images:].isnan().all()


@pytest.mark.parametrize("depth", [1, 2])
def test_networks_without_blocks_in_between(depth):
    backbone = small_backbone(depth=depth)
    batch = photographs(3)
    observed = observe.observe_token_effects(backbone, [batch], ["attention"], direct_images=3)
    of_blocks = effects.window_effects(backbone, batch.images, list(range(depth)))
    assert_close(observed.direct_sums, of_blocks.sum(-1).T)
    everywhere = torch.ones(3, 16, dtype=torch.bool)
    rho = metrics.spearman(explain.attention(backbone, batch.images), of_blocks[-1], everywhere)
    assert_close(observed.direct_faithfulness["mean"], rho)


@pytest.mark.parametrize("height, width", [(28, 28), (14, 35)])
def test_token_effects_do_not_depend_on_the_batch_size(height, width):
    backbone = small_backbone(registers=2)
    batch = photographs(7, height, width)
    names = ["attention", "rollout", "norm_rollout", "squared_gradient", "centre", "random"]
    at_once = observe.observe_token_effects(backbone, [batch], names, direct_images=5)
    assert list(at_once.srg) == [*ROWS, "centre", "random"]
    assert all(values.isfinite().all() for values in at_once.srg.values())
    in_batches = observe.observe_token_effects(backbone, in_pieces([batch], 3), names, 5)
    assert_close(in_batches, at_once)


def test_what_is_observed_needs_no_gradients():
    """Everything comes without a graph, even if gradients are on and a map needs them."""
    backbone = small_backbone(pos_size=56)
    networks = {"trained": backbone}
    names = ["squared_gradient"]
    on_canvases = observe.observe_effects(backbone, left_out_canvases(2), names, 1)
    on_photographs = observe.observe_token_effects(backbone, [photographs(2)], names)
    tensors = [
        observe.observe(networks, canvases(2)).features["trained"],
        on_canvases.maps["squared_gradient"],
        on_canvases.direct,
        on_photographs.srg["squared_gradient"],
        on_photographs.direct_sums,
    ]
    assert not any(tensor.requires_grad for tensor in tensors)


def test_unit_features_are_observed():
    observation = observe.observe({"trained": small_backbone()}, [photographs(5)])
    features = observation.features["trained"]
    torch.testing.assert_close(F.normalize(features, dim=-1), features)
