"""STL-10 from files in its real layout, colors, and textures behind the clutter."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.v2.functional as TF
from PIL import Image
from sklearn.datasets import load_sample_images
from test_data import DIGITS, closed_url, rng, settings
from torch.testing import assert_close

import data
import metrics
import train
import visualize
import vit


@pytest.fixture(scope="module")
def stl10(tmp_path_factory):
    """Files in STL-10's layout, of crops of scikit-learn's two photographs: classes 1 and 6."""
    root = tmp_path_factory.mktemp("stl10")
    (root / "stl10_binary").mkdir()
    photos = [torch.tensor(image).permute(2, 0, 1).float() for image in load_sample_images().images]
    g = rng(1)
    for name, n in (("unlabeled", 40), ("train", 40), ("test", 80)):
        images = []
        for i in range(n):
            side = int(torch.randint(96, 400, (), generator=g))
            top, left = (int(torch.randint(size - side, (), generator=g)) for size in (427, 640))
            crop = photos[i % 2][None, :, top : top + side, left : left + side]
            images.append(TF.resize(crop, [96, 96], antialias=True)[0].round().clamp(0, 255).byte())
        path = root / "stl10_binary" / name
        torch.stack(images).mT.numpy().tofile(f"{path}_X.bin")  # column by column
        if name != "unlabeled":
            (1 + 5 * (np.arange(n) % 2)).astype(np.uint8).tofile(f"{path}_y.bin")
    return root


@pytest.fixture(autouse=True)
def no_network_and_few_images(monkeypatch):
    monkeypatch.setattr(torchvision.datasets.STL10, "url", f"{closed_url()}stl10_binary.tar.gz")
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [closed_url()])
    for name in ("TEST_IMAGES", "BANK_IMAGES"):
        monkeypatch.setattr(metrics, name, 60)
    for name in ("VALIDATION_IMAGES", "VALIDATION_BANK"):
        monkeypatch.setattr(metrics, name, 40)


def test_files_are_read_as_torchvision_reads_them(stl10, monkeypatch):
    splits, warning = data.load_stl10(str(stl10))
    # torchvision knows the whole files alone
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    for ours, name in (("train", "unlabeled"), ("bank", "train"), ("test", "test")):
        theirs, n = torchvision.datasets.STL10(str(stl10), name), len(splits[ours])
        assert torch.equal(splits[ours].images, torch.from_numpy(theirs.data[:n]))
        assert splits[ours].labels.tolist() == theirs.labels[:n].tolist()
    assert torch.equal(splits["validation"].images, torch.from_numpy(theirs.data[n:]))
    assert splits["validation"].labels.tolist() == theirs.labels[n:].tolist()
    assert [len(splits[name]) for name in ("train", "bank", "test")] == [40, 40, 70]
    assert "not the whole STL-10: 40 unlabeled images" in warning and "\n" not in warning


def test_photographs_stay_bytes(stl10):
    split = data.load_stl10(str(stl10))[0]["test"]
    assert split.images.dtype == torch.uint8 and split.images.shape == (70, 3, 96, 96)
    config = {"dataset": "stl10", "image_size": 96}
    everything = next(data.evaluation_batches(config, split, 100, batch_size=100))
    order = everything["index"]
    assert sorted(order.tolist()) == list(range(70)) and order.tolist() != list(range(70))
    parts = list(data.evaluation_batches(config, split, 20, batch_size=7))
    assert [len(part["images"]) for part in parts] == [7, 7, 6] and "digit" not in parts[0]
    assert_close(torch.cat([part["images"] for part in parts]), split.images[order[:20]] / 255)
    assert torch.equal(torch.cat([part["index"] for part in parts]), order[:20])
    assert torch.equal(torch.cat([part["labels"] for part in parts]), split.labels[order[:20]])


def test_the_labelled_photographs_do_without_the_unlabelled(stl10, tmp_path):
    shutil.copytree(stl10, tmp_path, dirs_exist_ok=True)
    (tmp_path / "stl10_binary" / "unlabeled_X.bin").unlink()
    splits, warning = data.load_stl10(str(tmp_path), "train")
    assert torch.equal(splits["train"].images, splits["bank"].images)
    assert torch.equal(splits["train"].labels, splits["bank"].labels)
    assert splits["train"].labels.unique().tolist() == [0, 5] and "unlabeled" not in warning
    says = "missing or damaged, and cannot be fetched.*unlabeled, train"
    with pytest.raises(OSError, match=says):
        data.load_stl10(str(tmp_path), "unlabeled")


DAMAGE = {
    "a byte is missing": ("unlabeled_X.bin", lambda raw: raw[:-1]),
    "an image is missing": ("test_X.bin", lambda raw: raw[: -3 * 96 * 96]),
    "no image is left": ("train_X.bin", lambda raw: b""),
    "labels are missing": ("test_y.bin", lambda raw: raw[:-1]),
    "label 0": ("train_y.bin", lambda raw: b"\0" + raw[1:]),
    "label 11": ("train_y.bin", lambda raw: raw[:-1] + b"\x0b"),
    "no file": ("train_y.bin", None),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_told(stl10, tmp_path, damage):
    shutil.copytree(stl10, tmp_path / "data")
    file, change = tmp_path / "data" / "stl10_binary" / DAMAGE[damage][0], DAMAGE[damage][1]
    raw = file.read_bytes()
    file.unlink()
    if change:
        file.write_bytes(change(raw))
    with pytest.raises(OSError, match="data/stl10_binary is missing or damaged") as error:
        data.load_stl10(str(tmp_path / "data"))
    assert "use --data-root" in str(error.value) and "\n" not in str(error.value)


JITTER = {
    "brightness": (TF.adjust_brightness, torch.linspace(0.6, 1.4, 6)),
    "contrast": (TF.adjust_contrast, torch.linspace(1.4, 0.6, 6)),
    "saturation": (TF.adjust_saturation, torch.linspace(0.8, 1.2, 6)),
    "hue": (TF.adjust_hue, torch.linspace(-0.1, 0.1, 6)),
    "gray": (lambda x, on: TF.rgb_to_grayscale(x, 3) if on else x, torch.arange(6) == 2),
    "flip": (lambda x, on: TF.horizontal_flip(x) if on else x, torch.arange(6) > 3),
}


@pytest.mark.parametrize("changed", [*([name] for name in JITTER), list(JITTER)], ids="+".join)
def test_colors_agree_with_torchvision(changed):
    """One after the other, each image with its own."""
    photos = torch.rand(6, 3, 20, 20, generator=rng(2))
    photos[5, :, :5] = 0.5  # gray pixels have no hue
    params = {name: torch.zeros_like(values) for name, (_, values) in JITTER.items()}
    params |= {name: torch.ones(6) for name in ("brightness", "contrast", "saturation")}
    params |= {name: JITTER[name][1] for name in changed}
    ours = data.color_jitter(photos, params)
    for i, image in enumerate(photos):
        for name in changed:
            image = JITTER[name][0](image, params[name][i].item())
        assert_close(ours[i], image, atol=1e-5, rtol=0)


def test_colors_are_sampled_as_often_as_dino_does():
    params = data.sample_color_jitter(rng(), (20_000,))
    for name, most in {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}.items():
        change = params[name] - (0 if name == "hue" else 1)
        assert (change != 0).double().mean().item() == pytest.approx(0.8, abs=0.01)
        assert -most - 1e-6 <= change.min() < -0.98 * most
        assert 0.98 * most < change.max() <= most + 1e-6
    assert params["gray"].double().mean().item() == pytest.approx(0.2, abs=0.01)
    assert params["flip"].double().mean().item() == pytest.approx(0.5, abs=0.012)


@pytest.mark.parametrize("image_size", [56, 112])  # colors are changed after the crop, or before
def test_views_of_photographs(stl10, image_size):
    split = data.load_stl10(str(stl10))[0]["train"]
    views = data.TrainingViews(settings(dataset="stl10", crops=4, image_size=image_size), split)
    params = views.sample(0)
    crops = views.render(params)
    assert crops.shape == (4, 12, 3, image_size, image_size) and crops.isfinite().all()
    rows = views.render({name: value[2:5] for name, value in params.items()})
    assert_close(rows, crops[:, 2:5], rtol=0, atol=1e-5)
    spread = data.denormalize(crops).std(2).amax((-1, -2))  # between colors
    assert (spread > 0.05).double().mean() > 0.5
    assert torch.equal((spread < 1e-3).T, params["gray"])
    local = params["centre"][:, 2:] - 48
    assert local.abs().max() > 15  # anywhere, there is no digit to centre on
    assert (params["centre"] >= params["side"][..., None] / 2 - 1e-4).all()
    corner = data.denormalize(crops)[..., 0, 0].mean(-1)
    assert (corner > 0.02).double().mean() > 0.9  # beyond the border it is mirrored, not black


def textures(n, **changes):
    config = settings(background="texture", **changes)
    background = data.Background(config, "train", torch.device("cpu"))
    params = background.sample(rng(3), (n, 1))
    return background.put_behind(torch.zeros(n, 1, 64, 64), params)[:, 0], params


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
    wave, pixel = torch.rand(2, 3, 3, generator=rng(4)), torch.arange(9.0)
    y, x, phase = wave[..., None, None].unbind(2)  # each (2, 3, 1, 1)
    direct = torch.sin(2 * math.pi * (y * pixel[:, None] + x * pixel) + phase).sum(1)
    assert_close(data.sum_of_waves(wave, pixel), direct, atol=1e-4, rtol=0)


def test_ink_is_brighter_than_the_texture_around_it_and_masks_do_not_change():
    config, split = settings(image_size=64), DIGITS["test"]
    one = next(data.evaluation_batches(config, split, 100))
    other = next(data.evaluation_batches(config | {"background": "texture"}, split, 100))
    assert torch.equal(one["digit"], other["digit"])
    assert torch.equal(one["clutter"], other["clutter"])
    for image, digit, clutter in zip(other["images"][:, 0], other["digit"], other["clutter"]):
        around = image[~digit & ~clutter]
        assert image[digit].min() >= around.quantile(0.95) and image[digit].min() > 0.5
    assert (other["images"] >= one["images"] - 1e-6).all()
    assert (other["images"] > one["images"] + 0.1).any((1, 2, 3)).all()


def test_views_with_textures():
    config = settings(background="texture", views="different", crops=1)
    maker = data.TrainingViews(config, DIGITS["train"])
    params = maker.sample(0)
    corners = data.denormalize(maker.render(params))[..., 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners < 1e-3).double().mean() < 0.05  # beyond the canvas it is mirrored, not black
    assert (params["wave"][:, 0] != params["wave"][:, 1]).any((1, 2)).all()


def test_a_folder_of_images_lies_behind(tmp_path):
    Image.new("RGB", (300, 200), (255, 255, 255)).save(tmp_path / "white.png")
    (tmp_path / "below").mkdir()
    Image.new("L", (90, 90), 0).save(tmp_path / "below" / "black.jpg")
    (tmp_path / "notes.txt").write_text("no picture")
    config = settings(background=str(tmp_path), image_size=64)
    batch = next(data.evaluation_batches(config, DIGITS["test"], 100))
    ink = batch["digit"] | batch["clutter"]
    darkest = batch["images"][:, 0].where(~ink, 1.0).flatten(1).amin(1)
    assert set(darkest.mul(100).round().tolist()) == {0.0, 45.0}


QUICK = ["--preset", "laptop", "--device", "cpu", "--digits", "sklearn"]
QUICK += ["--epochs", "1", "--images-per-epoch", "16", "--batch-size", "8"]
SMALL_VIT = {"patch_size": 8, "dim": 48, "depth": 3, "heads": 2, "pos_size": 32}


@pytest.mark.parametrize("loss", ["dino", "nce"])
def test_figures_2_and_3_from_training_to_pictures(stl10, tmp_path, monkeypatch, capsys, loss):
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", "stl10", "--loss", loss, "--data-root", str(stl10), "--keep-epochs", "0"]
    assert train.main([*QUICK, *flags]) == 0
    assert capsys.readouterr().err.count("this is not the whole STL-10") == 1
    folder = tmp_path / "runs" / f"stl10-{loss}-same"
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert lines[1]["validation"]["mean"].keys() == {"entropy", "diversity"}
    assert 0 <= lines[1]["validation"]["knn"] <= 1
    finer = ["--image-size", "84"]
    assert visualize.main([str(folder / "ckpt.pth"), "--device", "cpu", *finer]) == 0
    printed = capsys.readouterr().out
    assert "photographs: no masks" in printed and "probe" in printed
    for name in ("views.png", "attention.png", "tsne.png", "curves.png"):
        assert min(Image.open(folder / name).size) > 300
    result = json.loads((folder / "metrics.json").read_text())
    rows = {"mean", "head_1", "head_2", "head_3", "rollout", "untrained"}
    assert set(result["photographs"]) == rows
    assert result["token_effect"].keys() == {"mean", "rollout"}
    assert "changes the feature" in printed
    assert result["settings"]["image_size"] == 84
    assert "not the whole STL-10" in result["fallbacks"][0]


def test_two_runs_on_photographs_and_one_on_digits_side_by_side(stl10, tmp_path, capsys):
    for name, flags in (("a", ["--dataset", "stl10", "--data-root", str(stl10)]), ("b", [])):
        assert train.main([*QUICK, *flags, "--output", str(tmp_path / name)]) == 0
    capsys.readouterr()
    checkpoints = [str(tmp_path / name / "ckpt.pth") for name in "ab"]
    command = [*checkpoints, "--weights", "none", "--device", "cpu"]
    assert visualize.main([*command, "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("Does it look at the digit") == 1
    results = json.loads((tmp_path / "out" / "metrics-compared.json").read_text())
    assert ["matched" in result for result in results] == [False, True, False]
    assert (tmp_path / "out" / "attention-compared.png").exists()


def test_figure_5_from_training_to_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main([*QUICK, "--background", "texture", "--texture-pool", "10"]) == 0
    folder = tmp_path / "runs" / "clutter-nce-same-texture"
    assert visualize.main([str(folder / "ckpt.pth"), "--device", "cpu"]) == 0
    result = json.loads((folder / "metrics.json").read_text())
    assert result["settings"]["background"] == "texture"
    assert "background texture, 10 in all" in metrics.describe(result["settings"])
    # the texture is bright, too
    assert result["matched"]["brightness"]["far_background_density"]["value"] > 0


def test_weights_prescribe_width_depth_and_patch(tmp_path):
    weights = vit.VisionTransformer(**SMALL_VIT).state_dict()
    torch.save(weights, tmp_path / "w.pth")
    flags = [*QUICK, "--weights", str(tmp_path / "w.pth"), "--output", str(tmp_path / "run")]
    assert train.main([*flags, "--heads", "4", "--lr", "1e-30"]) == 0
    checkpoint = vit.read_checkpoint(tmp_path / "run" / "ckpt.pth")
    assert {name: checkpoint["config"][name] for name in SMALL_VIT} == SMALL_VIT | {"heads": 4}
    for name, value in weights.items():  # it started from them
        assert_close(checkpoint["teacher"][f"backbone.{name}"], value)
    assert visualize.main([str(tmp_path / "run" / "ckpt.pth"), "--device", "cpu"]) == 0
    # what fits the weights need not fit the preset's own patch and width
    flags[-1] = str(tmp_path / "other")
    assert train.main([*flags, "--image-size", "64", "--heads", "16"]) == 0


def test_a_folder_that_has_vanished_is_told_before_anything_is_written(tmp_path, capsys):
    backgrounds, run, out = (tmp_path / name for name in ("backgrounds", "run", "out"))
    backgrounds.mkdir()
    Image.new("L", (90, 90), 200).save(backgrounds / "a.png")
    assert train.main([*QUICK, "--background", str(backgrounds), "--output", str(run)]) == 0
    data.read_folder.cache_clear()
    (backgrounds / "a.png").unlink()
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    look = [str(run / "ckpt.pth"), "--device", "cpu", "--output", str(out)]
    for main, command in ((visualize.main, look), (train.main, ["--resume", str(run)])):
        more = ["--epochs", "2"] if main == train.main else []
        capsys.readouterr()
        assert main([*command, *more]) == 2
        message = capsys.readouterr().err
        assert "no images there" in message and message.count("\n") == 1
    assert not out.exists()
    assert before == {file.name: file.read_bytes() for file in run.iterdir()}
    assert visualize.main([*look, "--background", "black"]) == 0


@pytest.mark.parametrize(
    "flags,says",
    [
        ("--dataset stl10 --views different", "--views different: use same"),
        ("--dataset stl10 --loss supervised", "--split unlabeled: use train"),
        ("--dataset stl10 --background texture", "use it with --dataset clutter"),
        ("--dataset stl10 --data-root nowhere", "nowhere/stl10_binary is missing or damaged"),
        ("--dataset stl10 --data-root damaged", "damaged/stl10_binary is missing or damaged"),
        ("--background nowhere", "--background nowhere: no images there"),
        ("--background text", "a.png cannot be read as a picture"),
        ("--texture-pool 3", "--texture-pool 3: use"),
        ("--background texture --texture-pool -1", "--texture-pool -1"),
        ("--canvas-size 27", "--canvas-size 27: use 28"),
        ("--weights w.pth --patch-size 7", "--patch-size 7: use 8, the weights'"),
        ("--weights w.pth --image-size 49", "--image-size 49: use a multiple of the patch size"),
    ],
)
def test_bad_input_is_told_in_one_line(tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    torch.save(vit.VisionTransformer(**SMALL_VIT).state_dict(), "w.pth")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.png").write_text("no")
    (tmp_path / "damaged" / "stl10_binary").mkdir(parents=True)
    for name in ("unlabeled", "train", "test"):
        (tmp_path / "damaged" / "stl10_binary" / f"{name}_X.bin").write_text("no")
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert train.main([*QUICK, *flags.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and says in captured.err and captured.err.count("\n") == 1
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before
    assert not (tmp_path / "runs").exists()
