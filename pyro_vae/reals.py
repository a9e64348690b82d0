"""Likelihoods p(x | z) of real numbers: normal and heavier tails, one scale for all of x or one for each number.

Each turns a network's output h into a distribution over x, see :class:`pyro_vae.contracts.Likelihood`.
"""

import math
from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vae.contracts import Distribution, Likelihood, split_outputs


def inverse_softplus(value: Tensor) -> Tensor:
    """The number whose softplus is ``value`` > 0."""
    return value + torch.log(-torch.expm1(-value))


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


class _MeanAndScale(Likelihood):
    """The network gives a location and a scale, no smaller than a floor, for each number of x."""

    num_outputs = 2

    def __init__(self, min_scale: float = 0.01, event_dim: int = 1):
        super().__init__(event_dim)
        if not min_scale > 0:
            raise ValueError(f"expected min_scale > 0, found {min_scale}: it is a standard deviation.")
        self.min_scale = min_scale

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return f"min_scale={self.min_scale}, {super().extra_repr()}"

    def _location_and_scale(self, h: Tensor) -> tuple[Tensor, Tensor]:
        loc, raw = split_outputs(self, h)
        return loc, self.min_scale + softplus(raw)


class HeteroscedasticNormal(_MeanAndScale):
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

    def forward(self, h: Tensor) -> Distribution:
        """The distribution p(x | h)."""
        return dist.Normal(*self._location_and_scale(h)).to_event(self.event_dim)

    def output_bias(self, mean: Tensor, scale: Tensor) -> Tensor:
        """The mean, and the inverse softplus of the scale."""
        return torch.cat([mean, inverse_softplus((scale - self.min_scale).clamp(min=1e-3))])


class LogNormal(_MeanAndScale):
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

    def forward(self, h: Tensor) -> Distribution:
        """The distribution p(x | h)."""
        return dist.LogNormal(*self._location_and_scale(h)).to_event(self.event_dim)

    def output_bias(self, mean: Tensor, scale: Tensor) -> Tensor:
        """Mean and scale of log x with the mean and the scale of x; a mean is counted as at least a millionth."""
        mean = mean.clamp(min=1e-6)
        width = torch.log1p((scale / mean) ** 2).sqrt().clamp(min=self.min_scale + 1e-3)
        return torch.cat([mean.log() - width**2 / 2, inverse_softplus(width - self.min_scale)])
