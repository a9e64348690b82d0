"""Encoders q(z | x): a network followed by a family of distributions. Any callable ``x -> Distribution`` will do."""

import math
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor, nn

from pyro_vae.contracts import Distribution, Encoder, check_at_least_one

_NO_SHAPE = torch.Size()


class DiagonalNormal(Encoder):
    r"""Normal posterior with a diagonal covariance, the usual choice.

    .. math:: q(z \mid x) = \mathcal N(z; m, \operatorname{diag} s^2), \qquad (m, \log s) = \mathrm{net}(x)

    The network's second half is the logarithm of the standard deviation s.

    Args:
        net: x [*batch, *E] -> [*batch, 2 D].

    Returns:
        A distribution with batch shape ``batch`` and event shape (D,), with ``rsample``.

    Raises:
        ValueError: the network's number of outputs is odd.

    Source: Kingma, Welling (2014), section 3, arXiv:1312.6114.

    Example:
        >>> from pyro_vae import Mlp
        >>> DiagonalNormal(Mlp(7, 16, 2 * 2))(torch.zeros(5, 7)).event_shape
        torch.Size([2])
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    @staticmethod
    def num_outputs(latent_dim: int) -> int:
        """2 D."""
        return 2 * latent_dim

    def forward(self, x: Tensor) -> Distribution:
        """The distribution q(z | x)."""
        h = self.net(x)
        if h.shape[-1] % 2:  # unequal halves would broadcast
            raise ValueError(
                f"DiagonalNormal expected 2 D outputs of its network, found {h.shape[-1]}: "
                "make the last layer DiagonalNormal.num_outputs(latent_dim) wide."
            )
        loc, log_scale = h.chunk(2, dim=-1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)


class FullNormal(Encoder):
    r"""Normal posterior with a full covariance, given by its Cholesky factor.

    .. math:: q(z \mid x) = \mathcal N(z; m, L L^\top), \qquad (m, \log \operatorname{diag} L, \operatorname{tril} L)
        = \mathrm{net}(x)

    Needed where the true posterior is correlated; for a linear decoder it closes the gap of the diagonal one.

    Args:
        net: x [*batch, *E] -> [*batch, 2 D + D (D - 1) / 2].

    Returns:
        A distribution with batch shape ``batch`` and event shape (D,), with ``rsample``.

    Raises:
        ValueError: the network's number of outputs fits no D.

    Source: Kingma, Welling (2019), An introduction to variational autoencoders, section 2.5.1, arXiv:1906.02691.

    Example:
        >>> from pyro_vae import Mlp
        >>> FullNormal(Mlp(7, 16, FullNormal.num_outputs(3)))(torch.zeros(5, 7)).event_shape
        torch.Size([3])
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    @staticmethod
    def num_outputs(latent_dim: int) -> int:
        """2 D + D (D - 1) / 2."""
        return latent_dim * (latent_dim + 3) // 2

    def forward(self, x: Tensor) -> Distribution:
        """The distribution q(z | x)."""
        h = self.net(x)
        dim = (math.isqrt(9 + 8 * h.shape[-1]) - 3) // 2
        if self.num_outputs(dim) != h.shape[-1]:
            raise ValueError(
                f"FullNormal expected 2 D + D (D - 1) / 2 outputs of its network, found {h.shape[-1]}: "
                "make the last layer FullNormal.num_outputs(latent_dim) wide."
            )
        loc, log_diagonal, below = h.split([dim, dim, h.shape[-1] - 2 * dim], dim=-1)
        rows, columns = torch.tril_indices(dim, dim, offset=-1, device=h.device)
        diagonal = torch.diag_embed(log_diagonal.exp()).flatten(-2)
        factor = diagonal.index_add(-1, rows * dim + columns, below).unflatten(-1, (dim, dim))
        return dist.MultivariateNormal(loc, scale_tril=factor)


class LowRankNormal(Encoder):
    r"""Normal posterior whose covariance is diagonal plus a matrix of low rank.

    .. math:: q(z \mid x) = \mathcal N(z; m, V V^\top + \operatorname{diag} s^2), \qquad
        (m, \log s, V) = \mathrm{net}(x)

    Between the diagonal and the full one: r directions of correlation for D (r + 2) outputs; s is no longer the
    standard deviation of z but what V leaves unexplained.

    Args:
        net: x [*batch, *E] -> [*batch, D (r + 2)].
        rank: number r of columns of V.

    Returns:
        A distribution with batch shape ``batch`` and event shape (D,), with ``rsample``.

    Raises:
        ValueError: rank < 1, or the network's number of outputs is no multiple of r + 2.

    Source: Ong, Nott, Smith (2018), Gaussian variational approximation with a factor covariance structure,
        arXiv:1701.03208.

    Example:
        >>> from pyro_vae import Mlp
        >>> LowRankNormal(Mlp(7, 16, LowRankNormal.num_outputs(3, rank=2)), rank=2)(torch.zeros(5, 7)).event_shape
        torch.Size([3])
    """

    def __init__(self, net: nn.Module, rank: int = 2):
        super().__init__()
        check_at_least_one(rank=rank)
        self.net, self.rank = net, rank

    def extra_repr(self) -> str:
        """Show the rank."""
        return f"rank={self.rank}"

    @staticmethod
    def num_outputs(latent_dim: int, rank: int = 2) -> int:
        """D (r + 2)."""
        return latent_dim * (rank + 2)

    def forward(self, x: Tensor) -> Distribution:
        """The distribution q(z | x)."""
        h = self.net(x)
        dim = h.shape[-1] // (self.rank + 2)
        if self.num_outputs(dim, self.rank) != h.shape[-1]:
            raise ValueError(
                f"LowRankNormal expected D (r + 2) outputs of its network, found {h.shape[-1]} for r = {self.rank}: "
                f"make the last layer LowRankNormal.num_outputs(latent_dim, rank={self.rank}) wide."
            )
        loc, log_scale, factor = h.split([dim, dim, dim * self.rank], dim=-1)
        factor = factor.unflatten(-1, (dim, self.rank))
        return dist.LowRankMultivariateNormal(loc, factor, (2 * log_scale).exp())


class Laplace(Encoder):
    r"""Laplace posterior, independent numbers with a sharp peak and heavier tails than a normal.

    .. math:: q(z \mid x) = \prod_d \frac{1}{2 b_d} e^{-|z_d - m_d| / b_d}, \qquad (m, \log b) = \mathrm{net}(x)

    b is the mean distance from m, so the standard deviation is b times the square root of 2. The natural partner of a
    Laplace prior. Reached as ``encoders.Laplace``.

    Args:
        net: x [*batch, *E] -> [*batch, 2 D].

    Returns:
        A distribution with batch shape ``batch`` and event shape (D,), with ``rsample``.

    Raises:
        ValueError: the network's number of outputs is odd.

    Example:
        >>> from pyro_vae import Mlp, encoders
        >>> encoders.Laplace(Mlp(7, 16, 2 * 2))(torch.zeros(5, 7)).event_shape
        torch.Size([2])
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    @staticmethod
    def num_outputs(latent_dim: int) -> int:
        """2 D."""
        return 2 * latent_dim

    def forward(self, x: Tensor) -> Distribution:
        """The distribution q(z | x)."""
        h = self.net(x)
        if h.shape[-1] % 2:
            raise ValueError(
                f"Laplace expected 2 D outputs of its network, found {h.shape[-1]}: "
                "make the last layer Laplace.num_outputs(latent_dim) wide."
            )
        loc, log_scale = h.chunk(2, dim=-1)
        return dist.Laplace(loc, log_scale.exp()).to_event(1)


class MixtureOfNormals(Encoder):
    r"""Mixture of C diagonal normals: a posterior with several modes, reparameterised.

    .. math:: q(z \mid x) = \sum_{c=1}^C \pi_c \, \mathcal N(z; m_c, \operatorname{diag} s_c^2), \qquad
        (\log \pi, m, \log s) = \mathrm{net}(x)

    A draw picks a component, which has no derivative; but z is also the solution of F_d(z_d | z_1, ..., z_{d-1}) = u_d,
    with F_d the conditional distribution functions and u uniform, and that has: the gradient of ``rsample`` is
    the implicit one, exact for the weights too. Reached as ``encoders.MixtureOfNormals``.

    Args:
        net: x [*batch, *E] -> [*batch, C (2 D + 1)].
        num_components: number of components C.

    Returns:
        A distribution with batch shape ``batch`` and event shape (D,), with ``rsample``.

    Raises:
        ValueError: num_components < 1, or the network's number of outputs fits no D.

    Source: Graves (2016), Stochastic backpropagation through mixture density distributions, arXiv:1607.05690;
        Figurnov, Mohamed, Mnih (2018), Implicit reparameterization gradients, arXiv:1805.08498.

    Example:
        >>> from pyro_vae import Mlp, encoders
        >>> width = encoders.MixtureOfNormals.num_outputs(2, num_components=3)
        >>> encoders.MixtureOfNormals(Mlp(7, 16, width), num_components=3)(torch.zeros(5, 7)).event_shape
        torch.Size([2])
    """

    def __init__(self, net: nn.Module, num_components: int = 5):
        super().__init__()
        check_at_least_one(num_components=num_components)
        self.net, self.num_components = net, num_components

    def extra_repr(self) -> str:
        """Show the number of components."""
        return f"num_components={self.num_components}"

    @staticmethod
    def num_outputs(latent_dim: int, num_components: int = 5) -> int:
        """C (2 D + 1)."""
        return num_components * (2 * latent_dim + 1)

    def forward(self, x: Tensor) -> Distribution:
        """The distribution q(z | x)."""
        h, num = self.net(x), self.num_components
        dim = (h.shape[-1] // num - 1) // 2
        if dim < 1 or self.num_outputs(dim, num) != h.shape[-1]:
            raise ValueError(
                f"MixtureOfNormals expected C (2 D + 1) outputs of its network, found {h.shape[-1]} for C = {num}: "
                f"make the last layer MixtureOfNormals.num_outputs(latent_dim, num_components={num}) wide."
            )
        logits, loc, log_scale = h.split([num, num * dim, num * dim], dim=-1)
        loc, log_scale = loc.unflatten(-1, (num, dim)), log_scale.unflatten(-1, (num, dim))
        return _Mixture(dist.Categorical(logits=logits), dist.Normal(loc, log_scale.exp()).to_event(1))


class _Mixture(dist.MixtureSameFamily):
    """A mixture of diagonal normals with the implicit gradient of its draws."""

    has_rsample = True

    def rsample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        """A draw z, with dz_d = -(dF_d) / (density of z_d given z_1, ..., z_{d-1})."""
        with torch.no_grad():
            z = super().sample(sample_shape)
        if not torch.is_grad_enabled():
            return z
        normal = self.component_distribution.base_dist
        log_weight = self.mixture_distribution.logits  # of the components, given the numbers before this one
        draws: list[Tensor] = []
        for value, loc, scale in zip(z.unbind(-1), normal.loc.unbind(-1), normal.scale.unbind(-1), strict=True):
            weight = log_weight.softmax(-1)
            white = (value.unsqueeze(-1) - loc) / scale
            below = (weight * torch.special.ndtr(white)).sum(-1)
            density = (weight * (-0.5 * white**2).exp() / (math.sqrt(2 * math.pi) * scale)).sum(-1).detach()
            tiny = torch.finfo(density.dtype).tiny
            value = value - (below - below.detach()) / density.clamp(min=tiny)  # the value stays, with a gradient
            draws.append(value)
            log_weight = log_weight - 0.5 * ((value.unsqueeze(-1) - loc) / scale) ** 2 - scale.log()
        return torch.stack(draws, dim=-1)


class Delta(Encoder):
    r"""A point mass: the code of a plain autoencoder, with no uncertainty.

    .. math:: q(z \mid x) = \delta(z - m), \qquad m = \mathrm{net}(x)

    log q(z | x) is set to 0, so what the ELBO calls its value is log p(x | m) + log p(m): the joint density at one
    point, a reconstruction penalised by the prior. It is **no bound** on log p(x), contains no KL (that of a point
    mass is infinite), depends on the units of z, and is not to be compared with the ELBO of other posteriors; nor is
    ``log_evidence`` an estimate of anything here. With ``Beta(beta=0)`` it is the plain autoencoder's log-likelihood.

    Args:
        net: x [*batch, *E] -> [*batch, D].

    Returns:
        A distribution with batch shape ``batch`` and event shape (D,), with ``rsample``.

    Example:
        >>> from pyro_vae import Mlp, encoders
        >>> encoders.Delta(Mlp(7, 16, 2))(torch.zeros(5, 7)).event_shape
        torch.Size([2])
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    @staticmethod
    def num_outputs(latent_dim: int) -> int:
        """D."""
        return latent_dim

    def forward(self, x: Tensor) -> Distribution:
        """The distribution q(z | x)."""
        return dist.Delta(self.net(x), event_dim=1)
