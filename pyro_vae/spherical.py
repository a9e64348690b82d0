r"""The unit sphere of R^D, for codes that are directions: its uniform prior, and distributions around a direction.

.. math:: q(z) = \frac{1}{|S|} \exp(\kappa \, T(\cos\theta) - g(\kappa)), \qquad \cos\theta = \mu^\top z, \quad |z| = 1,
    \qquad g(\kappa) = \log \mathbb E_{z \sim \text{uniform}} \, e^{\kappa T}

T is cos(theta) - 1 for von Mises and Fisher's distribution, log((1 + cos(theta)) / 2) for the power spherical one: 0 in
the mean direction, so that nothing large is subtracted from anything large. |S| is the sphere's area: densities are
with respect to it, and are to be compared with one another only. Numbers that depend on the concentration alone are
computed in double precision whatever the parameters' type.
"""

import math
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import register_kl
from torch.nn.functional import pad

from pyro_vae.contracts import Distribution, Prior, check_several

_NO_SHAPE = torch.Size()
_NUM_TERMS = 64  # of the sine series of an angle's density
_NUM_STEPS = 2  # of Newton's method before the last, from a start within 1 / 64 of the window
_REACH = 8.5  # standard deviations of the angle to either side of its mode; beyond lies some 1e-15


class SphereUniform(Prior):
    r"""The uniform distribution on the unit sphere of R^D, for codes that are directions.

    .. math:: p(z) = \frac{\Gamma(D / 2)}{2 \pi^{D / 2}}, \qquad |z| = 1

    The density is with respect to the sphere's area and zero elsewhere, so the encoder must give points of the sphere
    (with a density of the same kind): :class:`pyro_vae.PowerSpherical` or :class:`pyro_vae.VonMisesFisher`.

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
        check_several(latent_dim)
        self.latent_dim = latent_dim
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)

    def extra_repr(self) -> str:
        """Show the constructor's argument."""
        return f"latent_dim={self.latent_dim}"

    def forward(self) -> Distribution:
        """The distribution p(z)."""
        return OnSphere(self.loc)


class OnSphere(TorchDistribution):
    """Uniform on the unit sphere.

    Args:
        loc: zeros, [D], whose type and device the draws have.
        batch_shape: of independent draws.

    Example:
        >>> OnSphere(torch.zeros(3)).entropy().exp()  # the area, 4 pi
        tensor(12.5664)
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.sphere
    has_rsample = True

    def __init__(self, loc: Tensor, batch_shape: Any = _NO_SHAPE, validate_args: bool | None = None):
        self.loc = loc
        super().__init__(torch.Size(batch_shape), loc.shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """The centre of the sphere, [*batch, D]."""
        return self.loc.expand(self._extended_shape())

    @property
    def variance(self) -> Tensor:
        """1 / D for each coordinate, [*batch, D]."""
        return torch.full_like(self.mean, 1 / len(self.loc))

    def entropy(self) -> Tensor:
        """The logarithm of the area, [*batch], nats."""
        return self.loc.new_full(self.batch_shape, _log_area(len(self.loc)))

    def expand(self, batch_shape: Any, _instance: Any = None) -> "OnSphere":
        """The same distribution with a larger batch shape."""
        return OnSphere(self.loc, batch_shape, self._validate_args)

    def rsample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        """A draw z, [*sample_shape, *batch, D]."""
        return _direction(self._extended_shape(torch.Size(sample_shape)), self.loc)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log p of z [*any, *batch, D], nats: minus the logarithm of the area, and minus infinity off the sphere."""
        if self._validate_args:
            self._validate_sample(value)
        log_p = (0 * value.sum(-1)).masked_fill(~self.support.check(value), -math.inf) - _log_area(len(self.loc))
        return log_p.expand(torch.broadcast_shapes(log_p.shape, self.batch_shape))


class _AroundMean(TorchDistribution):
    """What the two families share: all but T, g = log E exp(kappa T), E T, and where the angle's density has its mode.

    A draw is a function of uniform noise u and of a random direction: the angle theta solves F(theta) = u, with F
    its distribution function; that vector is then reflected so that the first axis becomes the mean direction.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "loc": constraints.sphere,
        "concentration": constraints.positive,
    }
    support = constraints.sphere
    has_rsample = True

    def __init__(self, loc: Tensor, concentration: Tensor, batch_shape: Any = None, validate_args: bool | None = None):
        self.loc, self.concentration = loc, concentration
        own = torch.broadcast_shapes(loc.shape[:-1], concentration.shape)
        super().__init__(torch.Size(own if batch_shape is None else batch_shape), loc.shape[-1:], validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_AroundMean":
        """The same distribution with a larger batch shape; what depends on the parameters alone is not done twice."""
        return type(self)(self.loc, self.concentration, batch_shape, self._validate_args)

    @property
    def mode(self) -> Tensor:
        """The mean direction, [*batch, D]."""
        return self.loc.expand(self._extended_shape())

    @property
    def mean(self) -> Tensor:
        """The mean, inside the sphere, [*batch, D]."""
        return self._mean_cosine().to(self.loc.dtype).unsqueeze(-1) * self.mode

    def entropy(self) -> Tensor:
        """The entropy with respect to the sphere's area, [*batch], nats."""
        return _log_area(self.event_shape[0]) - self.kl_to_uniform()

    def kl_to_uniform(self) -> Tensor:
        """KL(q, uniform) = kappa E T - g, [*batch], nats, >= 0."""
        kl = self.concentration.double() * self._mean_statistic() - self._log_normalizer()
        return kl.to(self.loc.dtype).expand(self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log q of z [*any, *batch, D], nats."""
        if self._validate_args:
            self._validate_sample(value)
        near, far = (((value - sign * self.loc) ** 2).sum(-1) / 4 for sign in (1, -1))
        log_q = self.concentration * self._statistic(near, far) - self._log_normalizer().to(self.loc.dtype)
        return log_q.expand(torch.broadcast_shapes(log_q.shape, self.batch_shape)) - _log_area(self.event_shape[0])

    def rsample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        """A draw z, [*sample_shape, *batch, D], differentiable in both parameters."""
        *shape, dim = self._extended_shape(torch.Size(sample_shape))
        angle = self._angle(torch.rand(shape, dtype=torch.float64, device=self.loc.device)).unsqueeze(-1)
        # of +e_1 and -e_1 the one farther from the mean direction is reflected into it: the mirror stays well defined
        sign = torch.where(self.loc[..., :1] < 0, 1.0, -1.0).to(self.loc.dtype)
        cosine, sine = angle.cos().to(self.loc.dtype), angle.sin().to(self.loc.dtype)
        z = torch.cat([sign * cosine, sine * _direction([*shape, dim - 1], self.loc)], dim=-1)
        mirror = torch.cat([self.loc[..., :1] - sign, self.loc[..., 1:]], dim=-1)
        mirror = mirror / mirror.norm(dim=-1, keepdim=True)
        return z - 2 * (mirror * z).sum(-1, keepdim=True) * mirror

    def _angle(self, u: Tensor) -> Tensor:
        """The angle below which the share u [*any, *batch] of all draws lies, with its derivative in kappa.

        On a window around the mode theta = middle - half cos(phi), and the density times sin(phi) is a short sine
        series, which integrates to F = sum_k a_k (1 - cos(k phi)). Steps of Newton's method between two neighbours in
        a table find F = u. The derivative is the implicit one, dtheta / dkappa = -(dF / dkappa) / density.
        """
        log_density, phi, middle, half = self._log_density()
        k = torch.arange(1, _NUM_TERMS, dtype=u.dtype, device=u.device)
        weight = (log_density - log_density.detach().amax(-1, keepdim=True)).exp() * phi.sin()
        series = weight @ (phi.unsqueeze(-1) * k).sin() / k
        series = series / (2 * series[..., ::2].sum(-1, keepdim=True))  # F(pi) = 1
        tiny = torch.finfo(u.dtype).tiny

        def newton(phi: Tensor) -> Tensor:
            """-(F - u) / F'."""
            turns = phi.unsqueeze(-1) * k
            slope = (series * k * turns.sin()).sum(-1).detach().clamp(min=tiny)
            return (u - (series * (1 - turns.cos())).sum(-1)) / slope

        with torch.no_grad():
            table = series @ (1 - (phi.unsqueeze(-1) * k).cos()).T
            index = (table < u.unsqueeze(-1)).sum(-1)
            edges = pad(pad(phi, (1, 0)), (0, 1), value=math.pi)
            table = pad(pad(table, (1, 0)), (0, 1), value=1.0).expand(*u.shape, _NUM_TERMS + 2)
            low, high = edges[index], edges[index + 1]
            below, above = (table.gather(-1, (index + i).unsqueeze(-1)).squeeze(-1) for i in (0, 1))
            part = ((u - below) / (above - below).clamp(min=tiny)).clamp(0, 1)
            phi = (low.cos() + part * (high.cos() - low.cos())).acos()
            for _ in range(_NUM_STEPS):
                phi = (phi + newton(phi)).clamp(low, high)
        return middle - half * phi.cos() + half * phi.sin() * newton(phi)  # the last step brings the derivative

    def _log_density(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The log-density of the angle, up to a constant, [*batch, N] at phi [N]; middle and half of the window."""
        kappa, others = self.concentration.double(), self.event_shape[0] - 2
        phi = (torch.arange(_NUM_TERMS, dtype=kappa.dtype, device=kappa.device) + 0.5) * (math.pi / _NUM_TERMS)
        with torch.no_grad():
            mode, curvature = self._mode(kappa, others)
            chord = _REACH / (curvature * (1 + others / (others + 10))).sqrt()  # skew in few dimensions only
            reach = 2 * (chord / 2).clamp(max=1).asin()
            low, high = (mode - reach).clamp(min=0), (mode + reach).clamp(max=math.pi)
            middle, half = (low + high) / 2, (high - low) / 2
            angle = middle.unsqueeze(-1) - half.unsqueeze(-1) * phi.cos()
        statistic = self._statistic((angle / 2).sin() ** 2, (angle / 2).cos() ** 2)
        return kappa.unsqueeze(-1) * statistic + others * angle.sin().log(), phi, middle, half

    @abstractmethod
    def _statistic(self, near: Tensor, far: Tensor) -> Tensor:
        """T from sin^2(theta / 2) and cos^2(theta / 2)."""

    @abstractmethod
    def _log_normalizer(self) -> Tensor:
        """The function g of kappa, in double precision."""

    @abstractmethod
    def _mean_statistic(self) -> Tensor:
        """E T = dg / dkappa, in double precision."""

    @abstractmethod
    def _mean_cosine(self) -> Tensor:
        """E cos(theta), in double precision."""

    @abstractmethod
    def _mode(self, kappa: Tensor, others: int) -> tuple[Tensor, Tensor]:
        """Where the angle's density has its mode, and half of the log-density's curvature there (all of it in 2-D)."""


class PowerSpherical(_AroundMean):
    r"""The power spherical distribution on the unit sphere of R^D.

    .. math:: q(z) = \frac{1}{|S|} \, \frac{\Gamma(\alpha) \, \Gamma(2 \alpha + \kappa)}
        {\Gamma(2 \alpha) \, \Gamma(\alpha + \kappa)} \left( \frac{1 + \mu^\top z}{2} \right)^\kappa, \qquad
        \alpha = \frac{D - 1}{2}

    Everything but the angle's quantiles is in closed form: (1 + mu^T z) / 2 has the distribution
    Beta(alpha + kappa, alpha). Of the same mean it is close to von Mises and Fisher's.

    Args:
        loc: mean direction mu, a unit vector, [*batch, D].
        concentration: kappa > 0, [*batch].
        batch_shape: of the distribution, if larger than that of the parameters.

    Source: De Cao, Aziz (2020), The power spherical distribution, arXiv:2006.04437.

    Example:
        >>> q = PowerSpherical(torch.tensor([0.6, 0.0, 0.8]), torch.tensor(2.0))
        >>> q.log_prob(q.loc).exp() * 4 * math.pi  # in 3-D it is (1 + kappa) / (4 pi) there
        tensor(3.0000)
    """

    def _statistic(self, near: Tensor, far: Tensor) -> Tensor:
        # each where it is accurate
        log_far = far.clamp(min=torch.finfo(far.dtype).tiny).log()
        return torch.where(near < far, torch.log1p(-near.clamp(max=0.5)), log_far)

    def _parameters(self) -> tuple[Tensor, Tensor]:
        kappa, alpha = self.concentration.double(), (self.event_shape[0] - 1) / 2
        return alpha + kappa, 2 * alpha + kappa

    def _log_normalizer(self) -> Tensor:
        (a, b), alpha = self._parameters(), (self.event_shape[0] - 1) / 2
        return a.lgamma() - b.lgamma() + (math.lgamma(2 * alpha) - math.lgamma(alpha))

    def _mean_statistic(self) -> Tensor:
        a, b = self._parameters()
        return a.digamma() - b.digamma()

    def _mean_cosine(self) -> Tensor:
        return self.concentration.double() / self._parameters()[1]

    def _mode(self, kappa: Tensor, others: int) -> tuple[Tensor, Tensor]:
        return 2 * (others / (2 * kappa + others)).sqrt().atan(), (kappa + others) / 2


class VonMisesFisher(_AroundMean):
    r"""Von Mises and Fisher's distribution, the normal distribution of the unit sphere of R^D.

    .. math:: q(z) = \frac{\kappa^\nu}{(2 \pi)^{D / 2} \, I_\nu(\kappa)} \, e^{\kappa \mu^\top z}, \qquad
        \nu = \frac D 2 - 1

    It is N(mu, I / kappa) restricted to the sphere. The Bessel function I never appears: the normaliser is an integral
    over the angle, a sum of 64 terms, right to some 12 digits for any D and kappa; and no draw is rejected.

    Args:
        loc: mean direction mu, a unit vector, [*batch, D].
        concentration: kappa > 0, [*batch].
        batch_shape: of the distribution, if larger than that of the parameters.

    Source: Davidson et al. (2018), Hyperspherical Variational Auto-Encoders, arXiv:1804.00891.

    Example:
        >>> q = VonMisesFisher(torch.tensor([0.6, 0.0, 0.8]), torch.tensor(2.0))
        >>> q.mean.norm(), 1 / math.tanh(2.0) - 1 / 2.0  # in 3-D
        (tensor(0.5373), 0.537...)
    """

    def _statistic(self, near: Tensor, far: Tensor) -> Tensor:
        return -2 * near

    def _log_integrand(self) -> tuple[Tensor, Tensor]:
        """Logarithms of the terms whose sum is the integral of the angle's density, and T, each [*batch, N]."""
        log_density, phi, middle, half = self._log_density()
        k = torch.arange(1, _NUM_TERMS, 2, dtype=phi.dtype, device=phi.device)
        weight = phi.sin() * ((phi.unsqueeze(-1) * k).sin() / k).sum(-1) * (4 / _NUM_TERMS)
        angle = middle.unsqueeze(-1) - half.unsqueeze(-1) * phi.cos()
        log_terms = log_density + weight.log() + half.log().unsqueeze(-1)
        return log_terms, self._statistic((angle / 2).sin() ** 2, (angle / 2).cos() ** 2)

    def _log_normalizer(self) -> Tensor:
        dim = self.event_shape[0]
        log_uniform = 0.5 * math.log(math.pi) + math.lgamma((dim - 1) / 2) - math.lgamma(dim / 2)
        return self._log_integrand()[0].logsumexp(-1) - log_uniform

    def _mean_statistic(self) -> Tensor:
        log_terms, statistic = self._log_integrand()
        return (log_terms.softmax(-1) * statistic).sum(-1)

    def _mean_cosine(self) -> Tensor:
        return 1 + self._mean_statistic()

    def _mode(self, kappa: Tensor, others: int) -> tuple[Tensor, Tensor]:
        cosine = 2 * kappa / (others + (others**2 + 4 * kappa**2).sqrt())
        return cosine.acos(), kappa * (cosine + 1 / cosine) / 2


@register_kl(OnSphere, OnSphere)
def _kl_uniform(p: OnSphere, q: OnSphere) -> Tensor:
    return p.loc.new_zeros(torch.broadcast_shapes(p.batch_shape, q.batch_shape))


@register_kl(_AroundMean, OnSphere)
def _kl_to_uniform(p: _AroundMean, q: OnSphere) -> Tensor:
    return p.kl_to_uniform().expand(torch.broadcast_shapes(p.batch_shape, q.batch_shape))


def _log_area(dim: int) -> float:
    """Logarithm of the area of the unit sphere of R^D."""
    return math.log(2) + 0.5 * dim * math.log(math.pi) - math.lgamma(dim / 2)


def _direction(shape: Any, like: Tensor) -> Tensor:
    """Uniform draws from the unit sphere, [*batch, D]."""
    z = torch.randn(shape, dtype=like.dtype, device=like.device)
    return z / z.norm(dim=-1, keepdim=True)
