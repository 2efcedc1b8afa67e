"""Draw where a trained network looks, and measure it against the truth.

    python visualize.py runs/clutter-nce-different/ckpt.pth
    python visualize.py runs/clutter-nce-same/ckpt.pth runs/clutter-nce-different/ckpt.pth
    python visualize.py --weights dino
    python visualize.py runs/clutter-nce-different/ckpt.pth --images cat.jpg dog.png

The first command prints what the [CLS] token of the last block attends to, and writes metrics.json;
attention.png, where it looks in each head (the paper's figures 4 and 6); curves.png, how that came
about; views.png, what the two branches were fed; tsne.png, the features (figures 2 and 3).
"""

import argparse
import glob
import math
import os
import socket
import sys
import tempfile
import textwrap
import warnings
from dataclasses import dataclass, replace

os.environ.pop("MPLBACKEND", None)  # a notebook's, which may not be installed here
import matplotlib

matplotlib.use("Agg")  # draws to files; needs no screen
matplotlib.rcParams["text.parse_math"] = False  # a $ in a file's name is a $

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from sklearn.manifold import TSNE
from tqdm import tqdm

import data
import metrics
import vit

# what weights that were not fine-tuned here are shown: the paper's canvas
PAPER_CANVAS = {"canvas_size": 100, "num_distractors": 6, "distractor_size": 9, "digits": "auto"}
PAPER_CANVAS |= {"dataset": "clutter", "background": "black", "texture_pool": 0}
PAPER_CANVAS |= {"image_size": 224, "data_root": "data"}
# without these of a checkpoint's settings neither its network nor its views can be made again
NEEDED = """loss views crops symmetric epochs batch_size seed weights digits image_size canvas_size
    num_distractors distractor_size global_crops_scale local_crops_scale rotation blur init_std
    out_dim head_hidden_dim head_layers bottleneck_dim head_norm"""
ROWS = 20  # of pictures on a page
STL10_CLASSES = "airplane bird car cat deer dog horse monkey ship truck"


@dataclass
class Model:
    """A network to be looked at, and the settings under which it is."""

    name: str  # the file, or the flag, that it came from
    config: dict
    backbone: vit.VisionTransformer
    epoch: int | None = None  # None: not from a run of train.py
    history: list | None = None  # the lines of its log.jsonl
    splits: dict | None = None  # the digits or photographs that it is shown


def save_figure(figure, path, title, models):
    """Write a figure, over it the title, what it was made from, and what was replaced there."""
    lines = []
    for number, model in enumerate(models, 1):
        name = f"[{number}] {model.name}: " if len(models) > 1 else ""
        lines.append(name + metrics.describe(model.config, model.epoch))
    lines += dict.fromkeys(line for model in models for line in model.config["fallbacks"])
    wrap = {"width": int(15 * figure.get_figwidth()), "break_on_hyphens": False}
    text = [title] + [part for line in lines for part in textwrap.wrap(line[:300], **wrap)]
    figure.suptitle("\n".join(text), fontsize=9)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # one line for each that the font lacks
        figure.savefig(path, dpi=120, bbox_inches="tight", pad_inches=0.1)
    plt.close(figure)
    tqdm.write(f"wrote {path}")


def place(array, row):
    """Left, right, bottom, top of an array's pixels in a column of `plot_grid`: at most 1 wide."""
    height, width = (0.47 * side / max(array.shape[:2]) for side in array.shape[:2])
    return -width, width, row + height, row - height


def plot_grid(columns, path, title, models, row_names=(), outlines=None):
    """Pictures and maps in columns: {heading: a list with an array for each row}.

    Arrays are pictures (H, W, 3) in [0, 1], or maps (rows, columns), each colored from 0 (black) to
    its own maximum. `outlines`: {heading: [(color, masks (H, W), one a row)]}, drawn there.
    """
    rows = len(next(iter(columns.values())))
    size = max(6, 1.4 * len(columns)), 1.45 * rows + 1
    # one axis a column, a unit high for each row: an axis for every picture takes ten times as long
    # compressed: no gaps between pictures, however wide the title is
    figure, axes = plt.subplots(1, len(columns), figsize=size, squeeze=False, layout="compressed")
    for axis, (heading, arrays) in zip(axes[0], columns.items()):
        axis.set_title(heading, fontsize=8)
        for row, array in enumerate(map(np.asarray, arrays)):
            axis.imshow(array, cmap="inferno", vmin=0, extent=place(array, row))
        for color, masks in (outlines or {}).get(heading, ()):
            for row, mask in enumerate(masks):
                if mask.any():
                    how = {"levels": [0.5], "colors": color, "linewidths": 0.7, "origin": "upper"}
                    axis.contour(mask.cpu().numpy(), extent=place(mask, row), **how)
        axis.set(xlim=(-0.5, 0.5), ylim=(rows - 0.5, -0.5))
        axis.axis("off")
    for row, name in enumerate(row_names):
        axes[0, 0].text(-0.56, row, name, rotation=90, ha="right", va="center", fontsize=8)
    save_figure(figure, path, title, models)


def plot_views(model, path, images=4):
    """views.png: the crops that each branch is fed in the first training step, a row an image."""
    batch = min(model.config["batch_size"], len(model.splits["train"]))
    config = model.config | {"batch_size": batch}
    views = data.TrainingViews(config, model.splits["train"])
    params = {name: value[:images] for name, value in views.sample(step=0).items()}
    crops = data.denormalize(views.render(params)).movedim(2, -1).clamp(0, 1).cpu()
    branches, columns = {"teacher": views.teacher, "student": views.student}, {}
    if views.teacher == views.student:
        branches = {"both": views.teacher}
    for branch, shown in branches.items():
        for number, crop in enumerate(shown, 1):
            canvas, kind = views.plan[crop]
            where = f", canvas {'ab'[canvas]}" if model.config["views"] == "different" else ""
            columns[f"{branch}, {number}\n{kind}{where}"] = list(crops[crop])
    plot_grid(columns, path, "What each branch is fed", [replace(model, epoch=None)])


def plot_attention(models, images, path, epochs=None):
    """Where each network looks: the input, the mean of the heads, each head; a row an image.

    `images` has for each model pairs: a picture (3, H, W) in [0, 1], and its masks (H, W) of digit
    and clutter, or (). `epochs`: {name: backbone} of one run, a row each for every image.
    """
    columns, outlines, seen = {}, {}, None
    stages = list(epochs.values()) if epochs else [None]
    for number, (model, pairs) in enumerate(zip(models, images), 1):
        name = f"[{number}]\n" if len(models) > 1 else ""
        rows = [(*pair, stage or model.backbone) for pair in pairs for stage in stages]
        shown = [picture.movedim(0, -1).cpu() for picture, _, _ in rows]
        if seen is None or not all(map(torch.equal, seen, shown)):  # not the same inputs again
            heading = "input" if number == 1 else f"{name}input"
            columns[heading] = seen = shown
            outlines[heading] = list(zip(("lime", "red"), zip(*(masks for _, masks, _ in rows))))
        maps = [look(backbone, picture, masks) for picture, masks, backbone in rows]
        if not all(map_.isfinite().all() for each in maps for map_ in each.values()):
            raise FloatingPointError(f"{model.name}: the attention is NaN or infinite")
        columns |= {f"{name}{heading}": [each[heading] for each in maps] for heading in maps[0]}
    title = "Where [CLS] of the last block looks, each map from 0 (black) to its own maximum"
    if any(outlines.values()):
        title += "\ndigit outlined green, clutter red; effect: of blackening each patch with ink"
    row_names = list(epochs) * len(images[0]) if len(stages) > 1 else []
    plot_grid(columns, path, title, models, row_names, outlines)


@torch.no_grad()
def look(backbone, picture, masks):
    """What [CLS] attends to in a picture (3, H, W) in [0, 1]: {heading: (rows, columns)}.

    With `masks` (H, W) of ink also what the feature depends on: the effect of blackening patches.
    """
    images, size = picture[None].to(backbone.cls_token.device), backbone.patch_size
    heads, features = metrics.cls_attention(backbone, data.normalize(images))
    maps = {"mean of heads": heads.mean(1)} if backbone.heads > 1 else {}
    if masks:
        ink = metrics.patch_sums(torch.stack(masks).any(0)[None], size) > 0
        maps["effect"] = metrics.blackening_effects(backbone, images, ink, features)
    maps["rollout"] = metrics.without_cls(backbone.rollout(data.normalize(images)), backbone)
    maps |= {f"head {head}": map_ for head, map_ in enumerate(heads.unbind(1), 1)}
    grid = [side // size for side in images.shape[2:]]
    return {heading: map_[0].unflatten(-1, grid).cpu() for heading, map_ in maps.items()}


@torch.no_grad()
def print_token_effects(backbone, path, picture):
    """Say whether the patches that attention points to matter more than others (no masks)."""
    images = data.normalize(picture[None].to(backbone.cls_token.device))
    mean = metrics.cls_attention(backbone, images)[0].mean(1)
    rollout = metrics.without_cls(backbone.rollout(images), backbone)
    if mean.shape[1] < 5:
        return  # a fifth of them is none
    rng = torch.Generator().manual_seed(0)
    effects = metrics.token_effects(backbone, images, [mean, rollout], rng, draws=20)[0]
    mean, rollout = (effects[:2] / effects[2:].mean()).tolist()
    text = f"{path}: left out, the fifth of the patches with most attention changes the feature"
    tqdm.write(f"{text} {mean:.2f} times as much as a random fifth (rollout: {rollout:.2f})")


def look_at_pictures(models, pictures, folder):
    """attention-images.png, or pages of it, and a line on each of {path: a picture a model}."""
    paths, bar = [*pictures], tqdm(pictures, "drawing", unit="picture", leave=False, disable=None)
    for start in range(0, len(paths), ROWS):
        page = f"-{start // ROWS + 1}" if len(paths) > ROWS else ""
        here = paths[start : start + ROWS]
        images = [[(pictures[path][k], ()) for path in here] for k in range(len(models))]
        plot_attention(models, images, os.path.join(folder, f"attention-images{page}.png"))
        for path in here:
            for model, picture in zip(models, pictures[path]):
                print_token_effects(model.backbone, path, picture)
        bar.update(len(here))
    bar.close()


def plot_curves(model, path):
    """curves.png: the lines of log.jsonl against epochs, on validation images."""
    epochs = [line["epoch"] for line in model.history]
    lines = [line["validation"] for line in model.history]
    heads = [row for row in lines[0] if row.startswith("head_")]
    of_canvases = ("selectivity", "auroc", "pointing", "patch_faithfulness")
    names = [name for name in of_canvases if name in lines[0]["mean"]]
    names += ["entropy", "diversity"] if len(heads) > 1 else ["entropy"]
    panels = ["loss", *names, "k-NN accuracy, %", "legend"]
    panels += ["."] * (len(panels) % 2)  # an empty place
    width = len(panels) // 2
    rows, size = [panels[:width], panels[width:]], (3.5 * width, 6.6)
    figure, axes = plt.subplot_mosaic(rows, figsize=size, layout="constrained")
    thick, grey = {"color": "black", "linewidth": 2}, {"color": "grey", "linestyle": "--"}
    training = [line["loss"] for line in model.history[1:]]
    axes["loss"].plot(epochs[1:], training, ".-", color="grey", label="training")
    axes["loss"].plot(epochs, [line["loss"] for line in lines], **thick, label="validation")
    chance = {"nce": ("batch", model.config["batch_size"]), "dino": ("K", model.config["out_dim"])}
    name, number = chance.get(model.config["loss"], ("classes", vit.CLASSES))
    axes["loss"].axhline(math.log(number), **grey, label=f"ln({name}), chance")
    axes["loss"].legend(fontsize=8)
    accuracy = [100 * line["knn"] for line in lines]
    axes["k-NN accuracy, %"].plot(epochs, accuracy, **thick)
    axes["k-NN accuracy, %"].axhline(accuracy[0], **grey)
    styles = {head: {"linewidth": 1} for head in heads if len(heads) > 1} | {"mean": thick}
    styles["brightness"] = {"color": "darkorange", "linestyle": "--"}
    styles["shuffled"] = {"color": "purple", "linestyle": "--"}
    for name in names:
        for row, style in styles.items():
            if name != "entropy" or row not in ("brightness", "shuffled"):
                values = np.array([line.get(row, {}).get(name) for line in lines], float)
                axes[name].plot(epochs, values, **style, label=row.replace("_", " "))
        if lines[0]["mean"][name] is not None:  # as it is without clutter
            axes[name].axhline(lines[0]["mean"][name], **grey, label="untrained")
        if name in ("selectivity", "auroc"):
            chance = {"selectivity": 1, "auroc": 0.5}[name]
            axes[name].axhline(chance, color="silver", linestyle=":", label="ink, uniform")
    legend = axes.pop("legend")
    legend.axis("off")
    labelled = axes[names[0]].get_legend_handles_labels()
    legend.legend(*labelled, loc="center", fontsize=9, ncols=1 if len(heads) <= 6 else 2)
    notes = {"diversity": " of the heads, bits", "entropy": " (1: uniform)"}
    for name, axis in axes.items():
        axis.set_title(name.replace("_", " ") + notes.get(name, ""), fontsize=11)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
    title = f"{lines[0]['images']} validation images, teacher's attention"
    save_figure(figure, path, title, [model])


def plot_tsne(model, points, labels, accuracy, path):
    """tsne.png: features (n, dim) in the plane, colored by class (section III.A, perplexity 20)."""
    if len(points) <= 20:
        print(f"no tsne.png: perplexity 20 takes more than {len(points)} test images")
        return
    plane = torch.zeros(len(points), 2).numpy()
    if not (points == points[0]).all():  # collapsed to one point: t-SNE would divide by zero
        plane = TSNE(perplexity=20, init="pca", random_state=0).fit_transform(points.numpy())
    figure, axis = plt.subplots(figsize=(6, 6.4), layout="constrained")
    dots = axis.scatter(*plane.T, c=labels.numpy(), cmap="tab10", vmin=-0.5, vmax=9.5, s=8)
    bar = figure.colorbar(dots, ax=axis, ticks=range(10), label="class", shrink=0.8)
    if model.config["dataset"] == "stl10":
        bar.ax.set_yticklabels(STL10_CLASSES.split())
    axis.set(xticks=[], yticks=[])
    title = f"t-SNE of {len(points):,} test images; k-NN accuracy {100 * accuracy:.1f}%"
    save_figure(figure, path, title, [model])


@torch.no_grad()
def expect_half(backbone):
    """Turn a network of pictures (x − 0.5) / 0.5 into one of `data.normalize`'s: all is linear."""
    proj = backbone.patch_embed.proj
    proj.bias += proj.weight.sum((2, 3)) @ ((data.MEAN.flatten() - 0.5) / 0.5)
    proj.weight *= data.STD / 0.5


def open_model(source, args, like=None):
    """The Model in a file; unless of train.py it is shown what `like` is, or the paper's canvases.

    Raises ValueError or OSError for a file or an image size that does not fit.
    """
    content = {}
    if source != "none":
        backbone, content = vit.load_backbone(source, args.heads, args.grid)
        half = args.normalise == "half" and "config" not in content
        if half:
            expect_half(backbone)
        print(f"{source}: {backbone.about}, normalised by {'0.5' if half else 'ImageNet'}")
    elif like:
        backbone = vit.build_network(like.config).backbone
    else:
        torch.manual_seed(0)
        backbone = vit.VisionTransformer()
    patch_size, epoch, history = backbone.patch_size, content.get("epoch"), content.get("metrics")
    config = {"fallbacks": [], **PAPER_CANVAS, **content.get("config", {})}
    if like or epoch is None or history is None:
        shown = like.config if like else PAPER_CANVAS
        config = {"fallbacks": [], "weights": os.path.basename(source)}
        config |= {name: shown[name] for name in ("split", *PAPER_CANVAS) if name in shown}
        config["image_size"] = max(1, round(config["image_size"] / patch_size)) * patch_size
        epoch, history = None, None
    elif missing := [name for name in NEEDED.split() if name not in content.get("config", {})]:
        raise ValueError(f"{source} lacks {', '.join(missing)}; use another copy of it")
    for name in ("image_size", "digits", "background", "data_root"):
        if getattr(args, name) is not None:
            config[name] = getattr(args, name)
            config["texture_pool"] = 0 if name == "background" else config["texture_pool"]
    size = config["image_size"]
    if size < 1 or size % patch_size:
        raise ValueError(f"--image-size {size}: use a multiple of the patch size {patch_size}")
    config |= {name: getattr(backbone, name) for name in vit.SHAPE}
    return Model(source, config, backbone.eval(), epoch, history)


def list_images(names):
    """The pictures that --images names: files, and all those of a folder."""
    found = [data.image_files(name) if os.path.isdir(name) else [name] for name in names]
    for name, paths in zip(names, found):
        if not paths:
            raise ValueError(f"--images {name}: no pictures there; use another folder, or files")
    return [path for paths in found for path in paths]


def open_image(path, image_size, patch_size):
    """A picture (3, H, W) in [0, 1], its longer side image_size, both multiples of the patch."""
    picture = data.read_image(path)
    if min(picture.size) < patch_size:
        size = f"{picture.width}×{picture.height}"
        raise ValueError(f"--images {path}: {size} pixels; use more than a patch of {patch_size}")
    scale = image_size / max(picture.size)
    size = [max(1, round(side * scale / patch_size)) * patch_size for side in picture.size]
    pixels = np.array(picture.resize(size, Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


def kept_epochs(model):
    """{"epoch 1": backbone, …}: the epochs that the run kept beside its checkpoint, itself last."""
    stages = {model.epoch: model.backbone}
    for path in glob.glob(os.path.join(glob.escape(os.path.dirname(model.name)), "epoch-*.pth")):
        backbone, content = vit.load_backbone(path)
        ours = "config" in content and isinstance(content.get("epoch"), int)
        if ours and content["epoch"] < model.epoch and backbone.heads == model.backbone.heads:
            stages[content["epoch"]] = backbone.to(model.backbone.cls_token.device)
    return {f"epoch {epoch}": stages[epoch] for epoch in sorted(stages)}


def example_images(model, n):
    """The first n test images, canvases of the layout `matched`, and their masks, if any."""
    batch = next(data.evaluation_batches(model.config, model.splits["test"], n))
    pictures = batch["images"].expand(-1, 3, -1, -1).clamp(0, 1)
    masks = list(zip(*(batch[name] for name in ("digit", "clutter") if name in batch)))
    return list(zip(pictures, masks or [()] * n))


def rows_x_columns(text):
    """(4, 6) for "4x6"; ValueError, of which argparse makes a message, for anything else."""
    rows, columns = map(int, text.split("x"))
    if min(rows, columns) < 1:
        raise ValueError(text)
    return rows, columns


def parse_args(argv):
    about = "Draw and measure where a trained network looks."
    parser = argparse.ArgumentParser("visualize.py", description=about)
    add = parser.add_argument
    text = "of train.py, or its folder, or any ViT's weights"
    add("checkpoints", nargs="*", metavar="CKPT", type=vit.checkpoint_of, help=text)
    weights = "also measure weights that were not fine-tuned, on the first checkpoint's canvases, "
    weights += f"else on the paper's: none, random ones, or {', '.join(vit.DINO_FILES)}"
    add("--weights", metavar="{dino,none,FILE}", help=weights)
    images = "draw the attention over these pictures, or all of a folder, instead"
    add("--images", nargs="+", default=[], metavar="FILE", help=images)
    add("--image-size", type=int, help="side of the input in pixels [as trained, else 224]")
    add("--heads", type=int, help="of weights that do not say it [one for every 64 of the width]")
    grid = "ROWSxCOLUMNS of the positions, of weights that do not say it [a square]"
    add("--grid", type=rows_x_columns, metavar="RxC", help=grid)
    half = "what weights expect: ImageNet's mean and deviation, or 0.5, as Google's and AugReg's"
    add("--normalise", choices=["imagenet", "half"], default="imagenet", help=half)
    add("--digits", choices=["auto", "mnist", "sklearn"], help="[as trained, else auto]")
    add("--background", metavar="{black,texture,DIR}", help="behind the digits [as trained]")
    add("--data-root", help="folder that holds MNIST/raw/ or stl10_binary/ [as trained, else data]")
    add("--device", default=vit.default_device(), help="[%(default)s]")
    add("--output", help="folder for what is written [the first checkpoint's, or runs/weights-…]")
    return parser.parse_args(argv)


def make_folder(args):
    """The folder for what is written, before any work is done. Raises OSError."""
    folder = args.output or os.path.join("runs", f"weights-{args.weights}")
    if not args.output and (args.checkpoints or args.weights not in ("none", *vit.DINO_FILES)):
        folder = os.path.dirname([*args.checkpoints, args.weights][0]) or "."
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        text = f"{folder} cannot be written to ({error.strerror})"
        raise OSError(f"{text}; use --output with another folder") from error
    return folder


def visualize(args):
    """Everything that `python visualize.py` does; raises ValueError or OSError on bad input."""
    models = [open_model(path, args) for path in args.checkpoints]
    measured = [model for model in models if model.history is not None]
    if args.weights is not None:
        models.append(open_model(args.weights, args, measured[0] if measured else None))
        models[-1].name = f"--weights {args.weights}"
        measured.append(models[-1])
    if not models:
        raise ValueError("nothing to look at; use a ckpt.pth, or --weights dino, none or a file")
    device, paths = vit.find_device(args.device), list_images(args.images)
    sizes = [(model.config["image_size"], model.backbone.patch_size) for model in models]
    bar = tqdm(paths, "reading", unit="picture", leave=False, disable=None)
    pictures = {path: [open_image(path, *size) for size in sizes] for path in bar}
    for model in models:
        model.backbone.to(device)
        if not pictures:
            model.splits, warning = data.load_dataset(model.config, device)
            if warning and warning not in model.config["fallbacks"]:
                print(f"warning: {warning}", file=sys.stderr)
                model.config["fallbacks"] = [*model.config["fallbacks"], warning]
    folder = make_folder(args)
    if pictures:
        look_at_pictures(models, pictures, folder)
        return
    several, first = "-compared" * (len(models) > 1), models[0]
    epochs = kept_epochs(first) if first.history and not several else {}
    n = 8 if len(epochs) < 2 else max(1, 12 // len(epochs))
    images = [example_images(model, n) for model in models]
    plot_attention(models, images, os.path.join(folder, f"attention{several}.png"), epochs)
    for model in models:
        if model not in measured:
            text = "is not of train.py, so it is drawn on the paper's canvases, not measured; use"
            print(f"{model.name} {text} --weights {model.name}")
    results = []
    for m, other in zip(measured, measured[1:] + measured[:1]):
        fits = other is not m and other.backbone.patch_size == m.backbone.patch_size
        other = other.backbone if fits else None
        found = metrics.evaluate(m.name, m.config, m.history, m.backbone, m.splits, other)
        results.append(found[0])
    if results:
        print(metrics.report(results, os.path.join(folder, f"metrics{several}.json")))
    if results and not several:
        if first.history:
            plot_views(first, os.path.join(folder, "views.png"))
            plot_curves(first, os.path.join(folder, "curves.png"))
        accuracy = results[0]["features"]["knn"]["value"]
        plot_tsne(first, *found[1], accuracy, os.path.join(folder, "tsne.png"))


def main(argv=None):
    args = parse_args(argv)
    socket.setdefaulttimeout(15)  # a host without an answer by then counts as unreachable
    try:
        visualize(args)
    except (OSError, ValueError, FloatingPointError, MemoryError, RuntimeError) as error:
        print(f"visualize.py: error: {vit.error_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("visualize.py: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # what its code page lacks, as Windows' often do τ
    sys.exit(main())
