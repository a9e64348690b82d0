r"""The aggregate posterior q(z) = 1/N sum_n q(z|x_n) inside an objective: differentiable, of a batch or all data.

.. math:: \frac 1 N \sum_n \mathrm{KL}(q(z|x_n) \,\|\, p(z)) =
    \underbrace{I_q(x; z)}_{\text{mutual information}} +
    \underbrace{\mathrm{KL}\Big(q(z) \,\Big\|\, \prod_d q(z_d)\Big)}_{\text{total correlation}} +
    \underbrace{\sum_d \mathrm{KL}(q(z_d) \,\|\, p(z_d))}_{\text{dimension-wise KL}}

Each is a mean over draws z ~ q(z|x_b) of differences of log q(z|x_b), log q(z), log prod_d q(z_d) and log p(z). To
measure them on a trained model, see ``aggregate``.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_vae.analytic import Latent, factors, latents
from pyro_vae.terms import Program, Terms

Estimator = Literal["exact", "mws", "mss"]


class AggregateTerms(NamedTuple):
    """The guide's log-densities at its own draws, each [K, B], nats."""

    log_qz: Tensor  # log q(z), estimated
    log_qz_factors: Tensor | None  # log prod_d q(z_d), estimated; None where it was not asked for


def aggregate_terms(
    terms: Terms,
    estimator: Estimator = "exact",
    num_examples: int | None = None,
    data_guide: Trace | None = None,
    per_dimension: bool = True,
) -> AggregateTerms:
    r"""Estimate the aggregate posterior, and the product of its marginals, at the guide's draws.

    .. math:: \log \hat q(z_b) = \log \sum_n w_{bn} \, q(z_b \mid x_n)

    - ``exact``: w = 1/N over all of the data (``data_guide``), or 1/B over the batch, whose own aggregate it then is.
    - ``mws`` (minibatch weighted sampling): w = 1/(N B). Biased: it is about log N too low, so that the mutual
      information is some log N too high and the total correlation some (D - 1) log N. Gradients do not see these
      constants, yet the batch's own example counts N times too much.
    - ``mss`` (minibatch stratified sampling): w = 1/N for the example itself, (N - 1) / (N (B - 1)) for each other.
      Unbiased for q(z), so log q(z) is too low (Jensen), the more the sharper the density: the total correlation comes
      out too low, and can be negative. (The published weights single out one of the others at random, with the same
      expectation; widely copied code puts 1/N into a column instead of on the diagonal.)

    Args:
        terms: from :func:`pyro_vae.draw`, of a guide with one latent site.
        estimator: which weights.
        num_examples: N, the size of the data set, for "mws" and "mss".
        data_guide: the guide's trace on all of the data, for "exact".
        per_dimension: also the product of the marginals; needs a posterior that factorises given x.

    Returns:
        The two logarithms, [K, B].

    Raises:
        ValueError: the guide has not one latent site in the plate of the examples, or does not factorise.
    """
    log_weight = _log_weight(estimator, terms.log_px.shape[1], num_examples, terms.log_px)
    joint, product = [], []
    for latent, z in _draws(terms):
        q = latent.q if data_guide is None else _data_posterior(data_guide, latent)
        pairs = _pairs(q, z, latent.name, per_dimension, whole=data_guide is not None)
        weight = log_weight - math.log(pairs.shape[2]) if estimator == "exact" else log_weight
        if per_dimension:
            product.append((pairs + weight.unsqueeze(-1)).logsumexp(2).sum(-1))
            pairs = pairs.sum(-1)
        joint.append((pairs + weight).logsumexp(2))
    return AggregateTerms(torch.cat(joint), torch.cat(product) if per_dimension else None)


def log_q_pairs(terms: Terms, per_dimension: bool = False) -> Tensor:
    """The density of each draw under each example's posterior, log q(z_kb | x_b').

    Args:
        terms: from :func:`pyro_vae.draw`, of a guide with one latent site.
        per_dimension: one number for each dimension; needs a posterior that factorises.

    Returns:
        [K, B, B'], or [K, B, B', D]; nats; b = b' is ``terms.log_qz``.

    Raises:
        ValueError: the guide has not one latent site in the plate of the examples, or does not factorise.
    """
    return torch.cat([_pairs(latent.q, z, latent.name, per_dimension, False) for latent, z in _draws(terms)])


def draws(terms: Terms) -> Tensor:
    """The draws of the one latent site, [K, B, D].

    Args:
        terms: from :func:`pyro_vae.draw`.

    Raises:
        ValueError: the guide has not one latent site in the plate of the examples.
    """
    return torch.cat([z.flatten(2) if z.dim() > 2 else z.unsqueeze(-1) for _, z in _draws(terms)])


def prior_draws(terms: Terms) -> Tensor:
    """As many draws of the prior of the one latent site, [K, B, D], with gradients where the prior has ``rsample``.

    Args:
        terms: from :func:`pyro_vae.draw`.

    Raises:
        ValueError: the guide has not one latent site in the plate of the examples, or the prior is trained but has no
            reparameterised sampler.
    """
    parts = []
    for latent, z in _draws(terms):
        p = latent.p
        if (
            not p.has_rsample
            and torch.is_grad_enabled()
            and p.log_prob(latent.guide_site["value"].detach()).requires_grad
        ):
            raise ValueError(
                f"expected a prior with a reparameterised sampler (rsample), found {type(p).__name__} with parameters: "
                "they would get no gradient; freeze it, or use another objective."
            )
        drawn = (p.rsample() if p.has_rsample else p.sample()).expand(latent.guide_site["value"].shape).reshape(z.shape)
        parts.append(drawn.flatten(2) if z.dim() > 2 else drawn.unsqueeze(-1))
    return torch.cat(parts)


def moments(terms: Terms) -> tuple[Tensor, Tensor]:
    """Means [B, D] and covariances [B, D, D] of q(z|x_b), of the first particle where they vary.

    Args:
        terms: from :func:`pyro_vae.draw`.

    Raises:
        ValueError: the guide has not one latent site of event shape (D,), or it knows no covariance.
    """
    latent, _ = _draws(terms)[0]
    q, batch = latent.q, terms.log_px.shape[1]
    try:
        mean = q.mean
        covariance = (
            q.covariance_matrix
            if hasattr(q, "covariance_matrix")
            else torch.diag_embed(factors(q, latent.name).variance.expand(mean.shape))
        )
    except NotImplementedError:
        raise ValueError(
            f"expected a posterior with known mean and covariance, found {type(q).__name__} at site '{latent.name}': "
            "use a normal one, for example DiagonalNormal."
        ) from None
    dim = mean.shape[-1]
    return mean.reshape(-1, batch, dim)[0], covariance.reshape(-1, batch, dim, dim)[0]


def mmd(z: Tensor, other: Tensor, kernel: Literal["multiquadric", "gaussian"] = "multiquadric") -> Tensor:
    r"""Squared maximum mean discrepancy of two samples, unbiased; what each draw of the first has part in it.

    .. math:: \mathrm{MMD}^2 = \mathbb E \, k(z, z') + \mathbb E \, k(y, y') - 2 \, \mathbb E \, k(z, y)

    Kernels of the squared distance r in D dimensions: inverse multiquadric, sum over s in (0.1, 0.2, 0.5, 1, 2, 5, 10)
    of 2 D s / (2 D s + r); Gaussian, exp(-r / (2 D)). Being unbiased, an estimate can be negative.

    Args:
        z: draws [K, B, D].
        other: as many draws of the other distribution.
        kernel: which kernel.

    Returns:
        [K, B]; its mean over B is the estimate, 0 on average where the two distributions are equal.

    Source: Gretton et al. (2012), A kernel two-sample test, section 2.2; Tolstikhin et al. (2018), Wasserstein
        auto-encoders, arXiv:1711.01558, for the inverse multiquadric and its width 2 D.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> z, y = torch.randn(2, 1, 1000, 3)
        >>> bool(mmd(z, y).mean().abs() < 0.02), bool(mmd(z + 1, y).mean() > 0.2)
        (True, True)
    """
    dim, count = z.shape[-1], z.shape[1]

    def k(a: Tensor, b: Tensor) -> Tensor:
        distance = (a.unsqueeze(2) - b.unsqueeze(1)).square().sum(-1)
        if kernel == "gaussian":
            return (-distance / (2 * dim)).exp()
        widths = [2.0 * dim * s for s in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)]
        return torch.stack([c / (c + distance) for c in widths]).sum(0)

    self_term = 7.0 if kernel == "multiquadric" else 1.0
    within = (k(z, z).sum(2) + k(other, other).sum(2) - 2 * self_term) / max(count - 1, 1)
    return within - 2 * k(z, other).mean(2)


def trace_data(guide: Program, data: Tensor) -> Trace:
    """The guide's trace on all of the data, subsample sites pruned.

    Args:
        guide: a Pyro program of x alone.
        data: all examples, [N, *E].
    """
    return prune_subsample_sites(poutine.trace(guide).get_trace(data))


def _draws(terms: Terms) -> list[tuple[Latent, Tensor]]:
    """The one latent site of each pass, and its draws [K, B, *event]."""
    found = []
    for traces in terms.passes:
        sites = latents(*traces)
        if len(sites) != 1 or terms.log_px.dim() != 2:
            raise ValueError(
                f"expected a guide with one latent site in one plate of examples, found {[s.name for s in sites]}: the "
                "aggregate of a hierarchy is not implemented; use an objective without it."
            )
        latent = sites[0]
        z, event = latent.guide_site["value"], tuple(latent.q.event_shape)
        count, batch = latent.axes.shape
        if z.shape[: z.dim() - len(event)].numel() != count * batch or latent.guide_site["mask"] is not None:
            raise ValueError(
                f"expected site '{latent.name}' to have one unmasked draw for each example, found shape "
                f"{tuple(z.shape)} for {batch} examples: the aggregate counts every example once."
            )
        found.append((latent, z.reshape(count, batch, *event)))
    return found


def _data_posterior(trace: Trace, latent: Latent) -> Any:
    return trace.nodes[latent.name]["fn"]


def _pairs(q: Any, z: Tensor, name: str, per_dimension: bool, whole: bool) -> Tensor:
    """Log q(z_kb | x_n), [K, B, N] or [K, B, N, D]; q has batch shape [N], or [K, N] with equal rows."""
    event = len(q.event_shape)
    if per_dimension:
        q = factors(q, name)
    batch = q.batch_shape[: len(q.batch_shape) - event] if per_dimension else q.batch_shape
    if len(batch) == 1:  # z [K, B, 1, *event] against [N]
        value = z.unsqueeze(2).expand(*z.shape[:2], *batch, *z.shape[2:])
        log_q = q.log_prob(value)
    else:  # z [B, K, 1, *event] against [K, N]
        value = z.transpose(0, 1).unsqueeze(2).expand(z.shape[1], *batch, *z.shape[2:])
        log_q = q.log_prob(value).transpose(0, 1)
    return log_q.flatten(3) if per_dimension and event else log_q.unsqueeze(-1) if per_dimension else log_q


def _log_weight(estimator: str, batch: int, num_examples: int | None, like: Tensor) -> Tensor:
    if estimator == "exact":
        return like.new_zeros(1, 1)
    if num_examples is None:
        raise ValueError(
            f"expected num_examples for the estimator {estimator!r}, found none: give the data set's size."
        )
    if estimator == "mws":
        return like.new_full((1, 1), -math.log(num_examples * batch))
    if estimator != "mss":
        raise ValueError(f"expected the estimator 'exact', 'mws' or 'mss', found {estimator!r}.")
    if batch == 1:
        return like.new_zeros(1, 1)
    others = math.log((num_examples - 1) / (num_examples * (batch - 1))) if num_examples > 1 else -math.inf
    own = torch.eye(batch, dtype=torch.bool, device=like.device)
    return torch.where(own, -math.log(num_examples), like.new_full((), others))
