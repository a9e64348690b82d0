r"""Sprites: pictures whose factors of variation are known, made on the spot.

.. math:: x = \mathrm{render}(\text{shape}, \text{scale}, \text{rotation}, \text{column}, \text{row})
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_vae.data_contract import DataSet, expect, expect_whole, row_counts, seeded, split_rows

_LARGEST = 0.27  # half the extent of the largest shape, in widths of the picture
_FINER = 4  # points a pixel in each direction; a pixel is ink where most of them are


class Sprites(DataSet):
    r"""One white shape at each combination of five factors, bits [N, 1, size, size]; nothing to download.

    .. math:: N = 3 \cdot \text{scales} \cdot \text{rotations} \cdot \text{positions}^2

    A square, an ellipse or a heart of some size, turned by some angle (a full turn is divided evenly), at some place.
    Each combination is there exactly once, so the factors are independent and uniform; of the square and the ellipse
    some rotations are the same picture. The labels are the shapes. Smaller than dSprites (737,280 pictures of 64x64),
    and not its pictures: numbers for one are not numbers for the other.

    Attributes:
        factor_names: shape, scale, rotation, column, row.
        factor_sizes: how many values each has.
        train_factors: int64 [N, 5], the value of each factor, from 0.
        test_factors: int64 [M, 5].
        categorical: which factors have no order: the shape.

    Args:
        size: pixels in each direction, >= 8.
        num_scales: sizes of the shape.
        num_rotations: angles.
        num_positions: places in each direction.
        test_fraction: share of the pictures held out as test, between 0 and 1.
        seed: seed of the split.

    Raises:
        ValueError: an argument is out of its range.

    Source: after Matthey, Higgins, Hassabis, Lerchner (2017), dSprites: Disentanglement testing Sprites dataset.

    Example:
        >>> sprites = Sprites(16, num_scales=2, num_rotations=4, num_positions=3)
        >>> sprites.train.shape, sprites.train_factors.shape, sprites.policy
        (torch.Size([194, 1, 16, 16]), torch.Size([194, 5]), 'Sprites 16x16, 3 shapes x 2 scales x 4 rotations ...')
    """

    factor_names: Sequence[str] = ("shape", "scale", "rotation", "column", "row")
    categorical: Sequence[int] = (0,)

    def __init__(
        self,
        size: int = 32,
        num_scales: int = 4,
        num_rotations: int = 8,
        num_positions: int = 8,
        test_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        expect_whole("size", size, 8)
        numbers = {"num_scales": num_scales, "num_rotations": num_rotations, "num_positions": num_positions}
        for name, number in numbers.items():
            expect_whole(name, number, 1)
        self.factor_sizes = (3, num_scales, num_rotations, num_positions, num_positions)
        count = math.prod(self.factor_sizes)
        expect(count * size**2 <= 2**31, "at most 2**31 pixels in all", count * size**2, "choose smaller numbers")
        # Whole pixels between two places, so that the same shape is the same bits everywhere.
        room = (1 - 2 * _LARGEST) * size
        step = int(room) if num_positions == 1 else int(room / (num_positions - 1))
        found = f"num_positions={num_positions} and size={size}"
        expect(
            step >= 1, f"at most {int(room) + 1} places for a size of {size}", found, "choose fewer, or a larger size"
        )
        factors = torch.cartesian_prod(*[torch.arange(n, device="cpu") for n in self.factor_sizes])
        looks = factors.view(-1, num_positions**2, 5)[:, 0, :3]
        first = (size - step * (num_positions - 1)) / 2
        corner = torch.cat([_render(rows, num_scales, num_rotations, size, first) for rows in looks.split(64)])
        places = factors[: num_positions**2, 3:].tolist()
        moved = [corner.roll((step * row, step * column), dims=(1, 2)) for column, row in places]
        pictures = torch.stack(moved, 1).reshape(-1, 1, size, size)
        train, test = split_rows(count, test_fraction, seeded(seed))
        self.train, self.test = pictures[train], pictures[test].float()
        self.train_factors, self.test_factors = factors[train], factors[test]
        self.train_labels, self.test_labels = factors[train, 0], factors[test, 0]
        self.classes = ["square", "ellipse", "heart"]
        self.natural_likelihood = ("Bernoulli", {})
        self.name = "Sprites"
        self.policy = (
            f"Sprites {size}x{size}, 3 shapes x {num_scales} scales x {num_rotations} rotations x {num_positions} "
            f"columns x {num_positions} rows, split with seed {seed}, {row_counts(self)}"
        )


def _render(factors: Tensor, scales: int, rotations: int, size: int, left: float) -> Tensor:
    """Pictures of (shape, scale, rotation) [S, 3], centred ``left`` pixels from left and top: bits [S, size, size]."""
    shape, scale, rotation = factors.T.to(torch.float32).unsqueeze(-1).unsqueeze(-1)
    share = scale / (scales - 1) if scales > 1 else torch.ones_like(scale)
    reach = (_LARGEST - 0.12 * (1 - share)) * size
    angle = 2 * math.pi * rotation / rotations
    points = (torch.arange(size * _FINER, dtype=torch.float32, device=factors.device) + 0.5) / _FINER - left
    x, y = points, points.unsqueeze(-1)
    u = (x * angle.cos() + y * angle.sin()) / reach
    v = (y * angle.cos() - x * angle.sin()) / reach
    square = (u.abs() < 0.7) & (v.abs() < 0.7)
    ellipse = u.square() + (v / 0.5).square() < 1
    a, b = 1.25 * u, 0.2 - 1.25 * v  # the heart's sextic, its tip downwards
    heart = (a.square() + b.square() - 1) ** 3 < a.square() * b**3
    ink = torch.where(shape == 0, square, torch.where(shape == 1, ellipse, heart)).to(torch.float32)
    return (torch.nn.functional.avg_pool2d(ink.unsqueeze(1), _FINER) > 0.5).to(torch.uint8).squeeze(1)
