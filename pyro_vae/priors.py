"""Priors p(z): each a module that returns a distribution. Any callable ``() -> Distribution`` will do as well.

A prior that depends on a label y is the same with an argument, that is: an encoder. In a model of your own
``prior = DiagonalNormal(nn.Linear(C, 2 * D))`` is a learned p(z | y), and ``pyro.sample("z", prior(y))`` draws from it.
"""

import math
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor, nn

from pyro_vae.contracts import Distribution, EncoderLike, Prior, check_positive, check_several
from pyro_vae.simplex import Dirichlet as Dirichlet
from pyro_vae.simplex import LogisticNormal as LogisticNormal
from pyro_vae.spherical import SphereUniform as SphereUniform


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
        check_positive(latent_dim=latent_dim, scale=scale)
        self.latent_dim, self.scale = latent_dim, scale
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return f"latent_dim={self.latent_dim}, scale={self.scale}"

    def forward(self) -> Distribution:
        """The distribution p(z)."""
        return dist.Normal(self.loc, torch.full_like(self.loc, self.scale)).to_event(1)


class LearnedNormal(Prior):
    r"""A normal prior with a learned mean and diagonal scale.

    .. math:: p(z) = \mathcal N(z; m, \operatorname{diag} s^2)

    It starts as the standard normal. Free networks can shift and rescale z themselves; constrained ones cannot.

    Args:
        latent_dim: number of latent dimensions D.

    Returns:
        A distribution with batch shape () and event shape (D,), with ``rsample``.

    Raises:
        ValueError: latent_dim < 1.

    Source: the definition.

    Example:
        >>> LearnedNormal(2)().log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    def __init__(self, latent_dim: int):
        super().__init__()
        check_positive(latent_dim=latent_dim)
        self.latent_dim = latent_dim
        self.loc = nn.Parameter(torch.zeros(latent_dim))
        self.log_scale = nn.Parameter(torch.zeros(latent_dim))

    def extra_repr(self) -> str:
        """Show the constructor's argument."""
        return f"latent_dim={self.latent_dim}"

    def forward(self) -> Distribution:
        """The distribution p(z)."""
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)


class Laplace(Prior):
    r"""Independent Laplace distributions: sharper at 0 than the normal, with exponential tails.

    .. math:: p(z) = \prod_d \frac 1 {2 b} \exp(-|z_d| / b)

    It is not invariant under rotation, so it favours codes along the axes. Its standard deviation is sqrt(2) b.

    Args:
        latent_dim: number of latent dimensions D.
        scale: the scale b.

    Returns:
        A distribution with batch shape () and event shape (D,), with ``rsample``.

    Raises:
        ValueError: latent_dim < 1 or scale <= 0.

    Source: the definition.

    Example:
        >>> Laplace(2, scale=0.5)().log_prob(torch.zeros(2))
        tensor(0.)
    """

    loc: Tensor

    def __init__(self, latent_dim: int, scale: float = 1.0):
        super().__init__()
        check_positive(latent_dim=latent_dim, scale=scale)
        self.latent_dim, self.scale = latent_dim, scale
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return f"latent_dim={self.latent_dim}, scale={self.scale}"

    def forward(self) -> Distribution:
        """The distribution p(z)."""
        return dist.Laplace(self.loc, torch.full_like(self.loc, self.scale)).to_event(1)


class StudentT(Prior):
    r"""Independent Student t distributions: heavy tails, so a code far out costs little.

    .. math:: p(z) = \prod_d \frac{\Gamma(\frac{\nu + 1} 2)}{\Gamma(\frac \nu 2) \sqrt{\pi \nu} \, s}
        \left( 1 + \frac{z_d^2}{\nu s^2} \right)^{-(\nu + 1) / 2}

    The normal is the limit of large df; the mean needs df > 1 and the variance, s^2 df / (df - 2), df > 2.

    Args:
        latent_dim: number of latent dimensions D.
        df: degrees of freedom.
        scale: the scale s.

    Returns:
        A distribution with batch shape () and event shape (D,), with ``rsample``.

    Raises:
        ValueError: latent_dim < 1, df <= 0 or scale <= 0.

    Source: the definition.

    Example:
        >>> StudentT(3, df=4.0)().variance
        tensor([2., 2., 2.])
    """

    loc: Tensor

    def __init__(self, latent_dim: int, df: float = 5.0, scale: float = 1.0):
        super().__init__()
        check_positive(latent_dim=latent_dim, df=df, scale=scale)
        self.latent_dim, self.df, self.scale = latent_dim, df, scale
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return f"latent_dim={self.latent_dim}, df={self.df}, scale={self.scale}"

    def forward(self) -> Distribution:
        """The distribution p(z)."""
        df, scale = (torch.full_like(self.loc, value) for value in (self.df, self.scale))
        return dist.StudentT(df, self.loc, scale).to_event(1)


class Mixture(dist.MixtureSameFamily):
    """A mixture that scores diagonal normals by two matrix products, not by a [*batch, C, D] tensor.

    Many draws of z against hundreds of components are what evaluating takes its time with. The square is multiplied
    out, which cancels digits where scales are small: it is summed in double precision.
    """

    _original: "Mixture | None" = None  # what an expanded one was made from

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Mixture":
        """One for each element of a batch: all of them the same mixture."""
        new = super().expand(batch_shape, _instance)
        new._original = self._original or self
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log p(z), the shape of the batch."""
        mixture = self._original or self
        components = mixture.component_distribution
        normal = getattr(components, "base_dist", None)
        if type(normal) is not dist.Normal or normal.batch_shape[:-1] != components.batch_shape or mixture.batch_shape:
            return super().log_prob(value)
        if self._validate_args:
            self._validate_sample(value)
        z, loc, precision = value.double(), normal.loc.double(), normal.scale.double() ** -2
        square = z**2 @ precision.mT - 2 * z @ (loc * precision).mT + (loc**2 * precision).sum(-1)
        log_scale = normal.scale.double().log().sum(-1) + 0.5 * math.log(2 * math.pi) * loc.shape[-1]
        log_weights = mixture.mixture_distribution.logits.log_softmax(-1)
        log_prob = (log_weights - log_scale - 0.5 * square).logsumexp(-1).to(value.dtype)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))


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
        check_positive(latent_dim=latent_dim, num_components=num_components, spread=spread)
        self.latent_dim, self.num_components = latent_dim, num_components
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.loc = nn.Parameter(spread * torch.randn(num_components, latent_dim))
        self.log_scale = nn.Parameter(torch.zeros(num_components, latent_dim))

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return f"latent_dim={self.latent_dim}, num_components={self.num_components}"

    def forward(self) -> Distribution:
        """The distribution p(z)."""
        components = dist.Normal(self.loc, self.log_scale.exp()).to_event(1)
        return Mixture(dist.Categorical(logits=self.logits), components)


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
        check_positive(num_components=num_components)
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
        return Mixture(dist.Categorical(logits=weights), self.encoder(self.pseudo_inputs))


class OneHotCategorical(Prior):
    r"""One of D classes, as a vector with a single 1.

    .. math:: p(z = e_d) = \pi_d

    A discrete code: train it with ``pyro.infer.TraceEnum_ELBO`` or ``TraceGraph_ELBO``.

    Args:
        latent_dim: number of classes D.
        learn: learn the probabilities; else they are equal.

    Returns:
        A distribution with batch shape () and event shape (D,), without ``rsample``.

    Raises:
        ValueError: latent_dim < 2.

    Source: the definition.

    Example:
        >>> OneHotCategorical(4)().log_prob(torch.tensor([0.0, 0.0, 1.0, 0.0])).exp()
        tensor(0.2500)
    """

    logits: Tensor

    def __init__(self, latent_dim: int, learn: bool = False):
        super().__init__()
        check_several(latent_dim)
        self.latent_dim, self.learn = latent_dim, learn
        if learn:
            self.logits = nn.Parameter(torch.zeros(latent_dim))
        else:
            self.register_buffer("logits", torch.zeros(latent_dim), persistent=False)

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return f"latent_dim={self.latent_dim}, learn={self.learn}"

    def forward(self) -> Distribution:
        """The distribution p(z)."""
        return dist.OneHotCategorical(logits=self.logits)


class Bernoulli(Prior):
    r"""Independent bits.

    .. math:: p(z) = \prod_d \pi^{z_d} (1 - \pi)^{1 - z_d}, \qquad z_d \in \{0, 1\}

    A discrete code: train it with ``pyro.infer.TraceGraph_ELBO``.

    Args:
        latent_dim: number of bits D.
        probs: the probability of a 1.

    Returns:
        A distribution with batch shape () and event shape (D,), without ``rsample``.

    Raises:
        ValueError: latent_dim < 1, or probs is not between 0 and 1.

    Source: the definition.

    Example:
        >>> Bernoulli(3)().log_prob(torch.tensor([0.0, 1.0, 1.0])).exp()
        tensor(0.1250)
    """

    ones: Tensor

    def __init__(self, latent_dim: int, probs: float = 0.5):
        super().__init__()
        check_positive(latent_dim=latent_dim)
        if not 0 < probs < 1:
            raise ValueError(f"expected 0 < probs < 1, found {probs}: it is the probability of a 1.")
        self.latent_dim, self.probs = latent_dim, probs
        self.register_buffer("ones", torch.ones(latent_dim), persistent=False)

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return f"latent_dim={self.latent_dim}, probs={self.probs}"

    def forward(self) -> Distribution:
        """The distribution p(z)."""
        return dist.Bernoulli(self.probs * self.ones).to_event(1)
