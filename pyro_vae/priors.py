"""Priors p(z): each a module that returns a distribution. Any callable ``() -> Distribution`` will do as well."""

import torch
from pyro.distributions import Categorical, MixtureSameFamily, Normal
from torch import Tensor, nn

from pyro_vae.contracts import Distribution, EncoderLike, Prior


class StandardNormal(Prior):
    r"""The standard normal prior, the usual choice.

    .. math:: p(z) = \mathcal N(z; 0, s^2 I)

    A scale s other than 1 changes nothing for free networks (they rescale z), so it is 1 unless there is a reason.

    Args:
        latent_dim: number of latent dimensions D.
        scale: the standard deviation s.

    Returns:
        A distribution with batch shape () and event shape (D,).

    Raises:
        ValueError: latent_dim < 1 or scale <= 0.

    Source: Kingma, Welling (2014), Auto-Encoding Variational Bayes, arXiv:1312.6114.

    Example:
        >>> StandardNormal(2)().event_shape
        torch.Size([2])
    """

    loc: Tensor

    def __init__(self, latent_dim: int, scale: float = 1.0):
        super().__init__()
        _check_positive(latent_dim=latent_dim, scale=scale)
        self.latent_dim, self.scale = latent_dim, scale
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return f"latent_dim={self.latent_dim}, scale={self.scale}"

    def forward(self) -> Distribution:
        """The distribution p(z)."""
        return Normal(self.loc, torch.full_like(self.loc, self.scale)).to_event(1)


class MixtureOfNormals(Prior):
    r"""A mixture of C normals with learned weights, means and diagonal scales.

    .. math:: p(z) = \sum_{c=1}^C \pi_c \, \mathcal N(z; m_c, \operatorname{diag} s_c^2)

    The means start as draws from N(0, spread^2 I), the scales at 1, the weights equal.

    Args:
        latent_dim: number of latent dimensions D.
        num_components: number of components C.
        spread: standard deviation of the initial means.

    Returns:
        A distribution with batch shape () and event shape (D,).

    Raises:
        ValueError: latent_dim < 1, num_components < 1 or spread <= 0.

    Source: for instance Dilokthanakul et al. (2016), arXiv:1611.02648, which uses mixtures as priors of VAEs.

    Example:
        >>> MixtureOfNormals(2, num_components=10)().mean.shape
        torch.Size([2])
    """

    def __init__(self, latent_dim: int, num_components: int = 10, spread: float = 1.0):
        super().__init__()
        _check_positive(latent_dim=latent_dim, num_components=num_components, spread=spread)
        self.latent_dim, self.num_components = latent_dim, num_components
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.loc = nn.Parameter(spread * torch.randn(num_components, latent_dim))
        self.log_scale = nn.Parameter(torch.zeros(num_components, latent_dim))

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return f"latent_dim={self.latent_dim}, num_components={self.num_components}"

    def forward(self) -> Distribution:
        """The distribution p(z)."""
        components = Normal(self.loc, self.log_scale.exp()).to_event(1)
        return MixtureSameFamily(Categorical(logits=self.logits), components)


class VampPrior(Prior):
    r"""The variational mixture of posteriors: the encoder itself, averaged over C learned pseudo-inputs.

    .. math:: p(z) = \frac 1 C \sum_{c=1}^C q(z \mid u_c)

    It shares the encoder's parameters, so it follows the aggregate posterior as that moves. The pseudo-inputs
    start at rows of the data.

    Args:
        encoder: the encoder q(z | x) of the same VAE (the very same object).
        pseudo_inputs: rows of the training data, [N, *E], where the pseudo-inputs start.
        num_components: number of components C; if there are more rows, C of them are chosen at random.

    Returns:
        A distribution with batch shape () and event shape (D,).

    Raises:
        ValueError: pseudo_inputs is not a non-empty batch, or num_components < 1.

    Source: Tomczak, Welling (2018), VAE with a VampPrior, arXiv:1705.07120.

    Example:
        >>> from pyro_vae import DiagonalNormal, Mlp
        >>> encoder = DiagonalNormal(Mlp(7, 16, 2 * 2))
        >>> VampPrior(encoder, torch.rand(50, 7), num_components=5)().event_shape
        torch.Size([2])
    """

    def __init__(self, encoder: EncoderLike, pseudo_inputs: Tensor, num_components: int = 500):
        super().__init__()
        _check_positive(num_components=num_components)
        if pseudo_inputs.dim() < 2 or len(pseudo_inputs) == 0:
            raise ValueError(
                f"pseudo_inputs has shape {tuple(pseudo_inputs.shape)}, expected [N, *E] with N >= 1: "
                "pass rows of the training data."
            )
        self.encoder = encoder
        start = pseudo_inputs.detach()
        if len(start) > num_components:
            start = start[torch.randperm(len(start), device=start.device)[:num_components]]
        self.pseudo_inputs = nn.Parameter(start.clone() if start.is_floating_point() else start.float())

    def extra_repr(self) -> str:
        """Show the number of pseudo-inputs."""
        return f"num_components={len(self.pseudo_inputs)}"

    def forward(self) -> Distribution:
        """The distribution p(z)."""
        weights = self.pseudo_inputs.new_zeros(len(self.pseudo_inputs))
        return MixtureSameFamily(Categorical(logits=weights), self.encoder(self.pseudo_inputs))


def _check_positive(**arguments: float) -> None:
    for name, value in arguments.items():
        if not value > 0:
            raise ValueError(f"expected {name} > 0, found {value}: choose a positive number.")
