"""The network gives the numbers of facebookresearch/dino, and its parameters have DINO's names."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import SHIPPED, config_of, start
from torch import nn

import effects
import explain
import settings
import views
import vit
import weights
from vit import HeadShape, ProjectionHead, VisionTransformer, ViTShape

# --------------------------------------------------------------------- what several tests need


def small_backbone(**changes) -> VisionTransformer:
    """A ViT with random weights, for images of 28 × 28 pixels, which have 4 × 4 patches."""
    torch.manual_seed(0)
    shape = ViTShape(patch_size=7, dim=24, depth=2, heads=3, pos_size=28)
    return VisionTransformer(dataclasses.replace(shape, **changes))


def small_head(**changes) -> ProjectionHead:
    """A head for features of width 24, with 10 prototypes."""
    torch.manual_seed(0)
    shape = HeadShape(out_dim=10, hidden_dim=16, layers=3, bottleneck_dim=8, norm=False)
    return ProjectionHead(24, dataclasses.replace(shape, **changes))


def noise(*shape: int, seed: int = 0):
    """Normal noise, float32, the same on every machine and version."""
    rng = np.random.RandomState(seed)  # numpy's legacy stream is frozen
    return torch.from_numpy(rng.standard_normal(shape)).float()


def random_direction(seed: int, size: int):
    """A random vector (size,) of length about 1, float64, the same on every machine and version."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(size)) / size**0.5


# ------------------------------------------------------------------------------- DINO's numbers


def seeded_weights(network: nn.Module) -> dict:
    """Weights for all parameters, the same on every machine and version."""
    rng = np.random.RandomState(0)
    state = {}
    for name, parameter in network.state_dict().items():
        noise = torch.from_numpy(rng.standard_normal(tuple(parameter.shape)).astype(np.float32))
        if name == "pos_embed":
            state[name] = 0.5 * noise
        elif "qkv.weight" in name:
            state[name] = 0.07 * noise
        elif "norm" in name and name.endswith("weight"):
            state[name] = 1 + 0.05 * noise
        else:
            state[name] = 0.05 * noise
    return state


@pytest.fixture(scope="module")
def vit_small() -> VisionTransformer:
    """The paper's ViT-S/8."""
    network = VisionTransformer()
    network.load_state_dict(seeded_weights(network), strict=True)
    return network.eval()


@dataclasses.dataclass
class DinoOutputs:
    """What facebookresearch/dino's vision_transformer.py gives for `seeded_weights` and an image.

    Recorded once, from torch 2.15 on a CPU.
    """

    seed: int  # of the image
    height: int
    width: int
    feature: list[float]  # the feature of [CLS], projected onto four random directions
    cls_rows: list[float]  # each head's attention of [CLS], projected onto a random direction
    all_rows: list[float]  # each head's attention of all tokens, projected on both sides


DINO_OUTPUTS = [
    DinoOutputs(
        seed=0,
        height=224,
        width=224,
        feature=[-0.150242, -1.784282, -0.765335, 1.137927],
        cls_rows=[0.0048521, 0.0013946, 0.0037134, 0.002393, 0.0045535, 0.0047371],
        all_rows=[-0.0001739, -0.0007812, -0.0003375, -8.79e-05, -0.0011029, -0.000207],
    ),
    DinoOutputs(
        seed=1,
        height=112,
        width=112,
        feature=[0.010489, -2.027537, -0.629411, 1.457211],
        cls_rows=[0.0180554, 0.0143162, 0.020309, -0.0005229, 0.0064363, 0.0011639],
        all_rows=[0.0020923, -0.005943, 0.0051759, 0.0045602, 0.0027555, -0.0035697],
    ),
    DinoOutputs(
        seed=2,
        height=96,
        width=160,
        feature=[-0.298704, -1.811566, -0.722147, 0.602407],
        cls_rows=[0.012376, 0.0062016, 0.0068154, -6.65e-05, 0.003651, 0.0075773],
        all_rows=[0.0070136, 0.0033805, 0.0028455, 0.0140134, -0.0023843, 0.0071342],
    ),
]


@pytest.mark.parametrize("expected", DINO_OUTPUTS, ids=lambda dino: f"{dino.height}x{dino.width}")
def test_feature_and_last_attention_are_those_of_dino(vit_small, expected):
    images = noise(1, 3, expected.height, expected.width, seed=expected.seed)
    with torch.no_grad():
        feature = vit_small(images)[0].double()
        attention = vit_small.get_last_selfattention(images)[0].double()  # (heads, N, N)
        cls_rows = vit_small.get_last_selfattention(images, num_queries=1)[0, :, 0].double()
    tokens = attention.shape[-1]
    assert tokens == 1 + (expected.height // 8) * (expected.width // 8)

    directions = torch.stack([random_direction(100 + number, 384) for number in range(4)])
    right = random_direction(109, tokens)
    left = random_direction(110, tokens)
    np.testing.assert_allclose(directions @ feature, expected.feature, atol=1e-5)
    np.testing.assert_allclose(cls_rows @ right, expected.cls_rows, atol=1e-6)
    np.testing.assert_allclose(left @ attention @ right, expected.all_rows, atol=1e-6)
    np.testing.assert_allclose(attention.sum(-1), 1, atol=1e-5)


def test_parameter_names_and_their_count_are_those_of_dino(vit_small):
    state = vit_small.state_dict()
    assert sum(parameter.numel() for parameter in state.values()) == 21_670_272
    names = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    for block in range(12):
        for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            names += [f"blocks.{block}.{layer}.weight", f"blocks.{block}.{layer}.bias"]
    names += ["norm.weight", "norm.bias"]
    assert list(state) == names


# ---------------------------------------------------------------------------------- the backbone


@pytest.mark.parametrize("height,width", [(28, 28), (35, 63), (84, 84)])
def test_images_may_have_any_size_that_the_patch_divides(height, width):
    backbone = small_backbone()
    images = noise(2, 3, height, width)
    tokens = 1 + (height // 7) * (width // 7)
    assert backbone(images).shape == (2, 24)
    assert backbone.get_last_selfattention(images).shape == (2, 3, tokens, tokens)


def test_a_stored_grid_need_not_be_square():
    backbone = small_backbone(pos_size=(14, 35))
    assert backbone.grid == (2, 5)
    positions = backbone.interpolate_pos_encoding((2, 5))
    assert torch.equal(positions, backbone.pos_embed[:, 1:])
    assert backbone(noise(1, 3, 14, 35)).shape == (1, 24)


def test_tokens_are_cls_then_registers_then_patches_row_by_row():
    backbone = small_backbone(registers=2)
    images = noise(2, 3, 28, 28)
    tokens = backbone.prepare_tokens(images)
    assert tokens.shape == (2, 1 + 2 + 16, 24)
    cls = backbone.cls_token[0, 0] + backbone.pos_embed[0, 0]
    torch.testing.assert_close(tokens[:, 0], cls.expand(2, -1))
    torch.testing.assert_close(tokens[:, 1:3], backbone.register_tokens.expand(2, -1, -1))

    # the patch in the second row and the third column
    pixels = images[:, :, 7:14, 14:21].flatten(1)
    projection = backbone.patch_embed.proj
    patch = pixels @ projection.weight.flatten(1).T + projection.bias + backbone.pos_embed[0, 7]
    torch.testing.assert_close(tokens[:, 3 + 6], patch, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("antialias", [False, True])
def test_positions_are_interpolated_over_rows_and_columns(antialias):
    """If a position is the number of its column, so it is on a finer grid, in every row."""
    backbone = small_backbone(antialias=antialias)
    with torch.no_grad():
        columns = torch.arange(4.0).expand(4, 4).flatten()
        backbone.pos_embed[0, 1:] = columns[:, None]
    positions = backbone.interpolate_pos_encoding((6, 8)).unflatten(1, (6, 8))
    first_row = positions[0, 0, :, 0]
    torch.testing.assert_close(positions, first_row[:, None].expand(1, 6, 8, 24))
    assert (first_row.diff() > 0).all()
    assert first_row[3:5].mean().item() == pytest.approx(1.5, abs=0.05)  # the middle


def test_antialiasing_averages_positions_over_a_coarser_grid():
    """Positions that alternate between -1 and 1 then come near 0."""
    largest = {}
    for antialias in (False, True):
        backbone = small_backbone(pos_size=7 * 16, antialias=antialias)
        with torch.no_grad():
            backbone.pos_embed[0, 1:] = torch.tensor([-1.0, 1.0]).repeat(128)[:, None]
        largest[antialias] = backbone.interpolate_pos_encoding((5, 5)).abs().max().item()
    assert largest[False] > 0.5
    assert largest[True] < 0.1


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="--heads 5: use a divisor of the width 24"):
        small_backbone(heads=5)
    with pytest.raises(ValueError, match="--image-size 30: use a multiple of the patch size 7"):
        small_backbone(pos_size=30)
    with pytest.raises(ValueError, match="image size 60×56 is not a multiple of the patch size 7"):
        small_backbone()(torch.zeros(1, 3, 60, 56))


@pytest.mark.parametrize("init_std,qkv_std,fc2_std", [(0.02, 0.02, 0.02), (0.0, 1 / 8, 1 / 16)])
def test_standard_deviation_of_the_initial_weights(init_std, qkv_std, fc2_std):
    """With `init_std` 0 it is 1/√inputs, and here these are 64 and 256."""
    torch.manual_seed(0)
    shape = ViTShape(patch_size=8, dim=64, depth=1, heads=1, pos_size=32)
    block = VisionTransformer(shape, init_std).blocks[0]
    assert block.attn.qkv.weight.std().item() == pytest.approx(qkv_std, rel=0.1)
    assert block.mlp.fc2.weight.std().item() == pytest.approx(fc2_std, rel=0.1)
    assert block.attn.qkv.bias.abs().max() == 0


def test_gradient_reaches_every_parameter():
    network = nn.Sequential(small_backbone(registers=2), small_head())
    network(noise(2, 3, 28, 28)).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_patches_are_known_by_their_positions_and_not_by_their_order():
    backbone = small_backbone(registers=1)
    images = noise(2, 3, 28, 28)
    order = torch.stack([torch.randperm(16) for _ in range(2)])
    torch.testing.assert_close(backbone(images, order), backbone(images))


def test_patches_that_are_left_out_leave_no_trace():
    backbone = small_backbone(registers=1)
    images = noise(2, 3, 28, 28)
    order = torch.stack([torch.randperm(16) for _ in range(2)])
    keep = order[:, :10]
    left_out = order[:, 10:]

    changed_images = images.clone()
    for image, patches in zip(changed_images, left_out):
        for patch in patches.tolist():
            row = 7 * (patch // 4)
            column = 7 * (patch % 4)
            image[:, row : row + 7, column : column + 7] = 9
    torch.testing.assert_close(backbone(changed_images, keep), backbone(images, keep))
    assert not torch.allclose(backbone(images, keep), backbone(images), atol=1e-3)


def test_what_the_first_token_collects_is_that_of_all_queries_keys_and_values():
    """With the gradient of everything that takes part."""
    torch.manual_seed(0)
    layer = vit.Attention(24, heads=3).double()
    nn.init.normal_(layer.qkv.bias)
    x = noise(5, 17, 24).double().requires_grad_()
    q, k, v = layer.queries_keys_values(x)
    plain = layer.proj((vit.attention_matrix(q, k) @ v).transpose(1, 2).flatten(2))
    first = layer(x, num_queries=1)
    assert first.shape == (5, 1, 24)
    torch.testing.assert_close(first, plain[:, :1])
    weight = noise(5, 24).double()
    inputs = [x, *layer.parameters()]
    expected = torch.autograd.grad((plain[:, 0] * weight).sum(), inputs)
    gradients = torch.autograd.grad((first[:, 0] * weight).sum(), inputs)
    torch.testing.assert_close(gradients, expected)


def test_attention_in_bfloat16_is_that_of_float32():
    """On a CPU it is computed in another way."""
    torch.manual_seed(0)
    layer = vit.Attention(24, heads=3)
    nn.init.normal_(layer.qkv.weight, std=0.5)  # far from uniform attention
    x = noise(2, 17, 24)
    expected = layer(x)
    error = layer.bfloat16()(x.bfloat16()) - expected
    assert error.norm() < 0.03 * expected.norm()


# ------------------------------------------------------------------------------- rotary positions


def rotary_backbone(**changes) -> VisionTransformer:
    """A ViT with rotary positions and attention that is far from uniform; heads are 8 wide."""
    shape = {"rotary": True, "norm_eps": 1e-5, "registers": 2, "depth": 3}
    backbone = small_backbone(**shape | changes)
    with torch.no_grad():
        for block in backbone.blocks:
            block.attn.qkv.weight.copy_(noise(72, 24, seed=1) / 4)
            block.attn.qkv.bias.copy_(noise(72, seed=2))
            block.attn.proj.weight.copy_(noise(24, 24, seed=3) / 4)
        backbone.patch_embed.proj.weight.mul_(4)
    return backbone


@dataclasses.dataclass
class Traced:
    """What `trace` saw."""

    feature: torch.Tensor  # of [CLS], (dim,)
    attentions: list[torch.Tensor]  # of each block, (heads, N, N)
    inputs: list[torch.Tensor]  # of each block, (N, dim)
    passed_on: list[torch.Tensor]  # to token i from j, in each block: (N, N, dim)


def trace(backbone: VisionTransformer, image, left_out=(), at_block: int = 0) -> Traced:
    """A rotary network computed in a second way: one image, one head at a time, complex numbers.

    The patches `left_out` are deleted from the input of a block. Every token carries the angles of
    its own row and column with it.
    """
    patch = backbone.shape.patch_size
    rows, columns = image.shape[-2] // patch, image.shape[-1] // patch
    d = backbone.shape.dim // backbone.shape.heads
    periods = [100 ** (2 * i / (d / 2)) for i in range(d // 4)]
    tokens = [(backbone.cls_token[0, 0], torch.zeros(d // 2), None)]
    for register in backbone.register_tokens[0]:
        tokens.append((register, torch.zeros(d // 2), None))
    projection = backbone.patch_embed.proj
    for row in range(rows):
        for column in range(columns):
            pixels = image[:, row * patch :, column * patch :][:, :patch, :patch].flatten()
            token = projection.weight.flatten(1) @ pixels + projection.bias
            centre = (2 * (row + 0.5) / rows - 1, 2 * (column + 0.5) / columns - 1)
            angles = [2 * math.pi * side / period for side in centre for period in periods]
            tokens.append((token, torch.tensor(angles), row * columns + column))

    x = torch.stack([token for token, _, _ in tokens])
    angles = torch.stack([angle for _, angle, _ in tokens])
    numbers = [number for _, _, number in tokens]
    traced = Traced(x, [], [], [])
    for index, block in enumerate(backbone.blocks):
        if index == at_block and len(left_out):
            stay = [position for position, number in enumerate(numbers) if number not in left_out]
            x = x[stay]
            angles = angles[stay]
        traced.inputs.append(x)
        q, k, v = (block.norm1(x) @ block.attn.qkv.weight.T + block.attn.qkv.bias).chunk(3, -1)
        turn = torch.polar(torch.ones_like(angles), angles)
        given = torch.zeros(len(x), len(x), x.shape[-1])
        attentions = []
        for head in range(backbone.shape.heads):
            own = slice(head * d, (head + 1) * d)
            turned = []
            for values in (q[:, own], k[:, own]):
                first, second = values.chunk(2, -1)
                turned.append(torch.complex(first, second) * turn)
            products = (turned[0][:, None] * turned[1][None].conj()).real.sum(-1)
            attention = (products / d**0.5).softmax(-1)
            attentions.append(attention)
            out = v[:, own] @ block.attn.proj.weight[:, own].T
            given = given + attention[..., None] * out[None]
        traced.attentions.append(torch.stack(attentions))
        traced.passed_on.append(given)
        x = x + given.sum(1) + block.attn.proj.bias
        x = x + block.mlp(block.norm2(x))
    traced.feature = backbone.norm(x[0])
    return traced


def test_rotary_angles_by_hand():
    """On 2 × 3 patches the rows are at ±½ and the columns at -⅔, 0, ⅔; periods are 1 and 10."""
    backbone = rotary_backbone()
    assert backbone.rope_embed.periods.tolist() == pytest.approx([1, 10])
    angles = backbone.rotary_angles(torch.zeros(1, 3, 14, 21))[0]
    assert angles.shape == (1 + 2 + 6, 4)
    assert angles[:3].abs().max() == 0  # [CLS] and the registers
    expected = [-math.pi, -math.pi / 10, 4 * math.pi / 3, 4 * math.pi / 30]
    assert angles[5].tolist() == pytest.approx(expected, abs=1e-6)  # the first row's last patch

    keep = torch.tensor([[4, 0], [2, 2]])
    kept = backbone.rotary_angles(torch.zeros(2, 3, 14, 21), keep)
    torch.testing.assert_close(kept[0, 3:], angles[[7, 3]])
    torch.testing.assert_close(kept[1, 3:], angles[[5, 5]])
    assert small_backbone().rotary_angles(torch.zeros(1, 3, 14, 21)) is None


@pytest.mark.parametrize("height,width", [(28, 28), (14, 35)])
def test_a_rotary_network_is_what_it_is_one_token_at_a_time(height, width):
    backbone = rotary_backbone()
    images = noise(2, 3, height, width)
    tokens = 3 + (height // 7) * (width // 7)
    attention = backbone.get_last_selfattention(images)
    first_row = backbone.get_last_selfattention(images, num_queries=1)
    assert attention.shape == (2, 3, tokens, tokens)
    torch.testing.assert_close(first_row, attention[:, :, :1])
    for image, feature, of_image in zip(images, backbone(images), attention):
        traced = trace(backbone, image)
        torch.testing.assert_close(feature, traced.feature, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(of_image, traced.attentions[-1], atol=1e-5, rtol=1e-5)
    backbone.checkpoint_blocks = True
    torch.testing.assert_close(backbone(images)[1], traced.feature, atol=1e-5, rtol=1e-5)


def test_a_rotary_network_knows_where_patches_are():
    """Patches in another order are the same image; in other places they are not."""
    backbone = rotary_backbone()
    images = noise(2, 3, 28, 28)
    order = torch.stack([torch.randperm(16) for _ in range(2)])
    torch.testing.assert_close(backbone(images, order), backbone(images), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(backbone(images.flip(-2)), backbone(images), atol=1e-2)
    with pytest.raises(TypeError):  # a caller that forgets the angles does not get a wrong number
        backbone.last_feature(backbone.prepare_tokens(images))


def test_gradients_reach_every_parameter_of_a_rotary_network():
    backbone = rotary_backbone()
    assert "pos_embed" not in backbone.state_dict()
    backbone(noise(2, 3, 28, 28)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in backbone.parameters())


@torch.no_grad()
def test_maps_of_a_rotary_network():
    backbone = rotary_backbone()
    images = noise(2, 3, 14, 28, seed=3).sigmoid()
    maps = {name: explain.NETWORK_MAPS[name](backbone, images) for name in explain.NETWORK_MAPS}
    of_tokens, of_patches = explain.token_attention(backbone, images)
    for number, image in enumerate(views.normalize(images)):
        with torch.enable_grad():
            pixels = images[number].clone().requires_grad_()
            traced = trace(backbone, views.normalize(pixels[None])[0])
            unit = F.normalize(traced.feature, dim=0)
            squares = 0
            for direction in explain.random_directions(24):
                (gradient,) = torch.autograd.grad(unit @ direction, pixels, retain_graph=True)
                squares = squares + gradient.square().sum(0)
        squares = squares.unflatten(0, (2, 7)).unflatten(-1, (4, 7)).sum((1, 3)).flatten()

        rollout = torch.eye(11)
        norm_rollout = torch.eye(11)
        for attention, x, given in zip(traced.attentions, traced.inputs, traced.passed_on):
            rollout = (attention.mean(0) + torch.eye(11)) / 2 @ rollout
            norms = (given + torch.eye(11)[..., None] * x[:, None]).norm(dim=-1)
            norm_rollout = norms / norms.sum(-1, keepdim=True) @ norm_rollout
        cls_rows = traced.attentions[-1][:, 0, 3:]
        expected = {
            "attention": explain.normalize_rows(cls_rows).mean(0),
            "rollout": explain.normalize_rows(rollout[0, 3:]),
            "norm_rollout": explain.normalize_rows(norm_rollout[0, 3:]),
            "squared_gradient": explain.normalize_rows(squares),
        }
        assert maps.keys() == expected.keys()
        for name, values in expected.items():
            torch.testing.assert_close(maps[name][number], values, atol=1e-5, rtol=1e-3)
        all_attention = explain.normalize_rows(torch.stack(traced.attentions)[..., 3:])
        torch.testing.assert_close(of_tokens[number], all_attention[:, :, :3], atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(
            of_patches[number], all_attention[-1, :, 3:], atol=1e-5, rtol=1e-3
        )


@torch.no_grad()
def test_effects_on_a_rotary_network(monkeypatch):
    """Patches that stay keep their positions, at whichever block the others are left out."""
    monkeypatch.setattr(effects, "MAX_WINDOWS", 6)  # windows of 2 × 2, and smaller ones at the edge
    backbone = rotary_backbone()
    images = noise(2, 3, 21, 28, seed=3).sigmoid()
    window = effects.window_of_patches((3, 4))
    found = effects.window_effects(backbone, images, [0, 1, 2])
    maps = noise(2, 12, seed=4).softmax(-1)
    most_first, least_first = effects.left_out_cosines(backbone, images, maps)
    for number, image in enumerate(views.normalize(images)):
        whole = F.normalize(trace(backbone, image).feature, dim=0)
        for block in range(3):
            for each in window.unique():
                left_out = (window == each).nonzero()[:, 0].tolist()
                feature = F.normalize(trace(backbone, image, left_out, block).feature, dim=0)
                effect = (1 - whole @ feature).item()
                assert found[block, number, each].item() == pytest.approx(effect, abs=1e-5)
        for curve, order in (
            (most_first, maps[number].argsort(descending=True)),
            (least_first, maps[number].argsort()),
        ):
            for step in (1, 5, 10):
                left_out = order[: round(step * 11 / 10)].tolist()
                feature = F.normalize(trace(backbone, image, left_out).feature, dim=0)
                cosine = (whole @ feature).item()
                assert curve[number, step - 1].item() == pytest.approx(cosine, abs=1e-5)
    assert found.min() > 1e-5
    assert not torch.allclose(found[0], found[1], rtol=0.1)

    has_ink = torch.ones(2, 12, dtype=torch.bool)
    direct = effects.direct_effects(backbone, images, has_ink)
    unit = effects.feature_of(backbone, images)
    blackened = effects.blackening_effects(backbone, images, has_ink, unit)
    torch.testing.assert_close(direct[0], blackened, atol=1e-6, rtol=1e-3)


def test_a_run_may_start_from_a_rotary_network(tmp_path, few_images):
    """Its checkpoint has the positions, and all settings that decide what they do."""
    backbone = rotary_backbone(pos_size=14 * 7)
    with torch.no_grad():
        backbone.rope_embed.periods.mul_(1.5)
    torch.save({"teacher": backbone.state_dict()}, tmp_path / "w.pth")
    flags = f"--weights {tmp_path}/w.pth --image-size 28 --epochs 1 --heads"
    assert start(tmp_path / "run", f"{flags} 6") == 2  # the periods are those of 3 heads
    assert start(tmp_path / "run", f"{flags} 3") == 0
    loaded = weights.load_backbone(str(tmp_path / "run" / "ckpt.pth"))
    assert loaded.backbone.shape == backbone.shape
    periods = loaded.backbone.rope_embed.periods
    torch.testing.assert_close(periods, backbone.rope_embed.periods)
    assert "3 heads, rotary positions" in loaded.description


# ---------------------------------------------------------------------------- the projection head


def test_head_without_prototypes_ends_in_unit_vectors():
    x = noise(5, 24)
    for norm in (False, True):
        outputs = small_head(out_dim=None, layers=2, norm=norm)(x)
        assert outputs.shape == (5, 8)
        torch.testing.assert_close(outputs.norm(dim=-1), torch.ones(5))


def test_head_with_prototypes_gives_the_cosine_with_each_of_them():
    x = noise(5, 24)
    head = small_head()
    bottleneck = head.mlp(x)
    expected = F.cosine_similarity(bottleneck[:, None], head.last_layer.weight_v, dim=-1)
    torch.testing.assert_close(head(x), expected)
    assert {"last_layer.weight_v", "last_layer.weight_g"} <= head.state_dict().keys()


@pytest.mark.parametrize("norm", [False, True])
def test_head_treats_every_image_by_itself(norm):
    """There are no statistics of the batch, because its gradient is computed in pieces."""
    x = noise(5, 24)
    head = small_head(norm=norm)
    torch.testing.assert_close(head(x)[:2], head(x[:2]))


# -------------------------------------------------------------------------- networks from settings

FLAGS = "--preset laptop --device cpu --dim 24 --head-hidden-dim 16 --bottleneck-dim 8 --out-dim 12"


@pytest.mark.parametrize("loss,outputs", [("nce", 8), ("dino", 12), ("supervised", 10)])
def test_head_fits_the_loss(loss, outputs):
    network = vit.build_network(config_of(f"{FLAGS} --loss {loss}"))
    assert network(noise(2, 3, 56, 56)).shape == (2, outputs)
    assert {name.partition(".")[0] for name in network.state_dict()} == {"backbone", "head"}


def test_seed_decides_the_initial_weights():
    weights_of_seed = [
        vit.build_network(config_of(f"{FLAGS} --seed {seed}")).state_dict() for seed in (3, 3, 4)
    ]
    first, again, different = weights_of_seed
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
    assert not torch.equal(first["backbone.pos_embed"], different["backbone.pos_embed"])


def test_network_of_a_checkpoint_that_did_not_record_all_settings():
    """Before there were registers the MLPs were four times as wide as the network."""
    saved = weights.read_checkpoint(SHIPPED / "same.pth")["config"]
    saved = {name: value for name, value in saved.items() if name not in settings.EARLIER}
    network = vit.build_network(settings.config_from_checkpoint(saved))
    assert network.backbone.shape == ViTShape(
        patch_size=7, dim=96, depth=2, heads=3, pos_size=56, mlp_ratio=4, registers=0
    )
