"""Likelihoods p(x | z): each turns a network's output h into a distribution over x.

All take h = [*batch, num_outputs * E[0], *E[1:]] and return a normalised distribution with batch shape ``batch`` and
event shape E. Scores are nats, summed over the E axes.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro import distributions as dist
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import SigmoidTransform, biject_to, constraints, transform_to
from torch.nn.functional import softplus

from pyro_vae.contracts import Distribution, Likelihood

_CLIP = 1e-3  # a mean of exactly 0 or 1 would need an infinite logit; Burda et al.'s code clips at the same value


def _logit(mean: Tensor) -> Tensor:
    return mean.clamp(_CLIP, 1 - _CLIP).logit()


def inverse_softplus(value: Tensor) -> Tensor:
    """The number whose softplus is ``value`` > 0."""
    return value + torch.log(-torch.expm1(-value))


def split_outputs(likelihood: Likelihood, h: Tensor) -> Sequence[Tensor]:
    """The num_outputs parts of a network's output, each [*batch, *E].

    Args:
        likelihood: says how many parts, and how many axes E has.
        h: the network's output, [*batch, num_outputs * E[0], *E[1:]].

    Raises:
        ValueError: the parts would not be equal.
    """
    parts, axis = likelihood.num_outputs, -likelihood.event_dim
    if h.shape[axis] % parts:  # unequal parts would broadcast
        raise ValueError(
            f"{type(likelihood).__name__} expected {parts} E outputs of the network, found {h.shape[axis]} on axis "
            f"{axis}: make its last layer {'twice' if parts == 2 else f'{parts} times'} as wide as x."
        )
    return h.chunk(parts, dim=axis)


class Bernoulli(Likelihood):
    r"""Bernoulli likelihood for binary x; the network gives logits.

    .. math:: p(x \mid h) = \prod_i \sigma(h_i)^{x_i} (1 - \sigma(h_i))^{1 - x_i}, \qquad x_i \in \{0, 1\}

    Grey pixels are refused: their cross-entropy is no likelihood (it does not integrate to one). Binarise them, or
    use :class:`ContinuousBernoulli`.

    Args:
        event_dim: axes of one example: 1 for vectors [E], 3 for images [C, H, W].

    Source: Kingma, Welling (2014), appendix C.1, arXiv:1312.6114.

    Example:
        >>> Bernoulli()(torch.zeros(3, 5, 7)).log_prob(torch.ones(5, 7)).shape
        torch.Size([3, 5])
    """

    def forward(self, h: Tensor) -> Distribution:
        """The distribution p(x | h)."""
        return dist.Bernoulli(logits=h).to_event(self.event_dim)

    def output_bias(self, mean: Tensor, scale: Tensor) -> Tensor:
        """The logit of the mean, clipped to [0.001, 0.999]."""
        return _logit(mean)


class ContinuousBernoulli(Likelihood):
    r"""Continuous Bernoulli likelihood for x in [0, 1], such as grey pixels; the network gives logits of lambda.

    .. math:: p(x \mid h) = \prod_i C(\lambda_i) \lambda_i^{x_i} (1 - \lambda_i)^{1 - x_i}, \quad
        C(\lambda) = \frac{2 \operatorname{artanh}(1 - 2 \lambda)}{1 - 2 \lambda}, \quad \lambda = \sigma(h)

    The Bernoulli formula with the constant that makes it a density. Its mean is not lambda: show ``.mean``.

    Args:
        event_dim: axes of one example: 1 for vectors [E], 3 for images [C, H, W].

    Source: Loaiza-Ganem, Cunningham (2019), The continuous Bernoulli, arXiv:1907.06845.

    Example:
        >>> ContinuousBernoulli()(torch.zeros(5, 7)).log_prob(torch.full((5, 7), 0.3)).allclose(torch.zeros(5))
        True
    """

    def forward(self, h: Tensor) -> Distribution:
        """The distribution p(x | h)."""
        return dist.ContinuousBernoulli(logits=h).to_event(self.event_dim)

    def output_bias(self, mean: Tensor, scale: Tensor) -> Tensor:
        """A logit whose continuous Bernoulli has about the data's mean (the mean is steeper in lambda near 0 and 1).

        Solved by bisection in double precision: the mean is a monotone function of the logit.
        """
        target = mean.double().clamp(0.02, 0.98)
        low, high = torch.full_like(target, -60.0), torch.full_like(target, 60.0)
        for _ in range(60):
            middle = (low + high) / 2
            below = dist.ContinuousBernoulli(logits=middle).mean < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return ((low + high) / 2).to(mean.dtype)


class Binomial(Likelihood):
    r"""Binomial likelihood for counts 0..n, such as the inked points of a block of pixels; the network gives logits.

    .. math:: p(x \mid h) = \prod_i \binom{n}{x_i} \sigma(h_i)^{x_i} (1 - \sigma(h_i))^{n - x_i}

    Args:
        total_count: the largest count n.
        event_dim: axes of one example: 1 for vectors [E], 3 for images [C, H, W].

    Raises:
        ValueError: total_count < 1.

    Source: the definition; n = 1 is :class:`Bernoulli`.

    Example:
        >>> Binomial(16)(torch.zeros(5, 7)).mean[0, 0]
        tensor(8.)
    """

    def __init__(self, total_count: int, event_dim: int = 1):
        super().__init__(event_dim)
        if total_count < 1:
            raise ValueError(f"expected total_count >= 1, found {total_count}: it is the largest count of x.")
        self.total_count = total_count

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return f"total_count={self.total_count}, {super().extra_repr()}"

    def forward(self, h: Tensor) -> Distribution:
        """The distribution p(x | h)."""
        return dist.Binomial(self.total_count, logits=h).to_event(self.event_dim)

    def output_bias(self, mean: Tensor, scale: Tensor) -> Tensor:
        """The logit of mean / n, clipped to [0.001, 0.999]."""
        return _logit(mean / self.total_count)


class _LocationScale(Likelihood):
    """One scale for all of x, fixed or learned; the network gives the location."""

    log_scale: Tensor

    def __init__(self, scale: float, learn_scale: bool, event_dim: int):
        super().__init__(event_dim)
        if not scale > 0:
            raise ValueError(f"expected scale > 0, found {scale}: it is the width of a density.")
        self.learn_scale = learn_scale
        log_scale = torch.tensor(math.log(scale))
        if learn_scale:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    @property
    def scale(self) -> Tensor:
        """The scale, a scalar tensor."""
        return self.log_scale.exp()

    def extra_repr(self) -> str:
        """Show the current scale."""
        return f"scale={self.scale.item():.4g}, learn_scale={self.learn_scale}, {super().extra_repr()}"

    def output_bias(self, mean: Tensor, scale: Tensor) -> Tensor:
        """The mean."""
        return mean


class Normal(_LocationScale):
    r"""Normal likelihood with one scale for all of x; the network gives the mean.

    .. math:: p(x \mid h) = \prod_i \mathcal N(x_i; h_i, \sigma^2)

    A fixed scale is a weight: the log-likelihood is the squared error times -1/(2 sigma^2) plus a constant, so
    sigma^2 = 1/2 is "sum of squares against KL". A learned one settles at sigma^2 = mean squared error, where
    :class:`OptimalNormal` is from the start.

    Args:
        scale: the standard deviation sigma (where learning starts, if it is learned).
        learn_scale: learn sigma as one parameter instead of fixing it.
        event_dim: axes of one example: 1 for vectors [E], 3 for images [C, H, W].

    Raises:
        ValueError: scale <= 0.

    Source: Rybkin, Daniilidis, Levine (2021), Simple and effective VAE training with calibrated decoders,
        arXiv:2006.13202.

    Example:
        >>> Normal(scale=0.5)(torch.zeros(5, 7)).stddev[0, 0].detach()
        tensor(0.5000)
    """

    def __init__(self, scale: float = 1.0, learn_scale: bool = True, event_dim: int = 1):
        super().__init__(scale, learn_scale, event_dim)

    def forward(self, h: Tensor) -> Distribution:
        """The distribution p(x | h)."""
        return dist.Normal(h, self.scale.expand_as(h)).to_event(self.event_dim)


class _AtBatchOptimum(dist.Normal):
    """The normal distribution that an :class:`OptimalNormal` in training mode gives."""

    def __init__(self, loc: Tensor, owner: Any, validate_args: bool | None = None):
        self.owner = owner
        super().__init__(loc, owner.scale.expand_as(loc), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_AtBatchOptimum":
        return _AtBatchOptimum(self.loc.expand(torch.Size(batch_shape)), self.owner, self._validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of x [*sample_shape, *batch] at the scale that is best for all of it."""
        if self._validate_args:
            self._validate_sample(value)
        square = (value - self.loc) ** 2
        optimum = square.detach().mean().clamp(min=self.owner.min_scale**2)
        if torch.is_grad_enabled():  # who only looks changes nothing
            self.owner.follow(optimum)
        return -0.5 * (square / optimum + (2 * math.pi * optimum).log())


class OptimalNormal(Likelihood):
    r"""Normal likelihood with the scale that is best for the data, in closed form; the network gives the mean.

    .. math:: p(x \mid h) = \prod_i \mathcal N(x_i; h_i, \sigma^2), \qquad
        \sigma^2 = \arg\max_{\sigma^2} \sum \log p = \text{mean of } (x_i - h_i)^2

    Nothing to tune and nothing to wait for: no sigma fits the batch better, and since it is a maximum its own gradient
    vanishes. As in batch normalisation, a batch in training mode is scored with its own optimum (over particles,
    examples and numbers of x), and a running mean of the optima is kept; in evaluation mode sigma is that running
    value, which knows nothing of the x that it scores. So all estimates are of a proper density, while the objective
    shown during training is a little too good, by about 1/(2 B) nats for a batch of B examples.

    Args:
        momentum: weight of the latest batch in the running mean (the first batches: 1, 1/2, 1/3, ...).
        min_scale: the smallest standard deviation, which keeps the density bounded where z can reproduce x exactly.
        event_dim: axes of one example: 1 for vectors [E], 3 for images [C, H, W].

    Raises:
        ValueError: momentum outside (0, 1], or min_scale <= 0.

    Source: Rybkin, Daniilidis, Levine (2021), Simple and effective VAE training with calibrated decoders,
        arXiv:2006.13202.

    Example:
        >>> likelihood, x = OptimalNormal(), torch.tensor([[3.0, 4.0]])
        >>> _ = likelihood(torch.zeros(1, 2)).log_prob(x)
        >>> likelihood.scale**2
        tensor(12.5000)
    """

    mean_square: Tensor
    num_batches: Tensor

    def __init__(self, momentum: float = 0.1, min_scale: float = 1e-3, event_dim: int = 1):
        super().__init__(event_dim)
        if not 0 < momentum <= 1:
            raise ValueError(f"expected momentum in (0, 1], found {momentum}: it weights the latest batch.")
        if not min_scale > 0:
            raise ValueError(f"expected min_scale > 0, found {min_scale}: it is a standard deviation.")
        self.momentum, self.min_scale = momentum, min_scale
        self.register_buffer("mean_square", torch.tensor(1.0))
        self.register_buffer("num_batches", torch.tensor(0.0))

    @property
    def scale(self) -> Tensor:
        """The running scale sigma, a scalar tensor; 1 before any training."""
        return self.mean_square.sqrt()

    def extra_repr(self) -> str:
        """Show the constructor's arguments and the current scale."""
        shown = f"scale={self.scale.item():.4g}, momentum={self.momentum}, min_scale={self.min_scale}"
        return f"{shown}, {super().extra_repr()}"

    def follow(self, optimum: Tensor) -> None:
        """Take the optimal variance of one more batch into the running mean."""
        with torch.no_grad():
            self.num_batches += 1
            weight = (1 / self.num_batches).clamp(min=self.momentum)
            self.mean_square += weight * (optimum - self.mean_square)

    def forward(self, h: Tensor) -> Distribution:
        """The distribution p(x | h): in evaluation mode a normal one, in training mode one that fits its scale to x."""
        p = _AtBatchOptimum(h, self) if self.training else dist.Normal(h, self.scale.expand_as(h))
        return p.to_event(self.event_dim)

    def output_bias(self, mean: Tensor, scale: Tensor) -> Tensor:
        """The mean."""
        return mean


class Laplace(_LocationScale):
    r"""Laplace likelihood with one scale for all of x; the network gives the location, which is mean and median.

    .. math:: p(x \mid h) = \prod_i \frac{1}{2 b} \exp\left(-\frac{|x_i - h_i|}{b}\right)

    The absolute error in place of the squared one: an outlier pulls no harder than any other number. A learned b
    settles at the mean absolute error; the standard deviation is b times the square root of 2.

    Args:
        scale: the mean absolute deviation b (where learning starts, if it is learned).
        learn_scale: learn b as one parameter instead of fixing it.
        event_dim: axes of one example: 1 for vectors [E], 3 for images [C, H, W].

    Raises:
        ValueError: scale <= 0.

    Source: the definition.

    Example:
        >>> Laplace(scale=0.5)(torch.zeros(5, 7)).log_prob(torch.zeros(7)).detach()
        tensor([0., 0., 0., 0., 0.])
    """

    def __init__(self, scale: float = 1.0, learn_scale: bool = True, event_dim: int = 1):
        super().__init__(scale, learn_scale, event_dim)

    def forward(self, h: Tensor) -> Distribution:
        """The distribution p(x | h)."""
        return dist.Laplace(h, self.scale.expand_as(h)).to_event(self.event_dim)


class StudentT(_LocationScale):
    r"""Student's t likelihood with one scale for all of x; the network gives the location.

    .. math:: p(x \mid h) = \prod_i \frac{\Gamma(\frac{\nu + 1}{2})}{\Gamma(\frac \nu 2) \sqrt{\pi \nu} \, s}
        \left(1 + \frac{(x_i - h_i)^2}{\nu s^2}\right)^{-(\nu + 1) / 2}

    The pull of an outlier falls again beyond s times the square root of nu: gross errors in the data are left alone.
    The standard deviation is s times the square root of nu / (nu - 2), infinite for nu <= 2.

    Args:
        df: degrees of freedom nu: small for heavy tails; the normal likelihood is the limit.
        scale: the scale s (where learning starts, if it is learned).
        learn_scale: learn s as one parameter instead of fixing it.
        event_dim: axes of one example: 1 for vectors [E], 3 for images [C, H, W].

    Raises:
        ValueError: df <= 1, scale <= 0.

    Source: the definition.

    Example:
        >>> StudentT(df=4.0, scale=0.5)(torch.zeros(5, 7)).variance[0, 0].detach()
        tensor(0.5000)
    """

    def __init__(self, df: float = 5.0, scale: float = 1.0, learn_scale: bool = True, event_dim: int = 1):
        super().__init__(scale, learn_scale, event_dim)
        if not df > 1:
            raise ValueError(f"expected df > 1, found {df}: with less, x has no mean to show.")
        self.df = df

    def extra_repr(self) -> str:
        """Show the constructor's arguments and the current scale."""
        return f"df={self.df:g}, {super().extra_repr()}"

    def forward(self, h: Tensor) -> Distribution:
        """The distribution p(x | h)."""
        return dist.StudentT(self.df, h, self.scale.expand_as(h)).to_event(self.event_dim)


class HeteroscedasticNormal(Likelihood):
    r"""Normal likelihood whose scale the network gives for each number of x, beside the mean.

    .. math:: p(x \mid h) = \prod_i \mathcal N(x_i; m_i, s_i^2), \qquad
        h = (m, r), \quad s_i = s_{\min} + \operatorname{softplus}(r_i)

    The floor keeps the density bounded: without it, a column that z can reproduce exactly sends the bound to infinity.

    Args:
        min_scale: the smallest standard deviation, in the units of x.
        event_dim: axes of one example: 1 for vectors [E], 3 for images [C, H, W].

    Raises:
        ValueError: min_scale <= 0, or an odd number of outputs.

    Source: Nix, Weigend (1994), Estimating the mean and variance of the target probability distribution.

    Example:
        >>> HeteroscedasticNormal()(torch.zeros(5, 2 * 7)).event_shape
        torch.Size([7])
    """

    num_outputs = 2

    def __init__(self, min_scale: float = 0.01, event_dim: int = 1):
        super().__init__(event_dim)
        if not min_scale > 0:
            raise ValueError(f"expected min_scale > 0, found {min_scale}: it is a standard deviation.")
        self.min_scale = min_scale

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return f"min_scale={self.min_scale}, {super().extra_repr()}"

    def forward(self, h: Tensor) -> Distribution:
        """The distribution p(x | h)."""
        loc, raw = split_outputs(self, h)
        return dist.Normal(loc, self.min_scale + softplus(raw)).to_event(self.event_dim)

    def output_bias(self, mean: Tensor, scale: Tensor) -> Tensor:
        """The mean, and the inverse softplus of the scale."""
        return torch.cat([mean, inverse_softplus((scale - self.min_scale).clamp(min=1e-3))])


class LogNormal(Likelihood):
    r"""Log-normal likelihood for positive numbers of several sizes, such as prices; the network gives two for each.

    .. math:: p(x \mid h) = \prod_i \frac{1}{x_i} \mathcal N(\log x_i; m_i, s_i^2), \qquad
        h = (m, r), \quad s_i = s_{\min} + \operatorname{softplus}(r_i)

    The median is exp(m), the mean exp(m + s^2 / 2).

    Args:
        min_scale: the smallest standard deviation of log x.
        event_dim: axes of one example: 1 for vectors [E], 3 for images [C, H, W].

    Raises:
        ValueError: min_scale <= 0, or an odd number of outputs.

    Source: the definition.

    Example:
        >>> LogNormal()(torch.zeros(5, 2 * 7)).base_dist.base_dist.loc.exp()[0, 0]
        tensor(1.)
    """

    num_outputs = 2

    def __init__(self, min_scale: float = 0.01, event_dim: int = 1):
        super().__init__(event_dim)
        if not min_scale > 0:
            raise ValueError(f"expected min_scale > 0, found {min_scale}: it is a standard deviation.")
        self.min_scale = min_scale

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return f"min_scale={self.min_scale}, {super().extra_repr()}"

    def forward(self, h: Tensor) -> Distribution:
        """The distribution p(x | h)."""
        loc, raw = split_outputs(self, h)
        return dist.LogNormal(loc, self.min_scale + softplus(raw)).to_event(self.event_dim)

    def output_bias(self, mean: Tensor, scale: Tensor) -> Tensor:
        """Mean and scale of log x with the mean and the scale of x; a mean is counted as at least a millionth."""
        mean = mean.clamp(min=1e-6)
        width = torch.log1p((scale / mean) ** 2).sqrt().clamp(min=self.min_scale + 1e-3)
        return torch.cat([mean.log() - width**2 / 2, inverse_softplus(width - self.min_scale)])


class _OpenUnitInterval(constraints.interval):
    """The real numbers above 0 and below 1."""

    def __init__(self) -> None:
        super().__init__(0.0, 1.0)

    def check(self, value: Tensor) -> Tensor:
        """Whether 0 < value < 1."""
        return (value > 0) & (value < 1)

    def __repr__(self) -> str:
        return "0 < x < 1"


biject_to.register(_OpenUnitInterval, lambda _: SigmoidTransform())
transform_to.register(_OpenUnitInterval, lambda _: SigmoidTransform())


class _BetaInside(dist.Beta):
    """Pyro's beta distribution without the two end points, where its density is zero or infinite."""

    support = _OpenUnitInterval()

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """A draw; one that rounding moved to an end point is moved back."""
        x = super().rsample(sample_shape)
        info = torch.finfo(x.dtype)
        return x.clamp(info.tiny, 1 - info.eps)


class Beta(Likelihood):
    r"""Beta likelihood for x strictly between 0 and 1, such as rates; the network gives mean and concentration.

    .. math:: p(x \mid h) = \prod_i \mathrm{Beta}(x_i; m_i c_i, (1 - m_i) c_i), \qquad h = (a, r), \quad
        m_i = \sigma(a_i), \quad \frac{1}{c_i - 2} = \frac{1}{c_{\max} - 2} + \frac{1}{\operatorname{softplus}(r_i)}

    The variance is m (1 - m) / (1 + c); c = 2 is the uniform density where m = 1/2, and c_max keeps it bounded inside.
    Values of exactly 0 or 1, where it is zero or infinite, are refused: move them inside, or use
    :class:`ContinuousBernoulli`.

    Args:
        max_concentration: what the concentration c stays below.
        event_dim: axes of one example: 1 for vectors [E], 3 for images [C, H, W].

    Raises:
        ValueError: max_concentration <= 2, or an odd number of outputs.

    Source: Ferrari, Cribari-Neto (2004), Beta regression for modelling rates and proportions.

    Example:
        >>> Beta()(torch.zeros(5, 2 * 7)).mean[0, 0]
        tensor(0.5000)
    """

    num_outputs = 2

    def __init__(self, max_concentration: float = 1e4, event_dim: int = 1):
        super().__init__(event_dim)
        if not max_concentration > 2:
            raise ValueError(f"expected max_concentration > 2, found {max_concentration}: 2 is the uniform density.")
        self.max_concentration = max_concentration

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return f"max_concentration={self.max_concentration:g}, {super().extra_repr()}"

    def forward(self, h: Tensor) -> Distribution:
        """The distribution p(x | h)."""
        logit, raw = split_outputs(self, h)
        mean, free = logit.sigmoid().clamp(1e-6, 1 - 1e-6), softplus(raw)  # both parameters must stay positive
        concentration = 2 + free / (1 + free / (self.max_concentration - 2))
        return _BetaInside(mean * concentration, (1 - mean) * concentration).to_event(self.event_dim)

    def output_bias(self, mean: Tensor, scale: Tensor) -> Tensor:
        """The logit of the mean, clipped to [0.001, 0.999], and the concentration with the scale, within its limits."""
        mean, limit = mean.clamp(_CLIP, 1 - _CLIP), self.max_concentration - 2
        above = (mean * (1 - mean) / scale.clamp(min=1e-6) ** 2 - 3).clamp(0.01 * min(limit, 1.0), 0.9 * limit)
        return torch.cat([mean.logit(), inverse_softplus(above / (1 - above / limit))])


class _OrMissing(constraints.Constraint):
    """The values of another constraint, and NaN."""

    def __init__(self, base_constraint: Any, filler: Any):
        self.base_constraint, self.filler = base_constraint, filler
        super().__init__()

    @property
    def is_discrete(self) -> bool:  # type: ignore[override]  # a class attribute in torch
        return self.base_constraint.is_discrete

    def check(self, value: Tensor) -> Tensor:
        """Whether each number is missing or a value of the other constraint."""
        return self.base_constraint.check(_fill(value, self.filler))

    def __repr__(self) -> str:
        limits = (getattr(self.base_constraint, name, None) for name in ("lower_bound", "upper_bound"))
        shown = ", ".join(f"{float(torch.as_tensor(limit).max()):g}" for limit in limits if limit is not None)
        return f"{type(self.base_constraint).__name__.removeprefix('_')}({shown}) or NaN"


def _filler(support: Any) -> Any:
    """Some value of a support of single numbers; one for each column where they differ."""
    if isinstance(support, constraints.stack):
        return [_filler(column) for column in support.cseq]
    low, high = (getattr(support, name, None) for name in ("lower_bound", "upper_bound"))
    if low is None:
        return 0.0 if high is None else float(high) - 1
    return float(low) if support.is_discrete else float(low) + 1 if high is None else (float(low) + float(high)) / 2


def _fill(value: Tensor, filler: Any) -> Tensor:
    return torch.where(value.isnan(), torch.as_tensor(filler, dtype=value.dtype, device=value.device), value)


class WithMissing(TorchDistribution):
    """A distribution of single numbers that scores NaN, a missing number, as log 1 = 0.

    Args:
        base: the distribution of the numbers that are there, event shape ().
        validate_args: check values (None: as Pyro is set).

    Example:
        >>> WithMissing(dist.Normal(torch.zeros(2), 1.0)).log_prob(torch.tensor([0.0, math.nan]))
        tensor([-0.9189,  0.0000])
    """

    arg_constraints = {}  # noqa: RUF012  # torch's convention

    def __init__(self, base: Any, validate_args: bool | None = None):
        self.base, self._filler = base, _filler(base.support)
        super().__init__(base.batch_shape, validate_args=validate_args)

    @property
    def parts(self) -> "list[WithMissing]":
        """The distributions of the columns of one kind each, where the base has such parts."""
        return [WithMissing(part) for part in self.base.parts]

    @constraints.dependent_property
    def support(self) -> Any:
        """The support of the numbers that are there, and NaN."""
        return _OrMissing(self.base.support, self._filler)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "WithMissing":
        """The same distribution with a larger batch."""
        return WithMissing(self.base.expand(torch.Size(batch_shape)), validate_args=self._validate_args)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws; nothing in them is missing."""
        return self.base.sample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of what is there, and 0 of what is missing."""
        if self._validate_args:
            self._validate_sample(value)
        return self.base.log_prob(_fill(value, self._filler)).masked_fill(value.isnan(), 0.0)

    @property
    def mean(self) -> Tensor:
        """The mean."""
        return self.base.mean

    @property
    def variance(self) -> Tensor:
        """The variance."""
        return self.base.variance


class Masked(Likelihood):
    r"""Another likelihood, for data with missing numbers: NaN in x counts for nothing.

    .. math:: p(x_{\mathrm{there}} \mid h) = \prod_{i : x_i \text{ is there}} p(x_i \mid h)

    The numbers of x must be independent given h; then this is the exact marginal of what is there. Draws and the mean
    are complete; :func:`pyro_vae.missing.impute` fills the gaps of x. The encoder sees NaN too: begin its network with
    :class:`pyro_vae.missing.FillMissing`.

    Args:
        likelihood: the likelihood of complete data.

    Raises:
        ValueError: the likelihood does not treat the numbers of x one by one.

    Source: Nazabal, Olmos, Ghahramani, Valera (2020), Handling incomplete heterogeneous data using VAEs,
        arXiv:1807.03653.

    Example:
        >>> x = torch.tensor([1.0, math.nan, 1.0])
        >>> Masked(Bernoulli())(torch.zeros(3)).log_prob(x) / math.log(2)
        tensor(-2.)
    """

    def __init__(self, likelihood: Likelihood):
        super().__init__(likelihood.event_dim)
        if isinstance(likelihood, OptimalNormal) or not likelihood.is_normalised:
            raise ValueError(
                f"expected a likelihood of independent numbers, found {type(likelihood).__name__}, which looks at all "
                "of x at once: use Normal, whose scale is learned."
            )
        self.likelihood, self.num_outputs = likelihood, likelihood.num_outputs

    def extra_repr(self) -> str:
        """Nothing: the likelihood inside shows the arguments."""
        return ""

    def forward(self, h: Tensor) -> Distribution:
        """The distribution p(x | h)."""
        p: Any = self.likelihood(h)
        rank = len(p.event_shape)
        while isinstance(p, torch.distributions.Independent):
            p = p.base_dist
        if len(p.event_shape):
            raise ValueError(
                f"expected a likelihood of independent numbers, found {type(p).__name__} with event shape "
                f"{tuple(p.event_shape)}: the missing part of a joint distribution is not left out by masking."
            )
        return WithMissing(p).to_event(rank)

    def output_bias(self, mean: Tensor, scale: Tensor) -> Tensor:
        """That of the likelihood inside; take mean and scale over the numbers that are there."""
        return self.likelihood.output_bias(mean, scale)

    def output_shape(self, event_shape: Sequence[int]) -> tuple[int, ...]:
        """That of the likelihood inside."""
        return self.likelihood.output_shape(event_shape)

    def bias_at(self, x: Tensor) -> Tensor:
        """That of the likelihood inside."""
        return self.likelihood.bias_at(x)
