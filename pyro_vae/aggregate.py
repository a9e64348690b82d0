r"""The aggregate posterior q(z), the mixture of all q(z|x), and the parts of the KL term: what z knows, what it wastes.

.. math:: q(z) = \frac 1 N \sum_{n=1}^N q(z \mid x_n), \qquad
    \frac 1 N \sum_n \mathrm{KL}(q(z|x_n) \,\|\, p(z)) = I_q(x; z) + \mathrm{KL}(q(z) \,\|\, p(z))

The sums run over all N examples: a minibatch in their place makes I_q(x; z) wrong, not only noisy.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from pyro_vae.contracts import Distribution, untouched
from pyro_vae.uncertainty import Estimate, with_error

_BATCH = 1000  # examples that the encoder sees at once


@dataclass(frozen=True)
class Aggregate:
    r"""The parts of the KL term; ``rate`` is their sum, draw by draw.

    .. math:: \mathrm{KL} = \underbrace{I_q(x; z)}_{\text{mutual information}} +
        \underbrace{\mathrm{KL}(q(z) \| p(z))}_{\text{marginal KL}}, \qquad
        \mathrm{KL}(q(z) \| p(z)) = \underbrace{\mathrm{KL}(q(z) \| \textstyle\prod_d q(z_d))}_{\text{total
        correlation}} + \underbrace{\textstyle\sum_d \mathrm{KL}(q(z_d) \| p(z_d))}_{\text{dimension-wise KL}}

    Args:
        rate: E_q [log q(z|x) - log p(z)].
        mutual_information: E_q [log q(z|x) - log q(z)], between 0 and log N.
        marginal_kl: E_q [log q(z) - log p(z)]; far above 0, the prior draws codes that no x has.
        total_correlation: E_q [log q(z) - sum_d log q(z_d)]; None where posteriors do not factorise into normals.
        dimension_kl: E_q sum_d [log q(z_d) - log p(z_d)]; None where the prior does not factorise either.
        num_mixed: the number N of examples mixed.
    """

    rate: Estimate
    mutual_information: Estimate
    marginal_kl: Estimate
    total_correlation: Estimate | None
    dimension_kl: Estimate | None
    num_mixed: int

    @property
    def warning(self) -> str:
        """One line where the mutual information has reached what N examples can show, else nothing."""
        most = math.log(self.num_mixed)
        if self.mutual_information.mean < 0.95 * most:
            return ""
        return (
            f"the mutual information is near its largest value for N={self.num_mixed} examples, log N = {most:.2f} "
            "nats: z tells them all apart, and more examples would show more."
        )

    def __str__(self) -> str:
        parts = {
            "KL(q(z|x), p(z))": self.rate,
            "= I_q(x; z)": self.mutual_information,
            "+ KL(q(z), p(z))": self.marginal_kl,
            "  = total correlation": self.total_correlation,
            "  + KL per dimension": self.dimension_kl,
        }
        lines = [f"{k:22} {with_error(v.mean, v.standard_error)} nats" for k, v in parts.items() if v is not None]
        return "\n".join(lines)


def aggregate_posterior(
    vae: Any,
    x: Tensor,
    num_draws: int | None = None,
    *,
    seed: int = 0,
    policy: str = "",
    max_elements: int = 2**22,
) -> Aggregate:
    r"""Mutual information, marginal KL and total correlation of z ~ q(z), by sums over all of x.

    .. math:: I_q(x; z) = \frac 1 N \sum_n \mathbb E_{q(z|x_n)} [\log q(z \mid x_n) - \log q(z)]

    Every number is an average over draws z ~ q(z|x_n), one for each of ``num_draws`` examples taken evenly, with its
    standard error; inside, log q(z) is exact. The cost is num_draws times N densities.

    Args:
        vae: a model with ``prior`` and ``encoder``.
        x: data, [N, *E].
        num_draws: how many of the examples to draw from, at most N; None: all.
        seed: seed of the draws; the random state outside is untouched.
        policy: the data policy to carry.
        max_elements: numbers of z handled at once; memory is some 10 times their bytes.

    Returns:
        The parts, nats.

    Raises:
        ValueError: num_draws is not between 1 and N.

    Source: Hoffman, Johnson (2016), ELBO surgery; the total correlation as in Chen, Li, Grosse, Duvenaud (2018),
        Isolating sources of disentanglement in VAEs, arXiv:1802.04942.

    Example:
        >>> from pyro_vae import VAE, Bernoulli, Decoder, DiagonalNormal, Mlp, StandardNormal
        >>> vae = VAE(StandardNormal(2), Decoder(Mlp(2, 8, 7), Bernoulli()), DiagonalNormal(Mlp(7, 8, 4)))
        >>> parts = aggregate_posterior(vae, torch.ones(5, 7))
        >>> abs(parts.mutual_information.mean) < 1e-5  # five equal examples: z tells nothing
        True
    """
    total = len(x)
    count = total if num_draws is None else num_draws
    if not 1 <= count <= total:
        raise ValueError(f"expected num_draws between 1 and {total} (examples), found {num_draws}.")
    with untouched(vae, seed):
        prior, q = vae.prior(), [vae.encoder(rows) for rows in x.split(_BATCH)]
        chosen = torch.arange(count, device=x.device) * total // count
        z = torch.cat([part.sample() for part in q])[chosen]  # [M, D]
        log_pz = prior.log_prob(z)
        factors, prior_factors = [_normal(part) for part in q], _normal(prior)
        at_once = max(1, max_elements // (total * z.shape[-1]))
        log_own, log_q, log_marginals = [], [], []
        for rows, index in zip(z.split(at_once), chosen.split(at_once), strict=True):
            if factors[0] is None:
                log_each = _log_each(q, rows)  # [m, N]
            else:
                of_dimensions = torch.cat([f.log_prob(rows.unsqueeze(1)) for f in factors if f], 1)  # [m, N, D]
                log_each = of_dimensions.sum(-1)
                log_marginals.append(of_dimensions.double().logsumexp(1) - math.log(total))  # log q(z_d), [m, D]
            log_own.append(log_each.gather(1, index.unsqueeze(1)).squeeze(1))
            log_q.append(log_each.double().logsumexp(1) - math.log(total))
        own, mixed, log_pz = torch.cat(log_own).double(), torch.cat(log_q), log_pz.double()

        def estimate(name: str, values: Tensor) -> Estimate:
            return Estimate(name, values, 1, policy, method=f"one draw for each of {count} examples, {total} mixed")

        correlation = dimension_kl = None
        if log_marginals:
            marginal = torch.cat(log_marginals)
            correlation = estimate("total correlation", mixed - marginal.sum(-1))
            if prior_factors is not None:
                dimension_kl = estimate("KL(q(z_d), p(z_d))", marginal.sum(-1) - log_pz)
    return Aggregate(
        estimate("KL(q(z|x), p(z))", own - log_pz),
        estimate("I_q(x; z)", own - mixed),
        estimate("KL(q(z), p(z))", mixed - log_pz),
        correlation,
        dimension_kl,
        total,
    )


def log_aggregate(vae: Any, x: Tensor, z: Tensor, max_elements: int = 2**22) -> Tensor:
    r"""The log-density of the aggregate posterior at z, for a picture of it.

    .. math:: \log q(z) = \log \frac 1 N \sum_n q(z \mid x_n)

    Args:
        vae: a model with an encoder.
        x: data, [N, *E].
        z: where, [M, D].
        max_elements: numbers of z handled at once.

    Returns:
        [M], nats.
    """
    with untouched(vae):
        q = [vae.encoder(rows) for rows in x.split(_BATCH)]
        at_once = max(1, max_elements // (len(x) * z.shape[-1]))
        parts = [_log_each(q, rows).double().logsumexp(1) for rows in z.split(at_once)]
        return torch.cat(parts) - math.log(len(x))


def _log_each(q: list[Distribution], z: Tensor) -> Tensor:
    """Each log q(z_m | x_n), [M, N]."""
    return torch.cat([part.log_prob(z.unsqueeze(1).expand(-1, *part.batch_shape, -1)) for part in q], dim=1)


def _normal(p: Distribution) -> Normal | None:
    """The independent normals that p is made of, else None."""
    if isinstance(p, Independent) and isinstance(p.base_dist, Normal) and p.reinterpreted_batch_ndims == 1:
        return p.base_dist
    return None
