"""The ViT is DINO's, number for number, and weights come in from wherever they may lie."""

import argparse
import http.server
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import vit

SHIPPED = Path(__file__).parent.parent / "results" / "checkpoints" / "same.pth"


def seeded_weights(model):
    """The same weights on every machine and version: numpy's legacy stream is frozen."""
    rng = np.random.RandomState(0)
    weights = {}
    for name, value in model.state_dict().items():
        draw = torch.from_numpy(rng.standard_normal(tuple(value.shape)).astype(np.float32))
        scale = 0.5 if name == "pos_embed" else 0.07 if "qkv.weight" in name else 0.05
        weights[name] = draw * scale + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return weights


def probe(seed, n):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(n)) / n**0.5


@pytest.fixture(scope="module")
def vit_small():
    model = vit.VisionTransformer()
    model.load_state_dict(seeded_weights(model), strict=True)
    return model.eval()


# What facebookresearch/dino's vision_transformer.py gives for these weights and images: the
# feature on four random directions; the [CLS] row of each head, and all rows of each head, on
# random directions. Recorded once, from torch 2.15 on a CPU.
DINO_SAYS = {
    (224, 224): (
        [-0.150242, -1.784282, -0.765335, 1.137927],
        [0.0048521, 0.0013946, 0.0037134, 0.002393, 0.0045535, 0.0047371],
        [-0.0001739, -0.0007812, -0.0003375, -8.79e-05, -0.0011029, -0.000207],
    ),
    (112, 112): (
        [0.010489, -2.027537, -0.629411, 1.457211],
        [0.0180554, 0.0143162, 0.020309, -0.0005229, 0.0064363, 0.0011639],
        [0.0020923, -0.005943, 0.0051759, 0.0045602, 0.0027555, -0.0035697],
    ),
    (96, 160): (
        [-0.298704, -1.811566, -0.722147, 0.602407],
        [0.012376, 0.0062016, 0.0068154, -6.65e-05, 0.003651, 0.0075773],
        [0.0070136, 0.0033805, 0.0028455, 0.0140134, -0.0023843, 0.0071342],
    ),
}


@pytest.mark.parametrize("seed,size", list(enumerate(DINO_SAYS)))
def test_features_and_last_attention_are_dinos(vit_small, seed, size):
    image = torch.from_numpy(np.random.RandomState(seed).standard_normal((1, 3, *size))).float()
    with torch.no_grad():
        feature = vit_small(image)[0].double()
        attention = vit_small.get_last_selfattention(image)[0].double()  # (heads, N, N)
        cls_row = vit_small.get_last_selfattention(image, queries=1)[0, :, 0].double()
    n = attention.shape[-1]
    assert n == 1 + size[0] // 8 * (size[1] // 8)
    on_feature, on_cls, on_all = DINO_SAYS[size]
    directions = torch.stack([probe(100 + k, 384) for k in range(4)])
    np.testing.assert_allclose(directions @ feature, on_feature, atol=1e-5)
    np.testing.assert_allclose(cls_row @ probe(109, n), on_cls, atol=1e-6)
    np.testing.assert_allclose(probe(110, n) @ attention @ probe(109, n), on_all, atol=1e-6)
    np.testing.assert_allclose(attention.sum(-1), 1, atol=1e-5)


def test_parameter_names_and_count_are_dinos():
    state = vit.VisionTransformer().state_dict()
    assert sum(v.numel() for v in state.values()) == 21_670_272
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    block = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    expected = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    expected += [f"blocks.{i}.{name}" for i in range(12) for name in block]
    assert list(state) == [*expected, "norm.weight", "norm.bias"]


@pytest.mark.parametrize("size", [(28, 28), (35, 63), (84, 84)])
def test_any_size_that_the_patch_divides(size):
    model = vit.VisionTransformer(patch_size=7, dim=24, depth=2, heads=4, pos_size=56)
    images = torch.randn(2, 3, *size)
    assert model(images).shape == (2, 24)
    assert model.get_last_selfattention(images).shape == (2, 4, *[1 + size[0] * size[1] // 49] * 2)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="heads 5.* width 24"):
        vit.VisionTransformer(dim=24, heads=5)
    model = vit.VisionTransformer(patch_size=7, dim=24, depth=1, heads=2, pos_size=56)
    with pytest.raises(ValueError, match="60×56.*patch size 7"):
        model(torch.zeros(1, 3, 60, 56))


@pytest.mark.parametrize("init_std,qkv,fc2", [(0.02, 0.02, 0.02), (0.0, 1 / 8, 1 / 16)])
def test_initial_weights(init_std, qkv, fc2):
    block = vit.VisionTransformer(8, 64, 1, 1, 32, init_std=init_std).blocks[0]
    stds = [block.attn.qkv.weight.std().item(), block.mlp.fc2.weight.std().item()]
    assert stds == pytest.approx([qkv, fc2], rel=0.1)


def test_gradient_reaches_every_parameter():
    torch.manual_seed(0)
    head = vit.ProjectionHead(24, 10, 16, 3, 8)
    net = torch.nn.Sequential(vit.VisionTransformer(7, 24, 2, 2, 28), head)
    net(torch.randn(2, 3, 28, 28)).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_heads_of_both_losses():
    torch.manual_seed(0)
    x = torch.randn(5, 24)
    bottleneck = vit.ProjectionHead(24, None, 16, 2, 8, norm=True)(x)
    torch.testing.assert_close(bottleneck.norm(dim=-1), torch.ones(5))
    head = vit.ProjectionHead(24, 10, 16, 3, 8)
    assert head(x).shape == (5, 10) and head(x).abs().max() <= 1  # cosines with the prototypes
    assert {"last_layer.weight_v", "last_layer.weight_g"} <= head.state_dict().keys()
    # every image by itself: no statistics of the batch
    torch.testing.assert_close(head(x)[:2], head(x[:2]))


def tiny(**kwargs):
    shape = {"patch_size": 8, "dim": 64, "depth": 2, "heads": 1, "pos_size": 32}
    return vit.VisionTransformer(**shape | kwargs)


def full_dino_checkpoint(backbone):
    """The layout of facebookresearch/dino's main_dino.py, with all that it drags along."""
    weights = backbone.state_dict()
    head = {"head.mlp.0.bias": torch.zeros(3), "head.last_layer.weight_g": torch.ones(3, 1)}
    student = {f"backbone.{k}": v for k, v in weights.items()} | head
    return {
        "student": {f"module.{k}": v for k, v in student.items()},
        "teacher": {f"backbone.{k}": v + 1 for k, v in weights.items()} | head,
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(0.001)}]},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small", lr=0.0005),
        "dino_loss": {"center": torch.zeros(1, 3)},
        "step": np.int64(7),
    }


def assert_same_weights(model, expected):
    assert model.state_dict().keys() == expected.keys()
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, expected[name].float()), name


def shape_of(model):
    return {name: getattr(model, name) for name in vit.SHAPE}


def test_full_dino_checkpoint_gives_its_teacher(tmp_path):
    model, path = tiny(), str(tmp_path / "full.pth")
    torch.save(full_dino_checkpoint(model), path)
    loaded, content = vit.load_backbone(path)
    assert shape_of(loaded) == shape_of(model) and loaded.grid == (4, 4)
    assert_same_weights(loaded, {k: v + 1 for k, v in model.state_dict().items()})
    assert content["step"] == 7 and content["args"].arch == "vit_small"


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(8, 128, 2, 2, 32), (7, 24, 3, 1, 28, 2, 3)])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
def test_bare_state_dict_of_any_kind(tmp_path, prefix, shape, dtype, old_format):
    model, path = vit.VisionTransformer(*shape).to(getattr(torch, dtype)), str(tmp_path / "w.pth")
    content = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    loaded = vit.load_backbone(path)[0]
    assert_same_weights(loaded, model.state_dict())
    assert shape_of(loaded) == shape_of(model)


def test_a_shipped_checkpoint_still_loads():
    loaded, content = vit.load_backbone(str(SHIPPED))
    shape = {"patch_size": 7, "dim": 96, "depth": 2, "heads": 3, "pos_size": 56}
    shape["antialias"] = False
    assert shape_of(loaded) == shape | {"mlp_ratio": 1, "registers": 4}
    older = {key: value for key, value in content["config"].items() if key not in vit.OLDER}
    assert shape_of(vit.build_network(older).backbone) == shape | {"mlp_ratio": 4, "registers": 0}
    teacher = {k: v for k, v in content["teacher"].items() if k.startswith("backbone.")}
    assert {v.dtype for v in teacher.values()} == {torch.float16}
    assert_same_weights(loaded, {k.removeprefix("backbone."): v for k, v in teacher.items()})


def test_untrained_backbone_is_the_one_of_the_first_step(tmp_path, capsys):
    config, path = torch.load(SHIPPED, weights_only=True)["config"], tmp_path / "w.pth"
    first = vit.build_network(config).backbone.state_dict()
    assert_same_weights(vit.untrained_backbone(config), first)
    torch.save(first, path)
    config |= {"weights": str(path), "seed": 1}
    assert_same_weights(vit.untrained_backbone(config), first)
    path.unlink()
    assert vit.untrained_backbone(config) is None
    assert "no such file" in capsys.readouterr().err


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """DINO's server, on loopback, with a small file; `cut` bytes of it are sent."""
    torch.save(tiny().state_dict(), tmp_path / "served.pth")
    content = (tmp_path / "served.pth").read_bytes()
    served = argparse.Namespace(requests=[], cut=len(content), body=content)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            served.requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(served.body)))
            self.end_headers()
            self.wfile.write(served.body[: served.cut])

        def log_message(self, *args): ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(vit, "DINO_URL", f"http://127.0.0.1:{server.server_port}/{{0}}/{{0}}.pth")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    served.folder = tmp_path / "hub" / "checkpoints"
    served.stop = lambda: (server.shutdown(), server.server_close())
    yield served
    served.stop()


@pytest.mark.parametrize("name,file", vit.DINO_FILES.items())
def test_download_once_then_cached(hub, name, file):
    vit.load_backbone(name)
    assert hub.requests == [f"/{file}/{file}.pth"]
    hub.stop()
    assert shape_of(vit.load_backbone(name)[0]) == shape_of(tiny())
    assert [f.name for f in hub.folder.iterdir()] == [f"{file}.pth"]
    (hub.folder / f"{file}.pth").write_bytes(hub.body[:500])
    with pytest.raises(ValueError, match=f"{file}.pth .*damaged.*use another copy"):
        vit.load_backbone(name)


@pytest.mark.parametrize("missing", [1, 100, 400_000])
def test_download_cut_short_leaves_nothing_and_is_fetched_again(hub, missing):
    hub.cut = len(hub.body) - missing
    with pytest.raises(OSError, match="--weights dino.*--weights none.*--weights FILE"):
        vit.load_backbone("dino")
    assert list(hub.folder.iterdir()) == []
    hub.cut = len(hub.body)
    vit.load_backbone("dino")
    assert len(hub.requests) == 2


def test_several_downloads_at_once(hub):
    with ThreadPoolExecutor(6) as threads:
        assert len(list(threads.map(vit.load_backbone, ["dino"] * 6))) == 6
    assert [f.name for f in hub.folder.iterdir()] == ["dino_deitsmall8_pretrain.pth"]


@pytest.mark.parametrize("silent,says", [(False, "refused"), (True, "timed out")])
def test_a_server_that_is_down_or_silent(hub, monkeypatch, request, silent, says):
    request.addfinalizer(partial(socket.setdefaulttimeout, socket.getdefaulttimeout()))
    socket.setdefaulttimeout(0.3)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if silent:
            server.listen()
        monkeypatch.setattr(vit, "DINO_URL", f"http://127.0.0.1:{server.getsockname()[1]}/{{0}}")
        with pytest.raises(OSError, match=f"failed .*{says}.*--weights none.*--weights FILE"):
            vit.load_backbone("dino")
    assert list(hub.folder.iterdir()) == []


def test_missing_device_is_named():
    with pytest.raises(ValueError, match="--device nonsense"):
        vit.find_device("nonsense")


@pytest.mark.parametrize("registers", [0, 2])
def test_rollout_is_a_product_of_matrices(registers):
    torch.manual_seed(0)
    model, images = (
        vit.VisionTransformer(7, 24, 3, 3, 28, registers=registers),
        torch.rand(2, 3, 28, 28),
    )
    x = model.prepare_tokens(images)
    product = torch.eye(x.shape[1])
    for block in model.blocks:
        q, k, _ = block.attn.queries_keys_values(block.norm1(x))
        weights = ((q @ k.mT) / 8**0.5).softmax(-1)
        joint = weights.mean(1) + torch.eye(x.shape[1])
        product = joint / joint.sum(-1, keepdim=True) @ product
        x = block(x)
    found = model.rollout(images)
    torch.testing.assert_close(found, product[:, 0])
    torch.testing.assert_close(found.sum(-1), torch.ones(2))


def test_patches_can_be_left_out_as_tokens():
    """The order of tokens says nothing, their positions do; those left out leave no trace."""
    torch.manual_seed(0)
    model, images = vit.VisionTransformer(7, 24, 2, 3, 28, registers=1), torch.rand(2, 3, 28, 28)
    order = torch.stack([torch.randperm(16) for _ in range(2)])
    torch.testing.assert_close(model(images, order), model(images))
    kept, other = order[:, :10], images.clone()
    for image, gone in zip(other, order[:, 10:]):
        for patch in gone.tolist():
            row, column = 7 * (patch // 4), 7 * (patch % 4)
            image[:, row : row + 7, column : column + 7] = 9
    torch.testing.assert_close(model(other, kept), model(images, kept))
    assert not torch.allclose(model(images, kept), model(images), atol=1e-3)


def test_attention_of_the_last_block_can_be_replaced():
    torch.manual_seed(0)
    model, images = vit.VisionTransformer(7, 24, 2, 3, 28), torch.rand(2, 3, 28, 28)
    x = model.before_last_block(images)
    own = model.last_attention(x, queries=1)
    torch.testing.assert_close(model.last_feature(x, own), model(images))
    block, cls_alone = model.blocks[-1], torch.zeros_like(own)
    cls_alone[..., 0] = 1  # then the feature is what [CLS] makes of its own value
    value = block.attn.qkv(block.norm1(x[:, 0]))[:, -24:]
    expected = x[:, 0] + block.attn.proj(value)
    expected = model.norm(expected + block.mlp(block.norm2(expected)))
    torch.testing.assert_close(model.last_feature(x, cls_alone), expected)
