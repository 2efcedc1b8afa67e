"""explorer.html: a page in which one looks at maps, moves the digit, and erases patches.

The page is one file, which needs neither a server nor a network. Its template, explorer.html beside
this file, holds the program; this module writes the data into it. A small network runs in the page,
so its weights are among them. Of a large network the page holds what was computed here.
"""

import base64
import json
import math
import os
import zlib
from dataclasses import replace

import numpy as np
import torch
from matplotlib import colormaps
from torch import Tensor

import clutter
import effects
import explain
import metrics
import report
import views
from gallery import Example, LookedAt, MapsOfExample, Model
from vit import VisionTransformer

TEMPLATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "explorer.html")
MOST_WEIGHTS = 8_000_000  # bytes of the weights of a network that runs in the page
MOST_MULTIPLICATIONS = (
    100_000_000  # of a forward pass there, which then takes a quarter of a second
)
# Characters of the attention of patches, which is what makes the page of a large network large.
MOST_ATTENTION = 12_000_000
FRAGMENTS = 24  # pieces of clutter that the reader can add

# What each map shows, in a sentence.
MAP_HELP = {
    "attention": "How much of its attention a token gives to each patch.",
    "rollout": "Attention of [CLS], followed back through all blocks and residual connections.",
    "norm_rollout": "Rollout in which a token counts by the size of the vector that it passes on.",
    "squared_gradient": "How strongly the feature reacts to small changes of each patch’s pixels.",
    "brightness": "How bright each patch is. This knows nothing of the network.",
    "contrast": "How much the grey levels vary in each patch. This knows nothing of the network.",
    "centre": "A fixed map that is highest in the middle. This knows nothing of the network.",
    "random": "Noise. This knows nothing of the network or the picture.",
    "effect": "How much the feature changes if the patch is blackened: what the network does depend "
    "on.",
}
EFFECT_OF_WINDOW = (
    "How much the feature changes if the patch’s window is left out: what the network does depend "
    "on. The picture is divided into at most 64 windows of patches."
)
# What the columns of the table mean.
METRIC_HELP = {
    "equal_ink": "Of two patches whose summed brightness differs by at most 5%, how often does the "
    "one with more of the map have the larger effect? Chance is .5.",
    "patch_faithfulness": "The rank correlation of the map with the effect, over the patches of an "
    "image: 1 if the map puts them in the right order, 0 if it knows nothing.",
    "object_faithfulness": "The rank correlation of the map with the effect, over whole pieces of "
    "clutter, each left out in turn.",
    "direct_faithfulness": "The rank correlation of the map with the direct effect: what a patch "
    "does through its own token alone, at the input of the last block.",
    "selectivity": "How many times as dense the map is on the digit as on the clutter. 1: alike.",
    "auroc": "How often a pixel of the digit gets more of the map than a pixel of clutter. Chance "
    "is .5.",
    "srg": "Patches are left out, those with most of the map first or those with least first. The "
    "symmetric relevance gain is the gap between the two curves of the feature’s cosine.",
}
# What the last column and the rows of the table mean.
PASSES_HELP = "What the map costs: how often an image goes through the network, forward or back."
ROW_HELP = MAP_HELP | {
    "attention": "Of [CLS] in the last block, the mean of the heads.",
    "shuffled": "The network’s attention to another image: what position alone gives.",
    "other_network": "The attention of the next network on this page, tested against the effects of "
    "this one.",
}
HEADING_HELP = "The same network with the weights that it started from, and its own effects."
# Other words of the page.
WORDS = {
    "patch": "The picture is cut into squares. Each becomes a token of the network.",
    "[CLS]": "A token that stands for no patch. Its last state is the feature.",
    "register": "A learned token that stands for no patch and that nothing is read from.",
    "feature": "What the network makes of the whole picture: the direction of a vector.",
    "cosine": "How alike two features are. 1: the same.",
    "attention": "In each block and head, every token takes a mean of all tokens, weighted by its "
    "attention.",
    "effect": "1 − cosine of the feature before and after a patch is blackened or left out. Nothing "
    "is estimated: the network looks again.",
    "ink": "A pixel brighter than half of white. A patch without ink is not blackened.",
    "[low, high]": "A 95% interval over the images, for this one network.",
    "(selective)": "The most selective head, chosen on validation canvases.",
    "k-NN, linear probe": "Two classifiers that learn from the feature: how much it knows of the "
    "class.",
}

MARK_MEANING = (
    "The grey square on each canvas, which some networks were trained with (--shortcut). It is drawn "
    "as a piece of clutter, and all of it counts as ink. “− clutter” removes it first."
)


# ------------------------------------------------------------------------------- arrays in the page


def packed(values, kind: str) -> dict:
    """An array for the page, compressed, in base64; `kind` is "u8", "u16" or "f32"."""
    dtype = {"u8": "<u1", "u16": "<u2", "f32": "<f4"}[kind]
    array = np.ascontiguousarray(torch.as_tensor(values).detach().cpu().numpy(), dtype)
    data = base64.b64encode(zlib.compress(array.tobytes(), 6)).decode()
    return {"type": kind, "data": data}


def packed_layer(layer: torch.nn.Module) -> list[dict]:
    """[weight, bias] of a linear layer or a layer norm."""
    return [packed(layer.weight, "f32"), packed(layer.bias, "f32")]


def packed_rows(maps: Tensor) -> dict:
    """Maps (…, patches) as 8-bit shares of their own maximum: {values, maxima}."""
    maxima = maps.amax(-1, keepdim=True)
    shares = maps / maxima.clamp(min=torch.finfo(maps.dtype).tiny)
    values = packed((255 * shares.clamp(0, 1)).round(), "u8")
    return {"values": values, "maxima": packed(maxima, "f32")}


def characters(content) -> int:
    """How long a part of the page is."""
    return len(json.dumps(content))


# --------------------------------------------------------------------- a network that runs in the page


def runs_in_page(backbones: list[VisionTransformer], examples: list[Example]) -> bool:
    """Whether networks are small enough, together, for their weights to be written into the page.

    They must also be fast enough for the largest picture. The page knows no rotary positions.
    """
    if any(backbone.shape.rotary for backbone in backbones):
        return False
    count = sum(weight.numel() for backbone in backbones for weight in backbone.parameters())
    patch_size = backbones[0].shape.patch_size
    patches = max(math.prod(metrics.patch_grid(one.picture, patch_size)) for one in examples)
    is_fast = multiplications(backbones[0], patches) <= MOST_MULTIPLICATIONS
    return 4 * count <= MOST_WEIGHTS and is_fast


def multiplications(backbone: VisionTransformer, patches: int) -> int:
    """How many multiplications a forward pass takes in the blocks."""
    shape = backbone.shape
    tokens = 1 + shape.registers + patches
    linear_layers = (4 + 2 * shape.mlp_ratio) * tokens * shape.dim**2
    attention = 2 * tokens**2 * shape.dim
    return shape.depth * (linear_layers + attention)


@torch.no_grad()
def packed_weights(model: Model, examples: list[Example]) -> dict:
    """The weights of a network, by the names that the page uses.

    ImageNet's normalization of the pixels is folded into the embedding, since
    W · (x − mean) / std + b is linear in x. The three channels of a grey picture are the same, so
    their weights are added.
    """
    backbone = model.backbone
    shape = backbone.shape
    proj = backbone.patch_embed.proj
    kernel = proj.weight.cpu() / views.STD  # (dim, 3, patch_size, patch_size)
    bias = proj.bias.cpu() - (kernel * views.MEAN).sum((1, 2, 3))
    channels = examples[0].picture.shape[0]
    if channels == 1:
        kernel = kernel.sum(1)

    first = [backbone.cls_token[0] + backbone.pos_embed[0, :1]]
    if shape.registers:
        first.append(backbone.register_tokens[0])
    content = {
        "dim": shape.dim,
        "heads": shape.heads,
        "patch": shape.patch_size,
        "embed": [packed(kernel.flatten(1), "f32"), packed(bias, "f32")],
        "first": packed(torch.cat(first), "f32"),
        "positions": {},
        "blocks": [packed_block(block) for block in backbone.blocks],
        "norm": packed_layer(backbone.norm),
    }
    grids = {metrics.patch_grid(example.picture, shape.patch_size) for example in examples}
    for grid in grids:
        positions = backbone.interpolate_pos_encoding(grid)
        content["positions"][grid_name(grid)] = packed(positions, "f32")
    if examples[0].masks:
        content["side"] = model.config.image_size
        content["resize"] = packed(resize_matrix(model), "f32")
    return content


def packed_block(block) -> dict:
    return {
        "norm1": packed_layer(block.norm1),
        "qkv": packed_layer(block.attn.qkv),
        "proj": packed_layer(block.attn.proj),
        "norm2": packed_layer(block.norm2),
        "fc1": packed_layer(block.mlp.fc1),
        "fc2": packed_layer(block.mlp.fc2),
    }


def grid_name(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]}"


def resize_matrix(model: Model) -> Tensor:
    """R (image_size, canvas_size), such that `views.resize` of a canvas is R · canvas · Rᵀ.

    Its column k is what becomes of a canvas whose row k is white; all columns of the result are
    equal.
    """
    size = model.config.canvas_size
    white_rows = torch.eye(size)[:, None, :, None].expand(-1, 1, -1, size).contiguous()
    resized = views.resize(white_rows, model.config.image_size)  # (size, 1, I, I)
    middle = resized.shape[-1] // 2
    return resized[:, 0, :, middle].T


# ------------------------------------------------------------------------------------ the canvases


def canvas_scenes(model: Model, count: int) -> list[dict]:
    """What the first canvases of the test split are made of, for the page to render and change."""
    config = model.config
    split = model.splits["test"]
    params = next(views.evaluation_params(config, split, count, "matched", "test"))
    images = split.images.cpu()
    pieces = clutter.cut_windows(
        images, params["source"], params["window"], config.distractor_size
    )  # (count, 1, distractors, size, size)
    backgrounds = [None] * count
    if config.background != "black":
        background = clutter.Background(config, torch.device("cpu"))
        black = torch.zeros(count, 1, config.canvas_size, config.canvas_size)
        backgrounds = [packed(one, "f32") for one in background.put_behind(black, params)]

    marks = [[] for _ in range(count)]
    if model.has_marks:
        marks = marks_of_scenes(model, count)

    scenes = []
    for row in range(count):
        number = int(params["digit"][row])
        fragments = [
            {"pixels": packed(piece, "u8"), "at": corner.tolist(), "level": None}
            for piece, corner in zip(pieces[row, 0], params["corner"][row, 0])
        ]
        scenes.append(
            {
                "size": config.canvas_size,
                "digit": {
                    "label": int(split.labels[number]),
                    "pixels": packed(images[number], "u8"),
                    "at": params["position"][row, 0].tolist(),
                },
                "clutter": fragments + marks[row],
                "background": backgrounds[row],
            }
        )
    return scenes


def marks_of_scenes(model: Model, count: int) -> list[list[dict]]:
    """The mark of each of the first test canvases, as a piece of clutter with a level in [0, 1]."""
    params = views.evaluation_marks(model.config, count, 0, "test")
    square = packed(torch.zeros(clutter.MARK_SIZE, clutter.MARK_SIZE), "u8")  # only its size counts
    levels = params["mark_level"].tolist()
    corners = params["mark_corner"][:, 0].tolist()
    return [
        [{"pixels": square, "at": corner, "level": level}] for corner, level in zip(corners, levels)
    ]


def digits_to_choose(model: Model) -> list[dict]:
    """A digit of each class, the first of the test split."""
    split = model.splits["test"]
    labels = split.labels.cpu()
    images = split.images.cpu()
    digits = []
    for label in labels.unique().tolist():
        number = (labels == label).nonzero()[0, 0]
        digits.append({"label": label, "pixels": packed(images[number], "u8")})
    return digits


def fragments_to_add(model: Model) -> list[dict]:
    """Pieces of clutter: those of the first canvases, one of each."""
    config = model.config
    if config.num_distractors == 0:
        return []
    split = model.splits["test"]
    params = next(views.evaluation_params(config, split, FRAGMENTS, "matched", "test"))
    source = params["source"][:, :, :1]
    window = params["window"][:, :, :1]
    pieces = clutter.cut_windows(split.images.cpu(), source, window, config.distractor_size)
    return [packed(piece, "u8") for piece in pieces[:, 0, 0]]


# ----------------------------------------------------------------- the attention of a large network


def packed_attention(backbone: VisionTransformer, picture: Tensor, budget: int) -> dict:
    """The attention of a picture's tokens, in at most `budget` characters if that is possible.

    To stay within it, only every patch, or one in 2 × 2, and so on, is kept as a query. The mean of
    the heads takes less room than the heads, so more queries are kept of it.
    """
    images = picture[None].to(backbone.cls_token.device)
    grid = metrics.patch_grid(images, backbone.shape.patch_size)
    of_tokens, of_patches = explain.token_attention(backbone, images)
    of_patches = of_patches[0].unflatten(1, grid)  # (heads, rows, columns, patches)
    for mean_stride, head_stride in ((1, 1), (1, 2), (1, 3), (2, 3), (2, 4), (4, 8), (8, 16)):
        patches = {
            "mean": packed_queries(of_patches.mean(0, keepdim=True), mean_stride),
            "heads": packed_queries(of_patches, head_stride),
        }
        if characters(patches) <= budget:
            break
    return {"tokens": packed_rows(of_tokens[0]), "patches": patches}


def packed_queries(attention: Tensor, stride: int) -> dict:
    """Attention (heads, rows, columns, patches) of one patch in each square of stride × stride."""
    _, rows, columns, _ = attention.shape
    kept_rows = list(range(min(stride // 2, rows - 1), rows, stride))
    kept_columns = list(range(min(stride // 2, columns - 1), columns, stride))
    content = packed_rows(attention[:, kept_rows][:, :, kept_columns])
    return content | {"stride": stride, "rows": kept_rows, "columns": kept_columns}


# ------------------------------------------------------------------------------- a network's content


def network_content(
    model: Model, epochs: dict[str, LookedAt], result: dict | None, networks: int = 1
) -> dict:
    """What the page shows of a network, as it was after one or several epochs, {label: …}.

    `result` is that of the report; None if the network was not measured. `networks` share the page.
    """
    examples = list(epochs.values())[-1].examples
    shape = model.backbone.shape
    is_live = runs_in_page([of_epoch.model.backbone for of_epoch in epochs.values()], examples)
    has_scenes = is_live and bool(examples[0].masks)
    budget = MOST_ATTENTION // (networks * len(epochs) * len(examples))  # of each picture
    return {
        "name": model.name,
        "description": description(model, len(epochs)),
        "measured_on": measured_on(result, model),
        "sentences": report.sentences(result) if result else [],
        "table": table_content(result) if result else None,
        "shape": {
            "heads": shape.heads,
            "depth": shape.depth,
            "registers": shape.registers,
            "patch": shape.patch_size,
        },
        # of squared gradients, one direction after the other
        "directions": packed(explain.random_directions(shape.dim), "f32") if is_live else None,
        "pictures": [picture_content(example, model, is_live) for example in examples],
        "has_marks": model.has_marks and bool(examples[0].masks),
        "scenes": canvas_scenes(model, len(examples)) if has_scenes else [],
        "digits": digits_to_choose(model) if has_scenes else [],
        "fragments": fragments_to_add(model) if has_scenes else [],
        "epochs": [
            epoch_content(label, of_epoch, is_live, budget) for label, of_epoch in epochs.items()
        ],
    }


def description(model: Model, epochs: int) -> str:
    """What the network is; without its epoch if the page shows several."""
    if epochs > 1:
        model = replace(model, epoch=None)
    return model.describe()


def measured_on(result: dict | None, model: Model) -> str:
    """On which images the report was made."""
    if result is None:
        return "No report was made on these maps."
    count = max(cell["images"] for cell in report.measured_table(result)["mean"].values())
    if "matched" in result:
        text = f"On {count:,} test canvases; the pictures above are the first of them"
        if not model.has_marks:
            return f"{text}."
        return f"{text}. Except for what is said about the shortcut, they had no marks."
    if "features" in result:
        return f"On {count:,} test photographs; the pictures above are the first of them."
    return "On the pictures above."


def picture_content(example: Example, model: Model, is_live: bool) -> dict:
    """A picture and its masks. If the network runs in the page, the page renders those of canvases."""
    channels, height, width = example.picture.shape
    patch_size = model.backbone.shape.patch_size
    content = {
        "name": example.name,
        "size": [height, width],
        "channels": channels,
        "grid": list(metrics.patch_grid(example.picture, patch_size)),
        "pixels": None,
        "masks": None,
        "has_ink": None,
        "scene": None,
    }
    if example.masks and is_live:
        return content
    # 16 bits where the page computes with the pixels
    if is_live:
        content["pixels"] = packed((65535 * example.picture).round(), "u16")
    else:
        content["pixels"] = packed((255 * example.picture).round(), "u8")
    if example.masks:
        digit_mask, clutter_mask = example.masks
        content["masks"] = {
            "digit": packed(digit_mask, "u8"),
            "clutter": packed(clutter_mask, "u8"),
            "height": height,
            "width": width,
        }
        has_ink = metrics.patch_sums((digit_mask | clutter_mask)[None].cpu(), patch_size) > 0
        content["has_ink"] = packed(has_ink, "u8")
    return content


def epoch_content(label: str, network: LookedAt, is_live: bool, budget: int) -> dict:
    """What a network made of the examples after an epoch."""
    backbone = network.model.backbone
    pictures = []
    for example, of_example in zip(network.examples, network.maps):
        attention = None
        if not is_live:
            attention = packed_attention(backbone, example.picture, budget)
        pictures.append({"maps": maps_content(of_example), "attention": attention})
    return {
        "label": label,
        "net": packed_weights(network.model, network.examples) if is_live else None,
        "two_pictures": mean_cosine(network),
        "pictures": pictures,
    }


def maps_content(of_example: MapsOfExample) -> list[dict]:
    """The maps of one picture, with their rank correlations with the effect where they have one.

    The heads are left out, since the page has them from the attention.
    """
    contents = []
    for name, values in of_example.maps.items():
        if name.startswith("head "):
            continue
        content = {"name": name, "values": packed(values, "f32")}
        if name in of_example.correlations:
            correlation = of_example.correlations[name]
            content["correlation"] = None if math.isnan(correlation) else correlation
        contents.append(content)
    return contents


@torch.no_grad()
def mean_cosine(network: LookedAt) -> float | None:
    """The mean cosine over all pairs of pictures; None if there is only one.

    Raises FloatingPointError if a feature is not finite.
    """
    backbone = network.model.backbone
    device = backbone.cls_token.device
    pictures = [example.picture[None].to(device) for example in network.examples]
    features = torch.cat([effects.feature_of(backbone, picture) for picture in pictures])
    if not features.isfinite().all():
        raise FloatingPointError(f"{network.model.name}: the feature is NaN or infinite")
    count = len(features)
    if count < 2:
        return None
    total = features.sum(0).square().sum() - count  # the cosines with themselves are 1
    return (total / (count * (count - 1))).item()


def table_content(result: dict) -> dict:
    """The table of the report, with the meaning of each column and of the maps' rows."""
    columns = report.columns_of(result)
    headings = []
    group = ""
    for column in columns:
        group = column.group or group  # it stands over the columns after it too
        explanation = METRIC_HELP[column.metric]
        headings.append({"group": group, "text": column.title, "help": explanation})
    headings.append({"group": "", "text": "passes of the network", "help": PASSES_HELP})
    rows = []
    for row in report.table_rows(columns, result):
        if row.is_heading:
            rows.append({"text": row.title, "help": HEADING_HELP, "cells": []})
        else:
            explanation = ROW_HELP.get(row.name, "")
            cells = [*row.cells, row.passes]
            rows.append({"text": row.title, "help": explanation, "cells": cells})
    return {"columns": headings, "rows": rows}


# ---------------------------------------------------------------------------------------- the page


def write_page(networks: list[dict], path: str, notes: list[str] = ()):
    """Write the page of one or several networks, see `network_content`.

    `notes` say what was left out, beside the attention of patches.
    """
    scenes, networks = shared_scenes(networks)
    grids = {tuple(picture["grid"]) for network in networks for picture in network["pictures"]}
    windows = {grid_name(grid): packed(effects.window_of_patches(grid), "u16") for grid in grids}
    colors = (255 * colormaps["inferno"](np.arange(256))[:, :3]).round()
    content = {
        "networks": networks,
        "scenes": scenes,
        "windows": windows,
        "colors": packed(colors, "u8"),
        "help": MAP_HELP | {"effect_of_window": EFFECT_OF_WINDOW},
        "glossary": glossary(networks),
        "notes": [*attention_notes(networks), *notes],
    }
    # In a script element only "<" could end it; in JSON it may be written by its number.
    text = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    with open(TEMPLATE, encoding="utf-8") as file:
        before, after = file.read().split(">DATA<")
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"{before}>{text}<{after}")


def glossary(networks: list[dict]) -> list[dict]:
    """The words of the page and what they mean: those of its maps and tables, and others."""
    meanings = dict(WORDS)
    if any(network["has_marks"] for network in networks):
        meanings["mark"] = MARK_MEANING
    for network in networks:
        for entry in network["epochs"][-1]["pictures"][0]["maps"]:
            name = entry["name"]
            if name not in meanings:
                meanings[name.replace("_", " ")] = MAP_HELP[name]
        if network["table"]:
            for column in network["table"]["columns"]:
                meanings[column["text"]] = column["help"]
    return [{"term": term, "text": text} for term, text in meanings.items()]


def shared_scenes(networks: list[dict]) -> tuple[list[dict], list[dict]]:
    """All different scenes, and the networks, whose pictures name theirs by its number.

    Networks that are shown the same canvases share their scenes, so that what the reader changes
    stays changed when another network is chosen.
    """
    numbers = {}  # of scenes, by their text
    scenes = []
    changed = []
    for network in networks:
        pictures = [dict(picture) for picture in network["pictures"]]
        for picture, scene in zip(pictures, network["scenes"]):
            text = json.dumps(scene)
            if text not in numbers:
                numbers[text] = len(scenes)
                scenes.append(scene)
            picture["scene"] = numbers[text]
        changed.append(network | {"pictures": pictures, "scenes": None})
    return scenes, changed


def attention_notes(networks: list[dict]) -> list[str]:
    """What was left out of the attention of large networks."""
    notes = []
    for network in networks:
        stacks = [picture["attention"] for picture in network["epochs"][-1]["pictures"]]
        if stacks[0] is None:
            continue
        name = f"For {network['name']}, this" if len(networks) > 1 else "This"
        mean = max(stack["patches"]["mean"]["stride"] for stack in stacks)
        heads = max(stack["patches"]["heads"]["stride"] for stack in stacks)
        note = (
            f"{name} page holds the attention of [CLS] and registers in all blocks, and that of "
            f"{every(mean)} in the last block"
        )
        if heads > mean:
            note += f" (each head: {every(heads)})"
        if heads > 1:
            note += ". The nearest one is shown for the others"
        notes.append(f"{note}. Attention is rounded to 1/255 of its maximum.")
    return notes


def every(stride: int) -> str:
    if stride == 1:
        return "every patch"
    return f"one patch in {stride} × {stride}"
