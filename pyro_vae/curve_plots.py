"""Pictures of a training: its curves.

Functions ``(values, ..., ax=None) -> ax`` that only draw, see :mod:`pyro_vae.plot_style`.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pyro_vae.plot_style import BLUE, GREEN, GREY, VERMILION, new_axes, plain_text, tidy

History = Mapping[str, Sequence[float | None]]
_TRAINING = {"color": BLUE, "lw": 1.8, "label": "training"}
_OBJECTIVE = {"color": GREEN, "lw": 1.6, "ls": (0, (4, 2))}
_HELD_OUT = {"color": VERMILION, "lw": 1.4, "marker": "o", "ms": 4.5, "mfc": "white", "label": "held-out"}


def curves(history: History, ax: Axes | None = None, name: str = "ELBO", objective_name: str = "") -> Axes:
    """Training ELBO, held-out ELBO and the training objective (where it is not the ELBO) against the epoch.

    The axis is cut, and says so, where a few values (usually of the first epoch) would flatten all others.

    Args:
        history: columns of equal length: "epoch" and any of "elbo", "valid_elbo", "valid_elbo_se" (standard
            error), "objective", in nats per example. NaN and None are gaps.
        ax: where to draw; a new figure if None.
        name: what to call the ELBO where it is none: of a score in the place of a likelihood, "score − KL".
        objective_name: what the training objective is, such as "IWAE".

    Returns:
        The axes.
    """
    ax = ax or new_axes(6.4, 4.2)
    epoch, elbo = _column(history, "epoch"), _column(history, "elbo")
    objective = _column(history, "objective")
    both = np.isfinite(elbo) & np.isfinite(objective)
    same = both.any() and np.allclose(objective[both], elbo[both], rtol=1e-4, atol=1e-4)
    lines = [(elbo, {**_TRAINING, "label": plain_text(f"training {name}")})]
    if not same:
        called = f"training objective, {objective_name}" if objective_name else "training objective"
        lines.append((objective, {**_OBJECTIVE, "label": plain_text(called)}))
    held_out, error = _column(history, "valid_elbo"), _column(history, "valid_elbo_se")
    look = {**_HELD_OUT, "label": plain_text(f"held-out {name}")}
    if np.isfinite(held_out + error).any():
        look["label"] = plain_text(f"held-out {name} ± standard error")
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
    ax = ax or new_axes(6.4, 4.2)
    ax.set_axis_off()
    epoch = _column(history, "epoch")
    upper = ax.inset_axes((0, 0.54, 1, 0.46))
    lower = ax.inset_axes((0, 0, 1, 0.46), sharex=upper)
    for panel, name, label in ((upper, "log_px", names[0]), (lower, "kl", names[1])):
        training, held_out = _column(history, name), _column(history, f"valid_{name}")
        _lines(panel, epoch, [(training, _TRAINING), (held_out, _HELD_OUT)])
        panel.set_ylabel(f"{plain_text(label)}\nnats per example", fontsize=9)
    legend = lower.get_legend()
    if legend and upper.get_legend():
        legend.remove()  # the same two entries
    upper.tick_params(labelbottom=False)
    lower.set_xlabel("epoch")
    return ax


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
    tidy(ax)
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
