r"""Likelihoods of tables: each column its own, and how an encoder reads such rows.

A row x [C] holds one number a column: a real number, a count, 0 or 1, or the index of a category.

.. math:: \log p(x \mid h) = \sum_c \log p_c(x_c \mid h_c)
"""

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.contracts import Distribution, Likelihood, mean_and_scale
from pyro_vae.masked import Masked
from pyro_vae.pixels import LevelCategorical
from pyro_vae.supports import elements


class Categories(LevelCategorical):
    """A categorical distribution over levels without an order: its ``mean`` is the most probable one."""

    @property
    def mean(self) -> Tensor:
        """The most probable level: categories have no mean."""
        return self.logits.argmax(-1).to(self.logits.dtype)

    @property
    def variance(self) -> Tensor:
        """There is none."""
        raise NotImplementedError


class Nominal(Likelihood):
    r"""Categorical likelihood for the index 0..L-1 of a category, such as a city; the network gives L logits.

    .. math:: p(x \mid h) = \prod_i \operatorname{softmax}(h_i)_{x_i}

    As :class:`pyro_vae.pixels.Categorical`, for levels that have no order: it starts at their frequencies, and
    ``.mean`` is the most probable one.

    Args:
        num_levels: the number of levels L.
        event_dim: axes of one example: 1 for vectors [E], 3 for images [C, H, W].

    Raises:
        ValueError: num_levels < 2, or a number of outputs that L does not divide.

    Source: the definition.

    Example:
        >>> Nominal(3)(torch.zeros(5, 3 * 7)).log_prob(torch.ones(5, 7)).exp()[0] * 3**7
        tensor(1.0000)
    """

    def __init__(self, num_levels: int, event_dim: int = 1):
        super().__init__(event_dim)
        if num_levels < 2:
            raise ValueError(f"expected num_levels >= 2, found {num_levels}: levels are 0..num_levels-1.")
        self.num_levels = self.num_outputs = num_levels

    def extra_repr(self) -> str:
        """Show the constructor's arguments."""
        return f"num_levels={self.num_levels}, {super().extra_repr()}"

    def forward(self, h: Tensor) -> Distribution:
        """The distribution p(x | h)."""
        axis = -self.event_dim
        if h.shape[axis] % self.num_levels:
            raise ValueError(
                f"Nominal expected {self.num_levels} E outputs of the network, found {h.shape[axis]} on axis {axis}: "
                f"make its last layer {self.num_levels} times as wide as x."
            )
        return Categories(logits=torch.stack(h.chunk(self.num_levels, dim=axis), -1)).to_event(self.event_dim)

    def bias_at(self, x: Tensor) -> Tensor:
        """The log of the frequency of each level, counted once more than it is there; NaN is left out."""
        levels = torch.arange(self.num_levels, dtype=x.dtype, device=x.device)
        counts = (x.unsqueeze(-1) == levels).sum(0) + 1
        return (counts / counts.sum(-1, keepdim=True)).log().movedim(-1, 0).flatten(0, 1).to(x.dtype)


class Columns(TorchDistribution):
    """Numbers side by side on the last batch axis, each with a distribution of its own.

    Args:
        parts: distributions of single numbers, each with the numbers of its columns on the last batch axis.
        groups: the columns that each part stands for.
        order: the same as one tensor [C], on the device of the parts (None: made of groups).
        validate_args: check values (None: as Pyro is set).

    Example:
        >>> from pyro import distributions as dist
        >>> parts = [dist.Normal(torch.zeros(5, 2), 1.0), dist.Bernoulli(logits=torch.zeros(5, 1))]
        >>> Columns(parts, [[0, 2], [1]]).sample().shape
        torch.Size([5, 3])
    """

    arg_constraints = {}  # noqa: RUF012  # torch's convention

    def __init__(
        self,
        parts: Sequence[Any],
        groups: Sequence[Sequence[int]],
        order: Tensor | None = None,
        validate_args: bool | None = None,
    ):
        self.parts, self.groups = list(parts), groups
        self.order = torch.tensor([i for columns in groups for i in columns]) if order is None else order
        self._back, self._widths = self.order.argsort(), [len(columns) for columns in groups]
        super().__init__(self.parts[0].batch_shape[:-1] + self.order.shape, validate_args=validate_args)

    @constraints.dependent_property
    def support(self) -> Any:
        """What each column can be."""
        each = {i: part.support for part, columns in zip(self.parts, self.groups, strict=True) for i in columns}
        return constraints.stack([each[i] for i in range(len(each))], dim=-1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Columns":
        """The same distribution with a larger batch."""
        shape = torch.Size(batch_shape)[:-1]
        parts = [part.expand((*shape, width)) for part, width in zip(self.parts, self._widths, strict=True)]
        return Columns(parts, self.groups, self.order, self._validate_args)

    def _together(self, values: Sequence[Tensor]) -> Tensor:
        """Values of the parts, put in the order of the columns."""
        return torch.cat(list(values), -1).index_select(-1, self._back)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, [*sample_shape, *batch]."""
        return self._together([part.sample(torch.Size(sample_shape)) for part in self.parts])

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability or log-density of each number of x [*sample_shape, *batch]."""
        if self._validate_args:
            self._validate_sample(value)
        values = value.index_select(-1, self.order).split(self._widths, -1)
        return self._together([part.log_prob(v) for part, v in zip(self.parts, values, strict=True)])

    @property
    def mean(self) -> Tensor:
        """The mean of each column; of categories the most probable one."""
        return self._together([part.mean for part in self.parts])

    @property
    def variance(self) -> Tensor:
        """The variance of each column, where all of them have one."""
        return self._together([part.variance for part in self.parts])


class MixedColumns(Likelihood):
    r"""Likelihood of a table whose columns are of different kinds: each column its own likelihood.

    .. math:: p(x \mid h) = \prod_c p_c(x_c \mid h_c)

    Real numbers, categories (their index), bits and counts stand side by side in one row. Densities of the real columns
    and probabilities of the others multiply to one normalised p(x | h). Columns of one likelihood without parameters
    are scored together.

    Args:
        likelihoods: one for each column, in the order of the columns, each with event_dim 1.

    Raises:
        ValueError: no column, or a likelihood that does not treat its numbers one by one.

    Source: Nazabal, Olmos, Ghahramani, Valera (2020), Handling incomplete heterogeneous data using VAEs,
        arXiv:1807.03653.

    Example:
        >>> from pyro_vae import Bernoulli, HeteroscedasticNormal
        >>> likelihood = MixedColumns([HeteroscedasticNormal(), Nominal(3), Bernoulli(), HeteroscedasticNormal()])
        >>> likelihood.output_shape((4,))
        (8,)
        >>> likelihood(torch.zeros(5, 8)).event_shape
        torch.Size([4])
    """

    num_outputs = None  # type: ignore[assignment]  # the columns differ: see output_shape
    order: Tensor

    def __init__(self, likelihoods: Sequence[Likelihood]):
        super().__init__(event_dim=1)
        if not likelihoods:
            raise ValueError("expected a likelihood for each column, found none: MixedColumns([Normal(), ...]).")
        groups: dict[Any, list[int]] = {}
        for column, likelihood in enumerate(likelihoods):
            if likelihood.event_dim != 1 or isinstance(likelihood, Masked | MixedColumns):
                raise ValueError(
                    f"expected for column {column} a likelihood of one number with event_dim 1, found {likelihood}: "
                    "missing numbers are Masked(MixedColumns([...]))."
                )
            alone = len(likelihood.state_dict()) > 0  # a column with a scale of its own keeps it
            groups.setdefault(id(likelihood) if alone else repr(likelihood), []).append(column)
        self.likelihoods = nn.ModuleList(likelihoods[columns[0]] for columns in groups.values())
        self.groups = list(groups.values())
        self.register_buffer("order", torch.tensor([i for columns in self.groups for i in columns]), persistent=False)

    def columns(self) -> list[Likelihood]:
        """The likelihood of each column."""
        found = {i: one for one, columns in zip(self._each(), self.groups, strict=True) for i in columns}
        return [found[i] for i in range(len(found))]

    def _each(self) -> list[Any]:
        return list(self.likelihoods)

    def extra_repr(self) -> str:
        """Show which columns each likelihood stands for."""
        return f"columns={self.groups}"

    def _widths(self) -> list[int]:
        return [one.output_shape((len(columns),))[0] for one, columns in zip(self._each(), self.groups, strict=True)]

    def output_shape(self, event_shape: Sequence[int]) -> tuple[int, ...]:
        """(the outputs of all columns together,)."""
        if tuple(event_shape) != tuple(self.order.shape):
            raise ValueError(
                f"expected rows of {len(self.order)} columns, found examples of shape {tuple(event_shape)}: "
                "give MixedColumns one likelihood for each column."
            )
        return (sum(self._widths()),)

    def forward(self, h: Tensor) -> Distribution:
        """The distribution p(x | h), event shape [C]; h is [*batch, total of the columns' outputs]."""
        widths, parts = self._widths(), []
        if h.shape[-1] != sum(widths):
            raise ValueError(
                f"MixedColumns expected {sum(widths)} outputs of the network, found {h.shape[-1]}: "
                "make its last layer likelihood.output_shape((C,))[0] wide."
            )
        for likelihood, part in zip(self._each(), h.split(widths, -1), strict=True):
            p = elements(likelihood(part))
            if len(p.event_shape):
                raise ValueError(
                    f"expected likelihoods of independent numbers, found {type(likelihood).__name__}, which is joint "
                    "over columns: leave it out of MixedColumns."
                )
            parts.append(p)
        return Columns(parts, self.groups, self.order).to_event(1)

    def bias_at(self, x: Tensor) -> Tensor:
        """Where each column starts at its own data; NaN is left out."""
        pairs = zip(self._each(), self.groups, strict=True)
        return torch.cat([one.bias_at(x[:, columns]) for one, columns in pairs])


class ColumnInputs(nn.Module):
    """What an encoder's network reads of a row: standardised numbers, one-hot categories, and what is missing.

    Counts and positive numbers are standardised by their logarithm, log(1 + x). A missing number (NaN) reads as the
    mean, a missing category as no category; ``append_gaps`` tells the two apart by one more input a number.

    Args:
        likelihood: the likelihood of the rows, plain or Masked, which says what each column is.
        x: training rows, [N, C], from which mean and scale are taken; NaN is left out.
        standardize: False reads numbers as they are.
        append_gaps: add an input for each column of numbers, 1 where it is missing.

    Example:
        >>> from pyro_vae import HeteroscedasticNormal
        >>> rows = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
        >>> ColumnInputs(MixedColumns([HeteroscedasticNormal(), Nominal(3)]), rows, standardize=False)(rows)
        tensor([[1., 0., 0., 1.],
                [3., 1., 0., 0.]])
    """

    numbers: Tensor
    logged: Tensor
    loc: Tensor
    scale: Tensor

    def __init__(
        self, likelihood: MixedColumns | Masked, x: Tensor, standardize: bool = True, append_gaps: bool = False
    ):
        super().__init__()
        mixed: Any = likelihood.likelihood if isinstance(likelihood, Masked) else likelihood
        each = mixed.columns()
        self.levels = {i: one.num_levels for i, one in enumerate(each) if isinstance(one, Nominal)}
        self.append_gaps = append_gaps
        with torch.no_grad():
            supports = [one(torch.zeros(one.output_shape((1,)))).support.base_constraint for one in each]
        numbers = [i for i in range(len(each)) if i not in self.levels]
        unlimited = [getattr(supports[i], "upper_bound", None) is None for i in numbers]
        from_zero = [getattr(supports[i], "lower_bound", None) == 0 for i in numbers]
        logged = [a and b for a, b in zip(unlimited, from_zero, strict=True)]
        self.register_buffer("numbers", torch.tensor(numbers, dtype=torch.long), persistent=False)
        self.register_buffer("logged", torch.tensor(logged, dtype=torch.bool), persistent=False)
        loc, scale = mean_and_scale(self._read(x))
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        self.register_buffer("loc", loc if standardize else torch.zeros_like(loc))
        self.register_buffer("scale", scale if standardize else torch.ones_like(scale))
        self.num_inputs = len(numbers) * (2 if append_gaps else 1) + sum(self.levels.values())

    def extra_repr(self) -> str:
        """Show what is made of the columns."""
        return f"numbers={self.numbers.tolist()}, levels={self.levels}, append_gaps={self.append_gaps}"

    def _read(self, x: Tensor) -> Tensor:
        x = x.index_select(-1, self.numbers)
        return torch.where(self.logged, x.clamp(min=0).log1p(), x)

    def forward(self, x: Tensor) -> Tensor:
        """The inputs, [*batch, num_inputs]."""
        numbers = (self._read(x) - self.loc) / self.scale
        parts = [numbers.nan_to_num(nan=0.0)]
        if self.append_gaps:
            parts.append(numbers.isnan().to(x.dtype))
        for column, count in self.levels.items():
            levels = torch.arange(count, dtype=x.dtype, device=x.device)
            parts.append((x[..., column : column + 1] == levels).to(x.dtype))
        return torch.cat(parts, -1)
