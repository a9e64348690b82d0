r"""Objectives changed on purpose: what the KL shall be. ``Beta`` is in ``objectives``.

None of them is the ELBO; :func:`pyro_vae.fit` logs the true one beside them.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyro_vae.analytic import kl, kl_per_dimension, log_ratios
from pyro_vae.objectives import Objective
from pyro_vae.schedules import Weight, check_weight
from pyro_vae.terms import Terms

Over = Literal["batch", "example"]


@dataclass(frozen=True)
class Capacity(Objective):
    r"""The reconstruction, and a KL that is held at a given capacity.

    .. math:: \mathbb E_{q(z|x)} \log p(x \mid z) - \gamma \, |\mathrm{KL}(q(z|x) \,\|\, p(z)) - C|

    A schedule lets the capacity C grow, so that the latent dimensions take up information one after the other. The KL
    is in closed form, for the absolute value of a sampled one would be biased.

    Args:
        gamma: weight of the constraint, >= 0.
        capacity: C, nats, or a schedule such as ``Linear(steps=10_000, stop=25.0)``.
        over: hold the mean KL of the batch at C ("batch", as the published code does), or that of each example.
        num_particles: number K of draws of z for each example.
        vectorize_particles: draw them in one pass; else in a loop.
        max_plate_nesting: the largest number of nested plates in model and guide.

    Returns:
        ``bound``: [B], nats per example, higher is better.

    Raises:
        ValueError: gamma or capacity < 0, num_particles < 1, or the KL has no closed form.

    Source: Burgess et al. (2018), Understanding disentangling in beta-VAE, arXiv:1804.03599.

    Example:
        >>> Capacity(gamma=100.0, capacity=5.0)
        Capacity(num_particles=1, gamma=100.0, capacity=5.0, over='batch')
    """

    num_particles: int = 1
    gamma: float = 100.0
    capacity: Weight = 5.0
    over: Over = "batch"

    formula = r"\mathbb{E}_{q(z|x)} \log p(x|z) - \gamma \left|\mathrm{KL}(q(z|x) \,\|\, p(z)) - C\right|"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight("gamma", self.gamma)
        check_weight("capacity", self.capacity)
        _check_over(self.over)

    @property
    def is_bound(self) -> bool:
        """Never: near the capacity the KL costs less than itself."""
        return False

    @property
    def is_tight(self) -> bool:
        """Never."""
        return False

    @property
    def mixes_examples(self) -> bool:
        """With the mean KL of the batch."""
        return self.over == "batch"

    def combine(self, terms: Terms) -> Tensor:
        """The mean reconstruction less the weighted distance of the KL from the capacity."""
        excess = kl(terms).mean(0) - self.weigh(self.capacity)
        side = excess if self.over == "example" else excess.mean()
        return terms.log_px.mean(0) - self.gamma * side.sign().detach() * excess


@dataclass(frozen=True)
class FreeBits(Objective):
    r"""The ELBO with a KL that costs nothing below a threshold: a remedy for posterior collapse.

    .. math:: \mathbb E_{q(z|x)} \log p(x \mid z) - \sum_d \max(\lambda, \mathrm{KL}_d)

    KL_d is that of a latent dimension, in closed form (``dimension``), or of a latent site, sampled (``site``).

    Args:
        nats: lambda, >= 0, the KL that each of them has for free.
        per: "dimension", or "site" (in a hierarchy: each layer).
        over: compare the mean KL of the batch with lambda ("batch", as published), or that of each example.
        num_particles: number K of draws of z for each example.
        vectorize_particles: draw them in one pass; else in a loop.
        max_plate_nesting: the largest number of nested plates in model and guide.

    Returns:
        ``bound``: [B], nats per example, higher is better; not above the ELBO, on average over the batch.

    Raises:
        ValueError: nats < 0; num_particles < 1; per dimension, where prior or posterior do not factorise.

    Source: Kingma et al. (2016), Improving variational inference with inverse autoregressive flow, arXiv:1606.04934.

    Example:
        >>> FreeBits(nats=0.1)
        FreeBits(num_particles=1, nats=0.1, per='dimension', over='batch')
    """

    num_particles: int = 1
    nats: float = 0.1
    per: Literal["dimension", "site"] = "dimension"
    over: Over = "batch"

    formula = r"\mathbb{E}_{q(z|x)} \log p(x|z) - \sum_d \max(\lambda, \mathrm{KL}_d)"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight("nats", self.nats)
        _check_over(self.over)
        if self.per not in ("dimension", "site"):
            raise ValueError(f"expected per='dimension' or per='site', found {self.per!r}.")

    @property
    def is_bound(self) -> bool:
        """Example by example; with the mean KL of the batch it is one for the sum over the batch only."""
        return self.over == "example"

    @property
    def is_tight(self) -> bool:
        """Never, unless every KL exceeds the threshold; and then only on average."""
        return False

    @property
    def mixes_examples(self) -> bool:
        """With the mean KL of the batch."""
        return self.over == "batch"

    def combine(self, terms: Terms) -> Tensor:
        """The mean reconstruction less the sum of the KLs, each at least lambda."""
        if self.per == "dimension":
            parts = kl_per_dimension(terms).mean(0)
        else:
            parts = torch.stack([ratio.mean(0) for ratio in log_ratios(terms).values()], -1)
        level = parts if self.over == "example" else parts.flatten(0, -2).mean(0)
        return terms.log_px.mean(0) - torch.where(level > self.nats, parts, self.nats).sum(-1)


@dataclass(frozen=True)
class BalancedKL(Objective):
    r"""A hierarchy's ELBO in which each layer's KL is weighted by how large it is, so that no layer dies early.

    .. math:: \mathbb E_{q(z|x)} \log p(x|z) - \beta \sum_l \gamma_l \, \mathrm{KL}_l, \qquad
        \gamma_l = \frac{L \, \overline{\mathrm{KL}}_l}{\sum_i \overline{\mathrm{KL}}_i}

    The weights are those of the batch's mean KLs, without a gradient, 1 on average over the L sites. Meant for warm-up:
    a layer with a small KL is pressed less.

    Args:
        beta: weight of the whole, >= 0, or a schedule.
        num_particles: number K of draws of z for each example.
        vectorize_particles: draw them in one pass; else in a loop.
        max_plate_nesting: the largest number of nested plates in model and guide.

    Returns:
        ``bound``: [B], nats per example, higher is better.

    Raises:
        ValueError: beta < 0, num_particles < 1, or a guide site has no reparameterised sampler.

    Source: Vahdat, Kautz (2020), NVAE: a deep hierarchical variational autoencoder, appendix, arXiv:2007.03898.

    Example:
        >>> BalancedKL()
        BalancedKL(num_particles=1, beta=1.0)
    """

    num_particles: int = 1
    beta: Weight = 1.0

    formula = (
        r"\mathbb{E}_{q(z|x)} \log p(x|z) - \beta \sum_l \gamma_l \mathrm{KL}_l, \quad \gamma_l \propto \mathrm{KL}_l"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight("beta", self.beta)

    @property
    def is_bound(self) -> bool:
        """Never claimed: some weights are below 1 (with one site it is :class:`Beta`)."""
        return False

    @property
    def is_tight(self) -> bool:
        """Never claimed."""
        return False

    @property
    def mixes_examples(self) -> bool:
        """The weights are those of the batch."""
        return True

    def combine(self, terms: Terms) -> Tensor:
        """The mean reconstruction less the weighted KLs of the sites."""
        parts = torch.stack([ratio.mean(0) for ratio in log_ratios(terms).values()], -1)
        level = parts.detach().flatten(0, -2).mean(0).abs().clamp(min=1e-12)
        weights = level / level.mean()
        return terms.log_px.mean(0) - self.weigh(self.beta) * (weights * parts).sum(-1)


def _check_over(over: str) -> None:
    if over not in ("batch", "example"):
        raise ValueError(f"expected over='batch' or over='example', found {over!r}.")
