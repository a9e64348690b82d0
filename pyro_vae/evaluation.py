"""Everything that is reported about a trained model on its held-out data: what ``evaluate`` and ``compare`` print."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor

from pyro_vae import evaluation_plots
from pyro_vae.aggregate import Aggregate, aggregate_posterior, log_aggregate
from pyro_vae.annealing import annealed_log_evidence
from pyro_vae.calibration import Ranks, posterior_on_grid, simulation_based_calibration
from pyro_vae.checkpoints import write_atomically
from pyro_vae.contracts import untouched
from pyro_vae.diagnostics import Health, health
from pyro_vae.estimates import elbo, log_evidence, log_weights
from pyro_vae.exact import log_evidence_by_enumeration, log_evidence_by_quadrature
from pyro_vae.gaps import GapReport, gap_report, generalisation_gap, refine
from pyro_vae.plot_style import plain_text
from pyro_vae.supports import is_discrete, is_real
from pyro_vae.tails import pareto_k
from pyro_vae.uncertainty import Difference, Estimate, paired_difference

_POINTS = 401  # of the quadrature's grid, in each dimension
_LIMIT = 8.0


def quadrature(vae: Any, x: Tensor, policy: str = "") -> Estimate:
    r"""The log-evidence of one or two latent dimensions by quadrature, and how far it may be off.

    .. math:: |\log p_h(x) - \log p_{2h}(x)| + \log\Big(1 + m \max_{z \in \text{border}} \frac{p(x \mid z)}{p_h(x)}\Big)

    The first term is what halving the grid changes; m is the prior's mass beyond the grid, where p(x | z) is taken to
    be no larger than on its border.

    Args:
        vae: a model with ``prior`` and ``decoder``.
        x: data, [N, *E].
        policy: the data policy to carry.

    Returns:
        An estimate with K = 0, nats per example.

    Raises:
        ValueError: more than two latent dimensions, a z that is discrete, on the sphere or on the simplex, a prior that
            the grid misses, or a score in the place of p(x | z).

    Example:
        >>> from pyro_vae.exact import LinearGaussian
        >>> model = LinearGaussian(torch.ones(3, 1), torch.zeros(3), 0.5)
        >>> print(quadrature(model.as_vae(), torch.ones(1, 3)))
        -2.421387 ± 0 nats (quadrature on 401 points, one example: Monte-Carlo error only)
    """
    with untouched(vae):
        prior = vae.prior()
        latent_dim = prior.event_shape[0]
        if not is_real(prior) or latent_dim > 2:
            found = "a discrete z" if is_discrete(prior) else f"z on {prior.support}"
            if is_real(prior):
                found = f"{latent_dim} latent dimensions"
            raise ValueError(
                f"expected one or two continuous latent dimensions for quadrature, found {found}: "
                "use enumeration for a discrete z, else importance sampling or, for z on R^D, annealing."
            )
        axis = torch.linspace(-_LIMIT, _LIMIT, _POINTS, dtype=x.dtype, device=x.device)
        grid = torch.cartesian_prod(*[axis] * latent_dim).reshape(-1, latent_dim)
        with_mass = prior.log_prob(grid).double().exp().sum().item() * float(axis[1] - axis[0]) ** latent_dim
        if abs(with_mass - 1) > 1e-3:
            raise ValueError(
                f"expected a prior that the grid [-{_LIMIT:g}, {_LIMIT:g}]^{latent_dim} resolves, found one whose mass "
                f"there is {with_mass:.4g}: use importance sampling or annealing."
            )
        both = [
            log_evidence_by_quadrature(vae.prior, vae.decoder, x, limit=_LIMIT, num_points=num_points).double()
            for num_points in (_POINTS, (_POINTS + 1) // 2)
        ]
        border = grid[(grid.abs() == axis[-1]).any(1)].split(max(1, 2**22 // max(1, x.numel())))
        highest = torch.stack([vae.decoder(z.unsqueeze(1)).log_prob(x).double().amax(0) for z in border]).amax(0)
        beyond = (abs(with_mass - 1) * (highest - both[0]).exp()).log1p()
    method = f"quadrature on {_POINTS}{'' if latent_dim == 1 else '²'} points"
    return Estimate("log p(x)", both[0], 0, policy, (both[0] - both[1]).abs() + beyond, method=method)


def enumeration(vae: Any, x: Tensor, policy: str = "") -> Estimate:
    """The log-evidence of a discrete z, exactly: an estimate with K = 0; see :func:`exact.log_evidence_by_enumeration`.

    Args:
        vae: a model with ``prior`` and ``decoder``.
        x: data, [N, *E].
        policy: the data policy to carry.
    """
    values = log_evidence_by_enumeration(vae, x).double()
    return Estimate("log p(x)", values, 0, policy, torch.zeros_like(values), method="enumeration")


def differences(estimates: Mapping[str, Mapping[str, Estimate]]) -> list[tuple[str, str, Difference]]:
    """How much each run is better than the first, estimate by estimate, paired over the examples.

    Args:
        estimates: run -> name -> estimate, on the same examples.

    Returns:
        (run, first run, difference), for each estimate that both have.

    Raises:
        ValueError: their data policies differ.
    """
    first, *others = estimates
    return [
        (run, first, paired_difference(estimates[run][name], estimates[first][name]))
        for run in others
        for name in estimates[first]
        if name in estimates[run]
    ]


def diagnose(
    vae: Any,
    data: Any,
    folder: Path,
    num_particles: int = 1000,
    num_examples: int | None = None,
    seed: int = 0,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The diagnostics of a run and their pictures: health, aggregate posterior, gaps, calibration, weights.

    What a family does not allow (gaps of a flow, a discrete z) is left out.

    Args:
        vae: the model.
        data: the data set, with ``train``, ``prepare``, ``test`` and ``policy``.
        folder: where the pictures go.
        num_particles: draws K of z for each example.
        num_examples: how many of the held-out examples; None: all, but 100 for the gaps.
        seed: seed of the draws.
        note: called with each line to show.

    Returns:
        The numbers as plain Python, for JSON.
    """
    x = data.test[:num_examples]
    log_evidence(vae, x[:1], 1)  # refuses a point mass, and a score in the place of p(x | z), before all else
    result: dict[str, Any] = {}
    if len(x) > 1:
        found: Health = health(vae, x, seed=seed)
        result["health"] = {
            "warnings": found.warnings,
            "use_of_code": _plain_difference(found.use_of_code),
            "dead_units": found.dead_units,
        }
        note(str(found))
    parts: Aggregate = aggregate_posterior(vae, x, min(len(x), 1000), seed=seed, policy=data.policy)
    rows = (parts.rate, parts.mutual_information, parts.marginal_kl, parts.total_correlation, parts.dimension_kl)
    result["aggregate"] = [row.summary() for row in rows if row is not None]
    note("\n".join(filter(None, [str(parts), parts.warning])))

    discrete = is_discrete(vae.prior())
    if not discrete:
        ranks: Ranks = simulation_based_calibration(vae, seed=seed)
        result["calibration"] = {"p_value": ranks.p_value.tolist(), "dispersion": ranks.dispersion.tolist()}
        note("calibration of q on simulated data\n" + str(ranks))

    few = x[:100]
    weighed = log_evidence(vae, few, max(num_particles, 1000), seed=seed, policy=data.policy)
    try:
        refine(vae, few[:1], num_steps=1)  # the family may refuse: before log p(x) is made for nothing
        gaps: GapReport | None = gap_report(vae, few, _best_evidence(vae, few, data.policy, seed), seed=seed)
    except ValueError as refusal:  # another family
        note(f"no gaps: {refusal}")
        gaps = None
    bars = {}
    if gaps is not None:
        bars = {"approximation": gaps.approximation, "amortisation": gaps.amortisation}
        result["gaps"] = {name: _plain_difference(gap) for name, gap in bars.items()}
        found_at = f"log p(x) by {gaps.evidence.method}"
        note("\n".join(filter(None, [f"gaps of {len(few)} held-out examples, {found_at}", str(gaps), gaps.warning])))
    with untouched(vae, seed):
        chosen = torch.randperm(len(data.train), device=data.train.device)[: len(x)]
        x_train = data.prepare(data.train[chosen].to(x.device))
    settings: dict[str, Any] = {"seed": seed, "policy": data.policy}
    gap, error = generalisation_gap(elbo(vae, x_train, 10, **settings), elbo(vae, x, 10, **settings))
    result["generalisation_gap"] = {"mean": gap, "standard_error": error}
    note(f"generalisation gap   {gap:.2f} ± {error:.2f} nats (ELBO, train less test)")
    drawn = {name: (bar.mean, bar.standard_error) for name, bar in bars.items()} | {"generalisation": (gap, error)}
    title = f"{data.name}: "
    _save(evaluation_plots.gap_bars(drawn), folder / "gaps.png", title + "gaps")

    assert weighed.pareto_k is not None
    ends = weighed.pareto_k.argsort()[[0, -1]]
    log_w = log_weights(vae, few[ends], 5000, seed=seed)
    names = [f"test example {int(i)}" for i in ends]
    ax = evaluation_plots.log_weights(log_w, pareto_k(log_w), names)
    _save(ax, folder / "log_weights.png", title + "importance weights")
    if is_real(vae.prior()) and tuple(vae.prior().event_shape) == (2,):
        _draw_plane(vae, x, data, folder, title)
    return result


def _best_evidence(vae: Any, x: Tensor, policy: str, seed: int) -> Estimate:
    """Log p(x) as tight as it is cheap: a loose bound would make the approximation gap negative."""
    try:
        return quadrature(vae, x, policy)
    except ValueError:
        return annealed_log_evidence(vae, x, 8, 200, 5, seed=seed, policy=policy)


def _draw_plane(vae: Any, x: Tensor, data: Any, folder: Path, title: str) -> None:
    """The pictures of two latent dimensions."""
    with untouched(vae, 0):
        prior = vae.prior()
        z = torch.cat([prior.sample((2000,)), *[vae.encoder(rows).sample() for rows in x[:2000].split(500)]])
        limit = 1.1 * float(z.abs().quantile(0.999))
        axis = torch.linspace(-limit, limit, 161, dtype=z.dtype, device=z.device)
        grid = torch.cartesian_prod(axis, axis)
        prior_density = prior.log_prob(grid).exp().reshape(161, 161)
    density = log_aggregate(vae, x[:2000], grid).exp().reshape(161, 161)
    ax = evaluation_plots.aggregate_posterior(axis, density, prior_density)
    _save(ax, folder / "aggregate.png", title + "where codes lie")
    images = x[:5] if x.ndim == 4 and x.shape[1] in (1, 3) else None
    found = posterior_on_grid(vae, x[:5], limit=1.2 * limit, num_points=401)
    value_range = getattr(data, "value_range", None) or (min(0.0, float(x.min())), max(1.0, float(x.max())))
    ax = evaluation_plots.posteriors(found.axis, found.posterior, found.approximation, images, found.kl, value_range)
    _save(ax, folder / "posteriors.png", title + "q(z | x) against the true posterior")


def _plain_difference(difference: Difference) -> dict[str, Any]:
    numbers = {"mean": difference.mean, "standard_error": difference.standard_error}
    return {**numbers, "num_examples": len(difference.values)}


def _save(ax: Axes, path: Path, title: str) -> None:
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.suptitle(plain_text(title))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    write_atomically(path, buffer.getvalue())
