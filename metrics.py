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
    maps = without_cls(backbone.last_attention(x, queries=1)[:, :, 0], backbone)
    return maps, F.normalize(backbone.last_feature(x), dim=-1)


def without_cls(attention, backbone):
    """Attention to all tokens (…, N) to that to patches alone: (…, patches), summing to 1."""
    maps = attention[..., 1 + backbone.registers :]
    return maps / maps.sum(dim=-1, keepdim=True)


def spearman(a, b, among):
    """Rank correlation of a and b (…, k) over the entries `among` (…, k): (…), −1 to 1.

    Ties share their mean rank. 0 if either is constant, for then it says nothing; NaN for fewer
    than two entries.
    """
    centred = []
    for x in (a, b):
        x = x.masked_fill(~among, torch.inf).contiguous()
        ranked = x.sort(dim=-1).values
        rank = (torch.searchsorted(ranked, x) + torch.searchsorted(ranked, x, right=True)).double()
        mean = (rank * among).sum(-1, keepdim=True) / among.sum(-1, keepdim=True)
        centred.append((rank - mean) * among)
    a, b = centred
    rho = (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt().clamp(min=1e-9)
    return rho.where(among.sum(-1) > 1, torch.nan)


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


def summary(values, index, base=None):
    """The cell of the mean of `values` (n,), or of its ratio to the mean of `base` (n,)."""
    means = bootstrap(torch.stack([values, values if base is None else base], 1), index)
    return with_interval(means[:, 0] if base is None else means[:, 0] / means[:, 1], values)


@torch.no_grad()
def observe(networks, batches, maps=True, rollout=False):
    """What {name: network} make of `data.evaluation_batches`, in one pass: a dict of CPU tensors.

    ("features", name) (n, dim) and ("maps", name) (n, heads, patches), as of `cls_attention`; of
    canvases `digit`, `clutter`, `intensity` (n, patches), pixels of either and summed intensity; of
    the network "trained", if asked, `rollout` (n, patches), a map too, and of photographs
    `token_effects` of mean map and rollout; `index`, `labels` (n,): which image, of which class.
    Raises FloatingPointError if weights give no finite numbers.
    """
    trained, rng, rows = networks["trained"], torch.Generator().manual_seed(0), []
    for batch in tqdm(batches, "measuring", unit="batch", leave=False, disable=None):
        row = {key: batch[key] for key in ("index", "labels")}
        images = data.normalize(batch["images"].to(trained.cls_token.device))
        for key, network in networks.items():
            heads, row["features", key] = cls_attention(network, images)
            row |= {("maps", key): heads} if maps else {}
        if maps and "digit" in batch:
            regions = {key: batch[key] for key in ("digit", "clutter")}
            regions["intensity"] = batch["images"].mean(1)
            row |= {key: patch_sums(x, trained.patch_size) for key, x in regions.items()}
        if rollout:
            row["rollout"] = without_cls(trained.rollout(images), trained)
        if rollout and "digit" not in batch:
            pointers = [row["maps", "trained"].mean(1), row["rollout"]]
            row["token_effects"] = token_effects(trained, images, pointers, rng)
        rows.append({key: x.cpu() for key, x in row.items()})
    seen = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    if not all(x.isfinite().all() for x in seen.values()):
        raise FloatingPointError("the network's features or attention are NaN or infinite")
    return seen | {"patch_size": trained.patch_size}


@torch.no_grad()
def observe_effects(backbone, batches):
    """What the feature depends on: exact changes to canvases and to attention, and their effects.

    `batches` are of `data.evaluation_batches` with `parts`. A dict of CPU tensors: `effect` (n,
    patches), 1 − cos with the true feature, of blackening a patch, if it has `ink` (n, patches);
    `moved` (n, K), √(2 − 2 cos), of leaving out a part, the digit's pieces first; a part's ink by
    patch, `own` (n, K, patches), and in all on the canvas, `own_ink` (n, K). Features (n, dim):
    the true ones, `features`, and when [CLS] attends in the last block to all patches alike,
    `even`, or as in another image, `swapped`. `index` and `labels` (n,).
    """
    rows, size = [], backbone.patch_size
    for batch in tqdm(batches, "leaving out", unit="batch", leave=False, disable=None):
        images, row = batch["images"], {key: batch[key] for key in ("index", "labels", "own_ink")}
        x = backbone.before_last_block(data.normalize(images))
        attention = backbone.last_attention(x, queries=1)
        even, first = attention.clone(), 1 + backbone.registers
        even[..., first:] = attention[..., first:].mean(-1, keepdim=True)
        for key, each in (("features", None), ("even", even), ("swapped", attention.roll(1, 0))):
            row[key] = F.normalize(backbone.last_feature(x, each), dim=-1)
        row["ink"] = patch_sums(batch["digit"] | batch["clutter"], size) > 0
        row["effect"] = blackening_effects(backbone, images, row["ink"], row["features"])
        parts = zip(batch["without"].unbind(1), batch["own"].unbind(1))
        parts = [(moved(backbone, x, row["features"]), patch_sums(own, size)) for x, own in parts]
        row["moved"], row["own"] = (torch.stack(each, 1) for each in zip(*parts))
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
    grid = [side // size for side in images.shape[2:]]
    for which in ink.nonzero().split(100):  # of some 1,500 for 100 canvases
        image, patch = which.unbind(1)
        hole = F.one_hot(patch, ink.shape[1]).bool().unflatten(1, (1, *grid))
        hole = hole.repeat_interleave(size, 2).repeat_interleave(size, 3)
        black = images[image].masked_fill(hole, 0)
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


def faithfulness(maps, effects):
    """Whether maps (n, m, patches) point to what `observe_effects` found to matter: two (n, m).

    Rank correlations within each image: `patch_faithfulness`, over its inky patches, of the map
    and the effect of blackening one; `object_faithfulness`, over its distractors, of the map's mass
    on the distractor's ink and the effect of leaving it out.
    """
    ink, effect = (effects[key][:, None].expand_as(maps) for key in ("ink", "effect"))
    distractors = slice((effects["moved"].shape[1] + 1) // 2, None)  # behind as many pieces
    own, moved = (effects[key][:, distractors] for key in ("own", "moved"))
    mass = torch.einsum("nmp,nkp->nmk", maps, own)
    moved, has_ink = (x[:, None].expand_as(mass) for x in (moved, own.sum(-1) > 0))
    result = {"patch_faithfulness": spearman(maps, effect, ink)}
    return result | {"object_faithfulness": spearman(mass, moved, has_ink)}


def measure_attention(seen, effects=None, resamples=1000):
    """Every metric of a network's attention to what `observe` has `seen`, and of its baselines'.

    `effects`: what `observe_effects` says of the first of these canvases.
    Returns {row: {metric: {"value", "low", "high", "images"}}}. Rows: `mean` of the heads; `head_1`
    and so on; `rollout`; `uniform`; `ink`, the same on every patch that holds ink, nothing
    elsewhere; `brightness`, each patch's summed intensity; `oracle`, the digit's pixels in it;
    `shuffled`, the mean map of another image; the mean map of each other network, as `untrained`.
    Metrics: those of `attention_metrics` and `faithfulness`; selectivity, mean digit density ÷ mean
    clutter density over images that have clutter; of_oracle, its logarithm ÷ the oracle's; of
    networks diversity of the heads. Of photographs, which have no masks, entropy and diversity.
    """
    heads = seen["maps", "trained"]
    mean, several = heads.mean(1), {"mean": heads}  # (n, patches), (n, heads, patches)
    rows = {"mean": mean} | {f"head_{h}": map_ for h, map_ in enumerate(heads.unbind(1), 1)}
    rows |= {"rollout": seen["rollout"]} if "rollout" in seen else {}
    if "digit" in seen:
        ink = (seen["digit"] + seen["clutter"] > 0).float()
        rows |= {"uniform": torch.ones_like(mean), "ink": ink, "oracle": seen["digit"] + 1e-9}
        rows |= {"brightness": seen["intensity"] + 1e-9, "shuffled": mean.roll(1, dims=0)}
    for name in [key[1] for key in seen if key[0] == "maps" and key[1] != "trained"]:
        rows[name], several[name] = seen["maps", name].mean(1), seen["maps", name]
    maps = torch.stack([map_ / map_.sum(-1, keepdim=True) for map_ in rows.values()], dim=1)
    values = {"entropy": entropy(maps.double())}
    if "digit" in seen:  # a hundred images at a time, so that memory does not grow with n
        pieces = zip(*(x.split(100) for x in (maps, seen["digit"], seen["clutter"])))
        pieces = [attention_metrics(*piece, seen["patch_size"] ** 2) for piece in pieces]
        values |= {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        has_clutter = ~values["clutter_density"].isnan()
        values["selectivity"] = values["digit_density"].where(has_clutter, torch.nan)
        values["of_oracle"] = values["selectivity"]
    if effects:
        n = len(effects["index"])
        for name, rho in faithfulness(maps[:n], effects).items():
            values[name] = F.pad(rho, (0, 0, 0, len(maps) - n), value=torch.nan)
    values["diversity"] = torch.full_like(values["entropy"], torch.nan)
    for row, each in several.items():
        values["diversity"][:, list(rows).index(row)] = diversity(each.double())
    means = bootstrap(torch.stack([*values.values()], 1), seen["index"], resamples)
    means = dict(zip(values, means.unbind(1)))  # each (1 + resamples, m)
    if "digit" in seen:
        means["selectivity"] = means["selectivity"] / means["clutter_density"]
        log = means["selectivity"].log()
        means["of_oracle"] = log / log[:, [list(rows).index("oracle")]]
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
    """The class that a linear classifier, fitted to the bank, gives each query: (n,).

    NaN if the bank has one class, which cannot be told from others.
    """
    if len(bank_labels.unique()) < 2:
        return torch.full((len(queries),), torch.nan)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return torch.from_numpy(probe.fit(bank.numpy(), bank_labels.numpy()).predict(queries.numpy()))


def mean_cosine(features):
    """Mean cosine of L2-normalized features (n, dim) of different images; 1: all point one way."""
    n, total = len(features), features.double().sum(0)
    return ((total @ total).item() - n) / max(1, n * (n - 1))


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
    result, points, queries = {}, bank["features", network], seen["features", network]
    for name, classify in (("knn", knn_classify), ("linear_probe", linear_probe)):
        found = classify(points, bank["labels"], queries)
        correct = (found == seen["labels"]).double().where(~found.isnan(), torch.nan)
        result[name] = summary(correct, seen["index"])
    return result


def measure_effects(effects, bank, network):
    """What `observe_effects` says of a network as a whole, `bank` as in `measure_features`.

    `causal_selectivity`: the distance that the feature moves for an ink pixel of the digit's
    pieces, left out, ÷ for one of the distractors. `attention_matters`: of the true feature and of
    those with another attention in the last block, their cosine with the true one, and their
    accuracy by k-NN; and as a scale the mean cosine of two canvases' features.
    """
    distance, index = effects["moved"] / effects["own_ink"], effects["index"]
    half = (distance.shape[1] + 1) // 2
    pieces, distractors = distance[:, :half].mean(1), distance[:, half:].mean(1)
    matters = {"two_canvases": mean_cosine(effects["features"])}
    for name in ("features", "even", "swapped"):
        found = knn_classify(bank["features", network], bank["labels"], effects[name])
        cosine = (effects[name] * effects["features"]).sum(-1)
        knn = summary((found == effects["labels"]).double(), index)
        matters[name] = {"cosine": summary(cosine, index), "knn": knn}
    causal = summary(pieces, index, distractors)
    return {"causal_selectivity": causal, "attention_matters": matters}


def evaluate(name, config, history, backbone, splits, other=None):
    """All that metrics.json holds of a network; and its test features (n, dim) and labels (n,).

    Attention on the test split, the head most selective on validation canvases, and accuracy of the
    features, from training to test images. Beside it stand, of a run of train.py (`history`, the
    lines of its log, not None), the network before its first step, and an `other` network.
    """
    epoch, device = history[-1]["epoch"] if history else None, backbone.cls_token.device
    untrained = vit.untrained_backbone(config) if history else None
    networks = {"trained": backbone, "untrained": untrained, "other_network": other}
    networks = {name: network.to(device) for name, network in networks.items() if network}
    result = {"checkpoint": name, "epoch": epoch, "fallbacks": config["fallbacks"]}
    result["settings"] = {key: value for key, value in config.items() if key != "fallbacks"}
    photos, test = config["dataset"] == "stl10", splits["test"]
    if not photos:
        images, _ = validation_images(config, splits)
        table = measure_attention(observe({"trained": backbone}, images), resamples=0)
        heads = [row for row in table if row.startswith("head_")]
        result["best_head"] = max(heads, key=lambda row: table[row]["selectivity"]["value"] or 0)
        n = effect_images(backbone, config["image_size"])
        effects = observe_effects(backbone, data.evaluation_batches(config, test, n, parts=True))
    for layout in ["photographs"] if photos else ["matched", "paper"]:
        images = data.evaluation_batches(config, test, TEST_IMAGES, layout)
        seen = observe(networks, images, rollout=True)
        result[layout] = measure_attention(seen, effects if layout == "matched" else None)
    bank = splits.get("bank", splits["train"])
    images = data.evaluation_batches(config, bank, min(BANK_IMAGES, len(bank)), "paper", "train")
    measured = {name: networks[name] for name in ("trained", "untrained") if name in networks}
    bank = observe(measured, images, maps=False)
    for network, key in zip(measured, ("features", "untrained_features")):
        result[key] = measure_features(bank, seen, network)
    if photos:
        *maps, chance = seen["token_effects"].unbind(1)
        tokens = [summary(effect, seen["index"], chance) for effect in maps]
        result["token_effect"] = dict(zip(("mean", "rollout"), tokens))
    else:
        result |= measure_effects(effects, bank, "trained")
    features = seen["features", "trained"]
    result["mean_cosine"] = mean_cosine(features)
    result["collapse"] = collapse(config, history) if history else None
    return result, (features, seen["labels"])


def effect_images(backbone, image_size):
    """How many canvases to try changes on: each takes a forward pass for every inky patch."""
    patches = (image_size // backbone.patch_size) ** 2
    work = backbone.depth * (backbone.dim * patches) ** 2
    affordable = 2e14 if backbone.cls_token.is_cuda else 3e11  # a minute, of a CPU's two cores
    return int(min(TEST_IMAGES, max(20, affordable / work)))


def validation_images(config, splits):
    """Validation images, the same for every run, and a bank of training images for k-NN."""
    bank = splits.get("bank", splits["train"])
    images = splits["validation"], VALIDATION_IMAGES, "matched", "validation"
    bank = data.evaluation_batches(config, bank, VALIDATION_BANK, "matched", "train")
    return data.evaluation_batches(config, *images), bank


def validate(seen, bank, effects=None):
    """{"images", "knn", "mean_cosine", row: {metric: value}} of `observe`d `validation_images`."""
    table = measure_attention(seen, effects, resamples=0)
    features, points = (each["features", "trained"] for each in (seen, bank))
    correct = knn_classify(points, bank["labels"], features) == seen["labels"]
    result = {"images": len(correct), "knn": correct.double().mean().item()}
    result["mean_cosine"] = mean_cosine(features)
    shown = ("selectivity", "auroc", "pointing", "entropy", "diversity", "patch_faithfulness")
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
    names = ["selectivity", "of_oracle", "auroc", "patch_faithfulness", "object_faithfulness"]
    names += ["digit_density", "clutter_density", "far_background_density"]
    titles = ["", "selectivity", "oracle", "auroc", "patches", "objects", "digit", "clutter", "far"]
    widths, lines = (18, 18, 8, 7, 18, 9, 8, 9, 0), [titles]
    for title, cells in rows.items():
        lines.append([title])
        for name in names:
            wide = name in ("selectivity", "patch_faithfulness")
            lines[-1].append(format_cell(cells.get(name), wide))
    head = f"{'':26}of{'':23}faithfulness, by{'':11}density on"
    return [head] + ["".join(f"{t:{w}}" for t, w in zip(line, widths)).rstrip() for line in lines]


def is_above(table, row, reference, metric="selectivity"):
    """Whether a row's metric is above another's, their intervals apart as they are printed."""
    low, high = table[row][metric]["low"], table[reference][metric]["high"]
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


def explanation(result):
    """Whether the feature depends on what attention points to, in a few sentences."""
    table, matters, metric = result["matched"], result["attention_matters"], "patch_faithfulness"
    words = "As well as brightness"
    if is_above(table, "mean", "brightness", metric):
        words = "Better than brightness"
    elif is_above(table, "brightness", "mean", metric):
        words = "Less than brightness"
    mean, bright, rollout = (table[row][metric] for row in ("mean", "brightness", "rollout"))
    even = format_cell(matters["even"]["cosine"], False)
    return f"""{words}: within an image, attention to a patch and the effect of blackening it have
    the rank correlation {format_cell(mean)}, brightness {format_cell(bright)}, rollout
    {format_cell(rollout)} ({mean["images"]:,} canvases). Left out, an ink pixel of the digit moves
    the feature {format_cell(result["causal_selectivity"])} times as far as one of a distractor.
    With even attention in the last block the feature's cosine with its true self is {even} (two
    canvases: {matters["two_canvases"]:.2f})."""


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
        if best:
            answers = ["Does it look at the digit, rather than at all that is white? "]
            answers[0] += verdict(result)
            answers += ["Does it point to what the feature depends on? " + explanation(result)]
        else:
            answers = [
                "These are photographs: no masks to measure attention against. Left out, the"
            ]
            mean, rollout = (format_cell(cell) for cell in result["token_effect"].values())
            answers[0] += f""" fifth of the patches with most attention changes the feature {mean}
            times as much as a random fifth; by rollout {rollout}."""
            answers += [f"{result['collapse']}."] if result["collapse"] else []
        for text in answers:
            lines += textwrap.wrap(" ".join(text.split()), 100)
        for name in ("features", "untrained_features"):
            if name in result:
                values = [cell["value"] for cell in result[name].values()]
                knn, probe = ("–" if value is None else f"{value:.1%}" for value in values)
                what = name.replace("_", " ")
                lines.append(f"accuracy of {what}: k-NN {knn}, linear probe {probe}")
        baselines = ["rollout", "brightness", "other_network"]
        baselines += [] if own else ["ink", "oracle", "shuffled", "untrained"]
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
    lines += [*format_table(rows), "", f"all metrics: {path}; what each means: README.md"]
    return "\n".join(lines)
