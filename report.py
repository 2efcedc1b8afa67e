"""A network evaluated as a whole; the table and the sentences that are printed.

`evaluate` computes all that metrics.json holds. A row of its tables is a map: attention, rollout,
or a baseline that understands nothing. A cell is a mean with its 95% interval. There is a table for
each layout of test canvases. In "matched", the one that counts, clutter lies where digits lie, so
that position says nothing; in "paper" digits lie more in the middle.
"""

import json
import math
import sys
import textwrap
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import metrics
import vit
import weights
from explain import Effects, Observation, observe, observe_effects
from settings import Config
from views import evaluation_batches, left_out_batches
from vit import VisionTransformer

TEST_IMAGES = 1000
BANK_IMAGES = 10_000  # training images that k-NN and the linear probe learn from
# The best head is chosen on these, and the curves over epochs are drawn from them.
VALIDATION_IMAGES = 512
VALIDATION_BANK = 512
# What validation keeps of each row: a line of the log holds these.
CURVES = ("selectivity", "auroc", "pointing", "entropy", "diversity", "patch_faithfulness")
# For weights that do not come from a run of train.py, metrics.json holds only these settings.
SHOWN = ("weights", "dataset", "split", "background", "digits", "canvas_size", "num_distractors")
SHOWN += ("distractor_size", "image_size", "data_root", "patch_size", "dim", "depth", "heads")
SHOWN += ("pos_size", "mlp_ratio", "registers", "antialias")
LINE_WIDTH = 100  # of the printed text, characters


# -------------------------------------------------------------------------- every map, every metric


def measure_attention(
    observation: Observation, effects: Effects | None = None, resamples: int = 1000
) -> dict:
    """Every metric of a network's attention, and of its baselines (section "How attention is
    measured" of the README).

    `effects` are of the first of the observed canvases. Returns {row: {metric: cell}}, where a cell
    is {"value", "low", "high", "images"}. The metrics are entropy; for networks diversity; for
    canvases those of `metrics.attention_metrics`, `of_oracle`, which is ln(selectivity) divided by
    that of the oracle, and, with `effects`, those of `metrics.faithfulness` and the difference of
    patch faithfulness to brightness on the same images.
    """
    has_masks = observation.digit is not None
    image_weights = metrics.bootstrap_weights(observation.index, resamples)
    values = {}  # {row: {metric: (n,)}}
    means = {}  # {row: {metric: (1 + resamples,)}}
    for row, maps in map_rows(observation).items():
        values[row] = measure_map(row, maps, observation, effects)
        means[row] = {
            name: metrics.weighted_means(value, image_weights)
            for name, value in values[row].items()
        }
        if has_masks:  # a ratio of two means
            means[row]["selectivity"] /= means[row]["clutter_density"]

    # Two metrics compare a row with another one, on the same resampled images.
    if has_masks:
        log_oracle = means["oracle"]["selectivity"].log()
        for row, row_means in means.items():
            values[row]["of_oracle"] = values[row]["selectivity"]  # to count the images
            row_means["of_oracle"] = row_means["selectivity"].log() / log_oracle
    if effects is not None:
        brightness = means["brightness"]["patch_faithfulness"]
        for row, row_means in means.items():
            name = "patch_faithfulness_less_brightness"
            values[row][name] = values[row]["patch_faithfulness"]  # to count the images
            row_means[name] = row_means["patch_faithfulness"] - brightness

    return {
        row: {
            name: metrics.interval_cell(means[row][name], values[row][name]) for name in values[row]
        }
        for row in values
    }


def map_rows(observation: Observation) -> dict[str, Tensor]:
    """The maps that are measured, {row: (n, patches)}, each summing to 1.

    `mean` is the mean of the heads of the network "trained", `head_1` and so on are its heads. The
    baselines are `brightness`, the summed intensity; `ink`, the same for all patches with any;
    `oracle`, the pixels of the digit; `shuffled`, the mean map of another image; `uniform`. The
    rows of other networks have their names.
    """
    heads = observation.attention["trained"]
    rows = {"mean": heads.mean(1)}
    for number, maps in enumerate(heads.unbind(1), 1):
        rows[f"head_{number}"] = maps
    if observation.rollout is not None:
        rows["rollout"] = observation.rollout
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
    row: str, maps: Tensor, observation: Observation, effects: Effects | None
) -> dict[str, Tensor]:
    """The metrics of one row's maps (n, patches), for each image: {metric: (n,)}."""
    values = {"entropy": metrics.entropy(maps.double())}
    if observation.digit is not None:
        values |= metrics.attention_metrics(
            maps, observation.digit, observation.clutter, observation.patch_area
        )
    if effects is not None:
        values |= metrics.faithfulness(maps[: len(effects.index)], effects)
    # Only whole networks have several heads whose maps can differ.
    network = "trained" if row == "mean" else row
    if network in observation.attention:
        values["diversity"] = metrics.diversity(observation.attention[network].double())
    return values


# ----------------------------------------------------------------------------- features and effects


def accuracy(
    bank: Observation, features, observed, network: str = "trained", classify=metrics.knn_classify
) -> dict:
    """The accuracy of classifying features (n, dim) by a network's features of a bank of images.

    The features are of the images of `observed` (Observation or Effects), which has their labels.
    Returns a cell.
    """
    predicted = classify(bank.features[network], bank.labels, features)
    is_correct = (predicted == observed.labels).double().where(~predicted.isnan(), torch.nan)
    means = metrics.weighted_means(is_correct, metrics.bootstrap_weights(observed.index))
    return metrics.interval_cell(means, is_correct)


def measure_effects(effects: Effects, bank: Observation) -> dict:
    """What `effects` say about a network as a whole.

    `causal_selectivity`: how far the feature moves if an ink pixel of the digit is left out,
    divided by how far it moves for one of a distractor. `attention_matters`: for each attention in
    the last block, its own, an even one, and that of another canvas, the cosine of the resulting
    feature with the original and its k-NN accuracy; and the mean cosine of two canvases for
    comparison.
    """
    image_weights = metrics.bootstrap_weights(effects.index)
    distance = effects.distances / effects.canvas_ink  # for each pixel of ink, (n, K)
    of_digit = distance[:, : effects.pieces].mean(1)
    of_distractors = distance[:, effects.pieces :].mean(1)
    ratio = metrics.weighted_means(of_digit, image_weights)
    ratio = ratio / metrics.weighted_means(of_distractors, image_weights)

    matters = {"two_canvases": metrics.mean_cosine(effects.features)}
    for name, features in (
        ("features", effects.features),
        ("even", effects.even_features),
        ("swapped", effects.swapped_features),
    ):
        cosine = (features * effects.features).sum(-1)
        means = metrics.weighted_means(cosine, image_weights)
        matters[name] = {
            "cosine": metrics.interval_cell(means, cosine),
            "knn": accuracy(bank, features, effects),
        }
    return {
        "causal_selectivity": metrics.interval_cell(ratio, of_digit),
        "attention_matters": matters,
    }


def measure_token_effects(observation: Observation) -> dict:
    """How much more the patches matter that attention, or rollout, points to than random ones.

    For photographs. Returns {"mean": cell, "rollout": cell} of the ratio of the mean effects.
    """
    effects = observation.token_effects
    image_weights = metrics.bootstrap_weights(observation.index)
    of_attention, of_rollout, of_random = metrics.weighted_means(effects, image_weights).T
    return {
        "mean": metrics.interval_cell(of_attention / of_random, effects[:, 0]),
        "rollout": metrics.interval_cell(of_rollout / of_random, effects[:, 0]),
    }


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
) -> Evaluation:
    """Measure a network on test images. `name` is for metrics.json and the printed report.

    `history` are the lines of its log if it comes from a run of train.py, else None. A network with
    a history is measured beside itself before its first step. An `other` network may be compared
    too. `splits` are those of `data.load_dataset`.
    """
    result = describe_checkpoint(name, config, history)
    device = backbone.cls_token.device
    networks = {"trained": backbone}
    if history:
        untrained = untrained_backbone(config)
        if untrained is not None:
            networks["untrained"] = untrained.to(device)
    bank_networks = dict(networks)
    if other is not None:
        networks["other_network"] = other.to(device)

    has_masks = config.dataset != "stl10"
    if has_masks:
        result["best_head"] = best_head(config, backbone, splits)
        count = effect_images(backbone, config.image_size)
        effects = observe_effects(backbone, left_out_batches(config, splits["test"], count))
    # Features and their accuracy are those of the last layout.
    for layout in ["matched", "paper"] if has_masks else ["photographs"]:
        batches = evaluation_batches(config, splits["test"], TEST_IMAGES, layout)
        observation = observe(networks, batches, with_rollout=True)
        layout_effects = effects if layout == "matched" else None
        result[layout] = measure_attention(observation, layout_effects)

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

    if has_masks:
        result |= measure_effects(effects, bank)
    else:
        result["token_effect"] = measure_token_effects(observation)
    features = observation.features["trained"]
    result["mean_cosine"] = metrics.mean_cosine(features)
    return Evaluation(result, features, observation.labels)


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


def effect_images(backbone: VisionTransformer, image_size: int) -> int:
    """How many canvases to try changes on: each takes a forward pass for every patch with ink."""
    shape = backbone.shape
    patches = (image_size // shape.patch_size) ** 2
    work = shape.depth * (shape.dim * patches) ** 2
    # This comes to 1,000 canvases for the laptop preset; for ViT-S/8 at 224 px to some 180 on a GPU
    # and 20, the least, on a CPU.
    affordable = 2e14 if backbone.cls_token.is_cuda else 3e11
    return int(min(TEST_IMAGES, max(20, affordable / work)))


# -------------------------------------------------------------------------------------- validation


def validation_batches(config: Config, splits: dict):
    """Validation images, the same for every run, and a bank of training images for k-NN."""
    held_out = evaluation_batches(
        config, splits["validation"], VALIDATION_IMAGES, split_name="validation"
    )
    bank_split = splits.get("bank", splits["train"])
    bank = evaluation_batches(config, bank_split, VALIDATION_BANK, split_name="train")
    return held_out, bank


def validate(observation: Observation, bank: Observation, effects: Effects | None = None) -> dict:
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
    the mean of a DINO teacher's distributions has hardly more entropy than each of them. While the
    learning rate rises there is no warning.
    """
    # warmup is a fraction of the run
    if history[-1]["epoch"] < config.warmup * config.epochs:
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


# ----------------------------------------------------------------------------------- the sentences


def format_cell(cell: dict | None, with_interval: bool = True) -> str:
    """A cell as text, such as "1.91 [1.85, 1.97]"."""
    if cell is None or cell["value"] is None:
        return "–"
    if with_interval and cell["low"] is not None:
        return "{value:.2f} [{low:.2f}, {high:.2f}]".format(**cell)
    return "{value:.2f}".format(**cell)


def is_above(table: dict, row: str, reference: str, metric: str = "selectivity") -> bool:
    """Whether a row's metric is above another's: their intervals, as printed, do not touch."""
    low = table[row][metric]["low"]
    high = table[reference][metric]["high"]
    return low is not None and high is not None and round(low, 2) > round(high, 2)


def verdict(result: dict) -> str:
    """Where the network looks, in a few sentences."""
    if "matched" not in result:
        text = "These are photographs: there are no masks to measure attention against."
        return f"{text} {as_sentence(result['collapse'])}" if result["collapse"] else text
    question = "Does it look at the digit, or just at anything bright?"
    if result["collapse"]:
        return f"{question} At neither. {as_sentence(result['collapse'])}"
    table = result["matched"]
    selectivity = table["mean"]["selectivity"]
    if selectivity["value"] is None:
        return f"{question} This cannot be told: no canvas has both a digit and clutter."

    brightness = table["brightness"]["selectivity"]["value"]
    density = table["mean"]["digit_density"]
    beats_brightness = is_above(table, "mean", "brightness")
    beats_position = is_above(table, "mean", "shuffled")  # the network's maps of other images
    looks_at_digit = False
    if density["high"] < 1:
        answer = (
            f"At neither: attention avoids the ink; it is {density['value']:.2f} times as dense on "
            f"the digit as on the whole image."
        )
    elif beats_brightness and beats_position:
        looks_at_digit = True
        answer = "At the digit."
    elif selectivity["high"] < 1:
        answer = "At the clutter more than at the digit."
    elif beats_position:
        answer = (
            "At anything bright: attention is not clearly more selective than brightness alone."
        )
    else:
        answer = "Attention is not clearly more selective than position alone explains."
    text = (
        f"{question} {answer} Attention is {selectivity['value']:.2f} times as dense on the digit "
        f"as on the clutter; brightness alone would give {brightness:.2f}."
    )
    if looks_at_digit and not is_above(table, "mean", "brightness", "auroc"):
        text += " By auroc, which compares ranks only, it is not above brightness."

    head = result["best_head"]
    head_does = is_above(table, head, "brightness") and is_above(table, head, "shuffled")
    if head_does and not looks_at_digit:
        cell = format_cell(table[head]["selectivity"])
        text += f" But {head.replace('_', ' ')} on its own does look at the digit: {cell}."
    return text


def as_sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def explanation(result: dict) -> str:
    """Whether the feature depends on what attention points to, in a few sentences."""
    if "matched" not in result:
        effect = result["token_effect"]
        return (
            f"Removing the most-attended 20% of the patches changes the feature "
            f"{format_cell(effect['mean'])} times as much as removing a random 20%; with rollout "
            f"in place of attention it is {format_cell(effect['rollout'])} times."
        )
    table = result["matched"]
    difference = table["mean"]["patch_faithfulness_less_brightness"]
    if (difference["low"] or 0) > 0:
        comparison = "better than"
    elif (difference["high"] or 0) < 0:
        comparison = "less well than"
    else:
        comparison = "about as well as"
    attention = table["mean"]["patch_faithfulness"]
    brightness = table["brightness"]["patch_faithfulness"]
    rollout = table["rollout"]["patch_faithfulness"]
    matters = result["attention_matters"]
    even = matters["even"]
    return (
        f"Does the feature depend on what attention points to? Within one image, attention "
        f"predicts which patches matter {comparison} brightness does: the rank correlation with "
        f"the effect of blackening a patch is {format_cell(attention)} for attention, "
        f"{format_cell(brightness)} for brightness, and {format_cell(rollout)} for rollout "
        f"({attention['images']:,} canvases). Leaving out an ink pixel of the digit moves the "
        f"feature {format_cell(result['causal_selectivity'])} times as far as leaving out one of a "
        f"distractor. With even attention in the last block, the feature's cosine with the "
        f"original is {even['cosine']['value']:.2f} (two different canvases: "
        f"{matters['two_canvases']:.2f}), and k-NN accuracy is {even['knn']['value']:.1%}."
    )


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
    else:
        names = {"mnist": "MNIST", "sklearn": "scikit-learn's digits", "auto": "digits"}
        parts.append(names[config.digits])
    if config.background != "black":
        parts.append(f"background {config.background}")
    if epoch is not None:
        parts.append(f"epoch {epoch} of {config.epochs}")
    return ", ".join(parts)


def epoch_text(config: Config, line: dict) -> str:
    """The printed line of an epoch."""
    validation = line["validation"]
    parts = [f"loss {line['loss']:.3f}"]
    selectivity = validation["mean"].get("selectivity")
    if selectivity:  # photographs have none
        parts.append(f"selectivity {selectivity:.2f}")
    parts.append(f"mean cosine {validation['mean_cosine']:.2f}")
    if config.loss == "dino":
        parts.append(f"teacher's mean entropy {validation['mean_entropy']:.2f} ln K")
        parts.append(f"entropy of its mean {validation['entropy_of_mean']:.2f} ln K")
    minutes_left = (config.epochs - line["epoch"]) * line["seconds"] / 60
    parts.append(f"{line['images_per_second']:.0f} images/s")
    parts.append(f"{minutes_left:.1f} minutes left")
    return f"epoch {line['epoch']}/{config.epochs}: {', '.join(parts)}"


# ------------------------------------------------------------------------------- the printed table


@dataclass(frozen=True)
class Column:
    """A column of the printed table."""

    group: str  # what stands above the title, over this column and those after it
    title: str
    metric: str
    width: int
    with_interval: bool = False


# With the names of the rows they are 100 characters wide: a new column takes the place of another.
COLUMNS = [
    Column("", "selectivity", "selectivity", 18, with_interval=True),
    Column("of", "oracle", "of_oracle", 8),
    Column("", "auroc", "auroc", 7),
    Column("faithfulness, by", "patches", "patch_faithfulness", 21, with_interval=True),
    Column("", "objects", "object_faithfulness", 8),
    Column("density on", "digit", "digit_density", 7),
    Column("", "clutter", "clutter_density", 8),
    Column("", "far", "far_background_density", 4),
]
ROW_WIDTH = 19  # of the first column, with the names of the rows
# Rows of the table when several networks are compared.
COMPARED_ROWS = ("mean", "rollout", "brightness", "other_network")
HIDDEN_ROWS = ("uniform", "oracle")  # their numbers follow from their definition
# Settings that decide which images a network sees; they may differ when networks are compared.
IMAGE_SETTINGS = ("dataset", "image_size", "patch_size", "canvas_size", "num_distractors")
IMAGE_SETTINGS += ("background", "digits")


def write_metrics(results: list[dict], path: str):
    """Write metrics.json: the result of `evaluate`, or a list of several."""
    with open(path, "w") as file:
        json.dump(results if len(results) > 1 else results[0], file, indent=1)


def format_report(results: list[dict], path: str) -> str:
    """The printed text: for each network the sentences, then one table; `path` is metrics.json."""
    lines = []
    for number, result in enumerate(results, 1):
        label = f"[{number}] " if len(results) > 1 else ""
        lines += network_lines(result, label)
    different = [
        name
        for name in IMAGE_SETTINGS
        if len({str(result["settings"].get(name)) for result in results}) > 1
    ]
    if different:
        lines.append(
            f"The networks differ in {', '.join(different)}; each is measured on its own images."
        )
    lines.append("")
    lines += table_lines(results)
    lines.append("")
    lines.append(f"All metrics are in {path}; the README says what each of them means.")
    return "\n".join(lines)


def network_lines(result: dict, label: str) -> list[str]:
    """What is said about one network."""
    heading = f"{label}{result['checkpoint']}: {result['description']}"
    lines = []
    for text in (heading, verdict(result), explanation(result)):
        lines += textwrap.wrap(text, LINE_WIDTH)
    for key in ("features", "untrained_features"):
        if key in result:
            knn = format_percent(result[key]["knn"])
            probe = format_percent(result[key]["linear_probe"])
            name = key.replace("_", " ")
            lines.append(f"accuracy of {name}: k-NN {knn}, linear probe {probe}")
    return lines


def format_percent(cell: dict) -> str:
    return "–" if cell["value"] is None else f"{cell['value']:.1%}"


def table_lines(results: list[dict]) -> list[str]:
    """The table of all networks' rows, with its headings."""
    tables = [result.get("matched") or result["photographs"] for result in results]
    count = tables[-1]["mean"]["entropy"]["images"]
    images = "canvases in the matched layout" if "matched" in results[-1] else "photographs"
    groups = "".join(f"{column.group:{column.width}}" for column in COLUMNS)
    titles = "".join(f"{column.title:{column.width}}" for column in COLUMNS)
    lines = [
        f"attention to {count:,} test images, {images} [95% interval]",
        f"{'':{ROW_WIDTH}}{groups}".rstrip(),
        f"{'':{ROW_WIDTH}}{titles}".rstrip(),
    ]
    for number, (result, table) in enumerate(zip(results, tables), 1):
        label = f"[{number}] " if len(results) > 1 else ""
        best = result.get("best_head")
        for row, cells in table.items():
            is_compared = row in COMPARED_ROWS or row == best
            if row in HIDDEN_ROWS or (label and not is_compared):
                continue
            title = label + row.replace("_", " ")
            if row == best:
                title += " (best)"
            texts = [
                f"{format_cell(cells.get(column.metric), column.with_interval):{column.width}}"
                for column in COLUMNS
            ]
            lines.append(f"{title:{ROW_WIDTH}}{''.join(texts)}".rstrip())
    return lines
