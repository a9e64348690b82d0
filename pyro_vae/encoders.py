"""Encoders q(z | x): a network followed by a family of distributions. Any callable ``x -> Distribution`` will do."""

import math

import torch
from pyro import distributions as dist
from torch import Tensor, nn

from pyro_vae.contracts import Distribution, Encoder


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
