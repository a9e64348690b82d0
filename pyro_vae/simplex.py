"""Priors on the simplex, for codes that are shares: D positive numbers that sum to 1."""

import torch
from pyro import distributions as dist
from torch import Tensor

from pyro_vae.contracts import Distribution, Prior, check_positive, check_several


class LogisticNormal(Prior):
    r"""A logistic normal distribution on the simplex: D positive numbers that sum to 1, such as topic shares.

    .. math:: z_d = v_d \prod_{j < d} (1 - v_j), \quad v_d = \sigma(x_d - \log(D - d)), \quad
        x \sim \mathcal N(0, s^2 I_{D-1}), \quad v_D = 1

    The normal is broken into sticks; x = 0 is the centre, all z equal to 1 / D. Unlike a :class:`Dirichlet` it is a
    differentiable function of normal noise.

    Args:
        latent_dim: how many numbers D; x has D - 1.
        scale: the standard deviation s.

    Returns:
        A distribution with batch shape () and event shape (D,), with ``rsample``.

    Raises:
        ValueError: latent_dim < 2 or scale <= 0.

    Source: the definition.

    Example:
        >>> LogisticNormal(3)().sample().sum().round(decimals=4)
        tensor(1.)
    """

    loc: Tensor

    def __init__(self, latent_dim: int, scale: float = 1.0):
        super().__init__()
        check_positive(scale=scale)
        check_several(latent_dim)
        self.latent_dim, self.scale = latent_dim, scale
        self.register_buffer("loc", torch.zeros(latent_dim - 1), persistent=False)

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return f"latent_dim={self.latent_dim}, scale={self.scale}"

    def forward(self) -> Distribution:
        """The distribution p(z)."""
        return dist.LogisticNormal(self.loc, torch.full_like(self.loc, self.scale))


class Dirichlet(Prior):
    r"""The symmetric Dirichlet distribution on the simplex: D positive numbers that sum to 1.

    .. math:: p(z) = \frac{\Gamma(D a)}{\Gamma(a)^D} \prod_d z_d^{a - 1}

    Concentration 1 is uniform; below 1 most of the mass lies at corners and edges, above 1 in the middle.

    Args:
        latent_dim: how many numbers D.
        concentration: the concentration a.

    Returns:
        A distribution with batch shape () and event shape (D,), with ``rsample``.

    Raises:
        ValueError: latent_dim < 2 or concentration <= 0.

    Source: the definition.

    Example:
        >>> Dirichlet(3)().log_prob(torch.tensor([0.2, 0.3, 0.5])).exp()  # uniform on a triangle of area 1/2
        tensor(2.)
    """

    ones: Tensor

    def __init__(self, latent_dim: int, concentration: float = 1.0):
        super().__init__()
        check_positive(concentration=concentration)
        check_several(latent_dim)
        self.latent_dim, self.concentration = latent_dim, concentration
        self.register_buffer("ones", torch.ones(latent_dim), persistent=False)

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return f"latent_dim={self.latent_dim}, concentration={self.concentration}"

    def forward(self) -> Distribution:
        """The distribution p(z)."""
        return dist.Dirichlet(self.concentration * self.ones)
