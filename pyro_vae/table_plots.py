"""Pictures of tables.

Functions ``(values, ..., ax=None) -> ax`` that only draw, see :mod:`pyro_vae.plot_style`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from pyro_vae.plot_style import BLUE, VERMILION, new_axes, plain_text, tidy


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
    ax = ax or new_axes(6.4, max(2.4, 0.36 * num + 1.2))
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
    ax.set_yticks(range(num), labels=[plain_text(name) for name in names])
    ax.set_ylim(num - 0.4, -0.6)
    ax.set(xlabel="median and 5-95 % range (standard deviations from the data's mean)", ylabel="column")
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside: the title stands above
    tidy(ax, "x")
    return ax
