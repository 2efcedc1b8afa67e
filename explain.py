"""Explanation maps, and the effects that they are tested against.

A map says where a network looks: attention of the last block, or attention followed through all
blocks. An effect says what its feature depends on: something is taken out of the image, or the last
attention is replaced, and the feature is computed again. Nothing is estimated.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from tqdm import tqdm

import views
from metrics import patch_sums
from views import EvaluationBatch
from vit import VisionTransformer, attention_matrix

BLACKENED_IMAGES = 100  # images with a patch blackened that go through the network at a time
TOKEN_IMAGES = 20  # images with patches left out at a time; at least one for each image of a batch


# -------------------------------------------------------------------------------------------- maps


@torch.no_grad()
def cls_attention(backbone: VisionTransformer, images):
    """Where [CLS] attends in the last block, and its feature.

    Takes images (B, 3, H, W), normalized. Returns maps (B, heads, patches), which each sum to 1,
    and features (B, dim), L2-normalized.
    """
    x = backbone.before_last_block(images)
    attention = backbone.last_attention(x, num_queries=1)[:, :, 0]  # (B, heads, N)
    features = F.normalize(backbone.last_feature(x), dim=-1)
    return patch_attention(attention, backbone), features


def patch_attention(attention, backbone: VisionTransformer):
    """Turn attention to all tokens (…, N) into attention to the patches alone, summing to 1."""
    maps = attention[..., 1 + backbone.shape.registers :]  # without [CLS] and registers
    return maps / maps.sum(dim=-1, keepdim=True)


@torch.no_grad()
def rollout(backbone: VisionTransformer, images):
    """Attention of [CLS] to the patches, followed through all blocks: (B, patches), sums to 1.

    Abnar & Zuidema 2020: a product over the blocks. Each factor is ½ · (head-averaged attention)
    + ½ · I, the residual connection. Images are (B, 3, H, W), normalized.
    """
    x = backbone.prepare_tokens(images)
    mixture = torch.eye(x.shape[1], device=x.device)[None]  # row i: what token i is made of
    for block in backbone.blocks:
        num_queries = 1 if block is backbone.blocks[-1] else None  # of the last, [CLS] only
        q, k, _ = block.attn.queries_keys_values(block.norm1(x), num_queries)
        attention = attention_matrix(q, k).mean(1)  # (B, N, N); in the last block (B, 1, N)
        mixture = (attention @ mixture + mixture[:, :num_queries]) / 2
        x = block(x, num_queries)
    return patch_attention(mixture[:, 0], backbone)


@torch.no_grad()
def norm_rollout(backbone: VisionTransformer, images):
    """Rollout by the size of what tokens pass on: (B, patches), sums to 1. One forward pass.

    Kobayashi et al. 2020 and 2021: in a block, token j gives token i the vector Σ_h α_hij W_h x_j,
    where α_h is the attention of head h and W_h its value and output projections; token i gives
    itself this and, by the residual connection, itself. The norms of these vectors, each row
    divided by its sum, take the place of the attention in `rollout`. Images are (B, 3, H, W),
    normalized.
    """
    x = backbone.prepare_tokens(images)
    mixture = torch.eye(x.shape[1]).to(x)[None]  # row i: what token i is made of
    for block in backbone.blocks:
        num_queries = 1 if block is backbone.blocks[-1] else None  # of the last, [CLS] only
        norms = passed_on_norms(block, x, num_queries)
        mixture = (norms / norms.sum(-1, keepdim=True)) @ mixture
        x = block(x, num_queries)
    return patch_attention(mixture[:, 0], backbone)


def passed_on_norms(block, x, num_queries: int | None):
    """The norm of what each token passes on to the first tokens in a block: (B, num_queries, N).

    x (B, N, dim) are the block's inputs. What token j passes on through a head is the same for all
    receivers but for its factor α, so a norm is a quadratic form in the α of the heads. This needs
    no vector for each pair of tokens.
    """
    q, k, v = block.attn.queries_keys_values(block.norm1(x), num_queries)
    attention = attention_matrix(q, k)  # (B, heads, num_queries, N)
    # the output projection of each head, (heads, d, dim)
    projection = block.attn.proj.weight.unflatten(1, (block.attn.heads, -1)).permute(1, 2, 0)
    passed_on = torch.einsum("bhnd,hdm->bnhm", v, projection)  # (B, N, heads, dim)
    products = torch.einsum("bnhm,bngm->bnhg", passed_on, passed_on)  # (B, N, heads, heads)
    squares = torch.einsum("bhij,bgij,bjhg->bij", attention, attention, products)
    norms = squares.clamp(min=0).sqrt()

    # a token's own part includes the residual connection
    receivers = torch.arange(norms.shape[1], device=x.device)
    own_attention = attention[:, :, receivers, receivers]  # (B, heads, num_queries)
    own = torch.einsum("bhi,bihm->bim", own_attention, passed_on[:, receivers]) + x[:, receivers]
    norms[:, receivers, receivers] = own.norm(dim=-1)
    return norms


def squared_gradient(backbone: VisionTransformer, pictures, directions: int = 16):
    """How much the feature changes with a patch's pixels, to first order: (B, patches), sums to 1.

    The mean, over random unit directions r, of the squared gradient of r · feature, summed over a
    patch's pixels; features are L2-normalized. This estimates the squared norm of the Jacobian.
    The directions are the same for every picture. One forward and `directions` backward passes.
    Pictures are (B, 1 or 3, H, W) in [0, 1].

    A gradient map needs such a target from outside: the gradient of the feature's cosine with
    itself is zero, because at the picture itself that cosine is at its maximum.
    """
    rng = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        pictures = pictures.detach().requires_grad_()
        features = F.normalize(backbone(views.normalize(pictures)), dim=-1)
        total = 0
        for number in range(directions):
            direction = torch.randn(features.shape[1], generator=rng).to(features)
            projected = features @ F.normalize(direction, dim=0)
            is_last = number == directions - 1
            (gradient,) = torch.autograd.grad(projected.sum(), pictures, retain_graph=not is_last)
            total = total + patch_sums(gradient.square().sum(1), backbone.shape.patch_size)
    return total / total.sum(-1, keepdim=True)


@dataclass
class Observation:
    """What networks make of evaluation images; CPU tensors, one row for each of n images.

    `digit`, `clutter` and `intensity` are None for photographs, `token_effects` for canvases.
    """

    labels: torch.Tensor  # (n,) int64
    index: torch.Tensor  # (n,) int64, the source image in its split; several canvases may share one
    features: dict[str, torch.Tensor]  # {network: (n, dim)}, L2-normalized
    attention: dict[str, torch.Tensor]  # {network: (n, heads, patches)}
    patch_area: int  # pixels of a patch
    digit: torch.Tensor | None = None  # (n, patches), pixels of the digit in each patch
    clutter: torch.Tensor | None = None  # (n, patches)
    intensity: torch.Tensor | None = None  # (n, patches), summed over a patch, images in [0, 1]
    rollout: torch.Tensor | None = None  # (n, patches), of the network "trained"
    # (n, 3): of the patches that attention and rollout point to, and of random ones
    token_effects: torch.Tensor | None = None


@torch.no_grad()
def observe(
    networks: dict[str, VisionTransformer],
    batches: Iterable[EvaluationBatch],
    maps: bool = True,
    with_rollout: bool = False,
) -> Observation:
    """What each network makes of evaluation images, in one pass over them.

    One of the `networks` is called "trained". Without `maps` only features are observed. With
    `with_rollout`, which needs `maps`, there is also the rollout of "trained" and, for photographs,
    there are its token effects. Raises FloatingPointError if a feature or an attention is not
    finite.
    """
    trained = networks["trained"]
    device = trained.cls_token.device
    rng = torch.Generator().manual_seed(0)
    parts = []
    for batch in tqdm(batches, "measuring", unit="batch", leave=False, disable=None):
        images = views.normalize(batch.images.to(device))
        part = Observation(batch.labels, batch.index, {}, {}, trained.shape.patch_size**2)
        for name, network in networks.items():
            attention, part.features[name] = cls_attention(network, images)
            if maps:
                part.attention[name] = attention

        is_canvas = batch.digit is not None
        if maps and is_canvas:
            part.digit = patch_sums(batch.digit, trained.shape.patch_size)
            part.clutter = patch_sums(batch.clutter, trained.shape.patch_size)
            part.intensity = patch_sums(batch.images.mean(1), trained.shape.patch_size)
        if with_rollout:
            part.rollout = rollout(trained, images)
        if with_rollout and not is_canvas:
            mean_attention = part.attention["trained"].mean(1)
            part.token_effects = token_effects(trained, images, [mean_attention, part.rollout], rng)
        parts.append(on_cpu(part))

    observation = concatenate(parts)
    for value in [*observation.features.values(), *observation.attention.values()]:
        if not value.isfinite().all():
            raise FloatingPointError("the network's features or attention are NaN or infinite")
    return observation


def on_cpu(value):
    """A tensor, or all tensors in a dict or dataclass, on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, (Observation, Effects)):
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
    if isinstance(first, (Observation, Effects)):
        names = [entry.name for entry in fields(first)]
        items = {name: concatenate([getattr(part, name) for part in parts]) for name in names}
        return type(first)(**items)
    return first


# ----------------------------------------------------------------------------------------- effects


@dataclass
class Effects:
    """What a network's feature depends on; CPU tensors, one row for each of n canvases.

    K parts of each canvas are left out: pieces of the digit first, then the distractors.
    """

    labels: torch.Tensor  # (n,) int64
    index: torch.Tensor  # (n,) int64, the source digit in its split
    features: torch.Tensor  # (n, dim), L2-normalized, of the canvases as they are
    # (n, dim), when [CLS] attends to all patches alike in the last block
    even_features: torch.Tensor
    # (n, dim), when it attends there as on another canvas
    swapped_features: torch.Tensor
    has_ink: torch.Tensor  # (n, patches) bool
    blackening: torch.Tensor  # (n, patches), 1 − cosine after blackening a patch with ink, else 0
    distances: torch.Tensor  # (n, K), √(2 − 2 cosine) after leaving out a part, from 0 to 2
    part_ink: torch.Tensor  # (n, K, patches), pixels of the part's ink in each patch of the image
    canvas_ink: torch.Tensor  # (n, K) int64, pixels of it on the canvas, before that was resized

    @property
    def pieces(self) -> int:
        """How many of the K parts are pieces of the digit.

        There are as many as distractors, or one if there are no distractors.
        """
        return (self.distances.shape[1] + 1) // 2


@torch.no_grad()
def observe_effects(backbone: VisionTransformer, batches: Iterable[EvaluationBatch]) -> Effects:
    """What the feature depends on, by exact changes to canvases and to the last attention.

    `batches` are those of `views.left_out_batches`.
    """
    patch_size = backbone.shape.patch_size
    parts = []
    for batch in tqdm(batches, "leaving out", unit="batch", leave=False, disable=None):
        x = backbone.before_last_block(views.normalize(batch.images))
        attention = backbone.last_attention(x, num_queries=1)
        features = F.normalize(backbone.last_feature(x), dim=-1)
        has_ink = patch_sums(batch.digit | batch.clutter, patch_size) > 0
        distances = [
            feature_distance(backbone, images, features)
            for images in batch.left_out.images.unbind(1)
        ]
        part = Effects(
            labels=batch.labels,
            index=batch.index,
            features=features,
            even_features=feature_under(backbone, x, even_attention(attention, backbone)),
            swapped_features=feature_under(backbone, x, attention.roll(1, 0)),
            has_ink=has_ink,
            blackening=blackening_effects(backbone, batch.images, has_ink, features),
            distances=torch.stack(distances, 1),
            part_ink=patch_sums(batch.left_out.masks, patch_size),
            canvas_ink=batch.left_out.ink,
        )
        parts.append(on_cpu(part))
    return concatenate(parts)


def even_attention(attention, backbone: VisionTransformer):
    """Attention (…, N) with the patches' total spread evenly over them."""
    first_patch = 1 + backbone.shape.registers
    even = attention.clone()
    even[..., first_patch:] = attention[..., first_patch:].mean(-1, keepdim=True)
    return even


def feature_under(backbone: VisionTransformer, x, attention):
    """The unit feature (B, dim) of the last block's input x under another attention there."""
    return F.normalize(backbone.last_feature(x, attention), dim=-1)


@torch.no_grad()
def feature_distance(backbone: VisionTransformer, images, features):
    """Distance √(2 − 2 cos) between unit features (B, dim) and those of images: (B,), 0 to 2.

    Images are (B, 1 or 3, H, W) in [0, 1].
    """
    changed = F.normalize(backbone(views.normalize(images)), dim=-1)
    return (changed - features).norm(dim=-1)


@torch.no_grad()
def blackening_effects(backbone: VisionTransformer, images, has_ink, features):
    """Effect, 1 − cosine, of blackening each patch with ink: (B, patches), 0 for the others.

    `images` (B, 1 or 3, H, W) are in [0, 1], `has_ink` is (B, patches) bool, and `features`
    (B, dim), L2-normalized, are those of the images.
    """
    effect = features.new_zeros(has_ink.shape)
    # There are some 15 pairs (image, patch with ink) for each canvas.
    for pairs in has_ink.nonzero().split(BLACKENED_IMAGES):
        image, patch = pairs.unbind(1)
        blackened = blacken(images[image], patch, backbone.shape.patch_size)
        distance = feature_distance(backbone, blackened, features[image])
        effect[image, patch] = distance**2 / 2  # 1 − cosine
    return effect


def blacken(images, patch, patch_size: int):
    """Images (n, channels, H, W), each with its patch of the number in `patch` (n,) blackened."""
    rows = images.shape[2] // patch_size
    columns = images.shape[3] // patch_size
    # the number of the patch that each pixel belongs to, (H, W)
    patch_of_pixel = torch.arange(rows * columns, device=images.device).view(rows, columns)
    patch_of_pixel = patch_of_pixel.repeat_interleave(patch_size, 0)
    patch_of_pixel = patch_of_pixel.repeat_interleave(patch_size, 1)
    return images.masked_fill(patch_of_pixel == patch.view(-1, 1, 1, 1), 0)


@torch.no_grad()
def direct_effects(backbone: VisionTransformer, images, has_ink):
    """Effects of blackening patches through their own tokens alone: (depth, B, patches).

    Entry [b] is 1 − cosine when, at the input of block b, only the patch's own token comes from the
    blackened image and all others from the image as it is (path patching). Entry [0] is the whole
    effect, since a patch enters the network through its own token. What is missing in entry [b] is
    what the blocks before b have already mixed into other tokens. 0 for patches without ink.

    Images are (B, 1 or 3, H, W) in [0, 1], `has_ink` is (B, patches) bool.
    """
    first_patch = 1 + backbone.shape.registers
    inputs = block_inputs(backbone, views.normalize(images))
    features = feature_from_block(backbone, inputs[-1], backbone.shape.depth - 1)
    effect = features.new_zeros(backbone.shape.depth, *has_ink.shape)
    for pairs in has_ink.nonzero().split(BLACKENED_IMAGES):
        image, patch = pairs.unbind(1)
        blackened = blacken(images[image], patch, backbone.shape.patch_size)
        changed_inputs = block_inputs(backbone, views.normalize(blackened))
        row = torch.arange(len(image), device=images.device)
        for number in range(backbone.shape.depth):
            x = inputs[number][image]
            x[row, first_patch + patch] = changed_inputs[number][row, first_patch + patch]
            changed = feature_from_block(backbone, x, number)
            effect[number, image, patch] = (changed - features[image]).square().sum(-1) / 2
    return effect


def block_inputs(backbone: VisionTransformer, images) -> list:
    """The input of every block, (B, N, dim) each, for images (B, 3, H, W), normalized."""
    inputs = [backbone.prepare_tokens(images)]
    for block in backbone.blocks[:-1]:
        inputs.append(block(inputs[-1]))
    return inputs


def feature_from_block(backbone: VisionTransformer, x, number: int):
    """The unit feature (B, dim) of the input x (B, N, dim) of block number `number`."""
    for block in backbone.blocks[number:-1]:
        x = block(x)
    return F.normalize(backbone.last_feature(x), dim=-1)


@torch.no_grad()
def token_effects(
    backbone: VisionTransformer, images, maps: list, rng: torch.Generator, draws: int = 1
):
    """Effect, 1 − cosine, of leaving out a fifth of the patches: (n, len(maps) + draws).

    For each of `maps` (n, patches) these are the patches to which it gives most; then come `draws`
    random fifths. Patches are left out as tokens: a ViT does not need paint over them, whose colour
    would matter. Images (n, 3, H, W) are normalized.
    """
    features = F.normalize(backbone(images), dim=-1)
    patches = maps[0].shape[-1]
    random_maps = torch.rand(draws, len(images), patches, generator=rng).to(images.device)
    order = torch.stack([*maps, *random_maps]).argsort(dim=-1)  # the least attended first
    keep = order[..., : patches - patches // 5]  # (maps + draws, n, patches that stay)

    without = []
    for keep_part in keep.split(max(1, TOKEN_IMAGES // len(images))):
        repeated = images.repeat(len(keep_part), 1, 1, 1)
        changed = F.normalize(backbone(repeated, keep_part.flatten(0, 1)), dim=-1)
        without.append(changed.unflatten(0, keep_part.shape[:2]))
    return 1 - (torch.cat(without) * features).sum(-1).T
