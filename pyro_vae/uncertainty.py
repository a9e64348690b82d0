r"""Numbers with their errors: an estimate for each example, a score of a whole set, a difference of pairs.

The spread over examples holds two errors, told apart here:

.. math:: \mathrm{se}^2 = \mathrm{se}_{\text{data}}^2 + \mathrm{se}_{\text{Monte Carlo}}^2

The first shrinks with more examples only, the second with more draws of z for each of them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_vae import tails


@dataclass(frozen=True)
class Estimate:
    """A number per example, and what it takes to read it: nats per example.

    Args:
        name: what is estimated.
        values: the estimate of each example, [N].
        num_particles: draws of z behind each of them, K; 0 for an exact value.
        policy: how the data was prepared (binarisation, seed, split).
        errors: the Monte-Carlo standard error of each value, [N]: zeros for exact values, None where unknown (K = 1).
        effective_sample_size: how many equal weights the K weights of each example are worth, [N], or None.
        pareto_k: the shape of the tail of each example's weights, [N], see :func:`pyro_vae.tails.pareto_k`, or None.
        method: how it was estimated, in words, where it is more than K draws from q(z|x).
        units: what the values are counted in.
        caveat: what must not be claimed from it, said wherever it is shown.
    """

    name: str
    values: Tensor
    num_particles: int
    policy: str = ""
    errors: Tensor | None = None
    effective_sample_size: Tensor | None = None
    pareto_k: Tensor | None = None
    method: str = ""
    units: str = "nats"
    caveat: str = ""

    @property
    def mean(self) -> float:
        """The mean over the examples, per example."""
        return self.values.mean().item()

    @property
    def standard_error(self) -> float:
        """The standard error of the mean: the spread over examples, Monte-Carlo error included; nan for one example."""
        if len(self.values) < 2:
            return math.nan
        return (self.values.std() / math.sqrt(len(self.values))).item()

    @property
    def monte_carlo_error(self) -> float:
        """The part of the standard error that more draws of z would remove: were the data fixed, all of it."""
        if self.errors is None:
            return math.nan
        return (self.errors.double().square().sum().sqrt() / len(self.values)).item()

    @property
    def data_error(self) -> float:
        """The part of the standard error that only more examples would lower."""
        return math.sqrt(max(self.standard_error**2 - self.monte_carlo_error**2, 0.0))

    @property
    def num_examples(self) -> int:
        """The number of examples n."""
        return len(self.values)

    @property
    def untrusted(self) -> Tensor | None:
        """For which examples the weights are too heavy-tailed for K draws, [N] boolean; None where it is unknown."""
        if self.pareto_k is None:
            return None
        return ~(self.pareto_k <= tails.largest_pareto_k(self.num_particles))  # nan is not trusted

    @property
    def unjudged(self) -> bool:
        """Whether there are too few weights to tell by their tail if K is large enough."""
        weighted = self.effective_sample_size is not None and not self.method
        return weighted and 0 < self.num_particles < tails.FEWEST_DRAWS

    @property
    def warning(self) -> str:
        """One line where K is too small to trust the number, or to tell, else nothing."""
        if self.unjudged:
            return (
                f"K={self.num_particles} is too small to tell by the weights whether it is enough (that takes "
                f"{tails.FEWEST_DRAWS} draws): {self.name} may be far below; raise num_particles."
            )
        if self.untrusted is None or not bool(self.untrusted.any()):
            return ""
        return (
            f"K={self.num_particles} is too small for {int(self.untrusted.sum())} of {self.num_examples} examples "
            f"(Pareto k > {tails.largest_pareto_k(self.num_particles):.2f}): there {self.name} is underestimated, and "
            "its error too; raise num_particles or use annealed_log_evidence (--estimator annealing)."
        )

    def bits_per_dim(self, num_dims: int) -> "Estimate":
        r"""The same estimate as the number of bits that a number of x costs; lower is better.

        .. math:: \mathrm{bits} = -\frac{\log p(x)}{E \log 2}

        A code length only where p(x | z) gives probabilities of levels (bytes, counts, bits); of a density it is not.

        Args:
            num_dims: how many numbers E make up one example, such as 3 * 32 * 32.
        """
        if self.units != "nats" or num_dims < 1:
            raise ValueError(f"expected nats and num_dims >= 1, found {self.units} and {num_dims}: convert nats once.")
        scale = 1 / (num_dims * math.log(2))
        errors = None if self.errors is None else self.errors * scale
        return replace(
            self,
            name=f"-{self.name}",
            values=-self.values * scale,
            errors=errors,
            effective_sample_size=None,  # said once, of log p(x) itself
            pareto_k=None,
            units="bits per dimension",
        )

    def summary(self) -> dict[str, Any]:
        """The numbers as plain Python, for JSON; what is unknown is left out, a standard error that is none is None."""
        least = None if self.effective_sample_size is None else self.effective_sample_size.min().item()
        most = None if self.pareto_k is None else self.pareto_k.max().item()
        result = {
            "name": self.name,
            "mean": self.mean,
            "standard_error": self.standard_error,
            "monte_carlo_error": self.monte_carlo_error,
            "data_error": self.data_error,
            "num_particles": self.num_particles,
            "num_examples": self.num_examples,
            "units": self._unit_text,
            "policy": self.policy,
            "method": self.method,
            "smallest_effective_sample_size": least,
            "largest_pareto_k": most,
            "untrusted_examples": None if self.untrusted is None else int(self.untrusted.sum()),
            "warning": self.warning,
            "caveat": self.caveat,
        }
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in result.items()}
        return {k: v for k, v in finite.items() if v not in (None, "") or k in ("mean", "standard_error", "policy")}

    @property
    def _unit_text(self) -> str:
        return f"{self.units} per example" if self.units == "nats" else self.units

    def __str__(self) -> str:
        return f"{self._text}; {self.caveat}" if self.caveat else self._text

    @property
    def _text(self) -> str:
        how = self.method or ("exact" if self.num_particles == 0 else f"K={self.num_particles}")
        error = self.standard_error
        if math.isnan(error) and not math.isnan(self.monte_carlo_error):
            number = with_error(self.mean, self.monte_carlo_error)
            return f"{number} {self.units} ({how}, one example: Monte-Carlo error only)"
        if math.isnan(error):
            return f"{self.mean:.2f} {self.units} ({how}, one example: no standard error)"
        text = f"{with_error(self.mean, error)} {self._unit_text} ({how}, n={self.num_examples})"
        if self.unjudged:
            return f"{text}; K too small to judge"
        return f"{text}; K too small for {int(self.untrusted.sum())} of them" if self.warning else text  # type: ignore[union-attr]


@dataclass(frozen=True)
class Difference:
    """How much higher one estimate is than another on the same examples: the spread that they share cancels.

    Args:
        name: what is compared.
        values: the difference of each example, [N].
        units: what the values are counted in.
    """

    name: str
    values: Tensor
    units: str = "nats"

    @property
    def mean(self) -> float:
        """The mean difference, per example."""
        return self.values.mean().item()

    @property
    def standard_error(self) -> float:
        """The standard error of the mean difference, from the spread of the differences; nan for one example."""
        return (self.values.std() / math.sqrt(len(self.values))).item() if len(self.values) > 1 else math.nan

    def __str__(self) -> str:
        return f"{with_error(self.mean, self.standard_error)} {self.units} (paired, n={len(self.values)})"


def paired_difference(a: Estimate, b: Estimate) -> Difference:
    r"""How much higher a is than b, example by example, with the standard error of the mean difference.

    .. math:: \bar d = \frac 1 N \sum_n (a_n - b_n), \qquad \mathrm{se} = \mathrm{sd}(a_n - b_n) / \sqrt N

    Args:
        a: an estimate.
        b: another of the same examples, of one model or of two.

    Returns:
        The difference a - b.

    Raises:
        ValueError: the two were made of differently prepared data, of other numbers of examples, or in other units; or
            both are importance-weighted bounds of different K, whose difference would be one of K. (An exact value,
            or an ELBO, against such a bound is how loose the bound is.)

    Example:
        >>> a = Estimate("log p(x)", torch.tensor([-80.0, -90.0]), 100, "static")
        >>> b = Estimate("log p(x)", torch.tensor([-81.0, -93.0]), 100, "static")
        >>> print(paired_difference(a, b))
        2.0 ± 1.0 nats (paired, n=2)
    """
    pairs = {
        "data policies": (a.policy, b.policy),
        "numbers of examples": (a.num_examples, b.num_examples),
        "units": (a.units, b.units),
    }
    for what, (of_a, of_b) in pairs.items():
        if of_a != of_b:
            raise ValueError(
                f"expected equal {what}, found {of_a!r} and {of_b!r}: numbers about different data cannot be compared; "
                "evaluate both on one data set."
            )
    if a.name == b.name and _rises_with_draws(a) and _rises_with_draws(b) and a.num_particles != b.num_particles:
        raise ValueError(
            f"expected equal num_particles, found {a.num_particles} and {b.num_particles}: {a.name} is a bound that "
            "rises with K, so the difference would be one of K; evaluate both with one K (what K gains is "
            "a.values - b.values)."
        )
    name = a.name if a.name == b.name else f"{a.name} against {b.name}"
    return Difference(name, a.values.to(b.values) - b.values, a.units)


def _rises_with_draws(estimate: Estimate) -> bool:
    """Whether it is :func:`log_evidence` of K draws; an ELBO has one mean for all K, annealing says its method."""
    return estimate.num_particles > 0 and not estimate.method and "log p(x)" in estimate.name


def with_error(mean: float, error: float) -> str:
    """A number to two digits of its standard error: "-84.83 ± 0.31"."""
    decimals = 2 if not error > 0 else min(max(1 - math.floor(math.log10(error)), 0), 6)
    if 0 < error < 0.5e-6:  # not told as no error at all, unless it is none in float64
        return f"{mean:.{decimals}f} ± " + (f"{error:.1e}" if mean + error != mean else "0")
    return f"{mean:.{decimals}f} ± {error:.{decimals}f}"


@dataclass(frozen=True)
class Score:
    """One number about a whole set, with its standard error.

    Args:
        name: what it is.
        value: the number.
        standard_error: its standard error; nan where there is none.
        num_examples: how many examples it was made from.
        method: how, in words.
        policy: the data policy.
    """

    name: str
    value: float
    standard_error: float
    num_examples: int
    method: str = ""
    policy: str = ""

    def summary(self) -> dict[str, Any]:
        """The numbers as plain Python, for JSON; a standard error that is none is None."""
        finite = {
            name: number if math.isfinite(number) else None
            for name, number in (("value", self.value), ("standard_error", self.standard_error))
        }
        rest = {"num_examples": self.num_examples, "method": self.method, "policy": self.policy}
        return {"name": self.name, **finite, **{key: value for key, value in rest.items() if value != ""}}

    def __str__(self) -> str:
        how = ", ".join(filter(None, [self.method, f"n={self.num_examples}"]))
        if math.isnan(self.standard_error):
            return f"{self.value:.3f} ({how}; no standard error)"
        return f"{with_error(self.value, self.standard_error)} ({how})"


def jackknife_error(score: Callable[..., Any], *sets: Tensor, num_groups: int = 10, seed: int = 0) -> Any:
    r"""The standard error of a number made of many examples, by leaving out one group of them after the other.

    .. math:: \mathrm{se}^2 = \frac{G - 1}{G} \sum_g (s_{-g} - \bar s)^2

    It says how much other examples would change the number of this model: what another seed of the training changes is
    for several seeds to show. Of a number that is drawn itself (a forest, say) it is too large.

    Args:
        score: the sets, some rows left out -> a number, such as :func:`pyro_vae.disentanglement.mig`, or several.
        *sets: codes [N, D], factors [N, F], ...: as many rows of each, left out together.
        num_groups: G, 2 to N.
        seed: seed of the grouping.

    Returns:
        The error, or a list of those of several numbers.

    Raises:
        ValueError: fewer than two groups, or more than examples.

    Source: Efron, Stein (1981), The jackknife estimate of variance; Shao, Wu (1989), with groups.

    Example:
        >>> jackknife_error(lambda x: x.mean().item(), torch.tensor([1.0, 2.0, 3.0]), num_groups=3)  # sd / sqrt(3)
        0.577...
    """
    num = len(sets[0])
    if not 2 <= num_groups <= num:
        raise ValueError(f"expected 2 to {num} groups, found {num_groups}: leave out some examples at a time.")
    group = torch.randperm(num, generator=torch.Generator().manual_seed(seed)) % num_groups
    kept = [[part[(group != g).to(part.device)] for part in sets] for g in range(num_groups)]
    left = torch.tensor([score(*parts) for parts in kept], dtype=torch.float64)
    return ((num_groups - 1) * left.var(0, correction=0)).sqrt().tolist()
