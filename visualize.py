"""Look at the attention of a trained network, and measure it against the truth.

    python visualize.py runs/clutter-nce-different/ckpt.pth
    python visualize.py runs/clutter-nce-same/ckpt.pth runs/clutter-nce-different/ckpt.pth
    python visualize.py --weights dino
    python visualize.py runs/clutter-nce-different/ckpt.pth --images cat.jpg dog.png

The data are generated, so for every pixel it is known whether it is digit, clutter or
background. The first command prints a table of what the [CLS] token of the last block looks
at, beside what maps earn that understand nothing, and writes it to `metrics.json`. It draws
`attention.png`, where [CLS] looks in each head (the paper's figures 4 and 6); `curves.png`, how
that came about; `views.png`, what the two branches were fed (their first rows); `tsne.png`, the
features (figures 2 and 3).
"""

import argparse
import itertools
import json
import math
import os
import sys
import tempfile
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass, replace

import matplotlib

matplotlib.use("Agg")  # draws to files; needs no screen
matplotlib.rcParams["text.parse_math"] = False  # a $ in a file's name is a $

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

import data
import vit

TEST_IMAGES = 1000
VALIDATION_IMAGES = 512  # pick the best head, and draw the curves
BANK_IMAGES = 10_000
CURVES = ("selectivity", "auroc", "pointing", "entropy")
TITLE = "Where [CLS] of the last block looks"



def whole_number(low, high):
    return lambda value: type(value) is int and low <= value <= high


def number(low, high):
    return lambda value: type(value) in (int, float) and low <= value <= high


def pair(low, high):
    return lambda value: isinstance(value, (list, tuple)) and len(value) == 2 and all(map(number(low, high), value))


def word(*words):
    return lambda value: isinstance(value, str) and (not words or value in words)


def some(test):
    return lambda value: isinstance(value, list) and all(map(test, value))


# What a run's settings must say for its network, its canvases and its views to be made again, and what each may be.
# The ranges are wide, yet a file from elsewhere cannot take the machine's memory.
SIDE = whole_number(1, 2048)
SETTINGS = {
    "seed": whole_number(-(2**63), 2**63 - 1),
    "loss": word("nce", "dino"),
    "views": word("same", "different"),
    "crops": lambda value: type(value) is int and value in (1, 2, 4),
    "symmetric": lambda value: isinstance(value, bool),
    "epochs": whole_number(1, 10**9),
    "batch_size": whole_number(1, 10**6),
    "weights": word(),
    "digits": word("auto", "mnist", "sklearn"),
    "image_size": SIDE,
    **dict.fromkeys(("patch_size", "dim", "depth", "pos_size"), lambda value: True),  # those of the weights count
    "heads": whole_number(1, 128),
    "init_std": lambda value: value is None or number(0, 10)(value),
    **dict.fromkeys(("out_dim", "head_hidden_dim", "head_layers", "bottleneck_dim", "head_norm"), lambda value: True),
    "canvas_size": whole_number(28, 1024),
    "num_distractors": whole_number(0, 100),
    "distractor_size": whole_number(1, 28),
    "global_crops_scale": pair(0, 1),
    "local_crops_scale": pair(0, 1),
    "rotation": number(0, 360),
    "blur": pair(0, 100),
}
MORE_SETTINGS = {  # which older runs may lack
    "dataset": word("clutter", "stl10"),
    "split": word("unlabeled", "train"),
    "background": word(),
    "texture_pool": whole_number(0, 100_000),
    "data_root": word(),
    "keep_epochs": some(whole_number(0, 10**9)),
    "fallbacks": some(word()),
}
# What weights that somebody else trained are shown: the paper's canvas.
PAPER_CANVAS = {"image_size": 224, "canvas_size": 100, "num_distractors": 6, "distractor_size": 9, "digits": "auto"}


# ------------------------------------------------------------------------ attention in numbers
#
# Maps are (n, m, patches): m maps for each of n images, each map summing to 1. What lies beneath
# is (n, patches): how many pixels of each patch are digit, and how many clutter.


@torch.no_grad()
def cls_maps(backbone, images):
    """Where [CLS] looks in the last block: (B, heads, patches), each map summing to 1.

    `images` (B, 3, H, W), normalised. The attention that [CLS] pays to itself is left out.
    Raises FloatingPointError if the weights give no finite numbers.
    """
    maps = backbone.last_attention(images, queries=1)[:, :, 0, 1:]
    maps = maps / maps.sum(dim=-1, keepdim=True)
    if not maps.isfinite().all():
        raise FloatingPointError("the attention of its last block is not finite: its training diverged, or it is damaged")
    return maps


def patch_sums(images, patch_size):
    """Sum of (B, H, W) over each patch, row by row: (B, patches). Of a mask: its pixel count."""
    return F.avg_pool2d(images.float()[:, None], patch_size, divisor_override=1).flatten(1)


def density(maps, counts):
    """Share of the attention that falls on a region ÷ the region's share of the area.

    Attention is spread evenly over the pixels of a patch. 1 is what a uniform map has.
    `counts` are the region's pixels a patch. Returns (n, m); nan where an image has no such region.
    """
    return maps.shape[-1] * (maps * counts[:, None]).sum(-1) / counts.sum(-1)[:, None]


def share(maps, counts, patch_area):
    """Share of the attention that falls on a region, spread evenly over each patch's pixels: (n, m), from 0 to 1."""
    return (maps * counts[:, None]).sum(-1) / patch_area


def auroc(maps, digit, clutter):
    """P(a pixel of the digit gets more attention than one of the clutter), ties counting half.

    0.5: cannot tell. Only ranks matter, so a faint contrast counts like a strong one.
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


def pointing(maps, digit, clutter):
    """1 where the patch with most attention holds more digit than clutter, else 0: (n, m).

    Of several patches with the most, the share of them that do.
    """
    top = maps == maps.amax(-1, keepdim=True)
    return (top & (digit > clutter)[:, None]).sum(-1) / top.sum(-1)


def jaccard(maps, digit, patch_area, mass=0.6):
    """Jaccard index of the digit's pixels with the patches that hold most of the attention: (n, m).

    Patches are taken in descending order, tied ones together, until they hold `mass` of it (as
    DINO's paper compares attention with segmentations).
    """
    ranked = maps.sort(dim=-1, descending=True).values
    missing = (ranked.cumsum(-1) < mass - 1e-6).sum(-1, keepdim=True)  # rounding is not to ask for one more
    taken = maps >= ranked.gather(-1, missing)
    inside = (taken * digit[:, None]).sum(-1)
    return inside / (digit.sum(-1)[:, None] + patch_area * taken.sum(-1) - inside)


def best_jaccard(digit, patch_area):
    """The highest Jaccard index that any set of patches has with the digit's pixels: (n,).

    Of all sets of k patches the one with most digit is best, so only `patches` sets compete.
    """
    inside = digit.sort(dim=-1, descending=True).values.cumsum(-1)  # of the best 1, 2, 3, … patches
    area = patch_area * torch.arange(1, digit.shape[-1] + 1, device=digit.device)
    return (inside / (digit.sum(-1, keepdim=True) + area - inside)).amax(-1)


def entropy(maps):
    """How spread out a map is, (n, m): 0 if all lies on one patch, 1 if it is uniform."""
    return torch.special.entr(maps).sum(-1) / math.log(maps.shape[-1])


def diversity(maps):
    """Mean Jensen–Shannon divergence between any two of the m maps of an image, bits: (n,).

    0: they are the same; 1: no two share a patch. nan if there is but one.
    """
    bits = [torch.special.entr(map_).sum(-1) / math.log(2) for map_ in maps.unbind(1)]
    total = torch.zeros_like(bits[0])
    pairs = list(itertools.combinations(range(len(bits)), 2))
    for i, j in pairs:
        both = (maps[:, i] + maps[:, j]) / 2
        total += torch.special.entr(both).sum(-1) / math.log(2) - (bits[i] + bits[j]) / 2
    return total / len(pairs) if pairs else total * torch.nan


def attention_metrics(maps, digit, clutter, patch_area):
    """All metrics of single maps, an image each: {name: (n, m)} in float64.

    Images without clutter are nan in what needs it: clutter_density, auroc.
    """
    maps, digit, clutter = maps.double(), digit.double(), clutter.double()
    background = patch_area - digit - clutter
    without_ink = torch.where(digit + clutter == 0, patch_area, 0.0)
    return {
        "digit_density": density(maps, digit),
        "clutter_density": density(maps, clutter),
        "background_density": density(maps, background),
        "far_background_density": density(maps, without_ink),
        "digit_share": share(maps, digit, patch_area),
        "clutter_share": share(maps, clutter, patch_area),
        "background_share": share(maps, background, patch_area),
        "auroc": auroc(maps, digit, clutter),
        "pointing": pointing(maps, digit, clutter).double(),
        "jaccard60": jaccard(maps, digit, patch_area),
        "best_jaccard": best_jaccard(digit, patch_area)[:, None].expand(maps.shape[:2]),
        "entropy": entropy(maps),
    }


def bootstrap(values, index, resamples=1000, seed=0):
    """Means over images, and the same means once images are drawn anew, as chance might have had it.

    Canvases that show the same digit are not independent, so digits are resampled, with all
    their canvases.

    Args:
        values: (n, …), numbers of an image; nan is left out.
        index: (n,), the digit that each image shows.
    Returns (1 + resamples, …), the means themselves first.
    """
    digits, group = torch.unique(index, return_inverse=True)
    drawn = np.random.default_rng(seed).multinomial(len(digits), np.full(len(digits), 1 / len(digits)), resamples)
    weight = torch.cat([torch.ones(1, len(digits)), torch.from_numpy(drawn)]).double()  # how often each was drawn
    there = ~values.isnan()
    total, count = (
        torch.zeros(len(digits), *values.shape[1:], dtype=torch.float64).index_add_(0, group, x.double())
        for x in (values.nan_to_num(), there)
    )
    return torch.tensordot(weight, total, 1) / torch.tensordot(weight, count, 1)


def with_interval(means, images):
    """{"value", "low", "high", "images"} from a column of `bootstrap`: the value and its 95% interval.

    None stands for what no image could tell, and for the interval where nothing was resampled.
    """
    value, resampled = means[0].item(), means[1:][means[1:].isfinite()]
    low = high = None
    if math.isfinite(value) and len(resampled):
        low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": value if math.isfinite(value) else None, "low": low, "high": high, "images": int(images)}


def canvases(config, backbone, split, n, layout, name):
    """`data.evaluation_batches` for a network, on its device, behind a progress bar."""
    device = backbone.cls_token.device
    with tqdm(total=n, desc=f"{name} images {layout}", unit="image", leave=False, disable=None) as bar:
        for batch in data.evaluation_batches(config, split, n, layout, name, device=device):
            yield batch
            bar.update(len(batch["index"]))


def measure(backbone, batches, untrained=None, resamples=1000):
    """Every metric of the network's attention, and of the maps that it has to beat.

    Args:
        backbone: the network. untrained: the same at step 0, or None.
        batches: as `data.evaluation_batches` yields.
        resamples: for the intervals; 0: none.

    Returns {row: {metric: {"value", "low", "high", "images"}}}. Rows:
        mean: the mean map of the heads; head_1, head_2, …: each head.
        uniform: the same everywhere. ink: the same on every patch that holds ink, nothing
            elsewhere, as if all white pixels were alike. Both have selectivity 1 and auroc 0.5.
        brightness: proportional to each patch's summed intensity. Digits have denser strokes
            than clutter, so this already prefers them, having understood nothing.
        shuffled: the network's mean map of another image: what position alone earns.
        untrained: the mean map of `untrained`.
    Metrics: those of `attention_metrics`, and
        selectivity: mean digit density ÷ mean clutter density, over images that have clutter;
        diversity (rows mean and untrained): between the heads; None for one head.
    Of photographs, which have no masks, entropy and diversity alone, and no references but untrained.
    """
    columns, networks = [], [network for network in (backbone, untrained) if network is not None]
    for batch in batches:
        images = data.normalise(batch["images"])
        regions = [batch["digit"], batch["clutter"], batch["images"].mean(1)] if "digit" in batch else []
        counts = [patch_sums(region, backbone.patch_size) for region in regions]
        maps = [cls_maps(network, images) for network in networks]
        columns.append([x.cpu() for x in (*maps, *counts, batch["index"])])
    *columns, index = (torch.cat(column) for column in zip(*columns))
    heads, others, regions = columns[0], columns[1 : len(networks)], columns[len(networks) :]

    mean = heads.mean(1)  # (n, patches)
    rows = {"mean": mean}
    rows |= {f"head_{h + 1}": map_ for h, map_ in enumerate(heads.unbind(1))}
    if regions:
        digit, clutter, intensity = regions
        rows |= {"uniform": torch.ones_like(mean), "ink": (digit + clutter > 0).float(), "brightness": intensity + 1e-9}
        rows["shuffled"] = mean.roll(1, dims=0)
    rows |= {"untrained": other.mean(1) for other in others}
    maps = torch.stack([map_ / map_.sum(-1, keepdim=True) for map_ in rows.values()], dim=1)  # (n, rows, patches)
    if regions:
        pieces = zip(maps.split(100), digit.split(100), clutter.split(100))  # so that memory does not grow with n
        pieces = [attention_metrics(*piece, backbone.patch_size**2) for piece in pieces]
        values = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        values["beside_clutter"] = values["digit_density"].where(~values["clutter_density"].isnan(), torch.nan)
    else:
        values = {"entropy": entropy(maps.double())}
    values["diversity"] = torch.full_like(values["entropy"], torch.nan)
    for row, several in (("mean", heads), *(("untrained", other) for other in others)):
        values["diversity"][:, list(rows).index(row)] = diversity(several.double())

    means = dict(zip(values, bootstrap(torch.stack(list(values.values()), dim=1), index, resamples).unbind(1)))
    images = {name: (~value.isnan()).sum(0) for name, value in values.items()}
    if regions:
        means = {"selectivity": means.pop("beside_clutter") / means["clutter_density"], **means}
        images["selectivity"] = images.pop("beside_clutter")
    table = {
        row: {name: with_interval(means[name][:, r], images[name][r]) for name in means} for r, row in enumerate(rows)
    }
    for row in table.keys() - {"mean", "untrained"}:
        del table[row]["diversity"]
    return table


def attention_in_numbers(config, backbone, splits, untrained=None):
    """Layouts matched and paper of the test split: {"matched": table, "paper": table, "best_head": name}.

    Tables are those of `measure`. The best head is the most selective one on validation canvases.
    Of photographs {"photographs": table}.
    """
    if config.get("dataset") == "stl10":
        photographs = canvases(config, backbone, splits["test"], TEST_IMAGES, "", "test")
        return {"photographs": measure(backbone, photographs, untrained)}
    held_out = canvases(config, backbone, splits["validation"], VALIDATION_IMAGES, "matched", "validation")
    validation = measure(backbone, held_out, resamples=0)
    heads = [f"head_{h + 1}" for h in range(backbone.heads)]
    result = {"best_head": max(heads, key=lambda head: validation[head]["selectivity"]["value"] or 0)}
    for layout in ("matched", "paper"):
        batches = canvases(config, backbone, splits["test"], TEST_IMAGES, layout, "test")
        result[layout] = measure(backbone, batches, untrained)
    return result


# -------------------------------------------------------------------------------- the features


@torch.no_grad()
def features(backbone, batches):
    """L2-normalised [CLS] features (n, dim), labels (n,) and digits (n,) of batches of canvases."""
    rows = [
        (F.normalize(backbone(data.normalise(batch["images"])), dim=-1), batch["labels"], batch["index"])
        for batch in batches
    ]
    return tuple(torch.cat(column).cpu() for column in zip(*rows))


def knn_classify(bank, bank_labels, queries, k=20, temperature=0.07):
    """The class that wins a vote of each query's k nearest neighbours in the bank: (n,).

    Features are L2-normalised, (N, dim) and (n, dim); a neighbour's vote weighs
    exp(cosine / temperature), as in DINO's evaluation.
    """
    similarity, neighbour = (queries @ bank.T).topk(min(k, len(bank)))
    votes = torch.zeros(len(queries), int(bank_labels.max()) + 1)
    votes.scatter_add_(1, bank_labels[neighbour], (similarity / temperature).exp())
    return votes.argmax(1)


def probe_classify(bank, bank_labels, queries):
    """The class that a linear classifier, fitted to the bank, gives each query: (n,)."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return torch.from_numpy(probe.fit(bank.numpy(), bank_labels.numpy()).predict(queries.numpy()))


def features_in_numbers(config, backbone, splits):
    """How well the features tell the ten classes apart, training images to test images.

    Returns {"knn", "linear_probe": accuracy with its interval}, and the test features and labels.
    """
    bank = splits.get("bank", splits["train"])
    bank_images = canvases(config, backbone, bank, min(BANK_IMAGES, len(bank)), "paper", "train")
    bank, bank_labels, _ = features(backbone, bank_images)
    points, labels, index = features(backbone, canvases(config, backbone, splits["test"], TEST_IMAGES, "paper", "test"))
    result = {}
    for name, classify in (("knn", knn_classify), ("linear_probe", probe_classify)):
        right = (classify(bank, bank_labels, points) == labels).double()
        result[name] = with_interval(bootstrap(right, index), len(right))
    return result, points, labels


# ----------------------------------------------------------------------------------- the table

ACCURACIES = {"knn": "k-NN", "linear_probe": "linear probe"}
QUESTION = "Does it look at the digit, rather than at all that is white?"
REFERENCES = ("brightness", "shuffled", "untrained", "ink", "uniform")
LEGEND = """
selectivity   how much denser the attention is on the digit than on the clutter; 1: alike
above         its selectivity is higher than that of brightness or shuffled, the intervals apart
auroc         chance that a pixel of the digit gets more attention than one of the clutter
pointing      share of images whose most attended patch holds more digit than clutter
density       of the attention on a region, 1 if it were uniform; far: patches without any ink
share         of the attention that lies on a region
jaccard60     overlap of the digit with the patches that hold 60% of the attention;
best_jaccard  the highest overlap that any set of patches has
entropy       1: spread evenly over the image, 0: all on one patch
diversity     how much the heads differ, bits; 0: alike, 1: they share nothing
(best)        the head most selective on validation canvases, which are others than these
brightness    a map of each patch's brightness: understands nothing, yet prefers digits, which
              are denser strokes; a network has found the digit only if it is above this
shuffled      the network's maps, each laid on another image: what position alone earns
untrained     the same network before its first step
ink           the same attention on all ink;  uniform: the same everywhere
matched       clutter lies where digits lie;  paper: anywhere, as in the paper
k-NN, probe   share of test canvases whose digit the features tell; chance is 10%
[a, b]        95% interval, over digits
"""


def show(metric):
    """A metric as text, such as "1.91 [1.85, 1.97]"."""
    if metric["value"] is None:
        return "–"
    places = 2 if abs(metric["value"]) < 10 else 1
    text = f"{metric['value']:.{places}f}"
    return text if metric["low"] is None else f"{text} [{metric['low']:.{places}f}, {metric['high']:.{places}f}]"


def above(table, row, reference):
    """Whether the selectivity of a row is above that of another, their intervals apart as they are printed."""
    low, high = table[row]["selectivity"]["low"], table[reference]["selectivity"]["high"]
    return low is not None and high is not None and round(low, 2) > round(high, 2)


def row_name(row, best):
    return {"mean": "mean of heads"}.get(row, row.replace("_", " ") + (" (best)" if row == best else ""))


def verdict(result):
    """What the table comes to, in a sentence or two."""
    table, best = result["matched"], result["best_head"]
    own, brightness = table["mean"]["selectivity"], table["brightness"]["selectivity"]["value"]
    if own["value"] is None:
        return "Cannot be told: no canvas has both digit and clutter."
    text = f"attention {own['value']:.2f} times as dense on the digit as on the clutter"
    past_the_ink = table["mean"]["digit_density"]["high"] < 1
    if above(table, "mean", "brightness") and above(table, "mean", "shuffled") and not past_the_ink:
        auroc = [table[row]["auroc"] for row in ("mean", "brightness")]
        text = f"Yes: {text}, more than brightness alone ({brightness:.2f}) or position explain."
        if auroc[0]["low"] <= auroc[1]["high"]:
            text += " By auroc, ranks alone, it is not above brightness "
            text += f"({auroc[0]['value']:.2f}, {auroc[1]['value']:.2f})."
        return text
    if past_the_ink:
        least = table["mean"]["digit_density"]["value"]
        text = f"No, it looks past the ink: attention on the digit is {least:.2f} times what an even map gives it."
    elif own["high"] < 1:
        text = f"No, it prefers the clutter: {text}."
    elif above(table, "mean", "shuffled"):
        text = f"Not more than brightness explains: {text}; brightness alone earns {brightness:.2f}."
    else:
        text = f"No: {text}, which position alone may earn."
    if above(table, best, "brightness") and above(table, best, "shuffled"):
        text += f" But {row_name(best, None)}, by itself, does: {show(table[best]['selectivity'])}."
    return text


def format_table(result):
    """The result of `attention_in_numbers` as text of at most 100 columns."""
    best = result["best_head"]

    def first_columns(table, rows):
        head = f"{'':16}{'selectivity':19}{'above':12}{'above':10}{'auroc':19}pointing\n{'':35}brightness  shuffled"
        lines = [head]
        for row in rows:
            beaten = ["yes" if above(table, row, other) else "no" for other in ("brightness", "shuffled")]
            beaten = ["", ""] if row in REFERENCES else beaten
            cells = [show(table[row][name]) for name in ("selectivity", "auroc", "pointing")]
            line = f"{row_name(row, best):16}{cells[0]:19}{beaten[0]:12}{beaten[1]:10}{cells[1]:19}{cells[2]}"
            lines.append(line.rstrip())
        return lines

    table = result["matched"]
    rows = [row for row in table if row not in REFERENCES] + [row for row in REFERENCES if row in table]
    rows = rows if "head_2" in table else [row for row in rows if row != "head_1"]  # one head is its own mean
    images = table["mean"]["entropy"]["images"]
    lines = [QUESTION, *textwrap.wrap(verdict(result), 100)]
    lines += ["", f"{images:,} test canvases, layout matched: clutter lies where digits lie, so position tells nothing"]
    lines += first_columns(table, rows)
    regions = ("digit", "clutter", "background", "far_background")
    lines += ["", f"{'':16}density on", "".join(f"{title:16}" for title in ("", *regions)) + "jaccard60   entropy"]
    for row in rows:
        cells = [f"{show(table[row][f'{region}_density'] | {'low': None}):16}" for region in regions]
        cells += [f"{show(table[row]['jaccard60'] | {'low': None}):12}", show(table[row]["entropy"] | {"low": None})]
        lines.append(f"{row_name(row, best):16}" + "".join(cells))
    lines += ["", f"highest jaccard60 that any set of patches could have: {show(table['mean']['best_jaccard'])}"]
    lines += [format_diversity(table)]
    lines += ["", "layout paper: clutter lies anywhere, so that a map which knows nothing of the image can score"]
    lines += first_columns(result["paper"], [row for row in rows if row not in ("ink", "uniform")])
    return "\n".join(lines)


def format_photographs(result):
    """What can be said of attention to photographs, whose truth nobody knows."""
    table = result["photographs"]
    lines = ["there are no masks to measure the attention to photographs against", "", f"{'':16}entropy"]
    lines += [f"{row_name(row, None):16}{show(table[row]['entropy'])}" for row in table]
    return "\n".join([*lines, "", format_diversity(table)])


def format_diversity(table):
    text = f"diversity of the heads, bits (0: alike, 1: nothing shared): {show(table['mean']['diversity'])}"
    return text + (f", untrained {show(table['untrained']['diversity'] | {'low': None})}" if "untrained" in table else "")


def format_features(result):
    """The accuracies of `features_in_numbers`, of the network and of the untrained one."""
    lines = [f"{'accuracy of':16}" + "".join(f"{title:19}" for title in ACCURACIES.values()).rstrip()]
    for key, title in (("features", "its features"), ("untrained_features", "untrained")):
        if key in result:
            lines.append(f"{title:16}" + "".join(f"{show_percent(result[key][a]):19}" for a in ACCURACIES).rstrip())
    return "\n".join(lines)


def show_percent(metric):
    return f"{100 * metric['value']:.1f}%" + f" [{100 * metric['low']:.0f}, {100 * metric['high']:.0f}]"


def format_comparison(names, results, circumstances):
    """Several results side by side, a column each, four at a time: at most 100 columns of text.

    names: of the networks. circumstances: of each, a dict of {title: what it was measured on}.
    """

    def add(title, texts):
        lines.append(f"{title:24}" + "".join(f"{text:19}" for text in texts).rstrip())

    lines = []
    for start in range(0, len(results), 4):
        part, tables = results[start : start + 4], [result["matched"] for result in results[start : start + 4]]
        add("", names[start : start + 4])
        for title in circumstances[0]:
            add(title, [each[title] for each in circumstances[start : start + 4]])
        lines.append("\nmean map of the heads, layout matched")
        add("selectivity", [show(table["mean"]["selectivity"]) for table in tables])
        for reference in ("brightness", "shuffled"):
            add(f"  above {reference}?", ["yes" if above(table, "mean", reference) else "no" for table in tables])
        for reference in ("brightness", "shuffled", "untrained"):
            add(f"  of {reference}", [show(t[reference]["selectivity"]) if reference in t else "–" for t in tables])
        for name in ("auroc", *(name for name in tables[0]["mean"] if name not in ("selectivity", "auroc"))):
            add(name, [show(table["mean"][name]) for table in tables])
        add("best head on validation", [result["best_head"].replace("_", " ") for result in part])
        for name in ("selectivity", "auroc"):
            add(f"  its {name}", [show(table[result["best_head"]][name]) for result, table in zip(part, tables)])
        lines.append("\nmean map of the heads, layout paper")
        for name in ("selectivity", "auroc"):
            add(name, [show(result["paper"]["mean"][name]) for result in part])
        lines.append("\naccuracy of the features")
        for key, title in ACCURACIES.items():
            add(title, [show_percent(result["features"][key]) for result in part])
        lines.append("")
    return "\n".join(lines[:-1])


# --------------------------------------------------------------------------------- the figures


def caption(config, epoch=None):
    """What a figure was made from, with everything that was replaced on the way."""
    replaced = [textwrap.fill(textwrap.shorten(line, 160), 88) for line in config["fallbacks"]]
    return "\n".join([textwrap.fill(describe(config, epoch), 94), *replaced])


def describe(config, epoch=None):
    """A line: what was trained how, on what, and how far."""
    parts = []
    if "loss" in config:
        crops = "1 crop" if config["crops"] == 1 else f"{config['crops']} crops"
        of = "an image" if config.get("dataset") == "stl10" else "a canvas"
        parts = [f"{config['loss'].upper()} loss", f"{config['views']} views", f"{crops} {of}"]
    else:
        parts = [{"none": "random weights"}.get(config["weights"], f"weights {config['weights']}")]
    parts += [f"{config['image_size']} px", f"patch {config['patch_size']}"]
    if config.get("dataset") == "stl10":
        parts.append("STL-10")
    else:
        parts += {"mnist": ["MNIST"], "sklearn": ["scikit-learn's digits"]}.get(config["digits"], [])
        if config.get("background", "black") != "black":
            pool = f", {config['texture_pool']} in all" if config.get("texture_pool") else ""
            parts.append(f"background {config['background']}{pool}")
    if epoch is not None:
        parts.append(f"epoch {epoch} of {config['epochs']}")
    return ", ".join(parts)


def save_figure(figure, path):
    with vit.whole(path) as part:
        figure.savefig(part, dpi=120)
    plt.close(figure)
    print(f"wrote {path}")


def draw_views(config, split, path, images=4):
    """views.png: the crops that each branch is fed in the first training step, a row an image."""
    views = data.TrainingViews(config, split)
    params = {name: value[:images] for name, value in views.draw(step=0).items()}
    crops = data.denormalise(views.render(params)).movedim(2, -1).clamp(0, 1).cpu().numpy()  # (C, images, size, size, 3)
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
            axes[row, column].imshow(crops[crop, row])
            axes[row, column].axis("off")
    figure.suptitle("What each branch is fed\n" + caption(config), fontsize=8)
    save_figure(figure, path)


def draw_attention(groups, path, title, row_names=None):
    """Attention a head, a row an image: the input, the mean of the heads, then each head.

    Args:
        groups: side by side, each a dict:
            images: for each row (H, W) or (H, W, 3) in [0, 1];
            maps: for each row (heads, rows, columns), the attention on its grid of patches;
            masks: None, or (digit, clutter), each a list of (H, W) bool, outlined on the input;
            name: above its columns, may be empty. Drawn without input if that is as in the
            group before.
        row_names: a name for each row, or None.

    Each map is coloured from 0 (black) to its own maximum.
    """
    columns = []  # (title, function that fills the cell of a row)
    for k, group in enumerate(groups):
        heads, name = len(group["maps"][0]), group["name"] + "\n" * bool(group["name"])
        before = groups[k - 1]["images"] if k else []
        if not (k and all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(before, group["images"]))):
            columns.append((("\n" if name else "") + "input", draw_input, group, None))
        if heads > 1:
            columns.append((name + "mean of heads", draw_map, group, None))
        columns += [(f"{name}head {h + 1}", draw_map, group, h) for h in range(heads)]
    rows = len(groups[0]["images"])
    figure, axes = plt.subplots(
        rows, len(columns), squeeze=False, layout="constrained", figsize=(max(6, 1.4 * len(columns)), 1.45 * rows + 1)
    )
    for (heading, draw, group, head), column in zip(columns, axes.T):
        column[0].set_title(heading, fontsize=8)
        for row, axis in enumerate(column):
            draw(axis, group, row, head)
            axis.axis("off")
    for axis, name in zip(axes[:, 0], row_names or []):
        axis.text(-0.06, 0.5, name, rotation=90, ha="right", va="center", fontsize=8, transform=axis.transAxes)
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path)


def draw_input(axis, group, row, _):
    axis.imshow(group["images"][row].numpy(), cmap="gray", vmin=0, vmax=1)
    for masks, colour in zip(group["masks"] or [], ("lime", "red")):
        if masks[row].any():
            axis.contour(masks[row].numpy(), levels=[0.5], colors=colour, linewidths=0.7)


def draw_map(axis, group, row, head):
    map_ = group["maps"][row].mean(0) if head is None else group["maps"][row][head]
    height, width = group["images"][row].shape[:2]
    # the patch grid stretched over the image, so that both share their coordinates
    axis.imshow(map_.numpy(), cmap="inferno", vmin=0, extent=(-0.5, width - 0.5, height - 0.5, -0.5))


def draw_curves(history, config, path):
    """curves.png: the lines of log.jsonl against epochs, on validation canvases of the layout matched or photographs."""
    epochs = [line["epoch"] for line in history]
    held_out = [line["validation"] for line in history]
    heads = [row for row in held_out[0] if row.startswith("head_")]
    measured = [name for name in CURVES if name in held_out[0]["mean"]]
    panels = ["loss", *measured, *(["diversity"] if len(heads) > 1 else []), "k-NN accuracy", "legend"]
    columns = -(-len(panels) // 2)
    figure, axes = plt.subplots(2, columns, figsize=(3.5 * columns, 6.6), layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    axes = dict(zip(panels, axes.flat))

    colours = plt.get_cmap("tab10" if len(heads) <= 10 else "tab20")

    def values(row, name):
        return [line[row][name] if line[row][name] is not None else math.nan for line in held_out]

    axes["loss"].plot(epochs[1:], [line["loss"] for line in history[1:]], ".-", color="grey", label="training")
    axes["loss"].plot(epochs, [line["loss"] for line in held_out], ".-", color="black", label="validation")
    if config["loss"] == "nce":
        axes["loss"].axhline(math.log(config["batch_size"]), color="grey", linestyle=":", label="chance, ln(batch)")
    axes["loss"].legend(fontsize=8)
    for name in measured:
        for number, head in enumerate(heads if len(heads) > 1 else []):
            axes[name].plot(epochs, values(head, name), color=colours(number), linewidth=1, label=head.replace("_", " "))
        axes[name].plot(epochs, values("mean", name), color="black", linewidth=2, label="mean of heads")
        axes[name].axhline(values("mean", name)[0], color="grey", linestyle="--", label="untrained")
        if name != "entropy":
            axes[name].plot(epochs, values("brightness", name), color="darkorange", linestyle="--", label="brightness")
            axes[name].plot(epochs, values("shuffled", name), color="purple", linestyle="--", label="shuffled")
    for name, chance in (("selectivity", 1), ("auroc", 0.5)):
        if name in measured:
            axes[name].axhline(chance, color="silver", linestyle=":", label="ink, uniform")
    if "diversity" in axes:
        axes["diversity"].plot(epochs, values("mean", "diversity"), color="black", linewidth=2)
        axes["diversity"].axhline(values("mean", "diversity")[0], color="grey", linestyle="--")
    axes["k-NN accuracy"].plot(epochs, [100 * line["knn"] for line in held_out], color="black", linewidth=2)
    axes["k-NN accuracy"].axhline(100 * held_out[0]["knn"], color="grey", linestyle="--")

    units = {"entropy": " (1: spread evenly)", "diversity": " of the heads, bits", "k-NN accuracy": ", %"}
    legend = axes.pop("legend")
    legend.axis("off")
    handles, names = axes[measured[0]].get_legend_handles_labels()
    legend.legend(handles, names, loc="center", fontsize=9, ncols=1 if len(names) <= 12 else 2)
    for name, axis in axes.items():
        axis.set_title(name + units.get(name, ""), fontsize=11)
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.ticklabel_format(axis="y", useOffset=False)
    figure.suptitle(f"{held_out[0]['images']} validation images, teacher's attention\n" + caption(config), fontsize=9)
    save_figure(figure, path)


def draw_tsne(points, labels, accuracy, path, title, classes=range(10)):
    """tsne.png: features (n, dim) in the plane, coloured by class (section III.A, perplexity 20)."""
    collapsed = bool((points == points[0]).all())  # to one point: t-SNE would divide by zero, and crash
    plane = points[:, :2].numpy() if collapsed else TSNE(perplexity=20, init="pca", random_state=0).fit_transform(points.numpy())
    figure, axis = plt.subplots(figsize=(6, 6.4), layout="constrained")
    dots = axis.scatter(*plane.T, c=labels.numpy(), cmap="tab10", vmin=-0.5, vmax=9.5, s=8)
    figure.colorbar(dots, ax=axis, ticks=range(10), label="class", shrink=0.8).ax.set_yticklabels(classes)
    axis.set_xticks([])
    axis.set_yticks([])
    figure.suptitle(f"t-SNE of {len(points):,} test images; k-NN accuracy {100 * accuracy:.1f}%\n{title}", fontsize=8)
    save_figure(figure, path)


def open_image(path, image_size, patch_size):
    """A picture file as (3, H, W) in [0, 1]: its longer side image_size, both multiples of the patch."""
    try:
        picture = data.read_image(path)
    except OSError as error:
        raise ValueError(f"--images {error}") from error
    if min(picture.size) < patch_size:
        raise ValueError(f"--images {path}: {picture.width}×{picture.height} pixels are less than a patch of {patch_size}")
    scale = image_size / max(picture.size)
    size = [max(1, round(side * scale / patch_size)) * patch_size for side in picture.size]
    pixels = np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255


# -------------------------------------------------------------------------------- command line


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="visualize.py", description="Draw and measure where a trained network looks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="CKPT",
        help="ckpt.pth of train.py, a checkpoint of DINO, or a ViT state dict in its names; several are set side by side")
    add("--weights", metavar="{dino,none,FILE}",
        help="also look at weights that were not fine-tuned, on the first checkpoint's canvases, else on the paper's: "
        "DINO's ViT-S/8 or another of its networks by name (dino_vits16, dino_vitb8, dino_vitb16), random ones, or a file "
        "(default: none are looked at)")
    add("--images", nargs="+", metavar="FILE", help="draw the attention over these pictures instead")
    add("--image-size", type=int, help="side in pixels that images are brought to (default: as trained, else 224)")
    add("--digits", choices=["auto", "mnist", "sklearn"], help="where digits come from (default: as trained)")
    add("--background", metavar="{black,texture,DIR}", help="what lies behind digit and clutter (default: as trained)")
    add("--data-root", help="folder that holds MNIST/raw/ or stl10_binary/ (default: as trained, else data)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    add("--output", help="folder for what is written (default: the first checkpoint's, or runs/weights-…)")
    args = parser.parse_args(argv)
    flags = [value for name, value in vars(args).items() if name != "checkpoints"]
    if [] in flags:  # what argparse makes of --device=-- in some versions of Python
        parser.error("-- is no value of a flag")
    return args


@dataclass
class Subject:
    """A network to be looked at, and the settings under which it is."""

    name: str  # the file, or the flag, that it came from
    config: dict
    backbone: vit.VisionTransformer
    epoch: int | None = None  # None: not from a run of train.py
    history: list | None = None  # the run's log
    known: bool = True  # False: nobody knows what it was trained on; drawn on the paper's canvases, not measured
    splits: dict | None = None  # the digits or photographs that it is shown


def read_backbone(path):
    """What a .pth file holds, and its (teacher's) backbone."""
    checkpoint = vit.read_checkpoint(path)
    weights = vit.backbone_weights(checkpoint, path)
    return checkpoint, vit.backbone_like(weights, path, vit.heads_of(checkpoint, weights["cls_token"].shape[-1]))


def open_checkpoint(path, args):
    """The Subject in a checkpoint: its teacher, under the settings it was trained with."""
    checkpoint, backbone = read_backbone(path)
    if "config" not in checkpoint or "metrics" not in checkpoint:
        config = settings(PAPER_CANVAS, backbone, args) | {"weights": os.path.basename(path)}
        return Subject(path, config, backbone, known=False)
    check_settings(checkpoint, path)
    config = settings(checkpoint["config"], backbone, args)
    return Subject(path, config, backbone, checkpoint["epoch"], checkpoint["metrics"])


def check_settings(checkpoint, path):
    """ValueError unless a checkpoint's settings, epoch and log are such as train.py writes."""
    config = checkpoint["config"]
    lost = [name for name in SETTINGS if name not in config] if isinstance(config, dict) else list(SETTINGS)
    lost += ["epoch"] * ("epoch" not in checkpoint)
    if lost:
        raise ValueError(f"{path} lacks {', '.join(lost)}, which train.py writes: it is no checkpoint of this program")
    wrong = [name for name, test in (SETTINGS | MORE_SETTINGS).items() if name in config and not test(config[name])]
    wrong += ["epoch"] * (not whole_number(0, 10**9)(checkpoint["epoch"]))
    wrong += ["metrics"] * (not is_log(checkpoint["metrics"]))
    if wrong:
        raise ValueError(f"{path} says of {', '.join(wrong)} what train.py would not: it is no checkpoint of this program")
    try:
        json.dumps(config)  # since metrics.json will hold it
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} has settings that are no plain values: it is no checkpoint of this program") from error


def is_log(history):
    """Whether the metrics of a checkpoint are lines of a log that `draw_curves` can draw, if they are to be drawn."""
    if not (isinstance(history, list) and all(isinstance(line, dict) for line in history)):
        return False
    if not history or "validation" not in history[0]:
        return True

    def has(table, *names):
        values = [table.get(name, "nothing") for name in names] if isinstance(table, dict) else ["no table"]
        return all(value is None or number(-1e12, 1e12)(value) for value in values)

    first = history[0]["validation"]
    if not (isinstance(first, dict) and isinstance(first.get("mean"), dict) and "entropy" in first["mean"]):
        return False
    names = [name for name in CURVES if name in first["mean"]]
    rows = ["mean", *(row for row in first if str(row).startswith("head_"))] + ["brightness", "shuffled"] * (len(names) > 1)
    return all(
        has(line, "epoch", *["loss"] * (k > 0))
        and has(line.get("validation"), "images", "loss", "knn")
        and all(has(line["validation"].get(row), *names) for row in rows)
        and has(line["validation"]["mean"], "diversity")
        and None not in (line["epoch"], line["validation"]["knn"])
        for k, line in enumerate(history)
    )


def open_weights(source, args, like=None):
    """The Subject of --weights: measured as the Subject `like` is, on the paper's canvas if None."""
    if source == "none":
        torch.manual_seed(0)
        backbone = vit.build_backbone(like.config) if like else vit.VisionTransformer()
    else:
        _, backbone = read_backbone(vit.weights_file(source))
    names = (*PAPER_CANVAS, "dataset", "split", "background", "texture_pool", "data_root")
    config = {name: like.config[name] for name in names if name in like.config} if like else dict(PAPER_CANVAS)
    patch = backbone.patch_size
    config["image_size"] = max(1, round(config["image_size"] / patch)) * patch
    return Subject(f"--weights {source}", settings(config, backbone, args) | {"weights": source}, backbone)


def settings(config, backbone, args):
    """A checkpoint's settings with the flags over them; ValueError for an image size that does not fit."""
    shape = {name: getattr(backbone, name) for name in ("patch_size", "dim", "depth", "heads")}
    config = {"fallbacks": [], **config, **shape, "pos_size": backbone.grid * backbone.patch_size}
    flags = {name: getattr(args, name) for name in ("image_size", "digits", "background", "data_root")}
    config |= {name: value for name, value in flags.items() if value is not None}
    if config["image_size"] < 1 or config["image_size"] % config["patch_size"]:
        near = max(1, round(config["image_size"] / config["patch_size"])) * config["patch_size"]
        raise ValueError(
            f"--image-size {config['image_size']} is no positive multiple of the patch size {config['patch_size']}: {near} is"
        )
    if not SIDE(config["image_size"]):
        raise ValueError(f"--image-size {config['image_size']} is too large: 2048 is the most")
    return config


def untrained_backbone(config):
    """The network of a run at step 0, or None, with a line that says why, if it cannot be had."""
    backbone = vit.build_backbone(config)
    if config["weights"] != "none":
        try:
            vit.load_pretrained(backbone, config["weights"])
        except (OSError, ValueError) as error:
            print(f"the untrained reference is left out: {data.one_line(error)}", file=sys.stderr)
            return None
    return backbone


@contextmanager
def naming(name):
    """Attention that is not finite is told with the name of the network that it came from."""
    try:
        yield
    except FloatingPointError as error:
        raise ValueError(f"{name}: {error}") from error


def visualize(args):
    """Everything that `python visualize.py` does; raises ValueError or OSError on bad input."""
    subjects = [open_checkpoint(path, args) for path in args.checkpoints]
    if args.weights is not None:
        subjects.append(open_weights(args.weights, args, next((s for s in subjects if s.known), None)))
    if not subjects:
        raise ValueError("nothing to look at: name a ckpt.pth, or give --weights dino, none or a file")
    device = vit.find_device(args.device)
    for subject in subjects:
        subject.backbone.to(device).eval()
    if args.output or args.checkpoints or args.weights not in ("none", *vit.DINO_FILES):
        folder = args.output or os.path.dirname(args.checkpoints[0] if args.checkpoints else args.weights) or "."
    else:
        folder = os.path.join("runs", f"weights-{args.weights}")

    if args.images:
        groups = []
        for subject, number in zip(subjects, numbers(subjects)):
            c = subject.config
            pictures = [open_image(file, c["image_size"], c["patch_size"]) for file in args.images]
            groups.append(draw_group(subject, number, pictures, [picture.permute(1, 2, 0) for picture in pictures]))
        make_folder(folder)
        draw_attention(groups, os.path.join(folder, "attention-images.png"), f"{TITLE}\n{captions(subjects)}")
        return

    load_splits(subjects, device)
    make_folder(folder)
    for subject in subjects:
        if not subject.known:
            print(f"{subject.name} does not say what it was trained on: there are no masks of its own to measure against, "
                  f"so it is drawn on the paper's canvases; --weights {subject.name} measures it on those")
    if len(subjects) == 1:
        look(subjects[0], folder)
    else:
        compare(subjects, folder)


def load_splits(subjects, device):
    """Give each subject the digits or photographs that its settings ask for; the same ones are read once."""
    read = {}
    for subject in subjects:
        config = subject.config
        source = tuple(config.get(name) for name in ("dataset", "split", "digits", "background", "data_root"))
        if source not in read:
            splits, warning = data.load_dataset(config, device)
            read[source] = splits, config["digits"], warning
            if warning and warning not in config["fallbacks"]:
                print(f"warning: {warning}", file=sys.stderr)
        subject.splits, config["digits"], warning = read[source]
        if warning and warning not in config["fallbacks"]:
            config["fallbacks"] = [*config["fallbacks"], warning]


def make_folder(folder):
    """Make a folder for results; ValueError, before any work is done, if nothing can be written there."""
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to ({error.strerror}): --output names another folder") from error


def look(subject, folder):
    """All figures and numbers of one network."""
    title = caption(subject.config, subject.epoch)
    group, row_names = attention_over_epochs(subject)  # first, since it finds what is damaged
    if subject.history:
        draw_views(subject.config, subject.splits["train"], os.path.join(folder, "views.png"))
        if "validation" in subject.history[0]:
            draw_curves(subject.history, subject.config, os.path.join(folder, "curves.png"))
    outlines = " (digit outlined green, clutter red)" if group["masks"] else ""
    draw_attention([group], os.path.join(folder, "attention.png"), f"{TITLE}{outlines}\n{title}", row_names)
    if subject.known:
        untrained = untrained_backbone(subject.config) if subject.history else None
        result, points, labels = report(subject, untrained, folder)
        accuracy = result["features"]["knn"]["value"]
        classes = data.STL10_CLASSES if subject.config.get("dataset") == "stl10" else range(10)
        draw_tsne(points, labels, accuracy, os.path.join(folder, "tsne.png"), title, classes)


def attention_over_epochs(subject):
    """What `draw_attention` takes: canvases through the network, and through each epoch that the run kept."""
    stages, device = [], subject.backbone.cls_token.device
    for epoch in subject.config.get("keep_epochs", []):
        path = os.path.join(os.path.dirname(subject.name), f"epoch-{epoch}.pth")
        if epoch < subject.epoch and os.path.exists(path):
            network = read_backbone(path)[1]
            if (network.patch_size, network.heads) != (subject.backbone.patch_size, subject.backbone.heads):
                raise ValueError(f"{path} has other patches or heads than {subject.name}: it is of another run")
            stages.append((epoch, network.to(device)))
    if not stages:
        return draw_examples(subject, "", images=8), None
    stages.append((subject.epoch, subject.backbone))
    images = max(2, 12 // len(stages))
    groups = [draw_examples(replace(subject, backbone=network), "", images) for _, network in stages]
    order = [(image, stage) for image in range(images) for stage in range(len(stages))]
    group = groups[0] | {
        "images": [groups[stage]["images"][image] for image, stage in order],
        "maps": [groups[stage]["maps"][image] for image, stage in order],
        "masks": [[mask[image] for image, _ in order] for mask in groups[0]["masks"] or []],
    }
    return group, [f"epoch {stages[stage][0]}" for _, stage in order]


def compare(subjects, folder):
    """The same images through several networks, and their numbers side by side."""
    named = list(zip(numbers(subjects), subjects))
    groups = [draw_examples(subject, number, images=8) for number, subject in named]
    path = os.path.join(folder, "attention-compared.png")
    outlines = " (digit outlined green, clutter red)" if any(group["masks"] for group in groups) else ""
    draw_attention(groups, path, f"{TITLE}{outlines}\n{captions(subjects)}")
    results, circumstances = {}, {}
    for number, subject in named:
        if subject.known:
            untrained = untrained_backbone(subject.config) if subject.history else None
            result = results[number] = numbers_of(subject, untrained)
            add_features(result, subject, untrained)
            print(f"\n{number} {subject.name}\n{textwrap.fill(describe(subject.config, subject.epoch), 100)}")
            if "matched" in result:
                c = subject.config
                print(textwrap.fill(f"{QUESTION} {verdict(result)}", 100))
                circumstances[number] = {
                    "canvas": f"{c['canvas_size']} px, clutter {c['num_distractors']}",
                    "background": c.get("background", "black")[:18],
                    "input": f"{c['image_size']} px, patch {c['patch_size']}",
                    "digits": c["digits"],
                }
            else:
                print(f"{format_photographs(result)}\n{format_features(result)}")
    if circumstances:
        columns = list(circumstances)
        print("\n" + format_comparison(columns, [results[c] for c in columns], list(circumstances.values())))
        shown = list(circumstances.values())
        different = [key for key in shown[0] if len({each[key] for each in shown}) > 1]
        if different:
            print(f"\nThey differ in {' and '.join(different)}: each is measured at its own, so read across with care.")
        print(LEGEND)
    if results:
        path = os.path.join(folder, "metrics-compared.json")
        write_json(path, list(results.values()))
        print(f"wrote {path}")


def numbers(subjects):
    """[1], [2], … for several; nothing for one."""
    return [f"[{k + 1}]" if len(subjects) > 1 else "" for k in range(len(subjects))]


def captions(subjects):
    """`caption` of one; of several a line each, and what was replaced for any of them."""
    if len(subjects) == 1:
        return caption(subjects[0].config, subjects[0].epoch)
    lines = [f"{n} {s.name}: {describe(s.config, s.epoch)}" for n, s in zip(numbers(subjects), subjects)]
    return "\n".join([*lines, *dict.fromkeys(line for s in subjects for line in s.config["fallbacks"])])


def draw_examples(subject, name, images):
    """A group of `draw_attention`: the first test photographs, or canvases of the layout `matched`."""
    batch = next(data.evaluation_batches(subject.config, subject.splits["test"], images))
    shown = batch["images"].expand(-1, 3, -1, -1)
    group = draw_group(subject, name, list(shown), list(shown.movedim(1, -1).clamp(0, 1).cpu()))
    return group | {"masks": [list(batch[region].cpu()) for region in ("digit", "clutter") if region in batch]}


def draw_group(subject, name, pictures, images):
    """A group of `draw_attention` of pictures (3, H, W) in [0, 1], shown as `images`."""
    device, maps = subject.backbone.cls_token.device, []
    with naming(subject.name):
        for picture in pictures:
            grid = [side // subject.backbone.patch_size for side in picture.shape[1:]]
            map_ = cls_maps(subject.backbone, data.normalise(picture[None].to(device)))
            maps.append(map_[0].unflatten(-1, grid).cpu())
    return {"name": name, "images": images, "maps": maps, "masks": None}


def numbers_of(subject, untrained):
    """What metrics.json holds of a network, but for its features."""
    if untrained is not None:
        untrained.to(subject.backbone.cls_token.device).eval()
    with naming(subject.name):
        tables = attention_in_numbers(subject.config, subject.backbone, subject.splits, untrained)
    config = dict(subject.config)
    fallbacks = config.pop("fallbacks")
    return {"checkpoint": subject.name, "epoch": subject.epoch, "fallbacks": fallbacks, "settings": config, **tables}


def add_features(result, subject, untrained):
    """Complete what `numbers_of` returned by the features; returns those of the test images, and their labels."""
    result["features"], points, labels = features_in_numbers(subject.config, subject.backbone, subject.splits)
    if untrained is not None:
        result["untrained_features"] = features_in_numbers(subject.config, untrained, subject.splits)[0]
    return points, labels


def report(subject, untrained, folder):
    """Print the numbers of a network and write metrics.json; returns them, and the test features and labels."""
    path = os.path.join(folder, "metrics.json")
    bank = min(BANK_IMAGES, len(subject.splits.get("bank", subject.splits["train"])))
    print(f"measuring the attention to test images, then the features of {bank:,} training images and theirs", flush=True)
    result = numbers_of(subject, untrained)
    text = format_table(result) if "matched" in result else format_photographs(result)
    print(f"\n{subject.name}\n{textwrap.fill(describe(subject.config, subject.epoch), 100)}\n{text}\n")
    write_json(path, result)  # the features may take long
    points, labels = add_features(result, subject, untrained)
    print(format_features(result) + (f"\n{LEGEND}" if "matched" in result else ""))
    write_json(path, result)
    print(f"wrote {path}")
    return result, points, labels


def write_json(path, content):
    with vit.whole(path) as part, open(part, "w") as file:
        json.dump(content, file, indent=1)


def main(argv=None):
    args = parse_args(argv)
    try:
        visualize(args)
    except (ValueError, OSError) as error:
        print(f"visualize.py: error: {data.one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nvisualize.py: stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
