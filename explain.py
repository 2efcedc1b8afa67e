"""Explanation maps: functions of a network and images that say which patches count.

A map is a distribution over an image's patches, row by row: (B, patches), each row at least 0 and
summing to 1. In this file images are (B, 1 or 3, H, W) in [0, 1], and any ViT of vit.py will do.
`effects.py` finds out what the feature does depend on, and so which of these maps to believe.
"""

import math

import torch
import torch.nn.functional as F

import views
from data import to_device
from effects import feature_from_block
from metrics import patch_grid, patch_sums
from vit import VisionTransformer, attention_matrix

DIRECTIONS = 16  # of squared gradients
PATCHES_PER_BACKWARD = 8000  # larger batches are split, so that their activations fit into memory


def normalize_rows(values):
    """Values (…, k) of at least 0, divided by the sum of each row; uniform where that is 0."""
    total = values.sum(dim=-1, keepdim=True)
    is_zero = total == 0
    return values.masked_fill(is_zero, 1) / total.masked_fill(is_zero, values.shape[-1])


# --------------------------------------------------------------------------------------- attention


@torch.no_grad()
def cls_attention(backbone: VisionTransformer, images):
    """Where [CLS] attends in the last block, and its feature. One forward pass.

    Returns maps of the heads (B, heads, patches) and features (B, dim), L2-normalized.
    """
    x = backbone.before_last_block(views.normalize(images))
    angles = backbone.rotary_angles(images)
    to_all_tokens = backbone.last_attention(x, 1, angles)[:, :, 0]  # (B, heads, N)
    features = F.normalize(backbone.last_feature(x, angles=angles), dim=-1)
    return patch_attention(to_all_tokens, backbone), features


def patch_attention(to_all_tokens, backbone: VisionTransformer):
    """Turn attention to all tokens (…, N) into attention to the patches alone, summing to 1."""
    first_patch = 1 + backbone.shape.registers  # after [CLS] and registers
    return normalize_rows(to_all_tokens[..., first_patch:])


@torch.no_grad()
def head_attention(backbone: VisionTransformer, images, block: int = -1, token: int = 0):
    """Where a token attends in a block, in each head: (B, heads, patches). One forward pass.

    Blocks count from 0, or from the end: -1 is the last. Tokens are [CLS], registers, then the
    patches row by row. (`cls_attention` gives the same for the defaults, and the feature.)
    """
    x = backbone.prepare_tokens(views.normalize(images))
    angles = backbone.rotary_angles(images)
    *blocks_before, block_of_map = blocks_up_to(backbone, block)
    for earlier in blocks_before:
        x = earlier(x, angles=angles)
    x = block_of_map.norm1(x)
    # of the first tokens, up to this one
    q, k, _ = block_of_map.attn.queries_keys_values(x, token + 1, angles)
    return patch_attention(attention_matrix(q, k)[:, :, token], backbone)


def blocks_up_to(backbone: VisionTransformer, block: int) -> list:
    """The blocks up to the one of this number, which counts from 0, or from the end if negative."""
    return list(backbone.blocks)[: block % len(backbone.blocks) + 1]


def attention(backbone: VisionTransformer, images, block: int = -1, token: int = 0):
    """Attention of a token in a block, the mean of the heads. One forward pass.

    All heads count equally, however much of its attention goes to [CLS] or registers. By default it
    is that of [CLS] in the last block.
    """
    return head_attention(backbone, images, block, token).mean(1)


@torch.no_grad()
def token_attention(backbone: VisionTransformer, images):
    """Where each token attends. One forward pass.

    Returns two tensors of maps, on the CPU. The first, (B, depth, heads, E, patches), has [CLS] and
    registers, E tokens, in all blocks. The second, (B, heads, patches, patches), has each patch, a
    row, in the last block. (That of all patches in all blocks would take a hundred megabytes for an
    image of a ViT-S/8.)
    """
    first_tokens = 1 + backbone.shape.registers
    x = backbone.prepare_tokens(views.normalize(images))
    angles = backbone.rotary_angles(images)
    of_tokens = []
    for block in backbone.blocks[:-1]:
        q, k, _ = block.attn.queries_keys_values(block.norm1(x), first_tokens, angles)
        of_tokens.append(patch_attention(attention_matrix(q, k), backbone).cpu())
        x = block(x, angles=angles)
    last = backbone.last_attention(x, angles=angles)
    last = patch_attention(last, backbone).cpu()  # (B, heads, N, patches)
    of_tokens.append(last[:, :, :first_tokens])
    return torch.stack(of_tokens, dim=1), last[:, :, first_tokens:]


@torch.no_grad()
def rollout(backbone: VisionTransformer, images, block: int = -1, token: int = 0):
    """Attention of a token, by default [CLS], followed back from a block. One forward pass.

    Abnar & Zuidema 2020: a product over the blocks. Each factor is ½ · (head-averaged attention)
    + ½ · I, the residual connection.
    """
    x = backbone.prepare_tokens(views.normalize(images))
    angles = backbone.rotary_angles(images)
    # row i: what token i is made of
    mixture = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)[None]
    blocks = blocks_up_to(backbone, block)
    for layer in blocks:
        # in the last one only the rows up to the token's are needed
        num_queries = token + 1 if layer is blocks[-1] else None
        q, k, _ = layer.attn.queries_keys_values(layer.norm1(x), num_queries, angles)
        mean_attention = attention_matrix(q, k).mean(1)  # (B, num_queries, N)
        mixture = (mean_attention @ mixture + mixture[:, :num_queries]) / 2
        x = layer(x, num_queries, angles=angles)
    return patch_attention(mixture[:, token], backbone)


@torch.no_grad()
def norm_rollout(backbone: VisionTransformer, images, block: int = -1, token: int = 0):
    """Rollout by the size of what tokens pass on. One forward pass.

    Kobayashi et al. 2020 and 2021: in a block, token j gives token i the vector Σ_h α_hij W_h x_j,
    where α_h is the attention of head h and W_h its value and output projections. To itself, token i
    gives its own vector plus, through the residual connection, the block's input. (x_j is taken
    after the block's first norm; W_h adds the bias of the values.) The norms of these vectors, each
    row divided by its sum, are the whole factor of a block here: unlike in `rollout`, the residual
    connection is in them.
    """
    x = backbone.prepare_tokens(views.normalize(images))
    angles = backbone.rotary_angles(images)
    # row i: what token i is made of
    mixture = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)[None]
    blocks = blocks_up_to(backbone, block)
    for layer in blocks:
        # in the last one only the rows up to the token's are needed
        num_queries = token + 1 if layer is blocks[-1] else None
        norms = passed_on_norms(layer, x, num_queries, angles)
        mixture = normalize_rows(norms) @ mixture
        x = layer(x, num_queries, angles=angles)
    return patch_attention(mixture[:, token], backbone)


def passed_on_norms(block, x, num_queries: int | None, angles=None):
    """The norm of what each token passes on to the first tokens in a block: (B, num_queries, N).

    x (B, N, dim) are the block's inputs. What token j passes on through a head is the same for all
    receivers but for its factor α, so a norm is a quadratic form in the α of the heads. This needs
    no vector for each pair of tokens.
    """
    q, k, v = block.attn.queries_keys_values(block.norm1(x), num_queries, angles)
    alpha = attention_matrix(q, k)  # (B, heads, num_queries, N)
    # the output projection of each head, (heads, d, dim)
    projection = block.attn.proj.weight.unflatten(1, (block.attn.heads, -1)).permute(1, 2, 0)
    passed_on = torch.einsum("bhnd,hdm->bnhm", v, projection)  # (B, N, heads, dim)
    # ‖Σ_h α_h w_h‖² = Σ_h Σ_g α_h α_g (w_h · w_g), where w_h is `passed_on` of head h
    products = torch.einsum("bnhm,bngm->bnhg", passed_on, passed_on)  # (B, N, heads, heads)
    squares = (alpha * torch.einsum("bgij,bjhg->bhij", alpha, products)).sum(1)
    norms = squares.clamp(min=0).sqrt()

    # a token's own part includes the residual connection
    receivers = torch.arange(norms.shape[1], device=x.device)
    own_alpha = alpha[:, :, receivers, receivers]  # (B, heads, num_queries)
    own = torch.einsum("bhi,bihm->bim", own_alpha, passed_on[:, receivers]) + x[:, receivers]
    norms[:, receivers, receivers] = own.norm(dim=-1)
    return norms


# --------------------------------------------------------------------------------------- gradients


def squared_gradient(backbone: VisionTransformer, images, directions: int = DIRECTIONS):
    """How much the feature changes with a patch's pixels, to first order.

    The squared gradient of r · feature, summed over a patch's pixels and channels and over random
    unit directions r; features are L2-normalized. In expectation this is proportional to the
    squared Frobenius norm of the Jacobian. The directions are the same for every image. One forward
    and `directions` backward passes. Of a grey image (1 channel) the gradient is that of the grey
    level.

    A gradient map needs such a target from outside: the gradient of the feature's cosine with
    itself is zero, because at the image itself that cosine is at its maximum.
    """
    patches = math.prod(patch_grid(images, backbone.shape.patch_size))
    pieces = images.split(max(1, PATCHES_PER_BACKWARD // patches))
    sums = [sum_squared_gradients(backbone, piece, directions) for piece in pieces]
    return normalize_rows(torch.cat(sums))


@torch.enable_grad()
def sum_squared_gradients(backbone: VisionTransformer, images, directions: int):
    """The squared gradients of `squared_gradient`, summed over each patch: (B, patches).

    Each direction has its own backward pass, so memory does not grow with their number. The pass
    ends at the tokens. A token is a linear function of its patch's pixels, so one product with the
    weights of the patch embedding gives the gradient of the pixels. On a CPU this takes a third less
    time than a backward pass down to the pixels.
    """
    with torch.no_grad():
        tokens = backbone.prepare_tokens(views.normalize(images))
    tokens.requires_grad_()
    features = feature_from_block(backbone, tokens, 0, backbone.rotary_angles(images))

    # what a token gains from a pixel before normalization: (dim, channels · pixels)
    weight = backbone.patch_embed.proj.weight.detach() / to_device(views.STD, images.device)
    if images.shape[1] == 1:
        weight = weight.sum(1)  # a grey level is the same number in three channels
    weight = weight.flatten(1)
    first_patch = 1 + backbone.shape.registers
    total = 0
    for direction in random_directions(features.shape[1], directions):
        projected = features @ direction.to(features)
        (gradient,) = torch.autograd.grad(projected.sum(), tokens, retain_graph=True)
        pixel_gradient = gradient[:, first_patch:] @ weight  # (B, patches, channels · pixels)
        total = total + pixel_gradient.square().sum(-1)
    return total


def random_directions(dim: int, count: int = DIRECTIONS):
    """Unit vectors in random directions, always the same: (count, dim)."""
    rng = torch.Generator().manual_seed(0)
    return torch.stack([F.normalize(torch.randn(dim, generator=rng), dim=0) for _ in range(count)])


# ------------------------------------------------------ controls, which know nothing of the network


def brightness(backbone: VisionTransformer, images):
    """The summed intensity of each patch."""
    return normalize_rows(patch_sums(images.mean(1), backbone.shape.patch_size))


def contrast(backbone: VisionTransformer, images):
    """The standard deviation of the grey levels in each patch."""
    patch_size = backbone.shape.patch_size
    grey = images.mean(1, keepdim=True)
    mean = F.interpolate(F.avg_pool2d(grey, patch_size), scale_factor=patch_size)
    deviation = (grey - mean)[:, 0]
    deviation = deviation.masked_fill(deviation.abs() < 1e-6, 0)  # rounding, in flat patches
    return normalize_rows((patch_sums(deviation.square(), patch_size) / patch_size**2).sqrt())


def centre(backbone: VisionTransformer, images):
    """A Gaussian in the middle of the image; its deviation is a quarter of the shorter side."""
    rows, columns = patch_grid(images, backbone.shape.patch_size)
    row = torch.arange(rows, device=images.device) - (rows - 1) / 2
    column = torch.arange(columns, device=images.device) - (columns - 1) / 2
    deviation = min(rows, columns) / 4
    squared_distance = row[:, None] ** 2 + column**2
    gaussian = (-squared_distance / (2 * deviation**2)).exp()
    return normalize_rows(gaussian.flatten().expand(len(images), -1))


def random(backbone: VisionTransformer, images):
    """Noise, the same for the same image in any batch.

    It is the fractional part of a large number, which depends on the patch's number and on a digest
    of the image.
    """
    sums = patch_sums(images.mean(1), backbone.shape.patch_size)
    number = torch.arange(sums.shape[1], device=images.device)  # of each patch
    digest = (1000 * (sums * number.sin()).sum(-1, keepdim=True)).round()
    large = 1e4 * torch.sin(12.9898 * number + digest)
    return normalize_rows(large - large.floor())


NETWORK_MAPS = {
    "attention": attention,
    "rollout": rollout,
    "norm_rollout": norm_rollout,
    "squared_gradient": squared_gradient,
}
# What a map of a network costs; the controls cost nothing.
PASSES = {
    "attention": "1 forward",
    "rollout": "1 forward",
    "norm_rollout": "1 forward",
    "squared_gradient": f"{DIRECTIONS} backward",
}
# Maps that exist for any token and any block, not only for the final feature.
TOKEN_MAPS = {"attention": attention, "rollout": rollout, "norm_rollout": norm_rollout}
CONTROLS = {"brightness": brightness, "contrast": contrast, "centre": centre, "random": random}
MAPS = NETWORK_MAPS | CONTROLS
# The controls that are measured beside the maps of a network.
CANVAS_CONTROLS = ("brightness", "random")
PHOTO_CONTROLS = ("brightness", "contrast", "centre", "random")
