"""Pictures of what a code is good for: its cloud, its neighbours, its confusions, what it finds odd.

Functions ``(values, ..., ax=None) -> ax`` that only draw, see :mod:`pyro_vae.plot_style`.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Circle, Rectangle
from torch import Tensor

from pyro_vae import image_plots, latent_plots
from pyro_vae.clouds import Ball
from pyro_vae.contracts import check_at_least_one
from pyro_vae.plot_style import BLUE, VERMILION, new_axes, plain_text, tidy


def cloud(
    codes: Tensor,
    ball: Ball,
    labels: Tensor | None = None,
    class_names: Sequence[str] | None = None,
    sites: Tensor | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Two coordinates of the codes, the circle of the ball that holds them, and sites such as a lattice.

    Of more than two dimensions the first two are drawn as they are: the ball's radius counts the others too, so an
    empty ring between cloud and circle is what the projection makes of a ball without holes.

    Args:
        codes: [N, D], D >= 2.
        ball: see :func:`pyro_vae.clouds.ball`.
        labels: classes, integers from 0, [N].
        class_names: the name of each class; their numbers if None.
        sites: [S, D], drawn as crosses.
        ax: where to draw; a new figure if None.

    Returns:
        The axes.

    Raises:
        ValueError: codes of one dimension, or a ball of another number.
    """
    if codes.ndim != 2 or codes.shape[1] < 2 or ball.centre.shape != codes.shape[1:]:
        found = f"{tuple(codes.shape)} and a centre {tuple(ball.centre.shape)}"
        raise ValueError(f"expected codes [N, D] with D >= 2 and a ball of D dimensions, found {found}.")
    ax = latent_plots.latent_scatter(codes[:, :2], labels, class_names, ax, prior_circle=False)
    centre = ball.centre[:2].tolist()
    inside = float(ball.contains(codes.to(ball.centre)).double().mean())
    dim = codes.shape[1]
    where = "" if dim == 2 else f", counted in all {dim} dimensions"
    ax.add_patch(Circle((centre[0], centre[1]), ball.radius, fill=False, ec="#D00000", lw=1.4))
    if sites is not None:
        ax.plot(*sites[:, :2].cpu().T.tolist(), ls="", marker="+", ms=4, mew=0.7, color="black")
    ax.set(xlabel="$z_1$", ylabel="$z_2$")
    ax.set_title(f"circle: radius {ball.radius:.2f}, {100 * inside:.0f} % inside{where}", fontsize=9)
    reach = 1.08 * ball.radius
    points = codes[:, :2].detach().cpu()
    low, high = torch.minimum(points.amin(0), ball.centre[:2].cpu() - reach), points.amax(0)
    high = torch.maximum(high, ball.centre[:2].cpu() + reach)
    ax.set(xlim=(float(low[0]), float(high[0])), ylim=(float(low[1]), float(high[1])), adjustable="box")
    return ax


def circle(
    decode: Callable[[Tensor], Tensor],
    num: int = 24,
    value_range: tuple[float, float] = (0.0, 1.0),
    ax: Axes | None = None,
) -> Axes:
    """Decoded pictures around the unit circle, each at its own place: the manifold of a prior on the circle.

    Args:
        decode: z [num, 2], of length one -> pictures [num, H, W] or [num, C, H, W].
        num: pictures, counterclockwise from z = (1, 0).
        value_range: the values drawn as white and black; others are clipped.
        ax: where to draw; a new figure if None.

    Returns:
        The axes; its coordinates are z.
    """
    check_at_least_one(num=num)
    angle = torch.arange(num) * (2 * math.pi / num)
    z = torch.stack([angle.cos(), angle.sin()], 1)
    tiles = image_plots.as_tiles(decode(z), value_range)
    if len(tiles) != num:
        raise ValueError(f"decode(z) gave {len(tiles)} pictures, expected {num}: one for each row of z.")
    ax = ax or new_axes(6.4, 6.4)
    ax.add_patch(Circle((0, 0), 1.0, fill=False, ec="0.6", lw=1.0))
    # Side by side on a larger circle, apart from each other and from the unit circle.
    width = 2 * math.sin(math.pi / max(num, 4)) / (1.5 - math.sin(math.pi / max(num, 4)))
    ring = 1.05 + 0.75 * width
    for place, tile in zip(z.tolist(), tiles, strict=True):
        ink = tile.squeeze(-1) if tile.shape[2] == 1 else tile
        x, y = (ring * number for number in place)
        tall = width / max(tile.shape[:2])
        half = tall * tile.shape[1] / 2, tall * tile.shape[0] / 2
        extent = (x - half[0], x + half[0], y - half[1], y + half[1])
        ax.imshow(ink, cmap="Greys", vmin=0, vmax=1, interpolation="nearest", extent=extent)
        ax.add_patch(Rectangle((extent[0], extent[2]), 2 * half[0], 2 * half[1], fill=False, ec="0.8", lw=0.6))
        ax.plot(*place, marker="o", ms=3, color=BLUE)
    reach = ring + 0.55 * width
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xlabel="$z_1$", ylabel="$z_2$")
    ax.set(xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def neighbours(
    queries: Tensor,
    found: Mapping[str, Tensor],
    query_labels: Sequence[object] | None = None,
    found_labels: Mapping[str, Sequence[Sequence[object]]] | None = None,
    value_range: tuple[float, float] = (0.0, 1.0),
    ax: Axes | None = None,
) -> Axes:
    """Each query beside its nearest neighbours, one row for each way to measure the distance, nearest first.

    Args:
        queries: pictures [Q, H, W] or [Q, C, H, W].
        found: way -> the neighbours' pictures, [Q, k, ...] of the queries' shape.
        query_labels: what to write above each query.
        found_labels: way -> Q lists of k labels; one unlike the query's is written in red.
        value_range: the values drawn as white and black; others are clipped.
        ax: where to draw; a new figure if None.

    Returns:
        The axes.

    Raises:
        ValueError: not as many queries everywhere, or no way to measure.
    """
    shapes = {tuple(part.shape[:2]) for part in found.values()}
    if len(shapes) != 1 or next(iter(shapes))[0] != len(queries):
        raise ValueError(f"expected neighbours [Q, k, ...] of {len(queries)} queries, found {shapes}: one set a way.")
    (num, most), ways = next(iter(shapes)), len(found)
    label_room, beside, below = 1.45, most + 2.6, 0.4  # in pictures: of a row, to the next query, below its rows
    block, side = np.divmod(np.arange(num), min(2, num))
    top, left = block * (ways * label_room + below), side * beside
    tiles, rows, columns = [image_plots.as_tiles(queries, value_range)], [top], [left]
    for way, part in enumerate(found.values()):
        tiles.append(image_plots.as_tiles(part.flatten(0, 1), value_range))
        rows.append(np.repeat(top + way * label_room, most))
        columns.append(np.repeat(left + 1.6, most) + np.tile(np.arange(most), num))
    widest, deepest = float(left.max()) + most + 1.6, float(top.max()) + ways * label_room
    ax = ax or new_axes(1.6 + 0.55 * widest, 0.8 + 0.55 * deepest)
    ax, y, x = image_plots.show_tiles(np.concatenate(tiles), np.concatenate(rows), np.concatenate(columns), ax)
    half = (ax.get_xlim()[1] - float(x.max())) - 1 + 1.5  # of a picture, and its frame

    def write(place: int, label: object, colour: str, weight: str = "normal") -> None:
        text = ax.text(x[place], y[place] - half, plain_text(label), ha="center", va="bottom", fontsize=8)
        text.set(color=colour, weight=weight)

    for q, label in enumerate(query_labels or []):
        write(q, label, "black")
    for way, name in enumerate(found):
        for q, labels in enumerate((found_labels or {}).get(name, [])):
            for j, label in enumerate(labels):
                same = query_labels is None or str(label) == str(query_labels[q])
                look = ("black", "normal") if same else ("#D00000", "bold")
                write(num + (way * num + q) * most + j, label, *look)
    of_left = [q for q in range(num) if side[q] == 0]
    at = [y[num + (way * num + q) * most] for q in of_left for way in range(ways)]
    ax.set_yticks(at, labels=[plain_text(name) for name in found] * len(of_left))
    heads = {x[q]: "query" for q in range(num)}
    heads |= {float(np.mean(x[num + q * most : num + (q + 1) * most])): "nearest first" for q in range(num)}
    ax.set_xticks(list(heads), labels=list(heads.values()))
    ax.set_ylim(top=float(y[0] - 2 * half))  # room for the labels of the first row
    ax.tick_params(length=0, labelsize=9)
    return ax


def confusion(shares: Tensor, names: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """How often each class is taken for each other, the right answers left out: they would outshine the rest.

    Args:
        shares: of the true class (rows) taken for each class, [C, C], 0 to 1.
        names: of the classes; their numbers if None.
        ax: where to draw; a new figure if None.

    Returns:
        The axes; percentages of half a per cent or more are written in their cell.

    Raises:
        ValueError: shares is not [C, C], or there is not one name for each class.
    """
    num = len(shares)
    names = [str(c) for c in range(num)] if names is None else list(names)
    if shares.shape != (num, num) or len(names) != num:
        raise ValueError(f"expected shares [C, C] and C names, found {tuple(shares.shape)} and {len(names)} names.")
    ax = ax or new_axes(5.6, 5.2)
    off = shares.detach().cpu().double().clone()
    off.fill_diagonal_(math.nan)
    highest = float(off.nan_to_num().max()) or 1.0
    ax.imshow(off.numpy(), cmap="Blues", vmin=0, vmax=highest)
    for true in range(num):
        for taken in range(num):
            share = float(off[true, taken])
            if true != taken and share >= 0.005:
                colour = "white" if share > 0.6 * highest else "black"
                ax.text(taken, true, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=colour)
    ax.set_xticks(range(num), labels=[plain_text(name) for name in names])
    ax.set_yticks(range(num), labels=[plain_text(name) for name in names])
    ax.set(xlabel="taken for", ylabel="true class")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return ax


def odd_scores(
    ordinary: Tensor, odd: Tensor, label: str, names: tuple[str, str] = ("ordinary", "odd"), ax: Axes | None = None
) -> Axes:
    """How far apart the scores of ordinary and of odd examples lie: two histograms of equal area.

    Args:
        ordinary: scores, [n].
        odd: scores, [m].
        label: of the axis: what the score is, with its units.
        names: of the two.
        ax: where to draw; a new figure if None.

    Returns:
        The axes.
    """
    ax = ax or new_axes(4.8, 3.2)
    both = torch.cat([ordinary, odd]).double().cpu()
    low, high = both.quantile(torch.tensor([0.002, 0.998], dtype=torch.float64)).tolist()
    edges = np.linspace(low, high if high > low else low + 1, 61).tolist()
    for scores, name, colour, style in zip((ordinary, odd), names, (BLUE, VERMILION), "-:", strict=True):
        values = scores.double().cpu().clamp(edges[0], edges[-1]).numpy()
        ax.hist(values, bins=edges, density=True, color=colour, alpha=0.25)
        ax.hist(values, bins=edges, density=True, histtype="step", color=colour, lw=1.6, ls=style, label=name)
    ax.set(xlabel=label, ylabel="density", yticks=[])
    ax.margins(y=0.35)  # for the legend
    ax.legend(frameon=False, fontsize=9, loc="upper center")
    tidy(ax)
    return ax
