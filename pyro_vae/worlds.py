r"""Worlds where log p(x) and p(z | x) are known exactly, so that each line of the derivation can be evaluated.

A :class:`World` holds the quantities that the derivation speaks of, for B examples at K points z. Here are the exact
ones: a z with ten states (tables) and the linear-Gaussian model (closed forms); see :mod:`pyro_vae.trained_worlds` for
a VAE of yours.
"""

from dataclasses import dataclass
from typing import Any

import torch
from numpy.polynomial import hermite_e
from torch import Tensor
from torch.distributions import (
    Categorical,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

from pyro_vae.exact import LinearGaussian


@dataclass(frozen=True)
class World:
    """What the derivation of the ELBO speaks of, for B examples at K points z; nats. None: not known, or not there.

    Args:
        name: what the world is.
        log_px: log p(x | z), [K, B].
        log_pz: log p(z), [K, B].
        log_qz: log q(z | x), [K, B].
        weight: weights of the points under q, [K, B], with which expectations are exact; None: the points are draws.
        log_posterior: log p(z | x) at the points, [K, B], not taken from Bayes' rule with the terms above.
        log_evidence: log p(x), [B].
        log_integral: the logarithm of the integral of p(x | z) p(z) by another route, [B], or [K', B] whose mean it is.
        evidence_bound: where log p(x) is not known, draws of a lower bound on it, [K', B].
        kl_to_posterior: KL(q(z|x) || p(z|x)), [B], neither from draws nor from the ELBO.
        kl_integral: the same by integrating q log(q / p(z|x)) over z, [B].
        kl_to_prior: KL(q(z|x) || p(z)) in closed form, [B].
        z: the points, [K, B, D].
        normal: mean [B, D] and Cholesky factor [B, D, D] of a normal q.
        standard: the same, where the prior is the standard normal too.
        diagonal: mean [B, D] and standard deviation [B, D], where the prior is the standard normal and q is diagonal.
        random_gaps: log p(x) - ELBO of a thousand random q, smallest over the examples, [1000].
        gap_at_posterior: log p(x) - ELBO of q = p(z | x), [B].
        tolerance: how far two sides may be apart by rounding, nats.
        quadrature_error: how far they may be apart where log p(x) or the posterior enter, nats.
        note: how the quantities were found.
    """

    name: str
    log_px: Tensor
    log_pz: Tensor
    log_qz: Tensor
    weight: Tensor | None = None
    log_posterior: Tensor | None = None
    log_evidence: Tensor | None = None
    log_integral: Tensor | None = None
    evidence_bound: Tensor | None = None
    kl_to_posterior: Tensor | None = None
    kl_integral: Tensor | None = None
    kl_to_prior: Tensor | None = None
    z: Tensor | None = None
    normal: tuple[Tensor, Tensor] | None = None
    standard: tuple[Tensor, Tensor] | None = None
    diagonal: tuple[Tensor, Tensor] | None = None
    random_gaps: Tensor | None = None
    gap_at_posterior: Tensor | None = None
    tolerance: float = 1e-9
    quadrature_error: float = 0.0
    note: str = ""

    @property
    def num_particles(self) -> int:
        """The number K of points."""
        return self.log_px.shape[0]

    @property
    def num_examples(self) -> int:
        """The number B of examples."""
        return self.log_px.shape[1]

    @property
    def highest_evidence(self) -> Tensor | None:
        """The log-evidence, or the lower bound on it where it is not known."""
        return self.evidence_bound if self.log_evidence is None else self.log_evidence

    @property
    def kl_or_draws(self) -> Tensor:
        """KL(q(z|x) || p(z)) in closed form [B]; where there is none, what it is the mean of, [K, B]."""
        return self.log_qz - self.log_pz if self.kl_to_prior is None else self.kl_to_prior


def finite(num_states: int = 10, num_examples: int = 7, seed: int = 0) -> World:
    """A world of tables: z has a few states, p(x, z) and q(z | x) are random, and every sum is exact.

    Prior, likelihood, evidence and posterior are read off the one table of p(x, z) by adding and dividing, in
    probabilities; what is derived from them in logarithms has to agree.

    Args:
        num_states: number of states of z.
        num_examples: number of values of x.
        seed: seed of the tables; the random state outside is untouched.

    Returns:
        A world whose examples are all the values of x; ``log_posterior`` and all the rest are exact.

    Example:
        >>> world = finite()
        >>> bool(world.log_evidence.exp().sum().isclose(torch.tensor(1.0).double()))
        True
    """
    for name, value in (("num_states", num_states), ("num_examples", num_examples)):
        if not value >= 1:
            raise ValueError(f"expected {name} >= 1, found {value}.")
    generator = torch.Generator().manual_seed(seed)

    def table(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64).exponential_(generator=generator)

    joint = table(num_states, num_examples)
    joint = joint / joint.sum()
    p_x, p_z = joint.sum(0), joint.sum(1, keepdim=True).expand_as(joint)
    posterior, q = joint / p_x, table(num_states, num_examples)
    q = q / q.sum(0)
    log_px, log_pz = (joint / p_z).log(), p_z.log()

    def gaps(q: Tensor) -> Tensor:
        return p_x.log() - (q * (log_px + log_pz - q.log())).sum(-2)

    random = table(1000, num_states, num_examples)
    return World(
        name=f"{num_states} states",
        log_px=log_px,
        log_pz=log_pz,
        log_qz=q.log(),
        weight=q,
        log_posterior=posterior.log(),
        log_evidence=p_x.log(),
        log_integral=(log_px + log_pz).logsumexp(0),
        kl_to_posterior=kl_divergence(Categorical(q.T), Categorical(posterior.T)),
        kl_integral=(q * (q / posterior).log()).sum(0),
        kl_to_prior=kl_divergence(Categorical(q.T), Categorical(p_z.T)),
        random_gaps=gaps(random / random.sum(1, keepdim=True)).amin(1),
        gap_at_posterior=gaps(posterior),
        note="random tables of p(x, z) and q(z|x); sums over all states of z",
    )


def linear_gaussian(
    model: LinearGaussian | None = None, x: Tensor | None = None, q: Any = None, seed: int = 0
) -> World:
    """The linear-Gaussian model: log p(x), the posterior and every KL in closed form.

    The closed forms stand against integrals over a grid of z, and against expectations by Gauss-Hermite quadrature,
    which is exact here: log-densities are quadratic in z. For up to two latent dimensions.

    Args:
        model: the model; a random one with D = 2, E = 7 by default.
        x: data, [B, E]; five draws by default.
        q: a normal with batch shape [B] and event shape (D,); by default a diagonal one that is off the posterior.
        seed: seed of what is random; the random state outside is untouched.

    Returns:
        A world that is exact.

    Raises:
        ValueError: more than two latent dimensions.

    Example:
        >>> bool((linear_gaussian().kl_to_posterior > 0).all())
        True
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    model = model or LinearGaussian(noise(7, 2), noise(7), 0.7)
    num_columns, latent_dim = model.weight.shape
    if latent_dim > 2:
        raise ValueError(f"expected at most 2 latent dimensions for a grid, found {latent_dim}: use fewer.")
    if x is None:
        x = model.loc + noise(5, latent_dim) @ model.weight.T + model.scale * noise(5, num_columns)
    posterior, eye = model.posterior(x), torch.eye(latent_dim, dtype=x.dtype)
    if q is None:
        scale = posterior.variance.sqrt() * (0.4 * noise(len(x), latent_dim)).exp()
        q = Independent(Normal(posterior.mean + scale * noise(len(x), latent_dim), scale), 1)
    normal = normal_of(q)
    if normal is None:
        raise ValueError(f"expected a normal q, found {type(q).__name__}: closed forms need one.")
    loc, factor = normal
    full, prior = MultivariateNormal(loc, scale_tril=factor), MultivariateNormal(eye[0] * 0, eye)

    def log_px(z: Tensor) -> Tensor:
        return Normal(model.loc + z @ model.weight.T, model.scale).log_prob(x).sum(-1)

    eps, weight = _gauss_hermite(latent_dim)
    z = loc + (factor @ eps[:, None, :, None]).squeeze(-1)
    reach = 9 * posterior.variance.sqrt()
    grid, log_cell = grid_between(posterior.mean - reach, posterior.mean + reach, 161)
    log_integral = (log_px(grid) + prior.log_prob(grid)).logsumexp(0) + log_cell
    reach = 9 * q.variance.sqrt()
    grid, log_cell = grid_between(loc - reach, loc + reach, 161)
    log_q = q.log_prob(grid)
    mean = posterior.mean + 0.3 * noise(1000, len(x), latent_dim)
    root, covariance = noise(1000, 1, latent_dim, latent_dim), posterior.covariance_matrix[0]
    spread = 0.1 * root @ root.mT + 0.3 * covariance * noise(1000, 1, 1, 1).exp()
    random_gaps = model.log_evidence(x) - model.elbo(x, mean, spread)
    return World(
        name=f"linear-Gaussian, {latent_dim}-D",
        log_px=log_px(z),
        log_pz=prior.log_prob(z),
        log_qz=q.log_prob(z),
        weight=weight.unsqueeze(-1).expand(z.shape[:-1]),
        log_posterior=posterior.log_prob(z),
        log_evidence=model.log_evidence(x),
        log_integral=log_integral,
        kl_to_posterior=kl_divergence(full, posterior),
        kl_integral=(log_q.exp() * (log_q - posterior.log_prob(grid))).sum(0) * log_cell.exp(),
        kl_to_prior=kl_divergence(full, prior.expand([len(x)])),
        z=z,
        normal=normal,
        standard=normal,
        diagonal=diagonal_of(normal),
        random_gaps=random_gaps.amin(1),
        gap_at_posterior=model.log_evidence(x) - model.elbo(x, posterior.mean, covariance),
        note="closed forms against integrals over a grid of z and Gauss-Hermite expectations",
    )


def normal_of(q: Any) -> tuple[Tensor, Tensor] | None:
    """Mean and Cholesky factor of a normal distribution."""
    if isinstance(q, Independent) and isinstance(q.base_dist, Normal) and q.reinterpreted_batch_ndims == 1:
        return q.mean, torch.diag_embed(q.base_dist.scale)
    if isinstance(q, MultivariateNormal | LowRankMultivariateNormal):
        return q.mean, q.scale_tril
    return None


def diagonal_of(normal: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation, where the covariance is diagonal."""
    if normal is None or bool(normal[1].tril(-1).any()):
        return None
    return normal[0], normal[1].diagonal(dim1=-2, dim2=-1)


def _gauss_hermite(latent_dim: int) -> tuple[Tensor, Tensor]:
    """Points [5^D, D] and weights [5^D] under N(0, I), exact for polynomials of degree up to 9 in each dimension."""
    points, weights = (torch.from_numpy(a) for a in hermite_e.hermegauss(5))
    grid = torch.cartesian_prod(*[points] * latent_dim).reshape(-1, latent_dim)
    weight = torch.cartesian_prod(*[weights / weights.sum()] * latent_dim).reshape(-1, latent_dim).prod(-1)
    return grid, weight


def grid_between(low: Tensor, high: Tensor, num_points: int) -> tuple[Tensor, Tensor]:
    """Regular grids between corners [B, D]: points [num_points^D, B, D] and the logarithm of a cell's size [B]."""
    latent_dim = low.shape[-1]
    axis = torch.linspace(0, 1, num_points, dtype=low.dtype, device=low.device)
    unit = torch.cartesian_prod(*[axis] * latent_dim).reshape(-1, 1, latent_dim)
    return low + (high - low) * unit, ((high - low) / (num_points - 1)).log().sum(-1)
