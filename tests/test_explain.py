"""Maps of networks for which they can be computed by hand, or in a second way."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import DIGITS, PretendedGPU, config_of, on_pretended_gpu

import explain
import metrics
import views
import vit
import weights
from data import Split
from vit import VisionTransformer, ViTShape

ALL_MAPS = sorted(explain.MAPS)
NETWORK_MAPS = sorted(explain.NETWORK_MAPS)


def small_backbone(**changes) -> VisionTransformer:
    """A ViT of three blocks for images of 28 × 28 pixels, which have 4 × 4 patches.

    Its random weights are large enough for attention that is far from uniform.
    """
    torch.manual_seed(0)
    shape = ViTShape(patch_size=7, dim=24, depth=3, heads=3, pos_size=28)
    return VisionTransformer(replace(shape, **changes), init_std=0.0)


def pictures(count: int, height: int = 28, width: int = 28, channels: int = 3, seed: int = 0):
    """Images of random pixels in [0, 1]."""
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, height, width, generator=rng)


# -------------------------------------------------------------------------------------- every map


@pytest.mark.parametrize("name", ALL_MAPS)
@pytest.mark.parametrize(
    "changes, height, width, channels",
    [
        ({}, 28, 28, 1),
        ({"registers": 2}, 28, 28, 3),
        ({"depth": 1}, 28, 28, 3),
        ({"depth": 1, "heads": 1, "registers": 1}, 7, 21, 1),
        ({}, 21, 63, 3),  # 3 × 9 patches, where positions are stored for 4 × 4
        ({"pos_size": (14, 35)}, 14, 35, 1),
        ({}, 7, 7, 3),  # a single patch
    ],
)
def test_a_map_is_a_distribution_over_patches(name, changes, height, width, channels):
    images = pictures(3, height, width, channels)
    maps = explain.MAPS[name](small_backbone(**changes), images)
    patches = (height // 7) * (width // 7)
    assert maps.shape == (3, patches)
    assert not maps.requires_grad
    assert (maps >= 0).all()
    torch.testing.assert_close(maps.sum(-1).float(), torch.ones(3))


@pytest.mark.parametrize("name", ALL_MAPS)
def test_a_map_depends_on_its_image_and_not_on_the_batch(name):
    backbone = small_backbone(registers=1)
    images = pictures(5) * torch.linspace(0.2, 1, 5).view(5, 1, 1, 1)
    maps = explain.MAPS[name](backbone, images)
    alone = torch.cat([explain.MAPS[name](backbone, image[None]) for image in images])
    reversed_maps = explain.MAPS[name](backbone, images.flip(0)).flip(0)
    torch.testing.assert_close(alone, maps, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(reversed_maps, maps, atol=1e-6, rtol=1e-4)
    if name != "centre":
        assert (maps[0] - maps[1]).abs().max() > 1e-4  # other images have other maps


@pytest.mark.parametrize("name", ALL_MAPS)
@pytest.mark.parametrize("grey", [0.0, 0.3, 1.0])
def test_an_image_of_one_grey_level_has_a_map(name, grey):
    maps = explain.MAPS[name](small_backbone(), torch.full((2, 3, 28, 28), grey))
    assert maps.isfinite().all()
    torch.testing.assert_close(maps.sum(-1).float(), torch.ones(2))
    if name in ("brightness", "contrast"):
        torch.testing.assert_close(maps.float(), torch.full((2, 16), 1 / 16))


def test_values_are_divided_by_their_sum():
    values = [[1.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]]
    maps = explain.normalize_rows(torch.tensor(values))
    assert maps.tolist() == [[0.25, 0.75, 0, 0], [0.25, 0.25, 0.25, 0.25], [0, 1, 0, 0]]


def test_what_is_not_a_number_is_not_taken_for_a_map():
    values = torch.tensor([[torch.nan, 1.0], [torch.inf, 1.0], [0.0, 0.0]])
    is_nan = explain.normalize_rows(values).isnan().any(-1)
    assert is_nan.tolist() == [True, True, False]


@pytest.mark.parametrize("name", NETWORK_MAPS)
def test_maps_of_weights_that_are_nan_are_nan(name):
    backbone = small_backbone()
    with torch.no_grad():
        backbone.blocks[1].attn.qkv.weight[0, 0] = torch.nan
    assert explain.MAPS[name](backbone, pictures(2)).isnan().all()


@pytest.mark.parametrize("name", NETWORK_MAPS)
def test_a_map_takes_the_passes_that_are_said_of_it(name):
    backbone = small_backbone()
    counts = {"forward": 0, "backward": 0}

    def count_forward(module, inputs, output):
        counts["forward"] += 1

    def count_backward(module, grad_input, grad_output):
        counts["backward"] += 1

    backbone.patch_embed.register_forward_hook(count_forward)
    backbone.blocks[0].register_full_backward_hook(count_backward)
    explain.MAPS[name](backbone, pictures(2))
    number, direction = explain.PASSES[name].split()
    assert counts[direction] == int(number)
    assert counts["forward"] == 1


def test_weights_saved_in_bfloat16_give_finite_maps(tmp_path):
    state = small_backbone(dim=64, heads=1, depth=2).state_dict()
    path = tmp_path / "bfloat16.pth"
    torch.save({name: value.bfloat16() for name, value in state.items()}, path)
    backbone = weights.load_backbone(str(path)).backbone
    for name in NETWORK_MAPS:
        maps = explain.MAPS[name](backbone, pictures(2))
        assert maps.dtype == torch.float32, name
        assert maps.isfinite().all(), name
        torch.testing.assert_close(maps.sum(-1), torch.ones(2))


# --------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("registers", [0, 2])
def test_attention_to_patches_leaves_out_cls_and_registers(registers):
    backbone = small_backbone(registers=registers)
    images = pictures(2)
    heads, features = explain.cls_attention(backbone, images)
    assert heads.shape == (2, 3, 16)
    torch.testing.assert_close(heads.sum(-1), torch.ones(2, 3))
    normalized = views.normalize(images)
    to_all_tokens = backbone.get_last_selfattention(normalized)[:, :, 0]
    to_patches = to_all_tokens[..., 1 + registers :]
    torch.testing.assert_close(heads * to_patches.sum(-1, keepdim=True), to_patches)
    torch.testing.assert_close(features, F.normalize(backbone(normalized), dim=-1))
    torch.testing.assert_close(explain.attention(backbone, images), heads.mean(1))


@pytest.mark.parametrize("registers", [0, 2])
def test_every_token_has_an_attention(registers):
    """In each block, as the blocks one after the other give it; each row without [CLS] and registers."""
    backbone = small_backbone(registers=registers)
    images = pictures(2)
    others = 1 + registers
    of_tokens, of_patches = explain.token_attention(backbone, images)
    assert of_tokens.shape == (2, 3, 3, others, 16)
    assert of_patches.shape == (2, 3, 16, 16)
    with torch.no_grad():
        x = backbone.prepare_tokens(views.normalize(images))
        for number, block in enumerate(backbone.blocks):
            q, k, _ = block.attn.queries_keys_values(block.norm1(x))
            attention = vit.attention_matrix(q, k)[..., others:]
            expected = attention / attention.sum(-1, keepdim=True)
            torch.testing.assert_close(of_tokens[:, number], expected[:, :, :others])
            x = block(x)
    torch.testing.assert_close(of_patches, expected[:, :, others:])
    heads, _ = explain.cls_attention(backbone, images)
    torch.testing.assert_close(of_tokens[:, -1, :, 0], heads)


@pytest.mark.parametrize("block, token", [(0, 0), (1, 2), (-1, 5), (-2, 18)])
def test_any_token_may_be_asked_in_any_block(block, token):
    """Attention, rollouts and heads of a token, by products of the blocks' whole matrices."""
    backbone = small_backbone(registers=2)
    images = pictures(2)
    x = backbone.prepare_tokens(views.normalize(images)).detach()
    mixtures = {"rollout": torch.eye(19), "norm_rollout": torch.eye(19)}
    with torch.no_grad():
        for number, of_block in enumerate(backbone.blocks):
            q, k, _ = of_block.attn.queries_keys_values(of_block.norm1(x))
            attention = vit.attention_matrix(q, k)
            mean = attention.mean(1)
            mixtures["rollout"] = (mean + torch.eye(19)) / 2 @ mixtures["rollout"]
            norms = explain.passed_on_norms(of_block, x, None)
            norms = norms / norms.sum(-1, keepdim=True)
            mixtures["norm_rollout"] = norms @ mixtures["norm_rollout"]
            x = of_block(x)
            if number == block % 3:
                break
    heads = explain.head_attention(backbone, images, block, token)
    to_patches = attention[:, :, token, 3:]
    torch.testing.assert_close(heads, to_patches / to_patches.sum(-1, keepdim=True))
    torch.testing.assert_close(explain.attention(backbone, images, block, token), heads.mean(1))
    for name, mixture in mixtures.items():
        expected = mixture[:, token, 3:]
        found = explain.TOKEN_MAPS[name](backbone, images, block, token)
        torch.testing.assert_close(found, expected / expected.sum(-1, keepdim=True))


def test_random_directions_are_unit_vectors_and_always_the_same():
    directions = explain.random_directions(24)
    assert directions.shape == (16, 24)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(16))
    assert torch.equal(directions[:3], explain.random_directions(24, 3))
    assert (directions @ directions.T).fill_diagonal_(0).abs().max() < 0.8


@pytest.mark.parametrize("registers", [0, 2])
def test_rollout_is_a_product_of_matrices(registers):
    """As Abnar & Zuidema write it: ½ · attention + ½ · I of each block, one times the other."""
    backbone = small_backbone(registers=registers)
    images = pictures(2)
    x = backbone.prepare_tokens(views.normalize(images))
    product = torch.eye(x.shape[1])
    for block in backbone.blocks:
        q, k, _ = block.attn.queries_keys_values(block.norm1(x))
        attention = (q @ k.mT / math.sqrt(24 / 3)).softmax(-1).mean(1)
        product = (attention + torch.eye(x.shape[1])) / 2 @ product
        x = block(x)
    to_patches = product[:, 0, 1 + registers :]
    expected = to_patches / to_patches.sum(-1, keepdim=True)
    torch.testing.assert_close(explain.rollout(backbone, images), expected)


@pytest.mark.parametrize("registers", [0, 2])
def test_norm_rollout_is_what_tokens_pass_on(registers):
    """As Kobayashi et al. write it, with a vector for each pair of tokens, in float64."""
    backbone = small_backbone(registers=registers).double()
    images = pictures(2).double()
    x = backbone.prepare_tokens(views.normalize(images))
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


def test_rollout_of_one_block_is_its_attention():
    """½ · attention + ½ · I differs from attention only in what [CLS] gives itself."""
    backbone = small_backbone(depth=1)
    images = pictures(2)
    to_patches = backbone.get_last_selfattention(views.normalize(images))[:, :, 0, 1:].mean(1)
    expected = to_patches / to_patches.sum(-1, keepdim=True)
    torch.testing.assert_close(explain.rollout(backbone, images), expected)


def test_norm_rollout_of_a_network_that_passes_nothing_on_is_uniform():
    backbone = small_backbone()
    for block in backbone.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
    maps = explain.norm_rollout(backbone, pictures(2))
    torch.testing.assert_close(maps, torch.full((2, 16), 1 / 16))


# --------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [{}, {"registers": 2}, {"rotary": True, "registers": 1}], ids=str)
def test_squared_gradients_are_those_of_the_pixels(channels, shape):
    """Computed here by a backward pass down to the pixels, a direction at a time."""
    backbone = small_backbone(**shape).double()
    images = pictures(2, 28, 42).double()[:, :channels].requires_grad_()
    features = F.normalize(backbone(views.normalize(images)), dim=-1)
    expected = 0
    for direction in explain.random_directions(features.shape[1], 3):
        projected = (features @ direction.double()).sum()
        (gradient,) = torch.autograd.grad(projected, images, retain_graph=True)
        expected = expected + metrics.patch_sums(gradient.square().sum(1), 7)
    found = explain.sum_squared_gradients(backbone, images.detach(), directions=3)
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-9)


def test_squared_gradients_of_a_constant_feature_are_uniform():
    backbone = small_backbone()
    torch.nn.init.zeros_(backbone.norm.weight)
    torch.nn.init.ones_(backbone.norm.bias)
    maps = explain.squared_gradient(backbone, pictures(3))
    assert torch.equal(maps, torch.full((3, 16), 1 / 16))


def test_squared_gradients_estimate_the_norm_of_the_jacobian():
    """The Jacobian is that of the L2-normalized feature with respect to the pixels."""
    backbone = small_backbone(dim=6).double()
    torch.nn.init.normal_(backbone.norm.weight)  # so that features differ in length
    torch.nn.init.normal_(backbone.norm.bias)
    images = pictures(1).double()

    def feature(images):
        return F.normalize(backbone(views.normalize(images)), dim=-1)[0]

    jacobian = torch.autograd.functional.jacobian(feature, images)[:, 0]  # (dim, 3, 28, 28)
    squares = jacobian.square().sum((0, 1)).view(1, 28, 28)
    expected = explain.normalize_rows(metrics.patch_sums(squares, 7))
    estimate = explain.squared_gradient(backbone, images, directions=500)
    torch.testing.assert_close(estimate, expected, atol=0, rtol=0.2)
    few_directions = explain.squared_gradient(backbone, images)
    assert metrics.spearman(few_directions, expected, expected > 0).item() > 0.8


def test_the_cosine_of_a_feature_with_itself_has_no_gradient():
    """So there is no gradient map without a target from outside."""
    backbone = small_backbone().double()
    images = pictures(2).double().requires_grad_()
    features = F.normalize(backbone(views.normalize(images)), dim=-1)
    cosines = (features * features.detach()).sum(-1)
    (of_cosine,) = torch.autograd.grad(cosines.sum(), images, retain_graph=True)
    (of_one_number,) = torch.autograd.grad(features[:, 0].sum(), images)
    assert of_cosine.abs().max() < 1e-12 * of_one_number.abs().max()
    assert (explain.sum_squared_gradients(backbone, images, directions=1) > 0).all()


@pytest.mark.parametrize("tokens", [1, 16, 40, 16 * 7])
def test_squared_gradients_in_pieces_are_those_at_once(monkeypatch, tokens):
    """Of 7 images with 16 patches, 1, 1, 2 or 7 are in a piece."""
    backbone = small_backbone()
    images = pictures(7)
    at_once = explain.squared_gradient(backbone, images)
    pieces = []
    backbone.patch_embed.register_forward_hook(lambda _, inputs, __: pieces.append(len(inputs[0])))
    monkeypatch.setattr(explain, "PATCHES_PER_BACKWARD", tokens)
    torch.testing.assert_close(explain.squared_gradient(backbone, images), at_once)
    assert max(pieces) == max(1, tokens // 16)
    assert sum(pieces) == 7


def test_squared_gradients_do_not_depend_on_what_surrounds_them():
    """Neither on gradients being off, nor on activations being recomputed, nor on a seed."""
    backbone = small_backbone()
    images = pictures(2)
    maps = explain.squared_gradient(backbone, images)
    with torch.no_grad():
        assert torch.equal(explain.squared_gradient(backbone, images), maps)
    torch.manual_seed(7)
    assert torch.equal(explain.squared_gradient(backbone, images), maps)
    backbone.checkpoint_blocks = True
    torch.testing.assert_close(explain.squared_gradient(backbone, images), maps)
    more = explain.squared_gradient(backbone, images, directions=64)
    assert not torch.equal(more, maps)


def test_gradient_maps_leave_network_and_images_as_they_were():
    backbone = small_backbone()
    images = pictures(2)
    before = images.clone()
    explain.sum_squared_gradients(backbone, images, directions=1)
    assert torch.equal(images, before)
    assert not images.requires_grad
    assert all(parameter.grad is None for parameter in backbone.parameters())


# ---------------------------------------------------------------------------------------- controls

# A control reads nothing of a network but the side of a patch.
PATCH_OF_TWO = SimpleNamespace(shape=ViTShape(patch_size=2))


def grid_of_patches(rows: int, columns: int):
    """Images without content, of this many patches of 2 × 2 pixels."""
    return torch.zeros(2, 3, 2 * rows, 2 * columns)


def test_brightness_by_hand():
    """The means of the channels, summed over the patches, are 1, 3, 0 and 4."""
    image = torch.zeros(1, 3, 2, 8)
    image[0, 1, 0, 0:2] = 1  # two pixels of green, which are a third as bright as white
    image[0, 2, 1, 1] = 1
    image[0, :, 0, 2:4] = 1  # two pixels of white and two of grey
    image[0, :, 1, 2:4] = 0.5
    image[0, :, :, 6:8] = 1
    maps = explain.brightness(PATCH_OF_TWO, image)
    torch.testing.assert_close(maps, torch.tensor([[1.0, 3.0, 0.0, 4.0]]) / 8)


def test_contrast_by_hand():
    """Half white is ½, half grey is ¼, one white pixel of four is √3 / 4, and all grey is 0."""
    image = torch.zeros(1, 3, 2, 8)
    image[0, :, :, 0] = 1
    image[0, :, :, 2] = 0.5
    image[0, :, 0, 4] = 1
    image[0, :, :, 6:8] = 0.5
    maps = explain.contrast(PATCH_OF_TWO, image)
    deviations = torch.tensor([[1 / 2, 1 / 4, math.sqrt(3) / 4, 0]])
    torch.testing.assert_close(maps.float(), deviations / deviations.sum())


def test_contrast_is_that_of_grey_levels():
    """Beside black, red has a third of the contrast of white; beside green it has none."""
    image = torch.zeros(1, 3, 2, 6)
    image[0, 0, :, 0] = 1
    image[0, 1, :, 1] = 1
    image[0, 0, :, 2] = 1
    image[0, :, :, 4] = 1
    maps = explain.contrast(PATCH_OF_TWO, image)
    expected = torch.tensor([[0.0, 0.25, 0.75]])
    torch.testing.assert_close(maps.float(), expected, atol=1e-3, rtol=0)


def test_flat_patches_have_no_contrast_whatever_their_grey_levels():
    levels = pictures(1, 2, 8, channels=1)
    image = levels.repeat_interleave(7, -1).repeat_interleave(7, -2)
    image[0, 0, :7, :7] = pictures(1, 7, 7, channels=1)[0, 0]
    maps = explain.contrast(small_backbone(), image)
    assert maps[0, 0] > 1 - 1e-6
    assert maps[0, 1:].max() < 1e-6


@pytest.mark.parametrize("rows, columns", [(5, 5), (4, 4), (3, 8), (7, 2), (1, 6)])
def test_centre_is_symmetric_and_highest_in_the_middle(rows, columns):
    maps = explain.centre(PATCH_OF_TWO, grid_of_patches(rows, columns))
    assert torch.equal(maps[0], maps[1])
    grid = maps[0].view(rows, columns)
    torch.testing.assert_close(grid.flip(0), grid)
    torch.testing.assert_close(grid.flip(1), grid)
    assert grid[rows // 2, columns // 2] == grid.max()
    # it falls towards the rim along both sides, until it is too little for float32
    assert (grid[rows // 2 :].diff(dim=0) < 0).all()
    falling = grid[:, columns // 2 :].diff(dim=1)
    assert ((falling < 0) | (grid[:, columns // 2 + 1 :] == 0)).all()


def test_centre_by_hand():
    """A step off the middle divides it by exp(1 / (2 σ²)), with σ a quarter of the shorter side."""
    grid = explain.centre(PATCH_OF_TWO, grid_of_patches(5, 9))[0].view(5, 9)
    one_step = math.exp(-1 / (2 * (5 / 4) ** 2))
    assert (grid[2, 5] / grid[2, 4]).item() == pytest.approx(one_step)
    assert (grid[1, 4] / grid[2, 4]).item() == pytest.approx(one_step)
    assert (grid[1, 6] / grid[2, 4]).item() == pytest.approx(one_step**5)


def test_random_is_uniform_noise_that_nothing_predicts():
    """On 40 images of 16 × 16 patches, beside the other controls, its neighbour, another image."""
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(40, 1, 32, 32, generator=rng) * torch.rand(40, 1, 1, 1, generator=rng)
    maps = explain.random(PATCH_OF_TWO, images)
    relative = maps * 256  # with the mean 1
    assert relative.std().item() == pytest.approx(math.sqrt(1 / 3), abs=0.02)
    assert 1.9 < relative.max() < 2.5
    assert len(maps.unique(dim=0)) == 40  # each image has its own

    everywhere = torch.ones(40, 256, dtype=torch.bool)
    grid = maps.view(40, 16, 16)
    position = torch.arange(256.0).expand(40, -1)
    others = {
        "brightness": explain.brightness(PATCH_OF_TWO, images),
        "contrast": explain.contrast(PATCH_OF_TWO, images),
        "centre": explain.centre(PATCH_OF_TWO, images),
        "position": position,
        "patch to the left": grid.roll(1, 2).flatten(1),
        "patch above": grid.roll(1, 1).flatten(1),
        "another image": maps.roll(1, 0),
    }
    for name, other in others.items():
        correlation = metrics.spearman(maps, other.to(maps), everywhere).mean().item()
        assert abs(correlation) < 0.05, name  # its standard error is 1 / √(40 · 256) = 0.01


# --------------------------------------------------------------------------------- a pretended GPU


# Of the maps of networks, squared_gradient needs gradients, which a pretended GPU does not have.
ON_GPU = ["attention", "rollout", "norm_rollout"]
ON_GPU += sorted(explain.CONTROLS)


@pytest.mark.parametrize("name", ON_GPU)
@pytest.mark.parametrize("flags", ["--background texture --registers 1", "--dataset stl10"])
def test_maps_stay_on_the_gpu(name, flags):
    config = config_of(f"--preset laptop --digits sklearn {flags}")
    with PretendedGPU(), torch.no_grad():
        backbone = on_pretended_gpu(vit.build_network(config).backbone)
        if config.dataset == "stl10":
            # Photographs stay on the CPU until a batch of them is needed.
            photos = torch.randint(256, (20, 3, 96, 96), dtype=torch.uint8)
            split = Split(photos, torch.arange(20) % 10)
        else:
            split = DIGITS["test"].to("cuda")
        batch = next(views.evaluation_batches(config, split, 10))
        maps = explain.MAPS[name](backbone, batch.images.to("cuda"))
    assert maps.shape == (10, 64)
    assert maps.device.type == "cuda"
