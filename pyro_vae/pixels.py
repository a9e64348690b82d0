r"""Likelihoods of pixel levels: x in {0, ..., L - 1}, stored as floating-point numbers, L = 256 for bytes.

Their scores are proper log-probabilities of the bytes, so they can be compared across models in bits per dimension:

.. math:: \mathrm{bits} = -\frac{\log p(x)}{E \log 2}

A uniform guess costs log2 L, 8 bits for bytes.
"""

import math
from typing import Any

import torch
from pyro import distributions as dist
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from pyro_vae.contracts import Distribution, Likelihood, split_outputs

_LOG_SCALE_LIMIT = 10.0  # scales from e^-10 to e^10 half-ranges: far beyond both ends of what pixels can tell apart


class LevelCategorical(dist.Categorical):
    """Pyro's categorical distribution over the levels 0..L-1 as floating-point numbers, with mean and variance."""

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, floating-point levels [*sample_shape, *batch]."""
        return super().sample(torch.Size(sample_shape)).to(self.logits.dtype)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All levels, [L, *batch]."""
        return super().enumerate_support(expand).to(self.logits.dtype)

    @property
    def _levels(self) -> Tensor:
        return torch.arange(self.logits.shape[-1], dtype=self.logits.dtype, device=self.logits.device)

    @property
    def mean(self) -> Tensor:
        """The mean level."""
        return self.probs @ self._levels

    @property
    def variance(self) -> Tensor:
        """The variance of the level."""
        return (self.probs * (self._levels - self.mean.unsqueeze(-1)) ** 2).sum(-1)


class LogisticLevels(TorchDistribution):
    r"""A mixture of logistic distributions, rounded to the levels 0..L-1; both tails belong to the end levels.

    .. math:: P(x) = \sum_c \pi_c \left[ \sigma\left(\tfrac{x + 1/2 - \mu_c}{s_c}\right)
        - \sigma\left(\tfrac{x - 1/2 - \mu_c}{s_c}\right) \right], \qquad
        P(x \le 0) \text{ and } P(x \ge L - 1) \text{ at the ends}

    The difference is never formed: with edges a < b it is sigma(b) sigma(-a) (1 - exp(a - b)), a product that keeps
    full relative precision however small it is.

    Args:
        logits: unnormalised log-weights of the components, [*batch, C].
        loc: their centres mu, in levels, [*batch, C].
        log_scale: log of their scales s, in levels, [*batch, C].
        num_levels: the number of levels L.
        validate_args: check arguments and values (None: as Pyro is set).

    Example:
        >>> p = LogisticLevels(torch.zeros(5, 1), torch.full((5, 1), 3.0), torch.zeros(5, 1), num_levels=8)
        >>> p.log_prob(p.enumerate_support()).exp().sum(0)
        tensor([1.0000, 1.0000, 1.0000, 1.0000, 1.0000])
    """

    arg_constraints = {  # noqa: RUF012  # torch's convention
        "logits": constraints.real_vector,
        "loc": constraints.real_vector,
        "log_scale": constraints.real_vector,
    }
    has_enumerate_support = True

    def __init__(
        self, logits: Tensor, loc: Tensor, log_scale: Tensor, num_levels: int, validate_args: bool | None = None
    ):
        self.logits, self.loc, self.log_scale = torch.broadcast_tensors(logits, loc, log_scale)
        self.num_levels = num_levels
        super().__init__(self.loc.shape[:-1], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:
        """The integers 0..L-1."""
        return constraints.integer_interval(0, self.num_levels - 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "LogisticLevels":
        """The same distribution with a larger batch."""
        new = self._get_checked_instance(LogisticLevels, _instance)
        shape = (*batch_shape, self.loc.shape[-1])
        new.logits, new.loc, new.log_scale = (t.expand(shape) for t in (self.logits, self.loc, self.log_scale))
        new.num_levels = self.num_levels
        super(LogisticLevels, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, floating-point levels [*sample_shape, *batch]: a logistic draw of one component, rounded."""
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            component = dist.Categorical(logits=self.logits, validate_args=False).sample(torch.Size(sample_shape))
            loc, scale = (
                t.expand(*shape, t.shape[-1]).gather(-1, component.unsqueeze(-1)).squeeze(-1)
                for t in (self.loc, self.log_scale.exp())
            )
            u = torch.rand(shape, dtype=loc.dtype, device=loc.device).clamp(min=torch.finfo(loc.dtype).tiny)
            return (loc + scale * (u.log() - torch.log1p(-u))).round().clamp(0, self.num_levels - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of levels [*sample_shape, *batch]."""
        if self._validate_args:
            self._validate_sample(value)
        x, per_level = value.unsqueeze(-1), (-self.log_scale).exp()
        below = logsigmoid((x + 0.5 - self.loc) * per_level)  # log P(y < x + 1/2)
        above = logsigmoid((self.loc - (x - 0.5)) * per_level)  # log P(y > x - 1/2)
        both = below + above + torch.log(-torch.expm1(-per_level))
        log_mass = torch.where(x < 0.5, below, torch.where(x > self.num_levels - 1.5, above, both))
        return (log_mass + self.logits.log_softmax(-1)).logsumexp(-1)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All levels, [L, *batch]."""
        levels = torch.arange(self.num_levels, dtype=self.loc.dtype, device=self.loc.device)
        levels = levels.reshape(-1, *[1] * len(self.batch_shape))
        return levels.expand(-1, *self.batch_shape) if expand else levels

    def _moment(self, power: int) -> Tensor:
        """E[x] or E[x^2], as the sum over k >= 1 of (k^power - (k-1)^power) P(x >= k)."""
        weights, per_level = self.logits.softmax(-1), (-self.log_scale).exp()
        total = torch.zeros_like(self.loc)
        for k in range(1, self.num_levels):  # one level at a time: pictures times levels would not fit in memory
            total = total + (k**power - (k - 1) ** power) * torch.sigmoid((self.loc - (k - 0.5)) * per_level)
        return (weights * total).sum(-1)

    @property
    def mean(self) -> Tensor:
        """The mean level; the tails at the end levels pull it inwards from the centres."""
        return self._moment(1)

    @property
    def variance(self) -> Tensor:
        """The variance of the level."""
        return (self._moment(2) - self._moment(1) ** 2).clamp(min=0)


class _Levels(Likelihood):
    """What the likelihoods of levels share: the number of levels, and a start at the data's mean."""

    def __init__(self, num_levels: int, event_dim: int):
        super().__init__(event_dim)
        if num_levels < 2:
            raise ValueError(f"expected num_levels >= 2, found {num_levels}: levels are 0..num_levels-1.")
        self.num_levels = num_levels

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return f"num_levels={self.num_levels}, {super().extra_repr()}"

    @property
    def _half(self) -> float:
        return (self.num_levels - 1) / 2

    def _parts(self, h: Tensor) -> Tensor:
        """The outputs of each number of x on a last axis, [*batch, *E, num_outputs]."""
        return torch.stack(list(split_outputs(self, h)), -1)

    def _start(self, mean: Tensor, scale: Tensor, num_components: int) -> LogisticLevels:
        """Logistics [*E, C] with the mean of the data, in double precision, and about its scale.

        The mean, clipped to 0.1 % from the ends, is a monotone function of a common shift, solved for here.
        """
        top = self.num_levels - 1
        target = mean.double().clamp(1e-3 * top, (1 - 1e-3) * top).unsqueeze(-1)
        width = (scale.double() * math.sqrt(3) / math.pi).clamp(0.01 * top, 1.0 * top).unsqueeze(-1)
        place = (torch.arange(num_components, dtype=torch.float64, device=mean.device) + 0.5) / num_components
        offset = width * place.logit() if num_components > 1 else 0 * width
        log_scale = (width if num_components == 1 else width / 2).log().expand_as(offset)
        edges = torch.arange(top, dtype=torch.float64, device=mean.device) + 0.5

        def tails(shift: Tensor) -> Tensor:
            return ((shift + offset).unsqueeze(-1) - edges).div(log_scale.exp().unsqueeze(-1)).sigmoid()

        reach = 20 * width + offset.abs().amax(-1, keepdim=True)
        low, high = -reach, top + reach
        for _ in range(10):  # to a fraction of the scale, where Newton's method is safe
            shift = (low + high) / 2
            below = tails(shift).sum(-1).mean(-1, keepdim=True) < target
            low, high = torch.where(below, shift, low), torch.where(below, high, shift)
        shift = (low + high) / 2
        for _ in range(4):
            t = tails(shift)
            excess = t.sum(-1).mean(-1, keepdim=True) - target
            shift = shift - excess / ((t * (1 - t)).sum(-1) / log_scale.exp()).mean(-1, keepdim=True)
        loc = shift + offset
        return LogisticLevels(torch.zeros_like(loc), loc, log_scale, self.num_levels)


class Categorical(_Levels):
    r"""Categorical likelihood for levels 0..L-1; the network gives a logit for each level.

    .. math:: p(x \mid h) = \prod_i \operatorname{softmax}(h_i)_{x_i}

    It knows nothing of the order of the levels, and can take any shape over them, at L outputs for each pixel.

    Args:
        num_levels: the number of levels L.
        event_dim: axes of one example: 1 for vectors [E], 3 for images [C, H, W].

    Raises:
        ValueError: num_levels < 2, or a number of outputs that L does not divide.

    Source: van den Oord, Kalchbrenner, Kavukcuoglu (2016), Pixel recurrent neural networks, arXiv:1601.06759.

    Example:
        >>> uniform = Categorical(256)(torch.zeros(5, 256 * 7))
        >>> -uniform.log_prob(torch.zeros(5, 7)) / (7 * math.log(2))
        tensor([8., 8., 8., 8., 8.])
    """

    def __init__(self, num_levels: int = 256, event_dim: int = 1):
        super().__init__(num_levels, event_dim)
        self.num_outputs = num_levels

    def forward(self, h: Tensor) -> Distribution:
        """The distribution p(x | h)."""
        return LevelCategorical(logits=self._parts(h)).to_event(self.event_dim)

    def output_bias(self, mean: Tensor, scale: Tensor) -> Tensor:
        """The log-masses of a discretised logistic with the mean, clipped to 0.1 % from the ends, and the scale."""
        start = self._start(mean, scale, 1)
        return start.log_prob(start.enumerate_support()).flatten(0, 1).to(mean.dtype)


class DiscretizedLogistic(_Levels):
    r"""Discretised logistic likelihood for levels 0..L-1; the network gives centre and log-scale for each pixel.

    .. math:: p(x \mid h) = \prod_i P(x_i; \mu_i, s_i), \qquad h = (m, r), \quad
        \mu_i = \tfrac{L - 1}{2} (1 + m_i), \quad s_i = \tfrac{L - 1}{2} e^{r_i}

    P is the mass of a logistic density between x - 1/2 and x + 1/2; the end levels take the tails. Outputs are in
    half-ranges around the middle, so a fresh network starts there.

    Args:
        num_levels: the number of levels L.
        event_dim: axes of one example: 1 for vectors [E], 3 for images [C, H, W].

    Raises:
        ValueError: num_levels < 2, or an odd number of outputs.

    Source: Kingma et al. (2016), Improving variational inference with inverse autoregressive flow, arXiv:1606.04934.

    Example:
        >>> DiscretizedLogistic(256)(torch.zeros(5, 2 * 7)).mean[0, 0]
        tensor(127.5000)
    """

    num_outputs = 2

    def __init__(self, num_levels: int = 256, event_dim: int = 1):
        super().__init__(num_levels, event_dim)

    def forward(self, h: Tensor) -> Distribution:
        """The distribution p(x | h)."""
        loc, raw = (part.unsqueeze(-1) for part in split_outputs(self, h))
        return _logistic(torch.zeros_like(loc), loc, raw, self.num_levels).to_event(self.event_dim)

    def output_bias(self, mean: Tensor, scale: Tensor) -> Tensor:
        """Centre and log-scale with the mean, clipped to 0.1 % from the ends, and about the scale."""
        start = self._start(mean, scale, 1)
        parts = [start.loc / self._half - 1, start.log_scale - math.log(self._half)]
        return torch.cat([part.squeeze(-1) for part in parts]).to(mean.dtype)


class DiscretizedLogisticMixture(_Levels):
    r"""Mixture of discretised logistics for levels 0..L-1, for each pixel and channel by itself.

    .. math:: p(x \mid h) = \prod_i \sum_c \operatorname{softmax}(w_i)_c \, P(x_i; \mu_{ic}, s_{ic}), \qquad
        h = (w, m, r)

    P, mu and s as in :class:`DiscretizedLogistic`. The channels of a pixel are independent given z.

    Args:
        num_components: the number of components C.
        num_levels: the number of levels L.
        event_dim: axes of one example: 1 for vectors [E], 3 for images [C, H, W].

    Raises:
        ValueError: num_components < 1, num_levels < 2, or a number of outputs that 3 C does not divide.

    Source: Salimans, Karpathy, Chen, Kingma (2017), PixelCNN++, equations 1 and 2 (without the coupling of the
        channels), arXiv:1701.05517.

    Example:
        >>> DiscretizedLogisticMixture(4)(torch.zeros(5, 3 * 4 * 7)).event_shape
        torch.Size([7])
    """

    def __init__(self, num_components: int = 10, num_levels: int = 256, event_dim: int = 1):
        super().__init__(num_levels, event_dim)
        if num_components < 1:
            raise ValueError(f"expected num_components >= 1, found {num_components}: 1 is DiscretizedLogistic.")
        self.num_components, self.num_outputs = num_components, 3 * num_components

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return f"num_components={self.num_components}, {super().extra_repr()}"

    def forward(self, h: Tensor) -> Distribution:
        """The distribution p(x | h)."""
        logits, loc, raw = self._parts(h).chunk(3, dim=-1)
        return _logistic(logits, loc, raw, self.num_levels).to_event(self.event_dim)

    def output_bias(self, mean: Tensor, scale: Tensor) -> Tensor:
        """Equal weights, centres side by side, with the mean, clipped to 0.1 % from the ends, and about the scale."""
        start = self._start(mean, scale, self.num_components)
        parts = [start.logits, start.loc / self._half - 1, start.log_scale - math.log(self._half)]
        return torch.cat(parts, -1).movedim(-1, 0).flatten(0, 1).to(mean.dtype)


def _logistic(logits: Tensor, loc: Tensor, raw: Tensor, num_levels: int) -> LogisticLevels:
    """Logistics whose centres and log-scales are given in half-ranges around the middle level."""
    half = (num_levels - 1) / 2
    log_scale = math.log(half) + raw.clamp(-_LOG_SCALE_LIMIT, _LOG_SCALE_LIMIT)
    return LogisticLevels(logits, half * (1 + loc), log_scale, num_levels)
