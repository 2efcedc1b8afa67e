"""The Vision Transformer and the projection head on top of it.

A ViT cuts an image into patches, puts a learned [CLS] token in front of them, and lets all tokens
attend to each other in every block. What [CLS] attends to in the last block is the attention map
that the paper asks about (its figures 4 to 6): the columns of the patches, in the row of [CLS], of
what `get_last_selfattention` returns. Parameter names and shapes are those of
facebookresearch/dino, so that its weights load here and its scripts read our checkpoints.

Shapes: B images, N tokens in the order [CLS], registers, patches row by row; d = dim / heads.
Where only the first tokens are needed, `num_queries` says how many; None stands for all N. In a
rotary network, which is DINOv3's, `angles` go with the tokens; elsewhere they are None.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from losses import make_loss
from rotary import RotaryPositions, rotate
from settings import Config


@dataclass(frozen=True)
class ViTShape:
    """The architecture of a ViT; the defaults are the paper's ViT-S/8."""

    patch_size: int = 8  # side of a patch, pixels
    dim: int = 384  # width of a token
    depth: int = 12  # number of blocks
    heads: int = 6
    # Side in pixels of the images that the position embeddings are stored for, or (height, width).
    # They are interpolated for others.
    pos_size: int | tuple[int, int] = 224
    mlp_ratio: int = 4  # width of the MLPs divided by dim
    # Learned tokens after [CLS] that stand for no patch (Darcet et al. 2024). They take attention
    # that would otherwise go to patches without content.
    registers: int = 0
    # Whether position embeddings are interpolated with antialiasing, as in DINOv2 with registers.
    antialias: bool = False
    norm_eps: float = 1e-6  # what the layer norms add to the variance
    # Whether positions rotate queries and keys, as in DINOv3. Then there are no position embeddings
    # and `pos_size` means nothing.
    rotary: bool = False


class Attention(nn.Module):
    """Multi-head self-attention: softmax(q kᵀ / √d) v in each head, then a linear layer.

    A rotary layer needs the tokens' `angles` (1 or B, N, d / 2); others ignore them.
    """

    def __init__(self, dim: int, heads: int, rotary: bool = False):
        super().__init__()
        self.heads = heads
        self.rotary = rotary
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def queries_keys_values(self, x, num_queries: int | None = None, angles=None):
        """Tokens (B, N, dim) to q (B, heads, num_queries, d), k and v (B, heads, N, d)."""
        if num_queries is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            # The rows of the qkv weight are those of q, then of k, then of v.
            dim = x.shape[-1]
            q = F.linear(x[:, :num_queries], self.qkv.weight[:dim], self.qkv.bias[:dim])
            k, v = F.linear(x, self.qkv.weight[dim:], self.qkv.bias[dim:]).chunk(2, dim=-1)
        q = self.split_heads(q)
        k = self.split_heads(k)
        if self.rotary:
            q = rotate(q, angles[:, :num_queries])
            k = rotate(k, angles)
        return q, k, self.split_heads(v)

    def split_heads(self, x):
        """(B, N, dim) to (B, heads, N, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, num_queries: int | None = None, angles=None):
        """Tokens (B, N, dim) to (B, num_queries, dim)."""
        if num_queries == 1 and not self.rotary:
            return self.proj(self.mix_for_first(x))
        q, k, v = self.queries_keys_values(x, num_queries, angles)
        # The kernel's backward pass takes 3 to 5 times as long in this case.
        is_cpu_bfloat16 = q.device.type == "cpu" and q.dtype == torch.bfloat16
        if is_cpu_bfloat16 and k.shape[-2] <= 256:
            x = attention_matrix(q, k) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)  # does not keep the attention matrix
        return self.proj(x.transpose(1, 2).flatten(2))

    def mix_for_first(self, x):
        """The first token's attention output, before `proj`: (B, N, dim) to (B, 1, dim).

        The plain version is

            q, k, v = self.queries_keys_values(x, num_queries=1)
            collected = attention_matrix(q, k) @ v  # (B, heads, 1, d)
            return collected.transpose(1, 2).flatten(2)

        But one query needs no k and v of all N tokens, which are a fifth of the laptop preset's
        multiplications. In each head, with weights K and V and biases b and c, the score of token n
        is q · (K xₙ + b) = (Kᵀ q) · xₙ + q · b. Softmax removes the last term, which is the same for
        all tokens. The mean of V xₙ + c by attention is V (mean of xₙ) + c, since attention sums to
        1. In float32 both versions differ by rounding, about 1e-6.
        """
        dim = x.shape[-1]
        q_weight, k_weight, v_weight = self.qkv.weight.split(dim)  # (dim, dim) each
        q_bias, _, v_bias = self.qkv.bias.split(dim)
        k_weight = k_weight.unflatten(0, (self.heads, -1))  # (heads, d, dim)
        v_weight = v_weight.unflatten(0, (self.heads, -1))

        q = F.linear(x[:, 0], q_weight, q_bias)  # (B, dim)
        q = q.unflatten(-1, (self.heads, -1)).transpose(0, 1)  # (heads, B, d)
        kq = (q @ k_weight / math.sqrt(q.shape[-1])).transpose(0, 1)  # (B, heads, dim)
        attention = (kq @ x.mT).softmax(dim=-1)  # (B, heads, N)
        mean_token = (attention @ x).transpose(0, 1)  # weighted by attention: (heads, B, dim)
        collected = (mean_token @ v_weight.mT).transpose(0, 1)  # (B, heads, d)
        return (collected.flatten(1) + v_bias)[:, None]


def attention_matrix(q, k):
    """softmax(q kᵀ / √d): (B, heads, num_queries, d), (B, heads, N, d) -> (…, num_queries, N).

    Every row sums to 1.
    """
    return (q / math.sqrt(q.shape[-1]) @ k.mT).softmax(dim=-1)


class MLP(nn.Module):
    """Two linear layers with a GELU between them, applied to every token."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: tokens (B, N, dim) to the first `num_queries` of them.

    All N tokens are attended to. `angles` are those of `Attention`.
    """

    def __init__(
        self, dim: int, heads: int, hidden_dim: int, norm_eps: float = 1e-6, rotary: bool = False
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, heads, rotary)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = MLP(dim, hidden_dim)

    def forward(self, x, num_queries: int | None = None, angles=None):
        mixed = self.attn(self.norm1(x), num_queries, angles)
        x = x[:, :num_queries] + mixed  # None: all
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """A linear map of each patch's pixels, as a convolution whose stride is the patch size."""

    def __init__(self, patch_size: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images):
        """Images (B, 3, H, W) to embedded patches on their grid, (B, dim, rows, columns)."""
        return self.proj(images)


class VisionTransformer(nn.Module):
    """ViT backbone (the paper's section III): images to the feature of [CLS].

    Images are (B, 3, H, W), normalized as `views.normalize` does it. `init_std` is the standard
    deviation of the linear layers' initial weights, see `init_weights`. Raises ValueError if the
    width is not a multiple of the number of heads, or if `pos_size` is not one of the patch size.
    """

    def __init__(self, shape: ViTShape = ViTShape(), init_std: float = 0.02):
        super().__init__()
        if shape.dim % shape.heads:
            raise ValueError(f"--heads {shape.heads}: use a divisor of the width {shape.dim}")
        size = shape.pos_size
        height, width = size if isinstance(size, tuple) else (size, size)
        if height % shape.patch_size or width % shape.patch_size:
            raise ValueError(
                f"--image-size {size}: use a multiple of the patch size {shape.patch_size}"
            )
        self.shape = shape
        self.grid = (height // shape.patch_size, width // shape.patch_size)
        # True: every block but the last recomputes its activations in the backward pass, to save
        # memory. The last block has few of them, since it computes [CLS] only.
        self.checkpoint_blocks = False

        dim = shape.dim
        self.patch_embed = PatchEmbed(shape.patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if shape.rotary:
            self.rope_embed = RotaryPositions(dim // shape.heads)  # DINOv3's name
        else:
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + math.prod(self.grid), dim))
        hidden_dim = shape.mlp_ratio * dim
        self.blocks = nn.ModuleList(
            Block(dim, shape.heads, hidden_dim, shape.norm_eps, shape.rotary)
            for _ in range(shape.depth)
        )
        self.norm = nn.LayerNorm(dim, eps=shape.norm_eps)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if not shape.rotary:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        init_weights(self, init_std)
        if shape.registers:
            self.register_tokens = nn.Parameter(torch.empty(1, shape.registers, dim))
            nn.init.trunc_normal_(self.register_tokens, std=0.02)

    def interpolate_pos_encoding(self, grid: tuple[int, int]):
        """Position embeddings of patches on a grid (rows, columns): (1, rows · columns, dim)."""
        pos_embed = self.pos_embed[:, 1:]
        if grid == self.grid:
            return pos_embed
        pos_embed = pos_embed.mT.unflatten(2, self.grid)  # (1, dim, rows, columns) as stored
        if self.shape.antialias:
            pos_embed = F.interpolate(pos_embed, size=grid, mode="bicubic", antialias=True)
        else:
            # DINO gives not the size of the new grid but a scale, n + 0.1 over the stored side; the
            # 0.1 keeps the size from being rounded down to n - 1. Its weights expect that: with
            # size=grid the interpolated embeddings differ by up to 0.03.
            scale = [(n + 0.1) / stored for n, stored in zip(grid, self.grid)]
            pos_embed = F.interpolate(pos_embed, scale_factor=scale, mode="bicubic")
        return pos_embed.flatten(2).mT

    def prepare_tokens(self, images, keep=None):
        """Images (B, 3, H, W) to tokens (B, N, dim): [CLS], registers, patches row by row.

        An experiment may leave patches out as if they did not exist: `keep` (B, k) int64 are the
        indices of the patches that stay, counted from 0 row by row, each with its position. Raises
        ValueError if a side is not a multiple of the patch size.
        """
        patch_size = self.shape.patch_size
        height, width = images.shape[-2:]
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"image size {height}×{width} is not a multiple of the patch size {patch_size}"
            )
        patches = self.patch_embed(images)  # (B, dim, rows, columns)
        grid = patches.shape[2:]
        patches = patches.flatten(2).mT  # (B, rows · columns, dim)
        cls = self.cls_token
        if not self.shape.rotary:
            cls = cls + self.pos_embed[:, :1]
            patches = patches + self.interpolate_pos_encoding(grid)

        batch = len(images)
        tokens = [cls.expand(batch, -1, -1)]
        if self.shape.registers:
            tokens.append(self.register_tokens.expand(batch, -1, -1))  # they have no position
        if keep is not None:
            patches = patches.take_along_dim(keep[..., None], dim=1)
        return torch.cat([*tokens, patches], dim=1)

    def rotary_angles(self, images, keep=None):
        """The angles of the tokens that `prepare_tokens` makes: (1 or B, N, d / 2).

        Every block of a rotary network needs them beside its tokens. They are 0 for [CLS] and
        registers. None if the network is not rotary.
        """
        if not self.shape.rotary:
            return None
        height, width = images.shape[-2:]
        grid = (height // self.shape.patch_size, width // self.shape.patch_size)
        angles = self.rope_embed(grid)[None]  # (1, rows · columns, d / 2)
        if keep is not None:
            angles = angles.take_along_dim(keep[..., None], dim=1)  # (B, k, d / 2)
        return F.pad(angles, (0, 0, 1 + self.shape.registers, 0))

    def before_last_block(self, images, keep=None):
        """Images (B, 3, H, W), normalized, to the input of the last block, (B, N, dim)."""
        x = self.prepare_tokens(images, keep)
        angles = self.rotary_angles(images, keep)
        for block in self.blocks[:-1]:
            if self.checkpoint_blocks:
                x = checkpoint(block, x, angles=angles, use_reentrant=False)
            else:
                x = block(x, angles=angles)
        return x

    def last_feature(self, x, angles=None):
        """The last block's input (B, N, dim) to the feature of [CLS], (B, dim)."""
        x = self.blocks[-1](x, num_queries=1, angles=angles)  # only [CLS] is read
        return self.norm(x)[:, 0]

    def forward(self, images, keep=None):
        """Images (B, 3, H, W), normalized, to the feature of [CLS], (B, dim)."""
        x = self.before_last_block(images, keep)
        return self.last_feature(x, angles=self.rotary_angles(images, keep))

    def last_attention(self, x, num_queries: int | None = None, angles=None):
        """The last block's input (B, N, dim) to its attention (B, heads, num_queries, N)."""
        last = self.blocks[-1]
        q, k, _ = last.attn.queries_keys_values(last.norm1(x), num_queries, angles)
        return attention_matrix(q, k)

    def get_last_selfattention(self, images, num_queries: int | None = None):
        """Attention of the last block, (B, heads, num_queries, N).

        Every row sums to 1 over all tokens: [CLS], registers, patches row by row. `num_queries` = 1
        gives the row of [CLS] alone. Images are (B, 3, H, W), normalized.
        """
        x = self.before_last_block(images)
        return self.last_attention(x, num_queries, self.rotary_angles(images))


def init_weights(network: nn.Module, std: float):
    """Give all nn.Linear layers truncated normal weights and zero biases, as DINO does.

    `std` = 0 stands for 1/√inputs, which is 0.1 for a width of 96. DINO's 0.02 is so little in a
    narrow network that learning starts late.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=std or module.in_features**-0.5)
            nn.init.zeros_(module.bias)


@dataclass(frozen=True)
class HeadShape:
    """What decides the shapes of a projection head's weights."""

    out_dim: int | None  # number of prototypes, K; None: the head ends at its bottleneck
    hidden_dim: int
    layers: int  # linear layers of the MLP
    bottleneck_dim: int
    norm: bool  # a LayerNorm after each hidden layer


class ProjectionHead(nn.Module):
    """From the feature of [CLS] (B, dim) to the space in which the loss is computed (DINO's head).

    An MLP leads to a bottleneck, which is L2-normalized: (B, bottleneck_dim), what the NCE loss
    compares. With `out_dim` = K a layer of prototypes follows: (B, K), the logits of the DINO loss
    and of supervised learning.

    `shape.norm` is for training from random weights, where DINO's head, which has no norm, barely
    gets below the loss of chance. Batch norm is not offered: it would couple the images of a batch,
    whose gradient train.py computes in pieces.
    """

    def __init__(self, dim: int, shape: HeadShape, init_std: float = 0.02):
        super().__init__()
        layers = []
        inputs = dim
        for _ in range(shape.layers - 1):
            layers.append(nn.Linear(inputs, shape.hidden_dim))
            if shape.norm:
                layers.append(nn.LayerNorm(shape.hidden_dim, eps=1e-6))
            layers.append(nn.GELU())
            inputs = shape.hidden_dim
        layers.append(nn.Linear(inputs, shape.bottleneck_dim))
        self.mlp = nn.Sequential(*layers)
        init_weights(self.mlp, init_std)
        if shape.out_dim:
            self.last_layer = Prototypes(shape.bottleneck_dim, shape.out_dim)
        else:
            self.last_layer = nn.Identity()

    def forward(self, x):
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class Prototypes(nn.Module):
    """DINO's last layer: the cosine of the input with each of K directions.

    The weights are weight_g · weight_v / ‖weight_v‖, row by row (weight normalization), and
    weight_g stays 1, as in DINO. The input (B, dim) is L2-normalized; the output is (B, K).
    """

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(out_dim, dim))
        self.register_buffer("weight_g", torch.ones(out_dim, 1))  # kept since DINO's files have it
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))

    def forward(self, x):
        # Scale the logits (B, K) and not the weights (K, dim), which are more numbers as a rule.
        scale = self.weight_g[:, 0] / self.weight_v.norm(dim=-1)
        return F.linear(x, self.weight_v) * scale


def build_network(config: Config) -> nn.Sequential:
    """Backbone and head with random weights.

    They follow from config.seed, with which torch's global generator is seeded.
    """
    torch.manual_seed(config.seed % 2**63)  # torch takes no more than 64 bits
    shape = ViTShape(
        patch_size=config.patch_size,
        dim=config.dim,
        depth=config.depth,
        heads=config.heads,
        pos_size=config.pos_size,
        mlp_ratio=config.mlp_ratio,
        registers=config.registers,
        antialias=config.antialias,
        norm_eps=config.norm_eps,
        rotary=config.rotary,
    )
    backbone = VisionTransformer(shape, config.init_std)
    backbone.checkpoint_blocks = config.checkpoint_blocks
    head_shape = HeadShape(
        out_dim=make_loss(config).num_prototypes,
        hidden_dim=config.head_hidden_dim,
        layers=config.head_layers,
        bottleneck_dim=config.bottleneck_dim,
        norm=config.head_norm,
    )
    head = ProjectionHead(config.dim, head_shape, config.init_std)
    return nn.Sequential(OrderedDict(backbone=backbone, head=head))  # DINO's names
