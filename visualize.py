"""Draw where a trained network looks, and measure it against the truth.

    python visualize.py runs/clutter-nce-different/ckpt.pth
    python visualize.py runs/clutter-nce-same/ckpt.pth runs/clutter-nce-different/ckpt.pth
    python visualize.py --weights dino
    python visualize.py runs/clutter-nce-different/ckpt.pth --images cat.jpg dog.png

The first command prints what the [CLS] token of the last block attends to, and writes metrics.json;
attention.png, where it looks in each head (the paper's figures 4 and 6); curves.png, how that came
about; views.png, what the two branches were fed; and tsne.png, the features (figures 2 and 3).
"""

import argparse
import glob
import math
import os
import re
import socket
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

os.environ.pop("MPLBACKEND", None)  # a notebook's, which may not be installed here
import matplotlib

matplotlib.use("Agg")  # draws to files; needs no screen
matplotlib.rcParams["text.parse_math"] = False  # a $ in a file's name is a $

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from sklearn.manifold import TSNE
from torch import Tensor
from tqdm import tqdm

import data
import effects
import evaluate
import explain
import metrics
import report
import runs
import settings
import views
import vit
import weights
from losses import make_loss
from observe import TokenEffects, concatenate, measure_tokens, name_of, row_of
from settings import Config
from vit import VisionTransformer

# Settings that say which images a network is shown. Weights that do not come from train.py take
# them from the run beside them, or else are shown the paper's canvases.
DATA_SETTINGS = ("dataset", "split", "background", "digits", "data_root", "image_size")
DATA_SETTINGS += ("canvas_size", "num_distractors", "distractor_size")
# Flags of the command line that override the settings of a checkpoint.
OVERRIDES = ("image_size", "digits", "background", "data_root")
PICTURES_PER_PAGE = 20
MAP_NAMES = (*explain.MAPS, "effect", "heads")  # of --maps
STL10_CLASSES = (
    "airplane",
    "bird",
    "car",
    "cat",
    "deer",
    "dog",
    "horse",
    "monkey",
    "ship",
    "truck",
)
MEAN_LINE = {"color": "black", "linewidth": 2}
REFERENCE_LINE = {"color": "grey", "linestyle": "--"}
CHANCE_LINE = {"color": "silver", "linestyle": ":"}
MASK_COLORS = ("lime", "red")  # outlines of digit and clutter


@dataclass
class Model:
    """A network to look at, and the settings under which it is looked at."""

    name: str  # what it is called in figures and tables: its file, or the flag that named it
    path: str  # of its file, or "none"
    config: Config
    backbone: VisionTransformer
    epoch: int | None = None  # None: not from a run of train.py
    history: list | None = None  # the lines of its log.jsonl
    splits: dict | None = None  # the digits or photographs that it is shown
    is_measured: bool = False  # runs of train.py are measured, and what --weights names

    def describe(self) -> str:
        return evaluate.describe(self.config, self.epoch, is_run=self.history is not None)


@dataclass
class Example:
    """An image to draw maps of, in [0, 1], and its masks if there are any."""

    picture: Tensor  # (1 or 3, H, W)
    masks: tuple[Tensor, ...] = ()  # of digit and clutter, (H, W) bool


@dataclass
class GridColumn:
    """A column of a figure: an array for each row, and what is drawn over or under them.

    Arrays are pictures (H, W, 3) in [0, 1], or maps (rows, columns), each coloured from 0 (black)
    to its own maximum.
    """

    arrays: list
    outlines: list[tuple] = field(default_factory=list)  # [(color, a mask (H, W) for each row)]
    notes: list[str] = field(default_factory=list)  # what stands under each array


@dataclass
class MapsOfExample:
    """What one network makes of one example."""

    maps: dict[str, Tensor]  # {name: (rows, columns)}: maps, "effect", and "head 1" and so on
    # {name: rank correlation of a map with the effect}, if that was asked for; NaN if it has none
    correlations: dict[str, float]
    token_effects: TokenEffects | None = None  # of a picture


@dataclass
class LookedAt:
    """A network, the examples it was shown, and the maps that it, or its earlier epochs, made of them.

    A figure has a row for each example.
    """

    model: Model
    examples: list[Example]
    maps: list[MapsOfExample]
    names: list[str] = field(default_factory=list)  # of the maps that are drawn
    best: dict[str, str] = field(default_factory=dict)  # {name of the map to believe: why}


# ----------------------------------------------------------------------------------------- drawing


def save_figure(figure, path: str, title: str, models: list[Model]):
    """Write a figure. Above it stand the title, what it was made from, and what was replaced."""
    lines = []
    for number, model in enumerate(models, 1):
        label = f"[{number}] {model.name}: " if len(models) > 1 else ""
        lines.append(label + model.describe())
    # What was replaced, each once. The reason, after the colon, is in the warning that is printed.
    fallbacks = [line for model in models for line in model.config.fallbacks]
    lines += dict.fromkeys(line.partition(":")[0] for line in fallbacks)
    characters = int(15 * figure.get_figwidth())
    wrapped = [title]
    for line in lines:
        wrapped += textwrap.wrap(line[:300], characters, break_on_hyphens=False)
    figure.suptitle("\n".join(wrapped), fontsize=9)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # there is one for each that the font lacks
        figure.savefig(path, dpi=120, bbox_inches="tight", pad_inches=0.1)
    plt.close(figure)
    tqdm.write(f"wrote {path}")


def extent_in_column(array, row: float) -> tuple[float, float, float, float]:
    """Left, right, bottom, top of an array in a column of `plot_grid`, where it is at most 1 wide.

    `array` is (height, width, …); `row` is the height of its centre.
    """
    height, width = array.shape[:2]
    half_height = 0.47 * height / max(height, width)
    half_width = 0.47 * width / max(height, width)
    return -half_width, half_width, row + half_height, row - half_height


def plot_grid(
    columns: dict[str, GridColumn], path: str, title: str, models: list[Model], row_names=()
):
    """Pictures and maps in columns, {heading: GridColumn}, which all have as many rows."""
    rows = len(next(iter(columns.values())).arrays)
    shapes = [np.shape(array)[:2] for column in columns.values() for array in column.arrays]
    tallest = max(height / max(height, width) for height, width in shapes)
    has_notes = any(column.notes for column in columns.values())
    pitch = 0.94 * tallest + (0.21 if has_notes else 0.06)  # from row to row
    lines_above = title.count("\n") + len(models) + max(name.count("\n") for name in columns)
    size = (max(6, 1.4 * len(columns)), 1.45 * rows * pitch + 0.8 + 0.17 * lines_above)
    # One axis for each column, `pitch` high for each row: an axis for every picture takes ten times
    # as long. "compressed": no gaps between pictures, however wide the title is.
    figure, axes = plt.subplots(1, len(columns), figsize=size, squeeze=False, layout="compressed")
    for axis, (heading, column) in zip(axes[0], columns.items()):
        axis.set_title(heading, fontsize=8)
        for row, array in enumerate(column.arrays):
            array = np.asarray(array)
            extent = extent_in_column(array, row * pitch)
            axis.imshow(array, cmap="inferno", vmin=0, extent=extent)
            if column.notes:
                bottom = extent[2]
                note = column.notes[row]
                axis.text(0, bottom + 0.02, note, ha="center", va="top", fontsize=7)
        for color, masks in column.outlines:
            draw_outlines(axis, masks, color, pitch)
        top = -0.47 * tallest - 0.03
        axis.set(xlim=(-0.5, 0.5), ylim=(top + rows * pitch, top))
        axis.axis("off")
    for row, name in enumerate(row_names):
        axes[0, 0].text(-0.56, row * pitch, name, rotation=90, ha="right", va="center", fontsize=8)
    save_figure(figure, path, title, models)


def draw_outlines(axis, masks: list[Tensor], color: str, pitch: float):
    """The outline of each row's mask (H, W) in a column of `plot_grid`."""
    for row, mask in enumerate(masks):
        if mask.any():
            axis.contour(
                mask.cpu().numpy(),
                levels=[0.5],
                colors=color,
                linewidths=0.7,
                origin="upper",
                extent=extent_in_column(mask, row * pitch),
            )


def plot_views(model: Model, path: str, images: int = 4):
    """views.png: the crops of the first training step for each branch, one row for each image."""
    training_split = model.splits["train"]
    batch_size = min(model.config.batch_size, len(training_split))
    config = replace(model.config, batch_size=batch_size)
    training_views = views.TrainingViews(config, training_split)
    params = training_views.sample(step=0)
    crops = training_views.render({name: value[:images] for name, value in params.items()})
    crops = views.denormalize(crops).movedim(2, -1).clamp(0, 1).cpu()  # (crops, images, H, W, 3)

    plan = training_views.plan
    branches = {"teacher": plan.teacher, "student": plan.student}
    if plan.teacher == plan.student:
        branches = {"both": plan.teacher}
    columns = {}
    for branch, numbers in branches.items():
        for position, number in enumerate(numbers, 1):
            canvas, size = plan.crops[number]  # 0 or 1, "global" or "local"
            heading = f"{branch}, {position}\n{size}"
            if model.config.views == "different":
                heading += f", canvas {'ab'[canvas]}"
            columns[heading] = GridColumn(list(crops[number]))
    plot_grid(columns, path, "What each branch is fed", [replace(model, epoch=None)])


def plot_attention(networks: list[LookedAt], path: str, row_names: Sequence[str] = ()):
    """The input and the maps of each network, a row for each example."""
    columns = {}
    last_pictures = None
    last_patch_size = None
    for number, network in enumerate(networks, 1):
        label = f"[{number}]\n" if len(networks) > 1 else ""
        # the input, unless it is the same as the last network's
        pictures = [as_rgb(example.picture) for example in network.examples]
        is_new = last_pictures is None or not all(map(torch.equal, last_pictures, pictures))
        label_of_pictures = label if columns else ""
        if is_new:
            masks = zip(*(example.masks for example in network.examples))  # all digits, all clutter
            outlines = list(zip(MASK_COLORS, masks))
            columns[f"{label_of_pictures}input"] = GridColumn(pictures, outlines)
            last_pictures = pictures
        patch_size = network.model.backbone.shape.patch_size
        has_new_grid = is_new or patch_size != last_patch_size
        last_patch_size = patch_size

        for name in heads_spelled_out(network.names, network.model.backbone.shape.heads):
            arrays = [of_example.maps[name] for of_example in network.maps]
            heading = name.replace("_", " ")
            if name in network.best:
                heading += f"\n({network.best[name]})"
            notes = [correlation_note(of_example, name) for of_example in network.maps]
            # Of several networks, what depends on none of them is drawn once.
            if len(networks) > 1 and name in explain.CONTROLS:
                if has_new_grid:
                    columns[f"{label_of_pictures}{heading}"] = GridColumn(arrays)
            else:
                columns[f"{label}{heading}"] = GridColumn(arrays, notes=notes if any(notes) else [])
    plot_grid(
        columns, path, attention_title(networks), [network.model for network in networks], row_names
    )


def as_rgb(picture: Tensor) -> Tensor:
    """A picture (1 or 3, H, W) as matplotlib draws it: (H, W, 3)."""
    return picture.expand(3, -1, -1).movedim(0, -1).cpu()


def heads_spelled_out(names: list[str], heads: int) -> list[str]:
    """The names of maps, with "heads" replaced by "head 1" and so on."""
    spelled = []
    for name in names:
        if name == "heads":
            spelled += [f"head {number}" for number in range(1, heads + 1)]
        else:
            spelled.append(name)
    return spelled


def correlation_note(of_example: MapsOfExample, name: str) -> str:
    """What stands under a map: its rank correlation with the effect."""
    correlation = of_example.correlations.get(name)
    if correlation is None:
        return ""
    return "–" if math.isnan(correlation) else f"{correlation:.2f}"


def attention_title(networks: list[LookedAt]) -> str:
    """What stands above maps."""
    title = "Where the network looks; each map from 0 (black) to its own maximum"
    has_masks = [bool(example.masks) for network in networks for example in network.examples]
    if any(has_masks):
        title += ". The digit is outlined in green, clutter in red"
    if any("effect" in network.names for network in networks):
        change = "a window of patches is left out"
        if all(has_masks):
            change = "a patch is blackened"
        elif any(has_masks):
            change = "a patch is blackened (of photographs: a window is left out)"
        title += (
            f"\nEffect: how much the feature changes if {change}. "
            f"Under the maps: their rank correlation with the effect"
        )
    return title


@torch.no_grad()
def maps_of(
    backbone: VisionTransformer,
    example: Example,
    names: Sequence[str],
    index: int = 0,
    with_srg: bool = False,
) -> MapsOfExample:
    """The named maps of an example, and their rank correlation with the effect if that is named.

    The effect is that of blackening a patch with ink. Without masks it is that of leaving a window
    of patches out; then `token_effects` are measured as well, with the SRG of each map if
    `with_srg`. `index` is the picture's number.
    """
    images = example.picture[None].to(backbone.cls_token.device)
    patch_size = backbone.shape.patch_size
    grid = metrics.patch_grid(images, patch_size)
    maps = {name: explain.MAPS[name](backbone, images) for name in names if name in explain.MAPS}
    if "heads" in names:
        heads, _ = explain.cls_attention(backbone, images)
        for number, head in enumerate(heads.unbind(1), 1):
            maps[f"head {number}"] = head

    correlations = {}
    token_effects = None
    if "effect" in names and example.masks:
        ink = torch.stack(example.masks).any(0)[None]
        has_ink = metrics.patch_sums(ink.to(images.device), patch_size) > 0
        features = effects.feature_of(backbone, images)
        effect = effects.blackening_effects(backbone, images, has_ink, features)
        for name, values in maps.items():
            # on the CPU, since Apple's GPUs have no float64
            correlation = metrics.spearman(values.cpu(), effect.cpu(), has_ink.cpu())
            correlations[name] = correlation.item()
        maps["effect"] = effect
    elif "effect" in names:
        rows = {row_of(name): values for name, values in maps.items()}
        srg_rows = []
        if with_srg:
            srg_rows = [row_of(name) for name in evaluate.PHOTO_MAPS]
        number = torch.tensor([index])
        effect, token_effects = measure_tokens(backbone, images, rows, number, srg_rows)
        for name in maps:
            correlations[name] = token_effects.patch_faithfulness[row_of(name)].item()
        maps["effect"] = effect[:, effects.window_of_patches(grid)]
    maps = {name: values[0].unflatten(-1, grid).cpu() for name, values in maps.items()}
    return MapsOfExample(maps, correlations, token_effects)


def plot_curves(model: Model, path: str):
    """curves.png: the lines of log.jsonl against epochs, on validation images."""
    lines = [line["validation"] for line in model.history]
    heads = [row for row in lines[0] if row.startswith("head_")]
    names = ["selectivity", "auroc", "pointing", "equal_ink", "patch_faithfulness", "entropy"]
    names = [name for name in names if name in lines[0]["mean"]]
    if len(heads) > 1:
        names.append("diversity")

    # two rows of panels: the loss, the metrics, k-NN, the legend
    panels = ["loss", *names, "knn", "legend"]
    if len(panels) % 2:
        panels.append(".")  # an empty place
    width = len(panels) // 2
    figure, axes = plt.subplot_mosaic(
        [panels[:width], panels[width:]], figsize=(3.5 * width, 6.6), layout="constrained"
    )
    plot_loss_curve(axes["loss"], model)
    for name in names:
        plot_metric_curves(axes[name], model, name, heads)
    plot_knn_curve(axes["knn"], model)

    legend = axes.pop("legend")
    legend.axis("off")
    handles, labels = axes[names[0]].get_legend_handles_labels()
    columns = 1 if len(heads) <= 6 else 2
    legend.legend(handles, labels, loc="center", fontsize=9, ncols=columns)
    titles = {
        "equal_ink": "equal ink: pairs ordered right",
        "patch_faithfulness": "patch faithfulness",
        "entropy": "entropy (1: uniform)",
        "diversity": "diversity of the heads, bits",
        "knn": "k-NN accuracy, %",
    }
    for name, axis in axes.items():
        axis.set_title(titles.get(name, name), fontsize=11)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
    title = (
        f"{lines[0]['images']} validation images, attention of the teacher; equal ink and patch "
        f"faithfulness: a sixteenth of the images, so some noise"
    )
    save_figure(figure, path, title, [model])


def plot_loss_curve(axis, model: Model):
    """The loss in training and on validation images, and that of a network that knows nothing."""
    epochs = [line["epoch"] for line in model.history]
    training = [line["loss"] for line in model.history[1:]]  # there is none before the first step
    validation = [line["validation"]["loss"] for line in model.history]
    axis.plot(epochs[1:], training, ".-", color="grey", label="training")
    axis.plot(epochs, validation, **MEAN_LINE, label="validation")
    name, level = make_loss(model.config).chance(model.config.batch_size)
    axis.axhline(level, **REFERENCE_LINE, label=f"{name}, chance")
    axis.legend(fontsize=8)


def plot_metric_curves(axis, model: Model, metric: str, heads: list[str]):
    """One metric of the mean of the heads, of each head, and of the baselines."""
    epochs = [line["epoch"] for line in model.history]
    lines = [line["validation"] for line in model.history]
    styles = {}
    if len(heads) > 1:
        styles = {head: {"linewidth": 1} for head in heads}
    styles["mean"] = MEAN_LINE
    if metric != "entropy":
        styles["brightness"] = {"color": "darkorange", "linestyle": "--"}
        styles["shuffled"] = {"color": "purple", "linestyle": "--"}
    for row, style in styles.items():
        values = np.array([line.get(row, {}).get(metric) for line in lines], float)
        axis.plot(epochs, values, **style, label=report.title_of(row))
    untrained = lines[0]["mean"][metric]
    if untrained is not None:  # it is None where there is no clutter
        axis.axhline(untrained, **REFERENCE_LINE, label="untrained")
    if metric == "selectivity":
        axis.axhline(1, **CHANCE_LINE, label="ink, uniform")
    if metric in ("auroc", "equal_ink"):
        axis.axhline(0.5, **CHANCE_LINE, label="ink, uniform")


def plot_knn_curve(axis, model: Model):
    """k-NN accuracy, and that of the untrained network."""
    epochs = [line["epoch"] for line in model.history]
    accuracy = [100 * line["validation"]["knn"] for line in model.history]
    axis.plot(epochs, accuracy, **MEAN_LINE)
    axis.axhline(accuracy[0], **REFERENCE_LINE)


def plot_tsne(model: Model, evaluation: evaluate.Evaluation, path: str):
    """tsne.png: test features in the plane, coloured by class (section III.A, perplexity 20)."""
    features = evaluation.features
    if len(features) <= 20:
        count = len(features)
        print(f"no tsne.png: t-SNE needs more than 20 test images, and there are only {count}")
        return
    has_collapsed = (features == features[0]).all()
    if has_collapsed:  # t-SNE would divide by zero
        plane = np.zeros((len(features), 2), np.float32)
    else:
        plane = TSNE(perplexity=20, init="pca", random_state=0).fit_transform(features.numpy())
    figure, axis = plt.subplots(figsize=(6, 6.4), layout="constrained")
    labels = evaluation.labels.numpy()
    dots = axis.scatter(*plane.T, c=labels, cmap="tab10", vmin=-0.5, vmax=9.5, s=8)
    bar = figure.colorbar(dots, ax=axis, ticks=range(10), label="class", shrink=0.8)
    if model.config.dataset == "stl10":
        bar.ax.set_yticklabels(STL10_CLASSES)
    axis.set(xticks=[], yticks=[])
    accuracy = evaluation.result["features"]["knn"]["value"]
    title = f"t-SNE of {len(features):,} test images; k-NN accuracy {100 * accuracy:.1f}%"
    save_figure(figure, path, title, [model])


# ----------------------------------------------------------------------------------- opening files


@torch.no_grad()
def expect_half(backbone: VisionTransformer):
    """Make a network that expects pictures (x − 0.5) / 0.5 expect those of `views.normalize`.

    Both normalizations are affine maps, and so is the patch embedding, which takes the change.
    """
    proj = backbone.patch_embed.proj
    shift = (views.MEAN.flatten() - 0.5) / 0.5
    proj.bias += proj.weight.sum((2, 3)) @ shift
    proj.weight *= views.STD / 0.5


def open_model(source: str, args: argparse.Namespace, like: Model | None = None) -> Model:
    """The network in a file, or for "none" one with random weights.

    A run of train.py is shown images like those it was trained on. If `like` is given, or for other
    weights, the images are those of `like`, or else the paper's canvases. Raises ValueError or
    OSError for a file or an image size that does not fit.
    """
    content = {}
    if source == "none":
        backbone = random_backbone(like)
    else:
        loaded = weights.load_backbone(source, args.heads, args.grid)
        backbone = loaded.backbone
        content = loaded.content
        normalisation = "ImageNet's mean and standard deviation"
        if args.normalise == "half" and "config" not in content:
            expect_half(backbone)
            normalisation = "a mean and standard deviation of 0.5"
        print(f"{source}: {loaded.description}, pictures normalised with {normalisation}")

    epoch = content.get("epoch")
    history = content.get("metrics")
    is_ours = "config" in content and epoch is not None and history is not None
    is_run = is_ours and like is None
    if is_run:
        if not all("validation" in line for line in history):
            raise ValueError(f"{source}: its log is of a version that is too old to be drawn")
        try:
            config = settings.config_from_checkpoint(content["config"])
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    else:
        config = config_for_weights(backbone, like)
        config.weights = os.path.basename(source)
        epoch = None
        history = None

    for name in OVERRIDES:
        if getattr(args, name) is not None:
            setattr(config, name, getattr(args, name))
    patch_size = backbone.shape.patch_size
    if config.image_size < 1 or config.image_size % patch_size:
        raise ValueError(
            f"--image-size {config.image_size}: use a multiple of the patch size {patch_size}"
        )
    for name, value in asdict(backbone.shape).items():
        setattr(config, name, value)
    return Model(source, source, config, backbone.eval(), epoch, history, is_measured=is_run)


def random_backbone(like: Model | None) -> VisionTransformer:
    """A ViT with random weights, of the shape of the run beside it, or else ViT-S/8."""
    if like is not None:
        return vit.build_network(like.config).backbone
    torch.manual_seed(0)
    return VisionTransformer()


def config_for_weights(backbone: VisionTransformer, like: Model | None) -> Config:
    """Settings that say what weights are shown: what `like` is, or else the paper's canvases."""
    config = settings.make_config(preset="paper")
    if like is not None:
        for name in DATA_SETTINGS:
            setattr(config, name, getattr(like.config, name))
    patch_size = backbone.shape.patch_size
    config.image_size = max(1, round(config.image_size / patch_size)) * patch_size
    return config


def list_images(names: list[str]) -> list[str]:
    """The pictures that --images names: files, and all those in a folder."""
    paths = []
    for name in names:
        pictures = data.image_files(name) if os.path.isdir(name) else [name]
        if not pictures:
            raise ValueError(f"--images {name}: no pictures there; use another folder, or files")
        paths += pictures
    return list({os.path.realpath(path): path for path in paths}.values())  # each file once


def open_image(path: str, image_size: int, patch_size: int) -> Tensor:
    """A picture (3, H, W) in [0, 1], its longer side image_size, both multiples of the patch."""
    picture = data.read_image(path)
    if min(picture.size) < patch_size:
        size = f"{picture.width}×{picture.height}"
        raise ValueError(f"--images {path}: {size} pixels; use at least a patch of {patch_size}")
    scale = image_size / max(picture.size)
    size = [max(1, round(side * scale / patch_size)) * patch_size for side in picture.size]
    pixels = np.array(picture.resize(size, Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


def kept_epochs(model: Model) -> dict[str, VisionTransformer]:
    """{"epoch 1": backbone, …}: the epochs that a run kept beside its checkpoint, itself last."""
    backbones = {model.epoch: model.backbone}
    folder = glob.escape(os.path.dirname(model.path))
    for path in glob.glob(os.path.join(folder, "epoch-*.pth")):
        kept = weights.load_backbone(path)
        epoch = kept.content.get("epoch")
        is_ours = "config" in kept.content and isinstance(epoch, int)
        has_same_heads = kept.backbone.shape.heads == model.backbone.shape.heads
        if is_ours and has_same_heads and epoch < model.epoch:
            backbones[epoch] = kept.backbone.to(model.backbone.cls_token.device)
    return {f"epoch {epoch}": backbones[epoch] for epoch in sorted(backbones)}


def example_images(model: Model, count: int) -> list[Example]:
    """The first test images, with their masks if any; canvases are in the matched layout."""
    batch = next(views.evaluation_batches(model.config, model.splits["test"], count))
    pictures = batch.images.clamp(0, 1)
    if batch.digit is None:
        return [Example(picture) for picture in pictures]
    masks = zip(batch.digit, batch.clutter)
    return [Example(picture, of_picture) for picture, of_picture in zip(pictures, masks)]


# -------------------------------------------------------------------------------- the command line


def rows_x_columns(text: str) -> tuple[int, int]:
    """(4, 6) for "4x6"; argparse prints the error for anything else."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: use rows x columns, such as 14x28")
    return int(match[1]), int(match[2])


def map_names(text: str) -> list[str]:
    """["attention", "effect"] for "attention,effect"; argparse prints the error for other names."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in MAP_NAMES:
            raise argparse.ArgumentTypeError(
                f"{name!r}: use some of {','.join(MAP_NAMES)}, with commas between them"
            )
    return list(dict.fromkeys(names))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "visualize.py", description="Draw and measure where a trained network looks."
    )
    parser.add_argument(
        "checkpoints",
        nargs="*",
        metavar="CKPT",
        type=runs.checkpoint_path,
        help="a checkpoint of train.py, the folder of a run, or the weights of any ViT",
    )
    parser.add_argument(
        "--weights",
        metavar="{dino,none,FILE}",
        help="also measure weights that were not fine-tuned, on the canvases of the first "
        "checkpoint, or else on the paper's: none (random weights), a file, or "
        f"{', '.join(weights.DINO_FILES)}",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        default=[],
        metavar="FILE",
        help="draw the attention over these pictures, or over all in a folder, instead",
    )
    parser.add_argument(
        "--maps",
        type=map_names,
        metavar="NAME,…",
        help=f"the columns of the figure: {', '.join(MAP_NAMES)} [brightness, attention, the map to "
        "believe, effect, heads]; without effect, pictures are drawn quickly and there is no report",
    )
    parser.add_argument(
        "--image-size", type=int, help="side of the input in pixels [as trained, else 224]"
    )
    parser.add_argument(
        "--heads",
        type=int,
        help="number of attention heads, for weights that do not say it [width / 64]",
    )
    parser.add_argument(
        "--grid",
        type=rows_x_columns,
        metavar="RxC",
        help="rows x columns of the positions, for weights that do not say it [a square]",
    )
    parser.add_argument(
        "--normalise",
        choices=["imagenet", "half"],
        default="imagenet",
        help="what the weights expect: ImageNet's mean and deviation, or 0.5 for both, as "
        "Google's and AugReg's do",
    )
    parser.add_argument(
        "--digits", choices=["auto", "mnist", "sklearn"], help="[as trained, else auto]"
    )
    parser.add_argument(
        "--background",
        metavar="{black,texture,DIR}",
        help="what lies behind the digits [as trained]",
    )
    parser.add_argument(
        "--data-root", help="folder that holds MNIST/raw/ or stl10_binary/ [as trained, else data]"
    )
    parser.add_argument("--device", default=settings.default_device(), help="[%(default)s]")
    parser.add_argument(
        "--output", help="folder for what is written [the first checkpoint's, or runs/weights-…]"
    )
    args = parser.parse_args(argv)
    for name in ("weights", "maps", "background", "data_root", "output"):
        if getattr(args, name) == []:  # what argparse makes of "--output=--"
            parser.error(f"argument --{name.replace('_', '-')}: expected one argument")
    return args


def make_folder(args: argparse.Namespace) -> str:
    """The folder for what is written, tried before anything is drawn. Raises OSError."""
    if args.output:
        folder = args.output
    elif args.checkpoints:
        folder = os.path.dirname(args.checkpoints[0]) or "."
    elif args.weights == "none" or args.weights in weights.DINO_FILES:
        folder = os.path.join("runs", f"weights-{args.weights}")
    else:
        folder = os.path.dirname(args.weights) or "."
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(
            f"{folder} cannot be written to ({error.strerror}); use --output with another folder"
        ) from error
    return folder


def open_models(args: argparse.Namespace) -> list[Model]:
    """The networks of the command line, on the CPU; ValueError if there is none."""
    models = [open_model(path, args) for path in args.checkpoints]
    if args.weights is not None:
        trained = [model for model in models if model.history is not None]
        model = open_model(args.weights, args, trained[0] if trained else None)
        model.name = f"--weights {args.weights}"
        model.is_measured = True
        models.append(model)
    if not models:
        raise ValueError("nothing to look at; use a ckpt.pth, or --weights dino, none or a file")
    return models


def visualize(args: argparse.Namespace):
    """Everything that `python visualize.py` does; raises ValueError or OSError on bad input."""
    models = open_models(args)
    device = runs.find_device(args.device)
    if args.images:
        examples = open_pictures(models, list_images(args.images))
        for model in models:
            model.backbone.to(device)
        draw_pictures(models, examples, args)
        return

    warnings_printed = set()
    for model in models:
        model.backbone.to(device)
        model.splits, config = data.load_dataset(model.config, device)
        new_fallbacks = set(config.fallbacks) - set(model.config.fallbacks)
        for line in sorted(new_fallbacks - warnings_printed):
            print(f"warning: {line}", file=sys.stderr)
        warnings_printed |= new_fallbacks
        model.config = config
    if len(models) == 1:
        visualize_one(models[0], args)
    else:
        compare(models, args)


def names_to_compute(args: argparse.Namespace, controls: Sequence[str]) -> list[str]:
    """The maps that --maps names, or else all those among which the best is looked for."""
    return args.maps or [*explain.NETWORK_MAPS, *controls, "effect", "heads"]


def names_to_draw(args: argparse.Namespace, best: dict[str, str], with_heads: bool) -> list[str]:
    """The maps that --maps names, or else a few: brightness, attention, the best map, the effect."""
    if args.maps:
        return args.maps
    names = ["brightness", "attention", *best, "effect"]
    if with_heads:
        names.append("heads")
    return list(dict.fromkeys(names))


def best_by_report(result: dict) -> dict[str, str]:
    """{name of the map to believe: why}; empty if that cannot be told."""
    row = report.best_map(result)
    metric = report.headline(report.measured_table(result))
    return {} if row is None else {name_of(row): f"highest {report.HEADLINES[metric]}"}


def best_by_correlation(maps: list[MapsOfExample]) -> dict[str, str]:
    """{name of the map to believe: why}, for a network that is not measured.

    It is the map with the highest mean of the numbers that stand under the maps.
    """
    means = {}
    for name in explain.NETWORK_MAPS:
        values = torch.tensor([of_example.correlations.get(name, math.nan) for of_example in maps])
        if not values.isnan().all():
            means[name] = values.nanmean().item()
    return {max(means, key=means.get): "highest here"} if len(means) > 1 else {}


def visualize_one(model: Model, args: argparse.Namespace):
    """Draw and measure one network."""
    epochs = kept_epochs(model) if model.history else {}
    if len(epochs) < 2:
        epochs = {"": model.backbone}
    count = 8 if len(epochs) == 1 else max(1, 12 // len(epochs))
    examples = example_images(model, count)
    folder = make_folder(args)

    names = names_to_compute(args, ["brightness"])
    rows = [(backbone, example) for example in examples for backbone in epochs.values()]
    maps = maps_of_examples(rows, names)
    network = LookedAt(model, [example for _, example in rows], maps)
    check_finite(network)
    evaluation = None
    if model.is_measured:
        evaluation = evaluate.evaluate(
            model.name, model.config, model.history, model.backbone, model.splits
        )
        network.best = best_by_report(evaluation.result)
    else:
        print_not_measured(model)
        network.best = best_by_correlation(maps)
    network.names = names_to_draw(args, network.best, with_heads=model.backbone.shape.heads > 1)
    row_names = list(epochs) * len(examples) if len(epochs) > 1 else []
    plot_attention([network], os.path.join(folder, "attention.png"), row_names)
    if evaluation is None:
        return
    save_and_print([evaluation], os.path.join(folder, "metrics.json"))
    if model.history:
        plot_views(model, os.path.join(folder, "views.png"))
        plot_curves(model, os.path.join(folder, "curves.png"))
    plot_tsne(model, evaluation, os.path.join(folder, "tsne.png"))


def maps_of_examples(
    rows: list[tuple[VisionTransformer, Example]], names: Sequence[str]
) -> list[MapsOfExample]:
    """The named maps of each pair of a network and an example."""
    rows = tqdm(rows, "maps", unit="image", leave=False, disable=None)
    return [maps_of(backbone, example, names) for backbone, example in rows]


def check_finite(network: LookedAt):
    """Raise FloatingPointError, with the name of the network, if a map is not finite."""
    for of_example in network.maps:
        for name, values in of_example.maps.items():
            if not values.isfinite().all():
                title = name.replace("_", " ")
                raise FloatingPointError(f"{network.model.name}: the {title} is NaN or infinite")


def compare(models: list[Model], args: argparse.Namespace):
    """Draw several networks side by side, and measure them in one table."""
    examples = [example_images(model, 8) for model in models]
    folder = make_folder(args)
    names = names_to_compute(args, ["brightness"])
    networks = []
    for model, of_model in zip(models, examples):
        maps = maps_of_examples([(model.backbone, example) for example in of_model], names)
        networks.append(LookedAt(model, of_model, maps))
        check_finite(networks[-1])

    measured = [model for model in models if model.is_measured]
    evaluations = []
    for network in networks:
        model = network.model
        if model.is_measured:
            # The table of a network has a row for the next one's attention on the same images.
            other = measured[(measured.index(model) + 1) % len(measured)]
            has_same_patches = other.backbone.shape.patch_size == model.backbone.shape.patch_size
            other_backbone = None
            if other is not model and has_same_patches:
                other_backbone = other.backbone
            evaluation = evaluate.evaluate(
                model.name,
                model.config,
                model.history,
                model.backbone,
                model.splits,
                other_backbone,
            )
            evaluations.append(evaluation)
            network.best = best_by_report(evaluation.result)
        else:
            print_not_measured(model)
            network.best = best_by_correlation(network.maps)
        network.names = names_to_draw(args, network.best, with_heads=False)

    plot_attention(networks, os.path.join(folder, "attention-compared.png"))
    if evaluations:
        save_and_print(evaluations, os.path.join(folder, "metrics-compared.json"))


def print_not_measured(model: Model):
    print(
        f"{model.name} does not come from train.py, so it is drawn on the paper's canvases but not "
        f"measured; measure it with --weights {model.name}"
    )


def save_and_print(evaluations: list[evaluate.Evaluation], path: str):
    """Write metrics.json, and print the report."""
    results = [evaluation.result for evaluation in evaluations]
    evaluate.write_metrics(results, path)
    print(report.format_report(results, path))


def open_pictures(models: list[Model], paths: list[str]) -> list[list[Example]]:
    """For each model, the pictures, resized for it."""
    examples = [[] for _ in models]
    for path in tqdm(paths, "reading", unit="picture", leave=False, disable=None):
        for of_model, model in zip(examples, models):
            shape = model.backbone.shape
            picture = open_image(path, model.config.image_size, shape.patch_size)
            of_model.append(Example(picture))
    return examples


def draw_pictures(models: list[Model], examples: list[list[Example]], args: argparse.Namespace):
    """attention-images.png, or pages of it, and the printed report on the maps of these pictures.

    Without --maps only the pictures of the first page are measured, and only there is the effect
    drawn: measuring a picture takes longer than a hundred forward passes.
    """
    folder = make_folder(args)
    names = names_to_compute(args, ["brightness", *explain.PHOTO_CONTROLS])
    count = len(examples[0])
    measured = count if args.maps else min(count, PICTURES_PER_PAGE)
    networks = []
    results = []
    for model, of_model in zip(models, examples):
        maps = maps_of_pictures(model, of_model[:measured], names, with_srg=not args.maps)
        network = LookedAt(model, of_model, maps)
        check_finite(network)
        if not args.maps:
            token_effects = concatenate([of_picture.token_effects for of_picture in maps])
            collapse = None
            if model.history:
                collapse = evaluate.collapse_warning(model.config, model.history)
            result = evaluate.measure_pictures(
                model.name, model.describe(), token_effects, collapse
            )
            network.best = best_by_report(result)
            results.append(result)
        with_heads = len(models) == 1 and model.backbone.shape.heads > 1
        network.names = names_to_draw(args, network.best, with_heads)
        if measured < count:
            rest = [name for name in network.names if name != "effect"]
            maps += maps_of_pictures(model, of_model[measured:], rest, with_srg=False)
            check_finite(network)
        networks.append(network)

    for start in range(0, count, PICTURES_PER_PAGE):
        page = slice(start, start + PICTURES_PER_PAGE)
        name = "attention-images.png"
        if count > PICTURES_PER_PAGE:
            name = f"attention-images-{start // PICTURES_PER_PAGE + 1}.png"
        on_page = [network_on_page(network, page, start < measured) for network in networks]
        plot_attention(on_page, os.path.join(folder, name))
    if results:
        print(report.format_picture_report(results))
        if measured < count:
            print(f"These are the first {measured} of {count} pictures; the others are only drawn.")


def network_on_page(network: LookedAt, page: slice, with_effect: bool) -> LookedAt:
    """What a page shows of a network."""
    names = network.names
    if not with_effect:
        names = [name for name in names if name != "effect"]
    return replace(network, examples=network.examples[page], maps=network.maps[page], names=names)


def maps_of_pictures(
    model: Model, examples: list[Example], names: Sequence[str], with_srg: bool
) -> list[MapsOfExample]:
    """The named maps of each picture. SRG takes long, so only the first pictures have it."""
    count = 0
    if with_srg:
        count = evaluate.effect_images(
            model.backbone, model.config.image_size, evaluate.PHOTO_PASSES, at_least=4
        )
    numbered = enumerate(tqdm(examples, "maps", unit="picture", leave=False, disable=None))
    return [
        maps_of(model.backbone, example, names, number, with_srg=number < count)
        for number, example in numbered
    ]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    socket.setdefaulttimeout(15)  # seconds; a host that has not answered by then is unreachable
    try:
        visualize(args)
    except (OSError, ValueError, FloatingPointError, MemoryError, RuntimeError) as error:
        print(f"visualize.py: error: {runs.error_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("visualize.py: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # Windows' code pages often lack τ
    sys.exit(main())
