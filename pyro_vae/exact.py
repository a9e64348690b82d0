"""Exact answers: the linear-Gaussian VAE in closed form, quadrature for one or two latent dimensions, and the sum over
all values of a discrete z.

Every estimate and every bound of the library is tested against these.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from pyro_vae.contracts import DecoderLike, PriorLike, untouched
from pyro_vae.decoders import Decoder
from pyro_vae.discrete import all_values
from pyro_vae.encoders import DiagonalNormal, FullNormal
from pyro_vae.priors import StandardNormal
from pyro_vae.reals import Normal
from pyro_vae.supports import is_real, require_likelihood
from pyro_vae.vae import VAE


@dataclass(frozen=True)
class LinearGaussian:
    r"""The linear-Gaussian VAE, which is probabilistic principal component analysis.

    .. math:: p(z) = \mathcal N(0, I), \quad p(x \mid z) = \mathcal N(W z + \mu, \sigma^2 I), \quad
        p(x) = \mathcal N(\mu, W W^\top + \sigma^2 I)

    With M = W^T W + sigma^2 I the posterior is N(M^-1 W^T (x - mu), sigma^2 M^-1).

    Args:
        weight: W, [E, D].
        loc: mu, [E].
        scale: sigma, a positive number.

    Source: Tipping, Bishop (1999), Probabilistic principal component analysis; Lucas et al. (2019), Don't blame the
        ELBO!, arXiv:1911.02469.

    Example:
        >>> model = LinearGaussian(torch.eye(3, 2), torch.zeros(3), 0.5)
        >>> model.log_evidence(torch.zeros(1, 3)).shape
        torch.Size([1])
    """

    weight: Tensor
    loc: Tensor
    scale: float

    @classmethod
    def maximum_likelihood(cls, x: Tensor, latent_dim: int) -> "LinearGaussian":
        r"""The parameters that maximise the likelihood of x [N, E], in closed form.

        sigma^2 is the mean of the discarded eigenvalues of the data's covariance, W the leading eigenvectors times
        (lambda - sigma^2)^(1/2). There the columns of W are orthogonal, so a diagonal posterior is exact and the
        maximum of the ELBO equals that of the log-evidence.

        Raises:
            ValueError: latent_dim is not below the number of columns of x.
        """
        num_columns = x.shape[1]
        if not 1 <= latent_dim < num_columns:
            raise ValueError(f"expected 1 <= latent_dim < {num_columns} (columns of x), found {latent_dim}.")
        loc = x.mean(0)
        values, vectors = torch.linalg.eigh((x - loc).T @ (x - loc) / len(x))
        noise = values[:-latent_dim].mean()
        weight = vectors[:, -latent_dim:] * (values[-latent_dim:] - noise).clamp(min=0).sqrt()
        return cls(weight.flip(1), loc, noise.sqrt().item())

    @property
    def precision_core(self) -> Tensor:
        """M = W^T W + sigma^2 I, [D, D]."""
        eye = torch.eye(self.weight.shape[1], dtype=self.weight.dtype, device=self.weight.device)
        return self.weight.T @ self.weight + self.scale**2 * eye

    def log_evidence(self, x: Tensor) -> Tensor:
        """The log-evidence log p(x), exactly: [B], nats."""
        eye = torch.eye(len(self.loc), dtype=self.weight.dtype, device=self.weight.device)
        return MultivariateNormal(self.loc, self.weight @ self.weight.T + self.scale**2 * eye).log_prob(x)

    def posterior(self, x: Tensor) -> MultivariateNormal:
        """p(z | x), exactly: batch shape [B], event shape (D,)."""
        core = self.precision_core
        mean = torch.linalg.solve(core, self.weight.T @ (x - self.loc).T).T
        return MultivariateNormal(mean, precision_matrix=core / self.scale**2)

    def elbo(self, x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
        """The ELBO of q(z|x) = N(mean [B, D], covariance [D, D] or [B, D, D]), exactly: [B], nats."""
        residual = x - self.loc - mean @ self.weight.T
        spread = ((self.weight.T @ self.weight) * covariance).sum((-2, -1))
        log_px = -0.5 * len(self.loc) * math.log(2 * math.pi * self.scale**2) - (residual**2).sum(-1).add(spread) / (
            2 * self.scale**2
        )
        trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
        kl = 0.5 * (trace + (mean**2).sum(-1) - mean.shape[-1] - torch.logdet(covariance))
        return log_px - kl

    def diagonal_gap(self) -> float:
        r"""Gap log p(x) - ELBO of the best diagonal q, the same for every x: ½ (Σ log M_ii - log |M|), nats, >= 0."""
        core = self.precision_core
        return (0.5 * (core.diagonal().log().sum() - torch.logdet(core))).item()

    def as_vae(self, diagonal: bool = False) -> VAE:
        """This model as a VAE whose guide is the exact posterior, or the best diagonal one.

        The best diagonal q has the exact mean and variances sigma^2 / M_ii.
        """
        num_columns, latent_dim = self.weight.shape
        core = self.precision_core
        net = nn.Linear(latent_dim, num_columns)
        family = DiagonalNormal if diagonal else FullNormal
        encoder_net = nn.Linear(num_columns, family.num_outputs(latent_dim))
        if diagonal:
            constants = 0.5 * torch.log(self.scale**2 / core.diagonal())
        else:
            factor = torch.linalg.cholesky(self.scale**2 * torch.linalg.inv(core))
            rows, columns = torch.tril_indices(latent_dim, latent_dim, offset=-1)
            constants = torch.cat([factor.diagonal().log(), factor[rows, columns]])
        to_mean = torch.linalg.solve(core, self.weight.T)
        likelihood = Normal(self.scale)
        vae = VAE(StandardNormal(latent_dim), Decoder(net, likelihood), family(encoder_net)).to(self.weight)
        with torch.no_grad():  # after .to: a detour through single precision would round them
            net.weight.copy_(self.weight)
            net.bias.copy_(self.loc)
            encoder_net.weight.zero_()[:latent_dim] = to_mean
            encoder_net.bias.copy_(torch.cat([-to_mean @ self.loc, constants]))
            likelihood.log_scale.fill_(math.log(self.scale))
        return vae


def linear_vae(latent_dim: int, data_dim: int) -> VAE:
    """An untrained VAE with a linear decoder of learned scale and a linear encoder; its best ELBO is known exactly.

    Args:
        latent_dim: number of latent dimensions D.
        data_dim: number of columns E of the data.

    Returns:
        A VAE; :meth:`LinearGaussian.maximum_likelihood` is where training it ends.
    """
    return VAE(
        prior=StandardNormal(latent_dim),
        decoder=Decoder(nn.Linear(latent_dim, data_dim), Normal(scale=1.0, learn_scale=True)),
        encoder=DiagonalNormal(nn.Linear(data_dim, 2 * latent_dim)),
    )


def log_evidence_by_quadrature(
    prior: PriorLike, decoder: DecoderLike, x: Tensor, limit: float = 8.0, num_points: int = 401
) -> Tensor:
    r"""The log-evidence log p(x) by summing over a regular grid of z, for one or two latent dimensions.

    .. math:: \log p(x) \approx \log \sum_{z \in \text{grid}} p(x \mid z) \, p(z) \, h^D

    For smooth integrands that vanish at the border the error falls faster than any power of the spacing h: with the
    defaults it is near rounding unless the posterior is narrower than some 0.05. Use float64.

    Args:
        prior: p(z), event shape (1,) or (2,).
        decoder: p(x | z).
        x: data, [B, *E].
        limit: the grid spans [-limit, limit] in each dimension.
        num_points: points in each dimension.

    Returns:
        [B], nats.

    Raises:
        ValueError: more than two latent dimensions, a z that is not on R^D, or a score in the place of p(x | z).

    Example:
        >>> from pyro_vae import StandardNormal
        >>> model = LinearGaussian(torch.ones(3, 1).double(), torch.zeros(3).double(), 0.5)
        >>> vae, x = model.as_vae(), torch.ones(1, 3).double()
        >>> bool(torch.isclose(log_evidence_by_quadrature(vae.prior, vae.decoder, x), model.log_evidence(x)))
        True
    """
    with torch.no_grad():
        p = prior()
        (latent_dim,) = p.event_shape
        if latent_dim > 2:
            raise ValueError(
                f"expected at most 2 latent dimensions for quadrature, found {latent_dim}: use log_evidence."
            )
        if not is_real(p):
            raise ValueError(
                f"expected z on R^D, found prior() of type {type(p).__name__} with support {p.support}: this grid "
                "spans R^D only; use log_evidence, or enumeration for a discrete z."
            )
        axis = torch.linspace(-limit, limit, num_points, dtype=x.dtype, device=x.device)
        grid = torch.cartesian_prod(*[axis] * latent_dim).reshape(-1, latent_dim)
        require_likelihood(decoder(grid[:1]))
        log_cell = latent_dim * math.log(2 * limit / (num_points - 1))
        parts = []
        at_once = max(1, min(20_000, 2**22 // max(1, x.numel())))  # memory is some 20 times 2^22 numbers
        for z in grid.split(at_once):
            log_pz = p.log_prob(z)
            log_px = decoder(z.unsqueeze(1)).log_prob(x)  # decoded once, scored for every x
            parts.append((log_pz.unsqueeze(1) + log_px).logsumexp(0))
        return torch.stack(parts).logsumexp(0) + log_cell


def joint_by_enumeration(vae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    r"""The joint log-probabilities log p(x, z) of all values of a discrete z, up to 4096 of them (12 bits).

    .. math:: \log p(x, z_s) = \log p(z_s) + \log p(x \mid z_s), \qquad s = 1, \dots, S

    The exact posterior is ``log_joint.softmax(0)``, [S, B]; the log-evidence is ``log_joint.logsumexp(0)``.

    Args:
        vae: a model with ``prior`` and ``decoder``.
        x: data, [B, *E].

    Returns:
        The values of z, [S, D], and log p(x, z), [S, B], nats.

    Raises:
        ValueError: z is neither a one-hot vector nor a vector of bits, or has more than 4096 values, or a score stands
            in the place of p(x | z).

    Example:
        >>> from pyro_vae import VAE, Bernoulli, Decoder, Mlp, discrete, priors
        >>> parts = Decoder(Mlp(3, 8, 7), Bernoulli()), discrete.OneHotCategorical(Mlp(7, 8, 3))
        >>> z, log_joint = joint_by_enumeration(VAE(priors.OneHotCategorical(3), *parts), torch.ones(5, 7))
        >>> z.shape, log_joint.shape
        (torch.Size([3, 3]), torch.Size([3, 5]))
    """
    with untouched(vae):
        prior = vae.prior()
        z = all_values(prior)
        require_likelihood(vae.decoder(z[:1]))
        log_pz = prior.log_prob(z).unsqueeze(1)
        rows_at_once = max(1, 2**22 // (len(z) * max(1, x[:1].numel())))
        log_px = [vae.decoder(z.unsqueeze(1)).log_prob(rows) for rows in x.split(rows_at_once)]
        return z, log_pz + torch.cat(log_px, dim=1)


def log_evidence_by_enumeration(vae: Any, x: Tensor) -> Tensor:
    r"""The log-evidence log p(x) of a model with a discrete z, exactly: the sum over all its values.

    .. math:: \log p(x) = \log \sum_{s=1}^S p(z_s) \, p(x \mid z_s)

    Args:
        vae: a model with ``prior`` and ``decoder``; the encoder plays no part.
        x: data, [B, *E].

    Returns:
        [B], nats.

    Raises:
        ValueError: as :func:`joint_by_enumeration`.

    Example:
        >>> from pyro_vae import VAE, Bernoulli, Decoder, Mlp, discrete, priors
        >>> parts = Decoder(Mlp(4, 8, 7), Bernoulli()), discrete.Bernoulli(Mlp(7, 8, 4))
        >>> log_evidence_by_enumeration(VAE(priors.Bernoulli(4), *parts), torch.ones(5, 7)).shape
        torch.Size([5])
    """
    return joint_by_enumeration(vae, x)[1].logsumexp(0)
