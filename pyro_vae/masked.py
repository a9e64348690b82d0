"""Missing numbers: NaN in x has probability 1, whatever the likelihood of the numbers that are there."""

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.contracts import Distribution, Likelihood
from pyro_vae.reals import OptimalNormal
from pyro_vae.supports import elements


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
        >>> from pyro.distributions import Normal
        >>> WithMissing(Normal(torch.zeros(2), 1.0)).log_prob(torch.tensor([0.0, torch.nan]))
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
        >>> from pyro_vae import Bernoulli
        >>> Masked(Bernoulli())(torch.zeros(3)).log_prob(torch.tensor([1.0, torch.nan, 1.0])).exp()
        tensor(0.2500)
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
        whole = self.likelihood(h)
        p = elements(whole)
        if len(p.event_shape):
            raise ValueError(
                f"expected a likelihood of independent numbers, found {type(p).__name__} with event shape "
                f"{tuple(p.event_shape)}: the missing part of a joint distribution is not left out by masking."
            )
        return WithMissing(p).to_event(len(whole.event_shape))

    def output_bias(self, mean: Tensor, scale: Tensor) -> Tensor:
        """That of the likelihood inside; take mean and scale over the numbers that are there."""
        return self.likelihood.output_bias(mean, scale)

    def output_shape(self, event_shape: Sequence[int]) -> tuple[int, ...]:
        """That of the likelihood inside."""
        return self.likelihood.output_shape(event_shape)

    def bias_at(self, x: Tensor) -> Tensor:
        """That of the likelihood inside."""
        return self.likelihood.bias_at(x)
