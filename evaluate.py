"""A network evaluated as a whole: all that metrics.json holds.

A row of its tables is a map: attention, rollout, or a baseline that understands nothing. A cell is
a mean with its 95% interval. There is a table for each layout of test canvases. In "matched", the
one that counts, clutter lies where digits lie, so that position says nothing; in "paper" digits lie
more in the middle. report.py turns the tables into text.
"""

import hashlib
import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import data
import metrics
import vit
import weights
from effects import feature_of, one_minus_cosine
from explain import CANVAS_CONTROLS, NETWORK_MAPS, PHOTO_CONTROLS
from observe import (
    CanvasEffects,
    Observation,
    TokenEffects,
    maps_by_row,
    observe,
    observe_effects,
    observe_token_effects,
    progress,
    row_of,
)
from settings import Config
from views import evaluation_batches, left_out_batches, marked_batches
from vit import VisionTransformer

TEST_IMAGES = 1000
BANK_IMAGES = 10_000  # training images that k-NN and the linear probe learn from
# The best head is chosen on these, and the curves over epochs are drawn from them.
VALIDATION_IMAGES = 512
VALIDATION_BANK = 512
# What validation keeps of each row: a line of the log holds these.
CURVES = (
    "selectivity",
    "auroc",
    "pointing",
    "entropy",
    "diversity",
    "patch_faithfulness",
    "equal_ink",
)
# The maps whose faithfulness is measured: those of the network, then the controls.
CANVAS_MAPS = (*NETWORK_MAPS, *CANVAS_CONTROLS)
PHOTO_MAPS = (*NETWORK_MAPS, *PHOTO_CONTROLS)
# Measuring these maps takes as long as this many forward passes for each photograph: some 50 for the
# windows, 8 for the SRG of each of 8 maps, and some 20 for the gradients.
PHOTO_PASSES = 140
# For each marked canvas there are 2 passes, with and without the mark, and some 38 for the maps.
MARK_PASSES = 40
# Metrics that are a ratio of two means, and what is not shown beside them.
RATIOS = {
    "selectivity": ("digit_density_with_clutter", "clutter_density"),
    "equal_ink": ("equal_ink_wins", "equal_ink_pairs"),
}
ONLY_IN_RATIOS = ("digit_density_with_clutter", "equal_ink_wins", "equal_ink_pairs")
UNTRAINED_SHARE = 0.3  # of the canvases on which effects are measured
# What decides the numbers in metrics.json, beside the network and the data.
MEASURING_MODULES = ("clutter", "data", "effects", "evaluate", "explain", "metrics", "observe")
MEASURING_MODULES += ("rotary", "views", "vit")
NOT_MEASURED = ("fallbacks", "data_root", "device")  # settings that decide no number
STEPS_TO_COLLAPSE = 50  # there is no warning of a collapse before this many steps
ENOUGH_PICTURES = 5  # fewer have no interval: a bootstrap of two would only return their values
# For weights that do not come from a run of train.py, metrics.json holds only these settings.
SHOWN = ("weights", "dataset", "split", "background", "digits", "canvas_size", "num_distractors")
SHOWN += ("distractor_size", "image_size", "data_root", "patch_size", "dim", "depth", "heads")
SHOWN += ("pos_size", "mlp_ratio", "registers", "antialias", "norm_eps", "rotary")


# -------------------------------------------------------------------------- every map, every metric


def measure_attention(
    observation: Observation,
    effects: CanvasEffects | TokenEffects | None = None,
    resamples: int = 1000,
) -> dict:
    """Every metric of a network's maps, and of its baselines (see docs/metrics.md).

    `effects` are of the first of the observed images. Returns {row: {metric: cell}}, where a cell
    is {"value", "low", "high", "images"}. The metrics are entropy; for networks diversity; for
    canvases those of `metrics.attention_metrics`, `of_oracle`, which is ln(selectivity) divided by
    that of the oracle, and, with `effects`, those of `metrics.faithfulness`. For photographs they
    are those of `observe.TokenEffects`.
    """
    image_weights = metrics.bootstrap_weights(observation.index, resamples)
    values = measure_rows(observation, effects)
    means = means_of(values, image_weights)

    # Some metrics are ratios, of means over the same resampled images, or of their logarithms.
    if observation.digit is not None:
        for row, row_means in means.items():
            for name, (numerator, denominator) in RATIOS.items():
                if numerator in row_means:
                    row_means[name] = row_means[numerator] / row_means[denominator]
                    values[row][name] = values[row][numerator]  # to count the images
        log_oracle = means["oracle"]["selectivity"].log()
        for row, row_means in means.items():
            selectivity = values[row]["selectivity"]
            if len(selectivity) == len(observation.index):  # of the same images as the oracle
                row_means["of_oracle"] = row_means["selectivity"].log() / log_oracle
                values[row]["of_oracle"] = selectivity  # to count the images

    return cells_of(means, values)


def means_of(values: dict[str, dict[str, Tensor]], image_weights) -> dict:
    """{row: {metric: (1 + resamples,)}} of the metrics for each image, {row: {metric: (n,)}}."""
    return {
        row: {name: metrics.weighted_means(value, image_weights) for name, value in columns.items()}
        for row, columns in values.items()
    }


def cells_of(means: dict, values: dict) -> dict:
    """{row: {metric: cell}} of the means of all resamples and of the metrics for each image."""
    return {
        row: {
            name: metrics.interval_cell(means[row][name], value)
            for name, value in columns.items()
            if name not in ONLY_IN_RATIOS
        }
        for row, columns in values.items()
    }


def measure_rows(
    observation: Observation, effects: CanvasEffects | TokenEffects | None
) -> dict[str, dict[str, Tensor]]:
    """The metrics of each row's maps, for each image: {row: {metric: (n,)}}."""
    canvas_effects = effects if isinstance(effects, CanvasEffects) else None
    maps_of_rows = map_rows(observation, canvas_effects)
    values = {
        row: measure_map(row, maps, observation, canvas_effects)
        for row, maps in maps_of_rows.items()
    }
    if isinstance(effects, TokenEffects):
        for row, columns in token_columns(effects).items():
            values[row] = values.get(row, {}) | columns
    return values


def token_columns(effects: TokenEffects) -> dict[str, dict[str, Tensor]]:
    """The metrics of maps of photographs, for each image: {row: {metric: (n,)}}."""
    names = ("srg", "patch_faithfulness", "direct_faithfulness")
    return {row: {name: getattr(effects, name)[row] for name in names} for row in effects.srg}


def map_rows(observation: Observation, effects: CanvasEffects | None = None) -> dict[str, Tensor]:
    """The maps that are measured, {row: (n, patches)}, each summing to 1.

    `mean` is the attention of the network "trained", the mean of its heads; `head_1` and so on are
    the heads. The maps of `effects` follow, which may be of fewer images. The baselines are
    `brightness`, the summed intensity; `ink`, the same for all patches with any; `oracle`, the
    pixels of the digit; `shuffled`, the attention to another image; `uniform`. The rows of other
    networks have their names.
    """
    heads = observation.attention["trained"]
    rows = {"mean": heads.mean(1)}
    for number, maps in enumerate(heads.unbind(1), 1):
        rows[f"head_{number}"] = maps
    if effects is not None:
        # "mean" stays as it is, and brightness is replaced below: both by maps of all images.
        for row, maps in effects.maps.items():
            rows.setdefault(row, maps)
    if observation.digit is not None:
        has_ink = (observation.digit + observation.clutter > 0).float()
        rows["brightness"] = observation.intensity + 1e-9
        rows["ink"] = has_ink
        rows["oracle"] = observation.digit + 1e-9
        rows["shuffled"] = rows["mean"].roll(1, 0)
        rows["uniform"] = torch.ones_like(has_ink)
    for name, heads in observation.attention.items():
        if name != "trained":
            rows[name] = heads.mean(1)
    return {row: maps / maps.sum(-1, keepdim=True) for row, maps in rows.items()}


def measure_map(
    row: str, maps: Tensor, observation: Observation, effects: CanvasEffects | None
) -> dict[str, Tensor]:
    """The metrics of one row's maps (n, patches), for each image: {metric: (n,)}."""
    count = len(maps)
    values = {"entropy": metrics.entropy(maps.double())}
    if observation.digit is not None:
        values |= metrics.attention_metrics(
            maps, observation.digit[:count], observation.clutter[:count], observation.patch_area
        )
    if effects is not None:
        values |= metrics.faithfulness(maps[: len(effects.index)], effects)
    # Only whole networks have several heads whose maps can differ.
    network = "trained" if row == "mean" else row
    if network in observation.attention:
        values["diversity"] = metrics.diversity(observation.attention[network].double())
    return values


def measure_pictures(
    name: str, description: str, effects: TokenEffects, collapse: str | None = None
) -> dict:
    """What the report says of a network's maps of somebody's pictures.

    `collapse` is the warning of `collapse_warning`. Of a few pictures there are no intervals.
    """
    resamples = 1000 if len(effects.index) >= ENOUGH_PICTURES else 0
    values = token_columns(effects)
    means = means_of(values, metrics.bootstrap_weights(effects.index, resamples))
    return {
        "checkpoint": name,
        "description": description,
        "collapse": collapse,
        "photographs": cells_of(means, values),
        "direct_share": direct_share(effects),
    }


# ----------------------------------------------------------------------------- features and effects


def accuracy(
    bank: Observation,
    features,
    observed: Observation,
    network: str = "trained",
    classify=metrics.knn_classify,
) -> dict:
    """The accuracy of classifying features (n, dim) by a network's features of a bank of images.

    The features are of the images of `observed`. Returns a cell.
    """
    predicted = classify(bank.features[network], bank.labels, features)
    is_correct = (predicted == observed.labels).double().where(~predicted.isnan(), torch.nan)
    means = metrics.weighted_means(is_correct, metrics.bootstrap_weights(observed.index))
    return metrics.interval_cell(means, is_correct)


def causal_selectivity(effects: CanvasEffects) -> dict:
    """How far the feature moves if a piece of the digit is left out, for each of its ink pixels,
    divided by the same for a distractor: a cell."""
    image_weights = metrics.bootstrap_weights(effects.index)
    distance = effects.distances / effects.canvas_ink  # for each pixel of ink, (n, K)
    of_digit = distance[:, : effects.pieces].mean(1)
    of_distractors = distance[:, effects.pieces :].mean(1)
    ratio = metrics.weighted_means(of_digit, image_weights)
    ratio = ratio / metrics.weighted_means(of_distractors, image_weights)
    return metrics.interval_cell(ratio, of_digit)


def direct_share(effects: CanvasEffects | TokenEffects) -> list[dict]:
    """The direct effects of patches at each block, divided by their whole effects: a cell a block.

    These are ratios of sums over all patches and images, and 1 at the first block. What is missing
    at the last block is due to what the blocks before it have mixed into other tokens. (As 1 −
    cosine does not add up, a ratio can be above 1.)
    """
    if isinstance(effects, CanvasEffects):
        sums = effects.direct.sum(-1)  # (n, depth)
    else:
        sums = effects.direct_sums
    image_weights = metrics.bootstrap_weights(effects.index)
    cells = []
    for of_block in sums.unbind(1):
        whole_effect = sums[:, 0].where(of_block.isfinite(), torch.nan)  # of the same images
        ratio = metrics.weighted_means(of_block, image_weights)
        ratio = ratio / metrics.weighted_means(whole_effect, image_weights)
        cells.append(metrics.interval_cell(ratio, of_block))
    return cells


def measure_untrained(
    observation: Observation, effects: CanvasEffects | TokenEffects, names: tuple[str, ...]
) -> dict:
    """The maps of the network before training against its own effects: {row: {metric: cell}}.

    `observation` is that of the trained network and holds the attention of "untrained"; `effects`
    are of the untrained network, with the maps of these names.
    """
    attention = {"trained": observation.attention["untrained"]}
    table = measure_attention(replace(observation, attention=attention), effects)
    return {row: table[row] for row in map(row_of, names)}


# ---------------------------------------------------------------------------------- the evaluation


@dataclass
class Evaluation:
    """All that is known of a network: what metrics.json holds, and its test features."""

    result: dict
    features: Tensor  # (n, dim), L2-normalized
    labels: Tensor  # (n,) int64


def evaluate(
    name: str,
    config: Config,
    history: list[dict] | None,
    backbone: VisionTransformer,
    splits: dict,
    other: VisionTransformer | None = None,
    with_marks: bool = False,
) -> Evaluation:
    """Measure a network on test images. `name` is for metrics.json and the printed report.

    `history` are the lines of its log if it comes from a run of train.py, else None. A network with
    a history is measured beside itself before its first step. An `other` network may be compared
    too. `splits` are those of `data.load_dataset`. Runs of --shortcut are measured on canvases with
    marks as well, and so is any other network that is shown canvases `with_marks`.
    """
    result = describe_checkpoint(name, config, history)
    device = backbone.cls_token.device
    networks = {"trained": backbone}
    untrained = untrained_backbone(config) if history else None
    if untrained is not None:
        networks["untrained"] = untrained.to(device)
    bank_networks = dict(networks)  # without the other one, whose features are not classified
    if other is not None:
        networks["other_network"] = other.to(device)

    if config.dataset == "stl10":
        tables, observation = measure_photographs(config, networks, splits)
    else:
        with_marks = with_marks or config.shortcut > 0
        tables, observation = measure_canvases(config, networks, splits, with_marks)
    result |= tables

    bank_split = splits.get("bank", splits["train"])
    count = min(BANK_IMAGES, len(bank_split))
    batches = evaluation_batches(config, bank_split, count, "paper", "train")
    bank = observe(bank_networks, batches, maps=False)
    for network in bank_networks:
        queries = observation.features[network]
        key = "features" if network == "trained" else "untrained_features"
        result[key] = {
            "knn": accuracy(bank, queries, observation, network),
            "linear_probe": accuracy(bank, queries, observation, network, metrics.linear_probe),
        }

    features = observation.features["trained"]
    result["mean_cosine"] = metrics.mean_cosine(features)
    if other is None:
        result["fingerprint"] = fingerprint(config, backbone, splits)
    return Evaluation(result, features, observation.labels)


def measure_canvases(
    config: Config, networks: dict, splits: dict, with_marks: bool
) -> tuple[dict, Observation]:
    """What metrics.json holds of canvases, and what was observed of those in layout "paper"."""
    backbone = networks["trained"]
    result = {"best_head": best_head(config, backbone, splits)}
    count = effect_images(backbone, config.image_size)
    batches = list(left_out_batches(config, splits["test"], count))
    effects = observe_effects(backbone, batches, CANVAS_MAPS, direct_images(backbone, count))
    result["causal_selectivity"] = causal_selectivity(effects)
    result["direct_share"] = direct_share(effects)

    observation = observe(networks, evaluation_batches(config, splits["test"], TEST_IMAGES))
    result["matched"] = measure_attention(observation, effects)
    if "untrained" in networks:
        # Context for the trained network's numbers, for which fewer canvases are enough.
        fewer = batches[: math.ceil(UNTRAINED_SHARE * len(batches))]
        untrained_effects = observe_effects(networks["untrained"], fewer, CANVAS_MAPS)
        result["untrained"] = measure_untrained(observation, untrained_effects, CANVAS_MAPS)

    if with_marks:
        result["marks"] = measure_marks(config, backbone, splits)
        if "untrained" in networks:
            result["untrained_marks"] = measure_marks(config, networks["untrained"], splits)

    paper_canvases = evaluation_batches(config, splits["test"], TEST_IMAGES, "paper")
    paper_observation = observe(networks, paper_canvases)
    result["paper"] = measure_attention(paper_observation)
    return result, paper_observation


@torch.no_grad()
def measure_marks(config: Config, backbone: VisionTransformer, splits: dict) -> dict:
    """How much a network relies on marks (see --shortcut), and how much its maps say so.

    Test canvases get a mark each. (All other measures of the network are of canvases without
    marks.) Returns two entries. `reliance` is the mean of 1 − cosine of the features with the mark
    and without it, divided by the mean of 1 − cosine of the features of different canvases: it is 0
    if marks do not matter. Its interval takes the divisor as known. `density` is {row: cell} of the
    network's maps: the share of the map on the mark, divided by the mark's share of the area.
    """
    patch_size = backbone.shape.patch_size
    device = backbone.cls_token.device
    count = effect_images(backbone, config.image_size, passes=MARK_PASSES)
    index = []
    features = []
    effect = []
    density = {row_of(name): [] for name in NETWORK_MAPS}
    for batch in progress(marked_batches(config, splits["test"], count), "marks"):
        index.append(batch.index)
        images = batch.images.to(device)
        with_mark = feature_of(backbone, images)
        without_mark = feature_of(backbone, batch.without_mark.to(device))
        features.append(with_mark.cpu())
        effect.append(one_minus_cosine(with_mark, without_mark).cpu())
        pixels = metrics.patch_sums(batch.mark, patch_size).to(device)  # (b, patches)
        for row, maps in maps_by_row(backbone, images, NETWORK_MAPS).items():
            of_mark = (maps * pixels).sum(-1) / pixels.mean(-1)
            density[row].append(of_mark.cpu())

    scale = 1 - metrics.mean_cosine(torch.cat(features))
    if scale > 1e-6:  # else all features are the same, but for rounding
        reliance = torch.cat(effect) / scale
    else:
        reliance = torch.full((count,), math.nan)
    image_weights = metrics.bootstrap_weights(torch.cat(index))

    def mean_cell(values):
        return metrics.interval_cell(metrics.weighted_means(values, image_weights), values)

    return {
        "reliance": mean_cell(reliance),
        "density": {row: mean_cell(torch.cat(values)) for row, values in density.items()},
    }


def measure_photographs(config: Config, networks: dict, splits: dict) -> tuple[dict, Observation]:
    """What metrics.json holds of photographs, and what was observed of them."""
    backbone = networks["trained"]
    count = effect_images(backbone, config.image_size, PHOTO_PASSES)
    effects = observe_token_effects(
        backbone,
        evaluation_batches(config, splits["test"], count),
        PHOTO_MAPS,
        direct_images(backbone, count),
    )
    result = {"direct_share": direct_share(effects)}
    observation = observe(networks, evaluation_batches(config, splits["test"], TEST_IMAGES))
    result["photographs"] = measure_attention(observation, effects)
    if "untrained" in networks:
        batches = evaluation_batches(config, splits["test"], count)
        untrained_effects = observe_token_effects(networks["untrained"], batches, PHOTO_MAPS)
        result["untrained"] = measure_untrained(observation, untrained_effects, PHOTO_MAPS)
    return result, observation


def measured_before(
    path: str,
    name: str,
    config: Config,
    history: list[dict],
    backbone: VisionTransformer,
    splits: dict,
) -> Evaluation | None:
    """What `evaluate` would return, if a file metrics.json holds it already; else None.

    train.py measures a network when training ends, so visualize.py need not do so again. The other
    arguments are those of `evaluate`. Runs with background pictures or with weights to start from
    are always measured again, since the user may have changed these files.
    """
    if config.background not in ("black", "texture") or config.weights != "none":
        return None
    try:
        result = json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(result, dict):
        return None
    if result.get("fingerprint") != fingerprint(config, backbone, splits):
        return None
    # The file lacks only the features. (Photographs have no layout.)
    batches = evaluation_batches(config, splits["test"], TEST_IMAGES, "paper")
    observation = observe({"trained": backbone}, batches, maps=False)
    result |= describe_checkpoint(name, config, history)
    return Evaluation(result, observation.features["trained"], observation.labels)


def fingerprint(config: Config, backbone: VisionTransformer, splits: dict) -> str:
    """A short text that changes with the network, its settings, its data and the code here.

    The kind of device counts too, since it decides on how many images effects are measured.
    """
    values = {key: value for key, value in asdict(config).items() if key not in NOT_MEASURED}
    parts = [json.dumps(values, sort_keys=True), backbone.cls_token.device.type]
    parts.append(data.digest(*backbone.state_dict().values()))
    for split in splits.values():
        parts.append(data.digest(split.images, split.labels))
    sha = hashlib.sha256(" ".join(parts).encode())
    for module in MEASURING_MODULES:
        sha.update(Path(__file__).with_name(f"{module}.py").read_bytes())
    return sha.hexdigest()[:12]


def describe_checkpoint(name: str, config: Config, history: list[dict] | None) -> dict:
    """What metrics.json says about where a network comes from."""
    settings = asdict(config)
    fallbacks = settings.pop("fallbacks")
    if history is None:
        settings = {key: settings[key] for key in SHOWN}
    epoch = history[-1]["epoch"] if history else None
    return {
        "checkpoint": name,
        "description": describe(config, epoch, is_run=history is not None),
        "epoch": epoch,
        "collapse": collapse_warning(config, history) if history else None,
        "settings": settings,
        "fallbacks": fallbacks,
    }


def untrained_backbone(config: Config) -> VisionTransformer | None:
    """The backbone of a run before its first step; None, with a warning, if it cannot be had."""
    backbone = vit.build_network(config).backbone
    if config.weights != "none":
        try:
            start = weights.load_backbone(config.weights).backbone
            backbone.load_state_dict(start.state_dict())
        except (OSError, ValueError) as error:
            reason = weights.one_line(error)
            print(f"warning: the untrained network cannot be shown: {reason}", file=sys.stderr)
            return None
    return backbone


def best_head(config: Config, backbone: VisionTransformer, splits: dict) -> str:
    """The row of the most selective head, chosen on validation canvases."""
    batches, _ = validation_batches(config, splits)
    table = measure_attention(observe({"trained": backbone}, batches), resamples=0)
    heads = [row for row in table if row.startswith("head_")]
    return max(heads, key=lambda row: table[row]["selectivity"]["value"] or 0)


def effect_images(
    backbone: VisionTransformer, image_size: int, passes: int | None = None, at_least: int = 20
) -> int:
    """How many images can be afforded if each takes `passes` forward passes.

    On canvases there is a pass for every patch with ink, so the default is the number of patches.
    For the laptop preset this takes some ten seconds on two CPU cores.
    """
    shape = backbone.shape
    patches = (image_size // shape.patch_size) ** 2
    work = shape.depth * shape.dim**2 * patches * (passes or patches)
    # This comes to 1,000 canvases for the laptop preset; for ViT-S/8 at 224 px to some 180 on a GPU
    # and 20, the least, on a CPU.
    affordable = 2e14 if backbone.cls_token.is_cuda else 3e11
    return int(min(TEST_IMAGES, max(at_least, affordable / work)))


def direct_images(backbone: VisionTransformer, count: int) -> int:
    """On how many of `count` images direct effects are measured.

    They take about depth / 2 times as long as whole effects. In a network of up to two blocks they
    are measured on all images, in a deeper one on fewer, but on at least two.
    """
    return min(count, max(2, 3 * count // (backbone.shape.depth + 1)))


# -------------------------------------------------------------------------------------- validation


def validation_batches(config: Config, splits: dict):
    """Validation images, the same for every run, and a bank of training images for k-NN."""
    held_out = evaluation_batches(
        config, splits["validation"], VALIDATION_IMAGES, split_name="validation"
    )
    bank_split = splits.get("bank", splits["train"])
    bank = evaluation_batches(config, bank_split, VALIDATION_BANK, split_name="train")
    return held_out, bank


def validate(
    observation: Observation, bank: Observation, effects: CanvasEffects | None = None
) -> dict:
    """What a line of the log says about validation images.

    Returns {"images", "knn", "mean_cosine", and for each row {metric: value}}.
    """
    features = observation.features["trained"]
    result = {
        "images": len(features),
        "knn": accuracy(bank, features, observation)["value"],
        "mean_cosine": metrics.mean_cosine(features),
    }
    for row, cells in measure_attention(observation, effects, resamples=0).items():
        result[row] = {name: cells[name]["value"] for name in CURVES if name in cells}
    return result


def collapse_warning(config: Config, history: list[dict]) -> str | None:
    """A warning if the network gives all images the same feature, by its log; else None.

    It has collapsed if features point one way, more so than before training (the first line), or if
    the mean of a DINO teacher's distributions has hardly more entropy than each of them. There
    is no warning while the learning rate rises, nor in the first steps, when the network has hardly
    changed.
    """
    # warmup is a fraction of the run
    if history[-1]["epoch"] < config.warmup * config.epochs:
        return None
    if history[-1].get("step", math.inf) < STEPS_TO_COLLAPSE:
        return None
    first = history[0]["validation"]
    last = history[-1]["validation"]
    points_one_way = last.get("mean_cosine", 0) > max(0.98, first.get("mean_cosine", 0))
    # entropies are fractions of ln K
    difference = last.get("entropy_of_mean", 1) - last.get("mean_entropy", 0)
    teacher_is_constant = difference * math.log(config.out_dim) < 0.05
    if not (points_one_way or teacher_is_constant):
        return None
    advice = "use a lower --lr"
    if config.loss == "dino":
        advice = "use --centering sinkhorn_knopp, a lower --teacher-temp or a lower --lr"
    return f"the network has collapsed: all images look alike to it; {advice}"


def describe(config: Config, epoch: int | None = None, is_run: bool = True) -> str:
    """A line that says how a network was trained, on which images, and for how long.

    Without `is_run` the network is not from a run of train.py, and only its weights are named.
    """
    if is_run:
        crops = "1 crop" if config.crops == 1 else f"{config.crops} crops"
        parts = [f"{config.loss.upper()} loss", f"{config.views} views", crops]
    elif config.weights == "none":
        parts = ["random weights"]
    else:
        parts = [f"weights {config.weights}"]
    parts.append(f"{config.image_size} px")
    parts.append(f"patch {config.patch_size}")
    if config.dataset == "stl10":
        parts.append("STL-10")
    elif config.digits != "auto":  # else it is shown no digits, but somebody's pictures
        parts.append({"mnist": "MNIST", "sklearn": "scikit-learn's digits"}[config.digits])
    if config.background != "black":
        parts.append(f"background {config.background}")
    if config.shortcut:
        parts.append(f"shortcut {config.shortcut:g}")
    if epoch is not None:
        parts.append(f"epoch {epoch} of {config.epochs}")
    return ", ".join(parts)


def write_metrics(results: list[dict], path: str):
    """Write metrics.json: the result of `evaluate`, or a list of several."""
    with open(path, "w") as file:
        json.dump(results if len(results) > 1 else results[0], file, indent=1)
