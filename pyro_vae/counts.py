r"""Likelihoods of counts: x in {0, 1, 2, ...}, stored as floating-point numbers; word counts, reads of a gene, events.

Rates are given by their logarithm, so that a network can reach counts of any size:

.. math:: \lambda_i = e^{a_i}, \qquad a_i \text{ limited to } [-20, 20]
"""

from typing import Any

import torch
from pyro import distributions as dist
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from pyro_vae.contracts import Distribution, Likelihood, split_outputs

_LOG_RATE_LIMIT = 20.0  # 5e8 events: beyond it a single step of training could overflow
_LOG_COUNT_LIMIT = 8.0  # of total_count: beyond 3000, log-gamma differences lose float32's digits, and Poisson is near
_MIN_RATE = 1e-3  # a mean of exactly 0 would need an infinite output


def _rate(log_rate: Tensor) -> Tensor:
    return log_rate.clamp(-_LOG_RATE_LIMIT, _LOG_RATE_LIMIT).exp()


def _negative_binomial(log_mean: Tensor, log_count: Tensor) -> tuple[Tensor, Tensor]:
    """total_count and logits of Pyro's negative binomial distribution with the mean given."""
    log_count = log_count.clamp(-_LOG_COUNT_LIMIT, _LOG_COUNT_LIMIT)
    return log_count.exp(), log_mean.clamp(-_LOG_RATE_LIMIT, _LOG_RATE_LIMIT) - log_count


def _log_count(mean: Tensor, variance: Tensor) -> Tensor:
    """The log of total_count at which a negative binomial distribution has mean and variance, from 0.01 to 1000."""
    return (mean**2 / (variance - mean).clamp(min=1e-6)).clamp(1e-2, 1e3).log()


class Poisson(Likelihood):
    r"""Poisson likelihood for counts; the network gives the log of the rate.

    .. math:: p(x \mid h) = \prod_i \frac{\lambda_i^{x_i} e^{-\lambda_i}}{x_i!}, \qquad \lambda_i = e^{h_i}

    Mean and variance are one; counts that scatter more want :class:`NegativeBinomial`.

    Args:
        event_dim: axes of one example: 1 for vectors [E], 3 for images [C, H, W].

    Source: the definition.

    Example:
        >>> Poisson()(torch.zeros(5, 7)).mean[0, 0]
        tensor(1.)
    """

    def forward(self, h: Tensor) -> Distribution:
        """The distribution p(x | h)."""
        return dist.Poisson(_rate(h)).to_event(self.event_dim)

    def output_bias(self, mean: Tensor, scale: Tensor) -> Tensor:
        """The log of the mean, which is raised to 0.001 where it is less."""
        return mean.clamp(min=_MIN_RATE).log()


class NegativeBinomial(Likelihood):
    r"""Negative binomial likelihood for counts that scatter more than Poisson's; the network gives mean and count r.

    .. math:: p(x \mid h) = \prod_i \frac{\Gamma(x_i + r_i)}{x_i! \, \Gamma(r_i)}
        \left(\frac{r_i}{r_i + \mu_i}\right)^{r_i} \left(\frac{\mu_i}{r_i + \mu_i}\right)^{x_i}, \qquad
        h = (\log \mu, \log r)

    The variance is mu + mu^2 / r: a Poisson distribution whose rate has a gamma distribution.

    Args:
        event_dim: axes of one example: 1 for vectors [E], 3 for images [C, H, W].

    Raises:
        ValueError: an odd number of outputs.

    Source: the definition; for counts of genes Lopez, Regier, Cole, Jordan, Yosef (2018), Deep generative modeling for
        single-cell transcriptomics.

    Example:
        >>> NegativeBinomial()(torch.zeros(5, 2 * 7)).variance[0, 0]
        tensor(2.)
    """

    num_outputs = 2

    def forward(self, h: Tensor) -> Distribution:
        """The distribution p(x | h)."""
        total_count, logits = _negative_binomial(*split_outputs(self, h))
        return dist.NegativeBinomial(total_count, logits=logits).to_event(self.event_dim)

    def output_bias(self, mean: Tensor, scale: Tensor) -> Tensor:
        """The log of the mean, which is raised to 0.001 where it is less, and of the count r with the scale."""
        mean = mean.clamp(min=_MIN_RATE)
        return torch.cat([mean.log(), _log_count(mean, scale**2)])


class ZeroInflated(TorchDistribution):
    r"""A distribution of single counts with extra zeros.

    .. math:: P(x) = g \, 1[x = 0] + (1 - g) \, P_{\mathrm{base}}(x), \qquad g = \sigma(\mathtt{logits})

    Pyro's own computes with g itself as soon as it was asked for a draw or a mean, so its scores then lose their
    digits near g = 1, and it can no longer be expanded; this one stays in logits.

    Args:
        base: the distribution of counts, event shape ().
        logits: logits of an extra zero, [*batch].
        validate_args: check arguments and values (None: as Pyro is set).

    Example:
        >>> ZeroInflated(dist.Poisson(torch.ones(5)), torch.zeros(5)).mean
        tensor([0.5000, 0.5000, 0.5000, 0.5000, 0.5000])
    """

    arg_constraints = {"logits": constraints.real}  # noqa: RUF012  # torch's convention
    support = constraints.nonnegative_integer

    def __init__(self, base: Any, logits: Tensor, validate_args: bool | None = None):
        self.base, self.logits = base, logits
        super().__init__(logits.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "ZeroInflated":
        """The same distribution with a larger batch."""
        shape = torch.Size(batch_shape)
        return ZeroInflated(self.base.expand(shape), self.logits.expand(shape), self._validate_args)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, [*sample_shape, *batch]."""
        with torch.no_grad():
            x = self.base.sample(torch.Size(sample_shape))
            return x * torch.bernoulli(torch.sigmoid(-self.logits).expand(x.shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of counts [*sample_shape, *batch]."""
        if self._validate_args:
            self._validate_sample(value)
        extra, counted = logsigmoid(self.logits), logsigmoid(-self.logits) + self.base.log_prob(value)
        return torch.where(value == 0, torch.logaddexp(extra, counted), counted)

    @property
    def mean(self) -> Tensor:
        """The mean count."""
        return torch.sigmoid(-self.logits) * self.base.mean

    @property
    def variance(self) -> Tensor:
        """The variance of the count."""
        return torch.sigmoid(-self.logits) * (self.base.variance + torch.sigmoid(self.logits) * self.base.mean**2)


class ZeroInflatedPoisson(Likelihood):
    r"""Poisson likelihood with extra zeros; the network gives the log of the rate and the logit of an extra zero.

    .. math:: p(x \mid h) = \prod_i g_i \, 1[x_i = 0] + (1 - g_i) \, \mathrm{Poisson}(x_i; \lambda_i), \qquad
        h = (\log \lambda, \operatorname{logit} g)

    Args:
        event_dim: axes of one example: 1 for vectors [E], 3 for images [C, H, W].

    Raises:
        ValueError: an odd number of outputs.

    Source: Lambert (1992), Zero-inflated Poisson regression, with an application to defects in manufacturing.

    Example:
        >>> ZeroInflatedPoisson()(torch.zeros(5, 2 * 7)).mean[0, 0]
        tensor(0.5000)
    """

    num_outputs = 2

    def forward(self, h: Tensor) -> Distribution:
        """The distribution p(x | h)."""
        log_rate, logit = split_outputs(self, h)
        return ZeroInflated(dist.Poisson(_rate(log_rate)), logit).to_event(self.event_dim)

    def output_bias(self, mean: Tensor, scale: Tensor) -> Tensor:
        """The rate and the gate with the mean, raised to 0.001 where it is less, and about the scale."""
        mean = mean.clamp(min=_MIN_RATE)
        extra = (scale**2 - mean).clamp(min=0) / mean  # variance = mean (1 + rate - mean)
        gate = (extra / (mean + extra)).clamp(0.02, 0.98)
        return torch.cat([(mean / (1 - gate)).log(), gate.logit()])


class ZeroInflatedNegativeBinomial(Likelihood):
    r"""Negative binomial likelihood with extra zeros; the network gives mean, count r and the logit of an extra zero.

    .. math:: p(x \mid h) = \prod_i g_i \, 1[x_i = 0] + (1 - g_i) \, \mathrm{NB}(x_i; \mu_i, r_i), \qquad
        h = (\log \mu, \log r, \operatorname{logit} g)

    NB as in :class:`NegativeBinomial`, whose small r makes many zeros too: compare the two on held-out data.

    Args:
        event_dim: axes of one example: 1 for vectors [E], 3 for images [C, H, W].

    Raises:
        ValueError: a number of outputs that 3 does not divide.

    Source: Lopez, Regier, Cole, Jordan, Yosef (2018), Deep generative modeling for single-cell transcriptomics.

    Example:
        >>> ZeroInflatedNegativeBinomial()(torch.zeros(5, 3 * 7)).mean[0, 0]
        tensor(0.5000)
    """

    num_outputs = 3

    def forward(self, h: Tensor) -> Distribution:
        """The distribution p(x | h)."""
        log_mean, log_count, logit = split_outputs(self, h)
        total_count, logits = _negative_binomial(log_mean, log_count)
        base = dist.NegativeBinomial(total_count, logits=logits)
        return ZeroInflated(base, logit).to_event(self.event_dim)

    def output_bias(self, mean: Tensor, scale: Tensor) -> Tensor:
        """A tenth of extra zeros, and the rest with the mean, raised to 0.001 where less, and about the scale."""
        mean, gate = mean.clamp(min=_MIN_RATE), torch.full_like(mean, 0.1)
        rest = mean / (1 - gate)
        variance = (scale**2 + mean**2) / (1 - gate) - rest**2
        return torch.cat([rest.log(), _log_count(rest, variance), gate.logit()])


class _CountsOf(constraints.Constraint):
    """Non-negative integers that sum to a total over the last axes."""

    is_discrete = True
    lower_bound = 0

    def __init__(self, upper_bound: int, event_dim: int):
        self.upper_bound, self._event_dim = upper_bound, event_dim
        super().__init__()

    @property
    def event_dim(self) -> int:  # type: ignore[override]  # a class attribute in torch
        return self._event_dim

    def check(self, value: Tensor) -> Tensor:
        """Whether x is made of counts with the right total."""
        value = value.flatten(value.dim() - self._event_dim)
        return ((value >= 0) & (value % 1 == 0)).all(-1) & (value.sum(-1) == self.upper_bound)

    def __repr__(self) -> str:
        return f"of counts with the total {self.upper_bound}"


class CountsOfTotal(TorchDistribution):
    """A multinomial distribution over the last axes, whose support is the vectors with exactly the right total.

    Pyro's own gives a positive probability to vectors with a smaller total too, so that it sums to more than one.

    Args:
        total_count: the total of x.
        logits: unnormalised log-probabilities, [*batch, *E].
        event_dim: number of axes of E.
        validate_args: check arguments and values (None: as Pyro is set).

    Example:
        >>> CountsOfTotal(4, torch.zeros(5, 2)).mean[0]
        tensor([2., 2.])
    """

    arg_constraints = {"logits": constraints.independent(constraints.real, 1)}  # noqa: RUF012  # torch's convention

    def __init__(self, total_count: int, logits: Tensor, event_dim: int = 1, validate_args: bool | None = None):
        self.total_count, self.logits = total_count, logits
        shape = logits.shape
        super().__init__(shape[: len(shape) - event_dim], shape[len(shape) - event_dim :], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True)
    def support(self) -> Any:
        """Counts with the right total."""
        return _CountsOf(self.total_count, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> "CountsOfTotal":
        """The same distribution with a larger batch."""
        new = self._get_checked_instance(CountsOfTotal, _instance)
        new.total_count, new.logits = self.total_count, self.logits.expand(*batch_shape, *self.event_shape)
        super(CountsOfTotal, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def _log_probs(self) -> Tensor:
        """Log-probabilities of one event, [*batch, E]."""
        return self.logits.flatten(len(self.batch_shape)).log_softmax(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, [*sample_shape, *batch, *E]."""
        with torch.no_grad():
            p = dist.Multinomial(self.total_count, logits=self._log_probs, validate_args=False)
            return p.sample(torch.Size(sample_shape)).reshape(self._extended_shape(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of x [*sample_shape, *batch, *E]."""
        if self._validate_args:
            self._validate_sample(value)
        x = value.flatten(value.dim() - len(self.event_shape))
        log_orders = torch.lgamma(x.sum(-1) + 1) - torch.lgamma(x + 1).sum(-1)
        return log_orders + (x * self._log_probs).sum(-1)

    @property
    def mean(self) -> Tensor:
        """The mean counts, [*batch, *E]."""
        return self.total_count * self._log_probs.exp().reshape(self.logits.shape)

    @property
    def variance(self) -> Tensor:
        """The variance of each count, [*batch, *E]."""
        return self.mean * (1 - self.mean / self.total_count)


class Multinomial(Likelihood):
    r"""Multinomial likelihood for counts with a known total, such as words of a text; the network gives logits.

    .. math:: p(x \mid h) = \frac{n!}{\prod_i x_i!} \prod_i \operatorname{softmax}(h)_i^{x_i}, \qquad \sum_i x_i = n

    Every example has the same total n: draw n of the events of each, or give rates with :class:`Poisson`.

    Args:
        total_count: the total n of x.
        event_dim: axes of one example: 1 for vectors [E], 3 for images [C, H, W]; the total is over all of them.

    Raises:
        ValueError: total_count < 1.

    Source: Liang, Krishnan, Hoffman, Jebara (2018), Variational autoencoders for collaborative filtering,
        arXiv:1802.05814.

    Example:
        >>> Multinomial(14)(torch.zeros(5, 7)).mean[0, 0]
        tensor(2.)
    """

    def __init__(self, total_count: int, event_dim: int = 1):
        super().__init__(event_dim)
        if total_count < 1:
            raise ValueError(f"expected total_count >= 1, found {total_count}: it is the sum of x.")
        self.total_count = total_count

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return f"total_count={self.total_count}, {super().extra_repr()}"

    def forward(self, h: Tensor) -> Distribution:
        """The distribution p(x | h)."""
        return CountsOfTotal(self.total_count, h, self.event_dim)

    def output_bias(self, mean: Tensor, scale: Tensor) -> Tensor:
        """The log of the mean; an entry is counted as at least 0.001 of the average one."""
        floor = _MIN_RATE * self.total_count / mean.numel()
        return mean.clamp(min=floor).log()
