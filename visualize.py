"""Look at the attention of a trained network, and measure it against the truth.

    python visualize.py runs/clutter-nce-different/ckpt.pth
    python visualize.py runs/clutter-nce-different/ckpt.pth --images cat.jpg dog.png

draws, beside the checkpoint: `attention.png`, where the [CLS] token of the last block looks
in each head (the paper's figures 4 and 6); `views.png`, what the two branches were fed (their
first rows); `tsne.png`, the features (figures 2 and 3).
"""

import argparse
import os
import sys
import tempfile
import textwrap

import matplotlib

matplotlib.use("Agg")  # draws to files; needs no screen

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from sklearn.manifold import TSNE
from tqdm import tqdm

import data
import vit

TEST_IMAGES = 1000
BANK_IMAGES = 10_000

# What weights that somebody else trained are shown: the paper's canvas.
PAPER_CANVAS = {"image_size": 224, "canvas_size": 100, "num_distractors": 6, "distractor_size": 9, "digits": "auto"}


# ------------------------------------------------------------------------ attention in numbers


@torch.no_grad()
def cls_maps(backbone, images):
    """Where [CLS] looks in the last block: (B, heads, patches), each map summing to 1.

    `images` (B, 3, H, W), normalised. The attention that [CLS] pays to itself is left out.
    """
    maps = backbone.last_attention(images, queries=1)[:, :, 0, 1:]
    return maps / maps.sum(dim=-1, keepdim=True)


def patch_sums(images, patch_size):
    """Sum of (B, H, W) over each patch, row by row: (B, patches). Of a mask: its pixel count."""
    return F.avg_pool2d(images.float()[:, None], patch_size).flatten(1) * patch_size**2


def density(maps, counts):
    """Share of the attention that falls on a region ÷ the region's share of the area.

    Attention is spread evenly over the pixels of a patch. 1 is what a uniform map has.

    Args:
        maps: (n, m, patches), m maps an image. counts: (n, patches), the region's pixels a patch.
    Returns (n, m); nan where an image has no such region.
    """
    return maps.shape[-1] * (maps * counts[:, None]).sum(-1) / counts.sum(-1)[:, None]


def auroc(maps, digit, clutter):
    """P(a pixel of the digit gets more attention than one of the clutter), ties counting half.

    0.5: cannot tell. Only ranks matter, so a faint contrast counts like a strong one.

    Args:
        maps: (n, m, patches). digit, clutter: (n, patches), their pixels a patch.
    Returns (n, m); nan where an image lacks either.
    """
    maps = maps.contiguous()
    digit, clutter = (counts[:, None].expand_as(maps) for counts in (digit, clutter))
    ranked, order = maps.sort(dim=-1)
    # clutter pixels with less attention than each patch, those with as much counting half
    up_to = F.pad(clutter.gather(-1, order).cumsum(-1), (1, 0))
    less = up_to.gather(-1, torch.searchsorted(ranked, maps, right=False))
    less_or_equal = up_to.gather(-1, torch.searchsorted(ranked, maps, right=True))
    wins = (digit * (less + less_or_equal) / 2).sum(-1)
    return wins / (digit.sum(-1) * clutter.sum(-1))


def interval(values, index, statistic, resamples=1000, seed=0):
    """95% bootstrap interval of a statistic of means over images.

    Canvases that show the same digit are not independent, so digits are resampled, with all
    their canvases.

    Args:
        values: {name: (n,)}, numbers an image. index: (n,), the digit that each image shows.
        statistic: function of {name: mean}, where a mean may be an array.
    Returns (value, low, high).
    """
    digits, group = torch.unique(index, return_inverse=True)
    weight = np.random.default_rng(seed).multinomial(len(digits), np.full(len(digits), 1 / len(digits)), resamples)
    weight = torch.from_numpy(weight).double()  # (resamples, digits): how often each was drawn
    means = {}
    for name, value in values.items():
        there = ~value.isnan()
        total = torch.zeros(len(digits), dtype=torch.float64).index_add_(0, group, value.nan_to_num().double())
        count = torch.zeros(len(digits), dtype=torch.float64).index_add_(0, group, there.double())
        means[name] = torch.cat([(weight @ total) / (weight @ count), (total.sum() / count.sum())[None]])
    result = statistic(means)
    low, high = result[:-1].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return result[-1].item(), low, high


def measure(config, backbone, untrained, digits, n, layout="matched", split="test"):
    """Selectivity and auroc of the mean map of the heads, beside what they must beat.

    Measured on n canvases of the split `digits`. The rows of the result:
        attention: the mean map of `backbone`'s heads;
        brightness: a map proportional to each patch's summed intensity. Digits have denser
            strokes than clutter, so this already prefers them, having understood nothing;
        shuffled: the network's maps, each laid on the next image: what position alone earns;
        untrained: the mean map of `untrained`, the same network at step 0 (None: left out).

    Returns {row: {"selectivity", "auroc", "digit_density", "clutter_density": (value, low,
    high)}} with 95% intervals. Selectivity is mean digit density ÷ mean clutter density.
    """
    patch = config["patch_size"]
    columns = []
    progress = tqdm(total=n, desc="attention", unit="image", leave=False, disable=None)
    for batch in data.evaluation_batches(config, digits, n, layout, split):
        images = data.normalise(batch["images"])
        brightness = patch_sums(batch["images"], patch) + 1e-9
        maps = [cls_maps(backbone, images).mean(1), brightness / brightness.sum(-1, keepdim=True)]
        if untrained is not None:
            maps.append(cls_maps(untrained, images).mean(1))
        counts = [patch_sums(batch[mask], patch) for mask in ("digit", "clutter")]
        columns.append([torch.stack(maps, dim=1).cpu(), *(c.cpu() for c in counts), batch["index"]])
        progress.update(len(images))
    progress.close()
    maps, digit, clutter, index = (torch.cat(column) for column in zip(*columns))
    names = ["attention", "brightness"] + ["untrained"] * (untrained is not None) + ["shuffled"]
    maps = torch.cat([maps, maps[:, :1].roll(1, dims=0)], dim=1)  # (n, rows, patches)

    # images without clutter ink say nothing of digit against clutter
    digit, clutter = (torch.where(clutter.sum(-1, keepdim=True) > 0, c, torch.nan) for c in (digit, clutter))
    d, c, a = density(maps, digit), density(maps, clutter), auroc(maps.nan_to_num(), digit, clutter)
    table = {}
    for row, name in enumerate(names):
        values = {"digit_density": d[:, row], "clutter_density": c[:, row], "auroc": a[:, row]}
        table[name] = {"selectivity": interval(values, index, lambda m: m["digit_density"] / m["clutter_density"])}
        for key in values:
            table[name][key] = interval(values, index, lambda m: m[key])
    return table


def format_table(table):
    """The result of `measure` as lines of text, the network first, and what it comes to."""
    lines = [f"{'':12}{'selectivity':>22}{'auroc':>22}{'digit density':>22}"]
    for name in ("attention", "brightness", "shuffled", "untrained"):
        if name in table:
            cells = (table[name][key] for key in ("selectivity", "auroc", "digit_density"))
            lines.append(f"{name:12}" + "".join(f"{v:8.2f} [{low:5.2f}, {high:5.2f}]" for v, low, high in cells))
    own_low = table["attention"]["selectivity"][1]
    beaten = [name for name in table if name != "attention" and own_low > table[name]["selectivity"][2]]
    missed = [name for name in table if name != "attention" and name not in beaten]
    verdict = "selectivity (digit ÷ clutter; 1: alike) is above " + (", ".join(beaten) or "no reference")
    return "\n".join([*lines, verdict + (f"; not above {', '.join(missed)}" if missed else "") + " (95% intervals)"])


# ------------------------------------------------------------------------------- the features


@torch.no_grad()
def features(config, backbone, digits, n, split):
    """L2-normalised [CLS] features (n, dim) and labels (n,) of n canvases of a split."""
    rows = []
    progress = tqdm(total=n, desc=f"{split} features", unit="image", leave=False, disable=None)
    for batch in data.evaluation_batches(config, digits, n, layout="paper", split=split):
        rows.append((F.normalize(backbone(data.normalise(batch["images"])), dim=-1), batch["labels"]))
        progress.update(len(batch["labels"]))
    progress.close()
    return tuple(torch.cat(column) for column in zip(*rows))


def knn_accuracy(bank, bank_labels, queries, labels, k=20, temperature=0.07):
    """Share of queries whose class wins a vote of their k nearest neighbours in the bank.

    Features are L2-normalised, (N, dim) and (n, dim); a neighbour's vote weighs
    exp(cosine / temperature), as in DINO's evaluation.
    """
    similarity, neighbour = (queries @ bank.T).topk(min(k, len(bank)))
    votes = torch.zeros(len(queries), int(bank_labels.max()) + 1, device=queries.device)
    votes.scatter_add_(1, bank_labels[neighbour], (similarity / temperature).exp())
    return (votes.argmax(1) == labels).double().mean().item()


def bank_and_queries(config, backbone, splits):
    """Features and labels to classify by k-NN: of training canvases, and of TEST_IMAGES test canvases."""
    bank = features(config, backbone, splits["train"], min(BANK_IMAGES, len(splits["train"])), "train")
    return *bank, *features(config, backbone, splits["test"], TEST_IMAGES, "test")


def report(config, backbone, untrained, splits):
    """The lines that a run ends with: attention on `matched` test canvases, and k-NN accuracy."""
    table = measure(config, backbone, untrained, splits["test"], TEST_IMAGES)
    lines = [f"attention of [CLS] on {TEST_IMAGES:,} held-out canvases, layout matched:", format_table(table)]
    accuracy = f"{100 * knn_accuracy(*bank_and_queries(config, backbone, splits)):.1f}%"
    if untrained is not None:
        accuracy += f", untrained {100 * knn_accuracy(*bank_and_queries(config, untrained, splits)):.1f}%"
    return "\n".join([*lines, f"k-NN accuracy: {accuracy}"])


def caption(config, epoch=None):
    """What a figure was made from, with everything that was replaced on the way."""
    parts = []
    if "loss" in config:
        crops = "1 crop" if config["crops"] == 1 else f"{config['crops']} crops"
        parts = [f"{config['loss'].upper()} loss", f"{config['views']} views", f"{crops} a canvas"]
    parts += [f"{config['image_size']} px", f"patch {config['patch_size']}"]
    parts += {"mnist": ["MNIST"], "sklearn": ["scikit-learn's digits"]}.get(config["digits"], [])
    if epoch is not None:
        parts.append(f"epoch {epoch} of {config['epochs']}")
    return "\n".join([", ".join(parts), *(textwrap.fill(textwrap.shorten(line, 160), 80) for line in config["fallbacks"])])


def save_figure(figure, path):
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"wrote {path}")


def draw_views(config, digits, path, images=4):
    """views.png: the crops that each branch is fed in the first training step, a row an image."""
    views = data.TrainingViews(config, digits)
    params = {name: value[:images] for name, value in views.draw(step=0).items()}
    crops = data.denormalise(views.render(params)).cpu().numpy()  # (C, images, size, size)
    if views.teacher == views.student:
        columns = [("both", crop) for crop in views.teacher]
    else:
        columns = [("teacher", crop) for crop in views.teacher] + [("student", crop) for crop in views.student]
    images = crops.shape[1]
    figure, axes = plt.subplots(
        images, len(columns), squeeze=False, layout="constrained",
        figsize=(max(5.5, 1.5 * len(columns)), 1.5 * images + 1),
    )
    for column, (branch, crop) in enumerate(columns):
        canvas, kind = views.plan[crop]
        where = f"canvas {'ab'[canvas]}" if config["views"] == "different" else ""
        axes[0, column].set_title(f"{branch}, {kind}\n{where}".strip(), fontsize=8)
        for row in range(images):
            axes[row, column].imshow(crops[crop, row], cmap="gray", vmin=0, vmax=1)
            axes[row, column].axis("off")
    figure.suptitle("What each branch is fed\n" + caption(config), fontsize=8)
    save_figure(figure, path)


def draw_attention(images, maps, path, title, masks=None):
    """Attention a head, a row an image: the input, the mean of the heads, then each head.

    Args:
        images: for each image (H, W) or (H, W, 3) in [0, 1].
        maps: for each image (heads, rows, columns), the attention on its grid of patches.
        masks: None, or (digit, clutter), each (n, H, W) bool, outlined on the input.

    Each map is coloured from 0 (black) to its own maximum.
    """
    heads = len(maps[0])
    names = ["input", *(["mean of heads"] if heads > 1 else []), *(f"head {h + 1}" for h in range(heads))]
    figure, axes = plt.subplots(
        len(images), len(names), squeeze=False, layout="constrained", figsize=(max(6, 1.4 * len(names)), 1.45 * len(images) + 0.9)
    )
    for name, axis in zip(names, axes[0]):
        axis.set_title(name, fontsize=9)
    for row, image in enumerate(images):
        height, width = image.shape[:2]
        axes[row, 0].imshow(image.numpy(), cmap="gray", vmin=0, vmax=1)
        if masks is not None:
            for mask, colour in zip(masks, ("lime", "red")):
                if mask[row].any():
                    axes[row, 0].contour(mask[row].numpy(), levels=[0.5], colors=colour, linewidths=0.7)
        shown = [maps[row].mean(0), *maps[row]] if heads > 1 else maps[row]
        for axis, map_ in zip(axes[row, 1:], shown):
            # the patch grid stretched over the image, so that both share their coordinates
            axis.imshow(map_.numpy(), cmap="inferno", vmin=0, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
        for axis in axes[row]:
            axis.axis("off")
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path)


def draw_tsne(points, labels, accuracy, path, title):
    """tsne.png: features (n, dim) in the plane, coloured by class (section III.A, perplexity 20)."""
    plane = TSNE(perplexity=20, init="pca", random_state=0).fit_transform(points.cpu().numpy())
    figure, axis = plt.subplots(figsize=(6, 6.4), layout="constrained")
    dots = axis.scatter(*plane.T, c=labels.cpu().numpy(), cmap="tab10", vmin=-0.5, vmax=9.5, s=8)
    figure.colorbar(dots, ax=axis, ticks=range(10), label="class", shrink=0.8)
    axis.set_xticks([])
    axis.set_yticks([])
    figure.suptitle(f"t-SNE of {len(points):,} test images; k-NN accuracy {100 * accuracy:.1f}%\n{title}", fontsize=8)
    save_figure(figure, path)


def open_image(path, image_size, patch_size):
    """A picture file as (3, H, W) in [0, 1]: its longer side image_size, both multiples of the patch."""
    try:
        picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "is not a picture" if isinstance(error, UnidentifiedImageError) else f"cannot be read ({error})"
        raise ValueError(f"--images {path} {reason}; PNG and JPEG files are") from error
    scale = image_size / max(picture.size)
    size = [max(1, round(side * scale / patch_size)) * patch_size for side in picture.size]
    pixels = np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255


# ------------------------------------------------------------------------------ command line


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="visualize.py", description="Draw and measure where a trained network looks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("checkpoint", help="ckpt.pth of train.py, a checkpoint of DINO, or a ViT state dict in its names")
    parser.add_argument("--images", nargs="+", metavar="FILE", help="draw the attention over these pictures instead")
    parser.add_argument("--image-size", type=int, help="side in pixels that images are brought to (default: as trained, else 224)")
    parser.add_argument("--digits", choices=["auto", "mnist", "sklearn"], help="where test digits come from (default: as trained)")
    parser.add_argument("--data-root", help="folder that holds MNIST/raw/ (default: as trained, else data)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    parser.add_argument("--output", help="folder for the figures (default: the checkpoint's)")
    return parser.parse_args(argv)


def open_checkpoint(args):
    """The settings, the backbone (teacher) and the epoch of a checkpoint; epoch None if not ours."""
    checkpoint = vit.read_checkpoint(args.checkpoint)
    weights = vit.backbone_weights(checkpoint, args.checkpoint)
    ours = "config" in checkpoint and "metrics" in checkpoint
    config = dict(checkpoint["config"]) if ours else dict(PAPER_CANVAS, fallbacks=[])
    backbone = vit.backbone_like(weights, args.checkpoint, vit.heads_of(checkpoint, weights["cls_token"].shape[-1]))
    config.update(patch_size=backbone.patch_size, heads=backbone.heads)
    for flag in ("image_size", "digits", "data_root"):
        if getattr(args, flag) is not None:
            config[flag] = getattr(args, flag)
    if config["image_size"] < 1 or config["image_size"] % config["patch_size"]:
        near = max(1, round(config["image_size"] / config["patch_size"])) * config["patch_size"]
        raise ValueError(
            f"--image-size {config['image_size']} is not a multiple of the patch size {config['patch_size']}: {near} is"
        )
    return config, backbone, checkpoint["epoch"] if ours else None


def untrained_backbone(config):
    """The network of a run at step 0, or None, with a line that says why, if it cannot be had."""
    backbone = vit.build_network(config).backbone
    if config["weights"] != "none":
        try:
            vit.load_pretrained(backbone, config["weights"])
        except (OSError, ValueError) as error:
            print(f"the untrained reference is left out: {error}", file=sys.stderr)
            return None
    return backbone


def visualize(args):
    """Everything that `python visualize.py` does; raises ValueError or OSError on bad input."""
    config, backbone, epoch = open_checkpoint(args)
    device = vit.find_device(args.device)
    backbone.to(device).eval()
    pictures = [open_image(file, config["image_size"], config["patch_size"]) for file in args.images or []]
    folder = args.output or os.path.dirname(args.checkpoint) or "."

    if pictures:
        mean, std = (torch.tensor(x)[:, None, None] for x in (data.IMAGENET_MEAN, data.IMAGENET_STD))
        maps = []
        for picture in pictures:
            rows, columns = (side // config["patch_size"] for side in picture.shape[1:])
            maps.append(cls_maps(backbone, ((picture - mean) / std)[None].to(device))[0].unflatten(-1, (rows, columns)).cpu())
        make_folder(folder)
        draw_attention([p.permute(1, 2, 0) for p in pictures], maps, os.path.join(folder, "attention-images.png"),
                       "Where [CLS] of the last block looks\n" + caption(config, epoch))
        return

    splits, config["digits"], warning = data.load_digits(config["digits"], config.get("data_root", "data"))
    if warning and warning not in config["fallbacks"]:
        config["fallbacks"] = [*config["fallbacks"], warning]
        print(f"warning: {warning}", file=sys.stderr)
    splits = {name: split.to(device) for name, split in splits.items()}
    make_folder(folder)
    if epoch is not None:
        draw_views(config, splits["train"], os.path.join(folder, "views.png"))
    draw_attention_on_canvases(config, backbone, epoch, splits["test"], os.path.join(folder, "attention.png"))

    untrained = untrained_backbone(config) if epoch is not None else None
    if untrained is not None:
        untrained.to(device)
    print(format_table(measure(config, backbone, untrained, splits["test"], TEST_IMAGES)))

    bank, bank_labels, points, labels = bank_and_queries(config, backbone, splits)
    accuracy = knn_accuracy(bank, bank_labels, points, labels)
    print(f"k-NN accuracy: {100 * accuracy:.1f}%")
    draw_tsne(points, labels, accuracy, os.path.join(folder, "tsne.png"), caption(config, epoch))


def make_folder(folder):
    """Make a folder for results; ValueError, before any work is done, if nothing can be written there."""
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to ({error.strerror}): --output names another folder") from error


def draw_attention_on_canvases(config, backbone, epoch, digits, path, images=8):
    """attention.png: the first test canvases of the layout `matched`, with their masks' outlines."""
    shown = next(data.evaluation_batches(config, digits, images))
    grid = config["image_size"] // config["patch_size"]
    maps = cls_maps(backbone, data.normalise(shown["images"])).unflatten(-1, (grid, grid)).cpu()
    title = "Where [CLS] of the last block looks (digit outlined green, clutter red)\n" + caption(config, epoch)
    draw_attention(shown["images"].cpu(), maps, path, title, (shown["digit"].cpu(), shown["clutter"].cpu()))


def main(argv=None):
    args = parse_args(argv)
    try:
        visualize(args)
    except (ValueError, OSError) as error:
        print(f"visualize.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
