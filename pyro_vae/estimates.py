"""Estimates of the ELBO and of log p(x), with their standard error, K and data policy. Nothing is trained."""

import math
from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor

from pyro_vae import tails
from pyro_vae.contracts import untouched
from pyro_vae.passes import passes
from pyro_vae.supports import NO_LIKELIHOOD, elements, is_normalised
from pyro_vae.terms import Terms
from pyro_vae.uncertainty import Estimate


def elbo_terms(
    vae: Any,
    x: Tensor,
    num_particles: int = 1,
    *,
    seed: int = 0,
    policy: str = "",
    max_elements: int | None = None,
    compiled: bool | None = None,
) -> dict[str, Estimate]:
    r"""The ELBO and its two terms, from the same draws.

    .. math:: \mathrm{ELBO}(x) = \mathbb E_q \log p(x \mid z) - \mathrm{KL}(q(z|x) \,\|\, p(z))

    The KL is the sampled one, E_q [log q(z|x) - log p(z)].

    Args:
        vae: a model with ``model`` and ``guide``.
        x: data, [N, *E].
        num_particles: number K of draws of z for each example.
        seed: seed of the draws; the random state outside is untouched.
        policy: the data policy to carry.
        max_elements: numbers of x handled in one pass, K included; memory is some 20 times their bytes. None: what
            suits the device.
        compiled: see :func:`log_evidence`.

    Returns:
        Estimates named "elbo", "log_px" and "kl", nats per example. With a point-mass guide (Delta), or a score in the
        place of p(x|z), these are no ELBO, and their ``name`` and ``caveat`` say so.

    Raises:
        ValueError: num_particles < 1 or no example.

    Example:
        >>> from pyro_vae import VAE, Bernoulli, Decoder, DiagonalNormal, Mlp, StandardNormal
        >>> vae = VAE(StandardNormal(2), Decoder(Mlp(2, 8, 7), Bernoulli()), DiagonalNormal(Mlp(7, 8, 4)))
        >>> terms = elbo_terms(vae, torch.ones(5, 7), num_particles=3)
        >>> bool(torch.isclose(terms["elbo"].values, terms["log_px"].values - terms["kl"].values).all())
        True
    """
    means = _Means()
    with untouched(vae, seed):
        for rows, terms in passes(vae, x, num_particles, max_elements, compiled):
            means.add(rows, terms, x)
    return means.estimates(num_particles, policy)


def elbo(vae: Any, x: Tensor, num_particles: int = 1, **settings: Any) -> Estimate:
    """The evidence lower bound of each example; see :func:`elbo_terms` for the arguments.

    Returns:
        An estimate, nats per example, higher is better.
    """
    return elbo_terms(vae, x, num_particles, **settings)["elbo"]


def log_evidence(
    vae: Any,
    x: Tensor,
    num_particles: int = 5000,
    *,
    seed: int = 0,
    policy: str = "",
    max_elements: int | None = None,
    compiled: bool | None = None,
) -> Estimate:
    r"""The log-evidence log p(x) by importance sampling from q(z|x).

    .. math:: \log \hat p_K(x) = \log \frac 1 K \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k|x)}, \qquad z_k \sim q(z|x)

    On average a lower bound on log p(x) (the IWAE bound) that rises to it with K; never compare numbers of different K.
    The estimate carries a standard error, an effective sample size and a Pareto k for each example; where the last is
    too large for K, its ``warning`` says so. The encoder of a :class:`VAE` runs once for each example.

    Args:
        vae: a model with ``model`` and ``guide``.
        x: data, [N, *E].
        num_particles: number K of draws of z for each example; honoured exactly.
        seed: seed of the draws; the random state outside is untouched.
        policy: the data policy to carry.
        max_elements: numbers of x handled in one pass, K included; memory is some 20 times their bytes, whatever N
            and K, unless the decoder's layers are far wider than x. None: what suits the device, 2^20 on a processor.
        compiled: record a pass and compile it (:mod:`pyro_vae.passes`): the same draws and, up to rounding, numbers.
            None: for long runs; True: always; False: never. What cannot be recorded runs as it is, and a warning says
            why.

    Returns:
        An estimate, nats per example, higher is better.

    Raises:
        ValueError: num_particles < 1, no example, the guide is a point mass, or p(x|z) is a score, no likelihood.

    Source: Burda, Grosse, Salakhutdinov (2016), section 5 (L_5000), arXiv:1509.00519.

    Example:
        >>> from pyro_vae import VAE, Bernoulli, Decoder, DiagonalNormal, Mlp, StandardNormal
        >>> vae = VAE(StandardNormal(2), Decoder(Mlp(2, 8, 7), Bernoulli()), DiagonalNormal(Mlp(7, 8, 4)))
        >>> print(log_evidence(vae, torch.ones(5, 7), num_particles=100))
        -... ± ... nats per example (K=100, n=5)...
    """
    weights = MeanWeights(num_particles)
    with untouched(vae, seed):
        for rows, terms in passes(vae, x, num_particles, max_elements, compiled):
            weights.add(rows, terms, x)
    return weights.estimate(policy)


def elbo_and_log_evidence(
    vae: Any,
    x: Tensor,
    num_particles: int = 5000,
    *,
    seed: int = 0,
    policy: str = "",
    max_elements: int | None = None,
    compiled: bool | None = None,
) -> dict[str, Estimate]:
    """What :func:`elbo_terms` and :func:`log_evidence` give at one seed, from the same draws and so at half the cost.

    Args:
        vae: a model with ``model`` and ``guide``.
        x: data, [N, *E].
        num_particles: number K of draws of z for each example.
        seed: seed of the draws; the random state outside is untouched.
        policy: the data policy to carry.
        max_elements: see :func:`log_evidence`.
        compiled: see :func:`log_evidence`.

    Returns:
        Estimates named "elbo", "log_px", "kl" and "log_evidence", nats per example.

    Raises:
        ValueError: as :func:`log_evidence` does.

    Example:
        >>> from pyro_vae import VAE, Bernoulli, Decoder, DiagonalNormal, Mlp, StandardNormal
        >>> vae = VAE(StandardNormal(2), Decoder(Mlp(2, 8, 7), Bernoulli()), DiagonalNormal(Mlp(7, 8, 4)))
        >>> found = elbo_and_log_evidence(vae, torch.ones(5, 7), num_particles=100)
        >>> bool((found["log_evidence"].values >= found["elbo"].values).all())
        True
    """
    means, weights = _Means(), MeanWeights(num_particles)
    with untouched(vae, seed):
        for rows, terms in passes(vae, x, num_particles, max_elements, compiled):
            weights.add(rows, terms, x)  # first: it may refuse
            means.add(rows, terms, x)
    return means.estimates(num_particles, policy) | {"log_evidence": weights.estimate(policy)}


class _Means:
    """The means of the terms over the draws and their errors, gathered pass by pass."""

    def __init__(self) -> None:
        self.names, self.caveat = ("ELBO", "E log p(x|z)", "KL(q(z|x), p(z))"), ""
        self.sums = torch.zeros(0)

    def add(self, rows: slice, terms: Terms, x: Tensor) -> None:
        """One pass over some rows of x."""
        if has_point_mass(terms):
            self.names = (
                "log p(x, z) at the code (no bound)",
                "log p(x|z) at the code",
                "-log p(z) at the code",
            )
        if _has_score(terms):
            self.names = ("score - KL (no bound)", "score in place of log p(x|z)", self.names[2])
            self.caveat = NO_LIKELIHOOD
        values = torch.stack([terms.log_w, terms.log_px, terms.log_qz - terms.log_pz]).double()
        if not len(self.sums):
            self.sums = torch.zeros(2, 3, len(x), dtype=torch.float64, device=x.device)  # of values and their squares
        self.sums[:, :, rows] += torch.stack([values.sum(1), values.square().sum(1)])

    def estimates(self, num_particles: int, policy: str) -> dict[str, Estimate]:
        """By key."""
        means, squares = self.sums / num_particles
        errors: list[Tensor | None] = [None] * 3
        if num_particles > 1:
            errors = list(((squares - means.square()).clamp(min=0) / (num_particles - 1)).sqrt())
        return {
            key: Estimate(name, mean, num_particles, policy, error, caveat=self.caveat if key != "kl" else "")
            for key, name, mean, error in zip(("elbo", "log_px", "kl"), self.names, means, errors, strict=True)
        }


class MeanWeights:
    """The mean importance weight of each example and how far to trust it, once all of its K weights are there."""

    def __init__(self, num_particles: int) -> None:
        self.num_particles = num_particles
        self.parts: list[Tensor] = []  # of the weights of some examples
        self.found: Tensor | None = None

    def add(self, rows: slice, terms: Terms, x: Tensor) -> None:
        """One pass over some rows of x."""
        if has_point_mass(terms):
            raise ValueError(
                "expected a guide with a density, found a point mass (Delta): log p(x) cannot be estimated; "
                "use another posterior, for example DiagonalNormal."
            )
        if _has_score(terms):
            raise ValueError(
                f"expected a likelihood, found a score in the place of p(x | z) ({NO_LIKELIHOOD}): "
                "use elbo_terms for its value, or a likelihood for log p(x)."
            )
        if self.found is None:
            self.found = torch.full((4, len(x)), math.nan, dtype=torch.float64, device=x.device)
        values, errors, sizes, shapes = self.found
        self.parts.append(terms.log_w.double())
        if sum(map(len, self.parts)) == self.num_particles:
            log_w = torch.cat(self.parts)
            self.parts.clear()
            values[rows] = log_w.logsumexp(0) - math.log(self.num_particles)
            sizes[rows] = tails.effective_sample_size(log_w)
            if self.num_particles > 1:
                errors[rows] = tails.standard_error_of_log_mean(log_w)
            if self.num_particles >= tails.FEWEST_DRAWS:
                shapes[rows] = tails.pareto_k(log_w)

    def estimate(self, policy: str) -> Estimate:
        """Of all examples."""
        assert self.found is not None
        values, errors, sizes, shapes = self.found
        return Estimate(
            "log p(x)",
            values,
            self.num_particles,
            policy,
            errors if self.num_particles > 1 else None,
            sizes,
            shapes if self.num_particles >= tails.FEWEST_DRAWS else None,
        )


def log_weights(
    vae: Any, x: Tensor, num_particles: int = 5000, *, seed: int = 0, max_elements: int | None = None
) -> Tensor:
    """The log-weights behind :func:`log_evidence`, for a picture of them: log p(x, z) - log q(z|x).

    Args:
        vae: a model with ``model`` and ``guide``.
        x: a few examples, [B, *E]: all K B weights are kept.
        num_particles: number K of draws of z for each example.
        seed: seed of the draws; the random state outside is untouched.
        max_elements: numbers of x handled in one pass, K included; None: what suits the device.

    Returns:
        [K, B], nats.
    """
    with untouched(vae, seed):
        columns: dict[int, list[Tensor]] = {}
        for rows, terms in passes(vae, x, num_particles, max_elements):
            columns.setdefault(rows.start, []).append(terms.log_w.double())
        return torch.cat([torch.cat(parts) for parts in columns.values()], dim=1)


def _has_score(terms: Terms) -> bool:
    """Whether an observed site is scored by something that is no distribution."""
    sites = terms.model_trace.nodes.values()
    return any(s["type"] == "sample" and s["is_observed"] and not is_normalised(s["fn"]) for s in sites)


def has_point_mass(terms: Terms) -> bool:
    """Whether the guide puts a latent variable on one point: its log q is 0 by convention, not a density."""
    for site in terms.guide_trace.nodes.values():
        if site["type"] == "sample" and not site["is_observed"] and isinstance(elements(site["fn"]), Delta):
            return True
    return False
