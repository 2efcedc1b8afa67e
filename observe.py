"""What networks make of evaluation images, gathered batch by batch: attention, maps, effects.

The tensors in its dataclasses are on the CPU, with one row for each of n images. metrics.py turns
them into numbers, and evaluate.py into tables.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from tqdm import tqdm

import effects
import metrics
from explain import MAPS, cls_attention
from metrics import patch_sums
from views import EvaluationBatch
from vit import VisionTransformer

# -------------------------------------------------------------------------- attention and features


@dataclass
class Observation:
    """Attention and features of networks.

    The last three fields are None for photographs, or if only features were observed.
    """

    labels: torch.Tensor  # (n,) int64
    index: torch.Tensor  # (n,) int64, the source image in its split; several canvases may share one
    features: dict[str, torch.Tensor]  # {network: (n, dim)}, L2-normalized
    attention: dict[str, torch.Tensor]  # {network: (n, heads, patches)}
    patch_area: int  # pixels of a patch
    digit: torch.Tensor | None = None  # (n, patches), pixels of the digit in each patch
    clutter: torch.Tensor | None = None  # (n, patches)
    intensity: torch.Tensor | None = None  # (n, patches), summed over a patch, images in [0, 1]


@torch.no_grad()
def observe(
    networks: dict[str, VisionTransformer], batches: Iterable[EvaluationBatch], maps: bool = True
) -> Observation:
    """Attention and features of each network, in one pass over evaluation images.

    One of the `networks` is called "trained". Without `maps` only features are observed. Raises
    FloatingPointError if a feature or an attention is not finite.
    """
    trained = networks["trained"]
    patch_size = trained.shape.patch_size
    device = trained.cls_token.device
    parts = []
    for batch in progress(batches, "measuring"):
        images = batch.images.to(device)
        part = Observation(batch.labels, batch.index, {}, {}, patch_size**2)
        for name, network in networks.items():
            attention, part.features[name] = cls_attention(network, images)
            if maps:
                part.attention[name] = attention
        is_canvas = batch.digit is not None
        if maps and is_canvas:
            part.digit = patch_sums(batch.digit, patch_size)
            part.clutter = patch_sums(batch.clutter, patch_size)
            part.intensity = patch_sums(batch.images.mean(1), patch_size)
        parts.append(on_cpu(part))

    observation = concatenate(parts)
    for value in [*observation.features.values(), *observation.attention.values()]:
        if not value.isfinite().all():
            raise FloatingPointError("the network's features or attention are NaN or infinite")
    return observation


def progress(batches, description: str):
    """The batches, with a progress bar where there is a terminal."""
    return tqdm(batches, description, unit="batch", leave=False, disable=None)


def on_cpu(value):
    """A tensor, or all tensors in a dict or dataclass, on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, (Observation, CanvasEffects, TokenEffects)):
        items = {entry.name: on_cpu(getattr(value, entry.name)) for entry in fields(value)}
        return type(value)(**items)
    return value


def concatenate(parts: list):
    """Tensors, or dicts or dataclasses of tensors, joined along their rows."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(parts)
    if isinstance(first, dict):
        return {key: concatenate([part[key] for part in parts]) for key in first}
    if isinstance(first, (Observation, CanvasEffects, TokenEffects)):
        names = [entry.name for entry in fields(first)]
        items = {name: concatenate([getattr(part, name) for part in parts]) for name in names}
        return type(first)(**items)
    return first


def maps_by_row(backbone: VisionTransformer, images, names: Sequence[str]) -> dict:
    """The named maps of images, {row: (B, patches)}.

    Raises FloatingPointError if one is not finite.
    """
    maps = {row_of(name): MAPS[name](backbone, images) for name in names}
    for row, values in maps.items():
        if not values.isfinite().all():
            raise FloatingPointError(f"the map {name_of(row)} is NaN or infinite")
    return maps


def row_of(name: str) -> str:
    """The row of a map in metrics.json: that of attention is "mean", since its heads have rows."""
    return "mean" if name == "attention" else name.replace(" ", "_")


def name_of(row: str | None) -> str | None:
    """The name of the map in a row."""
    return "attention" if row == "mean" else row


# ------------------------------------------------------------------------------ effects on canvases


@dataclass
class CanvasEffects:
    """Maps of one network on canvases, and what its feature depends on there.

    K parts of each canvas are left out: pieces of the digit first, then the distractors.
    """

    index: torch.Tensor  # (n,) int64, the source digit in its split
    maps: dict[str, torch.Tensor]  # {row: (n, patches)}
    intensity: torch.Tensor  # (n, patches), summed over a patch: what blackening it removes
    has_ink: torch.Tensor  # (n, patches) bool
    blackening: torch.Tensor  # (n, patches), effect of blackening a patch with ink, else 0
    # (n, depth, patches), the direct effect at each block, for the first canvases; NaN for others
    direct: torch.Tensor
    distances: torch.Tensor  # (n, K), √(2 − 2 cosine) after leaving out a part, from 0 to 2
    part_ink: torch.Tensor  # (n, K, patches), pixels of the part's ink in each patch of the image
    canvas_ink: torch.Tensor  # (n, K) int64, ink pixels of the part on the canvas, not resized

    @property
    def pieces(self) -> int:
        """How many of the K parts are pieces of the digit.

        There are as many as distractors, or one if there are no distractors.
        """
        return (self.distances.shape[1] + 1) // 2


@torch.no_grad()
def observe_effects(
    backbone: VisionTransformer,
    batches: Iterable[EvaluationBatch],
    names: Sequence[str] = (),
    direct_images: int = 0,
) -> CanvasEffects:
    """The named maps of canvases, and the exact effects of changes to them.

    `batches` are those of `views.left_out_batches`. The direct effects are those of the first
    `direct_images` canvases.
    """
    patch_size = backbone.shape.patch_size
    parts = []
    canvases = 0
    for batch in progress(batches, "leaving out"):
        features = effects.feature_of(backbone, batch.images)
        has_ink = patch_sums(batch.digit | batch.clutter, patch_size) > 0

        # blackened patches; the direct effect at the first block is the whole one
        count = max(0, direct_images - canvases)
        canvases += len(has_ink)
        direct = features.new_full(
            (len(has_ink), backbone.shape.depth, has_ink.shape[1]), torch.nan
        )
        if count:
            of_blocks = effects.direct_effects(backbone, batch.images[:count], has_ink[:count])
            direct[:count] = of_blocks.movedim(1, 0)
        rest = effects.blackening_effects(
            backbone, batch.images[count:], has_ink[count:], features[count:]
        )
        blackening = torch.cat([direct[:count, 0], rest])

        # parts of the canvas
        distances = [
            effects.feature_distance(backbone, images, features)
            for images in batch.left_out.images.unbind(1)
        ]
        part = CanvasEffects(
            index=batch.index,
            maps=maps_by_row(backbone, batch.images, names),
            intensity=patch_sums(batch.images.mean(1), patch_size),
            has_ink=has_ink,
            blackening=blackening,
            direct=direct,
            distances=torch.stack(distances, 1),
            part_ink=patch_sums(batch.left_out.masks, patch_size),
            canvas_ink=batch.left_out.ink,
        )
        parts.append(on_cpu(part))
    return concatenate(parts)


# ------------------------------------------------------------------- effects on images of any kind


@dataclass
class TokenEffects:
    """How well one network's maps predict the effects of leaving patches out, image by image."""

    index: torch.Tensor  # (n,) int64, the source image in its split
    # {row: (n,)}: metrics.relevance_gain of the map; NaN if it was not measured, or if the image has
    # a single patch
    srg: dict[str, torch.Tensor]
    # {row: (n,)}: rank correlation of the map's mass on a window with the effect of leaving it out,
    # over windows that are not cut off at the rim
    patch_faithfulness: dict[str, torch.Tensor]
    # the same with the direct effect at the last block
    direct_faithfulness: dict[str, torch.Tensor]
    # (n, depth): the direct effects at each block, summed over windows; NaN if not measured
    direct_sums: torch.Tensor


def observe_token_effects(
    backbone: VisionTransformer,
    batches: Iterable[EvaluationBatch],
    names: Sequence[str],
    direct_images: int = 0,
) -> TokenEffects:
    """How well the named maps predict the effects of leaving patches out, on images without masks.

    Direct effects at the blocks between the first and the last are those of the first
    `direct_images` images.
    """
    device = backbone.cls_token.device
    parts = []
    images_before = 0
    for batch in progress(batches, "leaving out"):
        images = batch.images.to(device)
        maps = maps_by_row(backbone, images, names)
        direct = max(0, direct_images - images_before)
        _, part = measure_tokens(backbone, images, maps, batch.index, list(maps), direct)
        images_before += len(images)
        parts.append(part)
    return concatenate(parts)


@torch.no_grad()
def measure_tokens(
    backbone: VisionTransformer,
    images,
    maps: dict,
    index,
    srg_rows: Sequence[str] = (),
    direct_images: int = 0,
) -> tuple[torch.Tensor, TokenEffects]:
    """Effects of leaving out each window of patches (B, windows), and how well maps predict them.

    Both are on the CPU. `maps` is {row: (B, patches)}; SRG is measured of those in `srg_rows`.
    Direct effects at the blocks between the first and the last are those of the first
    `direct_images` images.
    """
    depth = backbone.shape.depth
    ends = sorted({0, depth - 1})
    of_windows = effects.window_effects(backbone, images, ends)  # (1 or 2, B, windows)
    of_windows = of_windows.cpu()
    whole_effect = of_windows[0]
    direct_sums = whole_effect.new_full((len(images), depth), torch.nan)
    direct_sums[:, ends] = of_windows.sum(-1).T
    between = list(range(1, depth - 1))
    if between and direct_images:
        of_blocks = effects.window_effects(backbone, images[:direct_images], between)
        direct_sums[:direct_images, between] = of_blocks.sum(-1).T.cpu()

    grid = metrics.patch_grid(images, backbone.shape.patch_size)
    among = effects.is_whole_window(grid).expand(whole_effect.shape)
    part = TokenEffects(index, {}, {}, {}, direct_sums)
    for row, values in maps.items():
        # summed in float64 and rounded, so that ties stay ties
        mass = effects.window_sums(values.cpu().double(), grid).float()
        part.patch_faithfulness[row] = metrics.spearman(mass, whole_effect, among)
        part.direct_faithfulness[row] = metrics.spearman(mass, of_windows[-1], among)
        part.srg[row] = whole_effect.new_full((len(images),), torch.nan)
    has_several_patches = max(grid) > 1
    if has_several_patches:
        for row, gain in relevance_gains(backbone, images, maps, srg_rows).items():
            part.srg[row] = gain
    return whole_effect, on_cpu(part)


def relevance_gains(
    backbone: VisionTransformer, images, maps: dict, rows: Sequence[str]
) -> dict[str, torch.Tensor]:
    """The SRG of the maps in these rows, {row: (B,)}; several maps go through the network at once."""
    gains = {}
    at_once = max(1, effects.CHANGED_IMAGES // len(images))
    for start in range(0, len(rows), at_once):
        together = rows[start : start + at_once]
        repeated = images.repeat(len(together), 1, 1, 1)
        stacked = torch.cat([maps[row] for row in together])
        most_first, least_first = effects.left_out_cosines(backbone, repeated, stacked)
        of_maps = metrics.relevance_gain(most_first, least_first).split(len(images))
        gains |= dict(zip(together, of_maps))
    return gains
