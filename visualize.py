"""Draw where a trained network looks, and measure it against the truth.

    python visualize.py runs/clutter-nce-different/ckpt.pth
    python visualize.py runs/clutter-nce-same/ckpt.pth runs/clutter-nce-different/ckpt.pth
    python visualize.py --weights dino
    python visualize.py runs/clutter-nce-different/ckpt.pth --images cat.jpg dog.png

The first command prints what the [CLS] token of the last block attends to, and writes metrics.json;
attention.png, where it looks in each head (the paper's figures 4 and 6); curves.png, how that came
about; views.png, what the two branches were fed; tsne.png, the features (figures 2 and 3); and
explorer.html, a page for a browser in which all of this can be tried.
"""

import argparse
import contextlib
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
from dataclasses import dataclass, field, replace

# A notebook's backend may not be installed here; matplotlib could not even be imported with it.
backend_of_host = None
if "matplotlib" not in sys.modules:
    backend_of_host = os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib.style
except UnicodeDecodeError as error:
    sys.exit(f"visualize.py: error: matplotlibrc is not UTF-8 ({error}); mend or remove it")

if backend_of_host is not None:
    os.environ["MPLBACKEND"] = backend_of_host
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = backend_of_host

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import data
import evaluate
import explain
import explorer
import gallery
import picture_files
import report
import runs
import settings
import views
import weights
from gallery import Example, LookedAt, MapsOfExample, Model, Query
from losses import make_loss
from observe import concatenate, name_of

PICTURES_PER_PAGE = 20
EXAMPLES = 8  # test images in a figure and on the page, unless --examples says how many
MOST_ROWS = 64  # of a figure of test images; many more make a picture that cannot be written
LONGEST_ROW_NAME = 24  # characters
OVERLAY_OPACITY = 0.8  # of the maximum of a map over a picture
MAP_NAMES = (*explain.MAPS, "effect", "heads")  # of --maps
QUICK_MAPS = ["attention", "rollout", "heads"]  # with --no-measure, a forward pass each
# How the files end that hold weights, so that a checkpoint after --images is not taken for a picture.
WEIGHT_ENDINGS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".tar")
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
class GridColumn:
    """A column of a figure: an array for each row, and what is drawn over or under them.

    Arrays are pictures (H, W, 3) in [0, 1], or maps (rows, columns), each coloured from 0 (black)
    to its own maximum.
    """

    arrays: list
    outlines: list[tuple] = field(default_factory=list)  # [(color, a mask (H, W) for each row)]
    notes: list[str] = field(default_factory=list)  # what stands under each array
    # With these, the picture (H, W, 3) that is seen through each map
    pictures: list = field(default_factory=list)
    is_smooth: bool = False  # maps are interpolated between the centres of patches


# ----------------------------------------------------------------------------------------- drawing


@contextlib.contextmanager
def own_style():
    """Within this context matplotlib draws as it does by default, whatever the user's settings.

    Figures are made without pyplot, which would choose a backend for the whole program, such as a
    notebook's.
    """
    # A $ in a file's name is a $.
    with matplotlib.style.context(["default", {"text.parse_math": False}]):
        yield


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
    text = "\n".join(wrapped)
    # A font refuses what is not UTF-8, which a file's name may hold.
    text = "\n".join(map(picture_files.printable, text.split("\n")))
    figure.suptitle(text, fontsize=9)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # there is one for each that the font lacks
        figure.savefig(
            path,
            dpi=120,
            bbox_inches="tight",
            pad_inches=0.1,
            metadata={"Software": picture_files.FIGURE_MARK},
        )
    tqdm.write(f"wrote {path}")


def extent_in_column(array, row: float) -> tuple[float, float, float, float]:
    """Left, right, bottom, top of an array in a column of `plot_grid`, where it is at most 1 wide.

    `array` is (height, width, …); `row` is the height of its centre.
    """
    height, width = array.shape[:2]
    half_height = 0.47 * height / max(height, width)
    half_width = 0.47 * width / max(height, width)
    return -half_width, half_width, row + half_height, row - half_height


@own_style()
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
    row_names = [picture_files.shortened(name, LONGEST_ROW_NAME) for name in row_names]
    width_of_names = 0.08 * max(map(len, row_names), default=0)
    width = max(6, 1.4 * len(columns)) + width_of_names
    size = (width, 1.45 * rows * pitch + 0.8 + 0.17 * lines_above)
    # One axis for each column, `pitch` high for each row: an axis for every picture takes ten times
    # as long. "compressed": no gaps between pictures, however wide the title is.
    figure = Figure(figsize=size, layout="compressed")
    axes = figure.subplots(1, len(columns), squeeze=False)
    for axis, (heading, column) in zip(axes[0], columns.items()):
        axis.set_title(heading, fontsize=8)
        for row, array in enumerate(column.arrays):
            array = np.asarray(array)
            extent = extent_in_column(array, row * pitch)
            opacity = 1
            if column.pictures:
                axis.imshow(np.asarray(column.pictures[row]), extent=extent)
                # 0 is transparent, so what gets no attention is seen as it is
                opacity = OVERLAY_OPACITY * array.clip(min=0) / max(array.max(), 1e-12)
            axis.imshow(
                array,
                cmap="inferno",
                vmin=0,
                extent=extent,
                alpha=opacity,
                interpolation="bilinear" if column.is_smooth else "auto",
            )
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
        axes[0, 0].text(-0.53, row * pitch, name, ha="right", va="center", fontsize=8)
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


def plot_attention(
    networks: list[LookedAt],
    path: str,
    row_names: Sequence[str] = (),
    is_overlay: bool = False,
    is_smooth: bool = False,
):
    """The input and the maps of each network, a row for each example.

    With `is_overlay` the input is seen through the maps; with `is_smooth` these have no edges.
    """
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
            column = GridColumn(
                arrays, pictures=pictures if is_overlay else [], is_smooth=is_smooth
            )
            heading = name.replace("_", " ")
            if name in network.best:
                heading += f"\n({network.best[name]})"
            notes = [correlation_note(of_example, name) for of_example in network.maps]
            # Of several networks, what depends on none of them is drawn once.
            if len(networks) > 1 and name in explain.CONTROLS:
                if has_new_grid:
                    columns[f"{label_of_pictures}{heading}"] = column
            else:
                column.notes = notes if any(notes) else []
                columns[f"{label}{heading}"] = column
    models = [network.model for network in networks]
    plot_grid(columns, path, attention_title(networks, is_overlay), models, row_names)


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


def attention_title(networks: list[LookedAt], is_overlay: bool = False) -> str:
    """What stands above maps."""
    title = "Where the network looks; each map"
    query = networks[0].query.describe()
    if query:
        title = f"Attention and rollout: {query}. Each map"
    if is_overlay:
        title += " over the input, from 0 (transparent) to its own maximum"
    else:
        title += " from 0 (black) to its own maximum"
    has_masks = [bool(example.masks) for network in networks for example in network.examples]
    if any(has_masks):
        title += ". The digit is outlined in green, clutter in red"
        if any(network.model.has_marks for network in networks):
            title += ", as is the mark"
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


@own_style()
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
    figure = Figure(figsize=(3.5 * width, 6.6), layout="constrained")
    axes = figure.subplot_mosaic([panels[:width], panels[width:]])
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


@own_style()
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
        from sklearn.manifold import TSNE  # takes a second to import

        plane = TSNE(perplexity=20, init="pca", random_state=0).fit_transform(features.numpy())
    figure = Figure(figsize=(6, 6.4), layout="constrained")
    axis = figure.subplots()
    labels = evaluation.labels.numpy()
    dots = axis.scatter(*plane.T, c=labels, cmap="tab10", vmin=-0.5, vmax=9.5, s=8)
    bar = figure.colorbar(dots, ax=axis, ticks=range(10), label="class", shrink=0.8)
    if model.config.dataset == "stl10":
        bar.ax.set_yticklabels(STL10_CLASSES)
    axis.set(xticks=[], yticks=[])
    accuracy = evaluation.result["features"]["knn"]["value"]
    title = f"t-SNE of {len(features):,} test images; k-NN accuracy {100 * accuracy:.1f}%"
    save_figure(figure, path, title, [model])


# -------------------------------------------------------------------------------- the command line


def rows_x_columns(text: str) -> tuple[int, int]:
    """(4, 6) for "4x6"; argparse prints the error for anything else."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: use rows x columns, such as 14x28")
    return int(match[1]), int(match[2])


def number_from_1(text: str) -> int:
    """12 for "12"; argparse prints the error for anything else."""
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: use a whole number from 1")
    return int(text)


def row_and_column(text: str) -> tuple[int, int]:
    """(3, 12) for "3,12"; argparse prints the error for anything else."""
    match = re.fullmatch(r"([1-9]\d{0,5}),([1-9]\d{0,5})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: use a row and a column from 1, such as 3,12")
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
        "believe, effect, heads]; with --images there is then no report, and without effect it is quick",
    )
    parser.add_argument(
        "--examples",
        type=number_from_1,
        metavar="N",
        help="how many test images are drawn [8, or fewer if epochs were kept: 12 rows in all]",
    )
    parser.add_argument(
        "--no-measure",
        action="store_true",
        help="maps only, at once: no effect and no report; the columns are attention, rollout and "
        "heads, unless --maps names others",
    )
    parser.add_argument(
        "--block",
        type=int,
        metavar="N",
        help="the block whose attention is drawn, from 1, or from the end: -1 is the last [-1]",
    )
    parser.add_argument(
        "--query",
        type=row_and_column,
        metavar="ROW,COLUMN",
        help="the patch whose attention is drawn, from 1,1 in the upper left corner [the CLS token]",
    )
    parser.add_argument(
        "--overlay",
        action="store_true",
        help="draw the maps over the input instead of on black: transparent where they are 0",
    )
    parser.add_argument(
        "--smooth", action="store_true", help="draw the maps without the edges of patches"
    )
    parser.add_argument(
        "--levels",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="what is black and what is white in --images of more than 8 bits a sample "
        "[0 and the largest number of as many bits as all of them need]",
    )
    parser.add_argument(
        "--save-maps",
        action="store_true",
        help="write all maps of the figure's images as numpy arrays too, maps.npz",
    )
    parser.add_argument(
        "--image-size", type=int, help="side of the input in pixels [as trained, else 224]"
    )
    parser.add_argument(
        "--heads",
        type=number_from_1,
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
        "--output",
        help="folder for what is written [that of the first checkpoint, or of the file of --weights; "
        "runs/weights-NAME for its names]",
    )
    args = parser.parse_intermixed_args(argv)  # checkpoints may stand between flags
    for name in ("weights", "maps", "background", "data_root", "output"):
        if getattr(args, name) == []:  # what argparse makes of "--output=--"
            parser.error(f"argument --{name.replace('_', '-')}: expected one argument")
    take_checkpoints_from_images(args)
    block = None if args.block == -1 else args.block  # -1 is the default
    args.query = Query(block, args.query)
    if args.levels is not None:
        low, high = args.levels
        if not args.images:
            parser.error("argument --levels: use it with --images")
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            parser.error(
                f"argument --levels: {low:g} {high:g}: use two numbers, the lower one first"
            )
    if args.examples is not None and args.images:
        parser.error("argument --examples: leave it out; with --images every picture is drawn")
    if args.examples is not None and args.examples > MOST_ROWS:
        parser.error(f"argument --examples: {args.examples}: use at most {MOST_ROWS}")
    if args.no_measure and args.maps and "effect" in args.maps:
        parser.error("argument --no-measure: --maps names effect, which is measured; leave one out")
    return args


def take_checkpoints_from_images(args: argparse.Namespace):
    """Move what stands after the pictures of --images, but holds weights, to the checkpoints.

    A folder of a run is a checkpoint if no other network is named, or if it holds no pictures. If
    no picture is left, all stays as it is, and the error will say so.
    """
    pictures = []
    checkpoints = []
    for name in args.images:
        in_folder = runs.checkpoint_path(name)
        is_run = in_folder != name and os.path.isfile(in_folder)
        has_network = bool(args.checkpoints or checkpoints or args.weights is not None)
        is_network = is_run and not (has_network and picture_files.image_files(name))
        if is_network or name.lower().endswith(WEIGHT_ENDINGS):
            checkpoints.append(in_folder)
        else:
            pictures.append(name)
    if pictures:
        args.images = pictures
        args.checkpoints = [*args.checkpoints, *checkpoints]


def make_folder(args: argparse.Namespace) -> str:
    """The folder for what is written, tried before anything is drawn. Raises OSError."""
    if args.output:
        folder = args.output
    elif args.checkpoints:
        folder = os.path.dirname(args.checkpoints[0]) or "."
    elif args.weights == "none" or args.weights in weights.DINO_FILES:
        folder = os.path.join("runs", f"weights-{args.weights}")
    else:
        folder = os.path.dirname(os.path.normpath(args.weights)) or "."
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(
            f"{folder} cannot be written to ({error.strerror}); use --output with another folder"
        ) from error
    return folder


def visualize(args: argparse.Namespace):
    """Everything that `python visualize.py` does; raises ValueError or OSError on bad input."""
    models = gallery.open_models(args)
    device = runs.find_device(args.device)
    if args.images:
        examples = gallery.open_pictures(models, gallery.list_images(args.images), args.levels)
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
    if args.maps:
        return args.maps
    if args.no_measure:
        return QUICK_MAPS
    return [*explain.NETWORK_MAPS, *controls, "effect", "heads"]


def names_to_draw(args: argparse.Namespace, best: dict[str, str], with_heads: bool) -> list[str]:
    """The maps that --maps names, or else a few: brightness, attention, the best map, the effect."""
    if args.maps:
        return args.maps
    names = ["brightness", "attention", *best, "effect", "heads"]
    if args.no_measure:
        names = QUICK_MAPS
    return [name for name in dict.fromkeys(names) if with_heads or name != "heads"]


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


def number_of_examples(args: argparse.Namespace, epochs: int) -> int:
    """How many test images are drawn, each with a row for every kept epoch, or one."""
    if args.examples is None:
        return EXAMPLES if epochs == 1 else max(1, 12 // epochs)
    most = max(1, MOST_ROWS // epochs)
    if args.examples > most:
        raise ValueError(
            f"--examples {args.examples}: each has {epochs} rows, one for every kept epoch; "
            f"use at most {most}"
        )
    return args.examples


def visualize_one(model: Model, args: argparse.Namespace):
    """Draw and measure one network."""
    backbones = gallery.kept_epochs(model) if model.history else {}
    if len(backbones) < 2:
        backbones = {"": model.backbone}
    examples = gallery.example_images(model, number_of_examples(args, len(backbones)))
    folder = make_folder(args)

    names = names_to_compute(args, ["brightness"])
    epochs = {}
    for label, backbone in backbones.items():
        name = f"{model.name}, {label}" if label else model.name
        maps = gallery.maps_of_examples(backbone, examples, names, args.query)
        of_epoch = replace(model, name=name, backbone=backbone)
        epochs[label] = LookedAt(of_epoch, examples, maps, args.query)
        gallery.check_finite(epochs[label])

    evaluation = None
    best = {}
    if model.should_be_measured and not args.no_measure:
        if model.history:  # what needs no measurements comes first
            plot_views(model, os.path.join(folder, "views.png"))
            plot_curves(model, os.path.join(folder, "curves.png"))
        evaluation = measure(model)
        best = best_by_report(evaluation.result)
    elif not args.no_measure:
        print_not_measured(model)
        best = best_by_correlation(list(epochs.values())[-1].maps)
    rows = LookedAt(
        model,
        examples=[example for example in examples for _ in epochs],
        maps=[of_epoch.maps[row] for row in range(len(examples)) for of_epoch in epochs.values()],
        query=args.query,
        names=names_to_draw(args, best, with_heads=model.backbone.shape.heads > 1),
        best=best,
    )
    row_names = list(epochs) * len(examples) if len(epochs) > 1 else []
    path = os.path.join(folder, "attention.png")
    plot_attention([rows], path, row_names, args.overlay, args.smooth)
    result = None if evaluation is None else evaluation.result
    content = explorer.network_content(model, epochs, result)
    if evaluation is not None:
        save_and_print([evaluation], os.path.join(folder, "metrics.json"))
    write_explorer([content], list(epochs.values()), folder, "", args)
    if evaluation is not None:
        plot_tsne(model, evaluation, os.path.join(folder, "tsne.png"))


def measure(model: Model) -> evaluate.Evaluation:
    """All that is measured of a network; of a run, what train.py has measured at its end."""
    arguments = (model.name, model.config, model.history, model.backbone, model.splits)
    if model.history is not None:
        path = os.path.join(os.path.dirname(model.path), "metrics.json")
        evaluation = evaluate.measured_before(path, *arguments)
        if evaluation is not None:
            print(f"{path} already holds the measurements of this network; they are not repeated")
            return evaluation
    return evaluate.evaluate(*arguments)


def compare(models: list[Model], args: argparse.Namespace):
    """Draw several networks side by side, and measure them in one table."""
    # Networks that were trained without marks are shown those that the others were trained with.
    if any(model.has_marks for model in models):
        models = [replace(model, has_marks=True) for model in models]
    count = number_of_examples(args, epochs=1)
    examples = [gallery.example_images(model, count) for model in models]
    folder = make_folder(args)
    names = names_to_compute(args, ["brightness"])
    networks = []
    for model, of_model in zip(models, examples):
        maps = gallery.maps_of_examples(model.backbone, of_model, names, args.query)
        networks.append(LookedAt(model, of_model, maps, args.query))
        gallery.check_finite(networks[-1])

    measured = [model for model in models if model.should_be_measured]
    evaluations = []
    contents = []  # of the page
    for network in networks:
        model = network.model
        result = None
        if model.should_be_measured and not args.no_measure:
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
                with_marks=model.has_marks,
            )
            evaluations.append(evaluation)
            result = evaluation.result
            network.best = best_by_report(result)
        elif not args.no_measure:
            print_not_measured(model)
            network.best = best_by_correlation(network.maps)
        network.names = names_to_draw(args, network.best, with_heads=False)
        contents.append(explorer.network_content(model, {"": network}, result, len(models)))

    path = os.path.join(folder, "attention-compared.png")
    plot_attention(networks, path, is_overlay=args.overlay, is_smooth=args.smooth)
    if evaluations:
        save_and_print(evaluations, os.path.join(folder, "metrics-compared.json"))
    write_explorer(contents, networks, folder, "-compared", args)


def write_explorer(
    contents: list[dict],
    networks: list[LookedAt],
    folder: str,
    suffix: str,
    args: argparse.Namespace,
    notes: Sequence[str] = (),
):
    """explorer.html, the page that shows `contents`, and with --save-maps maps.npz.

    The page has its own choice of block and query, so with --block or --query it is not written.
    """
    if not args.query.is_chosen:
        path = os.path.join(folder, f"explorer{suffix}.html")
        explorer.write_page(contents, path, notes)
        print(f"wrote {path}")
    if args.save_maps:
        path = os.path.join(folder, f"maps{suffix}.npz")
        gallery.save_maps(networks, path)
        print(f"wrote {path}")


def print_not_measured(model: Model):
    print(
        f"{model.name} does not come from train.py, so it is drawn on the paper's canvases but not "
        f"measured; measure it with --weights {model.name}"
    )


def save_and_print(evaluations: list[evaluate.Evaluation], path: str):
    """Write metrics.json, and print the report, which is about [CLS] in the last block."""
    results = [evaluation.result for evaluation in evaluations]
    evaluate.write_metrics(results, path)
    print(report.format_report(results, path))


def draw_pictures(models: list[Model], examples: list[list[Example]], args: argparse.Namespace):
    """attention-images.png, or pages of it, and the printed report on the maps of these pictures.

    Without --maps only the pictures of the first page are measured, and only there is the effect
    drawn: measuring a picture takes longer than a hundred forward passes. With --no-measure none is.
    The report is about [CLS] in the last block, so there is none with --block or --query.
    """
    folder = make_folder(args)
    names = names_to_compute(args, ["brightness", *explain.PHOTO_CONTROLS])
    count = len(examples[0])
    has_report = not (args.maps or args.no_measure or args.query.is_chosen)
    is_quick = args.maps or args.no_measure
    measured = count if is_quick else min(count, PICTURES_PER_PAGE)
    networks = []
    results = []
    contents = []  # of the page
    for model, of_model in zip(models, examples):
        first_examples = of_model[:measured]
        maps = gallery.maps_of_pictures(model, first_examples, names, has_report, args.query)
        network = LookedAt(model, of_model, maps, args.query)
        gallery.check_finite(network)
        result = None
        if has_report:
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
        first_page = network_on_page(network, slice(PICTURES_PER_PAGE), with_effect=True)
        contents.append(explorer.network_content(model, {"": first_page}, result, len(models)))
        if measured < count:
            # of the others, what is drawn, or all that is saved
            rest = names if args.save_maps else network.names
            rest = [name for name in rest if name != "effect"]
            rest_examples = of_model[measured:]
            rest_maps = gallery.maps_of_pictures(model, rest_examples, rest, False, args.query)
            network.maps = [*maps, *rest_maps]
            gallery.check_finite(network)
        networks.append(network)

    pages = []
    for start in range(0, count, PICTURES_PER_PAGE):
        page = slice(start, start + PICTURES_PER_PAGE)
        name = "attention-images.png"
        if count > PICTURES_PER_PAGE:
            name = f"attention-images-{start // PICTURES_PER_PAGE + 1}.png"
        on_page = [network_on_page(network, page, start < measured) for network in networks]
        row_names = [example.name for example in on_page[0].examples]
        path = os.path.join(folder, name)
        plot_attention(on_page, path, row_names, args.overlay, args.smooth)
        pages.append(path)
    remove_other_pages(pages, folder)
    notes = []
    if count > PICTURES_PER_PAGE:
        notes.append(f"This page holds the first {PICTURES_PER_PAGE} of {count} pictures.")
    write_explorer(contents, networks, folder, "-images", args, notes)
    if results:
        print(report.format_picture_report(results))
        if measured < count:
            print(f"These are the first {measured} of {count} pictures; the others are only drawn.")


def remove_other_pages(pages: list[str], folder: str):
    """Remove the pages of earlier calls from the folder, which show other pictures or networks."""
    pattern = os.path.join(glob.escape(folder), "attention-images*.png")
    for path in sorted(glob.glob(pattern), key=picture_files.natural_order):
        if path not in pages and picture_files.is_own_figure(path):
            os.remove(path)
            print(f"removed {path}, which an earlier call had drawn")


def network_on_page(network: LookedAt, page: slice, with_effect: bool) -> LookedAt:
    """What a page shows of a network."""
    names = network.names
    if not with_effect:
        names = [name for name in names if name != "effect"]
    return replace(network, examples=network.examples[page], maps=network.maps[page], names=names)


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
    runs.prepare_output()
    sys.exit(main())
