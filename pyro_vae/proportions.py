"""Likelihoods p(x | z) of bits and proportions: 0 or 1, between 0 and 1, and counts out of n.

Each turns a network's output h into a distribution over x, see :class:`pyro_vae.contracts.Likelihood`.
"""

from typing import Any

import torch
from pyro import distributions as dist
from torch import Tensor
from torch.distributions import SigmoidTransform, biject_to, constraints, transform_to
from torch.nn.functional import softplus

from pyro_vae.contracts import Distribution, Likelihood, split_outputs
from pyro_vae.reals import inverse_softplus

_CLIP = 1e-3  # a mean of exactly 0 or 1 would need an infinite logit; Burda et al.'s code clips at the same value


def _logit(mean: Tensor) -> Tensor:
    return mean.clamp(_CLIP, 1 - _CLIP).logit()


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
