"""Figures show what they say; the command line draws and measures, or says what is wrong."""

import argparse
import contextlib
import io
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from helpers import DIGITS, ROOT, SHIPPED, closed_url, config_of, log_of, read, resume, start
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import data
import explain
import report
import runs
import views
import visualize
import vit
import weights
from visualize import Example, Model
from vit import VisionTransformer, ViTShape

SAME = str(SHIPPED / "same.pth")


@pytest.fixture(autouse=True, scope="module")
def sixty_images():
    """Numbers are made from 60 images, which is enough for t-SNE's perplexity of 20."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TEST_IMAGES", "BANK_IMAGES", "VALIDATION_IMAGES", "VALIDATION_BANK"):
            patch.setattr(report, name, 60)
        yield


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """Nothing can be downloaded, and nothing has been."""
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [closed_url()])
    monkeypatch.setattr(weights, "DINO_URL", closed_url() + "{0}/{0}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no-torch-home"))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of four steps that kept its epochs."""
    folder = tmp_path_factory.mktemp("run")
    assert start(folder, "--epochs 2 --keep-epochs 0,1,2 --views different") == 0
    return folder


@pytest.fixture(scope="module")
def other_run(tmp_path_factory):
    """A run with another size of image and patch, and one head."""
    folder = tmp_path_factory.mktemp("other")
    assert start(folder, "--epochs 1 --image-size 32 --patch-size 8 --heads 1") == 0
    return folder


def small_vit() -> VisionTransformer:
    """A ViT that was not trained here."""
    torch.manual_seed(0)
    return VisionTransformer(ViTShape(patch_size=8, dim=128, depth=2, heads=2, pos_size=32))


def look(*arguments, output) -> int:
    """The exit status of visualize.py on the CPU."""
    command = [*map(str, arguments), "--device", "cpu", "--output", str(output)]
    return visualize.main(command)


@dataclass
class Grid:
    """What a figure of pictures shows, see `visualize.plot_grid`."""

    columns: dict
    row_names: list[str]


@contextlib.contextmanager
def recorded_grids():
    """The pictures in every figure that is drawn in this context: {file name: Grid}."""
    grids = {}
    plot_grid = visualize.plot_grid

    def record(columns, path, title, models, row_names=(), outlines=None):
        grids[os.path.basename(path)] = Grid(columns, list(row_names))
        plot_grid(columns, path, title, models, row_names, outlines)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visualize, "plot_grid", record)
        yield grids


@dataclass
class DrawnRun:
    """What visualize.py made of the run in `run_folder`."""

    folder: Path
    grids: dict[str, Grid]


@pytest.fixture(scope="module")
def drawn_run(run_folder, tmp_path_factory) -> DrawnRun:
    folder = tmp_path_factory.mktemp("drawn")
    with recorded_grids() as grids:
        assert look(run_folder / "ckpt.pth", output=folder) == 0
    return DrawnRun(folder, grids)


def error_of(status: int, capsys) -> str:
    """The single line on standard error of a command that was refused."""
    error = capsys.readouterr().err
    assert status == 2, error
    assert error.count("\n") == 1, error
    assert error.startswith("visualize.py: error: ")
    assert len(error) < 500
    line = error.removesuffix("\n")
    assert line.isprintable()
    return line


def strict_json(path: Path):
    """What a JSON file holds; NaN and Infinity are not in the standard."""

    def refuse(name):
        pytest.fail(f"{path} holds {name}")

    return json.loads(path.read_text(), parse_constant=refuse)


def model_of(path) -> Model:
    """The Model of a checkpoint, with its digits."""
    args = visualize.parse_args(["--digits", "sklearn"])
    model = visualize.open_model(str(path), args)
    model.splits = DIGITS
    return model


# ----------------------------------------------------------------------------------------- figures


def picture_in(pixels):
    """The part of a figure's column that holds a dark picture, without the white paper."""
    dark_in_row = (pixels < 50).sum(1)
    dark_in_column = (pixels < 50).sum(0)
    rows = dark_in_row > dark_in_row.max() / 2
    columns = dark_in_column > dark_in_column.max() / 2
    return pixels[rows][:, columns]


def test_a_map_is_drawn_upright_and_aligned_with_the_picture(other_run, tmp_path, monkeypatch):
    """Row 1, column 6 of 6 × 8 patches is bright in the picture, and has all of the attention."""
    picture = torch.zeros(3, 48, 64)
    picture[:, 8:16, 48:56] = 1
    attention = torch.zeros(1, 1, 48)
    attention[..., 8 + 6] = 1
    monkeypatch.setattr(explain, "cls_attention", lambda backbone, images: (attention, None))
    model = model_of(other_run / "ckpt.pth")
    maps = visualize.maps_of(model.backbone, Example(picture))
    columns = {"input": [picture.movedim(0, -1)], "head 1": [maps["head 1"]]}
    path = tmp_path / "a.png"
    visualize.plot_grid(columns, str(path), "title", [model])
    pixels = np.asarray(Image.open(path).convert("L"))
    for column in np.array_split(pixels, 2, axis=1):
        drawn = picture_in(column)
        height, width = drawn.shape
        assert height / width == pytest.approx(6 / 8, abs=0.02)
        centre = np.argwhere(drawn > 200).mean(0) / drawn.shape
        np.testing.assert_allclose(centre, [1.5 / 6, 6.5 / 8], atol=0.02)


def test_views_are_the_crops_of_the_first_step(run_folder, drawn_run):
    model = model_of(run_folder / "ckpt.pth")
    training_views = views.TrainingViews(model.config, model.splits["train"])
    crops = training_views.render(training_views.sample(0))[:, :4]
    crops = views.denormalize(crops).clamp(0, 1).movedim(2, -1)  # two crops of four images
    columns = drawn_run.grids["views.png"].columns
    drawn = torch.stack([torch.stack(column) for column in columns.values()])
    torch.testing.assert_close(drawn, crops, atol=1e-5, rtol=0)


def test_views_lie_side_by_side(drawn_run):
    pixels = np.asarray(Image.open(drawn_run.folder / "views.png").convert("L"))
    has_picture = (pixels < 20).mean(0) > 0.3  # pictures have a black background
    first_left, first_right, second_left, second_right = np.flatnonzero(np.diff(has_picture))
    width = first_right - first_left
    gap = second_left - first_right
    assert second_right - second_left == width
    assert gap < width / 2
    assert width > 100


def test_curves_are_the_log(run_folder, monkeypatch):
    model = model_of(run_folder / "ckpt.pth")
    assert model.history == log_of(run_folder)
    figures = []
    monkeypatch.setattr(visualize, "save_figure", lambda figure, *_: figures.append(figure))
    visualize.plot_curves(model, "curves.png")
    curves = {}  # {title: {label: values}}
    for axis in figures[0].axes:
        lines = axis.get_lines()
        curves[axis.get_title()] = {line.get_label(): list(line.get_ydata()) for line in lines}

    validation = [line["validation"] for line in model.history]
    heads = ["mean", "head 1", "head 2", "head 3"]
    rows = [*heads, "brightness", "shuffled"]
    for title, metric, rows_of_metric in (
        ("selectivity", "selectivity", rows),
        ("auroc", "auroc", rows),
        ("pointing", "pointing", rows),
        ("patch faithfulness", "patch_faithfulness", rows),
        ("entropy (1: uniform)", "entropy", heads),
    ):
        for row in rows_of_metric:
            values = [line[row.replace(" ", "_")][metric] for line in validation]
            np.testing.assert_equal(curves[title][row], np.array(values, float))
    assert "brightness" not in curves["entropy (1: uniform)"]
    diversity = [line["mean"]["diversity"] for line in validation]
    assert curves["diversity of the heads, bits"]["mean"] == diversity
    assert curves["loss"]["training"] == [line["loss"] for line in model.history[1:]]
    assert curves["loss"]["validation"] == [line["loss"] for line in validation]
    (accuracy, untrained) = curves["k-NN accuracy, %"].values()
    assert accuracy == [100 * line["knn"] for line in validation]
    assert untrained == [accuracy[0]] * 2


def test_features_that_collapsed_to_a_point_are_drawn(run_folder, tmp_path):
    evaluation = report.Evaluation(
        result={"features": {"knn": {"value": 0.1}}},
        features=torch.ones(30, 8),
        labels=torch.arange(30) % 10,
    )
    path = tmp_path / "tsne.png"
    visualize.plot_tsne(model_of(run_folder / "ckpt.pth"), evaluation, str(path))
    assert min(Image.open(path).size) > 300


# ------------------------------------------------------------------------------------------- a run


def test_all_figures_of_a_run_are_drawn(drawn_run):
    names = {"attention.png", "curves.png", "metrics.json", "tsne.png", "views.png"}
    assert set(os.listdir(drawn_run.folder)) == names
    for name in names - {"metrics.json"}:
        assert min(Image.open(drawn_run.folder / name).size) > 300, name


def test_metrics_json_holds_all_that_is_measured(drawn_run):
    result = strict_json(drawn_run.folder / "metrics.json")
    origin = {"checkpoint", "description", "epoch", "settings", "fallbacks"}
    measured = {"best_head", "matched", "paper", "features", "untrained_features", "mean_cosine"}
    measured |= {"collapse", "causal_selectivity", "attention_matters"}
    assert result.keys() == origin | measured
    assert result["epoch"] == 2
    assert result["settings"]["patch_size"] == 7
    assert result["fallbacks"] == []
    assert result["best_head"] in result["matched"]

    rows = {"mean", "head_1", "head_2", "head_3", "rollout", "untrained"}
    rows |= {"brightness", "ink", "oracle", "shuffled", "uniform"}
    names = {"selectivity", "of_oracle", "auroc", "pointing", "jaccard60", "best_jaccard"}
    names |= {"digit_density", "clutter_density", "background_density", "far_background_density"}
    names |= {"entropy"}
    of_effects = {"patch_faithfulness", "object_faithfulness", "patch_faithfulness_less_brightness"}
    for layout, names_of_layout in (("paper", names), ("matched", names | of_effects)):
        table = result[layout]
        assert table.keys() == rows
        assert table["head_1"].keys() == names_of_layout
        assert table["mean"].keys() == names_of_layout | {"diversity"}
        assert table["mean"]["entropy"]["images"] == 60
    for key in ("features", "untrained_features"):
        assert result[key].keys() == {"knn", "linear_probe"}
        for cell in result[key].values():
            assert 0 <= cell["low"] <= cell["value"] <= cell["high"] <= 1


def test_attention_over_training_has_a_row_for_each_kept_epoch(run_folder, drawn_run):
    """The same image through the networks of all epochs, then the next image."""
    grid = drawn_run.grids["attention.png"]
    assert grid.row_names == ["epoch 0", "epoch 1", "epoch 2"] * 4
    pictures = grid.columns["input"]
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[0], pictures[2])
    assert not torch.equal(pictures[0], pictures[3])

    networks = [model_of(run_folder / f"epoch-{epoch}.pth").backbone for epoch in (0, 1, 2)]
    untrained = vit.build_network(model_of(run_folder / "ckpt.pth").config).backbone
    assert torch.equal(networks[0].pos_embed, untrained.pos_embed)
    for row, network in enumerate(networks):
        images = views.normalize(pictures[row].movedim(-1, 0))[None]
        heads, _ = explain.cls_attention(network, images)
        for number, attention in enumerate(heads[0], 1):
            drawn = grid.columns[f"head {number}"][row]
            torch.testing.assert_close(drawn.flatten(), attention)
    first_epoch, _, last_epoch = grid.columns["head 1"][:3]
    assert not torch.allclose(first_epoch, last_epoch, atol=1e-6)


def test_attention_of_a_run_that_kept_no_epochs_has_a_row_for_each_image(other_run, tmp_path):
    with recorded_grids() as grids:
        assert look(other_run / "ckpt.pth", output=tmp_path) == 0
    grid = grids["attention.png"]
    assert list(grid.columns) == ["input", "effect", "rollout", "head 1"]  # the only head
    assert len(grid.columns["input"]) == 8
    assert grid.row_names == []


@pytest.mark.parametrize("name", ["same", "different"])
def test_shipped_checkpoints_look_at_ink(name):
    model = model_of(SHIPPED / f"{name}.pth")
    assert model.config.views == name
    assert model.epoch == model.config.epochs
    images = views.evaluation_batches(model.config, model.splits["test"], 200)
    observation = explain.observe({"trained": model.backbone}, images)
    mean = report.measure_attention(observation)["mean"]
    assert mean["digit_density"]["low"] > 3 * mean["background_density"]["high"]
    assert mean["selectivity"]["low"] > 1.2


def test_dinos_script_reads_our_checkpoints(tmp_path):
    """As visualize_attention.py of facebookresearch/dino: its torch.load, its key, its prefixes."""
    config = config_of("--preset paper --weights none --digits sklearn --device cpu")
    network = vit.build_network(config)
    content = {
        "config": asdict(config),
        "teacher": network.state_dict(),
        "epoch": 1,
        "metrics": [],
    }
    path = str(tmp_path / "ckpt.pth")
    runs.save_checkpoint(path, content)
    state = torch.load(path, map_location="cpu")["teacher"]
    state = {
        name.replace("module.", "").replace("backbone.", ""): value for name, value in state.items()
    }
    vit_small = VisionTransformer(ViTShape(patch_size=8, dim=384, depth=12, heads=6))
    missing, unexpected = vit_small.load_state_dict(state, strict=False)
    assert missing == []
    assert all(name.startswith("head.") for name in unexpected)

    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network.backbone.get_last_selfattention(noise)
        assert torch.equal(vit_small.get_last_selfattention(noise), expected)
        assert torch.equal(model_of(path).backbone.get_last_selfattention(noise), expected)


# -------------------------------------------------------------------------- several networks at once


def test_networks_side_by_side_are_each_shown_their_own_size(
    run_folder, other_run, tmp_path, capsys
):
    assert look(run_folder / "ckpt.pth", other_run / "ckpt.pth", output=tmp_path) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "28 px, patch 7" in printed
    assert "32 px, patch 8" in printed
    assert "The networks differ in image_size, patch_size" in printed
    first, second = strict_json(tmp_path / "metrics-compared.json")
    assert first["settings"]["image_size"] == 28
    assert second["settings"]["image_size"] == 32
    assert "other_network" not in first["matched"]  # which has patches of another size
    assert second["matched"]["mean"]["diversity"]["value"] is None  # one head
    assert second["matched"]["mean"]["selectivity"] == second["matched"]["head_1"]["selectivity"]
    assert sorted(os.listdir(tmp_path)) == ["attention-compared.png", "metrics-compared.json"]


def test_numbers_side_by_side_are_those_of_each_network_alone(run_folder, drawn_run, tmp_path):
    checkpoints = [run_folder / "epoch-0.pth", run_folder / "ckpt.pth"]
    assert look(*checkpoints, "--weights", "none", output=tmp_path) == 0
    untrained, trained, random = strict_json(tmp_path / "metrics-compared.json")
    alone = strict_json(drawn_run.folder / "metrics.json")
    results = [untrained, trained, random]
    other_networks = [result["matched"].pop("other_network") for result in results]
    assert trained["matched"] == alone["matched"]
    assert trained["features"] == alone["features"]
    # The other network is the next on the command line.
    for number, other_network in enumerate(other_networks):
        selectivity = results[(number + 1) % 3]["matched"]["mean"]["selectivity"]
        assert other_network["selectivity"] == pytest.approx(selectivity)
    assert random["settings"]["weights"] == "none"
    assert random["epoch"] is None

    # Random weights beside a run are those of the run before its first step.
    assert untrained["matched"]["mean"] != trained["matched"]["mean"]
    for name, cell in alone["matched"]["untrained"].items():
        if "faithfulness" in name:
            continue  # there it is compared with the effects on the trained network
        assert untrained["matched"]["mean"][name] == pytest.approx(cell), name
        assert random["matched"]["mean"][name] == pytest.approx(cell), name


# --------------------------------------------------------------------------- networks from elsewhere


def test_weights_from_elsewhere_are_drawn_and_measured_if_asked(
    tmp_path, run_folder, monkeypatch, capsys
):
    """On the paper's canvases: as a checkpoint they are drawn, by --weights they are measured."""
    path = tmp_path / "bare.pth"
    torch.save(small_vit().state_dict(), path)
    flags = ["--image-size", "64", "--digits", "sklearn"]
    monkeypatch.chdir(run_folder)  # whose kept epochs are not of these weights
    assert look(path, *flags, output=tmp_path / "drawn") == 0
    assert os.listdir(tmp_path / "drawn") == ["attention.png"]
    printed = capsys.readouterr().out
    assert "Does it look at the digit" not in printed
    assert f"not measured; measure it with --weights {path}" in printed

    with recorded_grids() as grids:
        assert look("--weights", path, *flags, output=tmp_path / "measured") == 0
    assert grids["attention.png"].row_names == []
    assert "Does it look at the digit" in capsys.readouterr().out
    saved = strict_json(tmp_path / "measured" / "metrics.json")["settings"]
    assert saved["canvas_size"] == 100
    assert saved["num_distractors"] == 6
    assert saved["image_size"] == 64


def dino_checkpoint(backbone: VisionTransformer) -> dict:
    """The layout of facebookresearch/dino's main_dino.py."""
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    return {
        "student": {f"module.{name}": value for name, value in state.items()},
        "teacher": state,
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small"),
    }


def test_own_pictures_through_networks_of_any_origin(run_folder, tmp_path):
    transparent = tmp_path / "a.png"
    Image.new("RGBA", (80, 60), (9, 200, 30, 128)).save(transparent)
    white = tmp_path / "b.jpg"
    Image.new("RGB", (64, 64), "white").save(white)
    bare = tmp_path / "bare.pth"
    torch.save(small_vit().state_dict(), bare)
    full = tmp_path / "full.pth"
    torch.save(dino_checkpoint(small_vit()), full)
    for number, checkpoints in enumerate(([run_folder], [bare], [full], [bare, full])):
        output = tmp_path / str(number)
        flags = ["--images", transparent, white, "--image-size", "56"]
        assert look(*checkpoints, *flags, output=output) == 0
        assert os.listdir(output) == ["attention-images.png"]


def gradient() -> Image.Image:
    return Image.linear_gradient("L").resize((64, 48))


def test_what_was_assumed_about_weights_is_printed_and_can_be_overridden(tmp_path, capsys):
    path = tmp_path / "w.pth"
    torch.save(small_vit().state_dict(), path)
    gradient().save(tmp_path / "a.png")
    draw = [path, "--image-size", "40", "--images", tmp_path / "a.png"]
    assert look(*draw, output=tmp_path) == 0
    assert (
        f"{path}: weights, 2 heads (assumed; override with --heads), grid 4×4 (assumed; override "
        f"with --grid), pictures normalised with ImageNet's mean and standard deviation\n"
    ) in capsys.readouterr().out
    flags = ["--heads", "4", "--grid", "2x8", "--normalise", "half"]
    assert look(*draw, *flags, output=tmp_path) == 0
    printed = capsys.readouterr().out
    assert f"{path}: weights, 4 heads, grid 2×8, pictures normalised with a " in printed
    for flags in (["--heads", "5"], ["--heads", "-1"], ["--grid", "3x5"], ["--grid", "99999x1"]):
        assert str(path) in error_of(look(*draw, *flags, output=tmp_path), capsys)
    for grid in ("4", "0x4", "-2x-8", "axb"):
        with pytest.raises(SystemExit):
            look(*draw, f"--grid={grid}", output=tmp_path)
        assert "argument --grid" in capsys.readouterr().err


def test_a_network_may_expect_a_mean_and_deviation_of_one_half():
    backbone = small_vit()
    image = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = backbone((image - 0.5) / 0.5)
        visualize.expect_half(backbone)
        feature = backbone(views.normalize(image))
    torch.testing.assert_close(feature, expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    "size, shape",
    [((100, 40), (3, 21, 56)), ((7, 900), (3, 56, 7))],  # 22.4 pixels are about three patches
)
def test_pictures_keep_their_proportions_and_fit_the_patches(tmp_path, size, shape):
    path = tmp_path / "a.png"
    Image.new("RGB", size, (255, 0, 0)).save(path)
    picture = visualize.open_image(str(path), image_size=56, patch_size=7)
    assert picture.shape == shape
    torch.testing.assert_close(picture.mean((1, 2)), torch.tensor([1.0, 0.0, 0.0]))


def pictures_in(printed: str) -> list[str]:
    """The pictures whose token effects were printed."""
    lines = printed.splitlines()
    return [line.partition(": ")[0] for line in lines if "removing the most-attended 20%" in line]


def test_a_folder_of_pictures_is_drawn_in_pages(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(visualize, "PICTURES_PER_PAGE", 2)
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    pictures = ["a.png", "b.tif", "deeper/c.JPG"]
    for name in pictures:
        gradient().save(folder / name, "PNG")
    for name in ("._a.png", "notes.txt"):  # which are no pictures
        (folder / name).write_bytes(b"\0\5\26\7")
    output = tmp_path / "out"
    assert look(SAME, "--images", folder, output=output) == 0
    assert sorted(os.listdir(output)) == ["attention-images-1.png", "attention-images-2.png"]
    names = [os.path.relpath(path, folder) for path in pictures_in(capsys.readouterr().out)]
    assert names == pictures

    empty = tmp_path / "empty"
    empty.mkdir()
    error = error_of(look(SAME, "--images", empty, output=output), capsys)
    assert "empty: no pictures there; use another folder, or files" in error


def encoded(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


RAMP = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
GREY = Image.fromarray(RAMP)
COLOUR = Image.merge("RGB", [GREY, GREY.rotate(90), GREY.rotate(180)])


def odd_pictures() -> dict[str, bytes]:
    """{file name: content} of pictures in unusual sizes, modes and formats."""
    turned = Image.Exif()
    turned[0x0112] = 6
    pictures = {
        "5000×5000": encoded(Image.new("L", (5000, 5000))),
        "64×20,000": encoded(Image.new("L", (64, 20_000))),
        "16 bit": encoded(Image.fromarray(RAMP.astype(np.uint16) * 257)),
        "32 bit TIFF": encoded(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
        "half clear colours": encoded(COLOUR.quantize(16), transparency=bytes(range(16))),
        "LA": encoded(Image.merge("LA", [GREY, GREY])),
        "CMYK": encoded(COLOUR.convert("CMYK"), "JPEG"),
        "moving GIF": encoded(COLOUR, "GIF", save_all=True, append_images=[COLOUR.rotate(90)]),
        "turned": encoded(COLOUR, "JPEG", exif=turned),
        "bad EXIF": encoded(COLOUR, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"),
    }
    for mode in ("1", "L", "P", "RGBA"):
        pictures[mode] = encoded(COLOUR.convert(mode))
    for mode in ("YCbCr", "LAB"):
        pictures[f"{mode} TIFF"] = encoded(COLOUR.convert(mode), "TIFF")
    return pictures


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")  # as of Pillow
def test_odd_pictures_are_drawn(tmp_path, capsys):
    torch.save(small_vit().state_dict(), tmp_path / "w.pth")
    paths = []
    for name, content in odd_pictures().items():
        path = tmp_path / f"{name}.png"
        path.write_bytes(content)
        paths.append(str(path))
    flags = ["--image-size", "32", "--images", *paths]
    with recorded_grids() as grids:
        assert look(tmp_path / "w.pth", *flags, output=tmp_path / "out") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert len(grids["attention-images.png"].columns["head 1"]) == len(paths)
    # A fifth of the patches of the narrow picture, which has four, is none.
    measured = [path for path in paths if "20,000" not in path]
    assert pictures_in(captured.out) == measured


def bad_pictures() -> dict[str, bytes]:
    """{what is wrong: content} of files that are no picture, or not one that can be drawn."""
    png = encoded(COLOUR)
    pictures = {
        "10,000×10,000": encoded(Image.new("1", (10_000, 10_000))),
        "huge claim": png[:16] + b"\0\0\xff\xff" * 2 + png[24:],
        "float TIFF": encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
        "text": b"no picture\n",
        "JPEG cut off": encoded(COLOUR, "JPEG")[:700],
    }
    for file_format in ("PCX", "EPS", "PDF"):
        pictures[file_format] = encoded(COLOUR, file_format)
    for size in (0, 9, 40, len(png) // 2):
        pictures[f"{size} bytes"] = png[:size]
    return pictures


@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
def test_bad_pictures_are_refused(tmp_path, capsys):
    for name, content in bad_pictures().items():
        path = tmp_path / f"{name}.png"
        path.write_bytes(content)
        status = look(SAME, "--images", path, output=tmp_path / "out")
        assert f"{path} cannot be read as a picture" in error_of(status, capsys)
        assert not (tmp_path / "out").exists(), name


# ---------------------------------------------------------------------------- photographs and folders


def write_stl10(root: Path, classes: int = 10, **counts: int):
    """Write files in STL-10's layout with random images; `counts` are {file: images}."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    rng = np.random.RandomState(0)
    for name, count in counts.items():
        images = rng.randint(0, 256, (count, 3, 96, 96)).astype(np.uint8)
        images.tofile(folder / f"{name}_X.bin")
        if name != "unlabeled":
            labels = 1 + np.arange(count) % classes
            labels.astype(np.uint8).tofile(folder / f"{name}_y.bin")


@pytest.mark.parametrize("classes, test_images", [(1, 40), (10, 12), (10, 2)])
def test_few_photographs_are_measured_as_far_as_possible(tmp_path, capsys, classes, test_images):
    """No classifier can learn a single class, and t-SNE's perplexity needs more than 20 images."""
    write_stl10(tmp_path, classes, unlabeled=16, train=20, test=test_images)
    run = tmp_path / "run"
    assert start(run, f"--dataset stl10 --data-root {tmp_path}") == 0
    capsys.readouterr()
    # The run's folder stands for its checkpoint. The pictures are finer than in training.
    assert visualize.main([str(run), "--device", "cpu", "--image-size", "56"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "These are photographs" in printed
    assert "Removing the most-attended 20% of the patches changes the feature" in printed
    assert ("linear probe –" in printed) == (classes == 1)
    for name in ("views.png", "attention.png", "curves.png"):
        assert min(Image.open(run / name).size) > 200, name
    is_drawn = (run / "tsne.png").exists()
    assert is_drawn == (test_images == 40)
    assert is_drawn != ("no tsne.png: t-SNE needs more than" in printed)

    result = strict_json(run / "metrics.json")
    rows = {"mean", "head_1", "head_2", "head_3", "rollout", "untrained"}
    assert result["photographs"].keys() == rows
    assert result["token_effect"].keys() == {"mean", "rollout"}
    assert result["settings"]["image_size"] == 56
    assert "not the whole of STL-10" in result["fallbacks"][0]


def test_photographs_and_digits_side_by_side(run_folder, tmp_path, capsys):
    """Weights that were not trained here are shown what the first run was shown."""
    write_stl10(tmp_path, unlabeled=16, train=20, test=40)
    run = tmp_path / "run"
    assert start(run, f"--epochs 1 --dataset stl10 --data-root {tmp_path}") == 0
    capsys.readouterr()
    assert look(run, run_folder, "--weights", "none", output=tmp_path / "out") == 0
    assert capsys.readouterr().out.count("Does it look at the digit") == 1
    results = strict_json(tmp_path / "out" / "metrics-compared.json")
    assert ["matched" in result for result in results] == [False, True, False]
    assert (tmp_path / "out" / "attention-compared.png").exists()


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_background_folder_that_has_vanished_is_noticed_before_anything_is_written(
    tmp_path, capsys
):
    backgrounds = tmp_path / "backgrounds"
    backgrounds.mkdir()
    Image.new("L", (90, 90), 200).save(backgrounds / "a.png")
    run = tmp_path / "run"
    assert start(run, f"--epochs 1 --background {backgrounds}") == 0
    data.read_folder.cache_clear()
    (backgrounds / "a.png").unlink()
    before = files_in(run)
    capsys.readouterr()

    output = tmp_path / "out"
    assert "no images there" in error_of(look(run, output=output), capsys)
    assert not output.exists()
    assert resume(run, "--epochs 2") == 2
    error = capsys.readouterr().err
    assert "no images there" in error
    assert error.count("\n") == 1
    assert files_in(run) == before
    assert look(run, "--background", "black", output=output) == 0


# ----------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", ["canvas_size", "crops", "rotation", "seed"])
def test_a_checkpoint_that_lacks_a_setting_is_refused(run_folder, tmp_path, capsys, name):
    checkpoint = read(run_folder)
    del checkpoint["config"][name]
    path = tmp_path / "lacking.pth"
    torch.save(checkpoint, path)
    error = error_of(look(path, output=tmp_path), capsys)
    assert f"{path}: it lacks these settings: {name}; use another copy of it" in error


def test_the_log_of_a_first_version_is_refused(run_folder, tmp_path, capsys):
    """Its lines have no "validation"."""
    checkpoint = read(run_folder)
    for line in checkpoint["metrics"]:
        del line["validation"]
    path = tmp_path / "old.pth"
    torch.save(checkpoint, path)
    error = error_of(look(path, output=tmp_path), capsys)
    assert f"{path}: its log is of a version that is too old to be drawn" in error


def test_attention_that_is_not_finite_names_its_checkpoint(run_folder, tmp_path, capsys):
    checkpoint = read(run_folder)
    # finite weights, but infinite products
    checkpoint["teacher"]["backbone.blocks.1.attn.qkv.weight"][0] = 3e38
    path = tmp_path / "diverged.pth"
    torch.save(checkpoint, path)
    for checkpoints in ([path], [run_folder / "ckpt.pth", path]):
        status = look(*checkpoints, output=tmp_path)
        assert f"{path}: the attention is NaN or infinite" in error_of(status, capsys)


BAD_INPUT = [
    ("", "nothing to look at; use a ckpt.pth"),
    ("missing.pth", "missing.pth: no such file"),
    ("CKPT missing.pth", "missing.pth: no such file"),
    (".", "./ckpt.pth: no such file"),
    ("text.pth", "text.pth is not a PyTorch checkpoint"),
    ("CKPT --images text.pth", "text.pth cannot be read as a picture"),
    ("CKPT --images missing.png", "missing.png cannot be read as a picture (no such file)"),
    ("CKPT --images thin.png", "--images thin.png: 6×900 pixels; use at least a patch of 7"),
    ("CKPT --image-size 50", "--image-size 50: use a multiple of the patch size 7"),
    ("CKPT --image-size 7000000", "out of memory; use a smaller --image-size"),
    ("CKPT --digits mnist --data-root no", "no/MNIST/raw is missing or damaged"),
    ("CKPT --background nowhere", "--background nowhere: no images there"),
    ("CKPT --device cuda:77", "--device cuda:77 cannot be used"),
    ("CKPT --output text.pth", "text.pth cannot be written to"),
    ("CKPT --output /proc", "/proc cannot be written to"),
]


@pytest.mark.parametrize("flags, message", BAD_INPUT)
def test_bad_input_is_refused_in_one_line(
    run_folder, tmp_path, monkeypatch, capsys, no_network, flags, message
):
    monkeypatch.chdir(tmp_path)
    Path("text.pth").write_text("hello")
    Image.new("L", (6, 900)).save("thin.png")
    command = [str(run_folder / "ckpt.pth") if word == "CKPT" else word for word in flags.split()]
    status = visualize.main(["--output", "out", "--device", "cpu", *command])
    assert message in error_of(status, capsys)
    assert not Path("out").exists()


def test_a_full_disk_is_an_error_in_one_line(tmp_path, monkeypatch, capsys):
    gradient().save(tmp_path / "a.png")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # files of at most 2,000 bytes
    try:
        status = look(SAME, "--images", tmp_path / "a.png", output=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in error_of(status, capsys)


# --------------------------------------------------------------------------------- other machines


def run_python(*command, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        check=False,
    )


def test_training_does_not_need_matplotlib():
    code = "import train, sys; assert 'matplotlib' not in sys.modules"
    assert run_python("-c", code).returncode == 0


@pytest.fixture(scope="module")
def foreign_process(tmp_path_factory) -> subprocess.CompletedProcess:
    """A picture drawn in a notebook, with names that neither font nor code page can show."""
    folder = tmp_path_factory.mktemp("猫の絵")
    picture = folder / "Größe 猫 τ.png"
    gradient().save(picture)
    checkpoint = folder / "重み.pth"
    shutil.copy(SAME, checkpoint)
    # The names of two checkpoints stand in the figure.
    command = ["visualize.py", checkpoint, checkpoint, "--device", "cpu", "--images", picture]
    backend = "module://matplotlib_inline.backend_inline"
    return run_python(*command, MPLBACKEND=backend, PYTHONIOENCODING="cp1252")


def test_the_backend_of_a_notebook_need_not_be_installed(foreign_process):
    assert foreign_process.returncode == 0, foreign_process.stderr


def test_names_that_the_font_lacks_cause_no_warning(foreign_process):
    assert foreign_process.stderr == b""


def test_characters_that_a_code_page_lacks_are_replaced(foreign_process):
    printed = foreign_process.stdout.decode("cp1252")
    assert "Größe ? ?.png: removing the most-attended 20%" in printed


@pytest.mark.parametrize("has_mps, device", [(True, "mps"), (False, "cpu")])
def test_an_apple_gpu_is_used_if_there_is_one(monkeypatch, has_mps, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
    assert visualize.parse_args([]).device == device


# -------------------------------------------------------------------------------- any command line

CHECKPOINTS = ["good.pth", "good.pth", "bare.pth", "finished/ckpt.pth", "text.pth"]
CHECKPOINTS += ["nowhere", "", "ü"]
# Values of the flags, good ones and bad ones.
FLAGS = {
    "--weights": ["good.pth", "none", "bare.pth", "text.pth", "dino"],
    "--images": ["picture.png", "grey.png", "text.pth", "folder"],
    "--image-size": ["7", "14", "56", "70", "50", "0", "-7"],
    "--digits": ["sklearn", "auto", "mnist"],
    "--background": ["black", "texture", "folder"],
    "--data-root": ["folder"],
    "--device": ["cpu", "cuda:77", "meta"],
    "--output": ["new", "folder", "text.pth"],
}
# Words that might be given in place of any value.
ODD_WORDS = ["-", "--", "nan", "inf", "1e400", "1,5", ",", "none", "ünï✓", "'", "%s", "{}"]
ODD_WORDS += ["nowhere", "text.pth", "empty.pth", "folder", "/proc/self/mem", "/dev/null"]
ODD_WORDS += ["good.pth", "picture.png", "", " ", "\udcff", "a\nb", "x" * 300]


def command_lines():
    """A strategy: one or two checkpoints, then up to four flags, now and then with an odd value."""
    # Digits might make an image too large to draw, and slashes might leave the folder.
    letters = st.characters(exclude_categories=["Nd"], exclude_characters="/.")
    odd_values = st.sampled_from(ODD_WORDS) | st.text(letters, max_size=5)

    def words(name):
        usual_values = st.sampled_from(FLAGS[name])
        values = st.one_of(*[usual_values] * 5, odd_values)
        # A value that begins with - would be taken for a flag.
        return values.map(
            lambda value: [f"{name}={value}"] if value.startswith("-") else [name, value]
        )

    flags = st.lists(st.sampled_from(sorted(FLAGS)).flatmap(words), max_size=4)
    checkpoints = st.lists(st.sampled_from(CHECKPOINTS), min_size=1, max_size=2)
    return st.tuples(checkpoints, flags).map(
        lambda parts: [*parts[0], *itertools.chain.from_iterable(parts[1])]
    )


@pytest.fixture(scope="module")
def template(run_folder, tmp_path_factory) -> Path:
    """A folder with files of all sorts, which command lines may name."""
    folder = tmp_path_factory.mktemp("template")
    (folder / "finished").mkdir()
    shutil.copy(run_folder / "ckpt.pth", folder / "finished")
    shutil.copy(run_folder / "ckpt.pth", folder / "good.pth")
    torch.save(read(run_folder)["teacher"], folder / "bare.pth")
    (folder / "text.pth").write_text("hello")
    (folder / "empty.pth").write_text("")
    (folder / "folder").mkdir()
    Image.new("RGB", (60, 40), "red").save(folder / "picture.png")
    Image.new("L", (8, 8)).save(folder / "grey.png")
    return folder


def status_and_errors(command: list[str]) -> tuple[int, str]:
    """The exit status of visualize.py and its standard error; argparse's counts as one line."""
    output = io.TextIOWrapper(io.BytesIO(), "utf-8")  # as strict as a terminal
    errors = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            status = visualize.main(command)
        except SystemExit as error:  # argparse's, with its usage
            assert "usage:" in errors.getvalue()
            return error.code, "error: of the command line"
    return status, errors.getvalue()


def check_command_line(command: list[str]) -> int:
    """Assert that it ends with 0, or with 2 and one line of error after any warnings."""
    status, errors = status_and_errors(command)
    assert status in (0, 2)
    if status == 2:
        *warnings, error = errors.splitlines()
        assert "error: " in error, errors
        assert all(line.startswith("warning: ") for line in warnings), errors
    return status


@pytest.mark.parametrize("count", [20, pytest.param(300, marks=pytest.mark.long)])
def test_any_command_line_ends_well(template, tmp_path, monkeypatch, few_images, no_network, count):
    statuses = []

    @settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),  # each example takes its time
    )
    @given(command_lines())
    def check(command):
        # Each starts in a new copy of the template.
        folder = tmp_path / "work"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder)
        monkeypatch.chdir(folder)
        statuses.append(check_command_line(command))

    check()
    # The lines are neither all good nor all bad.
    assert statuses.count(0) > count // 20
    assert statuses.count(2) > count // 20
