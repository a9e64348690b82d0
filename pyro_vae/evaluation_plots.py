"""Pictures of an evaluation: importance weights, gaps, posteriors.

Functions ``(values, ..., ax=None) -> ax`` that only draw, see :mod:`pyro_vae.plot_style`.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.patches import Rectangle
from torch import Tensor

from pyro_vae.image_plots import as_tiles
from pyro_vae.plot_style import BLUE, GREEN, GREY, VERMILION, new_axes, plain_text, tidy


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
    ax = ax or new_axes(6.4, 4.0)
    centred = (log_w - log_w.logsumexp(0) + math.log(len(log_w))).detach().cpu().double()
    ess = (2 * centred.logsumexp(0) - (2 * centred).logsumexp(0)).exp()
    low = float(np.quantile(centred.numpy(), 0.001)) - 0.2  # the left tail weighs nothing
    high = float(centred.max()) + 0.2
    edges = np.linspace(low, high, 61).tolist()
    for b, (colour, style) in enumerate(zip((BLUE, VERMILION, GREEN), ("-", "--", "-."), strict=True)):
        if b == log_w.shape[1]:
            break
        label = plain_text(names[b]) if names else f"example {b + 1}"
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
    tidy(ax)
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
    ax = ax or new_axes(6.4, 1.3 + 0.55 * len(gaps))
    means, errors = np.array(list(gaps.values()), dtype=float).T
    places = list(range(len(gaps)))
    look = {"ecolor": "black", "capsize": 4, "color": [BLUE if mean >= 0 else GREY for mean in means]}
    ax.barh(places, means, xerr=np.nan_to_num(errors), height=0.6, **look)  # type: ignore[arg-type]
    reach = float(np.nanmax(np.abs(means) + np.nan_to_num(errors))) or 1.0
    for place, mean, error in zip(places, means, errors, strict=True):
        text = f"{mean:.2f} ± {error:.2f}".replace("-", "−")
        ax.text(max(mean, 0) + np.nan_to_num(error) + 0.02 * reach, place, text, va="center")
    ax.axvline(0, color="black", lw=1)
    ax.set_yticks(places, labels=[plain_text(name) for name in gaps])
    ax.set_ylim(len(gaps) - 0.5, -0.5)
    ax.set_xlim(min(0.0, 1.1 * float(np.min(means - np.nan_to_num(errors)))), 1.35 * reach)
    ax.set_xlabel("nats per example")
    tidy(ax, "x")
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
    ax = ax or new_axes(6.4, 5.4)
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
    ax = ax or new_axes(2.6 * num, 2.9 if images is None else 4.2)
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
        tiles = as_tiles(images, value_range)
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
