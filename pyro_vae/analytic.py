r"""Terms in closed form, read off the distributions of the traces: the KL divergence, its dimensions, the entropy.

.. math:: \mathrm{KL}(q(z|x) \,\|\, p(z)) = \sum_i \mathbb E_{q(z_{<i}|x)} \,
    \mathrm{KL}(q(z_i \mid z_{<i}, x) \,\|\, p(z_i \mid z_{<i}))

Site by site, with the scale and mask of each, as :func:`pyro_vae.terms.collect` does. What torch has no formula for is
refused, never sampled in silence.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.distributions import MultivariateNormal
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Independent, LowRankMultivariateNormal, Normal, kl_divergence
from torch.distributions import MultivariateNormal as TorchMultivariateNormal

from pyro_vae.supports import elements
from pyro_vae.terms import Layout, Terms, layout


def kl(terms: Terms) -> Tensor:
    r"""The KL divergence of the guide from the prior, in closed form.

    .. math:: \mathrm{KL}(q(z|x) \,\|\, p(z))

    In a hierarchy each site's divergence is exact given the draws of the sites before it.

    Args:
        terms: from :func:`pyro_vae.draw`.

    Returns:
        [K, B], nats, >= 0 (where scales are); differentiable. For a single site all K rows are equal.

    Raises:
        ValueError: torch has no formula for a pair of distributions; model and guide draw their sites in different
            order, weight or mask them differently; the guide has a site that the model has not.

    Example:
        >>> from pyro_vae import VAE, Bernoulli, Decoder, DiagonalNormal, Mlp, StandardNormal, draw
        >>> vae = VAE(StandardNormal(2), Decoder(Mlp(2, 8, 7), Bernoulli()), DiagonalNormal(Mlp(7, 8, 4)))
        >>> bool((kl(draw(vae.model, vae.guide, torch.ones(5, 7))) > 0).all())
        True
    """

    def one(latent: Latent) -> Tensor:
        return latent.axes.weighted(_divergence(latent), latent.guide_site)

    return _site_by_site(terms, one)


def kl_per_dimension(terms: Terms) -> Tensor:
    r"""The KL divergence of each latent dimension, in closed form, where guide and prior both factorise.

    .. math:: \mathrm{KL}_d = \mathrm{KL}(q(z_d|x) \,\|\, p(z_d))

    Args:
        terms: from :func:`pyro_vae.draw`.

    Returns:
        [K, B, D], nats, >= 0, the dimensions of all sites side by side; their sum is :func:`kl`.

    Raises:
        ValueError: as :func:`kl`, or a distribution does not factorise over its dimensions.

    Example:
        >>> from pyro_vae import VAE, Bernoulli, Decoder, DiagonalNormal, Mlp, StandardNormal, draw
        >>> vae = VAE(StandardNormal(2), Decoder(Mlp(2, 8, 7), Bernoulli()), DiagonalNormal(Mlp(7, 8, 4)))
        >>> kl_per_dimension(draw(vae.model, vae.guide, torch.ones(5, 7), num_particles=3)).shape
        torch.Size([3, 5, 2])
    """

    def one(latent: Latent) -> Tensor:
        q, p = (factors(fn, latent.name) for fn in (latent.q, latent.p))
        value = _divergence(latent._replace(guide_site={**latent.guide_site, "fn": q}, model_site={"fn": p}))
        event = len(latent.q.event_shape)
        value = latent.axes.weighted(value, latent.guide_site, event)
        return latent.axes.spread(value.flatten(-event) if event else value.unsqueeze(-1))

    passes = [torch.cat([one(latent) for latent in latents(*traces)], -1) for traces in terms.passes]
    return torch.cat(passes)


def entropy(terms: Terms) -> Tensor:
    r"""The entropy of the guide, in closed form.

    .. math:: H[q(z|x)] = \sum_i \mathbb E_{q(z_{<i}|x)} \, H[q(z_i \mid z_{<i}, x)]

    Args:
        terms: from :func:`pyro_vae.draw`.

    Returns:
        [K, B], nats (negative for narrow densities); differentiable.

    Raises:
        ValueError: torch has no formula for the entropy of a site.

    Example:
        >>> from pyro_vae import VAE, Bernoulli, Decoder, DiagonalNormal, Mlp, StandardNormal, draw
        >>> vae = VAE(StandardNormal(2), Decoder(Mlp(2, 8, 7), Bernoulli()), DiagonalNormal(Mlp(7, 8, 4)))
        >>> entropy(draw(vae.model, vae.guide, torch.ones(5, 7))).shape
        torch.Size([1, 5])
    """

    def one(latent: Latent) -> Tensor:
        try:
            value = latent.q.entropy()
        except NotImplementedError:
            raise ValueError(
                f"expected a guide whose entropy has a closed form, found {_name(latent.q)} at site '{latent.name}': "
                "use ELBO, which samples it."
            ) from None
        return latent.axes.weighted(value, latent.guide_site)

    return _site_by_site(terms, one, ordered=False)


def log_ratios(terms: Terms) -> dict[str, Tensor]:
    r"""What each latent site contributes to the sampled KL: its own log q - log p, at the draws.

    .. math:: \log q(z_i \mid z_{<i}, x) - \log p(z_i \mid z_{<i})

    Args:
        terms: from :func:`pyro_vae.draw`.

    Returns:
        A tensor [K, B] for each latent site, by name, in the model's order; nats. Their mean is the KL of the site
        (they can be negative), their sum ``terms.log_qz - terms.log_pz``.

    Raises:
        ValueError: the guide has a site that the model has not.
    """
    found: dict[str, list[Tensor]] = {}
    for traces in terms.passes:
        for latent in latents(*traces, ordered=False):
            q, p = (
                latent.axes.weighted(site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"]), site)
                for site in (latent.guide_site, latent.model_site)
            )
            found.setdefault(latent.name, []).append(latent.axes.total([q, -p], q))
    return {name: torch.cat(parts) for name, parts in found.items()}


class Latent(NamedTuple):
    """A latent site in guide and model, and the axes of the program."""

    name: str
    guide_site: Any
    model_site: Any
    axes: Layout

    @property
    def q(self) -> Any:
        """The guide's distribution."""
        return self.guide_site["fn"]

    @property
    def p(self) -> Any:
        """The model's distribution."""
        return self.model_site["fn"]


def latents(model_trace: Trace, guide_trace: Trace, ordered: bool = True) -> list[Latent]:
    """The latent sites of a pass, in the model's order.

    Args:
        model_trace: a trace of the model, subsample sites pruned.
        guide_trace: a trace of the guide, subsample sites pruned.
        ordered: refuse programs that draw their sites in different order: given what the guide has drawn before, the
            divergence of a site is then not that of the model's conditional.
    """
    guide, model = (
        {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
        for trace in (guide_trace, model_trace)
    )
    extra = [name for name, site in guide.items() if site["is_observed"] or name not in model]
    if extra:
        raise ValueError(
            f"expected the guide's sites to be latent sites of the model, found {extra} in the guide only "
            "(auxiliary, or a factor): use ELBO, which samples every term."
        )
    of_model = [name for name, site in model.items() if not site["is_observed"]]
    if ordered and of_model != list(guide):
        raise ValueError(
            f"expected model and guide to draw their sites in one order, found {of_model} and {list(guide)}: a closed "
            "form is only right given the same earlier draws; write the guide in the model's order, or use ELBO."
        )
    axes = layout(model_trace, guide_trace)
    return [Latent(name, guide[name], model[name], axes) for name in of_model]


def factors(fn: Any, name: str) -> Any:
    """The distribution of the single numbers of a product distribution.

    Args:
        fn: a distribution.
        name: the site it stands at.

    Raises:
        ValueError: its dimensions are not independent.
    """
    fn = elements(fn)
    if len(fn.event_shape):
        raise ValueError(
            f"expected a distribution that factorises over its dimensions, found {_name(fn)} at site '{name}': use a "
            "diagonal one, for example DiagonalNormal and StandardNormal."
        )
    return fn


def _site_by_site(terms: Terms, one: Callable[[Latent], Tensor], ordered: bool = True) -> Tensor:
    passes = []
    for traces in terms.passes:
        found = latents(*traces, ordered=ordered)
        axes = found[0].axes if found else layout(*traces)
        passes.append(axes.total([one(latent) for latent in found], terms.log_qz))
    return torch.cat(passes)


def _divergence(latent: Latent) -> Tensor:
    q, p, site = latent.q, latent.p, latent.model_site
    if "scale" in site and not (_same(latent.guide_site["scale"], site["scale"])):
        raise ValueError(
            f"expected site '{latent.name}' to have one scale in model and guide, found two (poutine.scale on one of "
            "them): the weighted terms are then no multiple of a KL divergence; use ELBO."
        )
    if "mask" in site and not _same(latent.guide_site["mask"], site["mask"]):
        raise ValueError(
            f"expected site '{latent.name}' to have one mask in model and guide, found two: mask both, or use ELBO."
        )
    correlated = isinstance(q, TorchMultivariateNormal | LowRankMultivariateNormal)
    if correlated and isinstance(p, Independent) and isinstance(p.base_dist, Normal) and len(p.event_shape) == 1:
        p = MultivariateNormal(p.base_dist.loc, scale_tril=torch.diag_embed(p.base_dist.scale))
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        raise ValueError(
            f"expected distributions whose KL divergence has a closed form, found {_name(latent.q)} and "
            f"{_name(latent.p)} at site '{latent.name}': use ELBO, which samples it."
        ) from None


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and torch.equal(a, b))
    numbers = isinstance(a, int | float) and isinstance(b, int | float)
    return a is b or (numbers and math.isclose(a, b))


def _name(fn: Any) -> str:
    return type(elements(fn)).__name__
