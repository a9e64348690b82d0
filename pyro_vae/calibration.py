r"""Whether q(z|x) is the posterior: ranks of the truth on simulated data, a grid in two dimensions, and Pyro's NUTS."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from pyro_vae.contracts import untouched
from pyro_vae.supports import is_discrete, is_real, require_likelihood


@dataclass(frozen=True)
class Ranks:
    """Where the z that made x stands among draws of q(z|x), in each latent dimension; uniform if q is the posterior.

    Args:
        ranks: how many of the draws are below the truth, [N, D], integers 0..L.
        num_draws: number L of draws.
    """

    ranks: Tensor
    num_draws: int

    @property
    def counts(self) -> Tensor:
        """How often each rank was met, [D, bins]; ranks are joined to at most 20 bins of equal width."""
        values = self.num_draws + 1
        bins = max(b for b in range(1, min(20, values) + 1) if values % b == 0)
        binned = self.ranks * bins // values
        return torch.stack([column.bincount(minlength=bins) for column in binned.T])

    @property
    def p_value(self) -> Tensor:
        """Of Pearson's test for uniform ranks, [D]: the chance of ranks as uneven as these if q is the posterior."""
        counts = self.counts.double()
        expected = len(self.ranks) / counts.shape[1]
        statistic = ((counts - expected) ** 2 / expected).sum(1)
        return torch.special.gammaincc(torch.tensor((counts.shape[1] - 1) / 2).to(statistic), statistic / 2)

    @property
    def dispersion(self) -> Tensor:
        r"""How much too narrow q is, in standard errors, [D]: above 0 too narrow (a U of ranks), below 0 too wide.

        .. math:: \frac{\frac 1 N \sum_n (u_n - \tfrac12)^2 - v}{\mathrm{se}}, \qquad u = \tfrac{r + 1/2}{L + 1}

        with v the variance of a uniform rank.
        """
        u = (self.ranks.double() + 0.5) / (self.num_draws + 1)
        uniform = (torch.arange(self.num_draws + 1, dtype=torch.float64) + 0.5) / (self.num_draws + 1) - 0.5
        square = uniform.square()
        return ((u - 0.5).square().mean(0) - square.mean()) / (square.std(correction=0) / math.sqrt(len(u)))

    def __str__(self) -> str:
        lines = []
        for d, (p, z) in enumerate(zip(self.p_value.tolist(), self.dispersion.tolist(), strict=True)):
            verdict = (
                "uniform" if p > 0.01 else "too narrow" if z > 3 else "too wide" if z < -3 else "shifted or skewed"
            )
            lines.append(f"z_{d + 1}: {verdict} (p = {p:.2g}, dispersion {z:+.1f} s.e., n={len(self.ranks)})")
        return "\n".join(lines)


def simulation_based_calibration(
    vae: Any, num_examples: int = 1000, num_draws: int = 99, *, seed: int = 0, max_elements: int = 2**22
) -> Ranks:
    r"""Ranks of the z that made x among draws of q(z|x), on data drawn from the model.

    .. math:: z^* \sim p(z), \; x \sim p(x \mid z^*), \; z_{1:L} \sim q(z \mid x): \qquad
        r_d = \#\{l : z_{l,d} < z^*_d\} \sim \mathrm{Uniform}\{0, \dots, L\} \; \text{ if } q(z|x) = p(z|x)

    A q that is too narrow gives too many small and large ranks (a U), one that is too wide too few; a shifted q leans
    to one side. A diagonal q of a correlated posterior, fitted by the ELBO, is too narrow.

    Args:
        vae: a model with ``prior``, ``decoder`` and ``encoder``; z is a vector of real numbers.
        num_examples: number N of simulated examples.
        num_draws: number L of draws for each.
        seed: seed of the simulation; the random state outside is untouched.
        max_elements: numbers of z and of x handled at once.

    Returns:
        The ranks, [N, D].

    Raises:
        ValueError: an argument below 1, a discrete z, whose ranks would be ties, or a score in the place of p(x | z).

    Source: Talts, Betancourt, Simpson, Vehtari, Gelman (2018), Validating Bayesian inference algorithms with
        simulation-based calibration, arXiv:1804.06788.

    Example:
        >>> from pyro_vae.exact import LinearGaussian
        >>> model = LinearGaussian(torch.eye(3, 2), torch.zeros(3), 0.5)
        >>> print(simulation_based_calibration(model.as_vae()))
        z_1: uniform (p = ..., dispersion ... s.e., n=1000)
        z_2: uniform (p = ..., dispersion ... s.e., n=1000)
    """
    for name, value in (("num_examples", num_examples), ("num_draws", num_draws)):
        if value < 1:
            raise ValueError(f"expected {name} >= 1, found {value}.")
    ranks = []
    with untouched(vae, seed):
        if is_discrete(vae.prior()):
            raise ValueError("expected a continuous z, found a discrete one: its ranks are ties; enumerate instead.")
        done, at_once = 0, 1  # one example shows how large x is
        while done < num_examples:
            count = min(at_once, num_examples - done)
            z = vae.prior().sample((count,))
            p = vae.decoder(z)
            require_likelihood(p)
            x = p.sample()
            draws = vae.encoder(x).sample((num_draws,))
            ranks.append((draws < z).sum(0))
            done += count
            at_once = max(1, max_elements // max(x[0].numel(), num_draws * z.shape[-1]))
    return Ranks(torch.cat(ranks).cpu(), num_draws)


@dataclass(frozen=True)
class GridPosterior:
    """Densities of z given x on a square grid, [B, G, G], z1 along the first of the two axes; each sums to 1 / cell.

    Args:
        axis: the grid's coordinate, [G], the same for both dimensions.
        posterior: p(z | x).
        approximation: q(z | x).
        log_evidence: log p(x), by the same sums, [B], nats.
    """

    axis: Tensor
    posterior: Tensor
    approximation: Tensor
    log_evidence: Tensor

    @property
    def cell(self) -> float:
        """Area of a cell."""
        return float(self.axis[1] - self.axis[0]) ** 2

    @property
    def kl(self) -> Tensor:
        """KL(q(z|x) || p(z|x)) by summing over the grid, [B], nats: the gap of the ELBO."""
        ratio = self.approximation.log() - self.posterior.log()
        return (self.approximation * ratio.where(self.approximation > 0, torch.zeros_like(ratio))).sum(
            (1, 2)
        ) * self.cell


def posterior_on_grid(vae: Any, x: Tensor, limit: float = 4.0, num_points: int = 161) -> GridPosterior:
    r"""The true posterior of two latent dimensions beside q(z|x), on a grid.

    .. math:: p(z \mid x) = \frac{p(x \mid z) \, p(z)}{\sum_{z'} p(x \mid z') \, p(z') \, h^2}

    Args:
        vae: a model with ``prior``, ``decoder`` and ``encoder``, D = 2.
        x: data, [B, *E].
        limit: the grid spans [-limit, limit] in both dimensions.
        num_points: points G in each dimension.

    Returns:
        Both densities, [B, G, G].

    Raises:
        ValueError: z is not on R^2, or a score stands in the place of p(x | z).

    Example:
        >>> from pyro_vae.exact import LinearGaussian
        >>> model = LinearGaussian(torch.eye(3, 2).double(), torch.zeros(3).double(), 0.5)
        >>> bool(posterior_on_grid(model.as_vae(), torch.ones(1, 3).double()).kl < 1e-6)
        True
    """
    with untouched(vae):
        prior = vae.prior()
        if tuple(prior.event_shape) != (2,):
            raise ValueError(f"expected two latent dimensions, found event shape {tuple(prior.event_shape)}: use NUTS.")
        if not is_real(prior):
            raise ValueError(f"expected z on R^2, found prior() with support {prior.support}: the grid spans R^2 only.")
        axis = torch.linspace(-limit, limit, num_points, dtype=x.dtype, device=x.device)
        grid = torch.cartesian_prod(axis, axis)
        require_likelihood(vae.decoder(grid[:1]))
        at_once = max(1, 2**22 // (len(x) * max(1, x[0].numel())))
        q, log_joint, log_q = vae.encoder(x), [], []
        for z in grid.split(at_once):
            spread = z.unsqueeze(1).expand(-1, len(x), -1)
            log_joint.append(vae.decoder(spread).log_prob(x) + prior.log_prob(z).unsqueeze(1))
            log_q.append(q.log_prob(spread))
        joint = torch.cat(log_joint).double()
        log_evidence = joint.logsumexp(0) + 2 * math.log(float(axis[1] - axis[0]))

        def on_grid(values: Tensor) -> Tensor:
            return values.T.reshape(len(x), num_points, num_points)

        return GridPosterior(
            axis, on_grid((joint - log_evidence).exp()), on_grid(torch.cat(log_q).double().exp()), log_evidence
        )


def posterior_by_nuts(vae: Any, x: Tensor, num_samples: int = 500, warmup_steps: int = 300, *, seed: int = 0) -> Tensor:
    """Draws of the true posterior of a few examples, by Pyro's No-U-Turn sampler: to see q(z|x) against it.

    Args:
        vae: a model with ``prior`` and ``decoder``, z in R^D.
        x: a few examples, [B, *E]; each has a chain of its own, one after the other.
        num_samples: draws kept for each.
        warmup_steps: draws before them, in which step size and mass matrix adapt.
        seed: seed of the draws; the random state outside is untouched.

    Returns:
        [num_samples, B, D]; the draws of a chain are not independent.

    Raises:
        ValueError: z is not on R^D, or a score stands in the place of p(x | z).

    Source: Hoffman, Gelman (2014), The No-U-Turn sampler, arXiv:1111.4246.
    """
    chains = []
    with untouched(vae, seed):
        prior = vae.prior()
        if not is_real(prior):
            raise ValueError(
                f"expected z on R^D, found prior() with support {prior.support}: NUTS moves freely in R^D only; "
                "enumerate a discrete z."
            )
        require_likelihood(vae.decoder(prior.sample((1,))))
        for row in x:

            def potential(values: dict[str, Tensor], row: Tensor = row) -> Tensor:
                z = values["z"]
                return -(prior.log_prob(z) + vae.decoder(z).log_prob(row))

            with torch.enable_grad():
                kernel = NUTS(potential_fn=potential)
                start = {"z": prior.sample()}
                sampler = MCMC(
                    kernel, num_samples, warmup_steps=warmup_steps, initial_params=start, disable_progbar=True
                )
                sampler.run()
            chains.append(sampler.get_samples()["z"].detach())
    return torch.stack(chains, dim=1)


def posterior_predictive_check(
    vae: Any,
    x: Tensor,
    statistic: Callable[[Tensor], Tensor],
    num_draws: int = 200,
    *,
    seed: int = 0,
) -> Tensor:
    r"""How often data replicated from the posterior shows at least what x shows: the posterior predictive p-value.

    .. math:: p_n = P\left( T(x^{\mathrm{rep}}) \ge T(x_n) \right), \qquad
        z \sim q(z \mid x_n), \; x^{\mathrm{rep}} \sim p(x \mid z)

    Values near 0 or 1 for many examples name what the model gets wrong. They pile up around 1/2 even for a true model,
    since z has seen x: not a test of level alpha.

    Args:
        vae: a model with ``decoder`` and ``encoder``.
        x: data, [N, *E].
        statistic: x [B, *E] -> [B], such as the sum of the pixels or the sharpest edge.
        num_draws: replications of each example.
        seed: seed of the draws; the random state outside is untouched.

    Returns:
        [N], in [0, 1]; ties count half.

    Raises:
        ValueError: a statistic that is not one number an example, or a score in the place of p(x | z).

    Source: Gelman, Meng, Stern (1996), Posterior predictive assessment of model fitness, Statistica Sinica 6.

    Example:
        >>> from pyro_vae.exact import LinearGaussian
        >>> vae = LinearGaussian(torch.eye(3, 2), torch.zeros(3), 0.5).as_vae()
        >>> p = posterior_predictive_check(vae, torch.tensor([[0.0, 0.0, 9.0]]), lambda x: x[:, 2])
        >>> p.item()  # the third column is noise of scale 0.5: 9 is out of reach
        0.0
    """
    with untouched(vae, seed):
        q, seen = vae.encoder(x), statistic(x)
        if seen.shape != x.shape[:1]:
            raise ValueError(f"expected statistic(x) of shape {tuple(x.shape[:1])}, found {tuple(seen.shape)}.")
        above = torch.zeros_like(seen, dtype=torch.float64)
        for _ in range(num_draws):
            p = vae.decoder(q.sample())
            require_likelihood(p)
            replicated = statistic(p.sample())
            above += (replicated > seen).double() + 0.5 * (replicated == seen).double()
        return above / num_draws
