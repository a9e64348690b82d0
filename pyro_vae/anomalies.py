"""Odd examples: how unlikely the model finds x, and how well such a score tells odd examples from ordinary ones."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_vae.estimates import log_evidence
from pyro_vae.uncertainty import Estimate, Score


def anomaly_score(
    vae: Any,
    x: Tensor,
    num_particles: int = 100,
    *,
    estimator: Callable[..., Estimate] = log_evidence,
    seed: int = 0,
    policy: str = "",
) -> Estimate:
    r"""How unlikely the model finds each example; higher is odder.

    .. math:: s(x) = -\log p(x) \quad \text{or} \quad s(x) = -\mathrm{ELBO}(x)

    A high density is not the same as being typical: flat pictures can score as ordinary whatever they show (Nalisnick
    et al. 2019, arXiv:1810.09136). Set it beside ``principal_components(x, D).residual``.

    Args:
        vae: a model with ``model`` and ``guide``.
        x: data, [N, *E].
        num_particles: draws K of z for each example.
        estimator: :func:`pyro_vae.log_evidence`, :func:`pyro_vae.elbo`, or any with their arguments.
        seed: seed of the draws.
        policy: the data policy to carry.

    Returns:
        An estimate of the scores, nats per example; threshold it at a quantile of the scores of ordinary x.
    """
    found = estimator(vae, x, num_particles, seed=seed, policy=policy)
    return replace(found, name=f"-{found.name}", values=-found.values)


def auroc(ordinary: Tensor, odd: Tensor, *, name: str = "AUROC", policy: str = "") -> Score:
    r"""The probability that an odd example scores higher than an ordinary one: 1 tells all apart, 0.5 none.

    .. math:: A = \frac{1}{m n} \sum_{i=1}^m \sum_{j=1}^n \left( 1[s_i > t_j] + \tfrac 1 2 1[s_i = t_j] \right), \qquad
        \mathrm{se}^2 = \frac{\mathrm{Var}_i(V_i)}{m} + \frac{\mathrm{Var}_j(W_j)}{n}

    with V_i and W_j the means of the terms over the other set.

    Args:
        ordinary: scores t of ordinary examples, [n].
        odd: scores s of odd examples, [m].
        name: what to call it.
        policy: the data policy to carry.

    Returns:
        The score and its standard error.

    Raises:
        ValueError: fewer than two of either, or a score that is NaN.

    Source: DeLong, DeLong, Clarke-Pearson (1988), Comparing the areas under two or more correlated receiver operating
        characteristic curves.

    Example:
        >>> print(auroc(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.5, 4.0])))
        0.83 ± 0.24 (n=5)
    """
    v, w = _placements(ordinary, odd)
    error = (v.var() / len(v) + w.var() / len(w)).sqrt().item()
    return Score(name, v.mean().item(), error, len(v) + len(w), policy=policy)


def auroc_difference(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], *, name: str = "difference of AUROC", policy: str = ""
) -> Score:
    r"""The AUROC of one score less that of another on the same examples, with the error of the pairs.

    .. math:: \mathrm{se}^2 = \frac{\mathrm{Var}_i(V_i - V'_i)}{m} + \frac{\mathrm{Var}_j(W_j - W'_j)}{n}

    V, W as in :func:`auroc`. Where two scores fail on the same examples, this is less than both errors together.

    Args:
        first: scores of the ordinary examples [n] and of the odd ones [m].
        second: another score of the same examples, in the same order.
        name: what to call it.
        policy: the data policy to carry.

    Returns:
        The difference and its standard error; > 0 where the first is better.

    Raises:
        ValueError: see :func:`auroc`; or the two have different numbers of examples.

    Source: DeLong, DeLong, Clarke-Pearson (1988), as :func:`auroc`.

    Example:
        >>> t, s = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.5, 4.0])
        >>> print(auroc_difference((t, s), (t + 1, s + 1)))
        0.00 ± 0.00 (n=5)
    """
    shapes = [tuple(len(part) for part in pair) for pair in (first, second)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"expected two scores of the same examples, found {shapes[0]} and {shapes[1]} of them.")
    v, w = (a - b for a, b in zip(_placements(*first), _placements(*second), strict=True))
    error = (v.var() / len(v) + w.var() / len(w)).sqrt().item()
    return Score(name, v.mean().item(), error, len(v) + len(w), policy=policy)


def _placements(ordinary: Tensor, odd: Tensor) -> tuple[Tensor, Tensor]:
    """Of each odd example the share of ordinary ones below it, and of each ordinary one that of odd ones above it."""
    if min(len(ordinary), len(odd)) < 2 or ordinary.ndim != 1 or odd.ndim != 1:
        found = f"{tuple(ordinary.shape)} and {tuple(odd.shape)}"
        raise ValueError(f"expected two scores [n] and [m] or more of each, found {found}: give more examples.")
    if bool(ordinary.isnan().any() or odd.isnan().any()):
        raise ValueError("expected scores that are numbers, found NaN: the model that made them diverged.")

    def share_below(values: Tensor, others: Tensor) -> Tensor:
        ordered = others.double().sort().values
        below, up_to = (torch.searchsorted(ordered, values.double(), right=right) for right in (False, True))
        return (below + up_to).double() / (2 * len(others))

    return share_below(odd, ordinary), 1 - share_below(ordinary, odd)
