"""Numbers: maps against masks, maps against effects, and how well features classify.

A map is a distribution of attention over patches: (n, patches), one map for each of n images, each
summing to 1. Masks of digit and clutter, which is all ink of the distractors, are (n, patches) too:
how many pixels of each patch they cover. Attention is taken to be spread evenly over the pixels of
a patch. Metrics are computed for each image and then averaged; selectivity and equal ink are ratios
of two averages.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

NEIGHBOURS = 20  # of the k-NN classifier, as in DINO
KNN_TEMPERATURE = 0.07  # as in DINO


def patch_sums(images, patch_size: int):
    """Sum of images (B, H, W) or (B, C, H, W) over each patch, row by row: (…, patches).

    Of a mask this is the number of its pixels in each patch.
    """
    images = images if images.is_floating_point() else images.float()
    return F.avg_pool2d(images, patch_size, divisor_override=1).flatten(-2)


def patch_grid(images, patch_size: int) -> tuple[int, int]:
    """Rows and columns of the patches of images (…, H, W)."""
    height, width = images.shape[-2:]
    return height // patch_size, width // patch_size


# ------------------------------------------------------------------------------------- maps alone


def entropy(maps):
    """How spread out maps (…, patches) are: (…), 0 if all lies on one patch, 1 if uniform."""
    nats = torch.special.entr(maps).sum(-1)
    return nats / math.log(maps.shape[-1])


def diversity(maps):
    """How different the heads' maps (n, heads, patches) are: (n,), from 0 to 1 bit.

    This is the mean Jensen–Shannon divergence over all pairs of heads; NaN for a single head.
    """
    i, j = torch.triu_indices(maps.shape[1], maps.shape[1], offset=1)  # all pairs
    of_each_head = entropy(maps)  # (n, heads)
    of_mixture = entropy((maps[:, i] + maps[:, j]) / 2)  # (n, pairs)
    divergence = of_mixture - (of_each_head[:, i] + of_each_head[:, j]) / 2
    return divergence.mean(1) * math.log2(maps.shape[-1])


# ------------------------------------------------------------------------------ maps against masks


def attention_metrics(maps, digit, clutter, patch_area: int) -> dict:
    """Metrics of maps (n, patches) against the masks digit and clutter (n, patches).

    Returns {name: (n,)}. Densities and auroc are NaN where an image lacks the region.

    `…_density`: share of the attention on a region, divided by the region's share of the area.
    `digit_density_with_clutter`: the digit density of the images that have clutter; its mean divided
    by the mean clutter density is the selectivity. `auroc`: P(a pixel of the digit gets more
    attention than one of the clutter), ties count ½. `pointing`: whether the patch with most
    attention (the mean of several if tied) holds more digit than clutter. `jaccard60`: Jaccard
    index of the digit with the patches that hold 60% of the attention, DINO's measure.
    `best_jaccard`: the highest Jaccard index that any set of patches has.
    """
    maps = maps.double()
    digit = digit.double()
    clutter = clutter.double()
    metrics = densities(maps, digit, clutter, patch_area)
    has_clutter = clutter.sum(-1) > 0
    with_clutter = metrics["digit_density"].where(has_clutter, torch.nan)
    metrics["digit_density_with_clutter"] = with_clutter
    metrics["auroc"] = auroc(maps, digit, clutter)
    is_top = maps == maps.amax(-1, keepdim=True)
    is_hit = is_top & (digit > clutter)
    metrics["pointing"] = is_hit.sum(-1) / is_top.sum(-1)
    metrics["jaccard60"] = jaccard60(maps, digit, patch_area)
    metrics["best_jaccard"] = best_jaccard(digit, patch_area)
    return metrics


def densities(maps, digit, clutter, patch_area: int) -> dict:
    """Share of the attention on each region, divided by its share of the area: {name: (n,)}."""
    regions = {
        "digit": digit,
        "clutter": clutter,
        "background": patch_area - digit - clutter,
        # patches without any ink, so far from all of it
        "far_background": torch.where(digit + clutter == 0, patch_area, 0.0),
    }
    return {
        f"{name}_density": (maps * pixels).sum(-1) / pixels.mean(-1)
        for name, pixels in regions.items()
    }


def auroc(maps, digit, clutter):
    """P(a pixel of the digit gets more attention than a pixel of the clutter): (n,), ties ½."""
    ranked, order = maps.sort(dim=-1)
    # clutter pixels in the k patches with least attention, for k = 0, 1, …
    clutter_below = F.pad(clutter.gather(-1, order).cumsum(-1), (1, 0))
    # for each patch: clutter pixels with less attention, and those with at most as much
    less = clutter_below.gather(-1, torch.searchsorted(ranked, maps))
    at_most = clutter_below.gather(-1, torch.searchsorted(ranked, maps, right=True))
    wins = (digit * (less + at_most) / 2).sum(-1)
    pairs = digit.sum(-1) * clutter.sum(-1)
    return wins / pairs


def jaccard60(maps, digit, patch_area: int):
    """Jaccard index of the digit with the patches that hold 60% of the attention: (n,).

    Patches are taken in descending order of attention, tied ones together.
    """
    ranked = maps.sort(dim=-1, descending=True).values
    # 1e-6 less than 60%, so that rounding does not ask for one more patch
    last = (ranked.cumsum(-1) < 0.6 - 1e-6).sum(-1, keepdim=True)
    is_taken = maps >= ranked.gather(-1, last)
    overlap = (is_taken * digit).sum(-1)
    area = patch_area * is_taken.sum(-1)
    union = digit.sum(-1) + area - overlap
    return overlap / union


def best_jaccard(digit, patch_area: int):
    """The highest Jaccard index of the digit with any set of patches: (n,).

    Of all sets of k patches the one with most digit is best, so one set for each k competes.
    """
    overlap = digit.sort(dim=-1, descending=True).values.cumsum(-1)
    area = patch_area * torch.arange(1, digit.shape[-1] + 1)  # of k patches
    union = digit.sum(-1, keepdim=True) + area - overlap
    return (overlap / union).amax(-1)


# ---------------------------------------------------------------------------- maps against effects


def spearman(a, b, among):
    """Rank correlation of a and b (…, k) over the entries `among` (…, k) bool: (…), −1 to 1.

    Ties share their mean rank. 0 if either is constant; NaN for fewer than two entries, or if one
    of them is NaN.
    """
    # Entries that do not count come last, so they change no other entry's rank.
    values = torch.stack([a, b]).masked_fill(~among, torch.inf)
    ranked = values.sort(dim=-1).values
    first = torch.searchsorted(ranked, values)
    last = torch.searchsorted(ranked, values, right=True)
    rank = (first + last).double()  # twice the mean rank, up to a constant: correlated all the same
    mean = (rank * among).sum(-1, keepdim=True) / among.sum(-1, keepdim=True)
    centred_a, centred_b = (rank - mean) * among
    rho = F.cosine_similarity(centred_a, centred_b, dim=-1)
    has_nan = values.isnan().any(0).any(-1)
    return rho.where((among.sum(-1) > 1) & ~has_nan, torch.nan)


def faithfulness(maps, effects) -> dict:
    """Whether maps (n, patches) point to what the feature depends on: {name: (n,)}.

    `effects` (observe.CanvasEffects) are of the same n images. `equal_ink_wins` and
    `equal_ink_pairs` are what the function `equal_ink` returns, NaN for an image without pairs; the
    ratio of their means is the equal ink of the map. `patch_faithfulness` is the
    rank correlation, over an image's patches with ink, of the map with the effect of blackening the
    patch, and `direct_faithfulness` that with the direct effect at the last block.
    `object_faithfulness` is the same over an image's distractors, of the map's mass on their ink
    with the distance that the feature moves when they are left out.
    """
    wins, pairs = equal_ink(maps, effects.blackening, effects.intensity, effects.has_ink)
    direct = effects.direct[:, -1]
    object_ink = effects.part_ink[:, effects.pieces :]  # (n, distractors, patches)
    # summed in float64 and rounded, so that ties stay ties
    object_mass = (maps.double()[:, None] * object_ink).sum(-1).float()
    has_ink = object_ink.sum(-1) > 0
    return {
        "equal_ink_wins": wins.where(pairs > 0, torch.nan),
        "equal_ink_pairs": pairs.where(pairs > 0, torch.nan),
        "patch_faithfulness": spearman(maps, effects.blackening, effects.has_ink),
        "direct_faithfulness": spearman(maps, direct, effects.has_ink & direct.isfinite()),
        "object_faithfulness": spearman(
            object_mass, effects.distances[:, effects.pieces :], has_ink
        ),
    }


def equal_ink(maps, effects, dose, among, tolerance: float = 0.05):
    """Of two patches with equal ink, does the one with more of the map have the larger effect?

    Blackening a patch removes its summed intensity: that is the dose. A map that knows no more than
    the dose ranks patches well. Here the dose is held constant: pairs are two patches of one image
    whose doses differ by at most `tolerance`, as a share of the larger one. A pair counts 1 if the
    map orders it as the effects do, ½ if either of them is tied, else 0.

    `maps`, `effects` and `dose` are (n, patches); `among` (n, patches) bool are the patches with
    ink, whose effects are known. Returns two (n,): the sum over an image's pairs, and how many
    pairs it has. The measure is the ratio of their means; chance is ½.
    """
    i, j = torch.triu_indices(maps.shape[1], maps.shape[1], offset=1)  # all pairs
    larger = torch.maximum(dose[:, i], dose[:, j])
    is_equal = (dose[:, i] - dose[:, j]).abs() <= tolerance * larger
    is_pair = is_equal & among[:, i] & among[:, j]
    map_order = (maps[:, i] - maps[:, j]).sign()
    effect_order = (effects[:, i] - effects[:, j]).sign()
    agreement = (1 + map_order * effect_order) / 2
    return (agreement * is_pair).double().sum(-1), is_pair.double().sum(-1)


def relevance_gain(most_first, least_first):
    """Symmetric relevance gain (SRG, Blücher et al. 2024) of maps: (n,), about −1 to 1.

    Patches are left out in ten equal steps up to all but one. `most_first` (n, 10) are the cosines
    of the feature with the original if those with most of the map go first, `least_first` (n, 10)
    if those with least do. A good map has a low curve in the one order and a high one in the other,
    so the area between the curves is the measure; a random map has 0 in expectation. Both curves
    begin at 1, with nothing left out.
    """
    gap = least_first - most_first
    return (gap.sum(-1) - gap[:, -1] / 2) / gap.shape[-1]  # by the trapezoidal rule


# --------------------------------------------------------------------------------------- intervals


def bootstrap_weights(index, resamples: int = 1000):
    """How often each of n images counts, (1 + resamples, n): once in row 0, as drawn in the others.

    `index` (n,) are the source images in the data set. Canvases that show the same one are not
    independent, so sources are resampled, with all of their canvases.
    """
    sources, source_of_image = torch.unique(index, return_inverse=True)
    probability = np.full(len(sources), 1 / len(sources))
    counts = np.random.default_rng(0).multinomial(len(sources), probability, resamples)
    counts = torch.cat([torch.ones(1, len(sources)), torch.from_numpy(counts)])
    return counts.double()[:, source_of_image]


def weighted_means(values, weights):
    """Means of `values` (n,) or (n, k) of the first n images, NaN left out: (1 + resamples, …)."""
    weights = weights[:, : len(values)]
    is_number = ~values.isnan()
    totals = weights @ values.double().nan_to_num()
    counts = weights @ is_number.double()
    return totals / counts


def interval_cell(means, values) -> dict:
    """A cell of a table: mean, 95% interval, and number of images.

    `means` (1 + resamples,) is what `weighted_means` makes of the images' `values` (n,), or a ratio
    or difference of such means. Of `values` only the number that are not NaN counts. What is not
    finite becomes None, since JSON has no NaN.
    """
    resampled = means[1:][means[1:].isfinite()]
    images = int((~values.isnan()).sum())
    low = high = math.nan
    if len(resampled) and images > 1:  # of one image all resamples are alike
        low, high = np.percentile(resampled, [2.5, 97.5])
    cell = {"value": float(means[0]), "low": float(low), "high": float(high)}
    cell = {name: number if math.isfinite(number) else None for name, number in cell.items()}
    return cell | {"images": images}


# ---------------------------------------------------------------------------------------- features


def mean_cosine(features) -> float:
    """Mean cosine of L2-normalized features (n, dim) of different images.

    It is 1 if all features point one way.
    """
    count = len(features)
    total = features.double().sum(0)
    return ((total @ total).item() - count) / max(1, count * (count - 1))


def knn_classify(bank, bank_labels, queries):
    """The class that the nearest features of the bank vote for, for each query: (n,) int64.

    `bank` (N, dim) and `queries` (n, dim) are L2-normalized; `bank_labels` are (N,) int64.
    """
    cosine, neighbour = (queries @ bank.T).topk(min(NEIGHBOURS, len(bank)))
    votes = torch.zeros(len(queries), int(bank_labels.max()) + 1)
    votes.scatter_add_(1, bank_labels[neighbour], (cosine / KNN_TEMPERATURE).exp())
    return votes.argmax(1)


def linear_probe(bank, bank_labels, queries):
    """The class that a linear classifier, fitted to the bank, gives each query: (n,).

    NaN if the bank has one class only. Shapes are those of `knn_classify`.
    """
    # imported here, since it takes a second
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(bank_labels.unique()) < 2:
        return torch.full((len(queries),), torch.nan)
    # The default tolerance, 1e-4, takes twice as long and finds the same to half a per cent.
    probe = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-3, max_iter=1000))
    probe.fit(bank.numpy(), bank_labels.numpy())
    return torch.from_numpy(probe.predict(queries.numpy()))
