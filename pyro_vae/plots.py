"""Pictures of a variational autoencoder: functions ``(values, ..., ax=None) -> ax`` that only draw.

Without ``ax`` each makes its own figure, outside pyplot: no window opens, no backend is picked, nothing stays
behind. Save it with ``ax.figure.savefig(path)``.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from torch import Tensor

History = Mapping[str, Sequence[float | None]]

# Okabe and Ito's colours for the few lines and bars.
BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "0.35"

# Ten colours for classes, chosen by search: with simulated protanopia, deuteranopia or tritanopia the closest
# two are still 27 apart in CIELAB (5 in matplotlib's default cycle). Markers differ as well.
CLASS_COLOURS = (
    *("#1010F0", "#C0C000", "#E00000", "#008060", "#F090B0"),
    *("#503070", "#40E080", "#A020C0", "#701010", "#90B0F0"),
)
CLASS_MARKERS = "os^vDPX<>ph"  # one more than colours: no pair returns before 110 classes

# A two-dimensional standard normal puts 99 % of its mass inside this radius: sqrt(-2 log 0.01).
PRIOR_RADIUS = math.sqrt(-2 * math.log(0.01))

_MOST_ENTRIES = 20  # a longer legend does not fit beside the picture; the names at the classes' centres remain

_TRAINING = {"color": BLUE, "lw": 1.8, "label": "training"}
_OBJECTIVE = {"color": GREEN, "lw": 1.6, "ls": (0, (4, 2)), "label": "training objective"}
_HELD_OUT = {"color": VERMILION, "lw": 1.4, "marker": "o", "ms": 4.5, "mfc": "white", "label": "held-out"}


def curves(history: History, ax: Axes | None = None, name: str = "ELBO") -> Axes:
    """Training ELBO, held-out ELBO and the training objective (where it is not the ELBO) against the epoch.

    The axis is cut, and says so, where a few values (usually of the first epoch) would flatten all others.

    Args:
        history: columns of equal length: "epoch" and any of "elbo", "valid_elbo", "valid_elbo_se" (standard
            error), "objective", in nats per example. NaN and None are gaps.
        ax: where to draw; a new figure if None.
        name: what to call the ELBO where it is none: of a score in the place of a likelihood, "score − KL".

    Returns:
        The axes.
    """
    ax = ax or _new_axes(6.4, 4.2)
    epoch, elbo = _column(history, "epoch"), _column(history, "elbo")
    objective = _column(history, "objective")
    both = np.isfinite(elbo) & np.isfinite(objective)
    same = both.any() and np.allclose(objective[both], elbo[both], rtol=1e-4, atol=1e-4)
    lines = [(elbo, {**_TRAINING, "label": _plain(f"training {name}")})]
    if not same:
        lines.append((objective, _OBJECTIVE))
    held_out, error = _column(history, "valid_elbo"), _column(history, "valid_elbo_se")
    look = {**_HELD_OUT, "label": _plain(f"held-out {name}")}
    if np.isfinite(held_out + error).any():
        look["label"] = _plain(f"held-out {name} ± standard error")
        ax.fill_between(epoch, held_out - error, held_out + error, color=VERMILION, alpha=0.18, lw=0)
    lines.append((held_out, look))
    _lines(ax, epoch, lines)
    ax.set_xlabel("epoch")
    ax.set_ylabel("nats per example (higher is better)")
    return ax


def terms(
    history: History,
    ax: Axes | None = None,
    names: tuple[str, str] = ("log p(x | z)", "KL(q(z | x) || p(z))"),
) -> Axes:
    """The two terms of the ELBO against the epoch, one above the other, each on its own scale.

    Args:
        history: columns of equal length: "epoch" and any of "log_px", "kl", "valid_log_px", "valid_kl" (nats
            per example). NaN and None are gaps.
        ax: where to draw; a new figure if None.
        names: what to call the two.

    Returns:
        The axes; its two panels are ``ax.child_axes``: log p(x | z), then KL(q(z | x) || p(z)).
    """
    ax = ax or _new_axes(6.4, 4.2)
    ax.set_axis_off()
    epoch = _column(history, "epoch")
    upper = ax.inset_axes((0, 0.54, 1, 0.46))
    lower = ax.inset_axes((0, 0, 1, 0.46), sharex=upper)
    for panel, name, label in ((upper, "log_px", names[0]), (lower, "kl", names[1])):
        training, held_out = _column(history, name), _column(history, f"valid_{name}")
        _lines(panel, epoch, [(training, _TRAINING), (held_out, _HELD_OUT)])
        panel.set_ylabel(f"{_plain(label)}\nnats per example", fontsize=9)
    legend = lower.get_legend()
    if legend and upper.get_legend():
        legend.remove()  # the same two entries
    upper.tick_params(labelbottom=False)
    lower.set_xlabel("epoch")
    return ax


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
    tiles = _tiles(images, value_range)
    _check_at_least_one(columns=columns)
    ax, _, _ = _show(tiles, *np.divmod(np.arange(len(tiles)), min(columns, len(tiles))), ax)
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
    _check_at_least_one(columns=columns)
    tiles = np.concatenate([_tiles(x, value_range), _tiles(x_hat, value_range)])
    pair, column = np.divmod(np.arange(len(x)), min(columns, len(x)))
    row = 2.25 * pair  # the space keeps a reconstruction apart from the original below it
    ax, middle, _ = _show(tiles, np.concatenate([row, row + 1]), np.tile(column, 2), ax)
    originals, means = np.split(middle, 2)
    ax.set_xticks([])
    ticks = {**dict.fromkeys(originals.tolist(), "original x"), **dict.fromkeys(means.tolist(), "mean of p(x | z)")}
    ax.set_yticks(list(ticks), labels=list(ticks.values()))
    ax.tick_params(length=0)
    return ax


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
    ax = ax or _new_axes(6.4 if labels is None else 7.2, 6.0 if z.shape[1] > 1 else 4.0)
    if z.shape[1] == 1:
        rows = torch.from_numpy(classes).double()
        # Golden-ratio steps spread the points of a row evenly, without drawing random numbers.
        jitter = (torch.arange(len(z)) * 0.6180339887498949) % 1 - 0.5
        points = torch.stack([points[:, 0], rows + 0.7 * jitter], dim=1)
        ax.set(xlabel="$z_1$", ylabel="class" if names else "", yticks=range(len(names) or 1))
        ax.set_yticklabels([_plain(name) for name in names] or [""])
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
        entry = _plain(names[k]) if len(names) in range(1, _MOST_ENTRIES + 1) else None
        # Rasterized: thousands of points as vectors make a slow page.
        ax.scatter(chosen[:, 0], chosen[:, 1], s=size, lw=0, label=entry, rasterized=True, **look)
    if names and z.shape[1] > 1:
        circle_size = 2 * PRIOR_RADIUS if prior_circle and z.shape[1] == 2 else 0.0
        for k, place in _label_places(points.numpy(), classes, names, circle_size).items():
            written = ax.text(place[0], place[1], _plain(names[k]), ha="center", va="center", zorder=4)
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
    _check_at_least_one(num=num)
    if quantiles:
        steps = torch.tensor([NormalDist().inv_cdf((i + 0.5) / num) for i in range(num)])
        z1 = z2 = steps
    else:
        z1, z2 = (torch.linspace(*limit, num) for limit in limits)
    z = torch.stack([z1.repeat(num), z2.flip(0).repeat_interleave(num)], dim=1)  # in reading order, from the top
    tiles = _tiles(decode(z), value_range)
    if len(tiles) != len(z):
        raise ValueError(f"decode(z) gave {len(tiles)} pictures, expected {len(z)}: one for each row of z.")
    ax, y, x = _show(tiles, *np.divmod(np.arange(num * num), num), ax)
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
    tiles = _tiles(images, value_range)
    if len(names) != len(tiles):
        raise ValueError(f"names has {len(names)} entries, expected {len(tiles)}: one for each picture.")
    row, column = np.divmod(np.arange(len(tiles)), min(10, len(tiles)))
    ax, y, x = _show(tiles, 1.3 * row, column, ax)  # room for the names
    half = (y[0] + 1.5) if len(y) else 0.0
    for name, down, across in zip(names, y, x, strict=True):
        ax.text(across, down - half - 1, _plain(name), ha="center", va="bottom", fontsize=9)
    ax.set(xticks=[], yticks=[])
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
    ax = ax or _new_axes(7.2, 4.0)
    index = codes.detach().cpu().numpy()
    bottom = np.zeros(len(names))
    for k in range(max(1, len(entries))):
        height = np.bincount(index[classes == k], minlength=len(names)).astype(float)
        colour = CLASS_COLOURS[k % len(CLASS_COLOURS)] if entries else BLUE
        entry = _plain(entries[k]) if len(entries) in range(1, _MOST_ENTRIES + 1) else None
        ax.bar(range(len(names)), height, bottom=bottom, color=colour, width=0.8, label=entry)
        bottom += height
    long = max(map(len, names)) > 3 and len(names) > 6
    ax.set_xticks(range(len(names)), labels=[_plain(name) for name in names], rotation=90 if long else 0)
    ax.set_xlim(-0.7, max(len(names), 4) - 0.3)
    ax.set(xlabel="most probable z", ylabel="examples")
    if 0 < len(entries) <= _MOST_ENTRIES:
        ax.legend(title="class", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    _tidy(ax)
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
    ax = ax or _new_axes(2.7 + 0.4 * len(kl) if few else 6.4, 4.0)
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
    _tidy(ax)
    return ax


def table_marginals(x: Tensor, x_generated: Tensor, names: Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """Median and 5-95 % range of each column of a table, in the data and in samples of the model.

    Args:
        x: data, [N, E].
        x_generated: samples from the model, [M, E].
        names: the columns' names; their numbers if None.
        ax: where to draw; a new figure if None.

    Returns:
        The axes; a column's values are centred at the data's mean, in units of the data's standard deviation.

    Raises:
        ValueError: x, x_generated and names disagree about the number of columns E.
    """
    if x.ndim != 2 or x_generated.ndim != 2 or x.shape[1] != x_generated.shape[1] or 0 in x.shape:
        found = f"{tuple(x.shape)} and {tuple(x_generated.shape)}"
        raise ValueError(f"x, x_generated have shapes {found}, expected [N, E], [M, E]: give both E columns.")
    num = x.shape[1]
    names = [str(i + 1) for i in range(num)] if names is None else list(names)
    if len(names) != num:
        raise ValueError(f"names has {len(names)} entries, expected {num}: one for each column of x.")
    ax = ax or _new_axes(6.4, max(2.4, 0.36 * num + 1.2))
    data, generated = (values.detach().cpu().double() for values in (x, x_generated))
    centre = data.nanmean(0)  # NaN: a missing number
    spread = (data - centre).square().nanmean(0).sqrt()
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))  # a constant column keeps its unit
    looks: tuple[tuple[Tensor, float, dict[str, Any]], ...] = (
        (data, -0.16, {"color": BLUE, "marker": "o", "label": "data"}),
        (generated, 0.16, {"color": VERMILION, "marker": "s", "mfc": "white", "label": "model"}),
    )
    for values, offset, look in looks:
        low, median, high = np.nanquantile(((values - centre) / spread).numpy(), [0.05, 0.5, 0.95], axis=0)
        reach = np.stack([median - low, high - median])
        ax.errorbar(median, np.arange(num) + offset, xerr=reach, ls="", lw=1.8, ms=5, capsize=3, **look)
    ax.set_yticks(range(num), labels=[_plain(name) for name in names])
    ax.set_ylim(num - 0.4, -0.6)
    ax.set(xlabel="median and 5-95 % range (standard deviations from the data's mean)", ylabel="column")
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside: the title stands above
    _tidy(ax, "x")
    return ax


def log_weights(
    log_w: Tensor, pareto_k: Tensor | None = None, names: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """How unequal the importance weights of a few examples are: a histogram of each, on the scale of log w.

    A weight at 0 is the average one. Where few weights stand far to the right, they alone make the estimate.

    Args:
        log_w: log-weights, [K, B], one to three examples.
        pareto_k: the shape of each tail, [B]; shown in the legend.
        names: what to call the examples.
        ax: where to draw; a new figure if None.

    Returns:
        The axes.

    Raises:
        ValueError: log_w is not [K, B] with 1 <= B <= 3.
    """
    if log_w.ndim != 2 or not 1 <= log_w.shape[1] <= 3 or not len(log_w):
        raise ValueError(f"log_w has shape {tuple(log_w.shape)}, expected [K, B] with B of 1 to 3: choose a few.")
    ax = ax or _new_axes(6.4, 4.0)
    centred = (log_w - log_w.logsumexp(0) + math.log(len(log_w))).detach().cpu().double()
    ess = (2 * centred.logsumexp(0) - (2 * centred).logsumexp(0)).exp()
    low = float(np.quantile(centred.numpy(), 0.001)) - 0.2  # the left tail weighs nothing
    high = float(centred.max()) + 0.2
    edges = np.linspace(low, high, 61).tolist()
    for b, (colour, style) in enumerate(zip((BLUE, VERMILION, GREEN), ("-", "--", "-."), strict=True)):
        if b == log_w.shape[1]:
            break
        label = _plain(names[b]) if names else f"example {b + 1}"
        shape = "" if pareto_k is None else f"Pareto k = {float(pareto_k[b]):.2f}, "
        label += f": {shape}ESS = {float(ess[b]):.0f} of {len(log_w)}"
        values = centred[:, b].numpy()
        ax.hist(values, bins=edges, histtype="step", color=colour, lw=1.8, ls=style, label=label.replace("-", "−"))
        ax.plot(values.max(), 0.7, marker="v", color=colour, ms=7, ls="", clip_on=False)
    ax.axvline(0, color="black", lw=1, ls=":")
    ax.set_yscale("log")
    ax.set_ylim(bottom=0.7)
    ax.set(xlabel="log w, less that of the average weight (triangles: the largest)", ylabel="draws")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), fontsize=9, frameon=False)
    _tidy(ax)
    return ax


def gap_bars(gaps: Mapping[str, tuple[float, float]], ax: Axes | None = None) -> Axes:
    """Gaps in nats, one bar each, with their standard errors.

    Args:
        gaps: name -> mean and standard error, nats per example; drawn from the top.
        ax: where to draw; a new figure if None.

    Returns:
        The axes.

    Raises:
        ValueError: no gap is given.
    """
    if not gaps:
        raise ValueError("gaps is empty, expected at least one: name -> (mean, standard error).")
    ax = ax or _new_axes(6.4, 1.3 + 0.55 * len(gaps))
    means, errors = np.array(list(gaps.values()), dtype=float).T
    places = list(range(len(gaps)))
    look = {"ecolor": "black", "capsize": 4, "color": [BLUE if mean >= 0 else GREY for mean in means]}
    ax.barh(places, means, xerr=np.nan_to_num(errors), height=0.6, **look)  # type: ignore[arg-type]
    reach = float(np.nanmax(np.abs(means) + np.nan_to_num(errors))) or 1.0
    for place, mean, error in zip(places, means, errors, strict=True):
        text = f"{mean:.2f} ± {error:.2f}".replace("-", "−")
        ax.text(max(mean, 0) + np.nan_to_num(error) + 0.02 * reach, place, text, va="center")
    ax.axvline(0, color="black", lw=1)
    ax.set_yticks(places, labels=[_plain(name) for name in gaps])
    ax.set_ylim(len(gaps) - 0.5, -0.5)
    ax.set_xlim(min(0.0, 1.1 * float(np.min(means - np.nan_to_num(errors)))), 1.35 * reach)
    ax.set_xlabel("nats per example")
    _tidy(ax, "x")
    return ax


def aggregate_posterior(axis: Tensor, aggregate: Tensor, prior: Tensor, ax: Axes | None = None) -> Axes:
    """The aggregate posterior q(z) of two latent dimensions, shaded, under the contours of the prior.

    Args:
        axis: coordinate of a square grid, [G], the same in both dimensions.
        aggregate: q(z), [G, G], z1 along the first axis.
        prior: p(z), [G, G].
        ax: where to draw; a new figure if None.

    Returns:
        The axes.
    """
    ax = ax or _new_axes(6.4, 5.4)
    values, q, p = (t.detach().cpu().double().numpy() for t in (axis, aggregate, prior))
    extent = (values[0], values[-1], values[0], values[-1])
    root = PowerNorm(0.5, vmin=0)  # else one narrow q(z | x) leaves all others white
    shown = ax.imshow(q.T, origin="lower", extent=extent, cmap="Blues", norm=root)
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.colorbar(shown, ax=ax, label="q(z), the mixture of all q(z | x)")
    _contours(ax, values, p, "black", "the prior p(z): 50 %, 95 % and 99 % of its mass", (0.5, 0.95, 0.99))
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), fontsize=9, frameon=False)
    ax.set(xlabel="$z_1$", ylabel="$z_2$", aspect="equal")
    return ax


def posteriors(
    axis: Tensor,
    posterior: Tensor,
    approximation: Tensor,
    images: Tensor | None = None,
    kl: Tensor | None = None,
    value_range: tuple[float, float] = (0.0, 1.0),
    ax: Axes | None = None,
) -> Axes:
    """The true posterior of a few examples, shaded, and q(z | x) as contours over it, each at its own magnification.

    Args:
        axis: coordinate of a square grid, [G], the same in both dimensions.
        posterior: p(z | x), [B, G, G], z1 along the first axis.
        approximation: q(z | x), [B, G, G].
        images: the examples, [B, 1 or 3, H, W], drawn above.
        kl: KL(q(z | x) || p(z | x)), [B], nats, written above.
        value_range: the values drawn as white and black.
        ax: where to draw; a new figure if None.

    Returns:
        The axes; its panels are ``ax.child_axes``: the densities, one for each example, then their images.
    """
    num = len(posterior)
    ax = ax or _new_axes(2.6 * num, 2.9 if images is None else 4.2)
    ax.set_axis_off()
    values = axis.detach().cpu().double().numpy()
    true, q = (t.detach().cpu().double().numpy() for t in (posterior, approximation))
    height = 0.72 if images is None else 0.52
    panels = [ax.inset_axes(((b + 0.14) / num, 0.1, 0.82 / num, height)) for b in range(num)]
    for b, panel in enumerate(panels):
        panel.imshow(
            true[b].T, origin="lower", extent=(values[0], values[-1], values[0], values[-1]), cmap="Oranges", vmin=0
        )
        _contours(panel, values, q[b], BLUE, "q(z | x): 50 % and 95 % of its mass", (0.5, 0.95))
        heavy = (true[b] > 0.005 * true[b].max()) | (q[b] > 0.005 * q[b].max())
        spans = [values[heavy.any(1 - d)] for d in (0, 1)]
        middle = [(span.min() + span.max()) / 2 for span in spans]
        half = 0.6 * max(max(span.max() - span.min() for span in spans), 4 * (values[1] - values[0]))
        panel.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] - half, middle[1] + half), aspect="equal")
        panel.tick_params(labelsize=7)
        panel.set_xlabel("$z_1$", fontsize=9)
        if b == 0:
            panel.set_ylabel("$z_2$", fontsize=9)
        if kl is not None:
            panel.set_title(f"KL = {float(kl[b]):.2f} nats", fontsize=9)
    if images is not None:
        tiles = _tiles(images, value_range)
        for b in range(num):
            panel = ax.inset_axes(((b + 0.3) / num, 0.74, 0.5 / num, 0.22))
            ink = tiles[b].squeeze(-1) if tiles.shape[-1] == 1 else tiles[b]
            panel.imshow(ink, cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
            panel.set(xticks=[], yticks=[])
    handles, labels = panels[0].get_legend_handles_labels()
    handles.append(Rectangle((0, 0), 1, 1, color="#F67824"))
    ax.legend(handles, [*labels, "true posterior p(z | x)"], loc="lower center", ncols=2, fontsize=9, frameon=False)
    ax.get_legend().set_bbox_to_anchor((0.5, -0.14))  # type: ignore[union-attr]
    return ax


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
    ax = ax or _new_axes(3.6 * columns, 2.9 * rows)
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
            panel.set_xticks(at.tolist(), labels=[_plain(value) for value in values], fontsize=8, **turned)
            panel.set_xlim(-0.5, len(values) - 0.5)
        else:
            if places.min() > 0 and places.max() > 20 * places.min():
                panel.set_xscale("log")
            if len(values) <= 8:
                panel.set_xticks(places.tolist(), labels=list(values))
                panel.set_xticks([], minor=True)
        panel.tick_params(labelsize=8)
        panel.set_title(_plain(metric), fontsize=10)
        if i + columns >= len(numbers):
            panel.set_xlabel(_plain(name), fontsize=9)
        _tidy(panel)
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
    ax = ax or _new_axes(6.0, 4.8)
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
        written = ax.annotate(_plain(value), (x, y), (6, 5), textcoords="offset points", fontsize=9, color=BLUE)
        written.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    ax.set(xlim=(left, right), ylim=(bottom, top))
    ax.set_xlabel("rate KL(q(z | x) || p(z)), nats per example")
    ax.set_ylabel("distortion −E log p(x | z), nats per example")
    notes = [f"labels: {_plain(name)}"] * bool(name) + ["grey lines: equal ELBO"]
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


def _contours(
    ax: Axes, values: np.ndarray, density: np.ndarray, colour: str, label: str, masses: Sequence[float]
) -> None:
    """Lines around the smallest regions that hold the given shares of a density on a grid."""
    ordered = np.sort(density.ravel())[::-1]
    share = np.cumsum(ordered) / max(ordered.sum(), 1e-300)
    levels = sorted({float(ordered[min(int(np.searchsorted(share, mass)), len(ordered) - 1)]) for mass in masses})
    if len(levels) < 1 or levels[-1] <= 0 or density.max() <= density.min():
        return
    ax.contour(values, values, density.T, levels=[v for v in levels if v > 0], colors=colour, linewidths=1.2)
    ax.plot([], [], color=colour, lw=1.2, label=label)


def _new_axes(width: float, height: float) -> Axes:
    return Figure(figsize=(width, height), layout="constrained").add_subplot()


def _plain(text: object) -> str:
    """Text as it is: a pair of dollar signs in a name would be typeset as mathematics."""
    return str(text).replace("$", r"\$")


def _number(value: Tensor) -> str:
    return f"{round(float(value), 2) + 0.0:g}".replace("-", "−")


def _check_at_least_one(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}, expected at least 1: give a positive number.")


def _tidy(ax: Axes, grid_axis: str = "y") -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=grid_axis, color="0.88", lw=0.8)  # type: ignore[arg-type]
    ax.set_axisbelow(True)


def _column(history: History, name: str) -> np.ndarray:
    """One column as floats; all NaN where it is absent; the epochs are counted where they are absent."""
    lengths = {key: len(values) for key, values in history.items()}
    num = lengths.get("epoch", max(lengths.values(), default=0))
    values = history.get(name, range(1, num + 1) if name == "epoch" else [math.nan] * num)
    if len(values) != num:
        raise ValueError(f"history[{name!r}] has {len(values)} values, expected {num}: one for each epoch.")
    return np.array([math.nan if value is None else float(value) for value in values])


def _lines(ax: Axes, epoch: np.ndarray, lines: Sequence[tuple[np.ndarray, dict]]) -> None:
    """Draw each line through its finite points, with limits that a few extreme values do not decide."""
    drawn = []
    for values, look in lines:
        finite = np.isfinite(values)
        if finite.any():
            every = max(1, int(finite.sum()) // 12)  # a dozen markers tell the lines apart
            look = look if finite.sum() > 1 else {**look, "marker": "o"}
            ax.plot(epoch[finite], values[finite], markevery=(every - 1, every), **look)
            drawn.append(values[finite])
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    _tidy(ax)
    if not drawn:
        ax.text(0.5, 0.5, "not recorded", transform=ax.transAxes, ha="center", va="center", color=GREY)
        return
    pooled = np.concatenate(drawn)
    low, high = np.quantile(pooled, [0.1, 0.9])
    margin = max(high - low, 1e-9)
    notes = []
    bottom, top = pooled.min(), pooled.max()
    if bottom < low - 2 * margin:
        notes.append(f"{(pooled < low - margin).sum()} below (lowest {bottom:.4g})")
        bottom = low - margin
    if top > high + 2 * margin:
        notes.append(f"{(pooled > high + margin).sum()} above (highest {top:.4g})")
        top = high + margin
    padding = 0.05 * (top - bottom) or max(1.0, 0.01 * abs(top))
    ax.set_ylim(bottom - padding, top + padding)
    if notes:
        text = f"axis cut: of {len(pooled)} values, {' and '.join(notes)}".replace("-", "−")
        ax.set_title(text, fontsize=8, color=GREY, loc="right", style="italic")
    if len(drawn) > 1:
        ax.legend(frameon=False, loc="best")


def _tiles(images: Tensor, value_range: tuple[float, float]) -> np.ndarray:
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


def _show(
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
    ax = ax or _new_axes(7.0, min(0.7 + 7.0 * canvas.shape[0] / canvas.shape[1], 9.5))
    ink = canvas.squeeze(-1) if channels == 1 else canvas
    ax.imshow(ink, cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
    if channels == 1:  # ink on white paper leaves open where a picture ends
        corners = zip(left - (gap + 1) / 2, top - (gap + 1) / 2, strict=True)
        frames = [Rectangle(corner, width + gap, height + gap) for corner in corners]
        ax.add_collection(PatchCollection(frames, fc="none", ec="0.8", lw=0.6, clip_on=False))
    ax.set(xlim=(-1.5, canvas.shape[1] + 0.5), ylim=(canvas.shape[0] + 0.5, -1.5))
    ax.spines[:].set_visible(False)
    return ax, top + (height - 1) / 2, left + (width - 1) / 2


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
