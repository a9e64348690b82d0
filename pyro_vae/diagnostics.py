"""Diagnostics: what the latent dimensions of a trained model do. Nothing is trained."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from pyro_vae.contracts import untouched


def kl_per_dimension(vae: Any, x: Tensor, batch_size: int = 1000) -> Tensor:
    r"""The KL of each latent dimension, averaged over the data; exact.

    .. math:: \mathrm{KL}_d = \frac 1 N \sum_n \mathrm{KL}(q(z_d \mid x_n) \,\|\, p(z_d))

    Args:
        vae: a model whose prior and posterior are both diagonal normals.
        x: data, [N, *E].
        batch_size: examples handled at once.

    Returns:
        [D], nats, >= 0; their sum is the KL term of the ELBO.

    Raises:
        ValueError: prior or posterior do not factorise into normals.
    """

    def factors(q: Any, call: str) -> Normal:
        if isinstance(q, Independent) and isinstance(q.base_dist, Normal):
            return q.base_dist
        raise ValueError(
            f"expected diagonal normals, found {call} of type {type(q).__name__}: a KL per dimension exists only where "
            "prior and posterior both factorise; use active_units instead."
        )

    with untouched(vae):
        p = factors(vae.prior(), "prior()")
        total = torch.zeros_like(p.mean)
        for rows in x.split(batch_size):
            total += kl_divergence(factors(vae.encoder(rows), "encoder(x)"), p).sum(0)
    return total / len(x)


def active_units(vae: Any, x: Tensor, threshold: float = 0.01, batch_size: int = 1000) -> Tensor:
    r"""Which latent dimensions carry information about x: those whose posterior mean moves with x.

    .. math:: A_d = \operatorname{Var}_x(\mathbb E_{q(z|x)}[z_d]) > 0.01

    Args:
        vae: a model with an encoder.
        x: data, [N, *E].
        threshold: the variance above which a unit counts as active.
        batch_size: examples handled at once.

    Returns:
        [D], boolean; ``.sum()`` is the number of active units.

    Source: Burda, Grosse, Salakhutdinov (2016), section 5.2, arXiv:1509.00519.
    """
    with untouched(vae):
        means = torch.cat([vae.encoder(rows).mean for rows in x.split(batch_size)])
    return means.var(0) > threshold
