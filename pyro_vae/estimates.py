r"""Estimates of the ELBO and of log p(x), with their standard error, K and data policy. Nothing is trained.

The spread over examples holds two errors, told apart here:

.. math:: \mathrm{se}^2 = \mathrm{se}_{\text{data}}^2 + \mathrm{se}_{\text{Monte Carlo}}^2

The first shrinks with more examples only, the second with more draws of z for each of them.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor

from pyro_vae import tails
from pyro_vae.contracts import NO_LIKELIHOOD, is_normalised, untouched
from pyro_vae.passes import passes
from pyro_vae.terms import Terms


@dataclass(frozen=True)
class Estimate:
    """A number per example, and what it takes to read it: nats per example.

    Args:
        name: what is estimated.
        values: the estimate of each example, [N].
        num_particles: draws of z behind each of them, K; 0 for an exact value.
        policy: how the data was prepared (binarisation, seed, split).
        errors: the Monte-Carlo standard error of each value, [N]: zeros for exact values, None where unknown (K = 1).
        effective_sample_size: how many equal weights the K weights of each example are worth, [N], or None.
        pareto_k: the shape of the tail of each example's weights, [N], see :func:`pyro_vae.tails.pareto_k`, or None.
        method: how it was estimated, in words, where it is more than K draws from q(z|x).
        units: what the values are counted in.
        caveat: what must not be claimed from it, said wherever it is shown.
    """

    name: str
    values: Tensor
    num_particles: int
    policy: str = ""
    errors: Tensor | None = None
    effective_sample_size: Tensor | None = None
    pareto_k: Tensor | None = None
    method: str = ""
    units: str = "nats"
    caveat: str = ""

    @property
    def mean(self) -> float:
        """The mean over the examples, per example."""
        return self.values.mean().item()

    @property
    def standard_error(self) -> float:
        """The standard error of the mean: the spread over examples, Monte-Carlo error included; nan for one example."""
        if len(self.values) < 2:
            return math.nan
        return (self.values.std() / math.sqrt(len(self.values))).item()

    @property
    def monte_carlo_error(self) -> float:
        """The part of the standard error that more draws of z would remove: were the data fixed, all of it."""
        if self.errors is None:
            return math.nan
        return (self.errors.double().square().sum().sqrt() / len(self.values)).item()

    @property
    def data_error(self) -> float:
        """The part of the standard error that only more examples would lower."""
        return math.sqrt(max(self.standard_error**2 - self.monte_carlo_error**2, 0.0))

    @property
    def num_examples(self) -> int:
        """The number of examples n."""
        return len(self.values)

    @property
    def untrusted(self) -> Tensor | None:
        """For which examples the weights are too heavy-tailed for K draws, [N] boolean; None where it is unknown."""
        if self.pareto_k is None:
            return None
        return ~(self.pareto_k <= tails.largest_pareto_k(self.num_particles))  # nan is not trusted

    @property
    def warning(self) -> str:
        """One line where K is too small to trust the number, else nothing."""
        if self.untrusted is None or not bool(self.untrusted.any()):
            return ""
        return (
            f"K={self.num_particles} is too small for {int(self.untrusted.sum())} of {self.num_examples} examples "
            f"(Pareto k > {tails.largest_pareto_k(self.num_particles):.2f}): there {self.name} is underestimated, and "
            "its error too; raise num_particles or use annealed_log_evidence."
        )

    def bits_per_dim(self, num_dims: int) -> "Estimate":
        r"""The same estimate as the number of bits that a number of x costs; lower is better.

        .. math:: \mathrm{bits} = -\frac{\log p(x)}{E \log 2}

        A code length only where p(x | z) gives probabilities of levels (bytes, counts, bits); of a density it is not.

        Args:
            num_dims: how many numbers E make up one example, such as 3 * 32 * 32.
        """
        if self.units != "nats" or num_dims < 1:
            raise ValueError(f"expected nats and num_dims >= 1, found {self.units} and {num_dims}: convert nats once.")
        scale = 1 / (num_dims * math.log(2))
        errors = None if self.errors is None else self.errors * scale
        return replace(
            self,
            name=f"-{self.name}",
            values=-self.values * scale,
            errors=errors,
            effective_sample_size=None,  # said once, of log p(x) itself
            pareto_k=None,
            units="bits per dimension",
        )

    def summary(self) -> dict[str, Any]:
        """The numbers as plain Python, for JSON; what is unknown is left out, a standard error that is none is None."""
        least = None if self.effective_sample_size is None else self.effective_sample_size.min().item()
        most = None if self.pareto_k is None else self.pareto_k.max().item()
        result = {
            "name": self.name,
            "mean": self.mean,
            "standard_error": self.standard_error,
            "monte_carlo_error": self.monte_carlo_error,
            "data_error": self.data_error,
            "num_particles": self.num_particles,
            "num_examples": self.num_examples,
            "units": self._unit_text,
            "policy": self.policy,
            "method": self.method,
            "smallest_effective_sample_size": least,
            "largest_pareto_k": most,
            "untrusted_examples": None if self.untrusted is None else int(self.untrusted.sum()),
            "warning": self.warning,
            "caveat": self.caveat,
        }
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in result.items()}
        return {k: v for k, v in finite.items() if v not in (None, "") or k in ("mean", "standard_error", "policy")}

    @property
    def _unit_text(self) -> str:
        return f"{self.units} per example" if self.units == "nats" else self.units

    def __str__(self) -> str:
        return f"{self._text}; {self.caveat}" if self.caveat else self._text

    @property
    def _text(self) -> str:
        how = self.method or ("exact" if self.num_particles == 0 else f"K={self.num_particles}")
        error = self.standard_error
        if math.isnan(error) and not math.isnan(self.monte_carlo_error):
            number = with_error(self.mean, self.monte_carlo_error)
            return f"{number} {self.units} ({how}, one example: Monte-Carlo error only)"
        if math.isnan(error):
            return f"{self.mean:.2f} {self.units} ({how}, one example: no standard error)"
        text = f"{with_error(self.mean, error)} {self._unit_text} ({how}, n={self.num_examples})"
        return f"{text}; K too small for {int(self.untrusted.sum())} of them" if self.warning else text  # type: ignore[union-attr]


@dataclass(frozen=True)
class Difference:
    """How much higher one estimate is than another on the same examples: the spread that they share cancels.

    Args:
        name: what is compared.
        values: the difference of each example, [N].
        units: what the values are counted in.
    """

    name: str
    values: Tensor
    units: str = "nats"

    @property
    def mean(self) -> float:
        """The mean difference, per example."""
        return self.values.mean().item()

    @property
    def standard_error(self) -> float:
        """The standard error of the mean difference, from the spread of the differences; nan for one example."""
        return (self.values.std() / math.sqrt(len(self.values))).item() if len(self.values) > 1 else math.nan

    def __str__(self) -> str:
        return f"{with_error(self.mean, self.standard_error)} {self.units} (paired, n={len(self.values)})"


def paired_difference(a: Estimate, b: Estimate) -> Difference:
    r"""How much higher a is than b, example by example, with the standard error of the mean difference.

    .. math:: \bar d = \frac 1 N \sum_n (a_n - b_n), \qquad \mathrm{se} = \mathrm{sd}(a_n - b_n) / \sqrt N

    Args:
        a: an estimate.
        b: another of the same examples, of one model or of two.

    Returns:
        The difference a - b.

    Raises:
        ValueError: the two were made of differently prepared data, of other numbers of examples, or in other units; or
            both are importance-weighted bounds of different K, whose difference would be one of K. (An exact value,
            or an ELBO, against such a bound is how loose the bound is.)

    Example:
        >>> a = Estimate("log p(x)", torch.tensor([-80.0, -90.0]), 100, "static")
        >>> b = Estimate("log p(x)", torch.tensor([-81.0, -93.0]), 100, "static")
        >>> print(paired_difference(a, b))
        2.0 ± 1.0 nats (paired, n=2)
    """
    pairs = {
        "data policies": (a.policy, b.policy),
        "numbers of examples": (a.num_examples, b.num_examples),
        "units": (a.units, b.units),
    }
    for what, (of_a, of_b) in pairs.items():
        if of_a != of_b:
            raise ValueError(
                f"expected equal {what}, found {of_a!r} and {of_b!r}: numbers about different data cannot be compared; "
                "evaluate both on one data set."
            )
    if a.name == b.name and _rises_with_draws(a) and _rises_with_draws(b) and a.num_particles != b.num_particles:
        raise ValueError(
            f"expected equal num_particles, found {a.num_particles} and {b.num_particles}: {a.name} is a bound that "
            "rises with K, so the difference would be one of K; evaluate both with one K (what K gains is "
            "a.values - b.values)."
        )
    name = a.name if a.name == b.name else f"{a.name} against {b.name}"
    return Difference(name, a.values.to(b.values) - b.values, a.units)


def _rises_with_draws(estimate: Estimate) -> bool:
    """Whether it is :func:`log_evidence` of K draws; an ELBO has one mean for all K, annealing says its method."""
    return estimate.num_particles > 0 and not estimate.method and "log p(x)" in estimate.name


def with_error(mean: float, error: float) -> str:
    """A number to two digits of its standard error: "-84.83 ± 0.31"."""
    decimals = 2 if not error > 0 else min(max(1 - math.floor(math.log10(error)), 0), 6)
    return f"{mean:.{decimals}f} ± {error:.{decimals}f}"


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
    weights = _Weights(num_particles)
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
    means, weights = _Means(), _Weights(num_particles)
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
        if _has_point_mass(terms):
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


class _Weights:
    """The mean importance weight of each example and how far to trust it, once all of its K weights are there."""

    def __init__(self, num_particles: int) -> None:
        self.num_particles = num_particles
        self.parts: list[Tensor] = []  # of the weights of some examples
        self.found: Tensor | None = None

    def add(self, rows: slice, terms: Terms, x: Tensor) -> None:
        """One pass over some rows of x."""
        if _has_point_mass(terms):
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


def _has_point_mass(terms: Terms) -> bool:
    """Whether the guide puts a latent variable on one point: its log q is 0 by convention, not a density."""
    for site in terms.guide_trace.nodes.values():
        fn: Any = site.get("fn")
        while isinstance(fn, torch.distributions.Independent):
            fn = fn.base_dist
        if site["type"] == "sample" and not site["is_observed"] and isinstance(fn, Delta):
            return True
    return False
