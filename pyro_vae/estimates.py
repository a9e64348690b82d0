"""Estimates of the ELBO and of log p(x), with their standard error, K and data policy. Nothing is trained."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor

from pyro_vae.contracts import check_vae, untouched
from pyro_vae.terms import Terms, check_num_particles, draw


@dataclass(frozen=True)
class Estimate:
    """A number per example, and what it takes to read it: nats per example.

    Args:
        name: what is estimated.
        values: the estimate of each example, [N], nats.
        num_particles: draws of z behind each of them, K.
        policy: how the data was prepared (binarisation, seed, split).
    """

    name: str
    values: Tensor
    num_particles: int
    policy: str = ""

    @property
    def mean(self) -> float:
        """The mean over the examples, nats per example."""
        return self.values.mean().item()

    @property
    def standard_error(self) -> float:
        """The standard error of the mean: the spread over examples, Monte-Carlo error included; nan for one example."""
        if len(self.values) < 2:
            return math.nan
        return (self.values.std() / math.sqrt(len(self.values))).item()

    @property
    def num_examples(self) -> int:
        """The number of examples n."""
        return len(self.values)

    def summary(self) -> dict[str, Any]:
        """The numbers as plain Python, for JSON."""
        return {
            "name": self.name,
            "mean": self.mean,
            "standard_error": self.standard_error,
            "num_particles": self.num_particles,
            "num_examples": self.num_examples,
            "units": "nats per example",
            "policy": self.policy,
        }

    def __str__(self) -> str:
        error = self.standard_error
        if math.isnan(error):
            return f"{self.mean:.2f} nats (K={self.num_particles}, one example: no standard error)"
        number = with_error(self.mean, error)
        return f"{number} nats per example (K={self.num_particles}, n={self.num_examples})"


def with_error(mean: float, error: float) -> str:
    """A number to two digits of its standard error: "-84.83 ± 0.31"."""
    decimals = 2 if not error > 0 else min(max(1 - math.floor(math.log10(error)), 0), 6)
    return f"{mean:.{decimals}f} ± {error:.{decimals}f}"


def elbo_terms(
    vae: Any, x: Tensor, num_particles: int = 1, *, seed: int = 0, policy: str = "", max_elements: int = 2**22
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
        max_elements: numbers of x handled in one pass, K included; memory is some 20 times their bytes.

    Returns:
        Estimates named "elbo", "log_px" and "kl", nats per example. With a point-mass guide (Delta) these are
        no ELBO and no KL, and their ``name`` says so.

    Raises:
        ValueError: num_particles < 1 or no example.

    Example:
        >>> from pyro_vae import VAE, Bernoulli, Decoder, DiagonalNormal, Mlp, StandardNormal
        >>> vae = VAE(StandardNormal(2), Decoder(Mlp(2, 8, 7), Bernoulli()), DiagonalNormal(Mlp(7, 8, 4)))
        >>> terms = elbo_terms(vae, torch.ones(5, 7), num_particles=3)
        >>> bool(torch.isclose(terms["elbo"].values, terms["log_px"].values - terms["kl"].values).all())
        True
    """
    log_px, kl = torch.zeros(2, len(x), dtype=torch.float64, device=x.device)
    names = ("ELBO", "E log p(x|z)", "KL(q(z|x), p(z))")
    with untouched(vae, seed):
        for rows, terms in _passes(vae, x, num_particles, max_elements):
            if _has_point_mass(terms):
                names = (
                    "log p(x, z) at the code (no bound)",
                    "log p(x|z) at the code",
                    "-log p(z) at the code",
                )
            log_px[rows] += terms.log_px.sum(0, dtype=torch.float64) / num_particles
            kl[rows] += (terms.log_qz - terms.log_pz).sum(0, dtype=torch.float64) / num_particles
    return {
        "elbo": Estimate(names[0], log_px - kl, num_particles, policy),
        "log_px": Estimate(names[1], log_px, num_particles, policy),
        "kl": Estimate(names[2], kl, num_particles, policy),
    }


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
    max_elements: int = 2**22,
) -> Estimate:
    r"""The log-evidence log p(x) by importance sampling from q(z|x).

    .. math:: \log \hat p_K(x) = \log \frac 1 K \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k|x)}, \qquad z_k \sim q(z|x)

    On average a lower bound on log p(x) (the IWAE bound) that rises to it with K; never compare numbers of different K.

    Args:
        vae: a model with ``model`` and ``guide``.
        x: data, [N, *E].
        num_particles: number K of draws of z for each example; honoured exactly.
        seed: seed of the draws; the random state outside is untouched.
        policy: the data policy to carry.
        max_elements: numbers of x handled in one pass, K included; memory is some 20 times their bytes.

    Returns:
        An estimate, nats per example, higher is better.

    Raises:
        ValueError: num_particles < 1, no example, or the guide is a point mass.

    Source: Burda, Grosse, Salakhutdinov (2016), section 5 (L_5000), arXiv:1509.00519.

    Example:
        >>> from pyro_vae import VAE, Bernoulli, Decoder, DiagonalNormal, Mlp, StandardNormal
        >>> vae = VAE(StandardNormal(2), Decoder(Mlp(2, 8, 7), Bernoulli()), DiagonalNormal(Mlp(7, 8, 4)))
        >>> print(log_evidence(vae, torch.ones(5, 7), num_particles=100))
        -... ± ... nats per example (K=100, n=5)
    """
    log_sum = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
    with untouched(vae, seed):
        for rows, terms in _passes(vae, x, num_particles, max_elements):
            if _has_point_mass(terms):
                raise ValueError(
                    "expected a guide with a density, found a point mass (Delta): log p(x) cannot be estimated; "
                    "use another posterior, for example DiagonalNormal."
                )
            log_sum[rows] = torch.logaddexp(log_sum[rows], terms.log_w.double().logsumexp(0))
    return Estimate("log p(x)", log_sum - math.log(num_particles), num_particles, policy)


def _passes(vae: Any, x: Tensor, num_particles: int, max_elements: int) -> Iterator[tuple[slice, Terms]]:
    """Cut N examples by K particles into passes of bounded memory; every particle of every example comes once."""
    if isinstance(x, Tensor) and x.dim() and len(x) == 0:
        raise ValueError("expected at least one example, found none: x has length 0.")
    if all(hasattr(vae, part) for part in ("prior", "decoder", "encoder")):
        check_vae(vae, x[:2] if isinstance(x, Tensor) and x.dim() else x)
    check_num_particles(num_particles)
    rows_at_once = max(1, max_elements // max(1, x[0].numel()))
    batch = min(len(x), rows_at_once, max(64, rows_at_once // num_particles))
    particles = max(1, min(num_particles, rows_at_once // batch))
    for start in range(0, len(x), batch):
        rows = slice(start, min(start + batch, len(x)))
        for done in range(0, num_particles, particles):
            count = min(particles, num_particles - done)
            terms = draw(vae.model, vae.guide, x[rows], num_particles=count)
            if terms.log_px.shape != (count, rows.stop - rows.start):
                raise ValueError(
                    f"expected terms of shape {(count, rows.stop - rows.start)} (particles, examples), found "
                    f"{tuple(terms.log_px.shape)}: put all sites of model and guide in one plate over the examples."
                )
            yield rows, terms


def _has_point_mass(terms: Terms) -> bool:
    """Whether the guide puts a latent variable on one point: its log q is 0 by convention, not a density."""
    for site in terms.guide_trace.nodes.values():
        fn: Any = site.get("fn")
        while isinstance(fn, torch.distributions.Independent):
            fn = fn.base_dist
        if site["type"] == "sample" and not site["is_observed"] and isinstance(fn, Delta):
            return True
    return False
