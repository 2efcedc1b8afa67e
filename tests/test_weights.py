"""Weights of any published ViT give what their own code gives, and no file can do harm."""

import argparse
import contextlib
import http.server
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import socket
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from helpers import SHIPPED, config_of
from PIL import Image
from test_vit import noise, random_direction

import runs
import settings
import train
import visualize
import weights
from vit import VisionTransformer, ViTShape
from weights import LoadedWeights, load_backbone, read_checkpoint

TINY_SHAPE = ViTShape(patch_size=8, dim=64, depth=2, heads=1, pos_size=32)
DIM = 128  # width of `vit_weights`

# ---------------------------------------------------------------------- what several tests need


def random_weights(shape: ViTShape = TINY_SHAPE) -> dict:
    """Initial weights of a ViT, in DINO's names."""
    torch.manual_seed(0)
    return VisionTransformer(shape).state_dict()


def vit_weights(
    patch_size: int = 8,
    tokens: int = 1 + 5 * 5,
    registers: int = 0,
    layer_scale: bool = False,
    dim: int = DIM,
    depth: int = 2,
) -> dict:
    """Random weights in DINO's names, the same on every machine and version.

    The recorded outputs below depend on the order in which they are drawn.
    """
    rng = np.random.RandomState(0)

    def draw(*shape, std=0.05, mean=0.0):
        return torch.from_numpy(rng.standard_normal(shape) * std + mean).float()

    state = {
        "cls_token": draw(1, 1, dim),
        "pos_embed": draw(1, tokens, dim, std=0.5),
        "patch_embed.proj.weight": draw(dim, 3, patch_size, patch_size),
        "patch_embed.proj.bias": draw(dim),
    }
    for number in range(depth):
        block = f"blocks.{number}"
        state[f"{block}.norm1.weight"] = draw(dim, mean=1)
        state[f"{block}.norm2.weight"] = draw(dim, mean=1)
        state[f"{block}.norm1.bias"] = draw(dim)
        state[f"{block}.norm2.bias"] = draw(dim)
        state[f"{block}.attn.qkv.weight"] = draw(3 * dim, dim, std=0.1)
        state[f"{block}.attn.qkv.bias"] = draw(3 * dim)
        state[f"{block}.attn.proj.weight"] = draw(dim, dim)
        state[f"{block}.attn.proj.bias"] = draw(dim)
        state[f"{block}.mlp.fc1.weight"] = draw(4 * dim, dim)
        state[f"{block}.mlp.fc1.bias"] = draw(4 * dim)
        state[f"{block}.mlp.fc2.weight"] = draw(dim, 4 * dim)
        state[f"{block}.mlp.fc2.bias"] = draw(dim)
        if layer_scale:
            state[f"{block}.ls1.gamma"] = draw(dim, std=0.3, mean=1)
            state[f"{block}.ls2.gamma"] = draw(dim, std=0.3, mean=1)
    state["norm.weight"] = draw(dim, mean=1)
    state["norm.bias"] = draw(dim)
    if registers:
        state["register_tokens"] = draw(1, registers, dim)
    return state


def with_prefix(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


def without(part_of_name: str, state: dict) -> dict:
    """The weights whose names do not contain this."""
    return {name: value for name, value in state.items() if part_of_name not in name}


def load(folder: Path, content, **kwargs) -> LoadedWeights:
    """What is loaded from a file with this content."""
    path = folder / "w.pth"
    torch.save(content, path)
    return load_backbone(str(path), **kwargs)


def assert_same_weights(backbone: VisionTransformer, expected: dict):
    """The weights are the expected ones, in float32."""
    state = backbone.state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert value.dtype == torch.float32, name
        assert torch.equal(value, expected[name].float()), name


def own_checkpoint(teacher: dict, **settings) -> dict:
    """A checkpoint as train.py writes it, with these settings among the others."""
    config = asdict(config_of("--preset laptop --device cpu")) | settings
    return {"config": config, "teacher": teacher, "epoch": 1, "metrics": []}


def bytes_of(content, old_format: bool = False) -> bytes:
    """The bytes of a checkpoint; the format of before 2020 is no zip archive."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not old_format)
    return buffer.getvalue()


def call(function, *arguments):
    """An object whose pickle calls a function with these arguments."""
    return type("Call", (), {"__reduce__": lambda self: (function, arguments)})()


# --------------------------------------------------------------------------- DINO's own layouts


def test_full_dino_checkpoint_gives_its_teacher(tmp_path):
    """The layout of facebookresearch/dino's main_dino.py, with all that it holds besides."""
    student = random_weights()
    teacher = {name: value + 1 for name, value in student.items()}
    head = {"head.mlp.0.bias": torch.zeros(3), "head.last_layer.weight_g": torch.ones(3, 1)}
    content = {
        "student": with_prefix("module.", with_prefix("backbone.", student) | head),
        "teacher": with_prefix("backbone.", teacher) | head,
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(0.001)}]},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small", lr=0.0005),
        "dino_loss": {"center": torch.zeros(1, 3)},
        "step": np.int64(7),
    }
    loaded = load(tmp_path, content)
    assert loaded.backbone.shape == TINY_SHAPE
    assert loaded.backbone.grid == (4, 4)
    assert_same_weights(loaded.backbone, teacher)
    assert loaded.description.startswith("teacher.backbone (not student.module.backbone), ")
    assert loaded.content["step"] == 7
    assert loaded.content["args"].arch == "vit_small"


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize(
    "shape",
    [
        ViTShape(patch_size=8, dim=128, depth=2, heads=2, pos_size=32),
        ViTShape(patch_size=7, dim=24, depth=3, heads=1, pos_size=28, mlp_ratio=2, registers=3),
    ],
    ids=["plain", "with registers"],
)
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
def test_bare_weights_in_any_format(tmp_path, prefix, shape, dtype, old_format):
    state = {name: value.to(dtype) for name, value in random_weights(shape).items()}
    path = tmp_path / "w.pth"
    path.write_bytes(bytes_of(with_prefix(prefix, state), old_format))
    backbone = load_backbone(str(path)).backbone
    assert backbone.shape == shape
    assert_same_weights(backbone, state)


def test_a_checkpoint_of_an_earlier_version_still_loads():
    """Its teacher is in float16, and it does not record all settings of today."""
    loaded = load_backbone(str(SHIPPED / "same.pth"))
    assert loaded.backbone.shape == ViTShape(
        patch_size=7, dim=96, depth=2, heads=3, pos_size=56, mlp_ratio=1, registers=4
    )
    teacher = {}
    for name, value in loaded.content["teacher"].items():
        if name.startswith("backbone."):
            assert value.dtype == torch.float16
            teacher[name.removeprefix("backbone.")] = value
    assert_same_weights(loaded.backbone, teacher)
    assert loaded.description == "teacher.backbone, 3 heads, grid 8×8"


# ----------------------------------------------------------------------- downloads of DINO's files


@dataclass
class DinoServer:
    """A server with one small file, on loopback, in place of DINO's."""

    server: http.server.HTTPServer
    folder: Path  # where torch.hub keeps what it downloads
    body: bytes  # the whole file
    length: int  # how many of its bytes are sent
    requests: list[str] = field(default_factory=list)  # paths that were asked for

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def dino_server(tmp_path, monkeypatch):
    body = bytes_of(random_weights())

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            served.requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(served.body)))
            self.end_headers()
            self.wfile.write(served.body[: served.length])

        def log_message(self, *args):
            """Print nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = DinoServer(server, tmp_path / "hub" / "checkpoints", body, len(body))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{{0}}/{{0}}.pth"
    monkeypatch.setattr(weights, "DINO_URL", url)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield served
    served.stop()


@pytest.mark.parametrize("name,file", weights.DINO_FILES.items())
def test_a_file_is_downloaded_once_and_then_found(dino_server, name, file):
    load_backbone(name)
    assert dino_server.requests == [f"/{file}/{file}.pth"]
    dino_server.stop()
    loaded = load_backbone(name, heads=2, grid=(2, 8))  # of another file beside it
    assert loaded.backbone.shape == TINY_SHAPE
    assert loaded.description == "weights, 1 heads, grid 4×4"  # nothing is assumed
    assert os.listdir(dino_server.folder) == [f"{file}.pth"]


def test_a_damaged_download_of_an_earlier_day_is_named(dino_server):
    dino_server.folder.mkdir(parents=True)
    file = dino_server.folder / "dino_deitsmall8_pretrain.pth"
    file.write_bytes(dino_server.body[:500])
    with pytest.raises(ValueError, match=f"{file.name} .*damaged.*use another copy"):
        load_backbone("dino")


@pytest.mark.parametrize("missing_bytes", [1, 100, 400_000])
def test_a_download_that_was_cut_short_leaves_nothing_and_is_repeated(dino_server, missing_bytes):
    dino_server.length = len(dino_server.body) - missing_bytes
    with pytest.raises(OSError, match="--weights dino: .*--weights none .*--weights FILE"):
        load_backbone("dino")
    assert os.listdir(dino_server.folder) == []
    dino_server.length = len(dino_server.body)
    load_backbone("dino")
    assert len(dino_server.requests) == 2


def test_several_downloads_at_once(dino_server):
    with ThreadPoolExecutor(6) as threads:
        assert len(list(threads.map(load_backbone, ["dino"] * 6))) == 6
    assert os.listdir(dino_server.folder) == ["dino_deitsmall8_pretrain.pth"]


@pytest.fixture
def short_timeout():
    """A server without an answer in 0.3 seconds counts as silent."""
    timeout_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(0.3)
    yield
    socket.setdefaulttimeout(timeout_before)


@pytest.mark.parametrize("is_silent,reason", [(False, "refused"), (True, "timed out")])
def test_a_server_that_is_down_or_silent(
    dino_server, short_timeout, monkeypatch, is_silent, reason
):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if is_silent:
            listener.listen()
        port = listener.getsockname()[1]
        monkeypatch.setattr(weights, "DINO_URL", f"http://127.0.0.1:{port}/{{0}}")
        message = f"failed .*{reason}.*--weights none .*--weights FILE"
        with pytest.raises(OSError, match=message):
            load_backbone("dino")
    assert os.listdir(dino_server.folder) == []


# --------------------------------------------------------- what the networks' own code computes


@dataclass
class Outputs:
    """What a network gives for an image of noise."""

    feature: list[float]  # the feature of [CLS], projected onto four random directions
    cls_rows: list[float]  # each head's attention of [CLS], projected onto a random direction


def outputs_of(backbone: VisionTransformer, height: int, width: int) -> Outputs:
    images = noise(1, 3, height, width)
    with torch.no_grad():
        feature = backbone(images)[0].double()
        cls_rows = backbone.get_last_selfattention(images)[0, :, 0].double()
    directions = torch.stack([random_direction(100 + number, len(feature)) for number in range(4)])
    rows_on_direction = cls_rows @ random_direction(109, cls_rows.shape[-1])
    return Outputs((directions @ feature).tolist(), rows_on_direction.tolist())


def assert_outputs(backbone: VisionTransformer, height: int, width: int, expected: Outputs):
    outputs = outputs_of(backbone, height, width)
    np.testing.assert_allclose(outputs.feature, expected.feature, atol=1e-5)
    np.testing.assert_allclose(outputs.cls_rows, expected.cls_rows, atol=1e-5)


# What facebookresearch/dinov2's model gives for `vit_weights` with patches of 14 and LayerScale,
# with the settings of its hub: {(registers, height, width): outputs}. All outputs below were
# recorded once.
DINOV2_OUTPUTS = {
    (0, 70, 70): Outputs([-0.74913, -0.297109, 2.123124, 1.039653], [0.0445473, -0.0148196]),
    (0, 112, 112): Outputs([-0.377233, -0.050465, -0.10791, 1.52709], [-0.0098319, 0.0132516]),
    (0, 42, 84): Outputs([-0.788648, -0.030034, 0.112171, 1.151413], [-0.0285391, -0.0273688]),
    (4, 70, 70): Outputs([-0.449683, -0.37623, 2.263698, 0.512954], [0.0477299, 0.1621897]),
    (4, 112, 112): Outputs([-0.281637, -0.119184, -0.20644, 1.510504], [0.0304164, 0.0314437]),
    (4, 42, 84): Outputs([-0.369067, -0.401863, -0.09414, 0.920106], [0.0220041, 0.1632477]),
}
# What timm's VisionTransformer gives for `vit_weights` of that grid: {(heads, height, width): …}.
TIMM_OUTPUTS = {
    (2, 40, 40): Outputs([0.16349, -0.414097, -0.586094, 0.381729], [0.0662163, 0.0279105]),
    (4, 40, 40): Outputs(
        [-0.157442, -0.093835, -0.768717, 0.317409], [0.0900631, 0.0781437, 0.0492414, 0.0236467]
    ),
    (2, 24, 56): Outputs([-0.876395, -0.273304, -0.041816, 0.473641], [0.0776564, 0.1327566]),
}
# The same, 40 × 40, with 4 registers and LayerScale, whose positions have no row for [CLS].
TIMM_DINOV2_OUTPUTS = Outputs([0.506937, -0.191586, -1.365809, -0.560007], [0.0488596, 0.0306228])
# The same, 40 × 40, for vit_weights(dim=384, depth=1) with the 12 heads of MoCo v3's ViT-S.
MOCO_OUTPUTS = Outputs(
    [-0.12234, -2.068689, -0.326841, 0.729134],
    [
        0.1830102,
        0.1282085,
        -0.0358811,
        -0.2725479,
        -0.04251,
        -0.0167602,
        -0.0304434,
        -0.0315616,
        0.0476059,
        -0.0709577,
        -0.1220115,
        0.0644017,
    ],
)


@pytest.mark.parametrize("registers,height,width", DINOV2_OUTPUTS)
def test_dinov2(tmp_path, registers, height, width):
    state = vit_weights(14, registers=registers, layer_scale=True)
    state["mask_token"] = torch.zeros(1, DIM)
    backbone = load(tmp_path, state).backbone
    assert_outputs(backbone, height, width, DINOV2_OUTPUTS[registers, height, width])

    # In training its blocks come in chunks.
    in_chunks = {name.replace("blocks.", "blocks.0."): value for name, value in state.items()}
    teacher = with_prefix("backbone.", in_chunks) | {"dino_head.x": torch.zeros(1)}
    assert_same_weights(load(tmp_path, {"teacher": teacher}).backbone, backbone.state_dict())


def test_a_run_that_started_from_dinov2_interpolates_positions_in_the_same_way(tmp_path):
    backbone = load(tmp_path, vit_weights(14, registers=4, layer_scale=True)).backbone
    assert backbone.shape.antialias
    loaded = load(tmp_path, own_checkpoint(backbone.state_dict(), **asdict(backbone.shape)))
    assert_outputs(loaded.backbone, 42, 84, DINOV2_OUTPUTS[4, 42, 84])


def test_dinov2_of_timm_whose_positions_are_those_of_the_patches_alone(tmp_path):
    state = vit_weights(registers=4, layer_scale=True)
    state["reg_token"] = state.pop("register_tokens")
    state["pos_embed"] = state["pos_embed"][:, 1:].clone()
    assert_outputs(load(tmp_path, state).backbone, 40, 40, TIMM_DINOV2_OUTPUTS)


def layout_of(library: str, state: dict) -> dict:
    """The content of a library's file, which holds these weights among others."""
    narrow = vit_weights(tokens=17, dim=64, depth=1)
    if library == "iBOT":
        return {"state_dict": state | {"masked_embed": torch.ones(1, DIM)}}
    if library == "MAE":
        decoder = with_prefix("decoder_", narrow)
        decoder |= {"mask_token": torch.ones(1, 1, 64), "decoder_pos_embed": narrow["pos_embed"]}
        return {"model": state | decoder, "args": argparse.Namespace(model="mae_vit_base")}
    if library == "DeiT":
        classifier = state | {"head.weight": torch.ones(3, DIM)}
        return {"model": classifier, "model_ema": classifier}
    moco = with_prefix("module.base_encoder.", narrow)
    moco |= {"module.predictor.0.weight": torch.ones(1)}
    moco |= with_prefix("module.momentum_encoder.", state)
    return {"arch": "vit_small", "state_dict": moco}


@pytest.mark.parametrize("library", ["iBOT", "MAE", "DeiT", "MoCo v3"])
@pytest.mark.parametrize("heads,height,width", TIMM_OUTPUTS)
def test_ibot_mae_deit_and_moco(tmp_path, library, heads, height, width):
    grid = None if height == width else (height // 8, width // 8)
    state = vit_weights(tokens=1 + (height // 8) * (width // 8))
    loaded = load(tmp_path, layout_of(library, state), heads=heads, grid=grid)
    assert_outputs(loaded.backbone, height, width, TIMM_OUTPUTS[heads, height, width])


def test_moco_has_12_heads(tmp_path):
    state = vit_weights(dim=384, depth=1)
    encoder = state | {"head.x": state["norm.bias"]}
    content = {"state_dict": with_prefix("module.momentum_encoder.", encoder)}
    loaded = load(tmp_path, content)
    assert "12 heads (assumed; " in loaded.description
    assert_outputs(loaded.backbone, 40, 40, MOCO_OUTPUTS)

    # Without its prefix nothing tells that the weights are MoCo's.
    assert "6 heads (assumed" in load(tmp_path, state).description


def test_the_widest_networks_have_16_heads(tmp_path):
    state = vit_weights(dim=1280, depth=1, tokens=5)
    state = {name: value.half() for name, value in state.items()}
    assert load(tmp_path, state).backbone.shape.heads == 16


HUGGING_FACE_NAMES = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "blocks.": "encoder.layer.",
    "attn.proj": "attention.output.dense",
}
HUGGING_FACE_VIT_NAMES = HUGGING_FACE_NAMES | {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "norm.": "layernorm.",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
HUGGING_FACE_DINOV2_NAMES = HUGGING_FACE_NAMES | {
    "norm.": "layernorm.",
    "register_tokens": "embeddings.register_tokens",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
}


def in_names_of_hugging_face(state: dict, names: dict) -> dict:
    """Weights in Hugging Face's names; query, key and value are layers of their own there."""
    renamed = {}
    for name, value in state.items():
        for dino_name, their_name in names.items():
            name = name.replace(dino_name, their_name)
        if "attn.qkv" in name:
            for part, rows in zip(("query", "key", "value"), value.chunk(3)):
                part_name = name.replace("attn.qkv", f"attention.attention.{part}")
                renamed[part_name] = rows.clone()
        else:
            renamed[name] = value
    return renamed


@pytest.mark.parametrize("prefix", ["", "vit."])
def test_vit_of_hugging_face(tmp_path, prefix):
    state = in_names_of_hugging_face(vit_weights(), HUGGING_FACE_VIT_NAMES)
    state = with_prefix(prefix, state)
    state |= {"pooler.dense.weight": torch.ones(DIM, DIM), "classifier.bias": torch.ones(3)}
    assert_same_weights(load(tmp_path, state).backbone, vit_weights())


@pytest.mark.parametrize(
    "registers,prefix", [(0, ""), (0, "dinov2."), (4, "dinov2_with_registers.")]
)
def test_dinov2_of_hugging_face(tmp_path, registers, prefix):
    state = vit_weights(14, registers=registers, layer_scale=True)
    state = in_names_of_hugging_face(state, HUGGING_FACE_DINOV2_NAMES)
    state["embeddings.mask_token"] = torch.ones(1, DIM)
    backbone = load(tmp_path, with_prefix(prefix, state)).backbone
    assert_outputs(backbone, 42, 84, DINOV2_OUTPUTS[registers, 42, 84])


def in_memory_names_of_hugging_face(state: dict) -> dict:
    """Weights of Hugging Face's files in the names that transformers 5 has in memory."""
    renamed = {}
    for name, value in state.items():
        name = re.sub(r"attention\.attention\.([qkv])[a-z]+\.", r"attention.\1_proj.", name)
        name = name.replace("attention.output.dense", "attention.o_proj")
        if "layernorm_before" in "".join(state):  # ViT; Dinov2 has the names of its file
            name = name.replace("encoder.layer.", "layers.").replace(
                "intermediate.dense", "mlp.fc1"
            )
            name = name.replace("output.dense", "mlp.fc2")
        renamed[name] = value
    return renamed


@pytest.mark.parametrize("prefix", ["", "vit.", "model.vit."])
def test_hugging_face_in_memory(tmp_path, prefix):
    state = in_names_of_hugging_face(vit_weights(), HUGGING_FACE_VIT_NAMES)
    state = with_prefix(prefix, in_memory_names_of_hugging_face(state))
    assert f"{prefix}layers.1.attention.q_proj.weight" in state
    assert_same_weights(load(tmp_path, state).backbone, vit_weights())

    state = vit_weights(14, registers=4, layer_scale=True)
    state = in_names_of_hugging_face(state, HUGGING_FACE_DINOV2_NAMES)
    state = with_prefix(prefix, in_memory_names_of_hugging_face(state))
    assert_outputs(load(tmp_path, state).backbone, 42, 84, DINOV2_OUTPUTS[4, 42, 84])


def save_folder(folder: Path, config, name: str = "model.safetensors", **kwargs):
    """A folder as save_pretrained of Hugging Face leaves it."""
    folder.mkdir(exist_ok=True)
    state = in_names_of_hugging_face(vit_weights(**kwargs), HUGGING_FACE_VIT_NAMES)
    if name.endswith(".safetensors"):
        safetensors.torch.save_file(state, folder / name)
    else:
        torch.save(state, folder / name)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))


HUGGING_FACE_CONFIG = {
    "model_type": "vit",
    "num_attention_heads": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-4,
    "image_size": [16, 80],
    "patch_size": 8,
}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_hugging_face(tmp_path, name):
    """Its config.json says what shapes do not tell."""
    folder = tmp_path / "my-vit"
    save_folder(folder, HUGGING_FACE_CONFIG, name, tokens=21)
    assert runs.checkpoint_path(str(folder)) == str(folder / name)  # on the command line
    for source in (folder, folder / name):
        loaded = load_backbone(str(source))
        assert loaded.description == "weights, 4 heads, grid 2×10"
        assert loaded.backbone.norm.eps == loaded.backbone.blocks[1].norm2.eps == 1e-4
        assert_same_weights(loaded.backbone, vit_weights(tokens=21))
    loaded = load_backbone(str(folder), heads=8, grid=(4, 5))  # these are for other files
    assert loaded.description == "weights, 4 heads, grid 2×10"
    assert loaded.unstated == set()

    # sides of patches may be a list, and the ViT a part of a larger model
    for config in (
        HUGGING_FACE_CONFIG | {"patch_size": [8, 8]},
        {"decoder": {"num_attention_heads": 8}, "encoder": HUGGING_FACE_CONFIG},
    ):
        (folder / "config.json").write_text(json.dumps(config))
        loaded = load_backbone(str(folder))
        assert loaded.description == "weights, 4 heads, grid 2×10"
        assert loaded.backbone.norm.eps == 1e-4
    of_others = {
        "text_config": HUGGING_FACE_CONFIG,
        "vision": HUGGING_FACE_CONFIG | {"hidden_size": 7},
    }
    (folder / "config.json").write_text(json.dumps(of_others))
    assert "2 heads (assumed; " in load_backbone(str(folder), grid=(2, 10)).description

    (folder / "model.safetensors.index.json").write_text("{}")
    shutil.move(folder / name, tmp_path / "elsewhere.safetensors")
    for source in (folder, folder / "ckpt.pth"):
        with pytest.raises(FileNotFoundError, match="my-vit: its weights are in several files"):
            load_backbone(str(source))
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="my-vit: a folder without ckpt.pth, model"):
        load_backbone(str(folder))


@pytest.mark.parametrize(
    "config, named",
    [
        (HUGGING_FACE_CONFIG | {"hidden_act": "quick_gelu"}, "hidden_act quick_gelu; only gelu"),
        (
            HUGGING_FACE_CONFIG | {"num_attention_heads": "x"},
            "num_attention_heads is not a positive",
        ),
        (
            HUGGING_FACE_CONFIG | {"num_attention_heads": -1},
            "num_attention_heads is not a positive",
        ),
        (HUGGING_FACE_CONFIG | {"num_attention_heads": 5}, "--heads 5: use a divisor"),
        (HUGGING_FACE_CONFIG | {"layer_norm_eps": [1]}, "layer_norm_eps is not a positive number"),
        ("{", "config.json cannot be read"),
    ],
    ids=str,
)
def test_a_config_that_vit_py_does_not_have_is_refused(tmp_path, config, named):
    save_folder(tmp_path / "my-vit", config)
    with pytest.raises(ValueError, match=named) as error:
        load_backbone(str(tmp_path / "my-vit"))
    assert "\n" not in str(error.value)


def test_positions_of_registers_are_added_to_them(tmp_path):
    """timm's own networks with registers have positions for them, between [CLS] and the patches."""
    expected = vit_weights(registers=3)
    positions = torch.full((1, 3, DIM), 0.25)
    pos_embed = expected["pos_embed"]
    given = expected | {
        "register_tokens": expected["register_tokens"] - positions,
        "pos_embed": torch.cat([pos_embed[:, :1], positions, pos_embed[:, 1:]], dim=1),
    }
    loaded = load(tmp_path, given)
    for name, value in loaded.backbone.state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_positions_that_may_or_may_not_be_those_of_registers_need_a_grid(tmp_path):
    """Of 9 positions with 4 registers, 9 or 4 may be those of patches."""
    state = vit_weights(registers=4, tokens=9)
    with pytest.raises(ValueError, match="positions are for 9 or 4 patches; use --grid RxC"):
        load(tmp_path, state)
    assert load(tmp_path, state, grid=(2, 2)).backbone.grid == (2, 2)
    assert load(tmp_path, state, grid=(3, 3)).backbone.grid == (3, 3)
    assert load(tmp_path, state, grid=(2, 4)).backbone.grid == (2, 4)


def test_a_config_that_says_nothing_is_ignored(tmp_path):
    for config in ([], {"architecture": "vit_tiny"}, {"image_size": "x", "patch_size": 0}):
        save_folder(tmp_path / "my-vit", config)
        loaded = load_backbone(str(tmp_path / "my-vit"))
        assert "2 heads (assumed; override with --heads), grid 5×5 (assumed" in loaded.description


# ----------------------------------------------------------- layouts that differ from DINO's network


def test_without_a_bias_of_queries_keys_and_values_it_is_zero(tmp_path):
    zero = {
        name: torch.zeros_like(value) if "qkv.bias" in name else value
        for name, value in vit_weights().items()
    }
    state = without("qkv.bias", vit_weights())
    assert_same_weights(load(tmp_path, state).backbone, zero)
    assert_same_weights(
        load(tmp_path, in_names_of_hugging_face(state, HUGGING_FACE_VIT_NAMES)).backbone, zero
    )


@pytest.mark.parametrize("units", [1, 100, 129, 300])
def test_mlps_of_any_width(tmp_path, units):
    """Units that fill the width up change nothing, also not when they are trained."""
    state = vit_weights(depth=1)
    for name in ("weight", "bias"):
        state[f"blocks.0.mlp.fc1.{name}"] = state[f"blocks.0.mlp.fc1.{name}"][:units].clone()
    state["blocks.0.mlp.fc2.weight"] = state["blocks.0.mlp.fc2.weight"][:, :units].clone()
    backbone = load(tmp_path, state).backbone
    assert backbone.shape.mlp_ratio == -(-units // DIM)

    x = noise(2, 3, DIM)
    mlp = backbone.blocks[0].mlp
    hidden = F.gelu(F.linear(x, state["blocks.0.mlp.fc1.weight"], state["blocks.0.mlp.fc1.bias"]))
    expected = F.linear(hidden, state["blocks.0.mlp.fc2.weight"], state["blocks.0.mlp.fc2.bias"])
    torch.testing.assert_close(mlp(x), expected, atol=1e-5, rtol=1e-5)
    mlp(x).square().sum().backward()
    assert mlp.fc1.weight.grad[:units].abs().sum() > 0
    assert mlp.fc1.weight.grad[units:].abs().sum() == 0
    assert mlp.fc2.weight.grad[:, units:].abs().sum() == 0


def deit3_weights() -> dict:
    """DeiT III in its own names: gamma_1 and gamma_2 in a block, positions of the patches alone."""
    state = {}
    for name, value in vit_weights(layer_scale=True).items():
        state[name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")] = value
    state["pos_embed"] = state["pos_embed"][:, 1:].clone()
    return state | {"head.weight": torch.ones(3, DIM), "head.bias": torch.ones(3)}


def test_deit3(tmp_path):
    timm_names = vit_weights(layer_scale=True)
    timm_names["pos_embed"] = timm_names["pos_embed"][:, 1:].clone()
    expected = load(tmp_path, timm_names)
    state = deit3_weights()
    deit_args = argparse.Namespace(model="deit_small_patch16_LS")
    for name, content in (
        ("deit_3_small_224_1k.pth", {"model": state}),
        ("DeiT3.pth", state),
        ("checkpoint.pth", {"model": state, "epoch": 800, "args": deit_args}),
        ("checkpoint.pth", {"model_ema": state, "arch": "deit_small_patch16_LS"}),
        ("deit3-of-europe.pth", state),
        ("deit_3/model.pth", state),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save(content, tmp_path / name)
        loaded = load_backbone(str(tmp_path / name))
        assert_same_weights(loaded.backbone, expected.backbone.state_dict())
        assert loaded.remarks == ["it was taken for DeiT III, which has no rotary positions"]
    assert expected.remarks == []


def test_rotary_positions_that_are_in_no_file_are_not_overlooked(tmp_path):
    """timm's rope_ape has the names and shapes of DeiT III; others have no positions in a file."""
    state = deit3_weights()
    rope_args = argparse.Namespace(model="rope_axial_ape_deit_small_patch16_LS")
    for name, content in (
        ("w.pth", state),
        ("w.pth", {"state_dict": state}),
        ("w.pth", {"model": state}),
        ("w.pth", {"model": state, "arch": "vit_small_patch16_rope_ape_224"}),
        ("w.pth", {"model": state, "args": rope_args}),
        ("deit.pth", {"model": state, "args": rope_args}),
        ("rope_deit.pth", {"model": state}),
        ("deit.axial-rope.pth", state),
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match="gamma_1: rotary positions may be missing; if"):
            load_backbone(str(tmp_path / name))
    with pytest.raises(ValueError, match="no pos_embed beside model.cls_token, nor DINOv3's"):
        load(tmp_path, {"model": without("pos_embed", state)})


# ------------------------------------------------------------------------------------------ DINOv3


def dinov3_weights() -> dict:
    """A small DINOv3 in Meta's names. The bias of its keys is masked, and so without effect."""
    state = without("pos_embed", vit_weights(registers=4, layer_scale=True))
    state["storage_tokens"] = state.pop("register_tokens")
    state["mask_token"] = torch.ones(1, DIM)
    state["rope_embed.periods"] = 100.0 ** (torch.arange(16) / 16)
    for block in range(2):
        mask = torch.ones(3, DIM)
        mask[1] = 0
        state[f"blocks.{block}.attn.qkv.bias_mask"] = mask.flatten()
    return state


def dinov3_of_hugging_face(layers: str) -> dict:
    """The same in Hugging Face's names; `layers` is what the name of a block begins with."""
    replacements = {
        "storage_tokens": "register_tokens",
        "patch_embed.proj": "embeddings.patch_embeddings",
        "blocks.": layers,
        "attn.proj": "attention.o_proj",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
        "mlp.fc1": "mlp.up_proj",
        "mlp.fc2": "mlp.down_proj",
    }
    state = {}
    for name, value in without("bias_mask", without("rope_", dinov3_weights())).items():
        for dino_name, their_name in replacements.items():
            name = name.replace(dino_name, their_name)
        if name.endswith(("_token", "_tokens")):
            name = f"embeddings.{name}"
        if "attn.qkv" in name:
            for part, rows in zip("qkv", value.chunk(3)):
                if (part, name[-5:]) != ("k", ".bias"):
                    state[name.replace("attn.qkv", f"attention.{part}_proj")] = rows.clone()
        else:
            state[name] = value
    return state


def dinov3_of_timm() -> dict:
    """The same in the names of timm's vit_small_patch16_dinov3_qkvb."""
    state = {}
    for name, value in without("bias_mask", without("rope_", dinov3_weights())).items():
        name = name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
        name = name.replace("storage_tokens", "reg_token")
        if name.endswith("qkv.bias"):
            q, _, v = value.chunk(3)
            state[name.replace("qkv.bias", "q_bias")] = q.clone()
            state[name.replace("qkv.bias", "v_bias")] = v.clone()
        else:
            state[name] = value
    del state["mask_token"]
    return state


def test_dinov3_in_all_names_is_one_network(tmp_path):
    meta = load(tmp_path, dinov3_weights())
    assert meta.description == "weights, 2 heads, rotary positions"
    assert meta.backbone.shape.rotary
    assert meta.backbone.norm.eps == meta.backbone.blocks[0].norm1.eps == 1e-5
    assert meta.backbone.blocks[0].attn.qkv.bias[DIM : 2 * DIM].abs().max() == 0
    layer_scale = dinov3_weights()["blocks.1.ls1.gamma"]
    projection = layer_scale[:, None] * dinov3_weights()["blocks.1.attn.proj.weight"]
    torch.testing.assert_close(meta.backbone.blocks[1].attn.proj.weight, projection)

    expected = meta.backbone.state_dict()
    in_training = {name.replace("blocks.", "blocks.0."): v for name, v in dinov3_weights().items()}
    saved = dinov3_of_hugging_face("layer.")
    for content in (
        {"teacher": with_prefix("backbone.", in_training)},
        saved,
        with_prefix("model.", saved),
        dinov3_of_hugging_face("model.layer."),
        with_prefix("backbone.", dinov3_of_hugging_face("model.layer.")),
        dinov3_of_timm(),
    ):
        loaded = load(tmp_path, content)
        assert_same_weights(loaded.backbone, expected)
        assert loaded.backbone.shape == meta.backbone.shape
        assert "rotary positions" in loaded.description
    assert "2 heads (assumed; override with --heads)" in loaded.description

    # timm's models without "_qkvb" have no bias at all
    no_bias = without("_bias", dinov3_of_timm())
    bias = load(tmp_path, no_bias).backbone.blocks[0].attn.qkv.bias
    assert bias.shape == (3 * DIM,)
    assert bias.abs().max() == 0


def test_periods_of_a_file_are_kept(tmp_path):
    """Meta's files have them in bfloat16, and its code computes with these."""
    state = dinov3_weights()
    state["rope_embed.periods"] = state["rope_embed.periods"].bfloat16()
    periods = load(tmp_path, state).backbone.rope_embed.periods
    assert torch.equal(periods, state["rope_embed.periods"].float())
    # 8 periods are for heads that are 32 wide
    state["rope_embed.periods"] = state["rope_embed.periods"][::2].clone()
    assert load(tmp_path, state).backbone.shape.heads == 4


@pytest.mark.parametrize("name", ["w1", "w2", "fc1_g", "gate_proj"])
def test_dinov3_with_a_gate_is_refused_by_name(tmp_path, name):
    if name == "gate_proj":
        state = dinov3_of_hugging_face("layer.")
        state["layer.0.mlp.gate_proj.weight"] = torch.ones(DIM, DIM)
    else:
        state = without("mlp.fc1", dinov3_weights())
        state[f"blocks.0.mlp.{name}.weight"] = torch.ones(DIM, DIM)
        state["blocks.0.mlp.w1.weight"] = torch.ones(DIM, DIM)
    with pytest.raises(ValueError, match=r"SwiGLU\) are not read, such as DINOv3's S\+"):
        load(tmp_path, state)


def test_what_rotary_positions_do_not_have(tmp_path):
    """The periods of a file state the heads, and there is no grid; flags are for other files."""
    loaded = load(tmp_path, dinov3_weights(), heads=4, grid=(4, 4))
    assert loaded.description == "weights, 2 heads, rotary positions"
    assert loaded.unstated == set()
    with pytest.raises(ValueError, match="no pos_embed beside cls_token, nor DINOv3's"):
        load(tmp_path, without("storage", without("rope_", dinov3_weights())))


# ------------------------------------------------------- beside the code of timm and transformers


def randomize(network: torch.nn.Module):
    """Give a network weights with which attention is far from uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            is_scale = parameter.ndim == 1 and ("norm" in name and name.endswith("weight"))
            if is_scale or name.endswith(("gamma_1", "gamma_2", "gamma", "lambda1")):
                parameter.copy_(1 + 0.1 * draw)
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * draw)
            else:
                parameter.copy_(draw * 0.15)


def assert_parity(backbone: VisionTransformer, images, feature, cls_rows):
    """The feature of [CLS] (B, dim) and its last attention (B, heads, N) are the expected ones."""
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), feature, atol=1e-5, rtol=0)
        found = backbone.get_last_selfattention(images, num_queries=1)[:, :, 0]
        torch.testing.assert_close(found, cls_rows, atol=1e-5, rtol=0)


def timm_outputs(network, images):
    """Feature and last attention of [CLS] of timm's network."""
    attentions = []
    attention = network.blocks[-1].attn
    attention.fused_attn = False  # else the matrix is never there
    attention.attn_drop.register_forward_hook(lambda module, args, out: attentions.append(out))
    with torch.no_grad():
        feature = network.forward_features(images)[:, 0]
    return feature, attentions[0][:, :, 0]


SMALL_TIMM = {"embed_dim": 128, "depth": 2, "num_heads": 2, "num_classes": 0}
TIMM_MODELS = [
    ("vit_small_patch16_224", {"img_size": 64, "reg_tokens": 4}, [(64, 64)]),
    (
        "vit_small_patch16_224",
        {"img_size": 64, "reg_tokens": 3, "no_embed_class": True},
        [(64, 64)],
    ),
    ("vit_small_patch16_dinov3", {}, [(64, 64), (32, 112)]),
    ("vit_small_patch16_dinov3_qkvb", {}, [(64, 64), (32, 112)]),
    ("vit_small_patch16_224", {"img_size": 64}, [(64, 64)]),
    ("vit_small_patch16_224", {"img_size": 64, "qkv_bias": False}, [(64, 64)]),
    ("vit_small_patch16_224", {"img_size": 64, "mlp_ratio": 2.6}, [(64, 64)]),
    ("deit3_small_patch16_224", {"img_size": 64}, [(64, 64)]),
    ("vit_small_patch14_reg4_dinov2", {"img_size": 56}, [(56, 56)]),
]


@pytest.mark.parametrize("name, changes, sizes", TIMM_MODELS)
def test_parity_with_timm(tmp_path, name, changes, sizes):
    timm = pytest.importorskip("timm")
    network = timm.create_model(name, **SMALL_TIMM | changes).eval()
    randomize(network)
    loaded = load(tmp_path, network.state_dict())
    for height, width in sizes:
        images = noise(2, 3, height, width)
        assert_parity(loaded.backbone, images, *timm_outputs(network, images))


@pytest.mark.parametrize("name", ["rope_ape", "rope", "rope_mixed", "rope_mixed_ape"])
def test_other_rotary_positions_of_timm_are_refused(tmp_path, name):
    timm = pytest.importorskip("timm")
    network = timm.create_model(f"vit_small_patch16_{name}_224", **SMALL_TIMM, img_size=64)
    for content in (network.state_dict(), {"model": network.state_dict()}):
        with pytest.raises(ValueError, match="rotary positions|rope.freqs: not a part"):
            load(tmp_path, content)


HUGGING_FACE_MODELS = [
    ("DINOv3ViT", {"num_register_tokens": 4}, [(64, 64), (32, 112)]),
    ("ViT", {}, [(64, 64)]),
    ("ViT", {"qkv_bias": False, "intermediate_size": 200}, [(64, 64)]),
    ("Dinov2", {}, [(64, 64)]),
    ("Dinov2WithRegisters", {}, [(64, 64), (32, 112)]),
    ("ViTMAE", {"mask_ratio": 0.0}, [(64, 64)]),
]


@pytest.mark.parametrize("name, changes, sizes", HUGGING_FACE_MODELS)
def test_parity_with_transformers(tmp_path, name, changes, sizes):
    """As saved, whose config.json says the heads, and as in memory."""
    transformers = pytest.importorskip("transformers")
    settings = {
        "hidden_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 384,
        "image_size": 64,
        "patch_size": 16,
        "attn_implementation": "eager",
    }
    config = getattr(transformers, f"{name}Config")(**settings | changes)
    network = getattr(transformers, f"{name}Model")(config).eval()
    randomize(network)
    network.save_pretrained(tmp_path / "saved")
    saved = load_backbone(str(tmp_path / "saved"))
    assert "3 heads, " in saved.description
    in_memory = load(tmp_path, network.state_dict(), heads=3)
    for height, width in sizes:
        images = noise(2, 3, height, width)
        kwargs = {}
        if name == "ViTMAE":  # which otherwise shuffles the patches
            patches = height * width // 256
            kwargs["noise"] = torch.arange(patches).expand(2, -1)
        with torch.no_grad():
            out = network(images, output_attentions=True, **kwargs)
        feature = out.last_hidden_state[:, 0]
        cls_rows = out.attentions[-1][:, :, 0]
        assert_parity(saved.backbone, images, feature, cls_rows)
        assert_parity(in_memory.backbone, images, feature, cls_rows)


# ------------------------------------------------------------------------- wrappers, and the choice

ONE_BLOCK = vit_weights(depth=1)
SMALLER_GRID = vit_weights(depth=1, tokens=10)


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "backbone.",
        "encoder.",
        "model.",
        "vit.",
        "base_encoder.",
        "momentum_encoder.",
        "teacher.",
        "student.",
        "teacher_backbone.",
        "student_backbone.",
        "_orig_mod.module.backbone.",
        "model.vit.",
        "visual_encoder.",
        "student_backbone.vit.",
        "module.model.encoder.backbone.",
        "momentum_backbone.",
        "dinov2.",
    ],
)
def test_weights_behind_any_prefix(tmp_path, prefix):
    head_and_loss = {"head.weight": torch.ones(3, DIM), "criterion.center": torch.ones(3)}
    content = with_prefix(prefix, ONE_BLOCK) | head_and_loss
    assert_same_weights(load(tmp_path, content).backbone, ONE_BLOCK)


@pytest.mark.parametrize(
    "key",
    [
        "teacher",
        "momentum",
        "state_dict_ema",
        "model_ema",
        "student",
        "model",
        "state_dict",
        "model_state_dict",
        "net",
    ],
)
def test_weights_under_any_key(tmp_path, key):
    content = {
        "optimizer": {"state": SMALLER_GRID},
        key: with_prefix("module.", ONE_BLOCK),
        "epoch": 3,
    }
    loaded = load(tmp_path, content)
    assert_same_weights(loaded.backbone, ONE_BLOCK)
    assert loaded.description.startswith(f"{key}.module, 2 heads (assumed")

    # a dict that holds itself
    content["net" if key == "model" else "model"] = content
    assert_same_weights(load(tmp_path, content).backbone, ONE_BLOCK)


@pytest.mark.parametrize(
    "student,teacher",
    [
        ("student.module.backbone", "teacher.backbone"),
        ("state_dict", "state_dict_ema"),
        ("model", "model_ema"),
        ("state_dict.module.base_encoder", "state_dict.module.momentum_encoder"),
        ("state_dict.student_backbone.vit", "state_dict.teacher_backbone.vit"),
        ("state_dict.backbone", "state_dict.momentum_backbone"),
        ("model", "ema"),
        ("model", "ema_model.module"),
        ("model", "ema_state_dict"),
        ("model", "net_EMA"),
        ("state_dict.net", "state_dict.net_ema"),
        ("encoder", "target_encoder"),
        ("state_dict.backbone", "state_dict.teacher_model"),
        ("model", "swa_model.module"),
        ("weights.visual", "averaged.visual"),
    ],
)
@pytest.mark.parametrize("teacher_is_first", [False, True])
def test_the_moving_average_is_taken_and_the_description_says_so(
    tmp_path, student, teacher, teacher_is_first
):
    networks = [(student, SMALLER_GRID), (teacher, ONE_BLOCK)]
    if teacher_is_first:
        networks.reverse()
    content = {}
    for place, state in networks:
        key, _, prefix = place.partition(".")
        if prefix:
            state = with_prefix(f"{prefix}.", state)
        content[key] = content.get(key, {}) | state
    loaded = load(tmp_path, content)
    assert_same_weights(loaded.backbone, ONE_BLOCK)
    assert loaded.description.startswith(f"{teacher} (not {student}), ")


@pytest.mark.parametrize(
    "content, described",
    [
        ({"model": ONE_BLOCK, "slow": SMALLER_GRID}, "model (not slow), "),
        ({"model_no_ema": SMALLER_GRID, "polyak": ONE_BLOCK}, "polyak (not model_no_ema), "),
        ({"model": SMALLER_GRID, "modelEma": ONE_BLOCK}, "modelEma (not model), "),
        ({"model": SMALLER_GRID, "EMAModel": ONE_BLOCK}, "EMAModel (not model), "),
        # a moving average that lacks a part
        ({"model": ONE_BLOCK, "ema": without("patch_embed", ONE_BLOCK)}, "model (not ema), "),
        # names without dots
        (
            {"state_dict": with_prefix("net.", ONE_BLOCK) | {"net_ema.normbias": torch.ones(3)}},
            "state_dict.net (not state_dict.net_ema), ",
        ),
        (
            {"model": ONE_BLOCK, "callbacks": {"EMA": {"state": ONE_BLOCK}}},
            "model (not callbacks.EMA), ",
        ),
        (
            {"model": ONE_BLOCK, "extra": {"ema": {"params": [torch.ones(3)]}}},
            "model (not extra.ema), ",
        ),
        ({"model": ONE_BLOCK, "optimizer": {"exp_avg": torch.ones(3)}}, "model, "),
        (
            with_prefix("encoder.", ONE_BLOCK) | with_prefix("slow.copy.", SMALLER_GRID),
            "encoder (not slow.copy), ",
        ),
        # a moving average without the names of its tensors
        ({"model": ONE_BLOCK, "ema": [torch.ones(3)]}, "model (not ema), "),
        (
            {"model": ONE_BLOCK, "ema": {"decay": 0.9, "shadow_params": [torch.ones(3)]}},
            "model (not ema), ",
        ),
        ({"model": ONE_BLOCK, "ema_decay": 0.9, "ema_losses": [0.3]}, "model, "),
        ({"student": ONE_BLOCK, "teacher_head": {"weight": torch.ones(3)}}, "student, "),
        (
            {"model": ONE_BLOCK} | {f"copy_{n}\n\x1b[31m": dict(ONE_BLOCK) for n in range(5)},
            "model (not copy_0 [31m, copy_1 [31m, copy_2 [31m, …), ",
        ),
    ],
)
def test_a_network_that_was_passed_over_is_named(tmp_path, content, described):
    loaded = load(tmp_path, content)
    assert_same_weights(loaded.backbone, ONE_BLOCK)
    assert loaded.description.startswith(described)


# ------------------------------------------------------------ what shapes do not tell, refusals


def test_assumed_heads_and_grid_are_described(tmp_path):
    state = vit_weights(tokens=17)
    assert load(tmp_path, state).description == (
        "weights, 2 heads (assumed; override with --heads), "
        "grid 4×4 (assumed; override with --grid)"
    )
    loaded = load(tmp_path, state, heads=4, grid=(2, 8))
    assert loaded.description == "weights, 4 heads, grid 2×8"
    assert loaded.backbone.shape.heads == 4
    assert loaded.backbone.grid == (2, 8)


def test_heads_of_a_run_are_known_whatever_is_given(tmp_path):
    content = own_checkpoint(with_prefix("backbone.", vit_weights()), heads=4)
    loaded = load(tmp_path, content, heads=8)
    assert loaded.backbone.shape.heads == 4
    assert loaded.description == "teacher.backbone, 4 heads, grid 5×5"
    assert loaded.is_ours

    # 36 patches could be 6 × 6.
    teacher = with_prefix("backbone.", vit_weights(tokens=37))
    content = own_checkpoint(teacher, heads=4, patch_size=8, pos_size=(32, 72))
    for grid in (None, (6, 6)):
        assert (
            load(tmp_path, content, grid=grid).description == "teacher.backbone, 4 heads, grid 4×9"
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {"heads": 1, "lr": 0.1, "epochs": 3, "batch_size": 8, "seed": 0}},
        {"config": None},
        {"epoch": "last"},
        {"metrics": {"accuracy": 0.9}},
        {"metrics": [0.9, 0.95]},
        {"teacher": None, "model": vit_weights()},
    ],
    ids=str,
)
def test_a_file_that_shares_our_keys_is_not_ours(tmp_path, changes):
    """What it says of heads is not believed, and what is given wins."""
    content = own_checkpoint(with_prefix("backbone.", vit_weights()), heads=1) | changes
    loaded = load(tmp_path, content, heads=4)
    assert not loaded.is_ours
    assert loaded.backbone.shape.heads == 4
    assert "2 heads (assumed; " in load(tmp_path, content).description


@pytest.mark.parametrize(
    "kwargs", [{"heads": 5}, {"heads": -1}, {"grid": (3, 5)}, {"grid": (99999, 1)}], ids=str
)
def test_heads_and_grids_that_do_not_fit_are_refused_in_one_line(tmp_path, kwargs):
    with pytest.raises(ValueError, match="w.pth") as error:
        load(tmp_path, vit_weights(tokens=17), **kwargs)
    assert "\n" not in str(error.value)


def refused_layouts() -> dict:
    """{what the message names: content} of files whose network is not that of vit.py."""
    state = vit_weights()
    swiglu = without("mlp", state) | {"blocks.0.mlp.w12.weight": torch.ones(3, DIM)}
    gate_proj = without("mlp.fc1", state) | {"blocks.0.mlp.gate_proj.bias": torch.ones(3)}
    packed = {
        name: torch.cat([value, value]) if "mlp.fc1" in name else value
        for name, value in state.items()
    }
    in_two_places = state | {"embeddings.cls_token": state["cls_token"]}
    beit = without("qkv.bias", state) | {"blocks.0.attn.q_bias": torch.ones(DIM)}
    return {
        "dist_token": vit_weights(tokens=27) | {"dist_token": torch.ones(1, 1, DIM)},
        "blocks.0.mlp.w12.weight": swiglu,
        "blocks.1.attn.rel_pos": state | {"blocks.1.attn.rel_pos": torch.ones(3)},
        "norm_pre.weight": state | {"norm_pre.weight": torch.ones(DIM)},
        "blocks.0.ls1": state | {"blocks.0.ls1x.gamma": torch.ones(DIM)},
        # MLPs with a gate, in other names
        "blocks.0.mlp.gate_proj.bias: MLPs with a gate (SwiGLU) are not read": gate_proj,
        "blocks.0.mlp.fc1.weight: MLPs with a gate (SwiGLU) are not read": packed,
        # a part that is missing, alone
        "(no blocks.1.attn.qkv.bias)": without("blocks.1.attn.qkv.bias", state),
        "(no blocks.0.attn.qkv.weight)": without("blocks.0.attn.qkv.weight", state),
        "(no blocks.0.mlp.fc2.bias)": without("blocks.0.mlp.fc2.bias", state),
        "(no norm.bias)": {name: value for name, value in state.items() if name != "norm.bias"},
        "(no patch_embed.proj.weight beside cls_token)": without("patch_embed.proj.weight", state),
        "(no pos_embed beside cls_token, nor DINOv3's rotary positions)": without("pos_", state),
        "(no cls_token among its keys: pos_embed, patch_embed.proj.weight,": without("cls_", state),
        "cls_token is there under two names": in_two_places,
        "blocks.0.attn.q_bias: not a part of the ViT here": beit,
        # for gray images; for a grid that is no square
        "patch_embed.proj.weight is 128×1×8×8 where 128×3×8×8 is needed": state
        | {"patch_embed.proj.weight": torch.ones(DIM, 1, 8, 8)},
        "28 positions do not fill a grid of 5×5; use --grid": vit_weights(tokens=29),
        # names of torchvision, of other projects, and of no tensors at all
        "(no cls_token, patch_embed, pos_embed among its keys: class_token, conv_proj.weight, …)": {
            "class_token": torch.ones(1, 1, DIM),
            "conv_proj.weight": torch.ones(DIM, 3, 8, 8),
        },
        "keys: model.transformer.x": {"model": {"transformer.x": torch.ones(3)}, "epoch": 3},
        "among its keys: no tensors, …": {"epoch": 3, "history": []},
    }


REFUSED_LAYOUTS = refused_layouts()


@pytest.mark.parametrize("named", REFUSED_LAYOUTS)
def test_what_would_change_the_network_is_refused_by_name(tmp_path, named):
    with pytest.raises(
        ValueError, match="w.pth: unsupported checkpoint; docs/weights.md "
    ) as error:
        load(tmp_path, REFUSED_LAYOUTS[named])
    message = str(error.value)
    assert named in message
    assert "\n" not in message
    assert len(message) - len(str(tmp_path)) < 200
    assert not re.search(r"torch|Error|object|'\w+'", message)


def test_without_a_final_norm_maps_are_the_same_and_a_new_one_is_described(tmp_path):
    """MAE's fine-tuned networks have a norm of the patches' mean in its place."""
    complete = load(tmp_path, vit_weights())
    mean_of_patches = {"fc_norm.weight": torch.ones(DIM), "fc_norm.bias": torch.ones(DIM)}
    loaded = load(tmp_path, without("norm.", vit_weights()) | mean_of_patches)
    images = noise(1, 3, 40, 40)
    attention = complete.backbone.get_last_selfattention(images)
    assert torch.equal(loaded.backbone.get_last_selfattention(images), attention)

    x = complete.backbone.before_last_block(images)
    cls = complete.backbone.blocks[-1](x, num_queries=1)[:, 0]
    torch.testing.assert_close(loaded.backbone(images), F.layer_norm(cls, (DIM,), eps=1e-6))
    assert "no final norm" in loaded.remarks[1]
    on_the_mean = "it was trained on the mean of its patches (fc_norm), not on [CLS]"
    assert loaded.remarks[0] == on_the_mean
    assert load(tmp_path, vit_weights() | mean_of_patches).remarks == [on_the_mean]
    assert complete.remarks == []


# ----------------------------------------------------------------------------------- reading files


def test_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(vit_weights() | {"head.bias": torch.ones(3)}, path)
    assert_same_weights(load_backbone(str(path)).backbone, vit_weights())

    complete = path.read_bytes()
    for content in (b"", complete[:5], complete[:500], complete[:-9], b"\xff" * 99):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="model.safetensors is no PyTorch"):
            load_backbone(str(path))


def test_safetensors_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match="w.safetensors needs .*pip install safetensors"):
        load_backbone(str(path))


@pytest.mark.parametrize("prefix", ["masked_model.", "overhead_vit.", "maskfeat.backbone."])
def test_a_name_that_only_resembles_that_of_a_head_is_read(tmp_path, prefix):
    loaded = load(tmp_path, with_prefix(prefix, vit_weights()))
    assert_same_weights(loaded.backbone, vit_weights())


@pytest.mark.parametrize("prefix", ["decoder.", "module.pixel_decoder_vit.", "predictor."])
def test_a_decoder_is_not_taken_for_the_network(tmp_path, prefix):
    with pytest.raises(ValueError, match="unsupported checkpoint"):
        load(tmp_path, with_prefix(prefix, vit_weights()))


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.pth: no such file; use"):
        load_backbone(str(tmp_path / "missing.pth"))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path.name}: a folder without ckpt.pth"):
        load_backbone(str(tmp_path))
    torch.save(vit_weights(), tmp_path / "ckpt.pth")
    assert_same_weights(load_backbone(str(tmp_path)).backbone, vit_weights())


def test_paths_and_arrays_beside_the_weights_are_not_made(tmp_path):
    paths = [PurePosixPath("a"), PureWindowsPath("b"), Path("c")]
    arrays = [np.zeros(3, code) for code in ("f4", "i8", "u1", "?", "U3")]
    content = {
        "teacher": vit_weights(),
        "args": argparse.Namespace(paths=paths),
        "arrays": arrays,
        "best": np.float32(0.5),
    }
    loaded = load(tmp_path, content)
    assert_same_weights(loaded.backbone, vit_weights())
    values = loaded.content["args"].paths + loaded.content["arrays"]
    assert {type(value) for value in values} == {weights.Unread}
    assert loaded.content["best"] == 0.5


LAUGHS = 0  # lists in lists, with 2⁶⁰ numbers
for _ in range(60):
    LAUGHS = [LAUGHS, LAUGHS]


@pytest.mark.parametrize(
    "value",
    [{1}, "no", LAUGHS, [torch.zeros(3)], b"x"],
    ids=["set", "text", "laughs", "list", "bytes"],
)
def test_a_value_that_nobody_reads_does_no_harm(tmp_path, value):
    state = random_weights()
    assert_same_weights(load(tmp_path, state | {"x": value}).backbone, state)


@pytest.mark.parametrize(
    "content,name",
    [(torch.nn.Linear(3, 3), "linear.Linear"), ({"x": call(open, "no")}, "io.open")],
    ids=["a whole network", "a call"],
)
def test_a_class_that_could_run_code_is_named(tmp_path, content, name):
    with pytest.raises(ValueError, match=rf"{name}, .*state_dict\(\) alone"):
        load(tmp_path, content)


def test_a_flipped_bit_is_noticed_or_harmless(tmp_path):
    """Harmless are bits of the archive that hold nothing, such as its dates."""
    path = tmp_path / "ckpt.pth"
    config = asdict(config_of("--preset laptop --device cpu"))
    complete = bytes_of(
        {"config": config, "step": 2, "teacher": random_weights(replace(TINY_SHAPE, dim=8))}
    )
    path.write_bytes(complete)
    expected = bytes_of(read_checkpoint(path))
    rng = random.Random(0)
    refusals = 0
    for _ in range(200):
        flipped = bytearray(complete)
        flipped[rng.randrange(len(complete))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            content = read_checkpoint(path)
        except ValueError as error:
            refusals += 1
            assert "\n" not in str(error)
        else:
            assert bytes_of(content) == expected
    assert refusals > 50


def test_flipped_bits_of_the_archives_directory_are_noticed_or_harmless(tmp_path):
    """Every bit of one entry, which says where a record is, and whether it is a folder."""
    path = tmp_path / "w.pth"
    state = {"a": torch.arange(4.0), "b": torch.arange(4.0) + 10}
    complete = bytes_of(state)
    last_entry = complete.rindex(b"PK\x01\x02")
    refusals = 0
    for place in range(last_entry, last_entry + 46):
        for bit in range(8):
            flipped = bytearray(complete)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                content = read_checkpoint(path)
            except ValueError:
                refusals += 1
            else:
                assert bytes_of(content) == complete, place - last_entry
    assert refusals > 100
    first_entry = complete.index(b"PK\x01\x02")
    for record in range(4, 6):  # those of the tensors' numbers
        flipped = bytearray(complete)
        entry = first_entry
        for _ in range(record):
            entry = complete.index(b"PK\x01\x02", entry + 1)
        flipped[entry + 38] ^= 16
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="or it is compressed or a folder"):
            read_checkpoint(path)


def test_an_error_is_one_printable_line():
    assert weights.one_line(ValueError("a\nb\t \x1b[31mc")) == "a b [31mc"
    assert weights.one_line(MemoryError()) == "MemoryError"


# ----------------------------------------------------------------------- files that are no weights

QUICK_RUN = "--preset laptop --digits sklearn --device cpu --epochs 1 --batch-size 8 "
QUICK_RUN += "--images-per-epoch 16"


def peak_megabytes() -> int:
    """The most memory that this process has held since the last `forget_peak`."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def forget_peak():
    """Linux can forget what other tests of this process needed; elsewhere the tests see less."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def assert_refused(main, command: str, capsys, case: str):
    """The command ends with status 2, and one printable line that names the file w.pth."""
    capsys.readouterr()
    assert main(command.split()) == 2, case
    message = capsys.readouterr().err
    assert message.count("\n") == 1, (case, message)
    assert message.rstrip("\n").isprintable(), (case, message)
    assert "error: " in message, (case, message)
    assert "w.pth" in message, (case, message)
    assert len(message) < 500, (case, message)


def assert_all_refused(cases: dict, folder: Path, monkeypatch, capsys):
    """Every command that reads weights refuses each of the files {name: bytes}.

    None takes long, writes anything, or needs much memory.
    """
    monkeypatch.chdir(folder)
    Image.new("RGB", (64, 64), "white").save("a.png")
    forget_peak()
    memory_before = peak_megabytes()
    for case, content in cases.items():
        Path("w.pth").write_bytes(content)
        started = time.process_time()
        assert_refused(train.main, f"{QUICK_RUN} --weights w.pth", capsys, case)
        assert_refused(train.main, "--resume w.pth", capsys, case)
        pictures = "--image-size 32 --output out --images a.png"
        assert_refused(visualize.main, f"w.pth --device cpu {pictures}", capsys, case)
        measured = "--weights w.pth --device cpu --digits sklearn"
        assert_refused(visualize.main, measured, capsys, case)
        assert time.process_time() - started < 5, case
        assert sorted(os.listdir()) == ["a.png", "w.pth"], case
    assert peak_megabytes() - memory_before < 200


def zip_bomb(content) -> bytes:
    """A checkpoint whose records are compressed, so that a small file makes large tensors."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(bytes_of(content))) as plain,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as compressed,
    ):
        for record in plain.namelist():
            compressed.writestr(record, plain.read(record))
    return buffer.getvalue()


def claimed_tensor(size: tuple, stride: tuple):
    """An object whose pickle makes a tensor of any size from the memory of one number."""
    storage = torch.zeros(1).storage()
    return call(torch._utils._rebuild_tensor_v2, storage, 0, size, stride, False, {})


def hostile_weights(canary: Path) -> dict:
    """{name: bytes} of files that would run code, or take memory or time.

    The code would make the file `canary`.
    """
    good = random_weights()
    code = call(open, str(canary), "w")
    circle = {}
    circle["circle"] = circle
    largest = torch.zeros(max(value.numel() for value in good.values()))
    contents = {
        "code in a zip": code,
        "code among weights": good | {"x": code},
        "laughs": {"x": LAUGHS},
        "a dict that holds itself": circle,
        "a lot of memory": good | {"x": call(bytearray, 10**18)},
        "a claimed size": good | {"pos_embed": claimed_tensor((1, 10**12, 64), (1, 1, 1))},
        "a claimed size without steps": good
        | {"pos_embed": claimed_tensor((1, 10**12, 64), (0, 0, 0))},
        "expanded": {name: torch.zeros(()).expand(value.shape) for name, value in good.items()},
        "expanded beside the weights": good | {"x": torch.zeros(()).expand(10**12)},
        "shared memory": {
            name: largest[: value.numel()].view(value.shape) for name, value in good.items()
        },
        "a wide token": good | {"cls_token": torch.zeros(1, 1, 10**6)},
        "endless width": good | {"pos_embed": torch.zeros(0, 5, 10**12)},
        "a width for gigabytes": good | {"pos_embed": torch.zeros(0, 5, 4096)},
        "many blocks": good | {f"blocks.{number}.x": torch.zeros(0) for number in range(2000)},
        "many blocks of a norm": good
        | {f"blocks.{number}.norm1.bias": torch.zeros(1) for number in range(2, 2000)},
        "without memory": good | {"norm.bias": good["norm.bias"].to("meta")},
    }
    files = {name: bytes_of(content) for name, content in contents.items()}
    files["code"] = pickle.dumps(code)
    files["code in an old file"] = bytes_of(good | {"x": code}, old_format=True)
    files["zip bomb"] = zip_bomb(good | {"x": [torch.zeros(10**7)]})
    files["empty zip"] = bytes_of(good)[:30] + b"PK\5\6" + bytes(18)
    return files


def misshapen_weights() -> dict:
    """{name: bytes} of files that do not hold the weights of a ViT, or not quite."""
    good = random_weights()
    qkv_name = "blocks.0.attn.qkv.weight"
    qkv = good[qkv_name]
    contents = {
        "a list": [1, 2],
        "None": None,
        "an empty dict": {},
        "a number": 3,
        "a number in place of the teacher": {"teacher": 3},
        "numbers in place of names": dict(enumerate(good.values())),
        "empty tensors": {
            name: torch.zeros([side % 64 for side in value.shape]) for name, value in good.items()
        },
    }
    for part_of_name in (qkv_name, "blocks", "blocks.0", "pos_embed"):
        contents[f"without {part_of_name}"] = without(part_of_name, good)
    for heads in (-1, 7, "x", 10**9, 1.0, [1]):
        contents[f"{heads!r} heads"] = own_checkpoint(good, heads=heads)
    contents["norm_eps"] = own_checkpoint(good, norm_eps="x")

    values = {
        "NaN": torch.full_like(qkv, torch.nan),
        "infinity": torch.full_like(qkv, torch.inf),
        "minus infinity": torch.full_like(qkv, -torch.inf),
        "int64": qkv.to(torch.int64),
        "bool": qkv.to(torch.bool),
        "complex": qkv.to(torch.complex64),
        "transposed": qkv.mT,
        "sparse": qkv.to_sparse(),
        "sparse in rows": qkv.to_sparse_csr(),
        "too large for float32": qkv.double() + 1e300,
        "quantized": torch.quantize_per_tensor(qkv, 1, 0, torch.qint8),
    }
    for name, value in values.items():
        contents[name] = good | {qkv_name: value}

    shapes = [
        ("x", (3,)),
        ("x\ny\x1b[31m", (3,)),
        ("blocks.", (3,)),
        ("cls_token", ()),
        ("pos_embed", (1, 0, 64)),
        ("pos_embed", (1, 1, 64)),
        ("pos_embed", (1, 11, 64)),
        ("patch_embed.proj.weight", (64, 3, 9, 0)),
        ("patch_embed.proj.weight", (64, 3, 1, 8)),
    ]
    for name, shape in shapes:
        contents[f"{name} {shape}"] = good | {name: torch.zeros(shape)}
    return {name: bytes_of(content) for name, content in contents.items()}


def cut_weights() -> dict:
    """{name: bytes} of files that hold only the beginning of weights, or nothing of the sort."""
    files = {"empty": b"", "text": b"these are no weights\n" * 99}
    for old_format in (False, True):
        complete = bytes_of(random_weights(), old_format)
        lengths = [len(complete) * part // 8 for part in range(1, 8)] + [len(complete) - 9]
        for length in lengths:
            files[f"{length} bytes, old format {old_format}"] = complete[:length]
    return files


@pytest.mark.filterwarnings("ignore")  # of making some of the files
def test_hostile_weights_are_refused(tmp_path, monkeypatch, capsys):
    cases = hostile_weights(canary=tmp_path / "canary")
    assert_all_refused(cases, tmp_path, monkeypatch, capsys)


@pytest.mark.filterwarnings("ignore")  # of making some of the files
def test_misshapen_weights_are_refused(tmp_path, monkeypatch, capsys):
    assert_all_refused(misshapen_weights(), tmp_path, monkeypatch, capsys)


def test_weights_that_were_cut_off_are_refused(tmp_path, monkeypatch, capsys):
    assert_all_refused(cut_weights(), tmp_path, monkeypatch, capsys)


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The content with some of its bytes replaced, cut out or doubled."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 10))):
        start = rng.randrange(len(content) + 1)
        end = start + rng.choice((1, 8, 1000, 10**9))
        old = content[start:end]
        replacements = [
            rng.randbytes(len(old)),
            b"\0" * len(old),
            b"\xff" * len(old),
            b"",
            old * 2,
        ]
        content[start:end] = rng.choice(replacements)
    return bytes(content)


def test_mutated_weights_are_read_or_refused(tmp_path):
    state = random_weights(replace(TINY_SHAPE, dim=8))
    run = own_checkpoint(state, heads=1)
    sources = [
        bytes_of(state),
        bytes_of(state, old_format=True),
        bytes_of(run),
        bytes_of(run, old_format=True),
    ]
    path = str(tmp_path / "w.pth")
    rng = random.Random(2)
    loads = 0
    forget_peak()
    memory_before = peak_megabytes()
    for number in range(400):
        Path(path).write_bytes(mutated(sources[number % 4], rng))
        try:
            load_backbone(path)
        except ValueError as error:
            assert path in str(error), number
            assert "\n" not in str(error), number
        else:
            loads += 1
    assert 10 < loads < 390
    assert peak_megabytes() - memory_before < 300


# --------------------------------------------------------------------- runs that start from weights


def test_weights_decide_width_depth_and_patch_of_a_run(tmp_path):
    """They come before the preset, and what is given need not fit the preset.

    Its patches of 7 do not divide 64, and its width of 96 is not that of the weights.
    """
    shape = ViTShape(patch_size=8, dim=48, depth=3, heads=2, pos_size=32)
    state = random_weights(shape)
    torch.save(state, tmp_path / "w.pth")
    flags = f"{QUICK_RUN} --weights {tmp_path}/w.pth --output {tmp_path}/run"
    run = train.prepare(settings.parse_args(f"{flags} --image-size 64 --heads 16".split()))

    config = asdict(run.config)
    for name, value in asdict(replace(shape, heads=16)).items():
        assert config[name] == value, name
    assert run.student.backbone.shape == replace(shape, heads=16)
    assert_same_weights(run.student.backbone, state)
    (fallback,) = run.config.fallbacks
    assert fallback.startswith("--heads 16 cuts q, k and v of weights that were trained with 1 ")
