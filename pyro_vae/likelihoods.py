"""Likelihoods p(x | z): each turns a network's output h into a distribution over x.

All take h = [*batch, num_outputs * E[0], *E[1:]] and return a normalised distribution with batch shape ``batch`` and
event shape E. Scores are nats, summed over the E axes.
"""

import math

import torch
from pyro import distributions as dist
from torch import Tensor, nn
from torch.nn.functional import softplus

from pyro_vae.contracts import Distribution, Likelihood

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


class Normal(Likelihood):
    r"""Normal likelihood with one scale for all of x; the network gives the mean.

    .. math:: p(x \mid h) = \prod_i \mathcal N(x_i; h_i, \sigma^2)

    A fixed scale is a weight: the log-likelihood is the squared error times -1/(2 sigma^2) plus a constant, so
    sigma^2 = 1/2 is "sum of squares against KL". A learned one settles at sigma^2 = mean squared error.

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

    log_scale: Tensor

    def __init__(self, scale: float = 1.0, learn_scale: bool = True, event_dim: int = 1):
        super().__init__(event_dim)
        if not scale > 0:
            raise ValueError(f"expected scale > 0, found {scale}: it is a standard deviation.")
        self.learn_scale = learn_scale
        log_scale = torch.tensor(math.log(scale))
        if learn_scale:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    @property
    def scale(self) -> Tensor:
        """The standard deviation sigma, a scalar tensor."""
        return self.log_scale.exp()

    def extra_repr(self) -> str:
        """Show the current scale."""
        return f"scale={self.scale.item():.4g}, learn_scale={self.learn_scale}, {super().extra_repr()}"

    def forward(self, h: Tensor) -> Distribution:
        """The distribution p(x | h)."""
        return dist.Normal(h, self.scale.expand_as(h)).to_event(self.event_dim)

    def output_bias(self, mean: Tensor, scale: Tensor) -> Tensor:
        """The mean."""
        return mean


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
        if h.shape[-self.event_dim] % 2:  # unequal halves would broadcast
            raise ValueError(
                f"HeteroscedasticNormal expected 2 E outputs of the network, found {h.shape[-self.event_dim]} on axis "
                f"{-self.event_dim}: make its last layer twice as wide as x."
            )
        loc, raw = h.chunk(2, dim=-self.event_dim)
        return dist.Normal(loc, self.min_scale + softplus(raw)).to_event(self.event_dim)

    def output_bias(self, mean: Tensor, scale: Tensor) -> Tensor:
        """The mean, and the inverse softplus of the scale."""
        excess = (scale - self.min_scale).clamp(min=1e-3)
        return torch.cat([mean, excess + torch.log(-torch.expm1(-excess))])
