"""Metrics on attention made by hand, where the answer is known; figures that show what they say."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

import data
import train
import vit
import visualize


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------- metrics


def masks_of(n=40, image_size=56, seed=0):
    """Masks on which digit and clutter lie anywhere, and their pixels in each patch of 7."""
    digit = torch.rand(n, image_size, image_size, generator=rng(seed)) < 0.1
    clutter = (torch.rand(n, image_size, image_size, generator=rng(seed + 1)) < 0.05) & ~digit
    return digit, clutter, visualize.patch_sums(digit, 7), visualize.patch_sums(clutter, 7)


def test_patch_sums_count_pixels():
    mask = torch.zeros(1, 14, 21, dtype=torch.bool)
    mask[0, 6:8, 13:15] = True  # one pixel in each of four patches around a corner
    assert visualize.patch_sums(mask, 7).tolist() == [[0, 1, 1, 0, 1, 1]]


def test_uniform_attention_tells_nothing():
    _, _, d, c = masks_of()
    uniform = torch.full((40, 1, 64), 1 / 64)
    torch.testing.assert_close(visualize.density(uniform, d), torch.ones(40, 1))
    torch.testing.assert_close(visualize.auroc(uniform, d, c), torch.full((40, 1), 0.5))


def test_attention_on_the_digits_patches_alone():
    d, c = torch.zeros(1, 64), torch.zeros(1, 64)
    d[0, :4], c[0, 10:12] = 49.0, 20.0  # four patches full of digit; clutter elsewhere
    maps = torch.stack([d, c], dim=1) / torch.stack([d, c], dim=1).sum(-1, keepdim=True)
    torch.testing.assert_close(visualize.density(maps, d), torch.tensor([[16.0, 0.0]]))  # 4 of 64 patches
    torch.testing.assert_close(visualize.auroc(maps, d, c), torch.tensor([[1.0, 0.0]]))


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_is_scikit_learns_on_the_pixels(ties):
    digit, clutter, d, c = masks_of()
    maps = torch.rand(40, 3, 64, generator=rng(2))
    if ties:
        maps = (maps * 5).round()
    ours = visualize.auroc(maps, d, c)
    for image in range(40):
        either = digit[image] | clutter[image]
        for m in range(3):
            pixels = maps[image, m].view(8, 8).repeat_interleave(7, 0).repeat_interleave(7, 1)
            assert ours[image, m].item() == pytest.approx(roc_auc_score(digit[image][either], pixels[either]), abs=1e-6)


def test_interval_resamples_digits_not_images():
    """Ten canvases of one digit are no ten observations: the interval is as wide as with one each."""
    values = torch.randn(100, generator=rng(3))
    once = visualize.interval({"x": values}, torch.arange(100), lambda m: m["x"])
    tenfold = visualize.interval({"x": values.repeat(10)}, torch.arange(100).repeat(10), lambda m: m["x"])
    assert once == pytest.approx(tenfold, abs=1e-6)
    value, low, high = once
    assert value == pytest.approx(values.mean().item(), abs=1e-6)
    assert high - low == pytest.approx(2 * 1.96 * values.std().item() / 10, rel=0.15)


def test_interval_leaves_out_images_without_the_region():
    values = torch.tensor([1.0, 2.0, torch.nan, 3.0])
    assert visualize.interval({"x": values}, torch.arange(4), lambda m: m["x"])[0] == pytest.approx(2.0)


def laptop(**flags):
    args = train.parse_args(["--preset", "laptop", *(str(x) for k, v in flags.items() for x in (f"--{k}", v))])
    return train.make_config(args)


@pytest.fixture(scope="module")
def splits():
    return data.load_digits("sklearn")[0]


def test_measure_on_a_network_that_looks_at_ink(splits, monkeypatch):
    """With the digit's own mask as attention the table says so, and the references come out as they must."""
    config = laptop()
    backbone = vit.build_network(config).backbone
    first = {"now": True}

    def look_at_digit(network, images):
        if network is not backbone:
            return torch.full((len(images), 1, 64), 1 / 64)
        first["batch"] = next(first["batches"])
        counts = visualize.patch_sums(first["batch"]["digit"], 7) + 1e-6
        return (counts / counts.sum(-1, keepdim=True))[:, None].expand(-1, 3, -1)

    first["batches"] = data.evaluation_batches(config, splits["test"], 500)
    monkeypatch.setattr(visualize, "cls_maps", look_at_digit)
    untrained = vit.build_network(config).backbone
    table = visualize.measure(config, backbone, untrained, splits["test"], n=500)
    assert table["attention"]["selectivity"][1] > 3
    assert table["attention"]["auroc"][0] > 0.9
    assert table["untrained"]["selectivity"] == pytest.approx((1, 1, 1))
    assert table["untrained"]["auroc"] == pytest.approx((0.5, 0.5, 0.5))
    # a fixed map, or another image's, cannot tell on `matched`
    assert 0.8 < table["shuffled"]["selectivity"][0] < 1.2
    assert 0.46 < table["shuffled"]["auroc"][0] < 0.54
    # bright strokes are denser in digits: this already prefers them
    assert table["brightness"]["selectivity"][1] > 1.2 and table["brightness"]["auroc"][1] > 0.6
    text = visualize.format_table(table)
    assert "is above brightness, untrained, shuffled (95% intervals)" in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_cls_maps_leave_cls_out_and_sum_to_one():
    torch.manual_seed(0)
    backbone = vit.VisionTransformer(7, 24, 2, 3, 56)
    images = torch.randn(2, 3, 56, 56)
    maps = visualize.cls_maps(backbone, images)
    whole = backbone.last_attention(images)[:, :, 0]
    assert maps.shape == (2, 3, 64)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(maps, whole[..., 1:] / (1 - whole[..., :1]))


# --------------------------------------------------------------------------------- features


def test_knn_by_hand():
    """Two near votes beat three far ones, as exp(cosine / 0.07) weighs them."""
    angle = torch.tensor([0.1, -0.1, 0.9, -0.9, 1.0, 3.0])
    bank, classes = torch.stack([angle.cos(), angle.sin()], 1), torch.tensor([1, 1, 0, 0, 0, 2])
    query = torch.tensor([[1.0, 0.0]])
    assert visualize.knn_accuracy(bank, classes, query, torch.tensor([1]), k=5) == 1.0
    assert visualize.knn_accuracy(bank, classes, query, torch.tensor([0]), k=5, temperature=100.0) == 1.0


def test_features_are_normalised_and_labelled(splits):
    config = laptop()
    points, labels = visualize.features(config, vit.build_network(config).backbone, splits["test"], 300, "test")
    torch.testing.assert_close(points.norm(dim=-1), torch.ones(300))
    assert torch.equal(labels, torch.cat([splits["test"].labels, splits["test"].labels[:50]]))


# ---------------------------------------------------------------------------------- figures


def test_a_bright_patch_is_drawn_where_it_was_put(monkeypatch):
    """Upright and aligned: the map's hot patch covers the image's bright patch."""
    figures = []
    monkeypatch.setattr(visualize, "save_figure", lambda figure, path: figures.append(figure))
    image, hot = torch.zeros(56, 56), torch.zeros(1, 8, 8)
    image[7:14, 42:49] = 1  # row 1, column 6 of the patch grid: not symmetric in any way
    hot[0, 1, 6] = 1
    visualize.draw_attention([image], [hot], "a.png", "title")
    figures[0].canvas.draw()
    pixels = np.asarray(figures[0].canvas.buffer_rgba())[..., :3].mean(-1)
    assert len(figures[0].axes) == 2
    for axis in figures[0].axes:
        box = axis.get_window_extent()
        bottom, top = pixels.shape[0] - int(box.y0), pixels.shape[0] - int(box.y1)
        panel = pixels[top + 2 : bottom - 2, int(box.x0) + 2 : int(box.x1) - 2]
        bright = np.argwhere(panel > 150).mean(0) / panel.shape
        np.testing.assert_allclose(bright, [1.5 / 8, 6.5 / 8], atol=0.02)


def test_pictures_keep_their_shape_and_fit_the_patches(tmp_path):
    Image.new("RGB", (100, 40), (255, 0, 0)).save(tmp_path / "wide.png")
    image = visualize.open_image(tmp_path / "wide.png", 56, 7)
    assert image.shape == (3, 21, 56)  # 22.4 is nearest to three patches
    torch.testing.assert_close(image.mean((1, 2)), torch.tensor([1.0, 0.0, 0.0]))
    Image.new("L", (3, 900)).save(tmp_path / "thin.png")
    assert visualize.open_image(tmp_path / "thin.png", 56, 7).shape == (3, 56, 7)


# ------------------------------------------------------------------------------ command line


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Features of few canvases; the figures are the same code."""
    monkeypatch.setattr(visualize, "TEST_IMAGES", 100)
    monkeypatch.setattr(visualize, "BANK_IMAGES", 100)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of two steps, which is enough to be looked at."""
    folder = tmp_path_factory.mktemp("run") / "run"
    flags = "--preset laptop --digits sklearn --device cpu --epochs 1 --images-per-epoch 16 --batch-size 8"
    assert train.main([*flags.split(), "--views", "different", "--output", str(folder)]) == 0
    return folder


def test_all_figures_of_a_run(run_folder, tmp_path, capsys):
    assert visualize.main([str(run_folder / "ckpt.pth"), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    for name in ("views.png", "attention.png", "tsne.png"):
        assert min(Image.open(tmp_path / "out" / name).size) > 300
    printed = capsys.readouterr().out
    assert "brightness" in printed and "untrained" in printed


def test_own_pictures(run_folder, tmp_path):
    files = [tmp_path / "a.png", tmp_path / "b.jpg"]
    Image.new("RGBA", (80, 60), (9, 200, 30, 128)).save(files[0])
    Image.new("RGB", (64, 64), "white").save(files[1])
    command = [str(run_folder / "ckpt.pth"), "--images", *map(str, files), "--output", str(tmp_path), "--device", "cpu"]
    assert visualize.main(command) == 0
    assert (tmp_path / "attention-images.png").exists()
    assert not (tmp_path / "views.png").exists()


def test_weights_of_others_are_read(tmp_path):
    """A bare DINO state dict and a full checkpoint of theirs, neither with settings of ours."""
    from test_vit import full_dino_checkpoint, tiny

    Image.new("RGB", (64, 64), "white").save(tmp_path / "x.png")
    torch.save(tiny().state_dict(), tmp_path / "bare.pth")
    torch.save(full_dino_checkpoint(tiny()), tmp_path / "full.pth")
    for name in ("bare.pth", "full.pth"):
        folder = tmp_path / name.removesuffix(".pth")
        command = [str(tmp_path / name), "--output", str(folder), "--device", "cpu", "--image-size", "64"]
        assert visualize.main([*command, "--images", str(tmp_path / "x.png")]) == 0
        assert (folder / "attention-images.png").exists()


def test_round_trip_as_dinos_script_reads(tmp_path):
    """The paper's ViT-S/8 in our checkpoint, read as visualize_attention.py of facebookresearch/dino
    does: its call of torch.load, its key, its prefixes, its names. The attention is what its class gives."""
    from test_vit import DINO_SAYS, probe, seeded_weights

    config = train.make_config(train.parse_args(["--preset", "paper", "--weights", "none", "--device", "cpu"]))
    network = vit.build_network(config)
    network.backbone.load_state_dict(seeded_weights(network.backbone))
    path = str(tmp_path / "ckpt.pth")
    train.save_checkpoint(path, {"config": config, "teacher": network.state_dict(), "epoch": 1, "metrics": []})
    state = {k.replace("module.", "").replace("backbone.", ""): v for k, v in torch.load(path)["teacher"].items()}
    as_dino = vit.VisionTransformer()
    missing, surplus = as_dino.load_state_dict(state, strict=False)
    assert not missing and all(name.startswith("head.") for name in surplus)
    ours = visualize.open_checkpoint(visualize.parse_args([path]))[1]
    image = torch.from_numpy(np.random.RandomState(1).standard_normal((1, 3, 112, 112)).astype(np.float32))
    for model in (as_dino, ours):
        with torch.no_grad():
            cls_row = model.last_attention(image)[0, :, 0].double()
        np.testing.assert_allclose(cls_row @ probe(109, 197), DINO_SAYS[112, 112][1], atol=1e-6)


@pytest.mark.parametrize("flags,says", [
    (["missing.pth"], "missing.pth: no such file"),
    (["text.pth"], "text.pth is not a PyTorch checkpoint"),
    (["CKPT", "--images", "text.pth"], "--images text.pth is not a picture"),
    (["CKPT", "--images", "missing.png"], "--images missing.png"),
    (["CKPT", "--image-size", "50"], "--image-size 50 is not a multiple of the patch size 7"),
    (["CKPT", "--digits", "mnist", "--data-root", "nowhere"], "no MNIST in nowhere"),
    (["CKPT", "--device", "cuda:77"], "--device cuda:77"),
    (["."], ".: is a folder"),
])
def test_bad_input_is_told_in_one_line(run_folder, tmp_path, monkeypatch, capsys, flags, says):
    import torchvision

    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pth").write_text("hello")
    command = [str(run_folder / "ckpt.pth") if flag == "CKPT" else flag for flag in flags]
    if "--device" not in command:
        command += ["--device", "cpu"]
    assert visualize.main([*command, "--output", "out"]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_figures_that_cannot_be_written(run_folder, capsys):
    assert visualize.main([str(run_folder / "ckpt.pth"), "--output", "/proc", "--digits", "sklearn", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "/proc cannot be written to" in error and "--output names another folder" in error and error.count("\n") == 1


def test_log_and_checkpoint_agree(run_folder):
    checkpoint = vit.read_checkpoint(run_folder / "ckpt.pth")
    lines = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    assert lines == checkpoint["metrics"] and lines[-1]["step"] == checkpoint["step"] == 2
