"""Encoders q(z | x) on the unit sphere: a network gives a direction and how closely the codes keep to it."""

from torch import Tensor, nn

from pyro_vae import spherical
from pyro_vae.contracts import Distribution, Encoder


class _Spherical(Encoder):
    """What both encoders share: the network gives a vector m and log kappa."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    @staticmethod
    def num_outputs(latent_dim: int) -> int:
        """D + 1."""
        return latent_dim + 1

    def _parameters_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.net(x)
        if h.shape[-1] < 3:
            name = type(self).__name__
            raise ValueError(
                f"{name} expected D + 1 outputs of its network with D >= 2, found {h.shape[-1]}: "
                f"make the last layer {name}.num_outputs(latent_dim) wide."
            )
        m, log_kappa = h[..., :-1], h[..., -1]
        return m / m.norm(dim=-1, keepdim=True), log_kappa.exp()


class PowerSpherical(_Spherical):
    r"""Power spherical posterior: codes are directions, close to a mean direction.

    .. math:: q(z \mid x) \propto (1 + \mu^\top z)^\kappa, \qquad
        \mu = m / |m|, \quad (m, \log \kappa) = \mathrm{net}(x)

    Its partner is :class:`pyro_vae.SphereUniform`; their KL has a closed form (``pyro.infer.TraceMeanField_ELBO``). The
    code of x is the mean direction; q.mean lies inside the sphere. A sphere bounds what a code can hold: with D
    coordinates there are D - 1 dimensions.

    Args:
        net: x [*batch, *E] -> [*batch, D + 1].

    Returns:
        A distribution with batch shape ``batch`` and event shape (D,), with ``rsample``.

    Raises:
        ValueError: the network has fewer than three outputs.

    Source: De Cao, Aziz (2020), The power spherical distribution, arXiv:2006.04437.

    Example:
        >>> import torch
        >>> from pyro_vae import Mlp, PowerSpherical
        >>> q = PowerSpherical(Mlp(7, 16, 3 + 1))(torch.zeros(5, 7))
        >>> q.event_shape, q.sample().norm(dim=-1).round(decimals=4)
        (torch.Size([3]), tensor([1., 1., 1., 1., 1.]))
    """

    def forward(self, x: Tensor) -> Distribution:
        """The distribution q(z | x)."""
        return spherical.PowerSpherical(*self._parameters_of(x))


class VonMisesFisher(_Spherical):
    r"""Von Mises-Fisher posterior: the normal distribution of the sphere, close to a mean direction.

    .. math:: q(z \mid x) \propto e^{\kappa \mu^\top z}, \qquad \mu = m / |m|, \quad (m, \log \kappa) = \mathrm{net}(x)

    Its partner is :class:`pyro_vae.SphereUniform`; their KL is known to rounding (``pyro.infer.TraceMeanField_ELBO``)
    and does not depend on the mean direction, so it pulls the codes nowhere. The code of x is the mean direction.

    Args:
        net: x [*batch, *E] -> [*batch, D + 1].

    Returns:
        A distribution with batch shape ``batch`` and event shape (D,), with ``rsample``.

    Raises:
        ValueError: the network has fewer than three outputs.

    Source: Davidson et al. (2018), Hyperspherical Variational Auto-Encoders, arXiv:1804.00891.

    Example:
        >>> import torch
        >>> from pyro_vae import Mlp, VonMisesFisher
        >>> VonMisesFisher(Mlp(7, 16, 3 + 1))(torch.zeros(5, 7)).event_shape
        torch.Size([3])
    """

    def forward(self, x: Tensor) -> Distribution:
        """The distribution q(z | x)."""
        return spherical.VonMisesFisher(*self._parameters_of(x))
