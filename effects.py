"""Effects: what a network's feature depends on, found by changing the image and looking again.

There are three kinds of change. A patch with ink is blackened, by replacing its token with that of a
black patch. A window of patches is left out, as if it did not exist. A part of a canvas is left out
when the canvas is rendered. The effect is 1 − cosine of the L2-normalized [CLS] features before and
after. (For parts of a canvas it is a distance, √(2 − 2 cosine).) It is measured, not estimated. The
direct effect at a block is what remains of an effect if only the changed patch's own token differs at
the input of that block.

Images are (B, 1 or 3, H, W) in [0, 1].
"""

import math

import torch
import torch.nn.functional as F

import views
from metrics import patch_grid
from vit import VisionTransformer

CHANGED_IMAGES = 100  # changed images that go through the network at a time
SRG_STEPS = 10  # steps in which more and more patches are left out
MAX_WINDOWS = 64  # an image is divided into at most this many windows of patches


@torch.no_grad()
def feature_distance(backbone: VisionTransformer, images, features):
    """Distance √(2 − 2 cos) between unit features (B, dim) and those of images: (B,), 0 to 2."""
    return (feature_of(backbone, images) - features).norm(dim=-1)


def feature_of(backbone: VisionTransformer, images, keep=None):
    """The L2-normalized feature of images, (B, dim); `keep` is that of `VisionTransformer`."""
    return F.normalize(backbone(views.normalize(images), keep), dim=-1)


def one_minus_cosine(features, other_features):
    """1 − cosine of L2-normalized features (…, dim): (…), exact also where it is small."""
    return (features - other_features).square().sum(-1) / 2


# -------------------------------------------------------------------------------- blackened patches


@torch.no_grad()
def blackening_effects(backbone: VisionTransformer, images, has_ink, features):
    """Effects of blackening each patch with ink: (B, patches), 0 for the others.

    `has_ink` is (B, patches) bool, and `features` (B, dim), L2-normalized, are those of the images.
    """
    tokens = backbone.prepare_tokens(views.normalize(images))
    black_tokens = tokens_of_black(backbone, images)
    angles = backbone.rotary_angles(images)
    effect = features.new_zeros(has_ink.shape)
    for image, patch in pairs_to_blacken(has_ink):
        x = replace_patches_(backbone, tokens[image], black_tokens, patch)
        changed = feature_from_block(backbone, x, 0, angles)
        effect[image, patch] = one_minus_cosine(features[image], changed)
    return effect


def pairs_to_blacken(has_ink):
    """All pairs of an image and one of its patches with ink, in pieces (image (n,), patch (n,)).

    There are about 15 pairs for each canvas.
    """
    pieces = has_ink.nonzero().split(CHANGED_IMAGES)
    return [pairs.unbind(1) for pairs in pieces if len(pairs)]


def tokens_of_black(backbone: VisionTransformer, images):
    """The tokens of a black image as large as these: (1, N, dim).

    A patch enters the network through its own token alone. So to blacken it is to replace this
    token, and nothing has to be rendered or embedded again.
    """
    return backbone.prepare_tokens(views.normalize(torch.zeros_like(images[:1])))


def replace_patches_(backbone: VisionTransformer, tokens, other_tokens, patch):
    """`tokens` (n, N, dim) with the token of one patch each taken from `other_tokens` (1 or n, …).

    `patch` (n,) are the numbers of the patches. This changes `tokens`.
    """
    row = torch.arange(len(tokens), device=tokens.device)
    token = 1 + backbone.shape.registers + patch
    tokens[row, token] = other_tokens.expand_as(tokens)[row, token]
    return tokens


@torch.no_grad()
def direct_effects(backbone: VisionTransformer, images, has_ink):
    """Effects of blackening patches through their own tokens alone: (depth, B, patches).

    Entry [b] is 1 − cosine when, at the input of block b, only the patch's own token comes from the
    blackened image and all others from the image as it is (path patching). Entry [0] is the whole
    effect, since a patch enters the network through its own token. What is missing in entry [b] is
    what the blocks before b have already mixed into other tokens. 0 for patches without ink.

    `has_ink` is (B, patches) bool.
    """
    depth = backbone.shape.depth
    angles = backbone.rotary_angles(images)
    tokens = backbone.prepare_tokens(views.normalize(images))
    black_tokens = tokens_of_black(backbone, images)
    inputs = block_inputs(backbone, tokens, angles)
    features = feature_from_block(backbone, inputs[-1], depth - 1, angles)
    effect = features.new_zeros(depth, *has_ink.shape)
    for image, patch in pairs_to_blacken(has_ink):
        blackened = replace_patches_(backbone, tokens[image], black_tokens, patch)
        changed_inputs = block_inputs(backbone, blackened, angles)
        whole_feature = feature_from_block(backbone, changed_inputs[-1], depth - 1, angles)
        effect[0, image, patch] = one_minus_cosine(features[image], whole_feature)
        for block in range(1, depth):
            x = replace_patches_(backbone, inputs[block][image], changed_inputs[block], patch)
            changed = feature_from_block(backbone, x, block, angles)
            effect[block, image, patch] = one_minus_cosine(features[image], changed)
    return effect


def block_inputs(backbone: VisionTransformer, tokens, angles) -> list:
    """The input of every block, (B, N, dim) each, from that of the first one."""
    inputs = [tokens]
    for block in backbone.blocks[:-1]:
        inputs.append(block(inputs[-1], angles=angles))
    return inputs


def feature_from_block(backbone: VisionTransformer, x, first_block: int, angles):
    """The unit feature (B, dim) of the input x (B, N, dim) of a block, counted from 0.

    `angles` are the tokens' `rotary_angles`.
    """
    for block in backbone.blocks[first_block:-1]:
        x = block(x, angles=angles)
    return F.normalize(backbone.last_feature(x, angles=angles), dim=-1)


# --------------------------------------------------------------------------------- patches left out


def window_side(grid: tuple[int, int]) -> int:
    """The side of a window in patches, such that the grid has at most MAX_WINDOWS windows."""
    rows, columns = grid
    side = 1
    while math.ceil(rows / side) * math.ceil(columns / side) > MAX_WINDOWS:
        side += 1
    return side


def window_of_patches(grid: tuple[int, int]):
    """The number of the window that each patch belongs to, row by row: (patches,) int64."""
    rows, columns = grid
    side = window_side(grid)
    row = torch.arange(rows) // side
    column = torch.arange(columns) // side
    return (row[:, None] * math.ceil(columns / side) + column).flatten()


def is_whole_window(grid: tuple[int, int]):
    """Which windows are complete: (windows,) bool. Those at the rim may be cut off."""
    patches = torch.bincount(window_of_patches(grid))
    return patches == patches.max()


def window_sums(maps, grid: tuple[int, int]):
    """Maps (…, patches) summed over each window: (…, windows)."""
    window = window_of_patches(grid)
    sums = maps.new_zeros(*maps.shape[:-1], int(window.max()) + 1)
    return sums.index_add_(-1, window.to(maps.device), maps)


@torch.no_grad()
def window_effects(backbone: VisionTransformer, images, blocks: list[int]):
    """Effects of leaving out each window of patches as tokens: (blocks, B, windows).

    For each block of `blocks` the tokens of the window are deleted from the input of that block. At
    block 0 this gives the whole effect, at a later one the direct effect: other tokens keep what
    earlier blocks have mixed into them. A ViT needs no paint over patches, whose colour would
    matter. There is a pass for each window and block.
    """
    window = window_of_patches(patch_grid(images, backbone.shape.patch_size))
    other_tokens = window.new_full((1 + backbone.shape.registers,), -1)
    window_of_tokens = torch.cat([other_tokens, window])
    window_sizes = torch.bincount(window)
    tokens = backbone.prepare_tokens(views.normalize(images))
    angles = backbone.rotary_angles(images)  # (1, N, d / 2), or None
    inputs = block_inputs(backbone, tokens, angles)
    features = feature_from_block(backbone, inputs[-1], backbone.shape.depth - 1, angles)
    effect = features.new_zeros(len(blocks), len(images), len(window_sizes))
    # Windows of one size leave equally many tokens, so they can go through the network together.
    for size in window_sizes.unique():
        numbers = (window_sizes == size).nonzero()[:, 0]
        for together in numbers.split(max(1, CHANGED_IMAGES // len(images))):
            stays = [(window_of_tokens != number).nonzero()[:, 0] for number in together]
            stays = torch.stack(stays).to(images.device)  # (windows, tokens that stay)
            angles_left = None
            if angles is not None:  # a token that stays keeps its position
                angles_left = angles[0, stays].repeat(len(images), 1, 1)
            for row, block in enumerate(blocks):
                x = inputs[block][:, stays].flatten(0, 1)  # (B · windows, tokens, dim)
                changed = feature_from_block(backbone, x, block, angles_left)
                changed = changed.unflatten(0, (-1, len(together)))
                effect[row, :, together] = one_minus_cosine(features[:, None], changed)
    return effect


@torch.no_grad()
def left_out_cosines(backbone: VisionTransformer, images, maps):
    """Cosines of the feature as more and more patches are left out.

    Returns two tensors, (B, SRG_STEPS) each. In the first the patches with most of the map (B,
    patches) go first, in the second those with least. In SRG_STEPS steps all patches but one are
    left out. Patches with equal shares of the map go in a random order. There are 21 passes, which
    take as long as 7 to 10 of the whole image.
    """
    features = feature_of(backbone, images)
    patches = maps.shape[1]
    rng = torch.Generator().manual_seed(0)
    shuffle = torch.randperm(patches, generator=rng).to(maps.device)
    ascending = shuffle[maps[:, shuffle].argsort(dim=-1, stable=True)]  # (B, patches)
    curves = []
    for order in (ascending.flip(-1), ascending):
        cosines = []
        for step in range(1, SRG_STEPS + 1):
            left_out = round(step * (patches - 1) / SRG_STEPS)
            changed = feature_of(backbone, images, keep=order[:, left_out:])
            cosines.append((changed * features).sum(-1))
        curves.append(torch.stack(cosines, -1))
    return curves
