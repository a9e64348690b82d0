r"""Tighter bounds from several draws: log w, [K, B], combined otherwise than by its mean. IWAE is in ``objectives``.

At the same draws: ELBO <= CIWAE, TVO, Rényi (0 <= alpha <= 1) <= IWAE of all draws; MIWAE lies between as well.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from pyro_vae.objectives import Objective
from pyro_vae.terms import Terms, check_num_particles


def log_mean_exp(log_w: Tensor, power: float = 1.0) -> Tensor:
    r"""The power mean of weights, as a logarithm: log-weights [K, ...] -> [...].

    .. math:: \frac 1 s \log \frac 1 K \sum_k w_k^s, \qquad \text{in the limit } s \to 0: \ \frac 1 K \sum_k \log w_k

    Exact near s = 0 as well, where the formula as it stands would divide rounding errors by s.

    Args:
        log_w: log-weights, [K, ...].
        power: s.

    Returns:
        [...], non-decreasing in s.
    """
    mean = log_w.mean(0)
    if abs(power) < 1e-3:
        spread = power * (log_w - mean)
        return mean + (spread.expm1().mean(0).log1p() / power if power else 0.0)
    return ((power * log_w).logsumexp(0) - math.log(len(log_w))) / power


@dataclass(frozen=True)
class MIWAE(Objective):
    r"""The mean of M importance-weighted bounds of K draws each.

    .. math:: \mathrm{MIWAE}_{M,K}(x) = \frac 1 M \sum_{m=1}^M \log \frac 1 K \sum_k w_{mk} \le \log p(x)

    As tight as IWAE with K; M lowers the variance. For a given number M K of draws, larger K trains the model better
    and the encoder worse.

    Args:
        num_particles: number K of draws in each bound.
        num_outer: number M of bounds; M K draws are made for each example.
        vectorize_particles: draw them in one pass; else in a loop.
        max_plate_nesting: the largest number of nested plates in model and guide.

    Returns:
        ``bound``: [B], nats per example, higher is better.

    Raises:
        ValueError: num_particles or num_outer < 1, or a guide site has no reparameterised sampler.

    Source: Rainforth et al. (2018), Tighter variational bounds are not necessarily better, arXiv:1802.04537.

    Example:
        >>> MIWAE(num_particles=8, num_outer=8)
        MIWAE(num_particles=8, num_outer=8)
    """

    num_particles: int = 8
    num_outer: int = 8

    formula = r"\frac{1}{M} \sum_m \mathbb{E}_{z_{1:K} \sim q(z|x)} \log \frac{1}{K} \sum_k \frac{p(x, z_k)}{q(z_k|x)}"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_num_particles(self.num_outer, "num_outer")

    @property
    def num_draws(self) -> int:
        """M K."""
        return self.num_outer * self.num_particles

    def combine(self, terms: Terms) -> Tensor:
        """The mean over M of the logarithm of the mean weight over K."""
        return log_mean_exp(terms.log_w.unflatten(0, (self.num_outer, -1)).transpose(0, 1)).mean(0)


@dataclass(frozen=True)
class CIWAE(Objective):
    r"""A weighted mean of the ELBO and the importance-weighted bound.

    .. math:: \beta \, \mathrm{ELBO}(x) + (1 - \beta) \, \mathrm{IWAE}_K(x) \le \log p(x)

    Args:
        beta: weight of the ELBO, in [0, 1].
        num_particles: number K of draws of z for each example.
        vectorize_particles: draw them in one pass; else in a loop.
        max_plate_nesting: the largest number of nested plates in model and guide.

    Returns:
        ``bound``: [B], nats per example, higher is better.

    Raises:
        ValueError: beta outside [0, 1], num_particles < 1, or a guide site has no reparameterised sampler.

    Source: Rainforth et al. (2018), Tighter variational bounds are not necessarily better, arXiv:1802.04537.

    Example:
        >>> CIWAE(num_particles=64, beta=0.05)
        CIWAE(num_particles=64, beta=0.05)
    """

    num_particles: int = 50
    beta: float = 0.5

    formula = (
        r"\beta \mathbb{E}_{q(z|x)} \log w + (1 - \beta) \mathbb{E}_{z_{1:K} \sim q(z|x)} \log \frac{1}{K} \sum_k w_k"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise ValueError(f"expected beta in [0, 1], found {self.beta}: it weights the ELBO against the IWAE bound.")

    def combine(self, terms: Terms) -> Tensor:
        """The weighted mean of the two bounds."""
        return self.beta * terms.log_w.mean(0) + (1 - self.beta) * log_mean_exp(terms.log_w)


@dataclass(frozen=True)
class Renyi(Objective):
    r"""The variational Rényi bound.

    .. math:: \mathcal L_\alpha(x) = \frac{1}{1 - \alpha} \log \frac 1 K \sum_k
        \left(\frac{p(x, z_k)}{q(z_k|x)}\right)^{1 - \alpha}

    alpha = 0 is the IWAE bound, alpha = 1 (the limit, taken exactly) the ELBO; it falls with alpha. For alpha >= 0 it
    is a lower bound on log p(x) with any K; for alpha < 0 it need not be one.

    Args:
        alpha: the order.
        num_particles: number K of draws of z for each example.
        vectorize_particles: draw them in one pass; else in a loop.
        max_plate_nesting: the largest number of nested plates in model and guide.

    Returns:
        ``bound``: [B], nats per example, higher is better.

    Raises:
        ValueError: alpha not finite, num_particles < 1, or a guide site has no reparameterised sampler.

    Source: Li, Turner (2016), Rényi divergence variational inference, arXiv:1602.02311.

    Example:
        >>> Renyi(num_particles=50, alpha=0.5)
        Renyi(num_particles=50, alpha=0.5)
    """

    num_particles: int = 50
    alpha: float = 0.5

    formula = (
        r"\frac{1}{1-\alpha} \mathbb{E} \log \frac{1}{K} \sum_k \left(\frac{p(x, z_k)}{q(z_k|x)}\right)^{1-\alpha}"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.alpha):
            raise ValueError(f"expected a finite alpha, found {self.alpha}.")

    @property
    def is_bound(self) -> bool:
        """For alpha >= 0."""
        return self.alpha >= 0

    def combine(self, terms: Terms) -> Tensor:
        """The power mean of the weights with exponent 1 - alpha."""
        return log_mean_exp(terms.log_w, 1 - self.alpha)


@dataclass(frozen=True)
class ThermodynamicVariational(Objective):
    r"""The thermodynamic variational objective: a left Riemann sum from q(z|x) to p(x, z).

    .. math:: \log p(x) = \int_0^1 \mathbb E_{\pi_\beta} \log \frac{p(x, z)}{q(z|x)} \, d\beta
        \ge \sum_{j} (\beta_{j+1} - \beta_j) \, \mathbb E_{\pi_{\beta_j}} \log \frac{p(x, z)}{q(z|x)}, \qquad
        \pi_\beta \propto q^{1 - \beta} p^\beta

    The points are 0 and ``num_points - 1`` more, evenly spaced on a logarithmic scale from ``first`` to below 1; one
    point is the ELBO. Each expectation is over the same K draws with weights w^beta. Since these are derivatives of
    log (1/K sum w^beta), the sum lies between the ELBO and the IWAE bound of the same draws, and tends to the latter
    with finer points: a lower bound at any K. Gradients flow through the draws (the paper's need none).

    Args:
        num_particles: number K of draws of z for each example.
        num_points: how many points beta_j.
        first: the first point above 0.
        vectorize_particles: draw them in one pass; else in a loop.
        max_plate_nesting: the largest number of nested plates in model and guide.

    Returns:
        ``bound``: [B], nats per example, higher is better.

    Raises:
        ValueError: num_particles or num_points < 1, first outside (0, 1), or a guide site has no reparameterised
            sampler.

    Source: Masrani, Le, Wood (2019), The thermodynamic variational objective, arXiv:1907.00031.

    Example:
        >>> ThermodynamicVariational(num_particles=50)
        ThermodynamicVariational(num_particles=50, num_points=5, first=0.025)
    """

    num_particles: int = 50
    num_points: int = 5
    first: float = 0.025

    formula = (
        r"\sum_j (\beta_{j+1} - \beta_j) \mathbb{E}_{\pi_{\beta_j}} \log w, \quad \pi_\beta \propto q(z|x)^{1-\beta} "
        r"p(x, z)^\beta"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_num_particles(self.num_points, "num_points")
        if not 0 < self.first < 1:
            raise ValueError(f"expected first in (0, 1), found {self.first}: it is the first point above 0.")

    @property
    def points(self) -> tuple[float, ...]:
        """The points beta_j, from 0 to below 1."""
        count = self.num_points - 1
        return (0.0, *(self.first ** (1 - j / count) for j in range(count)))

    def combine(self, terms: Terms) -> Tensor:
        """The Riemann sum of the weighted means of log w."""
        beta = terms.log_w.new_tensor([*self.points, 1.0]).reshape(-1, *[1] * terms.log_w.dim())
        weights = (beta[:-1] * terms.log_w).softmax(1)
        return (beta.diff(dim=0) * weights * terms.log_w).sum((0, 1))
