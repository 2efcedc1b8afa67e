"""Weights of others, in whatever file, names and form they come, give what their own code gives."""

import argparse
import pathlib
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_files import call
from test_vit import assert_same_weights, probe

import data
import visualize
import vit

DIM, DEPTH = 128, 2


def vit_weights(patch=8, tokens=1 + 5 * 5, registers=0, scale=False, dim=DIM, depth=DEPTH):
    """Random weights of a ViT in DINO's names, the same on every machine and version."""
    rng = np.random.RandomState(0)

    def draw(*shape, std=0.05, mean=0.0):
        return torch.from_numpy(rng.standard_normal(shape) * std + mean).float()

    weights = {"cls_token": draw(1, 1, dim), "pos_embed": draw(1, tokens, dim, std=0.5)}
    weights |= {"patch_embed.proj.weight": draw(dim, 3, patch, patch)}
    weights |= {"patch_embed.proj.bias": draw(dim)}
    for block in range(depth):
        shapes = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
        shapes |= {"mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
        layers = {f"{norm}.weight": draw(dim, mean=1) for norm in ("norm1", "norm2")}
        layers |= {f"{norm}.bias": draw(dim) for norm in ("norm1", "norm2")}
        for name, shape in shapes.items():
            std = 0.1 if name == "attn.qkv" else 0.05
            layers |= {f"{name}.weight": draw(*shape, std=std), f"{name}.bias": draw(shape[0])}
        if scale:
            layers |= {f"ls{number}.gamma": draw(dim, std=0.3, mean=1) for number in (1, 2)}
        weights |= {f"blocks.{block}.{name}": value for name, value in layers.items()}
    weights |= {"norm.weight": draw(dim, mean=1), "norm.bias": draw(dim)}
    if registers:
        weights["register_tokens"] = draw(1, registers, dim)
    return weights


def loaded(tmp_path, content, **how):
    torch.save(content, tmp_path / "w.pth")
    return vit.load_backbone(str(tmp_path / "w.pth"), **how)[0]


def prefixed(prefix, weights):
    return {prefix + name: value for name, value in weights.items()}


def outputs(network, size, seed=0):
    """The feature on four random directions; the [CLS] row of each head on one."""
    image = torch.from_numpy(np.random.RandomState(seed).standard_normal((1, 3, *size))).float()
    with torch.no_grad():
        feature = network(image)[0].double()
        row = network.get_last_selfattention(image)[0, :, 0].double()
    directions = torch.stack([probe(100 + k, len(feature)) for k in range(4)])
    return directions @ feature, row @ probe(109, row.shape[-1])


def assert_outputs(network, size, says):
    for found, expected in zip(outputs(network, size), says):
        np.testing.assert_allclose(found, expected, atol=1e-5)


# What facebookresearch/dinov2's model gives for vit_weights(14, registers=…, scale=True) and an
# image of that size, with the settings of its hub: registers, height, width.
DINOV2_SAYS = {
    (0, 70, 70): ([-0.74913, -0.297109, 2.123124, 1.039653], [0.0445473, -0.0148196]),
    (0, 112, 112): ([-0.377233, -0.050465, -0.10791, 1.52709], [-0.0098319, 0.0132516]),
    (0, 42, 84): ([-0.788648, -0.030034, 0.112171, 1.151413], [-0.0285391, -0.0273688]),
    (4, 70, 70): ([-0.449683, -0.37623, 2.263698, 0.512954], [0.0477299, 0.1621897]),
    (4, 112, 112): ([-0.281637, -0.119184, -0.20644, 1.510504], [0.0304164, 0.0314437]),
    (4, 42, 84): ([-0.369067, -0.401863, -0.09414, 0.920106], [0.0220041, 0.1632477]),
}
# What timm's VisionTransformer gives for vit_weights of that grid: heads, height, width.
TIMM_SAYS = {
    (2, 40, 40): ([0.16349, -0.414097, -0.586094, 0.381729], [0.0662163, 0.0279105]),
    (4, 40, 40): (
        [-0.157442, -0.093835, -0.768717, 0.317409],
        [0.0900631, 0.0781437, 0.0492414, 0.0236467],
    ),
    (2, 24, 56): ([-0.876395, -0.273304, -0.041816, 0.473641], [0.0776564, 0.1327566]),
}
# and for those with 4 registers and LayerScale, whose positions have no row of [CLS]
TIMM_DINOV2_SAYS = ([0.506937, -0.191586, -1.365809, -0.560007], [0.0488596, 0.0306228])
# and for vit_weights(dim=384, depth=1) with the 12 heads of MoCo v3's ViT-S: 40 × 40
MOCO_SAYS = (
    [-0.12234, -2.068689, -0.326841, 0.729134],
    [0.1830102, 0.1282085, -0.0358811, -0.2725479, -0.04251, -0.0167602]
    + [-0.0304434, -0.0315616, 0.0476059, -0.0709577, -0.1220115, 0.0644017],
)


@pytest.mark.parametrize("registers,height,width", DINOV2_SAYS)
def test_dinov2_is_dinov2s(tmp_path, registers, height, width):
    weights = vit_weights(14, registers=registers, scale=True) | {"mask_token": torch.zeros(1, DIM)}
    network = loaded(tmp_path, weights)
    assert_outputs(network, (height, width), DINOV2_SAYS[registers, height, width])
    chunks = {name.replace("blocks.", "blocks.0."): value for name, value in weights.items()}
    training = {"teacher": prefixed("backbone.", chunks) | {"dino_head.x": torch.zeros(1)}}
    assert_same_weights(loaded(tmp_path, training), network.state_dict())


def test_a_run_from_dinov2_with_registers_keeps_how_positions_are_interpolated(tmp_path):
    network = loaded(tmp_path, vit_weights(14, registers=4, scale=True))
    config = {name: getattr(network, name) for name in vit.SHAPE}
    again = loaded(tmp_path, {"config": config, "teacher": network.state_dict()})
    assert_outputs(again, (42, 84), DINOV2_SAYS[4, 42, 84])


def test_positions_of_patches_alone(tmp_path):
    weights = vit_weights(registers=4, scale=True)
    weights["reg_token"] = weights.pop("register_tokens")
    weights["pos_embed"] = weights["pos_embed"][:, 1:].clone()
    assert_outputs(loaded(tmp_path, weights), (40, 40), TIMM_DINOV2_SAYS)


@pytest.mark.parametrize("heads,height,width", TIMM_SAYS)
def test_ibot_mae_deit_and_moco_are_timms(tmp_path, heads, height, width):
    grid = None if height == width else (height // 8, width // 8)
    weights = vit_weights(tokens=1 + height * width // 64)
    head, other = {"head.weight": torch.ones(3, DIM)}, vit_weights(tokens=17, dim=64, depth=1)
    decoder = {"mask_token": torch.ones(1, 1, 64), "decoder_pos_embed": other["pos_embed"]}
    decoder |= prefixed("decoder_", other)
    moco = prefixed("module.base_encoder.", other) | {"module.predictor.0.weight": torch.ones(1)}
    for content in (
        {"state_dict": weights | {"masked_embed": torch.ones(1, DIM)}},
        {"model": weights | decoder, "args": argparse.Namespace(model="mae_vit_base_patch16")},
        {"model": weights | head, "model_ema": weights | head},
        {"arch": "vit_small", "state_dict": moco | prefixed("module.momentum_encoder.", weights)},
    ):
        network = loaded(tmp_path, content, heads=heads, grid=grid)
        assert_outputs(network, (height, width), TIMM_SAYS[heads, height, width])


def test_heads_of_moco_and_of_the_largest(tmp_path):
    weights = vit_weights(dim=384, depth=1)
    content = {
        "state_dict": prefixed(
            "module.momentum_encoder.", weights | {"head.x": weights["norm.bias"]}
        )
    }
    network = loaded(tmp_path, content)
    assert "12 heads, grid 5×5 (assumed" in network.about
    assert_outputs(network, (40, 40), MOCO_SAYS)
    # nothing says so any more
    assert "6 heads (assumed; --heads)" in loaded(tmp_path, weights).about
    huge = {name: value.half() for name, value in vit_weights(dim=1280, depth=1, tokens=5).items()}
    assert loaded(tmp_path, huge).heads == 16


WEIGHTS, OTHERS = vit_weights(depth=1), vit_weights(depth=1, tokens=10)
PREFIXES = """module. _orig_mod. backbone. encoder. model. vit. base_encoder. momentum_encoder.
    teacher. student. teacher_backbone. student_backbone. _orig_mod.module.backbone. model.vit.
    student_backbone.vit. module.model.encoder.backbone. momentum_backbone. dinov2."""
KEYS = "teacher momentum state_dict_ema model_ema student model state_dict model_state_dict net"


@pytest.mark.parametrize("prefix", PREFIXES.split())
def test_behind_any_prefix(tmp_path, prefix):
    around = {"head.weight": torch.ones(3, DIM), "criterion.center": torch.ones(3)}
    assert_same_weights(loaded(tmp_path, prefixed(prefix, WEIGHTS) | around), WEIGHTS)


@pytest.mark.parametrize("key", KEYS.split())
def test_in_any_container(tmp_path, key):
    content = {"optimizer": {"state": WEIGHTS}, key: prefixed("module.", WEIGHTS), "epoch": 3}
    network = loaded(tmp_path, content)
    assert_same_weights(network, WEIGHTS)
    assert network.about.startswith(f"{key}.module, 2 heads (assumed")
    content["net" if key == "model" else "model"] = content  # a dict that holds itself
    assert_same_weights(loaded(tmp_path, content), WEIGHTS)


@pytest.mark.parametrize(
    "student,teacher",
    [
        ("student.module.backbone", "teacher.backbone"),
        ("state_dict", "state_dict_ema"),
        ("model", "model_ema"),
        ("state_dict.module.base_encoder", "state_dict.module.momentum_encoder"),
        ("state_dict.student_backbone.vit", "state_dict.teacher_backbone.vit"),
        ("state_dict.backbone", "state_dict.momentum_backbone"),
    ],
)
@pytest.mark.parametrize("first", [0, 1])
def test_the_teacher_is_taken_and_it_is_said(tmp_path, student, teacher, first):
    content, networks = {}, [(student, OTHERS), (teacher, WEIGHTS)]
    for place, weights in (networks[first], networks[1 - first]):
        key, _, prefix = place.partition(".")
        weights = prefixed(f"{prefix}." if prefix else "", weights)
        content[key] = content.get(key, {}) | weights
    network = loaded(tmp_path, content)
    assert_same_weights(network, WEIGHTS)
    assert network.about.startswith(f"{teacher} rather than {student}, ")


def hugging_face(weights, names):
    """In Hugging Face's names, of which `names` has those that ViT and Dinov2 do not share."""
    there = {}
    for name, value in weights.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if "attn.qkv" in name:
            for part, rows in zip(("query", "key", "value"), value.chunk(3)):
                there[name.replace("attn.qkv", f"attention.attention.{part}")] = rows.clone()
        else:
            there[name] = value
    return there


HF = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "blocks.": "encoder.layer."}
HF |= {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
HF |= {"attn.proj": "attention.output.dense"}
HF_VIT = HF | {"norm1": "layernorm_before", "norm2": "layernorm_after", "norm.": "layernorm."}
HF_VIT |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
HF_DINOV2 = HF | {"norm.": "layernorm.", "register_tokens": "embeddings.register_tokens"}
HF_DINOV2 |= {f"ls{k}.gamma": f"layer_scale{k}.lambda1" for k in (1, 2)}


@pytest.mark.parametrize("prefix", ["", "vit."])
def test_vit_of_hugging_face(tmp_path, prefix):
    theirs = prefixed(prefix, hugging_face(vit_weights(), HF_VIT))
    theirs |= {"pooler.dense.weight": torch.ones(DIM, DIM), "classifier.bias": torch.ones(3)}
    assert_same_weights(loaded(tmp_path, theirs), vit_weights())


@pytest.mark.parametrize(
    "registers,prefix", [(0, ""), (0, "dinov2."), (4, "dinov2_with_registers.")]
)
def test_dinov2_of_hugging_face(tmp_path, registers, prefix):
    weights = vit_weights(14, registers=registers, scale=True)
    theirs = hugging_face(weights, HF_DINOV2) | {"embeddings.mask_token": torch.ones(1, DIM)}
    network = loaded(tmp_path, prefixed(prefix, theirs))
    assert_outputs(network, (42, 84), DINOV2_SAYS[registers, 42, 84])


def test_safetensors(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = str(tmp_path / "model.safetensors")
    save_file(vit_weights() | {"head.bias": torch.ones(3)}, path)
    assert_same_weights(vit.load_backbone(path)[0], vit_weights())
    whole = pathlib.Path(path).read_bytes()
    for content in (b"", whole[:5], whole[:500], whole[:-9], b"\xff" * 99):
        pathlib.Path(path).write_bytes(content)
        with pytest.raises(ValueError, match="model.safetensors"):
            vit.load_backbone(path)


def test_safetensors_without_its_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "w.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="w.safetensors needs .*pip install safetensors"):
        vit.load_backbone(str(tmp_path / "w.safetensors"))


def without(name):
    return {key: value for key, value in vit_weights().items() if name not in key}


REFUSED = {  # what the message names
    "dist_token": vit_weights(tokens=27) | {"dist_token": torch.ones(1, 1, DIM)},
    "blocks.0.mlp.w12.weight": without("mlp") | {"blocks.0.mlp.w12.weight": torch.ones(3, DIM)},
    "blocks.1.attn.rel_pos": vit_weights() | {"blocks.1.attn.rel_pos": torch.ones(3)},
    "norm_pre.weight": vit_weights() | {"norm_pre.weight": torch.ones(DIM)},
    "blocks.0.attn.qkv.bias": without("qkv.bias"),
    "patch_embed.proj.weight": vit_weights()
    | {"patch_embed.proj.weight": torch.ones(DIM, 1, 8, 8)},
    "blocks.0.ls1": vit_weights() | {"blocks.0.ls1x.gamma": torch.ones(DIM)},
    "keys: class_token, conv_proj.weight": {
        "class_token": torch.ones(1, 1, DIM),
        "conv_proj.weight": torch.ones(DIM, 3, 8, 8),
    },
    "keys: model, epoch, transformer.x": {"model": {"transformer.x": torch.ones(3)}, "epoch": 3},
    "28 positions, no grid 5×5; use --grid": vit_weights(tokens=29),
}


@pytest.mark.parametrize("named,content", REFUSED.items())
def test_what_changes_the_network_is_refused_by_name(tmp_path, named, content):
    with pytest.raises(ValueError) as error:
        loaded(tmp_path, content)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_without_a_last_norm_maps_are_the_same_and_features_say_so(tmp_path):
    network, whole = loaded(tmp_path, without("norm.")), loaded(tmp_path, vit_weights())
    image = torch.rand(1, 3, 40, 40)
    attention = whole.get_last_selfattention(image)
    assert torch.equal(network.get_last_selfattention(image), attention)
    x = whole.blocks[-1](whole.before_last_block(image), 1)[:, 0]
    torch.testing.assert_close(network(image), F.layer_norm(x, (DIM,), eps=1e-6))
    assert "no last norm" in network.about and "no last norm" not in whole.about


def test_paths_and_arrays_beside_the_weights_are_not_made(tmp_path):
    paths = [pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("b"), pathlib.Path("c")]
    arrays = [np.zeros(3, kind) for kind in ("f4", "i8", "u1", "?", "U3")]
    content = {"teacher": vit_weights(), "args": argparse.Namespace(paths=paths), "x": arrays}
    assert_same_weights(loaded(tmp_path, content | {"best": np.float32(0.5)}), vit_weights())
    read = vit.read_checkpoint(tmp_path / "w.pth")
    assert {type(value) for value in read["args"].paths + read["x"]} == {vit.Unread}
    assert read["best"] == 0.5


@pytest.mark.parametrize("content", [torch.nn.Linear(3, 3), {"x": call(open, "no")}])
def test_a_type_that_is_refused_is_named(tmp_path, content):
    with pytest.raises(ValueError, match="(linear.Linear|io.open), .*state_dict.. alone"):
        loaded(tmp_path, content)


def drawn(tmp_path, capsys, *flags):
    """What visualize.py prints of w.pth and one picture, and its status."""
    Image.linear_gradient("L").resize((40, 40)).save(tmp_path / "a.png")
    files = [str(tmp_path / "w.pth"), "--images", str(tmp_path / "a.png"), "--image-size", "40"]
    status = visualize.main([*files, "--device", "cpu", "--output", str(tmp_path), *flags])
    return status, "".join(capsys.readouterr())


def test_flags_for_what_no_shape_can_tell(tmp_path, capsys):
    torch.save(vit_weights(tokens=17), tmp_path / "w.pth")
    says = "w.pth: weights, 2 heads (assumed; --heads), grid 4×4 (assumed; --grid), "
    status, printed = drawn(tmp_path, capsys)
    assert status == 0 and says + "normalised by ImageNet\n" in printed
    status, printed = drawn(
        tmp_path, capsys, "--heads", "4", "--grid", "2x8", "--normalise", "half"
    )
    assert status == 0 and "w.pth: weights, 4 heads, grid 2×8, normalised by 0.5\n" in printed
    for flags in (["--heads", "5"], ["--heads", "-1"], ["--grid", "3x5"], ["--grid", "99999x1"]):
        status, printed = drawn(tmp_path, capsys, *flags)
        assert status == 2 and printed.count("\n") == 1 and "w.pth" in printed, flags
    for grid in ("4", "0x4", "-2x-8", "axb"):
        with pytest.raises(SystemExit):
            drawn(tmp_path, capsys, f"--grid={grid}")


def test_half_is_another_mean_and_deviation(tmp_path):
    network, image = loaded(tmp_path, vit_weights()), torch.rand(1, 3, 40, 40)
    expected = network(image * 2 - 1)
    visualize.expect_half(network)
    torch.testing.assert_close(network(data.normalize(image)), expected, atol=1e-5, rtol=1e-5)
