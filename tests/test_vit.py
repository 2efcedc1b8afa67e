"""The ViT is DINO's, number for number, and weights come in from wherever they may lie."""

import argparse
import http.server
import threading

import numpy as np
import pytest
import torch

import vit


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
    image = torch.from_numpy(np.random.RandomState(seed).standard_normal((1, 3, *size)).astype(np.float32))
    with torch.no_grad():
        feature = vit_small(image)[0].double()
        attention = vit_small.last_attention(image)[0].double()  # (heads, N, N)
        cls_row = vit_small.last_attention(image, queries=1)[0, :, 0].double()
    n = attention.shape[-1]
    assert n == 1 + size[0] // 8 * (size[1] // 8)
    expected_feature, expected_cls, expected_all = DINO_SAYS[size]
    directions = torch.stack([probe(100 + k, 384) for k in range(4)])
    np.testing.assert_allclose(directions @ feature, expected_feature, atol=1e-5)
    np.testing.assert_allclose(cls_row @ probe(109, n), expected_cls, atol=1e-6)
    np.testing.assert_allclose(probe(110, n) @ attention @ probe(109, n), expected_all, atol=1e-6)
    np.testing.assert_allclose(attention.sum(-1), 1, atol=1e-5)


def test_parameter_names_and_count_are_dinos():
    state = vit.VisionTransformer().state_dict()
    assert sum(v.numel() for v in state.values()) == 21_670_272
    block = [f"{layer}.{kind}" for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
             for kind in ("weight", "bias")]
    expected = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    expected += [f"blocks.{i}.{name}" for i in range(12) for name in block] + ["norm.weight", "norm.bias"]
    assert list(state) == expected


@pytest.mark.parametrize("size", [(28, 28), (35, 63), (84, 84)])
def test_any_size_that_the_patch_divides(size):
    model = vit.VisionTransformer(patch_size=7, dim=24, depth=2, heads=4, pos_size=56)
    images = torch.randn(2, 3, *size)
    assert model(images).shape == (2, 24)
    assert model.last_attention(images).shape == (2, 4, *[1 + size[0] * size[1] // 49] * 2)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="heads 5.*24.*1, 2, 3, 4, 6, 8, 12, 24"):
        vit.VisionTransformer(dim=24, heads=5)
    with pytest.raises(ValueError, match="60×56.*patch size 7"):
        vit.VisionTransformer(patch_size=7, dim=24, depth=1, heads=2, pos_size=56)(torch.zeros(1, 3, 60, 56))


def test_gradient_reaches_every_parameter():
    torch.manual_seed(0)
    net = vit.Network(vit.VisionTransformer(7, 24, 2, 2, 28), vit.ProjectionHead(24, 10, 16, 3, 8))
    net(torch.randn(2, 3, 28, 28)).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_heads_of_both_losses():
    torch.manual_seed(0)
    x = torch.randn(5, 24)
    bottleneck = vit.ProjectionHead(24, None, 16, 2, 8, norm=True)(x)
    torch.testing.assert_close(bottleneck.norm(dim=-1), torch.ones(5))
    head = vit.ProjectionHead(24, 10, 16, 3, 8)
    assert head(x).shape == (5, 10)
    assert head(x).abs().max() <= 1  # cosines with the prototypes
    assert {"last_layer.weight_v", "last_layer.weight_g"} <= head.state_dict().keys()
    # every image by itself: no statistics of the batch
    torch.testing.assert_close(head(x)[:2], head(x[:2]))


# ------------------------------------------------------------------------------- the weights


def tiny(**kwargs):
    return vit.VisionTransformer(**{"patch_size": 8, "dim": 64, "depth": 2, "heads": 1, "pos_size": 32, **kwargs})


def full_dino_checkpoint(backbone):
    """The layout of facebookresearch/dino's main_dino.py, with all that it drags along."""
    prefixed = {f"module.backbone.{k}": v for k, v in backbone.state_dict().items()}
    head = {"module.head.mlp.0.weight": torch.zeros(3, 3), "module.head.last_layer.weight_g": torch.ones(3, 1)}
    return {
        "student": prefixed | head,
        "teacher": {f"backbone.{k}": v + 1 for k, v in backbone.state_dict().items()} | {"head.mlp.0.bias": torch.zeros(3)},
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(0.001), "weight_decay": np.float64(0.4)}]},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small", lr=0.0005),
        "dino_loss": {"center": torch.zeros(1, 3)},
        "step": np.int64(7),
    }


def test_full_dino_checkpoint_gives_its_teacher(tmp_path):
    model = tiny()
    torch.save(full_dino_checkpoint(model), tmp_path / "full.pth")
    checkpoint = vit.read_checkpoint(tmp_path / "full.pth")
    rebuilt = vit.backbone_like(vit.backbone_weights(checkpoint, "full.pth"), "full.pth", vit.heads_of(checkpoint, 64))
    assert (rebuilt.patch_size, rebuilt.dim, rebuilt.depth, rebuilt.heads, rebuilt.grid) == (8, 64, 2, 1, 4)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(rebuilt.state_dict()[name], value + 1)


def test_bare_state_dict_with_any_prefix(tmp_path):
    model = tiny()
    for prefix in ("", "module.", "backbone.", "module.backbone."):
        torch.save({prefix + k: v for k, v in model.state_dict().items()}, tmp_path / "w.pth")
        target = tiny()
        vit.load_pretrained(target, str(tmp_path / "w.pth"))
        torch.testing.assert_close(target.pos_embed, model.pos_embed)
        torch.testing.assert_close(target.blocks[1].mlp.fc2.weight, model.blocks[1].mlp.fc2.weight)


@pytest.mark.parametrize("name,shape", [
    ("cls_token", ()), ("pos_embed", (5,)), ("pos_embed", (1, 0, 64)), ("patch_embed.proj.weight", ())
])
def test_weights_without_the_dimensions_of_a_vit(name, shape):
    with pytest.raises(ValueError, match=f"w.pth holds no Vision Transformer: there is no {name} of shape"):
        vit.backbone_weights(tiny().state_dict() | {name: torch.zeros(shape)}, "w.pth")


class Bomb:
    def __reduce__(self):
        return (open, ("bomb-went-off", "w"))


@pytest.mark.parametrize("content,says", [
    (b"not a checkpoint", "not a PyTorch checkpoint"),
    (b"", "not a PyTorch checkpoint"),
    (Bomb(), "not a PyTorch checkpoint"),
    ([1, 2], "holds no Vision Transformer"),
    ({"conv1.weight": torch.zeros(3)}, "holds no Vision Transformer"),
    (None, "no such file"),
])
def test_files_that_are_no_weights(tmp_path, monkeypatch, content, says):
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        (tmp_path / "w.pth").write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / "w.pth")
    with pytest.raises((ValueError, OSError), match=says):
        vit.load_pretrained(tiny(), "w.pth")
    assert not (tmp_path / "bomb-went-off").exists()


@pytest.mark.parametrize("other,says", [
    (dict(dim=128), r"cls_token has shape \(1, 1, 128\).*needs \(1, 1, 64\)"),
    (dict(patch_size=16), r"pos_embed has shape \(1, 5, 64\).*patch size 8.*\(1, 17, 64\)"),
    (dict(depth=3), r"surplus blocks\.2"),
    (dict(depth=1), r"has no blocks\.1"),
])
def test_weights_of_other_shapes(tmp_path, other, says):
    torch.save(tiny(**other).state_dict(), tmp_path / "w.pth")
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=says):
        vit.load_pretrained(model, str(tmp_path / "w.pth"))
    for name, value in before.items():
        assert torch.equal(value, model.state_dict()[name])


# ------------------------------------------------------------------------------ the download


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """DINO's server, on loopback, with a small file; `served` counts requests and cuts answers short."""
    torch.save(tiny().state_dict(), tmp_path / "served.pth")
    content = (tmp_path / "served.pth").read_bytes()
    served = argparse.Namespace(requests=0, cut=len(content), body=content, model=tiny())

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            served.requests += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(served.body)))
            self.end_headers()
            self.wfile.write(served.body[: served.cut])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(vit, "DINO_HOST", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(vit, "DINO_BYTES", {"dino_deitsmall8_pretrain": len(content)})
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    served.folder = tmp_path / "hub" / "checkpoints"
    served.stop = lambda: (server.shutdown(), server.server_close())
    yield served
    served.stop()


def test_download_once_then_cached(hub):
    vit.load_pretrained(tiny(), "dino")
    assert hub.requests == 1
    hub.stop()
    vit.load_pretrained(tiny(), "dino")
    assert [f.name for f in hub.folder.iterdir()] == ["dino_deitsmall8_pretrain.pth"]


def test_download_cut_short_leaves_nothing_and_begins_again(hub):
    hub.cut = 1000
    with pytest.raises(OSError, match="--weights dino.*--weights none.*--weights FILE"):
        vit.load_pretrained(tiny(), "dino")
    assert list(hub.folder.iterdir()) == []
    hub.cut = len(hub.body)
    vit.load_pretrained(tiny(), "dino")


def test_download_unreachable(hub):
    hub.stop()
    with pytest.raises(OSError, match="could not be fetched from 127.0.0.1.*--weights none.*--weights FILE"):
        vit.load_pretrained(tiny(), "dino")
    assert list(hub.folder.iterdir()) == []


def test_cached_file_that_is_not_whole(hub):
    hub.folder.mkdir(parents=True)
    (hub.folder / "dino_deitsmall8_pretrain.pth").write_bytes(hub.body[:500])
    with pytest.raises(OSError, match="500 bytes.*delete it"):
        vit.load_pretrained(tiny(), "dino")


def test_downloaded_weights_of_other_shapes(hub):
    with pytest.raises(ValueError, match="--weights dino.*shape"):
        vit.load_pretrained(tiny(dim=128, heads=2), "dino")


def test_a_server_that_never_answers_counts_as_unreachable(hub, monkeypatch):
    import socket

    silent = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(vit, "NO_ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(vit, "DINO_HOST", f"http://127.0.0.1:{silent.getsockname()[1]}")
    with pytest.raises(OSError, match="could not be fetched"):
        vit.load_pretrained(tiny(), "dino")
    silent.close()


def test_missing_device_is_named():
    with pytest.raises(ValueError, match="--device nonsense"):
        vit.find_device("nonsense")
