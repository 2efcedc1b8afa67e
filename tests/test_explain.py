"""Maps and effects of networks for which both can be computed by hand, or in a second way."""

import math
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from helpers import DIGITS, PretendedGPU, config_of, on_pretended_gpu

import explain
import metrics
import views
import vit
from data import Split
from views import EvaluationBatch, LeftOut
from vit import VisionTransformer, ViTShape

PATCH_SIZE = 7
CONFIG = config_of("--preset laptop")


def small_backbone(registers: int = 0, pos_size: int = 28) -> VisionTransformer:
    torch.manual_seed(0)
    shape = ViTShape(patch_size=7, dim=24, depth=3, heads=3, pos_size=pos_size, registers=registers)
    return VisionTransformer(shape)


# -------------------------------------------------------------------------------------------- maps


@pytest.mark.parametrize("registers", [0, 2])
def test_attention_to_patches_leaves_out_cls_and_registers(registers):
    backbone = small_backbone(registers)
    images = torch.randn(2, 3, 28, 28)
    maps, features = explain.cls_attention(backbone, images)
    assert maps.shape == (2, 3, 16)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 3))
    to_all_tokens = backbone.get_last_selfattention(images)[:, :, 0]
    to_patches = to_all_tokens[..., 1 + registers :]
    torch.testing.assert_close(maps * to_patches.sum(-1, keepdim=True), to_patches)
    torch.testing.assert_close(features, F.normalize(backbone(images), dim=-1))


@pytest.mark.parametrize("registers", [0, 2])
def test_rollout_is_a_product_of_matrices(registers):
    """As Abnar & Zuidema write it: ½ · attention + ½ · I of each block, one times the other."""
    backbone = small_backbone(registers)
    images = torch.rand(2, 3, 28, 28)
    x = backbone.prepare_tokens(images)
    product = torch.eye(x.shape[1])
    for block in backbone.blocks:
        q, k, _ = block.attn.queries_keys_values(block.norm1(x))
        attention = (q @ k.mT / math.sqrt(24 / 3)).softmax(-1).mean(1)
        product = (attention + torch.eye(x.shape[1])) / 2 @ product
        x = block(x)
    to_patches = product[:, 0, 1 + registers :]
    rollout = explain.rollout(backbone, images)
    torch.testing.assert_close(rollout, to_patches / to_patches.sum(-1, keepdim=True))
    torch.testing.assert_close(rollout.sum(-1), torch.ones(2))


# ----------------------------------------------------------------------------------- observations


@pytest.mark.parametrize("registers", [0, 2])
def test_norm_rollout_is_what_tokens_pass_on(registers):
    """As Kobayashi et al. write it, with a vector for each pair of tokens, in float64."""
    backbone = small_backbone(registers).double()
    images = torch.rand(2, 3, 28, 28).double()
    x = backbone.prepare_tokens(images)
    tokens = x.shape[1]
    product = torch.eye(tokens).double()
    for block in backbone.blocks:
        q, k, v = block.attn.queries_keys_values(block.norm1(x))
        attention = (q @ k.mT / math.sqrt(24 / 3)).softmax(-1)  # (B, heads, N, N)
        by_head = block.attn.proj.weight.split(8, dim=1)  # (dim, d) each
        passed_on = torch.zeros(2, tokens, tokens, 24).double()
        for head, projection in enumerate(by_head):
            vectors = v[:, head] @ projection.T  # (B, N, dim)
            passed_on += attention[:, head, :, :, None] * vectors[:, None]
        for token in range(tokens):
            passed_on[:, token, token] += x[:, token]
        norms = passed_on.norm(dim=-1)
        product = norms / norms.sum(-1, keepdim=True) @ product
        x = block(x)
    to_patches = product[:, 0, 1 + registers :]
    expected = to_patches / to_patches.sum(-1, keepdim=True)
    torch.testing.assert_close(explain.norm_rollout(backbone, images), expected)


class KnownFeature(torch.nn.Module):
    """Its feature is (1, s), where s is a weighted sum of the first channel over each patch."""

    def __init__(self, weights: list[float]):
        super().__init__()
        self.shape = ViTShape(patch_size=2)
        self.weights = torch.tensor(weights)

    def forward(self, images):
        s = metrics.patch_sums(images[:, 0], 2) @ self.weights
        return torch.stack([torch.ones_like(s), s], dim=-1)


def test_squared_gradients_of_a_known_feature():
    """The feature's gradient at a patch is proportional to the patch's weight."""
    network = KnownFeature([0.0, 1.0, -2.0, 0.0])
    pictures = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    maps = explain.squared_gradient(network, pictures)
    torch.testing.assert_close(maps, torch.tensor([[0.0, 0.2, 0.8, 0.0]]).expand(3, -1))


def test_squared_gradients_do_not_depend_on_the_batch_or_on_gradients_being_off():
    backbone = small_backbone().double()
    pictures = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        together = explain.squared_gradient(backbone, pictures)
    alone = torch.cat([explain.squared_gradient(backbone, picture[None]) for picture in pictures])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(together.sum(-1), torch.ones(3))
    more = explain.squared_gradient(backbone, pictures, directions=64)
    assert not torch.equal(more, together)
    assert (more - together).abs().max() < 0.05  # an estimate of the same thing


def in_pieces(batches, size: int):
    """The same evaluation images in batches of `size` rows."""
    for batch in batches:
        for start in range(0, len(batch.index), size):
            rows = slice(start, start + size)
            left_out = batch.left_out
            if left_out is not None:
                left_out = LeftOut(left_out.images[rows], left_out.masks[rows], left_out.ink[rows])
            yield EvaluationBatch(
                images=batch.images[rows],
                labels=batch.labels[rows],
                index=batch.index[rows],
                digit=batch.digit[rows],
                clutter=batch.clutter[rows],
                left_out=left_out,
            )


def canvases(count: int):
    return views.evaluation_batches(CONFIG, DIGITS["test"], count)


def photographs(count: int) -> EvaluationBatch:
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 28, 28, generator=rng)
    return EvaluationBatch(images, torch.arange(count) % 10, torch.arange(count))


def test_canvases_are_observed_with_their_masks():
    backbone = small_backbone(registers=1, pos_size=56)
    networks = {"trained": backbone, "other_network": small_backbone(pos_size=56)}
    observation = explain.observe(networks, canvases(15), with_rollout=True)
    (batch,) = canvases(15)
    images = views.normalize(batch.images)
    assert observation.features.keys() == observation.attention.keys() == networks.keys()
    for name, network in networks.items():
        maps, features = explain.cls_attention(network, images)
        torch.testing.assert_close(observation.attention[name], maps)
        torch.testing.assert_close(observation.features[name], features)
    torch.testing.assert_close(observation.rollout, explain.rollout(backbone, images))
    assert observation.token_effects is None
    assert observation.patch_area == 49
    assert torch.equal(observation.index, batch.index)
    assert torch.equal(observation.labels, DIGITS["test"].labels[batch.index])
    assert torch.equal(observation.digit, metrics.patch_sums(batch.digit, 7))
    assert torch.equal(observation.clutter, metrics.patch_sums(batch.clutter, 7))
    torch.testing.assert_close(observation.intensity, metrics.patch_sums(batch.images[:, 0], 7))


def test_photographs_are_observed_with_the_effects_of_their_tokens():
    backbone = small_backbone()
    batch = photographs(12)
    observation = explain.observe({"trained": backbone}, [batch], with_rollout=True)
    assert observation.digit is None
    assert observation.clutter is None
    assert observation.intensity is None
    images = views.normalize(batch.images)
    maps = [observation.attention["trained"].mean(1), observation.rollout]
    rng = torch.Generator().manual_seed(0)
    expected = explain.token_effects(backbone, images, maps, rng)
    torch.testing.assert_close(observation.token_effects, expected)


def test_features_alone_can_be_observed():
    backbone = small_backbone(pos_size=56)
    networks = {"trained": backbone}
    alone = explain.observe(networks, canvases(5), maps=False)
    assert alone.attention == {}
    assert alone.digit is None
    assert alone.rollout is None
    observation = explain.observe(networks, canvases(5))
    assert torch.equal(alone.features["trained"], observation.features["trained"])


def assert_close_fields(actual, expected, but=()):
    """Two dataclasses of tensors hold the same, except in some of their fields."""
    for entry in fields(expected):
        if entry.name not in but:
            actual_value = getattr(actual, entry.name)
            expected_value = getattr(expected, entry.name)
            torch.testing.assert_close(actual_value, expected_value, atol=1e-5, rtol=1e-4)


def test_observations_do_not_depend_on_the_batch_size():
    backbone = small_backbone(pos_size=56)
    networks = {"trained": backbone}
    at_once = explain.observe(networks, canvases(20), with_rollout=True)
    in_three_batches = explain.observe(networks, in_pieces(canvases(20), 7), with_rollout=True)
    assert_close_fields(in_three_batches, at_once)

    batches = list(views.left_out_batches(CONFIG, DIGITS["test"], 20))
    effects = explain.observe_effects(backbone, batches)
    effects_in_three_batches = explain.observe_effects(backbone, in_pieces(batches, 7))
    # Another canvas of the batch lends its attention, so this one does depend on it.
    assert_close_fields(effects_in_three_batches, effects, but=["swapped_features"])


def test_weights_that_give_no_finite_numbers_are_refused():
    backbone = small_backbone(pos_size=56)
    with torch.no_grad():
        backbone.blocks[1].attn.qkv.weight[0, 0] = torch.nan
    for maps in (True, False):
        with pytest.raises(FloatingPointError, match="NaN or infinite"):
            explain.observe({"trained": backbone}, canvases(5), maps=maps)


# ----------------------------------------------------------------------------------------- effects


class WeighingNetwork(torch.nn.Module):
    """A network whose feature is (1, Σ w x), with the brightness x of each patch and its weight w.

    `attention` (B, 1 + patches) is that of [CLS] in its only head. An attention that replaces it
    multiplies the feature by what it gives to [CLS] and to the first patch.
    """

    def __init__(self, weights, attention=None):
        super().__init__()
        self.shape = ViTShape(patch_size=PATCH_SIZE)
        self.weights = torch.tensor(weights)
        self.attention = attention

    def forward(self, images, keep=None):
        grey = views.denormalize(images).mean(1)
        weighted = metrics.patch_sums(grey, PATCH_SIZE) / PATCH_SIZE**2 * self.weights
        if keep is not None:
            weighted = weighted.take_along_dim(keep, 1)
        total = weighted.sum(-1)
        return torch.stack([torch.ones_like(total), total], dim=-1)

    def before_last_block(self, images):
        return self(images)

    def last_attention(self, x, num_queries):
        assert num_queries == 1
        return self.attention[:, None, None]

    def last_feature(self, x, attention=None):
        if attention is None:
            return x
        return x * attention[:, 0, 0, :2]


def in_patches(values):
    """Images (…, 14, 14) whose four patches of 7×7 pixels have these values (…, 4)."""
    grid = torch.tensor(values).unflatten(-1, (2, 2))
    return grid.repeat_interleave(PATCH_SIZE, -1).repeat_interleave(PATCH_SIZE, -2)


def batch_of_two_canvases() -> EvaluationBatch:
    """The digit lies on patches 0 and 1, a distractor on 2, and on 3 of the first canvas only.

    Left out are, one after another, patches 0 to 3.
    """
    brightness = torch.tensor([[1.0, 0.5, 1.0, 1.0], [1.0, 1.0, 0.5, 0.0]])
    left_out = brightness[:, None] * (1 - torch.eye(4))  # (2, 4, 4)
    ink = torch.eye(4) * brightness[:, None] > 0.4
    return EvaluationBatch(
        images=in_patches(brightness.tolist())[:, None],
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
# of the two canvases' [CLS] to itself and to the four patches
ATTENTION = torch.tensor([[0.3, 0.4, 0.1, 0.1, 0.1], [0.4, 0.1, 0.3, 0.1, 0.1]])


def test_effects_of_a_network_that_weighs_patches():
    """Its features are (1, a) at the angle atan a; of the first canvas, a = 4 + 1 + 2 + 1 = 8."""
    network = WeighingNetwork(WEIGHTS, ATTENTION)
    effects = explain.observe_effects(network, [batch_of_two_canvases()])
    assert effects.labels.tolist() == [0, 1]
    assert effects.index.tolist() == [5, 6]
    assert effects.has_ink.tolist() == [[True] * 4, [True, True, True, False]]
    assert torch.equal(effects.part_ink[0], 49 * torch.eye(4))
    assert torch.equal(effects.part_ink[1], torch.diag(torch.tensor([49.0, 49.0, 49.0, 0.0])))
    assert effects.canvas_ink.tolist() == [[49, 25, 49, 49], [49, 49, 25, 0]]
    assert effects.pieces == 2

    totals = [8, 7]
    totals_without_patch = [[4, 7, 6, 7], [3, 5, 6, 7]]
    for image in range(2):
        for patch in range(4):
            before = math.atan(totals[image])
            angle = before - math.atan(totals_without_patch[image][patch])
            blackening = effects.blackening[image, patch].item()
            assert blackening == pytest.approx(1 - math.cos(angle), abs=1e-6)
            distance = effects.distances[image, patch].item()
            assert distance == pytest.approx(2 * math.sin(angle / 2), abs=1e-5)


@pytest.mark.parametrize("distractors, pieces", [(0, 1), (1, 1), (3, 3)])
def test_there_are_as_many_pieces_of_the_digit_as_distractors_or_one(distractors, pieces):
    config = config_of(f"--preset laptop --num-distractors {distractors}")
    backbone = small_backbone(pos_size=56)
    batches = views.left_out_batches(config, DIGITS["test"], 2)
    effects = explain.observe_effects(backbone, batches)
    assert effects.pieces == pieces
    assert effects.distances.shape == (2, pieces + distractors)


def test_features_under_another_attention():
    """Of (1, a), multiplied by the attention to [CLS] and to patch 0."""
    network = WeighingNetwork(WEIGHTS, ATTENTION)
    effects = explain.observe_effects(network, [batch_of_two_canvases()])
    true = torch.tensor([[1.0, 8.0], [1.0, 7.0]])
    torch.testing.assert_close(effects.features, F.normalize(true, dim=-1))
    # The patches got 0.7 together on the first canvas, and 0.6 on the second.
    even = true * torch.tensor([[0.3, 0.7 / 4], [0.4, 0.6 / 4]])
    torch.testing.assert_close(effects.even_features, F.normalize(even, dim=-1))
    swapped = true * torch.tensor([[0.4, 0.1], [0.3, 0.4]])
    torch.testing.assert_close(effects.swapped_features, F.normalize(swapped, dim=-1))


def test_registers_keep_their_share_of_an_even_attention():
    network = WeighingNetwork(WEIGHTS)
    network.shape = ViTShape(patch_size=PATCH_SIZE, registers=1)
    even = explain.even_attention(ATTENTION, network)
    expected = torch.tensor([[0.3, 0.4, 0.1, 0.1, 0.1], [0.4, 0.1, 0.5 / 3, 0.5 / 3, 0.5 / 3]])
    torch.testing.assert_close(even, expected)


def test_maps_are_not_faithful_to_a_network_to_which_nothing_matters():
    network = WeighingNetwork([0.0, 0.0, 0.0, 0.0], ATTENTION)
    effects = explain.observe_effects(network, [batch_of_two_canvases()])
    assert (effects.blackening == 0).all()
    maps = torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 2)
    values = metrics.faithfulness(maps, effects)
    assert values["patch_faithfulness"].tolist() == [0, 0]
    assert values["object_faithfulness"][0] == 0


def direct_effects_of(backbone):
    """Direct effects of two canvases and of one blank one, and the whole effects."""
    images = torch.zeros(3, 1, 28, 28, dtype=torch.float64)
    images[:2] = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)).double()
    has_ink = metrics.patch_sums(images[:, 0], PATCH_SIZE) > 0
    features = F.normalize(backbone(views.normalize(images)), dim=-1)
    whole = explain.blackening_effects(backbone, images, has_ink, features)
    return explain.direct_effects(backbone, images, has_ink), whole


@pytest.mark.parametrize("registers", [0, 2])
def test_the_direct_effect_at_the_first_block_is_the_whole_effect(registers):
    direct, whole = direct_effects_of(small_backbone(registers).double())
    assert direct.shape == (3, 3, 16) and (whole[:2] > 0).all()
    torch.testing.assert_close(direct[0], whole)
    assert (direct[:, 2] == 0).all()  # the blank one has no patch to blacken
    assert not torch.allclose(direct[1], whole, rtol=0.01)


def test_everything_is_direct_if_the_first_blocks_mix_nothing():
    backbone = small_backbone().double()
    for block in backbone.blocks[:-1]:
        torch.nn.init.zeros_(block.attn.proj.weight)
    direct, whole = direct_effects_of(backbone)
    torch.testing.assert_close(direct[-1], whole)


def test_nothing_is_direct_if_the_last_block_reads_no_patch():
    backbone = small_backbone().double()
    torch.nn.init.zeros_(backbone.blocks[-1].attn.proj.weight)
    direct, whole = direct_effects_of(backbone)
    assert (whole[:2] > 0).all() and direct[-1].max() < 1e-12 < direct[1].max()


def test_a_patch_without_ink_is_not_blackened():
    """More patches than go through the network at a time, each with an effect of its own."""
    rng = torch.Generator().manual_seed(0)
    backbone = small_backbone()
    images = torch.rand(8, 1, 28, 28, generator=rng)
    has_ink = torch.rand(8, 16, generator=rng) < 0.9
    assert has_ink.sum() > explain.BLACKENED_IMAGES
    _, features = explain.cls_attention(backbone, views.normalize(images))
    effects = explain.blackening_effects(backbone, images, has_ink, features)
    for image in range(8):
        for patch in range(16):
            top = 7 * (patch // 4)
            left = 7 * (patch % 4)
            blackened = images[image].clone()
            blackened[:, top : top + 7, left : left + 7] = 0
            _, feature = explain.cls_attention(backbone, views.normalize(blackened[None]))
            expected = 1 - (feature[0] @ features[image]).item()
            if not has_ink[image, patch]:
                expected = 0
            assert effects[image, patch].item() == pytest.approx(expected, abs=1e-5)


def test_leaving_out_tokens_that_matter_and_tokens_that_do_not():
    """Of ten patches a fifth is two: here the two that weigh most, or two that weigh nothing."""
    network = WeighingNetwork([1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    images = views.normalize(torch.ones(3, 1, 14, 35))  # 2 × 5 patches
    on_what_matters = torch.zeros(3, 10)
    on_what_matters[:, :2] = 0.5
    on_nothing = torch.zeros(3, 10)
    on_nothing[:, 5:7] = 0.5
    rng = torch.Generator().manual_seed(0)
    effects = explain.token_effects(network, images, [on_what_matters, on_nothing], rng, draws=200)
    assert effects.shape == (3, 202)
    without_both = 1 - math.cos(math.atan(3))  # (1, 3) becomes (1, 0)
    expected = torch.tensor([without_both, 0.0]).expand(3, 2)
    torch.testing.assert_close(effects[:, :2], expected, atol=1e-5, rtol=0)

    # Of the 45 pairs of patches one has both that matter, 8 the first only, 8 the second only.
    without_first = 1 - math.cos(math.atan(3) - math.atan(2))
    without_second = 1 - math.cos(math.atan(3) - math.atan(1))
    expected_mean = (without_both + 8 * without_first + 8 * without_second) / 45
    assert effects[:, 2:].mean().item() == pytest.approx(expected_mean, rel=0.1)


def test_token_effects_do_not_depend_on_how_many_images_go_together():
    shape = ViTShape(patch_size=8, dim=32, depth=2, heads=2, pos_size=32)
    torch.manual_seed(0)
    backbone = VisionTransformer(shape).double()
    images = torch.randn(20, 3, 32, 32).double()
    maps = torch.rand(20, 16)
    together = explain.token_effects(backbone, images, [maps], torch.Generator(), draws=3)
    alone = explain.token_effects(backbone, images[:1], [maps[:1]], torch.Generator(), draws=3)
    assert together.shape == (20, 4)
    assert alone.shape == (1, 4)
    torch.testing.assert_close(alone[:, 0], together[:1, 0])
    assert (alone > 0).all()


# ------------------------------------------------------------------------------- a pretended GPU


@pytest.fixture
def pretended_gpu():
    with PretendedGPU(), torch.no_grad():
        yield


@pytest.mark.parametrize("flags", ["--background texture --registers 1", "--dataset stl10"])
def test_evaluation_stays_on_the_gpu(pretended_gpu, flags):
    config = config_of(f"--preset laptop --digits sklearn {flags}")
    backbone = on_pretended_gpu(vit.build_network(config).backbone)
    if config.dataset == "stl10":
        # Photographs stay on the CPU until a batch of them is needed.
        photos = torch.randint(256, (20, 3, 96, 96), dtype=torch.uint8)
        split = Split(photos, torch.arange(20) % 10)
        batch = next(views.evaluation_batches(config, split, 10))
    else:
        split = DIGITS["test"].to("cuda")
        batch = next(views.left_out_batches(config, split, 10))

    images = views.normalize(batch.images.to("cuda"))
    heads, features = explain.cls_attention(backbone, images)
    rollout = explain.rollout(backbone, images)
    assert heads.shape == (10, 3, 64)
    assert features.shape == (10, 96)
    assert rollout.shape == (10, 64)
    rng = torch.Generator().manual_seed(0)
    effects = explain.token_effects(backbone, images, [heads.mean(1), rollout], rng)
    assert effects.shape == (10, 3)
    tensors = [heads, features, rollout, effects]
    if config.dataset != "stl10":
        # Blackening finds patches by their index, which a fake tensor does not have.
        tensors.append(metrics.patch_sums(batch.left_out.masks[:, 0], PATCH_SIZE))
        tensors.append(explain.feature_distance(backbone, batch.left_out.images[:, 0], features))
    assert {tensor.device.type for tensor in tensors} == {"cuda"}
