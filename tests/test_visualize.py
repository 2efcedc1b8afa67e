"""Figures show what they say; the command line draws and measures, or tells what is wrong."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from test_vit import DINO_SAYS, full_dino_checkpoint, probe, seeded_weights, tiny

import data
import metrics
import train
import visualize
import vit

ROOT = os.path.dirname(os.path.abspath(visualize.__file__))
QUICK = ["--preset", "laptop", "--digits", "sklearn", "--device", "cpu", "--batch-size", "8"]
QUICK += ["--images-per-epoch", "16"]


@pytest.fixture(autouse=True, scope="module")
def few_images():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TEST_IMAGES", "BANK_IMAGES", "VALIDATION_IMAGES", "VALIDATION_BANK"):
            patch.setattr(metrics, name, 60)
        yield


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of four steps that kept its epochs, which is enough to be looked at."""
    folder = tmp_path_factory.mktemp("run")
    flags = ["--epochs", "2", "--keep-epochs", "0,1,2", "--views", "different"]
    assert train.main([*QUICK, *flags, "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def other_run(tmp_path_factory):
    """Of another size of image and patch, and one head."""
    folder = tmp_path_factory.mktemp("other")
    flags = ["--epochs", "1", "--image-size", "32", "--patch-size", "8", "--heads", "1"]
    assert train.main([*QUICK, *flags, "--output", str(folder)]) == 0
    return folder


def look(*flags, out):
    """The status of the command line, and what `plot_grid` was given for each figure."""
    grids, plot_grid = {}, visualize.plot_grid

    def remembered(columns, path, title, models, row_names=(), *more):
        grids[os.path.basename(path)] = columns, list(row_names)
        plot_grid(columns, path, title, models, row_names, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visualize, "plot_grid", remembered)
        command = [*map(str, flags), "--output", str(out), "--device", "cpu"]
        return visualize.main(command), grids


@pytest.fixture(scope="module")
def looked(run_folder, tmp_path_factory):
    """The folder with all of the run's figures, and their grids."""
    out = tmp_path_factory.mktemp("looked")
    return out, look(run_folder / "ckpt.pth", out=out)[1]


def strict_json(path):
    """JSON as the standard has it, without NaN and Infinity."""
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"holds {name}"))


def opened(path):
    """The Model of a checkpoint, with its digits."""
    model = visualize.open_model(str(path), visualize.parse_args(["--digits", "sklearn"]))
    model.splits = data.load_digits("sklearn")[0]
    return model


def test_a_bright_patch_is_drawn_where_it_was_put(other_run, tmp_path, monkeypatch):
    """Upright and aligned on a picture that is not square: the hot patch covers the bright one."""
    picture, hot = torch.zeros(3, 48, 64), torch.zeros(1, 1, 48)
    picture[:, 8:16, 48:56] = hot[..., 8 + 6] = 1  # row 1, column 6 of a grid of 6 × 8
    monkeypatch.setattr(metrics, "cls_attention", lambda backbone, images: (hot, None))
    path = tmp_path / "a.png"
    visualize.plot_attention([opened(other_run / "ckpt.pth")], [[(picture, ())]], str(path))
    pixels = np.asarray(Image.open(path).convert("L"))
    for panel in np.array_split(pixels, 2, axis=1):  # the input, and the only head
        rows, columns = ((panel < 50).sum(axis) for axis in (1, 0))
        panel = panel[rows > rows.max() / 2][:, columns > columns.max() / 2]
        bright = np.argwhere(panel > 200).mean(0) / panel.shape
        np.testing.assert_allclose(bright, [1.5 / 6, 6.5 / 8], atol=0.02)


def test_views_are_what_the_branches_are_fed_side_by_side(run_folder, looked):
    model, (out, grids) = opened(run_folder / "ckpt.pth"), looked
    views = data.TrainingViews(model.config, model.splits["train"])
    crops = data.denormalize(views.render(views.sample(0))).clamp(0, 1)[:, :4].movedim(2, -1)
    drawn = torch.stack([torch.stack(column) for column in grids["views.png"][0].values()])
    torch.testing.assert_close(drawn, crops, atol=1e-5, rtol=0)  # two crops of four images
    pixels = np.asarray(Image.open(out / "views.png").convert("L"))
    black = (pixels < 20).mean(0) > 0.3  # where pictures are, whose background is black
    left, right, other_left, other_right = np.flatnonzero(np.diff(black))
    assert other_left - right < (right - left) / 2 > 50 and other_right - other_left == right - left


def test_curves_are_the_log(run_folder, monkeypatch):
    model, figures = opened(run_folder / "ckpt.pth"), []
    lines = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    assert model.history == lines and lines[-1]["step"] == 4
    monkeypatch.setattr(visualize, "save_figure", lambda figure, *_: figures.append(figure))
    visualize.plot_curves(model, "curves.png")
    validation, compared = [line["validation"] for line in lines], 0
    for axis in figures[0].axes:
        name = axis.get_title().partition(" ")[0]
        drawn = {line.get_label(): [*line.get_ydata()] for line in axis.get_lines()}
        for row in drawn.keys() & {"mean", "head 1", "head 2", "head 3", "brightness", "shuffled"}:
            if name in ("selectivity", "auroc", "pointing", "entropy"):
                assert drawn[row] == [line[row.replace(" ", "_")][name] for line in validation]
                compared += 1
        if name == "loss":
            assert drawn["training"] == [line["loss"] for line in lines[1:]]
            assert drawn["validation"] == [line["loss"] for line in validation]
    assert compared == 3 * 6 + 4  # brightness and shuffled have no entropy worth drawing


def test_a_network_that_collapsed_to_one_point_is_drawn(run_folder, tmp_path):
    points, labels = torch.ones(30, 8), torch.arange(30) % 10
    visualize.plot_tsne(opened(run_folder / "ckpt.pth"), points, labels, 0.1, tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size > 1000


def test_pictures_keep_their_shape_and_fit_the_patches(tmp_path):
    for size, shape in (((100, 40), (3, 21, 56)), ((7, 900), (3, 56, 7))):  # 22.4 ≈ three patches
        Image.new("RGB", size, (255, 0, 0)).save(tmp_path / "a.png")
        image = visualize.open_image(tmp_path / "a.png", 56, 7)
        assert image.shape == shape
        torch.testing.assert_close(image.mean((1, 2)), torch.tensor([1.0, 0.0, 0.0]))


def test_all_of_a_run(looked):
    out, _ = looked
    for name in ("views", "attention", "tsne", "curves"):
        assert min(Image.open(out / f"{name}.png").size) > 300
    result = strict_json(out / "metrics.json")
    about = {"checkpoint", "epoch", "fallbacks", "settings", "best_head", "matched", "paper"}
    about |= {"causal_selectivity", "attention_matters"}
    assert result.keys() == about | {"features", "untrained_features", "collapse", "mean_cosine"}
    assert result["epoch"] == 2 and result["settings"]["patch_size"] == 7
    assert result["fallbacks"] == [] and result["best_head"] in result["matched"]
    rows = {"mean", "head_1", "head_2", "head_3", "uniform", "ink", "brightness", "shuffled"}
    rows |= {"rollout", "oracle"}
    names = {"selectivity", "auroc", "pointing", "jaccard60", "best_jaccard", "entropy"}
    names |= {"of_oracle"}
    for region in ("digit", "clutter", "background"):
        names |= {f"{region}_density", "far_background_density"}
    for layout in ("paper", "matched"):
        assert set(result[layout]) == {*rows, "untrained"}
        if layout == "matched":
            names |= {"patch_faithfulness", "object_faithfulness"}
            names.add("patch_faithfulness_less_brightness")
        assert set(result[layout]["head_1"]) == names
        assert set(result[layout]["mean"]) == {*names, "diversity"}
        assert result[layout]["mean"]["entropy"]["images"] == 60
    for cell in (*result["features"].values(), *result["untrained_features"].values()):
        assert 0 <= cell["low"] <= cell["value"] <= cell["high"] <= 1
    assert result["features"].keys() == {"knn", "linear_probe"}


def test_attention_over_training_has_a_row_an_epoch(run_folder, other_run, looked, tmp_path):
    """The same image at each kept epoch, through the network of that epoch."""
    columns, names = looked[1]["attention.png"]
    assert names == ["epoch 0", "epoch 1", "epoch 2"] * 4
    assert all(torch.equal(columns["input"][0], image) for image in columns["input"][:3])
    assert not torch.equal(columns["input"][0], columns["input"][3])
    networks = [opened(run_folder / f"epoch-{epoch}.pth").backbone for epoch in (0, 1, 2)]
    untrained = vit.build_network(opened(run_folder / "ckpt.pth").config).backbone
    assert torch.equal(networks[0].pos_embed, untrained.pos_embed)
    for row, network in enumerate(networks):
        images = data.normalize(columns["input"][row].movedim(-1, 0))[None]
        for head, map_ in enumerate(metrics.cls_attention(network, images)[0][0], 1):
            torch.testing.assert_close(columns[f"head {head}"][row].flatten(), map_)
    assert not torch.allclose(columns["head 1"][0], columns["head 1"][2], atol=1e-6)
    columns, names = look(other_run / "ckpt.pth", out=tmp_path)[1]["attention.png"]
    assert (
        list(columns) == ["input", "effect", "rollout", "head 1"]
        and len(columns["input"]) == 8
        and names == []
    )


def test_several_side_by_side_each_at_its_own_size(run_folder, other_run, tmp_path, capsys):
    assert look(run_folder / "ckpt.pth", other_run / "ckpt.pth", out=tmp_path)[0] == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "56 px, patch 7" in printed and "32 px, patch 8" in printed
    first, second = strict_json(tmp_path / "metrics-compared.json")
    assert first["settings"]["image_size"] == 56 and second["settings"]["image_size"] == 32
    assert second["matched"]["mean"]["diversity"]["value"] is None  # one head
    assert second["matched"]["mean"]["selectivity"] == second["matched"]["head_1"]["selectivity"]
    assert sorted(os.listdir(tmp_path)) == ["attention-compared.png", "metrics-compared.json"]


def test_side_by_side_is_the_same_as_one_by_one(run_folder, looked, tmp_path):
    alone = strict_json(looked[0] / "metrics.json")
    flags = [run_folder / "epoch-0.pth", run_folder / "ckpt.pth", "--weights", "none"]
    assert look(*flags, out=tmp_path)[0] == 0
    before, after, never = strict_json(tmp_path / "metrics-compared.json")
    other = after["matched"].pop("other_network")  # the next on the command line
    assert other["selectivity"] == pytest.approx(never["matched"]["mean"]["selectivity"])
    assert after["matched"] == alone["matched"] and after["features"] == alone["features"]
    assert never["settings"]["weights"] == "none" and never["epoch"] is None
    # the run's own network at random weights is its step 0
    for name, value in alone["matched"]["untrained"].items():
        if "faithfulness" in name:  # to the trained network's effects, not to its own
            value = alone["matched"]["untrained"]["entropy"]
            name = "entropy"
        assert before["matched"]["mean"][name] == pytest.approx(value)
        assert never["matched"]["mean"][name] == pytest.approx(value)
    assert before["matched"]["mean"] != after["matched"]["mean"]


def test_weights_that_were_not_fine_tuned_here(tmp_path, run_folder, monkeypatch, capsys):
    """As a checkpoint they are drawn; by --weights they are measured, on the paper's canvas."""
    bare, flags = tmp_path / "bare.pth", ["--image-size", "64", "--digits", "sklearn"]
    torch.save(tiny().state_dict(), bare)
    monkeypatch.chdir(run_folder)  # whose kept epochs are not theirs
    assert look(bare, *flags, out=tmp_path / "drawn")[0] == 0
    assert os.listdir(tmp_path / "drawn") == ["attention.png"]
    assert look("--weights", bare, *flags, out=tmp_path / "measured")[1]["attention.png"][1] == []
    assert "Does it look at the digit" in capsys.readouterr().out
    c = strict_json(tmp_path / "measured" / "metrics.json")["settings"]
    assert (c["canvas_size"], c["num_distractors"], c["image_size"]) == (100, 6, 64)


def test_own_pictures_through_networks_of_ours_and_of_others(run_folder, tmp_path):
    """Also through a bare DINO state dict and a full checkpoint of theirs, without settings."""
    a, b, bare, full = (tmp_path / name for name in ("a.png", "b.jpg", "bare.pth", "full.pth"))
    Image.new("RGBA", (80, 60), (9, 200, 30, 128)).save(a)
    Image.new("RGB", (64, 64), "white").save(b)
    torch.save(tiny().state_dict(), bare)
    torch.save(full_dino_checkpoint(tiny()), full)
    for number, checkpoints in enumerate(([], [bare], [full], [bare, full])):
        out, flags = tmp_path / f"{number}", ["--images", a, b, "--image-size", "56"]
        assert look(*checkpoints or [run_folder / "ckpt.pth"], *flags, out=out)[0] == 0
        assert os.listdir(out) == ["attention-images.png"]


@pytest.mark.parametrize("name", ["same", "different"])
def test_shipped_checkpoints_look_at_ink(name):
    model = opened(os.path.join(ROOT, "results", "checkpoints", f"{name}.pth"))
    assert model.config["views"] == name and model.epoch == model.config["epochs"]
    images = data.evaluation_batches(model.config, model.splits["test"], 200)
    seen = metrics.observe({"trained": model.backbone}, images)
    mean = metrics.measure_attention(seen)["mean"]
    assert mean["digit_density"]["low"] > 3 * mean["background_density"]["high"]
    assert mean["selectivity"]["low"] > 1.2


def test_round_trip_as_dinos_script_reads(tmp_path):
    """The paper's ViT-S/8 in our checkpoint, read as visualize_attention.py of
    facebookresearch/dino does: its torch.load, its key, its prefixes, its names."""
    flags = ["--preset", "paper", "--weights", "none", "--digits", "sklearn", "--device", "cpu"]
    config, path = train.make_config(train.parse_args(flags)), str(tmp_path / "ckpt.pth")
    network = vit.build_network(config)
    network.backbone.load_state_dict(seeded_weights(network.backbone))
    content = {"config": config, "teacher": network.state_dict(), "epoch": 1, "metrics": []}
    train.save_checkpoint(path, content)
    state, as_dino = torch.load(path)["teacher"], vit.VisionTransformer()
    state = {k.replace("module.", "").replace("backbone.", ""): v for k, v in state.items()}
    missing, surplus = as_dino.load_state_dict(state, strict=False)
    assert not missing and all(name.startswith("head.") for name in surplus)
    noise = torch.from_numpy(np.random.RandomState(1).standard_normal((1, 3, 112, 112))).float()
    for model in (as_dino, opened(path).backbone):
        found = model.get_last_selfattention(noise)[0, :, 0].double() @ probe(109, 197)
        np.testing.assert_allclose(found.detach(), DINO_SAYS[112, 112][1], atol=1e-6)


@pytest.mark.parametrize("lost", ["canvas_size", "crops", "rotation", "seed"])
def test_a_checkpoint_that_lacks_a_setting_is_told(run_folder, tmp_path, capsys, lost):
    checkpoint = vit.read_checkpoint(run_folder / "ckpt.pth")
    del checkpoint["config"][lost]
    torch.save(checkpoint, tmp_path / "lost.pth")
    assert look(tmp_path / "lost.pth", out=tmp_path)[0] == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "lost.pth" in error and lost in error


def test_attention_that_is_not_finite_names_its_checkpoint(run_folder, tmp_path, capsys):
    checkpoint, path = vit.read_checkpoint(run_folder / "ckpt.pth"), tmp_path / "diverged.pth"
    # finite, but not what comes of it
    checkpoint["teacher"]["backbone.blocks.1.attn.qkv.weight"][0] = 3e38
    torch.save(checkpoint, path)
    for others in ([], [run_folder / "ckpt.pth"]):
        assert look(*others, path, out=tmp_path)[0] == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"{path}: the attention is" in error


BAD_INPUT = [
    ("", "nothing to look at; use a ckpt.pth"),
    ("missing.pth", "missing.pth: no such file"),
    ("CKPT missing.pth", "missing.pth: no such file"),
    (".", "./ckpt.pth: no such file"),
    ("text.pth", "text.pth is not a PyTorch checkpoint"),
    ("CKPT --images text.pth", "text.pth cannot be read as a picture"),
    ("CKPT --images missing.png", "missing.png cannot be read as a picture (no such file)"),
    ("CKPT --images thin.png", "--images thin.png: 6×900 pixels; use more"),
    ("CKPT --image-size 50", "--image-size 50: use a multiple of the patch size"),
    ("CKPT --digits mnist --data-root no", "no/MNIST/raw is missing or damaged"),
    ("CKPT --background nowhere", "--background nowhere: no images there"),
    ("CKPT --device cuda:77", "--device cuda:77 cannot be used"),
    ("CKPT --output text.pth", "text.pth"),
    ("CKPT --output /proc", "/proc"),
]


@pytest.mark.parametrize("flags,says", BAD_INPUT)
def test_bad_input_is_told_in_one_line(run_folder, tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pth").write_text("hello")
    Image.new("L", (6, 900)).save(tmp_path / "thin.png")
    command = [str(run_folder / "ckpt.pth") if flag == "CKPT" else flag for flag in flags.split()]
    assert visualize.main(["--output", "out", "--device", "cpu", *command]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_train_does_without_matplotlib():
    code = "import train, sys; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
