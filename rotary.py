"""Rotary positions, which DINOv3 has in place of position embeddings.

The ViT of vit.py is a plain one. This is all that it needs to run DINOv3's weights too.
"""

import math

import torch
from torch import nn


class RotaryPositions(nn.Module):
    """The positions of DINOv3: angles by which `rotate` turns the queries and keys of patches.

    After that q · k depends on how far apart two patches are, at several scales. Nothing is added
    to the tokens. (Su et al. 2021, RoFormer; Siméoni et al. 2025, DINOv3.)
    """

    def __init__(self, head_dim: int, base: float = 100.0):
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"heads of width {head_dim}: rotary positions need a multiple of 4")
        pairs = head_dim // 4  # of numbers that turn with the row; as many turn with the column
        self.register_buffer("periods", base ** (torch.arange(pairs) / pairs))

    def forward(self, grid: tuple[int, int]):
        """Angles of the patches on a grid (rows, columns): (rows · columns, d / 2)."""
        # The centres of the patches are between -1 and 1 on both axes, whatever the grid.
        row, column = [
            (torch.arange(side, device=self.periods.device) + 0.5) / side * 2 - 1 for side in grid
        ]
        centres = torch.cartesian_prod(row, column)  # (patches, 2)
        angles = 2 * math.pi * centres[..., None] / self.periods  # (patches, 2, d / 4)
        return angles.flatten(1)


def rotate(x, angles):
    """Turn pairs of numbers of x (B, heads, N, d) by angles (1 or B, N, d / 2).

    The pairs are the first number with the one in the middle, the second with the next, and so on.
    """
    cos = angles.cos()[:, None]
    sin = angles.sin()[:, None]
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)
