"""Attention measured against the truth, beside maps that understand nothing; k-NN and linear probe.

Maps are (n, m, patches): m maps for each of n images, each map summing to 1. Digit and clutter are
(n, patches): how many pixels of each patch they have. Attention is spread evenly over the pixels of
a patch. Metrics are computed for each image, then averaged; selectivity is a ratio of averages.
"""

import json
import math
import textwrap

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

import data
import vit

TEST_IMAGES = 1000
BANK_IMAGES = 10_000  # training images that k-NN and probe learn from
VALIDATION_IMAGES = VALIDATION_BANK = 512  # choose the best head, and draw the curves


@torch.no_grad()
def cls_attention(backbone, images):
    """Where [CLS] attends in the last block, and its feature; in one pass.

    `images` (B, 3, H, W), normalized. Returns maps (B, heads, patches), each summing to 1, without
    the attention that [CLS] pays to itself and to registers; and L2-normalized features (B, dim).
    """
    x = backbone.before_last_block(images)
    maps = backbone.last_attention(x, queries=1)[:, :, 0, 1 + backbone.registers :]
    return maps / maps.sum(dim=-1, keepdim=True), F.normalize(backbone.last_feature(x), dim=-1)


def patch_sums(images, patch_size):
    """Sum of (B, H, W) over each patch, row by row: (B, patches). Of a mask: its pixel count."""
    return F.avg_pool2d(images.float()[:, None], patch_size, divisor_override=1).flatten(1)


def density(maps, counts):
    """Share of the attention on a region ÷ its share of the area: (n, m); NaN without a region."""
    return maps.shape[-1] * (maps * counts[:, None]).sum(-1) / counts.sum(-1)[:, None]


def auroc(maps, digit, clutter):
    """P(a pixel of the digit gets more than one of clutter), ties ½: (n, m). NaN without either."""
    # only ranks matter: a faint contrast counts like a strong one
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
    """Whether the top patch (ties averaged) holds more digit than clutter: (n, m), 0 to 1."""
    top = maps == maps.amax(-1, keepdim=True)
    return (top & (digit > clutter)[:, None]).sum(-1) / top.sum(-1)


def jaccard60(maps, digit, patch_area):
    """Jaccard index of the digit with the patches that hold 60% of the attention: (n, m)."""
    # taken in descending order, tied ones together (DINO's comparison with masks)
    ranked = maps.sort(dim=-1, descending=True).values
    # less 1e-6: rounding must not ask for one patch more
    missing = (ranked.cumsum(-1) < 0.6 - 1e-6).sum(-1, keepdim=True)
    taken = maps >= ranked.gather(-1, missing)
    inside = (taken * digit[:, None]).sum(-1)
    return inside / (digit.sum(-1)[:, None] + patch_area * taken.sum(-1) - inside)


def best_jaccard(digit, patch_area):
    """The highest Jaccard index that any set of patches has with the digit's pixels: (n,)."""
    # of all sets of k patches the one with most digit is best, so only `patches` sets compete
    inside = digit.sort(dim=-1, descending=True).values.cumsum(-1)
    area = patch_area * torch.arange(1, digit.shape[-1] + 1, device=digit.device)
    return (inside / (digit.sum(-1, keepdim=True) + area - inside)).amax(-1)


def entropy(maps):
    """How spread out a map is, (n, m): 0 if all lies on one patch, 1 if it is uniform."""
    return torch.special.entr(maps).sum(-1) / math.log(maps.shape[-1])


def diversity(maps):
    """Mean Jensen–Shannon divergence between any two of m maps, bits, 0 to 1: (n,). NaN for one."""
    i, j = torch.triu_indices(maps.shape[1], maps.shape[1], offset=1)
    each = torch.special.entr(maps).sum(-1)
    mixed = torch.special.entr((maps[:, i] + maps[:, j]) / 2).sum(-1)  # (n, pairs)
    return (mixed - (each[:, i] + each[:, j]) / 2).mean(1) / math.log(2)


def attention_metrics(maps, digit, clutter, patch_area):
    """All metrics of single maps: {name: (n, m)}, float64, NaN without the region."""
    maps, digit, clutter = maps.double(), digit.double(), clutter.double()
    regions = {"digit": digit, "clutter": clutter, "background": patch_area - digit - clutter}
    regions["far_background"] = torch.where(digit + clutter == 0, patch_area, 0.0)
    metrics = {f"{name}_density": density(maps, counts) for name, counts in regions.items()}
    for name in ("digit", "clutter", "background"):
        metrics[f"{name}_share"] = (maps * regions[name][:, None]).sum(-1) / patch_area
    metrics["auroc"] = auroc(maps, digit, clutter)
    metrics["pointing"] = pointing(maps, digit, clutter).double()
    metrics["jaccard60"] = jaccard60(maps, digit, patch_area)
    metrics["best_jaccard"] = best_jaccard(digit, patch_area)[:, None].expand(maps.shape[:2])
    return metrics | {"entropy": entropy(maps)}


def bootstrap(values, index, resamples=1000):
    """Means over images, and the same means over resampled images: (1 + resamples, …).

    Canvases that show the same digit are not independent, so digits are resampled, with all their
    canvases. `values` (n, …), NaN left out; `index` (n,), the digit that each image shows.
    """
    digits, group = torch.unique(index, return_inverse=True)
    chance = np.full(len(digits), 1 / len(digits))
    drawn = np.random.default_rng(0).multinomial(len(digits), chance, resamples)
    weight = torch.cat([torch.ones(1, len(digits)), torch.from_numpy(drawn)]).double()
    zeros = torch.zeros(len(digits), *values.shape[1:], dtype=torch.float64)
    total = zeros.index_add(0, group, values.double().nan_to_num())
    count = zeros.index_add(0, group, (~values.isnan()).double())
    return torch.tensordot(weight, total, 1) / torch.tensordot(weight, count, 1)


def with_interval(means, values):
    """Mean and 95% interval of `values` (n,) as a cell of a table, from what `bootstrap` gave."""
    # None: nothing to average, or to resample
    value, resampled = means[0].item(), means[1:][means[1:].isfinite()]
    value, low, high = value if math.isfinite(value) else None, None, None
    if value is not None and len(resampled):
        low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": value, "low": low, "high": high, "images": int((~values.isnan()).sum())}


def observe(networks, batches, keep_maps=True):
    """What networks make of `data.evaluation_batches`, in one pass: a dict of CPU tensors.

    `maps` and `features`: for each network (n, heads, patches) and (n, dim), as `cls_attention`
    has them; `counts`: (n, patches) each, pixels of digit and clutter, and summed intensity, for
    canvases; `index` and `labels` (n,): which digit or photograph, of which class.
    Raises FloatingPointError if weights give no finite numbers.
    """
    device, patch_size, columns = networks[0].cls_token.device, networks[0].patch_size, []
    for batch in tqdm(batches, "measuring", unit="batch", leave=False, disable=None):
        images, regions = data.normalize(batch["images"].to(device)), []
        if "digit" in batch and keep_maps:
            regions = [batch["digit"], batch["clutter"], batch["images"].mean(1)]
        maps, features = zip(*(cls_attention(network, images) for network in networks))
        counts = [patch_sums(region, patch_size) for region in regions]
        columns.append([*features, *(maps if keep_maps else ()), *counts])
        columns[-1] = [x.cpu() for x in (batch["index"], batch["labels"], *columns[-1])]
    index, labels, *rest = (torch.cat(column) for column in zip(*columns))
    if not all(x.isfinite().all() for x in rest):
        raise FloatingPointError("the network's features or attention are NaN or infinite")
    n = len(networks)
    seen = {"index": index, "labels": labels, "features": rest[:n], "patch_size": patch_size}
    return seen | {"maps": rest[n : 2 * n], "counts": rest[2 * n :]}


def measure_attention(seen, resamples=1000):
    """Every metric of a network's attention to what `observe` has `seen`, and of its baselines'.

    Returns {row: {metric: {"value", "low", "high", "images"}}}. Rows: `mean` of the heads; `head_1`
    and so on; `uniform`; `ink`, the same on every patch that holds ink, nothing elsewhere;
    `brightness`, each patch's summed intensity; `shuffled`, the mean map of another image;
    `untrained`, that of the second network, the first before its training. Metrics: those of
    `attention_metrics`; selectivity, mean digit density ÷ mean clutter density over images that
    have clutter; diversity between the heads, of mean and untrained. Of photographs, which have no
    masks, entropy and diversity alone, of the networks.
    """
    heads, regions, patch_area = seen["maps"][0], seen["counts"], seen["patch_size"] ** 2
    mean, several = heads.mean(1), {"mean": heads}  # (n, patches), (n, heads, patches)
    rows = {"mean": mean} | {f"head_{h}": map_ for h, map_ in enumerate(heads.unbind(1), 1)}
    if regions:
        digit, clutter, intensity = regions
        rows |= {"uniform": torch.ones_like(mean), "ink": (digit + clutter > 0).float()}
        rows |= {"brightness": intensity + 1e-9, "shuffled": mean.roll(1, dims=0)}
    for untrained in seen["maps"][1:]:
        rows["untrained"], several["untrained"] = untrained.mean(1), untrained
    maps = torch.stack([map_ / map_.sum(-1, keepdim=True) for map_ in rows.values()], dim=1)
    values = {"entropy": entropy(maps.double())}
    if regions:  # a hundred images at a time, so that memory does not grow with n
        pieces = zip(maps.split(100), digit.split(100), clutter.split(100))
        pieces = [attention_metrics(*piece, patch_area) for piece in pieces]
        values |= {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        has_clutter = ~values["clutter_density"].isnan()
        values["selectivity"] = values["digit_density"].where(has_clutter, torch.nan)
    values["diversity"] = torch.full_like(values["entropy"], torch.nan)
    for row, each in several.items():
        values["diversity"][:, list(rows).index(row)] = diversity(each.double())
    means = bootstrap(torch.stack([*values.values()], 1), seen["index"], resamples)
    means = dict(zip(values, means.unbind(1)))
    if regions:
        means["selectivity"] = means["selectivity"] / means["clutter_density"]
    table = {row: {} for row in rows}
    for name, value in values.items():
        for row, column, resampled in zip(rows, value.T, means[name].T):
            if name != "diversity" or row in several:
                table[row][name] = with_interval(resampled, column)
    return table


def knn_classify(bank, bank_labels, queries):
    """The class that the 20 nearest of the bank (N, dim) vote for, of each query (n, dim): (n,)."""
    # all are L2-normalized; as in DINO a vote weighs exp(cosine / 0.07)
    cosine, neighbour = (queries @ bank.T).topk(min(20, len(bank)))
    votes = torch.zeros(len(queries), int(bank_labels.max()) + 1)
    votes.scatter_add_(1, bank_labels[neighbour], (cosine / 0.07).exp())
    return votes.argmax(1)


def linear_probe(bank, bank_labels, queries):
    """The class that a linear classifier, fitted to the bank, gives each query: (n,)."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return torch.from_numpy(probe.fit(bank.numpy(), bank_labels.numpy()).predict(queries.numpy()))


def mean_cosine(features):
    """Mean cosine of L2-normalized features (n, dim) of different images; 1: all point one way."""
    n, total = len(features), features.double().sum(0)
    return ((total @ total).item() - n) / (n * (n - 1))


def collapse(config, history):
    """What to say if to a network all images are alike, by the lines of its run's log; else None.

    Their features point one way, no less than before training; or with DINO's loss the teacher says
    the same of each: then the mean of its distributions has hardly more entropy, in nats, than each
    of them, be they uniform or one-hot. Nothing is said before the learning rate's ramp is over.
    """
    first, last = history[0]["validation"], history[-1]["validation"]
    one_way = last.get("mean_cosine", 0) > max(0.98, first.get("mean_cosine", 0))
    apart = last.get("entropy_of_mean", 1) - last.get("mean_entropy", 0)  # shares of ln K
    ramp = config["warmup"] * config["epochs"]
    if history[-1]["epoch"] < ramp or not (one_way or apart * math.log(config["out_dim"]) < 0.05):
        return None
    ways_out = "--centering sinkhorn_knopp, a lower --teacher-temp or "
    ways_out = f"use {ways_out if config['loss'] == 'dino' else 'a '}lower --lr"
    return f"the network has collapsed, all images look alike to it; {ways_out}"


def measure_features(bank, seen, network):
    """{"knn", "linear_probe"}: accuracy, from `bank` to `seen`, of features that `observe` gave."""
    result, points, queries = {}, bank["features"][network], seen["features"][network]
    for name, classify in (("knn", knn_classify), ("linear_probe", linear_probe)):
        correct = (classify(points, bank["labels"], queries) == seen["labels"]).double()
        result[name] = with_interval(bootstrap(correct, seen["index"]), correct)
    return result


def evaluate(name, config, history, backbone, splits):
    """All that metrics.json holds of a network; and its test features (n, dim) and labels (n,).

    Attention on the test split, the head most selective on validation canvases, and accuracy of the
    features, from training to test images. Of a run of train.py (`history`, the lines of its log,
    not None) the network before its first step, too.
    """
    epoch = history[-1]["epoch"] if history else None
    networks = [backbone, vit.untrained_backbone(config) if history else None]
    networks = [network.to(backbone.cls_token.device) for network in networks if network]
    result = {"checkpoint": name, "epoch": epoch, "fallbacks": config["fallbacks"]}
    result["settings"] = {key: value for key, value in config.items() if key != "fallbacks"}
    photos = config["dataset"] == "stl10"
    if not photos:
        images, _ = validation_images(config, splits)
        table = measure_attention(observe([backbone], images), resamples=0)
        heads = [row for row in table if row.startswith("head_")]
        result["best_head"] = max(heads, key=lambda row: table[row]["selectivity"]["value"] or 0)
    for layout in ["photographs"] if photos else ["matched", "paper"]:
        images = data.evaluation_batches(config, splits["test"], TEST_IMAGES, layout)
        seen = observe(networks, images)
        result[layout] = measure_attention(seen)
    bank = splits.get("bank", splits["train"])
    images = data.evaluation_batches(config, bank, min(BANK_IMAGES, len(bank)), "paper", "train")
    bank = observe(networks, images, keep_maps=False)
    for network, key in zip(range(len(networks)), ("features", "untrained_features")):
        result[key] = measure_features(bank, seen, network)
    result["mean_cosine"] = mean_cosine(seen["features"][0])
    result["collapse"] = collapse(config, history) if history else None
    return result, (seen["features"][0], seen["labels"])


def validation_images(config, splits):
    """Validation images and a bank of training images for k-NN, the same for every run."""
    bank = splits.get("bank", splits["train"])
    images = splits["validation"], VALIDATION_IMAGES, "matched", "validation"
    bank = data.evaluation_batches(config, bank, VALIDATION_BANK, "matched", "train")
    return data.evaluation_batches(config, *images), bank


def validate(seen, bank):
    """{"images", "knn", "mean_cosine", row: {metric: value}} of `observe`d `validation_images`."""
    table = measure_attention(seen, resamples=0)
    features = seen["features"][0]
    correct = knn_classify(bank["features"][0], bank["labels"], features) == seen["labels"]
    result = {"images": len(correct), "knn": correct.double().mean().item()}
    result["mean_cosine"] = mean_cosine(features)
    shown = ("selectivity", "auroc", "pointing", "entropy", "diversity")
    for row, cells in table.items():
        result[row] = {name: cells[name]["value"] for name in shown if name in cells}
    return result


def format_cell(cell, interval=True):
    """A metric as text, such as "1.91 [1.85, 1.97]"."""
    if cell is None or cell["value"] is None:
        return "–"
    text = f"{cell['value']:.2f}"
    if interval and cell["low"] is not None:
        text += f" [{cell['low']:.2f}, {cell['high']:.2f}]"
    return text


def format_table(rows):
    """Lines of at most 100 columns from {title: {metric: cell}}, for one network or several."""
    titles = ["", "selectivity", "auroc", "pointing", "digit", "clutter", "far", "entropy"]
    names = ["pointing", "digit_density", "clutter_density", "far_background_density", "entropy"]
    lines = [titles]
    for title, cells in rows.items():
        wide = [format_cell(cells.get(name)) for name in titles[1:3]]
        lines.append([title, *wide, *(format_cell(cells.get(name), False) for name in names)])
    widths = (18, 18, 18, 9, 9, 9, 9, 0)
    return ["".join(f"{t:{w}}" for t, w in zip(line, widths)).rstrip() for line in lines]


def is_above(table, row, reference):
    """Whether a row's selectivity is above another's, their intervals apart as they are printed."""
    low, high = table[row]["selectivity"]["low"], table[reference]["selectivity"]["high"]
    return low is not None and high is not None and round(low, 2) > round(high, 2)


def verdict(result):
    """What the table comes to, in a sentence or two."""
    if result["collapse"]:
        return f"No: {result['collapse']}."
    table, best = result["matched"], result["best_head"]
    mean, bright = table["mean"], table["brightness"]
    value, density = mean["selectivity"]["value"], mean["digit_density"]
    if value is None:
        return "Cannot be told: no canvas has both digit and clutter."
    text = f"attention is {value:.2f} times as dense on the digit as on the clutter"
    brightness = f"brightness alone earns {bright['selectivity']['value']:.2f}"
    found = {row: all(is_above(table, row, r) for r in ("brightness", "shuffled")) for row in table}
    if density["high"] < 1:
        text = f"No, it looks past the ink: on the digit it is {density['value']:.2f} times uniform"
    elif found["mean"]:
        text = f"Yes: {text}; {brightness}"
        if mean["auroc"]["low"] <= bright["auroc"]["high"]:
            ranks = f"{mean['auroc']['value']:.2f}, {bright['auroc']['value']:.2f}"
            text += f". By auroc, ranks alone, it is not above brightness ({ranks})"
    elif mean["selectivity"]["high"] < 1:
        text = f"No, it prefers the clutter: {text}"
    elif is_above(table, "mean", "shuffled"):
        text = f"Not more than brightness explains: {text}; {brightness}"
    else:
        text = f"No: {text}, which position alone may earn"
    if found[best] and not text.startswith("Yes"):
        selectivity = format_cell(table[best]["selectivity"])
        text += f". But {best.replace('_', ' ')}, by itself, does: {selectivity}"
    return text + "."


def describe(c, epoch=None):
    """A line: what was trained how, on what, and how far; `c` are the settings."""
    what = "random weights" if c["weights"] == "none" else f"weights {c['weights']}"
    if "loss" in c:
        crops = f"{c['crops']} crop{'s' * (c['crops'] > 1)}"
        what = f"{c['loss'].upper()} loss, {c['views']} views, {crops}"
    names = {"mnist": "MNIST", "sklearn": "scikit-learn's digits", "auto": "digits"}
    images = "STL-10" if c["dataset"] == "stl10" else names[c["digits"]]
    images += "" if c["background"] == "black" else f", background {c['background']}"
    images += f", {c['texture_pool']} in all" if c["texture_pool"] else ""
    progress = "" if epoch is None else f", epoch {epoch} of {c['epochs']}"
    return f"{what}, {c['image_size']} px, patch {c['patch_size']}, {images}{progress}"


def report(results, path):
    """The answer and the rows that matter of results of `evaluate`; all goes to the file `path`."""
    with open(path, "w") as file:
        json.dump(results if len(results) > 1 else results[0], file, indent=1)
    lines, rows = [], {}
    for number, result in enumerate(results, 1):
        own, best = f"[{number}] " if len(results) > 1 else "", result.get("best_head")
        about = describe(result["settings"], result["epoch"])
        lines += textwrap.wrap(f"{own}{result['checkpoint']}: {about}", 100)
        table = result["matched" if best else "photographs"]
        answer = "These are photographs, of which there are no masks to measure attention against."
        answer += f" And {result['collapse']}." if result["collapse"] else ""
        if best:
            answer = "Does it look at the digit, rather than at all that is white? "
            answer += verdict(result)
        lines += textwrap.wrap(answer, 100)
        for name in ("features", "untrained_features"):
            if name in result:
                knn, probe = (100 * cell["value"] for cell in result[name].values())
                what = name.replace("_", " ")
                lines.append(f"accuracy of {what}: k-NN {knn:.1f}%, linear probe {probe:.1f}%")
        baselines = ["brightness"] if own else ["brightness", "shuffled", "untrained"]
        heads = [row for row in table if row.startswith("head_") and (row == best or not own)]
        for row in ["mean", *heads, *(row for row in baselines if row in table)]:
            rows[own + row.replace("_", " ") + " (best)" * (row == best)] = table[row]
    compared = "dataset image_size patch_size canvas_size num_distractors background digits"
    settings = [result["settings"] for result in results]
    differ = [n for n in compared.split() if len({str(each.get(n)) for each in settings}) > 1]
    if differ:
        lines.append(f"They differ in {', '.join(differ)}: each is measured at its own.")
    n = table["mean"]["entropy"]["images"]
    lines += ["", f"attention to {n:,} test images, of canvases layout matched [95% interval]"]
    lines.append(f"{'':63}density on")
    lines += [*format_table(rows), "", f"all metrics: {path}; what each means: README.md"]
    return "\n".join(lines)
