"""Pictures of pictures: data, reconstructions, what the latent plane decodes to.

Functions ``(values, ..., ax=None) -> ax`` that only draw, see :mod:`pyro_vae.plot_style`.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.patches import Rectangle
from torch import Tensor

from pyro_vae.contracts import check_at_least_one
from pyro_vae.plot_style import new_axes, plain_text


def image_grid(
    images: Tensor,
    columns: int = 10,
    value_range: tuple[float, float] = (0.0, 1.0),
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """Pictures in reading order, row by row.

    One channel is drawn as dark ink on white paper, three as colours.

    Args:
        images: [N, H, W] or [N, C, H, W] with C = 1 or 3.
        columns: pictures in a row.
        value_range: the values drawn as white and black (three channels: as 0 and full); others are clipped.
        ax: where to draw; a new figure if None.
        title: above the grid.

    Returns:
        The axes; its one image holds the tiles, scaled to [0, 1] and enlarged where small.
    """
    tiles = as_tiles(images, value_range)
    check_at_least_one(columns=columns)
    ax, _, _ = show_tiles(tiles, *np.divmod(np.arange(len(tiles)), min(columns, len(tiles))), ax)
    ax.set(xticks=[], yticks=[], title=title or "")
    return ax


def reconstructions(
    x: Tensor,
    x_hat: Tensor,
    columns: int = 10,
    value_range: tuple[float, float] = (0.0, 1.0),
    ax: Axes | None = None,
) -> Axes:
    """Originals, each above its reconstruction.

    Args:
        x: originals, [N, H, W] or [N, C, H, W] with C = 1 or 3.
        x_hat: their reconstructions, of the same shape.
        columns: pictures in a row; more of them continue in a further pair of rows.
        value_range: the values drawn as white and black; others are clipped.
        ax: where to draw; a new figure if None.

    Returns:
        The axes.

    Raises:
        ValueError: x and x_hat differ in shape, or are not pictures.
    """
    if x.shape != x_hat.shape:
        found, expected = tuple(x_hat.shape), tuple(x.shape)
        raise ValueError(f"x_hat has shape {found}, expected that of x, {expected}: pass pairs.")
    check_at_least_one(columns=columns)
    tiles = np.concatenate([as_tiles(x, value_range), as_tiles(x_hat, value_range)])
    pair, column = np.divmod(np.arange(len(x)), min(columns, len(x)))
    row = 2.25 * pair  # the space keeps a reconstruction apart from the original below it
    ax, middle, _ = show_tiles(tiles, np.concatenate([row, row + 1]), np.tile(column, 2), ax)
    originals, means = np.split(middle, 2)
    ax.set_xticks([])
    ticks = {**dict.fromkeys(originals.tolist(), "original x"), **dict.fromkeys(means.tolist(), "mean of p(x | z)")}
    ax.set_yticks(list(ticks), labels=list(ticks.values()))
    ax.tick_params(length=0)
    return ax


def manifold(
    decode: Callable[[Tensor], Tensor],
    num: int = 15,
    value_range: tuple[float, float] = (0.0, 1.0),
    ax: Axes | None = None,
    quantiles: bool = True,
    limits: tuple[tuple[float, float], tuple[float, float]] = ((-3.0, 3.0), (-3.0, 3.0)),
) -> Axes:
    """Decoded pictures over a two-dimensional latent space, each drawn at its own coordinate, z2 upwards.

    Args:
        decode: z [num * num, 2] -> pictures [num * num, H, W] or [num * num, C, H, W].
        num: pictures in each direction.
        value_range: the values drawn as white and black; others are clipped.
        ax: where to draw; a new figure if None.
        quantiles: place the grid at quantiles of the standard normal, so that each picture stands for an
            equal share of the prior; if False, evenly between ``limits``.
        limits: lowest and highest z1, lowest and highest z2; for ``quantiles=False``.

    Returns:
        The axes; its ticks stand at the middle of a picture and show the coordinate that was decoded there.
    """
    check_at_least_one(num=num)
    if quantiles:
        steps = torch.tensor([NormalDist().inv_cdf((i + 0.5) / num) for i in range(num)])
        z1 = z2 = steps
    else:
        z1, z2 = (torch.linspace(*limit, num) for limit in limits)
    z = torch.stack([z1.repeat(num), z2.flip(0).repeat_interleave(num)], dim=1)  # in reading order, from the top
    tiles = as_tiles(decode(z), value_range)
    if len(tiles) != len(z):
        raise ValueError(f"decode(z) gave {len(tiles)} pictures, expected {len(z)}: one for each row of z.")
    ax, y, x = show_tiles(tiles, *np.divmod(np.arange(num * num), num), ax)
    fewest = max(1, math.ceil((num - 1) / 8))  # at most nine ticks, preferably from end to end
    step = next((s for s in range(fewest, num // 3 + 1) if (num - 1) % s == 0), fewest)
    ax.set_xticks(x[:num:step].tolist(), labels=[_number(value) for value in z1[::step]])
    ax.set_yticks(y[::-num][::step].tolist(), labels=[_number(value) for value in z2[::step]])
    spacing = "quantiles of N(0, 1)" if quantiles else "evenly spaced"
    ax.set(xlabel=f"$z_1$ ({spacing})", ylabel=f"$z_2$ ({spacing})")
    return ax


def code_pictures(
    images: Tensor, names: Sequence[str], value_range: tuple[float, float] = (0.0, 1.0), ax: Axes | None = None
) -> Axes:
    """What each value of a discrete z decodes to, its name above.

    Args:
        images: [S, H, W] or [S, C, H, W] with C = 1 or 3, one for each value.
        names: the S names.
        value_range: the values drawn as white and black; others are clipped.
        ax: where to draw; a new figure if None.

    Returns:
        The axes.

    Raises:
        ValueError: there is not one name for each picture.
    """
    tiles = as_tiles(images, value_range)
    if len(names) != len(tiles):
        raise ValueError(f"names has {len(names)} entries, expected {len(tiles)}: one for each picture.")
    row, column = np.divmod(np.arange(len(tiles)), min(10, len(tiles)))
    ax, y, x = show_tiles(tiles, 1.3 * row, column, ax)  # room for the names
    half = (y[0] + 1.5) if len(y) else 0.0
    for name, down, across in zip(names, y, x, strict=True):
        ax.text(across, down - half - 1, plain_text(name), ha="center", va="bottom", fontsize=9)
    ax.set(xticks=[], yticks=[])
    return ax


def as_tiles(images: Tensor, value_range: tuple[float, float]) -> np.ndarray:
    """Pictures as [N, H, W, C], scaled to [0, 1]."""
    images = images.detach().cpu().float()
    if images.ndim == 3:
        images = images.unsqueeze(1)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        found = tuple(images.shape)
        raise ValueError(f"images have shape {found}, expected [N, H, W] or [N, 1 or 3, H, W]: reshape them.")
    low, high = value_range
    if not low < high:
        raise ValueError(f"value_range is {value_range}, expected (lowest, highest): put the smaller first.")
    return ((images - low) / (high - low)).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def show_tiles(
    tiles: np.ndarray, row: np.ndarray, column: np.ndarray, ax: Axes | None
) -> tuple[Axes, np.ndarray, np.ndarray]:
    """Draw tiles [N, H, W, C] at their rows and columns; returns the y and x of their centres as well, each [N]."""
    enlarge, gap = max(1, round(28 / max(tiles.shape[1:3]))), 2  # pictures of 8 pixels need a gap below one pixel
    tiles = tiles.repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    height, width, channels = tiles.shape[1:]
    top = np.rint(row * (height + gap)).astype(int)
    left = np.rint(column * (width + gap)).astype(int)
    canvas = np.full((top.max() + height, left.max() + width, channels), 0.0 if channels == 1 else 1.0)
    for tile, i, j in zip(tiles, top, left, strict=True):
        canvas[i : i + height, j : j + width] = tile
    ax = ax or new_axes(7.0, min(0.7 + 7.0 * canvas.shape[0] / canvas.shape[1], 9.5))
    ink = canvas.squeeze(-1) if channels == 1 else canvas
    ax.imshow(ink, cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
    if channels == 1:  # ink on white paper leaves open where a picture ends
        corners = zip(left - (gap + 1) / 2, top - (gap + 1) / 2, strict=True)
        frames = [Rectangle(corner, width + gap, height + gap) for corner in corners]
        ax.add_collection(PatchCollection(frames, fc="none", ec="0.8", lw=0.6, clip_on=False))
    ax.set(xlim=(-1.5, canvas.shape[1] + 0.5), ylim=(canvas.shape[0] + 0.5, -1.5))
    ax.spines[:].set_visible(False)
    return ax, top + (height - 1) / 2, left + (width - 1) / 2


def _number(value: Tensor) -> str:
    return f"{round(float(value), 2) + 0.0:g}".replace("-", "−")
