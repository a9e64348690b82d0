"""Pictures of the laboratory of wrong losses: a row for each objective, and where each puts z."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pyro_vae import image_plots
from pyro_vae.latent_plots import PRIOR_RADIUS
from pyro_vae.plot_style import CLASS_COLOURS, CLASS_MARKERS
from pyro_vae.wrong_loss_lab import RIGHT, Pictures, Result


def draw_figures(results: Sequence[Result], pictures: Pictures) -> dict[str, Figure]:
    """Every figure that the results allow, by name.

    Args:
        results: what :func:`pyro_vae.wrong_loss_lab.run` returned.
        pictures: the data.
    """
    figures = {"wrong_losses": draw_results(results, pictures)}
    named = {r.name: r for r in results}
    panels = [named[name] for name in ("ReconstructionOnly", "KLOnly", RIGHT) if name in named]
    if len(panels) == 3 and panels[0].z.shape[1] == 2:
        figures["three_panels"] = draw_three_panels(panels, pictures)
    return figures


def draw_results(results: Sequence[Result], pictures: Pictures, num: int = 8) -> Figure:
    """A row for each objective: its numbers, reconstructions, samples, and where it puts z.

    Args:
        results: what :func:`pyro_vae.wrong_loss_lab.run` returned.
        pictures: the data.
        num: pictures in a strip.
    """
    rows = len(results) + 1
    figure = Figure(figsize=(12.0, 1.0 * rows + 0.4), layout="constrained")
    grid = figure.add_gridspec(rows, 4, width_ratios=(2.6, 4.2, 4.2, 1.1))
    limit = 4.0

    def strip(row: int, column: int, images: Tensor) -> Any:
        ax = figure.add_subplot(grid[row, column])
        return image_plots.image_grid(images[:num].unflatten(-1, pictures.shape), columns=num, ax=ax)

    strip(0, 1, pictures.x_test).set_title("held-out pictures x", fontsize=10)
    words = figure.add_subplot(grid[0, 0])
    words.text(0, 0.5, f"trained with ...\n{pictures.policy.split(',')[0]}", va="center", fontsize=10)
    words.set_axis_off()
    for i, r in enumerate(results, start=1):
        ax = figure.add_subplot(grid[i, 0])
        beta = "sigma learned" if math.isnan(r.beta) else f"beta {r.beta:.4g}"
        numbers = (
            f"{beta}\nmean s {r.scale:.3f}, KL {r.kl:.2f} nats\nSSE {r.squared_error:.2f}, samples {r.distance:.2f}"
        )
        ax.text(0, 0.98, r.name, va="top", fontsize=10, weight="bold")
        ax.text(0, 0.70, numbers, va="top", fontsize=9)
        ax.set_axis_off()
        left, right = strip(i, 1, r.x_hat), strip(i, 2, r.samples)
        if i == 1:
            left.set_title("mean of p(x | z) at the posterior mean", fontsize=10)
            right.set_title("mean of p(x | z) at z ~ N(0, I)", fontsize=10)
        ax = figure.add_subplot(grid[i, 3])
        _scatter(ax, r.z[:1000], pictures.labels_test, limit, size=2)
        ax.set(xticks=[], yticks=[])
        if i == 1:
            ax.set_title(f"z ~ q(z | x), ±{limit:g}", fontsize=10)
    return figure


def draw_three_panels(results: Sequence[Result], pictures: Pictures) -> Figure:
    """Draws of z with the reconstruction alone, with the KL alone, and with both: the same axes, digits coloured.

    Args:
        results: those of "ReconstructionOnly", "KLOnly" and the right one, in this order; D = 2.
        pictures: the data.
    """
    figure = Figure(figsize=(13.0, 4.9), layout="constrained")
    limit = max(4.0, 1.05 * max(float(r.z.abs().quantile(0.995)) for r in results))
    titles = ("reconstruction only", "KL only", "both: the ELBO")
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    for ax, r, title in zip(panels, results, titles, strict=True):
        _scatter(ax, r.z, pictures.labels_test, limit, size=9)
        numbers = f"KL {r.kl:.2f} nats, SSE {r.squared_error:.2f} per example"
        numbers += "" if math.isnan(r.accuracy) else f", kNN {100 * r.accuracy:.0f} %"
        ax.set_title(f"{title}\n{numbers}", fontsize=11)
        ax.set_xlabel("$z_1$, drawn from q(z | x)")
    panels[0].set_ylabel("$z_2$")
    if pictures.labels_test is not None:
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right center", frameon=False, title="class", markerscale=2)
    return figure


def _scatter(ax: Any, z: Tensor, labels: Tensor | None, limit: float, size: float) -> None:
    """Codes coloured by class, and the circle that holds 99 % of N(0, I)."""
    points = z[:, :2].cpu().numpy() if z.shape[1] > 1 else torch.cat([z, torch.zeros_like(z)], 1).cpu().numpy()
    classes = np.zeros(len(z), dtype=int) if labels is None else labels[: len(z)].cpu().numpy()
    for k in np.unique(classes):
        chosen = points[classes == k]
        look = {"color": CLASS_COLOURS[k % 10], "marker": CLASS_MARKERS[k % 11], "label": str(k)}
        ax.scatter(chosen[:, 0], chosen[:, 1], s=size, lw=0, alpha=0.8, rasterized=True, **look)
    angle = np.linspace(0, 2 * math.pi, 181)
    ax.plot(PRIOR_RADIUS * np.cos(angle), PRIOR_RADIUS * np.sin(angle), color="black", lw=0.8, ls="--")
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
