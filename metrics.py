"""Attention measured against the truth, beside maps that understand nothing; k-NN and linear probe.

Maps are (n, patches), one for each of n images, summing to 1. Digit and clutter are (n, patches):
how many pixels of each patch they have. Attention is spread evenly over the pixels of a patch.
Metrics are computed for each image, then averaged; selectivity is a ratio of averages.
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
    """Where [CLS] attends in the last block, (B, heads, patches), and its unit feature (B, dim)."""
    x = backbone.before_last_block(images)  # (B, 3, H, W), normalized
    maps = without_cls(backbone.last_attention(x, queries=1)[:, :, 0], backbone)
    return maps, F.normalize(backbone.last_feature(x), dim=-1)


def without_cls(attention, backbone):
    """Attention to [CLS], registers and patches, (…, N), to that to patches, summing to 1."""
    maps = attention[..., 1 + backbone.registers :]
    return maps / maps.sum(dim=-1, keepdim=True)


def patch_sums(images, patch_size):
    """Sum of (…, H, W) over each patch, row by row: (…, patches). Of a mask: its pixels."""
    return F.avg_pool2d(images.float(), patch_size, divisor_override=1).flatten(-2)


def entropy(maps):
    """How spread out maps (…, patches) are: (…), 0 if all lies on one patch, 1 if uniform."""
    return torch.special.entr(maps).sum(-1) / math.log(maps.shape[-1])


def diversity(maps):
    """Mean Jensen–Shannon divergence of any two of maps (n, heads, patches), 0 to 1 bit: (n,)."""
    i, j = torch.triu_indices(maps.shape[1], maps.shape[1], offset=1)  # none for one head: NaN
    each, mixed = entropy(maps), entropy((maps[:, i] + maps[:, j]) / 2)  # mixed: (n, pairs)
    return (mixed - (each[:, i] + each[:, j]) / 2).mean(1) * math.log2(maps.shape[-1])


def attention_metrics(maps, digit, clutter, patch_area):
    """Metrics of maps (n, patches) against the masks: {name: (n,)}, NaN without the region.

    Density: share of the attention ÷ share of the area. `auroc`: P(a pixel of the digit gets more
    than one of clutter), ties ½. `pointing`: whether the top patch (ties averaged) holds more digit
    than clutter. `jaccard60`: Jaccard index of the digit with the patches that hold 60% of the
    attention (DINO's measure). `best_jaccard`: the highest that any set of patches has.
    """
    maps, digit, clutter = maps.double(), digit.double(), clutter.double()
    regions = {"digit": digit, "clutter": clutter, "background": patch_area - digit - clutter}
    regions["far_background"] = torch.where(digit + clutter == 0, patch_area, 0.0)
    metrics = {}
    for name, counts in regions.items():
        metrics[f"{name}_density"] = (maps * counts).sum(-1) / counts.mean(-1)
    # selectivity is its mean ÷ that of clutter_density; images without clutter do not count
    metrics["selectivity"] = metrics["digit_density"].where(clutter.sum(-1) > 0, torch.nan)

    # of each patch the clutter pixels with less attention, and those with no more
    ranked, order = maps.sort(dim=-1)
    lowest = F.pad(clutter.gather(-1, order).cumsum(-1), (1, 0))  # in the k lowest patches
    less = lowest.gather(-1, torch.searchsorted(ranked, maps))
    no_more = lowest.gather(-1, torch.searchsorted(ranked, maps, right=True))
    wins = (digit * (less + no_more) / 2).sum(-1)
    metrics["auroc"] = wins / (digit.sum(-1) * clutter.sum(-1))

    top = maps == ranked[:, -1:]
    metrics["pointing"] = (top & (digit > clutter)).sum(-1) / top.sum(-1)

    # taken in descending order, tied ones together; less 1e-6: rounding must not ask for one more
    ranked = ranked.flip(-1)
    missing = (ranked.cumsum(-1) < 0.6 - 1e-6).sum(-1, keepdim=True)
    taken = maps >= ranked.gather(-1, missing)
    inside, area = (taken * digit).sum(-1), patch_area * taken.sum(-1)
    metrics["jaccard60"] = inside / (digit.sum(-1) + area - inside)
    # of all sets of k patches the one with most digit is best, so only `patches` sets compete
    inside = digit.sort(dim=-1, descending=True).values.cumsum(-1)
    area = patch_area * torch.arange(1, digit.shape[-1] + 1)
    metrics["best_jaccard"] = (inside / (digit.sum(-1, keepdim=True) + area - inside)).amax(-1)
    return metrics


def spearman(a, b, among):
    """Rank correlation of a and b (…, k) over the entries `among` (…, k): (…), −1 to 1.

    Ties share their mean rank. 0 if either is constant; NaN for fewer than two entries.
    """
    x = torch.stack([a, b]).masked_fill(~among, torch.inf)
    ranked = x.sort(dim=-1).values
    rank = (torch.searchsorted(ranked, x) + torch.searchsorted(ranked, x, right=True)).double()
    mean = (rank * among).sum(-1, keepdim=True) / among.sum(-1, keepdim=True)
    rho = F.cosine_similarity(*((rank - mean) * among), dim=-1)
    return rho.where(among.sum(-1) > 1, torch.nan)


def faithfulness(maps, effects):
    """Whether maps (n, patches) point to what matters, by `observe_effects`: {name: (n,)}.

    Rank correlations, over an image's inky patches with the effect of blackening, and over its
    distractors, of the mass on their ink with the effect of leaving them out.
    """
    half = (effects["moved"].shape[1] + 1) // 2  # distractors come behind pieces of the digit
    own, moved = effects["own"][:, half:], effects["moved"][:, half:]
    # (n, distractors); summed in float64, so that equal masses are equal in float32
    mass = (maps.double()[:, None] * own).sum(-1).float()
    result = {"patch_faithfulness": spearman(maps, effects["effect"], effects["ink"])}
    return result | {"object_faithfulness": spearman(mass, moved, own.sum(-1) > 0)}


def resample(index, resamples=1000):
    """How often each image counts, first once, then in each resample: (1 + resamples, n).

    Canvases that show the same digit, `index` (n,), are not independent, so digits are resampled.
    """
    digits, group = torch.unique(index, return_inverse=True)
    chance = np.full(len(digits), 1 / len(digits))
    drawn = np.random.default_rng(0).multinomial(len(digits), chance, resamples)
    return torch.cat([torch.ones(1, len(digits)), torch.from_numpy(drawn)]).double()[:, group]


def weighted_means(values, weights):
    """Means of `values` of the first images, NaN left out, by `resample`: (1 + resamples, …)."""
    weights = weights[:, : len(values)]
    return weights @ values.double().nan_to_num() / (weights @ (~values.isnan()).double())


def with_interval(means, values):
    """Mean and 95% interval as a cell of a table, of `values` (n,) that have `weighted_means`."""
    resampled = means[1:][means[1:].isfinite()]
    low, high = np.percentile(resampled, [2.5, 97.5]) if len(resampled) else (math.nan, math.nan)
    cell = {"value": float(means[0]), "low": float(low), "high": float(high)}
    cell = {key: x if math.isfinite(x) else None for key, x in cell.items()}  # JSON has no NaN
    return cell | {"images": int((~values.isnan()).sum())}


@torch.no_grad()
def observe(networks, batches, maps=True, rollout=False):
    """What {name: network} make of `data.evaluation_batches`, in one pass: a dict of CPU tensors.

    ("features", name) and ("maps", name), as of `cls_attention`; of canvases, by patch, pixels of
    `digit` and `clutter` and summed `intensity` (n, patches); of the network "trained", if asked,
    the map `rollout` (n, patches), and of photographs `token_effects` of mean map and rollout;
    `index`, `labels` (n,). Raises FloatingPointError if weights give no finite numbers.
    """
    trained, rng, rows = networks["trained"], torch.Generator().manual_seed(0), []
    for batch in tqdm(batches, "measuring", unit="batch", leave=False, disable=None):
        row = {key: batch[key] for key in ("index", "labels")}
        images = data.normalize(batch["images"].to(trained.cls_token.device))
        for name, network in networks.items():
            heads, row["features", name] = cls_attention(network, images)
            row |= {("maps", name): heads} if maps else {}
        if maps and "digit" in batch:
            shown = batch | {"intensity": batch["images"].mean(1)}
            for key in ("digit", "clutter", "intensity"):
                row[key] = patch_sums(shown[key], trained.patch_size)
        if rollout:
            row["rollout"] = without_cls(trained.rollout(images), trained)
        if rollout and "digit" not in batch:
            pointers = [row["maps", "trained"].mean(1), row["rollout"]]
            row["token_effects"] = token_effects(trained, images, pointers, rng)
        rows.append({key: x.cpu() for key, x in row.items()})
    seen = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    if not all(x.isfinite().all() for x in seen.values()):
        raise FloatingPointError("the network's features or attention are NaN or infinite")
    return seen | {"patch_area": trained.patch_size**2}


@torch.no_grad()
def observe_effects(backbone, batches):
    """What the feature depends on: exact changes to canvases and to attention, and their effects.

    `batches` are of `data.evaluation_batches` with `parts`. A dict of CPU tensors: `effect` (n,
    patches) of blackening each patch with `ink` (n, patches); `moved` (n, K), √(2 − 2 cos), of
    leaving out a part, the digit's pieces first; a part's ink by patch, `own` (n, K, patches), and
    in all on the canvas, `own_ink` (n, K). Features (n, dim): the true ones, `features`, and when
    [CLS] attends in the last block to all patches alike, `even`, or as in another image, `swapped`.
    """
    rows, size = [], backbone.patch_size
    for batch in tqdm(batches, "leaving out", unit="batch", leave=False, disable=None):
        row = {key: batch[key] for key in ("index", "labels", "own_ink")}
        x = backbone.before_last_block(data.normalize(batch["images"]))
        attention = backbone.last_attention(x, queries=1)
        even, first = attention.clone(), 1 + backbone.registers
        even[..., first:] = attention[..., first:].mean(-1, keepdim=True)
        for key, each in (("features", None), ("even", even), ("swapped", attention.roll(1, 0))):
            row[key] = F.normalize(backbone.last_feature(x, each), dim=-1)
        row["ink"] = patch_sums(batch["digit"] | batch["clutter"], size) > 0
        row["effect"] = blackening_effects(backbone, batch["images"], row["ink"], row["features"])
        without = [moved(backbone, x, row["features"]) for x in batch["without"].unbind(1)]
        row |= {"moved": torch.stack(without, 1), "own": patch_sums(batch["own"], size)}
        rows.append({key: x.cpu() for key, x in row.items()})
    return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}


def moved(backbone, images, features):
    """√(2 − 2 cos) of features (B, dim) and those of images (B, 1 or 3, H, W): (B,), 0 to 2."""
    return (F.normalize(backbone(data.normalize(images)), dim=-1) - features).norm(dim=-1)


@torch.no_grad()
def blackening_effects(backbone, images, ink, features):
    """Effect, 1 − cos, of blackening each patch with `ink` (B, patches): (B, patches), else 0.

    `images` (B, 1 or 3, H, W) in [0, 1]; `features` (B, dim), L2-normalized, are theirs.
    """
    effect, size = torch.zeros(ink.shape, device=images.device), backbone.patch_size
    patches = torch.arange(ink.shape[1], device=images.device).view(-1, images.shape[3] // size)
    patches = patches.repeat_interleave(size, 0).repeat_interleave(size, 1)  # of each pixel (H, W)
    for which in ink.nonzero().split(100):  # of some 1,500 for 100 canvases
        image, patch = which.unbind(1)
        black = images[image].masked_fill(patches == patch.view(-1, 1, 1, 1), 0)
        effect[image, patch] = moved(backbone, black, features[image]) ** 2 / 2
    return effect


@torch.no_grad()
def token_effects(backbone, images, maps, rng, draws=1):
    """Effect, 1 − cos, of leaving out a fifth of the patches: (n, maps + draws).

    That to which each of `maps`, (n, patches), gives most; then random ones. They are left out as
    tokens: a ViT needs no paint over them, whose color would matter. `images` are normalized.
    """
    features, n = F.normalize(backbone(images), dim=-1), maps[0].shape[-1]
    drawn = torch.rand(draws, len(images), n, generator=rng).to(images.device)
    keep = torch.stack([*maps, *drawn]).argsort(dim=-1)[..., : n - n // 5]  # (maps + draws, n, …)
    without = []
    for some in keep.split(max(1, 20 // len(images))):  # of few images several at a time
        found = backbone(images.repeat(len(some), 1, 1, 1), some.flatten(0, 1))
        without.append(F.normalize(found, dim=-1).unflatten(0, some.shape[:2]))
    return 1 - (torch.cat(without) * features).sum(-1).T


def measure_attention(seen, effects=None, resamples=1000):
    """Every metric of a network's attention to what `observe` has `seen`, and of its baselines'.

    `effects`: what `observe_effects` says of the first of these canvases.
    Returns {row: {metric: {"value", "low", "high", "images"}}}. Rows: `mean` of the heads; `head_1`
    and so on; `rollout`; `brightness`, summed intensity; `ink`, alike on all patches with some;
    `oracle`, the digit's pixels; `shuffled`, the mean map of another image; `uniform`; the mean map
    of each other network. Metrics: entropy; of networks diversity; of canvases those of
    `attention_metrics` (selectivity is mean digit density ÷ mean clutter density, of canvases with
    clutter) and `faithfulness`, its difference to brightness on the same images, and of_oracle,
    ln(selectivity) ÷ that of the oracle.
    """
    networks = {key[1]: heads for key, heads in seen.items() if key[0] == "maps"}
    networks = {"mean": networks.pop("trained")} | networks  # (n, heads, patches) each
    mean, heads = networks["mean"].mean(1), enumerate(networks["mean"].unbind(1), 1)
    rows = {"mean": mean} | {f"head_{number}": maps for number, maps in heads}
    rows |= {"rollout": seen["rollout"]} if "rollout" in seen else {}
    if "digit" in seen:
        ink = (seen["digit"] + seen["clutter"] > 0).float()
        rows |= {"brightness": seen["intensity"] + 1e-9, "ink": ink, "oracle": seen["digit"] + 1e-9}
        rows |= {"shuffled": mean.roll(1, 0), "uniform": torch.ones_like(ink)}
    rows |= {name: heads.mean(1) for name, heads in networks.items()}
    table, logs, rhos, weights = {}, {}, {}, resample(seen["index"], resamples)
    for row, maps in rows.items():
        maps = maps / maps.sum(-1, keepdim=True)
        values = {"entropy": entropy(maps.double())}
        if "digit" in seen:
            values |= attention_metrics(maps, seen["digit"], seen["clutter"], seen["patch_area"])
        if effects:
            values |= faithfulness(maps[: len(effects["index"])], effects)
        if row in networks:
            values["diversity"] = diversity(networks[row].double())
        means = {name: weighted_means(value, weights) for name, value in values.items()}
        if "digit" in seen:
            means["selectivity"] = means["selectivity"] / means["clutter_density"]
            logs[row] = means["selectivity"].log()
        if effects:
            rhos[row] = means["patch_faithfulness"]
        table[row] = {name: with_interval(means[name], value) for name, value in values.items()}
    for row, log in logs.items():  # of the same images in every row
        table[row]["of_oracle"] = with_interval(log / logs["oracle"], values["selectivity"])
    for row, rho in rhos.items():
        less = with_interval(rho - rhos["brightness"], values["patch_faithfulness"])
        table[row]["patch_faithfulness_less_brightness"] = less
    return table


def knn_classify(bank, bank_labels, queries):
    """The class that the 20 nearest of the bank (N, dim) vote for, of each query (n, dim): (n,)."""
    cosine, neighbour = (queries @ bank.T).topk(min(20, len(bank)))
    votes = torch.zeros(len(queries), int(bank_labels.max()) + 1)
    votes.scatter_add_(1, bank_labels[neighbour], (cosine / 0.07).exp())  # DINO's weights
    return votes.argmax(1)


def linear_probe(bank, bank_labels, queries):
    """The class that a linear classifier, fitted to the bank, gives each query: (n,).

    NaN if the bank has one class, which cannot be told from others.
    """
    if len(bank_labels.unique()) < 2:
        return torch.full((len(queries),), torch.nan)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return torch.from_numpy(probe.fit(bank.numpy(), bank_labels.numpy()).predict(queries.numpy()))


def accuracy(bank, features, seen, network="trained", classify=knn_classify):
    """Of classifying features (n, dim) of `seen` images by those of a `bank`, both `observe`d."""
    found = classify(bank["features", network], bank["labels"], features)
    correct = (found == seen["labels"]).double().where(~found.isnan(), torch.nan)
    return with_interval(weighted_means(correct, resample(seen["index"])), correct)


def mean_cosine(features):
    """Mean cosine of L2-normalized features (n, dim) of different images; 1: all point one way."""
    n, total = len(features), features.double().sum(0)
    return ((total @ total).item() - n) / max(1, n * (n - 1))


def measure_effects(effects, bank):
    """What `observe_effects` says of a network as a whole; `bank` is of `observe`.

    `causal_selectivity`: how far the feature moves for an ink pixel left out of the digit's pieces
    ÷ for one of the distractors. `attention_matters`: with the true attention in the last block or
    another, the feature's cosine with the true one and accuracy; and that cosine of two canvases.
    """
    distance, weights = effects["moved"] / effects["own_ink"], resample(effects["index"])
    half = (distance.shape[1] + 1) // 2
    pieces, distractors = distance[:, :half].mean(1), distance[:, half:].mean(1)
    ratio = weighted_means(pieces, weights) / weighted_means(distractors, weights)
    matters = {"two_canvases": mean_cosine(effects["features"])}
    for name in ("features", "even", "swapped"):
        cosine = (effects[name] * effects["features"]).sum(-1)
        matters[name] = {"cosine": with_interval(weighted_means(cosine, weights), cosine)}
        matters[name]["knn"] = accuracy(bank, effects[name], effects)
    return {"causal_selectivity": with_interval(ratio, pieces), "attention_matters": matters}


def collapse(config, history):
    """What to say if to a network all images are alike, by the lines of its run's log; else None.

    Features point one way, no less than before training; or the mean of a DINO teacher's
    distributions has hardly more entropy than each. Nothing is said while the learning rate rises.
    """
    first, last = history[0]["validation"], history[-1]["validation"]
    one_way = last.get("mean_cosine", 0) > max(0.98, first.get("mean_cosine", 0))
    apart = last.get("entropy_of_mean", 1) - last.get("mean_entropy", 0)  # of ln K
    ramp = config["warmup"] * config["epochs"]
    if history[-1]["epoch"] < ramp or not (one_way or apart * math.log(config["out_dim"]) < 0.05):
        return None
    dino = "--centering sinkhorn_knopp, a lower --teacher-temp or"
    use = f"use {dino if config['loss'] == 'dino' else 'a'} lower --lr"
    return f"the network has collapsed, all images look alike to it; {use}"


def evaluate(name, config, history, backbone, splits, other=None):
    """All that metrics.json holds of a network; and its test features (n, dim) and labels (n,).

    Beside it stand, of a run of train.py (`history`, the lines of its log, not None), the network
    before its first step, and an `other` network. The best head is chosen on validation canvases.
    """
    result = {"checkpoint": name, "epoch": None, "collapse": None, "settings": dict(config)}
    result["fallbacks"] = result["settings"].pop("fallbacks")
    untrained, effects = None, None
    if history:
        result |= {"epoch": history[-1]["epoch"], "collapse": collapse(config, history)}
        untrained = vit.untrained_backbone(config)
    networks = {"trained": backbone, "untrained": untrained, "other_network": other}
    networks = {key: x.to(backbone.cls_token.device) for key, x in networks.items() if x}
    if config["dataset"] != "stl10":
        images, _ = validation_images(config, splits)
        table = measure_attention(observe({"trained": backbone}, images), resamples=0)
        heads = [row for row in table if row.startswith("head_")]
        result["best_head"] = max(heads, key=lambda row: table[row]["selectivity"]["value"] or 0)
        n = effect_images(backbone, config["image_size"])
        images = data.evaluation_batches(config, splits["test"], n, parts=True)
        effects = observe_effects(backbone, images)
    for layout in ["matched", "paper"] if effects else ["photographs"]:
        images = data.evaluation_batches(config, splits["test"], TEST_IMAGES, layout)
        seen = observe(networks, images, rollout=True)
        result[layout] = measure_attention(seen, effects if layout == "matched" else None)
    bank = splits.get("bank", splits["train"])
    images = data.evaluation_batches(config, bank, min(BANK_IMAGES, len(bank)), "paper", "train")
    networks.pop("other_network", None)
    bank = observe(networks, images, maps=False)
    for network, key in zip(networks, ("features", "untrained_features")):
        queries = seen["features", network]
        result[key] = {"knn": accuracy(bank, queries, seen, network)}
        result[key]["linear_probe"] = accuracy(bank, queries, seen, network, linear_probe)
    if effects:
        result |= measure_effects(effects, bank)
    else:
        effects = seen["token_effects"]  # (n, 3): of mean map, rollout and chance
        means = weighted_means(effects, resample(seen["index"])).T
        mean, rollout = (with_interval(each / means[2], effects[:, 0]) for each in means[:2])
        result["token_effect"] = {"mean": mean, "rollout": rollout}
    features = seen["features", "trained"]
    return result | {"mean_cosine": mean_cosine(features)}, (features, seen["labels"])


def effect_images(backbone, image_size):
    """How many canvases to try changes on: each takes a forward pass for every inky patch."""
    patches = (image_size // backbone.patch_size) ** 2
    work = backbone.depth * (backbone.dim * patches) ** 2
    # 1,000 for the laptop preset; for ViT-S/8 at 224 px some 180 on a GPU, 20 on a CPU
    affordable = 2e14 if backbone.cls_token.is_cuda else 3e11
    return int(min(TEST_IMAGES, max(20, affordable / work)))


def validation_images(config, splits):
    """Validation images, the same for every run, and a bank of training images for k-NN."""
    bank, held_out = splits.get("bank", splits["train"]), splits["validation"]
    images = data.evaluation_batches(config, held_out, VALIDATION_IMAGES, name="validation")
    return images, data.evaluation_batches(config, bank, VALIDATION_BANK, name="train")


def validate(seen, bank, effects=None):
    """{"images", "knn", "mean_cosine", row: {metric: value}} of `observe`d `validation_images`."""
    features = seen["features", "trained"]
    result = {"images": len(features), "knn": accuracy(bank, features, seen)["value"]}
    result["mean_cosine"] = mean_cosine(features)
    shown = ("selectivity", "auroc", "pointing", "entropy", "diversity", "patch_faithfulness")
    for row, cells in measure_attention(seen, effects, resamples=0).items():
        result[row] = {name: cells[name]["value"] for name in shown if name in cells}
    return result


def format_cell(cell, interval=True):
    """A metric as text, such as "1.91 [1.85, 1.97]"."""
    if cell is None or cell["value"] is None:
        return "–"
    interval = interval and cell["low"] is not None
    return ("{value:.2f} [{low:.2f}, {high:.2f}]" if interval else "{value:.2f}").format(**cell)


def is_above(table, row, reference, metric="selectivity"):
    """Whether a row's metric is above another's, their intervals apart as they are printed."""
    low, high = table[row][metric]["low"], table[reference][metric]["high"]
    return low is not None and high is not None and round(low, 2) > round(high, 2)


def verdict(result):
    """What the table comes to, in a sentence or two."""
    if "matched" not in result:
        said = f" But {result['collapse']}." if result["collapse"] else ""
        return f"These are photographs: no masks to measure attention against.{said}"
    question = "Does it look at the digit, rather than at all that is white?"
    table, best = result["matched"], result["best_head"]
    mean, density = table["mean"]["selectivity"], table["mean"]["digit_density"]
    if result["collapse"]:
        return f"{question} No: {result['collapse']}."
    if mean["value"] is None:
        return f"{question} Cannot be told: no canvas has both digit and clutter."
    above = {row: all(is_above(table, row, r) for r in ("brightness", "shuffled")) for row in table}
    if density["high"] < 1:
        answer = f"No, it looks past the ink (on the digit {density['value']:.2f} times uniform)"
    elif above["mean"]:
        answer = "Yes"
    elif mean["high"] < 1:
        answer = "No, it prefers the clutter"
    else:
        why = "brightness" if is_above(table, "mean", "shuffled") else "position"
        answer = f"Not more than {why} explains"
    text = f"""{question} {answer}: attention is {mean["value"]:.2f} times as dense on the digit as
    on the clutter; brightness alone earns {table["brightness"]["selectivity"]["value"]:.2f}."""
    if answer == "Yes" and not is_above(table, "mean", "brightness", "auroc"):
        text += " By auroc, ranks alone, it is not above brightness."
    if answer != "Yes" and above[best]:
        selectivity = format_cell(table[best]["selectivity"])
        text += f" But {best.replace('_', ' ')}, by itself, does: {selectivity}."
    return text


def explanation(result):
    """Whether the feature depends on what attention points to, in a few sentences."""
    if "matched" not in result:
        mean, rollout = (format_cell(cell) for cell in result["token_effect"].values())
        return f"""Left out, the fifth of the patches with most attention changes the feature {mean}
        times as much as a random fifth; by rollout {rollout}."""
    table, matters, metric = result["matched"], result["attention_matters"], "patch_faithfulness"
    less, even = table["mean"][f"{metric}_less_brightness"], matters["even"]
    better, worse = (less["low"] or 0) > 0, (less["high"] or 0) < 0
    mean, bright, rollout = (table[row][metric] for row in ("mean", "brightness", "rollout"))
    return f"""Does it point to what the feature depends on?
    {"Better than" if better else "Less than" if worse else "No better than"} brightness: within an
    image, attention to a patch and the effect of blackening it have the rank correlation
    {format_cell(mean)}, brightness {format_cell(bright)}, rollout {format_cell(rollout)}
    ({mean["images"]:,} canvases). Left out, an ink pixel of the digit moves the feature
    {format_cell(result["causal_selectivity"])} times as far as one of a distractor. With even
    attention in the last block the feature's cosine with its true self is
    {even["cosine"]["value"]:.2f} (two canvases: {matters["two_canvases"]:.2f}), and k-NN accuracy
    {even["knn"]["value"]:.1%}."""


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
    """The answers and rows that matter of results of `evaluate`; all goes to the file `path`."""
    with open(path, "w") as file:
        json.dump(results if len(results) > 1 else results[0], file, indent=1)
    metrics = ["selectivity", "of_oracle", "auroc", "patch_faithfulness", "object_faithfulness"]
    metrics += ["digit_density", "clutter_density", "far_background_density"]
    titles = ["", "selectivity", "oracle", "auroc", "patches", "objects", "digit", "clutter", "far"]
    columns = "{:18}{:18}{:8}{:7}{:21}{:8}{:7}{:8}{}"
    lines, rows = [], [columns.format(*titles)]
    for number, result in enumerate(results, 1):
        own, best = f"[{number}] " if len(results) > 1 else "", result.get("best_head")
        about = f"{own}{result['checkpoint']}: {describe(result['settings'], result['epoch'])}"
        for text in (about, verdict(result), explanation(result)):
            lines += textwrap.wrap(" ".join(text.split()), 100)
        for name in [key for key in result if key.endswith("features")]:
            values = [cell["value"] for cell in result[name].values()]
            knn, probe = ("–" if value is None else f"{value:.1%}" for value in values)
            what = name.replace("_", " ")
            lines.append(f"accuracy of {what}: k-NN {knn}, linear probe {probe}")
        table = result["matched" if best else "photographs"]
        chief = ("mean", best, "rollout", "brightness", "other_network") if own else table
        for row in [row for row in table if row in chief and row not in ("uniform", "oracle")]:
            title = own + row.replace("_", " ") + " (best)" * (row == best)
            wide = ("selectivity", "patch_faithfulness")
            shown = [format_cell(table[row].get(name), name in wide) for name in metrics]
            rows.append(columns.format(title, *shown).rstrip())
    compared = "dataset image_size patch_size canvas_size num_distractors background digits"
    differ = [n for n in compared.split() if len({str(r["settings"].get(n)) for r in results}) > 1]
    if differ:
        lines.append(f"They differ in {', '.join(differ)}: each is measured at its own.")
    n = table["mean"]["entropy"]["images"]
    lines += ["", f"attention to {n:,} test images, of canvases layout matched [95% interval]"]
    lines += [f"{'':36}of{'':13}faithfulness, by{'':13}density on", *rows]
    return "\n".join([*lines, "", f"all metrics: {path}; what each means: README.md"])
