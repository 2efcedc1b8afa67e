"""Figures show what they say; the command line draws and measures, or says what is wrong."""

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import resource
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.style
import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
import torchvision
from helpers import ROOT, SHIPPED, closed_url, log_of, model_of, read, resume, small_vit, start
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import effects
import evaluate
import explain
import gallery
import metrics
import picture_files
import report
import views
import visualize
import vit
import weights
from gallery import Example
from visualize import GridColumn
from vit import VisionTransformer

SAME = str(SHIPPED / "same.pth")
DIFFERENT = str(SHIPPED / "different.pth")


@pytest.fixture(autouse=True, scope="module")
def sixty_images():
    """Numbers are made from 60 images, which is enough for t-SNE's perplexity of 20."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TEST_IMAGES", "BANK_IMAGES", "VALIDATION_IMAGES", "VALIDATION_BANK"):
            patch.setattr(evaluate, name, 60)
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


def saved(backbone: VisionTransformer, path: Path) -> Path:
    """The path, where the bare weights of the network now are."""
    torch.save(backbone.state_dict(), path)
    return path


def look(*arguments, output) -> int:
    """The exit status of visualize.py on the CPU."""
    command = [*map(str, arguments), "--device", "cpu", "--output", str(output)]
    return visualize.main(command)


@dataclass
class Grid:
    """What a figure of pictures shows, see `visualize.plot_grid`."""

    columns: dict[str, GridColumn]
    title: str
    row_names: list[str]


@contextlib.contextmanager
def recorded_grids():
    """The pictures in every figure that is drawn in this context: {file name: Grid}."""
    grids = {}
    plot_grid = visualize.plot_grid

    def record(columns, path, title, models, row_names=()):
        grids[os.path.basename(path)] = Grid(columns, title, list(row_names))
        plot_grid(columns, path, title, models, row_names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visualize, "plot_grid", record)
        yield grids


@dataclass
class DrawnRun:
    """What visualize.py made of the run in `run_folder`."""

    folder: Path
    grids: dict[str, Grid]
    printed: str


@pytest.fixture(scope="module")
def drawn_run(run_folder, tmp_path_factory) -> DrawnRun:
    folder = tmp_path_factory.mktemp("drawn")
    printed = io.StringIO()
    with recorded_grids() as grids, contextlib.redirect_stdout(printed):
        assert look(run_folder / "ckpt.pth", output=folder) == 0
    return DrawnRun(folder, grids, printed.getvalue())


def table_in(printed: str) -> dict[str, list[str]]:
    """The cells of a printed table, {title of a row: what stands under each metric}."""
    lines = printed.splitlines()
    heading = next(number for number, line in enumerate(lines) if line.endswith("  the network"))
    # The line below the rows begins with the number of images.
    rows = itertools.takewhile(lambda line: not line[0].isdigit(), lines[heading + 1 :])
    number = r"-?\d+\.\d\d"
    cell = rf"{number}(?: \[{number}, {number}\])?|–"
    return {
        row[: report.ROW_WIDTH].strip(): re.findall(cell, row[report.ROW_WIDTH :]) for row in rows
    }


def best_of(result: dict) -> str | None:
    """The name of the network's map with the highest equal ink; None if the network collapsed."""
    if result["collapse"]:
        return None
    rows = {name: "mean" if name == "attention" else name for name in explain.NETWORK_MAPS}
    return max(rows, key=lambda name: result["matched"][rows[name]]["equal_ink"]["value"])


def headings_of_maps(best: str | None, note: str, label: str = "") -> list[str]:
    """The headings of attention and of the best map, if there is one, which is noted."""
    headings = []
    for name in dict.fromkeys(["attention", best or "attention"]):
        heading = label + name.replace("_", " ")
        headings.append(f"{heading}\n({note})" if name == best else heading)
    return headings


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
    maps = gallery.maps_of(model.backbone, Example(picture), ["heads"]).maps
    columns = {
        "input": GridColumn([picture.movedim(0, -1)]),
        "head 1": GridColumn([maps["head 1"]]),
    }
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
    drawn = torch.stack([torch.stack(column.arrays) for column in columns.values()])
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
    heads = {"attention": "mean", "head 1": "head_1", "head 2": "head_2", "head 3": "head_3"}
    rows = heads | {"brightness": "brightness", "shuffled": "shuffled"}
    for title, metric, rows_of_metric in (
        ("selectivity", "selectivity", rows),
        ("auroc", "auroc", rows),
        ("pointing", "pointing", rows),
        ("equal ink: pairs ordered right", "equal_ink", rows),
        ("patch faithfulness", "patch_faithfulness", rows),
        ("entropy (1: uniform)", "entropy", heads),
    ):
        for label, row in rows_of_metric.items():
            values = [line[row][metric] for line in validation]
            np.testing.assert_equal(curves[title][label], np.array(values, float))
    assert "brightness" not in curves["entropy (1: uniform)"]
    diversity = [line["mean"]["diversity"] for line in validation]
    assert curves["diversity of the heads, bits"]["attention"] == diversity
    assert curves["loss"]["training"] == [line["loss"] for line in model.history[1:]]
    assert curves["loss"]["validation"] == [line["loss"] for line in validation]
    (accuracy, untrained) = curves["k-NN accuracy, %"].values()
    assert accuracy == [100 * line["knn"] for line in validation]
    assert untrained == [accuracy[0]] * 2

    # Chance is a line of its own where it is known.
    assert curves["selectivity"]["ink, uniform"] == [1, 1]
    assert curves["auroc"]["ink, uniform"] == [0.5, 0.5]
    assert curves["equal ink: pairs ordered right"]["ink, uniform"] == [0.5, 0.5]
    assert "ink, uniform" not in curves["patch faithfulness"]
    (legend,) = (axis.get_legend() for axis in figures[0].axes if not axis.axison)
    labels = [text.get_text() for text in legend.get_texts()]
    assert sorted(labels) == sorted([*rows, "untrained", "ink, uniform"])


def test_features_that_collapsed_to_a_point_are_drawn(run_folder, tmp_path):
    evaluation = evaluate.Evaluation(
        result={"features": {"knn": {"value": 0.1}}},
        features=torch.ones(30, 8),
        labels=torch.arange(30) % 10,
    )
    path = tmp_path / "tsne.png"
    visualize.plot_tsne(model_of(run_folder / "ckpt.pth"), evaluation, str(path))
    assert min(Image.open(path).size) > 300


def test_outlines_lie_on_the_picture(other_run, tmp_path):
    """Of 6 × 8 patches, the digit is row 1 and column 6, and clutter is row 4 and column 2."""
    picture = torch.zeros(48, 64, 3)
    digit = torch.zeros(48, 64, dtype=torch.bool)
    digit[8:16, 48:56] = True
    clutter = torch.zeros(48, 64, dtype=torch.bool)
    clutter[32:40, 16:24] = True
    column = GridColumn([picture], outlines=[("lime", [digit]), ("red", [clutter])])
    path = tmp_path / "a.png"
    visualize.plot_grid({"input": column}, str(path), "title", [model_of(other_run / "ckpt.pth")])
    red, green, blue = np.asarray(Image.open(path).convert("RGB")).astype(int).transpose(2, 0, 1)
    is_dark = (red + green + blue) < 100
    rows = np.flatnonzero(is_dark.sum(1) > 0.8 * is_dark.sum(1).max())
    columns = np.flatnonzero(is_dark.sum(0) > 0.8 * is_dark.sum(0).max())
    size = [len(rows), len(columns)]
    for outline, centre in (
        (green - red, [1.5 / 6, 6.5 / 8]),
        (red - green, [4.5 / 6, 2.5 / 8]),
    ):
        points = np.argwhere(outline > 100) - [rows[0], columns[0]]
        np.testing.assert_allclose(points.mean(0) / size, centre, atol=0.02)
        extent = (points.max(0) - points.min(0)) / size
        np.testing.assert_allclose(extent, [1 / 6, 1 / 8], atol=0.03)


def runs_of(values) -> list[tuple[int, int]]:
    """Where the stretches of True in a row of bool begin and end."""
    edges = np.flatnonzero(np.diff(np.pad(values.astype(int), 1)))
    return list(zip(edges[::2], edges[1::2]))


@pytest.mark.parametrize(
    "shapes, has_notes",
    [
        ([(1, 8), (1, 8)], True),
        ([(8, 1), (8, 1)], True),
        ([(1, 8), (8, 1), (1, 8), (8, 8)], True),
        ([(1, 8), (8, 1), (1, 8), (8, 8)], False),
        ([(1, 8)], True),
        ([(3, 8), (2, 8), (3, 8)], True),
    ],
)
def test_pictures_of_any_shape_and_their_notes_lie_apart(shapes, has_notes, other_run, tmp_path):
    """On the paper, pictures and notes alternate from top to bottom, with white between them."""
    arrays = [np.zeros(shape) for shape in shapes]
    notes = ["-0.88"] * len(shapes) if has_notes else []
    columns = {name: GridColumn(arrays, notes=notes) for name in ("a", "b", "c", "d", "e")}
    path = tmp_path / "a.png"
    model = model_of(other_run / "ckpt.pth")
    visualize.plot_grid(columns, str(path), "two\nlines", [model])
    is_dark = np.asarray(Image.open(path).convert("L")) < 128
    rows = runs_of(is_dark.any(1))
    pictures = rows[-len(shapes) :]
    if has_notes:
        pictures = rows[-2 * len(shapes) :: 2]
        below = rows[1 - 2 * len(shapes) :: 2]
        for (top, bottom), (top_of_note, bottom_of_note) in zip(pictures, below):
            assert 2 <= top_of_note - bottom <= 10
            assert 6 <= bottom_of_note - top_of_note <= 14  # a line of text of 7 points
        # A note is nearer to its own picture than to the next one.
        for (_, bottom_of_note), (top, _), (_, bottom) in zip(below, pictures[1:], pictures):
            assert top - bottom_of_note > bottom_of_note - bottom

    for (top, bottom), (height, width) in zip(pictures, shapes):
        stretches = runs_of(is_dark[top:bottom].any(0))
        assert len(stretches) == len(columns)
        for left, right in stretches:
            assert abs((bottom - top) * max(height, width) / height - 135) < 20
            assert abs((right - left) - (bottom - top) * width / height) < 10


def test_the_settings_of_the_user_do_not_reach_a_figure(other_run, tmp_path):
    """Not even those that would turn it upside down, and they are as before afterwards."""
    rng = np.random.default_rng(0)
    columns = {
        "input": GridColumn([rng.random((8, 8, 3))], outlines=[("lime", [torch.eye(8) > 0])]),
        "map": GridColumn([rng.random((2, 2))], notes=["0.12"]),
    }
    model = model_of(other_run / "ckpt.pth")
    arguments = ("a $title$", [model], ["name"])
    visualize.plot_grid(columns, str(tmp_path / "expected.png"), *arguments)
    evaluation = evaluate.Evaluation(
        {"features": {"knn": {"value": 0.1}}}, torch.ones(30, 8), torch.arange(30) % 10
    )
    visualize.plot_tsne(model, evaluation, str(tmp_path / "expected-tsne.png"))
    visualize.plot_curves(model, str(tmp_path / "expected-curves.png"))
    of_user = {
        "image.origin": "lower",
        "text.usetex": True,
        "savefig.dpi": 50,
        "image.interpolation": "bicubic",
        "font.size": 20,
        "axes.titlecolor": "red",
        "axes.titlelocation": "left",
        "savefig.transparent": True,
        "figure.autolayout": True,
        "lines.linewidth": 9,
        "contour.linewidth": 9,
    }
    with matplotlib.style.context(["dark_background", of_user]):
        before = dict(matplotlib.rcParams)
        visualize.plot_grid(columns, str(tmp_path / "a.png"), *arguments)
        visualize.plot_tsne(model, evaluation, str(tmp_path / "a-tsne.png"))
        visualize.plot_curves(model, str(tmp_path / "a-curves.png"))
        assert dict(matplotlib.rcParams) == before
    for suffix in ("", "-tsne", "-curves"):
        expected = (tmp_path / f"expected{suffix}.png").read_bytes()
        assert (tmp_path / f"a{suffix}.png").read_bytes() == expected, suffix


def colours_of_map(path) -> np.ndarray:
    """The colours (n, 3) of the one column of a figure, which has no title but that above it."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    rows = (pixels < 250).any(-1).sum(1)
    largest = max(runs_of(rows > 60), key=lambda run: run[1] - run[0])
    columns = (pixels[largest[0] : largest[1]] < 250).any(-1).sum(0)
    left, right = max(runs_of(columns > 60), key=lambda run: run[1] - run[0])
    return pixels[largest[0] + 3 : largest[1] - 3, left + 3 : right - 3].reshape(-1, 3)


def test_a_map_may_lie_over_its_picture(other_run, tmp_path):
    """Where a map is 0, black stands in a map alone, and the picture in a map that lies over it."""
    model = model_of(other_run / "ckpt.pth")
    values = np.array([[0, 0], [0, 1.0]])
    grey = np.full((8, 8, 3), 0.5)
    path = str(tmp_path / "a.png")
    brightest = np.array([252, 255, 164])  # the end of the colour map
    for pictures, of_zero, opacity in (([], 0, 1), ([grey], 127, visualize.OVERLAY_OPACITY)):
        column = GridColumn([values], pictures=pictures)
        visualize.plot_grid({"map": column}, path, "title", [model])
        colours = colours_of_map(path)
        assert abs(np.median(colours, axis=0) - of_zero).max() < 5
        of_one = colours[colours.sum(1).argmax()]
        assert abs(of_one - (opacity * brightest + (1 - opacity) * 127)).max() < 8
    visualize.plot_grid({"map": GridColumn([values])}, path, "title", [model])
    by_patch = len(np.unique(colours_of_map(path), axis=0))
    visualize.plot_grid({"map": GridColumn([values], is_smooth=True)}, path, "title", [model])
    assert len(np.unique(colours_of_map(path), axis=0)) > 10 * by_patch


@pytest.mark.parametrize(
    "name", ["caf\udce9.png", "a\nb\t$x_$.png", "猫 \U0001f408.png", "x" * 250]
)
def test_any_name_of_a_file_can_stand_in_a_figure(other_run, tmp_path, name):
    model = model_of(other_run / "ckpt.pth")
    model.name = name
    path = tmp_path / "a.png"
    column = GridColumn([np.zeros((4, 4))])
    visualize.plot_grid({"map": column}, str(path), "title", [model, model], [name])
    width, height = Image.open(path).size
    assert width < 1200
    assert height < 600


# ------------------------------------------------------------------------------------------- a run


def test_all_figures_of_a_run_are_drawn(drawn_run):
    names = {"attention.png", "curves.png", "tsne.png", "views.png"}
    assert set(os.listdir(drawn_run.folder)) == names | {"metrics.json", "explorer.html"}
    for name in names:
        assert min(Image.open(drawn_run.folder / name).size) > 300, name


def test_metrics_json_holds_all_that_is_measured(drawn_run):
    result = strict_json(drawn_run.folder / "metrics.json")
    origin = {"checkpoint", "description", "epoch", "settings", "fallbacks"}
    measured = {"best_head", "matched", "paper", "features", "untrained_features", "mean_cosine"}
    measured |= {"collapse", "causal_selectivity", "direct_share", "untrained", "fingerprint"}
    assert result.keys() == origin | measured
    assert result["epoch"] == 2
    assert result["settings"]["patch_size"] == 7
    assert result["fallbacks"] == []
    assert result["best_head"] in result["matched"]

    rows = {"mean", "head_1", "head_2", "head_3", "untrained"}
    rows |= {"brightness", "ink", "oracle", "shuffled", "uniform"}
    maps = {"mean", "rollout", "norm_rollout", "squared_gradient", "brightness", "random"}
    names = {"selectivity", "of_oracle", "auroc", "pointing", "jaccard60", "best_jaccard"}
    names |= {"digit_density", "clutter_density", "background_density", "far_background_density"}
    names |= {"entropy"}
    of_effects = {"equal_ink", "patch_faithfulness", "direct_faithfulness", "object_faithfulness"}
    for layout, rows_of_layout, names_of_layout in (
        ("paper", rows, names),
        ("matched", rows | maps, names | of_effects),
    ):
        table = result[layout]
        assert table.keys() == rows_of_layout
        assert table["head_1"].keys() == names_of_layout
        assert table["mean"].keys() == names_of_layout | {"diversity"}
        assert table["mean"]["entropy"]["images"] == 60
    assert result["untrained"].keys() == maps
    assert result["untrained"]["rollout"].keys() == names | of_effects
    first_block, last_block = result["direct_share"]
    assert first_block["value"] == 1
    assert last_block["images"] == 60
    for key in ("features", "untrained_features"):
        assert result[key].keys() == {"knn", "linear_probe"}
        for cell in result[key].values():
            assert 0 <= cell["low"] <= cell["value"] <= cell["high"] <= 1


def test_attention_over_training_has_a_row_for_each_kept_epoch(run_folder, drawn_run):
    """The same image through the networks of all epochs, then the next image."""
    grid = drawn_run.grids["attention.png"]
    assert grid.row_names == ["epoch 0", "epoch 1", "epoch 2"] * 4
    pictures = grid.columns["input"].arrays
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[0], pictures[2])
    assert not torch.equal(pictures[0], pictures[3])

    networks = [model_of(run_folder / f"epoch-{epoch}.pth").backbone for epoch in (0, 1, 2)]
    untrained = vit.build_network(model_of(run_folder / "ckpt.pth").config).backbone
    assert torch.equal(networks[0].pos_embed, untrained.pos_embed)
    for row, network in enumerate(networks):
        images = pictures[row].movedim(-1, 0)[None]
        heads, _ = explain.cls_attention(network, images)
        for number, attention in enumerate(heads[0], 1):
            drawn = grid.columns[f"head {number}"].arrays[row]
            torch.testing.assert_close(drawn.flatten(), attention)
    first_epoch, _, last_epoch = grid.columns["head 1"].arrays[:3]
    assert not torch.allclose(first_epoch, last_epoch, atol=1e-6)


def test_a_figure_has_the_map_to_believe_between_attention_and_the_effect(run_folder, drawn_run):
    best = best_of(strict_json(drawn_run.folder / "metrics.json"))
    assert next(iter(table_in(drawn_run.printed))) == best.replace("_", " ")
    grid = drawn_run.grids["attention.png"]
    maps = headings_of_maps(best, "highest equal ink")
    heads = ["head 1", "head 2", "head 3"]
    assert list(grid.columns) == ["input", "brightness", *maps, "effect", *heads]
    assert "The digit is outlined in green, clutter in red" in grid.title
    assert "Effect: how much the feature changes if a patch is blackened" in grid.title

    # The third row is that of the last epoch.
    network = model_of(run_folder / "ckpt.pth").backbone
    images = grid.columns["input"].arrays[2].movedim(-1, 0)[None]
    for name, heading in (("brightness", "brightness"), (best, maps[-1])):
        drawn = grid.columns[heading].arrays[2].flatten()
        torch.testing.assert_close(drawn, explain.MAPS[name](network, images)[0])


def test_the_masks_of_a_canvas_are_outlined_in_its_input_alone(run_folder, drawn_run):
    model = model_of(run_folder / "ckpt.pth")
    batch = next(views.evaluation_batches(model.config, model.splits["test"], 4))
    columns = drawn_run.grids["attention.png"].columns
    (green, digits), (red, clutters) = columns["input"].outlines
    assert (green, red) == ("lime", "red")
    # An image has a row for each of three epochs.
    assert torch.equal(torch.stack(digits), batch.digit.repeat_interleave(3, 0))
    assert torch.equal(torch.stack(clutters), batch.clutter.repeat_interleave(3, 0))
    assert [heading for heading, column in columns.items() if column.outlines] == ["input"]


def test_the_note_under_a_map_of_a_canvas_is_its_rank_correlation_with_the_effect(
    run_folder, drawn_run
):
    """Of the second canvas and the last epoch. Patches without ink do not count."""
    columns = drawn_run.grids["attention.png"].columns
    row = 5
    image = columns["input"].arrays[row].movedim(-1, 0)
    ink = torch.stack([masks[row] for _, masks in columns["input"].outlines]).any(0)
    patches_with_ink = []
    blackened = []
    for patch in range(16):
        top = 7 * (patch // 4)
        left = 7 * (patch % 4)
        if ink[top : top + 7, left : left + 7].any():
            patches_with_ink.append(patch)
            blackened.append(image.clone())
            blackened[-1][:, top : top + 7, left : left + 7] = 0
    assert 2 < len(patches_with_ink) < 16

    backbone = model_of(run_folder / "ckpt.pth").backbone
    with torch.no_grad():
        feature = backbone(views.normalize(image[None]))
        changed = backbone(views.normalize(torch.stack(blackened)))
    effect = 1 - F.cosine_similarity(changed, feature)
    drawn = columns["effect"].arrays[row].flatten()
    torch.testing.assert_close(drawn[patches_with_ink], effect, atol=1e-6, rtol=1e-3)
    assert set(drawn.nonzero().flatten().tolist()) <= set(patches_with_ink)
    maps = {heading for heading, column in columns.items() if column.notes}
    assert maps == columns.keys() - {"input", "effect"}
    for heading in maps:
        values = columns[heading].arrays[row].flatten()[patches_with_ink]
        expected = scipy.stats.spearmanr(values, drawn[patches_with_ink]).statistic
        assert float(columns[heading].notes[row]) == pytest.approx(expected, abs=0.0051), heading


def test_a_dash_stands_under_a_map_that_cannot_be_compared_with_the_effect(tmp_path, capsys):
    """A canvas or a picture of a single patch gives no order, and so no best map."""
    weights_path = saved(small_vit(), tmp_path / "w.pth")
    gradient().save(tmp_path / "a.png")
    flags = ["--image-size", "8", "--digits", "sklearn"]
    with recorded_grids() as grids:
        assert look(weights_path, *flags, output=tmp_path) == 0
        capsys.readouterr()
        assert look(weights_path, *flags, "--images", tmp_path / "a.png", output=tmp_path) == 0
    for name, rows in (("attention.png", 8), ("attention-images.png", 1)):
        columns = grids[name].columns
        maps = ["brightness", "attention", "effect", "head 1", "head 2"]
        assert list(columns) == ["input", *maps]
        assert columns["attention"].arrays[0].shape == (1, 1)
        for heading in set(maps) - {"effect"}:
            assert columns[heading].notes == ["–"] * rows
    printed = capsys.readouterr().out
    assert "Which map should you believe? This cannot be told" in printed
    assert all(set(cells) == {"–"} for cells in table_in(printed).values())


def test_attention_of_a_run_that_kept_no_epochs_has_a_row_for_each_image(other_run, tmp_path):
    with recorded_grids() as grids:
        assert look(other_run / "ckpt.pth", output=tmp_path) == 0
    grid = grids["attention.png"]
    best = best_of(strict_json(tmp_path / "metrics.json"))
    maps = headings_of_maps(best, "highest equal ink")
    assert list(grid.columns) == ["input", "brightness", *maps, "effect"]  # one head has no column
    assert len(grid.columns["input"].arrays) == 8
    assert grid.row_names == []


# -------------------------------------------------------------------------- several networks at once


def test_networks_side_by_side_are_each_shown_their_own_size(
    run_folder, other_run, tmp_path, capsys
):
    with recorded_grids() as grids:
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
    names = ["attention-compared.png", "explorer-compared.html", "metrics-compared.json"]
    assert sorted(os.listdir(tmp_path)) == names

    columns = grids["attention-compared.png"].columns
    of_first = headings_of_maps(best_of(first), "highest equal ink", "[1]\n")
    of_second = headings_of_maps(best_of(second), "highest equal ink", "[2]\n")
    shown_first = ["input", "brightness", *of_first, "[1]\neffect"]
    shown_second = ["[2]\ninput", "[2]\nbrightness", *of_second, "[2]\neffect"]
    assert list(columns) == [*shown_first, *shown_second]
    backbone = model_of(other_run / "ckpt.pth").backbone
    images = torch.stack(columns["[2]\ninput"].arrays).movedim(-1, 1)
    drawn = torch.stack(columns[of_second[0]].arrays).flatten(1)
    torch.testing.assert_close(drawn, explain.attention(backbone, images))


def test_numbers_side_by_side_are_those_of_each_network_alone(run_folder, drawn_run, tmp_path):
    checkpoints = [run_folder / "epoch-0.pth", run_folder / "ckpt.pth"]
    with recorded_grids() as grids:
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

    # All are shown the same images, which are drawn once, and so is what depends on nothing else.
    headings = ["input", "brightness"]
    for number, result in enumerate(results, 1):
        best = best_of(result)
        headings += headings_of_maps(best, "highest equal ink", f"[{number}]\n")
        headings.append(f"[{number}]\neffect")
    columns = grids["attention-compared.png"].columns
    assert list(columns) == headings
    assert columns["brightness"].notes == []  # the effect is another for each network
    of_trained = next(heading for heading in columns if heading.startswith("[2]\nattention"))
    images = torch.stack(columns["input"].arrays).movedim(-1, 1)
    attention = explain.attention(model_of(run_folder / "ckpt.pth").backbone, images)
    torch.testing.assert_close(torch.stack(columns[of_trained].arrays).flatten(1), attention)


def test_all_networks_are_shown_marks_if_one_was_trained_with_them(few_images, tmp_path):
    """Else it could not be seen how a network that relies on them differs."""
    checkpoint = torch.load(SAME, weights_only=True)
    checkpoint["config"]["shortcut"] = 0.5
    marked = tmp_path / "marked.pth"
    torch.save(checkpoint, marked)
    flags = ["--no-measure", "--digits", "sklearn"]
    with recorded_grids() as grids:
        assert look(DIFFERENT, marked, *flags, output=tmp_path) == 0
        assert look(DIFFERENT, *flags, output=tmp_path / "without") == 0
    compared = grids["attention-compared.png"]
    assert "[2]\ninput" not in compared.columns  # both are shown the same canvases
    assert "as is the mark" in compared.title
    with recorded_grids() as other_grids:
        assert look(marked, *flags, output=tmp_path) == 0
    alone = other_grids["attention.png"].columns["input"].arrays
    without = grids["attention.png"].columns["input"].arrays
    assert "as is the mark" not in grids["attention.png"].title
    # Both are measured on marks.
    assert look(DIFFERENT, marked, "--digits", "sklearn", output=tmp_path / "measured") == 0
    results = strict_json(tmp_path / "measured" / "metrics-compared.json")
    assert [result["marks"]["reliance"]["images"] > 5 for result in results] == [True, True]
    for shown, of_marked, unmarked in zip(compared.columns["input"].arrays, alone, without):
        assert torch.equal(shown, of_marked)
        assert not torch.equal(shown, unmarked)


# --------------------------------------------------------------------------- networks from elsewhere


def test_weights_from_elsewhere_are_drawn_and_measured_if_asked(
    tmp_path, run_folder, monkeypatch, capsys
):
    """On the paper's canvases: as a checkpoint they are drawn, by --weights they are measured."""
    path = saved(small_vit(), tmp_path / "bare.pth")
    flags = ["--image-size", "40", "--digits", "sklearn"]
    monkeypatch.chdir(run_folder)  # whose kept epochs are not of these weights
    with recorded_grids() as grids:
        assert look(path, *flags, output=tmp_path / "drawn") == 0
    assert sum("(highest here)" in heading for heading in grids["attention.png"].columns) == 1
    assert sorted(os.listdir(tmp_path / "drawn")) == ["attention.png", "explorer.html"]
    printed = capsys.readouterr().out
    assert "Where does it look?" not in printed
    assert f"not measured; measure it with --weights {path}" in printed

    with recorded_grids() as grids:
        assert look("--weights", path, *flags, output=tmp_path / "measured") == 0
    assert grids["attention.png"].row_names == []
    assert "Where does it look?" in capsys.readouterr().out
    of_images = strict_json(tmp_path / "measured" / "metrics.json")["settings"]
    assert of_images["canvas_size"] == 100
    assert of_images["num_distractors"] == 6
    assert of_images["image_size"] == 40


def test_weights_that_are_not_measured_show_the_map_that_is_best_in_the_figure(
    other_run, few_images, tmp_path, capsys
):
    """It is the map with the highest mean of what stands under it."""
    backbone = small_vit()
    path = saved(backbone, tmp_path / "bare.pth")
    run = other_run / "ckpt.pth"
    with recorded_grids() as grids:
        assert look(path, run, "--image-size", "32", "--digits", "sklearn", output=tmp_path) == 0
    assert f"not measured; measure it with --weights {path}" in capsys.readouterr().out
    result = strict_json(tmp_path / "metrics-compared.json")
    assert result["checkpoint"] == str(run)  # the only one that is measured

    # the best map of these eight canvases
    columns = grids["attention-compared.png"].columns
    (_, digits), (_, clutters) = columns["input"].outlines
    correlations = {name: [] for name in explain.NETWORK_MAPS}
    for number, picture in enumerate(columns["input"].arrays):
        effect = columns["[1]\neffect"].arrays[number].flatten()
        ink = metrics.patch_sums((digits[number] | clutters[number])[None], 8)[0] > 0
        for name in explain.NETWORK_MAPS:
            values = explain.MAPS[name](backbone, picture.movedim(-1, 0)[None])[0]
            rho = scipy.stats.spearmanr(values[ink], effect[ink]).statistic
            correlations[name].append(rho)
    best = max(correlations, key=lambda name: np.nanmean(correlations[name]))
    of_weights = [*headings_of_maps(best, "highest here", "[1]\n"), "[1]\neffect"]
    best_of_run = best_of(result)
    of_run = [*headings_of_maps(best_of_run, "highest equal ink", "[2]\n"), "[2]\neffect"]
    assert list(columns)[: 2 + len(of_weights)] == ["input", "brightness", *of_weights]
    assert list(columns)[-len(of_run) :] == of_run


def dino_checkpoint(backbone: VisionTransformer) -> dict:
    """The layout of facebookresearch/dino's main_dino.py."""
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    return {
        "student": {f"module.{name}": value for name, value in state.items()},
        "teacher": state,
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small"),
    }


def test_own_pictures_through_networks_of_any_origin(other_run, tmp_path):
    transparent = tmp_path / "a.png"
    Image.new("RGBA", (80, 60), (9, 200, 30, 128)).save(transparent)
    white = tmp_path / "b.jpg"
    Image.new("RGB", (64, 64), "white").save(white)
    bare = saved(small_vit(), tmp_path / "bare.pth")
    full = tmp_path / "full.pth"
    torch.save(dino_checkpoint(small_vit()), full)
    for number, checkpoints in enumerate(([other_run], [full], [bare, full])):
        output = tmp_path / str(number)
        flags = ["--images", transparent, white, "--image-size", "24"]
        assert look(*checkpoints, *flags, output=output) == 0
        assert sorted(os.listdir(output)) == ["attention-images.png", "explorer-images.html"]


def gradient() -> Image.Image:
    return Image.linear_gradient("L").resize((64, 48))


def test_what_was_assumed_about_weights_is_printed_and_can_be_overridden(tmp_path, capsys):
    path = saved(small_vit(), tmp_path / "w.pth")
    gradient().save(tmp_path / "a.png")
    draw = [path, "--image-size", "40", "--images", tmp_path / "a.png"]
    assert look(*draw, output=tmp_path) == 0
    assert (
        f"{path}: weights, 2 heads (assumed; override with --heads), grid 4×4 (assumed; override "
        f"with --grid)\n{path}: it is given pictures normalised with ImageNet's mean and standard "
        f"deviation\n"
    ) in capsys.readouterr().out
    flags = ["--heads", "4", "--grid", "2x8", "--normalise", "half"]
    assert look(*draw, *flags, output=tmp_path) == 0
    printed = capsys.readouterr().out
    assert f"{path}: weights, 4 heads, grid 2×8\n" in printed
    assert f"{path}: it is given pictures normalised with a mean and standard deviation" in printed
    for flags in (["--heads", "5"], ["--grid", "3x5"], ["--grid", "99999x1"]):
        assert str(path) in error_of(look(*draw, *flags, output=tmp_path), capsys)
    for heads in ("0", "-1", "2.0"):
        with pytest.raises(SystemExit):
            look(*draw, f"--heads={heads}", output=tmp_path)
        assert "argument --heads" in capsys.readouterr().err
    for grid in ("4", "0x4", "-2x-8", "axb"):
        with pytest.raises(SystemExit):
            look(*draw, f"--grid={grid}", output=tmp_path)
        assert "argument --grid" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- pictures


def test_a_folder_of_pictures_is_drawn_in_pages(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(visualize, "PICTURES_PER_PAGE", 2)
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    pictures = ["a.png", "b.tif", "deeper/c.JPG"]
    for turns, name in enumerate(pictures):
        gradient().rotate(90 * turns).save(folder / name, "PNG")
    for name in ("._a.png", "notes.txt"):  # which are no pictures
        (folder / name).write_bytes(b"\0\5\26\7")
    output = tmp_path / "out"
    with recorded_grids() as grids:
        assert look(SAME, "--image-size", "28", "--images", folder, output=output) == 0
    names = ["attention-images-1.png", "attention-images-2.png", "explorer-images.html"]
    assert sorted(os.listdir(output)) == names
    shown = []
    for number, count in ((1, 2), (2, 1)):
        columns = grids[f"attention-images-{number}.png"].columns.values()
        assert all(len(column.arrays) == count for column in columns)
        shown += grids[f"attention-images-{number}.png"].columns["input"].arrays
    for array, name in zip(shown, pictures):
        expected = gallery.open_image(str(folder / name), image_size=28, patch_size=7)
        assert torch.equal(array.movedim(-1, 0), expected)
    # There is one report.
    printed = capsys.readouterr().out
    assert printed.count("Which map should you believe?") == 1
    # The pictures of the first page are measured.
    assert "2 photographs, SRG of 2.\n" in printed
    assert "These are the first 2 of 3 pictures; the others are only drawn." in printed
    assert "effect" in grids["attention-images-1.png"].columns
    assert "effect" not in grids["attention-images-2.png"].columns

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
    path_of_weights = saved(small_vit(dim=64, depth=1, heads=1), tmp_path / "w.pth")
    paths = []
    for name, content in odd_pictures().items():
        path = tmp_path / f"{name}.png"
        path.write_bytes(content)
        paths.append(str(path))
    flags = ["--image-size", "32", "--images", *paths]
    with recorded_grids() as grids:
        assert look(path_of_weights, *flags, output=tmp_path / "out") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert len(grids["attention-images.png"].columns["effect"].arrays) == len(paths)
    count = len(paths)
    assert f"{count} photographs, SRG of {count}; [95% over these images]" in captured.out


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


def test_a_bad_picture_in_a_folder_is_skipped_and_the_rest_is_drawn(tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in (1, 2, 10):
        gradient().save(folder / f"frame{number}.png")
    (folder / "frame3.png").write_bytes((folder / "frame2.png").read_bytes()[:90])
    Image.new("L", (3, 40)).save(folder / "thin.png")
    command = [SAME, "--no-measure", "--images", folder]
    with recorded_grids() as grids:
        assert look(*command, output=tmp_path / "out") == 0
    assert grids["attention-images.png"].row_names == ["frame1.png", "frame2.png", "frame10.png"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"warning: skipped: {folder}/frame3.png cannot be read as a picture")
    assert "3×40 pixels; use at least a patch of 7" in lines[1]

    # A file that is named itself is not skipped, and a folder is not if nothing is left of it.
    status = look(*command, folder / "frame3.png", output=tmp_path / "out")
    assert "frame3.png cannot be read as a picture" in error_of(status, capsys)
    for number in (1, 2, 10):
        (folder / f"frame{number}.png").unlink()
    assert "frame3.png cannot be" in error_of(look(*command, output=tmp_path / "out"), capsys)


def test_the_levels_of_pictures_are_the_same_in_a_call_and_may_be_chosen(tmp_path, capsys):
    paths = []
    for brightest in (900, 4000):
        samples = np.linspace(0, brightest, 56)[None].repeat(56, axis=0).astype(np.uint16)
        paths.append(tmp_path / f"{brightest}.png")
        Image.fromarray(samples).save(paths[-1])
    command = [SAME, "--no-measure", "--images", *paths]
    for flags, white, line in (
        ([], 4095, "0 is black, and 4095 is white; override with --levels"),
        (["--levels", "0", "8000"], 8000, "0 is black, and 8000 is white"),
        (["--levels", "-100", "8000"], None, "-100 is black, and 8000 is white"),
    ):
        with recorded_grids() as grids:
            assert look(*command, *flags, output=tmp_path / "out") == 0
        assert f"--images: 2 pictures of 16-bit samples: {line}\n" in capsys.readouterr().out
        pictures = grids["attention-images.png"].columns["input"].arrays
        for picture, brightest in zip(pictures, (900, 4000)):
            if white is not None:
                assert picture.max().item() == pytest.approx(brightest / white, abs=0.01)
            else:
                assert picture.min().item() == pytest.approx(100 / 8100, abs=0.01)

    gradient().save(tmp_path / "8 bits.png")
    command = [SAME, "--images", tmp_path / "8 bits.png", "--levels", "0", "100"]
    status = look(*command, output=tmp_path / "out")
    assert "--levels: leave it out; files of 8 bits and PGM" in error_of(status, capsys)


def test_examples_says_how_many_test_images_are_drawn(run_folder, other_run, few_images, tmp_path):
    checkpoints = [run_folder / "epoch-0.pth", other_run / "ckpt.pth"]
    quick = ["--no-measure", "--maps", "attention", "--examples", "3"]
    with recorded_grids() as grids:
        assert look(checkpoints[0], *quick, output=tmp_path) == 0
        assert look(*checkpoints, *quick, output=tmp_path) == 0
    assert len(grids["attention.png"].columns["input"].arrays) == 3
    assert len(grids["attention-compared.png"].columns["input"].arrays) == 3


def test_kept_epochs_leave_room_for_fewer_examples(run_folder, tmp_path, capsys):
    status = look(run_folder, "--examples", "64", output=tmp_path)
    assert "one for every kept epoch; use at most " in error_of(status, capsys)


@pytest.mark.parametrize("flags", ["--examples 0", "--examples 65", "--images a.png --examples 2"])
def test_examples_that_make_no_sense_are_refused(tmp_path, capsys, flags):
    with pytest.raises(SystemExit):
        look(SAME, *flags.split(), output=tmp_path)
    assert "error: argument --examples: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", ["--levels 0 9", "--images a.png --levels 9 9", "--images a.png --levels 0 nan"]
)
def test_levels_that_make_no_sense_are_refused(tmp_path, capsys, flags):
    with pytest.raises(SystemExit):
        look(SAME, *flags.split(), output=tmp_path)
    assert "error: argument --levels: " in capsys.readouterr().err


def test_pages_of_an_earlier_call_are_removed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(visualize, "PICTURES_PER_PAGE", 1)
    paths = []
    for number in range(3):
        paths.append(tmp_path / f"{number}.png")
        gradient().save(paths[-1])
    output = tmp_path / "[out]"
    output.mkdir()
    gradient().save(output / "attention-images-of-mine.png")
    command = [SAME, "--no-measure", "--images"]
    assert look(*command, *paths, output=output) == 0
    capsys.readouterr()
    assert look(*command, *paths[:2], output=output) == 0
    assert (
        f"removed {output}/attention-images-3.png, which an earlier call" in capsys.readouterr().out
    )
    names = ["attention-images-1.png", "attention-images-2.png", "attention-images-of-mine.png"]
    assert sorted(os.listdir(output)) == [*names, "explorer-images.html"]
    assert look(*command, paths[0], output=output) == 0
    names = ["attention-images-of-mine.png", "attention-images.png", "explorer-images.html"]
    assert sorted(os.listdir(output)) == names


def test_figures_are_not_taken_for_pictures(tmp_path):
    """Pictures and figures lie in one folder, and the same command is given twice."""
    gradient().save(tmp_path / "a.png")
    for _ in range(2):
        with recorded_grids() as grids:
            assert look(SAME, "--no-measure", "--images", tmp_path, output=tmp_path) == 0
        assert grids["attention-images.png"].row_names == ["a.png"]


# ----------------------------------------------------------------------------- the maps of pictures


def noise(path: Path, width: int, height: int, seed: int = 0) -> Path:
    """The path, where a picture of random colours now is, with a bright part."""
    pixels = np.random.default_rng(seed).integers(0, 200, (height, width, 3)).astype(np.uint8)
    pixels[height // 4 : height // 2, width // 4 : width // 2] = 255
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """A wide, a tall and a square picture."""
    folder = tmp_path_factory.mktemp("pictures")
    sizes = [(40, 16), (24, 60), (32, 32)]
    return [
        noise(folder / f"{seed}.png", width, height, seed)
        for seed, (width, height) in enumerate(sizes)
    ]


@pytest.mark.parametrize(
    "row, maps",
    [
        ("mean", ["attention\n(highest SRG)"]),
        ("rollout", ["attention", "rollout\n(highest SRG)"]),
        ("norm_rollout", ["attention", "norm rollout\n(highest SRG)"]),
        ("squared_gradient", ["attention", "squared gradient\n(highest SRG)"]),
    ],
)
def test_the_map_that_is_drawn_is_the_first_row_of_the_table(
    row, maps, pictures, tmp_path, monkeypatch, capsys
):
    """Whichever map is the best."""
    measure_pictures = evaluate.measure_pictures

    def with_best(*args):
        result = measure_pictures(*args)
        result["photographs"][row]["srg"]["value"] = 0.99
        return result

    monkeypatch.setattr(evaluate, "measure_pictures", with_best)
    path = saved(small_vit(), tmp_path / "w.pth")
    flags = ["--image-size", "24", "--images", pictures[0]]
    with recorded_grids() as grids:
        assert look(path, *flags, output=tmp_path) == 0
    grid = grids["attention-images.png"]
    assert list(grid.columns) == ["input", "brightness", *maps, "effect", "head 1", "head 2"]
    table = table_in(capsys.readouterr().out)
    assert maps[-1] == f"{next(iter(table))}\n(highest SRG)"
    assert "outlined" not in grid.title
    assert "Effect: how much the feature changes if a window of patches is left out" in grid.title


def test_the_note_under_a_map_of_a_picture_is_its_rank_correlation_with_the_effect(tmp_path):
    """11 × 10 patches make 6 × 5 windows of 2 × 2, those in the last row of 1 × 2."""
    path = noise(tmp_path / "a.png", 70, 77)
    maps = "attention,rollout,contrast,heads,effect"
    flags = ["--image-size", "77", "--maps", maps, "--images", path]
    with recorded_grids() as grids:
        assert look(SAME, *flags, output=tmp_path) == 0
    columns = grids["attention-images.png"].columns
    image = columns["input"].arrays[0].movedim(-1, 0)[None]
    assert image.shape == (1, 3, 77, 70)

    backbone = model_of(SAME).backbone
    patches = torch.arange(110).view(11, 10)
    windows = [
        patches[row : row + 2, column : column + 2].flatten()
        for row in range(0, 11, 2)
        for column in range(0, 10, 2)
    ]
    effect = []
    with torch.no_grad():
        feature = backbone(views.normalize(image))
        for window in windows:
            is_kept = torch.ones(110, dtype=torch.bool)
            is_kept[window] = False
            changed = backbone(views.normalize(image), keep=is_kept.nonzero().T)
            effect.append(1 - F.cosine_similarity(changed, feature).item())
    for window, expected in zip(windows, effect):
        drawn = columns["effect"].arrays[0].flatten()[window]
        torch.testing.assert_close(drawn, torch.full_like(drawn, expected), atol=1e-6, rtol=1e-3)
    assert columns["effect"].notes == []
    for heading in columns.keys() - {"input", "effect"}:
        values = columns[heading].arrays[0].flatten()
        # The windows of the last row are cut off, and do not count.
        mass = [values[window].sum().item() for window in windows[:25]]
        expected = scipy.stats.spearmanr(mass, effect[:25]).statistic
        (note,) = columns[heading].notes
        assert float(note) == pytest.approx(expected, abs=0.0051), heading


def test_what_is_printed_of_pictures_is_measured_on_all_of_them(
    pictures, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(evaluate, "ENOUGH_PICTURES", 3)
    backbone = model_of(SAME).backbone
    with recorded_grids() as grids:
        assert look(SAME, "--image-size", "35", "--images", *pictures, output=tmp_path) == 0
    printed = capsys.readouterr().out
    assert "3 photographs, SRG of 3; [95% over these images]" in printed
    description = f"{SAME}: NCE loss, same views, 2 crops, 35 px, patch 7"
    assert description in " ".join(printed.split())
    table = table_in(printed)
    rows = [*explain.NETWORK_MAPS, "brightness", "contrast", "centre"]
    assert table.keys() == {name.replace("_", " ") for name in rows}

    # Under the heading "patches" stands the mean of the notes in the figure, which has heads too.
    columns = grids["attention-images.png"].columns
    for heading, column in columns.items():
        title = heading.partition("\n")[0]
        assert bool(column.notes) == (title in table or title.startswith("head ")), heading
        if title in table:
            _, patches, _ = table[title]
            mean = sum(map(float, column.notes)) / 3
            assert float(patches) == pytest.approx(mean, abs=0.0101), heading

    # SRG is the mean over pictures, whatever their size, and the interval is over pictures too.
    gains = []
    sums = []  # of the whole and of the direct effects
    for array in columns["input"].arrays:
        image = array.movedim(-1, 0)[None]
        curves = effects.left_out_cosines(backbone, image, explain.attention(backbone, image))
        gains.append(metrics.relevance_gain(*curves).item())
        sums.append(effects.window_effects(backbone, image, [0, 1]).sum((1, 2)))
    value, low, high = map(float, re.findall(r"-?\d+\.\d+", table["attention"][0]))
    assert value == pytest.approx(np.mean(gains), abs=0.0051)
    assert min(gains) - 0.01 < low < value < high < max(gains) + 0.01
    whole, direct = sum(sums)
    assert f"into the last block, {direct / whole:.0%} of the effects" in " ".join(printed.split())


def test_of_one_picture_there_is_no_interval(pictures, tmp_path, capsys):
    path = saved(small_vit(), tmp_path / "w.pth")
    assert look(path, "--image-size", "24", "--images", pictures[1], output=tmp_path) == 0
    printed = capsys.readouterr().out
    assert "1 photograph, SRG of 1.\n" in printed
    assert "These are too few pictures to tell." in " ".join(printed.split())
    for title, cells in table_in(printed).items():
        assert cells[0] != "–", title
        assert not any("[" in cell for cell in cells)


def test_networks_on_pictures_have_the_rows_that_each_has_alone(pictures, tmp_path, capsys):
    flags = ["--image-size", "28", "--images", pictures[0]]
    alone = []
    for path in (SAME, DIFFERENT):
        assert look(path, *flags, output=tmp_path) == 0
        alone.append(table_in(capsys.readouterr().out))
    with recorded_grids() as grids:
        assert look(SAME, DIFFERENT, *flags, output=tmp_path) == 0
    printed = capsys.readouterr().out
    table = table_in(printed)
    assert printed.count("Which map should you believe?") == 2
    assert alone[0]["attention"] != alone[1]["attention"]
    expected = {
        f"[{number}] {title}": cells
        for number, rows in enumerate(alone, 1)
        for title, cells in rows.items()
    }
    assert table == expected

    # The figure shows what depends on no network once, and no heads.
    headings = ["input", "brightness"]
    for label, of_network in zip(("[1]", "[2]"), alone):
        best = next(iter(of_network)).replace(" ", "_")
        headings += headings_of_maps(best, "highest SRG", f"{label}\n")
        headings.append(f"{label}\neffect")
    assert list(grids["attention-images.png"].columns) == headings


def test_srg_takes_long_and_may_be_that_of_the_first_pictures_alone(
    pictures, tmp_path, monkeypatch, capsys
):
    """The rest of the table is that of all pictures."""
    command = [SAME, "--image-size", "28", "--images"]
    assert look(*command, *pictures[:2], output=tmp_path) == 0
    of_two = table_in(capsys.readouterr().out)
    monkeypatch.setattr(evaluate, "effect_images", lambda *args, **kwargs: 2)
    assert look(*command, *pictures, output=tmp_path) == 0
    printed = capsys.readouterr().out
    assert "3 photographs, SRG of 2.\n" in printed
    of_three = table_in(printed)
    for title, (gain, *_) in of_three.items():
        assert gain == of_two[title][0]
    assert of_three["attention"][1:] != of_two["attention"][1:]


def test_attention_of_a_network_of_one_block_sees_all(pictures, few_images, tmp_path, capsys):
    """Then an effect through a patch's own token is the whole effect."""
    path = saved(small_vit(dim=64, heads=1, depth=1), tmp_path / "w.pth")
    flags = ["--image-size", "24", "--digits", "sklearn"]
    with recorded_grids() as grids:
        assert look(path, *flags, "--images", *pictures[:2], output=tmp_path) == 0
    printed = capsys.readouterr().out
    assert "These are too few pictures to tell." in " ".join(printed.split())
    for title, (_, patches, direct) in table_in(printed).items():
        assert patches == direct, title
    assert list(grids["attention-images.png"].columns)[-1] == "effect"  # one head has no column

    assert look("--weights", path, *flags, output=tmp_path / "measured") == 0
    sentence = "The network has a single block, so all effects pass straight into it."
    assert sentence in " ".join(capsys.readouterr().out.split())
    result = strict_json(tmp_path / "measured" / "metrics.json")
    assert [cell["value"] for cell in result["direct_share"]] == [1]


def test_maps_chooses_the_columns_and_their_order(
    pictures, run_folder, few_images, tmp_path, capsys
):
    """A name that is given twice counts once."""
    backbone = small_vit()
    path = saved(backbone, tmp_path / "w.pth")
    flags = ["--image-size", "32", "--images", *pictures[:2]]
    maps = "effect,squared_gradient,heads,squared_gradient,random,effect,brightness"
    shown = ["effect", "squared gradient", "head 1", "head 2", "random", "brightness"]
    with recorded_grids() as grids:
        assert look(path, *flags, "--maps", maps, output=tmp_path) == 0
    printed = capsys.readouterr().out.splitlines()
    # what was read, how it was resized, and the two files that were written; no report
    assert len(printed) == 5
    columns = grids["attention-images.png"].columns
    assert list(columns) == ["input", *shown]
    for row, picture in enumerate(columns["input"].arrays):
        image = picture.movedim(-1, 0)[None]
        heads, _ = explain.cls_attention(backbone, image)
        expected = {f"head {number}": head for number, head in enumerate(heads[0], 1)}
        for name in ("squared_gradient", "random", "brightness"):
            expected[name.replace("_", " ")] = explain.MAPS[name](backbone, image)[0]
        for heading, values in expected.items():
            torch.testing.assert_close(columns[heading].arrays[row].flatten(), values)
            assert columns[heading].notes[row]

    # beside another network, what depends on none of them once
    other = saved(small_vit(1), tmp_path / "v.pth")
    with recorded_grids() as grids:
        assert look(path, other, *flags, "--maps", maps, output=tmp_path) == 0
    of_first = [f"[1]\n{heading}" for heading in shown[:4]]
    of_second = [f"[2]\n{heading}" for heading in shown[:4]]
    headings = ["input", *of_first, "random", "brightness", *of_second]
    assert list(grids["attention-images.png"].columns) == headings

    # A run is measured all the same, and the best map is noted if it is there.
    names = ["effect", *explain.NETWORK_MAPS]
    with recorded_grids() as grids:
        assert look(run_folder, "--maps", ",".join(names), output=tmp_path) == 0
    best = best_of(strict_json(tmp_path / "metrics.json"))
    headings = ["input", *(name.replace("_", " ") for name in names)]
    headings[1 + names.index(best)] += "\n(highest equal ink)"
    assert list(grids["attention.png"].columns) == headings


def test_without_the_effect_nothing_is_blackened_or_left_out(
    pictures, tmp_path, monkeypatch, capsys
):
    def refuse(*args):
        pytest.fail("an effect was measured")

    for name in ("blackening_effects", "direct_effects", "window_effects", "left_out_cosines"):
        monkeypatch.setattr(effects, name, refuse)
    path = saved(small_vit(), tmp_path / "w.pth")
    flags = ["--image-size", "32", "--digits", "sklearn", "--maps", "rollout,heads"]
    with recorded_grids() as grids:
        assert look(path, *flags, output=tmp_path) == 0
        capsys.readouterr()
        assert look(path, *flags, "--images", *pictures, output=tmp_path) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5  # no report
    for grid in grids.values():
        assert list(grid.columns) == ["input", "rollout", "head 1", "head 2"]
        assert not any(column.notes for column in grid.columns.values())
        assert "ffect" not in grid.title
    assert sorted(grids) == ["attention-images.png", "attention.png"]


def test_with_no_measure_maps_are_drawn_and_nothing_else(
    pictures, run_folder, tmp_path, monkeypatch, capsys
):
    """Of pictures, of a run, and of two networks; the maps may be chosen, but not the effect."""

    def refuse(*args):
        pytest.fail("something was measured")

    for name in ("blackening_effects", "direct_effects", "window_effects", "left_out_cosines"):
        monkeypatch.setattr(effects, name, refuse)
    monkeypatch.setattr(evaluate, "evaluate", refuse)
    heads = ["head 1", "head 2", "head 3"]
    for command, columns, name in (
        ([SAME, "--images", *pictures], ["attention", "rollout", *heads], "attention-images.png"),
        ([run_folder], ["attention", "rollout", *heads], "attention.png"),
        ([SAME, DIFFERENT, "--images", *pictures], None, "attention-images.png"),
        ([SAME, DIFFERENT, "--digits", "sklearn"], None, "attention-compared.png"),
        ([SAME, "--images", *pictures, "--maps", "contrast"], ["contrast"], "attention-images.png"),
    ):
        if columns is None:
            names = ("attention", "rollout")
            columns = [f"[{number}]\n{map_name}" for number in (1, 2) for map_name in names]
        with recorded_grids() as grids:
            assert look(*command, "--no-measure", output=tmp_path / "out") == 0
        assert list(grids) == [name]
        assert list(grids[name].columns) == ["input", *columns]
        assert "Which map should you believe?" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        look(SAME, "--no-measure", "--maps", "effect", output=tmp_path)


def test_overlay_and_smooth_reach_every_map(pictures, tmp_path):
    for flags in ([], ["--overlay"], ["--smooth"], ["--overlay", "--smooth"]):
        with recorded_grids() as grids:
            command = [SAME, DIFFERENT, "--no-measure", "--images", *pictures, *flags]
            assert look(*command, output=tmp_path) == 0
        grid = grids["attention-images.png"]
        assert ("over the input" in grid.title) == ("--overlay" in flags)
        shown = grid.columns.pop("input")
        assert not shown.pictures
        for column in grid.columns.values():
            assert column.is_smooth == ("--smooth" in flags)
            assert bool(column.pictures) == ("--overlay" in flags)
            assert all(map(torch.equal, column.pictures, shown.arrays))


@pytest.mark.parametrize(
    "maps, unknown",
    [
        ("nonsense", "nonsense"),
        ("attention,Effect", "Effect"),
        ("norm rollout", "norm rollout"),
        ("mean", "mean"),
        ("attention,", ""),
        ("", ""),
    ],
)
def test_unknown_maps_are_refused_with_the_names_that_exist(tmp_path, capsys, maps, unknown):
    with pytest.raises(SystemExit) as stopped:
        look(SAME, "--maps", maps, output=tmp_path / "out")
    assert stopped.value.code == 2
    names = "attention,rollout,norm_rollout,squared_gradient,brightness,contrast,centre,random"
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"visualize.py: error: argument --maps: {unknown!r}: use some of {names},effect,heads, "
        f"with commas between them"
    )
    assert not (tmp_path / "out").exists()


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
    assert visualize.main([str(run), "--device", "cpu", "--image-size", "35"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "These are photographs" in printed
    # Of a single picture there is no interval, and so nothing is said of attention.
    assert ("passes straight into the last block" in printed) == (test_images > 2)
    assert ("linear probe –" in printed) == (classes == 1)
    for name in ("views.png", "attention.png", "curves.png"):
        assert min(Image.open(run / name).size) > 200, name
    is_drawn = (run / "tsne.png").exists()
    assert is_drawn == (test_images == 40)
    assert is_drawn != ("no tsne.png: t-SNE needs more than" in printed)

    result = strict_json(run / "metrics.json")
    images = result["photographs"]["mean"]["entropy"]["images"]  # some are for validation
    assert images > test_images / 3
    assert re.search(rf", SRG of {images}[;.]", printed)
    maps = {"mean", "rollout", "norm_rollout", "squared_gradient"}
    maps |= {"brightness", "contrast", "centre", "random"}
    assert result["photographs"].keys() == maps | {"head_1", "head_2", "head_3", "untrained"}
    assert result["untrained"].keys() == maps
    names = {"srg", "patch_faithfulness", "direct_faithfulness"}
    for table in (result["photographs"], result["untrained"]):
        assert table["mean"].keys() == names | {"entropy", "diversity"}
        assert table["centre"].keys() == names
        for name in names:
            assert -1 <= table["mean"][name]["value"] <= 1
    assert [cell["images"] for cell in result["direct_share"]] == [images] * 2
    assert result["settings"]["image_size"] == 35
    assert "not the whole of STL-10" in result["fallbacks"][0]


def test_photographs_and_digits_side_by_side(run_folder, tmp_path, capsys):
    """Weights that were not trained here are shown what the first run was shown."""
    write_stl10(tmp_path, unlabeled=16, train=20, test=12)
    run = tmp_path / "run"
    assert start(run, f"--epochs 1 --dataset stl10 --data-root {tmp_path}") == 0
    capsys.readouterr()
    with recorded_grids() as grids:
        assert look(run, run_folder, "--weights", "none", output=tmp_path / "out") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("Where does it look?") == 3
    assert printed.count("Where does it look? These are photographs") == 2
    results = strict_json(tmp_path / "out" / "metrics-compared.json")
    assert ["matched" in result for result in results] == [False, True, False]
    assert (tmp_path / "out" / "attention-compared.png").exists()
    headings = list(grids["attention-compared.png"].columns)
    noted = [heading for heading in headings if "highest" in heading]
    reasons = {heading[:3]: heading.partition("(")[2] for heading in noted}
    expected = {"[1]": "highest SRG)", "[2]": "highest equal ink)", "[3]": "highest SRG)"}
    for label, result in zip(list(expected), results):
        if result["collapse"]:  # no map of that one is to be believed
            del expected[label]
    assert reasons == expected
    assert "[3]" in reasons
    # Each network's pictures are other ones than the last network's.
    inputs = [heading for heading in headings if "input" in heading]
    assert inputs == ["input", "[2]\ninput", "[3]\ninput"]


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
    picture_files.read_folder.cache_clear()
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
    gradient().save(tmp_path / "a.png")
    pictures = ["--images", str(tmp_path / "a.png")]
    for command in (
        [path],
        [run_folder / "ckpt.pth", path],
        [path, *pictures],
        [run_folder / "ckpt.pth", path, *pictures, "--maps", "attention"],
    ):
        status = look(*command, output=tmp_path)
        assert f"{path}: the attention is NaN or infinite" in error_of(status, capsys)


BAD_INPUT = [
    ("", "nothing to look at; use a ckpt.pth"),
    ("missing.pth", "missing.pth: no such file"),
    ("CKPT missing.pth", "missing.pth: no such file"),
    (".", "./ckpt.pth: no such file"),
    ("text.pth", "text.pth is no PyTorch checkpoint"),
    ("CKPT --images text.pth", "text.pth cannot be read as a picture"),
    ("CKPT --images missing.png", "missing.png: no such file; use a picture or a folder"),
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


def test_checkpoints_may_stand_after_pictures_and_between_flags(
    run_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run_folder, "run")
    shutil.copy(SAME, "same.pth")
    gradient().save("a.png")
    gradient().save("run/b.png")
    for command, checkpoints, images in (
        ("--images a.png same.pth", ["same.pth"], ["a.png"]),
        ("--images a.png run", ["run/ckpt.pth"], ["a.png"]),
        ("same.pth --images a.png run", ["same.pth"], ["a.png", "run"]),  # which has a picture
        ("--weights none --images run", [], ["run"]),
        ("same.pth --images a.png run/ckpt.pth", ["same.pth", "run/ckpt.pth"], ["a.png"]),
        ("same.pth --device cpu run", ["same.pth", "run/ckpt.pth"], []),
        ("--images a.png --device cpu same.pth", ["same.pth"], ["a.png"]),
    ):
        args = visualize.parse_args(command.split())
        assert args.checkpoints == checkpoints, command
        assert args.images == images, command
    status = look("--images", "a.png", "same.pth", "--no-measure", output="out")
    assert status == 0
    assert "nothing to look at" in error_of(look("--images", "same.pth", output="out"), capsys)


# --------------------------------------------------------------------------------- other machines


def run_python(*command, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        check=False,
    )


def test_only_figures_need_matplotlib():
    code = "import train, gallery, sys; assert 'matplotlib' not in sys.modules"
    assert run_python("-c", code).returncode == 0


@pytest.mark.parametrize(
    "before, backend",
    [("import matplotlib; matplotlib.use('svg')", "svg"), ("", "pdf")],
)
def test_importing_leaves_the_plots_of_the_host_alone(before, backend):
    """Whether it has chosen a backend or leaves that to the environment."""
    code = (
        f"{before}\n"
        "import os, sys, visualize, matplotlib; assert 'matplotlib.pyplot' not in sys.modules\n"
        f"assert matplotlib.get_backend() == {backend!r}; assert os.environ['MPLBACKEND'] == 'pdf'\n"
        "assert matplotlib.rcParams['text.parse_math']"
    )
    process = run_python("-c", code, MPLBACKEND="pdf")
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("script", ["train.py", "visualize.py"])
@pytest.mark.parametrize("kind", ["a notebook's", "none", "closed"])
def test_any_standard_output_will_do(script, kind, monkeypatch):
    closed = io.StringIO()
    closed.close()
    output = {"a notebook's": io.StringIO(), "none": None, "closed": closed}[kind]
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "stderr", sys.stderr)  # which is put back if it is replaced
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert ended.value.code == 0
    if kind == "a notebook's":
        assert "usage:" in output.getvalue()


@pytest.fixture(scope="module")
def foreign_process(tmp_path_factory) -> subprocess.CompletedProcess:
    """A picture drawn in a notebook, with names that neither font nor code page can show."""
    folder = tmp_path_factory.mktemp("猫の絵")
    picture = folder / "猫 τ.png"
    gradient().save(picture)
    checkpoint = folder / "Größe 重み.pth"
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
    assert "Größe ??.pth: teacher.backbone" in printed


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
    "--maps": ["attention", "effect,heads,attention", "brightness,random", "heads,nonsense", ","],
    "--image-size": ["7", "14", "56", "70", "50", "0", "-7"],
    "--digits": ["sklearn", "auto", "mnist"],
    "--background": ["black", "texture", "folder"],
    "--data-root": ["folder"],
    "--device": ["cpu", "cuda:77", "meta"],
    "--output": ["new", "folder", "text.pth"],
}
# Flags with no value, or with two.
SWITCHES = [["--no-measure"], ["--overlay"], ["--smooth"], ["--save-maps"]]
SWITCHES += [["--levels", "0", "255"], ["--levels", "-5", "nan"], ["--levels", "9", "2"]]
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

    flag = st.sampled_from(sorted(FLAGS)).flatmap(words)
    flags = st.lists(st.one_of(flag, flag, flag, st.sampled_from(SWITCHES)), max_size=4)
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


# ---------------------------------------------------------------------------------------- the page


def page_data(path: Path) -> dict:
    """What is written into the explorer's page."""
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), re.DOTALL)[1])


def test_the_page_of_a_run_has_its_epochs_and_its_report(drawn_run):
    (network,) = page_data(drawn_run.folder / "explorer.html")["networks"]
    assert [epoch["label"] for epoch in network["epochs"]] == ["epoch 0", "epoch 1", "epoch 2"]
    weights_of_epochs = [epoch["net"]["norm"][0]["data"] for epoch in network["epochs"]]
    assert len(set(weights_of_epochs)) == 3
    assert len(network["pictures"]) == 12 // 3
    printed = " ".join(drawn_run.printed.split())
    assert all(sentence in printed for sentence in network["sentences"])
    assert len(network["sentences"]) == 3
    rows = [row["text"] for row in network["table"]["rows"]]
    assert [title for title in table_in(drawn_run.printed) if title in rows]
    columns = drawn_run.grids["attention.png"].columns
    (notes,) = [column.notes for name, column in columns.items() if name.startswith("attention")]
    # the last epoch's correlations stand under the maps of the figure, in the rows of that epoch
    for number, of_picture in enumerate(network["epochs"][-1]["pictures"]):
        correlations = {entry["name"]: entry.get("correlation") for entry in of_picture["maps"]}
        assert notes[3 * number + 2] == f"{correlations['attention']:.2f}"


def test_a_run_that_train_py_has_measured_is_not_measured_again(tmp_path, few_images, monkeypatch):
    run = tmp_path / "run"
    assert start(run) == 0
    at_the_end = strict_json(run / "metrics.json")

    def fail(*arguments):
        raise AssertionError("it is measured")

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "measure_canvases", fail)
        assert look(run, output=tmp_path / "figures") == 0
    again = strict_json(tmp_path / "figures" / "metrics.json")
    assert again["matched"] == at_the_end["matched"]
    assert again["checkpoint"] == f"{run}/ckpt.pth"
    assert (tmp_path / "figures" / "attention.png").exists()

    # Other images have other numbers.
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "measure_canvases", fail)
        with pytest.raises(AssertionError, match="it is measured"):
            look(run, "--image-size", "14", output=tmp_path / "others")


def test_the_page_of_several_networks_has_each(other_run, tmp_path):
    assert look(SAME, other_run, "--digits", "sklearn", output=tmp_path) == 0
    networks = page_data(tmp_path / "explorer-compared.html")["networks"]
    assert [network["name"] for network in networks] == [SAME, str(other_run / "ckpt.pth")]
    for network in networks:
        assert network["table"]["rows"][0]["cells"]
        assert len(network["epochs"][0]["pictures"]) == 8


def test_the_page_of_pictures_holds_the_first_page_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(visualize, "PICTURES_PER_PAGE", 2)
    for name in ("a.png", "b.png", "c.png"):
        gradient().save(tmp_path / name)
    out = tmp_path / "out"
    flags = ["--image-size", "28", "--images", tmp_path]
    assert look(SAME, *flags, "--save-maps", output=out) == 0
    content = page_data(out / "explorer-images.html")
    (network,) = content["networks"]
    assert [picture["name"] for picture in network["pictures"]] == ["a.png", "b.png"]
    assert "This page holds the first 2 of 3 pictures." in content["notes"]
    assert len(network["sentences"]) == 1
    # the arrays are of all pictures
    saved_maps = np.load(out / "maps-images.npz")
    assert saved_maps["pictures"].tolist() == ["a.png", "b.png", "c.png"]
    assert "0/1/effect" in saved_maps
    assert "0/2/effect" not in saved_maps
    assert "0/2/norm_rollout" in saved_maps
    assert saved_maps["0/2/attention"].shape == (3, 4)


def test_arrays_are_saved_of_every_epoch(run_folder, tmp_path):
    assert look(run_folder, "--save-maps", "--maps", "attention", output=tmp_path) == 0
    saved_maps = np.load(tmp_path / "maps.npz")
    path = str(run_folder / "ckpt.pth")
    names = [f"{path}, epoch {number}" for number in range(3)]
    assert saved_maps["networks"].tolist() == names
    maps = [saved_maps[f"{number}/1/attention"] for number in range(3)]
    assert not np.allclose(maps[0], maps[2])
    model = model_of(path)
    expected = explain.attention(model.backbone, gallery.example_images(model, 2)[1].picture[None])
    np.testing.assert_allclose(maps[2].flatten(), expected[0], atol=1e-6)


# --------------------------------------------------------------------------------- block and query


def test_a_block_and_a_query_are_drawn(tmp_path, capsys):
    """Over pictures and canvases; without the report on [CLS], and without the page."""
    gradient().save(tmp_path / "a.png")
    model = model_of(SAME)
    flags = ["--block", "1", "--query", "2,4", "--save-maps"]
    out = tmp_path / "pictures"
    with recorded_grids() as grids:
        assert look(SAME, "--images", tmp_path / "a.png", *flags, output=out) == 0
    assert sorted(os.listdir(out)) == ["attention-images.png", "maps-images.npz"]
    assert "Which map should you believe?" not in capsys.readouterr().out
    title = grids["attention-images.png"].title
    assert "block 1, the patch in row 2, column 4" in title
    picture = gallery.open_image(str(tmp_path / "a.png"), 56, 7)
    columns = (picture.shape[2]) // 7
    token = 5 + columns + 3
    expected = explain.attention(model.backbone, picture[None], block=0, token=token)
    (drawn,) = grids["attention-images.png"].columns["attention"].arrays
    torch.testing.assert_close(drawn.flatten(), expected[0])

    # The last block is the default, so it changes nothing.
    out = tmp_path / "last"
    flags = ["--images", tmp_path / "a.png", "--no-measure", "--block", "-1"]
    assert look(SAME, *flags, output=out) == 0
    assert sorted(os.listdir(out)) == ["attention-images.png", "explorer-images.html"]

    out = tmp_path / "canvases"
    with recorded_grids() as grids:
        assert look(SAME, "--digits", "sklearn", "--block", "-2", output=out) == 0
    assert not (out / "explorer.html").exists()
    canvas = gallery.example_images(model, 1)[0].picture[None]
    expected = explain.head_attention(model.backbone, canvas, block=-2)[0, 1]
    drawn = grids["attention.png"].columns["head 2"].arrays[0]
    torch.testing.assert_close(drawn.flatten(), expected)


def test_several_runs_may_stand_after_the_pictures(tmp_path):
    gradient().save(tmp_path / "a.png")
    runs_after = []
    for name in ("same", "different"):
        (tmp_path / name).mkdir()
        shutil.copy(SHIPPED / f"{name}.pth", tmp_path / name / "ckpt.pth")
        runs_after.append(str(tmp_path / name))
    args = visualize.parse_args(["--images", str(tmp_path / "a.png"), *runs_after])
    assert args.images == [str(tmp_path / "a.png")]
    assert args.checkpoints == [f"{run}/ckpt.pth" for run in runs_after]
    # A run that holds pictures may be meant as their folder.
    gradient().save(tmp_path / "different" / "b.png")
    args = visualize.parse_args(["--images", str(tmp_path / "a.png"), *runs_after])
    assert args.images == [str(tmp_path / "a.png"), runs_after[1]]


def test_of_many_pictures_only_the_first_page_is_measured_for_another_block(tmp_path, monkeypatch):
    monkeypatch.setattr(visualize, "PICTURES_PER_PAGE", 2)
    pictures = [noise(tmp_path / f"{number}.png", 21, 14, number) for number in range(3)]
    flags = ["--images", *pictures, "--image-size", "21", "--block", "1", "--save-maps"]
    assert look(SAME, *flags, output=tmp_path / "out") == 0
    arrays = np.load(tmp_path / "out" / "maps-images.npz")
    assert [f"0/{number}/effect" in arrays for number in range(3)] == [True, True, False]
    assert [f"0/{number}/attention" in arrays for number in range(3)] == [True, True, True]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--block", "3"], "--block 3: use 1 to 2, or -1 to -2 from the end"),
        (["--query", "9,1"], "--query 9,1: test canvas 1 has 8 rows and 8 columns of patches"),
    ],
)
def test_a_block_or_patch_that_is_not_there_is_refused(tmp_path, capsys, flags, message):
    assert look(SAME, "--digits", "sklearn", *flags, output=tmp_path / "out") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("query", ["1", "0,1", "1,0", "a,b", "1x2", "-1,2", "1,2,3"])
def test_a_query_that_is_no_row_and_column_is_refused(query):
    with pytest.raises(SystemExit):
        visualize.parse_args([SAME, f"--query={query}"])
