"""The figures of a run: what to draw of a trained VAE, its data and its history."""

import io
import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pyro.distributions import Delta, constraints
from torch import Tensor

from pyro_vae import curve_plots, diagnostics, image_plots, latent_plots, representation_plots, table_plots
from pyro_vae.checkpoints import write_atomically
from pyro_vae.contracts import untouched
from pyro_vae.plot_style import GREY, plain_text
from pyro_vae.supports import code, elements, is_discrete, is_normalised, plain_support

_BATCH, _MOST_CODES, _MOST_COLUMNS, _MOST_VALUES = 1000, 5000, 60, 40


def write_figures(
    vae: Any, data: Any, history: curve_plots.History, folder: str | Path, seed: int = 0, objective_name: str = ""
) -> list[Path]:
    """Draw what there is to see of a trained model, one PNG each.

    Always curves and latent (codes where z is discrete); kl_per_dimension where prior and posterior factorise into
    normals; for images reconstructions, samples and, with two latent dimensions, manifold (of a prior on the circle
    the circle; none where z has fewer dimensions than numbers otherwise, as on a simplex); for tables of up to 60
    columns marginals. Neither the model nor the state of the random numbers is changed.

    Args:
        vae: the model, with ``prior()``, ``encoder(x)`` and ``decoder(z)``.
        data: the data set, with ``name``, ``policy``, ``test`` [M, *E] and ``test_labels`` [M] or None. Used where
            present: ``value_range`` (else 0 and the largest value of ``test``), ``classes``, ``columns`` (names).
        history: columns with one value an epoch, see :class:`pyro_vae.training.History`.
        folder: where the files go; made if missing.
        seed: seed of the samples shown.
        objective_name: what was maximised, such as "IWAE".

    Returns:
        The files written, in reading order.
    """
    folder, written = Path(folder), []

    def save(name: str, ax: Axes, title: str, small: str = "") -> None:
        figure = ax.get_figure(root=True)
        assert figure is not None
        (figure.suptitle if len(figure.axes) > 1 else ax.set_title)(plain_text(f"{data.name}: {title}"))
        if small:
            note = "\n".join(textwrap.wrap(small, 110))
            figure.supxlabel(plain_text(note), fontsize=7, color=GREY, x=0.99, ha="right")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
        write_atomically(folder / f"{name}.png", buffer.getvalue())
        written.append(folder / f"{name}.png")

    device = next((t.device for t in [*vae.parameters(), *vae.buffers()]), data.test.device)
    if any(len(values) for values in history.values()):
        whole, *parts = _names(vae, data.test[:1].to(device))
        left, right = Figure(figsize=(11.0, 4.4), layout="constrained").subplots(1, 2)
        curve_plots.curves(history, left, whole, objective_name)
        curve_plots.terms(history, right, (parts[0], parts[1]))
        kind = "the bound" if whole == "ELBO" else f"{whole}, no bound"
        save("curves", left, f"{kind} (left) and its two terms (right)", data.policy)

    with untouched(vae, seed):
        x = data.test[:_MOST_CODES]
        prior = vae.prior()
        decode = _batched(lambda z: _mean(vae.decoder(z)), device)
        discrete, sphere = is_discrete(prior), _on_sphere(prior)
        z = _batched(lambda rows: (code if discrete or sphere else _mean)(vae.encoder(rows)), device)(x).flatten(1)
        place = "most probable z" if discrete else "mode of q(z | x)" if sphere else "mean of q(z | x)"
        policy = f"{data.policy}; n = {len(x)}"

        if _is_image(x):
            known = data.test.nan_to_num(nan=0.0)  # NaN: a missing pixel
            lowest, highest = min(0.0, float(known.min())), float(known.max())
            values = getattr(data, "value_range", None) or (lowest, highest if highest > lowest else 1.0)
            x_hat = decode(z[:20])
            title = f"first test pictures, reconstructed from the {place}"
            save("reconstructions", image_plots.reconstructions(x[:20].cpu(), x_hat, value_range=values), title)
            ax = image_plots.image_grid(decode(prior.sample((100,))), value_range=values)
            save("samples", ax, "mean of p(x | z) for 100 draws z ~ p(z)")
        elif x.ndim == 2 and x.shape[1] <= _MOST_COLUMNS and is_normalised(vae.decoder(prior.sample((1,)).to(device))):
            generated = _batched(lambda z: vae.decoder(z).sample(), device)(prior.sample((len(x),)))
            ax = table_plots.table_marginals(x, generated, getattr(data, "columns", None))
            save("marginals", ax, f"test data and {len(x)} draws from the model", policy)

        standard = _is_standard_normal(prior)
        labels = None if data.test_labels is None else data.test_labels[: len(x)]
        if discrete:
            codes, names, index = _codes(z)
            shown = index < len(codes)
            heights = [0.3 + 0.85 * math.ceil(len(codes) / 10)] * _is_image(x) + [3.6]
            figure = Figure(figsize=(7.2, sum(heights)), layout="constrained")
            axes = figure.subplots(len(heights), height_ratios=heights, squeeze=False)[:, 0]
            of_shown = None if labels is None else labels[shown]
            latent_plots.code_usage(index[shown], names, of_shown, getattr(data, "classes", None), axes[-1])
            if _is_image(x):
                image_plots.code_pictures(decode(codes), names, values, axes[0])
            more = "" if bool(shown.all()) else f" (the {len(codes)} most frequent)"
            save("codes", axes[0], f"values of z{more}: mean of p(x | z), and whose they are", policy)
            return written
        ax = latent_plots.latent_scatter(z, labels, getattr(data, "classes", None), prior_circle=standard)
        save("latent", ax, f"{place} of the test data", policy)

        if _is_image(x) and z.shape[1] == 2 and sphere:
            save("manifold", representation_plots.circle(decode, value_range=values), "mean of p(x | z) on the circle")
        elif _is_image(x) and z.shape[1] == 2 and _free(prior):
            # Quantiles of N(0, 1) mean nothing to another prior: span where it puts its draws instead.
            ends = prior.sample((2000,)).flatten(1).cpu().quantile(torch.tensor([0.01, 0.99]), dim=0).T.tolist()
            limits = ((ends[0][0], ends[0][1]), (ends[1][0], ends[1][1]))
            ax = image_plots.manifold(decode, value_range=values, quantiles=standard, limits=limits)
            save("manifold", ax, "mean of p(x | z) at each z")

    try:
        kl = diagnostics.kl_per_dimension(vae, x.to(device))
    except ValueError:  # prior and posterior do not factorise: there is no such number
        return written
    save("kl_per_dimension", latent_plots.kl_per_dimension(kl), "KL per latent dimension", policy)
    return written


def _batched(function: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[Tensor], Tensor]:
    """The function on the model's device, some rows at a time, its results on the CPU."""
    return lambda rows: torch.cat([function(part.to(device)).cpu() for part in rows.split(_BATCH)])


def _mean(distribution: Any) -> Tensor:
    """The mean; where the distribution does not know it (a flow, say), that of 64 draws."""
    try:
        mean = distribution.mean
        if not mean.isnan().all():  # torch's Categorical answers with nan
            return mean
    except NotImplementedError:
        pass
    return distribution.sample((64,)).float().mean(0)


def _codes(z: Tensor) -> tuple[Tensor, list[str], Tensor]:
    """The values of a discrete z [N, D] to show, [S, D], their names, and which of them each example has, [N].

    One-hot vectors: all classes, used or not; else the most frequent vectors, S for the others.
    """
    if bool((z.sum(1) == 1).all() and (z.max(1).values == 1).all()) and z.shape[1] <= _MOST_VALUES:
        return torch.eye(z.shape[1], dtype=z.dtype), [str(c + 1) for c in range(z.shape[1])], z.argmax(1)
    values, index, counts = z.unique(dim=0, return_inverse=True, return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:_MOST_VALUES]
    place = torch.full((len(values),), len(order))
    place[order] = torch.arange(len(order))
    names = ["".join(f"{int(number)}" for number in value) for value in values[order]]
    return values[order], names, place[index]


def _is_image(x: Tensor) -> bool:
    return x.ndim == 3 or (x.ndim == 4 and x.shape[1] in (1, 3))


def _names(vae: Any, x: Tensor) -> tuple[str, str, str]:
    """What the ELBO and its two terms are here: with a score for a likelihood, or a point mass for q, it is none."""
    with untouched(vae, 0):
        q = vae.encoder(x)
        scored = not is_normalised(vae.decoder(q.sample()))
    if isinstance(elements(q), Delta):
        whole, of_x = ("score + log p(z)", "score") if scored else ("log p(x, z)", "log p(x | z)")
        return f"{whole} at the code", f"{of_x} at the code", "−log p(z) at the code"
    return (
        ("score − KL", "score", "KL(q(z | x) || p(z))") if scored else ("ELBO", "log p(x | z)", "KL(q(z | x) || p(z))")
    )


def _on_sphere(prior: Any) -> bool:
    try:
        return isinstance(plain_support(prior), type(constraints.sphere))
    except NotImplementedError:
        return False


def _free(prior: Any) -> bool:
    """Whether each number of z may have any value of its range, whatever the others have."""
    try:
        return plain_support(prior).event_dim == 0
    except NotImplementedError:
        return True


def _is_standard_normal(prior: Any) -> bool:
    base = prior.base_dist if isinstance(prior, torch.distributions.Independent) else prior
    if not isinstance(base, torch.distributions.Normal):
        return False
    return bool((base.loc == 0).all() and (base.scale == 1).all())
