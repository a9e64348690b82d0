"""Pictures of the codes z: where they lie, which values they take, what each dimension carries.

Functions ``(values, ..., ax=None) -> ax`` that only draw, see :mod:`pyro_vae.plot_style`.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from torch import Tensor

from pyro_vae.plot_style import BLUE, CLASS_COLOURS, CLASS_MARKERS, new_axes, plain_text, tidy

# A two-dimensional standard normal puts 99 % of its mass inside this radius: sqrt(-2 log 0.01).
PRIOR_RADIUS = math.sqrt(-2 * math.log(0.01))
_MOST_ENTRIES = 20  # a longer legend does not fit beside the picture; the names at the classes' centres remain


def latent_scatter(
    z: Tensor,
    labels: Tensor | None = None,
    class_names: Sequence[str] | None = None,
    ax: Axes | None = None,
    prior_circle: bool = True,
) -> Axes:
    """Codes as points, coloured by class.

    Two latent dimensions are drawn as they are; more are projected on their first two principal components; a
    single one is drawn against the class.

    Args:
        z: codes, [N, D].
        labels: classes, integers from 0, [N].
        class_names: the name of each class; their numbers if None.
        ax: where to draw; a new figure if None.
        prior_circle: draw the circle that holds 99 % of a standard normal prior (D = 2 only).

    Returns:
        The axes.

    Raises:
        ValueError: z is not [N, D] with N >= 1, or labels do not fit z.
    """
    if z.ndim != 2 or 0 in z.shape:
        raise ValueError(f"z has shape {tuple(z.shape)}, expected [N, D]: flatten each code.")
    if not z.isfinite().all():
        raise ValueError("z has infinite values or NaN, expected finite codes: the model that made them diverged.")
    classes, names = _classes(labels, class_names, len(z))
    points = z.detach().cpu().double()
    ax = ax or new_axes(6.4 if labels is None else 7.2, 6.0 if z.shape[1] > 1 else 4.0)
    if z.shape[1] == 1:
        rows = torch.from_numpy(classes).double()
        # Golden-ratio steps spread the points of a row evenly, without drawing random numbers.
        jitter = (torch.arange(len(z)) * 0.6180339887498949) % 1 - 0.5
        points = torch.stack([points[:, 0], rows + 0.7 * jitter], dim=1)
        ax.set(xlabel="$z_1$", ylabel="class" if names else "", yticks=range(len(names) or 1))
        ax.set_yticklabels([plain_text(name) for name in names] or [""])
    elif z.shape[1] == 2:
        ax.set(xlabel="$z_1$", ylabel="$z_2$", aspect="equal", adjustable="datalim")
    else:
        points, shares = _principal_components(points)
        for axis, name, share in zip((ax.xaxis, ax.yaxis), ("first", "second"), shares, strict=True):
            label = f"{name} principal component of z ({100 * share:.0f} % of the variance, D = {z.shape[1]})"
            axis.set_label_text(label)
        ax.set(aspect="equal", adjustable="datalim")
    size = float(np.clip(30000 / len(z), 7, 30))
    for k in range(max(1, len(names))):
        chosen = points[torch.from_numpy(classes == k)].numpy()
        colour = CLASS_COLOURS[k % len(CLASS_COLOURS)] if names else BLUE
        look: dict[str, Any] = {"color": colour, "marker": CLASS_MARKERS[k % len(CLASS_MARKERS)], "alpha": 0.75}
        entry = plain_text(names[k]) if len(names) in range(1, _MOST_ENTRIES + 1) else None
        # Rasterized: thousands of points as vectors make a slow page.
        ax.scatter(chosen[:, 0], chosen[:, 1], s=size, lw=0, label=entry, rasterized=True, **look)
    if names and z.shape[1] > 1:
        circle_size = 2 * PRIOR_RADIUS if prior_circle and z.shape[1] == 2 else 0.0
        for k, place in _label_places(points.numpy(), classes, names, circle_size).items():
            written = ax.text(place[0], place[1], plain_text(names[k]), ha="center", va="center", zorder=4)
            halo = withStroke(linewidth=3, foreground="white")
            written.set(fontsize=13, weight="bold", path_effects=[halo])
    if prior_circle and z.shape[1] == 2:
        angle = np.linspace(0, 2 * math.pi, 361)
        circle = PRIOR_RADIUS * np.cos(angle), PRIOR_RADIUS * np.sin(angle)
        ax.plot(*circle, color="black", lw=1.2, ls="--", label="99 % of N(0, I)")
    if z.shape[1] > 1 and 0 < len(names) <= _MOST_ENTRIES:
        ax.legend(title="class", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    elif z.shape[1] == 2 and prior_circle:
        ax.legend(loc="upper right")
    return ax


def code_usage(
    codes: Tensor,
    names: Sequence[str],
    labels: Tensor | None = None,
    class_names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """How many examples have each value of a discrete z as their most probable one, a bar for each, by class.

    Args:
        codes: the index of each example's value, integers from 0, [N].
        names: the names of the values.
        labels: classes, integers from 0, [N].
        class_names: the name of each class; their numbers if None.
        ax: where to draw; a new figure if None.

    Returns:
        The axes.
    """
    classes, entries = _classes(labels, class_names, len(codes))
    ax = ax or new_axes(7.2, 4.0)
    index = codes.detach().cpu().numpy()
    bottom = np.zeros(len(names))
    for k in range(max(1, len(entries))):
        height = np.bincount(index[classes == k], minlength=len(names)).astype(float)
        colour = CLASS_COLOURS[k % len(CLASS_COLOURS)] if entries else BLUE
        entry = plain_text(entries[k]) if len(entries) in range(1, _MOST_ENTRIES + 1) else None
        ax.bar(range(len(names)), height, bottom=bottom, color=colour, width=0.8, label=entry)
        bottom += height
    long = max(map(len, names)) > 3 and len(names) > 6
    ax.set_xticks(range(len(names)), labels=[plain_text(name) for name in names], rotation=90 if long else 0)
    ax.set_xlim(-0.7, max(len(names), 4) - 0.3)
    ax.set(xlabel="most probable z", ylabel="examples")
    if 0 < len(entries) <= _MOST_ENTRIES:
        ax.legend(title="class", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    tidy(ax)
    return ax


def kl_per_dimension(kl: Tensor, ax: Axes | None = None) -> Axes:
    """The KL divergence from the prior that each latent dimension carries, largest first.

    Args:
        kl: [D], nats per example.
        ax: where to draw; a new figure if None.

    Returns:
        The axes.

    Raises:
        ValueError: kl is not [D] with D >= 1.
    """
    if kl.ndim != 1 or not len(kl):
        raise ValueError(f"kl has shape {tuple(kl.shape)}, expected [D]: average over the examples.")
    few = len(kl) <= 3
    ax = ax or new_axes(2.7 + 0.4 * len(kl) if few else 6.4, 4.0)
    sizes, order = kl.detach().cpu().double().sort(descending=True)
    ax.bar(range(len(kl)), sizes.tolist(), color=BLUE, width=0.8)
    shown = range(0, len(kl), math.ceil(len(kl) / (30 if len(kl) < 100 else 16)))  # three digits need more room
    small = 10 if len(shown) <= 12 else 8
    ax.set_xticks(list(shown), labels=[str(int(order[i]) + 1) for i in shown], fontsize=small)
    middle, half = (len(kl) - 1) / 2, max(len(kl) / 2 + 0.2, 0.9)  # a single bar does not fill the page
    ax.set_xlim(middle - half, middle + half)
    active = int((sizes > 0.01).sum())
    text = f"{active} of {len(kl)} dimensions" + ("\n" if few else " ") + "above 0.01 nats"
    ax.text(0.98, 0.97, text, transform=ax.transAxes, ha="right", va="top")
    ax.set_ylim(bottom=min(0.0, float(sizes[-1])), top=(1.25 if few else 1.15) * max(float(sizes[0]), 0.01))
    ax.set(xlabel="latent dimension d, sorted", ylabel="KL(q($z_d$ | x) || p($z_d$)), nats per example")
    tidy(ax)
    return ax


def _classes(labels: Tensor | None, class_names: Sequence[str] | None, num: int) -> tuple[np.ndarray, Sequence[str]]:
    """The class of each point (0 without labels) and the classes' names (none without labels)."""
    if labels is None:
        return np.zeros(num, dtype=np.int64), []
    if labels.shape != (num,) or labels.is_floating_point() or labels.min() < 0:
        found = f"{tuple(labels.shape)} of {labels.dtype}"
        raise ValueError(f"labels are {found}, expected ({num},) integers from 0: one for each row of z.")
    highest = int(labels.max())
    names = [str(k) for k in range(highest + 1)] if class_names is None else list(class_names)
    if highest >= len(names):
        raise ValueError(f"class_names has {len(names)} entries, expected over {highest}: name every class.")
    return labels.detach().cpu().numpy(), names


def _label_places(
    points: np.ndarray, classes: np.ndarray, names: Sequence[str], smallest: float
) -> dict[int, np.ndarray]:
    """Where to write the name of each class: in its middle or near it, off other names and on few points.

    Args:
        points: [N, 2].
        classes: the class of each point, [N].
        names: of the classes.
        smallest: the picture's smallest extent.

    Returns:
        Class -> coordinates, of the classes that have points.
    """
    extent = max(float(np.ptp(points, axis=0).max()), smallest) or 1.0
    letter = np.array([0.02, 0.033]) * extent  # half of a letter in a picture of 6 inches, with a little room
    angles = np.linspace(0, 2 * math.pi, 16, endpoint=False)
    ring = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    steps = np.concatenate([np.zeros((1, 2)), *(r * 0.02 * extent * ring for r in range(1, 25))])
    places: dict[int, np.ndarray] = {}
    halves = {k: letter * (max(1, len(names[k])), 1) for k in range(len(names)) if (classes == k).any()}
    middles = {k: np.median(points[classes == k], axis=0) for k in halves}
    some = slice(None, None, math.ceil(len(points) / 2000))  # enough to see where it is crowded
    points, classes = points[some], classes[some]
    for k, half in halves.items():
        own = classes == k
        for rings in (6, 12, 24):  # farther only where the names nearby leave no room
            near_by = steps[: 1 + rings * len(ring)]
            candidates = middles[k] + near_by
            away = np.abs(candidates[:, None] - points[None])  # [candidates, N, 2]
            covered = (away < half).all(-1).sum(1)
            near = (away < 3 * half).all(-1)
            foreign = (near & ~own).sum(1) / np.maximum(near.sum(1), 1)
            cost = covered + 4 * foreign + np.hypot(*near_by.T) / half[1]
            taken = np.zeros(len(candidates), dtype=bool)
            for other in places.keys() - {k}:
                taken |= (np.abs(candidates - places[other]) < half + halves[other]).all(-1)
            places[k] = candidates[np.where(taken, np.inf, cost).argmin()]
            if not taken.all():
                break
    return places


def _principal_components(z: Tensor) -> tuple[Tensor, list[float]]:
    """The first two principal components of z [N, D] and their shares of the variance."""
    centred = z - z.mean(0)
    variances, directions = torch.linalg.eigh(centred.T @ centred)  # ascending
    first = directions[:, -2:].flip(1)
    # An eigenvector's sign is arbitrary: make its largest entry positive, so that pictures of one run agree.
    first = first * first.gather(0, first.abs().argmax(0, keepdim=True)).sign()
    shares = variances.flip(0)[:2] / variances.sum().clamp(min=1e-300)
    return centred @ first, shares.clamp(0, 1).tolist()
