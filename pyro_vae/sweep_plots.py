"""Pictures of a sweep: numbers against the argument varied, rate against distortion.

Functions ``(values, ..., ax=None) -> ax`` that only draw, see :mod:`pyro_vae.plot_style`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from pyro_vae.plot_style import BLUE, GREY, new_axes, plain_text, tidy


def sweep(
    values: Sequence[str], numbers: Mapping[str, Sequence[Sequence[float]]], name: str = "", ax: Axes | None = None
) -> Axes:
    """What becomes of some numbers as one argument is varied: mean and standard error over seeds, a dot for each seed.

    Args:
        values: the V values of the argument; where all are numbers they are placed as such, on a logarithmic axis if
            they span more than a factor of 20.
        numbers: metric -> the numbers of each value's seeds, V of them; a value may have none.
        name: the argument.
        ax: where to draw; a new figure if None.

    Returns:
        The axes; its panels, one for each metric, are ``ax.child_axes``.

    Raises:
        ValueError: no metric, or one without numbers for each value.
    """
    for metric, row in numbers.items():
        if len(row) != len(values):
            raise ValueError(f"{metric} has {len(row)} entries, expected {len(values)}: one for each value.")
    if not numbers or not values:
        raise ValueError("numbers is empty, expected at least one metric: name -> numbers of each value.")
    columns = min(3, len(numbers))
    rows = math.ceil(len(numbers) / columns)
    ax = ax or new_axes(3.6 * columns, 2.9 * rows)
    ax.set_axis_off()
    places = _places(values)
    at = np.arange(len(values), dtype=float) if places is None else places
    for i, (metric, row) in enumerate(numbers.items()):
        corner = (i % columns) / columns, 1 - (i // columns + 1) / rows
        panel = ax.inset_axes((corner[0] + 0.17 / columns, corner[1] + 0.22 / rows, 0.79 / columns, 0.64 / rows))
        for place, found in zip(at, row, strict=True):
            panel.plot([place] * len(found), found, ls="", marker="o", ms=3, color=GREY, alpha=0.6, zorder=1)
        there = [k for k, found in enumerate(row) if len(found)]
        means = [float(np.mean(row[k])) for k in there]
        errors = [float(np.std(row[k], ddof=1)) / math.sqrt(len(row[k])) if len(row[k]) > 1 else 0.0 for k in there]
        look: dict[str, Any] = {"color": BLUE, "marker": "o", "mfc": "white", "ms": 5, "capsize": 3, "lw": 1.4}
        panel.errorbar(at[there], means, yerr=errors, ls="" if places is None else "-", **look)
        if places is None:
            long = max(map(len, values)) * len(values) > 24
            turned: dict[str, Any] = {"rotation": 30, "ha": "right"} if long else {}
            panel.set_xticks(at.tolist(), labels=[plain_text(value) for value in values], fontsize=8, **turned)
            panel.set_xlim(-0.5, len(values) - 0.5)
        else:
            if places.min() > 0 and places.max() > 20 * places.min():
                panel.set_xscale("log")
            if len(values) <= 8:
                panel.set_xticks(places.tolist(), labels=list(values))
                panel.set_xticks([], minor=True)
        panel.tick_params(labelsize=8)
        panel.set_title(plain_text(metric), fontsize=10)
        if i + columns >= len(numbers):
            panel.set_xlabel(plain_text(name), fontsize=9)
        tidy(panel)
    return ax


def rate_distortion(
    points: Sequence[Sequence[tuple[float, float]]], values: Sequence[str], name: str = "", ax: Axes | None = None
) -> Axes:
    """Rate against distortion: what a code costs against what it leaves unexplained, with lines of equal ELBO.

    Args:
        points: (rate, distortion) of each seed of each of the V values, nats per example.
        values: the V values of what is varied, written beside their points.
        name: what is varied.
        ax: where to draw; a new figure if None.

    Returns:
        The axes: a dot for each seed, the means of the values joined in their order where they are numbers.

    Raises:
        ValueError: not one value for each set of points, or a set without any.

    Source: Alemi, Poole, Fischer, Dillon, Saurous, Murphy (2018), Fixing a broken ELBO, arXiv:1711.00464.
    """
    if len(points) != len(values) or not all(len(found) for found in points) or not len(points):
        raise ValueError(f"points has {len(points)} sets, expected {len(values)} with one point or more: one a value.")
    ax = ax or new_axes(6.0, 4.8)
    seeds = np.concatenate([np.asarray(found, dtype=float) for found in points])
    low, high = seeds.min(0), seeds.max(0)
    margin = 0.12 * np.maximum(high - low, 0.02 * np.abs(high).max() + 1e-9)
    (left, bottom), (right, top) = low - margin, high + margin
    left = max(left, -0.02 * (right - left)) if low[0] >= 0 else left
    for total in MaxNLocator(nbins=7).tick_values(left + bottom, right + top):
        if left + bottom < total < right + top:
            ax.plot([left, right], [total - left, total - right], color="0.8", lw=0.8, zorder=0)
            # At the end of the line, inside the picture, that is farther from the points.
            ends = np.array([(max(left, total - top), min(top, total - left)), (min(right, total - bottom), 0.0)])
            ends[1, 1] = total - ends[1, 0]
            away = np.abs((ends[:, None] - seeds[None]) / np.array([right - left, top - bottom])).max(-1).min(1)
            x, y = ends[away.argmax()]
            side = "left" if away.argmax() == 0 else "right"
            text = f" ELBO {-total:g} ".replace("-", "−")
            ax.text(x, y, text, ha=side, va="top" if side == "left" else "bottom", color="0.5", fontsize=8)
    ax.plot(seeds[:, 0], seeds[:, 1], ls="", marker="o", ms=3, color=GREY, alpha=0.6)
    means = np.array([np.mean(found, axis=0) for found in points])
    places = _places(values)
    order = np.arange(len(values)) if places is None else np.argsort(places)
    ax.plot(*means[order].T, ls="" if places is None else "-", lw=1.4, color=BLUE, marker="o", mfc="white")
    for value, (x, y) in zip(values, means, strict=True):
        written = ax.annotate(plain_text(value), (x, y), (6, 5), textcoords="offset points", fontsize=9, color=BLUE)
        written.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    ax.set(xlim=(left, right), ylim=(bottom, top))
    ax.set_xlabel("rate KL(q(z | x) || p(z)), nats per example")
    ax.set_ylabel("distortion −E log p(x | z), nats per example")
    notes = [f"labels: {plain_text(name)}"] * bool(name) + ["grey lines: equal ELBO"]
    notes += ["dots: runs"] * (len(seeds) > len(points))
    ax.set_title("; ".join(notes), fontsize=9)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _places(values: Sequence[str]) -> np.ndarray | None:
    """The values as numbers, where all are different ones."""
    try:
        numbers = np.array([float(value) for value in values])
    except ValueError:
        return None
    return numbers if np.isfinite(numbers).all() and len(np.unique(numbers)) == len(numbers) else None
