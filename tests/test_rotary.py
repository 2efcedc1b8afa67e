"""Angles and rotations are those computed by hand, and q · k depends on distances alone."""

import math

import pytest
import torch

from rotary import RotaryPositions, rotate


def test_angles_by_hand():
    """On 2 × 3 patches the rows are at ±½ and the columns at -⅔, 0, ⅔; periods are 1 and 10."""
    angles = RotaryPositions(head_dim=8)((2, 3))
    assert angles.shape == (6, 4)
    expected = [-math.pi, -math.pi / 10, 4 * math.pi / 3, 4 * math.pi / 30]
    assert angles[2].tolist() == pytest.approx(expected, abs=1e-6)
    longer = RotaryPositions(head_dim=8, base=25)
    assert longer.periods.tolist() == pytest.approx([1, 5])


def test_numbers_turn_in_pairs_that_are_half_a_head_apart():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    turned = rotate(x, torch.tensor([math.pi / 2, math.pi]).view(1, 1, 2))
    torch.testing.assert_close(turned.flatten(), torch.tensor([-3.0, -2.0, 1.0, -4.0]))
    assert rotate(x.bfloat16(), torch.ones(1, 1, 2)).dtype == torch.bfloat16


def test_products_of_turned_numbers_depend_on_the_distance_of_the_patches():
    """The same q and k on all patches of 1 × 5: q · k is the same for equally distant patches."""
    angles = RotaryPositions(head_dim=8)((1, 5))[None]
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator)
    q = rotate(q.expand(1, 1, 5, 8), angles)
    k = rotate(k.expand(1, 1, 5, 8), angles)
    products = (q @ k.mT)[0, 0]
    for distance in range(-4, 5):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert products[0].std() > 0.1


def test_heads_of_other_widths_are_refused():
    with pytest.raises(ValueError, match="width 6: rotary positions need a multiple of 4"):
        RotaryPositions(head_dim=6)
