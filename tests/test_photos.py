"""STL-10 from files in its real layout, colours, and textures behind the clutter."""

import json
import math

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import Image
from sklearn.datasets import load_sample_images

import data
import train
import visualize
import vit


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def write_stl10(root, unlabeled=40, train=40, test=80):
    """Small files in STL-10's layout, of crops of scikit-learn's two photographs: two classes, 1 and 6."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    photos = [torch.tensor(image).permute(2, 0, 1).float() for image in load_sample_images().images]
    g = rng(1)
    for name, n in (("unlabeled", unlabeled), ("train", train), ("test", test)):
        images, labels = [], []
        for i in range(n):
            side, which = int(torch.randint(96, 400, (), generator=g)), i % 2
            top, left = (int(torch.randint(limit - side, (), generator=g)) for limit in (427, 640))
            crop = photos[which][None, :, top : top + side, left : left + side]
            images.append(TF.resize(crop, [96, 96], antialias=True)[0].round().clamp(0, 255).byte())
            labels.append(1 + 5 * which)
        torch.stack(images).mT.numpy().tofile(folder / f"{name}_X.bin")  # column by column
        if name != "unlabeled":
            np.array(labels, dtype=np.uint8).tofile(folder / f"{name}_y.bin")
    return folder


@pytest.fixture(scope="module")
def stl10(tmp_path_factory):
    root = tmp_path_factory.mktemp("stl10")
    write_stl10(root)
    return root


# ---------------------------------------------------------------------------------- STL-10


def test_files_are_read_as_torchvision_reads_them(stl10, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)  # it knows the whole files
    splits, warning = data.load_stl10(str(stl10))
    for ours, name in ((splits["train"], "unlabeled"), (splits["bank"], "train"), (splits["test"], "test")):
        theirs = torchvision.datasets.STL10(str(stl10), name)
        n = len(ours)
        assert torch.equal(ours.images, torch.from_numpy(theirs.data[:n]))
        assert ours.labels.tolist() == theirs.labels[:n].tolist()
    assert [len(splits[name]) for name in ("train", "bank", "test", "validation")] == [40, 40, 70, 10]
    assert "40 unlabeled, not 100,000" in warning
    assert torch.equal(data.load_stl10(str(stl10), "train")[0]["train"].images, splits["bank"].images)


def test_photographs_stay_bytes_and_are_mapped(stl10):
    split = data.load_stl10(str(stl10))[0]["train"]
    assert split.images.dtype == torch.uint8 and split.images.shape == (40, 3, 96, 96)
    batch = next(data.evaluation_batches({"dataset": "stl10", "image_size": 56}, split, 7))
    assert batch["images"].shape == (7, 3, 56, 56) and 0 <= batch["images"].min() and batch["images"].max() <= 1
    assert "digit" not in batch and batch["index"].tolist() == list(range(7))


@pytest.mark.parametrize("file,change,says", [
    ("unlabeled_X.bin", lambda raw: raw[:-1], "unlabeled_X.bin is damaged: 1,105,919 bytes"),
    ("test_X.bin", lambda raw: raw[: -3 * 96 * 96], "test_y.bin or test_X.bin is damaged: 80 labels, .* for 79 images"),
    ("train_y.bin", lambda raw: b"\0" + raw[1:], "train_y.bin or train_X.bin is damaged"),
    ("train_X.bin", lambda raw: b"", "train_X.bin is damaged: 0 bytes"),
])
def test_damaged_files_are_told(tmp_path, file, change, says):
    folder = write_stl10(tmp_path)
    (folder / file).write_bytes(change((folder / file).read_bytes()))
    with pytest.raises(OSError, match=says):
        data.load_stl10(str(tmp_path))


def test_no_stl10_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.STL10, "url", "http://127.0.0.1:9/stl10_binary.tar.gz")
    with pytest.raises(OSError, match="no STL-10 in .*stl10_binary, and its download failed .*put its train_X.bin"):
        data.load_stl10(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------- colours


def test_colours_agree_with_torchvision():
    photos = torch.rand(6, 3, 20, 20, generator=rng(2))
    photos[5, :, :5] = 0.5  # grey pixels have no hue
    neutral = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0, "grey": False, "flip": False}
    functions = {
        "brightness": (TF.adjust_brightness, (0.6, 0.9, 1.4)), "contrast": (TF.adjust_contrast, (0.6, 0.9, 1.4)),
        "saturation": (TF.adjust_saturation, (0.8, 1.0, 1.2)), "hue": (TF.adjust_hue, (-0.1, -0.03, 0.1)),
        "grey": (lambda x, on: TF.rgb_to_grayscale(x, 3) if on else x, (True, False)),
        "flip": (lambda x, on: TF.horizontal_flip(x) if on else x, (True, False)),
    }
    for name, (function, values) in functions.items():
        for value in values:
            params = {k: torch.tensor([v] * 6) for k, v in (neutral | {name: value}).items()}
            torch.testing.assert_close(data.change_colours(photos, params), function(photos, value), atol=1e-5, rtol=0)
    # one after the other, each image with its own
    params = {"brightness": torch.linspace(0.6, 1.4, 6), "contrast": torch.linspace(1.4, 0.6, 6),
              "saturation": torch.linspace(0.8, 1.2, 6), "hue": torch.linspace(-0.1, 0.1, 6),
              "grey": torch.arange(6) == 2, "flip": torch.arange(6) > 3}
    ours = data.change_colours(photos, params)
    for i, image in enumerate(photos):
        for name, (function, _) in functions.items():
            image = function(image, params[name][i].item())
        torch.testing.assert_close(ours[i], image, atol=1e-5, rtol=0)


def test_colours_are_drawn_as_often_as_dino_does():
    params = data.draw_colours(rng(), (20_000,))
    assert (params["brightness"] != 1).double().mean().item() == pytest.approx(0.8, abs=0.01)
    assert params["grey"].double().mean().item() == pytest.approx(0.2, abs=0.01)
    assert params["flip"].double().mean().item() == pytest.approx(0.5, abs=0.012)
    for name, most in (("brightness", 0.4), ("contrast", 0.4), ("saturation", 0.2)):
        assert 1 - most <= params[name].min() < 1 - 0.98 * most and 1 + 0.98 * most < params[name].max() <= 1 + most
    assert -0.1 <= params["hue"].min() < -0.098 and 0.098 < params["hue"].max() <= 0.1


def settings(**changes):
    return {
        "seed": 0, "views": "same", "crops": 4, "symmetric": True, "batch_size": 8, "image_size": 56, "canvas_size": 64,
        "num_distractors": 3, "distractor_size": 9, "global_crops_scale": (0.5, 1.0), "local_crops_scale": (0.1, 0.4),
        "rotation": 15.0, "blur": (0.1, 2.0),
    } | changes


@pytest.mark.parametrize("image_size", [56, 84, 112, 224])
def test_whole_images_have_no_rim(image_size):
    """Brought to another size, a white image is white to its last pixel."""
    white = torch.ones(1, 3, 96, 96)
    torch.testing.assert_close(data.whole(white, image_size), torch.ones(1, 3, image_size, image_size))


def test_views_of_photographs(stl10):
    split = data.load_stl10(str(stl10))[0]["train"]
    views = data.TrainingViews(settings(dataset="stl10"), split)
    params = views.draw(0)
    crops = views.render(params)
    assert crops.shape == (4, 8, 3, 56, 56) and crops.isfinite().all()
    assert torch.equal(views.render({k: v[2:5] for k, v in params.items()}), crops[:, 2:5])
    spread = data.denormalise(crops).std(2)  # between colours
    assert (spread.amax((-1, -2)) > 0.05).double().mean() > 0.5 and (spread.amax((-1, -2)) < 1e-3).any()
    local = params["centre"][:, 2:] - 48
    assert local.abs().max() > 15  # anywhere, there is no digit to centre on
    assert (params["centre"] >= params["side"][..., None] / 2 - 1e-4).all()
    border = data.denormalise(crops)[..., 0, 0].mean(-1)
    assert (border > 0.02).double().mean() > 0.9  # beyond the border the photograph is mirrored, not black


# -------------------------------------------------------------------------------- textures


@pytest.fixture(scope="module")
def digits():
    return data.load_digits("sklearn")[0]


def textures(n, **changes):
    background = data.Background(settings(background="texture", **changes), "train", torch.device("cpu"))
    params = background.draw(rng(3), (n, 1))
    return background.lay_behind(torch.zeros(n, 1, 64, 64), params)[:, 0], params


def test_textures_are_of_all_families_and_none_comes_twice():
    images, params = textures(600)
    assert len(data.TEXTURES) >= 5
    assert set(params["family"].flatten().tolist()) == set(range(len(data.TEXTURES)))
    assert len(torch.unique(images.flatten(1), dim=0)) == 600
    assert images.min() >= 0 and images.max() <= 0.45 + 1e-6
    assert (images.flatten(1).std(1) > 0.01).double().mean() > 0.99


def test_a_pool_has_so_many_textures_and_no_more():
    images, _ = textures(600, texture_pool=10)
    assert len(torch.unique(images.flatten(1).mul(1e4).round(), dim=0)) == 10


def test_waves_summed_as_matrices_are_waves():
    wave = torch.rand(2, 3, 3, generator=rng(4))
    pixel = torch.arange(9.0)
    y, x, phase = wave[..., None, None].unbind(2)  # each (2, 3, 1, 1)
    direct = torch.sin(2 * math.pi * (y * pixel[:, None] + x * pixel) + phase).sum(1)
    torch.testing.assert_close(data.sum_of_waves(wave, pixel), direct, atol=1e-4, rtol=0)


def test_ink_is_brighter_than_the_texture_around_it_and_masks_do_not_change(digits):
    one, other = (
        next(data.evaluation_batches(settings(background=b, image_size=64), digits["test"], 100)) for b in ("black", "texture")
    )
    assert torch.equal(one["digit"], other["digit"]) and torch.equal(one["clutter"], other["clutter"])
    for image, digit, clutter in zip(other["images"][:, 0], other["digit"], other["clutter"]):
        around = image[~digit & ~clutter]
        assert (image[digit].min() >= around.quantile(0.95)) and image[digit].min() > 0.5
    assert (other["images"] >= one["images"] - 1e-6).all() and not torch.equal(one["images"], other["images"])


def test_evaluation_with_textures_does_not_depend_on_batches(digits):
    config = settings(background="texture", image_size=64)
    whole = next(data.evaluation_batches(config, digits["test"], 60))
    parts = list(data.evaluation_batches(config, digits["test"], 60, batch_size=25))
    torch.testing.assert_close(torch.cat([p["images"] for p in parts]), whole["images"], atol=1e-6, rtol=0)
    fewer = next(data.evaluation_batches(config, digits["test"], 10))
    torch.testing.assert_close(fewer["images"], whole["images"][:10], atol=1e-6, rtol=0)


@pytest.mark.parametrize("views", ["same", "different"])
def test_views_with_textures(digits, views):
    maker = data.TrainingViews(settings(background="texture", views=views, crops=1), digits["train"])
    params = maker.draw(0)
    crops = maker.render(params)
    assert crops.shape == (2, 8, 3, 56, 56)
    assert torch.equal(maker.render({k: v[2:5] for k, v in params.items()}), crops[:, 2:5])
    corners = data.denormalise(crops)[..., 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners < 1e-3).double().mean() < 0.05  # beyond the canvas the texture is mirrored, not black
    if views == "different":
        assert not torch.equal(params["wave"][:, 0], params["wave"][:, 1])


def test_a_folder_of_images_lies_behind(tmp_path, digits):
    Image.new("RGB", (300, 200), (255, 255, 255)).save(tmp_path / "white.png")
    (tmp_path / "below").mkdir()
    Image.new("L", (90, 90), 0).save(tmp_path / "below" / "black.jpg")
    batch = next(data.evaluation_batches(settings(background=str(tmp_path), image_size=64), digits["test"], 100))
    background = ~(batch["digit"] | batch["clutter"])
    darkest = batch["images"][:, 0].where(background, torch.tensor(1.0)).flatten(1).amin(1)
    assert set(darkest.mul(100).round().tolist()) == {0.0, 45.0}


@pytest.mark.parametrize("make,says", [
    (lambda folder: None, "no image"),
    (lambda folder: (folder / "a.png").write_text("no"), "a.png is not a picture"),
    (lambda folder: Image.new("L", (4, 90)).save(folder / "a.png"), "a.png is too small, 4×90 pixels; 8 a side do"),
    (lambda folder: folder.rmdir(), "there is no such folder"),
])
def test_folders_of_no_use_are_told(tmp_path, make, says):
    folder = tmp_path / "textures"
    folder.mkdir()
    make(folder)
    with pytest.raises(ValueError, match=says):
        data.Background(settings(background=str(folder)), "train", torch.device("cpu"))


# ------------------------------------------------------------------------------ command line

QUICK = "--preset laptop --device cpu --epochs 1 --images-per-epoch 16 --batch-size 8".split()


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(visualize, "TEST_IMAGES", 60)
    monkeypatch.setattr(visualize, "BANK_IMAGES", 60)
    monkeypatch.setattr(visualize, "VALIDATION_IMAGES", 40)
    monkeypatch.setattr(train, "KNN_BANK", 40)


@pytest.mark.parametrize("loss", ["dino", "nce"])
def test_figures_2_and_3_from_training_to_pictures(stl10, tmp_path, monkeypatch, capsys, loss):
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", "stl10", "--loss", loss, "--data-root", str(stl10), "--keep-epochs", "0"]
    assert train.main([*QUICK, *flags]) == 0
    folder = tmp_path / "runs" / f"stl10-{loss}-same"
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert lines[1]["validation"]["mean"].keys() == {"entropy", "diversity"} and 0 <= lines[1]["validation"]["knn"] <= 1
    assert visualize.main([str(folder / "ckpt.pth"), "--device", "cpu", "--image-size", "84"]) == 0  # finer than trained
    printed = capsys.readouterr()
    assert "no masks to measure" in printed.out and "linear probe" in printed.out
    assert printed.err.count("this STL-10 is not the whole one") >= 1
    for name in ("views.png", "attention.png", "tsne.png", "curves.png"):
        assert min(Image.open(folder / name).size) > 300
    result = json.loads((folder / "metrics.json").read_text())
    assert set(result["photographs"]) == {"mean", "head_1", "head_2", "head_3", "untrained"}
    assert result["settings"]["image_size"] == 84 and "not the whole one" in result["fallbacks"][0]


def test_two_runs_on_photographs_and_one_on_digits_side_by_side(stl10, tmp_path, capsys):
    for name, flags in (("a", ["--dataset", "stl10", "--data-root", str(stl10)]), ("b", ["--digits", "sklearn"])):
        assert train.main([*QUICK, *flags, "--output", str(tmp_path / name)]) == 0
    capsys.readouterr()
    command = [str(tmp_path / "a" / "ckpt.pth"), str(tmp_path / "b" / "ckpt.pth"), "--weights", "none"]
    assert visualize.main([*command, "--device", "cpu", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("no masks") == 2 and printed.count("Does it look at the digit") == 1
    assert len(json.loads((tmp_path / "out" / "metrics-compared.json").read_text())) == 3


def test_figure_5_from_training_to_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--digits", "sklearn", "--background", "texture", "--texture-pool", "10"]
    assert train.main([*QUICK, *flags]) == 0
    folder = tmp_path / "runs" / "clutter-nce-same-texture"
    assert visualize.main([str(folder / "ckpt.pth"), "--device", "cpu"]) == 0
    result = json.loads((folder / "metrics.json").read_text())
    assert result["settings"]["background"] == "texture" and result["settings"]["texture_pool"] == 10
    assert "background texture, 10 in all" in visualize.describe(result["settings"])
    assert result["matched"]["brightness"]["far_background_density"]["value"] > 0  # the texture is bright, too


def test_weights_prescribe_width_depth_and_patch(tmp_path, capsys):
    torch.save(vit.VisionTransformer(8, 48, 3, 2, 32).state_dict(), tmp_path / "w.pth")
    flags = ["--digits", "sklearn", "--weights", str(tmp_path / "w.pth"), "--output", str(tmp_path / "run")]
    assert train.main([*QUICK, *flags, "--heads", "4"]) == 0
    config = vit.read_checkpoint(tmp_path / "run" / "ckpt.pth")["config"]
    assert [config[name] for name in ("patch_size", "dim", "depth", "heads", "pos_size")] == [8, 48, 3, 4, 32]
    assert visualize.main([str(tmp_path / "run" / "ckpt.pth"), "--device", "cpu"]) == 0
    # what fits the weights need not fit the preset's own patch and width, and the other way round
    flags[-1] = str(tmp_path / "other")
    assert train.main([*QUICK, *flags, "--image-size", "64", "--heads", "16"]) == 0
    assert train.main([*QUICK, *flags[:-2], "--image-size", "49"]) == 2
    assert "--image-size 49 is not divisible by --patch-size 8: 48 is" in capsys.readouterr().err


def test_a_folder_that_is_no_longer_there_is_told_before_anything_is_written(tmp_path, capsys):
    backgrounds = tmp_path / "backgrounds"
    backgrounds.mkdir()
    Image.new("L", (90, 90), 200).save(backgrounds / "a.png")
    flags = ["--digits", "sklearn", "--background", str(backgrounds), "--output", str(tmp_path / "run")]
    assert train.main([*QUICK, *flags]) == 0
    data.read_folder.cache_clear()
    (backgrounds / "a.png").unlink()
    checkpoint = str(tmp_path / "run" / "ckpt.pth")
    for main, command in (
        (visualize.main, [checkpoint, "--device", "cpu", "--output", str(tmp_path / "out")]),
        (train.main, ["--resume", checkpoint, "--epochs", "2"]),
    ):
        capsys.readouterr()
        assert main(command) == 2
        assert "no image" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert visualize.main([checkpoint, "--device", "cpu", "--background", "black", "--output", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("flags,says", [
    (["--dataset", "stl10", "--views", "different"], "--views different shows a digit on two canvases"),
    (["--dataset", "stl10", "--background", "texture"], "--background is for --dataset clutter"),
    (["--dataset", "stl10", "--data-root", "nowhere"], "no STL-10 in nowhere/stl10_binary"),
    (["--background", "nowhere"], "--background nowhere: there is no such folder"),
    (["--texture-pool", "3"], "--texture-pool 3: a number of textures, with --background texture, is wanted"),
    (["--background", "texture", "--texture-pool", "-1"], "--texture-pool -1"),
    (["--weights", "w.pth", "--patch-size", "7"], "--patch-size 7: the weights have patches of 8"),
])
def test_bad_input_is_told_in_one_line(tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets.STL10, "url", "http://127.0.0.1:9/stl10_binary.tar.gz")
    torch.save(vit.VisionTransformer(8, 48, 3, 2, 32).state_dict(), tmp_path / "w.pth")
    assert train.main([*QUICK, "--digits", "sklearn", *flags]) == 2
    captured = capsys.readouterr()
    assert says in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert [p.name for p in tmp_path.iterdir()] == ["w.pth"]
