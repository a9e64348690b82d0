"""Priors p(z): each a module that returns a distribution. Any callable ``() -> Distribution`` will do as well."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from pyro import distributions as dist
from pyro.distributions import constraints
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
        _check_positive(latent_dim=latent_dim)
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
        _check_positive(latent_dim=latent_dim, scale=scale)
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
        _check_positive(latent_dim=latent_dim, df=df, scale=scale)
        self.latent_dim, self.df, self.scale = latent_dim, df, scale
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return f"latent_dim={self.latent_dim}, df={self.df}, scale={self.scale}"

    def forward(self) -> Distribution:
        """The distribution p(z)."""
        df, scale = (torch.full_like(self.loc, value) for value in (self.df, self.scale))
        return dist.StudentT(df, self.loc, scale).to_event(1)


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
        components = dist.Normal(self.loc, self.log_scale.exp()).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), components)


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
        return dist.MixtureSameFamily(dist.Categorical(logits=weights), self.encoder(self.pseudo_inputs))


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
        _check_positive(scale=scale)
        _check_several(latent_dim)
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
        _check_positive(concentration=concentration)
        _check_several(latent_dim)
        self.latent_dim, self.concentration = latent_dim, concentration
        self.register_buffer("ones", torch.ones(latent_dim), persistent=False)

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return f"latent_dim={self.latent_dim}, concentration={self.concentration}"

    def forward(self) -> Distribution:
        """The distribution p(z)."""
        return dist.Dirichlet(self.concentration * self.ones)


class SphereUniform(Prior):
    r"""The uniform distribution on the unit sphere of R^D, for codes that are directions.

    .. math:: p(z) = \frac{\Gamma(D / 2)}{2 \pi^{D / 2}}, \qquad |z| = 1

    The density is with respect to the sphere's area and zero elsewhere, so the encoder must give points of the sphere
    (with a density of the same kind).

    Args:
        latent_dim: number of coordinates D; the sphere itself has D - 1 dimensions.

    Returns:
        A distribution with batch shape () and event shape (D,), with ``rsample``.

    Raises:
        ValueError: latent_dim < 2.

    Source: Davidson et al. (2018), Hyperspherical Variational Auto-Encoders, arXiv:1804.00891.

    Example:
        >>> 1 / SphereUniform(2)().log_prob(torch.tensor([0.6, 0.8])).exp()  # the circle has length 2 pi
        tensor(6.2832)
    """

    loc: Tensor

    def __init__(self, latent_dim: int):
        super().__init__()
        _check_several(latent_dim)
        self.latent_dim = latent_dim
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)

    def extra_repr(self) -> str:
        """Show the constructor's argument."""
        return f"latent_dim={self.latent_dim}"

    def forward(self) -> Distribution:
        """The distribution p(z)."""
        return _OnSphere(self.loc)


class _OnSphere(dist.TorchDistribution):
    """Uniform on the unit sphere around loc = 0, [D], whose type and device the draws have."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.sphere
    has_rsample = True

    def __init__(self, loc: Tensor, batch_shape: Sequence[int] = (), validate_args: bool | None = None):
        self.loc = loc
        super().__init__(torch.Size(batch_shape), loc.shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        return self.loc.expand(self._extended_shape())

    @property
    def variance(self) -> Tensor:
        return torch.full_like(self.mean, 1 / len(self.loc))

    def expand(self, batch_shape: Sequence[int], _instance: None = None) -> "_OnSphere":
        return _OnSphere(self.loc, batch_shape, self._validate_args)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        z = torch.randn(self._extended_shape(torch.Size(sample_shape)), dtype=self.loc.dtype, device=self.loc.device)
        return z / z.norm(dim=-1, keepdim=True)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        half = len(self.loc) / 2
        density = math.lgamma(half) - math.log(2) - half * math.log(math.pi)
        log_p = (0 * value.sum(-1)).masked_fill(~self.support.check(value), -math.inf) + density
        return log_p.expand(torch.broadcast_shapes(log_p.shape, self.batch_shape))


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
        _check_several(latent_dim)
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
        _check_positive(latent_dim=latent_dim)
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


def _check_positive(**arguments: float) -> None:
    for name, value in arguments.items():
        if not value > 0:
            raise ValueError(f"expected {name} > 0, found {value}: choose a positive number.")


def _check_several(latent_dim: int) -> None:
    if latent_dim < 2:
        raise ValueError(f"expected latent_dim >= 2, found {latent_dim}: this prior needs two numbers or more.")
